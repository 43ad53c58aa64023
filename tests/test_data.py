"""Tests of data.py: pictures of every kind, captions in every layout, buckets."""

import io
import json
import os
import re
import struct
import tarfile
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import (
    MAX_TEXT, ImageFiles, aspect_buckets, check_problems,
    clean_captions, from_tensor, nearest_bucket, read_image, read_lines, readable,
    resize_and_crop, to_tensor)

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("DATA_DIR", ROOT.parent / "shared" / "data"))
needs_data = pytest.mark.skipif(not (DATA / "bad" / "expected.json").is_file(),
                                reason=f"no test data in {DATA}")
EXPECTED = []
if not needs_data.args[0]:
    EXPECTED = json.loads((DATA / "bad" / "expected.json").read_text())


def listed(folder):
    """The entries of expected.json of one folder, as test parameters."""
    entries = [entry for entry in EXPECTED if entry["file"].startswith(folder)]
    return pytest.mark.parametrize("entry", entries, ids=[entry["file"] for entry in entries])


# ---- One picture ---------------------------------------------------------------------------------


def pattern(width=24, height=16):
    """A picture without any symmetry: red grows to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), 0 * x + 40], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def solid(value, size=8):
    return encoded(Image.new("RGB", (size, size), (value, value, value)))


def png_claiming(width, height, depth=8, color=2, pixels=b"\0" * 64, extra=b""):
    """A PNG with this header, whatever pixels follow."""
    def chunk(kind, body):
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra
            + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b""))


def distance(image, other):
    """The largest difference of two pictures' pixels."""
    return np.abs(np.asarray(image).astype(int) - np.asarray(other).astype(int)).max()


@pytest.fixture
def read(tmp_path):
    """read_image of bytes, through a file."""
    def read(content, **options):
        (tmp_path / "picture").write_bytes(content)
        return read_image(tmp_path / "picture", **options)
    return read


def test_transparency_is_laid_on_white_or_on_what_is_asked_for(read):
    alpha = Image.new("L", (24, 16), 255)
    alpha.paste(0, (12, 0, 24, 16))
    for mode in ("RGB", "L"):
        for background in ("white", "black"):
            image = pattern().convert(mode)
            behind = Image.new(mode, image.size, background)
            expected = Image.composite(image, behind, alpha).convert("RGB")
            image.putalpha(alpha)
            assert distance(read(encoded(image), background=background), expected) == 0
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 0, 0])
    palette.putdata([0, 1])
    for transparency in (0, bytes([0, 255])):                         # one colour, or all alphas
        image = read(encoded(palette, transparency=transparency))
        assert np.asarray(image).tolist() == [[[255] * 3, [200, 0, 0]]]


