import numpy as np
import pytest
import torch

from sklora.io import read_adapters

MODULE = "lora_unet_down_blocks_0_attentions_0_proj_in"
NAME = "unet.down_blocks.0.attentions.0.proj_in"
ALPHAS = [
    torch.tensor(6.0, dtype=torch.float64),
    torch.tensor(6.0),
    torch.tensor([6.0]),
    torch.tensor([[6.0]]),
    torch.tensor(6.0).half(),
    torch.tensor(6.0).bfloat16(),
    torch.tensor(6),
    torch.tensor([6], dtype=torch.int32),
    torch.tensor(6, dtype=torch.uint8),
]


def tensors(A, B, module=MODULE):
    return {f"{module}.lora_down.weight": A, f"{module}.lora_up.weight": B}


@pytest.mark.parametrize("alpha", ALPHAS, ids=lambda x: f"{tuple(x.shape)} {x.dtype}")
def test_scale_is_alpha_over_r_however_alpha_is_stored(pair, save, assert_updates, scan, alpha):
    A, B = pair
    path = save(tensors(A, B) | {f"{MODULE}.alpha": alpha})
    assert_updates(path, {MODULE: B @ A * 6 / 3})
    report = scan(path)
    assert (report.format, report.scales, report.dtypes) == ("kohya", (2,), ("F64",))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [0.1, -5.0, 1e-6, 300.0])
def test_every_dtype_and_sign(normal, save, assert_updates, dtype, alpha):
    A, B = normal(3, 4, dtype=dtype), normal(5, 3, dtype=dtype)
    path = save(tensors(A, B) | {f"{MODULE}.alpha": torch.tensor(alpha, dtype=torch.float64)})
    assert_updates(path, {MODULE: B.double() @ A.double() * alpha / 3})


@pytest.mark.parametrize("alpha", [{}, {f"{MODULE}.alpha": torch.tensor(0.0)}])
def test_without_alpha_or_with_an_alpha_of_0_the_scale_is_1(pair, save, assert_updates, alpha):
    A, B = pair
    assert_updates(save(tensors(A, B) | alpha), {MODULE: B @ A})


def test_every_module_has_its_own_rank_and_alpha(normal, save, assert_updates):
    everything, expected = {}, {}
    for r, alpha in ((1, 4), (2, 4), (4, 4)):
        A, B = normal(r, 4), normal(5, r)
        module = f"lora_te1_text_model_encoder_layers_{r}_mlp_fc1"
        everything |= tensors(A, B, module) | {f"{module}.alpha": torch.tensor(float(alpha))}
        name = f"text_encoder.text_model.encoder.layers.{r}.mlp.fc1"
        expected[name] = B.double() @ A.double() * alpha / r
    assert_updates(save(everything), expected, names="canonical")


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        (torch.float8_e4m3fn, torch.float8_e5m2),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.float8_e5m2, torch.float64),
    ],
)
def test_dtypes_may_be_mixed(normal, save, assert_updates, narrow, wide):
    down, up = normal(2, 5, dtype=narrow), normal(7, 2, dtype=wide)
    path = save({"m.lora_down.weight": down, "m.lora_up.weight": up})
    assert_updates(path, {"m": up.double() @ down.double()})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bits(normal, save, assert_updates, scan, dtype):
    A, B = normal(3, 4, dtype=dtype), normal(5, 3, dtype=dtype)
    path = save(tensors(A, B))
    assert_updates(path, {MODULE: B.double() @ A.double()})
    assert scan(path).dtypes == ({torch.float8_e4m3fn: "F8_E4M3"}.get(dtype, "F8_E5M2"),)


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1)])
def test_convolution(normal, save, assert_updates, kernel):
    A, B = normal(3, 4, *kernel), normal(5, 3, 1, 1)
    update = torch.einsum("or,rikl->oikl", B.double().flatten(1), A.double())
    path = save(tensors(A, B) | {f"{MODULE}.alpha": torch.tensor(1.0)})
    assert_updates(path, {MODULE: update / 3})


def test_metadata_is_no_source_of_the_scale(pair, save, scan):
    metadata = {"ss_network_alpha": "64", "ss_network_dim": "128", "ss_tag_frequency": "{"}
    path = save(tensors(*pair) | {f"{MODULE}.alpha": torch.tensor(6.0)}, metadata=metadata)
    assert scan(path).scales == (2,)


def test_split_qkv_is_scaled_by_the_rank_of_the_tensors(normal, save, assert_updates):
    # Three adapters of rank 2 side by side, with the alpha of one.
    A = normal(6, 4)
    B = torch.block_diag(*(normal(5, 2) for _ in range(3)))
    module = "lora_unet_double_blocks_0_img_attn_qkv"
    path = save(tensors(A, B, module) | {f"{module}.alpha": torch.tensor(2.0)})
    assert_updates(path, {module: B.double() @ A.double() * 2 / 6})


