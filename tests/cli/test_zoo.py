import os

import pytest

from sklora.cli._zoo import _files, _names
from sklora.io import write_adapter

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