def test_16_bit_gray_is_scaled_and_not_clipped(read):
    gray = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # every 8-bit gray x 257
    pixels = np.asarray(read(encoded(Image.fromarray(gray))))
    assert (pixels == (gray // 257)[..., None]).all()


def turned(orientation):
    """The pattern as a camera with this EXIF orientation stores it, and its EXIF block."""
    turn = Image.Transpose
    turns = [None, turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE,
             turn.ROTATE_90, turn.TRANSVERSE, turn.ROTATE_270]
    exif = Image.Exif()
    exif[0x0112] = orientation
    if orientation == 1 or orientation > 8:
        return pattern(), exif
    return pattern().transpose(turns[orientation - 1]), exif


@pytest.mark.parametrize("orientation", [*range(1, 9), 99])
def test_every_exif_orientation_comes_out_upright_and_headers_tell_the_size(tmp_path, orientation):
    stored, exif = turned(orientation)
    for kind in ("PNG", "WEBP", "JPEG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = encoded(stored, kind, exif=exif, **options)
        write_files(tmp_path, {f"a.{kind}": content, "a.txt": "a"})
        source = ImageFiles(tmp_path)
        assert source.picture_size(0) == (16, 24)
        assert distance(picture(source, 0), pattern()) <= (60 if kind == "JPEG" else 0), kind
        (tmp_path / f"a.{kind}").unlink()


def test_a_broken_exif_block_does_not_lose_the_picture(read):
    for block in (b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"Exif\0\0"):
        content = encoded(pattern(), "JPEG", quality=95, exif=block)
        assert distance(read(content), pattern()) < 40


def test_the_first_frame_of_an_animation_is_taken(read):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP"):
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert read(content).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("content, reason", [
    (b"", "it begins with b''"),
    (b"<!DOCTYPE html><html>404</html>", "begins with b'<!DOCTYPE ht'"),
    (encoded(pattern(96, 64))[:150], "truncated"),
    (encoded(pattern(96, 64), "JPEG")[:700], "truncated"),
    (encoded(pattern(), "JPEG")[:24], "cannot be decoded|not a"),
    (png_claiming(60000, 60000), "3600000000 pixels"),
    (png_claiming(18000, 10000), "180000000 pixels"),                 # Pillow's limit is 178956970.
    (png_claiming(10_000, 9_500, depth=1, color=0), "cannot be decoded"),     # Pillow would warn.
    (encoded(Image.new("F", (4, 4)), "TIFF"), "not a PNG"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "begins with b'%!PS"),
], ids=["empty", "html", "cut png", "cut jpeg", "jpeg header", "huge", "large", "one bit",
        "float", "postscript"])
def test_what_cannot_be_used_is_refused_with_its_name_and_the_reason(tmp_path, content, reason):
    file = tmp_path / "broken.png"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        read_image(file)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="pipe.png: .*a pipe or a device"):
        read_image(tmp_path / "pipe.png")                             # It would wait for ever.
    for path, reason in (("/dev/zero", "a device"), (tmp_path, "a folder"),
                         (tmp_path / "nowhere.png", "nowhere.png: No such file")):
        with pytest.raises(ValueError, match=reason):
            read_image(path)


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_files(tmp_path, {"pics/a.png": solid(5), "pics/a.txt": "a", "list.txt": "x"})
    assert read_image("~/pics/a.png").size == (8, 8) and len(ImageFiles("~/pics")) == 1
    assert read_lines("~/list.txt") == ["x"]


def test_resize_and_crop_covers_keeps_the_aspect_and_takes_the_centre():
    stripes = np.zeros((100, 300, 3), np.uint8)
    for i in range(3):
        stripes[:, 100 * i : 100 * (i + 1), i] = 255                  # red, green, blue
    for image in (Image.fromarray(stripes), Image.fromarray(stripes.transpose(1, 0, 2))):
        middle = np.asarray(resize_and_crop(image, 50, 50))
        assert middle.shape == (50, 50, 3) and (middle[3:-3, 3:-3] == (0, 255, 0)).all()
    assert distance(resize_and_crop(pattern(60, 90), 90, 60), pattern(60, 90)) == 0
    x = np.asarray(resize_and_crop(pattern(256, 64), 32, 32))[:, :, 0].mean(axis=0)
    assert abs(x[0] - 96) < 3 and abs(x[-1] - 159) < 3                # the middle quarter
    assert np.ptp(np.diff(x)) < 2                                     # not stretched


def test_resizing_is_antialiased():
    board = (np.indices((512, 512)).sum(axis=0) % 2 * 255).astype(np.uint8)
    for size in (64, 100, 200):
        small = resize_and_crop(Image.fromarray(board).convert("RGB"), size, size)
        assert np.abs(np.asarray(small).astype(int) - 127.5).max() < 12


@pytest.mark.parametrize("width, height", [(1, 1), (20000, 1), (1, 20000), (3, 5), (999, 777)])
def test_any_picture_can_be_brought_to_any_size(width, height):
    for target in ((64, 64), (7, 96), (333, 259)):
        image = resize_and_crop(Image.new("RGB", (width, height), "red"), *target)
        assert image.size == target[::-1]


def test_tensors_are_in_minus_one_to_one_and_the_round_trip_is_exact():
    ramp = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    ramp.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for image in (ramp, Image.fromarray(ramp)):
            tensor = to_tensor(image)
            assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32
            assert tensor.is_contiguous() and tensor.min() == -1 and tensor.max() == 1
            assert (np.asarray(from_tensor(tensor)) == ramp).all()
    assert tensor[2, 0, 1] == ramp[0, 1, 2] / 127.5 - 1               # channels, rows, columns


def test_from_tensor_clamps_and_rounds():
    tensor = torch.tensor([-9.0, -1.0, 1.4 / 127.5 - 1, 1.6 / 127.5 - 1, 1.0, 9.0]).expand(3, 1, 6)
    for precision in (torch.float32, torch.float64):
        pixels = np.asarray(from_tensor(tensor.to(precision).requires_grad_()))
        assert pixels[0, :, 0].tolist() == [0, 0, 1, 2, 255, 255]


# ---- Aspect ratios -------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution, step", [(64, 16), (256, 16), (320, 16), (512, 64),
                                              (1024, 64)])
