-- The parts of the objects that exports are writing: the checkpoint's counterpart in the object store.

CREATE TABLE sluice.export_parts (
    task_id        bigint NOT NULL REFERENCES sluice.tasks ON DELETE CASCADE,
    segment        integer NOT NULL,            -- one multipart upload; the segments in order are the file
    part_number    integer NOT NULL,
    etag           text NOT NULL,
    bytes          bigint NOT NULL,
    rows           bigint NOT NULL,
    start_position bigint NOT NULL,
    end_position   bigint NOT NULL,
    detail         jsonb,                       -- what the format must know again to close the file
    PRIMARY KEY (task_id, segment, part_number)
);
