"""What the scripts of this folder share: how a table is made.

Adapters are split once, 70/15/15, into training, validation and test rows; adapters of one group
stay together. Features are fitted to the training rows. For each architecture the network's
hyperparameters are those of the few candidates below that score best on the validation rows, with
seed 0. Then networks are trained on the training rows from five seeds, and each predicts the test
rows once. Tables show the mean over the seeds and its standard error, which says how much the
training varies. In brackets stands how much another choice of test adapters would change: the
standard deviation of the mean when their groups are drawn anew with replacement.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
from joblib import Parallel, delayed
from joblib.externals.loky import get_reusable_executor
from numpy.typing import NDArray
from scipy.stats import kendalltau, spearmanr
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupShuffleSplit
from sklearn.pipeline import Pipeline
from sklearn.utils import Bunch
from tqdm.auto import tqdm

import sklora
from sklora import LoRACollection, datasets, make_architecture

Metric = Callable[[NDArray[Any], NDArray[Any]], float]
Predictions = dict[str, NDArray[Any]]

SEEDS = (0, 1, 2, 3, 4)
SPLIT_SEED = 0
N_BOOTSTRAP = 200
HELD_OUT = 0.15  # the share of the validation rows, and that of the test rows
QUICK = {"seeds": SEEDS[:2], "max_epochs": 2}


class Architecture(NamedTuple):
    """One of sklora's, what is set of its network, and the candidates that are tried."""

    name: str
    fixed: dict[str, Any]
    candidates: tuple[dict[str, Any], ...]


_PERCEPTRON = ({}, {"lr": 3e-3, "dropout": 0.1})
_GL_NET = ({}, {"lr": 3e-3}, {"n_layers": 2})
ARCHITECTURES = {
    **{name: Architecture(name, {}, _PERCEPTRON) for name in ("mlp", "o-align", "svd", "dense")},
    "gl-net": Architecture("gl-net", {}, _GL_NET),
    "gl-net, spectrum": Architecture("gl-net", {"spectrum": True}, _GL_NET),
    "gl-net, mean head": Architecture("gl-net", {"head": "mean"}, _GL_NET),
}
BLIND, SPECTRUM = "(blind)", "gl-net, spectrum"
COMPARED = tuple(name for name in ARCHITECTURES if name != "gl-net, mean head")


class TestSet(NamedTuple):
    """Adapters that are looked at last, what is true of them, and who belongs together."""

    X: LoRACollection
    y: NDArray[Any]
    groups: NDArray[Any]


class Split(NamedTuple):
    """Rows of a zoo."""

    train: NDArray[np.intp]
    validation: NDArray[np.intp]
    test: NDArray[np.intp]


def split(n_adapters: int, groups: NDArray[Any] | None = None) -> Split:
    """Split rows at random, those of one group together."""
    rows = np.arange(n_adapters)
    groups = rows if groups is None else groups

    def cut(rows: NDArray[np.intp], share: float) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        cutter = GroupShuffleSplit(1, test_size=share, random_state=SPLIT_SEED)
        [(kept, held_out)] = cutter.split(rows, groups=groups[rows])
        return rows[kept], rows[held_out]

    rest, test = cut(rows, HELD_OUT)
    return Split(*cut(rest, HELD_OUT / (1 - HELD_OUT)), test)


def label_accuracy(true: NDArray[Any], predicted: NDArray[Any]) -> float:
    """Share of right answers, over all labels."""
    return float(np.mean(true == predicted))


def labels(names: Iterable[str] = ()) -> dict[str, Metric]:
    """Give the mean accuracy over labels, and the accuracy of each label that is named."""

    def of_label(column: int) -> Metric:
        return lambda true, predicted: label_accuracy(true[:, column], predicted[:, column])

    return {"accuracy": label_accuracy} | {
        name: of_label(column) for column, name in enumerate(names)
    }


def _rank_correlation(function: Callable[..., Any]) -> Metric:
    def score(true: NDArray[Any], predicted: NDArray[Any]) -> float:
        # A constant ranks nothing; SciPy's answer is NaN.
        return float(function(true, predicted).statistic) if np.ptp(predicted) else 0.0

    return score


REGRESSION: dict[str, Metric] = {
    "R2": lambda true, predicted: float(r2_score(true, predicted)),
    "Kendall's tau": _rank_correlation(kendalltau),
    "Spearman's rho": _rank_correlation(spearmanr),
}


