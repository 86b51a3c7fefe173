#!/usr/bin/env python
# Copyright 2026 the authors of this repository. Licensed under the Apache License, Version 2.0.
"""Latent Consistency Distillation of Stable Diffusion 1.x/2.x (Luo et al., arXiv:2310.04378, Algorithm 1).

A student U-Net f learns to jump from any point of the teacher's guided probability-flow trajectory to its end, so that
one to eight steps are enough. With x_t = α_t x_0 + σ_t ε on the grid τ_i = (i+1)·(T//N) − 1, i = 0 … N−1:

    i ~ U{0 … N−1},  w ~ U[w_min, w_max],  ε ~ N(0, I),  t = τ_i,  prev = τ_{i−1} (0 below the grid)
    x̂_0, ε̂  = teacher(x_t, c) + w·(teacher(x_t, c) − teacher(x_t, ∅))        both guided, LCM §4.3
    x̂_prev  = α_prev x̂_0 + σ_prev ε̂                                         one DDIM step of the teacher
    loss    = d(f_θ(x_t, w, c, t), f_θ⁻(x̂_prev, w, c, prev))                  d: l2 or Huber, θ⁻: EMA of θ
    f(x, t) = c_skip(t) x + c_out(t) x̂_0(x, t)                               c_skip(0) = 1, c_out(0) = 0

w is given to the student as an embedding; `guidance_scale` of a diffusers pipeline is w + 1. Launch with

    accelerate launch train_lcm_distill_sd_wds.py --pretrained_teacher_model=stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --train_shards_path_or_url="cc12m/{00000..01242}.tar" --max_train_samples=12000000 --max_train_steps=10000 \
        --train_batch_size=24 --mixed_precision=bf16 --gradient_checkpointing --output_dir=lcm-sd15

`output_dir` then holds a StableDiffusionPipeline with a matching LCMScheduler. The first pictures to trust come after a
few thousand steps; `fidelity/*` in metrics.jsonl tells earlier whether the student follows its teacher. A run that was
stopped goes on with `--resume_from_checkpoint=latest`, and ends in the very weights of a run that was not.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import logging
import math
import os
import random
import re
import resource
import select
import shlex
import shutil
import signal
import tarfile
import time
import urllib.request
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.optimization import get_scheduler
from huggingface_hub import ModelCard, create_repo, upload_folder
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import AutoTokenizer, CLIPTextModel
from webdataset.gopen import Pipe, gopen
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys, tar_file_iterator

logger = logging.getLogger("train")

# ------------------------------------------------------------------------------------------------------- arguments


def fail(message):
    """Ends the process with one line that says what to do, instead of a traceback."""
    raise SystemExit(f"error: {message}")


def add_model_args(parser):
    group = parser.add_argument_group("models")
    add = group.add_argument
    add("--pretrained_teacher_model", required=True, help="hub id or folder of the pipeline to distil")
    add("--pretrained_vae_model_name_or_path", help="another VAE: hub id or folder")
    add("--teacher_revision", help="revision of the teacher's repository")
    add("--revision", help="revision of the VAE's repository (--pretrained_vae_model_name_or_path)")
    add("--cache_dir", help="where downloaded models are kept")
    add("--cast_teacher_unet", action=argparse.BooleanOptionalAction, help="teacher in the compute precision (default)")
    add("--unet_time_cond_proj_dim", type=int, default=256, help="width of the guidance embedding w")
    add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, about 1/4 slower")
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="xformers instead of PyTorch's sdpa")
    add("--compile", action="store_true", help="torch.compile the U-Nets: minutes at the start, faster afterwards")


def add_data_args(parser):
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--train_shards_path_or_url", nargs="+", required=True, metavar="SHARDS",
        help="tar shards: brace patterns, paths, http(s) URLs, pipe: commands, or a .txt list with one a line")  # fmt: skip
    add("--max_train_samples", type=int, help="samples in an epoch (counted at the start where shards are local files)")
    add("--resolution", type=int, default=512, help="side of the square training images, in pixels")
    add("--interpolation_type", default="bilinear", choices=sorted(INTERPOLATION), help="filter of the resize")
    add("--center_crop", action="store_true", help="crop the centre instead of a random place")
    add("--random_flip", action="store_true", help="mirror half of the images")
    add("--proportion_empty_prompts", type=float, default=0.0, help="share of captions that are replaced by ''")
    add("--min_image_size", type=int, default=0, help="skip samples whose JSON gives a smaller side (0: keep all)")
    add("--max_pwatermark", type=float, default=0.5, help="skip samples whose JSON gives a higher pwatermark")
    add("--max_bad_samples", type=float, default=0.5, help="stop if more than this share of 1,000 samples is broken")
    add("--shuffle_buffer_size", type=int, default=1000, help="undecoded samples a loader worker shuffles")
    add("--shard_timeout", type=float, default=60.0, help="seconds without data after which a URL or pipe is given up")
    add(
        "--dataloader_num_workers",
        type=int,
        default=4,
        help="loader processes a rank (0: load in the training process)",
    )


def add_method_args(parser):
    group = parser.add_argument_group("distillation")
    add = group.add_argument
    add("--num_ddim_timesteps", type=int, default=50, help="N, points of the teacher's DDIM grid")
    add("--w_min", type=float, default=5.0, help="lowest guidance weight (w = guidance_scale - 1)")
    add("--w_max", type=float, default=15.0, help="highest guidance weight; 0 with --w_min 0: no unconditional pass")
    add("--loss_type", default="l2", choices=["l2", "huber"], help="distance d")
    add("--huber_c", type=float, default=0.001, help="c in sqrt(d² + c²) − c")
    add("--ema_decay", type=float, default=0.95, help="decay of the target network θ⁻")
    add("--timestep_scaling_factor", type=float, default=10.0, help="s in c_skip and c_out")


def add_training_args(parser):
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--seed", type=int, default=0, help="of data order, noise, timesteps and guidance weights")
    add("--train_batch_size", type=int, default=16, help="images a process and micro-step")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-steps in an optimizer step")
    add("--num_train_epochs", type=int, default=100, help="epochs, where --max_train_steps is not given")
    add("--max_train_steps", type=int, help="optimizer steps in all")
    add("--learning_rate", type=float, default=8e-6, help="peak learning rate")
    add("--scale_lr", action="store_true", help="multiply it by batch size × accumulation × processes")
    add("--lr_scheduler", default="constant", choices=LR_SCHEDULERS, help="schedule of the learning rate")
    add("--lr_warmup_steps", type=int, default=500, help="optimizer steps of linear warm-up (not for 'constant')")
    add("--use_8bit_adam", action="store_true", help="bitsandbytes AdamW8bit: a quarter of the optimizer's memory")
    add("--adam_beta1", type=float, default=0.9, help="decay of the first moment")
    add("--adam_beta2", type=float, default=0.999, help="decay of the second moment")
    add("--adam_weight_decay", type=float, default=1e-2, help="decoupled weight decay")
    add("--adam_epsilon", type=float, default=1e-8, help="epsilon of Adam")
    add("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this norm")
    add("--mixed_precision", default=None, choices=["no", "fp16", "bf16"], help="default: as `accelerate config` says")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later")
    add("--vae_encode_batch_size", type=int, default=32, help="images the VAE encodes at once")


def add_output_args(parser):
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--output_dir", default="lcm-distilled", help="folder of the run")
    add("--logging_dir", default="logs", help="tracker files, below --output_dir")
    add("--logging_steps", type=int, default=10, help="steps between two lines of metrics.jsonl (each one a host sync)")
    add("--report_to", default="tensorboard", choices=["tensorboard", "wandb", "all", "none"], help="trackers")
    add("--tracker_project_name", default="lcm-distill", help="project in the trackers")
    add("--checkpointing_steps", type=int, default=500, help="steps between two checkpoints (0: none)")
    add("--checkpoints_total_limit", type=int, help="checkpoints to keep")
    add("--resume_from_checkpoint", help="'latest' or a checkpoint folder")
    add("--validation_steps", type=int, default=200, help="steps between two validations (0: none)")
    add("--validation_prompts", nargs="+", default=DEFAULT_PROMPTS, help="texts, or .txt files with one prompt a line")
    add("--validation_negative_prompt", default="", help="negative prompt of the teacher in validation")
    add("--validation_guidance_scale", type=float, help="w + 1 (default: the middle of the trained range)")
    add("--validation_num_inference_steps", type=int, nargs="+", default=[1, 2, 4, 8], help="steps of the student")
    add("--num_validation_images", type=int, default=2, help="seeds for each prompt, for the fidelity figures")
    add("--push_to_hub", action="store_true", help="upload the exported pipeline")
    add("--hub_model_id", help="repository to push to (default: the name of --output_dir)")
    add("--hub_token", help="token for the upload; never written to any file")


class ArgumentParser(argparse.ArgumentParser):
    """Shows defaults in --help and reads further arguments from `@file` (shell quoting, # comments)."""

    def __init__(self, **kwargs):
        formatter = functools.partial(argparse.ArgumentDefaultsHelpFormatter, max_help_position=44, width=120)
        super().__init__(formatter_class=formatter, fromfile_prefix_chars="@", allow_abbrev=False, **kwargs)

    def convert_arg_line_to_args(self, arg_line):
        return shlex.split(arg_line, comments=True)


def parse_args(argv=None):
    """Reads the command line and refuses what can be known to be wrong without opening a file."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    for add_group in (add_model_args, add_data_args, add_method_args, add_training_args, add_output_args):
        add_group(parser)
    args = parser.parse_args(argv)
    positive = ["resolution", "num_ddim_timesteps", "train_batch_size", "gradient_accumulation_steps", "logging_steps"]
    positive += ["num_train_epochs", "vae_encode_batch_size", "shuffle_buffer_size", "num_validation_images"]
    optional = ["max_train_steps", "max_train_samples", "checkpoints_total_limit"]
    for name in positive + [name for name in optional if getattr(args, name) is not None]:
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    for name, low, high in [("ema_decay", 0, 1), ("proportion_empty_prompts", 0, 1), ("max_bad_samples", 0, 1)]:
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name} must lie in [{low}, {high}], got {getattr(args, name)}")
    if not 0 <= args.w_min <= args.w_max:
        parser.error(f"needed: 0 <= --w_min <= --w_max, got {args.w_min} and {args.w_max}")
    if not all(1 <= k <= args.num_ddim_timesteps for k in args.validation_num_inference_steps):
        parser.error("--validation_num_inference_steps must lie in 1 … --num_ddim_timesteps")
    if args.mixed_precision is None:
        args.mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if args.cast_teacher_unet is None:
        args.cast_teacher_unet = args.mixed_precision != "no"
    if args.validation_guidance_scale is None:
        args.validation_guidance_scale = (args.w_min + args.w_max) / 2 + 1
    return args


def check_environment(args):
    """Refuses what this machine cannot do: a folder it cannot write, xformers, bitsandbytes, fp16, trackers."""
    output = Path(args.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with open(output / f".writable-{os.getpid()}", "wb"):
            pass
        (output / f".writable-{os.getpid()}").unlink()
    except OSError as error:
        fail(f"--output_dir {output} cannot be written: {error}")
    gpu = torch.cuda.is_available()
    if args.mixed_precision == "fp16" and not gpu:
        fail("--mixed_precision fp16 needs a GPU; use bf16 or no")
    wanted = {"wandb": args.report_to in ("wandb", "all"), "tensorboard": args.report_to in ("tensorboard", "all")}
    wanted |= {"xformers": args.enable_xformers_memory_efficient_attention, "bitsandbytes": args.use_8bit_adam}
    for package in [package for package, is_wanted in wanted.items() if is_wanted]:
        try:
            __import__(package)
        except Exception as error:
            fail(f"a flag asks for {package}, which cannot be imported here ({error}); install it or drop the flag")
    if args.enable_xformers_memory_efficient_attention and not gpu:
        fail("--enable_xformers_memory_efficient_attention needs a GPU; without it PyTorch's attention is used")
    if not args.resume_from_checkpoint and list_checkpoints(output):
        fail(f"{output} holds checkpoints of another run; add --resume_from_checkpoint latest or take another folder")


def redact(value):
    """Takes credentials out of shard URLs and commands before they are written anywhere."""
    if isinstance(value, list):
        return [redact(item) for item in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"(?<=://)[^/@\s]+@", "…@", value)
    value = re.sub(r"(?i)([?&][^=&\s]*(?:token|sig|key|secret|credential|password)[^=&\s]*=)[^&\s'\"]+", r"\1…", value)
    return re.sub(r"(?i)(bearer|token|password)(\s*[:= ]\s*)[^\s'\"]+|hf_\w{8,}", r"\1\2…", value)


def public_args(args):
    """The arguments as they may be written to files and trackers: without tokens."""
    return {name: redact(value) for name, value in vars(args).items() if name != "hub_token"}


# ------------------------------------------------------------------------------------------------------------ data

IMAGE_MEMBERS, CAPTION_MEMBERS = ("jpg", "jpeg", "png", "webp"), ("txt", "text", "caption")
MEMBERS = {*IMAGE_MEMBERS, *CAPTION_MEMBERS, "json"}  # nothing else of a shard is ever read
MAX_IMAGE_PIXELS = 2**26
SKIP_REASONS = ("unreadable shard", "duplicate member", "no image", "no caption", "broken image", "image too large",
                "below min_image_size", "above max_pwatermark")  # fmt: skip
FILTERS = ("below min_image_size", "above max_pwatermark")


class BadSample(Exception):
    """A sample that is skipped; `args` are one of SKIP_REASONS and a detail for the log."""


class ShardReader:
    """Reads a subprocess's output (webdataset opens URLs and `pipe:` commands as such) with a time limit.

    Raises TimeoutError after `timeout` seconds without a byte, OSError if the command failed.
    """

    def __init__(self, pipe, timeout):
        self.pipe, self.timeout = pipe, timeout

    def read(self, size):
        ready, _, _ = select.select([self.pipe.stream], [], [], self.timeout)
        if not ready:
            raise TimeoutError(f"no data for {self.timeout:g} s")
        data = os.read(self.pipe.stream.fileno(), size)
        if not data and (status := self.pipe.proc.wait(self.timeout)) != 0:
            raise OSError(f"command ended with status {status}")
        return data

    def close(self):
        self.pipe.proc.kill()
        self.pipe.stream.close()
        self.pipe.proc.wait()


def open_shard(url, timeout):
    """Opens a path, URL or `pipe:` command with webdataset's own opener."""
    stream = gopen(url, "rb")
    return ShardReader(stream, timeout) if isinstance(stream, Pipe) else stream


def read_shard(url, timeout, tries=3):
    """Yields the undecoded samples of a shard: dicts of member name → bytes, plus `__key__`.

    URLs and pipes that fail are tried again, after 1 and 2 seconds, from where they broke off. What is left of a shard that fails for
    good, and members that stand twice, are yielded as samples with a `__fault__`, so that they are counted with the others.
    """

    def is_wanted(name):
        return name.rsplit(".", 1)[-1].lower() in MEMBERS

    def duplicate(error):
        faults.append({"__key__": url, "__fault__": BadSample("duplicate member", str(error.args[0]))})
        return True

    done, faults, is_remote = 0, [], url.startswith("pipe:") or "://" in url
    for attempt in range(tries if is_remote else 1):
        try:
            faults.clear()
            with contextlib.closing(open_shard(url, timeout)) as stream:
                members = ({**member, "__url__": url} for member in tar_file_iterator(stream, select_files=is_wanted))
                for index, sample in enumerate(group_by_keys(members, handler=duplicate)):
                    if index == done:
                        done += 1
                        yield sample
                while stream.read(1 << 16):  # the command's exit status counts, after the end of the archive too
                    pass
            break
        except (OSError, EOFError, ValueError, tarfile.TarError) as error:
            fault = BadSample("unreadable shard", f"{redact(url)}: {error}")
            if attempt + 1 < tries and is_remote:
                time.sleep(2**attempt)
            else:
                faults.append({"__key__": url, "__fault__": fault})
    yield from faults


def shuffled(samples, size, rng):
    """Shuffles an iterator through a buffer of `size` items."""
    buffer = []
    for sample in samples:
        buffer.append(sample)
        if len(buffer) >= size:
            index = rng.randrange(len(buffer))
            buffer[index], buffer[-1] = buffer[-1], buffer[index]
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer


INTERPOLATION = {
    name: getattr(Image.Resampling, name.upper()) for name in Image.Resampling.__members__ for name in [name.lower()]
}
INTERPOLATION["nearest_exact"] = Image.Resampling.NEAREST


def to_rgb(image):
    """Converts every PIL mode to RGB: 16-bit grey scaled, transparency over white, CMYK and palettes resolved."""
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray((np.asarray(image, dtype=np.float32) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_image(data, resolution, resample):
    """Decodes image bytes so that the shorter side is `resolution` pixels; JPEGs are decoded at reduced size.

    Returns the upright RGB image and its size (width, height) before the resize. Raises BadSample.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise BadSample("image too large", f"{image.width}x{image.height} pixels")
        original, scale = image.size, resolution / min(image.size)
        image.draft(None, [math.ceil(side * scale) for side in image.size])
        image = to_rgb(ImageOps.exif_transpose(image))
    except BadSample:
        raise
    except Exception as error:  # decoders raise almost anything on damaged data
        raise BadSample("broken image", f"{type(error).__name__}: {error}") from error
    if (image.width < image.height) != (original[0] < original[1]):
        original = original[::-1]
    size = [max(resolution, round(side * resolution / min(original))) for side in original]
    return image.resize(size, resample), original


def read_captions(sample, info):
    """Returns the captions of a sample: its text members, or `caption`/`text` (a string or a list) of its JSON."""
    captions = [sample[name].decode("utf-8", errors="replace").strip() for name in CAPTION_MEMBERS if name in sample]
    for name in ("caption", "captions", "text"):
        if not captions and info.get(name) is not None:
            value = info[name]
            captions = [str(text).strip() for text in (value if isinstance(value, list) else [value])]
    return captions


def check_filters(info, args):
    """Applies the size and watermark filters to a sample's JSON. What is missing or not a number never rejects."""

    def number(*names):
        values = [info.get(name) for name in names if isinstance(info.get(name), (int, float))]
        return values[0] if values else None

    sides = [number("original_width", "width", "WIDTH"), number("original_height", "height", "HEIGHT")]
    if any(side is not None and side < args.min_image_size for side in sides):
        raise BadSample("below min_image_size", f"{sides[0]}x{sides[1]}")
    if (pwatermark := number("pwatermark")) is not None and pwatermark > args.max_pwatermark:
        raise BadSample("above max_pwatermark", f"pwatermark {pwatermark}")


def decode_sample(sample, args, rng):
    """Turns an undecoded sample into `(pixels, caption)`; pixels: uint8, (3, resolution, resolution). Raises BadSample.

    `rng` decides caption, caption dropout, crop and flip, always in this order and number of draws.
    """
    pick, drop, left, top, flip = (rng.random() for _ in range(5))
    if "__fault__" in sample:
        raise sample["__fault__"]
    try:
        info = json.loads(sample.get("json", b"{}"))
    except ValueError:
        info = {}
    info = info if isinstance(info, dict) else {}
    check_filters(info, args)
    found = ", ".join(sorted(name for name in sample if not name.startswith("__")))
    data = next((sample[name] for name in IMAGE_MEMBERS if name in sample), None)
    if data is None:
        raise BadSample("no image", f"needed: {', '.join(IMAGE_MEMBERS)}; found: {found}")
    captions = read_captions(sample, info)
    if not captions:
        raise BadSample("no caption", f"needed: {', '.join(CAPTION_MEMBERS)} or a JSON field caption; found: {found}")
    caption = captions[int(pick * len(captions))] if drop >= args.proportion_empty_prompts else ""
    image, _ = load_image(data, args.resolution, INTERPOLATION[args.interpolation_type])
    left, top = (0.5, 0.5) if args.center_crop else (left, top)
    x, y = int(left * (image.width - args.resolution + 1)), int(top * (image.height - args.resolution + 1))
    image = image.crop((x, y, x + args.resolution, y + args.resolution))
    if args.random_flip and flip < 0.5:
        image = ImageOps.mirror(image)
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()), caption


class ShardStream(torch.utils.data.IterableDataset):
    """An endless, exactly resumable stream of batches over shards: a pure function of (seed, position).

    Shard position p means shard permutation(epoch = p // S)[p % S], seeded by (seed, epoch). The stream's items are
    `leftover` (positions with the number of samples already used) and then all positions from `next` on; global worker
    g of G takes the items g, g + G, …. The cursor of a worker, (item, sample), is what it will read next; samples are
    counted in the shard's shuffled order, which depends on (seed, p) alone, and so does every random choice in decoding.

    `state` is what `state_dict()` of the run's `BatchReader`s gave, or None. A batch is a dict: pixel_values uint8
    (batch, 3, height, width), captions, worker, cursor, skipped (Counter by reason) and details (the first of each).
    """

    def __init__(self, urls, args, rank=0, world_size=1, state=None):
        self.urls, self.args, self.rank = urls, args, rank
        self.num_workers = max(1, args.dataloader_num_workers)
        self.state = resume_stream(state, world_size * self.num_workers)

    def item(self, index):
        return stream_item(self.state, index)

    def shard_samples(self, position, start):
        """Yields (number, undecoded sample) of the shard at `position`, from sample `start` of its shuffled order."""
        epoch, index = divmod(position, len(self.urls))
        order = list(range(len(self.urls)))
        random.Random(f"{self.args.seed}/epoch/{epoch}").shuffle(order)
        samples = read_shard(self.urls[order[index]], self.args.shard_timeout)
        rng = random.Random(f"{self.args.seed}/shard/{position}")
        for number, sample in enumerate(shuffled(samples, self.args.shuffle_buffer_size, rng)):
            if number >= start:
                yield number, sample

    def usable_samples(self, worker):
        """Yields (pixels, caption, cursor after it, skipped, details) for ever. Raises BadSample when too few are usable."""
        recent, skipped, details, barren = deque(maxlen=1000), Counter(), {}, 0
        item, start = self.state["cursors"][self.rank * self.num_workers + worker]
        while True:
            position, offset = self.item(item)
            barren += 1
            for number, sample in self.shard_samples(position, max(start, offset)):
                try:
                    rng = random.Random(f"{self.args.seed}/sample/{position}/{number}")
                    pixels, caption = decode_sample(sample, self.args, rng)
                except BadSample as bad:
                    reason, detail = bad.args
                    skipped[reason] += 1
                    details.setdefault(reason, f"{redact(sample['__key__'])}: {detail}")
                    recent.append(reason)
                    faults = sum(reason is not None and reason not in FILTERS for reason in recent)
                    if len(recent) == 1000 and (faults > 1000 * self.args.max_bad_samples or None not in recent):
                        raise BadSample("of the last 1,000 samples too many were skipped", dict(skipped)) from bad
                    continue
                recent.append(None)
                yield pixels, caption, (item, number + 1), skipped, details
                skipped, details, barren = Counter(), {}, 0
            if barren > len(self.urls):
                raise BadSample("a whole epoch gave no usable sample", dict(skipped))
            item, start = item + self.state["stride"], 0

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker = ((info.id if info else 0) + self.state["turn"]) % self.num_workers
        samples, batch, skipped, details = self.usable_samples(worker), [], Counter(), {}
        try:
            for pixels, caption, cursor, new_skipped, new_details in samples:
                batch.append((pixels, caption))
                skipped, details = skipped + new_skipped, {**new_details, **details}
                if len(batch) == self.args.train_batch_size:
                    pixel_values = torch.stack([pixels for pixels, _ in batch])
                    captions = [caption for _, caption in batch]
                    yield {"pixel_values": pixel_values, "captions": captions, "worker": worker, "cursor": cursor,
                           "skipped": dict(skipped), "details": details}  # fmt: skip
                    batch, skipped, details = [], Counter(), {}
        except BadSample as bad:  # an exception would reach the trainer as a traceback of the worker
            yield {"error": f"{bad.args[0]}: {bad.args[1]}; see --max_bad_samples and the filters in --help"}


def stream_item(state, index):
    """Returns (shard position, samples of it already used) of the stream's item `index`."""
    leftover = state["leftover"]
    return tuple(leftover[index]) if index < len(leftover) else (state["next"] + index - len(leftover), 0)


def resume_stream(state, stride):
    """Returns the stream state with which `stride` global workers go on where the workers of `state` stopped.

    With as many workers the state is taken as it is: the run goes on exactly. Otherwise what was not used becomes the
    new list of items: no sample of the epoch is repeated or lost, but the order of the samples changes.
    """
    if state is None:
        state = {"leftover": [], "next": 0}
    elif state["stride"] == stride:
        return state
    else:
        cursors, leftover = state["cursors"], []
        end = max([len(state["leftover"]), *(item + 1 for item, _ in cursors)])
        for index in range(min(item for item, _ in cursors), end):
            item, sample = cursors[index % len(cursors)]
            position, offset = stream_item(state, index)
            if index >= item:
                leftover.append([position, max(offset, sample) if index == item else offset])
        state = {"leftover": leftover, "next": stream_item(state, end)[0]}
        logger.warning("The number of loader workers changed: no sample is repeated or lost, but the order changes.")
    return {**state, "stride": stride, "cursors": [[g, 0] for g in range(stride)], "turn": 0}


class BatchReader:
    """Hands out the batches of a rank's ShardStream and keeps the cursor of each worker's last batch that was used."""

    def __init__(self, stream, device):
        self.stream, self.turn, self.waited, self.skipped, self.named = (
            stream,
            stream.state["turn"],
            0.0,
            Counter(),
            set(),
        )
        first = stream.rank * stream.num_workers
        self.cursors = [list(cursor) for cursor in stream.state["cursors"][first : first + stream.num_workers]]
        workers = stream.args.dataloader_num_workers
        prefetch = {"prefetch_factor": 4, "persistent_workers": True} if workers else {}
        pin = device.type == "cuda"
        self.loader = torch.utils.data.DataLoader(
            stream, batch_size=None, num_workers=workers, pin_memory=pin, **prefetch
        )
        self.batches = iter(self.loader)

    def next_batch(self):
        start = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - start
        if "error" in batch:
            fail(batch["error"])
        self.cursors[batch["worker"]] = list(batch["cursor"])
        self.turn = (batch["worker"] + 1) % self.stream.num_workers
        self.skipped.update(batch["skipped"])
        for reason in batch["details"].keys() - self.named:
            self.named.add(reason)
            logger.warning(
                "Skipped a sample (%s), and from now on count such ones: %s", reason, batch["details"][reason]
            )
        return batch


def expand_shards(patterns):
    """Expands brace patterns and `.txt` lists (one shard a line; no `pipe:` commands, which only a user may give)."""
    urls = []
    for pattern in patterns:
        if pattern.endswith(".txt") and not pattern.startswith("pipe:"):
            if not os.path.isfile(pattern):
                fail(f"--train_shards_path_or_url: the list {pattern} does not exist")
            lines = [line.strip() for line in Path(pattern).read_text(encoding="utf-8").splitlines()]
            listed = [url for line in lines if line and not line.startswith("#") for url in expand_urls(line)]
            if any(url.startswith("pipe:") for url in listed):
                fail(f"{pattern}: a list of shards may not hold pipe: commands; give them on the command line")
            urls += listed
        else:
            urls += expand_urls(pattern)
    if not urls:
        fail("--train_shards_path_or_url names no shard")
    return urls


def check_shards(urls, args, most=100):
    """Names every local shard that is missing and every URL (of the first `most`) that does not answer; never hangs.

    Then reads until a sample is usable, and if the first shard holds none says what was found instead.
    """

    def problem(url):
        try:
            if url.startswith(("http://", "https://")):
                request = urllib.request.Request(url, headers={"Range": "bytes=0-511"})
                urllib.request.urlopen(request, timeout=min(10.0, args.shard_timeout)).close()
            elif not url.startswith("pipe:") and "://" not in url.removeprefix("file:"):
                with open(re.sub("^file:(//)?", "", url), "rb"):
                    pass
        except (OSError, ValueError) as error:
            return f"{redact(url)} ({error.strerror or error if isinstance(error, OSError) else error})"

    is_local = {url: "://" not in url for url in urls}
    with ThreadPoolExecutor(16) as pool:
        chosen = [url for url in urls if is_local[url]] + [url for url in urls if not is_local[url]][:most]
        problems = [text for text in pool.map(problem, dict.fromkeys(chosen)) if text]
    if problems:
        fail(f"{len(problems)} of {len(urls)} shards cannot be read: " + "; ".join(problems))
    reasons, examples = Counter(), {}
    for sample in read_shard(urls[0], args.shard_timeout, tries=1):
        try:
            decode_sample(sample, args, random.Random(0))
            return
        except BadSample as bad:
            reasons[bad.args[0]] += 1
            examples.setdefault(bad.args[0], bad.args[1])
    text = "; ".join(f"{count} × {reason} ({examples[reason]})" for reason, count in reasons.most_common())
    fail(f"the first shard {redact(urls[0])} holds no usable sample: {text or 'it is empty'}")


def count_samples(urls):
    """Counts the images in local shards from their tar headers, for runs without --max_train_samples."""
    if any("://" in url or url.startswith("pipe:") for url in urls):
        fail("give --max_train_steps, or --max_train_samples: samples behind URLs and pipes are not counted")
    total = 0
    for url in urls:
        with tarfile.open(url) as shard:
            total += sum(name.rsplit(".", 1)[-1].lower() in IMAGE_MEMBERS for name in shard.getnames())
    return total


# -------------------------------------------------------------------------------------------------- diffusion maths


class Schedule:
    """The teacher's noise schedule, always float32, and the DDIM grid τ_i = (i + 1)·(T // N) − 1, prev(τ_0) = 0.

    Timesteps `t` have shape (batch,), images and latents x (batch, channels, height, width).
    """

    def __init__(self, scheduler, num_ddim_timesteps, device):
        alphas_cumprod = scheduler.alphas_cumprod.to(device, torch.float32)
        self.alphas, self.sigmas = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        self.prediction_type = scheduler.config.prediction_type
        self.num_train_timesteps = len(alphas_cumprod)
        step = self.num_train_timesteps // num_ddim_timesteps
        self.grid = torch.arange(1, num_ddim_timesteps + 1, device=device) * step - 1
        self.prev = F.pad(self.grid[:-1], (1, 0))

    def alpha_sigma(self, t):
        """α_t and σ_t, shape (batch, 1, 1, 1)."""
        return self.alphas[t].view(-1, 1, 1, 1), self.sigmas[t].view(-1, 1, 1, 1)

    def add_noise(self, x_0, eps, t):
        """x_t = α_t x_0 + σ_t ε; with a prediction (x̂_0, ε̂) and s in place of t, the DDIM jump to s."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x_0 + sigma * eps

    jump = add_noise

    def x0_eps(self, output, x_t, t):
        """Network output → (x̂_0, ε̂), for the three prediction types."""
        alpha, sigma = self.alpha_sigma(t)
        if self.prediction_type == "epsilon":
            return (x_t - sigma * output) / alpha, output
        if self.prediction_type == "v_prediction":
            return alpha * x_t - sigma * output, alpha * output + sigma * x_t
        return output, (x_t - alpha * output) / sigma


def guidance_embedding(w, dim):
    """Sinusoidal embedding of 1000·w, shape (batch, dim); equals `get_guidance_scale_embedding` of the pipelines."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=w.device) * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * w.float()[:, None] * frequencies[None]
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


def distance(a, b, loss_type, huber_c):
    """d(a, b) in float32: mean square, or Huber, mean of sqrt(d² + c²) − c."""
    square = (a.float() - b.float()) ** 2
    return square.mean() if loss_type == "l2" else ((square + huber_c**2).sqrt() - huber_c).mean()


# ------------------------------------------------------------------------------------------------------------ method


@dataclasses.dataclass
class Draws:
    """All randomness of a step: noise ε (like the latents), grid index i and guidance weight w, both (batch,)."""

    eps: torch.Tensor
    index: torch.Tensor
    w: torch.Tensor


def draw(x_0, schedule, args, generator):
    """Makes the random draws of a step (Alg. 1, line 4)."""
    batch, device = x_0.shape[0], x_0.device
    eps = torch.randn(x_0.shape, generator=generator, device=device)
    index = torch.randint(len(schedule.grid), (batch,), generator=generator, device=device)
    w = args.w_min + (args.w_max - args.w_min) * torch.rand(batch, generator=generator, device=device)
    return Draws(eps, index, w)


class Denoiser:
    """A U-Net in the paper's terms: `net(x_t, t, c, w)` runs it in its own precision, and gives its output in float32.

    c: (batch, tokens, width). w (batch,) goes in as an embedding where the U-Net takes one, and is ignored elsewhere.
    """

    def __init__(self, unet, config=None):
        self.unet, self.dtype = unet, next(unet.parameters()).dtype
        self.embeds_guidance = (config or unet.config).time_cond_proj_dim

    def __call__(self, x_t, t, c, w):
        w = guidance_embedding(w, self.embeds_guidance).to(self.dtype) if self.embeds_guidance else None
        return self.unet(x_t.to(self.dtype), t, c.to(self.dtype), timestep_cond=w, return_dict=False)[0].float()


def guided_prediction(teacher, schedule, x_t, t, c, uncond, w):
    """The teacher's (x̂_0, ε̂), both guided (LCM §4.3): cond + w·(cond − uncond), in one batch of two halves.

    With `uncond` None (w = 0, or a teacher that embeds w itself) the unconditional half is not run.
    """
    if uncond is None:
        return schedule.x0_eps(teacher(x_t, t, c, w), x_t, t)
    x_twice, t_twice = torch.cat([x_t, x_t]), torch.cat([t, t])
    output = teacher(x_twice, t_twice, torch.cat([c, uncond.expand_as(c)]), None)
    pairs = [value.chunk(2) for value in schedule.x0_eps(output, x_twice, t_twice)]
    w = w.view(-1, 1, 1, 1)
    return [cond + w * (cond - without) for cond, without in pairs]


def consistency_function(net, schedule, x_t, t, c, w, scaling):
    """f(x_t, w, c, t) = c_skip(t) x_t + c_out(t) x̂_0, with f(x, 0) = x; LCM §4.1, σ_data = 0.5, `scaling` = s."""
    x_0, _ = schedule.x0_eps(net(x_t, t, c, w), x_t, t)
    scaled_t, sigma_data = scaling * t.view(-1, 1, 1, 1).float(), 0.5
    c_skip = sigma_data**2 / (scaled_t**2 + sigma_data**2)
    c_out = scaled_t / (scaled_t**2 + sigma_data**2).sqrt()
    return c_skip * x_t + c_out * x_0


def distillation_loss(student, target, teacher, schedule, x_0, c, uncond, draws, args):
    """Latent consistency distillation, arXiv:2310.04378, Algorithm 1: a pure function of networks, data and draws.

    x_0: latents (batch, channels, height/8, width/8); c: (batch, tokens, width); uncond: (1, tokens, width) or None.
    """
    f = functools.partial(consistency_function, schedule=schedule, c=c, w=draws.w, scaling=args.timestep_scaling_factor)
    t, t_prev = schedule.grid[draws.index], schedule.prev[draws.index]
    x_t = schedule.add_noise(x_0, draws.eps, t)  # Alg. 1, line 5
    with torch.no_grad():  # before the student, so that these activations are gone when its graph is built
        x0_hat, eps_hat = guided_prediction(teacher, schedule, x_t, t, c, uncond, draws.w)
        x_prev = schedule.jump(x0_hat, eps_hat, t_prev)  # line 6, one solver step
        f_target = f(target, x_t=x_prev, t=t_prev)
    f_student = f(student, x_t=x_t, t=t)
    return distance(f_student, f_target, args.loss_type, args.huber_c)  # line 7


# ------------------------------------------------------------------------------------------------------------ models


@dataclasses.dataclass
class Models:
    """The networks of a run. `student` and `target` are float32, the others in the compute precision and frozen."""

    tokenizer: object
    text_encoder: torch.nn.Module
    vae: torch.nn.Module
    teacher: torch.nn.Module
    student: torch.nn.Module
    target: torch.nn.Module
    schedule: Schedule
    scheduler: object  # the teacher's, as a DDPMScheduler: its configuration is exported


def check_teacher(args):
    """Reads the teacher's small configuration files and refuses what is not a text-to-image latent U-Net of SD 1.x/2.x.

    Returns its scheduler. Raises SystemExit with one line that names the flag, or the script to use instead.
    """
    path = args.pretrained_teacher_model
    source = {"revision": args.teacher_revision, "cache_dir": args.cache_dir}
    try:
        parts = DiffusionPipeline.load_config(path, **source)
        scheduler = DDPMScheduler.from_pretrained(path, subfolder="scheduler", **source)
        unet = UNet2DConditionModel.load_config(path, subfolder="unet", **source) if "unet" in parts else None
    except (OSError, ValueError) as error:
        fail(f"--pretrained_teacher_model {path} cannot be read as a diffusers pipeline: {str(error).splitlines()[0]}")
    if unet is None:
        fail(
            f"{path} is a {parts.get('_class_name')} without a U-Net; this script distils Stable Diffusion 1.x and 2.x"
        )
    if "text_encoder_2" in parts:
        refiner = not parts.get("text_encoder", [None])[0]
        fail(f"{path} is an SDXL refiner, which is no text-to-image model" if refiner else
             f"{path} is an SDXL pipeline; use train_lcm_distill_lora_sdxl_wds.py")  # fmt: skip
    if unet["in_channels"] != unet["out_channels"]:
        fail(f"{path} takes {unet['in_channels']} input channels (in-painting, depth or image variation?); "
             f"a text-to-image U-Net takes {unet['out_channels']}")  # fmt: skip
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction", "sample"):
        fail(f"{path}: prediction type {scheduler.config.prediction_type!r} is not epsilon, v_prediction or sample")
    steps = scheduler.config.num_train_timesteps
    if args.num_ddim_timesteps > steps:
        fail(f"--num_ddim_timesteps {args.num_ddim_timesteps} must lie in 1 … {steps}")
    if steps % args.num_ddim_timesteps:
        top = steps // args.num_ddim_timesteps * args.num_ddim_timesteps - 1
        logger.warning("--num_ddim_timesteps does not divide %d: the grid ends at t = %d", steps, top)
    return scheduler


def load_frozen(args, dtype):
    """Loads tokenizer, text encoder and VAE, frozen. The VAE is float32 where its config says `force_upcast`."""
    path = args.pretrained_teacher_model
    source = {"revision": args.teacher_revision, "cache_dir": args.cache_dir}
    tokenizer = AutoTokenizer.from_pretrained(path, subfolder="tokenizer", **source)
    text_encoder = CLIPTextModel.from_pretrained(path, subfolder="text_encoder", dtype=dtype, **source)
    if args.pretrained_vae_model_name_or_path:
        path, source["revision"] = args.pretrained_vae_model_name_or_path, args.revision
        is_pipeline = not os.path.isdir(path) or os.path.isdir(os.path.join(path, "vae"))
        try:
            vae = AutoencoderKL.from_pretrained(path, subfolder="vae" if is_pipeline else None, **source)
        except OSError:  # a repository that holds a VAE alone
            vae = AutoencoderKL.from_pretrained(path, **source)
    else:
        vae = AutoencoderKL.from_pretrained(path, subfolder="vae", **source)
    vae.to(torch.float32 if vae.config.get("force_upcast") else dtype)
    return tokenizer, text_encoder.requires_grad_(False).eval(), vae.requires_grad_(False).eval()


def make_student(teacher, args):
    """Copies the teacher into a float32 student that embeds w. The new projection is zero: it starts as the teacher."""
    width = teacher.config.time_cond_proj_dim or args.unet_time_cond_proj_dim
    student = UNet2DConditionModel.from_config({**teacher.config, "time_cond_proj_dim": width})
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"time_embedding.cond_proj.weight"}, (missing, unexpected)
    if missing:
        torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
    return student


def load_models(args, scheduler, accelerator):
    """Loads all networks of a run to the device, channels-last, with the attention and compilation asked for."""
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[accelerator.mixed_precision]
    source = {"revision": args.teacher_revision, "cache_dir": args.cache_dir}
    try:
        tokenizer, text_encoder, vae = load_frozen(args, dtype)
        teacher = UNet2DConditionModel.from_pretrained(args.pretrained_teacher_model, subfolder="unet", **source)
    except (OSError, ValueError) as error:
        fail(f"the teacher or VAE cannot be loaded: {str(error).splitlines()[0]}")
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if args.resolution % factor:
        fail(f"--resolution {args.resolution} must be a multiple of the VAE's factor, {factor}")
    if vae.config.latent_channels != teacher.config.in_channels:
        fail(f"the VAE has {vae.config.latent_channels} latent channels, the U-Net takes {teacher.config.in_channels}")
    student, target = make_student(teacher, args), make_student(teacher, args)
    teacher.to(dtype if args.cast_teacher_unet else torch.float32)
    for model in (teacher, target):
        model.requires_grad_(False).eval()
    if args.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    for model in (text_encoder, vae, teacher, student, target):
        model.to(accelerator.device)
    for model in (vae, teacher, student, target):
        model.to(memory_format=torch.channels_last)  # twice as fast for the VAE on a CPU, and faster on tensor cores
    for model in (teacher, student, target):
        if args.enable_xformers_memory_efficient_attention:
            model.enable_xformers_memory_efficient_attention()
        if args.compile:
            model.compile()
    schedule = Schedule(scheduler, args.num_ddim_timesteps, accelerator.device)
    return Models(tokenizer, text_encoder, vae, teacher, student.train(), target, schedule, scheduler)


@torch.no_grad()
def encode_images(vae, pixel_values, chunk, generator):
    """uint8 pixels (batch, 3, height, width) → float32 latents (batch, channels, height/8, width/8), sampled."""
    pixels = (pixel_values / 127.5 - 1).to(vae.dtype, memory_format=torch.channels_last)
    latents = [vae.encode(part).latent_dist.sample(generator) for part in pixels.split(chunk)]
    return torch.cat(latents).float() * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae, latents):
    """Latents → images in [0, 1], float32 (batch, 3, height, width)."""
    return (vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample.float() / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def encode_prompts(models, captions):
    """Captions → conditioning (batch, tokens, width), in the text encoder's precision."""
    tokens = models.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt",
                              max_length=models.tokenizer.model_max_length)  # fmt: skip
    mask = None
    if getattr(models.text_encoder.config, "use_attention_mask", False):
        mask = tokens.attention_mask.to(models.text_encoder.device)
    return models.text_encoder(tokens.input_ids.to(models.text_encoder.device), attention_mask=mask)[0]