def test_buckets_have_about_the_same_area_in_both_orientations(resolution, step):
    buckets = aspect_buckets(resolution)
    assert (resolution, resolution) in buckets and len(set(buckets)) == len(buckets)
    assert max(max(size) / min(size) for size in buckets) == 4
    for height, width in buckets:
        assert height % step == width % step == 0 and (width, height) in buckets
        assert abs(height * width - resolution**2) <= step / 2 * min(height, width)


def test_a_picture_goes_to_the_nearest_ratio_in_the_logarithm():
    buckets = [(64, 64), (48, 80), (80, 48), (32, 128)]
    pictures = [(500, 500), (300, 400), (400, 300), (100, 900), (900, 100)]
    assert [nearest_bucket(*size, buckets) for size in pictures] == [
        (64, 64), (48, 80), (80, 48), (32, 128), (80, 48)]
    two = [(64, 64), (48, 80)]                                        # sqrt(5 / 3) = 1.29099
    assert nearest_bucket(1000, 1290, two) == (64, 64) != nearest_bucket(1000, 1292, two)


def test_headers_alone_say_how_large_pictures_are(tmp_path):
    """Each of these decodes to 60 megapixels or cannot be decoded at all."""
    big = Image.effect_noise((3000, 2000), 90).convert("RGB")
    write_files(tmp_path, {"a.png": png_claiming(9000, 7000), "a.txt": "a", "b.txt": "b",
                           "b.webp": encoded(big, "WEBP", quality=90)})
    assert (tmp_path / "b.webp").stat().st_size > 2**18
    source, start = ImageFiles(tmp_path), time.process_time()
    for _ in range(5):
        assert [source.picture_size(i) for i in range(2)] == [(7000, 9000), (2000, 3000)]
    assert time.process_time() - start < 0.5                          # it was 10 x .1 to .4 s


# ---- Text files ----------------------------------------------------------------------------------


def test_lines_end_at_newlines_only_and_a_byte_order_mark_is_no_text(tmp_path):
    text = "\ufeffa red circle\r\nb\u2028c\x0bd\x85e\x0cf\n\ng\rh"
    (tmp_path / "prompts.txt").write_bytes(text.encode())
    assert read_lines(tmp_path / "prompts.txt") == [
        "a red circle", "b\u2028c\x0bd\x85e\x0cf", "", "g\rh"]


@pytest.mark.parametrize("content", ["café".encode("latin-1"), "hello".encode("utf-16")])
def test_text_that_is_not_utf_8_is_refused_with_the_files_name(tmp_path, content):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(ValueError, match="prompts.txt is not UTF-8; save it again"):
        read_lines(tmp_path / "prompts.txt")


def test_endless_lines_and_caption_files_of_gigabytes_are_not_read(tmp_path):
    with pytest.raises(ValueError, match=f"/dev/zero line 1 has over {MAX_TEXT} characters"):
        read_lines("/dev/zero")
    write_files(tmp_path, {"a.png": solid(1), "a.txt": "a", "b.png": solid(2), "b.txt": "b"})
    with open(tmp_path / "b.txt", "wb") as file:
        file.truncate(2**33)                                          # It takes no space.
    write_files(tmp_path, {"c.png": solid(3), "c.txt": "\u00e4 " * MAX_TEXT})
    source = ImageFiles(tmp_path)                                     # Nothing is cut in silence.
    assert len(source) == 1
    assert source.problems == [f"{name}.txt: it has {MAX_TEXT} bytes or more" for name in "bc"]


# ---- Pictures with captions, in every layout -----------------------------------------------------


