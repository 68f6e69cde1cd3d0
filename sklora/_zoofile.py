"""A zoo in one safetensors file: written block by block, and mapped into memory."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, NoReturn

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray
from safetensors import SafetensorError, safe_open

from sklora._files import check_place, replacing
from sklora._layout import LoRALayout
from sklora._stores import ArrayStore, MemmapStore, Store, store_of_array
from sklora._untrusted import parse_json, shown

if TYPE_CHECKING:
    from sklora._loras import LoRACollection

_FORMAT = "sklora zoo"
_VERSION = "1"
_TENSORS = ("weights", "ranks", "ids")
# As in the safetensors library, which takes some 60 bytes and a microsecond for each short text.
_MAX_HEADER = 100_000_000
# A zoo's header has 44 quotes outside of its layout, that of an adapter 10 for each tensor.
_MAX_QUOTES = 1_000_000
_MAX_ID_BYTES = 2**30
# An array of so many bytes may have any ids, a larger one so many bytes for each letter of all.
_ANY_ID_BYTES = 2**26
_ID_BYTES_PER_LETTER = 64
# A list in which is no other list or dictionary, outside of texts; possessive, so never slow.
_FLAT_LIST = re.compile(rb'[^\[\]{}"]*+\[(?:[^\[\]{}"]++|"(?:[^"\\]++|\\.)*+")*+\]\s*+', re.DOTALL)
_MAX_REASON = 500
# By the names that safetensors gives them, in its byte order.
_WEIGHT_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# What `save_zoo` begins with, behind the length of the header.
_START = f'{{"__metadata__":{{"format":"{_FORMAT}"'.encode()
_DTYPES = {**_WEIGHT_DTYPES, "I32": np.dtype("<i4"), "U8": np.dtype("u1")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class _Tensor(NamedTuple):
    """One entry of the header; `start` counts from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int


def save_zoo(loras: LoRACollection, path: str | os.PathLike[str]) -> None:
    """Write a collection into one file, as `LoRACollection.save` says.

    Parameters
    ----------
    loras : LoRACollection
        Only one block of it is in memory at a time.
    path : str or path-like

    Raises
    ------
    ValueError
        When `path` is a folder, ids are neither integers nor strings, or the base model is no
        string.

    Notes
    -----
    The tensors are ``weights (n_adapters, width)``, in the precision that they are stored with,
    ``ranks (n_adapters, n_modules)`` and ``ids``, the bytes of a JSON list. The layout is in the
    metadata.
    """
    path = os.path.realpath(path)
    check_place(path, f"path={path!r}")
    _checked_base_model(loras.layout.base_model)
    ids = _ids_as_json(loras.ids)
    dtype = _stored_dtype(loras._store)
    tensors = {
        "weights": (dtype, loras.shape),
        "ranks": (_DTYPES["I32"], loras.ranks.shape),
        "ids": (_DTYPES["U8"], (len(ids),)),
    }
    # Wider numbers first keep every tensor at a multiple of its item size.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1][0].itemsize))
    with replacing(path) as file:
        file.write(_header(tensors, loras.layout))
        for name in tensors:
            if name == "weights":
                _write_weights(file, loras, dtype)
            else:
                file.write(loras.ranks.astype("<i4").tobytes() if name == "ranks" else ids)


def is_zoo(path: str) -> bool:
    """Tell whether a file says that `save_zoo` wrote it; False where there is no such file."""
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            if file.read(8 + len(_START)).endswith(_START):
                return True  # it may be damaged, which is for `open_zoo` to say
        # What another program wrote again may say it elsewhere.
        return _read_header(path)[0].get("format") == _FORMAT
    except (OSError, ValueError):
        return False


