"""How a run is launched and watched, and what it says of what it is given: settings of accelerate, resuming from an
earlier checkpoint, trackers, the gradient scaler, memory. CUDA's part is simulated; each test says by what.
"""

import datetime
import json
import os
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import ends_with, forget_run, read_export, read_losses, read_metrics, run_main, tiny_args
from PIL import ImageFont

MINIMAL = ["--pretrained_teacher_model", "t", "--train_shards_path_or_url", "s"]


def log_of(caplog):
    return "\n".join(record.getMessage() for record in caplog.records)


# ------------------------------------------------------------------------------------------------------ command line


def test_home_is_expanded_in_every_path(lcm, monkeypatch):
    monkeypatch.setenv("HOME", "/home/fox")
    words = ["--pretrained_teacher_model=~/sd15", "--train_shards_path_or_url", "~/a/{0..3}.tar", "~/b.tar",
             "--output_dir=~/out", "--cache_dir=~/cache", "--resume_from_checkpoint=~/out/checkpoint-2",
             "--validation_prompts", "~/prompts.txt", "a ~ b"]  # fmt: skip
    args = lcm.parse_args(words)
    assert args.pretrained_teacher_model == "/home/fox/sd15" and args.output_dir == "/home/fox/out"
    assert args.train_shards_path_or_url == ["/home/fox/a/{0..3}.tar", "/home/fox/b.tar"]
    assert args.cache_dir == "/home/fox/cache" and args.resume_from_checkpoint == "/home/fox/out/checkpoint-2"
    assert args.validation_prompts == ["/home/fox/prompts.txt", "a ~ b"]


@pytest.mark.parametrize("flag", ["--output_dir", "--validation_prompts", "--pretrained_teacher_model"])
def test_what_is_not_utf8_is_refused_at_the_start(lcm, flag, capsys):
    with pytest.raises(SystemExit):
        lcm.parse_args([*MINIMAL, flag, os.fsdecode(b"f\xfcchse")])
    assert f"{flag} is not in UTF-8" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("flags", "idle", "other"), [
    ("--lr_scheduler constant --lr_warmup_steps 10", "lr_warmup_steps", "--lr_scheduler constant"),
    ("--lr_scheduler linear --lr_warmup_steps 10 --adam_beta1 0.5 --unet_time_cond_proj_dim 64", "", ""),
    ("--optimizer adafactor --adam_beta1 0.5 --adam_epsilon 1e-6", "adam_beta1 adam_epsilon", "--optimizer adafactor"),
    ("--optimizer lion8bit --adam_beta2 0.9 --adam_epsilon 1e-6", "adam_epsilon", "--optimizer lion8bit"),
    ("--lora_rank 4 --unet_time_cond_proj_dim 64", "unet_time_cond_proj_dim", "a LoRA"),
    ("--w_min 0 --w_max 0 --unet_time_cond_proj_dim 64", "unet_time_cond_proj_dim", "--w_max 0"),
    ("--lora_rank 4 --w_min 0 --w_max 0", "", ""),
    ("--optimizer adafactor --lora_rank 4 --lr_scheduler constant", "", ""),
])  # fmt: skip
def test_flags_that_do_nothing_are_named(lcm, flags, idle, other, caplog):
    lcm.parse_args([*MINIMAL, *flags.split()])
    assert log_of(caplog).splitlines() == [f"--{flag} is not used with {other}" for flag in idle.split()]


# -------------------------------------------------------------------------------------------------------- environment


