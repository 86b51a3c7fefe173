#!/usr/bin/env python
# Copyright 2026 the authors of this repository. Licensed under the Apache License, Version 2.0.
"""Tells which of several few-step models is better, and how good it is beside what is published.

    python tools/evaluate.py --teacher stable-diffusion-v1-5/stable-diffusion-v1-5 --guidance_scale 7.5 \
        --row name=lcm model=out/lcm steps=1,2,4 --row name=tcd-lora model=out/tcd-lora steps=2,4,8 \
        --prompts prompts.txt --output_dir evaluation

A row is a pipeline that diffusers loads, with or without a LoRA, at some numbers of steps; model=a,b,c are trainings
of one recipe with other seeds, and the tables have their mean and spread. All rows draw the same prompts from the same
noise, which depends on (seed, prompt, picture) alone: rows can be added later, an interrupted evaluation goes on, and
`accelerate launch` shares the work. Into --output_dir go

    report.md, report.json    the tables, and all that is needed to repeat them
    grid.png                  models one below the other, prompts side by side, the same noise
    quality.png               every figure against the number of network evaluations
    pictures/<row>/           what was drawn, and what the networks that judge it made of it

A figure whose network or library is missing is left out, with a line that says how to get it. Nothing stands in for it.
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import functools
import gc
import hashlib
import importlib.metadata
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import statistics
import tarfile
import textwrap
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
import yaml
from accelerate import PartialState
from braceexpand import braceexpand
from diffusers import AutoencoderKL, DiffusionPipeline
from huggingface_hub import hf_hub_download
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm.auto import tqdm

# ------------------------------------------------------------------------------------------------------- protocols
Figure = collections.namedtuple("Figure", "title better digits meaning")
FIGURES = {
    "psnr": Figure("PSNR, dB", "higher", 2, "to the teacher's picture of the same noise; it rewards blur, so read it "
                   "with the edges"),
    "edges": Figure("edges", "nearer to 1", 3, "share of the edges of the teacher's pictures that are there, too; less "
                    "where they are blurred or elsewhere, more where they are sharper, and speckle counts as none"),
    "fd": Figure("FD", "lower", 3, "Fréchet distance between the features of two sets of pictures"),
    "kd": Figure("KD × 1000", "lower", 2, "kernel distance of the same features, unbiased, cubic kernel; with the same "
                 "captions in both sets it falls below zero"),
    "patch_fd": Figure("patch FD", "lower", 3, "FD of the central 299 × 299 pixels, not resized"),
    "clip": Figure("CLIP score", "higher", 2, "100 × cosine between picture and prompt"),
    "pick": Figure("PickScore", "higher", 4, "of a CLIP trained on what people chose: cosine × temperature / 100"),
    "reward": Figure("ImageReward", "higher", 3, "of a BLIP trained on what people chose"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is drawn, what it is compared with, and by which figures."""

    about: str
    figures: tuple  # of FIGURES
    source: str  # of what is published
    published: tuple  # (model, steps, {figure: value})
    prompts: int | None = None  # how many that was measured with
    references: int | None = None  # how many real pictures; None: the teacher's pictures are the reference
    size: int | None = None  # pictures are cut to squares and resized to it for FD
    clip_model: str = "openai/clip-vit-base-patch32"
    clip_prefix: str = ""
    clip_size: int | None = None


PROTOCOLS = {
    "fidelity": Protocol(
        "how near pictures are to the teacher's, one by one from the same noise and as a set; without real pictures",
        ("psnr", "edges", "fd", "kd"), "PCM, arXiv:2405.18407: FID to the teacher's pictures",
        tuple((f"SD 1.5, {name}", steps, {"fd": value})
              for name, values in (("LCM", (53.4, 11.0, 6.7, 6.6)), ("PCM", (8.3, 9.8, 5.8, 5.0)))
              for steps, value in zip((1, 2, 4, 8), values, strict=True))),
    "coco5k": Protocol(
        "5,000 prompts of COCO 2014 val, FID-5K against its pictures, CLIP score and reward models",
        ("fd", "clip", "pick", "reward"), "Hyper-SD, arXiv:2404.13686",
        (("SD 1.5", 25, {"clip": 31.88, "reward": 0.18, "pick": 0.217}),
         ("SD 1.5, LCM", 4, {"clip": 30.36, "reward": -0.37, "pick": 0.212}),
         ("SD 1.5, TCD", 4, {"clip": 30.62, "reward": -0.15, "pick": 0.214}),
         ("SD 1.5, Hyper-SD", 1, {"clip": 30.87, "reward": 0.29, "pick": 0.215}),
         ("SDXL", None, {"reward": 0.87}), ("SDXL, LCM", 4, {"reward": 0.48}), ("SDXL, TCD", 4, {"reward": 0.67}),
         ("SDXL, Lightning", 4, {"reward": 0.72}), ("SDXL, Hyper-SD", 4, {"reward": 0.93})),
        prompts=5000, references=5000),
    "coco30k": Protocol(
        "30,000 prompts of COCO 2014 val, FID-30K by clean-fid at 256 × 256 against its 40,504 pictures",
        ("fd",), "DMD2, arXiv:2405.14867",
        (("SD 1.5", None, {"fd": 8.59}), ("SD 1.5, LCM-LoRA", 4, {"fd": 23.62}), ("SD 1.5, DMD2", 1, {"fd": 8.35})),
        prompts=30000, references=40504, size=256),
    "sdxl10k": Protocol(
        "10,000 prompts of COCO 2014, FID by clean-fid at 512 × 512, patch FID at full size, CLIP score of OpenCLIP-G",
        ("fd", "patch_fd", "clip"), "DMD2, arXiv:2405.14867; CLIP score × 100",
        (("SDXL, guidance 6", None, {"fd": 19.36, "patch_fd": 21.38, "clip": 33.2}),
         ("SDXL, LCM", 4, {"fd": 22.16, "patch_fd": 33.92, "clip": 31.7}),
         ("SDXL, DMD2", 4, {"fd": 19.32, "patch_fd": 20.86, "clip": 33.2})),
        prompts=10000, references=10000, size=512,
        # as in DMD2's published evaluation: this network, pictures reduced to 256 first, these words before the prompt
        clip_model="laion/CLIP-ViT-g-14-laion2B-s12B-b42K", clip_prefix="A photo depicts ", clip_size=256),
}  # fmt: skip
INCEPTION = ("clean-fid", "torch-fidelity")
NO_REWARD = ("its weights load by the package image-reward alone, whose last release (1.5, 2023) does not run with "
             "transformers 5; run it on pictures/ in an environment of its own")  # fmt: skip
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Missing(Exception):
    """A figure cannot be had; the text says how to get it."""


