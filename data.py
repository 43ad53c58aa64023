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

import csv
import io
import json
import sys
import tarfile
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
    return Scene(kind, height, width, background, (thing(*halves[relation]),), relation, pick(WORDS), word_color, wording)


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
