"""tools/evaluate.py: every figure against an independent computation, every source, protocol and kind of model, kill
-9, rows that are added later, two processes, and errors. The models are tiny and random; the order of damaged pictures
is tested on the demo's teacher.
"""

import importlib.util
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    LCM_LORA,
    LCM_XL,
    ROOT,
    SCRIPT,
    SCRIPTS,
    get_script,
    image_bytes,
    load_script,
    make_pipeline,
    make_sdxl_pipeline,
    make_tokenizer,
    over,
    run_main,
    run_script,
    tiny_args,
    write_shard,
)
from PIL import Image, ImageEnhance, ImageFilter

pytest.importorskip("torchmetrics", reason="torchmetrics is not installed: see requirements.txt, development")
TOOL = ROOT / "tools" / "evaluate.py"
PROMPTS = ["a red fox", "two cats", "a house by the sea", "nothing", "snow", "b c d"]


@pytest.fixture(scope="module")
def tool():
    return load_script(TOOL)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n\n")
    return path


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """The folder of a tiny random CLIPModel with its processor, of the class of CLIP, OpenCLIP-G and PickScore."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    tokenizer, size = make_tokenizer(folder / "source")
    both = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = both | {"vocab_size": size, "max_position_embeddings": 16, "bos_token_id": size - 2,
                   "eos_token_id": size - 1, "pad_token_id": size - 1}  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config=both | {"image_size": 8, "patch_size": 4}, projection_dim=12)
    torch.manual_seed(3)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    for part in (CLIPModel(config), tokenizer, processor):
        part.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    """A folder of 20 pictures, not square, and one that is broken."""
    folder = tmp_path_factory.mktemp("references")
    (folder / "deep").mkdir()
    for index in range(20):
        (folder / ("deep" if index % 2 else ".") / f"{index}.png").write_bytes(image_bytes(index))
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    return folder


@pytest.fixture(scope="module")
def trainings(tiny, tmp_path_factory):
    """Three models of one kind whose U-Nets are not quite the same, as after training from other seeds."""
    from safetensors.torch import load_file, save_file

    folders = []
    for seed in range(3):
        folders.append(shutil.copytree(tiny, tmp_path_factory.mktemp("trainings") / f"seed{seed}"))
        weights = folders[-1] / "unet" / "diffusion_pytorch_model.safetensors"
        torch.manual_seed(seed)
        tensors = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in load_file(weights).items()}
        save_file(tensors, weights, {"format": "pt"})
    return list(map(str, folders))


def flags(teacher, prompts, output, *more):
    return ["--teacher", teacher, "--teacher_steps", "3", "--guidance_scale", "2", "--prompts", prompts, "--features",
            "vae", "--batch_size", "4", "--output_dir", output, *more]  # fmt: skip


def evaluate(tool, *arguments):
    """Runs the tool in this process; returns report.json."""
    run_main(tool, arguments)
    output = Path(arguments[-arguments[::-1].index("--output_dir")])  # the last one counts
    for name in ("report.md", "grid.png", "quality.png"):
        assert (output / name).stat().st_size > 100
    return json.loads((output / "report.json").read_text())


def without_speed(report):
    """What must not depend on how an evaluation was run."""
    rows = [{key: value for key, value in row.items() if key != "speed"} for row in report["rows"]]
    text = json.dumps({**report, "rows": rows, "arguments": None})
    return json.loads(text, parse_float=lambda number: round(float(number), 3))


def read_pictures(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*.png"))}


def random_pictures(count=10, size=16, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(count)]


# ---------------------------------------------------------------------------------------------------------- figures
def test_frechet_distance(tool):
    """Against square roots by eigenvectors of symmetric matrices, in float64."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200, 7)) @ rng.normal(size=(7, 7)), rng.normal(1, 2, size=(150, 7))

    def root(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return vectors * np.sqrt(values.clip(0)) @ vectors.T

    sigma_a, sigma_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = root(root(sigma_a) @ sigma_b @ root(sigma_a))
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(sigma_a + sigma_b - 2 * cross)
    assert tool.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert tool.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_kernel_distance(tool):
    """Against the sums over all pairs; below 1,000 pictures every subset is the whole set."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 5)), rng.normal(0.5, 1, size=(30, 5))

    def mean_kernel(x, y, skip_same):
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if not (skip_same and i == j)]
        return np.mean([(x[i] @ y[j] / 5 + 1) ** 3 for i, j in pairs])

    expected = mean_kernel(a, a, True) + mean_kernel(b, b, True) - 2 * mean_kernel(a, b, False)
    assert tool.kernel_distance(a, b) == pytest.approx(1000 * expected, rel=1e-6)


def test_bootstrap(tool):
    values = np.random.default_rng(1).normal(3, 2, size=(400, 2))
    found = tool.bootstrap(values)
    spread = 1.96 * values[:, 0].std() / math.sqrt(400)  # of the mean, by the central limit theorem
    assert found["value"] == pytest.approx(values[:, 0].mean())
    assert found["low"] == pytest.approx(found["value"] - spread, abs=0.03)
    assert found["high"] == pytest.approx(found["value"] + spread, abs=0.03)
    draws = np.random.default_rng(0).integers(400, size=(1000, 400))  # the same stream in one call
    ratios = values[draws, 0].mean(1) / values[draws, 1].mean(1)
    found = tool.bootstrap(values, lambda mean: mean[0] / mean[1])
    assert [found["low"], found["high"]] == pytest.approx(np.percentile(ratios, [2.5, 97.5]))


def test_pictures_of_a_prompt_are_resampled_together(tool):
    class Run:
        prompts = ["a", "b"]
        args = type("args", (), {"images_per_prompt": 3})

    means = tool.prompt_means(Run, np.array([1.0, 2, 3, 10, 20, 30]))
    assert means.tolist() == [[2], [20]]


def test_psnr_and_edges(tool):
    """By hand, and as a training script has them in validation."""
    a, b = random_pictures(2, 12)
    x, y = (np.asarray(image).astype(float) / 255 for image in (a, b))
    psnr, shared, edges = tool.compare_pair(a, b)
    assert psnr == pytest.approx(-10 * math.log10(np.mean((x - y) ** 2)), rel=1e-5)
    for found, z in ((shared, x), (edges, y)):
        rows, columns = (z[1:] - z[:-1]) * (y[1:] - y[:-1]), (z[:, 1:] - z[:, :-1]) * (y[:, 1:] - y[:, :-1])
        assert found == pytest.approx(rows.mean() + columns.mean(), rel=1e-4, abs=1e-6)
    assert tool.compare_pair(a, a)[0] == pytest.approx(100)
    tensors = [torch.from_numpy(z).permute(2, 0, 1)[None].float() for z in (x, y)]
    in_training = get_script(SCRIPT.stem).compare_pairs(*(255 * z for z in tensors))[0].tolist()
    assert in_training == pytest.approx([psnr, shared, edges], rel=1e-4, abs=1e-6)


@torch.no_grad()
def test_clip_score_and_pick_score(tool, clip):
    """By hand: towers, projections, cosine; PickScore has the temperature."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    images, texts = random_pictures(3), ["a fox", "two", "three cats and a dog in the very deep snow"]
    model, tokenizer = CLIPModel.from_pretrained(clip), CLIPTokenizer.from_pretrained(clip)
    ids = [tokenizer(text, truncation=True, max_length=16, return_tensors="pt").input_ids for text in texts]
    text = torch.cat([model.text_projection(model.text_model(row).pooler_output) for row in ids])
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(images=images, return_tensors="pt").pixel_values
    image = model.visual_projection(model.vision_model(pixels).pooler_output)
    cosine = (image * text).sum(1) / image.norm(dim=1) / text.norm(dim=1)
    torch.testing.assert_close(tool.load_clip(str(clip), "cpu")(images, texts)[:, 0], cosine)
    pick = tool.load_clip(str(clip), "cpu", is_pick=True)(images, texts)[:, 0]
    torch.testing.assert_close(pick, cosine * model.logit_scale.exp() / 100)
    prefixed = tool.load_clip(str(clip), "cpu", prefix="a photo depicts ")(images, texts)[:, 0]
    plain = tool.load_clip(str(clip), "cpu")(images, [f"a photo depicts {text}" for text in texts])[:, 0]
    torch.testing.assert_close(prefixed, plain)


@torch.no_grad()
def test_vision_models(tool, clip, tmp_path):
    from transformers import BitImageProcessorPil, CLIPImageProcessorPil, CLIPModel, Dinov2Config, Dinov2Model

    images = random_pictures(3)
    pixels = CLIPImageProcessorPil.from_pretrained(clip)(images=images, return_tensors="pt").pixel_values
    model = CLIPModel.from_pretrained(clip)
    expected = model.visual_projection(model.vision_model(pixels).pooler_output)
    torch.testing.assert_close(tool.load_vision_model(str(clip), "cpu")(images, None), expected)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4)
    dino = Dinov2Model(config)
    dino.save_pretrained(tmp_path)
    processor = BitImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor.save_pretrained(tmp_path)
    hidden = dino.eval()(processor(images=images, return_tensors="pt").pixel_values).last_hidden_state
    torch.testing.assert_close(tool.load_vision_model(str(tmp_path), "cpu")(images, None), hidden[:, 0])


