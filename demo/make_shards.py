"""Rebuild the demo's shards, ``demo/shards/*.tar``, and its lists of prompts byte for byte.

About a thousand things (faces, animals, food, activities, places, objects) in seven styles, 64x64 pixels on white: the
drawings of seven sets of emoji, npm packages ``@iconify-json/*``, their names matched with those of ``emojibase-data``.
Every sample is ``<key>.webp`` and ``<key>.json``, whose ``captions`` are what the picture may be called: "red apple,
food fruit, glossy", the same without its style, and the category alone, so that one prompt has many right pictures.

``train-{00000..00003}.tar`` is what the teacher and its students see. A tenth of the pairs of name and style, at most
one style of a name, is in shards of its own: ``heldout-validation.tar``, on which settings are chosen, and
``heldout-test.tar``, which only the README's tables may use. From the same pairs come the prompts in
``demo/prompts_{validation,test}_{full,unstyled,category}.txt``; ``demo/prompts_seen_full.txt`` are trained captions.

    python demo/make_shards.py           # fetches the packages with `npm pack`, writes demo/shards and the prompts
    python demo/make_shards.py --check   # rebuilds in a temporary folder and compares

Needs `pip install resvg-py==0.5.0`, which draws the SVGs. The bytes of the pictures depend on it and on the WebP
encoder: the shards were written with Pillow 13.0.0 (libwebp in its wheel). Either takes two minutes of one core.
"""

import argparse
import hashlib
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import defaultdict
from pathlib import Path

from PIL import Image

NAMES = "emojibase-data@17.0.0"
STYLES = {  # what a user may call the style: the package that draws so
    "shaded": "@iconify-json/noto@1.2.9",
    "blob": "@iconify-json/noto-v1@1.2.5",
    "glossy": "@iconify-json/fluent-emoji@1.2.7",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "pastel": "@iconify-json/fxemoji@1.2.2",
    "bold": "@iconify-json/twemoji@1.2.5",
    "cartoon": "@iconify-json/emojione@1.2.3",
}
GROUPS = ("smileys-emotion", "animals-nature", "food-drink", "activities", "travel-places", "objects")
SIDE, OVERSAMPLING, QUALITY = 64, 4, 90
NUM_SHARDS, SEED = 4, 0
NUM_PROMPTS = {"validation": 8, "test": 32, "seen": 32}  # lines of a list; of categories there are not more than 16
DEMO = Path(__file__).resolve().parent

