#!/usr/bin/env python
# Copyright 2026 the authors of this repository. Licensed under the Apache License, Version 2.0.
"""Turns pictures and captions into WebDataset shards for the training scripts, and tells what is wrong with them.

    python tools/prepare_shards.py --check --image_folder photos                reads all, prints a table, draws a sheet
    python tools/prepare_shards.py --image_folder photos --output_dir shards    packs the files as they are
    accelerate launch tools/prepare_shards.py --train_shards_path_or_url "cc12m/{00000..01242}.tar" --output_dir ready \
        --aspect_ratio_buckets --encode stable-diffusion-v1-5/stable-diffusion-v1-5 --random_flip --mixed_precision bf16

Sources are a folder with `.txt` files beside the pictures, with metadata.jsonl or metadata.csv (as `imagefolder` of
datasets), or with COCO annotations; a data set that `datasets` has saved, or parquet files with pictures in them; or
shards, by the flag that the training scripts have for them.

The work is cut into jobs, each of which depends on the source and the flags alone: however many processes share them,
and however often they are stopped and started again, the shards are the same to the byte. Until all jobs are done,
everything lies in `output_dir/progress`; then the shards are numbered and `index.json` is written. A sample is

    <key>.jpg          the file as it was; with --aspect_ratio_buckets, the part of it that was chosen
    <key>.txt          the caption, where there is only one
    <key>.json         captions; source; original_width, original_height; crop [left, top, width, height] within the
                       resized picture, or null; time_ids, SDXL's micro-conditioning; what a source shard's JSON has
    <key>.safetensors  with --encode: latents_mean, latents_std (channels, height/8, width/8), the VAE's posterior
                       before the scaling factor; with --random_flip also flipped_mean, flipped_std; text (captions,
                       tokens, width) and, for SDXL, pooled (captions, width). `fingerprint` tells what made it
"""

import argparse
import contextlib
import csv
import datetime
import errno
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import os
import random
import re
import select
import shlex
import shutil
import statistics
import sys
import tarfile
import tempfile
import textwrap
import time
import unicodedata
import urllib.parse
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import PIL
import psutil
import torch
import transformers
from accelerate import PartialState
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from tqdm.auto import tqdm
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection
from webdataset.gopen import Pipe, gopen
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys

# ------------------------------------------------------------------------------------------------------- arguments
# Copied from the engine
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Copied from the engine
INTERPOLATION = {k: Image.Resampling[k.upper()] for k in "bilinear bicubic box nearest hamming lanczos".split()}


# Copied from the engine
INTERPOLATION["nearest_exact"] = Image.Resampling.NEAREST  # which is exact in PIL
STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
# what may change between two starts; the batch size changes no more than rounding
INDIFFERENT = set("output_dir num_threads cache_dir shard_timeout check contact_sheet encode_batch_size".split())
INDIFFERENT.add("skip_unreadable_shards")
SECRET = {"train_shards_path_or_url", "encode"}  # flags that may hold one


# Copied from the engine
logger = logging.getLogger("train")
# Copied from the engine
QUIET = ("diffusers.models.modeling_utils", "diffusers.loaders.lora_base", "transformers.modeling_utils",
         "transformers.distributed.tensor_parallel")  # fmt: skip


# Copied from the engine
def fail(message):
    """Ends the process with one line that says what to do, instead of a traceback."""
    raise SystemExit(f"error: {message}")


# Copied from the engine
def first_line(error):
    """The first line of what an exception says, or its kind where it says nothing."""
    for cause in (error, error.__context__):  # of which the libraries say that a file is missing
        if isinstance(cause, LocalEntryNotFoundError):
            return "it is no folder or file here, is not whole in the cache, and the hub cannot be reached"
        if isinstance(cause, HFValidationError):
            return "it is no folder or file here, and cannot be the name of a repository"
        if isinstance(cause, NotImplementedError) and "meta tensor" in str(cause):  # one that was given no values
            return "it does not hold all tensors of the model"
    return (str(error).splitlines() or [type(error).__name__])[0]


# Copied from the engine
def number(kind, low, high=math.inf):
    """An argparse type: a number within [low, high]."""

    def parse(text):
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} does not lie in {low} … {high}")
        return value

    parse.__name__ = kind.__name__  # which argparse names where the text is no number
    return parse


def add_source_args(parser):
    add = parser.add_argument_group("source (a folder, a data set or shards)").add_argument
    add("--image_folder", metavar="DIR", help="pictures; captions in .txt beside them or in metadata.jsonl/csv")
    add("--coco_annotations", nargs="+", metavar="JSON", help="captions of --image_folder instead, all of each picture")
    add("--dataset", nargs="+", metavar="PATH", help="folders of Hugging Face's datasets (save_to_disk), folders with "
        "parquet files, or parquet and arrow files, with a column of pictures; needs pyarrow")  # fmt: skip
    add("--image_column", help="of --dataset (default: the one that holds pictures)")
    add("--caption_column", help="of metadata files and --dataset (default: text, caption or captions)")
    add("--default_caption", metavar="TEXT", help="caption of the pictures that have none (default: they are skipped)")
    add("--train_shards_path_or_url", nargs="+", metavar="SHARDS",
        help="tar shards: brace patterns, paths, URLs, pipe: commands, or a .txt list with one a line")  # fmt: skip
    add("--group_input_shards", type=number(int, 1), default=1, help="input shards in a job: what is packed together")
    add("--skip_unreadable_shards", action="store_true", help="finish without the shards that cannot be read whole")
    add("--shard_timeout", type=float, default=60.0, help="seconds without data until a URL or pipe is given up")


def add_picture_args(parser):
    add = parser.add_argument_group("pictures").add_argument
    add("--min_image_size", type=number(int, 0), default=0, help="skip pictures with a smaller side; in buckets, those "
        "above it may be enlarged, at 0 none")  # fmt: skip
    add("--min_megapixels", type=number(float, 0), help="skip pictures of a smaller area, in millions of pixels")
    add("--max_megapixels", type=number(float, 0), help="skip pictures of a larger area, in millions of pixels")
    add("--max_pwatermark", type=float, default=0.5, help="skip samples whose JSON gives a higher pwatermark")
    add("--resolution", type=number(int, 1), default=512, help="side of the squares, or root of the buckets' area")
    add("--aspect_ratio_buckets", action="store_true", help="shards of one size each, nearest to the pictures' shape")
    add("--bucket_step", type=number(int, 1), default=64, help="the buckets' sides are multiples of it")
    add("--interpolation_type", default="bilinear", choices=sorted(INTERPOLATION), help="filter of the resize")
    add("--center_crop", action="store_true", help="crop the centre instead of a random place")
    add("--image_format", default="jpg", choices=FORMATS, help="of pictures that were cropped")
    add("--image_quality", type=number(int, 1, 100), default=95, help="of jpg and webp")


def add_encode_args(parser):
    add = parser.add_argument_group("encoding").add_argument
    add("--encode", metavar="MODEL", help="store latents and text embeddings of this SD 1.x, 2.x or SDXL pipeline: hub "
        "id, folder or .safetensors file")  # fmt: skip
    add("--single_file_config", help="hub id or folder with the configuration that belongs to that file (default: the "
        "original model's, from the hub)")  # fmt: skip
    add("--variant", help="weights to take (default: the plain ones; fp16 if there are no others)")
    add("--teacher_revision", help="revision of its repository")
    add("--pretrained_vae_model_name_or_path", help="another VAE: hub id, folder or .safetensors file")
    add("--revision", help="revision of the VAE's repository (--pretrained_vae_model_name_or_path)")
    add("--cache_dir", help="where downloaded models are kept")
    add("--random_flip", action="store_true", help="encode the mirrored pictures too")
    add("--encode_dtype", default="float16", choices=STORED, help="of what is stored")
    add("--encode_batch_size", type=number(int, 1), default=16, help="pictures in a batch")
    add("--mixed_precision", choices=list(DTYPES), help="of the computation (default: as `accelerate config` says)")
    add("--keep_images", action="store_true", help="keep the cropped pictures in encoded shards")


def add_output_args(parser):
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", help="folder of the shards")
    add("--samples_per_shard", type=number(int, 1), default=1000, help="the most samples in a shard")
    add("--seed", type=int, default=0, help="of the order and of random crops")
    add("--num_threads", type=number(int, 1), default=8, help="that decode, in each process")
    add("--check", action="store_true", help="write no shards: print what is usable and what is not, and why")
    add("--contact_sheet", metavar="PNG", default="contact_sheet.png", help="picture that --check draws")


