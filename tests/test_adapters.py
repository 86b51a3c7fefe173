"""LoRA files of other programs and ours: what --init_lora makes of them, what it refuses, and what is exported."""

import hashlib
import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import SCRIPTS, get_script, make_sdxl_pipeline, over, tiny_args
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from huggingface_hub.utils import filter_repo_objects
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_teachers import ldm_unet

SD, SDXL = "train_tcd_distill_lora_sd_wds", "train_lcm_distill_lora_sdxl_wds"
EMA = "pytorch_lora_weights.safetensors"
QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
FORWARD = QUERY.replace("attn1.to_q", "ff.net.2")
LAYERS = (QUERY, QUERY.replace("to_q", "to_out.0"), FORWARD, "down_blocks.0.resnets.0.conv1",
          "down_blocks.0.resnets.0.time_emb_proj", "down_blocks.0.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv",
          "conv_in", "time_embedding.linear_1")  # fmt: skip


def make_adapter(teacher, layers=LAYERS, seed=0):
    """{layer: (A, B, alpha)} with ranks from 2 to 4, alphas of their own, and in every third layer none."""
    modules = dict(UNet2DConditionModel.from_pretrained(teacher, subfolder="unet").named_modules())
    generator, made = torch.Generator().manual_seed(seed), {}
    for index, layer in enumerate(layers):
        weight, rank = modules[layer].weight, 2 + index % 3
        a = torch.randn(rank, *weight.shape[1:], generator=generator)
        b = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2), generator=generator)
        made[layer] = a, b, None if index % 3 == 2 else 1.5 + index
    return made


def changes(made):
    """{layer: what is added to its weight}, by kohya's rule: B A, times alpha / rank where there is an alpha."""
    return {layer: torch.tensordot(b.flatten(1), a, 1) * (1 if alpha is None else alpha / len(a))
            for layer, (a, b, alpha) in made.items()}  # fmt: skip


def kohya(made, name=lambda layer: layer):
    """An adapter as kohya's programs save it."""
    tensors = {}
    for layer, (a, b, alpha) in made.items():
        key = f"lora_unet_{name(layer).replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b}
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def peft(made, prefix="unet."):
    """An adapter as diffusers and peft save it, with alpha = rank."""
    tensors = {}
    for layer, (a, b, _) in made.items():
        tensors |= {f"{prefix}{layer}.lora_A.weight": a, f"{prefix}{layer}.lora_B.weight": b}
    return tensors


def old_diffusers(made):
    """As diffusers saved adapters until 2023."""
    tensors = {}
    for layer, (a, b, _) in made.items():
        attention = re.sub(r"\.(to_[qkv]|to_out)(\.0)?$", r".processor.\1_lora", layer)
        key = attention if attention != layer else f"{layer}.lora"
        tensors |= {f"unet.{key}.down.weight": a, f"unet.{key}.up.weight": b}
    return tensors


def plain(made):
    """The same matrices, without alphas."""
    return {layer: (a, b, None) for layer, (a, b, _) in made.items()}


def effect(unet, adapter="default"):
    """{layer: what an adapter adds to its weight}, as the U-Net applies it."""
    return {name: module.get_delta_weight(adapter).detach() for name, module in unet.named_modules()
            if isinstance(module, BaseTunerLayer)}  # fmt: skip


def assert_same(found, wanted):
    assert found.keys() == wanted.keys() and found
    for layer, value in found.items():
        torch.testing.assert_close(value, wanted[layer].reshape(value.shape), rtol=1e-4, atol=1e-5)


def write(path, tensors, **metadata):
    save_file({key: value.clone() for key, value in tensors.items()}, path, metadata={"format": "pt", **metadata})
    return str(path)


def lora_metadata(**values):
    return {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in values.items()})}


# -------------------------------------------------------------------------------------------------------- adapters in


@over([SD, SDXL])
def test_every_layer_has_the_scale_of_its_file(teacher, start, tmp_path):
    made = make_adapter(teacher)
    assert len({None if alpha is None else alpha / len(a) for a, _, alpha in made.values()}) > 4
    run = start("--init_lora", write(tmp_path / "lora.safetensors", kohya(made)))
    for adapter in ("default", "target"):
        assert_same(effect(run.models.student, adapter), changes(made))


@over([SD, SDXL])
def test_attention_layers_with_one_scale_in_alphas_of_their_own(teacher, start, tmp_path):
    """alpha / rank is 1/2 everywhere, of ranks 2 to 4."""
    made = {layer: (a, b, len(a) / 2) for layer, (a, b, _) in make_adapter(teacher).items()}
    run = start("--init_lora", write(tmp_path / "lora.safetensors", kohya(made)))
    layers = [module for module in run.models.student.modules() if isinstance(module, BaseTunerLayer)]
    assert {module.scaling["default"] for module in layers} == {0.5} and len(layers) == len(made)
    assert_same(effect(run.models.student), changes(made))


@over([SD], "form", [peft, lambda made: peft(made, "base_model.model."), lambda made: peft(made, ""),
                     lambda made: peft(made, "unet.base_model.model."), old_diffusers, kohya])  # fmt: skip
def test_without_alphas_the_scale_is_one(teacher, start, tmp_path, form):
    made = plain(make_adapter(teacher))
    run = start("--init_lora", write(tmp_path / "lora.safetensors", form(made)))
    assert_same(effect(run.models.student), changes(made))


@over([SDXL])
def test_names_of_blocks_as_in_stabilitys_code(teacher, start, tmp_path):
    """As kohya's programs save an SDXL LoRA."""
    made = make_adapter(teacher, (*LAYERS, "add_embedding.linear_2", "conv_out", "up_blocks.0.attentions.1.proj_in"))
    run = start("--init_lora", write(tmp_path / "lora.safetensors", kohya(made, ldm_unet)))
    assert_same(effect(run.models.student), changes(made))


@over([SD])
def test_scales_of_metadata(teacher, start, tmp_path):
    made = plain(make_adapter(teacher))
    metadata = lora_metadata(r=2, lora_alpha=3, alpha_pattern={"attn1.to_q": 7, "^conv_in": 5}, use_rslora=True,
                             rank_pattern={}, target_modules=list(made), lora_dropout=0.5)  # fmt: skip
    run = start("--init_lora", write(tmp_path / "lora.safetensors", peft(made), **metadata))
    alphas = {layer: {QUERY: 7, "conv_in": 5}.get(layer, 3) for layer in made}
    scaled = {layer: (a, b, alphas[layer] * math.sqrt(len(a))) for layer, (a, b, _) in made.items()}
    assert_same(effect(run.models.student), changes(scaled))


@over([SD])
def test_folder_of_peft(teacher, start, tmp_path):
    made = plain(make_adapter(teacher, LAYERS[:2]))
    write(tmp_path / "adapter_model.safetensors", peft(made, "base_model.model."))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6, "alpha_pattern": {}}))
    run = start("--init_lora", str(tmp_path))
    assert_same(effect(run.models.student), changes({k: (a, b, 6) for k, (a, b, _) in made.items()}))


@over([SD], "flags, probability", [((), 0), (("--lora_dropout", "0.25"), 0.25)])
def test_dropout_is_that_of_the_flag(teacher, start, tmp_path, flags, probability):
    made = plain(make_adapter(teacher))
    metadata = lora_metadata(r=2, lora_alpha=2, lora_dropout=0.5, target_modules=list(made))
    run = start("--init_lora", write(tmp_path / "lora.safetensors", peft(made), **metadata), *flags)
    found = [getattr(module.lora_dropout["default"], "p", 0) for module in run.models.student.modules()
             if isinstance(module, BaseTunerLayer)]  # fmt: skip
    assert found == [probability] * len(made)


@over([SD])
def test_half_precision_and_convolutions_of_one_pixel_for_linear_layers(teacher, start, tmp_path):
    """As programs write that keep the first code's 1 × 1 convolutions where diffusers has linear layers."""
    made = make_adapter(teacher, (QUERY, FORWARD))
    tensors = {key: value.half() for key, value in kohya(made).items()}
    wide = {key: value[..., None, None] if value.ndim == 2 else value for key, value in tensors.items()}
    run = start("--init_lora", write(tmp_path / "lora.safetensors", wide))
    rounded = {layer: (a.half().float(), b.half().float(), alpha) for layer, (a, b, alpha) in made.items()}
    assert_same(effect(run.models.student), changes(rounded))


# ------------------------------------------------------------------------------------------------- what is not taken