@torch.no_grad()
def test_vae_statistics(tool, tiny):
    from diffusers import AutoencoderKL

    images, encoder = random_pictures(3), AutoencoderKL.from_pretrained(tiny, subfolder="vae").encoder
    pixels = torch.tensor(np.stack([np.asarray(image) / 127.5 - 1 for image in images])).float()
    x = encoder.conv_in(pixels.permute(0, 3, 1, 2))
    expected = []
    for block in (*encoder.down_blocks, encoder.mid_block):
        x = block(x)
        expected += [x.mean(dim=(2, 3)), x.std(dim=(2, 3))]
    torch.testing.assert_close(tool.load_vae_statistics(tiny, "cpu")(images, None), torch.cat(expected, 1))


def test_principal_components(tool):
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(100, 6)) * [1, 10, 100, 1, 1, 1] + 5
    reference[:, 1] = reference[:, 2] * 3  # correlated
    project = tool.principal_components(reference, 2)
    found, standard = project(reference), (reference - reference.mean(0)) / reference.std(0)
    values = np.sort(np.linalg.eigvalsh(np.cov(standard, rowvar=False)))[::-1]
    assert found.var(axis=0, ddof=1) == pytest.approx(values[:2], rel=1e-6)
    assert tool.principal_components(reference[:5], 32)(reference).shape == (100, 4)


@pytest.mark.parametrize("name", ["cleanfid", "torch_fidelity"])
def test_inception(tool, name, monkeypatch):
    """The libraries' own classes with random weights: what they are shown, and the shape of what they say."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed (requirements-eval.txt; it needs torchvision)")
    if name == "torch_fidelity":
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Extractor

        module = sys.modules[Extractor.__module__]
        monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        monkeypatch.setattr(Extractor, "load_state_dict", lambda *_, **__: None)
        found = tool.load_torch_fidelity("cpu")(random_pictures(2, 40), None)
    else:
        layers = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d((1, 1)), torch.nn.Conv2d(3, 2048, 1))
        base = torch.nn.Module()
        base.layers = layers
        monkeypatch.setattr("cleanfid.inception_torchscript.check_download_inception", lambda **_: None)
        monkeypatch.setattr("torch.jit.load", lambda *_: base)
        images = random_pictures(2, 40)
        found = tool.load_clean_fid("cpu")(images, None)
        resized = [image.resize((299, 299), Image.Resampling.BICUBIC) for image in images]
        flat = np.stack([np.asarray(image).mean((0, 1)) for image in resized])
        expected = layers[1](torch.tensor((flat - 128) / 128).float()[:, :, None, None])[:, :, 0, 0]
        torch.testing.assert_close(found, expected, atol=0.01, rtol=0.01)
    assert found.shape == (2, 2048) and found.isfinite().all()


# ---------------------------------------------------------------------------------------------------------- whole runs
def test_fidelity(tool, tiny, prompts, tmp_path):
    """The table on tiny models, its figures from the pictures on disk, counted evaluations, and the report's words."""
    rows = tmp_path / "rows.yaml"
    rows.write_text(f"- {{name: student, model: {tiny}, steps: [1, 2], guidance_scale: 1, scheduler: LCMScheduler}}")
    report = evaluate(tool, *flags(tiny, prompts, tmp_path / "out", "--images_per_prompt", "2", "--rows", rows))
    labels = [row["label"] for row in report["rows"]]
    assert labels == ["teacher, 3 steps", "teacher, other noise, 3 steps", "teacher, 1 step", "teacher, 2 steps",
                      "student, 1 step", "student, 2 steps"]  # fmt: skip
    assert [row["speed"]["evaluations"] for row in report["rows"]] == [6, 6, 2, 4, 1, 2]  # guidance doubles them
    folder = tmp_path / "out" / "pictures"
    student, teacher = ([Image.open(path) for path in sorted((folder / name).glob("*.png"))]
                        for name in ("student-2", "teacher-3"))  # fmt: skip
    psnr, shared, edges = np.mean(list(map(tool.compare_pair, student, teacher)), axis=0)
    figures = report["rows"][5]["figures"]
    assert figures["PSNR, dB"]["value"] == pytest.approx(psnr)
    assert figures["PSNR, dB"]["low"] < psnr < figures["PSNR, dB"]["high"]
    assert figures["edges"]["value"] == pytest.approx(shared / edges)
    look = tool.load_vae_statistics(tiny, "cpu")
    with torch.no_grad():
        a, b = (look(images, None).double().numpy() for images in (student, teacher))
    project = tool.principal_components(b)
    assert figures["FD (vae)"]["value"] == pytest.approx(tool.frechet_distance(project(a), project(b)), rel=1e-3)
    assert report["rows"][0]["figures"] == {}  # the reference itself
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"| {figures['FD (vae)']['value']:.3f} |" in text and "| FD (vae) ↓, n = 12 |" in text
    assert "6 prompts × 2 = 12 pictures" in text and "| student | 2 | 2 | 1 |" in text
    assert "12 pictures are too few for 11 features" in text and "None beside these" in text


def test_noise_is_the_same_in_every_row_and_batch(tool, tiny, prompts, tmp_path):
    """Two rows of one model draw the same pictures, whatever the batch; the floor does not; nor do other seeds."""
    row = ["--row", "name=again", f"model={tiny}", "steps=3", "guidance_scale=2", "scheduler=LCMScheduler"]
    teacher = [tiny, "scheduler=LCMScheduler"]  # it draws noise between its steps, too
    for name, more in {"a": [], "b": ["--batch_size", "5"], "c": ["--seed", "1"]}.items():
        evaluate(tool, "--teacher", *teacher, *flags(tiny, prompts, tmp_path / name, *row, *more)[2:])

    def load(run, folder):
        paths = sorted((tmp_path / run / "pictures" / folder).glob("*.png"))
        return np.stack([np.asarray(Image.open(path)).astype(int) for path in paths])

    assert (load("a", "again-3") == load("a", "teacher-3")).all()
    assert np.abs(load("a", "teacher-3") - load("b", "teacher-3")).max() <= 1
    for other in (load("a", "teacher-other-noise-3"), load("c", "teacher-3")):
        assert np.abs(load("a", "teacher-3") - other).mean() > 5
    assert len({picture.tobytes() for picture in load("a", "teacher-3")}) == 6


