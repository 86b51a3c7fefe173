#!/usr/bin/env python
# Copyright 2026 the authors of this repository. Licensed under the Apache License, Version 2.0.
"""Trajectory Consistency Distillation of Stable Diffusion 1.x, 2.x and XL (Zheng et al., arXiv:2402.19159).

A student U-Net learns to jump from any point of the teacher's guided probability-flow trajectory to any later one, so
that one to eight steps are enough, and more of them come closer to the teacher. With x_t = α_t x_0 + σ_t ε on the grid
τ_i = (i+1)·(T//N) − 1, i = 0 … N−1, and prev(τ_i) = τ_{i−1} (0 below the grid):

    i ~ U{0 … N−1},  m ~ U{0 … i},  w ~ U[w_min, w_max],  ε ~ N(0, I),  t = τ_i,  s = prev(τ_m)
    x̂_0, ε̂  = teacher(x_t, c) + w·(teacher(x_t, c) − teacher(x_t, ∅))        both guided
    x̂_prev  = α_prev x̂_0 + σ_prev ε̂                                         one DDIM step of the teacher, to prev(t)
    loss    = d(f_θ(x_t, w, c, t → s), f_θ⁻(x̂_prev, w, c, prev(t) → s))       d: l2 or Huber, θ⁻: EMA of θ
    f(x, t → s) = α_s x̂_0(x, t) + σ_s ε̂(x, t)                                target where s = prev(t): x̂_prev itself

The jump is the paper's first-order exponential integrator, (σ_s/σ_t) x − α_s (e^(−h) − 1) x̂_0 with h = λ_s − λ_t and
λ = log(α/σ), without its logarithms. The whole U-Net is trained, and is given w as an embedding: `guidance_scale` of a
diffusers pipeline is w + 1. With --lora_rank a LoRA is trained, which learns the mean over w. Launch with

    accelerate launch train_tcd_distill_sd_wds.py \
        --pretrained_teacher_model=stable-diffusion-v1-5/stable-diffusion-v1-5 \
        --train_shards_path_or_url="cc12m/{00000..01242}.tar" --max_train_steps=10000 \
        --train_batch_size=24 --mixed_precision=bf16 --gradient_checkpointing --output_dir=tcd-sd15

With --w_min=0 --w_max=0 --proportion_empty_prompts=0.1 no guidance is distilled, and no w embedded: guidance (1 to 7.5)
and negative prompts stay with the student's user, at two evaluations a step (as in PCM, arXiv:2405.18407).

`output_dir` then holds a pipeline with a matching TCDScheduler, or a LoRA for diffusers, ComfyUI and A1111.
`fidelity/*` in metrics.jsonl tells early whether the student follows its teacher. A run that was stopped goes on with
`--resume_from_checkpoint=latest`, and ends in the very weights of a run that was not (on a GPU with
--deterministic).

The method ends at the banner "the engine"; below it all six scripts are the same.
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import glob
import hashlib
import importlib.util
import inspect
import io
import itertools
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
import sys
import tarfile
import tempfile
import textwrap
import time
import traceback
import urllib.parse
import warnings
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

logging.disable(logging.WARNING)  # at import, libraries tell of packages that they miss and no run here needs

import diffusers
import numpy as np
import psutil
import torch
import torch._inductor.config
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    LoggerType,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from diffusers import (
    AutoencoderKL,
    BitsAndBytesConfig,
    DDPMScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    TCDScheduler,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.optimization import get_scheduler
from diffusers.utils import convert_unet_state_dict_to_peft
from huggingface_hub import ModelCard, create_repo, snapshot_download, upload_folder
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, load_file, save, save_file
from tqdm.auto import tqdm
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection
from webdataset.gopen import Pipe, gopen
from webdataset.shardlists import expand_urls
from webdataset.tariterators import group_by_keys

logging.disable(logging.NOTSET)


# ----------------------------------------------------------------------------------- mathematics that all six share
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


def guided_output(net, x_t, t, c, w, uncond):
    """A network's output under classifier-free guidance: cond + w·(cond − uncond), in one batch of two halves.

    c is a dict of tensors (batch, …), `uncond` one of (1, …); what it lacks, such as sizes, is the images' own. With
    `uncond` None (w = 0, or a network that embeds w itself) the unconditional half is not run.
    """
    if uncond is None:
        return net(x_t, t, c, w)
    c_twice = {name: torch.cat([value, uncond.get(name, value).expand_as(value)]) for name, value in c.items()}
    cond, without = net(torch.cat([x_t, x_t]), torch.cat([t, t]), c_twice, None).chunk(2)
    return cond + w.view(-1, 1, 1, 1) * (cond - without)


def guided_prediction(teacher, schedule, x_t, t, c, uncond, w):
    """The teacher's (x̂_0, ε̂), both guided (LCM §4.3), since both are linear in the output that is."""
    return schedule.x0_eps(guided_output(teacher, x_t, t, c, w, uncond), x_t, t)


def distance(a, b, loss_type, c):
    """d(a, b) of each sample, (batch,), in float32: the mean square, or the mean of Huber's sqrt(d² + c²) − c, or for
    pseudo_huber sqrt(‖d‖² + c²) − c of the sample's norm (iCT §3.3).
    """
    square = ((a.float() - b.float()) ** 2).flatten(1)
    if loss_type == "pseudo_huber":
        square = square.sum(dim=1, keepdim=True)
    if loss_type != "l2":  # which is the same without the cancellation: 0 for equal samples on any processor
        square = square / ((square + c**2).sqrt() + c)
    return square.mean(dim=1)


# ------------------------------------------------------------------------------------------------------- the method
METHOD = SimpleNamespace(name="trajectory consistency", papers="arXiv:2402.19159",
                         tag="trajectory-consistency-distillation", scheduler=TCDScheduler, has_teacher=True,
                         target_drops=False)  # fmt: skip
DEFAULTS = {"output_dir": "tcd-distilled", "tracker_project_name": "tcd-distill", "resolution": 512, "lora_rank": 0,
            "num_ddim_timesteps": 50, "ema_decay": 0.95}  # fmt: skip


def add_method_args(parser):
    add = parser.add_argument_group("trajectory consistency distillation").add_argument
    add("--w_min", type=number(float, 0), default=5.0, help="lowest guidance weight (w = guidance_scale - 1)")
    add("--w_max", type=number(float, 0), default=15.0, help="highest guidance weight; 0: no unconditional pass")
    add("--loss_type", default="l2", choices=["l2", "huber"], help="distance d")
    add("--huber_c", type=number(float, 1e-8), default=0.001, help="c in sqrt(d² + c²) − c")
    add("--validation_eta", type=number(float, 0, 1), default=0.0, help="γ of the pictures: noise added between steps")
    add("--unet_time_cond_proj_dim", type=number(int, 4), default=256, help="width of embedded w (whole U-Net, w > 0)")


def check_method_args(parser, args):
    """Checks the method's arguments."""
    if args.w_min > args.w_max:
        parser.error(f"--w_min {args.w_min} is above --w_max {args.w_max}")


@dataclasses.dataclass
class Draws:
    """All randomness of a step: noise ε (like the latents), grid indices i and m, guidance weight w, each (batch,)."""

    eps: torch.Tensor
    index: torch.Tensor
    end: torch.Tensor
    w: torch.Tensor


def draw(x_0, schedule, args, generator, _step):
    """Makes the random draws of a step."""
    batch, device = x_0.shape[0], x_0.device
    eps = torch.randn(x_0.shape, generator=generator, device=device)
    index = torch.randint(len(schedule.grid), (batch,), generator=generator, device=device)
    end = (torch.rand(batch, generator=generator, device=device) * (index + 1)).long()
    w = args.w_min + (args.w_max - args.w_min) * torch.rand(batch, generator=generator, device=device)
    return Draws(eps, index, end, w)


def drawn_times(draws, schedule):
    """The time t of each sample, (batch,)."""
    return schedule.grid[draws.index]


def trajectory_function(net, schedule, x_t, t, s, c, w):
    """f(x_t, w, c, t → s) = α_s x̂_0 + σ_s ε̂: where the network sees the trajectory through x_t at the time s."""
    return schedule.jump(*schedule.x0_eps(net(x_t, t, c, w), x_t, t), s)


def consistency_loss(student, target, teacher, schedule, x_0, c, uncond, draws, args):
    """Trajectory consistency distillation, arXiv:2402.19159: a pure function of networks, data and draws.

    x_0: latents (batch, channels, height/8, width/8); c: conditioning, a dict of tensors (batch, …); uncond: that of
    one empty prompt, or None. Returns the loss of each sample, (batch,).
    """
    t, t_prev, s = schedule.grid[draws.index], schedule.prev[draws.index], schedule.prev[draws.end]
    f = functools.partial(trajectory_function, schedule=schedule, s=s, c=c, w=draws.w)
    x_t = schedule.jump(x_0, draws.eps, t)
    with torch.no_grad():  # before the student, so that these activations are gone when its graph is built
        x0_hat, eps_hat = guided_prediction(teacher, schedule, x_t, t, c, uncond, draws.w)
        x_prev = schedule.jump(x0_hat, eps_hat, t_prev)  # one solver step
        is_there = (s == t_prev).view(-1, 1, 1, 1)  # nothing is left to jump over
        f_target = torch.where(is_there, x_prev, f(target, x_t=x_prev, t=t_prev))
    return distance(f(student, x_t=x_t, t=t), f_target, args.loss_type, args.huber_c)


def predict_x0(net, schedule, x_t, t, c, w, args):  # noqa: ARG001
    """The student's estimate of x_0, in validation."""
    return schedule.x0_eps(net(x_t, t, c, w), x_t, t)[0]


def scheduler_options(args):
    """The settings of METHOD.scheduler, which is exported with the teacher's noise schedule."""
    return {"original_inference_steps": args.num_ddim_timesteps}


def sample_options(args):
    """Further arguments of that scheduler's `step`, in validation: eta is γ of the paper."""
    return {"eta": args.validation_eta}


def usage(args, embeds_w):
    """For the model card: the arguments of the pipeline's call, and what there is to say about them."""
    trained = (
        f"guidance scales from {args.w_min + 1:g} to {args.w_max + 1:g}" if args.w_max else "a teacher without guidance"
    )
    if embeds_w:
        call = f"num_inference_steps=4, guidance_scale={args.validation_guidance_scale:g}, eta=0.3"
        return call, f"It was trained on {trained}, and is told which to use; negative prompts have no effect."
    call = f"num_inference_steps=4, guidance_scale={args.validation_student_guidance_scale:g}, eta=0.3"
    words = OWN_GUIDANCE if is_guided_by_user(args) else f"It was trained on {trained}, and is used without guidance."
    return call, words


def extra_validation(_run, _images):
    """Figures that this method alone has: none."""
    return {}


# ====================================================================================================== the engine
# From here to the last line all six scripts are the same to the byte (tools/copies.py sees to it). Who came for the
# method need not read on. This is what the engine asks of it:
#
#   METHOD                name, papers and tag for the model card; scheduler: the class that is exported; has_teacher:
#                         whether the loss takes one; target_drops: whether dropout masks the target's pass too
#   DEFAULTS              of the engine's flags
#   add_method_args       its own flags. The engine knows some of them: of a method with a teacher w_min and w_max (0:
#   check_method_args     no unconditional pass), and where they are there unet_time_cond_proj_dim (a whole U-Net is
#                         told w), from_scratch and dropout
#   draw                  all randomness of a step, as Draws
#   drawn_times           the time t of each sample that was drawn
#   consistency_loss      of each sample: a pure function of networks, latents, conditioning and draws
#   predict_x0            the student's estimate of x_0: validation samples with it
#   scheduler_options     settings of METHOD.scheduler
#   sample_options        further arguments of its step, in validation (eta)
#   usage                 the call that the model card shows; is_guided_by_user, below, says whose the guidance is
#   extra_validation      figures of its own, asked on all ranks: those of rank 0 are logged
#
# Its sections: a step and the loop · networks (all that knows model families) · encoding · data · checkpoints and
# export · validation and logging · arguments · main.
logger = logging.getLogger("train")
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# what is trained: `average`, which is validated and exported, is the target without --export_ema_decay, and that is the
# student without --ema_decay
NETWORKS = ("student", "target", "average")
# what these say of dropped tensors, check_tensors and load_adapter say; the others of their lines are of no use
QUIET = ("diffusers.models.modeling_utils", "diffusers.loaders.lora_base", "transformers.modeling_utils",
         "transformers.distributed.tensor_parallel")  # fmt: skip


def fail(message):
    """Ends the process with one line that says what to do, instead of a traceback."""
    raise SystemExit(f"error: {message}")


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


# ----------------------------------------------------------------------------------------------- a step and the loop
COUNTERS = ("step", "nonfinite_steps", "nonfinite_in_a_row", "skipped_steps")


@dataclasses.dataclass
class Run:
    """Everything a training step touches."""

    args: argparse.Namespace
    accelerator: Accelerator
    models: SimpleNamespace  # of load_models
    nets: dict  # Denoisers: student, target and, where there are such, average and teacher
    optimizer: object  # accelerate's wrapper
    lr_scheduler: object
    reader: object  # BatchReader
    uncond: dict | None  # conditioning of the empty prompt, for the teacher's guidance
    empty: dict  # with encoded shards, that of an empty caption
    step: int = 0
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0
    skipped_steps: int = 0  # by the gradient scaler of fp16
    stop_signal: int = 0
    host_group: object = None  # of all ranks, over gloo: cards that wait in it do not spin
    history: list = dataclasses.field(default_factory=list)  # of the steps since the last log, as train_step appends
    references: dict = dataclasses.field(default_factory=dict)  # by size: Sampler and pictures of validate_size


def step_generator(run, micro_step):
    """Seeds PyTorch, and gives a generator for the draws of this micro-step: pure functions of (seed, step, rank)."""
    name = f"{run.args.seed}/{run.step}/{micro_step}/{run.accelerator.process_index}"
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
    torch.manual_seed(seed)  # for dropout, where a model has any
    return torch.Generator(run.accelerator.device).manual_seed(seed)


def train_step(run):
    """One optimizer step over --gradient_accumulation_steps micro-batches, then the averages of the weights."""
    args, accelerator, models, nets = run.args, run.accelerator, run.models, run.nets
    loss_sum, bins = torch.zeros((), device=accelerator.device), args.log_loss_bins
    loss_bins = torch.zeros(2, bins, device=accelerator.device)  # sums and counts
    for micro_step in range(args.gradient_accumulation_steps):
        batch, generator = run.reader.next_batch(), step_generator(run, micro_step)
        nets["target"].fetch(accelerator.device)  # beside the VAE's and the teacher's passes
        with accelerator.accumulate(nets["student"].unet):
            x_0, c = encode_batch(run, batch, generator)
            draws = draw(x_0, models.schedule, args, generator, run.step)
            loss = consistency_loss(student=nets["student"], target=nets["target"], teacher=nets.get("teacher"),
                                    schedule=models.schedule, x_0=x_0, c=c, uncond=run.uncond, draws=draws,
                                    args=args)  # fmt: skip
            if bins:
                loss_bins += sum_by_time(loss.detach(), drawn_times(draws, models.schedule), models.schedule, bins)
            loss = loss.mean()
            accelerator.backward(loss)
            loss_sum += loss.detach() / args.gradient_accumulation_steps
    grad_norm = accelerator.clip_grad_norm_(models.student_parameters, args.max_grad_norm or math.inf)
    rejoin()  # an average without a pass of its own may still read the weights that change now
    optimizer_step(run, grad_norm)
    update_averages(models, args)
    run.history.append(torch.cat([torch.stack([loss_sum, grad_norm]), loss_bins.flatten()]))


