"""Judge the demo's teacher on pairs of name and style that it has never seen.

    python demo/judge_teacher.py demo/teacher --heldout validation --output_dir teacher_judged

Draws `heldout.png`: for every pair the teacher's picture (50 DDIM steps, guidance 3), the true one, and the training
picture whose latents are nearest to the teacher's, with its caption and distance. Prints, for as many training pairs
and for held-out ones:

* the root-mean-square distance of latents (of spread 1) from the teacher's picture to the true one and to the nearest
  training picture, mirrored or not, and from the true one to its own nearest. A copy would be at the VAE's noise from
  its nearest; for the scale, two unrelated latents of mean 0 would be 1.4 apart;
* how often the nearest training picture has the prompt's name, category, style, and how often the true one's has;
* how often a classifier of styles, trained on the training pictures, names the prompt's style of the teacher's picture
  and of the true one, with one guess and with two;
* PSNR in dB between the teacher's own 1, 2, 4, 8 steps and its 50 from the same noise, by kind of caption.

Whoever chooses settings uses `--heldout validation`; `test` is for tables that are published.
"""

import argparse
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw
from torch import nn
from train_teacher import DEMO, encode, read_shards

KINDS = ("full", "unstyled", "category")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="pipeline folder")
    parser.add_argument("--shards_dir", type=Path, default=DEMO / "shards")
    parser.add_argument("--heldout", choices=("validation", "test"), default="validation")
    parser.add_argument("--output_dir", type=Path, default=Path("teacher_judged"))
    parser.add_argument("--num_pairs", type=int, default=48, help="pairs of each split, the first of its shard")
    parser.add_argument("--steps", type=int, nargs="+", default=(1, 2, 4, 8), help="to compare with 50")
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--style_epochs", type=int, default=14, help="of the classifier of styles")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(argv)


@torch.no_grad()
def sample(pipeline, prompts, steps, args):
    """Pictures (n, 3, 64, 64) in [-1, 1] and latents (n, 4, 16, 16), from the same noise whatever the steps."""
    generator, side = torch.Generator().manual_seed(args.seed), pipeline.unet.config.sample_size
    noise = torch.randn(len(prompts), pipeline.unet.config.in_channels, side, side, generator=generator)
    latents = torch.cat(
        [
            pipeline(
                list(prompts[start : start + 64]),
                latents=noise[start : start + 64],
                num_inference_steps=steps,
                guidance_scale=args.guidance_scale,
                output_type="latent",
            ).images
            for start in range(0, len(prompts), 64)
        ]
    )
    pictures = [pipeline.vae.decode(chunk / pipeline.vae.config.scaling_factor).sample for chunk in latents.split(64)]
    return torch.cat(pictures).clamp(-1, 1), latents


def psnr(pictures, reference):
    """Mean over the pictures, in [-1, 1], of their PSNR in dB."""
    error = ((pictures - reference) / 2).square().mean(dim=(1, 2, 3)).clamp_min(1e-10)
    return (-10 * error.log10()).mean().item()


def nearest(latents, bank, skip=None):
    """Distances (n,) to the nearest of `bank` and its indices; `skip`, indices (n, k) of `bank`, do not count."""
    distances = torch.cdist(latents.flatten(1), bank.flatten(1)) / latents[0].numel() ** 0.5
    if skip is not None:
        distances.scatter_(1, skip, float("inf"))
    return distances.min(dim=1)


def agreement(prompts, captions):
    """How often name, category and style of two lists of full captions agree, in percent."""
    pairs = [(one.rsplit(", ", 2), other.rsplit(", ", 2)) for one, other in zip(prompts, captions, strict=True)]
    shares = [sum(one[part] == other[part] for one, other in pairs) / len(pairs) for part in (0, 1, 2)]
    return " / ".join(f"{100 * share:.0f}" for share in shares)