# fxemoji has names of its own; found by looking at the pictures
PASTEL = """
two hearts = 2hearts | angry face = angry | anguished face = anguish | skull and crossbones = blackskullcrossbones
dollar banknote = banknotedollar | euro banknote = banknoteeuro | pound banknote = banknotepound
yen banknote = banknoteyen | high voltage = bolt | woman’s boot = boot | ribbon = bow | rabbit face = bunny
rabbit = bunnyside | cat face = cat | cat = catside | dog face = dog | dog = dogside | tiger face = tiger
tiger = tigerside | leopard = leopardside | mouse face = mouse | mouse = mouseside | pig face = pig | pig = pigside
mobile phone = cellphone | chart decreasing = chartdownwardstrend | chart increasing = chartupwardstrend
chart increasing with yen = chartupwardstrendyen | hot pepper = chilipepper | confetti ball = confetti
closed mailbox with raised flag = closedmailboxraised | closed mailbox with lowered flag = closedmailboxlowered
open mailbox with raised flag = openmailboxraised | open mailbox with lowered flag = openmailboxlowered
downcast face with sweat = coldsweat | confounded face = confounded | confused face = confused | crying face = crying
dashing away = dash | smiling face with horns = devilhorns | disappointed face = disappointed
sad but relieved face = dissapointedrelief | dragon face = dragonhead | dragon = dragonside
globe showing Americas = americasglobe | globe showing Asia-Australia = asiaaustraliaglobe
globe showing Europe-Africa = europeafricaglobe | globe with meridians = meridianglobe
envelope with arrow = envelopedownarrowabove | expressionless face = expressionless | evergreen tree = evergreen
fallen leaf = fallingleaf | leaf fluttering in wind = leaffluttering | fearful face = fearful
fish cake with swirl = fishcakeswirl | floppy disk = floppydisk2 | flushed face = flushed
fork and knife with plate = forkknife | front-facing baby chick = frontfacingchick | gem stone = gem
frowning face with open mouth = frownmouth | grimacing face = grimacing | grinning face = grin
grinning face with smiling eyes = grineyes | grinning squinting face = grinsquint
grinning face with sweat = grinsweat | face with tears of joy = grintears | grinning face with big eyes = grinwide
smiling face with halo = halo | hamster = hampster | video camera = handheldvideocamera | heart with arrow = heartarrow
smiling face with heart-eyes = hearteyes | green heart = heartgreen | purple heart = heartpurple
heart with ribbon = heartribbon | yellow heart = heartyellow | high-heeled shoe = heels
bullet train = highspeedtrainbulletnose | hourglass not done = hourglassflowingsand | hushed face = hushed
goblin = japaneseangrymask | kissing face = kiss | kissing face with closed eyes = kissclosedeyes
kissing face with smiling eyes = kisseyes | face blowing a kiss = kissing | locked with key = lockandkey
magnifying glass tilted left = leftmagnifyingglass | magnifying glass tilted right = rightmagnifyingglass
loudly crying face = loudlycrying | mahjong red dragon = mahjong | clutch bag = makeupbag
mantelpiece clock = manltepiececlock | t-shirt = mansshirt | face with medical mask = medicalmask
man’s shoe = mensshoe | running shoe = mensrunner | hear-no-evil monkey = monkeyhear | see-no-evil monkey = monkeysee
speak-no-evil monkey = monkeyspeak | neutral face = neutral | face without mouth = nomouth
notebook with decorative cover = notebookdecorativecover | face with open mouth = openmouth | outbox tray = outbox
pensive face = pensive | persevering face = perservere | pig nose = pigsnout | purse = pinkwallet
pile of poo = poo | enraged face = pouting | wrapped gift = present | racing car = racecar
cloud with rain = raincloud | relieved face = relieved | reminder ribbon = reminder | woman’s sandal = sandals
face screaming in fear = screamfear | map of Japan = silhouetteohjapan | sleeping face = sleeping
sleepy face = sleepy | slightly frowning face = smallfrown | slightly smiling face = smallsmile
smiling face with smiling eyes = smileeyes | face savoring food = smiletongue | smirking face = smirk
cloud with snow = snowcloud | snow-capped mountain = snowmountains | speech balloon = speechbubble
thought balloon = thoughtbaloon | muted speaker = speakercancellation | speaker medium volume = speakeronesoundwave
speaker high volume = speaker3soundwaves | spouting whale = spurtingwhale | studio microphone = studiomic
smiling face with sunglasses = sunglasses | sunglasses = darksunglasses | sun = sunrays
sun behind rain cloud = sunraincloud | sun behind small cloud = whitesunsmallcloud | sweat droplets = sweatsplash
telephone receiver = telephonereceiver2 | tennis = tennisball | necktie = tie | tired face = tired
face with tongue = tongueout | winking face with tongue = tongueoutwink | Tokyo tower = toykotower
face with steam from nose = triumph | unamused face = unamused | videocassette = videocasette
waning gibbous moon = waningbibbousmoon | water wave = wave | weary face = weary | winking face = winking
woman’s clothes = womansshirt | worried face = worried | beach with umbrella = beachumbrella
bell with slash = bellcancellation | mobile phone with arrow = phonerightarrowleft | bookmark tabs = bookmarktab
"""
PASTEL = dict(entry.strip().split(" = ") for entry in re.split(r"[|\n]", PASTEL.strip()))
BROKEN = {("tram car", "pastel"), ("oden", "pastel"), ("fog", "pastel")}  # black, half and white pictures


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages_dir", type=Path, help="folder with the packages' tgz files (default: npm pack)")
    parser.add_argument("--output_dir", type=Path, default=DEMO / "shards", help="where the shards go")
    parser.add_argument("--prompts_dir", type=Path, default=DEMO, help="where the lists of prompts go")
    parser.add_argument("--check", action="store_true", help="write nothing; rebuild and compare with what is there")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------------------ packages


def find_package(package, folder, scratch):
    """Path of a package's tgz: in `folder`, named as `npm pack` does, or downloaded with npm's own client."""
    if folder:
        return folder / f"{package.removeprefix('@').replace('/', '-').replace('@', '-')}.tgz"
    command = ["npm", "pack", "--silent", "--pack-destination", str(scratch), package]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Path(scratch) / printed.split()[-1]


