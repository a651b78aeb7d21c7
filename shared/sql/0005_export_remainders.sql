-- What an export has read and not yet sent, because it does not fill a part: kept with the checkpoint, so that neither
-- a pause nor a kill makes a long scan that finds little begin again.

CREATE TABLE sluice.export_remainders (
    task_id        bigint NOT NULL REFERENCES sluice.tasks ON DELETE CASCADE,
    start_position bigint NOT NULL,
    end_position   bigint NOT NULL,
    rows           bigint NOT NULL,
    data           bytea NOT NULL,
    detail         jsonb,                       -- as in export_parts
    PRIMARY KEY (task_id, start_position)
);
-- Often compressed already, and gone soon.
ALTER TABLE sluice.export_remainders ALTER COLUMN data SET STORAGE EXTERNAL;