def sum_by_time(losses, t, schedule, bins):
    """Sums and counts of the losses, (batch,), in each of as many equal bins of the time: (2, bins), on the device."""
    is_in = (t * bins // schedule.num_train_timesteps)[:, None] == torch.arange(bins, device=t.device)
    return torch.stack([torch.where(is_in, losses[:, None], 0).sum(dim=0), is_in.sum(dim=0)])


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


@torch.no_grad()
def update_averages(models, args):
    """θ⁻ ← μ θ⁻ + (1 − μ) θ, and so for the average that is exported, with a μ of its own: all weights at once,
    or layer by layer where averages are kept on the CPU.
    """
    for name, decay in {"target": args.ema_decay, "average": args.export_ema_decay}.items():
        if not decay:  # it is another of the networks
            continue
        averages = getattr(models, f"{name}_parameters")
        if not args.offload_ema:
            torch._foreach_lerp_(averages, models.student_parameters, 1 - decay)
            continue
        with aside():
            for average, student in zip(averages, models.student_parameters, strict=True):
                moved = average.to(student.device, non_blocking=True).lerp_(student, 1 - decay)
                average.copy_(moved, non_blocking=True)


@functools.cache
def second_stream():
    """That of a GPU for copies beside its computations, in their own order; None where none is in use."""
    return torch.cuda.Stream() if torch.cuda.is_initialized() else None


@contextlib.contextmanager
def aside():
    """Puts what the GPU is given on its second stream, after all that it was given before."""
    if stream := second_stream():
        stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield


def rejoin(host=False):
    """What the GPU is given next, or what the `host` does next, comes after all that was put aside."""
    if stream := second_stream():
        stream.synchronize() if host else torch.cuda.current_stream().wait_stream(stream)


def train(run):
    """The loop: steps, logs, checkpoints and validations until --max_train_steps or a signal."""
    args, accelerator = run.args, run.accelerator
    progress = tqdm(total=args.max_train_steps, initial=run.step, disable=not accelerator.is_local_main_process,
                    desc="Steps", unit="step", dynamic_ncols=True)  # fmt: skip

    def is_due(step):
        return args.validation_steps and (step % args.validation_steps == 0 or step == args.max_train_steps)

    lost = not Path(args.output_dir, "validation", f"step-{run.step}.png").exists()  # a stop may come before it
    if is_due(run.step) and (run.step == 0 or broadcast_object_list([lost])[0]):
        validate(run)
    clock = {"time": time.perf_counter(), "step": run.step}
    while run.step < args.max_train_steps:
        train_step(run)
        run.step += 1
        progress.update()
        is_last = run.step == args.max_train_steps
        if run.step % args.logging_steps == 0 or is_last:
            log_metrics(run, clock, progress)
        stop, paused = wait_for_all(run), time.perf_counter()
        if stop or (args.checkpointing_steps and (run.step % args.checkpointing_steps == 0 or is_last)):
            save_checkpoint(run)
        if stop:
            progress.close()
            accelerator.end_training()  # all ranks are here: this is no error, after which one leaves alone
            logger.warning("Stopped by signal %d; go on with --resume_from_checkpoint latest", stop)
            raise SystemExit(128 + stop)
        if is_due(run.step):
            validate(run)
        clock["time"] += time.perf_counter() - paused
    progress.close()


def wait_for_all(run):
    """Waits for all ranks, on the host, not for the device; returns a signal to any of them, or 0."""
    signum = torch.tensor(run.stop_signal)
    if run.host_group:
        torch.distributed.all_reduce(signum, torch.distributed.ReduceOp.MAX, group=run.host_group)
    return int(signum)


def handle_signals(run):
    """SIGTERM and SIGINT end the run after the step under way, with a checkpoint; a second SIGINT ends it at once."""

    def handler(signum, _frame):
        run.stop_signal = signum
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # SIGTERM often comes twice: from the batch system and torchrun

    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, handler)


# ---------------------------------------------------------------------------------------------------------- networks
class StableDiffusion:
    """SD 1.x and 2.x. A family says which teachers are its own, and how they are loaded, told of prompts, called and
    exported: nothing else in the engine knows what kind of model is trained.
    """

    name, pipeline = "Stable Diffusion 1.x or 2.x", StableDiffusionPipeline
    tokenizers, encoders = ("tokenizer",), {"text_encoder": CLIPTextModel}
    has_time_ids = False
    has_sgm_names = False  # whether kohya's format names the U-Net's blocks as Stability's own code does
    heeds_upcast = False  # `force_upcast` of a VAE's configuration is true by default, and meant for SDXL alone
    zeros_for_empty = False  # whether an empty prompt is encoded as zeros, where model_index.json does not say
    # the layers that a LoRA adapts, by the ends of their names
    adapted = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
               "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")  # fmt: skip

    @staticmethod
    def claims(parts):
        """Whether a pipeline with these parts, those of its model_index.json, is of this family."""
        return "unet" in parts and "text_encoder_2" not in parts

    @staticmethod
    def complaint(_parts):
        """What is wrong with a pipeline of this family, or None."""

    @staticmethod
    def conditioning(outputs):
        """The text encoders' outputs → c: `text`, (batch, tokens, width)."""
        return {"text": outputs[0][0]}

    @staticmethod
    def inputs(c, dtype):
        """c as arguments of the U-Net."""
        return {"encoder_hidden_states": c["text"].to(dtype)}

    @staticmethod
    def versions(unet, prediction_type):
        """What kohya's and Stability's metadata call such a model."""
        if unet.config.cross_attention_dim != 1024:
            return "sd_v1", "stable-diffusion-v1"
        is_v = prediction_type == "v_prediction"
        return ("sd_v2_v", "stable-diffusion-v2-768-v") if is_v else ("sd_v2", "stable-diffusion-v2-512")

    @staticmethod
    def pipeline_options(_parts):
        """Further arguments of the exported pipeline."""
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


class StableDiffusionXL(StableDiffusion):
    """SDXL: a second text encoder with a pooled embedding, and sizes and crops as micro-conditioning."""

    name, pipeline = "Stable Diffusion XL", StableDiffusionXLPipeline
    tokenizers = ("tokenizer", "tokenizer_2")
    encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    has_time_ids = has_sgm_names = heeds_upcast = zeros_for_empty = True

    @staticmethod
    def claims(parts):
        return "unet" in parts and "text_encoder_2" in parts

    @staticmethod
    def complaint(parts):
        if not parts.get("text_encoder", [None])[0]:
            return "an SDXL refiner, which is no text-to-image model"
        kind = parts.get("_class_name")
        return None if kind == "StableDiffusionXLPipeline" else f"a {kind}, not the text-to-image pipeline of SDXL"

    @staticmethod
    def conditioning(outputs):
        """`text`, (batch, tokens, width) of both encoders, and `pooled` of the second, (batch, width)."""
        text = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return {"text": text, "pooled": outputs[-1].text_embeds}

    @staticmethod
    def inputs(c, dtype):
        """c, here with `time_ids` (batch, 6), which stay float32: bf16 holds no 1023."""
        added = {"text_embeds": c["pooled"].to(dtype), "time_ids": c["time_ids"].float()}
        return {"encoder_hidden_states": c["text"].to(dtype), "added_cond_kwargs": added}

    @staticmethod
    def versions(_unet, _prediction_type):
        return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"

    @staticmethod
    def pipeline_options(parts):
        zeros = parts.get("force_zeros_for_empty_prompt", True)
        return {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}


FAMILIES = (StableDiffusion, StableDiffusionXL)


class Denoiser:
    """A U-Net in the paper's terms: `net(x_t, t, c, w)` runs it in its own precision and gives its output in float32.

    c is a dict of tensors (batch, …). w (batch,) goes in as an embedding where the U-Net takes one, and is ignored
    elsewhere. `unet` is what is called (DDP's wrapper for the student), `base` the U-Net itself. Of a U-Net with
    adapters, `adapter` is active, or with None none of them: the teacher. `drops`: whether dropout masks anything.
    One that `is_offloaded` stays on the CPU, and is lent to the device for the call.
    """

    def __init__(self, unet, base, family, adapter=None, drops=False, is_offloaded=False):
        self.unet, self.base, self.family, self.adapter = unet, base, family, adapter
        self.dtype, self.guidance_dim = base.conv_in.weight.dtype, base.config.time_cond_proj_dim
        self.layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
        self.dropouts = [m for m in base.modules() if isinstance(m, torch.nn.Dropout) and m.p > 0]
        self.drops, self.is_offloaded, self.weights = drops, is_offloaded, {}

    def fetch(self, device):
        """Starts to lend the weights of one that is offloaded to the device, until its next call."""
        if self.is_offloaded and not self.weights:
            home = self.unet.state_dict()
            # made, used and freed on the first stream, whose memory they are
            self.weights = {name: torch.empty_like(value, device=device) for name, value in home.items()}
            with aside():
                for name, value in self.weights.items():
                    value.copy_(home[name], non_blocking=True)

    def __call__(self, x_t, t, c, w):
        for layer in self.layers:  # by attribute: peft's methods would touch requires_grad, and take a while
            layer._disable_adapters = self.adapter is None
            if self.adapter:
                layer._active_adapter = [self.adapter]
        for module in self.dropouts:
            module.training = self.drops
        if self.guidance_dim:  # as the pipelines' get_guidance_scale_embedding
            w = get_timestep_embedding(1000 * w.float(), self.guidance_dim, downscale_freq_shift=1).to(self.dtype)
        options = {"timestep_cond": w if self.guidance_dim else None, "return_dict": False}
        given, options = (x_t.to(self.dtype), t), {**self.family.inputs(c, self.dtype), **options}
        if not self.is_offloaded:
            return self.unet(*given, **options)[0].float()
        self.fetch(x_t.device)
        rejoin()
        weights, self.weights = self.weights, {}
        return torch.func.functional_call(self.unet, weights, given, options)[0].float()


@contextlib.contextmanager
def without_dropout(nets):
    """Switches the networks' dropout off for a while."""
    drops = {name: net.drops for name, net in nets.items()}
    for net in nets.values():
        net.drops = False
    try:
        yield
    finally:
        for name in drops:
            nets[name].drops = drops[name]


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


def hub_source(args, part=None):
    """Where the teacher is found, or a part of it, or the VAE given instead of its own: a path, and arguments."""
    path, source = args.pretrained_teacher_model, {"revision": args.teacher_revision, "cache_dir": args.cache_dir}
    if os.path.isfile(path):
        path, source = str(Path(args.output_dir, "unpacked-teacher")), {}  # where unpack_teacher put it
    vae = args.pretrained_vae_model_name_or_path
    if part == "vae" and vae:
        given = {"config": path, "subfolder": "vae"} if os.path.isfile(vae) else {"revision": args.revision}
        return vae, {**given, "cache_dir": args.cache_dir}
    return path, {**source, "subfolder": part, "variant": args.variant} if part else source


def check_tensors(where, network, report):
    """Raises ValueError for a network that was not given all its tensors: the libraries make up the others."""
    empty = (name for name, value in network.named_parameters() if value.is_meta)
    lacking = {*empty, *report.get("missing_keys", ()), *(key for key, *_ in report.get("mismatched_keys", ()))}
    if lacking:
        what = f"{len(lacking)} tensors of a {type(network).__name__}"
        raise ValueError(f"{where}: {what} are missing or misshapen, such as {min(lacking)}")
    if unused := report.get("unexpected_keys"):
        logger.warning("%s: %d tensors are not used, such as %s", where, len(unused), min(unused))


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


def unpack_teacher(args):
    """Writes a teacher that is one .safetensors file as the folder of a pipeline, for all that reads it later."""
    path, config = args.pretrained_teacher_model, args.single_file_config
    try:
        with safe_open(path, "pt") as file:  # a .ckpt file, which could run code, is none
            is_v, first = "v_pred" in file.keys(), file.get_tensor("model.diffusion_model.input_blocks.0.0.weight")
        config = config or fetch_diffusers_config(load_file(path))["pretrained_model_name_or_path"]
        parts = diffusers.DiffusionPipeline.load_config(config, cache_dir=args.cache_dir)
        family = find_family(config, parts)
        pipe = family.pipeline.from_single_file(path, config=config, cache_dir=args.cache_dir,
                                                torch_dtype=first.dtype, **family.pipeline_options(parts))  # fmt: skip
        if is_v and pipe.scheduler.config.prediction_type != "v_prediction":
            raise ValueError("it is for v-prediction, and the scheduler there is not")
        shutil.rmtree(folder := Path(args.output_dir, "unpacked-teacher"), ignore_errors=True)
        pipe.save_pretrained(folder)
    except Exception as error:
        fail(f"the teacher {path} cannot be read with --single_file_config {config}: {first_line(error)}")


def find_family(path, parts):
    """The family of a pipeline, by its model_index.json; refuses one of no family."""
    family = next((family for family in FAMILIES if family.claims(parts)), None)
    if family is None:
        names = " or ".join(family.name for family in FAMILIES)
        fail(f"{path}, a {parts.get('_class_name')}, has no U-Net: it is not {names}")
    if complaint := family.complaint(parts):
        fail(f"{path} is {complaint}")
    return family


def check_teacher(args):
    """Reads the teacher's configuration; refuses what is no text-to-image U-Net of a family.

    Returns its `family`, `parts` (model_index.json) and `scheduler`.
    """
    path, source = hub_source(args)
    try:
        parts = {**diffusers.DiffusionPipeline.load_config(path, **source)}  # which may be of any kind
        scheduler = DDPMScheduler.from_pretrained(path, subfolder="scheduler", **source)
        unet = UNet2DConditionModel.load_config(path, subfolder="unet", **source) if "unet" in parts else None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        fail(f"--pretrained_teacher_model {path} cannot be read as a diffusers pipeline: {first_line(error)}")
    family = find_family(path, parts)
    classes = {"unet": UNet2DConditionModel, **family.encoders, "vae": AutoencoderKL}
    if args.pretrained_vae_model_name_or_path:
        del classes["vae"]
    for name, kind in classes.items():  # from_pretrained would make another kind's weights into random ones of this
        if (given := (parts.get(name) or [None, None])[1]) != kind.__name__:
            fail(f"{path}: its {name} is a {given}, where {family.name} has a {kind.__name__}")
    if unet["in_channels"] != unet["out_channels"]:
        fail(f"{path} takes {unet['in_channels']} channels (in-painting, depth?), text-to-image {unet['out_channels']}")
    inputs = {"class_embed_type": None, "num_class_embeds": None, "encoder_hid_dim_type": None,
              "addition_embed_type": "text_time" if family.has_time_ids else None}  # fmt: skip
    for name, value in inputs.items():
        if unet.get(name) != value:
            fail(f"{path}: its U-Net wants other inputs than {family.name} has: {name} is {unet.get(name)}")
    check_schedule(args, scheduler, str(parts.get("scheduler", [None, None])[1]))
    return SimpleNamespace(family=family, parts=parts, scheduler=scheduler)


def load_frozen(args, family, dtype):
    """Loads tokenizers, text encoders and VAE, frozen: lists in the family's order, and a network."""
    encoders = []
    for name, kind in family.encoders.items():
        path, source = hub_source(args, name)
        encoders.append(load_part(kind, path, dtype=dtype, **source))
    path, source = hub_source(args)
    tokenizers = [load_tokenizer(path, encoder, subfolder=name, **source)
                  for name, encoder in zip(family.tokenizers, encoders, strict=True)]  # fmt: skip
    path, source = hub_source(args, "vae")
    vae = load_part(AutoencoderKL, path, **source)
    vae.to(torch.float32 if family.heeds_upcast and vae.config.get("force_upcast") else dtype)
    return tokenizers, torch.nn.ModuleList(encoders).eval(), vae.eval()


