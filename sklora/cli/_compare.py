"""``sklora compare``: the five architectures on a labelled zoo, by cross-validation."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from sklora._untrusted import few
from sklora.architectures import ARCHITECTURES
from sklora.cli._fit import check_output
from sklora.cli._output import FAILED, OK, CommandError, printable, result, say
from sklora.cli._reading import check_device
from sklora.cli._scoring import Evaluation, Metric, evaluate, make_folds, make_metric, show_scores
from sklora.cli._zoo import LabelledZoo, labelled_zoo

_NO_MATPLOTLIB = "no chart is drawn, for which matplotlib is missing: pip install 'sklora[plot]'"


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 if an architecture could not be trained."""
    check_device(args.device)
    draws = not args.no_chart and _can_draw(args.output)
    zoo = labelled_zoo(args)
    folds = make_folds(zoo, args.folds, args.seed)
    metric = make_metric(args.scoring, zoo, folds)
    evaluations = evaluate(ARCHITECTURES, zoo, folds, metric, args)
    if args.json:
        result(json.dumps(_summary(args, zoo, metric, evaluations), indent=2))
    else:
        show_scores(evaluations, metric)
    if draws:
        draw(zoo, metric, evaluations, args.output)
        say(f"{args.output} holds the chart")
    return OK if len(evaluations) == len(ARCHITECTURES) else FAILED


def _can_draw(path: str) -> bool:
    """Tell whether there is matplotlib; check that it can write such a file."""
    from sklora.inspection._plotting import ending_of

    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError:
        say(_NO_MATPLOTLIB)
        return False
    check_output(path)
    known = FigureCanvasBase.get_supported_filetypes()
    if ending_of(path) not in known:
        raise CommandError(f"{path}: a chart's name ends in one of {', '.join(sorted(known))}.")
    return True


def _summary(
    args: argparse.Namespace, zoo: LabelledZoo, metric: Metric, evaluations: Sequence[Evaluation]
) -> dict[str, Any]:
    return {
        "task": zoo.targets.task,
        "targets": zoo.targets.names,
        "n_adapters": len(zoo.loras),
        "metric": metric.name,
        "folds": args.folds,
        "grouped": zoo.groups is not None,
        "constant": metric.constant,
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


def draw(zoo: LabelledZoo, metric: Metric, evaluations: Sequence[Evaluation], path: str) -> None:
    """Save a chart of the scores.

    Parameters
    ----------
    zoo : LabelledZoo
    metric : Metric
    evaluations : sequence of Evaluation
    path : str
    """
    from sklora.inspection import ArchitectureComparisonDisplay
    from sklora.inspection._plotting import save_figure, windowless_axes

    task = few(map(printable, zoo.targets.names))
    display = ArchitectureComparisonDisplay(
        scores={task: {one.architecture: one.scores for one in evaluations}},
        fit_times={task: {one.architecture: one.fit_seconds for one in evaluations}},
        score_name=metric.name,
        baseline={task: metric.constant},
    ).plot(windowless_axes("sklora compare", (6.5, 1.6 + 0.4 * len(evaluations))))
    n_folds = len(evaluations[0].scores)
    kind = "folds by group" if zoo.groups is not None else "folds"
    display.figure_.suptitle(f"{len(zoo.loras)} adapters, {n_folds} {kind}")
    save_figure(display.figure_, path)