def test_a_row_added_later_changes_no_other(tool, tiny, prompts, tmp_path):
    row = ["--row", "name=one", f"model={tiny}", "steps=2", "guidance_scale=1"]
    first = evaluate(tool, *flags(tiny, prompts, tmp_path, *row))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png") if path.parent != tmp_path}
    added = ["--row", "name=two", f"model={tiny}", "steps=1", "guidance_scale=1", "scheduler=LCMScheduler"]
    second = evaluate(tool, *flags(tiny, prompts, tmp_path, *added, *row))
    kept = [row for row in second["rows"] if row["name"] != "two" and row["label"] != "teacher, 1 step"]
    assert kept == first["rows"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_resume_after_kill(tool, tiny, prompts, trainings, tmp_path):
    """kill -9 in the middle of the drawing; the same command ends in the report of an uninterrupted run."""
    models = f"model={trainings[0]},{trainings[1]}"
    row = ["--row", "name=one", models, "steps=1,2", "guidance_scale=1", "scheduler=LCMScheduler"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, str(TOOL), *map(str, flags(tiny, prompts, killed, *row, "--images_per_prompt", "8"))]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 300
    while len(read_pictures(killed)) < 30 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    assert 30 <= len(read_pictures(killed)) < 8 * 48
    temporary = killed / "pictures" / "one-1" / "tmp-1-00000-0.png"  # what a kill in mid-write leaves
    temporary.write_bytes(b"half")
    with (killed / "pictures" / "teacher-3" / "times-0.jsonl").open("a") as stream:
        stream.write('{"pictures": 4, "sec')
    row += ["--images_per_prompt", "8"]
    reports = [evaluate(tool, *flags(tiny, prompts, output, *row)) for output in (killed, whole)]
    temporary.unlink()
    assert without_speed(reports[0]) == without_speed(reports[1])
    pictures = [read_pictures(output / "pictures") for output in (killed, whole)]
    assert pictures[0].keys() == pictures[1].keys() and len(pictures[0]) == 8 * 48


def test_two_processes_equal_one(tool, tiny, prompts, trainings, tmp_path):
    row = ["--row", "name=one", f"model={trainings[0]},{trainings[1]}", "steps=1,2", "guidance_scale=1"]
    run = run_script(flags(tiny, prompts, tmp_path / "two", *row), processes=2, script=TOOL, timeout=600)
    assert run.returncode == 0, run.stderr
    assert len(list((tmp_path / "two").rglob("times-*.jsonl"))) == 16  # eight rows, a file of each process
    one = evaluate(tool, *flags(tiny, prompts, tmp_path / "one", *row))
    assert without_speed(json.loads((tmp_path / "two" / "report.json").read_text())) == without_speed(one)


@pytest.mark.parametrize("protocol", ["coco5k", "coco30k", "sdxl10k"])
def test_protocols_with_real_pictures(tool, make_teacher, prompts, references, clip, tmp_path, monkeypatch, protocol):
    """The columns of each table, on tiny models of the real ones' classes; clean-fid by a stand-in of two features."""
    seen = []

    def load(_device):
        def look(images, _prompts):
            seen.extend(image.size for image in images)
            return torch.tensor([[np.asarray(image).mean(), np.asarray(image).std()] for image in images])

        return look

    monkeypatch.setattr(tool, "load_clean_fid", load)
    pipeline = make_teacher(make_sdxl_pipeline if protocol == "sdxl10k" else make_pipeline)
    output, more = tmp_path / "out", ["vae"] if protocol == "coco5k" else []
    report = evaluate(tool, *flags(pipeline, prompts, output, "--protocol", protocol, "--references", references,
                                   "--clip_model", clip, "--pick_model", clip,
                                   "--features", "clean-fid", *more))  # fmt: skip
    columns = {"coco5k": ["FD (clean-fid)", "FD (vae)", "CLIP score", "PickScore"],
               "coco30k": ["FD (clean-fid)"], "sdxl10k": ["FD (clean-fid)", "CLIP score"]}  # fmt: skip
    assert list(report["columns"]) == columns[protocol]
    assert [row["label"] for row in report["rows"]] == ["teacher, 3 steps"]  # no floor: the reference is real
    assert set(report["rows"][0]["figures"]) == set(columns[protocol])
    assert set(seen) == {({"coco5k": 16, "coco30k": 256, "sdxl10k": 512}[protocol],) * 2}  # square
    warnings = " ".join(report["warnings"])
    assert "1 of 21 reference pictures are broken" in warnings and "prompts, here are 6" in warnings
    assert "real pictures, here are 21" in warnings
    left_out = {"coco5k": {"ImageReward"}, "coco30k": set(), "sdxl10k": {"patch FD (clean-fid)"}}
    assert set(report["left_out"]) == left_out[protocol]
    text = (output / "report.md").read_text()
    assert "Left out: they are of" in text  # figures of another number of prompts are not set beside
    if protocol == "coco5k":
        network, pictures = tool.load_clip(str(clip), "cpu"), sorted((output / "pictures" / "teacher-3").glob("*.png"))
        with torch.no_grad():
            score = 100 * network([Image.open(path) for path in pictures], PROMPTS).mean().item()
        assert report["rows"][0]["figures"]["CLIP score"]["value"] == pytest.approx(score, rel=1e-4)


def test_published_figures_and_patches(tool, tiny, prompts, tmp_path, monkeypatch):
    """With as many prompts as a protocol has, what is published stands beside. What was drawn is not drawn again."""
    looks = []

    def load(_device):
        def look(images, _prompts):
            looks.extend(images)
            return torch.tensor([[np.asarray(image).mean(), np.asarray(image).std()] for image in images])

        return look

    protocol = tool.PROTOCOLS["sdxl10k"]
    monkeypatch.setitem(tool.PROTOCOLS, "sdxl10k", tool.dataclasses.replace(protocol, prompts=6, references=4))
    monkeypatch.setattr(tool, "load_clean_fid", load)
    references, pictures = tmp_path / "real", tmp_path / "out" / "pictures" / "teacher-3"
    for folder, count in ((references, 4), (pictures, 6)):
        folder.mkdir(parents=True)
        for index, image in enumerate(random_pictures(count, 301, seed=count)):
            image.save(folder / f"{index:05}-0.png")
    report = evaluate(tool, *flags(tiny, prompts, tmp_path / "out", "--protocol", "sdxl10k", "--references", references,
                                   "--features", "clean-fid", "--clip_model", tmp_path / "nowhere"))  # fmt: skip
    assert {image.size for image in looks} == {(512, 512), (299, 299)}
    patch = np.asarray(Image.open(pictures / "00000-0.png"))[1:300, 1:300]
    assert any(np.array_equal(np.asarray(image), patch) for image in looks)
    assert set(report["rows"][0]["figures"]) == {"FD (clean-fid)", "patch FD (clean-fid)"}
    assert "cannot be loaded; give a folder" in report["left_out"]["CLIP score"]
    assert report["rows"][0]["speed"] == {}  # nothing was drawn
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| SDXL, DMD2 | 4 | 19.32 | 20.86 | 33.2 |" in text and "arXiv:2405.14867" in text


def test_protocols_hold_what_is_published(tool):
    """The figures of the papers that users compare with, in the units of the columns."""
    found = {(name, model, steps): values for name, protocol in tool.PROTOCOLS.items()
             for model, steps, values in protocol.published}  # fmt: skip
    assert found["coco30k", "SD 1.5", None] == {"fd": 8.59}
    assert found["coco5k", "SD 1.5, LCM", 4] == {"clip": 30.36, "reward": -0.37, "pick": 0.212}
    assert found["fidelity", "SD 1.5, PCM", 8] == {"fd": 5.0}
    assert all(set(values) <= set(tool.PROTOCOLS[name].figures) for (name, _, _), values in found.items())


# ------------------------------------------------------------------------------------------------ models and settings
@over([*SCRIPTS, LCM_LORA, LCM_XL])
def test_output_folders_of_the_training_scripts(tool, script, case, teacher, shards, prompts, tmp_path):
    """What a script exports is a row with name, model and steps: its scheduler, guidance scale and eta are found."""
    given = ["--max_train_steps", "1", "--validation_guidance_scale", "4"]
    given += ["--validation_eta", "0.25"] if case.name.startswith("train_tcd") else []
    run_main(script, tiny_args(teacher, shards, tmp_path / "trained", *case.flags, *given))
    report = evaluate(tool, *flags(teacher, prompts, tmp_path / "out", "--num_prompts", "2", "--row", "name=student",
                                   f"model={tmp_path / 'trained'}", "steps=2"))  # fmt: skip
    row = report["rows"][-1]
    assert row["guidance_scale"] == (4 if case.embeds_w and not case.is_lora else 1)
    assert row["eta"] == (0.25 if case.name.startswith("train_tcd") else 0)
    assert row["speed"]["evaluations"] == 2  # without the unconditional half
    assert row["model"] == str(teacher if case.is_lora else tmp_path / "trained")
    run = type("run", (), {"dtype": "float32", "state": type("state", (), {"device": torch.device("cpu")})})
    rows = tool.make_rows({"name": "again", "model": str(tmp_path / "trained"), "steps": "1"})
    pipe = tool.load_pipeline(rows[0], run)
    assert type(pipe.scheduler).__name__ == case.scheduler
    assert bool(getattr(pipe.unet, "peft_config", None)) == case.is_lora
    config = json.loads((tmp_path / "trained" / "scheduler" / "scheduler_config.json").read_text())
    assert pipe.scheduler.config.original_inference_steps == config["original_inference_steps"] == 10


def test_settings_of_a_model_card(tool, tmp_path):
    """Without args.json, as on the hub, the example of the model card tells, below what the command line says."""
    call = "image = pipe(prompt, num_inference_steps=4, guidance_scale=1, eta=0.3).images[0]"
    (tmp_path / "README.md").write_text(f"# LoRA\n```python\n{call}\n```\nuse guidance_scale=9 if you must\n")
    assert tool.trained_settings(str(tmp_path), True) == {"guidance_scale": 1, "eta": 0.3}
    assert tool.trained_settings(str(tmp_path / "nowhere"), True) == {}
    (tmp_path / "model_index.json").write_text("{}")
    row = {"name": "a", "model": str(tmp_path), "steps": 4, "eta": "0.1", "scheduler.timestep_spacing": "trailing"}
    (found,) = tool.make_rows(row)
    assert (found.guidance_scale, found.eta, found.scheduler_options) == (1, 0.1, (("timestep_spacing", "trailing"),))
    given = '{"validation_guidance_scale": 3, "validation_student_guidance_scale": 2}'
    (tmp_path / "args.json").write_text(given)  # of a student that its user guides
    assert tool.trained_settings(str(tmp_path), True) == {"guidance_scale": 2, "eta": 0}


def test_lora_over_any_base(tool, make_teacher, prompts, shards, tmp_path):
    """A LoRA by model= and lora=, with a scheduler by name and an option of it."""
    teacher, name = make_teacher(make_pipeline), "train_tcd_distill_lora_sd_wds"
    run_main(get_script(name), tiny_args(teacher, shards, tmp_path / "lora", *SCRIPTS[name].flags))
    row = ["--row", "name=lora", f"model={teacher}", f"lora={tmp_path / 'lora'}", "steps=2", "guidance_scale=1",
           "eta=1", "scheduler=TCDScheduler", "scheduler.timestep_spacing=trailing",
           "weight_name=pytorch_lora_weights_online.safetensors"]  # fmt: skip
    report = evaluate(tool, *flags(teacher, prompts, tmp_path / "out", *row))
    found = report["rows"][-1]
    assert (found["weight_name"], found["eta"]) == ("pytorch_lora_weights_online.safetensors", 1)
    assert found["scheduler_options"] == [["timestep_spacing", "trailing"]]
    assert "scheduler_from" not in found


def test_pipelines_get_what_they_take(tool):
    """guidance_scale, eta and sizes go to pipelines that have them; every picture has a generator of its own."""
    given = {}

    class Full:
        def __call__(self, prompt, num_inference_steps, generator, guidance_scale=9, eta=0.5, height=1, width=1):
            given.update(locals())
            return type("output", (), {"images": []})

    class Bare:
        def __call__(self, prompt, num_inference_steps, generator):
            return Full()(prompt, num_inference_steps, generator)

    run = type("run", (), {"args": type("args", (), {"resolution": 32, "seed": 0}), "prompts": ["a", "b"]})
    row = tool.Row("name", "model", 4, guidance_scale=2.0, eta=0.25)
    tool.call_pipeline(Full(), row, [(1, 0), (0, 3)], run, 4)
    seeds = [generator.initial_seed() for generator in given["generator"]]
    assert given["prompt"] == ["b", "a"] and len(set(seeds)) == 2
    assert [given[key] for key in ("guidance_scale", "eta", "height", "width")] == [2.0, 0.25, 32, 32]
    tool.call_pipeline(Bare(), row, [(0, 3)], run, 2)
    assert given["generator"][0].initial_seed() == seeds[1] and (given["eta"], given["num_inference_steps"]) == (0.5, 2)


def test_networks_of_any_name_are_counted(tool):
    """Nothing is special to U-Nets: a transformer's calls count, by name or by place of the argument."""
    counts, module = {"evaluations": 0}, torch.nn.Identity()
    pipe = type("pipe", (), {"transformer": module})
    tool.count_evaluations(pipe, counts)
    module(torch.zeros(3, 2))
    module(input=torch.zeros(2, 2))
    assert counts["evaluations"] == 5


# ------------------------------------------------------------------------------------------------------------- sources
def test_prompts_of_coco(tool, tmp_path):
    content = {"images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(30, 0, -1)],
               "annotations": [{"id": 5 * i + k, "image_id": i, "caption": f" picture {i},\n caption {k}"}
                               for i in range(30, 0, -1) for k in range(5)]}  # fmt: skip
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    paths[0].write_text(json.dumps(content))
    content = {key: list(reversed(value)) for key, value in content.items()}
    paths[1].write_text(json.dumps(content))
    found = [tool.read_coco_captions(path) for path in paths]
    assert found[0] == found[1]  # whatever the order in the file
    assert all(re.fullmatch(r"picture \d+, caption \d", text) for text, _ in found[0])
    numbers = [int(text.split()[1].strip(",")) for text, _ in found[0]]
    assert sorted(numbers) == list(range(1, 31)) and numbers != sorted(numbers)
    assert len({text[-1] for text, _ in found[0]}) > 2
    assert [name for _, name in found[0]] == [f"{number}.jpg" for number in numbers]
    for number in (numbers[0], numbers[1], numbers[7]):
        (tmp_path / f"{number}.jpg").write_bytes(image_bytes(number))
    args = tool.parse_args(["--prompts", str(paths[0]), "--num_prompts", "5", "--output_dir", "o", "--teacher", "t"])
    prompts, described, kinds = tool.read_prompts(args)
    assert kinds == {}
    assert prompts == [text for text, _ in found[0][:5]]
    pictures = tool.find_references([str(tmp_path)], tmp_path / "cache", described)  # those that the prompts describe
    assert {Path(path).name for path, _, _ in pictures.places} == {f"{number}.jpg" for number in numbers[:2]}
    with pytest.raises(SystemExit, match="no picture of --prompts in there"):
        tool.find_references([str(tmp_path)], tmp_path / "cache", {"other.jpg"})


def test_prompts_and_references_of_shards(tool, tmp_path):
    for shard in range(2):
        members = []
        for index in range(3):
            key = f"{shard}{index}"
            info = json.dumps({"caption": [f"json {key}", "b"]}).encode()
            members += [(f"{key}.png", image_bytes(int(key))), (f"{key}.json", info)]
            members += [(f"{key}.txt", f"text {key}\n".encode())] if index else []
        write_shard(tmp_path / f"{shard:05}.tar", [*members, ("x.json", b"[1"), ("y.json", b"[1]")])
    source = str(tmp_path / "{00000..00001}.tar")
    assert tool.read_shard_captions(source) == ["json 00", "text 01", "text 02", "json 10", "text 11", "text 12"]
    pictures = tool.find_references([source], tmp_path / "cache")
    assert len(pictures.places) == 6
    expected = Image.open(io.BytesIO(image_bytes(12))).convert("RGB")
    assert pictures.load(5).tobytes() == expected.tobytes()


def test_reference_pictures_are_made_square(tool):
    image = Image.new("RGB", (40, 20), "red")
    image.paste("blue", (10, 0, 30, 20))
    assert tool.square(image, 20).getcolors() == [(400, (0, 0, 255))]
    assert tool.square(image, 10).size == (10, 10)


# -------------------------------------------------------------------------------------------------------------- errors
@pytest.fixture
def broken_lora(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    return tmp_path / "lora"


ERRORS = {
    "name=a model={tmp}/nowhere steps=1": "row a: there is no folder {tmp}/nowhere",
    "name=a model={tmp} steps=1": "row a: {tmp} holds neither a pipeline",
    "name=a model={tiny} steps=1": "row a: {tiny} does not say which guidance scale it is meant for: give guidance_",
    "name=a model={tiny} steps=0 guidance_scale=1": "row a: steps must be 1 or more",
    "name=a model={tiny} steps=x guidance_scale=1": "row a: invalid literal",
    "name=a model={tiny} steps=1 guidance=1": "row a: unknown key guidance; there are",
    "name=a model={tiny} steps=1 guidance_scale=1 scheduler=Nope": "row a: diffusers has no scheduler Nope",
    "name=teacher model={tiny} steps=3 guidance_scale=1": "two rows are called teacher, 3 steps",
    "model={tiny} steps=1": "name, model and steps are needed",
    "lcm": "--row lcm is no KEY=VALUE",
    "name=a model={tmp}/lora steps=1": "row a: {tmp}/lora is a LoRA, and no args.json there names its base",
    "name=a model={tiny} lora={tmp}/lora steps=1 guidance_scale=1": "names no scheduler: give scheduler=LCMScheduler",
    "name=a model={tiny} lora={tmp}/lora steps=1 guidance_scale=1 scheduler=LCMScheduler": "cannot be loaded",
    "name=a model=some/model-of-the-hub steps=1 guidance_scale=1": "row a: some/model-of-the-hub cannot be loaded",
    "name=a model={tiny},{tmp}/seed2 steps=1 guidance_scale=1": "row a: there is no folder {tmp}/seed2",
    "name=a model={tiny},{tiny} lora=a,b,c steps=1": "row a: model must be one, or as many as there are training seeds",
}


@pytest.mark.parametrize("row", ERRORS)
def test_errors_of_rows(tool, tiny, prompts, tmp_path, broken_lora, row):
    assert broken_lora.is_dir()
    given = row.format(tiny=tiny, tmp=tmp_path).split()
    with pytest.raises(SystemExit) as caught:
        evaluate(tool, *flags(tiny, prompts, tmp_path / "out", "--num_prompts", "1", "--row", *given))
    message = str(caught.value)
    assert message.startswith("error: ") and "\n" not in message
    assert ERRORS[row].format(tiny=tiny, tmp=tmp_path) in message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--prompts {tmp}/no.txt", "--prompts {tmp}/no.txt cannot be read"),
        ("--num_prompts 7", "--prompts holds 6 prompts, and 7 are wanted"),
        ("--prompts {tmp}/coco.json", "--prompts {tmp}/coco.json holds no captions as captions_val2014.json"),
        ("--prompts {tmp}/no.tar", "{tmp}/no.tar cannot be read as a local, uncompressed tar"),
        ("--rows {tmp}/coco.json", "--rows {tmp}/coco.json holds no list of rows"),
        ("--protocol coco5k --references {tmp}/none", "--references {tmp}/none is neither a folder nor a .tar"),
        ("--protocol coco5k --references {tmp}/empty", "--references {tmp}/empty: no jpg, jpeg, png, webp in there"),
    ],
)
def test_errors_of_sources(tool, tiny, prompts, tmp_path, given, message):
    (tmp_path / "coco.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    given = given.format(tmp=tmp_path).split()
    with pytest.raises(SystemExit) as caught:
        evaluate(tool, *flags(tiny, prompts, tmp_path / "out", "--no_floor", "--teacher_steps", "1", *given))
    assert str(caught.value).startswith("error: " + message.format(tmp=tmp_path))


def test_commands_and_rows_of_the_docs(tool, monkeypatch):
    """What docs/evaluation.md prints is understood, as far as that goes without the hub."""
    from test_docs import blocks, programs

    monkeypatch.setattr(tool, "complete_row", lambda row: {"guidance_scale": 1, **row})
    commands = [words for script, *words in programs("docs/evaluation.md") if script == "tools/evaluate.py"]
    assert len(commands) == 3
    for words in commands:
        args = tool.parse_args(words)
        rows, left_out = tool.list_rows(args)
        assert not left_out and {row.name for row in rows} > {"teacher"}
    (text,) = blocks("docs/evaluation.md", "yaml")
    rows = [made for row in tool.yaml.safe_load(text) for made in tool.make_students(row, False, {})]
    labels = ["ours, 1 step", "TCD-LoRA, 4 steps", "without guidance, 50 steps", "CT, 1 step"]
    lines = tool.group_rows(tool.add_references(rows, True))
    assert set(labels) < {line[0].label for line in lines}
    assert [len(line) for line in lines if line[0].name == "CT"] == [3, 3]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "--protocol fidelity compares with a teacher: give --teacher"),
        ("--protocol coco5k", "compares with real pictures: give --references"),
        ("--protocol coco5k --references . --features vae", "--features vae is the teacher's VAE: give --teacher"),
        ("--num_prompts 0", "0 is below 1"),
    ],
)
def test_errors_of_flags(tool, capsys, given, message):
    with pytest.raises(SystemExit):
        tool.parse_args(["--prompts", "p.txt", "--output_dir", "o", *given.split()])
    assert message in capsys.readouterr().err


