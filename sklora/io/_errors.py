"""The one error that a bad adapter file gives, and how messages count."""

from __future__ import annotations

import os
from typing import Self


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
        # The name of a file may be an attack on the terminal or log that shows it.
        name = self.path if self.path.isprintable() else ascii(self.path)
        super().__init__(f"{name}: {reason}")

    def __reduce__(self) -> tuple[type[Self], tuple[str, str]]:
        return type(self), (self.path, self.reason)
