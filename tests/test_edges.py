"""Edges: a resume with other flags, files that are damaged or gone, the Hub, a signal in a validation, model cards."""

import ast
import functools
import math
import os
import shutil
import signal
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import pytest
import torch
import yaml
from conftest import (
    LCM,
    LCM_LORA,
    LCM_XL_LORA,
    QUICK_VALIDATION,
    SCRIPTS,
    differences,
    ends_with,
    make_shards,
    over,
    read_metrics,
    run_main,
    tiny_args,
)
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

EITHER = [LCM, LCM_LORA]  # a whole U-Net, and a LoRA
TWO_STEPS = ("--max_train_steps", "2", "--checkpointing_steps", "2")
RESUME = ("--resume_from_checkpoint", "checkpoint-2")


# ---------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("schedule, factors", [("constant", (1, 1, 1)), ("cosine", (0.5, (1 - math.sqrt(0.5)) / 2, 0))])
def test_resume_takes_another_rate_decay_and_beta(script, start, schedule, factors):
    flags = ("--lr_scheduler", schedule, "--lr_warmup_steps", "0")
    script.train(start(*flags, *TWO_STEPS))
    run = start(*flags, *RESUME, "--learning_rate", "5e-4", "--adam_weight_decay", "0.3", "--adam_beta1", "0.5")
    (group,) = run.optimizer.optimizer.param_groups
    assert (group["weight_decay"], group["betas"]) == (0.3, (0.5, 0.999))
    assert group["lr"] == pytest.approx(5e-4 * factors[0])
    script.train(run)
    rates = [line["lr"] for line in read_metrics(run.args.output_dir)]
    assert rates[2:] == pytest.approx([5e-4 * factor for factor in factors[1:]]) and group["lr"] == rates[-1]


def test_resume_with_another_optimizer_is_refused(script, start):
    script.train(start(*TWO_STEPS))
    with ends_with("checkpoint-2 was made with --optimizer adamw: go on with that"):
        start(*RESUME, "--optimizer", "adafactor")


@over(EITHER)
def test_resume_without_ema_goes_on_from_the_student(script, start, tmp_path):
    script.train(start("--ema_decay", "0.9", *TWO_STEPS))
    run = start("--ema_decay", "0", *RESUME)
    student, target = (load_file(tmp_path / "started/checkpoint-2" / f"{name}.safetensors")
                       for name in ("student", "target"))  # fmt: skip
    assert not differences(script.network_state(run.models, "student"), student) and differences(student, target)


@over(EITHER)
def test_resume_begins_the_exported_average_as_the_student(script, start, tmp_path, capfd):
    """From a checkpoint without one; and a run that no longer wants it passes over it."""
    script.train(start(*TWO_STEPS))
    run = start("--export_ema_decay", "0.5", *RESUME)
    assert "made without --export_ema_decay: that average begins as its student" in capfd.readouterr().err
    student = load_file(tmp_path / "started/checkpoint-2/student.safetensors")
    assert not differences(script.network_state(run.models, "average"), student)
    assert differences(script.network_state(run.models, "target"), student)
    script.save_checkpoint(run)
    run = start(*RESUME)
    assert run.models.adapters.get("average", "target") == "target" and "average" not in run.nets


def test_resume_forgets_lines_that_are_cut_or_without_a_step(script, start, tmp_path):
    script.train(start(*TWO_STEPS))
    with open(tmp_path / "started" / "metrics.jsonl", "a") as file:
        file.write('{"loss": 1}\n[]\n{"step": 2, "skipped": {}')
    script.train(start(*RESUME))
    assert [line["step"] for line in read_metrics(tmp_path / "started")] == [1, 2, 3, 4]


# ---------------------------------------------------------------------------------------------- training and metrics


def test_max_grad_norm_0_clips_nothing(script, start):
    def weights(norm, steps=1):
        run = start("--max_grad_norm", norm, "--adam_weight_decay", "0")
        for _ in range(steps):
            script.train_step(run)
        return torch.cat([value.detach().flatten() for value in run.models.student_parameters])

    unclipped = weights("0")
    assert torch.equal(unclipped, weights("1e9"))
    assert not torch.equal(unclipped, weights("0.1")) and not torch.equal(unclipped, weights("0", steps=0))


