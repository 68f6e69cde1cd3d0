import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from sklora.io import read_adapters
from tests.io.formats.peft import HADA, LORA, PREFIX, linear, named

CONFIGS = Path(__file__).parents[4] / "shared" / "adapters" / "peft_configs"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_lora_is_b_a_times_alpha_over_r_in_every_dtype(normal, save, assert_updates, dtype):
    A, B = normal(3, 4, dtype=dtype), normal(5, 3, dtype=dtype)
    path = save(linear("q", A, B), LORA)
    assert_updates(path, {PREFIX + "q": B.double() @ A.double() * 6 / 3})


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 1}, 1 / 3),
        ({"lora_alpha": -6}, -2),
        ({"lora_alpha": 0.5}, 0.5 / 3),
        ({"lora_alpha": 0}, 0),
        ({"use_rslora": True}, 6 / 3**0.5),
        ({"use_rslora": False}, 2),
        ({"r": 64}, 2),
        ({"fan_in_fan_out": True}, 2),
        ({"init_lora_weights": "gaussian"}, 2),
        ({"init_lora_weights": "eva"}, 2),
        ({"init_lora_weights": False}, 2),
        ({"init_lora_weights": None}, 2),
        ({"alpha_pattern": None, "rank_pattern": None, "target_parameters": None}, 2),
    ],
)
def test_scale(pair, save, assert_updates, scan, config, scale):
    A, B = pair
    path = save(linear("q", A, B), LORA | config)
    assert_updates(path, {PREFIX + "q": B @ A * scale})
    assert scan(path).scales == (pytest.approx(scale, rel=1e-15),)


def test_pattern_that_fits_first_gives_alpha_and_tensors_give_rank(normal, save, assert_updates):
    paths = [
        "layers.0.q_proj",
        "layers.1.q_proj",
        "layers.10.q_proj",
        "layers.0.k_proj",
        "my_q_proj",
    ]
    ranks = [3, 2, 1, 3, 3]
    factors = [(normal(r, 4), normal(5, r)) for r in ranks]
    config = LORA | {
        "rank_pattern": {"layers.1.q_proj": 2, r"layers\.10\..*": 1},
        "alpha_pattern": {r"layers\.(0|1)\.q_proj": 12, r".*\.q_proj": 5, "q_proj": 7},
    }
    alphas = [12, 12, 5, 6, 6]
    tensors, expected = {}, {}
    for path, rank, alpha, (A, B) in zip(paths, ranks, alphas, factors, strict=True):
        tensors |= linear(path, A, B)
        expected[PREFIX + path] = B.double() @ A.double() * alpha / rank
    assert_updates(save(tensors, config), expected)


@pytest.mark.parametrize("name", ["a+b", "layers[0]", "^.q"])
def test_pattern_that_is_the_name_of_the_module(pair, save, assert_updates, name):
    A, B = pair
    path = save(linear(name, A, B), LORA | {"alpha_pattern": {"b": 1, name: 9}})
    assert_updates(path, {PREFIX + name: B @ A * 3})
    path = save(linear(name, A, B), LORA | {"alpha_pattern": {name: 9, ".*": 12}})
    assert_updates(path, {PREFIX + name: B @ A * 4})


@pytest.mark.parametrize("ending", ["{}.weight", "{}.default.weight", "{}.my-adapter.weight", "{}"])
def test_adapter_s_name_in_the_keys_is_no_part_of_the_module_s(pair, save, assert_updates, ending):
    A, B = pair
    tensors = {PREFIX + f"q.{ending.format(role)}": x for role, x in (("lora_A", A), ("lora_B", B))}
    assert_updates(save(tensors, LORA), {PREFIX + "q": B @ A * 2})


def test_two_adapters_in_one_file_are_refused(pair, save, refusal):
    A, B = pair
    tensors = named("q", lora_A__one__weight=A, lora_A__two__weight=A, lora_B__one__weight=B)
    assert "two adapters" in refusal(save(tensors, LORA))


