"""PEFT builds the modules of the configuration, and says nothing of tensors that are left."""

import pytest
import torch

from sklora.io.formats import _loaded
from tests.io.formats.peft import HADA, LORA, PREFIX, linear, named


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"target_modules": ["k", "0.q"]}, "target_modules"),
        ({"target_modules": "q"}, "target_modules"),
        ({"target_modules": r".*\.0\.(q|k)"}, "target_modules"),
        ({"target_modules": ["q"], "exclude_modules": ["1.q"]}, "exclude_modules"),
        ({"target_modules": ["q"], "modules_to_save": ["layers.1"]}, "modules_to_save"),
        ({"target_modules": ["q"], "modules_to_save": ["q"]}, "modules_to_save"),
        ({"target_modules": ["q"], "modules_to_save": ["a.b", "1"]}, "modules_to_save"),
        ({"target_modules": ["q"], "layers_to_transform": [0, 2]}, "layers_to_transform"),
        ({"target_modules": ["q"], "layers_to_transform": 0}, "layers_to_transform"),
        (
            {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ["h"]},
            "layers_to_transform",
        ),
        (
            {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "my_layers"},
            "layers_to_transform",
        ),
    ],
)
def test_module_that_is_not_adapted_is_refused(pair, save, refusal, settings, what):
    why = refusal(save(linear("layers.1.q", *pair), LORA | settings))
    assert why.startswith("module 'layers.1.q' is none that its configuration adapts")
    assert what in why


def test_any_module_may_be_the_one_that_is_not_adapted(pair, save, refusal):
    tensors = linear("a.q", *pair) | linear("b.k", *pair)
    assert "module 'b.k' is none" in refusal(save(tensors, LORA | {"target_modules": ["q"]}))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q"]},
        {"target_modules": ["layers.1.q"], "layers_to_transform": [0]},
        {"target_modules": "all-linear"},
        {"target_modules": "layers.1.q"},
        {"target_modules": r".*\.(?:q|k)"},
        {"target_modules": r"(?!k).*q"},
        {"target_modules": None, "exclude_modules": ["k", "my_q"]},
        {"target_modules": ["q"], "modules_to_save": ["layer", "(", 3]},
        {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ["h|layers"]},
        {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": ["h|layers", "h"]},
        {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": [3, "layers"]},
        {"target_modules": ["q"], "layers_to_transform": []},
        {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": 5},
        {"target_modules": [], "target_parameters": ["x"], "r": 3},
        {"target_modules": ["k"], "ensure_weight_tying": True},
        {"target_modules": None, "layers_to_transform": [0]},
    ],
)
def test_module_that_is_adapted_is_read(pair, save, scan, settings):
    assert scan(save(linear("layers.1.q", *pair), LORA | settings)).ranks == (3,)


def test_output_projection_of_attention_has_the_settings_of_the_whole(pair, save, scan):
    config = LORA | {"target_modules": ["attn"], "alpha_pattern": {"h.attn": 9}}
    assert scan(save(linear("h.attn.base_layer.out_proj", *pair), config)).scales == (3.0,)


def test_layers_may_lie_deep(pair, save, scan):
    layers = {"layers_to_transform": [1], "layers_pattern": ["h.layers"]}
    config = LORA | {"target_modules": ["q"]} | layers
    assert scan(save(linear("model.h.layers.1.q", *pair), config)).ranks == (3,)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r"layers\.\d+\.q", "lora_alpha": 9},
        {"target_modules": ["layers.1.q"], "lora_alpha": 9},
        {"target_modules": ["q"], "alpha_pattern": {"layers.1.q": 9}},
        {"target_modules": ["q"], "layers_to_transform": [1], "lora_alpha": 9},
    ],
)
@pytest.mark.parametrize(
    ("name", "wrapper"),
    [
        ("base_model.model._orig_mod.layers.1.q", "_orig_mod"),
        ("_orig_mod.base_model.model.layers.1.q", None),
        ("base_model.model.layers._fsdp_wrapped_module.1.q", None),
        ("base_model.model.layers.1._checkpoint_wrapped_module.q", None),
    ],
)
def test_what_wrappers_put_between_is_no_part_of_a_name(pair, save, scan, settings, name, wrapper):
    A, B = pair
    tensors = {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    report = scan(save(tensors, LORA | settings))
    assert [(module.name, module.scale) for module in report.modules] == [("layers.1.q", 3.0)]
    if wrapper is not None:
        inside = {"target_modules": [f"{wrapper}.layers.1.q"]}
        assert scan(save(tensors, LORA | settings | inside)).scales == (3.0,)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"alpha_pattern": {"_orig_mod.layers.1.q": 18}}, 6.0),
        ({"rank_pattern": {"_orig_mod.x": 3}, "alpha_pattern": {"^layers.1.q": 18}}, 2.0),
        ({"exclude_modules": ["_orig_mod.layers.1.q"]}, None),
    ],
)
def test_any_setting_may_name_wrappers(pair, save, scan, refusal, settings, scale):
    path = save(linear("_orig_mod.layers.1.q", *pair), LORA | settings)
    if scale is None:
        assert "exclude_modules" in refusal(path)
    else:
        assert scan(path).scales == (scale,)


