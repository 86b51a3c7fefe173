"""The mathematics of the method, against closed forms, float64 and stock diffusers; notation as in the scripts."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_pipeline, tiny_args
from diffusers import DDIMScheduler, DDPMScheduler, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel

CPU = torch.device("cpu")
TYPES = ["epsilon", "v_prediction", "sample"]
SHAPE = (4, 4, 8, 8)


def make_scheduler(prediction_type="epsilon", kind=DDPMScheduler, **more):
    return kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type,
                **more)  # fmt: skip


def make_schedule(lcm, num_ddim_timesteps=50, prediction_type="epsilon"):
    return lcm.Schedule(make_scheduler(prediction_type), num_ddim_timesteps, CPU)


def alpha_sigma64(t):
    """α_t and σ_t in float64, shape (batch, 1, 1, 1), from the definition of the scaled linear schedule."""
    alphas_cumprod = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[np.asarray(t)]
    pair = torch.from_numpy(np.stack([alphas_cumprod, 1 - alphas_cumprod])).sqrt()
    return pair[0].view(-1, 1, 1, 1), pair[1].view(-1, 1, 1, 1)


def scalings64(t, scaling=10.0):
    """c_skip and c_out in float64."""
    scaled = scaling * torch.as_tensor(t, dtype=torch.float64).view(-1, 1, 1, 1)
    return 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()


def randn(*shape, seed=0):
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


def full(t, batch=SHAPE[0]):
    return torch.full((batch,), t)


def to_output(prediction_type, x_0, eps, t):
    """What a network of this prediction type would have to say, for (x_0, ε)."""
    alpha, sigma = alpha_sigma64(t)
    return {"epsilon": eps, "sample": x_0, "v_prediction": (alpha * eps - sigma * x_0).float()}[prediction_type]


def perfect(prediction_type, spread=0.0):
    """The exact denoiser of data N(μ, spread²·I), as a network; μ is the first number of each conditioning."""

    def net(x_t, t, c, _w=None):
        alpha, sigma = (value.float() for value in alpha_sigma64(t))
        mean = c["text"][:, :1, :1, None]
        x_0 = mean + alpha * spread**2 / ((alpha * spread) ** 2 + sigma**2) * (x_t - alpha * mean)
        return to_output(prediction_type, x_0, (x_t - alpha * x_0) / sigma, t)

    return net


def conditioning(means):
    """c of a Stable Diffusion model, whose text holds these numbers: (len(means), 16, 16)."""
    return {"text": torch.tensor(means)[:, None, None].repeat(1, 16, 16)}


def random_c(batch=SHAPE[0], seed=2):
    return {"text": randn(batch, 16, 16, seed=seed)}


def denoiser(script, unet, **options):
    """A U-Net of Stable Diffusion as a Denoiser."""
    return script.Denoiser(unet, unet, script.StableDiffusion, **options)


# ---------------------------------------------------------------------------------------------- schedule, one jump


@pytest.mark.parametrize(
    "steps, first, last, spacing", [(50, 19, 999, 20), (1, 999, 999, 0), (1000, 0, 999, 1), (7, 141, 993, 142)]
)
def test_grid_and_its_lower_neighbours(lcm, steps, first, last, spacing):
    schedule = make_schedule(lcm, steps)
    grid = schedule.grid.tolist()
    assert (len(grid), grid[0], grid[-1]) == (steps, first, last)
    assert set(np.diff(grid)) <= {spacing}
    assert schedule.prev.tolist() == [0, *grid[:-1]]


def test_alpha_and_sigma_are_the_float32_of_the_noise_schedule(lcm):
    t = torch.arange(1000)
    alpha, sigma = make_schedule(lcm).alpha_sigma(t)
    assert alpha.shape == sigma.shape == (1000, 1, 1, 1) and alpha.dtype == sigma.dtype == torch.float32
    for found, exact in zip((alpha, sigma), alpha_sigma64(t), strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=3e-4, atol=0)  # 1 − ᾱ cancels at t = 0


@pytest.mark.parametrize("prediction_type", TYPES)
def test_prediction_types_agree_on_x0_and_eps(lcm, prediction_type):
    schedule = make_schedule(lcm, prediction_type=prediction_type)
    x_0, eps = randn(), randn(seed=1)
    for t in (0, 1, 19, 500, 999):
        x_t = schedule.jump(x_0, eps, full(t))
        found = schedule.x0_eps(to_output(prediction_type, x_0, eps, full(t)), x_t, full(t))
        torch.testing.assert_close(found[0], x_0, rtol=0, atol=2e-5)
        torch.testing.assert_close(found[1], eps, rtol=0, atol=2e-5)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("t, s", [(999, 0), (999, 979), (500, 19), (19, 0)])
def test_one_jump_is_exact_for_a_single_data_point(lcm, prediction_type, t, s):
    schedule, c, eps = make_schedule(lcm, prediction_type=prediction_type), conditioning([0.3, -1.0, 2.0, 0.0]), randn()
    x_t, x_s = (schedule.jump(c["text"][:, :1, :1, None].expand(SHAPE), eps, full(time)) for time in (t, s))
    prediction = lcm.guided_prediction(perfect(prediction_type), schedule, x_t, full(t), c, None, None)
    torch.testing.assert_close(schedule.jump(*prediction, full(s)), x_s, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_ddim_error_on_a_gaussian_shrinks_with_first_order(lcm, prediction_type):
    """x_t = α μ + sqrt(α² s² + σ²) z with one z for all t solves the probability-flow ODE of data N(μ, s² I)."""
    spread, c, errors = 0.5, conditioning([0.3, -1.0, 2.0, 0.0]), []

    def exact(t):
        alpha, sigma = alpha_sigma64(full(t))
        return alpha * c["text"][:, :1, :1, None] + ((alpha * spread) ** 2 + sigma**2).sqrt() * randn()

    for steps in (25, 50, 100, 200):
        schedule, x = make_schedule(lcm, steps, prediction_type), exact(999).float()
        for t, prev in zip(schedule.grid.flip(0), schedule.prev.flip(0), strict=True):
            prediction = lcm.guided_prediction(perfect(prediction_type, spread), schedule, x, full(t), c, None, None)
            x = schedule.jump(*prediction, full(prev))
        errors.append((x - exact(0)).abs().mean().item())
    assert errors[-1] < 0.01
    ratios = [coarse / fine for coarse, fine in zip(errors, errors[1:], strict=False)]
    assert all(1.8 < ratio < 2.2 for ratio in ratios), ratios


# ------------------------------------------------------------------------------------- consistency function, losses


@pytest.mark.parametrize("prediction_type", TYPES)
def test_consistency_function_is_the_identity_at_zero(lcm, prediction_type):
    x, output = randn(), 100 * randn(seed=1)
    f = lcm.consistency_function(lambda *_: output, make_schedule(lcm, prediction_type=prediction_type), x, full(0),
                                 None, None, 10.0)  # fmt: skip
    assert torch.equal(f, x)


@pytest.mark.parametrize("scaling", [10.0, 3.5])
def test_c_skip_and_c_out_at_every_timestep_are_those_of_the_lcm_scheduler(lcm, scaling):
    schedule, t = make_schedule(lcm, prediction_type="sample"), torch.arange(1000)
    zero, one = torch.zeros(1000, 1, 1, 1), torch.ones(1000, 1, 1, 1)
    c_skip = lcm.consistency_function(lambda *_: zero, schedule, one, t, None, None, scaling)
    c_out = lcm.consistency_function(lambda *_: one, schedule, zero, t, None, None, scaling)
    stock = LCMScheduler(timestep_scaling=scaling).get_scalings_for_boundary_condition_discrete(t.double())
    for found, exact, stocks in zip((c_skip, c_out), scalings64(t, scaling), stock, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
        torch.testing.assert_close(found.double().flatten(), stocks, rtol=1e-6, atol=0)


def distance64(a, b, loss_type, c):
    """The distance of each sample in float64, as the papers write it."""
    d = (a.double() - b.double()).flatten(1)
    if loss_type == "l2":
        return (d**2).mean(dim=1)
    if loss_type == "huber":
        return ((d**2 + c**2).sqrt() - c).mean(dim=1)
    return ((d**2).sum(dim=1) + c**2).sqrt() - c


DISTANCES = pytest.mark.parametrize("loss_type, c", [("l2", 0.001), ("huber", 0.001), ("huber", 0.5),
                                                     ("pseudo_huber", 0.00864), ("pseudo_huber", 4.8)])  # fmt: skip


@DISTANCES
@pytest.mark.parametrize("shape", [SHAPE, (3, 5), (2, 4, 16, 16)])
def test_distance_of_each_sample_equals_float64(lcm, shape, loss_type, c):
    a, b = randn(*shape), randn(*shape, seed=1)
    b[-1] = a[-1] + 1e-2  # where c decides
    found = lcm.distance(a, b, loss_type, c)
    assert found.shape == (shape[0],) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), distance64(a, b, loss_type, c), rtol=1e-5, atol=0)


@DISTANCES
def test_distance_does_not_cancel(lcm, loss_type, c):
    """Equal samples are at distance 0 to the last bit, with gradient 0; others never below it."""
    a = randn().requires_grad_()
    same = lcm.distance(a, a.detach().clone(), loss_type, c)
    same.sum().backward()
    assert same.tolist() == [0] * 4 and not a.grad.any()
    for apart in (1e-6, 1e-5, 1e-4, 1e-3):
        b = a.detach() + apart * randn(seed=1)
        found, exact = lcm.distance(a.detach(), b, loss_type, c), distance64(a.detach(), b, loss_type, c)
        assert (found > 0).all()
        if apart**2 > 1e-12 * c:  # below it the float64 of the paper's formula cancels itself
            torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=0)


def test_pseudo_huber_is_a_norm_of_the_sample_and_not_of_its_elements(lcm):
    a, b, c = torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8), 0.00864
    b[0, 0, 0, 0], b[1] = 1, 1  # of 256 elements
    found = lcm.distance(a, b, "pseudo_huber", c).tolist()
    assert found == pytest.approx([(1 + c**2) ** 0.5 - c, (256 + c**2) ** 0.5 - c], rel=1e-5)


@DISTANCES
def test_distance_of_half_precision_is_computed_in_float32(lcm, loss_type, c):
    a, b = randn().bfloat16(), randn(seed=1).bfloat16()
    found = lcm.distance(a, b, loss_type, c)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), distance64(a, b, loss_type, c), rtol=1e-5, atol=0)


# -------------------------------------------------------------------------------------------------- guidance, draws


@pytest.mark.parametrize("dim", [256, 512, 64, 33, 7])
def test_guidance_embedding_equals_the_pipelines(lcm, dim):
    w = torch.tensor([0.0, 0.5, 6.5, 14.0])
    stock = StableDiffusionPipeline.get_guidance_scale_embedding(None, w, dim)
    given = {}
    base = torch.nn.Module()
    base.conv_in, base.config = torch.nn.Linear(1, 1), SimpleNamespace(time_cond_proj_dim=dim)
    call = lambda x, *_, **kwargs: given.update(kwargs) or (x,)  # noqa: E731
    lcm.Denoiser(call, base, lcm.StableDiffusion)(torch.zeros(4, 1), None, {"text": torch.zeros(4, 1, 1)}, w)
    torch.testing.assert_close(given["timestep_cond"], stock, rtol=0, atol=2e-3)  # angles to 14,000, in float32
    angles = 1000 * w.double()[1, None] * 10000.0 ** (-torch.arange(dim // 2).double() / (dim // 2 - 1))
    exact = torch.cat([angles.sin(), angles.cos(), torch.zeros(dim % 2).double()])
    torch.testing.assert_close(stock[1].double(), exact, rtol=0, atol=5e-4)


def make_unet(seed, **config):
    """A random U-Net of some 100,000 parameters, in training mode as a student is, but without dropout."""
    torch.manual_seed(seed)
    blocks = {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
              "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "block_out_channels": [8, 16]}  # fmt: skip
    return UNet2DConditionModel(sample_size=8, norm_num_groups=4, layers_per_block=1, cross_attention_dim=16,
                                attention_head_dim=4, **blocks, **config)  # fmt: skip


class Recorder:
    """A Denoiser that notes the batch sizes of its calls."""

    def __init__(self, net):
        self.net, self.batches = net, []

    def __call__(self, x_t, *rest):
        self.batches.append(len(x_t))
        return self.net(x_t, *rest)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_guided_prediction_is_two_passes_guided_in_x0_and_eps(lcm, prediction_type):
    unet, schedule = make_unet(0).eval(), make_schedule(lcm, prediction_type=prediction_type)
    net = Recorder(denoiser(lcm, unet))
    x_t, t, c, uncond = randn(), torch.tensor([19, 259, 500, 999]), random_c(), random_c(1, seed=1)
    w = torch.tensor([0.0, 1.0, 7.5, 14.0])
    alpha, sigma = (value.float() for value in alpha_sigma64(t))
    with torch.no_grad():
        found = lcm.guided_prediction(net, schedule, x_t, t, c, uncond, w)
        passes = [unet(x_t, t, states).sample for states in (c["text"], uncond["text"].repeat(4, 1, 1))]
    convert = {"epsilon": lambda out: ((x_t - sigma * out) / alpha, out),
               "v_prediction": lambda out: (alpha * x_t - sigma * out, alpha * out + sigma * x_t),
               "sample": lambda out: (out, (x_t - alpha * out) / sigma)}[prediction_type]  # fmt: skip
    for guided, cond, without in zip(found, convert(passes[0]), convert(passes[1]), strict=True):
        torch.testing.assert_close(guided, cond + w.view(-1, 1, 1, 1) * (cond - without), rtol=1e-4, atol=1e-3)
    assert not torch.allclose(passes[0], passes[1], atol=1e-3)
    assert net.batches == [8]


def test_without_uncond_the_teacher_runs_once_and_is_not_guided(lcm):
    unet, schedule = make_unet(0).eval(), make_schedule(lcm)
    net = Recorder(denoiser(lcm, unet))
    x_t, t, c = randn(), torch.tensor([19, 259, 500, 999]), random_c()
    with torch.no_grad():
        found = lcm.guided_prediction(net, schedule, x_t, t, c, None, torch.zeros(4))
        eps = unet(x_t, t, c["text"]).sample
    assert net.batches == [4]
    assert torch.equal(found[1], eps)


def test_what_the_empty_prompt_lacks_is_the_images_own(lcm):
    """SDXL's sizes: the same in both halves; a (1, …) of `uncond` is told to every image; the order is cond, uncond."""
    seen, x_t, t = [], randn(), torch.tensor([19, 259, 500, 999])
    c = {"text": randn(4, 16, 32), "pooled": randn(4, 24, seed=1), "time_ids": torch.arange(24).view(4, 6)}
    uncond = {"text": randn(1, 16, 32, seed=2), "pooled": torch.zeros(1, 24)}

    def net(x, times, given, w):
        seen.append((x, times, given, w))
        return x + given["pooled"].sum(dim=1).view(-1, 1, 1, 1)

    found = lcm.guided_prediction(net, make_schedule(lcm), x_t, t, c, uncond, torch.tensor([0.0, 1.0, 2.0, 3.0]))
    ((x, times, given, w),) = seen
    assert w is None and given.keys() == c.keys()
    assert torch.equal(x, torch.cat([x_t, x_t])) and torch.equal(times, torch.cat([t, t]))
    assert torch.equal(given["time_ids"], torch.cat([c["time_ids"]] * 2))
    for name in uncond:
        assert torch.equal(given[name][:4], c[name])
        assert all(torch.equal(value, uncond[name][0]) for value in given[name][4:])
    moved = torch.tensor([1.0, 2.0, 3.0, 4.0]) * c["pooled"].sum(dim=1)  # (1 + w) × what the pooled embedding adds
    torch.testing.assert_close(found[1], x_t + moved.view(-1, 1, 1, 1), rtol=1e-5, atol=1e-4)


