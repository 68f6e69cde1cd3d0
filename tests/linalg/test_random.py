import numpy as np

from sklora.linalg._random import gaussian_projections


def test_shapes_identities_and_dtype():
    shapes = [(9, 3), (2, 7), (3, 3)]
    rng = np.random.RandomState(0)
    projections = [*gaussian_projections(shapes, 3, rng, np.float32)]
    assert [(P.shape, Q.shape) for P, Q in projections] == [
        ((3, 9), (3, 3)),
        ((2, 2), (3, 7)),
        ((3, 3), (3, 3)),
    ]
    assert all(A.dtype == np.float32 for pair in projections for A in pair)
    assert all(A.flags.f_contiguous for pair in projections for A in pair)
    for matrix in (projections[0][1], projections[1][0], *projections[2]):
        np.testing.assert_array_equal(matrix, np.eye(len(matrix)))


def test_the_seed_draws_the_same_matrices_in_any_dtype():
    draws = [
        next(gaussian_projections([(9, 8)], 3, np.random.RandomState(4), dtype))
        for dtype in (np.float64, np.float64, np.float32)
    ]
    np.testing.assert_array_equal(draws[0][0], draws[1][0])
    np.testing.assert_array_equal(draws[0][1].astype(np.float32), draws[2][1])
    assert (draws[0][0][:, :8] != draws[0][1]).all()


def test_entries_have_variance_one_over_the_components():
    [(P, Q)] = gaussian_projections([(2000, 3000)], 20, np.random.RandomState(0))
    for matrix in (P, Q):
        # The standard errors are .005 and .007 of the scale.
        scaled = matrix * np.sqrt(20)
        assert abs(scaled.mean()) < 0.02
        assert abs(scaled.var() - 1) < 0.03
