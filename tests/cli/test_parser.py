"""The page on the command line names every command and option."""

import argparse
from dataclasses import asdict
from pathlib import Path

import pytest

from sklora.cli._parser import build_parser
from sklora.io._plan import ReadOptions

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
def test_defaults_are_those_that_the_help_says(command):
    for action in commands()[command]._actions:
        _, found, default = (action.help or "").partition("(default: ")
        if found and action.default is not None:
            assert default == f"{action.default})"


@pytest.mark.parametrize(
    ("command", "option", "value", "message"),
    [
        ("compare", "--folds", "1", "1 is less than 2"),
        ("fit", "--folds", "-1", "-1 is less than 0"),
        ("fit", "--jobs", "0", "0 is less than 1"),
        ("fit", "--seed", "-1", "-1 is less than 0"),
        ("fit", "--seed", str(2**32), f"{2**32} is more than {2**32 - 1}"),
        ("fit", "--seed", "x", "invalid number value: 'x'"),
        ("fit", "--scoring", "rmse", "argument --scoring: 'rmse' is none of accuracy, adjusted_"),
    ],
)
def test_values_out_of_range(capsys, command, option, value, message):
    arguments = [command, "zoo", "--labels", "l", "--target", "t", "-o", "o", option, value]
    with pytest.raises(SystemExit) as error:
        build_parser().parse_args(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["inspect", "a"], ["predict", "m", "a"]])
def test_options_of_reading_are_none_where_they_are_left_out(arguments):
    """So that they are those of the model."""
    given = vars(build_parser().parse_args(arguments))
    assert {given[name] for name in asdict(ReadOptions())} == {None}
    options = ["--scale", "0.5", "--allow-torch-zip", "--keys", "{module}.a", "{module}.b"]
    given = build_parser().parse_args([*arguments, *options, "--names=raw", "--lokr=kronecker"])
    assert (given.scale, given.allow_torch_zip) == (0.5, True)
    assert (given.names, given.lokr) == ("raw", "kronecker")
    assert given.keys == ["{module}.a", "{module}.b"]


def test_defaults_of_training():
    arguments = ["fit", "zoo", "--labels", "l", "--target", "t", "-o", "o"]
    given = build_parser().parse_args(arguments)
    assert (given.seed, given.jobs, given.device) == (0, 1, "auto")
    assert (given.architecture, given.folds) == ("auto", 5)
    given = build_parser().parse_args([*arguments, "--seed", str(2**32 - 1), "--folds", "0"])
    assert (given.seed, given.folds) == (2**32 - 1, 0)


@pytest.mark.parametrize("command", ["inspect", "fit", "predict", "compare"])
def test_options_are_documented(command):
    page = PAGE.read_text(encoding="utf-8")
    assert f"\n## {command}\n" in page
    for action in commands()[command]._actions:
        for option in action.option_strings:
            assert option in page or option == "-h", option