def test_settings_of_accelerate_do_not_win_in_silence(lcm, tiny, shards, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    lcm.check_launch()
    assert "--compile" in log_of(caplog) and "ACCELERATE_DYNAMO_BACKEND" not in os.environ
    args = lcm.parse_args(tiny_args(tiny, shards, tmp_path, "--gradient_accumulation_steps", "2"))
    forget_run()
    accelerator = lcm.make_accelerator(args)
    assert accelerator.gradient_accumulation_steps == 2
    assert accelerator.state.dynamo_plugin.backend.value == "NO"


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_what_shards_the_model_is_refused(lcm, kind, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with ends_with(f"{kind} is not supported"):
        lcm.check_launch()


def test_ranks_wait_for_a_day(lcm, tiny, shards, tmp_path):
    forget_run()
    accelerator = lcm.make_accelerator(lcm.parse_args(tiny_args(tiny, shards, tmp_path)))
    assert accelerator.init_handler.timeout == datetime.timedelta(days=1)
    assert accelerator.ddp_handler.gradient_as_bucket_view and not accelerator.ddp_handler.broadcast_buffers
    assert accelerator.ddp_handler.bucket_cap_mb == 25


@pytest.mark.parametrize(("flags", "matmul", "cudnn"), [
    ([], False, True), (["--mixed_precision", "bf16"], True, True), (["--allow_tf32"], True, True)])  # fmt: skip
def test_tf32(lcm, tiny, shards, tmp_path, flags, matmul, cudnn):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True  # PyTorch's defaults
    forget_run()
    try:
        lcm.make_accelerator(lcm.parse_args(tiny_args(tiny, shards, tmp_path, *flags)))
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (matmul, cudnn)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_deterministic_kernels(lcm, tiny, shards, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        lcm.make_accelerator(lcm.parse_args(tiny_args(tiny, shards, tmp_path, "--deterministic")))
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)


def test_bf16_that_a_card_emulates(lcm, tmp_path, monkeypatch, caplog):
    """CUDA's answers are made up."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    args = lcm.parse_args([*MINIMAL, "--output_dir", str(tmp_path), "--mixed_precision", "bf16", "--report_to", "none"])
    lcm.check_environment(args)
    assert "fp16" in log_of(caplog)


def test_a_flag_that_the_model_does_not_use_is_named(start, capsys):
    start("--use_fix_crop_and_size").reader.close()
    assert "--use_fix_crop_and_size is for SDXL" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- resuming, set aside


def test_an_earlier_checkpoint_deletes_nothing(train, straight, tmp_path, capsys):
    output = train(tmp_path / "run")
    before = read_metrics(output)
    later = (output / "checkpoint-4" / "student.safetensors").read_bytes()
    train(output, "--resume_from_checkpoint", "checkpoint-2", "--checkpoints_total_limit", "2")
    aside = output / "set-aside-1"
    assert (aside / "checkpoint-4" / "student.safetensors").read_bytes() == later
    assert [json.loads(line) for line in (aside / "metrics.jsonl").read_text().splitlines()] == before
    said = capsys.readouterr().err
    assert "checkpoint-4, metrics.jsonl is moved" in said and "set-aside-1" in said
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert read_losses(output) == read_losses(straight)
    ours, theirs = read_export(output), read_export(straight)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_latest_checkpoint_sets_nothing_aside(train, tmp_path):
    output = train(tmp_path / "run", "--max_train_steps", "2")
    train(output, "--resume_from_checkpoint", "latest")
    assert not list(output.glob("set-aside-*")) and [step for step, *_ in read_losses(output)] == [1, 2, 3, 4]


def test_a_second_run_in_a_folder_without_checkpoints(train, tmp_path, capsys):
    output = train(tmp_path / "run", "--checkpointing_steps", "0", "--max_train_steps", "2")
    before = (output / "metrics.jsonl").read_text()
    train(output, "--checkpointing_steps", "0", "--max_train_steps", "1")
    assert (output / "set-aside-1" / "metrics.jsonl").read_text() == before
    assert "set-aside-1" in capsys.readouterr().err and len(read_losses(output)) == 1


def test_pictures_of_an_earlier_run_are_not_those_of_the_card(lcm, train, tmp_path, monkeypatch):
    def validate(run):
        path = Path(run.args.output_dir, "validation", f"step-{run.step}.png")
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{run.args.max_train_steps} {run.step}")

    monkeypatch.setattr(lcm, "validate", validate)
    output, flags = tmp_path / "run", ["--checkpointing_steps", "0", "--max_train_steps"]
    for steps in ("2", "1"):
        train(output, *flags, steps, "--validation_steps", "1")
        assert (output / "samples.png").read_text() == f"{steps} {steps}"
    pictures = {path.name: path.read_text() for path in output.rglob("step-*.png")}
    assert pictures == {"step-0.png": "1 0", "step-1.png": "1 1", "step-2.png": "2 2"}
    assert (output / "set-aside-1" / "step-2.png").is_file()
    train(output, *flags, "1")
    assert not (output / "samples.png").exists() and "samples.png" not in (output / "README.md").read_text()


def test_fewer_steps_than_the_checkpoint_has(train, tmp_path, capsys):
    output = train(tmp_path / "run")
    train(output, "--resume_from_checkpoint", "latest", "--max_train_steps", "2")
    assert "--max_train_steps is 2" in capsys.readouterr().err and (output / "checkpoint-4").is_dir()


# ----------------------------------------------------------------------------------------------- the gradient scaler


def test_a_scale_that_collapses_ends_the_run(lcm, start):
    """The scaler is a stand-in that gives its scale."""
    run = start()
    lcm.train_step(run)
    run.step += 1
    run.accelerator.scaler = SimpleNamespace(get_scale=lambda: 2.0**-11)
    progress, clock = SimpleNamespace(set_postfix_str=lambda _: None), {"time": 0.0, "step": 0}
    with ends_with("fp16's gradients overflow"):
        lcm.log_metrics(run, clock, progress)
    run.accelerator.scaler = SimpleNamespace(get_scale=lambda: 2.0**16)
    lcm.log_metrics(run, clock, progress)
    line = read_metrics(run.args.output_dir)[-1]
    assert line["scale"] == 2.0**16 and line["skipped_steps"] == 0
    run.reader.close()


def test_steps_that_the_scaler_skips_are_counted(lcm, start):
    """By their gradients: a fused optimizer is always called, and skips on the device. The scaler is a stand-in."""
    run = start()
    progress, clock = SimpleNamespace(set_postfix_str=lambda _: None), {"time": 0.0, "step": 0}
    losses_and_norms = torch.tensor([[1.0, 2.0], [1.0, torch.inf], [1.0, torch.nan]])
    run.history, run.step = list(losses_and_norms), 3
    lcm.log_metrics(run, clock, progress)
    line = read_metrics(run.args.output_dir)[-1]
    assert "skipped_steps" not in line and line["nonfinite_steps"] == 2  # there is no scaler
    run.accelerator.scaler = SimpleNamespace(get_scale=lambda: 2.0**16)
    for seen in (2, 4):
        run.history, run.step = list(losses_and_norms), run.step + 3
        lcm.log_metrics(run, clock, progress)
        line = read_metrics(run.args.output_dir)[-1]
        assert line["skipped_steps"] == seen and line["nonfinite_steps"] == 2
        assert line["loss"] == 1 and line["grad_norm"] == 2
    assert "skipped_steps" in lcm.COUNTERS
    run.reader.close()


def test_paged_states_stay_paged(lcm):
    """bitsandbytes' paged buffers need CUDA: a stand-in marks what it gives."""

    class Optimizer:
        def __init__(self):
            self.parameter = torch.nn.Parameter(torch.zeros(4))
            self.param_groups, self.state, self.paged = [{"lr": 0.0, "initial_lr": 1.0}], {}, []

        def load_state_dict(self, state):
            self.state = {self.parameter: dict(state)}

        def get_state_buffer(self, parameter, dtype):
            self.paged.append(torch.zeros_like(parameter, dtype=dtype))
            return self.paged[-1]

    optimizer = Optimizer()
    schedule = SimpleNamespace(load_state_dict=lambda _: None, lr_lambdas=[lambda _: 0.5], last_epoch=3)
    run = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer), lr_scheduler=schedule,
                          args=SimpleNamespace(optimizer="paged_adamw8bit"))  # fmt: skip
    states = {"state1": torch.arange(4, dtype=torch.uint8), "state2": torch.ones(4, dtype=torch.uint8), "step": 7}
    lcm.restore_optimizer(run, {"optimizer": states, "lr_scheduler": {}})
    loaded = optimizer.state[optimizer.parameter]
    assert {id(loaded["state1"]), id(loaded["state2"])} == {id(buffer) for buffer in optimizer.paged}
    assert torch.equal(loaded["state1"], states["state1"]) and torch.equal(loaded["state2"], states["state2"])
    assert loaded["step"] == 7 and optimizer.param_groups[0]["lr"] == 0.5


