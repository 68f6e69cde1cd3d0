"""GL-nets as programs that need no sklora: torch.export and ONNX."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

import sklora
from sklora._base import plain_torch
from sklora._files import check_place, replacing
from sklora._untrusted import shown
from sklora.collection import LoRACollection, LoRALayout, check_loras
from sklora.estimators import GLNetClassifier, GLNetRegressor
from sklora.estimators.glnet import singular_values

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

GLNetEstimator = GLNetClassifier | GLNetRegressor
Factors = Mapping[str, tuple[Tensor, Tensor]]

_NO_ONNX = "ONNX files need onnx and onnxscript, and {} is missing: pip install 'sklora[onnx]'."


class _Unscale(nn.Module):
    """From outputs of the network to a regressor's predictions."""

    mean: Tensor
    scale: Tensor

    def __init__(self, estimator: GLNetRegressor) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(estimator.target_mean_))
        self.register_buffer("scale", torch.tensor(estimator.target_scale_))

    def forward(self, outputs: Tensor) -> Tensor:
        outputs = outputs * self.scale + self.mean
        return outputs if self.mean.ndim else outputs[:, 0]


class _Program(nn.Module):
    """From factors by name to probabilities or predictions."""

    def __init__(self, estimator: GLNetEstimator) -> None:
        super().__init__()
        layout = estimator.layout_
        self.layout = layout
        self.groups = [[layout.names[i] for i in group.index] for group in layout.groups]
        self.net = estimator._fitted_net(torch.float64)
        if isinstance(estimator, GLNetRegressor):
            self.decode: nn.Module = _Unscale(estimator)
        else:
            self.decode = nn.Sigmoid() if estimator.multilabel_ else nn.Softmax(dim=1)
        self.eval().requires_grad_(False)

    def forward(self, factors: Factors, side: Tensor | None = None) -> Tensor:
        # Contiguous, because the network's way with flat rows depends on the number of adapters.
        pairs = [
            tuple(
                torch.stack([factors[name][which] for name in names]).transpose(1, 2).contiguous()
                for which in (0, 1)
            )
            for names in self.groups
        ]
        spectra = self._spectra(pairs) if self.net.spectrum else None
        outputs: Tensor = self.decode(self.net(pairs, side, spectra))
        return outputs

    def _spectra(self, pairs: list[tuple[Tensor, ...]]) -> Tensor:
        # Zeros change no singular value. With more rows than columns, and at least two columns, one
        # program serves all ranks: torch makes a case of each comparison that it cannot decide.
        tall = [
            tuple(nn.functional.pad(A, (0, 1, 0, 0, 0, A.shape[-1])) for A in pair)
            for pair in pairs
        ]
        return singular_values(tall, self.layout)


def program_inputs(estimator: GLNetEstimator, X: LoRACollection | ArrayLike) -> tuple[Any, ...]:
    """Give adapters as the program of `export_program` takes them.

    Parameters
    ----------
    estimator : GLNetClassifier or GLNetRegressor
        Fitted.
    X : LoRACollection or array-like of shape (n_adapters, width)

    Returns
    -------
    factors : dict of {module: (U, V)}
        Tensors ``U (B, n, r)`` and ``V (B, m, r)`` in float64, on the CPU. One rank ``r`` serves
        all modules: the largest of `X`. What is smaller, or missing, is padded with zeros.
    side : Tensor of shape (B, n_side)
        The side features; only where the layout has some.

    Raises
    ------
    ValueError
        When `X` does not match what the estimator was fitted on.

    Examples
    --------
    >>> import numpy as np
    >>> from sklora import GLNetRegressor, LoRACollection, LoRALayout
    >>> from sklora.deployment import program_inputs
    >>> layout = LoRALayout([("q", 3, 2, 1), ("v", 4, 2, 2)])
    >>> flat = np.random.default_rng(0).normal(size=(12, layout.width))
    >>> X = LoRACollection.from_array(flat, layout)
    >>> model = GLNetRegressor(max_epochs=1, device="cpu").fit(X, flat[:, 0])
    >>> (factors,) = program_inputs(model, X)
    >>> {module: (tuple(U.shape), tuple(V.shape)) for module, (U, V) in factors.items()}
    {'q': ((12, 3, 2), (12, 2, 2)), 'v': ((12, 4, 2), (12, 2, 2))}
    """
    check_is_fitted(estimator, "weights_")
    loras = check_loras(estimator, X, reset=False, rank="any")
    layout = loras.layout
    if not layout.has_plain_rows:  # whose rank is 1
        layout = layout.with_ranks([max(layout.ranks)] * layout.n_modules)
    flat = loras.with_layout(layout).read(copy=False).astype(np.float64)
    factors = {
        name: tuple(map(torch.from_numpy, layout._factors_at(flat, place)))
        for place, name in enumerate(layout.names)
    }
    return (factors, torch.from_numpy(flat[:, layout.side_slice])) if layout.n_side else (factors,)


