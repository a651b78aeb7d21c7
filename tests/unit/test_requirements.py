"""The pinned requirements belong to pyproject.toml and name packages, not places."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
RUN = PROJECT["project"]["dependencies"]
ALL = [*RUN, *PROJECT["project"]["optional-dependencies"]["stack"], *PROJECT["dependency-groups"]["dev"]]


def name_of(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()


@pytest.mark.parametrize(("file", "wanted"), [("run.txt", RUN), ("dev.txt", ALL)])
def test_each_dependency_is_pinned(file: str, wanted: list[str]) -> None:
    pinned = {name_of(line) for line in (ROOT / "requirements" / file).read_text().splitlines() if "==" in line}
    missing = {name_of(requirement) for requirement in wanted} - pinned
    assert not missing, "run `./dev lock`"


@pytest.mark.parametrize("file", sorted((ROOT / "requirements").iterdir()), ids=lambda path: path.name)
def test_no_address_of_a_registry_is_named(file: Path) -> None:
    assert "://" not in file.read_text()


def test_every_pin_has_a_hash() -> None:
    for name in ("run.txt", "dev.txt", "tools.txt"):
        text = (ROOT / "requirements" / name).read_text()
        pins = re.findall(r"^\S+==.*(?:\\\n(?:    .*))+", text, re.MULTILINE)
        assert len(pins) == len(re.findall(r"^\S+==", text, re.MULTILINE))
        assert all("--hash=sha256:" in pin for pin in pins)