def write_tar(path, members):
    with tarfile.open(path, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(n, broken=()):
    """n pictures with a caption each, as tar members; those in `broken` are not pictures."""
    members = []
    for i in range(n):
        picture = b"broken" if i in broken else solid(i % 256, 4)
        members += [(f"{i:04}.png", picture), (f"{i:04}.txt", b"number %d" % i)]
    return members


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def picture(source, index):
    return read_image(source.records[index])


def all_captions(source):
    return [source.captions(i) for i in range(len(source))]


PICTURES = {"a.png": solid(10), "deep/b.PNG": solid(20), "deep/er/c.v2.png": solid(30)}
TEXTS = {"a.txt": "first", "deep/b.txt": 'second, "quoted"',
         "deep/er/c.v2.txt": "das dritte: größer"}


def layout(kind, folder):
    """The same three pictures in one of the layouts; returns what to give to ImageFiles."""
    rows = list(zip(PICTURES, TEXTS.values(), strict=True))
    if kind == "folder":
        return write_files(folder, PICTURES | TEXTS)
    if kind in ("tar", "folder of tars"):
        texts = {name: text.encode() for name, text in TEXTS.items()}
        tar = write_tar(folder / "x-0.tar", sorted((PICTURES | texts).items()))
        return tar if kind == "tar" else folder
    write_files(folder, PICTURES)
    lines = [json.dumps({"file_name": f"./{name}", "caption": text}) for name, text in rows]
    write_files(folder, {"metadata.jsonl": "\n\n".join(lines)})
    return folder / "metadata.jsonl" if kind == "a jsonl" else folder


@pytest.mark.parametrize("kind", ["folder", "tar", "folder of tars", "jsonl", "a jsonl"])
def test_every_layout_gives_the_same_samples(tmp_path, kind):
    source = ImageFiles(layout(kind, tmp_path))
    assert source.problems == [] and len(source) == source.found == 3
    assert {source.captions(i): int(source.image(i, 4, 6)[0, 0, 0]) for i in range(3)} == {
        ("first",): 10, ('second, "quoted"',): 20, ("das dritte: größer",): 30}
    image = source.image(0, 4, 6)
    assert image.shape == (4, 6, 3) and image.dtype == np.uint8 and image.flags.writeable
    assert picture(source, 0).size == (8, 8) and source.records[0].name.endswith("a.png")


def test_shards_go_before_a_table_beside_them(tmp_path):
    write_tar(tmp_path / "b.tar", samples(2))
    write_tar(tmp_path / "a.tar", samples(3))
    write_files(tmp_path, {"metadata.jsonl": '{"file_name": "0000.png", "text": "number 0"}'})
    source = ImageFiles(str(tmp_path))
    assert [source.records[i].name for i in range(len(source))] == [
        "a.tar/0000.png", "a.tar/0001.png", "a.tar/0002.png", "b.tar/0000.png", "b.tar/0001.png"]
    assert source.problems == []                            # A key may occur in another shard too.
    for file in tmp_path.glob("*.tar"):
        file.unlink()
    (tmp_path / "a.tar").mkdir()                            # What is no file is no shard.
    (tmp_path / "b.tar").symlink_to("nowhere")
    write_files(tmp_path, {"0000.png": solid(1)})
    assert ImageFiles(tmp_path).captions(0) == ("number 0",)


def test_links_in_a_tar_are_named(tmp_path):
    """Their bytes lie elsewhere. A folder is no problem."""
    write_files(tmp_path / "set", {"a.png": solid(1), "a.txt": "one"})
    os.link(tmp_path / "set" / "a.png", tmp_path / "set" / "hard.png")
    (tmp_path / "set" / "soft.png").symlink_to("a.png")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "set", "set")
    source = ImageFiles(tmp_path / "x.tar")
    assert len(source) == 1 and sorted(source.problems) == [
        "x.tar/set/hard.png: a link or no regular file",
        "x.tar/set/soft.png: a link or no regular file"]


def test_a_tar_of_a_whole_folder_is_read(tmp_path):
    """`tar cf x.tar .` begins all names with "./", which is not the dot of a hidden file."""
    members = [("./a.png", solid(1)), ("./a.txt", b"a"), ("./.b.png", solid(2)), ("./.b.txt", b"b")]
    source = ImageFiles(write_tar(tmp_path / "x.tar", members))
    assert all_captions(source) == [("a",)] and source.records[0].name == "x.tar/a.png"


def test_several_captions_come_from_json(tmp_path):
    five = [f"caption {i}" for i in range(5)]
    tar = write_tar(tmp_path / "x.tar", [
        ("a.png", solid(1)), ("a.json", json.dumps({"captions": five}).encode()),
        ("a.txt", b"caption 0"), ("b.png", solid(2)), ("b.json", b'{"width": 8}'),
        ("b.txt", b"from the text"), ("c.png", solid(3)),
        ("c.json", b'{"caption": "one", "url": null}'), ("c.cls", b"4"),
        ("d.png", solid(4)), ("d.json", b'{"caption": ""}'), ("d.txt", b"not blank"),
        ("._c.png", b"\0\5\x16\7")])                                  # what macOS's tar adds
    source = ImageFiles(tar)
    assert source.problems == []
    assert all_captions(source) == [tuple(five), ("from the text",), ("one",), ("not blank",)]
    line = json.dumps({"file_name": "a.png", "text": "no", "captions": five})
    write_files(tmp_path / "t", {"a.png": solid(1), "metadata.jsonl": line})
    assert ImageFiles(tmp_path / "t").captions(0) == tuple(five)


