"""How fast a training script runs, where a step's time goes, and how far it is from what the machine can do.

    python benchmarks/throughput.py --script train_lcm_distill_sd_wds.py --scale small --batch_size 4 \
        --mixed_precision bf16 [--compare_baseline] [--json benchmarks/results/name.json] [flags of the script]

Runs the script itself on random weights and made-up photographs: warm-up, then measured steps. On CUDA those steps
wait for nothing (they are timed with events); the stages are timed in further steps that wait for the device around
each stage. On a CPU the same steps give both. The floor is the time that the counted FLOPs take at the rate of a large
matrix product, measured on the same machine in the same precision.
"""

import argparse
import collections
import contextlib
import functools
import tempfile
import time
from pathlib import Path

import torch
from common import (
    DTYPES,
    Finished,
    PeakMemory,
    describe,
    find,
    load_script,
    matmul_rate,
    quartiles,
    run_script,
    wait,
    write_result,  # fmt: skip
)
from material import add_material_args, encode_shards, make_material
from pipelines import SCALES
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

NETWORKS = ("text", "VAE", "teacher", "target", "student forward", "backward")
OVERHEAD = ("data", "clip + optimizer", "EMA", "logging", "rest")
ROOT = Path(__file__).resolve().parents[1]


def flop_counter():
    """PyTorch's counter, with the CPU's attention kernel, which it does not know."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return FlopCounterMode(display=False, custom_mapping={
        forward: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        backward: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])})  # fmt: skip


class Stages:
    """Adds up the seconds, or while a FLOP counter is set the FLOPs, of named parts of a step; the outermost counts."""

    def __init__(self, clock=time.perf_counter):
        self.totals, self.is_on, self.is_inside, self.counter = collections.Counter(), False, False, None
        self.device, self.clock = torch.device("cpu"), clock

    def now(self):
        if self.counter:
            return self.counter.get_total_flops()
        wait(self.device)
        return self.clock()

    @contextlib.contextmanager
    def stage(self, name):
        if not self.is_on or self.is_inside:
            yield
            return
        self.is_inside, start = True, self.now()
        try:
            yield
        finally:
            self.totals[name] += self.now() - start
            self.is_inside = False

    def hook(self, owner, attribute, name):
        """Replaces a function by one that is timed as stage `name`, and returns what undoes that."""
        function = find(owner, attribute)

        @functools.wraps(function)
        def timed(*args, **kwargs):
            with self.stage(name(*args) if callable(name) else name):
                return function(*args, **kwargs)

        setattr(owner, attribute, timed)
        return functools.partial(setattr, owner, attribute, function)

    def hook_script(self, script):
        """Hooks what can be hooked before the run; the batches of the FLOP count are cut down to one image."""
        reader, names = find(script, "BatchReader"), {}
        self.names, self.has_teacher = names, find(script, "METHOD").has_teacher
        undo = [self.hook(script, attribute, name) for attribute, name in
                {"encode_images": "VAE", "encode_prompts": "text", "guided_prediction": "teacher",
                 "log_metrics": "logging", "update_averages": "EMA"}.items()]  # fmt: skip
        undo.append(self.hook(find(script, "Denoiser"), "__call__", lambda net, *_: names.get(id(net), "teacher")))
        next_batch = find(reader, "next_batch")

        def one_image(reader):
            batch = next_batch(reader)
            if self.counter:
                is_column = {name: torch.is_tensor(value) or name == "captions" for name, value in batch.items()}
                batch = {name: value[:1] if is_column[name] else value for name, value in batch.items()}
            return batch

        reader.next_batch = functools.wraps(next_batch)(one_image)
        undo += [functools.partial(setattr, reader, "next_batch", next_batch), self.hook(reader, "next_batch", "data")]
        return undo

    def hook_run(self, run):
        """Hooks the objects that exist only once the run has started."""
        nets = find(run, "nets")
        self.device = run.accelerator.device
        self.names |= {id(nets["target"]): "target", id(nets["student"]): "student forward"}
        self.hook(run.accelerator, "backward", "backward")
        self.hook(run.accelerator, "clip_grad_norm_", "clip + optimizer")
        for attribute in ("step", "zero_grad"):
            self.hook(run.optimizer, attribute, "clip + optimizer")

    def count_flops(self, train_step, run):
        """FLOPs of one image by stage, counted in a step of the script on batches of one: eager, nothing recomputed."""
        for unet in {net.base for net in run.nets.values()}:
            if run.args.gradient_checkpointing:
                unet.disable_gradient_checkpointing()
            if run.args.enable_xformers_memory_efficient_attention:
                unet.disable_xformers_memory_efficient_attention()
        self.totals.clear()
        with flop_counter() as self.counter, torch.compiler.set_stance("force_eager"):
            self.is_on = True
            train_step(run)
            total = self.counter.get_total_flops()
        self.counter, images = None, run.args.gradient_accumulation_steps
        return {**{name: self.totals[name] / images for name in NETWORKS}, "all": total / images}


class Probe:
    """Stands in for the script's train_step: counts the steps, measures them, and ends the run after the last."""

    def __init__(self, options, stages):
        self.options, self.stages, self.index, self.marks, self.result = options, stages, 0, [], {}
        self.start = time.perf_counter()

    def mark(self):
        if self.stages.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(self.stages.clock())

    def intervals(self):
        wait(self.stages.device)
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [a.elapsed_time(b) / 1000 if isinstance(a, torch.cuda.Event) else b - a for a, b in pairs]

    def __call__(self, train_step, run):
        options, stages = self.options, self.stages
        if self.index == 0:
            stages.hook_run(run)
            self.memory = PeakMemory(stages.device)
        is_cuda = stages.device.type == "cuda"
        measured = options.warmup + options.steps
        if self.index == options.warmup:
            wait(stages.device)
            self.memory.reset()
            stages.is_on = not is_cuda
        if options.warmup <= self.index <= measured:
            self.mark()
        if self.index == measured:
            self.end_measuring(run)
            stages.is_on, self.profile_start = is_cuda, time.perf_counter()
        if self.index == measured + (options.profile if is_cuda else 0):
            self.finish(train_step, run, is_cuda)
        train_step(run)
        if self.index == 0:
            wait(stages.device)
            self.result["first_step_s"] = time.perf_counter() - self.start
        self.index += 1

    def end_measuring(self, run):
        args, seconds = run.args, self.intervals()
        images = args.train_batch_size * args.gradient_accumulation_steps
        self.result |= {"steps": len(seconds), "images_per_s": images * len(seconds) / sum(seconds),
                        "s_per_step": sum(seconds) / len(seconds), "s_per_step_quartiles": quartiles(seconds),
                        "peak_memory_gib": self.memory.read(), "memory_of": self.stages.device.type,
                        "images_per_step": images}  # fmt: skip
        if self.stages.device.type == "cuda":
            self.result["reserved_memory_gib"] = torch.cuda.max_memory_reserved() / 2**30

    def finish(self, train_step, run, is_cuda):
        """Closes the stage table, measures the matrix rate and the baseline, counts FLOPs, ends the run."""
        stages, result, options = self.stages, self.result, self.options
        steps = options.profile if is_cuda else options.steps
        wait(stages.device)
        total = time.perf_counter() - self.profile_start if is_cuda else result["s_per_step"] * steps
        seconds = {name: stages.totals[name] / steps for name in (*NETWORKS, *OVERHEAD)}
        seconds["rest"] = total / steps - sum(seconds.values())
        unused = {"logging", *(("text", "VAE") if options.encoded else ())}
        is_used = {"teacher": stages.has_teacher, "EMA": run.args.ema_decay or run.args.export_ema_decay}
        unused |= {name for name in is_used if not is_used[name]}
        if missing := [name for name, value in seconds.items() if value == 0 and name not in unused]:
            raise SystemExit(f"error: {', '.join(missing)} took no time: the script no longer calls what "
                             "throughput.py hooks for it")  # fmt: skip
        stages.is_on = False
        result |= {"profiled_s_per_step": total / steps, "stages_s": seconds,
                   "shares": {name: value * steps / total for name, value in seconds.items()}}  # fmt: skip
        result["overhead_share"] = sum(result["shares"][name] for name in OVERHEAD)
        nets = {"student": run.nets["student"].unet, "text encoder": run.models.text_encoders, "VAE": run.models.vae}
        result["parameters_m"] = {k: sum(p.numel() for p in net.parameters()) / 1e6 for k, net in nets.items()}
        precision = run.args.mixed_precision
        if is_cuda:
            torch.cuda.empty_cache()  # room for the matrices
        for name in {precision, "bf16"} if is_cuda else {precision}:
            result[f"matmul_flops_{name}"] = matmul_rate(stages.device, DTYPES[name], stages.clock)
        if options.compare_baseline:
            result["baseline"] = compare_baseline(train_step, run, options.pairs, stages)
        result["flops_per_image"] = stages.count_flops(train_step, run)
        result |= derive(result, precision)
        raise Finished


