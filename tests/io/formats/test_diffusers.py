import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sklora import DenseProduct, SVDSpectrum
from sklora.io import read_adapters
from sklora.io.formats import peft
from sklora.testing import random_gauge
from tests.io.formats.peft import described

PROCESSORS = Path(__file__).parents[4] / "shared" / "adapters" / "diffusers_old_procs"
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn"


def product(A, B):
    return B.double() @ A.double()


@pytest.mark.parametrize(
    ("down", "up", "name"),
    [
        (f"unet.{BLOCK}.processor.to_q_lora.down", f"unet.{BLOCK}.processor.to_q_lora.up", "to_q"),
        (f"{BLOCK}.processor.to_q_lora.down", f"{BLOCK}.processor.to_q_lora.up", "to_q"),
        (f"{BLOCK}.processor.to_out_lora.down", f"{BLOCK}.processor.to_out_lora.up", "to_out.0"),
        (f"unet.{BLOCK}.to_q.lora.down", f"unet.{BLOCK}.to_q.lora.up", "to_q"),
        (f"unet.{BLOCK}.to_out.0.lora.down", f"unet.{BLOCK}.to_out.0.lora.up", "to_out.0"),
        (f"unet.{BLOCK}.to_q.lora_A", f"unet.{BLOCK}.to_q.lora_B", "to_q"),
        (f"{BLOCK}.to_q.lora_A", f"{BLOCK}.to_q.lora_B", "to_q"),
    ],
)
def test_three_generations_of_keys_give_one_name(pair, save, assert_updates, scan, down, up, name):
    A, B = pair
    path = save({f"{down}.weight": A, f"{up}.weight": B})
    assert_updates(path, {f"unet.{BLOCK}.{name}": product(A, B)}, names="canonical")
    report = scan(path)
    assert (report.format, report.scales) == ("diffusers", (1,))


@pytest.mark.parametrize("prefix", ["", "transformer.", "diffusion_model."])
def test_diffsynth_keeps_the_name_of_the_adapter(pair, save, assert_updates, scan, prefix):
    """ComfyUI, InvokeAI and diffusers (of Qwen-Image) load these files as those without it."""
    A, B = pair
    name = f"{prefix}transformer_blocks.0.attn.to_q"
    tensors = {f"{name}.lora_A.default.weight": A, f"{name}.lora_B.default.weight": B}
    path = save(tensors)
    assert_updates(path, {name: product(A, B)})
    assert scan(path).format == "diffusers"
    path = save(tensors | {f"{name}.alpha": torch.tensor(6.0)}, folder="alpha")
    assert_updates(path, {name: product(A, B) * 2})


def test_alpha_that_no_loader_looks_at_is_refused(pair, save, refusal):
    """Of attention processors diffusers looks at none, and ComfyUI at `to_q.alpha`."""
    A, B = pair
    name = f"unet.{BLOCK}.processor.to_q_lora"
    tensors = {f"{name}.down.weight": A, f"{name}.up.weight": B}
    why = refusal(save(tensors | {f"{name}.alpha": torch.tensor(6.0)}))
    assert "looks like an alpha, but loaders of these keys look at none of this name" in why


@pytest.mark.parametrize("full", [f"unet.{BLOCK}.to_q", f"{TEXT}.q_proj"])
def test_module_without_a_component_is_refused_beside_others(pair, save, refusal, full):
    tensors = {}
    for module in (full, f"{BLOCK}.to_k"):
        tensors |= dict(
            zip((f"{module}.lora_A.weight", f"{module}.lora_B.weight"), pair, strict=True)
        )
    why = refusal(save(tensors))
    assert why.startswith(f"module '{BLOCK}.to_k' has no component")


