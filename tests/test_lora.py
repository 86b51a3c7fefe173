"""A LoRA: one base under three networks, what is trained, what is exported, and going on from other LoRAs.

All six scripts share this; it is tested on the first, and with SDXL where the family counts.
"""

import contextlib
import json
import os

import pytest
import torch
from conftest import (
    LCM_LORA,
    LCM_XL_LORA,
    assert_same_end,
    differences,
    ends_with,
    over,
    read_checkpoint,
    read_losses,
    run_main,
    tiny_args,
)
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

BOTH = [LCM_LORA, LCM_XL_LORA]
EMA, ONLINE = "pytorch_lora_weights.safetensors", "pytorch_lora_weights_online.safetensors"


@pytest.fixture
def case(request):
    return getattr(request, "param", LCM_LORA)


@pytest.fixture
def train(case, script, teacher, shards, monkeypatch):
    """train(output, *more): a run of four steps, of which it returns the Run; later flags override earlier ones."""

    def run(output, *more, teacher=teacher):
        runs, plain = [], script.start_run
        with monkeypatch.context() as patch:
            patch.setattr(script, "start_run", lambda *args: runs.append(plain(*args)) or runs[-1])
            run_main(script, tiny_args(teacher, shards, output, *case.flags, *more))
        return runs[0]

    return run


def inputs(case, batch=3):
    """x_t, t, c, w of a Denoiser; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    c = {"text": torch.randn(batch, 16, 32 if case.is_sdxl else 16, generator=generator)}
    if case.is_sdxl:
        c["pooled"] = torch.randn(batch, 24, generator=generator)
        c["time_ids"] = torch.tensor([[20, 16, 2, 0, 16, 16]] * batch)
    return torch.randn(batch, 4, 8, 8, generator=generator), torch.tensor([999, 499, 19][:batch]), c, torch.ones(batch)


def untouched(case, teacher, x_t, t, c, dtype=torch.float32):
    """What the teacher's U-Net, loaded on its own and run as the script runs it, says."""
    unet = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet", torch_dtype=dtype)
    unet = unet.to(memory_format=torch.channels_last).eval()
    added = {}
    if case.is_sdxl:
        added = {"added_cond_kwargs": {"text_embeds": c["pooled"].to(dtype), "time_ids": c["time_ids"].float()}}
    half = torch.autocast("cpu", torch.bfloat16) if dtype == torch.bfloat16 else contextlib.nullcontext()
    with torch.no_grad(), half:
        return unet(x_t.to(dtype), t, c["text"].to(dtype), **added).sample.float()


def adapters(run):
    """{adapter name: {parameter name without it: tensor}}, copied."""
    found = {}
    for name, value in run.models.student.named_parameters():
        for adapter in ("default", "target"):
            if f".{adapter}." in name:
                found.setdefault(adapter, {})[name.replace(f".{adapter}.", ".")] = value.detach().clone()
    return found


# ------------------------------------------------------------------------------------------- one base, three networks


