"""Consistency distillation with K boundaries: the boundaries, the loss against float64, both kinds of student, export.

What this script shares with the others is tested in test_maths.py and test_train.py.
"""

import copy
import itertools
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, load_script, make_pipeline, read_metrics, run_main, tiny_args
from diffusers import DiffusionPipeline, StableDiffusionPipeline, TCDScheduler
from safetensors.torch import load_file
from test_maths import SHAPE, TYPES, alpha_sigma64, full, make_scheduler, make_unet, randn
from test_train import assert_same_end, differences, read_checkpoint, read_losses

CPU = torch.device("cpu")
LORA = ["--lora_rank", "4", "--lora_alpha", "6"]
QUICK = ["--validation_prompts", "a fox", "a cat", "--num_validation_images", "1"]


@pytest.fixture(scope="module")
def cd():
    return load_script(ROOT / "train_cd_multiboundary.py")


def parse(cd, *more):
    return cd.parse_args(tiny_args("t", "s", "o", "--num_ddim_timesteps", "50", *more))


def formula(num_boundaries, steps, total=1000):
    """b_0 > … > b_{K−1}, in exact arithmetic: b_j = g[⌊j·N/K⌋], g the grid downwards."""
    grid = [(i + 1) * (total // steps) - 1 for i in range(steps)][::-1]
    return [grid[j * steps // num_boundaries] for j in range(num_boundaries)]


def make_schedule(cd, num_boundaries, steps=50, prediction_type="epsilon"):
    scheduler = make_scheduler(prediction_type)
    schedule = cd.Schedule(scheduler, steps, CPU)
    exported = cd.make_scheduler(scheduler.config, SimpleNamespace(num_ddim_timesteps=steps))
    schedule.end = cd.find_boundaries(schedule, exported, num_boundaries)
    return schedule


def ends(num_boundaries, steps):
    """The end time of every grid point, from the formula: t in (b_{j+1}, b_j] → b_{j+1}, and 0 below the last."""
    boundaries, spacing = [*formula(num_boundaries, steps), 0], 1000 // steps
    grid = [(i + 1) * spacing - 1 for i in range(steps)]
    pairs = list(itertools.pairwise(boundaries))
    return [next(low for high, low in pairs if low < t <= high) if t else 0 for t in grid]


# --------------------------------------------------------------------------------------------------- the boundaries

GRIDS = [(k, steps) for steps in (20, 40, 50, 100) for k in (*range(1, 9), steps)]


@pytest.mark.parametrize("num_boundaries, steps", GRIDS)
def test_boundaries_are_what_the_exported_scheduler_visits(cd, tmp_path, num_boundaries, steps):
    scheduler = cd.make_scheduler(make_scheduler().config, SimpleNamespace(num_ddim_timesteps=steps))
    scheduler.save_pretrained(tmp_path)
    stock = TCDScheduler.from_pretrained(tmp_path)
    stock.set_timesteps(num_boundaries)
    assert stock.timesteps.tolist() == formula(num_boundaries, steps)
    found = make_schedule(cd, num_boundaries, steps).end.tolist()
    assert sorted({*found}, reverse=True) == [*formula(num_boundaries, steps)[1:], 0]


@pytest.mark.parametrize("num_boundaries, steps", [*GRIDS, (3, 7), (7, 30), (1, 1), (4, 500)])
def test_end_time_of_every_grid_point(cd, num_boundaries, steps):
    schedule = make_schedule(cd, num_boundaries, steps)
    assert schedule.end.tolist() == ends(num_boundaries, steps)
    assert (schedule.end < schedule.grid).all()
    assert (schedule.end <= schedule.prev).all()  # one step of the teacher never leaves the segment


@pytest.mark.parametrize("num_boundaries", [1, 4, 1000])
def test_a_grid_of_every_timestep_ends_at_zero(cd, num_boundaries):
    """N above T/2: the grid begins at t = 0, where nothing is left to jump over."""
    schedule = make_schedule(cd, num_boundaries, 1000)
    assert schedule.grid[0] == 0
    assert schedule.end.tolist() == ends(num_boundaries, 1000)


def test_known_boundaries(cd):
    assert [formula(k, 50) for k in (1, 2, 4)] == [[999], [999, 499], [999, 759, 499, 259]]
    schedule = make_schedule(cd, 4)
    pairs = dict(zip(schedule.grid.tolist(), schedule.end.tolist(), strict=True))
    assert [pairs[t] for t in (999, 779, 759, 519, 499, 279, 259, 19)] == [759, 759, 499, 499, 259, 259, 0, 0]
    assert make_schedule(cd, 1).end.tolist() == [0] * 50
    assert torch.equal(make_schedule(cd, 50).end, make_schedule(cd, 50).prev)


# --------------------------------------------------------------------------------------------------------- the loss


@pytest.fixture
def nets(cd):
    """Student, target and teacher with weights of their own, and the inputs of a loss.

    The times for K = 4: below the first boundary, just above one, at one, and the highest.
    """
    unets = {"student": make_unet(0), "target": make_unet(1), "teacher": make_unet(2)}
    draws = cd.Draws(randn(), torch.tensor([3, 13, 24, 49]), torch.tensor([0.0, 0.5, 1.0, 7.0]))
    given = {"x_0": randn(seed=1), "c": randn(4, 16, 16, seed=2), "uncond": randn(1, 16, 16, seed=3), "draws": draws}
    denoisers = {name: cd.Denoiser(unet, unet, None) for name, unet in unets.items()}
    return SimpleNamespace(unets=unets, given=given, **denoisers)


def predict64(unet, x_t, t, c, prediction_type):
    out, (alpha, sigma) = unet(x_t, t, c).sample, alpha_sigma64(t)
    if prediction_type == "epsilon":
        return (x_t - sigma * out) / alpha, out
    if prediction_type == "sample":
        return out, (x_t - alpha * out) / sigma
    return alpha * x_t - sigma * out, sigma * x_t + alpha * out


def jump64(pair, s):
    alpha, sigma = alpha_sigma64(s)
    return alpha * pair[0] + sigma * pair[1]


def pair64(unets, x_0, c, uncond, draws, end, prediction_type="epsilon", spacing=20):
    """What student and target say, and x̂_prev, in float64, from the formulas of the papers; `end` = s."""
    unets = {name: copy.deepcopy(unet).double() for name, unet in unets.items()}
    x_0, c, uncond, eps, w = (value.double() for value in (x_0, c, uncond, draws.eps, draws.w.view(-1, 1, 1, 1)))
    t = (draws.index + 1) * spacing - 1
    t_prev = (t - spacing).clamp_min(0)
    x_t = jump64((x_0, eps), t)
    guided, plain = (
        predict64(unets["teacher"], x_t, t, states, prediction_type) for states in (c, uncond.repeat(4, 1, 1))
    )
    x_prev = jump64([cond + w * (cond - without) for cond, without in zip(guided, plain, strict=True)], t_prev)
    target = jump64(predict64(unets["target"], x_prev, t_prev, c, prediction_type), end)
    target = torch.stack([x_prev[i] if end[i] == t_prev[i] else target[i] for i in range(len(t))])
    return jump64(predict64(unets["student"], x_t, t, c, prediction_type), end), target, x_prev


@pytest.mark.parametrize("loss_type, huber_c", [("l2", 0.001), ("huber", 0.001), ("huber", 1.0)])
@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("num_boundaries", [1, 4, 50])
def test_loss_equals_float64(cd, nets, num_boundaries, prediction_type, loss_type, huber_c):
    args = parse(cd, "--loss_type", loss_type, "--huber_c", str(huber_c))
    schedule = make_schedule(cd, num_boundaries, 50, prediction_type)
    end = torch.tensor(ends(num_boundaries, 50))[nets.given["draws"].index]
    with torch.no_grad():
        found = cd.distillation_loss(nets.student, nets.target, nets.teacher, schedule, args=args, **nets.given)
        student, target, _ = pair64(nets.unets, **nets.given, end=end, prediction_type=prediction_type)
    d = student - target
    exact = (d**2 if loss_type == "l2" else (d**2 + huber_c**2).sqrt() - huber_c).mean().item()
    assert exact > 5e-5 and found.item() == pytest.approx(exact, rel=3e-4)


def test_one_boundary_is_plain_consistency_distillation(cd, nets):
    """K = 1: both networks jump to the end of the trajectory, f(x, t) = α_0 x̂_0 + σ_0 ε̂, from every time."""
    args, x_0, draws = parse(cd, "--loss_type", "l2"), nets.given["x_0"], nets.given["draws"]
    schedule = make_schedule(cd, 1)
    with torch.no_grad():
        found = cd.distillation_loss(nets.student, nets.target, nets.teacher, schedule, args=args, **nets.given)
        t = schedule.grid[draws.index]
        *_, x_prev = pair64(nets.unets, **nets.given, end=full(0))
        x_t = schedule.jump(x_0, draws.eps, t)
        alpha_0, sigma_0 = 0.99957491, 0.02915476  # ᾱ_0 = 1 − 0.00085
        f = []
        for name, x, time in (("student", x_t, t), ("target", x_prev.float(), t - 20)):
            (alpha, sigma), out = alpha_sigma64(time), nets.unets[name](x, time, nets.given["c"]).sample
            f.append(alpha_0 * (x - sigma * out) / alpha + sigma_0 * out)
    assert found.item() == pytest.approx((f[0] - f[1]).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("num_boundaries, there", [(1, [0, 0, 0, 0]), (4, [0, 1, 0, 0]), (50, [1, 1, 1, 1])])
def test_target_is_x_prev_at_a_boundary(cd, nets, monkeypatch, num_boundaries, there):
    seen, is_there = [], torch.tensor(there).bool()
    monkeypatch.setattr(cd, "distance", lambda a, b, *_: seen.append((a, b)) or a.sum())
    with torch.no_grad():
        cd.distillation_loss(nets.student, nets.target, nets.teacher, make_schedule(cd, num_boundaries),
                             args=parse(cd), **nets.given)  # fmt: skip
        end = torch.tensor(ends(num_boundaries, 50))[nets.given["draws"].index]
        _, target, x_prev = pair64(nets.unets, **nets.given, end=end)
    found = seen[0][1].double()
    torch.testing.assert_close(found, target, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[is_there], x_prev[is_there], rtol=1e-3, atol=1e-3)
    assert all((found[i] - x_prev[i]).abs().max() > 0.05 for i in range(4) if not there[i])


@pytest.mark.parametrize("prediction_type", TYPES)
def test_as_many_boundaries_as_grid_points_and_the_teacher_as_student(cd, nets, prediction_type):
    """K = N: the student has to do what the teacher does. It is the teacher: what is left is the guidance."""
    schedule, args, teacher = make_schedule(cd, 50, 50, prediction_type), parse(cd, "--loss_type", "l2"), nets.teacher
    # the target is not asked: it answers nonsense
    ask = lambda **given: cd.distillation_loss(  # noqa: E731
        teacher, lambda x, *_: torch.full_like(x, torch.nan), teacher, schedule, args=args, **given
    )
    draws, losses = nets.given["draws"], []
    for w in (0.0, 1.0, 2.0):
        losses.append(ask(**{**nets.given, "draws": cd.Draws(draws.eps, draws.index, torch.full((4,), w))}).item())
    zero = {**nets.given, "uncond": None, "draws": cd.Draws(draws.eps, draws.index, torch.zeros(4))}
    assert ask(**zero).item() == 0 and losses[0] < 1e-9
    # x̂_prev − f = w · jump(cond − uncond)
    unet, c, uncond = copy.deepcopy(nets.unets["teacher"]).double(), nets.given["c"], nets.given["uncond"]
    t = (draws.index + 1) * 20 - 1
    x_t = jump64((nets.given["x_0"].double(), draws.eps.double()), t)
    with torch.no_grad():
        pairs = [predict64(unet, x_t, t, states.double(), prediction_type) for states in (c, uncond.repeat(4, 1, 1))]
    apart = [cond - without for cond, without in zip(*pairs, strict=True)]
    exact = jump64(apart, t - 20).square().mean().item()
    assert exact > 1e-6 and losses[1:] == pytest.approx([exact, 4 * exact], rel=1e-2)


def test_gradient_reaches_all_of_the_student_and_nothing_else(cd, nets):
    for unet in nets.unets.values():
        unet.requires_grad_(True)
    cd.distillation_loss(nets.student, nets.target, nets.teacher, make_schedule(cd, 4), args=parse(cd),
                         **nets.given).backward()  # fmt: skip
    grads = {name: [p.grad for p in unet.parameters()] for name, unet in nets.unets.items()}
    assert all(grad is not None and grad.any() for grad in grads["student"])
    assert not [grad for name in ("target", "teacher") for grad in grads[name] if grad is not None]


# --------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "flags, w_min, w_max, scale",
    [
        ([], 6.5, 6.5, 7.5),
        (["--guidance_scale", "3"], 2, 2, 3),
        (["--guidance_scale", "1"], 0, 0, 1),
        (["--w_min", "2", "--w_max", "5"], 2, 5, 4.5),
        (["--w_min", "0", "--w_max", "0"], 0, 0, 1),
        (["--w_min", "2", "--w_max", "5", "--validation_guidance_scale", "9"], 2, 5, 9),
    ],
)
def test_guidance_of_the_teacher(cd, flags, w_min, w_max, scale):
    args = parse(cd, *flags)
    assert (args.w_min, args.w_max, args.validation_guidance_scale) == (w_min, w_max, scale)
    w = cd.draw(torch.zeros(1000, 1, 1, 1), make_schedule(cd, 4), args, torch.Generator().manual_seed(0)).w
    assert w.min() >= w_min and w.max() <= w_max and w.mean() == pytest.approx((w_min + w_max) / 2, abs=0.15)
    assert w.std() == pytest.approx((w_max - w_min) / 12**0.5, abs=0.1)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--guidance_scale", "3", "--w_min", "1", "--w_max", "2"], "--guidance_scale is one value"),
        (["--guidance_scale", "3", "--w_min", "0"], "--guidance_scale is one value"),
        (["--w_min", "1"], "come together"),
        (["--w_max", "1"], "come together"),
        (["--w_min", "2", "--w_max", "1"], "is above"),
        (["--guidance_scale", "0.5"], "--guidance_scale"),
        (["--num_boundaries", "51"], "--num_boundaries"),
        (["--num_boundaries", "0"], "--num_boundaries"),
        (["--init_from", "no/such/folder"], "--init_from no/such/folder is no folder"),
        (["--init_lora", "some.safetensors"], "--init_lora needs --lora_rank"),
    ],
)
def test_refused_arguments(cd, capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        parse(cd, *flags)
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("k, n, steps", [(4, 50, [4, 8]), (1, 50, [1, 2]), (30, 50, [30]), (25, 50, [25, 50])])
def test_validation_steps_are_the_boundaries_and_twice_as_many(cd, k, n, steps):
    args = parse(cd, "--num_boundaries", str(k), "--num_ddim_timesteps", str(n))
    assert args.validation_num_inference_steps == steps
    assert parse(cd, "--validation_num_inference_steps", "3").validation_num_inference_steps == [3]


# -------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def train(cd, tiny, shards, monkeypatch):
    """train(output, *more): four steps with a checkpoint every two; its result has `output`, and the run as `run`."""
    runs, plain = [], cd.export
    monkeypatch.setattr(cd, "export", lambda run: runs.append(run) or plain(run))

    def run(output, *more, teacher=tiny):
        run_main(cd, tiny_args(teacher, shards, output, "--checkpointing_steps", "2", *more))
        return SimpleNamespace(output=Path(output), run=runs[-1])

    return run


def unet_of(pipeline):
    return load_file(Path(pipeline) / "unet" / "diffusion_pytorch_model.safetensors")


def base_of(unet):
    """The tensors of a U-Net below its adapters, by the names they have without."""
    return {key.replace(".base_layer", ""): value for key, value in unet.state_dict().items() if ".lora_" not in key}


@pytest.mark.parametrize("kind", [[], LORA], ids=["full", "lora"])
@pytest.mark.parametrize("flags", [[], ["--num_boundaries", "1", "--loss_type", "l2", "--w_min", "1", "--w_max", "9"]],
                         ids=["four", "one"])  # fmt: skip
def test_run(cd, train, tiny, tmp_path, kind, flags):
    done = train(tmp_path / "run", *kind, *flags)
    losses = read_losses(done.output)
    assert [step for step, *_ in losses] == [1, 2, 3, 4]
    assert all(0 < loss < 100 and 0 < norm < 1e4 for _, loss, norm, _ in losses)
    models = done.run.models
    assert not differences(base_of(models.teacher), unet_of(tiny))  # the teacher, also below the adapters
    moved = []
    for name in ("student", "target"):
        state = cd.network_state(models, name)
        start = {key: torch.zeros_like(value) for key, value in state.items() if "lora_B" in key} or unet_of(tiny)
        assert len(start) > 20
        moved.append(sum((state[key] - value).abs().sum().item() for key, value in start.items()))
    assert 0 < moved[1] < moved[0]


def test_a_lora_that_is_the_teacher_has_nothing_to_learn(train, tmp_path):
    """K = N without guidance: the untrained student is right, bit for bit, at every step."""
    done = train(tmp_path / "run", *LORA, "--num_boundaries", "10", "--guidance_scale", "1")
    assert [(loss, norm) for _, loss, norm, _ in read_losses(done.output)] == [(0, 0)] * 4
    guided = train(tmp_path / "guided", *LORA, "--num_boundaries", "10", "--guidance_scale", "2")
    assert all(loss > 0 for _, loss, *_ in read_losses(guided.output))


def test_dropout_is_for_the_student_alone(train, tmp_path, monkeypatch):
    """Also in the first step of a run: neither the teacher nor the target drops anything."""
    plain, seen = torch.nn.Dropout.forward, set()

    def forward(module, x):
        if module.p:
            seen.add((module.training, torch.is_grad_enabled()))
        return plain(module, x)

    monkeypatch.setattr(torch.nn.Dropout, "forward", forward)
    train(tmp_path, *LORA, "--lora_dropout", "0.3", "--max_train_steps", "2")
    assert seen == {(True, True), (False, False)}


def test_no_unconditional_pass_without_guidance(cd, train, tmp_path, monkeypatch):
    plain = cd.Denoiser.__call__
    for scale, sizes in (("1", {2}), ("3", {2, 4})):
        seen = set()
        monkeypatch.setattr(
            cd.Denoiser, "__call__", lambda net, x, *args, seen=seen: (seen.add(len(x)), plain(net, x, *args))[1]
        )
        train(tmp_path / scale, "--guidance_scale", scale)
        assert seen == sizes


def test_gradient_of_a_lora_reaches_the_students_adapter_alone(cd, train, tmp_path):
    done = train(tmp_path, *LORA)
    run, unet = done.run, done.run.models.student
    for parameter in unet.parameters():
        parameter.grad = None
    draws = cd.Draws(randn(2, 4, 8, 8), torch.tensor([2, 9]), torch.tensor([0.0, 3.0]))
    cd.distillation_loss(**run.nets, schedule=run.models.schedule, x_0=randn(2, 4, 8, 8, seed=1),
                         c=randn(2, 16, 16), uncond=run.uncond, draws=draws, args=run.args).backward()  # fmt: skip
    touched = {name for name, p in unet.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {name for name, _ in unet.named_parameters() if re.search(r"\.lora_[AB]\.default\.", name)}
    assert len(touched) > 20


RESUMED = [
    pytest.param([], id="full"),
    pytest.param(["--dataloader_num_workers", "2", "--gradient_accumulation_steps", "2"], id="full, two workers"),
    pytest.param(["--ema_decay", "0"], id="full, no EMA"),
    pytest.param([*LORA, "--dataloader_num_workers", "2", "--gradient_accumulation_steps", "2"],
                 id="lora, two workers"),
    pytest.param([*LORA, "--lora_dropout", "0.3"], id="lora, dropout"),
    pytest.param([*LORA, "--ema_decay", "0"], id="lora, no EMA"),
]  # fmt: skip


@pytest.mark.parametrize("flags", RESUMED)
def test_resume_is_exact(train, tmp_path, flags):
    whole = train(tmp_path / "whole", *flags).output
    parts = tmp_path / "parts"
    shutil.copytree(whole / "checkpoint-2", parts / "checkpoint-2")
    shutil.copy(whole / "metrics.jsonl", parts)
    train(parts, *flags, "--resume_from_checkpoint", "latest")
    assert_same_end(parts, whole)
    assert differences(read_checkpoint(whole / "checkpoint-2"), read_checkpoint(whole / "checkpoint-4"))


@pytest.mark.parametrize("kind", [[], LORA], ids=["full", "lora"])
def test_without_an_average_the_target_is_the_student(train, tmp_path, kind):
    found, averaged = (train(tmp_path / decay, *kind, "--ema_decay", decay) for decay in ("0", "0.95"))
    models = found.run.models
    assert models.target is models.student
    for one, two in zip(models.student_parameters, models.target_parameters, strict=True):
        assert one is two
    for done, is_same in ((found, True), (averaged, False)):
        files = (f"{name}.safetensors" for name in ("student", "target"))
        student, target = (load_file(done.output / "checkpoint-4" / file) for file in files)
        assert (not differences(student, target)) == is_same
    (first, *rest), (other, *others) = (read_losses(done.output) for done in (found, averaged))
    assert first == other and rest != others
    if kind:
        assert not [name for name, _ in models.student.named_parameters() if ".target." in name]


# ------------------------------------------------------------------------------------------------ from an earlier run


@pytest.fixture(scope="module")
def earlier(cd, tiny, shards, tmp_path_factory):
    """Output folders of two runs with K = 4: the EMA weights and the last ones differ."""
    folders = {}
    for kind, flags in (("full", []), ("lora", LORA)):
        folders[kind] = tmp_path_factory.mktemp("earlier") / kind
        run_main(cd, tiny_args(tiny, shards, folders[kind], "--ema_decay", "0.5", "--max_train_steps", "2", *flags))
    return folders


def test_full_student_starts_as_the_earlier_average(cd, train, tiny, earlier, tmp_path, monkeypatch):
    monkeypatch.setattr(cd, "train", lambda _: None)
    done = train(tmp_path / "run", "--init_from", str(earlier["full"]), "--num_boundaries", "2")
    before = {name: load_file(earlier["full"] / name / "diffusion_pytorch_model.safetensors")
              for name in ("unet", "unet_online")}  # fmt: skip
    assert differences(before["unet"], before["unet_online"])
    assert differences(before["unet"], unet_of(tiny))
    for name in ("unet", "unet_online"):
        assert not differences(load_file(done.output / name / "diffusion_pytorch_model.safetensors"), before["unet"])
    assert not differences(dict(done.run.models.teacher.state_dict()), unet_of(tiny))
    assert done.run.models.schedule.end.tolist() == [0, 0, 0, 0, 0, *[499] * 5]  # K = 2 on ten points


def test_lora_student_starts_as_the_earlier_adapter(cd, train, tiny, earlier, tmp_path, monkeypatch):
    monkeypatch.setattr(cd, "train", lambda _: None)
    done = train(tmp_path / "run", "--init_from", str(earlier["lora"]), "--lora_rank", "8", "--num_boundaries", "2")
    files = [f"pytorch_lora_weights{end}.safetensors" for end in ("", "_online")]
    before, online = (load_file(earlier["lora"] / file) for file in files)
    assert differences(before, online)
    for file in files:
        assert not differences(load_file(done.output / file), before)
    config = done.run.models.student.peft_config["default"]
    assert (config.r, config.lora_alpha) == (4, 6)  # of the earlier run
    assert not differences(base_of(done.run.models.teacher), unet_of(tiny))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_goes_on_from_an_earlier_one(train, earlier, tmp_path, kind):
    """K = 4 → 2; and the interrupted second run resumes exactly, although --init_from is still given."""
    flags = ["--num_boundaries", "2", "--init_from", str(earlier[kind]), *(LORA if kind == "lora" else [])]
    whole = train(tmp_path / "whole", *flags).output
    shutil.copytree(whole / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    shutil.copy(whole / "metrics.jsonl", tmp_path / "parts")
    assert_same_end(train(tmp_path / "parts", *flags, "--resume_from_checkpoint", "latest").output, whole)
    assert json.loads((whole / "args.json").read_text())["num_boundaries"] == 2


@pytest.mark.parametrize("source, flags", [("lora", []), ("full", LORA), (None, []), (None, LORA)])
def test_init_from_a_folder_without_the_right_weights(train, earlier, tmp_path, source, flags):
    (tmp_path / "empty").mkdir()
    folder = earlier[source] if source else tmp_path / "empty"
    with pytest.raises(SystemExit, match="^error: .*--init_(from|lora)") as end:
        train(tmp_path / "run", "--init_from", str(folder), *flags)
    assert "\n" not in end.value.code


# -------------------------------------------------------------------------------------------- validation and export


@pytest.fixture(scope="module")
def shown(cd, tiny, shards, tmp_path_factory):
    """Runs with validation whose students differ visibly from their teachers: (teacher, Run, output) by kind."""
    found, plain = {}, cd.export
    velocity = make_pipeline(tmp_path_factory.mktemp("velocity"), prediction_type="v_prediction")
    for kind, teacher, flags in (("full", tiny, []), ("v", velocity, []), ("lora", tiny, [*LORA, "--export_fused"])):
        output, runs = tmp_path_factory.mktemp("shown") / kind, []
        cd.export = lambda run, runs=runs: runs.append(run) or plain(run)
        try:
            run_main(cd, tiny_args(teacher, shards, output, *QUICK, "--validation_steps", "4", "--num_ddim_timesteps",
                                   "20", "--guidance_scale", "4", "--learning_rate", "1e-2", *flags))  # fmt: skip
        finally:
            cd.export = plain
        found[kind] = SimpleNamespace(teacher=teacher, run=runs[0], output=output)
    return found


def load(done, kind):
    """The student as users load it, with stock classes alone."""
    if kind == "fused":
        return DiffusionPipeline.from_pretrained(done.output / "fused")
    if kind in ("full", "v"):
        return DiffusionPipeline.from_pretrained(done.output)
    pipe = DiffusionPipeline.from_pretrained(done.teacher)
    name = "lora_kohya.safetensors" if kind == "kohya" else "pytorch_lora_weights.safetensors"
    pipe.load_lora_weights(done.output, weight_name=name)
    pipe.scheduler = TCDScheduler.from_pretrained(done.output, subfolder="scheduler")
    return pipe


@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize("kind", ["full", "v", "lora", "kohya", "fused"])
def test_export_gives_the_pictures_of_the_scripts_own_chain(cd, shown, kind, steps):
    done = shown["lora" if kind in ("kohya", "fused") else kind]
    pipe, run = load(done, kind), done.run
    assert isinstance(pipe, StableDiffusionPipeline) and isinstance(pipe.scheduler, TCDScheduler)
    assert pipe.scheduler.config.original_inference_steps == 20
    pipe.set_progress_bar_config(disable=True)
    sampler = cd.Sampler(run, (16, 16))
    call = {"num_inference_steps": steps, "eta": 0, "guidance_scale": 1, "latents": sampler.noise}
    latents = pipe(["a fox", "a cat"], **call, output_type="latent").images
    assert pipe.scheduler.timesteps.tolist() == formula(steps, 20)
    # the jumps that were trained (for 8 steps: and those between), in the script's own functions
    x, net, schedule, given = sampler.noise, run.nets["target"], run.models.schedule, {"c": sampler.c, "w": None}
    with torch.no_grad():
        for t, s in itertools.pairwise([*formula(steps, 20), 0]):
            x = cd.trajectory_function(net, schedule, x, full(t, 2), full(s, 2), **given)
    torch.testing.assert_close(latents, x, rtol=1e-3, atol=2e-3)
    pictures = pipe(["a fox", "a cat"], **call, output_type="pt").images
    torch.testing.assert_close(pictures, sampler.images("target", steps, stock=True), rtol=0, atol=2e-3)
    chain, untrained = (sampler.images(name, steps) for name in ("target", "untrained"))
    last = (pictures - chain).abs().mean()  # the chain ends in x̂_0, the scheduler at ᾱ_0
    assert last < 0.02 and (pictures - untrained).abs().mean() > 4 * last


def test_validation_metrics(shown):
    for done in shown.values():
        lines = [line for line in read_metrics(done.output) if "lr" not in line]
        assert [line["step"] for line in lines] == [0, 4]
        parts = itertools.product(("teacher", "untrained", "student", "target"), ("psnr", "sharpness"), (4, 8))
        names = {f"fidelity/{net}_{figure}_k{k}" for net, figure, k in parts}
        assert all(line.keys() == {"step", *names} for line in lines)
        assert lines[0]["fidelity/student_psnr_k4"] == pytest.approx(lines[0]["fidelity/untrained_psnr_k4"], abs=1e-3)
        assert lines[1]["fidelity/student_psnr_k4"] != lines[1]["fidelity/untrained_psnr_k4"]
        assert (done.output / "validation" / "step-4.png").is_file()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_validation_does_not_touch_training(cd, shown, shards, tmp_path, kind):
    done = shown[kind]
    run_main(cd, tiny_args(done.teacher, shards, tmp_path / "run", "--num_ddim_timesteps", "20", "--guidance_scale",
                           "4", "--learning_rate", "1e-2", *(LORA if kind == "lora" else [])))  # fmt: skip
    assert read_losses(tmp_path / "run") == read_losses(done.output)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_model_card(cd, shown, kind):
    done = shown[kind]
    card = (done.output / "README.md").read_text()
    assert "guidance scale\n4 to 4 built in" in card and f"{cd.TAG}]\n" in card
    code, names = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {}
    assert "num_inference_steps=4, guidance_scale=1, eta=0" in code
    torch.manual_seed(0)
    exec(code, names)  # the very code that users copy
    assert names["image"].size == (16, 16) and names["prompt"] == "a fox"
    assert names["pipe"].scheduler.timesteps.tolist() == formula(4, 20)


def test_exported_lora_drops_nothing(train, tiny, tmp_path):
    """--lora_dropout is for training: what diffusers loads has no layer in training mode that drops anything."""
    done = train(tmp_path / "run", *LORA, "--lora_dropout", "0.5", "--learning_rate", "1e-2")
    pipe = DiffusionPipeline.from_pretrained(tiny)
    pipe.load_lora_weights(done.output, weight_name="pytorch_lora_weights.safetensors")
    x, t, c = randn(), full(500), randn(4, 16, 16)
    with torch.no_grad():
        one, other = (pipe.unet(x, t, c).sample for _ in range(2))
        pipe.disable_lora()
        assert not torch.allclose(one, pipe.unet(x, t, c).sample, atol=1e-2)
    assert torch.equal(one, other)


def test_a_teacher_that_embeds_w(cd, train, make_teacher, tmp_path):
    """Its student embeds w too, and is trained at that of --guidance_scale: the card has to say so."""
    teacher = make_teacher(make_pipeline, time_cond_proj_dim=32)
    done = train(tmp_path / "run", "--guidance_scale", "4", teacher=teacher)
    assert done.run.uncond is None and done.run.nets["student"].guidance_dim == 32
    pipe, sampler = DiffusionPipeline.from_pretrained(done.output), cd.Sampler(done.run, (16, 16))
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe(sampler.prompts, num_inference_steps=4, eta=0, output_type="pt", guidance_scale=4,
                    num_images_per_prompt=sampler.seeds, latents=sampler.noise).images  # fmt: skip
    torch.testing.assert_close(pictures, sampler.images("target", 4, stock=True), rtol=0, atol=2e-3)
    assert "guidance_scale=4," in (done.output / "README.md").read_text()


def test_deterministic_sampling_draws_no_noise(cd, shown):
    """At eta = 0 the exported scheduler asks for none: other seeds give the same picture."""
    sampler = cd.Sampler(shown["full"].run, (16, 16))
    args, net, scheduler = shown["full"].run.args, shown["full"].run.nets["target"], shown["full"].run.models.scheduler
    one, other = (cd.sample_stock(net, scheduler, sampler.noise, 4, sampler.c, None, SimpleNamespace(seed=seed))
                  for seed in (args.seed, 1))  # fmt: skip
    assert torch.equal(one, other) and one.shape == (2, *SHAPE[1:])
