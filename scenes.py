"""scenes.py: a drawn world that can be scored exactly (SD3, arXiv:2403.03206v1, Sec. 5).

Read with   Sec. 5.2.2 for two kinds of captions
Not here    networks; what a picture shows, and its score (geneval.py)
Shapes      pictures are uint8 (H, W, 3), masks (H, W); H and W are in pixels
Run         python scenes.py     draws 24 scenes with their captions into out/scenes.png
"""

import math
import random
import re
import textwrap
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

# ---- Draw ----------------------------------------------------------------------------------------
COLORS = {"red": "#d71e28", "orange": "#fa870f", "yellow": "#ffe132", "green": "#1e963c",
          "cyan": "#3cd2e1", "blue": "#234be1", "purple": "#8c2daf", "pink": "#ff91c8"}
BACKGROUNDS = {"white": "#ffffff", "gray": "#808080", "black": "#000000", "brown": "#4b280f",
               "navy": "#0f194b"}
RGB = {}
for name, code in (COLORS | BACKGROUNDS).items():
    RGB[name] = ImageColor.getrgb(code)
OUTLINES = {                 # in the unit square: the box of an ellipse, or corners x, y, x, y, ...
    "circle": ["ellipse 0 0 1 1"],
    "square": ["rectangle .05 .05 .95 .95"],
    "triangle": ["polygon .5 .03 1 .95 0 .95"],
    "diamond": ["polygon .5 0 .92 .5 .5 1 .08 .5"],
    "star": ["polygon .5 .01 .676 .287 .995 .369 .785 .623 .806 .951 .5 .83 .194 .951 .215 .623 "
             ".005 .369 .324 .287"],
    "cross": ["rectangle .3 0 .7 1", "rectangle 0 .3 1 .7"],
    "ring": ["ellipse 0 0 1 1", "ellipse .27 .27 .73 .73"],
    "heart": ["ellipse 0 .04 .53 .57", "ellipse .47 .04 1 .57",
              "polygon .5 .3 .05 .45 .5 .97 .95 .45"]}
SHAPES = tuple(OUTLINES)
SIZES = {"small": 0.335, "medium": 0.395, "large": 0.45}    # diameter / shorter side of the picture
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(OPPOSITE)
PLACES = {                   # left, top, width, height of a box, in the unit square
    "": (0, 0, 1, 1),
    "left of": (0, 0, 0.5, 1),
    "right of": (0.5, 0, 0.5, 1),
    "above": (0, 0, 1, 0.5),
    "below": (0, 0.5, 1, 0.5)}
QUARTERS = ((0, 0, 0.5, 0.5), (0.5, 0, 0.5, 0.5), (0, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5))
GROUNDS = ("white", "white", "black", "black", "gray", "brown", "navy")
KINDS = ("single", "single", "pair", "pair", "pair", "count", "word")
WORDS = ("GO UP NO ON ME WE HI OK CAT DOG SUN SKY RED BIG ART TEA ICE FOX BEE OWL CAR BUS HAT CUP "
         "MAP OPEN STOP LOVE MOON STAR FISH TREE BOOK RAIN SNOW HOME HELLO HAPPY MUSIC").split()
HELD_OUT_SEED = 1_000_003       # scenes of this seed validate and score; training has another seed


@dataclass(frozen=True)
class Thing:
    """One object: its names, its square in pixels and, once recognised, its place: (H, W) bool."""
    shape: str
    color: str
    size: str
    left: float
    top: float
    diameter: float
    mask: np.ndarray | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Scene:
    """What a picture holds."""
    kind: str                       # single, pair, count or word
    height: int
    width: int
    background: str
    things: tuple[Thing, ...]
    relation: str = ""              # of the first thing to the second, or to the word
    word: str = ""
    wording: int = 0                # seeds the captions


def is_held_out(shapes, colors, relation="") -> bool:
    """Is this combination never drawn for training? A colour or relation "" is not checked.
    There is no green circle, for example, no circle left of a diamond or above a cross."""
    names = list(COLORS)
    for shape, color in zip(shapes, colors):
        if color and (names.index(color) - SHAPES.index(shape)) % 8 == 3:
            return True
    if relation == "" or len(shapes) != 2:
        return False
    first, second = map(SHAPES.index, shapes)
    step = 3 if relation in ("left of", "below") else 5
    return (second - first) % 8 == step


