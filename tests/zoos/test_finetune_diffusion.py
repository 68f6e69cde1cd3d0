"""The recipe for text-to-image models, on a tiny Stable Diffusion, a tiny SDXL and a tiny CLIP."""

import csv
import json
import shutil
import string
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sklora.__main__ import main as sklora
from sklora.io import read_adapters, scan_adapters

RANK, ALPHA = 2, 6
SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
RATES = [*map(str, np.geomspace(1e-3, 1e-2, 100))]
SIZE = 16  # of the pipeline's images
NAMES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def diffusion(recipe):
    return recipe("finetune_diffusion")


def make_tokenizer():
    from transformers import CLIPTokenizer

    letters = string.ascii_lowercase
    tokens = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def text_config(tokenizer, **options):
    return {
        **SMALL,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **options,
    }


def parts(**options):
    """A U-Net with attention in one block of each side, an autoencoder, and a noise schedule."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    return {
        "unet": UNet2DConditionModel(
            sample_size=SIZE // 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=2,
            norm_num_groups=4,
            **options,
        ),
        "vae": AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        ),
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
    }


@pytest.fixture(scope="module")
def folder(diffusion, tmp_path_factory):
    """Where the pipeline, CLIP, the images and their attributes are."""
    from diffusers import StableDiffusionPipeline
    from PIL import Image
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("diffusion")
    tokenizer = make_tokenizer()
    text = text_config(tokenizer)
    StableDiffusionPipeline(
        **parts(cross_attention_dim=8),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "pipeline")
    vision = {**SMALL, "image_size": 8, "patch_size": 4}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    clip.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    size = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 8}}
    size["crop_size"] = {"height": 8, "width": 8}
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(size))
    rng = np.random.default_rng(0)
    for place, name in enumerate(NAMES):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(2):
            pixels = rng.integers(80 * place, 80 * place + 80, size=(20, 24, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{number}.png")
    with open(folder / "attributes.csv", "w", newline="") as file:
        rows = [("folder", "wings"), ("cat", 0), ("bee", 1), ("ant", 0)]
        csv.writer(file).writerows(rows)
    return folder


@pytest.fixture(scope="module")
def run(diffusion, folder):
    def run(recipe, zoo, *options):
        command = [recipe, folder / "images", "--pipeline", folder / "pipeline", "--output", zoo]
        command += ["--learning-rate", *RATES, "--steps", "2", "4", "--device", "cpu"]
        command += ["--rank", RANK, "--alpha", ALPHA, *options]
        diffusion.main(list(map(str, command)))
        return zoo

    return run


@pytest.fixture(scope="module")
def subsets(run, tmp_path_factory):
    """Not to be written to."""
    return run("subsets", tmp_path_factory.mktemp("subsets"))


@pytest.fixture
def load(diffusion, folder):
    """Load a pipeline as the recipe does."""

    def load(name="pipeline"):
        command = ["subjects", "images", "--pipeline", str(folder / name), "--output", "zoo"]
        return diffusion.load_pipeline(
            diffusion.build_parser().parse_args([*command, "--device", "cpu"])
        )

    return load


def test_there_is_each_subset_twice(subsets, read_labels):
    rows = list(read_labels(subsets).values())
    assert len(rows) == 2 * 7
    once, again = ([row["subset"] for row in half] for half in (rows[:7], rows[7:]))
    assert once == again
    assert len(set(once)) == 7
    for row in rows:
        seen = [name for name in NAMES if int(row[f"class:{name}"])]
        assert row["subset"] == "+".join(seen)
        assert int(row["n_classes"]) == len(seen) > 0


def test_the_zoo_is_read_as_it_is(subsets, read_labels):
    X = read_adapters(subsets)
    assert {name.rpartition("attn")[2][2:] for name in X.layout.names} == {
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    }
    assert set(X.layout.ranks) == {RANK}
    assert X.layout.base_model == "pipeline"
    assert [f"{path}/adapter_model.safetensors" for path in read_labels(subsets)] == [
        id.removeprefix(f"{subsets}/") for id in X.ids
    ]


def test_the_command_line_takes_the_zoo(subsets, tmp_path, capsys):
    command = ["fit", subsets, "--labels", subsets / "labels.csv", "--folds", "2"]
    for name in NAMES:
        command += ["--target", f"class:{name}"]
    command += ["--groups", "subset", "--architecture", "svd", "-o", tmp_path / "model.skops"]
    assert sklora(list(map(str, command))) == 0
    assert sklora(["predict", str(tmp_path / "model.skops"), str(subsets), "--json"]) == 0
    out = capsys.readouterr().out
    predictions = json.loads(out[out.index("[\n") :])
    assert len(predictions) == 2 * 7
    assert all(set(row["prediction"]) == {f"class:{n}" for n in NAMES} for row in predictions)


def test_the_update_is_that_of_the_file_by_its_scale(subsets):
    tensors = load_file(subsets / "adapter-0003" / "adapter_model.safetensors")
    found = read_adapters(subsets, names="raw")[3]
    assert len(tensors) == 2 * len(found)
    for name, (U, V) in found.items():
        A, B = (tensors[f"{name}.lora_{part}.weight"] for part in "AB")
        np.testing.assert_allclose(U @ V.T, B @ A * ALPHA / RANK, rtol=1e-5, atol=1e-7)
        assert np.linalg.norm(U) > 0  # it begins at zero


def test_subjects_have_their_attributes_and_a_score(run, folder, tmp_path, read_labels):
    options = ["--attributes", folder / "attributes.csv", "--clip", folder / "clip"]
    options += ["--noise-seeds", "2", "--inference-steps", "2"]
    zoo = run("subjects", tmp_path, *options)
    rows = list(read_labels(zoo).values())
    assert [row["subject"] for row in rows] == list(NAMES)
    assert [row["attribute:wings"] for row in rows] == ["0", "1", "0"]
    assert all(row["n_images"] == "2" for row in rows)
    assert len({row["learning_rate"] for row in rows}) == 3
    scores = {float(row["clip_score"]) for row in rows}
    assert len(scores) == 3
    assert all(-100 <= score <= 100 for score in scores)
    assert len(read_adapters(zoo)) == 3


def test_the_score_is_that_of_clip(diffusion, folder, load):
    from PIL import Image

    options = ["--clip", folder / "clip", "--noise-seeds", "3", "--device", "cpu"]
    command = ["subjects", folder, "--pipeline", folder, "--output", folder, *options]
    args = diffusion.build_parser().parse_args([*map(str, command), "--resolution", "16"])
    clip_score = diffusion.ClipScore(args)
    images = [Image.open(folder / "images" / name / "0.png") for name in NAMES]
    seen = []

    def draw(prompt, generator, **options):
        seen.append((prompt, generator.initial_seed(), options["height"], options["width"]))
        return SimpleNamespace(images=[images[generator.initial_seed()]])

    score = clip_score(draw)
    assert seen == [("a photo of sks", seed, 16, 16) for seed in range(3)]
    text = clip_score.words(["a photo of sks"], return_tensors="pt")
    with torch.no_grad():
        pixels = clip_score.images(images, return_tensors="pt")
        cosines = (
            clip_score.model(**text, **pixels).logits_per_text / clip_score.model.logit_scale.exp()
        )
    assert score == pytest.approx(100 * cosines.mean().item(), rel=1e-4)


def test_half_precision(run, folder, tmp_path):
    options = ["--clip", folder / "clip", "--noise-seeds", "1", "--inference-steps", "1"]
    run("subjects", tmp_path, "--dtype", "bfloat16", "--adapters", "1", *options)
    [report] = scan_adapters(tmp_path)
    assert report.error is None
    assert report.dtypes == ("F32",)  # of the factors, which train in full precision


def test_a_zoo_is_continued(run, subsets, tmp_path):
    again = tmp_path / "zoo"
    shutil.copytree(subsets, again)
    lost = again / "adapter-0005"
    shutil.rmtree(lost)
    labels = (again / "labels.csv").read_text()
    run("subsets", again)
    X, Y = read_adapters(subsets / lost.name), read_adapters(lost)
    np.testing.assert_array_equal(X.read(), Y.read())
    assert (again / "labels.csv").read_text() == labels


def lora(unet, diffusion):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, target_modules=diffusion.TARGET_MODULES)
    return get_peft_model(unet, config)


def test_training_lowers_the_loss_and_moves_both_factors(diffusion, folder, load):
    pipe = load()
    torch.manual_seed(0)
    model = lora(pipe.unet, diffusion)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    images = diffusion.read_images(pipe, [folder / "images" / "cat" / "0.png"], SIZE)
    conditions = diffusion.condition(pipe, "a photo of sks", SIZE)

    def losses(rate, steps):
        torch.manual_seed(1)
        drawn = {"learning_rate": rate, "steps": steps, "batch_size": 4}
        return diffusion.train(pipe, model, images, conditions, drawn)

    first = losses(0.0, 8)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    losses(0.03, 30)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name)
    assert np.mean(losses(0.0, 8)) < np.mean(first) - 0.02


class Knowing(torch.nn.Module):
    """Answers rightly, since it knows the image, so its loss is zero."""

    def __init__(self, clean, schedule, answer):
        super().__init__()
        self.clean, self.schedule, self.answer = clean, schedule, answer
        self.offset = torch.nn.Parameter(torch.zeros(()))

    def forward(self, noisy, times):
        kept = self.schedule[times][:, None, None, None]
        noise = (noisy - kept.sqrt() * self.clean) / (1 - kept).sqrt()
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * self.clean
        found = {"epsilon": noise, "v_prediction": velocity}[self.answer]
        return SimpleNamespace(sample=found + self.offset)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_network_is_asked_for_what_its_schedule_says(diffusion, kind):
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(prediction_type=kind)
    image, scale = torch.randn(1, 4, 4, 4), 0.3
    seen = SimpleNamespace(mean=image, std=torch.zeros_like(image))
    vae = SimpleNamespace(
        encode=lambda images: SimpleNamespace(latent_dist=seen),
        config=SimpleNamespace(scaling_factor=scale),
    )
    pipe = SimpleNamespace(vae=vae, scheduler=scheduler)
    drawn = {"learning_rate": 0.0, "steps": 4, "batch_size": 2}
    for answer in ("epsilon", "v_prediction"):
        unet = Knowing(scale * image, scheduler.alphas_cumprod, answer)
        losses = diffusion.train(pipe, unet, image, {}, drawn)
        assert (max(losses) < 1e-4) == (answer == kind)


def test_images_are_cut_square_and_scaled_to_one(diffusion, folder, load, tmp_path):
    from PIL import Image

    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 5:25] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    images = diffusion.read_images(load(), [tmp_path / "wide.png"], 8)
    assert images.shape == (1, 3, 8, 8)
    assert torch.equal(images, torch.ones(1, 3, 8, 8))


def test_sdxl_is_trained_too(diffusion, run, folder, tmp_path):
    from diffusers import StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = make_tokenizer()
    config = CLIPTextConfig(**text_config(tokenizer, projection_dim=8))
    options = {"cross_attention_dim": 16, "addition_embed_type": "text_time"}
    options |= {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 8 + 6 * 4}
    StableDiffusionXLPipeline(
        **parts(**options),
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
    ).save_pretrained(tmp_path / "xl")
    zoo = run("subjects", tmp_path / "zoo", "--pipeline", tmp_path / "xl", "--adapters", "1")
    assert len(read_adapters(zoo)) == 1


def test_hyperparameters_are_one_of_the_values(diffusion):
    parser = diffusion.build_parser()
    for recipe, values in (
        ("subsets", [{3e-4}, {150}, {1}]),
        ("subjects", [{1e-4, 1e-3, 3e-3}, {100, 133, 167, 200}, {1, 2}]),
    ):
        args = parser.parse_args([recipe, "images", "--pipeline", "x", "--output", "zoo"])
        drawn = [diffusion.draw(np.random.default_rng(seed), args) for seed in range(200)]
        names = ("learning_rate", "steps", "batch_size")
        assert [{row[name] for row in drawn} for name in names] == values
        json.dumps(drawn[0])


def test_folders_without_images_and_attributes_without_a_row_are_refused(
    run, folder, diffusion, tmp_path
):
    (tmp_path / "dog").mkdir()
    with pytest.raises(SystemExit, match="no images in dog"):
        diffusion.read_folders(tmp_path)
    (tmp_path / "some.csv").write_text("name,wings\ncat,0\n")
    with pytest.raises(SystemExit, match="has no row for ant, bee"):
        run("subjects", tmp_path / "zoo", "--attributes", tmp_path / "some.csv")


def test_classes_of_more_subsets_than_can_be_listed_are_refused(folder, diffusion, tmp_path):
    for name in range(40):
        shutil.copytree(folder / "images" / "ant", tmp_path / "images" / str(name))
    command = ["subsets", tmp_path / "images", "--pipeline", tmp_path, "--output", tmp_path / "zoo"]
    with pytest.raises(SystemExit, match="40 classes; 20 have a million subsets"):
        diffusion.main(list(map(str, command)))