def test_pictures_of_other_settings_are_not_mixed(tool, tiny, prompts, tmp_path):
    given = flags(tiny, prompts, tmp_path / "out", "--no_floor")
    evaluate(tool, *given)
    with pytest.raises(SystemExit, match=r"begun with seed 0, not 1: give another folder"):
        evaluate(tool, *given, "--seed", "1")
    with pytest.raises(SystemExit, match=r"drawn with guidance_scale 2.0, not 3.0"):
        evaluate(tool, *given, "--guidance_scale", "3")
    other = tmp_path / "other.txt"
    other.write_text("\n".join([*PROMPTS[:-1], "something else"]))
    with pytest.raises(SystemExit, match="begun with other --prompts"):
        evaluate(tool, *given, "--prompts", other)
    other.write_text("\n".join([*PROMPTS, "one more"]))  # more of the same are welcome
    assert evaluate(tool, *given, "--prompts", other)["prompts"] == 7
    copy = shutil.copytree(tiny, tmp_path / "copy")
    moved = flags(str(copy), prompts, tmp_path / "retrained", "--no_floor")
    evaluate(tool, *moved)
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    with pytest.raises(SystemExit, match="was drawn with weights"):  # trained again into the same folder
        evaluate(tool, *moved)


def test_sizes_must_agree(tool, make_teacher, prompts, tmp_path):
    small = make_teacher(make_pipeline)
    copy = shutil.copytree(small, tmp_path / "large")
    config = json.loads((copy / "unet" / "config.json").read_text())
    (copy / "unet" / "config.json").write_text(json.dumps(config | {"sample_size": 12}))
    row = ["--row", "name=large", f"model={copy}", "steps=1", "guidance_scale=1"]
    given = flags(small, prompts, tmp_path / "out", "--no_floor", *row)
    with pytest.raises(SystemExit, match=r"16x16 \(teacher, 3 steps\), 24x24 \(large, 1 step\); give --resolution"):
        evaluate(tool, *given)
    report = evaluate(tool, *given, "--resolution", "24", "--output_dir", tmp_path / "same")
    with pytest.raises(SystemExit, match=r"row teacher, 3 steps cannot be drawn: `height` and `width` have to be"):
        evaluate(tool, *given, "--resolution", "20", "--output_dir", tmp_path / "odd")
    assert "PSNR, dB" in report["rows"][-1]["figures"]


