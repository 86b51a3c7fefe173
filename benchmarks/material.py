"""The inputs of the benchmarks: a random-weight pipeline and tar shards of JPEGs with photographs' statistics.

python benchmarks/material.py FOLDER --scale sd15
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pipelines import SCALES, make_pipeline, settle


def fractal(rng, side, exponent):
    """A periodic field whose amplitude falls with frequency as f^-exponent, as in photographs; unit variance."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]).astype(np.float32)
    frequency[0, 0] = np.inf
    white = np.fft.rfft2(rng.standard_normal((side, side), dtype=np.float32))
    field = np.fft.irfft2(white * frequency**-exponent, (side, side))
    return field / field.std()


def make_photographs(count, sides, seed=0):
    """Yields JPEGs whose shorter side lies within `sides`: fractal texture, sharp edges, quality 85 to 95."""
    rng = np.random.default_rng(seed)
    luma, *chroma = (fractal(rng, 2048, exponent) for exponent in (1.25, 1.4, 1.4))
    planes = [128 + 48 * luma, 128 + 14 * chroma[0], 128 + 14 * chroma[1]]
    canvas = Image.merge("YCbCr", [Image.fromarray(p.clip(0, 255).astype(np.uint8)) for p in planes]).convert("RGB")
    for _ in range(count):
        short = int(rng.integers(sides[0], sides[1] + 1))
        size = [short, min(1536, round(short * rng.choice([1, 5 / 4, 4 / 3, 3 / 2])))][:: rng.choice([1, -1])]
        layers = []
        for _ in range(6):
            x, y = (int(rng.integers(2048 - side + 1)) for side in size)
            shift = np.arange(256) + rng.integers(-60, 60)
            layer = canvas.crop((x, y, x + size[0], y + size[1]))
            layers.append(layer.point(np.tile(shift.clip(0, 255), 3).tolist()))
        for layer in layers[1:]:
            mask, corners = Image.new("L", size), rng.uniform(-0.1, 1.1, (rng.integers(3, 7), 2)) * size
            ImageDraw.Draw(mask).polygon([tuple(corner) for corner in corners], 255)
            layers[0].paste(layer, mask=mask)
        file = io.BytesIO()
        layers[0].save(file, "JPEG", quality=int(rng.integers(85, 96)))
        yield file.getvalue(), size


def make_shard(path, images, sides, seed):
    """Writes a tar of `images` samples: jpg, txt, json."""
    words = "a of red old small tower river portrait light morning painting photo dog street garden blue".split()
    rng = np.random.default_rng(seed)
    with tarfile.open(path, "w") as tar:
        for sample, (data, (width, height)) in enumerate(make_photographs(images, sides, seed)):
            info = {"original_width": width, "original_height": height, "pwatermark": 0.1}
            members = {"jpg": data, "txt": " ".join(rng.choice(words, 12)).encode(), "json": json.dumps(info).encode()}
            for name, content in members.items():
                member = tarfile.TarInfo(f"{seed:05}{sample:04}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def shard_folder(folder, shards, images, sides):
    return Path(folder, "shards-{}x{}-{}-{}".format(shards, images, *sides))


def make_shards(folder, shards, images, sides):
    """Writes `shards` tars of `images` samples each, unless they are there, and returns their brace pattern."""
    final = shard_folder(folder, shards, images, sides)
    if not final.is_dir():
        temporary = final.with_name(f"unfinished-{os.getpid()}")
        temporary.mkdir(parents=True)
        with ProcessPoolExecutor(min(shards, os.cpu_count())) as pool:
            paths = [temporary / f"{shard:05}.tar" for shard in range(shards)]
            list(pool.map(make_shard, paths, [images] * shards, [sides] * shards, range(shards)))
        settle(temporary, final)
    return str(final / ("{00000..%05d}.tar" % (shards - 1)))


def make_material(folder, scale, shards, sides):
    """Pipeline and shards, made where they are missing, in a process of their own: out of this one's memory."""
    if not (Path(folder, f"pipeline-{scale}").is_dir() and shard_folder(folder, *shards, sides).is_dir()):
        command = [sys.executable, __file__, folder, "--scale", scale, "--shards", *shards, "--sides", *sides]
        subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    return make_pipeline(folder, scale), make_shards(folder, *shards, sides)


def encode_shards(folder, scale, resolution, shards, sides, mixed_precision):
    """What tools/prepare_shards.py encodes of the shards, unless it is there; returns its brace pattern."""
    plain = make_shards(folder, *shards, sides)
    output = Path(folder, f"{Path(plain).parent.name}-encoded-{scale}-{mixed_precision}")
    tool = Path(__file__).resolve().parents[1] / "tools" / "prepare_shards.py"
    command = [sys.executable, tool, "--train_shards_path_or_url", plain, "--output_dir", output, "--center_crop",
               "--encode", Path(folder, f"pipeline-{scale}"), "--resolution", resolution,
               "--mixed_precision", mixed_precision]  # fmt: skip
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return str(output / Path(plain).name)


def add_material_args(parser):
    parser.add_argument("--shards", type=int, nargs=2, default=(8, 24), metavar=("SHARDS", "IMAGES"))
    parser.add_argument("--sides", type=int, nargs=2, default=(512, 1024), help="range of the pictures' shorter side")
    parser.add_argument("--material", help="folder that keeps what was made for the next run")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--scale", choices=SCALES, default="small")
    add_material_args(parser)
    options = parser.parse_args()
    print(make_shards(options.folder, *options.shards, options.sides))  # first: it forks, before torch has threads
    print(make_pipeline(options.folder, options.scale))
