#!/usr/bin/env bash
# Everything that only a GPU shows, within 9 minutes on one card of 24 GiB or more, without a network. A table comes last.
#
#   bash benchmarks/gpu_check.sh [FOLDER]     writes FOLDER/gpu_check.{md,json,log}; default benchmarks/results
#
# Wheels (versions as in requirements.txt): torch for the card's CUDA with its triton, diffusers, transformers,
# accelerate, huggingface_hub, tokenizers, safetensors, numpy, pillow, webdataset, tqdm, and what these need: braceexpand,
# filelock, fsspec, httpx, importlib_metadata, jinja2, packaging, psutil, pyyaml, regex, requests, sympy. Optional:
# bitsandbytes (part 8bit), xformers of the same torch (part xformers), a C compiler (parts with compile). A part whose
# wheel is missing fails by itself and says why.
#
# Environment: PYTHON; BUDGET in seconds (520); PARTS, the names of some parts; BATCH, else chosen by the card's memory;
# MATERIAL, a folder where pipelines and shards stay for the next call; DRY=1 tries the script on a CPU, at scale tiny in
# bf16: what needs CUDA is left out.
set -u
cd "$(dirname "$0")/.."
SCRIPT=train_lcm_distill_sd_wds.py
BUDGET=${BUDGET:-520} DRY=${DRY:-0} PARTS=${PARTS:-} RESULTS=${1:-benchmarks/results}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
WORK=$(mktemp -d)
MATERIAL=${MATERIAL:-$WORK/material}
mkdir -p "$RESULTS"

if [ "$DRY" = 1 ]; then
    export CUDA_VISIBLE_DEVICES= ACCELERATE_USE_CPU=true
    SCALE=tiny CHECKS=tiny BATCH=${BATCH:-2} COUNTS="--warmup 1 --steps 2 --profile 2" WORKERS=1
