"""The page on the command line names every command and option."""

import argparse
from pathlib import Path

import pytest

from sklora.cli._parser import build_parser

PAGE = Path(__file__).parents[2] / "docs" / "command_line.md"


def commands():
    [action] = [
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    return action.choices


def test_commands():
    assert list(commands()) == ["inspect", "fit", "predict", "compare"]


@pytest.mark.parametrize("command", ["inspect", "fit", "predict", "compare"])
def test_options_are_documented(command):
    page = PAGE.read_text(encoding="utf-8")
    assert f"\n## {command}\n" in page
    for action in commands()[command]._actions:
        for option in action.option_strings:
            assert option in page or option == "-h", option
