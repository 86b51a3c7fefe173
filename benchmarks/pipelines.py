"""Random-weight pipelines, made here and never fetched.

`sd15` and `sdxl` are the real architectures. `small` is shaped like SD 1.5 (attention at the upper resolutions), at a
size that two CPU cores train in seconds a step; its VAE encoding costs 0.73 of a pass of the U-Net.
"""

import json
import math
import os
import shutil
from pathlib import Path

import torch

ATTENTION, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
CLIP = {"max_position_embeddings": 77, "bos_token_id": 72, "eos_token_id": 73}  # of make_tokenizer
CLIP_L = {"vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
          "num_attention_heads": 12, "hidden_act": "quick_gelu"}  # fmt: skip
SD_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512}
# resolution, U-Net (levels from the top: has attention?), VAE, text encoders
SCALES = {
    "tiny": (32, {"channels": (8, 16), "attention": (0, 1), "layers_per_block": 1, "cross_attention_dim": 16,
                  "attention_head_dim": 4, "norm_num_groups": 4},
             {"block_out_channels": (8, 16), "norm_num_groups": 4},
             [{"vocab_size": 100, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
               "num_attention_heads": 2}]),
    "small": (256, {"channels": (128, 256, 384), "attention": (1, 1, 0), "cross_attention_dim": 256,
                    "attention_head_dim": 8},
              {"block_out_channels": (32, 64, 128, 128), "layers_per_block": 2},
              [{"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4,
                "num_attention_heads": 4}]),
    "sd15": (512, {"channels": (320, 640, 1280, 1280), "attention": (1, 1, 1, 0), "cross_attention_dim": 768,
                   "attention_head_dim": 8}, SD_VAE, [CLIP_L]),
    "sdxl": (1024, {"channels": (320, 640, 1280), "attention": (0, 1, 1), "cross_attention_dim": 2048,
                    "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10),
                    "use_linear_projection": True, "addition_embed_type": "text_time",
                    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816},
             {**SD_VAE, "scaling_factor": 0.13025, "force_upcast": True},
             [CLIP_L, {"vocab_size": 49408, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
                       "num_attention_heads": 20, "hidden_act": "gelu", "projection_dim": 1280}]),
}  # fmt: skip


@torch.no_grad()
def random_model(build, seed):
    """Builds a model without its own initialisation, which takes minutes at these sizes, and fills it from `seed`.

    With `seed` None it stays without contents.
    """
    with torch.device("meta"):
        model = build()
    if seed is None:
        return model
    generator = torch.Generator().manual_seed(seed)
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            bound = math.sqrt(3 / parameter[0].numel())  # variance 1 / fan-in
            parameter.uniform_(-bound, bound, generator=generator)
        else:
            parameter.fill_(float(name.endswith("weight")))
    return model.eval()


def settle(temporary, final):
    """Renames a finished folder to its place; where another process was first, that one's stays."""
    try:
        temporary.rename(final)
    except OSError:
        if not final.is_dir():
            raise
        shutil.rmtree(temporary)


def make_tokenizer(folder):
    """A CLIPTokenizer over single characters."""
    from transformers import CLIPTokenizer

    tokens = [c + end for c in "abcdefghijklmnopqrstuvwxyz0123456789" for end in ("", "</w>")]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def make_unet(scale):
    from diffusers import UNet2DConditionModel

    resolution, unet, vae, _ = SCALES[scale]
    options = {k: v for k, v in unet.items() if k not in ("channels", "attention")}
    kinds = [ATTENTION if has_attention else PLAIN for has_attention in unet["attention"]]
    return UNet2DConditionModel(
        sample_size=resolution // 2 ** (len(vae["block_out_channels"]) - 1), block_out_channels=unet["channels"],
        down_block_types=[down for down, _ in kinds], up_block_types=[up for _, up in reversed(kinds)], **options,
    )  # fmt: skip


def save_configs(pipeline, folder):
    """Writes what describes a pipeline, without its weights."""
    pipeline.save_config(folder)
    for name, part in pipeline.components.items():
        if hasattr(part, "save_config"):
            part.save_config(folder / name)
        elif part is not None:
            getattr(part, "config", part).save_pretrained(folder / name)


def make_pipeline(folder, scale, weights=True):
    """Saves the pipeline of a scale under `folder`, unless it is there already, and returns its path.

    Without `weights` only what describes it: nothing of its size is made.
    """
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    final = Path(folder, f"pipeline-{scale}" + ("" if weights else "-configs"))
    if final.is_dir():
        return str(final)
    temporary = Path(folder, f"unfinished-{scale}-{os.getpid()}")
    _, _, vae, texts = SCALES[scale]
    levels = len(vae["block_out_channels"])
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    seeds = (1, 2, 3) if weights else (None, None, None)
    vae = random_model(lambda: diffusers.AutoencoderKL(latent_channels=4, **blocks, **vae), seeds[0])
    encoders = [random_model(lambda kind=kind, text=text: kind(CLIPTextConfig(**CLIP, **text)), seeds[1])
                for kind, text in zip((CLIPTextModel, CLIPTextModelWithProjection), texts, strict=False)]  # fmt: skip
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                        steps_offset=1, clip_sample=False, set_alpha_to_one=False)  # fmt: skip
    parts = {"vae": vae, "text_encoder": encoders[0], "unet": random_model(lambda: make_unet(scale), seeds[2]),
             "tokenizer": make_tokenizer(temporary / "tokenizer"), "scheduler": scheduler}  # fmt: skip
    if len(encoders) == 2:
        parts |= {"text_encoder_2": encoders[1], "tokenizer_2": parts["tokenizer"]}
        pipeline = diffusers.StableDiffusionXLPipeline(**parts)
    else:
        pipeline = diffusers.StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None,
                                                     requires_safety_checker=False)  # fmt: skip
    if weights:
        pipeline.save_pretrained(temporary)
    else:
        save_configs(pipeline, temporary)
    settle(temporary, final)
    return str(final)
