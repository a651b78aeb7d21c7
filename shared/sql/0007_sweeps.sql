-- What spares a sweep looking through all tasks and all objects each time.

-- Which tasks may still read a file.
CREATE INDEX tasks_by_source ON sluice.tasks ((params -> 'source' ->> 'object_key'))
    WHERE state NOT IN ('succeeded', 'aborted');

-- When all objects of the store were last compared with what rows know of them.
CREATE TABLE sluice.listings (
    one       boolean PRIMARY KEY DEFAULT true CHECK (one),
    listed_at timestamptz NOT NULL
);
