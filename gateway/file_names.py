"""What a file may be called, and how a name is written into a header."""

import unicodedata
from urllib.parse import quote

from shared.domain.errors import InvalidRequest

MAX_NAME_BYTES = 1024
# Bidirectional controls (Unicode, UAX #9) make a name look like another.
_TURNING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def check_file_name(name: str, *, where: str = "path") -> str:
    """`name`, if it can be one: slashes make folders, as in the keys of object stores.

    `where` is the part of the request that it came in. Raises InvalidRequest.
    """
    fault = None
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise InvalidRequest("the file name is not valid Unicode") from None
    if size > MAX_NAME_BYTES:
        fault = f"has {size} bytes in UTF-8; {MAX_NAME_BYTES} are allowed"
    elif not all(_is_allowed(character) for character in name):
        fault = "has control characters, or others that cannot be printed"
    elif any(part in ("", ".", "..") for part in name.split("/")):
        fault = "has an empty part, or one that is . or .., between slashes"
    if fault is not None:
        raise InvalidRequest(f"the file name {fault}", errors=[{"in": where, "field": "file_name", "fault": fault}])
    return name


def _is_allowed(character: str) -> bool:
    """Spaces of all kinds, as in the names of macOS screenshots, and joiners, as in emoji, but not what turns text."""
    if character.isprintable():
        return True
    return unicodedata.category(character) in ("Zs", "Cf") and character not in _TURNING


def attachment(name: str) -> str:
    """Content-Disposition for saving a file: RFC 6266, the name in full by RFC 8187, and in ASCII for old clients."""
    last = name.rpartition("/")[2]
    plain = "".join(c if c.isascii() and c not in '"\\%' else "_" for c in last)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(last, safe='')}"
