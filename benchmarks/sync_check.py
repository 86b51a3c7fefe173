"""Does a plain training step wait for the device? On CUDA it must not: the host would stop queueing work.

    python benchmarks/sync_check.py --scale small --mixed_precision bf16 [flags of the script]

Runs the script's own train_step under torch.cuda.set_sync_debug_mode("error"), on steps that do not log. With fp16,
accelerate reads the gradient scaler's state in every step; that is counted as a wait, too. Without CUDA the steps run
and nothing is checked. Also checks what is resident: student and target in float32, all else in the compute precision.
"""

import tempfile
import traceback
from pathlib import Path

import torch
from common import Finished, describe, describe_models, format_models, load_script, run_script, write_result
from throughput import make_parser, script_arguments

WARMUP = 3


class Check:
    """Stands in for train_step: some steps to warm up, then steps in which a wait is an error."""

    def __init__(self, steps):
        self.steps, self.index, self.waits, self.models = steps, 0, [], {}

    def __call__(self, train_step, run):
        is_cuda = run.accelerator.device.type == "cuda"
        if self.index == 0:
            self.models = describe_models(run.models)
        if self.index == WARMUP + self.steps:
            raise Finished
        if self.index < WARMUP or not is_cuda:
            train_step(run)
        else:
            torch.cuda.set_sync_debug_mode("error")
            try:
                train_step(run)
            except RuntimeError as error:
                if "synchroniz" not in str(error):
                    raise
                frames = traceback.extract_tb(error.__traceback__)
                self.waits.append([f"{Path(f.filename).name}:{f.lineno} {f.line}" for f in frames[1:]])
            finally:
                torch.cuda.set_sync_debug_mode("default")
        self.index += 1
        if self.waits:  # the step was cut off in its middle: the run is of no more use
            raise Finished


def main(argv=None):
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=5)
    options, flags = parser.parse_known_args(argv)
    check = Check(options.steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*script_arguments(options, flags, folder), "--logging_steps", 10**6]
        run_script(load_script(options.script), arguments, check)
    verdict = "not checked: no CUDA" if not torch.cuda.is_available() else "WAITS" if check.waits else "none"
    lines = [f"host waits in {check.index - WARMUP} plain steps ({options.mixed_precision}): {verdict}"]
    lines += [" < ".join(reversed(frames[-6:])) for frames in check.waits]
    lines += format_models(check.models)
    result = {**describe(options.script), "verdict": verdict, "steps": check.index - WARMUP, "waits": check.waits,
              "models": check.models, "mixed_precision": options.mixed_precision, "flags": flags}  # fmt: skip
    write_result(options.json, result, "\n".join(lines))
    return result


if __name__ == "__main__":
    raise SystemExit(int(main()["verdict"] == "WAITS"))
