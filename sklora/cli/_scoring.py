"""Cross-validation of architectures, on the same folds for all."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.exceptions import UndefinedMetricWarning
from sklearn.metrics import make_scorer
from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold, cross_validate
from sklearn.pipeline import Pipeline

from sklora._progress import track
from sklora._untrusted import counted
from sklora.architectures import make_architecture
from sklora.cli._output import FAILED, CommandError, say, table
from sklora.cli._zoo import LabelledZoo

Folds = list[tuple[NDArray[np.intp], NDArray[np.intp]]]


class Evaluation(NamedTuple):
    """How one architecture did.

    Attributes
    ----------
    architecture : str
    scores : ndarray of shape (n_folds,)
    fit_seconds : float
        Mean over the folds.
    """

    architecture: str
    scores: NDArray[np.float64]
    fit_seconds: float

    @property
    def mean(self) -> float:
        """Mean score."""
        return float(self.scores.mean())

    @property
    def spread(self) -> float:
        """Standard deviation of the scores."""
        return float(self.scores.std(ddof=1))


class Metric(NamedTuple):
    """What architectures are scored by; more is better.

    Attributes
    ----------
    name : str
    scorer : str or callable
        As scikit-learn takes it for `scoring`.
    constant : float
        Score of the best constant answer: the commonest class, or the mean.
    """

    name: str
    scorer: Any
    constant: float


def label_accuracy(y: NDArray[Any], predicted: NDArray[Any]) -> float:
    """Share of right answers, over all labels."""
    return float(np.mean(y == predicted))


def make_metric(scoring: str | None, zoo: LabelledZoo, folds: Folds) -> Metric:
    """Give a score of scikit-learn's by its name; None for the accuracy, or R2.

    Raises
    ------
    CommandError
        When the score has no value for targets such as these, or for some fold.
    """
    if scoring is not None:
        return Metric(scoring, scoring, _constant(scoring, zoo, folds))
    y = zoo.targets.y
    if zoo.targets.task == "regression":
        return Metric("R2", "r2", 0.0)
    columns = y.reshape(len(y), -1).T
    shares = [np.unique(column, return_counts=True)[1].max() / len(y) for column in columns]
    return Metric("accuracy", make_scorer(label_accuracy), float(np.mean(shares)))


def _constant(scoring: str, zoo: LabelledZoo, folds: Folds) -> float:
    """Score constant answers on the folds: an unfit score is found out before any training."""
    task, y = zoo.targets.task, zoo.targets.y
    constant = DummyRegressor() if task == "regression" else DummyClassifier()
    X = np.zeros((len(y), 1))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UndefinedMetricWarning)
            done = cross_validate(constant, X, y, scoring=scoring, cv=folds, error_score="raise")
    except (ValueError, TypeError, AttributeError) as error:
        raise CommandError(f"--scoring {scoring} cannot score this {task}: {error}") from None
    scores = done["test_score"]
    if not np.isfinite(scores).all():
        raise CommandError(
            f"--scoring {scoring} has no value on one of the folds, which may lack a class; "
            "pass fewer --folds, or another --scoring."
        )
    return float(scores.mean())


def make_folds(zoo: LabelledZoo, n_folds: int, seed: int) -> Folds:
    """Split the zoo, by groups if there are any, else by class if there are any.

    Raises
    ------
    CommandError
        When there are too few adapters or groups, or a fold leaves one class to train on.
    """
    folds = _folds(zoo, n_folds, seed)
    if zoo.targets.classes is not None:
        for train, _ in folds:
            if len(left := np.unique(zoo.targets.y[train])) == 1:
                where = "" if zoo.groups is None else ", in more groups"
                raise CommandError(
                    f"--folds {n_folds} has a fold that leaves only class {left[0]} to train on; "
                    f"pass other --folds, or label more adapters of other classes{where}."
                )
    return folds


def _folds(zoo: LabelledZoo, n_folds: int, seed: int) -> Folds:
    n_adapters, y = len(zoo.loras), zoo.targets.y
    if n_folds < 2:
        raise CommandError(f"--folds is {n_folds}; cross-validation takes at least 2.")
    # R2 is a share of the variance, which one adapter alone does not have.
    least = 2 if zoo.targets.task == "regression" else 1
    _check_enough(n_adapters, "adapter", n_folds, least)
    X = np.zeros((n_adapters, 1))
    if zoo.groups is not None:
        _check_enough(len(set(zoo.groups)), "group", n_folds)
        folds = list(GroupKFold(n_folds).split(X, y, zoo.groups))
        if zoo.targets.task == "regression" and min(len(test) for _, test in folds) < 2:
            raise CommandError(
                f"--folds {n_folds} leaves one adapter alone in a fold, which has no R2; pass "
                "fewer, or larger groups."
            )
        return folds
    if zoo.targets.classes is None:
        return list(KFold(n_folds, shuffle=True, random_state=seed).split(X))
    return _stratified(X, y, n_folds, seed)


def _check_enough(number: int, what: str, n_folds: int, least: int = 1) -> None:
    if number < n_folds * least:
        remedy = "pass fewer" if number >= 2 * least else f"label more {what}s"
        raise CommandError(f"--folds {n_folds} is too many for {counted(number, what)}; {remedy}.")


def _stratified(X: NDArray[Any], y: NDArray[Any], n_folds: int, seed: int) -> Folds:
    classes, counts = np.unique(y, return_counts=True)
    rarest, fewest = classes[counts.argmin()], counts.min()
    if fewest < n_folds:
        say(f"class {rarest} is too rare to be in every fold: {fewest} of {n_folds}")
    if counts.max() < n_folds:
        raise CommandError(
            f"no class has {n_folds} adapters, one for each fold; pass fewer --folds, or --task "
            "regression."
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        return list(StratifiedKFold(n_folds, shuffle=True, random_state=seed).split(X, y))


def evaluate(
    architectures: Iterable[str],
    zoo: LabelledZoo,
    folds: Folds,
    metric: Metric,
    args: argparse.Namespace,
) -> list[Evaluation]:
    """Cross-validate architectures; one that fails is left out, with a message.

    Raises
    ------
    CommandError
        When all fail.
    """
    evaluations = []
    for name in track(list(architectures), "cross-validation", "architecture"):
        try:
            evaluations.append(_evaluate(name, zoo, folds, metric, args))
        except (ValueError, MemoryError, RuntimeError) as error:  # torch has but the last
            say(f"{name} failed: {str(error) or type(error).__name__}")
    if not evaluations:
        raise CommandError("no architecture could be trained.", FAILED)
    return evaluations


def _evaluate(
    architecture: str,
    zoo: LabelledZoo,
    folds: Folds,
    metric: Metric,
    args: argparse.Namespace,
) -> Evaluation:
    done = cross_validate(
        new_model(architecture, zoo, args),
        zoo.loras,
        zoo.targets.y,
        scoring=metric.scorer,
        cv=folds,
        n_jobs=min(args.jobs, len(folds)),  # joblib starts as many processes, idle ones too
        error_score="raise",
    )
    return Evaluation(architecture, done["test_score"], float(done["fit_time"].mean()))


def new_model(architecture: str, zoo: LabelledZoo, args: argparse.Namespace) -> Pipeline:
    """Make an unfitted model that shows its progress, as the options say."""
    task: Any = zoo.targets.task
    return make_architecture(
        architecture, task, device=args.device, random_state=args.seed, verbose=1
    )


def show_scores(evaluations: Iterable[Evaluation], metric: Metric) -> None:
    """Write a table of scores, the last of which is that of the best constant answer."""
    rows = [
        (one.architecture, f"{one.mean:.3f}", f"±{one.spread:.3f}", f"{one.fit_seconds:.1f} s")
        for one in evaluations
    ]
    headings = ("architecture", metric.name, "spread", "fit time")
    table([headings, *rows, ("(constant)", f"{metric.constant:.3f}", "", "")], "<>>>")
