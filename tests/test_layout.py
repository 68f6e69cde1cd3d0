import copy
import pickle

import joblib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sklora.collection import LoRALayout, LoRAModule, ModuleGroup

sizes = st.integers(1, 4)
layouts = st.builds(
    lambda shapes, side, base_model: LoRALayout(
        [(f"m{i}", *shape) for i, shape in enumerate(shapes)],
        side=[(f"s{i}", size) for i, size in enumerate(side)],
        base_model=base_model,
    ),
    st.lists(st.tuples(sizes, sizes, sizes), min_size=1, max_size=5),
    st.lists(sizes, max_size=2),
    st.sampled_from([None, "base"]),
)
plain_layouts = st.builds(LoRALayout.rows, st.integers(1, 9))
LAYOUT = LoRALayout(
    [("q", 3, 2, 2), ("out", 2, 3, 1), ("v", 3, 2, 1)], side=[("scale", 2)], base_model="base"
)


def numbered_rows(layout, n_rows=3):
    return np.arange(1.0, n_rows * layout.width + 1).reshape(n_rows, layout.width)


class TestDescription:
    def test_attributes(self):
        assert LAYOUT.modules[0] == LoRAModule("q", 3, 2, 2)
        assert LAYOUT.names == ("q", "out", "v")
        assert LAYOUT.ranks == (2, 1, 1)
        assert LAYOUT.n_modules == 3
        assert LAYOUT.side == (("scale", 2),)
        assert LAYOUT.n_side == 2
        assert LAYOUT.base_model == "base"
        assert LAYOUT.width == (3 + 2) * 2 + (2 + 3) + (3 + 2) + 2
        assert not LAYOUT.has_plain_rows

    def test_slices_follow_one_another(self):
        assert LAYOUT.factor_slices == (
            (slice(0, 6), slice(6, 10)),
            (slice(10, 12), slice(12, 15)),
            (slice(15, 18), slice(18, 20)),
        )
        assert LAYOUT.side_slice == slice(20, 22)

    def test_groups_are_of_one_shape_in_order_of_appearance(self):
        assert LAYOUT.groups == (ModuleGroup(3, 2, 2, (0, 2)), ModuleGroup(2, 3, 1, (1,)))

    @given(layouts)
    def test_groups_partition_the_modules(self, layout):
        members = sorted(position for group in layout.groups for position in group.index)
        assert members == list(range(layout.n_modules))
        for group in layout.groups:
            modules = [layout.modules[position] for position in group.index]
            assert {(module.n, module.m) for module in modules} == {(group.n, group.m)}
            assert max(module.rank for module in modules) == group.rank

    @given(layouts)
    def test_slices_cover_every_column_once(self, layout):
        slices = [columns for pair in layout.factor_slices for columns in pair]
        columns = np.concatenate([np.arange(layout.width)[c] for c in (*slices, layout.side_slice)])
        np.testing.assert_array_equal(columns, np.arange(layout.width))

    def test_repr_is_short(self):
        assert repr(LAYOUT) == "LoRALayout(n_modules=3, width=22, n_side=2, base_model='base')"
        assert repr(LoRALayout.rows(5)) == "LoRALayout(n_modules=1, width=5, has_plain_rows=True)"

    @pytest.mark.parametrize(
        ("column", "name"),
        [(0, "module 'q'"), (9, "module 'q'"), (10, "module 'out'"), (20, "side feature 'scale'")],
    )
    def test_columns_have_names(self, column, name):
        assert LAYOUT.column_name(column) == name

    @pytest.mark.parametrize("column", [-1, 22, 30])
    def test_columns_are_counted_from_zero_to_the_width(self, column):
        with pytest.raises(IndexError, match=f"column {column} of 22"):
            LAYOUT.column_name(column)

    @given(st.one_of(layouts, plain_layouts))
    def test_every_column_has_a_name_of_its_own(self, layout):
        names = layout.feature_names()
        assert len(names) == len(set(names)) == layout.width

    def test_names_of_columns_say_where_an_entry_stands(self):
        row = dict(zip(LAYOUT.feature_names(), numbered_rows(LAYOUT, 1)[0], strict=True))
        for group, (U, V) in zip(
            LAYOUT.groups, LAYOUT.unpack(numbered_rows(LAYOUT, 1)), strict=True
        ):
            for place, module in enumerate(LAYOUT.names[position] for position in group.index):
                for letter, factor in (("U", U[0, place]), ("V", V[0, place])):
                    for (n, r), value in np.ndenumerate(factor):
                        assert row.pop(f"{module}:{letter}{n},{r}", 0) == value
        assert list(row) == ["scale:0", "scale:1"]
        layout = LoRALayout([("q", 3, 2, 2)], side=[("scale", 1)])
        assert layout.feature_names()[-1] == "scale"

    def test_names_of_plain_rows(self):
        assert LoRALayout.rows(2).feature_names() == ["row:U0,0", "row:U1,0"]

    def test_plain_rows(self):
        layout = LoRALayout.rows(5)
        assert layout.has_plain_rows
        assert layout.width == 5
        assert layout.modules == (LoRAModule("row", 5, 1, 1),)
        assert layout.factor_slices == ((slice(0, 5), slice(5, 5)),)
        assert layout.side_slice == slice(5, 5)


