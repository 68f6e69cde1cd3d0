"""Files that mean harm: nothing is followed, run, or made large."""

import json
import math
import os
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save

from sklora import SVDSpectrum
from sklora.io import AdapterError, read_adapters, scan_adapters

PREFIX = "base_model.model."
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@contextmanager
def memory_below(n_bytes):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < n_bytes
    finally:
        tracemalloc.stop()


def peft(folder, config=CONFIG, tensors=None):
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = tensors or {
        f"{PREFIX}q.lora_A.weight": np.ones((2, 3), np.float32),
        f"{PREFIX}q.lora_B.weight": np.ones((4, 2), np.float32),
    }
    Path(folder, "adapter_model.safetensors").write_bytes(save(tensors))
    if config is not None:
        text = config if isinstance(config, (str, bytes)) else json.dumps(config)
        text = text.encode() if isinstance(text, str) else text
        Path(folder, "adapter_config.json").write_bytes(text)
    return f"{folder}/adapter_model.safetensors"


def safetensors(path, entries, data=b"", text=None):
    """Write a header as it is given, which no library would write."""
    header = (json.dumps(entries) if text is None else text).encode()
    Path(path).write_bytes(len(header).to_bytes(8, "little") + header + data)


def assert_refused(path, reason, **options):
    """Both ways in say why, with the file's name, and the message is short and printable."""
    with pytest.raises(AdapterError, match=reason) as error:
        read_adapters(path, **options).read()
    [report] = scan_adapters(path, **options)
    assert report.error == error.value.reason
    assert report.path == error.value.path
    assert len(error.value.reason) < 1000
    assert error.value.reason.isprintable()


class TestLinks:
    @pytest.fixture(autouse=True)
    def _outside(self):
        self.outside = peft("zoo-outside")  # no folder of a name that begins alike is inside
        peft("zoo/a")

    @pytest.mark.parametrize("paths", ["zoo", "zoo/*", "zoo/**/*.safetensors"])
    def test_a_file_that_leads_outside_is_refused_by_name(self, paths, monkeypatch):
        Path("zoo/x.safetensors").symlink_to("../zoo-outside/adapter_model.safetensors")
        opened = watch_opened(monkeypatch)
        [bad] = [report for report in scan_adapters(paths) if report.error]
        assert bad.path == "zoo/x.safetensors"
        assert "x.safetensors is a link to" in bad.error
        assert "outside of 'zoo'; pass a folder that holds both" in bad.error
        with pytest.raises(AdapterError, match=r"x.safetensors is a link"):
            read_adapters(paths)
        assert not any("x.safetensors" in path for path in opened)

    def test_a_file_below_a_link_that_leads_outside_is_refused(self):
        Path("zoo/x").symlink_to("../zoo-outside")
        with pytest.raises(
            AdapterError, match=r"^zoo/x/adapter_model.safetensors: .* is a link to"
        ):
            read_adapters("zoo/*/adapter_model.safetensors")
        assert len(read_adapters("zoo")) == 1

    def test_a_link_within_the_folder_is_followed(self):
        Path("zoo/b").mkdir()
        Path("zoo/b/x.safetensors").symlink_to("../a/adapter_model.safetensors")
        Path("zoo/b/adapter_config.json").symlink_to("../a/adapter_config.json")
        assert read_adapters("zoo").ids.tolist() == ["zoo/b/x.safetensors"]

    def test_a_link_that_the_user_names_is_followed(self):
        Path("mine.safetensors").symlink_to(self.outside)
        Path("adapter_config.json").write_text(json.dumps(CONFIG))
        assert read_adapters("mine.safetensors").ids.tolist() == ["mine.safetensors"]
        Path("entry").symlink_to("zoo")
        assert len(read_adapters("entry")) == 1

    def test_a_file_that_became_a_link_is_refused(self):
        X = read_adapters("zoo")
        state = os.stat(X.ids[0])
        os.utime(self.outside, ns=(state.st_atime_ns, state.st_mtime_ns))
        Path(X.ids[0]).unlink()
        Path(X.ids[0]).symlink_to("../../zoo-outside/adapter_model.safetensors")
        with pytest.raises(AdapterError, match=r"is a link to .*outside of"):
            X.read()

    @pytest.mark.parametrize(
        "target", ["../../zoo-outside/adapter_config.json", "../../nothing", "/etc/passwd"]
    )
    @pytest.mark.parametrize(
        "path", ["zoo", "zoo/a/adapter_model.safetensors", "zoo/*/*.safetensors"]
    )
    def test_a_configuration_that_leads_outside_is_refused(self, target, path, monkeypatch):
        Path("zoo/a/adapter_config.json").unlink()
        Path("zoo/a/adapter_config.json").symlink_to(target)
        opened = watch_opened(monkeypatch)
        assert_refused(path, r"adapter_config.json is a link to .*, outside of 'zoo")
        assert not any("adapter_config" in path for path in opened)


