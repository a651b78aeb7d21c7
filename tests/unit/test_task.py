"""The state machine against the tables of the design, written out here a second time."""

import re
from importlib.resources import files

import pytest

from shared.domain.task import (
    CLAIMED,
    EDGES,
    ENDED,
    SETTLED,
    TRANSITIONS,
    Command,
    Event,
    TaskState,
    Trigger,
    allowed_commands,
    answer,
)

# from: to: triggers
DESIGN_EDGES = {
    "queued": {"running": "claim", "paused": "pause", "aborting": "abort"},
    "running": {
        "queued": "yield lose",
        "pausing": "pause",
        "succeeded": "succeed",
        "failed": "fail",
        "aborting": "abort",
    },
    "pausing": {
        "paused": "reach_pause lose",
        "running": "resume",
        "succeeded": "succeed",
        "failed": "fail",
        "aborting": "abort",
    },
    "paused": {"queued": "resume", "aborting": "abort expire"},
    "failed": {"queued": "resume", "aborting": "abort expire"},
    "aborting": {"aborted": "roll_back"},
    "succeeded": {},
    "aborted": {},
}

# (state, command): HTTP status and the state afterwards
DESIGN_ANSWERS = {
    ("queued", "pause"): (200, "paused"),
    ("queued", "resume"): (200, "queued"),
    ("queued", "abort"): (202, "aborting"),
    ("running", "pause"): (202, "pausing"),
    ("running", "resume"): (200, "running"),
    ("running", "abort"): (202, "aborting"),
    ("pausing", "pause"): (202, "pausing"),
    ("pausing", "resume"): (200, "running"),
    ("pausing", "abort"): (202, "aborting"),
    ("paused", "pause"): (200, "paused"),
    ("paused", "resume"): (202, "queued"),
    ("paused", "abort"): (202, "aborting"),
    ("aborting", "pause"): (409, "aborting"),
    ("aborting", "resume"): (409, "aborting"),
    ("aborting", "abort"): (202, "aborting"),
    ("failed", "pause"): (409, "failed"),
    ("failed", "resume"): (202, "queued"),
    ("failed", "abort"): (202, "aborting"),
    ("aborted", "pause"): (409, "aborted"),
    ("aborted", "resume"): (409, "aborted"),
    ("aborted", "abort"): (200, "aborted"),
    ("succeeded", "pause"): (409, "succeeded"),
    ("succeeded", "resume"): (409, "succeeded"),
    ("succeeded", "abort"): (409, "succeeded"),
}


def test_the_edges_are_those_of_the_design() -> None:
    expected = {
        (source, target, trigger)
        for source, targets in DESIGN_EDGES.items()
        for target, triggers in targets.items()
        for trigger in triggers.split()
    }
    assert {(edge.source, edge.target, edge.trigger) for edge in TRANSITIONS} == expected
    assert len(TRANSITIONS) == len(expected)


def test_a_trigger_leaves_a_state_on_one_edge_only() -> None:
    assert sum(len(edges) for edges in EDGES.values()) == len(TRANSITIONS)


def test_every_trigger_and_every_event_has_an_edge() -> None:
    assert {edge.trigger for edge in TRANSITIONS} == set(Trigger)
    # A task's creation is no edge: it comes from nowhere.
    assert {edge.event for edge in TRANSITIONS} == set(Event) - {Event.QUEUED}


@pytest.mark.parametrize("command", Command)
@pytest.mark.parametrize("state", TaskState)
def test_a_command_answers_what_the_design_says(state: TaskState, command: Command) -> None:
    given = answer(state, command)
    assert (given.status, given.state) == DESIGN_ANSWERS[state, command]
    assert given.accepted is (given.status != 409)
    assert (command in allowed_commands(state)) is given.accepted


def test_a_command_moves_along_an_edge_or_not_at_all() -> None:
    for state in TaskState:
        for command in Command:
            after = answer(state, command).state
            edge = EDGES[Trigger(command)].get(state)
            assert after is (edge.target if edge else state)


def test_nothing_leaves_success_or_an_abort_that_was_carried_out() -> None:
    final = {state for state in TaskState if not any(edge.source is state for edge in TRANSITIONS)}
    assert final == {TaskState.SUCCEEDED, TaskState.ABORTED}


def test_from_aborting_only_aborted_can_be_reached() -> None:
    assert {edge.target for edge in TRANSITIONS if edge.source is TaskState.ABORTING} == {TaskState.ABORTED}


def test_only_a_claimed_task_ends_by_itself() -> None:
    ends = {edge.source for edge in TRANSITIONS if edge.target in (TaskState.SUCCEEDED, TaskState.FAILED)}
    assert ends == CLAIMED
    assert ENDED < SETTLED


def test_routing_words_are_distinct_snake_case() -> None:
    words = [event.routing_word for event in Event]
    assert len(set(words)) == len(Event)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", word) for word in words)
    assert Event.PAUSE_REQUESTED.routing_word == "pause_requested"


def test_the_check_constraint_of_the_table_lists_exactly_the_states() -> None:
    sql = "".join(
        entry.read_text() for entry in sorted(files("shared").joinpath("sql").iterdir(), key=lambda e: e.name)
    )
    [states] = re.findall(r"CHECK \(state IN\s*\(([^)]*)\)", sql)
    assert sorted(re.findall(r"'(\w+)'", states)) == sorted(TaskState)
