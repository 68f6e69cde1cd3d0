import os

import numpy as np
import pytest

from sklora import LoRACollection
from sklora.cli._zoo import _files, _names
from sklora.io import read_adapters, write_adapter

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapters(tmp_path, factors, monkeypatch):
    """Folders a and b in the folder zoo, which is in the current one."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_adapter(tmp_path / "zoo" / name, factors())
    return tmp_path


def test_a_folder_and_a_link_to_it_are_one(adapters):
    os.symlink("zoo", "link")
    files = _files(["zoo", "link"])
    assert [*files] == [f"{adapters}/zoo/{name}/{WEIGHTS}" for name in "ab"]
    assert [[found.path for found in ways] for ways in files.values()] == [
        [f"{root}/{name}/{WEIGHTS}" for root in ("zoo", "link")] for name in "ab"
    ]


def test_links_to_one_file_are_adapters_of_their_own(adapters):
    for name in ("c", "d"):
        (adapters / "more" / name).mkdir(parents=True)
        os.symlink(f"../../zoo/a/{WEIGHTS}", adapters / "more" / name / WEIGHTS)
    links = [f"more/{name}/{WEIGHTS}" for name in "cd"]
    assert [*_files(links)] == [f"{adapters}/{link}" for link in links]


def test_names(adapters):
    [names, _] = _names(_files(["zoo"]), "zoo/a")
    assert names[0] == f"zoo/a/{WEIGHTS}"
    folders = {"zoo/a", f"{adapters}/zoo/a", "a"}
    assert {*names} == {f"{folder}/{WEIGHTS}" for folder in folders} | folders | {WEIGHTS}
    assert f"zoo/a/{WEIGHTS}" in _names(_files([f"{adapters}/zoo"]), "")[0]


def test_a_folder_of_two_adapters_is_none_of_them(adapters):
    os.link(f"zoo/a/{WEIGHTS}", "zoo/a/other.safetensors")
    names = _names(_files(["zoo"]), "zoo")
    assert ["a" in every for every in names] == [False, False, False]
    assert ["b" in every for every in names] == [False, False, True]


class TestPacked:
    """What is wrong with a zoo in one file is said of the file, before anything is trained."""

    @pytest.fixture
    def fit(self, run, zoo, tmp_path, write_csv):
        X = read_adapters(zoo)
        labels = [(id, "xy"[n % 2]) for n, id in enumerate(X.ids)]
        labels = write_csv(tmp_path / "l.csv", ("id", "style"), labels)

        def fit(weights, ranks=X.ranks, size=None):
            path = tmp_path / "zoo.safetensors"
            LoRACollection.from_array(weights, X.layout, ranks=ranks, ids=X.ids).save(path)
            os.truncate(path, size or path.stat().st_size)
            options = ("--labels", labels, "--target", "style", "-o", tmp_path / "m.skops")
            code, out, err = run("fit", path, *options)
            assert (code, out) == (1, "")
            return err

        return X, fit

    @pytest.mark.parametrize("size", [100, 5000])
    def test_cut_off(self, fit, size):
        X, fit = fit
        assert "zoo.safetensors is damaged" in fit(X.read(), size=size)

    def test_weights_that_are_no_numbers(self, fit):
        X, fit = fit
        weights = X.read()
        weights[[3, 5], 2] = np.nan, np.inf
        err = fit(weights)
        for row in (3, 5):
            assert f"sklora: adapter {X.ids[row].item()!r} has NaN or infinity in module" in err
        assert err.endswith(
            "sklora: error: 2 adapters cannot be read; mend them, or leave their labels out.\n"
        )