def test_draws_depend_on_the_generator_alone_and_lie_in_range(lcm):
    args = lcm.parse_args(tiny_args("t", "s", "o", "--w_min", "3", "--w_max", "8"))
    schedule, x_0 = make_schedule(lcm, 10), torch.zeros(2000, 4, 2, 2)
    draws, again, other = (lcm.draw(x_0, schedule, args, torch.Generator().manual_seed(seed), 0) for seed in (1, 1, 2))
    for name in ("eps", "index", "w"):
        assert torch.equal(getattr(draws, name), getattr(again, name)), name
        assert not torch.equal(getattr(draws, name), getattr(other, name)), name
    assert draws.eps.shape == x_0.shape and draws.w.shape == draws.index.shape == (2000,)
    assert draws.eps.mean().abs() < 0.02 and (draws.eps.std() - 1).abs() < 0.02
    counts = torch.bincount(draws.index, minlength=10)
    assert len(counts) == 10 and counts.min() > 140 and counts.max() < 260
    assert 3 <= draws.w.min() < 3.05 and 7.95 < draws.w.max() <= 8 and (draws.w.mean() - 5.5).abs() < 0.15


# ------------------------------------------------------------------------------------------------- the method's loss


def loss_args(lcm, *more):
    return lcm.parse_args(tiny_args("t", "s", "o", "--num_ddim_timesteps", "50", *more))


