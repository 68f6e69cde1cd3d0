import weakref

import numpy as np
import pytest
from scipy.linalg import orthogonal_procrustes

from sklora.collection import LoRAAdapter, LoRACollection, LoRALayout
from sklora.testing import apply_gauge, assert_gauge_invariant
from sklora.transform import OAlign


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float64, 1e-9), (np.float32, 1e-4)])
def test_is_invariant_to_orthogonal_gauges(random_loras, rng, dtype, rtol):
    X = random_loras(rng, 9, rank=3, dtype=dtype)
    assert_gauge_invariant(OAlign(random_state=0), X, group="O", rtol=rtol, random_state=1)


@pytest.mark.parametrize("scale", [1e-30, 1e-23, 1e19, 1e30])
def test_weights_of_any_size_are_aligned_in_float32(X, scale):
    sized = LoRACollection.from_array((np.asarray(X) * scale).astype(np.float32), X.layout)
    assert_gauge_invariant(OAlign(template=0), sized, group="O", rtol=1e-4, random_state=1)


def test_mixed_ranks_are_invariant_to_orthogonal_gauges(mixed):
    assert_gauge_invariant(OAlign(template=0), mixed, group="O", rtol=1e-9, random_state=1)


def test_is_not_invariant_to_general_gauges(X):
    with pytest.raises(AssertionError, match="not invariant to GL"):
        assert_gauge_invariant(OAlign(template=0), X, condition=10.0, random_state=1)


def test_a_template_of_dependent_columns_leaves_the_rotation_of_others_open(X, updates):
    flat = X.read()
    for position in range(4):
        for factor in X.layout._factors_at(flat, position):
            factor[:, :, 2] = factor[:, :, 1]
    dependent = LoRACollection.from_array(flat, X.layout)
    assert_gauge_invariant(OAlign(template=0), dependent, group="O", random_state=1)
    align = OAlign(template=0).fit(dependent)
    with pytest.raises(AssertionError, match="not invariant to O"):
        assert_gauge_invariant(align, X, group="O", random_state=1)
    np.testing.assert_allclose(updates(align.transform(X), 0), updates(X, 0), atol=1e-12)


def test_a_gauge_of_the_template_alone_only_turns_the_result(X, updates):
    """Templates in another orthogonal gauge: other numbers, the same updates."""
    moved = apply_gauge(X, group="O", random_state=0)
    one, two = (OAlign(template=0).fit(loras).transform(X) for loras in (X, moved))
    assert np.abs(np.asarray(one) - np.asarray(two)).max() > 0.1
    for position in range(4):
        np.testing.assert_allclose(updates(one, position), updates(two, position), atol=1e-12)


def test_equals_scipy_and_keeps_the_updates(X, updates):
    align = OAlign(template=4).fit(X)
    aligned = align.transform(X)
    assert align.template_index_.tolist() == [4] * 4
    for name, position in (("m1", 1), ("m3", 3)):
        target = np.concatenate(align.template_[name])
        np.testing.assert_array_equal(target, np.concatenate(X[4][name]))
        for before, after in zip(X, aligned, strict=True):
            stacked = np.concatenate(before[name])
            Q, _ = orthogonal_procrustes(stacked, target)
            np.testing.assert_allclose(np.concatenate(after[name]), stacked @ Q, atol=1e-12)
        np.testing.assert_allclose(updates(aligned, position), updates(X, position), atol=1e-12)
    np.testing.assert_allclose(np.asarray(aligned)[4], np.asarray(X)[4], atol=1e-12)


def test_lower_ranks_get_the_rank_of_the_template_and_keep_their_updates(mixed, updates):
    aligned = OAlign(template=0).fit_transform(mixed)
    assert aligned.layout.ranks == (3, 3, 3, 3)
    np.testing.assert_array_equal(aligned.ranks, np.where(mixed.ranks > 0, 3, 0))
    for position in range(4):
        np.testing.assert_allclose(updates(aligned, position), updates(mixed, position), atol=1e-12)


def test_padding_does_not_mix_with_a_singular_cross_product(random_loras, rng, updates):
    """A template that is orthogonal to the adapters: alignment is arbitrary, updates are not."""
    X = random_loras(rng, 6, ((8, 8),), [[3], [2], [1], [2], [1], [2]])
    flat = np.array(X)
    U, V = (flat[:, columns].reshape(6, 8, 3) for columns in X.layout.factor_slices[0])
    U[0, :4] = V[0, :4] = U[1:, 4:] = V[1:, 4:] = 0
    orthogonal = LoRACollection.from_array(flat, X.layout)
    np.testing.assert_array_equal(orthogonal.ranks, X.ranks)
    aligned = OAlign(template=0).fit_transform(orthogonal)
    np.testing.assert_allclose(updates(aligned, 0), updates(orthogonal, 0), atol=1e-12)


def test_templates_of_different_ranks_in_modules_of_one_shape(random_loras, rng, updates):
    X = random_loras(rng, 6, ((6, 4), (6, 4)), [[1, 3]] * 6)
    aligned = OAlign(template=2).fit_transform(X)
    assert aligned.layout.ranks == (1, 3)
    for position in range(2):
        np.testing.assert_allclose(updates(aligned, position), updates(X, position), atol=1e-12)