else
    "$PYTHON" -c 'import torch; assert torch.cuda.is_available()' || { echo "no CUDA device; DRY=1 tries this on a CPU"; exit 1; }
    SCALE=sd15 CHECKS=small COUNTS="--warmup 4 --steps 10 --profile 5" WORKERS=8
    # memory.py counts 18 GiB for weights, gradients and optimizer, and 0.9 GiB an image; room for what it cannot count
    BATCH=${BATCH:-$("$PYTHON" -c 'import torch
gib = torch.cuda.mem_get_info()[1] / 2**30
batch = int(max(1, min(32, (gib - 22) / 1.5)))
print(batch // 8 * 8 or batch)')}
fi

summary() {
    cat "$WORK"/*.log > "$RESULTS/gpu_check.log" 2> /dev/null
    "$PYTHON" - "$WORK" "$RESULTS" << 'PYTHON_END'
import json, pathlib, re, sys

work, results = map(pathlib.Path, sys.argv[1:])
lines, parts, about = [], {}, None
header = ("part", "batch", "images/s", "s/step", "TFLOP/s", "of bf16", "GiB", "data", "overhead", "1st step")
lines.append(f"{header[0]:26}" + "".join(f"{name:>10}" for name in header[1:]))
notes = []
for row in (work / "parts").read_text().splitlines() if (work / "parts").exists() else []:
    name, status, seconds = row.split()
    path, log = work / f"{name}.json", (work / f"{name}.log").read_text(errors="replace").strip().splitlines()
    result = json.loads(path.read_text()) if path.exists() else None
    parts[name] = {"status": int(status), "seconds": int(seconds), "result": result}
    about = about or result
    if result and "images_per_s" in result:
        share = result.get("share_of_bf16_matmul", result["share_of_matmul"])
        cells = (result["batch_size"], f"{result['images_per_s']:.2f}", f"{result['s_per_step_quartiles'][0]:.3f}",
                 f"{result['achieved_flops'] / 1e12:.4g}", f"{share:.1%}", f"{result['peak_memory_gib']:.2f}",
                 f"{result['shares']['data']:.1%}", f"{result['overhead_share']:.1%}", f"{result['first_step_s']:.1f}")
        lines.append(f"{name:26}" + "".join(f"{cell:>10}" for cell in cells))
    elif result:
        waits = [" < ".join(reversed(frames[-3:])) for frames in result.get("waits", [])]
        notes.append(f"{name:26}  {result['verdict']} {' '.join(waits)}")
    elif int(status):
        why = "out of time" if status in ("124", "137") else "left out: too little time" if status == "125" else None
        errors = [line for line in log if re.search(r"error|Error", line)]
        notes.append(f"{name:26}  FAILED: {why or (errors or log or ['no output'])[-1][:150]}")
if about:
    rate = next((p["result"]["matmul_flops_bf16"] for p in parts.values() if p["result"] and "matmul_flops_bf16" in p["result"]), None)
    keys = ("date", "commit", "gpu", "cpu", "versions")
    notes += [f"{key}: {about[key]}" for key in keys] + ([f"bf16 matrix rate: {rate / 1e12:.4g} TFLOP/s"] if rate else [])
table = "\n".join([*lines, *notes])
(results / "gpu_check.json").write_text(json.dumps(parts, indent=1) + "\n")
(results / "gpu_check.md").write_text(f"`bash benchmarks/gpu_check.sh`\n\n```\n{table}\n```\n")
print("\n" + table)
PYTHON_END
    rm -rf "$WORK"
}
trap summary EXIT
trap 'exit 143' TERM INT

# part NAME LIMIT COMMAND…: within LIMIT seconds and the budget; never ends the script
part() {
    local name=$1 limit=$((DRY == 1 ? 4 * $2 : $2)) left=$((BUDGET - SECONDS)) start=$SECONDS status
    shift 2
    [ -n "$PARTS" ] && [ "$name" != material ] && [[ " $PARTS " != *" $name "* ]] && return 0
    if [ "$left" -lt 15 ]; then
        status=125
        : > "$WORK/$name.log"
    else
        [ "$limit" -gt "$left" ] && limit=$left
        timeout -k 5 "$limit" "$@" > "$WORK/$name.log" 2>&1 < /dev/null
        status=$?
    fi
    echo "$name $status $((SECONDS - start))" >> "$WORK/parts"
    printf '%4d s  %-26s status %d after %d s\n' "$SECONDS" "$name" "$status" "$((SECONDS - start))"
    return "$status"
}

# speed NAME LIMIT PRECISION FLAGS…: throughput.py, once more with half the batch where memory runs out
speed() {
    local name=$1 limit=$2 precision=$3 batch=$BATCH
    shift 3
    set -- --mixed_precision "$precision" --dataloader_num_workers "$WORKERS" "$@"
    # shellcheck disable=SC2086
    set -- "$PYTHON" benchmarks/throughput.py --script "$SCRIPT" --scale "$SCALE" $COUNTS --material "$MATERIAL" "$@"
    part "$name" "$limit" "$@" --batch_size "$batch" --json "$WORK/$name.json" && return 0
    if grep -qi "out of memory" "$WORK/$name.log" 2> /dev/null && [ "$batch" -gt 1 ]; then
        part "$name-half-batch" "$limit" "$@" --batch_size $((batch / 2)) --json "$WORK/$name-half-batch.json"
    fi
}

check() { # check NAME LIMIT TOOL FLAGS…
    local name=$1 limit=$2 tool=$3
    shift 3
    part "$name" "$limit" "$PYTHON" "benchmarks/$tool.py" --script "$SCRIPT" --scale "$CHECKS" \
        --material "$MATERIAL" --json "$WORK/$name.json" "$@"
}

[ "$DRY" = 1 ] || nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
part material 150 "$PYTHON" benchmarks/material.py "$MATERIAL" --scale "$SCALE" || { cat "$WORK/material.log"; exit 1; }
speed bf16 120 bf16
check sync-bf16 60 sync_check --mixed_precision bf16
check resume-bf16 90 resume_check --mixed_precision bf16
speed gradient-checkpointing 90 bf16 --gradient_checkpointing
if [ "$DRY" != 1 ]; then
    speed bf16-compile 230 bf16 --compile
    speed fp16 90 fp16
    speed 8bit 90 bf16 --optimizer adamw8bit
    speed float32-norms 90 bf16 --no-half_precision_norms
    speed encoded 120 bf16 --encoded
    speed xformers 90 bf16 --enable_xformers_memory_efficient_attention
fi
speed offload-ema 90 bf16 --offload_ema
check sync-offload-ema 60 sync_check --mixed_precision bf16 --offload_ema
if [ "$DRY" != 1 ]; then
    check sync-fp16 60 sync_check --mixed_precision fp16
    speed fp16-compile 230 fp16 --compile
fi
exit 0
