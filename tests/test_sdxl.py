"""Stable Diffusion XL: micro-conditioning of a known image, two text encoders, guidance, VAE, sizes, refusals."""

import io
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    LCM_XL_LORA,
    QUICK_VALIDATION,
    edited,
    ends_with,
    get_script,
    make_sdxl_pipeline,
    read_metrics,
    tiny_args,
)
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline
from PIL import Image
from transformers import CLIPTokenizer

pytestmark = [pytest.mark.filterwarnings("ignore:.*deprecated")]


@pytest.fixture
def case():
    return LCM_XL_LORA


def ramp(width, height, kind="PNG", **options):
    """An encoded image whose red tells x and whose green tells y, 4 a pixel."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = 4 * np.arange(width), 4 * np.arange(height)[:, None]
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def decode(script, image, seed, *flags, suffix="png"):
    args = script.parse_args(tiny_args("t", "s", "o", *flags))
    sample = script.decode_sample({"__key__": "a", suffix: image, "txt": b"a fox"}, args, random.Random(seed))
    return sample["pixel_values"].numpy().astype(int), sample["time_ids"].tolist()


# --------------------------------------------------------------------------------------------- micro-conditioning


@pytest.mark.parametrize("size", [(60, 32), (32, 60)])
@pytest.mark.parametrize("flags", [[], ["--random_flip"]])
def test_time_ids_of_a_known_image(script, size, flags):
    """Halved to 16 pixels: red is 8 x + 2 and green 8 y + 2 in the resized image, so that pixels tell the crop."""
    corners, mirrored = set(), 0
    for seed in range(40):
        pixels, (height, width, top, left, *target) = decode(script, ramp(*size), seed, *flags)
        assert (width, height) == size and target == [16, 16]
        red, green = pixels[0, 8, 4], pixels[1, 8, 4]
        is_mirrored = bool(pixels[0, 8, 4] > pixels[0, 8, 5])
        column = size[0] // 2 - 1 - (left + 4) if is_mirrored else left + 4
        assert (round((red - 2) / 8), round((green - 2) / 8)) == (column, top + 8), seed
        corners.add((top, left))
        mirrored += is_mirrored
    longest = max(max(corner) for corner in corners)
    assert len(corners) > 10 and 11 <= longest <= 14 and {min(corner) for corner in corners} == {0}
    assert (10 < mirrored < 30) if flags else not mirrored


def test_time_ids_of_the_centre_and_without_any(script):
    image = ramp(60, 32)
    assert decode(script, image, 0, "--center_crop")[1] == [32, 60, 0, 7, 16, 16]
    pixels, ids = decode(script, image, 3, "--random_flip")
    fixed_pixels, fixed = decode(script, image, 3, "--random_flip", "--use_fix_crop_and_size")
    assert fixed == [16, 16, 0, 0, 16, 16] != ids and np.array_equal(pixels, fixed_pixels)
    assert decode(script, ramp(10, 12), 0, "--center_crop")[1] == [12, 10, 2, 0, 16, 16]  # made larger: 16 × 19


def test_time_ids_of_a_jpeg(script):
    """The size is that of the upright image, before any reduction: neither the stored one nor the decoder's."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned = ramp(60, 32, "JPEG", exif=exif)
    assert decode(script, turned, 0, "--center_crop", suffix="jpg")[1] == [60, 32, 7, 0, 16, 16]
    large = io.BytesIO()
    Image.new("RGB", (500, 301)).save(large, "JPEG")
    height, width, top, left, *_ = decode(script, large.getvalue(), 0, "--center_crop", suffix="jpg")[1]
    assert (height, width, top, left) == (301, 500, 0, 6)  # resized to 27 × 16


