from __future__ import annotations

import numpy as np
import pytest
import sklearn
import torch
from sklearn.base import clone

from sklora.collection import LoRACollection
from sklora.estimators import MLPNetRegressor, _data
from sklora.estimators._data import (
    LoRADataset,
    TrainingData,
    iter_blocks,
    make_datasets,
    split_validation,
)

CPU = torch.device("cpu")


class TestDataset:
    @pytest.fixture
    def data(self, zoo):
        rng = np.random.default_rng(0)
        return TrainingData(zoo, rng.integers(3, size=60), rng.random((60, 1)).astype(np.float32))

    def test_a_batch_is_one_read(self, data, monkeypatch):
        reads = []
        read = LoRACollection.read
        monkeypatch.setattr(
            LoRACollection, "read", lambda X, rows=None, **_: reads.append(rows) or read(X, rows)
        )
        loader = torch.utils.data.DataLoader(
            LoRADataset(data, CPU), batch_size=16, shuffle=True, collate_fn=lambda batch: batch
        )
        batches = list(loader)
        assert [len(rows) for rows in reads] == [16, 16, 16, 12]
        for rows, (inputs, target) in zip(reads, batches, strict=True):
            np.testing.assert_array_equal(inputs["rows"], np.asarray(data.loras)[rows])
            np.testing.assert_array_equal(inputs["weight"], data.weights[rows])
            np.testing.assert_array_equal(target, data.targets[rows])

    def test_one_item_is_a_batch_of_one(self, data):
        inputs, target = LoRADataset(data, CPU)[7]
        np.testing.assert_array_equal(inputs["rows"], np.asarray(data.loras)[[7]])
        np.testing.assert_array_equal(inputs["weight"], data.weights[[7]])
        np.testing.assert_array_equal(target, data.targets[[7]])

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_rows_that_are_kept_are_read_once(self, data, dtype, monkeypatch):
        loras = LoRACollection.from_array(np.asarray(data.loras, dtype), data.loras.layout)
        data = data._replace(loras=loras, columns={"size": np.arange(60.0)})
        kept, picked = LoRADataset(data, CPU, keeps_rows=True), [7, 3, 59]
        expected = LoRADataset(data, CPU).__getitems__(picked)
        monkeypatch.delattr(LoRACollection, "read")
        torch.testing.assert_close(kept.__getitems__(picked), expected, rtol=0, atol=0)
        assert kept[7][0]["rows"].dtype == getattr(torch, np.dtype(dtype).name)

    def test_the_cpu_keeps_no_rows(self, data):
        for dataset in make_datasets(data.take(np.arange(40)), data.take(np.arange(40, 60)), CPU):
            assert dataset._rows is None
        assert make_datasets(data, None, CPU)[1] is None

    @pytest.mark.gpu
    def test_a_gpu_keeps_rows_if_they_take_no_more_than_its_share(self, data, cuda, monkeypatch):
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        parts = data.take(np.arange(40)), data.take(np.arange(40, 60))
        picked = [5, 2]
        for share, kept in ((data.loras.nbytes * 2 / free, True), (1 / free, False)):
            monkeypatch.setattr(_data, "_SHARE_OF_GPU", share)
            for part, dataset in zip(parts, make_datasets(*parts, torch.device(cuda)), strict=True):
                assert (dataset._rows is not None) == kept
                inputs, target = dataset.__getitems__(picked)
                np.testing.assert_array_equal(inputs["rows"].cpu(), part.loras.read(picked))
                np.testing.assert_array_equal(inputs["weight"].cpu(), part.weights[picked])
                np.testing.assert_array_equal(target.cpu(), part.targets[picked])

    def test_taking_rows_copies_no_weights(self, data):
        sizes = np.arange(60.0)
        part = data._replace(columns={"size": sizes}).take(np.array([3, 5]))
        assert part.loras._store is data.loras._store
        np.testing.assert_array_equal(part.targets, data.targets[[3, 5]])
        np.testing.assert_array_equal(part.columns["size"], [3, 5])
        inputs, _ = LoRADataset(part, CPU).__getitems__([1, 0])
        np.testing.assert_array_equal(inputs["size"], [5, 3])

    def test_room_is_asked_for_all_rows(self, data, monkeypatch):
        sizes = []
        monkeypatch.setattr(_data, "_has_room", lambda device, size: sizes.append(size))
        make_datasets(data.take(np.arange(40)), data.take(np.arange(40, 60)), CPU)
        make_datasets(data, None, CPU)
        assert sizes == [data.loras.nbytes] * 2

    def test_read_only_blocks_make_no_warning(self, data):
        flat = np.asarray(data.loras).copy()
        flat.flags.writeable = False
        loras = LoRACollection.from_array(flat, data.loras.layout)
        [(_, block)] = iter_blocks(loras, CPU, 1)
        np.testing.assert_array_equal(block, flat)

    def test_blocks_count_the_rows_as_the_store_has_them(self, data):
        layout = data.loras.layout
        wide = data.loras.with_layout(layout.with_ranks([2000] * layout.n_modules))
        stored = LoRACollection.from_array(wide.read(), wide.layout, ranks=data.loras.ranks)
        with sklearn.config_context(working_memory=1):
            blocks = list(iter_blocks(stored.with_layout(layout), CPU, layout.width))
        most = max(len(block) for _, block in blocks)
        assert most == 2**20 // (8 * (wide.layout.width + layout.width)) < len(data.loras)


