"""tools/prepare_shards.py: folders, metadata and data sets as other people, systems and programs leave them."""

import io
import json
import os
import sys
import unicodedata
from pathlib import Path

import pytest
from conftest import ROOT, image_bytes, load_script, run_main, write_shard
from PIL import Image
from test_prepare import BUCKETS, captions_of, prepare, read_all

PNG = image_bytes()


@pytest.fixture(scope="module")
def tool():
    return load_script(ROOT / "tools" / "prepare_shards.py")


@pytest.fixture
def photos(tmp_path):
    """photos(*names): a folder of pictures with these names and no captions."""

    def make(*names):
        for name in names:
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / name).write_bytes(PNG)
        return tmp_path / "in"

    return make


def rejected(index):
    return {reason: count for reason, (count, _) in index["rejected"].items()}


# ---------------------------------------------------------------------------------------------------------- folders
def test_links_to_folders_are_followed_once(tool, photos, tmp_path):
    folder = photos("a.png", "sub/b.png")
    (tmp_path / "other" / "deep").mkdir(parents=True)
    for place in ("other/c", "other/deep/d"):
        (tmp_path / f"{place}.png").write_bytes(PNG)
    for link, target in {"linked": tmp_path / "other", "again": tmp_path / "other", "aaa": folder / "sub",
                         "loop": folder, "sub/up": tmp_path, ".hidden": tmp_path / "other",
                         "gone": tmp_path / "nowhere"}.items():  # fmt: skip
        (folder / link).symlink_to(target)
    index = prepare(tool, tmp_path / "out", "--default_caption", "x", folder=folder)
    assert set(read_all(tmp_path / "out")) == {"a.png", "sub/b.png", "again/c.png", "again/deep/d.png"}
    assert index["rejected"] == {}


def test_folders_that_cannot_be_read_are_counted(tool, photos, tmp_path, monkeypatch):
    folder, scan = photos("a.png", "sub/b.png"), os.scandir

    def refuse(path):
        if str(path).endswith("/sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    index = prepare(tool, tmp_path / "out", "--default_caption", "x", folder=folder)
    assert index["samples"] == 1 and index["rejected"] == {"unreadable folder": [1, "sub: Permission denied"]}


def test_what_the_tool_left_is_no_picture(tool, photos, tmp_path, monkeypatch):
    folder = photos("a.png", "b.png")
    monkeypatch.chdir(folder)
    flags = ["--image_folder", ".", "--default_caption", "x"]
    run_main(tool, ["--check", *flags])
    run_main(tool, ["--check", *flags, "--contact_sheet", "sheets/mine.png"])
    run_main(tool, ["--check", *flags, "--contact_sheet", "sheets/mine.png"])
    assert Path("contact_sheet.png").exists() and Path("sheets/mine.png").exists()
    run_main(tool, [*flags, "--contact_sheet", "sheets/mine.png", "--output_dir", "shards", "--seed", "3"])
    run_main(tool, [*flags, "--contact_sheet", "sheets/mine.png", "--output_dir", "shards2"])
    for output in ("shards", "shards2"):
        assert set(read_all(output)) == {"a.png", "b.png"}
    photos("elsewhere/contact_sheet.png")  # somebody's own
    run_main(tool, [*flags, "--contact_sheet", "sheets/mine.png", "--output_dir", tmp_path / "more"])
    assert set(read_all(tmp_path / "more")) == {"a.png", "b.png", "elsewhere/contact_sheet.png"}


def test_a_file_of_flags_with_a_byte_order_mark(tool, photos, tmp_path):
    flags = f"--image_folder {photos('a.png')}  # pictures\r\n--default_caption 'a fox' --output_dir {tmp_path}/out\r\n"
    (tmp_path / "flags").write_text(flags, encoding="utf-8-sig")
    run_main(tool, [f"@{tmp_path}/flags"])
    assert captions_of(tmp_path / "out") == {"a.png": ["a fox"]}


def test_json_beside_pictures(tool, photos, tmp_path):
    """As img2dataset's format `files` and unpacked shards have it."""
    folder = photos(*(f"{name}.png" for name in "abcde"))
    for name, content in {"a": {"caption": "a fox"}, "b": {"captions": ["one", None, "two"]}, "c": {"caption": "json"},
                          "d": {"caption": float("nan")}, "e": ["list"]}.items():  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "c.txt").write_text("text")
    index = prepare(tool, tmp_path / "out", folder=folder)
    assert captions_of(tmp_path / "out") == {"a.png": ["a fox"], "b.png": ["one", "two"], "c.png": ["text"]}
    assert rejected(index) == {"no caption": 2} and "found" not in index["rejected"]["no caption"][1]


