"""One adapter file: opened, planned, and read."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sklora._base import as_tensor
from sklora._stores import compute_dtype
from sklora._untrusted import Refusal, shown
from sklora.io._errors import AdapterError
from sklora.io._find import CONFIG, Found, check_inside, read_config
from sklora.io._plan import AdapterPlan, ModulePlan, ReadOptions, Scale, Source
from sklora.io._tensors import DTYPES, FLOAT_DTYPES, TensorFile
from sklora.io.containers import open_tensor_file
from sklora.io.formats import plan_adapter
from sklora.io.formats.peft import METADATA as SETTINGS
from sklora.io.lowrank import METHODS

# An alpha may be stored in 16 bits.
_ROUNDING = 1e-2


class Stamp(NamedTuple):
    """What tells whether a file, with the configuration beside it, is still the one seen."""

    size: int
    modified: int
    config: tuple[int, int] | None

    @classmethod
    def of(cls, path: str) -> Stamp:
        """Look at a file."""
        config = None
        with suppress(FileNotFoundError):
            config = _size_and_time(os.path.join(os.path.dirname(path), CONFIG))
        return cls(*_size_and_time(path), config)


def _size_and_time(path: str) -> tuple[int, int]:
    state = os.stat(path)
    return state.st_size, state.st_mtime_ns


class OpenAdapter(NamedTuple):
    """A file whose header has been read, and what it says.

    Attributes
    ----------
    path : str
    file : TensorFile
    plan : AdapterPlan
    """

    path: str
    file: TensorFile
    plan: AdapterPlan

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype in which its numbers are computed with: float32 or float64."""
        names = {self.file.tensors[name].dtype for name in self._tensors()}
        # One by one, since those of 8 bits have no dtype in common.
        wide = [compute_dtype(DTYPES[name]) for name in names if name in FLOAT_DTYPES]
        return np.result_type(np.float32, *wide)

    def stored_dtypes(self) -> tuple[str, ...]:
        """The dtypes of its factors as they are stored, by safetensors' names."""
        return tuple(sorted({self.file.tensors[name].dtype for name in self._tensors()}))

    def _tensors(self) -> Iterator[str]:
        return (name for module in self.plan.modules for name in module.tensors.values())

    def scale(self, scale: Scale) -> float:
        """Give the number s of an update ``s B A``, which may lie in a tensor."""
        if scale.alpha is None:
            return scale.value
        alpha = float(self.file.read(scale.alpha).reshape(-1)[0])
        if not math.isfinite(alpha):
            raise Refusal(
                f"tensor {shown(scale.alpha)} has NaN or infinity; leave the adapter out, or mend "
                "it."
            )
        # kohya's trainer and LyCORIS read an alpha of 0 as the rank.
        value = scale.value * alpha if alpha else 1.0
        if scale.rival is not None and not math.isclose(value, scale.rival, rel_tol=_ROUNDING):
            raise Refusal(
                f"tensor {shown(scale.alpha)} gives its module the scale {value:g}, but loaders "
                f"that do not look at it take {scale.rival:g}; take it out of the file, or make "
                "both agree."
            )
        return value

    def factors(
        self, modules: Mapping[str, Any], dtype: np.dtype[Any]
    ) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
        """Read the factors of some modules, with the root of the scale in each and its sign in U.

        Parameters
        ----------
        modules : mapping
            By the names that the collection gives them; others are passed by.
        dtype : numpy.dtype

        Yields
        ------
        name : str
            In the order of `modules`.
        U : ndarray of shape (n, rank)
        V : ndarray of shape (m, rank)

        Raises
        ------
        Refusal
            When the numbers are NaN or infinite, or cannot be read.
        """
        plans = {module.name: module for module in self.plan.modules}
        wanted = [plans[name] for name in modules if name in plans]
        # Experts of one layer share tensors, which are read once for all of them, though other
        # modules may come between.
        stacks = [tuple(module.tensors.items()) for module in wanted]
        left = Counter(stacks)
        held: dict[Any, tuple[NDArray[Any], NDArray[Any]]] = {}
        for module, stack in zip(wanted, stacks, strict=True):
            if stack not in held:
                held[stack] = self._factors(module, dtype)
            left[stack] -= 1
            factors = held[stack] if left[stack] else held.pop(stack)
            yield module.name, *self._scaled(module, *factors)

    def side(
        self, names: Mapping[str, Any], dtype: np.dtype[Any]
    ) -> Iterator[tuple[str, NDArray[Any]]]:
        """Read some side features, each a vector."""
        for name, tensor, _ in self.plan.side:
            if name in names:
                yield name, self._numbers(tensor, dtype).reshape(-1)

    def _factors(
        self, module: ModulePlan, dtype: np.dtype[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        arrays = {role: self._numbers(name, dtype) for role, name in module.tensors.items()}
        with np.errstate(over="ignore", invalid="ignore"):
            return METHODS[module.method].factors(arrays)

    def _scaled(
        self, module: ModulePlan, U: NDArray[Any], V: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        place, count = module.part
        if count > 1:
            U, V = U[:, place::count], V[:, place * module.rank : (place + 1) * module.rank]
        scale = self.scale(module.scale)
        if scale == 1 and module.method == "lora":
            return U, V
        root = np.sqrt(abs(scale))
        with np.errstate(over="ignore", invalid="ignore"):
            U, V = U * U.dtype.type(np.copysign(root, scale)), V * V.dtype.type(root)
        if not (np.isfinite(U).all() and np.isfinite(V).all()):
            raise Refusal(
                f"module {shown(module.path)} with the scale {scale:g} has numbers that {U.dtype} "
                "cannot hold; it is damaged."
            )
        return U, V

    def _numbers(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        numbers = self.file.read(name)
        if numbers.dtype == np.float16 and dtype == np.float32:
            numbers = as_tensor(numbers).float().numpy()  # in a fraction of NumPy's time
        with np.errstate(over="ignore"):
            numbers = numbers.astype(dtype, copy=False)
        if not np.isfinite(numbers).all():
            raise Refusal(
                f"tensor {shown(name)} has NaN or infinity, or numbers too large for {dtype}; "
                "leave the adapter out, or mend it."
            )
        return numbers


@contextmanager
def opened(found: Found, options: ReadOptions, stamp: Stamp | None = None) -> Iterator[OpenAdapter]:
    """Open a file and read its header; whatever is refused names the file.

    Parameters
    ----------
    found : Found
    options : ReadOptions
    stamp : Stamp or None, default=None
        What the file has to be still.

    Yields
    ------
    OpenAdapter

    Raises
    ------
    AdapterError
        When the file is refused, in here or in the body of the `with` statement.
    """
    try:
        if found.in_folder:
            check_inside(found.path, found.root)
        _check_whole(found.path)
        before = _stamp_before(found.path)
        with open_tensor_file(found.path, allow_torch_zip=options.allow_torch_zip) as file:
            if stamp is not None and Stamp.of(found.path) != stamp:
                raise Refusal("it changed since its header was read; read the adapters again.")
            source = Source(
                file.container, file.tensors, _used(file), read_config(found), file.size
            )
            # Else the weights may be those of one adapter, and the scale that of another.
            if Stamp.of(found.path) != before:
                raise Refusal("it changed while it was read; read the adapters again.")
            yield OpenAdapter(found.path, file, _plan(source, file.header, options))
    except Refusal as error:
        raise AdapterError(found.path, str(error)) from None
    except OSError as error:
        raise AdapterError(found.path, f"it cannot be read: {error.strerror or error}.") from error


# As transformers and llama.cpp name them; a variant, such as fp16, may follow.
_PART = re.compile(r"-[0-9]{5}-of-([0-9]{5})(?:\.\w+)?\.[a-z]+$")


def _check_whole(path: str) -> None:
    """Refuse one part of an adapter: modules of the others would count as unchanged."""
    found = _PART.search(path)
    if found and int(found[1]) > 1:
        raise Refusal(
            f"by its name it is one of {int(found[1])} parts of an adapter; put all of them in one "
            "file, or rename it if it is whole."
        )


def _stamp_before(path: str) -> Stamp | None:
    """Look at a file that is to be opened, which says what is wrong if that cannot be done."""
    with suppress(OSError, ValueError):
        return Stamp.of(path)
    return None


def _used(file: TensorFile) -> Mapping[str, str]:
    """Give the metadata that formats look at: that of safetensors is seldom any of it."""
    if file.container != "safetensors":
        return file.metadata
    return {name: file.metadata[name] for name in (SETTINGS, "alpha") if name in file.metadata}


class _Text:
    """A source that equals another when both were read from the same text."""

    def __init__(self, source: Source, header: bytes) -> None:
        self.source = source
        try:
            config = json.dumps(source.config)
        except RecursionError:
            raise Refusal(f"{CONFIG} beside it is nested too deeply.") from None
        self._key = header, config, tuple(source.metadata.items())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Text) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _plan(source: Source, header: bytes | None, options: ReadOptions) -> AdapterPlan:
    """Plan a file; those of one trainer often have one header, and need one plan."""
    if header is None:
        return plan_adapter(source, options)
    return _plan_again(_Text(source, header), options)


@lru_cache(maxsize=8)
def _plan_again(text: _Text, options: ReadOptions) -> AdapterPlan:
    return plan_adapter(text.source, options)
