"""The embedded demo: its files are whole, and distilling its teacher for a few seconds already shows."""

import hashlib
import json
import random
import subprocess
import tarfile
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load_script, read_metrics, run_main

DEMO = ROOT / "demo"
SHARDS = sorted((DEMO / "shards").glob("train-*.tar"))
VALIDATION = [DEMO / f"prompts_validation_{kind}.txt" for kind in ("full", "category")]
HELDOUT = {name: DEMO / "shards" / f"heldout-{name}.tar" for name in ("validation", "test")}


def read_samples(*paths):
    """Captions and picture of every sample."""
    samples = []
    for path in paths:
        with tarfile.open(path) as shard:
            content = {member.name: shard.extractfile(member).read() for member in shard}
        keys = [name.removesuffix(".json") for name in content if name.endswith(".json")]
        samples += [(json.loads(content[f"{key}.json"])["captions"], content[f"{key}.webp"]) for key in keys]
    return samples


@pytest.fixture(scope="module")
def seen():
    return read_samples(*SHARDS)


@pytest.fixture(scope="module")
def heldout():
    return {name: read_samples(path) for name, path in HELDOUT.items()}


def read_prompts(name):
    return (DEMO / f"prompts_{name}.txt").read_text(encoding="utf-8").splitlines()


def test_shards_are_those_of_make_shards():
    paths = sorted([*SHARDS, *HELDOUT.values()])
    sums = "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in paths)
    assert sums == (DEMO / "shards" / "SHA256SUMS").read_text()
    assert sum(path.stat().st_size for path in paths) < 20e6


def test_heldout_pairs_are_a_tenth_and_not_in_training(seen, heldout):
    known = {captions[0] for captions, _ in seen}
    pictures = {picture for _, picture in seen}
    pairs = [captions[0].rsplit(", ", 2) for samples in heldout.values() for captions, _ in samples]
    assert len(pairs) == (len(seen) + len(pairs)) // 10 > 600
    assert len({(name, category) for name, category, _ in pairs}) == len(pairs)  # at most one style of a name
    assert {style for *_, style in pairs} == {caption.rpartition(", ")[2] for caption in known}
    for captions, picture in (sample for samples in heldout.values() for sample in samples):
        assert captions[0] not in known and picture not in pictures
        styles = [caption for caption in known if caption.rpartition(", ")[0] == captions[1]]
        assert len(styles) >= 2  # the name itself is known


def test_prompts_come_from_where_they_say(seen, heldout):
    splits, lists = {"seen": seen, **heldout}, {}
    for name in ("seen_full", *(f"{split}_{kind}" for split in heldout for kind in ("full", "unstyled", "category"))):
        split, _, kind = name.partition("_")
        lists[name] = read_prompts(name)
        source = splits["seen" if kind == "category" else split]
        captions = {captions[("full", "unstyled", "category").index(kind)] for captions, _ in source}
        assert set(lists[name]) <= captions and len(set(lists[name])) == len(lists[name]) >= 8
    for kind in ("full", "unstyled", "category"):
        assert not set(lists[f"validation_{kind}"]) & set(lists[f"test_{kind}"])
    things = {split: {prompt.partition(", ")[0] for kind in ("full", "unstyled") for prompt in lists[f"{split}_{kind}"]}
              for split in heldout}  # fmt: skip
    assert not things["validation"] & things["test"]


SCRIPTS = {"demo": "train_cd_multiboundary", "lcm": "train_lcm_distill_sd_wds", "long": "train_lcm_distill_sd_wds",
           "tcd": "train_tcd_distill_sd_wds", "tcd-lora": "train_tcd_distill_lora_sd_wds",
           "cd4": "train_cd_multiboundary", "cd1": "train_cd_multiboundary",
           "progressive": "train_cd_multiboundary", "ct": "train_ct"}  # fmt: skip


