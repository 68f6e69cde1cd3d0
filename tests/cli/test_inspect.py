import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from sklora.cli._inspect import _cells
from sklora.io import AdapterReport, write_adapter
from sklora.io._scan import ScannedModule


def test_table(run, zoo):
    code, out, err = run("inspect", zoo / "a00", zoo / "a01")
    lines = [line.split() for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert lines[0][:3] == ["path", "format", "modules"]
    path = str(zoo / "a00" / "adapter_model.safetensors")
    assert lines[1] == [path, "peft", "2", "2", "1", "F64", "tiny/llama", "0", "0"]
    assert len({line.index("peft") for line in out.splitlines()[1:]}) == 1
    header, row, _ = out.splitlines()
    for heading, number in (("modules", "2"), ("rank", "2"), ("side", "0"), ("left out", "0")):
        end = header.index(heading) + len(heading)  # numbers end where their headings do
        assert row[end - 2 : end] == f" {number}"
    assert row[header.index("base model") :].startswith("tiny/llama")


def test_many_ranks_are_summarised(run, tmp_path, factors):
    adapter = {}
    for rank in range(1, 6):
        adapter |= factors(shapes={f"m{rank}": (8, 8)}, rank=rank)
    write_adapter(tmp_path, adapter)
    assert " 1..5 " in run("inspect", tmp_path).out


def test_a_row_tells_apart_ranks_scales_side_features_and_what_is_left_out():
    modules = [
        ScannedModule("m", "m", "lora", 8, 8, rank, scale)
        for rank, scale in ((1, 0.5), (2, 1.23456), (3, 1.5), (3, 2.0))
    ]
    report = AdapterReport(
        "a", None, "peft", modules=tuple(modules), side=(("s", 1),), left_out=(("t", ""),) * 2
    )
    assert _cells(report) == ("a", "peft", "4", "1,2,3", "0.5..2", "", "-", "1", "2")
    assert _cells(replace(report, modules=modules[1:2]))[4] == "1.235"


def test_json(run, zoo):
    code, out, _ = run("inspect", zoo, "--json")
    reports = json.loads(out)
    assert code == 0
    assert len(reports) == 40
    assert reports[0]["format"] == "peft"
    assert [module["rank"] for module in reports[0]["modules"]] == [2, 2]


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_bad_files_among_good_ones(run, zoo, tmp_path, form):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\x08\0\0\0\0\0\0\0{}{}{}{}")
    code, out, err = run("inspect", bad, zoo / "a00", tmp_path / "missing", *form)
    assert (code, err) == (1, "")
    if form:
        errors = [report["error"] for report in json.loads(out)]
        assert errors[1] is None
        assert all(errors[::2])
        assert out.count("\n\n") == 0
    else:
        assert "tiny/llama" in out
        assert out.count("\n\n") == 1  # between the two tables
        assert [line.split()[0] for line in out.splitlines()[-2:]] == [
            str(bad),
            str(tmp_path / "missing"),
        ]


@pytest.mark.parametrize("name", ["", "missing"])
def test_only_bad_files(run, tmp_path, name):
    code, out, _ = run("inspect", tmp_path / name)
    assert code == 1
    assert out.splitlines()[0].split() == ["path", "error"]


def test_hostile_names_are_escaped(run, tmp_path, factors):
    name = "\x1b[31mred\r\n\u202e"
    write_adapter(tmp_path / name, factors(), base_model="\x1b]0;pwned\x07")
    (tmp_path / f"{name}.safetensors").write_bytes(b"nothing")
    code, out, err = run("inspect", tmp_path)
    assert code == 1
    assert (out + err).replace("\n", "").isprintable()
    assert "\\x1b[31mred\\r\\n\\u202e" in out
    assert "\\x1b]0;pwned\\x07" in out
    bad, good = json.loads(run("inspect", tmp_path, "--json").out)
    assert bad["error"]
    assert good["base_model"].startswith("\x1b")


def test_name_that_is_no_text(run, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.safetensors")
    with open(path, "wb") as file:
        file.write(b"nothing")
    code, out, _ = run("inspect", path)
    assert code == 1
    assert "\\udcff" in out


class TestOptions:
    @pytest.fixture
    def in_house(self, tmp_path):
        tensors = {"a.q": np.ones((2, 4), np.float32), "b.q": np.ones((6, 2), np.float32)}
        save_file(tensors, tmp_path / "own.safetensors")
        return tmp_path / "own.safetensors"

    def test_keys_and_scale(self, run, in_house):
        options = ("--keys", "a.{module}", "b.{module}", "--scale", "0.5", "--json")
        code, out, _ = run("inspect", in_house, *options)
        [report] = json.loads(out)
        assert code == 0
        assert (report["modules"][0]["name"], report["modules"][0]["scale"]) == ("q", 0.5)

    @pytest.mark.parametrize("form", [(), ("--json",)])
    def test_remedies_name_options(self, run, in_house, form):
        code, out, _ = run("inspect", in_house, *form)
        assert code == 1
        assert "--keys" in out

    def test_torch_zip(self, run, tmp_path):
        tensors = {"q.lora_A.weight": torch.ones(2, 4), "q.lora_B.weight": torch.ones(6, 2)}
        torch.save(tensors, tmp_path / "adapter_model.bin")
        code, out, _ = run("inspect", tmp_path, "--scale", "1")
        assert (code, "--allow-torch-zip" in out) == (1, True)
        assert run("inspect", tmp_path, "--scale", "1", "--allow-torch-zip").code == 0

    def test_names(self, run, zoo):
        out = run("inspect", zoo / "a00", "--names", "raw", "--json").out
        names = {module["name"] for module in json.loads(out)[0]["modules"]}
        assert "base_model.model.layers.0.q_proj" in names

    @pytest.mark.parametrize("options", [("--keys", "a", "b"), ("--scale", "nan")])
    def test_impossible(self, run, in_house, options):
        code, out, err = run("inspect", in_house, *options)
        assert (code, out) == (2, "")
        assert err.startswith(f"sklora: error: {options[0]}")
