"""Tiny random pipelines and shards, built here and never fetched, and the scripts imported as modules."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "train_lcm_distill_sd_wds.py"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # tiny models: threads only get in each other's way


def load_script(path):
    """Imports a script by its path, as a user who copied it would run it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def make_tokenizer(folder):
    """A CLIPTokenizer over single characters."""
    from transformers import CLIPTokenizer

    vocabulary = {}
    for character in "abcdefghijklmnopqrstuvwxyz0123456789":
        vocabulary[character] = len(vocabulary)
        vocabulary[character + "</w>"] = len(vocabulary)
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16), len(vocabulary)


def make_pipeline(folder, prediction_type="epsilon", time_cond_proj_dim=None, in_channels=4, seed=0):
    """Saves a random StableDiffusionPipeline of about 100,000 parameters (VAE factor 2) and returns its path."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    tokenizer, size = make_tokenizer(folder / "tokenizer-source")
    text = CLIPTextConfig(vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                          num_attention_heads=2, max_position_embeddings=16, eos_token_id=size - 1)  # fmt: skip
    vae = AutoencoderKL(block_out_channels=[8, 16], norm_num_groups=4, latent_channels=4, sample_size=16,
                        down_block_types=["DownEncoderBlock2D"] * 2,
                        up_block_types=["UpDecoderBlock2D"] * 2)  # fmt: skip
    unet = UNet2DConditionModel(sample_size=8, in_channels=in_channels, block_out_channels=[8, 16], norm_num_groups=4,
                                layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
                                down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
                                up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
                                time_cond_proj_dim=time_cond_proj_dim)  # fmt: skip
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                              clip_sample=False, set_alpha_to_one=False, prediction_type=prediction_type)  # fmt: skip
    StableDiffusionPipeline(vae, CLIPTextModel(text), tokenizer, unet, scheduler, None, None,
                            requires_safety_checker=False).save_pretrained(folder / "pipeline")  # fmt: skip
    return str(folder / "pipeline")


def make_sdxl_pipeline(folder, prediction_type="epsilon", time_cond_proj_dim=None, force_zeros=True, seed=0):
    """Saves a random StableDiffusionXLPipeline of some 100,000 parameters (VAE factor 2) and returns its path."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    tokenizer, size = make_tokenizer(folder / "tokenizer-source")
    text = CLIPTextConfig(vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                          num_attention_heads=2, max_position_embeddings=16, eos_token_id=size - 1,
                          projection_dim=24)  # fmt: skip
    vae = AutoencoderKL(block_out_channels=[8, 16], norm_num_groups=4, latent_channels=4, sample_size=16,
                        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
                        scaling_factor=0.13025, force_upcast=True)  # fmt: skip
    unet = UNet2DConditionModel(sample_size=8, in_channels=4, block_out_channels=[8, 16], norm_num_groups=4,
                                layers_per_block=1, cross_attention_dim=32, attention_head_dim=4,
                                down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
                                up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], use_linear_projection=True,
                                addition_embed_type="text_time", addition_time_embed_dim=8,
                                projection_class_embeddings_input_dim=24 + 6 * 8,
                                time_cond_proj_dim=time_cond_proj_dim)  # fmt: skip
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                       steps_offset=1, prediction_type=prediction_type)  # fmt: skip
    StableDiffusionXLPipeline(vae, CLIPTextModel(text), CLIPTextModelWithProjection(text), tokenizer, tokenizer, unet,
                              scheduler, force_zeros_for_empty_prompt=force_zeros,
                              add_watermarker=False).save_pretrained(folder / "pipeline")  # fmt: skip
    return str(folder / "pipeline")


LORA_FLAGS = ("--lora_rank", "4", "--lora_alpha", "6")


