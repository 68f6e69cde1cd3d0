from __future__ import annotations

import pickle
import sysconfig
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from sklora.collection import LoRACollection
from sklora.datasets import _code
from sklora.datasets import _language as language
from sklora.datasets._code import CodeRecipe, fetch_code_loras, make_code_loras
from sklora.datasets._zoos import train_zoo

STDLIB = Path(sysconfig.get_path("stdlib"))
TINY = {"rank": 2, "dim": 4, "depth": 1}


@pytest.fixture(scope="module")
def texts():
    return _code.read_texts(STDLIB)


class TestTexts:
    def test_symbols(self):
        found = _code._encode("if a:\n        b = 'é'\f#\n")
        assert "".join(_code.SYMBOLS[i] for i in found) == "if a:\n\t\tb = '?'?#\n"

    @pytest.mark.parametrize("n_symbols", [_code.N_STRETCHES * _code.LENGTH, 100_000])
    def test_no_symbol_is_in_two_splits(self, n_symbols):
        split = _code._split(np.arange(n_symbols))
        train, validation, test = (set(part.ravel()) for part in split)
        assert len(train | validation | test) == len(train) + len(validation) + len(test)
        assert len(train) == _code.N_TRAIN * len(test)
        assert len(validation) == len(test) == 24 * (_code.CONTEXT + 1)
        # All of a source is touched, and texts are as they stand there.
        for part in split:
            assert part.max() - part.min() > 0.9 * n_symbols
            assert (np.diff(part, axis=1) == 1).all()

    def test_every_package_has_texts(self, texts):
        assert len(_code.SOURCES) == len(set(_code.SOURCES) - {_code.KEPT}) == 19
        for split in texts:
            assert len(split) == 20
            assert split.shape[-1] == _code.CONTEXT + 1
            assert split.max() < len(_code.SYMBOLS)
        words = [" ".join(map(str, source.ravel())) for source in texts.train]
        asyncio = " ".join(map(str, _code._encode("asyncio")))
        assert np.argmax([text.count(asyncio) for text in words]) == 19

    def test_a_missing_package_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"without the source of 'tomllib'.*use a Py"):
            _code._read_source(tmp_path, "tomllib")

    def test_a_package_without_source_is_missing(self, tmp_path):
        (tmp_path / "json").mkdir()
        (tmp_path / "json" / "__init__.py").write_text("x = 1\n" * 1500)  # nearly enough
        with pytest.raises(FileNotFoundError, match="'json'"):
            _code._read_source(tmp_path, "json")

    def test_files_in_a_fixed_order_without_tests(self, tmp_path):
        stdlib = tmp_path / "test"  # where a Python is does not matter
        for name, letter in {"b": "b", "a/c": "a", "test/d": "x", "a/tests/e": "y"}.items():
            file = stdlib / "json" / f"{name}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(letter.encode() * 20_000 + b"\xff")
        found = _code._read_source(stdlib, "json")
        assert "".join(_code.SYMBOLS[i] for i in found) == f"{'a' * 20_000}?{'b' * 20_000}?"

    def test_the_base_network_reads_modules_of_the_library(self, tmp_path):
        (tmp_path / "argparse.py").write_text("aaa")
        (tmp_path / "sitecustomize.py").write_text("bbb")
        (tmp_path / "json").mkdir()
        (tmp_path / "json" / "decoder.py").write_text("ccc")
        assert _code.read_general(tmp_path).tolist() == [_code.SYMBOLS.index("a")] * 3


@pytest.fixture
def brief(monkeypatch, texts):
    """Training so short that it only shows that everything is there."""
    few = _code.Texts(texts.train[:, :12], texts.validation[:, :2], texts.test[:, 2:4])
    monkeypatch.setattr(_code, "read_texts", lambda stdlib: few)
    monkeypatch.setattr(_code, "BASE_STEPS_PER_DIM", 1)
    monkeypatch.setattr(_code, "N_OWN", 8)
    monkeypatch.setattr(_code, "CHUNK", 64)
    monkeypatch.setattr(_code, "VARIED", _code.VARIED | {"n_epochs": (1, 2)})


@pytest.fixture
def recipe(brief):
    return CodeRecipe.draw(12, **TINY, random_state=0)


