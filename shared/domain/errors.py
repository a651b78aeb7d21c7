"""Every error that Sluice raises on purpose: one root, a stable code, retryable or permanent, one HTTP status."""

from http import HTTPStatus
from typing import Any, ClassVar

# A driver's message may quote the whole field that it could not take; messages and rows shall stay small.
DETAIL_CHARACTERS = 2000


def storable(text: str, most_characters: int | None = None) -> str:
    """`text` as PostgreSQL and JSON can hold it: without NUL and lone surrogates, and not longer than allowed."""
    if most_characters is not None and len(text) > most_characters:
        text = text[: most_characters - 1] + "…"
    return text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()


class SluiceError(Exception):
    """Root of all errors.

    `detail` says in plain words what was wrong, where, and what to do. `extra` holds machine-readable
    members that are added to the problem document or to the task's error as they are.
    """

    code: ClassVar[str] = "internal"
    status: ClassVar[HTTPStatus] = HTTPStatus.INTERNAL_SERVER_ERROR
    retryable: ClassVar[bool] = False

    def __init__(self, detail: str, **extra: Any) -> None:
        detail = storable(detail, DETAIL_CHARACTERS)
        super().__init__(detail)
        self.detail = detail
        self.extra = extra

    def as_json(self) -> dict[str, Any]:
        """The form in which a failed task stores its error."""
        extra = {k: storable(v, DETAIL_CHARACTERS) if isinstance(v, str) else v for k, v in self.extra.items()}
        return {"code": self.code, "detail": self.detail, **extra}


# --- what a caller did wrong


class InvalidRequest(SluiceError):
    code = "invalid-request"
    status = HTTPStatus.UNPROCESSABLE_ENTITY


class Unauthenticated(SluiceError):
    code = "unauthenticated"
    status = HTTPStatus.UNAUTHORIZED


class Forbidden(SluiceError):
    code = "forbidden"
    status = HTTPStatus.FORBIDDEN


class NotFound(SluiceError):
    code = "not-found"
    status = HTTPStatus.NOT_FOUND


class Conflict(SluiceError):
    code = "conflict"
    status = HTTPStatus.CONFLICT


class CommandRefused(Conflict):
    """A command that the task's state does not allow; `extra` has `state` and `allowed`."""

    code = "command-refused"


class PreconditionFailed(SluiceError):
    code = "precondition-failed"
    status = HTTPStatus.PRECONDITION_FAILED


class LengthRequired(SluiceError):
    code = "length-required"
    status = HTTPStatus.LENGTH_REQUIRED


class TooLarge(SluiceError):
    code = "too-large"
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class TooSlow(SluiceError):
    code = "request-timeout"
    status = HTTPStatus.REQUEST_TIMEOUT


class TooManyRequests(SluiceError):
    code = "too-many-requests"
    status = HTTPStatus.TOO_MANY_REQUESTS


class RangeNotSatisfiable(SluiceError):
    code = "range-not-satisfiable"
    status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE


class InvalidMessage(SluiceError):
    """A message on the bus that no contract describes; it goes to the dead-letter queue with this reason."""

    code = "invalid-message"
    status = HTTPStatus.BAD_REQUEST


# --- what is wrong with the data: the task fails and keeps its checkpoint


class InvalidData(SluiceError):
    code = "invalid-data"
    status = HTTPStatus.UNPROCESSABLE_ENTITY


class BadRecord(InvalidData):
    """A record that cannot be loaded; `extra` has `line` and, where the server names it, `column`."""

    code = "bad-record"


class TooManyRejects(InvalidData):
    code = "too-many-rejects"


class CountMismatch(InvalidData):
    """What was loaded is not what was cut: rather fail than guess."""

    code = "count-mismatch"


class SourceChanged(InvalidData):
    """The object that a task reads was replaced or deleted after the task began."""

    code = "source-changed"


class SchemaMismatch(InvalidData):
    code = "schema-mismatch"


class ObjectMissing(SluiceError):
    code = "object-missing"
    status = HTTPStatus.NOT_FOUND


class UploadMissing(SluiceError):
    """The store knows no such multipart upload: completed, aborted, or swept by the store itself."""

    code = "upload-missing"


class StoreMisconfigured(SluiceError):
    """The object store refuses us: credentials, bucket, region or clock. An operator must act."""

    code = "store-misconfigured"


class StoreRefused(SluiceError):
    """The object store calls a request wrong that a repeat would not mend, such as parts that do not fit."""

    code = "store-refused"


class NoProgress(SluiceError):
    """A task used up its attempts without one committed batch."""

    code = "no-progress"


# --- what a later attempt may find mended


class Retryable(SluiceError):
    retryable = True
    status = HTTPStatus.SERVICE_UNAVAILABLE


class DatabaseUnavailable(Retryable):
    code = "database-unavailable"


class LockTimeout(Retryable):
    """Somebody else holds what a change needs: a long query on the dataset, say."""

    code = "lock-timeout"


class StatementTimeout(Retryable):
    code = "statement-timeout"


class SchemaChanged(Retryable):
    """A table or a column that was there a moment ago: its dataset was changed or dropped meanwhile."""

    code = "schema-changed"


class BusUnavailable(Retryable):
    code = "bus-unavailable"


class StoreUnavailable(Retryable):
    code = "store-unavailable"


class CheckpointLost(Retryable):
    """PostgreSQL crashed and forgot the last batches of a worker that lived on; they are done again."""

    code = "checkpoint-lost"


class UploadLost(Retryable):
    """The store has no longer what a task had sent of an object; that much is done again."""

    code = "upload-lost"


class InternalFault(Retryable):
    """An error that nobody foresaw; the task is tried again until its attempts are used up."""

    code = "internal"


class IntegrityMismatch(Retryable):
    """What the store says it holds is not what was sent."""

    code = "integrity-mismatch"


class Fenced(SluiceError):
    """Another claim has a newer epoch, or the task left the state: this worker must let go of it, silently."""

    code = "fenced"
    status = HTTPStatus.CONFLICT
