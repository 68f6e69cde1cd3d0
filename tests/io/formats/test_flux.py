import pytest
import torch

CONTROL = "double_blocks.0.img_attn.proj"


class TestXLabs:
    @pytest.mark.parametrize("prefix", ["", "diffusion_model."])
    def test_scale_is_1(self, normal, save, assert_updates, scan, prefix):
        tensors, expected = {}, {}
        names = {
            "double_blocks.0.processor.qkv_lora1": "double_blocks.0.img_attn.qkv",
            "double_blocks.0.processor.qkv_lora2": "double_blocks.0.txt_attn.qkv",
            "double_blocks.0.processor.proj_lora1": "double_blocks.0.img_attn.proj",
            "double_blocks.0.processor.proj_lora2": "double_blocks.0.txt_attn.proj",
            "single_blocks.1.processor.qkv_lora": "single_blocks.1.processor.qkv_lora",
            "single_blocks.1.processor.proj_lora": "single_blocks.1.linear2",
        }
        for path, name in names.items():
            down, up = normal(3, 4), normal(5, 3)
            tensors |= {f"{prefix}{path}.down.weight": down, f"{prefix}{path}.up.weight": up}
            expected[f"transformer.{name}"] = up.double() @ down.double()
        path = save(tensors)
        assert_updates(path, expected, names="canonical")
        report = scan(path)
        assert (report.format, report.scales) == ("xlabs", (1,))


class TestBFL:
    def tensors(self, A, B):
        return {f"{CONTROL}.lora_A.weight": A, f"{CONTROL}.lora_B.weight": B}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("scale", [1, -0.85])
    def test_scale_is_the_user_s(self, normal, save, assert_updates, scan, dtype, scale):
        A, B = normal(3, 4, dtype=dtype), normal(5, 3, dtype=dtype)
        path = save(self.tensors(A, B))
        assert_updates(path, {CONTROL: scale * B.double() @ A.double()}, scale=scale)
        assert scan(path, scale=scale).format == "bfl"

    def test_without_one_it_is_refused_with_the_remedy(self, normal, save, refusal):
        why = refusal(save(self.tensors(normal(3, 4), normal(5, 3))))
        assert "pass scale=" in why

    def test_biases_and_norms_are_left_out(self, normal, save, scan):
        others = {
            f"{CONTROL}.lora_B.bias": "a bias",
            "double_blocks.0.img_attn.norm.key_norm.scale": (
                "a parameter of a normalisation layer"
            ),
        }
        tensors = self.tensors(normal(3, 4), normal(5, 3)) | {name: normal(5) for name in others}
        assert dict(scan(save(tensors), scale=1).left_out) == others
