"""Captions, shards, pictures and servers as people have them: what is read of them, and what is said of the rest."""

import base64
import bz2
import contextlib
import gzip
import http.server
import io
import json
import lzma
import random
import shutil
import socket
import struct
import tarfile
import threading
import urllib.parse
import zlib
from collections import Counter

import numpy as np
import pytest
from conftest import image_bytes, tiny_args, write_shard
from PIL import Image

PNG = image_bytes()
needs_curl = pytest.mark.skipif(not shutil.which("curl"), reason="webdataset opens http URLs with curl")


def make_args(lcm, *flags):
    return lcm.parse_args(tiny_args("teacher", "0.tar", "out", *map(str, flags)))


def outcome(lcm, url, *flags):
    """Captions of the usable samples of a shard, and the others by reason."""
    captions, reasons, args = [], Counter(), make_args(lcm, *flags)
    for sample in lcm.read_shard(str(url), args.shard_timeout):
        try:
            captions.append(lcm.decode_sample(sample, args, random.Random(0))["captions"])
        except lcm.BadSample as bad:
            reasons[bad.args[0]] += 1
    return captions, dict(reasons)


# --------------------------------------------------------------------------------------------------------- captions
@pytest.mark.parametrize(
    "content, captions",
    [
        ('{"caption": NaN}', []),
        ('{"caption": -Infinity}', []),
        ('{"caption": null}', []),
        ('{"caption": false}', []),
        ('{"caption": true}', []),
        ('{"caption": {"en": "a fox"}}', []),
        ('{"caption": [null, false, NaN, {}, ["a fox"]]}', []),
        ('{"caption": [null, "a fox", NaN, "a cat"]}', ["a fox", "a cat"]),
        ('{"caption": [1, true, 2.5, false, 0]}', ["1", "2.5", "0"]),
        ('{"caption": NaN, "text": "a fox"}', ["a fox"]),
        ('{"caption": [], "captions": ["a fox"], "text": "a cat"}', ["a fox"]),
        ('{"caption": 7}', ["7"]),
        ('{"caption": 1e400}', []),
        ('{"caption": 1' + 400 * "0" + "}", ["1" + 400 * "0"]),
        ('{"caption": "nan"}', ["nan"]),  # a text: it may be the bread
        ('{"caption": ""}', [""]),
        ('{"caption": ["", null]}', [""]),
        ('{"url": "x"}', []),
    ],
)
def test_captions_are_texts_and_numbers_alone(lcm, content, captions):
    sample = {"__key__": "key", "png": PNG, "json": content.encode()}
    assert lcm.read_captions(sample, json.loads(content)) == captions
    args = make_args(lcm)
    if captions:
        assert lcm.decode_sample(sample, args, random.Random(0))["captions"] in captions
    else:
        with pytest.raises(lcm.BadSample, match="no caption.*needed: txt, text, caption or caption in the json"):
            lcm.decode_sample(sample, args, random.Random(0))


