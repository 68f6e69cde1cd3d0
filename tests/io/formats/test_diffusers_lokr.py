import json

import pytest
import torch

from tests.io.formats.peft import described

FULL = {"to_q.lokr_w1": (2, 3), "to_q.lokr_w2": (4, 5)}
FACTORED = {"to_q.lokr_w1": (2, 3), "to_q.lokr_w2_a": (4, 2), "to_q.lokr_w2_b": (2, 5)}


class TestLoKr:
    def settings(self, **more):
        return {"peft_type": "LOKR", "r": 16, "alpha": 8} | more

    @pytest.mark.parametrize("component", ["", "transformer."])
    @pytest.mark.parametrize(
        ("shapes", "scale", "more"),
        [
            (FULL, 8 / 16, {}),
            (FULL, 8 / 4, {"rank_pattern": {"to_q": 4}}),
            (FACTORED, 8 / 2, {}),
            (FACTORED, 6 / 2, {"alpha_pattern": {"to_q": 6}}),
        ],
    )
    def test_scale_is_that_of_the_metadata(
        self, normal, save, assert_updates, scan, component, shapes, scale, more
    ):
        tensors = {f"{component}{name}": normal(*shape) for name, shape in shapes.items()}
        flat = {f"{component}{key}": value for key, value in self.settings(**more).items()}
        path = save(tensors, metadata={"lora_adapter_metadata": json.dumps(flat)})
        first, *rest = (tensor.double() for tensor in tensors.values())
        second = rest[0] if len(rest) == 1 else rest[0] @ rest[1]
        assert_updates(path, {f"{component}to_q": torch.kron(first, second) * scale})
        assert scan(path).format == "diffusers"

    def test_without_metadata_they_are_those_of_lycoris(self, normal, save, scan):
        tensors = {f"transformer.{name}": normal(*shape) for name, shape in FULL.items()}
        assert scan(save(tensors)).format == "lycoris"

    def test_other_methods_are_refused(self, normal, save, refusal):
        tensors = {f"transformer.{name}": normal(*shape) for name, shape in FULL.items()}
        metadata = described(transformer__peft_type="HRA", transformer__alpha=1)
        assert "peft_type 'HRA'" in refusal(save(tensors, metadata=metadata))

    def test_of_a_one_dimensional_convolution_are_refused(self, normal, save, refusal):
        tensors = {"unet.x.lokr_w1": normal(2, 3), "unet.x.lokr_w2": normal(4, 5, 3)}
        metadata = described(**{f"unet__{key}": x for key, x in self.settings().items()})
        assert "no Kronecker product" in refusal(save(tensors, metadata=metadata))