def open_zoo(path: str | os.PathLike[str]) -> Store:
    """Map a file that `save_zoo` wrote.

    Parameters
    ----------
    path : str or path-like

    Returns
    -------
    MemmapStore
        Of its adapters. Of the weights nothing has been read.

    Raises
    ------
    ValueError
        When the file is no zoo, or damaged. Nothing that it says is taken on trust.
    """
    path = os.path.realpath(path)
    metadata, tensors, data_start = _read_header(path)
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is a safetensors file, but no zoo that LoRACollection.save has written. If it "
            "is a single adapter, read it with sklora.io.read_adapters."
        )
    if metadata.get("version") != _VERSION:
        raise ValueError(
            f"{path} is a zoo of format version {shown(metadata.get('version'))}, and this sklora "
            f"reads version {_VERSION}; upgrade sklora, or save the zoo again with this one."
        )
    try:
        layout = _layout_from_json(metadata.get("layout", ""))
        _check_tensors(tensors, layout)
        file = np.memmap(path, np.uint8, "r")
        weights, ranks, ids = (
            np.ndarray(shape, _DTYPES[dtype], file, data_start + start)
            for dtype, shape, start in (tensors[name] for name in _TENSORS)
        )
        return store_of_array(weights, layout, ranks, _ids_from_json(ids.tobytes(), len(weights)))
    except (ValueError, TypeError) as error:
        _refuse(path, error)


def _refuse(path: str, reason: Exception) -> NoReturn:
    text = str(reason)
    # Names in the layout may be of any length.
    text = text.rstrip(".") if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]}..."
    raise ValueError(
        f"{path} is damaged, or no zoo that LoRACollection.save has written: {text}. Copy or save "
        "the zoo again; to read the files of adapters, use sklora.io.read_adapters."
    ) from reason


def _stored_dtype(store: Store) -> np.dtype[Any]:
    """Give the floating-point numbers in which nothing that the store reads is lost."""
    dtype = store.dtype
    if isinstance(store, ArrayStore):
        dtype = store.array.dtype
    elif isinstance(store, MemmapStore):
        dtype = store.span.dtype
    little = dtype.newbyteorder("<")
    return little if little in _WEIGHT_DTYPES.values() else store.dtype.newbyteorder("<")


def _write_weights(file: BinaryIO, loras: LoRACollection, dtype: np.dtype[Any]) -> None:
    # Two blocks, rows as the store has them, and as they are written.
    width = 2 * loras.layout.width + loras._store.layout.width
    bytes_per_adapter = width * loras.dtype.itemsize + loras.layout.width * dtype.itemsize
    for _, flat in loras.iter_blocks(bytes_per_adapter):
        # The block was read from numbers of this dtype, so that nothing but NaN can warn.
        with np.errstate(invalid="ignore"):
            file.write(flat.astype(dtype, copy=False).view(np.uint8).data)


def _header(
    tensors: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], layout: LoRALayout
) -> bytes:
    entries: dict[str, Any] = {
        "__metadata__": {
            "format": _FORMAT,
            "version": _VERSION,
            "layout": json.dumps(layout.__getstate__()),
        }
    }
    start = 0
    for name, (dtype, shape) in tensors.items():
        stop = start + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _ids_as_json(ids: NDArray[Any]) -> bytes:
    values = ids.tolist()
    try:
        _checked_ids(values)
    except ValueError as error:
        raise ValueError(f"{error}; make the collection with other ids=.") from None
    return json.dumps(values).encode()


def _ids_from_json(text: bytes, n_adapters: int) -> NDArray[Any]:
    # Of lists in lists, 3 bytes each would take 64.
    n_brackets = text.count(b"[") + text.count(b"{")
    if n_brackets > 1 and not _FLAT_LIST.fullmatch(text):
        raise ValueError(
            f"ids are no list of {n_adapters}, or neither all integers nor all strings."
        )
    values = parse_json(text, "its list of ids", len(text), max_values=len(text))
    if not isinstance(values, list) or len(values) != n_adapters:
        raise ValueError(f"ids are no list of {n_adapters}.")
    return _checked_ids(values)


