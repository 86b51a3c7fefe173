"""What a teacher may look like on the disk, and what is refused: no network is ever silently random."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, get_script, load_script, make_pipeline, make_sdxl_pipeline, run_main, tiny_args
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = {"unet": WEIGHTS, "vae": WEIGHTS, "text_encoder": "model.safetensors", "text_encoder_2": "model.safetensors"}
KINDS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel,
         "text_encoder_2": CLIPTextModelWithProjection}  # fmt: skip


@pytest.fixture
def begin(shards, tmp_path):
    """begin(teacher, *more, script): the Run of a command line, before its first step."""
    from accelerate.state import AcceleratorState, GradientState

    def make(teacher, *more, script="train_lcm_distill_sd_wds"):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        module, output = get_script(script), tmp_path / "started"
        output.mkdir(exist_ok=True)
        args = module.parse_args(tiny_args(str(teacher), shards, output, *SCRIPTS[script].flags, *more))
        return module.start_run(args, module.make_accelerator(args))

    return make


@pytest.fixture
def copy(make_teacher, tmp_path):
    """copy(sdxl): a tiny pipeline that may be changed."""
    return lambda sdxl=False: Path(
        shutil.copytree(make_teacher(make_sdxl_pipeline if sdxl else make_pipeline), tmp_path / "teacher"))  # fmt: skip


@pytest.fixture
def refused(begin):
    """refused(…): the line that a start ends with."""

    def run(*given, **options):
        with pytest.raises(SystemExit) as end:
            begin(*given, **options)
        assert re.fullmatch(r"error: [^\n]+", end.value.code)
        return end.value.code

    return run


@pytest.fixture(scope="session")
def tool():
    return load_script(ROOT / "tools" / "prepare_shards.py")


@pytest.fixture
def encoder(tool):
    """encoder(path): what prepare_shards.py encodes with."""

    def load(path, *more):
        args = tool.parse_args(["--image_folder", "a", "--output_dir", "b", "--encode", str(path), "--resolution", "16",
                                *more])  # fmt: skip
        return tool.Encoder(args, torch.device("cpu"))

    return load


def change(folder, part, what):
    """Lets `what` change the tensors of a part; returns the name of the first of them."""
    path = folder / part / FILES[part]
    tensors = load_file(path)
    name = sorted(tensors)[0]
    what(tensors, name)
    save_file(tensors, path, metadata={"format": "pt"})
    return name


def edit(path, **values):
    """Sets values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def drop(tensors, name):
    del tensors[name]


def reshape(tensors, name):
    tensors[name] = torch.zeros(3, 5)


def add(tensors, _name):
    tensors["surplus.weight"] = torch.zeros(3)


def same(network, other):
    """Whether two networks hold the same values, in any precision."""
    mine, theirs = network.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key].float(), theirs[key].float()) for key in mine)


def originals(path):
    return {part: kind.from_pretrained(path, subfolder=part) for part, kind in KINDS.items() if (path / part).is_dir()}


# ------------------------------------------------------------------------------------------------ all tensors are there


@pytest.mark.parametrize("damage", [drop, reshape])
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_tensor_that_is_missing_or_misshapen(copy, refused, part, damage):
    teacher = copy()
    name = change(teacher, part, damage)
    line = refused(teacher)
    assert f"{teacher}/{part}: 1 tensors of a {KINDS[part].__name__} are missing or misshapen, such as {name}" in line


def test_tensor_that_is_missing_in_the_second_encoder(copy, refused, encoder):
    teacher = copy(sdxl=True)
    name = change(teacher, "text_encoder_2", drop)
    assert name in refused(teacher, script="train_lcm_distill_lora_sdxl_wds")
    with pytest.raises(SystemExit, match=f"^error: --encode .*text_encoder_2: 1 tensors .* such as {name}$"):
        encoder(teacher)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_tensor_that_is_missing_in_the_tool(copy, encoder, part):
    teacher = copy()
    name = change(teacher, part, drop)
    with pytest.raises(SystemExit, match=rf"^error: --encode .*/{part}: 1 tensors .* such as {re.escape(name)}$"):
        encoder(teacher)


