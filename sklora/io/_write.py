"""write_adapter: factors back into a file that PEFT loads."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors.numpy import save

from sklora._files import complete_folder, replacing
from sklora.collection import LoRAAdapter, LoRACollection
from sklora.io._adapter import OpenAdapter, opened
from sklora.io._build import base_model_label
from sklora.io._errors import AdapterError
from sklora.io._find import CONFIG, find_files, read_config
from sklora.io._plan import ModulePlan, ReadOptions
from sklora.io._read import first_of
from sklora.io._tensors import check_tensor
from sklora.io.formats._loaded import SAVED_WHOLE
from sklora.io.formats.peft import ATTENTION_OUT
from sklora.io.names import PREFIX, canonical_name

T = TypeVar("T")

WEIGHTS = "adapter_model.safetensors"


def write_adapter(
    path: str | os.PathLike[str],
    adapter: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    like: str | os.PathLike[str] | None = None,
    base_model: str | None = None,
) -> None:
    """Write one adapter as a folder that PEFT loads.

    The factors are stored as they are, ``B = U`` and ``A = V^T``, with the scale 1: alpha is r.
    They are in float32 or float64; half precision becomes float32, which loses nothing.

    Parameters
    ----------
    path : str or path-like
        The folder. An adapter in it is replaced, once the new files are complete.
    adapter : mapping of str to (U, V)
        For every module ``U (n, r)`` and ``V (m, r)``, such as ``X[0]``. Modules that it lacks are
        not written.
    like : str, path-like or None, default=None
        A PEFT adapter whose keys, configuration and other tensors (biases, modules that were saved
        whole, magnitudes of DoRA) the new one is to have. Modules are found by the name that the
        file gives them or by their canonical name. Without it, every module is written as a linear
        layer under the name that you give, so that PEFT does not accept embeddings and
        convolutions.
    base_model : str or None, default=None
        What the configuration names as base model; by default what `like` or the collection names.

    Raises
    ------
    ValueError
        When `adapter` has no module, factors do not fit together or have NaN or infinity, two names
        are of one module, a module is not one of `like`, or of another shape there, or the base
        model's name is too long.
    TypeError
        When `adapter` is no mapping.
    AdapterError
        When `like` cannot be read, or is not of PEFT's format.

    See Also
    --------
    read_adapters : Reads it again.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from sklora.io import read_adapters, write_adapter
    >>> U, V = np.ones((8, 2)), np.ones((6, 2))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_adapter(folder, {"q_proj": (U, V)}, base_model="gpt2")
    ...     X = read_adapters(folder)
    ...     np.array_equal(X[0]["q_proj"][0], U), X.layout.base_model
    (True, 'gpt2')
    """
    path = os.fspath(path)
    if base_model is not None and not isinstance(base_model, str):
        raise ValueError(f"base_model is {base_model!r}; pass a string or None.")
    if os.path.isfile(path):
        raise ValueError(f"path={path!r} is a file; name a folder.")
    if not isinstance(adapter, Mapping):
        raise TypeError(f"adapter is a {type(adapter).__name__}; pass one mapping, such as X[0].")
    if not adapter:
        raise ValueError("adapter has no module; pass one that has an update.")
    side: Mapping[str, NDArray[Any]] = {}
    default_base = None
    if isinstance(adapter, LoRAAdapter):
        default_base, side = adapter._layout.base_model, adapter.side
    [checked] = LoRACollection.from_factors([adapter])
    factors = {name: checked[name] for name in checked}
    if like is not None:
        tensors, paths, config = _like(os.fspath(like), factors, side)
    elif placeless := [name for name, vector in side.items() if vector.any()]:
        raise ValueError(
            f"the adapter has side features, such as {placeless[0]!r}, whose place only an "
            "adapter of the same kind tells; pass it as like=, or dict(adapter) to leave them out."
        )
    else:
        paths, config = {name: name.removeprefix(PREFIX) for name in factors}, {}
        tensors = _plain({paths[name]: pair for name, pair in factors.items()})
    _check_paths(paths)
    base_model = base_model or config.get("base_model_name_or_path") or default_base
    base_model_label(base_model)  # refuses what could not be read again
    ranks = {paths[name]: U.shape[1] for name, (U, _) in factors.items()}
    _check_attention(ranks)
    config = {**config, "base_model_name_or_path": base_model, **_scale_of_one(ranks)}
    _write(path, tensors, config)


def _write(path: str, tensors: Mapping[str, NDArray[Any]], config: Mapping[str, Any]) -> None:
    for name, tensor in tensors.items():
        check_tensor(name, tensor.shape)
    # All bytes are made before any file is opened; asarray, for numbers alone have no axis.
    weights = save(
        {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()},
        metadata={"format": "pt"},
    )
    text = json.dumps(config, indent=2).encode()
    with (
        complete_folder(path) as folder,
        replacing(os.path.join(folder, CONFIG)) as config_file,
        replacing(os.path.join(folder, WEIGHTS)) as weights_file,
    ):
        config_file.write(text)
        weights_file.write(weights)


def _check_paths(paths: Mapping[str, str]) -> None:
    """Check that no two names are of one module of the base model."""
    known: dict[str, str] = {}
    for name, path in paths.items():
        if known.setdefault(path, name) != name:
            raise ValueError(f"{known[path]!r} and {name!r} are one module to PEFT; leave one out.")


def _check_attention(ranks: Mapping[str, int]) -> None:
    """Check that both projections of a MultiheadAttention are there, in one rank."""
    for path, rank in ranks.items():
        owner = path.removesuffix(ATTENTION_OUT)
        if path != owner and ranks.get(owner) != rank:
            raise ValueError(
                f"module {path!r} has rank {rank}, and {owner!r} {ranks.get(owner, 'no update')}; "
                "PEFT adapts both in one rank: pad factors with zeros."
            )


def _plain(factors: Mapping[str, tuple[NDArray[Any], NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    tensors = {}
    for name, (U, V) in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = V.T
        tensors[f"{PREFIX}{name}.lora_B.weight"] = U
    return tensors


def _scale_of_one(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Give the settings by which every module has alpha = r, whatever else was configured."""
    largest = max(ranks.values())
    # Patterns match the end of a name and the first hit wins, so that longer names come first.
    mixed = len(set(ranks.values())) > 1
    pattern = {
        re.escape(path): ranks[path]
        for path in sorted(ranks, key=lambda path: (-len(path), path))
        if mixed
    }
    return {
        "peft_type": "LORA",
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "use_rslora": False,
        "init_lora_weights": True,
    }


