"""``make zoos``: every zoo of the tables is trained once, and found by the next run."""

import numpy as np
import pytest

from sklora.datasets import _code, _digits, _varied, fetch_digits_loras, fetch_varied_digits_loras


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(_digits, "N_BASE_STEPS", 2)
    monkeypatch.setattr(_code, "BASE_STEPS_PER_DIM", 1)
    monkeypatch.setitem(_digits.FIXED, "n_steps", 2)
    monkeypatch.setitem(_varied.VARIED, "n_steps", (2,))
    monkeypatch.setitem(_code.VARIED, "n_epochs", (1,))


def test_trains_every_zoo_once(brief, recipe, tmp_path, capsys):
    arguments = ["--data-home", str(tmp_path), "--n-adapters", "2", "--n-jobs", "1"]
    twins = recipe("train_twins")
    twins.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines[1:-1]] == [
        [name, str(rank), "2"] for name, members in twins.ZOOS.items() for rank, _ in members
    ]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("weights.safetensors")}
    assert len(written) == len(lines) - 2
    twins.main(arguments)
    assert written == {path: path.stat().st_mtime_ns for path in written}

    options = {"n_adapters": 2, "data_home": tmp_path, "train_if_missing": False}
    assert (fetch_digits_loras(32, **options).data.ranks == 32).all()
    # Ranks have all but V in common.
    one, two = (fetch_varied_digits_loras(rank, **options) for rank in (1, 2))
    np.testing.assert_array_equal(one.learning_rate, two.learning_rate)
    np.testing.assert_array_equal(one.groups, two.groups)
    with pytest.raises(OSError, match="train_if_missing=True"):
        fetch_digits_loras(4, n_adapters=3, data_home=tmp_path, train_if_missing=False)
