"""NumPy's npz: a zip of npy files, each a short text and the numbers.

The text is a Python dictionary. It is matched with a pattern, so nothing is evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sklora._untrusted import Refusal, shown
from sklora.io._tensors import DTYPES, TensorFile, TensorInfo, check_tensor
from sklora.io.containers._arrays import as_array
from sklora.io.containers._zip import Member, ZipArchive

# For every version of npy, how many bytes tell the length of the text. Version 3 is for structured
# dtypes alone.
_LENGTH_BYTES = {b"\x93NUMPY\x01\x00": 2, b"\x93NUMPY\x02\x00": 4}
_MAGIC_BYTES = 8
# NumPy pads the text so that numbers begin at a multiple of 64, and needs 60 to 200 characters.
_MAX_TEXT = 4_000
# Possessive, so that no text makes it slow.
_TEXT = re.compile(
    rb"\{\s*+'descr':\s*+'([^']*+)',\s*+'fortran_order':\s*+(True|False),"
    rb"\s*+'shape':\s*+\(([\d,\s]*+)\)\s*+,?+\s*+\}\s*+"
)
_SUFFIX = ".npy"
# What `numpy.dtype.isbuiltin` says of the dtypes that other packages define.
_USER_DEFINED = 2


def _stored_dtypes() -> dict[str, tuple[str, np.dtype[Any]]]:
    """From the description of a dtype in an npy file to its name here, in both byte orders."""
    names: dict[str, tuple[str, np.dtype[Any]]] = {}
    for name, dtype in DTYPES.items():
        # NumPy describes those of ml_dtypes as raw bytes, which might be anything.
        if dtype.isbuiltin != _USER_DEFINED:
            for stored in (dtype, dtype.newbyteorder(">")):
                names[stored.str] = name, stored
    return names


_DTYPES: Mapping[str, tuple[str, np.dtype[Any]]] = _stored_dtypes()


class _Entry(NamedTuple):
    """Where an array is, and how it is stored."""

    member: Member
    begin: int
    dtype: np.dtype[Any]
    fortran: bool


class NpzFile(TensorFile):
    """An open npz file; see `TensorFile`."""

    container = "npz"

    def _read_header(self) -> None:
        self._archive = ZipArchive(self._file, self.size)
        self._entries: dict[str, _Entry] = {}
        for member in self._archive.members.values():
            if not member.name.endswith(_SUFFIX):
                raise Refusal(
                    f"it is a zip file that holds {shown(member.name)}, so neither an npz, which "
                    "holds .npy files alone, nor one of PyTorch; unpack it and name the adapter."
                )
            name = member.name.removesuffix(_SUFFIX)
            self.tensors[name], self._entries[name] = self._read_entry(name, member)

    def _read_entry(self, name: str, member: Member) -> tuple[TensorInfo, _Entry]:
        check_tensor(name, ())
        head = self._archive.unpack(member, min(member.size, _MAGIC_BYTES + 4 + _MAX_TEXT))
        n_length = _LENGTH_BYTES.get(bytes(head[:_MAGIC_BYTES]))
        if n_length is None:
            raise Refusal(
                f"array {shown(name)} starts with {shown(bytes(head[:_MAGIC_BYTES]))}, which npy "
                "files of version 1 and 2 do not; save it with numpy.savez."
            )
        begin = _MAGIC_BYTES + n_length
        length = int.from_bytes(head[_MAGIC_BYTES:begin], "little")
        text = bytes(head[begin : begin + length])
        matched = _TEXT.fullmatch(text)
        if len(text) < length or matched is None:
            raise Refusal(
                f"array {shown(name)} has the header {shown(text)} of {length} bytes, which is "
                "not as NumPy writes it; save it with numpy.savez."
            )
        descr, fortran, sizes = (group.decode("latin-1") for group in matched.groups())
        dtype, stored = _find_dtype(name, descr)
        info = TensorInfo(dtype, check_tensor(name, _parse_shape(name, sizes)))
        begin += length
        if member.size - begin != info.nbytes:
            raise Refusal(
                f"array {shown(name)} of {descr} and shape {info.shape} takes {info.nbytes} "
                f"bytes, but there are {member.size - begin}; it is damaged: download it again."
            )
        return info, _Entry(member, begin, stored, fortran == "True")

    def read(self, name: str) -> NDArray[Any]:
        """Read one array; see `TensorFile.read`."""
        info, entry = self.tensors[name], self._entries[name]
        raw = self._archive.unpack(entry.member, entry.member.size)
        if entry.fortran:
            info = info._replace(shape=info.shape[::-1])
        array = as_array(raw, info, entry.begin, dtype=entry.dtype)
        return array.T if entry.fortran else array


def _find_dtype(name: str, descr: str) -> tuple[str, np.dtype[Any]]:
    if descr not in _DTYPES:
        reason = (
            "holds Python objects, which are never read"
            if descr.startswith(("|O", "O"))
            else "is not read"
        )
        raise Refusal(
            f"array {shown(name)} has the dtype {shown(descr)}, which {reason}; save it as "
            "float32, or bfloat16 as safetensors."
        )
    return _DTYPES[descr]


def _parse_shape(name: str, sizes: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in sizes.removesuffix(",").split(",") if sizes.strip())
    except ValueError as error:
        raise Refusal(
            f"array {shown(name)} has the shape ({shown(sizes)}), which is none; save it with "
            "numpy.savez."
        ) from error
