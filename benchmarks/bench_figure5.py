"""Figure 5 of the paper: preprocessing and forward passes on LoRAs of the GPT-3 family, on a CPU.

Rank-4 LoRAs of one d by d module in every layer, from 125M to 175B (37.7 MB an adapter in float32).
For every architecture and size a fresh process times the featurizer's `fit_transform` of 64
adapters, and forward passes of 512 adapters through the network that reads its features, at the
default sizes. Only 64 adapters are drawn: the 512 are these eight times over, in batches of at most
64 and at most 1 GiB. Prints milliseconds an adapter (medians over runs of the featurizer and over
batches), the peak resident memory above imports with the adapters themselves in it, and slopes in
log-log scale against an adapter's bytes. mlp and gl-net need no preprocessing. dense is
`DenseProduct("gram")`; its exact form is timed beside it where 64 adapters and the first layer of
its network take at most 8 GB. ``python benchmarks/bench_figure5.py --plot figure5.png``

With ``--device cuda`` all is in one process, and memory that of the GPU: preprocessing starts and
ends in the memory of the CPU, and the features of forward passes are on the GPU already.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from bench_streaming import peak_memory
from sklearn.base import clone

from sklora import DenseProduct, LoRACollection, LoRALayout, OAlign, SVDSpectrum
from sklora.nets import GLNet, MLPNet

# Layers and width, from table 2.1 of "Language Models are Few-Shot Learners".
SIZES = {
    "125M": (12, 768),
    "350M": (24, 1024),
    "760M": (24, 1536),
    "1.3B": (24, 2048),
    "2.7B": (32, 2560),
    "6.7B": (32, 4096),
    "13B": (40, 5140),
    "175B": (96, 12288),
}
FEATURIZERS = {
    "mlp": None,
    "o-align": OAlign(template=0),
    "svd": SVDSpectrum(),
    "dense": DenseProduct("gram"),
    "dense (exact)": DenseProduct(),
    "gl-net": None,
}
COLOURS = {
    "mlp": "#888888",
    "o-align": "#e69f00",
    "svd": "#0072b2",
    "dense": "#d55e00",
    "dense (exact)": "#cc79a7",
    "gl-net": "#009e73",
}
RANK, N_ADAPTERS, N_FORWARD, BATCH_BYTES, EXACT_BYTES = 4, 64, 512, 2**30, 8e9
FIELDS = {
    "preprocessing_ms": "preprocessing, ms an adapter",
    "forward_ms": "forward pass, ms an adapter",
    "peak_gb": "peak memory, GB",
}
Row = dict[str, float | str | None]


def adapter_bytes(size: str) -> int:
    n_layers, width = SIZES[size]
    return n_layers * 2 * width * RANK * 4


def zoo(n_adapters: int, n_layers: int, width: int, rank: int) -> LoRACollection:
    """Draw one pool of normal numbers, and repeat it out of step with the adapters."""
    layout = LoRALayout([(f"layers.{i}", width, width, rank) for i in range(n_layers)])
    pool = np.random.default_rng(0).standard_normal(2**20 + 7, np.float32)
    flat = np.resize(pool, (n_adapters, layout.width))
    return LoRACollection.from_array(flat, layout, ranks=np.full((n_adapters, n_layers), rank))


def zoo_of(size: str) -> LoRACollection:
    return zoo(N_ADAPTERS, *SIZES[size], RANK)


def median_seconds(function: Callable[[], object], repeats: int, device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def preprocess(
    architecture: str, X: LoRACollection, repeats: int, device: str = "cpu"
) -> tuple[float | None, np.ndarray]:
    """Give the seconds that preprocessing takes, and the features."""
    featurizer = FEATURIZERS[architecture]
    if featurizer is None:
        return None, np.asarray(X)
    featurizer = clone(featurizer).set_params(device=device)
    seconds = median_seconds(lambda: featurizer.fit_transform(X), repeats, device)
    return seconds, np.asarray(featurizer.transform(X))


def forward(
    architecture: str, X: LoRACollection, features: np.ndarray, device: str = "cpu"
) -> float:
    """Give the seconds an adapter that a network takes: the median over batches."""
    n_layers, width = X.layout.n_modules, X.layout.modules[0].n
    rows = torch.from_numpy(features).to(device)
    if architecture == "gl-net":
        # Module-major factors as views of the flat rows; the network copies what it needs.
        factors = rows.view(-1, n_layers, 2, width, RANK).permute(2, 1, 3, 0, 4)
        net = GLNet([(n_layers, width, width)], n_outputs=1, n_layers=1)
    else:
        net = MLPNet(features.shape[1], n_outputs=1)
    net = net.to(device).eval()
    batch = min(N_ADAPTERS, 2 ** int(math.log2(max(1, BATCH_BYTES // features[0].nbytes))))
    starts = iter(range(0, N_FORWARD, batch))

    @torch.inference_mode()
    def run() -> None:
        start = next(starts) % N_ADAPTERS
        places = slice(start, start + batch)
        if architecture == "gl-net":
            U, V = factors[..., places, :]
            net([(U, V)])
        else:
            net(rows[places])

    return median_seconds(run, N_FORWARD // batch, device) / batch


def measure(architecture: str, size: str, repeats: int, device: str) -> Row:
    """Time one architecture at one size; on the CPU, this is what the fresh process does."""
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    imported, X = peak_memory(), zoo_of(size)
    preprocessing, features = preprocess(architecture, X, repeats, device)
    passing = forward(architecture, X, features, device)
    return {
        "architecture": architecture,
        "size": size,
        "adapter_mb": adapter_bytes(size) / 1e6,
        "preprocessing_ms": preprocessing and 1e3 * preprocessing / N_ADAPTERS,
        "forward_ms": 1e3 * passing,
        "peak_gb": torch.cuda.max_memory_reserved() / 1e9 if on_gpu else peak_memory() - imported,
    }


def fits(architecture: str, size: str) -> bool:
    n_layers, width = SIZES[size]
    exact = n_layers * width**2 * 4 * (N_ADAPTERS + 128)
    return architecture != "dense (exact)" or exact <= EXACT_BYTES


def measured_apart(architecture: str, size: str, repeats: int) -> Row:
    command = [sys.executable, __file__, "--measure", architecture, size, "--repeats", str(repeats)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    row: Row = json.loads(done.stdout)
    return row


def slope(rows: list[Row], field: str) -> float:
    """Exponent of a power law in an adapter's bytes, fitted to rows of several sizes."""
    sizes, values = ([float(row[key]) for row in rows] for key in ("adapter_mb", field))
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def of_architecture(rows: list[Row], architecture: str, field: str) -> list[Row]:
    return [row for row in rows if row["architecture"] == architecture and row[field] is not None]


