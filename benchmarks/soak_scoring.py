"""Does a service that scores adapter files one by one grow in memory?

Writes adapters of the bundled zoo as files, fits five architectures, and then reads one file and
predicts with each, many times over. Prints the resident memory and the open files at intervals, and
what was gained after the first tenth, the warm-up. Exits with 1 where memory grew by more than
``BOUND_MIB`` or files stayed open. Linux only.

    python benchmarks/soak_scoring.py
    python benchmarks/soak_scoring.py --rounds 300
"""

import argparse
import itertools
import os
import sys
import tempfile
import time
from pathlib import Path

from sklora import ARCHITECTURES, make_architecture
from sklora.datasets import load_digits_loras
from sklora.io import read_adapters, write_adapter

# An object of 1 KiB left behind by each of 9,000 rounds would be more.
BOUND_MIB = 8.0
N_FILES = 200


def resident_mib():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files():
    return len(os.listdir("/proc/self/fd"))


def write_zoo(folder, n_files):
    X, y = load_digits_loras(return_X_y=True)
    for row in range(n_files):
        write_adapter(Path(folder) / f"{row:04}", X[row])
    paths = [str(Path(folder) / f"{row:04}") for row in range(n_files)]
    return paths, read_adapters(paths), y[:n_files]


def fit_all(X, y):
    models = {}
    for name in ARCHITECTURES:
        model = make_architecture(name, device="cpu", random_state=0)
        models[name] = model.set_params(model__max_epochs=2).fit(X, y)
    return models


def soak(models, paths, layout, rounds, intervals=10):
    """Score one file after another; give (round, resident MiB, open files) at each interval."""
    seen = []
    for done, path in enumerate(itertools.islice(itertools.cycle(paths), rounds), start=1):
        X = read_adapters([path], layout=layout)
        for model in models.values():
            model.predict(X)
        if done % max(1, rounds // intervals) == 0:
            seen.append((done, resident_mib(), open_files()))
            print(f"{done:>7} files  {seen[-1][1]:8.1f} MiB  {seen[-1][2]:>3} open", flush=True)
    return seen


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths, X, y = write_zoo(folder, N_FILES)
        models = fit_all(X, y)
        start = time.perf_counter()
        seen = soak(models, paths, X.layout, args.rounds)
        seconds = time.perf_counter() - start
    growth, opened = seen[-1][1] - seen[0][1], seen[-1][2] - seen[0][2]
    print(f"growth after the warm-up: {growth:.2f} MiB (bound {BOUND_MIB:g}), {opened} files")
    print(f"{1000 * seconds / args.rounds:.1f} ms a file, {len(models)} models")
    return int(growth > BOUND_MIB or opened > 0)


if __name__ == "__main__":
    sys.exit(main())
