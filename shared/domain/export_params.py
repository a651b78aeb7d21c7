"""What an export is asked to do, and the check of it against the dataset's columns. Pure."""

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from shared.domain.csv_options import MOST_COLUMNS
from shared.domain.errors import InvalidRequest
from shared.domain.import_params import DatasetName
from shared.domain.task import BIGINT_MAX
from shared.domain.task_options import TaskOptions

MOST_CONDITIONS = 50
MOST_VALUES = 10_000

_NUMBERS = frozenset({"bigint", "numeric", "double precision"})
_TIMES = frozenset({"date", "timestamp", "timestamptz"})


class ExportFormat(StrEnum):
    """A format's value is what the file's name ends with."""

    CSV = "csv"
    CSV_GZ = "csv.gz"
    JSONL = "jsonl"
    JSONL_GZ = "jsonl.gz"
    PARQUET = "parquet"
    XLSX = "xlsx"


class Quoting(StrEnum):
    MINIMAL = "minimal"
    ALL = "all"


class Operator(StrEnum):
    EQ = "="
    NE = "!="
    LT = "<"
    LE = "<="
    GT = ">"
    GE = ">="
    IN = "in"
    IS_NULL = "is_null"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_Text = Annotated[StrictStr, Field(pattern=r"^[^\x00]*$")]
_Integer = Annotated[StrictInt, Field(ge=-BIGINT_MAX - 1, le=BIGINT_MAX)]
_Float = Annotated[StrictFloat, Field(allow_inf_nan=False)]
Value = StrictBool | _Integer | _Float | _Text
_Column = Annotated[str, Field(min_length=1)]
# fail_fast: a fault for each of a million items would take gigabytes to write down.
_Values = Annotated[list[Value], Field(max_length=MOST_VALUES, fail_fast=True)]


class Condition(_Strict):
    """Rows for which `column op value` is true; a comparison with NULL never is, as in SQL."""

    column: _Column
    op: Operator
    value: Value | _Values | None = Field(
        default=None,
        description="A list for `in`; for `is_null` true (the default) or false; numbers may be texts, so that they "
        "keep all digits. Times without a zone are UTC.",
    )

    @model_validator(mode="after")
    def _value_fits_operator(self) -> Self:
        if self.op is Operator.IN:
            if not isinstance(self.value, list) or not self.value:
                raise ValueError(f"in takes a list of 1 to {MOST_VALUES} values")
        elif self.op is Operator.IS_NULL:
            if self.value is not None and not isinstance(self.value, bool):
                raise ValueError("is_null takes true, false or nothing")
        elif self.value is None or isinstance(self.value, list):
            raise ValueError(f"{self.op} takes one value; use is_null to ask for NULL and in for several")
        return self

    @property
    def values(self) -> list[Value]:
        """What is compared with; nothing for is_null."""
        if self.op is Operator.IS_NULL or self.value is None:
            return []
        return self.value if isinstance(self.value, list) else [self.value]


class CsvOutput(_Strict):
    """How CSV is written; it is PostgreSQL's own CSV unless asked otherwise."""

    delimiter: Annotated[str, Field(pattern=r"^[\x01-\x09\x0b\x0c\x0e-\x21\x23-\x7f]$")] = ","
    header: bool = True
    null: Annotated[str, Field(max_length=100, pattern=r'^[^\x00\r\n"]*$')] = Field(
        default="", description="Stands for NULL, unquoted; the same text as a value is quoted."
    )
    quoting: Quoting = Field(default=Quoting.MINIMAL, description="minimal: where needed; all: every value, not NULL.")
    escape_formulas: bool = Field(
        default=False,
        description="Put ' before texts that a spreadsheet would run as a formula (they begin with = + - @, a tab or "
        "a return), and quote all texts. Such a file does not read back as it was.",
    )

    @model_validator(mode="after")
    def _marks_do_not_clash(self) -> Self:
        if self.delimiter in self.null:
            raise ValueError("null must not contain the delimiter")
        return self