def _like(
    path: str,
    factors: Mapping[str, tuple[NDArray[Any], NDArray[Any]]],
    side: Mapping[str, NDArray[Any]],
) -> tuple[dict[str, NDArray[Any]], dict[str, str], dict[str, Any]]:
    """Give tensors, paths of modules and configuration after an adapter of PEFT."""
    found = find_files(path)
    if len(found) != 1:
        raise AdapterError(path, f"there are {len(found)} adapters in it; name one file.")
    with opened(found[0], ReadOptions(names="raw")) as adapter:
        plan = adapter.plan
        config = read_config(found[0])
        methods = sorted({module.method for module in plan.modules})
        if plan.format != "peft" or config is None or methods != ["lora"]:
            raise AdapterError(
                path,
                f"it is no plain LoRA of PEFT, but {' and '.join(methods)} of {plan.format}; pass "
                "another like=, or none.",
            )
        if SAVED_WHOLE in {reason for _, reason in plan.left_out}:
            raise AdapterError(
                path,
                "it has factors in modules that were saved whole, which PEFT has left out since "
                "0.16; pass another like=, or none.",
            )
        known = _canonical({module.path: module for module in plan.modules})
        known |= {module.path.removeprefix(PREFIX): module for module in plan.modules}
        known |= {module.path: module for module in plan.modules}
        tensors, paths = _kept(adapter, side), {}
        for name, (U, V) in factors.items():
            if name not in known:
                theirs = first_of([canonical_name(module.path) for module in plan.modules])
                raise ValueError(
                    f"module {name!r} is not in {path!r}, which has {theirs}; leave it out, or "
                    "pass another like=."
                )
            paths[name] = known[name].path.removeprefix(PREFIX)
            tensors |= _shaped(adapter, known[name]._replace(name=name), U, V)
    return tensors, paths, dict(config)


def _kept(adapter: OpenAdapter, side: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Give the tensors that are no factors, with the side features that the new adapter has."""
    names = [tensor for tensor, _ in adapter.plan.left_out]
    names += [tensor for _, tensor, _ in adapter.plan.side]
    tensors = {name: adapter.file.read(name) for name in names}
    # PEFT scales the bias of B as well, by what is 1 from here on.
    scales = {module.path: adapter.scale(module.scale) for module in adapter.plan.modules}
    for name in names:
        path, _, ending = name.rpartition(".lora_B.")
        if path in scales and ending.split(".")[-1] == "bias":
            tensors[name] = tensors[name] * np.asarray(scales[path], tensors[name].dtype)
    places = {name: (tensor, size) for name, tensor, size in adapter.plan.side}
    places |= _canonical(places)
    for name, vector in side.items():
        tensor, size = places.get(name, ("", 0))
        if not size and not vector.any():
            continue  # one that other adapters of the collection have
        if len(vector) != size:
            raise ValueError(
                f"side feature {name!r} has {len(vector)} numbers, but {size} in {adapter.path!r}; "
                "pass another like=, or dict(adapter) to keep those of like=."
            )
        tensors[tensor] = vector.reshape(tensors[tensor].shape)
    return tensors


def _canonical(known: Mapping[str, T]) -> dict[str, T]:
    """Give what is known of modules, or of their side features, by canonical names of one each."""
    names: dict[str, list[str]] = {}
    for name in known:
        path = name.removesuffix(":magnitude_out").removesuffix(":magnitude_in")
        names.setdefault(canonical_name(path) + name[len(path) :], []).append(name)
    return {name: known[one] for name, [one, *others] in names.items() if not others}


def _shaped(
    adapter: OpenAdapter, module: ModulePlan, U: NDArray[Any], V: NDArray[Any]
) -> dict[str, NDArray[Any]]:
    """Give the tensors of one module, with the axes of a convolution where it is one."""
    if module.part != (0, 1):
        raise ValueError(
            f"module {module.name!r} is one of {module.part[1]} experts that share tensors in "
            f"{adapter.path!r}, which like= cannot write; leave experts out, or pass like=None."
        )
    if (len(U), len(V)) != (module.n, module.m):
        raise ValueError(
            f"module {module.name!r} has U {U.shape} and V {V.shape}, but its update is of shape "
            f"({module.n}, {module.m}) there."
        )
    down, up = module.tensors["down"], module.tensors["up"]
    rank = U.shape[1]
    down_shape = (rank, *adapter.file.tensors[down].shape[1:])
    up_shape = (module.n, rank, *adapter.file.tensors[up].shape[2:])
    return {down: V.T.reshape(down_shape), up: U.reshape(up_shape)}