def test_embedding_of_a_text_encoder(normal, pair, save, assert_updates):
    """Whose update PEFT writes without "weight", and transposed."""
    A, B = pair
    table = "text_encoder.text_model.embeddings.token_embedding"
    A_table, B_table = normal(2, 7), normal(6, 2)
    tensors = {
        f"{TEXT}.q_proj.lora_A.weight": A,
        f"{TEXT}.q_proj.lora_B.weight": B,
        f"{table}.lora_embedding_A": A_table,
        f"{table}.lora_embedding_B": B_table,
    }
    path = save(tensors, metadata=described(text_encoder__r=3, text_encoder__lora_alpha=6))
    expected = {f"{TEXT}.q_proj": product(A, B) * 2, table: product(A_table, B_table) * 3}
    assert_updates(path, expected, names="canonical")


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ("q_proj.lora_linear_layer.down", "q_proj.lora_linear_layer.up"),
        ("to_q_lora.down", "to_q_lora.up"),
        ("q_proj.lora_A", "q_proj.lora_B"),
    ],
)
@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
def test_text_encoders(pair, save, assert_updates, component, down, up):
    A, B = pair
    layer = f"{component}.text_model.encoder.layers.0.self_attn"
    path = save({f"{layer}.{down}.weight": A, f"{layer}.{up}.weight": B})
    assert_updates(path, {f"{layer}.q_proj": product(A, B)}, names="canonical")


