import io
import os
import pickle
import struct

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from sklora._untrusted import Refusal
from sklora.io import containers
from sklora.io.containers import HEAD_BYTES, open_tensor_file, sniff

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, x=ARRAY)
    return file.getvalue()


def torch_saved(value, **options) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory):
    path = tmp_path_factory.mktemp("open") / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("x", ARRAY)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


STATE = {"x": torch.from_numpy(ARRAY)}
FILES = {
    "safetensors": save({"x": ARRAY}),
    "npz": npz(),
    "torch-zip": torch_saved(STATE),
}
LEGACY = torch_saved(STATE, _use_new_zipfile_serialization=False)


@pytest.fixture
def files(ggufs):
    return {**FILES, "gguf": ggufs}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "adapter_model.bin"


@pytest.fixture
def no_file_left_open():
    """As many files are open after a test as before, where the system tells."""
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    yield
    after = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    assert len(after) == len(before)


class TestOpen:
    @pytest.mark.parametrize("container", ["safetensors", "npz", "torch-zip", "gguf"])
    @pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.npz", "a", "a.gguf", "a.md"])
    def test_by_content(self, container, name, files, tmp_path):
        (tmp_path / name).write_bytes(files[container])
        with open_tensor_file(str(tmp_path / name), allow_torch_zip=True) as file:
            assert file.container == container
            np.testing.assert_array_equal(file.read("x"), ARRAY)

    def test_closes(self, files, path, no_file_left_open):
        for content in files.values():
            path.write_bytes(content)
            with open_tensor_file(str(path), allow_torch_zip=True):
                pass

    def test_link(self, path, tmp_path):
        (tmp_path / "blob").write_bytes(FILES["safetensors"])
        path.symlink_to(tmp_path / "blob")
        with open_tensor_file(str(path), allow_torch_zip=False) as file:
            assert list(file.tensors) == ["x"]


REFUSED = {
    "torch-zip": (FILES["torch-zip"], "pass allow_torch_zip=True, which reads tensors alone"),
    "empty": (b"", "it is empty"),
    "lfs": (LFS, "fetch that with git lfs pull"),
    "web page": (b"\n <!DOCTYPE html><html>", "it is a web page"),
    "web page with mark": (b"\xef\xbb\xbf<html>", "it is a web page"),
    "JSON": (b'{"r": 8}', "it is JSON text"),
    "text": (b"---\nlicense: mit\n---\n", "it starts with b'---"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(60), "it starts with"),
    "short": (b"\x01", "it starts with"),
    "no brace": (struct.pack("<Q", 3) + b" {}", "it starts with"),
    "legacy torch": (LEGACY, "it is a pickle"),
    **{f"pickle {n}": (pickle.dumps({}, n), "it is a pickle") for n in range(2, 6)},
    "safetensors": (FILES["safetensors"][:-1], "but 23 bytes follow"),
    "npz": (FILES["npz"][:-1], "zip file without a directory"),
    "gguf": (b"GGUF", "past the end"),
}


class TestRefused:
    @pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED.keys())
    def test_content(self, content, message, path, no_file_left_open):
        path.write_bytes(content)
        with pytest.raises(Refusal, match=message):
            open_tensor_file(str(path), allow_torch_zip=False)

    @pytest.mark.parametrize("content", [LEGACY, pickle.dumps({}), LFS])
    def test_allowing_zips_allows_no_more(self, content, path):
        path.write_bytes(content)
        with pytest.raises(Refusal, match="it is a p"):
            open_tensor_file(str(path), allow_torch_zip=True)

    def test_missing(self, path):
        with pytest.raises(Refusal, match="cannot be opened: No such file"):
            open_tensor_file(str(path), allow_torch_zip=False)

    def test_below_a_file(self, path):
        path.write_bytes(b"")
        with pytest.raises(Refusal, match="cannot be opened: Not a directory"):
            open_tensor_file(str(path / "x"), allow_torch_zip=False)

    def test_no_path(self):
        with pytest.raises(Refusal, match=r"it is no path: .*null"):
            open_tensor_file("a\0b", allow_torch_zip=False)

    def test_folder(self, tmp_path, no_file_left_open):
        with pytest.raises(Refusal, match="it is a folder"):
            open_tensor_file(str(tmp_path), allow_torch_zip=False)

    def test_pipe(self, tmp_path, no_file_left_open):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(Refusal, match="it is a device, pipe or socket"):
            open_tensor_file(str(tmp_path / "pipe"), allow_torch_zip=False)

    def test_device(self, no_file_left_open):
        with pytest.raises(Refusal, match="it is a device"):
            open_tensor_file(os.devnull, allow_torch_zip=False)

    def test_permission(self, path, monkeypatch):
        def refuse(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(os, "open", refuse)
        with pytest.raises(Refusal, match="cannot be opened: Permission denied"):
            open_tensor_file(str(path), allow_torch_zip=False)

    def test_disk_error(self, path, monkeypatch, no_file_left_open):
        def fail(*_):
            raise OSError(5, "Input/output error")

        path.write_bytes(FILES["safetensors"])
        monkeypatch.setattr(containers, "SafetensorsFile", fail)
        with pytest.raises(Refusal, match="cannot be read: Input/output error"):
            open_tensor_file(str(path), allow_torch_zip=False)

    @given(
        content=st.binary(max_size=200),
        start=st.sampled_from([b"", b"PK\x03\x04", b"GGUF\x03\0\0\0"]),
    )
    def test_any_bytes(self, content, start, tmp_path_factory):
        path = tmp_path_factory.getbasetemp() / "any"
        path.write_bytes(start + content)
        try:
            open_tensor_file(str(path), allow_torch_zip=True).__exit__()
        except Refusal:
            return


class TestSniff:
    @pytest.mark.parametrize(
        ("container", "kind"),
        [("safetensors", "safetensors"), ("npz", "zip"), ("torch-zip", "zip"), ("gguf", "gguf")],
    )
    def test_containers(self, container, kind, files):
        assert sniff(files[container][:HEAD_BYTES]) == kind

    @pytest.mark.parametrize(
        ("head", "kind"),
        [
            (LFS, "lfs"),
            (LEGACY[:64], "pickle"),
            (pickle.dumps([1], 5), "pickle"),
            (b"\x80\x02" + bytes(6) + b"{", "safetensors"),
            (b"", None),
            (b"# A model card", None),
            (b'{"peft_type": "LORA"}', None),
            (b"        {", None),
            (b"\x89PNG\r\n\x1a\n", None),
            (b"<html>", None),
            (b"\x80\x01", None),
            (b"\x02\0\0\0\0\0\0\0[", None),
            (b"\x02\0\0\0\0\0\0\0", None),
        ],
    )
    def test_others(self, head, kind):
        assert sniff(head) == kind

    def test_headers_of_the_wild(self, shared_adapters):
        kinds = {path: sniff(path.read_bytes()[:64]) for path in shared_adapters.glob("*/*")}
        for path, kind in kinds.items():
            expected = {".safetensors": "safetensors", ".bin": "zip", ".pt": "zip"}.get(path.suffix)
            if path.parent.name != "safetensors_attack":
                assert kind == expected