@pytest.mark.parametrize("path", sorted(DEMO.glob("*.args")), ids=lambda path: path.name)
def test_argument_files(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    script = load_script(ROOT / f"{SCRIPTS[path.stem]}.py")
    args = script.parse_args([f"@{path}"])
    assert (ROOT / args.pretrained_teacher_model / "model_index.json").is_file()
    assert [ROOT / url for url in script.expand_shards(args.train_shards_path_or_url)] == SHARDS
    assert len(script.load_prompts(args)[0]) >= 8
    target = "demo" if path.stem == "demo" else f"demo-{path.stem}"
    dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"{script.__name__}.py @{path.relative_to(ROOT)}" in dry
    if path.stem != "progressive":  # whose stages have folders of their own
        assert args.output_dir == target.replace("demo", "demo/output", 1)
        assert f"cp {args.output_dir}/samples.png" in dry


@pytest.mark.parametrize(
    ("name", "flags", "gain"),
    [
        ("train_tcd_distill_sd_wds", "--w_min 2 --w_max 2 --learning_rate 2e-4", -0.4),
        ("train_tcd_distill_lora_sd_wds", "--w_min 2 --w_max 2 --lora_rank 32 --learning_rate 3e-3", -0.4),
        ("train_cd_multiboundary", "--guidance_scale 3 --num_boundaries 4 --learning_rate 2e-4", 0.5),
    ],
)
def test_short_distillation_of_jumps_improves_four_steps(tmp_path, name, flags, gain):
    """Sixty small steps on a grid of eight points, drawn by 4 deterministic steps.

    The features' distance to the teacher's pictures fell from 0.63 to 0.39–0.46, their edges rose from 0.39 to
    0.49–0.53; in PSNR, which likes the blurred start, CD gained 0.9 dB, TCD 0.4 and TCD-LoRA nothing.
    """
    arguments = f"""{flags}
        --resolution 64 --train_batch_size 8 --max_train_steps 60 --dataloader_num_workers 0 --mixed_precision bf16
        --num_ddim_timesteps 8 --loss_type huber --huber_c 0.03 --ema_decay 0.9 --lr_scheduler linear
        --lr_warmup_steps 5 --adam_weight_decay 0 --validation_steps 60 --validation_num_inference_steps 4
        --num_validation_images 1 --checkpointing_steps 0 --report_to none""".split()
    arguments += ["--pretrained_teacher_model", DEMO / "teacher", "--train_shards_path_or_url", *SHARDS]
    arguments += ["--validation_prompts", *VALIDATION]
    run_main(load_script(ROOT / f"{name}.py"), [*arguments, "--output_dir", tmp_path])
    fidelity = {key.removeprefix("fidelity/"): value for key, value in read_metrics(tmp_path)[-1].items()}
    assert fidelity["target_feature_distance_k4"] < 0.85 * fidelity["untrained_feature_distance_k4"]
    assert fidelity["target_edges_k4"] > fidelity["untrained_edges_k4"] + 0.05
    assert fidelity["target_psnr_k4"] > fidelity["untrained_psnr_k4"] + gain


def test_short_distillation_improves_the_pictures(lcm, tmp_path):
    """Forty small steps on a grid of four points; measured: 0.9 to 1.2 dB in two steps, 0.4 to 0.8 dB in one."""
    arguments = """
        --resolution 64 --train_batch_size 8 --max_train_steps 40 --dataloader_num_workers 0 --mixed_precision bf16
        --num_ddim_timesteps 4 --w_min 2 --w_max 2 --loss_type huber --huber_c 0.03 --ema_decay 0.95
        --learning_rate 1e-4 --lr_scheduler linear --lr_warmup_steps 5 --adam_weight_decay 0
        --validation_steps 40 --validation_num_inference_steps 1 2 --num_validation_images 1
        --checkpointing_steps 0 --report_to none""".split()
    arguments += ["--pretrained_teacher_model", DEMO / "teacher", "--train_shards_path_or_url", *SHARDS]
    arguments += ["--validation_prompts", *VALIDATION]
    run_main(lcm, [*arguments, "--output_dir", tmp_path])
    fidelity = {key.removeprefix("fidelity/"): value for key, value in read_metrics(tmp_path)[-1].items()}
    assert fidelity["target_psnr_k2"] > fidelity["untrained_psnr_k2"] + 0.3
    assert (
        fidelity["target_psnr_k1/prompts_validation_category"]
        > fidelity["untrained_psnr_k1/prompts_validation_category"]
    )
    assert fidelity["teacher_psnr_k1"] < fidelity["target_psnr_k1"]  # at half the evaluations


@pytest.fixture
def tools(monkeypatch):
    """The demo's scripts as modules, by name."""
    monkeypatch.syspath_prepend(DEMO)
    return lambda name: load_script(DEMO / f"{name}.py")


def test_split_holds_out_one_style_of_known_names(tools):
    make = tools("make_shards")
    styles = {thing: list(make.STYLES)[: 1 + thing % 4] for thing in range(40)}  # some things in one or two styles
    samples = [
        {"key": f"{thing}-{style}", "thing": thing, "style": style} for thing in styles for style in styles[thing]
    ]
    splits = make.split(samples, random.Random(0))
    heldout = splits["validation"] + splits["test"]
    assert len(heldout) == len(samples) // 10 == len({sample["thing"] for sample in heldout})
    assert abs(len(splits["validation"]) - len(splits["test"])) <= 1
    assert all(len(styles[sample["thing"]]) >= 3 for sample in heldout)
    assert sorted(sample["key"] for sample in heldout + splits["seen"]) == sorted(sample["key"] for sample in samples)
    assert make.split(samples, random.Random(0)) == splits


def test_icons_are_matched_by_code_then_by_any_known_spelling(tools):
    make = tools("make_shards")
    things = [{"name": "lady beetle", "code": "1f41e", "spellings": ["ladybeetle"]},
              {"name": "two hearts", "code": "1f495", "spellings": ["twohearts"]},
              {"name": "fog", "code": "1f32b", "spellings": ["fog"]}]  # fmt: skip
    packages = {"shaded": ({"ladybug": "a", "ladybeetle": "b", "fog": "c"}, {"1f41e": ["ladybug"]}),
                "bold": ({"ladybug": "d", "love": "e"}, {}),
                "pastel": ({"2hearts": "f", "twohearts": "g", "fog": "h"}, {})}  # fmt: skip
    assert make.match(things, packages) == {
        (0, "shaded"): "a",
        (0, "bold"): "d",
        (1, "pastel"): "f",
        (2, "shaded"): "c",
    }


def test_judging(tools):
    judge = tools("judge_teacher")
    assert judge.psnr(torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.2)) == pytest.approx(20)
    bank = torch.tensor([[0.0, 0.0], [3.0, 3.0], [1.0, 1.0]])
    found = judge.nearest(torch.tensor([[0.0, 0.0], [4.0, 4.0]]), bank)
    assert found.indices.tolist() == [0, 1] and found.values.tolist() == pytest.approx([0, 1])
    found = judge.nearest(torch.tensor([[0.0, 0.0]]), bank, skip=torch.tensor([[0]]))
    assert found.indices.tolist() == [2] and found.values.tolist() == pytest.approx([1])
    prompts, captions = ["dog, animal, flat", "cat, animal, bold"], ["dog, animal, bold", "cow, animal, bold"]
    assert judge.agreement(prompts, captions) == "50 / 100 / 50"


