"""What a user may say about a CSV file instead of letting it be guessed; every field left out is guessed."""

import codecs
import encodings
import encodings.aliases
import pkgutil
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MOST_COLUMNS = 1600  # PostgreSQL's own limit of a table

# Encodings that leave this alone contain ASCII and keep no state between characters.
_PROBE = bytes(range(128)) + b"\\u0041 ~{ .xn--a-ecp.ru \x1b$B!!"

# Python keeps every name that it was ever asked for; so it is asked only for its own.
_CODECS = {module.name for module in pkgutil.iter_modules(encodings.__path__)} | set(encodings.aliases.aliases)


class ColumnType(StrEnum):
    """Column types that an import can create; CSV has `uuid`, `jsonb` and `bytea` only when the user asks for them."""

    BIGINT = "bigint"
    NUMERIC = "numeric"
    DOUBLE = "double precision"
    BOOLEAN = "boolean"
    DATE = "date"
    TIMESTAMP = "timestamp"
    TIMESTAMPTZ = "timestamptz"
    TEXT = "text"
    UUID = "uuid"
    JSONB = "jsonb"
    BYTEA = "bytea"


class Compression(StrEnum):
    NONE = "none"
    GZIP = "gzip"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ColumnOption(_Strict):
    """One column of the file; what is left out comes from the header or is guessed."""

    name: Annotated[str, Field(min_length=1)] | None = None
    type: ColumnType | None = None


_OneByte = Annotated[str, Field(min_length=1, max_length=1, pattern=r"^[\x01-\x09\x0b\x0c\x0e-\x7f]$")]

# fail_fast: a fault for each of a million items would take gigabytes to write down.
_ColumnList = Annotated[list[ColumnOption], Field(max_length=MOST_COLUMNS, fail_fast=True)]


class CsvOptions(_Strict):
    """Overrides for reading a CSV file. PostgreSQL's COPY allows one ASCII character per separator."""

    compression: Compression | None = None
    encoding: str | None = Field(
        default=None, max_length=40, description="A Python codec name, such as utf-8 or cp1252."
    )
    delimiter: _OneByte | None = None
    quote: _OneByte | Literal[""] | None = Field(default=None, description="Empty: nothing is quoted.")
    escape: _OneByte | None = Field(default=None, description="Escapes a quote; the quote itself by default.")
    header: bool | None = Field(default=None, description="Whether the first record holds column names.")
    null: str | None = Field(default=None, description="The unquoted text that means NULL; empty text by default.")
    columns: _ColumnList | dict[str, ColumnType] | None = Field(
        default=None,
        description="Either every column in file order, or types for some columns by name.",
    )

    @field_validator("encoding")
    @classmethod
    def _known_text_encoding(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            normal = encodings.normalize_encoding(value.lower()).replace(".", "_")
            if normal not in _CODECS:
                raise LookupError(value)
            name = codecs.lookup(normal).name
            readable = name.startswith(("utf-16", "utf-32")) or _PROBE.decode(name) == _PROBE.decode("ascii")
        except (LookupError, UnicodeError) as error:
            raise ValueError(f"{value!r} is no encoding that CSV can be read in; try utf-8 or cp1252") from error
        if not readable:
            raise ValueError(f"{value!r} does not contain ASCII; convert the file to UTF-8")
        return name

    @model_validator(mode="after")
    def _separators_do_not_clash(self) -> Self:
        if self.delimiter is not None and self.delimiter in (self.quote, self.escape):
            raise ValueError("delimiter must differ from quote and escape")
        if self.null is not None:
            clashing = [mark for mark in (self.delimiter, self.quote, "\r", "\n") if mark and mark in self.null]
            if clashing:
                raise ValueError(f"null must not contain the delimiter, the quote or a newline: {clashing[0]!r}")
        return self