def test_every_subfolder_has_its_own_configuration(pair, save, tmp_path):
    A, B = pair
    for name, alpha in (("cat", 3), ("dog", 9)):
        save(linear("q", A, B), LORA | {"lora_alpha": alpha}, folder=f"adapters/{name}")
    save(linear("q", A, B), LORA, folder="adapters")
    X = read_adapters(tmp_path)
    scales = [2, 1, 3]
    assert [Path(id).parent.name for id in X.ids] == ["adapters", "cat", "dog"]
    for adapter, scale in zip(X, scales, strict=True):
        U, V = adapter["q"]
        np.testing.assert_allclose(U @ V.T, scale * (B @ A).numpy(), rtol=1e-12)


@pytest.mark.parametrize("adapter", ["", ".default"])
def test_embedding_is_stored_transposed(normal, save, assert_updates, adapter):
    A, B = normal(3, 7), normal(4, 3)
    tensors = {
        f"{PREFIX}wte.lora_embedding_A{adapter}": A,
        f"{PREFIX}wte.lora_embedding_B{adapter}": B,
    }
    # What is added to the weight (7, 4).
    stored = (2 * B.double() @ A.double()).T
    assert_updates(save(tensors, LORA), {PREFIX + "wte": stored.T})


@pytest.mark.parametrize("kernel", [(3,), (3, 3), (1, 1), (2, 3, 4)])
def test_convolution(normal, save, assert_updates, kernel):
    A, B = normal(3, 4, *kernel), normal(5, 3, *(1 for _ in kernel))
    update = torch.einsum("or,r...->o...", B.double().flatten(1), A.double())
    assert_updates(save(linear("conv", A, B), LORA), {PREFIX + "conv": 2 * update})


def test_convolution_in_groups_is_refused(normal, save, refusal):
    path = save(linear("conv", normal(4, 3, 3, 3), normal(6, 2, 1, 1)), LORA)
    assert "shapes down (4, 3, 3, 3), up (6, 2, 1, 1) do not fit" in refusal(path)


@pytest.mark.parametrize("alpha", [8, 1, -1, 0])
def test_adalora(normal, save, assert_updates, alpha):
    A, B, E = normal(3, 4), normal(5, 3), normal(3, 1)
    tensors = named("q", lora_A=A, lora_B=B, lora_E=E)
    config = {"peft_type": "ADALORA", "r": 8, "init_r": 12, "lora_alpha": alpha}
    # An alpha that is not positive is read as the rank.
    scaling = alpha if alpha > 0 else 3
    update = B.double() @ (A.double() * E.double()) * scaling / (3 + 1e-5)
    assert_updates(save(tensors, config), {PREFIX + "q": update})


def test_adalora_divides_by_the_rank_before_pruning(normal, save, assert_updates):
    kept = [True, False, True, True, False]
    A, B, E = normal(3, 4), normal(5, 3), normal(3, 1)
    tensors = named("layers.0.q", lora_A=A, lora_B=B, lora_E=E)
    config = {
        "peft_type": "ADALORA",
        "init_r": 5,
        "lora_alpha": 8,
        "rank_pattern": {"layers.0.q.lora_E": kept},
    }
    update = B.double() @ (A.double() * E.double()) * 8 / (5 + 1e-5)
    assert_updates(save(tensors, config), {PREFIX + "layers.0.q": update})


def test_module_that_adalora_pruned_is_zero(normal, save, assert_updates, scan):
    A, B, E = normal(3, 4), normal(5, 3), normal(3, 1)
    pruned = named("k", lora_A=normal(0, 4), lora_B=normal(5, 0), lora_E=normal(0, 1))
    config = {
        "peft_type": "ADALORA",
        "lora_alpha": 8,
        "rank_pattern": {"q.lora_E": [True, False, True, True], "k.lora_E": [False] * 4},
    }
    path = save(named("q", lora_A=A, lora_B=B, lora_E=E) | pruned, config)
    update = B.double() @ (A.double() * E.double()) * 8 / (4 + 1e-5)
    assert_updates(path, {PREFIX + "q": update})
    reason = "AdaLoRA pruned its module, whose update is zero"
    assert dict(scan(path).left_out) == dict.fromkeys(pruned, reason)


def test_adalora_of_a_large_model(normal, save, scan):
    modules = [f"model.layers.{n}.self_attn.{x}_proj" for n in range(60) for x in "qkvo"]
    tensors, pattern = {}, {}
    for module in modules:
        tensors |= named(module, lora_A=normal(2, 4), lora_B=normal(5, 2), lora_E=normal(2, 1))
        pattern[f"{module}.lora_E"] = [True] * 2 + [False] * 10
    config = {"peft_type": "ADALORA", "lora_alpha": 8, "rank_pattern": pattern}
    assert scan(save(tensors, config)).scales == (8 / (12 + 1e-5),)