def test_tensor_that_is_missing_in_another_vae_and_in_init_from(copy, make_teacher, refused):
    other, teacher = copy(), make_teacher(make_pipeline)
    names = [change(other, part, drop) for part in ("vae", "unet")]
    assert names[0] in refused(teacher, "--pretrained_vae_model_name_or_path", str(other / "vae"))
    assert names[1] in refused(teacher, "--init_from", str(other), script="train_ct")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_tensor_that_is_not_used(copy, begin, capfd, part):
    teacher = copy()
    change(teacher, part, add)
    begin(teacher)
    assert f"{teacher}/{part}: 1 tensors are not used, such as surplus.weight\n" in capfd.readouterr().err


@pytest.mark.parametrize("part, library, kind", [
    ("text_encoder", "transformers", "BertModel"), ("vae", "diffusers", "AutoencoderTiny"),
    ("unet", "diffusers", "UNetMotionModel"), ("text_encoder", None, None)])  # fmt: skip
def test_part_of_another_class(copy, refused, encoder, part, library, kind):
    teacher = copy()
    edit(teacher / "model_index.json", **{part: [library, kind]})
    assert f"its {part} is a {kind}, where Stable Diffusion" in refused(teacher)
    if part != "unet":
        with pytest.raises(SystemExit, match=f"^error: --encode .*(is a {kind}, not|is no SD 1.x)"):
            encoder(teacher)


def test_what_a_library_drops_is_shown(copy, begin):
    teacher, seen = copy(), []
    edit(teacher / "unet" / "config.json", of_the_future=1)
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logging.getLogger("diffusers").addHandler(handler)
    begin(teacher)
    logging.getLogger("diffusers").removeHandler(handler)
    assert seen and all("of_the_future" in line for line in seen)


# ------------------------------------------------------------------------------------------------- kinds of weights


def test_fp16_weights_alone(copy, begin, encoder, capfd):
    teacher = copy()
    for part in ("unet", "vae", "text_encoder"):
        change(teacher, part, lambda tensors, _: tensors.update({k: v.half() for k, v in tensors.items()}))
    known = originals(teacher)
    for path in teacher.rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    run, tool = begin(teacher), encoder(teacher)
    seen = capfd.readouterr().err
    for part, times in {"unet": 1, "vae": 2, "text_encoder": 2}.items():
        assert seen.count(f"{teacher}/{part} holds fp16 weights alone: they are used\n") == times
    assert same(run.nets["teacher"].base, known["unet"]) and same(run.models.vae, known["vae"])
    assert same(run.models.text_encoders[0], known["text_encoder"]) and same(tool.vae, known["vae"])
    assert run.nets["teacher"].dtype == run.models.vae.dtype == torch.float32


def test_variant(copy, begin, encoder, refused):
    teacher = copy()
    for part in ("unet", "vae", "text_encoder"):
        file = teacher / part / FILES[part]
        halves = {key: value / 2 for key, value in load_file(file).items()}
        save_file(halves, file.with_suffix(".half.safetensors"), metadata={"format": "pt"})
    known = originals(teacher)
    run, tool = begin(teacher, "--variant", "half"), encoder(teacher, "--variant", "half")
    for network, part in ((run.nets["teacher"].base, "unet"), (run.models.vae, "vae"), (tool.vae, "vae"),
                          *((each.text_encoders[0], "text_encoder") for each in (run.models, tool))):  # fmt: skip
        theirs = known[part].state_dict()
        assert all(torch.equal(2 * value, theirs[key]) for key, value in network.state_dict().items())
    assert "ema" in refused(teacher, "--variant", "ema")


