"""A small causal language model, and LoRA finetuning of many adapters at once.

The network is a plain decoder-only transformer (Radford et al., 2019). Only its key and value
projections take adapters. Every function takes a stack of adapters, as `_denoiser` does: weights
are shared, and the low-rank part is one batched product. LoRA's scale ``alpha / r`` is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from sklora.datasets import _adam as adam
from sklora.datasets._denoiser import Factors, Weights, attention, norm

HEADS = 2
ADAPTED = ("self_attn.k_proj", "self_attn.v_proj")


def module_shapes(dim: int, depth: int) -> dict[str, tuple[int, int]]:
    """Names and shapes ``(n, m)`` of the linear modules that take an adapter."""
    return {f"layers.{layer}.{name}": (dim, dim) for layer in range(depth) for name in ADAPTED}


def init_base(
    n_symbols: int, context: int, dim: int, depth: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Draw weights of the network, ``(n_out, n_in)`` at standard deviation ``n_in**-0.5``."""
    shapes = {"embed": (n_symbols, dim), "position": (context, dim)}
    for layer in range(depth):
        for name in "qkvo":
            shapes[f"layers.{layer}.self_attn.{name}_proj"] = (dim, dim)
        shapes[f"layers.{layer}.mlp.up_proj"] = (4 * dim, dim)
        shapes[f"layers.{layer}.mlp.down_proj"] = (dim, 4 * dim)
    shapes["lm_head"] = (n_symbols, dim)
    return {
        name: torch.randn(shape, generator=generator) / math.sqrt(shape[1])
        for name, shape in shapes.items()
    }


def logits(
    base: Weights,
    symbols: Tensor,
    factors: Factors | None = None,
    drop: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """What the network expects after every symbol.

    Parameters
    ----------
    base : mapping of str to Tensor
        Weights shared by all adapters, as `init_base` gives them.
    symbols : int Tensor of shape (n_adapters, n_texts, length)
    factors : mapping of str to (U, V), or None
        ``U (n_adapters, n, r)`` and ``V (n_adapters, m, r)`` for each module that is adapted.
    drop : callable
        LoRA's dropout, on what enters the low-rank part.

    Returns
    -------
    Tensor of shape (n_adapters, n_texts, length, n_symbols)
    """
    factors = factors or {}

    def linear(name: str, x: Tensor) -> Tensor:
        out = F.linear(x, base[name])
        if name in factors:
            U, V = factors[name]
            out = out + torch.bmm(torch.bmm(drop(x).flatten(1, 2), V), U.mT).view_as(out)
        return out

    x = F.embedding(symbols, base["embed"]) + base["position"][: symbols.shape[-1]]
    for layer in range(sum(name.endswith("up_proj") for name in base)):
        block = f"layers.{layer}."
        h = norm(x)
        q, k, v = (linear(f"{block}self_attn.{name}_proj", h) for name in "qkv")
        found = attention(q, k, v, HEADS, is_causal=True)
        x = x + F.linear(found, base[f"{block}self_attn.o_proj"])
        wide = F.gelu(F.linear(norm(x), base[f"{block}mlp.up_proj"]))
        x = x + F.linear(wide, base[f"{block}mlp.down_proj"])
    return F.linear(norm(x), base["lm_head"])


def dropout(rates: Tensor, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Give what drops numbers of each adapter at its own rate, and scales the others up."""
    kept = (1 - rates).view(-1, 1, 1, 1)

    def drop(x: Tensor) -> Tensor:
        return x * (torch.rand(x.shape, generator=generator) < kept).to(x.dtype).div_(kept)

    return drop


def losses(found: Tensor, texts: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each adapter's next symbols, ``(n_adapters,)``."""
    each = F.cross_entropy(found.flatten(0, -2), texts[..., 1:].flatten(), reduction="none")
    return each.view(len(texts), -1).mean(dim=1)


def train_base(
    texts: Callable[[int], Tensor],
    *,
    n_symbols: int,
    context: int,
    dim: int,
    depth: int,
    n_steps: int,
    generator: torch.Generator,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Tensor]:
    """Train the base network with Adam and a cosine step size.

    ``texts(n)`` draws training texts of shape ``(n, context + 1)``.
    """
    base = init_base(n_symbols, context, dim, depth, generator)

    def loss() -> Tensor:
        batch = texts(32)[None]
        return losses(logits(base, batch[..., :-1]), batch).sum()

    return adam.train_network(base, loss, learning_rate=8e-3, n_steps=n_steps, progress=progress)


def finetune(
    base: Weights,
    factors: Mapping[str, tuple[Tensor, ...]],
    batches: Callable[[int], Tensor],
    *,
    learning_rate: Tensor,
    weight_decay: Tensor,
    n_steps: Tensor,
    lora_dropout: Tensor,
    generator: torch.Generator,
) -> adam.Parameters:
    """Finetune a stack of adapters together with AdamW, each with its own hyperparameters.

    Parameters
    ----------
    base : mapping of str to Tensor
        Frozen weights.
    factors : mapping of str to (U, V)
        Where to start, as `_denoiser.init_factors` gives them.
    batches : callable
        ``batches(step)`` gives the texts ``(n_adapters, batch_size, length + 1)`` of a step.
    learning_rate, weight_decay, lora_dropout : Tensor of shape (n_adapters,)
    n_steps : int Tensor of shape (n_adapters,)
        An adapter stands still once it has made its own number of steps.
    generator : torch.Generator
        Draws what is dropped.

    Returns
    -------
    dict of str to (U, V)
    """
    drop = dropout(lora_dropout, generator)

    def loss(trained: adam.Parameters, step: int) -> Tensor:
        texts = batches(step)
        pairs = {name: (U, V) for name, (U, V) in trained.items()}
        return losses(logits(base, texts[..., :-1], pairs, drop), texts)

    return adam.finetune(
        factors, loss, learning_rate=learning_rate, n_steps=n_steps, weight_decay=weight_decay
    )


@torch.no_grad()
def evaluate(base: Weights, texts: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """Loss in nats and accuracy of the next symbol, of every adapter on every group of texts.

    Parameters
    ----------
    base, factors
        As for `logits`. Nothing is dropped.
    texts : int Tensor of shape (n_groups, n_texts, length + 1)

    Returns
    -------
    loss, accuracy : Tensor of shape (n_adapters, n_groups)
    """
    n_adapters = next(iter(factors.values()))[0].shape[0]
    found = []
    for group in texts:
        batch = group.expand(n_adapters, *group.shape)
        scores = logits(base, batch[..., :-1], factors)
        right = scores.argmax(dim=-1) == batch[..., 1:]
        found.append((losses(scores, batch), right.float().mean(dim=(-1, -2))))
    loss, accuracy = zip(*found, strict=True)
    return torch.stack(loss, dim=1), torch.stack(accuracy, dim=1)
