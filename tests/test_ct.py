"""Consistency training: curricula, sampling of t and losses against the papers' formulas, dropout, gaps, runs."""

import copy
import gc
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    LORA_FLAGS,
    QUICK_VALIDATION,
    SCRIPTS,
    assert_same_end,
    differences,
    ends_with,
    make_sdxl_pipeline,
    read_checkpoint,
    read_losses,
    read_metrics,
    run_main,
    tiny_args,
)
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from test_maths import (
    SHAPE,
    TYPES,
    alpha_sigma64,
    denoiser,
    distance64,
    full,
    make_scheduler,
    make_unet,
    randn,
    random_c,
    scalings64,
)
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
LORA = [*LORA_FLAGS]
# σ̃ = σ/α of every timestep, in float64
NOISE = np.array([(sigma / alpha).item() for alpha, sigma in zip(*alpha_sigma64(range(1000)), strict=True)])


@pytest.fixture
def case():
    return SCRIPTS["train_ct"]


@pytest.fixture
def ct(script):
    return script


def parse(ct, *more):
    return ct.parse_args(tiny_args("t", "s", "o", "--num_ddim_timesteps", "50", *more))


def make_schedule(ct, prediction_type="epsilon", steps=50):
    return ct.Schedule(make_scheduler(prediction_type), steps, CPU)


def test_noise_levels(ct):
    torch.testing.assert_close(ct.noise_levels(make_schedule(ct)).double(), torch.from_numpy(NOISE), rtol=1e-4, atol=0)
    zero = make_scheduler("v_prediction", rescale_betas_zero_snr=True)
    levels = ct.noise_levels(ct.Schedule(zero, 50, CPU))
    assert zero.alphas_cumprod[-1] == 0 and levels.isfinite().all() and (levels.diff() > 0).all()


# ------------------------------------------------------------------------------------------------------- curricula


def test_known_levels(ct):
    """iCT's own constants: 10 levels, doubled every eighth of the run, up to 1280, of which SD has 999."""
    args = parse(ct, "--discretization", "ict", "--max_train_steps", "800")
    found = [ct.ict_levels(args, step, 1000) for step in (0, 99, 100, 199, 200, 300, 400, 500, 599, 600, 699, 700, 799)]
    assert found == [10, 10, 20, 20, 40, 80, 160, 320, 320, 640, 640, 999, 999]
    assert ct.ict_levels(args, 799, 4000) == 1280
    assert (args.ict_s0, args.ict_s1) == (10, 1280)