# ------------------------------------------------------------------------------------------------------------ shards
def tar_bytes(*numbers, end=True):
    """A tar of samples whose captions are these numbers, without its end mark if it shall have none."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as shard:
        for number in numbers:
            for name, data in {f"{number}.png": PNG, f"{number}.txt": str(number).encode()}.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))
        place = shard.offset
    return stream.getvalue() if end else stream.getvalue()[:place]


A, B, EMPTY = tar_bytes(0, 1), tar_bytes(2), tar_bytes()
FAULT = {"unreadable shard": 1}


@pytest.mark.parametrize(
    "data, captions, reasons",
    [
        (A + B, "01", FAULT),
        (EMPTY + A, "", FAULT),
        (A + EMPTY + EMPTY, "01", {}),
        (A + bytes(700), "01", {}),
        (tar_bytes(0, end=False) + B, "02", {}),
        (A + B[:700], "01", FAULT),
        (A + b"<html>404</html>" * 100, "01", FAULT),
        (A + b"x", "01", FAULT),
        (tar_bytes(0, end=False) + b"?" + B[1:], "0", FAULT),  # a damaged header
        (gzip.compress(A), "01", {}),
        (gzip.compress(A) + gzip.compress(B), "01", FAULT),
        (bz2.compress(A) + bz2.compress(B), "01", FAULT),
        (lzma.compress(A) + lzma.compress(B), "01", FAULT),
        (gzip.compress(A) + bytes(512), "01", {}),
        (gzip.compress(A) + b"garbage", "01", FAULT),
        (b"", "", FAULT),
        (b"\x1f", "", FAULT),
    ],
)
@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_what_follows_the_end_of_a_tar_is_a_fault(lcm, tmp_path, monkeypatch, data, captions, reasons, kind):
    monkeypatch.setattr(lcm.time, "sleep", lambda _: None)
    (tmp_path / "0.tar").write_bytes(data)
    url = tmp_path / "0.tar" if kind == "file" else f"pipe:cat {tmp_path}/0.tar"
    assert outcome(lcm, url) == (list(captions), reasons)


def test_keys_with_dots_are_told(lcm, tmp_path):
    shard = write_shard(tmp_path / "0.tar", [("22.05.png", PNG), ("22.05.txt", b"a"), ("22.06.png", PNG)])
    with pytest.raises(
        SystemExit,
        match=r"no image \(needed: jpg, jpeg, png, webp; found: 05.png, 05.txt, 06.png "
        r"\(a key ends at the first dot, also that of 22.05.png: rename it\)\)$",
    ):
        lcm.check_shards([shard], make_args(lcm), {})


def test_members_that_lie_apart_are_told(lcm, tmp_path):
    members = [("0.png", PNG), ("1.png", PNG), ("0.txt", b"a"), ("1.txt", b"b")]
    with pytest.raises(SystemExit, match=r"2 × no caption .*found: png .*side by side: tar --sort=name") as error:
        lcm.check_shards([write_shard(tmp_path / "0.tar", members)], make_args(lcm), {})
    assert "2 × no image" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_lists_of_shards_of_other_systems(lcm, tmp_path, encoding):
    lines = ["a.tar", '"b c.tar"', "", "# comment", "'d{0..1}.tar'  ", '"e.tar']
    (tmp_path / "list.txt").write_bytes("\r\n".join(lines).encode(encoding))
    assert lcm.expand_shards([str(tmp_path / "list.txt")]) == ["a.tar", "b c.tar", "d0.tar", "d1.tar", '"e.tar']


def test_a_list_that_cannot_be_read_is_named_without_secrets(lcm):
    with pytest.raises(SystemExit, match="host/list.txt cannot be read or expanded: No such file") as error:
        lcm.expand_shards(["https://user:verysecret@host/list.txt"])
    assert "verysecret" not in str(error.value)


@pytest.mark.parametrize("line", ['"pipe:touch mark"', "\ufeff'pipe:touch mark'"])
def test_quoted_commands_in_lists_are_refused(lcm, tmp_path, line):
    (tmp_path / "list.txt").write_text(line, encoding="utf-8")
    with pytest.raises(SystemExit, match="may not hold pipe: commands"):
        lcm.expand_shards([str(tmp_path / "list.txt")])


# ----------------------------------------------------------------------------------------------------------- servers
@contextlib.contextmanager
def listening(handle):
    """An http server at 127.0.0.1 whose GET is `handle`, a function of the request; gives its host and port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        do_GET = handle
        log_message = lambda *_: None  # noqa: E731

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def answer(request, data, status=200):
    request.send_response(status)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    with contextlib.suppress(OSError):
        request.wfile.write(data)


def give(request, status=200):
    answer(request, A if status == 200 else b"no", status)


PASSWORD = "s3cr:et/pä@ß"
KINDS = {  # what the server says to a request
    "plain": lambda _: 200,
    "refuses ranges": lambda request: 416 if "Range" in request.headers else 200,
    "knows no Python": lambda request: 403 if "Python" in request.headers["User-Agent"] else 200,
    "password": lambda request: 200 if request.headers["Authorization"]
    == "Basic " + base64.b64encode(f"user:{PASSWORD}".encode()).decode() else 401,
    "a space": lambda request: 200 if request.path == "/b%20c.tar?d=%20e" else 404,
    "beyond ASCII": lambda request: 200 if request.path == "/%C3%BC%20f.tar" else 404,
    "quoted before": lambda request: 200 if request.path == "/%C3%BC%2f.tar?a=%20" else 404,
}  # fmt: skip
URLS = {
    "password": f"http://user:{urllib.parse.quote(PASSWORD, safe='')}@HOST/0.tar",
    "a space": "http://HOST/b c.tar?d= e",
    "beyond ASCII": "http://HOST/ü f.tar",
    "quoted before": "HTTP://HOST/ü%2f.tar?a=%20",
}


