import gzip
import random
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.domain.csv_options import Compression
from shared.domain.errors import InvalidData
from tests.unit.csv_objects import reader, sales
from upload_worker import inflate
from upload_worker.sources import GzipSource, PlainSource, open_source

CONTENT = sales(20_000)
ONE_MEMBER = gzip.compress(CONTENT)
MEMBERS = b"".join(gzip.compress(CONTENT[at : at + 300_000]) for at in range(0, len(CONTENT), 300_000))


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflate, "SPACING_BYTES", 64 << 10)
    monkeypatch.setattr(inflate, "OUTPUT_BYTES", 16 << 10)


async def read(source: GzipSource, start: int = 0, end: int | None = None) -> bytes:
    return b"".join([chunk async for chunk in source.read(start, end)])


@pytest.mark.parametrize("stored", [ONE_MEMBER, MEMBERS], ids=["one member", "many members"])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers())
async def test_a_later_source_reads_on_from_the_stored_seek_point(stored: bytes, seed: int) -> None:
    chosen = random.Random(seed)
    stop = chosen.randrange(len(CONTENT))
    resume = chosen.randrange(stop + 1)
    first = GzipSource(reader(stored, chosen.choice([500, 5000, 1 << 20])))
    assert await read(first, 0, stop) == CONTENT[:stop]
    second = GzipSource(reader(stored, chosen.choice([500, 5000, 1 << 20])), first.resume_state(resume))
    assert await read(second, resume) == CONTENT[resume:]
    assert await read(second, resume, stop) == CONTENT[resume:stop]


async def test_a_resume_reads_only_what_lies_behind_the_seek_point() -> None:
    first = GzipSource(reader(ONE_MEMBER))
    await read(first)
    position = len(CONTENT) - 1000
    state = first.resume_state(position)
    assert state is not None
    assert len(state) < 34 << 10
    begun = []

    def watched(start, end):  # type: ignore[no-untyped-def]
        begun.append(start)
        return reader(ONE_MEMBER)(start, end)

    assert await read(GzipSource(watched, state), position) == CONTENT[-1000:]
    assert begun[0] > 0.8 * len(ONE_MEMBER)


async def test_before_the_first_seek_point_there_is_no_state() -> None:
    source = GzipSource(reader(ONE_MEMBER))
    await read(source, 0, 1000)
    assert source.resume_state(1000) is None


async def test_zeros_after_the_last_member_are_padding() -> None:
    assert await read(GzipSource(reader(MEMBERS + bytes(600), 512))) == CONTENT


async def test_the_compressed_position_shows_progress() -> None:
    source = GzipSource(reader(ONE_MEMBER))
    await read(source)
    assert source.compressed_position == len(ONE_MEMBER)


@pytest.mark.parametrize("missing", [1, 8, 9, 1000, len(ONE_MEMBER) - 5])
async def test_truncated_gzip_is_refused(missing: int) -> None:
    kept = len(ONE_MEMBER) - missing
    with pytest.raises(InvalidData, match=f"ends too early, after {kept} compressed bytes.*upload it again"):
        await read(GzipSource(reader(ONE_MEMBER[:-missing])))


def _broken(stored: bytes, at: int) -> bytes:
    return stored[:at] + bytes([stored[at] ^ 0xFF]) + stored[at + 1 :]


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        (_broken(ONE_MEMBER, -8 + len(ONE_MEMBER)), "incorrect data check"),
        (_broken(ONE_MEMBER, -1 + len(ONE_MEMBER)), "incorrect length check"),
        (_broken(ONE_MEMBER, len(ONE_MEMBER) // 2), "corrupt near compressed byte"),
        (ONE_MEMBER + b"garbage", "incorrect header check"),
        (b"\x1f\x8b\x08" + b"\xff" * 100, "corrupt near compressed byte"),
    ],
)
async def test_corrupt_gzip_is_refused(stored: bytes, reason: str) -> None:
    with pytest.raises(InvalidData, match=reason):
        await read(GzipSource(reader(stored)))


@pytest.mark.parametrize(("at", "reason"), [(8, "incorrect data check"), (1, "incorrect length check")])
async def test_sums_are_checked_across_a_resume(at: int, reason: str) -> None:
    stored = _broken(ONE_MEMBER, len(ONE_MEMBER) - at)
    first = GzipSource(reader(stored))
    near_the_end = len(CONTENT) - 40_000
    await read(first, 0, near_the_end)
    state = first.resume_state(near_the_end)
    assert state is not None
    with pytest.raises(InvalidData, match=reason):
        await read(GzipSource(reader(stored), state), near_the_end)


async def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inflate, "RATIO_FREE_BYTES", 8 << 20)
    packer = zlib.compressobj(9, wbits=31)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(32)) + packer.flush()
    with pytest.raises(InvalidData, match="bomb"):
        await read(GzipSource(reader(bomb)))


async def test_more_than_the_allowed_uncompressed_bytes_are_refused() -> None:
    with pytest.raises(InvalidData, match="more than 100000 bytes"):
        await read(GzipSource(reader(ONE_MEMBER), max_uncompressed_bytes=100_000))


def test_a_seek_point_of_an_unknown_version_is_not_guessed_at() -> None:
    with pytest.raises(ValueError, match="version"):
        inflate.SeekPoint.from_bytes(b"\x63" + inflate.SeekPoint(1, 2).to_bytes()[1:])


async def test_a_plain_object_is_read_as_it_is() -> None:
    source = open_source(reader(CONTENT), len(CONTENT), Compression.NONE)
    assert isinstance(source, PlainSource)
    assert [chunk async for chunk in source.read(5, 9)] == [CONTENT[5:9]]