@pytest.mark.parametrize("kept", [[True] * 5, "yes", [True, 1, 1, 0], None])
def test_adalora_s_mask_of_another_size_is_not_used(normal, save, scan, kept):
    tensors = named("q", lora_A=normal(3, 4), lora_B=normal(5, 3), lora_E=normal(3, 1))
    config = {"peft_type": "ADALORA", "lora_alpha": 8, "rank_pattern": {"q.lora_E": kept}}
    assert scan(save(tensors, config)).scales == (8 / (3 + 1e-5),)


def test_loha_and_lokr_take_alpha_from_the_configuration(normal, save, assert_updates, scan):
    w = {role: normal(*shape) for role, shape in HADA.items()}
    hada = named("q", **w)
    d = {role: tensor.double() for role, tensor in w.items()}
    update = (d["hada_w1_a"] @ d["hada_w1_b"]) * (d["hada_w2_a"] @ d["hada_w2_b"]) * 8 / 2
    path = save(hada, {"peft_type": "LOHA", "r": 16, "alpha": 8})
    assert_updates(path, {PREFIX + "q": update})
    assert scan(path).format == "peft"

    kron = named("q", lokr_w1=normal(2, 3), lokr_w2_a=normal(4, 2), lokr_w2_b=normal(2, 5))
    w1, a, b = (tensor.double() for tensor in kron.values())
    path = save(kron, {"peft_type": "LOKR", "r": 16, "alpha": 8, "alpha_pattern": {"q": 6}})
    assert_updates(path, {PREFIX + "q": torch.kron(w1, a @ b) * 6 / 2})


def test_lokr_of_two_full_matrices_is_scaled_by_the_r_of_the_configuration(
    normal, save, assert_updates
):
    w1, w2 = normal(2, 3), normal(4, 5)
    config = {"peft_type": "LOKR", "r": 16, "alpha": 8, "rank_pattern": {"k": 4}}
    path = save(named("q", lokr_w1=w1, lokr_w2=w2) | named("k", lokr_w1=w1, lokr_w2=w2), config)
    kron = torch.kron(w1.double(), w2.double())
    assert_updates(path, {PREFIX + "q": kron * 8 / 16, PREFIX + "k": kron * 8 / 4})


def test_lokr_of_two_full_matrices_needs_an_r(normal, save, refusal):
    tensors = named("q", lokr_w1=normal(2, 3), lokr_w2=normal(4, 5))
    config = {"peft_type": "LOKR", "alpha": 8}
    assert "r is None" in refusal(save(tensors, config))
    for r in (0, -3):
        assert f"rank {r};" in refusal(save(tensors, config | {"r": r}))


def test_lokr_of_a_one_dimensional_convolution_is_refused(normal, save, refusal, scan):
    """PEFT multiplies other axes than the channels there, and its update has any rank."""
    tensors = named("q", lokr_w1=normal(2, 3), lokr_w2=normal(4, 5, 3))
    path = save(tensors, {"peft_type": "LOKR", "r": 16, "alpha": 8})
    why = refusal(path)
    assert "'base_model.model.q'" in why
    assert "(4, 5, 3)" in why
    assert "lokr='kronecker'" in why
    assert scan(path, lokr="kronecker").ranks == (1,)


@pytest.mark.parametrize("lokr", ["exact", "kronecker"])
def test_lokr_of_rank_0_is_refused(normal, save, refusal, lokr):
    tensors = named("q", lokr_w1=normal(2, 3), lokr_w2_a=normal(4, 0), lokr_w2_b=normal(0, 5))
    path = save(tensors, {"peft_type": "LOKR", "r": 4, "alpha": 8})
    assert "rank 0" in refusal(path, lokr=lokr)


