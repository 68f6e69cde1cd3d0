"""The regression guard tells a ratio that is twice what was recorded, and nothing else."""

import json
import math
import sys

import pytest

from benchmarks import guard

RECORDED = {"bench_a": {"fit": 1.0, "transform": 0.01}}


def problems(now, recorded=RECORDED):
    return [line.problem for line in guard.compare(now, recorded)]


def test_ratios_within_the_limit_are_no_problem():
    assert problems({"bench_a": {"fit": 1.99, "transform": 0.001}}) == ["", ""]


@pytest.mark.parametrize("fit", [2.0, 2.01, math.inf, math.nan])
def test_a_worse_ratio_is_a_problem(fit):
    found = problems({"bench_a": {"fit": fit, "transform": 0.01}})
    assert found == ["2 times the recorded or more", ""]


def test_ratios_that_only_one_side_has_are_problems():
    now = {"bench_a": {"fit": 1.0}, "bench_b": {"read": 1.0}}
    assert problems(now) == [
        "",
        "gone: run guard.py --record",
        "new: run guard.py --record",
    ]


def test_the_better_of_two_measurements_counts():
    assert guard.best_of({"fit": 3.0, "read": 1.0}, {"fit": 2.0, "read": 4.0}) == {
        "fit": 2.0,
        "read": 1.0,
    }


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the guard on benchmarks whose ratios come from lists, one after the other."""

    def main(measured, *arguments, make="here", anew=False):
        path = tmp_path / "recorded.json"
        path.write_text(json.dumps({"here": RECORDED}))
        if anew:
            path.unlink()
        ratios = {name: iter(values) for name, values in measured.items()}
        monkeypatch.setattr(guard, "RECORDED", path)
        monkeypatch.setattr(guard, "guarded", lambda: list(measured))
        monkeypatch.setattr(guard, "make_of_processor", lambda: make)
        monkeypatch.setattr(guard, "measure", lambda name: next(ratios[name]))
        monkeypatch.setattr(sys, "argv", ["guard.py", *arguments])
        return guard.main(), json.loads(path.read_text())

    return main


GOOD, BAD = {"fit": 1.0, "transform": 0.01}, {"fit": 5.0, "transform": 0.01}


def test_a_good_benchmark_is_measured_once(run):
    assert run({"bench_a": [GOOD]}) == (0, {"here": RECORDED})


def test_a_bad_ratio_is_measured_some_more_times(run, capsys):
    allowed = guard.MORE_TIMES * [BAD]
    assert run({"bench_a": [*allowed, GOOD]}) == (0, {"here": RECORDED})
    assert run({"bench_a": [*allowed, BAD, GOOD]}) == (1, {"here": RECORDED})
    assert "2 times the recorded or more" in capsys.readouterr().out


def test_the_better_of_two_measurements_is_recorded(run):
    found = run({"bench_a": [{"fit": 3.0}, {"fit": 2.0}]}, "--record")
    assert found == (0, {"here": {"bench_a": {"fit": 2.0}}})


def test_another_make_of_processor_is_held_to_what_was_recorded(run):
    assert run({"bench_a": [GOOD]}, make="there") == (0, {"here": RECORDED})
    assert run({"bench_a": (1 + guard.MORE_TIMES) * [BAD]}, make="there")[0] == 1


def test_another_make_of_processor_is_recorded_beside(run):
    code, found = run({"bench_a": [{"fit": 3.0}, {"fit": 4.0}]}, "--record", make="there")
    assert code == 0
    assert found == {"here": {"bench_a": {"fit": 1.0}}, "there": {"bench_a": {"fit": 3.0}}}


def test_ratios_are_recorded_anew(run):
    found = run({"bench_a": [{"fit": 3.0}, {"fit": 4.0}]}, "--record", anew=True)
    assert found == (0, {"here": {"bench_a": {"fit": 3.0}}})


def test_what_other_makes_have_counts_by_the_worst():
    recorded = {
        "a": {"fast": {"fit": 1.0, "read": 2.0}, "old": {"load": 9.0}},
        "b": {"fast": {"fit": 3.0, "read": 1.0}},
        "c": {"fast": {"fit": 0.5}},
    }
    assert guard.expected(recorded, "d") == {
        "fast": {"fit": 3.0, "read": 2.0},
        "old": {"load": 9.0},
    }
    assert guard.expected(recorded, "c")["fast"] == {"fit": 0.5, "read": 2.0}


def test_the_make_of_this_processor():
    assert guard.make_of_processor()
    assert guard.make_of_processor() == guard.make_of_processor().strip()
