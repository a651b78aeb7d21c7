"""The settings of every transaction in which an export looks at rows."""

from export_worker.selection import VALUES_SETTING
from shared.adapters.value_settings import VALUE_SETTINGS
from shared.ports.database import Connection

# Only a scan of a range's own blocks, in their order, is wanted; a table's first range after its last change may look
# to the planner like all of it.
_SESSION = f"""
SELECT {VALUE_SETTINGS}, set_config('enable_seqscan', 'off', true),
    set_config('max_parallel_workers_per_gather', '0', true), set_config('statement_timeout', '0', true),
    set_config($1, $2, true)
"""


async def prepare(connection: Connection, values: str) -> None:
    """Until the transaction ends; `values` are those of a `Selection`."""
    await connection.execute(_SESSION, VALUES_SETTING, values)
