"""Guidance that stays with the user: students of w = 0 and empty prompts are guided as their teacher is."""

import re
from types import SimpleNamespace

import pytest
import torch
from conftest import SCRIPTS, Case, ends_with, get_script, over, read_metrics, run_main, tiny_args

LCM, TCD, TCD_LORA, LCM_LORA_XL, CD, CT = SCRIPTS
GUIDED = [Case(LCM), Case(TCD), SCRIPTS[TCD_LORA], Case(CD), Case(CD, is_lora=True, is_sdxl=True)]
BASICS = ["--pretrained_teacher_model", "a", "--train_shards_path_or_url", "b"]
OFF = ["--w_min", "0", "--w_max", "0"]
FREE = [*OFF, "--proportion_empty_prompts", "0.3"]


@pytest.fixture
def teacher(case, make_teacher):
    return make_teacher(case.pipeline, **({"prediction_type": "v_prediction"} if case == Case(CD) else {}))


@pytest.fixture
def done(case, script, teacher, shards, kept, tmp_path_factory, monkeypatch):
    """A run of three steps that move a student far: `output`, the Run as it was exported, and what it printed."""
    if ("guided", case) not in kept:
        output, runs, said, export = tmp_path_factory.mktemp("guided") / "run", [], [], script.export
        monkeypatch.setattr(script, "export", lambda run: runs.append(run) or export(run))
        monkeypatch.setattr(script.tqdm, "write", lambda text, **_: said.append(text))
        flags = ["--num_ddim_timesteps", 20, "--max_train_steps", 3, "--learning_rate", "1e-2", "--validation_steps", 3,
                 "--validation_num_inference_steps", 4, "--num_validation_images", 1, "--validation_prompts", "a fox",
                 "a cat", "--validation_negative_prompt", "blue (dark)"]  # fmt: skip
        run_main(script, tiny_args(teacher, shards, output, *flags, *case.flags, *FREE))
        kept["guided", case] = SimpleNamespace(output=output, run=runs[0], said="\n".join(said))
    return kept["guided", case]


@pytest.fixture
def pipe(done):
    """The student as its model card loads it, after the card's own picture."""
    code, names = re.search(r"```python\n(.*?)```", (done.output / "README.md").read_text(), re.DOTALL)[1], {}
    torch.manual_seed(0)
    exec(code, names)
    assert "guidance_scale=7.5" in code and 'negative_prompt="blue (dark)"' in code
    names["pipe"].set_progress_bar_config(disable=True)
    return names["pipe"]


@over(GUIDED)
def test_stock_diffusers_gives_the_guided_pictures_of_validation(script, done, pipe):
    """At any guidance, with the negative prompt, from the files alone: two evaluations a step, at guidance 1 one."""
    sampler, args, found, sizes = script.Sampler(done.run, (16, 16)), done.run.args, [], []
    pipe.unet.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    assert not pipe.unet.config.time_cond_proj_dim
    for scale in (1.0, 3.0, 7.5):
        args.validation_student_guidance_scale = scale
        own = sampler.images("target", 4, stock=True)
        options = {"generator": torch.Generator().manual_seed(0), **script.sample_options(args)}
        images = pipe(sampler.prompts, num_inference_steps=4, guidance_scale=scale, latents=sampler.noise,
                      negative_prompt=["blue (dark)"] * 2, output_type="pt", **options).images  # fmt: skip
        torch.testing.assert_close(images, own, rtol=0, atol=2e-3)
        found.append(images)
    assert sizes == [2] * 4 + [4] * 8
    assert min((found[0] - found[1]).abs().max(), (found[1] - found[2]).abs().max()) > 1e-2


@over(GUIDED)
def test_figures_of_guided_students(script, done):
    """Before the first step the student is the untrained one, guided as it is: on the teacher's footing."""
    start, end = (line for line in read_metrics(done.output) if "lr" not in line)
    if script.METHOD.name != "latent consistency":  # a chain of x̂_0, as the teacher's
        assert start["fidelity/untrained_psnr_k4"] == pytest.approx(start["fidelity/student_psnr_k4"], abs=0.01)
    assert abs(end["fidelity/student_psnr_k4"] - start["fidelity/student_psnr_k4"]) > 0.01
    labels = re.findall(r"^  (\S.*?)  +\d", done.said, re.MULTILINE)
    assert len(labels) == 8 and all(label.endswith(", guided (2 evaluations a step)") for label in labels)
    assert "guidance scale 7.5, 2 prompts" in done.said


@over(GUIDED)
def test_untrained_student_is_guided_as_its_teacher(script, start):
    """With a step for each time of the grid its chain is DDIM's, and its pictures those of the guided teacher."""
    run = start(*FREE, "--num_ddim_timesteps", "10", "--validation_negative_prompt", "b", "--validation_prompts", "a")
    sampler = script.Sampler(run, (16, 16))
    if script.METHOD.scheduler is script.TCDScheduler:
        one, other = (sampler.images(name, 10) for name in ("teacher", "untrained"))
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)
        assert sampler.guided == {"teacher", "untrained"}
    run.args.validation_student_guidance_scale = 1.0
    assert (sampler.images("untrained", 10) - sampler.images("teacher", 10)).abs().max() > 1e-2
    run.reader.close()