def test_missing_weights_are_not_replaced_by_random_ones(tool, clip, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(clip, tmp_path / "clip")
    tensors = load_file(copy / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(tool.Missing, match=r"lacks 1 weights of a CLIPModel: visual_projection.weight"):
        tool.load_clip(str(copy), "cpu")


# ------------------------------------------------------------------------------------------------------ training seeds
def test_training_seeds_share_a_row(tool, tiny, prompts, trainings, tmp_path):
    """Mean, standard deviation and interval over prompts against numpy, from rows of the single models."""
    rows = [{"name": "a", "model": trainings, "steps": [1, 2], "guidance_scale": 1}]
    rows += [
        {"name": f"a{k}", "model": model, "steps": "1,2", "guidance_scale": 1} for k, model in enumerate(trainings)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    given = flags(tiny, prompts, tmp_path / "out", "--rows", tmp_path / "rows.json", "--images_per_prompt", "2")
    report = evaluate(tool, *given)
    figures = {row["label"]: row["figures"] for row in report["rows"]}
    assert [row["model"] for row in report["rows"] if row["label"] == "a, 2 steps"] == [trainings]
    for title in report["columns"]:
        single = [figures[f"a{k}, 2 steps"][title]["value"] for k in range(3)]
        found = figures["a, 2 steps"][title]
        assert len(set(single)) == 3 and found["single"] == pytest.approx(single)
        assert [found["value"], found["spread"]] == pytest.approx([np.mean(single), np.std(single, ddof=1)])
    folder = tmp_path / "out" / "pictures"
    names = ("teacher-3", "a-2", "a-2-training-2", "a-2-training-3")
    sets = [[Image.open(path) for path in sorted((folder / name).glob("*.png"))] for name in names]
    psnr = np.mean([[tool.compare_pair(*pair)[0] for pair in zip(each, sets[0], strict=True)] for each in sets[1:]], 0)
    draws = np.random.default_rng(0).integers(6, size=(1000, 6))
    interval = np.percentile(psnr.reshape(6, 2).mean(1)[draws].mean(1), [2.5, 97.5])
    found = figures["a, 2 steps"]["PSNR, dB"]
    assert [found["low"], found["high"]] == pytest.approx(interval)
    text = (tmp_path / "out" / "report.md").read_text()
    cell = "{value:.2f} ± {spread:.2f} ({low:.2f} … {high:.2f})".format(**found)
    assert f"| a (3 training seeds) | 2 | 2 | 1 | – | {cell} |" in text and "mean ± standard deviation" in text
    # one that was drawn alone is not drawn again when others join it
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png") if path.parent.name == "a0-2"}
    row = f"- {{name: a0, model: [{trainings[0]}, {trainings[1]}], steps: [2], guidance_scale: 1}}"
    (tmp_path / "rows.yaml").write_text(row)
    report = evaluate(tool, *given, "--rows", tmp_path / "rows.yaml")
    expected = [figures[f"a{k}, 2 steps"]["PSNR, dB"]["value"] for k in range(2)]
    assert report["rows"][-1]["figures"]["PSNR, dB"]["single"] == pytest.approx(expected)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_missing_training_seeds(tool, tiny, prompts, trainings, tmp_path):
    """They are an error that names them; with --skip_missing the row goes on with the others and says how many."""
    gone = str(tmp_path / "gone")
    row = ["--row", "name=a", f"model={gone},{trainings[1]},{trainings[2]}", "steps=1", "guidance_scale=1"]
    given = flags(tiny, prompts, tmp_path / "out", "--no_floor", "--num_prompts", "2", *row)
    with pytest.raises(SystemExit, match=f"error: row a: there is no folder {gone}"):
        evaluate(tool, *given)
    report = evaluate(tool, *given, "--skip_missing")
    assert report["left_out"] == {"row a, 1 of 3 training seeds": f"there is no model in {gone}"}
    assert (
        report["rows"][-1]["model"] == trainings[1:] and len(report["rows"][-1]["figures"]["PSNR, dB"]["single"]) == 2
    )
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| a (2 training seeds) |" in text and "**row a, 1 of 3 training seeds** is left out" in text
    shutil.copytree(trainings[0], gone)  # it is there now: the others' pictures stay
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png") if "training" in path.parent.name}
    assert len(evaluate(tool, *given)["rows"][-1]["figures"]["PSNR, dB"]["single"]) == 3
    assert len(before) == 4 and {path: path.stat().st_mtime_ns for path in before} == before


def test_training_seeds_have_one_recipe(tool, trainings, tmp_path):
    other = shutil.copytree(trainings[0], tmp_path / "other")
    (other / "README.md").write_text("pipe(prompt, guidance_scale=7)")
    row = {"name": "a", "model": [trainings[1], str(other)], "steps": 1}
    (Path(trainings[1]) / "README.md").write_text("pipe(prompt, guidance_scale=1)")
    with pytest.raises(SystemExit, match=r"no training seeds of one recipe: guidance_scale is 1\.0 and 7\.0"):
        tool.make_students(row, False, {})
    assert [made.member for made in tool.make_students(row | {"guidance_scale": 1, "steps": "1,2"}, False, {})] == [
        1,
        1,
        2,
        2,
    ]


# ------------------------------------------------------------------------------------------------------ kinds of prompt
@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["d/test_full.txt", "d/test_un-styled.txt", "d/test_full.txt"], {"full": [0, 2], "un-styled": [1]}),
        (["a/p.txt", "b/p.txt"], {"a/p.txt": [0], "b/p.txt": [1]}),
        (["test.txt", "test_b.txt"], {"test": [0], "test_b": [1]}),
        (["a.txt", "a.txt"], {}),
    ],
)
def test_names_of_kinds(tool, sources, names):
    assert {name: numbers.tolist() for name, numbers in tool.name_kinds(sources).items()} == names


