"""scan_adapters: what files hold, and what is wrong with them, from their headers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from sklora.io._adapter import OpenAdapter, opened
from sklora.io._errors import AdapterError
from sklora.io._find import Found, Paths, find_files
from sklora.io._plan import LeftOut
from sklora.io._read import read_options


@dataclass(frozen=True)
class ScannedModule:
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
    """

    name: str
    path: str
    method: str
    n: int
    m: int
    rank: int
    scale: float


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
        """Give the report as dicts, lists, strings and numbers, for JSON."""
        return asdict(self)


def scan_adapters(
    paths: Paths,
    *,
    names: Literal["canonical", "raw"] = "canonical",
    keys: tuple[str, str] | None = None,
    scale: float | None = None,
    lokr: Literal["exact", "kronecker"] = "exact",
    allow_torch_zip: bool = False,
) -> list[AdapterReport]:
    """Report what adapter files hold, from their headers.

    Parameters
    ----------
    paths : str, path-like, or iterable of them
        As for `read_adapters`.
    names, keys, scale, lokr, allow_torch_zip
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
    if isinstance(paths, (str, bytes)) or not hasattr(paths, "__iter__"):
        paths = [paths]  # type: ignore[list-item]
    reports = []
    for path in paths:
        try:
            files = find_files(path)
        except AdapterError as error:
            reports.append(AdapterReport(error.path, error.reason))
            continue
        reports += [_scan(found, options) for found in files]
    return reports


def _scan(found: Found, options: Any) -> AdapterReport:
    try:
        with opened(found, options) as adapter:
            return _report(found.path, adapter)
    except AdapterError as error:
        return AdapterReport(found.path, error.reason)


def _report(path: str, adapter: OpenAdapter) -> AdapterReport:
    plan = adapter.plan
    modules = [
        ScannedModule(
            module.name,
            module.path,
            module.method,
            module.n,
            module.m,
            module.rank,
            adapter.scale(module.scale),
        )
        for module in plan.modules
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
