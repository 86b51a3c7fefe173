"""Train the demo's teacher, a real small Stable Diffusion, on the shards of drawings: some minutes of a GPU, or hours
of a CPU core (give these `--vae_minutes 18 --unet_minutes 300`, and batches of 16 and 64).

    python demo/train_teacher.py --output_dir demo/teacher --work_dir teacher_run --vae_minutes 1 --unet_minutes 4

The result is an ordinary `StableDiffusionPipeline` folder (CLIP text encoder and tokenizer, AutoencoderKL from 64x64x3
to 16x16x4, UNet2DConditionModel, SD's noise schedule, epsilon prediction), in fp16, 16 MB. Two stages, one loop:

1. The VAE: L1 + 0.5 MSE + 0.5 gradient-L1 + `--kl_weight` KL. Its latents are then centred and given equal spread by
   rewriting the 1x1 convolutions around them; `scaling_factor` = 1 / their standard deviation.
2. Text encoder and U-Net together: epsilon prediction, min-SNR weights (arXiv 2303.09556) with more on high
   noise, latents cached.

Both stages end after a given time, whatever the machine: the learning rate follows the elapsed fraction of the budget.
Averaged weights (EMA) are saved. Stop at any time; the same command goes on from the checkpoint in `--work_dir`, and
with more `--unet_minutes` trains a finished model further. The log has the loss on held-out pairs beside that of
training; `demo/judge_teacher.py` judges the pictures.
Beside other jobs, set `OMP_NUM_THREADS` to `--threads`.
"""

import argparse
import copy
import io
import json
import logging
import math
import os
import shutil
import tarfile
import time
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads slow every other job on the machine

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image, ImageDraw
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

DEMO = Path(__file__).resolve().parent
logger = logging.getLogger("train_teacher")
PREVIEW_PROMPTS = [
    f"prompts_{name}.txt" for name in ("seen_full", "validation_full", "validation_unstyled", "validation_category")
]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards_dir", type=Path, default=DEMO / "shards", help="folder of the tar files")
    parser.add_argument("--output_dir", type=Path, default=DEMO / "teacher", help="where the finished pipeline goes")
    parser.add_argument("--work_dir", type=Path, default=Path("teacher_run"), help="checkpoints, log and previews")
    parser.add_argument("--snapshot_dir", type=Path, help="also save a usable pipeline here every few minutes")
    parser.add_argument("--vae_minutes", type=float, default=1, help="training time of the VAE")
    parser.add_argument("--unet_minutes", type=float, default=4, help="training time of text encoder and U-Net")
    parser.add_argument("--snapshot_minutes", type=float, default=10, help="time between checkpoints (and snapshots)")
    parser.add_argument("--vae_batch_size", type=int, default=64)
    parser.add_argument("--unet_batch_size", type=int, default=256)
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="constant at first, then cosine to zero")
    parser.add_argument("--constant_fraction", type=float, default=0.6, help="share of the budget before the decay")
    parser.add_argument(
        "--caption_weights",
        type=float,
        nargs=4,
        default=(0.58, 0.18, 0.11, 0.13),
        help="how often the U-Net sees the full caption, the one without its style, the category, none",
    )
    parser.add_argument("--kl_weight", type=float, default=1e-3)
    parser.add_argument("--snr_gamma", type=float, default=5.0)
    parser.add_argument("--flip_probability", type=float, default=0.0, help="of mirrored pictures, for the U-Net")
    parser.add_argument("--unet_widths", type=int, nargs=3, default=(64, 96, 144))
    parser.add_argument("--vae_ema", type=float, default=0.998)
    parser.add_argument("--unet_ema", type=float, default=0.9993)
    parser.add_argument("--logging_steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------------- data


def read_shards(folder, pattern):
    """Images (n, 3, 64, 64) in [-1, 1] and the captions of each: "name, category, style", without style, category."""
    images, captions = [], []
    for path in sorted(folder.glob(pattern)):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member).read()
                if member.name.endswith(".webp"):
                    picture = Image.open(io.BytesIO(content)).convert("RGB")
                    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
                    images.append(pixels.view(picture.height, picture.width, 3).permute(2, 0, 1))
                elif member.name.endswith(".json"):
                    captions.append(json.loads(content)["captions"])
    return torch.stack(images).float() / 127.5 - 1, captions


