"""data.py: captioned images, drawn or read (SD3, arXiv:2403.03206v1, Sec. 5.2.2 and 5.3.1, App. E.1).

Read with   Sec. 5.2.2: each image has an original caption (short, leaves things out) and a synthetic one (full);
            App. E.1: no random augmentation, resize and centre crop, so that latents can be computed once
Not here    networks, latents, token ids (vae.py, text_encoders.py, train.py)
Two sources Scenes         drawn on the spot from (seed, index): ground truth is known, nothing to download
            ImageFiles     a folder with .txt captions, metadata.jsonl or .csv, or WebDataset .tar shards
            Both give `len(source)`, `source.image(index, height, width)` and `source.captions(index)`.
Images      uint8 RGB (height, width, 3) here; `to_tensor` makes (3, height, width) floats in [-1, 1]
Run         python data.py          draws 24 scenes with their captions into scenes.png
            python data.py PATH     the same for your own images, and names every file that cannot be used
"""

import copy
import csv
import io
import json
import struct
import sys
import tarfile
import warnings
from dataclasses import dataclass
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
        """A thing somewhere inside a box, two pixels clear of its edges where there is room."""
        shape, color, size = shape or pick(SHAPES), color or pick(tuple(COLORS)), size or pick(tuple(SIZES))
        diameter = round(SIZES[size] * min(height, width) * rng.uniform(0.95, 1.05))
        diameter = max(3, min(diameter, box_height - 2, box_width - 2))
        left = box_left + 1 + int(rng.random() * max(1, box_width - diameter - 1))       # one draw each whatever the size
        top = box_top + 1 + int(rng.random() * max(1, box_height - diameter - 1))        # of the box: same captions
        return Thing(shape, color, size, left, top, diameter)

    half_h, half_w = height // 2, width // 2
    halves = {"left of": (0, 0, height, half_w), "right of": (half_w, 0, height, half_w),
              "above": (0, 0, half_h, width), "below": (0, half_h, half_h, width)}
    if kind == "single":
        return Scene(kind, height, width, background, (thing(0, 0, height, width),), wording=wording)
    if kind == "pair":
        relation = pick(RELATIONS)
        first, second = thing(*halves[relation]), thing(*halves[OPPOSITE[relation]])
        if (first.shape, first.color) == (second.shape, second.color):           # that would be a count
            others = [shape for shape in SHAPES if shape != first.shape]
            second = Thing(pick(others), second.color, second.size, second.left, second.top, second.diameter)
        return Scene(kind, height, width, background, (first, second), relation, wording=wording)
    if kind == "count":
        shape, color, size = pick(SHAPES), pick(tuple(COLORS)), pick(tuple(SIZES))
        cells = rng.permutation(4)[: rng.integers(2, 5)]
        things = tuple(thing(c % 2 * half_w, c // 2 * half_h, half_h, half_w, shape, color, size) for c in cells)
        return Scene(kind, height, width, background, things, wording=wording)
    relation = pick(("above", "below"))                                          # the thing is above or below the word
    word_color = pick(tuple(COLORS) if background in ("black", "navy", "brown") else ("black", "red", "blue", "green"))
    if background == "gray":
        word_color = "black"
    things = (thing(*halves[relation]),)
    return Scene(kind, height, width, background, things, relation, pick(WORDS), word_color, wording)


@lru_cache(maxsize=4096)
def shape_mask(shape: str, diameter: int) -> np.ndarray:
    """Coverage of a shape in its bounding square: (diameter, diameter) float32 in [0, 1], edges anti-aliased."""
    s = 8 * diameter                                                             # drawn 8 times as large, then averaged
    canvas = Image.new("L", (s, s), 0)
    draw = ImageDraw.Draw(canvas)
    polygon = lambda points: draw.polygon([(x * s, y * s) for x, y in points], fill=255)
    if shape == "circle":
        draw.ellipse((0, 0, s - 1, s - 1), fill=255)
    elif shape == "ring":
        draw.ellipse((0, 0, s - 1, s - 1), fill=255)
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
    if scene.kind == "single":
        return noun(first, False, colors_said), f"{noun(first, True, True)} {place}"
    if scene.kind == "count":
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

    def __len__(self):
        return self.size

    def image(self, index: int, height: int, width: int) -> np.ndarray:
        """uint8 (height, width, 3): drawn at this very size, nothing is resized."""
        return draw_scene(make_scene(self.seed, index, height, width))

    def captions(self, index: int) -> tuple[str, ...]:
        """The short caption and the full one (they do not depend on the size)."""
        return scene_captions(make_scene(self.seed, index))


# ------------------------------------------------------------------------------------------------------------
# Real pictures: reading one
# ------------------------------------------------------------------------------------------------------------

MAX_PIXELS = 2**27          # more than this by its header is refused before anything is decoded
Image.MAX_IMAGE_PIXELS = None                                                    # that check is ours


class UnreadableImage(ValueError):
    """A picture that cannot be used; the message names the file and the reason."""


def read_image(source, name: str = "") -> Image.Image:
    """A picture as upright 8-bit RGB. source: a path or the bytes of a file; name: what to call it in messages.

    EXIF rotation is applied, transparency laid on white, 16-bit gray scaled, the first frame of an animation taken.
    """
    name = name or (str(source) if isinstance(source, (str, Path)) else "picture")
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        if not content:
            raise UnreadableImage(f"{name}: the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(content))
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImage(f"{name}: its header says {image.width}x{image.height} px, over {MAX_PIXELS} in all")
            return as_rgb(ImageOps.exif_transpose(image))
    except UnreadableImage:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as problem:
        raise UnreadableImage(f"{name}: not a whole picture ({problem or type(problem).__name__})") from None


def as_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow -> RGB."""
    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def resize_and_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale until the picture covers (height, width), keeping its proportions, and cut out the centre (App. E.1)."""
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def to_tensor(picture) -> torch.Tensor:
    """Picture or uint8 array (height, width, 3) -> (3, height, width) float in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


def from_tensor(image: torch.Tensor) -> Image.Image:
    """(3, height, width) in [-1, 1] -> picture; clamped and rounded to 8 bits."""
    return Image.fromarray(((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


# ------------------------------------------------------------------------------------------------------------
# Real pictures: finding them and their captions
# ------------------------------------------------------------------------------------------------------------

PICTURE_TYPES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Record:
    """Where one captioned picture lies: `size` bytes at `offset` of a file (-1: all of it)."""
    name: str
    path: Path
    captions: tuple[str, ...]
    offset: int = 0
    size: int = -1


def clean_caption(raw) -> str:
    """One caption from bytes (strict UTF-8, a byte order mark allowed) or str: white space collapsed, never empty."""
    text = raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw
    if not isinstance(text, str):
        raise ValueError(f"the caption is {text!r}, not a text")
    text = " ".join(text.split())
    if not text or "\0" in text:
        raise ValueError("the caption is empty" if not text else "the caption holds a NUL byte")
    return text


def captions_of(entry: dict) -> tuple[str, ...]:
    """The captions of a metadata line: a list under "captions", or one under "text" or "caption"."""
    several = entry.get("captions") or [entry.get("text", entry.get("caption"))]
    return tuple(clean_caption(caption) for caption in several)


def scan_folder(folder: Path, problems: list):
    """Pictures with captions of the same name beside them: cat.jpg and cat.txt, in any depth of folders."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    pictures = {p.with_suffix("") for p in files if p.suffix.lower() in PICTURE_TYPES}
    for file in files:
        caption = file.with_suffix(".txt")
        if file.suffix.lower() in PICTURE_TYPES:
            try:
                yield Record(str(file), file, (clean_caption(caption.read_bytes()),))
            except FileNotFoundError:
                problems.append(f"{file}: no caption; write one into {caption.name} beside it")
            except ValueError as problem:
                problems.append(f"{caption}: {problem}; save it as UTF-8 text")
        elif file.suffix == ".txt" and file.with_suffix("") not in pictures:
            problems.append(f"{file}: a caption without a picture")


def scan_metadata(file: Path, problems: list):
    """metadata.jsonl or metadata.csv: file_name (or image) relative to its folder, and text, caption or captions."""
    if file.suffix == ".csv":
        rows = csv.DictReader(io.StringIO(file.read_text(encoding="utf-8-sig", newline="")))
        entries = ((number, dict(row)) for number, row in enumerate(rows, 2))
    else:
        entries = ((number, line) for number, line in enumerate(file.read_bytes().splitlines(), 1) if line.strip())
    for number, entry in entries:
        try:
            entry = json.loads(entry) if isinstance(entry, bytes) else entry
            if not isinstance(entry, dict) or not isinstance(name := entry.get("file_name") or entry.get("image"), str):
                raise ValueError("no file_name")
            path = file.parent / name
            if not path.resolve().is_relative_to(file.parent.resolve()):
                raise ValueError(f"{name} lies outside of the folder")
            if not path.is_file():
                raise ValueError(f"{name} does not exist")
            yield Record(str(path), path, captions_of(entry))
        except ValueError as problem:
            problems.append(f"{file}, line {number}: {problem}")


def scan_tar(file: Path, problems: list):
    """A WebDataset shard: KEY.jpg (or .png, ...) with KEY.txt, or KEY.json that holds "captions". Nothing is unpacked:
    a picture is found again by its place in the file."""
    samples, end, length = {}, 0, file.stat().st_size
    try:
        with tarfile.open(file, "r:") as tar, open(file, "rb") as raw:
            for member in tar:
                end = member.offset_data + (member.size + 511) // 512 * 512
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                key, _, kind = name.partition(".")
                key, kind = f"{folder}/{key}".lstrip("/"), kind.lower()
                if kind in samples.get(key, ()):
                    problems.append(f"{file}:{member.name}: a second file of this name; give every sample a key of its own")
                    continue
                if member.offset_data + member.size > length:
                    problems.append(f"{file}:{member.name}: the shard ends inside of it; fetch it again")
                    continue
                raw.seek(member.offset_data)
                content = raw.read(member.size) if kind in ("txt", "json") else (member.offset_data, member.size)
                samples.setdefault(key, {})[kind] = content
            raw.seek(end)
            if any(raw.read(1024)):
                problems.append(f"{file}: damaged after {len(samples)} samples; fetch it again")
    except (tarfile.TarError, OSError) as problem:
        problems.append(f"{file}: not a readable .tar ({problem}); compressed ones must be unpacked first")
    for key, parts in samples.items():
        kind = next((kind for kind in parts if "." + kind in PICTURE_TYPES), None)
        try:
            if kind is None:
                raise ValueError("a caption without a picture")
            if "json" not in parts and "txt" not in parts:
                raise ValueError("no caption (.txt or .json)")
            entry = json.loads(parts["json"]) if "json" in parts else {}
            captions = captions_of(entry) if {"captions", "text", "caption"} & set(entry) else (clean_caption(parts["txt"]),)
            yield Record(f"{file}:{key}.{kind}", file, captions, *parts[kind])
        except (ValueError, KeyError) as problem:
            problems.append(f"{file}:{key}: {problem}")


class ImageFiles:
    """Captioned pictures from a folder (with .txt captions, metadata.jsonl or .csv, or .tar shards) or from one such file.

    Protocol as `Scenes`. What cannot be used is named in `problems`.
    """

    def __init__(self, path):
        self.path, self.problems = Path(path), []
        shards = [self.path] if self.path.suffix == ".tar" else sorted(self.path.glob("*.tar"))
        tables = [self.path] if self.path.suffix in (".jsonl", ".csv") else \
            [p for p in (self.path / "metadata.jsonl", self.path / "metadata.csv") if p.is_file()][:1]
        if not self.path.exists():
            raise ValueError(f"{self.path}: no such file or folder")
        scans = [(scan_tar, shard) for shard in shards] or [(scan_metadata, table) for table in tables] or \
            [(scan_folder, self.path)]
        self.records = [record for scan, file in scans for record in scan(file, self.problems)]
        if not self.records:
            first = f" First problem: {self.problems[0]}" if self.problems else ""
            raise ValueError(f"{self.path} holds no captioned picture; it should hold pictures with .txt captions, a "
                             f"metadata.jsonl or .csv, or .tar shards.{first}")

    def subset(self, indices) -> "ImageFiles":
        """The same source with some of its records only."""
        part = copy.copy(self)
        part.records = [self.records[i] for i in indices]
        return part

    def __len__(self):
        return len(self.records)

    def name(self, index: int) -> str:
        """What to call the picture in messages."""
        return self.records[index].name

    def picture(self, index: int) -> Image.Image:
        """RGB at its own size; raises UnreadableImage."""
        record = self.records[index]
        with open(record.path, "rb") as file:                                    # a handle of its own: safe in any thread
            file.seek(record.offset)
            return read_image(file.read(record.size), record.name)

    def image(self, index: int, height: int, width: int) -> np.ndarray:
        """uint8 (height, width, 3), resized and cropped; raises UnreadableImage."""
        return np.array(resize_and_crop(self.picture(index), height, width))

    def captions(self, index: int) -> tuple[str, ...]:
        """One caption or several."""
        return self.records[index].captions


def check_problems(problems: list, total: int, limit: float = 0.01):
    """Say how much cannot be used; stop with the names if it is more than `limit` of everything."""
    if not problems:
        return
    names = "\n  ".join(problems[:10]) + ("\n  ..." if len(problems) > 10 else "")
    if len(problems) > limit * total:
        raise ValueError(f"{len(problems)} of {total} pictures or captions cannot be used, more than {limit:.0%}; "
                         f"mend or remove them:\n  {names}")
    print(f"note: {len(problems)} of {total} pictures or captions cannot be used and are skipped:\n  {names}", file=sys.stderr)


def readable(source, height: int, width: int):
    """(index, uint8 (height, width, 3), captions) of everything in a source that can be read, in order; the rest is
    counted, named and skipped, and more than 1 % of it stops with a ValueError."""
    problems = list(getattr(source, "problems", []))
    total = len(source) + len(problems)
    if len(problems) > 0.01 * total:
        check_problems(problems, total)
    for index in range(len(source)):
        try:
            yield index, source.image(index, height, width), source.captions(index)
        except UnreadableImage as problem:
            problems.append(str(problem))
    check_problems(problems, total)


# ------------------------------------------------------------------------------------------------------------
# Looking at them
# ------------------------------------------------------------------------------------------------------------

def captioned_grid(images, captions, columns: int, cell: int = 168) -> Image.Image:
    """Pictures or uint8 arrays in rows, each with its caption below. Small pictures are enlarged by whole factors."""
    images = [Image.fromarray(image) if isinstance(image, np.ndarray) else image for image in images]
    factor = max(1, cell // max(images[0].size))
    width, height = (factor * side for side in images[0].size)
    font = ImageFont.load_default(size=13)
    wrapped = [wrap(caption, font, width) for caption in captions]
    step_x, step_y = width + 12, height + 18 + 16 * max(len(lines) for lines in wrapped)
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * step_x + 12, rows * step_y + 12), "white")
    draw = ImageDraw.Draw(grid)
    for i, (image, lines) in enumerate(zip(images, wrapped)):
        left, top = 12 + i % columns * step_x, 12 + i // columns * step_y
        grid.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top))
        draw.rectangle((left - 1, top - 1, left + width, top + height), outline="#cccccc")
        for n, line in enumerate(lines):
            draw.text((left, top + height + 4 + 16 * n), line, font=font, fill="black")
    return grid


def wrap(text: str, font, width: int) -> list[str]:
    """Lines of at most `width` px, at most five."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines[:5]


def main():
    """Draw 24 captioned pictures, of the built-in scenes or of a path, and name what cannot be used."""
    source, size = (ImageFiles(sys.argv[1]), 160) if len(sys.argv) > 1 else (Scenes(24), 64)
    pictures, captions = [], []
    for _, picture, texts in readable(source, size, size):
        if len(pictures) < 24:
            pictures.append(picture)
            captions.append(" / ".join(texts[:2]))
    captioned_grid(pictures, captions, 6).save("scenes.png")
    print(f"{len(source)} captioned pictures; the first {len(pictures)} are in scenes.png")


if __name__ == "__main__":
    try:
        main()
    except ValueError as problem:
        sys.exit(f"data.py: {problem}")
