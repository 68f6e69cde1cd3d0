"""scan_adapters: what files hold, and what is wrong with them, from their headers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from sklora._progress import track
from sklora.io._adapter import OpenAdapter, opened
from sklora.io._errors import AdapterError
from sklora.io._find import Found, Paths, find_each
from sklora.io._plan import LeftOut, ReadOptions
from sklora.io._read import read_options


class ScannedModule(NamedTuple):
    """One update that a file holds.

    Attributes
    ----------
    name : str
        What a collection calls it.
    path : str
        What the file calls it.
    method : str
        How it is written: "lora", "loha", "lokr", ...
    n, m, rank : int
        Of its factors ``U (n, rank)`` and ``V (m, rank)``.
    scale : float
        The factor s of the update ``s B A``.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from sklora.io import scan_adapters, write_adapter
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_adapter(folder, {"q_proj": (np.ones((8, 2)), np.ones((6, 2)))})
    ...     [report] = scan_adapters(folder)
    >>> [module] = report.modules
    >>> module.name, module.method, module.n, module.m, module.rank, module.scale
    ('q_proj', 'lora', 8, 6, 2, 1.0)
    """

    name: str
    path: str
    method: str
    n: int
    m: int
    rank: int
    scale: float


# Adapters of one zoo have the same modules, which are kept but once.
_module = lru_cache(maxsize=2**14)(ScannedModule)


@dataclass(frozen=True)
class AdapterReport:
    """What one file holds.

    Attributes
    ----------
    path : str
    error : str or None
        Why it cannot be read; the rest is then empty.
    format, container : str or None
        Who wrote it, and in what kind of file.
    base_model : str or None
        A label, as the trainer wrote it.
    dtypes : tuple of str
        How its factors are stored.
    modules : tuple of ScannedModule
    side : tuple of (str, int)
        Side features, and how many numbers they are.
    left_out : tuple of (str, str)
        Tensors that are not read, and why.

    Examples
    --------
    >>> from sklora.io import scan_adapters
    >>> [report] = scan_adapters("nowhere.safetensors")
    >>> report.error
    'it cannot be opened: No such file or directory.'
    >>> report.modules
    ()
    """

    path: str
    error: str | None = None
    format: str | None = None
    container: str | None = None
    base_model: str | None = None
    dtypes: tuple[str, ...] = ()
    modules: tuple[ScannedModule, ...] = ()
    side: tuple[tuple[str, int], ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur."""
        return tuple(sorted({module.rank for module in self.modules}))

    @property
    def scales(self) -> tuple[float, ...]:
        """The scales that occur."""
        return tuple(sorted({module.scale for module in self.modules}))

    def to_dict(self) -> dict[str, Any]:
        """Give the report as dicts, lists, strings and numbers, for JSON.

        Returns
        -------
        dict
            From the name of every attribute to what it holds.
        """
        return {
            **vars(self),
            "dtypes": list(self.dtypes),
            "modules": [module._asdict() for module in self.modules],
            "side": [list(side) for side in self.side],
            "left_out": [list(left_out) for left_out in self.left_out],
        }


def scan_adapters(
    paths: Paths,
    *,
    names: Literal["canonical", "raw"] = "canonical",
    keys: tuple[str, str] | None = None,
    scale: float | None = None,
    lokr: Literal["exact", "kronecker"] = "exact",
    allow_torch_zip: bool = False,
    verbose: int = 0,
) -> list[AdapterReport]:
    """Report what adapter files hold, from their headers.

    Parameters
    ----------
    paths : str, path-like, or iterable of them
        As for `read_adapters`.
    names, keys, scale, lokr, allow_torch_zip, verbose
        As for `read_adapters`.

    Returns
    -------
    list of AdapterReport
        One for each file, in the order of the paths. What is wrong with a file, or with a path, is
        in its `error`.

    Raises
    ------
    ValueError
        When an argument has no such choice.

    See Also
    --------
    read_adapters : Reads them.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np
    >>> from sklora.io import scan_adapters, write_adapter
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_adapter(folder, {"q_proj": (np.ones((8, 2)), np.ones((6, 2)))})
    ...     [report] = scan_adapters(folder)
    >>> report.format, report.ranks, report.scales, report.dtypes
    ('peft', (2,), (1.0,), ('F64',))
    """
    options = read_options(names, keys, scale, lokr, allow_torch_zip)
    files = list(find_each(paths))
    return [_scanned(found, options) for found in track(files, "headers", "file", verbose)]


def _scanned(found: Found | AdapterError, options: ReadOptions) -> AdapterReport:
    try:
        if isinstance(found, AdapterError):
            raise found
        with opened(found, options) as adapter:
            return _report(found.path, adapter)
    except AdapterError as error:
        return AdapterReport(error.path, error.reason)


def _report(path: str, adapter: OpenAdapter) -> AdapterReport:
    plan = adapter.plan
    modules = [
        _module(one.name, one.path, one.method, one.n, one.m, one.rank, adapter.scale(one.scale))
        for one in plan.modules
    ]
    return AdapterReport(
        path,
        None,
        plan.format,
        adapter.file.container,
        plan.base_model,
        adapter.stored_dtypes(),
        tuple(modules),
        tuple((name, size) for name, _, size in plan.side),
        plan.left_out,
    )
