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

    accelerate launch train_lcm_distill_sd_wds.py \
        --pretrained_teacher_model=stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --train_shards_path_or_url="cc12m/{00000..01242}.tar" --max_train_samples=12000000 --max_train_steps=10000 \
        --train_batch_size=24 --mixed_precision=bf16 --gradient_checkpointing --output_dir=lcm-sd15

`output_dir` then holds a StableDiffusionPipeline with a matching LCMScheduler. `fidelity/*` in metrics.jsonl tells
early whether the student follows its teacher. A run that was stopped goes on with `--resume_from_checkpoint=latest`,
and ends in the very weights of a run that was not.
"""

import argparse
import base64
import bz2
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import io
import itertools
import json
import logging
import lzma
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
import tempfile
import textwrap
import time
import urllib.parse
import urllib.request
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import psutil
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import ProjectConfiguration, broadcast_object_list, gather_object, parse_flag_from_env
from diffusers import AutoencoderKL, DDPMScheduler, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.optimization import get_scheduler
from huggingface_hub import ModelCard, create_repo, upload_folder
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from tqdm.auto import tqdm
from transformers import AutoTokenizer, CLIPTextModel
from webdataset.gopen import Pipe, gopen
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys

# ------------------------------------------------------------------------------------------------------- arguments
logger = logging.getLogger("train")
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
INTERPOLATION = {k: Image.Resampling[k.upper()] for k in "bilinear bicubic box nearest hamming lanczos".split()}
INTERPOLATION["nearest_exact"] = Image.Resampling.NEAREST  # which is exact in PIL
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit", "lion8bit", "adafactor", "prodigy")
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
DEFAULT_PROMPTS = ["a lighthouse on a cliff at dawn, oil painting", "portrait photo of an old fisherman, soft light",
                   "a bowl of ramen, food photography", "a red fox in the snow"]  # fmt: skip
OUTPUT_DIR, PROJECT = "lcm-distilled", "lcm-distill"


def fail(message):
    """Ends the process with one line that says what to do, instead of a traceback."""
    raise SystemExit(f"error: {message}")


def first_line(error):
    """The first line of what an exception says, or its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def number(kind, low, high=math.inf):
    """An argparse type: a number within [low, high]."""

    def parse(text):
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} does not lie in {low} … {high}")
        return value

    parse.__name__ = kind.__name__  # which argparse names where the text is no number
    return parse


def sizes(text):
    """An argparse type: WIDTHxHEIGHT,… → [[width, height], …]."""
    found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size) for size in text.lower().split(",")]
    if None in found:
        raise argparse.ArgumentTypeError(f"{text} is not WIDTHxHEIGHT or several of them, parted by commas")
    return [[int(side) for side in size.groups()] for size in found]


def add_model_args(parser):
    add = parser.add_argument_group("models").add_argument
    add("--pretrained_teacher_model", required=True, help="hub id or folder of the pipeline to distil")
    add("--pretrained_vae_model_name_or_path", help="another VAE: hub id or folder")
    add("--teacher_revision", help="revision of the teacher's repository")
    add("--revision", help="revision of the VAE's repository (--pretrained_vae_model_name_or_path)")
    add("--cache_dir", help="where downloaded models are kept")
    add("--cast_teacher_unet", action=argparse.BooleanOptionalAction, help="teacher in the compute precision (default)")
    add("--unet_time_cond_proj_dim", type=number(int, 4), default=256, help="width of the guidance embedding w")
    add("--offload_ema", action="store_true", help="keep the EMA on the CPU but for its pass and its update")
    add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, slower")
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="xformers instead of PyTorch's sdpa")
    add("--compile", action="store_true", help="torch.compile the U-Nets: minutes at the start, faster afterwards")


def add_data_args(parser):
    add = parser.add_argument_group("data").add_argument
    add("--train_shards_path_or_url", nargs="+", required=True, metavar="SHARDS",
        help="tar shards: brace patterns, paths, URLs, pipe: commands, or a .txt list with one a line")  # fmt: skip
    add("--max_train_samples", type=number(int, 1), help="samples in an epoch (default: counted, if shards are files)")
    add("--encoded_shards", action=argparse.BooleanOptionalAction, help="read the latents and text embeddings that "
        "prepare_shards.py stored (default: if the first sample has them)")  # fmt: skip
    add("--resolution", type=number(int, 1), default=512, help="side of the square training images, in pixels; root of "
        "the area of those that prepare_shards.py cropped to buckets")  # fmt: skip
    add("--interpolation_type", default="bilinear", choices=sorted(INTERPOLATION), help="filter of the resize")
    add("--center_crop", action="store_true", help="crop the centre instead of a random place")
    add("--random_flip", action="store_true", help="mirror half of the images")
    add("--proportion_empty_prompts", type=number(float, 0, 1), default=0.0, help="share of captions replaced by ''")
    add("--min_image_size", type=number(int, 0), default=0, help="skip samples whose JSON gives a smaller side")
    add("--max_pwatermark", type=float, default=0.5, help="skip samples whose JSON gives a higher pwatermark")
    add("--max_bad_samples", type=number(float, 0, 1), default=0.5, help="stop if more of 1,000 samples are broken")
    add("--shuffle_buffer_size", type=number(int, 1), default=1000, help="undecoded samples a loader worker shuffles")
    add("--shard_timeout", type=float, default=60.0, help="seconds without data until a URL or pipe is given up")
    add("--dataloader_num_workers", type=number(int, 0), default=4, help="loader processes for each rank")


def add_method_args(parser):
    add = parser.add_argument_group("distillation").add_argument
    add("--num_ddim_timesteps", type=number(int, 1), default=50, help="N, points of the teacher's DDIM grid")
    add("--w_min", type=number(float, 0), default=5.0, help="lowest guidance weight (w = guidance_scale - 1)")
    add("--w_max", type=number(float, 0), default=15.0, help="highest guidance weight; 0: no unconditional pass")
    add("--loss_type", default="l2", choices=["l2", "huber"], help="distance d")
    add("--huber_c", type=number(float, 1e-8), default=0.001, help="c in sqrt(d² + c²) − c")
    add("--ema_decay", type=number(float, 0, 1), default=0.95, help="decay of the target network θ⁻")
    add("--timestep_scaling_factor", type=float, default=10.0, help="s in c_skip and c_out")


def add_training_args(parser):
    add = parser.add_argument_group("training").add_argument
    add("--seed", type=int, default=0, help="of data order, noise, timesteps and guidance weights")
    add("--train_batch_size", type=number(int, 1), default=16, help="images a process and micro-step")
    add("--gradient_accumulation_steps", type=number(int, 1), default=1, help="micro-steps in an optimizer step")
    add("--num_train_epochs", type=number(int, 1), default=100, help="epochs, where --max_train_steps is not given")
    add("--max_train_steps", type=number(int, 1), help="optimizer steps in all")
    add("--learning_rate", type=number(float, 0), default=8e-6, help="peak learning rate")
    add("--scale_lr", action="store_true", help="multiply it by batch size × accumulation × processes")
    add("--lr_scheduler", default="constant", choices=LR_SCHEDULERS, help="schedule of the learning rate")
    add("--lr_warmup_steps", type=number(int, 0), default=500, help="steps of linear warm-up (not for 'constant')")
    add("--optimizer", default="adamw", choices=OPTIMIZERS, help="8-bit ones need a quarter of the memory")
    add("--use_8bit_adam", action="store_true", help="the same as --optimizer adamw8bit")
    add("--adam_beta1", type=number(float, 0, 0.99999), default=0.9, help="decay of the first moment")
    add("--adam_beta2", type=number(float, 0, 0.99999), default=0.999, help="decay of the second moment")
    add("--adam_weight_decay", type=number(float, 0), default=1e-2, help="decoupled weight decay")
    add("--adam_epsilon", type=number(float, 0), default=1e-8, help="epsilon of Adam")
    add("--max_grad_norm", type=number(float, 0), default=1.0, help="gradients are clipped to this norm (0: not)")
    add("--mixed_precision", choices=list(DTYPES), help="default: as `accelerate config` says")
    add("--allow_tf32", action="store_true", help="TF32 matrix products on Ampere and later")
    add("--vae_encode_batch_size", type=number(int, 1), help="images the VAE takes at once (default: a megapixel)")


def add_output_args(parser):
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", default=OUTPUT_DIR, help="folder of the run")
    add("--logging_dir", default="logs", help="tracker files, below --output_dir")
    add("--logging_steps", type=number(int, 1), default=10, help="steps between lines of metrics.jsonl (a host sync)")
    add("--report_to", default="tensorboard", choices=["tensorboard", "wandb", "all", "none"], help="trackers")
    add("--tracker_project_name", default=PROJECT, help="project in the trackers")
    add("--checkpointing_steps", type=number(int, 0), default=500, help="steps between checkpoints (0: none)")
    add("--checkpoints_total_limit", type=number(int, 1), help="checkpoints to keep")
    add("--resume_from_checkpoint", help="'latest' or a checkpoint folder")
    add("--validation_steps", type=number(int, 0), default=200, help="steps between validations (0: none)")
    add("--validation_prompts", nargs="+", default=DEFAULT_PROMPTS, help="texts, or .txt files with one prompt a line")
    add("--validation_negative_prompt", default="", help="negative prompt of the teacher in validation")
    add("--validation_guidance_scale", type=number(float, 1), help="w + 1 (default: middle of the trained range)")
    add("--validation_num_inference_steps", type=number(int, 1), nargs="+", default=[1, 2, 4, 8], help="of the student")
    add("--validation_resolutions", type=sizes, help="WIDTHxHEIGHT,… of the pictures (default: --resolution)")
    add("--num_validation_images", type=number(int, 1), default=2, help="seeds for each prompt, for the fidelity")
    add("--push_to_hub", action="store_true", help="upload what is exported")
    add("--hub_model_id", help="repository to push to (default: the name of --output_dir)")
    add("--hub_token", help="token for the upload; never written to any file")


def check_method_args(parser, args):
    """Checks the method's arguments, and fills in what depends on others."""
    if args.w_min > args.w_max:
        parser.error(f"--w_min {args.w_min} is above --w_max {args.w_max}")
    if args.validation_guidance_scale is None:
        args.validation_guidance_scale = (args.w_min + args.w_max) / 2 + 1


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action):
        is_empty = action.default is None or action.default is False or action.default == ""
        return action.help if is_empty else super()._get_help_string(action)


def parse_args(argv=None):
    """Reads the command line and refuses what can be known to be wrong without opening a file."""
    formatter = functools.partial(HelpFormatter, max_help_position=44, width=120)
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=formatter, allow_abbrev=False, fromfile_prefix_chars="@",
        usage="%(prog)s --pretrained_teacher_model MODEL --train_shards_path_or_url SHARDS [flags] [@file-with-flags]",
    )  # fmt: skip
    parser.convert_arg_line_to_args = functools.partial(shlex.split, comments=True)
    for add_group in (add_model_args, add_data_args, add_method_args, add_training_args, add_output_args):
        add_group(parser)
    try:
        args = parser.parse_args(argv)
    except ValueError as error:  # of shlex or a codec
        parser.error(f"an @file with flags cannot be read: {error}")
    check_method_args(parser, args)
    if max(args.validation_num_inference_steps) > args.num_ddim_timesteps:
        parser.error("--validation_num_inference_steps must lie in 1 … --num_ddim_timesteps")
    if args.use_8bit_adam:
        if args.optimizer not in ("adamw", "adamw8bit"):
            parser.error(f"--use_8bit_adam is --optimizer adamw8bit, not {args.optimizer}")
        args.optimizer = "adamw8bit"
    if args.mixed_precision is None:
        args.mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if args.mixed_precision not in DTYPES:
        parser.error(f"--mixed_precision {args.mixed_precision}, as accelerate's configuration says, is not supported")
    if args.cast_teacher_unet is None:
        args.cast_teacher_unet = args.mixed_precision != "no"
    if args.validation_resolutions is None:
        args.validation_resolutions = [[args.resolution, args.resolution]]
    if args.vae_encode_batch_size is None:  # more only needs more memory
        args.vae_encode_batch_size = max(1, 2**20 // args.resolution**2)
    return args


def check_environment(args):
    """Refuses what this machine cannot do: a folder it cannot write, fp16 without a GPU, packages that are missing."""
    output, xformers = Path(args.output_dir), args.enable_xformers_memory_efficient_attention
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        fail(f"--output_dir {output} cannot be written: {error}")
    for kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):  # where rank 0, which alone saves, would wait for the others
        if parse_flag_from_env(f"ACCELERATE_USE_{kind}"):
            fail(f"{kind} is not supported; use distributed_type MULTI_GPU, and --optimizer adamw8bit to save memory")
    is_parallel = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if is_parallel and not torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        fail("several processes without a GPU do not find each other unless ACCELERATE_USE_CPU=true is set")
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        fail("--mixed_precision fp16 needs a GPU; use bf16 or no")
    if xformers and not torch.cuda.is_available():
        fail("--enable_xformers_memory_efficient_attention needs a GPU; without it PyTorch's attention is used")
    if args.optimizer.startswith("paged") and not torch.cuda.is_available():
        fail(f"--optimizer {args.optimizer} needs a GPU; use adamw8bit")
    wanted = {"wandb": args.report_to in ("wandb", "all"), "tensorboard": args.report_to in ("tensorboard", "all"),
              "bitsandbytes": "8bit" in args.optimizer, "prodigyopt": args.optimizer == "prodigy",
              "xformers": xformers}  # fmt: skip
    for package in (package for package, is_wanted in wanted.items() if is_wanted):
        try:
            __import__(package)
        except Exception as error:
            fail(f"a flag asks for {package}, which cannot be imported here ({error}); install it or drop the flag")
    if not args.resume_from_checkpoint and list_checkpoints(output):
        fail(f"--output_dir {output} holds checkpoints; --resume_from_checkpoint latest, or another folder?")


