import numpy as np
import pytest
import torch

from sklora.io import _build, read_adapters
from sklora.io.formats import _loaded

MODULE = "model.layers.0.self_attn.q_proj"
CONFIG = {"model": "/Users/me/models/Qwen", "lora_parameters": {"rank": 64, "scale": 10.0}}


def tensors(a, b):
    return {f"{MODULE}.lora_a": a, f"{MODULE}.lora_b": b}


@pytest.fixture
def pair(normal):
    """A (in, r) and b (r, out) of an update (5, 4) of rank 3."""
    return normal(4, 3), normal(3, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [10.0, -0.5, 1])
def test_update_is_scale_times_a_b_transposed(normal, save, assert_updates, scan, dtype, scale):
    a, b = normal(4, 3, dtype=dtype), normal(3, 5, dtype=dtype)
    path = save(tensors(a, b), {"lora_parameters": {"alpha": 16, "scale": scale}})
    assert_updates(path, {MODULE: (scale * a.double() @ b.double()).T})
    assert scan(path).format == "mlx"


def test_base_model(pair, save, scan):
    assert scan(save(tensors(*pair), CONFIG)).base_model == "Qwen"


@pytest.mark.parametrize(
    "config",
    [
        None,
        {"model": "x"},
        {"lora_parameters": None},
        {"lora_parameters": {"rank": 3, "alpha": 16}},
    ],
)
def test_without_one_the_scale_is_asked_for(pair, save, refusal, assert_updates, config):
    a, b = pair
    path = save(tensors(a, b), config)
    why = refusal(path)
    assert "lora_parameters" in why
    assert "pass scale=" in why
    assert_updates(path, {MODULE: -2 * (a.double() @ b.double()).T}, scale=-2)


def test_old_npz(pair, tmp_path, refusal, assert_updates):
    a, b = pair
    path = tmp_path / "adapters.npz"
    np.savez(path, **{name: tensor.numpy() for name, tensor in tensors(a, b).items()})
    assert "pass scale=" in refusal(path)
    assert_updates(path, {MODULE: 20 * (a.double() @ b.double()).T}, scale=20)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [({"scale": "10"}, "scale is '10'"), ([1], "must be a mapping"), ({"scale": None}, "None")],
)
def test_parameters_that_make_no_sense_are_refused(pair, save, refusal, parameters, message):
    assert message in refusal(save(tensors(*pair), {"lora_parameters": parameters}))


# The defaults of mlx-lm 0.8 to 0.13.0.
OLD = {"iters": 1000, "val_batches": 25, "lora_layers": 16}
PARAMETERS = {"rank": 8, "alpha": 16, "scale": 10.0}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (OLD, 20),
        (OLD | {"lora_parameters": {"rank": 8, "scale": 10.0}}, 10),
        (OLD | {"lora_parameters": {"alpha": 16, "scale": 10.0}}, 10),
        (OLD | {"lora_parameters": {"rank": 1, "alpha": 16, "scale": 10.0}}, 160),
        (OLD | {"use_dora": False}, 10),  # of 0.14.2 to 0.18
        (OLD | {"fine_tune_type": "lora"}, 10),  # of later ones, with settings of old ones
        (OLD | {"num_layers": 16}, 10),
        ({"iters": 1000, "val_batches": 25}, 10),
        ({"iters": 1000, "val_batches": 25, "num_layers": 16, "fine_tune_type": "lora"}, 10),
        ({"lora_layers": 16}, 10),  # which nobody trained with
    ],
)
def test_until_0_13_0_alpha_over_rank_multiplies_the_scale(pair, save, scan, config, scale):
    assert scan(save(tensors(*pair), {"lora_parameters": PARAMETERS} | config)).scales == (scale,)


@pytest.mark.parametrize("changed", [{"rank": 0}, {"rank": "8"}, {"alpha": None}])
def test_old_parameters_that_make_no_sense_are_refused(pair, save, refusal, changed):
    config = OLD | {"lora_parameters": PARAMETERS | changed}
    assert f"{next(iter(changed))} is " in refusal(save(tensors(*pair), config))


