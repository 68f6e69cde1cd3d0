"""The scripts behind the paper's tables: each runs in quick mode and reports every score."""

import itertools
import json
import math
import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

# Drawn by another test, too.
SLOW = ("figure4",)
# Many questions like those of others: of every architecture one candidate and one seed will do.
LONG = ("appendix_e", "table3", "table4")
FIVE = ("mlp", "o-align", "svd", "dense", "gl-net", "gl-net, spectrum")
BY_RANK = ("svd", "dense", "gl-net", "gl-net, spectrum")
REGRESSION = {"R2", "Kendall's tau", "Spearman's rho"}
ATTRIBUTES = {"accuracy", "loop", "symmetric", "thick", "slanted", "wide"}
SUMS = {
    *("class sum", "equation 38", "beyond equation 38"),
    *("with a rate for each class", "presence"),
}
DIGIT = ("(digit alone)",)
RECOVERED = ("vote of the modules", "all modules at once")
EDITED = (
    *("without the class", "moved, rank 4", "moved, rank 16"),
    *("moved at random, rank 4", "moved at random, rank 16", "with the class"),
)
EFFECTS = {
    *("said to have the class", "samples of the class"),
    *("loss of the class", "loss of the others"),
}
# What is asked, of which models, by which scores.
EXPECTED = {
    "table2": {"score of the samples": ((*FIVE, "gl-net, mean head"), REGRESSION)},
    "table3": {
        "attributes, sets shared by the parts": (FIVE, ATTRIBUTES),
        "attributes, sets shared by the parts, by the digit alone": (DIGIT, ATTRIBUTES),
        "attributes, sets shared by the parts, beyond the digit": (FIVE, {"accuracy"}),
        "attributes, every set in one part": (FIVE, ATTRIBUTES),
        "attributes, every set in one part, by the digit alone": (DIGIT, ATTRIBUTES),
        "attributes, every set in one part, beyond the digit": (FIVE, {"accuracy"}),
        "classes, rank 4": (FIVE, {"accuracy"}),
        "classes, rank 32": (FIVE, {"accuracy"}),
    },
    "table4": {
        f"{asked}, rank {rank}": (FIVE, scores)
        for rank in (4, 32)
        for asked, scores in (
            ("size", {"accuracy"}),
            ("classes", {"accuracy"}),
            ("size as the number of predicted classes", SUMS),
        )
    },
    "table5": {
        "sources": (FIVE, {"accuracy"}),
        "validation loss": (FIVE, REGRESSION),
        "next-token accuracy": (FIVE, REGRESSION),
    },
    "appendix_e": {f"classes, {method}": (FIVE, {"accuracy"}) for method in ("dora", "lokr")},
    "figure4": {
        "attributes": (BY_RANK, {f"accuracy, rank {rank}" for rank in (1, 4, 8)}),
        "accuracy lost from rank 4": (BY_RANK, {f"rank {rank}" for rank in (1, 4, 8)}),
    },
    "salama": {
        f"size, rank {rank}": (RECOVERED, {"accuracy", "error in images"}) for rank in (4, 32)
    },
    "dravid": {"edits": (EDITED, EFFECTS)},
}
# The zoo that a question is asked of, by how its title begins, and what is asked.
ASKED = {
    "score of the samples": ("varied_digits", "score"),
    "attributes": ("varied_digits", "attributes"),
    "classes": ("digits", "presence"),
    "size": ("digits", "size"),
    "sources": ("code", "sources"),
    "validation loss": ("code", "loss"),
    "next-token accuracy": ("code", "accuracy"),
}
SHARED = "attributes, sets shared by the parts"


def test_every_script_has_expectations(paper):
    assert {"protocol", *EXPECTED} == set(vars(paper))


@pytest.fixture
def questions(paper, monkeypatch):
    """Give the questions that are asked, as they are."""
    asked, ask = [], paper.protocol.Run.ask

    def keep(run, question):
        asked.append(question)
        return ask(run, question)

    monkeypatch.setattr(paper.protocol.Run, "ask", keep)
    return asked


@pytest.fixture
def splits(paper, monkeypatch):
    """Give whether a split is without groups, of each that is made."""
    made, split = [], paper.protocol.split

    def keep(n_adapters, groups=None):
        made.append(groups is None)
        return split(n_adapters, groups)

    monkeypatch.setattr(paper.protocol, "split", keep)
    return made