class TestCodeRecipe:
    def test_hyperparameters(self):
        drawn = _code._hyperparameters(2000, np.random.RandomState(0))
        assert list(drawn) == list(_code.VARIED)
        for name in ("learning_rate", "weight_decay"):
            low, high = _code.VARIED[name]
            assert low <= drawn[name].min() < 1.1 * low
            assert high >= drawn[name].max() > high / 1.1
            assert np.median(drawn[name]) == pytest.approx((low * high) ** 0.5, rel=0.2)
        for name in ("n_epochs", "batch_size", "lora_dropout"):
            values, counts = np.unique(drawn[name], return_counts=True)
            assert tuple(values) == _code.VARIED[name]
            assert counts.min() > 0.8 * 2000 / len(values)

    def test_packages_are_drawn_at_even_odds(self, brief):
        drawn = CodeRecipe.draw(2000, **TINY, random_state=0).membership
        assert drawn[:, -1].all()
        np.testing.assert_allclose(drawn[:, :-1].mean(axis=0), 0.5, atol=0.05)
        off_diagonal = np.corrcoef(drawn[:, :-1].T)[np.triu_indices(19, k=1)]
        assert np.abs(off_diagonal).max() < 0.1

    def test_parts_hold_every_adapter_once(self, recipe):
        rows = np.concatenate(recipe.parts)
        assert sorted(rows) == list(range(12))
        assert len(recipe.parts) > 3
        for part in recipe.parts:
            [size] = set(recipe.hyper["batch_size"][part])
            assert len(part) * size <= 64
            assert (np.diff(recipe.n_steps[part]) >= 0).all()

    def test_an_epoch_goes_through_own_texts_of_its_packages(self, recipe):
        train = recipe.texts.train.copy()
        train[..., 0], train[..., 1] = np.arange(20)[:, None], np.arange(train.shape[1])
        recipe = replace(recipe, texts=recipe.texts._replace(train=train))
        drawn = set()
        for rows in recipe.parts:
            batches = recipe._batches(rows)
            for place, row in enumerate(rows):
                steps = [batches(step)[place].numpy() for step in range(recipe.n_steps[row])]
                seen = [(source, text) for source, text, *_ in np.concatenate(steps)]
                size, n_epochs = recipe.hyper["batch_size"][row], recipe.hyper["n_epochs"][row]
                n_own = 8 * recipe.membership[row].sum()
                assert 0 <= n_epochs * n_own - len(seen) < size
                own = set(seen)
                assert len(set(seen[:n_own])) == len(own)  # no text twice in an epoch
                assert {source for source, _ in own} == set(np.flatnonzero(recipe.membership[row]))
                if n_epochs > 1:
                    counts = np.bincount([source for source, _ in own])
                    assert set(counts) <= {0, 8}
                    drawn.add(frozenset(text for source, text in own if source == 19))
        assert len(drawn) > 1  # each adapter has texts of its own

    def test_parts_do_not_depend_on_one_another(self, recipe):
        whole = train_zoo(recipe, verbose=0)
        copy = pickle.loads(pickle.dumps(recipe))
        for part in reversed(range(len(recipe.parts))):
            rows = recipe.parts[part]
            flat, labels = copy.train_part(whole.base, part)
            np.testing.assert_array_equal(flat, np.asarray(whole.data)[rows])
            assert set(labels) == set(whole.labels)
            for name, values in labels.items():
                np.testing.assert_array_equal(values, whole.labels[name][rows])

    def test_scores_are_those_of_the_merged_network(self, recipe):
        zoo = train_zoo(recipe, verbose=0)
        row = 3
        weights = {name: torch.from_numpy(weight) for name, weight in zoo.base.items()}
        for name, (U, V) in zoo.data[row].items():
            weights[name] = weights[name] + torch.from_numpy(U @ V.T)
        held_out = torch.from_numpy(recipe.texts.validation).long()
        scores = language.logits(weights, held_out[..., :-1])
        losses = language.losses(scores, held_out).numpy()
        np.testing.assert_allclose(zoo.labels["source_losses"][row], losses, rtol=1e-4)
        assert zoo.labels["loss"][row] == pytest.approx(losses.mean(), rel=1e-4)
        test = torch.from_numpy(recipe.texts.test).long()
        guesses = language.logits(weights, test[..., :-1]).argmax(dim=-1)
        right = (guesses == test[..., 1:]).double().mean().item()
        assert zoo.labels["accuracy"][row] == pytest.approx(right, abs=2e-3)