@over(BOTH, "precision, dtype", [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_adapters_off_is_the_untouched_teacher(case, teacher, train, tmp_path, precision, dtype):
    run, (x_t, t, c, w) = train(tmp_path, "--mixed_precision", precision), inputs(case)
    with torch.no_grad():
        found = {name: run.nets[name](x_t, t, c, w) for name in ("student", "teacher", "target")}
    exact = untouched(case, teacher, x_t, t, c, dtype)
    assert torch.equal(found["teacher"], exact)
    for one, other in (("student", "teacher"), ("target", "teacher"), ("student", "target")):
        assert not torch.equal(found[one], found[other])
    assert run.models.student.conv_in.weight.dtype == dtype


@over(BOTH)
def test_a_new_adapter_changes_nothing(case, teacher, start):
    run, given = start(), inputs(case)
    both = adapters(run)
    assert not differences(both["default"], both["target"])
    assert {value.any().item() for name, value in both["target"].items() if ".lora_A" in name} == {True}
    exact = untouched(case, teacher, *given[:3])
    with torch.no_grad():
        for name in ("student", "target"):
            torch.testing.assert_close(run.nets[name](*given), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ema_decay, copies", [("0.95", 2), ("0", 1)])
def test_one_base_and_no_second_copy_of_it(teacher, train, tmp_path, ema_decay, copies):
    """Counts the numbers in everything that a run holds: models, Denoisers, optimizer."""
    run = train(tmp_path, "--ema_decay", ema_decay)
    unet = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet")
    base = sum(value.numel() for value in unet.parameters())
    adapter = sum(value.numel() for value in load_file(tmp_path / EMA).values())
    modules = [*vars(run.models).values(), *(net.unet for net in run.nets.values()),
               *(net.base for net in run.nets.values())]  # fmt: skip
    modules = {id(module): module for module in modules if isinstance(module, torch.nn.Module)}
    unets = [module for module in modules.values() if hasattr(module, "conv_in")]
    assert len(unets) == 1
    storages = {value.untyped_storage().data_ptr(): value.numel() for value in unets[0].state_dict().values()}
    assert sum(storages.values()) == base + copies * adapter
    assert 0 < adapter < base
    lists = [value for value in vars(run.models).values() if isinstance(value, list) and torch.is_tensor(value[0])]
    assert len(lists) == 2 and all(sum(value.numel() for value in tensors) == adapter for tensors in lists)
    state = run.optimizer.optimizer.state.values()
    assert sum(value.numel() for entry in state for value in entry.values() if value.ndim) == 2 * adapter
    frozen = [value for name, value in vars(run.models).items() if name in ("vae", "text_encoders")]
    assert not [value for module in frozen for value in module.parameters() if value.requires_grad]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_only_the_adapter_is_trained(teacher, train, tmp_path, precision):
    run = train(tmp_path, "--mixed_precision", precision)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    before = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet", torch_dtype=dtype).state_dict()
    after = {name.replace(".base_layer", ""): value for name, value in run.models.student.state_dict().items()
             if ".lora_" not in name}  # fmt: skip
    assert not differences(before, after)
    trained = {id(value) for group in run.optimizer.optimizer.param_groups for value in group["params"]}
    named = dict(run.models.student.named_parameters())
    assert trained == {id(value) for name, value in named.items() if ".default." in name}
    assert {value.dtype for name, value in named.items() if ".lora_" in name} == {torch.float32}
    matrices = {name: value for name, value in named.items() if ".lora_B.default." in name}
    assert len(matrices) > 20 and all(value.any() for value in matrices.values())


def test_gradient_reaches_the_students_adapter_alone(case, script, start):
    run, (x_0, _, c, _) = start("--w_max", "9"), inputs(case)
    with torch.no_grad():  # else the first matrix would have no gradient
        for name, value in run.models.student.named_parameters():
            if ".lora_B." in name:
                value.normal_(std=0.1, generator=torch.Generator().manual_seed(value.numel()))
    draws = script.draw(x_0, run.models.schedule, run.args, torch.Generator().manual_seed(0), 0)
    script.consistency_loss(**run.nets, schedule=run.models.schedule, x_0=x_0, c=c, uncond=run.uncond, draws=draws,
                            args=run.args).mean().backward()  # fmt: skip
    named = dict(run.models.student.named_parameters())
    touched = {name for name, value in named.items() if value.grad is not None and value.grad.any()}
    assert touched == {name for name in named if ".default." in name} and len(touched) > 40


def test_ema_is_the_average_by_hand(train, tmp_path):
    flags = ["--max_train_steps", "2", "--checkpointing_steps", "1", "--ema_decay", "0.8"]
    train(tmp_path, *flags)
    first, second = ({name: load_file(tmp_path / f"checkpoint-{step}" / f"{name}.safetensors")
                      for name in ("student", "target")} for step in (1, 2))  # fmt: skip
    for name, value in second["target"].items():
        torch.testing.assert_close(value, 0.8 * first["target"][name] + 0.2 * second["student"][name])
        if "lora_B" in name:  # which starts at zero
            torch.testing.assert_close(first["target"][name], 0.2 * first["student"][name])
            assert not torch.allclose(value, second["student"][name], rtol=1e-3, atol=0)
    assert not differences(second["target"], {k.removeprefix("unet."): v for k, v in load_file(tmp_path / EMA).items()})


def test_without_ema_the_target_is_the_student(case, script, train, tmp_path, monkeypatch):
    losses, plain = [], script.consistency_loss

    def spy(student, target, **given):
        losses.append((student.adapter, target.adapter))
        return plain(student=student, target=target, **given)

    monkeypatch.setattr(script, "consistency_loss", spy)
    run, given = train(tmp_path, "--ema_decay", "0"), inputs(case)
    assert losses == [("default", "default")] * 4 and set(adapters(run)) == {"default"}
    with torch.no_grad():
        assert torch.equal(run.nets["student"](*given), run.nets["target"](*given))
    assert not differences(load_file(tmp_path / EMA), load_file(tmp_path / ONLINE))


# --------------------------------------------------------------------------------------------------- rank, layers, …


@over(BOTH)
def test_default_layers(case, start):
    run = start()
    named = dict(run.models.student.named_parameters())
    layers = {name.split(".lora_A")[0] for name in named if ".lora_A.default." in name}
    everything = {name.replace(".base_layer", "") for name, module in run.models.student.named_modules()
                  if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and ".lora_" not in name}  # fmt: skip
    plain = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    plain |= {"add_embedding.linear_1", "add_embedding.linear_2"} if case.is_sdxl else set()
    assert everything - layers == plain
    for part in ("attn1.to_q", "attn1.to_k", "attn2.to_v", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in",
                 "proj_out", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv",
                 "time_emb_proj"):  # fmt: skip
        assert [layer for layer in layers if layer.endswith(f".{part}")], part
    parameters = dict(run.models.student.named_parameters())
    assert {value.shape[0] for name, value in parameters.items() if ".lora_A.default." in name} == {4}


def test_target_modules(start):
    run = start("--lora_target_modules", "to_q", "time_embedding.linear_1")
    layers = {name.split(".lora_A")[0] for name in adapters(run)["default"] if ".lora_A." in name}
    assert "time_embedding.linear_1" in layers and len(layers) > 2
    assert all(layer.endswith(".to_q") or layer == "time_embedding.linear_1" for layer in layers)


def test_target_module_that_matches_nothing(start):
    with pytest.raises(SystemExit, match="^error: --lora_target_modules: no layer's name ends in to_x, to_y$"):
        start("--lora_target_modules", "to_q", "to_y", "to_x")


def test_alpha_scales_the_adapter(case, start):
    """Twice the alpha is twice the second matrix."""
    given, found = inputs(case), []
    for alpha, factor in (("4", 2), ("8", 1)):
        run = start("--lora_alpha", alpha)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, value in run.models.student.named_parameters():
                if ".lora_B.default." in name:
                    value.copy_(0.1 * factor * torch.randn(value.shape, generator=generator))
            found.append(run.nets["student"](*given))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], run.nets["teacher"](*given), atol=1e-2)
    config = start("--lora_rank", "3").models.student.peft_config["default"]
    assert (config.r, config.lora_alpha) == (3, 6)  # as `case.flags` say


def test_alpha_is_the_rank_by_default(script, start):
    args = script.parse_args(tiny_args("t", "s", "o", "--lora_rank", "5"))
    assert (args.lora_rank, args.lora_alpha, args.lora_dropout) == (5, None, 0)
    unet = UNet2DConditionModel.from_config({**start().models.student.config})
    names = script.add_adapters(unet, args, script.StableDiffusion)
    assert names == {"student": "default", "target": "target", "average": "target"}
    assert (unet.peft_config["default"].r, unet.peft_config["default"].lora_alpha) == (5, 5)


def test_dropout_is_the_students_in_training_alone(case, script, train, tmp_path):
    run, (x_t, t, c, w) = train(tmp_path, "--lora_dropout", "0.5"), inputs(case)

    @torch.no_grad()
    def is_steady(net):
        return torch.equal(*(net(x_t, t, c, w) for _ in range(2)))

    assert {name: is_steady(net) for name, net in run.nets.items()} == {"teacher": True, "student": False,
                                                                        "target": True}  # fmt: skip
    with script.without_dropout(run.nets):
        assert is_steady(run.nets["student"])
    assert not is_steady(run.nets["student"])
    pipe = DiffusionPipeline.from_pretrained(run.args.pretrained_teacher_model)
    pipe.load_lora_weights(tmp_path, weight_name=EMA)  # has no layer in training mode that drops anything
    assert is_steady(lambda x_t, t, c, _: pipe.unet(x_t, t, c["text"]).sample)
    plain = train(tmp_path / "plain")
    assert is_steady(plain.nets["student"])
    assert read_losses(tmp_path) != read_losses(tmp_path / "plain")


def test_no_dropout_before_the_first_training_step(case, start):
    """The layers that were added drop nothing unless the student is asked."""
    run = start("--lora_dropout", "0.5")
    with torch.no_grad():
        run.nets["target"](*inputs(case))
    dropouts = [module for module in run.models.student.modules() if isinstance(module, torch.nn.Dropout) and module.p]
    assert len(dropouts) > 40 and not [module for module in dropouts if module.training]


def test_a_step_switches_by_attribute(script, start, monkeypatch):
    """Neither train() nor peft's methods walk through the modules: 140 ms for SDXL, where the attributes take 4."""
    run, calls = start("--lora_dropout", "0.5"), []
    for owner, name in (
        (torch.nn.Module, "train"),
        (BaseTunerLayer, "set_adapter"),
        (BaseTunerLayer, "enable_adapters"),
    ):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, plain=plain: (calls.append(plain), plain(*args))[1])
    script.train_step(run)
    assert not calls
    run.models.student.set_adapter("default")
    run.models.student.eval()
    assert len(calls) > 100
    run.reader.close()


