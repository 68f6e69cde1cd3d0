"""A labelled zoo: adapters, and what is to be predicted of them."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sklora._progress import track
from sklora._stores import available_memory
from sklora._untrusted import counted, few
from sklora._zoofile import is_zoo
from sklora.cli._labels import Labels, match, read_labels
from sklora.cli._output import FAILED, CommandError, say
from sklora.cli._reading import read_together, reading_options, refuse
from sklora.cli._targets import Targets, make_targets
from sklora.collection import LoRACollection, check_numbers
from sklora.io import AdapterError
from sklora.io._find import Found, find_each
from sklora.io._plan import ReadOptions


@dataclass(frozen=True)
class LabelledZoo:
    """Adapters with their targets, in the order of the labels file.

    Attributes
    ----------
    loras : LoRACollection
    targets : Targets
    groups : tuple of str or None
    reading : ReadOptions
    """

    loras: LoRACollection
    targets: Targets
    groups: tuple[str, ...] | None
    reading: ReadOptions


def labelled_zoo(args: argparse.Namespace) -> LabelledZoo:
    """Read what the options of `fit` and `compare` say.

    Raises
    ------
    CommandError
        When the labels do not fit the adapters, or any of these cannot be read.
    """
    reading = reading_options(args)
    labels = read_labels(args.labels, args.target, id=args.id, groups=args.groups)
    targets = make_targets(labels, args.task)
    packed = _packed(args.zoo)
    if packed is None:
        files = _files(args.zoo)
        names = _names(files, os.path.dirname(args.labels))
    else:
        names = [[str(id)] for id in packed.ids.tolist()]
    places = match(labels, names)
    _say_unlabelled(names, places)
    if packed is None:
        ways = [*files.values()]
        chosen = track([ways[place][0] for place in places], "headers", "file")
        loras = read_together(chosen, reading, any_base_model=args.allow_other_base_model)
    else:
        loras = packed[places]
    groups = tuple(row.group or "" for row in labels.rows) if args.groups else None
    _say_what(loras, labels, targets)
    return LabelledZoo(_in_memory(loras), targets, groups, reading)


def _packed(paths: Sequence[str]) -> LoRACollection | None:
    """Open a zoo in one file; None if that is not what the paths are."""
    packed = [path for path in paths if is_zoo(path)]
    if packed and len(paths) > 1:
        raise CommandError(f"{packed[0]} is a packed zoo, which goes alone; leave out the others.")
    if not packed:
        return None
    try:
        return LoRACollection.open(packed[0])
    except ValueError as error:
        raise CommandError(str(error), FAILED) from None


def _files(paths: Sequence[str]) -> dict[str, list[Found]]:
    """List every file once, by folder and name, with all the ways that lead to it."""
    files: dict[str, list[Found]] = {}
    for finding in find_each(paths):
        if isinstance(finding, AdapterError):
            raise CommandError(str(finding))
        if not finding.in_folder and not os.path.exists(finding.path):
            raise CommandError(f"{finding.path}: No such file or directory.")
        folder, name = os.path.split(finding.path)
        files.setdefault(os.path.join(os.path.realpath(folder), name), []).append(finding)
    return files


def _names(files: Mapping[str, Sequence[Found]], labels_folder: str) -> list[list[str]]:
    """Give what a row may call each file: its path, from several folders, and that of its folder.

    The folder stands for an adapter that has it for itself, as those of PEFT do.
    """
    neighbours = Counter(map(os.path.dirname, files))
    names = []
    for file, ways in files.items():
        alone = neighbours[os.path.dirname(file)] == 1
        names.append([name for found in ways for name in _names_of(found, labels_folder, alone)])
    return names


def _names_of(found: Found, labels_folder: str, alone: bool) -> Iterator[str]:
    for path in (
        found.path,
        os.path.abspath(found.path),
        os.path.relpath(found.path, found.root),
        os.path.relpath(found.path, labels_folder or os.curdir),
    ):
        yield path
        folder = os.path.dirname(path)
        if alone and os.path.basename(folder) not in ("", os.curdir, os.pardir):
            yield folder


def _say_unlabelled(names: Sequence[Sequence[str]], places: Sequence[int]) -> None:
    labelled = set(places)
    left_out = [every[0] for place, every in enumerate(names) if place not in labelled]
    if left_out:
        some = few(left_out)
        say(f"left out, for want of a label: {len(left_out)} of {len(names)} adapters, {some}")


def _say_what(loras: LoRACollection, labels: Labels, targets: Targets) -> None:
    base_model = loras.layout.base_model
    of = "" if base_model is None else f" of {base_model}"
    n_adapters, n_modules = len(loras), loras.layout.n_modules
    say(f"{counted(n_adapters, 'adapter')}{of}, {counted(n_modules, 'module')}")
    say(f"predicts {', '.join(labels.targets)}: {targets.describe()} (--task says otherwise)")


def _in_memory(loras: LoRACollection) -> LoRACollection:
    """Read everything now, if it fits in half of the memory: nets read it many times."""
    available = available_memory()
    if available is not None and 2 * loras.nbytes > available:
        return loras
    flat = np.empty(loras.shape, loras.dtype)
    errors = []
    for row in track(range(len(loras)), "weights", "file"):
        rows = slice(row, row + 1)
        try:
            flat[rows] = loras.read(rows, copy=False)
            check_numbers(loras, rows, flat[rows])
        except ValueError as error:
            errors.append(error)
    refuse(errors)
    return LoRACollection.from_array(flat, loras.layout, ranks=loras.ranks, ids=loras.ids)
