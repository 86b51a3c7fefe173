"""benchmarks/memory.py: what it counts is right, and no script's step waits for the device or wastes its memory."""

import json
import math
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPT, make_sdxl_pipeline

SCRIPTS = sorted(path.stem for path in ROOT.glob("train_*.py"))
FULL = [name for name in SCRIPTS if "lora" not in name]
LORA = "train_tcd_distill_lora_sd_wds"
SAVERS = "--gradient_checkpointing --offload_ema"
SINGLE = "train_ct --discretization fixed --mixed_precision no --gradient_accumulation_steps 2"
WASTE = "--no-half_precision_norms --vae_encode_batch_size 1"
REPLICA = "--ddp --optimizer adamw8bit --flops"
STUDENT = "    return distance(f(student, x_t=x_t, t=t), f_target"
# in a process of its own: the device stays known to PyTorch until it ends
DRIVER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import memory, torch
memory.register_device()
from pipelines import make_unet
found = {name: memory.main(arguments) for name, arguments in json.loads(sys.argv[3]).items()}
with memory.FakeMode(), memory.LiveBytes() as live:
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.LayerNorm(16), torch.nn.Linear(16, 2))
    weights = [torch.zeros(p.shape, device=memory.NAME, requires_grad=True) for p in layers.parameters()]
    known, x = {"weights": live.live[memory.NAME]}, torch.zeros(4, 8, device=memory.NAME)
    with torch.autocast(memory.NAME, dtype=torch.bfloat16):
        y = torch.nn.functional.linear(x, weights[0])
        known["linear"], known["linear_dtype"] = live.live[memory.NAME], str(y.dtype)
        torch.nn.functional.linear(x, weights[0])
        known["again"] = live.live[memory.NAME]
        z = torch.nn.functional.layer_norm(y, (16,))
        known["norm_dtype"] = str(z.dtype)
    del x, y, z
    known["freed"] = live.live[memory.NAME]
