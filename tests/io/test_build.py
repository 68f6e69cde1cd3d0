import pytest
from hypothesis import given
from hypothesis import strategies as st

from sklora._untrusted import Refusal
from sklora.io._build import (
    MAX_EXPANSION,
    MIN_NUMBERS,
    base_model_label,
    by_module,
    make_plan,
    number,
)
from sklora.io._plan import ReadOptions, Scale, Source
from sklora.io._tensors import TensorInfo

SUFFIXES = {"down.weight": "down", "up.weight": "up", "alpha": "alpha", "weight": "bare"}
RAW = ReadOptions(names="raw")


def test_by_module_prefers_the_longer_ending():
    names = ["m.x.down.weight", "m.x.up.weight", "m.x.alpha", "y.other", "down.weight", "z"]
    modules, rest = by_module(names, SUFFIXES)
    assert modules == {
        "m.x": {"down": "m.x.down.weight", "up": "m.x.up.weight", "alpha": "m.x.alpha"},
        "down": {"bare": "down.weight"},
    }
    assert rest == ("y.other", "z")


def test_by_module_strips_endings_of_paths():
    names = ["x.lora.down.weight", "x.lora.up.weight", "x.alpha", "lora.down.weight"]
    modules, _ = by_module(names, SUFFIXES, strip=(".lora",))
    assert modules["x"] == {"down": names[0], "up": names[1], "alpha": names[2]}
    assert modules["lora"] == {"down": "lora.down.weight"}


def test_by_module_refuses_two_tensors_of_one_role():
    names = ["x.lora.down.weight", "x.down.weight"]
    with pytest.raises(Refusal, match="are both the down of module 'x'; the file holds two"):
        by_module(names, SUFFIXES, strip=(".lora",))


@given(st.lists(st.text(st.sampled_from("ab."), max_size=9), unique=True))
def test_by_module_loses_no_tensor(names):
    modules, rest = by_module(names, {"a": "A", "b": "B", "a.b": "AB"})
    placed = [name for roles in modules.values() for name in roles.values()]
    assert sorted([*placed, *rest]) == sorted(names)
    assert "" not in modules


def planned(shapes, options=RAW, scale=1.0, dtype="F32"):
    tensors = {name: TensorInfo(dtype, shape) for name, shape in shapes.items()}
    modules, rest = by_module(tensors, {"A": "down", "B": "up", "w1": "lokr_w1", "w2": "lokr_w2"})
    assert not rest
    source = Source("safetensors", tensors)
    return make_plan(source, options, "some", modules, lambda *_: Scale(scale))


def test_plan_is_in_the_order_of_names():
    plan = planned({"y.A": (1, 2), "x.A": (1, 2), "y.B": (3, 1), "x.B": (3, 1)})
    assert [module.name for module in plan.modules] == ["x", "y"]
    assert plan.format == "some"


def test_plan_without_modules_is_refused():
    with pytest.raises(Refusal, match="no LoRA factors, though its tensors look like some"):
        planned({})


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_scale_that_is_no_number_is_refused(scale):
    with pytest.raises(Refusal, match="must be finite"):
        planned({"x.A": (1, 2), "x.B": (3, 1)}, scale=scale)


@pytest.mark.parametrize("dtype", ["I64", "U8", "BOOL"])
def test_weights_that_are_no_floats_are_refused(dtype):
    with pytest.raises(Refusal, match=f"holds {dtype}"):
        planned({"x.A": (1, 2), "x.B": (3, 1)}, dtype=dtype)


class TestExpansion:
    def test_plain_lora_of_any_size_is_taken(self):
        size = 2**30
        [module] = planned({"x.A": (1, size), "x.B": (size, 1)}).modules
        assert (module.n, module.m, module.rank) == (size, size, 1)

    def test_small_factors_are_taken_however_small_the_file(self):
        # (256 + 256) 16 16 numbers, from 2 * 256.
        planned({"x.w1": (16, 16), "x.w2": (16, 16)})

    def test_bound_is_in_relation_to_the_file(self):
        side = 128
        stored, needed = 2 * side**2, 2 * side**4
        assert needed > max(MAX_EXPANSION * stored, MIN_NUMBERS)
        shapes = {"x.w1": (side, side), "x.w2": (side, side)}
        with pytest.raises(Refusal, match="lokr='kronecker'"):
            planned(shapes)
        [module] = planned(shapes, ReadOptions(names="raw", lokr="kronecker")).modules
        assert (module.method, module.rank) == ("lokr-kronecker", 1)
        plain = needed // MAX_EXPANSION
        planned(shapes | {"y.A": (1, plain), "y.B": (1, 1)})

    def test_worst_module_is_named(self):
        shapes = {"small.w1": (4, 4), "small.w2": (4, 4), "large.w1": (200, 200)}
        with pytest.raises(Refusal, match="module 'large' alone is an update"):
            planned(shapes | {"large.w2": (200, 200)})


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("gpt2", "gpt2"),
        ("org/model", "org/model"),
        ("org/model/", "org/model"),
        (r"C:\models\llama", "llama"),
        ("/home/me/models/llama", "llama"),
        ("./llama", "llama"),
        ("~/llama", "llama"),
        ("models/of/mine", "mine"),
        ("/cache/hub/models--org--model/snapshots/0123", "org/model"),
        (r"E:\hub\models--org--model\snapshots\0123\text_encoder", "org/model"),
        ("", None),
        ("  ", None),
        (None, None),
        (3, None),
        (["x"], None),
        ("a/" + "b" * 200, "a/" + "b" * 200),
    ],
)
def test_base_model_label(value, label):
    assert base_model_label(value) == label


@pytest.mark.parametrize("value", ["a" * 256, "/home/me/" + "a" * 256])
def test_base_model_of_a_long_name_is_refused(value):
    with pytest.raises(Refusal, match=r"base model 'aaa.*\.\.\. has 256 characters"):
        base_model_label(value)


@pytest.mark.parametrize("value", [None, "1", True, [1], float("nan"), float("inf"), 10**400])
def test_number_refuses_what_is_none(value):
    with pytest.raises(Refusal, match="must be a number"):
        number({"x": value}, "x")


@pytest.mark.parametrize("value", [0, -3, 2.5])
def test_number(value):
    assert number({"x": value}, "x") == value
    with pytest.raises(Refusal, match="y is None"):
        number({"x": value}, "y")