@needs_curl
@pytest.mark.parametrize("kind", KINDS)
def test_the_check_takes_what_the_reader_takes(lcm, kind):
    with listening(lambda request: give(request, KINDS[kind](request))) as host:
        url = URLS.get(kind, "http://HOST/0.tar").replace("HOST", host)
        lcm.check_shards([url], make_args(lcm), {})
        assert outcome(lcm, url) == (["0", "1"], {})


@pytest.mark.parametrize(
    "url",
    [
        "http://user:verysecret@HOST/0.tar",
        "http://user:very/secret@HOST/0.tar",
        "http://user:very secret@HOST/0.tar",
        "http://user:very@secret@HOST/0.tar",
        "http://user:verysecret@HOST:80x/0.tar",
        "http://user:verysecret@127.0.0.1:99999/0.tar",
        "http://user:verysecret@[::1/0.tar",
        "http://HOST/0 0.tar?token=verysecret",
        "http://verysecret@HOST/ü.tar?sig=very%20secret",
    ],
)
def test_a_url_that_is_refused_is_one_line_without_secrets(lcm, url):
    with listening(lambda request: give(request, 401)) as host, pytest.raises(SystemExit) as error:
        lcm.check_shards([url.replace("HOST", host)], make_args(lcm, "--shard_timeout", 1), {})
    text = str(error.value)
    assert text.startswith("error: 1 of 1 shards cannot be read: http") and "\n" not in text
    assert "very" not in text and "secret" not in text


@pytest.mark.parametrize("words", [b"SSH-2.0-OpenSSH_9.6\r\n", b"\x15\x03\x01\0\2\2\n", b"", b"HTTP/1.1 999999 \r\n"])
def test_a_server_that_does_not_speak_http_is_one_line(lcm, words):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def speak():
            with contextlib.suppress(OSError):
                while True:
                    with server.accept()[0] as connection:
                        connection.recv(1 << 16)
                        connection.sendall(words)

        threading.Thread(target=speak, daemon=True).start()
        with pytest.raises(SystemExit, match=r"1 of 1 shards cannot be read: http://127.*/0.tar \(.+\)$") as error:
            lcm.check_shards([f"http://127.0.0.1:{server.getsockname()[1]}/0.tar"], make_args(lcm), {})
        server.shutdown(socket.SHUT_RDWR)
    assert "\n" not in str(error.value) and "\r" not in str(error.value)


def test_a_server_that_stalls_does_not_hang_the_check(lcm):
    asked = threading.Event()
    with listening(lambda _: asked.wait(20)) as host:
        with pytest.raises(SystemExit, match="no data for 0.3 s"):
            lcm.check_shards([f"http://{host}/{i}.tar" for i in range(8)], make_args(lcm, "--shard_timeout", 0.3), {})
        asked.set()


@pytest.mark.parametrize(
    "text, kept",
    [
        ("http://user:very@secret@host/a.tar", "host/a.tar"),
        ("http://user:very/secret@host/a.tar", "host/a.tar"),
        ("http://user:very secret@host/a.tar", "host/a.tar"),
        ("error of https://user:verysecret@host:80x/ (port '80x')", "host:80x/ (port '80x')"),
    ],
)
def test_redact_knows_passwords_with_letters_that_no_url_may_hold(lcm, text, kept):
    assert "very" not in lcm.redact(text) and "secret" not in lcm.redact(text) and kept in lcm.redact(text)


@pytest.mark.parametrize(
    "text", ["https://host:8080/@user/a.tar", "https://host/a@b.tar", "http://host:80 and me@here"]
)
def test_redact_leaves_hosts_and_paths(lcm, text):
    assert lcm.redact(text) == text