def _checked_ids(values: list[Any]) -> NDArray[Any]:
    """Check what a file may hold as ids."""
    kinds = {type(value) for value in values}
    if not kinds <= {int} and not kinds <= {str}:
        raise ValueError("ids are neither all integers nor all strings")
    # An array of strings has room for the longest in every place.
    if kinds == {str}:
        lengths = [len(value) for value in values]
        allowed = max(_ANY_ID_BYTES, _ID_BYTES_PER_LETTER * sum(lengths))
        if 4 * len(values) * max(lengths) > min(_MAX_ID_BYTES, allowed):
            raise ValueError("ids are too long, or one is far longer than the others")
    dtype: DTypeLike = str
    if kinds == {int}:
        dtype = np.int64 if max(values) < 2**63 else np.uint64
    try:
        ids = np.array(values, dtype)
    except OverflowError:
        raise ValueError("ids are beyond the integers of 64 bits") from None
    if ids.tolist() != values:
        raise ValueError("ids end in NUL, which NumPy cuts off")
    return ids


def _layout_from_json(text: str) -> LoRALayout:
    state = parse_json(text, "its layout", len(text), unique=True)
    if not isinstance(state, dict) or not {"modules", "side", "base_model"} <= set(state):
        raise ValueError(f"the layout in its metadata is {shown(text)}.")
    base_model = _checked_base_model(state["base_model"])
    layout = LoRALayout(state["modules"], side=state["side"], base_model=base_model)
    if not state.get("has_plain_rows"):
        return layout
    rows = LoRALayout.rows(layout.modules[0].n)
    if rows.modules != layout.modules or layout.side or base_model is not None:
        raise ValueError(f"the layout in its metadata is {shown(text)}, which is no plain row.")
    return rows


def _checked_base_model(base_model: object) -> str | None:
    if not isinstance(base_model, str | None):
        raise ValueError(f"base_model is {shown(base_model)}, which is no string.")
    return base_model


def _check_tensors(tensors: Mapping[str, _Tensor], layout: LoRALayout) -> None:
    """Check dtypes and shapes; that every tensor lies in the file has been checked."""
    if set(tensors) != set(_TENSORS):
        raise ValueError(f"it has the tensors {shown(sorted(tensors))}, not {_TENSORS}.")
    n_adapters = (*tensors["weights"].shape, 0)[0]
    expected: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "weights": (tuple(_WEIGHT_DTYPES), (n_adapters, layout.width)),
        "ranks": (("I32",), (n_adapters, layout.n_modules)),
        "ids": (("U8",), (math.prod(tensors["ids"].shape),)),
    }
    for name, (dtypes, shape) in expected.items():
        found = tensors[name]
        if found.dtype not in dtypes or found.shape != shape:
            raise ValueError(
                f"{name} has dtype {found.dtype} and shape {shown(found.shape)}, but "
                f"{' or '.join(dtypes)} and {shown(shape)} are expected."
            )


def _read_header(path: str) -> tuple[Mapping[str, str], dict[str, _Tensor], int]:
    """Read metadata and tensors of a safetensors file, and where its data start."""
    if os.path.isdir(path):
        raise ValueError(
            f"path={path!r} is a folder; name a file that LoRACollection.save has written, or read "
            "the adapters in the folder with sklora.io.read_adapters."
        )
    if os.path.exists(path) and not os.path.isfile(path):
        # Opening a pipe would wait for whoever writes to it, in a library that no signal reaches.
        raise ValueError(
            f"path={path!r} is a device, pipe or socket; name a file that LoRACollection.save has "
            "written."
        )
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            text = file.read(min(size, _MAX_HEADER, os.path.getsize(path)))
        n_quotes = text.count(b'"') - text.count(b'\\"')
        if n_quotes > _MAX_QUOTES:
            raise ValueError(f"its header has {n_quotes} quotes, of at most {_MAX_QUOTES}")
        # The library checks sizes, dtypes, and that the tensors fill the file without a gap.
        with safe_open(path, framework="numpy"):
            pass
        header = parse_json(text, "its header", size, unique=True)
        metadata = header.pop("__metadata__", None) or {}
        tensors = {
            name: _Tensor(entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][0])
            for name, entry in header.items()
        }
    except (SafetensorError, ValueError, TypeError) as error:
        _refuse(path, error)
    return metadata, tensors, 8 + size