# Copied from train_lcm_distill_sd_wds.py
def fail(message):
    """Ends the process with one line that says what to do, instead of a traceback."""
    raise SystemExit(f"error: {message}")


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ------------------------------------------------------------------------------------------------------- arguments
def positive(text):
    """An argparse type: a whole number from 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def add_row_args(parser):
    add = parser.add_argument_group("what is compared").add_argument
    add("--teacher", nargs="+", metavar=("MODEL", "KEY=VALUE"), help="the reference row: a hub id or folder, and keys "
        "as --row has them")  # fmt: skip
    add("--teacher_steps", type=positive, default=50, help="of the reference; rows of the other steps come with it")
    add("--guidance_scale", type=float, default=7.5, help="of the teacher")
    add("--no_floor", action="store_true", help="leave out the teacher with other noise: the floor of FD and KD")
    add("--row", nargs="+", action="append", default=[], metavar="KEY=VALUE", help="name= model= steps=1,2,4 "
        "[guidance_scale= eta= lora= weight_name= scheduler=CLASS scheduler.OPTION= revision= variant= "
        "reference=ROW]; an output folder of a training script needs name, model and steps only; model=A,B,C: training "
        "seeds of it; reference: a row that it is compared with, not with the teacher")  # fmt: skip
    add("--rows", metavar="FILE", help="YAML or JSON: a list of mappings with the keys of --row")
    add("--skip_missing", action="store_true", help="leave out rows, and training seeds, whose folder holds no model")


def add_protocol_args(parser):
    add = parser.add_argument_group("how").add_argument
    about = "; ".join(f"{name}: {protocol.about}" for name, protocol in PROTOCOLS.items())
    add("--protocol", default="fidelity", choices=PROTOCOLS, help=about)
    add("--prompts", nargs="+", required=True, metavar="SOURCE", help=".txt files with one a line, a captions file of "
        "COCO (a caption of each picture, shuffled by seed 0), or .tar shards (braces expand)")  # fmt: skip
    add("--num_prompts", type=positive, help="the first so many (default: as many as the protocol has, or all)")
    add("--images_per_prompt", type=positive, default=1, help="pictures of each prompt, from noise of their own")
    add("--references", nargs="+", metavar="SOURCE", help="real pictures: folders or .tar shards")
    add("--features", nargs="+", default=["clean-fid"], metavar="NETWORK", help="of FD and KD: clean-fid or "
        "torch-fidelity (Inception), a vision model of transformers such as facebook/dinov2-base, hub id or folder, or "
        "vae: the teacher's VAE encoder, which is always at hand")  # fmt: skip
    add("--clip_model", help="hub id or folder (default: the protocol's)")
    add("--pick_model", default="yuvalkirstain/PickScore_v1", help="hub id or folder")
    add("--resolution", type=positive, help="height and width in pixels (default: the pipeline's own)")
    add("--seed", type=int, default=0, help="of the noise")


def add_output_args(parser):
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", required=True, help="folder of pictures and report; with the same one, an evaluation goes on")
    add("--batch_size", type=positive, default=16, help="pictures drawn, or looked at, at once")
    add("--dtype", choices=DTYPES, help="of the pipelines (default: float16 on a GPU, float32 on a CPU)")
    add("--grid_prompts", type=positive, default=6, help="columns of grid.png")
    add(
        "--grid_steps",
        type=positive,
        nargs="+",
        help="grid.png shows references and rows of these steps (default: all)",
    )


# Copied from train_lcm_distill_sd_wds.py
class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action):
        is_empty = action.default is None or action.default is False or action.default == ""
        return action.help if is_empty else super()._get_help_string(action)


def parse_args(argv=None):
    """Reads the command line and refuses what can be known to be wrong without opening a file."""
    formatter = functools.partial(HelpFormatter, max_help_position=30, width=120)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter, allow_abbrev=False)
    for add_group in (add_row_args, add_protocol_args, add_output_args):
        add_group(parser)
    args = parser.parse_args(argv)
    needs_references = PROTOCOLS[args.protocol].references is not None
    if not args.teacher and not needs_references:
        parser.error(f"--protocol {args.protocol} compares with a teacher: give --teacher")
    if needs_references and not args.references:
        parser.error(f"--protocol {args.protocol} compares with real pictures: give --references")
    if "vae" in args.features and not args.teacher:
        parser.error("--features vae is the teacher's VAE: give --teacher")
    return args


# ------------------------------------------------------------------------------------------------------------ rows
ROW_KEYS = "name model steps guidance_scale eta lora weight_name scheduler revision variant reference".split()
LORA_FILE = "pytorch_lora_weights.safetensors"


@dataclasses.dataclass(frozen=True)
class Row:
    """A model at one number of steps."""

    name: str
    model: str
    steps: int
    guidance_scale: float
    eta: float | None = None  # None: the pipeline's default
    lora: str | None = None
    weight_name: str | None = None
    scheduler: str | None = None  # class name
    scheduler_from: str | None = None  # folder or hub id with a scheduler/ that replaces the model's own
    scheduler_options: tuple = ()
    revision: str | None = None
    variant: str | None = None
    reference: str | None = None  # name of the row whose pictures it is compared with; None: the first row
    stream: int = 0  # of noise: the floor row draws from another one
    member: int = 1  # which of the row's training seeds

    @property
    def title(self):
        return self.name + ", other noise" * self.stream

    @property
    def label(self):
        return f"{self.title}, {self.steps} step{'s' * (self.steps > 1)}"

    @property
    def folder(self):
        return safe_name(f"{self.title}-{self.steps}" + f"-training-{self.member}" * (self.member > 1))


def safe_name(text):
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")


def find_file(source, name):
    """The path of a file of a folder or of a hub repository; None where it has none, or cannot be asked."""
    if os.path.isdir(source):
        return path if (path := Path(source, name)).is_file() else None
    try:
        return Path(hf_hub_download(source, name))
    except Exception:  # no such file, no such repository, no network: the hub's client raises many kinds
        return None


def read_json(path):
    """What a JSON file holds; {} where there is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8")) if path and Path(path).is_file() else {}
    except ValueError as error:
        fail(f"{path} is no JSON: {first_line(error)}")


def is_local(model):
    """Whether this is meant as a path. demo/output may be a hub id, but not where there is a folder demo."""
    return os.path.exists(model) or model.startswith((".", "/", "~")) or Path(model).parent.is_dir() and "/" in model


def holds_model(folder):
    return not is_local(folder) or Path(folder, "model_index.json").is_file() or any(Path(folder).glob("*.safetensors"))


def parse_pairs(pairs, flag):
    """["key=value", …] → {key: text}."""
    if wrong := [pair for pair in pairs if "=" not in pair]:
        fail(f"{flag} {wrong[0]} is no KEY=VALUE; a row reads name=lcm model=out/lcm steps=1,2,4")
    return dict(pair.split("=", 1) for pair in pairs)


def read_rows(path):
    """The rows of a YAML or JSON file: a list of mappings."""
    try:
        rows = yaml.safe_load(Path(path).read_text(encoding="utf-8"))  # JSON is YAML, too
    except (OSError, ValueError, yaml.YAMLError) as error:
        fail(f"--rows {path} cannot be read: {first_line(error)}")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        fail(f"--rows {path} holds no list of rows such as {{name: lcm, model: out/lcm, steps: [1, 2, 4]}}")
    return rows


def trained_settings(source, is_lora):
    """guidance_scale and eta that a model is meant to be used with, as far as it says: the args.json of a training
    script's output folder, or the call in the example of a model card.
    """
    if made_with := read_json(find_file(source, "args.json")):
        embeds_w = not is_lora and read_json(find_file(source, "unet/config.json")).get("time_cond_proj_dim")
        scale = made_with.get(f"validation_{'' if embeds_w else 'student_'}guidance_scale", 1)
        return {"guidance_scale": scale, "eta": made_with.get("validation_eta", 0)}
    card = find_file(source, "README.md")
    calls = re.findall(r"\bpipe\w*\(.*?\)", card.read_text(encoding="utf-8", errors="replace"), re.S) if card else []
    found = {}
    for key, value in re.findall(r"\b(guidance_scale|eta)\s*=\s*([\d.]+)", " ".join(calls)):
        found.setdefault(key, float(value))
    return found


def complete_row(row):
    """Adds what the model's folder says of base model, scheduler, guidance scale and eta to what the user gave."""
    where, model, lora = f"row {row['name']}", str(row["model"]), row.get("lora")
    for source in filter(None, (model, lora)):
        if not os.path.isdir(source) and is_local(source):
            fail(f"{where}: there is no folder {source}")
        if not holds_model(source):
            fail(f"{where}: {source} holds neither a pipeline (model_index.json) nor a LoRA ({LORA_FILE})")
    if lora is None and os.path.isdir(model) and not Path(model, "model_index.json").is_file():
        lora, model = model, read_json(Path(model, "args.json")).get("pretrained_teacher_model")
        if not model:
            fail(f"{where}: {lora} is a LoRA, and no args.json there names its base: give model=BASE lora={lora}")
    row = trained_settings(lora or model, bool(lora)) | row | {"model": model, "lora": lora}
    if lora and Path(lora, LORA_FILE).is_file():
        row.setdefault("weight_name", LORA_FILE)  # a training script leaves several files
    if lora and not row.get("scheduler"):
        if not find_file(lora, "scheduler/scheduler_config.json"):
            fail(f"{where}: the LoRA {lora} names no scheduler: give scheduler=LCMScheduler, TCDScheduler, …")
        row["scheduler_from"] = lora
    if row.get("guidance_scale") is None:
        fail(f"{where}: {model} does not say which guidance scale it is meant for: give guidance_scale=…")
    return row


def training_seeds(row):
    """{number: row} of each training seed: model or lora may be a list of them, or have commas between."""
    given = {key: row[key].split(",") if isinstance(row[key], str) else [str(each) for each in np.atleast_1d(row[key])]
             for key in ("model", "lora") if row.get(key)}  # fmt: skip
    count = max(map(len, given.values()), default=1)
    if uneven := [key for key, values in given.items() if len(values) not in (1, count)]:
        fail(f"row {row.get('name')}: {uneven[0]} must be one, or as many as there are training seeds, {count}")
    return {k + 1: row | {key: values[k % len(values)] for key, values in given.items()} for k in range(count)}


def make_rows(row, member=1):
    """{key: value} → a Row for each number of steps. Fails with a line that names the row."""
    name = row.get("name", " ".join(f"{key}={value}" for key, value in row.items()))
    if not {"name", "model", "steps"} <= row.keys():
        fail(f"row {name}: name, model and steps are needed")
    options = {key.removeprefix("scheduler."): row.pop(key) for key in list(row) if key.startswith("scheduler.")}
    options = {key: yaml.safe_load(value) if isinstance(value, str) else value for key, value in options.items()}
    if unknown := set(row) - set(ROW_KEYS):
        fail(f"row {name}: unknown key {', '.join(sorted(unknown))}; there are {', '.join(ROW_KEYS)}, scheduler.OPTION")
    if row.get("scheduler") and not hasattr(diffusers, row["scheduler"]):
        fail(f"row {name}: diffusers has no scheduler {row['scheduler']}")
    row = complete_row(row | {"name": str(name)})
    steps = row.pop("steps")
    try:
        steps = [int(k) for k in (steps.split(",") if isinstance(steps, str) else np.atleast_1d(steps))]
        row |= {key: float(row[key]) for key in ("guidance_scale", "eta") if row.get(key) is not None}
    except (TypeError, ValueError) as error:
        fail(f"row {name}: {first_line(error)}")
    if min(steps) < 1:
        fail(f"row {name}: steps must be 1 or more")
    row |= {"scheduler_options": tuple(sorted(options.items())), "member": member}
    row["reference"] = row.get("reference") and str(row["reference"])
    return [Row(**row, steps=k) for k in dict.fromkeys(steps)]


