"""Tests of data.py: scenes against their captions and pixels, real pictures of every layout, all that can break."""

import hashlib
import io
import itertools
import json
import os
import struct
import subprocess
import sys
import tarfile
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import (
    BACKGROUNDS,
    COLORS,
    COUNTS,
    MAX_PIXELS,
    SHAPES,
    ImageFiles,
    Scenes,
    UnreadableImage,
    captioned_grid,
    check_problems,
    draw_scene,
    from_tensor,
    make_scene,
    plural,
    read_image,
    readable,
    resize_and_crop,
    scene_captions,
    shape_mask,
    to_tensor,
)

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("DATA_DIR", ROOT.parent / "shared" / "data"))         # not part of the repository
needs_data = pytest.mark.skipif(not (DATA / "bad" / "expected.json").is_file(), reason=f"no test data in {DATA}")
EXPECTED = [] if needs_data.args[0] else json.loads((DATA / "bad" / "expected.json").read_text())
SIZES = [(64, 64), (32, 32), (48, 96), (128, 56), (200, 200), (40, 41)]          # height, width


# ------------------------------------------------------------------------------------------------------------
# Scenes
# ------------------------------------------------------------------------------------------------------------

def facts(scene):
    """All that a scene says, as plain text that does not depend on numpy's way of printing."""
    things = [(t.shape, t.color, t.size, int(t.left), int(t.top), int(t.diameter)) for t in scene.things]
    return (scene.kind, scene.height, scene.width, scene.background, things, scene.relation, scene.word,
            scene.word_color, round(float(scene.wording), 9))


def digest(indices):
    """{index: hash of the pixels and captions} of the scenes of seed 3."""
    source = Scenes(1000, seed=3)
    return {i: hashlib.sha256(source.image(i, 48, 64).tobytes() + repr(source.captions(i)).encode()).hexdigest()
            for i in indices}


def test_a_scene_depends_on_seed_and_index_alone_not_on_process_or_order():
    code = "import json, test_data; print(json.dumps(test_data.digest(range(199, -1, -1))))"
    environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    here = digest(range(200))
    assert {str(i): value for i, value in here.items()} == json.loads(other.stdout)
    assert len(set(here.values())) > 195
    assert facts(make_scene(4, 0)) != facts(make_scene(3, 0))


def test_scenes_are_still_the_ones_that_the_shipped_models_were_trained_on():
    text = repr([facts(make_scene(seed, i, 64, 64)) for seed in (0, 1) for i in range(300)])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "7e68920e38a29b61"


def test_captions_do_not_depend_on_the_size_or_aspect():
    for index in range(300):
        captions = {scene_captions(make_scene(5, index, height, width)) for height, width in SIZES}
        assert captions == {Scenes(300, seed=5).captions(index)}


def test_the_full_caption_names_everything_and_the_short_one_leaves_things_out():
    dropped = {"color": 0, "relation": 0, "thing": 0}
    for index in range(1000):
        scene = make_scene(0, index)
        short, full = scene_captions(scene)
        n = len(scene.things)
        shape = scene.things[0].shape
        for thing in scene.things:
            assert thing.color in full and thing.size in full and thing.shape in full
        assert full.endswith(f"on a {scene.background} background") and scene.relation in full
        if scene.kind == "word":
            assert f"the word {scene.word} in {scene.word_color}" in full and f"the word {scene.word}" in short
            dropped["thing"] += shape not in short
        if scene.kind == "count":
            assert full.startswith(f"{COUNTS[n]} ") and f" {plural(shape)} " in full and short.startswith(COUNTS[n])
        assert "background" not in short and not any(size in short for size in data.SIZES)
        assert len(short) < len(full)
        dropped["color"] += not any(thing.color in short for thing in scene.things)
        dropped["relation"] += scene.kind == "pair" and scene.relation not in short
    assert all(100 < count < 700 or name == "thing" and count > 30 for name, count in dropped.items()), dropped


def test_plurals_and_articles_are_english():
    assert [plural(shape) for shape in SHAPES] == ["circles", "squares", "triangles", "diamonds", "stars", "crosses",
                                                   "rings", "hearts"]
    captions = " | ".join(c for i in range(2000) for c in scene_captions(make_scene(2, i)))
    assert "an orange" in captions and "a orange" not in captions and "crosss" not in captions
    assert " a two" not in captions and "  " not in captions


def boxes_overlap(a, b):
    return (a.left < b.left + b.diameter and b.left < a.left + a.diameter
            and a.top < b.top + b.diameter and b.top < a.top + a.diameter)


@pytest.mark.parametrize("height, width", SIZES)
def test_things_lie_inside_the_picture_and_do_not_overlap(height, width):
    for index in range(500):
        scene = make_scene(1, index, height, width)
        for thing in scene.things:
            assert 0 <= thing.left and thing.left + thing.diameter <= width
            assert 0 <= thing.top and thing.top + thing.diameter <= height
        assert not any(boxes_overlap(a, b) for a, b in itertools.combinations(scene.things, 2)), scene


