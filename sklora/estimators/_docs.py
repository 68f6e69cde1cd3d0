"""The parts of the estimators' docstrings that they share, with defaults read from signatures."""

from __future__ import annotations

import inspect
from string import Template
from typing import TypeVar

Estimator = TypeVar("Estimator", bound=type)

_GL_ARCHITECTURE = """hidden_dim : int, default=$hidden_dim
    Rows of ``U`` and ``V`` after every equivariant layer.
n_layers : int, default=$n_layers
    Number of equivariant layers; with one there is no gate.
nonlinearity : {"sign_relu", "sigmoid", "silu"}, default=$nonlinearity
    The gate between them, see :class:`~sklora.nets.GLNonlinearity`; ``"sign_relu"`` is the paper's.
head : {"flatten", "mean"}, default=$head
    The invariant features: every entry of every ``U V^T``, or the mean of each.
spectrum : bool, default=$spectrum
    Whether the singular values of every update join these features. Each module has as many as its
    rank in `layout_`: further ones are left out, missing ones are zero.
mlp_hidden : int or tuple of int, default=$mlp_hidden
    Widths of the hidden layers of the multilayer perceptron that reads these features.
dropout : float, default=$dropout
    Probability of dropping one of its hidden units in training.
"""

_MLP_ARCHITECTURE = """hidden_dim : int, default=$hidden_dim
    Width of the hidden layers.
n_layers : int, default=$n_layers
    Number of hidden layers; 0 gives a linear model.
nonlinearity : {"relu", "silu", "gelu", "tanh"}, default=$nonlinearity
    What follows every hidden layer.
dropout : float, default=$dropout
    Probability of dropping a hidden unit in training.
"""

_TRAINING = """lr : float, default=$lr
    Learning rate of the first epoch; it falls along half a cosine over `max_epochs`, unless an
    `LRScheduler` of skorch is among the `callbacks`.
weight_decay : float, default=$weight_decay
    Weight decay of the optimizer.
optimizer : {"adamw", "adam", "sgd"}, default=$optimizer
    The optimizer; ``"sgd"`` has Nesterov momentum 0.9.
max_epochs : int, default=$max_epochs
    Number of passes over the training adapters, at most.
batch_size : int, default=$batch_size
    Adapters in one step, or ``ceil(n / $least_steps)`` of ``n`` training adapters, if that is less.
early_stopping : bool or "auto", default=$early_stopping
    Whether to hold some adapters out, stop when the loss on them no longer falls, and go back to
    the weights of the best epoch. ``"auto"`` does this with 200 training adapters or more; with
    fewer, it trains on all. True holds none out where 10 would be over a third of all, and more
    than `validation_fraction`.
validation_fraction : float, default=$validation_fraction
    Share of the adapters to hold out, at least 10 adapters, stratified by target.
patience : int, default=$patience
    Epochs without progress that end the training.
callbacks : list of skorch callbacks, default=$callbacks
    As `skorch.NeuralNet` takes them, with or without names. Copied before use. The skorch net that
    they receive has this network as ``net.module_.net``, and a ``valid_loss`` in its history only
    if adapters are held out.
"""

_CLASS_WEIGHT = """class_weight : dict, list of dict or "balanced", default=$class_weight
    Weights of the classes in the loss. For multilabel targets a list of one dict for every label,
    with the weights of absence 0 and presence 1. ``"balanced"`` weighs by the inverse of the
    frequency, where each adapter counts by its `sample_weight`.
"""

_RUNNING = """warm_start : bool, default=$warm_start
    Whether `fit` goes on from the weights of the last fit.
device : str or torch.device, default=$device
    Where to train and predict; ``"auto"`` is CUDA if there is one, else the CPU.
random_state : int, RandomState instance or None, default=$random_state
    Seed of weights, order, dropout and validation rows. Torch's global generators are untouched.
verbose : int, default=$verbose
    With 1 there is a progress bar, if standard error is a terminal; 2 or more also prints a row for
    every epoch.
layout : LoRALayout, default=$layout
    What the columns of a 2-D array mean. With None, each row of the array is the update ``U V^T``
    of a single module, with ``U`` the row and ``V = 1``.
"""

_ATTRIBUTES = """weights_ : dict of ndarray
    Parameters and buffers of the network, by name.
architecture_ : dict
    Keyword arguments that rebuild the network.
net_ : torch.nn.Module
    The network in float64, made anew from `weights_` at each access.
layout_ : LoRALayout
    Modules, shapes and largest ranks of the `X` seen by `fit`; for a part of a collection, those of
    the whole.
n_features_in_ : int
    Width of a flat row.
feature_names_in_ : ndarray of shape (`n_features_in_`,)
    Column names, if `X` was a data frame with string names.
n_outputs_ : int
    Number of outputs of the network.
n_iter_ : int
    Number of epochs trained.
history_ : list of dict
    Losses and times of every epoch.
optimizer_state_ : dict of ndarray
    After `partial_fit`, the optimizer's moments.
"""

_CLASSES = """classes_ : ndarray of shape (n_classes,)
    The classes; for multilabel targets the numbers of the labels.
multilabel_ : bool
    Whether the targets were an indicator matrix.
"""

_TARGETS = """target_mean_, target_scale_ : ndarray of shape () or (n_targets,)
    Mean and scale by which the targets are standardised inside.
"""

_FRAGMENTS = {
    "gl_architecture": _GL_ARCHITECTURE,
    "mlp_architecture": _MLP_ARCHITECTURE,
    "training": _TRAINING,
    "class_weights": _CLASS_WEIGHT,
    "running": _RUNNING,
    "attributes": _ATTRIBUTES,
    "classes": _CLASSES,
    "targets": _TARGETS,
}


def document(estimator: Estimator) -> Estimator:
    """Fill the shared parts into a class docstring, where it says ``$training`` and the like.

    Parameters
    ----------
    estimator : type
        A class with defaults in its signature.

    Returns
    -------
    type
        The same class.
    """
    if estimator.__doc__ is None:  # python -OO
        return estimator
    parameters = inspect.signature(estimator).parameters
    defaults = {name: _literal(parameter.default) for name, parameter in parameters.items()}
    defaults["least_steps"] = _literal(getattr(estimator, "_least_steps", None))
    text = Template(inspect.cleandoc(estimator.__doc__))
    fragments = {name: fragment.rstrip() for name, fragment in _FRAGMENTS.items()}
    estimator.__doc__ = Template(text.safe_substitute(fragments)).substitute(defaults)
    return estimator


def _literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)
