"""What commands say: results on stdout, messages and progress on stderr, one line for an error."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from typing import TextIO

from sklora._progress import write

OK, FAILED, USAGE = 0, 1, 2

# The library's remedies name arguments; users of the command line have options.
_OPTIONS = {
    "allow_torch_zip=True": "--allow-torch-zip",
    "keys=('...{module}...', ...)": "--keys '...{module}...' '...{module}...'",
    "lokr='kronecker'": "--lokr kronecker",
    "names='raw'": "--names raw",
    "on_base_model='ignore'": "--allow-other-base-model",
    "on_extra='ignore'": "--allow-other-modules",
    "on_missing='zero'": "--allow-other-modules",
    "pass scale=,": "pass --scale,",
    "use LoRACollection.open": "sklora fit and sklora compare take it",
}


class CommandError(Exception):
    """What ends a command: a message of one line, and the exit code.

    Parameters
    ----------
    message : str
    code : int, default=USAGE
    """

    def __init__(self, message: str, code: int = USAGE) -> None:
        self.code = code
        super().__init__(message)


def printable(text: str) -> str:
    """Escape what could move a terminal's cursor or hide: controls, line breaks, text direction."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def with_options(message: str) -> str:
    """Name the options where a message of the library names arguments."""
    for argument, option in _OPTIONS.items():
        message = message.replace(argument, option)
    return message


def result(text: str, end: str = "\n") -> None:
    """Write to stdout, past any progress bar."""
    _write(sys.stdout, f"{text}{end}")


def say(message: str) -> None:
    """Write one line to stderr, past any progress bar."""
    _write(sys.stderr, f"sklora: {printable(with_options(message))}\n")


def _write(stream: TextIO, text: str) -> None:
    # Names of files may hold what the stream's encoding has no place for.
    encoding = stream.encoding or "utf-8"
    encodable = text.encode(encoding, "backslashreplace").decode(encoding)
    write(encodable, stream, end="")


def table(rows: Sequence[Sequence[str]], align: str) -> None:
    """Write rows as columns that are as wide as they need to be.

    Parameters
    ----------
    rows : sequence of rows
        The first holds the headings. Everything in them is escaped.
    align : str
        "<" or ">" for every column.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        spaces = [" " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True)]
        padded = [
            cell + space if side == "<" else space + cell
            for cell, space, side in zip(row, spaces, align, strict=True)
        ]
        result("  ".join(padded).rstrip())


def _width(text: str) -> int:
    """Count the places that a terminal gives a text: two for a Chinese letter."""
    shown = (letter for letter in text if not unicodedata.combining(letter))
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in shown)