def test_captions_are_cleaned():
    assert clean_captions("  two\r\n lines\tand\u00a0 tabs \n") == ("two lines and tabs",)
    assert clean_captions(["a", "", " \n\u3000", "b "]) == ("a", "b")
    for caption, reason in (("a\0b", "not text"), ("caf\udce9", "UTF-8"), (42, "42 is not text")):
        with pytest.raises(ValueError, match=reason):
            clean_captions(caption)


@pytest.mark.parametrize("files, problem", [
    ({"x.png": solid(1)}, "x.png: there is no caption"),
    ({"x.png": solid(1), "x.txt": "caf\xe9".encode("latin-1")}, "x.txt: 'utf-8' codec"),
    ({"x.png": solid(1), "x.txt": "hello".encode("utf-16")}, "x.txt: 'utf-8' codec"),
    ({"x.png": solid(1), "x.txt": "a\0b"}, "x.txt: the caption 'a\\x00b' is not text"),
    ({"x.png": solid(1), "x.txt": " \n"}, "x.txt: there is no caption"),
    ({"x.png": solid(1), "x.json": "{"}, "x.json: Expecting"),
    ({"x.png": solid(1), "x.json": '{"captions": ["good", 4]}'}, "x.json: the caption 4 is not"),
    ({"x.png": solid(1), "x.json": "[" * 100_000}, "x.json: maximum recursion"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_sample_that_is_not_whole_is_named_in_folders_and_tars(tmp_path, files, problem):
    files = files | {"good.png": solid(9), "good.txt": b"\xef\xbb\xbfgood\r\n"}
    folder = write_files(tmp_path / "f", files)
    members = [(name, (folder / name).read_bytes()) for name in sorted(files)]
    tar = ImageFiles(write_tar(tmp_path / "all.tar", members))
    for source, prefix in ((ImageFiles(folder), ""), (tar, "all.tar/")):
        assert len(source.problems) == 1 and ("good",) in all_captions(source)
        assert source.problems[0].replace("all.tar/", "").startswith(problem)
        assert source.problems[0].startswith(prefix)


def test_texts_without_a_picture_do_not_stop_a_small_set(tmp_path):
    write_files(tmp_path, {"a.png": solid(1), "a.txt": "a", "README.txt": "about", "LICENSE": "x"})
    source = ImageFiles(tmp_path)
    assert source.problems == [] and len(list(readable(source, [(0, 4, 4)]))) == 1


def test_linked_folders_are_entered_once_and_circles_end(tmp_path):
    write_files(tmp_path, {"else/b.png": solid(2), "else/b.txt": "b", "set/a.png": solid(1),
                           "set/a.txt": "a", "set/deep/c.png": solid(3), "set/deep/c.txt": "c"})
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "else")
    (tmp_path / "set" / "twice").symlink_to(tmp_path / "else")
    (tmp_path / "set" / "deep" / "circle").symlink_to(tmp_path / "set")
    (tmp_path / "else" / "back").symlink_to(tmp_path / "set" / "deep")
    source = ImageFiles(tmp_path / "set")
    names = [record.name for record in source.records]
    assert names == ["a.png", "deep/c.png", "linked/b.png"] and source.problems == []
    assert [source.image(i, 4, 4)[0, 0, 0] for i in range(3)] == [1, 3, 2]


def test_what_is_no_file_is_named_and_the_rest_is_read(tmp_path):
    write_files(tmp_path / "a", {"a.png": solid(1), "a.txt": "a"})
    os.mkfifo(tmp_path / "a" / "pipe.txt")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    write_files(tmp_path / "a" / "b.tar", {"c.png": solid(1), "c.txt": "c"})     # A folder's name.
    source = ImageFiles(tmp_path / "a")
    assert all_captions(source) == [("a",), ("c",)]
    assert [problem.split(":")[0] for problem in source.problems] == ["gone.png", "pipe.txt"]
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "a.tar", samples(2))
    (tmp_path / "tars" / "b.tar").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "tars" / "c.tar")
    source = ImageFiles(tmp_path / "tars")
    assert len(source) == 2
    assert [problem.split(":")[0] for problem in source.problems] == ["b.tar", "c.tar"]