class TestDoRA:
    @pytest.mark.parametrize(
        ("shape", "side"),
        [
            ((5, 1), ("magnitude_out", 5)),
            ((1, 4), ("magnitude_in", 4)),
            ((5,), ("magnitude_out", 5)),
        ],
    )
    def test_axis_is_read_from_the_shape(self, pair, normal, save, shape, side):
        A, B = pair
        magnitude = normal(*shape)
        X = read_adapters(save(tensors(A, B) | {f"{MODULE}.dora_scale": magnitude}))
        what, size = side
        assert X.layout.side == ((f"{NAME}:{what}", size),)
        np.testing.assert_array_equal(X[0].side[f"{NAME}:{what}"], magnitude.flatten())
        U, V = X[0][NAME]
        np.testing.assert_allclose(U @ V.T, B @ A, rtol=1e-12)

    @pytest.mark.parametrize(
        ("shape", "side"), [((5, 1, 1, 1), ("out", 5)), ((1, 4, 1, 1), ("in", 4))]
    )
    def test_of_a_convolution(self, normal, save, scan, shape, side):
        path = save(
            tensors(normal(3, 4, 3, 3), normal(5, 3, 1, 1))
            | {f"{MODULE}.dora_scale": normal(*shape)}
        )
        axis, size = side
        assert scan(path).side == ((f"{NAME}:magnitude_{axis}", size),)

    @pytest.mark.parametrize("shape", [(4,), (4, 1), (1, 5), (2, 2), (1, 0), (1,)])
    def test_one_that_does_not_fit_is_left_out(self, pair, normal, save, scan, shape):
        report = scan(save(tensors(*pair) | {f"{MODULE}.dora_scale": normal(*shape)}))
        assert report.side == ()
        [(name, reason)] = report.left_out
        assert (name, "does not fit (5, 4)" in reason) == (f"{MODULE}.dora_scale", True)

    def test_one_that_some_adapters_lack_is_zero_there(self, pair, normal, save):
        with_magnitude = save(
            tensors(*pair) | {f"{MODULE}.dora_scale": normal(5, 1)}, folder="dora"
        )
        X = read_adapters([save(tensors(*pair)), with_magnitude])
        assert not X[0].side[f"{NAME}:magnitude_out"].any()
        assert X[1].side[f"{NAME}:magnitude_out"].all()


def test_alpha_without_factors_is_left_out(pair, save, scan):
    # One stands before all factors in the file, and one behind.
    alphas = {
        "lora_te_x.alpha": torch.tensor(1.0, dtype=torch.float64),
        "lora_unet_x.alpha": torch.tensor(1.0),
    }
    report = scan(save(tensors(*pair) | alphas))
    assert report.left_out == tuple((name, "there is no update of this module") for name in alphas)
    assert len(report.modules) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{MODULE}.alpha": torch.ones(2)}, f"'{MODULE}.alpha' has shape (2,), but alpha"),
        (
            {f"{MODULE}.lora_up.weight": torch.ones(5, 2)},
            f"module '{MODULE}': shapes down (3, 4), up (5, 2) do not fit",
        ),
        ({f"{MODULE}.lora_up.weight": torch.ones(3)}, "do not fit"),
        ({f"{MODULE}.lora_up.weight": torch.ones(5, 3, dtype=torch.int8)}, "dequantise"),
        ({"lora_unet_x.lora_down.weight": torch.ones(2, 3)}, "has down and no more"),
    ],
)
def test_factors_that_do_not_fit_are_refused(pair, save, refusal, change, message):
    assert message in refusal(save(tensors(*pair) | change))


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_alpha_that_is_no_number_is_refused(pair, save, refusal, alpha):
    assert "NaN or infinity" in refusal(
        save(tensors(*pair) | {f"{MODULE}.alpha": torch.tensor(alpha)})
    )


def test_scale_that_the_dtype_cannot_hold_is_refused_when_it_is_read(normal, save):
    alpha = torch.tensor(1e90, dtype=torch.float64)
    path = save(tensors(normal(3, 4), normal(5, 3)) | {f"{MODULE}.alpha": alpha})
    with pytest.raises(ValueError, match="float32 cannot hold"):
        read_adapters(path).read()


def test_two_modules_of_one_canonical_name_are_refused_but_for_raw_names(pair, save, refusal, scan):
    twin = "lora_unet_input_blocks_1_1_proj_in"
    path = save(tensors(*pair) | tensors(*(x.clone() for x in pair), module=twin))
    why = refusal(path)
    assert f"modules {MODULE!r} and {twin!r} are both called {NAME!r}" in why
    assert "names='raw'" in why
    assert {module.name for module in scan(path, names="raw").modules} == {MODULE, twin}
