"""tools/prepare_shards.py: every source, the buckets, --check, --encode, interrupts, processes, bad input and errors.

The folders hold pictures of the demo, resized.
"""

import functools
import hashlib
import http.server
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    get_script,
    load_script,
    make_pipeline,
    make_sdxl_pipeline,
    run_main,
    run_script,
    tiny_args,
    write_shard,
)
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import load, load_file

TOOL = ROOT / "tools" / "prepare_shards.py"
EMOJI = ROOT / "demo" / "shards" / "train-00000.tar"
SIZES = [(96, 64), (64, 64), (64, 96), (130, 64), (70, 66), (64, 100), (100, 64)]
BUCKETS = ("--aspect_ratio_buckets", "--resolution", "64", "--bucket_step", "16", "--image_format", "png")


@pytest.fixture(scope="module")
def tool():
    return load_script(TOOL)


@pytest.fixture(scope="session")
def emoji():
    """Pictures of the demo, RGB, 64x64."""
    with tarfile.open(EMOJI) as shard:
        members = [member for member in shard if member.name.endswith(".webp")][:40]
        return [Image.open(io.BytesIO(shard.extractfile(member).read())).convert("RGB") for member in members]


def picture_bytes(image, size=(64, 64), kind="PNG", **options):
    stream = io.BytesIO()
    image.resize(size).save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path, emoji):
    """Seven pictures in two folders, of several sizes and formats, with .txt captions."""
    root = tmp_path / "photos"
    (root / "more" / "deep").mkdir(parents=True)
    for index, size in enumerate(SIZES):
        kind, suffix = [("PNG", "png"), ("JPEG", "JPG"), ("WEBP", "webp"), ("JPEG", "jpeg")][index % 4]
        path = (root if index < 3 else root / "more" / "deep") / f"{index}.{suffix}"
        path.write_bytes(picture_bytes(emoji[index], size, kind))
        path.with_suffix(".txt").write_text(f"picture {index}\n", encoding="utf-8-sig" if index == 1 else "utf-8")
    return root


def prepare(tool, output, *flags, folder=None, shards=None):
    """Runs the tool in this process; returns index.json."""
    source = ["--image_folder", folder] if folder else ["--train_shards_path_or_url", *shards]
    run_main(tool, [*source, "--output_dir", output, *flags])
    return json.loads((Path(output) / "index.json").read_text())


def read_tar(path):
    """[{member: bytes, "info": the JSON}] of a shard, in order."""
    samples = {}
    with tarfile.open(path) as shard:
        for member in shard:
            assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
            key, name = member.name.split(".")
            samples.setdefault(key, {})[name] = shard.extractfile(member).read()
    for sample in samples.values():
        sample["info"] = json.loads(sample["json"])
    return list(samples.values())


def read_all(output):
    """Samples of all shards by their source."""
    index = json.loads((Path(output) / "index.json").read_text())
    shards = [read_tar(Path(output) / shard["file"]) for shard in index["shards"]]
    assert [len(shard) for shard in shards] == [shard["samples"] for shard in index["shards"]]
    samples = {sample["info"]["source"]: sample for shard in shards for sample in shard}
    assert len(samples) == index["samples"] == sum(map(len, shards))
    return samples


def digests(output):
    """SHA-256 of each file below a folder."""
    files = [path for path in Path(output).rglob("*") if path.is_file()]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def captions_of(output):
    return {source: sample["info"]["captions"] for source, sample in read_all(output).items()}


# ---------------------------------------------------------------------------------------------------------- sources
def test_folder(tool, folder, tmp_path):
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "0.png").write_bytes(b"no picture")
    (folder / "._1.jpg").write_bytes(b"no picture")
    index = prepare(tool, tmp_path / "a", "--samples_per_shard", "3", folder=folder)
    samples = read_all(tmp_path / "a")
    assert (index["samples"], [shard["samples"] for shard in index["shards"]]) == (7, [3, 3, 1])
    assert (index["rejected"], index["sizes"], index["fingerprint"]) == ({}, {"as they are": 7}, None)
    for source, sample in samples.items():
        number = int(Path(source).stem)
        name = {"png": "png", "JPG": "jpg", "jpeg": "jpg", "webp": "webp"}[source.split(".")[1]]
        assert sample.keys() == {name, "txt", "json", "info"}
        assert sample[name] == (folder / source).read_bytes() and sample["txt"].decode() == f"picture {number}"
        assert sample["info"] == {"original_width": SIZES[number][0], "original_height": SIZES[number][1],
                                  "crop": None, "captions": [f"picture {number}"], "source": source}  # fmt: skip
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"index.json", "00000.tar", "00001.tar", "00002.tar"}

    prepare(tool, tmp_path / "b", "--samples_per_shard", "3", folder=folder)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    prepare(tool, tmp_path / "c", "--samples_per_shard", "3", "--seed", "1", folder=folder)
    assert list(read_all(tmp_path / "c")) != list(samples) and read_all(tmp_path / "c").keys() == samples.keys()


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata(tool, folder, tmp_path, kind):
    rows = [("0.png", "zero, with a comma"), ("more/deep/3.jpeg", 'a "three"\u2028'), ("gone.png", "missing")]
    if kind == "jsonl":
        lines = [json.dumps({"file_name": name, "prompt": text}, ensure_ascii=False) for name, text in rows]
        lines.append(json.dumps({"file_name": "2.webp", "prompt": ["two", "another two"]}))
    else:
        lines = ["file_name,prompt", *(f'{name},"{text}"' for name, text in rows[:1] + rows[2:]),
                 'more/deep/3.jpeg,"a ""three""\u2028"']  # fmt: skip
    (folder / f"metadata.{kind}").write_text("\n".join(lines), encoding="utf-8")
    (folder / "more" / "metadata.jsonl").write_text('{"file_name": "deep/4.png", "prompt": "below"}')
    index = prepare(tool, tmp_path / "out", "--caption_column", "prompt", folder=folder)
    found = captions_of(tmp_path / "out")
    expected = {f"{path}": [f"picture {Path(path).stem}"] for path in found}  # the .txt, where there is no row
    expected |= {"0.png": ["zero, with a comma"], "more/deep/3.jpeg": ['a "three"'], "more/deep/4.png": ["below"]}
    if kind == "jsonl":
        expected["2.webp"] = ["two", "another two"]
        assert "txt" not in read_all(tmp_path / "out")["2.webp"]  # it would hide the list
    assert found == expected and len(found) == 7
    assert index["rejected"] == {"no image": [1, "gone.png has a caption but is not in the folder"]}

    message = rf"error: .*metadata.{kind} needs columns file_name and text/caption/captions .* has: file_name, prompt"
    with pytest.raises(SystemExit, match=message):
        prepare(tool, tmp_path / "other", folder=folder)


