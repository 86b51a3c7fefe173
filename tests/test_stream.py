"""The shard stream: order, exact and elastic resume, what becomes of odd and hostile samples, start-up errors."""

import contextlib
import copy
import functools
import http.server
import io
import itertools
import json
import logging
import pickle
import random
import shutil
import socket
import threading
import time
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import image_bytes, make_shards, tiny_args, write_shard
from PIL import Image, ImageFile

# the machine of a test may have fewer cores than there are loader workers
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
BILINEAR = Image.Resampling.BILINEAR
COUNT = 21  # samples in the `shards` fixture: 7 + 5 + 9
needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="webdataset opens http URLs with curl")


@functools.cache
def parse(lcm, *flags):
    return lcm.parse_args(tiny_args("teacher", "shards", "output", *flags))


def make_args(lcm, *flags):
    return copy.copy(parse(lcm, *map(str, flags)))


@pytest.fixture(scope="session")
def urls(lcm, shards):
    return lcm.expand_shards([shards])


class Fleet:
    """The readers of all ranks of a run, in one process, and its state as save_checkpoint writes it."""

    def __init__(self, lcm, urls, world=1, workers=0, *flags, state=None, shapes=None):
        self.lcm, args = lcm, make_args(lcm, "--dataloader_num_workers", workers, *flags)
        streams = [lcm.ShardStream(urls, args, rank, world, state, shapes) for rank in range(world)]
        self.readers = [lcm.BatchReader(stream, torch.device("cpu")) for stream in streams]

    def step(self):
        """One batch of every rank."""
        return [reader.next_batch() for reader in self.readers]

    def state(self):
        cursors = [cursor for reader in self.readers for cursor in reader.cursors]
        state = {**self.readers[0].stream.state, "cursors": cursors, "turn": self.readers[0].turn}
        return json.loads(json.dumps(state))

    def epoch(self, batch):
        """Where the batch's last sample stands."""
        stream = self.readers[0].stream
        return self.lcm.stream_item(stream.state, batch["cursor"][0])[0] // len(stream.urls)

    def captions_before(self, epoch, steps=200):
        """Captions up to the end of the epoch before this one. For batches of a single sample."""
        workers = {
            (rank, worker) for rank, reader in enumerate(self.readers) for worker in range(reader.stream.num_workers)
        }
        captions, ahead = [], set()
        for _ in range(steps):
            for rank, batch in enumerate(self.step()):
                if self.epoch(batch) < epoch:
                    captions += batch["captions"]
                else:
                    ahead.add((rank, batch["worker"]))
            if ahead == workers:
                return captions
        raise AssertionError(f"epoch {epoch} not reached in {steps} steps")


def numbers(count=COUNT):
    return [str(number) for number in range(count)]


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch["captions"] == other["captions"] and batch["cursor"] == other["cursor"]
        assert torch.equal(batch["pixel_values"], other["pixel_values"])


# ---------------------------------------------------------------------------------------------------------- order

FLEETS = [
    (1, 0),
    (2, 0),
    (5, 0),
    (1, 1),
    (1, 3),
    (2, 2),
]  # (processes, loader workers); 5 are more than there are shards


@pytest.mark.parametrize("world, workers", FLEETS)
def test_every_sample_exactly_once_an_epoch_over_all_ranks_and_workers(lcm, urls, world, workers):
    found = Fleet(lcm, urls, world, workers, "--train_batch_size", 1).captions_before(2)
    assert Counter(found) == Counter(numbers() * 2)


def test_batches_hold_uint8_pixels_and_captions(lcm, urls):
    (batch,) = Fleet(lcm, urls, 1, 0, "--train_batch_size", 3).step()
    assert batch["pixel_values"].shape == (3, 3, 16, 16) and batch["pixel_values"].dtype == torch.uint8
    assert len(set(batch["captions"])) == 3
    for pixels, caption in zip(batch["pixel_values"].permute(0, 2, 3, 1).numpy(), batch["captions"], strict=True):
        image = np.asarray(Image.open(io.BytesIO(image_bytes(int(caption)))))
        assert any(np.array_equal(pixels, image[:, x : x + 16]) for x in range(5))


def read_epochs(lcm, urls, *flags, epochs=3):
    """A list a epoch of (caption, pixels), in order."""
    fleet, found = Fleet(lcm, urls, 1, 0, "--train_batch_size", 1, *flags), [[] for _ in range(epochs)]
    for _ in range(epochs * COUNT):
        (batch,) = fleet.step()
        found[fleet.epoch(batch)].append((batch["captions"][0], batch["pixel_values"][0].numpy().tobytes()))
    return found


def test_the_seed_decides_order_and_crops_and_every_epoch_has_its_own(lcm, urls):
    found, again = read_epochs(lcm, urls), read_epochs(lcm, urls)
    assert found == again
    for one, other in [(found[0], found[1]), (found[1], found[2]), (found[0], read_epochs(lcm, urls, "--seed", 1)[0])]:
        assert [caption for caption, _ in one] != [caption for caption, _ in other]
        pixels = dict(one), dict(other)
        assert sum(pixels[0][caption] != pixels[1][caption] for caption in numbers()) > COUNT // 2  # 1 in 5 by chance


def test_shards_are_permuted_and_their_samples_cropped_anew_in_every_epoch(lcm, tmp_path):
    urls = lcm.expand_shards([make_shards(tmp_path, [1] * 8)])
    fleet = Fleet(lcm, urls, 1, 0, "--train_batch_size", 8)
    epochs = [fleet.step()[0] for _ in range(5)]
    assert len({*(tuple(epoch["captions"]) for epoch in epochs), tuple(numbers(8))}) == 6
    views = {(caption, pixels.numpy().tobytes()) for epoch in epochs
             for caption, pixels in zip(epoch["captions"], epoch["pixel_values"], strict=True)}  # fmt: skip
    assert len(views) > 20  # each of eight samples has five possible crops, and was cropped five times