def make_students(row, skips_missing, left_out):
    """The rows of all training seeds of a row; with skips_missing of those that are there, and left_out has the others.
    Fails where they are to be used with different settings: these are no seeds of one recipe.
    """
    seeds, gone, made = training_seeds(row), {}, []
    if skips_missing:
        for number, one in seeds.items():
            if lost := [one[key] for key in ("model", "lora") if one.get(key) and not holds_model(one[key])]:
                gone[number] = lost[0]
    if gone:
        part = f", {len(gone)} of {len(seeds)} training seeds" if len(gone) < len(seeds) else ""
        left_out[f"row {row.get('name')}{part}"] = f"there is no model in {', '.join(gone.values())}"
    for number, one in seeds.items():
        made += [] if number in gone else make_rows(one, number)
    for key in ("guidance_scale", "eta"):
        if len(found := sorted({str(getattr(each, key)) for each in made})) > 1:
            fail(f"row {row['name']}: its models are no training seeds of one recipe: {key} is {' and '.join(found)}")
    return made


def add_references(rows, has_floor):
    """Adds the floor after the first row. A row that others name as their reference has what comes with the teacher:
    the floor, and rows of their steps, which are compared with it.
    """
    steps, found = collections.defaultdict(set), []
    for row in rows:
        steps[row.reference].add(row.steps)
    for row in rows:
        found.append(row)
        is_reference = row.name in steps and row.name != rows[0].name
        own = {"reference": row.name} if is_reference else {}
        if is_reference and len([other for other in rows if other.name == row.name]) > 1:
            fail(f"row {row.name} is the reference of others: it must be one model at one number of steps")
        if has_floor and (is_reference or row is rows[0]):
            found.append(dataclasses.replace(row, stream=1, **own))
        if is_reference:
            found += [dataclasses.replace(row, steps=k, **own) for k in sorted(steps[row.name] - {row.steps})]
    return found


def list_rows(args):
    """All rows of the comparison, the teacher first, and {name: reason} of those that were left out."""
    students, left_out = [], {}
    for row in [*(parse_pairs(pairs, "--row") for pairs in args.row), *(read_rows(args.rows) if args.rows else [])]:
        students += make_students(row, args.skip_missing, left_out)
    rows = []
    if args.teacher:
        few = sorted({row.steps for row in students} - {args.teacher_steps})
        teacher = {"name": "teacher", "model": args.teacher[0], "guidance_scale": args.guidance_scale}
        rows = make_rows(teacher | parse_pairs(args.teacher[1:], "--teacher") | {"steps": [args.teacher_steps, *few]})
    if PROTOCOLS[args.protocol].references is not None and any(row.reference for row in students):
        fail(f"--protocol {args.protocol} compares with real pictures: reference= is for protocol fidelity")
    has_floor = PROTOCOLS[args.protocol].references is None and not args.no_floor
    rows = add_references(rows + students, has_floor)
    folders = collections.Counter(row.folder for row in rows)
    if twice := [row.label for row in rows if folders[row.folder] > 1]:
        fail(f"two rows are called {twice[0]}: give them names of their own")
    return rows or fail("no row to compare: give --teacher, --row or --rows"), left_out


def group_rows(rows):
    """The lines of the tables: rows that differ in nothing but their training seed share one."""
    lines = {}
    for row in rows:
        lines.setdefault((row.title, row.steps), []).append(row)
    return list(lines.values())


def find_targets(lines):
    """The number of the line with which each is compared; None for the first."""
    numbers = {}
    for number, line in enumerate(lines):
        numbers.setdefault(line[0].name, number)  # a reference stands before the rows that come with it
    if unknown := [line[0] for line in lines if line[0].reference not in (None, *numbers)]:
        fail(f"row {unknown[0].name}: there is no row {unknown[0].reference}, which it names as its reference")
    targets = [numbers.get(line[0].reference, 0) for line in lines]
    return [None, *(0 if target == number else target for number, target in enumerate(targets[1:], 1))]