def test_captions_beside_pictures_of_other_systems(tool, photos, tmp_path):
    """Other capitals, and accents set apart from their letters, as macOS does; never the caption of another picture."""
    decomposed, composed = (unicodedata.normalize(form, "é") for form in ("NFD", "NFC"))
    folder = photos("IMG_1.JPG", f"{decomposed}.png", "B.png", "b.png", "22.05.png", "22.06.png")
    for name in ("img_1.txt", f"{composed}.txt", "b.txt", "22.05.txt", "22.06.txt"):
        (folder / name).write_text(name)
    index = prepare(tool, tmp_path / "out", folder=folder)
    assert captions_of(tmp_path / "out") == {"IMG_1.JPG": ["img_1.txt"], f"{decomposed}.png": [f"{composed}.txt"],
                                             "b.png": ["b.txt"], "22.05.png": ["22.05.txt"],
                                             "22.06.png": ["22.06.txt"]}  # fmt: skip
    assert index["rejected"] == {"no caption": [1, "B.png: needed: txt, text, caption or json beside it, "
                                                   "metadata.jsonl/csv or --coco_annotations"]}  # fmt: skip


def test_pictures_by_other_endings_and_texts_without_one(tool, photos, tmp_path):
    folder = photos("scan.png")
    for name in ("a.jfif", "b.JPE"):
        (folder / name).write_bytes(jpeg())
    for name in ("a.txt", "b.txt", "scan.txt", "scan2.txt", "sub/README.txt", "pictures.gif", "pictures.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    index = prepare(tool, tmp_path / "out", folder=folder)
    assert captions_of(tmp_path / "out") == {"a.jfif": ["a.txt"], "b.JPE": ["b.txt"], "scan.png": ["scan.txt"]}
    assert read_all(tmp_path / "out")["a.jfif"]["jpg"] == jpeg()
    assert index["rejected"] == {
        "unknown format": [1, "pictures.gif: needed: jpg, jpeg, png, webp"],
        "no image": [3, "pictures.txt may be a caption, but there is no picture beside it"]}  # fmt: skip


def test_sizes_in_json_that_are_none(tool, tmp_path):
    """A width of 0 or NaN says nothing: the picture's own counts."""
    infos = [b'{"original_width": NaN, "original_height": 0}', b'{"width": -1, "height": 1e999}', b'{"width": 30}']
    members = [(f"{i}.{kind}", data) for i, info in enumerate(infos)
               for kind, data in (("png", PNG), ("txt", b"a"), ("json", info))]  # fmt: skip
    prepare(tool, tmp_path / "out", shards=[write_shard(tmp_path / "in.tar", members)])
    sizes = [(found["info"]["original_width"], found["info"]["original_height"])
             for found in read_all(tmp_path / "out").values()]  # fmt: skip
    assert sizes == [(20, 16), (20, 16), (30, 16)]


# --------------------------------------------------------------------------------------------------------- metadata
EXPECTED = {"a.png": ["a fox, red"], "sub/b.png": ['a "cat"'], "é.png": ["füchse"]}
ROWS = 'a.png{s}"a fox, red"\nsub{p}b.png{s}"a ""cat"""\né.png{s}füchse\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    "text",
    [
        "file_name,text\n" + ROWS.format(s=",", p="/"),
        "file_name;text\n" + ROWS.format(s=";", p="\\"),
        "file_name\ttext\n" + ROWS.format(s="\t", p="/"),
        "sep=;\nfile_name;text\n" + ROWS.format(s=";", p="/"),
        "File_Name, Text\n" + ROWS.format(s=", ", p="/"),
        '"file_name", "text"\n' + ROWS.format(s=",", p="/"),
        "\nid,text,file_name,,\n1,\"a fox, red\",./a.png,,\n2,'x',,,\n,,,,\n"
        + '3,"a ""cat""",SUB/b.PNG\n4,füchse,é.png,,',
    ],
    ids=["plain", "semicolons", "tabs", "sep=", "capitals and blanks", "quoted header", "more columns"],
)
def test_metadata_csv_of_spreadsheets(tool, photos, tmp_path, text, encoding):
    folder = photos("a.png", "sub/b.png", "é.png")
    (folder / "metadata.csv").write_bytes(text.replace("\n", "\r\n").encode(encoding))
    index = prepare(tool, tmp_path / "out", folder=folder)
    assert captions_of(tmp_path / "out") == EXPECTED
    nameless = {"no image": [1, f"{folder}/metadata.csv, line 4, has no file_name"]}
    assert index["rejected"] == (nameless if "id" in text else {})


