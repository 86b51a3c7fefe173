"""Trajectory consistency distillation: the jump, the end times, the loss and the scheduler.

train_tcd_distill_lora_sd_wds.py is the same but for its defaults, as test_copies.py sees.
"""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import get_script, make_pipeline, tiny_args
from diffusers import StableDiffusionPipeline, TCDScheduler
from test_maths import (
    CPU,
    SHAPE,
    TYPES,
    alpha_sigma64,
    conditioning,
    denoiser,
    distance64,
    full,
    make_schedule,
    make_scheduler,
    make_unet,
    perfect,
    randn,
    random_c,
    to_output,
)

PAIRS = [(999, 979), (999, 0), (999, 499), (500, 19), (259, 239), (39, 19), (19, 0)]


@pytest.fixture(scope="module")
def script():
    return get_script("train_tcd_distill_sd_wds")


@pytest.fixture(scope="module")
def net(script):
    """A random network."""
    return denoiser(script, make_unet(0).eval())


# ------------------------------------------------------------------------------------------------------- the jump


@pytest.mark.parametrize("prediction_type", TYPES)
@torch.no_grad()
def test_jump_is_the_exponential_integrator_of_the_paper(script, net, prediction_type):
    """x_s = (σ_s/σ_t) x_t − α_s (e^(−h) − 1) x̂_0 with h = λ_s − λ_t, λ = log(α/σ), in float64."""
    schedule, x_t, c = make_schedule(script, prediction_type=prediction_type), randn(), random_c()
    for t, s in PAIRS:
        found = script.trajectory_function(net, schedule, x_t, full(t), full(s), c, None)
        (alpha, sigma), (alpha_s, sigma_s) = alpha_sigma64(full(t)), alpha_sigma64(full(s))
        output, x = net(x_t, full(t), c, None).double(), x_t.double()
        x_0 = {"epsilon": (x - sigma * output) / alpha, "v_prediction": alpha * x - sigma * output,
               "sample": output}[prediction_type]  # fmt: skip
        h = (alpha_s / sigma_s).log() - (alpha / sigma).log()
        exact = sigma_s / sigma * x - alpha_s * torch.expm1(-h) * x_0
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
        assert (found - x_t).abs().max() > 1e-3


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@torch.no_grad()
def test_jump_is_a_step_of_the_stock_scheduler(script, net, prediction_type, steps):
    schedule, x, c = make_schedule(script, prediction_type=prediction_type), randn(), random_c()
    stock = make_scheduler(prediction_type, TCDScheduler)
    stock.set_timesteps(steps)
    times = stock.timesteps.tolist()
    for t, s in zip(times, [*times[1:], 0], strict=True):
        found = script.trajectory_function(net, schedule, x, full(t), full(s), c, None)
        x = stock.step(net(x, full(t), c, None), t, x, eta=0.0, return_dict=False)[0]
        torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", TYPES)