A, B = torch.zeros(2, 16), torch.zeros(16, 2)
KEY, NAME = f"lora_unet_{QUERY.replace('.', '_')}", f"unet.{QUERY}"
PAIR = {f"{KEY}.lora_down.weight": A, f"{KEY}.lora_up.weight": B}
PEFT_PAIR = {f"{NAME}.lora_A.weight": A, f"{NAME}.lora_B.weight": B}


@over([SD], "tensors, kind", [
    ({**PAIR, f"{KEY}.dora_scale": torch.ones(16, 1)}, "it is no plain LoRA, but a DoRA"),
    ({**PEFT_PAIR, f"{NAME}.lora_magnitude_vector": torch.ones(16)}, "it is no plain LoRA, but a DoRA"),
    ({f"{KEY}.hada_w1_a": A, f"{KEY}.hada_w1_b": A, f"{KEY}.alpha": torch.tensor(1.0)}, "no plain LoRA, but a LoHa"),
    ({f"{KEY}.lokr_w1": A, f"{KEY}.lokr_w2": A}, "it is no plain LoRA, but a LoKr"),
    ({f"{NAME}.lokr_w1": A, f"{NAME}.lokr_w2": A}, "it is no plain LoRA, but a LoKr"),
    ({**PAIR, f"{KEY}.lora_mid.weight": A}, "it is no plain LoRA, but a LoCon with a Tucker core"),
    ({**PEFT_PAIR, f"{NAME}.lora_B.bias": torch.ones(16)}, "it is no plain LoRA, but a LoRA with biases"),
    ({f"{KEY}.oft_blocks": A}, "it is no plain LoRA, but an OFT"),
    ({f"{KEY}.diff": A}, "it is no plain LoRA, but one of whole differences"),
    ({**PAIR, f"{KEY}.unheard_of": A}, f"it is no plain LoRA, but something that has a {KEY}.unheard_of"),
    ({f"{KEY}.lora_down.weight": A}, f"of {QUERY} it has lora_A alone"),
    ({f"{KEY}.lora_down.weight": torch.zeros(2, 8), f"{KEY}.lora_up.weight": B}, r"is given \(2, 8\)"),
    ({"unet.mid_block.resnets.0.norm1.lora_A.weight": A, "unet.mid_block.resnets.0.norm1.lora_B.weight": B},
     "is not supported"),
    ({"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)}, "it has no layer of this U-Net"),
    ({"transformer.blocks.0.lora_A.weight": A, "transformer.blocks.0.lora_B.weight": B},
     "no layer of this U-Net, but transformer.blocks.0"),
])  # fmt: skip
def test_what_is_refused(start, tmp_path, tensors, kind):
    path = write(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(SystemExit) as end:
        start("--init_lora", path)
    assert re.fullmatch(rf"error: --init_lora {re.escape(path)} cannot be loaded into this U-Net: [^\n]*{kind}[^\n]*",
                        end.value.code), end.value.code  # fmt: skip


@over([SD])
def test_what_is_not_used_is_said(teacher, start, tmp_path, capfd):
    made = make_adapter(teacher)
    more = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": A,
            "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": A,
            "lora_unet_down_blocks_7_resnets_0_conv1.lora_down.weight": A,
            "lora_unet_down_blocks_7_resnets_0_conv1.lora_up.weight": B}  # fmt: skip
    path = write(tmp_path / "lora.safetensors", {**kohya(made), **more})
    run = start("--init_lora", path, "--lora_alpha", "3")
    said = capfd.readouterr().err
    assert f"--init_lora {path}: its 2 tensors for text encoders are not used\n" in said
    assert "1 of its layers are not in this U-Net and not used, such as lora_unet_down_blocks_7_resnets_0" in said
    assert f"--init_lora {path} brings its rank, 3, its alpha and its layers; --lora_rank" in said
    assert_same(effect(run.models.student), changes(made))


@over([SD])
def test_folder_with_several_files(teacher, start, tmp_path, capfd):
    made = [make_adapter(teacher, LAYERS[:2], seed) for seed in range(2)]
    folder = tmp_path / "loras"
    folder.mkdir()
    write(folder / "one.safetensors", kohya(made[0]))
    run = start("--init_lora", str(folder))
    assert_same(effect(run.models.student), changes(made[0]))
    write(folder / "two.safetensors", kohya(made[1]))
    with pytest.raises(SystemExit, match="several files: name one of one.safetensors, two.safetensors$"):
        start("--init_lora", str(folder))
    write(folder / EMA, kohya(made[1]))
    run = start("--init_lora", str(folder))
    assert f"Of the files in {folder}, {EMA} is taken\n" in capfd.readouterr().err
    assert_same(effect(run.models.student), changes(made[1]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="it holds no .safetensors file$"):
        start("--init_lora", str(tmp_path / "empty"))


@over([SD], "name", ["someone/some-lora", "someone/some-lora/file.safetensors"])
def test_not_in_the_cache_and_no_network(start, name):
    with pytest.raises(SystemExit, match=f"^error: --init_lora {name} .* the hub cannot be reached$"):
        start("--init_lora", name)


@over([SD])
def test_errors_name_the_flag_that_was_given(script, start, tmp_path):
    write(tmp_path / "lora.safetensors", {f"{KEY}.hada_w1_a": A})
    with pytest.raises(SystemExit, match=f"^error: --init_from {tmp_path} cannot .* a LoHa$"):
        start("--init_from", str(tmp_path))
    with pytest.raises(SystemExit):
        script.parse_args(tiny_args("a", "b", "c", "--init_from", str(tmp_path), "--init_lora", str(tmp_path)))


# ------------------------------------------------------------------------------------------------------- adapters out


@pytest.fixture
def exported(script, case, teacher, start, tmp_path):
    """exported(file of --init_lora): the folder of what is exported, the Run, and its effect by each of two files."""

    def export(path, *more):
        run, output = start("--init_lora", path, *more), tmp_path / "started"
        patterns, found = script.export_lora(run), {}
        kind = StableDiffusionXLPipeline if case.is_sdxl else StableDiffusionPipeline
        plain = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet").state_dict()
        for name in (EMA, "started_kohya.safetensors"):
            pipe = kind.from_pretrained(teacher)
            pipe.load_lora_weights(str(output), weight_name=name)
            pipe.fuse_lora()
            pipe.unload_lora_weights()
            moved = {key.removesuffix(".weight"): value - plain[key] for key, value in pipe.unet.state_dict().items()}
            found[name] = {layer: value for layer, value in moved.items() if value.any()}
        return output, run, patterns, found

    return export


@over([SD, SDXL])
def test_both_files_have_the_effect_of_the_first(case, teacher, exported, tmp_path):
    """All kinds of layers, ranks from 2 to 4, scales of their own; by diffusers' own reader."""
    layers = (*LAYERS, "conv_out", "time_embedding.linear_2", "up_blocks.0.attentions.1.proj_in",
              "up_blocks.1.resnets.1.conv2", "up_blocks.1.resnets.1.conv_shortcut",
              *(["add_embedding.linear_1", "add_embedding.linear_2"] if case.is_sdxl else []))  # fmt: skip
    made = make_adapter(teacher, layers)
    output, _, _, found = exported(write(tmp_path / "lora.safetensors", kohya(made)))
    for name in found:
        assert_same(found[name], changes(made))
    keys = {key.split(".")[0] for key in load_file(output / "started_kohya.safetensors")}
    names = {f"lora_unet_{(ldm_unet(layer) if case.is_sdxl else layer).replace('.', '_')}" for layer in layers}
    assert keys == names


@over([SD])
def test_rank_stabilised_scale_is_exported(teacher, exported, tmp_path):
    made = plain(make_adapter(teacher))
    metadata = lora_metadata(r=2, lora_alpha=3, use_rslora=True, target_modules=list(made))
    output, _, _, found = exported(write(tmp_path / "lora.safetensors", peft(made), **metadata))
    scaled = {layer: (a, b, 3 * math.sqrt(len(a))) for layer, (a, b, _) in made.items()}
    for name in found:
        assert_same(found[name], changes(scaled))


def test_names_of_the_whole_sdxl():
    """Of layers whose names in kohya's SDXL files are known."""
    name = get_script(SDXL).kohya_name
    known = {"down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k":
             "input_blocks_4_1_transformer_blocks_1_attn2_to_k",
             "down_blocks.2.attentions.1.proj_in": "input_blocks_8_1_proj_in",
             "down_blocks.1.downsamplers.0.conv": "input_blocks_6_0_op",
             "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
             "up_blocks.0.attentions.2.proj_out": "output_blocks_2_1_proj_out",
             "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
             "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj":
             "output_blocks_4_1_transformer_blocks_0_ff_net_0_proj",
             "up_blocks.2.resnets.2.conv_shortcut": "output_blocks_8_0_skip_connection",
             "add_embedding.linear_2": "label_emb_0_2", "time_embedding.linear_1": "time_embed_0"}  # fmt: skip
    assert {layer: name(layer, 2) for layer in known} == {layer: f"lora_unet_{value}" for layer, value in known.items()}
    assert name("up_blocks.0.upsamplers.0.conv") == "lora_unet_up_blocks_0_upsamplers_0_conv"


@over([SD, SDXL])
def test_metadata_by_which_programs_show_and_sort_it(case, teacher, exported, tmp_path):
    made = {layer: (a, b, 3.0) for layer, (a, b, _) in make_adapter(teacher, (QUERY, FORWARD)[:1]).items()}
    output, *_ = exported(write(tmp_path / "lora.safetensors", kohya(made)))
    path = output / "started_kohya.safetensors"
    with safe_open(path, "pt") as file:
        about = file.metadata()
    wanted = {"ss_base_model_version": "sdxl_base_v1-0" if case.is_sdxl else "sd_v1", "ss_v2": "False",
              "ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "3",
              "ss_output_name": "started_kohya", "modelspec.sai_model_spec": "1.0.0", "modelspec.title": "started",
              "modelspec.architecture": f"stable-diffusion-{'xl-v1-base' if case.is_sdxl else 'v1'}/lora",
              "modelspec.implementation": "sgm" if case.is_sdxl else "diffusers",
              "modelspec.resolution": "16x16", "modelspec.prediction_type": "epsilon"}  # fmt: skip
    assert {key: about[key] for key in wanted} == wanted
    assert about["modelspec.usage_hint"].startswith(f"{SCRIPTS[case.name].scheduler}, num_inference_steps=4")
    data = path.read_bytes()
    content = data[8 + int.from_bytes(data[:8], "little") :]
    assert about["modelspec.hash_sha256"] == "0x" + hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("width, prediction, version, architecture", [
    (768, "epsilon", "sd_v1", "stable-diffusion-v1"), (1024, "epsilon", "sd_v2", "stable-diffusion-v2-512"),
    (1024, "v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v")])  # fmt: skip
def test_versions(width, prediction, version, architecture):
    unet = type("UNet", (), {"config": type("Config", (), {"cross_attention_dim": width})})
    assert get_script(SD).StableDiffusion.versions(unet, prediction) == (version, architecture)


@over([SD])
def test_upload_from_a_folder_whose_name_has_glob_characters(script, start, tmp_path):
    """The patterns of the upload, by the hub's own filter, take what was exported and no other file."""
    run = start()
    run.args.output_dir = str(tmp_path / "run [a*]?")
    output = Path(run.args.output_dir)
    output.mkdir()
    patterns = script.export_lora(run)
    (output / "run axx_kohya.safetensors").touch()  # which the name would match, were it a pattern
    files = [path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()]
    found = set(filter_repo_objects(files, allow_patterns=patterns))
    assert found == {EMA, EMA.replace(".", "_online."), "run [a*]?_kohya.safetensors",
                     "scheduler/scheduler_config.json"}  # fmt: skip


@over([SDXL])
def test_fused_pipeline_is_the_base_and_the_adapter(script, make_teacher, start, tmp_path):
    teacher = make_teacher(make_sdxl_pipeline)
    made = make_adapter(teacher)
    run = start("--init_lora", write(tmp_path / "lora.safetensors", kohya(made)), "--export_fused")
    script.export_lora(run)
    fused = StableDiffusionXLPipeline.from_pretrained(tmp_path / "started" / "fused").unet.state_dict()
    plain = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet").state_dict()
    wanted = {f"{layer}.weight": change for layer, change in changes(made).items()}
    for key, value in plain.items():
        more = wanted.get(key, torch.zeros(())).reshape(value.shape if key in wanted else ())
        torch.testing.assert_close(fused[key], value + more, rtol=1e-5, atol=1e-5)
