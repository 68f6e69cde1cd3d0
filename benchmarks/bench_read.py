"""From adapter files to spectra, against the least that any reader of them has to do.

The baseline opens the same files with the safetensors library and takes NumPy's QR decomposition of
every factor, without scales, checks or singular values. Both run in turns, and the ratio of the
medians is printed.

    python benchmarks/bench_read.py
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from timing import seconds

from sklora import SVDSpectrum
from sklora.io import read_adapters

# Attention modules of Stable Diffusion 1.5: (input, output), four projections twice per block.
WIDTHS = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] + [1280] * 3 + [640] * 3 + [320] * 3
TEXT_WIDTH = 768


def module_shapes():
    """Names and shapes (output, input) of 128 modules."""
    for block, width in enumerate(WIDTHS):
        for attention, source in ((1, width), (2, TEXT_WIDTH)):
            for name, columns in (("q", width), ("k", source), ("v", source), ("out.0", width)):
                yield (
                    f"unet.down_blocks.{block}.attentions.0.attn{attention}.to_{name}",
                    width,
                    columns,
                )


def write_zoo(folder, n_adapters, rank, dtype):
    rng = np.random.default_rng(0)
    for index in range(n_adapters):
        tensors = {}
        for name, n, m in module_shapes():
            tensors[f"{name}.lora_A.weight"] = rng.normal(size=(rank, m)).astype(dtype)
            tensors[f"{name}.lora_B.weight"] = rng.normal(size=(n, rank)).astype(dtype)
            tensors[f"{name}.alpha"] = np.array(float(rank), dtype)
        safetensors.numpy.save_file(tensors, Path(folder) / f"{index:05}.safetensors")


def baseline(folder):
    for path in sorted(Path(folder).iterdir()):
        for name, factor in safetensors.numpy.load_file(path).items():
            if factor.ndim:
                tall = factor if name.endswith("lora_B.weight") else factor.T
                np.linalg.qr(tall.astype(np.float32, copy=False))


def ours(folder):
    return SVDSpectrum(device="cpu").fit_transform(read_adapters(folder))


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--adapters", type=int, default=64)
parser.add_argument("--rank", type=int, default=4)
parser.add_argument("--dtype", default="float32", choices=["float16", "float32"])
parser.add_argument("--repeats", type=int, default=5)
args = parser.parse_args()

with tempfile.TemporaryDirectory() as folder:
    write_zoo(folder, args.adapters, args.rank, args.dtype)
    size = sum(path.stat().st_size for path in Path(folder).iterdir())
    runs = [(seconds(baseline, folder), seconds(ours, folder)) for _ in range(args.repeats)]
    theirs, mine = (sorted(times)[len(times) // 2] for times in zip(*runs, strict=True))
print(f"{args.adapters} adapters of 128 modules, rank {args.rank}, {args.dtype}")
print(f"together {size / 2**20:.0f} MiB")
print(f"torch threads: {torch.get_num_threads()}")
print(f"files to spectra / (safetensors + QR in NumPy): {mine / theirs:.2f}")