class TestSplitValidation:
    def split(self, keys, fraction=0.2, seed=0, classes=True):
        keys = np.asarray(keys)
        return split_validation(
            keys.reshape(len(keys), -1), fraction, np.random.RandomState(seed), classes=classes
        )

    @pytest.mark.parametrize("n_rows", [30, 33, 100, 1000])
    def test_is_a_partition_of_the_wanted_size(self, n_rows):
        training, validation = self.split(np.arange(n_rows) % 2)
        np.testing.assert_array_equal(
            np.sort(np.concatenate([training, validation])), np.arange(n_rows)
        )
        assert len(validation) == max(10, round(0.2 * n_rows))

    @pytest.mark.parametrize(
        ("n_rows", "fraction", "expected"),
        [(31, 0.5, 16), (34, 0.4, 14), (35, 1 / 3, 12), (20, 0.99, 19)],
    )
    def test_a_share_that_is_rounded_up_is_held_out(self, n_rows, fraction, expected):
        _, validation = self.split(np.arange(n_rows), fraction, classes=False)
        assert len(validation) == expected

    def test_classes_keep_their_shares(self):
        labels = np.repeat([0, 1, 2], [100, 50, 10])
        _, validation = self.split(labels)
        np.testing.assert_array_equal(np.bincount(labels[validation]), [20, 10, 2])

    def test_classes_of_one_row_each_leave_none_to_validate_on(self):
        training, validation = self.split(np.arange(60))
        assert validation is None
        np.testing.assert_array_equal(training, np.arange(60))

    def test_quantiles_keep_their_shares(self):
        values = np.random.default_rng(0).normal(size=500)
        _, validation = self.split(values, classes=False)
        assert abs(values[validation].mean() - values.mean()) < 0.02
        assert abs(values[validation].std() - values.std()) < 0.05

    def test_the_first_column_sorts_first(self):
        rng = np.random.default_rng(0)
        keys = np.column_stack([rng.permutation(np.arange(400) % 4), rng.normal(size=400)])
        _, validation = self.split(keys, fraction=0.1, classes=False)
        np.testing.assert_array_equal(np.bincount(keys[validation, 0].astype(int)), [10] * 4)

    def test_label_sets_keep_their_shares(self):
        labels = np.random.default_rng(0).integers(2, size=(400, 3))
        _, validation = self.split(labels, classes=False)
        np.testing.assert_allclose(labels[validation].mean(0), labels.mean(0), atol=0.05)

    @pytest.mark.parametrize("seed", range(20))
    def test_no_class_leaves_the_training_rows(self, seed):
        labels = np.concatenate([np.zeros(60, int), np.arange(1, 20)])
        training, _ = self.split(labels, fraction=0.5, seed=seed)
        assert set(labels[training]) == set(range(20))

    @pytest.mark.parametrize("n_rows", [2, 10, 29])
    def test_few_rows_are_all_trained_on(self, n_rows):
        training, validation = self.split(np.arange(n_rows) % 2)
        np.testing.assert_array_equal(training, np.arange(n_rows))
        assert validation is None

    def test_rows_of_one_key_are_drawn_at_random(self):
        picks = [self.split(np.zeros(100, int), seed=seed)[1] for seed in range(2)]
        assert not np.array_equal(*picks)


@pytest.mark.parametrize(
    ("n_rows", "batch_size", "expected"), [(1, 64, 1), (20, 64, 5), (1000, 64, 64), (9, 2, 2)]
)
def test_batches_leave_some_steps(n_rows, batch_size, expected):
    for given in (batch_size, np.int64(batch_size)):  # as a search over an array gives it
        size = MLPNetRegressor(batch_size=given)._settings(n_rows, one_epoch=False).batch_size
        assert size == expected
        assert type(size) is int  # which torch asks for


def test_blocks_are_as_small_as_what_a_network_makes_of_them(case, zoo, quick, monkeypatch):
    model = quick(case[0]).fit(zoo, case[1])
    blocks = []

    def forward(rows):
        blocks.append(len(rows))
        return torch.zeros(len(rows), model.n_outputs_)

    monkeypatch.setattr(model, "_forward", lambda *_: forward)
    monkeypatch.setattr(model, "_entries_per_adapter", lambda layout: 2**17)
    with sklearn.config_context(working_memory=1):
        model._outputs(zoo)
    assert blocks == [1] * 60


@pytest.mark.gpu
def test_rows_that_a_gpu_keeps_change_no_weights(case, zoo, quick, cuda, same_state, monkeypatch):
    kept = quick(case[0], device=cuda, early_stopping=True).fit(zoo, case[1])
    monkeypatch.setattr(_data, "_SHARE_OF_GPU", 0.0)
    assert same_state(kept, clone(kept).fit(zoo, case[1]))


def test_blocks_leave_room_for_what_the_network_makes_of_adapters(case, zoo, quick, monkeypatch):
    model, reads, read = quick(case[0]).fit(zoo, case[1]), [], LoRACollection.read
    monkeypatch.setattr(
        LoRACollection, "read", lambda X, rows=None, **_: reads.append(rows) or read(X, rows)
    )
    monkeypatch.setattr(case[0], "_entries_per_adapter", lambda *_: 2 * 10**8)
    model.predict(zoo)
    assert len(reads) >= len(zoo)
