"""What does skorch add to an epoch of the estimators?

Times the training of GLNet and MLPNet as the estimators run it (skorch, batches read from a
LoRACollection, early stopping) against a bare PyTorch loop over tensors that are ready in memory,
with the same network, batch size, optimizer and validation pass, in turn in one process. Both
gather their batches in a random order. Prints medians over rounds of the ratios.
``python benchmarks/bench_skorch_share.py``
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from bench_glnet_epoch import BIG, HIDDEN, MLP, OUTPUTS, RANK, SMALL
from timing import print_ratios, seconds
from torch import nn

from sklora import LoRACollection, LoRALayout
from sklora.estimators._data import TrainingData, TrainingSettings
from sklora.estimators._training import train
from sklora.estimators.glnet import cut_factors
from sklora.nets import GLNet, MLPNet

# Shapes, and adapters to train on; a fifth as many are validated on.
CONFIGURATIONS = {"small": (SMALL, 640), "big": (BIG, 512)}
EPOCHS = 3
SETTINGS = TrainingSettings(
    lr=1e-3,
    weight_decay=1e-2,
    optimizer="adamw",
    max_epochs=EPOCHS,
    batch_size=64,
    patience=EPOCHS,
    callbacks=(),
    verbose=0,
)


def make_data(layout: LoRALayout, n_adapters: int) -> TrainingData:
    rng = np.random.default_rng(0)
    flat = rng.standard_normal((n_adapters, layout.width), dtype=np.float32)
    weights = np.ones((n_adapters, 1), np.float32)
    loras = LoRACollection.from_array(flat, layout)
    return TrainingData(loras, rng.integers(OUTPUTS, size=n_adapters), weights)


def make_problem(configuration: str, share: int = 1) -> tuple[LoRALayout, list[TrainingData]]:
    """Give the layout, adapters to train on, or one in `share` of them, and to validate on."""
    shapes, n_adapters = CONFIGURATIONS[configuration]
    layout = LoRALayout([(f"m{i}", n, m, RANK) for i, (n, m) in enumerate(shapes)])
    sizes = n_adapters // share, n_adapters // share // 5
    return layout, [make_data(layout, size) for size in sizes]


def make_net(name: str, layout: LoRALayout) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    torch.manual_seed(0)
    if name == "MLPNet":
        net = MLPNet(layout.width, OUTPUTS, dropout=0.5)
        return net, net
    groups = [(len(group.index), group.n, group.m) for group in layout.groups]
    net = GLNet(groups, OUTPUTS, HIDDEN, n_layers=1, mlp_hidden=(MLP,), dropout=0.5)
    memory = []
    return net, lambda rows: net(*cut_factors(rows, layout, memory))


def bare(
    net: nn.Module,
    forward: Callable[..., torch.Tensor],
    training: tuple[torch.Tensor, torch.Tensor],
    validation: tuple[torch.Tensor, torch.Tensor],
    batch: int,
) -> None:
    """Train for `EPOCHS`, each followed by a validation pass."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2, fused=True)
    (rows, y), loss = training, nn.functional.cross_entropy
    for _ in range(EPOCHS):
        net.train()
        for picked in torch.randperm(len(rows)).split(batch):
            optimizer.zero_grad()
            loss(forward(rows[picked]), y[picked]).backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            for part, truth in zip(*(t.split(batch) for t in validation), strict=True):
                loss(forward(part), truth)


def compare(name: str, configuration: str, batch: int, quick: bool) -> float:
    """Give the median of the ratios of the two times."""
    layout, data = make_problem(configuration, share=2 if quick else 1)
    tensors = [(torch.from_numpy(d.loras.read()), torch.from_numpy(d.targets)) for d in data]
    settings, device = SETTINGS._replace(batch_size=batch), torch.device("cpu")
    found = []
    for _ in range(5 if configuration == "small" else 3):
        net, forward = make_net(name, layout)
        plain = seconds(bare, net, forward, *tensors, batch)
        net, forward = make_net(name, layout)
        options = {"device": device}
        found.append(
            seconds(train, net, forward, "cross_entropy", *data, settings, **options) / plain
        )
    return float(np.median(found[1:]))


def ratios(quick: bool = False) -> dict[str, float]:
    """Give the median ratios, estimator over bare loop."""
    return {
        f"skorch / bare, {name}, {configuration}, batch {batch}": compare(
            name, configuration, batch, quick
        )
        for configuration in (["small"] if quick else CONFIGURATIONS)
        for name in ("GLNet", "MLPNet")
        # MLPNet has 106 million weights there, and AdamW takes nearly all of its time at batch 8.
        for batch in ((8, 64) if configuration == "small" else (64,))
    }


if __name__ == "__main__":
    print_ratios(__doc__, ratios)
