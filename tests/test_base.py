import pickle

import numpy as np
import pytest
import torch

from sklora._base import as_tensor, atomic_fit, check_option, empty, resolve_device


class Estimator:
    def __init__(self, fails_with=None):
        self.fails_with = fails_with

    @atomic_fit
    def fit(self, X, y=None, *, scale=1):
        """Learn a sum."""
        self.sum_ = scale * sum(X)
        vars(self).pop("stale_", None)
        if self.fails_with is not None:
            raise self.fails_with
        return self


def test_atomic_fit_passes_arguments_and_result_through():
    estimator = Estimator()
    assert estimator.fit([1, 2], scale=3) is estimator
    assert estimator.sum_ == 9


def test_atomic_fit_keeps_name_and_docstring():
    assert Estimator.fit.__name__ == "fit"
    assert Estimator.fit.__doc__ == "Learn a sum."


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_failed_fit_leaves_a_fresh_estimator_as_it_was(error):
    estimator = Estimator(error)
    with pytest.raises(type(error)):
        estimator.fit([1, 2])
    assert vars(estimator) == {"fails_with": error}


def test_failed_fit_leaves_a_fitted_estimator_as_it_was():
    estimator = Estimator().fit([1, 2])
    estimator.stale_ = "kept"
    estimator.fails_with = ValueError("bad")
    before = dict(vars(estimator))
    with pytest.raises(ValueError, match="bad"):
        estimator.fit([5])
    assert vars(estimator) == before


def test_failing_before_any_attribute_is_set_changes_nothing():
    estimator = Estimator().fit([1, 2])
    with pytest.raises(TypeError):
        estimator.fit(None)
    assert estimator.sum_ == 3


def test_decorated_estimators_pickle():
    assert pickle.loads(pickle.dumps(Estimator().fit([1, 2]))).sum_ == 3


def test_auto_is_cuda_only_where_there_is_some(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_devices_that_exist(device):
    assert resolve_device(device) == torch.device("cpu")


@pytest.mark.parametrize("index", [None, 0, 1])
def test_cuda_devices_exist_up_to_their_count(monkeypatch, index):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    device = torch.device("cuda", index)
    if index == 1:
        with pytest.raises(ValueError, match=r"device='cuda:1' does not exist .* device='auto'"):
            resolve_device(device)
    else:
        assert resolve_device(device) == device


@pytest.mark.parametrize("device", ["abacus", "cuda:x", "", 1.5, None])
def test_what_is_no_device(device):
    with pytest.raises(ValueError, match=r"^device=.* is not a device of torch; pass 'auto'"):
        resolve_device(device)


def test_devices_without_memory_are_refused():
    with pytest.raises(ValueError, match="device='meta' does not exist"):
        resolve_device("meta")


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_tensors_of_read_only_arrays_keep_the_order_in_memory(axes):
    """Such as those of an estimator that joblib maps for its workers."""
    array = np.arange(24.0).reshape(2, 3, 4).transpose(axes)
    array.flags.writeable = False
    tensor = as_tensor(array)
    assert tensor.tolist() == array.tolist()
    assert tensor.stride() == tuple(stride // 8 for stride in array.strides)


def test_tensors_of_other_arrays_share_their_memory():
    array = np.ones(3)
    assert as_tensor(array).data_ptr() == array.ctypes.data


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_empty_tensors_are_on_their_device_whatever_torch_is_set_to(device):
    with torch.device("meta"):
        tensor = empty((2, 3), torch.float32, device)
    assert (tensor.device.type, tensor.dtype, tensor.shape) == (device, torch.float32, (2, 3))


def test_an_option_that_cannot_be_hashed():
    with pytest.raises(ValueError, match=r"^task is \['a'\]; choose one of 'a', 'b'\.$"):
        check_option("task", ["a"], {"a": 1, "b": 2})
