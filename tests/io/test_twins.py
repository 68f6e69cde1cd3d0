"""One adapter in the forms of several trainers, in other gauges, and with modules missing."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from sklora import LoRACollection, SVDSpectrum, make_architecture
from sklora.io import read_adapters, scan_adapters
from sklora.testing import random_gauge

ALPHA = 12.0
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
LAYER = "text_model.encoder.layers.0.self_attn"
# What PEFT calls a module, and the canonical name.
UNET_AND_TEXT = {
    f"{BLOCK}.to_q": f"unet.{BLOCK}.to_q",
    f"{BLOCK}.to_out.0": f"unet.{BLOCK}.to_out.0",
    "down_blocks.0.resnets.0.conv1": "unet.down_blocks.0.resnets.0.conv1",
    f"{LAYER}.q_proj": f"text_encoder.{LAYER}.q_proj",
}
PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}


@pytest.fixture
def adapter(rng):
    """By canonical name A and B, of ranks 2 to 5, and with one kernel."""
    factors = {}
    for r, name in enumerate(UNET_AND_TEXT.values(), start=2):
        kernel = (3, 3) if "conv" in name else ()
        A = rng.normal(size=(r, 4 + r, *kernel)).astype(np.float32)
        B = rng.normal(size=(7, r, *(1 for _ in kernel))).astype(np.float32)
        factors[name] = A, B
    return factors


def updates(factors):
    """The update of every module, with alpha over its rank."""
    return {
        name: ALPHA / len(A) * flat(B).astype(np.float64) @ flat(A).astype(np.float64)
        for name, (A, B) in factors.items()
    }


def flat(array):
    return array.reshape(len(array), -1)


def written(folder, tensors, config=None, metadata=None):
    folder.mkdir(parents=True)
    path = folder / "weights.safetensors"
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors, path, metadata=metadata)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return path


def peft(folder, factors, names=UNET_AND_TEXT):
    """Ranks differ, so that the configuration gives alpha alone."""
    tensors = {}
    for path, name in names.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = factors[name][0]
        tensors[f"base_model.model.{path}.lora_B.weight"] = factors[name][1]
    return written(folder, tensors, {"peft_type": "LORA", "r": 2, "lora_alpha": ALPHA})


def diffusers(folder, factors):
    """Alpha is in the metadata and nowhere else."""
    tensors = {}
    for name, (A, B) in factors.items():
        tensors[f"{name}.lora_A.weight"] = A
        tensors[f"{name}.lora_B.weight"] = B
    settings = {f"{component}.lora_alpha": ALPHA for component in PREFIXES}
    return written(folder, tensors, metadata={"lora_adapter_metadata": json.dumps(settings)})


def old_diffusers(folder, factors):
    """Alpha is in tensors, but not of attention processors, where there were such."""
    tensors = {}
    for name, (A, B) in factors.items():
        owner, _, layer = name.rpartition(".")
        if name.startswith("text_encoder"):
            down, up = f"{name}.lora_linear_layer.down", f"{name}.lora_linear_layer.up"
        elif layer == "to_q":
            down, up = f"{owner}.processor.to_q_lora.down", f"{owner}.processor.to_q_lora.up"
        else:
            down, up = f"{name}.lora.down", f"{name}.lora.up"
        if "processor" in down:
            A = A * np.float32(ALPHA / len(A))
        else:
            tensors[f"{name}.alpha"] = np.float32(ALPHA)
        tensors |= {f"{down}.weight": A, f"{up}.weight": B}
    return written(folder, tensors)


def kohya(folder, factors):
    tensors = {}
    for name, (A, B) in factors.items():
        component, _, path = name.partition(".")
        key = f"{PREFIXES[component]}_{path.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": A, f"{key}.lora_up.weight": B}
        tensors[f"{key}.alpha"] = np.float32(ALPHA)
    return written(folder, tensors)


def mlx(folder, factors):
    """One scale for all modules, so that alpha over rank is in b; kernels are flat."""
    tensors = {}
    for path, name in UNET_AND_TEXT.items():
        A, B = map(flat, factors[name])
        tensors |= {f"{path}.lora_a": A.T, f"{path}.lora_b": B.T * np.float32(ALPHA / len(A) / 8)}
    return written(folder, tensors, {"lora_parameters": {"rank": 2, "alpha": 1, "scale": 8}})


FORMS = {
    "peft": peft,
    "diffusers": diffusers,
    "old diffusers": old_diffusers,
    "kohya": kohya,
    "mlx": mlx,
}


def assert_updates(adapter, expected):
    assert set(adapter) == set(expected)
    for name, update in expected.items():
        U, V = (factor.astype(np.float64) for factor in adapter[name])
        assert np.linalg.norm(U @ V.T - update) <= 1e-6 * np.linalg.norm(update)


def test_twins_give_the_same_updates_under_the_same_names(adapter, tmp_path):
    paths = [write(tmp_path / form, adapter) for form, write in FORMS.items()]
    X = read_adapters(paths)
    assert X.ids.tolist() == [str(path) for path in paths]
    assert set(X.layout.names) == set(UNET_AND_TEXT.values())
    for one in X:
        assert_updates(one, updates(adapter))
    formats = [report.format for report in scan_adapters(paths)]
    assert formats == ["peft", "diffusers", "diffusers", "kohya", "mlx"]


def test_twins_have_the_same_features_in_any_order(adapter, tmp_path):
    paths = [write(tmp_path / form, adapter) for form, write in FORMS.items()]
    features = SVDSpectrum().fit_transform(read_adapters(paths[::-1]))
    scale = features.max()
    assert np.ptp(features, axis=0).max() <= 1e-6 * scale


def test_a_folder_is_read_in_alphabetical_order(adapter, tmp_path):
    for form, write in FORMS.items():
        write(tmp_path / form, adapter)
    X = read_adapters(tmp_path)
    assert [id.split("/")[-2] for id in X.ids] == sorted(FORMS)


def test_transformers_of_several_trainers_meet(rng, tmp_path):
    path = "single_transformer_blocks.0.attn.to_k"
    name = f"transformer.{path}"
    A, B = rng.normal(size=(3, 6)), rng.normal(size=(5, 3))
    factors = {name: (A, B)}
    flat_name = f"lora_transformer_{path.replace('.', '_')}"
    onetrainer = {
        f"{flat_name}.lora_down.weight": A,
        f"{flat_name}.lora_up.weight": B,
        f"{flat_name}.alpha": np.float32(ALPHA),
    }
    kohya = {key.replace("lora_transformer", "lora_unet"): x for key, x in onetrainer.items()}
    aitoolkit = {
        f"{name}.lora_A.weight": A,
        f"{name}.lora_B.weight": B,
        f"{name}.alpha": np.float32(ALPHA),
    }
    X = read_adapters(
        [
            peft(tmp_path / "peft", factors, {path: name}),
            written(tmp_path / "onetrainer", onetrainer),
            written(tmp_path / "kohya", kohya),
            written(tmp_path / "aitoolkit", aitoolkit),
        ]
    )
    for adapter in X:
        assert_updates(adapter, updates(factors))


def test_flux_in_the_names_of_its_makers_meets(rng, tmp_path):
    module = "double_blocks.0.img_attn.proj"
    A, B = rng.normal(size=(3, 6)), rng.normal(size=(5, 3))
    flat_name = f"lora_unet_{module.replace('.', '_')}"
    kohya = {f"{flat_name}.lora_down.weight": A, f"{flat_name}.lora_up.weight": B}
    processor = "double_blocks.0.processor.proj_lora1"
    xlabs = {f"{processor}.down.weight": A, f"{processor}.up.weight": B}
    bfl = {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B}
    comfy = {f"diffusion_model.{key}": x for key, x in bfl.items()}
    forms = {"kohya": kohya, "xlabs": xlabs, "bfl": bfl, "comfy": comfy}
    paths = [written(tmp_path / form, tensors) for form, tensors in forms.items()]
    for adapter in read_adapters(paths, scale=1):
        assert_updates(adapter, {f"transformer.{module}": B @ A})


@pytest.mark.parametrize(
    ("dtype", "condition", "rtol"), [(np.float64, 1e4, 1e-10), (np.float32, 1e2, 1e-5)]
)
@pytest.mark.parametrize("form", ["peft", "kohya"])
def test_gauge_of_the_file_does_not_matter(adapter, tmp_path, form, dtype, condition, rtol):
    factors = {name: (A.astype(dtype), B.astype(dtype)) for name, (A, B) in adapter.items()}
    paths = [FORMS[form](tmp_path / "as it was", factors)]
    for seed in range(5):
        turned = {}
        for name, (A, B) in factors.items():
            R = random_gauge(len(A), condition=condition, random_state=seed)
            turned[name] = (
                (np.linalg.inv(R) @ flat(A)).reshape(A.shape).astype(dtype),
                (flat(B) @ R).reshape(B.shape).astype(dtype),
            )
        paths.append(FORMS[form](tmp_path / str(seed), turned))
    X = read_adapters(paths)
    assert X.dtype == dtype
    features = SVDSpectrum().fit_transform(X)
    deviation = np.abs(features - features[0]).max(axis=1)
    assert deviation.max() <= rtol * features[0].max()


class TestDifferentTargets:
    """Modules that an adapter lacks are zero updates, exactly."""

    SHAPES = (("k_proj", 6, 5), ("q_proj", 7, 5), ("v_proj", 8, 5))

    def tensors(self, rng, targets, r=2):
        tensors = {}
        for name, n, m in self.SHAPES:
            if name in targets:
                A, B = rng.normal(size=(r, m)), rng.normal(size=(n, r))
                tensors[f"base_model.model.{name}.lora_A.weight"] = A.astype(np.float32)
                tensors[f"base_model.model.{name}.lora_B.weight"] = B.astype(np.float32)
        return tensors

    def write(self, folder, tensors):
        return written(folder, tensors, {"peft_type": "LORA", "lora_alpha": 3})

    @pytest.fixture
    def paths(self, rng, tmp_path):
        """12 adapters of one to three modules, of several ranks."""
        names = [name for name, *_ in self.SHAPES]
        targets = [names[:1], names[1:2], names[:2], names[1:], names[::2], names] * 2
        return [
            self.write(tmp_path / str(n), self.tensors(rng, some, 1 + n % 3))
            for n, some in enumerate(targets)
        ]

    def test_features_are_exactly_zero_where_a_module_is_missing(self, paths):
        X = read_adapters(paths)
        assert X.layout.names == ("k_proj", "q_proj", "v_proj")
        features = SVDSpectrum().fit_transform(X).reshape(len(X), 3, 3)
        missing = X.ranks == 0
        assert missing.sum() == 14
        assert not features[missing].any()
        assert (features[~missing][:, 0] > 0).all()

    @pytest.mark.parametrize("architecture", ["svd", "dense", "gl-net"])
    def test_explicit_zeros_are_the_same(self, rng, paths, tmp_path, architecture):
        X = read_adapters(paths)
        y = np.arange(len(X)) % 2
        model = make_architecture(architecture, random_state=0, device="cpu")
        model.set_params(model__max_epochs=3).fit(X, y)
        whole = self.tensors(rng, ["q_proj"])
        k_A = rng.normal(size=(2, 5)).astype(np.float32)
        k_B = rng.normal(size=(6, 2)).astype(np.float32)
        forms = {
            "missing": {},
            "B is zero": {"A": k_A, "B": np.zeros_like(k_B)},
            "A is zero": {"A": np.zeros_like(k_A), "B": k_B},
            "both": {"A": np.zeros_like(k_A), "B": np.zeros_like(k_B)},
            "rank 3": {"A": np.zeros((3, 5), np.float32), "B": np.zeros((6, 3), np.float32)},
        }
        files = []
        for form, zeros in forms.items():
            tensors = {f"base_model.model.k_proj.lora_{x}.weight": z for x, z in zeros.items()}
            files.append(self.write(tmp_path / form, whole | tensors))
        same = read_adapters(files, layout=X.layout)
        predicted = model.predict_proba(same)
        np.testing.assert_allclose(predicted, predicted[[0]].repeat(len(files), 0), rtol=1e-5)

    def test_from_files_and_from_factors(self, paths):
        X = read_adapters(paths)
        Y = LoRACollection.from_factors(list(X), layout=X.layout)
        np.testing.assert_array_equal(X.read(), Y.read())
        np.testing.assert_array_equal(X.ranks, Y.ranks)
