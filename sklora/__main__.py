"""The command line: ``python -m sklora``."""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from io import StringIO
from typing import NoReturn

from sklora.cli._output import FAILED, CommandError, say
from sklora.cli._parser import build_parser
from sklora.estimators import TrainingInterruptedWarning

# What a shell reports of a command that a signal ended: 128 and its number.
_INTERRUPTED, _BROKEN_PIPE, _TERMINATED = 130, 141, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str or None, default=None
        The arguments; those of the process by default.

    Returns
    -------
    int
        The exit code: 0 when all is well, 1 when some or all of the work failed, 2 when the command
        was called wrongly, 130, 141 or 143 when it was ended from outside.
    """
    # Whoever closed a stream, for which Python has None, wants nothing of it.
    sys.stdout, sys.stderr = sys.stdout or StringIO(), sys.stderr or StringIO()
    try:
        with _ending_workers():
            code = _run(argv)
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except BrokenPipeError:
        code = _BROKEN_PIPE
    except _Terminated:
        code = _TERMINATED
    except OSError:  # of standard error, so that nobody can be told
        code = FAILED
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        _forget_streams()
    return code


class _Terminated(BaseException):
    """SIGTERM, as an exception."""


@contextmanager
def _ending_workers() -> Iterator[None]:
    """Have SIGTERM end the command by an exception, at which joblib ends its workers, too."""

    def end(*_: object) -> NoReturn:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(argv: Sequence[str] | None) -> int:
    try:
        code = _command(argv)
        sys.stdout.flush()
        return code
    except TrainingInterruptedWarning:
        raise KeyboardInterrupt from None
    except CommandError as error:
        say(f"error: {error}")
        return error.code
    except BrokenPipeError:
        raise
    except (ValueError, OSError, MemoryError, RuntimeError) as error:  # torch has but the last
        say(f"error: {str(error) or type(error).__name__}")
        return FAILED


def _command(argv: Sequence[str] | None) -> int:
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    with warnings.catch_warnings():
        warnings.showwarning = _say_warning
        # What was trained for too short a time is neither stored nor compared.
        warnings.simplefilter("error", TrainingInterruptedWarning)
        code: int = import_module(f"sklora.cli._{args.command}").run(args)
        return code


def _say_warning(message: Warning | str, *_: object, **__: object) -> None:
    say(f"warning: {message}")


def _forget_streams() -> None:
    """Keep Python from flushing, on its way out, to a reader that is gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())


if __name__ == "__main__":
    sys.exit(main())