@dataclass(frozen=True)
class Question:
    """What is asked of the adapters `X`: to predict `y`.

    The first of `metrics` chooses hyperparameters; more is better. `tests` are other adapters than
    the test rows of `X`.
    """

    name: str
    X: LoRACollection
    y: NDArray[Any]
    metrics: Mapping[str, Metric]
    task: str = "classification"
    groups: NDArray[Any] | None = None
    architectures: tuple[str, ...] = COMPARED
    tests: Mapping[str, TestSet] | None = None

    @cached_property
    def rows(self) -> Split:
        """Training, validation and test rows."""
        return split(len(self.X), self.groups)

    def counts(self) -> dict[str, int]:
        """Count the adapters of each part."""
        return {name: len(rows) for name, rows in self.rows._asdict().items()}

    @cached_property
    def test_sets(self) -> Mapping[str, TestSet]:
        """What is looked at last, by name."""
        test = self.rows.test
        groups = test if self.groups is None else self.groups[test]
        return self.tests or {"": TestSet(self.X[test], self.y[test], groups)}

    @property
    def main_metric(self) -> Metric:
        """The first metric."""
        return next(iter(self.metrics.values()))

    def main_scores(self) -> dict[str, str]:
        """Give the name of the first metric's score for every test set."""
        metric = next(iter(self.metrics))
        return {test: score_name(metric, test) for test in self.test_sets}

    def scores(self, predicted: Predictions) -> dict[str, float]:
        """Score the predictions of every test set by every metric."""
        return {
            score_name(metric, test): score(true, predicted[test])
            for test, (_, true, _) in self.test_sets.items()
            for metric, score in self.metrics.items()
        }

    def test_errors(self, predicted: Sequence[Predictions]) -> dict[str, float]:
        """Say how much the mean over seeds changes with the groups of the test set."""
        return {
            name: bootstrap(
                self.test_sets[test], [one[test] for one in predicted], self.main_metric
            )
            for test, name in self.main_scores().items()
        }


def score_name(metric: str, test: str) -> str:
    """Give what a score is called."""
    return f"{metric}, {test}" if test else metric


def bootstrap(test: TestSet, predictions: Sequence[NDArray[Any]], metric: Metric) -> float:
    """Give the standard deviation of a mean score when groups are drawn with replacement."""
    rng = np.random.default_rng(SPLIT_SEED)
    members = [np.flatnonzero(test.groups == group) for group in np.unique(test.groups)]
    means = []
    for _ in range(N_BOOTSTRAP):
        drawn = rng.integers(len(members), size=len(members))
        rows = np.concatenate([members[group] for group in drawn])
        means.append(np.mean([metric(test.y[rows], found[rows]) for found in predictions]))
    return float(np.std(means))


def difference(
    test: TestSet, first: Sequence[NDArray[Any]], second: Sequence[NDArray[Any]]
) -> tuple[list[float], float]:
    """Say how much more often the first predictions are right, pair by pair, and the error."""
    more = [
        (test.y == one).mean(axis=1) - (test.y == other).mean(axis=1)
        for one, other in zip(first, second, strict=True)
    ]
    return [float(one.mean()) for one in more], bootstrap(test, more, lambda _, one: one.mean())


@dataclass
class Answer:
    """How one architecture answers a question."""

    chosen: dict[str, Any] = field(default_factory=dict)
    validation: list[float] = field(default_factory=list)  # one score for each candidate
    predictions: list[Predictions] = field(default_factory=list)  # one for each seed
    scores: dict[str, list[float]] = field(default_factory=dict)
    test_errors: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Give everything but the predictions, with mean and standard error over the seeds."""
        kept = {name: value for name, value in asdict(self).items() if name != "predictions"}
        return kept | {
            "mean": {name: float(np.mean(values)) for name, values in self.scores.items()},
            "standard_error": {
                name: standard_error(values) for name, values in self.scores.items()
            },
        }


def standard_error(values: Sequence[float]) -> float:
    """Give the standard error of a mean; of one number, 0."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def network(question: Question, name: str, candidate: Mapping[str, Any], seed: int) -> Any:
    """Give the network of an architecture."""
    architecture = ARCHITECTURES[name]
    model = make_architecture(architecture.name, question.task, random_state=seed)
    return model.named_steps["model"].set_params(**architecture.fixed, **candidate)


def features(question: Question, name: str) -> dict[str, Any]:
    """Give what the network reads of the rows "train" and "validation" and of each test set."""
    step = make_architecture(ARCHITECTURES[name].name, question.task, random_state=0)
    featurizer = Pipeline(step.steps[:1])
    parts = {name: test.X for name, test in question.test_sets.items()}
    parts["validation"] = question.X[question.rows.validation]
    train = question.X[question.rows.train]
    read = {"train": featurizer.fit_transform(train, question.y[question.rows.train])}
    return read | {part: featurizer.transform(X) for part, X in parts.items()}


