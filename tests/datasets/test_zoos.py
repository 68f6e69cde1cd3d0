"""Zoos are trained in parts, kept, gone on with, and never trusted when they were changed."""

import os
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from joblib import parallel_config

from sklora.collection import LoRALayout
from sklora.datasets import _zoos
from sklora.datasets._zoos import fetch_zoo, get_data_home, train_zoo

SETTINGS = {"n_adapters": 7, "random_state": 0}


class Interrupted(Exception):
    pass


@dataclass(frozen=True)
class Parabola:
    """Every adapter is its row number, squared on the base network's number."""

    calls: list = field(default_factory=list)
    fails_at: int = -1
    layout = LoRALayout([("a", 2, 1, 1), ("b", 1, 1, 2)])
    parts = (np.array([4, 0, 2]), np.array([1, 6]), np.array([3, 5]))

    def train_base(self, verbose):
        self.calls.append("base")
        return {"power": np.array([2])}

    def train_part(self, base, part):
        if part == self.fails_at:
            raise Interrupted
        self.calls.append(part)
        rows = self.parts[part]
        flat = np.repeat(rows[:, None] ** base["power"], self.layout.width, axis=1)
        return flat.astype(np.float32), {"row": rows, "is_odd": rows % 2 == 1}


def check(zoo):
    np.testing.assert_array_equal(zoo.labels["row"], np.arange(7))
    np.testing.assert_array_equal(zoo.labels["is_odd"], np.arange(7) % 2 == 1)
    np.testing.assert_array_equal(
        np.asarray(zoo.data), np.repeat(np.arange(7)[:, None] ** 2, zoo.data.layout.width, axis=1)
    )
    assert zoo.data.layout == Parabola.layout
    np.testing.assert_array_equal(zoo.data.ranks, [[1, 2]] * 7)
    np.testing.assert_array_equal(zoo.base["power"], [2])


def files(home):
    return sorted(path.name for path in home.glob("*/*"))


class TestTrainZoo:
    def test_rows_are_in_their_order(self):
        check(train_zoo(Parabola()))

    def test_processes_make_no_difference(self):
        with parallel_config(backend="loky"):
            check(train_zoo(Parabola(), n_jobs=2))


class TestFetchZoo:
    def fetch(self, home, recipe, **options):
        return fetch_zoo("squares", SETTINGS, lambda: recipe, data_home=home, **options)

    def test_trains_once(self, tmp_path):
        recipe = Parabola()
        check(self.fetch(tmp_path, recipe))
        assert recipe.calls == ["base", 0, 1, 2]
        check(self.fetch(tmp_path, None, train_if_missing=False))

    def test_leaves_the_whole_zoo_alone(self, tmp_path):
        self.fetch(tmp_path, Parabola())
        names = [_zoos.BASE, _zoos.LABELS, _zoos.WEIGHTS]
        assert files(tmp_path) == sorted(
            [*names, *(f"{name}.sha256" for name in names), "settings.json"]
        )

    def test_goes_on_after_an_interruption(self, tmp_path):
        with pytest.raises(Interrupted):
            self.fetch(tmp_path, Parabola(fails_at=1))
        recipe = Parabola()
        check(self.fetch(tmp_path, recipe))
        assert recipe.calls == [1, 2]

    @pytest.mark.parametrize("name", ["part-00000.safetensors", "part-00000.safetensors.sha256"])
    def test_an_unfinished_part_is_trained_again(self, tmp_path, name):
        with pytest.raises(Interrupted):
            self.fetch(tmp_path, Parabola(fails_at=1))
        (path,) = tmp_path.glob(f"*/{name}")
        path.unlink()
        recipe = Parabola()
        check(self.fetch(tmp_path, recipe))
        assert recipe.calls == [0, 1, 2]

    @pytest.mark.parametrize("name", [_zoos.WEIGHTS, _zoos.LABELS, _zoos.BASE])
    def test_a_changed_file_is_never_used(self, tmp_path, name):
        self.fetch(tmp_path, Parabola())
        (path,) = tmp_path.glob(f"*/{name}")
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.warns(UserWarning, match=rf"{name}.*is not as it was written"):
            zoo = self.fetch(tmp_path, Parabola())
        check(zoo)

    def test_parts_of_a_lost_base_network_are_trained_again(self, tmp_path):
        with pytest.raises(Interrupted):
            self.fetch(tmp_path, Parabola(fails_at=2))
        (path,) = tmp_path.glob(f"*/{_zoos.BASE}")
        path.unlink()
        recipe = Parabola()
        check(self.fetch(tmp_path, recipe))
        assert recipe.calls == ["base", 0, 1, 2]

    def test_each_setting_has_its_own_folder(self, tmp_path):
        self.fetch(tmp_path, Parabola())
        other = replace(Parabola(), calls=[])
        fetch_zoo("squares", {**SETTINGS, "random_state": 1}, lambda: other, data_home=tmp_path)
        assert other.calls == ["base", 0, 1, 2]

    def test_numbers_of_numpy_are_numbers(self, tmp_path):
        self.fetch(tmp_path, Parabola())
        settings = {name: np.int64(value) for name, value in SETTINGS.items()}
        check(fetch_zoo("squares", settings, None, data_home=tmp_path, train_if_missing=False))

    def test_says_what_is_missing(self, tmp_path):
        with pytest.raises(OSError, match=r"'squares' is not in .*train_if_missing=True"):
            self.fetch(tmp_path, Parabola(), train_if_missing=False)
        assert not files(tmp_path)


class TestDataHome:
    def test_is_in_the_home_folder(self, monkeypatch):
        monkeypatch.delenv("SKLORA_DATA", raising=False)
        assert get_data_home() == os.path.expanduser("~/sklora_data")

    def test_follows_the_environment(self, monkeypatch, tmp_path):
        monkeypatch.setenv("SKLORA_DATA", str(tmp_path))
        assert get_data_home() == str(tmp_path)

    def test_an_argument_comes_first(self, monkeypatch, tmp_path):
        monkeypatch.setenv("SKLORA_DATA", "elsewhere")
        assert get_data_home(tmp_path) == str(tmp_path)