def test_a_smaller_buffer_shuffles_less(lcm):
    displacement = {}
    for size in (1, 10, 1000):
        found = list(lcm.shuffled(range(200), size, random.Random(0)))
        assert sorted(found) == list(range(200))
        displacement[size] = np.mean([abs(index - number) for index, number in enumerate(found)])
    assert displacement[1] == 0 and 2 < displacement[10] < 20 < displacement[1000]


def test_shuffling_reads_no_further_than_its_buffer(lcm):
    source = iter(range(100))
    next(lcm.shuffled(source, 10, random.Random(0)))
    assert next(source) == 10


# ---------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("world, workers, every", [(1, 0, 1), (2, 0, 1), (5, 0, 1), (1, 3, 4), (2, 2, 5)])
def test_resume_from_every_position_gives_the_very_batches(lcm, urls, world, workers, every):
    fleet, states, batches = Fleet(lcm, urls, world, workers), [], []
    for _ in range(22):  # two epochs of 21 samples
        states.append(fleet.state())
        batches.append(fleet.step())
    for position in range(0, 22, every):
        resumed = Fleet(lcm, urls, world, workers, state=states[position])
        for exact in batches[position : position + 6]:
            assert_same(resumed.step(), exact)


def test_resume_is_exact_in_batches_that_cross_shards_and_twice_in_a_row(lcm, urls):
    flags = ("--train_batch_size", 4, "--random_flip", "--proportion_empty_prompts", 0.3)
    fleet, resumed, state = Fleet(lcm, urls, 2, 0, *flags), None, None
    for _ in range(12):
        resumed = Fleet(lcm, urls, 2, 0, *flags, state=state)
        assert_same(resumed.step(), fleet.step())
        state = resumed.state()


@pytest.mark.parametrize("batch", [1, 3])
def test_elastic_resume_repeats_and_loses_no_sample(lcm, urls, batch):
    """From several positions to other numbers of workers, and from there once more: each sample twice in two epochs."""
    for first, second, third in [(1, 2, 1), (2, 1, 3), (3, 5, 2), (2, 3, 2), (5, 2, 4)]:
        for position, later in itertools.product((1, 3, 4, 7), (0, 2)):
            used, state = [], None
            for world, steps in [(first, position), (second, later)]:
                fleet = Fleet(lcm, urls, world, 0, "--train_batch_size", batch, state=state)
                used += [caption for _ in range(steps) for found in fleet.step() for caption in found["captions"]]
                state = fleet.state()
            epochs = 2 + len(used) // COUNT + 1  # beyond whatever has been read
            used += Fleet(lcm, urls, third, 0, "--train_batch_size", 1, state=state).captions_before(epochs)
            assert Counter(used) == Counter(numbers() * epochs), (first, second, third, position, later)


def test_elastic_resume_between_loader_workers_says_so(lcm, urls, caplog):
    fleet = Fleet(lcm, urls, 1, 3, "--train_batch_size", 1)
    used = [caption for _ in range(7) for batch in fleet.step() for caption in batch["captions"]]
    with caplog.at_level(logging.WARNING):
        resumed = Fleet(lcm, urls, 1, 0, "--train_batch_size", 1, state=fleet.state())
    assert "no sample is repeated or lost" in caplog.text
    assert Counter(used + resumed.captions_before(2)) == Counter(numbers() * 2)


def test_resume_decodes_nothing_of_what_it_skips(lcm, urls, monkeypatch):
    fleet, decode, calls = Fleet(lcm, urls), lcm.decode_sample, []
    for _ in range(8):
        fleet.step()
    monkeypatch.setattr(lcm, "decode_sample", lambda *given: calls.append(given) or decode(*given))
    resumed = Fleet(lcm, urls, state=fleet.state())
    assert_same(resumed.step(), fleet.step())
    assert len(calls) == 4  # a batch of two from either


# ---------------------------------------------------------------------------------------- captions, crops, filters


def decode(lcm, sample, *flags, seed=0):
    """Pixels and caption of a sample; it has an image unless it brings one."""
    sample = {"__key__": "key", "png": image_bytes(), **sample}
    return tuple(lcm.decode_sample(sample, make_args(lcm, *flags), random.Random(seed)).values())


@pytest.mark.parametrize(
    "members, caption",
    [
        ({"txt": b"a fox"}, "a fox"),
        ({"text": b" a fox\n"}, "a fox"),
        ({"caption": "ein Füchslein 🦊".encode()}, "ein Füchslein 🦊"),
        ({"json": b'{"caption": "a fox"}'}, "a fox"),
        ({"json": b'{"text": "a fox"}'}, "a fox"),
        ({"json": b'{"caption": ["a fox"]}'}, "a fox"),
        ({"json": b'{"captions": ["a fox"], "url": "x"}'}, "a fox"),
        ({"json": b'{"caption": "a cat"}', "txt": b"a fox"}, "a fox"),
        ({"json": b'{"caption": 7}'}, "7"),
        ({"json": b'{"caption": null, "text": "a fox"}'}, "a fox"),
        ({"json": b'{"caption": "a\\ud800b"}'}, "a?b"),  # half a surrogate pair, which no tokenizer takes
        ({"json": b'{"caption": ""}'}, ""),
        ({"txt": b""}, ""),
        ({"txt": b"caf\xe9"}, "caf�"),  # Latin-1
        ({"txt": b"a fox", "json": b"{broken"}, "a fox"),
        ({"txt": b"a fox", "json": b"[1, 2]"}, "a fox"),
        ({"txt": b"a fox", "json": b"\xff\xfe"}, "a fox"),
        ({"txt": b"a fox", "json": b"[" * 100_000}, "a fox"),
        ({"txt": b"a fox", "json": b'{"width": ' + b"9" * 6000 + b"}"}, "a fox"),
    ],
)
def test_caption_is_found(lcm, members, caption):
    assert decode(lcm, members)[1] == caption


