"""The one error that a bad adapter file gives."""

from __future__ import annotations

import os
import reprlib
from typing import Self


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


class Refusal(ValueError):
    """Why something is refused, from code that does not know the file's name.

    Whoever opened the file turns it into an `AdapterError`.
    """


def shown(value: object, length: int = 80) -> str:
    """Give a value from a file as it may stand in a message: escaped, and short."""
    if isinstance(value, (str, bytes)):
        text = ascii(value[: length + 1])
    else:
        # Abbreviates what is long or nested deeply before it is written out.
        text = reprlib.repr(value).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= length else f"{text[: length - 3]}..."
