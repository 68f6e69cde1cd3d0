import weakref

import numpy as np
import pytest
import sklearn

from sklora.collection import LoRACollection, LoRALayout
from sklora.linalg import compress_updates
from sklora.testing import apply_gauge, assert_gauge_equivariant, assert_gauge_invariant
from sklora.transform import DenseProduct, GLEquivariantProjection, SVDSpectrum
from sklora.transform.projection import _module_groups

METHODS = ("random", "hosvd")


@pytest.fixture
def graded(random_loras, rng):
    """Updates whose singular subspaces are well apart, so that bases can be compared."""

    def make(dtype=np.float64):
        X = random_loras(rng, 20, ((12, 10), (9, 10), (12, 10)), 3)
        flat = np.array(X)
        for position, module in enumerate(X.layout.modules):
            for columns, size in zip(
                X.layout.factor_slices[position], (module.n, module.m), strict=True
            ):
                flat[:, columns] *= np.repeat(0.7 ** np.arange(size), module.rank)
        return LoRACollection.from_array(flat.astype(dtype), X.layout)

    return make


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["X", "mixed"])
def test_updates_are_projected_from_both_sides(kind, method, request, updates):
    X = request.getfixturevalue(kind)
    projection = GLEquivariantProjection(3, method, random_state=0).fit(X)
    projected = projection.transform(X)
    assert [module[1:] for module in projected.layout.modules] == [(3, 3, 3)] * 4
    np.testing.assert_array_equal(projected.ranks, X.ranks)
    for position, name in enumerate(X.layout.names):
        P, Q = projection.left_[name], projection.right_[name]
        assert P.shape == (3, X.layout.modules[position].n)
        expected = P @ updates(X, position) @ Q.T
        np.testing.assert_allclose(updates(projected, position), expected, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dtype", "condition", "rtol"), [(np.float64, 1e4, 1e-9), (np.float32, 1e2, 1e-4)]
)
def test_is_equivariant_but_not_invariant(graded, method, dtype, condition, rtol):
    X = graded(dtype)
    projection = GLEquivariantProjection(4, method, random_state=0).fit(X)
    options = {"condition": condition, "rtol": rtol, "random_state": 1}
    assert_gauge_equivariant(projection, X, **options)
    with pytest.raises(AssertionError, match="not invariant to GL"):
        assert_gauge_invariant(projection, X, **options)


@pytest.mark.parametrize("method", METHODS)
def test_what_follows_can_be_invariant(graded, method):
    """The singular values and entries of projected updates do not depend on the gauge."""
    X = graded()
    projection = GLEquivariantProjection(4, method, random_state=0).fit(X)
    moved = apply_gauge(X, condition=1e4, random_state=1)
    for features in (SVDSpectrum(), DenseProduct()):
        expected = features.fit_transform(projection.transform(X))
        found = features.transform(projection.transform(moved))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("dtype", "condition", "atol"), [(np.float64, 1e4, 1e-9), (np.float32, 1e2, 1e-3)]
)
def test_hosvd_is_fitted_on_the_updates_whatever_their_gauge(graded, dtype, condition, atol):
    X = graded(dtype)
    moved = apply_gauge(X, condition=condition, random_state=0)
    one, two = (GLEquivariantProjection(4, "hosvd").fit(loras) for loras in (X, moved))
    for name in X.layout.names:
        np.testing.assert_allclose(one.left_[name], two.left_[name], atol=atol)
        np.testing.assert_allclose(one.right_[name], two.right_[name], atol=atol)


def test_a_basis_fitted_on_raw_factors_depends_on_the_gauge(graded):
    """The contrast to hosvd: principal directions of the columns of U."""
    X = graded()
    moved = apply_gauge(X, condition=1e2, random_state=0)

    def projector(loras):
        columns = np.hstack([adapter["m0"][0] for adapter in loras])
        basis = np.linalg.svd(columns, full_matrices=False)[0][:, :4]
        return basis @ basis.T

    def fitted(loras):
        P = GLEquivariantProjection(4, "hosvd").fit(loras).left_["m0"]
        return P.T @ P

    assert np.linalg.norm(projector(X) - projector(moved)) > 0.1
    assert np.linalg.norm(fitted(X) - fitted(moved)) < 1e-10


def test_hosvd_equals_the_dense_singular_subspaces(graded, updates):
    X = graded()
    projection = GLEquivariantProjection(4, "hosvd").fit(X)
    for position, name in enumerate(X.layout.names):
        stack = updates(X, position)
        for matrix, side in (
            (projection.left_[name], np.hstack(list(stack))),
            (projection.right_[name], np.hstack(list(stack.swapaxes(1, 2)))),
        ):
            basis = np.linalg.svd(side, full_matrices=False)[0][:, :4]
            np.testing.assert_allclose(matrix @ matrix.T, np.eye(4), atol=1e-12)
            np.testing.assert_allclose(np.abs(np.diag(matrix @ basis)), 1, atol=1e-9)
            assert (matrix[np.arange(4), np.abs(matrix).argmax(axis=1)] > 0).all()


