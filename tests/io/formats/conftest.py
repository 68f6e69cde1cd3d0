"""Adapter files as trainers write them, and the updates that are read from them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sklora.io import AdapterReport, read_adapters, scan_adapters


@pytest.fixture
def normal() -> Callable[..., torch.Tensor]:
    """Draw a tensor of a shape and dtype."""
    rng = np.random.default_rng(0)
    return lambda *shape, dtype=torch.float32: torch.from_numpy(rng.normal(size=shape)).to(dtype)


@pytest.fixture
def pair(normal) -> tuple[torch.Tensor, torch.Tensor]:
    """Give A and B of an update (5, 4) of rank 3."""
    return normal(3, 4, dtype=torch.float64), normal(5, 3, dtype=torch.float64)


@pytest.fixture
def save(tmp_path) -> Callable[..., Path]:
    """Write tensors as safetensors, in a folder of their own, with a configuration beside them."""

    def write(
        tensors: Mapping[str, torch.Tensor],
        config: object = None,
        metadata: Mapping[str, str] | None = None,
        folder: str = "adapter",
    ) -> Path:
        path = tmp_path / folder / "adapter_model.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        contiguous = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, path, metadata=None if metadata is None else dict(metadata))
        if config is not None:
            (path.parent / "adapter_config.json").write_text(json.dumps(config))
        return path

    return write


@pytest.fixture
def scan() -> Callable[..., AdapterReport]:
    """Report of one file that is to be sound."""

    def report(path, **options):
        [found] = scan_adapters(path, **options)
        assert found.error is None
        return found

    return report


@pytest.fixture
def refusal() -> Callable[..., str]:
    """Why a file is refused, from its header alone."""

    def reason(path, **options):
        [found] = scan_adapters(path, **options)
        assert found.error is not None
        assert not found.modules
        return found.error

    return reason


@pytest.fixture
def assert_updates() -> Callable[..., None]:
    """A file is read as just these updates ``(out, in)``, to 1e-6 of their norm.

    Convolutions ``(out, in, ...)`` are compared as matrices.
    """

    def check(path, expected: Mapping[str, torch.Tensor], **options) -> None:
        adapter = read_adapters(path, **{"names": "raw", **options})[0]
        assert set(adapter) == set(expected)
        for name, update in expected.items():
            U, V = (factor.astype(np.float64) for factor in adapter[name])
            dense = update.double().flatten(1).numpy()
            assert dense.shape == (len(U), len(V))
            assert np.linalg.norm(U @ V.T - dense) <= 1e-6 * np.linalg.norm(dense)

    return check