# Copied from the engine
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
        usage="%(prog)s (--image_folder DIR | --dataset PATH | --train_shards_path_or_url SHARDS) "
              "(--output_dir DIR | --check) [flags]",
    )  # fmt: skip
    parser.convert_arg_line_to_args = lambda line: shlex.split(line.removeprefix("\ufeff"), comments=True)
    for add_group in (add_source_args, add_picture_args, add_encode_args, add_output_args):
        add_group(parser)
    try:
        args = parser.parse_args(argv)
    except ValueError as error:  # of shlex or a codec
        parser.error(f"an @file with flags cannot be read: {error}")
    if sum(source is not None for source in (args.image_folder, args.dataset, args.train_shards_path_or_url)) != 1:
        parser.error("give either --image_folder, --dataset or --train_shards_path_or_url")
    needed = {"coco_annotations": "image_folder", "image_column": "dataset", "random_flip": "encode",
              "keep_images": "encode", "variant": "encode", "single_file_config": "encode"}  # fmt: skip
    for flag, other in needed.items():
        if getattr(args, flag) and not getattr(args, other):
            parser.error(f"--{flag} needs --{other}")
    if not args.output_dir and not args.check:
        parser.error("give --output_dir, or --check")
    if args.aspect_ratio_buckets and args.resolution % args.bucket_step:
        parser.error(f"--resolution {args.resolution} is no multiple of --bucket_step {args.bucket_step}")
    if args.center_crop and not args.encode and not args.aspect_ratio_buckets:
        parser.error("--center_crop needs --aspect_ratio_buckets or --encode; otherwise pictures are stored uncropped")
    if (args.min_megapixels or 0) > (math.inf if args.max_megapixels is None else args.max_megapixels):
        parser.error("--min_megapixels is larger than --max_megapixels")
    if args.mixed_precision is None:
        args.mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if args.mixed_precision not in DTYPES:
        parser.error(f"--mixed_precision {args.mixed_precision} is none of {', '.join(DTYPES)}")
    if args.encode and args.mixed_precision == "fp16" and not torch.cuda.is_available():
        parser.error("--mixed_precision fp16 needs a GPU; use bf16 or no")
    args.buckets = make_buckets(args.resolution, args.bucket_step) if args.aspect_ratio_buckets else None
    if args.buckets and len(args.buckets) == 1:
        print(
            f"warning: --bucket_step {args.bucket_step} leaves one size of --resolution {args.resolution}",
            file=sys.stderr,
        )
    return args


# Copied from the engine
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


def public_settings(args):
    """The arguments that decide on the content of the shards, without secrets; of a list of shards also a digest."""
    settings = {k: redact(v) if k in SECRET else v for k, v in vars(args).items() if k not in INDIFFERENT}
    if not args.image_folder:
        flag, names = (
            "dataset" if args.dataset else "train_shards_path_or_url",
            "\n".join(map(redact, list_inputs(args))),
        )
        settings[f"{flag} (all names)"] = hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()
    if not args.encode:
        del settings["mixed_precision"]
    return settings


# ------------------------------------------------------------------------------------------------- reading samples
# Copied from the engine
IMAGE_MEMBERS, CAPTION_MEMBERS = ("jpg", "jpeg", "png", "webp"), ("txt", "text", "caption")

# Copied from the engine
MEMBERS = {*IMAGE_MEMBERS, *CAPTION_MEMBERS, "json", "safetensors"}  # nothing else of a shard is ever read
# Copied from the engine
MAX_IMAGE_PIXELS, MAX_MEMBER_BYTES = 2**26, 2**28
OTHER_FORMATS = {"gif", "bmp", "tif", "tiff", "avif", "heic", "heif", "jxl", "jp2", "psd", "svg"}
CAPTION_COLUMNS = ("text", "caption", "captions")
BESIDE = f"needed: {', '.join(CAPTION_MEMBERS)} or json beside it, metadata.jsonl/csv or --coco_annotations"


# Copied from the engine
class BadSample(Exception):
    """A sample that is skipped; `args` are one of FILTERS or FAULTS, and a detail for the log."""


# Copied from the engine
def kill_tree(pid):
    """Kills a process and all that it started, which would outlive it."""
    with contextlib.suppress(psutil.Error):  # it is gone, or another user's
        process = psutil.Process(pid)
        process.suspend()  # it starts nothing more
        for child in process.children():
            kill_tree(child.pid)
        process.kill()


# Copied from the engine
class ShardReader:
    """Reads the process that webdataset starts for a URL or pipe; raises TimeoutError after `timeout` idle seconds."""

    def __init__(self, pipe, timeout):
        self.pipe, self.timeout = pipe, timeout

    def read(self, size):
        if not select.select([self.pipe.stream], [], [], self.timeout)[0]:
            raise TimeoutError(f"no data for {self.timeout:g} s")
        data = os.read(self.pipe.stream.fileno(), size)
        if not data and (status := self.pipe.proc.wait(self.timeout)) != 0:
            known = {3: "no URL", 6: "no such host", 7: "refused", 22: "not found, or not allowed"}  # of curl
            raise OSError(f"command ended with status {status}" + (f": {known[status]}" if status in known else ""))
        return data

    def close(self):
        kill_tree(self.pipe.proc.pid)
        self.pipe.stream.close()
        self.pipe.proc.wait()


# Copied from the engine
def quote_url(url):
    """An http(s) URL as it may be sent: blanks and letters beyond ASCII encoded. Raises ValueError if it is none."""
    if not re.match("(?i)https?://", url):
        return url
    parts = urllib.parse.urlsplit(urllib.parse.quote(url, safe="".join(map(chr, range(33, 127)))))
    login, at, host = parts.netloc.rpartition("@")
    host = urllib.parse.unquote(host) if "%" in host else host
    return parts._replace(netloc=login + at + (host if host.isascii() else host.encode("idna").decode())).geturl()


# Copied from the engine
def open_shard(url, timeout):
    """Opens a shard as webdataset does: a file, or what the command for its kind of URL writes."""
    stream = gopen(quote_url(url), "rb")
    return ShardReader(stream, timeout) if isinstance(stream, Pipe) else stream


# Copied from the engine
def read_members(stream, url):
    """Yields the wanted members of a tar, as webdataset does.

    Raises OSError where the end mark is missing, or where something follows it.
    """
    with tarfile.open(fileobj=stream, mode="r|*") as shard:
        for member in shard:
            is_hidden = re.match(r"__[^/]*__(/|$)|(.*/)?\.[^/]*$", member.name)
            if member.isreg() and not is_hidden and member.name.rsplit(".", 1)[-1].lower() in MEMBERS:
                is_sane = member.size <= MAX_MEMBER_BYTES and not member.issparse()
                data = shard.extractfile(member).read() if is_sane else b""
                yield {"fname": member.name, "data": data, "__url__": url}
            shard.members = []  # tarfile would keep them all
        if shard.fileobj.tell() < shard.offset + tarfile.BLOCKSIZE:
            raise OSError("the archive ends early")
        yield {}  # the last sample is whole, whatever follows
        rest = iter(functools.partial(shard.fileobj.read, 1 << 16), b"")
        is_joined = any(data.strip(b"\0") for data in rest)
        unpacked = getattr(getattr(shard.fileobj, "cmp", None), "unused_data", b"")  # a gzip's 8 bytes, and another one
        if is_joined or unpacked[8:].strip(b"\0"):
            raise OSError("data follow the end mark: archives are joined by tar --concatenate, not by cat")


# Copied from the engine
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


# Copied from the engine
def strip_metadata(data):
    """An image's bytes without the metadata that a decoder may stumble over, though the pixels are fine.

    Kept are the chunks of a PNG or WebP that say how pixels are to be read, and a JPEG's JFIF, EXIF and Adobe segments,
    but those that are damaged or too short, which libpng and libjpeg pass over, too.
    """
    kept = []
    if data.startswith(b"\xff\xd8"):
        place, least = 2, {0xE0: 18, 0xE1: 4, 0xEE: 16}
        while data[place : place + 1] == b"\xff" and data[place + 1] != 0xDA:  # until the scan begins
            segment = data[place : place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")]
            is_metadata = segment[1] == 0xFE or 0xE0 <= segment[1] <= 0xEF
            kept += [segment] if not is_metadata or len(segment) >= least.get(segment[1], math.inf) else []
            place += len(segment)
        return b"".join([data[:2], *kept, data[place:]])
    if data.startswith(b"\x89PNG"):
        place, header = 8, 12  # a chunk's name, at 4, begins with a capital where no decoder may pass over it
        least = {b"eXIf": 0, b"tRNS": {b"\0": 2, b"\2": 6}.get(data[25:26], 1)}  # bytes of a grey level, a colour
        while chunk := data[place : place + header + int.from_bytes(data[place : place + 4], "big")]:
            is_sound = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
            is_used = is_sound and len(chunk) - header >= least.get(chunk[4:8], math.inf)
            kept += [chunk] if is_used or chunk[4:5].isupper() else []
            place += len(chunk)
        return b"".join([data[:8], *kept])
    place = 12
    while chunk := data[place : place + 8 + (int.from_bytes(data[place + 4 : place + 8], "little") + 1) // 2 * 2]:
        kept += [chunk] if chunk[:4] in (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"EXIF") else []
        place += len(chunk)
    body = b"WEBP" + b"".join(kept)
    return data[:4] + len(body).to_bytes(4, "little") + body


# Copied from the engine
TURNS = dict(zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), strict=True))  # by EXIF's orientation


# Copied from the engine
def read_orientation(image):
    """The orientation, 1 to 8, that the metadata of an image tell: 1 where they do not or cannot be read."""
    try:
        found = image.getexif().get(0x0112, 1)
    except Exception:  # whatever it is: the pixels are fine
        return 1
    return found if found in range(1, 9) else 1


# Copied from the engine
def open_image(data, use):
    """Returns what `use` makes of an opened image; where that fails, of the same without metadata. Raises BadSample."""
    for strip in (bytes, strip_metadata):
        try:
            return use(Image.open(io.BytesIO(strip(data)), formats=("JPEG", "PNG", "WEBP")))
        except BadSample:
            raise
        except Image.DecompressionBombError as error:
            raise BadSample("image too large", first_line(error)) from error
        except Exception as error:  # decoders raise almost anything on damaged data
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, Image.UnidentifiedImageError):
                reason = f"no JPEG, PNG or WebP that can be read, it begins with {data[:8]!r}"
    raise BadSample("broken image", reason)


