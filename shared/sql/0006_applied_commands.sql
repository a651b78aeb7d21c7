-- A command that the broker sends again changes nothing: it was applied in the transaction that wrote it down here.

CREATE TABLE sluice.applied_commands (
    task_id      bigint NOT NULL REFERENCES sluice.tasks ON DELETE CASCADE,
    message_id   uuid NOT NULL,
    command      text NOT NULL,
    state_before text NOT NULL,
    applied_at   timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (task_id, message_id, command)
);
-- Forgotten after a day; a message that is held longer has long been taken from whoever held it.
CREATE INDEX applied_commands_by_age ON sluice.applied_commands (applied_at);
