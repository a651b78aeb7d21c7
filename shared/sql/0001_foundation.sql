-- The catalogue: who owns what, what is being done, and what must still be said or cleaned up.

CREATE SCHEMA IF NOT EXISTS sluice;
-- Tables of loads live apart from the datasets that show them, so that nobody finds one before it is whole.
CREATE SCHEMA IF NOT EXISTS sluice_loads;

CREATE TABLE sluice.accounts (
    account_id    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    username      text NOT NULL UNIQUE,
    password_hash text NOT NULL,
    is_admin      boolean NOT NULL DEFAULT false,
    created_at    timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE sluice.tokens (
    token_id    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account_id  bigint NOT NULL REFERENCES sluice.accounts ON DELETE CASCADE,
    name        text NOT NULL,
    token_hash  bytea NOT NULL UNIQUE,          -- SHA-256 of a 256-bit random token
    created_at  timestamptz NOT NULL DEFAULT now(),
    expires_at  timestamptz NOT NULL,
    revoked_at  timestamptz
);
CREATE INDEX tokens_by_account ON sluice.tokens (account_id);

CREATE TABLE sluice.files (
    file_id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account_id   bigint NOT NULL REFERENCES sluice.accounts,
    name         text NOT NULL,
    object_key   text NOT NULL UNIQUE,
    bytes        bigint NOT NULL,
    etag         text NOT NULL,
    content_type text NOT NULL,
    task_id      bigint,                        -- the task that made it, if one did
    created_at   timestamptz NOT NULL DEFAULT now(),
    deleted_at   timestamptz
);
CREATE UNIQUE INDEX files_by_name ON sluice.files (account_id, name) WHERE deleted_at IS NULL;
CREATE INDEX files_deleted ON sluice.files (deleted_at) WHERE deleted_at IS NOT NULL;

-- Every object is written down here before its first byte is sent, and leaves in the transaction that gives it an
-- owner. What stays behind without a living writer is an orphan, and can always be found.
CREATE TABLE sluice.object_ledger (
    object_key  text PRIMARY KEY,
    upload_id   text,                           -- NULL while (or if) the object is written without multipart
    task_id     bigint,
    created_at  timestamptz NOT NULL DEFAULT now(),
    alive_until timestamptz NOT NULL            -- pushed forward by the writer; tasks' objects live as long as the task
);
CREATE INDEX object_ledger_by_task ON sluice.object_ledger (task_id);

CREATE TABLE sluice.tasks (
    task_id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account_id    bigint NOT NULL REFERENCES sluice.accounts,
    kind          text NOT NULL CHECK (kind IN ('upload', 'import', 'export', 'archive', 'process')),
    state         text NOT NULL CHECK (state IN
                      ('queued', 'running', 'pausing', 'paused', 'aborting', 'succeeded', 'failed', 'aborted')),
    epoch         bigint NOT NULL DEFAULT 0,    -- the fencing token: each claim raises it
    params        jsonb NOT NULL,               -- what the user asked for
    plan          jsonb,                        -- what the first claim found out; never changes afterwards
    checkpoint    jsonb NOT NULL DEFAULT '{}',
    result        jsonb,
    error         jsonb,
    attempts      integer NOT NULL DEFAULT 0,   -- claims since the last committed batch
    claims        integer NOT NULL DEFAULT 0,
    bytes_done    bigint NOT NULL DEFAULT 0,
    bytes_total   bigint,
    rows_done     bigint NOT NULL DEFAULT 0,
    rows_total    bigint,
    rejects       bigint NOT NULL DEFAULT 0,
    max_bytes_per_second bigint CHECK (max_bytes_per_second > 0),
    worker        text,
    lease_until   timestamptz,
    claimed_at    timestamptz,
    running_seconds double precision NOT NULL DEFAULT 0,
    announced_at  timestamptz NOT NULL DEFAULT now(),   -- when the bus was last told to look at it
    not_before    timestamptz,                  -- a start time, or the end of a back-off
    created_at    timestamptz NOT NULL DEFAULT now(),
    updated_at    timestamptz NOT NULL DEFAULT now(),
    started_at    timestamptz,
    ended_at      timestamptz,
    expires_at    timestamptz,
    idempotency_key text,
    request_hash  bytea
);
CREATE UNIQUE INDEX tasks_by_idempotency_key ON sluice.tasks (account_id, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX tasks_by_account ON sluice.tasks (account_id, task_id DESC);
CREATE INDEX tasks_live ON sluice.tasks (state, lease_until)
    WHERE state IN ('queued', 'running', 'pausing', 'aborting');
CREATE INDEX tasks_expiring ON sluice.tasks (expires_at) WHERE expires_at IS NOT NULL;
-- The checkpoint changes with each batch: keep the updates on the page.
ALTER TABLE sluice.tasks SET (fillfactor = 50);

CREATE TABLE sluice.task_events (
    event_id    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    task_id     bigint NOT NULL REFERENCES sluice.tasks ON DELETE CASCADE,
    event       text NOT NULL,
    from_state  text,
    to_state    text NOT NULL,
    epoch       bigint NOT NULL,
    actor       text NOT NULL,
    reason      text,
    occurred_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX task_events_by_task ON sluice.task_events (task_id, event_id);

CREATE TABLE sluice.outbox (
    outbox_id   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    exchange    text NOT NULL,
    routing_key text NOT NULL,
    body        jsonb NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    due_at      timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX outbox_due ON sluice.outbox (due_at);

CREATE TABLE sluice.rejects (
    task_id     bigint NOT NULL REFERENCES sluice.tasks ON DELETE CASCADE,
    line        bigint NOT NULL,                -- where the record begins; 1 is the first line of the file
    column_name text,
    reason      text NOT NULL,
    raw         text NOT NULL,                  -- the record as it stands in the file; what is not text is escaped
    PRIMARY KEY (task_id, line)
);

CREATE TABLE sluice.datasets (
    dataset_id  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    account_id  bigint NOT NULL REFERENCES sluice.accounts,
    name        text NOT NULL,
    columns     jsonb NOT NULL,                 -- [{"name": …, "type": …}] in order
    created_at  timestamptz NOT NULL DEFAULT now(),
    updated_at  timestamptz NOT NULL DEFAULT now(),
    UNIQUE (account_id, name)
);

-- A load outlives its dataset as long as an export reads it: then dataset_id is NULL and only the pin keeps it.
CREATE TABLE sluice.loads (
    load_id     bigint PRIMARY KEY,             -- the number of the import task that made it
    dataset_id  bigint REFERENCES sluice.datasets ON DELETE SET NULL,
    account_id  bigint NOT NULL REFERENCES sluice.accounts,
    rows        bigint NOT NULL,
    rejects     bigint NOT NULL,
    bytes       bigint NOT NULL,
    columns     jsonb NOT NULL,
    file_id     bigint,
    file_name   text,
    attached_at timestamptz NOT NULL DEFAULT now(),
    detached_at timestamptz
);
CREATE INDEX loads_by_dataset ON sluice.loads (dataset_id);
CREATE INDEX loads_detached ON sluice.loads (load_id) WHERE detached_at IS NOT NULL;

CREATE TABLE sluice.load_pins (
    load_id     bigint NOT NULL REFERENCES sluice.loads ON DELETE RESTRICT,
    task_id     bigint NOT NULL REFERENCES sluice.tasks ON DELETE CASCADE,
    PRIMARY KEY (load_id, task_id)
);
CREATE INDEX load_pins_by_task ON sluice.load_pins (task_id);