def redact(value):
    """Takes credentials out of shard URLs and commands before they are written anywhere."""
    if isinstance(value, list):
        return [redact(item) for item in value]
    if not isinstance(value, str):
        return value
    login = r"[^/\s]+@|[^/\s:@]*:(?!\d*(?:[/\s]|$))[^@'\"]*@"  # the latter: passwords with what no URL may hold
    value = re.sub(rf"(?<=://)(?:{login})|(?<=-u )\S+|(?<=--user )\S+", "…@", value)
    secret = r"\w*(?:token|secret|key|passw|auth|sig|credential|jwt)\w*"
    value = re.sub(rf"(?i)({secret}\s*[:= ]\s*)(?:(?:bearer|basic)\s+)?[^\s&'\"]+", r"\1…", value)
    return re.sub(r"hf_\w{8,}", "…", value)


def public_args(args):
    """The arguments as they may be written to files and trackers: without tokens."""
    prompts = ("validation_prompts", "validation_negative_prompt")
    return {k: v if k in prompts else redact(v) for k, v in vars(args).items() if k != "hub_token"}


# ------------------------------------------------------------------------------------------------------------ data
IMAGE_MEMBERS, CAPTION_MEMBERS = ("jpg", "jpeg", "png", "webp"), ("txt", "text", "caption")
MEMBERS = {*IMAGE_MEMBERS, *CAPTION_MEMBERS, "json", "safetensors"}  # nothing else of a shard is ever read
MAX_IMAGE_PIXELS, MAX_MEMBER_BYTES = 2**26, 2**28
FILTERS = ("below min_image_size", "above max_pwatermark")
FAULTS = ("unreadable shard", "duplicate member", "no image", "no caption", "broken image", "image too large",
          "other resolution", "broken encoding", "other encoding")  # fmt: skip


class BadSample(Exception):
    """A sample that is skipped; `args` are one of FILTERS or FAULTS, and a detail for the log."""


def kill_tree(pid):
    """Kills a process and all that it started, which would outlive it."""
    with contextlib.suppress(psutil.Error):  # it is gone, or another user's
        process = psutil.Process(pid)
        process.suspend()  # it starts nothing more
        for child in process.children():
            kill_tree(child.pid)
        process.kill()


class ShardReader:
    """Reads the process that webdataset starts for a URL or pipe; raises TimeoutError after `timeout` idle seconds."""

    def __init__(self, pipe, timeout):
        self.pipe, self.timeout = pipe, timeout

    def read(self, size):
        if not select.select([self.pipe.stream], [], [], self.timeout)[0]:
            raise TimeoutError(f"no data for {self.timeout:g} s")
        data = os.read(self.pipe.stream.fileno(), size)
        if not data and (status := self.pipe.proc.wait(self.timeout)) != 0:
            raise OSError(f"command ended with status {status}")
        return data

    def close(self):
        kill_tree(self.pipe.proc.pid)
        self.pipe.stream.close()
        self.pipe.proc.wait()


def quote_url(url):
    """An http(s) URL as it may be sent: blanks and letters beyond ASCII encoded. Raises ValueError if it is none."""
    if not re.match("(?i)https?://", url):
        return url
    parts = urllib.parse.urlsplit(urllib.parse.quote(url, safe="".join(map(chr, range(33, 127)))))
    login, at, host = parts.netloc.rpartition("@")
    host = urllib.parse.unquote(host) if "%" in host else host
    return parts._replace(netloc=login + at + (host if host.isascii() else host.encode("idna").decode())).geturl()


def open_shard(url, timeout):
    """Opens a shard as webdataset does: a file, or what the command for its kind of URL writes."""
    stream = gopen(quote_url(url), "rb")
    return ShardReader(stream, timeout) if isinstance(stream, Pipe) else stream


class Unpacker:
    """Reads a stream; unpacks it if it begins as gzip, bzip2 or xz do, also several of them one after the other."""

    def __init__(self, stream):
        self.stream, self.packed, self.member = stream, b"", None
        while len(self.packed) < 6 and (data := stream.read(6 - len(self.packed))):
            self.packed += data
        kinds = {b"\x1f\x8b": functools.partial(zlib.decompressobj, 31), b"BZh": bz2.BZ2Decompressor,
                 b"\xfd7zXZ": lzma.LZMADecompressor}  # fmt: skip
        self.kind = next((kind for magic, kind in kinds.items() if self.packed.startswith(magic)), None)

    def read(self, size):
        while True:
            data, self.packed = self.packed or self.stream.read(size), b""
            if not self.kind:
                return data
            if self.member is None or self.member.eof:
                data = data.lstrip(b"\0") if self.member else data  # they may be padded
                self.member = self.kind() if data else self.member
            elif not data:
                raise EOFError("the compressed data ends early")
            if not data:
                return b""
            found = self.member.decompress(data)
            self.packed = self.member.unused_data if self.member.eof else b""
            if found:
                return found


class Header(tarfile.TarInfo):
    """A header of a tar that is read on behind end marks. Counts these in the tar's `ends`, notes in `is_whole` whether
    one came last, and raises OSError for a damaged header, which tarfile would pass over with all that it stands for.
    """

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        try:
            return super().frombuf(buf, encoding, errors)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
            if buf.strip(b"\0"):
                raise OSError(f"no tar header where one belongs: {error}") from error
            raise

    @classmethod
    def fromtarfile(cls, shard):
        try:
            header = super().fromtarfile(shard)
            shard.is_whole = False
            return header
        except tarfile.EOFHeaderError:
            shard.ends, shard.is_whole = getattr(shard, "ends", 0) + 1, True
            raise


def read_members(stream, url):
    """Yields the wanted members of a tar, as webdataset does, and {} between those of tars that were joined.

    Raises OSError where the last end mark is missing or something else than a tar follows one.
    """
    with tarfile.open(fileobj=Unpacker(stream), mode="r|", tarinfo=Header, ignore_zeros=True) as shard:
        ends = 0
        try:
            for member in shard:
                if ends != (ends := getattr(shard, "ends", 0)):
                    yield {}
                is_hidden = re.match(r"__[^/]*__(/|$)|(.*/)?\.[^/]*$", member.name)
                if member.isreg() and not is_hidden and member.name.rsplit(".", 1)[-1].lower() in MEMBERS:
                    is_sane = member.size <= MAX_MEMBER_BYTES and not member.issparse()
                    data = shard.extractfile(member).read() if is_sane else b""
                    yield {"fname": member.name, "data": data, "__url__": url}
                shard.members = []  # tarfile would keep them all
        except Exception:
            if getattr(shard, "is_whole", False):  # what came before the end mark is whole, the last sample too
                yield {}
            raise
        if not getattr(shard, "is_whole", False):
            raise OSError("the archive ends early")


def read_shard(url, timeout, tries=3):
    """Yields the undecoded samples of a shard: dicts of member name → bytes, plus `__key__`.

    URLs and pipes that fail are opened again, after 1 and 2 seconds, and read on from where they broke off. A shard
    that fails for good, and a member that stands twice, is yielded as a sample with a `__fault__`, to be counted.
    """

    def note_duplicate(error):
        faults.append({"__key__": url, "__fault__": BadSample("duplicate member", str(error.args[0]))})
        return True

    done, faults = 0, []
    tries = tries if url.startswith("pipe:") or "://" in url else 1
    for attempt in range(tries):
        faults.clear()  # a second reading meets them again
        try:
            with contextlib.closing(open_shard(url, timeout)) as stream:
                for index, sample in enumerate(group_by_keys(read_members(stream, url), handler=note_duplicate)):
                    if index == done:
                        done += 1
                        yield sample
                while stream.read(1 << 16):  # past the archive's end: a command's exit status counts too
                    pass
            break
        except Exception as error:  # tarfile, its decompressors and the opener raise many kinds
            if attempt + 1 < tries:
                time.sleep(2**attempt)
            else:
                faults.append({"__key__": url, "__fault__": BadSample("unreadable shard", redact(first_line(error)))})
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


def strip_png(data):
    """A PNG of its pixels, transparency and orientation alone: other chunks may be what a decoder stumbles over."""
    kept, place, start = [data[:8]], 8, (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
    while chunk := data[place : place + 12 + int.from_bytes(data[place : place + 4], "big")]:
        kind, body = chunk[4:8], chunk[8:-4]
        is_whole = zlib.crc32(kind + body) == int.from_bytes(chunk[-4:], "big")
        fits = len(body) in {0: [2], 2: [6], 3: range(257)}.get(data[25], []) if kind == b"tRNS" else kind == b"eXIf"
        if not kind[:1].islower() or is_whole and (fits or body.startswith(start)):  # a capital: it is needed
            kept.append(chunk)
        place += len(chunk)
    return b"".join(kept)


def strip_jpeg(data):
    """A JPEG without comments and application segments other than whole ones of JFIF, EXIF, XMP and Adobe."""
    kept, place, least = [data[:2]], 2, {0xE0: 18, 0xE1: 4, 0xEE: 16}
    while data[place : place + 1] == b"\xff" and data[place + 1 : place + 2] not in (b"", b"\xda"):  # until the scan
        if data[place + 1] == 0xFF:  # which may stand between segments
            place += 1
            continue
        segment = data[place : place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")]
        is_metadata = 0xE0 <= segment[1] <= 0xEF or segment[1] == 0xFE
        if not is_metadata or len(segment) >= least.get(segment[1], math.inf):
            kept.append(segment)
        place += len(segment)
    return b"".join([*kept, data[place:]])


def strip_webp(data):
    """A WebP without its colour profile and without chunks that are cut off."""
    kept, place = [], 12
    while chunk := data[place : place + 8 + (int.from_bytes(data[place + 4 : place + 8], "little") + 1) // 2 * 2]:
        is_whole = len(chunk) >= 8 + int.from_bytes(chunk[4:8], "little")
        kept += [chunk] if is_whole and chunk[:4] != b"ICCP" else []
        place += len(chunk)
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + len(body).to_bytes(4, "little") + body


STRIP = {b"\x89PN": strip_png, b"\xff\xd8\xff": strip_jpeg, b"RIF": strip_webp}
TURNS = dict(zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), strict=True))  # by EXIF's orientation


def read_orientation(image):
    """The orientation, 1 to 8, that the metadata of an image tell: 1 where they do not or cannot be read."""
    try:
        found = image.getexif().get(0x0112, 1)
    except Exception:  # whatever it is: the pixels are fine
        return 1
    return found if found in range(1, 9) else 1


def open_image(data, use):
    """Returns what `use` makes of an opened image; where that fails, of the same without metadata. Raises BadSample."""
    for strip in (bytes, STRIP.get(data[:3], bytes)):
        try:
            return use(Image.open(io.BytesIO(strip(data)), formats=("JPEG", "PNG", "WEBP")))
        except BadSample:
            raise
        except Image.DecompressionBombError as error:
            raise BadSample("image too large", first_line(error)) from error
        except Exception as error:  # decoders raise almost anything on damaged data
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, Image.UnidentifiedImageError):
                reason = f"no JPEG, PNG or WebP that can be read, it begins with {data[:8]!r}" if data else "no bytes"
    raise BadSample("broken image", reason)


