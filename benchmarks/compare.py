"""Two versions of a training script in turn, A B A B, and the ratio of their images/s pair by pair.

    python benchmarks/compare.py HEAD~1 HEAD --scale small --mixed_precision bf16
    python benchmarks/compare.py "" "--gradient_checkpointing" --rounds 4 --scale small

A and B are commits, checked out with git worktree into a temporary folder; `.`, the working tree; or flags of the
script (starting with `-`; empty: none). The other flags are throughput.py's.
"""

import argparse
import contextlib
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from common import describe, quartiles, write_result

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ("images_per_s", "peak_memory_gib", "overhead_share", "first_step_s")


@contextlib.contextmanager
def prepare(side, script, folder):
    """The script's path and the additional flags that `side` means."""
    if side == "" or side.startswith("-"):
        yield script, shlex.split(side)
    elif side == ".":
        yield script, []
    else:
        git = ["git", "-C", str(script.parent)]
        top = Path(subprocess.check_output([*git, "rev-parse", "--show-toplevel"], text=True).strip())
        commit = subprocess.run([*git, "rev-parse", "--verify", "--quiet", side + "^{commit}"], capture_output=True)
        if commit.returncode:
            raise SystemExit(
                f"error: {side!r} is neither a commit nor '.' nor flags of the script (which start with -)"
            )
        tree = Path(folder, f"tree-{commit.stdout.decode().strip()}")
        is_new = not tree.exists()
        if is_new:
            subprocess.run([*git, "worktree", "add", "--detach", "--quiet", str(tree), side], check=True)
        try:
            yield tree / script.relative_to(top), []
        finally:
            if is_new:
                subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)


def run_throughput(script, flags, path):
    """One run of throughput.py in a process of its own; returns its numbers."""
    command = [
        sys.executable,
        str(Path(__file__).with_name("throughput.py")),
        "--script",
        str(script),
        "--json",
        str(path),
    ]
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {shlex.join([*command, *flags])} failed:\n{done.stderr[-2000:]}")
    return json.loads(path.read_text(encoding="utf-8"))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument("--script", default=str(ROOT / "train_lcm_distill_sd_wds.py"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--material", help="folder that keeps pipelines and shards for the next run")
    parser.add_argument("--json", help="where to write the numbers, and beside them the table as .md")
    argv = list(sys.argv[1:] if argv is None else argv)
    sides, rest = argv[:2], argv[2:]  # by hand: argparse takes "--compile" for one of its own flags
    if len(sides) < 2 or sides[0] in ("-h", "--help"):
        parser.parse_args(["--help"])
    options, flags = parser.parse_known_args(["A", "B", *rest])
    runs = {"A": [], "B": []}
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        script, material = Path(options.script).resolve(), options.material or str(Path(folder, "material"))
        prepared = [stack.enter_context(prepare(side, script, folder)) for side in sides]
        for round_number in range(options.rounds):
            for name, (path, more) in zip(runs, prepared, strict=True):
                result = run_throughput(path, ["--material", material, *flags, *more], Path(folder, "result.json"))
                runs[name].append(result)
                print(f"round {round_number + 1}, {name}: {result['images_per_s']:.4g} images/s", flush=True)
    ratios = [b["images_per_s"] / a["images_per_s"] for a, b in zip(*runs.values(), strict=True)]
    median, low, high = quartiles(ratios)
    lines = [f"A: {sides[0] or '(no flags)'}    B: {sides[1] or '(no flags)'}    {' '.join(flags)}",
             f"{'':18}{'A':>12}{'B':>12}  medians of {options.rounds}"]  # fmt: skip
    for number in NUMBERS:
        values = [quartiles(run[number] for run in side)[0] for side in runs.values()]
        lines.append(f"{number:18}{values[0]:12.4g}{values[1]:12.4g}")
    lines.append(f"B is {median:.3f} × as fast as A, pair by pair: {', '.join(f'{ratio:.3f}' for ratio in ratios)}")
    numbers = {name: [{number: run[number] for number in NUMBERS} for run in side] for name, side in runs.items()}
    result = {**describe(options.script), "sides": sides, "flags": flags, **numbers, "ratios": ratios,
              "ratio_quartiles": [median, low, high]}  # fmt: skip
    write_result(options.json, result, "\n".join(lines))
    return result


if __name__ == "__main__":
    main()