def derive(result, precision):
    """Achieved FLOP/s and the floor, from the measured rate of matrix products."""
    flops = result["flops_per_image"]["all"]
    achieved, rate = flops * result["images_per_s"], result[f"matmul_flops_{precision}"]
    derived = {"achieved_flops": achieved, "share_of_matmul": achieved / rate,
               "floor_s_per_step": flops * result["images_per_step"] / rate}  # fmt: skip
    if "matmul_flops_bf16" in result:
        derived["share_of_bf16_matmul"] = achieved / result["matmul_flops_bf16"]
    return derived


def compare_baseline(train_step, run, pairs, stages):
    """Steps of the script and of baseline.py in turn, after two of each; seconds, and their ratio pair by pair."""
    from baseline import Baseline

    plain = Baseline(run.args, stages.device)
    sides = {"script": lambda: train_step(run), "baseline": lambda: plain.step(run.reader.next_batch())}
    seconds = {name: [] for name in sides}
    for _ in range(pairs + 2):
        for name, step in sides.items():
            start = stages.now()
            step()
            seconds[name].append(stages.now() - start)
        run.step += 1
    seconds = {name: values[2:] for name, values in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["script"], seconds["baseline"], strict=True)]
    return {"seconds": seconds, "speedups": ratios, "speedup_quartiles": quartiles(ratios)}


