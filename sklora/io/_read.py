"""read_adapters: from paths to a collection that is backed by the files."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import numpy as np

from sklora._base import check_option
from sklora._progress import track
from sklora._untrusted import counted, printable, shown
from sklora.collection import LoRACollection, LoRALayout
from sklora.io._adapter import OpenAdapter, opened
from sklora.io._build import is_finite
from sklora.io._errors import AdapterError
from sklora.io._find import Found, Paths, find_each
from sklora.io._plan import ReadOptions
from sklora.io._store import AdapterFile, AdapterStore, located
from sklora.io.formats.custom import check_keys

_logger = logging.getLogger("sklora.io")


class SkippedAdapterWarning(UserWarning):
    """Some files were left out of a collection; the message names each, and says why.

    Parameters
    ----------
    errors : sequence of AdapterError

    Attributes
    ----------
    errors : tuple of AdapterError

    Examples
    --------
    >>> import tempfile, warnings
    >>> import numpy as np
    >>> from sklora.io import read_adapters, write_adapter
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_adapter(folder, {"q_proj": (np.ones((8, 2)), np.ones((6, 2)))})
    ...     with warnings.catch_warnings(record=True, action="always") as seen:
    ...         X = read_adapters([folder, "nowhere.safetensors"], on_error="skip")
    >>> len(X), [error.path for error in seen[0].message.errors]
    (1, ['nowhere.safetensors'])
    """

    def __init__(self, errors: Sequence[AdapterError]) -> None:
        self.errors = tuple(errors)
        lines = "\n".join(f"- {error}" for error in self.errors)
        were = "was" if len(self.errors) == 1 else "were"
        super().__init__(f"{counted(len(self.errors), 'file')} {were} left out:\n{lines}")

    def __reduce__(self) -> tuple[type[Self], tuple[tuple[AdapterError, ...]]]:
        return type(self), (self.errors,)


class _Header(NamedTuple):
    """What the collection needs to know of one file."""

    file: AdapterFile
    id: str
    modules: dict[str, tuple[int, int, int]]
    side: dict[str, int]
    base_model: str | None
    dtype: np.dtype[Any]


def read_adapters(
    paths: Paths,
    *,
    layout: LoRALayout | None = None,
    on_missing: Literal["zero", "raise"] = "zero",
    on_extra: Literal["ignore", "raise"] = "ignore",
    strict: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
    on_base_model: Literal["raise", "ignore"] = "raise",
    names: Literal["canonical", "raw"] = "canonical",
    keys: tuple[str, str] | None = None,
    scale: float | None = None,
    lokr: Literal["exact", "kronecker"] = "exact",
    allow_torch_zip: bool = False,
    verbose: int = 0,
) -> LoRACollection:
    r"""Read LoRA adapters from files, as a collection that is backed by them.

    Only headers are read now; the weights of a block of adapters are read each time that it is
    needed. Each file is one adapter. Its format is told by its content. The scale :math:`s` of an
    update :math:`s B A` is folded into the factors, :math:`U = \sqrt{|s|}\, \mathrm{sign}(s) B` and
    :math:`V = \sqrt{|s|}\, A^\top`.

    Parameters
    ----------
    paths : str, path-like, or iterable of them
        Files; folders, which stand for all adapters in them and below; or patterns such as
        ``"zoo/*/adapter_model.safetensors"``. In a folder, pickles beside other adapters are
        skipped, as trainers save the same weights twice, except those that PEFT or diffusers would
        load.
    layout : LoRALayout or None, default=None
        The modules to read, such as ``estimator.layout_``; ranks may exceed those of the layout,
        and the collection then has room for them. By default all modules of all files, sorted by
        name, each in the shape of the first file that has it; files with another shape do not fit.
    on_missing : {"zero", "raise"}, default="zero"
        What becomes of a module or side feature that a file lacks: the zero update, or an error.
    on_extra : {"ignore", "raise"}, default="ignore"
        What becomes of a module or side feature that `layout` lacks.
    strict : bool, default=False
        Whether both are errors.
    on_error : {"raise", "skip"}, default="raise"
        What becomes of a file that cannot be read: an error, or it is left out with a
        `SkippedAdapterWarning` that lists all such files. ``"skip"`` reads every file once now, so
        that none fails later. `ids` of the collection tell which adapters remain.
    on_base_model : {"raise", "ignore"}, default="raise"
        What becomes of a file whose configuration names another base model than `layout` or the
        files before it. Files that name none are taken. With ``"ignore"`` the collection has the
        label of `layout`, if that is given, or none.
    names : {"canonical", "raw"}, default="canonical"
        Whether modules get one name for all trainers, or that of the file.
    keys : (str, str) or None, default=None
        Names of ``A (r, in)`` and ``B (out, r)`` in files with keys of their own, where
        ``{module}`` stands for the module: ``("w_a_{module}", "w_b_{module}")``.
    scale : float or None, default=None
        The scale :math:`s` of files that do not state it themselves. They are refused without it.
    lokr : {"exact", "kronecker"}, default="exact"
        How LoKr is read: as the exact factors of the update, or as the outer product of the
        flattened parts, whose gauge is GL(1) (appendix E of the paper).
    allow_torch_zip : bool, default=False
        Whether PyTorch's ``.bin``, ``.pt`` and ``.ckpt`` are read, tensors alone; no code in them
        is run.
    verbose : int, default=0
        With 1 or more there is a progress bar, if standard error is a terminal.

    Returns
    -------
    LoRACollection
        Its `ids` are the paths of the files. It pickles as paths.

    Raises
    ------
    AdapterError
        When a path does not exist, or a file is no adapter, is damaged, is of an unknown format, or
        does not fit the others. Also later, where blocks are read, when numbers are NaN or infinite
        or a file has changed.
    ValueError
        When an argument has no such choice, or no file is left.

    See Also
    --------
    scan_adapters : Reports what files hold.
    write_adapter : Writes an adapter.

    Notes
    -----
    No pickle is executed, whatever the arguments. Nothing that a file names is opened, and links in
    a folder do not lead out of it.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from sklora.io import read_adapters, write_adapter
    >>> rng = np.random.default_rng(0)
    >>> with tempfile.TemporaryDirectory() as zoo:
    ...     for name in ("cat", "dog"):
    ...         factors = {"layers.0.q_proj": (rng.normal(size=(8, 2)), rng.normal(size=(6, 2)))}
    ...         write_adapter(f"{zoo}/{name}", factors)
    ...     X = read_adapters(zoo)
    ...     X, X[0]["layers.0.q_proj"][0].shape
    (LoRACollection(n_adapters=2, n_modules=1, width=28, dtype=float64), (8, 2))
    """
    check_option("on_missing", on_missing, ("zero", "raise"))
    check_option("on_extra", on_extra, ("ignore", "raise"))
    check_option("on_error", on_error, ("raise", "skip"))
    check_option("on_base_model", on_base_model, ("raise", "ignore"))
    _check_switch("strict", strict)
    options = read_options(names, keys, scale, lokr, allow_torch_zip)
    if strict:
        on_missing = on_extra = "raise"
    skip = on_error == "skip"
    reader = Reader(layout, options, on_missing, on_extra, on_base_model, read_numbers=skip)
    skipped: list[AdapterError] = []
    for found in track(list(find_each(paths)), "headers", "file", verbose):
        try:
            if isinstance(found, AdapterError):
                raise found
            reader.add(found)
        except AdapterError as error:
            if not skip:
                raise
            skipped.append(error)
    if skip:
        skipped += reader.drop_incomplete()
    for one in skipped:
        _logger.warning("left out %s", one)
    if skipped:
        warnings.warn(SkippedAdapterWarning(skipped), stacklevel=2)
    loras = LoRACollection(reader.store())
    _logger.debug("read the headers of %d files, %d left out", len(loras), len(skipped))
    return loras


def read_options(
    names: str, keys: tuple[str, str] | None, scale: float | None, lokr: str, allow_torch_zip: bool
) -> ReadOptions:
    """Check the arguments that say how a single file is read."""
    check_option("names", names, ("canonical", "raw"))
    check_option("lokr", lokr, ("exact", "kronecker"))
    _check_switch("allow_torch_zip", allow_torch_zip)
    if keys is not None:
        check_keys(keys)
    if scale is not None and not is_finite(scale):
        raise ValueError(f"scale is {scale!r}; pass a finite number.")
    return ReadOptions(names, keys, scale, lokr, allow_torch_zip)  # type: ignore[arg-type]


def _check_layout(layout: object) -> None:
    if not isinstance(layout, LoRALayout):
        raise ValueError(f"layout is {layout!r}; pass a LoRALayout, such as X.layout, or None.")
    if layout.has_plain_rows:
        raise ValueError("layout is of plain rows, which adapters do not have; pass another.")


def _check_switch(name: str, value: object) -> None:
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} is {value!r}; choose one of True, False.")


class Reader:
    """Headers of files that fit together.

    Parameters
    ----------
    layout, options, on_missing, on_extra, on_base_model
        As for `read_adapters`.
    optional : collection of str, default=()
        Modules and side features that a file may lack, even where that is an error.
    read_numbers : bool, default=False
        Whether the numbers of a file are read as well, to find those that are damaged.
    """

    def __init__(
        self,
        layout: LoRALayout | None,
        options: ReadOptions,
        on_missing: str,
        on_extra: str,
        on_base_model: str,
        *,
        optional: Collection[str] = (),
        read_numbers: bool = False,
    ) -> None:
        if layout is not None:
            _check_layout(layout)
        self._layout = layout
        self._options = options
        self._missing_is_error = on_missing == "raise"
        self._optional = frozenset(optional)
        self._extra_is_error = on_extra == "raise"
        self._check_base = on_base_model == "raise"
        self._read_numbers = read_numbers
        self._headers: list[_Header] = []
        # Adapters of one zoo have the same modules, which are kept but once.
        self._modules: dict[tuple[Any, ...], dict[str, tuple[int, int, int]]] = {}
        # What is known so far, and which file said it.
        self._shapes: dict[str, tuple[int, int, str]] = {}
        self._sides: dict[str, tuple[int, str]] = {}
        self._base: tuple[str, str] | None = None
        if layout is not None:
            self._shapes = {name: (n, m, "the layout") for name, n, m, _ in layout.modules}
            self._sides = {name: (size, "the layout") for name, size in layout.side}
            if layout.base_model is not None:
                self._base = layout.base_model, "the layout"

    def add(self, found: Found) -> None:
        """Read a header, and check it against the layout and the files before."""
        with opened(found, self._options) as adapter:
            header = _header(found, adapter)
            try:
                self._check(header)
            except ValueError as error:
                raise AdapterError(found.path, str(error)) from None
            if self._read_numbers:
                self._read(adapter, header)
        if self._layout is None:
            for name, (n, m, _) in header.modules.items():
                self._shapes.setdefault(name, (n, m, header.id))
            for name, size in header.side.items():
                self._sides.setdefault(name, (size, header.id))
        if self._base is None and header.base_model is not None:
            self._base = header.base_model, header.id
        modules = self._modules.setdefault(tuple(header.modules.items()), header.modules)
        self._headers.append(header._replace(modules=modules))

    def drop_incomplete(self) -> list[AdapterError]:
        """Forget the files that lack a module of any, if that is an error, and give the errors."""
        errors = self._incomplete()
        self._headers = [header for header in self._headers if header.id not in errors]
        return list(errors.values())

    def store(self) -> AdapterStore:
        """Make the store of all files so far."""
        if not self._headers:
            raise ValueError(
                "paths leave no adapter to read; pass one or more, and let scan_adapters say what "
                "is wrong with each file."
            )
        for error in self._incomplete().values():
            raise error
        layout = self._final_layout()
        ranks = np.zeros((len(self._headers), layout.n_modules), np.intp)
        positions = {name: position for position, name in enumerate(layout.names)}
        for row, header in enumerate(self._headers):
            # One file may have far more modules than the others.
            for name in header.modules.keys() & positions.keys():
                ranks[row, positions[name]] = header.modules[name][2]
        ids = np.array([header.id for header in self._headers])
        ranks.flags.writeable = ids.flags.writeable = False
        files = [header.file for header in self._headers]
        dtype = np.result_type(*(header.dtype for header in self._headers))
        return AdapterStore(files, self._options, layout, ranks, ids, dtype)

    def _final_layout(self) -> LoRALayout:
        rooms: dict[str, int] = {}
        if self._layout is not None:
            rooms = dict(zip(self._layout.names, self._layout.ranks, strict=True))
        for header in self._headers:
            for name, (_, _, rank) in header.modules.items():
                if self._layout is None or name in rooms:
                    rooms[name] = max(rooms.get(name, 0), rank)
        if self._layout is not None:
            return self._layout.with_ranks(rooms.values())
        known = sorted(rooms, key=natural_order)
        sides = {name: size for header in self._headers for name, size in header.side.items()}
        return LoRALayout(
            [(name, *self._shapes[name][:2], rooms[name]) for name in known],
            side=[(name, sides[name]) for name in sorted(sides, key=natural_order)],
            base_model=self._base_model() if self._check_base else None,
        )

    def _base_model(self) -> str | None:
        """Give the label of the files that are left, of which all that have one have the same."""
        labels = (header.base_model for header in self._headers)
        return next((label for label in labels if label is not None), None)

    def _check(self, header: _Header) -> None:
        label = header.base_model
        if self._check_base and self._base and label not in (None, self._base[0]):
            raise ValueError(
                f"its base model is {shown(label)}, but that of {printable(self._base[1])} is "
                f"{shown(self._base[0])}; read them apart, or pass on_base_model='ignore' if they "
                "are the same."
            )
        for name, (n, m, _) in header.modules.items():
            known = self._shapes.get(name)
            if known is not None and known[:2] != (n, m):
                why = "adapters of different base models make different collections"
                if known[:2] == (m, n):
                    why += ", and so do experts of PEFT before 0.19.1 and of later ones"
                raise ValueError(
                    f"module {shown(name)} has updates of shape ({n}, {m}), but ({known[0]}, "
                    f"{known[1]}) in {printable(known[2])}; {why}."
                )
        for name, size in header.side.items():
            if self._sides.get(name, (size,))[0] != size:
                raise ValueError(
                    f"side feature {shown(name)} has {size} numbers, but {self._sides[name][0]} in "
                    f"{printable(self._sides[name][1])}."
                )
        if self._layout is not None:
            self._check_against_layout(header)

    def _check_against_layout(self, header: _Header) -> None:
        if not self._shapes.keys() & header.modules.keys():
            raise ValueError(
                "it has no module of the layout, such as "
                f"{shown(next(iter(self._shapes)))}; its own are such as "
                f"{shown(next(iter(header.modules)))}."
            )
        extra = [*(header.modules.keys() - self._shapes.keys())]
        extra += header.side.keys() - self._sides.keys()
        if extra and self._extra_is_error:
            raise ValueError(
                f"it has {first_of(extra)}, which the layout lacks; pass on_extra='ignore' to "
                "pass such by."
            )
        self._check_missing(header)

    def _check_missing(self, header: _Header) -> None:
        missing = [*(self._shapes.keys() - header.modules.keys() - self._optional)]
        missing += self._sides.keys() - header.side.keys() - self._optional
        if missing and self._missing_is_error:
            raise ValueError(
                f"it lacks {first_of(missing)}; pass on_missing='zero' to take such as zero."
            )

    def _incomplete(self) -> dict[str, AdapterError]:
        """Check all files against the modules of all; errors by id."""
        errors: dict[str, AdapterError] = {}
        for header in self._headers if self._missing_is_error else ():
            try:
                self._check_missing(header)
            except ValueError as error:
                errors[header.id] = AdapterError(header.id, str(error))
        return errors

    def _read(self, adapter: OpenAdapter, header: _Header) -> None:
        """Read the numbers that a collection would have, which raises `Refusal` if any is bad."""
        modules: Mapping[str, Any] = header.modules
        side: Mapping[str, Any] = header.side
        if self._layout is not None:
            modules, side = self._shapes, self._sides
        for _ in adapter.factors(modules, header.dtype):
            pass
        for _ in adapter.side(side, header.dtype):
            pass


def _header(found: Found, adapter: OpenAdapter) -> _Header:
    modules = {module.name: (module.n, module.m, module.rank) for module in adapter.plan.modules}
    side = {name: size for name, _, size in adapter.plan.side}
    id = found.path.replace(os.sep, "/")
    return _Header(located(found), id, modules, side, adapter.plan.base_model, adapter.dtype)


def first_of(names: Collection[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return shown(min(names, key=natural_order)) + more


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Sort numbers in names by their value: layer 2 before layer 10."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name