def test_bin_files_and_no_error_on_the_screen(copy, begin, encoder, capfd):
    teacher = copy()
    known = originals(teacher)
    for part in ("unet", "vae", "text_encoder"):
        file = teacher / part / FILES[part]
        name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
        torch.save(load_file(file), teacher / part / name)
        file.unlink()
    run = begin(teacher)
    encoder(teacher)
    seen = "".join(capfd.readouterr())
    assert same(run.nets["teacher"].base, known["unet"]) and same(run.models.vae, known["vae"])
    assert "rror" not in seen and "unsafe" not in seen


# --------------------------------------------------------------------------------------------------- single files


def ldm_unet(name):
    """A tensor of a tiny U-Net (two blocks of one layer) by its name in single files."""
    outer = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
             "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
             "down_blocks.0.resnets.0": "input_blocks.1.0", "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
             "down_blocks.1.resnets.0": "input_blocks.3.0", "down_blocks.1.attentions.0": "input_blocks.3.1",
             "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
             "mid_block.resnets.1": "middle_block.2",
             "up_blocks.0.resnets.0": "output_blocks.0.0", "up_blocks.0.attentions.0": "output_blocks.0.1",
             "up_blocks.0.resnets.1": "output_blocks.1.0", "up_blocks.0.attentions.1": "output_blocks.1.1",
             "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
             "up_blocks.1.resnets.0": "output_blocks.2.0", "up_blocks.1.resnets.1": "output_blocks.3.0"}  # fmt: skip
    inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
             "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
    block = next(key for key in sorted(outer, key=len, reverse=True) if name == key or name.startswith(key + "."))
    rest = name[len(block) :]
    if "resnets" in block and rest:
        rest = "." + re.sub(r"^\w+", lambda match: inner[match[0]], rest[1:])
    return outer[block] + rest


