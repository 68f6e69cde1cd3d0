import pytest
from hypothesis import given
from hypothesis import strategies as st

from sklora._untrusted import Refusal
from sklora.io._build import (
    MAX_EXPANSION,
    MIN_NUMBERS,
    alpha_over_rank,
    base_model_label,
    by_module,
    left_out_of,
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


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.head.modules_to_save.norm.bias", "a module that was saved whole"),
        ("model.head.original_module.bias", "the original of a module that was saved whole"),
        ("model.q.base_layer.bias", "a weight of the base model"),
        ("lora_unet_x.diff", "a dense difference, which is no low-rank update"),
        ("lora_unet_x.diff_b", "a dense difference, which is no low-rank update"),
        ("lora_unet_x.w_norm", "a parameter of a normalisation layer"),
        ("text_model.layer_norm1.weight", "a parameter of a normalisation layer"),
        ("model.Norm.bias", "a parameter of a normalisation layer"),
        ("model.diffusion_model.out.bias", "a bias"),
        ("model.wpe.Embedding", "an embedding that was saved whole"),
        ("model.diffusion_model.out.weight", "it is no part of a low-rank update"),
    ],
)
def test_reason_why_a_tensor_is_left_out(name, reason):
    assert left_out_of([name]) == [(name, reason)]


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
    with pytest.raises(Refusal, match=f"tensor 'x.A' holds {dtype}"):
        planned({"x.A": (1, 2), "x.B": (3, 1)}, dtype=dtype)


@pytest.mark.parametrize(
    ("shapes", "what"),
    [
        ({"x.A": (0, 2), "x.B": (3, 0)}, "(3, 2) and rank 0"),
        ({"x.A": (1, 2), "x.B": (0, 1)}, "(0, 2) and rank 1"),
        ({"x.A": (1, 0), "x.B": (3, 1)}, "(3, 0) and rank 1"),
    ],
)
def test_update_without_size_is_refused(shapes, what):
    with pytest.raises(Refusal) as error:
        planned(shapes)
    assert str(error.value).startswith(f"module 'x' has an update of shape {what}; leave")


@pytest.mark.parametrize("dimension", [0, 1, 4])
def test_scale_is_alpha_over_the_rank(dimension):
    assert alpha_over_rank("x", {"alpha": "x.alpha"}, dimension) == Scale(
        1 / (dimension or 1), "x.alpha"
    )
    assert alpha_over_rank("x", {"down": "x.down"}, dimension) == Scale(1.0)


def test_without_a_rank_or_alpha_the_scale_is_1():
    assert alpha_over_rank("x", {"alpha": "x.alpha"}, None) == Scale(1.0)


class TestExpansion:
    def test_plain_lora_of_any_size_is_taken(self):
        size = 2**30
        [module] = planned({"x.A": (1, size), "x.B": (size, 1)}).modules
        assert (module.n, module.m, module.rank) == (size, size, 1)

    def test_small_factors_are_taken_however_small_the_file(self):
        # (256 + 256) 16 16 numbers, from 2 * 256.
        planned({"x.w1": (16, 16), "x.w2": (16, 16)})

    @pytest.mark.parametrize("shape", [(27, 27), (20, 50), (50, 20)])
    def test_numbers_of_both_factors_count(self, shape):
        needed = (shape[0] ** 2 + shape[1] ** 2) * min(shape) ** 2
        # The file is too small for its own size to matter.
        assert MAX_EXPANSION * 2 * shape[0] * shape[1] < MIN_NUMBERS < needed < 1.2 * MIN_NUMBERS
        with pytest.raises(Refusal, match="its exact factors have"):
            planned({"x.w1": shape, "x.w2": shape})

    def test_numbers_of_all_modules_count(self):
        one = {"x.w1": (26, 26), "x.w2": (26, 26)}
        assert MIN_NUMBERS / 2 < 2 * 26**4 < MIN_NUMBERS
        planned(one)
        with pytest.raises(Refusal, match="its exact factors have"):
            planned(one | {"y.w1": (26, 26), "y.w2": (26, 26)})

    def test_every_tensor_of_the_file_counts(self):
        side = 128
        half = 2 * side**4 // (MAX_EXPANSION - 1) // 2
        shapes = {"x.w1": (side, side), "x.w2": (side, side)}
        planned(shapes | {"y.A": (1, half), "y.B": (half, 1)})
        with pytest.raises(Refusal, match="module 'x' alone"):
            planned(shapes | {"y.A": (1, half // 2), "y.B": (half // 2, 1)})

    def test_size_of_the_worst_module_is_told(self):
        shapes = {"x.w1": (200, 100), "x.w2": (200, 100)}
        with pytest.raises(Refusal, match=r"an update \(40000, 10000\) of rank 10000; read it"):
            planned(shapes)

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
        (r"C:\llama", "llama"),
        ("/llama", "llama"),
        ("../llama", "llama"),
        ("a" * 255, "a" * 255),
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
    found = number({"x": value}, "x")
    assert (found, type(found)) == (value, float)
    with pytest.raises(Refusal, match="y is None"):
        number({"x": value}, "y")