@dataclasses.dataclass(frozen=True)
class Case:
    """A script with a kind of teacher and of student, and what tests have to know about them."""

    name: str
    is_lora: bool = False
    is_sdxl: bool = False

    @property
    def path(self):
        return ROOT / f"{self.name}.py"

    @property
    def label(self):
        kind = " xl" * (self.is_sdxl and "sdxl" not in self.name) + " lora" * (self.is_lora and "lora" not in self.name)
        return self.name.removeprefix("train_").removesuffix("_wds").replace("_distill", "") + kind

    @property
    def pipeline(self):
        """What builds a tiny teacher."""
        return make_sdxl_pipeline if self.is_sdxl else make_pipeline

    @property
    def scheduler(self):
        """The class of the exported one."""
        return "TCDScheduler" if "_tcd_" in self.name or "boundary" in self.name else "LCMScheduler"

    @property
    def embeds_w(self):
        """Whether its student is given the guidance weight."""
        return not self.is_lora and ("_lcm_" in self.name or "_tcd_" in self.name)

    @property
    def flags(self):
        """Those of every run; not the defaults of the libraries."""
        lora = LORA_FLAGS if self.is_lora else ("--lora_rank", "0") if "lora" in self.name else ()
        scaling = ("--timestep_scaling_factor", "9") if self.scheduler == "LCMScheduler" else ()
        return (*lora, *scaling, *(("--ema_decay", "0.9") if self.name == "train_ct" else ()))

    def exported(self, output):
        """The names of files and folders that a run leaves behind for users."""
        if self.is_lora:
            return {"README.md", "pytorch_lora_weights.safetensors", "pytorch_lora_weights_online.safetensors",
                    f"{Path(output).name}_kohya.safetensors", "scheduler"}  # fmt: skip
        second = {"text_encoder_2", "tokenizer_2"} if self.is_sdxl else set()
        return second | {"README.md", "model_index.json", "unet", "unet_online", "vae", "text_encoder", "tokenizer",
                         "scheduler"}  # fmt: skip

    def weights(self, output, name):
        """The exported tensors of `student` or `target`, by the names that a checkpoint has for them."""
        online = "_online" if name == "student" else ""
        if self.is_lora:
            tensors = load_file(Path(output, f"pytorch_lora_weights{online}.safetensors"))
            return {key.removeprefix("unet."): value for key, value in tensors.items()}
        return load_file(Path(output, f"unet{online}", "diffusion_pytorch_model.safetensors"))


SCRIPTS = {case.name: case for case in (
    Case("train_lcm_distill_sd_wds"),
    Case("train_tcd_distill_sd_wds"),
    Case("train_tcd_distill_lora_sd_wds", is_lora=True),
    Case("train_lcm_distill_lora_sdxl_wds", is_lora=True, is_sdxl=True),
    Case("train_cd_multiboundary"),
    Case("train_ct"),
)}  # fmt: skip
# the engine's tests run on the first script, and where the family or the kind of student counts, on these
LCM = SCRIPTS[SCRIPT.stem]
LCM_LORA, LCM_XL, LCM_XL_LORA = Case(LCM.name, True), Case(LCM.name, False, True), Case(LCM.name, True, True)


@functools.cache
def get_script(name):
    """The imported script of this name."""
    return load_script(SCRIPTS[name].path)


@pytest.fixture(scope="session")
def lcm():
    return get_script(SCRIPT.stem)


@pytest.fixture
def case(request):
    """The first script, unless `over` says otherwise."""
    return getattr(request, "param", LCM)


@pytest.fixture
def script(case):
    return get_script(case.name)


def over(cases, names="", values=None):
    """Parametrises a test over Cases or scripts' names, and over values: a list for all, or a list for each of them."""
    names, params = [name for name in names.split(", ") if name], []
    for given in cases:
        case = given if isinstance(given, Case) else SCRIPTS[given]
        for value in [()] if values is None else values[given] if isinstance(values, dict) else values:
            row = value.values if hasattr(value, "values") else value if len(names) != 1 else (value,)
            more = getattr(value, "id", None) or " ".join(str(item) for item in row if isinstance(item, (str, int)))
            params.append(pytest.param(case, *row, id=f"{case.label} {more}".strip()))
    return pytest.mark.parametrize(["case", *names], params, indirect=["case"])


def image_bytes(seed=0, size=(20, 16), kind="PNG", mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, kind)
    return stream.getvalue()