@pytest.mark.parametrize(
    "members", [{"json": b'{"caption": ["a", "b", "c"]}'}, {"txt": b"a", "text": b"b", "caption": b"c"}]
)
def test_one_of_several_captions_at_random(lcm, members):
    counts = Counter(decode(lcm, members, seed=seed)[1] for seed in range(300))
    assert set(counts) == {"a", "b", "c"} and min(counts.values()) > 70


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_share_of_empty_prompts(lcm, share):
    found = [decode(lcm, {"txt": b"a"}, "--proportion_empty_prompts", share, seed=seed)[1] for seed in range(500)]
    assert found.count("") / 500 == pytest.approx(share, abs=0.05 if 0 < share < 1 else 0)


def test_crops_are_random_or_of_the_centre_and_half_are_mirrored(lcm):
    image = np.asarray(Image.open(io.BytesIO(image_bytes()))).transpose(2, 0, 1)  # 20 × 16
    crops = {(x, is_mirrored): image[:, :, x : x + 16][:, :, :: -1 if is_mirrored else 1]
             for x in range(5) for is_mirrored in (False, True)}  # fmt: skip
    known = {crop.tobytes(): place for place, crop in crops.items()}

    def places(*flags):
        return [known[decode(lcm, {"txt": b"a"}, *flags, seed=seed)[0].numpy().tobytes()] for seed in range(100)]

    assert set(places()) == {(x, False) for x in range(5)}
    assert set(places("--center_crop")) == {(2, False)}
    counts = Counter(places("--center_crop", "--random_flip"))
    assert set(counts) == {(2, False), (2, True)} and min(counts.values()) > 35


@pytest.mark.parametrize(
    "info, flags, reason",
    [
        ({"original_width": 299, "original_height": 400}, ("--min_image_size", 300), "below min_image_size"),
        ({"original_width": 400, "original_height": 299}, ("--min_image_size", 300), "below min_image_size"),
        ({"original_width": 300, "original_height": 300}, ("--min_image_size", 300), None),
        ({"width": 299, "height": 300}, ("--min_image_size", 300), "below min_image_size"),
        ({"WIDTH": 299, "HEIGHT": 300}, ("--min_image_size", 300), "below min_image_size"),
        # LAION: width is that of the stored, smaller image
        ({"original_width": 400, "original_height": 400, "width": 256, "height": 256}, ("--min_image_size", 300), None),
        ({"width": 256}, ("--min_image_size", 0), None),
        ({}, ("--min_image_size", 300), None),
        ({"original_width": None, "height": "12"}, ("--min_image_size", 300), None),
        ({"pwatermark": 0.51}, (), "above max_pwatermark"),
        ({"pwatermark": 0.5}, (), None),
        ({"pwatermark": 0.4}, ("--max_pwatermark", 0.3), "above max_pwatermark"),
        ({"pwatermark": None}, ("--max_pwatermark", 0), None),
        ({"pwatermark": "0.9"}, ("--max_pwatermark", 0), None),
        ({}, ("--max_pwatermark", 0), None),
    ],
)
def test_filters_reject_by_numbers_and_never_for_missing_ones(lcm, info, flags, reason):
    sample = {"txt": b"a", "json": json.dumps(info).encode()}
    with pytest.raises(lcm.BadSample, match=reason) if reason else contextlib.nullcontext():
        assert decode(lcm, sample, *flags)[1] == "a"


# ----------------------------------------------------------------------------------------------------------- images