def test_hosvd_leaves_out_directions_without_signal(random_loras, rng):
    """Updates that live in two rows: the third direction is zero, not the rounding of the gauge."""
    X = random_loras(rng, 10, ((6, 5),), 3)
    flat = np.array(X)
    flat[:, 6 : X.layout.factor_slices[0][0].stop] = 0
    flat = LoRACollection.from_array(flat, X.layout)
    for loras in (flat, apply_gauge(flat, condition=1e4, random_state=0)):
        P = GLEquivariantProjection(3, "hosvd").fit(loras).left_["m0"]
        np.testing.assert_allclose(P[:2, 2:], 0, atol=1e-12)
        np.testing.assert_allclose(np.linalg.norm(P[:2], axis=1), 1)
        assert (P[2] == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_side_with_no_more_rows_keeps_them(X, method, updates):
    projection = GLEquivariantProjection(5, method, random_state=0).fit(X)
    shapes = [module[1:3] for module in projection.transform(X).layout.modules]
    assert shapes == [(5, 4), (5, 4), (5, 4), (4, 5)]
    for matrix in (projection.right_["m0"], projection.left_["m1"]):
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(len(matrix)), atol=1e-12)
    if method == "random":
        np.testing.assert_array_equal(projection.left_["m1"], np.eye(5))


def test_random_matrices_keep_norms_on_average(random_loras, rng):
    X = random_loras(rng, 2, ((400, 300),), 1, dtype=np.float32)
    projection = GLEquivariantProjection(200, random_state=0).fit(X)
    P, Q = projection.left_["m0"], projection.right_["m0"]
    for matrix in (P, Q):
        assert matrix.dtype == X.dtype
        assert abs(matrix.mean()) < 1e-2
        assert matrix.var() == pytest.approx(1 / 200, rel=0.02)
    again = GLEquivariantProjection(200, random_state=0).fit(X)
    np.testing.assert_array_equal(again.left_["m0"], P)
    other = GLEquivariantProjection(200, random_state=1).fit(X)
    assert np.abs(other.left_["m0"] - P).max() > 0.1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [1, 2, 5, (1, 5, 2, 4)], ids=str)