def export_program(estimator: GLNetEstimator) -> torch.export.ExportedProgram:
    """Turn a fitted GL-net into a program of torch.export, which needs no sklora.

    Batch and rank are free. The program is in float64, as predictions of the estimator are, and on
    the CPU.

    Parameters
    ----------
    estimator : GLNetClassifier or GLNetRegressor
        Fitted.

    Returns
    -------
    torch.export.ExportedProgram
        Of ``(factors)``, or ``(factors, side)`` where the layout has side features, as
        :func:`program_inputs` gives them. The result is that of ``predict_proba``, ``(B,
        n_classes)`` or ``(B, n_labels)``, or of a regressor's ``predict``.

    Raises
    ------
    TypeError
        When `estimator` is neither.
    sklearn.exceptions.NotFittedError
        When it is not fitted.
    ValueError
        When the name of a module has a quote in it, by which a file could have code run.

    Notes
    -----
    The program checks shapes, and neither scales nor base models: that is up to who reads the
    adapters. Weights have to be finite.

    Examples
    --------
    >>> import numpy as np
    >>> from sklora import GLNetClassifier
    >>> from sklora.deployment import export_program, program_inputs
    >>> X = np.random.default_rng(0).normal(size=(20, 3))
    >>> model = GLNetClassifier(max_epochs=1, device="cpu").fit(X, X[:, 0] > 0)
    >>> program = export_program(model)
    >>> probabilities = program.module()(*program_inputs(model, X[:5]))
    >>> np.allclose(probabilities, model.predict_proba(X[:5]))
    True
    """
    if not isinstance(estimator, (GLNetClassifier, GLNetRegressor)):
        raise TypeError(
            f"estimator is of type {type(estimator).__name__}, but programs are made of a fitted "
            "GLNetClassifier or GLNetRegressor; of a gl-net pipeline, pass pipeline['model']."
        )
    check_is_fitted(estimator, "weights_")
    layout = estimator.layout_
    _check_names(layout)
    with plain_torch("cpu"):
        program = _Program(estimator)
        return torch.export.export(program, _example(layout), dynamic_shapes=_free(layout))