def test_figures_by_kind_of_prompt(tool, tiny, clip, prompts, references, trainings, tmp_path):
    """Every source of prompts has figures of its own: those of an evaluation of that source, but for the axes of FD."""
    other = tmp_path / "prompts_b.txt"
    other.write_text("\n".join(["deep", "blue"] * 18))
    row = ["--row", "name=a", f"model={trainings[0]},{trainings[1]}", "steps=1", "guidance_scale=1"]
    row += ["--images_per_prompt", "2"]
    given = flags(tiny, prompts, tmp_path / "out", "--prompts", prompts, other, *row)
    report = evaluate(tool, *given)
    found = report["rows"][-1]
    assert list(found["kinds"]) == ["prompts", "prompts_b"]
    single = evaluate(tool, *flags(tiny, prompts, tmp_path / "one", *row))["rows"][-1]["figures"]  # the first source
    for title in ("PSNR, dB", "edges"):
        for key in ("value", "low", "high", "spread"):
            assert found["kinds"]["prompts"][title][key] == pytest.approx(single[title][key], rel=1e-3)
    sets = [[Image.open(path) for path in sorted((tmp_path / "out" / "pictures" / name).glob("*.png"))]
            for name in ("teacher-3", "a-1", "a-1-training-2")]  # fmt: skip
    look = tool.load_vae_statistics(tiny, "cpu")
    with torch.no_grad():
        features = [look(images, None).double().numpy() for images in sets]
    project = tool.principal_components(features[0])
    expected = [tool.frechet_distance(project(each)[12:], project(features[0])[12:]) for each in features[1:]]
    assert found["kinds"]["prompts_b"]["FD (vae)"]["single"] == pytest.approx(expected, rel=1e-3)
    assert found["kinds"]["prompts_b"]["FD (vae)"]["pictures"] == 72
    assert "FD (vae)" not in found["kinds"]["prompts"]  # 12 pictures, 11 features
    text = (tmp_path / "out" / "report.md").read_text().split("## By kind of prompt")[1]
    assert "| evaluations | model | prompts, n = 12 | prompts_b, n = 72 |" in text
    lines = [line.split(" | ")[:2] for line in text.split("### edges")[0].splitlines() if line[2:3].isdigit()]
    assert lines == [["| 1", "a (2 training seeds), 1 step"], ["| 2", "teacher, 1 step"],
                     ["| 6", "teacher, other noise, 3 steps"]]  # fmt: skip
    assert "### FD (vae) ↓, to *teacher, 3 steps*" in text
    given = [*given, "--protocol", "coco5k", "--references", references, "--clip_model", clip, "--pick_model", clip]
    report = evaluate(tool, *given, "--output_dir", tmp_path / "scores")
    for title in ("CLIP score", "PickScore"):
        parts = [report["rows"][-1]["kinds"][kind][title]["value"] for kind in ("prompts", "prompts_b")]
        assert np.average(parts, weights=[6, 36]) == pytest.approx(report["rows"][-1]["figures"][title]["value"])
        assert parts[0] != pytest.approx(parts[1], rel=1e-6)
    assert "FD (vae)" in report["rows"][-1]["figures"] and "FD (vae)" not in report["rows"][-1]["kinds"]["prompts_b"]


