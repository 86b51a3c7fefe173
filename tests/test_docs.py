"""Every command and Python snippet of the README and of docs/ is run as it is printed, on tiny models and shards."""

import argparse
import contextlib
import io
import json
import re
import subprocess
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import (
    ROOT,
    get_script,
    image_bytes,
    load_script,
    make_pipeline,
    make_sdxl_pipeline,
    make_shards,
    run_main,
)

PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))]
# a shell's way with lines, quotes and variables, and instead of each program one that prints what it was given
RECORD = """
accelerate() { printf '%s\\0' accelerate "$@"; printf '\\n\\0'; }
python() { printf '%s\\0' python "$@"; printf '\\n\\0'; }
for name in python3 source pip make img2dataset bash; do
    eval "$name() { printf '%s\\0' $name \\"\\$@\\"; printf '\\n\\0'; }"
done
"""
HUB = r"[\w.-]+/[\w.-]+"
SIZES = {"resolution": "16", "bucket_step": "2", "min_megapixels": "0.0001", "min_image_size": "8"}
FIXED = {"max_train_steps": "2", "train_batch_size": "2", "checkpointing_steps": "2", "validation_steps": "0",
         "lr_warmup_steps": "1", "lora_rank": "2", "num_ddim_timesteps": "10"}  # fmt: skip


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def recorded(block):
    """The commands of a shell block: a list of words each."""
    printed = subprocess.run(["bash", "-c", RECORD + block], capture_output=True, text=True, check=True).stdout
    return [line.split("\0")[:-1] for line in printed.split("\n\0") if line.strip("\0\n")]


def table_commands(page):
    """The commands of a README's table, which say what differs from the command above it."""
    return [["accelerate", "launch", *line.split()] for line in re.findall(r"\| `(train_\w+\.py [^`]*)` \|", page)]


def programs(page):
    """[script, flags…] of every command of a page that starts a script of this repository."""
    commands = [command for block in blocks(page, "bash") for command in recorded(block)]
    for command in commands + table_commands((ROOT / page).read_text()):
        place = next((i for i, word in enumerate(command) if re.match(r"(train_|tools/|benchmarks/)\S*\.py$", word)), 0)
        if place:
            yield command[place:]


def has_tests_of_its_own(script, words):
    return script.startswith("benchmarks/") or script == "tools/evaluate.py" or "--dataset" in words


@pytest.fixture
def workplace(tmp_path, make_teacher):
    """A folder with the data that the pages speak of, small, and tiny teachers."""
    folder = tmp_path
    make_shards(folder / "cc12m", [5, 5])
    for name in ("photos", "train2017"):
        (folder / name).mkdir()
        for index in range(6):
            (folder / name / f"{index}.png").write_bytes(image_bytes(index, (24, 20)))
            (folder / name / f"{index}.txt").write_text(f"picture {index}")
    images = [{"id": index, "file_name": f"{index}.png"} for index in range(6)]
    annotations = [{"image_id": index, "id": index, "caption": f"a {index}"} for index in range(6)]
    (folder / "annotations").mkdir()
    (folder / "annotations/captions_train2017.json").write_text(
        json.dumps({"images": images, "annotations": annotations})
    )
    teachers = {"xl": make_teacher(make_sdxl_pipeline), "sd": make_teacher(make_pipeline),
                "2-1": make_teacher(make_pipeline, prediction_type="v_prediction")}  # fmt: skip
    return folder, teachers


def tiny_model(name, teachers):
    """The tiny pipeline that stands for a model of the hub."""
    kind = "xl" if "xl" in name.lower() else "2-1" if "2-1" in name else "sd"
    return teachers[kind] + "/vae" * ("vae" in name)


def shrink(words, teachers):
    """A command with tiny models, sizes and numbers of steps in the place of those that are printed."""
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    shrunk, flag = [], ""
    for word in words:
        if word.startswith("--"):
            flag = word[2:]
        elif flag in SIZES or flag in FIXED:
            word = {**SIZES, **FIXED}[flag]
        elif flag == "validation_resolutions":
            word = ",".join(["16x16"] * len(word.split(",")))
        elif flag == "mixed_precision" and word == "fp16":  # there is no GPU
            word = "bf16"
        elif re.fullmatch(HUB, word) and ("model" in flag or flag == "encode"):
            word = tiny_model(word, teachers)
        else:
            word = re.sub(r"\{00000\.\.\d+\}", "{00000..00001}", word)
        shrunk.append(word)
    return shrunk


