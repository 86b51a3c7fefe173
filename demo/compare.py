#!/usr/bin/env python
"""Draws what the demo's students have learnt side by side: methods in columns, steps in rows, the same noise.

    make demo-tcd demo-cd4 …                     trains students, each in a folder demo/output-<method>
    python demo/compare.py docs/demo-compare.png

Every cell shows the same prompts, sampled by stock diffusers pipelines as a user would (LCMScheduler adds fresh noise
between its steps, TCDScheduler with eta = 0 none). Beneath stand the PSNRs in dB to the teacher's 50 steps that each
run measured itself, by the deterministic chain, on full captions and on the category alone, from its metrics.jsonl.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler, TCDScheduler
from PIL import Image, ImageDraw, ImageFont

DEMO = Path(__file__).resolve().parent
METHODS = {"ct": "consistency training", "cd1": "CD, one segment", "cd4": "CD, 4 segments", "lcm": "LCM, 420 steps",
           "long": "LCM, demo-long", "tcd": "TCD", "tcd-lora": "TCD-LoRA"}  # fmt: skip
PROMPTS = {"validation_full": [0, 3], "validation_category": [0, 3]}  # lines of demo/prompts_*.txt
STEPS, GUIDANCE = (1, 2, 4, 8), 3.0
CELL, GAP, LEFT, TOP, LINE = 128, 8, 90, 30, 18


def find_runs():
    """Finished runs: method → folder."""
    folders = {method: DEMO / f"output-{method}".rstrip("-") for method in METHODS}
    return {method: folder for method, folder in folders.items() if (folder / "scheduler").is_dir()}


def read_fidelity(folder):
    """Returns {(network, k, group): PSNR} of a run's last validation."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if any(key.startswith("fidelity/") for key in line)][-1]
    found = {}
    for key, value in last.items():
        name, _, group = key.removeprefix("fidelity/").partition("/")
        if "_psnr_k" in name and group:
            network, k = name.split("_psnr_k")
            found[network, int(k), group.removeprefix("prompts_")] = value
    return found


def load_pipeline(folder):
    """The teacher (None), or the pipeline or LoRA that a run exported, with its scheduler, and its guidance scale."""
    if folder is None:
        pipe, scale = DiffusionPipeline.from_pretrained(DEMO / "teacher"), GUIDANCE
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    elif (folder / "pytorch_lora_weights.safetensors").is_file():
        pipe, scale = DiffusionPipeline.from_pretrained(DEMO / "teacher"), 1.0
        pipe.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
        name = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
        pipe.scheduler = {"LCMScheduler": LCMScheduler, "TCDScheduler": TCDScheduler}[name].from_pretrained(
            folder, subfolder="scheduler"
        )
    else:
        pipe = DiffusionPipeline.from_pretrained(folder)
        scale = GUIDANCE if pipe.unet.config.time_cond_proj_dim else 1.0
    pipe.set_progress_bar_config(disable=True)
    return pipe, scale


def draw_cell(pipe, scale, steps, prompts):
    """Samples all prompts from the fixed noise; returns them as one square picture."""
    side = pipe.unet.config.sample_size
    noise = torch.randn((len(prompts), 4, side, side), generator=torch.Generator().manual_seed(0))
    images = pipe(prompts, num_inference_steps=steps, guidance_scale=scale, latents=noise,
                  generator=torch.Generator().manual_seed(0)).images  # fmt: skip
    cell, half = Image.new("RGB", (CELL, CELL), "white"), CELL // 2
    for index, image in enumerate(images[:4]):
        cell.paste(image.resize((half, half)), (index % 2 * half, index // 2 * half))
    return cell


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", default="comparison.png", help="the picture to write")
    args = parser.parse_args(argv)
    runs = find_runs()
    if not runs:
        parser.error("no finished run in demo/output-*: train one first, with make demo or make demo-<method>")
    fidelity = {method: read_fidelity(folder) for method, folder in runs.items()}
    prompts = []
    for group, chosen in PROMPTS.items():
        lines = (DEMO / f"prompts_{group}.txt").read_text(encoding="utf-8").splitlines()
        prompts += [lines[index] for index in chosen]
    titles = ["teacher, 50 steps", "teacher", *(METHODS[method] for method in runs)]
    height = TOP + len(STEPS) * (CELL + 2 * LINE + GAP) + LINE * 2
    canvas = Image.new("RGB", (LEFT + len(titles) * (CELL + GAP), height), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for column, (title, method) in enumerate(zip(titles, [None, None, *runs], strict=True)):
        x = LEFT + column * (CELL + GAP)
        pen.text((x, GAP), title, "black", font)
        pipe, scale = load_pipeline(runs.get(method))
        for row, steps in enumerate(STEPS):
            y = TOP + row * (CELL + 2 * LINE + GAP)
            if column == 0:
                pen.text((GAP, y + CELL // 2), f"{steps} step{'s' * (steps > 1)}", "black", font)
            if column == 0 and row:
                continue
            canvas.paste(draw_cell(pipe, scale, 50 if column == 0 else steps, prompts), (x, y))
            found = fidelity[method] if method is not None else next(iter(fidelity.values()))
            values = [found.get(("teacher" if method is None else "target", steps, group)) for group in PROMPTS]
            if column and None not in values:
                pen.text((x, y + CELL + 2), " / ".join(f"{value:.1f}" for value in values) + " dB", "black", font)
    note = f"PSNR to the teacher's 50 steps: full captions / category alone. Prompts: {'; '.join(prompts)}"
    pen.text((GAP, height - LINE - GAP), note, "black", font)
    canvas.save(args.output)
    print(f"{args.output}: {', '.join(titles)}")


if __name__ == "__main__":
    main()
