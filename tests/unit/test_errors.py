"""What an error says can be stored and sent, whatever it quotes."""

import orjson

from shared.domain.errors import DETAIL_CHARACTERS, BadRecord, storable


def test_what_postgresql_and_json_cannot_hold_is_escaped() -> None:
    error = BadRecord("a \x00 and a \ud800", line=3, column="k\x00")
    stored = orjson.loads(orjson.dumps(error.as_json()))
    assert stored == {"code": "bad-record", "detail": "a \\x00 and a \\ud800", "line": 3, "column": "k\\x00"}


def test_a_message_that_quotes_a_whole_field_is_cut() -> None:
    assert len(BadRecord("x" * 5_000_000, line=1, column=None).detail) == DETAIL_CHARACTERS
    assert storable("ä" * 10, 10) == "ä" * 10