def test_training_gives_the_student_the_time_ids_of_its_images(script, start):
    seen, run = [], start()
    plain = run.nets["student"].unet.forward

    def forward(x_t, t, **given):
        seen.append(given["added_cond_kwargs"])
        return plain(x_t, t, **given)

    run.nets["student"].unet.forward = forward
    for _ in range(6):
        run.history.clear()
        script.train_step(run)
        run.step += 1
    teacher, target, student = seen[:3]  # the order of their calls
    for name in ("text_embeds", "time_ids"):
        assert torch.equal(student[name], target[name])
        assert torch.equal(student[name], teacher[name][:2])
    assert torch.equal(teacher["time_ids"][2:], student["time_ids"]) and not teacher["text_embeds"][2:].any()
    ids = torch.cat([added["time_ids"] for added in seen[2::3]])  # images of 20 × 16
    assert ids.dtype == torch.float32 and ids.shape == (12, 6)
    assert {(*row[:3], *row[4:]) for row in ids.int().tolist()} == {(16, 20, 0, 16, 16)}
    assert 2 < len(set(ids[:, 3].tolist())) and {*ids[:, 3].tolist()} <= {0, 1, 2, 3, 4}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_time_ids_are_not_rounded(start, precision):
    """bf16 has no 1023; the embedding of the sizes is a sine of up to a thousand."""
    run = start("--mixed_precision", precision)
    ids = torch.tensor([[1023, 1021, 3, 5, 1024, 1024]] * 2)
    c = {"text": torch.zeros(2, 16, 32), "pooled": torch.zeros(2, 24), "time_ids": ids}
    given = {}
    handle = run.models.student.add_time_proj.register_forward_pre_hook(lambda _, args: given.update(ids=args[0]))
    with torch.no_grad():
        run.nets["teacher"](torch.zeros(2, 4, 8, 8), torch.tensor([999, 19]), c, torch.zeros(2))
    handle.remove()
    assert given["ids"].reshape(2, 6).tolist() == ids.tolist()


# ---------------------------------------------------------------------------------------- as the diffusers pipeline


@pytest.fixture
def other_tokenizer(make_teacher, tmp_path):
    """A teacher whose second tokenizer pads with another token than the first, as that of SDXL does."""
    path = shutil.copytree(make_teacher(make_sdxl_pipeline), tmp_path / "other")
    tokenizer = CLIPTokenizer.from_pretrained(path / "tokenizer_2", pad_token="z</w>")
    tokenizer.save_pretrained(path / "tokenizer_2")
    return str(path)


def stock_pipeline(path):
    pipe = StableDiffusionXLPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_prompts_are_encoded_as_the_pipeline_does(script, start, other_tokenizer):
    models, pipe = start(teacher=other_tokenizer).models, stock_pipeline(other_tokenizer)
    captions = ["a red fox", "", "a caption of far more than sixteen tokens, to be cut"]
    tokens, _, pooled, _ = pipe.encode_prompt(captions, None, torch.device("cpu"), 1, False)
    found = script.encode_prompts(models, captions)
    assert {name: tuple(value.shape) for name, value in found.items()} == {"text": (3, 16, 32), "pooled": (3, 24)}
    torch.testing.assert_close(found["text"], tokens, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["pooled"], pooled, rtol=0, atol=1e-6)
    assert not any(value.requires_grad for value in found.values())
    one, other = (
        pipe.tokenizer(["a"], padding="max_length").input_ids,
        pipe.tokenizer_2(["a"], padding="max_length").input_ids,
    )
    assert one != other


@pytest.mark.parametrize("force_zeros", [True, False, None])
@pytest.mark.parametrize("negative", ["", "a blur"])
def test_uncond_is_the_pipelines(script, start, make_teacher, tmp_path, force_zeros, negative):
    """Zeros for no text where the pipeline's configuration says so, or says nothing; else the encoded text."""
    path = Path(make_teacher(make_sdxl_pipeline, force_zeros=force_zeros is not False))
    if force_zeros is None:
        path = edited(path, tmp_path, "model_index.json", force_zeros_for_empty_prompt=None)
    run, pipe = start(teacher=str(path)), stock_pipeline(path)
    _, tokens, _, pooled = pipe.encode_prompt("a", None, torch.device("cpu"), 1, True, negative_prompt=negative or None)
    found = script.encode_uncond(run.models, negative)
    for value, exact in zip(found.values(), (tokens, pooled), strict=True):
        torch.testing.assert_close(value, exact, rtol=0, atol=1e-6)
        assert bool(value.any()) == (force_zeros is False or bool(negative))
    if not negative:
        assert found.keys() == run.uncond.keys() and all(torch.equal(found[name], run.uncond[name]) for name in found)


