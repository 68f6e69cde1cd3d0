"""The one error that a bad adapter file gives."""

from __future__ import annotations

import os
from typing import Self

from sklora._untrusted import printable


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
