"""GLNet computes the modules of one shape in one product: how much does that save?

Times one forward and backward pass through the equivariant layers and the invariant head, against
the same mathematics in a Python loop over the modules, in turn in one process, and prints the
median of the ratios. ``python benchmarks/bench_glnet_batched.py``
"""

import argparse
import time

import numpy as np
import torch

from sklora.nets import GLNet

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--repeats", type=int, default=30)
parser.add_argument("--rank", type=int, default=4)
parser.add_argument("--threads", type=int, default=1)
args = parser.parse_args()
torch.set_num_threads(args.threads)

# Twelve attention and six feed-forward modules of a transformer of width 64.
GROUPS = [(12, 64, 64), (3, 128, 64), (3, 64, 128)]


def batched(net, factors):
    """Give the invariant features of `net`, as it computes them."""
    return net.features(factors)


def loop(net, factors):
    """Give the invariant features of `net`, one module at a time."""
    features = []
    for layer, (U, V) in zip(net.embed, factors, strict=True):
        for phi, psi, u, v in zip(layer.phi, layer.psi, U, V, strict=True):
            left = torch.einsum("hn,nbr->bhr", phi, u)
            right = torch.einsum("hm,mbr->bhr", psi, v)
            features.append((left @ right.mT).flatten(1))
    return torch.cat(features, dim=1)


def seconds(function, net, factors):
    net.zero_grad()
    start = time.perf_counter()
    function(net, factors).square().sum().backward()
    return time.perf_counter() - start


print(f"{'batch':>6}{'loop':>12}{'batched':>12}{'loop / batched':>16}")
for batch in (8, 64):
    torch.manual_seed(0)
    net = GLNet(GROUPS, n_outputs=10, n_layers=1)
    factors = [
        (torch.randn(k, n, batch, args.rank), torch.randn(k, m, batch, args.rank))
        for k, n, m in GROUPS
    ]
    torch.testing.assert_close(net.features(factors), loop(net, factors), rtol=1e-3, atol=1e-4)
    times = np.array(
        [
            [seconds(function, net, factors) for function in (loop, batched)]
            for _ in range(args.repeats)
        ]
    )
    slow, fast = 1e3 * np.median(times, axis=0)
    ratio = np.median(times[:, 0] / times[:, 1])
    print(f"{batch:6}{slow:9.2f} ms{fast:9.2f} ms{ratio:16.2f}")