# ------------------------------------------------------------------------------------------ checkpoints and export


@dataclasses.dataclass
class Run:
    """Everything a training step touches. `meter` lives on the device, so that a plain step needs no host sync."""

    args: argparse.Namespace
    accelerator: Accelerator
    models: Models
    nets: dict  # Denoisers: student, target, teacher
    student: torch.nn.Module  # models.student, wrapped for several processes
    optimizer: torch.optim.Optimizer
    lr_scheduler: object
    reader: BatchReader
    uncond: torch.Tensor | None
    meter: torch.Tensor  # METER: sums since the last log and counters
    step: int = 0
    references: dict = dataclasses.field(default_factory=dict)
    stop_signal: int = 0

    @property
    def output(self):
        return Path(self.args.output_dir)


METER = ("loss", "grad_norm", "steps", "nonfinite_steps", "nonfinite_in_a_row", "longest_in_a_row")


def list_checkpoints(output):
    """Whole checkpoints, oldest first; one that was being written when the run died has another name."""
    found = [path for path in Path(output).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if (path / "state.json").is_file()), key=lambda path: int(path.name[11:]))


def save_checkpoint(run):
    """Writes checkpoint-<step> under a temporary name, renames it when whole, and only then removes old ones.

    Collective: every rank must call it. Noise, timesteps and w depend on (seed, step, rank) alone and the data on the cursors,
    so there are no random states to save.
    """
    args, accelerator, stream = run.args, run.accelerator, run.reader.stream
    cursors = accelerator.gather(torch.tensor(run.reader.cursors, device=accelerator.device)).tolist()
    skipped = reduce_skipped(run)
    if accelerator.is_main_process:
        final = run.output / f"checkpoint-{run.step}"
        temporary = run.output / f"tmp-checkpoint-{run.step}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name in ("student", "target"):
            tensors = {key: value.contiguous() for key, value in getattr(run.models, name).state_dict().items()}
            save_file(tensors, temporary / f"{name}.safetensors")
        torch.save(run.optimizer.optimizer.state_dict(), temporary / "optimizer.pt")
        scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
        stream_state = {**stream.state, "cursors": cursors, "turn": run.reader.turn}
        state = {"step": run.step, "args": public_args(args), "lr_scheduler": run.lr_scheduler.state_dict(), "scaler": scaler,
                 "stream": stream_state, "meter": run.meter.tolist(), "skipped": skipped}  # fmt: skip
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for old in (
            list_checkpoints(run.output)[: -args.checkpoints_total_limit] if args.checkpoints_total_limit else []
        ):
            shutil.rmtree(old)
        logger.info("Saved %s", final)
    accelerator.wait_for_everyone()


