"""What every part shares: fits that fail without a trace, versions in files, options, a device."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import sklora
from sklora._untrusted import counted, shown

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

Self = TypeVar("Self")
P = ParamSpec("P")
T = TypeVar("T")


def atomic_fit(
    method: Callable[Concatenate[Self, P], T],
) -> Callable[Concatenate[Self, P], T]:
    """Make a method leave its object as it was when it raises.

    Parameters
    ----------
    method : callable
        A method such as `fit` or `partial_fit` that sets attributes of its object. It is to bind
        new values, not to change old ones in place: attributes are put back, not what they hold.

    Returns
    -------
    callable
        The method. When it raises anything, an interrupt included, the attributes of its object are
        again those of before the call, and the exception goes on.

    Examples
    --------
    >>> from sklora._base import atomic_fit
    >>> class Mean:
    ...     @atomic_fit
    ...     def fit(self, X):
    ...         self.n_ = len(X)
    ...         self.mean_ = sum(X) / self.n_
    ...         return self
    >>> mean = Mean().fit([1.0, 2.0])
    >>> mean.fit([])
    Traceback (most recent call last):
    ZeroDivisionError: ...
    >>> mean.n_
    2
    """

    @functools.wraps(method)
    def wrapper(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> T:
        before = vars(self).copy()
        try:
            return method(self, *args, **kwargs)
        except BaseException:
            vars(self).clear()
            vars(self).update(before)
            raise

    return wrapper


class VersionWarning(UserWarning):
    """A model was stored by another minor version of sklora than the one that loads it.

    Examples
    --------
    Refuse such a model:

    >>> import pickle, warnings
    >>> from sklora import SVDSpectrum
    >>> from sklora.deployment import VersionWarning
    >>> stored = pickle.dumps(SVDSpectrum())
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", VersionWarning)
    ...     pickle.loads(stored)
    SVDSpectrum()
    """


class VersionedState:
    """Puts sklora's version into whatever stores an estimator: joblib, pickle and skops.

    Scikit-learn does the same for its own estimators, and for no others. The version is part of the
    state, not an attribute. This class goes to the left of `BaseEstimator`.
    """

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = {**super().__getstate__()}  # type: ignore[dict-item]
        state["_sklora_version"] = sklora.__version__
        if "_metadata_request" in state:
            # It refers back to the estimator, a circle that skops cannot store.
            state["_metadata_request"] = state["_metadata_request"]._serialize()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = state.copy()
        version = state.pop("_sklora_version", "unknown")
        warn_of_version(f"{type(self).__name__}{_fitted_on(state.get('layout_'))}", version)
        requests = state.pop("_metadata_request", {})
        super().__setstate__(state)  # type: ignore[misc]
        if requests:
            routing = self.get_metadata_routing()  # type: ignore[attr-defined]
            for method, by_name in requests.items():
                for name, alias in by_name.items():
                    getattr(routing, method).add_request(param=name, alias=alias)
            self._metadata_request = routing


def warn_of_version(what: str, version: object) -> None:
    """Warn when a version of sklora that stored something has another minor version than this."""
    if str(version).split(".")[:2] != sklora.__version__.split(".")[:2]:
        warnings.warn(
            f"{what} was stored by sklora {shown(version, 40)}, and this is {sklora.__version__}; "
            "if predictions differ, fit again.",
            VersionWarning,
            stacklevel=3,
        )


def _fitted_on(layout: Any) -> str:
    if layout is None:
        return ""
    if layout.has_plain_rows:
        return f", fitted on rows of {layout.width} columns,"
    base_model = "" if layout.base_model is None else f"base model {layout.base_model!r}, "
    return f", fitted on {base_model}{counted(layout.n_modules, 'module')},"


def resolve_device(device: str | torch.device) -> torch.device:
    """Turn the parameter `device` of an estimator into a device that exists.

    Parameters
    ----------
    device : str or torch.device
        ``"auto"`` is CUDA where there is a CUDA device, else the CPU. Anything else is a device of
        torch, such as ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.

    Returns
    -------
    torch.device

    Raises
    ------
    ValueError
        When torch knows no such device, or this machine has none.

    Examples
    --------
    >>> from sklora._base import resolve_device
    >>> resolve_device("cpu")
    device(type='cpu')
    >>> resolve_device("abacus")
    Traceback (most recent call last):
    ValueError: device='abacus' is not a device of torch; pass 'auto', 'cpu', 'cuda' or 'cuda:0'.
    """
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device={device!r} is not a device of torch; pass 'auto', 'cpu', 'cuda' or 'cuda:0'."
        ) from None
    if not _exists(resolved):
        raise ValueError(
            f"device={str(device)!r} does not exist on this machine; "
            "pass device='auto' to use CUDA only where there is one, or 'cpu'."
        )
    return resolved


def _exists(device: torch.device) -> bool:
    import torch

    kind: Any = getattr(torch, device.type, None)  # such as torch.cpu
    return hasattr(kind, "device_count") and (device.index or 0) < int(kind.device_count())


@contextmanager
def plain_torch(device: torch.device | str) -> Iterator[None]:
    """Undo, inside the block, what surrounds it: modes of autograd, autocast and a default device.

    Parameters
    ----------
    device : torch.device or str
        Where to compute.
    """
    import torch

    default = torch.get_default_device()
    # Only where it is needed, as it takes a little of each call of torch.
    cpu = nullcontext() if default.type == "cpu" else torch.device("cpu")
    autocast = torch.autocast(torch.device(device).type, enabled=False)
    # Around a whole training, autocast would compute with the first weights until the end.
    with torch.inference_mode(False), autocast, cpu:
        yield


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Have torch draw float32 inside the block: in another dtype, one seed draws other numbers."""
    import torch

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def as_tensor(block: NDArray[Any]) -> torch.Tensor:
    """Give an array as a tensor that shares its memory, or as a copy if that cannot be.

    Either way its numbers are in the order in memory that they had: products depend on it, in the
    last digit and in their time.
    """
    import torch

    even = all(stride >= 0 and stride % block.itemsize == 0 for stride in block.strides)
    return torch.from_numpy(block if even and block.flags.writeable else block.copy("K"))