@pytest.mark.parametrize("prediction_type", TYPES)
def test_loss_vanishes_where_the_student_knows_the_guided_trajectory(lcm, prediction_type):
    """Teacher: exact for the data point a given c, b given ∅, so, guided, for p = a + w (a − b), whose trajectory is
    straight in (α, σ). Student and target answer with its end, f(x_t, w, c, t) = α_0 p + σ_0 ε."""
    b, schedule, args = 0.2, make_schedule(lcm, 50, prediction_type), loss_args(lcm)
    c, uncond = conditioning([0.3, -0.5, 0.1, 0.2]), conditioning([b])
    draws = lcm.Draws(randn(), torch.tensor([0, 1, 25, 49]), torch.tensor([0.0, 1.0, 2.0, 5.0]))

    def knowing(shift=0.0):
        def net(x_t, t, c, w):
            (alpha, sigma), (c_skip, c_out) = alpha_sigma64(t), scalings64(t)
            a = c["text"][:, :1, :1, None].double()
            point = a + w.view(-1, 1, 1, 1) * (a - b)
            alpha_0, sigma_0 = alpha_sigma64(full(0))
            end = alpha_0 * point + sigma_0 * (x_t - alpha * point) / sigma + shift
            x_0 = torch.where(c_out > 0, (end - c_skip * x_t) / c_out.clamp_min(1e-9), point)
            return to_output(prediction_type, x_0, (x_t - alpha * x_0) / sigma, t).float()

        return net

    p = c["text"][:, :1, :1, None] + draws.w.view(-1, 1, 1, 1) * (c["text"][:, :1, :1, None] - b)
    x_0 = p.expand(SHAPE)  # so that x_t lies on the trajectory of p that ends in α_0 p + σ_0 ε
    given = {"schedule": schedule, "x_0": x_0, "c": c, "uncond": uncond, "draws": draws, "args": args}
    teacher = perfect(prediction_type)
    loss = lambda *networks: lcm.consistency_loss(*networks, teacher, **given).tolist()  # noqa: E731
    assert max(loss(knowing(), knowing())) < 1e-7
    # the student's answers are moved by 1/2 in all four samples, the target's in three: f(x, 0) = x at the lowest point
    assert loss(knowing(0.5), knowing()) == pytest.approx([0.25] * 4, rel=1e-2)
    assert loss(knowing(), knowing(0.5)) == pytest.approx([0, 0.25, 0.25, 0.25], rel=1e-2, abs=1e-7)