# Copied from the engine
def to_rgb(image):
    """Converts every PIL mode to RGB: 16-bit grey scaled, transparency over white, CMYK and palettes resolved."""
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray((np.asarray(image, dtype=np.float32) / 257).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


# Copied from the engine
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


# Copied from the engine
def decode_text(data, errors="replace"):
    """Text of bytes in UTF-8, or in UTF-16 where they begin as it does; what is neither becomes U+FFFD."""
    return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", errors)


# Copied from the engine
def caption_texts(value):
    """The captions that a value of JSON holds: a text, a number or a list of them. null, NaN, true, {} … are none."""
    found = []
    for item in value if isinstance(value, list) else [value]:
        is_number = isinstance(item, (int, float)) and not isinstance(item, bool) and -math.inf < item < math.inf
        found += [str(item)] if is_number or isinstance(item, str) else []
    return found


# Copied from the engine
def read_captions(sample, info):
    """Returns the captions of a sample: its text members, or else `caption`, `captions` or `text` of its JSON."""
    captions = [decode_text(sample[name]) for name in CAPTION_MEMBERS if name in sample]
    if not captions:
        captions = next(filter(None, (caption_texts(info.get(name)) for name in ("caption", "captions", "text"))), [])
    return [caption.encode("utf-8", "replace").decode().strip() for caption in captions]  # no lone surrogates


# Copied from the engine
def check_filters(info, args):
    """Applies the size and watermark filters to a sample's JSON; what is missing or not above 0 never rejects."""
    numbers = {name.lower(): value for name, value in info.items() if isinstance(value, (int, float))}
    for side in ("width", "height"):
        if 0 < (size := numbers.get(f"original_{side}", numbers.get(side, math.inf))) < args.min_image_size:
            raise BadSample("below min_image_size", f"{side} {size}")
    if (pwatermark := numbers.get("pwatermark", -math.inf)) > args.max_pwatermark:
        raise BadSample("above max_pwatermark", f"pwatermark {pwatermark}")


# Copied from the engine
def expand_shards(patterns):
    """Expands brace patterns and `.txt` lists (one shard a line; no `pipe:` commands, which only a user may give)."""
    urls = []
    for pattern in patterns:
        is_list, lines = pattern.endswith(".txt") and not pattern.startswith("pipe:"), [pattern]
        try:
            if is_list:
                lines = decode_text(Path(pattern).read_bytes(), "strict").splitlines()
                lines = [re.sub(r"^(['\"])(.*)\1$", r"\2", line.strip()) for line in lines]
            lines = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
            found = [url for line in lines for url in expand_urls(line)]
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or redact(first_line(error))  # strerror is without the path
            fail(f"--train_shards_path_or_url {redact(pattern)} cannot be read or expanded: {reason}")
        if is_list and any(url.startswith("pipe:") for url in found):
            fail(f"{pattern}: a list of shards may not hold pipe: commands; give them on the command line")
        urls += found
    return urls or fail("--train_shards_path_or_url names no shard")


# Copied from the engine
def describe_lack(sample, wanted):
    """What a sample needs and what it has, for messages, and by which rule of shards it may have come to that."""
    found = sorted(name for name in sample if not name.startswith("__"))
    dotted = [f"{sample['__key__']}.{name}" for name in found if "." in name]
    rule = "the members of a sample must lie side by side: tar --sort=name"
    if dotted:
        rule = f"a key ends at the first dot, also that of {dotted[0]}: rename it"
    return f"needed: {wanted}; found: {', '.join(found)} ({rule})"


def read_file(path, flag=""):
    """The text of a file in UTF-8 or, by its byte-order mark, UTF-16. Fails at a line that is not; `flag` named it."""
    try:
        data = Path(path).read_bytes()
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return fail(f"{flag}{path}, line {line}, cannot be read: it is not UTF-8 ({error.reason}); save it as UTF-8")
    except OSError as error:
        return fail(f"{flag}{path} cannot be read: {first_line(error)}")


def read_jsonl(path):
    """Reads metadata.jsonl, an object a line, or one JSON list of them; yields (place for messages, object)."""
    text, is_list = read_file(path), False
    with contextlib.suppress(ValueError, RecursionError):
        is_list = isinstance(content := json.loads(text), list)
    for number, row in enumerate(content if is_list else text.split("\n"), 1):
        place = f"row {number}" if is_list else f"line {number}"
        if not is_list and not row.strip():
            continue
        try:
            row = row if is_list else json.loads(row)
        except (ValueError, RecursionError) as error:
            fail(f"{path}, {place}, is no JSON: {error}")
        if not isinstance(row, dict):
            fail(f'{path}, {place}, is no object such as {{"file_name": "a.jpg", "text": "a caption"}}')
        yield place, row


def read_csv(path):
    """Reads metadata.csv as spreadsheets write it, with any of their separators; yields (place for messages, {column:
    cell or None}), first of the header. Fails at a row that can be read in more than one way.
    """
    text, known = read_file(path), ("file_name", *CAPTION_COLUMNS)
    named = re.match(r"sep=(.)\r?\n", text)
    text = text[named.end() :] if named else text
    first, header = next((line for line in text.splitlines() if line.strip()), ""), None
    fits = (mark for mark in ",;\t|" if "file_name" in [cell.strip(" \"'").lower() for cell in first.split(mark)])
    separator = named[1] if named else next((mark for mark in fits if mark in first), ",")
    csv.field_size_limit(MAX_MEMBER_BYTES)  # a process has one
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if header is None and any(cells):
                header = [cell.lower() if cell.lower() in known else cell for cell in cells]
                if twice := [name for name, count in Counter(filter(None, header)).items() if count > 1]:
                    fail(f"{path} has more than one column {twice[0]}")
                yield "header", dict.fromkeys(filter(None, header))
            elif any(cells[len(header or cells) :]):
                fail(f"{path}, line {reader.line_num}, has {len(cells)} cells, its header {len(header)}: put texts "
                     f"that hold {separator!r} in quotes")  # fmt: skip
            elif any(cells):
                row = dict(zip(header, cells, strict=False))
                yield f"line {reader.line_num}", {name: cell or None for name, cell in row.items() if name}
    except csv.Error as error:
        fail(f'{path}, line {reader.line_num}: {error}; quotes within a quoted text are doubled: "a ""red"" fox"')


def read_metadata(path, column, bad):
    """Reads metadata.jsonl or metadata.csv; returns {file name as it stands there: captions}; counts in `bad`."""
    rows = list(read_jsonl(path) if path.suffix.lower() == ".jsonl" else read_csv(path))
    names = dict.fromkeys(name for _, row in rows for name in row)
    if column not in names:  # of a header, capitals do not count
        column = next((name for name in names if column and name.lower() == column.lower()), column)
    column = column or next((name for name in CAPTION_COLUMNS if name in names), None)
    if rows and not {"file_name", column} <= names.keys():
        wanted, has = column or "/".join(CAPTION_COLUMNS), ", ".join(map(str, names)) or "none"
        fail(f"{path} needs columns file_name and {wanted} (--caption_column); it has: {has}")
    found = {}
    for place, row in rows:
        if row.get("file_name") not in (None, ""):
            found.setdefault(str(row["file_name"]), []).extend(caption_texts(row.get(column)))
        elif place != "header":
            reject(bad, "no image", f"{path}, {place}, has no file_name")
    return found


def read_coco(path, bad):
    """Reads a COCO caption file; returns {file name as it stands there: captions}; counts in `bad`."""
    try:
        content = json.loads(read_file(path, "--coco_annotations "))
        images = {str(image["id"]): image["file_name"] for image in content["images"] if image["file_name"]}
        notes = [(str(note["image_id"]), note.get("caption")) for note in content["annotations"]]
        if notes and not any("caption" in note for note in content["annotations"]):
            raise KeyError("caption")
    except (ValueError, RecursionError) as error:
        fail(f"--coco_annotations {path} cannot be read: {error}")
    except (KeyError, TypeError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else "it is built in another way"
        fail(f"--coco_annotations {path} holds no captions as captions_train2017.json has them: {what}")
    for image in content["images"]:
        name, same = image["file_name"], images.get(str(image["id"]))
        if name and name != same:
            fail(f"--coco_annotations {path}: the id {image['id']} stands for {name} and for {same}")
    found = {str(name): [] for name in images.values()}
    for key, caption in notes:
        if key in images:
            found[str(images[key])] += caption_texts(caption)
        else:
            reject(bad, "no image", f"{path}: the image_id {key} has a caption but is not listed")
    return found


def fold(name):
    """A file's name, alike for what other systems write in its place: \\ for /, other capitals, accents set apart."""
    return unicodedata.normalize("NFC", os.path.normpath(name.replace("\\", "/"))).casefold()


class Listing:
    """The files below a folder, to be found by the names that other systems and programs give them."""

    def __init__(self, root, files):
        self.root, self.files, self.alike, self.last = os.path.realpath(root), set(files), {}, {}
        for file in sorted(files):
            self.alike.setdefault(fold(file), []).append(file)
            self.last.setdefault(fold(os.path.basename(file)), []).append(file)

    def find(self, name, folder="", source=None):
        """The file that is meant by a name in a metadata file of `folder`, or by one of COCO's files (`source`), which
        may lie anywhere; what would be its path where there is none. Fails where there are several.
        """
        if os.path.isabs(name):
            name, folder = os.path.relpath(name, self.root), ""
        path = os.path.normpath(os.path.join(folder, name))
        same = [path] if path in self.files else self.alike.get(fold(os.path.join(folder, name)), [])
        if source and not same:
            same = self.last.get(os.path.basename(fold(name)), [])
        if len(same) > 1:
            advice = "; give --image_folder one level deeper" if source else ""
            fail(f"{source or os.path.join(folder, 'metadata')}: {name} may be {' or '.join(same[:2])}{advice}")
        return same[0] if same else path


def walk(root, bad):
    """Paths below a folder of its files that are not hidden, sorted. Links to folders are followed, but none twice."""
    files, seen, todo, top = [], set(), deque([root]), os.path.realpath(root)

    def note(error):
        reject(bad, "unreadable folder", f"{os.path.relpath(error.filename, root)}: {error.strerror}")

    while todo:
        for folder, folders, names in os.walk(todo.popleft(), onerror=note):
            real = os.path.realpath(folder)
            if real in seen or (real != top and f"{top}/".startswith(f"{real.rstrip('/')}/")):
                folders.clear()  # it is listed, or a link upwards
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))  # __MACOSX and the like
            links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            todo += [os.path.join(folder, name) for name in links]  # later: what has a name of its own keeps it
            folders[:] = [name for name in folders if name not in links]
            files += [os.path.relpath(os.path.join(folder, name), root) for name in names if not name.startswith(".")]
    return sorted(files)