@pytest.mark.parametrize(
    "s0, s1, total", [(10, 1280, 1000), (10, 1280, 4000), (3, 50, 1000), (2, 2, 1000), (10, 79, 64), (2, 8, 1000)]
)
@pytest.mark.parametrize("steps", [5, 100, 797, 10000])
def test_levels_are_the_papers(ct, s0, s1, total, steps):
    """N(k) = min(s0·2^⌊k/K'⌋, s1) + 1, K' = ⌊K/(log2⌊s1/s0⌋ + 1)⌋ (iCT, arXiv:2310.14189, §3.4); N(k) − 1 pairs."""
    args = parse(ct, "--max_train_steps", str(steps), "--ict_s0", str(s0), "--ict_s1", str(s1))
    length = max(1, int(steps / (np.log2(s1 // s0) + 1)))
    found = [ct.ict_levels(args, step, total) for step in range(steps)]
    for step in {0, length - 1, length, 2 * length, 3 * length - 1, steps // 2, steps - 1} & {*range(steps)}:
        levels = s0
        for _ in range(step // length):
            levels = min(2 * levels, 10**6)
        assert found[step] == min(levels, s1, total - 1), step
    assert found == sorted(found) and found[0] == min(s0, total - 1)


@pytest.mark.parametrize("levels", [1, 2, 3, 10, 20, 40, 160, 640, 998, 999])
def test_ict_times(ct, levels):
    """Karras' levels, σ̃_i^(1/7) evenly spaced (arXiv:2206.00364, eq. 5), each at a time of its own; r is the one below.

    A level's time is the nearest, unless a neighbour has it: the lowest levels are closer than DDPM's times.
    """
    args = parse(ct, "--discretization", "ict", "--max_train_steps", "9")
    args.ict_s0 = args.ict_s1 = levels
    t, r = (times.tolist() for times in ct.curriculum(make_schedule(ct), args, 0))
    assert (len(t), t[-1], r[0]) == (levels, 999, 0)
    assert r[1:] == t[:-1]
    assert all(low < high for low, high in zip(r, t, strict=True))
    low, high = NOISE[0] ** (1 / 7), NOISE[-1] ** (1 / 7)
    nearest = [abs(NOISE - (low + i / levels * (high - low)) ** 7).argmin() for i in range(1, levels + 1)]
    exact, last = [], 0
    for i, time in enumerate(nearest, 1):
        last = min(max(time, last + 1), 999 - (levels - i))
        exact.append(last)
    assert (exact == nearest) == (levels <= 40)  # 40 are the most that DDPM's times tell apart
    off = np.abs(np.subtract(t, exact))  # where float32 sees another as the nearest
    assert off.max() <= 1 and off.mean() < 0.02


def test_the_times_of_a_stage_are_found_once(ct, monkeypatch):
    """A step of a stage that has begun asks for nothing but the random draws."""
    calls, plain = [], ct.nearest_times
    monkeypatch.setattr(ct, "nearest_times", lambda *given: calls.append(given) or plain(*given))
    for flags, stages in ((["--discretization", "ict"], 8), (["--discretization", "ect"], 8)):
        args, schedule = parse(ct, *flags, "--max_train_steps", "80"), make_schedule(ct)
        calls.clear()
        found = {tuple(ct.curriculum(schedule, args, step)[1].tolist()) for step in range(80)}
        assert len(calls) == len(found) == stages


def test_fixed_times(ct):
    schedule, args = make_schedule(ct), parse(ct, "--discretization", "fixed")
    for step in (0, 10**6):
        t, r = ct.curriculum(schedule, args, step)
        assert t.tolist() == list(range(19, 1000, 20)) and r.tolist() == [0, *range(19, 980, 20)]


@pytest.mark.parametrize("steps", [1, 7, 50, 500, 501, 1000])
@pytest.mark.parametrize("discretization", ["fixed", "ict", "ect"])
def test_r_is_always_below_t(ct, discretization, steps):
    args = parse(ct, "--discretization", discretization, "--max_train_steps", "100", "--ect_stage_steps", "10")
    schedule = make_schedule(ct, steps=steps)
    for step in (0, 13, 50, 99):
        t, r = ct.curriculum(schedule, args, step)
        assert len(t) == len(r) > 0 and (r < t).all() and (r >= 0).all() and t.max() <= 999
        assert (t.diff() > 0).all()


@pytest.mark.parametrize("q, k, b, length", [(2, 8, 1, 1000), (4, 8, 2, 50), (2, 0, 1, 7)])
@pytest.mark.parametrize("stage", [0, 1, 2, 5])
def test_ect_times_are_the_papers(ct, q, k, b, length, stage):
    """r̃ = t̃·(1 − q^{−(stage+1)}·(1 + k·sigmoid(−b·t̃))), at least 0; the nearest timestep below t."""
    args = parse(ct, "--discretization", "ect", "--ect_q", str(q), "--ect_k", str(k), "--ect_b", str(b),
                 "--ect_stage_steps", str(length))  # fmt: skip
    schedule = make_schedule(ct)
    t, r = (times.numpy() for times in ct.curriculum(schedule, args, stage * length))
    assert t.tolist() == list(range(1, 1000))
    assert np.array_equal(ct.curriculum(schedule, args, (stage + 1) * length - 1)[1], r)  # to the stage's last step
    wanted = (NOISE[t] * (1 - q ** -float(stage + 1) * (1 + k / (1 + np.exp(b * NOISE[t]))))).clip(0)
    best = np.array([min(abs(NOISE[:time] - level)) for time, level in zip(t, wanted, strict=True)])
    assert (abs(NOISE[r] - wanted) <= best + 1e-4 + 1e-4 * wanted).all()  # equal but for ties in float32
    exact = [int(abs(NOISE[:time] - level).argmin()) for time, level in zip(t, wanted, strict=True)]
    assert (r == exact).mean() > 0.99
    assert (r[wanted == 0] == 0).all()


def test_ect_starts_as_diffusion_training_and_closes_the_gap(ct):
    """Stage 0: r = 0 wherever 1 + 8·sigmoid(−t̃/2) ≥ 2, so t̃ ≤ 2 log 7. Late stages: r is t's neighbour."""
    schedule, args = make_schedule(ct), parse(ct, "--discretization", "ect", "--ect_stage_steps", "10")
    r = [ct.curriculum(schedule, args, step)[1] for step in (0, 9, 10, 20, 30, 200)]
    low = torch.from_numpy(NOISE[1:] <= 2 * math.log(7))
    assert 600 < low.sum() < 800 and not r[0][low].any() and r[0][~low][10:].all()
    assert torch.equal(r[0], r[1])
    for before, after in zip(r[1:], r[2:], strict=False):
        assert (before <= after).all() and before.sum() < after.sum()
    assert torch.equal(r[-1], torch.arange(999))


# --------------------------------------------------------------------------------------------------- sampling of t


def normal_mass(low, high, mean, std):
    """∫ of the normal density over [low, high], by Simpson's rule."""
    x = np.linspace(low, high, 201)
    density = np.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
    weights = np.ones(201)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return (density * weights).sum() * (high - low) / 600


@pytest.mark.parametrize("mean, std", [(-1.1, 2.0), (0.5, 0.3)])
@pytest.mark.parametrize("flags", [["--discretization", "fixed"], ["--discretization", "ict"],
                                   ["--discretization", "ect"]], ids=["fixed", "ict", "ect"])  # fmt: skip
def test_lognormal_probabilities_are_the_integral_of_the_density(ct, flags, mean, std):
    args = parse(ct, *flags, "--max_train_steps", "99", "--lognormal_mean", str(mean), "--lognormal_std", str(std))
    schedule = make_schedule(ct)
    t, _ = ct.curriculum(schedule, args, 0)
    found = ct.probabilities(schedule, t, args)
    assert found.sum().item() == pytest.approx(1, abs=1e-5) and (found >= 0).all() and found.shape == t.shape
    edges = np.log(NOISE[[0, *t.tolist()]])
    masses = [normal_mass(low, high, mean, std) for low, high in zip(edges, edges[1:], strict=False)]
    exact = np.array(masses) / sum(masses)
    assert exact.max() > 1.5 / len(t)
    np.testing.assert_allclose(found.numpy(), exact, rtol=2e-3, atol=1e-7)


def test_defaults_are_the_papers_in_units_of_latents(ct):
    """iCT and ECT are for data of standard deviation 0.5: σ̃ is twice theirs, and so is c, of distances."""
    args = parse(ct)
    assert (args.timestep_sampling, args.lognormal_std) == ("lognormal", 2.0)
    assert args.lognormal_mean == pytest.approx(-1.1 + math.log(2), abs=0.005)
    assert (args.pseudo_huber_c, args.ect_q, args.ect_k, args.ect_b) == (2 * 0.00054, 2, 8, 1 / 2)
    assert (args.loss_type, args.loss_weighting, args.ema_decay, args.export_ema_decay) == ("pseudo_huber", "ict", 0, 0)
    assert (args.optimizer, args.adam_weight_decay, args.max_grad_norm) == ("radam", 0, 100)
    assert args.validation_guidance_scale == 1  # CT knows no guidance
    assert [parse(ct, *flags).discretization for flags in ([], ["--from_scratch"], LORA)] == ["ect", "ict", "ect"]
    assert parse(ct, "--from_scratch", "--discretization", "ect").discretization == "ect"
    assert parse(ct, "--use_8bit_adam").optimizer == "adamw8bit"


def test_units_change_nothing_but_the_scale(ct):
    """ECT's share at a noise σ of data of deviation 0.5 is ours at σ̃ = 2σ."""
    schedule, args = make_schedule(ct), parse(ct, "--max_train_steps", "80")
    sigma = NOISE[1:] / 2
    wanted = NOISE[1:] * (1 - 2.0**-1 * (1 + 8 / (1 + np.exp(1.0 * sigma)))).clip(0)
    r = ct.curriculum(schedule, args, 9)[1].numpy()
    assert (abs(NOISE[r] - wanted)[wanted > 0.1] / wanted[wanted > 0.1]).max() < 0.02
    stages = [ct.curriculum(schedule, args, step)[1].tolist() for step in (0, 9, 10)]  # an eighth of the run is one
    assert stages[0] == stages[1] != stages[2]


@pytest.mark.parametrize("sampling", ["uniform", "lognormal"])
def test_draws_follow_the_probabilities(ct, sampling):
    args = parse(ct, "--discretization", "ict", "--timestep_sampling", sampling, "--max_train_steps", "800")
    schedule, x_0 = make_schedule(ct), torch.zeros(20000, 1, 1, 1)
    one, again, other = (ct.draw(x_0, schedule, args, torch.Generator().manual_seed(seed), 0) for seed in (1, 1, 2))
    for name in ("eps", "t", "r"):
        assert torch.equal(getattr(one, name), getattr(again, name))
        assert not torch.equal(getattr(one, name), getattr(other, name))
    assert one.seed == again.seed != other.seed
    assert one.eps.mean().abs() < 0.03 and (one.eps.std() - 1).abs() < 0.03 and one.eps.shape == x_0.shape
    t, r = ct.curriculum(schedule, args, 0)
    expected = 20000 * (ct.probabilities(schedule, t, args) if sampling == "lognormal" else torch.full((10,), 0.1))
    counts = torch.tensor([(one.t == time).sum() for time in t])
    assert counts.sum() == 20000 and ((counts - expected).abs() < 5 * expected.sqrt()).all()
    pairs = dict(zip(t.tolist(), r.tolist(), strict=True))
    assert all(pairs[time] == low for time, low in zip(one.t.tolist(), one.r.tolist(), strict=True))
    later = ct.draw(x_0, schedule, args, torch.Generator().manual_seed(1), 250)
    assert len({*later.t.tolist()}) == 40  # the step decides, not how often this was called


class WithoutSums(TorchDispatchMode):
    """Refuses what CUDA refuses with --deterministic: a cumulative sum of other than whole numbers."""

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        assert func.overloadpacket is not torch.ops.aten.cumsum or not args[0].is_floating_point()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("discretization", ["fixed", "ict", "ect"])
def test_draws_are_deterministic_on_a_gpu(ct, discretization):
    args, schedule = parse(ct, "--discretization", discretization, "--max_train_steps", "800"), make_schedule(ct)
    with WithoutSums():
        ct.draw(torch.zeros(4, 1, 1, 1), schedule, args, torch.Generator().manual_seed(0), 0)


# -------------------------------------------------------------------------------------------------------- the loss


T, R = torch.tensor([19, 259, 500, 999]), torch.tensor([0, 239, 100, 979])


@pytest.fixture
def nets(ct):
    """Student and target with weights of their own, and the inputs of a loss; r = 0 in the first sample."""
    unets = {"student": make_unet(0), "target": make_unet(1)}
    given = {"x_0": randn(seed=1), "c": random_c(), "draws": ct.Draws(randn(), T, R, 5), "teacher": None,
             "uncond": None}  # fmt: skip
    denoisers = {name: denoiser(ct, unet, drops=True) for name, unet in unets.items()}
    return SimpleNamespace(unets=unets, given=given, **denoisers)


def f64(unet, x_0, c, draws, time, prediction_type="epsilon", scaling=10.0, **_):
    """f(x_t, t) at t = `time` of the path of (x_0, ε), in float64."""
    unet, c = copy.deepcopy(unet).double(), c["text"].double()
    (alpha, sigma), (c_skip, c_out) = alpha_sigma64(time), scalings64(time, scaling)
    x = alpha * x_0.double() + sigma * draws.eps.double()
    with torch.no_grad():
        out = unet(x, time, c).sample
    x0_hat = {"epsilon": (x - sigma * out) / alpha, "v_prediction": alpha * x - sigma * out, "sample": out}
    return c_skip * x + c_out * x0_hat[prediction_type]


@pytest.mark.parametrize("loss_type", ["l2", "huber", "pseudo_huber"])
@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("weighting, scaling", [("none", 10), ("ict", 10), ("ict", 0.01)])
def test_loss_equals_float64(ct, nets, loss_type, prediction_type, weighting, scaling):
    args = parse(ct, "--loss_type", loss_type, "--loss_weighting", weighting, "--timestep_scaling_factor", str(scaling))
    with torch.no_grad():
        found = ct.consistency_loss(nets.student, nets.target, schedule=make_schedule(ct, prediction_type), args=args,
                                    **nets.given)  # fmt: skip
    student, target = (f64(nets.unets[name], **nets.given, time=time, prediction_type=prediction_type, scaling=scaling)
                       for name, time in (("student", T), ("target", R)))  # fmt: skip
    target[0] = nets.given["x_0"][0]  # r = 0
    losses = distance64(student, target, loss_type, 0.00108 * 16 if loss_type == "pseudo_huber" else 0.001).numpy()
    if weighting == "ict":
        losses = losses / (NOISE[T] - np.where(np.asarray(R) == 0, 0, NOISE[R]))  # clean data at r = 0
    assert losses.mean() > 1e-3 and found.shape == (4,)
    np.testing.assert_allclose(found.numpy(), losses, rtol=2e-3, atol=1e-6)


def test_target_at_zero_is_the_data(ct, nets, monkeypatch):
    seen = []
    monkeypatch.setattr(ct, "distance", lambda a, b, *_: seen.append((a, b)) or a.flatten(1).sum(dim=1))
    ct.consistency_loss(nets.student, nets.target, schedule=make_schedule(ct), args=parse(ct), **nets.given)
    student, target = seen[0]
    assert torch.equal(target[0], nets.given["x_0"][0])
    assert all((target[i] - nets.given["x_0"][i]).abs().max() > 0.1 for i in (1, 2, 3))
    exact = f64(nets.unets["target"], **nets.given, time=R)
    torch.testing.assert_close(target[1:].double(), exact[1:], rtol=1e-3, atol=1e-3)
    assert student.requires_grad and not target.requires_grad


def test_both_points_lie_on_one_path(ct, nets):
    """The networks are asked at x_t and x_r of the same (x_0, ε), at the times t and r."""
    asked = []
    net = lambda x, t, c, w: asked.append((x, t, c, w)) or torch.zeros_like(x).requires_grad_()  # noqa: E731
    ct.consistency_loss(net, net, schedule=make_schedule(ct), args=parse(ct), **nets.given)
    assert [t.tolist() for _, t, *_ in asked] == [R.tolist(), T.tolist()]
    for x, t, c, w in asked:
        alpha, sigma = alpha_sigma64(t)
        exact = alpha * nets.given["x_0"].double() + sigma * nets.given["draws"].eps.double()
        torch.testing.assert_close(x.double(), exact, rtol=0, atol=1e-5)
        assert c is nets.given["c"] and not w.any()


def gradients(unet):
    return [None if p.grad is None else p.grad.clone() for p in unet.parameters()]


def test_gradient_goes_through_the_students_branch_alone(ct, nets):
    """Without EMA both branches are one network: the gradient is that of a frozen copy as the target."""
    schedule, args, unet = make_schedule(ct), parse(ct), nets.unets["student"]
    frozen = copy.deepcopy(unet).requires_grad_(False)
    given = {"schedule": schedule, "args": args, **nets.given}
    ct.consistency_loss(nets.student, nets.student, **given).mean().backward()
    found = gradients(unet)
    unet.zero_grad()
    ct.consistency_loss(nets.student, denoiser(ct, frozen, drops=True), **given).mean().backward()
    exact = gradients(unet)
    assert all(one.any() and torch.equal(one, two) for one, two in zip(found, exact, strict=True))
    nets.unets["target"].requires_grad_(True)
    ct.consistency_loss(nets.student, nets.target, **given).mean().backward()
    assert all(p.grad is None for p in nets.unets["target"].parameters())


# --------------------------------------------------------------------------------------------------------- dropout


def lossy(ct, checkpointing=False):
    """A student with dropout, and its Denoiser."""
    unet = make_unet(0, dropout=0.5).train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return unet, denoiser(ct, unet, drops=True)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("averaged", [False, True], ids=["student", "EMA"])
def test_dropout_masks_the_same_in_both_branches(ct, nets, monkeypatch, checkpointing, averaged):
    """At t = r both branches have the same input: with the same masks they agree bit for bit."""
    seen, plain = [], ct.distance
    monkeypatch.setattr(ct, "distance", lambda a, b, *how: seen.append((a, b)) or plain(a, b, *how))
    unet, net = lossy(ct, checkpointing)
    other = copy.deepcopy(unet)
    target = denoiser(ct, other, drops=True) if averaged else net
    args, schedule = parse(ct, "--loss_type", "l2", "--loss_weighting", "none"), make_schedule(ct)

    def ask(seed):
        given = {**nets.given, "draws": ct.Draws(nets.given["draws"].eps, T, T, seed)}
        loss = ct.consistency_loss(net, target, schedule=schedule, args=args, **given).mean()
        return loss, *seen[-1]

    torch.manual_seed(123)  # what came before plays no part
    loss, a, b = ask(5)
    assert loss.item() == 0 and torch.equal(a, b)
    loss.backward()
    torch.rand(3)
    again, elsewhere = ask(5), ask(6)
    assert torch.equal(a, again[1])
    assert elsewhere[0].item() == 0 and (a - elsewhere[1]).abs().max() > 1e-2  # other masks
    monkeypatch.setattr(torch, "manual_seed", lambda _: None)
    assert ask(5)[0].item() > 1e-4  # this is what the seeds are for


def test_gradient_checkpointing_repeats_the_masks(ct, nets):
    found, args, schedule = [], parse(ct), make_schedule(ct)
    for checkpointing in (False, True):
        unet, net = lossy(ct, checkpointing)
        loss = ct.consistency_loss(net, net, schedule=schedule, args=args, **nets.given).mean()
        torch.manual_seed(99)
        loss.backward()
        found.append([loss.detach(), *gradients(unet)])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ runs


@pytest.fixture
def train(ct, tiny, shards, monkeypatch):
    """train(output, *more): four steps with a checkpoint every two; its result has `output`, and the run as `run`."""
    runs, plain = [], ct.export
    monkeypatch.setattr(ct, "export", lambda run: runs.append(run) or plain(run))

    def run(output, *more, teacher=tiny):
        run_main(ct, tiny_args(teacher, shards, output, "--checkpointing_steps", "2", *more))
        return SimpleNamespace(output=Path(output), run=runs[-1])

    return run


@pytest.mark.parametrize("flags", [["--dropout", "0.5"], ["--dropout", "0.5", "--ema_decay", "0.9"],
                                   [*LORA, "--lora_dropout", "0.5"],
                                   ["--dropout", "0.5", "--gradient_checkpointing"]], ids=" ".join)  # fmt: skip
def test_dropout_in_a_run(ct, train, tmp_path, monkeypatch, flags):
    """With r = t every loss is zero but for rounding, also after a validation; dropout is at work in both branches."""
    plain, dropped, dropout = ct.draw, [], torch.nn.Dropout.forward

    def draw(*args):
        draws = plain(*args)
        return ct.Draws(draws.eps, draws.t, draws.t, draws.seed)

    def forward(module, x):
        if module.p and module.training:
            dropped.append(torch.is_grad_enabled())
        return dropout(module, x)

    monkeypatch.setattr(ct, "draw", draw)
    monkeypatch.setattr(torch.nn.Dropout, "forward", forward)
    flags = ["--learning_rate", "0", "--loss_weighting", "none", "--validation_steps", "2", *QUICK_VALIDATION, *flags]
    done = train(tmp_path / "run", *flags)
    assert [loss for _, loss, *_ in read_losses(done.output)] == pytest.approx([0, 0, 0, 0], abs=1e-7)
    student, target = (dropped.count(has_gradient) for has_gradient in (True, False))
    assert target > 0 and (student > target if "--gradient_checkpointing" in flags else student == target)


def unet_of(pipeline, name="unet"):
    return load_file(Path(pipeline) / name / "diffusion_pytorch_model.safetensors")


def base_of(unet):
    """The tensors of a U-Net below its adapters, by the names they have without."""
    return {key.replace(".base_layer", ""): value for key, value in unet.state_dict().items() if ".lora_" not in key}


@pytest.fixture
def new_unets():
    """Gives a function that returns the U-Nets which were made in this test and are still in memory."""
    gc.freeze()  # what there is already is not looked at
    yield lambda: (gc.collect(), [unet for unet in gc.get_objects() if type(unet) is UNet2DConditionModel])[1]
    gc.unfreeze()


MEMORY = [
    pytest.param([], 1, id="full"),
    pytest.param(["--ema_decay", "0.9"], 2, id="full, EMA"),
    pytest.param(LORA, 1, id="lora"),
    pytest.param([*LORA, "--ema_decay", "0.9"], 1, id="lora, EMA"),
    pytest.param(["--from_scratch"], 1, id="scratch"),
]  # fmt: skip


@pytest.mark.parametrize("flags, networks", MEMORY)
def test_no_teacher_in_memory(ct, train, tiny, tmp_path, monkeypatch, new_unets, flags, networks):
    """Training holds one U-Net, or two with an EMA of a whole one; a validation borrows another for a moment."""
    counts, borrowed = [], []

    def count():
        sizes = [(name, p.numel()) for unet in new_unets() for name, p in unet.named_parameters()]
        lora = sum(size for name, size in sizes if ".lora_" in name)
        return sum(size for _, size in sizes) - lora, lora

    def consistency_loss(plain=ct.consistency_loss, **given):
        counts.append(count())
        return plain(**given)

    def parts(sampler, name, *args, plain=ct.Sampler.parts, **more):
        if name == "teacher":
            borrowed.append(count())
        return plain(sampler, name, *args, **more)

    monkeypatch.setattr(ct, "consistency_loss", consistency_loss)
    monkeypatch.setattr(ct.Sampler, "parts", parts)
    done = train(tmp_path / "run", "--validation_steps", "2", *QUICK_VALIDATION, *flags)
    size = sum(value.numel() for value in unet_of(tiny).values())
    adapter = sum(value.numel() for value in ct.network_state(done.run.models, "student").values())
    lora = adapter * (2 if "--ema_decay" in flags else 1) if "--lora_rank" in flags else 0
    assert counts == [(networks * size, lora)] * 4  # before and after the validation of step 2
    more = 0 if "--lora_rank" in flags else size  # so that a second network would have been counted
    assert {*borrowed} == ({(networks * size + more, lora)} if "--from_scratch" not in flags else set())
    is_lora, models = "--lora_rank" in flags, done.run.models
    assert ("teacher" in done.run.nets) == is_lora and models.teacher is (models.student if is_lora else None)
    held = {id(p) for group in done.run.optimizer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in done.run.models.student_parameters}


RESUMED = [
    # levels 2, 2, 4, 4, 8, 8: the run is cut after three steps, before the second doubling
    pytest.param(["--discretization", "ict", "--ict_s0", "2", "--ict_s1", "8", "--dropout", "0.3", "--ema_decay", "0.9",
                  "--dataloader_num_workers", "2"], id="iCT, dropout, workers"),
    pytest.param([*LORA, "--discretization", "ect", "--ect_stage_steps", "2", "--lora_dropout", "0.3"],
                 id="ECT, lora"),
]  # fmt: skip


@pytest.mark.parametrize("flags", RESUMED)
def test_resume_is_exact_across_a_stage_of_the_curriculum(ct, train, tmp_path, monkeypatch, flags):
    seen, plain = [], ct.curriculum
    monkeypatch.setattr(ct, "curriculum", lambda schedule, args, step: (
        seen.append((step, (found := plain(schedule, args, step))[1].sum().item())), found)[1])  # fmt: skip
    flags, parts = [*flags, "--max_train_steps", "6", "--checkpointing_steps", "3"], tmp_path / "parts"
    whole, stages = train(tmp_path / "whole", *flags).output, [*dict.fromkeys(seen)]
    assert [step for step, _ in stages] == [0, 1, 2, 3, 4, 5]
    assert [one == two for (_, one), (_, two) in zip(stages, stages[1:], strict=False)] == [True, False] * 2 + [True]
    shutil.copytree(whole / "checkpoint-3", parts / "checkpoint-3")
    shutil.copy(whole / "metrics.jsonl", parts)
    seen.clear()
    train(parts, *flags, "--resume_from_checkpoint", "latest")
    assert [*dict.fromkeys(seen)] == stages[3:]
    assert_same_end(parts, whole, step=6)
    assert differences(read_checkpoint(whole / "checkpoint-3"), read_checkpoint(whole / "checkpoint-6"))


def test_from_scratch(train, tiny, tmp_path):
    flags = ["--from_scratch", "--learning_rate", "0", "--adam_weight_decay", "0", "--max_train_steps", "1"]
    one, again, other = (train(tmp_path / name, *flags, "--seed", seed)
                         for name, seed in (("one", "1"), ("again", "1"), ("other", "2")))  # fmt: skip
    weights = [unet_of(done.output) for done in (one, again, other)]
    assert not differences(weights[0], weights[1])
    assert len(differences(weights[0], weights[2])) > 20 and len(differences(weights[0], unet_of(tiny))) > 20
    spread = [value["conv_in.weight"].std().item() for value in weights]
    assert all(0.02 < std < 1 for std in spread)
    configs = [json.loads((Path(path) / "unet" / "config.json").read_text()) for path in (tiny, one.output)]
    for config in configs:
        config.pop("_name_or_path", None)
    assert configs[0] == configs[1]


def test_from_scratch_has_no_fidelity_but_a_gap(train, tmp_path):
    done = train(tmp_path / "run", "--from_scratch", "--validation_steps", "2", *QUICK_VALIDATION)
    lines = [line for line in read_metrics(done.output) if "lr" not in line]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert all(line.keys() == {"step", "consistency_gap"} and line["consistency_gap"] > 0 for line in lines)
    assert (done.output / "validation" / "step-4.png").is_file()


@pytest.mark.parametrize("flags, p", [([], 0), (["--dropout", "0.25"], 0.25), (["--dropout", "0.25", "--from_scratch"],
                                                                               0.25)], ids=str)  # fmt: skip
def test_dropout_of_the_unet(train, tmp_path, flags, p):
    done = train(tmp_path / "run", *flags, "--max_train_steps", "1")
    resnets = [module for name, module in done.run.models.student.named_modules() if name.endswith("dropout")]
    assert len(resnets) > 3 and {module.p for module in resnets} == {p}
    assert json.loads((done.output / "unet" / "config.json").read_text())["dropout"] == p


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--from_scratch", "--lora_rank", "4"], "--from_scratch"),
        (["--from_scratch", "--init_from", "."], "--from_scratch"),
        (["--dropout", "0.1", "--lora_rank", "4"], "--lora_dropout"),
        (["--dropout", "1.5"], "--dropout"),
        (["--ict_s0", "20", "--ict_s1", "10"], "--ict_s0 20 is above --ict_s1 10"),
        (["--discretization", "edm"], "--discretization"),
    ],
)
def test_refused_arguments(ct, capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        parse(ct, *flags)
    assert end.value.code == 2 and message in capsys.readouterr().err


# --------------------------------------------------------------------------------------- validation and consistency


def gap_of(ct, net):
    """consistency_gap of this network (x_t, t, c, w) → output, on paths of its own."""
    schedule, args = make_schedule(ct), parse(ct)
    run = SimpleNamespace(models=SimpleNamespace(schedule=schedule), args=args, nets={"student": net},
                          accelerator=SimpleNamespace(device=CPU))  # fmt: skip
    x_0, eps = randn(seed=1), randn()
    return ct.consistency_gap(run, {"paths": (x_0, eps, None)}), x_0, eps


def says(value):
    """The ε-predicting network for which f(x_t, t) = value(t), (batch, …)."""

    def net(x_t, t, _c, _w):
        (alpha, sigma), (c_skip, c_out) = alpha_sigma64(t), scalings64(t)
        x_0 = (value(t) - c_skip * x_t) / c_out
        return ((x_t - alpha * x_0) / sigma).float()

    return net


def test_gap_vanishes_for_a_consistent_function(ct):
    assert gap_of(ct, says(lambda _: randn(seed=1).double()))[0] < 1e-8


def test_gap_is_the_mean_square_between_neighbouring_times(ct):
    times = [int(round(999 * i / 8)) for i in range(1, 9)]
    shift = lambda t: (t.double() / 999).view(-1, 1, 1, 1) ** 2 * torch.ones(SHAPE)  # noqa: E731
    exact = np.mean([((b / 999) ** 2 - (a / 999) ** 2) ** 2 for a, b in zip(times, times[1:], strict=False)])
    assert gap_of(ct, says(shift))[0] == pytest.approx(exact, rel=1e-3)


def test_gap_without_usable_samples(ct, start, monkeypatch):
    run = start()
    monkeypatch.setattr(ct, "ShardStream", lambda *_, **__: iter([{"error": "no usable sample"}]))
    with ends_with("no usable sample"):
        ct.consistency_gap(run, {})


def test_gap_is_asked_on_noising_paths(ct):
    asked = []
    _, x_0, eps = gap_of(ct, lambda x, t, *_: asked.append((x, t)) or torch.zeros_like(x))
    assert len(asked) == 8 and asked[-1][1].tolist() == [999] * 4 and asked[0][1].tolist() == [125] * 4
    for x, t in asked:
        alpha, sigma = alpha_sigma64(t)
        torch.testing.assert_close(x.double(), alpha * x_0 + sigma * eps, rtol=0, atol=1e-5)


def test_gap_along_trajectories_is_the_mean_square_to_the_last(ct):
    schedule = make_schedule(ct)
    answers = iter([3.0, -1.0, 1.0, 0.0, 2.0, 2.0])
    net = ct.Denoiser.__new__(ct.Denoiser)
    path = [(torch.full((2,), t), randn(seed=t)[:2]) for t in (900, 500, 100)]
    run = SimpleNamespace(nets={"student": net}, args=None, models=SimpleNamespace(schedule=schedule), host_group=None)
    images = {"trajectory": [(randn(seed=9), path), (randn(seed=8), path)]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ct, "predict_x0", lambda *_: torch.full((2, 1), next(answers)))
        assert ct.trajectory_gap(run, images) == pytest.approx(((3 - 1) ** 2 + (-1 - 1) ** 2 + (0 - 2) ** 2 + 0) / 4)


@pytest.mark.parametrize("flags, share", [(["--learning_rate", "5e-3", "--discretization", "ict"], 0.75),
                                          ([*LORA, "--learning_rate", "1e-2", "--discretization", "ect"], 0.9)],
                         ids=["full", "lora"])  # fmt: skip
def test_gap_falls_in_training(train, tmp_path, flags, share):
    done = train(tmp_path / "run", *flags, "--max_train_steps", "20", "--checkpointing_steps", "0", "--optimizer",
                 "adamw", "--max_grad_norm", "1", "--validation_steps", "20", *QUICK_VALIDATION)  # fmt: skip
    gaps = [line["consistency_gap"] for line in read_metrics(done.output) if "lr" not in line]
    assert len(gaps) == 2 and gaps[1] < share * gaps[0]


@pytest.mark.parametrize("flags", [["--dropout", "0.3"], [*LORA, "--lora_dropout", "0.3"]], ids=["full", "lora"])
def test_teacher_of_the_validation_is_the_starting_model(ct, train, tiny, tmp_path, flags):
    """Its pictures come from the untouched weights, also for a LoRA after training."""
    done = train(tmp_path / "run", "--learning_rate", "1e-2", "--max_train_steps", "2", *flags)
    with ct.starting_model(done.run), ct.without_dropout(done.run.nets), torch.no_grad():
        net = done.run.nets["teacher"]
        assert not differences(base_of(net.base), unet_of(tiny))
        x, t, c = randn(), torch.tensor([19, 259, 500, 999]), random_c()
        stock = UNet2DConditionModel.from_pretrained(tiny, subfolder="unet").eval()
        found, student = (one(x, t, c, None) for one in (net, done.run.nets["student"]))
        torch.testing.assert_close(found, stock(x, t, c["text"]).sample, rtol=1e-3, atol=1e-4)
        assert (found - student).abs().max() > 0.01
    assert ("teacher" in done.run.nets) == ("--lora_rank" in flags)  # where it is the base, and needs no memory


def test_starting_model_in_the_compute_precision(ct, start, make_teacher):
    """Also of SDXL, whose VAE is not in it."""
    run = start("--mixed_precision", "bf16", teacher=make_teacher(make_sdxl_pipeline))
    assert run.models.vae.dtype == torch.float32
    with ct.starting_model(run):
        assert run.nets["teacher"].dtype == torch.bfloat16


def test_consistency_function_is_the_identity_at_zero(ct):
    x = randn()
    found = ct.consistency_function(lambda *_: 100 * x, make_schedule(ct), x, full(0), None, None, 10.0)
    assert torch.equal(found, x)