@pytest.fixture
def nets(lcm):
    """Student, target and teacher with weights of their own, and the inputs of a loss."""
    unets = {"student": make_unet(0, time_cond_proj_dim=32), "target": make_unet(1, time_cond_proj_dim=32)}
    unets["teacher"] = make_unet(2)
    draws = lcm.Draws(randn(), torch.tensor([0, 3, 25, 49]), torch.tensor([0.0, 0.5, 1.0, 7.0]))
    given = {"x_0": randn(seed=1), "c": random_c(), "uncond": random_c(1, seed=3), "draws": draws}
    return SimpleNamespace(unets=unets, given=given, **{k: denoiser(lcm, v) for k, v in unets.items()})


def loss64(unets, x_0, c, uncond, draws, prediction_type, loss_type, huber_c, spacing=20):
    """The method again, of each sample in float64, from the paper's formulas (arXiv:2310.04378, Algorithm 1)."""
    unets = {name: copy.deepcopy(unet).double() for name, unet in unets.items()}
    x_0, c, uncond, eps, w = (value.double() for value in (x_0, c["text"], uncond["text"], draws.eps, draws.w))
    embedding = StableDiffusionPipeline.get_guidance_scale_embedding(None, draws.w, 32).double()

    def predict(name, x_t, t, c, embedding=None):
        out, (alpha, sigma) = unets[name](x_t, t, c, timestep_cond=embedding).sample, alpha_sigma64(t)
        if prediction_type == "epsilon":
            return (x_t - sigma * out) / alpha, out
        return alpha * x_t - sigma * out, sigma * x_t + alpha * out

    def f(name, x_t, t):
        c_skip, c_out = scalings64(t)
        return c_skip * x_t + c_out * predict(name, x_t, t, c, embedding)[0]

    t = (draws.index + 1) * spacing - 1
    t_prev = (t - spacing).clamp_min(0)
    (alpha, sigma), (alpha_prev, sigma_prev), w = alpha_sigma64(t), alpha_sigma64(t_prev), w.view(-1, 1, 1, 1)
    x_t = alpha * x_0 + sigma * eps
    pairs = zip(predict("teacher", x_t, t, c), predict("teacher", x_t, t, uncond.repeat(len(c), 1, 1)), strict=True)
    x0_hat, eps_hat = [(1 + w) * cond - w * without for cond, without in pairs]
    f_target = f("target", alpha_prev * x0_hat + sigma_prev * eps_hat, t_prev)
    return distance64(f("student", x_t, t), f_target, loss_type, huber_c)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("loss_type, huber_c", [("l2", 0.001), ("huber", 0.001), ("huber", 1.0)])
