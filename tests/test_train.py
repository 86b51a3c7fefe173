"""Whole runs: each script from start to pictures; the engine's variants, exact resume, faults, export, flags, errors.

The engine is the same in all scripts, so that all but the first test and those of flags run the first script alone.
"""

import ast
import contextlib
import inspect
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from conftest import (
    FORK,
    LCM,
    LCM_LORA,
    LCM_XL_LORA,
    QUICK_VALIDATION,
    SCRIPT,
    SCRIPTS,
    assert_same_end,
    differences,
    edited,
    ends_with,
    forget_run,
    over,
    read_checkpoint,
    read_losses,
    read_metrics,
    renew_threads,
    run_main,
    run_script,
    run_two,
    tiny_args,
)
from diffusers import DDPMScheduler
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def run_and_kill(run, seconds=120):
    """Calls run() in a fork of this process, which is to kill itself."""

    def renewed():
        renew_threads()
        run()

    child = FORK.Process(target=renewed)
    child.start()
    child.join(seconds)
    assert child.exitcode == -signal.SIGKILL


def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


# ------------------------------------------------------------------------------------- each script, start to pictures


def check_export(case, output):
    """Weights are those of the last checkpoint; the scheduler is the stock one, and warns of nothing."""
    for name in ("target", "student"):
        assert not differences(case.weights(output, name), load_file(output / "checkpoint-4" / f"{name}.safetensors"))
    config = json.loads((output / "scheduler" / "scheduler_config.json").read_text())
    assert config["_class_name"] == case.scheduler
    loaded = getattr(diffusers, case.scheduler).from_pretrained(output, subfolder="scheduler")
    assert {**loaded.config, "_use_default_values": []} == {**config, "_use_default_values": []}
    names = inspect.signature(type(loaded)).parameters  # of others each user would be warned
    assert {name for name in config if not name.startswith("_")} == {*names}
    assert (config["beta_start"], config["prediction_type"], config["steps_offset"]) == (0.00085, "epsilon", 1)
    assert config["original_inference_steps"] == 10
    assert config["timestep_scaling"] == 9 or case.scheduler != "LCMScheduler"


def check_card(case, script, output):
    """Runs the very code that users copy; returns the pipeline."""
    card, names = (output / "README.md").read_text(), {}
    assert "license: creativeml-openrail-m\n" in card and f'base_model: "{output.parent / "teacher"}"\n' in card
    assert "(samples.png)" in card and Image.open(output / "samples.png").size[0] > 300
    assert '"num_ddim_timesteps": 10' in card and f"{script.METHOD.tag}]\n" in card
    if "--timestep_scaling_factor" in case.flags:
        assert '"timestep_scaling_factor": 9.0' in card
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names)
    assert names["image"].size == (16, 16) and names["prompt"] == "a fox"
    assert type(names["pipe"].scheduler).__name__ == case.scheduler
    return names["pipe"]


def check_pipeline(case, pipe):
    """A whole pipeline as stock diffusers runs it."""
    pipe.set_progress_bar_config(disable=True)
    one, other = (pipe("a fox", num_inference_steps=4, guidance_scale=scale, output_type="np",
                       generator=torch.Generator().manual_seed(0)).images[0] for scale in (8, 12))  # fmt: skip
    assert one.shape == (16, 16, 3) and (one != other).any()  # the scale counts
    assert pipe.unet.config.time_cond_proj_dim == (256 if case.embeds_w else None)