def load_unet(args, dtype):
    """Loads the teacher's U-Net, frozen, in this precision or quantised as --base_precision says."""
    path, options = hub_source(args, "unet")
    if args.base_precision != "none":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=args.base_precision == "int8", load_in_4bit=args.base_precision == "nf4",
            bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)  # fmt: skip
    return load_part(UNet2DConditionModel, path, dtype=dtype, **options)


def make_student(source, args):
    """Copies a U-Net into a float32 student, with --dropout, and --from_scratch with random weights.

    Where the method has it told w, that embedding's projection is new and zero: the student starts as its source.
    """
    config = {k: v for k, v in source.config.items() if k != "_use_default_values"}  # which from_config would drop
    config["time_cond_proj_dim"] = source.config.time_cond_proj_dim or args.unet_time_cond_proj_dim
    config["dropout"] = source.config.dropout if args.dropout is None else args.dropout
    torch.manual_seed(args.seed)
    student = UNet2DConditionModel.from_config(config)
    if config["time_cond_proj_dim"] and not source.config.time_cond_proj_dim:
        torch.nn.init.zeros_(student.time_embedding.cond_proj.weight)
    if not args.from_scratch:
        student.load_state_dict({**student.state_dict(), **source.state_dict()})
    return student.train()


def load_unets(args, family, dtype):
    """Loads teacher (None where the method has none), the NETWORKS, and the names of their adapters by network.

    They are U-Nets of their own, and there are no adapters, or one U-Net: the base of the adapters, frozen.
    """
    dtype = dtype if args.cast_teacher_unet else torch.float32
    if args.lora_rank:
        base = load_unet(args, dtype)
        return base, base, base, base, add_adapters(base, args, family)
    teacher = load_unet(args, torch.float32)
    source = load_part(UNet2DConditionModel, args.init_from, subfolder="unet") if args.init_from else teacher
    for name in ("cross_attention_dim", "projection_class_embeddings_input_dim"):
        if (found := source.config[name]) != (wanted := teacher.config[name]):
            raise ValueError(f"the {name} of {args.init_from} is {found}, that of the teacher {wanted}")
    student = make_student(source, args)
    target = copy.deepcopy(student).requires_grad_(False).eval() if args.ema_decay else student
    average = copy.deepcopy(student).requires_grad_(False).eval() if args.export_ema_decay else target
    return teacher.to(dtype).eval() if METHOD.has_teacher else None, student, target, average, {}


SGM_LAYERS = {"conv_in": "input_blocks.0.0", "conv_out": "out.2", "time_embedding.linear_1": "time_embed.0",
              "time_embedding.linear_2": "time_embed.2", "add_embedding.linear_1": "label_emb.0.0",
              "add_embedding.linear_2": "label_emb.0.2", "resnets.time_emb_proj": "emb_layers.1",
              "resnets.conv1": "in_layers.2", "resnets.conv2": "out_layers.3",
              "resnets.conv_shortcut": "skip_connection", "downsamplers.conv": "op"}  # fmt: skip
OTHER_ADAPTERS = {"dora_scale": "a DoRA", "lora_magnitude_vector": "a DoRA", "hada_": "a LoHa", "lokr_": "a LoKr",
                  "oft_": "an OFT", "lora_mid": "a LoCon with a Tucker core", ".diff": "one of whole differences",
                  "bias": "a LoRA with biases", "on_input": "an (IA)³", "vera_": "a VeRA"}  # fmt: skip


def kohya_name(layer, sgm_depth=None):
    """The name in kohya's format of a U-Net's layer; of SDXL's, `sgm_depth` being its layers_per_block, by Stability's
    names of the blocks, which ComfyUI, A1111, sd-scripts and diffusers all read.
    """
    kinds = r"resnets|attentions|downsamplers|upsamplers"
    block = re.fullmatch(rf"(down|mid|up)_blocks?\.(?:(\d)\.)?({kinds})\.(\d)\.(.+)", layer)
    if isinstance(sgm_depth, int) and block:
        side, number, kind, index, layer = block.groups()
        if side == "mid":
            place = f"middle_block.{2 * int(index) + (kind == 'attentions')}"
        else:  # a sampler counts with the last layer of its block, going down as a layer of its own
            number = int(number) * (sgm_depth + 1) + (sgm_depth if "samplers" in kind else int(index))
            place = f"input_blocks.{number + 1}" if side == "down" else f"output_blocks.{number}"
            place += {"resnets": ".0", "attentions": ".1", "downsamplers": ".0", "upsamplers": ".2"}[kind]
        layer = f"{place}.{SGM_LAYERS.get(f'{kind}.{layer}', layer)}"
    elif sgm_depth:
        layer = SGM_LAYERS.get(layer, layer)
    return f"lora_unet_{layer.replace('.', '_')}"


def find_adapter(given, args):
    """The file of a LoRA: given itself, as OWNER/NAME/FILE, or of a folder or hub repository the usual or only one."""
    path = Path(given)
    if not path.exists():
        repository, file = "/".join(path.parts[:2]), "/".join(path.parts[2:])
        wanted, ignored = ([file], None) if file else (["*.safetensors", "*.bin"], ["*/*"])
        path = Path(snapshot_download(repository, allow_patterns=wanted, ignore_patterns=ignored,
                                      cache_dir=args.cache_dir), file)  # fmt: skip
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    usual = [file for file in files if file.stem in ("pytorch_lora_weights", "adapter_model")] or files
    if len(usual) != 1:
        names = ", ".join(file.name for file in usual)
        raise ValueError(f"it holds several files: name one of {names}" if usual else "it holds no .safetensors file")
    if len(files) > 1:
        logger.info("Of the files in %s, %s is taken", given, usual[0].name)
    return usual[0]


def read_adapter(path, unet):
    """Reads a LoRA of diffusers', peft's or kohya's format: {layer: (A, B, alpha / rank)}, of the layers of this U-Net,
    the names of other layers, and how many tensors are for text encoders.

    Raises ValueError for an adapter of another kind.
    """
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            state, about = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    else:
        state, about = torch.load(path, map_location="cpu", weights_only=True), {}
    config = {key.removeprefix("unet."): v for key, v in json.loads(about.get("lora_adapter_metadata", "{}")).items()}
    if path.name.startswith("adapter_model"):  # as peft itself saves
        config = json.loads(path.with_name("adapter_config.json").read_text(encoding="utf-8"))
    names, depth, found, strange = {}, unet.config.layers_per_block, {}, set()
    for layer, _ in unet.named_modules():
        names |= {layer: layer, kohya_name(layer): layer, kohya_name(layer, depth): layer}
    mine = {key: value for key, value in state.items() if not re.match("lora_te|text_encoder|bundle_emb", key)}
    lora = r"(?:unet\.)?(?:base_model\.model\.)?(.+)\.(alpha|lora_(?:down|up|A|B)(?:\.default)?\.weight)"
    for key, value in convert_unet_state_dict_to_peft(mine).items():  # which renames what diffusers once wrote
        if not (part := re.fullmatch(lora, key)):
            kind = next((kind for mark, kind in OTHER_ADAPTERS.items() if mark in key), f"something that has a {key}")
            raise ValueError(f"it is no plain LoRA, but {kind}")
        if part[1] in names:
            found.setdefault(names[part[1]], {})[part[2].split(".")[0].replace("down", "A").replace("up", "B")] = value
        else:
            strange.add(part[1])
    layers, patterns = {}, config.get("alpha_pattern") or {}
    for layer, parts in found.items():
        if not {"lora_A", "lora_B"} <= parts.keys():
            raise ValueError(f"of {layer} it has {' and '.join(sorted(parts))} alone")
        a, b, rank = parts["lora_A"], parts["lora_B"], len(parts["lora_A"])
        alpha = patterns.get(get_pattern_key(patterns, layer), config.get("lora_alpha", rank))
        scale = float(parts.get("alpha", alpha)) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        layers[layer] = a, b, scale
    return layers, sorted(strange), len(state) - len(mine)


def load_adapter(unet, args):
    """Adds the adapter `default` from --init_lora, which brings its own layers, and to each its rank and its scale."""
    flag = f"--{'init_from' if args.init_lora == args.init_from else 'init_lora'} {args.init_lora}"
    try:
        layers, strange, texts = read_adapter(find_adapter(args.init_lora, args), unet)
        if not layers:
            raise ValueError(f"it has no layer of this U-Net{', but ' + strange[0] if strange else ''}")
        ranks = {layer: len(a) for layer, (a, _, _) in layers.items()}
        alphas = {layer: scale * ranks[layer] for layer, (*_, scale) in layers.items()}
        (rank, alpha), patterns = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas)), []
        for each, most in ((ranks, rank), (alphas, alpha)):
            patterns.append({f"^{layer}": value for layer, value in each.items() if value != most})
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, rank_pattern=patterns[0], alpha_pattern=patterns[1],
                                    lora_dropout=args.lora_dropout, target_modules=sorted(layers)))  # fmt: skip
        adapter_to_float32(unet, "default")
        added = {name: module for name, module in unet.named_modules() if isinstance(module, BaseTunerLayer)}
        for name in {*added, *layers}:
            a, b, scale = layers[name]
            if not math.isclose(added[name].scaling["default"], scale, rel_tol=1e-6):
                raise ValueError(f"{name} did not take the scale {scale:g}")
            for weight, value in ((added[name].lora_A["default"].weight, a), (added[name].lora_B["default"].weight, b)):
                if weight.squeeze().shape != value.squeeze().shape:
                    raise ValueError(f"{name} takes {tuple(weight.shape)}, and is given {tuple(value.shape)}")
                weight.data.copy_(value.reshape(weight.shape))
    except Exception as error:
        fail(f"{flag} cannot be loaded into this U-Net: {first_line(error)}")
    if texts:
        logger.warning("%s: its %d tensors for text encoders are not used", flag, texts)
    if strange:
        logger.warning("%s: %d of its layers are not in this U-Net and not used, such as %s", flag, len(strange),
                       strange[0])  # fmt: skip
    if args.lora_alpha or args.lora_target_modules or args.lora_rank != rank:
        logger.warning("%s brings its rank, %d, its alpha and its layers; --lora_rank, --lora_alpha and "
                       "--lora_target_modules are not used", flag, rank)  # fmt: skip


def make_adapter(unet, args, family):
    """Adds a new adapter `default`. It changes nothing yet: its second matrix is zero."""
    layers = [name for name, _ in unet.named_modules()]
    found = {name for name in args.lora_target_modules or family.adapted
             if any(layer == name or layer.endswith(f".{name}") for layer in layers)}  # fmt: skip
    if missing := set(args.lora_target_modules or ()) - found:
        fail(f"--lora_target_modules: no layer's name ends in {', '.join(sorted(missing))}")
    torch.manual_seed(args.seed)
    unet.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=args.lora_alpha or args.lora_rank,
                                lora_dropout=args.lora_dropout, target_modules=sorted(found)))  # fmt: skip
    adapter_to_float32(unet, "default")


def add_adapters(unet, args, family):
    """Adds the adapters `default`, the student, and as asked for `target` and `average`, all float32 and at first the
    same; returns their names by network.
    """
    load_adapter(unet, args) if args.init_lora else make_adapter(unet, args, family)
    names = {"student": "default", "target": "target" if args.ema_decay else "default"}
    names["average"] = "average" if args.export_ema_decay else names["target"]
    for name in {*names.values()} - {"default"}:
        with warnings.catch_warnings():  # of peft: that there are several adapters now
            warnings.simplefilter("ignore", UserWarning)
            unet.add_adapter(copy.deepcopy(unet.peft_config["default"]), name)
        adapter_to_float32(unet, name)
        set_peft_model_state_dict(unet, get_peft_model_state_dict(unet, adapter_name="default"), name)
    unet.set_adapter("default")  # the one that is trained
    unet.train()  # as any network that is trained; dropout is switched by the Denoisers
    for layer in unet.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.cast_input_dtype_enabled = False  # peft would cast to float32 what autocast takes in half precision
    return names


def adapter_to_float32(unet, name):
    """Training is in float32, whatever the base's precision is."""
    for parameter in adapter_parameters(unet, name):
        parameter.data = parameter.data.float()


def adapter_parameters(unet, name):
    """The parameters of an adapter, in the same order for every adapter."""
    return [value for key, value in unet.named_parameters() if re.search(rf"\.lora_[AB]\.{name}\.", key)]


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
    if (channels := (vae.config.in_channels, vae.config.out_channels)) != (3, 3):
        fail(f"the VAE takes and gives {channels} channels, where pictures have 3")
    if vae.config.get("latents_mean"):
        fail("a VAE with latents_mean and latents_std is not supported")


def tune_unet(unet, args, device):
    """Applies the flags that make a U-Net faster or smaller."""
    if device.type != "cpu" and args.half_precision_norms:
        keep_norms_in_half(unet)
    if args.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    if args.compile:
        # student and teacher share code: without this, their different batches would make all sizes dynamic
        unet.compile(dynamic=None if args.bucketed_shards else False)


