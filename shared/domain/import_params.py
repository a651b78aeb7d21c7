"""What an import is asked to do, and what its task stores: the request with its source pinned. Pure."""

from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shared.domain.csv_options import ColumnType, CsvOptions
from shared.domain.task import BIGINT_MAX, FileId
from shared.domain.task_options import TaskOptions

DATASET_PATTERN = r"^[a-z][a-z0-9_]{0,62}$"
DatasetName = Annotated[str, Field(pattern=DATASET_PATTERN, description="The name of the table that users query.")]


class Mode(StrEnum):
    CREATE = "create"
    APPEND = "append"
    REPLACE = "replace"


class SchemaMode(StrEnum):
    STRICT = "strict"
    EVOLVE = "evolve"


class OnError(StrEnum):
    ABORT = "abort"
    SKIP = "skip"


class FileFormat(StrEnum):
    CSV = "csv"
    JSONL = "jsonl"
    PARQUET = "parquet"


class _Import(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["import"] = "import"
    dataset: DatasetName
    mode: Mode = Field(
        default=Mode.CREATE,
        description="create: the dataset must be new; append: it must exist; replace: its old loads are swapped out.",
    )
    schema_mode: SchemaMode = Field(
        default=SchemaMode.STRICT,
        description="strict: the columns must be the dataset's; evolve: new columns are added. Append only.",
    )
    on_error: OnError = Field(
        default=OnError.ABORT,
        description="What a bad record does: fail the task, or be skipped and kept as a reject.",
    )
    max_rejects: int = Field(default=1000, ge=0, le=1_000_000, description="With skip: the task fails beyond it.")
    format: FileFormat | None = Field(
        default=None, description="What the file is; by default its first bytes tell. CSV and JSONL may be gzipped."
    )
    columns: dict[str, ColumnType] = Field(
        default_factory=dict, description="Types for some columns by name; those of the others are found out."
    )
    csv: CsvOptions = Field(default_factory=CsvOptions)

    @model_validator(mode="after")
    def _only_an_append_evolves(self) -> Self:
        if self.schema_mode is SchemaMode.EVOLVE and self.mode is not Mode.APPEND:
            raise ValueError("schema_mode evolve goes with mode append only")
        return self

    @model_validator(mode="after")
    def _columns_are_given_once(self) -> Self:
        if self.columns and self.csv.columns:
            raise ValueError("give column types either in columns or in csv.columns")
        return self


class ImportRequest(_Import, TaskOptions):
    """What a user posts. The file is named by its number or by its name, as it is at that moment."""

    kind: Literal["import"]
    file_id: int | None = Field(default=None, ge=1, le=BIGINT_MAX)
    file_name: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _exactly_one_file(self) -> Self:
        if (self.file_id is None) == (self.file_name is None):
            raise ValueError("give either file_id or file_name")
        return self


class SourceFile(BaseModel):
    """The stored object that the import reads: replacing the file afterwards does not change it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file_id: FileId
    name: str
    object_key: str
    etag: str
    bytes: int = Field(ge=0)


class ImportParams(_Import):
    """What the task stores in `params`."""

    source: SourceFile

    @classmethod
    def of(cls, request: ImportRequest, source: SourceFile) -> Self:
        asked = {name: getattr(request, name) for name in _Import.model_fields}
        return cls(**asked, source=source)