def encode(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def load(lcm, data, resolution):
    image, size = lcm.load_image(data, resolution, BILINEAR)
    assert image.mode == "RGB"
    return np.asarray(image), size


def noise(width, height, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def photograph(width, height):
    """Smooth colours with some detail, as a JPEG holds well."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    planes = [np.sin(9 * x + 4 * y), np.cos(7 * y * x), np.sin(20 * x) * np.cos(15 * y)]
    return Image.fromarray((np.stack(planes, axis=-1) * 110 + 128).astype(np.uint8))


@pytest.mark.parametrize(
    "orientation, upright",
    [(1, lambda x: x), (2, np.fliplr), (3, lambda x: np.rot90(x, 2)), (6, lambda x: np.rot90(x, -1)), (8, np.rot90)],
)
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exif_orientation_is_respected(lcm, orientation, upright, kind):
    exif, pixels = Image.Exif(), noise(24, 16)
    exif[0x0112] = orientation
    data = encode(Image.fromarray(pixels), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    found, size = load(lcm, data, 16)
    assert size == upright(pixels).shape[1::-1]
    assert np.array_equal(found, upright(pixels))


def test_rotated_jpeg_that_is_decoded_at_reduced_size(lcm):
    exif, image = Image.Exif(), photograph(1023, 511)
    exif[0x0112] = 6
    found, size = load(lcm, encode(image, "JPEG", quality=95, exif=exif), 64)
    exact = np.rot90(np.asarray(image.resize((128, 64), BILINEAR)), -1)
    assert size == (511, 1023) and found.shape == (128, 64, 3)
    assert np.abs(found.astype(int) - exact).mean() < 2


def solid(mode, value, size=(16, 16)):
    return Image.new(mode, size, value)


def palette():
    image = solid("P", 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.paste(0, (0, 0, 8, 16))
    return encode(image, transparency=0)


@pytest.mark.parametrize(
    "data, left, right",  # the colours of the left and the right half
    [
        (encode(solid("L", 77)), (77,) * 3, (77,) * 3),
        (encode(solid("1", 1)), (255,) * 3, (255,) * 3),
        (encode(solid("LA", (0, 128))), (127,) * 3, (127,) * 3),
        (encode(solid("RGBA", (255, 0, 0, 0))), (255,) * 3, (255,) * 3),
        (encode(solid("RGBA", (200, 0, 0, 51))), (244, 204, 204), (244, 204, 204)),
        (encode(solid("RGBA", (200, 0, 0, 255)), "WEBP", lossless=True), (200, 0, 0), (200, 0, 0)),
        (palette(), (255, 255, 255), (200, 100, 50)),
        (encode(solid("RGB", (9, 8, 7)), transparency=(9, 8, 7)), (255,) * 3, (255,) * 3),
        (encode(Image.fromarray(np.repeat([[200 * 257, 65535]], 16, 0).repeat(8, 1).astype(np.uint16))),
         (200,) * 3, (255,) * 3),
    ],
    ids=["L", "1", "LA", "RGBA", "RGBA-20%", "RGBA-WEBP", "P", "RGB-transparency", "16-bit"],
)  # fmt: skip
def test_modes_become_rgb_over_white(lcm, data, left, right):
    found, _ = load(lcm, data, 16)
    assert {tuple(pixel) for pixel in found[:, :8].reshape(-1, 3).tolist()} == {left}
    assert {tuple(pixel) for pixel in found[:, 8:].reshape(-1, 3).tolist()} == {right}


@pytest.mark.parametrize("cmyk, rgb", [((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 128), (127, 127, 127))])
def test_cmyk_jpeg(lcm, cmyk, rgb):
    found, _ = load(lcm, encode(solid("CMYK", cmyk), "JPEG", quality=100, subsampling=0), 16)
    assert np.abs(found.astype(int) - rgb).max() <= 2


@pytest.mark.parametrize("options", [{"progressive": True}, {"optimize": True}, {"subsampling": 0}])
def test_kinds_of_jpeg(lcm, options):
    image = photograph(96, 64)
    found, size = load(lcm, encode(image, "JPEG", quality=95, **options), 64)
    assert size == (96, 64) and np.abs(found.astype(int) - np.asarray(image)).mean() < 2


@pytest.mark.parametrize("size", [(127, 128), (128, 127), (255, 256)])
def test_size_of_an_almost_square_jpeg(lcm, size):
    """At half its size it is square: that says nothing of how it lay."""
    assert load(lcm, encode(photograph(*size), "JPEG"), 32)[1] == size


@pytest.mark.parametrize("size, shape", [((128, 171), (64, 86)), ((173, 128), (87, 64)), ((193, 130), (97, 65))])
def test_jpegs_decoded_at_half_size_are_not_resized_where_that_fits(lcm, size, shape):
    """An odd longer side rounds up in the decoder; neither that nor rounding may cost a full decode or a resize."""
    data, resolution = encode(photograph(*size), "JPEG", quality=95), min(shape)
    with Image.open(io.BytesIO(data)) as halved:
        halved.draft(None, (resolution, resolution))
        assert halved.size == shape
        expected = np.asarray(halved.convert("RGB"))
    found, original = load(lcm, data, resolution)
    assert original == size and np.array_equal(found, expected)


def test_first_frame_of_an_animation(lcm):
    frames = [solid("RGB", colour) for colour in ("red", "blue")]
    for kind in ("WEBP", "PNG", "MPO"):
        found, _ = load(lcm, encode(frames[0], kind, save_all=True, append_images=frames[1:]), 16)
        assert np.abs(found.astype(int) - [255, 0, 0]).max() <= 3, kind


def test_thin_and_small_images_are_enlarged_to_the_resolution(lcm):
    for size, resized in {(1, 40): (16, 640), (40, 1): (640, 16), (1, 1): (16, 16), (3, 5): (16, 27)}.items():
        found, original = load(lcm, encode(solid("RGB", (7, 8, 9), size)), 16)
        assert original == size and found.shape == (*resized[::-1], 3)
        assert (found == [7, 8, 9]).all()
    assert decode(lcm, {"png": encode(solid("L", 5, (1, 40))), "txt": b"a"})[0].shape == (3, 16, 16)


def test_resize_keeps_the_aspect_and_uses_the_filter(lcm):
    image = Image.fromarray(noise(61, 40))
    for name in ("bilinear", "bicubic", "lanczos", "nearest"):
        found, _ = lcm.load_image(encode(image), 20, lcm.INTERPOLATION[name])
        exact = image.resize((30, 20), Image.Resampling[name.upper()])
        assert np.array_equal(np.asarray(found), np.asarray(exact)), name


@pytest.mark.parametrize(
    "side, resolution, decoded", [(1024, 128, 128), (1024, 200, 256), (1000, 128, 250), (300, 256, 300)]
)
def test_large_jpeg_is_decoded_at_reduced_size_and_looks_the_same(lcm, monkeypatch, side, resolution, decoded):
    image, sizes = photograph(side * 3 // 2, side), []
    load_pixels = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: sizes.append(self.size) or load_pixels(self))
    found, size = load(lcm, encode(image, "JPEG", quality=95), resolution)
    assert min(sizes[0]) == decoded and size == image.size
    exact = np.asarray(image.resize((round(image.width * resolution / side), resolution), BILINEAR))
    assert found.shape == exact.shape and np.abs(found.astype(int) - exact).mean() < 2


# ------------------------------------------------------------------------------------------------------ bad samples

PNG, JPEG = image_bytes(), encode(photograph(64, 48), "JPEG")


def outcome(lcm, url, *flags):
    """Captions of the usable samples of a shard, and the others by reason."""
    captions, reasons, args = [], Counter(), make_args(lcm, *flags)
    for sample in lcm.read_shard(str(url), args.shard_timeout):
        try:
            captions.append(lcm.decode_sample(sample, args, random.Random(0))["captions"])
        except lcm.BadSample as bad:
            reasons[bad.args[0]] += 1
    return captions, dict(reasons)


def bomb(width, height):
    """A PNG whose header promises far more pixels than there are bytes."""
    data = bytearray(encode(solid("1", 0)))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


CASES = {
    "truncated JPEG": ([("0.jpg", JPEG[: len(JPEG) // 2]), ("0.txt", b"a")], [], {"broken image": 1}),
    "truncated PNG": ([("0.png", PNG[: len(PNG) // 2]), ("0.txt", b"a")], [], {"broken image": 1}),
    "zero bytes": ([("0.jpg", b""), ("0.txt", b"a")], [], {"broken image": 1}),
    "garbage": ([("0.jpg", b"<html>404</html>"), ("0.txt", b"a")], [], {"broken image": 1}),
    "another format": ([("0.png", encode(solid("L", 0), "GIF")), ("0.txt", b"a")], [], {"broken image": 1}),
    "wrong extension": ([("0.jpg", PNG), ("0.txt", b"a")], ["a"], {}),
    "upper case": ([("0.PNG", PNG), ("0.TXT", b"a")], ["a"], {}),
    "large": ([("0.png", bomb(9000, 9000)), ("0.txt", b"a")], [], {"image too large": 1}),
    "thin": ([("0.png", encode(solid("L", 0, (1, 300_000)))), ("0.txt", b"a")], [], {"image too large": 1}),
    "no caption": ([("0.png", PNG)], [], {"no caption": 1}),
    "no caption in the JSON": ([("0.png", PNG), ("0.json", b'{"caption": []}')], [], {"no caption": 1}),
    "no image": ([("0.txt", b"a")], [], {"no image": 1}),
    "broken JSON": ([("0.png", PNG), ("0.txt", b"a"), ("0.json", b'{"a":')], ["a"], {}),
    "caption not UTF-8": ([("0.png", PNG), ("0.txt", b"caf\xe9")], ["caf�"], {}),
    "empty caption": ([("0.png", PNG), ("0.txt", b"")], [""], {}),
    "duplicate": ([("0.png", PNG), ("0.txt", b"a"), ("0.txt", b"b")], ["a"], {"duplicate member": 1}),
    "unknown": ([("0.png", PNG), ("0.xyz", b"?"), ("0.txt", b"a"), ("README", b"?"), ("0", b"?")], ["a"], {}),
    "hidden": ([("._0.png", b"?"), ("__meta__/0.png", b"?"), ("0.png", PNG), ("0.txt", b"a")], ["a"], {}),
    "macOS": ([("a/._0.png", b"?"), ("a/0.png", PNG), ("a/._0.txt", b"?"), ("a/0.txt", b"a")], ["a"], {}),
    "folders": ([("a/0.png", PNG), ("a/0.txt", b"a"), ("b/0.png", PNG), ("b/0.txt", b"b")], ["a", "b"], {}),
    "longer keys": ([("0.png", PNG), ("0.txt", b"a"), ("0.seg.png", b"?"), ("0.alt.txt", b"?")], ["a"], {}),
    "no member": ([], [], {}),
}


@pytest.mark.parametrize("name", CASES)
def test_odd_samples_are_used_or_skipped_by_reason_and_the_next_is_read(lcm, tmp_path, name):
    members, captions, reasons = CASES[name]
    shard = write_shard(tmp_path / "0.tar", [*members, ("next.png", PNG), ("next.txt", b"next")])
    assert outcome(lcm, shard) == ([*captions, "next"], reasons)


def test_a_decompression_bomb_is_skipped_before_it_is_decoded(lcm):
    for side, reason in [(9000, "image too large"), (30_000, "broken image|image too large")]:
        start = time.perf_counter()
        with pytest.raises(lcm.BadSample, match=reason):
            lcm.load_image(bomb(side, side), 16, BILINEAR)
        assert time.perf_counter() - start < 10  # a second, if it were not a busy machine


def test_skipped_samples_are_counted_by_the_reader_and_named_once(lcm, tmp_path, caplog):
    members = [("0.jpg", JPEG[:200]), ("0.txt", b"a"), ("1.jpg", b""), ("1.txt", b"b"), ("2.txt", b"c"),
               ("3.png", PNG), ("3.txt", b"d"), ("4.png", PNG), ("4.txt", b"e")]  # fmt: skip
    fleet = Fleet(lcm, [write_shard(tmp_path / "0.tar", members)], 1, 0, "--train_batch_size", 1)
    with caplog.at_level(logging.WARNING):
        captions = [fleet.step()[0]["captions"][0] for _ in range(13)]  # ends in the seventh epoch
    skipped = fleet.readers[0].skipped
    assert sorted(captions[:12]) == ["d"] * 6 + ["e"] * 6
    assert 12 <= skipped["broken image"] <= 14 and 6 <= skipped["no image"] <= 7 and len(skipped) == 2
    assert caplog.text.count("broken image") == caplog.text.count("no image") == 1


@pytest.mark.parametrize("size", [0, 100, 700, 5000, 9000])
def test_a_shard_cut_off_gives_its_whole_samples_and_a_fault(lcm, tmp_path, size):
    make_shards(tmp_path, [5])
    shard = tmp_path / "00000.tar"
    shard.write_bytes(shard.read_bytes()[:size])
    whole = max(0, size // 4096 - 1)  # a sample is whole when the next one begins
    assert outcome(lcm, shard) == (numbers(5)[:whole], {"unreadable shard": 1})


def test_an_empty_shard_is_no_fault(lcm, tmp_path):
    assert outcome(lcm, write_shard(tmp_path / "0.tar", [])) == ([], {})


def test_what_is_no_tar_is_a_fault(lcm, tmp_path):
    (tmp_path / "0.tar").write_bytes(b"<html>404</html>" * 100)
    assert outcome(lcm, tmp_path / "0.tar") == ([], {"unreadable shard": 1})


def test_a_shard_that_goes_missing_in_mid_run_is_counted_and_the_run_goes_on(lcm, tmp_path):
    urls = lcm.expand_shards([make_shards(tmp_path, [4, 4, 4])])
    fleet = Fleet(lcm, urls, 1, 0, "--train_batch_size", 1)
    fleet.step()
    Path(urls[1]).unlink()
    found = Counter(fleet.step()[0]["captions"][0] for _ in range(40))
    assert set(numbers(4)) | {"8", "9", "10", "11"} <= set(found)
    assert fleet.readers[0].skipped["unreadable shard"] >= 3


class Payload:
    """Creates a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_hostile_members_are_neither_run_nor_read(lcm, tmp_path):
    mark = tmp_path / "mark"
    bait = pickle.dumps(Payload(mark))
    pickle.loads(bait)
    assert mark.exists()  # the payload works
    mark.unlink()
    kinds = "pyd pkl pickle pth pt npy npz ten cbor mp tenbin msg py sh cls index inx id json.pkl".split()
    members = [("0.png", PNG), ("0.txt", b"a"), *((f"0.{kind}", bait) for kind in kinds)]
    # and where a member of such a kind is expected to be an image, a text or JSON
    members += [(f"1.{kind}", bait) for kind in ("jpg", "txt", "json")]
    members += [("2.webp", PNG), ("2.caption", bait), ("2.json", bait)]
    shard = write_shard(tmp_path / "0.tar", members)
    fleet = Fleet(lcm, [shard], 1, 1, "--train_batch_size", 2)
    assert {"a"} < {caption for _ in range(2) for caption in fleet.step()[0]["captions"]}
    assert not mark.exists()
    members = [{name for name in sample if name[0] != "_"} for sample in lcm.read_shard(shard, 5)]
    assert members == [{"png", "txt"}, {"jpg", "txt", "json"}, {"webp", "caption", "json"}]


@pytest.mark.parametrize("bad, flags", [(3, ()), (3, ("--max_bad_samples", 0.7)), (1, ("--max_bad_samples", 0.2))])
def test_too_many_bad_samples_end_the_run_with_the_reasons(lcm, tmp_path, bad, flags):
    members = [("0.png", PNG), ("0.txt", b"a"), ("9.txt", b"no image")]
    members += [member for i in range(1, bad) for member in ((f"{i}.png", b"?"), (f"{i}.txt", b"a"))]
    members += [member for i in range(bad + 1, 4) for member in ((f"{i}.png", PNG), (f"{i}.txt", b"a"))]
    fleet = Fleet(lcm, [write_shard(tmp_path / "0.tar", members)], 1, 0, *flags)
    with pytest.raises(SystemExit, match="--max_bad_samples.*× (no|broken) image") as error:
        for _ in range(1500 // (4 - bad)):
            fleet.step()
    assert "\n" not in str(error.value)
    usable = 1000 * (4 - bad) / 4
    assert sum(fleet.readers[0].skipped.values()) == pytest.approx(1000 - usable, abs=5)  # after a thousand samples


def test_as_many_bad_samples_as_allowed_do_not_end_the_run(lcm, tmp_path):
    members = [("0.png", PNG), ("0.txt", b"a"), ("1.txt", b""), ("2.txt", b""), ("3.txt", b"")]
    shard = write_shard(tmp_path / "0.tar", members)
    fleet = Fleet(lcm, [shard], 1, 0, "--max_bad_samples", 0.8)
    for _ in range(200):  # 1,600 samples
        fleet.step()
    assert fleet.readers[0].skipped["no image"] == pytest.approx(1200, abs=3)


def test_filtered_samples_are_not_bad_ones(lcm, tmp_path):
    small = [member for i in range(1, 4) for member in ((f"{i}.txt", b"a"), (f"{i}.json", b'{"width": 8}'))]
    shard = write_shard(tmp_path / "0.tar", [("0.png", PNG), ("0.txt", b"a"), *small])
    fleet = Fleet(lcm, [shard], 1, 0, "--min_image_size", 16, "--max_bad_samples", 0)
    for _ in range(200):
        fleet.step()
    assert fleet.readers[0].skipped.keys() == {"below min_image_size"}


@pytest.mark.parametrize("workers", [0, 2])
def test_filters_that_reject_everything_end_the_run(lcm, urls, workers):
    fleet = Fleet(lcm, urls, 1, workers, "--min_image_size", 17)  # the JSON says 20 × 16
    with pytest.raises(SystemExit, match="no usable sample.*× below min_image_size.*height 16"):
        fleet.step()


# ----------------------------------------------------------------------------------------------- pipes and http URLs


@pytest.fixture
def naps(lcm, monkeypatch):
    """The seconds that would have been slept between two tries."""
    found = []
    monkeypatch.setattr(lcm, "time", SimpleNamespace(**{**vars(time), "sleep": found.append}))
    return found


@pytest.fixture
def shard(tmp_path):
    make_shards(tmp_path / "one", [6])
    return tmp_path / "one" / "00000.tar"


def test_a_pipe_is_read(lcm, naps, shard):
    assert outcome(lcm, f"pipe:cat {shard}") == (numbers(6), {})
    assert outcome(lcm, f"pipe:gzip -c {shard}") == (numbers(6), {})
    assert naps == []


def test_a_failing_pipe_is_tried_three_times_and_then_counted(lcm, naps, tmp_path):
    log = tmp_path / "log"
    assert outcome(lcm, f"pipe:echo try >> {log}; exit 3") == ([], {"unreadable shard": 1})
    assert log.read_text().split() == ["try"] * 3 and naps == [1, 2]


@pytest.mark.parametrize("size", [0, 100, 5000, 8192, 10_000, 24_000])
def test_a_pipe_that_breaks_off_goes_on_where_it_was(lcm, naps, tmp_path, shard, size):
    mark = tmp_path / "mark"
    url = f"pipe:if [ -e {mark} ]; then cat {shard}; else touch {mark}; head -c {size} {shard}; exit 1; fi"
    assert outcome(lcm, url) == (numbers(6), {})
    assert naps == [1]


def test_a_command_that_fails_at_its_very_end_is_a_fault_but_its_samples_count_once(lcm, naps, shard):
    assert outcome(lcm, f"pipe:cat {shard}; exit 1") == (numbers(6), {"unreadable shard": 1})
    assert naps == [1, 2]


def test_a_stalled_pipe_times_out(lcm, naps, shard):
    start = time.perf_counter()
    assert outcome(lcm, "pipe:exec sleep 30", "--shard_timeout", 0.3) == ([], {"unreadable shard": 1})
    assert outcome(lcm, f"pipe:head -c 9000 {shard}; exec sleep 30", "--shard_timeout", 0.3) == (
        ["0"], {"unreadable shard": 1})  # fmt: skip
    assert 1.8 < time.perf_counter() - start < 29 and naps == [1, 2] * 2


def test_a_stalled_pipe_is_told_at_the_start(lcm):
    start = time.perf_counter()
    with pytest.raises(SystemExit, match="no data for 1 s"):
        lcm.check_shards(["pipe:exec sleep 30"], make_args(lcm, "--shard_timeout", 1), {})
    assert time.perf_counter() - start < 29


def test_secrets_of_a_failing_pipe_stay_out_of_the_log(lcm, naps, shard, caplog):
    fleet = Fleet(lcm, ["pipe:TOKEN=verysecret; exit 3", f"pipe:cat {shard}"], 1, 0)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            fleet.step()
    assert "unreadable shard" in caplog.text and "verysecret" not in caplog.text and naps[:2] == [1, 2]


@pytest.fixture
def server(tmp_path):
    """The URL of an http server for the files of tmp_path."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path)) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


@needs_curl
def test_shards_over_http(lcm, server, tmp_path):
    make_shards(tmp_path, [5, 6])
    urls = lcm.expand_shards([f"{server}/{{00000..00001}}.tar"])
    lcm.check_shards(urls, make_args(lcm), {})
    assert Counter(Fleet(lcm, urls, 1, 0, "--train_batch_size", 1).captions_before(1)) == Counter(numbers(11))


@needs_curl
def test_a_shard_missing_on_the_server_is_named_at_the_start_and_counted_later(lcm, server, tmp_path, naps):
    make_shards(tmp_path, [5])
    with pytest.raises(
        SystemExit, match=r"1 of 2 shards cannot be read: http://127.0.0.1:\d+/00001.tar \(.*not found"
    ) as error:
        lcm.check_shards(lcm.expand_shards([f"{server}/{{00000..00001}}.tar"]), make_args(lcm), {})
    assert "\n" not in str(error.value)
    assert outcome(lcm, f"{server}/00001.tar") == ([], {"unreadable shard": 1}) and naps == [1, 2]


def test_a_server_that_cannot_be_reached_is_named_without_its_credentials(lcm):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(SystemExit, match=f"1 of 1 shards cannot be read: .*127.0.0.1:{port}/0.tar") as error:
        lcm.check_shards([f"http://127.0.0.1:{port}/0.tar?token=abcdef"], make_args(lcm), {})
    assert "\n" not in str(error.value) and "abcdef" not in str(error.value)


# ----------------------------------------------------------------------------------------- names of shards, start-up


def test_patterns_and_lists_are_expanded(lcm, tmp_path):
    (tmp_path / "list.txt").write_text("# two shards\n\n a.tar\n  # and\nb{1..2}.tar\n", encoding="utf-8")
    found = lcm.expand_shards(["{00..02}.tar", str(tmp_path / "list.txt"), "pipe:cat {3,4}.tar", "https://h/c.tar"])
    assert found == ["00.tar", "01.tar", "02.tar", "a.tar", "b1.tar", "b2.tar", "pipe:cat 3.tar", "pipe:cat 4.tar",
                     "https://h/c.tar"]  # fmt: skip


@pytest.mark.parametrize("line", ["pipe:touch {mark}", "  pipe:touch {mark}", "a.tar::pipe:touch {mark}",
                                  "{{a.tar,pipe:touch {mark}}}"])  # fmt: skip
def test_lists_may_not_hold_pipes(lcm, tmp_path, line):
    (tmp_path / "list.txt").write_text("a.tar\n" + line.format(mark=tmp_path / "mark"), encoding="utf-8")
    with pytest.raises(SystemExit, match="list.txt.*may not hold pipe: commands"):
        lcm.expand_shards([str(tmp_path / "list.txt")])


@pytest.mark.parametrize("line", ["PIPE:touch {mark}", "\tPIPE: touch {mark}", "a.tar:: pipe:touch {mark}"])
def test_disguised_pipes_of_lists_are_not_run(lcm, tmp_path, line):
    (tmp_path / "list.txt").write_text(line.format(mark=tmp_path / "mark"), encoding="utf-8")
    with contextlib.suppress(SystemExit):
        for url in lcm.expand_shards([str(tmp_path / "list.txt")]):
            assert all("__fault__" in sample for sample in lcm.read_shard(url, 5, tries=1))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "content, patterns, message",
    [
        (None, ["missing.txt"], "missing.txt"),
        (b"\xff\xfe\x00", ["list.txt"], "list.txt"),
        (b"# nothing\n", ["list.txt"], "--train_shards_path_or_url names no shard"),
        (None, ["a{0..3.tar"], r"a\{0..3.tar"),
    ],
)
def test_names_that_cannot_be_expanded_give_one_line(lcm, tmp_path, monkeypatch, content, patterns, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("list.txt").write_bytes(content)
    with pytest.raises(SystemExit, match=message) as error:
        lcm.expand_shards(patterns)
    assert "\n" not in str(error.value)


def test_all_missing_shards_are_named_in_one_line(lcm, tmp_path):
    make_shards(tmp_path, [2, 2])
    urls = lcm.expand_shards([str(tmp_path / "{00000..00003}.tar")])
    with pytest.raises(SystemExit, match="2 of 4 shards cannot be read: .*00002.tar.*00003.tar") as error:
        lcm.check_shards(urls, make_args(lcm), {})
    assert "\n" not in str(error.value) and "00001.tar" not in str(error.value)


@pytest.mark.parametrize(
    "members, message",
    [
        ([], "it is empty"),
        ([("0.bmp", b"?"), ("0.txt", b"a"), ("1.txt", b"b")], r"2 × no image .*needed: jpg, .*found: txt"),
        ([("0.png", PNG)], r"1 × no caption .*needed: txt, .*found: png"),
        ([("0.png", b"?"), ("0.txt", b"a")], "1 × broken image"),
        ([("0.png", PNG), ("0.txt", b"a"), ("0.json", b'{"pwatermark": 0.9}')], "1 × above max_pwatermark"),
    ],
)
def test_a_first_shard_without_usable_samples_says_what_it_holds(lcm, tmp_path, members, message):
    shard = write_shard(tmp_path / "0.tar", members)
    with pytest.raises(SystemExit, match=f"first shard .*0.tar holds no usable sample: .*{message}") as error:
        lcm.check_shards([shard], make_args(lcm), {})
    assert "\n" not in str(error.value)


def test_a_first_shard_with_one_usable_sample_is_enough(lcm, tmp_path):
    members = [("0.png", b"?"), ("0.txt", b"a"), ("1.png", PNG), ("1.txt", b"a")]
    lcm.check_shards([write_shard(tmp_path / "0.tar", members)], make_args(lcm), {})


def test_images_of_local_shards_are_counted(lcm, urls):
    assert lcm.count_samples(urls, make_args(lcm)) == COUNT
    with pytest.raises(SystemExit, match="--max_train_samples"):
        lcm.count_samples(["pipe:cat 0.tar"], make_args(lcm))


@pytest.mark.parametrize(
    "text, kept",
    [
        ("https://user:verysecret@host/a.tar", "host/a.tar"),
        ("https://host/a.tar?X-Amz-Credential=verysecret&X-Amz-Signature=verysecret&n=7", "https://host/a.tar"),
        ("https://acc.blob.core.windows.net/c/a.tar?sv=2024&se=2027&sig=verysecret%2F%3D", "windows.net/c/a.tar"),
        ("https://host/a.tar?access_token=verysecret", "https://host/a.tar"),
        ("https://host/a.tar?api_key=verysecret&apikey=verysecret", "https://host/a.tar"),
        ("pipe:curl -H 'Authorization: Bearer verysecret' https://host/a.tar", "https://host/a.tar"),
        ("pipe:curl -H 'Authorization: Basic verysecret' https://host/a.tar", "https://host/a.tar"),
        ("pipe:curl -H 'X-Api-Key: verysecret' https://host/a.tar", "https://host/a.tar"),
        ('pipe:curl -H "Authorization: Bearer verysecret" https://host/a.tar', "https://host/a.tar"),
        ("pipe:curl -u user:verysecret https://host/a.tar", "https://host/a.tar"),
        ("pipe:AWS_SECRET_ACCESS_KEY=verysecret aws s3 cp s3://b/a.tar -", "aws s3 cp s3://b/a.tar -"),
        ("pipe:wget --password=verysecret -O - https://host/a.tar", "-O - https://host/a.tar"),
        ("pipe:cat hf_verysecretverysecret", "pipe:cat"),
    ],
)
def test_redact_removes_secrets_and_keeps_the_rest(lcm, text, kept):
    for found in (lcm.redact(text), lcm.redact([text, 7])[0]):
        assert "verysecret" not in found and kept in found


@pytest.mark.parametrize(
    "value", ["/data/{00000..01242}.tar", "https://host/a.tar?n=7", "pipe:cat a.tar", 7, None, 0.5, ["a.tar", 3]]
)
def test_redact_leaves_what_is_no_secret(lcm, value):
    assert lcm.redact(value) == value


def test_public_args_hold_no_token(lcm):
    args = make_args(lcm, "--hub_token", "hf_verysecretverysecret", "--train_shards_path_or_url",
                     "https://host/a.tar?token=verysecret", "b.tar", "--validation_prompts", "a key: gold")  # fmt: skip
    found = lcm.public_args(args)
    assert "verysecret" not in json.dumps(found) and "hub_token" not in found
    assert found["train_shards_path_or_url"][1] == "b.tar" and found["validation_prompts"] == ["a key: gold"]
    assert found["learning_rate"] == args.learning_rate and set(vars(args)) - set(found) == {"hub_token"}
