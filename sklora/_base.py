"""What every part shares: a fit that fails without a trace, choices of an option and a device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

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

    if device.type == "cpu":
        return True
    accelerator = getattr(torch, device.type, None)
    if accelerator is None or not hasattr(accelerator, "device_count"):
        return False
    return (device.index or 0) < int(accelerator.device_count())


def as_tensor(block: NDArray[Any]) -> torch.Tensor:
    """Give an array as a tensor that shares its memory, or as a copy if it is read-only."""
    import torch

    return torch.from_numpy(block if block.flags.writeable else block.copy())


def check_option(name: str, value: object, options: Iterable[str]) -> None:
    """Raise a ValueError that names the argument, its value and the choice, unless it is one."""
    options = tuple(options)
    if value not in options:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, options))}.")
