"""GL-net, one training epoch: how much faster than a loop over the modules, how far from its limit?

Times epochs of the same mathematics in turn in one process, from flat rows in memory to steps of
AdamW: GLNet as GLNetClassifier trains it, with torch's fused AdamW; a plain PyTorch loop over the
modules with torch's AdamW at its defaults; the same loop with the fused one; and the floating-point
operations of the matrix products alone, at the rate of a product of 2048 x 2048 matrices. Prints
medians over rounds of the ratios. ``python benchmarks/bench_glnet_epoch.py``
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from timing import print_ratios, seconds
from torch import nn

from sklora import LoRALayout
from sklora.estimators.glnet import cut_factors
from sklora.nets import GLNet, feedforward

RANK, HIDDEN, MLP, OUTPUTS = 4, 32, 128, 10
# Twelve attention and six feed-forward modules of a transformer of width 64.
SMALL = 12 * [(64, 64)] + 3 * [(128, 64)] + 3 * [(64, 128)]
# The attention of Stable Diffusion 1.5's UNet: widths by level, and 768 columns of text.
BIG = [
    shape
    for width in [320] * 2 + [640] * 2 + [1280] * 3 + [1280] * 3 + [640] * 3 + [320] * 3
    for shape in 4 * [(width, width)] + [(width, width), (width, 768), (width, 768), (width, width)]
]
# Shapes, and adapters in an epoch.
CONFIGURATIONS = {"small": (SMALL, 256), "big": (BIG, 64)}


class LoopNet(nn.Module):
    """GLNet as written down: every module has its own matrices, and is computed by itself."""

    def __init__(self, layout: LoRALayout) -> None:
        super().__init__()
        # In the order of GLNet, so that its weights fit.
        order = [module for group in layout.groups for module in group.index]
        self.slices = [layout.factor_slices[module] for module in order]
        shapes = [layout.modules[module][1:3] for module in order]
        self.phi = nn.ParameterList(torch.randn(HIDDEN, n) / n**0.5 for n, _ in shapes)
        self.psi = nn.ParameterList(torch.randn(HIDDEN, m) / m**0.5 for _, m in shapes)
        width = len(shapes) * HIDDEN**2
        self.register_buffer("module_scale", torch.ones(len(shapes)))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.weight = min(1.0, 100 / width)
        self.mlp = feedforward(width + 1, OUTPUTS, (MLP,), dropout=0.5)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        products = []
        for (left, right), phi, psi, scale in zip(
            self.slices, self.phi, self.psi, self.module_scale, strict=True
        ):
            U = scale * (phi @ rows[:, left].view(len(rows), -1, RANK))
            V = scale * (psi @ rows[:, right].view(len(rows), -1, RANK))
            products.append((U @ V.mT).flatten(1))
        z = (torch.cat(products, dim=1) - self.mean) / self.scale
        norm = torch.linalg.vector_norm(z, dim=1, keepdim=True)
        return self.mlp(torch.cat([self.weight * z, norm], dim=1))


def copy_weights(net: GLNet, loop: LoopNet) -> None:
    """Give the loop the weights of the network."""
    flat = [block.transpose(0, 1).flatten(1) for block in net.invariant_map.blocks]
    values = [phi for layer in net.embed for phi in layer.phi]
    values += [psi for layer in net.embed for psi in layer.psi]
    values += [torch.cat([*flat, net.mlp[0].weight], dim=1), net.mlp[0].bias]
    values += net.mlp[1:].parameters()
    with torch.no_grad():
        for parameter, value in zip(loop.parameters(), values, strict=True):
            parameter.copy_(value)


def operations(layout: LoRALayout) -> int:
    """Count the operations of the matrix products, forward and backward, of one adapter."""
    rows = sum(n + m for _, n, m, _ in layout.modules)
    embed, products = 2 * HIDDEN * RANK * rows, 2 * HIDDEN**2 * RANK * layout.n_modules
    perceptron = 2 * MLP * (HIDDEN**2 * layout.n_modules + 1 + OUTPUTS)
    # The rows need no gradient, so the first layer has one product backward and the others two.
    return 2 * embed + 3 * (products + perceptron)


def epoch(
    forward: Callable[[torch.Tensor], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    data: tuple[torch.Tensor, torch.Tensor],
    batch: int,
) -> None:
    for rows, y in zip(*(part.split(batch) for part in data), strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(forward(rows), y).backward()
        optimizer.step()


def compare(name: str, batch: int, rounds: int) -> np.ndarray:
    """Time epochs ``(rounds, 4)``: sklora's, the loop's, the fused loop's, the operations'."""
    torch.manual_seed(0)
    shapes, n_adapters = CONFIGURATIONS[name]
    layout = LoRALayout([(f"m{i}", n, m, RANK) for i, (n, m) in enumerate(shapes)])
    data = torch.randn(n_adapters, layout.width), torch.randint(OUTPUTS, (n_adapters,))
    groups = [(len(group.index), group.n, group.m) for group in layout.groups]
    net = GLNet(groups, OUTPUTS, HIDDEN, n_layers=1, mlp_hidden=(MLP,), dropout=0.5)
    loop, memory = LoopNet(layout), []

    def batched(rows: torch.Tensor) -> torch.Tensor:
        return net(*cut_factors(rows, layout, memory))

    copy_weights(net, loop)
    rows = data[0][:4]
    torch.testing.assert_close(
        net.eval()(*cut_factors(rows, layout)), loop.eval()(rows), rtol=1e-3, atol=1e-4
    )
    net.train(), loop.train()
    fused = torch.optim.AdamW(net.parameters(), fused=True)
    runs = [(batched, fused), (loop, torch.optim.AdamW(loop.parameters()))]
    runs.append((loop, torch.optim.AdamW(loop.parameters(), fused=True)))
    square = torch.randn(2048, 2048)
    scale = operations(layout) * n_adapters / (2 * 2048**3)
    times = [
        [
            *(seconds(epoch, *run, data, batch) for run in runs),
            scale * seconds(torch.mm, square, square),
        ]
        for _ in range(rounds + 1)
    ]
    return np.array(times[1:])


def ratios(quick: bool = False) -> dict[str, float]:
    """Give the median ratios of sklora's time to those of the others.

    A quick run leaves out the operations of 8 adapters, beside which it is Python's pace, and that
    of the machine on the day, that is measured.
    """
    found = {}
    for name in ["small"] if quick else CONFIGURATIONS:
        for batch in (8, 64):
            ours, loop, fused, floor = compare(name, batch, rounds=5 if quick else 15).T
            key = f"{name}, batch {batch}"
            for other, times in (
                ("loop", loop),
                ("loop with fused AdamW", fused),
                ("operations", floor),
            ):
                if quick and (batch, other) == (8, "operations"):
                    continue
                found[f"sklora / {other}, {key}"] = float(np.median(ours / times))
    return found


if __name__ == "__main__":
    print_ratios(__doc__, ratios)