def is_own_sheet(path, args):
    """Whether a picture is a contact sheet that --check has drawn."""
    if path.name not in ("contact_sheet.png", Path(args.contact_sheet).name):
        return False
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return SHEET_MARK in file.read(100) or path.samefile(args.contact_sheet)
    return False


def list_captions(args, listing, bad):
    """Captions of --image_folder's metadata files or --coco_annotations: {picture: captions}; counts in `bad`."""
    captions = {}
    for source in args.coco_annotations or []:
        for name, texts in read_coco(source, bad).items():
            captions.setdefault(listing.find(name, source="--coco_annotations"), []).extend(texts)
    for file in sorted(listing.files) if not args.coco_annotations else []:
        name = os.path.basename(file).lower()
        if name == "metadata.parquet":
            reject(bad, "unknown format", f"{file}: needed: metadata.jsonl or metadata.csv")
        if name in ("metadata.jsonl", "metadata.csv", "metadata.tsv"):
            for name, texts in read_metadata(Path(args.image_folder, file), args.caption_column, bad).items():
                captions.setdefault(listing.find(name, os.path.dirname(file)), []).extend(texts)
    return captions


def caption_beside(root, file, texts):
    """Captions in the files beside a picture: its text files, or else a .json, as img2dataset and shards have them."""
    stem = file.rsplit(".", 1)[0]
    beside = [texts[name] for kind in CAPTION_MEMBERS if (name := f"{stem}.{kind}") in texts]
    found = [decode_text((root / name).read_bytes()) for name in beside]
    if not found and f"{stem}.json" in texts:
        with contextlib.suppress(ValueError, RecursionError):
            info = json.loads(decode_text((root / texts[f"{stem}.json"]).read_bytes()))
            found = read_captions({}, info) if isinstance(info, dict) else []
    return found


def file_kind(file):
    """The ending of a file's name, of JPEGs by other endings (Windows saves .jfif) as shards have it."""
    kind = file.rsplit(".", 1)[-1].lower()
    return "jpg" if kind in ("jfif", "jpe", "pjpeg") else kind


def list_folder(args):
    """Finds the pictures of --image_folder; returns [[path below it, captions], …], sorted, and what is rejected."""
    root, bad = Path(args.image_folder), {}
    if not root.is_dir():
        fail(f"--image_folder {root} is no folder")
    files = [file for file in walk(root, bad) if not is_own_sheet(root / file, args)]
    listing, kinds = Listing(root, files), {file: file_kind(file) for file in files}
    pictures = [file for file in files if kinds[file] in IMAGE_MEMBERS]
    if not pictures:
        flags = {"tar": "--train_shards_path_or_url", "parquet": "--dataset", "arrow": "--dataset"}
        hint = next((f" but .{kind} files: {flag}?" for kind, flag in flags.items() if kind in kinds.values()), "")
        fail(f"--image_folder {root} holds no {', '.join(IMAGE_MEMBERS)}{hint}")
    for file in (file for file in files if kinds[file] in OTHER_FORMATS):
        reject(bad, "unknown format", f"{file}: needed: {', '.join(IMAGE_MEMBERS)}")
    captions = list_captions(args, listing, bad)
    for name in sorted(captions.keys() - set(pictures)):
        if kinds.get(name) not in OTHER_FORMATS:
            reject(bad, "no image", f"{name} has a caption but is not in the folder")
    if args.coco_annotations:  # which lists the pictures as well
        pictures = [file for file in pictures if file in captions]
    records, stems = [], {file.rsplit(".", 1)[0] for file in pictures}
    texts = {f"{file.rsplit('.', 1)[0]}.{kinds[file]}": file for file in files}  # also of a.TXT
    alike = {fold(name): file for name, file in texts.items() if file.rsplit(".", 1)[0] not in stems}
    used = set()
    for file in pictures:
        stem = file.rsplit(".", 1)[0]
        names = [f"{stem}.{kind}" for kind in (*CAPTION_MEMBERS, "json")]
        beside = {name: texts.get(name) or alike.get(fold(name)) for name in names}
        beside = {name: path for name, path in beside.items() if path}
        used.update(beside.values())
        found = captions.get(file, [])
        try:
            if not found and not args.coco_annotations:
                found = caption_beside(root, file, beside)
        except OSError as error:
            reject(bad, "no caption", f"{file}: {error}")
            continue
        records.append([file, found])
    for file in (file for file in files if kinds[file] in ("txt", "caption") and not args.coco_annotations):
        if file not in used:
            reject(bad, "no image", f"{file} may be a caption, but there is no picture beside it")
    return records, bad