def fit_predict(
    model: Any, parts: Mapping[str, Any], y: NDArray[Any], wanted: Sequence[str]
) -> Predictions:
    """Train a network on the training rows and predict some of the other parts."""
    model.fit(parts["train"], y)
    return {part: model.predict(parts[part]) for part in wanted}


def baseline(question: Question) -> Answer:
    """Answer without looking at the adapters: the most frequent class, or the mean."""
    model = DummyClassifier() if question.task == "classification" else DummyRegressor()
    train, tests = question.rows.train, question.test_sets
    parts = {name: np.zeros((len(test.y), 1)) for name, test in tests.items()}
    parts["train"] = np.zeros((len(train), 1))
    answer = Answer()
    add(answer, question, fit_predict(model, parts, question.y[train], list(tests)))
    return answer


def add(answer: Answer, question: Question, predicted: Predictions) -> None:
    """Add the predictions of one more seed, and their scores."""
    answer.predictions.append(predicted)
    for name, value in question.scores(predicted).items():
        answer.scores.setdefault(name, []).append(value)


def parser(text: str) -> argparse.ArgumentParser:
    """Give the options that all scripts have."""
    made = argparse.ArgumentParser(description=text.splitlines()[0])
    made.add_argument("--quick", action="store_true", help="tiny zoos, two seeds: is it whole?")
    made.add_argument("--data-home", help="where zoos are cached; see sklora.datasets")
    made.add_argument("--n-adapters", type=int, help="size of the fetched zoos; see their fetchers")
    made.add_argument("--n-jobs", type=int, default=1, help="networks trained at the same time")
    made.add_argument("--output", help="write numbers, settings, time and memory to this JSON file")
    return made


