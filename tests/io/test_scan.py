import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from sklora.io import AdapterReport, ScannedModule, scan_adapters
from sklora.io.containers.safetensors import SafetensorsFile

PREFIX = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_"


def kohya(path, modules=("to_q", "to_k"), alpha=2, rank=4, dtype=np.float16, metadata=None, **more):
    tensors = dict(more)
    for module in modules:
        tensors[f"{PREFIX}{module}.lora_down.weight"] = np.ones((rank, 3), dtype)
        tensors[f"{PREFIX}{module}.lora_up.weight"] = np.ones((5, rank), dtype)
        tensors[f"{PREFIX}{module}.alpha"] = np.array(alpha, dtype)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(save(tensors, metadata))


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_report_says_all_that_is_in_the_header():
    kohya("a.safetensors", **{"lora_te_norm.w_norm": np.ones(3, np.float32)})
    [report] = scan_adapters("a.safetensors")
    path = f"{PREFIX}to_k"
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
    assert report.modules[0] == ScannedModule(name, path, "lora", 5, 3, 4, 0.5)
    assert [module.path for module in report.modules] == [path, f"{PREFIX}to_q"]
    assert (report.path, report.error) == ("a.safetensors", None)
    assert (report.format, report.container, report.base_model) == ("kohya", "safetensors", None)
    assert (report.dtypes, report.ranks, report.scales, report.side) == (("F16",), (4,), (0.5,), ())
    [(tensor, reason)] = report.left_out
    assert (tensor, bool(reason)) == ("lora_te_norm.w_norm", True)


def test_ranks_scales_and_dtypes_are_those_that_occur():
    kohya("a", modules=["to_q"], rank=4)
    kohya("b", modules=["to_k"], rank=2, alpha=8, dtype=np.float32)
    tensors = load(Path("a").read_bytes()) | load(Path("b").read_bytes())
    Path("both").write_bytes(save(tensors))
    [report] = scan_adapters("both")
    assert (report.ranks, report.scales, report.dtypes) == ((2, 4), (0.5, 4.0), ("F16", "F32"))


def test_side_features_and_base_model_are_named():
    tensors = {
        "base_model.model.q.lora_A.weight": np.ones((1, 2), np.float32),
        "base_model.model.q.lora_B.weight": np.ones((3, 1), np.float32),
        "base_model.model.q.lora_magnitude_vector": np.ones(3, np.float32),
    }
    Path("adapter_model.safetensors").write_bytes(save(tensors))
    config = {"peft_type": "LORA", "lora_alpha": 3, "use_dora": True}
    config["base_model_name_or_path"] = "org/base"
    Path("adapter_config.json").write_text(json.dumps(config))
    [report] = scan_adapters(".")
    assert report.base_model == "org/base"
    assert report.side == (("q:magnitude_out", 3),)
    assert report.scales == (3.0,)


def test_reports_are_in_the_order_of_the_paths_with_what_is_wrong():
    for name in ("zoo/b", "zoo/a", "c"):
        kohya(name)
    Path("zoo/damaged.safetensors").write_bytes(b"\x10" + bytes(7) + b"{")
    Path("zoo/README.md").write_text("text")
    Path("nan").mkdir()
    kohya("nan/a", alpha=np.nan)
    os.mkdir("empty")
    os.mkfifo("fifo")
    paths = [
        "c",
        "zoo",
        "missing",
        "empty",
        "none*",
        "fifo",
        "a\0b",
        "x" * 5000,
        "nan",
        "",
        "zoo/README.md",
    ]
    reports = scan_adapters(path for path in paths)
    expected = ["c", "zoo/a", "zoo/b", "zoo/damaged.safetensors", *paths[2:8], "nan/a", *paths[9:]]
    assert [report.path for report in reports] == expected
    good = {report.path for report in reports if report.error is None}
    assert good == {"c", "zoo/a", "zoo/b"}
    for report in reports:
        if report.error is not None:
            assert report == AdapterReport(report.path, report.error)
            assert report.error.endswith(".")
    [nan] = [report for report in reports if report.path == "nan/a"]
    assert "NaN or infinity" in nan.error
    assert "alpha" in nan.error


def test_a_report_is_json():
    hostile = {"é<script>": np.ones((2, 2), np.float32), '"\\': np.ones(1, np.float32)}
    kohya(os.fsdecode(b"zoo/\xff\x1b[2J\n.safetensors"), **hostile)
    kohya("zoo/ok")
    Path("zoo/bad.safetensors").write_bytes(b"")
    reports = scan_adapters("zoo")
    for report in reports:
        text = json.dumps(report.to_dict(), allow_nan=False)
        assert text.isprintable()
        again = json.loads(text)
        assert again == report.to_dict()
        assert again["path"] == report.path
        assert [ScannedModule(**module) for module in again["modules"]] == list(report.modules)
        assert list(map(tuple, again["left_out"])) == list(report.left_out)
        assert again["dtypes"] == list(report.dtypes)
    bad = [report.path for report in reports if report.error is not None]
    assert (len(reports), bad) == (3, ["zoo/bad.safetensors"])


def test_options_reach_the_formats():
    Path("own").write_bytes(save({"w_a_0": np.ones((2, 3)), "w_b_0": np.ones((4, 2))}))
    [report] = scan_adapters("own", keys=("w_a_{module}", "w_b_{module}"), scale=3)
    assert (report.format, report.scales, report.modules[0].name) == ("custom", (3.0,), "0")
    kohya("a")
    [report] = scan_adapters("a", names="raw")
    assert [module.name for module in report.modules] == [f"{PREFIX}to_k", f"{PREFIX}to_q"]


@pytest.mark.parametrize(
    ("argument", "value"),
    [("names", 1), ("keys", "q"), ("scale", np.inf), ("lokr", ""), ("allow_torch_zip", "yes")],
)
def test_arguments_are_checked(argument, value):
    with pytest.raises(ValueError, match=f"{argument} is .*(pass|choose)"):
        scan_adapters([], **{argument: value})
    assert scan_adapters([]) == []


def test_modules_that_files_share_are_kept_once():
    kohya("zoo/a", metadata={"name": "a"})
    kohya("zoo/b", metadata={"name": "b"})
    a, b = scan_adapters("zoo")
    assert all(mine is theirs for mine, theirs in zip(a.modules, b.modules, strict=True))


def test_no_numbers_but_alpha_are_read(monkeypatch):
    read, names = SafetensorsFile.read, []

    def watched(self, name):
        names.append(name)
        return read(self, name)

    monkeypatch.setattr(SafetensorsFile, "read", watched)
    kohya("a")
    assert scan_adapters("a")[0].error is None
    assert sorted(names) == [f"{PREFIX}to_k.alpha", f"{PREFIX}to_q.alpha"]
