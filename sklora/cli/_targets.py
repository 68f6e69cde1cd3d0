"""From the cells of label columns to what estimators predict."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sklora.cli._labels import Labels
from sklora.cli._output import CommandError

_MOST_CLASSES = 20
# As Python writes integers, of at most 18 digits.
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")


class Targets(NamedTuple):
    """What is to be predicted.

    Attributes
    ----------
    task : {"classification", "regression"}
    names : tuple of str
    y : ndarray of shape (n_adapters,) or (n_adapters, n_targets)
        With several columns, labels of 0 and 1, or numbers.
    """

    task: str
    names: tuple[str, ...]
    y: NDArray[Any]

    @property
    def classes(self) -> tuple[str | int, ...] | None:
        """The classes of single-label classification."""
        is_classes = self.task == "classification" and self.y.ndim == 1
        return tuple(np.unique(self.y).tolist()) if is_classes else None

    def describe(self) -> str:
        """Say what kind of task it is."""
        if self.classes is not None:
            return f"classification, {len(self.classes)} classes"
        kind = "labels" if self.task == "classification" else "numbers"
        return f"{self.task}, {len(self.names)} {kind if len(self.names) > 1 else kind[:-1]}"


def make_targets(labels: Labels, task: str | None) -> Targets:
    """Decide what the task is, and turn cells into targets.

    Parameters
    ----------
    labels : Labels
    task : {"classification", "regression"} or None
        None for regression if all cells are numbers and those of a column are either not whole or
        of more than 20 values; else classification.

    Returns
    -------
    Targets

    Raises
    ------
    CommandError
        When a cell is no finite number in regression, several columns are no labels of 0 and 1 in
        classification, there is one class only, or a column of numbers holds text and `task` is
        None.
    """
    columns = [[row.targets[place] for row in labels.rows] for place in range(len(labels.targets))]
    task = task or _task_of(labels, columns)
    if task == "regression":
        y = np.array([_numbers(labels, place) for place in range(len(columns))]).T
    elif len(columns) > 1:
        y = np.array([_indicators(labels, place) for place in range(len(columns))]).T
    else:
        y = _classes(columns[0])
        if len(np.unique(y)) < 2:
            raise CommandError(
                f"all targets in column {labels.targets[0]!r} are {columns[0][0]!r}; there is "
                "nothing to learn."
            )
    return Targets(task, labels.targets, y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y)


def _task_of(labels: Labels, columns: Sequence[Sequence[str]]) -> str:
    numbers = [[_number(cell) for cell in column] for column in columns]
    for place, column in enumerate(numbers):
        # What is written for a missing number would make every other one a class.
        if None in column and len(set(column)) > _MOST_CLASSES + 1:
            row = labels.rows[column.index(None)]
            raise CommandError(
                f"{labels.path}, line {row.line} ({row.id}): {labels.targets[place]} is "
                f"{row.targets[place]!r}, among numbers; fill it, or leave the row out. If they "
                "are names of classes, give --task classification."
            )
    if any(None in column for column in numbers):
        return "classification"
    amounts = any(
        len(set(column)) > _MOST_CLASSES
        or not all(value is not None and value.is_integer() for value in column)
        for column in numbers
    )
    return "regression" if amounts else "classification"


def _number(cell: str) -> float | None:
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def _numbers(labels: Labels, place: int) -> list[float]:
    numbers = []
    for row in labels.rows:
        number = _number(row.targets[place])
        if number is None or not math.isfinite(number):
            raise CommandError(
                f"{labels.path}, line {row.line} ({row.id}): {labels.targets[place]} is "
                f"{row.targets[place]!r}, but regression needs finite numbers."
            )
        numbers.append(number)
    return numbers


def _indicators(labels: Labels, place: int) -> list[int]:
    for row in labels.rows:
        if _number(row.targets[place]) not in (0, 1):
            raise CommandError(
                f"{labels.path}, line {row.line} ({row.id}): {labels.targets[place]} is "
                f"{row.targets[place]!r}, but several targets are labels of 0 and 1; give numbers "
                "to --task regression, or fit a model for each column of classes."
            )
    return [int(float(row.targets[place])) for row in labels.rows]


def _classes(cells: Sequence[str]) -> NDArray[Any]:
    """Give classes as they are written; as integers, if all are written as such."""
    whole = all(_WHOLE.fullmatch(cell) for cell in cells)
    return np.array([int(cell) for cell in cells] if whole else cells)