def watch_opened(monkeypatch):
    """Note what is opened from now on."""
    opened, real = [], os.open

    def watched(path, *args, **kwargs):
        opened.append(os.fspath(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", watched)
    return opened


class TestConfiguration:
    def test_that_is_a_pipe_is_refused(self):
        path = peft("a", None)
        os.mkfifo("a/adapter_config.json")
        assert_refused(path, "of adapter_config.json beside it: it is a device, pipe or socket")

    def test_that_is_a_folder_is_refused(self):
        path = peft("a", None)
        os.mkdir("a/adapter_config.json")
        assert_refused(path, "of adapter_config.json beside it: it is a folder")

    def test_that_links_in_a_circle_is_refused(self):
        path = peft("a", None)
        Path("a/adapter_config.json").symlink_to("adapter_config.json")
        assert_refused(path, "adapter_config.json beside it: it cannot be opened: Too many levels")

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ('"' + "x" * 2**21 + '"', "at most 1048576 are read"),
            ("[" * 10**5, "is nested too deeply|is no JSON"),
            ('{"a":' * 10**5, "is nested too deeply|is no JSON"),
            ("", "is no JSON"),
            ("{", "is no JSON"),
            (b"\xff\xfe\xff", "is no JSON"),
            ("1" * 10**4, "is no JSON"),
            ("[]", "is no mapping"),
            ("null", "is no mapping"),
            ('"LORA"', "is no mapping"),
            ('{"peft_type": "LORA", "lora_alpha": NaN}', "lora_alpha is nan"),
            ('{"peft_type": "LORA", "lora_alpha": 1e999}', "lora_alpha is inf"),
            ('{"peft_type": "LORA", "lora_alpha": "16"}', "lora_alpha is '16'"),
            ('{"peft_type": "LORA", "lora_alpha": true}', "lora_alpha is True"),
            ('{"peft_type": "LORA", "lora_alpha": 1%s}' % ("0" * 400), "lora_alpha is 1"),
            ('{"peft_type": "LORA"}', "lora_alpha is None"),
            ('{"peft_type": ["LORA"]}', "peft_type"),
            ('{"peft_type": {"a": 1}}', "peft_type"),
            ('{"peft_type": "\\u001b[2J\\n"}', "peft_type"),
            ('{"peft_type": "%s"}' % ("x" * 10**5), "peft_type"),
            ('{"peft_type": "LORA", "lora_alpha": 1, "alpha_pattern": [1]}', "alpha_pattern"),
            ('{"peft_type": "LORA", "lora_alpha": 1, "alpha_pattern": {"(": 1}}', "pattern"),
            ('{"peft_type": "LORA", "lora_alpha": 1, "alpha_pattern": {"q": [1]}}', "q is"),
        ],
    )
    def test_that_is_no_good_is_refused(self, text, reason):
        with memory_below(2**25):
            assert_refused(peft("a", text), reason)

    @pytest.mark.parametrize(("begin", "end"), [("[", "]"), ('{"a":', "}")])
    def test_of_any_depth_is_read_or_refused(self, begin, end):
        peft("a")
        seen = set()
        # What is parsed must not be too deep for what comes after. Since 3.12, Python parses more.
        for depth in (*range(500, 1000), 1500, 3000, 6000, 9000, 12_000, 100_000):
            text = f'{{"peft_type": "LORA", "lora_alpha": 2, "x": {begin * depth}1{end * depth}}}'
            Path("a/adapter_config.json").write_text(text)
            seen.add(scan_adapters("a")[0].error)
        assert seen == {None, "adapter_config.json beside it is nested too deeply."}

    def test_of_which_a_key_stands_twice_is_read_as_by_json(self):
        peft("a", '{"peft_type": "LORA", "lora_alpha": 2, "lora_alpha": 8}')
        assert scan_adapters("a")[0].scales == (4.0,)

    @pytest.mark.timeout(60)
    def test_patterns_cannot_take_long(self):
        config = CONFIG | {"alpha_pattern": {"(a+)+" * 20: 1, "(.*.*.*)*x": 2}}
        name = "a" * 900
        tensors = {
            f"{PREFIX}{name}.lora_A.weight": np.ones((2, 3), np.float32),
            f"{PREFIX}{name}.lora_B.weight": np.ones((4, 2), np.float32),
        }
        scan_adapters(peft("a", config, tensors))

    def test_nothing_that_it_names_is_opened_or_imported(self, monkeypatch):
        os.mkfifo("pipe")
        Path("canary.py").write_text("open('ran', 'w')")
        Path("canary").mkdir()
        places = ["pipe", "canary", "canary.py", os.path.abspath("canary")]
        for place in places:
            config = CONFIG | {
                "base_model_name_or_path": place,
                "auto_mapping": {"base_model_class": "canary", "parent_library": place},
                "task_type": place,
                "tokenizer": place,
                "_name_or_path": place,
                "$ref": place,
            }
            peft("a", config)
            opened = watch_opened(monkeypatch)
            read_adapters("a").read()
            scan_adapters("a")
            assert {os.path.basename(path) for path in opened} <= {
                "adapter_model.safetensors",
                "adapter_config.json",
            }
        assert not os.path.exists("ran")