@pytest.mark.parametrize("force_zeros", [True, False])
@torch.no_grad()
def test_guided_teacher_is_the_pipelines_guidance(script, start, make_teacher, force_zeros):
    """What the stock pipeline gives to its U-Net in a guided step, and what it makes of the answer."""
    path = make_teacher(make_sdxl_pipeline, force_zeros=force_zeros)
    run, pipe, seen = start(teacher=path), stock_pipeline(path), []
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False)
    pipe.unet.register_forward_hook(lambda _, *call: seen.append(call), with_kwargs=True)
    after = pipe("a fox", num_inference_steps=10, guidance_scale=7, height=24, width=16, output_type="latent",
                 generator=torch.Generator().manual_seed(0)).images  # fmt: skip
    assert len(seen) == 10
    (x_twice, t), given, (output,) = seen[3]
    ids = script.Sampler(run, (16, 24)).c["time_ids"][:1]
    assert given["added_cond_kwargs"]["time_ids"].tolist() == ids.expand(2, -1).tolist() == [[24, 16, 0, 0, 24, 16]] * 2
    without, cond = output.chunk(2)
    x_t, c = x_twice[:1], {**script.encode_prompts(run.models, ["a fox"]), "time_ids": ids}
    uncond = script.encode_uncond(run.models, "")
    found = script.guided_prediction(run.nets["teacher"], run.models.schedule, x_t, t.view(1), c, uncond,
                                     torch.tensor([6.0]))  # fmt: skip
    torch.testing.assert_close(found[1], without + 7 * (cond - without), rtol=1e-3, atol=1e-4)
    assert (cond - without).abs().max() > 1e-3
    # all ten steps: the chain of the teacher from the same noise
    net, schedule = run.nets["teacher"], run.models.schedule
    predict = lambda x, t: script.guided_prediction(net, schedule, x, t, c, uncond, torch.tensor([6.0]))  # noqa: E731
    x, times = seen[0][0][0][:1], [int(call[0][1]) for call in seen]
    assert times[0] == 999
    torch.testing.assert_close(script.sample_chain(predict, schedule, x, times), after, rtol=1e-2, atol=1e-3)


# ------------------------------------------------------------------------------------------------------- precision


def test_vae_that_must_be_float32_is(script, start, teacher, tmp_path):
    vae = AutoencoderKL.from_pretrained(teacher, subfolder="vae")
    assert vae.config.force_upcast
    run = start("--mixed_precision", "bf16")
    assert {value.dtype for value in run.models.vae.parameters()} == {torch.float32}
    assert run.models.text_encoders[0].dtype == run.models.student.conv_in.weight.dtype == torch.bfloat16
    pixels = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = {"pixel_values": pixels, "captions": ["a"] * 3, "time_ids": torch.zeros(3, 6)}
    found, _ = script.encode_batch(run, batch, torch.Generator().manual_seed(1))
    with torch.no_grad():
        posterior = vae.encode(pixels.float() / 127.5 - 1).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    exact = (posterior.mean + posterior.std * noise) * 0.13025
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
    vae.register_to_config(force_upcast=False)
    vae.save_pretrained(tmp_path / "vae")
    run = start("--mixed_precision", "bf16", "--pretrained_vae_model_name_or_path", str(tmp_path / "vae"))
    assert {value.dtype for value in run.models.vae.parameters()} == {torch.bfloat16}
    assert not torch.equal(script.encode_batch(run, batch, torch.Generator().manual_seed(1))[0], found)


# ------------------------------------------------------------------------------------------------------------ runs


@pytest.fixture
def calls(script, monkeypatch):
    """(adapter, batch size, latents' shape, time ids) of every call of a network."""
    seen, plain = [], script.Denoiser.__call__

    def call(net, x_t, t, c, w):
        seen.append((net.adapter, len(x_t), tuple(x_t.shape[2:]), {tuple(row) for row in c["time_ids"].tolist()}))
        return plain(net, x_t, t, c, w)

    monkeypatch.setattr(script.Denoiser, "__call__", call)
    return seen


def test_teacher_without_guidance(train, calls, tmp_path):
    """As SDXL-Turbo is distilled: no unconditional pass, neither in training nor in validation."""
    train(tmp_path / "run", "--w_min", "0", "--w_max", "0", "--validation_steps", "4", *QUICK_VALIDATION)
    training = [size for adapter, size, _, ids in calls if (16, 20) in {row[:2] for row in ids}]
    validation = [size for adapter, size, _, ids in calls if (16, 20) not in {row[:2] for row in ids}]
    assert training == [2] * 12 and set(validation) == {1} and len(validation) > 50
    calls.clear()
    train(tmp_path / "guided", "--w_min", "1", "--w_max", "1", "--validation_steps", "4", *QUICK_VALIDATION)
    assert {(adapter, size) for adapter, size, *_ in calls} == {("default", 2), ("target", 2), (None, 4),
        ("default", 1), ("target", 1), (None, 1), (None, 2)}  # fmt: skip