def test_coco(tool, folder, tmp_path):
    names = {1: "0.png", 2: "3.jpeg", 3: "elsewhere.jpg", 4: "1.JPG"}  # 3.jpeg lies deeper
    notes = [(2, "b"), (1, "a"), (1, "another a"), (3, "c"), (1, "a third")]
    for part, (images, captions) in enumerate([({1, 2, 3}, notes), ({4}, [])]):
        content = {"images": [{"id": key, "file_name": names[key]} for key in images],
                   "annotations": [{"image_id": key, "caption": text} for key, text in captions]}  # fmt: skip
        (tmp_path / f"captions{part}.json").write_text(json.dumps(content))
    files = [tmp_path / "captions0.json", tmp_path / "captions1.json"]
    index = prepare(tool, tmp_path / "out", "--coco_annotations", *files, folder=folder)
    assert captions_of(tmp_path / "out") == {"0.png": ["a", "another a", "a third"], "more/deep/3.jpeg": ["b"]}
    assert {reason: count for reason, (count, _) in index["rejected"].items()} == {"no image": 1, "no caption": 1}
    (tmp_path / "instances.json").write_text(
        '{"images": [{"id": 1, "file_name": "x"}], "annotations": [{"image_id": 1}]}'
    )
    with pytest.raises(
        SystemExit, match="error: --coco_annotations .*instances.json holds no captions .* no 'caption'"
    ):
        prepare(tool, tmp_path / "other", "--coco_annotations", tmp_path / "instances.json", folder=folder)


def write_inputs(root, emoji, shards=(3, 4)):
    """Shards as img2dataset writes them: pictures of 64x48, the JSON gives the size before; two captions a sample."""
    root.mkdir()
    number = 0
    for shard, count in enumerate(shards):
        members = []
        for _ in range(count):
            info = {"original_width": 640, "original_height": 480, "pwatermark": 0.1 * number, "url": f"u{number}"}
            members += [(f"{number:04}.jpg", picture_bytes(emoji[number], (64, 48), "JPEG")),
                        (f"{number:04}.txt", f"text {number}".encode()), (f"{number:04}.caption", b"category"),
                        (f"{number:04}.json", json.dumps(info).encode())]  # fmt: skip
            number += 1
        write_shard(root / f"{shard}.tar", members)
    return f"{root}/{{0..{len(shards) - 1}}}.tar"


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path; gives the address."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_address[1]}"
        found.shutdown()


@pytest.mark.parametrize("kind", ["path", "pipe", pytest.param("url", marks=pytest.mark.skipif(
    not shutil.which("curl"), reason="webdataset opens http URLs with curl"))])  # fmt: skip
def test_shards(tool, emoji, tmp_path, server, kind):
    write_inputs(tmp_path / "in", emoji)
    prefix = {"path": f"{tmp_path}/in/", "pipe": f"pipe:cat {tmp_path}/in/", "url": f"{server}/in/"}[kind]
    pattern = prefix + "{0..1}.tar"
    index = prepare(tool, tmp_path / "out", "--samples_per_shard", "2", shards=[pattern])
    samples = read_all(tmp_path / "out")
    assert [shard["samples"] for shard in index["shards"]] == [2, 1, 2, 1]  # input shards are not mixed
    assert index["rejected"]["above max_pwatermark"][0] == 1  # the last one's 0.6
    for number, (source, sample) in enumerate(samples.items()):
        url = f"{prefix}{int(number > 2)}.tar"
        assert source == f"{url}#{number:04}" and sample["info"]["captions"] == [f"text {number}", "category"]
        assert sample["jpg"] == picture_bytes(emoji[number], (64, 48), "JPEG") and "txt" not in sample
        assert (sample["info"]["original_width"], sample["info"]["original_height"]) == (640, 480)
        assert sample["info"]["url"] == f"u{number}"
    index = prepare(
        tool, tmp_path / "grouped", "--group_input_shards", "2", "--min_image_size", "300", shards=[pattern]
    )
    assert [shard["samples"] for shard in index["shards"]] == [6]
    index = prepare(tool, tmp_path / "none", "--max_pwatermark", "0.05", shards=[pattern])
    assert (index["samples"], index["rejected"]["above max_pwatermark"][0]) == (1, 6)


def test_shards_cut_short(tool, emoji, tmp_path, capfd):
    """A shard that ends early leaves its job undone, until it is whole or given up."""
    pattern = write_inputs(tmp_path / "in", emoji)
    whole = (tmp_path / "in" / "1.tar").read_bytes()
    (tmp_path / "in" / "1.tar").write_bytes(whole[:9000])
    with pytest.raises(SystemExit, match="error: 1 of 2 jobs are not done"):
        prepare(tool, tmp_path / "out", shards=[pattern])
    assert "skipped (unreadable shard" in capfd.readouterr().err
    index = prepare(tool, tmp_path / "less", "--skip_unreadable_shards", shards=[pattern])
    assert index["rejected"]["unreadable shard"][0] == 1 and 3 < index["samples"] < 7
    (tmp_path / "in" / "1.tar").write_bytes(whole)
    prepare(tool, tmp_path / "out", shards=[pattern])
    prepare(tool, tmp_path / "straight", shards=[pattern])
    assert digests(tmp_path / "out") == digests(tmp_path / "straight")
    (tmp_path / "in" / "1.tar").unlink()
    with pytest.raises(SystemExit, match=r"error: 1 of 2 shards do not exist: .*in/1\.tar"):
        prepare(tool, tmp_path / "missing", shards=[pattern])


