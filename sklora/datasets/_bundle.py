"""The bundled zoo: its file, how it is read, and the script that makes it.

``make bundled-zoo`` trains it anew. Factors are stored in 8 bits, and every loss is that of the
adapter as it is stored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save
from sklearn.utils import Bunch
from torch import Tensor

from sklora._files import replacing
from sklora.collection import LoRACollection, LoRALayout
from sklora.datasets._adam import Parameters
from sklora.datasets._digits import digits_recipe, make_bunch
from sklora.datasets._zoos import Zoo, of_full_rank, train_zoo

__all__ = ["load_digits_loras"]

PATH = Path(__file__).with_name("data") / "digits_loras.safetensors"
SETTINGS: dict[str, Any] = {"n_adapters": 1023, "rank": 4, "dim": 32, "depth": 3}
SEED = 20261124
LEVELS = 127  # the largest of the signed 8-bit integers that a factor is stored in


def load_digits_loras(
    *, return_X_y: bool = False
) -> Bunch | tuple[LoRACollection, NDArray[np.int64]]:
    """Load the bundled zoo: 1,023 real LoRAs, one for each non-empty set of digits.

    Each finetunes 18 modules of a diffusion transformer of width 32 at rank 4, as
    :func:`make_digits_loras` does.

    Parameters
    ----------
    return_X_y : bool, default=False
        Whether to return ``(data, target)`` instead of a Bunch.

    Returns
    -------
    data : :class:`~sklearn.utils.Bunch`
        As :func:`make_digits_loras` returns it: `data`, `target`, `presence`, `size`, `loss`,
        `loss_all`, `class_losses`, `groups`, `target_names` and `DESCR`.

    See Also
    --------
    make_digits_loras : Trains a new zoo.

    Examples
    --------
    >>> from sklora.datasets import load_digits_loras
    >>> X, y = load_digits_loras(return_X_y=True)
    >>> X.shape, y.shape
    ((1023, 5376), (1023, 10))
    >>> U, V = X[0]["blocks.0.mlp.up"]
    >>> U.shape, V.shape
    ((64, 4), (32, 4))
    """
    with safe_open(PATH, framework="numpy") as file:
        levels, scales = file.get_tensor("levels"), file.get_tensor("scales")
        presence, losses = file.get_tensor("presence"), file.get_tensor("class_losses")
        modules = json.loads(file.metadata()["modules"])
    layout = LoRALayout([tuple(module) for module in modules])
    flat = levels.astype(np.float32)
    blocks = [block for pair in layout.factor_slices for block in pair]
    for block, scale in zip(blocks, scales.T, strict=True):
        flat[:, block] *= scale[:, None]
    labels = {"presence": presence, "class_losses": losses}
    zoo = make_bunch(Zoo(of_full_rank(flat, layout), labels, base={}))
    del zoo["base"]  # the file has the adapters alone
    return (zoo.data, zoo.target) if return_X_y else zoo


def _scale(factor: Tensor) -> Tensor:
    largest = factor.abs().amax(dim=(1, 2), keepdim=True)
    return largest.clamp(min=torch.finfo(factor.dtype).eps) / LEVELS


def _round(factors: Parameters) -> Parameters:
    """Round every factor to the multiples of its scale that its file can hold."""

    def rounded(factor: Tensor) -> Tensor:
        scale = _scale(factor)
        return (factor / scale).round() * scale

    return {name: tuple(map(rounded, pair)) for name, pair in factors.items()}


def make_bundle(path: Path = PATH, *, verbose: int = 1) -> None:
    """Train the bundled zoo and write its file."""
    recipe = digits_recipe(**SETTINGS, random_state=SEED, store=_round)
    zoo = train_zoo(recipe, verbose=verbose)
    layout, flat = zoo.data.layout, torch.from_numpy(np.array(zoo.data))
    levels, scales = torch.empty(flat.shape, dtype=torch.int8), []
    for block in (block for pair in layout.factor_slices for block in pair):
        scale = _scale(flat[:, None, block])
        levels[:, block] = (flat[:, block] / scale[:, 0]).round().to(torch.int8)
        scales.append(scale.flatten())
    tensors = {
        "levels": levels.numpy(),
        "scales": torch.stack(scales, dim=1).numpy(),
        "presence": zoo.labels["presence"],
        "class_losses": zoo.labels["class_losses"],
    }
    with replacing(path) as file:
        file.write(save(tensors, metadata={"modules": json.dumps(layout.modules)}))
