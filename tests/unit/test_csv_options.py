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
        {"columns": {"a": "money"}},
        {"compression": "zip"},
        {"newline": "\n"},
    ],
)
def test_what_copy_cannot_do_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CsvOptions.model_validate(options)


@pytest.mark.parametrize("encoding", ["utf-8", "UTF8", "utf-16", "latin-1", "cp1252", "gb18030", "shift_jis", "koi8-r"])
def test_encodings_that_contain_ascii_are_taken(encoding: str) -> None:
    assert CsvOptions(encoding=encoding).encoding


def test_nothing_quoted_is_an_empty_quote() -> None:
    assert CsvOptions(quote="").quote == ""
