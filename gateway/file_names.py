"""What a file may be called, and how a name is written into a header."""

from urllib.parse import quote

from shared.domain.errors import InvalidRequest

MAX_NAME_BYTES = 1024


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
    elif not name.isprintable():
        fault = "has control characters, or others that cannot be printed"
    elif any(part in ("", ".", "..") for part in name.split("/")):
        fault = "has an empty part, or one that is . or .., between slashes"
    if fault is not None:
        raise InvalidRequest(f"the file name {fault}", errors=[{"in": where, "field": "file_name", "fault": fault}])
    return name


def attachment(name: str) -> str:
    """Content-Disposition for saving a file: RFC 6266, the name in full by RFC 8187, and in ASCII for old clients."""
    last = name.rpartition("/")[2]
    plain = "".join(c if c.isascii() and c not in '"\\%' else "_" for c in last)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(last, safe='')}"