def test_loss_of_random_networks_equals_float64(lcm, nets, prediction_type, loss_type, huber_c):
    args = loss_args(lcm, "--loss_type", loss_type, "--huber_c", str(huber_c))
    schedule = make_schedule(lcm, 50, prediction_type)
    with torch.no_grad():
        found = lcm.consistency_loss(nets.student, nets.target, nets.teacher, schedule, args=args, **nets.given)
        exact = loss64(nets.unets, prediction_type=prediction_type, loss_type=loss_type, huber_c=huber_c, **nets.given)
    assert found.shape == (4,)
    torch.testing.assert_close(found.double(), exact, rtol=5e-4, atol=0)


def test_gradient_reaches_all_of_the_student_and_nothing_else(lcm, nets):
    for net in (nets.student, nets.target, nets.teacher):
        net.unet.requires_grad_(True)
    schedule = make_schedule(lcm)
    lcm.consistency_loss(nets.student, nets.target, nets.teacher, schedule, args=loss_args(lcm),
                         **nets.given).mean().backward()  # fmt: skip
    untouched = [name for name, p in nets.student.unet.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []
    assert nets.student.unet.time_embedding.cond_proj.weight.grad.abs().sum() > 0
    for net in (nets.target, nets.teacher):
        assert all(p.grad is None for p in net.unet.parameters())


def test_the_new_projection_learns_although_it_starts_at_zero(lcm, nets):
    student = denoiser(lcm, lcm.make_student(nets.teacher.unet, loss_args(lcm)))
    lcm.consistency_loss(student, nets.target, nets.teacher, make_schedule(lcm), args=loss_args(lcm),
                         **nets.given).mean().backward()  # fmt: skip
    assert student.unet.time_embedding.cond_proj.weight.grad.abs().sum() > 0


# --------------------------------------------------------------------------------------------------- the networks


def test_student_starts_as_the_teacher_for_every_w(lcm):
    teacher = make_unet(0).eval()
    assert "time_cond_proj_dim" in teacher.config["_use_default_values"]  # as with the config.json of SD 1.5
    student = lcm.make_student(teacher, loss_args(lcm, "--unet_time_cond_proj_dim", "48")).eval()
    assert student.config.time_cond_proj_dim == 48 and student.dtype == torch.float32
    config = {name: value for name, value in teacher.config.items() if not name.startswith("_")}
    assert config | {"time_cond_proj_dim": 48} == {k: v for k, v in student.config.items() if not k.startswith("_")}
    net, x_t, t, c = denoiser(lcm, student), randn(), torch.tensor([0, 19, 500, 999]), random_c()
    with torch.no_grad():
        for w in (torch.zeros(4), torch.tensor([0.1, 5.0, 7.5, 14.0])):
            assert torch.equal(net(x_t, t, c, w), teacher(x_t, t, c["text"]).sample)


def test_student_shares_no_memory_with_the_teacher(lcm):
    teacher = make_unet(0)
    before = copy.deepcopy(teacher.state_dict())
    with torch.no_grad():
        torch._foreach_add_(list(lcm.make_student(teacher, loss_args(lcm)).parameters()), 1.0)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_teacher_that_embeds_w_keeps_its_width_and_its_projection(lcm):
    teacher = make_unet(0, time_cond_proj_dim=24).eval()
    student = lcm.make_student(teacher, loss_args(lcm)).eval()
    assert student.config.time_cond_proj_dim == 24
    x_t, t, c, w = randn(), torch.tensor([0, 19, 500, 999]), random_c(), torch.tensor([1.0, 2.0, 7.0, 14.0])
    embedding = StableDiffusionPipeline.get_guidance_scale_embedding(None, w, 24)
    schedule = make_schedule(lcm)
    with torch.no_grad():
        exact = teacher(x_t, t, c["text"], timestep_cond=embedding).sample
        for unet in (teacher, student):
            net = denoiser(lcm, unet)
            torch.testing.assert_close(net(x_t, t, c, w), exact, rtol=0, atol=1e-5)
            assert torch.equal(lcm.guided_prediction(net, schedule, x_t, t, c, None, w)[1], net(x_t, t, c, w))
        assert not torch.allclose(net(x_t, t, c, w + 1), exact, atol=1e-4)


def test_denoiser_runs_in_the_networks_precision_and_answers_in_float32(lcm):
    unet = make_unet(0, time_cond_proj_dim=32).eval()
    given = randn(), torch.tensor([0, 19, 500, 999]), random_c(), torch.full((4,), 0.5)
    with torch.no_grad():
        exact = denoiser(lcm, unet)(*given)
        half = denoiser(lcm, unet.bfloat16())(*given)
    assert half.dtype == torch.float32
    assert 0 < (half - exact).abs().mean() / exact.abs().mean() < 0.02


@pytest.fixture(scope="module")
def models(lcm, tmp_path_factory):
    """The Models of a tiny v-prediction pipeline, N = 50, timestep scaling 7."""
    path = make_pipeline(tmp_path_factory.mktemp("v"), prediction_type="v_prediction")
    args = lcm.parse_args(tiny_args(path, "s", "o", "--num_ddim_timesteps", "50", "--timestep_scaling_factor", "7"))
    accelerator = SimpleNamespace(mixed_precision="no", device=CPU)
    return lcm.load_models(args, lcm.check_teacher(args), accelerator)


def test_pixels_become_latents_with_the_vaes_mean_spread_and_scaling(lcm, models):
    pixels = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels[0], pixels[1] = 0, 255
    run = SimpleNamespace(models=models, args=SimpleNamespace(vae_encode_batch_size=32),
                          accelerator=SimpleNamespace(device=CPU))  # fmt: skip
    batch = {"pixel_values": pixels, "captions": ["a"] * 3}
    latents, _ = lcm.encode_batch(run, batch, torch.Generator().manual_seed(1))
    with torch.no_grad():
        posterior = models.vae.encode(pixels.float() / 127.5 - 1).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    exact = (posterior.mean + posterior.std * noise) * models.vae.config.scaling_factor
    assert latents.dtype == torch.float32 and latents.shape == (3, 4, 8, 8)
    torch.testing.assert_close(latents, exact, rtol=1e-4, atol=1e-5)


def test_chunks_of_the_vae_do_not_change_its_means(lcm, models):
    pixels = torch.randint(0, 256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    chunked, whole = (lcm.encode_images(models.vae, pixels, chunk) for chunk in (2, 5))
    torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-5)  # means and standard deviations


def test_latents_become_pictures_between_zero_and_one(lcm, models):
    latents = 20 * randn()
    with torch.no_grad():
        decoded = models.vae.decode(latents / models.vae.config.scaling_factor).sample
    found = lcm.decode_latents(models.vae, latents, 1)
    torch.testing.assert_close(found, (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)
    assert decoded.abs().max() > 1  # so that the clamp was needed


def test_prompts_are_encoded_as_the_pipeline_does(lcm, models):
    pipeline = StableDiffusionPipeline(models.vae, models.text_encoders[0], models.tokenizers[0], models.teacher,
                                       models.scheduler, None, None, requires_safety_checker=False)  # fmt: skip
    captions = ["a red fox", "", "a caption of far more than sixteen tokens, to be cut"]
    stock = pipeline.encode_prompt(captions, CPU, 1, False)[0]
    found = lcm.encode_prompts(models, captions)
    assert found.keys() == {"text"}
    torch.testing.assert_close(found["text"], stock, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", [torch.nn.GroupNorm(2, 8), torch.nn.LayerNorm(8), torch.nn.LayerNorm(8, bias=False),
                                  torch.nn.LayerNorm(8, elementwise_affine=False)])  # fmt: skip
def test_norms_keep_the_precision_of_their_input(lcm, norm):
    """As autocast on a CPU lets them be already; on CUDA it would run them in float32."""
    norm, x = copy.deepcopy(norm), 3 + 2 * randn(4, 8, 8, 8)
    for seed, parameter in enumerate(norm.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
    unet, exact, weights = torch.nn.Sequential(norm), copy.deepcopy(norm).double(), list(norm.parameters())
    expected, plain = exact(x.double()), norm(x)
    lcm.keep_norms_in_half(unet)
    assert torch.equal(unet(x), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = unet(x.bfloat16())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0.03, atol=0.03)
    for output in (found.float(), expected) if weights else ():
        output.square().mean().backward()
    for weight, other in zip(weights, exact.parameters(), strict=True):
        assert weight.dtype == weight.grad.dtype == torch.float32
        torch.testing.assert_close(weight.grad.double(), other.grad, rtol=0, atol=0.1 * other.grad.abs().max().item())


def test_norms_in_half_leave_the_student_alone(lcm, models):
    student = copy.deepcopy(models.student)
    given = randn(), full(699), random_c(), torch.full((4,), 7.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = denoiser(lcm, student)(*given)
    names = list(student.state_dict())
    lcm.keep_norms_in_half(student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = denoiser(lcm, student)(*given)
    assert list(student.state_dict()) == names
    torch.testing.assert_close(found, plain, rtol=0, atol=0.02 * plain.abs().max().item())


# ------------------------------------------------------------------------------------------------------- sampling


def test_exported_scheduler_visits_points_of_the_grid(models):
    config = models.scheduler.config
    assert (config.original_inference_steps, config.timestep_scaling, config.prediction_type) == (50, 7, "v_prediction")
    for steps, points in {1: [999], 2: [999, 499], 4: [999, 759, 499, 259]}.items():
        models.scheduler.set_timesteps(steps)
        assert models.scheduler.timesteps.tolist() == points
        assert set(points) <= set(models.schedule.grid.tolist())


def test_one_step_of_the_stock_sampler_is_the_consistency_function(lcm, models):
    net, noise, c = denoiser(lcm, models.student), randn(), random_c()
    w = torch.full((4,), 6.5)
    with torch.no_grad():
        f = lcm.consistency_function(net, models.schedule, noise, full(999), c, w, 7.0)
    stock = lcm.sample_stock(net, models.scheduler, noise, 1, c, w, SimpleNamespace(seed=0))
    torch.testing.assert_close(stock, f, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("timesteps", [[999], [999, 499], [999, 759, 499, 259]])
def test_chain_of_a_perfect_denoiser_ends_at_the_data_point(lcm, prediction_type, timesteps):
    schedule, c = make_schedule(lcm, prediction_type=prediction_type), conditioning([0.3, -1.0, 2.0, 0.0])
    predict = lambda x, t: lcm.guided_prediction(perfect(prediction_type), schedule, x, t, c, None, None)  # noqa: E731
    found = lcm.sample_chain(predict, schedule, randn(), timesteps)
    torch.testing.assert_close(found, c["text"][:, :1, :1, None].expand(SHAPE), rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_chain_of_the_teacher_is_stock_ddim(lcm, prediction_type, steps):
    unet, schedule = make_unet(0).eval(), make_schedule(lcm, prediction_type=prediction_type)
    net, noise, c = denoiser(lcm, unet), randn(), random_c()
    stock = make_scheduler(prediction_type, DDIMScheduler, clip_sample=False, timestep_spacing="trailing")
    stock.set_timesteps(steps)
    x = noise
    with torch.no_grad():
        for t in stock.timesteps:
            x, x_0 = stock.step(unet(x, t, c["text"]).sample, t, x, eta=0.0, return_dict=False)
    predict = lambda x, t: lcm.guided_prediction(net, schedule, x, t, c, None, None)  # noqa: E731
    found = lcm.sample_chain(predict, schedule, noise, stock.timesteps.tolist())
    torch.testing.assert_close(found, x_0, rtol=1e-3, atol=1e-3)


def test_fidelity_is_the_psnr_to_the_teachers_fifty_steps_by_prompt_file(lcm):
    reference = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) / 2  # two prompts × two seeds
    off = torch.tensor([0.1, 0.1, 0.01, 0.01]).view(-1, 1, 1, 1)  # 20 dB for the first prompt, 40 for the second
    images = {("teacher", 50): reference, ("teacher", 1): reference, ("untrained", 1): reference * 0.5}
    images |= {("student", 1): reference + off, ("target", 1): reference + 0.1}
    # not rounded, so that the figures are
    pairs = {key: lcm.compare_pairs(value * 255, reference * 255) for key, value in images.items()}
    images = {"pairs": pairs, "looks": {("teacher", 50): reference.flatten(1)}}  # too few for distances
    found = lcm.fidelity(images, [1], {"": range(2), "one": range(1), "two": range(1, 2)}, 2)
    assert {key: found[f"fidelity/{key}"] for key in ("student_psnr_k1", "student_psnr_k1/one", "student_psnr_k1/two",
                                                      "target_psnr_k1", "teacher_psnr_k1")} == {
        "student_psnr_k1": 30, "student_psnr_k1/one": 20, "student_psnr_k1/two": 40, "target_psnr_k1": 20,
        "teacher_psnr_k1": 100}  # fmt: skip
    edges = [found[f"fidelity/{name}_edges_k1"] for name in ("teacher", "untrained", "target")]
    assert edges == pytest.approx([1, 0.5, 1], abs=1e-3)