def read_package(path, *names):
    """Parsed JSON members of a tgz; an empty dictionary for one that it lacks."""
    with tarfile.open(path) as tar:
        members = {member.name.removeprefix("package/"): member for member in tar if member.isfile()}
        return [json.load(tar.extractfile(members[name])) if name in members else {} for name in names]


def squeeze(name):
    """A name without capitals, spaces and punctuation: the packages write "red-apple" and "redapple"."""
    return re.sub("[^a-z0-9]", "", name.lower().replace("ñ", "n"))


def read_things(path):
    """What is drawn: dictionaries of name, category, code (points without variation selectors) and spellings.

    No people, flags and symbols, nor the 24 faces of a clock, whose hands nobody can tell apart at this size.
    """
    entries, meta, unicode_names = read_package(path, "en/data.json", "meta/groups.json", "meta/unicode-names.json")
    things = []
    for entry in sorted(entries, key=lambda entry: entry.get("order", 0)):
        name = entry["label"]
        is_clock_face = "o’clock" in name or name.endswith("-thirty")
        if meta["groups"].get(str(entry.get("group"))) in GROUPS and not is_clock_face:
            category = meta["subgroups"][str(entry["subgroup"])].replace("-", " ")
            spellings = [squeeze(name), squeeze(unicode_names.get(entry["hexcode"], ""))]
            code = entry["hexcode"].lower().replace("-fe0f", "")
            things.append({"name": name, "category": category, "code": code, "spellings": spellings})
    return things


def read_icons(path):
    """A package's icons by their squeezed names, and all names of the icon of each code, where the package says it."""
    content, codes = read_package(path, "icons.json", "chars.json")
    parents = {name: name for name in content["icons"]}
    for name, alias in content.get("aliases", {}).items():
        if alias.keys() == {"parent"} and alias["parent"] in content["icons"]:  # others mirror or turn a picture
            parents[name] = alias["parent"]
    size = {name: content[name] for name in ("left", "top", "width", "height") if name in content}
    icons, names = {}, defaultdict(list)
    for name, parent in parents.items():
        icons.setdefault(squeeze(name), {**size, **content["icons"][parent]})
        names[parent].append(squeeze(name))
    return icons, {code.replace("-fe0f", ""): names[name] for code, name in codes.items() if name in names}


def match(things, packages):
    """Icons by (index of the thing, style). A spelling that one package gives for a code finds the icon of another."""
    found = {}
    for index, thing in enumerate(things):
        spellings = [name for _, codes in packages.values() for name in codes.get(thing["code"], [])]
        for style, (icons, codes) in packages.items():
            known = codes.get(thing["code"], []) + thing["spellings"] + spellings
            if style == "pastel":
                known = [squeeze(PASTEL[thing["name"]])] if thing["name"] in PASTEL else known
            name = next((name for name in known if name in icons), None)
            if name and (thing["name"], style) not in BROKEN:
                found[index, style] = icons[name]
    return found


# ------------------------------------------------------------------------------------------------------------- samples


def draw(icon):
    """WebP of an icon on a white square, drawn larger than needed, since clipped edges are not antialiased."""
    import resvg_py  # here, so that the tests do without it

    left, top, width, height = (icon.get(name, 0) for name in ("left", "top", "width", "height"))
    side = max(width, height)
    view = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg, pixels = f'<svg {spaces} viewBox="{view}">{icon["body"]}</svg>', SIDE * OVERSAMPLING
    png = resvg_py.svg_to_bytes(svg, width=pixels, height=pixels, background="#ffffff", skip_system_fonts=True)
    encoded = io.BytesIO()
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGB").reduce(OVERSAMPLING)
    picture.save(encoded, "WEBP", quality=QUALITY, method=6)
    return encoded.getvalue()


def build_samples(things, icons):
    """Dictionaries of key, thing, style, captions and picture. Of equal pictures the first stays: a name has twins."""
    samples, seen = [], set()
    for (index, style), icon in icons.items():
        thing, picture = things[index], draw(icon)
        if picture not in seen:
            seen.add(picture)
            name, category = thing["name"], thing["category"]
            captions = [f"{name}, {category}, {style}", f"{name}, {category}", category]
            sample = {"key": f"{thing['code']}-{style}", "thing": index, "style": style, "captions": captions}
            samples.append({**sample, "picture": picture})
    return samples


