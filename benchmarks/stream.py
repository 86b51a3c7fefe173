"""How fast the script's stream reads: samples/s and MB/s per core, beside plain webdataset doing the same work.

    python benchmarks/stream.py --script train_lcm_distill_sd_wds.py [--sides 1024 1024] [--json results/stream.json]

Three levels, each containing the one before: `tar` finds the members of the samples, `decode` makes RGB pictures of
them, `crop` gives resized, cropped uint8 tensors in batches. Both sides run in DataLoader workers, in turn (A B A B); a
core is a worker, as long as there are no more workers than cores. webdataset decodes with PIL at full size.
"""

import argparse
import os
import random
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from common import describe, find, load_script, quartiles, write_result
from material import add_material_args, make_shards
from PIL import Image

LEVELS, BATCH = ("tar", "decode", "crop"), 8


class Reader(torch.utils.data.IterableDataset):
    """Yields, for ever, the number of samples in each chunk that was read (or, at level `crop`, the batch itself)."""

    def __init__(self, script, args, urls, level):
        self.script, self.args, self.urls, self.level = script, args, urls, level

    def __iter__(self):
        return getattr(self, f"read_{self.level}")()

    def chunks(self, samples, decode=lambda _: None):
        for count, sample in enumerate(samples, 1):
            decode(sample)
            if count % BATCH == 0:
                yield torch.tensor(BATCH)


class ScriptReader(Reader):
    def samples(self):
        info = torch.utils.data.get_worker_info()
        urls, read_shard = self.urls[info.id :: info.num_workers], find(self.script, "read_shard")
        while True:
            for url in urls:
                yield from read_shard(url, 60)

    def read_tar(self):
        return self.chunks(self.samples())

    def read_decode(self):
        load, args = find(self.script, "load_image"), self.args
        Image.Image.resize = lambda image, *_, **__: image  # the script's own decoding, without the resize after it
        resample = self.script.INTERPOLATION[args.interpolation_type]
        return self.chunks(self.samples(), lambda sample: load(sample["jpg"], args.resolution, resample))

    def read_crop(self):
        for batch in find(self.script, "ShardStream")(self.urls, self.args):
            yield batch["pixel_values"]


class PlainReader(Reader):
    def pipeline(self):
        return wds.WebDataset(self.urls, shardshuffle=100, empty_check=False).repeat()

    def read_tar(self):
        return self.chunks(self.pipeline())

    def read_decode(self):
        return self.chunks(self.pipeline().decode("pil"))

    def crop(self, image):
        side, scale = self.args.resolution, self.args.resolution / min(image.size)
        image = image.resize([max(side, round(length * scale)) for length in image.size], Image.Resampling.BILINEAR)
        x, y = random.randint(0, image.width - side), random.randint(0, image.height - side)
        return torch.from_numpy(np.array(image.crop((x, y, x + side, y + side))).transpose(2, 0, 1).copy())

    def read_crop(self):
        pipeline = self.pipeline().shuffle(self.args.shuffle_buffer_size).decode("pil").to_tuple("jpg", "txt")
        for images, _ in pipeline.map_tuple(self.crop).batched(
            BATCH, collation_fn=lambda rows: zip(*rows, strict=True)
        ):
            yield torch.stack(list(images))


def measure(reader, workers, seconds):
    """Samples per second that `workers` loader processes give, once each of them has given something."""
    batches = iter(torch.utils.data.DataLoader(reader, batch_size=None, num_workers=workers, prefetch_factor=2))
    for _ in range(3 * workers):
        next(batches)
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        chunk = next(batches)
        count += int(chunk) if chunk.dim() == 0 else len(chunk)
    return count / elapsed


def measure_in_turn(script, args, urls, options):
    """Rates of both sides at every level and number of workers."""
    rows, cores = [], len(os.sched_getaffinity(0))
    for level in LEVELS:
        for workers in options.workers:
            args.dataloader_num_workers = workers
            rates = {ScriptReader: [], PlainReader: []}
            for _ in range(options.rounds):
                for kind, values in rates.items():
                    rate = measure(kind(script, args, urls, level), workers, options.seconds)
                    values.append(rate / min(workers, cores))
            ours, plain = rates.values()
            ratios = quartiles(a / b for a, b in zip(ours, plain, strict=True))
            rows.append({"level": level, "workers": workers, "script": ours, "webdataset": plain, "ratio": ratios})
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--script", default=str(Path(__file__).parents[1] / "train_lcm_distill_sd_wds.py"))
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--workers", type=int, nargs="+", default=(1, 2, 4))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--json", help="where to write the numbers, and beside them the table as .md")
    add_material_args(parser)
    parser.set_defaults(sides=(1024, 1024))
    options = parser.parse_args(argv)
    script = load_script(options.script)
    with tempfile.TemporaryDirectory() as folder:
        urls = wds.shardlists.expand_urls(make_shards(options.material or folder, *options.shards, options.sides))
        sizes = [member.size for url in urls for member in tarfile.open(url) if member.name.endswith(".jpg")]
        flags = ["--pretrained_teacher_model", "none", "--train_shards_path_or_url", *urls, "--resolution",
                 options.resolution, "--train_batch_size", BATCH, "--shuffle_buffer_size", 24]  # fmt: skip
        args = find(script, "parse_args")([str(flag) for flag in flags])
        rows = measure_in_turn(script, args, urls, options)
    megabytes = sum(sizes) / len(sizes) / 1e6
    lines = [f"{len(sizes)} JPEGs of {megabytes * 1000:.0f} kB, shorter side {options.sides[0]} to {options.sides[1]}, "
             f"cropped to {options.resolution} px; samples/s (MB/s) per core",
             f"{'level':8}{'workers':>8}{'script':>18}{'webdataset':>18}{'ratio':>8}  quartiles"]  # fmt: skip
    for row in rows:
        rates = (quartiles(row[side])[0] for side in ("script", "webdataset"))
        cells = "".join(f"{rate:9.0f} ({rate * megabytes:6.1f})" for rate in rates)
        median, low, high = row["ratio"]
        lines.append(f"{row['level']:8}{row['workers']:8}{cells}{median:8.2f}  {low:.2f} … {high:.2f}")
    result = {**describe(options.script), "sides": options.sides, "resolution": options.resolution,
              "megabytes_per_sample": megabytes, "rows": rows}  # fmt: skip
    write_result(options.json, result, "\n".join(lines))
    return result


if __name__ == "__main__":
    main()
