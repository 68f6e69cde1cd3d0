"""Labels from a CSV file, and which adapter each row of it is about."""

from __future__ import annotations

import csv
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sklora._untrusted import counted, few
from sklora.cli._output import CommandError

# What spreadsheets write in place of commas.
_OTHER_MARKS = frozenset(";\t|")


class Row(NamedTuple):
    """One labelled adapter.

    Attributes
    ----------
    line : int
        Of the file, for messages.
    id : str
    targets : tuple of str
    group : str or None
    """

    line: int
    id: str
    targets: tuple[str, ...]
    group: str | None


@dataclass(frozen=True)
class Labels:
    """What a labels file says.

    Attributes
    ----------
    path : str
    targets : tuple of str
        Names of the columns to predict.
    rows : tuple of Row
    """

    path: str
    targets: tuple[str, ...]
    rows: tuple[Row, ...]


def read_labels(
    path: str, targets: Sequence[str], *, id: str | None = None, groups: str | None = None
) -> Labels:
    """Read a CSV file, UTF-8 with or without a byte order mark, whose first row names columns.

    Parameters
    ----------
    path : str
    targets : sequence of str
        Columns to predict.
    id : str or None, default=None
        Column of the adapters' names; by default "path", else "id", else the first.
    groups : str or None, default=None
        Column of the groups.

    Returns
    -------
    Labels

    Raises
    ------
    CommandError
        When the file cannot be read, lacks a column or has one twice, a row has more or fewer cells
        than the first, or a cell that is needed is empty or, where it names no adapter, "nan".
    """
    for name in targets:
        if targets.count(name) > 1:
            raise CommandError(f"--target {name!r} is given twice.")
    (_, header), *lines = _read_table(path)
    id = _id_column(header) if id is None else id
    names = [id, *targets, *([] if groups is None else [groups])]
    places = {name: _place(path, header, name) for name in names}
    rows = []
    for line, cells in lines:
        if len(cells) != len(header):
            raise CommandError(
                f"{path}, line {line} has {counted(len(cells), 'cell')}, but there are "
                f"{counted(len(header), 'column')}; put quotes around a cell that holds a comma."
            )
        row = {name: cells[place].strip() for name, place in places.items()}
        _check_filled(f"{path}, line {line} ({row[id] or 'without a name'})", row, id)
        group = None if groups is None else row[groups]
        rows.append(Row(line, row[id], tuple(row[name] for name in targets), group))
    if not rows:
        raise CommandError(f"{path} has no rows but the names of its columns.")
    return Labels(path, tuple(targets), tuple(rows))


def _check_filled(where: str, row: Mapping[str, str], id: str) -> None:
    for name, cell in row.items():
        # What some programs write for an empty cell would be one more class, or one large group.
        if not cell or (cell.lower() == "nan" and name != id):
            what = repr(cell) if cell else "empty"
            raise CommandError(
                f"{where}: column {name!r} is {what}; fill it, or leave the row out."
            )


def _read_table(path: str) -> list[tuple[int, list[str]]]:
    """Give the rows that are not blank, each with the number of its last line."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            rows = [(reader.line_num, cells) for cells in reader if any(map(str.strip, cells))]
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise CommandError(f"{path} is not UTF-8; save it as CSV in UTF-8.") from None
    except csv.Error as error:
        raise CommandError(f"{path}, line {reader.line_num}: {error}.") from None
    if not rows:
        raise CommandError(f"{path} is empty; its first row is to name columns.")
    return rows


def _id_column(header: Sequence[str]) -> str:
    names = [name.strip() for name in header]
    return next((name for name in ("path", "id") if name in names), names[0])


def _place(path: str, header: Sequence[str], name: str) -> int:
    places = [place for place, title in enumerate(header) if title.strip() == name]
    if len(places) == 1:
        return places[0]
    if places:
        raise CommandError(f"{path} has {len(places)} columns {name!r}; rename all but one.")
    remedy = (
        "; separate cells by commas" if len(header) == 1 and _OTHER_MARKS & {*header[0]} else ""
    )
    there = ", ".join(map(repr, header))
    raise CommandError(f"{path} has no column {name!r}; it has {there}{remedy}.")


def match(labels: Labels, names: Sequence[Iterable[str]]) -> list[int]:
    """Find the adapter of every row.

    Parameters
    ----------
    labels : Labels
    names : sequence of iterable of str
        For every adapter what a row may call it; the first is how the user knows it.

    Returns
    -------
    list of int
        For every row the place of its adapter.

    Raises
    ------
    CommandError
        When a row matches no adapter or several, or two rows match the same.
    """
    known = _by_name(names)
    unknown = [row for row in labels.rows if not known.get(_normal(row.id))]
    if unknown:
        rows = few(f"{row.id!r} (line {row.line})" for row in unknown)
        there = few(repr(sorted(every, key=len)[0]) for every in names)
        raise CommandError(
            f"{labels.path}: no adapter is called {rows}; there are {there}. If another column "
            "names them, give --id."
        )
    places: list[int] = []
    taken: dict[int, Row] = {}
    for row in labels.rows:
        found = known[_normal(row.id)]
        where = f"{labels.path}, line {row.line}: {row.id!r}"
        if len(found) > 1:
            some = few(next(iter(names[place])) for place in found)
            raise CommandError(f"{where} may be any of {some}; give the whole path.")
        [place] = found
        if place in taken:
            raise CommandError(
                f"{where} is the adapter of line {taken[place].line}, too; leave one of them out."
            )
        taken[place] = row
        places.append(place)
    return places


def _by_name(names: Sequence[Iterable[str]]) -> Mapping[str, list[int]]:
    known: dict[str, list[int]] = {}
    for place, every in enumerate(names):
        for name in {_normal(name) for name in every}:
            known.setdefault(name, []).append(place)
    return known


def _normal(name: str) -> str:
    # As cells are read; and composed, where some systems give letters and their accents one by one.
    return os.path.normpath(unicodedata.normalize("NFC", name.strip()))