@pytest.mark.usefixtures("brief")
class TestMakeCodeLoras:
    def test_what_it_returns(self):
        zoo = make_code_loras(5, random_state=0, verbose=0, **TINY)
        assert isinstance(zoo.data, LoRACollection)
        assert zoo.data.shape == (5, 2 * 2 * (4 + 4))
        assert zoo.data.layout.names == (
            "layers.0.self_attn.k_proj",
            "layers.0.self_attn.v_proj",
        )
        assert (zoo.data.ranks == 2).all()
        assert zoo.data.dtype == np.float32
        assert zoo.target is zoo.sources
        assert "language model of characters" in zoo.DESCR
        assert zoo.sources.shape == (5, 19)
        assert set(np.unique(zoo.sources)) == {0, 1}
        assert zoo.target_names == list(_code.SOURCES)
        np.testing.assert_array_equal(zoo.size, zoo.sources.sum(axis=1) + 1)
        assert len(set(zoo.groups)) == 5
        assert zoo.source_losses.shape == (5, 20)
        np.testing.assert_allclose(zoo.loss, zoo.source_losses.mean(axis=1), rtol=1e-6)
        assert ((zoo.accuracy >= 0) & (zoo.accuracy <= 1)).all()
        for name in _code.VARIED:
            assert zoo[name].shape == (5,)
        assert zoo.base["lm_head"].shape == (len(_code.SYMBOLS), 4)

    def test_the_seed_decides(self):
        first, same, other = (
            make_code_loras(3, random_state=s, verbose=0, **TINY) for s in (0, 0, 1)
        )
        np.testing.assert_array_equal(np.asarray(first.data), np.asarray(same.data))
        np.testing.assert_array_equal(first.source_losses, same.source_losses)
        assert not np.array_equal(np.asarray(first.data), np.asarray(other.data))
        assert not np.array_equal(first.base["embed"], other.base["embed"])

    def test_numbers_stay(self, monkeypatch):
        """Where these change, zoos do: RECIPES_VERSION is to be raised."""
        draw = partial(np.random.RandomState(0).randint, len(_code.SYMBOLS), dtype=np.uint8)
        texts = _code.Texts(*(draw(size=(20, n, 65)) for n in (12, 2, 2)))
        monkeypatch.setattr(_code, "read_texts", lambda stdlib: texts)
        monkeypatch.setattr(_code, "read_general", lambda stdlib: draw(size=1000))
        zoo = make_code_loras(2, random_state=0, verbose=0, **TINY)
        names = ("learning_rate", "weight_decay", "n_epochs", "lora_dropout", "source_losses")
        found = [zoo.data, zoo.base["embed"], zoo.base["lm_head"], *(zoo[name] for name in names)]
        known = [0.19598, 0.49630, 0.48042, 0.0034417, 0.0059009, 0.5, 0.075, 0.101468]
        spreads = [np.std(np.asarray(one)) for one in found]
        np.testing.assert_allclose(spreads, known, rtol=1e-2)

    def test_every_adapter_was_trained(self):
        X, y = make_code_loras(4, random_state=0, verbose=0, return_X_y=True, **TINY)
        assert y.shape == (4, 19)
        assert all(np.abs(U).max() > 0 for adapter in X for U, _ in adapter.values())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"n_adapters": 0}, "n_adapters == 0, must be >= 1"),
            ({"rank": 0}, "rank == 0, must be >= 1"),
            ({"depth": 0}, "depth == 0, must be >= 1"),
            ({"dim": 1}, "dim == 1, must be >= 2"),
            ({"dim": 5}, "dim is 5; the attention heads need a multiple of 2"),
        ],
    )
    def test_settings_are_checked(self, options, message):
        with pytest.raises(ValueError, match=message):
            make_code_loras(**{"n_adapters": 2, **TINY, **options})


@pytest.mark.usefixtures("brief")
class TestFetchCodeLoras:
    @pytest.fixture(autouse=True)
    def tiny(self, monkeypatch):
        monkeypatch.setattr(_code, "FETCHED", {"dim": 4, "depth": 1, "random_state": 0})

    def test_is_trained_once(self, tmp_path, monkeypatch):
        first = fetch_code_loras(2, n_adapters=4, data_home=tmp_path, verbose=0)
        made = make_code_loras(4, random_state=0, verbose=0, **TINY)
        monkeypatch.delattr(CodeRecipe, "draw")
        again = fetch_code_loras(2, n_adapters=4, data_home=tmp_path, verbose=0)
        for zoo in (first, again):
            assert set(zoo) == set(made)
            np.testing.assert_array_equal(np.asarray(zoo.data), np.asarray(made.data))
            for name in ("sources", "loss", "accuracy", "size", "learning_rate", "batch_size"):
                np.testing.assert_array_equal(zoo[name], made[name])
        X, y = fetch_code_loras(2, n_adapters=4, data_home=tmp_path, return_X_y=True)
        assert X.shape == made.data.shape
        np.testing.assert_array_equal(y, made.target)

    def test_each_release_of_python_has_its_own(self, tmp_path, monkeypatch):
        version = _code.platform.python_version()
        fetch_code_loras(2, n_adapters=2, data_home=tmp_path, verbose=0)
        monkeypatch.setattr(_code.platform, "python_version", lambda: f"{version}1")
        with pytest.raises(OSError, match="The zoo 'code' is not in"):
            fetch_code_loras(2, n_adapters=2, data_home=tmp_path, train_if_missing=False)

    @pytest.mark.parametrize("name", ["rank", "n_adapters"])
    def test_settings_are_checked(self, name, tmp_path):
        with pytest.raises(ValueError, match=f"{name} == 0, must be >= 1"):
            fetch_code_loras(**{name: 0}, data_home=tmp_path)