def fingerprint(source):
    """A digest that changes with the weights of a local model, from a piece of each file; "" for the hub's."""
    digest = hashlib.sha256()
    if source is None or not os.path.isdir(source):
        return ""
    for path in sorted([*Path(source).glob("*.safetensors"), *Path(source).glob("*/*.safetensors")]):
        name, size = str(path.relative_to(source)), path.stat().st_size
        if not name.startswith("checkpoint") and "_online" not in name:
            digest.update(f"{name} {size}".encode() + read_piece(path, size // 2, 2**16))
    return digest.hexdigest()[:16]


def row_settings(row):
    """What must be the same for pictures to be of this row."""
    settings = dataclasses.asdict(row) | {"weights": fingerprint(row.model), "lora_weights": fingerprint(row.lora)}
    for key in ("member", "reference"):  # nothing that is drawn depends on them
        del settings[key]
    return json.loads(json.dumps(settings))  # tuples are lists then


def digest_of(*values):
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:12]


def versioned(model):
    """A folder name for what a network says: another one after its weights have changed."""
    return f"{safe_name(model)}-{digest_of(model, fingerprint(model))[:6]}"


# ------------------------------------------------------------------------------------------ prompts and references
PICTURES, CAPTIONS = ("jpg", "jpeg", "png", "webp"), ("txt", "text", "caption", "json")


def read_piece(path, offset=0, size=-1):
    with open(path, "rb") as stream:
        stream.seek(offset)
        return stream.read(size)


def list_members(source, kinds):
    """Yields (shard, name without suffix, suffix, offset, size) of the wanted members of shards, in order."""
    for path in braceexpand(source):
        try:
            with tarfile.open(path, "r:") as shard:
                members = [member for member in shard if member.isreg()]
        except (OSError, tarfile.TarError) as error:
            fail(f"{path} cannot be read as a local, uncompressed tar: {first_line(error)}")
        for member in members:
            stem, _, kind = member.name.rpartition(".")
            if kind.lower() in kinds:
                yield path, stem, kind.lower(), member.offset_data, member.size


def caption_of_json(text):
    try:
        info = json.loads(text)
        value = next((info[key] for key in ("caption", "captions", "text") if info.get(key)), "")
    except (ValueError, AttributeError):  # no JSON, or no mapping
        return ""
    return str(value[0] if isinstance(value, list) else value)


def read_shard_captions(source):
    """One caption of each sample, in order: of its text member, or else of its JSON."""
    samples = {}
    for path, stem, kind, offset, size in list_members(source, CAPTIONS):
        text = read_piece(path, offset, size).decode("utf-8-sig", errors="replace")
        if kind == "json":
            text = caption_of_json(text)
        if kind != "json" or not samples.get((path, stem)):
            samples[path, stem] = text.strip()
    return [text for text in samples.values() if text]


def read_coco_captions(path):
    """[(caption, file name)] of a COCO captions file, one of each picture. Which pictures come first, and which of
    their captions, is drawn by seed 0, so that everyone's first 5,000 are the same.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        captions = {number: [] for number in sorted(names)}
        for note in sorted(content["annotations"], key=lambda note: note["id"]):
            captions[note["image_id"]].append((" ".join(str(note["caption"]).split()), names[note["image_id"]]))
    except (OSError, ValueError) as error:
        fail(f"--prompts {path} cannot be read: {first_line(error)}")
    except (KeyError, TypeError) as error:
        fail(f"--prompts {path} holds no captions as captions_val2014.json has them: no {error}")
    rng, found = random.Random(0), [texts for texts in captions.values() if texts]
    rng.shuffle(found)
    return [rng.choice(texts) for texts in found]


def read_prompts(args):
    """The prompts, as many as are wanted, the names of the pictures that they describe, where COCO's are, and
    {kind: numbers of its prompts} where they are of several sources.
    """
    prompts, sources = [], []
    for source in args.prompts:
        if source.endswith(".json"):
            prompts += read_coco_captions(source)
        elif source.endswith(".tar"):
            prompts += [(caption, None) for caption in read_shard_captions(source)]
        else:
            try:
                lines = Path(source).read_text(encoding="utf-8-sig").splitlines()
            except (OSError, ValueError) as error:
                fail(f"--prompts {source} cannot be read: {first_line(error)}")
            prompts += [(line.strip(), None) for line in lines if line.strip()]
        sources += [source] * (len(prompts) - len(sources))
    if len(prompts) < (args.num_prompts or 1):
        fail(f"--prompts holds {len(prompts)} prompts, and {args.num_prompts or 1} are wanted")
    chosen = prompts[: args.num_prompts or PROTOCOLS[args.protocol].prompts]
    kinds = name_kinds(sources[: len(chosen)])
    return [caption for caption, _ in chosen], {name for _, name in chosen} - {None}, kinds


def name_kinds(sources):
    """{kind: numbers of its prompts}, {} if all are of one source. A kind is called by what its file's name has of its
    own: test_plain.txt and test_styled.txt are "plain" and "styled".
    """
    files = list(dict.fromkeys(sources))
    stems = [Path(file).stem for file in files]
    shared = re.sub(r"[^_-]*$", "", os.path.commonprefix(stems))
    names = [stem.removeprefix(shared) or stem for stem in stems]
    names = names if len(set(names)) == len(files) else files
    found = {name: np.flatnonzero([source == file for source in sources])
             for name, file in zip(names, files, strict=True)}  # fmt: skip
    return found if len(found) > 1 else {}


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Pictures on disk, and the folder for what networks make of them."""

    folder: Path
    places: list  # [(path, offset, size)]
    prompts: list | None = None

    def load(self, index):
        """A picture, upright and RGB; None where it is broken."""
        try:
            image = Image.open(io.BytesIO(read_piece(*self.places[index])))
            return ImageOps.exif_transpose(image).convert("RGB")
        except Exception:  # decoders raise almost anything on damaged data
            return None


def find_references(sources, folder, names=()):
    """The real pictures of folders and shards; of folders only those of these names, if any are given."""
    places = []
    for source in sources:
        if source.endswith(".tar"):
            places += [(path, offset, size) for path, _, _, offset, size in list_members(source, PICTURES)]
        elif os.path.isdir(source):
            files = sorted(path for path in Path(source).rglob("*") if path.suffix.lower()[1:] in PICTURES)
            places += [(str(path), 0, -1) for path in files if not names or path.name in names]
        else:
            fail(f"--references {source} is neither a folder nor a .tar")
    if not places:
        kind = "picture of --prompts" if names else ", ".join(PICTURES)
        fail(f"--references {' '.join(sources)}: no {kind} in there")
    return Pictures(folder / digest_of(places), places)


def square(image, size):
    """The central square of a picture, resized to `size` pixels by Lanczos, as published FIDs have it."""
    side = min(image.size)
    image = central(image, side)
    return image if side == size else image.resize((size, size), Image.Resampling.LANCZOS)


def central(image, size):
    """The central `size` × `size` pixels of a picture; one that is smaller stays as it is."""
    if min(image.size) < size:
        return image
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


# --------------------------------------------------------------------------------------------------------- drawing
class Evaluation:
    """What all parts share: arguments, rows, prompts, processes, and what could not be had."""

    def __init__(self, args):
        self.args, self.protocol, self.output = args, PROTOCOLS[args.protocol], Path(args.output_dir)
        is_cpu = os.environ.get("ACCELERATE_USE_CPU") == "true" or not torch.accelerator.is_available()
        self.state = PartialState(cpu=is_cpu, timeout=datetime.timedelta(days=30))  # ranks wait for the slowest
        self.dtype = args.dtype or ("float32" if self.state.device.type == "cpu" else "float16")
        (self.prompts, self.described, kinds), (self.rows, self.left_out) = read_prompts(args), list_rows(args)
        self.kinds = {"": np.arange(len(self.prompts))} | kinds  # all prompts, and those of each source
        self.lines = group_rows(self.rows)
        self.targets = find_targets(self.lines)
        self.items = [(i, k) for i in range(len(self.prompts)) for k in range(args.images_per_prompt)]
        self.warnings = []

    def groups(self):
        """{number of a reference: numbers of the lines that are compared with it}; {None: all} with real pictures."""
        if self.protocol.references is not None:
            return {None: list(range(len(self.lines)))}
        return {target: [number for number, found in enumerate(self.targets) if found == target]
                for target in dict.fromkeys([0, *self.targets[1:]])}  # fmt: skip

    def folder(self, row):
        return self.output / "pictures" / row.folder

    def path(self, row, item):
        """The file of (prompt number, picture number)."""
        return self.folder(row) / f"{item[0]:05}-{item[1]}.png"

    def pictures(self, row):
        places = [(str(self.path(row, item)), 0, -1) for item in self.items]
        return Pictures(self.folder(row), places, [self.prompts[i] for i, _ in self.items])

    def share(self, work):
        """This process's part of a list of what is left to do."""
        return work[self.state.process_index :: self.state.num_processes]

    def bar(self, total, unit, title):
        return tqdm(total=total, unit=unit, desc=title, disable=not self.state.is_main_process or not total)


def write_whole(path, data):
    """Writes a file under a temporary name and renames it when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"tmp-{os.getpid()}-{path.name}")
    temporary.write_bytes(data if isinstance(data, bytes) else json.dumps(data, indent=1, ensure_ascii=False).encode())
    os.replace(temporary, path)


def begin(run):
    """Notes what the pictures are drawn with, and refuses to mix them with others that lie there."""
    output, path = run.args.output_dir, run.output / "pictures" / "settings.json"
    settings = {"seed": run.args.seed, "resolution": run.args.resolution, "dtype": run.dtype, "prompts": run.prompts}
    known = read_json(path) or settings
    for key in ("seed", "resolution", "dtype"):
        if known[key] != settings[key]:
            fail(f"--output_dir {output} was begun with {key} {known[key]}, not {settings[key]}: give another folder")
    if any(a != b for a, b in zip(known["prompts"], run.prompts, strict=False)):  # more of the same are welcome
        fail(f"--output_dir {output} was begun with other --prompts: give another folder")
    try:
        write_whole(path, max(known, settings, key=lambda each: len(each["prompts"])))
        for row in run.rows:
            path, wanted = run.folder(row) / "row.json", row_settings(row)
            other = read_json(path) or wanted
            for key in (key for key in wanted if other.get(key) != wanted[key]):
                fail(f"row {row.label}: {path.parent} was drawn with {key} {other.get(key)}, not {wanted[key]}: give "
                     "the row another name, or remove that folder")  # fmt: skip
            write_whole(path, wanted)
    except OSError as error:
        fail(f"--output_dir {output} cannot be written: {first_line(error)}")


def load_pipeline(row, run):
    """The pipeline of a row, on the device, silent and without the filter that blackens pictures."""
    try:
        dtype = {"dtype" if diffusers.__version__ >= "0.42" else "torch_dtype": DTYPES[run.dtype]}
        pipe = DiffusionPipeline.from_pretrained(row.model, revision=row.revision, variant=row.variant, **dtype)
        if row.lora:
            pipe.load_lora_weights(row.lora, **({"weight_name": row.weight_name} if row.weight_name else {}))
        config, kind = pipe.scheduler.config, type(pipe.scheduler)
        if row.scheduler_from:
            config = read_json(find_file(row.scheduler_from, "scheduler/scheduler_config.json"))
            kind = getattr(diffusers, config["_class_name"])
        kind = getattr(diffusers, row.scheduler) if row.scheduler else kind
        pipe.scheduler = kind.from_config(config, **dict(row.scheduler_options))
    except Exception as error:  # loaders, the hub's client and config checks raise many kinds
        names = " with ".join(filter(None, (row.model, row.lora)))
        fail(f"row {row.name}: {names} cannot be loaded: {first_line(error)}")
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(run.state.device)


def count_evaluations(pipe, counts):
    """Adds the batch size of every call of the pipeline's network(s) to counts["evaluations"]."""

    def count(_module, inputs, keywords):
        tensors = [value for value in (*inputs, *keywords.values()) if torch.is_tensor(value) and value.dim()]
        counts["evaluations"] += len(tensors[0])

    for name in ("unet", "transformer", "transformer_2", "prior", "decoder"):
        if isinstance(module := getattr(pipe, name, None), torch.nn.Module):
            module.register_forward_pre_hook(count, with_kwargs=True)


def noise_seed(seed, stream, item):
    """The seed of a picture's noise: a function of nothing but these, so that rows and prompts can be added later."""
    digest = hashlib.sha256(f"{seed}/{stream}/{item[0]}/{item[1]}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def call_pipeline(pipe, row, batch, run, steps):
    """Pictures of a batch of items. Each has a generator of its own, on the CPU: neither its first noise nor what the
    scheduler adds between steps depends on the batch, the device or the kind of pipeline.
    """
    size, known = run.args.resolution, inspect.signature(pipe.__call__).parameters
    options = {"guidance_scale": row.guidance_scale, "eta": row.eta, "height": size, "width": size}
    options = {key: value for key, value in options.items() if value is not None and key in known}
    generators = [torch.Generator().manual_seed(noise_seed(run.args.seed, row.stream, item)) for item in batch]
    prompts = [run.prompts[i] for i, _ in batch]
    return pipe(prompts, num_inference_steps=steps, generator=generators, **options).images


def warm_up(pipe, row, batch, run):
    """The first call is slow, and not to be timed. It also shows whether the pipeline takes what it is given."""
    try:
        call_pipeline(pipe, row, batch, run, min(row.steps, 2))
    except (TypeError, ValueError) as error:  # of a size, a scheduler or a pipeline that is not text-to-image
        fail(f"row {row.label} cannot be drawn: {first_line(error)}")


def draw_batch(pipe, row, batch, run, counts):
    """Draws and saves pictures, and notes how long the drawing took: text encoder, network and VAE."""
    counts["evaluations"], begun = 0, time.perf_counter()
    images = call_pipeline(pipe, row, batch, run, row.steps)
    seconds = time.perf_counter() - begun  # the pictures have come to the CPU: nothing of them still runs on a GPU
    for item, image in zip(batch, images, strict=True):
        stream = io.BytesIO()
        image.convert("RGB").save(stream, "PNG", compress_level=1)
        write_whole(run.path(row, item), stream.getvalue())
    device = run.state.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    line = {"pictures": len(batch), "seconds": seconds, "evaluations": counts["evaluations"], "device": name}
    with open(run.folder(row) / f"times-{run.state.process_index}.jsonl", "a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")


def draw_rows(run):
    """Draws what is not there yet. A batch of which a picture is missing is drawn whole: rounding depends on the size
    of the batch, and an interrupted evaluation is to end in the pictures of an uninterrupted one.
    """
    size, work = run.args.batch_size, []
    batches = [run.items[start : start + size] for start in range(0, len(run.items), size)]
    for row in run.rows:
        left = [batch for batch in batches if not all(run.path(row, item).is_file() for item in batch)]
        work.append((row, run.share(left)))
    loaded, pipe, counts = None, None, collections.Counter()
    with run.bar(sum(row.steps * len(batch) for row, mine in work for batch in mine), "step", "drawing") as bar:
        for row, mine in work:
            different = {"guidance_scale": 0, "eta": None, "stream": 0, "member": 1, "reference": None}
            source = dataclasses.replace(row, name="", steps=0, **different)  # the same pipeline draws them all
            if mine and source != loaded:
                pipe = None  # before the next one is loaded
                gc.collect()
                pipe, loaded = load_pipeline(row, run), source
                count_evaluations(pipe, counts)
            if mine:
                warm_up(pipe, row, mine[0], run)
            for batch in mine:
                bar.set_postfix_str(row.label, refresh=False)
                draw_batch(pipe, row, batch, run, counts)
                bar.update(row.steps * len(batch))


def read_times(run, rows):
    """Seconds and network evaluations a picture, and the device, over all that was timed; {} where nothing was."""
    lines = []
    for path in (path for row in rows for path in sorted(run.folder(row).glob("times-*.jsonl"))):
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # it was killed while it wrote
                lines.append(json.loads(line))
    if not lines:
        return {}
    evaluations = statistics.median(line["evaluations"] / line["pictures"] for line in lines)
    seconds = sum(line["seconds"] for line in lines) / sum(line["pictures"] for line in lines)
    return {"evaluations": evaluations, "seconds": seconds, "pictures_per_second": 1 / seconds,
            "device": ", ".join(sorted({line["device"] for line in lines}))}  # fmt: skip


# -------------------------------------------------------------------------------------------------------- networks
# Each function loads a network and returns a function of (pictures, prompts) → (batch, width). What it raises while it
# loads is the reason why its figures are left out.
def to_tensor(images):
    """PIL pictures of one size → uint8 (batch, 3, height, width)."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def load_clean_fid(device):
    """Inception features, (batch, 2048), from clean-fid's own resize to 299 × 299. It fetches the weights itself."""
    from cleanfid.features import build_feature_extractor
    from cleanfid.resize import build_resizer

    resize, model = build_resizer("clean"), build_feature_extractor("clean", device, use_dataparallel=False)

    def look(images, _prompts):
        pixels = np.stack([resize(np.asarray(image)) for image in images])
        return model(torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device))

    return look


def load_torch_fidelity(device):
    """Inception features, (batch, 2048), from torch-fidelity's own resize. It fetches the weights itself."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    model = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device)
    return lambda images, _prompts: torch.cat([model(to_tensor([image]).to(device))[0] for image in images])


def load_judge(kind, name, device):
    """A network of transformers, in float32. Weights that are missing would be random, and only a log would tell."""
    model, info = kind.from_pretrained(name, output_loading_info=True)
    if lost := sorted(info["missing_keys"]):
        raise Missing(f"{name} lacks {len(lost)} weights of a {kind.__name__}: {lost[0]}, …")
    return model.to(device, torch.float32).requires_grad_(False).eval()


def load_vision_model(name, device):
    """The pooled output of a vision model of transformers, DINOv2 for example, or CLIP's embedding: (batch, width)."""
    processor = transformers.AutoImageProcessor.from_pretrained(name)
    model = load_judge(transformers.AutoModel, name, device)
    is_clip = isinstance(model, transformers.CLIPModel)

    def look(images, _prompts):
        pixels = processor(images=images, return_tensors="pt")["pixel_values"].to(device)
        pooled = (model.vision_model if is_clip else model)(pixel_values=pixels).pooler_output
        return model.visual_projection(pooled) if is_clip else pooled

    return look


def load_vae_statistics(model, device):
    """Mean and standard deviation of every channel after each block of the VAE's encoder: (batch, 2 × channels).

    A small network that is at hand without a download. It sees sharpness, texture and colour, and little of what is in
    a picture: enough to order students of one teacher, and what the tests hold it to.
    """
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae").to(device, torch.float32).requires_grad_(False).eval()
    found = []
    for block in (*vae.encoder.down_blocks, vae.encoder.mid_block):
        block.register_forward_hook(lambda _block, _inputs, output: found.append(output.flatten(2)))

    def look(images, _prompts):
        found.clear()
        vae.encode(to_tensor(images).to(device) / 127.5 - 1)
        return torch.cat([part(-1) for values in found for part in (values.mean, values.std)], dim=1)

    return look


PICK_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # for PickScore's repository, which has none


def load_clip(name, device, prefix="", size=None, is_pick=False):
    """Cosine between picture and prompt by a CLIP of transformers; × temperature / 100 for PickScore: (batch, 1)."""
    model, source = load_judge(transformers.CLIPModel, name, device), name
    if is_pick and not find_file(name, "preprocessor_config.json"):
        source = PICK_PROCESSOR
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    processor = transformers.AutoImageProcessor.from_pretrained(source)
    length = model.config.text_config.max_position_embeddings

    def look(images, prompts):
        images = [square(image, size) for image in images] if size else images
        text = tokenizer([prefix + prompt for prompt in prompts], padding=True, truncation=True, max_length=length,
                         return_tensors="pt").to(device)  # fmt: skip
        pixels = processor(images=images, return_tensors="pt")["pixel_values"].to(device)
        output = model(input_ids=text["input_ids"], attention_mask=text["attention_mask"], pixel_values=pixels)
        cosine = (output.image_embeds * output.text_embeds).sum(-1, keepdim=True)
        return cosine * model.logit_scale.exp() / 100 if is_pick else cosine

    return look


def compare_pair(image, reference):
    """PSNR in dB, <∇picture, ∇reference> and <∇reference, ∇reference>: the ratio of the products is what a regression
    of the picture's gradients on the reference's gives, to which speckle adds nothing on average.
    """
    a, b = (np.asarray(picture, dtype=np.float32) / 255 for picture in (image, reference))
    gradients = [[np.diff(x, axis=axis) for axis in (0, 1)] for x in (a, b)]
    products = [sum((p * q).mean() for p, q in zip(own, gradients[1], strict=True)) for own in gradients]
    return [-10 * math.log10(max(np.square(a - b).mean(), 1e-10)), *products]


# ------------------------------------------------------------------------------------------------------- measuring
@dataclasses.dataclass(frozen=True)
class Look:
    """A network that looks at pictures, and the figures that come of it."""

    name: str  # of the folder of its measurements
    figures: tuple
    load: object  # returns the network
    network: str = ""  # as the user calls the network of an FD
    prepare: object = lambda image: image  # what is done to a picture before it is shown
    is_real: bool = False  # the real pictures are its reference

    def title(self, figure):
        """The heading of a column. FD and its like mean nothing without the network's name."""
        return FIGURES[figure].title + f" ({self.network})" * bool(self.network)


def list_looks(run, size):
    """The networks that the figures of the protocol need, for pictures of `size` pixels."""
    args, protocol, device, looks = run.args, run.protocol, run.state.device, []
    is_real, width = protocol.references is not None, protocol.size or size
    loaders = {"clean-fid": load_clean_fid, "torch-fidelity": load_torch_fidelity,
               "vae": lambda device: load_vae_statistics(args.teacher[0], device)}  # fmt: skip
    for network in args.features:
        load = functools.partial(loaders.get(network) or functools.partial(load_vision_model, network), device)
        # the kernel distance of the VAE's statistics orders nothing where captions are shared
        figures = tuple(f for f in ("fd", "kd") if f in protocol.figures and not (f == "kd" and network == "vae"))
        name, prepare = versioned(network), Look.prepare
        if network == "vae":
            name = f"vae-of-{versioned(args.teacher[0])}"
        if is_real:
            name, prepare = f"{name}-{width}", functools.partial(square, size=width)
        looks.append(Look(name, figures, load, network, prepare, is_real))
        if "patch_fd" in protocol.figures and network in INCEPTION:
            prepare = functools.partial(central, size=299)
            looks.append(Look(f"{safe_name(network)}-patch", ("patch_fd",), load, network, prepare, is_real))
    if "clip" in protocol.figures:
        model, options = args.clip_model or protocol.clip_model, (protocol.clip_prefix, protocol.clip_size)
        name = f"clip-{versioned(model)}-{digest_of(options)[:6]}"
        looks.append(Look(name, ("clip",), functools.partial(load_clip, model, device, *options)))
    if "pick" in protocol.figures:
        load = functools.partial(load_clip, args.pick_model, device, is_pick=True)
        looks.append(Look(f"pick-{versioned(args.pick_model)}", ("pick",), load))
    return looks


def parts(pictures, name, size):
    """The files of what a network said of a set, by the range of pictures: a batch each."""
    spans = [(start, min(start + size, len(pictures.places))) for start in range(0, len(pictures.places), size)]
    return {span: pictures.folder / name / f"{span[0]:06}-{span[1]:06}.npy" for span in spans}


def load_network(look):
    """Loads a network, or raises Missing with the reason and what helps."""
    try:
        if look.network:
            import torchmetrics  # noqa: F401
        return look.load()
    except Missing:
        raise
    except ImportError as error:
        raise Missing(f"pip install -r requirements-eval.txt ({first_line(error)})") from error
    except Exception as error:  # the hub's client, downloads and config checks raise many kinds
        raise Missing(f"it cannot be loaded; give a folder, or a network to fetch it ({first_line(error)})") from error


@torch.no_grad()
def measure(run, look, sets):
    """Shows a network all pictures of these sets that it has not seen; what it says goes to disk. Raises Missing."""
    size = run.args.batch_size
    left = [(pictures, span, path) for pictures in sets for span, path in parts(pictures, look.name, size).items()
            if not path.is_file()]  # fmt: skip
    mine = run.share(left)
    network = load_network(look) if mine else None
    with run.bar(sum(stop - start for _, (start, stop), _ in mine), "picture", look.name) as bar:
        for pictures, (start, stop), path in mine:
            loaded = {index: pictures.load(index) for index in range(start, stop)}
            loaded = {index: image for index, image in loaded.items() if image is not None}
            images, prompts = [look.prepare(image) for image in loaded.values()], None
            if pictures.prompts:
                prompts = [pictures.prompts[index] for index in loaded]
            values, stream = network(images, prompts).cpu().numpy() if images else np.zeros((0, 1)), io.BytesIO()
            np.save(stream, values)
            write_whole(path, stream.getvalue())
            bar.update(stop - start)


def measured(run, look, pictures):
    """What a network said of a set, (pictures, width) in float64. A broken picture of a reference set has no line."""
    found = [np.load(path) for path in parts(pictures, look.name, run.args.batch_size).values()]
    found = [part for part in found if len(part)]
    return np.concatenate(found).astype(np.float64) if found else fail(f"all pictures of {pictures.folder} are broken")


# ------------------------------------------------------------------------------------------------------ statistics
def bootstrap(values, statistic=lambda means: means[0], resamples=1000):
    """A statistic of column means, and its 95 % interval over prompts, from values (prompts, columns)."""
    rng, count = np.random.default_rng(0), len(values)
    drawn = [statistic(values[rng.integers(count, size=count)].mean(axis=0)) for _ in range(resamples)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"value": float(statistic(values.mean(axis=0))), "low": float(low), "high": float(high)}


def spread(single):
    """What a figure of several training seeds has besides its mean: their standard deviation (n − 1), and each."""
    return {"spread": statistics.stdev(single), "single": single} if len(single) > 1 else {}


def over_seeds(members, statistic=lambda means: means[0]):
    """A figure of one or more training seeds, from the values (prompts, columns) of each: its mean over them, the 95 %
    interval of that over prompts, and the spread. The statistic must be linear in the columns that seeds differ in.
    """
    single = [float(statistic(values.mean(axis=0))) for values in members]
    return bootstrap(np.mean(members, axis=0), statistic) | spread(single)


class Given(torch.nn.Module):
    """What torchmetrics takes for a network: the features are there already."""

    def __init__(self, width):
        super().__init__()
        self.num_features = width

    def forward(self, features):
        return features


def frechet_distance(a, b):
    """|μ_a − μ_b|² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) of features (pictures, width), by torchmetrics in float64."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(Given(a.shape[1]), sync_on_compute=False)  # one process has all features
    for features, is_reference in ((a, False), (b, True)):
        metric.update(torch.from_numpy(features), real=is_reference)
    return float(metric.compute())


def kernel_distance(a, b):
    """1000 × the unbiased squared MMD with kernel (x·y / width + 1)³ of features (pictures, width), a mean over 100
    subsets of at most 1,000, by torchmetrics (arXiv:1801.01401).
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(1000, len(a), len(b))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it keeps all features, and warns that it does
        metric = KernelInceptionDistance(Given(a.shape[1]), subsets=100, subset_size=size, sync_on_compute=False)
    for features, is_reference in ((a, False), (b, True)):
        metric.update(torch.from_numpy(features), real=is_reference)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return 1000 * float(metric.compute()[0])


def principal_components(reference, count=32):
    """A function that standardises features as the reference is, and projects them on its first principal components.

    The scales of channel statistics differ by orders of magnitude, and hundreds of them would need thousands of
    pictures for a covariance.
    """
    mean, std = reference.mean(axis=0), reference.std(axis=0) + 1e-8
    axes = np.linalg.svd((reference - mean) / std, full_matrices=False)[2][: min(count, len(reference) - 1)].T
    return lambda features: (features - mean) / std @ axes


# --------------------------------------------------------------------------------------------------------- figures
def measure_all(run):
    """Has every network look at its pictures. Returns those looks that were possible, and the reference pictures."""
    sets, sizes = [run.pictures(row) for row in run.rows], {}
    for row, pictures in zip(run.rows, sets, strict=True):
        sizes.setdefault(pictures.load(0).size, row.label)
    if len(sizes) > 1:
        described = ", ".join(f"{width}x{height} ({label})" for (width, height), label in sizes.items())
        fail(f"the rows draw pictures of several sizes: {described}; give --resolution")
    size, references = min(next(iter(sizes))), None
    if run.protocol.references is not None:
        # where a protocol has as many real pictures as prompts, they are the pictures that the prompts describe
        names = run.described if run.protocol.references == run.protocol.prompts else ()
        references = find_references(run.args.references, run.output / "references", names)
    possible = []
    for look in list_looks(run, size):
        try:
            if look.figures == ("patch_fd",) and size < 299:
                raise Missing(f"pictures of {size} pixels have no patch of 299")
            measure(run, look, [references, *sets] if look.is_real else sets)
            possible.append(look)
        except Missing as missing:
            run.left_out |= {look.title(figure): str(missing) for figure in look.figures}
    if "reward" in run.protocol.figures:
        run.left_out[FIGURES["reward"].title] = NO_REWARD
    return possible, references


def pair_figures(run, sets):
    """PSNR and edges of every line by kind of prompt, compared with its reference's pictures; {} for the first."""
    pairs = [(pictures, sets[target][0]) for line, target in zip(sets[1:], run.targets[1:], strict=True)
             for pictures in line]  # fmt: skip
    references = {id(reference): reference for _, reference in pairs}

    def compare(index):
        loaded = {key: reference.load(index) for key, reference in references.items()}
        return [compare_pair(pictures.load(index), loaded[id(reference)]) for pictures, reference in pairs]

    values = np.zeros((len(run.items), len(pairs), 3))
    with ThreadPoolExecutor() as pool, run.bar(len(run.items), "picture", "PSNR") as bar:
        for index, found in enumerate(pool.map(compare, range(len(run.items)))):
            values[index] = np.reshape(found, (-1, 3))
            bar.update()
    figures, means = [{}], iter(prompt_means(run, values[:, column]) for column in range(len(pairs)))
    for line in sets[1:]:
        members, found = [next(means) for _ in line], {}
        for kind, numbers in run.kinds.items():
            of_kind = [values[numbers] for values in members]
            edges = over_seeds(of_kind, lambda mean: mean[1] / max(mean[2], 1e-12))
            found[kind] = {"psnr": over_seeds(of_kind), "edges": edges}
        figures.append(found)
    return figures


def prompt_means(run, values):
    """(pictures, columns) → (prompts, columns): pictures of a prompt are no independent draws of prompts."""
    return values.reshape(len(run.prompts), run.args.images_per_prompt, -1).mean(axis=1)


def collect(run, looks, references):
    """All figures by line and kind of prompt ("" is all), [{kind: {column: {value, …}}}], and the columns, {title:
    figure}. Adds warnings.
    """
    sets = [[run.pictures(row) for row in line] for line in run.lines]
    columns, tables = {}, [{kind: {} for kind in run.kinds} for _ in run.lines]

    def add(titles, found):
        columns.update({title: figure for figure, title in titles.items()})
        for table, kinds in zip(tables, found, strict=True):
            for kind, figures in kinds.items():
                table[kind].update({titles[figure]: value for figure, value in figures.items()})

    if "psnr" in run.protocol.figures:
        add({figure: FIGURES[figure].title for figure in ("psnr", "edges")}, pair_figures(run, sets))
    for look in looks:
        values = [[measured(run, look, pictures) for pictures in line] for line in sets]
        if look.network:
            found = set_figures(run, look, values, references)
        else:
            found = [score_figures(run, look, line) for line in values]
        add({figure: look.title(figure) for figure in look.figures}, found)
    return tables, columns


def score_figures(run, look, members):
    """{kind: {figure: …}} of a score by picture, from the scores of each training seed."""
    means = [prompt_means(run, values * (100 if "clip" in look.figures else 1)) for values in members]
    return {kind: {look.figures[0]: over_seeds([values[numbers] for values in means])}
            for kind, numbers in run.kinds.items()}  # fmt: skip


def set_figures(run, look, values, references):
    """Distances of each line's features from those of the real pictures, or else from those of its reference, by kind
    of prompt: of a kind from the reference's pictures of it, where there are enough for the number of features.
    """
    title, found = look.title(look.figures[0]), [{} for _ in run.lines]
    if look.is_real:
        real = measured(run, look, references)
        if lost := len(references.places) - len(real):
            run.warnings.append(f"{title}: {lost} of {len(references.places)} reference pictures are broken")
    for target, numbers in run.groups().items():
        reference = real if look.is_real else values[target][0]
        project = principal_components(reference) if look.network == "vae" else lambda features: features
        reference, projected = project(reference), {n: [project(one) for one in values[n]] for n in numbers}
        for number, line in projected.items():
            found[number][""] = {figure: distance(figure, line, reference) for figure in look.figures}
        for kind, pictures in of_kinds(run, look, reference.shape[1]).items():
            for number, line in projected.items():
                pair = [features[pictures] for features in line], reference[pictures]
                found[number][kind] = {figure: distance(figure, *pair) for figure in look.figures}
        floor = next((n for n in numbers if run.lines[n][0].stream or look.is_real), None)
        check_stability(run, look, reference, None if floor is None else projected[floor][0], floor)
    return found


def of_kinds(run, look, width):
    """{kind: numbers of its pictures} of the kinds of prompt that have pictures enough for so many features. Real
    pictures are of no kind.
    """
    if look.is_real:
        return {}
    count = run.args.images_per_prompt
    pictures = {kind: (numbers[:, None] * count + np.arange(count)).ravel() for kind, numbers in run.kinds.items()}
    return {kind: numbers for kind, numbers in pictures.items() if kind and len(numbers) > 2 * width}


DISTANCES = {"fd": frechet_distance, "patch_fd": frechet_distance, "kd": kernel_distance}


def distance(figure, members, reference):
    """The distance of the features of each training seed from the reference's, and the number of pictures."""
    single = [DISTANCES[figure](features, reference) for features in members]
    return {"value": statistics.fmean(single), "pictures": len(members[0])} | spread(single)


def check_stability(run, look, reference, features, number):
    """Warns where an FD tells more of the number of pictures than of the pictures: where there are few for their
    covariance, or half of a row's pictures read otherwise than all. That row is the floor, or the first one.
    """
    title, width = look.title(look.figures[0]), reference.shape[1]
    if (fewest := min(len(run.items), len(reference))) <= 2 * width:
        warning = (f"{title}: {fewest} pictures are too few for {width} features: it is biased upwards and not stable; "
                   f"draw more than {2 * width}")  # fmt: skip
        run.warnings += [warning] * (warning not in run.warnings)
    if features is not None and len(features) >= 4:
        half, whole = frechet_distance(features[::2], reference[::2]), frechet_distance(features, reference)
        if abs(half - whole) > 0.1 * whole:
            numbers = f"{run.lines[number][0].label}, reads {whole:.3g}, and {half:.3g} with half as many"
            run.warnings.append(f"{title} depends on the number of pictures: {numbers}; compare equal numbers only")


# ---------------------------------------------------------------------------------------------------------- report
ARROWS = {"higher": "↑", "lower": "↓", "nearer to 1": "→ 1"}
LIBRARIES = "torch diffusers transformers accelerate peft torchmetrics clean-fid torch-fidelity numpy pillow".split()


def show(found, figure):
    """A figure for the table, with its spread over training seeds and its interval over prompts."""
    if found is None:
        return "–"
    value, *others = (f"{found[key]:.{FIGURES[figure].digits}f}" if key in found else ""
                      for key in ("value", "spread", "low", "high"))  # fmt: skip
    return "{}{}{}".format(value, others[0] and f" ± {others[0]}", others[1] and f" ({others[1]} … {others[2]})")


def title_of(line):
    """The name of a line of the tables, with the number of training seeds where there are several."""
    return line[0].title + f" ({len(line)} training seeds)" * (len(line) > 1)


def label_of(line):
    return line[0].label.replace(line[0].title, title_of(line), 1)


def heading(title, figure, pictures):
    """The head of a column: which way is better, and the number of pictures of a figure that depends on it."""
    is_distance = FIGURES[figure].title in ("FD", "patch FD", "KD × 1000")
    return f"{title} {ARROWS[FIGURES[figure].better]}" + f", n = {pictures:,}" * is_distance


def markdown_table(head, lines):
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *lines])