@pytest.mark.parametrize("keys", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
@pytest.mark.parametrize(
    ("alpha", "rank", "scale"), [("6", 3, None), ("3", 3, 1), ("x", 3, 1), ("nan", 3, None)]
)
def test_alpha_of_the_metadata_alone_asks_for_the_scale(
    normal, save, refusal, scan, keys, alpha, rank, scale
):
    """Diffusers heeds it in files of MiniMax-H3, and in no others."""
    module = "diffusion_model.blocks.0.attn.out_proj"
    A, B = normal(rank, 4), normal(5, rank)
    tensors = {f"{module}.{key}.weight": x for key, x in zip(keys, (A, B), strict=True)}
    path = save(tensors, metadata={"alpha": alpha})
    if scale is None:
        assert f"its metadata name the alpha '{alpha}'" in refusal(path)
        assert scan(path, scale=2).scales == (2,)
    else:
        assert scan(path).scales == (scale,)
    path = save(tensors | {f"{module}.alpha": torch.tensor(1.5)}, metadata={"alpha": alpha})
    assert scan(path).scales == (0.5,)


def test_convolution(normal, save, assert_updates):
    A, B = normal(3, 4, 3, 3), normal(5, 3, 1, 1)
    conv = "unet.down_blocks.0.resnets.0.conv1"
    update = torch.einsum("or,rikl->oikl", B.double().flatten(1), A.double())
    path = save({f"{conv}.lora.down.weight": A, f"{conv}.lora.up.weight": B})
    assert_updates(path, {conv: update})


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
def test_a_gauge_of_the_kernels_of_a_convolution_changes_no_feature(normal, save, dtype, rtol):
    A, B = normal(3, 4, 3, 3).to(dtype), normal(5, 3, 1, 1).to(dtype)
    R = torch.from_numpy(random_gauge(3, condition=1e3, random_state=0)).to(dtype)
    moved = (
        torch.einsum("rs,sikl->rikl", torch.linalg.inv(R), A),
        torch.einsum("os...,sr->or...", B, R),
    )
    conv = "unet.down_blocks.0.resnets.0.conv1.lora"
    paths = [
        save({f"{conv}.down.weight": down, f"{conv}.up.weight": up}, folder=f"{k}")
        for k, (down, up) in enumerate([(A, B), moved])
    ]
    X = read_adapters(paths)
    for featurizer in (SVDSpectrum(), DenseProduct()):
        before, after = featurizer.fit_transform(X)
        np.testing.assert_allclose(after, before, rtol=0, atol=rtol * np.abs(before).max())
    before, after = np.asarray(X)
    assert not np.allclose(after, before)


ALPHAS = [torch.tensor(6.0), torch.tensor([6.0]), torch.tensor(6), torch.tensor(6.0).bfloat16()]


COMPONENTS = (
    *("unet", "transformer", "transformer_2", "transformer_ref", "connectors", "prior"),
    *("controlnet", "text_encoder", "text_encoder_2", "text_encoder_3", "text_conditioner"),
)


class TestScale:
    def tensors(self, pair, *modules):
        A, B = pair
        tensors = {f"{module}.lora_A.weight": A.clone() for module in modules}
        return tensors | {f"{module}.lora_B.weight": B.clone() for module in modules}

    @pytest.mark.parametrize("alpha", ALPHAS, ids=lambda x: f"{tuple(x.shape)} {x.dtype}")
    def test_is_alpha_of_a_tensor_over_r(self, pair, save, assert_updates, alpha):
        tensors = self.tensors(pair, "transformer.x") | {"transformer.x.alpha": alpha}
        assert_updates(save(tensors), {"transformer.x": product(*pair) * 6 / 3})

    def test_of_metadata_and_a_tensor_have_to_agree(self, pair, save, assert_updates, refusal):
        """diffusers follows the former, and ComfyUI the latter."""
        tensors = self.tensors(pair, "transformer.x") | {"transformer.x.alpha": torch.tensor(6.0)}
        path = save(tensors, metadata=described(transformer__r=3, transformer__lora_alpha=12))
        assert "gives its module the scale 2, but loaders that do not look at it take 4" in refusal(
            path
        )
        path = save(tensors, metadata=described(transformer__r=3, transformer__lora_alpha=6))
        assert_updates(path, {"transformer.x": product(*pair) * 6 / 3})

    @pytest.mark.parametrize(
        ("module", "component"),
        [("diffusion_model.x", "transformer."), ("x", "transformer."), ("diffusion_model.x", "")]
        + [(f"{part}.x", "") for part in COMPONENTS],
    )
    def test_of_another_component_is_refused(self, pair, save, refusal, module, component):
        """diffusers follows it for modules that it renames, and ComfyUI never."""
        text = json.dumps({f"{component}lora_alpha": 3000})
        path = save(self.tensors(pair, module), metadata={"lora_adapter_metadata": text})
        assert f"settings of {component[:-1]!r}, but module {module!r} is of no" in refusal(path)

    @pytest.mark.parametrize("component", ["", "transformer."])
    def test_of_metadata_and_an_alpha_for_comfyui(self, pair, save, scan, refusal, component):
        """As SimpleTuner writes them: without a component, and they have to agree."""
        tensors = self.tensors(pair, "diffusion_model.x")
        tensors["diffusion_model.x.alpha"] = torch.tensor(6.0)
        text = json.dumps({f"{component}lora_alpha": 6, f"{component}r": 3})
        path = save(tensors, metadata={"lora_adapter_metadata": text})
        if component:
            assert "is of no such component" in refusal(path)
        else:
            assert scan(path).scales == (2,)
            path = save(tensors, metadata=described(lora_alpha=12))
            assert "scale 2, but loaders that do not look at it take 4" in refusal(path)

    def test_of_any_component_is_that_of_its_modules(self, pair, save, scan):
        path = save(self.tensors(pair, "new.x"), metadata=described(new__lora_alpha=6))
        assert scan(path).scales == (2,)

    def test_of_no_component_is_that_of_a_model(self, pair, save, scan):
        path = save(self.tensors(pair, "x"), metadata=described(lora_alpha=6))
        assert scan(path).scales == (2,)

    def test_is_that_of_the_component(self, pair, save, assert_updates):
        modules = ["transformer.x", "text_encoder.x", "text_encoder_2.x"]
        path = save(
            self.tensors(pair, *modules) | {"text_encoder_2.x.alpha": torch.tensor(-9.0)},
            metadata=described(transformer__lora_alpha=12, text_encoder__lora_alpha=1.5),
        )
        scales = [12 / 3, 1.5 / 3, -9 / 3]
        expected = {
            module: product(*pair) * scale for module, scale in zip(modules, scales, strict=True)
        }
        assert_updates(path, expected)

    def test_of_one_component_is_not_that_of_another(self, pair, save, assert_updates):
        tensors = self.tensors(pair, "transformer.x", "text_encoder.x", "text_encoder_2.x")
        path = save(
            tensors | {"text_encoder.x.alpha": torch.tensor(-9.0)},
            metadata=described(transformer__lora_alpha=12, text_encoder__note=3),
        )
        scales = {"transformer.x": 12 / 3, "text_encoder.x": -9 / 3, "text_encoder_2.x": 1}
        expected = {module: product(*pair) * scale for module, scale in scales.items()}
        assert_updates(path, expected)

    @pytest.mark.parametrize("prefix", ["", "transformer."])
    def test_follows_patterns_and_rslora(self, pair, save, assert_updates, prefix):
        modules = [f"{prefix}transformer_blocks.{n}.ff" for n in (0, 1)]
        settings = {
            f"{prefix}r": 64,
            f"{prefix}lora_alpha": 12,
            f"{prefix}rank_pattern": {"transformer_blocks.1.ff": 32},
            f"{prefix}alpha_pattern": {"^transformer_blocks.1.ff": 24},
            f"{prefix}use_rslora": True,
        }
        path = save(
            self.tensors(pair, *modules),
            metadata={"lora_adapter_metadata": json.dumps(settings)},
        )
        expected = {
            module: product(*pair) * alpha / 3**0.5
            for module, alpha in zip(modules, (12, 24), strict=True)
        }
        assert_updates(path, expected)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "no JSON"),
            ("[" * 100_000, "nested too deeply"),
            ("[1]", "no mapping"),
            ('{"transformer.lora_alpha": "8"}', "lora_alpha is '8'"),
            ('{"transformer.lora_alpha": NaN}', "lora_alpha is nan"),
            ('"' + "a" * 2**20 + '"', "at most 1048576"),
        ],
        ids=range(6),
    )
    def test_metadata_that_make_no_sense_are_refused(self, pair, save, refusal, text, message):
        tensors = self.tensors(pair, "transformer.x")
        assert message in refusal(save(tensors, metadata={"lora_adapter_metadata": text}))

    @pytest.mark.parametrize(
        "setting",
        [{"init_lora_weights": "pissa"}, {"use_qalora": True}],
        ids=lambda x: next(iter(x)),
    )
    def test_what_changes_the_base_is_refused(self, pair, save, refusal, setting):
        [(key, value)] = setting.items()
        metadata = described(transformer__lora_alpha=3, **{f"transformer__{key}": value})
        why = refusal(save(self.tensors(pair, "transformer.x"), metadata=metadata))
        assert why.startswith(key)

    def test_many_components_of_many_modules_are_refused(self, pair, save, refusal):
        tensors = self.tensors(pair, *(f"transformer.{place}" for place in range(700)))
        components = {f"c{place}.lora_alpha": 1 for place in range(1_500)}
        path = save(tensors, metadata={"lora_adapter_metadata": json.dumps(components)})
        assert "700 modules take 2.1e+07 steps" in refusal(path)

    def test_metadata_alone_tell_the_format(self, pair, save, scan):
        path = save(self.tensors(pair, "blocks.0.q"), metadata=described(lora_alpha=6))
        report = scan(path)
        assert (report.format, report.scales) == ("diffusers", (2,))