def empty(
    shape: int | Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Give a tensor whose numbers are to be written, fit for a large one.

    On a CPU it is in memory of NumPy, which asks the system for it in large pages. Torch does not:
    to find its memory, page by page, can take longer than to write to it.

    Parameters
    ----------
    shape : int or sequence of int
    dtype : torch.dtype
        One that NumPy has.
    device : torch.device or str, default="cpu"

    Returns
    -------
    torch.Tensor

    Examples
    --------
    >>> import torch
    >>> from sklora._base import empty
    >>> empty((2, 3), torch.float64).shape
    torch.Size([2, 3])
    """
    import numpy as np
    import torch

    if torch.device(device).type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(
        np.empty(shape, torch.empty(0, dtype=dtype, device="cpu").numpy().dtype)
    )


def check_option(name: str, value: object, options: Iterable[str]) -> None:
    """Raise a ValueError that names the argument, its value and the choice, unless it is one."""
    options = tuple(options)
    if value not in options:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, options))}.")


def send(block: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Give an array as a tensor on a device: on the CPU as by :func:`as_tensor`, elsewhere a copy.

    To CUDA it goes through pinned memory, without waiting for it to arrive: what is done there
    starts afterwards.

    Parameters
    ----------
    block : ndarray
    device : torch.device

    Returns
    -------
    torch.Tensor

    Examples
    --------
    >>> import numpy as np
    >>> import torch
    >>> from sklora._base import send
    >>> send(np.arange(3), torch.device("cpu"))
    tensor([0, 1, 2])
    """
    tensor = as_tensor(block)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