class TestNames:
    @pytest.mark.parametrize(
        "name", ["../../etc/passwd", "/etc/passwd", "..\\..\\x", "a b", "é/ü", "'\""]
    )
    def test_that_look_like_paths_are_names(self, name):
        safetensors_file = {
            f"{name}.lora_down.weight": np.ones((1, 2), np.float32),
            f"{name}.lora_up.weight": np.ones((3, 1), np.float32),
        }
        Path("a").write_bytes(save(safetensors_file))
        X = read_adapters("a", names="raw")
        assert X.layout.names == (name,)
        assert X.read().all()
        assert os.listdir() == ["a"]

    @pytest.mark.parametrize(
        "name", ["a\0b", "a\nb", "\x1b[2J", "\u202e", "\ud800", "x" * 10**5, ""]
    )
    def test_that_cannot_be_shown_are_refused(self, name):
        tensors = {}
        for role, shape, span in (("down", [1, 2], [0, 8]), ("up", [3, 1], [8, 20])):
            tensors[f"{name}.lora_{role}.weight" if name else ""] = {
                "dtype": "F32",
                "shape": shape,
                "data_offsets": span,
            }
        safetensors("a", tensors, bytes(20))
        assert_refused("a", "name|twice|hole|Unicode")

    @pytest.mark.parametrize("name", [b"a\nb", b"\x1b[2J", b"\xff\xfe"])
    def test_of_files_are_escaped_in_messages(self, name):
        path = os.fsdecode(name)
        Path(path).write_bytes(b"")
        with pytest.raises(AdapterError) as error:
            read_adapters(path)
        assert error.value.path == path
        assert str(error.value).isprintable()
        str(error.value).encode()

    @pytest.mark.parametrize("differs", ["base model", "module"])
    def test_of_other_files_are_escaped_in_messages(self, differs):
        """What is wrong with one file may be that it does not fit another."""
        peft("\x1b[2J", CONFIG | {"base_model_name_or_path": "one"})
        config, tensors = CONFIG | {"base_model_name_or_path": "other"}, None
        if differs == "module":
            names = (f"{PREFIX}q.lora_{factor}.weight" for factor in "AB")
            config, tensors = CONFIG, {name: np.ones((2, 2), np.float32) for name in names}
        peft("b", config, tensors)
        with pytest.raises(AdapterError, match=differs) as error:
            read_adapters(["\x1b[2J", "b"])
        assert error.value.reason.isprintable()

    def test_of_links_are_escaped_in_messages(self):
        Path("a").mkdir()
        Path("a/\x1b[2J.safetensors").symlink_to("/nowhere")
        with pytest.raises(AdapterError, match="is a link to") as error:
            read_adapters("a")
        assert error.value.reason.isprintable()


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


