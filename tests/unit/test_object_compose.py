"""The plan by which objects are joined inside the store."""

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.adapters.object_compose import COPY_BYTES, MOST_COPIES, plan_parts
from shared.multipart import part_size
from shared.ports.objects import MAX_PARTS, MIB, MIN_PART_BYTES

GIB = 1024 * MIB

sizes = st.lists(
    st.one_of(
        st.integers(0, 20),
        st.integers(0, 3 * MIN_PART_BYTES),
        st.integers(COPY_BYTES - 5, COPY_BYTES + MIN_PART_BYTES + 5),
        st.integers(0, 10 * GIB),
    ),
    max_size=12,
)


@settings(deadline=None)
@given(sizes)
def test_a_plan_has_every_byte_once_and_in_order(sizes: list[int]) -> None:
    at = [(source, offset) for source, size in enumerate(sizes) for offset in (0, size)]
    pieces = [piece for part in plan_parts(sizes) for piece in part]
    joined: list[tuple[int, int]] = []
    for piece in pieces:
        if joined and joined[-1] == (piece.source, piece.start):
            joined[-1] = (piece.source, piece.end)
        else:
            joined += [(piece.source, piece.start), (piece.source, piece.end)]
    assert joined == [edge for edge in at if sizes[edge[0]]]


@settings(deadline=None)
@given(sizes)
def test_only_the_last_part_of_a_plan_is_small(sizes: list[int]) -> None:
    totals = [sum(piece.end - piece.start for piece in part) for part in plan_parts(sizes)]
    assert all(total >= MIN_PART_BYTES for total in totals[:-1])
    assert all(total < max(COPY_BYTES, sum(sizes) // MOST_COPIES + 1) + MIN_PART_BYTES for total in totals)


def test_the_largest_object_is_joined_of_no_more_parts_than_there_may_be() -> None:
    for sizes in ([5120 * GIB], [GIB + 1] * 5000, [MIN_PART_BYTES] * 900 + [5000 * GIB]):
        assert len(plan_parts(sizes)) <= MAX_PARTS


@settings(deadline=None)
@given(sizes)
def test_a_part_that_is_carried_by_hand_is_small(sizes: list[int]) -> None:
    for part in plan_parts(sizes):
        if len(part) > 1 or not part[0].copyable:
            assert sum(piece.end - piece.start for piece in part) <= MIN_PART_BYTES


def test_large_sources_are_copied_and_never_carried() -> None:
    plan = plan_parts([MIN_PART_BYTES, 6 * MIB, 3])
    assert [[(piece.start, piece.end) for piece in part] for part in plan] == [
        [(0, MIN_PART_BYTES)],
        [(0, 6 * MIB)],
        [(0, 3)],
    ]
    assert all(part[0].copyable for part in plan)


def test_ten_thousand_growing_parts_hold_the_largest_file() -> None:
    assert sum(part_size(number, 8 * MIB) for number in range(1, MAX_PARTS + 1)) > 1024 * GIB
    assert [part_size(number, MIB) for number in (1, 1000, 1001, 9999)] == [MIB, MIB, 2 * MIB, 32 * MIB]