def find_checkpoint(args):
    """Resolves --resume_from_checkpoint to (folder, state), or (None, None) for `latest` in a fresh output folder."""
    if not args.resume_from_checkpoint:
        return None, None
    if args.resume_from_checkpoint == "latest":
        path = (list_checkpoints(args.output_dir) or [None])[-1]
        if path is None:
            logger.warning("--resume_from_checkpoint latest: no checkpoint in %s yet, starting afresh", args.output_dir)
            return None, None
    else:
        path = Path(args.resume_from_checkpoint)
        path = path if path.is_dir() else Path(args.output_dir) / path
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"--resume_from_checkpoint {args.resume_from_checkpoint}: no whole checkpoint there ({error})")
    ignored = {"output_dir", "resume_from_checkpoint", "train_shards_path_or_url", "dataloader_num_workers"}
    changed = [
        k for k, v in public_args(args).items() if k not in ignored and k in state["args"] and state["args"][k] != v
    ]
    if changed:
        logger.warning("Resuming with other values than the checkpoint's for: %s", ", ".join(f"--{k}" for k in changed))
    return path, state


def load_checkpoint(run, path, state):
    """Restores everything `save_checkpoint` wrote. Raises SystemExit if a file is damaged or does not fit the model."""
    try:
        for name in ("student", "target"):
            getattr(run.models, name).load_state_dict(load_file(path / f"{name}.safetensors"))
        optimizer_state = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        run.optimizer.optimizer.load_state_dict(optimizer_state)
    except Exception as error:
        fail(f"checkpoint {path} is damaged or of another model: {str(error).splitlines()[0]}")
    run.lr_scheduler.load_state_dict(state["lr_scheduler"])
    if run.accelerator.scaler and state["scaler"]:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.meter.copy_(torch.tensor(state["meter"]))
    run.reader.skipped.update(state["skipped"] if run.accelerator.is_main_process else {})
    run.step = state["step"]
    metrics = run.output / "metrics.jsonl"
    if run.accelerator.is_main_process and metrics.is_file():  # forget what was logged after the checkpoint
        lines = [line for line in metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line + "\n" for line in lines if json.loads(line)["step"] <= run.step]
        metrics.with_suffix(".tmp").write_text("".join(kept), encoding="utf-8")
        metrics.with_suffix(".tmp").rename(metrics)
    logger.info("Resumed from %s", path)