def learn_merges(words, count):
    """The `count` most frequent pairs, one after another (byte-pair encoding); ties go by the alphabet.

    `tokenizers.trainers.BpeTrainer` breaks ties by the order of a hash map, which differs from run to run: after a
    restart the same word could have other ids.
    """
    words = {tuple(word[:-1]) + (word[-1] + "</w>",): number for word, number in words.items()}
    merges = []
    while len(merges) < count:
        pairs = Counter()
        for word, number in words.items():
            for pair in pairwise(word):
                pairs[pair] += number
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))  # noqa: B023, called at once
        words = {merge_pair(word, best): number for word, number in words.items()}
        merges.append(best)
    return merges


def merge_pair(word, pair):
    merged = []
    for symbol in word:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


def build_tokenizer(captions, num_merges=736, length=32):
    """CLIP's tokenizer with merges learnt from the captions; all bytes are tokens, so any prompt can be written.

    The longest caption has 18 tokens. CLIP's own 77 cost a tenth of every step, here and in the students' training.
    """
    backend = CLIPTokenizer().backend_tokenizer
    texts = [backend.normalizer.normalize_str(caption) for caption in captions]
    words = Counter(word for text in texts for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    merges = learn_merges(words, num_merges)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [f"{byte}</w>" for byte in alphabet] + ["".join(pair) for pair in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def tokenize_variants(tokenizer, captions):
    """Token ids (n, 4, tokens) of what each picture may be called: its captions, then nothing."""
    texts = [text for variants in captions for text in (*variants, "")]
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    return tokens.input_ids.view(len(captions), -1, tokenizer.model_max_length)


# -------------------------------------------------------------------------------------------------------------- models


def build_vae():
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=64,
    )


def build_text_encoder(tokenizer, width=128):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet(widths, text_width=128):
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=tuple(widths),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=4,  # the number of heads, for historical reasons
        cross_attention_dim=text_width,
    )


def build_scheduler():
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


# -------------------------------------------------------------------------------------------------------------- losses


def gradients(x):
    return x.diff(dim=-1), x.diff(dim=-2)


def vae_loss(vae, images, args):
    x = images[torch.randint(len(images), (args.vae_batch_size,), device=images.device)]
    x = torch.where(torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5, x.flip(-1), x)
    with torch.autocast(x.device.type, torch.bfloat16):
        posterior = vae.encode(x).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    decoded, mean, logvar = decoded.float(), posterior.mean.float(), posterior.logvar.float()
    edges = sum(F.l1_loss(a, b) for a, b in zip(gradients(decoded), gradients(x), strict=True))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return F.l1_loss(decoded, x) + 0.5 * F.mse_loss(decoded, x) + 0.5 * edges + args.kl_weight * kl


def denoising_loss(model, latents, tokens, alphas_cumprod, shares, args):
    """Weighted epsilon prediction; `latents` holds means and deviations (n, flips, 2, 4, 16, 16).

    `shares` are the cumulative caption weights but the last. Loss weights are min-SNR's above SNR 1 and 1 / sqrt(SNR)
    below: what a picture shows is decided where noise prevails, and there even a small error in epsilon is a large one
    in the picture.
    """
    batch, rand = args.unet_batch_size, partial(torch.rand, args.unet_batch_size, device=latents.device)
    index = torch.randint(len(latents), (batch,), device=latents.device)
    flip = (rand() < args.flip_probability).long()
    mean, std = latents[index, flip].unbind(1)
    x = mean + std * torch.randn_like(mean)
    t = ((torch.arange(batch, device=x.device) + rand()) / batch * len(alphas_cumprod)).long()  # stratified
    alpha_bar = alphas_cumprod[t].view(-1, 1, 1, 1)
    eps = torch.randn_like(x)
    x_t = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * eps
    variant = torch.bucketize(rand(), shares)
    with torch.autocast(x.device.type, torch.bfloat16):
        context = model["text_encoder"](tokens[index, variant]).last_hidden_state
        prediction = model["unet"](x_t, t, context).sample.float()
    snr = alphas_cumprod[t] / (1 - alphas_cumprod[t])
    weight = (args.snr_gamma / snr).clamp(max=1) * snr.clamp(max=1) ** -0.5
    return (weight * (prediction - eps).square().mean(dim=(1, 2, 3))).sum() / weight.sum()


@torch.no_grad()
def held_out_loss(model, loss_fn, args, batches=16):
    """The mean loss of some batches of held-out pairs, always of the same draws."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(args.seed)
        return torch.stack([loss_fn(model) for _ in range(batches)]).mean().item()


# ---------------------------------------------------------------------------------------------------------------- loop


def learning_rate(progress, args):
    """Linear warm-up over the first hundredth of the budget, constant, then cosine to zero."""
    decay = max(0.0, (progress - args.constant_fraction) / (1 - args.constant_fraction))
    return args.learning_rate * min(1.0, progress * 100 + 0.01) * 0.5 * (1 + math.cos(math.pi * min(decay, 1.0)))


@torch.no_grad()
def update_average(average, model, decay):
    torch._foreach_lerp_(
        list(average.parameters()), list(model.parameters()), 1 - decay
    )  # neither has buffers that move


def recorded(function, device):
    """On CUDA the function's kernels recorded once and replayed: launching the many small ones takes most of a step."""
    if device.type != "cuda":
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()

    def replay():
        graph.replay()
        return result

    return replay


