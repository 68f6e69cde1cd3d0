import numpy as np
import pytest
import torch

from sklora.io import read_adapters


def test_safetensors_are_named_by_number(normal, save, assert_updates, scan):
    tensors, expected = {}, {}
    for name, r in (("unet:0", 1), ("unet:10", 2), ("unet:2", 3), ("text_encoder:0", 4)):
        up, down = normal(5, r), normal(r, 4)
        tensors |= {f"{name}:up": up, f"{name}:down": down}
        expected[name] = up.double() @ down.double()
    path = save(tensors | {"<s1>": normal(8), "<a:b>": normal(8)}, metadata={"unet:0:rank": "7"})
    assert_updates(path, expected)
    report = scan(path)
    assert (report.format, report.scales) == ("cloneofsimo", (1,))
    embeddings = ("<a:b>", "<s1>")
    assert report.left_out == tuple((x, "an embedding of textual inversion") for x in embeddings)
    assert read_adapters(path).layout.names == ("text_encoder:0", "unet:0", "unet:2", "unet:10")


def test_convolution(normal, save, assert_updates):
    up, down = normal(5, 2, 1, 1), normal(2, 4, 3, 3)
    update = torch.einsum("or,rikl->oikl", up.double().flatten(1), down.double())
    assert_updates(save({"unet:0:up": up, "unet:0:down": down}), {"unet:0": update})


def test_list_of_up_down_up_down(normal, tmp_path, assert_updates):
    factors = [(normal(5, 2), normal(2, 4)), (normal(6, 3), normal(3, 7))]
    path = tmp_path / "lora.pt"
    torch.save([tensor for pair in factors for tensor in pair], path)
    expected = {str(n): up.double() @ down.double() for n, (up, down) in enumerate(factors)}
    assert_updates(path, expected, allow_torch_zip=True)


def test_list_of_parameters_in_every_dtype(normal, tmp_path, assert_updates):
    path = tmp_path / "lora.pt"
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        up, down = normal(5, 2, dtype=dtype), normal(2, 4, dtype=dtype)
        torch.save([torch.nn.Parameter(up), torch.nn.Parameter(down)], path)
        assert_updates(path, {"0": up.double() @ down.double()}, allow_torch_zip=True)


def test_list_of_an_odd_number_is_refused(normal, tmp_path, refusal):
    path = tmp_path / "lora.pt"
    torch.save([normal(5, 2), normal(2, 4), normal(5, 2)], path)
    assert "an odd number of tensors, 3 in all" in refusal(path, allow_torch_zip=True)


def test_list_of_nothing_is_refused(tmp_path, refusal):
    torch.save([], tmp_path / "lora.pt")
    assert "it holds no tensors" in refusal(tmp_path / "lora.pt", allow_torch_zip=True)


def test_factors_of_a_module_without_a_name_are_refused(normal, save, refusal):
    assert "no LoRA factors" in refusal(save({":up": normal(5, 2), ":down": normal(2, 4)}))


def test_numbers_for_names_are_a_list_in_a_pickle_alone(normal, save, refusal):
    why = refusal(save({"0": normal(5, 2), "1": normal(2, 4)}))
    assert "no adapter that sklora knows" in why


def test_list_of_other_tensors_is_refused(normal, tmp_path, refusal):
    path = tmp_path / "lora.pt"
    torch.save([normal(2, 4), normal(5, 2)], path)
    assert "do not fit" in refusal(path, allow_torch_zip=True)


@pytest.mark.parametrize("missing", ["up", "down"])
def test_lone_factor_is_refused(normal, save, refusal, missing):
    tensors = {"unet:0:up": normal(5, 2), "unet:0:down": normal(2, 4)}
    del tensors[f"unet:0:{missing}"]
    assert "and no more" in refusal(save(tensors))


def test_both_ways_are_one_adapter(normal, save, tmp_path):
    up, down = normal(5, 2), normal(2, 4)
    torch.save([up, down], tmp_path / "lora.pt")
    X = read_adapters([save({"unet:0:up": up, "unet:0:down": down})])
    Y = read_adapters(tmp_path / "lora.pt", allow_torch_zip=True)
    np.testing.assert_array_equal(X.read(), Y.read())