def test_grid(tool, tiny, prompts, tmp_path):
    """Lines of the tables below each other, without floors; prompts of all kinds; --grid_steps keeps references."""
    other = tmp_path / "prompts_b.txt"
    other.write_text("deep\nblue\n")
    row = ["--row", "name=a", f"model={tiny}", "steps=1,2", "guidance_scale=1"]
    given = flags(tiny, prompts, tmp_path / "out", "--prompts", prompts, other, "--grid_prompts", "4", *row)
    for more, names in (
        ([], ["teacher-3", "teacher-1", "teacher-2", "a-1", "a-2"]),
        (["--grid_steps", "2"], ["teacher-3", "teacher-2", "a-2"]),
    ):
        evaluate(tool, *given, *more)
        grid = Image.open(tmp_path / "out" / "grid.png")
        assert grid.size == (176 + 4 * 132, 76 + len(names) * 132)
        for y, name in enumerate(names):
            for x, prompt in enumerate((0, 1, 6, 7)):
                image = Image.open(tmp_path / "out" / "pictures" / name / f"{prompt:05}-0.png").resize((128, 128))
                place = (176 + x * 132, 76 + y * 132)
                found = np.asarray(grid.crop((*place, place[0] + 128, place[1] + 128))).astype(int)
                assert np.abs(found - np.asarray(image)).max() <= 2, (name, prompt)


def test_panels_and_ticks(tool):
    """Every line in its panel, with the spread and the floor; round numbers on the axes."""
    assert tool.find_ticks(13.8, 33.1, False) == [15, 20, 25, 30]
    assert tool.find_ticks(0.48, 1.1, False) == pytest.approx([0.6, 0.8, 1.0])
    assert tool.find_ticks(3, 320, True) == [5, 10, 20, 50, 100, 200]
    rows = [{"name": name, "stream": 0, "speed": {"evaluations": 2}, "figures": {"FD (x)": {"value": k, "spread": 0.5}}}
            for k, name in enumerate("tabcd")]  # fmt: skip
    rows[0]["figures"], rows[1]["stream"] = {}, 1
    lines = [[tool.Row(name, "m", 4, 1.0)] for name in "tabcd"]
    run = type("run", (), {"lines": lines, "groups": lambda _: {0: [1, 2, 3], 3: [4]}})()
    found = tool.find_panels(run, {"rows": rows, "columns": {"FD (x)": "fd"}}, dict(zip("tabcd", "TABCD", strict=True)))
    assert [panel[1:] for panels in found for panel in panels] == [
        ({"B": [(2, 2, 0.5)], "C": [(2, 3, 0.5)]}, 1, True),
        ({"D": [(2, 4, 0.5)]}, None, True),
    ]
    assert [panel[0] for panels in found for panel in panels] == [
        "FD (x)\nto t, 4 steps; lower is better", "FD (x)\nto c, 4 steps; lower is better"]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- references
def test_another_reference(tool, tiny, prompts, trainings, tmp_path):
    """A row can be held against another than the teacher, which then has a floor and few steps of its own."""
    plain = ["--row", "name=plain", f"model={tiny}", "steps=3", "guidance_scale=1"]
    given = [*plain, "--row", "name=a", f"model={trainings[0]}", "steps=1,2", "guidance_scale=1"]
    output = tmp_path / "out"
    report = evaluate(tool, *flags(tiny, prompts, output, *given, "reference=plain"))
    figures = {row["label"]: row["figures"] for row in report["rows"]}
    assert list(figures) == ["teacher, 3 steps", "teacher, other noise, 3 steps", "teacher, 1 step", "teacher, 2 steps",
                             "plain, 3 steps", "plain, other noise, 3 steps", "plain, 1 step", "plain, 2 steps",
                             "a, 1 step", "a, 2 steps"]  # fmt: skip
    sets = {name: [Image.open(path) for path in sorted((output / "pictures" / name).glob("*.png"))]
            for name in ("teacher-3", "plain-3", "plain-other-noise-3", "a-2")}  # fmt: skip
    look = tool.load_vae_statistics(tiny, "cpu")
    with torch.no_grad():
        features = {name: look(images, None).double().numpy() for name, images in sets.items()}
    for label, row, reference in (("plain, 3 steps", "plain-3", "teacher-3"), ("a, 2 steps", "a-2", "plain-3"),
                                  ("plain, other noise, 3 steps", "plain-other-noise-3", "plain-3")):  # fmt: skip
        psnr = np.mean([tool.compare_pair(*pair)[0] for pair in zip(sets[row], sets[reference], strict=True)])
        project = tool.principal_components(features[reference])
        fd = tool.frechet_distance(project(features[row]), project(features[reference]))
        assert figures[label]["PSNR, dB"]["value"] == pytest.approx(psnr)
        assert figures[label]["FD (vae)"]["value"] == pytest.approx(fd, rel=1e-3)
    text = (output / "report.md").read_text()
    first, second = text.split("The reference: the pictures of *")[1:]
    assert (
        first.startswith("teacher, 3 steps*; *teacher, other noise, 3 steps* is the floor") and "| plain | 3 |" in first
    )
    assert second.startswith("plain, 3 steps*") and "| a | 2 |" in second and "| a | 2 |" not in first
    # held against the teacher after all, no picture is drawn again
    before = {path: path.stat().st_mtime_ns for path in output.rglob("0*.png")}
    report = evaluate(tool, *flags(tiny, prompts, output, *given))
    assert report["rows"][-1]["figures"]["PSNR, dB"] != figures["a, 2 steps"]["PSNR, dB"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("name=a {m} steps=1 reference=b", "row a: there is no row b, which it names as its reference"),
        (
            "name=b {m} steps=1,2 --row name=a {m} steps=1 reference=b",
            "row b is the reference of others: it must be one",
        ),
        (
            "name=b model={t},{t} steps=2 guidance_scale=1 --row name=a {m} steps=1 reference=b",
            "row b is the reference",
        ),
        (
            "name=a {m} steps=1 reference=teacher --protocol coco5k --references .",
            "reference= is for protocol fidelity",
        ),
    ],
)
def test_errors_of_references(tool, tiny, prompts, tmp_path, given, message):
    given = given.replace("{m}", "model={t} guidance_scale=1").replace("{t}", str(tiny)).split()
    with pytest.raises(SystemExit, match=message):
        evaluate(tool, *flags(tiny, prompts, tmp_path / "out", "--row", *given))


# --------------------------------------------------------------------------------------------------------------- demo
@pytest.fixture(scope="module")
def drawn(tool, tmp_path_factory):
    """Pictures of the demo's teacher: 48 captions, three steps, two noises."""
    output = tmp_path_factory.mktemp("demo")
    shards = sorted((ROOT / "demo" / "shards").glob("*.tar"))
    report = evaluate(tool, "--teacher", ROOT / "demo" / "teacher", "scheduler.timestep_spacing=trailing",
                      "--teacher_steps", "3", "--guidance_scale", "1", "--prompts", *shards, "--num_prompts", "48",
                      "--features", "vae", "--batch_size", "32", "--output_dir", output)  # fmt: skip
    pictures = [Image.open(path) for path in sorted((output / "pictures" / "teacher-3").glob("*.png"))]
    look = tool.load_vae_statistics(ROOT / "demo" / "teacher", "cpu")
    with torch.no_grad():
        reference = look(pictures, None).double().numpy()
    return look, pictures, reference, report["rows"][1]["figures"]["FD (vae)"]["value"]


def noisy(image, sigma):
    rng = np.random.default_rng(0)
    return Image.fromarray(
        (np.asarray(image) + rng.normal(0, sigma, (64, 64, 3))).clip(0, 255).round().astype(np.uint8)
    )


DAMAGE = {
    "blur": (lambda image, x: image.filter(ImageFilter.GaussianBlur(x)), (0.4, 0.8, 1.5)),
    "noise": (noisy, (8, 20, 64)),
    "sharpen": (lambda image, x: ImageEnhance.Sharpness(image).enhance(x), (1.5, 2.5, 6)),
    "saturate": (lambda image, x: ImageEnhance.Color(image).enhance(x), (1.2, 1.5, 3)),
    "fade": (lambda image, x: ImageEnhance.Color(image).enhance(x), (0.8, 0.6, 0)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_features_of_the_demo_rank_as_the_eye_does(tool, drawn, damage):
    """More damage is farther from the teacher's pictures, and much of it farther than the teacher with other noise."""
    look, pictures, reference, floor = drawn
    function, strengths = DAMAGE[damage]
    with torch.no_grad():
        sets = [look([function(image, x) for image in pictures], None).double().numpy() for x in strengths]
    project = tool.principal_components(reference)
    distances = [tool.frechet_distance(project(features), project(reference)) for features in sets]
    assert all(later > 1.5 * earlier for earlier, later in zip(distances, distances[1:], strict=False)), distances
    assert distances[0] > 0 and distances[-1] > floor


def test_demo_target(tool):
    """`make demo-evaluate` names files that are there, and rows that can be read."""
    dry = subprocess.run(["make", "-n", "demo-evaluate"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    command = next(line for line in dry.replace("\\\n", " ").splitlines() if "tools/evaluate.py" in line)
    args = tool.parse_args(command.split("tools/evaluate.py")[1].split())
    rows = tool.read_rows(ROOT / args.rows)
    assert len(rows) >= 6 and all({"name", "model", "steps"} <= row.keys() for row in rows)
    made = {
        path.replace("demo", "demo/output", 1) for path in re.findall(r"demo[\w-]*", (ROOT / "Makefile").read_text())
    }
    models = {re.sub(r"-seed\d$", "", one["model"]) for row in rows for one in tool.training_seeds(row).values()}
    models = {re.sub("(?<=/output-progressive)/[124]$", "", model) for model in models}  # a folder for each stage
    assert models <= made | {args.teacher[0]} and len(models) >= 6
    assert args.skip_missing and args.protocol == "fidelity" and (ROOT / args.teacher[0]).is_dir()
    assert len(tool.read_prompts(args)[0]) * args.images_per_prompt >= 256


def test_rows_without_a_folder_are_left_out_on_request(tool, tiny, prompts, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"name": "gone", "model": str(tmp_path / "gone"), "steps": [1]}]))
    given = ["--num_prompts", "2", "--rows", rows, "--skip_missing"]
    report = evaluate(tool, *flags(tiny, prompts, tmp_path / "out", *given))
    assert report["left_out"] == {"row gone": f"there is no model in {tmp_path / 'gone'}"}
    assert [row["name"] for row in report["rows"]] == ["teacher", "teacher"]


def test_every_flag_is_read(tool):
    text = TOOL.read_text()
    args = vars(tool.parse_args(["--teacher", "t", "--prompts", "p", "--output_dir", "o"]))
    assert [name for name in args if not re.search(rf"args\.{name}\b", text)] == []
