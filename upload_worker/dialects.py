"""Guesses delimiter, quote and escape: by which of them a sample falls into records of one width."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import clevercsv

from shared.domain.csv_options import CsvOptions
from upload_worker.plan import NO_QUOTE, Dialect
from upload_worker.records import fragments, parse_fields, split_records

DELIMITERS = (",", "\t", ";", "|")
_SURE = 0.95
_MAX_RECORDS = 1000
# clevercsv takes seconds for what is instant here, so it sees little and only what is unclear.
_CLEVERCSV_CHARACTERS = 8192


@dataclass(frozen=True)
class _Fit:
    """How well a dialect explains the sample."""

    consistency: float
    width: int
    closed: bool
    """Whether no quote is left open at the end: between two that fit alike, an escape that was not seen gives itself
    away by that."""
    dialect: Dialect


def guess_dialect(sample: bytes, options: CsvOptions) -> Dialect:
    """The dialect of a UTF-8 sample that ends at a record's end or at the end of the file."""
    fits = [_fit(sample, dialect) for dialect in _candidates(sample, options)]
    best = max(fits, key=lambda fit: (fit.width > 1, fit.consistency, fit.width, fit.closed))
    if len(fits) == 1 or (best.width > 1 and best.consistency >= _SURE) or options.delimiter is not None:
        return best.dialect
    asked = _ask_clevercsv(sample, options)
    if asked is not None:
        fit = _fit(sample, asked)
        if fit.width > 1 and (best.width == 1 or fit.consistency >= best.consistency):
            return asked
    if best.width > 1 and best.consistency >= 0.5:
        return best.dialect
    return Dialect(delimiter=options.delimiter or ",", quote=best.dialect.quote, escape=best.dialect.escape)


def _candidates(sample: bytes, options: CsvOptions) -> list[Dialect]:
    if options.quote is not None:
        quotes = [options.quote or NO_QUOTE]
    else:
        quotes = ['"'] if b'"' in sample or not _single_quotes_enclose(sample) else ["'", '"']
    dialects = []
    for delimiter in [options.delimiter] if options.delimiter else DELIMITERS:
        for quote in quotes:
            escapes = [options.escape or quote]
            if options.escape is None and b"\\" + quote.encode() in sample:
                escapes.append("\\")
            dialects += [
                Dialect(delimiter=delimiter, quote=quote, escape=escape)
                for escape in escapes
                if delimiter not in (quote, escape)
            ]
    return dialects


def _single_quotes_enclose(sample: bytes) -> bool:
    enclosed = re.findall(rb"(?:^|[,\t;|])'[^'\r\n]*'(?=[,\t;|\r\n]|\Z)", sample, re.MULTILINE)
    return 2 * len(enclosed) > 0.9 * sample.count(b"'") > 0


def _fit(sample: bytes, dialect: Dialect) -> _Fit:
    widths: list[int] = []
    for start, end in split_records(sample, dialect):
        record = sample[start:end]
        if record.strip(b"\r\n"):
            widths.append(len(parse_fields(record, dialect)))
        if len(widths) == _MAX_RECORDS:
            break
    if not widths:
        return _Fit(0, 1, True, dialect)
    width, count = max(Counter(widths).items(), key=lambda item: (item[1], item[0]))
    return _Fit(count / len(widths), width, len(fragments(sample, dialect)) % 2 == 1, dialect)


def _ask_clevercsv(sample: bytes, options: CsvOptions) -> Dialect | None:
    text = sample[:_CLEVERCSV_CHARACTERS].decode("utf-8", "ignore")
    try:
        found = clevercsv.Sniffer().sniff(text)
    except clevercsv.Error:
        return None
    if found is None:
        return None
    delimiter = options.delimiter or found.delimiter
    quote = found.quotechar or '"' if options.quote is None else options.quote
    escape = options.escape or found.escapechar
    marks: Sequence[str] = (delimiter or "", quote or NO_QUOTE, escape or quote or NO_QUOTE)
    if any(len(mark) != 1 or not mark.isascii() or mark in "\r\n" for mark in marks) or marks[0] in marks[1:]:
        return None
    if marks[0].isalnum():
        return None
    return Dialect(delimiter=marks[0], quote=marks[1], escape=marks[2])