@pytest.mark.parametrize("line, reason", [
    ('{"file_name": "a.png", "text": ', "Expecting"),
    ('{"file_name": "a.png"}', "needs a .file_name. and a .text."),
    ('{"text": "no file"}', "needs a .file_name."),
    ('{"file_name": "a.png", "text": 42}', "42 is not text"),
    ('{"file_name": "a.png", "text": " "}', "there is no caption"),
    ('{"file_name": "a.png", "text": "half \\ud83d"}', "UTF-8"),
    ('{"file_name": "b.png", "text": "b"}', "no file b.png"),
    ('{"file_name": "../outside.png", "text": "b"}', "is below the folder"),
    ('{"file_name": "sub/../../outside.png", "text": "b"}', "is below the folder"),
    ('{"file_name": "OUTSIDE", "text": "b"}', "is below the folder"),
    ('{"file_name": "a\\u0000.png", "text": "b"}', "no file a"),
    ('{"file_name": 7, "text": "b"}', "needs a .file_name."),
    ('["a.png", "text"]', "needs a .file_name."),
    ("[" * 100_000, "recursion"),
])
def test_a_bad_line_of_a_list_is_a_problem_with_its_number(tmp_path, line, reason):
    (tmp_path / "outside.png").write_bytes(solid(66))       # It exists, and must not be read.
    folder = write_files(tmp_path / "set", {"a.png": solid(5), "metadata.jsonl": "\n".join([
        '{"file_name": "a.png", "text": "good"}', "",
        line.replace("OUTSIDE", str(tmp_path / "outside.png")),
        '{"file_name": "./a.png", "text": "also\u2028good"}'])})
    source = ImageFiles(folder)
    assert all_captions(source) == [("good",), ("also good",)]
    assert len(source.problems) == 1 and re.search(reason, source.problems[0])
    assert source.problems[0].startswith("metadata.jsonl line 3 ")