# --------------------------------------------------------------------------------------------- sets of Hugging Face
def table_files(folder):
    """The parquet and arrow files of a folder, in order. Fails where they are several splits of a data set."""
    try:
        if (folder / "dataset_dict.json").is_file():
            splits = json.loads(read_file(folder / "dataset_dict.json"))["splits"]
            if len(splits) != 1:
                fail(
                    f"--dataset {folder} has the splits {', '.join(splits)}: give one of them, as {folder / splits[0]}"
                )
            return table_files(folder / splits[0])
        if (folder / "state.json").is_file():  # save_to_disk
            state = json.loads(read_file(folder / "state.json"))
            if state.get("_indices_files") or state.get("_indices_data_files"):
                fail(f"--dataset {folder} is a selection of its rows: save it again, after flatten_indices()")
            return [folder / file["filename"] for file in state["_data_files"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"--dataset {folder} is not as save_to_disk writes it: {type(error).__name__}: {error}")
    files = [Path(folder, file) for file in walk(folder, {}) if file.endswith((".parquet", ".arrow"))]
    files = [file for file in files if not file.name.startswith("cache-")]  # what `datasets` keeps of map and filter
    parts = {file.parent / re.sub(r"(-\d+-of-\d+.*|\d+)$", "", file.stem): file for file in files}
    if len(parts) > 1:
        names = ", ".join(str(part.relative_to(folder)) for part in list(parts)[:5])
        fail(f"--dataset {folder} holds more than one split or set ({names}): name the files or a folder within it")
    return files or fail(f"--dataset {folder} holds no .parquet or .arrow files")


def open_table(path):
    """Opens a parquet or arrow file; returns its schema and an iterator of its record batches."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        fail(f"--dataset needs pyarrow, which cannot be imported here ({error}): pip install pyarrow")
    if str(path).endswith(".parquet"):
        table = pyarrow.parquet.ParquetFile(path)
        return table.schema_arrow, table.iter_batches(batch_size=64)
    source = pyarrow.memory_map(str(path))
    if source.read(6) == b"ARROW1":
        table = pyarrow.ipc.open_file(source)
        return table.schema, (table.get_batch(index) for index in range(table.num_record_batches))
    source.seek(0)
    table = pyarrow.ipc.open_stream(source)
    return table.schema, iter(table)


def choose_columns(schema, path, args):
    """The names of a table's columns of pictures and of captions, the latter or None. Fails where it has none."""
    kinds = {field.name: str(field.type) for field in schema}
    structs, flat, paths = ([name for name, kind in kinds.items() if re.match(wanted, kind)] for wanted in (
        r"struct<(.*, )?bytes: (large_)?binary", "(large_)?binary", "(large_)?string"))  # fmt: skip
    named = {name for name in kinds if name.lower() in ("image", "img", "picture", *IMAGE_MEMBERS)}
    found = structs or [name for name in flat if name in named] or [name for name in paths if name in named]
    image = args.image_column or (found[0] if len(found) == 1 else None)
    if image not in (*structs, *flat, *paths):
        may_be = " or ".join(found or structs + flat) or "none of these holds pictures or paths of pictures"
        fail(f"--dataset {path} needs an --image_column ({may_be}); columns: {', '.join(kinds) or 'none'}")
    caption = args.caption_column or next((name for name in (*CAPTION_COLUMNS, "txt") if name in kinds), None)
    if caption not in kinds and (args.caption_column or args.default_caption is None):
        fail(f"--dataset {path} needs a --caption_column, or --default_caption; columns: {', '.join(kinds)}")
    return image, caption


def list_tables(args):
    """The files of --dataset, in order; fails if one cannot be read or lacks a column."""
    files = []
    for path in map(Path, args.dataset):
        files += table_files(path) if path.is_dir() else [path]
    for path in files:
        if path.suffix not in (".parquet", ".arrow", ".feather"):
            fail(f"--dataset {path} is no folder, and no .parquet or .arrow file")
        try:
            choose_columns(open_table(path)[0], path, args)
        except (OSError, ValueError) as error:  # pyarrow's among them
            fail(f"--dataset {path} cannot be read: {first_line(error)}")
    return list(map(str, files))


def picture_bytes(value, folder):
    """The bytes of a picture in a table: as such, as {bytes, path}, or as the path of a file. Raises BadSample."""
    data, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    data, name = (None, data) if isinstance(data, str) else (data, name)
    if data is not None:
        return data
    if not name:
        raise BadSample("no image", "the row has none")
    if "://" in name:
        raise BadSample("no image", f"{redact(name)} is to be downloaded first, by img2dataset for example")
    path, problem = Path(folder, name), None
    try:
        problem = (
            "is no file" if not path.is_file() else "is too large" if path.stat().st_size > MAX_MEMBER_BYTES else ""
        )
        data = b"" if problem else path.read_bytes()
    except OSError as error:
        problem = error.strerror
    if problem:
        raise BadSample("no image", f"{name[:200]!r} {problem}")
    return data


def read_table(path, args):
    """Yields the rows of a file of --dataset as read_shard yields samples, with other numbers and texts as JSON."""
    row = 0
    try:
        schema, batches = open_table(path)
        image, caption = choose_columns(schema, path, args)
        kept = [name for name in schema.names if name not in (image, caption, *CAPTION_COLUMNS, "crop", "source")]
        for values in itertools.chain.from_iterable(batch.to_pylist() for batch in batches):
            sample = {"__key__": f"{row:06}", "__url__": path, "__needed__": f"needed: a text in the column {caption}"}
            info = {name: values[name] for name in kept if isinstance(values[name], (str, int, float))}
            sample["json"] = json.dumps({**info, "captions": caption_texts(values.get(caption))}).encode()
            try:
                data = picture_bytes(values[image], Path(path).parent)
                sample[{b"\x89P": "png", b"RI": "webp"}.get(data[:2], "jpg")] = data
            except BadSample as bad:
                sample["__fault__"] = bad
            yield sample
            row += 1
    except Exception as error:  # pyarrow raises many kinds
        yield {"__key__": path, "__fault__": BadSample("unreadable shard", f"after row {row}: {first_line(error)}")}


def list_inputs(args):
    """The shards of --train_shards_path_or_url, or the files of --dataset."""
    return list_tables(args) if args.dataset else expand_shards(args.train_shards_path_or_url)


def open_item(item, args):
    """Returns an undecoded sample as read_shard gives it; a record of list_folder is read from its file."""
    if isinstance(item, dict):
        return item
    file, captions = item
    try:
        data = Path(args.image_folder, file).read_bytes()
    except OSError as error:
        raise BadSample("broken image", error.strerror or first_line(error)) from error
    info = json.dumps({"captions": captions}).encode()
    return {"__key__": file, "__needed__": BESIDE, file_kind(file): data, "json": info}


def read_sample(sample, args):
    """Returns the JSON, the captions and the image member's name of an undecoded sample. Raises BadSample."""
    if "__fault__" in sample:
        raise sample["__fault__"]
    try:
        info = json.loads(sample.get("json", b"{}"))
    except (ValueError, RecursionError):
        info = {}
    info = info if isinstance(info, dict) else {}
    check_filters(info, args)
    name = next((name for name in IMAGE_MEMBERS if name in sample), None)
    if name is None and not (args.check and "safetensors" in sample):
        raise BadSample("no image", describe_lack(sample, ", ".join(IMAGE_MEMBERS)))
    captions = read_captions(sample, info) or ([args.default_caption] if args.default_caption is not None else [])
    if not captions:
        wanted = f"{', '.join(CAPTION_MEMBERS)} or caption in the json"
        raise BadSample("no caption", sample.get("__needed__") or describe_lack(sample, wanted))
    return info, captions, name


def source_name(item):
    """Where an item comes from, for JSON and messages."""
    if not isinstance(item, dict):
        return item[0]
    prefix = f"{item['__url__']}#" if item.get("__url__") else ""
    return redact(prefix + item["__key__"])


def reject(rejected, reason, example, count=1):
    """Counts a reason in {reason: [count, the first example]}."""
    rejected.setdefault(reason, [0, example.encode("utf-8", "replace").decode()])[0] += count  # any file name prints


def parallel(function, items, threads):
    """Maps over items by threads, in order, and no more than a few items ahead. A BadSample is given, not raised."""

    def call(item):
        try:
            return function(item)
        except BadSample as bad:
            return BadSample(bad.args[0], f"{source_name(item)}: {bad.args[1]}")

    with ThreadPoolExecutor(threads) as pool:
        pending = deque()
        for item in items:
            pending.append(pool.submit(call, item))
            if len(pending) > 4 * threads:
                yield pending.popleft().result()
        yield from (future.result() for future in pending)


# ----------------------------------------------------------------------------------------- sizes, crops and samples
MAX_RATIO = 2.0


def make_buckets(resolution, step):
    """All [width, height] in multiples of `step`, of the largest area up to resolution² and ratios up to 2:1."""
    found = set()
    for width in range(step, 2 * resolution + 1, step):
        height = resolution**2 // width // step * step
        if height and max(width / height, height / width) <= MAX_RATIO:
            found |= {(width, height), (height, width)}
    return [list(size) for size in sorted(found)]


def choose_size(size, args):
    """The bucket whose ratio is nearest to that of a picture, (width, height); BadSample if it is too small for it."""

    def distance(bucket):
        return round(abs(math.log(bucket[0] / bucket[1] * size[1] / size[0])), 9), -bucket[0] * bucket[1]

    width, height = min(args.buckets, key=distance)
    is_smaller = size[0] < width or size[1] < height
    if is_smaller and not 0 < args.min_image_size <= min(size):
        raise BadSample("below min_image_size", f"{size[0]}x{size[1]} would be enlarged to {width}x{height}")
    return width, height


def upright_size(file):
    """The size of an image file, path or stream, after turning it as its EXIF says; decodes some PNGs for that."""

    def measure(image):
        if image.width * image.height > MAX_IMAGE_PIXELS:
            raise BadSample("image too large", f"{image.width}x{image.height} pixels")
        return image.size[::-1] if read_orientation(image) > 4 else image.size

    try:
        with Image.open(file, formats=("JPEG", "PNG", "WEBP")) as image:
            return measure(image)
    except BadSample:
        raise
    except OSError as error:
        if error.errno:  # the file's, not the decoder's
            raise BadSample("broken image", error.strerror) from error
    except Exception:  # decoders raise almost anything
        pass
    return open_image(file.getvalue() if isinstance(file, io.BytesIO) else file.read_bytes(), measure)


def original_size(info, size):
    """(width, height) before any resize: those of the JSON, as check_filters reads them, or else of the picture."""
    numbers = {name.lower(): value for name, value in info.items() if isinstance(value, (int, float))}
    numbers = {name: value for name, value in numbers.items() if 0 < value < math.inf}
    return [numbers.get(f"original_{side}", numbers.get(side, size[i])) for i, side in enumerate(("width", "height"))]


def check_area(width, height, args):
    """Applies --min_megapixels and --max_megapixels to the size of a picture before any resize. Raises BadSample."""
    found = width * height / 1e6
    for flag, is_bad in {
        "below min_megapixels": found < (args.min_megapixels or 0),
        "above max_megapixels": args.max_megapixels is not None and found > args.max_megapixels,
    }.items():
        if is_bad:
            raise BadSample(flag, f"{width}x{height}, {found:.4g} megapixels")


def crop_sample(data, source, args):
    """Loads and crops a picture to its bucket, or to a square. Returns it, its place and the sizes around it."""
    width = height = short = args.resolution
    if args.buckets:
        size = upright_size(io.BytesIO(data))
        width, height = choose_size(size, args)
        short = math.ceil(max(width / size[0], height / size[1]) * min(size) - 1e-6)
    image, size = load_image(data, short, INTERPOLATION[args.interpolation_type])
    rng = random.Random(f"{args.seed}/crop/{source}".encode("utf-8", "surrogateescape"))
    left, top = (0.5, 0.5) if args.center_crop else (rng.random(), rng.random())
    x, y = int(left * (image.width - width + 1)), int(top * (image.height - height + 1))
    place = {"crop": [x, y, width, height], "time_ids": [size[1], size[0], y, x, height, width]}
    place["time_ids_flipped"] = [size[1], size[0], y, image.width - width - x, height, width]  # of the mirrored picture
    return image.crop((x, y, x + width, y + height)), size, place


def known_place(info, data):
    """What an earlier run of this tool noted of a picture that it has cropped, or None."""
    crop = info.get("crop")
    if not isinstance(crop, list) or len(crop) != 4 or upright_size(io.BytesIO(data)) != tuple(crop[2:]):
        return None
    return {key: info[key] for key in ("crop", "time_ids", "time_ids_flipped") if key in info}


def prepare_sample(item, args):
    """Makes of an item what its shard will hold: size, JSON, captions, picture (member, bytes) and pixels to encode."""
    sample, source = open_item(item, args), source_name(item)
    info, captions, name = read_sample(sample, args)
    pixels, cropped, place, known = None, None, {"crop": None}, known_place(info, sample[name])
    if args.buckets or args.encode:
        image, size, place = crop_sample(sample[name], source, args)
        place = known if known and image.size == tuple(known["crop"][2:]) else place
        pixels, cropped, name, stream = np.asarray(image), image.size, args.image_format, io.BytesIO()
        if args.keep_images or not args.encode:
            image.save(stream, FORMATS[name], quality=args.image_quality, subsampling=0)
        data = stream.getvalue()
    else:
        data, size = sample[name], load_image(sample[name], 32, Image.Resampling.NEAREST)[1]  # is it whole?
        place = known or place
    width, height = original_size(info, size)
    check_filters({"width": width, "height": height}, args)
    check_area(width, height, args)
    info = {key: value for key, value in info.items() if key not in (*CAPTION_COLUMNS, "time_ids", "time_ids_flipped")}
    info |= {"original_width": width, "original_height": height, **place, "captions": captions, "source": source}
    picture = (name.replace("jpeg", "jpg"), data) if data else None
    return SimpleNamespace(size=cropped, info=info, captions=captions, picture=picture, pixels=pixels, source=source)


# -------------------------------------------------------------------------------------------------------- encoding
# Copied from the engine
def check_tensors(where, network, report):
    """Raises ValueError for a network that was not given all its tensors: the libraries make up the others."""
    empty = (name for name, value in network.named_parameters() if value.is_meta)
    lacking = {*empty, *report.get("missing_keys", ()), *(key for key, *_ in report.get("mismatched_keys", ()))}
    if lacking:
        what = f"{len(lacking)} tensors of a {type(network).__name__}"
        raise ValueError(f"{where}: {what} are missing or misshapen, such as {min(lacking)}")
    if unused := report.get("unexpected_keys"):
        logger.warning("%s: %d tensors are not used, such as %s", where, len(unused), min(unused))


# Copied from the engine
def load_part(kind, path, variant=None, **options):
    """Loads a frozen network of class `kind` from a folder, a hub repository or, with a `config`, from one file.

    Where there are fp16 weights alone, those. Raises OSError, or ValueError where the files do not hold all of it.
    """
    where, report, errors = f"{path}/{options.get('subfolder', '')}", {}, []
    for name in [variant] if variant else [None, "fp16"]:
        try:
            if "config" in options:
                network = kind.from_single_file(path, **options)
            else:
                network, report = kind.from_pretrained(path, variant=name, output_loading_info=True,
                                                       ignore_mismatched_sizes=True, **options)  # fmt: skip
            break
        except OSError as error:
            errors.append(error)
    else:
        raise errors[0]
    if errors:
        logger.warning("%s holds fp16 weights alone: they are used", where)
    check_tensors(where, network, report)
    return network.requires_grad_(False)


# Copied from the engine
def load_tokenizer(path, encoder, **source):
    """Loads a text encoder's tokenizer. Raises ValueError for one that knows no words, which transformers makes of a
    folder without the file.
    """
    tokenizer = AutoTokenizer.from_pretrained(path, **source)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError("a tokenizer knows no words, only its special tokens: are files missing?")
    longest = encoder.config.max_position_embeddings
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest)  # which is 1e30 where its files do not say
    return tokenizer


