"""Does a resumed run end in the weights of one that was not stopped? Through the script's command line.

    python benchmarks/resume_check.py --scale small --mixed_precision bf16 [flags of the script]

Three runs: n steps straight, the same again, and one that goes on from the first one's checkpoint at n/2. The second
tells how far apart two equal runs end on this device, with --deterministic.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import describe, write_result
from safetensors.torch import load_file
from throughput import make_parser, script_arguments


def run_all(script, runs):
    """Runs the script with each of `runs`, arguments, at the same time."""
    start = [sys.executable, "-W", "ignore", script]
    jobs = [subprocess.Popen([*start, *map(str, arguments)], text=True, stderr=subprocess.PIPE) for arguments in runs]
    errors = [job.communicate()[1] for job in jobs]
    for job, text in zip(jobs, errors, strict=True):
        if job.returncode:
            raise SystemExit(f"error: a run ended with status {job.returncode}:\n{text[-3000:]}")


def compare(folder, other, start):
    """Largest difference of two checkpoints' weights, relative to the largest change since `start`."""
    differences = {}
    for name in ("student.safetensors", "target.safetensors"):
        a, b, first = (load_file(path / name) for path in (folder, other, start))
        differences[name] = max((a[key] - b[key]).abs().max().item() for key in a)
        change = max((a[key] - first[key]).abs().max().item() for key in a)
        differences[name] = differences[name] / change if change else float("nan")
    return differences


def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=6, help="n, even")
    options, flags = parser.parse_known_args(argv)
    half = f"checkpoint-{options.steps // 2}"
    with tempfile.TemporaryDirectory() as folder:
        straight, again, resumed = (Path(folder, name) for name in ("straight", "again", "resumed"))
        arguments = [*script_arguments(options, flags, folder), "--deterministic", "--max_train_steps", options.steps,
                     "--checkpointing_steps", options.steps // 2, "--learning_rate", "1e-4"]  # fmt: skip
        run_all(options.script, [[*arguments, "--output_dir", output] for output in (straight, again)])
        shutil.copytree(straight / half, resumed / half)
        run_all(options.script, [[*arguments, "--output_dir", resumed, "--resume_from_checkpoint", "latest"]])
        last = [path / f"checkpoint-{options.steps}" for path in (straight, again, resumed)]
        repeated, resumption = (compare(last[0], other, straight / half) for other in last[1:])
    worst, noise = max(resumption.values()), max(repeated.values())
    equal = "bitwise equal" if worst == 0 else "within repetition" if worst <= 3 * noise else "DIFFERENT"
    table = (f"resume ({options.mixed_precision}, {'cuda' if torch.cuda.is_available() else 'cpu'}): {equal}; largest "
             f"difference of weights / largest change: {worst:.2e}, of a repeated run: {noise:.2e}")  # fmt: skip
    result = {**describe(options.script), "verdict": equal, "resumed": resumption, "repeated": repeated,
              "mixed_precision": options.mixed_precision, "flags": flags}  # fmt: skip
    write_result(options.json, result, table)
    return result


if __name__ == "__main__":
    raise SystemExit(int(main()["verdict"] == "DIFFERENT"))