def test_a_word_is_wholly_inside_and_does_not_touch_the_thing():
    words = 0
    for index in range(600):
        scene = make_scene(1, index, *SIZES[index % len(SIZES)])
        if scene.kind == "word":
            words += 1
            background = np.uint8(BACKGROUNDS[scene.background])
            with_word = (draw_scene(replace(scene, things=())) != background).any(axis=2)
            with_thing = (draw_scene(replace(scene, word="")) != background).any(axis=2)
            assert with_word.any() and not (with_word & with_thing).any()
            assert not with_word[[0, -1]].any() and not with_word[:, [0, -1]].any()
    assert words > 50


@pytest.mark.parametrize("height, width", [(64, 64), (64, 128), (160, 72)])
def test_relations_and_proportions_are_right_in_the_pixels(height, width):
    seen = set()
    for index in range(400):
        scene = make_scene(6, index, height, width)
        if scene.kind != "pair" or scene.things[0].color == scene.things[1].color:
            continue
        image, place = draw_scene(scene).astype(int), []
        assert image.shape == (height, width, 3)
        for thing in scene.things:
            rows, columns = np.nonzero((abs(image - COLORS[thing.color]).sum(axis=2)) < 12)
            place.append((rows.mean(), columns.mean()))
            if thing.shape in ("circle", "ring", "cross"):                       # not stretched with the picture
                assert abs(np.ptp(rows) - np.ptp(columns)) <= 1
        (top, left), (other_top, other_left) = place
        assert {"left of": left < other_left, "right of": left > other_left,
                "above": top < other_top, "below": top > other_top}[scene.relation], scene
        seen.add(scene.relation)
    assert seen == set(data.RELATIONS)


def test_one_core_draws_2000_scenes_a_second_at_64_px():
    source = Scenes(10**6)
    for index in range(1500):                                                    # fill the caches of masks
        source.image(index, 64, 64)
    rates = []
    for start in range(0, 1500, 250):                                            # the best of six: others use this CPU
        begin = time.process_time()
        for index in range(start, start + 250):
            source.image(index, 64, 64)
        rates.append(250 / (time.process_time() - begin))
    assert max(rates) >= 2000


def test_an_unknown_shape_is_refused_with_the_list_of_shapes():
    with pytest.raises(ValueError, match="hexagon.*circle, square"):
        shape_mask("hexagon", 20)


# ------------------------------------------------------------------------------------------------------------
# One picture
# ------------------------------------------------------------------------------------------------------------

def pattern(width=24, height=16):
    """A picture without any symmetry: red grows to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), 0 * x + 40], axis=2)
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_claiming(width, height, depth=8, color=2, pixels=b"\0" * 64):
    """A PNG with this header, whatever pixels follow."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b""))


def distance(image, other):
    """The largest difference of two pictures' pixels."""
    return np.abs(np.asarray(image).astype(int) - np.asarray(other).astype(int)).max()


def test_paths_bytes_and_open_files_give_the_same_picture(tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(encoded(pattern()))
    with open(file, "rb") as opened:
        pictures = [read_image(file), read_image(str(file)), read_image(file.read_bytes()), read_image(opened),
                    read_image(io.BytesIO(file.read_bytes()))]
    assert all(picture.mode == "RGB" and distance(picture, pattern()) == 0 for picture in pictures)


def test_transparency_is_laid_on_white():
    alpha = Image.new("L", (24, 16), 255)
    alpha.paste(0, (12, 0, 24, 16))
    for mode in ("RGB", "L"):
        image = pattern().convert(mode)
        white = Image.composite(image, Image.new(mode, image.size, "white"), alpha).convert("RGB")
        image.putalpha(alpha)
        assert distance(read_image(encoded(image)), white) == 0
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 0, 0])
    palette.putdata([0, 1])
    for transparency in (0, bytes([0, 255])):                                    # one colour, or an alpha for each
        image = read_image(encoded(palette, transparency=transparency))
        assert np.asarray(image).tolist() == [[[255] * 3, [200, 0, 0]]]