# ---------------------------------------------------------------------------------------------------------- buckets
@pytest.mark.parametrize(("resolution", "step"), [(64, 16), (512, 64), (1024, 64), (768, 32)])
def test_bucket_list(tool, resolution, step):
    found = tool.make_buckets(resolution, step)
    assert [resolution, resolution] in found and len(found) == len(set(map(tuple, found)))
    for width, height in found:
        assert width % step == height % step == 0 and max(width, height) <= 2 * min(width, height)
        assert width * height <= resolution**2 < (width + step) * (height + step) and [height, width] in found
    if resolution == 1024:  # those that SDXL was trained on, up to 2:1
        assert {(1152, 896), (1216, 832), (1344, 768), (832, 1216), (704, 1408)} <= set(map(tuple, found))


def test_bucket_shards(tool, folder, emoji, tmp_path, capsys):
    sideways = Image.Exif()
    sideways[0x0112] = 6  # stored 96x64, shown 64x96
    (folder / "turned.jpg").write_bytes(picture_bytes(emoji[9], (96, 64), "JPEG", exif=sideways))
    (folder / "turned.txt").write_text("turned")
    index = prepare(tool, tmp_path / "out", *BUCKETS, "--samples_per_shard", "2", folder=folder)
    chosen = {}
    for shard in index["shards"]:
        for sample in read_tar(tmp_path / "out" / shard["file"]):
            info, image = sample["info"], Image.open(io.BytesIO(sample["png"]))
            assert list(image.size) == shard["size"] == info["crop"][2:]  # a shard holds one size
            source = ImageOps.exif_transpose(Image.open(folder / info["source"])).convert("RGB")
            assert [info["original_width"], info["original_height"]] == list(source.size)
            x, y, width, height = info["crop"]
            assert info["time_ids"] == [source.height, source.width, y, x, height, width]
            scale = max(width / source.width, height / source.height)  # and then the shorter side, rounded up
            scale = math.ceil(scale * min(source.size) - 1e-6) / min(source.size)
            resized = source.resize([round(side * scale) for side in source.size], Image.Resampling.BILINEAR)
            assert 0 <= x <= resized.width - width and 0 <= y <= resized.height - height and scale <= 1
            assert resized.width - width < 2 or resized.height - height < 2  # no more is cut off than has to be
            expected = np.asarray(resized.crop((x, y, x + width, y + height)), dtype=float)
            difference = np.abs(np.asarray(image, dtype=float) - expected)
            assert difference.max() == 0 or (info["source"][-3:] != "png" and difference.mean() < 1)  # JPEG's draft
            chosen[info["source"]] = image.size
            ratio = source.width / source.height
            nearest = min(tool.make_buckets(64, 16), key=lambda size, r=ratio: abs(math.log(size[0] / size[1] / r)))
            assert nearest[0] / nearest[1] == width / height
    assert chosen["0.png"] == (80, 48) and chosen["1.JPG"] == (64, 64) and chosen["turned.jpg"] == (48, 80)
    assert index["sizes"] == {"48x80": 3, "64x64": 2, "80x48": 3} and index["rejected"] == {}
    printed = dict(re.findall(r"^  (\d+x\d+) +(\d+)$", capsys.readouterr().out, re.MULTILINE))
    assert printed == {size: str(count) for size, count in index["sizes"].items()}


def test_no_enlarging(tool, folder, emoji, tmp_path, capsys):
    for name, size in {"small": (40, 40), "tiny": (20, 20)}.items():
        (folder / f"{name}.png").write_bytes(picture_bytes(emoji[0], size))
        (folder / f"{name}.txt").write_text(name)
    index = prepare(tool, tmp_path / "none", *BUCKETS, folder=folder)
    assert index["rejected"]["below min_image_size"][0] == 2 and index["samples"] == 7
    assert "would be enlarged to 64x64" in capsys.readouterr().out
    index = prepare(tool, tmp_path / "some", *BUCKETS, "--min_image_size", "40", folder=folder)
    assert index["rejected"]["below min_image_size"][0] == 1 and index["sizes"]["64x64"] == 3
    assert read_all(tmp_path / "some")["small.png"]["info"]["original_width"] == 40
    index = prepare(tool, tmp_path / "all", *BUCKETS, "--min_image_size", "1", folder=folder)
    assert index["rejected"] == {} and index["samples"] == 9
    index = prepare(tool, tmp_path / "plain", "--min_image_size", "30", folder=folder)
    assert index["rejected"]["below min_image_size"][0] == 1 and index["samples"] == 8


def test_no_enlarging_of_resized_shards(tool, emoji, tmp_path):
    """It is the picture that counts (64x48), not the size before another tool's resize (640x480 in the JSON)."""
    pattern = write_inputs(tmp_path / "in", emoji, (3,)).replace("{0..0}", "0")
    flags = ("--aspect_ratio_buckets", "--resolution", "128", "--min_image_size")
    assert prepare(tool, tmp_path / "out", *flags, "48", shards=[pattern])["samples"] == 3
    assert {sample["info"]["original_width"] for sample in read_all(tmp_path / "out").values()} == {640}
    with pytest.raises(SystemExit, match=r"3 × below min_image_size \(.*64x48 would be enlarged to 128x128"):
        prepare(tool, tmp_path / "other", *flags, "49", shards=[pattern])


@pytest.mark.parametrize("flags", [(), BUCKETS], ids=["plain", "buckets"])
def test_training_reads_it(tool, lcm, folder, tmp_path, flags):
    index = prepare(tool, tmp_path / "out", *flags, "--samples_per_shard", "2", folder=folder)
    pattern = f"{tmp_path}/out/{{00000..{len(index['shards']) - 1:05}}}.tar"
    resolution = "64" if flags else "48"
    args = lcm.parse_args(tiny_args("teacher", pattern, "run", "--resolution", resolution, "--train_batch_size", "1"))
    stream = iter(lcm.ShardStream(lcm.expand_shards([pattern]), args))
    batches = [next(stream) for _ in range(index["samples"])]
    assert sorted(batch["captions"][0] for batch in batches) == [f"picture {index}" for index in range(7)]
    sizes = Counter("{3}x{2}".format(*batch["pixel_values"].shape) for batch in batches)
    assert sizes == (index["sizes"] if flags else {"48x48": 7}) and not any(batch["skipped"] for batch in batches)