def format_table(result):
    flops, images = result["flops_per_image"], result["images_per_step"]
    lines = [f"{'stage':18}{'s/step':>10}{'share':>9}{'GFLOP':>10}{'GFLOP/s':>10}"]
    for name, seconds in result["stages_s"].items():
        line = f"{name:18}{seconds:10.4f}{result['shares'][name]:9.1%}"
        if flops.get(name):
            line += f"{flops[name] * images / 1e9:10.1f}{flops[name] * images / seconds / 1e9:10.0f}"
        lines.append(line)
    median, low, high = result["s_per_step_quartiles"]
    parameters = ", ".join(f"{name} {count:.1f} M" for name, count in result["parameters_m"].items())
    lines += [
        f"all but networks  {result['profiled_s_per_step'] * result['overhead_share']:10.4f}"
        f"{result['overhead_share']:9.1%}",
        f"{result['scale']}, batch {result['batch_size']}, {result['mixed_precision']} {' '.join(result['flags'])}"
        + ("; seconds are the process's CPU time: waiting is not seen" if result["clock"] == "cpu" else ""),
        f"images/s          {result['images_per_s']:.4g}",
        f"s/step            median {median:.4f} (quartiles {low:.4f} … {high:.4f}), {result['steps']} steps; "
        f"first step after {result['first_step_s']:.1f} s",
        f"floor             {result['floor_s_per_step']:.4f} s/step; achieved {result['achieved_flops'] / 1e12:.4g} "
        f"TFLOP/s, {result['share_of_matmul']:.1%} of a matrix product's",
        f"FLOPs per image   {flops['all'] / 1e9:.1f} G; parameters: {parameters}",
        f"peak memory       {result['peak_memory_gib']:.2f} GiB"
        + (" on the device" if result["memory_of"] == "cuda" else " resident, without loader workers"),
    ]
    if "share_of_bf16_matmul" in result:
        rate = result["matmul_flops_bf16"] / 1e12
        lines.append(f"bf16 matrix rate  {rate:.4g} TFLOP/s measured; reached {result['share_of_bf16_matmul']:.1%}")
    if "baseline" in result:
        median, low, high = result["baseline"]["speedup_quartiles"]
        lines.append(f"plain loop        script is {median:.3f} × as fast (quartiles {low:.3f} … {high:.3f})")
    return "\n".join(lines)


