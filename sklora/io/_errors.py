"""The one error that a bad adapter file gives, and how messages count."""

from __future__ import annotations

import os
from typing import Self


def printable(name: str) -> str:
    """Give the name of a file as it may stand in a message: it may attack a terminal or log."""
    return name if name.isprintable() else ascii(name)


def counted(number: int, noun: str) -> str:
    """Give a number with its noun: 1 tensor, 2 tensors."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class AdapterError(ValueError):
    """A file that cannot be read as a LoRA adapter, and why.

    Parameters
    ----------
    path : str
        The file.
    reason : str
        What is wrong, and what to do about it.

    Attributes
    ----------
    path : str
    reason : str

    Examples
    --------
    >>> from sklora.io import AdapterError
    >>> raise AdapterError("uploads/a.safetensors", "it is empty; download it again.")
    Traceback (most recent call last):
    sklora.io._errors.AdapterError: uploads/a.safetensors: it is empty; download it again.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        self.path = os.fspath(path)
        self.reason = reason
        super().__init__(f"{printable(self.path)}: {reason}")

    def __reduce__(self) -> tuple[type[Self], tuple[str, str]]:
        return type(self), (self.path, self.reason)