def to_rgb(image):
    """Converts every PIL mode to RGB: 16-bit grey scaled, transparency over white, CMYK and palettes resolved."""
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray((np.asarray(image, dtype=np.float32) / 257).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def load_image(data, resolution, resample):
    """Decodes image bytes, upright and in RGB, so that the shorter side has `resolution` pixels.

    JPEGs are decoded at reduced size where that suffices. Returns the image and its size (width, height) before the
    resize. Raises BadSample.
    """

    def decode(image):
        size, scale = image.size, resolution / min(image.size)
        if size[0] * size[1] * max(1, scale**2) > MAX_IMAGE_PIXELS:  # as it is, or after the resize
            raise BadSample("image too large", f"{size[0]}x{size[1]} pixels")
        image.draft(None, (resolution, resolution))
        image.load()
        orientation = read_orientation(image)
        image = image.transpose(TURNS[orientation]) if orientation > 1 else image
        return to_rgb(image), size[::-1] if orientation > 4 else size

    image, size = open_image(data, decode)
    resized = tuple(round(side * resolution / min(image.size)) for side in image.size)
    return image if image.size == resized else image.resize(resized, resample), size


def decode_text(data):
    """Text of bytes in UTF-8, or in UTF-16 where they begin as it does; what is neither becomes U+FFFD."""
    return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", errors="replace")


def caption_texts(value):
    """The captions that a value of JSON holds: a text, a number or a list of them. null, NaN, true, {} … are none."""
    found = []
    for item in value if isinstance(value, list) else [value]:
        is_number = isinstance(item, (int, float)) and not isinstance(item, bool) and -math.inf < item < math.inf
        found += [str(item)] if is_number or isinstance(item, str) else []
    return found


def read_captions(sample, info):
    """Returns the captions of a sample: its text members, or else `caption`, `captions` or `text` of its JSON."""
    captions = [decode_text(sample[name]) for name in CAPTION_MEMBERS if name in sample]
    if not captions:
        captions = next(filter(None, (caption_texts(info.get(name)) for name in ("caption", "captions", "text"))), [])
    return [caption.encode("utf-8", "replace").decode().strip() for caption in captions]  # no lone surrogates


def check_filters(info, args):
    """Applies the size and watermark filters to a sample's JSON; what is missing or not above 0 never rejects."""
    numbers = {name.lower(): value for name, value in info.items() if isinstance(value, (int, float))}
    for side in ("width", "height"):
        if 0 < (size := numbers.get(f"original_{side}", numbers.get(side, math.inf))) < args.min_image_size:
            raise BadSample("below min_image_size", f"{side} {size}")
    if (pwatermark := numbers.get("pwatermark", -math.inf)) > args.max_pwatermark:
        raise BadSample("above max_pwatermark", f"pwatermark {pwatermark}")


def training_size(info, args):
    """(width, height) of a sample's picture: a square, or as tools/prepare_shards.py cropped it. Raises BadSample."""
    crop = info.get("crop")
    if not (isinstance(crop, list) and len(crop) == 4 and all(isinstance(side, int) and side > 0 for side in crop[2:])):
        return args.resolution, args.resolution
    width, height = crop[2:]
    if not args.resolution**2 < 2 * width * height <= 2 * args.resolution**2 or not height <= 2 * width <= 4 * height:
        raise BadSample("other resolution", f"cropped to {width}x{height}, --resolution is {args.resolution}")
    return width, height


def check_fingerprint(made, args):
    """Raises BadSample that names the first difference if a sample was encoded for another model or other flags."""
    flags = {"model": "pretrained_teacher_model", "revision": "teacher_revision", "vae_revision": "revision",
             "vae": "pretrained_vae_model_name_or_path"}  # fmt: skip
    for name in (*flags, "resolution", "center_crop", "interpolation_type", "random_flip"):
        flag, found = flags.get(name, name), made.get(name)
        wanted = getattr(args, flag)
        if name in ("model", "vae"):  # a folder may have been moved
            wanted, found = (value and Path(value).resolve().name for value in (wanted, found))
        if wanted != found and not (name == "random_flip" and found):
            raise BadSample("other encoding", f"made with {name} {found}, --{flag} is {wanted}: give that or re-encode")


def decode_encoded(data, info, pick, is_flipped, args):
    """Reads what tools/prepare_shards.py encoded: the posterior of the latents, `mean` and `std` (channels, height/8,
    width/8), and `text` (tokens, width), for SDXL also `pooled` (width,), of caption number `pick`. `info`: the
    sample's JSON. Raises BadSample.
    """
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        check_fingerprint(json.loads(header["__metadata__"]["fingerprint"]), args)
        tensors, kind = load(data), "flipped" if is_flipped else "latents"
        found = {"mean": tensors[f"{kind}_mean"], "std": tensors[f"{kind}_std"], "text": tensors["text"][pick]}
        found |= {"pooled": tensors["pooled"][pick]} if "pooled" in tensors else {}
        size, (_, latent_height, latent_width) = training_size(info, args), found["mean"].shape
        factor = size[0] // latent_width
        is_sane = found["mean"].shape == found["std"].shape and all(value.isfinite().all() for value in found.values())
        if not is_sane or factor < 2 or (latent_width * factor, latent_height * factor) != size:
            raise ValueError("its tensors are not finite or do not fit the picture's size")
    except BadSample:
        raise
    except Exception as error:  # a damaged file raises almost anything
        raise BadSample("broken encoding", f"{type(error).__name__}: {error}") from error
    return found


def describe_lack(sample, wanted):
    """What a sample needs and what it has, for messages, and by which rule of shards it may have come to that."""
    found = sorted(name for name in sample if not name.startswith("__"))
    dotted = [f"{sample['__key__']}.{name}" for name in found if "." in name]
    rule = "the members of a sample must lie side by side: tar --sort=name"
    if dotted:
        rule = f"a key ends at the first dot, also that of {dotted[0]}: rename it"
    return f"needed: {wanted}; found: {', '.join(found)} ({rule})"


def decode_sample(sample, args, rng):
    """Decodes a sample; gives `captions`, one text, and `pixel_values`, uint8 (3, height, width), or of an encoded one
    what decode_encoded does, and whether the caption `is_empty`.

    Raises BadSample. `rng` decides caption, caption dropout, crop and flip, always with the same number of draws.
    """
    pick, drop, left, top, flip = (rng.random() for _ in range(5))
    if "__fault__" in sample:
        raise sample["__fault__"]
    try:
        info = json.loads(sample.get("json", b"{}"))
    except (ValueError, RecursionError):
        info = {}
    info = info if isinstance(info, dict) else {}
    check_filters(info, args)
    is_encoded = "safetensors" in sample if args.encoded_shards is None else args.encoded_shards
    wanted = ("safetensors",) if is_encoded else IMAGE_MEMBERS
    data = next((sample[name] for name in wanted if name in sample), None)
    if data is None:
        raise BadSample("no image", describe_lack(sample, ", ".join(wanted)))
    captions = read_captions(sample, info)
    if not captions:
        raise BadSample("no caption", describe_lack(sample, f"{', '.join(CAPTION_MEMBERS)} or caption in the json"))
    pick, is_flipped = int(pick * len(captions)), args.random_flip and flip < 0.5
    caption = captions[pick] if drop >= args.proportion_empty_prompts else ""
    if is_encoded:
        encoded = decode_encoded(data, info, pick, is_flipped, args)
        return {**encoded, "captions": caption, "is_empty": torch.tensor(not caption)}
    width, height = training_size(info, args)
    image, _ = load_image(data, min(width, height), INTERPOLATION[args.interpolation_type])
    if image.width < width or image.height < height:
        raise BadSample("broken image", f"{image.width}x{image.height} pixels, by its json {width}x{height}")
    left, top = (0.5, 0.5) if args.center_crop else (left, top)
    x, y = int(left * (image.width - width + 1)), int(top * (image.height - height + 1))
    image = image.crop((x, y, x + width, y + height))
    image = ImageOps.mirror(image) if is_flipped else image
    return {"pixel_values": torch.from_numpy(np.array(image)).permute(2, 0, 1), "captions": caption}


def stack(tensors):
    """Stacks tensors. Images (3, height, width) stay channels-last in memory, as PIL and the VAE have them."""
    if tensors[0].ndim < 3:
        return torch.stack(tensors)
    return torch.stack([image.permute(1, 2, 0) for image in tensors]).permute(0, 3, 1, 2)


class ShardStream(torch.utils.data.IterableDataset):
    """An endless, exactly resumable stream of batches over shards: a pure function of (seed, position).

    Shard position p means shard permutation(epoch = p // S)[p % S], seeded by (seed, epoch). The stream's items are
    `leftover` (positions, the number of samples already used, and which of them alone are wanted or None) and then all
    positions from `next` on; global worker g of G takes the items g, g + G, …. A batch is of one size; other samples
    are held until theirs is full. The cursor of a worker, (item, sample, held), is what it will read next and what it
    holds, as [item, [samples]]; samples are counted in the shard's shuffled order, which depends on (seed, p) alone, as
    does every random choice in decoding.

    `state` is None, or `stream` of a checkpoint's state.json; `shapes` are the dimensions that encoded tensors must
    have. A batch is a dict: what decode_sample gives, as tensors and lists; worker, cursor, skipped (counts by
    reason), details (an example of each); or it has an `error`.
    """

    def __init__(self, urls, args, rank=0, world_size=1, state=None, shapes=None):
        self.urls, self.args, self.rank, self.shapes = urls, args, rank, shapes or {}
        self.num_workers = max(1, args.dataloader_num_workers)
        self.state = resume_stream(state, world_size * self.num_workers)

    def shard_samples(self, position, start, wanted):
        """Yields (number, undecoded sample) of the shard at `position`, from sample `start` of its shuffled order."""
        epoch, index = divmod(position, len(self.urls))
        order = list(range(len(self.urls)))
        random.Random(f"{self.args.seed}/epoch/{epoch}").shuffle(order)
        samples = read_shard(self.urls[order[index]], self.args.shard_timeout)
        rng = random.Random(f"{self.args.seed}/shard/{position}")
        for count, sample in enumerate(shuffled(samples, self.args.shuffle_buffer_size, rng)):
            if count >= start and (wanted is None or count in wanted):
                yield count, sample

    def usable_samples(self, worker):
        """Yields (decoded sample, (item, number)) for ever. Raises BadSample when too few samples are usable."""
        recent, barren = deque(maxlen=1000), 0
        first, begin, held = self.state["cursors"][self.rank * self.num_workers + worker]
        later = ((item, 0, None) for item in itertools.count(first + self.state["stride"], self.state["stride"]))
        todo = [*((item, 0, numbers) for item, numbers in held), (first, begin, None)]
        self.skipped, self.details = Counter(), {}
        for item, start, numbers in itertools.chain(todo, later):
            position, offset, wanted = stream_item(self.state, item)
            barren += 1
            for index, sample in self.shard_samples(position, max(start, offset), numbers or wanted):
                try:
                    rng = random.Random(f"{self.args.seed}/sample/{position}/{index}")
                    yield check_shapes(decode_sample(sample, self.args, rng), self.shapes), (item, index)
                    recent.append(None)
                    barren = 0
                except BadSample as bad:
                    self.skipped[bad.args[0]] += 1
                    self.details.setdefault(bad.args[0], f"{redact(sample['__key__'])}: {bad.args[1]}")
                    recent.append(bad.args[0])
                    faults = sum(reason in FAULTS for reason in recent)
                    if len(recent) == 1000 and (faults > 1000 * self.args.max_bad_samples or None not in recent):
                        raise BadSample("too few of the last 1,000 samples are usable", recent) from bad
            if barren > len(self.urls):
                raise BadSample("a whole epoch gave no usable sample", recent)

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker = ((info.id if info else 0) + self.state["turn"]) % self.num_workers
        cursor, held = self.state["cursors"][self.rank * self.num_workers + worker], {}
        try:
            for sample, place in self.usable_samples(worker):
                group = held.setdefault(tuple(value.shape for value in sample.values() if torch.is_tensor(value)), [])
                group.append((place, sample))
                size = self.args.train_batch_size
                if len(group) >= size and place >= tuple(cursor[:2]):  # what was held is there again
                    batch, group[:] = [sample for _, sample in group[:size]], group[size:]
                    places = sorted(place for others in held.values() for place, _ in others)
                    places = itertools.groupby(places, key=lambda place: place[0])
                    places = [[item, [number for _, number in numbers]] for item, numbers in places]
                    columns = {name: [sample[name] for sample in batch] for name in sample}
                    columns = {k: stack(v) if torch.is_tensor(v[0]) else v for k, v in columns.items()}
                    yield {**columns, "worker": worker, "cursor": (place[0], place[1] + 1, places),
                           "skipped": dict(self.skipped), "details": self.details}  # fmt: skip
                    self.skipped, self.details = Counter(), {}
        except BadSample as bad:  # as an exception it would reach the user as a worker's traceback
            message, recent = bad.args
            reasons = "; ".join(f"{count} × {reason}" for reason, count in Counter(filter(None, recent)).most_common())
            example = next(iter(self.details.values()), "")
            yield {"error": f"{message} (filters? --max_bad_samples?): {reasons or 'the shards are empty'}; {example}"}


def check_shapes(sample, shapes):
    """Returns a decoded sample. Raises BadSample if an encoded tensor has not the dimensions it must have (0: any)."""
    for name, wanted in shapes.items() if "mean" in sample else ():
        found = tuple(sample[name].shape) if name in sample else ()
        if len(found) != len(wanted) or any(b not in (0, a) for a, b in zip(found, wanted, strict=True)):
            raise BadSample("other encoding", f"{name} has the shape {found}, the model needs {tuple(wanted)}")
    return sample


def stream_item(state, index):
    """Returns (shard position, samples of it already used, which alone are wanted or None) of the item `index`."""
    leftover = state["leftover"]
    return tuple(leftover[index]) if index < len(leftover) else (state["next"] + index - len(leftover), 0, None)


def resume_stream(state, stride):
    """Returns the stream state with which `stride` global workers go on where the workers of `state` stopped.

    With as many workers that is `state` itself: the run goes on exactly. Otherwise what was not used becomes the new
    list of items: no sample of the epoch is repeated or lost, but their order changes.
    """
    if state and state["stride"] == stride:
        return state
    cursors = [[worker, 0, []] for worker in range(stride)]
    fresh = {"leftover": [], "next": 0, "stride": stride, "cursors": cursors, "turn": 0}
    if not state:
        return fresh
    logger.warning("The number of loader workers changed: no sample is repeated or lost, but their order changes.")
    old = state["cursors"]
    end = max([len(state["leftover"]), *(item + 1 for item, *_ in old)])  # the first item that no worker has begun
    leftover = [[stream_item(state, item)[0], 0, numbers] for *_, held in old for item, numbers in held]
    for index in range(min(item for item, *_ in old), end):
        item, sample, _ = old[index % len(old)]
        position, offset, wanted = stream_item(state, index)
        if index >= item:
            leftover.append([position, max(offset, sample) if index == item else offset, wanted])
    return {**fresh, "leftover": leftover, "next": stream_item(state, end)[0]}


def outlive_signals(_worker):
    """Keeps a loader worker alive when SIGTERM or SIGINT reach the process group: the trainer still needs its batch."""
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(600))
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class BatchReader:
    """Hands out the batches of a rank's ShardStream and keeps the cursor of each worker's last batch that was used."""

    def __init__(self, stream, device):
        self.stream, self.turn, self.waited = stream, stream.state["turn"], 0.0
        self.skipped, self.named = Counter(), set()  # by reason; reasons that the log has told
        first, workers = stream.rank * stream.num_workers, stream.args.dataloader_num_workers
        self.cursors = [list(cursor) for cursor in stream.state["cursors"][first : first + stream.num_workers]]
        self.loader = torch.utils.data.DataLoader(
            stream, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None,
            pin_memory=device.type == "cuda", worker_init_fn=outlive_signals)  # fmt: skip
        self.batches = None

    def close(self):
        """Ends the workers, also one that waits for a lock which a killed one held."""
        if workers := getattr(self.batches, "_workers", None):  # PyTorch 2.13 has no public way
            self.batches._shutdown_workers()
            for worker in workers:
                if worker.is_alive():  # its shard may be a command
                    kill_tree(worker.pid)
        self.batches = None

    def next_batch(self):
        start = time.perf_counter()
        if self.batches is None:
            self.batches = iter(self.loader)
        try:
            batch = next(self.batches)
        except (OSError, EOFError) as error:  # in the midst of handing over a batch
            fail(f"a loader worker died: {first_line(error)}; go on with --resume_from_checkpoint latest")
        self.waited += time.perf_counter() - start
        if "error" in batch:
            fail(batch["error"])
        self.cursors[batch["worker"]] = list(batch["cursor"])
        self.turn = (batch["worker"] + 1) % self.stream.num_workers
        self.skipped.update(batch["skipped"])
        for reason in batch["details"].keys() - self.named:
            self.named.add(reason)
            logger.warning("Skipped (%s; from now on only counted): %s", reason, batch["details"][reason])
        return batch