def make_parser(description):
    """The flags that all tools which run a training script share; the rest of the command line goes to the script."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--script", default=str(ROOT / "train_lcm_distill_sd_wds.py"))
    parser.add_argument("--scale", choices=SCALES, default="small")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--mixed_precision", choices=list(DTYPES), default="bf16")
    parser.add_argument("--encoded", action="store_true", help="shards that tools/prepare_shards.py encoded")
    parser.add_argument("--json", help="where to write the numbers, and beside them the table as .md")
    add_material_args(parser)
    return parser


def parse_args(argv):
    parser = make_parser(__doc__)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="measured steps; a multiple of --logging_steps")
    parser.add_argument("--profile", type=int, default=10, help="CUDA: further steps that time the stages")
    parser.add_argument("--compare_baseline", action="store_true", help="the plain loop in turn with the script")
    parser.add_argument("--pairs", type=int, default=8, help="steps of each in --compare_baseline")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall",
                        help="cpu: this process's CPU time, for busy machines; set OMP_NUM_THREADS=1")  # fmt: skip
    return parser.parse_known_args(argv)


def script_arguments(options, flags, folder):
    """Makes pipeline and shards, and names them to the script; `flags` come last and win."""
    material = options.material or str(Path(folder, "material"))
    pipeline, shards = make_material(material, options.scale, options.shards, options.sides)
    if options.encoded:
        resolution, precision = SCALES[options.scale][0], options.mixed_precision
        shards = encode_shards(material, options.scale, resolution, options.shards, options.sides, precision)
        flags = ["--center_crop", *flags]
    return [*run_arguments(options, pipeline, shards, folder), *flags]


def run_arguments(options, pipeline, shards, folder):
    """A run that goes on until it is ended, and does nothing but steps."""
    return ["--pretrained_teacher_model", pipeline, "--train_shards_path_or_url", shards, "--max_train_steps", 10**6,
            "--output_dir", Path(folder, "run"), "--resolution", SCALES[options.scale][0], "--report_to", "none",
            "--train_batch_size", options.batch_size, "--mixed_precision", options.mixed_precision,
            "--validation_steps", 0, "--checkpointing_steps", 0, "--shuffle_buffer_size", 24,
            "--dataloader_num_workers", 2]  # fmt: skip


def main(argv=None):
    options, flags = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        arguments = script_arguments(options, flags, folder)
        start = time.perf_counter()
        clock = time.process_time if options.clock == "cpu" else time.perf_counter
        script, stages = load_script(options.script), Stages(clock)
        probe = Probe(options, stages)
        probe.start = start
        undo = stages.hook_script(script)
        try:
            run_script(script, arguments, probe)
        finally:
            for restore in reversed(undo):
                restore()
    if not probe.result.get("floor_s_per_step"):
        raise SystemExit("error: the run ended before its measured steps did")
    result = {**describe(options.script), "script": Path(options.script).name, "scale": options.scale,
              "batch_size": options.batch_size, "mixed_precision": options.mixed_precision, "flags": flags,
              "clock": options.clock, **probe.result}  # fmt: skip
    write_result(options.json, result, format_table(result))
    return result


if __name__ == "__main__":
    main()
