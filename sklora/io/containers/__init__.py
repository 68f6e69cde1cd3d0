"""Files of tensors from anywhere: what kind they are is seen from their bytes, not their names."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

from sklora._untrusted import Refusal, shown
from sklora.io._tensors import TensorFile
from sklora.io.containers._zip import ZipArchive
from sklora.io.containers.gguf import MAGIC as GGUF_MAGIC
from sklora.io.containers.gguf import GGUFFile
from sklora.io.containers.npz import NpzFile
from sklora.io.containers.safetensors import LENGTH_BYTES, SafetensorsFile
from sklora.io.containers.torch_zip import PICKLE, TorchZipFile

__all__ = ["HEAD_BYTES", "MODEL", "holds_pickle", "open_regular", "open_tensor_file", "sniff"]

# What every zip file of skops has, and no other.
MODEL = "schema.json"
# How much of a file `sniff` needs.
HEAD_BYTES = 64
_LFS = b"version https://git-lfs.github.com/spec/"
_PICKLE_STARTS = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))
# No header is longer, and the bytes of a text, taken as a length, always are.
_SAFETENSORS_LENGTH = 2**40
# A FIFO that nobody writes to must not block. Windows has neither flag, and opens files as text.
_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)

_REFUSED = {
    "lfs": "it is a pointer of Git LFS, not the file itself; fetch that with git lfs pull.",
    "pickle": (
        "it is a pickle (of PyTorch before 1.6, or of other data), which can run code and is never "
        "read; ask for a safetensors file."
    ),
}


def sniff(head: bytes) -> str | None:
    """Tell from its first bytes what a file may be.

    Parameters
    ----------
    head : bytes
        The first `HEAD_BYTES` bytes, or all if there are fewer.

    Returns
    -------
    str or None
        "safetensors", "zip", "gguf", "pickle", "lfs" (a pointer of Git LFS), or None when it can be
        no adapter.
    """
    if head.startswith(_LFS):
        return "lfs"
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(GGUF_MAGIC):
        return "gguf"
    if head.startswith(_PICKLE_STARTS):
        # The same bytes may be the length of a header that is followed by a brace.
        return "safetensors" if _starts_header(head) else "pickle"
    return "safetensors" if _starts_header(head) else None


def _starts_header(head: bytes) -> bool:
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    return head[LENGTH_BYTES : LENGTH_BYTES + 1] == b"{" and length < _SAFETENSORS_LENGTH


def open_tensor_file(path: str, *, allow_torch_zip: bool) -> TensorFile:
    """Open a file of tensors, whose origin need not be trusted.

    Parameters
    ----------
    path : str
        A regular file.
    allow_torch_zip : bool
        Whether files of `torch.save` are read. Their pickle is interpreted, never executed.

    Returns
    -------
    TensorFile
        To be closed, with a `with` statement.

    Raises
    ------
    Refusal
        When the file cannot be opened, or its header is not sound.
    """
    file, size = open_regular(path)
    try:
        return _open(file, size, allow_torch_zip)
    except OSError as error:
        file.close()
        raise Refusal(f"it cannot be read: {error.strerror or error}.") from error
    except BaseException:
        file.close()
        raise


def open_regular(path: str) -> tuple[BinaryIO, int]:
    """Open a file that is neither folder, device nor pipe.

    Parameters
    ----------
    path : str

    Returns
    -------
    file : binary file
    size : int
        In bytes.

    Raises
    ------
    Refusal
        When there is no such file, or it cannot be opened.
    """
    try:
        descriptor = os.open(path, _FLAGS)
    except OSError as error:
        raise Refusal(f"it cannot be opened: {error.strerror or error}.") from error
    except ValueError as error:
        raise Refusal(f"it is no path: {error}.") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            kind = "folder" if stat.S_ISDIR(status.st_mode) else "device, pipe or socket"
            raise Refusal(f"it is a {kind}; name a file.")
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb"), status.st_size


def _open(file: BinaryIO, size: int, allow_torch_zip: bool) -> TensorFile:
    head = file.read(HEAD_BYTES)
    kind = sniff(head)
    if kind == "safetensors":
        return SafetensorsFile(file, size)
    if kind == "gguf":
        return GGUFFile(file, size)
    if kind == "zip":
        return _open_zip(file, size, allow_torch_zip)
    raise Refusal(_REFUSED[kind] if kind else _describe(head))


def _open_zip(file: BinaryIO, size: int, allow_torch_zip: bool) -> TensorFile:
    archive = ZipArchive(file, size)
    if MODEL in archive.members:
        raise Refusal("it is a model that skops stored, not an adapter; name adapters.")
    if not holds_pickle(archive):
        return NpzFile(file, size)
    if not allow_torch_zip:
        raise Refusal(
            "it is a PyTorch pickle (.bin, .pt, .ckpt), which is not opened by default; ask for a "
            "safetensors file, or pass allow_torch_zip=True, which reads tensors alone and runs no "
            "code from it."
        )
    return TorchZipFile(file, size)


def holds_pickle(archive: ZipArchive) -> bool:
    """Tell whether an archive is one that PyTorch wrote."""
    return any(name.endswith(PICKLE) for name in archive.members)


def _describe(head: bytes) -> str:
    """Say what a file is that holds no tensors."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head:
        return "it is empty; download it again."
    if text.startswith(b"<"):
        return (
            "it is a web page: an error page was saved instead of the file; download it again, "
            "with an account if it needs one."
        )
    if text.startswith((b"{", b"[")):
        return "it is JSON text, such as a configuration, not tensors; name the file of tensors."
    return (
        f"it starts with {shown(head[:16])}, as no safetensors, npz, GGUF or PyTorch file does; "
        "name an adapter, or download it again."
    )
