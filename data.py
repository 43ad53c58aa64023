"""data.py: captioned images, drawn or read (SD3, arXiv:2403.03206v1, Sec. 5.2.2 and 5.3.1, App. E.1).

Read with   Sec. 5.2.2: each image has an original caption (short, leaves things out) and a synthetic one (full);
            App. E.1: no random augmentation, resize and centre crop, so that latents can be computed once
Not here    networks, latents, token ids (vae.py, text_encoders.py, train.py)
Two sources Scenes         drawn on the spot from (seed, index): ground truth is known, nothing to download
            ImageFiles     a folder with .txt captions, metadata.jsonl or .csv, or WebDataset .tar shards
            Both give `len(source)`, `source.image(index, height, width)` and `source.captions(index)`,
            and keep `problems`, what cannot be used, beside `found`, how many samples there are with those.
Images      uint8 RGB (height, width, 3) here; `to_tensor` makes (3, height, width) floats in [-1, 1]
Run         python data.py          draws 24 scenes with their captions into scenes.png
            python data.py PATH     the same for your own images, and names every file that cannot be used
"""

import copy
import csv
import io
import json
import math
import os
import re
import sys
import tarfile
import textwrap
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

# ------------------------------------------------------------------------------------------------------------
# Built-in scenes: GenEval's vocabulary (objects, colours, counts, positions) with exact ground truth
# ------------------------------------------------------------------------------------------------------------

COLORS = {"red": (215, 30, 40), "orange": (250, 135, 15), "yellow": (255, 225, 50), "green": (30, 150, 60),
          "cyan": (60, 210, 225), "blue": (35, 75, 225), "purple": (140, 45, 175), "pink": (255, 145, 200)}
BACKGROUNDS = {"white": (255, 255, 255), "gray": (128, 128, 128), "black": (0, 0, 0),
               "brown": (110, 70, 40), "navy": (15, 25, 75)}