def expand_shards(patterns):
    """Expands brace patterns and `.txt` lists (one shard a line; no `pipe:` commands, which only a user may give)."""
    urls = []
    for pattern in patterns:
        is_list, lines = pattern.endswith(".txt") and not pattern.startswith("pipe:"), [pattern]
        try:
            if is_list:
                data = Path(pattern).read_bytes()
                lines = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig").splitlines()
                lines = [re.sub(r"^(['\"])(.*)\1$", r"\2", line.strip()) for line in lines]
            lines = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
            found = [url for line in lines for url in expand_urls(line)]
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or redact(
                first_line(error)
            )  # else with the name, its secrets too
            fail(f"--train_shards_path_or_url {redact(pattern)} cannot be read or expanded: {reason}")
        if is_list and any(url.startswith("pipe:") for url in found):
            fail(f"{pattern}: a list of shards may not hold pipe: commands; give them on the command line")
        urls += found
    return urls or fail("--train_shards_path_or_url names no shard")


def check_url(url, timeout):
    """Returns an error, or None if an http(s) URL answers: Python, or otherwise the shards' reader, which decides."""
    try:
        parts = urllib.parse.urlsplit(quote_url(url))
        parts.port  # noqa: B018  # raises ValueError
    except ValueError:  # which may name a part of a password
        return ValueError("no URL: its host or port is wrong, or a password holds / or [, to be written %2F or %5B")
    try:
        login, _, host = parts.netloc.rpartition("@")
        request = urllib.request.Request(parts._replace(netloc=host).geturl())
        if login:
            login = urllib.parse.unquote(login if ":" in login else f"{login}:").encode()
            request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(login).decode()}")
        urllib.request.urlopen(request, timeout=timeout).close()
        return None
    except Exception as error:  # sockets, codecs and http.client raise many kinds
        reason = error
    with contextlib.suppress(Exception), contextlib.closing(open_shard(url, timeout)) as stream:
        if stream.read(1):
            return None
    return reason


def check_shards(urls, args, most=100):
    """Names every local shard that is missing and every URL (of the first `most`) that does not answer; never hangs.

    Then reads the first shard until a sample is usable, and says what was found instead if it holds none. Returns
    whether that sample is encoded.
    """

    def problem(url):
        error = None
        try:
            if re.match("(?i)https?://", url):
                error = check_url(url, min(10.0, args.shard_timeout))
            elif not url.startswith("pipe:") and "://" not in url.removeprefix("file:"):
                open(re.sub("^file:(//)?", "", url), "rb").close()
        except (OSError, ValueError) as found:
            error = found
        if error:
            return f"{redact(url)} ({redact(getattr(error, 'strerror', None) or first_line(error))})"
        return None

    remote = [url for url in urls if "://" in url]
    with ThreadPoolExecutor(16) as pool:
        chosen = dict.fromkeys([url for url in urls if "://" not in url] + remote[:most])
        problems = [text for text in pool.map(problem, chosen) if text]
    if problems:
        fail(f"{len(problems)} of {len(urls)} shards cannot be read: " + "; ".join(problems))
    reasons, examples = Counter(), {}
    for sample in read_shard(urls[0], args.shard_timeout, tries=1):
        try:
            return "pixel_values" not in decode_sample(sample, args, random.Random(0))
        except BadSample as bad:
            reasons[bad.args[0]] += 1
            examples.setdefault(*bad.args)
    text = "; ".join(f"{count} × {reason} ({examples[reason]})" for reason, count in reasons.most_common())
    fail(f"the first shard {redact(urls[0])} holds no usable sample: {text or 'it is empty'}")


def count_samples(urls, args):
    """Counts the samples in local shards from their tar headers, for runs without --max_train_samples."""
    paths = [re.sub("^file:(//)?", "", url) for url in urls]
    if any("://" in path or path.startswith("pipe:") for path in paths):
        fail("give --max_train_steps, or --max_train_samples: samples behind URLs and pipes are not counted")
    total, wanted = 0, ("safetensors",) if args.encoded_shards else IMAGE_MEMBERS
    for path in paths:
        try:
            with tarfile.open(path, ignore_zeros=True) as shard:  # on behind end marks, as read_members
                total += sum(name.rsplit(".", 1)[-1].lower() in wanted for name in shard.getnames())
        except (OSError, EOFError, tarfile.TarError) as error:
            logger.warning("The samples of %s are not counted: %s", path, first_line(error))
    return total


# -------------------------------------------------------------------------------------------------- diffusion maths
class Schedule:
    """The teacher's noise schedule, always float32, and the DDIM grid τ_i = (i + 1)·(T // N) − 1, prev(τ_0) = 0.

    Timesteps t, s have shape (batch,), latents and network outputs (batch, channels, height, width).
    """

    def __init__(self, scheduler, num_ddim_timesteps, device):
        alphas_cumprod = scheduler.alphas_cumprod.to(device, torch.float32)
        self.alphas, self.sigmas = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        self.prediction_type, self.num_train_timesteps = scheduler.config.prediction_type, len(alphas_cumprod)
        spacing = self.num_train_timesteps // num_ddim_timesteps
        self.grid = torch.arange(1, num_ddim_timesteps + 1, device=device) * spacing - 1
        self.prev = F.pad(self.grid[:-1], (1, 0))

    def alpha_sigma(self, t):
        """α_t and σ_t, shape (batch, 1, 1, 1)."""
        return self.alphas[t].view(-1, 1, 1, 1), self.sigmas[t].view(-1, 1, 1, 1)

    def jump(self, x_0, eps, s):
        """x_s = α_s x_0 + σ_s ε: noises data, and with a prediction (x̂_0, ε̂) is the DDIM step to s."""
        alpha, sigma = self.alpha_sigma(s)
        return alpha * x_0 + sigma * eps

    def x0_eps(self, output, x_t, t):
        """Network output → (x̂_0, ε̂), for the three prediction types."""
        alpha, sigma = self.alpha_sigma(t)
        if self.prediction_type == "epsilon":
            return (x_t - sigma * output) / alpha, output
        if self.prediction_type == "v_prediction":
            return alpha * x_t - sigma * output, alpha * output + sigma * x_t
        return output, (x_t - alpha * output) / sigma


def distance(a, b, loss_type, huber_c):
    """d(a, b) in float32: mean square, or Huber, mean of sqrt(d² + c²) − c."""
    square = (a.float() - b.float()) ** 2
    return square.mean() if loss_type == "l2" else ((square + huber_c**2).sqrt() - huber_c).mean()


# ---------------------------------------------------------------------------------------------------------- method
METHOD, TAG, CALL = ("latent consistency model (arXiv:2310.04378)", "latent-consistency-model",
                     "num_inference_steps=4, guidance_scale={:g}")  # fmt: skip


def make_scheduler(config, args):
    """The stock scheduler that is exported: the teacher's noise schedule, the trained grid, latents not clipped."""
    known = inspect.signature(LCMScheduler).parameters
    config = {k: v for k, v in config.items() if k in known} | {"clip_sample": False, "thresholding": False}
    return LCMScheduler(**config | {"original_inference_steps": args.num_ddim_timesteps,
                                    "timestep_scaling": args.timestep_scaling_factor})  # fmt: skip


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
    """A U-Net in the paper's terms: `net(x_t, t, c, w)` runs it in its own precision and gives its output in float32.

    c: (batch, tokens, width). w (batch,) goes in as an embedding where the U-Net takes one, and is ignored elsewhere. A
    U-Net that is kept on the CPU, `is_offloaded`, is lent to the device for the call.
    """

    def __init__(self, unet, config, is_offloaded=False):
        self.unet, self.dtype = unet, next(unet.parameters()).dtype
        self.guidance_dim, self.is_offloaded = config.time_cond_proj_dim, is_offloaded

    def __call__(self, x_t, t, c, w):
        if self.guidance_dim:  # as the pipelines' get_guidance_scale_embedding
            w = get_timestep_embedding(1000 * w.float(), self.guidance_dim, downscale_freq_shift=1).to(self.dtype)
        options = {"timestep_cond": w if self.guidance_dim else None, "return_dict": False}
        given = x_t.to(self.dtype), t, c.to(self.dtype)
        if not self.is_offloaded:
            return self.unet(*given, **options)[0].float()
        weights = {name: value.to(x_t.device, non_blocking=True) for name, value in self.unet.state_dict().items()}
        return torch.func.functional_call(self.unet, weights, given, options)[0].float()