def make_report(run, tables, columns):
    """Everything that the report says, as it stands in report.json."""
    rows, versions = [], {}
    for line, figures in zip(run.lines, tables, strict=True):
        row = {key: value for key, value in dataclasses.asdict(line[0]).items() if value not in (None, ())}
        row |= {key: [getattr(each, key) for each in line] for key in ("model", "lora") if len(line) > 1 and key in row}
        del row["member"]
        row |= {"label": line[0].label, "figures": figures[""], "speed": read_times(run, line)}
        rows.append(
            row | ({"kinds": {kind: each for kind, each in figures.items() if kind}} if len(figures) > 1 else {})
        )
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    arguments = {key: value for key, value in vars(run.args).items() if value is not False and value not in (None, [])}
    return {"protocol": run.args.protocol, "prompts": len(run.prompts), "seed": run.args.seed, "dtype": run.dtype,
            "columns": columns, "rows": rows, "warnings": run.warnings, "left_out": run.left_out,
            "versions": versions, "arguments": arguments}  # fmt: skip


def published(run, columns):
    """The published figures of the same protocol, or why there are none."""
    protocol = run.protocol
    if protocol.references is None and not any(name in title for title in columns for name in INCEPTION):
        return "None beside these: they are of Inception features (`--features clean-fid`)."
    if protocol.prompts not in (None, len(run.prompts)):
        return (f"Left out: they are of {protocol.prompts:,} prompts, here are {len(run.prompts):,}, and a Fréchet "
                "distance depends on the number.")  # fmt: skip
    shown = list(dict.fromkeys(key for _, _, values in protocol.published for key in values))
    lines = [[name, steps or "–", *(f"{values[key]:g}" if key in values else "–" for key in shown)]
             for name, steps, values in protocol.published]  # fmt: skip
    table = markdown_table(["model", "steps", *(FIGURES[key].title for key in shown)], lines)
    return f"{table}\n\nSource: {protocol.source}. Their prompts and noise are not these."


