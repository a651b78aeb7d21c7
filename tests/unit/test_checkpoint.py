"""Checkpoints against a plain model: the set of positions that are done."""

import json
import random as rnd
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.domain.checkpoint import Checkpoint, Range

END = 60


@st.composite
def batches(draw: st.DrawFn) -> list[Range]:
    """Adjoining ranges from 0 to some end, each with its lines, as a cutter would give them."""
    cuts = sorted(draw(st.sets(st.integers(1, END), min_size=1)))
    lines = draw(st.lists(st.integers(0, 9), min_size=len(cuts), max_size=len(cuts)))
    return [Range(start, end, n) for start, end, n in zip([0, *cuts], cuts, lines, strict=False)]


def after(done: Sequence[Range]) -> Checkpoint:
    checkpoint = Checkpoint()
    for r in done:
        checkpoint = checkpoint.add(r)
    return checkpoint


@given(st.data())
def test_a_checkpoint_knows_exactly_the_positions_that_are_done(data: st.DataObject) -> None:
    every = data.draw(batches())
    done = data.draw(st.permutations(every).flatmap(lambda order: st.integers(0, len(order)).map(lambda n: order[:n])))
    checkpoint = after(done)
    positions = {p for r in done for p in range(r.start, r.end)}
    start, end = sorted(data.draw(st.tuples(st.integers(0, END + 5), st.integers(0, END + 5))))

    missing = list(checkpoint.missing(0, every[-1].end))
    assert {p for a, b in missing for p in range(a, b or 0)} == set(range(every[-1].end)) - positions
    assert all(a < (b or 0) for a, b in missing)
    assert missing == sorted(missing)
    assert checkpoint.covers(start, end) is (set(range(start, end)) <= positions)
    assert checkpoint.prefix(start) == next(p for p in range(start, END + 10) if p not in positions)
    assert checkpoint.positions == len(positions)
    # Disjoint, sorted and joined: no two neighbours touch.
    assert all(a.end < b.start for a, b in zip(checkpoint.done, checkpoint.done[1:], strict=False))


@given(batches().flatmap(st.permutations))
def test_the_order_in_which_batches_commit_does_not_matter(order: list[Range]) -> None:
    whole = after(order)
    assert whole == after(sorted(order))
    assert whole.done == (Range(0, max(r.end for r in order), sum(r.lines for r in order)),)


@given(batches(), st.data())
def test_lines_are_counted_up_to_where_a_missing_range_begins(every: list[Range], data: st.DataObject) -> None:
    done = data.draw(st.lists(st.sampled_from(every), unique=True))
    checkpoint = after(done)
    for start, _ in checkpoint.missing(0, END):
        assert checkpoint.lines_before(start) == sum(r.lines for r in done if r.end <= start)


@given(batches(), st.data())
def test_what_is_done_cannot_be_done_again(every: list[Range], data: st.DataObject) -> None:
    checkpoint = after(every)
    start = data.draw(st.integers(0, every[-1].end - 1))
    end = data.draw(st.integers(start + 1, END + 5))
    with pytest.raises(ValueError, match="overlaps"):
        checkpoint.add(Range(start, end))


@given(batches(), st.integers(1, 8), st.randoms(use_true_random=False))
def test_with_n_lanes_it_has_at_most_n_plus_1_ranges(every: list[Range], lanes: int, random: rnd.Random) -> None:
    """Lanes take batches in order and finish them in any order."""
    checkpoint, waiting, busy = Checkpoint(), list(every), list[Range]()
    while waiting or busy:
        while waiting and len(busy) < lanes:
            busy.append(waiting.pop(0))
        checkpoint = checkpoint.add(busy.pop(random.randrange(len(busy))))
        assert len(checkpoint.done) <= lanes + 1


@given(batches(), st.dictionaries(st.text(max_size=5), st.integers()))
def test_a_checkpoint_survives_being_stored(every: list[Range], cursor: dict[str, int]) -> None:
    checkpoint = Checkpoint(after(every[::2]).done, cursor)
    assert Checkpoint.from_json(json.loads(json.dumps(checkpoint.as_json()))) == checkpoint


def test_a_new_task_has_done_nothing() -> None:
    checkpoint = Checkpoint.from_json({})
    assert checkpoint == Checkpoint()
    assert list(checkpoint.missing(7, 9)) == [(7, 9)]
    assert list(checkpoint.missing(7, None)) == [(7, None)]
    assert list(checkpoint.missing(7, 7)) == []


def test_adding_gives_a_new_value_and_keeps_the_cursor() -> None:
    before = Checkpoint(cursor={"seek_point": "x"})
    after = before.add(Range(0, 5, 1))
    assert before.done == ()
    assert after.cursor == {"seek_point": "x"}


def test_an_empty_range_adds_nothing() -> None:
    checkpoint = Checkpoint().add(Range(0, 5, 2))
    assert checkpoint.add(Range(3, 3)) == checkpoint


def test_a_range_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(ValueError, match="ends before it starts"):
        Checkpoint().add(Range(5, 3))


def test_a_range_that_lies_inside_what_is_missing_of_a_range_is_refused() -> None:
    done = Checkpoint().add(Range(0, 5)).add(Range(8, 9))
    for overlapping in (Range(4, 6), Range(7, 9), Range(0, 9), Range(8, 9)):
        with pytest.raises(ValueError, match="overlaps"):
            done.add(overlapping)
    assert done.add(Range(5, 8)).done == (Range(0, 9),)
