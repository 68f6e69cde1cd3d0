"""How many headers of adapter files scan_adapters reads in a minute.

The files are those of Stable Diffusion 1.5 in kohya's keys, each with metadata of its own, so that
no two headers are the same. The baseline is the least that any reader has to do: open each file and
parse its header with `json.loads`. Both run in turns, and the ratio of the medians is printed.

    python benchmarks/bench_scan.py
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import safetensors.numpy
from timing import seconds

from sklora.io import scan_adapters

# Attention blocks of Stable Diffusion 1.5, and their widths; the text encoder's is 768.
BLOCKS = [
    *((f"down_blocks_{block}", 2, 320 * 2**block) for block in range(3)),
    ("mid_block", 1, 1280),
    *((f"up_blocks_{block}", 3, 320 * 2 ** (3 - block)) for block in range(1, 4)),
]
TEXT_WIDTH = 768


def module_shapes():
    """Names and shapes (output, input) of 128 modules."""
    for block, n_attentions, width in BLOCKS:
        for place in range(n_attentions):
            for attention, source in ((1, width), (2, TEXT_WIDTH)):
                for name, columns in (("q", width), ("k", source), ("v", source), ("out_0", width)):
                    path = (
                        f"{block}_attentions_{place}_transformer_blocks_0_attn{attention}_to_{name}"
                    )
                    yield f"lora_unet_{path}", width, columns


def write_zoo(folder, n_files, n_modules):
    tensors = {}
    for name, n, m in list(module_shapes())[:n_modules]:
        tensors[f"{name}.lora_down.weight"] = np.ones((1, m), np.float16)
        tensors[f"{name}.lora_up.weight"] = np.ones((n, 1), np.float16)
        tensors[f"{name}.alpha"] = np.array(1, np.float16)
    for index in range(n_files):
        metadata = {"ss_session_id": str(index), "ss_network_dim": "1"}
        path = Path(folder) / f"{index:05}.safetensors"
        path.write_bytes(safetensors.numpy.save(tensors, metadata))
    return len(tensors)


def baseline(folder):
    for path in sorted(Path(folder).iterdir()):
        with path.open("rb") as file:
            json.loads(file.read(int.from_bytes(file.read(8), "little")))


def ours(folder):
    bad = [report.error for report in scan_adapters(folder) if report.error]
    assert not bad, bad[0]


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--files", type=int, default=2000)
parser.add_argument("--modules", type=int, default=86, help="of 3 tensors each, at most 128")
parser.add_argument("--repeats", type=int, default=5)
args = parser.parse_args()

with tempfile.TemporaryDirectory() as folder:
    n_tensors = write_zoo(folder, args.files, args.modules)
    runs = [(seconds(baseline, folder), seconds(ours, folder)) for _ in range(args.repeats)]
    theirs, mine = (sorted(times)[len(times) // 2] for times in zip(*runs, strict=True))
print(f"{args.files} files of {n_tensors} tensors, one process")
print(f"headers per minute: {60 * args.files / mine:.0f}")
print(f"scan_adapters / json.loads of the headers alone: {mine / theirs:.2f}")