# --------------------------------------------------------------------------------------------------------- pictures
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
TURNED = b"MM\0*" + struct.pack(">IH", 8, 1) + struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0) + bytes(4)
ODD = b"II*\0" + struct.pack("<IH", 8, 3) + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + (
    struct.pack("<HHI", 0x011A, 2, 4) + b"72\0\0" + struct.pack("<HHI", 0x8769, 2, 4) + b"abcd" + bytes(4))  # fmt: skip


def encode(kind, **options):
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind, body, crc=0):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ crc)


def png(*chunks, at=33):
    """A PNG with more chunks behind its header, or elsewhere."""
    data = encode("PNG")
    return data[:at] + b"".join(chunks) + data[at:]


def segment(marker, body):
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def jpeg(*segments):
    data = encode("JPEG", quality=100, subsampling=0)
    return data[:2] + b"".join(segments) + data[2:]


def webp(**options):
    return encode("WEBP", lossless=True, **options)


def xmp(orientation):
    return b'<x tiff:Orientation="%d">' % orientation


LONG, RAW = zlib.compress(bytes(2 << 20)), b"Raw profile type exif\0"
HEX = b"\nexif\n%8d\n" % (6 + len(TURNED)) + (b"Exif\0\0" + TURNED).hex().encode()
TURN = png(chunk(b"eXIf", TURNED))[33 : 33 + 12 + len(TURNED)]
UPRIGHT = {
    "PNG: wrong checksum of a text": png(chunk(b"tEXt", b"a\0b", 1)),
    "PNG: EXIF is garbage": png(chunk(b"eXIf", b"garbage!!")),
    "PNG: EXIF in hexadecimal is none": png(chunk(b"tEXt", RAW + b"\nexif\n   8\nzz")),
    "PNG: a long compressed text": png(chunk(b"zTXt", b"workflow\0\0" + LONG)),
    "PNG: a long international text": png(chunk(b"iTXt", b"workflow\0\1\0\0\0" + LONG)),
    "PNG: a long text behind the pixels": png(chunk(b"zTXt", b"workflow\0\0" + LONG), at=-12),
    "PNG: a colour profile of one byte": png(chunk(b"iCCP", b"x")),
    "PNG: a colour profile by an unknown method": png(chunk(b"iCCP", b"x\0\1abc")),
    "PNG: a large colour profile": png(chunk(b"iCCP", b"x\0\0" + LONG)),
    "PNG: short pHYs": png(chunk(b"pHYs", b"x")),
    "PNG: short gAMA, sRGB, cHRM": png(chunk(b"gAMA", b""), chunk(b"sRGB", b""), chunk(b"cHRM", b"x")),
    "PNG: wrong checksum of EXIF": png(chunk(b"eXIf", TURNED, 1)),
    "PNG: wrong checksum of a transparent colour": png(chunk(b"tRNS", bytes(6), 1)),
    "PNG: a transparent colour cut short": png(chunk(b"tRNS", b"ab")),
    "PNG: empty EXIF, transparent colour": png(chunk(b"tRNS", b""), chunk(b"eXIf", b"")),
    "JPEG: JFIF cut short": jpeg(segment(0xE0, b"JFIF\0")),
    "JPEG: Adobe's segment cut short": jpeg(segment(0xEE, b"Adobe")),
    "PNG: short acTL": png(chunk(b"acTL", b"a")),
    "JPEG: a short colour profile": jpeg(segment(0xE2, b"ICC_PROFILE\0")),
    "JPEG: EXIF is garbage": jpeg(segment(0xE1, b"Exif\0\0garbage")),
    "WebP: EXIF is garbage": webp(exif=b"Exif\0\0garbage!!"),
    "WebP: a colour profile that is none, cut in XMP": webp(icc_profile=b"x", xmp=xmp(6))[:-9],
    "unknown orientation": jpeg(segment(0xE1, b"Exif\0\0" + TURNED.replace(b"\0\6", b"\0\x2a"))),
}  # fmt: skip
ROTATED = {
    "PNG: other odd tags": png(chunk(b"eXIf", ODD)),
    "JPEG: other odd tags": jpeg(segment(0xE1, b"Exif\0\0" + ODD)),
    "WebP: other odd tags": webp(exif=b"Exif\0\0" + ODD),
    "PNG: a broken text": png(chunk(b"tEXt", b"a\0b", 1), chunk(b"eXIf", TURNED)),
    "PNG: EXIF behind the pixels, a broken profile": png(chunk(b"iCCP", b"x"), chunk(b"pHYs", b""))[:-12]
    + TURN + chunk(b"IEND", b""),
    "PNG: wrong checksum of a transparent colour, EXIF": png(chunk(b"tRNS", bytes(6), 1), chunk(b"eXIf", TURNED)),
    "JPEG: JFIF cut short, EXIF": jpeg(segment(0xE0, b"JFIF\0"), segment(0xE1, b"Exif\0\0" + TURNED)),
    "JPEG: a broken profile": jpeg(segment(0xE1, b"Exif\0\0" + TURNED), segment(0xE2, b"ICC_PROFILE\0")),
    "JPEG: XMP, a broken profile": jpeg(segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + xmp(6)),
                                        segment(0xE2, b"ICC_PROFILE\0")),
    "WebP: cut in XMP": webp(exif=b"Exif\0\0" + TURNED, xmp=xmp(6))[:-9],
}  # fmt: skip