def test_16_bit_gray_is_scaled_and_not_clipped():
    gray = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)             # every 8-bit gray, times 257
    for kind in ("PNG", "TIFF"):
        pixels = np.asarray(read_image(encoded(Image.fromarray(gray), kind)))
        assert (pixels == (gray // 257)[..., None]).all()


def test_every_exif_orientation_comes_out_upright():
    turn = Image.Transpose                                                       # how the camera stored it
    turns = [None, turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM, turn.TRANSPOSE, turn.ROTATE_90,
             turn.TRANSVERSE, turn.ROTATE_270]
    for orientation, turn in enumerate(turns, 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = pattern() if turn is None else pattern().transpose(turn)
        assert distance(read_image(encoded(stored, exif=exif)), pattern()) == 0, orientation


@pytest.mark.parametrize("orientation", [0, 9, 99, 65535])
def test_an_invalid_exif_orientation_is_ignored(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert distance(read_image(encoded(pattern(), exif=exif)), pattern()) == 0


def test_a_broken_exif_block_does_not_lose_the_picture_nor_warn():
    for block in (b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01", b"Exif\0\0"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert distance(read_image(encoded(pattern(), "JPEG", quality=95, exif=block)), pattern()) < 40


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP"):
        animated = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        assert read_image(animated).getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("content, reason", [
    (b"", "the file is empty"),
    (b"<!DOCTYPE html><html>404</html>", "begins with b'<!DOCTYPE ht'"),
    (encoded(pattern(96, 64))[:150], "truncated"),
    (encoded(pattern(96, 64), "JPEG")[:700], "truncated"),
    (encoded(pattern(), "JPEG")[:24], "cannot be decoded|not a"),
    (png_claiming(60000, 60000), "3600000000 pixels|60000x60000"),
    (png_claiming(12000, 12000), f"12000x12000 by its header, more than {MAX_PIXELS} pixels"),
    (encoded(Image.new("F", (4, 4)), "TIFF"), "float pixels"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "begins with b'%!PS"),
], ids=["empty", "html", "cut png", "cut jpeg", "jpeg header", "huge", "large", "float", "postscript"])
def test_what_cannot_be_used_is_refused_with_its_name_and_the_reason(tmp_path, content, reason):
    file = tmp_path / "broken.png"
    file.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source, name in ((file, str(file)), (content, "picture")):
            with pytest.raises(UnreadableImage, match=reason) as caught:
                read_image(source)
            assert str(caught.value).startswith(f"{name}: ") and "\n" not in str(caught.value)
        with pytest.raises(UnreadableImage, match="^cat: "):
            read_image(content, "cat")


def test_a_large_header_that_is_allowed_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnreadableImage, match="cannot be decoded"):          # Pillow warns from 89 million on
            read_image(png_claiming(10_000, 9_500, depth=1, color=0))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UnreadableImage, match="nowhere.png: No such file"):
        read_image(tmp_path / "nowhere.png")


def test_resize_and_crop_covers_keeps_the_aspect_and_takes_the_centre():
    stripes = np.zeros((100, 300, 3), np.uint8)
    for i in range(3):
        stripes[:, 100 * i : 100 * (i + 1), i] = 255                             # red, green, blue
    for image in (Image.fromarray(stripes), Image.fromarray(stripes.transpose(1, 0, 2))):
        middle = np.asarray(resize_and_crop(image, 50, 50))
        assert middle.shape == (50, 50, 3) and (middle[3:-3, 3:-3] == (0, 255, 0)).all()
    circle = Image.fromarray(draw_scene(make_scene(0, 0, 90, 60)))
    assert distance(resize_and_crop(circle, 90, 60), circle) == 0                # nothing to do, nothing changed
    x = np.asarray(resize_and_crop(pattern(256, 64), 32, 32))[:, :, 0].mean(axis=0)
    assert abs(x[0] - 96) < 3 and abs(x[-1] - 159) < 3                           # the middle quarter of 0 to 255
    assert np.ptp(np.diff(x)) < 2                                                # evenly spaced, not stretched


def test_resizing_is_antialiased():
    board = Image.fromarray((np.indices((512, 512)).sum(axis=0) % 2 * 255).astype(np.uint8)).convert("RGB")
    for size in (64, 100, 200):
        assert np.abs(np.asarray(resize_and_crop(board, size, size)).astype(int) - 127.5).max() < 12


@pytest.mark.parametrize("width, height", [(1, 1), (20000, 1), (1, 20000), (3, 5), (999, 777)])
def test_any_picture_can_be_brought_to_any_size(width, height):
    for target in ((64, 64), (7, 96), (333, 259)):
        assert resize_and_crop(Image.new("RGB", (width, height), "red"), *target).size == target[::-1]


def test_tensors_are_in_minus_one_to_one_and_the_round_trip_is_exact():
    ramp = np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3)
    ramp.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for image in (ramp, Image.fromarray(ramp)):
            tensor = to_tensor(image)
            assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32 and tensor.is_contiguous()
            assert tensor.min() == -1 and tensor.max() == 1
            assert (np.asarray(from_tensor(tensor)) == ramp).all()
    assert tensor[2, 0, 1] == ramp[0, 1, 2] / 127.5 - 1                          # channels first, rows before columns


def test_from_tensor_clamps_and_rounds():
    tensor = torch.tensor([-9.0, -1.0, 1.4 / 127.5 - 1, 1.6 / 127.5 - 1, 1.0, 9.0]).expand(3, 1, 6)
    for precision in (torch.float32, torch.float64):
        pixels = np.asarray(from_tensor(tensor.to(precision).requires_grad_()))  # (1, 6, 3)
        assert pixels[0, :, 0].tolist() == [0, 0, 1, 2, 255, 255]


# ------------------------------------------------------------------------------------------------------------
# Pictures with captions, in every layout
# ------------------------------------------------------------------------------------------------------------

def solid(value, size=8):
    return encoded(Image.new("RGB", (size, size), (value, value, value)))


def write_tar(path, members, end=True):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    path.write_bytes(buffer.getvalue())
    return path


def samples(n, broken=()):
    """n pictures with a caption each, as tar members; those in `broken` are not pictures."""
    return [member for i in range(n) for member in ((f"{i:04}.png", b"broken" if i in broken else solid(i % 256, 4)),
                                                    (f"{i:04}.txt", b"number %d" % i))]


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


PICTURES = {"a.png": solid(10), "deep/b.PNG": solid(20), "deep/er/c.v2.png": solid(30)}
TEXTS = {"a.txt": "first", "deep/b.txt": "second, \"quoted\"", "deep/er/c.v2.txt": "das dritte: größer"}


def layout(kind, folder):
    """The same three pictures in one of the layouts; returns what to give to ImageFiles."""
    rows = list(zip(PICTURES, TEXTS.values()))
    if kind == "folder":
        return write_files(folder, PICTURES | TEXTS)
    if kind in ("tar", "folder of tars"):
        tar = write_tar(folder / "x-0.tar", [(k, v.encode() if isinstance(v, str) else v)
                                             for k, v in sorted((PICTURES | TEXTS).items())])
        return tar if kind == "tar" else folder
    write_files(folder, PICTURES)
    if kind == "csv":
        quoted = [text.replace('"', '""') for _, text in rows]
        lines = ["file_name,text,other"] + [f'{name},"{text}",7' for (name, _), text in zip(rows, quoted)]
        return write_files(folder, {"metadata.csv": "\ufeff" + "\r\n".join(lines)})
    write_files(folder, {"metadata.jsonl": "\n\n".join(json.dumps({"image": n, "caption": t}) for n, t in rows)})
    return folder / "metadata.jsonl" if kind == "a jsonl" else folder


@pytest.mark.parametrize("kind", ["folder", "tar", "folder of tars", "jsonl", "a jsonl", "csv"])
def test_every_layout_gives_the_same_samples(tmp_path, kind):
    source = ImageFiles(layout(kind, tmp_path))
    assert source.problems == [] and len(source) == source.found == 3
    assert {source.captions(i): int(source.image(i, 4, 6)[0, 0, 0]) for i in range(3)} == {
        ("first",): 10, ('second, "quoted"',): 20, ("das dritte: größer",): 30}
    image = source.image(0, 4, 6)
    assert image.shape == (4, 6, 3) and image.dtype == np.uint8 and image.flags.writeable
    assert source.picture(0).size == (8, 8) and source.name(0).endswith("a.png")


def test_shards_go_before_a_table_beside_them(tmp_path):
    write_tar(tmp_path / "b.tar", samples(2))
    write_tar(tmp_path / "a.tar", samples(3))
    write_files(tmp_path, {"metadata.jsonl": '{"file_name": "0000.png", "shard": "a.tar", "text": "number 0"}'})
    source = ImageFiles(str(tmp_path))
    assert [source.name(i) for i in range(len(source))] == [
        "a.tar/0000.png", "a.tar/0001.png", "a.tar/0002.png", "b.tar/0000.png", "b.tar/0001.png"]
    assert source.problems == []                                                 # a key may occur in another shard too


def test_several_captions_come_from_json(tmp_path):
    five = [f"caption {i}" for i in range(5)]
    tar = write_tar(tmp_path / "x.tar", [
        ("a.png", solid(1)), ("a.json", json.dumps({"captions": five}).encode()), ("a.txt", b"caption 0"),
        ("b.png", solid(2)), ("b.json", b'{"width": 8}'), ("b.txt", b"from the text"),
        ("c.png", solid(3)), ("c.json", b'{"caption": "one", "url": null}'), ("c.cls", b"4"),
        ("._c.png", b"\0\5\x16\7")])                                             # what macOS's tar adds
    source = ImageFiles(tar)
    assert [source.captions(i) for i in range(3)] == [tuple(five), ("from the text",), ("one",)]
    assert source.problems == []
    write_files(tmp_path / "t", {"a.png": solid(1), "metadata.jsonl": json.dumps({"file_name": "a.png", "text": "no",
                                                                                 "captions": five})})
    assert ImageFiles(tmp_path / "t").captions(0) == tuple(five)


def test_captions_are_cleaned():
    assert data.clean_caption("  two\r\n lines\tand\u00a0 tabs \n") == "two lines and tabs"
    for caption, reason in (("", "empty"), (" \n\u3000", "empty"), ("a\0b", "NUL"), ("caf\udce9", "UTF-8"),
                            (42, "not text")):
        with pytest.raises(ValueError, match=reason):
            data.clean_caption(caption)


@pytest.mark.parametrize("files, problem", [
    ({"x.png": solid(1)}, "x.png: no .txt"),
    ({"x.txt": "alone"}, "x.txt: a caption without a picture"),
    ({"x.png": solid(1), "x.txt": "caf\xe9".encode("latin-1")}, "x.txt: the caption is not UTF-8"),
    ({"x.png": solid(1), "x.txt": "hello".encode("utf-16")}, "x.txt: the caption is not UTF-8"),
    ({"x.png": solid(1), "x.txt": "a\0b"}, "x.txt: the caption holds a NUL"),
    ({"x.png": solid(1), "x.txt": " \n"}, "x.txt: the caption is empty"),
    ({"x.png": solid(1), "x.jpg": solid(1), "x.txt": "two"}, "x.png: duplicate key, "),
    ({"x.png": solid(1), "x.json": "{"}, "x.json: Expecting"),
    ({"x.png": solid(1), "x.json": '{"captions": ["good", ""]}'}, "x.json: the caption is empty"),
    ({"x.png": solid(1), "x.json": '["list"]'}, "x.json: not a JSON object"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_a_sample_that_is_not_whole_is_a_named_problem_in_folders_and_tars(tmp_path, files, problem):
    good = {"good.png": solid(9), "good.txt": b"\xef\xbb\xbfgood\r\n"}
    tar = write_tar(tmp_path / "all.tar", sorted((k, v if isinstance(v, bytes) else v.encode())
                                                 for k, v in (files | good).items()))
    for source, prefix in ((ImageFiles(write_files(tmp_path / "f", files | good)), ""), (ImageFiles(tar), "all.tar/")):
        assert len(source.problems) == 1 and source.problems[0].startswith(prefix + problem)
        assert ("good",) in [source.captions(i) for i in range(len(source))]


@pytest.mark.parametrize("line, reason", [
    ('{"file_name": "a.png", "text": ', "Expecting"),
    ('{"file_name": "a.png"}', "needs a .file_name. and a .text."),
    ('{"text": "no file"}', "needs a .file_name."),
    ('{"file_name": "a.png", "text": 42}', "42 and not text"),
    ('{"file_name": "a.png", "text": ""}', "empty"),
    ('{"file_name": "a.png", "text": "half \\ud83d"}', "UTF-8"),
    ('{"file_name": "b.png", "text": "b"}', "'b.png' is not a file in this folder"),
    ('{"file_name": "../outside.png", "text": "b"}', "'../outside.png' is not a file in this folder"),
    ('{"file_name": "sub/../../outside.png", "text": "b"}', "is not a file in this folder"),
    ('{"file_name": "OUTSIDE", "text": "b"}', "is not a file in this folder"),
    ('{"file_name": "a\\u0000.png", "text": "b"}', "is not a file in this folder"),
    ('["a.png", "text"]', "not a JSON object"),
    ("[" * 100_000, "recursion"),
])
def test_a_bad_line_of_a_list_is_a_problem_with_its_number(tmp_path, line, reason):
    (tmp_path / "outside.png").write_bytes(solid(66))                            # it exists, and must not be read
    folder = write_files(tmp_path / "set", {"a.png": solid(5), "metadata.jsonl": "\n".join([
        '{"file_name": "a.png", "text": "good"}', "", line.replace("OUTSIDE", str(tmp_path / "outside.png")),
        '{"file_name": "sub/../a.png", "text": "also good"}'])})
    source = ImageFiles(folder)
    assert [source.captions(i) for i in range(len(source))] == [("good",), ("also good",)]
    assert len(source.problems) == 1 and source.problems[0].startswith("metadata.jsonl line 3: ")
    with pytest.raises(ValueError, match=reason):
        raise ValueError(source.problems[0])


def test_bad_rows_of_a_csv_are_problems(tmp_path):
    rows = [b"file_name,text", b"a.png,good", b"b.png,no such file", b"a.png", b"a.png,caf\xe9", b"a.png,last"]
    source = ImageFiles(write_files(tmp_path, {"a.png": solid(5), "metadata.csv": b"\n".join(rows)}))
    assert [source.captions(i) for i in range(len(source))] == [("good",), ("last",)]
    assert [problem.split(":")[0] for problem in source.problems] == [f"metadata.csv line {n}" for n in (3, 4, 5)]


def test_a_tar_cut_anywhere_keeps_its_whole_samples_and_says_that_it_was_cut(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", samples(4)).read_bytes()
    content = whole.rstrip(b"\0")
    ends = [1024 * (2 * i + 2) for i in range(4)]                                # a header and a block for each of two
    assert len(content) > ends[2] and len(whole) > ends[3]
    for cut in range(1, ends[3], 97):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        try:
            source = ImageFiles(tmp_path / "cut.tar")
            problems, records = source.problems, [source.image(i, 4, 4)[0, 0, 0] for i in range(len(source))]
        except ValueError as error:
            problems, records = str(error).split("\n")[1:], []
        assert problems and any("cut.tar: damaged, cut short" in problem for problem in problems)
        at_least = sum(end <= cut for end in ends)
        assert records[:at_least] == list(range(at_least)) and len(records) <= at_least + 1
    (tmp_path / "cut.tar").write_bytes(whole[: ends[3]])                         # only the end blocks are missing
    assert len(ImageFiles(tmp_path / "cut.tar")) == 4


def test_a_damaged_header_or_a_second_archive_behind_the_first_is_noticed(tmp_path):
    whole = bytearray(write_tar(tmp_path / "x.tar", samples(4)).read_bytes())
    (tmp_path / "twice.tar").write_bytes(whole * 2)
    assert "damaged" in ImageFiles(tmp_path / "twice.tar").problems[0]
    whole[4096 + 148] ^= 1                                                       # checksum of the third picture
    (tmp_path / "x.tar").write_bytes(whole)
    source = ImageFiles(tmp_path / "x.tar")
    assert len(source) == 2 and "nothing to read at byte 4096" in source.problems[0]


@pytest.mark.parametrize("content", [b"", b"this is no archive\n" * 100, zlib.compress(b"x" * 9999)])
def test_what_is_no_tar_is_named_and_the_shards_beside_it_are_read(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ValueError, match="a.tar holds no usable picture(.|\n)*a.tar: .*not an uncompressed tar"):
        ImageFiles(tmp_path / "a.tar")
    write_tar(tmp_path / "b.tar", samples(2))
    source = ImageFiles(tmp_path)
    assert len(source) == 2 and len(source.problems) == 1 and source.problems[0].startswith("a.tar: ")


def test_files_that_share_a_key_are_joined_and_duplicates_named(tmp_path):
    apart = [("a.png", solid(1)), ("b.png", solid(2)), ("a.txt", b"first"), ("b.txt", b"second")]
    source = ImageFiles(write_tar(tmp_path / "x.tar", apart))
    assert [source.captions(i) for i in range(2)] == [("first",), ("second",)] and not source.problems
    twice = [("a.png", solid(1)), ("a.txt", b"first"), ("a.png", solid(2)), ("a.txt", b"second")]
    source = ImageFiles(write_tar(tmp_path / "x.tar", twice))
    assert len(source) == 1 and source.captions(0) == ("first",) and source.image(0, 4, 4)[0, 0, 0] == 1
    assert [problem.split(":")[0] for problem in source.problems] == ["x.tar/a.png", "x.tar/a.txt"]


def test_a_tar_writes_nothing_and_follows_no_links(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    inner = tmp_path / "set"
    inner.mkdir()
    link = tarfile.TarInfo("b.txt")
    link.type, link.linkname = tarfile.SYMTYPE, "../secret.txt"
    with tarfile.open(inner / "x.tar", "w") as tar:
        for name, content in (("../a.png", solid(1)), ("../a.txt", b"outside"), ("b.png", solid(2))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        tar.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    source = ImageFiles(inner)
    captions = [source.captions(i) for i in range(len(source)) if source.image(i, 4, 4) is not None]
    assert ("secret",) not in captions and "x.tar/b.png: no .txt (or .json) with its caption" in source.problems
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name, state", [("nowhere", "does not exist"), ("nowhere.tar", "does not exist"),
                                         ("nowhere.jsonl", "does not exist"), ("empty", "holds no usable"),
                                         ("a.png", "holds no usable"), ("m.csv", "holds no usable")])
def test_a_path_without_samples_is_an_error_that_says_what_is_expected(tmp_path, name, state):
    write_files(tmp_path, {"empty/readme.md": "nothing", "a.png": solid(1), "m.csv": "a,b\n1,2\n"})
    with pytest.raises(ValueError, match=f"{name} {state}.*Expected: a folder with tar shards"):
        ImageFiles(tmp_path / name)


def test_many_threads_read_one_shard_at_once(tmp_path):
    source = ImageFiles(write_tar(tmp_path / "x.tar", samples(200)))
    with ThreadPoolExecutor(8) as pool:
        values = list(pool.map(lambda i: source.image(i % 200, 4, 4)[0, 0, 0], range(1000)))
    assert values == [i % 200 for i in range(1000)]


# ------------------------------------------------------------------------------------------------------------
# One per cent may be unreadable
# ------------------------------------------------------------------------------------------------------------

def test_up_to_one_per_cent_is_skipped_counted_and_named(tmp_path, capsys):
    source = ImageFiles(write_tar(tmp_path / "x.tar", samples(200, broken=(7, 70))))
    for _ in range(2):                                                           # the second epoch counts nothing twice
        read = list(readable(source, 4, 4))
        assert [index for index, _, _ in read] == [i for i in range(200) if i not in (7, 70)]
        assert all(image[0, 0, 0] == i and captions == (f"number {i}",) for i, image, captions in read)
        assert [problem.split(":")[0] for problem in source.problems] == ["x.tar/0007.png", "x.tar/0070.png"]
        message = capsys.readouterr().err
        assert message.startswith("2 of 200 samples cannot be used, the first: x.tar/0007.png")
        assert message.count("\n") == 1


def test_more_than_one_per_cent_stops_early_with_the_names(tmp_path):
    source, seen = ImageFiles(write_tar(tmp_path / "x.tar", samples(200, broken=(3, 5, 9, 150)))), []
    with pytest.raises(ValueError, match=r"3 of 200 .* over 1 %(.|\n)*0003.png(.|\n)*0005.png(.|\n)*0009.png"):
        for index, _, _ in readable(source, 4, 4):
            seen.append(index)
    assert max(seen) == 8
    source = ImageFiles(write_tar(tmp_path / "y.tar", samples(50, broken=(49,))))
    with pytest.raises(ValueError, match="1 of 50"):
        list(readable(source, 4, 4))


def test_problems_found_while_scanning_count_too(tmp_path):
    source = ImageFiles(write_tar(tmp_path / "x.tar", samples(99) + [("z.png", solid(1))]))
    assert source.found == 100 and len(list(readable(source, 4, 4))) == 99       # exactly one per cent
    source = ImageFiles(write_tar(tmp_path / "x.tar", samples(98) + [("z.png", solid(1))]))
    with pytest.raises(ValueError, match="1 of 99(.|\n)*z.png: no .txt"):
        next(readable(source, 4, 4))


def test_a_subset_is_judged_by_the_whole(tmp_path):
    source = ImageFiles(write_tar(tmp_path / "x.tar", samples(150, broken=(1,))))
    part = source.subset(range(3))
    assert len(part) == 3 and len(source) == 150 and part.captions(2) == ("number 2",)
    assert [index for index, _, _ in readable(part, 4, 4)] == [0, 2]             # 1 of these 3, but 1 of 150 in all
    assert len(source.problems) == 1


def test_a_picture_that_vanishes_after_the_scan_is_unreadable(tmp_path):
    source = ImageFiles(write_files(tmp_path, {"a.png": solid(1), "a.txt": "here"}))
    (tmp_path / "a.png").unlink()
    with pytest.raises(UnreadableImage, match="a.png: No such file"):
        source.image(0, 4, 4)


def test_check_problems_speaks_up_only_when_there_are_some(capsys):
    check_problems([], 0)
    assert capsys.readouterr().err == ""
    check_problems(["a: b"], 100)
    assert capsys.readouterr().err == "1 of 100 samples cannot be used, the first: a: b\n"
    check_problems(["a: b"] * 20, 100, limit=0.2)
    with pytest.raises(ValueError) as caught:
        check_problems([f"file{i}: b" for i in range(30)], 100)
    assert "file9: b" in str(caught.value) and "file10" not in str(caught.value)


def test_scenes_go_through_the_same_generator():
    read = list(readable(Scenes(5, seed=2), 32, 48))
    assert [index for index, _, _ in read] == list(range(5))
    assert all(image.shape == (32, 48, 3) for _, image, _ in read)
    assert all(captions == scene_captions(make_scene(2, i)) for i, _, captions in read)


# ------------------------------------------------------------------------------------------------------------
# Looking at it
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, shown", [(16, 160), (64, 192), (100, 200), (256, 256), (512, 512)])
def test_a_grid_enlarges_small_pictures_by_whole_factors_and_shows_them_all(size, shown):
    images = [np.full((size, size, 3), (200, 10 * i, 30), np.uint8) for i in range(5)]
    images[1] = Image.fromarray(images[1])
    grid = np.asarray(captioned_grid(images, [f"caption {i}" for i in range(5)], 3))
    for i in range(5):
        rows, columns = np.nonzero((grid == (200, 10 * i, 30)).all(axis=2))
        assert len(rows) == shown * shown and np.ptp(rows) == np.ptp(columns) == shown - 1
    assert 3 * shown < grid.shape[1] < 4 * shown
    assert np.asarray(captioned_grid(images[:2], ["", "a"], 6)).shape[1] < 3 * shown      # no empty columns


def test_captions_stay_within_the_width_of_their_picture():
    captions = ["WIDE LETTERS " * 30, "x" * 700, "short", "many small words in a row " * 9]
    grid = np.asarray(captioned_grid([np.full((64, 64, 3), 255, np.uint8)] * 4, captions, 4)).min(axis=2)
    gap = 8 + 192 // 32
    below = grid[gap + 192 + 2 :]                                                # under the pictures, text alone
    assert (below < 128).any()
    for i in range(1, 4):
        assert (below[:, i * (192 + gap) + 2 : i * (192 + gap) + gap - 2] == 255).all()


@pytest.mark.parametrize("own", [False, True])
def test_run_as_a_script_it_draws_the_grid_and_names_what_is_unusable(tmp_path, monkeypatch, capsys, own):
    tar = write_tar(tmp_path / "x.tar", samples(30, broken=(4,)) + [("z.png", solid(1))])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["data.py"] + [str(tar)] * own)
    data.main()
    assert read_image("scenes.png").width > 1000
    output = capsys.readouterr().out
    assert "samples are in scenes.png" in output
    assert ("x.tar/0004.png: not a" in output and "x.tar/z.png: no .txt" in output) == own


# ------------------------------------------------------------------------------------------------------------
# The shared test data: broken files, emoji, photographs
# ------------------------------------------------------------------------------------------------------------

@needs_data
@pytest.mark.parametrize("entry", [e for e in EXPECTED if e["file"].startswith("images/")], ids=lambda e: e["file"][7:])
def test_a_broken_or_unusual_picture_behaves_as_listed(entry):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            image = read_image(DATA / "bad" / entry["file"])
        except UnreadableImage as error:
            assert entry["expect"] != "ok", error
            assert entry["file"] in str(error)
        else:
            assert entry["expect"] != "error" and image.mode == "RGB" and list(image.size) == entry["size"]


@needs_data
def test_unusual_pictures_have_the_right_pixels():
    read = lambda name: np.asarray(read_image(DATA / "bad" / "images" / name)).astype(int)
    good, gray = read("good.png"), read("gray.png")
    assert (read("gray16.png") == gray).all() and gray.std() > 20
    assert (read("rgb16.png") == good).all() and (read("png_inside.jpg") == good).all()
    for name in ("jpeg_inside.png", "trailing_garbage.jpg"):
        assert (read(name) == read("good.jpg")).all()
    for name, tolerance in (("exif_rotated.jpg", 6), ("exif_invalid.jpg", 6), ("cmyk.jpg", 12), ("good.jpg", 8)):
        assert np.abs(read(name) - good).mean() < tolerance, name
    assert (read("rgba.png")[:, 48:] == 255).all() and (read("rgba.png")[:32, :48] == good[:32, :48]).all()
    assert np.abs(read("rgba.png")[32:, :48] - (good[32:, :48] + 255) / 2).max() <= 1.5
    assert (read("gray_alpha.png")[:, 48:] == 255).all() and (read("palette_transparent.png") == 255).all(axis=2).any()
    assert (read("animated.gif") == (255, 0, 0)).all() and set(np.unique(read("one_bit.png"))) == {0, 255}


@needs_data
def test_captions_behave_as_listed():
    source = ImageFiles(DATA / "bad" / "captions")
    captions = {source.name(i): source.captions(i) for i in range(len(source))}
    problems = {problem.split(":")[0]: problem for problem in source.problems}
    for entry in EXPECTED:
        folder, name = entry["file"].split("/") if entry["file"].startswith("captions/") else ("", "")
        if name.endswith(".txt"):
            picture = name.replace(".txt", ".png")
            assert (name in problems) != (picture in captions)
            assert entry["expect"] == "either" or (name in problems) == (entry["expect"] == "error"), entry
            assert "caption" not in entry or captions[picture] == (entry["caption"],)
        elif folder and entry["expect"] == "error":
            assert name in problems                                              # missing_caption.png
        elif folder:
            assert list(read_image(DATA / "bad" / entry["file"]).size) == entry["size"]
    assert captions["two_lines.png"] == ("a colour gradient on two lines",)
    assert len(captions["very_long.png"][0]) == 20000 * 5 - 1


@needs_data
@pytest.mark.parametrize("entry", [e for e in EXPECTED if e["file"].startswith("shards/")], ids=lambda e: e["file"][7:])
def test_a_broken_shard_behaves_as_listed(entry):
    try:
        source = ImageFiles(DATA / "bad" / entry["file"])
    except ValueError as error:
        assert entry["expect"] != "ok" and entry.get("samples", 0) == 0 and entry["file"] in str(error)
        return
    read = [captions for _, _, captions in readable(source, 8, 8, limit=1)]
    assert source.problems or entry["expect"] != "error"
    assert len(read) == entry.get("samples", entry.get("whole_samples", len(read)))
    assert ("whole_samples" in entry) <= any("damaged, cut short" in problem for problem in source.problems)
    if entry["file"] == "shards/mixed.tar":
        assert read == [("good one",), ("good two",)] and len(source.problems) == 5


@needs_data
def test_the_bad_list_gives_its_two_good_lines_and_names_the_others():
    source = ImageFiles(DATA / "bad" / "metadata_bad.jsonl")
    assert [(source.name(i), source.captions(i)) for i in range(len(source))] == [
        ("captions/good.png", ("a colour gradient",)), ("images/good.jpg", ("the last good line",))]
    assert [problem.split(":")[0] for problem in source.problems] == [
        f"metadata_bad.jsonl line {number}" for number in (2, 3, 4, 5, 6, 7, 8, 10)]


@needs_data
@pytest.mark.parametrize("folder, count, captions", [("emoji", 1893, 1), ("photos/clothing", 1395, 1),
                                                     ("photos/flickr8k", 1000, 5), ("photos/coco", 154, 5)])
def test_the_real_sets_open_without_a_problem(folder, count, captions):
    source = ImageFiles(DATA / folder)
    lines = (DATA / folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(source) == count == len(lines) and source.problems == []
    for index in range(0, count, count // 7):
        entry = json.loads(lines[index])
        assert source.name(index) == f"{entry['shard']}/{entry['file_name']}"
        assert source.captions(index)[0] == " ".join(entry["text"].split()) and len(source.captions(index)) == captions
        assert source.picture(index).size == (entry.get("width", 128), entry.get("height", 128))
        assert source.image(index, 32, 48).shape == (32, 48, 3)
