"""Multi-boundary consistency distillation: the boundaries, the loss against float64, progressive runs, sampling."""

import copy
import itertools
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    SCRIPTS,
    Case,
    assert_same_end,
    differences,
    ends_with,
    make_sdxl_pipeline,
    over,
    read_losses,
    run_main,
    tiny_args,
)
from diffusers import DiffusionPipeline, TCDScheduler
from safetensors.torch import load_file
from test_maths import (
    CPU,
    TYPES,
    alpha_sigma64,
    denoiser,
    distance64,
    full,
    make_scheduler,
    make_unet,
    randn,
    random_c,
)

CD = SCRIPTS["train_cd_multiboundary"]
CD_LORA = Case(CD.name, True)
BOTH = [CD, CD_LORA]


@pytest.fixture
def case(request):
    return getattr(request, "param", CD)


@pytest.fixture
def cd(script):
    return script


def parse(cd, *more):
    return cd.parse_args(tiny_args("t", "s", "o", "--num_ddim_timesteps", "50", *more))


def formula(num_boundaries, steps, total=1000):
    """b_0 > … > b_{K−1}, in exact arithmetic: b_j = g[⌊j·N/K⌋], g the grid downwards."""
    grid = [(i + 1) * (total // steps) - 1 for i in range(steps)][::-1]
    return [grid[j * steps // num_boundaries] for j in range(num_boundaries)]


def make_schedule(cd, steps=50, prediction_type="epsilon"):
    return cd.Schedule(make_scheduler(prediction_type), steps, CPU)


def find_ends(boundaries, grid):
    """The end time of every grid point: t in (b_{j+1}, b_j] → b_{j+1}, and 0 below the last."""
    pairs = list(itertools.pairwise([*boundaries, 0]))
    return [next(low for high, low in pairs if low < t <= high) if t else 0 for t in grid]


def ends(num_boundaries, steps):
    spacing = 1000 // steps
    return find_ends(formula(num_boundaries, steps), [(i + 1) * spacing - 1 for i in range(steps)])


# --------------------------------------------------------------------------------------------------- the boundaries


# where ⌊linspace⌋ rounds otherwise than ⌊j·N/K⌋, as for N = 200 and K = 195, the scheduler's points count
@pytest.mark.parametrize("steps", [1, 4, 7, 20, 30, 40, 50, 100, 200, 333, 500, 1000])
def test_end_times_are_what_the_exported_scheduler_visits(cd, steps):
    schedule, options = make_schedule(cd, steps), cd.scheduler_options(SimpleNamespace(num_ddim_timesteps=steps))
    stock, grid = make_scheduler(kind=TCDScheduler, **options), schedule.grid.tolist()
    every = {*range(1, min(steps, 64) + 1), steps // 2 or 1, steps - 5 if steps > 5 else 1, steps - 1 or 1, steps}
    for num_boundaries in every:
        stock.set_timesteps(num_boundaries)
        found = cd.segment_ends(schedule, num_boundaries)
        assert found.tolist() == find_ends(stock.timesteps.tolist(), grid), num_boundaries
        assert (found <= schedule.prev).all()  # one step of the teacher never leaves the segment
        assert ((found < schedule.grid) | (schedule.grid == 0)).all()


@pytest.mark.parametrize("steps", [20, 40, 50, 100])
def test_end_times_are_the_formulas(cd, steps):
    schedule = make_schedule(cd, steps)
    for num_boundaries in (1, 2, 3, 4, 5, 7, 8, steps):
        assert cd.segment_ends(schedule, num_boundaries).tolist() == ends(num_boundaries, steps), num_boundaries


@pytest.mark.parametrize("num_boundaries", [1, 4, 1000])
def test_a_grid_of_every_timestep_ends_at_zero(cd, num_boundaries):
    """N above T/2: the grid begins at t = 0, where nothing is left to jump over."""
    schedule = make_schedule(cd, 1000)
    assert schedule.grid[0] == 0
    assert cd.segment_ends(schedule, num_boundaries).tolist() == ends(num_boundaries, 1000)


def test_known_boundaries(cd):
    assert [formula(k, 50) for k in (1, 2, 4)] == [[999], [999, 499], [999, 759, 499, 259]]
    schedule = make_schedule(cd)
    pairs = dict(zip(schedule.grid.tolist(), cd.segment_ends(schedule, 4).tolist(), strict=True))
    assert [pairs[t] for t in (999, 779, 759, 519, 499, 279, 259, 19)] == [759, 759, 499, 499, 259, 259, 0, 0]
    assert cd.segment_ends(schedule, 1).tolist() == [0] * 50
    assert torch.equal(cd.segment_ends(schedule, 50), schedule.prev)


# --------------------------------------------------------------------------------------------------------- the loss


@pytest.fixture
def nets(cd):
    """Student, target and teacher with weights of their own, and the inputs of a loss.

    The times for K = 4: below the first boundary, just above one, at one, and the highest.
    """
    unets = {"student": make_unet(0), "target": make_unet(1), "teacher": make_unet(2)}
    draws = cd.Draws(randn(), torch.tensor([3, 13, 24, 49]), torch.tensor([0.0, 0.5, 1.0, 7.0]))
    given = {"x_0": randn(seed=1), "c": random_c(), "uncond": random_c(1, seed=3), "draws": draws}
    denoisers = {name: denoiser(cd, unet) for name, unet in unets.items()}
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
    given = x_0, c["text"], uncond["text"], draws.eps, draws.w.view(-1, 1, 1, 1)
    x_0, c, uncond, eps, w = (value.double() for value in given)
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
    args = parse(cd, "--loss_type", loss_type, "--huber_c", str(huber_c), "--num_boundaries", str(num_boundaries))
    schedule = make_schedule(cd, 50, prediction_type)
    end = torch.tensor(ends(num_boundaries, 50))[nets.given["draws"].index]
    with torch.no_grad():
        found = cd.consistency_loss(nets.student, nets.target, nets.teacher, schedule, args=args, **nets.given)
        student, target, _ = pair64(nets.unets, **nets.given, end=end, prediction_type=prediction_type)
    exact = distance64(student, target, loss_type, huber_c)
    assert found.shape == (4,) and exact.mean() > 5e-5
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-8)


def test_one_segment_is_plain_consistency_distillation(cd, nets):
    """K = 1: both networks jump to the end of the trajectory, f(x, t) = α_0 x̂_0 + σ_0 ε̂, from every time."""
    args, x_0 = parse(cd, "--loss_type", "l2", "--num_boundaries", "1"), nets.given["x_0"]
    draws, schedule = nets.given["draws"], make_schedule(cd)
    with torch.no_grad():
        found = cd.consistency_loss(nets.student, nets.target, nets.teacher, schedule, args=args, **nets.given)
        t = schedule.grid[draws.index]
        *_, x_prev = pair64(nets.unets, **nets.given, end=full(0))
        x_t = schedule.jump(x_0, draws.eps, t)
        alpha_0, sigma_0 = 0.99957491, 0.02915476  # ᾱ_0 = 1 − 0.00085
        f = []
        for name, x, time in (("student", x_t, t), ("target", x_prev.float(), t - 20)):
            (alpha, sigma), out = alpha_sigma64(time), nets.unets[name](x, time, nets.given["c"]["text"]).sample
            f.append(alpha_0 * (x - sigma * out) / alpha + sigma_0 * out)
    torch.testing.assert_close(found.double(), (f[0] - f[1]).square().mean(dim=(1, 2, 3)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("num_boundaries, there", [(1, [0, 0, 0, 0]), (4, [0, 1, 0, 0]), (50, [1, 1, 1, 1])])
def test_target_is_x_prev_at_a_boundary(cd, nets, monkeypatch, num_boundaries, there):
    seen, is_there = [], torch.tensor(there).bool()
    monkeypatch.setattr(cd, "distance", lambda a, b, *_: seen.append((a, b)))
    with torch.no_grad():
        cd.consistency_loss(nets.student, nets.target, nets.teacher, make_schedule(cd),
                            args=parse(cd, "--num_boundaries", str(num_boundaries)), **nets.given)  # fmt: skip
        end = torch.tensor(ends(num_boundaries, 50))[nets.given["draws"].index]
        _, target, x_prev = pair64(nets.unets, **nets.given, end=end)
    found = seen[0][1].double()
    torch.testing.assert_close(found, target, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[is_there], x_prev[is_there], rtol=1e-3, atol=1e-3)
    assert all((found[i] - x_prev[i]).abs().max() > 0.05 for i in range(4) if not there[i])


@pytest.mark.parametrize("prediction_type", TYPES)
def test_as_many_segments_as_grid_points_and_the_teacher_as_student(cd, nets, prediction_type):
    """K = N: the student has to do what the teacher does. It is the teacher: what is left is the guidance."""
    args = parse(cd, "--loss_type", "l2", "--num_boundaries", "50")
    schedule, teacher = make_schedule(cd, 50, prediction_type), nets.teacher
    # the target is not asked: it answers nonsense
    ask = lambda **given: cd.consistency_loss(  # noqa: E731
        teacher, lambda x, *_: torch.full_like(x, torch.nan), teacher, schedule, args=args, **given
    )
    draws, losses = nets.given["draws"], []
    for w in (0.0, 1.0, 2.0):
        given = {**nets.given, "draws": cd.Draws(draws.eps, draws.index, torch.full((4,), w))}
        losses.append(ask(**given).mean().item())
    zero = {**nets.given, "uncond": None, "draws": cd.Draws(draws.eps, draws.index, torch.zeros(4))}
    assert ask(**zero).max() < 1e-9 and losses[0] < 1e-9
    # x̂_prev − f = w · jump(cond − uncond)
    unet, c, uncond = copy.deepcopy(nets.unets["teacher"]).double(), nets.given["c"], nets.given["uncond"]
    t = (draws.index + 1) * 20 - 1
    x_t = jump64((nets.given["x_0"].double(), draws.eps.double()), t)
    with torch.no_grad():
        pairs = [predict64(unet, x_t, t, states.double(), prediction_type)
                 for states in (c["text"], uncond["text"].repeat(4, 1, 1))]  # fmt: skip
    apart = [cond - without for cond, without in zip(*pairs, strict=True)]
    exact = jump64(apart, t - 20).square().mean().item()
    assert exact > 1e-6 and losses[1:] == pytest.approx([exact, 4 * exact], rel=1e-2)


def test_gradient_reaches_all_of_the_student_and_nothing_else(cd, nets):
    for unet in nets.unets.values():
        unet.requires_grad_(True)
    cd.consistency_loss(nets.student, nets.target, nets.teacher, make_schedule(cd), args=parse(cd),
                        **nets.given).mean().backward()  # fmt: skip
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
    w = cd.draw(torch.zeros(1000, 1, 1, 1), make_schedule(cd), args, torch.Generator().manual_seed(0), 0).w
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


def test_a_lora_that_is_the_teacher_has_nothing_to_learn(train, tmp_path):
    """K = N without guidance: the untrained student is right at every step."""
    run_flags = "--num_boundaries", "10", "--lora_rank", "4", "--loss_type", "l2", "--max_train_steps", "2"
    right = read_losses(train(tmp_path / "run", *run_flags, "--guidance_scale", "1"))
    guided = read_losses(train(tmp_path / "guided", *run_flags, "--guidance_scale", "2"))
    assert max(loss for _, loss, *_ in right) < 1e-9 < 1e-6 < min(loss for _, loss, *_ in guided)


@pytest.fixture
def earlier(case, script, tiny, shards, kept, tmp_path_factory):
    """The output of a run with K = 4, whose EMA weights and last ones differ."""
    if ("earlier", case) not in kept:
        output = kept["earlier", case] = tmp_path_factory.mktemp("earlier") / "run"
        run_main(script, tiny_args(tiny, shards, output, "--ema_decay", "0.5", "--max_train_steps", "2", *case.flags))
    return kept["earlier", case]


@over(BOTH)
def test_student_starts_as_the_earlier_average(case, script, train, tiny, earlier, tmp_path, monkeypatch):
    runs, plain = [], script.start_run
    monkeypatch.setattr(script, "start_run", lambda *given: runs.append(plain(*given)) or runs[0])
    monkeypatch.setattr(script, "train", lambda _: None)
    flags = ["--num_boundaries", "2", *["--lora_rank", "8"] * case.is_lora]
    output = train(tmp_path / "run", "--init_from", str(earlier), *flags)
    before, online = (case.weights(earlier, name) for name in ("target", "student"))
    assert differences(before, online)
    for name in ("target", "student"):
        assert not differences(case.weights(output, name), before)
    teacher = {key.replace(".base_layer", ""): value for key, value in runs[0].models.teacher.state_dict().items()
               if ".lora_" not in key}  # fmt: skip
    assert not differences(teacher, load_file(f"{tiny}/unet/diffusion_pytorch_model.safetensors"))
    if case.is_lora:
        config = runs[0].models.student.peft_config["default"]
        assert (config.r, config.lora_alpha) == (4, 6)  # of the earlier run
    assert script.segment_ends(runs[0].models.schedule, 2).tolist() == [0, 0, 0, 0, 0, *[499] * 5]


@over(BOTH)
def test_a_run_goes_on_from_an_earlier_one(train, earlier, tmp_path):
    """K = 4 → 2; and the interrupted second run resumes exactly, although --init_from is still given."""
    flags = ["--num_boundaries", "2", "--init_from", str(earlier)]
    whole = train(tmp_path / "whole", *flags)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "parts" / "checkpoint-2")
    shutil.copy(whole / "metrics.jsonl", tmp_path / "parts")
    assert_same_end(train(tmp_path / "parts", *flags, "--resume_from_checkpoint", "latest"), whole)
    assert json.loads((whole / "args.json").read_text())["num_boundaries"] == 2


@over(BOTH)
def test_init_from_a_folder_without_the_right_weights(case, script, tiny, shards, earlier, tmp_path):
    (tmp_path / "empty").mkdir()
    other = CD if case.is_lora else CD_LORA  # what the earlier run has not trained
    for folder, flags in ((earlier, other.flags), (tmp_path / "empty", case.flags)):
        with ends_with("--init_(from|lora)"):
            run_main(script, tiny_args(tiny, shards, tmp_path / "run", "--init_from", str(folder), *flags))


def test_init_from_a_network_of_another_width(start, make_teacher):
    with ends_with("cross_attention_dim of .* is 32, that of the teacher 16"):
        start("--init_from", make_teacher(make_sdxl_pipeline))


# ------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_stock_sampling_is_the_jumps_that_were_trained(cd, prediction_type):
    """Of TCDScheduler at eta 0 in K steps, and in 2 K the jumps between: other seeds give the same latents."""
    net, schedule = denoiser(cd, make_unet(0).eval()), make_schedule(cd, 20, prediction_type)
    noise, c, options = randn(), random_c(), cd.scheduler_options(SimpleNamespace(num_ddim_timesteps=20))
    scheduler = make_scheduler(prediction_type, TCDScheduler, **options)
    for steps in (4, 8):
        one, other = (cd.sample_stock(net, scheduler, noise, steps, c, None, SimpleNamespace(seed=seed))
                      for seed in (0, 1))  # fmt: skip
        x = noise
        for t, s in itertools.pairwise([*formula(steps, 20), 0]):
            x = cd.trajectory_function(net, schedule, x, full(t), full(s), c, None)
        assert torch.equal(one, other)
        torch.testing.assert_close(one, x, rtol=1e-3, atol=1e-3)
    ends_of_four = cd.segment_ends(schedule, 4)[[19, 14, 9, 4]]  # from the boundaries on
    assert ends_of_four.tolist() == [*formula(4, 20)[1:], 0]


def test_card_says_what_was_trained(cd):
    for flags, steps, words in (
        (["--guidance_scale", "4"], 4, "scale 4 built in: use it without"),
        (["--w_min", "2", "--w_max", "5", "--num_boundaries", "2"], 2, "3 to 6 built in: use it without"),
    ):
        found = cd.usage(parse(cd, *flags), False)
        assert found[0] == f"num_inference_steps={steps}, guidance_scale=1, eta=0" and words in found[1]
    call, words = cd.usage(parse(cd, "--guidance_scale", "4"), True)
    assert call == "num_inference_steps=4, guidance_scale=4, eta=0" and words.endswith("use it with it.")


def test_a_teacher_that_embeds_w(cd, train, make_teacher, tmp_path, monkeypatch):
    """Its student embeds w too, and is trained at that of --guidance_scale: the card has to say so."""
    runs, plain = [], cd.export
    monkeypatch.setattr(cd, "export", lambda run: runs.append(run) or plain(run))
    teacher = make_teacher(CD.pipeline, time_cond_proj_dim=32)
    output = train(tmp_path / "run", "--guidance_scale", "4", teacher=teacher)
    assert runs[0].uncond is None and runs[0].nets["student"].guidance_dim == 32
    assert runs[0].models.scheduler.config.original_inference_steps == 10
    pipe, sampler = DiffusionPipeline.from_pretrained(output), cd.Sampler(runs[0], (16, 16))
    pipe.set_progress_bar_config(disable=True)
    pictures = pipe(sampler.prompts, num_inference_steps=4, eta=0, output_type="pt", guidance_scale=4,
                    num_images_per_prompt=sampler.seeds, latents=sampler.noise).images  # fmt: skip
    torch.testing.assert_close(pictures, sampler.images("target", 4, stock=True), rtol=0, atol=2e-3)
    assert "guidance_scale=4," in (output / "README.md").read_text()