# ------------------------------------------------------------------------------------------------------------ check
def test_check_folder(tool, folder, tmp_path, capsys):
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:200])
    (folder / "broken.txt").write_text("broken")
    (folder / "1.txt").unlink()
    (folder / "2.txt").write_text("")
    (folder / "scan.tiff").write_bytes(b"II")
    before, sheet = digests(folder), tmp_path / "sheets" / "sheet.png"
    run_main(tool, ["--check", "--image_folder", folder, "--contact_sheet", sheet, *BUCKETS])
    out = capsys.readouterr().out
    table = {line.strip().rsplit("  ", 1)[0].strip(): line.split() for line in out.splitlines()}
    assert "samples: 9, usable: 6, rejected: 3" in out
    for reason, example in {
        "broken image": "broken.png: ",
        "no caption": "1.JPG: ",
        "unknown format": "scan.tiff: ",
    }.items():
        assert re.search(rf"  {reason} +1   e\.g\. {re.escape(example)}", out)
    for name, row in {"width": "64 83 130", "height": "64 65 100", "captions of a sample": "1 1 1",
                      "characters of a caption": "0 9 9", "words of a caption": "0 2 2"}.items():  # fmt: skip
        assert re.search(rf"  {name} +" + row.replace(" ", " +") + "\n", out)
    assert table["empty captions"][-1] == "1" and "a side below --resolution 64: 0" in out
    assert [table[size][-1] for size in ("48x80", "64x64", "80x48")] == ["2", "1", "3"]
    assert Image.open(sheet).size == (8 * 140, 172) and digests(folder) == before
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "sheets"}


def test_check_shards(tool, emoji, tmp_path, capsys, monkeypatch):
    """What leaves a training run at 0 %: a filter that rejects everything, a wrong path."""
    monkeypatch.chdir(tmp_path)
    pattern = write_inputs(tmp_path / "in", emoji)
    run_main(tool, ["--check", "--train_shards_path_or_url", pattern, f"{tmp_path}/gone.tar"])
    out = capsys.readouterr().out
    assert "samples: 8, usable: 6, rejected: 2" in out and re.search(r"unreadable shard +1   e\.g\. .*gone\.tar", out)
    assert re.search(r"captions of a sample +2 +2 +2", out) and (tmp_path / "contact_sheet.png").exists()
    (tmp_path / "contact_sheet.png").unlink()
    with pytest.raises(SystemExit, match="error: no usable sample"):
        run_main(tool, ["--check", "--train_shards_path_or_url", pattern, "--min_image_size", "1000"])
    assert re.search(r"below min_image_size +7   e\.g\. .*#0000: width 640", capsys.readouterr().out)
    assert {path.name for path in tmp_path.iterdir()} == {"in"}


# ----------------------------------------------------------------------------------------------------------- encode
@pytest.fixture(scope="session")
def pipelines(make_teacher):
    return {"sd": make_teacher(make_pipeline), "sdxl": make_teacher(make_sdxl_pipeline)}


def posterior(pipe, image):
    """Mean and standard deviation of a picture's latents, without this repository's code."""
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        found = pipe.vae.encode(pixels).latent_dist
    return found.mean[0], found.std[0]


@torch.no_grad()
def prompt_embeds(pipe, prompt):
    """What the pipeline makes of a prompt: tokens (1, tokens, width) and pooled embedding (1, width) or None."""
    found = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    return found[0], (found[2] if len(found) == 4 else None)


@pytest.mark.parametrize(("kind", "flags"), [("sd", ()), ("sdxl", BUCKETS), ("sdxl", ("--resolution", "48")),
                                             ("sd", BUCKETS)])  # fmt: skip
