"""How much longer than scikit-learn and torch themselves does sklora take to import?

Runs ``import sklearn, torch`` and ``import sklora`` in fresh interpreters, in turn, and prints the
ratios of their shortest and of their median times. ``python benchmarks/bench_import.py``
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

import numpy as np

THEIRS, OURS = "import sklearn, torch", "import sklora"


def seconds(statement: str) -> float:
    # Compiled modules have to be kept, as they are where sklora is installed.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True, env=environment)
    return time.perf_counter() - start


def measure(repeats: int) -> np.ndarray:
    """Give seconds ``(repeats, 2)`` of theirs and ours."""
    for statement in (THEIRS, OURS):
        seconds(statement)
    return np.array([[seconds(THEIRS), seconds(OURS)] for _ in range(repeats)])


def ratios(quick: bool = False) -> dict[str, float]:
    theirs, ours = measure(2 if quick else 15).min(axis=0)
    return {f"{OURS} / {THEIRS}": ours / theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    times = measure(parser.parse_args().repeats)
    print(f"{'':<8}{THEIRS:>24}{OURS:>16}{'ratio':>8}")
    for name, (theirs, ours) in (
        ("shortest", times.min(axis=0)),
        ("median", np.median(times, axis=0)),
    ):
        print(f"{name:<8}{theirs:22.3f} s{ours:14.3f} s{ours / theirs:8.3f}")


if __name__ == "__main__":
    main()