def test_validation_at_several_sizes(train, calls, tmp_path):
    flags = "--validation_steps", "2", "--validation_resolutions", "16x16,24x16", *QUICK_VALIDATION
    output = train(tmp_path / "run", *flags)
    names = {path.name for path in (output / "validation").iterdir()}
    assert names == {f"step-{step}{suffix}.png" for step in (0, 2, 4) for suffix in ("", "-24x16")}
    square, wide = (Image.open(output / "validation" / f"step-4{suffix}.png") for suffix in ("", "-24x16"))
    assert square.size[0] < wide.size[0] and square.size[1] == wide.size[1]
    sizes = {(shape, *ids) for adapter, _, shape, ids in calls if not {row[:2] for row in ids} & {(16, 20)}}
    assert sizes == {((8, 8), (16, 16, 0, 0, 16, 16)), ((8, 12), (16, 24, 0, 0, 16, 24))}
    lines = [line for line in read_metrics(output) if "lr" not in line]
    assert [line["step"] for line in lines] == [0, 0, 2, 2, 4, 4]
    for index, line in enumerate(lines):
        prefix = "fidelity-24x16/" if index % 2 else "fidelity/"
        figures = {key.removeprefix(prefix): value for key, value in line.items() if key.startswith(prefix)}
        assert len(figures) == len(line) - 1 == 8 and all(value > 0 for value in figures.values())
    assert lines[0]["fidelity/untrained_psnr_k1"] != lines[1]["fidelity-24x16/untrained_psnr_k1"]
    assert lines[4]["fidelity/student_psnr_k1"] != lines[0]["fidelity/student_psnr_k1"]


@pytest.mark.parametrize("size", ["16x17", "18x16,15x16"])
def test_validation_sizes_that_the_vae_cannot_do(start, size):
    with ends_with(r"--validation_resolutions: \[.*\] must be multiples of .* 2$"):
        start("--validation_resolutions", size)


def test_thirty_steps_lower_the_loss(script, start):
    run = start("--learning_rate", "3e-3", "--train_batch_size", "4", "--w_min", "1", "--w_max", "1")
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randn(64, 4, 8, 8, generator=generator)
    ids = torch.tensor([[16, 20, 0, 2, 16, 16]])
    c = {**script.encode_prompts(run.models, ["a fox", "1", "12", "a"]), "time_ids": ids.expand(4, -1)}
    c = {name: value.repeat(16, *[1] * (value.ndim - 1)) for name, value in c.items()}
    draws = script.draw(x_0, run.models.schedule, run.args, generator, 0)

    def loss():
        """Over the same 64 draws, against the same target: the one that the run started with."""
        return script.consistency_loss(run.nets["student"], run.nets["teacher"], run.nets["teacher"],
                                       run.models.schedule, x_0, c, run.uncond, draws, run.args).mean()  # fmt: skip

    with torch.no_grad():
        before = loss()
        for _ in range(30):
            with torch.enable_grad():
                script.train_step(run)
            run.step += 1
        after = loss()
    losses = [pair[0].item() for pair in run.history]
    assert len(losses) == 30 and sum(losses[-10:]) < 0.9 * sum(losses[:10]), losses
    assert after < 0.95 * before


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("file, changes, message", [
    ("model_index.json", {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None],
                          "tokenizer": [None, None]}, "is an SDXL refiner"),
    ("model_index.json", {"_class_name": "StableDiffusionXLImg2ImgPipeline"},
     "is a StableDiffusionXLImg2ImgPipeline, not the text-to-image pipeline of SDXL"),
    ("model_index.json", {"_class_name": "StableDiffusion3Pipeline", "unet": None,
                          "transformer": ["diffusers", "SD3Transformer2DModel"]}, "Diffusion3Pipeline, has no U-Net"),
    ("unet/config.json", {"in_channels": 9}, "9.*in-painting"),
    ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction type 'flow'"),
    ("model_index.json", {"scheduler": ["diffusers", "EDMDPMSolverMultistepScheduler"]}, "EDMDPM.* not supported"),
    ("vae/config.json", {"latent_channels": 16}, "VAE"),
])  # fmt: skip
def test_teacher_of_another_kind(start, teacher, tmp_path, file, changes, message):
    path = edited(teacher, tmp_path, file, **changes)
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as end:
        start(teacher=str(path))
    assert "\n" not in end.value.code and (str(path) in end.value.code or message == "VAE")


def test_defaults_are_those_of_sdxl():
    script = get_script("train_lcm_distill_lora_sdxl_wds")
    args = script.parse_args(["--pretrained_teacher_model", "a", "--train_shards_path_or_url", "b"])
    assert (args.resolution, args.lora_rank, args.learning_rate) == (1024, 64, 1e-4)
    assert args.validation_resolutions == [[1024, 1024]]
    args = script.parse_args(tiny_args("a", "b", "c", "--validation_resolutions", "1024x1024,1280x768"))
    assert json.dumps(args.validation_resolutions) == "[[1024, 1024], [1280, 768]]"
