"""The options of every command."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeAlias

import sklora
from sklora.architectures import ARCHITECTURES

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

_DESCRIPTION = "Learn from the weights of LoRA adapters, and predict from them."
_EPILOG = """\
examples:
  sklora inspect uploads/
  sklora fit zoo/ --labels labels.csv --target style -o model.skops
  sklora predict model.skops uploads/*.safetensors > predictions.csv
  sklora compare zoo/ --labels labels.csv --target loss --groups dataset

exit codes: 0 all is well; 1 some or all of the work failed; 2 the command was called wrongly
"""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser; the name of the command is in `command`."""
    parser = argparse.ArgumentParser(
        "sklora",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"sklora {sklora.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    reading, learning = _reading(), _learning()
    _add_inspect(commands, reading)
    _add_fit(commands, learning, reading)
    _add_predict(commands, reading)
    _add_compare(commands, learning, reading)
    return parser


def _reading() -> argparse.ArgumentParser:
    """Options of how adapters are read, None where they are left out."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("how adapters are read")
    group.add_argument(
        "--names",
        choices=("canonical", "raw"),
        help="call modules by one name for all trainers, or as the file does (default: canonical)",
    )
    group.add_argument(
        "--keys",
        nargs=2,
        metavar=("A_PATTERN", "B_PATTERN"),
        help="names of A (r, in) and B (out, r) in files with keys of their own, with {module} for "
        "the module",
    )
    group.add_argument("--scale", type=float, metavar="S", help="scale of files that tell none")
    group.add_argument(
        "--lokr",
        choices=("exact", "kronecker"),
        help="read LoKr as the factors of the update, or of its small parts (default: exact)",
    )
    group.add_argument(
        "--allow-torch-zip",
        action="store_const",
        const=True,
        help="read .bin, .pt and .ckpt of PyTorch too; no code in them is run",
    )
    return parser


def _learning() -> argparse.ArgumentParser:
    """Options of whatever trains."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "zoo", nargs="+", metavar="ZOO", help="adapter files, folders, patterns, or one packed zoo"
    )
    group = parser.add_argument_group("labels")
    group.add_argument("--labels", required=True, metavar="CSV", help="one row for each adapter")
    group.add_argument(
        "--target",
        required=True,
        action="append",
        metavar="COLUMN",
        help="column to predict; give it several times for many labels or many numbers",
    )
    group.add_argument(
        "--id",
        metavar="COLUMN",
        help="column that names the adapter, by its path (default: path, else id, else the first)",
    )
    group.add_argument("--task", choices=("classification", "regression"), help=_TASK)
    group.add_argument(
        "--allow-other-base-model",
        action="store_true",
        help="take adapters that name different base models",
    )
    group = parser.add_argument_group("training")
    group.add_argument(
        "--groups", metavar="COLUMN", help="never test on a group that was trained on"
    )
    group.add_argument(
        "--scoring",
        type=_scorer,
        metavar="NAME",
        help="a scorer of scikit-learn, such as roc_auc (default: accuracy, or R2)",
    )
    group.add_argument("--seed", type=_at_least(0, 2**32 - 1), default=0, help="(default: 0)")
    group.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)"
    )
    group.add_argument(
        "--jobs", type=_at_least(1), default=1, help="folds at the same time (default: 1)"
    )
    return parser


def _at_least(least: int, most: float = math.inf) -> Callable[[str], int]:
    def number(text: str) -> int:  # argparse calls the type so
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is less than {least}")
        if value > most:
            raise argparse.ArgumentTypeError(f"{value} is more than {most}")
        return value

    return number


def _scorer(name: str) -> str:
    from sklearn.metrics import get_scorer_names

    if name not in (known := get_scorer_names()):
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
    return name


_TASK = "(default: regression if all targets are numbers, and either not whole or of many values)"


def _add_inspect(commands: Commands, *parents: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "inspect",
        parents=parents,
        help="say what adapter files hold",
        description="Say what adapter files hold and what is wrong with them, from their headers.",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="files, folders or patterns")
    parser.add_argument("--json", action="store_true", help="all that is known, as a JSON array")


def _add_fit(commands: Commands, *parents: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "fit",
        parents=parents,
        help="train a model and store it",
        description="Train a model on labelled adapters, score it by cross-validation, store it.",
    )
    parser.add_argument(
        "--architecture",
        choices=("auto", *ARCHITECTURES),
        default="auto",
        help="auto takes the one with the best score (default: auto)",
    )
    parser.add_argument(
        "--folds", type=_at_least(0), default=5, help="0 for no cross-validation (default: 5)"
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="MODEL", help="where the model is stored"
    )


def _add_predict(commands: Commands, *parents: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "predict",
        parents=parents,
        help="predict with a stored model",
        description="Predict for adapters, in order. They are read as in fit, unless told "
        "otherwise. A file that cannot be read, or does not fit the model, has an error instead.",
    )
    parser.add_argument("model", metavar="MODEL", help="what fit stored")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="files, folders or patterns")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="write CSV (default)")
    form.add_argument("--json", action="store_true", help="write a JSON array")
    parser.add_argument(
        "--allow-other-modules",
        action="store_true",
        help="take modules that an adapter lacks as zero, and pass by those the model lacks",
    )
    parser.add_argument(
        "--allow-other-base-model",
        action="store_true",
        help="take adapters that name another base model",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)"
    )


def _add_compare(commands: Commands, *parents: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "compare",
        parents=parents,
        help="compare the five architectures",
        description="Score the five architectures by cross-validation, and draw a chart.",
    )
    parser.add_argument("--folds", type=_at_least(2), default=5, help="(default: 5)")
    parser.add_argument("--json", action="store_true", help="write a JSON object")
    chart = parser.add_mutually_exclusive_group()
    chart.add_argument(
        "-o",
        "--output",
        default="comparison.png",
        metavar="CHART",
        help="where the chart is saved; its ending says how (default: comparison.png)",
    )
    chart.add_argument("--no-chart", action="store_true", help="only the table")