def open_single_file(args):
    """--encode's .safetensors file as a pipeline, float32 and without a U-Net, and where the configuration is."""
    config = args.single_file_config
    diffusers.utils.logging.disable_progress_bar()
    try:
        with safe_open(args.encode, "pt"):  # a .ckpt file, which could run code, is none
            config = config or fetch_diffusers_config(load_file(args.encode))["pretrained_model_name_or_path"]
        parts = diffusers.DiffusionPipeline.load_config(config, cache_dir=args.cache_dir)
        kind = diffusers.StableDiffusionXLPipeline if "text_encoder_2" in parts else diffusers.StableDiffusionPipeline
        unused = {"unet", "safety_checker", "feature_extractor", "image_encoder"} & parts.keys()
        pipe = kind.from_single_file(args.encode, config=config, cache_dir=args.cache_dir, torch_dtype=torch.float32,
                                     **dict.fromkeys(unused))  # fmt: skip
        for name in ("vae", "text_encoder", "text_encoder_2"):
            if network := getattr(pipe, name, None):
                check_tensors(f"{args.encode}/{name}", network, {})
    except Exception as error:
        fail(f"--encode {args.encode} cannot be read with --single_file_config {config}: {first_line(error)}")
    return pipe, config


class Encoder:
    """The VAE and the text encoder(s) of a pipeline; called with samples, gives the bytes of their encoded members."""

    def __init__(self, args, device):
        self.args, self.device = args, device
        try:
            self.load(args, DTYPES[args.mixed_precision])
        except (OSError, ValueError, RuntimeError) as error:
            fail(f"--encode {args.encode} cannot be loaded: {first_line(error)}")
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        flag = "bucket_step" if args.buckets else "resolution"
        if getattr(args, flag) % factor:
            fail(f"--{flag} {getattr(args, flag)} must be a multiple of the VAE's factor, {factor}")
        self.fingerprint = {
            "model": args.encode, "revision": args.teacher_revision, "vae": args.pretrained_vae_model_name_or_path,
            "vae_revision": args.revision, "resolution": args.resolution, "sizes": args.buckets,
            "center_crop": args.center_crop, "random_flip": args.random_flip,
            "interpolation_type": args.interpolation_type, "dtype": args.encode_dtype}  # fmt: skip

    def load(self, args, dtype):
        """Loads what the pipeline has: one tokenizer and encoder, or SDXL's two, and a VAE, which is float32 if its
        config says `force_upcast` (true by default, but meant for SDXL alone).
        """
        path, pipe, source = args.encode, None, {"revision": args.teacher_revision, "cache_dir": args.cache_dir}
        for name in QUIET:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        is_file = os.path.isfile(path)
        if args.single_file_config and not is_file or args.variant and is_file:
            raise ValueError("--single_file_config is for a model that is one file, and --variant for one that is not")
        if is_file:
            (pipe, path), source = open_single_file(args), {"cache_dir": args.cache_dir}
        parts = diffusers.DiffusionPipeline.load_config(path, **source)
        names = [name for name in ("text_encoder", "text_encoder_2") if parts.get(name, [None])[0]]
        kinds = [CLIPTextModel, CLIPTextModelWithProjection][: len(names)]
        if [parts[name][1] for name in names] != [kind.__name__ for kind in kinds] or "text_encoder" not in names:
            fail(f"--encode {args.encode}, a {parts.get('_class_name')}, is no SD 1.x, 2.x or SDXL text-to-image model")
        self.text_encoders = [getattr(pipe, name).to(dtype) if pipe else
                              load_part(kind, path, args.variant, subfolder=name, dtype=dtype, **source)
                              for kind, name in zip(kinds, names, strict=True)]  # fmt: skip
        self.tokenizers = [load_tokenizer(path, encoder, subfolder=name, **source) for name, encoder
                           in zip(("tokenizer", "tokenizer_2"), self.text_encoders, strict=False)]  # fmt: skip
        if vae := args.pretrained_vae_model_name_or_path:
            given = {"config": path, "subfolder": "vae"} if os.path.isfile(vae) else {"revision": args.revision}
            self.vae = load_part(AutoencoderKL, vae, cache_dir=args.cache_dir, **given)
        elif (kind := (parts.get("vae") or [None, None])[1]) == "AutoencoderKL":
            self.vae = pipe.vae if pipe else load_part(AutoencoderKL, path, args.variant, subfolder="vae", **source)
        else:
            raise ValueError(f"its vae is a {kind}, not an AutoencoderKL")
        is_fragile = len(names) > 1 and self.vae.config.get("force_upcast")
        self.vae.to(torch.float32 if is_fragile else dtype)
        for model in (self.vae, *self.text_encoders):
            model.to(self.device).eval()
        self.vae.to(memory_format=torch.channels_last)

    def encode_captions(self, captions):
        """Captions → {text: (captions, tokens, width), and for SDXL pooled: (captions, width)}, as the pipelines do."""
        found = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=tokenizer.model_max_length,
                               return_tensors="pt").to(self.device)  # fmt: skip
            mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
            found.append(encoder(tokens.input_ids, attention_mask=mask, output_hidden_states=len(self.tokenizers) > 1))
        if len(found) == 1:
            return {"text": found[0][0]}
        return {"text": torch.cat([out.hidden_states[-2] for out in found], dim=-1), "pooled": found[-1].text_embeds}

    def encode_pixels(self, pixels):
        """uint8 pixels (batch, 3, height, width) → mean and standard deviation of the latents, mirrored ones too."""
        found = {}
        for name, image in {"latents": pixels, "flipped": pixels.flip(-1)}.items():
            if name == "latents" or self.args.random_flip:
                image = (image / 127.5 - 1).to(self.vae.dtype, memory_format=torch.channels_last)
                chunk = max(1, 2**20 // image[0, 0].numel())  # a megapixel: more only needs more memory
                parts = [self.vae.encode(part).latent_dist for part in image.split(chunk)]
                found[f"{name}_mean"] = torch.cat([part.mean for part in parts])
                found[f"{name}_std"] = torch.cat([part.std for part in parts])
        return found

    def pack(self, tensors):
        """The bytes of a .safetensors file; None where something is not finite."""
        dtype = STORED[self.args.encode_dtype]
        tensors = {name: value.to("cpu", dtype).contiguous() for name, value in tensors.items()}
        if not all(value.isfinite().all() for value in tensors.values()):
            return None
        return save_tensors(tensors, {"fingerprint": json.dumps(self.fingerprint, sort_keys=True)})

    @torch.no_grad()
    def __call__(self, samples):
        pixels = torch.from_numpy(np.stack([sample.pixels for sample in samples])).permute(0, 3, 1, 2)
        images, size = self.encode_pixels(pixels.to(self.device)), self.args.encode_batch_size
        captions = [caption for sample in samples for caption in sample.captions]
        parts = [self.encode_captions(captions[start : start + size]) for start in range(0, len(captions), size)]
        counts = [len(sample.captions) for sample in samples]
        texts = {name: torch.cat([part[name] for part in parts]).split(counts) for name in parts[0]}
        return [self.pack({name: value[i] for name, value in (images | texts).items()}) for i in range(len(samples))]

    @torch.no_grad()
    def empty(self):
        """What stands for the empty prompt, text (1, tokens, width) and pooled (1, width), and the mean `latents` of a
        grey ramp of 64 pixels, by which training tells one VAE from another.
        """
        ramp = torch.arange(0, 256, 4, dtype=torch.uint8, device=self.device).expand(1, 3, 64, 64)
        packed = self.pack(self.encode_captions([""]) | {"latents": self.encode_pixels(ramp)["latents_mean"]})
        return packed or fail("what the models give is not finite: another --mixed_precision or --encode_dtype?")


# --------------------------------------------------------------------------------------------------- jobs and shards
def write_whole(path, data):
    """Writes a file under a temporary name and renames it when it is whole."""
    temporary = path.with_name(f"tmp-{path.name}")
    temporary.write_bytes(data if isinstance(data, bytes) else json.dumps(data, indent=1).encode())
    os.replace(temporary, path)


class JobWriter:
    """Packs the samples of a job, one open shard for each size; batches are encoded when they are full."""

    def __init__(self, number, args, encoder):
        self.number, self.args, self.encoder = number, args, encoder
        self.folder, self.names, self.keys = Path(args.output_dir, "progress"), itertools.count(), itertools.count()
        self.open, self.shards, self.rejected = {}, [], {}

    def add(self, sample):
        """Takes a sample of prepare_sample."""
        if sample.size not in self.open:
            name = f"{self.number:06}-{next(self.names):04}.tar"
            self.open[sample.size] = name, tarfile.open(self.folder / f"tmp-{name}", "w"), [], []
        _, _, batch, written = self.open[sample.size]
        batch.append(sample)
        is_full = len(written) + len(batch) == self.args.samples_per_shard
        if is_full or len(batch) == self.args.encode_batch_size:
            self.flush(sample.size)
        if len(written) == self.args.samples_per_shard:
            self.close(sample.size)

    def flush(self, size):
        """Encodes and writes what waits in the batch of a size."""
        _, shard, batch, written = self.open[size]
        encoded = self.encoder(batch) if self.encoder and batch else [b""] * len(batch)
        for sample, tensors in zip(batch, encoded, strict=True):
            if tensors is None:
                reject(self.rejected, "not finite", f"{sample.source}: other --mixed_precision or --encode_dtype?")
                continue
            key = f"{self.number:06}{next(self.keys):06}"
            members = [sample.picture] if sample.picture else []
            members.append(("json", json.dumps(sample.info).encode()))
            members += [("txt", sample.captions[0].encode())] if len(sample.captions) == 1 else []
            members += [("safetensors", tensors)] if self.encoder else []
            for name, data in members:
                info = tarfile.TarInfo(f"{key}.{name}")  # owner and time are those of nobody and never
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))
            written.append(key)
        batch.clear()

    def close(self, size):
        """Ends the shard of a size; it gets its name when it is whole."""
        self.flush(size)
        name, shard, _, written = self.open.pop(size)
        shard.close()
        if written:
            os.replace(self.folder / f"tmp-{name}", self.folder / name)
            self.shards.append({"file": name, "samples": len(written), "size": size})

    def finish(self):
        """Ends all shards, then writes the record that says that the job is done."""
        for size in list(self.open):
            self.close(size)
        write_whole(record_path(self.args, self.number), {"shards": self.shards, "rejected": self.rejected})