def test_encode(tool, folder, tmp_path, pipelines, kind, flags):
    from diffusers import DiffusionPipeline

    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": ["one", "an other caption", ""]}')
    flags = flags or ("--resolution", "64")
    index = prepare(tool, tmp_path / "out", *flags, "--encode", pipelines[kind], "--random_flip", "--keep_images",
                    "--encode_dtype", "float32", "--encode_batch_size", "3", "--image_format", "png",
                    folder=folder)  # fmt: skip
    pipe = DiffusionPipeline.from_pretrained(pipelines[kind])
    samples = read_all(tmp_path / "out")
    assert len(samples) == 7 and len(samples["0.png"]["info"]["captions"]) == 3
    for sample in samples.values():
        tensors, info, image = load(sample["safetensors"]), sample["info"], Image.open(io.BytesIO(sample["png"]))
        expected = dict(zip(("latents_mean", "latents_std"), posterior(pipe, image), strict=True))
        expected |= dict(zip(("flipped_mean", "flipped_std"), posterior(pipe, ImageOps.mirror(image)), strict=True))
        texts = [prompt_embeds(pipe, caption) for caption in info["captions"]]
        expected["text"] = torch.cat([text for text, _ in texts])
        if kind == "sdxl":
            expected["pooled"] = torch.cat([pooled for _, pooled in texts])
        assert tensors.keys() == expected.keys()
        assert tensors["latents_mean"].shape == (4, image.height // 2, image.width // 2)
        for name, value in expected.items():
            torch.testing.assert_close(tensors[name], value, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(tensors["flipped_mean"], tensors["latents_mean"])
        x, y, width, height = info["crop"]
        full = round(info["original_width"] * max(width / info["original_width"], height / info["original_height"]))
        assert abs(info["time_ids_flipped"][3] - (full - width - x)) <= 1 and info["time_ids_flipped"][2] == y
    empty, (text, pooled) = load_file(tmp_path / "out" / "empty.safetensors"), prompt_embeds(pipe, "")
    torch.testing.assert_close(empty["text"], text, rtol=1e-4, atol=1e-4)
    if kind == "sdxl":
        torch.testing.assert_close(empty["pooled"], pooled, rtol=1e-4, atol=1e-4)
    ramp = torch.linspace(-1, 252 / 127.5 - 1, 64).expand(1, 3, 64, 64)  # by which training knows the VAE again
    with torch.no_grad():
        latents = pipe.vae.encode(ramp).latent_dist.mean
    torch.testing.assert_close(empty["latents"], latents, rtol=1e-3, atol=1e-3)

    buckets = tool.make_buckets(64, 16) if flags == BUCKETS else None
    assert index["fingerprint"] == {
        "model": pipelines[kind], "revision": None, "vae": None, "vae_revision": None, "resolution": int(flags[-1]) if
        not buckets else 64, "sizes": buckets, "center_crop": False, "random_flip": True,
        "interpolation_type": "bilinear", "dtype": "float32"}  # fmt: skip
    (tmp_path / "one.safetensors").write_bytes(samples["0.png"]["safetensors"])
    for path in (tmp_path / "one.safetensors", tmp_path / "out" / "empty.safetensors"):
        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["fingerprint"]) == index["fingerprint"]


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("flip", [False, True])
def test_encode_equals_training(tool, emoji, tmp_path, pipelines, kind, flip):
    """What a training script makes of a plain sample is what the encoded one holds, drawn by the same noise."""
    script = get_script("train_lcm_distill_sd_wds")
    pattern = write_inputs(tmp_path / "in", emoji, (3,)).replace("{0..0}", "0")
    flags = ("--resolution", "32", "--center_crop", "--random_flip")
    prepare(tool, tmp_path / "out", *flags, "--encode", pipelines[kind], "--encode_dtype", "float32", shards=[pattern])
    encoded = read_all(tmp_path / "out")
    args = script.parse_args(tiny_args(pipelines[kind], pattern, "run", *flags))
    family, prefix = script.check_teacher(args).family, "flipped" if flip else "latents"
    tokenizers, text_encoders, vae = script.load_frozen(args, family, torch.float32)
    models = SimpleNamespace(family=family, tokenizers=tokenizers, text_encoders=text_encoders)
    for raw in script.read_shard(pattern, 10):
        rng = iter((0.0, 1.0, 0.0, 0.0, 0.0 if flip else 1.0))  # the first caption, kept, and the flip
        sample = script.decode_sample(raw, args, SimpleNamespace(random=lambda rng=rng: next(rng)))
        mean, std = (value[0] for value in script.encode_images(vae, sample["pixel_values"][None], 1))
        found = encoded[f"{pattern}#{raw['__key__']}"]
        tensors, info = load(found["safetensors"]), found["info"]
        torch.testing.assert_close(tensors[f"{prefix}_mean"], mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tensors[f"{prefix}_std"], std, rtol=1e-4, atol=1e-5)
        assert sample["captions"] == info["captions"][0]
        embeddings = script.encode_prompts(models, [sample["captions"]])
        assert embeddings.keys() == ({"text", "pooled"} if kind == "sdxl" else {"text"})
        for name, value in embeddings.items():
            torch.testing.assert_close(tensors[name][:1], value, rtol=1e-4, atol=1e-5)
        if kind == "sdxl":
            assert info["time_ids_flipped" if flip else "time_ids"] == sample["time_ids"].tolist()


def test_encode_gives_the_vae_a_megapixel_at_once(tool, pipelines, monkeypatch):
    args = tool.parse_args(["--image_folder", ".", "--output_dir", "out", "--encode", pipelines["sd"], "--random_flip",
                            "--mixed_precision", "no"])  # fmt: skip
    encoder, sizes = tool.Encoder(args, torch.device("cpu")), []

    def encode(x):
        sizes.append(len(x))
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=x[..., ::256, ::256], std=-x[..., ::256, ::256]))

    monkeypatch.setattr(encoder.vae, "encode", encode)
    pixels = torch.randint(0, 256, (3, 3, 512, 1024), dtype=torch.uint8)
    found = encoder.encode_pixels(pixels)
    assert sizes == [2, 1] * 2
    for name, image in {"latents": pixels, "flipped": pixels.flip(-1)}.items():
        torch.testing.assert_close(found[f"{name}_mean"], (image / 127.5 - 1)[..., ::256, ::256])
        assert torch.equal(found[f"{name}_std"], -found[f"{name}_mean"])


def test_encode_defaults(tool, folder, tmp_path, pipelines, make_teacher, capsys):
    """Without pictures, in half precision; another VAE; --check reads it."""
    other = make_teacher(make_pipeline, seed=1) + "/vae"
    flags = ("--resolution", "64", "--center_crop", "--encode", pipelines["sd"], "--encode_batch_size", "2")
    for name, more in {"half": (), "bf16": ("--encode_dtype", "bfloat16"), "vae": ("--encode_dtype", "float32"),
                       "full": ("--encode_dtype", "float32")}.items():  # fmt: skip
        more = (*more, "--pretrained_vae_model_name_or_path", other) if name == "vae" else more
        index = prepare(tool, tmp_path / name, *flags, *more, folder=folder)
    found = {name: read_all(tmp_path / name) for name in ("half", "bf16", "vae", "full")}
    for source, sample in found["half"].items():
        assert sample.keys() == {"txt", "json", "info", "safetensors"} and len(sample["info"]["time_ids_flipped"]) == 6
        half, bf16, vae, full = (load(samples[source]["safetensors"]) for samples in found.values())
        assert half.keys() == {"latents_mean", "latents_std", "text"}
        for name in half:
            assert torch.equal(half[name], full[name].half()) and torch.equal(bf16[name], full[name].bfloat16())
        assert torch.equal(vae["text"], full["text"]) and not torch.allclose(vae["latents_mean"], full["latents_mean"])
    index = json.loads((tmp_path / "vae" / "index.json").read_text())
    assert index["fingerprint"]["vae"] == other and index["sizes"] == {"64x64": 7}
    capsys.readouterr()
    run_main(tool, ["--check", "--train_shards_path_or_url", f"{tmp_path}/half/00000.tar"])
    out = capsys.readouterr().out
    assert "usable: 7" in out and "encoded by {" in out and '"dtype": "float16"' in out and "shows" not in out