@pytest.mark.parametrize(
    "text, message",
    [
        ("a.png,a fox, red\n", "line 2, has 3 cells, its header 2: put texts that hold ',' in quotes"),
        ('b.png,b\na.png,"a fox\nc.png,c\n', "line 4: unexpected end of data; quotes within a quoted text are doubled"),
        ('a.png,"a" fox\n', "line 2: ',' expected after '\"'; quotes within"),
        (b"b.png,b\na.png,caf\xe9\n", "line 3, cannot be read: it is not UTF-8 .*; save it as UTF-8"),
    ],
)
def test_rows_of_metadata_csv_that_may_mean_more_than_one_thing(tool, photos, tmp_path, text, message):
    folder = photos("a.png")
    (folder / "metadata.csv").write_bytes(b"file_name,text\n" + (text if isinstance(text, bytes) else text.encode()))
    with pytest.raises(SystemExit, match=f"^error: .*metadata.csv, {message}") as error:
        prepare(tool, tmp_path / "out", folder=folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "kind, text, message",
    [
        ("csv", "file_name,text,text\na.png,x,y\n", "has more than one column text"),
        ("csv", "name,text\n", r"needs columns file_name and text \(--caption_column\); it has: name, text"),
        ("csv", "file_name\na.png\n", r"needs columns file_name and text/caption/captions .*; it has: file_name$"),
        ("jsonl", "{}\n", r"needs columns file_name and text/caption/captions \(--caption_column\); it has: none$"),
        ("jsonl", '["a.png", "x"]', "row 1, is no object such as"),
        ("jsonl", '{"file_name": "a.png", "text": "x"}\n"a.png"\n', "line 2, is no object such as"),
        ("jsonl", '{"file_name": "a.png", "text": "x"}\n\n{"file_name"\n', "line 3, is no JSON"),
        ("jsonl", '{"file_name": "B.png", "text": "x"}\n', "B.png may be b.PNG or b.png$"),
    ],
)
def test_metadata_that_is_refused(tool, photos, tmp_path, kind, text, message):
    folder = photos("a.png", "b.png", "b.PNG")
    (folder / f"metadata.{kind}").write_text(text)
    with pytest.raises(SystemExit, match=f"^error: .*metadata.*{message}") as error:
        prepare(tool, tmp_path / "out", folder=folder)
    assert "\n" not in str(error.value)