@pytest.mark.parametrize("page", PAGES)
def test_commands_run_as_printed(page, workplace, monkeypatch):
    folder, teachers = workplace
    monkeypatch.chdir(folder)
    ran = 0
    for script, *words in programs(page):
        flags = shrink(words, teachers)
        if has_tests_of_its_own(script, flags):
            continue
        if script.startswith("tools/"):
            tool = load_script(ROOT / script)
            with contextlib.redirect_stdout(io.StringIO()):
                tool.main(["--bucket_step", "2", "--samples_per_shard", "3", *flags])
        else:
            needed = ["--pretrained_teacher_model", teachers["sd"]] * ("teachers" not in flags)
            needed += ["--train_shards_path_or_url", "cc12m/{00000..00001}.tar", "--max_train_steps", "2"]
            needed += ["--output_dir", f"run-{ran}", "--resolution", "16", "--train_batch_size", "2"]
            flags = [*needed, *flags, "--report_to", "none",
                     "--dataloader_num_workers", "0", "--validation_steps", "0", "--logging_steps", "1"]  # fmt: skip
            run_main(get_script(Path(script).stem), flags)
        ran += 1
    assert ran == sum(not has_tests_of_its_own(script, words) for script, *words in programs(page))
    snippets = blocks(page, "python")
    for snippet in snippets:
        run_snippet(snippet, teachers)


def run_snippet(snippet, teachers):
    """Runs Python as printed, without the GPU and with tiny models; earlier commands have made the output folders."""
    code = re.sub(rf'"({HUB})"', lambda match: json.dumps(tiny_model(match[1], teachers)), snippet)
    names = {name: getattr(diffusers, name) for name in ("DiffusionPipeline", "LCMScheduler", "TCDScheduler")}
    exec(code.replace('.to("cuda")', ""), {**names, "torch": torch})


def test_install_line_leads_to_the_next():
    """`accelerate` is found where the README's install line has put it."""
    block = next(block for block in blocks("README.md", "bash") if "requirements.txt" in block)
    assert "source .venv/bin/activate" in block.splitlines()[0]


def anchors(text):
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def test_links_and_anchors_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
            file, _, anchor = target.partition("#")
            path = (ROOT / page).parent / file if file else ROOT / page
            if "://" not in target:
                assert path.exists(), f"{page}: {target}"
                assert not anchor or anchor in anchors(path.read_text()), f"{page}: {target}"


def test_flags_in_text_exist():
    """Every flag that a page names is one of a script, a tool or a benchmark."""
    known = set()
    for path in [*ROOT.glob("train_*.py"), *ROOT.glob("*/*.py")]:
        known |= set(re.findall(r"[\"'](--\w+)[\"']", path.read_text()))
    foreign = "--concatenate --dataset_name --sort --cpu --num_processes --config_file --requirement --no".split()
    for page in PAGES:
        text = re.sub(r"img2dataset .*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
        for flag in re.findall(r"(?<![\w-])--\w+", text):
            found = {flag, flag.replace("--no-", "--")} & known
            assert found or flag in foreign, f"{page}: {flag}"


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("train_*.py")))
def test_readme_names_every_flag_of_a_method(name):
    """CD's and CT's in their own sections; the others refer to each other's."""
    heading = {"train_cd_multiboundary": "### Multi-boundary", "train_ct": "### Consistency training"}.get(name)
    section = (ROOT / "README.md").read_text().split(heading or "## The methods")[1]
    section = section.split("\n### " if heading else "\n## ")[0]
    parser = argparse.ArgumentParser(add_help=False)
    get_script(name).add_method_args(parser)
    assert [flag for action in parser._actions for flag in action.option_strings if f"`{flag}`" not in section] == []
