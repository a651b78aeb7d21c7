"""How one file is read: decided once, by looking at it, and then stored with the task."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from shared.domain.csv_options import ColumnType, Compression
from shared.domain.errors import storable

# COPY always has a quote character; a file without quoting gets one that text does not contain.
NO_QUOTE = "\x01"


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Dialect(_Frozen):
    """The three characters of COPY's CSV format, each one ASCII byte."""

    delimiter: str = ","
    quote: str = '"'
    escape: str = '"'

    @property
    def delimiter_byte(self) -> bytes:
        return self.delimiter.encode()

    @property
    def quote_byte(self) -> bytes:
        return self.quote.encode()

    @property
    def escape_byte(self) -> bytes:
        return self.escape.encode()


class Column(_Frozen):
    name: str
    type: ColumnType
    source_name: Annotated[str | None, BeforeValidator(lambda name: name and storable(name))] = Field(
        default=None, description="As in the file, but `storable`; None if that has no name for it."
    )


class FilePlan(_Frozen):
    """What the plan of a file of any format says."""

    columns: list[Column]
    notes: list[dict[str, Any]] = Field(default_factory=list)

    @property
    def names_columns(self) -> bool:
        """Whether the file itself names its columns."""
        return True

    @property
    def is_sparse(self) -> bool:
        """Whether a column that was not seen may still come, and one that is missing is NULL."""
        return False


class CsvPlan(FilePlan):
    """Everything that cutting and COPY need to know about a CSV file.

    Positions are byte offsets in the uncompressed object, in the object's own encoding.
    """

    compression: Compression
    encoding: str
    data_start: int = Field(description="Position of the first byte after byte order mark and header.")
    header_lines: int = Field(description="Physical lines before `data_start`.")
    dialect: Dialect
    null: str
    record_bytes: float = Field(default=0, description="Average bytes of a sampled record; 0 if none was seen.")

    @property
    def names_columns(self) -> bool:
        return self.header_lines > 0

    @property
    def skips_blank_lines(self) -> bool:
        """Blank lines are no records, except in a one-column file, where COPY writes NULL as a blank line."""
        return len(self.columns) > 1

    @property
    def force_null(self) -> list[str]:
        """Columns for COPY's FORCE_NULL: a quoted empty field cannot be a number or a date, so it is NULL."""
        return [column.name for column in self.columns if column.type is not ColumnType.TEXT]


class JsonlPlan(FilePlan):
    """Positions are byte offsets in the uncompressed object. `source_name` is the key of each column."""

    compression: Compression
    data_start: int = Field(description="Position of the first byte after a byte order mark.")
    record_bytes: float = Field(description="Average bytes of a sampled line.")

    @property
    def is_sparse(self) -> bool:
        return True


class ParquetPlan(FilePlan):
    """Positions are row numbers, from 0. The columns are all of the file's, in its order."""

    rows: int