def export(run):
    """Writes a whole StableDiffusionPipeline (EMA U-Net, matching LCMScheduler), `unet_online` and the model card."""
    args, output = run.args, run.output
    tokenizer, text_encoder, vae = load_frozen(args, torch.float32)  # unrounded, whatever the compute precision was
    scheduler = LCMScheduler.from_config(run.models.scheduler.config, original_inference_steps=args.num_ddim_timesteps,
                                         timestep_scaling=args.timestep_scaling_factor)  # fmt: skip
    pipeline = StableDiffusionPipeline(vae, text_encoder, tokenizer, run.models.target, scheduler, None, None,
                                       requires_safety_checker=False)  # fmt: skip
    pipeline.save_pretrained(output)
    run.models.student.save_pretrained(output / "unet_online")
    grids = sorted((output / "validation").glob("step-*.png"), key=lambda path: int(path.stem[5:]))
    if grids:
        shutil.copyfile(grids[-1], output / "samples.png")
    (output / "README.md").write_text(model_card(args, bool(grids)), encoding="utf-8")
    if args.push_to_hub:
        repo_id = create_repo(args.hub_model_id or output.resolve().name, token=args.hub_token, exist_ok=True).repo_id
        parts = [f"{part}/*" for part in ("unet", "unet_online", "vae", "text_encoder", "tokenizer", "scheduler")]
        upload_folder(repo_id=repo_id, folder_path=output, token=args.hub_token, commit_message=f"Step {run.step}",
                      allow_patterns=["README.md", "samples.png", "model_index.json", *parts])  # fmt: skip