@torch.no_grad()
def test_deterministic_chain_is_the_stock_samplers(script, net, prediction_type):
    """Validation's chain answers with the last x̂_0; the scheduler goes on from there to x_0 at ᾱ_0."""
    schedule, noise, c = make_schedule(script, prediction_type=prediction_type), randn(), random_c()
    scheduler, args = make_scheduler(prediction_type, TCDScheduler), SimpleNamespace(validation_eta=0.0, seed=0)
    found = script.sample_stock(net, scheduler, noise, 4, c, None, args)
    times, seen = scheduler.timesteps.tolist(), []

    def predict(x, t):
        seen.append((x, t, script.predict_x0(net, schedule, x, t, c, None, args)))
        return [seen[-1][2]]

    x_0 = script.sample_chain(predict, schedule, noise, times)
    (x, _, last), (alpha, sigma) = seen[-1], alpha_sigma64(full(times[-1]))
    assert len(seen) == 4 and torch.equal(last, x_0)
    alpha_0, sigma_0 = alpha_sigma64(full(0))
    exact = alpha_0 * x_0 + sigma_0 * (x - alpha * x_0) / sigma
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_validation_eta_adds_the_noise_of_the_stock_scheduler(script, net):
    noise, c, pictures = randn(), random_c(), {}
    for eta, seed in ((0.0, 1), (0.0, 2), (0.3, 1), (0.3, 2)):
        args = SimpleNamespace(validation_eta=eta, seed=seed)
        pictures[eta, seed] = script.sample_stock(net, make_scheduler(kind=TCDScheduler), noise, 2, c, None, args)
    assert torch.equal(pictures[0.0, 1], pictures[0.0, 2])
    assert not torch.allclose(pictures[0.3, 1], pictures[0.3, 2], atol=1e-2)
    stock, x, generator = make_scheduler(kind=TCDScheduler), noise, torch.Generator().manual_seed(2)
    stock.set_timesteps(2)
    for t in stock.timesteps:
        x = stock.step(net(x, full(int(t)), c, None), t, x, eta=0.3, generator=generator, return_dict=False)[0]
    torch.testing.assert_close(pictures[0.3, 2], x, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ end times


def test_end_times_are_uniform_over_the_lower_points(script):
    args = script.parse_args(tiny_args("t", "s", "o", "--w_min", "3", "--w_max", "8"))
    schedule, x_0 = make_schedule(script, 10), torch.zeros(40_000, 4, 2, 2)
    draws, again, other = (script.draw(x_0, schedule, args, torch.Generator().manual_seed(k), 0) for k in (1, 1, 2))
    for name in ("eps", "index", "end", "w"):
        assert torch.equal(getattr(draws, name), getattr(again, name)), name
        assert not torch.equal(getattr(draws, name), getattr(other, name)), name
    assert draws.end.dtype == torch.int64 and draws.end.shape == (40_000,)
    assert bool((draws.end >= 0).all()) and bool((draws.end <= draws.index).all())
    for index in range(10):
        ends = torch.bincount(draws.end[draws.index == index], minlength=10)
        assert not ends[index + 1 :].any()
        expected = ends.sum() / (index + 1)
        chi_square = ((ends[: index + 1] - expected) ** 2 / expected).sum()
        assert 3500 < ends.sum() < 4500 and chi_square < 30, ends  # 99.95 % of a χ² with nine degrees of freedom
    assert np.abs(np.corrcoef(torch.stack([draws.index / (draws.index + 1), draws.w]).numpy())[0, 1]) < 0.02
    share = (draws.end + 0.5) / (draws.index + 1)  # of the way down: not tied to the other draws
    for value in (draws.w, draws.eps[:, 0, 0, 0]):
        assert np.abs(np.corrcoef(share.numpy(), value.numpy())[0, 1]) < 0.02
    assert 3 <= draws.w.min() < 3.05 and 7.95 < draws.w.max() <= 8 and (draws.w.mean() - 5.5).abs() < 0.05


# ------------------------------------------------------------------------------------------------- the method's loss


def loss_args(script, *more):
    return script.parse_args(tiny_args("t", "s", "o", "--num_ddim_timesteps", "50", *more))


INDEX, END = [0, 3, 25, 49], [0, 1, 25, 10]  # τ_i = 19, 79, 519, 999 and s = prev(τ_m) = 0, 19, 499, 199
T, PREV, S = [19, 79, 519, 999], [0, 59, 499, 979], [0, 19, 499, 199]


def make_draws(script, w=(0.0, 0.5, 1.0, 7.0), end=END):
    return script.Draws(eps=randn(), index=torch.tensor(INDEX), end=torch.tensor(end), w=torch.tensor(w))


@pytest.fixture
def nets(script):
    """Student, target (which embed w) and teacher with weights of their own, and the inputs of a loss."""
    unets = {"student": make_unet(0, time_cond_proj_dim=32), "target": make_unet(1, time_cond_proj_dim=32)}
    unets["teacher"] = make_unet(2)
    given = {"x_0": randn(seed=1), "c": random_c(), "uncond": random_c(1, seed=3)}
    return SimpleNamespace(unets=unets, given=given, calls={k: denoiser(script, v) for k, v in unets.items()})


@torch.no_grad()
def loss64(unets, x_0, c, uncond, draws, prediction_type, loss_type, huber_c):
    """The method again, of each sample in float64, with the exponential integrator as the paper writes it."""
    unets = {name: copy.deepcopy(unet).double() for name, unet in unets.items()}
    x_0, c, uncond, eps, w = (value.double() for value in (x_0, c["text"], uncond["text"], draws.eps, draws.w))
    embedding = StableDiffusionPipeline.get_guidance_scale_embedding(None, draws.w, 32).double()

    def x0_hat(name, x, t, c, embedding=None):
        output, (alpha, sigma) = unets[name](x, t, c, timestep_cond=embedding).sample, alpha_sigma64(t)
        return {"epsilon": (x - sigma * output) / alpha, "v_prediction": alpha * x - sigma * output,
                "sample": output}[prediction_type]  # fmt: skip

    def integrate(x, x_0, t, s):
        (alpha, sigma), (alpha_s, sigma_s) = alpha_sigma64(t), alpha_sigma64(s)
        h = (alpha_s / sigma_s).log() - (alpha / sigma).log()
        return sigma_s / sigma * x - alpha_s * torch.expm1(-h) * x_0

    t, prev, s, w = torch.tensor(T), torch.tensor(PREV), torch.tensor(S), w.view(-1, 1, 1, 1)
    alpha, sigma = alpha_sigma64(t)
    x_t = alpha * x_0 + sigma * eps
    cond, without = x0_hat("teacher", x_t, t, c), x0_hat("teacher", x_t, t, uncond.expand(4, -1, -1))
    x_prev = integrate(x_t, cond + w * (cond - without), t, prev)  # linear in x̂_0, so ε̂ is guided with it
    student = integrate(x_t, x0_hat("student", x_t, t, c, embedding), t, s)
    target = integrate(x_prev, x0_hat("target", x_prev, prev, c, embedding), prev, s)
    return distance64(student, target, loss_type, huber_c)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("loss_type, huber_c", [("l2", 0.001), ("huber", 0.001), ("huber", 1.0)])
def test_loss_of_random_networks_equals_float64(script, nets, prediction_type, loss_type, huber_c):
    args, draws = loss_args(script, "--loss_type", loss_type, "--huber_c", str(huber_c)), make_draws(script)
    schedule = make_schedule(script, 50, prediction_type)
    with torch.no_grad():
        found = script.consistency_loss(**nets.calls, schedule=schedule, draws=draws, args=args, **nets.given)
    exact = loss64(nets.unets, draws=draws, prediction_type=prediction_type, loss_type=loss_type, huber_c=huber_c,
                   **nets.given)  # fmt: skip
    assert found.shape == (4,)
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0)


