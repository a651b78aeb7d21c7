"""The export worker: exports datasets into files."""

from export_worker.exporter import Export
from shared.domain.messages import EXPORT_QUEUE
from shared.domain.task import Kind
from shared.worker import run_worker


def main() -> None:
    run_worker("export-worker", EXPORT_QUEUE, lambda tools: {Kind.EXPORT: Export(tools)})


if __name__ == "__main__":
    main()