def test_other_ranks_at_transform(X, random_loras, rng, updates, method, rank):
    other = random_loras(rng, 5, [module[1:3] for module in X.layout.modules], rank)
    projection = GLEquivariantProjection(3, method, random_state=0).fit(X)
    projected = projection.transform(other)
    np.testing.assert_array_equal(projected.ranks, other.ranks)
    # Lower ranks keep the width of fit, for steps that count columns.
    padded = other.with_layout(other.layout.with_ranks([9] * 4))
    for found in (projected, projection.transform(padded)):
        assert found.layout.ranks == tuple(np.maximum(other.layout.ranks, 3))
    expected = projection.left_["m2"] @ updates(other, 2) @ projection.right_["m2"].T
    np.testing.assert_allclose(updates(projected, 2), expected, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_refit_forgets_the_modules_of_the_last(X, random_loras, rng, method):
    projection = GLEquivariantProjection(3, method, random_state=0).fit(X)
    before = projection.left_, projection.right_
    projection.fit(random_loras(rng, 9, ((7, 5),), 2))
    assert projection.left_.keys() == projection.right_.keys() == {"m0"}
    assert all(set(matrices) == set(X.layout.names) for matrices in before)


def test_hosvd_of_numbers_that_cannot_be_decomposed(X):
    huge = LoRACollection.from_array(np.asarray(X) * 1e300, X.layout, ids=X.ids)
    message = "adapters 'adapter-0' to 'adapter-8' are finite, but .* overflows"
    with pytest.raises(ValueError, match=message):
        GLEquivariantProjection(3, "hosvd").fit(huge)


def test_hosvd_needs_enough_updates(X, random_loras, rng):
    message = (
        r"'m0' of shape \(6, 4\): the ranks of its 1 training updates add up to 3, fewer than "
        "the 6 directions that n_components=50 asks"
    )
    with pytest.raises(ValueError, match=message):
        GLEquivariantProjection(50, "hosvd").fit(X[:1])
    GLEquivariantProjection(3, "hosvd").fit(X[:1])
    GLEquivariantProjection(5, "random").fit(X[:1])
    lacking = random_loras(rng, 4, ((6, 4), (6, 4)), [[2, 0]] * 3 + [[2, 1]])
    with pytest.raises(ValueError, match=r"module 'm1' .* add up to 1, .*method='random'"):
        GLEquivariantProjection(2, "hosvd").fit(lacking)
    # Ranks above the shape of the update add no directions.
    thin = random_loras(rng, 2, ((6, 1),), 4)
    with pytest.raises(ValueError, match="add up to 2, fewer than the 3"):
        GLEquivariantProjection(3, "hosvd").fit(thin)


@pytest.mark.parametrize(
    ("name", "value"), [("n_components", 0), ("n_components", 2.5), ("method", "pca")]
)
def test_rejects_parameters(X, name, value):
    with pytest.raises(ValueError, match=name):
        GLEquivariantProjection(**{name: value}).fit(X)


def test_names(random_loras, rng):
    X = random_loras(rng, 3, ((4, 1),), 1)
    names = GLEquivariantProjection(2).fit(X).get_feature_names_out()
    assert names.tolist() == ["m0:U0,0", "m0:U1,0", "m0:V0,0"]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_hosvd_leaves_out_what_rounding_alone_puts_beside_a_plane(rng, dtype):
    plane = np.linalg.qr(rng.normal(size=(6, 2)))[0]
    X = LoRACollection.from_factors(
        [{"m": (plane @ rng.normal(size=(2, 3)), rng.normal(size=(5, 3)))} for _ in range(10)],
        dtype=dtype,
    )
    projection = GLEquivariantProjection(3, "hosvd").fit(X)
    P = projection.left_["m"]
    np.testing.assert_allclose(P[:2].T @ P[:2], plane @ plane.T, atol=1e-5)
    assert (P[2] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(projection.right_["m"], axis=1), 1, rtol=1e-5)


def test_hosvd_takes_the_ranks_of_each_adapter(random_loras, rng, monkeypatch):
    small, large = (list(random_loras(rng, n, [(12, 10)], r)) for n, r in ((20, 1), (2, 8)))
    X = LoRACollection.from_factors([*small[:9], {}, *large, *small[9:]])
    together = GLEquivariantProjection(4, "hosvd").fit(X)
    shapes = []

    def watched(U, V, **options):
        shapes.append(tuple(U.shape))
        return compress_updates(U, V, **options)

    monkeypatch.setattr("sklora.transform.projection.compress_updates", watched)
    monkeypatch.setattr("sklora.transform._pairs._WORTH_PARTS", 0)
    found = GLEquivariantProjection(4, "hosvd").fit(X)
    assert shapes == [(20, 12, 1), (2, 12, 8)]
    for matrices in ("left_", "right_"):
        [(_, P)] = getattr(together, matrices).items()
        [(_, Q)] = getattr(found, matrices).items()
        np.testing.assert_allclose(Q, P, atol=1e-9)


def test_hosvd_keeps_as_many_modules_in_memory_as_fit(random_loras, rng, monkeypatch):
    X = random_loras(rng, 40, ((32, 24),) * 10, 2)
    expected = GLEquivariantProjection(4, "hosvd").fit(X)
    kept = 8 * (32**2 + 24**2)  # of every module, as triangles in float64
    held, sizes = weakref.WeakValueDictionary(), []

    def watched(*args, **options):
        found = compress_updates(*args, **options)
        held.update({id(side): side for side in found[:2]})
        sizes.append(sum(side.nbytes for side in held.values()))
        return found

    monkeypatch.setattr("sklora.transform.projection.compress_updates", watched)
    with sklearn.config_context(working_memory=2 * 3.5 * kept / 2**20):
        found = GLEquivariantProjection(4, "hosvd").fit(X)
    # Three modules, and before and after the block that is added to one of them.
    assert kept < max(sizes) <= 5 * kept
    for matrices in ("left_", "right_"):
        for name, P in getattr(expected, matrices).items():
            np.testing.assert_allclose(getattr(found, matrices)[name], P, atol=1e-10)


@pytest.mark.parametrize(
    ("n_adapters", "rank", "kept"),
    [
        (100, 2, 8 * (40**2 + 10**2)),
        (3, 2, 8 * (6 * 40 + 6 * 10)),
        (2, 15, 8 * (20 * 40 + 10**2)),  # the rank of an update is no more than its columns
    ],
)
def test_modules_are_kept_in_groups_that_fit_in_the_working_memory(n_adapters, rank, kept):
    layout = LoRALayout([(f"m{i}", 40, 10, rank) for i in range(5)])
    X = LoRACollection.from_array(np.ones((n_adapters, layout.width)), layout)
    for n_modules, starts in ((2.5, [0, 2, 4]), (0.5, [0, 1, 2, 3, 4])):
        with sklearn.config_context(working_memory=n_modules * kept / 2**20):
            groups = _module_groups(X)
        assert [group.start for group in groups] == starts
        assert [group.stop for group in groups] == [*starts[1:], 5]