class Run:
    """One run of a script: its zoos, its answers, its results.

    Parameters
    ----------
    args : argparse.Namespace
        As `parser` gives them.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.seeds = QUICK["seeds"] if args.quick else SEEDS
        self.started, self.zoo_seconds = time.perf_counter(), 0.0
        self.results: dict[str, Any] = {}
        if args.output:
            open(args.output, "a").close()  # or all the work would be done when this fails

    def zoo(self, name: str, rank: int = 4, n_adapters: int | None = None, **options: Any) -> Bunch:
        """Fetch a zoo, of the size that `args` say if none is given, or train a tiny one."""
        started = time.perf_counter()
        if self.args.quick:
            zoo = TINY[name](rank, **options)
        else:
            fetch = getattr(datasets, f"fetch_{name}_loras")
            n_adapters = n_adapters or self.args.n_adapters
            if n_adapters is not None:
                options["n_adapters"] = n_adapters
            options |= {"data_home": self.args.data_home, "n_jobs": self.args.n_jobs}
            zoo = fetch(rank, **options)
        self.zoo_seconds += time.perf_counter() - started
        return zoo

    def ask(self, question: Question) -> dict[str, Answer]:
        """Answer by every architecture, print the table, keep the results."""
        parts = {name: features(question, name) for name in question.architectures}
        answers = {BLIND: baseline(question)} | self._choose(question, parts)
        self._predict(question, parts, answers)
        for answer in answers.values():
            answer.test_errors = question.test_errors(answer.predictions)
        more: dict[str, Any] = {"rows": question.counts()}
        if SPECTRUM in answers:
            more[SPECTRUM] = {
                score: compare(answers, score) for score in question.main_scores().values()
            }
        self.keep(question.name, answers, **more)
        return answers

    def keep(self, title: str, answers: Mapping[str, Answer], **more: Any) -> None:
        """Print a table and keep its numbers."""
        summaries = {name: answer.summary() for name, answer in answers.items()}
        print(f"\n### {title}\n\n{table(summaries)}\n")
        print("\n".join(f"{name}: {value}" for name, value in more.items()), flush=True)
        self.results[title] = {"answers": summaries, **more}

    def _network(self, *args: Any) -> Any:
        model = network(*args)
        return model.set_params(max_epochs=QUICK["max_epochs"]) if self.args.quick else model

    def _choose(self, question: Question, parts: Mapping[str, Any]) -> dict[str, Answer]:
        """Score the candidates on the validation rows; nothing here sees the test rows."""
        jobs = [
            (name, candidate)
            for name in question.architectures
            for candidate in ARCHITECTURES[name].candidates
        ]
        seen = {name: {key: parts[name][key] for key in ("train", "validation")} for name in parts}
        y, true = question.y[question.rows.train], question.y[question.rows.validation]
        predicted = self._parallel(
            f"{question.name}: candidates",
            [
                delayed(fit_predict)(
                    self._network(question, name, candidate, self.seeds[0]),
                    seen[name],
                    y,
                    ["validation"],
                )
                for name, candidate in jobs
            ],
        )
        answers = {name: Answer() for name in question.architectures}
        for (name, _), found in zip(jobs, predicted, strict=True):
            answers[name].validation.append(question.main_metric(true, found["validation"]))
        for name, answer in answers.items():
            best = int(np.argmax(answer.validation))
            answer.chosen = ARCHITECTURES[name].candidates[best]
        return answers

    def _predict(
        self, question: Question, parts: Mapping[str, Any], answers: Mapping[str, Answer]
    ) -> None:
        """Train what was chosen from every seed and predict the test sets."""
        tests = list(question.test_sets)
        jobs = [(name, seed) for name in question.architectures for seed in self.seeds]
        predicted = self._parallel(
            f"{question.name}: seeds",
            [
                delayed(fit_predict)(
                    self._network(question, name, answers[name].chosen, seed),
                    parts[name],
                    question.y[question.rows.train],
                    tests,
                )
                for name, seed in jobs
            ],
        )
        for (name, _), found in zip(jobs, predicted, strict=True):
            add(answers[name], question, found)

    def _parallel(self, text: str, jobs: Sequence[Any]) -> list[Predictions]:
        started = time.perf_counter()
        done = Parallel(n_jobs=self.args.n_jobs, return_as="generator")(jobs)
        results = list(tqdm(done, text, len(jobs), disable=None, leave=False))
        seconds = time.perf_counter() - started
        print(f"{text}: {len(jobs)} networks in {seconds:.0f} s", file=sys.stderr, flush=True)
        return results

    def finish(self, **more: Any) -> dict[str, Any]:
        """Write and give the results, with what they took."""
        seconds = time.perf_counter() - self.started - self.zoo_seconds
        memory = peak_memory(self.args.n_jobs)
        report = {
            "settings": {**vars(self.args), "seeds": self.seeds, "split_seed": SPLIT_SEED},
            "versions": {"sklora": sklora.__version__, "python": platform.python_version()},
            "cpus": os.cpu_count(),
            "seconds": seconds,
            "zoo_seconds": self.zoo_seconds,
            "peak_memory_gb": memory,
            "results": self.results | more,
        }
        print(f"{seconds:.0f} s once the zoos exist, at most {memory:.2f} GB", file=sys.stderr)
        if self.args.output:
            with open(self.args.output, "w", encoding="utf-8") as file:
                json.dump(report, file, indent=1)
        return report


def peak_memory(n_jobs: int) -> float:
    """Give an upper bound of resident memory in GB: this process, and its workers at their most."""
    get_reusable_executor().shutdown(wait=True)  # children are counted once they have ended
    own, child = (
        resource.getrusage(who).ru_maxrss * 1024 / 1e9
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own if n_jobs == 1 else own + (n_jobs if n_jobs > 0 else os.cpu_count() or 1) * child


def compare(answers: Mapping[str, Answer], score: str) -> dict[str, Any]:
    """Say whether gl-net with the spectrum is within one standard error of the best other."""
    others = [name for name in answers if name not in (BLIND, SPECTRUM)]
    best = max(others, key=lambda name: np.mean(answers[name].scores[score]))
    mean, error = np.mean(answers[best].scores[score]), standard_error(answers[best].scores[score])
    difference = float(np.mean(answers[SPECTRUM].scores[score]) - mean)
    return {"best other": best, "difference": difference, "within": bool(difference >= -error)}


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Give a Markdown table: one row for each answer, one column for each score."""
    columns = list(next(iter(summaries.values()))["mean"])
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [
        [name, *(cell(answer, score) for score in columns)] for name, answer in summaries.items()
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(answer: Mapping[str, Any], score: str) -> str:
    """Give a score with its errors."""
    text = f"{answer['mean'][score]:.3f} ± {answer['standard_error'][score]:.3f}"
    return text + (
        f" ({answer['test_errors'][score]:.3f})" if score in answer["test_errors"] else ""
    )


# As the fetchers do: a collection of some rank, and what is known of its adapters.
TINY: dict[str, Callable[..., Bunch]] = {
    name: partial(make, 48, dim=8, depth=1, random_state=0, verbose=0)
    for name, make in (
        ("digits", datasets.make_digits_loras),
        ("varied_digits", datasets.make_varied_digits_loras),
        ("code", datasets.make_code_loras),
    )
}
