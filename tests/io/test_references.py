"""PEFT and diffusers: what they save is read as what they merge, and they load what is written.

The other tests of formats know keys and scales from their author; these know nothing of either.
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from sklora.io import read_adapters, write_adapter

PREFIX = "base_model.model."
LAYERS = ["q_proj", "k_proj", "c_attn", "embed", "conv1", "conv2", "conv3", "pointwise", "head"]
LINEAR = ["q_proj", "k_proj", "head"]
# PEFT warns of what it settles by itself.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def peft():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield pytest.importorskip("peft")


class Block(nn.Module):
    def __init__(self):
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 12), nn.Linear(8, 8, bias=False)
        self.c_attn = Conv1D(12, 8)
        self.conv1, self.conv2 = nn.Conv1d(8, 6, 3), nn.Conv2d(4, 6, 3)
        self.conv3, self.pointwise = nn.Conv3d(4, 6, 2), nn.Conv2d(4, 6, 1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 10, bias=False)


def weights(model):
    return {name: p.detach().clone().double().numpy() for name, p in model.named_parameters()}


def randomise(parameters):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn_like(parameter) / 3)


def adapted(peft, config, folder):
    """Save an adapter of random numbers, and give the changes to each weight once it is merged."""
    model = peft.get_peft_model(Model(), config)
    randomise(p for p in model.parameters() if p.requires_grad)
    model.eval().save_pretrained(folder)
    return changes(model.merge_and_unload())


def changes(merged):
    before = weights(Model())
    found = {name: weight - before[name] for name, weight in weights(merged).items()}
    return {name.removesuffix(".weight"): change for name, change in found.items() if change.any()}


def assert_read(adapter, expected):
    assert {name.removeprefix(PREFIX) for name in adapter} == set(expected)
    for name, (U, V) in adapter.items():
        change = expected[name.removeprefix(PREFIX)]
        if name.endswith(("embed", "c_attn")):  # whose weights lie transposed
            change = change.T
        update = U.astype(np.float64) @ V.T.astype(np.float64)
        assert update.shape == (len(change), change[0].size)
        # PEFT adds it to weights in float32.
        bound = 1e-6 * np.abs(change).max() + 1e-7
        np.testing.assert_allclose(update, change.reshape(update.shape), rtol=0, atol=bound)


LORA = [
    {"lora_alpha": 12, "target_modules": LAYERS},
    {"lora_alpha": 12, "use_rslora": True, "target_modules": LAYERS},
    {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, "layers.1.conv2": 3, r"layers\.(0|2)\.k_proj": 5},
        "alpha_pattern": {"embed": 3, "conv1": 1, "^head": 7, r".*1\.[qk]_proj": 2},
        "target_modules": LAYERS,
    },
    {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": LINEAR, "init_lora_weights": "gaussian"},
    {"target_modules": LINEAR, "init_lora_weights": "orthogonal"},
]


@pytest.mark.parametrize("settings", LORA, ids=range(len(LORA)))
def test_lora(peft, tmp_path, settings):
    expected = adapted(peft, peft.LoraConfig(r=4, **settings), tmp_path)
    assert_read(read_adapters(tmp_path, names="raw")[0], expected)


def test_magnitude_and_direction_of_dora_make_the_merged_weight(peft, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=12, use_dora=True, target_modules=["q_proj"])
    expected = adapted(peft, config, tmp_path)
    adapter = read_adapters(tmp_path)[0]
    before = weights(Model())
    assert set(adapter) == set(expected)
    for name, (U, V) in adapter.items():
        weight = before[f"{name}.weight"]
        moved = weight + U.astype(np.float64) @ V.T
        size = adapter.side[f"{name}:magnitude_out"] / np.linalg.norm(moved, axis=1)
        np.testing.assert_allclose(size[:, None] * moved - weight, expected[name], atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 2},
        {"r": 16, "decompose_factor": 2},
        {"r": 1, "decompose_both": True, "decompose_factor": 2},
        {"r": 2, "use_effective_conv2d": True, "rank_pattern": {"q_proj": 1}},
        {"r": 16, "rank_pattern": {"0.q_proj": 8}, "alpha_pattern": {"1.q_proj": 9, "conv2": 4}},
    ],
    ids=str,
)
def test_lokr(peft, tmp_path, settings):
    layers = [*LINEAR, "conv2", "pointwise"]
    expected = adapted(peft, peft.LoKrConfig(alpha=3, target_modules=layers, **settings), tmp_path)
    assert_read(read_adapters(tmp_path, names="raw")[0], expected)


@pytest.mark.parametrize("effective", [False, True])
def test_loha(peft, tmp_path, effective):
    config = peft.LoHaConfig(
        r=2,
        alpha=3,
        use_effective_conv2d=effective,
        alpha_pattern={"layers.1.q_proj": 5},
        target_modules=[*LINEAR, "conv1", "conv2", "pointwise"],
    )
    expected = adapted(peft, config, tmp_path)
    assert_read(read_adapters(tmp_path, names="raw")[0], expected)


def test_attention_of_torch(peft, tmp_path):
    """PEFT applies the update of the output projection twice, so it is not merged here."""
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["mha"], alpha_pattern={"mha": 5})
    base = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2)})
    model = peft.get_peft_model(copy.deepcopy(base), config)
    randomise(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "old")
    layer = model.base_model.model["mha"]
    expected = {"mha": layer, "mha.base_layer.out_proj": layer.base_layer.out_proj}
    expected = {
        name: part.get_delta_weight("default").detach().double().numpy()
        for name, part in expected.items()
    }
    adapter = read_adapters(tmp_path / "old")[0]
    assert_read(adapter, expected)
    write_adapter(tmp_path / "new", adapter)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "new").base_model.model["mha"]
    again = loaded.base_layer.out_proj.get_delta_weight("default").detach().numpy()
    np.testing.assert_allclose(again, expected["mha.base_layer.out_proj"], atol=1e-6)


class Experts(nn.Module):
    def __init__(self, is_transposed):
        super().__init__()
        torch.manual_seed(0)
        self.is_transposed = is_transposed
        sizes = {"gate_up_proj": (12, 8), "down_proj": (8, 6)}
        for name, size in sizes.items():
            weight = torch.randn(3, *(size[::-1] if is_transposed else size))
            setattr(self, name, nn.Parameter(weight))


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}])
def test_experts(peft, tmp_path, is_transposed, settings):
    pytest.importorskip("peft", minversion="0.19.1")  # whose sides are the module's
    base = nn.ModuleDict({"experts": Experts(is_transposed)})
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(
        r=4, lora_alpha=3, target_modules=[], target_parameters=parameters, **settings
    )
    model = peft.get_peft_model(copy.deepcopy(base), config)
    randomise(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    before, after = weights(base), weights(model.merge_and_unload())
    adapter = read_adapters(tmp_path, names="raw")[0]
    assert len(adapter) == 6
    for name, (U, V) in adapter.items():
        update = U.astype(np.float64) @ V.T
        parameter, place = parameters[len(update) == 8], int(name.rpartition(".")[2])
        change = (after[parameter] - before[parameter])[place]
        np.testing.assert_allclose(update, change.T if is_transposed else change, atol=1e-6)


def test_adalora(peft, tmp_path):
    config = peft.AdaLoraConfig(init_r=4, total_step=9, lora_alpha=5, target_modules=LINEAR)
    expected = adapted(peft, config, tmp_path)
    assert_read(read_adapters(tmp_path, names="raw")[0], expected)


@pytest.mark.parametrize("method", ["LoraConfig", "LoKrConfig", "LoHaConfig"])
@pytest.mark.parametrize("r", [2, 16])
def test_diffusers(peft, tmp_path, method, r):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=2,
        attention_head_dim=4,
    )
    before = weights(model)
    alpha = "lora_alpha" if method == "LoraConfig" else "alpha"
    pattern = {"alpha_pattern": {"to_k": 5}}
    config = getattr(peft, method)(
        r=r, **{alpha: 3}, target_modules=["to_q", "to_k", "conv1"], **pattern
    )
    model.add_adapter(config)
    randomise(p for name, p in model.named_parameters() if ".default" in name)
    model.save_lora_adapter(tmp_path)
    model.fuse_lora()
    after = {name.replace(".base_layer", ""): weight for name, weight in weights(model).items()}
    found = {name: after[name] - weight for name, weight in before.items()}
    expected = {name.removesuffix(".weight"): x for name, x in found.items() if x.any()}
    assert_read(read_adapters(tmp_path, names="raw")[0], expected)


OLD = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def text_encoder_keys(style, alpha):
    """Tensors of both text encoders of Stable Diffusion XL, of two ranks each, in some style."""
    torch.manual_seed(1)
    tensors = {}
    for component, width in (("text_encoder", 8), ("text_encoder_2", 12)):
        for place, name in enumerate([*OLD, "fc1", "fc2"]):
            n, m = {"fc1": (2 * width, width), "fc2": (width, 2 * width)}.get(name, (width, width))
            path = f"text_model.encoder.layers.0.{'self_attn' if name in OLD else 'mlp'}."
            down, up = ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"
            prefix = f"{component}.{path}"
            if style == "oldest" and name in OLD:
                name, down, up = OLD[name], "_lora.down.weight", "_lora.up.weight"
            elif style == "peft":
                down, up = ".lora_A.weight", ".lora_B.weight"
            elif style == "kohya":
                prefix = f"lora_te{1 + (width > 8)}_{path.replace('.', '_')}"
                down, up = ".lora_down.weight", ".lora_up.weight"
                tensors[f"{prefix}{name}.alpha"] = torch.tensor(alpha)
            tensors[f"{prefix}{name}{down}"] = torch.randn(2 + place % 2, m)
            tensors[f"{prefix}{name}{up}"] = torch.randn(n, 2 + place % 2)
    return tensors


@pytest.mark.parametrize("style", ["oldest", "old", "peft", "kohya"])
def test_text_encoders_of_diffusers(peft, tmp_path, style):
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    loaders = pytest.importorskip("diffusers.loaders")
    pipe = loaders.StableDiffusionXLLoraLoaderMixin
    save_file(text_encoder_keys(style, 5.0), tmp_path / "x.safetensors")
    x, alphas, _ = pipe.lora_state_dict(
        str(tmp_path), weight_name="x.safetensors", return_lora_metadata=True
    )
    expected = {}
    for component, width in (("text_encoder", 8), ("text_encoder_2", 12)):
        config = CLIPTextConfig(
            hidden_size=width, intermediate_size=2 * width, num_attention_heads=2, vocab_size=9
        )
        config.num_hidden_layers = 1
        encoder = CLIPTextModel(config)
        pipe.load_lora_into_text_encoder(x, alphas, encoder, prefix=component)
        for name, layer in encoder.named_modules():
            if hasattr(layer, "get_delta_weight"):
                path = f"{component}.text_model.{name.removeprefix('text_model.')}"
                [adapter] = layer.active_adapters
                expected[path] = layer.get_delta_weight(adapter).detach().double().numpy()
    assert len(expected) == 12
    assert_read(read_adapters(tmp_path / "x.safetensors")[0], expected)


@pytest.mark.parametrize("like", [False, True])
@pytest.mark.parametrize("settings", LORA[1:], ids=range(1, len(LORA)))
def test_written_adapters_are_loaded(peft, tmp_path, settings, like):
    """Another update, of other ranks, of some of the modules."""
    config = peft.LoraConfig(r=4, **settings)
    adapted(peft, config, tmp_path / "old")
    kinds = None if like else ("q_proj", "k_proj", "head")
    adapter = read_adapters(tmp_path / "old", names="raw")[0]
    names = [name for name in adapter if kinds is None or name.endswith(kinds)][::2]
    rng = np.random.default_rng(0)
    new = {}
    for place, name in enumerate(names):
        (n, m), rank = (len(factor) for factor in adapter[name]), 1 + place % 3
        new[name] = rng.normal(size=(n, rank)), rng.normal(size=(m, rank))
    write_adapter(tmp_path / "new", new, like=tmp_path / "old" if like else None)
    loaded = peft.PeftModel.from_pretrained(Model(), tmp_path / "new")
    assert_read(new, changes(copy.deepcopy(loaded).merge_and_unload()))