def save_state(path, **state):
    """Write beside the old file, then rename: an interruption leaves the old or the new one, never half of one."""
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def train(name, model, loss_fn, minutes, ema, args, judge=None, on_save=None):
    """Train `model` for `minutes` in all, over as many calls as it takes, and return its averaged copy."""
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), fused=True)
    path, device, step, elapsed = args.work_dir / f"{name}.pt", next(model.parameters()).device, 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=device)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed = state["step"], state["elapsed"]
        logger.info("%s: going on from step %d, %.1f minutes", name, step, elapsed / 60)
    torch.manual_seed(args.seed + step)
    budget, saved, recent = minutes * 60, elapsed, torch.zeros((), device=device)

    def forward_backward():
        optimizer.zero_grad()
        loss = loss_fn(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        return loss.detach()

    compute = recorded(forward_backward, device) if elapsed < budget else None
    started = time.time() - elapsed
    while elapsed < budget:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(elapsed / budget, args)
        recent += compute()
        optimizer.step()
        update_average(average, model, min(ema, (1 + step) / (10 + step)))
        step, elapsed = step + 1, time.time() - started
        if step % args.logging_steps == 0:
            lr, loss = optimizer.param_groups[0]["lr"], recent.item() / args.logging_steps
            logger.info("%s: step %d, %.1f min, loss %.4f, lr %.2e", name, step, elapsed / 60, loss, lr)
            recent.zero_()
            if judge and step % (20 * args.logging_steps) == 0:
                logger.info("%s: step %d, held-out loss %.4f", name, step, judge(average))
        if elapsed - saved > args.snapshot_minutes * 60 or elapsed >= budget:
            states = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            save_state(path, **states, step=step, elapsed=elapsed)
            if on_save:
                on_save(average)
            saved = elapsed
    logger.info("%s: %d steps in %.1f minutes, %.3f s a step", name, step, elapsed / 60, elapsed / max(step, 1))
    if judge:
        logger.info("%s: held-out loss %.4f", name, judge(average))
    return average


# ------------------------------------------------------------------------------------------------- latents and export


@torch.no_grad()
def encode(vae, images):
    """Means and standard deviations of the latents, (n, 2, 4, 16, 16)."""
    posteriors = [vae.encode(chunk).latent_dist for chunk in images.split(64)]
    return torch.cat([torch.stack([posterior.mean, posterior.std], dim=1) for posterior in posteriors])


@torch.no_grad()
def centre_latents(vae, images):
    """Give the latents mean 0 and the same spread in all channels, without changing what the VAE as a whole computes.

    Mostly white pictures have latents far from zero, which SD's schedule, whose last step still shows 0.5 % of the
    signal, would hand to the U-Net as a hint that pure noise lacks. Returns the spread.
    """
    means = encode(vae, images)[:, 0]
    shift, spread = means.mean(dim=(0, 2, 3)), means.std(dim=(0, 2, 3))
    scale = spread / spread.mean()
    for half, offset in ((slice(0, 4), shift), (slice(4, 8), 2 * scale.log())):  # means, then log-variances
        factor = scale if half.start == 0 else torch.ones_like(scale)
        vae.quant_conv.weight[half] /= factor.view(-1, 1, 1, 1)
        vae.quant_conv.bias[half] = (vae.quant_conv.bias[half] - offset) / factor
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ shift
    vae.post_quant_conv.weight *= scale.view(1, -1, 1, 1)
    return spread.mean().item()


@torch.no_grad()
def psnr(vae, images):
    """Mean over the images of the PSNR of their reconstruction."""
    decoded = torch.cat([vae.decode(vae.encode(chunk).latent_dist.mean).sample for chunk in images.split(64)])
    error = (decoded.clamp(-1, 1) - images).square().mean(dim=(1, 2, 3)) / 4
    return (-10 * error.log10()).mean().item()


def build_pipeline(vae, text_encoder, tokenizer, unet, dtype=torch.float32):
    """A pipeline of copies on the CPU, so that neither casting nor sampling touches what is being trained."""
    vae, text_encoder, unet = (copy.deepcopy(model).to("cpu", dtype) for model in (vae, text_encoder, unet))
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, build_scheduler(), None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_pipeline(folder, *components):
    """Save in fp16 beside the old folder, then replace its files, so that a reader never waits long for a whole one."""
    fresh = folder.with_name(folder.name + ".new")
    build_pipeline(*components, dtype=torch.float16).save_pretrained(fresh)
    config = fresh / "text_encoder" / "config.json"  # else transformers alone would load fp16, and diffusers fp32
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))
    shutil.copytree(fresh, folder, dirs_exist_ok=True)
    shutil.rmtree(fresh)


