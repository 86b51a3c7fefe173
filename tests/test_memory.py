"""benchmarks/memory.py: what it counts is right, and no script's step waits for the device or wastes its memory."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, SCRIPT, make_sdxl_pipeline

SCRIPTS = sorted(path.stem for path in ROOT.glob("train_*.py"))
FULL = [name for name in SCRIPTS if "lora" not in name]
LORA = "train_tcd_distill_lora_sd_wds"
STUDENT = "    return distance(f(student, x_t=x_t, t=t), f_target"
# in a process of its own: the device stays known to PyTorch until it ends
DRIVER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import memory, torch
memory.register_device()
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
    base = ["--scale", "tiny", "--batch_sizes", "8"]
    jobs = {name: [*base, "--script", str(ROOT / f"{name}.py")] for name in SCRIPTS}
    sdxl = next(name for name in SCRIPTS if "sdxl" in name)
    jobs[sdxl] += ["--pretrained_teacher_model", make_teacher(make_sdxl_pipeline)]
    jobs |= {flag: [*base, flag] for flag in ("--gradient_checkpointing", "--offload_ema")}
    jobs["float32"] = [*base, "--mixed_precision", "no", "--gradient_accumulation_steps", "2"]
    jobs["chunks"] = [*base, "--vae_encode_batch_size", "1"]
    spoilt = {"reads": (SCRIPT.stem, STUDENT, f"    f_target.mean().item()\n{STUDENT}"),
              "mixes": (SCRIPT.stem, STUDENT, f"    f_target + torch.ones(1, 4, 1, 1)\n{STUDENT}"),
              "waits": (SCRIPT.stem, STUDENT, f"    torch.tensor([1.0, 2.0]).to(x_t.device)\n{STUDENT}"),
              "norms": (SCRIPT.stem, "keep_norms_in_half(model)", "pass"),
              "casts": (LORA, "cast_input_dtype_enabled = False", "cast_input_dtype_enabled = True")}  # fmt: skip
    jobs |= {name: [*base, "--script", spoil(folder, name, *change)] for name, change in spoilt.items()}
    jobs["train_ct fixed"] = [*jobs["train_ct"], "--discretization", "fixed"]
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


@pytest.mark.parametrize("name", [*SCRIPTS, "train_ct fixed"])
def test_no_step_waits_for_the_device(counted, name):
    result = counted["runs"][name]
    assert result["waits"] == [] and [row["batch_size"] for row in result["rows"]] == [8]
    assert all(row["copies"] == {} for row in result["rows"])


@pytest.mark.parametrize("name", [*FULL, "--gradient_checkpointing", "--offload_ema", "float32"])
def test_nothing_else_stays(counted, name):
    result = counted["runs"][name]
    models, states = result["models"], 2 * result["models"]["student"]["bytes"]
    on_device = sum(model["bytes"] for model in models.values() if model["on"][0].startswith("fakegpu"))
    for row in result["rows"]:
        assert 0 <= row["resident"] - on_device - states < 32 * 1024  # the schedule, Adam's steps, the empty prompt
    half = "float32" if name == "float32" else "bfloat16"
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
    runs = counted["runs"]
    plain, checkpointed, offloaded, whole, chunked = (runs[name]["rows"][-1] for name in (
        SCRIPT.stem, "--gradient_checkpointing", "--offload_ema", "float32", "chunks"))  # fmt: skip
    target = runs[SCRIPT.stem]["models"]["target"]["bytes"]
    assert checkpointed["peaks"]["backward"] < 0.7 * plain["peaks"]["backward"]
    assert checkpointed["resident"] == plain["resident"] == offloaded["resident"] + target
    assert offloaded["host"] - plain["host"] == target
    assert whole["peak"] > plain["peak"]
    vae, in_chunks = (row["peaks"]["VAE"] - row["resident"] for row in (plain, chunked))
    assert in_chunks < 0.7 * vae and chunked["peak"] == plain["peak"]


@pytest.mark.parametrize(("name", "other", "share"), [(SCRIPT.stem, "norms", 0.85), (LORA, "casts", 0.9)])
def test_activations_are_kept_in_half_precision(counted, name, other, share):
    """The student's norms, which autocast on CUDA would run in float32, and the inputs of peft's layers."""
    kept, spoilt = (counted["runs"][key]["rows"][-1] for key in (name, other))
    kept, spoilt = (row["peaks"]["student forward"] - row["resident"] for row in (kept, spoilt))
    assert kept < share * spoilt


@pytest.mark.parametrize("name", ["reads", "mixes"])
def test_a_step_that_waits_is_reported_with_its_line(counted, name):
    (waits,) = counted["runs"][name]["waits"]
    assert f"train_{name}.py" in waits[1] and ("item()" if name == "reads" else "torch.ones") in waits[1]
    assert waits[0].startswith("DataDependent" if name == "reads" else "FakeTensorDeviceMismatch")
    assert f"WAITS for the device or mixes devices: {waits[0]} < " in counted["printed"]


def test_a_copy_that_the_host_waits_for_is_reported_with_its_line(counted):
    rows = counted["runs"]["waits"]["rows"]
    assert all(list(row["copies"].values()) == [1] for row in rows)
    assert "train_waits.py" in next(iter(rows[0]["copies"])) and ".to(x_t.device)" in next(iter(rows[0]["copies"]))


def test_what_cannot_be_counted_is_refused():
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "memory.py", "--scale", "tiny", "--compile"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 2 and "--compile cannot be counted" in done.stderr
