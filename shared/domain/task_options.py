"""What a user may say about any task, whatever its kind. Pure."""

from pydantic import BaseModel, ConfigDict, Field

from shared.domain.schedule import Moment, RunWindow
from shared.domain.task import BIGINT_MAX


class TaskOptions(BaseModel):
    """The part of every request for a task that is not about its kind."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_bytes_per_second: int | None = Field(default=None, ge=1, le=BIGINT_MAX)
    not_before: Moment | None = Field(default=None, description="The task waits in the queue until then.")
    run_window: RunWindow | None = Field(
        default=None, description="Outside this time of day the task pauses by itself, and goes on by itself."
    )