def test_a_tar_cut_anywhere_keeps_its_whole_samples_and_says_that_it_was_cut(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", samples(4)).read_bytes()
    ends = [1024 * (2 * i + 2) for i in range(4)]           # A header and a block for each file.
    for cut in range(1, ends[3], 97):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        try:
            source = ImageFiles(tmp_path / "cut.tar")
            problems = source.problems
            records = [source.image(i, 4, 4)[0, 0, 0] for i in range(len(source))]
        except ValueError as error:
            problems, records = str(error).split("\n")[1:], []
        assert any("cut.tar: damaged or not" in problem for problem in problems)
        at_least = sum(end <= cut for end in ends)
        assert records[:at_least] == list(range(at_least)) and len(records) <= at_least + 1
    (tmp_path / "cut.tar").write_bytes(whole[: ends[3]])    # Only the end blocks are missing.
    assert len(ImageFiles(tmp_path / "cut.tar")) == 4


def test_a_damaged_header_or_a_second_archive_behind_the_first_is_noticed(tmp_path):
    whole = bytearray(write_tar(tmp_path / "x.tar", samples(4)).read_bytes())
    (tmp_path / "twice.tar").write_bytes(whole * 2)
    assert "damaged" in ImageFiles(tmp_path / "twice.tar").problems[0]
    whole[4096 + 148] ^= 1                                            # checksum of picture 3
    (tmp_path / "x.tar").write_bytes(whole)
    source = ImageFiles(tmp_path / "x.tar")
    assert len(source) == 2 and "nothing to read at byte 4096" in source.problems[0]


@pytest.mark.parametrize("content", [b"", b"no archive\n" * 100, zlib.compress(b"x" * 9999)])
def test_what_is_no_tar_is_named_and_the_shards_beside_it_are_read(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match="holds no picture(.|\n)*a.tar: .*not an unc"):
        ImageFiles(tmp_path / "a.tar")
    write_tar(tmp_path / "b.tar", samples(2))
    source = ImageFiles(tmp_path)
    assert len(source) == 2 and len(source.problems) == 1
    assert source.problems[0].startswith("a.tar: ")


def test_files_that_share_a_key_are_joined_and_duplicates_named(tmp_path):
    apart = [("a.png", solid(1)), ("b.png", solid(2)), ("a.txt", b"first"), ("b.txt", b"second")]
    source = ImageFiles(write_tar(tmp_path / "x.tar", apart))
    assert all_captions(source) == [("first",), ("second",)] and not source.problems
    twice = [("a.png", solid(1)), ("a.txt", b"first"), ("a.png", solid(2)), ("a.txt", b"second")]
    source = ImageFiles(write_tar(tmp_path / "x.tar", twice))
    assert all_captions(source) == [("first",)] and source.image(0, 4, 4)[0, 0, 0] == 1
    assert [problem.split(":")[0] for problem in source.problems] == ["x.tar/a.png", "x.tar/a.txt"]


def test_a_tar_writes_nothing_and_follows_no_links(tmp_path):
    write_files(tmp_path, {"secret.txt": "secret", "set/.keep": ""})
    link = tarfile.TarInfo("b.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "../secret.txt"
    write_tar(tmp_path / "set" / "x.tar",
              [("a.png", solid(1)), ("a.txt", b"inside"), ("../c.png", solid(3)),
               ("../c.txt", b"outside"), ("b.png", solid(2))])
    with tarfile.open(tmp_path / "set" / "x.tar", "a") as tar:
        tar.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    source = ImageFiles(tmp_path / "set")
    assert all_captions(source) == [("inside",)] and source.image(0, 4, 4).shape == (4, 4, 3)
    link, picture = source.problems
    assert link == "x.tar/b.txt: a link or no regular file"
    assert picture.startswith("x.tar/b.png: there is no caption")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["nowhere", "nowhere.tar", "empty", "nowhere.jsonl", "a.png",
                                  "m.jsonl"])
def test_a_path_without_samples_is_an_error_that_says_what_is_expected(tmp_path, name):
    write_files(tmp_path, {"empty/readme.md": "", "a.png": solid(1), "m.jsonl": "{}\n"})
    with pytest.raises(ValueError, match=f"{name} does not exist or .*; give a folder with tar sh"):
        ImageFiles(tmp_path / name)


def test_many_threads_read_one_shard_at_once(tmp_path):
    source = ImageFiles(write_tar(tmp_path / "x.tar", samples(200)))
    with ThreadPoolExecutor(8) as pool:
        values = list(pool.map(lambda i: source.image(i % 200, 4, 4)[0, 0, 0], range(1000)))
    assert values == [i % 200 for i in range(1000)]


# ---- One per cent may be unreadable --------------------------------------------------------------


def everything(source, side=4):
    return [(index, side, side) for index in range(len(source))]


def test_up_to_one_per_cent_is_left_out_and_named(tmp_path):
    source = ImageFiles(write_tar(tmp_path / "x.tar", samples(200, broken=(7, 70))))
    read = list(readable(source, everything(source)))
    numbers = [int(image[0, 0, 0]) for image, _ in read]
    assert numbers == [number for number in range(200) if number not in (7, 70)]
    assert [captions for _, captions in read] == [(f"number {number}",) for number in numbers]
    assert [problem.split(":")[0] for problem in source.problems] == [
        "x.tar/0007.png", "x.tar/0070.png"]


def test_more_than_one_per_cent_stops_early_with_the_names(tmp_path):
    source = ImageFiles(write_tar(tmp_path / "x.tar", samples(200, broken=(3, 5, 9, 150))))
    seen = []
    with pytest.raises(ValueError, match=r"3 of 200 .* over 1 %(.|\n)*0003.png(.|\n)*0009.png"):
        for image, _ in readable(source, everything(source)):
            seen.append(int(image[0, 0, 0]))
    assert max(seen) == 8


def test_problems_found_while_scanning_count_too(tmp_path):
    source = ImageFiles(write_tar(tmp_path / "x.tar", samples(99) + [("z.png", solid(1))]))
    assert source.found == 100 and len(list(readable(source, everything(source)))) == 99
    source = ImageFiles(write_tar(tmp_path / "x.tar", samples(98) + [("z.png", solid(1))]))
    with pytest.raises(ValueError, match="1 of 99(.|\n)*z.png: there is no caption"):
        next(readable(source, everything(source)))


def test_a_picture_that_vanishes_after_the_scan_is_unreadable(tmp_path):
    source = ImageFiles(write_files(tmp_path, {"a.png": solid(1), "a.txt": "here"}))
    (tmp_path / "a.png").unlink()
    assert source.picture_size(0) == (1, 1)
    with pytest.raises(ValueError, match="a.png: No such file"):
        picture(source, 0)


def test_ten_problems_are_named():
    check_problems([], 0)
    with pytest.raises(ValueError) as caught:
        check_problems([f"file{i}: b" for i in range(30)], 100)
    assert "file9: b" in str(caught.value) and "file10" not in str(caught.value)


# ---- The shared test data: broken files, emoji, photographs --------------------------------------


@needs_data
@listed("images/")
def test_a_broken_or_unusual_picture_behaves_as_listed(entry):
    try:
        image = read_image(DATA / "bad" / entry["file"])
    except ValueError as error:
        assert entry["expect"] != "ok", error
        assert entry["file"] in str(error)
    else:
        assert entry["expect"] != "error"
        assert image.mode == "RGB" and list(image.size) == entry["size"]


@needs_data
def test_unusual_pictures_have_the_right_pixels():
    def pixels(name):
        return np.asarray(read_image(DATA / "bad" / "images" / name)).astype(int)

    good, gray = pixels("good.png"), pixels("gray.png")
    assert (pixels("gray16.png") == gray).all() and gray.std() > 20
    assert (pixels("rgb16.png") == good).all() and (pixels("png_inside.jpg") == good).all()
    for name in ("jpeg_inside.png", "trailing_garbage.jpg"):
        assert (pixels(name) == pixels("good.jpg")).all()
    for name, tolerance in (("exif_rotated.jpg", 6), ("exif_invalid.jpg", 6), ("cmyk.jpg", 12),
                            ("good.jpg", 8)):
        assert np.abs(pixels(name) - good).mean() < tolerance, name
    rgba = pixels("rgba.png")
    assert (rgba[:, 48:] == 255).all() and (rgba[:32, :48] == good[:32, :48]).all()
    assert np.abs(rgba[32:, :48] - (good[32:, :48] + 255) / 2).max() <= 1.5
    assert (pixels("gray_alpha.png")[:, 48:] == 255).all()
    assert (pixels("palette_transparent.png") == 255).all(axis=2).any()
    assert (pixels("animated.gif") == (255, 0, 0)).all()
    assert set(np.unique(pixels("one_bit.png"))) == {0, 255}


@needs_data
@listed("shards/")
def test_a_broken_tar_behaves_as_listed(entry):
    try:
        source = ImageFiles(DATA / "bad" / entry["file"])
    except ValueError as error:
        assert entry["expect"] != "ok" and entry.get("samples", 0) == 0
        assert entry["file"] in str(error)
        return
    source.found = 10**6                                    # as if nothing were too much
    read = [captions for _, captions in readable(source, everything(source))]
    assert source.problems or entry["expect"] != "error"
    assert len(read) == entry.get("samples", entry.get("whole_samples", len(read)))
    if "whole_samples" in entry:
        assert any("damaged" in problem for problem in source.problems)
    if entry["file"] == "shards/mixed.tar":
        assert read == [("good one",), ("good two",)]
        assert len(source.problems) == 4


@needs_data
def test_the_bad_list_gives_its_two_good_lines_and_names_the_others():
    source = ImageFiles(DATA / "bad" / "metadata_bad.jsonl")
    assert [(source.records[i].name, source.captions(i)) for i in range(len(source))] == [
        ("captions/good.png", ("a colour gradient",)), ("images/good.jpg", ("the last good line",))]
    assert [problem.split(" needs")[0] for problem in source.problems] == [
        f"metadata_bad.jsonl line {number}" for number in (2, 3, 4, 5, 6, 7, 8, 10)]


@needs_data
@pytest.mark.parametrize("folder, count, captions", [
    ("emoji", 1893, 1), ("photos/clothing", 1395, 1), ("photos/flickr8k", 1000, 5),
    ("photos/coco", 154, 5)])
def test_the_real_sets_open_without_a_problem(folder, count, captions):
    source = ImageFiles(DATA / folder)
    lines = read_lines(DATA / folder / "metadata.jsonl")
    assert len(source) == count == len(lines) and source.problems == []
    for index in range(0, count, count // 7):
        entry = json.loads(lines[index])
        assert source.records[index].name == f"{entry['shard']}/{entry['file_name']}"
        assert source.captions(index)[0] == " ".join(entry["text"].split())
        assert len(source.captions(index)) == captions
        size = (entry.get("width", 128), entry.get("height", 128))
        assert picture(source, index).size == size == source.picture_size(index)[::-1]
        assert source.image(index, 32, 48).shape == (32, 48, 3)
