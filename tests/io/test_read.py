import json
import os
import pickle
import re
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save

from sklora import LoRACollection, LoRALayout, SVDSpectrum
from sklora.io import AdapterError, SkippedAdapterWarning, read_adapters
from sklora.io._read import natural_order
from sklora.io._tensors import TensorFile

SHAPES = {"layers.2.q": (5, 4), "layers.10.q": (6, 3)}
PREFIX = "base_model.model."


@pytest.fixture
def factors(rng):
    """A mapping from module to (U, V); a function of the modules' shapes and the ranks."""

    def make(shapes=SHAPES, rank=2, dtype=np.float32):
        ranks = rank if isinstance(rank, dict) else dict.fromkeys(shapes, rank)
        return {
            name: tuple(rng.normal(size=(size, ranks[name])).astype(dtype) for size in shape)
            for name, shape in shapes.items()
        }

    return make


def peft(path, factors, *, side=None, **config):
    """Write an adapter of PEFT with a scale of 1, in its folder."""
    Path(path).mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, (U, V) in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(V.T)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(U)
    for name, vector in (side or {}).items():
        tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = vector
    Path(path, "adapter_model.safetensors").write_bytes(save(tensors))
    defaults = {"peft_type": "LORA", "lora_alpha": 1, "r": 1, "alpha_pattern": {}}
    defaults["alpha_pattern"] = {re.escape(name): U.shape[1] for name, (U, _) in factors.items()}
    Path(path, "adapter_config.json").write_text(json.dumps(defaults | config))


def kohya(path, factors):
    """Write a file with kohya's keys and no alpha, which means a scale of 1."""
    tensors = {}
    for name, (U, V) in factors.items():
        tensors[f"{name}.lora_down.weight"] = np.ascontiguousarray(V.T)
        tensors[f"{name}.lora_up.weight"] = np.ascontiguousarray(U)
    Path(path).write_bytes(save(tensors))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def zoo(here, factors):
    """A folder of adapters of mixed ranks, and what is in them."""
    adapters = [
        factors(rank={"layers.2.q": 2, "layers.10.q": 1}),
        factors(rank=3),
        factors({"layers.2.q": (5, 4)}),
    ]
    for place, adapter in enumerate(adapters):
        peft(f"zoo/{place}", adapter)
    return adapters


def assert_same(X, adapters):
    assert len(X) == len(adapters)
    for read, expected in zip(X, adapters, strict=True):
        assert list(read) == [name for name in X.layout.names if name in expected]
        for name, pair in expected.items():
            for mine, theirs in zip(read[name], pair, strict=True):
                np.testing.assert_array_equal(mine, theirs, strict=True)