def load_models(args, teacher, accelerator):
    """Loads all networks of a run to the device, channels-last, with the attention and compilation asked for.

    The NETWORKS are float32 U-Nets and `adapters` is empty, or they are the teacher itself and `adapters` holds the
    names of their adapters; the others are frozen in the compute precision; `scheduler` is what is exported.
    """
    dtype, device, family = DTYPES[accelerator.mixed_precision], accelerator.device, teacher.family
    try:
        tokenizers, text_encoders, vae = load_frozen(args, family, dtype)
        *unets, adapters = load_unets(args, family, dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        fail(f"the teacher, the VAE or --init_from cannot be loaded: {first_line(error)}")
    networks = dict(zip(("teacher", *NETWORKS), unets, strict=True))
    student = networks["student"]
    averages = [unet for unet in dict.fromkeys(unets[2:]) if unet is not student]
    check_latents(args, vae, student)
    text_encoders.to("cpu" if args.encoded_shards else device)
    different = [unet for unet in dict.fromkeys(unets) if unet is not None]
    for model in (vae, *different):  # channels-last halves a VAE's time on a CPU, and helps tensor cores
        is_offloaded = model in averages and args.offload_ema or model is vae and args.encoded_shards
        model.to("cpu" if is_offloaded else device, memory_format=torch.channels_last)
    for unet in different:
        tune_unet(unet, args, device)
    if args.compile:
        vae.encoder.compile(dynamic=None if args.bucketed_shards else False)
    parameters = {f"{name}_parameters": adapter_parameters(networks[name], adapters[name]) if adapters else
                  list(networks[name].parameters()) for name in chosen_networks(args.export_ema_decay)}  # fmt: skip
    for parameter in parameters["student_parameters"] if "8bit" in args.optimizer else ():
        parameter.data = parameter.data.contiguous()  # as bitsandbytes makes it at every step
    for average in averages if args.offload_ema and device.type == "cuda" else ():
        for parameter in average.parameters():  # in pinned memory, so that the host need not wait for its copies
            parameter.data = parameter.data.pin_memory()
    if args.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    if args.ema_decay and args.export_ema_decay:
        logger.info("Two averages of the weights, of --ema_decay and --export_ema_decay: %.2f GB each, float32",
                    sum(p.numel() for p in parameters["student_parameters"]) * 4 / 2**30)  # fmt: skip
    zeros = teacher.parts.get("force_zeros_for_empty_prompt", family.zeros_for_empty)
    return SimpleNamespace(family=family, parts=teacher.parts, tokenizers=tokenizers, text_encoders=text_encoders,
                           vae=vae, **networks, adapters=adapters, **parameters, zeros_for_empty=zeros,
                           scheduler=make_scheduler(teacher.scheduler.config, args),
                           schedule=Schedule(teacher.scheduler, args.num_ddim_timesteps, device))  # fmt: skip


def make_scheduler(config, args):
    """The stock scheduler that is exported: the teacher's noise schedule, the trained grid, latents not clipped."""
    known = inspect.signature(METHOD.scheduler).parameters
    config = {k: v for k, v in config.items() if k in known} | {"clip_sample": False, "thresholding": False}
    return METHOD.scheduler(**config | scheduler_options(args))


def chosen_networks(export_ema_decay):
    """Those of the NETWORKS that a run has, and its checkpoints hold."""
    return NETWORKS if export_ema_decay else NETWORKS[:2]


def prepare(models, args, optimizer, accelerator):
    """Gives the networks and the optimizer to accelerate; returns the Denoisers by name, and the optimizer."""
    names = chosen_networks(args.export_ema_decay)
    wrapped = {name: getattr(models, name) for name in ("teacher", *names)}
    wrapped["student"], optimizer = accelerator.prepare(models.student, optimizer)
    for unet in dict.fromkeys([models.target, models.average]):
        if unet is not models.student:  # autocast as the student; it is on its device already
            prepared = accelerator.prepare_model(unet, device_placement=False, evaluation_mode=True)
            wrapped |= {name: prepared for name in names if getattr(models, name) is unet}
    drops = {"student": True, "target": METHOD.target_drops}
    nets = {name: Denoiser(unet, getattr(models, name), models.family, models.adapters.get(name),
                           drops.get(name, False)) for name, unet in wrapped.items() if unet is not None}  # fmt: skip
    for name in names:
        nets[name].is_offloaded = args.offload_ema and nets[name].base is not models.student
    return nets, optimizer


def network_state(models, name):
    """The tensors of one of the NETWORKS that a checkpoint holds: of the U-Net or of its adapter."""
    unet, adapter = getattr(models, name), models.adapters.get(name)
    state = get_peft_model_state_dict(unet, adapter_name=adapter) if adapter else unet.state_dict()
    return {key: value.contiguous() for key, value in state.items()}


def load_network(models, name, tensors):
    """Gives one of the NETWORKS the tensors of a checkpoint. Raises KeyError where they are of other layers."""
    unet, adapter = getattr(models, name), models.adapters.get(name)
    if tensors.keys() != network_state(models, name).keys():
        raise KeyError("its network has other layers")
    set_peft_model_state_dict(unet, tensors, adapter) if adapter else unet.load_state_dict(tensors)


@contextlib.contextmanager
def lent(model, device):
    """Brings a model that is kept on the CPU to the device for a while."""
    home = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(home)


@contextlib.contextmanager
def starting_model(run):
    """Lends `run.nets` as `teacher` the model that training started from, where the method has no teacher: loaded for
    the moment, or for a LoRA its base, also where --init_lora gave the adapter a start.
    """
    if "teacher" in run.nets:
        yield
        return
    models, args = run.models, run.args
    path, source = (args.init_from, {"subfolder": "unet"}) if args.init_from else hub_source(args, "unet")
    unet = load_part(UNet2DConditionModel, path, **source)
    unet.to(run.accelerator.device, DTYPES[run.accelerator.mixed_precision]).eval()
    run.nets["teacher"] = Denoiser(unet, unet, models.family)
    try:
        yield
    finally:
        del run.nets["teacher"]


# ---------------------------------------------------------------------------------------------------------- encoding
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
    images = torch.cat([vae.decode(part).sample.float() for part in scaled.split(chunk)])
    return (images / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def encode_prompts(models, captions):
    """Captions → conditioning, a dict of tensors (batch, …), in the text encoders' precision."""
    outputs = []
    for tokenizer, encoder in zip(models.tokenizers, models.text_encoders, strict=True):
        length = tokenizer.model_max_length
        tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        tokens = tokens.to(encoder.device, non_blocking=True)
        mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
        outputs.append(encoder(tokens.input_ids, attention_mask=mask, output_hidden_states=True))
    return models.family.conditioning(outputs)


def encode_uncond(models, text):
    """The conditioning (1, …) of the unconditional half: zeros for an empty text where the pipeline says so."""
    are_zero = not text and models.zeros_for_empty
    return {name: value * (not are_zero) for name, value in encode_prompts(models, [text]).items()}


def find_empty(models, urls):
    """Conditioning of the empty prompt, (1, …), as the encoded shards came with or as the text encoders give it.

    Ends the run if the stored one, or the latents of the grey ramp stored beside it, are those of other models.
    """
    path = Path(re.sub("^file:(//)?", "", urls[0])).with_name("empty.safetensors")
    computed = encode_prompts(models, [""])
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
    models = run.models
    given = {name: value.to(run.accelerator.device, non_blocking=True) for name, value in batch.items()
             if torch.is_tensor(value)}  # fmt: skip
    if "pixel_values" in given:
        mean, std = encode_images(models.vae, given["pixel_values"], run.args.vae_encode_batch_size)
        c = encode_prompts(models, batch["captions"])
        if models.zeros_for_empty:  # as encode_uncond, or what the pipeline guides from would never be trained
            has_text = torch.tensor([caption != "" for caption in batch["captions"]])
            has_text = has_text.to(mean.device, non_blocking=True)
            c = {name: value * has_text.view(-1, *[1] * (value.ndim - 1)) for name, value in c.items()}
    else:
        mean, std, is_empty = given["mean"].float(), given["std"].float(), given["is_empty"]
        c = {name: torch.where(is_empty.view(-1, *[1] * (empty.ndim - 1)), empty, given[name])
             for name, empty in run.empty.items()}  # fmt: skip
    if models.family.has_time_ids:
        c["time_ids"] = given["time_ids"]
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    return (mean + std * noise) * models.vae.config.scaling_factor, c


# -------------------------------------------------------------------------------------------------------------- data
INTERPOLATION = {k: Image.Resampling[k.upper()] for k in "bilinear bicubic box nearest hamming lanczos".split()}
INTERPOLATION["nearest_exact"] = Image.Resampling.NEAREST  # which is exact in PIL
IMAGE_MEMBERS, CAPTION_MEMBERS = ("jpg", "jpeg", "png", "webp"), ("txt", "text", "caption")
MEMBERS = {*IMAGE_MEMBERS, *CAPTION_MEMBERS, "json", "safetensors"}  # nothing else of a shard is ever read
MAX_IMAGE_PIXELS, MAX_MEMBER_BYTES = 2**26, 2**28
FILTERS = ("below min_image_size", "above max_pwatermark")
FAULTS = ("unreadable shard", "duplicate member", "no image", "no caption", "broken image", "image too large",
          "other resolution", "broken encoding", "other encoding", "no time_ids")  # fmt: skip


class BadSample(Exception):
    """A sample that is skipped; `args` are one of FILTERS or FAULTS, and a detail for the log."""


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
            known = {3: "no URL", 6: "no such host", 7: "refused", 22: "not found, or not allowed"}  # of curl
            raise OSError(f"command ended with status {status}" + (f": {known[status]}" if status in known else ""))
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


def decode_text(data, errors="replace"):
    """Text of bytes in UTF-8, or in UTF-16 where they begin as it does; what is neither becomes U+FFFD."""
    return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig", errors)


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


def read_time_ids(info, is_flipped, args):
    """Micro-conditioning, {"time_ids": (6,)}, of a sample, as this script or tools/prepare_shards.py cropped it: height
    and width before the resize, top and left of the crop, target height and width. {} where its JSON has none.
    """
    values = (info.get("time_ids_flipped") if is_flipped else None) or info.get("time_ids")
    if not (isinstance(values, list) and len(values) == 6 and all(isinstance(value, int) for value in values)):
        return {}
    if not 0 <= min(values) <= max(values) < 2**20:  # no sizes
        return {}
    height, width = values[4:]
    return {"time_ids": torch.tensor([height, width, 0, 0, height, width] if args.use_fix_crop_and_size else values)}


def read_info(sample):
    """The JSON of a sample, {} where it is none."""
    try:
        info = json.loads(sample.get("json", b"{}"))
    except (ValueError, RecursionError):
        info = {}
    return info if isinstance(info, dict) else {}


def decode_sample(sample, args, rng):
    """Decodes a sample; gives `captions`, one text, and `pixel_values`, uint8 (3, height, width), or of an encoded one
    what decode_encoded does, and whether the caption `is_empty`; and what read_time_ids gives.

    Raises BadSample. `rng` decides caption, caption dropout, crop and flip, always with the same number of draws.
    """
    pick, drop, left, top, flip = (rng.random() for _ in range(5))
    if "__fault__" in sample:
        raise sample["__fault__"]
    info = read_info(sample)
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
        encoded, is_empty = decode_encoded(data, info, pick, is_flipped, args), torch.tensor(not caption)
        return {**encoded, "captions": caption, "is_empty": is_empty, **read_time_ids(info, is_flipped, args)}
    width, height = training_size(info, args)
    image, size = load_image(data, min(width, height), INTERPOLATION[args.interpolation_type])
    if image.width < width or image.height < height:
        raise BadSample("broken image", f"{image.width}x{image.height} pixels, by its json {width}x{height}")
    left, top = (0.5, 0.5) if args.center_crop else (left, top)
    x, y = int(left * (image.width - width + 1)), int(top * (image.height - height + 1))
    if "time_ids" not in info or image.size != (width, height):  # else tools/prepare_shards.py has cropped it
        place = [size[1], size[0], y, x, height, width], [size[1], size[0], y, image.width - width - x, height, width]
        info = dict(zip(("time_ids", "time_ids_flipped"), place, strict=True))
    image = image.crop((x, y, x + width, y + height))
    image = ImageOps.mirror(image) if is_flipped else image
    return {"pixel_values": torch.from_numpy(np.array(image)).permute(2, 0, 1), "captions": caption,
            **read_time_ids(info, is_flipped, args)}  # fmt: skip


def check_shapes(sample, shapes):
    """Returns a decoded sample, with `time_ids` only where the model takes them.

    Raises BadSample if it lacks them, or if an encoded tensor has not the dimensions it must have (0: any).
    """
    if "time_ids" not in shapes:
        sample.pop("time_ids", None)
    elif "time_ids" not in sample:
        raise BadSample("no time_ids", "the json of a cropped or encoded sample needs them, six whole numbers")
    for name, wanted in shapes.items() if "mean" in sample else ():
        found = tuple(sample[name].shape) if name in sample else ()
        if len(found) != len(wanted) or any(b not in (0, a) for a, b in zip(found, wanted, strict=True)):
            raise BadSample("other encoding", f"{name} has the shape {found}, the model needs {tuple(wanted)}")
    return sample


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


def check_shards(urls, args, shapes, most=100):
    """Names every local shard that is missing and every URL (of the first `most`) that does not answer; never hangs.

    Then reads the first shard until a sample is usable, and says what was found instead if it holds none. Returns
    whether that sample is encoded, and whether it was cropped to one of several sizes.
    """

    def problem(url):
        try:
            if re.match("(?i)https?://", url):  # by the reader itself: what it can read passes
                with contextlib.closing(open_shard(url, min(10.0, args.shard_timeout))) as stream:
                    stream.read(1)
            elif not url.startswith("pipe:") and "://" not in url.removeprefix("file:"):
                open(re.sub("^file:(//)?", "", url), "rb").close()
        except Exception as error:
            return f"{redact(url)} ({redact(getattr(error, 'strerror', None) or first_line(error))})"

    remote = [url for url in urls if "://" in url]
    with ThreadPoolExecutor(16) as pool:
        chosen = dict.fromkeys([url for url in urls if "://" not in url] + remote[:most])
        problems = [text for text in pool.map(problem, chosen) if text]
    if problems:
        fail(f"{len(problems)} of {len(urls)} shards cannot be read: " + "; ".join(problems))
    reasons, examples = Counter(), {}
    for sample in read_shard(urls[0], args.shard_timeout, tries=1):
        try:
            decoded = check_shapes(decode_sample(sample, args, random.Random(0)), shapes)
            return "pixel_values" not in decoded, isinstance(read_info(sample).get("crop"), list)
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
            with tarfile.open(path) as shard:
                total += sum(name.rsplit(".", 1)[-1].lower() in wanted for name in shard.getnames())
        except (OSError, EOFError, tarfile.TarError) as error:
            logger.warning("The samples of %s are not counted: %s", path, first_line(error))
    return total


# -------------------------------------------------------------------------------------------- checkpoints and export
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
    rejoin(host=True)
    for name in chosen_networks(run.args.export_ema_decay):
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
        for old in list_checkpoints(args.output_dir)[: -(args.checkpoints_total_limit or 10**9)]:
            shutil.rmtree(old)
        logger.info("Saved %s", final)
    wait_for_all(run)


def read_checkpoint(path):
    """A checkpoint folder's state, and its tensors, mapped. Raises anything if a file is missing or damaged."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if missing := {"step", "args", "skipped", "lr_scheduler", "history", "scaler", "stream"} - {*state}:
        raise ValueError(f"state.json has no {', '.join(sorted(missing))}")
    names = chosen_networks(state["args"].get("export_ema_decay"))
    networks = {name: load_file(path / f"{name}.safetensors") for name in names}
    optimizer = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
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
    # an older script's defaults, of a constant rate and of an embedding for w = 0, too, are not to change midway
    for name in ("lr_scheduler", "lr_warmup_steps", "unet_time_cond_proj_dim"):
        if getattr(args, name) is None:
            setattr(args, name, state["args"].get(name))
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
    for parameter, values in optimizer.state.items() if run.args.optimizer.startswith("paged") else ():
        for name in {"state1", "state2"} & values.keys():  # bitsandbytes has moved them to the device
            values[name] = optimizer.get_state_buffer(parameter, values[name].dtype).copy_(values[name])


def load_checkpoint(run, state):
    """Restores everything `save_checkpoint` wrote; a checkpoint that does not fit the model is named."""
    names = chosen_networks(run.args.export_ema_decay)
    if missing := {*names} - {*state}:
        logger.warning("%s was made without --export_ema_decay: that average begins as its student", state["path"])
    try:
        for name in reversed(names):  # the student last: with --ema_decay 0 the target is the same network
            load_network(run.models, name, state["student" if name in missing else name])
        restore_optimizer(run, state)
    except (RuntimeError, ValueError, KeyError) as error:
        fail(f"checkpoint {state['path']} is of another model: {first_line(error)}")
    if run.accelerator.scaler and state["scaler"]:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    for name in COUNTERS:
        setattr(run, name, state.get(name, 0))
    rank, history = run.accelerator.process_index, state["history"]
    if len(history) == run.accelerator.num_processes:
        rows, width = torch.tensor(history[rank], device=run.accelerator.device), 2 + 2 * run.args.log_loss_bins
        if rows.ndim == 2 and rows.shape[1] != width:  # other bins than before: what these steps had is left out
            rows = F.pad(rows[:, :2], (0, width - 2))
        run.history = list(rows)
    if rank == 0:
        run.reader.skipped.update(state["skipped"])
    logger.info("Resumed from %s", state["path"])
    before, steps, schedule = state["args"].get("max_train_steps"), run.args.max_train_steps, run.args.lr_scheduler
    if before != steps and not schedule.startswith("constant"):
        logger.warning("The %s schedule of the learning rate, which was over %s steps, is now over %d: it goes on at "
                       "%.3g", schedule, before, steps, run.optimizer.param_groups[0]["lr"])  # fmt: skip
    if run.step >= run.args.max_train_steps:
        logger.warning("It is at step %d, --max_train_steps is %d: nothing is trained, only exported", run.step,
                       run.args.max_train_steps)  # fmt: skip


def set_aside(run):
    """Moves what an earlier run wrote after this step, which this one will write anew, into a folder of its own."""
    output = Path(run.args.output_dir)
    later = [path for path in list_checkpoints(output) if int(path.name[11:]) > run.step]
    metrics = output / "metrics.jsonl"
    if not later and (run.step or not metrics.is_file()):
        return
    names = (output / f"set-aside-{number}" for number in itertools.count(1))
    folder = next(name for name in names if not name.exists())
    folder.mkdir()
    pictures = output.glob("validation/step-[0-9]*.png")
    for path in [*later, *(path for path in pictures if int(re.search(r"\d+", path.name)[0]) > run.step)]:
        path.rename(folder / path.name)
    if metrics.is_file():
        shutil.copyfile(metrics, folder / metrics.name)
    logger.warning("%s holds what an earlier run wrote after step %d: %s is moved to %s", output, run.step,
                   ", ".join([*(path.name for path in later), "metrics.jsonl"]), folder)  # fmt: skip


def trim_metrics(run):
    """Forgets the lines of metrics.jsonl that a run which did not come to its next checkpoint wrote after this step."""

    def is_kept(line):
        with contextlib.suppress(ValueError, TypeError, KeyError):  # a line that was cut off
            return run.step > 0 and json.loads(line)["step"] <= run.step

    path = Path(run.args.output_dir, "metrics.jsonl")
    if run.accelerator.is_main_process:
        set_aside(run)
    if run.accelerator.is_main_process and path.is_file():
        kept = [line + "\n" for line in path.read_text(encoding="utf-8").splitlines() if is_kept(line)]
        path.with_suffix(".tmp").write_text("".join(kept), encoding="utf-8")
        path.with_suffix(".tmp").rename(path)


def export(run):
    """Writes a LoRA, or a whole pipeline (EMA U-Net, matching scheduler) and `unet_online`; returns what to upload."""
    output, models = Path(run.args.output_dir), run.models
    if models.adapters:
        return export_lora(run)
    rejoin(host=True)
    models.student.save_pretrained(output / "unet_online")
    try:
        pipe = assemble(run, models.average)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        models.average.save_pretrained(output / "unet")
        fail(f"the teacher cannot be read again ({first_line(error)}): {output} holds unet and unet_online alone")
    pipe.save_pretrained(output)
    return ["model_index.json", "unet_online/*", *(f"{name}/*" for name, part in pipe.components.items() if part)]


def assemble(run, unet):
    """The pipeline of a U-Net: the teacher's other parts, unrounded whatever the compute precision was."""
    family = run.models.family
    tokenizers, text_encoders, vae = load_frozen(run.args, family, torch.float32)
    parts = {**dict(zip(family.tokenizers, tokenizers, strict=True)), "vae": vae, "unet": unet,
             **dict(zip(family.encoders, text_encoders, strict=True)), "scheduler": run.models.scheduler}  # fmt: skip
    return family.pipeline(**parts, **family.pipeline_options(run.models.parts))


def sort_metadata(path):
    """Sorts the metadata of a safetensors file, which has them in any order: equal exports are equal bytes."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors that follow are aligned
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def export_lora(run):
    """Writes the EMA adapter for diffusers and for ComfyUI / A1111, the online one, and the scheduler; with
    --export_fused a whole pipeline too. Returns what to upload.
    """
    args, output, models = run.args, Path(run.args.output_dir), run.models
    config, pipeline = models.student.peft_config["default"], models.family.pipeline
    files = {"average": "pytorch_lora_weights.safetensors", "student": "pytorch_lora_weights_online.safetensors"}
    metadata = {**config.to_dict(), "lora_dropout": 0.0}  # which is for training alone
    metadata["target_modules"] = sorted(metadata["target_modules"])  # a set, whose order changes from run to run
    for name, file in files.items():
        pipeline.save_lora_weights(output, network_state(models, name), weight_name=file,
                                   unet_lora_adapter_metadata=metadata)  # fmt: skip
        sort_metadata(output / file)
    files["kohya"] = f"{output.resolve().name}_kohya.safetensors"
    write_kohya(run, output / files["kohya"])
    models.scheduler.save_pretrained(output / "scheduler")
    if args.export_fused:
        path, source = hub_source(args, "unet")
        pipe = assemble(run, load_part(UNet2DConditionModel, path, **source))
        pipe.load_lora_weights(output, weight_name=files["average"])
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        pipe.save_pretrained(output / "fused")
    return [*(glob.escape(file) for file in files.values()), "scheduler/*", "fused/*"]


def write_kohya(run, path):
    """Writes the EMA adapter for ComfyUI, A1111 and sd-scripts, with metadata by which they show and sort it: kohya's,
    and those of Stability's Model Metadata Standard.

    All layers get one alpha, since diffusers misreads several; what is then missing in a layer's scale, its B takes.
    """
    args, family, unet, name = run.args, run.models.family, run.models.average, run.models.adapters["average"]
    tensors, config = {}, unet.peft_config[name]
    for layer, module in unet.named_modules():
        if isinstance(module, BaseTunerLayer):
            key = kohya_name(layer, unet.config.layers_per_block if family.has_sgm_names else None)
            factor = module.scaling[name] * module.r[name] / config.lora_alpha
            tensors |= {f"{key}.lora_down.weight": module.lora_A[name].weight.detach().cpu().contiguous(),
                        f"{key}.lora_up.weight": (module.lora_B[name].weight.detach() * factor).cpu().contiguous(),
                        f"{key}.alpha": torch.tensor(float(config.lora_alpha))}  # fmt: skip
    version, architecture = family.versions(unet, run.models.schedule.prediction_type)
    content, is_v = save(tensors), run.models.schedule.prediction_type == "v_prediction"
    header = int.from_bytes(content[:8], "little") + 8  # which the hash leaves out
    about = {"ss_base_model_version": version, "ss_v2": str(version.startswith("sd_v2")), "ss_output_name": path.stem,
             "ss_v_parameterization": str(is_v), "ss_sd_model_name": Path(args.pretrained_teacher_model).name,
             "ss_network_module": "networks.lora", "ss_network_dim": str(config.r),
             "ss_network_alpha": f"{config.lora_alpha:g}", "modelspec.sai_model_spec": "1.0.0",
             "modelspec.architecture": f"{architecture}/lora", "modelspec.title": path.parent.name,
             "modelspec.implementation": "sgm" if family.has_sgm_names else "diffusers",
             "modelspec.resolution": f"{args.resolution}x{args.resolution}",
             "modelspec.prediction_type": "v" if is_v else "epsilon",
             "modelspec.usage_hint": f"{METHOD.scheduler.__name__}, {usage(args, False)[0]}",
             "modelspec.hash_sha256": "0x" + hashlib.sha256(content[header:]).hexdigest()}  # fmt: skip
    save_file(tensors, path, metadata=about)
    sort_metadata(path)


def open_repository(args):
    """Makes the repository of --push_to_hub if it is not there, and puts its whole name into `hub_model_id`."""
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        args.hub_model_id = create_repo(name, token=args.hub_token, exist_ok=True).repo_id
    except Exception as error:  # no access, no network, no such name
        fail(f"--push_to_hub {name}: {first_line(error)}")


def publish(run, patterns):
    """Adds the pictures of these weights and the model card to what was exported; uploads that and nothing else."""
    args, output = run.args, Path(run.args.output_dir)
    grid = output / "validation" / f"step-{run.step}.png"  # any others are of other weights
    (output / "samples.png").unlink(missing_ok=True)
    if grid.is_file():
        shutil.copyfile(grid, output / "samples.png")
    (output / "README.md").write_text(model_card(run, grid.is_file()), encoding="utf-8")
    share(output.rglob("*.safetensors"), output / "README.md")
    if args.push_to_hub:
        try:
            upload_folder(repo_id=args.hub_model_id, folder_path=output, token=args.hub_token,
                          commit_message=f"Step {run.step}",
                          allow_patterns=["README.md", "samples.png", *patterns])  # fmt: skip
        except Exception as error:  # the hub, its HTTP client and the network raise many kinds
            fail(f"--push_to_hub: {first_line(error)}; the model is whole in {output}")


OWN_GUIDANCE = ("No guidance is built in (arXiv:2405.18407): as with its teacher, guidance_scale (from 1 to 7.5) and "
                "negative prompt are yours. Above 1 a step takes two evaluations of the network.")  # fmt: skip


def example(run):
    """The part of the model card that says how to use the model: the method's call, and how the files are loaded."""
    args, embeds_w = run.args, bool(run.nets["student"].guidance_dim)
    call, words = usage(args, embeds_w)
    repository, scheduler = json.dumps(args.hub_model_id or args.output_dir), METHOD.scheduler.__name__
    if args.lora_rank:
        kind, method = "DiffusionPipeline", "from_pretrained"
        if os.path.isfile(args.pretrained_teacher_model):
            kind, method = run.models.family.pipeline.__name__, "from_single_file"
        load = f"""from diffusers import {kind}, {scheduler}

repository = {repository}
pipe = {kind}.{method}({json.dumps(args.pretrained_teacher_model)})
pipe.load_lora_weights(repository, weight_name="pytorch_lora_weights.safetensors")
pipe.scheduler = {scheduler}.from_pretrained(repository, subfolder="scheduler")"""
        files = """`pytorch_lora_weights.safetensors` is the EMA adapter, `pytorch_lora_weights_online.safetensors` the
one that the optimizer moved, `*_kohya.safetensors` the EMA one for ComfyUI and A1111."""
    else:
        load = f"""from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({repository})"""
        files = "`unet` is the EMA network, `unet_online` the one that the optimizer moved."
    if not embeds_w and args.validation_student_guidance_scale > 1:
        negative = args.validation_negative_prompt or "blurry, low quality"
        call += f", negative_prompt={json.dumps(negative, ensure_ascii=False)}"
    if is_guided_by_user(args) and run.models.zeros_for_empty:
        words += (" Empty prompts were trained as zeros, from which diffusers (without negative_prompt) and A1111 "
                  "guide; in ComfyUI put the node ConditioningZeroOut behind an empty negative prompt.")  # fmt: skip
    if not (args.ema_decay or args.export_ema_decay):
        files = "There is no EMA of the weights: both files that hold them hold the same."
    return f"""```python
{load}
prompt = {json.dumps(load_prompts(args)[0][0], ensure_ascii=False)}
image = pipe(prompt, {call}).images[0]
```

{words}
{files}"""


def model_card(run, has_samples):
    """The README.md of the exported model: usage, samples, arguments, base model and its licence."""
    args, base, licence = run.args, run.args.pretrained_teacher_model, "unknown"
    with contextlib.suppress(Exception):  # no card, or no network: the licence is then for the reader to look up
        card = base if not os.path.exists(base) else Path(base, "README.md")  # of a single file: none
        licence = ModelCard.load(card, ignore_metadata_errors=True).data.license or licence
    kind, tags = ("LoRA", f"lora, {METHOD.tag}") if args.lora_rank else ("model", METHOD.tag)
    return f"""---
license: {licence}
base_model: {json.dumps(base)}
library_name: diffusers
tags: [text-to-image, stable-diffusion, {tags}]
---

# {Path(args.output_dir).resolve().name}

A {METHOD.name} {kind} ({METHOD.papers}) made from `{base}` (licence: {licence}), for few steps:

{example(run)}
{"![Teacher and student side by side](samples.png)" if has_samples else ""}

Arguments:

```json
{json.dumps(public_args(args), indent=2, ensure_ascii=False)}
```
"""


# -------------------------------------------------------------------------------------------- validation and logging
DEFAULT_PROMPTS = ["a lighthouse on a cliff at dawn, oil painting", "portrait photo of an old fisherman, soft light",
                   "a bowl of ramen, food photography", "a red fox in the snow"]  # fmt: skip
BATCH = 8  # pictures that are drawn at once
MOST_ROWS = 9  # of a grid; of more prompts some are drawn, from the first to the last
LEAST_PAIRS, LEAST_SET = 8, 256  # pictures from which on a feature distance, and a Fréchet distance, says something
LABELS = {"teacher": "teacher", "untrained": "untrained student", "student": "student",
          "target": "student, as exported"}  # fmt: skip


def load_prompts(args):
    """Returns the validation prompts, and for each file of prompts its name → the indices of its lines."""
    prompts, groups = [], {}
    for entry in args.validation_prompts:
        lines = [entry]
        if entry.endswith(".txt"):
            try:
                lines = decode_text(Path(entry).read_bytes(), "strict").splitlines()
                lines = [line.strip() for line in lines if line.strip()]
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
    """Pictures as users will make them: the exported scheduler, which may add fresh noise between its steps."""
    scheduler.set_timesteps(steps, device=noise.device)
    generator, x = torch.Generator(noise.device).manual_seed(args.seed), noise
    for t in scheduler.timesteps:
        output, options = net(x, t.expand(len(x)), c, w), {"generator": generator, **sample_options(args)}
        x = scheduler.step(output, t, x, return_dict=False, **options)[0]
    return x


class Stopped(Exception):
    """A signal ended a validation, on all ranks."""


def gather_parts(run, parts):
    """Joins what the ranks made of their pictures, lists of tensors (pictures, …), in order: on rank 0, else None."""
    ranks = [parts]
    if run.host_group:
        ranks = [None] * run.accelerator.num_processes if run.accelerator.is_main_process else None
        torch.distributed.gather_object([part.cpu() for part in parts], ranks, group=run.host_group)
    return ranks and torch.cat(sum(ranks, []))


class Sampler:
    """Draws the validation pictures of every network from the same noise and prompts, whatever the number of ranks:
    each draws its share, `chunk` at a time, which are the batches of a single rank where there is one for each.

    `size` is (width, height). Images are (prompts × seeds, 3, height, width), on the CPU. Its generators are its own.
    """

    def __init__(self, run, size):
        args, models = run.args, run.models
        self.run, self.seeds = run, args.num_validation_images
        self.prompts, self.groups = load_prompts(args)
        self.guided = set()  # the networks that took two evaluations a step
        width, height = (side // 2 ** (len(models.vae.config.block_out_channels) - 1) for side in size)
        shape = (len(self.prompts) * self.seeds, models.vae.config.latent_channels, height, width)
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(args.seed)).to(run.accelerator.device)
        self.chunk = min(BATCH, math.ceil(len(self.noise) / run.accelerator.num_processes))
        with lent(models.text_encoders, self.noise.device):
            parts = [encode_prompts(models, self.prompts[i : i + 32]) for i in range(0, len(self.prompts), 32)]
            c = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            self.uncond = encode_uncond(models, args.validation_negative_prompt)
        self.c = {name: value.repeat_interleave(self.seeds, dim=0) for name, value in c.items()}
        if models.family.has_time_ids:  # neither resized nor cropped
            ids = torch.tensor([[*size[::-1], 0, 0, *size[::-1]]], device=self.noise.device)
            self.c["time_ids"] = ids.expand(len(self.noise), -1)

    def own(self):
        """The slices of the pictures that this rank draws, one a turn: all ranks have as many, some of them empty."""
        turns = math.ceil(len(self.noise) / self.chunk / self.run.accelerator.num_processes)
        first = turns * self.run.accelerator.process_index
        return [slice(turn * self.chunk, (turn + 1) * self.chunk) for turn in range(first, first + turns)]

    def chunks(self, title):
        """Yields (noise, c) of each of its `own` slices. Raises Stopped after a signal to any rank."""
        hidden = not self.run.accelerator.is_main_process
        for part in tqdm(self.own(), title, leave=False, delay=2, unit="batch", disable=hidden):
            if wait_for_all(self.run):
                raise Stopped
            if len(self.noise[part]):
                yield self.noise[part], {name: value[part] for name, value in self.c.items()}

    def images(self, *what, **options):
        """All that `parts` yields on all ranks, as one tensor: on rank 0, else None."""
        return gather_parts(self.run, list(self.parts(*what, **options)))

    def parts(self, name, steps, stock=False):
        """Yields this rank's pictures of `teacher`, `untrained` (the teacher as consistency function) or one of the
        NETWORKS.

        All are guided as the pipelines do: by the embedding of a network that has one, else classifier-free.
        """
        args, models, net = self.run.args, self.run.models, self.run.nets["teacher" if name == "untrained" else name]
        schedule, scheduler = models.schedule, models.scheduler
        is_teachers = name == "teacher" or net.guidance_dim
        scale = args.validation_guidance_scale if is_teachers else args.validation_student_guidance_scale
        if scale > 1 and not net.guidance_dim:
            self.guided.add(name)
            net = functools.partial(guided_output, net, uncond=self.uncond)
        if name == "teacher":  # whose steps need not lie on the trained grid
            timesteps = [round(schedule.num_train_timesteps * (1 - j / steps)) - 1 for j in range(steps)]
        else:
            scheduler.set_timesteps(steps, device=self.noise.device)
            timesteps = scheduler.timesteps.tolist()
        for noise, c in self.chunks(f"{name}, {steps} steps"):
            given = {"c": c, "w": torch.full((len(noise),), scale - 1, device=noise.device)}
            if stock:
                x_0 = sample_stock(net, scheduler, noise, steps, args=args, **given)
            elif name == "teacher":
                guided = functools.partial(guided_prediction, net, schedule, uncond=None, **given)
                x_0 = sample_chain(guided, schedule, noise, timesteps)
            else:
                f = functools.partial(predict_x0, net, schedule, args=args, **given)
                x_0 = sample_chain(lambda x_t, t: [f(x_t, t)], schedule, noise, timesteps)  # noqa: B023
            yield decode_latents(models.vae, x_0, args.vae_encode_batch_size).cpu()


def validate(run):
    """Logs pictures of the exported student beside the teacher's, and how far each network's are from its 50 steps."""
    # not compiled: its batches are others than those of training, which would be compiled anew for any size
    eagerly, vae = torch.compiler.set_stance("force_eager"), lent(run.models.vae, run.accelerator.device)
    with contextlib.suppress(Stopped), eagerly, vae, without_dropout(run.nets):
        for index, size in enumerate(run.args.validation_resolutions):
            validate_size(run, size, f"-{size[0]}x{size[1]}" if index else "")
    wait_for_all(run)


def validate_size(run, size, suffix):
    """Validates at a (width, height). Pictures of all but the first size carry the size as a `suffix`.

    Collective: the ranks share the drawing. A student that began --from_scratch has no reference: only its pictures
    are drawn.
    """
    args, steps, images = run.args, run.args.validation_num_inference_steps, run.references.setdefault(suffix, {})
    with contextlib.ExitStack() as stack:
        if not images:
            sampler = Sampler(run, size)
            rows = np.linspace(0, len(sampler.prompts) - 1, min(len(sampler.prompts), MOST_ROWS)).round().astype(int)
            images |= {"sampler": sampler, "rows": rows, "shown": {}, "pairs": {}, "looks": {}}
            if not args.from_scratch:
                stack.enter_context(starting_model(run))
                for k in (50, *sorted({*steps} - {50})):
                    keep_pictures(run, images, "teacher", k, "teacher")
                for k in steps:
                    keep_pictures(run, images, "untrained", k, "untrained")
                if (count := len(sampler.noise)) < LEAST_SET and not suffix:
                    logger.info("fidelity/*_fd takes %d pictures, prompts × --num_validation_images: it is left out of "
                                "%d", LEAST_SET, count)  # fmt: skip
        metrics = {f"{name}{suffix}": value for name, value in extra_validation(run, images).items()}
    sampler, rows, exported = images["sampler"], images["rows"], chosen_networks(args.export_ema_decay)[-1]
    for k in () if args.from_scratch else steps:
        keep_pictures(run, images, "student", k, "student")
        if args.ema_decay or args.export_ema_decay:
            keep_pictures(run, images, "target", k, exported)  # as the figures call it
        else:
            for kept in (images["pairs"], images["looks"]):
                kept["target", k] = kept["student", k]
    few, first = copy.copy(sampler), rows * sampler.seeds
    few.noise, few.c = sampler.noise[first], {name: value[first] for name, value in sampler.c.items()}
    few.chunk = BATCH  # for any number of ranks: the scheduler's noise is that of a batch
    drawn = {f"student {k}": few.images(exported, k, stock=True) for k in steps}
    if run.accelerator.is_main_process:
        report(run, size, suffix, metrics, drawn)


def report(run, size, suffix, metrics, drawn):
    """Logs what was found at a size, the `metrics` and what follows from the pictures, and their grid: with {title:
    images} as they were `drawn` by the stock scheduler.
    """
    args, steps, images = run.args, run.args.validation_num_inference_steps, run.references[suffix]
    sampler, rows = images["sampler"], images["rows"]
    if not args.from_scratch:
        found = fidelity(images, steps, {"": range(len(sampler.prompts)), **sampler.groups}, sampler.seeds)
        metrics |= {key.replace("fidelity", f"fidelity{suffix}", 1): value for key, value in found.items()}
        print_fidelity(found, steps, sampler, size, args)
    if metrics:
        write_metrics(run, metrics)
    start = "teacher" if METHOD.has_teacher else "start"
    titles = {("teacher", k): f"{start} {k}" for k in (50, 4, 2, 1)} | {("untrained", 1): "untrained 1"}
    pictures = {title: images["shown"][key] for key, title in titles.items() if key in images["shown"]}
    pictures |= {title: to_bytes(each) for title, each in drawn.items()}
    grid = draw_grid(pictures, [sampler.prompts[row] for row in rows])
    path = Path(args.output_dir, "validation", f"step-{run.step}{suffix}.png")
    try:
        path.parent.mkdir(exist_ok=True)
        grid.save(path)
    except OSError as error:
        logger.warning("%s cannot be written: %s", path, error)
    for tracker in run.accelerator.trackers:
        kwargs = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        if hasattr(tracker, "log_images"):
            tracker.log_images({f"validation{suffix}": np.asarray(grid)[None]}, step=run.step, **kwargs)


def to_bytes(pictures):
    """Pictures in [0, 1] → uint8."""
    return (pictures * 255).round().byte()


def keep_pictures(run, images, name, k, network):
    """Draws the pictures of a network at k steps, and keeps on rank 0 (None elsewhere) those that are shown, and of all
    what figures need of them.

    Whole stay only the teacher's of 50 steps, the `reference`, which are drawn first: on each rank its own.
    """
    sampler, chunk = images["sampler"], run.args.vae_encode_batch_size
    parts = [to_bytes(part) for part in sampler.parts(network, k)]
    pairs = [compare_pairs(*pair) for pair in zip(parts, images.setdefault("reference", parts), strict=True)]
    looks = [vae_statistics(run.models.vae, part, chunk) for part in parts]
    is_shown = np.isin(np.arange(len(sampler.noise)), images["rows"] * sampler.seeds)
    shown = [part[is_shown[own]] for part, own in zip(parts, sampler.own(), strict=False)]
    for kept, found in {"pairs": pairs, "looks": looks, "shown": shown}.items():
        images[kept][name, k] = gather_parts(run, found)


def fidelity(images, steps, groups, seeds):
    """PSNR (dB) to the teacher's 50 steps and the share of their edges: `fidelity/<network>_psnr_k<k>` and `…_edges_…`,
    also by prompt file; and feature_distances. PSNR alone rewards blur.
    """
    metrics = {}
    for name, k in itertools.product(LABELS, steps):
        pairs = images["pairs"][name, k].unflatten(0, (-1, seeds))
        for group, prompts in groups.items():
            psnr, shared, all_edges = pairs[list(prompts)].mean(dim=(0, 1)).tolist()
            suffix = f"k{k}/{group}".rstrip("/")
            metrics[f"fidelity/{name}_psnr_{suffix}"] = round(psnr, 3)
            metrics[f"fidelity/{name}_edges_{suffix}"] = round(shared / max(all_edges, 1e-12), 3)
    return metrics | feature_distances(images["looks"], steps, groups, seeds)


def compare_pairs(pictures, references):
    """PSNR in dB, <∇picture, ∇reference> and <∇reference, ∇reference> of each pair of uint8, float32 (pictures, 3).

    The ratio of the products is the share of the reference's edges that a picture has: below 1 where it is blurred or
    they are elsewhere, above 1 where it is sharper. Speckle, which raises the mean gradient, adds nothing on average.
    """
    a, b = pictures / 255, references / 255
    gradients = [(a.diff(dim=dim), b.diff(dim=dim)) for dim in (2, 3)]
    products = [sum((pair[i] * pair[1]).mean(dim=(1, 2, 3)) for pair in gradients) for i in (0, 1)]
    psnr = -10 * (a - b).square().mean(dim=(1, 2, 3)).clamp_min(1e-10).log10()
    return torch.stack([psnr, *products], dim=1)


@torch.no_grad()
def vae_statistics(vae, pictures, chunk):
    """Mean and standard deviation of every channel after each block of the VAE's encoder: uint8 (pictures, 3, height,
    width) → float64 (pictures, 2 × channels). They see texture and colour, and little of what is in a picture.
    """
    found, encoder = [], vae.encoder
    for part in pictures.split(chunk):
        x, values = encoder.conv_in((part.to(vae.device) / 127.5 - 1).to(vae.dtype)), []
        for block in (*encoder.down_blocks, encoder.mid_block):
            x = block(x)
            values += [statistic(x.flatten(2).float(), dim=-1) for statistic in (torch.mean, torch.std)]
        found.append(torch.cat(values, dim=1).cpu().double())
    return torch.cat(found).nan_to_num(0, 0, 0)  # of a VAE that overflows in fp16


def frechet_distance(a, b):
    """|μ_a − μ_b|² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½) of float64 features (pictures, width)."""
    root = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).sqrt().real.sum()
    return (a.mean(dim=0) - b.mean(dim=0)).square().sum() + (a.var(dim=0) + b.var(dim=0)).sum() - 2 * root


def feature_distances(looks, steps, groups, seeds):
    """Distances of vae_statistics by (network, k) to those of the teacher's 50 steps, which standardise them.

    `feature_distance` is the root mean square difference of a pair, on average; `fd` the Fréchet distance along the 32
    principal axes. `floor_…` is that of odd to even seeds of the teacher; of as many more pictures fd is as much less.
    """
    reference, metrics = looks["teacher", 50], {}
    if len(reference) < LEAST_PAIRS:
        return metrics
    mean, std = reference.mean(dim=0), reference.std(dim=0, correction=0) + 1e-8
    if len(reference) >= LEAST_SET:  # else no set is as large
        axes = torch.linalg.svd((reference - mean) / std, full_matrices=False).Vh[:32].T
    looks = {key: ((look - mean) / std).unflatten(0, (-1, seeds)) for key, look in looks.items()}
    for group, prompts in ((group, list(prompts)) for group, prompts in groups.items()):
        teacher = looks["teacher", 50][prompts]
        sets = {f"{name}_{{}}_k{k}": (looks[name, k][prompts], teacher) for name in LABELS for k in steps}
        if seeds > 1:
            sets["floor_{}"] = [teacher[:, i : seeds // 2 * 2 : 2] for i in (0, 1)]
        for key, (a, b) in sets.items():
            found = {"feature_distance": (a - b).square().mean(dim=-1).sqrt().mean()}
            if len(prompts) * seeds >= LEAST_SET:
                found["fd"] = frechet_distance(*((x @ axes).flatten(0, 1) for x in (a, b))) * a.shape[1] / seeds
            metrics |= {f"fidelity/{key.format(figure)}/{group}".rstrip("/"): round(value.item(), 3)
                        for figure, value in found.items()}  # fmt: skip
    return metrics


def print_fidelity(metrics, steps, sampler, size, args):
    """Prints tables of the PSNRs and Fréchet distances, for all prompts and for each of several files of them."""
    guided = {name for name in LABELS if ("teacher" if name == "teacher" else "student") in sampler.guided}
    labels = LABELS | {name: f"{LABELS[name]}, guided (2 evaluations a step)" for name in guided}
    width = max(map(len, labels.values()))
    scale, students = args.validation_guidance_scale, args.validation_student_guidance_scale
    own = f" (the student's {students:g})" if "student" in guided and students != scale else ""
    lines = [f"To the teacher's 50 steps at {size[0]}x{size[1]}: deterministic chain, guidance scale {scale:g}{own}, "
             f"{len(sampler.prompts)} prompts × {sampler.seeds} seeds"]  # fmt: skip
    groups = ("", *(group for group, prompts in sampler.groups.items() if len(prompts) < len(sampler.prompts)))
    for title, group in itertools.product(("PSNR in dB", "Fréchet distance"), groups):
        figure, tail = "psnr" if "PSNR" in title else "fd", f"/{group}".rstrip("/")
        if f"fidelity/student_{figure}_k{steps[0]}{tail}" in metrics:
            lines.append(f"{title + (group and f', {group}'):{width + 2}}" + "".join(f"{k:8}" for k in steps))
            for name, label in labels.items():
                values = [metrics[f"fidelity/{name}_{figure}_k{k}{tail}"] for k in steps]
                lines.append(f"  {label:{width}}" + "".join(f"{value:8.2f}" for value in values))
            if f"fidelity/floor_{figure}{tail}" in metrics:
                lines.append(f"  {'teacher, other noise':{width}}{metrics[f'fidelity/floor_{figure}{tail}']:8.2f}")
    tqdm.write("\n".join(lines))


def find_font(text, size=13):
    """A font for a text: PIL's own where it has all letters, else of those installed the one that lacks the fewest."""

    def count_missing(font):
        box = bytes(font.getmask("\uffff"))  # what a font shows for a letter that it lacks
        return sum(bytes(font.getmask(letter)) == box for letter in {*text} if not letter.isspace())

    best = ImageFont.load_default(size)
    folders = [Path(root).expanduser() for root in ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts",
               "~/.local/share/fonts", "/System/Library/Fonts", "C:/Windows/Fonts")]  # fmt: skip
    if package := importlib.util.find_spec("fontpkg_noto_sans"):
        folders.insert(0, Path(package.origin).parent)
    missing, files = count_missing(best), (path for folder in folders for path in sorted(folder.rglob("*.[to]t[fc]")))
    while missing and (path := next(files, None)):
        with contextlib.suppress(OSError):  # not a font after all
            font = ImageFont.truetype(path, size)
            if (count := count_missing(font)) < missing:
                best, missing = font, count
    if missing:
        logger.warning("No font here has %d letters of the validation prompts: boxes stand for them", missing)
    return best


def draw_grid(columns, prompts):
    """Draws uint8 images side by side: a row a prompt, a titled column for each of {title: (prompts, 3, h, w)}."""
    height, width = next(iter(columns.values())).shape[-2:]
    enlarged, left, top, gap = max(1, 96 / height), 150, 24, 4
    cell = round(width * enlarged), round(height * enlarged)
    size = (left + len(columns) * (cell[0] + gap), top + len(prompts) * (cell[1] + gap))
    grid, font = Image.new("RGB", size, "white"), find_font("".join(prompts))
    pen = ImageDraw.Draw(grid)
    for row, prompt in enumerate(prompts):
        pen.multiline_text((gap, top + row * (cell[1] + gap)), textwrap.fill(prompt[:100], 20), "black", font)
    for column, (title, images) in enumerate(columns.items()):
        x = left + column * (cell[0] + gap)
        pen.text((x, gap), title, "black", font)
        for row, image in enumerate(images):
            picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
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
    """Loss, gradient norm, and sums and counts of the bins, of the steps since the last log: a list (ranks, steps,
    2 + 2 bins), the same on every rank.
    """
    return run.accelerator.gather(torch.stack(run.history)[None]).tolist() if run.history else []


def loss_by_time(values, total):
    """Sums and counts of the bins, (2 bins,) → {"loss/t0-249": their mean, …}, without the bins that had no sample."""
    (sums, counts), bins = values.view(2, -1).tolist(), len(values) // 2
    edges = [math.ceil(i * total / bins) for i in range(bins + 1)]
    return {f"loss/t{edges[i]}-{edges[i + 1] - 1}": sums[i] / counts[i] for i in range(bins) if counts[i]}


def log_metrics(run, clock, progress):
    """Logs the means since the last log: the only place where a plain training step waits for the device.

    Ends the run, on all ranks, if ten steps in a row had no finite loss.
    """
    args, accelerator = run.args, run.accelerator
    history = torch.tensor(gather_history(run))
    losses, grad_norms = history[..., :2].mean(dim=0).T
    # infinite gradients are usual where the fp16 scaler handles them
    good = losses.isfinite() & (grad_norms.isfinite() | (accelerator.scaler is not None))
    for is_good in good.tolist():
        run.nonfinite_steps += not is_good
        run.nonfinite_in_a_row = 0 if is_good else run.nonfinite_in_a_row + 1
        if run.nonfinite_in_a_row == 10:
            fail("ten steps in a row had a non-finite loss; try bf16 instead of fp16, a lower --learning_rate, and a "
                 "VAE that does not overflow in fp16 (--pretrained_vae_model_name_or_path)")  # fmt: skip
    scale = accelerator.scaler.get_scale() if accelerator.scaler else None
    if scale is not None:  # accelerate's step_was_skipped does not see what a fused optimizer skips on the device
        run.skipped_steps += (~grad_norms.isfinite()).sum().item()
    if scale is not None and scale < 2**-10:  # halved 26 times without a step that went well
        fail(f"fp16's gradients overflow at a scale of {scale:.1e}: nothing is learnt any more; try bf16, a lower "
             "--learning_rate, or a VAE that does not overflow (--pretrained_vae_model_name_or_path)")  # fmt: skip
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
    if args.log_loss_bins:
        metrics |= loss_by_time(history[:, good, 2:].sum(dim=(0, 1)), run.models.schedule.num_train_timesteps)
    if scale is not None:
        metrics |= {"skipped_steps": run.skipped_steps, "scale": scale}
    run.history.clear()
    run.reader.waited, clock["time"], clock["step"] = 0.0, time.perf_counter(), run.step
    if accelerator.is_main_process:
        write_metrics(run, metrics)
        progress.set_postfix_str(f"loss {math.nan if loss is None else loss:.4g}, {speed:.3g} images/s")


# --------------------------------------------------------------------------------------------------------- arguments
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit", "lion8bit", "adafactor", "prodigy", "radam")
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
PATHS = ("pretrained_teacher_model", "single_file_config", "pretrained_vae_model_name_or_path", "cache_dir",
         "init_from", "init_lora", "train_shards_path_or_url", "output_dir", "resume_from_checkpoint",
         "validation_prompts")  # fmt: skip
LORA_FLAGS = ("init_lora", "lora_alpha", "lora_dropout", "lora_target_modules", "export_fused")


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
    add("--pretrained_teacher_model", "--pretrained_model_name_or_path", required=True,
        help="SD 1.x, 2.x or XL to distil, or to start from: hub id, folder or .safetensors file")  # fmt: skip
    add("--single_file_config", help="hub id or folder with the configuration that belongs to that file (default: the "
        "original model's, from the hub)")  # fmt: skip
    add("--variant", help="weights of the teacher to take (default: the plain ones; fp16 if there are no others)")
    add("--pretrained_vae_model_name_or_path", help="another VAE: hub id, folder or .safetensors file")
    add("--teacher_revision", help="revision of the teacher's repository")
    add("--revision", help="revision of the VAE's repository (--pretrained_vae_model_name_or_path)")
    add("--cache_dir", help="where downloaded models are kept")
    add("--init_from", help="start from the output folder of an earlier run")
    add("--cast_teacher_unet", action=argparse.BooleanOptionalAction, help="teacher, or a LoRA's base, in the compute "
        "precision (default)")  # fmt: skip
    add("--offload_ema", action="store_true", help="keep averages on the CPU but for their passes and updates")
    add("--gradient_checkpointing", action="store_true", help="recompute activations: less memory, slower")
    add("--enable_xformers_memory_efficient_attention", action="store_true", help="xformers instead of PyTorch's sdpa")
    add("--compile", action="store_true", help="torch.compile the U-Nets: minutes at the start, faster afterwards")
    add("--half_precision_norms", action=argparse.BooleanOptionalAction, default=True, help="norms of the U-Net on a "
        "GPU in the precision of their input: a quarter less memory than in float32, as autocast has them")  # fmt: skip


def add_lora_args(parser):
    add = parser.add_argument_group("LoRA").add_argument
    add("--lora_rank", type=number(int, 0), help="rank of the adapter; 0: the whole U-Net is trained")
    add("--lora_alpha", type=number(float, 1e-9), help="its scale is alpha / rank (default: the rank)")
    add("--lora_dropout", type=number(float, 0, 1), default=0.0, help="dropout of the adapter's input")
    add("--lora_target_modules", nargs="+", metavar="NAME", help="layers, by the end of their names (default: "
        "attention, feed-forward, convolutions, time projections)")  # fmt: skip
    add("--init_lora", help="go on from this LoRA: hub id, folder or file; its ranks, alphas and layers stay")
    add("--base_precision", default="none", choices=["none", "int8", "nf4"], help="quantise the base (bitsandbytes)")
    add("--export_fused", action="store_true", help="also a whole pipeline with the adapter merged, in fused/")


def add_data_args(parser):
    add = parser.add_argument_group("data").add_argument
    add("--train_shards_path_or_url", nargs="+", required=True, metavar="SHARDS",
        help="tar shards: brace patterns, paths, URLs, pipe: commands, or a .txt list with one a line")  # fmt: skip
    add("--max_train_samples", type=number(int, 1), help="samples an epoch, without --max_train_steps (files: counted)")
    add("--encoded_shards", action=argparse.BooleanOptionalAction, help="read the latents and text embeddings that "
        "prepare_shards.py stored (default: if the first sample has them)")  # fmt: skip
    add("--resolution", type=number(int, 1), help="side of the square training images, in pixels; root of the area of "
        "those that prepare_shards.py cropped to buckets")  # fmt: skip
    add("--interpolation_type", default="bilinear", choices=sorted(INTERPOLATION), help="filter of the resize")
    add("--center_crop", action="store_true", help="crop the centre instead of a random place")
    add("--random_flip", action="store_true", help="mirror half of the images")
    add("--use_fix_crop_and_size", action="store_true", help="tell SDXL that no image was resized or cropped")
    add("--proportion_empty_prompts", type=number(float, 0, 1), default=0.0, help="share of captions replaced by '' "
        "(SDXL: zeros, as its pipeline); with w = 0, guidance and negative prompts stay with the user")  # fmt: skip
    add("--min_image_size", type=number(int, 0), default=0, help="skip samples whose JSON gives a smaller side")
    add("--max_pwatermark", type=float, default=0.5, help="skip samples whose JSON gives a higher pwatermark")
    add("--max_bad_samples", type=number(float, 0, 1), default=0.5, help="stop if a larger share of 1,000 is broken")
    add("--shuffle_buffer_size", type=number(int, 1), default=1000, help="undecoded samples a loader worker shuffles")
    add("--shard_timeout", type=float, default=60.0, help="seconds without data until a URL or pipe is given up")
    add("--dataloader_num_workers", type=number(int, 0), default=4, help="loader processes for each rank")


def add_training_args(parser):
    add = parser.add_argument_group("training").add_argument
    add("--num_ddim_timesteps", type=number(int, 1), help="N, points of the grid of times")
    add("--ema_decay", type=number(float, 0, 1), help="decay of the target network θ⁻; 0: θ itself")
    add("--export_ema_decay", type=number(float, 0, 1), default=0.0, help="decay of an average that is validated and "
        "exported instead of θ⁻; 0: θ⁻ is. Both are float32 copies: in memory they add up")  # fmt: skip
    add("--seed", type=int, default=0, help="of data order, noise, timesteps and guidance weights")
    add("--train_batch_size", type=number(int, 1), default=16, help="images per process and micro-step")
    add("--gradient_accumulation_steps", type=number(int, 1), default=1, help="micro-steps in an optimizer step")
    add("--num_train_epochs", type=number(int, 1), default=100, help="epochs, where --max_train_steps is not given")
    add("--max_train_steps", type=number(int, 1), help="optimizer steps in all (default: --num_train_epochs)")
    add("--learning_rate", type=number(float, 0), help="peak learning rate (default: 8e-6, of a LoRA 1e-4, prodigy 1)")
    add("--scale_lr", action="store_true", help="multiply it by batch size × accumulation × processes")
    add("--lr_scheduler", choices=LR_SCHEDULERS, help="of the learning rate, over --max_train_steps (default: cosine, "
        "to 0: a rate that stays high ends in poorer pictures; or as the run that is resumed had it)")  # fmt: skip
    add("--lr_warmup_steps", type=number(int, 0), help="steps of linear warm-up, not of 'constant' (default: a tenth "
        "of the run, at most 500; or as the run that is resumed had it)")  # fmt: skip
    add("--optimizer", default="adamw", choices=OPTIMIZERS, help="8-bit ones need a quarter of the memory")
    add("--use_8bit_adam", action="store_true", help="the same as --optimizer adamw8bit")
    add("--adam_beta1", type=number(float, 0, 0.99999), default=0.9, help="decay of the first moment")
    add("--adam_beta2", type=number(float, 0, 0.99999), default=0.999, help="decay of the second moment")
    add("--adam_weight_decay", type=number(float, 0), default=1e-2, help="decoupled weight decay")
    add("--adam_epsilon", type=number(float, 0), default=1e-8, help="epsilon of Adam")
    add("--max_grad_norm", type=number(float, 0), default=1.0, help="gradients are clipped to this norm (0: not)")
    add("--mixed_precision", choices=list(DTYPES), help="of the passes (default: as `accelerate config` says)")
    add("--allow_tf32", action="store_true", help="TF32 also for matrix products (fp16 and bf16: always)")
    add("--deterministic", action="store_true", help="deterministic GPU kernels, slower: resumes to the bit there, too")
    add("--vae_encode_batch_size", type=number(int, 1), help="images the VAE takes at once (default: a megapixel)")


def add_output_args(parser):
    add = parser.add_argument_group("output").add_argument
    add("--output_dir", help="folder of the run")
    add("--logging_dir", default="logs", help="tracker files, below --output_dir")
    add("--logging_steps", type=number(int, 1), default=10, help="steps between lines of metrics.jsonl (a host sync)")
    add("--log_loss_bins", type=number(int, 0, 100), default=0, help="also the mean loss in each of as many equal "
        "ranges of the time t, which shows where it fails (0: none)")  # fmt: skip
    add("--report_to", default="tensorboard", choices=[*LoggerType.list(), "none"], help="tracker")
    add("--tracker_project_name", help="project in the trackers")
    add("--tracker_run_name", help="name of the run in wandb, mlflow and the like")
    add("--checkpointing_steps", type=number(int, 0), default=500, help="steps between checkpoints (0: none)")
    add("--checkpoints_total_limit", type=number(int, 1), help="checkpoints to keep (default: all)")
    add("--resume_from_checkpoint", help="'latest' or a checkpoint folder")
    add("--validation_steps", type=number(int, 0), default=200, help="steps between validations (0: none)")
    add("--validation_prompts", nargs="+", default=DEFAULT_PROMPTS, help="texts, or .txt files with one prompt a line; "
        "pictures show nine of them")  # fmt: skip
    add("--validation_negative_prompt", default="", help="negative prompt in validation, of whatever is guided there")
    add("--validation_guidance_scale", type=number(float, 1), help="w + 1 in validation (distillation: the "
        "middle of those distilled; 7.5 where it stays with the user)")  # fmt: skip
    add("--validation_student_guidance_scale", type=number(float, 1), help="of a student without an embedding of w "
        "(default: 1, none; where guidance stays with the user, the teacher's)")  # fmt: skip
    add("--validation_num_inference_steps", type=number(int, 1), nargs="+", default=[1, 2, 4, 8], help="of the student")
    add("--validation_resolutions", type=sizes, help="WIDTHxHEIGHT,… of the pictures (default: --resolution)")
    add("--num_validation_images", type=number(int, 1), default=2, help="seeds for each prompt, for the "
        "fidelity; with 256 pictures in all, prompts × seeds, also Fréchet distances to the teacher's")  # fmt: skip
    add("--push_to_hub", action="store_true", help="upload what is exported")
    add("--hub_model_id", help="repository to push to (default: the name of --output_dir)")
    add("--hub_token", help="token for the upload; never written to any file")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action):
        is_empty = action.default is None or action.default is False or action.default == ""
        return action.help if is_empty else super()._get_help_string(action)


def is_guided_by_user(args):
    """Whether a student learns both halves of classifier-free guidance, neither of them guided, and is then used with
    it as the teacher is: w = 0 and a share of empty prompts (PCM, arXiv:2405.18407), or whatever a flag says.
    """
    may_be = METHOD.has_teacher and args.w_max == 0
    return may_be and (args.proportion_empty_prompts > 0 or (args.validation_student_guidance_scale or 1) > 1)


def settle_guidance(parser, args):
    """Fills in the guidance of validation, of the teacher and of a student that its user guides."""
    if METHOD.has_teacher and args.w_max == 0:
        args.unet_time_cond_proj_dim = None  # nothing to tell: its pipeline can guide the student
    is_guided = is_guided_by_user(args)
    scale = args.validation_student_guidance_scale or (args.validation_guidance_scale or 7.5 if is_guided else 1.0)
    if scale > 1 and not is_guided:
        parser.error("--validation_student_guidance_scale is of a student that was trained without guidance (w = 0)")
    args.validation_student_guidance_scale = scale
    if args.validation_guidance_scale is None:
        args.validation_guidance_scale = scale if scale > 1 else (args.w_min + args.w_max) / 2 + 1


def check_args(parser, args):
    """Refuses arguments that contradict each other."""
    if max(args.validation_num_inference_steps) > args.num_ddim_timesteps:
        parser.error("--validation_num_inference_steps must lie in 1 … --num_ddim_timesteps")
    if args.use_8bit_adam and args.optimizer not in (parser.get_default("optimizer"), "adamw", "adamw8bit"):
        parser.error(f"--use_8bit_adam is --optimizer adamw8bit, not {args.optimizer}")
    if args.mixed_precision not in DTYPES:
        parser.error(f"--mixed_precision {args.mixed_precision}, as accelerate's configuration says, is not supported")
    is_file = os.path.isfile(args.pretrained_teacher_model)
    if args.single_file_config and not is_file or args.variant and is_file:
        parser.error("--single_file_config is for a teacher that is one file, and --variant for one that is not")
    if args.init_from and args.init_lora:
        parser.error("--init_from of a LoRA is --init_lora: give one of them")
    if args.init_from and not Path(args.init_from).is_dir():
        parser.error(f"--init_from {args.init_from} is no folder")
    if args.offload_ema and (args.lora_rank or not (args.ema_decay or args.export_ema_decay)):
        parser.error("--offload_ema is for a U-Net with an --ema_decay of its own, or --export_ema_decay")
    for flag in LORA_FLAGS:
        if getattr(args, flag) and not args.lora_rank:
            parser.error(f"--{flag} needs --lora_rank")
    if args.base_precision != "none" and not args.lora_rank:
        parser.error("--base_precision quantises the base of a LoRA: give --lora_rank too")


def name_idle_flags(parser, args):
    """Warns of flags that are given, and do nothing beside the others."""
    adafactor = args.optimizer == "adafactor" and "--optimizer adafactor"
    idle = {"lr_warmup_steps": args.lr_scheduler == "constant" and "--lr_scheduler constant",
            "adam_beta1": adafactor, "adam_beta2": adafactor,
            "adam_epsilon": adafactor or args.optimizer == "lion8bit" and "--optimizer lion8bit",
            "unet_time_cond_proj_dim": args.lora_rank and "a LoRA"
            or METHOD.has_teacher and not args.w_max and "--w_max 0"}  # fmt: skip
    for flag, other in idle.items():
        if other and getattr(args, flag) != parser.get_default(flag):
            logger.warning("--%s is not used with %s", flag, other)


def parse_args(argv=None):
    """Reads the command line and refuses what can be known to be wrong without opening a file."""
    formatter = functools.partial(HelpFormatter, max_help_position=44, width=120)
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=formatter, allow_abbrev=False, fromfile_prefix_chars="@",
        usage="%(prog)s --pretrained_teacher_model MODEL --train_shards_path_or_url SHARDS [flags] [@file-with-flags]",
    )  # fmt: skip
    parser.convert_arg_line_to_args = lambda line: shlex.split(line.removeprefix("\ufeff"), comments=True)
    parser.set_defaults(unet_time_cond_proj_dim=None, from_scratch=False, dropout=None)  # if a method has no such flag
    groups = add_model_args, add_lora_args, add_data_args, add_method_args, add_training_args, add_output_args
    for add_group in groups:
        add_group(parser)
    parser.set_defaults(**DEFAULTS)
    try:
        args = parser.parse_args(argv)
    except ValueError as error:  # of shlex or a codec
        parser.error(f"an @file with flags cannot be read: {error}")
    for name, value in vars(args).items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # files could not be written, or not under this name, when all steps are done
            parser.error(f"--{name} is not in UTF-8")
        if name in PATHS and value:
            value = [os.path.expanduser(v) for v in value] if isinstance(value, list) else os.path.expanduser(value)
            setattr(args, name, value)
    check_method_args(parser, args)
    name_idle_flags(parser, args)
    settle_guidance(parser, args)
    if args.mixed_precision is None:
        args.mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    check_args(parser, args)
    if args.use_8bit_adam:
        args.optimizer = "adamw8bit"
    if args.learning_rate is None:
        args.learning_rate = 1.0 if args.optimizer == "prodigy" else 1e-4 if args.lora_rank else 8e-6
    if args.init_from and args.lora_rank:
        args.init_lora = args.init_from
    if args.cast_teacher_unet is None:
        args.cast_teacher_unet = args.mixed_precision != "no"
    if args.validation_resolutions is None:
        args.validation_resolutions = [[args.resolution, args.resolution]]
    if args.vae_encode_batch_size is None:  # more only needs more memory
        args.vae_encode_batch_size = max(1, 2**20 // args.resolution**2)
    return args


def check_launch():
    """Refuses what accelerate may be configured to, but not this script, and says which settings are not used."""
    for kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):  # rank 0 alone saves
        if parse_flag_from_env(f"ACCELERATE_USE_{kind}"):
            fail(f"{kind} is not supported; use distributed_type MULTI_GPU, and --optimizer adamw8bit to save memory")
    if os.environ.pop("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":  # which would compile whatever is prepared
        logger.warning("accelerate's configuration asks for dynamo, which is not used: --compile does that here")
    is_parallel = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if is_parallel and not torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        fail("several processes without a GPU do not find each other unless ACCELERATE_USE_CPU=true is set")


def check_environment(args):
    """Refuses what this machine cannot do: a folder it cannot write, fp16 without a GPU, packages that are missing."""
    output, xformers = Path(args.output_dir), args.enable_xformers_memory_efficient_attention
    check_launch()
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        fail(f"--output_dir {output} cannot be written: {error}")
    if args.mixed_precision == "fp16" and not torch.cuda.is_available():
        fail("--mixed_precision fp16 needs a GPU; use bf16 or no")
    if xformers and not torch.cuda.is_available():
        fail("--enable_xformers_memory_efficient_attention needs a GPU; without it PyTorch's attention is used")
    if args.base_precision != "none" and not torch.cuda.is_available():
        fail(f"--base_precision {args.base_precision} needs a GPU; without it the base is in the compute precision")
    if args.optimizer.startswith("paged") and not torch.cuda.is_available():
        fail(f"--optimizer {args.optimizer} needs a GPU; use adamw8bit")
    wanted = {"bitsandbytes": "8bit" in args.optimizer, "prodigyopt": args.optimizer == "prodigy",
              args.report_to: args.report_to not in ("all", "none"), "xformers": xformers}  # fmt: skip
    for package in (package for package, is_wanted in wanted.items() if is_wanted):
        try:
            __import__(package)
        except Exception as error:
            fail(f"a flag asks for {package}, which cannot be imported here ({error}); install it or drop the flag")
    if args.mixed_precision == "bf16" and torch.cuda.is_available():
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            logger.warning("this GPU only emulates bf16, slowly: --mixed_precision fp16 is faster on it")
    if not args.resume_from_checkpoint and list_checkpoints(output):
        fail(f"--output_dir {output} holds checkpoints; --resume_from_checkpoint latest, or another folder?")


def public_args(args):
    """The arguments as they may be written to files and trackers: without tokens."""
    prompts = ("validation_prompts", "validation_negative_prompt")
    return {k: v if k in prompts else redact(v) for k, v in vars(args).items() if k != "hub_token"}


# -------------------------------------------------------------------------------------------------------------- main
def make_accelerator(args):
    """Starts the processes' communication, logging and trackers."""
    config = ProjectConfiguration(args.output_dir, str(Path(args.output_dir, args.logging_dir)))
    # rank 0 saves and exports alone for longer than the ten minutes that a process group waits for it;
    # gradients lie in DDP's buckets; a compiled U-Net is cut at each bucket's end: one bucket for all of them then
    process_group = InitProcessGroupKwargs(timeout=datetime.timedelta(days=1))
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False,
                                        bucket_cap_mb=2**14 if args.compile else 25)  # fmt: skip
    accelerator = Accelerator(mixed_precision=args.mixed_precision, project_config=config,
                              kwargs_handlers=[process_group, ddp],
                              log_with=None if args.report_to == "none" else args.report_to)  # fmt: skip
    accelerator.gradient_accumulation_steps = args.gradient_accumulation_steps  # which the environment would override
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING, force=True)
    logger.setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity(logging.WARNING if accelerator.is_main_process else logging.ERROR)
        library.utils.logging.disable_progress_bar()
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if args.allow_tf32 or args.mixed_precision != "no":  # else PyTorch's default: TF32 for convolutions alone
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if args.compile:  # a size that comes up anew is compiled anew, but never silently run uncompiled
        torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = 64, True
        # or inductor (torch 2.13) may read a LoRA's gradient before it is summed up, and find it zero
        torch._inductor.config.reorder_for_peak_memory = False
    return accelerator