# ---------------------------------------------------------------------------------------------------- memory, speed


def test_memory_that_runs_out_while_loading(lcm, tiny, shards, tmp_path, monkeypatch):
    def load_models(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")

    monkeypatch.setattr(lcm, "load_models", load_models)
    with ends_with("out of device memory: CUDA out of memory.*--gradient_checkpointing"):
        run_main(lcm, tiny_args(tiny, shards, tmp_path))


@pytest.mark.parametrize(("flags", "is_half"), [([], True), (["--no-half_precision_norms"], False)])
def test_norms_on_a_gpu(lcm, flags, is_half):
    """The device is one by name alone."""
    unet = torch.nn.Sequential(torch.nn.GroupNorm(1, 2), torch.nn.LayerNorm(2))
    lcm.tune_unet(unet, lcm.parse_args([*MINIMAL, *flags]), SimpleNamespace(type="cuda"))
    assert [("forward" in vars(norm)) for norm in unet] == [is_half, is_half]


@pytest.mark.parametrize(("is_bucketed", "dynamic"), [(False, False), (True, None)])
def test_compiled_for_static_shapes_but_of_buckets(lcm, is_bucketed, dynamic):
    given = {}
    unet = SimpleNamespace(compile=given.update)
    args = lcm.parse_args([*MINIMAL, "--compile"])
    args.bucketed_shards = is_bucketed
    lcm.tune_unet(unet, args, torch.device("cpu"))
    assert given == {"dynamic": dynamic}


@pytest.mark.parametrize(("lora", "networks"), [("0", 3), ("2", 1)])
def test_what_is_compiled(start, monkeypatch, lora, networks):
    """The U-Nets, of a LoRA the one that all share, and the VAE's encoder; validation's decoder is not."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: compiled.append(module))
    run = start("--compile", "--lora_rank", lora)
    assert compiled[-1] is run.models.vae.encoder
    assert {type(module).__name__ for module in compiled[:-1]} == {"UNet2DConditionModel"}
    assert len({id(module) for module in compiled[:-1]}) == len(compiled) - 1 == networks
    run.reader.close()


def test_a_compiled_lora_has_the_gradients_of_an_eager_one(lcm, tiny, tmp_path):
    """Without reorder_for_peak_memory = False, inductor of torch 2.13 gives zeros for some of lora_B."""
    args = lcm.parse_args([*MINIMAL, "--lora_rank", "2", "--compile", "--output_dir", str(tmp_path)])
    args.bucketed_shards = False
    forget_run()
    lcm.make_accelerator(args)
    unet = lcm.UNet2DConditionModel.from_pretrained(tiny, subfolder="unet").requires_grad_(False)
    lcm.add_adapters(unet, args, lcm.StableDiffusion)
    parameters = lcm.adapter_parameters(unet, "default")
    generator = torch.Generator().manual_seed(0)
    for parameter in parameters:  # so that the first matrices have gradients, too
        parameter.data = torch.randn(parameter.shape, generator=generator) / 10
    unet.to(memory_format=torch.channels_last)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 16, 16, generator=generator)

    def gradients():
        unet(x, torch.tensor([3, 700]), encoder_hidden_states=text, return_dict=False)[0].square().mean().backward()
        found = [parameter.grad.clone() for parameter in parameters]
        unet.zero_grad()
        return found

    eager = gradients()
    lcm.tune_unet(unet, args, torch.device("cpu"))
    for ours, theirs in zip(gradients(), eager, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


# ------------------------------------------------------------------------------------------------- trackers, pictures


def test_any_tracker_that_accelerate_knows(lcm, tmp_path):
    for name in ("tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "swanlab", "none"):
        assert lcm.parse_args([*MINIMAL, "--report_to", name]).report_to == name
    args = lcm.parse_args([*MINIMAL, "--report_to", "trackio", "--output_dir", str(tmp_path)])
    with ends_with("a flag asks for trackio, which cannot be imported here"):
        lcm.check_environment(args)


def test_a_tracker_without_login_ends_in_a_line(lcm, tmp_path):
    def init_trackers(project, _config, options):
        assert options["wandb"] == {"dir": str(tmp_path / "logs"), "name": "first"} and project == "fox"
        raise RuntimeError("api_key not configured (no-tty). call wandb.login(key=[your_api_key])\nmore")

    args = lcm.parse_args([*MINIMAL, "--output_dir", str(tmp_path), "--report_to", "wandb",
                           "--tracker_run_name", "first", "--tracker_project_name", "fox"])  # fmt: skip
    with ends_with("--report_to wandb cannot start: api_key not configured"):
        lcm.start_trackers(args, SimpleNamespace(log_with=["wandb"], init_trackers=init_trackers))


def test_letters_beyond_ascii_have_shapes(lcm, caplog):
    font = lcm.find_font("Füchse groß, лиса")
    box = bytes(font.getmask("\uffff"))
    assert all(bytes(font.getmask(letter)) != box for letter in "üßлиса")
    assert lcm.find_font("a fox").getname() == ImageFont.load_default(13).getname() and not caplog.records
    lcm.find_font("fox \U000f0000")
    assert "No font here has 1 letters" in log_of(caplog)


def test_a_grid_shows_nine_of_many_prompts(lcm, start, monkeypatch, tmp_path):
    """From the first to the last, each beside its own pictures; no others travel between processes."""
    (tmp_path / "many.txt").write_text("\n".join(f"a {number}" for number in range(25)))
    flags = "--num_validation_images 1 --validation_num_inference_steps 1 --validation_prompts".split()
    run, drawn, gathered = start(*flags, str(tmp_path / "many.txt")), [], Mock(wraps=lcm.gather_parts)
    picture = lcm.Image.new("L", (1, 1))
    monkeypatch.setattr(lcm, "gather_parts", gathered)
    monkeypatch.setattr(lcm, "draw_grid", lambda *given: drawn.append(given) or picture)
    lcm.validate_size(run, [16, 16], "")
    columns, prompts = drawn[0]
    rows = [0, 3, 6, 9, 12, 15, 18, 21, 24]
    assert prompts == [f"a {row}" for row in rows]
    assert torch.equal(columns["teacher 50"], torch.cat(run.references[""]["reference"])[rows])
    assert all(len(pictures) == 9 for pictures in columns.values())
    given = [torch.cat(call.args[1]) for call in gathered.call_args_list]
    assert {len(each) for each in given if each.ndim == 4} == {9} and {len(each) for each in given} == {9, 25}
    run.reader.close()