def write_shard(path, members):
    """Writes a tar of (name, bytes) members."""
    with tarfile.open(path, "w") as shard:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            shard.addfile(info, io.BytesIO(data))
    return str(path)


def make_shards(folder, counts):
    """Shards of PNGs whose captions are their numbers: "0", "1", … over all shards."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for index, count in enumerate(counts):
        members = []
        for _ in range(count):
            info = {"original_width": 20, "original_height": 16}
            members += [(f"{number:05}.png", image_bytes(number)), (f"{number:05}.txt", str(number).encode()),
                        (f"{number:05}.json", json.dumps(info).encode())]  # fmt: skip
            number += 1
        write_shard(folder / f"{index:05}.tar", members)
    return str(folder / ("{00000..%05d}.tar" % (len(counts) - 1)))


@pytest.fixture(scope="session")
def make_teacher(tmp_path_factory):
    """make_teacher(builder, **options): the path of a tiny pipeline, made once, which nothing may write to."""
    return functools.cache(lambda builder, **options: builder(tmp_path_factory.mktemp("teacher"), **options))


@pytest.fixture(scope="session")
def tiny(make_teacher):
    return make_teacher(make_pipeline)


@pytest.fixture
def teacher(case, make_teacher):
    """The tiny teacher of the script."""
    return make_teacher(case.pipeline)


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"), [7, 5, 9])


def tiny_args(teacher, shards, output, *more):
    """A command line that runs in seconds; later flags override earlier ones. The rate is constant, so that a run of
    fewer steps is the beginning of a longer one.
    """
    return ["--pretrained_teacher_model", teacher, "--train_shards_path_or_url", shards, "--output_dir", str(output),
            "--resolution", "16", "--train_batch_size", "2", "--max_train_steps", "4", "--num_ddim_timesteps", "10",
            "--learning_rate", "1e-3", "--lr_scheduler", "constant", "--dataloader_num_workers", "0",
            "--report_to", "none", "--logging_steps", "1", "--validation_steps", "0", "--checkpointing_steps", "0",
            *more]  # fmt: skip


# one prompt, one seed, one chain: validation in a second
QUICK_VALIDATION = "--validation_prompts a --num_validation_images 1 --validation_num_inference_steps 1".split()
FORK = multiprocessing.get_context("fork")


def renew_threads():
    """To call first in a fork: PyTorch makes its pool anew, for which the threads that load models would race."""
    torch.set_num_threads(1)


def run_script(arguments, processes=1, script=SCRIPT, cwd=None, timeout=300, python=(), **environment):
    """Runs a script as a user does, in processes of its own; returns the CompletedProcess."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    command = [*(launch if processes > 1 else [sys.executable, *python]), str(script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def forget_run():
    """Lets accelerate start anew in this process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def run_main(script, arguments):
    """Runs a script's main in this process, as often as wanted: restores signals and log."""
    forget_run()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    logging.root.handlers, loggers = [], logging.root.handlers
    try:
        return script.main([str(argument) for argument in arguments])
    finally:
        logging.root.handlers = loggers
        for number, handler in handlers.items():
            signal.signal(number, handler)


def watch_the_end(script):
    """Makes a run write, for each rank, a digest of its student and target, and its cursors."""

    def train(run, plain=script.train):
        plain(run)
        networks = (script.network_state(run.models, name) for name in ("student", "target"))
        digest = hashlib.sha256(b"".join(value.numpy().tobytes() for net in networks for value in net.values()))
        path = f"{run.args.output_dir}-rank{run.accelerator.process_index}"
        Path(path).write_text(f"{digest.hexdigest()} {run.reader.cursors}")

    script.train = train


def run_rank(name, arguments, environment, spoil):
    """A run as torchrun would start it, in a fork of this process, which has imported everything."""
    renew_threads()
    os.environ.update(environment)
    spoil(get_script(name))
    watch_the_end(get_script(name))
    run_main(get_script(name), arguments)


