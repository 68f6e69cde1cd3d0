"""Adapters from the wild: every one is read, or refused for the reason that is known of it."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from sklora import DenseProduct, make_architecture
from sklora.collection import LoRALayout
from sklora.io import AdapterError, read_adapters, scan_adapters

ADAPTERS = Path(__file__).parents[3] / "shared" / "adapters"
pytestmark = pytest.mark.usefixtures("shared_adapters")
SAM_KEYS = ("w_a_{module}", "w_b_{module}")

# By folder: what the manifest calls it, how it is to be read, its format and scale here.
KNOWN = {
    "cloneofsimo": ({}, "cloneofsimo", 1),
    "cloneofsimo_history": ({"allow_torch_zip": True}, "cloneofsimo", 1),
    "sam_lora": ({"keys": SAM_KEYS}, "custom", 1),
    "wyek1n_mlx": ({}, "mlx", 10),
    "peft_gpt2_movies": ({}, "peft", 2),
    "peft_roberta_bias_all": ({}, "peft", 4),
    "peft_clip_te": ({}, "peft", 1),
    "diffusers_old_procs": ({"allow_torch_zip": True}, "diffusers", 1),
}
REFUSED = {
    "misnamed_bin_smolvla": "no adapter that sklora knows has its 606 tensors",
    "safetensors_attack": "the header of 1000 bytes runs past the end of the file",
}


def manifest(folders):
    """Entries of files in some folders, that are there."""
    path = ADAPTERS / "MANIFEST.json"
    entries = json.loads(path.read_text()) if path.is_file() else []
    return [
        pytest.param(entry, id=entry["file"])
        for entry in entries
        if entry["file"].split("/")[0] in folders and (ADAPTERS / entry["file"]).is_file()
    ]


def scan(entry, **options):
    [report] = scan_adapters(ADAPTERS / entry["file"], **options)
    return report


@pytest.mark.parametrize("entry", manifest(KNOWN))
class TestRead:
    def test_scan_agrees_with_the_manifest(self, entry):
        options, format, scale = KNOWN[entry["file"].split("/")[0]]
        report = scan(entry, **options)
        assert report.error is None
        assert (report.format, report.container) == (format, entry["container"])
        assert report.scales == (scale,)
        if "n_lowrank_modules" in entry:
            assert len(report.modules) == entry["n_lowrank_modules"]
            assert report.ranks == tuple(int(rank) for rank in entry["ranks"])
            assert report.dtypes == tuple(entry["dtypes"])
            left_out = {name for name, _ in report.left_out}
            assert len(left_out) == entry["n_tensors"] - 2 * entry["n_lowrank_modules"]
            assert left_out >= set(entry["other_keys"])

    def test_numbers_are_read(self, entry):
        options, *_ = KNOWN[entry["file"].split("/")[0]]
        X = read_adapters(ADAPTERS / entry["file"], **options)
        flat = X.read()
        assert flat.dtype == np.float32
        assert np.isfinite(flat).all()
        assert flat.any()
        report = scan(entry, **options)
        assert len(X[0]) == len(report.modules)

    def test_pickle_is_refused_by_default_with_the_remedy(self, entry):
        options, *_ = KNOWN[entry["file"].split("/")[0]]
        report = scan(entry, **{**options, "allow_torch_zip": False})
        if entry["container"] == "torch-zip":
            assert "pickle" in report.error
            assert "safetensors" in report.error
            assert "allow_torch_zip=True" in report.error
        else:
            assert report.error is None


@pytest.mark.parametrize("entry", manifest(REFUSED))
def test_refused_for_the_reason_that_is_known(entry):
    reason = REFUSED[entry["file"].split("/")[0]]
    report = scan(entry, allow_torch_zip=True)
    assert reason in report.error
    assert not report.modules
    with pytest.raises(AdapterError, match=reason):
        read_adapters(ADAPTERS / entry["file"], allow_torch_zip=True)


def test_every_file_of_the_manifest_is_known():
    folders = {
        parameter.values[0]["file"].split("/")[0] for parameter in manifest([*KNOWN, *REFUSED])
    }
    path = ADAPTERS / "MANIFEST.json"
    entries = json.loads(path.read_text()) if path.is_file() else []
    assert {entry["file"].split("/")[0] for entry in entries} == folders


@pytest.mark.parametrize("entry", manifest(["peft_roberta_bias_all"]))
def test_what_peft_saved_beside_factors_is_left_out_with_reasons(entry):
    left_out = dict(scan(entry).left_out)
    assert len(left_out) == 105
    for name, reason in left_out.items():
        if "modules_to_save" in name:
            assert reason == "a module that was saved whole"
        elif "base_layer" in name:
            assert reason == "a weight of the base model"
        elif "LayerNorm" in name:
            assert "normalisation" in reason
        elif name.endswith(".bias") and "original_module" not in name:
            assert reason == "a bias"


@pytest.mark.parametrize("entry", manifest(["peft_gpt2_movies"]))
def test_update_of_a_real_peft_file(entry):
    path = ADAPTERS / entry["file"]
    tensors = load_file(path)
    config = json.loads((path.parent / "adapter_config.json").read_text())
    X = read_adapters(path)
    assert X.layout.base_model == config["base_model_name_or_path"]
    for name, (U, V) in X[0].items():
        A, B = (
            tensors[f"base_model.model.{name}.lora_{x}.weight"].astype(np.float64) for x in "AB"
        )
        expected = config["lora_alpha"] / config["r"] * B @ A
        deviation = np.linalg.norm(U.astype(np.float64) @ V.T.astype(np.float64) - expected)
        assert deviation <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("entry", manifest(["wyek1n_mlx"]))
def test_update_of_a_real_mlx_file(entry):
    tensors = load_file(ADAPTERS / entry["file"])
    for name, (U, V) in read_adapters(ADAPTERS / entry["file"])[0].items():
        a, b = (tensors[f"{name}.lora_{x}"].astype(np.float64) for x in "ab")
        deviation = np.linalg.norm(U.astype(np.float64) @ V.T.astype(np.float64) - 10 * (a @ b).T)
        assert deviation <= 1e-6 * np.linalg.norm(10 * a @ b)


def sam(rank):
    return ADAPTERS / "sam_lora" / f"lora_rank{rank}.safetensors"


@pytest.mark.parametrize("ranks", [(2, 4, 8)] if sam(8).is_file() else [])
class TestSamFamily:
    """One model at three ranks."""

    @pytest.fixture
    def X(self, ranks):
        return read_adapters([sam(rank) for rank in ranks], keys=SAM_KEYS)

    def test_ranks_mix_in_one_collection(self, X, ranks):
        assert X.ranks.tolist() == [[rank] * 24 for rank in ranks]
        assert set(X.layout.ranks) == {8}
        for adapter, rank in zip(X, ranks, strict=True):
            tensors = load_file(sam(rank))
            for name, (U, V) in adapter.items():
                np.testing.assert_array_equal(U, tensors[f"w_b_{name}"])
                np.testing.assert_array_equal(V.T, tensors[f"w_a_{name}"])

    def test_spectrum_has_as_many_values_as_the_rank(self, X, ranks):
        features = make_architecture("svd")["features"].fit_transform(X).reshape(3, 24, 8)
        for row, rank in zip(features, ranks, strict=True):
            assert not row[:, rank:].any()
            assert row[:, :rank].all()

    @pytest.mark.parametrize("architecture", ["svd", "dense", "gl-net"])
    @pytest.mark.parametrize("task", ["classification", "regression"])
    def test_architectures_fit_and_predict(self, X, ranks, architecture, task):
        small = {}
        if architecture == "dense":
            # An update has 590,000 entries or more.
            small = {"model__hidden_dim": 4}
            layout = LoRALayout(X.layout.modules[:2])
            X = read_adapters([sam(rank) for rank in ranks], keys=SAM_KEYS, layout=layout)
        y = [0, 1, 0] if task == "classification" else [2.0, 4.0, 8.0]
        model = make_architecture(architecture, task, device="cpu", random_state=0)
        model.set_params(model__max_epochs=2, **small)
        predicted = model.fit(X, y).predict(X)
        assert predicted.shape == (3,)
        assert np.isfinite(predicted).all()

    def test_dense_features_of_all_modules(self, X, ranks):
        features = DenseProduct(device="cpu").fit_transform(X)
        assert features.shape == (3, 24 * 768 * 768)
        for row, adapter in zip(features, X, strict=True):
            U, V = adapter["000"]
            np.testing.assert_allclose(row[: 768 * 768], (U @ V.T).ravel(), rtol=1e-4, atol=1e-7)

    def test_collection_of_fewer_ranks_is_read_for_a_fitted_model(self, X, ranks):
        model = make_architecture("gl-net", device="cpu", random_state=0)
        model.set_params(model__max_epochs=2).fit(X[1:], [0, 1])
        one = read_adapters(sam(2), keys=SAM_KEYS, layout=X[1:].layout, strict=True)
        np.testing.assert_allclose(model.predict_proba(one), model.predict_proba(X[:1]), rtol=1e-5)