class TestIdentity:
    @given(st.one_of(layouts, plain_layouts))
    def test_copies_are_equal(self, layout):
        _ = layout.groups, layout.width
        for twin in (pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout)):
            assert twin == layout
            assert hash(twin) == hash(layout)
            assert twin.width == layout.width
            assert twin.has_plain_rows == layout.has_plain_rows

    def test_what_has_been_computed_does_not_show_in_the_pickle(self):
        fresh, used = copy.deepcopy(LAYOUT), copy.deepcopy(LAYOUT)
        _ = used.groups, used.names, used.factor_slices
        assert joblib.hash(fresh) == joblib.hash(used)

    def test_layouts_do_not_change(self):
        with pytest.raises(AttributeError):
            LAYOUT.base_model = "other"

    def test_plain_rows_are_not_a_module_of_the_same_shape(self):
        assert LoRALayout.rows(5) != LoRALayout([("row", 5, 1, 1)])


class TestRefusedDescriptions:
    @pytest.mark.parametrize(
        ("modules", "message"),
        [
            ([], "at least one module"),
            ([("q", 3, 2)], r"\(name, n, m, rank\), got \('q', 3, 2\)"),
            ([("k", 3, 2, 1), *[("q", 3, 2, 1)] * 2], "module 'q' is named twice"),
            ([("q", 0, 2, 1)], "the n of module 'q' must be at least 1, got 0"),
            ([("q", 3, 2, 0)], "the rank of module 'q' must be at least 1, got 0"),
        ],
    )
    def test_modules(self, modules, message):
        with pytest.raises(ValueError, match=message):
            LoRALayout(modules)

    @pytest.mark.parametrize(
        ("modules", "message"),
        [
            ([("q", 3, 2.5, 1)], "the m of module 'q' must be an integer, got 2.5"),
            ([(7, 3, 2, 1)], "the name of a module must be a string, got 7"),
        ],
    )
    def test_types(self, modules, message):
        with pytest.raises(TypeError, match=message):
            LoRALayout(modules)

    def test_side(self):
        with pytest.raises(ValueError, match=r"described by \(name, size\), got 'scale'"):
            LoRALayout([("q", 3, 2, 1)], side={"scale": 1})
        with pytest.raises(ValueError, match="side feature 's' is named twice"):
            LoRALayout([("q", 3, 2, 1)], side=[("s", 1), ("s", 1)])
        with pytest.raises(ValueError, match="size of side feature 's' must be at least 1"):
            LoRALayout([("q", 3, 2, 1)], side=[("s", 0)])