def test_speeds_do_not_count_validation_and_checkpoints(script, start, monkeypatch):
    """On a clock of its own: a step takes a second and a quarter, of which it waits for its batch a quarter."""
    run, clock = start("--validation_steps", "1", "--checkpointing_steps", "1", "--logging_steps", "2"), {"now": 0.0}
    monkeypatch.setattr(script, "time", SimpleNamespace(perf_counter=lambda: clock["now"]))
    monkeypatch.setattr(script, "validate_size", lambda *_: None)

    def passes(seconds, *_):
        clock["now"] += seconds
        return DEFAULT  # what the function itself gives

    for name, seconds in {"train_step": 1, "stack": 0.25, "validate": 100, "save_checkpoint": 1000}.items():
        timed = Mock(wraps=getattr(script, name), side_effect=functools.partial(passes, seconds))
        monkeypatch.setattr(script, name, timed)
    script.train(run)
    figures = [(line["samples_per_s"], line["data_wait"]) for line in read_metrics(run.args.output_dir)]
    assert figures == [(4 / 2.5, 0.5 / 2.5)] * 2


def test_metrics_and_pictures_that_cannot_be_written_only_warn(case, train, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    (tmp_path / "validation").touch()
    train(tmp_path, "--max_train_steps", "1", "--validation_steps", "1", *QUICK_VALIDATION)
    told = capsys.readouterr().err
    assert "metrics.jsonl cannot be written: " in told and "step-1.png cannot be written: " in told
    assert case.exported(tmp_path) <= {path.name for path in tmp_path.iterdir()}


def test_signal_breaks_a_validation_off(script, train, tmp_path, monkeypatch):
    drawn = Mock(wraps=script.decode_latents, side_effect=lambda *_: os.kill(os.getpid(), signal.SIGTERM) or DEFAULT)
    monkeypatch.setattr(script, "decode_latents", drawn)
    flags = (*QUICK_VALIDATION, "--num_validation_images", "9")  # two chunks
    with pytest.raises(SystemExit) as end:
        train(tmp_path, "--validation_steps", "1", "--checkpointing_steps", "100", *flags)
    assert end.value.code == 143 and drawn.call_count == 1 and not (tmp_path / "validation").exists()
    assert [(line["step"], "lr" in line) for line in read_metrics(tmp_path)] == [(1, True)]
    assert (tmp_path / "checkpoint-1").is_dir()


def test_validation_is_not_compiled(script, start, monkeypatch):
    compiled = []
    network = torch.compile(lambda x: x + 1, backend=lambda graph, _: compiled.append(graph) or graph.forward)
    monkeypatch.setattr(script, "validate_size", lambda *_: network(torch.ones(3)))
    run = start()
    script.validate(run)
    assert len(compiled) == 0
    network(torch.ones(3))
    assert len(compiled) == 1


def test_vae_takes_a_megapixel_at_once(script, start, monkeypatch):
    flags = ["--pretrained_teacher_model", "model", "--train_shards_path_or_url", "shards.tar", "--resolution"]
    found = [script.parse_args([*flags, str(side)]).vae_encode_batch_size for side in (64, 512, 1024, 2048)]
    assert found == [256, 4, 1, 1]
    run, sizes = start("--vae_encode_batch_size", "3", *QUICK_VALIDATION, "--num_validation_images", "5"), []
    for name in ("decode", "encode"):
        original = getattr(run.models.vae, name)
        monkeypatch.setattr(run.models.vae, name, Mock(side_effect=lambda x, f=original: sizes.append(len(x)) or f(x)))
    assert len(script.Sampler(run, (16, 16)).images("target", 1)) == 5 and sizes == [3, 2]
    script.encode_images(run.models.vae, torch.zeros(4, 3, 16, 16), run.args.vae_encode_batch_size)
    assert sizes == [3, 2, 3, 1]


# ------------------------------------------------------------------------------------------------ errors at the start


@over([LCM, LCM_XL_LORA])
def test_teacher_without_its_vocabulary(start, teacher, tmp_path):
    teacher = shutil.copytree(teacher, tmp_path / "teacher")
    (max(teacher.glob("tokenizer*")) / "tokenizer.json").unlink()  # of SDXL's two the second
    with ends_with("a tokenizer knows no words, only its special tokens"):
        start(teacher=teacher)


@pytest.mark.parametrize("file, text, message", [
    ("text_encoder/model.safetensors", "no tensors", "cannot be loaded: "),
    ("model_index.json", "[]", "cannot be read as a diffusers pipeline"),
])  # fmt: skip
def test_teacher_with_a_damaged_file(start, teacher, tmp_path, file, text, message):
    teacher = shutil.copytree(teacher, tmp_path / "teacher")
    (teacher / file).write_text(text)
    with ends_with(message):
        start(teacher=teacher)


@pytest.mark.parametrize("text, message", [(b" \n\n", "holds no prompt"), (b"caf\xe9\n", "cannot be read: .*utf-8")])
def test_prompts_that_are_none(start, tmp_path, text, message):
    (tmp_path / "prompts.txt").write_bytes(text)
    with ends_with(f"--validation_prompts: {tmp_path}/prompts.txt {message}"):
        start("--validation_prompts", str(tmp_path / "prompts.txt"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_prompts_as_windows_writes_them(script, tmp_path, encoding):
    (tmp_path / "prompts.txt").write_bytes("a fox\r\na cat\r\n".encode(encoding))
    args = script.parse_args(tiny_args("t", "s", "o", "--validation_prompts", str(tmp_path / "prompts.txt")))
    assert script.load_prompts(args)[0] == ["a fox", "a cat"]


def test_prompt_files_of_one_name_keep_their_figures(script, start, tmp_path):
    files = [tmp_path / folder / "animals.txt" for folder in ("one", "two")]
    for file, text in zip(files, ("a fox\n", "a cat\na dog\n"), strict=True):
        file.parent.mkdir()
        file.write_text(text)
    run = start(*QUICK_VALIDATION, "--validation_prompts", *map(str, files))
    script.validate(run)
    (metrics,) = read_metrics(run.args.output_dir)
    every, first, second = (metrics["fidelity/teacher_psnr_k1" + suffix] for suffix in ("", "/animals", f"/{files[1]}"))
    assert first != second and every == pytest.approx((first + 2 * second) / 3, abs=2e-3)


@pytest.mark.parametrize("prefix", ["file:", "file://"])
def test_samples_behind_file_urls_are_counted(script, shards, prefix):
    urls = [prefix + url for url in script.expand_shards([shards])]
    assert script.count_samples(urls, SimpleNamespace(encoded_shards=False)) == 21


def test_samples_of_a_damaged_shard_are_not_counted(lcm, tiny, tmp_path, capsys):
    shards = make_shards(tmp_path / "shards", [7, 5, 9])
    os.truncate(tmp_path / "shards" / "00001.tar", 4000)
    arguments = tiny_args(tiny, shards, tmp_path / "run", "--num_train_epochs", "2", "--train_batch_size", "4")
    del arguments[(at := arguments.index("--max_train_steps")) : at + 2]
    run_main(lcm, arguments)
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 7, 8]  # 7 + 9, twice
    assert "00001.tar are not counted: unexpected end of data" in capsys.readouterr().err


@over(SCRIPTS)
def test_flags_that_argparse_refuses(script, capsys):
    refused = {
        "--learning_rate -1": "-1 does not lie in 0 …",
        "--adam_beta1 1": "1 does not lie in 0 …",
        "--ema_decay 1.5": "--ema_decay: 1.5 does not lie in 0 … 1",
        "--huber_c 0": "0 does not lie in",
        "--num_ddim_timesteps 0": "--num_ddim_timesteps: 0 does not lie in",
        "--max_train_steps 1e1": "--max_train_steps: invalid int value: '1e1'",
        "--validation_step 3": "unrecognized arguments: --validation_step 3",
        "--validation_num_inference_steps 11": "--validation_num_inference_steps must lie in 1 … --num_ddim_timesteps",
        "--lora_rank 4 --lora_alpha 0": "--lora_alpha: 0 does not lie in",
        "--lora_rank 4 --offload_ema": "--offload_ema is for a U-Net with an --ema_decay of its own, or",
        "--init_from gone": "--init_from gone is no folder",
        "--use_8bit_adam --optimizer prodigy": "--use_8bit_adam is --optimizer adamw8bit, not prodigy",
        **{f"--lora_rank 0 --{flag}": f"--{flag.split()[0]} needs --lora_rank" for flag in (
            "lora_alpha 4", "lora_dropout 0.1", "lora_target_modules to_q", "init_lora x", "export_fused")},
        "--lora_rank 0 --base_precision nf4": "give --lora_rank too",
    }  # fmt: skip
    for flags, message in refused.items():
        with pytest.raises(SystemExit) as end:
            script.parse_args(tiny_args("teacher", "a.tar", "out", *flags.split()))
        assert end.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1], flags


@pytest.mark.parametrize("line", [b"--seed '1", b"--seed \xe9"])
def test_files_of_flags_that_cannot_be_read(script, capsys, tmp_path, line):
    (tmp_path / "run.args").write_bytes(line)
    with pytest.raises(SystemExit) as end:
        script.parse_args([f"@{tmp_path}/run.args"])
    assert end.value.code == 2
    assert "an @file with flags cannot be read: " in capsys.readouterr().err.splitlines()[-1]


def test_schedule_that_ends_above_its_beginning(start):
    with ends_with("--lr_scheduler polynomial with this --learning_rate: lr_end"):
        start("--lr_scheduler", "polynomial", "--learning_rate", "1e-8")


def test_precision_of_accelerates_configuration_that_is_not_supported(script, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(SystemExit):
        script.parse_args(tiny_args("teacher", "a.tar", "out"))
    assert "--mixed_precision fp8, as accelerate's" in capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------------------------------ export, Hub and model card


@over(EITHER)
def test_files_of_a_run_can_be_read_by_others(case, train, tmp_path):
    mask = os.umask(0o022)
    try:
        train(tmp_path, *TWO_STEPS, *(("--export_fused",) if case.is_lora else ()))
    finally:
        os.umask(mask)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".safetensors"]) >= 4
    assert {path.stat().st_mode & 0o777 for path in files} == {0o644}


