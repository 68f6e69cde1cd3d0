from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from sklora.datasets import _attributes as attributes


def drawn(text):
    """An image ``(8, 8)`` with ink where the text has a character other than a dot."""
    rows = [line.strip() for line in text.split()]
    return np.array([[character != "." for character in row] for row in rows], dtype=float)


ZERO = drawn("""
    ...##...
    ..####..
    ..#..##.
    ..#...#.
    ..#...#.
    ..#..##.
    ..####..
    ...##...
""")
ONE = drawn("""
    ...##...
    ..###...
    ...##...
    ...##...
    ...##...
    ...##...
    ...##...
    ..####..
""")
EIGHT = drawn("""
    ..####..
    ..#..#..
    ..#..#..
    ..####..
    ..#..#..
    ..#..#..
    ..#..#..
    ..####..
""")
THREE = drawn("""
    ..####..
    .....#..
    .....#..
    ..####..
    .....#..
    .....#..
    .....#..
    ..####..
""")
SLASH = drawn("""
    ......##
    ......##
    ....##..
    ....##..
    ..##....
    ..##....
    ##......
    ##......
""")


@pytest.mark.parametrize(
    ("image", "expected"), [(ZERO, 1), (ONE, 0), (EIGHT, 2), (THREE, 0), (SLASH, 0)]
)
def test_holes(image, expected):
    fine = attributes.refine(image)
    assert attributes.n_holes(fine, 0.5) == expected
    assert attributes.has_loop(fine) == (expected > 0)


def test_a_dent_at_one_level_is_no_hole():
    image = np.ones((8, 8))
    image[4, 4] = 0.85
    assert not attributes.has_loop(attributes.refine(image))
    image[4, 4] = 0.6
    assert attributes.n_holes(attributes.refine(image), 0.7) == 1
    assert not attributes.has_loop(attributes.refine(image))
    image[4, 4] = 0.1
    assert attributes.has_loop(attributes.refine(image))


def test_a_ring_that_is_faint_at_one_place_is_a_loop():
    faint = ZERO.copy()
    faint[4, 2] = 0.4
    assert attributes.has_loop(attributes.refine(faint))
    faint[4, 2] = 0.0
    assert not attributes.has_loop(attributes.refine(faint))


def test_symmetry_is_that_of_the_mirror():
    assert attributes.symmetry(EIGHT) == 1
    # It does not matter where on the page the figure stands.
    assert attributes.symmetry(np.roll(EIGHT, 2, axis=1)) == 1
    assert attributes.symmetry(THREE) < 0.8
    assert attributes.symmetry(THREE) == attributes.symmetry(THREE[:, ::-1])
    corner = np.zeros((8, 8))
    corner[:4, :4] = corner[4:, 4:] = 1
    assert attributes.symmetry(corner) == 0


@pytest.mark.parametrize("width", [1, 2, 4])
def test_thickness_is_in_pixels(width):
    bar = np.zeros((8, 8))
    bar[:, 2 : 2 + width] = 1
    assert attributes.thickness(attributes.refine(bar)) == pytest.approx(width, abs=0.5)


def test_slant_and_width():
    slant, width = attributes.slant_and_width(SLASH)
    assert slant == pytest.approx(1, abs=0.2)
    assert width == pytest.approx(1, abs=0.2)
    assert attributes.slant_and_width(SLASH[:, ::-1])[0] == pytest.approx(-slant)
    bar = np.zeros((8, 8))
    bar[:, 3:5] = 1
    assert attributes.slant_and_width(bar) == pytest.approx((0, 1 / 21**0.5))
    assert attributes.slant_and_width(bar.T) == pytest.approx((0, 21**0.5))


def test_a_description_has_a_number_for_each_attribute():
    zero, one = attributes.describe(ZERO), attributes.describe(ONE)
    assert zero.shape == one.shape == (len(attributes.ATTRIBUTES),)
    assert dict(zip(attributes.ATTRIBUTES, zero > one, strict=True)) == {
        "loop": True,
        "symmetric": zero[1] > one[1],
        "thick": False,
        "slanted": zero[3] > one[3],
        "wide": True,
    }


def test_real_digits_are_what_people_say_of_them():
    digits = load_digits()
    described = np.array([attributes.describe(image / 16) for image in digits.images[:200]])
    means = {digit: described[digits.target[:200] == digit].mean(axis=0) for digit in range(10)}
    loop, symmetric, _, slanted, wide = range(5)
    assert means[0][loop] > 0.95
    assert means[8][loop] > 0.6
    assert means[1][loop] < 0.05
    assert means[7][loop] < 0.2
    assert means[0][symmetric] > means[5][symmetric]
    assert means[7][slanted] > means[6][slanted]
    assert means[0][wide] > means[1][wide]


def test_numbers_are_those_that_zoos_are_labelled_by():
    """Where they change, RECIPES_VERSION is to be raised: a varied zoo has other labels."""
    images = load_digits().images[:200] / 16
    described = np.array([attributes.describe(image) for image in images])
    means = [0.29, 0.61688359, 2.17385258, -0.03255531, 0.53780739]
    np.testing.assert_allclose(described.mean(axis=0), means, atol=1e-7)