def test_metadata_by_other_names(tool, photos, tmp_path):
    folder = photos("a.png", "sub/b.png")
    (folder / "metadata.tsv").write_text("file_name\ttext\na.png\ta fox, red\n")
    (folder / "sub" / "Metadata.JSONL").write_text('{"file_name": "b.png", "text": "b"}')
    (folder / "sub" / "metadata.parquet").write_bytes(b"")
    index = prepare(tool, tmp_path / "out", folder=folder)
    assert captions_of(tmp_path / "out") == {"a.png": ["a fox, red"], "sub/b.png": ["b"]}
    assert index["rejected"] == {
        "unknown format": [1, "sub/metadata.parquet: needed: metadata.jsonl or metadata.csv"]}  # fmt: skip


def test_a_folder_in_place_of_shards_is_named(tool, tmp_path):
    with pytest.raises(
        SystemExit, match=f"1 of 1 shards do not exist: {tmp_path}; {tmp_path} is a folder: give its .tar"
    ):
        prepare(tool, tmp_path / "out", shards=[tmp_path])


def test_a_column_by_other_capitals(tool, photos, tmp_path):
    folder = photos("a.png")
    (folder / "metadata.csv").write_text("file_name,Text,Prompt\na.png,text,prompt\n")
    for index, (column, caption) in enumerate({"Text": "text", "prompt": "prompt", "Prompt": "prompt"}.items()):
        prepare(tool, tmp_path / str(index), "--caption_column", column, folder=folder)
        assert captions_of(tmp_path / str(index)) == {"a.png": [caption]}


def test_empty_cells_are_no_captions(tool, photos, tmp_path):
    folder = photos("a.png", "b.png", "c.png", "d.png")
    (folder / "metadata.csv").write_text('file_name,text\na.png,\nb.png\nc.png,""\nd.png,nan\n')
    (folder / "c.txt").write_text("of the text")
    index = prepare(tool, tmp_path / "out", folder=folder)
    assert captions_of(tmp_path / "out") == {"c.png": ["of the text"], "d.png": ["nan"]}
    assert rejected(index) == {"no caption": 2}
    prepare(tool, tmp_path / "default", "--default_caption", "mine", folder=folder)
    assert captions_of(tmp_path / "default") == {"a.png": ["mine"], "b.png": ["mine"], "c.png": ["of the text"],
                                                 "d.png": ["nan"]}  # fmt: skip