@pytest.mark.parametrize("ending", ["{}.other.weight", "{}", "{}.default"])
def test_factors_by_names_that_peft_does_not_load_are_refused_beside_others(
    pair, save, scan, refusal, ending
):
    """It warns of the module that it lacks, and starts from its own factors."""
    other = {
        ending.format(name.removesuffix(".weight")): tensor
        for name, tensor in linear("k", *pair).items()
    }
    assert scan(save(other, LORA)).modules
    assert "name that PEFT does not load" in refusal(save(linear("q", *pair) | other, LORA))


@pytest.mark.parametrize(
    ("config", "tensors", "ending"),
    [
        (LORA, {"lora_embedding_A": (3, 4), "lora_embedding_B": (5, 3)}, ".weight"),
        ({"peft_type": "LOHA", "alpha": 2}, HADA, ".weight"),
        ({"peft_type": "LOHA", "alpha": 2}, HADA, ".other"),
    ],
)
def test_parameters_by_names_that_peft_does_not_load_are_refused_beside_others(
    normal, save, scan, refusal, config, tensors, ending
):
    one, other = (
        {f"{module}.{role}": normal(*shape) for role, shape in tensors.items()} for module in "ab"
    )
    assert scan(save(one, config)).modules
    assert scan(save({f"{name}.default": tensor for name, tensor in one.items()}, config)).modules
    other = {f"{name}{ending}": tensor for name, tensor in other.items()}
    assert "name that PEFT does not load" in refusal(save(one | other, config))


@pytest.mark.parametrize("start", ["", PREFIX * 2, f"_orig_mod.{PREFIX * 2}"])
def test_modules_that_begin_otherwise_are_refused_beside_others(pair, save, scan, refusal, start):
    tensors = linear("layers.0.q", *pair)
    other = {
        name.replace(PREFIX, start).replace("0.q", "1.q"): tensor
        for name, tensor in tensors.items()
    }
    assert scan(save(other, LORA)).modules
    wrapped = {f"_orig_mod.{name}".replace("0.q", "2.q"): one for name, one in tensors.items()}
    assert scan(save(tensors | wrapped, LORA)).modules
    assert "loads one of them at most" in refusal(save(tensors | other, LORA))


@pytest.mark.parametrize("value", [None, 3, "_orig_mod", [["_orig_mod"]]])
def test_names_of_modules_may_be_anything(pair, save, scan, value):
    config = LORA | {"exclude_modules": value}
    assert scan(save(linear("layers.1.q", *pair), config)).ranks == (3,)


def test_names_of_so_many_components_that_comparing_takes_long_are_refused(pair, save, refusal):
    tensors = {}
    for place in range(30):
        tensors |= linear("." * 900 + f"b{place}", *pair)
    config = LORA | {"modules_to_save": ["." * place + "a" for place in range(500)]}
    assert "names of so many components" in refusal(save(tensors, config))