class ExportRequest(TaskOptions):
    """What a user posts and what the task stores."""

    kind: Literal["export"]
    dataset: DatasetName
    load_id: int | None = Field(default=None, ge=1, le=BIGINT_MAX, description="Only the rows of this import.")
    format: ExportFormat = ExportFormat.CSV
    columns: Annotated[list[_Column], Field(min_length=1, max_length=MOST_COLUMNS, fail_fast=True)] | None = Field(
        default=None, description="These columns in this order; all of them by default."
    )
    time_column: _Column | None = Field(
        default=None, description="What from_date and to_date restrict; by default the time of the import."
    )
    from_date: datetime | None = Field(default=None, description="Not earlier. Without a zone it is UTC.")
    to_date: datetime | None = Field(default=None, description="Earlier than this.")
    conditions: Annotated[list[Condition], Field(max_length=MOST_CONDITIONS)] = Field(
        default_factory=list, description="All must hold."
    )
    limit: int | None = Field(default=None, ge=0, le=BIGINT_MAX, description="At most so many rows.")
    csv: CsvOutput = Field(default_factory=CsvOutput)
    file_name: str | None = Field(
        default=None, min_length=1, description="By default the dataset's name and the task's number."
    )
    overwrite: bool = Field(default=False, description="Replace a file of that name.")

    @model_validator(mode="after")
    def _columns_are_named_once(self) -> Self:
        if self.columns and (twice := _repeated(self.columns)):
            raise ValueError(f"columns names {twice!r} twice")
        if self.time_column is not None and self.from_date is None and self.to_date is None:
            raise ValueError("time_column needs from_date or to_date")
        return self

    def check(self, columns: Mapping[str, str]) -> None:
        """Check it against the dataset's columns, name to type.

        Raises InvalidRequest, which names every fault.
        """
        faults = [*self._faults(columns)]
        if faults:
            raise InvalidRequest(
                f"the dataset {self.dataset!r} does not allow this export: {'; '.join(fault for _, fault in faults)}",
                errors=[{"in": "body", "field": field, "fault": fault} for field, fault in faults],
            )

    def _faults(self, columns: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        for number, name in enumerate(self.columns or ()):
            if name not in columns:
                yield f"columns.{number}", _unknown(name, columns)
        if self.time_column is not None:
            yield from (("time_column", fault) for fault in self._time_faults(self.time_column, columns))
        for number, condition in enumerate(self.conditions):
            fault = _condition_fault(condition, columns)
            if fault:
                yield f"conditions.{number}", fault

    def _time_faults(self, name: str, columns: Mapping[str, str]) -> Iterator[str]:
        kind = columns.get(name)
        if kind is None:
            yield _unknown(name, columns)
        elif kind not in _TIMES:
            yield f"the column {name!r} is {kind}; a time range needs date, timestamp or timestamptz"
        elif kind != "timestamptz" and any(bound and bound.tzinfo for bound in (self.from_date, self.to_date)):
            yield f"the column {name!r} is {kind}: give from_date and to_date without a time zone"


def _repeated(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _unknown(name: str, columns: Iterable[str]) -> str:
    known = ", ".join(repr(column) for column in list(columns)[:20])
    return f"there is no column {name!r}; there are {known}"


def _condition_fault(condition: Condition, columns: Mapping[str, str]) -> str | None:
    name = condition.column
    kind = columns.get(name)
    if kind is None:
        return _unknown(name, columns)
    if condition.values and kind == "jsonb":
        return f"the column {name!r} is jsonb: only is_null can be asked of it"
    for value in condition.values:
        if kind == "boolean":
            fits = isinstance(value, bool)
        elif kind in _NUMBERS:
            fits = not isinstance(value, bool)
        else:
            fits = isinstance(value, str)
        if not fits:
            return f"the column {name!r} is {kind}, which {value!r} is not"
    return None
