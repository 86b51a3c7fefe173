"""Rebuild the demo's shards, ``demo/shards/emoji-{00000..00003}.tar``, byte for byte.

About a thousand Noto emoji (64x64 pixels, composited on white) with captions such as "bell pepper, food vegetable", in
the WebDataset layout of LAION-style sets: ``<key>.webp``, ``<key>.txt``, ``<key>.json`` for every sample, and
``<key>.caption``, the category alone, so that a student also sees prompts that leave the picture open. Pictures and
categories come from the npm package ``emoji-datasource-google``, the readable names from ``unicode-emoji-json``.

    python demo/make_shards.py           # fetches both packages with `npm pack`, writes demo/shards
    python demo/make_shards.py --check   # rebuilds in a temporary folder and compares with demo/shards/SHA256SUMS

The bytes of the pictures depend on the WebP encoder: the shards were written with Pillow 13.0.0 (libwebp in its wheel).
"""

import argparse
import hashlib
import io
import json
import random
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from PIL import Image

DATASOURCE = "emoji-datasource-google@16.0.0"
NAMES = "unicode-emoji-json@0.9.0"
CATEGORIES = (
    "Smileys & Emotion",
    "Animals & Nature",
    "Food & Drink",
    "Activities",
    "Travel & Places",
    "Objects",
)
SHARDS = Path(__file__).resolve().parent / "shards"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasource", type=Path, help=f"tgz of {DATASOURCE} (default: npm pack)")
    parser.add_argument("--names", type=Path, help=f"tgz of {NAMES} (default: npm pack)")
    parser.add_argument("--output_dir", type=Path, default=SHARDS, help="where the shards go (default: demo/shards)")
    parser.add_argument("--check", action="store_true", help="write nothing; rebuild and compare with SHA256SUMS")
    return parser.parse_args(argv)


def npm_pack(package, folder):
    """Download a package with npm's own client and return the path of its tgz."""
    command = ["npm", "pack", "--silent", "--pack-destination", str(folder), package]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Path(folder) / printed.split()[-1]


def read_package(path, wanted):
    """Contents of a tgz's members whose names satisfy `wanted`, without the leading ``package/``."""
    with tarfile.open(path) as tar:
        members = {member.name.removeprefix("package/"): member for member in tar if member.isfile()}
        return {name: tar.extractfile(member).read() for name, member in members.items() if wanted(name)}


def readable_name(unified, names):
    """Name of the emoji with these code points ("1F346" -> "eggplant"); the lists differ in variation selectors."""
    emoji = "".join(chr(int(code, 16)) for code in unified.split("-"))
    return names[emoji.replace("\ufe0f", "")]["name"]


def is_clock_face(name):
    """The 24 faces of a clock differ in the hands alone, which nobody can tell apart at this size."""
    return "o’clock" in name or name.endswith("-thirty")


def encode_webp(png):
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    encoded = io.BytesIO()
    Image.alpha_composite(white, picture).convert("RGB").save(encoded, "WEBP", quality=95, method=6)
    return encoded.getvalue(), picture.size


def build_samples(datasource, names):
    """All samples in the package's order, each a list of (member name, bytes)."""
    files = read_package(datasource, lambda name: name == "emoji.json" or name.startswith("img/google/64/"))
    names = json.loads(read_package(names, lambda name: name == "data-by-emoji.json")["data-by-emoji.json"])
    names = {emoji.replace("\ufe0f", ""): entry for emoji, entry in names.items()}
    samples = []
    for emoji in sorted(json.loads(files["emoji.json"]), key=lambda emoji: emoji["sort_order"]):
        if emoji["category"] not in CATEGORIES or not emoji["has_img_google"]:
            continue
        name = readable_name(emoji["unified"], names)
        if is_clock_face(name):
            continue
        picture, (width, height) = encode_webp(files[f"img/google/64/{emoji['image']}"])
        subcategory = emoji["subcategory"].replace("-", " ")
        facts = {"original_width": width, "original_height": height, "name": name, "category": emoji["category"]}
        facts = json.dumps(facts, ensure_ascii=False)
        key = emoji["image"].removesuffix(".png")
        caption = f"{name}, {subcategory}"
        texts = [(f"{key}.caption", subcategory.encode()), (f"{key}.txt", caption.encode())]  # either, at random
        samples.append([(f"{key}.webp", picture), *texts, (f"{key}.json", facts.encode())])
    return samples


def write_shards(samples, folder, num_shards=4):
    """Deal the shuffled samples out, so that every shard mixes the categories; nothing but the contents varies."""
    random.Random(0).shuffle(samples)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"emoji-{index:05d}.tar" for index in range(num_shards)]
    for index, path in enumerate(paths):
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for member_name, content in (member for sample in samples[index::num_shards] for member in sample):
                member = tarfile.TarInfo(member_name)  # mtime, uid and gid are 0, the mode is 0644
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return paths


def sha256sums(paths):
    """The same text as `sha256sum emoji-*.tar`."""
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in paths)


def main(argv=None):
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        datasource = args.datasource or npm_pack(DATASOURCE, scratch)
        names = args.names or npm_pack(NAMES, scratch)
        samples = build_samples(datasource, names)
        paths = write_shards(samples, Path(scratch) / "shards" if args.check else args.output_dir)
        sums, listing = sha256sums(paths), args.output_dir / "SHA256SUMS"
        print(f"{len(samples)} samples in {len(paths)} shards, {sum(path.stat().st_size for path in paths):,} bytes")
        if not args.check:
            listing.write_text(sums)
        elif sums != listing.read_text() or sums != sha256sums([args.output_dir / path.name for path in paths]):
            sys.exit(f"Differs from {listing} or its shards (another version of Pillow?):\n{sums}")
        else:
            print("identical to SHA256SUMS and to the shards beside it")


if __name__ == "__main__":
    main()