def draw_preview(path, *components, seed=0, columns=8):
    """A row for each of `PREVIEW_PROMPTS`, 50 DDIM steps and guidance 3, each picture above its prompt."""
    prompts = [line for name in PREVIEW_PROMPTS for line in (DEMO / name).read_text("utf-8").splitlines()[:columns]]
    pipeline = build_pipeline(*components).to(components[0].device)
    generator = torch.Generator().manual_seed(seed)
    pictures = pipeline(prompts, num_inference_steps=50, guidance_scale=3.0, generator=generator).images
    rows, width, height = math.ceil(len(pictures) / columns), 92, 96
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    pen = ImageDraw.Draw(grid)
    for index, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        x, y = index % columns * width, index // columns * height
        grid.paste(picture, (x + 14, y + 4))
        name, _, rest = prompt.partition(", ")
        pen.text((x + 2, y + 69), f"{name[:16]}\n{rest.rpartition(', ')[2][:16]}", fill="black", spacing=0)
    grid.save(path, optimize=True)


# ---------------------------------------------------------------------------------------------------------------- main


def main(argv=None):
    args = parse_args(argv)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(), logging.FileHandler(args.work_dir / "train.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    images, captions = read_shards(args.shards_dir, "train-*.tar")
    held_out_images, held_out_captions = read_shards(args.shards_dir, "heldout-validation.tar")
    tokenizer = build_tokenizer([variants[0] for variants in captions])
    vae, text_encoder, unet = build_vae(), build_text_encoder(tokenizer), build_unet(args.unet_widths)
    if device.type == "cpu":  # where the backward pass of SDPA is slow
        unet.set_attn_processor(AttnProcessor())
        text_encoder.set_attn_implementation("eager")
    vae, unet = (model.to(device, memory_format=torch.channels_last) for model in (vae, unet))
    images, held_out_images = (x.to(device, memory_format=torch.channels_last) for x in (images, held_out_images))
    text_encoder.to(device)
    sizes = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (vae, text_encoder, unet)]
    logger.info("%d images; million parameters: VAE %.2f, text encoder %.2f, U-Net %.2f", len(images), *sizes)

    vae = train("vae", vae, partial(vae_loss, images=images, args=args), args.vae_minutes, args.vae_ema, args)
    before = psnr(vae, images[::16])
    spread = centre_latents(vae, images[::4])
    vae.register_to_config(scaling_factor=1 / spread)
    logger.info("VAE: PSNR %.2f dB, centred %.2f dB, scaling %.4f", before, psnr(vae, images[::16]), 1 / spread)
    logger.info("VAE: PSNR of held-out pictures %.2f dB", psnr(vae, held_out_images))

    def snapshot(average):
        components = vae, average["text_encoder"], tokenizer, average["unet"]
        if args.snapshot_dir:
            save_pipeline(args.snapshot_dir, *components)
        draw_preview(args.work_dir / "preview.png", *components)

    def make_loss(images, captions):
        views = [images, images.flip(-1)] if args.flip_probability else [images]
        latents = torch.stack([encode(vae, view) for view in views], dim=1) / spread
        tokens = tokenize_variants(tokenizer, captions).to(device)
        tensors = {"latents": latents, "tokens": tokens, "alphas_cumprod": alphas_cumprod, "shares": shares}
        return partial(denoising_loss, **tensors, args=args)

    alphas_cumprod = build_scheduler().alphas_cumprod.to(device)
    shares = torch.tensor(args.caption_weights, device=device).cumsum(0)[:-1]
    model = torch.nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})
    judge = partial(held_out_loss, loss_fn=make_loss(held_out_images, held_out_captions), args=args)
    loss_fn = make_loss(images, captions)
    model = train("unet", model, loss_fn, args.unet_minutes, args.unet_ema, args, judge, on_save=snapshot)
    components = vae, model["text_encoder"], tokenizer, model["unet"]
    save_pipeline(args.output_dir, *components)
    draw_preview(args.output_dir / "preview.png", *components)
    logger.info("saved %s", args.output_dir)


if __name__ == "__main__":
    main()
