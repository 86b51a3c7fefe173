"""What the benchmarks share: importing a training script, running it up to a point, describing where it ran."""

import contextlib
import datetime
import functools
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "webdataset", "pillow", "bitsandbytes", "xformers")
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Finished(BaseException):
    """Ends a script's main from within a step, before it writes a checkpoint or exports anything."""


def load_script(path):
    """Imports a training script by its path."""
    path = Path(path).resolve()
    if not path.is_file():
        raise SystemExit(f"error: there is no script {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find(owner, name):
    """An attribute that the benchmarks hook; says so where a script no longer has it."""
    if not hasattr(owner, name):
        raise SystemExit(f"error: {getattr(owner, '__name__', type(owner).__name__)} has no {name}, which the "
                         "benchmarks hook; if it was renamed, rename it in benchmarks/ too")  # fmt: skip
    return getattr(owner, name)


def run_script(script, arguments, step):
    """Runs the script's main with `step(train_step, run)` in place of train_step(run), until that raises Finished."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    original = find(script, "train_step")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    script.train_step = functools.partial(step, original)
    try:
        script.main([str(argument) for argument in arguments])
    except Finished:
        pass
    finally:
        script.train_step = original
        for number, handler in handlers.items():
            signal.signal(number, handler)


def quartiles(values):
    """(median, lower quartile, upper quartile) of numbers."""
    values = torch.tensor([float(value) for value in values], dtype=torch.float64)
    return values.quantile(torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)).tolist()


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def matmul_rate(device, dtype, clock=time.perf_counter, repeats=9, side=None):
    """FLOP/s of a large matrix product of random numbers: the median of `repeats`."""
    is_cuda = device.type == "cuda"
    side, calls = side or (8192 if is_cuda else 2048), 10 if is_cuda else 1
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(repeats + 3):
        wait(device)
        start = clock()
        for _ in range(calls):
            a @ b
        wait(device)
        seconds.append(clock() - start)
    return 2 * side**3 * calls / statistics.median(seconds[3:])


class PeakMemory:
    """Peak memory since `reset`, in GiB: of the allocator on CUDA, else resident, of this process without workers."""

    def __init__(self, device):
        self.is_cuda = device.type == "cuda"

    def reset(self):
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # forgets the peak so far, that of loading

    def read(self):
        if self.is_cuda:
            return torch.cuda.max_memory_allocated() / 2**30
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 2**20


def describe_models(models):
    """{name: millions of parameters, their bytes, devices and dtypes} of the networks of a run."""
    found, seen = {}, set()
    for name, model in vars(models).items():
        if isinstance(model, torch.nn.Module) and id(model) not in seen:  # a target without decay is the student
            seen.add(id(model))
            parameters = list(model.parameters())
            size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
            places = {f"{p.device.type} {str(p.dtype).removeprefix('torch.')}" for p in parameters}
            found[name] = {"millions": sum(p.numel() for p in parameters) / 1e6, "bytes": size, "on": sorted(places)}
    return found


def format_models(found):
    """A line for each network of describe_models."""
    return [f"{name}: {model['millions']:.1f} M, {model['bytes'] / 2**30:.2f} GiB, {', '.join(model['on'])}"
            for name, model in found.items()]  # fmt: skip


def describe(source=__file__):
    """Date, command, commit of `source`, machine and versions: what every result carries."""
    git = ["git", "-C", str(Path(source).resolve().parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = commit and subprocess.run([*git, "diff", "--quiet", "HEAD", "--", str(Path(source).resolve())]).returncode
    models = []
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join(["python", "benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
            "commit": (commit or "unknown") + ("+changes" if changed else ""),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "cpu": f"{os.cpu_count()} × {models[0] if models else 'unknown'}",
            "threads": torch.get_num_threads(), "versions": versions}  # fmt: skip


def write_result(path, result, table):
    """Prints the table, and writes it as .md and the numbers as .json where a path is given."""
    print(table, flush=True)
    if path:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        about = "\n".join(f"{key}: {result[key]}" for key in ("date", "command", "commit", "gpu", "cpu", "versions"))
        path.with_suffix(".md").write_text(f"```\n{about}\n\n{table}\n```\n", encoding="utf-8")