class TestPacking:
    @given(layouts)
    def test_pack_inverts_unpack(self, layout):
        flat = numbered_rows(layout)
        side = flat[:, layout.side_slice] if layout.n_side else None
        np.testing.assert_array_equal(layout.pack(layout.unpack(flat), side), flat)

    @given(plain_layouts)
    def test_plain_rows_have_v_one(self, layout):
        flat = numbered_rows(layout)
        [(U, V)] = layout.unpack(flat)
        np.testing.assert_array_equal(U[:, 0, :, 0], flat)
        np.testing.assert_array_equal(V, np.ones((3, 1, 1, 1)))
        assert layout._factors_at(flat.astype(np.float32), 0)[1].dtype == np.float32
        np.testing.assert_array_equal(layout.pack([(U, V)]), flat)

    def test_plain_rows_pack_the_update(self):
        layout = LoRALayout.rows(4)
        [(U, V)] = layout.unpack(numbered_rows(layout))
        np.testing.assert_array_equal(layout.pack([(U / 2, 2 * V)]), numbered_rows(layout))

    @given(layouts)
    def test_unpack_reads_the_documented_order(self, layout):
        flat = numbered_rows(layout)
        for group, (U, V) in zip(layout.groups, layout.unpack(flat), strict=True):
            for place, position in enumerate(group.index):
                module = layout.modules[position]
                U_columns, V_columns = layout.factor_slices[position]
                U_flat = flat[:, U_columns].reshape(-1, module.n, module.rank)
                V_flat = flat[:, V_columns].reshape(-1, module.m, module.rank)
                np.testing.assert_array_equal(U[:, place, :, : module.rank], U_flat)
                np.testing.assert_array_equal(V[:, place, :, : module.rank], V_flat)
                assert not U[:, place, :, module.rank :].any()
                assert not V[:, place, :, module.rank :].any()

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_unpack_copies_and_keeps_the_dtype(self, dtype):
        flat = numbered_rows(LAYOUT).astype(dtype)
        for U, V in LAYOUT.unpack(flat):
            assert U.dtype == V.dtype == dtype
            assert not np.shares_memory(U, flat)
        factors, side = LAYOUT.unpack(flat), np.zeros((3, 2))
        assert LAYOUT.pack(factors, side).dtype == dtype
        mixed = [(U, V.astype(np.float64)) for U, V in factors]
        assert LAYOUT.pack(mixed, side).dtype == np.float64

    def test_no_rows(self):
        flat = np.empty((0, LAYOUT.width))
        assert LAYOUT.pack(LAYOUT.unpack(flat), flat[:, :2]).shape == (0, LAYOUT.width)

    @pytest.mark.parametrize("shape", [(3, 21), (22,), (3, 22, 1)])
    def test_unpack_refuses_another_width(self, shape):
        with pytest.raises(ValueError, match=r"3 modules, has rows of width 22, .*shape \("):
            LAYOUT.unpack(np.zeros(shape))
        with pytest.raises(ValueError, match=r"3 modules, has rows of width 22, .*shape \("):
            LAYOUT.infer_ranks(np.zeros(shape))

    def test_pack_refuses_to_cut_off(self):
        layout = LAYOUT.with_ranks((2, 1, 2))
        factors = layout.unpack(numbered_rows(layout))
        for kept in (None, 0, 1):  # factors that are zero beyond the rank
            parts = [tuple(map(np.copy, pair)) for pair in factors]
            if kept is not None:
                for pair in parts:
                    pair[kept][..., 1:] = 0
            message = r"module 'v': factors of rank 2 .* layout's rank 1"
            with pytest.raises(ValueError, match=message):
                LAYOUT.pack(parts, np.zeros((3, 2)))

    def test_pack_refuses_other_shapes(self):
        factors = LAYOUT.unpack(numbered_rows(LAYOUT))
        side = np.zeros((3, 2))
        with pytest.raises(ValueError, match=r"2 pairs .* got 1"):
            LAYOUT.pack(factors[:1], side)
        U, V = factors[0]
        with pytest.raises(ValueError, match=r"V of the modules of shape \(3, 2\), .* 'q'"):
            LAYOUT.pack([(U, V[..., :1]), factors[1]], side)
        with pytest.raises(ValueError, match=r"U of the modules.* \(3, 2, 2, 2\)"):
            LAYOUT.pack([(U[:, :, :2], V), factors[1]], side)
        with pytest.raises(ValueError, match=r"V of the modules.* has shape \(3, 2, 2\), but"):
            LAYOUT.pack([(U, V[..., 0]), factors[1]], side)

    def test_pack_needs_the_side_features_there_are(self):
        factors = LAYOUT.unpack(numbered_rows(LAYOUT))
        with pytest.raises(ValueError, match=r"side features of shape \(3, 2\) .* got none"):
            LAYOUT.pack(factors)
        with pytest.raises(ValueError, match=r"got an array of shape \(3, 1\)"):
            LAYOUT.pack(factors, np.zeros((3, 1)))
        plain = LoRALayout([("q", 2, 2, 1)])
        with pytest.raises(ValueError, match=r"of shape \(3, 0\) are needed"):
            plain.pack(plain.unpack(np.ones((3, 4))), np.ones((3, 2)))


class TestRanks:
    @given(layouts, st.data())
    def test_inferred_from_trailing_zeros(self, layout, data):
        ranks = [data.draw(st.integers(0, rank)) for rank in layout.ranks]
        flat = numbered_rows(layout)
        for position, rank in enumerate(ranks):
            for factor in layout._factors_at(flat, position):
                factor[:, :, rank:] = 0
        np.testing.assert_array_equal(layout.infer_ranks(-flat), [ranks] * 3)
        assert layout.infer_ranks(flat).dtype == np.intp

    def test_a_column_counts_when_either_factor_has_it(self):
        # As in an adapter that has not been trained: one factor random, the other zero.
        layout = LoRALayout([("q", 2, 1, 2)])
        assert layout.infer_ranks(np.array([[0.0, 1, 0, -1, 0, 0]])).tolist() == [[2]]
        assert layout.infer_ranks(np.array([[0.0, 0, 0, 0, 0, -1]])).tolist() == [[2]]

    def test_a_zero_column_before_others_counts(self):
        layout = LoRALayout([("q", 1, 1, 3)])
        flat = np.array([[0.0, 1, 0, 0, 1, 0], [1, 0, 0, 1, 0, 0]])
        assert layout.infer_ranks(flat).tolist() == [[2], [1]]

    def test_plain_rows_have_rank_one_even_where_zero(self):
        assert LoRALayout.rows(3).infer_ranks(np.zeros((2, 3))).tolist() == [[1], [1]]


