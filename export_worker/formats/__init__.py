"""Which formats there are; a new one is a module here and a line in `make`."""

from collections.abc import Mapping, Sequence

from export_worker.formats.csv_rows import CsvRows
from export_worker.formats.format import Format
from export_worker.formats.gzip_members import Gzipped
from export_worker.formats.json_lines import JsonLines
from shared.adapters.catalog import Column
from shared.domain.export_params import CsvOutput, ExportFormat


def make(
    wanted: ExportFormat, columns: Sequence[Column], csv: CsvOutput, digits: Mapping[str, tuple[int, int]]
) -> Format:
    """The format for these columns; `digits` are precision and scale of numeric columns, as far as they are known.

    What only one format needs is imported with it: a worker that writes CSV never loads Arrow.
    """
    match wanted:
        case ExportFormat.CSV:
            return CsvRows(columns, csv)
        case ExportFormat.CSV_GZ:
            return Gzipped(CsvRows(columns, csv))
        case ExportFormat.JSONL:
            return JsonLines(columns)
        case ExportFormat.JSONL_GZ:
            return Gzipped(JsonLines(columns))
        case ExportFormat.PARQUET:
            from export_worker.formats.parquet import Parquet

            return Parquet(columns, digits)
        case ExportFormat.XLSX:
            from export_worker.formats.workbook import Workbook

            return Workbook(columns)
