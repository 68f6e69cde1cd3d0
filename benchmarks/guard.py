"""Regression guard: fails when a benchmark's ratio is twice what was recorded.

Runs ``ratios(quick=True)`` of every ``bench_*.py`` here that has it, one process for each, and
compares with recorded.json. A ratio is our time over that of something beside which it was
measured, and less is better. It says much the same on any machine of one make of processor; for
other makes the worst that was recorded counts. Each process has one thread, as threads that wait
for a busy core say nothing of the code. A ratio beyond the limit is measured up to three more
times: other work on the machine only ever makes a ratio worse for a while.
``python benchmarks/guard.py``, and with ``--record`` to write the ratios down.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
RECORDED = FOLDER / "recorded.json"
# So much worse than recorded a ratio may not be.
LIMIT = 2.0
MORE_TIMES = 3

Ratios = Mapping[str, float]
Benchmarks = Mapping[str, Ratios]


class Line(NamedTuple):
    """One ratio of a benchmark, now and as recorded; None where there is none."""

    benchmark: str
    ratio: str
    now: float | None
    recorded: float | None

    @property
    def problem(self) -> str:
        """What is wrong, or nothing."""
        if self.recorded is None:
            return "new: run guard.py --record"
        if self.now is None:
            return "gone: run guard.py --record"
        # Counts may be exactly twice, and a NaN is no number to be within a limit.
        return "" if self.now < LIMIT * self.recorded else f"{LIMIT:g} times the recorded or more"


def make_of_processor() -> str:
    """Who made it, where the system tells; else its architecture."""
    about = Path("/proc/cpuinfo")
    found = re.search(r"^vendor_id\s*:\s*(\S+)", about.read_text() if about.exists() else "", re.M)
    return found[1] if found else platform.machine()


def expected(recorded: Mapping[str, Benchmarks], make: str) -> dict[str, dict[str, float]]:
    """Give every ratio as recorded for this make of processor, or the worst of others."""
    found: dict[str, dict[str, float]] = {}
    for benchmarks in recorded.values():
        for benchmark, ratios in benchmarks.items():
            worst = found.setdefault(benchmark, {})
            for ratio, value in ratios.items():
                worst[ratio] = max(value, worst.get(ratio, value))
    for benchmark, ratios in recorded.get(make, {}).items():
        found[benchmark].update(ratios)
    return found


def with_new(
    recorded: Mapping[str, Benchmarks], make: str, now: Benchmarks
) -> dict[str, Benchmarks]:
    """Put in what was measured, and leave out of other makes what is no longer measured."""
    others = {
        other: {
            benchmark: {ratio: ratios[ratio] for ratio in ratios.keys() & now[benchmark].keys()}
            for benchmark, ratios in benchmarks.items()
            if benchmark in now
        }
        for other, benchmarks in recorded.items()
    }
    return {**others, make: now}


def compare(now: Benchmarks, recorded: Benchmarks) -> list[Line]:
    """Put ratios beside those recorded, benchmark by benchmark."""
    lines = []
    for benchmark in sorted(now.keys() | recorded.keys()):
        ours, theirs = now.get(benchmark, {}), recorded.get(benchmark, {})
        for ratio in sorted(ours.keys() | theirs.keys()):
            lines.append(Line(benchmark, ratio, ours.get(ratio), theirs.get(ratio)))
    return lines


def best_of(first: Ratios, second: Ratios) -> dict[str, float]:
    """Give the better of two measurements of every ratio."""
    return {ratio: min(first[ratio], second[ratio]) for ratio in first.keys() & second.keys()}


def guarded() -> list[str]:
    """Names of the benchmarks that give ratios."""
    return sorted(
        path.stem for path in FOLDER.glob("bench_*.py") if "\ndef ratios(" in path.read_text()
    )


def measure(benchmark: str) -> dict[str, float]:
    """Give the ratios of one benchmark, from a process of its own."""
    command = [sys.executable, __file__, "--measure", benchmark]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def ratios_of(benchmark: str) -> dict[str, float]:
    """What that process does."""
    names = runpy.run_path(str(FOLDER / f"{benchmark}.py"), run_name=benchmark)
    found: dict[str, float] = names["ratios"](quick=True)
    return found


def report(lines: list[Line]) -> bool:
    """Print a table, and tell whether all is well."""
    print(f"{'ratio':<84}{'now':>8}{'recorded':>10}")
    for line in lines:
        cells = ["" if value is None else f"{value:.3f}" for value in (line.now, line.recorded)]
        name = f"{line.benchmark}: {line.ratio}"
        print(f"{name:<84}{cells[0]:>8}{cells[1]:>10}  {line.problem}")
    return not any(line.problem for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true", help="write the ratios down")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(ratios_of(args.measure)))
        return 0
    make = make_of_processor()
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    now = {benchmark: measure(benchmark) for benchmark in guarded()}
    if args.record:
        # The better of two, by which a disturbance does not loosen the guard.
        now = {benchmark: best_of(found, measure(benchmark)) for benchmark, found in now.items()}
        recorded = with_new(recorded, make, now)
        RECORDED.write_text(json.dumps(recorded, indent=2, sort_keys=True) + "\n")
    recorded = expected(recorded, make)
    for _ in range(MORE_TIMES):
        for benchmark in {line.benchmark for line in compare(now, recorded) if line.problem}:
            if benchmark in now:
                now[benchmark] = best_of(now[benchmark], measure(benchmark))
    return 0 if report(compare(now, recorded)) else 1


if __name__ == "__main__":
    sys.exit(main())