def test_target_is_the_teachers_point_where_nothing_is_left_to_jump_over(script, nets):
    """s = prev(t) in all four samples: the target network does not count, whatever it says."""
    schedule, args, draws = make_schedule(script), loss_args(script), make_draws(script, end=INDEX)
    calls = {**nets.calls, "target": lambda x, *_: torch.full_like(x, float("nan"))}
    with torch.no_grad():
        found = script.consistency_loss(**calls, schedule=schedule, draws=draws, args=args, **nets.given)
        t, prev = torch.tensor(T), torch.tensor(PREV)
        x_t = schedule.jump(nets.given["x_0"], draws.eps, t)
        c, uncond = nets.given["c"], nets.given["uncond"]
        x_prev = schedule.jump(*script.guided_prediction(nets.calls["teacher"], schedule, x_t, t, c, uncond, draws.w),
                               prev)  # fmt: skip
        student = schedule.jump(*schedule.x0_eps(nets.calls["student"](x_t, t, c, draws.w), x_t, t), prev)
    torch.testing.assert_close(found, ((student - x_prev) ** 2).mean(dim=(1, 2, 3)), rtol=1e-4, atol=0)


def test_gradient_reaches_all_of_the_student_and_nothing_else(script, nets):
    for unet in nets.unets.values():
        unet.requires_grad_(True)
    script.consistency_loss(**nets.calls, schedule=make_schedule(script), draws=make_draws(script),
                            args=loss_args(script), **nets.given).mean().backward()  # fmt: skip
    untouched = [k for k, p in nets.unets["student"].named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []
    for name in ("target", "teacher"):
        assert all(p.grad is None for p in nets.unets[name].parameters())


@pytest.mark.parametrize("prediction_type", TYPES)
def test_loss_vanishes_where_the_student_knows_the_guided_trajectory(script, prediction_type):
    """Teacher: exact for the data point a given c, b given ∅, so, guided, for p = a + w (a − b), whose trajectory is
    straight in (α, σ): from any of its points, a student that knows p jumps to the same x_s."""
    b, schedule, args = 0.2, make_schedule(script, 50, prediction_type), loss_args(script)
    c, uncond, w = conditioning([0.3, -0.5, 0.1, 0.2]), conditioning([b]), (0.0, 1.0, 2.0, 5.0)
    draws = make_draws(script, w=w)

    def knowing(shift=0.0):
        def net(x_t, t, c, w):
            (alpha, sigma), a = alpha_sigma64(t), c["text"][:, :1, :1, None].double()
            x_0 = a + w.view(-1, 1, 1, 1) * (a - b) + shift
            return to_output(prediction_type, x_0, (x_t - alpha * x_0) / sigma, t).float()

        return net

    def moved(t, s, factors=(1, 1, 1, 1)):
        """Of each sample, the mean square of what a shift of x̂_0 by 1/2 does to the jumps: α_s δ + σ_s (−α_t δ/σ_t)."""
        (alpha, sigma), (alpha_s, sigma_s) = alpha_sigma64(t), alpha_sigma64(s)
        d = 0.5 * (alpha_s - sigma_s * alpha / sigma).flatten() * torch.tensor(factors)
        return (d**2).tolist()

    p = c["text"][:, :1, :1, None] + draws.w.view(-1, 1, 1, 1) * (c["text"][:, :1, :1, None] - b)
    given = {"schedule": schedule, "x_0": p.expand(SHAPE), "c": c, "uncond": uncond, "draws": draws, "args": args}
    teacher = perfect(prediction_type)
    assert script.consistency_loss(knowing(), knowing(), teacher, **given).max().item() < 1e-7
    found = script.consistency_loss(knowing(0.5), knowing(), teacher, **given).tolist()
    assert found == pytest.approx(moved(T, S), rel=1e-2, abs=1e-7)
    found = script.consistency_loss(knowing(), knowing(0.5), teacher, **given).tolist()
    factors = 0, 1, 0, 1  # the other two are where s = prev(t)
    assert found == pytest.approx(moved(PREV, S, factors), rel=1e-2, abs=1e-7)


# --------------------------------------------------------------------------------------------- exported scheduler


@pytest.mark.parametrize("grid", [50, 40, 10])
def test_exported_scheduler_visits_points_of_the_grid(script, make_teacher, grid):
    path = make_teacher(make_pipeline, prediction_type="v_prediction")
    args = script.parse_args(tiny_args(path, "s", "o", "--num_ddim_timesteps", str(grid)))
    models = script.load_models(args, script.check_teacher(args), SimpleNamespace(mixed_precision="no", device=CPU))
    config = models.scheduler.config
    assert type(models.scheduler) is TCDScheduler
    assert (config.original_inference_steps, config.prediction_type) == (grid, "v_prediction")
    points, first = set(models.schedule.grid.tolist()), {50: [999, 759, 499, 259], 10: [999, 799, 499, 299]}
    for steps in range(1, 9):
        models.scheduler.set_timesteps(steps)
        times = models.scheduler.timesteps.tolist()
        assert len(times) == steps and {*times} <= points and times[0] == 999
        assert steps != 4 or times == first.get(grid, times)
