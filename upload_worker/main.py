"""The upload worker: imports stored files into datasets."""

from shared.domain.messages import IMPORT_QUEUE
from shared.domain.task import Kind
from shared.worker import run_worker
from upload_worker.importer import FileImport


def main() -> None:
    run_worker("upload-worker", IMPORT_QUEUE, lambda tools: {Kind.IMPORT: FileImport(tools)})


if __name__ == "__main__":
    main()
