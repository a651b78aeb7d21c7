"""Conditional and range requests (RFC 9110, sections 13 and 14): what part of a stored file is asked for. Pure."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime

from shared.domain.errors import PreconditionFailed, RangeNotSatisfiable

_RANGE = re.compile(r"bytes=[ \t]*([0-9]{0,100})-([0-9]{0,100})[ \t]*", re.IGNORECASE)
_TAG = re.compile(r'(?:W/)?"[^"]*"')


@dataclass(frozen=True, slots=True)
class Representation:
    """`etag` without quotes; `modified_at` counts in whole seconds, as in HTTP dates."""

    bytes: int
    etag: str
    modified_at: datetime

    @property
    def quoted_etag(self) -> str:
        return f'"{self.etag}"'

    @property
    def last_modified(self) -> str:
        return format_datetime(self.modified_at.astimezone(UTC).replace(microsecond=0), usegmt=True)


@dataclass(frozen=True, slots=True)
class Part:
    """The bytes `start` up to, not including, `end`."""

    start: int
    end: int


def check_write(headers: Mapping[str, str], there: Representation | None) -> None:
    """Whether `there`, None when there is nothing, may be replaced or deleted. Raises PreconditionFailed."""
    if (wanted := headers.get("If-Match")) is not None and not (there and _is_named(wanted, there)):
        raise PreconditionFailed(
            "there is no file with the ETag that If-Match names", etag=there.quoted_etag if there else None
        )
    if there is not None and (known := headers.get("If-None-Match")) is not None and _is_known(known, there):
        raise PreconditionFailed("there is a file that If-None-Match rules out", etag=there.quoted_etag)


def is_unmodified(headers: Mapping[str, str], there: Representation) -> bool:
    """Whether the client's copy is still good (304). Raises PreconditionFailed."""
    if (wanted := headers.get("If-Match")) is not None:
        if not _is_named(wanted, there):
            raise PreconditionFailed("the file has another ETag than If-Match names", etag=there.quoted_etag)
    elif (date := _date(headers.get("If-Unmodified-Since"))) is not None and _seconds(there) > date:
        raise PreconditionFailed("the file was modified since", last_modified=there.last_modified)
    if (known := headers.get("If-None-Match")) is not None:
        return _is_known(known, there)
    date = _date(headers.get("If-Modified-Since"))
    return date is not None and _seconds(there) <= date


def _is_named(tags: str, there: Representation) -> bool:
    """Strong comparison: a weak tag never matches."""
    return tags.strip() == "*" or there.quoted_etag in _TAG.findall(tags)


def _is_known(tags: str, there: Representation) -> bool:
    return tags.strip() == "*" or there.quoted_etag in [tag.removeprefix("W/") for tag in _TAG.findall(tags)]


def wanted_part(headers: Mapping[str, str], there: Representation) -> Part | None:
    """The single range that is asked for; None: the whole.

    Ranges in other units, several at once and malformed ones are ignored, as they may be. Raises RangeNotSatisfiable.
    """
    match = _RANGE.fullmatch(headers.get("Range", ""))
    if match is None or not _range_applies(headers.get("If-Range"), there):
        return None
    first, last = match.groups()
    if first == "":
        if last == "" or there.bytes == 0:
            return None  # a suffix of nothing is all of it, and Content-Range cannot say so
        if int(last) == 0:
            raise _unsatisfiable(there)
        return Part(max(0, there.bytes - int(last)), there.bytes)
    if last != "" and int(last) < int(first):
        return None
    if int(first) >= there.bytes:
        raise _unsatisfiable(there)
    return Part(int(first), there.bytes if last == "" else min(int(last) + 1, there.bytes))


def _range_applies(if_range: str | None, there: Representation) -> bool:
    if if_range is None:
        return True
    if if_range.startswith(('"', "W/")):
        return if_range == there.quoted_etag  # strong comparison: a weak one never matches
    return if_range == there.last_modified


def _unsatisfiable(there: Representation) -> RangeNotSatisfiable:
    return RangeNotSatisfiable(f"the file has {there.bytes:,} bytes; the range lies outside", bytes=there.bytes)


def _seconds(there: Representation) -> datetime:
    return there.modified_at.astimezone(UTC).replace(microsecond=0)


def _date(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    return date if date.tzinfo is not None else date.replace(tzinfo=UTC)
