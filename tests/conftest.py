"""Tiny random pipelines and shards, built here and never fetched, and the scripts imported as modules."""

import dataclasses
import functools
import importlib.util
import io
import json
import logging
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
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


@dataclasses.dataclass(frozen=True)
class Case:
    """A script, and what the tests that run over all scripts have to know about it."""

    name: str
    scheduler: str  # the class of the exported one
    flags: tuple = ()  # of every run; not the defaults of the libraries
    pipeline: object = make_pipeline  # builds a tiny teacher
    is_lora: bool = False
    is_sdxl: bool = False
    embeds_w: bool = False  # its student is given the guidance weight

    @property
    def path(self):
        return ROOT / f"{self.name}.py"

    def exported(self, output):
        """The names of files and folders that a run leaves behind for users."""
        if self.is_lora:
            return {"README.md", "pytorch_lora_weights.safetensors", "pytorch_lora_weights_online.safetensors",
                    f"{Path(output).name}_kohya.safetensors", "scheduler"}  # fmt: skip
        return {"README.md", "model_index.json", "unet", "unet_online", "vae", "text_encoder", "tokenizer", "scheduler"}

    def weights(self, output, name):
        """The exported tensors of `student` or `target`, by the names that a checkpoint has for them."""
        online = "_online" if name == "student" else ""
        if self.is_lora:
            tensors = load_file(Path(output, f"pytorch_lora_weights{online}.safetensors"))
            return {key.removeprefix("unet."): value for key, value in tensors.items()}
        return load_file(Path(output, f"unet{online}", "diffusion_pytorch_model.safetensors"))


LORA_FLAGS = ("--lora_rank", "4", "--lora_alpha", "6")
SCRIPTS = {case.name: case for case in (
    Case("train_lcm_distill_sd_wds", "LCMScheduler", ("--timestep_scaling_factor", "9"), embeds_w=True),
    Case("train_tcd_distill_sd_wds", "TCDScheduler", embeds_w=True),
    Case("train_tcd_distill_lora_sd_wds", "TCDScheduler", LORA_FLAGS, is_lora=True),
    Case("train_lcm_distill_lora_sdxl_wds", "LCMScheduler", (*LORA_FLAGS, "--timestep_scaling_factor", "9"),
         make_sdxl_pipeline, is_lora=True, is_sdxl=True),
    Case("train_cd_multiboundary", "TCDScheduler"),
    Case("train_ct", "LCMScheduler", ("--timestep_scaling_factor", "9", "--ema_decay", "0.9")),
)}  # fmt: skip


@functools.cache
def get_script(name):
    """The imported script of this name."""
    return load_script(SCRIPTS[name].path)


@pytest.fixture(scope="session")
def lcm():
    return get_script(SCRIPT.stem)


def label(name):
    return name.removeprefix("train_").removesuffix("_wds").replace("_distill", "")


@pytest.fixture(params=SCRIPTS, ids=label)
def case(request):
    """Each script in turn, or those that `over` names."""
    return SCRIPTS[request.param]


@pytest.fixture
def script(case):
    return get_script(case.name)


def over(scripts, names="", values=None):
    """Parametrises a test over these scripts, and over values: a list for all, or a list for each script."""
    names, params = [name for name in names.split(", ") if name], []
    for name in scripts:
        for value in [()] if values is None else values[name] if isinstance(values, dict) else values:
            given = value.values if hasattr(value, "values") else value if len(names) != 1 else (value,)
            more = getattr(value, "id", None) or " ".join(str(item) for item in given if isinstance(item, (str, int)))
            params.append(pytest.param(name, *given, id=f"{label(name)} {more}".strip()))
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
    """A command line that runs in seconds; later flags override earlier ones."""
    return ["--pretrained_teacher_model", teacher, "--train_shards_path_or_url", shards, "--output_dir", str(output),
            "--resolution", "16", "--train_batch_size", "2", "--max_train_steps", "4", "--num_ddim_timesteps", "10",
            "--learning_rate", "1e-3", "--dataloader_num_workers", "0", "--report_to", "none", "--logging_steps", "1",
            "--validation_steps", "0", "--checkpointing_steps", "0", *more]  # fmt: skip


def run_script(arguments, processes=1, script=SCRIPT, cwd=None, timeout=300):
    """Runs a script as a user does, in processes of its own; returns the CompletedProcess."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
    command = [*(launch if processes > 1 else [sys.executable]), str(script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def read_metrics(output):
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def run_main(script, arguments):
    """Runs a script's main in this process, as often as wanted: resets accelerate's singletons, restores signals."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    logging.root.handlers, loggers = [], logging.root.handlers
    try:
        return script.main([str(argument) for argument in arguments])
    finally:
        logging.root.handlers = loggers
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture
def start(script, case, teacher, shards, tmp_path):
    """start(*more, teacher): the Run of a command line, before its first step."""
    from accelerate.state import AcceleratorState, GradientState

    def make(*more, teacher=teacher):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        output = tmp_path / "started"
        output.mkdir(exist_ok=True)
        args = script.parse_args(tiny_args(teacher, shards, output, *case.flags, *more))
        return script.start_run(args, script.make_accelerator(args))

    return make
