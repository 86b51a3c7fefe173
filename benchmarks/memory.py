"""How much device memory a training step needs, at any size, counted without a GPU: on tensors without contents.

    python benchmarks/memory.py --scale sd15 --batch_sizes 1 8 24 --mixed_precision bf16 [flags of the script]

Runs the script's own start and train_step on a device that exists by name alone (PyTorch's fake tensors: shapes, dtypes
and devices, no numbers), with CUDA's autocast, and adds up the bytes of the tensors alive there. On a GPU come on top:
the context, the workspaces of cuBLAS and cuDNN, what the allocator rounds up. Not counted: --compile, fp16, xformers,
paged optimizers, a quantised base. 8-bit optimizers are bitsandbytes' own, with the states they make and an update that
does nothing. With --ddp the student is in PyTorch's DistributedDataParallel, as the script's accelerator would set it
up, in a group that sends nothing: what its buckets hold is counted, not what NCCL allocates for itself.

A line that reads a value back from the device, for which the host would have to wait (it is told 0 here), or that
copies in a way that the host waits for, is reported; one that mixes tensors of host and device ends the count.
"""

import argparse
import contextlib
import copy
import functools
import os
import tempfile
import traceback
import weakref
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import PartialState
from common import (
    DTYPES,
    Finished,
    describe,
    describe_models,
    find,
    format_models,
    load_script,
    run_script,
    write_result,  # fmt: skip
)
from material import make_shards
from pipelines import SCALES, make_pipeline
from throughput import ROOT, Stages, run_arguments
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "fakegpu"
WAITS = (DataDependentOutputException, DynamicOutputShapeException, FakeTensorDeviceMismatchError)
READ = torch.ops.aten._local_scalar_dense.default
STAGES = ("text", "VAE", "teacher", "target", "student forward", "backward", "clip + optimizer", "EMA")
UNCOUNTED = ("--compile", "--enable_xformers_memory_efficient_attention", "paged", "--base_precision")
# autocast on CUDA runs these in half precision, those in float32, and all else as its inputs are
HALF = ("linear", "conv2d", "matmul", "mm", "bmm", "addmm", "baddbmm")
SINGLE = ("group_norm", "layer_norm", "softmax.int", "mse_loss", "pow.Tensor_Scalar", "exp", "log", "sum")


class Backend(_DummyBackendModule):
    """The module torch.fakegpu: what autocast and checkpointing ask of a device's module."""

    def get_amp_supported_dtype(self):
        return list(DTYPES.values())

    def get_rng_state(self, _device=None):
        return torch.zeros(1, dtype=torch.uint8, device="cpu")

    def set_rng_state(self, _state, _device=None):
        pass

    @contextlib.contextmanager
    def device(self, _device):
        yield


class Autocast:
    """CUDA's autocast for the device: a trained parameter is cast once, and its copy kept until autocast ends."""

    def __init__(self):
        self.copies, self.clear = {}, torch.clear_autocast_cache
        others = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
        others.fallback(torch.library.fallthrough_kernel)
        library = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
        for names, dtype in ((HALF, None), (SINGLE, torch.float32)):
            for name in names:
                packet, _, overload = name.partition(".")
                kernel = getattr(getattr(torch.ops.aten, packet), overload or "default")
                library.impl(name, functools.partial(self.run, kernel, dtype))
        self.libraries = library, others
        torch.clear_autocast_cache = self.forget

    def forget(self):
        self.copies.clear()
        self.clear()

    def cast(self, value, dtype):
        if isinstance(value, (list, tuple)):
            return type(value)(self.cast(item, dtype) for item in value)
        if not (torch.is_tensor(value) and value.is_floating_point() and value.device.type == NAME):
            return value
        if value.dtype == dtype or not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self.copies:
            self.copies[id(value)] = value.to(dtype)
        return self.copies[id(value)]

    def run(self, kernel, dtype, *args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet("AutocastPrivateUse1")):
            dtype = dtype or torch.get_autocast_dtype(NAME)
            return kernel(*self.cast(args, dtype), **{name: self.cast(value, dtype) for name, value in kwargs.items()})