def model_card(args, has_samples):
    """The README.md of the exported model: usage, samples, arguments, base model and its licence."""
    base = args.pretrained_teacher_model
    try:
        readme = Path(base) / "README.md"
        data = ModelCard.load(readme if readme.is_file() else base, ignore_metadata_errors=True).data
        licence = data.license or "unknown"
    except Exception:  # no card, or no network: the licence is then for the reader to look up
        licence = "unknown"
    low, high = args.w_min + 1, args.w_max + 1
    arguments = "\n".join(
        f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in public_args(args).items()
    )
    samples = "\n![Teacher and student side by side](samples.png)\n" if has_samples else ""
    return f"""---
license: {licence}
base_model: {base}
library_name: diffusers
tags: [text-to-image, stable-diffusion, latent-consistency-model]
---

# {Path(args.output_dir).resolve().name}

A latent consistency model (arXiv:2310.04378) distilled from `{base}` (licence: {licence}) for 1 to 8 steps:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{args.hub_model_id or args.output_dir}")
image = pipe("{load_prompts(args)[0][0]}", num_inference_steps=4, guidance_scale={args.validation_guidance_scale:g}).images[0]
```

`guidance_scale` was trained from {low:g} to {high:g}; negative prompts have no effect. `unet` is the EMA network,
`unet_online` the one that the optimizer moved.
{samples}
## Training arguments

```yaml
{arguments}
```
"""


