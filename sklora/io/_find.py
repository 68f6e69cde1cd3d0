"""Which files a user's paths stand for."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from typing import Any, NamedTuple

from sklora._untrusted import Refusal, parse_json, printable
from sklora.io._errors import AdapterError
from sklora.io.containers import HEAD_BYTES, MODEL, holds_pickle, open_regular, sniff
from sklora.io.containers._zip import ZipArchive

Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

CONFIG = "adapter_config.json"
_MAX_CONFIG = 2**20
# What cannot be looked into is taken for what its name says.
_SUFFIXES = (".safetensors", ".npz", ".gguf", ".bin", ".pt", ".pth", ".ckpt")
# What PEFT and diffusers take by these names, whatever lies beside it.
_TAKEN_BY_NAME = ("adapter_model.bin", "pytorch_lora_weights.bin")
# Names of tensor files alone: what does not look like one is damaged, which is to be said.
_NOTHING_ELSE = (".safetensors", ".gguf")


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
        When there is no adapter in a folder, or nothing matches a pattern. A file that does not
        exist is listed: what is wrong with a file is said where it is opened.
    TypeError
        When a path is no path.
    """
    found = []
    for each in find_each(paths):
        if isinstance(each, AdapterError):
            raise each
        found.append(each)
    return found


def find_each(paths: Paths) -> Iterator[Found | AdapterError]:
    """List files as `find_files` does, with an error in place of a path that stands for none."""
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    for given in _iterable(paths):
        path = os.fspath(given) if isinstance(given, os.PathLike) else given
        if not isinstance(path, str):
            raise TypeError(
                f"paths holds {given!r}, which is no path; pass strings or Path objects."
            )
        try:
            # Of NumPy's strings, which are bytes to os.scandir, it would give names in bytes.
            yield from _find(str(path))
        except AdapterError as error:
            yield error


def _iterable(paths: object) -> Iterable[object]:
    if isinstance(paths, bytes) or not isinstance(paths, Iterable):
        raise TypeError(f"paths is {paths!r}; pass a string, a Path object, or a list of them.")
    return paths


def _find(path: str) -> list[Found]:
    if os.path.isdir(path):
        files = list(_adapters(_walk(path), path))
    elif os.path.lexists(path) or not glob.has_magic(path):
        return [Found(path, os.path.dirname(path) or os.curdir, in_folder=False)]
    else:
        root, parts = _split_pattern(path)
        files = list(_adapters(_matches(root, parts), root or os.curdir))
    if not files:
        raise AdapterError(
            path, "there is no adapter in it (safetensors, npz, GGUF or PyTorch); check the path."
        )
    return files


def _split_pattern(pattern: str) -> tuple[str, list[str]]:
    """Give the folder that a pattern starts from, and the components that follow."""
    root = pattern
    parts: list[str] = []
    while glob.has_magic(root):
        root, part = os.path.split(root)
        parts.insert(0, part)
    return root, parts


def _matches(root: str, parts: list[str]) -> Iterator[str]:
    """Give the files that match a pattern, and those in folders that do."""
    for path in _expanded(root, parts):
        if not os.path.isdir(path):
            yield path
        elif not os.path.islink(path.rstrip(os.sep)):
            yield from _walk(path)


def _expanded(folder: str, parts: list[str]) -> Iterator[str]:
    # As in `glob`, but that ** follows no links: two that lead back to their folder would give
    # 2^40 paths.
    if not parts:
        yield folder
        return
    part, *rest = parts
    if part == "**":
        for inner, _ in _folders(folder) if rest else [(folder, None)]:
            yield from _expanded(inner, rest)
    elif glob.has_magic(part):
        for entry in _listed(folder) or ():
            if fnmatch(entry.name, part) and (part[0] == "." or not _is_hidden(entry)):
                yield from _expanded(os.path.join(folder, entry.name), rest)
    elif os.path.lexists(os.path.join(folder, part)):
        yield from _expanded(os.path.join(folder, part), rest)


def _listed(folder: str) -> list[os.DirEntry[str]] | None:
    """List a folder by name; None when it cannot be."""
    try:
        with os.scandir(folder or os.curdir) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (OSError, ValueError):
        return None


def _is_hidden(entry: os.DirEntry[str]) -> bool:
    return entry.name.startswith(".")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) and not _is_hidden(entry)