def test_the_judge_learns_to_tell_styles(tools):
    judge = tools("judge_teacher")
    labels = torch.arange(256) % 3  # red, green, blue pictures
    pictures = F.one_hot(labels, 3).float()[:, :, None, None].expand(-1, -1, 64, 64) + 0.1 * torch.randn(256, 3, 64, 64)
    net = judge.train_classifier(pictures, labels, 3, SimpleNamespace(seed=0, style_epochs=6))
    assert judge.named(net, pictures, labels) == "100 / 100 %"
    assert judge.named(net, pictures, (labels + 1) % 3).startswith("0 / ")


def test_teacher_goes_on_where_it_stopped(tools, tmp_path):
    """The budget is of the whole training: with it spent, a second call takes no step; with a larger one, it does."""
    teacher = tools("train_teacher")
    args, model = teacher.parse_args(["--work_dir", str(tmp_path)]), torch.nn.Linear(2, 1)

    def loss(model):
        return (model(torch.ones(8, 2)) - 1).square().mean()

    first = teacher.train("line", model, loss, 0.01, 0.9, args).state_dict()
    steps = torch.load(tmp_path / "line.pt")["step"]
    again = teacher.train("line", torch.nn.Linear(2, 1), loss, 0.01, 0.9, args).state_dict()
    assert steps > 10 and torch.load(tmp_path / "line.pt")["step"] == steps
    assert all(first[name].equal(again[name]) for name in first)
    teacher.train("line", torch.nn.Linear(2, 1), loss, 0.02, 0.9, args)
    assert torch.load(tmp_path / "line.pt")["step"] > steps


def test_teacher_reads_four_captions_of_every_picture(tools):
    teacher = tools("train_teacher")
    images, captions = teacher.read_shards(DEMO / "shards", "heldout-test.tar")
    assert images.shape[1:] == (3, 64, 64) and images.min() >= -1 and images.max() <= 1
    tokenizer = teacher.build_tokenizer([variants[0] for variants in captions], num_merges=20)
    tokens = teacher.tokenize_variants(tokenizer, captions)
    assert tokens.shape[:2] == (len(images), 4)
    decoded = tokenizer.batch_decode(tokens[5], skip_special_tokens=True)
    assert [text.strip().replace(" ,", ",") for text in decoded] == [text.lower() for text in (*captions[5], "")]