class TestWithoutLayout:
    def test_modules_are_those_of_all_files_by_number(self, zoo):
        X = read_adapters("zoo")
        assert X.layout.modules == (("layers.2.q", 5, 4, 3), ("layers.10.q", 6, 3, 3))
        np.testing.assert_array_equal(X.ranks, [[2, 1], [3, 3], [2, 0]])
        assert X.ids.tolist() == [f"zoo/{place}/adapter_model.safetensors" for place in range(3)]
        assert (X.dtype, X.layout.base_model, X.layout.side) == (np.float32, None, ())
        assert_same(X, zoo)

    def test_missing_modules_are_zero(self, zoo):
        X = read_adapters("zoo")
        beyond = LoRACollection.from_factors(zoo, layout=X.layout)
        np.testing.assert_array_equal(X.read(), beyond.read())

    @pytest.mark.parametrize("options", [{"on_missing": "raise"}, {"strict": True}])
    def test_missing_modules_may_be_an_error(self, zoo, options):
        with pytest.raises(
            AdapterError, match=r"it lacks 'layers.10.q'.*on_missing='zero'"
        ) as error:
            read_adapters("zoo", **options)
        assert error.value.path == "zoo/2/adapter_model.safetensors"
        with pytest.warns(SkippedAdapterWarning) as warned:
            X = read_adapters("zoo", on_error="skip", **options)
        assert_same(X, zoo[:2])
        assert [error.path for error in warned[0].message.errors] == [error.value.path]

    def test_shapes_that_differ_are_an_error_that_names_both_files(self, zoo, factors):
        peft("zoo/x", factors({"layers.2.q": (5, 7)}))
        message = (
            r"^zoo/x/adapter_model.safetensors: .*\(5, 7\), but \(5, 4\) in zoo/0/adapter_model"
        )
        with pytest.raises(AdapterError, match=message):
            read_adapters("zoo")

    def test_the_dtype_is_that_of_the_widest_file(self, here, factors):
        kohya("a", factors(dtype=np.float16))
        kohya("b", factors(dtype=ml_dtypes.bfloat16))
        assert read_adapters(["a", "b"]).dtype == np.float32
        kohya("c", factors(dtype=np.float64))
        assert read_adapters(["a", "b", "c"]).dtype == np.float64

    @pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
    def test_every_number_of_two_bytes_is_read(self, here, dtype):
        numbers = np.arange(2**16, dtype=np.uint16).view(dtype)
        with np.errstate(invalid="ignore"):
            numbers = numbers[np.isfinite(numbers)]
        one = np.ones((1, 1), dtype)
        kohya("a", {"q": (one, numbers[:, None])})
        _, V = read_adapters("a")[0]["q"]
        assert V.dtype == np.float32
        np.testing.assert_array_equal(V[:, 0].view(np.uint32), numbers.astype("f4").view(np.uint32))

    def test_side_features_are_read(self, here, factors):
        magnitudes = np.arange(5, dtype=np.float32)
        some = {"layers.2.q": factors()["layers.2.q"]}
        peft("zoo/a", some, side={"layers.2.q": magnitudes}, use_dora=True)
        peft("zoo/b", some)
        X = read_adapters("zoo")
        assert X.layout.side == (("layers.2.q:magnitude_out", 5),)
        [mine] = X[0].side.values()
        np.testing.assert_array_equal(mine, magnitudes)
        [missing] = X[1].side.values()
        assert not missing.any()
        # In blocks of several adapters, and one adapter module by module.
        for found in (SVDSpectrum().fit_transform(X), SVDSpectrum().fit(X).transform(X[:1])):
            np.testing.assert_array_equal(found[0, -5:], magnitudes)
        with pytest.raises(AdapterError, match=r"zoo/b.*lacks 'layers.2.q:magnitude_out'"):
            read_adapters("zoo", on_missing="raise")
        with pytest.raises(AdapterError, match=r"zoo/a.*has 'layers.2.q:magnitude_out', wh"):
            read_adapters(["zoo/b", "zoo/a"], layout=read_adapters("zoo/b").layout, strict=True)


class TestWithLayout:
    def test_modules_are_read_in_its_order(self, zoo):
        layout = LoRALayout([("layers.10.q", 6, 3, 3), ("layers.2.q", 5, 4, 3)])
        X = read_adapters("zoo", layout=layout)
        assert X.layout == layout
        assert_same(X, zoo)

    def test_others_are_passed_by_or_an_error(self, zoo):
        layout = LoRALayout([("layers.2.q", 5, 4, 4)], base_model="gpt2")
        X = read_adapters("zoo", layout=layout)
        assert X.layout == layout
        assert_same(X, [{"layers.2.q": adapter["layers.2.q"]} for adapter in zoo])
        for options in ({"on_extra": "raise"}, {"strict": True}):
            with pytest.raises(AdapterError, match=r"zoo/0/.*has 'layers.10.q', which the la"):
                read_adapters("zoo", layout=layout, **options)

    def test_those_that_a_file_lacks_are_zero_or_an_error(self, zoo):
        layout = read_adapters("zoo").layout
        assert not read_adapters("zoo/2", layout=layout)[:, layout.factor_slices[1][0]].any()
        for options in ({"on_missing": "raise"}, {"strict": True}):
            with pytest.raises(AdapterError, match=r"zoo/2/.*lacks 'layers.10.q'"):
                read_adapters("zoo/2", layout=layout, **options)

    def test_larger_ranks_make_it_wider(self, zoo):
        layout = LoRALayout([("layers.2.q", 5, 4, 1), ("layers.10.q", 6, 3, 5)], base_model="gpt2")
        X = read_adapters("zoo", layout=layout)
        assert X.layout == layout.with_ranks([3, 5])
        assert_same(X, zoo)

    def test_a_file_that_has_none_of_them_is_refused(self, zoo):
        layout = LoRALayout([("other", 5, 4, 1)])
        with pytest.raises(
            AdapterError, match=r"has no module of the layout, such as 'other'.*'lay"
        ):
            read_adapters("zoo", layout=layout)

    def test_shapes_have_to_be_its(self, zoo):
        layout = LoRALayout([("layers.2.q", 5, 5, 1)])
        with pytest.raises(AdapterError, match=r"zoo/0/.*\(5, 4\), but \(5, 5\) in the layout"):
            read_adapters("zoo", layout=layout)

    def test_side_features_have_to_be_its(self, here, factors):
        side = {"layers.2.q": np.ones(5, np.float32)}
        peft("a", {"layers.2.q": factors()["layers.2.q"]}, side=side, use_dora=True)
        modules = read_adapters("a").layout.modules
        layout = LoRALayout(modules, side=[("layers.2.q:magnitude_out", 4)])
        with pytest.raises(
            AdapterError, match=r"'layers.2.q:magnitude_out' has 5 numbers, but 4 in"
        ):
            read_adapters("a", layout=layout)


class TestBaseModel:
    @pytest.fixture(autouse=True)
    def _adapters(self, here, factors):
        for name, base in (
            ("0", None),
            ("1", "org/a"),
            ("2", None),
            ("3", "org/a"),
            ("4", "org/b"),
        ):
            peft(f"zoo/{name}", factors(), base_model_name_or_path=base)

    def test_is_that_which_files_name(self):
        assert read_adapters("zoo/[0-3]").layout.base_model == "org/a"

    def test_others_are_refused(self):
        message = r"zoo/4/.*base model is 'org/b', but that of zoo/1/.* is 'org/a'.*on_base_model="
        with pytest.raises(AdapterError, match=message):
            read_adapters("zoo")
        with pytest.warns(SkippedAdapterWarning, match="org/b"):
            assert len(read_adapters("zoo", on_error="skip")) == 4

    def test_that_of_the_layout_counts(self):
        layout = LoRALayout(read_adapters("zoo/4").layout.modules, base_model="org/b")
        assert read_adapters(["zoo/0", "zoo/4"], layout=layout).layout.base_model == "org/b"
        with pytest.raises(AdapterError, match=r"zoo/1/.*that of the layout is 'org/b'"):
            read_adapters("zoo", layout=layout)
        X = read_adapters("zoo", layout=layout, on_base_model="ignore")
        assert (len(X), X.layout) == (5, layout)

    def test_can_be_ignored(self):
        X = read_adapters("zoo", on_base_model="ignore")
        assert (len(X), X.layout.base_model) == (5, None)