def record_path(args, number):
    return Path(args.output_dir, "progress", f"{number:06}.json")


def plan_folder(args):
    """Shuffles the pictures of a folder and cuts them into jobs: a shard each, of one size where there are buckets."""

    def measure(record):
        if not record[1] and args.default_caption is None:
            raise BadSample("no caption", BESIDE)
        return args.buckets and choose_size(upright_size(Path(args.image_folder, record[0])), args), record

    (records, rejected), groups = list_folder(args), {}
    random.Random(args.seed).shuffle(records)
    for found in parallel(measure, records, args.num_threads):
        if isinstance(found, BadSample):
            reject(rejected, *found.args)
        else:
            groups.setdefault(found[0], []).append(found[1])
    jobs = [group[start : start + args.samples_per_shard] for _, group in sorted(groups.items())
            for start in range(0, len(group), args.samples_per_shard)]  # fmt: skip
    return {"jobs": jobs, "rejected": rejected}


def plan_shards(args):
    """Cuts the input shards, or the files of a data set, into jobs; names every local one that is missing."""
    urls, size = list_inputs(args), args.group_input_shards
    is_local = {url: not url.startswith("pipe:") and "://" not in url.removeprefix("file:") for url in urls}
    missing = [url for url in urls if is_local[url] and not Path(re.sub("^file:(//)?", "", url)).is_file()]
    if missing and not args.skip_unreadable_shards:
        folder = next((path for path in missing if Path(path).is_dir()), None)
        hint = f"; {folder} is a folder: give its .tar files" if folder else ""
        fail(f"{len(missing)} of {len(urls)} shards do not exist: {', '.join(missing)}{hint}")
    return {"jobs": [urls[start : start + size] for start in range(0, len(urls), size)], "rejected": {}}


def unit_of(args):
    """What the progress bar counts."""
    return "image" if args.image_folder else "file" if args.dataset else "shard"


def read_items(items, args, progress):
    """Yields records of a folder as they are and the samples of shards, and moves the bar."""
    for item in items:
        if isinstance(item, str):
            yield from read_table(item, args) if args.dataset else read_shard(item, args.shard_timeout)
        else:
            yield item
        progress.update()


def run_job(number, items, args, encoder, progress):
    """Does a job. Says so, and leaves it undone, if one of its input shards could not be read whole."""
    writer, unreadable = JobWriter(number, args, encoder), None
    prepare = functools.partial(prepare_sample, args=args)
    for found in parallel(prepare, read_items(items, args, progress), args.num_threads):
        if not isinstance(found, BadSample):
            writer.add(found)
            continue
        if found.args[0] not in writer.rejected:
            progress.write("skipped ({}; others of this job are only counted): {}".format(*found.args), sys.stderr)
        reject(writer.rejected, *found.args)
        unreadable = found if found.args[0] == "unreadable shard" and not args.skip_unreadable_shards else unreadable
    if not unreadable:
        writer.finish()


def begin(args):
    """Makes the folder and the plan, or finds those of a run that was stopped. Refuses to mix two runs."""
    output = Path(args.output_dir)
    progress, index = output / "progress", output / "index.json"
    try:
        progress.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=progress).close()
    except OSError as error:
        fail(f"--output_dir {output} cannot be written: {error}")
    settings, state = json.loads(json.dumps(public_settings(args))), progress / "settings.json"
    if not index.exists() and not state.exists():
        if list(output.glob("*.tar")):
            fail(f"--output_dir {output} holds shards that are not of this tool; give another folder")
        write_whole(state, settings)
    begun = json.loads((index if index.exists() else state).read_text())
    begun = begun.get("made_by", {}).get("settings", {}) if index.exists() else begun
    for name in (name for name in settings | begun if settings.get(name) != begun.get(name)):
        fail(f"--{name} is {settings.get(name)}, but --output_dir {output} was begun with {begun.get(name)}; "
             "give that, or another folder")  # fmt: skip
    if not index.exists() and not (progress / "plan.json").exists() and args.image_folder:
        try:
            write_whole(progress / "plan.json", plan_folder(args))
        except SystemExit:
            shutil.rmtree(progress)  # nothing was begun that other flags could mix with
            raise