def make_optimizer(args, parameters, num_processes):
    """The optimizer, and its schedule, which is stepped once an optimizer step on every rank."""
    scale = args.train_batch_size * args.gradient_accumulation_steps * num_processes if args.scale_lr else 1
    settings = {"lr": args.learning_rate * scale, "weight_decay": args.adam_weight_decay}
    adam = {**settings, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, fused=True, **adam)
    elif args.optimizer == "radam":
        optimizer = torch.optim.RAdam(parameters, decoupled_weight_decay=True, **adam)
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


def check_guidance(args, student):
    """Refuses a student that would be guided twice, and warns where neither the run nor the user can guide it."""
    if is_guided_by_user(args) and student.guidance_dim:
        fail("with w = 0 and --proportion_empty_prompts or --validation_student_guidance_scale the user guides the "
             "student, which a U-Net that embeds w does not allow: give a range of w, or neither")  # fmt: skip
    if METHOD.has_teacher and not (args.w_max or args.proportion_empty_prompts or student.guidance_dim):
        use = "is badly guided" if is_guided_by_user(args) else "is for use without guidance, as SDXL-Turbo"
        logger.warning("Guidance is off (w = 0) and no prompt is emptied: the student does not learn the unconditional "
                       "half, and %s. For one that takes guidance and negative prompts, give "
                       "--proportion_empty_prompts 0.1", use)  # fmt: skip