class TestSkip:
    def test_lists_what_is_left_out(self, zoo, factors):
        Path("zoo/1/adapter_config.json").write_text("{")
        Path("zoo/README.md").write_text("A zoo")
        with pytest.warns(SkippedAdapterWarning) as warned:
            X = read_adapters(["zoo", "missing", "none/*"], on_error="skip")
        assert_same(X, [zoo[0], zoo[2]])
        assert X.ids.tolist() == [f"zoo/{place}/adapter_model.safetensors" for place in (0, 2)]
        [warning] = warned
        assert warning.filename == __file__
        paths = ["zoo/1/adapter_model.safetensors", "missing", "none/*"]
        assert [error.path for error in warning.message.errors] == paths
        assert str(warning.message).startswith("3 files were left out:\n- zoo/1/adapter_model")
        one = SkippedAdapterWarning(warning.message.errors[:1])
        assert str(one).startswith("1 file was left out:\n- zoo/1/adapter_model")
        again = pickle.loads(pickle.dumps(warning.message))
        assert list(map(str, again.errors)) == list(map(str, warning.message.errors))

    @pytest.mark.parametrize("damaged", [0, 1, 2])
    @pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
    def test_finds_numbers_that_are_none(self, zoo, damaged, number):
        zoo[damaged]["layers.2.q"][0][3, 1] = number
        peft(f"zoo/{damaged}", zoo[damaged])
        y = np.arange(3)
        X = read_adapters("zoo")
        with pytest.raises(
            AdapterError, match=r"'\S*layers.2.q.lora_B.weight' has NaN or infinity"
        ):
            X.read()
        with pytest.warns(SkippedAdapterWarning, match=r"layers.2.q.lora_B.weight' has NaN"):
            X = read_adapters("zoo", on_error="skip")
        kept = [place for place in range(3) if place != damaged]
        assert y[[int(Path(id).parts[-2]) for id in X.ids]].tolist() == kept
        assert_same(X, [zoo[place] for place in kept])

    def test_a_damaged_file_does_not_say_what_others_are_to_be(self, here, factors):
        bad = factors({"layers.2.q": (7, 7)})
        bad["layers.2.q"][0][:] = np.nan
        peft("zoo/0", bad, base_model_name_or_path="org/a")
        good = factors()
        peft("zoo/1", good, base_model_name_or_path="org/b")
        with pytest.warns(SkippedAdapterWarning, match="1 file was"):
            X = read_adapters("zoo", on_error="skip")
        assert_same(X, [good])
        assert X.layout.base_model == "org/b"

    def test_the_base_model_is_that_of_the_files_that_are_left(self, here, factors):
        both = factors()
        peft("a", {"layers.2.q": both["layers.2.q"]}, base_model_name_or_path="org/a")
        peft("b", both)
        with pytest.warns(SkippedAdapterWarning, match="a/adapter_model.safetensors: it lacks"):
            X = read_adapters(["a", "b"], on_error="skip", on_missing="raise")
        assert_same(X, [both])
        assert X.layout.base_model is None

    def test_numbers_that_are_not_asked_for_do_not_count(self, zoo):
        zoo[0]["layers.10.q"][0][:] = np.nan
        peft("zoo/0", zoo[0])
        layout = LoRALayout([("layers.2.q", 5, 4, 3)])
        assert np.isfinite(read_adapters("zoo", layout=layout, on_error="skip").read()).all()

    def test_numbers_of_another_shape_than_the_layout_are_not_read(self, zoo):
        """They might be far more than those of the layout."""
        zoo[0]["layers.2.q"][0][:] = np.nan
        peft("zoo/0", zoo[0])
        layout = LoRALayout([("layers.2.q", 5, 3, 3)])
        with (
            pytest.warns(SkippedAdapterWarning, match=r"0/\S* module 'layers.2.q' has updates of"),
            pytest.raises(ValueError, match="paths leave no adapter to read"),
        ):
            read_adapters("zoo", layout=layout, on_error="skip")

    def test_damaged_side_features_are_found(self, here, factors):
        peft("a", factors(), side={"layers.2.q": np.full(5, np.nan, np.float32)})
        with (
            pytest.warns(SkippedAdapterWarning, match="magnitude"),
            pytest.raises(ValueError, match="no"),
        ):
            read_adapters("a", on_error="skip")

    def test_that_leaves_nothing_is_an_error(self, zoo):
        for place in range(3):
            Path(f"zoo/{place}/adapter_config.json").unlink()
        with (
            pytest.warns(SkippedAdapterWarning, match="3 files"),
            pytest.raises(ValueError, match="paths leave no adapter to read"),
        ):
            read_adapters("zoo", on_error="skip")

    def test_says_nothing_when_all_is_well(self, zoo):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(read_adapters("zoo", on_error="skip")) == 3


def test_nothing_but_headers_is_read_until_it_is_needed(zoo, monkeypatch):
    names = []

    def watch(kind):
        read = kind.read

        def watched(self, name):
            names.append(name)
            return read(self, name)

        monkeypatch.setattr(kind, "read", watched)

    for kind in TensorFile.__subclasses__():
        watch(kind)
    X = read_adapters("zoo/[01]", layout=LoRALayout([("layers.10.q", 6, 3, 3)]))
    picked = X[[1, 0]]
    assert (picked.shape, picked.ids[0], names) == ((2, 27), "zoo/1/adapter_model.safetensors", [])
    picked[:1].read()
    assert sorted(names) == [f"{PREFIX}layers.10.q.lora_{role}.weight" for role in "AB"]


@pytest.mark.parametrize(
    "ending",
    ["-00001-of-00002.safetensors", "-00003-of-00012.gguf", "-00001-of-00002.fp16.safetensors"],
)
def test_a_part_of_an_adapter_is_refused(here, factors, ending):
    """Else the modules of the other parts would count as unchanged."""
    kohya(f"part{ending}", factors())
    with pytest.raises(AdapterError, match=r"one of (2|12) parts of an adapter; put all"):
        read_adapters(f"part{ending}")


@pytest.mark.parametrize("name", ["a-00001-of-00001.safetensors", "run-1-of-3.safetensors"])
def test_names_that_are_no_part_s(here, factors, name):
    kohya(name, factors())
    assert read_adapters(name).ids.tolist() == [name]


def test_the_order_of_paths_is_kept_and_a_file_may_be_read_twice(zoo):
    order = [2, 0, 1, 0]
    X = read_adapters(Path("zoo", str(place)) for place in order)
    assert_same(X, [zoo[place] for place in order])
    assert [Path(id).parts[1] for id in X.ids] == list(map(str, order))


def test_raw_names_are_those_of_the_file(zoo):
    assert read_adapters("zoo", names="raw").layout.names == tuple(PREFIX + name for name in SHAPES)


def test_names_are_sorted_by_their_numbers():
    names = ["a", "a1", "a2", "a10", "a10.b", "a١", "a01", "b", "1", "1.2", "1.10", "١", ""]
    ordered = sorted(names, key=natural_order)
    names.reverse()
    assert ordered == sorted(names, key=natural_order)
    picked = [name for name in ordered if name in ("a1", "a2", "a10", "a10.b", "b", "1.2", "1.10")]
    assert picked == ["1.2", "1.10", "a1", "a2", "a10", "a10.b", "b"]


def test_options_reach_the_formats(here, factors):
    adapter = factors()
    tensors = {f"w_b_{name}": np.ascontiguousarray(U) for name, (U, _) in adapter.items()}
    tensors |= {f"w_a_{name}": np.ascontiguousarray(V.T) for name, (_, V) in adapter.items()}
    Path("own").write_bytes(save(tensors))
    X = read_adapters("own", keys=("w_a_{module}", "w_b_{module}"), scale=4)
    assert_same(X, [{name: (2 * U, 2 * V) for name, (U, V) in adapter.items()}])
    torch.save({name: torch.tensor(array) for name, array in tensors.items()}, "own.pt")
    with pytest.raises(AdapterError, match="allow_torch_zip=True"):
        read_adapters("own.pt", keys=("w_a_{module}", "w_b_{module}"))
    Y = read_adapters(
        "own.pt", keys=("w_a_{module}", "w_b_{module}"), scale=4, allow_torch_zip=True
    )
    np.testing.assert_array_equal(X.read(), Y.read())


def test_a_negative_scale_goes_into_u_and_zero_makes_zero(here, factors):
    adapter = factors()
    peft("a", adapter, lora_alpha=-2, alpha_pattern={})
    X = read_adapters("a")
    U, V = X[0]["layers.2.q"]
    np.testing.assert_allclose(
        U @ V.T, -np.dot(adapter["layers.2.q"][0], adapter["layers.2.q"][1].T), rtol=1e-5
    )
    peft("a", adapter, lora_alpha=0, alpha_pattern={})
    assert not read_adapters("a").read().any()


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("on_missing", "skip", "choose one of 'zero', 'raise'"),
        ("on_extra", None, "choose one of 'ignore', 'raise'"),
        ("on_error", "ignore", "choose one of 'raise', 'skip'"),
        ("on_base_model", True, "choose one of 'raise', 'ignore'"),
        ("names", "short", "choose one of 'canonical', 'raw'"),
        ("lokr", "dense", "choose one of 'exact', 'kronecker'"),
        ("strict", "yes", "choose one of True, False"),
        ("allow_torch_zip", 1, "choose one of True, False"),
        ("scale", "1", "pass a finite number"),
        ("scale", np.nan, "pass a finite number"),
        ("scale", 10**400, "pass a finite number"),
        ("scale", True, "pass a finite number"),
        ("scale", 1j, "pass a finite number"),
        ("keys", ("a", "b"), "pass two patterns"),
        ("keys", "{module}", "pass two patterns"),
        ("layout", {"q": (1, 2)}, "pass a LoRALayout"),
        ("layout", LoRALayout.rows(3), "plain rows"),
    ],
)
def test_arguments_are_checked(zoo, argument, value, message):
    with pytest.raises(ValueError, match=message) as error:
        read_adapters("zoo", **{argument: value})
    assert argument in str(error.value)


def test_no_paths_are_an_error(here):
    with pytest.raises(ValueError, match="paths leave no adapter to read; pass one or more"):
        read_adapters([])
    with pytest.raises(TypeError, match="paths is 5"):
        read_adapters(5)


@pytest.mark.parametrize(
    "path", ["missing.safetensors", "missing/*", "empty", "a\0b", "x" * 5000, ""]
)
def test_a_path_that_stands_for_nothing_is_an_error(here, path):
    os.mkdir("empty")
    with pytest.raises(AdapterError) as error:
        read_adapters(path)
    assert error.value.path == path
