"""The README says what the code does."""

import re
from pathlib import Path

from shared.domain.task import TRANSITIONS

README = Path(__file__).parents[2] / "README.md"


def test_the_diagram_of_states_is_the_table_of_transitions() -> None:
    drawn = re.findall(r"^    (\w+) --> (\w+): (\w+)$", README.read_text(), re.MULTILINE)
    assert sorted(drawn) == sorted((edge.source, edge.target, edge.trigger) for edge in TRANSITIONS)


def test_every_link_into_the_repository_leads_somewhere() -> None:
    links = re.findall(r"\]\(((?!http)[^)#]+)", README.read_text())
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []
