"""A zoo larger than memory: how much memory does a featurizer take, and how long beside reading?

Writes a zoo of random adapters, block by block, then maps it in a fresh process with
`LoRACollection.open`, reads the file once from start to end, and fits and applies a featurizer.
Prints the size of the zoo, the peak resident memory of that process, and the time of featurizing
over the time of reading. Checks that the first adapters get the features that they get in memory.
``python benchmarks/bench_streaming.py --size-gb 2 --folder /tmp``
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

from sklora import GLEquivariantProjection, LoRACollection, LoRALayout, SVDSpectrum

# The attention of a transformer of width 1024, in rank 16.
LAYOUT = LoRALayout([(f"{i}.{name}", 1024, 1024, 16) for i in range(4) for name in "qkvo"])
FEATURIZERS = {
    "SVDSpectrum": SVDSpectrum(device="cpu", n_jobs=4),
    "GLEquivariantProjection": GLEquivariantProjection(8, random_state=0, device="cpu", n_jobs=4),
}
PIECE = 2**24


class RandomStore:
    """Normal numbers that are drawn when they are read."""

    layout, dtype, is_checked = LAYOUT, np.dtype(np.float32), True

    def __init__(self, n_adapters):
        self.ids = np.arange(n_adapters)
        self.ranks = np.broadcast_to(np.array(LAYOUT.ranks), (n_adapters, LAYOUT.n_modules))
        self._rng = np.random.default_rng(0)

    def read(self, rows, *, copy=True):
        shape = len(self.ids[rows]), LAYOUT.width
        return self._rng.standard_normal(shape, dtype=self.dtype)


def peak_memory():
    """Peak resident memory of this process in GB."""
    if sys.platform == "linux":
        # ru_maxrss would begin at that of the process that started this one.
        with open("/proc/self/status") as status:
            lines = dict(line.split(":", 1) for line in status)
        return int(lines["VmHWM"].split()[0]) * 1024 / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def forget(path):
    """Make the system drop its cache of a file, where it can be asked to."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_once(path):
    forget(path)
    buffer = bytearray(PIECE)
    start = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def measure(path, name):
    """What the fresh process does."""
    imported = peak_memory()
    reading = read_once(path)
    X, featurizer = LoRACollection.open(path), FEATURIZERS[name]
    forget(path)
    start = time.perf_counter()
    features = np.asarray(featurizer.fit_transform(X))
    featurizing = time.perf_counter() - start
    peak = peak_memory()
    few = LoRACollection.from_array(X[:8].read(), X.layout)
    equal = np.array_equal(np.asarray(featurizer.transform(few)), features[:8])
    return {
        "zoo": X.nbytes / 1e9,
        "adapters": len(X),
        "imports": imported,
        "peak": peak,
        "reading": reading,
        "featurizing": featurizing,
        "equal": equal,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size-gb", type=float, default=2.0, help="of the zoo")
    parser.add_argument("--folder", help="where to put it; it is removed at the end")
    parser.add_argument("--featurizer", choices=FEATURIZERS, action="append")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    n_adapters = max(8, round(args.size_gb * 1e9 / LAYOUT.width / 4))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = os.path.join(folder, "zoo.safetensors")
        LoRACollection(RandomStore(n_adapters)).save(path)
        for name in args.featurizer or ["SVDSpectrum"]:
            command = [sys.executable, __file__, "--measure", path, name]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
            found = json.loads(output)
            print(
                f"{name}: zoo of {found['zoo']:.2f} GB ({found['adapters']} adapters), peak "
                f"resident memory {found['peak']:.2f} GB ({found['imports']:.2f} GB of it imports)"
                f"\n  featurizing / reading once: {found['featurizing'] / found['reading']:.1f} "
                f"({found['featurizing']:.0f} s / {found['reading']:.0f} s)"
                f"\n  first rows equal those computed in memory: {found['equal']}"
            )


if __name__ == "__main__":
    main()