def make_scene(seed: int, index: int, height=64, width=64, held_out=False) -> Scene:
    """Scene `index` of the endless set `seed`. Another size changes only places and diameters.
    held_out: whether it has a combination that training never sees."""
    rng = np.random.default_rng((seed, index))
    while True:
        scene = compose(rng, height, width)
        shapes = [thing.shape for thing in scene.things]
        colors = [thing.color for thing in scene.things]
        equal = scene.kind == "pair" and len(set(zip(shapes, colors))) == 1      # That is a count.
        if not equal and is_held_out(shapes, colors, scene.relation) == held_out:
            return scene


def pick(rng, choices):
    """One of the choices, by a generator of numpy or of Python."""
    return choices[int(rng.random() * len(choices))]


def compose(rng, height, width) -> Scene:
    """Any scene. The number of random draws does not depend on the size."""
    kind = pick(rng, KINDS)
    background = pick(rng, GROUNDS)
    wording = int(rng.random() * 2**31)
    boxes, relation, word = [PLACES[""]], "", ""
    if kind == "pair":
        relation = pick(rng, RELATIONS)
        boxes = [PLACES[relation], PLACES[OPPOSITE[relation]]]
    elif kind == "count":
        order = rng.permutation(4)
        count = pick(rng, (2, 3, 4))
        boxes = [QUARTERS[i] for i in order[:count]]
    elif kind == "word":
        word = pick(rng, WORDS)
        relation = pick(rng, ("", "above", "below"))
        boxes = [PLACES[relation]] if relation else []           # Or the word stands alone.
    things = []
    for box in boxes:
        if not things or kind == "pair":                         # Counted things look alike.
            shape = pick(rng, SHAPES)
            color = pick(rng, tuple(COLORS))
            size = pick(rng, tuple(SIZES))
        diameter = SIZES[size] * min(height, width) * (0.98 + 0.04 * rng.random())
        left, top, box_width, box_height = box
        free_x = box_width * width - 2                           # A margin of 1 px stays free.
        free_y = box_height * height - 2
        diameter = max(3, int(min(diameter, free_x, free_y)))
        left = left * width + 1 + rng.random() * max(0, free_x - diameter)
        top = top * height + 1 + rng.random() * max(0, free_y - diameter)
        things.append(Thing(shape, color, size, int(left), int(top), diameter))
    return Scene(kind, height, width, background, tuple(things), relation, word, wording)


@lru_cache(maxsize=4096)
def shape_mask(shape: str, diameter: int) -> np.ndarray:
    """Coverage of a shape in its square: (diameter, diameter) float32 in [0, 1]."""
    scale = 8 * diameter                             # It is drawn 8 times as large, then averaged.
    canvas = Image.new("L", (scale, scale), 0)
    pen = ImageDraw.Draw(canvas)
    for number, outline in enumerate(OUTLINES[shape]):
        method, *points = outline.split()
        points = [scale * float(value) for value in points]
        hole = shape == "ring" and number == 1
        getattr(pen, method)(points, fill=0 if hole else 255)
    return np.asarray(canvas.reduce(8), dtype=np.float32) / 255


@lru_cache(maxsize=4096)
def word_mask(word: str, relation: str, height: int, width: int) -> np.ndarray:
    """Coverage of a word in a picture (height, width). relation: where a thing is to it."""
    size = round(0.3 * min(height, width))
    room = round(0.92 * width)
    font = ImageFont.load_default(4 * size)
    bold = size // 6
    left, top, right, bottom = font.getbbox(word, stroke_width=bold)
    ink = Image.new("L", (int(right - left), int(bottom - top)), 0)
    pen = ImageDraw.Draw(ink)
    pen.text((-left, -top), word, 255, font, stroke_width=bold)
    scale = min(size / ink.height, room / ink.width)
    small = round(ink.width * scale), round(ink.height * scale)
    ink = ink.resize(small, Image.Resampling.BOX)
    middle = round(height * {"": 0.5, "above": 0.75, "below": 0.25}[relation])
    corner = (width - ink.width) // 2, middle - ink.height // 2
    canvas = Image.new("L", (width, height), 0)
    canvas.paste(ink, corner)
    return np.asarray(canvas, dtype=np.float32) / 255


