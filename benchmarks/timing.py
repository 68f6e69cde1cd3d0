"""What benchmarks share: the clock, and how ratios are printed."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable


def seconds(function: Callable[..., object], *args: object, **options: object) -> float:
    """Time one call."""
    start = time.perf_counter()
    function(*args, **options)
    return time.perf_counter() - start


def print_ratios(about: str, ratios: Callable[[bool], dict[str, float]]) -> None:
    """Print what a benchmark finds, at a small size if the command line says ``--quick``."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true")
    for name, ratio in ratios(parser.parse_args().quick).items():
        print(f"{name:<60}{ratio:10.2g}" if ratio < 0.1 else f"{name:<60}{ratio:10.2f}")
