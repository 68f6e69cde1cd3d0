"""Which files a user's paths stand for."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from sklora.io._build import parse_json
from sklora.io._errors import AdapterError, Refusal
from sklora.io.containers import HEAD_BYTES, sniff
from sklora.io.containers._zip import ZipArchive
from sklora.io.containers.torch_zip import PICKLE

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

CONFIG = "adapter_config.json"
_MAX_CONFIG = 2**20


class Found(NamedTuple):
    """One file that may be an adapter.

    Attributes
    ----------
    path : str
        As the user would write it: it is the adapter's id.
    root : str
        The folder that its configuration may not lie outside of.
    in_folder : bool
        Whether it was found in a folder or by a pattern, and may itself not lie outside of `root`;
        a file that the user named may be a link to anywhere.
    """

    path: str
    root: str
    in_folder: bool


def find_files(paths: Paths) -> list[Found]:
    """List the files that paths stand for.

    Parameters
    ----------
    paths : str, path-like, or iterable of them
        A file; a folder, for the adapters in it and below; or a pattern with ``*``, ``?``, ``[]``
        or ``**``. The files of a folder or pattern come in alphabetical order.

    Returns
    -------
    list of Found

    Raises
    ------
    AdapterError
        When a path does not exist, or there is no adapter in it.
    TypeError
        When a path is no path.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    found: list[Found] = []
    for path in paths:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"paths holds {path!r}, which is no path; pass strings or Path objects.")
        found += _find(os.fspath(path))
    return found


def _find(path: str) -> Iterator[Found]:
    if os.path.isdir(path):
        yield from _nonempty(path, _walk(path, path))
    elif os.path.lexists(path) or not glob.has_magic(path):
        # What is wrong with it, if anything, is said where it is opened.
        yield Found(path, os.path.dirname(path) or os.curdir, in_folder=False)
    else:
        root = _root_of_pattern(path)
        matches = sorted(glob.glob(path, recursive=True))
        files = (found for match in matches for found in _matched(match, root))
        yield from _nonempty(path, files)


def _matched(path: str, root: str) -> Iterator[Found]:
    if os.path.isdir(path):
        if _is_inside(path, root):
            yield from _walk(path, root)
    elif _kind(path, root) is not None:
        yield Found(path, root, in_folder=True)


def _nonempty(path: str, found: Iterable[Found]) -> list[Found]:
    files = list(dict.fromkeys(found))
    if not files:
        raise AdapterError(
            path, "there is no adapter in it (safetensors, npz, GGUF or PyTorch); check the path."
        )
    return files


def _root_of_pattern(pattern: str) -> str:
    fixed = pattern
    while glob.has_magic(fixed):
        fixed = os.path.dirname(fixed)
    return fixed or os.curdir


def _walk(folder: str, root: str) -> Iterator[Found]:
    """Give the adapters in a folder and below; hidden ones and linked folders are passed by."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        kinds = {}
        for name in sorted(names):
            path = os.path.join(parent, name)
            kind = None if name.startswith(".") else _kind(path, root)
            if kind is not None:
                kinds[path] = kind
        # Trainers save a pickle beside the safetensors of the same weights, or of their optimizer.
        safe = any(kind != "pickle" for kind in kinds.values())
        for path, kind in kinds.items():
            if kind != "pickle" or not safe:
                yield Found(path, root, in_folder=True)


def _kind(path: str, root: str) -> str | None:
    """Tell what a file in a folder holds, by its first bytes; None if that is no tensors."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return None
        if os.path.islink(path) and not _is_inside(path, root):
            return "link"  # refused, by name, where it is opened
        with open(path, "rb") as file:
            kind = sniff(file.read(HEAD_BYTES))
            if kind == "zip":
                members = ZipArchive(file, os.fstat(file.fileno()).st_size).members
                kind = "pickle" if any(name.endswith(PICKLE) for name in members) else "npz"
    except OSError:
        return None
    except Refusal:
        return "zip"
    return kind


def _is_inside(path: str, root: str) -> bool:
    real, real_root = os.path.realpath(path), os.path.realpath(root)
    return os.path.commonpath([real, real_root]) == real_root


def check_inside(path: str, root: str) -> None:
    """Check that a link does not lead out of the folder that the user named.

    Raises
    ------
    Refusal
        When it does.
    """
    if not _is_inside(path, root):
        raise Refusal(
            f"it is a link to {os.path.realpath(path)}, outside of {root!r}; pass that file itself, "
            "or a folder that holds both."
        )


def read_config(found: Found) -> dict[str, Any] | None:
    """Read ``adapter_config.json`` beside a file: text only, nothing in it is opened or imported.

    Returns
    -------
    dict or None
        None when there is no such file.

    Raises
    ------
    Refusal
        When it is no regular file, links out of the folder, is too large, or no mapping in JSON.
    """
    path = os.path.join(os.path.dirname(found.path), CONFIG)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Refusal(f"{CONFIG} beside it cannot be read: {error.strerror}.") from None
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Refusal(f"{CONFIG} beside it is no file.")
        check_inside(path, found.root)
        text = file.read(_MAX_CONFIG + 1)
    config = parse_json(text, f"{CONFIG} beside it", _MAX_CONFIG)
    if not isinstance(config, dict):
        raise Refusal(f"{CONFIG} beside it is no mapping.")
    return config