def guided_prediction(teacher, schedule, x_t, t, c, uncond, w):
    """The teacher's (x̂_0, ε̂), both guided (LCM §4.3): cond + w·(cond − uncond), in one batch of two halves.

    With `uncond` None (w = 0, or a teacher that embeds w itself) the unconditional half is not run.
    """
    if uncond is None:
        return schedule.x0_eps(teacher(x_t, t, c, w), x_t, t)
    x_twice, t_twice = torch.cat([x_t, x_t]), torch.cat([t, t])
    output = teacher(x_twice, t_twice, torch.cat([c, uncond.expand_as(c)]), None)
    pairs = [value.chunk(2) for value in schedule.x0_eps(output, x_twice, t_twice)]
    return [cond + w.view(-1, 1, 1, 1) * (cond - without) for cond, without in pairs]


def consistency_function(net, schedule, x_t, t, c, w, scaling):
    """f(x_t, w, c, t) = c_skip(t) x_t + c_out(t) x̂_0, with f(x, 0) = x; LCM §4.1, σ_data = 0.5, `scaling` = s."""
    x_0, _ = schedule.x0_eps(net(x_t, t, c, w), x_t, t)
    scaled_t, sigma_data = scaling * t.view(-1, 1, 1, 1).float(), 0.5
    c_skip = sigma_data**2 / (scaled_t**2 + sigma_data**2)
    c_out = scaled_t / (scaled_t**2 + sigma_data**2).sqrt()
    return c_skip * x_t + c_out * x_0


def predict_x0(net, schedule, x_t, t, c, w, args):
    """What a student holds for x_0, in validation."""
    return consistency_function(net, schedule, x_t, t, c, w, args.timestep_scaling_factor)


def distillation_loss(student, target, teacher, schedule, x_0, c, uncond, draws, args):
    """Latent consistency distillation, arXiv:2310.04378, Algorithm 1: a pure function of networks, data and draws.

    x_0: latents (batch, channels, height/8, width/8); c: (batch, tokens, width); uncond: (1, tokens, width) or None.
    """
    f = functools.partial(consistency_function, schedule=schedule, c=c, w=draws.w, scaling=args.timestep_scaling_factor)
    t, t_prev = schedule.grid[draws.index], schedule.prev[draws.index]
    x_t = schedule.jump(x_0, draws.eps, t)  # Alg. 1, line 5
    with torch.no_grad():  # before the student, so that these activations are gone when its graph is built
        x0_hat, eps_hat = guided_prediction(teacher, schedule, x_t, t, c, uncond, draws.w)
        x_prev = schedule.jump(x0_hat, eps_hat, t_prev)  # line 6, one solver step
        f_target = f(target, x_t=x_prev, t=t_prev)
    return distance(f(student, x_t=x_t, t=t), f_target, args.loss_type, args.huber_c)  # line 7


# ---------------------------------------------------------------------------------------------------------- models
def check_schedule(args, scheduler, kind):
    """Refuses a teacher's noise schedule, of a scheduler of class `kind`, that no grid of DDPM times can follow."""
    path, config = args.pretrained_teacher_model, scheduler.config
    is_known = config.trained_betas or config.beta_schedule in ("linear", "scaled_linear", "squaredcos_cap_v2")
    if not is_known or kind.startswith(("EDM", "FlowMatch")):
        fail(f"{path}: {kind} with beta_schedule {config.beta_schedule!r} is not supported, only DDPM's discrete times")
    if config.prediction_type not in ("epsilon", "v_prediction", "sample"):
        fail(f"{path}: prediction type {config.prediction_type!r} is not epsilon, v_prediction or sample")
    if config.prediction_type == "epsilon" and scheduler.alphas_cumprod[-1] == 0:
        fail(f"{path}: at the last time, pure noise (rescale_betas_zero_snr), a prediction of epsilon says nothing")
    steps = config.num_train_timesteps
    if args.num_ddim_timesteps > steps:
        fail(f"--num_ddim_timesteps {args.num_ddim_timesteps} must lie in 1 … {steps}")
    if rest := steps % args.num_ddim_timesteps:
        logger.warning("--num_ddim_timesteps does not divide %d: the grid ends at t = %d", steps, steps - rest - 1)


def check_teacher(args):
    """Reads the teacher's configuration, refuses what is no text-to-image U-Net of SD 1.x/2.x; gives its scheduler."""
    path = args.pretrained_teacher_model
    source = {"revision": args.teacher_revision, "cache_dir": args.cache_dir}
    try:
        parts = diffusers.DiffusionPipeline.load_config(path, **source)
        kind = parts.get("_class_name")
        scheduler = DDPMScheduler.from_pretrained(path, subfolder="scheduler", **source)
        unet = UNet2DConditionModel.load_config(path, subfolder="unet", **source) if "unet" in parts else None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        fail(f"--pretrained_teacher_model {path} cannot be read as a diffusers pipeline: {first_line(error)}")
    if unet is None:
        fail(f"{path}, a {kind}, has no U-Net; this script distils Stable Diffusion 1.x and 2.x")
    if "text_encoder_2" in parts:
        is_refiner = not parts.get("text_encoder", [None])[0]
        fail(f"{path} is an SDXL " + ("refiner, which is no text-to-image model" if is_refiner else
                                      "pipeline; use train_lcm_distill_lora_sdxl_wds.py"))  # fmt: skip
    if unet["in_channels"] != unet["out_channels"]:
        fail(f"{path} takes {unet['in_channels']} channels (in-painting, depth?), text-to-image {unet['out_channels']}")
    check_schedule(args, scheduler, str(parts.get("scheduler", [None, None])[1]))
    return scheduler


def check_tokenizer(tokenizer):
    """Raises ValueError for a tokenizer without a vocabulary, which transformers makes of a folder without the file."""
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError("a tokenizer knows no words, only its special tokens: are files missing?")


def load_frozen(args, dtype):
    """Loads tokenizer, text encoder and VAE, frozen. `force_upcast` of its config, true by default, is SDXL's alone."""
    path, source = args.pretrained_teacher_model, {"revision": args.teacher_revision, "cache_dir": args.cache_dir}
    tokenizer = AutoTokenizer.from_pretrained(path, subfolder="tokenizer", **source)
    text_encoder = CLIPTextModel.from_pretrained(path, subfolder="text_encoder", dtype=dtype, **source)
    check_tokenizer(tokenizer)
    source["subfolder"] = "vae"
    if args.pretrained_vae_model_name_or_path:
        path, source = args.pretrained_vae_model_name_or_path, {"revision": args.revision, "cache_dir": args.cache_dir}
    vae = AutoencoderKL.from_pretrained(path, **source)
    return tokenizer, text_encoder.requires_grad_(False).eval(), vae.to(dtype).requires_grad_(False).eval()


def make_student(teacher, args):
    """Copies the teacher into a float32 student that embeds w. The new projection is zero: it starts as the teacher."""
    width = teacher.config.time_cond_proj_dim or args.unet_time_cond_proj_dim
    config = {k: v for k, v in teacher.config.items() if k != "_use_default_values"}  # which from_config would drop
    student = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": width})
    torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
    student.load_state_dict({**student.state_dict(), **teacher.state_dict()})
    return student


def run_norm(norm, x):
    """A GroupNorm or LayerNorm in the precision of its input.

    Autocast on CUDA would run it in float32, and keep that for the backward pass: a quarter of the activations' memory.
    Its kernels sum in float32 all the same, and autocast on a CPU leaves it alone.
    """
    with torch.autocast(x.device.type, enabled=False):
        weight, bias = (None if value is None else value.to(x.dtype) for value in (norm.weight, norm.bias))
        if isinstance(norm, torch.nn.GroupNorm):
            return F.group_norm(x, norm.num_groups, weight, bias, norm.eps)
        return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


def keep_norms_in_half(unet):
    """Lets the norms of a U-Net on a GPU do as `run_norm` says."""
    for module in unet.modules():
        if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            module.forward = functools.partial(run_norm, module)


def check_latents(args, vae, unet):
    """Refuses a VAE that is not the U-Net's, and picture sizes that it does not divide."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    sides = {"resolution": [args.resolution], "validation_resolutions": sum(args.validation_resolutions, [])}
    for flag, given in sides.items():
        if any(side % factor for side in given):
            fail(f"--{flag}: {given} must be multiples of the VAE's factor, {factor}")
    if vae.config.latent_channels != unet.config.in_channels:
        fail(f"the VAE has {vae.config.latent_channels} latent channels, the U-Net takes {unet.config.in_channels}")
    if vae.config.get("latents_mean"):
        fail("a VAE with latents_mean and latents_std is not supported")


def load_models(args, scheduler, accelerator):
    """Loads all networks of a run to the device, channels-last, with the attention and compilation asked for.

    `student` and `target` are float32, the others frozen in the compute precision; `scheduler` is what is exported.
    """
    dtype = DTYPES[accelerator.mixed_precision]
    try:
        tokenizer, text_encoder, vae = load_frozen(args, dtype)
        source = {"revision": args.teacher_revision, "cache_dir": args.cache_dir}
        teacher = UNet2DConditionModel.from_pretrained(args.pretrained_teacher_model, subfolder="unet", **source)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        fail(f"the teacher or the VAE cannot be loaded: {first_line(error)}")
    check_latents(args, vae, teacher)
    student, target = make_student(teacher, args).train(), make_student(teacher, args).requires_grad_(False).eval()
    teacher.to(dtype if args.cast_teacher_unet else torch.float32).requires_grad_(False).eval()
    text_encoder.to("cpu" if args.encoded_shards else accelerator.device)
    for model in (vae, teacher, student, target):  # channels-last halves a VAE's time on a CPU, and helps tensor cores
        is_plain = "8bit" in args.optimizer and model is student  # bitsandbytes makes its parameters so at every step
        is_offloaded = (model is target and args.offload_ema) or (model is vae and args.encoded_shards)
        device = "cpu" if is_offloaded else accelerator.device
        model.to(device, memory_format=torch.contiguous_format if is_plain else torch.channels_last)
    for model in (teacher, student, target):
        if accelerator.device.type != "cpu":
            keep_norms_in_half(model)
        if args.enable_xformers_memory_efficient_attention:
            model.enable_xformers_memory_efficient_attention()
        if args.compile:
            model.compile()
    if args.offload_ema and accelerator.device.type == "cuda":
        for parameter in target.parameters():  # in pinned memory, so that the host need not wait for its copies
            parameter.data = parameter.data.pin_memory()
    if args.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    return SimpleNamespace(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, teacher=teacher, student=student, target=target,
        student_parameters=list(student.parameters()), target_parameters=list(target.parameters()),
        is_offloaded=args.offload_ema, scheduler=make_scheduler(scheduler.config, args),
        schedule=Schedule(scheduler, args.num_ddim_timesteps, accelerator.device))  # fmt: skip


def prepare(models, optimizer, accelerator):
    """Gives the networks and the optimizer to accelerate; returns the Denoisers by name, and the optimizer."""
    student, optimizer = accelerator.prepare(models.student, optimizer)
    # autocast as the student; it is on its device already
    target = accelerator.prepare_model(models.target, device_placement=False, evaluation_mode=True)
    return {"student": Denoiser(student, models.student.config),
            "target": Denoiser(target, models.target.config, models.is_offloaded),
            "teacher": Denoiser(models.teacher, models.teacher.config)}, optimizer  # fmt: skip


def network_state(models, name):
    """The tensors of `student` or `target` that a checkpoint holds."""
    return {key: value.contiguous() for key, value in getattr(models, name).state_dict().items()}


def load_network(models, name, tensors):
    """Gives `student` or `target` the tensors of a checkpoint."""
    getattr(models, name).load_state_dict(tensors)


@contextlib.contextmanager
def lent(model, device):
    """Brings a model that is kept on the CPU to the device for a while."""
    home = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


@torch.no_grad()
def encode_images(vae, pixel_values, chunk):
    """uint8 pixels (batch, 3, height, width) → mean and standard deviation of the latents, float32 (batch, channels,
    height/8, width/8), before the scaling factor.
    """
    pixels = (pixel_values / 127.5 - 1).to(vae.dtype, memory_format=torch.channels_last)
    found = [vae.encode(part).latent_dist for part in pixels.split(chunk)]
    return torch.cat([part.mean for part in found]).float(), torch.cat([part.std for part in found]).float()


@torch.no_grad()
def decode_latents(vae, latents, chunk):
    """Latents → images in [0, 1], float32 (batch, 3, height, width)."""
    scaled = latents.to(vae.dtype) / vae.config.scaling_factor
    with lent(vae, latents.device):
        images = torch.cat([vae.decode(part).sample.float() for part in scaled.split(chunk)])
    return (images / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def encode_prompts(models, captions):
    """Captions → conditioning (batch, tokens, width), in the text encoder's precision."""
    length, encoder = models.tokenizer.model_max_length, models.text_encoder
    tokens = models.tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    tokens = tokens.to(encoder.device, non_blocking=True)
    mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
    return encoder(tokens.input_ids, attention_mask=mask)[0]