def finish(args, plan, encoder):
    """Numbers the shards and writes index.json; then nothing of `progress` is needed any more."""
    output, shards, rejected = Path(args.output_dir), [], dict(plan["rejected"])
    undone = [number for number in range(len(plan["jobs"])) if not record_path(args, number).exists()]
    if undone:
        fail(f"{len(undone)} of {len(plan['jobs'])} jobs are not done: shards could not be read whole (see above); "
             "start again to try them again, or go on without them by --skip_unreadable_shards")  # fmt: skip
    for number in range(len(plan["jobs"])):
        record = json.loads(record_path(args, number).read_text())
        shards += record["shards"]
        for reason, (count, example) in record["rejected"].items():
            reject(rejected, reason, example, count)
    if not shards:
        reasons = "; ".join(f"{count} × {reason} ({example})" for reason, (count, example) in rejected.items())
        shutil.rmtree(output / "progress")  # what was wrong with the source may be put right
        fail(f"no usable sample: {reasons or 'the source is empty'}")
    for number, shard in enumerate(shards):
        made, shard["file"] = output / "progress" / shard["file"], f"{number:05}.tar"
        if made.exists():  # else an earlier start has renamed it
            os.replace(made, output / shard["file"])
    sizes = Counter()
    for shard in shards:
        sizes["x".join(map(str, shard["size"])) if shard["size"] else "as they are"] += shard["samples"]
    versions = {module.__name__: module.__version__ for module in (PIL, torch, diffusers, transformers)}
    if encoder:
        write_whole(output / "empty.safetensors", encoder.empty())
    write_whole(output / "index.json", {
        "samples": sum(shard["samples"] for shard in shards), "sizes": dict(sorted(sizes.items())),
        "rejected": rejected, "fingerprint": encoder.fingerprint if encoder else None,
        "made_by": {"tool": "prepare_shards.py", "versions": versions, "settings": public_settings(args)},
        "shards": shards})  # fmt: skip


def report(args):
    """Prints what index.json says, and how to train on it."""
    output = Path(args.output_dir)
    index = json.loads((output / "index.json").read_text())
    wanted = [shard["file"] for shard in index["shards"]] + (["empty.safetensors"] if index["fingerprint"] else [])
    if missing := [name for name in wanted if not (output / name).is_file()]:
        fail(f"--output_dir {output} is complete by its index.json, but has lost {', '.join(missing)}")
    shutil.rmtree(output / "progress", ignore_errors=True)
    print_rejected(index["samples"], index["rejected"])
    for size, count in index["sizes"].items():
        print(f"  {size:<24}{count:>10,}")
    last = len(index["shards"]) - 1
    pattern = f"{{00000..{last:05}}}" if last else "00000"
    print(f'--train_shards_path_or_url "{output}/{pattern}.tar" --max_train_samples {index["samples"]}')


def print_rejected(usable, rejected):
    total = usable + sum(count for count, _ in rejected.values())
    print(f"samples: {total:,}, usable: {usable:,}, rejected: {total - usable:,}")
    for reason, (count, example) in sorted(rejected.items(), key=lambda item: -item[1][0]):
        print(f"  {reason:<24}{count:>10,}   e.g. {example}")


def write_shards(args):
    """Does the jobs that are not done yet, a share of them in each process."""
    is_cpu = os.environ.get("ACCELERATE_USE_CPU") == "true" or not torch.accelerator.is_available()
    state = PartialState(cpu=is_cpu, timeout=datetime.timedelta(days=30))  # ranks wait for the slowest
    output, encoder = Path(args.output_dir), None
    if args.encode and not (output / "index.json").exists():
        encoder = Encoder(args, state.device)
    if state.is_main_process:
        begin(args)
    state.wait_for_everyone()
    if not (output / "index.json").exists():
        plan = json.loads((output / "progress" / "plan.json").read_text()) if args.image_folder else plan_shards(args)
        left = [number for number in range(len(plan["jobs"])) if not record_path(args, number).exists()]
        mine = [number for number in left if number % state.num_processes == state.process_index]
        options = {"unit": unit_of(args), "disable": not state.is_main_process,
                   "desc": f"one of {state.num_processes} processes" if state.num_processes > 1 else None}  # fmt: skip
        with tqdm(total=sum(len(plan["jobs"][number]) for number in mine), **options) as progress:
            if len(left) < len(plan["jobs"]) and state.is_main_process:
                progress.write(f"{len(plan['jobs']) - len(left)} of {len(plan['jobs'])} jobs were done before")
            for number in mine:
                run_job(number, plan["jobs"][number], args, encoder, progress)
        state.wait_for_everyone()
        if state.is_main_process:
            finish(args, plan, encoder)
    if state.is_main_process:
        report(args)


# ----------------------------------------------------------------------------------------------------------- check
SHEET = (8, 6)  # columns and rows of the contact sheet
SHEET_MARK = b"tEXtSoftware\0prepare_shards.py"  # by which the tool knows it again among the pictures of a folder


def inspect_sample(item, args):
    """What --check wants to know of an item: its size, captions, bucket, fingerprint and a small picture."""
    sample = open_item(item, args)
    info, captions, name = read_sample(sample, args)
    data, fingerprint, bucket = sample.get("safetensors"), None, None
    if data:
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            fingerprint = header["__metadata__"]["fingerprint"]
        except (ValueError, KeyError) as error:
            raise BadSample("broken encoding", f"{type(error).__name__}: {error}") from error
    thumbnail, size = load_image(sample[name], 96, Image.Resampling.BILINEAR) if name else (None, None)
    if thumbnail:
        thumbnail.thumbnail((128, 128))
    size = size or original_size(info, (0, 0))
    if name and args.buckets:
        bucket = choose_size(upright_size(io.BytesIO(sample[name])), args)
    check_filters(dict(zip(("width", "height"), original_size(info, size), strict=True)), args)
    check_area(*original_size(info, size), args)
    return SimpleNamespace(size=size, captions=captions, bucket=bucket, fingerprint=fingerprint, thumbnail=thumbnail)


def draw_sheet(samples, path):
    """Draws pictures with the beginning of their captions."""
    columns, cell, font = SHEET[0], (140, 172), ImageFont.load_default(11)
    rows = math.ceil(len(samples) / columns)
    sheet = Image.new("RGB", (columns * cell[0], rows * cell[1]), "white")
    pen = ImageDraw.Draw(sheet)
    for index, sample in enumerate(samples):
        x, y = index % columns * cell[0] + 6, index // columns * cell[1] + 6
        sheet.paste(sample.thumbnail, (x, y))
        pen.multiline_text((x, y + 130), "\n".join(textwrap.wrap(sample.captions[0], 22)[:3]), "black", font, spacing=1)
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        mark = PngImagePlugin.PngInfo()
        mark.add_text("Software", "prepare_shards.py")
        sheet.save(path, "PNG", pnginfo=mark)
    except OSError as error:
        fail(f"--contact_sheet {path} cannot be written: {error}")


def check(args):
    """Reads the whole source (Ctrl-C: what there was so far), prints a table and draws a sheet of random pictures."""
    items, rejected = list_folder(args) if args.image_folder else (list_inputs(args), {})
    samples, drawn, rng, room = [], [], random.Random(args.seed), SHEET[0] * SHEET[1]
    progress = tqdm(total=len(items), unit=unit_of(args))
    inspect = functools.partial(inspect_sample, args=args)
    with progress, contextlib.suppress(KeyboardInterrupt):
        for found in parallel(inspect, read_items(items, args, progress), args.num_threads):
            if isinstance(found, BadSample):
                reject(rejected, *found.args)
                continue
            samples.append(found)
            place = len(drawn) if len(drawn) < room else rng.randrange(len(samples))
            if found.thumbnail and place < room:
                drawn[place : place + 1] = [SimpleNamespace(**vars(found))]
            found.thumbnail = None  # only those in the sheet are kept
    print_rejected(len(samples), rejected)
    if not samples:
        fail("no usable sample")
    print_samples(samples, args)
    if drawn:
        draw_sheet(drawn, args.contact_sheet)
        print(f"{args.contact_sheet} shows {len(drawn)} of them")


def print_samples(samples, args):
    """Prints sizes, captions, buckets and encodings of the usable samples."""

    def spread(values):
        return "{:>10,}{:>10,}{:>10,}".format(min(values), int(statistics.median(values)), max(values))

    captions = [caption for sample in samples for caption in sample.captions]
    print(f"{'':26}{'least':>10}{'median':>10}{'most':>10}")
    for name, values in {
        "width": [sample.size[0] for sample in samples], "height": [sample.size[1] for sample in samples],
        "captions of a sample": [len(sample.captions) for sample in samples],
        "characters of a caption": [len(caption) for caption in captions],
        "words of a caption": [len(caption.split()) for caption in captions],
    }.items():  # fmt: skip
        print(f"  {name:<24}{spread(values)}")
    print(f"  empty captions          {sum(not caption for caption in captions):>10,}")
    print(f"  a side below --resolution {args.resolution}: {sum(min(s.size) < args.resolution for s in samples):,}")
    buckets = Counter(f"{s.bucket[0]}x{s.bucket[1]}" for s in samples if s.bucket)
    encoded = Counter(f"encoded by {s.fingerprint}" for s in samples if s.fingerprint)
    for name, count in [*sorted(buckets.items()), *encoded.items()]:
        print(f"  {name:<24}{count:>10,}")


# ------------------------------------------------------------------------------------------------------------ main
def main(argv=None):
    args = parse_args(argv)
    try:
        check(args) if args.check else write_shards(args)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on from the shards that are done") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        fail(f"--output_dir {args.output_dir}: {error.strerror}; the same command goes on from what is done")
    except torch.OutOfMemoryError:
        fail(f"out of device memory: an --encode_batch_size below {args.encode_batch_size} goes on from what is done")


if __name__ == "__main__":
    main()
