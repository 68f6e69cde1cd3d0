"""Writing files and folders whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EDQUOT, EEXIST, EFBIG, ENOSPC
from pathlib import PurePath
from typing import BinaryIO

_FULL = (ENOSPC, EDQUOT, EFBIG)


def check_place(path: str | os.PathLike[str], named: str) -> None:
    """Check that a file can be written, before the work that makes it.

    Parameters
    ----------
    path : str or path-like
    named : str
        What messages call it.

    Raises
    ------
    ValueError
        When it is a folder.
    OSError
        When it is a device or pipe, there is no folder for it or no permission, or its name is too
        long.
    """
    path = os.fspath(path)
    folder = os.path.dirname(os.path.realpath(path))
    if os.path.isdir(path) or not os.path.basename(path):
        raise ValueError(f"{named} is a folder; name a file in it.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise FileExistsError(f"{named} is no regular file, and would be replaced; name another.")
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{named}: there is no folder {folder!r}; make it first.")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{named}: there is no permission to write to {folder!r}.")
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass  # as it should be
    except OSError as error:
        raise OSError(f"{named}: {error.strerror}; name another.") from None


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file for writing that gets its name when it is complete.

    Until then, and after any exception, a file of that name is as it was before.

    Parameters
    ----------
    path : str or path-like

    Yields
    ------
    binary file

    Raises
    ------
    OSError
        When the file cannot be written, or is a folder, device or pipe.
    """
    # Renaming would put a file in the place of a device, such as the null device.
    if os.path.exists(path) and not os.path.isfile(path):
        raise FileExistsError(EEXIST, "it is no regular file", os.fspath(path))
    temporary = unfinished(path)
    try:
        file = open(temporary, "xb")  # noqa: SIM115 (closed below, before it is renamed)
    except OSError as error:
        error.filename = os.fspath(path)  # what was asked for
        raise
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.remove(temporary)
        # A write that fails says neither which file nor, so, which disk is full.
        if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextmanager
def complete_folder(path: str | os.PathLike[str]) -> Iterator[str]:
    """Give a folder to write into; a new one gets its name when all is written.

    Parameters
    ----------
    path : str or path-like
        A folder, or where one is to be.

    Yields
    ------
    str
        Where to write: `path` itself if it is there already.

    Raises
    ------
    OSError
        When the folder cannot be made.
    """
    if os.path.isdir(path):
        yield os.fspath(path)
        return
    temporary = unfinished(path)
    os.makedirs(temporary)
    try:
        yield temporary
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def unfinished(path: str | os.PathLike[str]) -> str:
    """Give the name of something until it is complete.

    Beside the final place, because renaming works within one disk alone; hidden, so that what a
    killed process leaves is never taken for an adapter of its folder. Most disks allow 255 bytes.
    """
    folder, name = os.path.split(PurePath(path))
    start = os.fsencode(name)[:200].decode(errors="ignore")
    return os.path.join(folder, f".{start}.{secrets.token_hex(8)}.tmp")