def test_scales_of_modules_have_to_agree(pair, save, scan, refusal):
    """Unsloth writes and heeds them; mlx-lm takes the one scale for all modules."""
    config = CONFIG | {"unsloth_mlx_lora_module_scales": {MODULE: 10, "other": 5.0}}
    assert scan(save(tensors(*pair), config)).scales == (10,)
    config["unsloth_mlx_lora_module_scales"] = {MODULE: 2.5}
    assert "2.5 for Unsloth, and 10 for mlx-lm" in refusal(save(tensors(*pair), config))


def test_magnitude_of_dora(pair, normal, save):
    magnitude = normal(5)
    X = read_adapters(save(tensors(*pair) | {f"{MODULE}.m": magnitude}, CONFIG))
    np.testing.assert_array_equal(X[0].side[f"{MODULE}:magnitude_out"], magnitude)


@pytest.mark.parametrize("old", [False, True])
def test_every_expert_is_a_module(normal, save, assert_updates, scan, old, monkeypatch):
    monkeypatch.setattr(_build, "MAX_EXPERTS", 8)
    a, b = normal(8, 3, 4), normal(8, 5, 3)
    path = save(tensors(a.reshape(24, 4) if old else a, b), CONFIG)
    assert_updates(path, {f"{MODULE}.{e}": 10 * b[e].double() @ a[e].double() for e in range(8)})
    report = scan(path)
    assert report.ranks == (3,)
    assert [module.path for module in report.modules] == [f"{MODULE}.{e}" for e in range(8)]


def test_stack_without_its_other_is_refused(normal, save, refusal):
    stack = {f"{MODULE}.lora_b": normal(8, 5, 3)}
    assert "has b and no more" in refusal(save(stack | {"q.lora_a": normal(4, 3)}, CONFIG))


def test_others_are_left_out(pair, normal, save, scan):
    [(name, reason)] = scan(save(tensors(*pair) | {"q.bias": normal(5)}, CONFIG)).left_out
    assert (name, reason) == ("q.bias", "a bias")


@pytest.mark.parametrize("shape", [(8, 2, 4), (7, 3, 4), (23, 4), (8, 3, 2, 2), (4,), (3, 8, 4)])
def test_stacks_that_do_not_fit_are_refused(normal, save, refusal, shape):
    path = save(tensors(normal(*shape), normal(8, 5, 3)), CONFIG)
    assert f"stack_a {shape}, stack_b (8, 5, 3) do not fit" in refusal(path)


def test_more_experts_than_any_model_has_are_refused(save, refusal):
    a, b = (torch.ones(100_001, *shape, dtype=torch.float16) for shape in ((1, 4), (5, 1)))
    assert "over 100000 experts" in refusal(save(tensors(a, b), CONFIG))


