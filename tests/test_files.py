"""Files that are written whole or not at all."""

import errno
import os
import re

import pytest

from sklora._files import check_place, complete_folder, replacing


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (".", ValueError, "p is a folder; name a file in it"),
        ("new/", ValueError, "p is a folder"),
        ("no/file", FileNotFoundError, "p: there is no folder '.*/no'; make it first"),
        ("pipe/file", FileNotFoundError, "p: there is no folder '.*/pipe'; make it first"),
        ("dangling", FileNotFoundError, "p: there is no folder '.*/none'; make it first"),
        ("pipe", FileExistsError, "p is no regular file, and would be replaced; name another"),
        ("n" * 300, OSError, "p: File name too long; name another"),
    ],
)
def test_places_that_no_file_can_be_written_to(tmp_path, monkeypatch, path, error, message):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    os.symlink("none/file", "dangling")
    with pytest.raises(error, match=message):
        check_place(path, "p")


def test_places_of_files_that_can_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("file", tmp_path / "file", "./file"):
        check_place(path, "p")
    (tmp_path / "file").write_bytes(b"")
    check_place("file", "p")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_replaced(tmp_path, make):
    """Such as the null device."""
    path = tmp_path / "there"
    make(path)
    before = path.stat()
    with pytest.raises(FileExistsError, match="no regular file"), replacing(path):
        pytest.fail("was written to")
    assert path.stat() == before
    assert list(tmp_path.iterdir()) == [path]


def test_errors_name_the_file_that_was_asked_for(tmp_path):
    path = tmp_path / "none" / "file"
    with pytest.raises(FileNotFoundError, match=f"'{path}'$"), replacing(path):
        pass


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_is_named_by_the_file_that_did_not_fit(tmp_path, monkeypatch, number):
    def full(descriptor):
        raise OSError(number, "No space left on device")

    path = tmp_path / "file"
    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(OSError, match=f"No space left on device: '{path}'$"),
        replacing(path) as file,
    ):
        file.write(b"new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full", "other"), OSError(errno.EIO, "e")])
def test_other_errors_stay_as_they_are(tmp_path, error):
    """Whatever becomes of the unfinished file."""

    def fail(file):
        os.remove(file.name)
        raise error

    path, message = tmp_path / "file", re.escape(str(error))
    with pytest.raises(OSError, match=f"^{message}$"), replacing(path) as file:
        fail(file)


def test_all_is_on_the_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    def check(descriptor):
        assert os.fstat(descriptor).st_size == 3
        assert not path.exists()

    path = tmp_path / "file"
    monkeypatch.setattr(os, "fsync", check)
    with replacing(path) as file:
        file.write(b"new")
    assert path.exists()


@pytest.mark.parametrize("there", [True, False])
def test_file_is_replaced_when_it_is_complete(tmp_path, there):
    path = tmp_path / "file"
    if there:
        path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        file.flush()
        assert path.exists() == there
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["m" * 250, "漢" * 83])
def test_longest_names_that_disks_take(tmp_path, name):
    with replacing(tmp_path / name) as file:
        file.write(b"new")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_two_may_write_one_file_at_once(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as last, replacing(path) as first:
        last.write(b"last")
        first.write(b"first")
    assert path.read_bytes() == b"last"
    assert list(tmp_path.iterdir()) == [path]


def test_folder_may_end_in_a_slash(tmp_path):
    with complete_folder(f"{tmp_path}/new/"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
