"""``sklora fit``: train a model on a labelled zoo, and store it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from sklearn.pipeline import Pipeline

from sklora._files import check_place
from sklora._pipelines import layout_of
from sklora._saved import ModelCard, check_skops, columns_of, optional_parts, write_model
from sklora._untrusted import counted
from sklora.architectures import ARCHITECTURES, set_all
from sklora.cli._output import OK, CommandError, say
from sklora.cli._reading import check_device
from sklora.cli._scoring import (
    Evaluation,
    evaluate,
    make_folds,
    make_metric,
    new_model,
    show_scores,
)
from sklora.cli._zoo import LabelledZoo, labelled_zoo


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    _check(args)
    zoo = labelled_zoo(args)
    _check_columns(zoo)
    evaluations, scores = _evaluated(args, zoo)
    best = max(evaluations, key=lambda one: one.mean).architecture if evaluations else None
    architecture = best or args.architecture
    say(f"training {architecture} on all adapters")
    model = new_model(architecture, zoo, args).fit(zoo.loras, zoo.targets.y)
    _say_epochs(model)
    set_all(model, verbose=0)  # whoever loads it may be no person
    card = ModelCard(
        task=zoo.targets.task,
        targets=zoo.targets.names,
        classes=zoo.targets.classes,
        architecture=architecture,
        layout=layout_of(model),
        probabilities=hasattr(model, "predict_proba"),
        optional=optional_parts(zoo.loras),
        reading=zoo.reading,
        n_adapters=len(zoo.loras),
        scores=scores,
    )
    write_model(args.output, model, card)
    say(f"{args.output} holds the model")
    return OK


def _say_epochs(model: Pipeline) -> None:
    """Say which epoch was the best: one of the first says that too few adapters were held out."""
    history = model[-1].history_
    losses = [epoch["valid_loss"] for epoch in history if "valid_loss" in epoch]
    held_out = "too few adapters to hold some out"
    if losses:
        best = losses.index(min(losses)) + 1
        held_out = f"the loss on held-out adapters was lowest after epoch {best}"
    say(f"trained {counted(len(history), 'epoch')}; {held_out}")


def _check(args: argparse.Namespace) -> None:
    """Find out now what would fail after hours of training."""
    try:
        check_skops()
    except ModuleNotFoundError as error:
        raise CommandError(str(error)) from None
    if args.folds == 0 and args.architecture == "auto":
        raise CommandError("--architecture auto chooses by cross-validation; --folds cannot be 0.")
    check_device(args.device)
    check_output(args.output)


def check_output(path: str) -> None:
    """Check that a file can be written.

    Raises
    ------
    CommandError
        When it is a folder, device or pipe, there is no folder for it or no permission, or its name
        is too long.
    """
    if not path:
        raise CommandError("the name of the output is empty; name a file.")
    try:
        check_place(path, path)
    except (ValueError, OSError) as error:
        raise CommandError(str(error)) from None


def _check_columns(zoo: LabelledZoo) -> None:
    """Check that the columns that `predict` will write have different names."""
    targets = zoo.targets
    try:
        columns_of(targets.names, targets.classes, targets.task == "classification")
    except ValueError as error:
        raise CommandError(str(error)) from None


def _evaluated(
    args: argparse.Namespace, zoo: LabelledZoo
) -> tuple[Sequence[Evaluation], dict[str, Any] | None]:
    """Cross-validate, and give what the model file keeps of it."""
    if not args.folds:
        return (), None
    folds = make_folds(zoo, args.folds, args.seed)
    metric = make_metric(args.scoring, zoo, folds)
    names = ARCHITECTURES if args.architecture == "auto" else (args.architecture,)
    evaluations = evaluate(names, zoo, folds, metric, args)
    show_scores(evaluations, metric)
    return evaluations, {
        "metric": metric.name,
        "folds": args.folds,
        "grouped": zoo.groups is not None,
        "constant": metric.constant,
        "scores": {one.architecture: one.scores.tolist() for one in evaluations},
    }