def test_not_finite(tool, folder, tmp_path, pipelines, monkeypatch):
    encode_pixels = tool.Encoder.encode_pixels

    def overflow(self, pixels):
        found = encode_pixels(self, pixels)
        if pixels.float().std(dim=-2).max() > 0:  # else the ramp by which training knows the VAE
            found["latents_mean"][0] = math.inf
        return found

    monkeypatch.setattr(tool.Encoder, "encode_pixels", overflow)
    flags = ("--encode", pipelines["sd"], "--resolution", "64", "--encode_batch_size", "4")
    index = prepare(tool, tmp_path / "out", *flags, folder=folder)
    assert index["rejected"]["not finite"][0] == 2 and index["samples"] == len(read_all(tmp_path / "out")) == 5


def test_out_of_memory(tool, folder, tmp_path, pipelines, monkeypatch):
    encode_pixels = tool.Encoder.encode_pixels

    def encode_few(self, pixels):
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode_pixels(self, pixels)

    monkeypatch.setattr(tool.Encoder, "encode_pixels", encode_few)
    flags = ("--encode", pipelines["sd"], "--resolution", "64")
    with pytest.raises(SystemExit, match="error: out of device memory: an --encode_batch_size below 4 goes on"):
        prepare(tool, tmp_path / "out", *flags, "--encode_batch_size", "4", folder=folder)
    assert prepare(tool, tmp_path / "out", *flags, "--encode_batch_size", "2", folder=folder)["samples"] == 7


# ------------------------------------------------------------------------------------------- interrupts, processes
KILLED = """
import os, signal, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import prepare_shards as tool
finish, close, count = tool.JobWriter.finish, tool.JobWriter.close, [0]
def killed_close(self, size):
    if self.number == 3:
        os.kill(os.getpid(), signal.SIGKILL)  # the shard is open, not renamed
    close(self, size)
tool.JobWriter.close = killed_close
tool.main(sys.argv[2:])
"""


def test_resume_after_kill(tool, folder, tmp_path, pipelines, capsys):
    flags = ["--image_folder", folder, "--samples_per_shard", "2", "--encode", pipelines["sd"], "--random_flip",
             "--keep_images", *BUCKETS]  # fmt: skip
    run_main(tool, [*flags, "--output_dir", tmp_path / "straight"])
    command = [sys.executable, "-c", KILLED, TOOL, *flags, "--output_dir", tmp_path / "killed"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    died = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert died.returncode == -signal.SIGKILL, died.stderr
    made = {path.name: path.stat().st_ino for path in (tmp_path / "killed" / "progress").glob("0*.tar")}
    assert len(made) == 3 and not (tmp_path / "killed" / "index.json").exists()
    assert list((tmp_path / "killed" / "progress").glob("tmp-*.tar"))
    (folder / "late.png").write_bytes((folder / "0.png").read_bytes())  # the plan of the first start holds
    run_main(tool, [*flags, "--output_dir", tmp_path / "killed"])
    assert "3 of 4 jobs were done before" in capsys.readouterr().out
    assert digests(tmp_path / "straight") == digests(tmp_path / "killed")
    kept = {path.stat().st_ino for path in (tmp_path / "killed").glob("*.tar")}
    assert set(made.values()) <= kept  # not made again

    before = digests(tmp_path / "killed")
    capsys.readouterr()
    run_main(tool, [*flags, "--output_dir", tmp_path / "killed"])  # complete: says so again
    assert digests(tmp_path / "killed") == before and "--max_train_samples 7" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: --seed is 1, but --output_dir .*killed was begun with 0"):
        run_main(tool, [*flags, "--output_dir", tmp_path / "killed", "--seed", "1"])
    (tmp_path / "killed" / "00001.tar").unlink()
    with pytest.raises(SystemExit, match="error: .* has lost 00001.tar"):
        run_main(tool, [*flags, "--output_dir", tmp_path / "killed"])


def test_interrupt_while_numbering(tool, folder, tmp_path, monkeypatch):
    """The shards are renamed one by one at the end; a stop in between loses none."""
    run_main(tool, ["--image_folder", folder, "--samples_per_shard", "2", "--output_dir", tmp_path / "straight"])
    replace, renamed = os.replace, []

    def stop(source, target):
        renamed.append(Path(target).parent == tmp_path / "out")
        if sum(renamed) == 3:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="^interrupted; the same command goes on"):
        patch.setattr(tool.os, "replace", stop)
        run_main(tool, ["--image_folder", folder, "--samples_per_shard", "2", "--output_dir", tmp_path / "out"])
    assert len(list((tmp_path / "out").glob("*.tar"))) == 2
    run_main(tool, ["--image_folder", folder, "--samples_per_shard", "2", "--output_dir", tmp_path / "out"])
    assert digests(tmp_path / "out") == digests(tmp_path / "straight")


def test_two_processes(tmp_path, emoji, pipelines):
    pattern = write_inputs(tmp_path / "in", emoji, (3, 2, 1))
    flags = ["--train_shards_path_or_url", pattern, "--encode", pipelines["sdxl"], "--random_flip", *BUCKETS,
             "--min_image_size", "1", "--samples_per_shard", "2", "--max_pwatermark", "1"]  # fmt: skip
    for count in (1, 2):
        done = run_script([*flags, "--output_dir", tmp_path / str(count)], count, TOOL)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("samples: 6, usable: 6") == 1 and "100%" in done.stderr and "shard/s" in done.stderr
    assert digests(tmp_path / "1") == digests(tmp_path / "2") and len(digests(tmp_path / "1")) == 6


