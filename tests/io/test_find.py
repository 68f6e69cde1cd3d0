import os
import pickle
import socket
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from sklora.io import AdapterError, scan_adapters
from sklora.io._find import Found, find_each, find_files

WEIGHTS = save({"q.lora_down.weight": np.ones((1, 2)), "q.lora_up.weight": np.ones((3, 1))})


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Make files in a folder that is the current one; those that say nothing else are adapters."""
    monkeypatch.chdir(tmp_path)

    def make(*names, **contents):
        for name in names:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(WEIGHTS)
        for name, content in contents.items():
            Path(name).write_bytes(content)

    return make


def found(paths):
    return [each.path for each in find_files(paths)]


def test_a_file_is_found_under_the_name_that_the_user_gave(tree):
    tree("zoo/a.safetensors")
    for path in ("zoo/a.safetensors", "./zoo/a.safetensors", os.path.abspath("zoo/a.safetensors")):
        assert find_files(path) == [Found(path, os.path.dirname(path), in_folder=False)]
    assert find_files(Path("zoo/a.safetensors")) == find_files(["zoo/a.safetensors"])


@pytest.mark.parametrize("path", ["zoo/a.safetensors", "zoo", "zoo/", "z*", "**/a*"])
def test_strings_of_numpy_are_paths(tree, path):
    tree("zoo/a.safetensors")
    assert find_files(np.array([path])) == find_files(np.str_(path)) == find_files(path)


def test_a_folder_is_walked_in_order(tree):
    tree(
        *(
            "zoo/b.safetensors",
            "zoo/a10.safetensors",
            "zoo/a9.safetensors",
            "zoo/c/d/x.safetensors",
        ),
        *("zoo/c/a.safetensors", "zoo/B/a.safetensors", "zoo/no_suffix"),
    )
    names = [
        *("a10.safetensors", "a9.safetensors", "b.safetensors", "no_suffix"),
        *("B/a.safetensors", "c/a.safetensors", "c/d/x.safetensors"),
    ]
    expected = [f"zoo/{name}" for name in names]
    assert found("zoo") == found("zoo/") == found(Path("zoo")) == expected
    assert found(".") == [f"./zoo/{name}" for name in names]
    assert all(each == Found(each.path, "zoo", True) for each in find_files("zoo"))


def test_what_is_hidden_or_linked_is_passed_by(tree):
    tree(
        "zoo/a.safetensors", "zoo/.hidden.safetensors", "zoo/.git/a.safetensors", "x/a.safetensors"
    )
    Path("zoo/linked").symlink_to("../x")
    Path("zoo/loop").symlink_to(".")
    assert found("zoo") == ["zoo/a.safetensors"]
    Path("entry").symlink_to("zoo")
    assert found("entry") == ["entry/a.safetensors"]


def test_a_deep_folder_is_walked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    depth = 1200
    for _ in range(depth):
        os.mkdir("d")
        os.chdir("d")
    Path("a.safetensors").write_bytes(WEIGHTS)
    os.chdir(tmp_path)
    assert found(".") == ["./" + "d/" * depth + "a.safetensors"]
    # Deeper than pytest can remove.
    os.chdir("d/" * depth)
    os.remove("a.safetensors")
    for _ in range(depth):
        os.chdir("..")
        os.rmdir("d")


def test_files_that_hold_no_tensors_are_passed_by(tree):
    tree("zoo/a.safetensors")
    contents = {
        "README.md": b"# A zoo",
        "adapter_config.json": b'{"peft_type": "LORA"}',
        "a.png": b"\x89PNG\r\n\x1a\n" + bytes(60),
        "empty": b"",
        "short": b"x",
        "page.html": b"<html>",
        "zeros": bytes(100),
    }
    for name, content in contents.items():
        Path("zoo", name).write_bytes(content)
    with zipfile.ZipFile("zoo/report.docx", "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    os.mkfifo("zoo/fifo")
    os.symlink(os.devnull, "zoo/null")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("zoo/socket")
        assert found("zoo") == found("zoo/*") == ["zoo/a.safetensors"]


def test_what_is_no_regular_file_is_refused_where_its_name_promises_tensors(tree):
    tree("zoo/a.safetensors", "elsewhere/b.safetensors")
    for name in ("zoo/fifo.safetensors", "zoo/fifo"):
        os.mkfifo(name)
    os.symlink("fifo", "zoo/link.pt")
    os.symlink(os.devnull, "zoo/null.npz")
    os.symlink(Path("elsewhere").absolute(), "zoo/folder.gguf")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("zoo/socket.gguf")
        reports = {report.path: report.error for report in scan_adapters("zoo")}
    assert reports.pop("zoo/a.safetensors") is None
    assert reports == {
        "zoo/fifo.safetensors": "it is a device, pipe or socket; name a file.",
        "zoo/link.pt": "it is a device, pipe or socket; name a file.",
        "zoo/null.npz": f"null.npz is a link to {os.devnull!r}, outside of 'zoo'; pass a folder "
        "that holds both, or a copy.",
        "zoo/socket.gguf": "it cannot be opened: No such device or address.",
    }


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        b"GGUF" + bytes(60),
        (2**30).to_bytes(8, "little") + b"{",
    ],
)
def test_damaged_files_are_found_so_that_they_are_refused_by_name(tree, content):
    tree("zoo/a.safetensors")
    Path("zoo/b").write_bytes(content)
    assert found("zoo") == ["zoo/a.safetensors", "zoo/b"]


@pytest.mark.parametrize("content", [b"", b"not found", b"no tensors at all"])
def test_names_of_tensor_files_alone_are_found_whatever_is_in_them(tree, content):
    tree("zoo/a.safetensors")
    for name in ("b.safetensors", "c.gguf", "d.bin", "README.md"):
        Path("zoo", name).write_bytes(content)
    assert found("zoo") == ["zoo/a.safetensors", "zoo/b.safetensors", "zoo/c.gguf"]


@pytest.mark.parametrize("member", ["notes.txt", "schema.json"])
def test_so_are_zip_files_without_tensors_by_such_a_name(tree, member):
    tree("zoo/a.safetensors")
    for name in ("b.safetensors", "c.zip"):
        with zipfile.ZipFile(f"zoo/{name}", "w") as archive:
            archive.writestr(member, "{}")
    assert found("zoo") == ["zoo/a.safetensors", "zoo/b.safetensors"]


def test_a_model_that_skops_stored_is_no_adapter(tree):
    tree("zoo/a.safetensors")
    with zipfile.ZipFile("zoo/model.skops", "w") as archive:
        archive.writestr("schema.json", "{}")
        archive.writestr("1.npy", b"numbers")
    assert found("zoo") == ["zoo/a.safetensors"]
    [report] = scan_adapters("zoo/model.skops")
    assert report.error == "it is a model that skops stored, not an adapter; name adapters."


def test_a_zip_file_with_arrays_among_others_is_found(tree):
    tree("zoo/a.safetensors")
    with zipfile.ZipFile("zoo/b.npz", "w") as archive:
        for name in ("notes.txt", "q.npy"):
            archive.writestr(name, b"")
    assert found("zoo") == ["zoo/a.safetensors", "zoo/b.npz"]


def test_a_zip_file_that_cannot_be_opened_is_taken_for_what_its_name_says(tree):
    tree("zoo/a.safetensors")
    for name in ("b.npz", "b.zip"):
        Path("zoo", name).write_bytes(b"PK\x03\x04 and no more")
    assert found("zoo") == ["zoo/a.safetensors", "zoo/b.npz"]


def test_a_dangling_link_is_taken_for_what_its_name_says(tree):
    tree("zoo/a.safetensors")
    for name in ("b.safetensors", "c.ckpt", "README.md"):
        Path("zoo", name).symlink_to("nothing")
    assert found("zoo") == ["zoo/a.safetensors", "zoo/b.safetensors", "zoo/c.ckpt"]


def test_a_folder_that_cannot_be_listed_is_found_so_that_it_is_refused(tree, monkeypatch):
    tree("zoo/a.safetensors", "zoo/locked/a.safetensors")
    scandir = os.scandir

    def locked(path):
        if path == "zoo/locked":
            raise PermissionError
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    assert found("zoo") == ["zoo/a.safetensors", "zoo/locked"]


class TestPickles:
    @pytest.fixture
    def save_pickles(self, tree):
        def make(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
            torch.save({"q": torch.ones(2)}, f"{folder}/adapter_model.bin")
            Path(folder, "args.bin").write_bytes(pickle.dumps([1], protocol=4))

        return make

    def test_are_passed_by_beside_other_adapters(self, tree, save_pickles):
        save_pickles("zoo/a")
        tree("zoo/a/adapter_model.safetensors")
        assert found("zoo") == found("zoo/*/*") == ["zoo/a/adapter_model.safetensors"]
        np.savez("zoo/a/adapter_model.npz", q=np.ones(2))
        assert found("zoo/a/*[nz]") == ["zoo/a/adapter_model.npz"]

    @pytest.mark.parametrize("name", ["adapter_model", "pytorch_lora_weights"])
    def test_are_found_where_loaders_take_them_by_name(self, tree, save_pickles, name):
        """PEFT takes adapter_model.bin where a safetensors file has another name."""
        save_pickles("zoo")
        Path("zoo/adapter_model.bin").rename(f"zoo/{name}.bin")
        tree("zoo/model.safetensors")
        assert set(found("zoo")) == {f"zoo/{name}.bin", "zoo/model.safetensors"}
        tree(f"zoo/{name}.safetensors")
        assert found("zoo") == sorted([f"zoo/{name}.safetensors", "zoo/model.safetensors"])

    def test_are_found_by_name_whatever_their_bytes(self, tree):
        """torch.load takes pickles that do not begin with the protocol."""
        tree("zoo/model.safetensors")
        path = Path("zoo/adapter_model.bin")
        torch.save({"q": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes().removeprefix(b"\x80\x02"))
        assert torch.load(path, weights_only=True)["q"].sum() == 2
        assert set(found("zoo")) == {str(path), "zoo/model.safetensors"}

    def test_are_found_where_there_is_nothing_else(self, tree, save_pickles):
        save_pickles("zoo/a")
        tree("zoo/b/adapter_model.safetensors")
        pickles = ["zoo/a/adapter_model.bin", "zoo/a/args.bin"]
        assert found("zoo") == [*pickles, "zoo/b/adapter_model.safetensors"]
        assert found("zoo/*/*.bin") == pickles

    def test_are_found_when_they_are_named(self, tree, save_pickles):
        save_pickles("zoo")
        tree("zoo/a.safetensors")
        assert found("zoo/args.bin") == ["zoo/args.bin"]


class TestPattern:
    @pytest.mark.parametrize(
        ("pattern", "expected"),
        [
            ("zoo/*.safetensors", ["a", "b"]),
            ("zoo/?.safetensors", ["a", "b"]),
            ("zoo/[b-z].safetensors", ["b"]),
            ("zoo/[!b-z].safetensors", ["a"]),
            ("*/a.safetensors", ["a"]),
            ("zoo/*/a.safetensors", ["c/a"]),
            ("zoo/c/*", ["c/a", "c/d/a"]),
            ("zoo/c*/", ["c/a", "c/d/a"]),
            ("zoo/*", ["a", "b", "c/a", "c/d/a"]),
            ("**/a.safetensors", ["a", "c/a", "c/d/a"]),
            ("zoo/**", ["a", "b", "c/a", "c/d/a"]),
            ("zoo/**/**/*.safetensors", ["a", "b", "c/a", "c/d/a"]),
            ("zoo/**/d/*", ["c/d/a"]),
            ("zoo/.*/*.safetensors", [".h/a"]),
        ],
    )
    def test_gives_what_matches_in_order(self, tree, pattern, expected):
        names = ["b", "a", "c/a", "c/d/a", ".h/a", ".x"]
        tree(*(f"zoo/{name}.safetensors" for name in names))
        expected = [f"zoo/{name}.safetensors" for name in expected]
        assert found(pattern) == expected
        absolute = os.path.join(os.getcwd(), pattern)
        assert found(absolute) == [os.path.join(os.getcwd(), path) for path in expected]

    def test_may_be_the_name_of_a_file(self, tree):
        tree("a[1].safetensors", "a1.safetensors", "[b]/c.safetensors")
        assert found("a[1].safetensors") == ["a[1].safetensors"]
        assert found("[b]") == ["[b]/c.safetensors"]

    @pytest.mark.timeout(60)
    def test_follows_no_links_in_stars(self, tree):
        tree("zoo/a.safetensors", "x/b.safetensors")
        for name in ("loop1", "loop2", "loop3"):
            Path("zoo", name).symlink_to(".")
        Path("zoo/x").symlink_to("../x")
        assert found("zoo/**/*.safetensors") == found("zoo/*") == ["zoo/a.safetensors"]

    @pytest.mark.parametrize("pattern", ["zoo/*", "zoo/*.bin", "*/*/*", "n*/a", "zoo/a*\0", "\0/*"])
    def test_that_matches_nothing_is_an_error(self, tree, pattern):
        Path("zoo").mkdir()
        with pytest.raises(AdapterError, match="there is no adapter in it") as error:
            find_files(pattern)
        assert error.value.path == pattern


def test_links_and_what_they_lead_to_are_one_adapter(tree):
    # As in the cache of Hugging Face.
    tree("hub/models--a/blobs/0123")
    snapshot = Path("hub/models--a/snapshots/main")
    snapshot.mkdir(parents=True)
    snapshot.joinpath("adapter_model.safetensors").symlink_to("../../blobs/0123")
    assert found("hub") == ["hub/models--a/snapshots/main/adapter_model.safetensors"]


def test_many_paths_keep_their_order(tree):
    tree("zoo/b.safetensors", "zoo/a.safetensors", "c.safetensors")
    paths = ["c.safetensors", "zoo/b.safetensors", Path("zoo"), "*.safetensors"]
    expected = [*paths[:2], "zoo/a.safetensors", "zoo/b.safetensors", "c.safetensors"]
    assert found(paths) == found(iter(paths)) == found(tuple(paths)) == expected
    assert found(path for path in paths) == expected
    assert found([]) == []


def test_a_file_that_does_not_exist_is_found(tree):
    assert found(["missing.safetensors", "a\0b", "x" * 5000]) == [
        "missing.safetensors",
        "a\0b",
        "x" * 5000,
    ]


@pytest.mark.parametrize("content", [None, "README.md"])
def test_a_folder_without_adapters_is_an_error(tree, content):
    Path("zoo").mkdir()
    if content:
        Path("zoo", content).write_text("text")
    with pytest.raises(AdapterError, match=r"zoo: there is no adapter in it .*; check the path"):
        find_files("zoo")


def test_errors_stand_in_the_place_of_paths(tree):
    tree("a.safetensors", "b.safetensors")
    Path("empty").mkdir()
    first, error, last = find_each(["a.safetensors", "empty", "b.safetensors"])
    assert isinstance(error, AdapterError)
    assert (first.path, error.path, last.path) == ("a.safetensors", "empty", "b.safetensors")


@pytest.mark.parametrize(
    "paths", [5, None, b"zoo", [b"zoo"], ["zoo", 3], [["zoo"]], {"zoo": 1}.items()]
)
def test_what_is_no_path_is_an_error(tree, paths):
    tree("zoo/a.safetensors")
    with pytest.raises(TypeError, match=r"paths (is|holds) .*pass"):
        find_files(paths)