class TestHeaders:
    def test_two_names_over_one_range_are_refused(self):
        safetensors(
            "a",
            {"q.lora_down.weight": entry([1, 2], 0, 8), "q.lora_up.weight": entry([2, 1], 0, 8)},
            bytes(8),
        )
        assert_refused("a", "overlaps")

    def test_a_name_that_stands_twice_is_refused(self):
        text = json.dumps({"q.lora_down.weight": entry([1, 2], 0, 8)})
        safetensors("a", None, bytes(8), text=f"{text[:-1]}, {text[1:]}")
        assert_refused("a", "twice")

    @pytest.mark.parametrize(
        "shape", [[2**62, 0], [0, 2**62], [0], [2**62, 2**62, 0], [-1, 0], [10**400, 0]]
    )
    def test_empty_tensors_of_large_dimensions_are_refused(self, shape):
        safetensors(
            "a", {"q.lora_down.weight": entry(shape, 0, 0), "q.lora_up.weight": entry([0, 0], 0, 0)}
        )
        assert_refused("a", ".")

    def test_20000_empty_tensors_are_refused(self):
        tensors = {
            f"{i}.lora_{role}.weight": entry([0, 2], 0, 0)
            for i in range(10_000)
            for role in ("down", "up")
        }
        safetensors("a", tensors)
        [report] = scan_adapters("a")
        assert "do not fit together" in report.error

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("which", ["lora_down.weight", "lora_up.weight", "alpha", "dora_scale"])
    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
    def test_nan_and_infinity_are_refused(self, value, which, dtype):
        tensors = {
            "q.lora_down.weight": np.ones((1, 2), dtype),
            "q.lora_up.weight": np.ones((3, 1), dtype),
            "q.alpha": np.ones((), dtype),
            "q.dora_scale": np.ones((3, 1), dtype),
        }
        tensors[f"q.{which}"].reshape(-1)[-1:] = value
        Path("a").write_bytes(save(tensors))
        X = read_adapters("a")
        with pytest.raises(AdapterError, match=rf"/a: .*'q.{which}' has NaN or infinity"):
            X.read()
        [report] = scan_adapters("a")
        assert (report.error is None) == (which != "alpha")

    @pytest.mark.parametrize(
        ("down", "up", "alpha", "reason"),
        [
            ((2, 3), (4, 3), (), "do not fit together"),
            ((0, 3), (4, 0), (), "rank 0"),
            ((2, 0), (4, 2), (), r"shape \(4, 0\)"),
            ((2,), (4, 2), (), "do not fit together"),
            ((2, 3), (4, 2), (2,), "alpha is one number"),
            ((2, 3), (4, 2), (0,), "alpha is one number"),
        ],
    )
    def test_shapes_that_make_no_update_are_refused(self, down, up, alpha, reason):
        tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": alpha}
        Path("a").write_bytes(
            save({f"q.{name}": np.ones(shape, np.float32) for name, shape in tensors.items()})
        )
        assert_refused("a", reason)

    @pytest.mark.parametrize("alpha", [3.4e38, -3.4e38])
    def test_a_scale_that_overflows_is_refused(self, alpha):
        tensors = {
            "q.lora_down.weight": np.full((1, 2), 3e38, np.float32),
            "q.lora_up.weight": np.full((3, 1), 3e38, np.float32),
            "q.alpha": np.array(alpha, np.float32),
        }
        Path("a").write_bytes(save(tensors))
        with pytest.raises(AdapterError, match="cannot hold"):
            read_adapters("a").read()

    def test_git_lfs_pointers_are_refused_with_the_remedy(self):
        Path("a.safetensors").write_bytes(
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        )
        assert_refused("a.safetensors", "git lfs pull")
        assert_refused(".", "git lfs pull")

    def test_pickles_are_refused_with_the_remedy(self):
        torch.save({"q": torch.ones(2)}, "adapter_model.bin")
        assert_refused("adapter_model.bin", "PyTorch pickle.*safetensors.*allow_torch_zip=True")
        assert_refused(".", "PyTorch pickle.*safetensors.*allow_torch_zip=True")

    def test_the_attack_from_the_wild_is_refused(self, shared_adapters):
        for path in sorted(shared_adapters.joinpath("safetensors_attack").iterdir()):
            assert_refused(path, ".")


