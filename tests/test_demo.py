"""The embedded demo: its files are whole, and distilling its teacher for a few seconds already shows."""

import hashlib
import json
import subprocess
import tarfile

import pytest
from conftest import ROOT, load_script, read_metrics, run_main

DEMO = ROOT / "demo"
SHARDS = sorted((DEMO / "shards").glob("train-*.tar"))
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
           "cd4": "train_cd_multiboundary", "cd1": "train_cd_multiboundary", "ct": "train_ct"}  # fmt: skip


@pytest.mark.parametrize("path", sorted(DEMO.glob("*.args")), ids=lambda path: path.name)
def test_argument_files(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    script = load_script(ROOT / f"{SCRIPTS[path.stem]}.py")
    args = script.parse_args([f"@{path}"])
    assert (ROOT / args.pretrained_teacher_model / "model_index.json").is_file()
    assert [ROOT / url for url in script.expand_shards(args.train_shards_path_or_url)] == SHARDS
    assert len(script.load_prompts(args)[0]) >= 8
    target = "demo" if path.stem == "demo" else f"demo-{path.stem}"
    assert args.output_dir == target.replace("demo", "demo/output", 1)
    dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"{script.__name__}.py @{path.relative_to(ROOT)}\n" in dry and f"cp {args.output_dir}/samples.png" in dry


@pytest.mark.parametrize(
    ("name", "flags", "gain"),
    [
        ("train_tcd_distill_sd_wds", "--w_min 2 --w_max 2 --learning_rate 2e-4", 0.8),
        ("train_tcd_distill_lora_sd_wds", "--w_min 2 --w_max 2 --lora_rank 32 --learning_rate 3e-3", 0.3),
        ("train_cd_multiboundary", "--guidance_scale 3 --num_boundaries 4 --learning_rate 2e-4", 1.3),
    ],
)
def test_short_distillation_of_jumps_improves_four_steps(tmp_path, name, flags, gain):
    """Sixty small steps on a grid of eight points; measured at 4 deterministic steps: 1.6, 0.7 and 2.6 dB."""
    arguments = f"""{flags}
        --resolution 64 --train_batch_size 8 --max_train_steps 60 --dataloader_num_workers 0 --mixed_precision bf16
        --num_ddim_timesteps 8 --loss_type huber --huber_c 0.03 --ema_decay 0.9 --lr_scheduler linear
        --lr_warmup_steps 5 --adam_weight_decay 0 --validation_steps 60 --validation_num_inference_steps 4
        --num_validation_images 1 --checkpointing_steps 0 --report_to none""".split()
    arguments += ["--pretrained_teacher_model", DEMO / "teacher", "--train_shards_path_or_url", *SHARDS]
    arguments += ["--validation_prompts", DEMO / "prompts_full.txt", DEMO / "prompts_category.txt"]
    run_main(load_script(ROOT / f"{name}.py"), [*arguments, "--output_dir", tmp_path])
    fidelity = {key.removeprefix("fidelity/"): value for key, value in read_metrics(tmp_path)[-1].items()}
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
    arguments += ["--validation_prompts", DEMO / "prompts_full.txt", DEMO / "prompts_category.txt"]
    run_main(lcm, [*arguments, "--output_dir", tmp_path])
    fidelity = {key.removeprefix("fidelity/"): value for key, value in read_metrics(tmp_path)[-1].items()}
    assert fidelity["target_psnr_k2"] > fidelity["untrained_psnr_k2"] + 0.3
    assert fidelity["target_psnr_k1/prompts_category"] > fidelity["untrained_psnr_k1/prompts_category"]
    assert fidelity["teacher_psnr_k1"] < fidelity["target_psnr_k1"]  # at half the evaluations