def figure_tables(run, report):
    """A table for each reference: it, and the lines that are compared with it."""
    columns, tables = report["columns"], []
    head = ["model", "steps", "network evaluations", "guidance", "eta"]
    head += [heading(title, figure, len(run.items)) for title, figure in columns.items()]
    for target, numbers in run.groups().items():
        lines = []
        for number in [target] * (target is not None) + numbers:
            row, found = run.lines[number][0], report["rows"][number]
            figures = found["figures"] if number in numbers else {}
            cells = [f"{row.guidance_scale:g}", "–" if row.eta is None else f"{row.eta:g}"]
            cells += [show(figures.get(title), figure) for title, figure in columns.items()]
            lines.append([title_of(run.lines[number]), row.steps, evaluations_of(found), *cells])
        tables.append(f"{describe_reference(run, target, numbers)}\n\n{markdown_table(head, lines)}")
    return "\n\n".join(tables)


def kind_tables(run, report):
    """For each figure a table with the kinds of prompt in columns, ordered by network evaluations."""
    kinds, count = [kind for kind in run.kinds if kind], run.args.images_per_prompt
    head = ["evaluations", "model", *(f"{kind}, n = {len(run.kinds[kind]) * count:,}" for kind in kinds)]
    text = """## By kind of prompt

The kinds are the sources of `--prompts`, n is the number of pictures, and rows are ordered by network evaluations.
A distance is there for kinds with more pictures than twice the number of features."""
    for target, title in itertools.product(run.groups(), report["columns"]):
        lines = []
        for number in run.groups()[target]:
            row, name = report["rows"][number], label_of(run.lines[number])
            cells = [show(row["kinds"][kind].get(title), report["columns"][title]) for kind in kinds]
            if set(cells) != {"–"}:
                lines.append([row["speed"].get("evaluations", math.inf), [evaluations_of(row), name, *cells]])
        lines = [cells for _, cells in sorted(lines, key=lambda line: line[0])]
        figure = FIGURES[report["columns"][title]]
        about = f"{title} {ARROWS[figure.better]}" + ("" if target is None else f", to *{run.lines[target][0].label}*")
        text += f"\n\n### {about}\n\n{markdown_table(head, lines)}" if lines else ""
    return f"\n{text}\n" if kinds else ""


