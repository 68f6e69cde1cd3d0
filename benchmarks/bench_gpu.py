"""On a GPU: featurizers and training against the CPU of the same machine, and their limits.

Featurizers: `transform` of 2.1 GB of adapters in memory, with one block at a time and with two,
against the same on all cores of the CPU; and against copying as many bytes to the GPU from memory
that is pinned already, which nothing that starts in other memory can beat. Training: GLNet and
MLPNet as the estimators train them, against the same on the CPU, and against a bare PyTorch loop
over tensors that are on the GPU. All in turn in one process; prints ratios of medians, and what
torch has taken of the GPU's memory. ``python benchmarks/bench_gpu.py``
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from bench_figure5 import zoo
from bench_skorch_share import SETTINGS, bare, make_net, make_problem
from sklearn.base import clone

from sklora import (
    DenseProduct,
    GLEquivariantProjection,
    LoRACollection,
    OAlign,
    SVDSpectrum,
)
from sklora.estimators._training import train

# Adapters, modules, width and rank.
ZOOS = {"r=4": (256, 64, 4096, 4), "r=32": (64, 32, 4096, 32)}
FEATURIZERS = {
    "SVDSpectrum": SVDSpectrum(),
    "OAlign": OAlign(template=0),
    "projection": GLEquivariantProjection(random_state=0),
    "dense, gram": DenseProduct("gram"),
}
GPU, CPU = torch.device("cuda"), torch.device("cpu")


def medians(functions: list[Callable[[], object]], repeats: int = 3) -> list[float]:
    """Seconds of each, run in turn, after one round that does not count."""
    times = np.empty((repeats + 1, len(functions)))
    for row in times:
        for place, function in enumerate(functions):
            torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            torch.cuda.synchronize()
            row[place] = time.perf_counter() - start
    return np.median(times[1:], axis=0).tolist()


def seconds_to_copy(n_bytes: int) -> float:
    here = torch.empty(2**28, dtype=torch.uint8).pin_memory()
    there = torch.empty_like(here, device=GPU)
    [seconds] = medians([lambda: there.copy_(here, non_blocking=True)])
    return seconds * n_bytes / here.nbytes


def featurize(name: str, X: LoRACollection) -> list[float]:
    """Give the medians of a featurizer on the CPU, and on the GPU with one block and two."""
    settings = ({"device": "cpu"}, {"device": "cuda"}, {"device": "cuda", "n_jobs": 2})
    models = [clone(FEATURIZERS[name]).set_params(**setting) for setting in settings]
    if name == "dense, gram":  # its work is in the fit
        return medians([lambda model=model: model.fit(X) for model in models], repeats=1)
    models = [model.fit(X) for model in models]
    return medians([lambda model=model: model.transform(X) for model in models])


def featurizers() -> None:
    print(f"{'':<24}{'1 block':>20}{'2 blocks':>20}{'memory':>12}")
    print(f"{'':<24}{'/ CPU':>10}{'/ copy':>10}{'/ CPU':>10}{'/ copy':>10}{'GiB':>12}")
    for size, shape in ZOOS.items():
        X = zoo(*shape)
        copy = seconds_to_copy(X.nbytes)
        for name in FEATURIZERS if size == "r=4" else [*FEATURIZERS][:3]:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            cpu, one, two = featurize(name, X)
            cells = [one / cpu, one / copy, two / cpu, two / copy]
            cells.append(torch.cuda.max_memory_reserved() / 2**30)
            print(f"{name + ', ' + size:<24}" + "".join(f"{x:10.2f}" for x in cells), flush=True)
        print(f"the copy: {X.nbytes / copy / 1e9:.0f} GB/s; the last on the CPU: {cpu:.2f} s")


def fit(name: str, configuration: str, batch: int) -> list[float]:
    """Give the medians of the training of a network on the GPU, bare there, and on the CPU."""
    layout, data = make_problem(configuration)
    there = [
        (torch.from_numpy(part.loras.read()).to(GPU), torch.from_numpy(part.targets).to(GPU))
        for part in data
    ]
    settings = SETTINGS._replace(batch_size=batch)

    def on(device: torch.device) -> None:
        net, forward = make_net(name, layout)
        train(net.to(device), forward, "cross_entropy", *data, settings, device=device)

    def bare_on_gpu() -> None:
        net, forward = make_net(name, layout)
        bare(net.to(GPU), forward, *there, batch)

    return medians([lambda: on(GPU), bare_on_gpu, lambda: on(CPU)])


def training() -> None:
    print(f"{'':<32}{'/ CPU':>10}{'/ bare loop':>14}")
    for configuration, batches in (("small", (8, 64)), ("big", (64,))):
        for name in ("GLNet", "MLPNet"):
            for batch in batches:
                ours, plain, cpu = fit(name, configuration, batch)
                label = f"{name}, {configuration}, batch {batch}"
                print(f"{label:<32}{ours / cpu:10.2f}{ours / plain:14.2f}", flush=True)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    if not torch.cuda.is_available():
        sys.exit("This needs a CUDA device.")
    print(f"{torch.cuda.get_device_name()}, {torch.get_num_threads()} threads on the CPU")
    featurizers()
    training()
