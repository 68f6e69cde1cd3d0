"""PyTorch's zip files: a pickle that says which tensors there are, and a file for every storage.

The pickle is not executed: `sklora.io.containers._pickle` interprets it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sklora._untrusted import Refusal, shown
from sklora.io._tensors import (
    DTYPES,
    MAX_NAME,
    TensorFile,
    TensorInfo,
    check_count,
    check_tensor,
)
from sklora.io.containers._arrays import as_array
from sklora.io.containers._pickle import Storage, Tensor, interpret
from sklora.io.containers._zip import Member, ZipArchive, check_expansion

PICKLE = "/data.pkl"
# 200,000 tensors need some 28 MB; the largest adapter of the key listings 1.5 MB.
MAX_PICKLE = 16 * 2**20
# A long name of a dictionary is part of every name in it.
MAX_NAMES = 2 * MAX_PICKLE


class _View(NamedTuple):
    """Which part of a storage a tensor is: numbers `begin` to `end`, with strides in numbers."""

    member: Member
    begin: int
    end: int
    strides: tuple[int, ...]


class TorchZipFile(TensorFile):
    """An open zip file that PyTorch wrote: a dictionary or list of tensors; see `TensorFile`.

    The names of tensors in dictionaries and lists within another are joined by dots; numbers, texts
    and tuples are passed over.
    """

    container = "torch-zip"

    def _read_header(self) -> None:
        self._archive = ZipArchive(self._file, self.size)
        self._members = _in_lower_case(self._archive.members)
        member = self._find_pickle()
        self._root = _lower(member.name).removesuffix(PICKLE)
        self._check_byte_order()
        found = flatten(interpret(self._archive.stored(member, 0, member.size)))
        check_count(len(found))
        self._views: dict[str, _View] = {}
        n_bytes = 0
        for name, tensor in found.items():
            info, view = self._checked(name, tensor)
            self.tensors[name], self._views[name] = info, view
            n_bytes += (view.end - view.begin) * DTYPES[info.dtype].itemsize
        # Tensors may share a storage, so that together they are larger than the file.
        check_expansion(n_bytes, self.size)

    def _find_pickle(self) -> Member:
        found = [member for name, member in self._members.items() if name.endswith(PICKLE)]
        if len(found) != 1:
            raise Refusal(f"it holds {len(found)} files data.pkl; those of PyTorch hold one.")
        if found[0].size > MAX_PICKLE:
            raise Refusal(f"its data.pkl has {found[0].size} bytes, of at most {MAX_PICKLE}.")
        return found[0]

    def _check_byte_order(self) -> None:
        member = self._members.get(f"{self._root}/byteorder")
        if member is not None:
            order = self._archive.stored(member, 0, min(member.size, 16))
            if order != b"little":
                raise Refusal(
                    f"its byte order is {shown(order)}, and only b'little' is read; save it on a "
                    "little-endian machine."
                )

    def _checked(self, name: str, tensor: Tensor) -> tuple[TensorInfo, _View]:
        storage = tensor.storage
        info = TensorInfo(storage.dtype, check_tensor(name, tensor.shape))
        member = self._find_storage(name, storage)
        strides, offset = tensor.strides, tensor.offset
        sound = type(offset) is int and offset >= 0 and all(stride >= 0 for stride in strides)
        if not sound or len(strides) != len(info.shape):
            raise Refusal(
                f"tensor {shown(name)} of shape {info.shape} has the offset "
                f"{shown(offset)} and strides {shown(strides)}; these are integers from "
                "0, one stride for each size."
            )
        # NumPy multiplies the stride of a size of 1 too, where PyTorch may have written anything.
        strides = tuple(
            stride if size > 1 else 0 for size, stride in zip(info.shape, strides, strict=True)
        )
        if info.size == 0:
            return info, _View(member, 0, 0, tuple(0 for _ in strides))
        reach = sum((size - 1) * s for size, s in zip(info.shape, strides, strict=True)) + 1
        end = offset + reach
        repeats = any(size > 1 and s == 0 for size, s in zip(info.shape, strides, strict=True))
        if end > storage.numel or repeats or info.size > reach:
            raise Refusal(
                f"tensor {shown(name)} of shape {info.shape}, offset {offset} and strides "
                f"{strides} does not fit in its storage of {storage.numel} numbers; save a "
                "contiguous copy of it."
            )
        return info, _View(member, offset, end, strides)

    def _find_storage(self, name: str, storage: Storage) -> Member:
        member = self._members.get(f"{self._root}/data/{storage.key}")
        if member is None:
            raise Refusal(
                f"tensor {shown(name)} is in data/{shown(storage.key)}, which the file lacks; it "
                "is damaged: download it again."
            )
        n_bytes = storage.numel * DTYPES[storage.dtype].itemsize
        if member.size != n_bytes:
            raise Refusal(
                f"tensor {shown(name)} is in {shown(member.name)}, said to hold {storage.numel} "
                f"numbers {storage.dtype} in {n_bytes} bytes, but there are {member.size}; it is "
                "damaged: download it again."
            )
        self._archive.stored(member, 0, 0)
        return member

    def read(self, name: str) -> NDArray[Any]:
        """Read one tensor, in C order; see `TensorFile.read`."""
        info, view = self.tensors[name], self._views[name]
        itemsize = DTYPES[info.dtype].itemsize
        n_bytes = (view.end - view.begin) * itemsize
        raw = self._archive.stored(view.member, view.begin * itemsize, n_bytes)
        strides = tuple(stride * itemsize for stride in view.strides)
        return np.asarray(as_array(raw, info, strides=strides), order="C")


def _lower(name: str) -> str:
    """Give a name as PyTorch compares it: with the letters A to Z in lower case."""
    return name.encode().lower().decode()


def _in_lower_case(members: Mapping[str, Member]) -> dict[str, Member]:
    """Give members as PyTorch finds them: whatever the case of their names."""
    lower: dict[str, Member] = {}
    for name, member in members.items():
        known = lower.setdefault(_lower(name), member)
        if known is not member:
            raise Refusal(
                f"it holds {shown(known.name)} and {shown(name)}, which PyTorch does not tell "
                "apart; save it again with torch.save."
            )
    return lower


def flatten(top: object) -> dict[str, Tensor]:
    """Name the tensors in dictionaries and lists.

    Parameters
    ----------
    top : object
        A dict or list from `interpret`.

    Returns
    -------
    dict of str to Tensor

    Raises
    ------
    Refusal
        When it is neither, or a container occurs twice: names could then be endless.
    """
    if not isinstance(top, dict | list):
        raise Refusal(
            f"its pickle holds one {type(top).__name__}, not a dictionary or list of tensors; "
            "save a state dict."
        )
    found: dict[str, Tensor] = {}
    seen = {id(top)}
    n_characters = 0
    # The last is taken first, so children are put there in reverse.
    left: list[tuple[str, object]] = [("", top)]
    while left:
        prefix, value = left.pop()
        if isinstance(value, Tensor):
            if prefix in found:
                raise Refusal(f"it holds two tensors {shown(prefix)}; give them other names.")
            found[prefix] = value
            continue
        if not isinstance(value, dict | list):
            continue
        children = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in reversed(list(children)):
            if isinstance(child, dict | list):
                if id(child) in seen:
                    raise Refusal("its pickle holds one container twice; save a plain state dict.")
                seen.add(id(child))
            if isinstance(child, dict | list | Tensor):
                name = f"{prefix}.{key}" if value is not top else str(key)
                if len(name) > MAX_NAME:
                    raise Refusal(
                        f"the name {shown(name)} is longer than {MAX_NAME}; give it another."
                    )
                n_characters += len(name)
                left.append((name, child))
        if n_characters > MAX_NAMES:
            raise Refusal(f"the names of its tensors take more than {MAX_NAMES} characters.")
        check_count(len(found) + len(left))
    return found
