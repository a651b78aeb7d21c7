"""Which formats there are; a new one is a module here and a line in `make`."""

from collections.abc import Sequence

from export_worker.formats.csv_rows import CsvRows
from export_worker.formats.format import Format
from export_worker.formats.gzip_members import Gzipped
from export_worker.formats.json_lines import JsonLines
from shared.adapters.catalog import Column
from shared.domain.export_params import CsvOutput, ExportFormat


def make(wanted: ExportFormat, columns: Sequence[Column], csv: CsvOutput) -> Format:
    """The format for these columns."""
    match wanted:
        case ExportFormat.CSV:
            return CsvRows(columns, csv)
        case ExportFormat.CSV_GZ:
            return Gzipped(CsvRows(columns, csv))
        case ExportFormat.JSONL:
            return JsonLines(columns)
        case ExportFormat.JSONL_GZ:
            return Gzipped(JsonLines(columns))
