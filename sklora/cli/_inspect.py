"""``sklora inspect``: what adapter files hold."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from sklora.cli._output import FAILED, OK, result, table, with_options
from sklora.cli._reading import reading_options
from sklora.io import AdapterReport, scan_adapters

_HEADINGS = (
    "path",
    "format",
    "modules",
    "rank",
    "scale",
    "dtype",
    "base model",
    "side",
    "left out",
)
_ALIGN = "<<>><<<>>"


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 if there is anything wrong with any file."""
    reports = scan_adapters(args.paths, **vars(reading_options(args)), verbose=1)
    if args.json:
        entries = [report.to_dict() for report in reports]
        for entry in entries:
            entry["error"] = entry["error"] and with_options(entry["error"])
        result(json.dumps(entries, indent=2))
    else:
        good = [report for report in reports if report.error is None]
        if good:
            table([_HEADINGS, *map(_cells, good)], _ALIGN)
        bad = [report for report in reports if report.error is not None]
        if good and bad:
            result("")
        if bad:
            table([("path", "error"), *((r.path, with_options(r.error or "")) for r in bad)], "<<")
    return FAILED if any(report.error is not None for report in reports) else OK


def _cells(report: AdapterReport) -> tuple[str, ...]:
    return (
        report.path,
        report.format or "",
        str(len(report.modules)),
        _summary(report.ranks),
        _summary(report.scales),
        ",".join(report.dtypes),
        report.base_model or "-",
        str(len(report.side)),
        str(len(report.left_out)),
    )


def _summary(numbers: Sequence[float]) -> str:
    """Give a few sorted numbers, or the least and the largest of many."""
    texts = [f"{number:.4g}" for number in numbers]
    return ",".join(texts) if len(texts) <= 3 else f"{texts[0]}..{texts[-1]}"