@over(SCRIPTS)
def test_from_start_to_pictures(case, script, train, teacher, tmp_path, on_call):
    """Trained, validated, killed while it writes a checkpoint, resumed to the bit, exported, loaded and used."""
    teacher = shutil.copytree(teacher, tmp_path / "teacher")
    (teacher / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n")
    flags = ["--mixed_precision", "bf16", "--gradient_accumulation_steps", "2", "--dataloader_num_workers", "1",
             "--proportion_empty_prompts", "0.5", "--validation_steps", "4", "--validation_prompts", "a fox",
             "--validation_num_inference_steps", "2", "--num_validation_images", "1"]  # fmt: skip
    whole = train(tmp_path / "run", *flags, teacher=teacher)
    losses = read_losses(whole)
    assert [step for step, *_ in losses] == [1, 2, 3, 4]
    assert all(0 < loss < 100 and 0 < norm < 1e4 for _, loss, norm, _ in losses)
    more = {"args.json", "metrics.jsonl", "checkpoint-2", "checkpoint-4", "validation", "samples.png"}
    assert {path.name for path in whole.iterdir()} == case.exported(whole) | more
    check_export(case, whole)
    pipe = check_card(case, script, whole)
    if not case.is_lora:
        check_pipeline(case, pipe)

    def run_and_die():
        on_call("save_file", 4, kill_self)
        train(tmp_path / "parts", *flags, "--validation_steps", "0", teacher=teacher)

    run_and_kill(run_and_die)
    assert (tmp_path / "parts" / "tmp-checkpoint-4").exists()
    parts = train(tmp_path / "parts", *flags, "--resume_from_checkpoint", "latest", teacher=teacher)
    assert not (parts / "tmp-checkpoint-4").exists()
    assert_same_end(parts, whole)
    (ended,) = [line for line in read_metrics(parts) if "lr" not in line]
    assert ended == read_metrics(whole)[-1] and ended["step"] == 4 and "fidelity/target_psnr_k2" in ended


# -------------------------------------------------------------------------------------------------------- variants


VARIANTS = [
    pytest.param({}, ["--loss_type", "huber", "--mixed_precision", "bf16", "--gradient_accumulation_steps", "2"],
                 id="epsilon, bf16"),
    pytest.param({"prediction_type": "v_prediction"}, ["--loss_type", "huber", "--no-cast_teacher_unet"], id="v"),
    pytest.param({"prediction_type": "sample"}, ["--mixed_precision", "bf16", "--random_flip", "--center_crop"],
                 id="sample, bf16"),
    pytest.param({"time_cond_proj_dim": 32},
                 ["--proportion_empty_prompts", "0.5", "--vae_encode_batch_size", "1", "--no-cast_teacher_unet",
                  "--mixed_precision", "bf16"], id="a teacher that embeds w"),
]  # fmt: skip


@pytest.mark.parametrize("pipeline, flags", VARIANTS)
def test_variants(case, train, make_teacher, tmp_path, pipeline, flags):
    teacher = make_teacher(case.pipeline, **pipeline)
    output = train(tmp_path / "run", *flags, teacher=teacher)
    assert all(0 < loss < 100 and 0 < norm < 1e4 for _, loss, norm, _ in read_losses(output))
    before, student, target = (load_file(next(Path(teacher, "unet").glob("*.safetensors"))),
                               case.weights(output, "student"), case.weights(output, "target"))  # fmt: skip
    moved, moved_less = (sum((net[name] - before[name]).abs().sum() for name in before) for net in (student, target))
    assert 0 < moved_less < moved
    assert {value.dtype for value in (*student.values(), *target.values())} == {torch.float32}
    projection = student["time_embedding.cond_proj.weight"]
    assert projection.shape[1] == pipeline.get("time_cond_proj_dim", 256) and projection.any()
    for part in ("vae", "text_encoder"):  # unrounded, whatever the precision of the training
        assert not differences(*(load_file(next(Path(run, part).glob("*.safetensors"))) for run in (teacher, output)))


def test_gradient_checkpointing_changes_nothing(train, straight, tmp_path):
    output = train(tmp_path, "--gradient_checkpointing")
    torch.testing.assert_close(read_losses(output), read_losses(straight), rtol=1e-3, atol=0)


def test_ema_on_the_cpu_changes_nothing(train, straight, tmp_path, monkeypatch):
    """On a CPU nothing moves, but the lent weights and the update layer by layer are those of a GPU."""
    seen, plain = [], torch.func.functional_call
    monkeypatch.setattr(torch.func, "functional_call", lambda *given: seen.append(1) or plain(*given))
    assert_same_end(train(tmp_path, "--offload_ema"), straight)
    assert len(seen) == 4


class Streams(TorchDispatchMode):
    """Stands in for CUDA's streams, and for what they order: every operation is noted with the stream it is put on, and
    must come after those of other streams that touch the same memory, by what each stream waited for (vector clocks).
    """

    def __init__(self):
        super().__init__()
        self.now, self.names = "main", ("main", "second")
        self.clocks = {name: dict.fromkeys(self.names, 0) for name in (*self.names, "host")}
        self.written, self.read, self.races, self.shared = {}, {}, [], set()

    def wait(self, name, other):
        self.clocks[name] = {key: max(value, self.clocks[other][key]) for key, value in self.clocks[name].items()}

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream.name
        yield
        self.now = before

    def handle(self, name):
        return SimpleNamespace(name=name, wait_stream=lambda other: self.wait(name, other.name),
                               synchronize=lambda: self.wait("host", name))  # fmt: skip

    def touch(self, storage, writes, function):
        clock = self.clocks[self.now]
        before = [self.written.get(storage), *(self.read.get(storage, {}).items() if writes else ())]
        for name, when in filter(None, before):
            self.shared.add(storage) if name != self.now else None
            if clock[name] < when:
                self.races.append(f"{function} on {self.now}")
        if writes:
            self.written[storage], self.read[storage] = (self.now, clock[self.now]), {}
        else:
            self.read.setdefault(storage, {})[self.now] = clock[self.now]

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function.is_view or function is torch.ops.aten.empty_like.default:  # which touch no memory
            return result
        self.clocks[self.now][self.now] += 1
        known = set()
        for argument, value in [
            *zip(function._schema.arguments, args, strict=False),
            *((a, kwargs[a.name]) for a in function._schema.arguments if a.name in kwargs),
        ]:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for tensor in tree_leaves(value):
                if torch.is_tensor(tensor) and tensor.numel():
                    known.add(tensor.untyped_storage()._cdata)
                    self.touch(tensor.untyped_storage()._cdata, writes, function)
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and (storage := tensor.untyped_storage()._cdata) not in known:
                self.written[storage], self.read[storage] = (self.now, self.clocks[self.now][self.now]), {}
        return result


@pytest.mark.parametrize("flags", [["--ema_decay", "0.5"], ["--ema_decay", "0", "--export_ema_decay", "0.5"],
                                   ["--export_ema_decay", "0.5", "--gradient_accumulation_steps", "2"]])  # fmt: skip
@pytest.mark.parametrize("spoilt", [None, "rejoin", "aside"])
def test_copies_on_the_second_stream_are_in_order(lcm, tiny, shards, tmp_path, monkeypatch, flags, spoilt):
    """Copies of offloaded averages race with nothing; without either way of waiting they would, which the test sees."""
    forget_run()
    args = lcm.parse_args(tiny_args(tiny, shards, tmp_path, "--offload_ema", *flags))
    run = lcm.start_run(args, lcm.make_accelerator(args))
    streams = Streams()
    monkeypatch.setattr(lcm, "second_stream", lambda: streams.handle("second"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams.handle(streams.now))
    monkeypatch.setattr(torch.cuda, "stream", streams.stream)
    if spoilt == "rejoin":
        monkeypatch.setattr(lcm, "rejoin", lambda **_: None)
    elif spoilt:
        monkeypatch.setattr(lcm, "aside", lambda: streams.stream(streams.handle("second")))
    with streams:
        for run.step in range(3):
            lcm.train_step(run)
    run.reader.close()
    assert bool(streams.races) == bool(spoilt), streams.races
    assert streams.shared and not run.nets["target"].weights
    lcm.export(run)
    assert spoilt == "rejoin" or streams.clocks["host"]["second"] == streams.clocks["second"]["second"] > 0


def test_accelerates_own_accumulation_does_not_win_over_the_flag(train, straight, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    assert_same_end(train(tmp_path), straight)


@pytest.mark.parametrize("weight, sizes", [("0", {2}), ("3", {2, 4})])
def test_no_unconditional_pass_without_guidance(script, train, tmp_path, monkeypatch, weight, sizes):
    seen, plain = set(), script.Denoiser.__call__
    monkeypatch.setattr(script.Denoiser, "__call__", lambda net, x, *args: (seen.add(len(x)), plain(net, x, *args))[1])
    train(tmp_path, "--w_min", weight, "--w_max", weight)
    assert seen == sizes


def test_epochs_give_the_steps(lcm, tiny, shards, tmp_path):
    arguments = tiny_args(tiny, shards, tmp_path, "--num_train_epochs", "2", "--train_batch_size", "6")
    del arguments[(at := arguments.index("--max_train_steps")) : at + 2]
    run_main(lcm, arguments)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]  # 21 samples, twice


@over([LCM])
def test_the_first_process_counts_for_all(case, teacher, shards, tmp_path):
    """What another counted, of a shard that it could not read, say, would let it wait for ever."""
    arguments = tiny_args(teacher, shards, tmp_path, "--num_train_epochs", "1", *case.flags)
    del arguments[(at := arguments.index("--max_train_steps")) : at + 2]

    def spoil(script):
        script.count_samples = lambda *_: 8 if os.environ["RANK"] == "0" else 400

    run_two(case.name, arguments, spoil)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("schedule, factors", [("linear", [0.5, 1, 0.5, 0]), ("constant_with_warmup", [0.5, 1, 1, 1]),
                                   ("constant", [1, 1, 1, 1])])  # fmt: skip
def test_learning_rates(train, tmp_path, schedule, factors):
    output = train(tmp_path, "--scale_lr", "--gradient_accumulation_steps", "3", "--learning_rate", "1e-4",
                   "--lr_scheduler", schedule, "--lr_warmup_steps", "2")  # fmt: skip
    assert [lr for *_, lr in read_losses(output)] == pytest.approx([6e-4 * factor for factor in factors])


def decaying_args(teacher, shards, output, *more):
    """tiny_args without a schedule: that is the default's."""
    arguments = tiny_args(str(teacher), shards, output, *more)
    del arguments[(at := arguments.index("--lr_scheduler")) : at + 2]
    return arguments


@over(SCRIPTS, "steps, warmup", [(9, 0), (40, 4), (100_000, 500)])
def test_the_rate_decays_by_default(case, script, teacher, shards, tmp_path, steps, warmup):
    """Warm-up for a tenth of the run, or 500 steps of a long one, then half a cosine to 0."""
    forget_run()
    args = script.parse_args(decaying_args(teacher, shards, tmp_path, *case.flags, "--max_train_steps", str(steps)))
    run = script.start_run(args, script.make_accelerator(args))
    assert (run.args.lr_scheduler, run.args.lr_warmup_steps) == ("cosine", warmup)
    (rate,), half = run.lr_scheduler.lr_lambdas, warmup + (steps - warmup) / 2
    assert [rate(warmup), rate(half), rate(steps)] == pytest.approx([1, 0.5, 0], abs=1e-9)
    assert not warmup or [rate(0), rate(warmup / 2)] == [0, 0.5]


# ---------------------------------------------------------------------------------------------------------- resume


@over([LCM, LCM_LORA])
def test_a_run_that_began_at_a_constant_rate_goes_on_so(straight, script, case, teacher, shards, tmp_path):
    """Which once was the default: the same command line changes nothing midway. Who asks for a decay gets it."""
    for name, more in (("same", []), ("asked", ["--lr_scheduler", "cosine", "--lr_warmup_steps", "0"])):
        shutil.copytree(straight / "checkpoint-2", tmp_path / name / "checkpoint-2")
        flags = [*case.flags, "--checkpointing_steps", "2", "--resume_from_checkpoint", "latest", *more]
        shutil.copy(straight / "metrics.jsonl", tmp_path / name)
        run_main(script, decaying_args(teacher, shards, tmp_path / name, *flags))
        assert json.loads((tmp_path / name / "args.json").read_text())["lr_scheduler"] == (more or ["", "constant"])[1]
    assert_same_end(tmp_path / "same", straight)
    rates = [lr for *_, lr in read_losses(tmp_path / "asked")]
    assert rates[2:] == pytest.approx([1e-3 * (1 + math.cos(math.pi * step / 4)) / 2 for step in (3, 4)], abs=1e-9)


@over([LCM, LCM_LORA])
def test_more_steps_than_before_stretch_the_schedule(script, case, teacher, shards, tmp_path, capfd):
    flags = [*case.flags, "--checkpointing_steps", "2", "--resume_from_checkpoint", "latest"]
    run_main(script, decaying_args(teacher, shards, tmp_path, *flags))
    assert "is now over" not in capfd.readouterr().err
    run_main(script, decaying_args(teacher, shards, tmp_path, *flags, "--max_train_steps", "8"))
    said = "The cosine schedule of the learning rate, which was over 4 steps, is now over 8: it goes on at 0.0005"
    assert said in capfd.readouterr().err
    rates = [lr for *_, lr in read_losses(tmp_path)]
    expected = [(1 + math.cos(math.pi * step / (4 if step < 5 else 8))) / 2 * 1e-3 for step in range(1, 9)]
    assert rates == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("flags, before", [
    pytest.param(["--gradient_checkpointing", "--gradient_accumulation_steps", "2", "--loss_type", "huber"], [],
                 id="checkpointing"),
    # 24 samples of 21: into the second epoch; validation on one side of the interruption only
    pytest.param(["--train_batch_size", "6", "--dataloader_num_workers", "3", "--shuffle_buffer_size", "3",
                  "--random_flip", "--proportion_empty_prompts", "0.5"],
                 ["--validation_steps", "1", *QUICK_VALIDATION], id="three workers, validation"),
    pytest.param(["--use_8bit_adam", "--train_batch_size", "1"], [], id="8-bit Adam"),
])  # fmt: skip
def test_resume_is_exact(train, tmp_path, flags, before):
    whole = train(tmp_path / "whole", *flags)
    train(tmp_path / "parts", *flags, "--max_train_steps", "2", *before)
    parts = train(tmp_path / "parts", *flags, "--resume_from_checkpoint", "latest")
    assert_same_end(parts, whole)
    tensors = [value for value in read_checkpoint(whole / "checkpoint-4").values() if torch.is_tensor(value)]
    assert any(tensor.dtype == torch.uint8 for tensor in tensors) == ("--use_8bit_adam" in flags)


AVERAGED = ["--ema_decay", "0.6", "--export_ema_decay", "0.8"]


@pytest.mark.parametrize("offload", [False, True], ids=["", "offloaded"])
@over([LCM, LCM_LORA, "train_ct"], "ema_decay", [0, 0.6])
def test_the_exported_average_by_hand(case, script, train, tmp_path, ema_decay, offload):
    """a ← μ a + (1 − μ) θ from the first θ on, beside a target of its own μ; it is exported and resumed to the bit."""
    if offload and case.is_lora:
        return
    flags = ["--ema_decay", str(ema_decay), "--export_ema_decay", "0.8", "--checkpointing_steps", "1",
             *["--offload_ema"] * offload]  # fmt: skip
    whole = train(tmp_path / "whole", *flags)
    states = [{name: load_file(whole / f"checkpoint-{step}" / f"{name}.safetensors") for name in script.NETWORKS}
              for step in (1, 2, 3, 4)]  # fmt: skip
    for name, value in states[0]["average"].items():
        value = value.double()
        for state in states[1:]:
            value = 0.8 * value + 0.2 * state["student"][name].double()
        torch.testing.assert_close(states[-1]["average"][name].double(), value, rtol=1e-5, atol=1e-7)
    assert differences(states[-1]["average"], states[-1]["target"])
    assert bool(differences(states[-1]["target"], states[-1]["student"])) == bool(ema_decay)
    assert not differences(states[-1]["average"], case.weights(whole, "target"))
    shutil.copytree(whole / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    shutil.copy(whole / "metrics.jsonl", tmp_path / "parts")
    parts = train(tmp_path / "parts", *flags, "--resume_from_checkpoint", "checkpoint-2")
    assert_same_end(parts, whole)
    assert not differences(load_file(parts / "checkpoint-4/average.safetensors"), states[-1]["average"])


@over([LCM, LCM_LORA])
def test_the_exported_average_is_what_is_validated(train, tmp_path):
    """At a decay of 1 it stays where the student began; and no step is another for it."""
    flags = ["--validation_steps", "4", *QUICK_VALIDATION]
    plain = train(tmp_path / "plain", *flags, "--ema_decay", "0.6")
    still = train(tmp_path / "still", *flags, *AVERAGED[:2], "--export_ema_decay", "1")
    assert read_losses(plain) == read_losses(still)
    first, last = (read_metrics(still)[step] for step in (0, -1))
    assert first["fidelity/target_psnr_k1"] == last["fidelity/target_psnr_k1"] != last["fidelity/student_psnr_k1"]
    assert read_metrics(plain)[-1]["fidelity/student_psnr_k1"] == last["fidelity/student_psnr_k1"]


def test_two_averages_say_what_they_cost(script, start, capfd):
    for flags, is_said in ((AVERAGED, True), (AVERAGED[2:] + ["--ema_decay", "0"], False), ([], False)):
        run, said = start(*flags), capfd.readouterr().err
        size = sum(value.numel() for value in run.models.student.parameters()) * 4 / 2**30
        assert (f"--export_ema_decay: {size:.2f} GB each, float32" in said) == is_said
        assert len({id(getattr(run.models, name)) for name in script.NETWORKS}) == 1 + sum(
            bool(decay) for decay in (run.args.ema_decay, run.args.export_ema_decay))  # fmt: skip


@over(SCRIPTS)
def test_the_loss_by_time(case, script, train, tmp_path, monkeypatch):
    """Of two samples a step: the mean over their bins is the loss, and the bins are those of their times."""
    times, plain = [], script.draw

    def draw(x_0, schedule, *given):
        draws = plain(x_0, schedule, *given)
        times.append(draws.t if case.name == "train_ct" else (draws.index + 1) * 100 - 1)
        return draws

    monkeypatch.setattr(script, "draw", draw)
    lines = [line for line in read_metrics(train(tmp_path, "--log_loss_bins", "3")) if "lr" in line]
    edges = {0: "t0-333", 1: "t334-666", 2: "t667-999"}
    for line, t in zip(lines, times, strict=True):
        found = {key.removeprefix("loss/"): value for key, value in line.items() if key.startswith("loss/")}
        assert {*found} == {edges[time * 3 // 1000] for time in t.tolist()}
        assert sum(found.values()) / len(found) == pytest.approx(line["loss"], rel=1e-5)


def test_sums_of_losses_by_time(script):
    t, losses = torch.tensor([0, 249, 250, 999, 600]), torch.tensor([1.0, 2.0, 4.0, 8.0, math.nan])
    sums, counts = script.sum_by_time(losses, t, SimpleNamespace(num_train_timesteps=1000), 4)
    assert counts.tolist() == [2, 1, 1, 1] and sums[[0, 1, 3]].tolist() == [3, 4, 8] and sums[2].isnan()
    sums[2] = counts[2] = 0
    found = script.loss_by_time(torch.stack([sums, counts]).flatten(), 1000)
    assert found == {"loss/t0-249": 1.5, "loss/t250-499": 4, "loss/t750-999": 8}


def test_resume_between_two_logs_keeps_the_loss_by_time(train, tmp_path):
    flags = ["--logging_steps", "3", "--log_loss_bins", "4"]
    whole = train(tmp_path / "whole", *flags)
    for name, more in (("parts", []), ("other", ["--log_loss_bins", "2"]), ("none", ["--log_loss_bins", "0"])):
        shutil.copytree(whole / "checkpoint-2", tmp_path / name / "checkpoint-2")
        parts = train(tmp_path / name, *flags, *more, "--resume_from_checkpoint", "checkpoint-2")
        lines = [{key: value for key, value in read_metrics(output)[0].items() if key.startswith("loss")}
                 for output in (parts, whole)]  # fmt: skip
        assert lines[0] == lines[1] if not more else lines[0]["loss"] == lines[1]["loss"]
        assert {*lines[0]} - {"loss"} <= {"loss/t0-499", "loss/t500-999"} or name == "parts"


def test_resume_inside_a_schedule_and_between_two_logs(train, tmp_path):
    flags = ["--lr_scheduler", "linear", "--lr_warmup_steps", "1", "--logging_steps", "3"]
    whole = train(tmp_path / "whole", *flags)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    parts = train(tmp_path / "parts", *flags, "--resume_from_checkpoint", "checkpoint-2")
    assert_same_end(parts, whole)


def test_resume_forgets_what_came_after_the_checkpoint(train, straight, tmp_path):
    output = shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(output / "checkpoint-4")
    with open(output / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    assert_same_end(train(output, "--resume_from_checkpoint", "latest"), straight)


def test_older_checkpoint_by_name_outlives_the_newer(train, straight, tmp_path):
    output = shutil.copytree(straight, tmp_path / "run")
    flags = ["--max_train_steps", "3", "--checkpoints_total_limit", "1"]
    train(output, *flags, "--resume_from_checkpoint", "checkpoint-2")
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-3"]
    assert [path.name for path in (output / "set-aside-1").glob("checkpoint-*")] == ["checkpoint-4"]


@over([LCM_XL_LORA, "train_ct"])
def test_two_processes(case, teacher, shards, tmp_path):
    whole, parts = tmp_path / "whole" / "run", tmp_path / "parts" / "run"
    flags = ["--checkpointing_steps", "2", "--gradient_accumulation_steps", "2", "--logging_steps", "3", *case.flags]
    for output in (whole, parts):
        output.parent.mkdir()
    run_two(case.name, tiny_args(teacher, shards, whole, *flags))
    shutil.copytree(whole / "checkpoint-2", parts / "checkpoint-2")
    shutil.copy(whole / "metrics.jsonl", parts)
    run_two(case.name, tiny_args(teacher, shards, parts, *flags, "--resume_from_checkpoint", "latest"))
    assert_same_end(parts, whole)
    ends = [[Path(f"{run}-rank{rank}").read_text().split(" ", 1) for rank in (0, 1)] for run in (whole, parts)]
    assert ends[0] == ends[1]
    (weights, cursors), (other_weights, other_cursors) = ends[0]
    assert weights == other_weights and cursors != other_cursors
    assert [line["step"] for line in read_metrics(whole)] == [3, 4]
    more = {"args.json", "metrics.jsonl", "checkpoint-2", "checkpoint-4"}
    assert {path.name for path in whole.iterdir()} == case.exported(whole) | more


# prompts, seeds, and the pictures that the second of two processes draws at once: batches of one process, then smaller
# ones, then fewer pictures than processes; with the stock scheduler always the batches of one process
SHARES = [(9, 2, {2, 1}), (3, 1, {1}), (1, 1, set())]


@over([LCM, LCM_XL_LORA, "train_ct"], "prompts, seeds, second",
      {LCM: SHARES, LCM_XL_LORA: SHARES[:1], "train_ct": SHARES[1:2]})  # fmt: skip
def test_two_processes_share_a_validation(
    case, script, straight, teacher, shards, tmp_path, monkeypatch, prompts, seeds, second
):
    """Of one checkpoint they have the figures and the pictures of a single process."""
    flags = ["--num_validation_images", str(seeds), "--validation_num_inference_steps", "1", "2", *case.flags,
             "--resume_from_checkpoint", "latest", "--validation_prompts", *"abcdefghi"[:prompts]]  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    for output in (one, two):
        shutil.copytree(straight / "checkpoint-4", output / "checkpoint-4")

    def spoil(script):
        plain, drawn = script.decode_latents, []
        script.decode_latents = lambda vae, latents, chunk: drawn.append(len(latents)) or plain(vae, latents, chunk)

        def train(run):
            script.validate(run)
            Path(f"{two}-drawn-{run.accelerator.process_index}").write_text(json.dumps(drawn))

        script.train = train

    with monkeypatch.context() as patch:
        patch.setattr(script, "train", script.validate)
        run_main(script, tiny_args(teacher, shards, one, *flags))
    run_two(case.name, tiny_args(teacher, shards, two, *flags), spoil)
    assert set(json.loads(Path(f"{two}-drawn-1").read_text())) == second
    (expected,), (found,) = read_metrics(one), read_metrics(two)
    assert found == pytest.approx(expected, rel=1e-3, abs=0.02)  # rounding alone
    expected, found = (np.asarray(Image.open(output / "validation" / "step-4.png"), float) for output in (one, two))
    np.testing.assert_allclose(found, expected, atol=2)


# ---------------------------------------------------------------------------------------------------------- faults


def fail_alone(script):
    """Spoils a script: its second process has an error in its second step. NCCL, which would wait for the other process
    when the group is destroyed, is played by a wait without end.
    """
    plain = script.train_step

    def train_step(run):
        if run.step == 1 and run.accelerator.process_index == 1:
            torch.distributed.destroy_process_group = lambda *_: time.sleep(3600)
            script.fail("a fault of the second process alone")
        plain(run)

    script.train_step = train_step


@over([LCM])
def test_a_process_that_fails_ends_and_ends_the_other(case, teacher, shards, tmp_path, capfd):
    start = time.monotonic()
    run_two(case.name, tiny_args(teacher, shards, tmp_path, *case.flags), fail_alone, (1, 1))
    lines = re.findall("error: .*|Traceback", capfd.readouterr().err)  # the first follows the bar of the steps
    assert sorted(lines) == ["error: a fault of the second process alone",
                             "error: another process of this run has ended: see its error, and go on with "
                             "--resume_from_checkpoint latest"]  # fmt: skip
    assert time.monotonic() - start < 100


@over([LCM])
def test_two_processes_stop_together(case, teacher, shards, tmp_path, capfd):
    """A signal to one of two ends both by the same step, with a checkpoint, and with the group destroyed."""

    def spoil(script):
        plain, leave = script.train_step, script.leave

        def train_step(run):
            if run.step == 1 and run.accelerator.process_index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            plain(run)

        script.train_step, script.leave = train_step, lambda *given: (print("left"), leave(*given))

    run_two(case.name, tiny_args(teacher, shards, tmp_path, *case.flags), spoil, (143, 143))
    assert "left" not in capfd.readouterr().out
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["checkpoint-2"]


@pytest.mark.parametrize("code, said", [
    pytest.param(1, "a fault of the second process alone", id="an error"), pytest.param(143, "", id="a signal")
])  # fmt: skip
@over([LCM])
def test_a_validation_that_the_second_process_ends(case, teacher, shards, tmp_path, capfd, code, said):
    """An error ends both with their lines, a signal with a checkpoint of the next
    step, and without pictures.
    """

    def spoil(script):
        plain = script.decode_latents

        def decode_latents(vae, latents, chunk):
            if len(latents) == 2 and said:  # the last of 18 pictures, which are the second's
                script.fail(said)
            if len(latents) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return plain(vae, latents, chunk)

        script.decode_latents = decode_latents

    flags = ["--validation_steps", "4", *QUICK_VALIDATION, "--num_validation_images", "18", *case.flags]
    run_two(case.name, tiny_args(teacher, shards, tmp_path, *flags), spoil, (code, code))
    assert not (tmp_path / "validation").exists()
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ([] if said else ["checkpoint-1"])
    if said:
        assert sorted(re.findall("error: .*|Traceback", capfd.readouterr().err)) == [
            f"error: {said}", "error: another process of this run has ended: see its error, and go on with "
            "--resume_from_checkpoint latest"]  # fmt: skip


SIGNALS = [pytest.param(signal.SIGTERM, 143, id="SIGTERM"), pytest.param(signal.SIGINT, 130, id="SIGINT")]


@pytest.mark.parametrize("number, status", SIGNALS)
def test_signal_ends_the_run_with_a_checkpoint(train, straight, tmp_path, on_call, number, status):
    on_call("train_step", 3, lambda: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as end:
        train(tmp_path, "--checkpointing_steps", "100")
    assert end.value.code == status
    assert [path.name for path in tmp_path.glob("*checkpoint-*")] == ["checkpoint-3"]
    assert not (tmp_path / "scheduler").exists()
    assert_same_end(train(tmp_path, "--resume_from_checkpoint", "latest"), straight)


KILLED = [
    pytest.param("train_step", 2, id="before any checkpoint"),
    pytest.param("train_step", 4, id="in a step"),
    pytest.param("list_checkpoints", 3, id="after a checkpoint"),
    pytest.param("export", 1, id="before the export"),
]


@pytest.mark.parametrize("name, number", KILLED)
def test_kill_9_and_resume(train, straight, tmp_path, on_call, name, number):
    def run_and_die():
        on_call(name, number, kill_self)
        train(tmp_path)

    run_and_kill(run_and_die)
    assert_same_end(train(tmp_path, "--resume_from_checkpoint", "latest"), straight)


def test_half_checkpoints_are_passed_over(script, train, straight, tmp_path, capsys):
    for name in ("checkpoint-2", "tmp-checkpoint-12", "checkpoint-best"):
        shutil.copytree(straight / "checkpoint-2", tmp_path / name)
    (tmp_path / "checkpoint-11").mkdir()
    assert [path.name for path in script.list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-11"]
    shutil.copy(straight / "metrics.jsonl", tmp_path)
    assert_same_end(train(tmp_path, "--resume_from_checkpoint", "latest"), straight)
    assert "checkpoint-11 is damaged or not there" in capsys.readouterr().err
    assert {path.name for path in tmp_path.glob("*checkpoint-*")} == {"checkpoint-2", "checkpoint-4", "checkpoint-best"}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says what is mapped")
def test_a_checkpoint_is_mapped_into_memory_and_stays_as_it_is(script, train, straight, tmp_path):
    """Of a large model's, the ranks of a machine share what they read of it."""
    folder = shutil.copytree(straight / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copy(straight / "metrics.jsonl", tmp_path)
    before = (folder / "optimizer.pt").read_bytes()
    state = script.read_checkpoint(folder)
    assert str(folder / "optimizer.pt") in Path("/proc/self/maps").read_text() and state["step"] == 2
    assert_same_end(train(tmp_path, "--resume_from_checkpoint", "latest"), straight)
    assert (folder / "optimizer.pt").read_bytes() == before


def test_checkpoint_limit_and_a_full_disk(train, straight, tmp_path, on_call):
    limited = ("--checkpointing_steps", "1", "--checkpoints_total_limit", "2")

    def fail():
        raise OSError(28, "No space left on device")

    on_call("save_file", 6, fail)  # the target of checkpoint-3
    with pytest.raises((OSError, SystemExit)):
        train(tmp_path, *limited)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert_same_end(train(tmp_path, *limited, "--resume_from_checkpoint", "latest"), straight)
    assert sorted(path.name for path in tmp_path.glob("*checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


@pytest.fixture
def spoil_losses(script, monkeypatch):
    """spoil_losses(calls, gradient_only): makes the losses of these calls (1, 2, …), or their gradients alone, nan."""

    def patch(calls, gradient_only=False):
        plain, count = script.consistency_loss, []

        def wrapper(*args, **kwargs):
            loss = plain(*args, **kwargs)
            count.append(1)
            if len(count) not in calls:
                return loss
            return loss + 0 * (loss - loss.detach()).abs().sqrt() if gradient_only else loss * float("nan")

        monkeypatch.setattr(script, "consistency_loss", wrapper)

    return patch


@over([LCM, LCM_LORA])
def test_out_of_memory_ends_with_advice(case, train, tmp_path, on_call):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    on_call("train_step", 2, fail)
    with pytest.raises(SystemExit, match="^error: out of device memory: CUDA out of memory.*--train_batch_size") as end:
        train(tmp_path, "--gradient_checkpointing")
    assert "--optimizer adamw8bit" in end.value.code and "--gradient_checkpointing" not in end.value.code
    assert ("--offload_ema" in end.value.code) == (not case.is_lora) and "\n" not in end.value.code


@pytest.mark.parametrize("gradient_only", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize("flags", [[], ["--use_8bit_adam"], ["--gradient_accumulation_steps", "2"]], ids=str)
def test_step_that_is_not_finite_is_skipped(train, tmp_path, spoil_losses, flags, gradient_only):
    spoil_losses([5 if "2" in flags else 3], gradient_only)
    output = train(tmp_path, *flags, "--checkpointing_steps", "1")
    good, skipped, after = (read_checkpoint(output / f"checkpoint-{step}") for step in (2, 3, 4))
    changed = {name.split("/")[1] for name in differences(good, skipped)}
    assert changed == {"target", "state"}  # the target goes on towards the student
    assert all(value.isfinite().all() for value in after.values() if torch.is_tensor(value))
    assert {name.split("/")[1] for name in differences(skipped, after)} == {"student", "target", "optimizer", "state"}
    assert [line["nonfinite_steps"] for line in read_metrics(output)] == [0, 0, 1, 1]


@pytest.mark.parametrize("gradient_only", [False, True])
def test_ten_steps_in_a_row_that_are_not_finite(train, tmp_path, spoil_losses, gradient_only):
    spoil_losses([2, *range(4, 100)], gradient_only)
    with pytest.raises(SystemExit, match="^error: ten steps in a row .*; try .*--learning_rate"):
        train(tmp_path, "--max_train_steps", "30")
    assert len(read_metrics(tmp_path)) in (12, 13)


# ---------------------------------------------------------------------------------- export, validation and secrets

SECRETS = ("hf_secret123", "secret456", "secret789", "secret012")


@pytest.fixture
def showcase(train, shards, kept, tmp_path_factory):
    """(output, its log) of a run with validation, trackers and tokens."""
    if (name := "showcase") in kept:
        return kept[name]
    folder = tmp_path_factory.mktemp("showcase")
    (folder / "animals.txt").write_text("a fox\n\na cat\n")
    (folder / "plants.txt").write_text("a rose\n")
    pipe = f"pipe:cat {shards} # 'Authorization: Bearer secret456' https://me:secret789@host/x?token=secret012"
    log = io.StringIO()
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        output = train(folder / "run", "--validation_steps", "2", "--validation_prompts", str(folder / "animals.txt"),
                       str(folder / "plants.txt"), "a fir", "--validation_num_inference_steps", "1", "2",
                       "--num_validation_images", "2", "--report_to", "tensorboard", "--hub_token", "hf_secret123",
                       shards=pipe)  # fmt: skip
    kept[name] = output, log.getvalue()
    return kept[name]


def test_no_secret_is_written(showcase):
    output, log = showcase
    files = [path for path in output.rglob("*") if path.is_file()]
    assert len(files) > 18
    for secret in SECRETS:
        assert secret not in log
        assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_validation_metrics(showcase):
    lines = [line for line in read_metrics(showcase[0]) if "lr" not in line]
    assert [line["step"] for line in lines] == [0, 2, 4]
    for line in lines:
        groups, figures = ("", "/animals", "/plants"), ("psnr", "edges", "feature_distance")
        parts = itertools.product(("teacher", "untrained", "student", "target"), figures, ("k1", "k2"), groups)
        assert line.keys() == {"step", *(f"fidelity/floor_feature_distance{group}" for group in groups),
                               *(f"fidelity/{net}_{figure}_{k}{group}" for net, figure, k, group in parts)}  # fmt: skip
    start, *_, end = lines
    for key in (key for key in start if "untrained_psnr" in key):
        assert start[key] == end[key] != start[key.replace("untrained", "teacher")]
        for network in ("student", "target"):
            name = key.replace("untrained", network)
            assert start[name] == pytest.approx(start[key], abs=5e-3) and end[name] != start[name]


def test_validation_at_several_sizes(train, tmp_path):
    output = train(tmp_path / "run", "--validation_steps", "4", "--validation_resolutions", "16x16,24X16",
                   "--max_train_steps", "1", *QUICK_VALIDATION)  # fmt: skip
    names = {path.name for path in (output / "validation").iterdir()}
    assert names == {f"step-{step}{size}.png" for step in (0, 1) for size in ("", "-24x16")}
    square, wide = (Image.open(output / "validation" / f"step-1{size}.png").size for size in ("", "-24x16"))
    assert square[0] < wide[0] and square[1] == wide[1]
    lines = [line for line in read_metrics(output) if "lr" not in line]
    assert [line["step"] for line in lines] == [0, 0, 1, 1]
    for name in ("teacher", "untrained", "student", "target"):
        figures = [line[f"fidelity{'-24x16' * (index % 2)}/{name}_psnr_k1"] for index, line in enumerate(lines)]
        assert figures[0] != figures[1] and (figures[0] == figures[2]) == (name in ("teacher", "untrained"))


def test_validation_does_not_touch_training(showcase, straight):
    output, _ = showcase
    assert read_losses(output) == read_losses(straight)
    one, two = (read_checkpoint(run / "checkpoint-4") for run in (output, straight))
    assert not differences(one, two)


def test_trackers(showcase, straight):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output, log = showcase
    pictures = {step: Image.open(output / "validation" / f"step-{step}.png") for step in (0, 2, 4)}
    assert all(picture.size == pictures[0].size for picture in pictures.values())
    assert pictures[0].tobytes() != pictures[4].tobytes()
    (events,) = (output / "logs").glob("*/events*")
    logged = EventAccumulator(str(events), {"images": 0, "scalars": 0}).Reload()
    assert [(image.step, image.width, image.height) for image in logged.Images("validation")] == [
        (step, *picture.size) for step, picture in pictures.items()
    ]
    losses = [loss for _, loss, *_ in read_losses(output)]
    assert [loss.value for loss in logged.Scalars("loss")] == pytest.approx(losses)
    assert len(logged.Scalars("fidelity/student_psnr_k2/plants")) == 3
    assert "PSNR in dB, animals" in log and "Fréchet" not in log.replace("fidelity/*_fd takes 256", "")
    assert log.count("fidelity/*_fd takes 256 pictures, prompts × --num_validation_images: it is left out of 8") == 1
    assert not (straight / "logs").exists()  # --report_to none


@over([LCM, LCM_LORA])
def test_push_to_hub(case, script, train, tmp_path, monkeypatch):
    calls = []
    created = type("Repo", (), {"repo_id": "me/model"})
    monkeypatch.setattr(script, "create_repo", lambda name, **kwargs: calls.append((name, kwargs)) or created)
    monkeypatch.setattr(script, "upload_folder", lambda **kwargs: calls.append(("upload", kwargs)))
    output = train(tmp_path / "model", "--push_to_hub", "--hub_token", "hf_secret123", "--checkpointing_steps", "4")
    (name, created_with), (_, upload) = calls
    assert name == "model" and created_with["token"] == upload["token"] == "hf_secret123"
    files = [path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()]
    uploaded = {*filter_repo_objects(files, allow_patterns=upload["allow_patterns"])}  # as upload_folder chooses them
    assert {path.split("/")[0] for path in uploaded} == case.exported(output)


# ----------------------------------------------------------------------------------------------------------- flags

# what command lines of users hold: these flags stay
KNOWN = """adam_beta1 adam_beta2 adam_epsilon adam_weight_decay allow_tf32 cache_dir cast_teacher_unet center_crop
    checkpointing_steps checkpoints_total_limit compile dataloader_num_workers ema_decay
    enable_xformers_memory_efficient_attention encoded_shards gradient_accumulation_steps gradient_checkpointing
    hub_model_id hub_token huber_c interpolation_type learning_rate logging_dir logging_steps loss_type lr_scheduler
    lr_warmup_steps max_bad_samples max_grad_norm max_pwatermark max_train_samples max_train_steps min_image_size
    mixed_precision num_ddim_timesteps num_train_epochs num_validation_images optimizer output_dir
    pretrained_teacher_model pretrained_vae_model_name_or_path proportion_empty_prompts push_to_hub random_flip
    report_to resolution resume_from_checkpoint revision scale_lr seed shard_timeout shuffle_buffer_size
    teacher_revision tracker_project_name train_batch_size train_shards_path_or_url use_8bit_adam vae_encode_batch_size
    validation_guidance_scale validation_negative_prompt validation_num_inference_steps validation_prompts
    validation_resolutions validation_steps"""
KNOWN_LORA = "base_precision export_fused init_lora lora_alpha lora_dropout lora_rank lora_target_modules"
KNOWN_OF = {
    "train_lcm_distill_sd_wds": "offload_ema timestep_scaling_factor unet_time_cond_proj_dim w_max w_min",
    "train_tcd_distill_sd_wds": "offload_ema unet_time_cond_proj_dim validation_eta w_max w_min",
    "train_tcd_distill_lora_sd_wds": f"validation_eta w_max w_min {KNOWN_LORA}",
    "train_lcm_distill_lora_sdxl_wds": f"timestep_scaling_factor use_fix_crop_and_size w_max w_min {KNOWN_LORA}",
    "train_cd_multiboundary": f"guidance_scale init_from num_boundaries offload_ema w_max w_min {KNOWN_LORA}",
    "train_ct": f"""discretization dropout ect_b ect_k ect_q ect_stage_steps from_scratch ict_s0 ict_s1 init_from
        lognormal_mean lognormal_std loss_weighting offload_ema pseudo_huber_c timestep_sampling timestep_scaling_factor
        {KNOWN_LORA}""",
}


def flags_of_the_script(path=SCRIPT):
    """Names of all flags, from the calls add("--flag", …), and the attributes of `args` that anything else reads."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", "") != "parse_args"]
    nodes = list(ast.walk(tree))
    calls = [node.args[0].value for node in nodes if isinstance(node, ast.Call)
             and getattr(node.func, "id", "") == "add"]  # fmt: skip
    reads = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
             and "args" in (getattr(node.value, "id", ""), getattr(node.value, "attr", ""))}  # fmt: skip
    return [flag.removeprefix("--") for flag in calls], reads


@over(SCRIPTS)
def test_every_flag_is_read_and_none_is_lost(case):
    flags, reads = flags_of_the_script(case.path)
    assert len(flags) == len(set(flags)) and set(flags) >= {*KNOWN.split(), *KNOWN_OF[case.name].split()}
    assert not set(flags) - reads, "flags that nothing reads"
    others = {"unet_time_cond_proj_dim", "from_scratch", "dropout", "w_min", "w_max"}  # flags of some methods
    assert reads - set(flags) <= {*others, "bucketed_shards"}, "reads of no flag"


@over(SCRIPTS)
def test_help_shows_every_flag_and_its_default(case, script, capsys):
    with pytest.raises(SystemExit) as end:
        script.parse_args(["--help"])
    assert end.value.code == 0
    entries = {entry.split()[0].strip(","): entry for entry in re.split(r"\n  (?=--)", capsys.readouterr().out)}
    defaults = vars(script.parse_args(["--pretrained_teacher_model", "a", "--train_shards_path_or_url", "b"]))
    worked_out = {"cast_teacher_unet", "mixed_precision", "validation_guidance_scale"}  # and said so in words
    if case.name == "train_cd_multiboundary":
        worked_out |= {"w_min", "w_max", "validation_num_inference_steps"}
    for flag in flags_of_the_script(case.path)[0]:
        is_shown = type(defaults[flag]) in (int, float, list) or (defaults[flag] and type(defaults[flag]) is str)
        if is_shown and flag not in (worked_out | {"pretrained_teacher_model", "train_shards_path_or_url"}):
            assert "(default: " in " ".join(entries[f"--{flag}"].split()), flag
        assert len(entries[f"--{flag}"].split()) > 3, flag
    assert defaults["learning_rate"] == (1e-4 if case.is_lora else 8e-6)
    assert (defaults["lora_rank"], defaults["resolution"]) == (64 * case.is_lora, 1024 if case.is_sdxl else 512)


def test_arguments_from_a_file(lcm, tmp_path):
    (tmp_path / "run.args").write_text(
        "# a comment\n--pretrained_teacher_model me/model  # another\n"
        "--train_shards_path_or_url 'a b.tar' c.tar\n\n--w_min 2 --w_max=3\n--validation_prompts 'a red fox' \"it's\"\n"
    )
    args = lcm.parse_args([f"@{tmp_path / 'run.args'}", "--w_max", "4"])
    assert (args.pretrained_teacher_model, args.train_shards_path_or_url) == ("me/model", ["a b.tar", "c.tar"])
    assert (args.w_min, args.w_max, args.validation_guidance_scale) == (2, 4, 4)
    assert args.validation_prompts == ["a red fox", "it's"]


# ----------------------------------------------------------------------------------------- processes of their own


@over([LCM_LORA])
def test_the_script_alone_writes_the_same_bytes(case, script, teacher, shards, tmp_path, monkeypatch):
    """In a process of its own, where sets have another order. Bitwise within one processor and number of threads."""
    arguments = tiny_args(teacher, shards, "run", *case.flags, "--max_train_steps", "1")
    exports = []
    for name in ("here", "alone"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "here":
            run_main(script, arguments)
        else:
            shutil.copy(case.path, "alone.py")
            result = run_script(arguments, script="alone.py", PYTHONHASHSEED="1", MKL_NUM_THREADS="1")
            assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
        files = [path for path in Path("run").rglob("*") if path.is_file() and path.name not in ("metrics.jsonl",)]
        exports.append({str(path.relative_to("run")): path.read_bytes() for path in files})
    assert exports[0].keys() == exports[1].keys()
    assert [name for name in exports[0] if exports[0][name] != exports[1][name]] == []
    assert sum(name.endswith(".safetensors") for name in exports[0]) == 3


def test_metadata_have_one_order(lcm, tmp_path):
    """safetensors writes them in an order that changes from call to call."""
    found, path = set(), tmp_path / "file.safetensors"
    for _ in range(20):
        save_file({"ä": torch.ones(3), "b": torch.arange(5)}, path, {letter: f'"{letter}"\n' for letter in "cabé"})
        lcm.sort_metadata(path)
        found.add(path.read_bytes())
    assert len(found) == 1
    with safe_open(path, "pt") as file:
        assert file.metadata() == {letter: f'"{letter}"\n' for letter in "cabé"}
        assert file.get_tensor("ä").tolist() == [1, 1, 1] and file.get_tensor("b").tolist() == [0, 1, 2, 3, 4]


def test_help_and_a_refusal_are_all_that_is_printed(tiny, shards, tmp_path):
    """Refused by argparse, and later, when the libraries have been at work: no library's chatter before the line."""
    arguments = tiny_args(tiny, shards, tmp_path / "run")
    wanted = {
        ("--help",): (0, r"usage: .*", ""),
        ("--w_min", "3", "--w_max", "2"): (2, "", r"usage: [^\n]*\n\S+: error: --w_min 3.0 is above --w_max 2.0\n"),
        ("--num_ddim_timesteps", "2000"): (1, "", r"error: --num_ddim_timesteps 2000 must lie in 1 … 1000\n"),
    }
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    started = [subprocess.Popen([sys.executable, str(SCRIPT), *arguments, *more], env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for more in wanted]  # fmt: skip
    for process, (code, out, error) in zip(started, wanted.values(), strict=True):
        found = process.communicate(timeout=600)
        assert process.returncode == code, found
        assert re.fullmatch(out, found[0], re.DOTALL) and re.fullmatch(error, found[1]), found


# ------------------------------------------------------------------------------------------------ errors at the start


def test_teacher_with_a_short_configuration(train, tiny, tmp_path):
    """As that of Stable Diffusion 1.5, written by diffusers 0.6: what it leaves out has the default of the class."""
    later = ("time_cond_proj_dim", "class_embeddings_concat", "projection_class_embeddings_input_dim", "dropout")
    teacher = edited(tiny, tmp_path, "unet/config.json", **dict.fromkeys(later))
    output = train(tmp_path / "run", teacher=teacher)
    assert json.loads((output / "unet" / "config.json").read_text())["time_cond_proj_dim"] == 256
    assert "time_embedding.cond_proj.weight" in load_file(output / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("file, changes, message", [
    ("unet/config.json", {"in_channels": 9}, "9.*in-painting"),
    ("model_index.json", {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None],
                          "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}, "SDXL refiner"),
    ("model_index.json", {"_class_name": "StableDiffusion3Pipeline", "unet": None,
                          "transformer": ["diffusers", "SD3Transformer2DModel"]}, "StableDiffusion3Pipeline"),
    ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction type 'flow'"),
    ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr.*epsilon"),
    ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "beta_schedule 'sigmoid' is not supported"),
    ("model_index.json", {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}, "FlowMatchEuler.*supported"),
    ("model_index.json", {"scheduler": ["diffusers", "EDMEulerScheduler"]}, "EDMEulerScheduler .* is not supported"),
    ("vae/config.json", {"latent_channels": 16}, "VAE"),
    ("vae/config.json", {"latents_mean": [0, 0, 0, 0], "latents_std": [1, 1, 1, 1]}, "VAE with latents_mean"),
])  # fmt: skip
def test_teacher_of_another_kind(start, tiny, tmp_path, file, changes, message):
    with ends_with(message):
        start(teacher=edited(tiny, tmp_path, file, **changes))


@over(SCRIPTS, "given", [
    pytest.param({"beta_end": 0.02, "beta_schedule": "linear", "clip_sample": True, "thresholding": True}, id="clips"),
    pytest.param({}, id="bare"),  # DDPM's defaults are not those of the schedulers that are exported
])  # fmt: skip
def test_the_exported_scheduler_has_the_teachers_noise_and_clips_nothing(script, tmp_path, given):
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler", **given}))
    teacher = DDPMScheduler.from_pretrained(tmp_path)
    args = script.parse_args(tiny_args("a", "b", "c"))
    script.make_scheduler(teacher.config, args).save_pretrained(tmp_path / "out")
    exported = getattr(diffusers, json.loads((tmp_path / "out" / "scheduler_config.json").read_text())["_class_name"])
    exported = exported.from_pretrained(tmp_path / "out")
    assert torch.equal(exported.alphas_cumprod, teacher.alphas_cumprod)
    assert not exported.config.clip_sample and not exported.config.thresholding
    assert exported.config.original_inference_steps == args.num_ddim_timesteps


@pytest.mark.parametrize("flags, message", [
    (["--pretrained_teacher_model", "no/such-model"], "--pretrained_teacher_model no/such-model"),
    (["--pretrained_vae_model_name_or_path", "no/such-vae"], "VAE"),
    (["--resolution", "17"], "--resolution: .17. must be multiples of .* 2"),
    (["--mixed_precision", "fp16"], "--mixed_precision fp16 needs a GPU"),
    (["--enable_xformers_memory_efficient_attention"], "--enable_xformers_memory_efficient_attention needs a GPU"),
    (["--resume_from_checkpoint", "checkpoint-7"], "--resume_from_checkpoint checkpoint-7"),
    (["--resume_from_checkpoint", "."], "--resume_from_checkpoint"),
    (["--validation_prompts", "gone.txt"], "--validation_prompts: gone.txt"),
    (["--train_shards_path_or_url", "gone.tar"], "gone.tar"),
    (["--report_to", "wandb"], "wandb"),
])  # fmt: skip
def test_flags_that_cannot_work(train, tmp_path, flags, message):
    if flags[0] in ("--mixed_precision", "--enable_xformers_memory_efficient_attention") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with ends_with(message):
        train(tmp_path, *flags)


def test_output_folder_that_cannot_be_used(train, straight, tmp_path):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with ends_with("--output_dir .* cannot be written"):
            train(output)
    with ends_with("--output_dir .* holds checkpoints.*--resume_from_checkpoint latest"):
        train(straight)


def test_resume_in_a_fresh_folder_starts_afresh(train, straight, tmp_path):
    assert_same_end(train(tmp_path, "--resume_from_checkpoint", "latest"), straight)
