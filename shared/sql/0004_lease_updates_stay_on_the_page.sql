-- Every batch and heartbeat moves the lease. As long as an index holds it, each of them writes all indexes.

DROP INDEX sluice.tasks_live;
CREATE INDEX tasks_live ON sluice.tasks (state) WHERE state IN ('queued', 'running', 'pausing', 'aborting');
