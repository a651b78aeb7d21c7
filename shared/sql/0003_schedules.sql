-- A daily window outside which a task pauses by itself, and when it will go on by itself.

ALTER TABLE sluice.tasks ADD COLUMN run_window jsonb, ADD COLUMN resume_at timestamptz;
CREATE INDEX tasks_windowed ON sluice.tasks (task_id)
    WHERE run_window IS NOT NULL AND state IN ('queued', 'running', 'paused');
