"""When a task may run: a start time, and a daily window in a named time zone. Pure; the caller brings the clock."""

import re
from datetime import UTC, date, datetime, time, timedelta
from typing import Annotated, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

# Files beside the zones, which say something else on each machine.
_OF_THIS_MACHINE = ("localtime", "posixrules")
_TIME_OF_DAY = r"^([01]\d|2[0-3]):[0-5]\d$"


def _time_of_day(value: object) -> object:
    """The same as the pattern, in words."""
    if isinstance(value, str) and not re.fullmatch(_TIME_OF_DAY, value, re.ASCII):
        raise ValueError("write the time of day as 22:00, from 00:00 to 23:59")
    return value


_TimeOfDay = Annotated[str, BeforeValidator(_time_of_day), Field(pattern=_TIME_OF_DAY, examples=["22:00"])]

# What PostgreSQL and Python can count with in every time zone.
Moment = Annotated[AwareDatetime, Field(ge=datetime(1900, 1, 1, tzinfo=UTC), le=datetime(9000, 1, 1, tzinfo=UTC))]


class RunWindow(BaseModel):
    """From one time of day to another, every day; past midnight when `to` is the earlier one.

    The times are wall clock times of the zone: a night in which the clocks change is an hour longer or shorter. A
    wall clock time that a night skips is taken as if the clocks had not been changed yet; of one that comes twice the
    first counts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)

    start: _TimeOfDay = Field(alias="from")
    end: _TimeOfDay = Field(alias="to")
    time_zone: str = Field(default="UTC", examples=["Europe/Berlin"])

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, value: str) -> str:
        try:
            if value in _OF_THIS_MACHINE:
                raise ZoneInfoNotFoundError(value)
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError(f"{value!r} is not a known IANA time zone; try Europe/Berlin or UTC") from error
        return value

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.start == self.end:
            raise ValueError("from and to must differ; leave run_window out to run at any time")
        return self

    def is_open(self, now: datetime) -> bool:
        """Whether a task may run at `now`, an aware time."""
        return any(start <= now < end for start, end in self._around(now))

    def next_open(self, now: datetime) -> datetime:
        """The next opening after `now`, in UTC; `now` itself while the window is open."""
        if self.is_open(now):
            return now
        # A window inside the hour that a night skips is empty that day.
        return min(start for start, end in self._around(now) if now < start < end)

    def _around(self, now: datetime) -> list[tuple[datetime, datetime]]:
        zone = ZoneInfo(self.time_zone)
        today = now.astimezone(zone).date()
        return [self._on(today + timedelta(days=days), zone) for days in (-1, 0, 1, 2)]

    def _on(self, day: date, zone: ZoneInfo) -> tuple[datetime, datetime]:
        """The window that opens on `day`."""
        start, end = time.fromisoformat(self.start), time.fromisoformat(self.end)
        end_day = day if start < end else day + timedelta(days=1)
        opens, closes = datetime.combine(day, start, zone), datetime.combine(end_day, end, zone)
        return opens.astimezone(UTC), closes.astimezone(UTC)

    def __str__(self) -> str:
        return f"{self.start} to {self.end} {self.time_zone}"
