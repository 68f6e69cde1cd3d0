"""From the file of a 70B-shaped PEFT adapter to spectrum features, against ``adaptersentry scan``.

Writes an adapter of the shapes of Llama 3 70B (80 layers of 7 modules, rank 64, bfloat16, 1.66 GB),
then reads it and computes its spectrum in a fresh process, in turn with a scan of the same file by
adaptersentry 2.0. Prints the times of whole processes and after imports, their ratios, and the peak
resident memory. ::

    python -m venv sentry
    sentry/bin/pip install adaptersentry
    python benchmarks/bench_adaptersentry.py --adaptersentry sentry/bin/adaptersentry

Without it, our own numbers alone are printed.

A scan computes more than singular values. From Gram matrices in float32, where singular values
below some 1e-4 of the largest are lost, it takes the spectrum and the norms of all rows and
columns, and their Gini and Hoyer indices; from 256 sampled rows of every update the kurtosis of its
entries; and it compares every module with the others of its name.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from bench_streaming import peak_memory
from safetensors import safe_open

from sklora import SVDSpectrum
from sklora.io import read_adapters

# Modules of one layer, (output, input): grouped-query attention and the gated feed-forward block.
SHAPES = {
    "self_attn.q_proj": (8192, 8192),
    "self_attn.k_proj": (1024, 8192),
    "self_attn.v_proj": (1024, 8192),
    "self_attn.o_proj": (8192, 8192),
    "mlp.gate_proj": (28672, 8192),
    "mlp.up_proj": (28672, 8192),
    "mlp.down_proj": (8192, 28672),
}
RANK = 64
LIMIT_MB = 300


def tensor_shapes(n_layers: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Give names and shapes, in the order of the file."""
    for layer in range(n_layers):
        for module, (n, m) in SHAPES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            yield f"{name}.lora_A.weight", (RANK, m)
            yield f"{name}.lora_B.weight", (n, RANK)


def write_adapter(folder: Path, n_layers: int) -> Path:
    """Write it tensor by tensor: each is cut at random from one pool of normal numbers."""
    header, end = {}, 0
    for name, shape in tensor_shapes(n_layers):
        begin, end = end, end + 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    pool = (0.01 * rng.standard_normal(2**22, np.float32)).astype(ml_dtypes.bfloat16)
    path = folder / "adapter_model.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, (rows, columns) in tensor_shapes(n_layers):
            start = rng.integers(len(pool) - rows * columns)
            file.write(pool[start : start + rows * columns].view(np.uint8))
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [*SHAPES]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return path


def featurize(path: str) -> dict[str, float]:
    """What the fresh process does."""
    imported, start = peak_memory(), time.perf_counter()
    SVDSpectrum(device="cpu").fit_transform(read_adapters(path))
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "mb": 1e3 * (peak_memory() - imported)}


def run(*command: object) -> tuple[float, str]:
    """Give the seconds that a command takes, and what it prints."""
    start = time.perf_counter()
    done = subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE)
    return time.perf_counter() - start, done.stdout.decode()


def ours(path: Path) -> tuple[float, float, float]:
    """Give seconds of the process and after imports, and MB above imports."""
    whole, printed = run(sys.executable, __file__, "--featurize", path)
    found = json.loads(printed)
    return whole, found["seconds"], found["mb"]


def theirs(path: Path, executable: str) -> tuple[float, float]:
    """Give seconds of the process and after imports."""
    whole, _ = run(executable, "scan", path)
    python = Path(executable).with_name("python")
    imports, _ = run(python, "-c", "import adaptersentry.scanner")
    return whole, whole - imports


def gram_pass(path: Path) -> None:
    """Read every number once, as cheaply as can be."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - a file is no mapping
            factor = file.get_tensor(name).float()
            _ = factor @ factor.T if "lora_A" in name else factor.T @ factor


def ratios(quick: bool = False) -> dict[str, float]:
    """Give our time, after imports, over that of reading and Gram matrices in float32."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_adapter(Path(folder), 2 if quick else 80)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            gram_pass(path)
            middle = time.perf_counter()
            featurize(str(path))
            times.append(((time.perf_counter() - middle), middle - start))
    spectrum, gram = np.min(times, axis=0)
    return {"70B-shaped file to spectrum / to float32 Gram": spectrum / gram}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adaptersentry", help="its executable, in an environment of its own")
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where to put the adapter; it is removed at the end")
    parser.add_argument("--featurize", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.featurize:
        print(json.dumps(featurize(args.featurize)))
        return
    mine, scans = [], []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        path = write_adapter(Path(folder), args.layers)
        print(f"adapter of {path.stat().st_size / 1e9:.2f} GB, {os.cpu_count()} cores")
        for _ in range(args.repeats):
            mine.append(ours(path))
            if args.adaptersentry:
                scans.append(theirs(path, args.adaptersentry))
    whole, after, mb = np.median(mine, axis=0)
    print(f"SVDSpectrum of read_adapters: {whole:.2f} s, {after:.2f} s of it after imports")
    print(f"peak resident memory above imports: {mb:.0f} MB, of {LIMIT_MB} MB allowed")
    if scans:
        their_whole, their_after = np.median(scans, axis=0)
        print(f"adaptersentry scan: {their_whole:.2f} s, {their_after:.2f} s of it after imports")
        print(f"ratio, whole processes: {whole / their_whole:.2f}")
        print(f"ratio, after imports: {after / their_after:.2f}")


if __name__ == "__main__":
    main()