def evaluations_of(found):
    return f"{found['speed']['evaluations']:g}" if found["speed"].get("evaluations") else "–"


def describe_reference(run, target, numbers):
    """What the figures of these lines are compared with."""
    if run.protocol.references is not None:
        return f"The reference: the real pictures of `{' '.join(run.args.references)}`."
    floors = [f"; *{run.lines[number][0].label}* is the floor" for number in numbers if run.lines[number][0].stream]
    return f"The reference: the pictures of *{run.lines[target][0].label}*{''.join(floors)}."


def speed_table(run, report):
    lines = []
    for line, found in zip(run.lines, report["rows"], strict=True):
        if times := found["speed"]:
            numbers = (f"{times[key]:.3g}" for key in ("pictures_per_second", "seconds"))
            lines.append([title_of(line), line[0].steps, *numbers, f"{times['device']}, {run.dtype}"])
    return markdown_table(["model", "steps", "pictures/s", "s a picture", "device, precision"], lines)


def write_markdown(run, report):
    """report.md: for a reader who has nothing else."""
    seeds = "A row of several training seeds shows their mean ± standard deviation (n − 1). " * (
        len(run.lines) < len(run.rows)
    )
    notes = [f"**{title}**, {FIGURES[figure].better} is better: {FIGURES[figure].meaning}."
             for title, figure in report["columns"].items()]  # fmt: skip
    notes += [f"**Warning.** {warning}." for warning in report["warnings"]]
    notes += [f"**{title}** is left out: {reason}." for title, reason in report["left_out"].items()]
    text = f"""# Evaluation by protocol `{report["protocol"]}`

{run.protocol.about[0].upper() + run.protocol.about[1:]}.
{len(run.prompts):,} prompts × {run.args.images_per_prompt} = {len(run.items):,} pictures a row, of the same prompts and noise in all rows, seed {report["seed"]}, {report["dtype"]}.

{figure_tables(run, report)}

{seeds}In brackets the 95 % interval by bootstrap over prompts; a difference between two rows is surer than that, for their prompts and noise
are the same. Network evaluations are counted, for a picture: guidance doubles them.

{chr(10).join(f"- {note}" for note in notes)}

![Pictures of the same noise](grid.png)

![Figures against network evaluations](quality.png)
{kind_tables(run, report)}
## Published figures of this protocol

{published(run, report["columns"])}

## Speed

{speed_table(run, report)}

Warm, in batches of up to {run.args.batch_size}, on one device; with text encoder and VAE.

## How it was made

{", ".join(f"{name} {version}" for name, version in report["versions"].items())}

```json
{json.dumps(report["arguments"], ensure_ascii=False)}
```
"""  # noqa: E501
    write_whole(run.output / "report.md", text.encode())