@pytest.mark.parametrize(
    "role", ["lora_magnitude_vector", "lora_magnitude_vector.weight", "magnitude"]
)
def test_magnitude_of_dora(pair, normal, save, scan, role):
    tensors = {
        f"unet.{BLOCK}.to_q.lora_{role}.weight": x for role, x in zip("AB", pair, strict=True)
    }
    tensors[f"unet.{BLOCK}.to_q.{role}"] = normal(5)
    assert scan(save(tensors)).side == ((f"unet.{BLOCK}.to_q:magnitude_out", 5),)


@pytest.mark.parametrize(("shape", "axis"), [((5, 1), "out"), ((1, 4), "in")])
def test_magnitude_of_dora_as_others_call_it(pair, normal, save, scan, shape, axis):
    tensors = {
        f"diffusion_model.q.lora_{role}.weight": x for role, x in zip("AB", pair, strict=True)
    }
    report = scan(save(tensors | {"diffusion_model.q.dora_scale": normal(*shape)}))
    assert report.side == ((f"transformer.q:magnitude_{axis}", max(shape)),)
    assert not report.left_out


def test_modules_and_magnitudes_are_in_the_order_of_their_names(pair, normal, save, scan):
    tensors = {}
    # Of two prefixes, so that the order of paths is another one.
    for path in ("diffusion_model.b", "transformer.a"):
        for role, factor in zip("AB", pair, strict=True):
            tensors[f"{path}.lora_{role}.weight"] = factor.clone()
        tensors[f"{path}.lora_magnitude_vector"] = normal(5)
    report = scan(save(tensors))
    names = ["transformer.a", "transformer.b"]
    assert [module.name for module in report.modules] == names
    assert report.side == tuple((f"{name}:magnitude_out", 5) for name in names)