class TestSize:
    def test_a_lora_that_implies_360_gb_takes_the_size_of_its_file(self):
        n = 300_000
        Path("a").write_bytes(
            save(
                {
                    "q.lora_down.weight": np.ones((1, n), np.float16),
                    "q.lora_up.weight": np.ones((n, 1), np.float16),
                }
            )
        )
        size = os.path.getsize("a")
        assert size < 1.3e6
        with memory_below(size / 4):
            [report] = scan_adapters("a")
            assert (report.modules[0].n, report.modules[0].m) == (n, n)
            X = read_adapters("a")
        with memory_below(8 * size):
            assert X.read().shape == (1, 2 * n)
        with memory_below(16 * size):
            spectrum = SVDSpectrum(device="cpu").fit_transform(X)
        np.testing.assert_allclose(spectrum, [[n]], rtol=1e-6)

    def test_a_lokr_that_implies_7e10_entries_is_refused_or_read_as_an_outer_product(self):
        side = 512
        tensors = {f"q.lokr_w{i}": np.ones((side, side), np.float16) for i in (1, 2)}
        Path("a").write_bytes(save(tensors))
        size = os.path.getsize("a")
        assert size < 1.1e6
        assert side**4 > 6.8e10
        with memory_below(size / 4):
            assert_refused("a", "lokr='kronecker'")
        with memory_below(12 * size):
            X = read_adapters("a", lokr="kronecker")
            assert X.shape == (1, 2 * side**2)
            assert X.read().all()
        with memory_below(16 * size):
            spectrum = SVDSpectrum(device="cpu").fit_transform(X)
        np.testing.assert_allclose(spectrum, [[side**2]], rtol=1e-6)

    @pytest.mark.parametrize("lokr", ["exact", "kronecker"])
    @pytest.mark.parametrize("roles", ["loha", "lokr"])
    def test_products_of_low_rank_parts_are_bounded(self, roles, lokr):
        n, r = 2**15, 8
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        if roles == "lokr":
            names = ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b")
        shapes = [(n, r), (r, n)] * 2
        Path("a").write_bytes(
            save(
                {
                    f"q.{name}": np.ones(shape, np.float16)
                    for name, shape in zip(names, shapes, strict=True)
                }
            )
        )
        size = os.path.getsize("a")
        with memory_below(300 * size):
            [report] = scan_adapters("a", lokr=lokr)
            if report.error is None:
                X = read_adapters("a", lokr=lokr)
                assert X.nbytes < 300 * size
                assert math.isfinite(X.read()[0, 0])
            else:
                assert roles == "lokr"
                assert_refused("a", "its exact factors have .* numbers", lokr=lokr)

    def test_an_archive_of_zeros_is_refused(self):
        np.savez_compressed(
            "a.npz", **{"q.lora_a": np.zeros((10**7, 2)), "q.lora_b": np.zeros((2, 2))}
        )
        assert os.path.getsize("a.npz") < 2e5
        with memory_below(2**22):
            assert_refused("a.npz", "bytes, though the file has", scale=1.0)

    def test_numbers_that_a_file_holds_in_no_bytes_imply_no_others(self):
        n, r = 2**14, 64
        shapes = {"w1_a": (n, r), "w1_b": (r, 8), "w2_a": (n, r), "w2_b": (r, 8)}
        zeros = {f"q.hada_{name}": np.zeros(shape, np.float16) for name, shape in shapes.items()}
        np.savez_compressed("a.npz", **zeros)
        assert os.path.getsize("a.npz") < 2**14
        with memory_below(2**22):
            assert_refused("a.npz", "its exact factors have .* numbers")