def draw_grid(run, report):
    """grid.png: the lines of the tables one below the other, prompts of all kinds side by side, the same noise. Of
    several training seeds it shows the first.
    """
    left, top, gap, font = 176, 76, 4, ImageFont.load_default(13)
    groups, wanted = run.groups(), run.args.grid_steps
    order = dict.fromkeys(n for target, numbers in groups.items() for n in [target, *numbers] if n is not None)
    shown = [number for number in order if not run.lines[number][0].stream]
    shown = [number for number in shown if not wanted or number in groups or run.lines[number][0].steps in wanted]
    kinds = [numbers for kind, numbers in run.kinds.items() if kind] or [run.kinds[""]]
    mixed = [number for numbers in itertools.zip_longest(*kinds) for number in numbers if number is not None]
    prompts = sorted(mixed[: run.args.grid_prompts])
    cell = min(max(Image.open(run.path(run.rows[0], (0, 0))).width, 128), 256)
    grid = Image.new("RGB", (left + len(prompts) * (cell + gap), top + len(shown) * (cell + gap)), "white")
    pen = ImageDraw.Draw(grid)
    for x, prompt in enumerate(prompts):
        text = textwrap.fill(run.prompts[prompt], cell // 7, max_lines=4, placeholder=" …")
        pen.multiline_text((left + x * (cell + gap), gap), text, "black", font)
    for y, number in enumerate(shown):
        row, height = run.lines[number][0], top + y * (cell + gap)
        text = textwrap.fill(row.title, 23) + f"\n{row.label.removeprefix(row.title + ', ')}"
        count = evaluations_of(report["rows"][number])
        pen.multiline_text((gap, height), text + f", {count} evaluation{'s' * (count != '1')}", "black", font)
        for x, prompt in enumerate(prompts):
            image = ImageOps.contain(Image.open(run.path(row, (prompt, 0))), (cell, cell))
            grid.paste(image, (left + x * (cell + gap), height))
    grid.save(run.output / "grid.png")


COLOURS = ("#222222", "#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#bcbd22",
           "#7f7f7f", "#00c000")  # fmt: skip


def find_ticks(low, high, is_log):
    """Round numbers between these two, some four of them."""
    if is_log:
        numbers = [digit * 10.0**power for power in range(-6, 9) for digit in (1, 2, 5)]
    else:
        step = 10 ** math.floor(math.log10((high - low) / 3))
        step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) < 6)
        numbers = np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step
    return [number for number in numbers if low <= number <= high]


def draw_panel(pen, box, panel, font):
    """A figure against network evaluations, these on a logarithmic axis."""
    (left, top, right, bottom), (title, lines, floor, is_log) = box, panel
    xs, ys = zip(*((x, y) for points in lines.values() for x, y, _ in points), strict=True)
    ys += () if floor is None else (floor,)
    low, high = min(ys), max(ys) if max(ys) > min(ys) else min(ys) + 1
    is_log = is_log and low > 1e-3 * high  # the same pictures are at zero
    low, high = (low / 1.1, high * 1.1) if is_log else (low - (high - low) / 20, high + (high - low) / 20)
    scale = math.log if is_log else float

    def place(x, y):
        across = math.log2(x / min(xs)) / (math.log2(max(xs) / min(xs)) or 1)
        up = (scale(min(max(y, low), high)) - scale(low)) / (scale(high) - scale(low))
        return left + across * (right - left), bottom - up * (bottom - top)

    pen.multiline_text((left, top - 30), title, "black", font, anchor="ld", spacing=8)
    pen.text(((left + right) / 2, bottom + 50), "network evaluations a picture", "black", font, anchor="mt")
    for y in find_ticks(low, high, is_log):
        pen.line([place(min(xs), y), (right, place(min(xs), y)[1])], "#cccccc", 2)
        pen.text((left - 16, place(min(xs), y)[1]), f"{y:.5g}", "black", font, anchor="rm")
    for x in sorted(set(xs)):
        pen.text((place(x, low)[0], bottom + 10), f"{x:g}", "black", font, anchor="mt")
    for x in np.arange(left, right, 24) if floor is not None else ():
        pen.line([(x, place(1, floor)[1]), (x + 12, place(1, floor)[1])], "#222222", 3)
    for colour, points in lines.items():
        pen.line([place(x, y) for x, y, _ in sorted(points)], colour, 4)
        for x, y, deviation in points:
            across, height = place(x, y)
            pen.line([place(x, y - deviation), place(x, y + deviation)], colour, 4)
            pen.ellipse([across - 7, height - 7, across + 7, height + 7], colour)


def find_panels(run, report, colours):
    """[[(title, {colour: [(evaluations, value, spread), …]}, the floor's value or None, whether its axis may be
    logarithmic) of each figure] of each reference].
    """
    found = []
    for target, numbers in run.groups().items():
        panels, to = [], "" if target is None else f"to {run.lines[target][0].label}; "
        for title, figure in report["columns"].items():
            lines, floor = collections.defaultdict(list), None
            for row in (report["rows"][number] for number in numbers):
                value = row["figures"].get(title, {})
                if row["stream"] and value:
                    floor = value["value"]
                elif row["speed"].get("evaluations") and value:
                    point = row["speed"]["evaluations"], value["value"], value.get("spread", 0)
                    lines[colours[row["name"]]].append(point)
            if lines:
                panels.append((f"{title}\n{to}{FIGURES[figure].better} is better", lines, floor, figure.endswith("fd")))
        found += [panels] if panels else []
    return found


def draw_quality(run, report):
    """quality.png: a panel for each figure, with one line a model; below each other where references differ."""
    names = dict.fromkeys(row["name"] for row in report["rows"] if not row["stream"])
    colours = dict(zip(names, COLOURS * len(names), strict=False))
    found = find_panels(run, report, colours)
    width, height, font = 1000, 760, ImageFont.load_default(26)  # twice the size it is saved in
    columns, below = max(map(len, found), default=1), height * len(found)
    entries = [*colours.items(), ("dashed: the reference with other noise", None)]
    canvas = Image.new("RGB", (width * columns, below + 44 * math.ceil(len(entries) / columns) + 30), "white")
    pen = ImageDraw.Draw(canvas)
    for y, panels in enumerate(found):
        for x, panel in enumerate(panels):
            box = (width * x + 150, height * y + 130, width * (x + 1) - 60, height * (y + 1) - 130)
            draw_panel(pen, box, panel, font)
    for index, (name, colour) in enumerate(entries):
        x, y = width * (index % columns) + 150, below + 44 * (index // columns)
        if colour:
            pen.line([(x, y + 16), (x + 80, y + 16)], colour, 4)
        pen.text((x + 100 * bool(colour), y), name, "black", font)
    canvas.resize((canvas.width // 2, canvas.height // 2), Image.Resampling.LANCZOS).save(run.output / "quality.png")


def write_report(run, looks, references):
    """Writes report.md, report.json, grid.png and quality.png, and prints the table."""
    wanted, there = run.protocol.prompts, len(run.prompts)
    if wanted not in (None, there):
        run.warnings.append(f"the protocol has {wanted:,} prompts, here are {there:,}: its figures are no yardstick")
    wanted, there = run.protocol.references, len(references.places) if references else None
    if wanted != there:
        run.warnings.append(f"the protocol has {wanted:,} real pictures, here are {there:,}")
    tables, columns = collect(run, looks, references)
    report = make_report(run, tables, columns)
    write_whole(run.output / "report.json", report)
    write_markdown(run, report)
    draw_grid(run, report)
    draw_quality(run, report)
    width = max(len(label_of(line)) for line in run.lines)
    print(" " * width + "".join(f"  {title:>28}" for title in columns))
    for line, kinds in zip(run.lines, tables, strict=True):
        cells = (show(kinds[""].get(title), figure) for title, figure in columns.items())
        print(f"{label_of(line):{width}}" + "".join(f"  {cell:>28}" for cell in cells))
    for line in [*run.warnings, *(f"{title} is left out: {reason}" for title, reason in run.left_out.items())]:
        print(line)
    print(f"{run.output / 'report.md'}: {len(run.lines)} rows of {len(run.items):,} pictures")


# ------------------------------------------------------------------------------------------------------------ main
def main(argv=None):
    args = parse_args(argv)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, and the same pictures come of any device
    run = Evaluation(args)
    try:
        if run.state.is_main_process:
            begin(run)
        run.state.wait_for_everyone()
        draw_rows(run)
        run.state.wait_for_everyone()
        looks, references = measure_all(run)
        run.state.wait_for_everyone()
        if run.state.is_main_process:
            write_report(run, looks, references)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on from what is done") from None
    except torch.OutOfMemoryError:
        fail(f"out of device memory: a --batch_size below {args.batch_size} goes on from what is done")


if __name__ == "__main__":
    main()
