"""Rejected records as a CSV file, streamed page by page."""

import csv
import io
from collections.abc import AsyncGenerator, Sequence

from gateway.task_queries import Reject, TaskQueries
from shared.domain.task import TaskId

ROWS_PER_PAGE = 1000


async def reject_csv(queries: TaskQueries, task_id: TaskId) -> AsyncGenerator[bytes, None]:
    """RFC 4180 lines with a header; one page is in memory at a time."""
    yield _lines([("line", "column", "reason", "raw")])
    after: int | None = None
    more = True
    while more:
        page, more = await queries.rejects(task_id, after=after, limit=ROWS_PER_PAGE)
        yield _lines([_fields(reject) for reject in page])
        after = page[-1].line if page else None


def _fields(reject: Reject) -> Sequence[object]:
    return reject.line, reject.column_name, reject.reason, reject.raw


def _lines(rows: Sequence[Sequence[object]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()