def test_language_model_is_no_transformer_of_diffusers(pair, save, refusal):
    tensors = {f"transformer.h.0.attn.lora_{x}.weight": y for x, y in zip("AB", pair, strict=True)}
    assert "pass scale=" in refusal(save(tensors))


def test_configuration_of_peft_beside_it_has_to_agree(pair, save, scan, refusal):
    """Diffusers does not look at it."""
    tensors = {f"unet.{BLOCK}.to_q.lora_{x}.weight": y for x, y in zip("AB", pair, strict=True)}
    path = save(tensors, {"peft_type": "LORA", "lora_alpha": 6})
    assert "takes 1 for module" in refusal(path)
    assert scan(path, scale=2).scales == (2,)
    report = scan(save(tensors, {"peft_type": "LORA", "lora_alpha": 3}))
    assert (report.format, report.scales) == ("peft", (1,))


class TestConfigurationOfPEFTBesideMetadata:
    """PEFT and transformers follow it, in modules that are of no pipeline."""

    METADATA = described(unet__lora_alpha=6, model__lora_alpha=9)

    @pytest.fixture
    def tensors(self, pair):
        return {
            f"{module}.lora_{x}.weight": y.clone()
            for module in ("unet.x", "model.q")
            for x, y in zip("AB", pair, strict=True)
        }

    def test_is_compared_with_those_modules_alone(self, tensors, save, scan):
        path = save(tensors, {"peft_type": "LORA", "lora_alpha": 9}, self.METADATA)
        assert {module.path: module.scale for module in scan(path).modules} == {
            "unet.x": 2,
            "model.q": 3,
        }

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
            ({"alpha_pattern": {f"(.{{{n}}})*": 1 for n in range(30, 90)}}, "steps to match"),
        ],
    )
    def test_is_checked(self, tensors, save, refusal, settings, message, monkeypatch):
        monkeypatch.setattr(peft, "MAX_MATCHING", 10_000)
        config = {"peft_type": "LORA", "lora_alpha": 9} | settings
        assert message in refusal(save(tensors, config, self.METADATA))


@pytest.mark.parametrize("name", ["transformer.other.alpha", "transformer.my_alpha_note"])
def test_alpha_of_no_module_is_refused_where_one_has_none(pair, save, refusal, scan, name):
    """diffusers takes it for all modules of FLUX that have none, and sees "alpha" anywhere."""
    A, B = pair
    tensors = {"transformer.a.x.lora_A.weight": A, "transformer.a.x.lora_B.weight": B}
    tensors[name] = torch.tensor(1000.0)
    why = refusal(save(tensors))
    assert why.startswith(f"tensor {name!r} is the alpha of no module")
    assert "such as 'transformer.a.x': take it out" in why
    # Those of other components, and beside modules that have their own, mean nothing.
    tensors |= {"text_encoder.alpha": tensors.pop(name), "transformer.bias": torch.ones(5)}
    assert scan(save(tensors)).scales == (1,)
    tensors |= {name: torch.tensor(1000.0), "transformer.a.x.alpha": torch.tensor(6.0)}
    assert scan(save(tensors)).scales == (2,)


def test_alpha_of_no_module_is_refused_in_a_text_encoder_too(pair, save, refusal):
    tensors = {f"text_encoder.x.lora_{x}.weight": y for x, y in zip("AB", pair, strict=True)}
    why = refusal(save(tensors | {"text_encoder.other.alpha": torch.tensor(1000.0)}))
    assert "is the alpha of no module" in why


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2", "text_encoder_3"])
def test_module_of_a_text_encoder_that_settings_do_not_target_is_refused(
    pair, save, scan, refusal, component
):
    """Transformers leaves it out when it loads the file; denoisers load all that is there."""
    tensors = {
        f"{part}.layers.0.{name}.lora_{x}.weight": y.clone()
        for part, name in ((component, "q_proj"), (component, "k_proj"), ("unet", "to_q"))
        for x, y in zip("AB", pair, strict=True)
    }
    settings = {f"{component}__lora_alpha": 3, "unet__lora_alpha": 3, "unet__target_modules": ["x"]}
    targets = f"{component}__target_modules"
    path = save(tensors, metadata=described(**settings, **{targets: ["q_proj", "k_proj"]}))
    assert scan(path).scales == (1,)
    path = save(tensors, metadata=described(**settings, **{targets: ["q_proj"]}))
    assert "module 'layers.0.k_proj' is none that its configuration adapts" in refusal(path)


