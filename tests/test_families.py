"""Every method with every family of teachers, into a whole U-Net and into a LoRA: train, resume, validate, use."""

import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import SCRIPTS, Case, assert_same_end, differences, over, read_losses, read_metrics, run_main, tiny_args
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

LCM, TCD, TCD_LORA, LCM_LORA_XL, CD, CT = SCRIPTS
COMBINATIONS = [
    Case(LCM), Case(LCM, True), Case(LCM, False, True), SCRIPTS[LCM_LORA_XL],
    Case(TCD), SCRIPTS[TCD_LORA], Case(TCD, False, True), Case(TCD_LORA, True, True),
    *(Case(name, is_lora, is_sdxl) for name in (CD, CT) for is_sdxl in (False, True) for is_lora in (False, True)),
]  # fmt: skip
EMBEDDING = [case for case in COMBINATIONS if case.embeds_w]
# which a resumed run has to repeat; and what validation does is what the card says
MORE = {
    Case(LCM): ["--dataloader_num_workers", "2"], Case(LCM, True): ["--lora_dropout", "0.3"],
    Case(TCD): ["--gradient_accumulation_steps", "2"], SCRIPTS[LCM_LORA_XL]: ["--gradient_accumulation_steps", "2"],
    Case(CD, True): ["--ema_decay", "0"], Case(CD, True, True): ["--lora_dropout", "0.3"],
    Case(CT): ["--dropout", "0.3"], Case(CT, False, True): ["--discretization", "ect"],
}  # fmt: skip
V_PREDICTION = (Case(TCD, False, True), Case(CD), Case(CT, True, True))


@pytest.fixture
def teacher(case, make_teacher):
    return make_teacher(case.pipeline, **({"prediction_type": "v_prediction"} if case in V_PREDICTION else {}))


@pytest.fixture
def flags(case, teacher, shards):
    """flags(output, *more): three steps that move a student far."""
    eta = ["--validation_eta", "0.3"] if case.name in (TCD, TCD_LORA) else []

    rate = "3e-2" if case.is_lora else "1e-2"
    quick = ("--num_ddim_timesteps 20 --validation_num_inference_steps 4 --num_validation_images 1 --max_train_steps 3 "
             f"--checkpointing_steps 2 --learning_rate {rate}").split()  # fmt: skip

    def make(output, *more):
        return tiny_args(teacher, shards, output, *quick, "--validation_prompts", "a fox", "a cat", *case.flags, *eta,
                         *MORE.get(case, []), *more)  # fmt: skip

    return make


@pytest.fixture
def done(case, script, flags, kept, tmp_path_factory):
    """A run with validation: `output`, and the Run as it was exported."""
    if ("families", case) not in kept:
        output, runs, plain = tmp_path_factory.mktemp("families") / "run", [], script.export
        script.export = lambda run: runs.append(run) or plain(run)
        try:
            run_main(script, flags(output, "--validation_steps", "3"))
        finally:
            script.export = plain
        kept["families", case] = SimpleNamespace(output=output, run=runs[0])
    return kept["families", case]


@pytest.fixture
def pipe(done):
    """The student as its model card loads it, with stock classes alone, after the card's own picture."""
    code, names = re.search(r"```python\n(.*?)```", (done.output / "README.md").read_text(), re.DOTALL)[1], {}
    torch.manual_seed(0)
    exec(code, names)  # the very code that users copy
    assert names["prompt"] == "a fox" and names["image"].size == (16, 16)
    names["pipe"].set_progress_bar_config(disable=True)
    names["pipe"].call = eval(f"dict({re.search(r'pipe.prompt, (.*?)[)][.]images', code)[1]})")
    return names["pipe"]


def pictures(pipe, noise, **more):
    """Of the card's call, from this noise; and what the U-Net was given in each step."""
    seen = []
    handle = pipe.unet.register_forward_pre_hook(lambda _, args, given: seen.append((args, given)), with_kwargs=True)
    found = pipe(["a fox", "a cat"], latents=noise, generator=torch.Generator().manual_seed(0), output_type="pt",
                 **{**pipe.call, **more}).images  # fmt: skip
    handle.remove()
    return found, seen


