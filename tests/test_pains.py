"""The table of users' pains (docs/pains.md) and that of licences cannot rot: what they name exists."""

from __future__ import annotations

import argparse
import ast
import re
import tomllib
from functools import cache
from pathlib import Path

from lipstream.checkpoints.artefacts import MODELS, NON_COMMERCIAL

ROOT = Path(__file__).parents[1]
TEST = re.compile(r"`(test_\w+)::(test_\w+)`")


def rows(name: str) -> list[list[str]]:
    """The cells of all tables of a page, headings and rules left out."""
    lines = [line for line in (ROOT / "docs" / name).read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if not set(row[0]) <= set("-#") and row[-1] != "for money?"]


@cache
def functions_of(stem: str) -> set[str]:
    path = ROOT / "tests" / f"{stem}.py"
    assert path.exists(), f"docs/pains.md names {path.name}, which does not exist"
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_forty_pains_in_order_and_every_named_test_exists() -> None:
    table = rows("pains.md")
    assert [row[0] for row in table] == [str(number) for number in range(1, 41)]
    for number, pain, verdict, said in table:
        assert pain and said and verdict in ("solved", "not ours", "later"), number
        named = TEST.findall(said)
        assert named or verdict != "solved", f"pain {number} is solved by no test"
        for stem, function in named:
            assert function in functions_of(stem), f"pain {number}: {stem}.py has no {function}"
        # Nothing that looks like the name of a test escapes the check.
        assert len(named) == said.count("::"), number


def test_commands_and_options_that_the_table_names_exist() -> None:
    from lipstream.cli.main import build_parser

    parser = build_parser()
    known = {option for command in _parsers(parser) for option in command._option_string_actions}
    text = (ROOT / "docs" / "pains.md").read_text()
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)):
        assert option in known or option == "--speech", option  # --speech: of training.export


def _parsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [inner for choice in action.choices.values() for inner in _parsers(choice)]
    return found


def test_every_part_has_a_licence() -> None:
    table = {name: row for row in rows("licences.md") for name in re.findall(r"`([^`]+)`", row[0])}
    for artefact in (artefact for files in MODELS.values() for artefact in files):
        row = table.get(artefact.name) or table["google/umt5-xxl/"]
        assert row[1] == artefact.licence, artefact.name
        assert row[2].startswith("no") is (artefact.licence == NON_COMMERCIAL)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for name, lines in extras.items() if name != "dev" for line in lines)]
    for requirement in wanted:
        name = re.match(r"[\w.-]+", requirement)
        assert name is not None and name.group() in table, f"docs/licences.md does not say {requirement}'s licence"
    assert all(row[1] for row in table.values())