def find_empty(models, urls):
    """Embedding of the empty prompt by name, (1, …), as the encoded shards came with or as the text encoder gives it.

    Ends the run if the stored one, or the latents of the grey ramp stored beside it, are those of other models.
    """
    path, found = Path(re.sub("^file:(//)?", "", urls[0])).with_name("empty.safetensors"), encode_prompts(models, [""])
    computed = dict(zip(("text", "pooled"), found if isinstance(found, tuple) else (found,), strict=False))
    if not path.is_file():  # behind a URL
        return computed
    device, names = computed["text"].device, tuple(computed)
    with lent(models.vae, device):
        ramp = torch.arange(0, 256, 4, dtype=torch.uint8, device=device).expand(1, 3, 64, 64)
        computed["latents"] = encode_images(models.vae, ramp, 1)[0]
    try:
        stored = {name: value.to(device) for name, value in load_file(path).items()}
    except Exception as error:
        fail(f"{path} is damaged: {first_line(error)}; delete it, and the text encoder makes it anew")
    for name, value in computed.items():
        known = stored.get(name, value.new_zeros(0))
        if known.shape != value.shape or not (known - value).norm() < 0.1 * value.norm():
            what = "VAE's" if name == "latents" else f"teacher's {name}"
            fail(f"{path} does not hold this {what} encoding: the shards were made with another model")
    return {name: stored[name] for name in names}


@torch.no_grad()
def encode_batch(run, batch, generator):
    """Latents x_0, float32 and sampled, and conditioning c of a batch: encoded here, or as its shards hold them."""
    models, names = run.models, {"mean", "std", "text", "pixel_values", "is_empty"} & batch.keys()
    given = {name: batch[name].to(run.accelerator.device, non_blocking=True) for name in names}
    if "pixel_values" in given:
        mean, std = encode_images(models.vae, given["pixel_values"], run.args.vae_encode_batch_size)
        c = encode_prompts(models, batch["captions"])
    else:
        mean, std = given["mean"].float(), given["std"].float()
        c = torch.where(given["is_empty"].view(-1, 1, 1), run.empty["text"], given["text"])
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    return (mean + std * noise) * models.vae.config.scaling_factor, c


# ----------------------------------------------------------------------------------------- checkpoints and export
COUNTERS = ("step", "nonfinite_steps", "nonfinite_in_a_row")


@dataclasses.dataclass
class Run:
    """Everything a training step touches."""

    args: argparse.Namespace
    accelerator: Accelerator
    models: SimpleNamespace  # of load_models
    nets: dict  # Denoisers: student, target, teacher
    optimizer: AcceleratedOptimizer
    lr_scheduler: object
    reader: BatchReader
    uncond: torch.Tensor | None
    empty: dict  # with encoded shards, the embedding of an empty caption
    step: int = 0
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0
    stop_signal: int = 0
    history: list = dataclasses.field(default_factory=list)  # (loss, grad_norm) of the steps since the last log
    references: dict = dataclasses.field(default_factory=dict)  # by size: Sampler and pictures of validate_size


def list_checkpoints(output):
    """Checkpoint folders, oldest first; one that was being written when the run died has another name."""
    found = [path for path in Path(output).glob("checkpoint-*") if path.is_dir() and path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def share(paths, like):
    """Gives files the permissions of the file `like`: safetensors 0.8 writes them for their owner alone."""
    for path in paths:
        with contextlib.suppress(OSError):  # not every file system has permissions
            shutil.copymode(like, path)


def write_checkpoint(run, temporary, cursors, history, skipped):
    """Writes the files of a checkpoint and waits until they are on the disk."""
    temporary.mkdir()
    for name in ("student", "target"):
        save_file(network_state(run.models, name), temporary / f"{name}.safetensors")
    torch.save(run.optimizer.optimizer.state_dict(), temporary / "optimizer.pt")
    state = {**{name: getattr(run, name) for name in COUNTERS}, "args": public_args(run.args), "skipped": skipped,
             "lr_scheduler": run.lr_scheduler.state_dict(), "history": history,
             "scaler": run.accelerator.scaler.state_dict() if run.accelerator.scaler else None,
             "stream": {**run.reader.stream.state, "cursors": cursors, "turn": run.reader.turn}}  # fmt: skip
    (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
    share(temporary.glob("*.safetensors"), temporary / "state.json")
    for path in (*temporary.iterdir(), temporary):  # on the disk before the name says that it is whole
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def save_checkpoint(run):
    """Writes checkpoint-<step> under a temporary name, renames it when whole, and only then removes old ones.

    Collective: every rank calls it. There are no random states to save: a step's draws depend on (seed, step, rank), a
    sample's on (seed, position).
    """
    args, accelerator, reader = run.args, run.accelerator, run.reader
    cursors = gather_object(reader.cursors)
    history, skipped = gather_history(run), reduce_skipped(run)
    if accelerator.is_main_process:
        final, temporary = (Path(args.output_dir, f"{name}-{run.step}") for name in ("checkpoint", "tmp-checkpoint"))
        for unfinished in Path(args.output_dir).glob("tmp-checkpoint-*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        try:
            write_checkpoint(run, temporary, cursors, history, skipped)
        except Exception as error:  # a full disk: Python, safetensors and torch.save each raise another kind
            fail(f"{final} cannot be written: {first_line(error)}; make room, and --resume_from_checkpoint latest")
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        whole = list_checkpoints(args.output_dir)
        kept = whole[: whole.index(final) + 1]  # after it: of a run that was abandoned by resuming from an earlier one
        for old in {*whole} - {*kept[-(args.checkpoints_total_limit or len(kept)) :]}:
            shutil.rmtree(old)
        logger.info("Saved %s", final)
    accelerator.wait_for_everyone()


def read_checkpoint(path):
    """Returns the state of a checkpoint folder with its tensors. Raises anything if a file is missing or damaged."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if missing := {*COUNTERS, "args", "skipped", "lr_scheduler", "history", "scaler", "stream"} - {*state}:
        raise ValueError(f"state.json has no {', '.join(sorted(missing))}")
    networks = {name: load_file(path / f"{name}.safetensors") for name in ("student", "target")}
    optimizer = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
    return {**state, **networks, "optimizer": optimizer, "path": path}


def find_checkpoint(args):
    """Resolves --resume_from_checkpoint to a checkpoint's state, or to None for `latest` in a fresh output folder.

    `latest` passes over damaged checkpoints, with a warning; one that is named has to be whole.
    """
    wanted = args.resume_from_checkpoint
    if not wanted:
        return None
    named = Path(wanted) if Path(wanted).is_dir() else Path(args.output_dir, wanted)
    found = list_checkpoints(args.output_dir)[::-1] if wanted == "latest" else [named]
    for path in found:
        try:
            state = read_checkpoint(path)
            break
        except Exception as error:
            problem = f"checkpoint {path} is damaged or not there: {first_line(error)}"
            if path == found[-1]:
                fail(f"--resume_from_checkpoint {wanted}: {problem}")
            logger.warning("%s; going back to the one before", problem)
    else:
        logger.warning("--resume_from_checkpoint latest: no checkpoint in %s yet, starting afresh", args.output_dir)
        return None
    ignored = {"output_dir", "resume_from_checkpoint", "train_shards_path_or_url", "dataloader_num_workers"}
    known = {name: value for name, value in public_args(args).items() if value is not None}  # others follow from data
    if (made := state["args"].get("optimizer", args.optimizer)) != args.optimizer:
        fail(f"checkpoint {state['path']} was made with --optimizer {made}: go on with that")
    if changed := {name for name, value in known.items() if state["args"].get(name, value) != value} - ignored:
        logger.warning("Resuming with other values than before for: %s", ", ".join(f"--{k}" for k in sorted(changed)))
    return state


def restore_optimizer(run, state):
    """Restores the states of the optimizer and of the schedule; rate, betas and decay stay as the flags are now."""
    optimizer, schedule = run.optimizer.optimizer, run.lr_scheduler
    names = ("initial_lr", "betas", "eps", "weight_decay")
    asked = [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict({k: v for k, v in state["lr_scheduler"].items() if k not in ("base_lrs", "_last_lr")})
    for group, settings, rate in zip(optimizer.param_groups, asked, schedule.lr_lambdas, strict=True):
        group.update(settings, lr=settings["initial_lr"] * rate(schedule.last_epoch))


def load_checkpoint(run, state):
    """Restores everything `save_checkpoint` wrote; a checkpoint that does not fit the model is named."""
    try:
        for name in ("target", "student"):  # the student last: with --ema_decay 0 both may be one network
            load_network(run.models, name, state[name])
        restore_optimizer(run, state)
    except (RuntimeError, ValueError, KeyError) as error:
        fail(f"checkpoint {state['path']} is of another model: {first_line(error)}")
    if run.accelerator.scaler and state["scaler"]:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.step, run.nonfinite_steps, run.nonfinite_in_a_row = (state[name] for name in COUNTERS)
    rank, history = run.accelerator.process_index, state["history"]
    if len(history) == run.accelerator.num_processes:
        run.history = list(torch.tensor(history[rank], device=run.accelerator.device))
    if rank == 0:
        run.reader.skipped.update(state["skipped"])
    logger.info("Resumed from %s", state["path"])


def trim_metrics(run):
    """Forgets the lines of metrics.jsonl that a run which did not come to its next checkpoint wrote after this step."""

    def is_kept(line):
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a line that was cut off
            return run.step > 0 and json.loads(line)["step"] <= run.step

    path = Path(run.args.output_dir, "metrics.jsonl")
    if run.accelerator.is_main_process and path.is_file():
        kept = [line + "\n" for line in path.read_text(encoding="utf-8").splitlines() if is_kept(line)]
        path.with_suffix(".tmp").write_text("".join(kept), encoding="utf-8")
        path.with_suffix(".tmp").rename(path)


def export(run):
    """Writes a StableDiffusionPipeline (EMA U-Net, matching scheduler) and `unet_online`; returns what to upload."""
    args, output, models = run.args, Path(run.args.output_dir), run.models
    models.student.save_pretrained(output / "unet_online")
    try:
        tokenizer, text_encoder, vae = load_frozen(args, torch.float32)  # unrounded, whatever the compute precision was
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        models.target.save_pretrained(output / "unet")
        fail(f"the teacher cannot be read again ({first_line(error)}): {output} holds unet and unet_online alone")
    StableDiffusionPipeline(vae, text_encoder, tokenizer, models.target, models.scheduler, None, None,
                            requires_safety_checker=False).save_pretrained(output)  # fmt: skip
    return ["model_index.json", "unet/*", "unet_online/*", "vae/*", "text_encoder/*", "tokenizer/*", "scheduler/*"]


def open_repository(args):
    """Makes the repository of --push_to_hub if it is not there, and puts its whole name into `hub_model_id`."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        args.hub_model_id = create_repo(name, token=args.hub_token, exist_ok=True).repo_id
    except Exception as error:  # no access, no network, no such name
        fail(f"--push_to_hub {name}: {first_line(error)}")


def publish(run, patterns):
    """Adds the last sample grid and the model card to what was exported, and uploads that and nothing else."""
    args, output = run.args, Path(run.args.output_dir)
    grids = [path for path in output.glob("validation/step-*.png") if path.stem[5:].isdigit()]
    if grids := sorted(grids, key=lambda path: int(path.stem[5:])):
        shutil.copyfile(grids[-1], output / "samples.png")
    (output / "README.md").write_text(model_card(run, bool(grids)), encoding="utf-8")
    share(output.rglob("*.safetensors"), output / "README.md")
    if args.push_to_hub:
        try:
            upload_folder(repo_id=args.hub_model_id, folder_path=output, token=args.hub_token,
                          commit_message=f"Step {run.step}",
                          allow_patterns=["README.md", "samples.png", *patterns])  # fmt: skip
        except Exception as error:  # the hub, its HTTP client and the network raise many kinds
            fail(f"--push_to_hub: {first_line(error)}; the model is whole in {output}")


def usage(run):
    """The part of the model card that says how to use the model."""
    args = run.args
    return f"""```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({json.dumps(args.hub_model_id or args.output_dir)})
prompt = {json.dumps(load_prompts(args)[0][0], ensure_ascii=False)}
image = pipe(prompt, {CALL.format(args.validation_guidance_scale)}).images[0]
```

`guidance_scale` was trained from {args.w_min + 1:g} to {args.w_max + 1:g}; negative prompts have no effect.
`unet` is the EMA network, `unet_online` the one that the optimizer moved."""


def model_card(run, has_samples):
    """The README.md of the exported model: usage, samples, arguments, base model and its licence."""
    args, base, licence = run.args, run.args.pretrained_teacher_model, "unknown"
    with contextlib.suppress(Exception):  # no card, or no network: the licence is then for the reader to look up
        card = Path(base, "README.md") if os.path.isdir(base) else base
        licence = ModelCard.load(card, ignore_metadata_errors=True).data.license or licence
    return f"""---
license: {licence}
base_model: {json.dumps(base)}
library_name: diffusers
tags: [text-to-image, stable-diffusion, {TAG}]
---

# {Path(args.output_dir).resolve().name}

A {METHOD} made from `{base}` (licence: {licence}), for few steps:

{usage(run)}
{"![Teacher and student side by side](samples.png)" if has_samples else ""}

Arguments:

```json
{json.dumps(public_args(args), indent=2, ensure_ascii=False)}
```
"""


# ---------------------------------------------------------------------------------------- validation and logging
def load_prompts(args):
    """Returns the validation prompts, and for each file of prompts its name → the indices of its lines."""
    prompts, groups = [], {}
    for entry in args.validation_prompts:
        lines = [entry]
        if entry.endswith(".txt"):
            try:
                lines = [line.strip() for line in Path(entry).read_text(encoding="utf-8").splitlines() if line.strip()]
            except (OSError, ValueError) as error:
                fail(f"--validation_prompts: {entry} cannot be read: {getattr(error, 'strerror', None) or error}")
            if not lines:
                fail(f"--validation_prompts: {entry} holds no prompt")
            name = Path(entry).stem if Path(entry).stem not in groups else entry
            groups[name] = range(len(prompts), len(prompts) + len(lines))
        prompts += lines
    return prompts, groups


@torch.no_grad()
def sample_chain(predict, schedule, noise, timesteps):
    """The deterministic chain to the last x̂_0: predict(x, t)[0] = x̂_0, the noise it implies, jump to the next time."""
    x = noise
    for now, then in zip(timesteps, [*timesteps[1:], None], strict=True):
        t = torch.full((len(x),), now, device=x.device)
        x_0 = predict(x, t)[0]
        if then is not None:
            alpha, sigma = schedule.alpha_sigma(t)
            x = schedule.jump(x_0, (x - alpha * x_0) / sigma, torch.full_like(t, then))
    return x_0


@torch.no_grad()
def sample_stock(net, scheduler, noise, steps, c, w, args):
    """Pictures as users will make them: the exported scheduler, which adds fresh noise between its steps."""
    scheduler.set_timesteps(steps, device=noise.device)
    generator, x = torch.Generator(noise.device).manual_seed(args.seed), noise
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t.expand(len(x)), c, w), t, x, generator=generator, return_dict=False)[0]
    return x


class Stopped(Exception):
    """A signal ended a validation."""


class Sampler:
    """Draws the validation pictures of every network from the same noise and prompts, `chunk` at a time.

    `size` is (width, height). Images are (prompts × seeds, 3, height, width), on the CPU. Its generators are its own.
    """

    def __init__(self, run, size, chunk=8):
        args, models = run.args, run.models
        self.run, self.chunk, self.seeds = run, chunk, args.num_validation_images
        self.prompts, self.groups = load_prompts(args)
        width, height = (side // 2 ** (len(models.vae.config.block_out_channels) - 1) for side in size)
        shape = (len(self.prompts) * self.seeds, models.vae.config.latent_channels, height, width)
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed)).to(run.accelerator.device)
        with lent(models.text_encoder, self.noise.device):
            self.c = encode_prompts(models, self.prompts).repeat_interleave(self.seeds, dim=0)
            self.uncond = encode_prompts(models, [args.validation_negative_prompt])

    def images(self, name, steps, stock=False):
        """Pictures of `teacher` (guided), `untrained` (the teacher as consistency function), `student` or `target`."""
        args, models, net = self.run.args, self.run.models, self.run.nets["teacher" if name == "untrained" else name]
        schedule, scheduler, weight, parts = models.schedule, models.scheduler, args.validation_guidance_scale - 1, []
        if name == "teacher":  # whose steps need not lie on the trained grid
            timesteps = [round(schedule.num_train_timesteps * (1 - j / steps)) - 1 for j in range(steps)]
        else:
            scheduler.set_timesteps(steps, device=self.noise.device)
            timesteps = scheduler.timesteps.tolist()
        for noise, c in zip(self.noise.split(self.chunk), self.c.split(self.chunk), strict=True):
            if self.run.stop_signal:
                raise Stopped
            given = {"c": c, "w": torch.full((len(noise),), weight, device=noise.device)}
            if stock:
                x_0 = sample_stock(net, scheduler, noise, steps, args=args, **given)
            elif name == "teacher":
                uncond = self.uncond if weight and not net.guidance_dim else None
                guided = functools.partial(guided_prediction, net, schedule, uncond=uncond, **given)
                x_0 = sample_chain(guided, schedule, noise, timesteps)
            else:
                f = functools.partial(predict_x0, net, schedule, args=args, **given)
                x_0 = sample_chain(lambda x_t, t: [f(x_t, t)], schedule, noise, timesteps)  # noqa: B023
            parts.append(decode_latents(models.vae, x_0, args.vae_encode_batch_size).cpu())
        return torch.cat(parts)


