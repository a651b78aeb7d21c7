"""Windows of the day, with clocks that change."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from shared.domain.schedule import RunWindow

BERLIN = ZoneInfo("Europe/Berlin")
NIGHT = RunWindow.model_validate({"from": "22:00", "to": "06:00", "time_zone": "Europe/Berlin"})


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN)


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ("2026-01-10T21:59:59", False),
        ("2026-01-10T22:00:00", True),
        ("2026-01-11T00:00:00", True),
        ("2026-01-11T05:59:59", True),
        ("2026-01-11T06:00:00", False),
        ("2026-01-11T12:00:00", False),
    ],
)
def test_a_window_past_midnight_is_open_at_night_only(now: str, expected: bool) -> None:
    assert NIGHT.is_open(at(now)) is expected


def test_a_night_in_which_clocks_go_forward_is_an_hour_shorter() -> None:
    opens = NIGHT.next_open(at("2026-03-28T12:00:00"))
    closed = at("2026-03-29T06:00:00").astimezone(UTC)
    assert (closed - opens) == timedelta(hours=7)
    assert NIGHT.is_open(closed - timedelta(seconds=1))
    assert not NIGHT.is_open(closed)


def test_a_night_in_which_clocks_go_back_is_an_hour_longer() -> None:
    opens = NIGHT.next_open(at("2026-10-24T12:00:00"))
    closed = at("2026-10-25T06:00:00").astimezone(UTC)
    assert (closed - opens) == timedelta(hours=9)
    assert NIGHT.is_open(closed - timedelta(seconds=1))


def test_a_window_that_opens_in_a_skipped_hour_still_opens_that_day() -> None:
    window = RunWindow.model_validate({"from": "02:30", "to": "04:00", "time_zone": "Europe/Berlin"})
    opens = window.next_open(at("2026-03-29T00:00:00"))
    assert opens == datetime(2026, 3, 29, 1, 30, tzinfo=UTC)
    assert window.is_open(opens)


@given(
    st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
    st.times().map(lambda t: t.strftime("%H:%M")),
    st.times().map(lambda t: t.strftime("%H:%M")),
    st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu"]),
)
def test_the_next_opening_is_open_and_the_moment_before_it_is_not(
    now: datetime, start: str, end: str, zone: str
) -> None:
    if start == end:
        return
    window = RunWindow.model_validate({"from": start, "to": end, "time_zone": zone})
    opens = window.next_open(now)
    # A day's window may be empty where clocks go forward.
    assert now <= opens <= now + timedelta(hours=50)
    assert window.is_open(opens)
    if opens > now:
        assert not window.is_open(opens - timedelta(seconds=1)) or not window.is_open(now)


def test_a_window_inside_a_skipped_hour_opens_on_the_next_day() -> None:
    window = RunWindow.model_validate({"from": "02:30", "to": "03:15", "time_zone": "Europe/Berlin"})
    assert window.next_open(at("2026-03-29T00:00:00")) == at("2026-03-30T02:30:00")


@pytest.mark.parametrize(
    "wrong",
    [
        {"from": "22:00", "to": "22:00"},
        {"from": "24:00", "to": "06:00"},
        {"from": "9:00", "to": "06:00"},
        {"from": "22:00", "to": "06:00", "time_zone": "Mars/Olympus"},
        {"from": "22:00", "to": "06:00", "time_zone": "localtime"},
        {"from": "22:00", "to": "06:00", "time_zone": "../etc/passwd"},
        {"from": "22:00"},
    ],
)
def test_a_window_that_is_not_right_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        RunWindow.model_validate(wrong)