def run_two(name, arguments, spoil=lambda script: None, wanted=(0, 0)):  # noqa: ARG005
    """Runs a script, spoilt by a function, in two processes that train together and end with the `wanted` statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [FORK.Process(target=run_rank, args=(name, arguments, {**common, "RANK": rank, "LOCAL_RANK": rank},
                                                  spoil)) for rank in ("0", "1")]  # fmt: skip
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [*wanted]


@pytest.fixture
def start(script, case, teacher, shards, tmp_path):
    """start(*more, teacher): the Run of a command line, before its first step."""

    def make(*more, teacher=teacher):
        forget_run()
        output = tmp_path / "started"
        output.mkdir(exist_ok=True)
        args = script.parse_args(tiny_args(str(teacher), shards, output, *case.flags, *map(str, more)))
        return script.start_run(args, script.make_accelerator(args))

    return make


@pytest.fixture
def train(case, script, teacher, shards):
    """train(output, *more, teacher, shards): four steps with a checkpoint every two; returns the output folder."""

    def run(output, *more, teacher=teacher, shards=shards):
        run_main(script, tiny_args(str(teacher), shards, output, "--checkpointing_steps", "2", *case.flags, *more))
        return Path(output)

    return run


@pytest.fixture(scope="session")
def kept():
    """Outputs of runs that several tests look at, and none writes to."""
    return {}


@pytest.fixture
def straight(case, train, kept, tmp_path_factory):
    """The output of an undisturbed run."""
    if case not in kept:
        kept[case] = train(tmp_path_factory.mktemp("straight") / "run")
    return kept[case]


@pytest.fixture
def on_call(script, monkeypatch):
    """on_call(name, number, action): runs an action before that call (1, 2, …) of one of the script's functions."""

    def patch(name, number, action):
        plain, calls = getattr(script, name), itertools.count(1)

        def wrapper(*args, **kwargs):
            if next(calls) == number:
                action()
            return plain(*args, **kwargs)

        monkeypatch.setattr(script, name, wrapper)

    return patch


@contextlib.contextmanager
def ends_with(message):
    """The run ends in here, with one line that matches `message`."""
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as end:
        yield
    assert "\n" not in end.value.code


def edited(teacher, folder, file, **changes):
    """A copy of a pipeline with changes to one of its JSON files; None removes an entry."""
    folder = shutil.copytree(teacher, folder / "edited")
    config = {**json.loads((folder / file).read_text()), **changes}
    (folder / file).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


# ------------------------------------------------------------------------------------------- what a run leaves behind


def read_metrics(output):
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def read_losses(output):
    """(step, loss, grad_norm, lr) of the training lines."""
    names = ("step", "loss", "grad_norm", "lr")
    return [tuple(line[name] for name in names) for line in read_metrics(output) if "lr" in line]


def leaves(value, name=""):
    """Yields (name, leaf) of nested dicts and lists."""
    if isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{name}/{key}")
    else:
        yield name, value


def read_checkpoint(folder):
    """All that a checkpoint holds except the arguments, flat."""
    weights = {name: load_file(folder / f"{name}.safetensors") for name in ("student", "target")}
    optimizer, state = torch.load(folder / "optimizer.pt"), json.loads((folder / "state.json").read_text())
    del state["args"]
    return dict(leaves({**weights, "optimizer": optimizer, "state": state}))


def read_export(output):
    """All exported tensors, by file and name."""
    tensors = {}
    for path in sorted(output.rglob("*.safetensors")):
        if "checkpoint" not in str(path.relative_to(output)):
            name = path.relative_to(output).as_posix().replace(f"{output.name}_kohya", "kohya")
            tensors |= {f"{name}/{key}": value for key, value in load_file(path).items()}
    assert tensors
    return tensors


def differences(one, two):
    """Names of the leaves that are not bit for bit the same."""
    assert one.keys() == two.keys()
    is_same = {name: torch.equal(a, two[name]) if torch.is_tensor(a) else a == two[name] for name, a in one.items()}
    return [name for name, same in is_same.items() if not same]


def assert_same_end(output, straight, step=4):
    """Checkpoint, logged losses and exported tensors of two runs are the same to the bit."""
    assert not differences(*(read_checkpoint(folder / f"checkpoint-{step}") for folder in (output, straight)))
    assert read_losses(output) == read_losses(straight)
    assert not differences(read_export(output), read_export(straight))