@over(EITHER)
def test_export_when_the_teacher_is_gone(case, script, start, teacher, tmp_path):
    run, output = start(teacher=shutil.copytree(teacher, tmp_path / "teacher")), tmp_path / "started"
    script.train_step(run)
    shutil.rmtree(tmp_path / "teacher")
    if case.is_lora:
        script.publish(run, script.export(run))
        assert case.exported(output) == {path.name for path in output.iterdir()}
        return
    with ends_with(f"the teacher cannot be read again .*: {output} holds unet and unet_online alone"):
        script.export(run)
    for folder, network in {"unet": run.models.target, "unet_online": run.models.student}.items():
        saved = UNet2DConditionModel.from_pretrained(output, subfolder=folder)
        assert not differences(saved.state_dict(), network.state_dict())


def test_hub_that_refuses_ends_the_run_before_its_first_step(script, train, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "create_repo", Mock(side_effect=Exception("401: not allowed\nmore")))
    monkeypatch.setattr(script, "train_step", step := Mock())
    with ends_with("--push_to_hub me/model: 401: not allowed"):
        train(tmp_path, "--push_to_hub", "--hub_model_id", "me/model")
    step.assert_not_called()


@over(EITHER)
def test_upload_that_fails_leaves_the_model_and_the_whole_name(case, script, train, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "create_repo", lambda name, **_: SimpleNamespace(repo_id=f"me/{name}"))
    monkeypatch.setattr(script, "upload_folder", Mock(side_effect=Exception("503: try later\nmore")))
    with ends_with(f"--push_to_hub: 503: try later; the model is whole in {tmp_path}/model"):
        train(tmp_path / "model", "--push_to_hub", "--max_train_steps", "1")
    assert case.exported(tmp_path / "model") <= {path.name for path in (tmp_path / "model").iterdir()}
    assert '"me/model"' in (tmp_path / "model" / "README.md").read_text().split("```")[1]