def validate(run):
    """Logs pictures of the EMA student beside the teacher's, and the PSNR of each network to the teacher's 50 steps."""
    if run.accelerator.is_main_process:
        # not compiled: its batches are others than those of training, which would be compiled anew for any size
        with contextlib.suppress(Stopped), torch.compiler.set_stance("force_eager"):
            for index, size in enumerate(run.args.validation_resolutions):
                validate_size(run, size, f"-{size[0]}x{size[1]}" if index else "")
    run.accelerator.wait_for_everyone()


def validate_size(run, size, suffix):
    """Validates at a (width, height). Pictures of all but the first size carry the size as a `suffix`."""
    args, steps, images = run.args, run.args.validation_num_inference_steps, run.references.setdefault(suffix, {})
    if not images:
        sampler = images["sampler"] = Sampler(run, size)
        images |= {("teacher", k): sampler.images("teacher", k) for k in sorted({50, *steps})}
        images |= {("untrained", k): sampler.images("untrained", k) for k in steps}
    sampler = images["sampler"]
    images |= {(name, k): sampler.images(name, k) for name in ("student", "target") for k in steps}
    metrics = fidelity(images, steps, {"": range(len(sampler.prompts)), **sampler.groups}, sampler.seeds)
    write_metrics(run, {key.replace("fidelity", f"fidelity{suffix}"): value for key, value in metrics.items()})
    columns = {f"teacher {k}": images["teacher", k] for k in (50, 4, 1) if ("teacher", k) in images}
    columns |= {"untrained 1": images["untrained", 1]} if 1 in steps else {}
    columns |= {f"student {k}": sampler.images("target", k, stock=True) for k in steps}
    grid = draw_grid({title: column[:: sampler.seeds] for title, column in columns.items()}, sampler.prompts)
    path = Path(args.output_dir, "validation", f"step-{run.step}{suffix}.png")
    path.parent.mkdir(exist_ok=True)
    grid.save(path)
    for tracker in run.accelerator.trackers:
        kwargs = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({f"validation{suffix}": np.asarray(grid)[None]}, step=run.step, **kwargs)
    print_fidelity(metrics, steps, sampler, args)


def fidelity(images, steps, groups, seeds):
    """PSNR (dB) and sharpness against the teacher's 50 steps: `fidelity/<network>_psnr_k<k>`, also by prompt file.

    Sharpness is the ratio of mean gradient magnitudes: PSNR alone rewards blur. Images are in [0, 1].
    """

    def gradient(pictures):
        return pictures.diff(dim=2).abs().mean() + pictures.diff(dim=3).abs().mean()

    metrics = {}
    for group, prompts in groups.items():
        chosen = [prompt * seeds + seed for prompt in prompts for seed in range(seeds)]
        reference = images["teacher", 50][chosen]
        for name, k in itertools.product(("teacher", "untrained", "student", "target"), steps):
            pictures, suffix = images[name, k][chosen], f"k{k}/{group}".rstrip("/")
            psnr = -10 * (pictures - reference).square().mean(dim=(1, 2, 3)).clamp_min(1e-10).log10()
            metrics[f"fidelity/{name}_psnr_{suffix}"] = round(psnr.mean().item(), 3)
            metrics[f"fidelity/{name}_sharpness_{suffix}"] = round((gradient(pictures) / gradient(reference)).item(), 3)
    return metrics


def print_fidelity(metrics, steps, sampler, args):
    """Prints the table of PSNRs, for all prompts or for each file of them."""
    labels = {"teacher": "teacher, guided (2 evaluations a step)", "untrained": "untrained student",
              "student": "student", "target": "student, EMA (exported)"}  # fmt: skip
    lines = [f"PSNR in dB to the teacher's 50 steps: deterministic chain, guidance scale "
             f"{args.validation_guidance_scale:g}, {len(sampler.prompts)} prompts × {sampler.seeds} seeds"]  # fmt: skip
    for group in sampler.groups or [""]:
        lines.append(f"{group or 'steps':42}" + "".join(f"{k:8}" for k in steps))
        for name, label in labels.items():
            values = [metrics[f"fidelity/{name}_psnr_" + f"k{k}/{group}".rstrip("/")] for k in steps]
            lines.append(f"  {label:40}" + "".join(f"{value:8.2f}" for value in values))
    tqdm.write("\n".join(lines))


def draw_grid(columns, prompts):
    """Draws images side by side: a row a prompt, a titled column for each entry of {title: (prompts, 3, h, w)}."""
    height, width = next(iter(columns.values())).shape[-2:]
    enlarged, left, top, gap = max(1, 96 / height), 150, 24, 4
    cell = round(width * enlarged), round(height * enlarged)
    size = (left + len(columns) * (cell[0] + gap), top + len(prompts) * (cell[1] + gap))
    grid, font = Image.new("RGB", size, "white"), ImageFont.load_default(13)
    pen = ImageDraw.Draw(grid)
    for row, prompt in enumerate(prompts):
        pen.multiline_text((gap, top + row * (cell[1] + gap)), textwrap.fill(prompt[:100], 20), "black", font)
    for column, (title, images) in enumerate(columns.items()):
        x = left + column * (cell[0] + gap)
        pen.text((x, gap), title, "black", font)
        for row, image in enumerate(images):
            picture = Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
            grid.paste(picture.resize(cell, Image.Resampling.BICUBIC), (x, top + row * (cell[1] + gap)))
    return grid


def write_metrics(run, metrics):
    """Appends a line to metrics.jsonl and sends it to the trackers. Called on the main process."""
    try:
        with open(Path(run.args.output_dir, "metrics.jsonl"), "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": run.step, **metrics}) + "\n")
    except OSError as error:  # a full disk: a line less, but the run goes on
        logger.warning("metrics.jsonl cannot be written: %s", error)
    numbers = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
    run.accelerator.log(numbers, step=run.step)


