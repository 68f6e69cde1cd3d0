"""``sklora compare``: the five architectures on a labelled zoo, by cross-validation."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sklora.architectures import ARCHITECTURES
from sklora.cli._fit import check_output
from sklora.cli._output import FAILED, OK, CommandError, few, printable, result, say, table
from sklora.cli._reading import check_device
from sklora.cli._scoring import Evaluation, baseline, evaluate, make_folds, metric, score_rows
from sklora.cli._zoo import LabelledZoo, labelled_zoo

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NO_MATPLOTLIB = "no chart is drawn, for which matplotlib is missing: pip install 'sklora[plot]'"


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 if an architecture could not be trained."""
    check_device(args.device)
    draws = not args.no_chart and _can_draw(args.output)
    zoo = labelled_zoo(args)
    folds = make_folds(zoo, args.folds, args.seed)
    evaluations = evaluate(ARCHITECTURES, zoo, folds, args)
    label, _ = metric(zoo)
    constant = baseline(zoo)
    if args.json:
        result(json.dumps(_summary(args, zoo, evaluations), indent=2))
    else:
        rows = score_rows(evaluations, label)
        table([*rows, ("(constant)", f"{constant:.3f}", "", "")], "<>>>")
    if draws:
        draw(zoo, evaluations, args.output)
        say(f"{args.output} holds the chart")
    return OK if len(evaluations) == len(ARCHITECTURES) else FAILED


def _can_draw(path: str) -> bool:
    """Tell whether there is matplotlib; check that it can write such a file."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError:
        say(_NO_MATPLOTLIB)
        return False
    check_output(path)
    known = FigureCanvasBase.get_supported_filetypes()
    ending = os.path.splitext(path)[1].removeprefix(".").lower()
    if ending not in known:
        raise CommandError(f"{path}: a chart's name ends in one of {', '.join(sorted(known))}.")
    return True


def _summary(
    args: argparse.Namespace, zoo: LabelledZoo, evaluations: Sequence[Evaluation]
) -> dict[str, Any]:
    return {
        "task": zoo.targets.task,
        "targets": zoo.targets.names,
        "n_adapters": len(zoo.loras),
        "metric": metric(zoo)[0],
        "folds": args.folds,
        "grouped": zoo.groups is not None,
        "constant": baseline(zoo),
        "results": [
            {
                "architecture": one.architecture,
                "mean": one.mean,
                "spread": one.spread,
                "scores": one.scores.tolist(),
                "fit_seconds": one.fit_seconds,
            }
            for one in evaluations
        ],
    }


def draw(zoo: LabelledZoo, evaluations: Sequence[Evaluation], path: str) -> None:
    """Save a chart: a bar is the mean over the folds, a dot is one fold.

    Parameters
    ----------
    zoo : LabelledZoo
    evaluations : sequence of Evaluation
    path : str
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _draw_scores(axes, evaluations)
    constant = baseline(zoo)
    axes.axhline(constant, color="0.3", linewidth=1, linestyle="--")
    axes.text(1.01, constant, "constant", va="center", transform=axes.get_yaxis_transform())
    names = few(map(printable, zoo.targets.names), len(zoo.targets.names))
    axes.set_ylabel(metric(zoo)[0])
    axes.set_title(names, parse_math=False)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    n_folds = len(evaluations[0].scores)
    kind = "folds by group" if zoo.groups is not None else "folds"
    figure.suptitle(f"{len(zoo.loras)} adapters, {n_folds} {kind}")
    figure.savefig(path, dpi=150)


def _draw_scores(axes: Axes, evaluations: Sequence[Evaluation]) -> None:
    names = [one.architecture for one in evaluations]
    scores = np.array([one.scores for one in evaluations])
    axes.bar(names, scores.mean(axis=1), color="0.8", edgecolor="0.3")
    positions = np.repeat(np.arange(len(names)), scores.shape[1])
    axes.plot(positions, scores.ravel(), "o", color="tab:blue", markersize=4, alpha=0.8)
    for position, one in enumerate(evaluations):
        axes.annotate(
            f"{one.mean:.2f}".replace("-", "−"),
            (position, max(one.scores.max(), 0)),
            (0, 4),
            textcoords="offset points",
            ha="center",
        )