def test_factor_of_another_method_is_refused(pair, normal, save, refusal):
    """PEFT passes lora_E by, where the peft_type is LORA; zeros there hid the update."""
    tensors = linear("q", *pair) | named("q", lora_E=torch.zeros(3, 1))
    assert "has the tensors of adalora, but" in refusal(save(tensors, LORA))
    adalora = LORA | {"peft_type": "ADALORA"}
    assert "has the tensors of lora, but" in refusal(save(linear("q", *pair), adalora))
    lokr = named("q", lokr_w1=normal(2, 3), lokr_w2=normal(4, 5))
    assert "a rank is at least 1" in refusal(save(lokr, adalora))
    hada = named("k", **{role: normal(*shape) for role, shape in HADA.items()})
    why = refusal(save(linear("q", *pair) | hada, LORA))
    assert "module 'base_model.model.k' has the tensors of loha" in why


@pytest.mark.parametrize("ending", ["", ".default"])
def test_rank_by_which_adalora_divides_is_refused(normal, save, refusal, ending):
    """PEFT loads it like a factor; a small one makes the update as large as one likes."""
    tensors = named("q", lora_A=normal(3, 4), lora_B=normal(5, 3), lora_E=normal(3, 1))
    tensors[f"{PREFIX}q.ranknum{ending}"] = torch.tensor([1e-3])
    assert "divides its scale by it" in refusal(save(tensors, LORA | {"peft_type": "ADALORA"}))


def test_module_that_adalora_pruned_in_part_is_refused(normal, save, refusal):
    tensors = named("q", lora_A=normal(3, 4), lora_B=normal(5, 3), lora_E=normal(0, 1))
    why = refusal(save(tensors, LORA | {"peft_type": "ADALORA"}))
    assert "a diagonal (3, 1) is expected" in why


def test_rslora_of_other_methods_is_ignored(normal, save, scan):
    tensors = named("q", **{role: normal(*shape) for role, shape in HADA.items()})
    config = {"peft_type": "LOHA", "alpha": 6, "use_rslora": True}
    assert scan(save(tensors, config)).scales == (3.0,)


def test_magnitudes_are_there_just_where_the_configuration_says_so(pair, normal, save, refusal):
    tensors = linear("q", *pair) | linear("k", *pair)
    tensors |= named("q", lora_magnitude_vector=normal(5))
    why = refusal(save(tensors, LORA | {"use_dora": True}))
    assert why.startswith("module 'base_model.model.k' has no magnitude, but its settings are of")
    for none in ({"use_dora": False}, {"use_dora": None}, {"use_dora": 0}, {}):
        why = refusal(save(tensors, LORA | none))
        assert why.startswith("module 'base_model.model.q' has a magnitude of DoRA, but its")


COPIES = ("", ".modules_to_save", ".original_module")


