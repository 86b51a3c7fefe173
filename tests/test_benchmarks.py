"""The benchmarks run at scale tiny, and their numbers agree with each other. Nothing here asserts a time."""

import functools
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPT, run_main
from safetensors.torch import save_file

BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import common  # noqa: E402
import compare  # noqa: E402
import material as material_module  # noqa: E402
import resume_check  # noqa: E402
import stream  # noqa: E402
import sync_check  # noqa: E402
import throughput  # noqa: E402
from baseline import Baseline  # noqa: E402

SMALL_SHARDS = ["--shards", "2", "6", "--sides", "64", "96"]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    material_module.make_shards(folder, 2, 6, (64, 96))
    material_module.make_pipeline(folder, "tiny")
    return str(folder)


@pytest.fixture(scope="module")
def flags(material):
    return ["--scale", "tiny", "--batch_size", "2", "--mixed_precision", "no", "--material", material, *SMALL_SHARDS,
            "--dataloader_num_workers", "0"]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def short_matrix_products():
    """The machine's rate is measured on smaller matrices: large ones take longer than all else here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "matmul_rate", functools.partial(common.matmul_rate, side=256))
        yield


@pytest.fixture(scope="module")
def measured(flags, lcm, tmp_path_factory):
    """The result of a run, its file, and which attributes that the run hooks it did not put back."""
    path, owners = tmp_path_factory.mktemp("measured") / "result.json", (lcm, lcm.BatchReader, lcm.Denoiser, torch)
    before = [dict(vars(owner)) for owner in owners]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(throughput, "load_script", lambda _: lcm)
        result = throughput.main([*flags, "--warmup", "1", "--steps", "2", "--compare_baseline", "--pairs", "2",
                                  "--clock", "cpu", "--logging_steps", "2", "--json", str(path)])  # fmt: skip
    left = {name for owner, attributes in zip(owners, before, strict=True) for name in attributes
            if vars(owner)[name] is not attributes[name]} - {"__warningregistry__"}  # fmt: skip
    return result, path, left


def test_throughput_is_consistent(measured):
    result, path, left = measured
    assert sum(result["shares"].values()) == pytest.approx(1)
    assert all(share > 0 for share in result["shares"].values())
    overhead = 1 - sum(result["shares"][name] for name in throughput.NETWORKS)
    assert result["overhead_share"] == pytest.approx(overhead)
    assert result["images_per_s"] * result["s_per_step"] == pytest.approx(2)
    assert result["share_of_matmul"] * result["s_per_step"] == pytest.approx(result["floor_s_per_step"])
    flops = result["flops_per_image"]
    assert sum(flops[name] for name in throughput.NETWORKS) == flops["all"]
    assert flops["teacher"] == pytest.approx(2 * flops["target"], rel=0.01)  # two halves; no guidance embedding
    assert flops["target"] == flops["student forward"]
    assert 1.8 < flops["backward"] / flops["student forward"] < 2.6
    assert len(result["baseline"]["speedups"]) == 2
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    table = path.with_suffix(".md").read_text()
    assert all(name in table for name in (*throughput.NETWORKS, *throughput.OVERHEAD, "plain loop", "floor"))
    assert left == set()  # the hooks are undone


def test_flops_of_checkpointing_and_accumulation_are_the_models(flags, measured):
    more = throughput.main([*flags, "--warmup", "1", "--steps", "1", "--gradient_checkpointing",
                            "--gradient_accumulation_steps", "2", "--mixed_precision", "bf16"])  # fmt: skip
    assert more["flops_per_image"] == measured[0]["flops_per_image"]
    assert more["images_per_step"] == 4


def test_throughput_of_a_method_without_teacher_or_ema(flags):
    script = ["--script", str(ROOT / "train_ct.py"), "--ema_decay", "0", "--lora_rank", "4"]
    result = throughput.main([*flags, *script, "--warmup", "0", "--steps", "1"])
    assert result["flops_per_image"]["teacher"] == 0 < result["flops_per_image"]["target"]


def count(function):
    with throughput.flop_counter() as counter:
        function()
    return counter.get_total_flops()


def test_flops_of_single_layers():
    linear, conv = torch.nn.Linear(12, 20), torch.nn.Conv2d(3, 8, 3, padding=1)
    assert count(lambda: linear(torch.zeros(5, 12))) == 2 * 5 * 12 * 20
    assert count(lambda: conv(torch.zeros(2, 3, 10, 14))) == 2 * 2 * 10 * 14 * 3 * 8 * 9
    assert count(lambda: linear(torch.zeros(5, 12)).sum().backward()) == 2 * 2 * 5 * 12 * 20  # no gradient of the input
    q = torch.zeros(2, 3, 16, 8)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert count(lambda: attention(q, q, q)) == 2 * (2 * 2 * 3 * 16 * 16 * 8)


def test_a_renamed_function_is_named(flags, lcm, monkeypatch):
    monkeypatch.setattr(throughput, "load_script", lambda _: lcm)
    monkeypatch.delattr(lcm, "guided_prediction")
    with pytest.raises(SystemExit, match="has no guided_prediction"):
        throughput.main(flags)


def test_baseline_has_the_scripts_loss(flags, lcm, tmp_path):
    losses = []

    def step(_train_step, run):
        plain = Baseline(run.args, run.accelerator.device)
        batch = run.reader.next_batch()
        x_0, c = plain.encode_images(batch["pixel_values"]), plain.encode_prompts(batch["captions"])
        torch.testing.assert_close(c, lcm.encode_prompts(run.models, batch["captions"])["text"])
        eps, index, w = torch.randn_like(x_0), torch.tensor([0, 33]), torch.tensor([6.0, 11.0])
        losses.append(plain.loss(x_0, c, eps, index, w))
        draws = lcm.Draws(eps, index, w)
        losses.append(lcm.consistency_loss(**run.nets, schedule=run.models.schedule, x_0=x_0, c={"text": c},
                                           uncond=run.uncond, draws=draws, args=run.args).mean())  # fmt: skip
        raise common.Finished

    options, rest = throughput.parse_args(flags)
    common.run_script(lcm, throughput.script_arguments(options, rest, tmp_path), step)
    torch.testing.assert_close(*losses)


def test_stream(material, tmp_path, capsys):
    result = stream.main(["--material", material, *SMALL_SHARDS, "--resolution", "32", "--workers", "2", "--rounds",
                          "1", "--seconds", "0.05", "--json", str(tmp_path / "stream.json")])  # fmt: skip
    assert [(row["level"], row["workers"]) for row in result["rows"]] == [(level, 2) for level in stream.LEVELS]
    assert all(rate > 0 for row in result["rows"] for rate in (*row["script"], *row["webdataset"]))
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_compare_takes_turns_between_commits(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", tmp_path, *arguments], check=True)

    script, calls = tmp_path / "script.py", []
    git("init", "--quiet")
    for number in (1, 2):
        script.write_text(f"speed = {number}\n")
        git("add", "script.py")
        git("commit", "--quiet", "-m", str(number))

    def run_throughput(path, flags, _json):
        calls.append((path.read_text(), flags))
        return {"images_per_s": int(path.read_text().split()[-1]), "peak_memory_gib": 1, "overhead_share": 0.1,
                "first_step_s": 1}  # fmt: skip

    monkeypatch.setattr(compare, "run_throughput", run_throughput)
    result = compare.main(["HEAD~1", ".", "--script", str(script), "--rounds", "2", "--scale", "tiny"])
    assert result["ratios"] == [2, 2]
    assert [text for text, _ in calls] == ["speed = 1\n", "speed = 2\n"] * 2
    assert all("tiny" in flags for _, flags in calls)
    assert "worktree" in subprocess.run(["git", "-C", tmp_path, "worktree", "list", "--porcelain"], text=True,
                                        capture_output=True).stdout  # fmt: skip
    assert len(list((tmp_path / ".git").glob("worktrees/*"))) == 0
    calls.clear()
    compare.main(["", "--compile", "--script", str(script), "--rounds", "1"])
    assert ["--compile" in flags for _, flags in calls] == [False, True]
    with pytest.raises(SystemExit, match="neither a commit"):
        compare.main(["no-such-commit", ".", "--script", str(script)])


def test_sync_check_says_what_it_could_not_check(flags):
    result = sync_check.main([*flags, "--steps", "1"])
    assert result["verdict"] == ("none" if torch.cuda.is_available() else "not checked: no CUDA")
    assert result["steps"] == 1 and result["models"]["student"]["on"] == ["cpu float32"]


def test_resume_check_finds_equal_and_different_runs(flags, lcm, monkeypatch):
    def run_all(_script, runs):
        for arguments in runs:
            run_main(lcm, arguments)

    monkeypatch.setattr(resume_check, "run_all", run_all)
    try:
        assert resume_check.main([*flags, "--steps", "2"])["verdict"] == "bitwise equal"
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("resumed", "verdict"), [(7.2, "within repetition"), (7.5, "DIFFERENT")])
def test_resume_check_compares_with_a_repetition(flags, monkeypatch, resumed, verdict):
    """Checkpoints at the middle, where the weight is 3, and the end: 7, 7.1 of a run that is the same."""
    ends = iter([7.0, 7.1, resumed])

    def run_all(_script, runs):
        for arguments in runs:
            output = [value for flag, value in itertools.pairwise(arguments) if flag == "--output_dir"][-1]
            for step, value in ((1, 3.0), (2, next(ends))):
                folder = Path(output, f"checkpoint-{step}")
                folder.mkdir(parents=True, exist_ok=True)
                for name in ("student", "target"):
                    save_file({"weight": torch.tensor([0.0, value])}, folder / f"{name}.safetensors")

    monkeypatch.setattr(resume_check, "run_all", run_all)
    result = resume_check.main([*flags, "--steps", "2"])
    assert result["verdict"] == verdict
    assert result["repeated"]["student.safetensors"] == pytest.approx(0.1 / 4, rel=1e-5)
    assert result["resumed"]["target.safetensors"] == pytest.approx((resumed - 7) / 4, rel=1e-5)


def test_gpu_check_keeps_its_budget_and_prints_a_table(tmp_path):
    environment = {**os.environ, "DRY": "1", "BUDGET": "0", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", BENCHMARKS / "gpu_check.sh", tmp_path], env=environment, capture_output=True, text=True
    )
    assert "images/s" in done.stdout and "too little time" in done.stdout, done
    assert {path.name for path in tmp_path.iterdir()} == {"gpu_check.md", "gpu_check.json", "gpu_check.log"}


def test_gpu_check_uses_flags_that_exist():
    text = (BENCHMARKS / "gpu_check.sh").read_text()
    source = SCRIPT.read_text() + "".join(path.read_text() for path in BENCHMARKS.glob("*.py"))
    flags = set(re.findall(r"(?<=\s)--(?:no-)?([a-z0-9_]+)", text)) - {"format", "query"}
    assert flags and {flag for flag in flags if f'"--{flag}"' not in source} == set()
    assert all(Path(BENCHMARKS, name).is_file() for name in re.findall(r"benchmarks/(\w+\.py)", text))


def test_what_another_process_made_first_stays(tmp_path):
    first, second, final = (tmp_path / name for name in ("first", "second", "final"))
    for folder in (first, second):
        folder.mkdir()
        (folder / "from").write_text(folder.name)
        material_module.settle(folder, final)
    assert (final / "from").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    with pytest.raises(FileNotFoundError):
        material_module.settle(tmp_path / "missing", tmp_path / "elsewhere")