@over([LCM_LORA], "embeds_w, scale", [(False, "1"), (True, "7")])
def test_card_names_the_scale_if_the_network_takes_it(case, script, start, teacher, make_teacher, embeds_w, scale):
    """As the base of a LoRA may."""
    base = make_teacher(case.pipeline, time_cond_proj_dim=32) if embeds_w else teacher
    card = script.model_card(start("--validation_guidance_scale", "7", teacher=base), False)
    assert f"guidance_scale={scale}" in card and ("without guidance" in card) == (not embeds_w)


@over(EITHER)
def test_card_with_quotes_and_colons(script, start, teacher, tmp_path):
    teacher, prompt = str(shutil.copytree(teacher, tmp_path / 'a "tiny": teacher')), 'the word "fox"'
    run = start("--validation_prompts", prompt, teacher=teacher)
    run.args.output_dir = 'an "output"'
    _, head, text = script.model_card(run, False).split("---\n", 2)
    assert yaml.safe_load(head)["base_model"] == teacher
    nodes = [*ast.walk(ast.parse(text.split("```")[1].removeprefix("python\n")))]
    literals = {node.value for node in nodes if isinstance(node, ast.Constant)}
    assert {prompt, run.args.output_dir} <= literals and (teacher in literals) == ("load_lora" in text)


def test_a_validation_that_a_kill_prevented_is_made_up_for(train, tmp_path):
    flags = ["--max_train_steps", "2", "--checkpointing_steps", "2", "--validation_steps", "2", *QUICK_VALIDATION]
    train(tmp_path, *flags)
    picture, made = tmp_path / "validation" / "step-2.png", []
    before = picture.read_bytes()
    for is_lost in (True, False):
        if is_lost:
            picture.unlink()
        train(tmp_path, *flags, "--resume_from_checkpoint", "latest")
        assert picture.read_bytes() == before == (tmp_path / "samples.png").read_bytes()
        made.append(sum(any("fidelity" in key for key in line) for line in read_metrics(tmp_path)))
    assert made[0] == made[1]  # what is there is not made again