def split(samples, rng):
    """Lists of samples by name of their split. Held out are styles of things with at least two more."""
    styles = defaultdict(list)
    for sample in samples:
        styles[sample["thing"]].append(sample)
    chosen = rng.sample([thing for thing, drawn in styles.items() if len(drawn) >= 3], len(samples) // 10)
    heldout = [rng.choice(styles[thing]) for thing in chosen]
    keys = {sample["key"] for sample in heldout}
    seen = [sample for sample in samples if sample["key"] not in keys]
    rng.shuffle(seen)  # so that every shard mixes the categories
    return {"seen": seen, "validation": heldout[::2], "test": heldout[1::2]}


def pick_prompts(splits):
    """Prompts by name of their list. Styles take turns, and no thing or category is in two lists of a kind."""
    prompts = {}
    for name in ("validation", "test", "seen"):
        turns = defaultdict(list)
        for sample in splits[name]:
            turns[sample["style"]].append(sample)
        rounds = [sample for turn in zip(*turns.values(), strict=False) for sample in turn]
        prompts[f"{name}_full"] = [sample["captions"][0] for sample in rounds[: NUM_PROMPTS[name]]]
        if name != "seen":
            others = rounds[
                NUM_PROMPTS[name] :
            ]  # not those of the first list, whose things are known there with a style
            prompts[f"{name}_unstyled"] = [sample["captions"][1] for sample in others[: NUM_PROMPTS[name]]]
    categories = list(dict.fromkeys(sample["captions"][2] for sample in splits["seen"]))
    numbers = [min(NUM_PROMPTS[name], 16) for name in ("validation", "test")]
    prompts["validation_category"], prompts["test_category"] = (
        categories[: numbers[0]],
        categories[numbers[0] : sum(numbers)],
    )
    return prompts


# --------------------------------------------------------------------------------------------------------------- files


def write_shard(path, samples):
    """Nothing but the contents varies: times and owners are 0."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            facts = {"captions": sample["captions"], "original_width": SIDE, "original_height": SIDE}
            for suffix, content in (
                ("webp", sample["picture"]),
                ("json", json.dumps(facts, ensure_ascii=False).encode()),
            ):
                member = tarfile.TarInfo(f"{sample['key']}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_all(splits, prompts, shards_dir, prompts_dir):
    """Write shards, their SHA256SUMS and the lists of prompts; returns their paths."""
    shards_dir.mkdir(parents=True, exist_ok=True)
    paths = {f"train-{index:05d}": splits["seen"][index::NUM_SHARDS] for index in range(NUM_SHARDS)}
    paths |= {f"heldout-{name}": splits[name] for name in ("test", "validation")}
    shards = [shards_dir / f"{name}.tar" for name in sorted(paths)]
    for path in shards:
        write_shard(path, paths[path.stem])
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in shards]
    (shards_dir / "SHA256SUMS").write_text("".join(sums))  # as `sha256sum *.tar` writes it
    for name, lines in prompts.items():
        (prompts_dir / f"prompts_{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return [*shards, shards_dir / "SHA256SUMS", *(prompts_dir / f"prompts_{name}.txt" for name in prompts)]


def is_same(path, other):
    return other.is_file() and other.read_bytes() == path.read_bytes()


def main(argv=None):
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        things = read_things(find_package(NAMES, args.packages_dir, scratch))
        packages = {style: find_package(package, args.packages_dir, scratch) for style, package in STYLES.items()}
        icons = match(things, {style: read_icons(path) for style, path in packages.items()})
        splits = split(build_samples(things, icons), random.Random(SEED))
        folders = (scratch / "shards", scratch) if args.check else (args.output_dir, args.prompts_dir)
        paths = write_all(splits, pick_prompts(splits), *folders)
        size = sum(path.stat().st_size for path in paths)
        print(", ".join(f"{len(samples)} {name}" for name, samples in splits.items()), f"samples, {size:,} bytes")
        if args.check:
            homes = {folders[0]: args.output_dir, folders[1]: args.prompts_dir}
            differing = [path.name for path in paths if not is_same(path, homes[path.parent] / path.name)]
            if differing:
                sys.exit(f"error: other bytes than here (another Pillow or resvg-py?): {', '.join(differing)}")
            print("identical to what is here")


if __name__ == "__main__":
    main()