# -------------------------------------------------------------------------------------------- bad input and errors
class Malice:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_bad_samples(tool, emoji, tmp_path, monkeypatch, capfd):
    """Each is counted under its reason, and what is no member of a sample is never opened."""
    monkeypatch.chdir(tmp_path)
    good, malice = picture_bytes(emoji[0]), pickle.dumps(Malice())
    huge = io.BytesIO()
    Image.new("L", (9000, 9000)).save(huge, "PNG")
    members = [("a.png", good), ("a.txt", b"good"), ("a.pkl", malice), ("a.pyd", malice), ("a.pth", malice),
               ("b.png", good[:500]), ("b.txt", b"cut"), ("c.png", good), ("d.txt", b"no picture"), ("e.png", b""),
               ("e.txt", b"empty"), ("f.png", huge.getvalue()), ("f.txt", b"huge"), ("g.png", malice),
               ("g.txt", b"pickle"), ("h.png", good), ("h.json", b'{"caption": "\xff", broken'), ("i.png", good),
               ("i.txt", "latin \xe9".encode("latin1")), ("i.json", b"[1]"), ("j.png", good), ("j.txt", b"1"),
               ("j.txt", b"2"), ("k.jpg", picture_bytes(emoji[1], (400, 400), "JPEG")[:-900]),
               ("k.txt", b"cut")]  # fmt: skip
    shard = write_shard(tmp_path / "in.tar", members)
    index = prepare(tool, tmp_path / "out", shards=[shard])
    assert {reason: count for reason, (count, _) in index["rejected"].items()} == {
        "broken image": 4, "no caption": 2, "no image": 1, "image too large": 1, "duplicate member": 1}  # fmt: skip
    assert {source[-1]: captions for source, captions in captions_of("out").items()} == {
        "a": ["good"], "i": ["latin \ufffd"], "j": ["1"]}  # fmt: skip
    assert index["rejected"]["no image"][1].startswith(f"{shard}#d: needed: jpg, jpeg, png, webp; found: txt")
    assert not Path("unpickled").exists()
    assert capfd.readouterr().err.count("skipped (broken image") == 1
    index = prepare(tool, tmp_path / "named", "--default_caption", "a photo of sks", shards=[shard])
    assert captions_of("named")[f"{shard}#c"] == ["a photo of sks"] and "no caption" not in index["rejected"]


def test_a_list_that_changed_is_another_run(tool, emoji, tmp_path):
    """Jobs go by position: with other lines the same folder would hold some samples twice and others never."""
    write_inputs(tmp_path / "in", emoji, shards=(2, 2, 2))
    shards, text = sorted((tmp_path / "in").glob("*.tar")), tmp_path / "list.txt"
    text.write_text(f"{shards[0]}\n{shards[1]}\n")
    prepare(tool, tmp_path / "other", shards=[text])
    text.write_text(f"{shards[1]}\n{shards[2]}\n")
    with pytest.raises(SystemExit, match=r"^error: --train_shards_path_or_url \(all names\) is .* was begun with"):
        prepare(tool, tmp_path / "other", shards=[text])


def test_flags_that_look_like_secrets_are_compared(tool, folder, tmp_path):
    (folder / "2.txt").unlink(missing_ok=True)
    prepare(tool, tmp_path / "out", "--default_caption", "a turkey sitting", folder=folder)
    with pytest.raises(SystemExit, match="^error: --default_caption is a turkey running"):
        prepare(tool, tmp_path / "out", "--default_caption", "a turkey running", folder=folder)


def test_coco_names_that_stand_twice(tool, emoji, tmp_path):
    for name in ("train", "val"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "1.png").write_bytes(picture_bytes(emoji[0]))
    notes = {"images": [{"id": 1, "file_name": "1.png"}], "annotations": [{"image_id": 1, "caption": "one"}]}
    (tmp_path / "a.json").write_text(json.dumps(notes), encoding="utf-8-sig")
    with pytest.raises(
        SystemExit, match=r"1.png may be train.1.png or val.1.png; give --image_folder one level deeper"
    ):
        prepare(tool, tmp_path / "out", "--coco_annotations", tmp_path / "a.json", folder=tmp_path / "in")
    prepare(tool, tmp_path / "out", "--coco_annotations", tmp_path / "a.json", folder=tmp_path / "in" / "val")
    assert captions_of(tmp_path / "out") == {"1.png": ["one"]}


@pytest.mark.parametrize("flags", [(), BUCKETS], ids=["packed again", "cropped again"])
def test_what_was_cropped_before_keeps_its_place(tool, folder, tmp_path, flags):
    prepare(tool, tmp_path / "first", *BUCKETS, folder=folder)
    prepare(tool, tmp_path / "second", *flags, shards=sorted((tmp_path / "first").glob("*.tar")))
    first, second = ([sample["info"] for sample in read_all(tmp_path / name).values()] for name in ("first", "second"))
    names = ("crop", "time_ids", "time_ids_flipped", "original_width", "original_height")
    assert {str([info[name] for name in names]) for info in first} == {str([info[name] for name in names])
                                                                      for info in second}  # fmt: skip
    assert any(info["time_ids"][0] != info["time_ids"][4] for info in first)  # something was cut off