class TestWhatMLXDoesNotLoad:
    def test_type_of_full_weights_is_refused(self, pair, save, refusal):
        why = refusal(save(tensors(*pair), CONFIG | {"fine_tune_type": "full"}))
        assert why.startswith("fine_tune_type is 'full'")

    @pytest.mark.parametrize(
        "key", ["self_attn.k_proj", "q_proj", "0.self_attn.q_proj", ["self_attn.q_proj"]]
    )
    def test_module_that_is_no_key_is_refused(self, pair, save, refusal, key):
        """A key is the whole name, or all of it below the layer (`linear_to_lora_layers`)."""
        a, b = pair
        parameters = CONFIG["lora_parameters"] | {"keys": ["head", key]}
        both = {"head.lora_a": a, "head.lora_b": b} | tensors(a, b)
        path = save(both, {"lora_parameters": parameters})
        assert f"module '{MODULE}' is none of the keys" in refusal(path)

    @pytest.mark.parametrize(
        "keys", [["self_attn.q_proj"], [MODULE], None, ["x", "self_attn.q_proj"]]
    )
    def test_keys_are_of_a_layer_or_whole_names(self, pair, save, scan, keys):
        parameters = CONFIG["lora_parameters"] | {"keys": keys}
        assert scan(save(tensors(*pair), {"lora_parameters": parameters})).scales == (10,)

    @pytest.mark.parametrize("keys", ["self_attn.q_proj", {"self_attn.q_proj": 1}])
    def test_keys_that_are_no_list_are_refused(self, pair, save, refusal, keys):
        parameters = CONFIG["lora_parameters"] | {"keys": keys}
        why = refusal(save(tensors(*pair), {"lora_parameters": parameters}))
        assert why.startswith(f"keys is {keys!r} in its lora_parameters; it must be a list")

    def test_layers_have_plain_numbers(self, pair, save, refusal):
        a, b = pair
        parameters = CONFIG["lora_parameters"] | {"keys": ["q"]}
        path = save({"h.².q.lora_a": a, "h.².q.lora_b": b}, {"lora_parameters": parameters})
        assert "is none of the keys" in refusal(path)

    def test_names_that_take_too_long_to_compare_are_refused(
        self, pair, save, refusal, monkeypatch
    ):
        monkeypatch.setattr(_loaded, "_MAX_LETTERS", 8)
        a, b = pair
        path = save({"a.b.c.lora_a": a, "a.b.c.lora_b": b}, CONFIG)
        assert "comparing them takes too long" in refusal(path)

    @pytest.mark.parametrize(("first", "last"), [(0, 2), (9, 11)])
    @pytest.mark.parametrize("keys", [{}, {"keys": ["mlp.experts.7.up"]}])
    @pytest.mark.parametrize("name", ["num_layers", "lora_layers"])
    def test_more_layers_than_the_last_are_refused(
        self, pair, save, refusal, scan, name, keys, first, last
    ):
        a, b = pair
        both = {}
        for layer in (first, last):
            module = f"model.layers.{layer}.mlp.experts.7.up"
            both |= {f"{module}.lora_a": a, f"{module}.lora_b": b}
        config = {"lora_parameters": CONFIG["lora_parameters"] | keys}
        why = refusal(save(both, config | {name: 2}))
        assert f"{name} is 2, but modules 'model.layers.{first}.mlp.experts.7.up' and" in why
        assert refusal(save(both, config | {name: True})).startswith(f"{name} is True")
        for enough in (3, -1, 0, None):
            assert len(scan(save(both, config | {name: enough})).modules) == 2

    @pytest.mark.parametrize("prefix", ["", "base_model.model.", "encoder."])
    def test_layers_under_two_names_are_refused(self, pair, save, scan, refusal, prefix):
        a, b = pair
        both = tensors(a, b) | {f"{prefix}layers.1.q.lora_a": a, f"{prefix}layers.1.q.lora_b": b}
        for name in ("num_layers", "lora_layers"):
            why = refusal(save(both, CONFIG | {name: -1}))
            assert f"modules '{prefix}layers.1.q' and '{MODULE}'" in why
            assert "mlx-lm leaves one of them out" in why
        # Other trainers write the same keys, for models with several stacks.
        assert len(scan(save(both, CONFIG)).modules) == 2

    def test_whole_names_are_adapted_in_every_layer(self, pair, save, scan):
        a, b = pair
        both = {}
        for layer in (0, 9):
            both |= {f"layers.{layer}.q.lora_a": a, f"layers.{layer}.q.lora_b": b}
        parameters = CONFIG["lora_parameters"] | {"keys": ["layers.0.q", "q"]}
        path = save(both, {"lora_parameters": parameters, "num_layers": 1})
        assert len(scan(path).modules) == 2

    @pytest.mark.parametrize(
        ("config", "dora"),
        [
            ({"fine_tune_type": "dora"}, True),
            ({"fine_tune_type": "lora"}, False),
            ({"fine_tune_type": "lora", "use_dora": True}, False),
            ({"use_dora": True}, True),
            ({"use_dora": False}, False),
        ],
    )
    def test_magnitudes_that_do_not_fit_the_type_are_refused(
        self, pair, normal, save, refusal, scan, config, dora
    ):
        plain, full = tensors(*pair), tensors(*pair) | {f"{MODULE}.m": normal(5)}
        good, bad = (full, plain) if dora else (plain, full)
        why = "no magnitude" if dora else "a magnitude of DoRA"
        assert f"module '{MODULE}' has {why}" in refusal(save(bad, CONFIG | config))
        assert len(scan(save(good, CONFIG | config)).side) == dora