# ----------------------------------------------------------------------------------------- validation and logging

DEFAULT_PROMPTS = ["a lighthouse on a cliff at dawn, oil painting", "portrait photo of an old fisherman, soft light",
                   "a bowl of ramen, food photography", "a red fox in the snow"]  # fmt: skip


def load_prompts(args):
    """Returns the validation prompts, and for each file of prompts its name → the indices of its lines."""
    prompts, groups = [], {}
    for entry in args.validation_prompts:
        if entry.endswith(".txt"):
            if not os.path.isfile(entry):
                fail(f"--validation_prompts: the file {entry} does not exist")
            lines = [line.strip() for line in Path(entry).read_text(encoding="utf-8").splitlines() if line.strip()]
            groups[Path(entry).stem] = range(len(prompts), len(prompts) + len(lines))
            prompts += lines
        else:
            prompts.append(entry)
    return prompts, groups


@torch.no_grad()
def sample_chain(predict_x0, schedule, noise, timesteps):
    """The deterministic chain: x̂_0, the noise it implies, and the jump to the next time; ends with the last x̂_0."""
    x = noise
    for index, time_now in enumerate(timesteps):
        t = torch.full((len(x),), time_now, device=x.device)
        x_0 = predict_x0(x, t)
        if index + 1 < len(timesteps):
            alpha, sigma = schedule.alpha_sigma(t)
            x = schedule.jump(x_0, (x - alpha * x_0) / sigma, torch.full_like(t, timesteps[index + 1]))
    return x_0


@torch.no_grad()
def sample_stock(net, scheduler, noise, steps, c, w, seed):
    """Pictures as users will make them: the exported scheduler, which adds fresh noise between its steps."""
    scheduler.set_timesteps(steps, device=noise.device)
    generator, x = torch.Generator(noise.device).manual_seed(seed), noise
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t.expand(len(x)), c, w), t, x, generator=generator, return_dict=False)[0]
    return x


