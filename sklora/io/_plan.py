"""What a format says of a file: which tensors make which update, and how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from sklora.io._tensors import MAX_BYTES, TensorInfo


@dataclass(frozen=True)
class ReadOptions:
    """How files are to be read; see `sklora.io.read_adapters` for the meaning of each."""

    names: Literal["canonical", "raw"] = "canonical"
    keys: tuple[str, str] | None = None
    scale: float | None = None
    lokr: Literal["exact", "kronecker"] = "exact"
    allow_torch_zip: bool = False


@dataclass(frozen=True)
class Source:
    """The header of one file, and the configuration beside it: all that a format may look at.

    Attributes
    ----------
    container : str
        "safetensors", "npz", "torch-zip" or "gguf".
    tensors : mapping of str to TensorInfo
    metadata : mapping of str to str
    config : mapping or None
        What `adapter_config.json` in the folder of the file says.
    size : int
        How many bytes the file has.
    """

    container: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    size: int = MAX_BYTES

    def shapes(self, names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that play some roles."""
        return {role: self.tensors[name].shape for role, name in names.items()}


class Scale(NamedTuple):
    """The factor `s` of an update ``s B A``.

    Attributes
    ----------
    value : float
        The scale, where the header tells it; else 1 over the divisor of alpha.
    alpha : str or None
        The scalar tensor that holds alpha, by which `value` is multiplied. An alpha of 0 is read
        as the rank, as kohya's trainer and LyCORIS do: the scale is then 1.
    rival : float or None
        What loaders take that do not look at that tensor; both have to agree.
    """

    value: float
    alpha: str | None = None
    rival: float | None = None


class ModulePlan(NamedTuple):
    """One update: which tensors make it, and how.

    Attributes
    ----------
    path : str
        What the file calls the module.
    name : str
        What the collection calls it.
    method : str
        A key of `sklora.io.lowrank.METHODS`.
    tensors : dict of str to str
        For every role of the method the name of the tensor.
    n, m, rank : int
        Of the factors ``U (n, rank)`` and ``V (m, rank)``.
    scale : Scale
    part : (int, int), default=(0, 1)
        Place and number of the experts that share the tensors of a mixture of experts.
    """

    path: str
    name: str
    method: str
    tensors: dict[str, str]
    n: int
    m: int
    rank: int
    scale: Scale
    part: tuple[int, int] = (0, 1)


class SideTensor(NamedTuple):
    """A feature that is no factor, such as the magnitude of DoRA."""

    name: str
    tensor: str
    size: int


class LeftOut(NamedTuple):
    """A tensor that is not read, and why."""

    tensor: str
    reason: str


@dataclass(frozen=True)
class AdapterPlan:
    """How one file is read.

    Attributes
    ----------
    format : str
    modules : tuple of ModulePlan
        By name.
    side : tuple of SideTensor
    left_out : tuple of LeftOut
    base_model : str or None
        A label, as the trainer wrote it.
    """

    format: str
    modules: tuple[ModulePlan, ...]
    side: tuple[SideTensor, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    base_model: str | None = None


class Format(NamedTuple):
    """One trainer's way to write an adapter.

    Attributes
    ----------
    matches : callable
        ``matches(source, options)``: whether the file is of this format, from its header.
    plan : callable
        ``plan(source, options)`` gives the `AdapterPlan`, or raises `Refusal`.
    """

    matches: Callable[[Source, ReadOptions], bool]
    plan: Callable[[Source, ReadOptions], AdapterPlan]