def test_text_encoders_that_no_pipeline_has_are_not_compared(pair, save, scan, monkeypatch):
    """Each may have a pattern that takes seconds, and there could be hundreds."""
    monkeypatch.setattr("sklora.io.formats.diffusers.check_targets", pytest.fail)
    tensors = {f"text_encoder_9.k.lora_{x}.weight": y for x, y in zip("AB", pair, strict=True)}
    settings = {"text_encoder_9__lora_alpha": 6, "text_encoder_9__target_modules": "(a?a?)+b"}
    assert scan(save(tensors, metadata=described(**settings))).scales == (2,)


@pytest.mark.parametrize(
    "settings",
    [
        *({"r": 3}, {"target_modules": ["x"]}, {"rank_pattern": {}}, {"alpha_pattern": {}}),
        {"use_rslora": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_without_alpha_are_refused(pair, save, refusal, settings):
    """PEFT's default is 8, whatever the rank."""
    tensors = {f"unet.x.lora_{x}.weight": y for x, y in zip("AB", pair, strict=True)}
    [(key, value)] = settings.items()
    why = refusal(save(tensors, metadata=described(**{f"unet__{key}": value})))
    assert "has settings of 'unet' without lora_alpha, for which PEFT takes 8" in why


def test_settings_of_dora_and_magnitudes_have_to_agree(pair, save, scan, refusal):
    tensors = {f"unet.x.lora_{x}.weight": y for x, y in zip("AB", pair, strict=True)}
    path = save(tensors, metadata=described(unet__lora_alpha=3, unet__use_dora=True))
    assert "module 'unet.x' has no magnitude" in refusal(path)
    for name, shape in (("lora_magnitude_vector", (5,)), ("dora_scale", (5, 1))):
        both = tensors | {f"unet.x.{name}": torch.ones(shape)}
        assert scan(save(both, metadata=described(unet__lora_alpha=3, unet__use_dora=True))).side
        none = described(unet__lora_alpha=3, unet__use_dora=None)
        why = refusal(save(both, metadata=none))
        assert "module 'unet.x' has a magnitude of DoRA, but its settings are of none" in why


@pytest.mark.parametrize(
    "name", ["lora_unet_x.lora_{}.weight", "base_model.model.x.lora_{}.weight"]
)
def test_settings_beside_the_keys_of_others_are_refused(pair, save, refusal, name):
    """Diffusers scales by them."""
    roles = "AB" if name.startswith("base") else ("down", "up")
    tensors = {name.format(x): y for x, y in zip(roles, pair, strict=True)}
    config = {"peft_type": "LORA", "lora_alpha": 3}
    path = save(tensors, config, metadata=described(unet__lora_alpha=3000))
    assert "its metadata entry lora_adapter_metadata is that of diffusers" in refusal(path)


@pytest.mark.usefixtures("shared_adapters")
@pytest.mark.parametrize(
    "folder", [PROCESSORS] if PROCESSORS.is_dir() else [], ids=lambda path: path.name
)
class TestRealPair:
    """Two snapshots of one training, so that shapes are the same and numbers are not."""

    def test_a_pickle_gives_what_torch_loads(self, folder, save):
        pickled = folder / "pytorch_lora_weights.bin"
        loaded = torch.load(pickled, map_location="cpu", weights_only=True)
        X = read_adapters([pickled, save(loaded)], allow_torch_zip=True)
        np.testing.assert_array_equal(*X.read())
        down, up = (
            loaded[f"{BLOCK}.processor.to_q_lora.{role}.weight"].numpy() for role in ("down", "up")
        )
        U, V = X[0][f"unet.{BLOCK}.to_q"]
        np.testing.assert_array_equal(U, up)
        np.testing.assert_array_equal(V, down.T)

    def test_both_make_one_collection(self, folder):
        names = "pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"
        X = read_adapters([folder / name for name in names], allow_torch_zip=True)
        assert X.ranks.tolist() == [[4] * 128] * 2
        assert list(X[0]) == list(X[1])

    def test_in_a_folder_the_pickle_is_passed_by(self, folder):
        [id] = read_adapters(folder).ids
        assert id.endswith(".safetensors")