def test_what_is_no_update_is_left_out_with_a_reason(pair, normal, save, scan):
    others = {
        "classifier.modules_to_save.dense.weight": "saved whole",
        "classifier.modules_to_save.dense.bias": "saved whole",
        "classifier.original_module.weight": "original of a module",
        "q.base_layer.weight": "weight of the base model",
        "q.lora_B.bias": "bias",
        "layer.0.dense.bias": "bias",
        "embeddings.LayerNorm.weight": "normalisation",
        "model.norm.weight": "normalisation",
        "model.embed_tokens.weight": "embedding",
        "q.lora_velora_embed": "VeLoRA",
        "soft_router.weight": "no part of a low-rank update",
    }
    tensors = {PREFIX + name: normal(2) for name in others}
    report = scan(save(linear("q", *pair) | tensors, LORA | {"bias": "all"}))
    assert [module.name for module in report.modules] == ["q"]
    assert {name for name, _ in report.left_out} == set(tensors)
    for name, reason in report.left_out:
        assert others[name.removeprefix(PREFIX)] in reason


class TestDoRA:
    CONFIG = LORA | {"use_dora": True}

    @pytest.mark.parametrize("ending", ["", ".weight", ".default.weight", ".default"])
    def test_magnitude_is_a_side_feature(self, pair, normal, save, ending):
        A, B = pair
        magnitude = normal(5, dtype=torch.float64)
        tensors = linear("q", A, B) | {f"{PREFIX}q.lora_magnitude_vector{ending}": magnitude}
        X = read_adapters(save(tensors, self.CONFIG))
        assert X.layout.side == (("q:magnitude_out", 5),)
        np.testing.assert_array_equal(X[0].side["q:magnitude_out"], magnitude)
        U, V = X[0]["q"]
        np.testing.assert_allclose(U @ V.T, 2 * B @ A, rtol=1e-12)

    def test_convolution_s_is_of_the_output_though_it_lies_across(self, normal, save, scan):
        tensors = linear("conv", normal(3, 4, 3, 3), normal(4, 3, 1, 1))
        tensors |= named("conv", lora_magnitude_vector=normal(1, 4, 1, 1))
        assert scan(save(tensors, self.CONFIG)).side == (("conv:magnitude_out", 4),)

    def test_one_that_does_not_fit_is_left_out(self, pair, normal, save, scan):
        tensors = linear("q", *pair) | named("q", lora_magnitude_vector=normal(4))
        report = scan(save(tensors, self.CONFIG))
        assert report.side == ()
        [(_, reason)] = report.left_out
        assert reason == "a magnitude of shape (4,) does not fit (5, 4)"

    def test_one_beyond_the_factors_dtype_is_refused_when_it_is_read(self, normal, save):
        tensors = linear("q", normal(3, 4), normal(5, 3))
        tensors |= named("q", lora_magnitude_vector=normal(5, dtype=torch.float64) * 1e300)
        X = read_adapters(save(tensors, self.CONFIG))
        with pytest.raises(ValueError, match="too large for float32"):
            X.read()


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq", "anything", 3, [True]]
)
def test_initialisation_that_changes_the_base_is_refused_by_name(pair, save, refusal, init):
    why = refusal(save(linear("q", *pair), LORA | {"init_lora_weights": init}))
    assert why.startswith(f"init_lora_weights is {init!r}")
    assert "path_initial_model_for_weight_conversion" in why


@pytest.mark.parametrize("init", [True, "true", "False", "Gaussian", "eva", "orthogonal", "mica"])
def test_initialisation_that_leaves_the_base_is_read(pair, save, scan, init):
    assert scan(save(linear("q", *pair), LORA | {"init_lora_weights": init})).scales == (2.0,)


@pytest.mark.parametrize(
    "setting",
    [
        *({"use_qalora": True}, {"use_mora": True, "mora_type": 6}),
        {"use_bdlora": {"a": 1}},
        {"kasa_config": {"beta": 1e-4}},
        {"kasa_config": {}},
        {"layer_replication": [[0, 2], [0, 2]]},
    ],
)
def test_variant_with_another_update_is_refused_by_name(pair, save, refusal, setting):
    assert refusal(save(linear("q", *pair), LORA | setting)).startswith(next(iter(setting)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"alpha_pattern": {"q": None}}, "q is None"),
        ({"alpha_pattern": ["q"]}, "alpha_pattern is"),
        ({"alpha_pattern": {"(": 1}}, "pattern '('"),
        ({"peft_type": None}, "peft_type None"),
        ({"peft_type": {"a": 1}}, "peft_type"),
    ],
)
def test_configuration_that_makes_no_sense_is_refused(pair, save, refusal, config, message):
    assert message in refusal(save(linear("q", *pair), LORA | config))


