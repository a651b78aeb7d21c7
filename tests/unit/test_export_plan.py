"""How an export cuts its loads into ranges: gapless, and the same wherever a worker takes up."""

from hypothesis import given
from hypothesis import strategies as st

from export_worker.snapshot import HEAD, PLACES_PER_BLOCK, Plan, ReadRange, SnapshotLoad
from shared.domain.task import LoadId

loads = st.lists(
    st.builds(
        SnapshotLoad,
        load_id=st.integers(1, 9).map(LoadId),
        blocks=st.integers(0, 40),
        blocks_per_read=st.integers(1, 12),
    ),
    max_size=4,
)


def plan_of(snapshot: list[SnapshotLoad]) -> Plan:
    return Plan(dataset="d", columns=(), types={}, loads=tuple(snapshot), part_bytes=1, file_name="f", rows_known=None)


def cut(plan: Plan, position: int, places: int) -> list[ReadRange]:
    """What is read from `position` on if an answer of more than `places` positions is too much."""
    done = []
    for what in plan.ranges(position):
        at = what.start
        while at < what.end:
            piece = what if at == what.start else what.after(at)
            while piece.end - piece.start > places:
                piece = piece.half()
            done.append(piece)
            at = piece.end
    return done


@given(loads)
def test_ranges_follow_each_other_without_a_gap_within_one_load(snapshot: list[SnapshotLoad]) -> None:
    plan = plan_of(snapshot)
    position = HEAD
    for what in plan.ranges(HEAD):
        assert what.start == position
        assert what.start < what.end
        position = what.end
    assert position == plan.data_end


@given(loads, st.integers(1, 3 * PLACES_PER_BLOCK), st.data())
def test_a_worker_that_takes_up_anywhere_cuts_where_the_first_one_would_have(
    snapshot: list[SnapshotLoad], places: int, data: st.DataObject
) -> None:
    places = max(places, 64)
    plan = plan_of([load.model_copy(update={"blocks": load.blocks % 4}) for load in snapshot])
    whole = cut(plan, HEAD, places)
    start = data.draw(st.integers(0, len(whole)))
    position = whole[start].start if start < len(whole) else plan.data_end
    assert [piece[1:] for piece in cut(plan, position, places)] == [piece[1:] for piece in whole[start:]]


@given(st.integers(0, 10**7), st.integers(2, 10**6))
def test_half_a_range_is_smaller_and_not_empty(start: int, length: int) -> None:
    what = ReadRange(LoadId(1), 1, 1 + start, 1 + start + length)
    assert what.start < what.half().end < what.end


def test_positions_are_blocks_and_item_pointers() -> None:
    what = ReadRange(LoadId(7), 1, 1 + PLACES_PER_BLOCK * 3 + 5, 1 + PLACES_PER_BLOCK * 4)
    assert (what.tid(what.start), what.tid(what.end)) == ("(3,5)", "(4,0)")