def export_onnx(estimator: GLNetEstimator, path: str | os.PathLike[str]) -> None:
    """Write a fitted GL-net as an ONNX file, which needs neither sklora nor torch.

    The file appears under its name when it is complete.

    Parameters
    ----------
    estimator : GLNetClassifier or GLNetRegressor
        Fitted.
    path : str or path-like

    Raises
    ------
    ModuleNotFoundError
        When onnx or onnxscript is missing.
    TypeError, sklearn.exceptions.NotFittedError
        As for :func:`export_program`.
    ValueError
        As for :func:`export_program`, when `estimator` was fitted with ``spectrum=True``, and when
        `path` is a folder.
    OSError
        When the file cannot be written.

    Notes
    -----
    Inputs are named ``<module>:U (batch, n, rank)`` and ``<module>:V (batch, m, rank)``, in the
    order of the layout's modules, and then ``side (batch, n_side)`` where the layout has side
    features; all are of float64. The output is ``probabilities`` or ``predictions``. The metadata
    has ``sklora_version``, ``base_model`` and, for single-label classification, ``classes`` as
    JSON.

    Torch rounds constants to float32 on the way, so that gates, which nets of one layer do not
    have, differ in the eighth digit.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from sklora import GLNetRegressor
    >>> from sklora.deployment import export_onnx
    >>> X = np.random.default_rng(0).normal(size=(20, 3))
    >>> model = GLNetRegressor(max_epochs=1, device="cpu").fit(X, X[:, 0])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_onnx(model, f"{folder}/model.onnx")
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_NO_ONNX.format(error.name)) from None
    check_place(path, f"path={os.fspath(path)!r}")
    if getattr(estimator, "architecture_", {}).get("spectrum"):
        raise ValueError(
            "spectrum is True, but ONNX has no singular value decomposition. Use export_program, "
            "or fit with spectrum=False."
        )
    program = export_program(estimator)
    layout = estimator.layout_
    names = [f"{module}:{letter}" for module in layout.names for letter in "UV"]
    output = "predictions" if isinstance(estimator, GLNetRegressor) else "probabilities"
    with warnings.catch_warnings():
        # Of torch about itself, and that one name of an axis is enough for all that are equal.
        warnings.simplefilter("ignore")
        converted = torch.onnx.export(
            program,
            dynamo=True,
            dynamic_shapes=_free(layout),
            custom_translation_table={torch.ops.aten.silu.default: _silu},
            input_names=[*names, "side"] if layout.n_side else names,
            output_names=[output],
            verbose=False,
        )
    assert converted is not None
    converted.model.metadata_props.update(_metadata(estimator))
    with replacing(os.path.realpath(path)) as file:
        file.write(converted.model_proto.SerializeToString())


def _silu(scalar: Any) -> Any:
    """``s * sigmoid(s)`` in ONNX, as onnxruntime before 1.31 fails on in float64.

    It puts the two together in an operation that it has for float32 alone.
    """
    from onnxscript import opset18 as op

    one: Any = op.Constant(value_float=1.0)
    return op.Div(scalar, op.Add(op.Exp(op.Neg(scalar)), op.CastLike(one, scalar)))


def _check_names(layout: LoRALayout) -> None:
    """Refuse names that torch takes for code, which it writes between quotes."""
    for name in layout.names:
        if "'" in name or '"' in name:
            raise ValueError(
                f"module {shown(name)} has a quote in its name, and torch would run what is behind "
                "it as code. Fit on a layout without that module, or with another name for it."
            )


def _example(layout: LoRALayout) -> tuple[Any, ...]:
    """Give inputs to trace with; torch would take a size of 1 for a constant."""
    factors = {
        module.name: (torch.zeros(3, module.n, 2).double(), torch.zeros(3, module.m, 2).double())
        for module in layout.modules
    }
    return (factors, torch.zeros(3, layout.n_side).double()) if layout.n_side else (factors,)


def _free(layout: LoRALayout) -> tuple[Any, ...]:
    """Say which dimensions of the inputs are free."""
    batch, rank = torch.export.Dim("batch", min=1), torch.export.Dim("rank", min=1)
    factor = {0: batch, 2: rank}
    factors = dict.fromkeys(layout.names, (factor, factor))
    return (factors, {0: batch}) if layout.n_side else (factors,)


def _metadata(estimator: GLNetEstimator) -> dict[str, str]:
    metadata = {"sklora_version": sklora.__version__}
    if estimator.layout_.base_model is not None:
        metadata["base_model"] = estimator.layout_.base_model
    if isinstance(estimator, GLNetClassifier) and not estimator.multilabel_:
        metadata["classes"] = json.dumps(estimator.classes_.tolist(), default=str)
    return metadata
