"""A zoo of LoRAs of a text-to-image model: DreamBooth on folders of images.

`IMAGES` holds a folder of images for each class or subject. Two recipes of "Learning on LoRAs":

subsets   as Imagenette-LoRA: an adapter for each non-empty set of classes, on one image of each
          class in it, twice over, with fixed hyperparameters. Labels: `class:NAME` (1 if seen).
subjects  as CelebA-LoRA: an adapter for each folder, on all its images, with hyperparameters that
          are drawn for each. Labels: `attribute:NAME`, the columns of a CSV (`--attributes`) whose
          first column names the folders.

Both write all that was drawn and `training_loss`, and with `--clip` the `clip_score`: 100 times the
cosine of CLIP's embeddings of image and prompt, a mean over images from fixed noise. The
hyperparameters below are those that the scripts of the paper's authors train with,
diffusion/data_generation of https://github.com/moeputt/LoL; in its second recipe they draw the
prompt as well, of four.

LoRA is on the attention of the U-Net, for pipelines called as Stable Diffusion or SDXL are.

    python finetune_diffusion.py subsets imagenette/train --prompt "a photo of sks" \\
        --pipeline stable-diffusion-v1-5/stable-diffusion-v1-5 --output zoo
    sklora compare zoo --labels zoo/labels.csv --target n_classes --groups subset
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageOps
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel
from zoo_folder import DTYPES, add_arguments, fill

# Kinds of the values that one is drawn from for each adapter.
DRAWN = {"learning_rate": float, "steps": int, "batch_size": int}
TARGET_MODULES = ["to_q", "to_k", "to_v", "to_out.0"]


def read_folders(path):
    """Give the image files of every folder."""
    endings = Image.registered_extensions()
    folders = {
        folder.name: sorted(file for file in folder.iterdir() if file.suffix.lower() in endings)
        for folder in sorted(path.iterdir())
        if folder.is_dir()
    }
    empty = [name for name, files in folders.items() if not files]
    if empty or not folders:
        raise SystemExit(f"{path}: no images in {', '.join(empty) or 'any folder'}.")
    return folders


def read_attributes(path, names):
    with open(path, newline="", encoding="utf-8-sig") as file:
        key, *columns = (reader := csv.DictReader(file)).fieldnames
        table = {row[key]: {f"attribute:{name}": row[name] for name in columns} for row in reader}
    missing = sorted(set(names) - set(table))
    if missing:
        raise SystemExit(f"{path} has no row for {', '.join(missing)}.")
    return table


def choose_subset(index, rng, args, folders):
    """Every subset once, in an order that the seed gives, then every one once more."""
    names = list(folders)
    order = np.random.default_rng(args.seed).permutation(2 ** len(names) - 1) + 1
    bits = int(order[index % len(order)])
    chosen = [name for place, name in enumerate(names) if bits >> place & 1]
    files = [folders[name][rng.integers(len(folders[name]))] for name in chosen]
    labels = {f"class:{name}": int(name in chosen) for name in names}
    return files, {**labels, "n_classes": len(chosen), "subset": "+".join(chosen)}


def choose_subject(index, rng, args, folders):
    name = list(folders)[index % len(folders)]
    attributes = args.table[name] if args.attributes else {}
    return folders[name], {"subject": name, "n_images": len(folders[name]), **attributes}


def draw(rng, args):
    return {name: rng.choice(getattr(args, name)).item() for name in DRAWN}


def read_images(pipe, files, resolution):
    images = [ImageOps.exif_transpose(Image.open(file)).convert("RGB") for file in files]
    fitted = [ImageOps.fit(image, (resolution, resolution)) for image in images]
    return pipe.image_processor.preprocess(fitted).to(pipe.vae.device, pipe.vae.dtype)


@torch.no_grad()
def condition(pipe, prompt, resolution):
    """Give the arguments by which the U-Net learns of the prompt, for a batch of one."""
    embeddings, _, *pooled = pipe.encode_prompt(
        prompt,
        device=pipe.device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    if not pooled:
        return {"encoder_hidden_states": embeddings}
    sizes = [resolution, resolution, 0, 0, resolution, resolution]
    added = {"text_embeds": pooled[0], "time_ids": torch.tensor([sizes]).to(embeddings)}
    return {"encoder_hidden_states": embeddings, "added_cond_kwargs": added}


def repeat(value, n):
    if isinstance(value, dict):
        return {name: repeat(part, n) for name, part in value.items()}
    return value.expand(n, *value.shape[1:])


def train(pipe, unet, images, conditions, drawn):
    """Train the adapter; give the loss of every step."""
    with torch.no_grad():
        latents = pipe.vae.encode(images).latent_dist
    mean, std = latents.mean.float(), latents.std.float()
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=drawn["learning_rate"])
    size, device = drawn["batch_size"], images.device
    conditions = repeat(conditions, size)
    losses = []
    unet.train()
    for _ in range(drawn["steps"]):
        chosen = torch.randint(len(images), (size,), device=device)
        clean = mean[chosen] + std[chosen] * torch.randn_like(mean[chosen])
        clean = clean * pipe.vae.config.scaling_factor
        noise = torch.randn_like(clean)
        times = torch.randint(scheduler.config.num_train_timesteps, (size,), device=device)
        noisy = scheduler.add_noise(clean, noise, times).to(images.dtype)
        found = unet(noisy, times, **conditions).sample
        if scheduler.config.prediction_type == "v_prediction":
            noise = scheduler.get_velocity(clean, noise, times)
        loss = F.mse_loss(found.float(), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


class ClipScore:
    """How well images from fixed noise fit the prompt, by a CLIP model."""

    def __init__(self, args):
        self.args = args
        self.model = CLIPModel.from_pretrained(args.clip).to(args.device).eval()
        self.images = AutoImageProcessor.from_pretrained(args.clip)
        self.words = AutoTokenizer.from_pretrained(args.clip)

    @torch.inference_mode()
    def __call__(self, pipe):
        prompt = self.args.prompt
        text = self.words([prompt], truncation=True, return_tensors="pt").to(self.args.device)
        scores = []
        # One at a time, with noise from the CPU: an image depends on its seed alone.
        for seed in range(self.args.noise_seeds):
            [image] = pipe(
                prompt,
                generator=torch.Generator().manual_seed(seed),
                height=self.args.resolution,
                width=self.args.resolution,
                num_inference_steps=self.args.inference_steps,
            ).images
            pixels = self.images(image, return_tensors="pt").to(self.args.device)
            found = self.model(**text, **pixels)
            scores.append(F.cosine_similarity(found.image_embeds, found.text_embeds).item())
        return 100 * float(np.mean(scores))


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    recipes = parser.add_subparsers(required=True)
    subsets = recipes.add_parser("subsets", help="an adapter for each set of classes")
    subsets.set_defaults(choose=choose_subset, attributes=None)
    _add_arguments(subsets, learning_rate=[3e-4], steps=[150], batch_size=[1])
    subjects = recipes.add_parser("subjects", help="an adapter for each folder")
    subjects.set_defaults(choose=choose_subject)
    rates, steps = [1e-4, 1e-3, 3e-3, 3e-3], [100, 133, 167, 200]
    _add_arguments(subjects, learning_rate=rates, steps=steps, batch_size=[1, 2])
    subjects.add_argument("--attributes", type=Path, metavar="CSV", help="labels of the folders")
    return parser


def _add_arguments(parser, **defaults):
    add = parser.add_argument
    add("images", type=Path, metavar="IMAGES", help="a folder of folders of images")
    add("--pipeline", required=True, help="a text-to-image pipeline: its name, or a folder")
    add("--prompt", default="a photo of sks", help="what the images are; default: %(default)s")
    add("--adapters", type=int, help="how many; default: all, see above")
    add("--resolution", type=int, help="default: that of the pipeline")
    drawn = parser.add_argument_group("one of these is drawn for each adapter")
    for name, kind in DRAWN.items():
        shown = " ".join(map(str, defaults[name]))
        option = f"--{name.replace('_', '-')}"
        drawn.add_argument(option, type=kind, nargs="+", help=f"default: {shown}")
    score = parser.add_argument_group("score")
    score.add_argument("--clip", help="a CLIP model: its name, or a folder; default: no score")
    score.add_argument("--noise-seeds", type=int, default=33, help="images; default: 33")
    score.add_argument("--inference-steps", type=int, default=50, help="default: 50")
    add_arguments(parser)
    parser.set_defaults(**defaults)


def load_pipeline(args):
    pipe = DiffusionPipeline.from_pretrained(args.pipeline, dtype=DTYPES[args.dtype])
    pipe.to(args.device)
    if not hasattr(pipe, "unet"):
        raise SystemExit(f"{args.pipeline} has no U-Net: this recipe is for those that have.")
    for part in ("vae", "text_encoder", "text_encoder_2"):
        if getattr(pipe, part, None) is not None:
            getattr(pipe, part).requires_grad_(False)
    pipe.safety_checker = None  # it would blacken images that are to be scored
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main(argv=None):
    args = build_parser().parse_args(argv)
    folders = read_folders(args.images)
    if args.choose is choose_subset and len(folders) > 20:
        raise SystemExit(f"{args.images}: {len(folders)} classes; 20 have a million subsets.")
    if args.attributes:
        args.table = read_attributes(args.attributes, folders)
    count = 2 * (2 ** len(folders) - 1) if args.choose is choose_subset else len(folders)
    pipe = load_pipeline(args)
    args.resolution = args.resolution or pipe.unet.config.sample_size * pipe.vae_scale_factor
    conditions = condition(pipe, args.prompt, args.resolution)
    clip_score = ClipScore(args) if args.clip else None

    def make(index):
        rng = np.random.default_rng([args.seed, index])
        torch.manual_seed(int(rng.integers(2**62)))
        files, labels = args.choose(index, rng, args, folders)
        drawn = draw(rng, args)
        config = LoraConfig(
            r=args.rank, lora_alpha=args.alpha or args.rank, target_modules=TARGET_MODULES
        )
        unet = get_peft_model(pipe.unet, config)
        config.base_model_name_or_path = args.pipeline
        losses = train(pipe, unet, read_images(pipe, files, args.resolution), conditions, drawn)
        labels |= {**drawn, "training_loss": float(np.mean(losses))}
        if clip_score:
            unet.eval()
            labels["clip_score"] = clip_score(pipe)
        return unet, labels

    settings = {name: value for name, value in vars(args).items() if name != "choose"}
    settings |= {"recipe": args.choose.__name__, "folders": list(folders)}
    fill(args.output, settings, args.adapters or count, make)


if __name__ == "__main__":
    main()