def ldm_vae(name):
    """A tensor of a tiny VAE (two blocks of one layer) by its name in single files."""
    rules = [(r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"),
             (r"mid_block\.attentions\.0", "mid.attn_1"), (r"attn_1\.group_norm", "attn_1.norm"),
             (r"attn_1\.to_([qkv])", r"attn_1.\1"), (r"attn_1\.to_out\.0", "attn_1.proj_out"),
             (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
             (r"down_blocks\.0\.downsamplers\.0", "down.0.downsample"),
             (r"up_blocks\.0\.resnets", "up.1.block"), (r"up_blocks\.1\.resnets", "up.0.block"),
             (r"up_blocks\.0\.upsamplers\.0", "up.1.upsample"), ("conv_norm_out", "norm_out"),
             ("conv_shortcut", "nin_shortcut")]  # fmt: skip
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def single_file(folder, path, **more):
    """Writes an SD 1.x pipeline as one file, as the original code and other trainers do."""
    parts = originals(folder)
    tensors = {f"model.diffusion_model.{ldm_unet(key)}": value for key, value in parts["unet"].state_dict().items()}
    for key, value in parts["vae"].state_dict().items():
        key = ldm_vae(key)
        is_attention = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", key)
        tensors[f"first_stage_model.{key}"] = value[:, :, None, None] if is_attention else value
    for key, value in parts["text_encoder"].state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    save_file({key: value.contiguous() for key, value in {**tensors, **more}.items()}, path)
    return path


@pytest.fixture
def config(copy):
    """A folder of configurations and tokenizers, without any weights, and the pipeline that it came from."""
    folder = copy()
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    return folder


def test_single_file(make_teacher, config, shards, tmp_path, begin):
    """It is trained from, and exported with, as the folder that it was made of."""
    folder = Path(make_teacher(make_pipeline))
    known, file = originals(folder), single_file(folder, tmp_path / "anime.safetensors")
    run = begin(file, "--single_file_config", str(config))
    assert same(run.nets["teacher"].base, known["unet"]) and same(run.models.vae, known["vae"])
    assert same(run.models.text_encoders[0], known["text_encoder"])
    outputs = {"file": (file, "--single_file_config", str(config)), "folder": (folder,)}
    (tmp_path / "file" / "teacher").mkdir(parents=True)  # somebody's own
    for name, (teacher, *more) in outputs.items():
        run_main(get_script("train_lcm_distill_sd_wds"), tiny_args(str(teacher), shards, tmp_path / name,
                 "--max_train_steps", "1", *more))  # fmt: skip
    files = sorted(path.relative_to(tmp_path / "folder") for path in (tmp_path / "folder").rglob("*.safetensors"))
    assert len(files) == 4
    for path in files:
        one, other = (load_file(tmp_path / name / path) for name in outputs)
        assert one.keys() == other.keys()
        for key in one:
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=1e-6)
    assert (tmp_path / "file" / "teacher").exists() and not (tmp_path / "file" / "unpacked-teacher").exists()


def test_shards_encoded_from_a_single_file(make_teacher, config, shards, tmp_path, tool, encoder, capfd):
    """They are as the folder makes them, and those that the file is trained on."""
    folder = Path(make_teacher(make_pipeline))
    known, file = originals(folder), single_file(folder, tmp_path / "anime.safetensors")
    given = "--single_file_config", str(config)
    found = encoder(file, *given)
    assert same(found.vae, known["vae"]) and same(found.text_encoders[0], known["text_encoder"])
    assert capfd.readouterr().err == ""
    run_main(tool, ["--train_shards_path_or_url", shards, "--output_dir", str(tmp_path / "encoded"), "--resolution",
                    "16", "--encode", str(file), *given])  # fmt: skip
    run_main(get_script("train_lcm_distill_sd_wds"), tiny_args(str(file), str(tmp_path / "encoded" / "00000.tar"),
             tmp_path / "run", "--max_train_steps", "1", *given))  # fmt: skip
    whole = load_file(file)
    for key in ("first_stage_model.quant_conv.bias", "cond_stage_model.transformer.text_model.final_layer_norm.bias"):
        save_file({name: value for name, value in whole.items() if name != key}, file)
        with pytest.raises(SystemExit, match="missing or misshapen|does not hold all tensors"):
            encoder(file, *given)


def test_lora_of_a_single_file(make_teacher, config, shards, tmp_path):
    file = single_file(Path(make_teacher(make_pipeline)), tmp_path / "anime.safetensors")
    run_main(get_script("train_tcd_distill_lora_sd_wds"), tiny_args(str(file), shards, tmp_path / "run", "--lora_rank",
             "2", "--single_file_config", str(config), "--export_fused", "--max_train_steps", "1"))  # fmt: skip
    card = (tmp_path / "run" / "README.md").read_text()
    assert f'StableDiffusionPipeline.from_single_file("{file}")' in card
    assert (tmp_path / "run" / "fused" / "text_encoder" / "model.safetensors").is_file()


def test_single_file_that_lacks_a_tensor(make_teacher, config, tmp_path, refused):
    file = single_file(Path(make_teacher(make_pipeline)), tmp_path / "anime.safetensors")
    whole = load_file(file)
    for key in ("model.diffusion_model.out.2.bias", "first_stage_model.quant_conv.bias",
                "cond_stage_model.transformer.text_model.final_layer_norm.bias"):  # fmt: skip
        save_file({name: value for name, value in whole.items() if name != key}, file)
        line = refused(file, "--single_file_config", str(config))
        assert str(file) in line and line.endswith(": it does not hold all tensors of the model")


def test_single_file_for_v_prediction(make_teacher, config, tmp_path, refused, begin):
    """Its marker, which the libraries do not read."""
    file = single_file(Path(make_teacher(make_pipeline)), tmp_path / "v.safetensors", v_pred=torch.zeros(0))
    assert "it is for v-prediction" in refused(file, "--single_file_config", str(config))
    edit(config / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert begin(file, "--single_file_config", str(config)).models.schedule.prediction_type == "v_prediction"


def test_single_file_that_cannot_be_used(config, tiny, tmp_path, refused, encoder):
    pickled = tmp_path / "model.ckpt"
    torch.save({"a": torch.zeros(1)}, pickled)
    assert str(pickled) in refused(pickled, "--single_file_config", str(config))
    empty = tmp_path / "empty.safetensors"
    save_file({"a": torch.zeros(1)}, empty)
    assert "model.diffusion_model" in refused(empty, "--single_file_config", str(config))
    for file in (pickled, empty):
        with pytest.raises(SystemExit, match=f"^error: --encode {file} cannot be read with --single_file_config"):
            encoder(file, "--single_file_config", str(config))
    for flags in ((empty, "--variant", "fp16"), (tiny, "--single_file_config", str(config))):
        with pytest.raises(SystemExit):
            get_script("train_lcm_distill_sd_wds").parse_args(tiny_args(str(flags[0]), "a", "b", *flags[1:]))


def test_single_file_without_a_configuration_and_without_a_network(make_teacher, tmp_path, refused):
    file = single_file(Path(make_teacher(make_pipeline)), tmp_path / "anime.safetensors")
    line = refused(file)
    assert "--single_file_config stable-diffusion-v1-5/" in line and "the hub cannot be reached" in line


def test_vae_that_is_a_single_file(make_teacher, tiny, tmp_path, begin, encoder):
    other = Path(make_teacher(make_pipeline, seed=1))
    vae = AutoencoderKL.from_pretrained(other, subfolder="vae")
    tensors = {}
    for key, value in vae.state_dict().items():
        key = ldm_vae(key)
        tensors[key] = value[:, :, None, None] if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", key) else value
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "vae.safetensors")
    given = tiny, "--pretrained_vae_model_name_or_path", str(tmp_path / "vae.safetensors")
    assert same(begin(*given).models.vae, vae) and same(encoder(*given).vae, vae)


# ----------------------------------------------------------------------------------------------- what it is made of


@pytest.mark.parametrize("name", ["someone/something", "nothing-here"])
def test_not_in_the_cache_and_no_network(refused, encoder, tiny, name):
    for line in (refused(name), refused(tiny, "--pretrained_vae_model_name_or_path", name)):
        assert "is not whole in the cache, and the hub cannot be reached" in line
    with pytest.raises(SystemExit, match="^error: --encode .* the hub cannot be reached$"):
        encoder(name)


def test_folder_that_is_not_there(refused):
    assert "it is no folder or file here" in refused("/no/such/folder")


def test_tokenizer_that_does_not_say_its_length(copy, begin, encoder):
    """Whose own answer is 1e30."""
    teacher = copy()
    config = json.loads((teacher / "tokenizer" / "tokenizer_config.json").read_text())
    del config["model_max_length"]
    (teacher / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    run, tool = begin(teacher), encoder(teacher)
    text = get_script("train_lcm_distill_sd_wds").encode_prompts(run.models, ["a fox " * 30])["text"]
    assert text.shape == (1, 16, 16)
    torch.testing.assert_close(tool.encode_captions(["a fox " * 30])["text"], text)


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_class_embeds", 10),
        ("class_embed_type", "timestep"),
        ("addition_embed_type", "text"),
        ("encoder_hid_dim_type", "text_proj"),
    ],
)
def test_unet_that_wants_other_inputs(copy, refused, name, value):
    teacher = copy()
    edit(teacher / "unet" / "config.json", **{name: value})
    assert f"its U-Net wants other inputs than Stable Diffusion 1.x or 2.x has: {name} is {value}" in refused(teacher)


def test_vae_with_more_channels_than_pictures(copy, refused):
    teacher = copy()
    vae = AutoencoderKL.from_config(teacher / "vae", in_channels=4, out_channels=4)
    vae.save_pretrained(teacher / "vae")
    assert "the VAE takes and gives (4, 4) channels, where pictures have 3" in refused(teacher)
