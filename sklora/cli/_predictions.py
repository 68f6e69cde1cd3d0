"""Predictions of a stored model, as they come and as they are written."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

from sklora._saved import ModelCard, columns_of
from sklora.cli._output import printable, result

Value = str | int | float


@dataclass(frozen=True)
class Prediction:
    """What is predicted of one file.

    Attributes
    ----------
    path : str
    error : str or None
        Why there is no prediction.
    values : tuple
        The class, or for every target its label or number.
    probabilities : tuple of float
        For every class, or for every label; none in regression.
    """

    path: str
    error: str | None = None
    values: tuple[Value, ...] = ()
    probabilities: tuple[float, ...] = ()


def csv_writer(card: ModelCard) -> Callable[[Sequence[Prediction]], None]:
    """Write the names of the columns, and give a function that writes rows."""
    columns = columns_of(card.targets, card.classes, card.probabilities)
    _write_rows([columns])

    def write(predictions: Sequence[Prediction]) -> None:
        _write_rows([_cells(one, card, len(columns)) for one in predictions])

    return write


def _cells(one: Prediction, card: ModelCard, n_columns: int) -> list[Value]:
    if one.error is not None:
        return [one.path, *[""] * (n_columns - 2), one.error]
    if card.classes is None and card.probabilities:
        pairs = zip(one.values, one.probabilities, strict=True)
        return [one.path, *(value for pair in pairs for value in pair), ""]
    return [one.path, *one.values, *one.probabilities, ""]


def _write_rows(rows: Sequence[Sequence[Value]]) -> None:
    to_terminal = sys.stdout.isatty()
    for row in rows:
        text = io.StringIO()
        # With "\n" at the end of lines, Python before 3.13 puts no quotes around a bare "\r".
        csv.writer(text).writerow([printable(str(cell)) if to_terminal else cell for cell in row])
        result(text.getvalue().removesuffix("\r\n"))
    sys.stdout.flush()


def json_writer(card: ModelCard) -> Callable[[Sequence[Prediction]], None]:
    """Give a function that writes the next elements of an array; `end_json` closes it."""
    separators = chain(["[\n"], repeat(",\n"))

    def write(predictions: Sequence[Prediction]) -> None:
        for one in predictions:
            result(next(separators) + json.dumps(_entry(one, card)), end="")
        sys.stdout.flush()

    return write


def end_json() -> None:
    """Close the array."""
    result("\n]")


def _entry(one: Prediction, card: ModelCard) -> dict[str, Any]:
    if one.error is not None:
        return {"path": one.path, "error": one.error}
    entry: dict[str, Any] = {"path": one.path}
    if card.classes is not None:
        entry["prediction"] = one.values[0]
    else:
        entry["prediction"] = dict(zip(card.targets, one.values, strict=True))
    if card.probabilities:
        names = [str(name) for name in card.classes or card.targets]
        entry["probability"] = dict(zip(names, one.probabilities, strict=True))
    return entry