@pytest.mark.parametrize("name", [LCM, TCD, TCD_LORA, CD])
@pytest.mark.parametrize(
    "flags, teachers, students",
    [
        (FREE, 7.5, 7.5),
        ([*FREE, "--validation_guidance_scale", "3"], 3, 3),
        ([*FREE, "--validation_student_guidance_scale", "3"], 3, 3),
        ([*FREE, "--validation_guidance_scale", "5", "--validation_student_guidance_scale", "2"], 5, 2),
        ([*FREE, "--validation_student_guidance_scale", "1"], 1, 1),
        ([*FREE, "--validation_guidance_scale", "1"], 1, 1),
        (OFF, 1, 1),
        ([*OFF, "--validation_student_guidance_scale", "4"], 4, 4),  # captions of the data may be empty
        (["--w_min", "0", "--w_max", "6", "--proportion_empty_prompts", "0.3"], 4, 1),
    ],
)
def test_guidance_of_validation(name, flags, teachers, students):
    args = get_script(name).parse_args([*BASICS, *flags])
    assert (args.validation_guidance_scale, args.validation_student_guidance_scale) == (teachers, students)
    assert args.unet_time_cond_proj_dim == (256 if args.w_max and name != CD else None)


THEIRS = [(FREE, 7.5, True), ([*FREE, "--validation_guidance_scale", "1"], 1, True), (OFF, 1, False), ([], 1, False)]


@over([LCM, TCD, TCD_LORA, CD], "flags, scale, is_theirs", THEIRS)
def test_card_says_whose_the_guidance_is(script, flags, scale, is_theirs):
    call, words = script.usage(script.parse_args([*BASICS, *flags]), False)
    assert f"guidance_scale={scale:g}" in call
    assert ("from 1 to 7.5) and negative prompt are yours" in words) == is_theirs
    assert ("without guidance" in words) != is_theirs


@over([LCM, TCD, CD], "flags, expected", [
    ([], {LCM: "6 to 16", TCD: "6 to 16", CD: "scale 7.5 built in"}),
    (["--w_min", "1", "--w_max", "3"], dict.fromkeys((LCM, TCD, CD), "2 to 4")),
    (OFF, {LCM: "a teacher without guidance", TCD: "a teacher without guidance", CD: "steps, without guidance"}),
])  # fmt: skip
def test_card_says_which_guidance_was_distilled(case, script, flags, expected):
    _, words = script.usage(script.parse_args([*BASICS, *flags]), False)
    assert expected[case.name] in words and " 1 " not in words


@over([LCM])
def test_a_run_whose_network_embeds_w_goes_on_without_guidance(script, teacher, shards, tmp_path, capfd):
    """As one of an older script, which embedded w = 0 too."""
    flags = tiny_args(teacher, shards, tmp_path, "--validation_steps", 0)
    run_main(script, [*flags, "--max_train_steps", 1, "--checkpointing_steps", 1])
    run_main(script, [*flags, *OFF, "--max_train_steps", 2, "--resume_from_checkpoint", "latest"])
    assert "Resuming with other values than before for: " in capfd.readouterr().err
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]


@over([CD, CT], "flags", [["--validation_student_guidance_scale", "3"]])
def test_a_student_with_guidance_built_in_is_not_guided(script, flags, capsys):
    with pytest.raises(SystemExit):
        script.parse_args([*BASICS, *flags])
    assert "--validation_student_guidance_scale is of a student that was trained without" in capsys.readouterr().err


@over([CD, TCD], "flags, warns", [(OFF, True), (FREE, False), ([], False)])
def test_half_of_it_is_warned_of(start, capsys, flags, warns):
    start(*flags).reader.close()
    assert ("give --proportion_empty_prompts 0.1" in capsys.readouterr().err) == warns


def test_ct_has_no_guidance_to_leave():
    args = get_script(CT).parse_args([*BASICS, "--proportion_empty_prompts", "0.3"])
    assert (args.validation_guidance_scale, args.validation_student_guidance_scale) == (1, 1)


@over([CD])
def test_a_network_that_embeds_w_is_refused(case, start, make_teacher):
    with ends_with("the user guides the student, which a U-Net that embeds w does not allow"):
        start(*FREE, teacher=make_teacher(case.pipeline, time_cond_proj_dim=32))


@over([SCRIPTS[LCM_LORA_XL]], "zeros", [True, False])
def test_empty_prompts_are_what_the_pipeline_guides_from(case, script, start, make_teacher, zeros):
    """SDXL's pipeline takes zeros for them, unless its configuration says otherwise."""
    run = start(*FREE, "--train_batch_size", "3", teacher=make_teacher(case.pipeline, force_zeros=zeros))
    batch = run.reader.next_batch()
    batch["captions"] = ["", "a", ""]
    _, c = script.encode_batch(run, batch, torch.Generator().manual_seed(0))
    run.reader.close()
    assert ("ConditioningZeroOut" in script.example(run)) == zeros
    uncond = script.encode_uncond(run.models, "")
    for name, value in uncond.items():
        torch.testing.assert_close(c[name][[0, 2]], value.expand(2, *value.shape[1:]), rtol=0, atol=1e-5)
        assert c[name][1].abs().max() > 0.1 and bool(value.any()) != zeros