def start_run(args, accelerator):
    """Checks the inputs, loads models, data and checkpoint, and returns the Run."""
    load_prompts(args)
    urls = expand_shards(args.train_shards_path_or_url)
    if os.path.isfile(args.pretrained_teacher_model):
        if accelerator.is_main_process:
            unpack_teacher(args)
        accelerator.wait_for_everyone()
    teacher = check_teacher(args)
    if args.use_fix_crop_and_size and not teacher.family.has_time_ids:
        logger.warning("--use_fix_crop_and_size is for SDXL, and not used with %s", teacher.family.name)
    checkpoint = find_checkpoint(args)
    shapes = {"time_ids": (6,)} if teacher.family.has_time_ids else {}
    found = [check_shards(urls, args, shapes) if accelerator.is_main_process else None]
    args.encoded_shards, args.bucketed_shards = broadcast_object_list(found)[0]
    if args.max_train_steps is None:
        images = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        samples = args.max_train_samples or accelerator.is_main_process and count_samples(urls, args)
        args.max_train_steps = args.num_train_epochs * math.ceil(broadcast_object_list([samples])[0] / images)
    args.lr_scheduler = args.lr_scheduler or "cosine"
    if args.lr_warmup_steps is None:
        args.lr_warmup_steps = min(500, args.max_train_steps // 10)
    models = load_models(args, teacher, accelerator)
    optimizer, lr_scheduler = make_optimizer(args, models.student_parameters, accelerator.num_processes)
    nets, optimizer = prepare(models, args, optimizer, accelerator)
    check_guidance(args, nets["student"])
    with lent(models.text_encoders, accelerator.device):
        has_uncond = METHOD.has_teacher and args.w_max > 0 and not nets["teacher"].guidance_dim
        uncond = encode_uncond(models, "") if has_uncond else None
        empty = find_empty(models, urls) if args.encoded_shards else {}
        empty = {name: value * (not models.zeros_for_empty) for name, value in empty.items()}
    shapes |= {name: tuple(value.shape[1:]) for name, value in empty.items()}
    shapes["mean"] = (models.vae.config.latent_channels, 0, 0)
    rank, world_size, state = accelerator.process_index, accelerator.num_processes, checkpoint and checkpoint["stream"]
    reader = BatchReader(ShardStream(urls, args, rank, world_size, state, shapes), accelerator.device)
    run = Run(args, accelerator, models, nets, optimizer, lr_scheduler, reader, uncond, empty)
    if world_size > 1:
        run.host_group = torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
    if checkpoint:
        load_checkpoint(run, checkpoint)
    trim_metrics(run)
    return run


def memory_savers(args):
    """What is still to be tried against an out-of-memory error, by the flags in use."""
    has_average = (args.ema_decay or args.export_ema_decay) and not args.lora_rank
    savers = {"a smaller --train_batch_size": args.train_batch_size > 1,
              "--gradient_checkpointing": not args.gradient_checkpointing,
              "--offload_ema": has_average and not args.offload_ema,
              "--optimizer adamw8bit": args.optimizer in ("adamw", "prodigy", "radam"),
              "shards that prepare_shards.py encoded (no VAE, no text encoder)": not args.encoded_shards,
              "a smaller --resolution": True}  # fmt: skip
    return [saver for saver, is_unused in savers.items() if is_unused]


def start_trackers(args, accelerator):
    """Writes args.json, and starts the trackers; their files lie below --output_dir."""
    Path(args.output_dir, "args.json").write_text(json.dumps(public_args(args), indent=2) + "\n", encoding="utf-8")
    config = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in public_args(args).items()}
    logs, name = str(Path(args.output_dir, args.logging_dir)), args.tracker_run_name
    options = {"wandb": {"dir": logs, "name": name}, "mlflow": {"run_name": name}, "trackio": {"name": name},
               "swanlab": {"experiment_name": name}}  # fmt: skip
    if accelerator.log_with:
        os.makedirs(logs, exist_ok=True)
    try:
        accelerator.init_trackers(args.tracker_project_name, config, options)
    except Exception as error:  # no login, no server: each tracker has errors of its own
        fail(f"--report_to {args.report_to} cannot start: {first_line(error)}")


