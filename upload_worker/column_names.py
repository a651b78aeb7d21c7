"""Turns the header of a file into column names that PostgreSQL takes, and says what it changed."""

import unicodedata
from collections.abc import Sequence
from itertools import count
from typing import Any

from shared.domain.errors import DETAIL_CHARACTERS, InvalidData, storable

# PostgreSQL: 1,600 columns in a table, of which Sluice's own `_load` is one; NAMEDATALEN - 1 bytes in a name.
MAX_COLUMNS = 1599
MAX_NAME_BYTES = 63
RESERVED = frozenset({"ctid", "xmin", "xmax", "cmin", "cmax", "tableoid", "_load"})


def column_names(header: Sequence[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """Names that are unique and legal, as near to the header as can be, and a note for each one changed.

    Raises InvalidData for more columns than a table can have.
    """
    if len(header) > MAX_COLUMNS:
        raise InvalidData(
            f"The file has {len(header)} columns; a dataset can have {MAX_COLUMNS}. "
            "If that is not what the file looks like, set the delimiter in the import's csv options.",
            columns=len(header),
        )
    wanted = [_legal(name) for name in header]
    verbatim = {name for name, raw in zip(wanted, header, strict=True) if name == raw}
    taken: set[str] = set()
    names, notes = [], []
    for number, (raw, want) in enumerate(zip(header, wanted, strict=True), 1):
        name = want or f"column_{number}"
        if name in taken or (name != raw and name in verbatim):
            name = _numbered(name, taken | verbatim)
        taken.add(name)
        names.append(name)
        if name != raw:
            notes.append({"column": number, "from": storable(raw, DETAIL_CHARACTERS), "to": name})
    return names, notes


def _legal(raw: str) -> str:
    name = "".join(" " if unicodedata.category(char) in ("Cc", "Cs") else char for char in raw).strip()
    if name in RESERVED:
        name += "_"
    return _cut(name, MAX_NAME_BYTES)


def _cut(name: str, limit: int) -> str:
    return name.encode()[:limit].decode("utf-8", "ignore").rstrip()


def _numbered(name: str, avoid: set[str]) -> str:
    for number in count(2):
        suffix = f"_{number}"
        candidate = _cut(name, MAX_NAME_BYTES - len(suffix)) + suffix
        if candidate not in avoid:
            return candidate
    raise AssertionError