@over(COMBINATIONS)
def test_resume_is_exact_and_validation_changes_nothing(script, flags, done, tmp_path):
    shutil.copytree(done.output / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    shutil.copy(done.output / "metrics.jsonl", tmp_path / "run")
    run_main(script, flags(tmp_path / "run", "--resume_from_checkpoint", "latest"))  # without validation
    assert_same_end(tmp_path / "run", done.output, step=3)


@over(COMBINATIONS)
def test_run(case, script, done):
    losses, run = read_losses(done.output), done.run
    assert [step for step, *_ in losses] == [1, 2, 3]
    assert all(0 < loss < 1e3 and 0 < norm < 1e5 for _, loss, norm, _ in losses)
    assert {path.name for path in done.output.iterdir()} >= case.exported(done.output) | {"samples.png", "args.json"}
    assert run.models.family is (script.StableDiffusionXL if case.is_sdxl else script.StableDiffusion)
    assert bool(run.models.adapters) == case.is_lora and bool(run.nets["student"].guidance_dim) == case.embeds_w
    student, target = (script.network_state(run.models, name) for name in ("student", "target"))
    assert bool(differences(student, target)) == bool(run.args.ema_decay)


@over(COMBINATIONS)
def test_validation_compares_the_student_with_the_model_it_started_from(case, done):
    start, end = (line for line in read_metrics(done.output) if "lr" not in line)
    gaps = {"consistency_gap", "trajectory_gap"} if case.name == CT else set()
    nets = {f"fidelity/{name}" for name in ("teacher", "untrained", "student", "target")}
    assert start.keys() == end.keys() == gaps | {"step"} | {f"{k}_{f}_k4" for k in nets for f in ("psnr", "edges")}
    assert (start["step"], end["step"]) == (0, 3)
    for name in ("student", "target"):
        key = f"fidelity/{name}_psnr_k4"
        assert start[key] == pytest.approx(start["fidelity/untrained_psnr_k4"], abs=0.01)
        assert abs(end[key] - start[key]) > 0.01
    assert start["fidelity/teacher_psnr_k4"] == end["fidelity/teacher_psnr_k4"]
    assert (done.output / "validation" / "step-3.png").is_file()


@over(COMBINATIONS)
def test_stock_diffusers_gives_the_pictures_of_validation(case, script, done, pipe):
    """With the call of the model card, from the files alone; and no unconditional pass is made."""
    assert type(pipe) is (StableDiffusionXLPipeline if case.is_sdxl else StableDiffusionPipeline)
    config = pipe.scheduler.config
    assert (type(pipe.scheduler).__name__, config.original_inference_steps) == (case.scheduler, 20)
    assert config.prediction_type == ("v_prediction" if case in V_PREDICTION else "epsilon")
    assert pipe.call["guidance_scale"] == (done.run.args.validation_guidance_scale if case.embeds_w else 1)
    sampler = script.Sampler(done.run, (16, 16))
    with script.without_dropout(done.run.nets):
        own = sampler.images("target", 4, stock=True)
    found, seen = pictures(pipe, sampler.noise)
    torch.testing.assert_close(found, own, rtol=0, atol=2e-3)
    assert [int(args[1]) for args, _ in seen] == [999, 749, 499, 249]
    assert {len(args[0]) for args, _ in seen} == {2}
    if not case.embeds_w:
        assert {given.get("timestep_cond") for _, given in seen} == {None}


@over([case for case in COMBINATIONS if case.is_lora])
def test_pictures_are_not_those_of_the_base(pipe):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    found, _ = pictures(pipe, noise)
    pipe.unload_lora_weights()
    assert (found - pictures(pipe, noise)[0]).abs().max() > 5e-3


@over(EMBEDDING)
def test_guidance_scale_is_told_to_the_student(script, done, pipe):
    """The stock pipelines of both families embed guidance_scale − 1, and the pictures depend on it."""
    noise, found = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), []
    for scale in (6.0, 16.0, 6.0):
        images, seen = pictures(pipe, noise, guidance_scale=scale)
        w = torch.full((2,), scale - 1)
        exact = StableDiffusionPipeline.get_guidance_scale_embedding(None, w, 256)
        assert {len(args[0]) for args, _ in seen} == {2} and len(seen) == 4
        for _, given in seen:
            torch.testing.assert_close(given["timestep_cond"], exact, rtol=0, atol=2e-3)
        found.append(images)
    assert (found[0] - found[1]).abs().max() > 1e-4 and torch.equal(found[0], found[2])
    net, c = done.run.nets["target"], script.Sampler(done.run, (16, 16)).c
    with torch.no_grad():  # as in training
        one, other = (net(noise, torch.full((2,), 499), c, torch.full((2,), w)) for w in (5.0, 15.0))
    assert (one - other).abs().max() > 1e-4