@pytest.mark.parametrize(
    ("r", "m", "what"), [(0, 4, "(5, 4) and rank 0"), (3, 0, "(5, 0) and rank 3")]
)
def test_module_without_rank_or_size_is_refused(normal, save, refusal, r, m, what):
    why = refusal(save(linear("q", normal(r, m), normal(5, r)), LORA))
    assert what in why
    assert "leave the module out" in why


class TestWithoutConfiguration:
    def test_scale_is_asked_for(self, pair, save, refusal, assert_updates):
        A, B = pair
        path = save(linear("q", A, B))
        why = refusal(path)
        assert "no adapter_config.json" in why
        assert "pass scale=" in why
        assert_updates(path, {PREFIX + "q": B @ A * -0.5}, scale=-0.5)

    def test_also_of_bare_names(self, pair, save, refusal, scan):
        A, B = pair
        tensors = {"transformer.h.0.q.lora_A.weight": A, "transformer.h.0.q.lora_B.weight": B}
        path = save(tensors)
        assert "pass scale=" in refusal(path)
        assert scan(path, scale=2).format == "peft"

    @pytest.mark.parametrize("config", [{"base_model": "x"}, {"lora_parameters": {"scale": 3}}])
    def test_another_configuration_does_not_count(self, pair, save, refusal, config):
        assert "pass scale=" in refusal(save(linear("q", *pair), config))

    def test_loha_is_not_taken_for_lycoris_s(self, normal, save, refusal):
        tensors = named("q", **{role: normal(*shape) for role, shape in HADA.items()})
        assert "pass scale=" in refusal(save(tensors))


class TestConfigurationBesideAFileThatTellsItsScale:
    """Loaders follow one or the other, so that both have to agree where PEFT loads the file."""

    CONFIG = LORA | {"lora_alpha": 0}

    @pytest.mark.parametrize("told", ["metadata", "alpha"])
    def test_pipelines_of_diffusers_keep_theirs(self, pair, save, scan, told):
        A, B = pair
        tensors = {"transformer.q.lora_A.weight": A, "transformer.q.lora_B.weight": B}
        metadata = None
        if told == "metadata":
            metadata = {"lora_adapter_metadata": '{"transformer.lora_alpha": 9}'}
        else:
            tensors["transformer.q.alpha"] = torch.tensor(9.0)
        report = scan(save(tensors, self.CONFIG, metadata))
        assert (report.format, report.scales) == ("diffusers", (3.0,))

    def test_other_names_are_loaded_by_the_configuration(self, pair, save, refusal, scan):
        A, B = pair
        tensors = {"model.q.lora_A.weight": A, "model.q.lora_B.weight": B}
        metadata = {"lora_adapter_metadata": '{"lora_alpha": 9}'}
        why = refusal(save(tensors, LORA, metadata))
        assert "'model.q' has the scale 3 by its metadata, but 2 by the adapter_config.json" in why
        assert scan(save(tensors, LORA, metadata), scale=5).scales == (5,)
        assert scan(save(tensors, LORA | {"lora_alpha": 9}, metadata)).scales == (3,)

    @pytest.mark.parametrize("prefix", ["", "base_model.model."])
    def test_alpha_beside_the_keys_of_peft_has_to_agree(self, pair, save, scan, refusal, prefix):
        """PEFT and transformers do not look at it."""
        A, B = pair
        tensors = {f"{prefix}q.lora_A.weight": A, f"{prefix}q.lora_B.weight": B}
        tensors[f"{prefix}q.alpha"] = torch.tensor(9.0)
        why = refusal(save(tensors, LORA))
        assert why.startswith(f"tensor '{prefix}q.alpha' gives its module the scale 3, but")
        with pytest.raises(ValueError, match="the scale 3, but loaders"):
            read_adapters(save(tensors, LORA)).read()
        for config in (LORA | {"lora_alpha": 9}, LORA | {"lora_alpha": 9.001}, None):
            report = scan(save(tensors, config, folder=f"{config}"))
            assert (report.format, report.scales, report.left_out) == ("peft", (3.0,), ())

    def test_alpha_of_some_modules_is_no_scale_of_the_others(self, pair, save, refusal, scan):
        tensors = linear("q", *pair) | linear("k", *pair)
        tensors["base_model.model.q.alpha"] = torch.tensor(9.0)
        path = save(tensors)
        assert "pass scale=" in refusal(path)
        scales = {module.name: module.scale for module in scan(path, scale=5.0).modules}
        assert scales == {"q": 3.0, "k": 5.0}

    def test_alpha_of_a_module_that_was_saved_whole_is_left_out(self, pair, save, scan):
        other = "base_model.model.head.modules_to_save.alpha"
        report = scan(save(linear("q", *pair) | {other: torch.tensor(9.0)}, LORA))
        assert report.left_out == ((other, "a module that was saved whole"),)

    def test_lycoris_keeps_its_alpha(self, normal, save, scan):
        tensors = {f"lora_unet_q.{role}": normal(*shape) for role, shape in HADA.items()}
        tensors["lora_unet_q.alpha"] = torch.tensor(6.0)
        path = save(tensors, {"peft_type": "LOHA", "r": 2, "alpha": 0})
        assert scan(path).scales == (3.0,)