def check_question(paper, question):
    """Check what is asked, of which adapters, and that no group is on both sides of a split."""
    title, _, more = question.name.partition(", ")
    (name, target), rank = ASKED[title], int(more[5:]) if more.startswith("rank ") else 4
    method = {"method": more} if more in ("dora", "lokr") else {}
    zoo = paper.protocol.TINY[name](rank, **method)
    assert question.X is zoo.data
    np.testing.assert_array_equal(question.y, zoo[target])
    assert (question.groups is None) == (question.name == SHARED)
    groups = np.arange(len(zoo.data)) if question.groups is None else zoo.groups
    parts = [set(groups[rows]) for rows in question.rows]
    assert not any(a & b for a, b in itertools.combinations(parts, 2))
    for test, (X, _, of_test) in question.test_sets.items():
        assert set(of_test) <= parts[2]
        if test:
            assert (X.ranks == int(test.removeprefix("rank "))).all()


@pytest.fixture
def own_peak():
    """Have the peak of memory begin anew, where the system can: other tests had theirs."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@pytest.mark.usefixtures("own_peak")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in EXPECTED]
)
def test_a_script_runs_and_reports_every_score(
    paper, name, questions, splits, tmp_path, capsys, request
):
    if name in LONG:
        request.getfixturevalue("briefly")
    output, chart = tmp_path / "results.json", tmp_path / "chart.svg"
    more = ["--plot", str(chart)] if name == "figure4" else []
    report = getattr(paper, name).main(["--quick", "--output", str(output), *more])
    assert chart.exists() == (name == "figure4")
    assert json.loads(output.read_text())["results"] == json.loads(json.dumps(report["results"]))
    assert report["seconds"] > 0
    assert 0 < report["peak_memory_gb"] < 6
    assert list(report["results"]) == list(EXPECTED[name])
    assert any(splits) == (name == "table3")
    for question in questions:
        check_question(paper, question)
    printed = capsys.readouterr().out
    for title, (models, scores) in EXPECTED[name].items():
        answers = report["results"][title]["answers"]
        assert set(models) <= set(answers) <= {"(blind)", *models}
        assert f"### {title}\n" in printed
        for model, answer in answers.items():
            for score, mean in answer["mean"].items():
                assert mean == pytest.approx(np.mean(answer["scores"][score]))
                text = f"{mean:.3f} ± {answer['standard_error'][score]:.3f}"
                if score in answer["test_errors"]:
                    text += f" ({answer['test_errors'][score]:.3f})"
                assert re.search(rf"\| {re.escape(model)} \|.* {re.escape(text)} ", printed)
            assert set(answer["mean"]) == set(answer["standard_error"]) == scores
            assert all(
                map(math.isfinite, [*answer["mean"].values(), *answer["standard_error"].values()])
            )
    if name == "table3":
        digit = paper.protocol.TINY["varied_digits"](4).digit
        known = report["results"][f"{SHARED}, by the digit alone"]["answers"]["(digit alone)"]
        assert known["scores"] == paper.table3.by_digit(questions[0], digit).scores
    if name == "table5":
        # The strength of its training shows in any adapter.
        answers = report["results"]["validation loss"]["answers"]
        assert max(answers[model]["mean"]["Kendall's tau"] for model in FIVE) > 0.3
    if name == "dravid":
        means = {model: answers[model]["mean"]["said to have the class"] for model in EDITED}
        assert means["moved, rank 16"] > means["moved at random, rank 16"] + 0.2


def test_an_output_that_cannot_be_written_is_refused_before_the_work(paper, tmp_path):
    command = ["--quick", "--output", str(tmp_path / "missing" / "results.json")]
    with pytest.raises(FileNotFoundError, match=r"results\.json"):
        paper.protocol.Run(paper.protocol.parser("test").parse_args(command))


def test_a_chart_that_cannot_be_drawn_costs_no_numbers(paper, briefly, tmp_path):
    output, chart = tmp_path / "results.json", tmp_path / "missing" / "chart.svg"
    with pytest.raises(FileNotFoundError, match=r"chart\.svg"):
        paper.figure4.main(["--quick", "--output", str(output), "--plot", str(chart)])
    assert "attributes" in json.loads(output.read_text())["results"]


@pytest.mark.parametrize("name", EXPECTED)
def test_a_script_says_how_it_is_run(paper, name):
    assert f"python examples/paper/{name}.py" in getattr(paper, name).__doc__