def psnr(images, reference):
    """Peak signal-to-noise ratio of each image in dB, (batch,), for images in [0, 1]."""
    return -10 * (images - reference).square().mean(dim=(1, 2, 3)).clamp_min(1e-10).log10()


def sharpness(images):
    """Mean gradient magnitude of each image, (batch,): PSNR alone rewards blur."""
    return images.diff(dim=2).abs().mean(dim=(1, 2, 3)) + images.diff(dim=3).abs().mean(dim=(1, 2, 3))


class Sampler:
    """Draws the validation pictures of each network from the same noise and prompts, `chunk` at a time.

    Images are (prompts × seeds, 3, height, width) on the CPU. It has its own generators: training's draws stay as they are.
    """

    def __init__(self, run, chunk=8):
        args, models = run.args, run.models
        self.run, self.chunk, self.schedule = run, chunk, models.schedule
        self.prompts, self.groups = load_prompts(args)
        self.seeds = args.num_validation_images
        side = args.resolution // 2 ** (len(models.vae.config.block_out_channels) - 1)
        shape = (len(self.prompts) * self.seeds, models.vae.config.latent_channels, side, side)
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed))
        self.c = encode_prompts(models, self.prompts).repeat_interleave(self.seeds, dim=0)
        self.uncond = encode_prompts(models, [args.validation_negative_prompt])
        self.scheduler = LCMScheduler.from_config(models.scheduler.config, original_inference_steps=args.num_ddim_timesteps,
                                                  timestep_scaling=args.timestep_scaling_factor)  # fmt: skip

    def images(self, name, steps, chain=True):
        """Pictures of `teacher` (guided), `untrained` (the teacher read as a consistency function), `student` or `target`."""
        args, schedule, device = self.run.args, self.schedule, self.run.accelerator.device
        net = self.run.nets["teacher" if name == "untrained" else name]
        if name == "teacher":
            points = [round(schedule.num_train_timesteps * (1 - j / steps)) - 1 for j in range(steps)]
        else:
            self.scheduler.set_timesteps(steps)
            points = self.scheduler.timesteps.tolist()
        parts = []
        for start in range(0, len(self.noise), self.chunk):
            noise, c = self.noise[start : start + self.chunk].to(device), self.c[start : start + self.chunk]
            w = torch.full((len(noise),), args.validation_guidance_scale - 1, device=device)
            uncond = None if net.embeds_guidance or not w.any() else self.uncond
            if name == "teacher":
                predict = lambda x, t: guided_prediction(net, schedule, x, t, c, uncond, w)[0]  # noqa: B023, E731
            else:
                scaling = args.timestep_scaling_factor
                predict = lambda x, t: consistency_function(net, schedule, x, t, c, w, scaling)  # noqa: B023, E731
            if chain:
                x_0 = sample_chain(predict, schedule, noise, points)
            else:
                x_0 = sample_stock(net, self.scheduler, noise, steps, c, w, args.seed + start)
            parts.append(decode_latents(self.run.models.vae, x_0).cpu())
        return torch.cat(parts)


def validate(run):
    """Logs pictures of the EMA student beside the teacher's, and how close each network comes to the teacher's 50 steps."""
    if run.accelerator.is_main_process:
        args, steps = run.args, run.args.validation_num_inference_steps
        if not run.references:  # what does not change during training is drawn once
            sampler = run.references["sampler"] = Sampler(run)
            run.references["images"] = {("teacher", k): sampler.images("teacher", k) for k in sorted({50, *steps})}
            run.references["images"] |= {("untrained", k): sampler.images("untrained", k) for k in steps}
        sampler, images = run.references["sampler"], dict(run.references["images"])
        images |= {(name, k): sampler.images(name, k) for name in ("student", "target") for k in steps}
        metrics = fidelity(images, steps, {"": range(len(sampler.prompts)), **sampler.groups}, sampler.seeds)
        write_metrics(run, metrics)
        columns = {f"teacher {k}": images["teacher", k] for k in (50, 4, 1) if k == 50 or k in steps}
        columns |= {f"untrained {k}": images["untrained", k] for k in steps if k == 1}
        columns |= {f"student {k}": sampler.images("target", k, chain=False) for k in steps}
        grid = draw_grid({title: column[:: sampler.seeds] for title, column in columns.items()}, sampler.prompts)
        (run.output / "validation").mkdir(exist_ok=True)
        grid.save(run.output / "validation" / f"step-{run.step}.png")
        for tracker in run.accelerator.trackers:
            kwargs = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"validation": np.asarray(grid)[None]}, step=run.step, **kwargs)
        print_fidelity(metrics, steps, sampler, args)
    run.accelerator.wait_for_everyone()


def fidelity(images, steps, groups, seeds):
    """PSNR and sharpness against the teacher's 50 steps: `fidelity/<network>_psnr_k<k>`, and the same for each prompt file."""
    metrics, reference = {}, images["teacher", 50]
    for group, prompts in groups.items():
        chosen = [prompt * seeds + seed for prompt in prompts for seed in range(seeds)]
        for (name, k), pictures in images.items():
            if k in steps:
                suffix = f"_k{k}" + (f"/{group}" if group else "")
                decibels = psnr(pictures[chosen], reference[chosen]).mean()
                ratio = sharpness(pictures[chosen]).mean() / sharpness(reference[chosen]).mean()
                metrics[f"fidelity/{name}_psnr{suffix}"] = round(decibels.item(), 3)
                metrics[f"fidelity/{name}_sharpness{suffix}"] = round(ratio.item(), 3)
    return metrics


def print_fidelity(metrics, steps, sampler, args):
    """Prints the table of PSNRs, for all prompts and for each file of them."""
    labels = {"teacher": "teacher, guided (2 evaluations a step)", "untrained": "untrained student",
              "student": "student", "target": "student, EMA (exported)"}  # fmt: skip
    text = f"PSNR in dB to the teacher's 50 steps; {len(sampler.prompts)} prompts × {sampler.seeds} seeds, "
    text += f"guidance scale {args.validation_guidance_scale:g}, deterministic chain\n"
    for group in sampler.groups if len(sampler.groups) > 1 else [""]:
        text += f"{group or 'steps':42}" + "".join(f"{k:8}" for k in steps) + "\n"
        for name, label in labels.items():
            keys = [f"fidelity/{name}_psnr_k{k}" + (f"/{group}" if group else "") for k in steps]
            text += f"  {label:40}" + "".join(f"{metrics[key]:8.2f}" for key in keys) + "\n"
    tqdm.write(text)


