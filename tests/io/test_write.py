import json
import os
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from sklora import LoRACollection
from sklora.io import AdapterError, read_adapters, scan_adapters, write_adapter

PREFIX = "base_model.model."
LAYERS = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1, 11) for name in "qv"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def factors(rng):
    def make(names=LAYERS, rank=3, n=6, m=4, dtype=np.float32):
        ranks = rank if isinstance(rank, list) else [rank] * len(names)
        return {
            name: (rng.normal(size=(n, r)).astype(dtype), rng.normal(size=(m, r)).astype(dtype))
            for name, r in zip(names, ranks, strict=True)
        }

    return make


def assert_same(adapter, expected):
    assert set(adapter) == set(expected)
    for name, pair in expected.items():
        for mine, theirs in zip(adapter[name], pair, strict=True):
            np.testing.assert_array_equal(mine, theirs, strict=True)


def config_of(folder):
    return json.loads(Path(folder, "adapter_config.json").read_text())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rank", [3, [1, 2, 1, 1, 2, 1]])
def test_what_is_written_is_read_again(factors, dtype, rank):
    adapter = factors(rank=rank, dtype=dtype)
    write_adapter("a", adapter, base_model="gpt2")
    X = read_adapters("a")
    assert (X.ids.tolist(), X.layout.base_model) == (["a/adapter_model.safetensors"], "gpt2")
    assert_same(X[0], adapter)
    [report] = scan_adapters("a")
    assert (report.format, report.scales) == ("peft", (1.0,))
    assert sorted(os.listdir("a")) == ["adapter_config.json", "adapter_model.safetensors"]
    with safe_open("a/adapter_model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_written_as_it_is_read(factors, dtype):
    adapter = factors(dtype=dtype)
    write_adapter("a", adapter)
    expected = {
        name: [factor.astype(np.float32) for factor in pair] for name, pair in adapter.items()
    }
    assert_same(read_adapters("a")[0], expected)


def test_an_adapter_of_a_collection_is_written_with_its_base_model_and_without_what_it_lacks(
    factors,
):
    adapters = [factors(), factors(LAYERS[:2])]
    X = LoRACollection.from_factors(adapters, base_model="org/base")
    write_adapter(Path("a"), X[1])
    Y = read_adapters("a")
    assert Y.layout.base_model == "org/base"
    assert_same(Y[0], adapters[1])
    write_adapter("a", X[1], base_model="other")
    assert config_of("a")["base_model_name_or_path"] == "other"


@pytest.mark.parametrize("rank", [2, [2, 1, 2, 3, 2, 2]])
def test_every_scale_is_one_by_the_rules_of_peft(factors, rank):
    names = ["q", "a.q", "b.a.q", "b.a-q", "b(a.q", "x.b.a.q"]
    adapter = factors(names, rank=rank)
    write_adapter("a", adapter)
    config = config_of("a")
    assert config["peft_type"] == "LORA"
    assert config["target_modules"] == sorted(names)
    assert not config["use_rslora"]

    for name, (U, _) in adapter.items():
        for table, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            hits = [key for key in config[table] if re.match(rf"(.*\.)?({key})$", name)]
            assert (config[table][hits[0]] if hits else config[default]) == U.shape[1]
    assert_same(read_adapters("a")[0], adapter)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({}, "module"),
        ({"q": (np.ones((2, 1)), np.ones((2, 2)))}, "inner ranks"),
        ({"q": (np.ones((2, 0)), np.ones((2, 0)))}, "rank 0"),
        ({"q": (np.full((2, 1), np.nan), np.ones((2, 1)))}, "NaN"),
        ({"q\n": (np.ones((2, 1)), np.ones((2, 1)))}, "printable"),
        ({"q" * 2000: (np.ones((2, 1)), np.ones((2, 1)))}, "printable"),
    ],
)
def test_factors_are_checked_before_anything_is_written(adapter, message):
    with pytest.raises(ValueError, match=message):
        write_adapter("a", adapter)
    assert not os.path.exists("a")


