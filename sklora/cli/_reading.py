"""Adapter files, read as the options say."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Sequence

from sklora._base import resolve_device
from sklora.cli._output import FAILED, CommandError, say, with_options
from sklora.collection import LoRACollection, LoRALayout
from sklora.io import AdapterError
from sklora.io._find import Found
from sklora.io._plan import ReadOptions
from sklora.io._read import Reader, read_options


def reading_options(args: argparse.Namespace, default: ReadOptions | None = None) -> ReadOptions:
    """Give the options of the command line, or those of `default` where they are left out.

    Raises
    ------
    CommandError
        When a value is not possible.
    """
    options = vars(default or ReadOptions())
    given = {name: getattr(args, name) for name in options}
    given = {name: value for name, value in given.items() if value is not None}
    if "keys" in given:
        given["keys"] = tuple(given["keys"])
    try:
        return read_options(**{**options, **given})
    except ValueError as error:
        raise CommandError(f"--{error}") from None


def check_device(device: str) -> None:
    """Check that there is such a device.

    Raises
    ------
    CommandError
        When there is none.
    """
    try:
        resolve_device(device)
    except ValueError as error:
        raise CommandError(f"--{error}") from None


class OneByOne:
    """Reads adapters for a fitted model; what is said of one does not depend on the others.

    Parameters
    ----------
    layout : LoRALayout
        That of the model.
    optional : collection of str
        The modules and side features that an adapter may lack.
    options : ReadOptions
    any_modules : bool
        Whether an adapter may lack others, and have more.
    any_base_model : bool
        Whether it may name another base model.
    """

    def __init__(
        self,
        layout: LoRALayout,
        optional: Collection[str],
        options: ReadOptions,
        *,
        any_modules: bool,
        any_base_model: bool,
    ) -> None:
        self._layout = layout
        self._options = options
        self._on_extra = "ignore" if any_modules else "raise"
        self._on_base_model = "ignore" if any_base_model else "raise"
        self._on_missing = "zero" if any_modules else "raise"
        self._optional = optional

    def read(self, found: Found) -> LoRACollection:
        """Read one adapter into memory, as a collection of one.

        Raises
        ------
        AdapterError
            When it cannot be read, or does not fit the model.
        """
        reader = Reader(
            self._layout,
            self._options,
            self._on_missing,
            self._on_extra,
            self._on_base_model,
            optional=self._optional,
        )
        reader.add(found)
        loras = LoRACollection(reader.store())
        return LoRACollection.from_array(
            loras.read(), loras.layout, ranks=loras.ranks, ids=loras.ids
        )


def read_together(
    files: Iterable[Found], options: ReadOptions, *, any_base_model: bool
) -> LoRACollection:
    """Read the headers of files that make one collection.

    Raises
    ------
    CommandError
        When any cannot be read, or does not fit the others; all of them are named.
    """
    on_base_model = "ignore" if any_base_model else "raise"
    reader = Reader(None, options, "zero", "ignore", on_base_model)
    errors = []
    for found in files:
        try:
            reader.add(found)
        except AdapterError as error:
            errors.append(error)
    refuse(errors)
    return LoRACollection(reader.store())


def refuse(errors: Sequence[ValueError]) -> None:
    """End the command if any adapter cannot be read, and name all of them before.

    Raises
    ------
    CommandError
        When there are errors.
    """
    if len(errors) == 1:
        raise CommandError(with_options(str(errors[0])), FAILED)
    for error in errors:
        say(str(error))
    if errors:
        raise CommandError(
            f"{len(errors)} adapters cannot be read; mend them, or leave their labels out.", FAILED
        )
