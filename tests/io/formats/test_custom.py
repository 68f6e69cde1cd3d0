import pytest
import torch

from sklora.io import read_adapters

SAM = ("w_a_{module}", "w_b_{module}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("options", "scale"), [({}, 1), ({"scale": -3}, -3), ({"scale": 0.1}, 0.1)]
)
def test_scale_is_1_or_the_user_s(normal, save, assert_updates, scan, dtype, options, scale):
    tensors, expected = {}, {}
    for module, r in (("000", 2), ("001", 3)):
        A, B = normal(r, 4, dtype=dtype), normal(5, r, dtype=dtype)
        tensors |= {f"w_a_{module}": A, f"w_b_{module}": B}
        expected[module] = scale * B.double() @ A.double()
    path = save(tensors)
    assert_updates(path, expected, keys=SAM, **options)
    assert scan(path, keys=SAM).format == "custom"


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (("{module}.down", "{module}.up"), "a.b"),
        (("net.{module}.A", "net.{module}.B"), "block.0"),
        (("A[{module}]", "B[{module}]"), "x"),
    ],
)
def test_module_may_stand_anywhere(normal, save, assert_updates, scan, keys, name):
    A, B = normal(3, 4), normal(5, 3)
    down, up = (key.format(module=name) for key in keys)
    path = save({down: A, up: B, "other.bias": normal(2)})
    assert_updates(path, {name: B.double() @ A.double()}, keys=keys)
    assert scan(path, keys=keys).left_out == (("other.bias", "a bias"),)


def test_keys_win_over_every_format(normal, save, assert_updates):
    A, B = normal(3, 4), normal(5, 3)
    tensors = {"base_model.model.q.lora_A.weight": A, "base_model.model.q.lora_B.weight": B}
    path = save(tensors | {"oft_diag.x": normal(2)}, {"peft_type": "IA3"})
    keys = ("base_model.model.{module}.lora_A.weight", "base_model.model.{module}.lora_B.weight")
    assert_updates(path, {"q": B.double() @ A.double()}, keys=keys)


def test_convolution(normal, save, assert_updates):
    A, B = normal(3, 4, 2, 2), normal(5, 3, 1, 1)
    update = torch.einsum("or,rikl->oikl", B.double().flatten(1), A.double())
    assert_updates(save({"w_a_0": A, "w_b_0": B}), {"0": update}, keys=SAM)


def test_keys_that_no_tensor_has_are_refused(normal, save, refusal):
    why = refusal(save({f"{name}.0": normal(3, 4) for name in "wxyz"}), keys=SAM)
    assert "no tensor has a name as keys=('w_a_{module}', 'w_b_{module}') say" in why
    assert why.endswith("the first are 'w.0', 'x.0', 'y.0'.")


def test_empty_name_of_a_module_does_not_count(normal, save, refusal):
    assert "no tensor" in refusal(save({"w_a_": normal(3, 4), "w_b_": normal(5, 3)}), keys=SAM)


def test_factors_the_wrong_way_round_are_refused(normal, save, refusal):
    path = save({"w_a_0": normal(4, 3), "w_b_0": normal(5, 3)})
    assert "down (r, in, ...) and up (out, r) are expected" in refusal(path, keys=SAM)


@pytest.mark.parametrize(
    "keys",
    [
        "w_a_{module}",
        ("w_a_{module}",),
        ("w_a_{module}", "w_b"),
        ("{module}{module}", "w_b_{module}"),
        ("w_a_{module}", "w_a_{module}"),
        ("w_a_{module}", 3),
        ["w_a_{module}", "w_b_{module}"],
    ],
)
def test_patterns_that_make_no_sense_are_refused(tmp_path, keys):
    with pytest.raises(ValueError, match="pass two patterns"):
        read_adapters(tmp_path, keys=keys)