def test_arguments_are_checked(factors):
    with pytest.raises(ValueError, match="base_model is 5; pass a string"):
        write_adapter("a", factors(), base_model=5)
    with pytest.raises(ValueError, match="has 256 characters, of at most 255"):
        write_adapter("a", factors(), base_model="x" * 256)
    Path("file").write_text("")
    with pytest.raises(ValueError, match="path='file' is a file; name a folder"):
        write_adapter("file", factors())
    with pytest.raises(TypeError, match=r"a LoRACollection; pass one mapping, such as X\[0\]"):
        write_adapter("a", LoRACollection.from_factors([factors()]))
    with pytest.raises(ValueError, match="adapter has no module"):
        write_adapter("a", {})


def test_names_of_files_of_peft_keep_one_prefix(factors):
    """A second one names modules that no model has."""
    write_adapter("a", factors(rank=[1, 2, 3, 2, 1, 6]))
    write_adapter("b", read_adapters("a", names="raw")[0])
    assert (
        load_file("b/adapter_model.safetensors").keys()
        == load_file("a/adapter_model.safetensors").keys()
    )
    assert config_of("b") == config_of("a")
    pair = next(iter(factors().values()))
    with pytest.raises(ValueError, match=r"'q' and 'base_model\.model\.q' are one module"):
        write_adapter("c", {"q": pair, PREFIX + "q": pair})


def test_side_features_need_a_place(factors):
    X = LoRACollection.from_factors([factors()], side=[{"q:magnitude_out": [0, 1, 0]}])
    with pytest.raises(ValueError, match=r"side features, such as 'q:magnitude_out'.*like="):
        write_adapter("a", X[0])
    write_adapter("a", dict(X[0]))
    assert_same(read_adapters("a")[0], dict(X[0]))


@pytest.mark.parametrize(("ranks", "said"), [({"mha": 1}, "'mha' 1;"), ({}, "'mha' no update;")])
def test_attention_of_torch_has_one_rank(factors, ranks, said):
    ranks = {"mha.base_layer.out_proj": 2} | ranks
    adapter = {name: (np.ones((3, rank)), np.ones((3, rank))) for name, rank in ranks.items()}
    with pytest.raises(ValueError, match=f"out_proj' has rank 2, and {said} PEFT adapts both"):
        write_adapter("a", adapter)


class TestOverwriting:
    def test_replaces_what_there_is_of_an_adapter(self, factors):
        write_adapter("a", factors(rank=[1, 2, 3, 2, 1, 6]), base_model="gpt2")
        Path("a/README.md").write_text("mine")
        adapter = factors(LAYERS[:1])
        write_adapter("a", adapter)
        assert_same(read_adapters("a")[0], adapter)
        assert config_of("a")["rank_pattern"] == {}
        assert Path("a/README.md").read_text() == "mine"

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
    def test_a_new_folder_is_complete_or_not_there(self, factors, monkeypatch, error):
        rename = os.replace

        def fail(source, target):
            if target.endswith("adapter_config.json"):
                raise error
            rename(source, target)

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(error):
            write_adapter("new/a", factors())
        assert list(Path("new").iterdir()) == []

    @pytest.mark.parametrize("failing", ["fsync", "replace"])
    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
    def test_is_complete_or_not_at_all(self, factors, monkeypatch, failing, error):
        adapter = factors(rank=2)
        write_adapter("a", adapter)
        before = {path: path.read_bytes() for path in Path("a").iterdir()}

        def fail(*args, **kwargs):
            raise error

        adapter = factors(rank=5)
        with monkeypatch.context() as patched:
            patched.setattr(os, failing, fail)
            with pytest.raises(error):
                write_adapter("a", adapter)
        assert {path: path.read_bytes() for path in Path("a").iterdir()} == before

    def test_keeps_the_old_one_when_the_new_one_is_bad(self, factors):
        adapter = factors()
        write_adapter("a", adapter)
        with pytest.raises(ValueError, match="NaN"):
            write_adapter("a", {"q": (np.full((2, 1), np.nan), np.ones((2, 1)))})
        assert_same(read_adapters("a")[0], adapter)