def leave(error, run):
    """Ends one of several processes after an error, without NCCL's farewell: it may wait for those that wait for this
    process, which then never ends and says nothing. As it is, the launcher sees that it has ended, and ends the others.
    """
    code = error.code if isinstance(error, SystemExit) else "".join(traceback.format_exception(error))
    if not isinstance(code, int):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if run:  # after the line: workers that hang are waited for
        run.reader.close()
    os._exit(code if isinstance(code, int) else 1)


def main(argv=None):
    if os.environ.get("RANK", "0") != "0":  # what is said before accelerate knows, too, is said once a run
        logger.setLevel(logging.ERROR)
        warnings.simplefilter("ignore")
    args = parse_args(argv)
    check_environment(args)
    accelerator = make_accelerator(args)
    run = None
    try:
        run = start_run(args, accelerator)
        if accelerator.is_main_process:
            if args.push_to_hub:
                open_repository(args)
            start_trackers(args, accelerator)
        handle_signals(run)
        train(run)
        run.reader.close()
        if accelerator.is_main_process:
            publish(run, export(run))
            if os.path.isfile(args.pretrained_teacher_model):
                shutil.rmtree(hub_source(args)[0])
        accelerator.end_training()
    except torch.OutOfMemoryError as error:
        fail(f"out of device memory: {first_line(error)} Try {', '.join(memory_savers(args))}")
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            fail(f"a loader worker died: {error}; is there enough memory? go on with --resume_from_checkpoint latest")
        if "by peer" in str(error):  # as gloo says that a connection was closed or reset
            fail("another process of this run has ended: see its error, and go on with --resume_from_checkpoint latest")
        raise
    finally:
        error = sys.exc_info()[1]
        if error and accelerator.num_processes > 1 and torch.distributed.is_initialized():  # not through end_training
            leave(error, run)
        if run:
            run.reader.close()


if __name__ == "__main__":
    main()
