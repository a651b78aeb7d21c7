import contextlib
import encodings
from typing import Any

import pytest
from pydantic import ValidationError

from shared.domain.csv_options import CsvOptions


@pytest.mark.parametrize(
    "options",
    [
        {"delimiter": "||"},
        {"delimiter": "§"},
        {"delimiter": "\n"},
        {"delimiter": '"', "quote": '"'},
        {"delimiter": "\\", "escape": "\\"},
        {"null": "a,b", "delimiter": ","},
        {"null": "a\nb"},
        {"encoding": "nope"},
        {"encoding": "utf-7"},
        {"encoding": "cp037"},
        {"encoding": "iso2022_jp"},
        {"encoding": "rot13"},
        {"encoding": "utf-8" + "-" * 40},
        {"columns": {"a": "money"}},
        {"compression": "zip"},
        {"newline": "\n"},
    ],
)
def test_what_copy_cannot_do_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CsvOptions.model_validate(options)


@pytest.mark.parametrize(
    "encoding",
    [
        "utf-8",
        "UTF8",
        "utf-16",
        "latin-1",
        "cp1252",
        "gb18030",
        "shift_jis",
        "koi8-r",
        "utf-8-sig",
        "ISO8859-15",
        "ANSI_X3.4-1968",
    ],
)
def test_encodings_that_contain_ascii_are_taken(encoding: str) -> None:
    assert CsvOptions(encoding=encoding).encoding


def test_names_of_unknown_encodings_are_not_remembered() -> None:
    CsvOptions(encoding="utf-8")
    remembered = len(vars(encodings)["_cache"])
    for number in range(10):
        for name in (f"klingon-{number}", "utf" + "-" * number + "8"):
            with contextlib.suppress(ValidationError):
                CsvOptions(encoding=name)
    assert len(vars(encodings)["_cache"]) <= remembered + 1


def test_nothing_quoted_is_an_empty_quote() -> None:
    assert CsvOptions(quote="").quote == ""
