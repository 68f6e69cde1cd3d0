import io
import json
import os
import zipfile
from functools import partial

import numpy as np
import pytest
import skops.io
from sklearn.decomposition import PCA
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline

import sklora
from sklora import ARCHITECTURES, TRUSTED_TYPES, make_architecture
from sklora._base import VersionWarning
from sklora._layout import LoRALayout
from sklora._saved import CARD, read_model, write_model
from sklora.io._plan import ReadOptions
from sklora.transform import UpdateKernel
from tests.stored import TARGETS, assert_same_answers, by_joblib, card_of, fitted


@pytest.fixture
def loras(rng, random_loras):
    side = [{"magnitude": rng.normal(size=3)} for _ in range(12)]
    return random_loras(rng, 12, base_model="tiny", side=side)


@pytest.fixture
def make_model(loras):
    return partial(fitted, loras)


def members_of(path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def as_node(kind, loader, module="builtins", **state):
    return {"__class__": kind, "__module__": module, "__loader__": loader, **state}


class TestRoundTrip:
    @pytest.mark.parametrize("kind", TARGETS)
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_same_predictions(self, tmp_path, make_model, loras, architecture, kind):
        model = make_model(architecture, kind)
        card = card_of(model, kind, architecture=architecture)
        write_model(tmp_path / "m.skops", model, card)
        loaded, loaded_card = read_model(tmp_path / "m.skops")
        assert loaded_card == card
        plain = skops.io.load(tmp_path / "m.skops", trusted=TRUSTED_TYPES)
        for other in (loaded, plain, by_joblib(model)):
            assert_same_answers(other, model, loras)

    def test_no_other_type_needs_trust(self, make_model):
        types = skops.io.get_untrusted_types(data=skops.io.dumps(make_model("o-align")))
        assert set(types) < set(TRUSTED_TYPES)
        assert all(name.startswith("sklora.") for name in TRUSTED_TYPES)


class TestFile:
    def test_card_is_readable_json(self, tmp_path, make_model):
        model = make_model()
        write_model(tmp_path / "m.skops", model, card_of(model))
        card = json.loads(members_of(tmp_path / "m.skops")[CARD])
        assert card["sklora"] == sklora.__version__
        assert card["classes"] == ["a", "b", "c"]
        assert card["layout"]["base_model"] == "tiny"
        assert card["reading"]["scale"] == 2.0

    def test_replaces_and_leaves_nothing_behind(self, tmp_path, make_model):
        model = make_model()
        for _ in range(2):
            write_model(tmp_path / "m.skops", model, card_of(model))
        assert os.listdir(tmp_path) == ["m.skops"]

    def test_link_stays_a_link(self, tmp_path, make_model):
        (tmp_path / "link.skops").symlink_to("m.skops")
        model = make_model()
        write_model(tmp_path / "link.skops", model, card_of(model))
        assert (tmp_path / "link.skops").is_symlink()
        assert (tmp_path / "m.skops").is_file()

    def test_device_of_another_machine(self, tmp_path, make_model, loras):
        model = make_model()
        expected = model.predict(loras)
        model.set_params(features__device="cuda:99", model__device="cuda:99")
        write_model(tmp_path / "m.skops", model, card_of(model))
        loaded, _ = read_model(tmp_path / "m.skops")
        assert loaded["features"].device == loaded["model"].device == "cuda:99"
        loaded.set_params(features__device="cpu", model__device="cpu")
        np.testing.assert_array_equal(loaded.predict(loras), expected)

    def test_other_minor_version_warns(self, tmp_path, make_model):
        model = make_model()
        write_model(tmp_path / "m.skops", model, card_of(model, sklora="0.9.1"))
        with pytest.warns(
            VersionWarning, match=r"m\.skops was stored by sklora '0\.9\.1', and this is 0\.1"
        ):
            read_model(tmp_path / "m.skops")

    def test_other_patch_does_not(self, tmp_path, make_model):
        model = make_model()
        write_model(tmp_path / "m.skops", model, card_of(model, sklora=f"{sklora.__version__}.9"))
        read_model(tmp_path / "m.skops")


class TestHostile:
    @pytest.fixture
    def good(self, tmp_path, make_model):
        model = make_model()
        write_model(tmp_path / "m.skops", model, card_of(model))
        return tmp_path / "m.skops"

    def refusal(self, path) -> str:
        with pytest.raises(ValueError, match="no model") as error:
            read_model(path)
        assert str(path) in str(error.value)
        return str(error.value)

    @pytest.mark.parametrize("data", [b"", b"PK", b"PK\x03\x04", b"nothing", b"\x80\x04K\x01."])
    def test_no_zip(self, tmp_path, data):
        (tmp_path / "m.skops").write_bytes(data)
        is_zip = data.startswith(b"PK")
        assert ("it is no zip file" in self.refusal(tmp_path / "m.skops")) != is_zip

    @pytest.mark.parametrize("name", [CARD, "schema.json"])
    def test_missing_member(self, good, name):
        members = members_of(good)
        del members[name]
        write_zip(good, members)
        assert f"it has no {name}" in self.refusal(good)

    def test_plain_skops_file(self, tmp_path, make_model):
        skops.io.dump(make_model(), tmp_path / "m.skops")
        assert CARD in self.refusal(tmp_path / "m.skops")

    def test_every_truncation(self, good):
        data = good.read_bytes()
        for size in range(0, len(data), len(data) // 40):
            good.write_bytes(data[:size])
            self.refusal(good)

    def test_missing_array(self, good):
        members = members_of(good)
        del members[next(name for name in members if name.endswith(".npy"))]
        write_zip(good, members)
        self.refusal(good)

    def test_bomb(self, good):
        write_zip(good, {**members_of(good), "x.npy": bytes(2**27)}, zipfile.ZIP_DEFLATED)
        assert good.stat().st_size < 2**21
        self.refusal(good)

    def test_compressed(self, good):
        """A hundred kilobytes could unpack to 64 MiB of JSON, and that to gigabytes of objects."""
        write_zip(good, members_of(good), zipfile.ZIP_DEFLATED)
        assert "is compressed" in self.refusal(good)

    def forge(self, path, node, **arrays):
        """Put one more attribute into the pipeline, and give the reason for the refusal."""
        members = members_of(path)
        schema = json.loads(members["schema.json"])
        schema["content"]["content"]["more"] = node
        key = {"__class__": "str", "__module__": "builtins", "__loader__": "TypeNode"}
        schema["content"]["key_types"]["content"].append(key)
        write_zip(path, {**members, **arrays, "schema.json": json.dumps(schema)})
        return self.refusal(path)

    def test_pipeline_that_lacks_an_attribute(self, good, make_model, loras):
        """Nothing but its steps is used."""
        members = members_of(good)
        schema = json.loads(members["schema.json"])
        for part in (schema["content"]["content"], schema["content"]["key_types"]["content"]):
            part.pop("verbose") if isinstance(part, dict) else part.pop()
        write_zip(good, {**members, "schema.json": json.dumps(schema)})
        loaded, _ = read_model(good)
        assert_same_answers(loaded, make_model(), loras)
        loaded[:-1].transform(loras)

    @pytest.mark.timeout(60)
    def test_lists_that_are_twice_in_the_next(self, good):
        node = as_node("list", "ListNode", content=[], __id__=1)
        for id in range(2, 60):
            inner = [node, {"__id__": id - 1}]
            node = as_node("list", "ListNode", content=inner, __id__=id)
        assert "two objects of the id" in self.forge(good, node)

    def test_member_that_skops_takes_for_another(self, good):
        """It cuts names at NUL, and takes the last of two members."""
        write_zip(good, {**members_of(good), "schema.json!": b"{}"})
        good.write_bytes(good.read_bytes().replace(b"schema.json!", b"schema.json\0"))
        assert members_of(good)["schema.json"] == b"{}"
        assert r"'schema.json\x00' has another name" in self.refusal(good)

    def test_array_that_is_read_twice(self, good):
        name = next(name for name in members_of(good) if name.endswith(".npy"))
        array = as_node("ndarray", "NdArrayNode", "numpy", type="numpy", file=name)
        assert f"names '{name}' more than once" in self.forge(good, array)

    def test_array_that_unpacks_an_archive(self, good):
        node = as_node(
            "spmatrix", "SparseMatrixNode", "scipy.sparse._matrix", type="scipy", file="s"
        )
        assert "'SparseMatrixNode'" in self.forge(good, node, s=b"")

    @pytest.mark.timeout(60)
    @pytest.mark.parametrize(
        ("step", "name", "value"),
        [
            ("model", "classes_", np.empty(2**36, "V0")),
            ("model", "classes_", np.empty((3, 2**28, 0))),
            ("features", "n_values_", np.empty(2**28, "V0")),
            ("model", "weights_", {"one": [np.empty(2**36, "V0")]}),
        ],
        ids=["texts", "lists", "counts", "weights"],
    )
    def test_arrays_without_bytes(self, tmp_path, make_model, step, name, value):
        model = make_model()
        card = card_of(model)
        setattr(model[step], name, value)
        write_model(tmp_path / "m.skops", model, card)
        assert "bytes has the shape" in self.refusal(tmp_path / "m.skops")

    @pytest.mark.timeout(60)
    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"nothing",
            b"\x93NUMPY\x03\x00\x02\x00{}",
            b"\x93NUMPY\x01\x00\x02\x00{}",
            b"\x93NUMPY\x01\x00\x10\x27" + b"-" * 9999 + b"1",
            b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
        ],
        ids=["empty", "text", "version", "no header", "deep", "long"],
    )
    def test_members_that_are_no_arrays(self, good, data):
        write_zip(good, {**members_of(good), "x.npy": data})
        assert "'x.npy' is no array (" in self.refusal(good)

    def test_arrays_of_few_items_without_bytes(self, good):
        """Such as sizes of modules where there are none."""
        data = io.BytesIO()
        np.save(data, np.empty((2**16, 0)))
        write_zip(good, {**members_of(good), "x.npy": data.getvalue()})
        read_model(good)

    @pytest.mark.timeout(60)
    def test_layout_that_names_the_last_of_many_modules_twice(self, good):
        members = members_of(good)
        card = json.loads(members[CARD])
        names = [*map(str, range(100_000)), "last", "last"]
        card["layout"]["modules"] = [[name, 1, 1, 1] for name in names]
        write_zip(good, {**members, CARD: json.dumps(card)})
        assert "'last' is named twice" in self.refusal(good)

    def test_long_name_is_not_repeated_whole(self, good):
        members = members_of(good)
        card = json.loads(members[CARD])
        card["layout"]["modules"] = [["q" * 10**5, 1, 1, 0]]
        write_zip(good, {**members, CARD: json.dumps(card)})
        assert len(self.refusal(good)) < 1000

    def test_large_card(self, good, monkeypatch):
        monkeypatch.setattr("sklora._saved._MAX_CARD", 100)
        assert "more than 100" in self.refusal(good)

    def test_card_too_large_to_write(self, tmp_path, make_model, monkeypatch):
        model = make_model()
        monkeypatch.setattr("sklora._saved._MAX_CARD", 100)
        with pytest.raises(ValueError, match="card has"):
            write_model(tmp_path / "m.skops", model, card_of(model))
        assert os.listdir(tmp_path) == []

    def test_scores_that_json_has_no_place_for(self, make_model):
        with pytest.raises(ValueError, match="not JSON"):
            card_of(make_model(), scores={"constant": np.nan}).to_json()

    @pytest.mark.parametrize(
        "changes",
        [
            {"format": "other"},
            {"sklora": 1},
            {"task": "clustering"},
            {"task": ["classification"]},
            {"targets": []},
            {"targets": "first"},
            {"targets": ["first", 1]},
            {"classes": ["a", 1, "c"]},
            {"classes": "abc"},
            {"classes": []},
            {"architecture": "cnn"},
            {"architecture": {}},
            {"probabilities": 1},
            {"layout": []},
            {"layout": {"modules": [], "side": [], "base_model": None}},
            {"layout": {"modules": [["q", 1, 1]], "side": [], "base_model": None}},
            {"layout": {"modules": [["q", 8, 6, 2]], "side": [], "base_model": 1}},
            {"optional": [1]},
            {"reading": None},
            {"reading": {}},
            {"reading": {**ReadOptions().__dict__, "names": "odd"}},
            {"reading": {**ReadOptions().__dict__, "keys": ["a", "b"]}},
            {"reading": {**ReadOptions().__dict__, "scale": "1"}},
            {"reading": {**ReadOptions().__dict__, "allow_torch_zip": 1}},
            {"reading": {**ReadOptions().__dict__, "more": 1}},
            {"n_adapters": 0},
            {"n_adapters": True},
            {"scores": 1},
        ],
        ids=str,
    )
    def test_forged_card(self, good, changes):
        members = members_of(good)
        card = {**json.loads(members[CARD]), **changes}
        write_zip(good, {**members, CARD: json.dumps(card)})
        assert "no model that sklora stored: " in self.refusal(good)

    def test_card_that_lacks_an_entry(self, good):
        members = members_of(good)
        card = json.loads(members[CARD])
        del card["scores"]
        write_zip(good, {**members, CARD: json.dumps(card)})
        assert "sklora.json has scores None" in self.refusal(good)

    def test_layout_that_is_wider_than_memory(self, tmp_path, rng, random_loras, monkeypatch):
        X = random_loras(rng, 12, shapes=[(200, 200)])
        model, available = fitted(X), 8 * X.layout.width
        write_model(tmp_path / "m.skops", model, card_of(model))
        monkeypatch.setattr("sklora._stores._CERTAIN_BYTES", 0)
        monkeypatch.setattr("sklora._stores.available_memory", lambda: available)
        read_model(tmp_path / "m.skops")
        available -= 1
        assert "its pipeline is not what" in self.refusal(tmp_path / "m.skops")

    @pytest.mark.parametrize(
        "changes",
        [
            {"classes": ["a", "b", "d"]},
            {"classes": None, "targets": ["one", "two"]},
            {"probabilities": False},
            {"layout": {"modules": [["q", 8, 6, 2]]}},
            {"layout": {"base_model": None}},
        ],
        ids=str,
    )
    def test_card_of_another_model(self, good, changes):
        members = members_of(good)
        card = json.loads(members[CARD])
        if "layout" in changes:
            changes = {"layout": {**card["layout"], **changes["layout"]}}
        card |= changes
        write_zip(good, {**members, CARD: json.dumps(card)})
        assert "its pipeline is not what" in self.refusal(good)

    def test_columns_of_one_name(self, tmp_path, make_model):
        """One of them would be lost in JSON."""
        model = make_model(kind="two numbers")
        write_model(tmp_path / "m.skops", model, card_of(model, "two numbers", targets=("a", "a")))
        assert "two columns 'a'" in self.refusal(tmp_path / "m.skops")

    def test_card_of_another_version(self, good):
        members = members_of(good)
        write_zip(good, {**members, CARD: json.dumps({**json.loads(members[CARD]), "version": 2})})
        assert "it is of format version 2, and this sklora reads version 1" in self.refusal(good)

    @pytest.mark.parametrize("text", ["", "[]", "[" * 10**5, "{", "\xff", "null"])
    def test_card_is_no_json(self, good, text):
        write_zip(good, {**members_of(good), CARD: text.encode("latin-1")})
        self.refusal(good)

    @pytest.mark.parametrize("text", ["", "[]", "[" * 10**5, "{}", "null", '{"__class__": "a"}'])
    def test_schema_is_none(self, good, text):
        write_zip(good, {**members_of(good), "schema.json": text})
        self.refusal(good)

    def test_untrusted_types(self, good):
        members = members_of(good)
        schema = members["schema.json"].replace(b'"SVDSpectrum"', b'"Popen"')
        schema = schema.replace(b'"sklora.transform.spectrum"', b'"subprocess"')
        write_zip(good, {**members, "schema.json": schema})
        message = self.refusal(good)
        assert "types that are not sklora's: 'subprocess.Popen'." in message

    def test_pipeline_of_other_steps(self, good, loras):
        other = make_pipeline(PCA(2), GaussianNB())
        other.fit(loras, np.array(["a", "b", "c"])[np.arange(12) % 3])
        self.swap(good, other)

    def test_pipeline_that_would_cache(self, good, make_model):
        self.swap(good, make_model().set_params(memory="/tmp"))

    @pytest.mark.timeout(60)
    def test_pipeline_that_would_start_many_threads(self, tmp_path, make_model):
        model = make_model().set_params(features__n_jobs=10**12)
        write_model(tmp_path / "m.skops", model, card_of(model))
        loaded, _ = read_model(tmp_path / "m.skops")
        assert loaded["features"].n_jobs is None

    @pytest.mark.parametrize("kind", ["binary", "one number", "multilabel"])
    def test_pipeline_of_other_targets(self, good, make_model, kind):
        self.swap(good, make_model(kind=kind))

    def test_features_of_no_architecture(self, good, make_model, loras):
        model = make_model().set_params(features=UpdateKernel())
        self.swap(good, model.fit(loras, np.array(["a", "b", "c"])[np.arange(12) % 3]))

    def test_pipeline_that_is_not_fitted(self, good):
        self.swap(good, make_architecture("svd"))

    @pytest.mark.parametrize("weight", ["missing", "of another shape"])
    def test_weights(self, good, make_model, weight):
        model = make_model()
        name = next(iter(model["model"].weights_))
        if weight == "missing":
            del model["model"].weights_[name]
        else:
            model["model"].weights_[name] = np.zeros((3, 3))
        self.swap(good, model)

    def test_featurizer_that_is_not_fitted(self, good, make_model):
        model = make_model()
        del model["features"].n_values_
        self.swap(good, model)

    def test_net_of_another_width(self, good, make_model):
        model = make_model()
        model["model"].layout_ = LoRALayout.rows(3)
        self.swap(good, model)

    def swap(self, path, model):
        """Put another model under the card."""
        card = members_of(path)[CARD]
        buffer = io.BytesIO()
        skops.io.dump(model, buffer)
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr(CARD, card)
        path.write_bytes(buffer.getvalue())
        assert "its pipeline is not what sklora.json says" in self.refusal(path)
