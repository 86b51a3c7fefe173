"""The plain loop that throughput.py --compare_baseline measures the script against.

Latent consistency distillation with the same networks, written straight from the formulas: two teacher passes, the EMA
parameter by parameter, the default AdamW, contiguous layout, a float32 VAE. With x_t = α_t x_0 + σ_t ε, an epsilon-
predicting network e and x̂_0 = (x − σ e)/α, one step is

    guided = e(x_t, c) + w (e(x_t, c) − e(x_t, ∅)),   x_prev = α_prev x̂_0 + σ_prev guided
    loss = mean (f_θ(x_t, t) − f_θ⁻(x_prev, prev))²,  f = c_skip x + c_out x̂_0,
    c_skip = ¼ / ((s t)² + ¼),  c_out = s t / sqrt((s t)² + ¼)
"""

import math

import torch
import torch.nn.functional as F
from common import DTYPES
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextModel


class Baseline:
    """Networks and optimizer of the plain loop; `args` are the script's own, `step(batch)` trains on its batches."""

    def __init__(self, args, device):
        path, self.args, self.device, self.dtype = (
            args.pretrained_teacher_model,
            args,
            device,
            DTYPES[args.mixed_precision],
        )
        self.tokenizer = AutoTokenizer.from_pretrained(path, subfolder="tokenizer")
        self.text_encoder = CLIPTextModel.from_pretrained(path, subfolder="text_encoder").to(device, self.dtype)
        self.vae = AutoencoderKL.from_pretrained(path, subfolder="vae").to(device)
        self.teacher = UNet2DConditionModel.from_pretrained(path, subfolder="unet")
        width = args.unet_time_cond_proj_dim
        config = {k: v for k, v in self.teacher.config.items() if not k.startswith("_")}
        self.student, self.target = (
            UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": width}).to(device) for _ in range(2)
        )
        for unet in (self.student, self.target):
            torch.nn.init.zeros_(unet.time_embedding.cond_proj.weight)
            unet.load_state_dict(self.teacher.state_dict(), strict=False)
        for model in (self.text_encoder, self.vae, self.teacher, self.target):
            model.requires_grad_(False).eval()
        self.teacher.to(device, self.dtype)
        self.student.train()
        if args.gradient_checkpointing:
            self.student.enable_gradient_checkpointing()
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon, weight_decay=args.adam_weight_decay,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.mixed_precision == "fp16")
        scheduler = DDPMScheduler.from_pretrained(path, subfolder="scheduler")
        if scheduler.config.prediction_type != "epsilon":
            raise SystemExit("error: the baseline predicts epsilon only")
        alphas_cumprod = scheduler.alphas_cumprod.to(device)
        self.alphas, self.sigmas = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        spacing = len(alphas_cumprod) // args.num_ddim_timesteps
        self.grid = torch.arange(1, args.num_ddim_timesteps + 1, device=device) * spacing - 1
        self.previous = F.pad(self.grid[:-1], (1, 0))
        self.uncond = self.encode_prompts([""])

    @torch.no_grad()
    def encode_prompts(self, captions):
        tokens = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt",
                                max_length=self.tokenizer.model_max_length)  # fmt: skip
        return self.text_encoder(tokens.input_ids.to(self.device))[0]

    @torch.no_grad()
    def encode_images(self, pixel_values):
        # contiguous, as torchvision's ToTensor gives them: the script's stream gives channels-last, which networks keep
        pixels = pixel_values.to(self.device).float().contiguous() / 127.5 - 1
        return self.vae.encode(pixels).latent_dist.sample() * self.vae.config.scaling_factor

    def alpha_sigma(self, t):
        return self.alphas[t].view(-1, 1, 1, 1), self.sigmas[t].view(-1, 1, 1, 1)

    def consistency(self, unet, x, t, c, w):
        """f(x, w, c, t) of a float32 U-Net that runs under autocast."""
        half = self.args.unet_time_cond_proj_dim // 2
        frequencies = torch.exp(torch.arange(half, device=self.device) * (-math.log(10000.0) / (half - 1)))
        angles = 1000 * w[:, None] * frequencies[None]
        embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            eps = unet(x, t, c.float(), timestep_cond=embedding).sample.float()
        alpha, sigma = self.alpha_sigma(t)
        time = self.args.timestep_scaling_factor * t.view(-1, 1, 1, 1)
        return 0.25 / (time**2 + 0.25) * x + time / (time**2 + 0.25).sqrt() * (x - sigma * eps) / alpha

    @torch.no_grad()
    def solver_step(self, x_t, t, previous, c, w):
        """One DDIM step of the guided teacher."""
        cond = self.teacher(x_t.to(self.dtype), t, c).sample.float()
        uncond = self.teacher(x_t.to(self.dtype), t, self.uncond.expand_as(c)).sample.float()
        eps = cond + w.view(-1, 1, 1, 1) * (cond - uncond)
        (alpha, sigma), (alpha_prev, sigma_prev) = self.alpha_sigma(t), self.alpha_sigma(previous)
        return alpha_prev * (x_t - sigma * eps) / alpha + sigma_prev * eps

    def loss(self, x_0, c, eps, index, w):
        t, previous = self.grid[index], self.previous[index]
        alpha, sigma = self.alpha_sigma(t)
        x_t = alpha * x_0 + sigma * eps
        prediction = self.consistency(self.student, x_t, t, c, w)
        with torch.no_grad():
            x_prev = self.solver_step(x_t, t, previous, c, w)
            target = self.consistency(self.target, x_prev, previous, c, w)
        difference = prediction - target
        if self.args.loss_type == "huber":
            return ((difference**2 + self.args.huber_c**2).sqrt() - self.args.huber_c).mean()
        return (difference**2).mean()

    def step(self, batch):
        args = self.args
        x_0, c = self.encode_images(batch["pixel_values"]), self.encode_prompts(batch["captions"])
        index = torch.randint(len(self.grid), (len(x_0),), device=self.device)
        w = args.w_min + (args.w_max - args.w_min) * torch.rand(len(x_0), device=self.device)
        loss = self.loss(x_0, c, torch.randn_like(x_0), index, w)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), args.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for ours, theirs in zip(self.target.parameters(), self.student.parameters(), strict=True):
                ours.mul_(args.ema_decay).add_(theirs, alpha=1 - args.ema_decay)
        return loss.detach()