def attention(plain, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
    """Attention that keeps no matrix of scores, as the kernels on CUDA; on other devices the `plain` one."""
    if q.device.type != NAME:
        return plain(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, **options)
    if torch.is_autocast_enabled(NAME):
        q, k, v = (value.to(torch.get_autocast_dtype(NAME)) for value in (q, k, v))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return flash(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


def convert(module, function, recurse=True):
    """nn.Module._apply by new parameters: PyTorch swaps fake ones in place, which fails for those that were filled."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for name, value in module._parameters.items():
        old = None if value is None else value.data
        if old is not None and (new := function(old)) is not old:  # an optimizer may hold those that stay as they are
            module._parameters[name] = torch.nn.Parameter(new, value.requires_grad)
    for name, value in module._buffers.items():
        module._buffers[name] = None if value is None else function(value)
    return module


@functools.cache
def register_device():
    """Makes the device known to PyTorch, once in a process."""
    _setup_privateuseone_for_python_backend(NAME, Backend())
    return Autocast()


class FakeMode(FakeTensorMode):
    avoid_device_init = True  # it would copy numbers that it knows to the device in earnest


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of the tensors alive, by device type; `peak`: the most on the device since it was set."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known, self.copies, self.reads = Counter(), 0, {}, Counter(), Counter()

    @staticmethod
    def line():
        """The line under way, of a script or a library."""
        frames = [f"{Path(f.filename).name}:{f.lineno} {f.line}" for f in traceback.extract_stack()
                  if "/torch/" not in f.filename and f.filename != __file__]  # fmt: skip
        return frames[-1]

    def note_copy(self, function, args, kwargs):
        """Counts copies between host and device that the host waits for, by the lines that ask for them."""
        if function is torch.ops.aten._to_copy.default:
            places = {args[0].device.type, (kwargs.get("device") or args[0].device).type}
            is_blocking = not kwargs.get("non_blocking")
        elif function is torch.ops.aten.copy_.default:
            places, is_blocking = {args[0].device.type, args[1].device.type}, not (args[2:] and args[2])
        else:
            return
        if is_blocking and len(places) == 2:
            self.copies[self.line()] += 1

    def note(self, tensor):
        storage, device = tensor.untyped_storage(), tensor.device.type
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:

            def forget(_):
                self.live[device] -= size
                del self.known[key]

            self.known[key] = weakref.ref(storage, forget)
            self.live[device] += size
            self.peak = max(self.peak, self.live[NAME])

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:  # half of all calls
            return function(*args)
        self.note_copy(function, args, kwargs or {})
        if function is READ and args[0].device.type == NAME:
            self.reads[self.line()] += 1
            return 0.0 if args[0].is_floating_point() else 0
        result = function(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(torch.Tensor, self.note, result)
        return result


class StageBytes(Stages):
    """The stages of throughput.py, but of each the most bytes alive in it, those alive when it began, and the FLOPs."""

    def __init__(self, live):
        super().__init__()
        self.live, self.peaks, self.begins = live, Counter(), Counter()

    @contextlib.contextmanager
    def stage(self, name):
        if self.is_inside:
            yield
            return
        self.is_inside, before, self.live.peak = True, self.live.peak, self.live.live[NAME]
        self.begins[name] = max(self.begins[name], self.live.peak)
        flops = self.counter.get_total_flops if self.counter else int
        start = flops()
        try:
            yield
        finally:
            self.totals[name] += flops() - start
            self.peaks[name] = max(self.peaks[name], self.live.peak)
            self.is_inside, self.live.peak = False, max(before, self.live.peak)


class Count:
    """Stands in for train_step: takes two steps at every batch size, counts the second, and ends the run."""

    def __init__(self, options, stages):
        self.options, self.stages, self.live = options, stages, stages.live
        self.rows, self.models, self.waits, self.flops = [], {}, [], None

    def count_baseline(self, run, make_batch):
        """Adds to every row what baseline.py, a plain loop over the same networks, has alive at most."""
        from baseline import Baseline

        before = self.live.live[NAME]
        plain = Baseline(run.args, run.accelerator.device)
        for row in self.rows:
            for _ in range(2):
                self.live.peak = self.live.live[NAME]
                plain.step(make_batch(row["batch_size"]))
            row["baseline"] = self.live.peak - before

    def __call__(self, train_step, run):
        live, stages, reader = self.live, self.stages, run.reader
        stages.hook_run(run)
        self.models = describe_models(run.models)
        with unset_fake_temporarily():
            batch = {k: v for k, v in reader.next_batch().items() if torch.is_tensor(v) or k == "captions"}
        reader.next_batch = lambda: make_batch(size)  # of the loop below

        def make_batch(size):
            return {k: torch.cat([v[:1]] * size) if torch.is_tensor(v) else v[:1] * size for k, v in batch.items()}

        for size in self.options.batch_sizes:
            for _ in range(2):  # the first makes gradients and the optimizer's states
                for seen in (run.history, stages.peaks, stages.begins, live.copies, live.reads):
                    seen.clear()
                resident = live.peak = live.live[NAME]
                try:
                    train_step(run)
                except WAITS as error:
                    frames = traceback.extract_tb(error.__traceback__)
                    own = [frame for frame in frames if Path(frame.filename) == Path(self.options.script).resolve()]
                    where = [f"{Path(f.filename).name}:{f.lineno} {f.line}" for f in [*own[-1:], frames[-1]]]
                    self.waits.append([f"{type(error).__name__}: {error}", *where])
                    raise Finished from error
                run.step += 1
            self.rows.append({"batch_size": size, "resident": resident, "peak": live.peak, "peaks": {**stages.peaks},
                              "begins": {**stages.begins}, "host": live.live["cpu"], "copies": {**live.copies},
                              "reads": {**live.reads}})  # fmt: skip
        if self.options.compare_baseline:
            self.count_baseline(run, make_batch)
        if self.options.flops:
            size = 1
            self.flops = stages.count_flops(train_step, run)
        raise Finished


def from_config(kind, path, subfolder=None, torch_dtype=None, dtype=None, **_):
    """Stands in for from_pretrained: a model of the configuration in a folder, without its weights."""
    if hasattr(kind, "load_config"):
        model = kind.from_config(kind.load_config(path, subfolder=subfolder))
    else:
        model = kind(kind.config_class.from_pretrained(path, subfolder=subfolder))
    return model.to(torch_dtype or dtype or torch.float32)


def copy_model(plain, value, *args):
    """deepcopy, but of a model by its configuration: PyTorch 2.13 corrupts memory where it copies fake parameters."""
    if not isinstance(value, torch.nn.Module):
        return plain(value, *args)
    return type(value).from_config(value.config).to(value.dtype).train(value.training)


class Replica(torch.nn.parallel.DistributedDataParallel):
    """DDP whose buckets stay as they are first made: it would sort them after a step, which needs numbers."""

    def _pre_forward(self, *inputs, **kwargs):
        return inputs, kwargs


def reduce_nothing(_, bucket):
    """Stands in for the all-reduce of a bucket."""
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def replicate(nets, accelerator, stack):
    """Wraps the student as accelerate would on several GPUs."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    stack.callback(lambda: torch.distributed.is_initialized() and torch.distributed.destroy_process_group())
    handler = accelerator.ddp_handler
    replica = Replica(nets["student"].unet, init_sync=False, **(handler.to_kwargs() if handler else {}))
    replica.register_comm_hook(None, reduce_nothing)
    nets["student"].unet = replica


def replacements(script, live, stack, options, flags):
    """{(owner, name): value}: how the script is led to make its models, and take its steps, on the device."""

    def make_accelerator(original, args):
        accelerator = original(args)
        for state in (PartialState(), accelerator.state):
            state.device = torch.device(NAME, 0)
        return accelerator

    def load_models(original, *args):  # from here on tensors have no contents; before, files are read and checked
        stack.enter_context(FakeMode(allow_non_fake_inputs=True))
        stack.enter_context(live)
        return original(*args)

    def prepare(original, models, args, optimizer, accelerator):
        nets, optimizer = original(models, args, optimizer, accelerator)
        if options.ddp:
            replicate(nets, accelerator, stack)
        return nets, optimizer

    functional = torch.nn.functional
    pairs = {(script, "make_accelerator"): functools.partial(make_accelerator, find(script, "make_accelerator")),
             (script, "load_models"): functools.partial(load_models, find(script, "load_models")),
             (script, "prepare"): functools.partial(prepare, find(script, "prepare")),
             (script, "step_generator"): lambda *_: torch.Generator(),
             (functional, "scaled_dot_product_attention"): functools.partial(
                 attention, functional.scaled_dot_product_attention), (torch.nn.Module, "_apply"): convert,
             (copy, "deepcopy"): functools.partial(copy_model, copy.deepcopy)}  # fmt: skip
    if any("8bit" in flag for flag in flags):
        from bitsandbytes.optim.optimizer import Optimizer8bit

        # its tables of 256 values are made by reading numbers
        pairs[Optimizer8bit, "fill_qmap"] = unset_fake_temporarily()(Optimizer8bit.fill_qmap)
    for name in ("UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel", "CLIPTextModelWithProjection"):
        if kind := getattr(script, name, None):
            pairs[kind, "from_pretrained"] = functools.partial(from_config, kind)
    return pairs


def format_table(result):
    """Bytes as GiB: what stays, the peak, and the peak of each stage, a line for each batch size. FLOPs as TFLOP."""
    names = [name for name in STAGES if any(name in row["peaks"] for row in result["rows"])]
    lines = [f"{'batch':>6}{'stays':>9}{'peak':>9}  in" + "".join(f"{name:>17}" for name in names)]
    for row in result["rows"]:
        cells = [row["resident"], row["peak"], *(row["peaks"].get(name, 0) for name in names)]
        cells = [f"{cell / 2**30:.2f}" for cell in cells]
        lines.append(f"{row['batch_size']:6}{cells[0]:>9}{cells[1]:>9}    " + "".join(f"{c:>17}" for c in cells[2:]))
    lines += format_models(result["models"])
    flags = " ".join([*result["ddp"] * ["--ddp"], *result["flags"]])
    lines.append(f"GiB, {result['scale']}, {result['mixed_precision']} {flags}; counted on tensors without contents, "
                 "not measured on a device")  # fmt: skip
    if flops := result["flops_per_image"]:
        lines.append("TFLOP an image: " + ", ".join(f"{name} {count / 1e12:.4g}" for name, count in flops.items()))
    lines += ["WAITS for the device or mixes devices: " + " < ".join(frames) for frames in result["waits"]]
    for row in result["rows"]:
        if plain := row.get("baseline"):
            lines.append(f"plain loop, batch {row['batch_size']}: {plain / 2**30:.2f}, {plain / row['peak']:.2f} times")
    last = result["rows"][-1] if result["rows"] else {"copies": {}, "reads": {}}
    for what, found in (("copies a step that the host waits for", last["copies"]),
                        ("values a step READ back from the device", last["reads"])):  # fmt: skip
        lines += [f"{count} {what}: {where}" for where, count in found.items()]
    is_free = not result["waits"] and not last["reads"]
    return "\n".join(lines + is_free * ["values read back from the device in a step: none"])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--script", default=str(ROOT / "train_lcm_distill_sd_wds.py"))
    parser.add_argument("--scale", choices=SCALES, default="sd15")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.set_defaults(batch_size=1)  # of the one that is read and repeated
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="bf16")
    parser.add_argument("--compare_baseline", action="store_true", help="also the plain loop of baseline.py (LCM)")
    parser.add_argument("--flops", action="store_true", help="also the FLOPs an image of each network")
    parser.add_argument("--ddp", action="store_true", help="with the gradients' buckets of a run on several GPUs")
    parser.add_argument("--material", help="folder that keeps what was made for the next run")
    parser.add_argument("--json", help="where to write the numbers, and beside them the table as .md")
    options, flags = parser.parse_known_args(argv)
    if refused := [flag for flag in flags if any(part in flag for part in UNCOUNTED)]:
        parser.error(f"{', '.join(refused)} cannot be counted")
    os.environ.pop("ACCELERATE_USE_CPU", None)  # with it accelerate insists on the CPU
    register_device()
    script, live = load_script(options.script), LiveBytes()
    stages = StageBytes(live)
    count = Count(options, stages)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        material = options.material or folder
        pipeline = make_pipeline(material, options.scale, weights=False)
        arguments = run_arguments(options, pipeline, make_shards(material, 1, 2, (512, 512)), folder)
        for (owner, name), value in replacements(script, live, stack, options, flags).items():
            stack.enter_context(mock.patch.object(owner, name, value))
        for undo in stages.hook_script(script):
            stack.callback(undo)
        run_script(script, [*arguments, "--dataloader_num_workers", 0, *flags], count)
    result = {**describe(options.script), "script": Path(options.script).name, "scale": options.scale,
              "mixed_precision": options.mixed_precision, "ddp": options.ddp, "flags": flags, "models": count.models,
              "rows": count.rows, "waits": count.waits, "flops_per_image": count.flops}  # fmt: skip
    write_result(options.json, result, format_table(result))
    return result


if __name__ == "__main__":
    raise SystemExit(bool(main()["waits"]))