def print_row(row: Row) -> None:
    cells = ["" if row[field] is None else f"{row[field]:.3f}" for field in FIELDS]
    print(
        f"{row['architecture']:<14}{row['size']:>6}{row['adapter_mb']:9.2f} MB"
        f"{cells[0]:>16}{cells[1]:>12}{cells[2]:>12}",
        flush=True,
    )


def print_slopes(rows: list[Row]) -> None:
    print("slopes in log-log scale: 1 is proportional to an adapter's bytes")
    for architecture in FEATURIZERS:
        cells = []
        for field in FIELDS:
            found = of_architecture(rows, architecture, field)
            cells.append(f"{slope(found, field):.2f}" if len(found) > 1 else "")
        print(f"{architecture:<32}{cells[0]:>16}{cells[1]:>12}{cells[2]:>12}")


def plot(rows: list[Row], path: str, where: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.6), layout="constrained")
    sizes = [size for size in SIZES if any(row["size"] == size for row in rows)]
    for axes, (field, label) in zip(figure.subplots(1, 3), FIELDS.items(), strict=True):
        for architecture, colour in COLOURS.items():
            found = of_architecture(rows, architecture, field)
            if not found:
                continue
            name = f"{architecture}, slope {slope(found, field):.2f}" if found[1:] else architecture
            points = ([row[key] for row in found] for key in ("adapter_mb", field))
            axes.plot(*points, "o-", color=colour, label=name, markersize=4)
        axes.set(xscale="log", yscale="log", xlabel="size of an adapter, MB", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
        models = axes.secondary_xaxis("top")
        models.set_xticks(
            [adapter_bytes(size) / 1e6 for size in sizes], sizes, fontsize=7, rotation=60
        )
        models.minorticks_off()
    figure.suptitle(f"Rank-4 LoRAs of the GPT-3 family, {where}")
    figure.savefig(path, dpi=110)


def ratios(quick: bool = False) -> dict[str, float]:
    """Give times per byte of a large adapter over those of a small one: 1 is proportional."""
    small, large = ("125M", "760M") if quick else ("760M", "6.7B")
    zoos = {size: zoo_of(size) for size in (small, large)}
    found = {}
    for architecture in ("o-align", "svd", "gl-net"):
        per_byte = {}
        for size, X in zoos.items():
            seconds, features = preprocess(architecture, X, 5)
            per_byte[size] = (seconds or N_ADAPTERS * forward(architecture, X, features)) / X.nbytes
        found[f"{architecture}: per byte at {large} / at {small}"] = (
            per_byte[large] / per_byte[small]
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--csv", help="where to write the rows")
    parser.add_argument("--plot", help="where to draw them")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure, args.repeats, "cpu")))
        return
    on_gpu = args.device == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores"
    print(where)
    print(f"{'':<32}{'preprocessing':>16}{'forward':>12}{'peak':>12}")
    print(f"{'':<32}{'ms/adapter':>16}{'ms/adapter':>12}{'GB':>12}")
    rows = []
    for architecture in FEATURIZERS:
        for size in args.sizes:
            if fits(architecture, size):
                rows.append(
                    measure(architecture, size, args.repeats, "cuda")
                    if on_gpu
                    else measured_apart(architecture, size, args.repeats)
                )
                print_row(rows[-1])
    print_slopes(rows)
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    if args.plot:
        plot(rows, args.plot, where)


if __name__ == "__main__":
    main()
