"""Stacked matrices, each a module of its own."""

import pytest
import torch

from sklora.io import read_adapters
from sklora.io.containers.safetensors import SafetensorsFile
from tests.io.formats.peft import LORA, PREFIX, linear, named

UNSLOTH = {"unsloth_fixed": True}


def told(layout):
    return {"unsloth_fused_expert_lora": {"lora_B_layout": layout}}


class TestExperts:
    CONFIG = LORA | {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}

    @pytest.mark.parametrize("alpha", [6, -6])
    def test_every_expert_is_a_module(self, normal, save, assert_updates, scan, alpha):
        n_experts, r = 4, 3
        stacks = {
            "layers.0.mlp.experts": (normal(r * n_experts, 6), normal(5, r * n_experts)),
            "layers.0.mlp.experts.base_layer": (normal(r * n_experts, 7), normal(8, r * n_experts)),
        }
        A, B = normal(r, 4), normal(5, r)
        tensors, expected = linear("layers.0.q", A, B), {}
        expected[PREFIX + "layers.0.q"] = B.double() @ A.double() * alpha / r
        for module, (stack_a, stack_b) in stacks.items():
            tensors |= linear(module, stack_a, stack_b)
            for e in range(n_experts):
                A_e = stack_a.double()[e * r : (e + 1) * r]
                update = stack_b.double()[:, e::n_experts] @ A_e
                expected[f"{PREFIX}{module}.{e}"] = update * alpha / r
        path = save(tensors, self.CONFIG | {"lora_alpha": alpha})
        assert_updates(path, expected)
        assert scan(path).ranks == (3,)

    def test_rank_and_alpha_may_be_those_of_patterns(self, normal, save, assert_updates):
        A, B = normal(4, 6), normal(5, 4)
        config = self.CONFIG | {
            "rank_pattern": {"experts": 1, "experts.(gate_up|down)_proj": 2},
            "alpha_pattern": {"mlp.experts": 1, r"(\w+)_proj": 5},
            "use_rslora": True,
        }
        path = save(linear("mlp.experts", A, B), config)
        expected = {
            f"{PREFIX}mlp.experts.{e}": B.double()[:, e::2] @ A.double()[2 * e :][:2] * 5 / 2**0.5
            for e in range(2)
        }
        assert_updates(path, expected)

    @pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
    def test_patterns_that_tell_parameters_of_a_module_apart_are_refused(
        self, normal, save, refusal, setting
    ):
        """The file does not say which of them its tensors are of."""
        path = save(
            linear("mlp.experts", normal(6, 6), normal(5, 6)),
            self.CONFIG | {setting: {"down_proj": 2}},
        )
        assert "down_proj', 'gate_up_proj' of module 'mlp.experts'" in refusal(path)

    def test_parameters_of_unequal_ranks_are_told_apart_by_the_number_of_experts(
        self, normal, save, assert_updates
    ):
        """PEFT gives the fused "gate_up_proj" twice the rank where transformers fuses it."""
        config = LORA | {
            "target_parameters": ["gate.weight", "gate_up_proj", "down_proj"],
            "rank_pattern": {r".*\.gate_up_proj": 6},
            "alpha_pattern": {r".*\.gate_up_proj": 5},
        }
        stacks = {"mlp.experts": 3, "mlp.experts.base_layer": 6}
        A, B = normal(3, 4), normal(5, 3)
        tensors, expected = linear("mlp.gate", A, B), {}
        expected[PREFIX + "mlp.gate.0"] = B.double() @ A.double() * 2
        for (module, r), scale in zip(stacks.items(), (2, 5 / 6), strict=True):
            A, B = normal(4 * r, 7), normal(8, 4 * r)
            tensors |= linear(module, A, B)
            for e in range(4):
                update = B.double()[:, e::4] @ A.double()[e * r :][:r]
                expected[f"{PREFIX}{module}.{e}"] = update * scale
        assert_updates(save(tensors, config), expected)

    @pytest.mark.parametrize(
        ("columns", "ranks"),
        [((6, 6), (3, 6)), ((12, 24), (2, 6)), ((12,), (3, 6)), ((6, 3), (0, 3)), ((5, 7), (2, 4))],
    )
    def test_ranks_that_fit_in_no_one_way_are_refused(self, normal, save, refusal, columns, ranks):
        tensors = {}
        for depth, n_columns in enumerate(columns):
            module = "mlp.experts" + ".base_layer" * depth
            tensors |= linear(module, normal(n_columns, 6), normal(5, n_columns))
        patterns = dict(zip(("gate_up_proj", "down_proj"), ranks, strict=True))
        why = refusal(save(tensors, self.CONFIG | {"rank_pattern": patterns}))
        assert "of module 'mlp.experts' apart" in why

    @pytest.mark.parametrize("use_rslora", [False, True])
    def test_ranks_tell_parameters_of_a_module_apart(
        self, normal, save, assert_updates, use_rslora
    ):
        """As PEFT converts old adapters of Mixtral: the fused parameter has twice the rank."""
        stacks = {
            "mlp.experts": (2, 6, normal(6, 6), normal(5, 6)),
            "mlp.experts.base_layer": (4, 12, normal(12, 5), normal(7, 12)),
        }
        tensors, expected = {}, {}
        for module, (r, alpha, A, B) in stacks.items():
            tensors |= linear(module, A, B)
            scale = alpha / (r**0.5 if use_rslora else r)
            for e in range(3):
                update = B.double()[:, e::3] @ A.double()[e * r : (e + 1) * r]
                expected[f"{PREFIX}{module}.{e}"] = scale * update
        config = {
            "r": 2,
            "lora_alpha": 6,
            "rank_pattern": {r".*\.gate_up_proj": 4},
            "alpha_pattern": {r".*\.gate_up_proj": 12},
            "target_parameters": ["down_proj", "gate_up_proj"],
            "use_rslora": use_rslora,
        }
        assert_updates(save(tensors, self.CONFIG | config), expected)

    def test_many_targets_of_many_modules_are_refused(self, normal, save, refusal):
        tensors = {}
        for place in range(300):
            tensors |= linear(f"{place}", normal(1, 2), normal(2, 1))
        targets = [f"{place}.w" for place in range(3_500)]
        why = refusal(save(tensors, LORA | {"target_parameters": targets}))
        assert "300 modules" in why
        assert "2.1e+07 steps" in why

    def test_long_targets_are_refused(self, normal, save, refusal):
        """They are part of the names that patterns are matched with."""
        config = {"target_parameters": [f"q.{'x' * 10**5}", "q.y"], "rank_pattern": {"x*" * 300: 1}}
        why = refusal(save(linear("q", normal(3, 2), normal(2, 3)), LORA | config))
        assert "steps to match" in why

    def test_are_read_once_though_other_modules_come_between(self, normal, save, monkeypatch):
        names, read = [], SafetensorsFile.read
        monkeypatch.setattr(
            SafetensorsFile, "read", lambda file, name: names.append(name) or read(file, name)
        )
        tensors = linear("mlp.experts", normal(3, 6), normal(5, 3))
        for place in range(3):
            tensors |= linear(f"mlp.experts.{place}.q", normal(1, 6), normal(5, 1))
        X = read_adapters(save(tensors, self.CONFIG | {"r": 1}))
        assert [name.removeprefix("mlp.experts.") for name in X.layout.names] == [
            *("0", "0.q", "1", "1.q", "2", "2.q")
        ]
        for read_all in (X.read, lambda: list(X._store.iter_factors(0))):
            names.clear()
            read_all()
            assert len(names) == len(set(names)) == 8

    def test_module_by_the_name_of_an_expert_is_refused(self, pair, normal, save, refusal):
        """One of two updates of one name would not be read."""
        tensors = linear("mlp.experts", normal(6, 6), normal(5, 6)) | linear("mlp.experts.1", *pair)
        assert "are both called 'mlp.experts.1'" in refusal(save(tensors, self.CONFIG))

    def test_more_experts_than_any_model_has_are_refused(self, normal, save, refusal):
        """Every expert takes hundreds of bytes, however few its factors take."""
        half = 60_000
        tensors = {}
        for place in range(2):
            stack = torch.ones(half, 1, dtype=torch.float16)
            tensors |= linear(f"{place}.mlp.experts", stack, stack.T)
        assert "over 100000 experts" in refusal(save(tensors, self.CONFIG | {"r": 1}))

    def test_sides_of_older_versions_are_told_of(self, normal, save):
        """The same update of the same model, whose sides PEFT before 0.19.1 took for each other."""
        A, B = normal(6, 8), normal(5, 6)
        new = save(linear("mlp.experts", A, B), self.CONFIG, folder="new")
        old = save(linear("mlp.experts", B.T, A.T), self.CONFIG, folder="old")
        with pytest.raises(ValueError, match=r"\(8, 5\), but \(5, 8\) .* of PEFT before 0\.19\.1"):
            read_adapters([new, old])

    def test_rank_that_is_no_multiple_is_refused(self, pair, normal, save, refusal):
        path = save(linear("mlp.experts", normal(7, 6), normal(5, 7)), self.CONFIG)
        assert "of 7 columns, no whole number of experts of rank r=3" in refusal(path)
        config = self.CONFIG | {"r": 1e300}
        assert len(refusal(save(linear("mlp.experts", *pair), config))) < 300

    @pytest.mark.parametrize("rank", [0, -3])
    def test_rank_below_1_is_refused(self, normal, save, refusal, rank):
        path = save(linear("mlp.experts", normal(6, 6), normal(5, 6)), self.CONFIG | {"r": rank})
        assert f"no whole number of experts of rank r={rank}" in refusal(path)

    def test_other_methods_are_refused(self, normal, save, refusal):
        roles = {"lora_A": normal(6, 6), "lora_B": normal(5, 6), "lora_E": normal(6, 1)}
        tensors = named("mlp.experts", **roles)
        config = self.CONFIG | {"peft_type": "ADALORA", "init_r": 3, "target_r": 3}
        assert "no whole number of experts" in refusal(save(tensors, config))

    def test_three_parameters_of_a_module(self, normal, save, scan):
        names = [f"mlp.experts{n * '.base_layer'}" for n in range(3)]
        tensors = {}
        for name in names:
            tensors |= linear(name, normal(6, 6), normal(5, 6))
        config = LORA | {"target_parameters": [f"mlp.experts.w{n}" for n in range(3)]}
        paths = [module.path for module in scan(save(tensors, config)).modules]
        assert paths == [f"{PREFIX}{name}.{e}" for name in names for e in range(2)]

    def test_targets_that_are_no_names_are_none(self, pair, save, scan):
        path = save(linear("q", *pair), LORA | {"target_parameters": [3, None]})
        assert scan(path).ranks == (3,)

    def test_parameter_of_any_module(self, pair, normal, save, assert_updates):
        A, B = normal(6, 4), normal(5, 6)
        config = LORA | {"target_parameters": ["w1"]}
        path = save(linear("experts", A, B) | linear("q", *pair), config)
        expected = {
            f"{PREFIX}experts.{e}": B.double()[:, e::2] @ A.double()[3 * e :][:3] * 2
            for e in range(2)
        }
        assert_updates(path, expected | {PREFIX + "q": pair[1] @ pair[0] * 2})

    def test_ranks_may_be_1(self, normal, save, scan):
        one = linear("mlp.experts", normal(4, 6), normal(5, 4))
        assert scan(save(one, self.CONFIG | {"r": 1})).scales == (6.0,)
        two = linear("mlp.experts.base_layer", normal(8, 6), normal(5, 8))
        config = self.CONFIG | {"r": 1, "rank_pattern": {"gate_up_proj": 2}}
        assert scan(save(one | two, config)).ranks == (1, 2)

    @pytest.mark.parametrize(
        "settings",
        [
            {"target_parameters": ["w1"], "rank_pattern": {"q": 2}},
            {"target_parameters": ["experts.w1"]},
        ],
    )
    def test_module_of_a_rank_of_its_own_is_no_stack(self, normal, save, scan, settings):
        path = save(linear("q", normal(2, 4), normal(5, 2)), LORA | settings)
        assert [module.path for module in scan(path).modules] == [f"{PREFIX}q"]

    @pytest.mark.parametrize(
        ("settings", "layout"),
        [
            ({"auto_mapping": UNSLOTH}, "missing"),
            ({"unsloth_fused_expert_lora": {"parameters": {}}}, "missing"),
            ({"lora_B_layout": "grouped_by_expert"}, "'grouped_by_expert'"),
            ({"auto_mapping": UNSLOTH | told("grouped_by_expert")}, "'grouped_by_expert'"),
            ({"auto_mapping": UNSLOTH | told("rank_major")}, None),
            ({"lora_B_layout": "rank_major", "auto_mapping": UNSLOTH}, None),
        ],
    )
    def test_columns_in_the_order_of_unsloth_are_refused(
        self, normal, save, refusal, scan, settings, layout
    ):
        tensors = linear("mlp.experts", normal(6, 6), normal(5, 6))
        path = save(tensors, self.CONFIG | settings)
        if layout is None:
            assert scan(path).ranks == (3,)
        else:
            assert refusal(path).endswith(f"and not {layout}.")
        single = linear("mlp.experts", normal(3, 6), normal(5, 3))
        assert scan(save(single, self.CONFIG | settings)).ranks == (3,)

    @pytest.mark.parametrize("targets", ["w1", 3, {"w1": 2}])
    def test_what_is_no_list_is_refused(self, pair, save, refusal, targets):
        path = save(linear("q", *pair), LORA | {"target_parameters": targets})
        assert "target_parameters" in refusal(path)