def draw_scene(scene: Scene) -> np.ndarray:
    """The picture, uint8 (height, width, 3)."""
    H, W = scene.height, scene.width
    canvas = np.empty((H, W, 3), dtype=np.float32)
    canvas[:] = RGB[scene.background]
    for thing in scene.things:
        below = slice(thing.top, thing.top + thing.diameter)
        beside = slice(thing.left, thing.left + thing.diameter)
        mask = shape_mask(thing.shape, thing.diameter)
        paint(canvas[below, beside], mask, RGB[thing.color])
    if scene.word:
        light = scene.background in ("white", "gray")
        mask = word_mask(scene.word, scene.relation, H, W)
        paint(canvas, mask, 0 if light else 255)
    return (canvas + 0.5).astype(np.uint8)


def paint(canvas, mask, color):
    """Blend a colour into a canvas (H, W, 3), in place, where the mask (H, W) covers it."""
    canvas += mask[..., None] * (np.float32(color) - canvas)


# ---- Say it in words -----------------------------------------------------------------------------
COUNTS = {2: "two", 3: "three", 4: "four"}
# One choice is drawn from each row. `a` is the first thing, `b` the second or the word; `first` is
# the left or upper one. PLAIN has first choices only. REWORDED tests new sentences of known words.
VARIED = {
    "article": "a|the|",
    "case": "strip|strip|capitalize|title|upper",
    "opening": "{}|{}.|{}!|draw {}|draw me {}|please draw {}.|show me {}|{}, please|"
               "a picture of {}|an image of {}.|a photo of {}",
    "joint": "{a} and {b}|{b} and {a}|{a} with {b}|{a}, {b}",
    "beside": "{a} {relation} {b}|{first} to the left of {second}|{second} to the right of {first}|"
              "{first} next to {second} on the left|on the left {first}, on the right {second}",
    "stacked": "{a} {relation} {b}|{first} over {second}|{second} under {first}|"
               "{first} on top of {second}|at the top {first}, at the bottom {second}",
    "word": 'the word {}|the word "{}"|the text {}',
    "background": "{} on a {color} background|{} on {color}|{}, {color} background"}
PLAIN = {}
for row, choices in VARIED.items():
    PLAIN[row] = choices.split("|")[0]
REWORDED = VARIED | {
    "opening": "please show me {}|draw a picture of {}|show me an image of {}!|the picture of {}",
    "beside": "{first} on the left and {second} on the right|{second} on the right of {first}",
    "stacked": "{first} at the top and {second} at the bottom|{first} on the top of {second}",
    "background": "{} on the {color} background"}
SYNONYMS = {"circle": "disc", "cross": "plus", "diamond": "rhombus", "gray": "grey",
            "purple": "violet", "cyan": "turquoise", "small": "little", "large": "big",
            "two": "2", "three": "3", "four": "4"}


def plural(shape: str) -> str:
    """The plural of the name of a shape."""
    return shape + ("es" if shape.endswith("s") else "s")


def caption(scene: Scene, said, forms, rng) -> str:
    """One sentence about a scene, with the choices in `forms`. It names all things and the word.
    said: what else is said of them, some of "color", "size", "relation" and "background"."""
    def choose(row):
        return pick(rng, forms[row].split("|"))
    def name(word):                                  # now and then, another word for it
        if forms is not PLAIN and rng.random() < 0.3:
            return SYNONYMS.get(word, word)
        return word
    phrases = []
    counted = scene.kind == "count"
    for thing in scene.things[: 1 if counted else 2]:
        words = []
        if "size" in said:
            words.append(name(thing.size))
        if "color" in said:
            words.append(name(thing.color))
        shape = name(thing.shape)
        if counted:
            words = [name(COUNTS[len(scene.things)]), *words, plural(shape)]
        else:
            words = [choose("article"), *words, shape]
        phrase = " ".join(words).strip()
        phrases.append(re.sub("^a o", "an o", phrase))       # orange
    if scene.word:
        phrases.append(choose("word").format(scene.word))
    text = phrases[0]
    if len(phrases) == 2:
        row = "joint"
        if "relation" in said:
            row = "beside" if scene.relation in ("left of", "right of") else "stacked"
        a, b = phrases
        swapped = scene.relation in ("right of", "below")
        first, second = (b, a) if swapped else (a, b)
        sentence = choose(row)
        text = sentence.format(a=a, b=b, relation=scene.relation, first=first, second=second)
    if "background" in said:
        text = choose("background").format(text, color=name(scene.background))
    text = choose("opening").format(text)
    return getattr(text, choose("case"))()