@pytest.mark.parametrize("name", [*UPRIGHT, *ROTATED])
def test_pictures_with_odd_metadata_are_used(lcm, name):
    image, size = lcm.load_image({**UPRIGHT, **ROTATED}[name], 16, Image.Resampling.NEAREST)
    expected = np.rot90(PIXELS, -1) if name in ROTATED else PIXELS
    assert image.mode == "RGB" and size == image.size == expected.shape[1::-1]
    difference = np.abs(np.asarray(image).astype(int) - expected)
    assert difference.max() == 0 if "JPEG" not in name and "unknown" not in name else difference.mean() < 3


def test_transparency_survives_broken_metadata(lcm):
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 8, 7)).save(stream, "PNG", transparency=(9, 8, 7))
    data = stream.getvalue()
    found = lcm.load_image(data[:33] + chunk(b"iCCP", b"x") + data[33:], 16, Image.Resampling.NEAREST)[0]
    assert set(found.getdata()) == {(255, 255, 255)}


def test_a_decompression_bomb_is_called_large(lcm):
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    data = encode("PNG")
    data = data[:8] + chunk(b"IHDR", header) + data[33:]
    with pytest.raises(lcm.BadSample) as error:
        lcm.load_image(data, 16, Image.Resampling.NEAREST)
    assert error.value.args[0] == "image too large"


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "begins with b''"),
        (b"<html>404</html>", "no JPEG, PNG or WebP that can be read, it begins with b'<html>40'"),
        (b"GIF89a" + bytes(50), "no JPEG, PNG or WebP that can be read, it begins with b'GIF89a"),
        (png(chunk(b"tEXt", b"a\0b", 1))[:300], "truncated"),
        (PNG[:16] + b"\0\0\0\7" + PNG[20:], "no JPEG, PNG or WebP that can be read"),  # a width of 7: wrong checksum
        (PNG[:29] + bytes(4) + PNG[33:], "no JPEG"),
        (webp(exif=b"Exif\0\0" + TURNED)[:300], "OSError"),
        (jpeg(segment(0xE2, b"ICC_PROFILE\0"))[:400], "OSError: Truncated File Read"),
        (b"\xff\xd8\xff", ""),
        (b"\xff\xd8\xff\xe1\0\0\xff\xe2", "no JPEG"),
        (b"\x89PNG\r\n\x1a\n\0\0", "no JPEG"),
        (b"RIFF\0\0\0\0WEBP", "begins with b'RIFF"),
    ],
)
def test_what_is_no_picture_is_named_by_its_bytes(lcm, data, message):
    with pytest.raises(lcm.BadSample) as error:
        lcm.load_image(data, 16, Image.Resampling.NEAREST)
    assert error.value.args[0] == "broken image" and message in error.value.args[1]
    assert "BytesIO" not in error.value.args[1] and "\n" not in error.value.args[1]
