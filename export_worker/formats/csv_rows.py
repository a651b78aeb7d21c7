"""CSV as PostgreSQL writes it: nothing is parsed or quoted here."""

from collections.abc import Sequence
from typing import Any

from export_worker.formats.format import Copy, Encoded
from shared.adapters.catalog import Column
from shared.adapters.postgres import quoted
from shared.domain.export_params import CsvOutput, Quoting

# What spreadsheets take for the beginning of a formula (OWASP, "CSV Injection").
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


class CsvRows:
    """The `Format` CSV."""

    def __init__(self, columns: Sequence[Column], output: CsvOutput) -> None:
        self._columns = columns
        self._output = output
        self._select = ", ".join(self._selected(column) for column in columns)
        self._options: dict[str, Any] = {"format": "csv", "delimiter": output.delimiter, "null": output.null}

    @property
    def content_type(self) -> str:
        return f"text/csv; charset=utf-8; header={'present' if self._output.header else 'absent'}"

    def head(self) -> Copy | Encoded:
        if not self._output.header:
            return Encoded(b"")
        names = [column.name for column in self._columns]
        if self._output.escape_formulas:
            names = [f"'{name}" if name.startswith(_FORMULA_STARTS) else name for name in names]
        nothing = ", ".join(f"NULL AS {quoted(name)}" for name in names)
        return Copy(f"SELECT {nothing} LIMIT 0", {**self._options, "header": True})

    def rows(self, source: str) -> Copy:
        return Copy(f"SELECT {self._select} {source}", self._options | self._force_quote())

    async def encode(self, answer: bytes) -> Encoded:
        return Encoded(answer)

    async def tail(self, details: Sequence[Any]) -> bytes:
        return b""

    def _force_quote(self) -> dict[str, Any]:
        if self._output.quoting is Quoting.ALL:
            return {"force_quote": True}
        texts = [column.name for column in self._columns if column.type == "text"]
        return {"force_quote": texts} if self._output.escape_formulas and texts else {}

    def _selected(self, column: Column) -> str:
        name = quoted(column.name)
        if not self._output.escape_formulas or column.type != "text":
            return name
        starts = ", ".join(f"E'\\x{ord(start):02x}'" for start in _FORMULA_STARTS)
        return f"CASE WHEN left({name}, 1) IN ({starts}) THEN '''' || {name} ELSE {name} END AS {name}"