@pytest.mark.parametrize(
    ("settings", "head"),
    [
        ({"task_type": "SEQ_CLS", "modules_to_save": None}, "classifier"),
        ({"task_type": "SEQ_CLS"}, "score"),
        ({"task_type": "TOKEN_CLS"}, "score"),
        ({"task_type": "TOKEN_CLS"}, "classifier"),
        ({"task_type": "QUESTION_ANS", "modules_to_save": ["classifier"]}, "qa_outputs"),
        ({"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}, "classifier"),
        ({"task_type": None, "modules_to_save": ["head.last"]}, "model.head.last"),
    ],
)
@pytest.mark.parametrize("inner", ["", ".dense"])
def test_factors_in_a_module_that_was_saved_whole_are_left_out(
    pair, save, scan, settings, head, inner
):
    """PEFT until 0.15 adapted the heads of classifiers, too, where targets name them."""
    copies = {}
    for copy in COPIES:
        copies |= linear(f"{head}{copy}{inner}", *pair)
    other = linear("model.classifiers.dense", *pair)
    config = LORA | {"target_modules": ["dense", "classifier", "score", "last"]} | settings
    report = scan(save(copies | other, config))
    assert [module.name for module in report.modules] == ["model.classifiers.dense"]
    reason = "a factor in a module that was saved whole"
    assert set(report.left_out) == {(name, reason) for name in copies}


@pytest.mark.parametrize(
    "settings",
    [
        {"task_type": "CAUSAL_LM"},
        {"task_type": ["SEQ_CLS"]},
        {"task_type": "SEQ_CLS", "target_modules": None},
        {"task_type": "SEQ_CLS", "modules_to_save": ["layers.2"]},
    ],
)
@pytest.mark.parametrize("copy", COPIES[1:])
def test_copies_of_modules_that_were_not_saved_whole_hide_nothing(
    pair, save, refusal, settings, copy
):
    """PEFT loads the factors beside them."""
    tensors = linear("layers.1.q", *pair) | linear(f"layers.1{copy}.q", *pair)
    why = refusal(save(tensors, LORA | {"target_modules": ["q"]} | settings))
    assert f"module 'layers.1{copy}.q' is none that its configuration adapts" in why
    assert "modules_to_save do not name" in why


@pytest.mark.parametrize("name", ["my_modules_to_save", "original_module_2"])
def test_names_like_those_of_copies_are_of_no_copies(pair, save, scan, name):
    assert scan(save(linear(f"layers.{name}.q", *pair), LORA)).ranks == (3,)


def test_names_that_take_too_long_to_compare_are_refused(pair, save, scan, refusal, monkeypatch):
    monkeypatch.setattr(_loaded, "_MAX_LETTERS", 30)
    tensors, copy = linear("h.0.q", *pair), linear("head.modules_to_save.q", *pair)
    config = LORA | {"target_modules": ["q"]}
    assert scan(save(tensors, config)).ranks == (3,)
    for saved, more in ((["a", "b.b", "c.c.c"], {}), (["head"], copy)):
        why = refusal(save(tensors | more, config | {"modules_to_save": saved}))
        assert "comparing them takes too long" in why


def test_files_without_a_configuration_are_checked_too(pair, normal, save, refusal):
    for name in ("q.lora_down.weight", "q.lora_A.default.bits"):
        tensors = linear("q", *pair) | {f"{PREFIX}{name}": pair[0]}
        assert "mixes two formats" in refusal(save(tensors), scale=1)
    lokr = named("q", lokr_w1=normal(2, 3), lokr_w2=normal(4, 5, 3))
    assert "no Kronecker product" in refusal(save(lokr), scale=1)


def test_factors_of_other_formats_are_refused_in_a_module_that_was_saved_whole(pair, save, refusal):
    A, B = pair
    tensors = linear("q", A, B) | {f"{PREFIX}classifier.modules_to_save.lora_down.weight": A}
    tensors |= linear("classifier.modules_to_save", A, B)
    assert "mixes two formats" in refusal(save(tensors, LORA | {"task_type": "SEQ_CLS"}))


@pytest.mark.parametrize(
    "start",
    [
        *("unet", "text_encoder", "text_encoder_2", "text_encoder_3", "prior", "controlnet"),
        *("transformer", "transformer_2", "diffusion_model", "transformer_blocks"),
        *("down_blocks", "mid_block", "up_blocks", "single_transformer_blocks"),
    ],
)
def test_modules_of_pipelines_are_told_by_their_names(pair, save, scan, start):
    A, B = pair
    report = scan(save({f"{start}.x.lora_A.weight": A, f"{start}.x.lora_B.weight": B}))
    assert (report.format, report.scales) == ("diffusers", (1,))


def test_modules_of_pipelines_follow_no_configuration_beside_metadata(pair, save, scan):
    A, B = pair
    tensors = {"unet.x.lora_A.weight": A, "unet.x.lora_B.weight": B}
    metadata = {"lora_adapter_metadata": '{"unet.lora_alpha": 9}'}
    assert scan(save(tensors, {"peft_type": "VERA"}, metadata)).scales == (3.0,)


@pytest.mark.parametrize("start", ["transformer.h", "transformer.encoder", "x.unet", "unet_2"])
def test_other_modules_are_of_no_pipeline(pair, save, refusal, start):
    A, B = pair
    path = save({f"{start}.x.lora_A.weight": A, f"{start}.x.lora_B.weight": B})
    assert "it has the keys of PEFT, but no adapter_config.json" in refusal(path)