def _folders(top: str) -> Iterator[tuple[str, list[os.DirEntry[str]] | None]]:
    """List a folder and all below; hidden ones and links are passed by."""
    left = [top]
    while left:
        folder = left.pop()
        entries = _listed(folder)
        yield folder, entries
        inner = [entry.name for entry in entries or () if _is_folder(entry)]
        left += (os.path.join(folder, name) for name in reversed(inner))


def _walk(top: str) -> Iterator[str]:
    """Give the files in a folder and below, and those folders that cannot be listed."""
    for folder, entries in _folders(top):
        if entries is None:
            yield folder
            continue
        for entry in entries:
            if not _is_hidden(entry) and not _is_folder(entry):
                yield os.path.join(folder, entry.name)


def _adapters(paths: Iterable[str], root: str) -> Iterator[Found]:
    """Pick those files that hold tensors, but no adapter twice."""
    kinds = {path: _kind(path, root) for path in paths}
    kinds = {path: kind for path, kind in kinds.items() if kind is not None}
    # Trainers save a pickle beside the safetensors of the same weights, or of their optimizer.
    safe = {os.path.dirname(path) for path, kind in kinds.items() if kind != "pickle"}
    # The cache of Hugging Face has links by the names of files, and what they lead to elsewhere.
    linked = {os.path.realpath(path) for path in kinds if os.path.islink(path)}
    for path, kind in kinds.items():
        is_twin = kind == "pickle" and os.path.dirname(path) in safe and not _is_taken(path)
        if linked and not os.path.islink(path):
            is_twin = is_twin or os.path.realpath(path) in linked
        if not is_twin:
            yield Found(path, root, in_folder=True)


def _is_taken(path: str) -> bool:
    """Tell whether loaders take a pickle by its name, as they do without safetensors of that name.

    Another file beside it would be looked at in its place.
    """
    stem, _ = os.path.splitext(path)
    return os.path.basename(path) in _TAKEN_BY_NAME and not os.path.exists(f"{stem}.safetensors")


def _kind(path: str, root: str) -> str | None:
    """Tell what a file in a folder holds, by its first bytes; None if that is no tensors."""
    by_name = "unknown" if path.endswith(_SUFFIXES) else None
    try:
        is_link, mode = os.path.islink(path), os.stat(path).st_mode
        if stat.S_ISDIR(mode) and not is_link:
            return "unknown"  # it cannot be listed, which is said where it is opened
        if not stat.S_ISREG(mode):  # a linked folder, or what is refused where it is opened
            return None if stat.S_ISDIR(mode) else by_name
        if is_link and not _is_inside(path, root):
            return by_name
        file, size = open_regular(path)
    except (OSError, Refusal):
        return by_name
    with file:
        try:
            kind = sniff(file.read(HEAD_BYTES))
            if kind == "zip":
                kind = _kind_of_zip(ZipArchive(file, size))
        except (OSError, Refusal):
            return by_name
    if kind is None and (path.endswith(_NOTHING_ELSE) or _is_taken(path)):
        return by_name
    return kind


def _kind_of_zip(archive: ZipArchive) -> str | None:
    if MODEL in archive.members:
        return None  # perhaps beside the zoo that it was fitted on
    if holds_pickle(archive):
        return "pickle"
    return "npz" if any(name.endswith(".npy") for name in archive.members) else None


def _is_inside(path: str, root: str) -> bool:
    real, real_root = os.path.realpath(path), os.path.realpath(root)
    return real == real_root or real.startswith(os.path.join(real_root, ""))


def check_inside(path: str, root: str) -> None:
    """Check that a link does not lead out of the folder that the user named.

    Raises
    ------
    Refusal
        When it does.
    """
    if not _is_inside(path, root):
        raise Refusal(
            f"{printable(os.path.basename(path))} is a link to {os.path.realpath(path)!r}, "
            f"outside of {root!r}; pass a folder that holds both, or a copy."
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
    if not os.path.lexists(path):
        return None
    check_inside(path, found.root)
    try:
        file, _ = open_regular(path)
    except Refusal as error:
        raise Refusal(f"of {CONFIG} beside it: {error}") from None
    with file:
        text = file.read(_MAX_CONFIG + 1)
    config = parse_json(text, f"{CONFIG} beside it", _MAX_CONFIG)
    if not isinstance(config, dict):
        raise Refusal(f"{CONFIG} beside it is no mapping.")
    return config