RESUMED = [["--lora_dropout", "0.3", "--gradient_checkpointing"], ["--ema_decay", "0"],
           "--lora_target_modules to_q conv1 --no-cast_teacher_unet --mixed_precision bf16".split()]  # fmt: skip


@pytest.mark.parametrize("flags", RESUMED)
def test_resume_is_exact(train, tmp_path, flags):
    flags = [*flags, "--checkpointing_steps", "2"]
    train(tmp_path / "whole", *flags)
    train(tmp_path / "parts", *flags, "--max_train_steps", "2")
    train(tmp_path / "parts", *flags, "--resume_from_checkpoint", "latest")
    assert_same_end(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("flags", [[], ["--mixed_precision", "bf16"], ["--lora_dropout", "0.3"]])
def test_gradient_checkpointing_changes_nothing(train, tmp_path, flags):
    train(tmp_path / "plain", *flags)
    train(tmp_path / "checkpointed", *flags, "--gradient_checkpointing")
    one, other = (read_losses(tmp_path / name) for name in ("plain", "checkpointed"))
    torch.testing.assert_close(one, other, rtol=2e-2 if "bf16" in flags else 1e-4, atol=0)


# ----------------------------------------------------------------------------------------------- checkpoints, export


def test_checkpoints_hold_adapters_alone(train, tmp_path):
    train(tmp_path, "--max_train_steps", "1", "--checkpointing_steps", "1")
    folder, adapter = tmp_path / "checkpoint-1", sum(value.numel() for value in load_file(tmp_path / EMA).values())
    for name in ("student", "target"):
        tensors = load_file(folder / f"{name}.safetensors")
        assert sum(value.numel() for value in tensors.values()) == adapter
        assert all(".lora_A." in key or ".lora_B." in key for key in tensors)
    assert {path.name for path in folder.iterdir()} == {"student.safetensors", "target.safetensors", "optimizer.pt",
                                                        "state.json"}  # fmt: skip
    optimizer = [value for value in read_checkpoint(folder).values() if torch.is_tensor(value) and value.ndim]
    assert sum(value.numel() for value in optimizer) == 4 * adapter  # the two networks, and two moments


@pytest.mark.parametrize("flags", [["--lora_rank", "5"], ["--lora_target_modules", "to_q"],
                                   ["--lora_target_modules", "conv_in"]])  # fmt: skip
def test_checkpoint_of_another_adapter_is_refused(train, tmp_path, flags):
    train(tmp_path, "--max_train_steps", "1", "--checkpointing_steps", "1")
    with ends_with("checkpoint .*checkpoint-1 is of another model"):
        train(tmp_path, *flags, "--resume_from_checkpoint", "latest")


@torch.no_grad()
def draw(pipe):
    """A picture in two steps of the pipeline's own scheduler, without guidance."""
    pipe.set_progress_bar_config(disable=True)
    return pipe("a fox", num_inference_steps=2, guidance_scale=1, output_type="np", height=16, width=16,
                generator=torch.Generator().manual_seed(0)).images[0]  # fmt: skip


@pytest.fixture
def trained(case, train, kept, tmp_path_factory):
    """(output, Run) of 20 quick steps with all exports; rank 4, alpha 6."""
    if ("trained", case) not in kept:
        output = tmp_path_factory.mktemp("trained") / "my-lora"
        flags = ["--max_train_steps", "20", "--learning_rate", "1e-2", "--export_fused"]
        kept["trained", case] = output, train(output, *flags)
    return kept["trained", case]


@pytest.fixture
def pipes(teacher, trained):
    """pipes(load): a picture of a fresh teacher, after `load(pipe)`, with the scheduler that was exported."""
    kind = type(trained[1].models.scheduler)

    def make(load=lambda _: None, path=teacher):
        pipe = DiffusionPipeline.from_pretrained(path)
        pipe.scheduler = kind.from_pretrained(trained[0], subfolder="scheduler")
        load(pipe)
        return draw(pipe)

    return make


def assert_same_picture(one, other):
    assert abs(one - other).max() < 1e-4, abs(one - other).max()


@over(BOTH)
def test_exported_lora_gives_the_pictures_of_the_run(trained, pipes):
    output, run = trained
    plain, ema = pipes(), pipes(lambda pipe: pipe.load_lora_weights(str(output)))
    online = pipes(lambda pipe: pipe.load_lora_weights(str(output), weight_name=ONLINE))
    for one, other in ((plain, ema), (plain, online), (ema, online)):
        assert abs(one - other).max() > 3e-3  # far above what pictures that should be the same may differ
    own = {}
    for name in ("target", "default"):
        run.models.student.enable_adapters()
        run.models.student.set_adapter(name)
        own[name] = pipes(lambda pipe: pipe.register_modules(unet=run.models.student.eval()))
    assert_same_picture(ema, own["target"])
    assert_same_picture(online, own["default"])
    run.models.student.disable_adapters()
    assert_same_picture(plain, pipes(lambda pipe: pipe.register_modules(unet=run.models.student)))


def test_metadata_of_the_exported_lora(trained):
    for file in (EMA, ONLINE):
        with safe_open(trained[0] / file, "pt") as opened:
            metadata = json.loads(opened.metadata()["lora_adapter_metadata"])
        assert (metadata["unet.r"], metadata["unet.lora_alpha"]) == (4, 6)
        assert "to_q" in metadata["unet.target_modules"]
        assert all(key.startswith("unet.") for key in load_file(trained[0] / file))


@over(BOTH)
def test_kohya_file_gives_the_same_pictures(trained, pipes):
    output, _ = trained
    tensors = load_file(output / "my-lora_kohya.safetensors")
    layers = {key.removesuffix(".lora_down.weight") for key in tensors if key.endswith(".lora_down.weight")}
    assert tensors.keys() == {f"{k}.{part}" for k in layers for part in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert all(key.startswith("lora_unet_") and "." not in key for key in layers) and len(layers) > 20
    assert {tensors[f"{key}.alpha"].item() for key in layers} == {6}
    ema = pipes(lambda pipe: pipe.load_lora_weights(str(output)))
    kohya = pipes(lambda pipe: pipe.load_lora_weights(str(output), weight_name="my-lora_kohya.safetensors"))
    assert_same_picture(ema, kohya)


@over(BOTH)
def test_fused_pipeline_gives_the_same_pictures(case, trained, pipes):
    output, _ = trained
    fused = DiffusionPipeline.from_pretrained(output / "fused")
    assert type(fused.scheduler).__name__ == case.scheduler
    assert not [name for name in fused.unet.state_dict() if "lora" in name]
    assert_same_picture(pipes(lambda pipe: pipe.load_lora_weights(str(output))), draw(fused))


# -------------------------------------------------------------------------------------- from an earlier LoRA, quantised


@over(BOTH, "file, precision", [("", "no"), (EMA, "bf16"), (ONLINE, "no"), ("my-lora_kohya.safetensors", "no")])
def test_init_lora_starts_where_the_other_ended(case, trained, start, file, precision):
    output, before = trained
    run, given = (
        start("--init_lora", str(output / file), "--lora_rank", "9", "--mixed_precision", precision),
        inputs(case),
    )
    assert run.models.student.peft_config["default"].r == 4  # the file's, whatever --lora_rank says
    assert all(value.requires_grad for value in run.models.student_parameters)
    ended = adapters(before)["default" if file == ONLINE else "target"]
    for name in ("default", "target"):
        assert not differences(adapters(run)[name], ended)
    if precision == "no":
        with torch.no_grad():
            exact = before.nets["student" if file == ONLINE else "target"](*given)
            for name in ("student", "target"):
                torch.testing.assert_close(run.nets[name](*given), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("file", ["", "my-lora_kohya.safetensors"])
def test_init_lora_is_trained_and_exported(trained, train, tmp_path, file):
    train(tmp_path / "again", "--init_lora", str(trained[0] / file), "--learning_rate", "0")
    assert not differences(load_file(tmp_path / "again" / EMA), load_file(trained[0] / EMA))
    kohya = (load_file(path) for path in (tmp_path / "again" / "again_kohya.safetensors",
                                          trained[0] / "my-lora_kohya.safetensors"))  # fmt: skip
    assert not differences(*kohya)
    train(tmp_path / "on", "--init_lora", str(trained[0] / file))
    one, other = (load_file(path / ONLINE) for path in (tmp_path / "on", trained[0]))
    assert len(differences(one, other)) == len(one)


@over(BOTH)
def test_init_lora_whose_layers_have_ranks_and_alphas_of_their_own(trained, train, pipes, tmp_path):
    """As kohya's trainer writes them: convolutions of another rank and alpha than the rest."""
    tensors = load_file(trained[0] / "my-lora_kohya.safetensors")
    for key in [key for key in tensors if key.endswith(("conv1.lora_down.weight", "in_layers_2.lora_down.weight"))]:
        layer = key.removesuffix(".lora_down.weight")
        tensors[key], tensors[f"{layer}.alpha"] = tensors[key][:2].clone(), torch.tensor(1.0)
        tensors[f"{layer}.lora_up.weight"] = tensors[f"{layer}.lora_up.weight"][:, :2].clone()
    save_file(tensors, tmp_path / "mixed.safetensors")
    train(tmp_path / "again", "--init_lora", str(tmp_path / "mixed.safetensors"), "--learning_rate", "0")
    wanted = pipes(lambda pipe: pipe.load_lora_weights(str(tmp_path), weight_name="mixed.safetensors"))
    assert abs(wanted - pipes(lambda pipe: pipe.load_lora_weights(str(trained[0])))).max() > 1e-3
    files = (EMA, ONLINE, "again_kohya.safetensors")
    found = {file: pipes(lambda pipe, file=file: pipe.load_lora_weights(str(tmp_path / "again"), weight_name=file))
             for file in files}  # fmt: skip
    assert {file: abs(picture - wanted).max() < 1e-4 for file, picture in found.items()} == dict.fromkeys(files, True)


def garbage(folder, trained):
    """Names of things that are no LoRA of this U-Net."""
    tensors = load_file(trained / EMA)
    folder.mkdir(exist_ok=True)
    (folder / "text.safetensors").write_text("this is no safetensors file")
    (folder / "empty.safetensors").touch()
    save_file({"unet.nothing.lora_A.weight": torch.zeros(4, 8), "unet.nothing.lora_B.weight": torch.zeros(8, 4)},
              folder / "other.safetensors")  # fmt: skip
    save_file({"weight": torch.zeros(4, 8)}, folder / "plain.safetensors")
    wide = {key: value.repeat(1, 2, *[1] * (value.ndim - 2)) if "lora_A" in key else value
            for key, value in tensors.items()}  # fmt: skip
    save_file(wide, folder / "wide.safetensors")
    save_file({key.replace("unet.", "text_encoder."): value for key, value in tensors.items()},
              folder / "text_encoder.safetensors")  # fmt: skip


@pytest.mark.parametrize("file", ["gone.safetensors", "text.safetensors", "empty.safetensors", "other.safetensors",
                     "plain.safetensors", "wide.safetensors", "text_encoder.safetensors", "no/such-model"])  # fmt: skip
def test_init_lora_that_is_none(trained, start, tmp_path, file):
    garbage(tmp_path / "garbage", trained[0])
    path = file if file == "no/such-model" else tmp_path / "garbage" / file
    with ends_with(f"--init_lora .*{os.path.basename(path)} "):
        start("--init_lora", path)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_quantised_base_needs_a_gpu(train, tmp_path, precision):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with ends_with(f"--base_precision {precision} needs a GPU"):
        train(tmp_path, "--base_precision", precision)
