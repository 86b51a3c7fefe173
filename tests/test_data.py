"""Training on shards that tools/prepare_shards.py encoded or cropped to buckets; optimizers; figures of memory.

Pictures have 16 × 16, 20 × 12 or 12 × 20 pixels, their latents half as many a side.
"""

import functools
import io
import itertools
import json
import math
import pickle
import random
import shutil
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import (
    LCM,
    LCM_LORA,
    LCM_XL,
    QUICK_VALIDATION,
    ROOT,
    assert_same_end,
    differences,
    ends_with,
    image_bytes,
    load_script,
    over,
    read_checkpoint,
    read_losses,
    read_metrics,
    run_main,
    run_two,
    tiny_args,
    write_shard,
)
from PIL import Image, ImageOps
from safetensors.torch import load, load_file, save
from test_stream import Fleet, Payload

# the machine of a test may have fewer cores than there are loader workers
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:.*deprecated")
FAMILIES = [LCM, LCM_XL]
SIZES = {(54, 30): (20, 12), (40, 33): (16, 16), (30, 54): (12, 20)}  # of pictures, and their buckets
COUNT = 23
BUCKETS = ("--aspect_ratio_buckets", "--bucket_step", "4", "--image_format", "png")
ENCODE = ("--encode", "TEACHER", "--random_flip", "--encode_dtype", "float32")
PACKS = {  # flags of the tool
    "plain": (),
    "squares": (*ENCODE, "--center_crop"),
    "half": ("--encode", "TEACHER", "--center_crop"),  # float16, not mirrored
    "buckets": BUCKETS,
    "encoded buckets": (*ENCODE, *BUCKETS, "--keep_images"),
}


# -------------------------------------------------------------------------------------------------- teachers, shards


@pytest.fixture(scope="session")
def find_teacher(make_teacher):
    """find_teacher(case): its tiny teacher."""
    return lambda case=LCM: make_teacher(case.pipeline)