@pytest.mark.parametrize("form", ["lines", "list", "pretty list"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_metadata_json_of_other_programs(tool, photos, tmp_path, form, encoding):
    folder = photos("a.png", "sub/b.png", "c.png", "d.png", "e.png")
    rows = [{"file_name": str(folder / "a.png"), "text": "a"}, {"file_name": "sub\\b.png", "text": 7},
            {"file_name": "c.png", "text": [None, "c", False]}, {"file_name": "d.png", "text": float("nan")},
            {"file_name": "e.png", "text": {"en": "e"}}, {"file_name": None, "text": "x"}, {"text": "y"}]  # fmt: skip
    text = "\r\n".join(map(json.dumps, rows)) if form == "lines" else json.dumps(rows, indent=form[0] == "p" or None)
    (folder / "metadata.jsonl").write_bytes(text.encode(encoding))
    index = prepare(tool, tmp_path / "out", folder=folder)
    assert captions_of(tmp_path / "out") == {"a.png": ["a"], "sub/b.png": ["7"], "c.png": ["c"]}
    assert rejected(index) == {"no image": 2, "no caption": 2}
    assert index["rejected"]["no image"][1].endswith(
        f"metadata.jsonl, {'line' if form == 'lines' else 'row'} 6, has no file_name"
    )


# ------------------------------------------------------------------------------------------------------------- COCO
def write_coco(path, images, notes, encoding="utf-8"):
    content = {"images": [{"id": key, "file_name": name} for key, name in images],
               "annotations": [{"image_id": key, "caption": text} for key, text in notes]}  # fmt: skip
    path.write_bytes(json.dumps(content).encode(encoding))
    return path


def test_coco_with_odd_annotations(tool, photos, tmp_path):
    folder = photos("train/1.png", "2.png", "3.png", "4.png")
    images = [(1, "train\\1.PNG"), ("2", "2.png"), (3, "elsewhere/3.png"), (4, "4.png"), (5, None)]
    notes = [(1, "one"), (99, "of an image that is not listed"), ("1", "another"), (2, "two"), (3, "three"), (4, None),
             (4, float("nan")), (98, "and another")]  # fmt: skip
    file = write_coco(tmp_path / "captions.json", images, notes, "utf-16")
    index = prepare(tool, tmp_path / "out", "--coco_annotations", file, folder=folder)
    assert captions_of(tmp_path / "out") == {"train/1.png": ["one", "another"], "2.png": ["two"], "3.png": ["three"]}
    assert rejected(index) == {"no image": 2, "no caption": 1}
    assert index["rejected"]["no image"][1] == f"{file}: the image_id 99 has a caption but is not listed"
    prepare(tool, tmp_path / "default", "--coco_annotations", file, "--default_caption", "mine", folder=folder)
    assert captions_of(tmp_path / "default")["4.png"] == ["mine"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", "it is built in another way"),
        ('{"images": [{"id": 1}], "annotations": []}', "no 'file_name'"),
        ('{"images": [], "annotations": [{"image_id": 1}]}', "no 'caption'"),
        ('{"images": [], "annotations": null}', "it is built in another way"),
    ],
)
def test_coco_files_of_another_kind_are_refused(tool, photos, tmp_path, content, message):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(SystemExit, match=f"c.json holds no captions as captions_train2017.json has them: {message}$"):
        prepare(tool, tmp_path / "out", "--coco_annotations", tmp_path / "c.json", folder=photos("a.png"))


def test_coco_with_one_id_for_two_pictures_is_refused(tool, photos, tmp_path):
    folder, file = photos("1.png", "2.png"), tmp_path / "captions.json"
    write_coco(file, [(1, "1.png"), (1, "2.png")], [(1, "one")])
    with pytest.raises(SystemExit, match="the id 1 stands for 1.png and for 2.png"):
        prepare(tool, tmp_path / "out", "--coco_annotations", file, folder=folder)


# --------------------------------------------------------------------------------------------------------- pictures
def test_a_size_limit_in_megapixels(tool, photos, tmp_path, capsys):
    folder = photos()
    for name, size in {"small": (700, 700), "least": (500, 1000), "most": (1000, 1000), "large": (1001, 1000)}.items():
        (folder / f"{name}.png").parent.mkdir(exist_ok=True)
        Image.new("L", size).save(folder / f"{name}.png")
    flags = ("--default_caption", "x", "--min_megapixels", "0.5", "--max_megapixels", "1")
    index = prepare(tool, tmp_path / "out", *flags, folder=folder)
    assert set(read_all(tmp_path / "out")) == {"least.png", "most.png"}
    assert index["rejected"] == {"below min_megapixels": [1, "small.png: 700x700, 0.49 megapixels"],
                                 "above max_megapixels": [1, "large.png: 1001x1000, 1.001 megapixels"]}  # fmt: skip
    run_main(tool, ["--check", "--image_folder", folder, *flags, "--contact_sheet", tmp_path / "sheet.png"])
    assert "samples: 4, usable: 2, rejected: 2" in capsys.readouterr().out
    resized = [("0.png", PNG), ("0.txt", b"a"), ("0.json", b'{"original_width": 2000, "original_height": 1000}')]
    shard = write_shard(tmp_path / "in.tar", resized)
    with pytest.raises(SystemExit, match=r"1 × above max_megapixels \(.*2000x1000, 2 megapixels"):
        prepare(tool, tmp_path / "shards", "--max_megapixels", "1", shards=[shard])


@pytest.mark.parametrize("flags", [(), ("--check",), (*BUCKETS, "--min_image_size", "1")], ids=["", "check", "buckets"])
def test_odd_metadata_break_no_picture_and_what_is_none_is_named(tool, photos, tmp_path, capsys, flags):
    from test_sources import PIXELS, ROTATED

    folder = photos()
    folder.mkdir(exist_ok=True)
    for index, data in enumerate(ROTATED.values()):
        (folder / f"{index}.png").write_bytes(data)
    (folder / "gif.png").write_bytes(b"GIF89a" + bytes(20))
    (folder / "empty.jpg").write_bytes(b"")
    flags = (*flags, "--image_folder", folder, "--default_caption", "x", "--contact_sheet", tmp_path / "sheet.png")
    run_main(tool, [*flags, "--output_dir", tmp_path / "out"])
    out = capsys.readouterr().out
    assert f"usable: {len(ROTATED)}, rejected: 2" in out and "BytesIO" not in out
    assert "broken image" in out and "it begins with b'" in out
    if "--check" not in flags:
        height, width = PIXELS.shape[:2]
        for sample in read_all(tmp_path / "out").values():
            assert (sample["info"]["original_width"], sample["info"]["original_height"]) == (height, width)


def test_what_lacks_in_a_folder_is_named_by_the_ways_to_give_it(tool, photos, tmp_path, capsys):
    with pytest.raises(SystemExit, match="no usable sample"):
        run_main(tool, ["--check", "--image_folder", photos("a.png")])
    out = capsys.readouterr().out
    assert "a.png: needed: txt, text, caption or json beside it, metadata.jsonl/csv or --coco_annotations\n" in out
    assert "found" not in out
    shard = write_shard(tmp_path / "in.tar", [("0.5.png", PNG), ("0.5.txt", b"a")])
    with pytest.raises(SystemExit, match="found: 5.png, 5.txt .a key ends at the first dot, also that of 0.5.png: ren"):
        prepare(tool, tmp_path / "out", shards=[shard])


# -------------------------------------------------------------------------------------------- data sets, with pyarrow
def jpeg():
    stream = io.BytesIO()
    Image.new("RGB", (20, 16), "red").save(stream, "JPEG")
    return stream.getvalue()


ROWS_OF_A_TABLE = {
    "image": [{"bytes": PNG, "path": "a.png"}, {"bytes": jpeg(), "path": None}, {"bytes": None, "path": "sub/c.png"},
              None, {"bytes": PNG, "path": None}, {"bytes": None, "path": "https://u:pw@h/a.png"},
              {"bytes": None, "path": "../gone.png"}, {"bytes": b"", "path": None}],
    "text": ["a fox", "a cat", "a hen", "x", None, "x", "x", "x"],
    "pwatermark": [0.1, 0.2, 0.3, None, 0.1, 0.1, 0.1, 0.1],
}  # fmt: skip


@pytest.fixture
def table(tmp_path):
    """table(path, columns): writes a parquet or, as save_to_disk does, an arrow file."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    def write(path, columns=ROWS_OF_A_TABLE, is_stream=True):
        path = tmp_path / path
        path.parent.mkdir(parents=True, exist_ok=True)
        found = pyarrow.table(columns)
        if path.suffix == ".parquet":
            parquet.write_table(found, path, row_group_size=3)
        else:
            make = pyarrow.ipc.new_stream if is_stream else pyarrow.ipc.new_file
            with make(path, found.schema) as writer:
                writer.write_table(found, max_chunksize=3)
        return path

    return write


def save_to_disk(table, name, parts=({"image": [{"bytes": PNG, "path": None}], "text": ["a"]},), **state):
    """A folder as Dataset.save_to_disk leaves it."""
    files = [table(f"{name}/data-{i:05}-of-{len(parts):05}.arrow", columns) for i, columns in enumerate(parts)]
    state = {"_data_files": [{"filename": file.name} for file in files], "_split": "train", **state}
    (files[0].parent / "state.json").write_text(json.dumps(state))
    (files[0].parent / "dataset_info.json").write_text("{}")
    return files[0].parent


@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather", "save_to_disk", "folder"])
def test_data_sets_of_hugging_face(tool, photos, table, tmp_path, kind):
    if kind == "save_to_disk":
        path = save_to_disk(table, "set", [ROWS_OF_A_TABLE])
        file = path / "data-00000-of-00001.arrow"
    elif kind == "folder":
        file = table("set/train-00000-of-00001.parquet")
        path = file.parent
        (path / "README.md").write_text("a card")
    else:
        path = file = table(f"set/data.{'arrow' if kind == 'feather' else kind}", is_stream=kind != "feather")
    photos("c.png")
    (tmp_path / "in").rename(file.parent / "sub")
    run_main(tool, ["--dataset", path, "--max_pwatermark", "0.25", "--output_dir", tmp_path / "out"])
    index, samples = json.loads((tmp_path / "out" / "index.json").read_text()), read_all(tmp_path / "out")
    assert {source: sample["info"]["captions"] for source, sample in samples.items()} == {
        f"{file}#000000": ["a fox"], f"{file}#000001": ["a cat"]}  # fmt: skip
    assert samples[f"{file}#000000"]["png"] == PNG and samples[f"{file}#000001"]["jpg"] == jpeg()
    assert samples[f"{file}#000001"]["info"]["pwatermark"] == 0.2
    assert rejected(index) == {"above max_pwatermark": 1, "no image": 3, "no caption": 1, "broken image": 1}
    assert index["rejected"]["no image"][1] == f"{file}#000003: the row has none"
    assert index["rejected"]["no caption"][1] == f"{file}#000004: needed: a text in the column text"
    flags = ["--dataset", path, "--default_caption", "mine", "--output_dir", tmp_path / "default"]
    run_main(tool, flags)
    found = captions_of(tmp_path / "default")
    assert found[f"{file}#000002"] == ["a hen"] and found[f"{file}#000004"] == ["mine"] and len(found) == 4
    assert not any(b":pw@" in path.read_bytes() for path in (tmp_path / "default").iterdir())
    run_main(tool, flags)  # it is complete, and is told so again


def test_columns_of_data_sets(tool, table, tmp_path, capsys):
    text = ["a", "b"]
    path = table("a.parquet", {"jpg": [PNG, jpeg()], "txt": text, "prompt": [["1", None, "2"], None], "n": [1, 2]})
    run_main(tool, ["--dataset", path, "--output_dir", tmp_path / "a"])
    assert list(captions_of(tmp_path / "a").values()) == [["a"], ["b"]]
    assert [sample["info"]["n"] for sample in read_all(tmp_path / "a").values()] == [1, 2]
    run_main(tool, ["--dataset", path, "--caption_column", "prompt", "--output_dir", tmp_path / "b"])
    assert list(captions_of(tmp_path / "b").values()) == [["1", "2"]]
    two = {"before": [{"bytes": PNG, "path": None}], "after": [{"bytes": jpeg(), "path": None}], "text": ["c"]}
    path = table("two.parquet", two)
    with pytest.raises(SystemExit, match=r"needs an --image_column \(before or after\); columns: before, after, text"):
        run_main(tool, ["--dataset", path, "--output_dir", tmp_path / "c"])
    run_main(tool, ["--dataset", path, "--image_column", "after", "--output_dir", tmp_path / "c"])
    assert read_all(tmp_path / "c")[f"{path}#000000"]["jpg"] == jpeg()
    capsys.readouterr()
    run_main(tool, ["--check", "--dataset", path, "--image_column", "after", "--contact_sheet", tmp_path / "s.png"])
    assert "samples: 1, usable: 1" in capsys.readouterr().out
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "p.png").write_bytes(PNG)
    path = table(
        "paths.parquet", {"image": ["pictures/p.png", "/dev/zero", "x" * 5000, "a\0b"], "caption": list("pzxn")}
    )
    run_main(tool, ["--dataset", path, "--output_dir", tmp_path / "d"])
    assert captions_of(tmp_path / "d") == {f"{path}#000000": ["p"]}


def test_data_sets_of_several_files_are_jobs(tool, table, tmp_path):
    parts = [{"image": [{"bytes": PNG, "path": None}] * 2, "text": [f"{part}a", f"{part}b"]} for part in range(3)]
    path = save_to_disk(table, "set", parts)
    run_main(tool, ["--dataset", path, "--output_dir", tmp_path / "out"])
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert [shard["samples"] for shard in index["shards"]] == [2, 2, 2]
    assert [texts[0] for texts in captions_of(tmp_path / "out").values()] == ["0a", "0b", "1a", "1b", "2a", "2b"]
    broken = path / "data-00001-of-00003.arrow"
    broken.write_bytes(broken.read_bytes()[:-700])  # its schema is there
    with pytest.raises(SystemExit, match="1 of 3 jobs are not done|set.data-00001-of-00003.arrow cannot be read"):
        run_main(tool, ["--dataset", path, "--output_dir", tmp_path / "other"])


def two_splits(table):
    table("s/data/train-00000-of-00001.parquet")
    return table("s/data/test-00000-of-00001.parquet").parent


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda table: table("x.parquet", {"image": [PNG]}), "needs a --caption_column, or --default_caption; columns"),
        (
            lambda table: table("x.parquet", {"text": ["a"]}),
            r"needs an --image_column \(none of these holds pictures",
        ),
        (
            lambda table: table("x.parquet", {"image": [7], "text": ["a"]}),
            "none of these holds .*; columns: image, text",
        ),
        (lambda _: Path("x.csv"), "x.csv is no folder, and no .parquet or .arrow file"),
        (lambda table: save_to_disk(table, "set", _indices_files=[{"filename": "i.arrow"}]), "flatten_indices"),
        (two_splits, r"holds more than one split or set \(test, train\): name the files or a folder within it"),
        (lambda table: save_to_disk(table, "set/train").parent, None),
        (lambda _: Path("nowhere.parquet"), "nowhere.parquet cannot be read: .*nowhere.parquet"),
        (lambda table: table("e/x.parquet").unlink() or Path("e"), "holds no .parquet or .arrow files"),
        (lambda table: table("f/x.parquet").write_bytes(b"no table") and Path("f"), "x.parquet cannot be read: "),
    ],
)
def test_data_sets_that_are_refused(tool, table, tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)
    path = make(table)
    if message is None:  # the folder of a DatasetDict
        (path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
        message = f"has the splits train, test: give one of them, as {path}/train"
    with pytest.raises(SystemExit, match=f"^error: --dataset .*{message}") as error:
        run_main(tool, ["--dataset", path, "--output_dir", "out"])
    assert "\n" not in str(error.value)
    if "splits" in message:
        (path / "dataset_dict.json").write_text('{"splits": ["train"]}')
        run_main(tool, ["--dataset", path, "--output_dir", "out"])
        assert list(captions_of("out").values()) == [["a"]]


def test_a_folder_of_tables_is_told_what_it_is(tool, tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(SystemExit, match="holds no jpg, jpeg, png, webp but .parquet files: --dataset?"):
        prepare(tool, tmp_path / "out", folder=tmp_path)


def test_without_pyarrow_it_is_asked_for(tool, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(SystemExit, match="^error: --dataset needs pyarrow, .*: pip install pyarrow"):
        run_main(tool, ["--dataset", tmp_path / "a.parquet", "--output_dir", tmp_path / "out"])