class TestLike:
    @pytest.fixture
    def like(self, rng):
        """An adapter with a linear layer, a convolution, an embedding, and what is saved whole."""
        shapes = {
            "q.lora_A.weight": (2, 4),
            "q.lora_B.weight": (6, 2),
            "conv.lora_A.weight": (2, 3, 5, 5),
            "conv.lora_B.weight": (7, 2, 1, 1),
            "emb.lora_embedding_A": (2, 11),
            "emb.lora_embedding_B": (4, 2),
            "q.base_layer.bias": (6,),
            "modules_to_save.classifier.weight": (2, 6),
        }
        tensors = {
            PREFIX + name: rng.normal(size=shape).astype(np.float32)
            for name, shape in shapes.items()
        }
        tensors[PREFIX + "norm.count"] = np.array(7)
        tensors[PREFIX + "norm.half"] = np.ones(3, ml_dtypes.bfloat16)
        Path("like").mkdir()
        save_file(tensors, "like/adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 6,
            "use_rslora": True,
            "fan_in_fan_out": True,
            "alpha_pattern": {"q": 3},
            "base_model_name_or_path": "/models/org--base",
            "modules_to_save": ["classifier"],
            "task_type": "SEQ_CLS",
        }
        Path("like/adapter_config.json").write_text(json.dumps(config))
        return tensors

    @pytest.mark.parametrize("target", ["new", "like"])
    @pytest.mark.parametrize("rank", [None, 2, 3])
    def test_keeps_keys_shapes_and_other_tensors(self, rng, like, target, rank):
        X = read_adapters("like")
        adapter = X[0]
        if rank is not None:
            adapter = {
                name: (rng.normal(size=(len(U), rank)), rng.normal(size=(len(V), rank)))
                for name, (U, V) in X[0].items()
            }
        expected = {name: tuple(map(np.copy, pair)) for name, pair in adapter.items()}
        write_adapter(target, adapter, like="like")
        assert_same(read_adapters(target)[0], expected)
        tensors = load_file(f"{target}/adapter_model.safetensors")
        assert tensors.keys() == like.keys()
        for name, tensor in tensors.items():
            if "lora" in name:
                assert tensor.ndim == like[name].ndim
            else:
                np.testing.assert_array_equal(tensor, like[name], strict=True)
        config = config_of(target)
        kept = ("fan_in_fan_out", "base_model_name_or_path", "modules_to_save", "task_type")
        assert [config[key] for key in kept] == [
            True,
            "/models/org--base",
            ["classifier"],
            "SEQ_CLS",
        ]
        assert config["target_modules"] == ["conv", "emb", "q"]

    def test_modules_of_one_canonical_name_are_told_apart_by_raw_names(self):
        names = ("q", "_orig_mod.q", "k", "_orig_mod.a.v", "a._orig_mod.v")
        factors = {name: (np.ones((3, 1)), np.ones((2, 1))) for name in names}
        write_adapter("like", factors)
        X = read_adapters("like", names="raw")
        write_adapter("a", X[0], like="like")
        assert_same(read_adapters("a", names="raw")[0], dict(X[0]))
        write_adapter("a", {"k": factors["k"]}, like="like")
        with pytest.raises(ValueError, match="one module to PEFT"):
            write_adapter("a", factors | {PREFIX + "q": factors["q"]}, like="like")
        with pytest.raises(ValueError, match=r"module 'a\.v' is not in 'like'"):
            write_adapter("a", {"a.v": factors["k"]}, like="like")

    def test_takes_raw_names_too_and_a_subset(self, like):
        X = read_adapters("like", names="raw")
        assert PREFIX + "q" in X.layout.names
        write_adapter(
            "a", {PREFIX + "q": X[0][PREFIX + "q"]}, like="like/adapter_model.safetensors"
        )
        tensors = load_file("a/adapter_model.safetensors")
        assert sum("lora" in name for name in tensors) == 2
        assert_same(read_adapters("a", names="raw")[0], {PREFIX + "q": X[0][PREFIX + "q"]})

    def test_two_names_of_one_module_are_an_error(self, like, factors):
        adapter = factors(["q", PREFIX + "q"])
        with pytest.raises(ValueError, match=r"'q' and 'base_model\.model\.q' are one module"):
            write_adapter("a", adapter, like="like")
        assert not Path("a").exists()

    @pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
    @pytest.mark.parametrize("ending", ["lora_B.bias", "lora_B.default.bias"])
    def test_biases_of_factors_lose_their_scale_to_them(self, factors, ending, dtype):
        write_adapter("biased", factors({"q": (6, 4), "k": (5, 4)}))
        tensors = load_file("biased/adapter_model.safetensors")
        bias, other = np.arange(6).astype(dtype), np.arange(5).astype(np.float32)
        tensors |= {f"{PREFIX}q.{ending}": bias, f"{PREFIX}q.base_layer.bias": bias}
        tensors |= {f"{PREFIX}k.{ending}": other}
        save_file(tensors, "biased/adapter_model.safetensors")
        config = config_of("biased") | {"lora_alpha": 9, "alpha_pattern": {"k": -1.5}}
        Path("biased/adapter_config.json").write_text(json.dumps(config))
        write_adapter("a", read_adapters("biased")[0], like="biased")
        written = load_file("a/adapter_model.safetensors")
        assert written[f"{PREFIX}q.{ending}"].dtype == dtype
        scaled = written[f"{PREFIX}q.{ending}"].astype(float)
        np.testing.assert_array_equal(scaled, 3 * np.arange(6.0))
        np.testing.assert_array_equal(written[f"{PREFIX}k.{ending}"], -other / 2)
        np.testing.assert_array_equal(written[f"{PREFIX}q.base_layer.bias"], bias)

    def test_a_base_model_that_is_given_counts(self, like):
        write_adapter("a", read_adapters("like")[0], like="like", base_model="mine")
        assert config_of("a")["base_model_name_or_path"] == "mine"

    def test_unknown_modules_and_other_shapes_are_errors(self, like):
        pair = np.ones((6, 1)), np.ones((4, 1))
        with pytest.raises(
            ValueError, match=r"module 'k' is not in 'like', which has .* and 2 more;"
        ):
            write_adapter("a", {"k": pair}, like="like")
        with pytest.raises(ValueError, match=r"'q' has U \(4, 1\) and V \(6, 1\).*\(6, 4\) there"):
            write_adapter("a", {"q": pair[::-1]}, like="like")
        assert not os.path.exists("a")

    def test_experts_are_an_error_that_says_so(self, rng):
        shapes = {"lora_A": (6, 5), "lora_B": (7, 6)}
        Path("like").mkdir()
        tensors = {
            f"{PREFIX}mlp.experts.{name}.weight": rng.normal(size=shape)
            for name, shape in shapes.items()
        }
        save_file(tensors, "like/adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 2,
            "target_parameters": ["mlp.experts.w"],
        }
        Path("like/adapter_config.json").write_text(json.dumps(config))
        adapter = read_adapters("like")[0]
        with pytest.raises(ValueError, match=r"'mlp.experts.0' is one of 3 experts .* leave"):
            write_adapter("a", adapter, like="like")

    def test_other_methods_are_an_error_that_names_them(self, rng):
        names = {"hada_w1_a": (6, 2), "hada_w1_b": (2, 5), "hada_w2_a": (6, 2), "hada_w2_b": (2, 5)}
        Path("like").mkdir()
        tensors = {f"{PREFIX}q.{name}": rng.normal(size=shape) for name, shape in names.items()}
        save_file(tensors, "like/adapter_model.safetensors")
        Path("like/adapter_config.json").write_text('{"peft_type": "LOHA", "r": 2, "alpha": 2}')
        with pytest.raises(AdapterError, match="no plain LoRA of PEFT, but loha of peft; pass"):
            write_adapter("a", read_adapters("like")[0], like="like")

    def test_factors_in_a_module_that_was_saved_whole_are_an_error(self, like, factors):
        copy = f"{PREFIX}classifier.modules_to_save"
        like |= {f"{copy}.lora_A.weight": np.ones((1, 4)), f"{copy}.lora_B.weight": np.ones((3, 1))}
        save_file(like, "like/adapter_model.safetensors")
        with pytest.raises(AdapterError, match=r"factors in modules .* saved whole.*like="):
            write_adapter("a", read_adapters("like")[0], like="like")

    def test_has_to_be_one_adapter_of_peft(self, like, factors):
        write_adapter("two/a", factors())
        write_adapter("two/b", factors())
        with pytest.raises(AdapterError, match="two: there are 2 adapters in it; name one file"):
            write_adapter("a", factors(), like="two")
        with pytest.raises(AdapterError, match=r"missing: it cannot be opened"):
            write_adapter("a", factors(), like="missing")
        kohya = {"q.lora_down.weight": np.ones((1, 2)), "q.lora_up.weight": np.ones((2, 1))}
        for path in ("k", "like/k"):  # without a configuration beside it, and with one
            save_file(kohya, path)
            with pytest.raises(AdapterError, match="k: it is no plain LoRA of PEFT, but lora of k"):
                write_adapter("a", factors(), like=path)

    def test_magnitudes_are_those_of_the_adapter(self, factors):
        write_adapter("like", factors(["q"]))
        tensors = load_file("like/adapter_model.safetensors")
        tensors[PREFIX + "q.lora_magnitude_vector"] = np.arange(6, dtype=np.float32)
        save_file(tensors, "like/adapter_model.safetensors")
        config = Path("like/adapter_config.json")
        config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
        X = read_adapters("like")
        for magnitudes in (np.arange(6) + 1, np.zeros(6)):
            new = LoRACollection.from_factors(
                [X[0]], side=[{"q:magnitude_out": magnitudes.astype(np.float32)}]
            )
            write_adapter("a", new[0], like="like")
            [written] = read_adapters("a")[0].side.values()
            np.testing.assert_array_equal(written, magnitudes)
        write_adapter("a", dict(new[0]), like="like")
        [magnitudes] = read_adapters("a")[0].side.values()
        np.testing.assert_array_equal(magnitudes, np.arange(6))
        other = LoRACollection.from_factors([X[0]], side=[{"q:magnitude_out": np.ones(5)}])
        with pytest.raises(ValueError, match=r"'q:magnitude_out' has 5 numbers, but 6 in"):
            write_adapter("a", other[0], like="like")

    def test_magnitudes_that_only_other_adapters_have_need_no_place(self, factors):
        X = LoRACollection.from_factors(
            [factors(["q"]), factors(["q"])],
            side=[{"q:magnitude_out": np.arange(6) * k} for k in (0, 1)],
        )
        write_adapter("plain", X[0])
        write_adapter("again", X[0], like="plain")
        for folder in ("plain", "again"):
            [again] = read_adapters(folder)
            np.testing.assert_array_equal(again["q"][0], X[0]["q"][0])
            assert not again.side
        with pytest.raises(ValueError, match="has 6 numbers, but 0 in"):
            write_adapter("again", X[1], like="plain")


def test_adapters_from_the_wild_are_written_like_themselves(shared_adapters):
    for name in ("peft_gpt2_movies", "peft_clip_te"):
        X = read_adapters(shared_adapters / name, on_base_model="ignore")
        write_adapter("again", X[0], like=shared_adapters / name)
        Y = read_adapters("again", on_base_model="ignore")
        np.testing.assert_array_equal(X.read(), Y.read())
        assert X.layout.names == Y.layout.names