class TestVeRA:
    TENSORS = ("vera_lambda_b", "vera_lambda_d")

    def tensors(self, normal):
        return named("q", **{role: normal(5) for role in self.TENSORS})

    @pytest.mark.parametrize("options", [{}, {"scale": 1.0}])
    def test_is_refused_with_and_without_configuration(self, normal, save, refusal, options):
        for config in ({"peft_type": "VERA", "r": 256}, None):
            why = refusal(save(self.tensors(normal), config), **options)
            assert re.search("input width of each module", why)

    def test_is_refused_beside_lora(self, pair, normal, save, refusal):
        path = save(self.tensors(normal) | linear("k", *pair), LORA)
        assert "vera_lambda_b" in refusal(path)


@pytest.mark.usefixtures("shared_adapters")
@pytest.mark.parametrize(
    "config", sorted(CONFIGS.glob("*adapter_config.json")), ids=lambda path: path.name[:-21]
)
def test_configurations_of_peft_s_own_experiments(pair, normal, save, refusal, scan, config):
    settings = json.loads(config.read_text())
    A, B = pair
    targets = settings.get("target_modules")
    name = targets[0] if isinstance(targets, list) else "q_proj"
    module = f"model.layers.{(settings.get('layers_to_transform') or [0])[0]}.{name}"
    tensors, scale = linear(module, A, B), None
    if settings.get("use_dora"):
        tensors |= named(module, lora_magnitude_vector=normal(5))
    match settings["peft_type"]:
        case "LORA":
            alpha = settings["lora_alpha"]
            scale = alpha / (3**0.5 if settings.get("use_rslora") else 3)
        case "ADALORA":
            tensors |= named(module, lora_E=normal(3, 1))
            scale = settings["lora_alpha"] / (3 + 1e-5)
        case "LOHA":
            tensors = named(module, **{role: normal(*shape) for role, shape in HADA.items()})
            scale = settings["alpha"] / 2
        case "LOKR":
            tensors = named(module, lokr_w1=normal(2, 3), lokr_w2=normal(4, 5))
            scale = settings["alpha"] / settings["r"]
    path = save(tensors, settings)
    if "kasa" in config.name:
        assert refusal(path).startswith("kasa_config")
    elif scale is None:
        assert refusal(path).startswith(f"peft_type {settings['peft_type']!r}")
    else:
        report = scan(path)
        assert report.scales == (pytest.approx(scale, rel=1e-12),)
        assert report.base_model == settings["base_model_name_or_path"]


def test_every_unknown_type_is_refused_whatever_the_tensors(normal, save, refusal):
    path = save({"prompt_embeddings": normal(8, 4)}, {"peft_type": "PROMPT_TUNING"})
    why = refusal(path)
    assert why.startswith("peft_type 'PROMPT_TUNING'")
    assert "LORA, ADALORA, LOHA, LOKR" in why


def test_patterns_that_take_too_long_to_match_are_refused(normal, save):
    tensors = {}
    for place in range(40):
        tensors |= linear(f"{'x' * 300}.{place}", normal(1, 2), normal(2, 1))
    patterns = {f"(.{{0,{repeats}}}){{0,8}}": 1 for repeats in range(5, 45)}
    with pytest.raises(ValueError, match="40 patterns of ranks and alphas and 40 modules"):
        read_adapters(save(tensors, LORA | {"alpha_pattern": patterns}))