class TestDerived:
    def test_with_ranks(self):
        layout = LAYOUT.with_ranks((4, 4, 4))
        assert layout.ranks == (4, 4, 4)
        assert (layout.names, layout.side) == (LAYOUT.names, LAYOUT.side)
        assert layout.base_model == "base"
        assert layout.with_ranks(LAYOUT.ranks) == LAYOUT

    def test_with_shapes(self):
        layout = LAYOUT.with_shapes([(1, 2, 3)] * 3)
        assert [module[1:] for module in layout.modules] == [(1, 2, 3)] * 3
        assert (layout.names, layout.side) == (LAYOUT.names, LAYOUT.side)

    def test_plain_rows_stay_plain_as_long_as_they_are(self):
        layout = LoRALayout.rows(5)
        assert layout.with_shapes([(3, 1, 1)]) == LoRALayout.rows(3)
        assert not layout.with_ranks([2]).has_plain_rows
        assert not layout.with_shapes([(3, 2, 1)]).has_plain_rows

    def test_one_for_every_module(self):
        for number in (1, 4):
            with pytest.raises(ValueError, match=rf"3 ranks are needed, .* got {number}"):
                LAYOUT.with_ranks([2] * number)
            with pytest.raises(ValueError, match=rf"3 shapes are needed, .* got {number}"):
                LAYOUT.with_shapes([(1, 1, 1)] * number)


class TestSameModules:
    @given(layouts, st.data())
    def test_ranks_may_differ(self, layout, data):
        layout.check_same_modules(layout)
        layout.check_same_modules(layout.with_ranks(data.draw(sizes) for _ in layout.ranks))

    def test_an_unlabelled_base_model_matches_any(self):
        modules = [("q", 3, 2, 1)]
        unlabelled, labelled = LoRALayout(modules), LoRALayout(modules, base_model="a")
        unlabelled.check_same_modules(labelled)
        labelled.check_same_modules(unlabelled)

    @pytest.mark.parametrize(
        ("modules", "message"),
        [
            ([("q", 3, 2, 1)], r"module 'v' of shape \(4, 2\) is missing: .* 1 module, not 2"),
            (
                [("q", 3, 2, 1), ("v", 4, 2, 1), ("k", 1, 1, 1), ("o", 1, 1, 1)],
                r"module 'k' of shape \(1, 1\) is not expected: .* 4 modules, not 2",
            ),
            (
                [("q", 3, 2, 1), ("k", 4, 2, 1)],
                r"module 'k' of shape \(4, 2\) is where module 'v' of shape \(4, 2\) is expected",
            ),
            (
                [("q", 3, 2, 1), ("v", 4, 3, 1)],
                r"module 'v' has updates of shape \(4, 3\), but \(4, 2\) is expected",
            ),
            (
                [("v", 4, 2, 1), ("q", 3, 2, 1)],
                r"module 'v' of shape \(4, 2\) is where module 'q' of shape \(3, 2\) is expected",
            ),
        ],
    )
    def test_the_first_other_module_is_named_with_a_remedy(self, modules, message):
        expected = LoRALayout([("q", 3, 2, 1), ("v", 4, 2, 1)])
        with pytest.raises(
            ValueError, match=message + r".*read_adapters.*layout=estimator\.layout_"
        ):
            expected.check_same_modules(LoRALayout(modules))

    def test_base_models(self):
        modules = [("q", 3, 2, 1)]
        with pytest.raises(ValueError, match=r"base model 'b', but 'a' is expected.* Fit one"):
            LoRALayout(modules, base_model="a").check_same_modules(
                LoRALayout(modules, base_model="b")
            )

    def test_side_features(self):
        modules = [("q", 3, 2, 1)]
        with pytest.raises(ValueError, match=r"\[\('s', 1\)\], but \[\] are .*read files with"):
            LoRALayout(modules).check_same_modules(LoRALayout(modules, side=[("s", 1)]))
        with pytest.raises(ValueError, match=r"\[\('s', 1\)\], but \[\('s', 2\)\] are expected"):
            LoRALayout(modules, side=[("s", 2)]).check_same_modules(
                LoRALayout(modules, side=[("s", 1)])
            )

    def test_plain_rows_and_modules(self):
        with pytest.raises(ValueError, match="but plain rows of 3 features is expected"):
            LoRALayout.rows(3).check_same_modules(LoRALayout([("row", 3, 1, 1)]))
        with pytest.raises(ValueError, match=r"module 'row' has updates of shape \(4, 1\)"):
            LoRALayout.rows(3).check_same_modules(LoRALayout.rows(4))