def reduce_skipped(run):
    """Skipped samples by reason, summed over the ranks."""
    return dict(sum(gather_object([run.reader.skipped]), Counter()))


def gather_history(run):
    """(loss, gradient norm) of the steps since the last log: a list (ranks, steps, 2), the same on every rank."""
    return run.accelerator.gather(torch.stack(run.history)[None]).tolist() if run.history else []


def log_metrics(run, clock, progress):
    """Logs the means since the last log: the only place where a plain training step waits for the device.

    Ends the run, on all ranks, if ten steps in a row had no finite loss.
    """
    args, accelerator = run.args, run.accelerator
    losses, grad_norms = torch.tensor(gather_history(run)).mean(dim=0).T
    # infinite gradients are usual where the fp16 scaler handles them
    good = losses.isfinite() & (grad_norms.isfinite() | (accelerator.scaler is not None))
    for is_good in good.tolist():
        run.nonfinite_steps += not is_good
        run.nonfinite_in_a_row = 0 if is_good else run.nonfinite_in_a_row + 1
        if run.nonfinite_in_a_row == 10:
            fail("ten steps in a row had a non-finite loss; try bf16 instead of fp16, a lower --learning_rate, and a "
                 "VAE that does not overflow in fp16 (--pretrained_vae_model_name_or_path)")  # fmt: skip
    finite = losses[good], grad_norms[grad_norms.isfinite()]
    loss, grad_norm = (values.mean().item() if len(values) else None for values in finite)
    seconds = time.perf_counter() - clock["time"]
    batch = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    memory, free = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, psutil.virtual_memory().available
    if accelerator.device.type == "cuda":
        memory, free = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[0]
    speed = batch * (run.step - clock["step"]) / seconds
    metrics = {"loss": loss, "grad_norm": grad_norm, "lr": run.lr_scheduler.get_last_lr()[0], "samples_per_s": speed,
               "data_wait": run.reader.waited / seconds, "peak_memory_gb": memory / 2**30,
               "free_memory_gb": free / 2**30, "nonfinite_steps": run.nonfinite_steps,
               "skipped": reduce_skipped(run)}  # fmt: skip
    run.history.clear()
    run.reader.waited, clock["time"], clock["step"] = 0.0, time.perf_counter(), run.step
    if accelerator.is_main_process:
        write_metrics(run, metrics)
        progress.set_postfix_str(f"loss {math.nan if loss is None else loss:.4g}, {speed:.3g} images/s")


# -------------------------------------------------------------------------------------------------- training loop
def step_generator(run, micro_step):
    """Seeds PyTorch, and gives a generator for the draws of this micro-step: pure functions of (seed, step, rank)."""
    name = f"{run.args.seed}/{run.step}/{micro_step}/{run.accelerator.process_index}"
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
    torch.manual_seed(seed)  # for dropout, where a model has any
    return torch.Generator(run.accelerator.device).manual_seed(seed)


@torch.no_grad()
def update_target(models, args):
    """θ⁻ ← μ θ⁻ + (1 − μ) θ, all at once, or layer by layer where θ⁻ is kept on the CPU."""
    if not args.offload_ema:
        return torch._foreach_lerp_(models.target_parameters, models.student_parameters, 1 - args.ema_decay)
    for target, student in zip(models.target_parameters, models.student_parameters, strict=True):
        moved = target.to(student.device, non_blocking=True).lerp_(student, 1 - args.ema_decay)
        target.copy_(moved, non_blocking=True)  # on the host when the loss of this step is read there


def train_step(run):
    """One optimizer step over --gradient_accumulation_steps micro-batches, then the EMA of the target."""
    args, accelerator, models = run.args, run.accelerator, run.models
    loss_sum = torch.zeros((), device=accelerator.device)
    for micro_step in range(args.gradient_accumulation_steps):
        batch, generator = run.reader.next_batch(), step_generator(run, micro_step)
        with accelerator.accumulate(run.nets["student"].unet):
            x_0, c = encode_batch(run, batch, generator)
            draws = draw(x_0, models.schedule, args, generator)
            loss = distillation_loss(**run.nets, schedule=models.schedule, x_0=x_0, c=c, uncond=run.uncond,
                                     draws=draws, args=args)  # fmt: skip
            accelerator.backward(loss)
            loss_sum += loss.detach() / args.gradient_accumulation_steps
    grad_norm = accelerator.clip_grad_norm_(models.student_parameters, args.max_grad_norm or math.inf)
    optimizer_step(run, grad_norm)
    update_target(models, args)
    run.history.append(torch.stack([loss_sum, grad_norm]))


def optimizer_step(run, grad_norm):
    """Steps the optimizer unless the gradients are not finite.

    A fused one decides that on the device, by the attributes that torch.amp.GradScaler gives it; others wait for it.
    """
    optimizer, is_bad = run.optimizer.optimizer, ~torch.isfinite(grad_norm)
    has_scaler = run.accelerator.scaler is not None  # which skips such steps itself
    if optimizer.defaults.get("fused") and not has_scaler:
        optimizer.grad_scale, optimizer.found_inf = None, is_bad.float()
    if optimizer.defaults.get("fused") or has_scaler or not is_bad:
        run.optimizer.step()
    run.optimizer.zero_grad()
    run.lr_scheduler.step()


def handle_signals(run):
    """SIGTERM and SIGINT end the run after the step under way, with a checkpoint; a second SIGINT ends it at once."""

    def handler(signum, _frame):
        run.stop_signal = signum
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # SIGTERM often comes twice: from the batch system and torchrun

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, handler)


def train(run):
    """The loop: steps, logs, checkpoints and validations until --max_train_steps or a signal."""
    args, accelerator = run.args, run.accelerator
    host_group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None
    progress = tqdm(total=args.max_train_steps, initial=run.step, disable=not accelerator.is_local_main_process,
                    desc="Steps", unit="step", dynamic_ncols=True)  # fmt: skip
    if args.validation_steps and run.step == 0:
        validate(run)
    clock = {"time": time.perf_counter(), "step": run.step}
    while run.step < args.max_train_steps:
        train_step(run)
        run.step += 1
        progress.update()
        is_last = run.step == args.max_train_steps
        if run.step % args.logging_steps == 0 or is_last:
            log_metrics(run, clock, progress)
        stop = torch.tensor(run.stop_signal)
        if host_group:  # the ranks agree on the host, so that the device need not be waited for
            torch.distributed.all_reduce(stop, torch.distributed.ReduceOp.MAX, group=host_group)
        paused = time.perf_counter()
        if stop or (args.checkpointing_steps and (run.step % args.checkpointing_steps == 0 or is_last)):
            save_checkpoint(run)
        if stop:
            progress.close()
            logger.warning("Stopped by signal %d; go on with --resume_from_checkpoint latest", stop)
            raise SystemExit(128 + int(stop))
        if args.validation_steps and (run.step % args.validation_steps == 0 or is_last):
            validate(run)
        clock["time"] += time.perf_counter() - paused
    progress.close()


# ------------------------------------------------------------------------------------------------------------ main
def make_accelerator(args):
    """Starts the processes' communication, logging and trackers."""
    config = ProjectConfiguration(args.output_dir, str(Path(args.output_dir, args.logging_dir)))
    accelerator = Accelerator(mixed_precision=args.mixed_precision, project_config=config,
                              gradient_accumulation_steps=args.gradient_accumulation_steps,
                              log_with=None if args.report_to == "none" else args.report_to)  # fmt: skip
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING, force=True)
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    return accelerator


def make_optimizer(args, parameters, num_processes):
    """The optimizer, and its schedule, which is stepped once an optimizer step on every rank."""
    scale = args.train_batch_size * args.gradient_accumulation_steps * num_processes if args.scale_lr else 1
    settings = {"lr": args.learning_rate * scale, "weight_decay": args.adam_weight_decay}
    adam = {**settings, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, fused=True, **adam)
    elif args.optimizer == "adafactor":
        optimizer = torch.optim.Adafactor(parameters, **settings)
    elif args.optimizer == "prodigy":
        from prodigyopt import Prodigy

        if args.learning_rate < 0.1:
            logger.warning("prodigy finds its learning rate by itself; --learning_rate should be 1, and scales it")
        optimizer = Prodigy(parameters, safeguard_warmup=True, use_bias_correction=True, **adam)
    else:
        from bitsandbytes import optim

        kinds = {"adamw8bit": optim.AdamW8bit, "paged_adamw8bit": optim.PagedAdamW8bit, "lion8bit": optim.Lion8bit}
        adam = {k: v for k, v in adam.items() if k != "eps"} if args.optimizer == "lion8bit" else adam
        optimizer = kinds[args.optimizer](parameters, **adam)
    schedule = {"num_warmup_steps": args.lr_warmup_steps, "num_training_steps": args.max_train_steps}
    try:
        return optimizer, get_scheduler(args.lr_scheduler, optimizer, **schedule)
    except ValueError as error:  # polynomial ends at 1e-7 and must begin above it
        fail(f"--lr_scheduler {args.lr_scheduler} with this --learning_rate: {error}")


def unconditional(models, nets, args):
    """The conditioning of the teacher's unconditional half, or None where that is not run."""
    return encode_prompts(models, [""]) if args.w_max > 0 and not nets["teacher"].guidance_dim else None


def start_run(args, accelerator):
    """Checks the inputs, loads models, data and checkpoint, and returns the Run."""
    scheduler = check_teacher(args)
    load_prompts(args)
    urls = expand_shards(args.train_shards_path_or_url)
    checkpoint = find_checkpoint(args)
    # the main process looks, all are told
    args.encoded_shards = broadcast_object_list([accelerator.is_main_process and check_shards(urls, args)])[0]
    if args.max_train_steps is None:
        images = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        samples = args.max_train_samples or count_samples(urls, args)
        args.max_train_steps = args.num_train_epochs * math.ceil(samples / images)
    models = load_models(args, scheduler, accelerator)
    optimizer, lr_scheduler = make_optimizer(args, models.student_parameters, accelerator.num_processes)
    nets, optimizer = prepare(models, optimizer, accelerator)
    with lent(models.text_encoder, accelerator.device):
        uncond = unconditional(models, nets, args)
        empty = find_empty(models, urls) if args.encoded_shards else {}
    shapes = {name: tuple(value.shape[1:]) for name, value in empty.items()}
    shapes["mean"] = (models.vae.config.latent_channels, 0, 0)
    rank, world_size, state = accelerator.process_index, accelerator.num_processes, checkpoint and checkpoint["stream"]
    reader = BatchReader(ShardStream(urls, args, rank, world_size, state, shapes), accelerator.device)
    run = Run(args, accelerator, models, nets, optimizer, lr_scheduler, reader, uncond, empty)
    if checkpoint:
        load_checkpoint(run, checkpoint)
    trim_metrics(run)
    return run


def memory_savers(args):
    """What is still to be tried against an out-of-memory error, by the flags in use."""
    has_target = args.ema_decay and not getattr(args, "lora_rank", 0)
    savers = {"a smaller --train_batch_size": args.train_batch_size > 1,
              "--gradient_checkpointing": not args.gradient_checkpointing,
              "--offload_ema": has_target and not getattr(args, "offload_ema", True),
              "--optimizer adamw8bit": args.optimizer in ("adamw", "prodigy"),
              "shards that prepare_shards.py encoded (no VAE, no text encoder)": not args.encoded_shards,
              "a smaller --resolution": True}  # fmt: skip
    return [saver for saver, is_unused in savers.items() if is_unused]


def main(argv=None):
    args = parse_args(argv)
    check_environment(args)
    accelerator = make_accelerator(args)
    run = start_run(args, accelerator)
    if accelerator.is_main_process:
        if args.push_to_hub:
            open_repository(args)
        Path(args.output_dir, "args.json").write_text(json.dumps(public_args(args), indent=2) + "\n", encoding="utf-8")
        config = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in public_args(args).items()}
        accelerator.init_trackers(args.tracker_project_name, config)
    handle_signals(run)
    try:
        train(run)
    except torch.OutOfMemoryError as error:
        fail(f"out of device memory: {first_line(error)} Try {', '.join(memory_savers(args))}")
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        fail(f"a loader worker died: {error}; is there enough memory? go on with --resume_from_checkpoint latest")
    finally:
        run.reader.close()
    if accelerator.is_main_process:
        publish(run, export(run))
    accelerator.end_training()


if __name__ == "__main__":
    main()