def test_captions_of_windows(tool, emoji, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("A.PNG", "b.png"):
        (tmp_path / "in" / name).write_bytes(picture_bytes(emoji[0]))
    (tmp_path / "in" / "A.TXT").write_text("upper case", encoding="utf-8-sig")
    (tmp_path / "in" / "b.txt").write_text("füchse", encoding="utf-16")
    prepare(tool, tmp_path / "out", folder=tmp_path / "in")
    assert captions_of(tmp_path / "out") == {"A.PNG": ["upper case"], "b.png": ["füchse"]}


def test_files_that_cannot_be_read_are_counted(tool, folder, tmp_path):
    (folder / "1.txt").unlink()
    (folder / "1.txt").symlink_to(folder / "nowhere")
    os.rename(os.fsencode(folder / "2.webp"), os.fsencode(folder) + b"/caf\xe9.webp")
    os.rename(os.fsencode(folder / "2.txt"), os.fsencode(folder) + b"/caf\xe9.txt")
    index = prepare(tool, tmp_path / "out", *BUCKETS, folder=folder)
    assert index["rejected"]["no caption"][0] == 1 and "1.JPG" in index["rejected"]["no caption"][1]
    assert index["samples"] == 6


def test_large_pictures_are_not_decoded_to_learn_their_size(tool, folder, tmp_path, monkeypatch):
    (folder / "0.png").write_bytes(picture_bytes(Image.new("L", (1, 1)), (9000, 9000)))
    decoded = []
    monkeypatch.setattr(
        Image.Image, "getexif", lambda image, get=Image.Image.getexif: decoded.append(image.size) or get(image)
    )
    index = prepare(tool, tmp_path / "out", *BUCKETS, folder=folder)
    assert index["rejected"]["image too large"][0] == 1 and (9000, 9000) not in decoded and decoded


def test_thumbnails_are_small(tool, tmp_path, emoji):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(picture_bytes(emoji[0], (2, 3000)))
    args = tool.parse_args(["--check", "--image_folder", str(tmp_path / "in")])
    found = tool.inspect_sample(["a.png", ["text"]], args)
    assert found.size == (2, 3000) and max(found.thumbnail.size) <= 128


def test_full_disk(tool, folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(SystemExit, match="^error: --output_dir .*: No space left on device; the same command goes on"):
        prepare(tool, tmp_path / "out", folder=folder)
    monkeypatch.undo()
    assert prepare(tool, tmp_path / "out", folder=folder)["samples"] == 7


def test_a_lost_empty_prompt_is_named(tool, folder, tmp_path, pipelines):
    flags = ("--encode", pipelines["sd"], "--resolution", "16")
    prepare(tool, tmp_path / "out", *flags, folder=folder)
    (tmp_path / "out" / "empty.safetensors").unlink()
    with pytest.raises(SystemExit, match="has lost empty.safetensors"):
        prepare(tool, tmp_path / "out", *flags, folder=folder)


def test_captions_come_later(tool, folder, tmp_path):
    """A folder without captions is refused; the same command works when they are there."""
    texts = {path: path.read_bytes() for path in folder.rglob("*.txt")}
    for path in texts:
        path.unlink()
    with pytest.raises(SystemExit, match=r"error: no usable sample: 7 × no caption \(.*needed: txt, text, caption"):
        prepare(tool, tmp_path / "out", folder=folder)
    for path, text in texts.items():
        path.write_bytes(text)
    assert prepare(tool, tmp_path / "out", folder=folder)["samples"] == 7


def test_secrets(tool, emoji, tmp_path):
    """Credentials of URLs and commands are in no file."""
    write_inputs(tmp_path / "in", emoji, (2,))
    prepare(tool, tmp_path / "out", shards=[f"pipe:cat {tmp_path}/in/0.tar # -H 'Authorization: Bearer s3cret'"])
    assert len(read_all(tmp_path / "out")) == 2
    assert not [path for path in (tmp_path / "out").iterdir() if b"s3cret" in path.read_bytes()]


IN, OUT = "--image_folder photos", "--output_dir out"


@pytest.mark.parametrize(("flags", "message"), [
    (f"{OUT}", "give either --image_folder, --dataset or --train_shards_path_or_url"),
    (f"{IN} --dataset a {OUT}", "give either"),
    (f"{IN} --image_column a {OUT}", "--image_column needs --dataset"),
    (f"{IN} --train_shards_path_or_url a.tar {OUT}", "give either"),
    (f"{IN}", "give --output_dir, or --check"),
    (f"--train_shards_path_or_url a.tar --coco_annotations x {OUT}", "--coco_annotations needs --image_folder"),
    (f"{IN} {OUT} --random_flip", "--random_flip needs --encode"),
    (f"{IN} {OUT} --center_crop", "--center_crop needs"),
    (f"{IN} {OUT} --aspect_ratio_buckets --resolution 500", "is no multiple of --bucket_step"),
    (f"{IN} {OUT} --samples_per_shard 0", "0 does not lie in 1"),
    pytest.param(f"{IN} {OUT} --encode MODEL --mixed_precision fp16", "--mixed_precision fp16 needs a GPU",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    (f"--image_folder nowhere {OUT}", "error: --image_folder nowhere is no folder"),
    (f"--image_folder tars {OUT}", "holds no jpg, jpeg, png, webp but .tar files: --train_shards_path_or_url"),
    (f"{IN} --output_dir photos/0.png", "error: --output_dir photos/0.png cannot be written"),
    (f"{IN} --output_dir tars", "error: --output_dir tars holds shards that are not of this tool"),
    (f"{IN} --coco_annotations nowhere.json {OUT}", "--coco_annotations nowhere.json cannot"),
    (f"--train_shards_path_or_url nowhere.tar {OUT}", "1 of 1 shards do not exist: nowhere.tar"),
    (f"{IN} {OUT} --encode nowhere --single_file_config MODEL", "--single_file_config is for a model that is one"),
    (f"{IN} {OUT} --variant fp16", "--variant needs --encode"),
    (f"{IN} {OUT} --encode nowhere", "error: --encode nowhere cannot be loaded"),
    (f"{IN} {OUT} --encode unet", "error: --encode unet, a FluxPipeline, is no SD 1.x"),
    (f"{IN} {OUT} --resolution 33 --encode MODEL", "error: --resolution 33 must be a multiple"),
    (f"{IN} {OUT} --min_image_size 5000", "error: no usable sample: 7 × below min_image_size"),
])  # fmt: skip
@pytest.mark.usefixtures("folder")
def test_errors(tool, tmp_path, pipelines, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("tars").mkdir()
    write_shard("tars/0.tar", [])
    Path("unet").mkdir()
    Path("unet/model_index.json").write_text('{"_class_name": "FluxPipeline", "text_encoder": ["transformers", "X"]}')
    with pytest.raises(SystemExit) as error:
        run_main(tool, flags.replace("MODEL", pipelines["sd"]).split())
    assert message in f"{error.value} {capsys.readouterr().err}" and "\n" not in str(error.value)
    assert not list(Path().glob("out/*.tar"))


def test_every_flag_is_used():
    text = TOOL.read_text()
    for flag in re.findall(r'add\("--(\w+)"', text):
        assert re.search(rf'args\.{flag}\b|"{flag}"\)|for flag in \([^)]*"{flag}"', text), flag