def train_classifier(images, labels, classes, args, batch=64):
    """A small convolutional network that tells the classes of pictures (n, 3, 64, 64)."""
    torch.manual_seed(args.seed)
    layers, widths = [], (3, 32, 64, 128, 192)
    for width_in, width in zip(widths, widths[1:], strict=False):
        for channels, stride in ((width_in, 2), (width, 1)):
            layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.BatchNorm2d(width), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(width, classes))
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    steps = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps * args.style_epochs)
    for _ in range(args.style_epochs):
        for index in torch.randperm(len(images)).split(batch)[:steps]:
            x = images[index]
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
            x = x.roll(torch.randint(-4, 5, (2,)).tolist(), (2, 3)) + 0.05 * torch.rand(()) * torch.randn_like(x)
            loss = F.cross_entropy(net(x), labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def named(net, pictures, labels):
    """How often a classifier names the label with one guess, and with two, in percent."""
    guesses = torch.cat([net(chunk).topk(2).indices for chunk in pictures.split(64)]) == labels[:, None]
    return f"{100 * guesses[:, 0].float().mean():.0f} / {100 * guesses.any(1).float().mean():.0f} %"


def to_image(picture):
    pixels = ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous()
    return Image.frombytes("RGB", (pixels.shape[1], pixels.shape[0]), pixels.numpy().tobytes())


def draw_grid(path, rows, columns=4):
    """`rows`: (prompt, teacher's picture, true one, nearest, its caption, distance)."""
    side, width, height = 64, 290, 94
    grid = Image.new("RGB", (columns * width, -(-len(rows) // columns) * height + 14), "white")
    pen = ImageDraw.Draw(grid)
    for column in range(columns):
        for place, title in enumerate(("teacher", "true", "nearest trained")):
            pen.text((column * width + 4 + place * (side + 4), 1), title, fill="grey")
    for index, (prompt, *pictures, caption, distance) in enumerate(rows):
        x, y = index % columns * width + 4, index // columns * height + 14
        for place, picture in enumerate(pictures):
            grid.paste(to_image(picture), (x + place * (side + 4), y))
        name, _, style = caption.rsplit(", ", 2)
        pen.text((x, y + side), prompt[:46], fill="black")
        pen.text((x + 3 * (side + 4), y + 4), f"{name[:13]}\n{style}\n{distance:.2f}", fill="grey")
    grid.save(path, optimize=True)


def main(argv=None):
    args = parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    pipeline = StableDiffusionPipeline.from_pretrained(args.teacher)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.to(memory_format=torch.channels_last)  # twice as fast on a CPU
    scale = pipeline.vae.config.scaling_factor
    trained, trained_captions = read_shards(args.shards_dir, "train-*.tar")
    views = torch.cat([trained, trained.flip(-1)])  # a teacher may have been trained on both
    bank = encode(pipeline.vae, views)[:, 0] * scale
    held, held_captions = read_shards(args.shards_dir, f"heldout-{args.heldout}.tar")
    first = range(min(args.num_pairs, len(held)))
    splits = {"trained": (trained, trained_captions, bank), "held-out": (held, held_captions, None)}
    names = sorted({variants[0].rsplit(", ", 1)[1] for variants in trained_captions})
    styles = {
        split: torch.tensor([names.index(variants[0].rsplit(", ", 1)[1]) for variants in captions])
        for split, (_, captions, _) in splits.items()
    }
    classifier = train_classifier(trained, styles["trained"], len(names), args) if args.style_epochs else None
    print("split | to the true one | to the nearest trained | the true one to its nearest | name / category / style")
    tables = []
    for split, (images, captions, own) in splits.items():
        images, captions = images[first.start : first.stop], [captions[index] for index in first]
        truth = own[: len(first)] if own is not None else encode(pipeline.vae, images)[:, 0] * scale
        skip = torch.arange(len(first))[:, None] + torch.tensor([0, len(trained)]) if own is not None else None
        prompts = {kind: [variants[index] for variants in captions] for index, kind in enumerate(KINDS)}
        for kind, texts in prompts.items():
            pictures, latents = sample(pipeline, texts, 50, args)
            few = [psnr(sample(pipeline, texts, steps, args)[0], pictures) for steps in args.steps]
            tables.append(f"{split}, {kind} | " + " | ".join(f"{value:.1f}" for value in few))
            if kind == "full":
                found, true = nearest(latents, bank), nearest(truth, bank, skip)
                near, near_true = (
                    [trained_captions[index % len(trained)][0] for index in result.indices] for result in (found, true)
                )
                apart = (latents - truth).square().mean(dim=(1, 2, 3)).sqrt().mean()
                print(
                    f"{split} | {apart:.2f} | {found.values.mean():.2f} | {true.values.mean():.2f} | "
                    f"{agreement(texts, near)} % (the true picture's: {agreement(texts, near_true)} %)"
                )
                if split == "held-out":
                    if classifier:
                        labels = styles[split][: len(first)]
                        found_styles, true_styles = (named(classifier, x, labels) for x in (pictures, images))
                        print(f"{split} | style named, one guess / two | {found_styles} (true ones: {true_styles})")
                    neighbours = views[found.indices]
                    rows = zip(texts, pictures, images, neighbours, near, found.values.tolist(), strict=True)
                    draw_grid(args.output_dir / "heldout.png", list(rows))
    print(f"\nPSNR to 50 steps, guidance {args.guidance_scale:g} | " + " | ".join(map(str, args.steps)))
    print("\n".join(tables))


if __name__ == "__main__":
    main()