def scene_captions(scene: Scene) -> tuple[str, str]:
    """(short, full): what people write beside a picture, and what a model would write (Sec. 5.2.2).
    A short caption leaves out much; two in a hundred are empty. A full one is complete."""
    rng = random.Random(scene.wording)
    shares = {"color": 0.5, "relation": 0.5, "size": 0.2, "background": 0.2}
    said = [part for part, share in shares.items() if rng.random() < share]
    forms = pick(rng, (PLAIN, VARIED))
    short = caption(scene, said, forms, rng)
    forms = pick(rng, (PLAIN, VARIED))
    full = caption(scene, list(shares), forms, rng)
    if rng.random() < 0.02:
        short = ""
    return short, full


def vocabulary() -> set[str]:
    """The words that captions use, in lower case, as re.findall(r"\\w+", text.lower()) has them."""
    texts = [*RGB, *SIZES, *RELATIONS, *WORDS, "an"]
    texts += COUNTS.values()
    texts += SYNONYMS.values()
    for shape in SHAPES:
        other = SYNONYMS.get(shape, shape)
        texts += [shape, plural(shape), plural(other)]
    texts += (VARIED | {"case": ""}).values()
    text = re.sub(r"{\w*}", " ", " ".join(texts))
    return set(re.findall(r"\w+", text.lower()))


class Scenes:
    """A source of `size` drawn scenes. It has the methods of data.ImageFiles."""
    def __init__(self, size: int, seed: int = 0):
        self.size = self.found = size
        self.seed = seed
        self.problems = []

    def __len__(self):
        return self.size

    def image(self, index: int, height: int, width: int) -> np.ndarray:
        scene = make_scene(self.seed, index, height, width)
        return draw_scene(scene)

    def captions(self, index: int) -> tuple[str, str]:
        scene = make_scene(self.seed, index)
        return scene_captions(scene)

    def picture_size(self, index: int) -> tuple[int, int]:
        """(height, width) of the proportions that this scene gets, from 1:2 to 2:1. Two in three
        are nearer to 1:1 than to 2:3 or 3:2."""
        rng = np.random.default_rng((self.seed, index, 1))
        stretch = 2 ** (rng.uniform(-1, 1) ** 3 / 2)
        return round(64 * stretch), round(64 / stretch)


# ---- Show pictures -------------------------------------------------------------------------------
def captioned_grid(images, captions, columns: int) -> Image.Image:
    """One picture of many (PIL or uint8 arrays), each above its caption, enlarged to 160 px."""
    images = [Image.fromarray(np.asarray(image)) for image in images]
    side = max(max(image.size) for image in images)
    factor = math.ceil(160 / side)
    cell = factor * side + 16
    font = ImageFont.load_default(size=cell // 16)
    row = int(cell + 5 * font.size)
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * cell, rows * row), "white")
    pen = ImageDraw.Draw(grid)
    for i, (image, text) in enumerate(zip(images, captions, strict=True)):
        left = i % columns * cell + 8
        top = i // columns * row + 8
        image = ImageOps.scale(image, factor, Image.Resampling.NEAREST)
        grid.paste(image, (left, top))
        text = textwrap.fill(text, 27, max_lines=4, placeholder=" ...")
        pen.multiline_text((left, top + image.height + 4), text, "black", font)
    return grid


def main():
    """Draw the first 24 scenes with their captions, which are printed as well."""
    source = Scenes(24)
    captions = [" / ".join(source.captions(index)) for index in range(24)]
    print(*captions, "out/scenes.png shows them", sep="\n")
    Path("out").mkdir(exist_ok=True)
    images = [source.image(index, 64, 64) for index in range(24)]
    captioned_grid(images, captions, 6).save("out/scenes.png")


if __name__ == "__main__":
    main()