@pytest.fixture(scope="session")
def tool():
    return load_script(ROOT / "tools" / "prepare_shards.py")


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Pictures of noise in three shapes. The first word of a caption is the picture's number; half have three."""
    folder, rows = tmp_path_factory.mktemp("photos"), []
    for number, size in zip(range(COUNT), itertools.cycle(SIZES)):
        (folder / f"{number:02}.png").write_bytes(image_bytes(number, size))
        texts = [f"{number} {letter}" for letter in "abc"] if number % 2 == 0 else [f"{number} fox"]
        rows.append(json.dumps({"file_name": f"{number:02}.png", "text": texts}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="session")
def pack(tool, photos, find_teacher, tmp_path_factory):
    """pack(name, case): the folder of shards that PACKS describes, for the case's teacher, made once."""

    @functools.cache
    def make(name, teacher):
        folder = tmp_path_factory.mktemp("packed") / name.replace(" ", "-")
        flags = [teacher if flag == "TEACHER" else flag for flag in PACKS[name]]
        run_main(tool, ["--image_folder", photos, "--output_dir", folder, "--samples_per_shard", 4, "--resolution", 16,
                        *flags])  # fmt: skip
        return folder

    def find(name, case=LCM):
        return make(name, find_teacher(case) if "TEACHER" in PACKS[name] else None)

    return find


def read_samples(folder):
    """Samples of all shards, in order: {member: bytes}."""
    found = []
    for path in sorted(Path(folder).glob("*.tar")):
        samples = {}
        with tarfile.open(path) as shard:
            for member in shard:
                key, name = member.name.split(".")
                samples.setdefault(key, {})[name] = shard.extractfile(member).read()
        found += samples.values()
    return found


def write_samples(folder, samples, counts):
    """Writes shards of so many samples each; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    left = iter(enumerate(samples))
    for index, count in enumerate(counts):
        members = [(f"{number:04}.{name}", data) for number, sample in itertools.islice(left, count)
                   for name, data in sample.items()]  # fmt: skip
        write_shard(folder / f"{index:05}.tar", members)
    return folder


@pytest.fixture(scope="session")
def mix(pack, tmp_path_factory):
    """mix(name, case): such a folder of shards, packed again so that each of them holds all sizes."""

    @functools.cache
    def make(source):
        samples = read_samples(source)
        random.Random(1).shuffle(samples)
        folder = write_samples(tmp_path_factory.mktemp("mixed"), samples, (7, 5, 8, 3))
        if (source / "empty.safetensors").exists():
            shutil.copy(source / "empty.safetensors", folder)
        return folder

    return lambda *given: make(pack(*given))


def pattern(folder):
    return f"{folder}/{{00000..{len(list(Path(folder).glob('*.tar'))) - 1:05}}}.tar"


def urls_of(folder):
    return [str(path) for path in sorted(Path(folder).glob("*.tar"))]


def number_of(sample):
    """The number of the picture of a sample, as the tool wrote it."""
    return json.loads(sample["json"])["captions"][0].split()[0]


def header_of(data):
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def altered(data, change, **fingerprint):
    """The bytes of an encoded member after change(tensors), and with these entries of its fingerprint."""
    found, made = load(data), json.loads(header_of(data)["fingerprint"])
    tensors = {name: value.contiguous() for name, value in {**found, **change(found)}.items() if value is not None}
    return save(tensors, {"fingerprint": json.dumps({**made, **fingerprint})})


# --------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def begin(start):
    """begin(folder, *more): the Run of a command line over the shards of a folder, before its first step."""
    return lambda folder, *more: start("--train_shards_path_or_url", pattern(folder), *more)


@pytest.fixture
def train(case, script, teacher, tmp_path):
    """train(name, folder, *more): a whole run; returns its output folder."""

    def run(name, folder, *more):
        flags = ["--checkpointing_steps", "3", "--max_train_steps", "6", *case.flags, *more]
        run_main(script, tiny_args(teacher, pattern(folder), tmp_path / name, *flags))
        return tmp_path / name

    return run


@pytest.fixture
def resume(train, tmp_path):
    """resume(straight, folder, *more): a run in a folder of its own, from the third step of a straight one."""

    def run(straight, folder, *more):
        shutil.copytree(straight / "checkpoint-3", tmp_path / "parts" / "checkpoint-3")
        shutil.copy(straight / "metrics.jsonl", tmp_path / "parts")
        return train("parts", folder, *more, "--resume_from_checkpoint", "latest")

    return run


def take_steps(script, run, count=3):
    """Trains so many steps; returns the losses."""
    for _ in range(count):
        script.train_step(run)
        run.step += 1
    return [loss.item() for loss, _ in run.history]


def watch_batches(run):
    """A list to which every batch that the run reads is added."""
    found, plain = [], run.reader.next_batch
    run.reader.next_batch = lambda: (found.append(plain()), found[-1])[1]
    return found


# ---------------------------------------------------------------------------------------------------- equal losses
FLIP, EMPTY = ("--random_flip",), ("--proportion_empty_prompts", "0.5")
FLAGS = [pytest.param((*FLIP, *EMPTY), id="mirrored, empty prompts")]
MORE_FLAGS = [pytest.param((), id="as they are"), pytest.param(FLIP, id="mirrored"), pytest.param(EMPTY, id="empty")]


@over(FAMILIES, "flags", {LCM: FLAGS + MORE_FLAGS, LCM_XL: FLAGS})
def test_losses_on_encoded_shards_are_those_on_plain_ones(script, case, begin, pack, flags):
    """In float32, to a relative 1e-3: the tool and the scripts encode in batches of other sizes."""
    losses, captions = {}, {}
    for name in ("plain", "squares"):
        run = begin(pack(name, case), "--center_crop", *flags)
        batches = watch_batches(run)
        losses[name], captions[name] = take_steps(script, run), [batch["captions"] for batch in batches]
        assert run.args.encoded_shards == (name == "squares")
        assert all(("mean" in batch) == (name == "squares") for batch in batches)
    assert captions["plain"] == captions["squares"] and ("" in sum(captions["plain"], [])) == (EMPTY[0] in flags)
    assert losses["squares"] == pytest.approx(losses["plain"], rel=1e-3)
    assert len(set(losses["plain"])) == 3


@over(FAMILIES)
def test_losses_on_half_precision_shards_differ_little(script, case, begin, pack):
    """Latents, embeddings and the empty prompt in float16: a relative 1e-2."""
    found = {name: take_steps(script, begin(pack(name, case), "--center_crop", *EMPTY))
             for name in ("plain", "half")}  # fmt: skip
    assert found["half"] == pytest.approx(found["plain"], rel=1e-2) and found["half"] != found["plain"]


@over(FAMILIES)
@pytest.mark.parametrize("flags", [(), FLIP], ids=["as they are", "mirrored"])
def test_kept_pictures_of_encoded_buckets_train_as_their_latents_do(script, case, begin, mix, flags):
    found = {flag: take_steps(script, begin(mix("encoded buckets", case), flag, *flags))
             for flag in ("--encoded_shards", "--no-encoded_shards")}  # fmt: skip
    assert found["--no-encoded_shards"] == pytest.approx(found["--encoded_shards"], rel=1e-3)


# ------------------------------------------------------------------------------------------ captions, empty prompts


@over(FAMILIES)
def test_the_embedding_is_that_of_the_caption_that_was_picked(script, case, begin, mix):
    run, picked = begin(mix("encoded buckets", case)), Counter()
    for _ in range(20):
        batch = run.reader.next_batch()
        c = script.encode_prompts(run.models, batch["captions"])
        assert c.keys() == {"text", *["pooled"] * case.is_sdxl} and not batch["is_empty"].any()
        for name, value in c.items():
            torch.testing.assert_close(batch[name], value, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(c["text"][0], c["text"][1])
        picked.update(caption.split()[1] for caption in batch["captions"])
    assert picked.keys() == {"a", "b", "c", "fox"}


@pytest.fixture
def own_copy(case, pack, tmp_path):
    """own_copy(name): a copy of these shards, to be changed."""
    return lambda name: shutil.copytree(pack(name, case), tmp_path / "copy")


@over(FAMILIES)
def test_dropped_captions_take_the_stored_embedding_of_the_empty_prompt(script, begin, own_copy):
    """Or zeros, where those are what the pipeline guides from: SDXL's."""
    path = (folder := own_copy("squares")) / "empty.safetensors"
    stored = {name: value * 1.05 for name, value in load_file(path).items()}
    path.write_bytes(save(stored))
    del stored["latents"]  # by which the VAE is known
    run = begin(folder, "--center_crop", *EMPTY, "--train_batch_size", "8")
    stored = {name: value * (not run.models.zeros_for_empty) for name, value in stored.items()}
    assert stored.keys() == run.empty.keys() and all(torch.equal(run.empty[name], stored[name]) for name in stored)
    batch = run.reader.next_batch()
    x_0, c = script.encode_batch(run, batch, torch.Generator().manual_seed(0))
    noise = torch.randn(batch["mean"].shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x_0, (batch["mean"] + batch["std"] * noise) * run.models.vae.config.scaling_factor)
    drops = [not caption for caption in batch["captions"]]
    assert batch["is_empty"].tolist() == drops and 0 < sum(drops) < 8
    for name in stored:
        for row, own, is_dropped in zip(c[name], batch[name], drops, strict=True):
            assert torch.equal(row, stored[name][0] if is_dropped else own)


@over(FAMILIES)
def test_an_empty_prompt_that_is_damaged_or_of_another_model_ends_the_run(case, script, begin, own_copy):
    path = (folder := own_copy("squares")) / "empty.safetensors"
    whole, run = path.read_bytes(), begin(folder, "--center_crop")
    tensors = load(whole)
    assert tensors.keys() == {"text", "latents", *["pooled"] * case.is_sdxl}
    bad = {whole[:60]: "is damaged", save({"other": torch.zeros(1)}): "encoding"}
    for name, value in tensors.items():
        what = "VAE's" if name == "latents" else f"teacher's {name}"
        for changed in (value * 1.2, value[..., :-1].contiguous(), value * NAN):
            bad[save({**tensors, name: changed})] = f"does not hold this {what} encoding"
    for data, message in bad.items():
        path.write_bytes(data)
        with ends_with(f"empty.safetensors .*{message}"):
            script.find_empty(run.models, urls_of(folder))


def test_a_teacher_that_was_moved_is_fine_but_not_one_of_the_same_name(start, pack, teacher, tmp_path):
    moved = shutil.copytree(teacher, tmp_path / "elsewhere" / Path(teacher).name)
    flags = ("--train_shards_path_or_url", pattern(pack("squares")), "--center_crop")
    start(*flags, teacher=moved)
    weights = next((moved / "vae").glob("*.safetensors"))
    weights.write_bytes(save({name: value * 1.5 for name, value in load_file(weights).items()}))
    with ends_with("does not hold this VAE's encoding"):
        start(*flags, teacher=moved)


@over(FAMILIES)
@pytest.mark.parametrize("is_pipe", [False, True], ids=["removed", "pipe"])
def test_without_a_stored_one_the_text_encoder_gives_the_empty_prompt(script, start, own_copy, is_pipe):
    folder = own_copy("squares")
    if not is_pipe:
        (folder / "empty.safetensors").unlink()
    url = f"pipe:cat {folder}/00000.tar" if is_pipe else pattern(folder)
    run = start("--train_shards_path_or_url", url, "--center_crop", "--proportion_empty_prompts", "1")
    _, c = script.encode_batch(run, run.reader.next_batch(), torch.Generator().manual_seed(0))
    for name, value in script.encode_uncond(run.models, "").items():
        assert torch.equal(c[name], value.expand_as(c[name]))


def test_captions_that_are_empty_in_the_shards_take_the_stored_embedding(lcm, pack):
    raw = read_samples(pack("squares"))[0]
    args = Fleet(lcm, [], 1, 0, "--center_crop").readers[0].stream.args
    args.pretrained_teacher_model = json.loads(header_of(raw["safetensors"])["fingerprint"])["model"]
    raw = {**raw, "__key__": "0", "json": json.dumps({"captions": [" "]}).encode()}
    raw.pop("txt", None)
    found = lcm.decode_sample(raw, args, random.Random(0))
    assert found["captions"] == "" and found["is_empty"].item() is True


# ----------------------------------------------------------------------------------------------------- fingerprints


def parse(script, teacher, *more):
    return script.parse_args(tiny_args(teacher, "shards", "output", *map(str, more)))


MISMATCHES = {  # flag to add, or None for one to leave out → what the error says
    "model": (("--pretrained_teacher_model", "me/another"), "model pipeline, --pretrained_teacher_model is another"),
    "vae": (("--pretrained_vae_model_name_or_path", "me/fix"), "vae None, --pretrained_vae_model_name_or_path is fix"),
    "revision": (("--teacher_revision", "v2"), "revision None, --teacher_revision is v2"),
    "vae_revision": (("--revision", "v3"), "vae_revision None, --revision is v3"),
    "resolution": (("--resolution", "32"), "resolution 16, --resolution is 32"),
    "center_crop": (None, "center_crop True, --center_crop is False"),
    "interpolation": (("--interpolation_type", "box"), "interpolation_type bilinear, --interpolation_type is box"),
    "random_flip": (("--random_flip",), "random_flip False, --random_flip is True"),
}


@pytest.mark.parametrize("name", list(MISMATCHES))
def test_another_fingerprint_ends_the_run_with_the_flag_and_both_values(script, case, teacher, pack, name):
    more, message = MISMATCHES[name]
    urls = urls_of(pack("half", case))
    args = parse(script, teacher, *(["--center_crop", *more] if more else []))
    with pytest.raises(SystemExit) as error:
        script.check_shards(urls, args, {})
    text = str(error.value)
    assert text.startswith(f"error: the first shard {urls[0]} holds no usable sample: 4 × other encoding")
    assert f"made with {message}: give that or re-encode" in text and "\n" not in text


def test_a_moved_teacher_and_mirrored_latents_that_are_not_asked_for_are_fine(script, case, teacher, pack, tmp_path):
    squares = urls_of(pack("squares", case))  # with mirrored latents
    for path in (teacher, f"{teacher}/", tmp_path / "pipeline", "me/pipeline"):
        assert script.check_shards(squares, parse(script, str(path), "--center_crop"), {})[0] is True
    assert script.check_shards(urls_of(pack("plain")), parse(script, teacher), {})[0] is False


def test_pictures_cropped_for_another_resolution_end_the_run(script, teacher, mix):
    with pytest.raises(SystemExit) as error:
        script.check_shards(urls_of(mix("buckets")), parse(script, teacher, "--resolution", 32), {})
    text = str(error.value)
    assert "7 × other resolution (cropped to " in text and "--resolution is 32" in text and "\n" not in text
    assert any(f"cropped to {width}x{height}," in text for width, height in SIZES.values())
    with pytest.raises(SystemExit, match="other resolution .*--resolution is 8"):
        script.check_shards(urls_of(mix("buckets")), parse(script, teacher, "--resolution", 8), {})


@pytest.mark.parametrize(("resolution", "step"), [(32, 8), (64, 16), (128, 64), (192, 64), (512, 64), (1024, 64),
                                                  (768, 32), (96, 48), (1024, 8)])  # fmt: skip
def test_every_bucket_of_the_tool_is_a_size_of_its_resolution(lcm, tool, resolution, step):
    args = SimpleNamespace(resolution=resolution)
    for width, height in tool.make_buckets(resolution, step):
        assert lcm.training_size({"crop": [3, 4, width, height]}, args) == (width, height)
        for other in (resolution // 2, 2 * resolution):
            with pytest.raises(lcm.BadSample, match="other resolution"):
                lcm.training_size({"crop": [3, 4, width, height]}, SimpleNamespace(resolution=other))


@pytest.mark.parametrize("crop", [[0, 0, 256, 1], [0, 0, 4, 64], [0, 0, 32, 7]])
def test_a_crop_beyond_two_to_one_is_no_bucket(lcm, crop):
    with pytest.raises(lcm.BadSample, match="other resolution"):
        lcm.training_size({"crop": crop}, SimpleNamespace(resolution=16))


@pytest.mark.parametrize("crop", [None, [], [0, 0, 16], "crop", [0, 0, "32", 32], [0, 0, 32.0, 32], [0, 0, 0, 32],
                                  [0, 0, -32, -32], {"0": 1}])  # fmt: skip
def test_a_crop_that_is_none_leaves_the_square(lcm, crop):
    assert lcm.training_size({"crop": crop}, SimpleNamespace(resolution=16)) == (16, 16)


# ------------------------------------------------------------------------------------------------------ bad samples
BROKEN, OTHER = {"broken encoding"}, {"other encoding"}
NAN, INF = float("nan"), float("inf")


def poisoned(name, value=NAN):
    """Sets the first number of a tensor."""

    def change(tensors):
        tensors[name].view(-1)[0] = value
        return {}

    return functools.partial(altered, change=change)


def both(change):
    """Changes mean and standard deviation alike."""
    names = ("latents_mean", "latents_std")
    return functools.partial(altered, change=lambda found: {name: change(found[name]) for name in names})


def in_text(change):
    """Changes the embeddings of the captions."""
    return functools.partial(altered, change=lambda found: {"text": change(found["text"])})


SPOILED = {  # what becomes of a good sample's bytes → for which reasons it may be skipped
    "cut short": (lambda data: data[: len(data) // 2], BROKEN),
    "cut in its header": (lambda data: data[:100], BROKEN),
    "no bytes": (lambda _: b"", BROKEN),
    "a header without end": (lambda data: b"\xff" * 8 + data, BROKEN),
    "no metadata": (lambda data: save(load(data)), BROKEN),
    "no fingerprint": (lambda data: save(load(data), {"made": "elsewhere"}), BROKEN),
    "a fingerprint that is not JSON": (lambda data: save(load(data), {"fingerprint": "{'a'"}), BROKEN),
    "a fingerprint that is a list": (lambda data: save(load(data), {"fingerprint": "[1]"}), BROKEN),
    "NaN in the mean": (poisoned("latents_mean"), BROKEN),
    "Inf in the deviation": (poisoned("latents_std", INF), BROKEN),
    "NaN in the text": (poisoned("text"), BROKEN),
    "another shape of the deviation": (
        functools.partial(altered, change=lambda found: {"latents_std": found["latents_std"][:, :-1]}), BROKEN),
    "no mean": (functools.partial(altered, change=lambda _: {"latents_mean": None}), BROKEN),
    "no text": (functools.partial(altered, change=lambda _: {"text": None}), BROKEN),
    "no captions": (in_text(lambda value: value[:0]), BROKEN),
    "too large latents": (both(lambda value: value.repeat(1, 8, 1)), BROKEN),
    "another width": (in_text(lambda value: value.repeat(1, 1, 2)), OTHER),
    "fewer tokens": (in_text(lambda value: value[:, :-1]), OTHER),
    "more channels": (both(lambda value: value.repeat(2, 1, 1)), OTHER),
    "another model": (functools.partial(altered, change=lambda _: {}, model="me/another"), OTHER),
    "another resolution": (functools.partial(altered, change=lambda _: {}, resolution=64), OTHER),
    "another VAE": (functools.partial(altered, change=lambda _: {}, vae="me/fix"), OTHER),
    "latents of a line": (both(lambda value: value[:, 0]), BROKEN),
    "latents of four dimensions": (both(lambda value: value[..., None]), BROKEN),
    "latents without pixels": (both(lambda value: value[:, :0]), BROKEN),
    "a cut from the latents": (both(lambda value: value[:, 1:]), BROKEN),
    "text of four dimensions": (in_text(lambda value: value[..., None]), OTHER),
}  # fmt: skip


@pytest.fixture(scope="session")
def good(pack):
    """good(case): a sample of encoded squares, with one caption."""
    return lambda case=LCM: next(sample for sample in read_samples(pack("squares", case)) if "txt" in sample)


POOLED = {  # of SDXL's samples
    "another width": (lambda value: value[:, :-1], OTHER),
    "more dimensions": (lambda value: value[..., None], OTHER),
    "none": (lambda _: None, OTHER),
    "no captions": (lambda value: value[:0], BROKEN),
    "NaN": (lambda value: value * NAN, BROKEN),
}


def spoil(sample, is_sdxl):
    """Copies of a sample that are spoiled in every way: {kind: (sample, reasons)}."""
    ways = dict(SPOILED)
    for kind, (change, reasons) in POOLED.items() if is_sdxl else ():
        replace = functools.partial(altered, change=lambda found, change=change: {"pooled": change(found["pooled"])})
        ways[f"pooled: {kind}"] = replace, reasons
    return {kind: ({**sample, "safetensors": change(sample["safetensors"])}, reasons)
            for kind, (change, reasons) in ways.items()}  # fmt: skip


@over(FAMILIES)
def test_bad_encoded_samples_are_skipped_by_their_reasons_and_do_not_end_a_run(
    script, case, begin, good, tmp_path, pack
):
    sample, plain, spoiled = good(case), read_samples(pack("plain"))[0], spoil(good(case), case.is_sdxl)
    samples = [sample, *(bad for bad, _ in spoiled.values()), plain, sample]
    run = begin(write_samples(tmp_path / "shards", samples, [len(samples)]), "--center_crop", "--train_batch_size", "1")
    shapes = {"mean": (4, 0, 0), "text": (16, 16)}
    if case.is_sdxl:
        shapes = {"mean": (4, 0, 0), "text": (16, 32), "pooled": (24,), "time_ids": (6,)}
    assert run.reader.stream.shapes == shapes  # 0: any
    for kind, (bad, reasons) in spoiled.items():
        with pytest.raises(script.BadSample) as error:
            found = script.decode_sample({"__key__": "0", **bad}, run.args, random.Random(0))
            script.check_shapes(found, shapes)
        assert error.value.args[0] in reasons, kind
    expected = Counter(reason for _, reasons in spoiled.values() for reason in reasons) + Counter(["no image"])
    batches = watch_batches(run)
    losses = take_steps(script, run, 5)  # two epochs and a half
    assert {name for batch in batches for name in names_of(batch)} == {number_of(sample)}
    assert all(0 < loss < 1000 for loss in losses) and run.reader.skipped.keys() == expected.keys()
    counts = script.reduce_skipped(run)
    assert counts.keys() == expected.keys() and 2 * expected.total() <= sum(counts.values()) <= 3 * expected.total()


def test_nothing_is_unpickled(script, begin, good, tmp_path):
    mark, sample = tmp_path / "mark", good()
    bait = pickle.dumps(Payload(mark))
    pickle.loads(bait)
    assert mark.exists()  # the payload works
    mark.unlink()
    archive = tmp_path / "bait.pt"
    torch.save({"text": Payload(mark)}, archive)
    kinds = ("pkl", "pickle", "pth", "pt", "ckpt", "bin", "npy", "pyd")
    hostile = [{**sample, **{kind: bait for kind in kinds}}, {**sample, "safetensors": bait},
               {**sample, "safetensors": archive.read_bytes()}]  # fmt: skip
    run = begin(write_samples(tmp_path / "shards", hostile, [3]), "--center_crop")
    losses = take_steps(script, run, 4)
    assert all(0 < loss < 1000 for loss in losses) and run.reader.skipped["broken encoding"] >= 1
    assert not mark.exists()


# ---------------------------------------------------------------------------------------------------------- buckets


UNMIXED, MIXED = "buckets", "mixed encoded buckets"


@pytest.fixture(scope="session", params=[UNMIXED, MIXED])
def folder(request, pack, mix):
    """Shards of one size each, or of all sizes; plain or encoded."""
    kind = request.param.replace("mixed ", "")
    return (mix if "mixed" in request.param else pack)(kind)


@pytest.fixture
def fleet(lcm, find_teacher):
    """fleet(folder, world, workers, *flags, state): the readers of a run over these shards."""
    made = []

    def make(folder, world=1, workers=0, *flags, state=None):
        flags = ("--pretrained_teacher_model", find_teacher(), *flags)
        made.append(Fleet(lcm, urls_of(folder), world, workers, *flags, state=state))
        return made[-1]

    yield make
    for reader in (reader for found in made for reader in found.readers):
        reader.close()  # its workers outlive signals


def assert_same(batches, others):
    """Bit for bit the same batches, and the same cursors after them."""
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name, value in batch.items():
            is_same = torch.equal(value, other[name]) if torch.is_tensor(value) else value == other[name]
            assert is_same, name


def names_of(batch):
    return [caption.split()[0] for caption in batch["captions"]]


class Ledger:
    """What a fleet has used, and by its cursors has not used yet, counted without the script's own arithmetic."""

    def __init__(self, lcm):
        self.lcm, self.listings, self.used = lcm, {}, Counter()

    def step(self, fleet, steps=1):
        for _ in range(steps):
            for batch in fleet.step():
                self.used.update(names_of(batch))
        return self

    def listing(self, stream, position):
        """Names of the samples of a shard, in the order in which they are read at this position."""
        if position not in self.listings:
            samples = stream.shard_samples(position, 0, None)
            self.listings[position] = [number_of(sample) for _, sample in samples]
        return self.listings[position]

    def check(self, fleet):
        """Used and left over are all samples of the shard positions that were begun, each once. Returns what is held"""
        stream = fleet.readers[0].stream
        state, held, unread = stream.state, Counter(), Counter()
        cursors = [cursor for reader in fleet.readers for cursor in reader.cursors]
        leftover, stride = state["leftover"], len(cursors)
        end = max([len(leftover), *(item + 1 for item, *_ in cursors)])

        def place(item):
            return leftover[item] if item < len(leftover) else (state["next"] + item - len(leftover), 0, None)

        for item, sample, waiting in cursors:
            for earlier, numbers in waiting:
                assert (earlier, max(numbers)) < (item, sample) and len(numbers) == len(set(numbers))
                held.update(self.listing(stream, place(earlier)[0])[number] for number in numbers)
            for index in range(item, end, stride):
                position, offset, wanted = place(index)
                first = max(offset, sample if index == item else 0)
                unread.update(name for number, name in enumerate(self.listing(stream, position))
                              if number >= first and (wanted is None or number in wanted))  # fmt: skip
        everything = Counter()
        for position in range(place(end)[0]):
            everything.update(self.listing(stream, position))
        assert self.used + held + unread == everything
        return held


FLEETS = [(1, 0), (2, 0), (1, 2), (2, 2)]  # (processes, loader workers)


@pytest.mark.parametrize("world, workers", FLEETS)
def test_every_batch_has_one_size_and_every_sample_is_used_once_or_held(lcm, fleet, folder, world, workers):
    sizes = {number_of(sample): json.loads(sample["json"])["crop"][2:] for sample in read_samples(folder)}
    readers, ledger, seen, most = fleet(folder, world, workers, "--train_batch_size", 3), Ledger(lcm), Counter(), 0
    for _ in range(24 // world):  # three epochs of 23 samples
        batches = readers.step()
        for batch in batches:
            shape = batch["pixel_values" if "pixel_values" in batch else "mean"].shape
            width, height = sizes[names_of(batch)[0]]
            scale = 1 if "pixel_values" in batch else 2
            assert shape[0] == 3 and shape[2:] == (height // scale, width // scale)
            assert {tuple(sizes[name]) for name in names_of(batch)} == {(width, height)}
            ledger.used.update(names_of(batch))
            seen[width, height] += 1
        held = ledger.check(readers)
        most = max(most, held.total())
        assert held.total() <= 3 * 2 * world * max(1, workers)  # of each of three sizes, less than a batch
    assert seen.keys() == {*SIZES.values()} and most >= 2
    assert set(ledger.used) == {str(number) for number in range(COUNT)} and max(ledger.used.values()) <= 4


def test_pixels_are_those_of_the_picture_or_its_mirror(fleet, mix):
    pictures = {number_of(sample): sample for sample in read_samples(mix("encoded buckets"))}
    readers, mirrored = fleet(mix("encoded buckets"), 1, 0, "--random_flip", "--no-encoded_shards"), []
    others = fleet(mix("encoded buckets"), 1, 0, "--random_flip", "--encoded_shards")
    for _ in range(15):
        (batch,), (other,) = readers.step(), others.step()
        assert batch["captions"] == other["captions"] and batch["cursor"] == other["cursor"]
        for name, pixels, mean, std in zip(names_of(batch), batch["pixel_values"], other["mean"], other["std"],
                                           strict=True):  # fmt: skip
            image, tensors = picture(pictures[name]), load(pictures[name]["safetensors"])
            mirrored.append(not np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(image)))
            if mirrored[-1]:
                assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(ImageOps.mirror(image)))
            kind = "flipped" if mirrored[-1] else "latents"
            assert torch.equal(mean, tensors[f"{kind}_mean"]) and torch.equal(std, tensors[f"{kind}_std"])
    assert 5 < sum(mirrored) < 25


def picture(sample):
    return Image.open(io.BytesIO(sample["png"])).convert("RGB")


ODD = ("--train_batch_size", 3, "--random_flip", "--proportion_empty_prompts", 0.3, "--shuffle_buffer_size", 4)


@pytest.mark.parametrize("folder, world, workers, every", [
    (UNMIXED, 1, 0, 1), (UNMIXED, 2, 2, 10), (MIXED, 1, 0, 1), (MIXED, 2, 0, 2), (MIXED, 1, 2, 5), (MIXED, 2, 2, 7),
], indirect=["folder"])  # fmt: skip
def test_resume_gives_the_very_batches_whatever_is_held(fleet, folder, world, workers, every):
    straight, states, batches = fleet(folder, world, workers, *ODD), [], []
    for _ in range(18):
        states.append(straight.state())  # through JSON
        batches.append(straight.step())
    is_held = [any(held for *_, held in state["cursors"]) for state in states]
    assert sum(is_held) > 9
    for position in range(0, 15, every):
        resumed = fleet(folder, world, workers, *ODD, state=states[position])
        for exact in batches[position : position + 3]:
            assert_same(resumed.step(), exact)
        if position + 3 < 18:
            assert resumed.state() == states[position + 3]


CHANGES = [
    [(1, 0, 3), (2, 0, 3), (1, 0, 3)],  # (processes, loader workers, batch size) one after the other
    [(2, 0, 3), (1, 0, 2), (3, 0, 4)],
    [(3, 0, 2), (5, 0, 3), (2, 0, 2)],
    [(5, 0, 2), (2, 0, 5), (1, 0, 1)],
    [(1, 0, 4), (1, 0, 2), (1, 0, 5)],  # the same workers, other batches
    [(2, 0, 2), (2, 0, 6), (2, 0, 1)],
]
WORKERS = [
    [(1, 2, 3), (1, 0, 3), (2, 2, 2)],
    [(1, 2, 5), (1, 2, 1), (1, 2, 3)],
]


@pytest.mark.parametrize("folder, changes", [*((MIXED, changes) for changes in (*CHANGES, *WORKERS)),
                                             *((UNMIXED, changes) for changes in CHANGES[1:3])],
                         indirect=["folder"], ids=str)  # fmt: skip
def test_resume_with_other_workers_or_batches_repeats_and_loses_no_sample(lcm, fleet, folder, changes):
    positions = [(2, 2), (5, 1)] if any(workers for _, workers, _ in changes) else [(1, 3), (2, 2), (4, 1), (7, 0)]
    for steps in positions:
        ledger, state = Ledger(lcm), None
        for (world, workers, size), count in zip(changes, (*steps, 4), strict=True):
            readers = fleet(folder, world, workers, "--train_batch_size", size, state=state)
            ledger.step(readers, count).check(readers)
            state = readers.state()
        images = [world * size * count for (world, _, size), count in zip(changes, (*steps, 4), strict=True)]
        assert ledger.used.total() == sum(images)


def test_resume_is_exact_where_workers_have_changed_before(fleet, folder):
    first = fleet(folder, 1, 0, *ODD)
    for _ in range(4):
        first.step()
    straight, states, batches = fleet(folder, 2, 0, *ODD, state=first.state()), [], []
    for _ in range(10):
        states.append(straight.state())
        batches.append(straight.step())
    assert states[0]["leftover"] and any(wanted for *_, wanted in states[0]["leftover"])
    for position in range(8):
        resumed = fleet(folder, 2, 0, *ODD, state=states[position])
        for exact in batches[position : position + 3]:
            assert_same(resumed.step(), exact)


@pytest.mark.parametrize("size", [2, 1])
def test_a_smaller_batch_uses_what_was_held_for_a_larger(lcm, fleet, mix, size):
    first, ledger, held = fleet(mix("buckets"), 1, 0, "--train_batch_size", 6), Ledger(lcm), Counter()
    while held.total() < 7:
        held = ledger.step(first).check(first)
    second = fleet(mix("buckets"), 1, 0, "--train_batch_size", size, state=first.state())
    before = Counter(ledger.used)
    for _ in range(30 // size):  # the oldest first
        ledger.step(second).check(second)
    assert not held - (ledger.used - before)  # all of them came


def test_a_size_too_rare_for_a_batch_waits_over_epochs_and_is_not_lost(lcm, fleet, mix, tmp_path):
    samples = read_samples(mix("buckets"))
    rare = next(sample for sample in samples if json.loads(sample["json"])["crop"][2:] == [12, 20])
    others = [sample for sample in samples if json.loads(sample["json"])["crop"][2:] == [16, 16]]
    folder = write_samples(tmp_path / "rare", [*others[:3], rare, *others[3:5]], [2, 4])
    readers, ledger = fleet(folder, 1, 0, "--train_batch_size", 4), Ledger(lcm)
    shapes = []
    for _ in range(12):
        batch = readers.step()[0]
        ledger.used.update(names_of(batch))
        shapes.append(tuple(batch["pixel_values"].shape[2:]))
        ledger.check(readers)
        readers = fleet(folder, 1, 0, "--train_batch_size", 4, state=readers.state())
    assert ledger.used[number_of(rare)] == 4 * shapes.count((20, 12)) >= 4
    assert shapes.index((20, 12)) >= 4  # the rare one is met once an epoch


def test_bad_samples_are_counted_once_however_often_a_run_is_resumed(fleet, mix, tmp_path):
    samples = read_samples(mix("buckets"))
    for index in (1, 6, 7, 15):
        samples[index] = {name: data for name, data in samples[index].items() if name != "png"}
    folder = write_samples(tmp_path / "bad", samples, (7, 5, 8, 3))
    straight, state, skipped = fleet(folder, 1, 0, *ODD), None, Counter()
    for _ in range(20):
        resumed = fleet(folder, 1, 0, *ODD, state=state)
        batches = resumed.step()
        assert_same(batches, straight.step())
        skipped.update(batches[0]["skipped"])
        state = resumed.state()
    assert skipped == straight.readers[0].skipped and skipped.keys() == {"no image"}
    assert 8 <= skipped["no image"] <= 16  # three epochs and a bit, of four each


# ----------------------------------------------------------------------------------------- whole runs, stopped and not


def watch_sizes(script, monkeypatch):
    """A set to which the size of every batch of latents is added."""
    sizes, plain = set(), script.encode_batch

    def encode(run, *given):
        found = plain(run, *given)
        sizes.add(tuple(found[0].shape[2:]))
        return found

    monkeypatch.setattr(script, "encode_batch", encode)
    return sizes


RUNS = [
    pytest.param("buckets", FLIP, id="buckets"),
    pytest.param("encoded buckets", ("--dataloader_num_workers", "2", *FLIP, *EMPTY), id="encoded, two workers"),
]
ACCUMULATED = pytest.param("buckets", ("--gradient_accumulation_steps", "2", "--mixed_precision", "bf16"), id="bf16")


@over(FAMILIES, "kind, flags", {LCM: [*RUNS, ACCUMULATED], LCM_XL: RUNS})
def test_a_stopped_run_ends_in_the_same_weights(script, case, train, resume, mix, monkeypatch, capfd, kind, flags):
    sizes, folder = watch_sizes(script, monkeypatch), mix(kind, case)
    flags = ("--train_batch_size", "3", *flags)
    whole = train("whole", folder, *flags)
    state = json.loads((whole / "checkpoint-3" / "state.json").read_text())
    assert any(held for *_, held in state["stream"]["cursors"]) and len(sizes) >= 2
    assert_same_end(resume(whole, folder, *flags), whole, 6)
    log = capfd.readouterr().err
    assert "Resumed from " in log and "Resuming with other values" not in log
    for line in read_metrics(whole):
        assert line["skipped"] == {} and line["nonfinite_steps"] == 0 and 0 < line["loss"] < 1000


def test_two_processes_train_on_batches_of_different_sizes(case, teacher, fleet, mix, tmp_path):
    folder, whole, parts = mix("encoded buckets"), tmp_path / "whole" / "run", tmp_path / "parts" / "run"
    readers = fleet(folder, 2, 0)
    assert any(one["mean"].shape != other["mean"].shape for one, other in (readers.step() for _ in range(6)))
    flags = ["--checkpointing_steps", "3", "--max_train_steps", "6", *case.flags]
    whole.parent.mkdir()
    run_two(case.name, tiny_args(teacher, pattern(folder), whole, *flags))
    shutil.copytree(whole / "checkpoint-3", parts / "checkpoint-3")
    shutil.copy(whole / "metrics.jsonl", parts)
    run_two(case.name, tiny_args(teacher, pattern(folder), parts, *flags, "--resume_from_checkpoint", "latest"))
    assert_same_end(parts, whole, 6)
    ends = [[Path(f"{run}-rank{rank}").read_text() for rank in (0, 1)] for run in (whole, parts)]
    assert ends[0] == ends[1] and ends[0][0].split()[0] == ends[0][1].split()[0]


# ---------------------------------------------------------------------------------------------------- SDXL's time ids
over_sdxl = over([LCM_XL])


def sdxl_fleet(script, teacher, folder, *flags):
    flags = ("--pretrained_teacher_model", teacher, *flags)
    return Fleet(script, urls_of(folder), 1, 0, *flags, shapes={"time_ids": (6,)})


@over_sdxl
@pytest.mark.parametrize("flag", ["--encoded_shards", "--no-encoded_shards"])
@pytest.mark.parametrize("flip", [(), FLIP], ids=["as they are", "mirrored"])
@pytest.mark.parametrize("fix", [(), ("--use_fix_crop_and_size",)], ids=["", "fixed"])
def test_time_ids_are_those_of_the_tool(script, teacher, mix, flag, flip, fix):
    folder = mix("encoded buckets", LCM_XL)
    samples, kinds = {number_of(sample): sample for sample in read_samples(folder)}, Counter()
    readers = sdxl_fleet(script, teacher, folder, flag, *flip, *fix)
    for _ in range(15):
        (batch,) = readers.step()
        for index, name in enumerate(names_of(batch)):
            info, tensors = json.loads(samples[name]["json"]), load(samples[name]["safetensors"])
            if flag == "--encoded_shards":
                is_mirrored = torch.equal(batch["mean"][index], tensors["flipped_mean"])
            else:
                pixels = batch["pixel_values"][index].permute(1, 2, 0).numpy()
                is_mirrored = not np.array_equal(pixels, np.asarray(picture(samples[name])))
            width, height = info["crop"][2:]
            wanted = info["time_ids_flipped" if is_mirrored else "time_ids"]
            assert batch["time_ids"][index].tolist() == ([height, width, 0, 0, height, width] if fix else wanted)
            kinds[is_mirrored] += 1
    assert kinds.keys() == ({True, False} if flip else {False})
    infos = [json.loads(sample["json"]) for sample in samples.values()]
    assert any(info["time_ids"] != info["time_ids_flipped"] for info in infos)


@over_sdxl
def test_the_student_is_given_the_time_ids_and_pooled_embeddings_of_encoded_samples(script, begin, mix):
    run, given = begin(mix("encoded buckets", LCM_XL)), {}
    handle = run.models.student.add_time_proj.register_forward_pre_hook(lambda _, args: given.update(ids=args[0]))
    batches = watch_batches(run)
    for _ in range(3):
        take_steps(script, run, 1)
        assert torch.equal(given["ids"].reshape(-1, 6)[:2], batches[-1]["time_ids"].float())
    handle.remove()
    batch = run.reader.next_batch()
    _, c = script.encode_batch(run, batch, torch.Generator().manual_seed(0))
    for name in ("text", "pooled", "time_ids"):
        assert torch.equal(c[name], batch[name]), name


ODD_IDS = [
    pytest.param("missing", id="missing"),
    pytest.param(None, id="null"),
    pytest.param([], id="none"),
    pytest.param([32, 32, 0, 0, 32], id="five"),
    pytest.param([32, 32, 0, 0, 32, "32"], id="a text"),
    pytest.param("323200", id="six characters"),
    pytest.param({str(index): 0 for index in range(6)}, id="an object"),
    pytest.param([[32, 32, 0, 0, 32, 32]], id="nested"),
    pytest.param([32, 32, 0, 0, 32, 10**30], id="too large"),
    pytest.param([32, 32, 0, 0, 32, NAN], id="NaN"),
    pytest.param([32, INF, 0, 0, 32, 32], id="Infinity"),
]


@over_sdxl
@pytest.mark.parametrize("ids", ODD_IDS)
@pytest.mark.parametrize("kind", ["encoded", "plain"])
def test_odd_time_ids_are_counted(script, teacher, mix, tmp_path, ids, kind):
    first, second, third = read_samples(mix("encoded buckets", LCM_XL))[:3]
    info = {key: value for key, value in json.loads(second["json"]).items() if "time_ids" not in key}
    if ids != "missing":
        info["time_ids"] = ids
    folder = write_samples(tmp_path / "odd", [first, {**second, "json": json.dumps(info).encode()}, third], [3])
    flag = "--encoded_shards" if kind == "encoded" else "--no-encoded_shards"
    readers = sdxl_fleet(script, teacher, folder, flag, "--train_batch_size", 1)
    found = [tuple(readers.step()[0]["captions"]) for _ in range(5)]
    if kind == "plain" and ids == "missing":  # those of the picture as it is
        assert readers.readers[0].skipped == {} and len(set(found)) >= 3
    else:
        assert readers.readers[0].skipped.keys() == {"no time_ids"}
        assert number_of(second) not in {caption.split()[0] for (caption,) in found}


@over_sdxl
def test_time_ids_are_needed_at_the_start(script, teacher, mix, tmp_path):
    samples = read_samples(mix("encoded buckets", LCM_XL))[:3]
    for sample in samples:
        crop = json.loads(sample["json"])["crop"]
        sample["json"] = json.dumps({"captions": ["a"], "crop": crop}).encode()
    folder = write_samples(tmp_path / "odd", samples, [3])
    with pytest.raises(SystemExit, match="^error: the first shard .* holds no usable sample: 3 × no time_ids"):
        script.check_shards(urls_of(folder), parse(script, teacher), {"time_ids": (6,)})


# ------------------------------------------------------------------------------------- no VAE and no text encoder


@over(FAMILIES)
def test_neither_vae_nor_text_encoder_is_run_in_training(script, case, begin, mix, monkeypatch):
    run = begin(mix("encoded buckets", case), *FLIP, *EMPTY)

    def refuse(*_, **__):
        raise AssertionError("called in training")

    for name in ("encode_images", "encode_prompts", "decode_latents"):
        monkeypatch.setattr(script, name, refuse)
    for model in [run.models.vae.encoder, *run.models.text_encoders]:
        monkeypatch.setattr(model, "forward", refuse)
    assert all(0 < loss < 1000 for loss in take_steps(script, run, 3))


@over(FAMILIES)
@pytest.mark.parametrize("is_encoded", [True, False], ids=["encoded", "plain"])
def test_vae_and_text_encoder_stay_on_the_cpu_with_encoded_shards(script, teacher, monkeypatch, is_encoded):
    """A CPU has two names, of which the training has the longer."""
    args = parse(script, teacher)
    args.encoded_shards = is_encoded
    moves, plain = {}, torch.nn.Module.to

    def move(model, *given, **options):
        devices = [str(value) for value in (*given, *options.values()) if isinstance(value, (str, torch.device))]
        moves.setdefault(type(model).__name__, set()).update(devices)
        return plain(model, *given, **options)

    monkeypatch.setattr(torch.nn.Module, "to", move)  # in which those of transformers and diffusers end
    accelerator = SimpleNamespace(device=torch.device("cpu:0"), mixed_precision="no")
    models = script.load_models(args, script.check_teacher(args), accelerator)
    home = {"cpu"} if is_encoded else {"cpu:0"}
    assert moves["AutoencoderKL"] == moves[type(models.text_encoders).__name__] == home
    assert moves["UNet2DConditionModel"] == {"cpu:0"}


class Lodger(torch.nn.Module):
    """A module that keeps where it was moved."""

    def __init__(self):
        super().__init__()
        self.weight, self.moves = torch.nn.Parameter(torch.zeros(1)), []

    def to(self, device):
        self.moves.append(str(device))
        return self


def test_a_model_is_lent_to_the_device_and_comes_back(script):
    model = Lodger()
    with script.lent(model, torch.device("meta")):
        assert model.moves == ["meta"]
    assert model.moves == ["meta", "cpu"]
    with pytest.raises(ValueError, match="in between"), script.lent(model, torch.device("meta")):
        raise ValueError("in between")
    assert model.moves == ["meta", "cpu"] * 2


@over(FAMILIES)
def test_validation_draws_the_same_pictures_as_with_plain_shards(script, case, begin, pack):
    found = {}
    for name in ("plain", "squares"):
        run = begin(pack(name, case), "--center_crop", *QUICK_VALIDATION)
        script.validate(run)
        output = Path(run.args.output_dir)
        pictures = {path.name: path.read_bytes() for path in (output / "validation").iterdir()}
        found[name] = pictures, read_metrics(output)
    assert found["plain"] == found["squares"] and "step-0.png" in found["plain"][0]
    assert any("psnr" in key for line in found["plain"][1] for key in line)


# ------------------------------------------------------------------------------------------ flags, counts and errors


def test_encoded_samples_are_counted(script, case, pack, tmp_path):
    args = SimpleNamespace(encoded_shards=True)
    for name in ("squares", "encoded buckets"):  # without pictures and with them
        assert script.count_samples(urls_of(pack(name, case)), args) == COUNT
    samples = read_samples(pack("encoded buckets", case))
    mixture = write_samples(tmp_path / "mixture", [*samples[:5], *read_samples(pack("plain"))[:3]], [8])
    for is_encoded, count in ((True, 5), (False, 8)):
        args.encoded_shards = is_encoded
        assert script.count_samples(urls_of(mixture), args) == count


def test_shards_that_are_not_as_a_flag_says_end_the_run(script, case, teacher, pack):
    plain, squares = (urls_of(pack(name, case)) for name in ("plain", "squares"))
    message = r"error: the first shard .*00000.tar holds no usable sample: 4 × no image.*\(needed: {}; found: {}"
    with pytest.raises(SystemExit, match=message.format("safetensors", "json, png")) as error:
        script.check_shards(plain, parse(script, teacher, "--encoded_shards"), {})
    assert "\n" not in str(error.value)
    with pytest.raises(SystemExit, match=message.format("jpg, jpeg, png, webp", "json, ")):
        script.check_shards(squares, parse(script, teacher, "--center_crop", "--no-encoded_shards"), {})


def test_kept_pictures_are_read_where_the_flag_says_so(script, case, teacher, mix):
    urls = urls_of(mix("encoded buckets", case))
    for flags, is_encoded in (((), True), (("--encoded_shards",), True), (("--no-encoded_shards",), False)):
        assert script.check_shards(urls, parse(script, teacher, *flags), {}) == (is_encoded, True)
    # and then neither fingerprint nor tensors count
    other = ("--pretrained_teacher_model", "me/another", "--center_crop", "--no-encoded_shards")
    assert script.check_shards(urls, parse(script, teacher, *other), {}) == (False, True)


def test_filters_reject_encoded_samples_too(fleet, mix):
    widths = {number_of(sample): json.loads(sample["json"])["original_width"]
              for sample in read_samples(mix("encoded buckets"))}  # fmt: skip
    readers = fleet(mix("encoded buckets"), 1, 0, "--min_image_size", 33)  # pictures of 40 × 33 alone
    used = {name for _ in range(12) for name in names_of(readers.step()[0])}
    assert used == {name for name, width in widths.items() if width == 40}
    assert readers.readers[0].skipped.keys() == {"below min_image_size"}


# ------------------------------------------------------------------------------------------------------- optimizers
CLASSES = {
    "adamw": ("torch.optim", "AdamW"),
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit"),
    "lion8bit": ("bitsandbytes.optim", "Lion8bit"),
    "adafactor": ("torch.optim", "Adafactor"),
    "prodigy": ("prodigyopt", "Prodigy"),
    "radam": ("torch.optim", "RAdam"),
}


def make_one(script, teacher, name, *flags):
    """The optimizer of this name over one parameter, and its schedule."""
    args = parse(script, teacher, "--optimizer", name, "--adam_beta1", 0.8, "--adam_weight_decay", 0.05, *flags)
    return script.make_optimizer(args, [torch.nn.Parameter(torch.ones(3, 4))], 1)


@pytest.mark.parametrize("name", list(CLASSES))
def test_the_optimizer_is_of_the_class_that_the_flag_names(script, teacher, name):
    package, kind = CLASSES[name]
    wanted = getattr(pytest.importorskip(package), kind)
    optimizer, schedule = make_one(script, teacher, name)
    assert type(optimizer) is wanted and schedule.optimizer is optimizer
    (group,) = optimizer.param_groups
    assert float(group["lr"]) == 1e-3 and group["weight_decay"] == 0.05
    if name != "adafactor":
        assert tuple(group["betas"])[0] == 0.8
    args = parse(script, teacher, "--use_8bit_adam")
    assert args.optimizer == "adamw8bit" and type(script.make_optimizer(args, [torch.nn.Parameter(torch.ones(2))], 1)[0]
                                                  ).__name__ == "AdamW8bit"  # fmt: skip


def test_radam_is_the_papers(script, teacher):
    """arXiv:1908.03265, Algorithm 2, with decoupled weight decay, in float64: no second moment in the first steps."""
    args = parse(script, teacher, "--optimizer", "radam", "--learning_rate", 0.1, "--adam_weight_decay", 0.05)
    weights = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer, _ = script.make_optimizer(args, [weights], 1)
    theta, m, v, last, kinds = weights.detach().double().numpy().copy(), 0.0, 0.0, 2 / (1 - 0.999) - 1, set()
    for step in range(1, 13):
        gradient = np.array([0.3, -1.0, 2.0]) * math.cos(step)
        weights.grad = torch.from_numpy(gradient).float()
        optimizer.step()
        theta *= 1 - 0.1 * 0.05
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        rho = last - 2 * step * 0.999**step / (1 - 0.999**step)
        kinds.add(rho > 5)
        rate = 0.1 * m / (1 - 0.9**step)
        if rho > 5:  # the variance is tractable
            rectified = math.sqrt((rho - 4) * (rho - 2) * last / ((last - 4) * (last - 2) * rho))
            rate *= rectified / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        theta -= rate
    assert kinds == {True, False}
    np.testing.assert_allclose(weights.detach().numpy(), theta, rtol=1e-5)


@pytest.mark.parametrize("name", ["lion8bit", "adafactor", "prodigy", "radam"])  # the others: test_train.py
def test_training_with_it_moves_the_weights_and_resumes_to_the_bit(case, train, resume, pack, name):
    pytest.importorskip(CLASSES[name][0])
    rate = "1" if name == "prodigy" else "1e-3"
    flags = ("--optimizer", name, "--learning_rate", rate, "--center_crop")
    whole = train("whole", pack("squares", case), *flags)
    assert_same_end(resume(whole, pack("squares", case), *flags), whole, 6)
    third, last = (read_checkpoint(whole / f"checkpoint-{step}") for step in (3, 6))
    moved = [key for key in differences(*({k: v for k, v in state.items() if k.startswith("/student/")}
                                          for state in (third, last)))]  # fmt: skip
    assert len(moved) > 20 and all(0 < loss < 1000 for _, loss, *_ in read_losses(whole))
    state = [value for key, value in last.items() if key.startswith("/optimizer/") and torch.is_tensor(value)]
    assert state and all(value.isfinite().all() for value in state)


@pytest.mark.parametrize("name", list(CLASSES))
def test_it_lowers_a_simple_loss(script, teacher, name):
    pytest.importorskip(CLASSES[name][0])
    args = parse(script, teacher, "--optimizer", name, "--learning_rate", 1 if name == "prodigy" else 0.05)
    torch.manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(64, 64))  # large enough for states in 8 bits
    optimizer, _ = script.make_optimizer(args, [weights], 1)
    losses = []
    for _ in range(200):
        loss = (weights - 0.5).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_paged_optimizer_needs_a_gpu(script, teacher, tmp_path):
    args = parse(script, teacher, "--optimizer", "paged_adamw8bit", "--output_dir", tmp_path)
    with pytest.raises(SystemExit, match="^error: --optimizer paged_adamw8bit needs a GPU; use adamw8bit$"):
        script.check_environment(args)


@pytest.mark.parametrize("name, package", [("adamw8bit", "bitsandbytes"), ("lion8bit", "bitsandbytes"),
                                 ("prodigy", "prodigyopt")])  # fmt: skip
def test_a_package_that_is_missing_is_named(script, teacher, tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    args = parse(script, teacher, "--optimizer", name, "--output_dir", tmp_path)
    with pytest.raises(SystemExit, match=f"^error: a flag asks for {package}, which cannot be imported here") as error:
        script.check_environment(args)
    assert "\n" not in str(error.value)
    script.check_environment(parse(script, teacher, "--output_dir", tmp_path))  # adamw needs none of them


@pytest.mark.parametrize("rate, warns", [("8e-6", True), ("0.09", True), ("0.1", False), ("1", False)])
def test_prodigy_warns_of_a_small_learning_rate(script, teacher, caplog, rate, warns):
    pytest.importorskip("prodigyopt")
    with caplog.at_level("WARNING"):
        make_one(script, teacher, "prodigy", "--learning_rate", rate)
    assert ("--learning_rate should be 1" in caplog.text) == warns


def test_prodigys_own_learning_rate(script):
    given = ["--pretrained_teacher_model", "t", "--train_shards_path_or_url", "s", "--optimizer", "prodigy"]
    assert script.parse_args(given).learning_rate == 1


# ------------------------------------------------------------------------------------------------ figures of memory


def test_metrics_tell_free_and_used_memory(script, case, begin, pack):
    run = begin(pack("squares", case), "--center_crop")
    take_steps(script, run, 2)
    script.log_metrics(run, {"time": time.perf_counter() - 1, "step": 0}, SimpleNamespace(set_postfix_str=str))
    (line,) = read_metrics(run.args.output_dir)
    total = psutil.virtual_memory().total / 2**30
    assert 0 < line["free_memory_gb"] < total and 0.1 < line["peak_memory_gb"] < total
    assert line["step"] == 2 and line["samples_per_s"] > 0


@over([LCM, LCM_LORA])
def test_advice_against_a_full_memory_leaves_out_what_is_in_use(script, case, teacher):
    ema = [] if case.is_lora else ["--offload_ema"]
    batch, encode = "a smaller --train_batch_size", "shards that prepare_shards.py encoded (no VAE, no text encoder)"
    every = [batch, "--gradient_checkpointing", *ema, "--optimizer adamw8bit", encode, "a smaller --resolution"]

    def savers(*flags, is_encoded=False):
        args = parse(script, teacher, *case.flags, *flags)
        args.encoded_shards = is_encoded
        return list(script.memory_savers(args))

    def but(*used):
        return [name for name in every if name not in used]

    assert savers() == every
    assert savers("--train_batch_size", 1) == but(batch)
    assert savers("--gradient_checkpointing") == but("--gradient_checkpointing")
    assert savers(*ema) == but(*ema)
    for name in ("adamw8bit", "lion8bit", "adafactor"):
        assert savers("--optimizer", name) == but("--optimizer adamw8bit")
    assert savers("--use_8bit_adam") == but("--optimizer adamw8bit")
    assert savers(is_encoded=True) == but(encode)
    flags = ("--train_batch_size", 1, "--gradient_checkpointing", *ema, "--optimizer", "adamw8bit")
    assert savers(*flags, is_encoded=True) == ["a smaller --resolution"]


@over([LCM, LCM_LORA], "flags", [(), ("--ema_decay", "0")])
def test_flags_of_the_advice_can_be_given(case, script, teacher, flags):
    flags = (*case.flags, *flags)
    args = parse(script, teacher, *flags)
    advised = [saver.split() for saver in script.memory_savers(args) if saver.startswith("--")]
    assert ["--gradient_checkpointing"] in advised and ["--optimizer", "adamw8bit"] in advised
    parse(script, teacher, *flags, *sum(advised, []))