known["numels"] = [*(p.numel() for p in make_unet("tiny").parameters()), 256 * 8]  # the last: the embedding of w
json.dump({"runs": found, "known": known}, open(sys.argv[2], "w"))
"""


def spoil(folder, name, script, old, new):
    """The path of a script in which a line is another."""
    text = (ROOT / f"{script}.py").read_text()
    assert text.count(old) == 1
    path = folder / f"train_{name}.py"
    path.write_text(text.replace(old, new))
    return str(path)


@pytest.fixture(scope="module")
def counted(tmp_path_factory, make_teacher):
    folder = tmp_path_factory.mktemp("memory")
    base = ["--scale", "tiny", "--batch_sizes", "8", "--material", str(folder)]
    jobs = {name: [*base, "--script", str(ROOT / f"{name}.py")] for name in SCRIPTS}
    jobs["train_ct"] += ["--optimizer", "adamw"]  # RAdam, its default, is not fused and has to know if a step is good
    jobs[SINGLE] = [*jobs["train_ct"], *SINGLE.split()[1:]]
    jobs |= {flags: [*base, *flags.split()] for flags in (SAVERS, WASTE, REPLICA)}
    sdxl = next(name for name in SCRIPTS if "sdxl" in name)
    jobs[sdxl] += ["--pretrained_teacher_model", make_teacher(make_sdxl_pipeline)]
    waits = "    torch.tensor([1.0, 2.0]).to(x_t.device)\n    f_target.mean().item()\n"
    spoilt = {"waits": (SCRIPT.stem, STUDENT, waits + STUDENT),
              "mixes": (SCRIPT.stem, STUDENT, f"    f_target + torch.ones(1, 4, 1, 1)\n{STUDENT}"),
              "casts": (LORA, "cast_input_dtype_enabled = False", "cast_input_dtype_enabled = True")}  # fmt: skip
    jobs |= {name: [*base, "--script", spoil(folder, name, *change)] for name, change in spoilt.items()}
    start = [sys.executable, "-X", "faulthandler", "-W", "ignore", "-c", DRIVER]
    done = subprocess.run([*start, ROOT / "benchmarks", folder / "out.json", json.dumps(jobs)], capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads((folder / "out.json").read_text()), "printed": done.stdout}


def test_bytes_of_known_tensors(counted):
    known = counted["known"]
    assert known["weights"] == 4 * (8 * 16 + 16 + 16 + 16 * 2 + 2)
    inputs, output, halves = 4 * 4 * 8, 2 * 4 * 16, 2 * (8 * 16 + 4 * 8)  # of autocast: the weight, the input
    assert known["linear"] == known["weights"] + inputs + output + halves and known["linear_dtype"] == "torch.bfloat16"
    assert known["again"] == known["linear"]  # the weight's copy is kept, not made again
    assert known["norm_dtype"] == "torch.float32"
    assert known["freed"] == known["weights"]


@pytest.mark.parametrize("name", [*SCRIPTS, SINGLE, SAVERS])
def test_no_step_waits_for_the_device(counted, name):
    result = counted["runs"][name]
    assert result["waits"] == [] and [row["batch_size"] for row in result["rows"]] == [8]
    assert all(row["copies"] == row["reads"] == {} for row in result["rows"])


@pytest.mark.parametrize("name", [*FULL, SINGLE, SAVERS])
def test_nothing_else_stays(counted, name):
    result = counted["runs"][name]
    models, states = result["models"], 2 * result["models"]["student"]["bytes"]
    on_device = sum(model["bytes"] for model in models.values() if model["on"][0].startswith("fakegpu"))
    for row in result["rows"]:
        assert 0 <= row["resident"] - on_device - states < 32 * 1024  # the schedule, Adam's steps, the empty prompt
    half = "float32" if name == SINGLE else "bfloat16"
    assert {key: model["on"][0].split()[1] for key, model in models.items()} == {
        key: "float32" if key in ("student", "target") else half for key in models
    }


@pytest.mark.parametrize("name", FULL)
def test_a_network_begins_when_what_the_one_before_made_is_gone(counted, name):
    last = counted["runs"][name]["rows"][-1]
    passes = [stage for stage in ("teacher", "target", "student forward") if stage in last["peaks"]]
    before = max(last["begins"][stage] for stage in passes) - last["resident"]
    latents, pixels, conditioning = 4 * 16 * 16 * 4, 3 * 32 * 32, 77 * 16 * 2
    assert before < 8 * (9 * latents + pixels + conditioning)  # x_0, ε, x_t, x̂_0, ε̂, … of eight images
    assert len(passes) > 1 and all(last["peaks"][stage] > last["resident"] + before for stage in passes)
    highest = max(last["peaks"]["student forward"], last["peaks"]["backward"])
    assert highest <= last["peak"] < highest + latents * 8 * 2  # the loss, between the two


def test_effect_of_the_flags(counted):
    plain, saving, wasting = (counted["runs"][name]["rows"][-1] for name in (SCRIPT.stem, SAVERS, WASTE))
    target = counted["runs"][SCRIPT.stem]["models"]["target"]["bytes"]
    assert plain["resident"] == wasting["resident"] == saving["resident"] + target
    assert saving["host"] - plain["host"] == target

    def peak(row, stage):
        return row["peaks"][stage] - row["resident"]

    assert peak(saving, "backward") < 0.7 * peak(plain, "backward")
    assert peak(wasting, "VAE") < 0.7 * peak(plain, "VAE")
    assert peak(plain, "student forward") < 0.85 * peak(wasting, "student forward")  # of norms, as autocast runs them
    kept, cast = (counted["runs"][name]["rows"][-1] for name in (LORA, "casts"))  # inputs of peft's layers
    assert peak(kept, "student forward") < 0.9 * peak(cast, "student forward")


def test_8_bit_states_and_buckets_are_counted(counted):
    """From 4,096 elements up two bytes an element, and for each 256 of them two scales; DDP holds the gradients."""
    plain, result = counted["runs"][SCRIPT.stem]["rows"][-1], counted["runs"][REPLICA]
    row, numels = result["rows"][-1], counted["known"]["numels"]
    gradients = 4 * sum(numels)
    assert gradients == result["models"]["student"]["bytes"]
    states = sum(8 * n if n < 4096 else 2 * n + 8 * math.ceil(n / 256) for n in numels)
    assert max(numels) > 4096
    saved = plain["resident"] + gradients - row["resident"]
    assert (
        saved == 2 * gradients + 4 * len(numels) + 4 - states - 2 * 1024
    )  # Adam's steps, found_inf; two tables of 256
    assert row["peaks"]["clip + optimizer"] - row["resident"] < 0.5 * gradients  # which are views of the buckets
    assert len(row["reads"]) == 1 and "is_bad" in next(iter(row["reads"]))


def test_flops_without_contents(counted):
    flops = dict(counted["runs"][REPLICA]["flops_per_image"])
    assert sum(flops.values()) == 2 * flops["all"] and all(flops.values())
    assert flops["teacher"] == pytest.approx(2 * flops["target"], rel=0.01)  # two halves; no guidance embedding
    assert flops["target"] == flops["student forward"]
    assert 1.8 < flops["backward"] / flops["student forward"] < 2.6


def test_a_step_that_waits_is_reported_with_its_line(counted):
    (row,) = counted["runs"]["waits"]["rows"]
    for found, code in (row["copies"], ".to(x_t.device)"), (row["reads"], "f_target.mean().item()"):
        ((line, count),) = found.items()
        assert "train_waits.py" in line and code in line and count == 1
    (waits,) = counted["runs"]["mixes"]["waits"]
    assert "train_mixes.py" in waits[1] and "torch.ones" in waits[1] and "DeviceMismatch" in waits[0]
    assert f"WAITS for the device or mixes devices: {waits[0]} < " in counted["printed"]
    assert "1 values a step READ back from the device: train_waits.py" in counted["printed"]


def test_what_cannot_be_counted_is_refused():
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "memory.py", "--scale", "tiny", "--compile"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and "--compile cannot be counted" in done.stderr