def draw_grid(columns, prompts):
    """Draws images side by side: a row a prompt, a titled column for each entry of {title: (prompts, 3, h, w)}."""
    side = next(iter(columns.values())).shape[-1]
    cell, label, head = max(side, 96), 150, 24
    grid = Image.new("RGB", (label + len(columns) * (cell + 4), head + len(prompts) * (cell + 4)), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(13)
    for row, prompt in enumerate(prompts):
        text = re.sub(r"(.{1,20})(\s+|$)", r"\1\n", prompt[:100])
        pen.multiline_text((4, head + row * (cell + 4) + 4), text, "black", font)
    for column, (title, images) in enumerate(columns.items()):
        pen.text((label + column * (cell + 4) + 2, 4), title, "black", font)
        for row, image in enumerate(images):
            picture = Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
            picture = picture.resize((cell, cell), Image.Resampling.BICUBIC)
            grid.paste(picture, (label + column * (cell + 4), head + row * (cell + 4)))
    return grid


def write_metrics(run, metrics):
    """Appends a line to metrics.jsonl and sends it to the trackers. Called on the main process."""
    with open(run.output / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": run.step, **metrics}) + "\n")
    numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
    run.accelerator.log(numbers, step=run.step)


def reduce_skipped(run):
    """Skipped samples by reason, summed over the ranks."""
    counts = torch.tensor([run.reader.skipped[reason] for reason in SKIP_REASONS], device=run.accelerator.device)
    counts = run.accelerator.reduce(counts, "sum").tolist()
    return {reason: count for reason, count in zip(SKIP_REASONS, counts, strict=True) if count}


def log_metrics(run, clock, progress):
    """Writes the means since the last log; the only place where a training step waits for the device.

    Raises SystemExit, on all ranks, if ten steps in a row had no finite loss.
    """
    args, accelerator = run.args, run.accelerator
    meter = dict(zip(METER, accelerator.reduce(run.meter.clone(), "mean").tolist(), strict=True))
    now = time.perf_counter()
    seconds, clock["last"] = now - clock["last"], now
    images = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes * clock["steps"]
    is_gpu = accelerator.device.type == "cuda"
    memory = torch.cuda.max_memory_allocated() if is_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    steps = max(1.0, meter["steps"])
    metrics = {"loss": meter["loss"] / steps, "grad_norm": meter["grad_norm"] / steps,
               "lr": run.lr_scheduler.get_last_lr()[0], "samples_per_s": images / seconds,
               "data_wait": run.reader.waited / seconds, "peak_memory_gb": memory / 2**30,
               "nonfinite_steps": round(meter["nonfinite_steps"]), "skipped": reduce_skipped(run)}  # fmt: skip
    run.reader.waited, clock["steps"] = 0.0, 0
    run.meter[:3] = 0
    if accelerator.is_main_process:
        write_metrics(run, metrics)
        progress.set_postfix_str(f"loss {metrics['loss']:.4g}, {metrics['samples_per_s']:.3g} images/s")
    if meter["longest_in_a_row"] >= 10:
        fail("ten steps in a row had a non-finite loss; try bf16 instead of fp16, a lower --learning_rate or "
             "--max_grad_norm, and check the VAE (SD 2.x and SDXL VAEs can overflow in fp16)")  # fmt: skip


# --------------------------------------------------------------------------------------------------- training loop


def step_generator(run, micro_step):
    """A generator for the draws of this micro-step, different on every rank: a pure function of (seed, step, rank)."""
    name = f"{run.args.seed}/{run.step}/{micro_step}/{run.accelerator.process_index}"
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
    torch.manual_seed(seed)  # for dropout, where a model has any
    return torch.Generator(run.accelerator.device).manual_seed(seed)


def train_step(run):
    """One optimizer step over --gradient_accumulation_steps micro-batches, then the EMA of the target."""
    args, accelerator, models = run.args, run.accelerator, run.models
    loss_sum = torch.zeros((), device=accelerator.device)
    for micro_step in range(args.gradient_accumulation_steps):
        batch = run.reader.next_batch()
        generator = step_generator(run, micro_step)
        with accelerator.accumulate(run.student):
            pixel_values = batch["pixel_values"].to(accelerator.device, non_blocking=True)
            x_0 = encode_images(models.vae, pixel_values, args.vae_encode_batch_size, generator)
            c = encode_prompts(models, batch["captions"])
            draws = draw(x_0, models.schedule, args, generator)
            loss = distillation_loss(
                **run.nets, schedule=models.schedule, x_0=x_0, c=c, uncond=run.uncond, draws=draws, args=args
            )
            accelerator.backward(loss)
            loss_sum += loss.detach() / args.gradient_accumulation_steps
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(run.student.parameters(), args.max_grad_norm)
                optimizer_step(run, grad_norm)
    with torch.no_grad():
        torch._foreach_lerp_(list(models.target.parameters()), list(models.student.parameters()), 1 - args.ema_decay)
        update_meter(run.meter, loss_sum, grad_norm)


def optimizer_step(run, grad_norm):
    """Steps the optimizer unless the gradients are not finite; with a fused optimizer the device decides that itself."""
    optimizer = run.optimizer.optimizer
    is_bad = ~torch.isfinite(grad_norm)
    if run.accelerator.scaler is None and optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = None, is_bad.float()
        run.optimizer.step()
    elif run.accelerator.scaler is not None or not is_bad:
        run.optimizer.step()
    run.optimizer.zero_grad()
    run.lr_scheduler.step()


def update_meter(meter, loss, grad_norm):
    """Adds a step to the METER, on the device. An overflow that the fp16 scaler handles has a finite loss."""
    good = torch.isfinite(loss)
    meter[0] += torch.where(good, loss, 0)
    meter[1] += torch.where(torch.isfinite(grad_norm), grad_norm, 0)
    meter[2] += good
    meter[3] += ~good
    meter[4] = (meter[4] + 1) * ~good
    meter[5] = torch.maximum(meter[5], meter[4])


def handle_signals(run):
    """SIGTERM and SIGINT end the run after the step that is under way, with a checkpoint; a second one ends it at once."""

    def handler(number, _frame):
        run.stop_signal = number
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def train(run):
    """The loop: steps, logs, checkpoints and validations until --max_train_steps or a signal."""
    args, accelerator = run.args, run.accelerator
    clock = {"last": time.perf_counter(), "steps": 0}
    progress = tqdm(total=args.max_train_steps, initial=run.step, disable=not accelerator.is_local_main_process,
                    desc="Steps", unit="step", dynamic_ncols=True)  # fmt: skip
    if args.validation_steps and run.step == 0:
        validate(run)
    group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
    while run.step < args.max_train_steps:
        train_step(run)
        run.step += 1
        clock["steps"] += 1
        progress.update()
        is_last = run.step == args.max_train_steps
        if run.step % args.logging_steps == 0 or is_last:
            log_metrics(run, clock, progress)
        stop = torch.tensor(run.stop_signal)
        if group:  # on the host, so that the device need not be waited for
            torch.distributed.all_reduce(stop, torch.distributed.ReduceOp.MAX, group=group)
        if args.checkpointing_steps and (run.step % args.checkpointing_steps == 0 or is_last) or stop:
            save_checkpoint(run)
        if stop:
            progress.close()
            logger.warning("Stopped by signal %d; go on with --resume_from_checkpoint latest", stop)
            raise SystemExit(128 + int(stop))
        if args.validation_steps and (run.step % args.validation_steps == 0 or is_last):
            validate(run)
            clock["last"] = time.perf_counter()
    progress.close()


# ------------------------------------------------------------------------------------------------------------ main

LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


def make_optimizer(args, parameters, num_processes):
    """AdamW, fused (or 8-bit), and its schedule, which is stepped once an optimizer step on every rank."""
    learning_rate = args.learning_rate
    if args.scale_lr:
        learning_rate *= args.train_batch_size * args.gradient_accumulation_steps * num_processes
    settings = {"lr": learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon,
                "weight_decay": args.adam_weight_decay}  # fmt: skip
    if args.use_8bit_adam:
        import bitsandbytes

        optimizer = bitsandbytes.optim.AdamW8bit(parameters, **settings)
    else:
        optimizer = torch.optim.AdamW(parameters, fused=True, **settings)
    schedule = get_scheduler(args.lr_scheduler, optimizer, args.lr_warmup_steps, args.max_train_steps)
    return optimizer, schedule


def make_accelerator(args):
    """Starts the processes' communication, logging and trackers."""
    config = ProjectConfiguration(args.output_dir, str(Path(args.output_dir, args.logging_dir)))
    accelerator = Accelerator(mixed_precision=args.mixed_precision, project_config=config,
                              gradient_accumulation_steps=args.gradient_accumulation_steps,
                              log_with=None if args.report_to == "none" else args.report_to)  # fmt: skip
    level = logging.INFO if accelerator.is_main_process else logging.ERROR
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING, force=True)
    logger.setLevel(level)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    return accelerator


def start_run(args, accelerator):
    """Checks the inputs, loads models, data and checkpoint, and returns the Run."""
    scheduler = check_teacher(args)
    load_prompts(args)
    urls = expand_shards(args.train_shards_path_or_url)
    checkpoint, state = find_checkpoint(args)
    if accelerator.is_main_process:
        check_shards(urls, args)
    accelerator.wait_for_everyone()
    if args.max_train_steps is None:
        args.max_train_samples = args.max_train_samples or count_samples(urls)
        images = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        args.max_train_steps = args.num_train_epochs * math.ceil(args.max_train_samples / images)
    models = load_models(args, scheduler, accelerator)
    optimizer, lr_scheduler = make_optimizer(args, models.student.parameters(), accelerator.num_processes)
    student, optimizer = accelerator.prepare(models.student, optimizer)
    accelerator.prepare_model(models.target, evaluation_mode=True)
    nets = {name: Denoiser(getattr(models, name)) for name in ("target", "teacher")}
    nets["student"] = Denoiser(student, models.student.config)
    needs_uncond = args.w_max > 0 and not nets["teacher"].embeds_guidance
    uncond = encode_prompts(models, [""]) if needs_uncond else None
    stream = ShardStream(urls, args, accelerator.process_index, accelerator.num_processes, state and state["stream"])
    meter = torch.zeros(len(METER), device=accelerator.device)
    reader = BatchReader(stream, accelerator.device)
    run = Run(args, accelerator, models, nets, student, optimizer, lr_scheduler, reader, uncond, meter)
    if checkpoint:
        load_checkpoint(run, checkpoint, state)
    return run


def main(argv=None):
    args = parse_args(argv)
    check_environment(args)
    accelerator = make_accelerator(args)
    run = start_run(args, accelerator)
    if accelerator.is_main_process:
        Path(args.output_dir, "args.json").write_text(json.dumps(public_args(args), indent=2) + "\n", encoding="utf-8")
        plain = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in public_args(args).items()}
        accelerator.init_trackers(args.tracker_project_name, config=plain)
    handle_signals(run)
    train(run)
    if accelerator.is_main_process:
        export(run)
    accelerator.end_training()


if __name__ == "__main__":
    main()