HELD_OUT_SEED = 1_000_003        # scenes of this seed validate and score; a run trains on those of its own --seed
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
SIZES = {"small": 0.22, "medium": 0.30, "large": 0.39}                    # diameter / shorter side of the image
COUNTS = {1: "a", 2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
WORDS = ("A I GO UP NO ON IN ME WE HI OK CAT DOG SUN SKY RED BIG ART TEA ICE FOX BEE OWL CAR BUS TOY HAT CUP BOX MAP "
         "OPEN STOP LOVE MOON STAR FISH BIRD TREE BOOK CAKE SHIP RAIN SNOW FIRE GOLD HOME GAME KING HELLO HAPPY WORLD "
         "LIGHT MUSIC APPLE HOUSE WATER SMILE PIZZA DREAM PAPER SUMMER WINTER FLOWER GARDEN ORANGE SILVER ROCKET "
         "COFFEE").split()


@dataclass(frozen=True)
class Thing:
    """One drawn object: its names, and its place in pixels (top left corner and diameter)."""
    shape: str
    color: str
    size: str
    left: int
    top: int
    diameter: int


@dataclass(frozen=True)
class Scene:
    """What a picture holds. `kind` is single, pair, count or word; a pair's first thing is `relation` its second."""
    kind: str
    height: int
    width: int
    background: str
    things: tuple[Thing, ...]
    relation: str = ""
    word: str = ""
    word_color: str = ""
    wording: float = 0.0        # in [0, 1): which of the short captions this scene gets


def make_scene(seed: int, index: int, height: int = 64, width: int = 64) -> Scene:
    """The scene number `index` of the endless set `seed`; the same on every machine, rank and worker."""
    rng = np.random.default_rng((seed, index))
    pick = lambda names: names[rng.integers(len(names))]
    kind = ("single", "pair", "pair", "pair", "count", "count", "word")[rng.integers(7)]
    background, wording = pick(tuple(BACKGROUNDS)), rng.random()

    def thing(box_left, box_top, box_height, box_width, shape=None, color=None, size=None):
        """A thing somewhere inside a box, a pixel clear of its edges where there is room."""
        shape, color, size = shape or pick(SHAPES), color or pick(tuple(COLORS)), size or pick(tuple(SIZES))
        diameter = round(SIZES[size] * min(height, width) * rng.uniform(0.95, 1.05))
        diameter = max(3, min(diameter, box_height - 2, box_width - 2))
        left = box_left + 1 + int(rng.random() * max(1, box_width - diameter - 1))     # one draw each whatever the size
        top = box_top + 1 + int(rng.random() * max(1, box_height - diameter - 1))      # of the box: same captions
        return Thing(shape, color, size, left, top, diameter)

    half_h, half_w = height // 2, width // 2
    halves = {"left of": (0, 0, height, half_w), "right of": (half_w, 0, height, half_w),
              "above": (0, 0, half_h, width), "below": (0, half_h, half_h, width)}
    relation = word = word_color = ""
    if kind == "single":
        things = (thing(0, 0, height, width),)
    elif kind == "pair":
        relation = pick(RELATIONS)
        first, second = thing(*halves[relation]), thing(*halves[OPPOSITE[relation]])
        if (first.shape, first.color) == (second.shape, second.color):           # that would be a count
            second = replace(second, shape=pick([shape for shape in SHAPES if shape != first.shape]))
        things = (first, second)
    elif kind == "count":
        look = pick(SHAPES), pick(tuple(COLORS)), pick(tuple(SIZES))
        cells = rng.permutation(4)[: rng.integers(2, 5)]
        things = tuple(thing(c % 2 * half_w, c // 2 * half_h, half_h, half_w, *look) for c in cells)
    else:                                                                        # a thing above or below a word
        relation, dark = pick(("above", "below")), background in ("black", "navy", "brown")
        word_color = pick(tuple(COLORS) if dark else ("black", "red", "blue", "green"))
        word_color = "black" if background == "gray" else word_color
        things, word = (thing(*halves[relation]),), pick(WORDS)
    return Scene(kind, height, width, background, things, relation, word, word_color, wording)


@lru_cache(maxsize=4096)
def shape_mask(shape: str, diameter: int) -> np.ndarray:
    """Coverage of a shape in its bounding square: (diameter, diameter) float32 in [0, 1], edges anti-aliased."""
    s = 8 * diameter                                                             # drawn 8 times as large, then averaged
    canvas = Image.new("L", (s, s), 0)
    draw = ImageDraw.Draw(canvas)
    polygon = lambda points: draw.polygon([(x * s, y * s) for x, y in points], fill=255)
    if shape in ("circle", "ring"):
        draw.ellipse((0, 0, s - 1, s - 1), fill=255)
        if shape == "ring":
            draw.ellipse((0.27 * s, 0.27 * s, 0.73 * s, 0.73 * s), fill=0)
    elif shape == "square":
        polygon([(0.05, 0.05), (0.95, 0.05), (0.95, 0.95), (0.05, 0.95)])
    elif shape == "triangle":
        polygon([(0.5, 0.03), (1, 0.95), (0, 0.95)])
    elif shape == "diamond":
        polygon([(0.5, 0), (0.92, 0.5), (0.5, 1), (0.08, 0.5)])
    elif shape == "star":
        angles = np.pi * (np.arange(10) / 5 - 0.5)
        radii = np.where(np.arange(10) % 2, 0.21, 0.52)
        polygon(list(zip(0.5 + radii * np.cos(angles), 0.53 + radii * np.sin(angles))))
    elif shape == "cross":
        draw.rectangle((0.34 * s, 0, 0.66 * s, s), fill=255)
        draw.rectangle((0, 0.34 * s, s, 0.66 * s), fill=255)
    elif shape == "heart":
        angle = np.linspace(0, 2 * np.pi, 64)
        x = 16 * np.sin(angle) ** 3
        y = 13 * np.cos(angle) - 5 * np.cos(2 * angle) - 2 * np.cos(3 * angle) - np.cos(4 * angle)
        polygon(list(zip(0.5 + x / 33, 0.46 - y / 31)))
    else:
        raise ValueError(f"no shape called {shape!r}; the shapes are {', '.join(SHAPES)}")
    return np.asarray(canvas.reduce(8), dtype=np.float32) / 255


@lru_cache(maxsize=1024)
def word_mask(word: str, height: int, max_width: int) -> np.ndarray:
    """Coverage of a word in capitals, cropped to its ink: float32 in [0, 1], at most (height, max_width)."""
    font = ImageFont.load_default(size=4 * height)
    left, top, right, bottom = (int(v) for v in font.getbbox(word))
    canvas = Image.new("L", (right - left, bottom - top), 0)
    ImageDraw.Draw(canvas).text((-left, -top), word, font=font, fill=255)
    scale = min(height / canvas.height, max_width / canvas.width)
    size = max(1, round(canvas.width * scale)), max(1, round(canvas.height * scale))
    return np.asarray(canvas.resize(size, Image.Resampling.BOX), dtype=np.float32) / 255


def draw_scene(scene: Scene) -> np.ndarray:
    """uint8 (height, width, 3). Pastes cached masks, so that one core draws thousands of 64-px scenes a second."""
    canvas = np.empty((scene.height, scene.width, 3), dtype=np.float32)
    canvas[:] = BACKGROUNDS[scene.background]

    def paste(mask, left, top, color):
        patch = canvas[top : top + mask.shape[0], left : left + mask.shape[1]]
        patch += mask[..., None] * (np.float32(color) - patch)

    for thing in scene.things:
        paste(shape_mask(thing.shape, thing.diameter), thing.left, thing.top, COLORS[thing.color])
    if scene.word:
        mask = word_mask(scene.word, round(0.26 * min(scene.height, scene.width)), round(0.92 * scene.width))
        middle = round(scene.height * (0.75 if scene.relation == "above" else 0.25))
        paste(mask, (scene.width - mask.shape[1]) // 2, middle - mask.shape[0] // 2,
              (COLORS | BACKGROUNDS)[scene.word_color])
    return (canvas + 0.5).astype(np.uint8)


def plural(shape: str) -> str:
    """The plural of a shape's name."""
    return shape + ("es" if shape == "cross" else "s")


def scene_captions(scene: Scene) -> tuple[str, str]:
    """(short, full): what people write beside a picture, and what a vision-language model would (Sec. 5.2.2).

    The short one leaves out the background and the sizes, often the colours or the positions; the full one is complete.
    """
    colors_said, relation_said = scene.wording < 0.7, int(scene.wording * 100) % 2 == 0

    def noun(thing, size, color, count=1):
        words = [COUNTS[count], thing.size if size else "", thing.color if color else "",
                 thing.shape if count == 1 else plural(thing.shape)]
        phrase = " ".join(word for word in words if word)
        return "an" + phrase[1:] if phrase.startswith("a o") else phrase           # an orange star

    first, place = scene.things[0], f"on a {scene.background} background"
    if scene.kind in ("single", "count"):
        n = len(scene.things)
        return noun(first, False, colors_said, n), f"{noun(first, True, True, n)} {place}"
    if scene.kind == "pair":
        second = scene.things[1]
        joint = scene.relation if relation_said else "and"
        return (f"{noun(first, False, colors_said)} {joint} {noun(second, False, colors_said)}",
                f"{noun(first, True, True)} {scene.relation} {noun(second, True, True)} {place}")
    word = f"the word {scene.word}"
    return (word if relation_said else f"{noun(first, False, colors_said)} and {word}",
            f"{noun(first, True, True)} {scene.relation} {word} in {scene.word_color} {place}")


class Scenes:
    """An endless source of drawn scenes, cut to `size` of them. Index i is `make_scene(seed, i)`."""

    def __init__(self, size: int, seed: int = 0):
        self.size, self.seed = size, seed
        self.problems, self.found = [], size

    def __len__(self):
        return self.size

    def image(self, index: int, height: int, width: int) -> np.ndarray:
        """uint8 (height, width, 3): drawn at this very size, nothing is resized."""
        return draw_scene(make_scene(self.seed, index, height, width))

    def captions(self, index: int) -> tuple[str, ...]:
        """The short caption and the full one (they do not depend on the size)."""
        return scene_captions(make_scene(self.seed, index))

    def name(self, index: int) -> str:
        return f"scene {index} of seed {self.seed}"

    def picture_size(self, index: int) -> tuple[int, int]:
        """(height, width) of the shape that this scene would like to have: between 1:2 and 2:1, 64 px in the mean."""
        aspect = 2 ** np.random.default_rng((self.seed, index, 1)).uniform(-1, 1)
        return round(64 * aspect**0.5), round(64 / aspect**0.5)


# ------------------------------------------------------------------------------------------------------------
# Real data: pictures with captions, from files of any layout. Nothing is unpacked, nothing outside a path is read.
# ------------------------------------------------------------------------------------------------------------

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")                          # no other decoder sees a foreign file
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 2**27                                                               # 134 million, by the header


class UnreadableImage(ValueError):
    """A picture that cannot be used: broken, cut short, empty, too large, missing. The message is "name: reason"."""


def read_image(source, name=None) -> Image.Image:
    """Any picture file as upright 8-bit RGB of its own size; of an animation, the first frame.

    source: a path, the bytes of a file, or an open binary file. name: what to call it in errors, instead of its path.
    """
    name = name or (source if isinstance(source, (str, Path)) else getattr(source, "name", "picture"))
    try:
        content = source if isinstance(source, bytes) else (
            source.read() if hasattr(source, "read") else Path(source).read_bytes())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            image = Image.open(io.BytesIO(content), formats=FORMATS)             # reads the header only
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width}x{image.height} by its header, more than {MAX_PIXELS} pixels")
            image.load()
            with suppress(Exception):                                            # a broken EXIF block, a whole picture
                ImageOps.exif_transpose(image, in_place=True)                    # a camera on its side; 99 is ignored
            return to_rgb(image)
    except Image.UnidentifiedImageError:
        reason = f"not a {', '.join(FORMATS)} file, it begins with {content[:12]}" if content else "the file is empty"
    except Exception as error:               # decoders raise OSError, SyntaxError, ValueError, struct.error and others
        reason = getattr(error, "strerror", None) or f"cannot be decoded ({error}); fetch it again or leave it out"
    raise UnreadableImage(f"{name}: {reason}")


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode: transparency on white, 16-bit gray scaled to 8 bits, where Pillow would clip it."""
    if image.mode.startswith("I"):                                               # "I;16", "I;16B", "I"
        gray = np.asarray(image).astype(np.float32) / 257                        # 65535 -> 255
        return Image.fromarray(gray.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("float pixels have no agreed white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def resize_and_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale, aspect kept, until (height, width) is just covered, and cut out the centre (App. E.1); both at once."""
    scale = min(image.width / width, image.height / height)                      # source pixels per target pixel
    left, top = max(0, image.width - scale * width) / 2, max(0, image.height - scale * height) / 2
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0,
                        box=(left, top, image.width - left, image.height - top))


def aspect_buckets(resolution: int, step: int = 0, longest: float = 4.0) -> list[tuple[int, int]]:
    """The sizes (height, width), in pixels, of mixed-aspect training at S = resolution (Sec. 5.3.2): H * W as near to S^2 as
    multiples of `step` allow, from 1:longest to longest:1 (Podell et al. 2023 have 4), flattest first.

    step: 16 (VAE factor 8 x patch 2) or 64; by default 64 from 512 px up, where it leaves enough sizes, and 16 below.
    """
    step = step or (64 if resolution >= 512 else 16)
    if resolution % 16 or step % 16 or resolution < step:
        raise ValueError(f"buckets of {resolution} px in steps of {step}: both must be multiples of 16 px, the step not larger")
    sizes = {(resolution, resolution)}
    for side in range(step, resolution, step):                                   # the shorter one
        other = round(resolution**2 / side / step) * step
        if side < other <= longest * side:
            sizes |= {(side, other), (other, side)}
    return sorted(sizes, key=lambda size: size[0] / size[1])


def nearest_bucket(height: int, width: int, buckets: list[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose aspect ratio is nearest to a picture's, in the logarithm: 2:1 is as far from 1:1 as 1:2."""
    return min(buckets, key=lambda size: abs(math.log(size[0] / size[1] * width / height)))


def to_tensor(image) -> torch.Tensor:
    """RGB picture or uint8 array (height, width, 3) -> (3, height, width) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))                 # copied: a picture's own is read-only
    return (pixels / 127.5 - 1).permute(2, 0, 1).contiguous()


def from_tensor(image: torch.Tensor) -> Image.Image:
    """(3, height, width) in [-1, 1] -> RGB picture; clamped and rounded, so from_tensor(to_tensor(p)) equals p."""
    pixels = ((image.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


@dataclass(frozen=True)
class Record:
    """`size` bytes from `offset` of the file `path`: a picture with its captions, or a caption file to be paired."""
    name: str                                # for messages: shard.tar/000001.jpg, or the path within the folder
    path: Path
    offset: int
    size: int
    captions: tuple[str, ...] = ()

    def read(self, limit: int = 2**63) -> bytes:
        """Its first bytes, all by default. The file is opened anew: threads and forked workers share no position."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(min(self.size, limit))


def clean_caption(text) -> str:
    """A caption with its white space collapsed. ValueError if it is not text, not UTF-8, blank, or holds a NUL."""
    if not isinstance(text, str):
        raise ValueError(f"the caption is {text!r} and not text")
    if text.encode(errors="replace").decode() != text:                           # wrong bytes, kept as lone surrogates
        raise ValueError("the caption is not UTF-8; save it again as UTF-8")
    if "\0" in text or not text.strip():
        raise ValueError("the caption holds a NUL byte" if "\0" in text else "the caption is empty")
    return " ".join(text.split())


def listed_captions(entry) -> tuple[str, ...]:
    """The captions of a JSON object or CSV row: under "captions", "text" or "caption"; () if it has none of them."""
    if not isinstance(entry, dict):
        raise ValueError("not a JSON object")
    found = next((entry[key] for key in ("captions", "text", "caption") if entry.get(key) is not None), [])
    return tuple(clean_caption(caption) for caption in (found if isinstance(found, list) else [found]))


def pair_up(pieces: list[Record], problems: list[str]) -> list[Record]:
    """Pictures with captions from files that share a name up to the suffix: cat.jpg with cat.txt or cat.json."""
    samples, records = {}, []
    for piece in pieces:
        if re.search(r"(^|/)\.[^./]", piece.name):                               # hidden, as macOS's ._cat.jpg
            continue
        key, suffix = os.path.splitext(piece.name)
        kind = "picture" if suffix.lower() in PICTURE_SUFFIXES else suffix.lower()
        if samples.setdefault(key, {}).setdefault(kind, piece) is not piece:
            problems.append(f"{piece.name}: duplicate key, {samples[key][kind].name} came first and is used")
    for parts in samples.values():
        name = next((parts[kind].name for kind in (".json", ".txt", "picture") if kind in parts), "")
        text = lambda kind: parts[kind].read().decode("utf-8-sig", "surrogateescape")
        try:
            captions = listed_captions(json.loads(text(".json"))) if ".json" in parts else ()
            if ".txt" in parts and not captions:
                captions = (clean_caption(text(".txt")),)
            if captions and "picture" in parts:
                records.append(replace(parts["picture"], captions=captions))
            elif captions or "picture" in parts:
                raise ValueError("a caption without a picture" if captions else "no .txt (or .json) with its caption")
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{name}: {error}")
    return records


def scan_folder(folder: Path, problems: list[str]) -> list[Record]:
    """Pictures at any depth of a folder, with captions of the same name beside them."""
    return pair_up([Record(file.relative_to(folder).as_posix(), file, 0, file.stat().st_size)
                    for file in sorted(folder.rglob("*")) if file.is_file()], problems)


def scan_tar(path: Path, problems: list[str]) -> list[Record]:
    """One WebDataset shard, an uncompressed tar: KEY.jpg with KEY.txt, or with KEY.json for several captions."""
    pieces, end, file_size, damage = [], 0, path.stat().st_size, ""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                end = tar.offset                                                 # where the next header should be
                if member.isreg() and not member.issparse() and member.offset_data + member.size <= file_size:
                    pieces.append(Record(f"{path.name}/{member.name}", path, member.offset_data, member.size))
    except (tarfile.TarError, OSError, ValueError) as error:
        damage = f" ({error})"
    rest = Record(path.name, path, end, 2 * tarfile.RECORDSIZE).read()           # tarfile takes a header that it cannot
    if damage or end > file_size or any(rest):                                   # read for the end; that is all zeros
        problems.append(f"{path.name}: damaged, cut short or not an uncompressed tar; nothing to read at byte {end} of "
                        f"{file_size}{damage}")
    return pair_up(pieces, problems)


def scan_table(path: Path, problems: list[str]) -> list[Record]:
    """metadata.jsonl or .csv, a picture a line: file_name (or image) within the table's folder, text (or captions)."""
    records, folder, is_csv = [], Path(os.path.abspath(path.parent)), path.suffix == ".csv"
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = enumerate(csv.DictReader(file), 2) if is_csv else enumerate(map(str.strip, file), 1)
        try:
            for number, line in lines:
                if line:
                    try:
                        records.append(table_record(folder, line if is_csv else json.loads(line)))
                    except (OSError, ValueError, RecursionError) as error:
                        problems.append(f"{path.name} line {number}: {error}")
        except csv.Error as error:
            problems.append(f"{path.name}: {error}; what follows is not read")
    return records


def table_record(folder: Path, row: dict) -> Record:
    """One line of a table. ValueError if it lacks something or leads out of the folder."""
    captions, name = listed_captions(row), row.get("file_name") or row.get("image")
    if not captions or not isinstance(name, str):
        raise ValueError('it needs a "file_name" and a "text" (or "captions")')
    file = Path(os.path.abspath(folder / name))
    if not file.is_relative_to(folder) or not file.is_file():
        raise ValueError(f"{name!r} is not a file in this folder")
    return Record(name, file, 0, file.stat().st_size, captions)


class ImageFiles:
    """The captioned pictures of a path: a folder, or one .tar, .jsonl or .csv file. Used as `Scenes` is."""

    def __init__(self, path):
        self.path, self.problems = Path(path).expanduser(), []
        tables = [table for table in (self.path / "metadata.jsonl", self.path / "metadata.csv") if table.is_file()]
        places = sorted(self.path.glob("*.tar")) or tables[:1] or [self.path]
        scan = {".tar": scan_tar, ".jsonl": scan_table, ".csv": scan_table}.get(places[0].suffix, scan_folder)
        scan = scan if places[0].is_file() else scan_folder
        self.records = [record for place in places for record in scan(place, self.problems)]
        self.found = len(self.records) + len(self.problems)
        if not self.records:
            state = "holds no usable picture with a caption" if self.path.exists() else "does not exist"
            problems = "".join(f"\n  {problem}" for problem in self.problems[:10])
            raise ValueError(f"{path} {state}. Expected: a folder with tar shards, metadata.jsonl or .csv, or pictures "
                             f"with .txt captions; or one shard or table.{problems}")

    def subset(self, indices) -> "ImageFiles":
        """A source with some of the pictures; it shares `problems` and `found` with the whole."""
        part = copy.copy(self)
        part.records = [self.records[i] for i in indices]
        return part

    def add_captions(self, path):
        """Give every picture a second, synthetic caption beside its first (Sec. 5.2.2). path: JSONL, a line a picture, with
        `file_name` as `name` says it and `caption`. ValueError names a line that does not fit, or a picture left without."""
        added, known = {}, {record.name for record in self.records}
        for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").splitlines(), 1):
            try:
                entry = json.loads(line) if line.strip() else {}
                if entry and entry["file_name"] in known:
                    added[entry["file_name"]] = listed_captions(entry)[0]
            except (ValueError, KeyError, TypeError, IndexError) as problem:
                raise ValueError(f'{path} line {number}: it needs a "file_name" and a "caption" ({problem!r})') from None
        if missing := [record.name for record in self.records if record.name not in added]:
            raise ValueError(f"{path} has no caption for {len(missing)} of {len(self)} pictures, the first: {missing[0]}")
        self.records = [replace(record, captions=(record.captions[0], added[record.name])) for record in self.records]

    def __len__(self):
        return len(self.records)

    def name(self, index: int) -> str:
        return self.records[index].name

    def picture(self, index: int) -> Image.Image:
        """RGB at its own size. Raises UnreadableImage."""
        return read_image(self.records[index])

    def picture_size(self, index: int) -> tuple[int, int]:
        """(height, width) of the upright picture, from its header where that suffices. Raises UnreadableImage."""
        with suppress(Exception), warnings.catch_warnings(action="ignore"):
            with Image.open(io.BytesIO(self.records[index].read(2**18)), formats=FORMATS) as image:
                on_its_side = image.getexif().get(0x0112) in (5, 6, 7, 8)
                return (image.width, image.height) if on_its_side else (image.height, image.width)
        picture = self.picture(index)                                            # says what is wrong, if anything
        return picture.height, picture.width

    def image(self, index: int, height: int, width: int) -> np.ndarray:
        """uint8 (height, width, 3), scaled and centre-cropped. Raises UnreadableImage."""
        return np.array(resize_and_crop(self.picture(index), height, width))

    def captions(self, index: int) -> tuple[str, ...]:
        """One caption or several."""
        return self.records[index].captions


def check_problems(problems: list[str], total: int, limit: float = 0.01):
    """Say on stderr how many of `total` samples are unusable; ValueError with names if that is more than `limit`."""
    summary = f"{len(problems)} of {total} samples cannot be used"
    if problems:
        print(f"{summary}, the first: {problems[0]}", file=sys.stderr)
    if len(problems) > limit * total:
        names = "\n  ".join(problems[:10])
        raise ValueError(f"{summary}, over {100 * limit:g} %. Mend or remove them (python data.py PATH):\n  {names}")


def read_ahead(source, indices, height: int, width: int):
    """Yield (index, future of source.image(index, height, width)) in order, while threads are at work on the next 64."""
    with ThreadPoolExecutor(8) as threads:                                       # decoders let others run meanwhile
        waiting = deque()
        for index in indices:
            waiting.append((index, threads.submit(source.image, index, height, width)))
            if len(waiting) > 64:
                yield waiting.popleft()
        yield from waiting


def readable(source, height: int, width: int, limit: float = 0.01):
    """Yield (index, uint8 (height, width, 3), captions) in order. Unreadable pictures are skipped and join
    `source.problems`; once these are more than `limit` of all that was found, ValueError names them."""
    for index, picture in read_ahead(source, range(len(source)), height, width):
        if len(source.problems) > limit * source.found:
            break
        try:
            yield index, picture.result(), source.captions(index)
        except UnreadableImage as error:
            if str(error) not in source.problems:                                # a second epoch meets it again
                source.problems.append(str(error))
    check_problems(source.problems, source.found, limit)


def captioned_grid(images, captions, columns: int) -> Image.Image:
    """One picture of many (PIL or uint8 arrays), each with its caption below; small ones enlarged by a whole factor."""
    tiles = [Image.fromarray(image) if isinstance(image, np.ndarray) else image for image in images]
    factor = max(1, -(-160 // max(tile.width for tile in tiles)))
    tiles = [tile.resize((factor * tile.width, factor * tile.height), Image.Resampling.NEAREST) for tile in tiles]
    cell_width, cell_height = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
    gap, font = 8 + cell_width // 32, ImageFont.load_default(size=9 + cell_width // 40)
    texts = [wrap_to_width(caption, font, cell_width) for caption in captions]
    step_x = cell_width + gap
    step_y = cell_height + 2 * gap + int(1.4 * font.size * (1 + max(text.count("\n") for text in texts)))
    columns = min(columns, len(tiles))
    grid = Image.new("RGB", (columns * step_x + gap, -(-len(tiles) // columns) * step_y), "white")
    for i, (tile, text) in enumerate(zip(tiles, texts, strict=True)):
        left, top = gap + i % columns * step_x, gap + i // columns * step_y
        tile = ImageOps.expand(tile, 1, "lightgray")                             # else a white one has no edge
        grid.paste(tile, (left - 1 + (cell_width - tile.width + 2) // 2, top + 1 + cell_height - tile.height))
        ImageDraw.Draw(grid).multiline_text((left, top + cell_height + gap // 2), text, font=font, fill="black")
    return grid


def wrap_to_width(caption: str, font, width: int) -> str:
    """The caption in at most six lines of at most `width` pixels."""
    caption, letters = " ".join(caption.split())[:600], 80
    lines = [caption]
    while any(font.getlength(line) > width for line in lines):
        lines = textwrap.wrap(caption, letters, max_lines=6, placeholder=" ...")
        letters -= 1
    return "\n".join(lines)


def main():
    """Draw 24 captioned pictures, of the built-in scenes or of a path, and name what cannot be used."""
    source, shown = ImageFiles(sys.argv[1]) if len(sys.argv) > 1 else Scenes(24), []
    for index, image, captions in readable(source, 192, 192, limit=1):           # 1: read it all, do not stop
        if index % max(1, len(source) // 24) == 0 and len(shown) < 24:
            shown.append((image, " / ".join(captions)))
    if shown:
        captioned_grid(*zip(*shown), columns=6).save("scenes.png")
    print(f"{len(shown)} of {len(source)} samples are in scenes.png", *source.problems, sep="\ncannot be used: ")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"data.py: {error}")