def test_modules_of_one_shape_of_which_each_has_a_rank_of_its_own(random_loras, rng, updates):
    X = random_loras(rng, 6, ((6, 4), (6, 4)), [[2, 2]] + [[1, 2]] * 5)
    aligned = OAlign(template=0).fit(X).transform(X[1:])
    for position in range(2):
        np.testing.assert_allclose(updates(aligned, position), updates(X[1:], position), atol=1e-12)


def test_an_adapter_of_lower_rank_as_template_lowers_the_layout(random_loras, rng):
    X = random_loras(rng, 4, ((6, 4),), [[3], [2], [2], [1]])
    align = OAlign(template=1).fit(X[1:][[0, 0, 1, 2]])
    assert align.transform(X[1:]).layout.ranks == (2,)
    with pytest.raises(ValueError, match=r"'m0' of adapter 0 has rank 3, with U \(6, 3\).*rank 2"):
        align.transform(X)
    with pytest.raises(ValueError, match=r"'m0' of adapter 0 .*\(svd, dense, gl-net\)"):
        OAlign(template=1).fit(X)


def test_random_template_has_the_largest_rank_everywhere(random_loras, rng):
    ranks = [[3, 2], [2, 2], [3, 1], [3, 2], [1, 2]]
    X = random_loras(rng, 5, ((6, 4), (5, 4)), ranks)
    drawn = set()
    for seed in range(30):
        first, second = OAlign(random_state=seed).fit(X).template_index_.tolist()
        assert first == second
        drawn.add(first)
    assert drawn == {0, 3}


def test_every_module_draws_its_template_where_adapters_lack_different_ones(
    random_loras, rng, updates
):
    X = random_loras(rng, 4, ((6, 4), (5, 4)), [[2, 0], [2, 0], [0, 2], [0, 2]])
    drawn = {tuple(OAlign(random_state=n).fit(X).template_index_.tolist()) for n in range(30)}
    assert drawn == {(0, 2), (0, 3), (1, 2), (1, 3)}
    align = OAlign(random_state=0).fit(X)
    # Kept without the rows that they are from.
    assert all(factor.base is None for pair in align.template_.values() for factor in pair)
    aligned = align.transform(X)
    np.testing.assert_array_equal(aligned.ranks, X.ranks)
    for position in range(2):
        np.testing.assert_allclose(updates(aligned, position), updates(X, position), atol=1e-12)


def test_templates_of_many_adapters_are_read_one_after_the_other(rng, monkeypatch):
    factors = [
        {f"m{m}": (rng.normal(size=(5, 2)), rng.normal(size=(4, 2))) for m in range(9) if m != n}
        for n in range(9)
    ]
    X = LoRACollection.from_factors(factors)
    held, most = weakref.WeakSet(), []

    class Noted(LoRAAdapter):
        __hash__ = object.__hash__

        def __init__(self, *args):
            super().__init__(*args)
            held.add(self)
            most.append(len(held))

    monkeypatch.setattr("sklora._loras.LoRAAdapter", Noted)
    align = OAlign(random_state=0).fit(X)
    assert len(most) == len(set(align.template_index_)) > 2
    assert max(most) <= 2
    assert list(align.template_) == list(X.layout.names)
    for (name, template), row in zip(align.template_.items(), align.template_index_, strict=True):
        for factor, given in zip(template, factors[row][name], strict=True):
            np.testing.assert_array_equal(factor, given)


def test_a_template_without_a_module_refuses_adapters_that_have_it(random_loras, rng):
    X = random_loras(rng, 4, ((6, 4), (5, 4)), [[2, 0], [2, 0], [2, 1], [2, 1]], ids=list("abcd"))
    align = OAlign(template=0).fit(X[:2])
    np.testing.assert_array_equal(align.transform(X[:2]).ranks, X.ranks[:2])
    with pytest.raises(ValueError, match=r"'m1' of adapter 'c' has rank 1.*template has rank 0"):
        align.transform(X)


def test_adapters_without_the_modules_of_templates_of_different_ranks(random_loras, rng):
    layout = LoRALayout([("m0", 6, 4, 1), ("m1", 6, 4, 1)])
    X = random_loras(rng, 3, ((6, 4), (6, 4)), [[1, 0], [0, 0], [0, 0]], layout=layout)
    aligned = OAlign(template=0).fit(X).transform(X[1:])
    assert not aligned.ranks.any()
    assert not aligned.read().any()


def test_the_template_is_part_of_the_fitted_state(X):
    align = OAlign(template=0).fit(X[:5])
    expected = np.asarray(align.transform(X))[7]
    np.testing.assert_allclose(np.asarray(align.transform(X[7:]))[0], expected, atol=1e-13)


def test_same_random_state_same_template(X):
    one, two = (OAlign(random_state=3).fit(X) for _ in range(2))
    np.testing.assert_array_equal(one.template_index_, two.template_index_)


@pytest.mark.parametrize("template", [9, -1, 1.5, "first"])
def test_rejects_template(X, template):
    with pytest.raises(ValueError, match="template"):
        OAlign(template=template).fit(X)


def test_rejects_a_template_by_its_number_and_theirs(X):
    with pytest.raises(ValueError, match="template=12, but there are 9 adapters"):
        OAlign(template=12).fit(X)


def test_names(random_loras, rng):
    X = random_loras(rng, 3, ((2, 1),), 2)
    names = OAlign(template=0).fit(X).get_feature_names_out()
    assert names.tolist() == ["m0:U0,0", "m0:U0,1", "m0:U1,0", "m0:U1,1", "m0:V0,0", "m0:V0,1"]
