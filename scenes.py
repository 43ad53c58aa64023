"""scenes.py: a drawn world with captions, ground truth and a score (SD3, arXiv:2403.03206v1, Sec. 5).

Read with   Sec. 5.2.2 for the two kinds of captions; Tables 4 and 5 for the tasks of GenEval (Ghosh
            et al. 2023), whose rules stand in parentheses as "lax" beside our stricter ones
Not here    networks, files, the command that scores a checkpoint (evaluate.py)
In order    draw a scene; say it in words; recognise what a picture shows; score pictures by prompts
Shapes      pictures are uint8 (H, W, 3) with H and W in pixels; masks are (H, W)
Run         python scenes.py     draws 48 scenes into out/scenes.png and prints their captions
"""

import itertools
import random
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont

# --------------------------------------------------------------------------------------------------
# Draw
# --------------------------------------------------------------------------------------------------

COLORS = {"red": (215, 30, 40), "orange": (250, 135, 15), "yellow": (255, 225, 50),
          "green": (30, 150, 60), "cyan": (60, 210, 225), "blue": (35, 75, 225),
          "purple": (140, 45, 175), "pink": (255, 145, 200)}
BACKGROUNDS = {"white": (255, 255, 255), "gray": (128, 128, 128), "black": (0, 0, 0),
               "brown": (110, 70, 40), "navy": (15, 25, 75)}
ALL_COLORS = COLORS | BACKGROUNDS
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
SIZES = {"small": 0.27, "medium": 0.35, "large": 0.45}         # diameter / shorter side of the image
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
KINDS = ("single", "pair", "pair", "pair", "count", "count", "word")           # with their shares
WORDS = ("GO UP NO ON IN ME WE HI OK CAT DOG SUN SKY RED BIG ART TEA ICE FOX BEE OWL CAR BUS "
         "TOY HAT CUP BOX MAP OPEN STOP LOVE MOON STAR FISH BIRD TREE BOOK CAKE SHIP RAIN SNOW "
         "FIRE GOLD HOME GAME KING HELLO HAPPY WORLD LIGHT MUSIC APPLE HOUSE WATER SMILE PIZZA "
         "DREAM PAPER SUMMER WINTER FLOWER GARDEN ORANGE SILVER ROCKET COFFEE").split()
HELD_OUT_SEED = 1_000_003     # scenes of this seed validate and score; training has another seed
HELD_OUT_COLOR = 3            # circle and green, square and cyan, ...: see is_held_out
HELD_OUT_SHAPE = {"left of": 3, "right of": 5, "above": 5, "below": 3}     # circle left of diamond


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
    """What a picture holds. `kind` is single, pair, count or word.

    `relation` is that of a pair's first thing to its second, or of the thing to the word.
    `wording` is the seed of the captions.
    """
    kind: str
    height: int
    width: int
    background: str
    things: tuple[Thing, ...]
    relation: str = ""
    word: str = ""
    word_color: str = ""
    wording: int = 0


def is_held_out(shapes, colors, relation="") -> bool:
    """Does this hold a combination that is never drawn for training?

    shapes and colors belong together. relation: of two shapes, as "left of"; "" leaves it open, and
    so does a colour "". Every shape lacks one colour, one right neighbour and one upper neighbour.
    """
    for shape, color in zip(shapes, colors):
        if color:
            steps = list(COLORS).index(color) - SHAPES.index(shape)
            if steps % len(SHAPES) == HELD_OUT_COLOR:
                return True
    if relation and len(shapes) == 2:
        steps = SHAPES.index(shapes[1]) - SHAPES.index(shapes[0])
        return steps % len(SHAPES) == HELD_OUT_SHAPE[relation]
    return False


def make_scene(seed: int, index: int, height=64, width=64, held_out=False) -> Scene:
    """Scene `index` of the endless set `seed`: the same on every machine and, but for the places,
    at every size. held_out: only scenes that training never sees (True), or none of them."""
    rng = np.random.default_rng((seed, index))
    while True:
        scene = compose(rng, height, width)
        shapes = [thing.shape for thing in scene.things]
        colors = [thing.color for thing in scene.things]
        if is_held_out(shapes, colors, scene.relation) == held_out:
            return scene


def pick(rng, choices):
    """One of the choices, by a random number from a numpy or a Python generator."""
    return choices[int(rng.random() * len(choices))]


def compose(rng, height, width) -> Scene:
    """Any scene, held out or not. The number of random draws does not depend on the size."""
    kind, background = pick(rng, KINDS), pick(rng, tuple(BACKGROUNDS))
    wording = int(rng.random() * 2**31)
    half_h, half_w = height // 2, width // 2
    box = {"": (0, 0, height, width),                                    # left, top, height, width
           "left of": (0, 0, height, half_w), "right of": (half_w, 0, height, half_w),
           "above": (0, 0, half_h, width), "below": (0, half_h, half_h, width)}
    relation, word, word_color, things = "", "", "", []
    if kind == "single":
        things.append(place_thing(rng, random_look(rng), box[""], height, width))
    elif kind == "pair":
        relation = pick(rng, RELATIONS)
        look, other = random_look(rng), random_look(rng)
        if look[:2] == other[:2]:                        # Two equal things would be a count of two.
            other = (pick(rng, [s for s in SHAPES if s != look[0]]), *other[1:])
        things.append(place_thing(rng, look, box[relation], height, width))
        things.append(place_thing(rng, other, box[OPPOSITE[relation]], height, width))
    elif kind == "count":
        look = random_look(rng)
        cells = rng.permutation(4)[: pick(rng, (2, 3, 4))]
        for cell in cells:
            quarter = (cell % 2 * half_w, cell // 2 * half_h, half_h, half_w)
            things.append(place_thing(rng, look, quarter, height, width))
    else:
        word = pick(rng, WORDS)
        relation = pick(rng, ("", "", "above", "below"))               # "": the word stands alone
        inks = {"white": ("black", "red", "blue", "green"), "gray": ("black",)}
        word_color = pick(rng, inks.get(background, tuple(COLORS)))
        if relation:
            things.append(place_thing(rng, random_look(rng), box[relation], height, width))
    return Scene(kind, height, width, background, tuple(things), relation, word, word_color, wording)


def random_look(rng):
    """(shape, color, size)"""
    return pick(rng, SHAPES), pick(rng, tuple(COLORS)), pick(rng, tuple(SIZES))


def place_thing(rng, look, box, height, width) -> Thing:
    """A thing somewhere in a box of (left, top, height, width), a pixel clear of its edges."""
    left, top, box_height, box_width = box
    diameter = round(SIZES[look[2]] * min(height, width) * (0.96 + 0.08 * rng.random()))
    diameter = max(3, min(diameter, box_height - 2, box_width - 2))
    left += 1 + int(rng.random() * max(1, box_width - diameter - 1))
    top += 1 + int(rng.random() * max(1, box_height - diameter - 1))
    return Thing(*look, int(left), int(top), diameter)


@lru_cache(maxsize=4096)
def shape_mask(shape: str, diameter: int) -> np.ndarray:
    """Coverage of a shape in its bounding square: (diameter, diameter) float32 in [0, 1]."""
    s = 8 * diameter                               # It is drawn 8 times as large, then averaged.
    canvas = Image.new("L", (s, s), 0)
    draw = ImageDraw.Draw(canvas)
    corners = {"square": [(0.05, 0.05), (0.95, 0.05), (0.95, 0.95), (0.05, 0.95)],
               "triangle": [(0.5, 0.03), (1, 0.95), (0, 0.95)],
               "diamond": [(0.5, 0), (0.92, 0.5), (0.5, 1), (0.08, 0.5)],
               "star": [], "heart": []}
    for i in range(10):
        angle, radius = np.pi * (i / 5 - 0.5), (0.52, 0.25)[i % 2]
        corners["star"].append((0.5 + radius * np.cos(angle), 0.53 + radius * np.sin(angle)))
    for a in np.linspace(0, 2 * np.pi, 64):
        y = 13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)
        corners["heart"].append((0.5 + 16 / 33 * np.sin(a) ** 3, 0.46 - y / 31))
    if shape in corners:
        draw.polygon([(x * s, y * s) for x, y in corners[shape]], fill=255)
    elif shape in ("circle", "ring"):
        draw.ellipse((0, 0, s - 1, s - 1), fill=255)
        if shape == "ring":
            draw.ellipse((0.27 * s, 0.27 * s, 0.73 * s, 0.73 * s), fill=0)
    elif shape == "cross":
        draw.rectangle((0.34 * s, 0, 0.66 * s, s), fill=255)
        draw.rectangle((0, 0.34 * s, s, 0.66 * s), fill=255)
    else:
        raise ValueError(f"no shape called {shape!r}; the shapes are {', '.join(SHAPES)}")
    return np.asarray(canvas.reduce(8), dtype=np.float32) / 255


@lru_cache(maxsize=1024)
def word_mask(word: str, height: int, max_width: int) -> np.ndarray:
    """Coverage of a word, cropped to its ink: float32, at most (height, max_width), in [0, 1]."""
    font = ImageFont.load_default(size=4 * height)
    left, top, right, bottom = font.getbbox(word)
    canvas = Image.new("L", (int(right - left), int(bottom - top)), 0)
    ImageDraw.Draw(canvas).text((-left, -top), word, font=font, fill=255)
    scale = min(height / canvas.height, max_width / canvas.width)
    size = max(1, round(canvas.width * scale)), max(1, round(canvas.height * scale))
    return np.asarray(canvas.resize(size, Image.Resampling.BOX), dtype=np.float32) / 255


def draw_scene(scene: Scene) -> np.ndarray:
    """The picture, uint8 (height, width, 3). Masks are cached: a core draws thousands a second."""
    canvas = np.empty((scene.height, scene.width, 3), dtype=np.float32)
    canvas[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        mask = shape_mask(thing.shape, thing.diameter)
        paste(canvas, mask, thing.left, thing.top, COLORS[thing.color])
    if scene.word:
        middle = round(scene.height * {"": 0.5, "above": 0.75, "below": 0.25}[scene.relation])
        height = round(0.26 * min(scene.height, scene.width))
        mask = word_mask(scene.word, height, round(0.92 * scene.width))
        left, top = (scene.width - mask.shape[1]) // 2, middle - mask.shape[0] // 2
        paste(canvas, mask, left, top, ALL_COLORS[scene.word_color])
    return (canvas + 0.5).astype(np.uint8)


def paste(canvas, mask, left, top, color):
    """Lay a colour over a part of the canvas (H, W, 3), where and as far as the mask covers it."""
    patch = canvas[top : top + mask.shape[0], left : left + mask.shape[1]]
    patch += mask[..., None] * (np.float32(color) - patch)


# --------------------------------------------------------------------------------------------------
# Say it in words
# --------------------------------------------------------------------------------------------------

COUNTS = {2: "two", 3: "three", 4: "four"}

# How things can be said: one choice is drawn from each row. `a` is the first thing, `b` the second
# or the word; `left`, `right`, `upper` and `lower` are the same two by place. Half of the captions
# are PLAIN and half VARIED. REWORDED prompts test a model: each has an opening that training does
# not have, most have a new frame, but all of their words are known from training.
PLAIN = {"article": ("a",), "synonyms": {}, "digits": (False,), "opening": ("{}",), "case": (str,),
         "beside": ("{a} {relation} {b}",), "stacked": ("{a} {relation} {b}",),
         "joint": ("{a} and {b}",), "word": ("the word {}",),
         "background": ("{} on a {color} background",)}
VARIED = {"article": ("a", "a", "the", ""),
          "synonyms": {"circle": "disc", "cross": "plus", "diamond": "rhombus", "small": "little",
                       "large": "big", "gray": "grey", "purple": "violet", "cyan": "turquoise"},
          "digits": (False, True),
          "opening": ("{}", "{}", "{}.", "{}!", "draw {}", "draw me {}", "please draw {}.",
                      "show me {}", "{}, please", "a picture of {}", "an image of {}.",
                      "a photo of {}"),
          "case": (str, str, str.capitalize, str.capitalize, str.title, str.upper),
          "beside": ("{a} {relation} {b}", "{left} left of {right}", "{right} right of {left}",
                     "{left} to the left of {right}", "{right} to the right of {left}",
                     "{left} next to {right}, on the left", "{right} next to {left}, on the right",
                     "on the left {left}, on the right {right}"),
          "stacked": ("{a} {relation} {b}", "{upper} above {lower}", "{lower} below {upper}",
                      "{upper} over {lower}", "{lower} under {upper}", "{upper} on top of {lower}",
                      "at the top {upper}, at the bottom {lower}"),
          "joint": ("{a} and {b}", "{b} and {a}", "{a} with {b}", "{a}, {b}"),
          "word": ("the word {}", 'the word "{}"', "the text {}"),
          "background": ("{} on a {color} background", "{} on {color}", "{}, {color} background",
                         "{} with a {color} background")}
REWORDED = VARIED | {
    "opening": ("please show me {}", "draw a picture of {}", "show me an image of {}",
                "please draw me {}!", "the picture of {}", "a picture of {}, please"),
    "beside": ("{left} on the left and {right} on the right", "{left} to the left, {right} right",
               "on the right {right}, on the left {left}", "{right} on the right of {left}"),
    "stacked": ("{upper} at the top and {lower} at the bottom", "{upper}, {lower} below",
                "at the bottom {lower}, at the top {upper}"),
    "background": ("on a {color} background {}", "{color} background with {}")}


def plural(shape: str) -> str:
    """The plural of the name of a shape."""
    return shape + ("es" if shape.endswith("s") else "s")


def caption(scene: Scene, said, forms, rng) -> str:
    """A sentence about the scene in one of the ways of `forms`. All things and words are named.

    said: what else is said, some of "color", "size", "relation" and "background".
    """
    phrases = []
    if scene.things:
        count = len(scene.things) if scene.kind == "count" else 1
        phrases.append(noun_phrase(scene.things[0], count, said, forms, rng))
    if scene.kind == "pair":
        phrases.append(noun_phrase(scene.things[1], 1, said, forms, rng))
    if scene.word:
        phrase = pick(rng, forms["word"]).format(scene.word)
        if "background" in said:                           # A full caption says this colour as well.
            phrase += f" in {synonym(scene.word_color, forms, rng)}"
        phrases.append(phrase)
    text = phrases[0]
    if len(phrases) == 2:
        a, b = phrases
        lateral = scene.relation in ("left of", "right of")
        frames = forms["beside" if lateral else "stacked"] if "relation" in said else forms["joint"]
        first, second = (a, b) if scene.relation in ("left of", "above") else (b, a)
        text = pick(rng, frames).format(a=a, b=b, relation=scene.relation, left=first,
                                        right=second, upper=first, lower=second)
    if "background" in said:
        color = synonym(scene.background, forms, rng)
        text = pick(rng, forms["background"]).format(text, color=color)
    text = pick(rng, forms["opening"]).format(text)
    return pick(rng, forms["case"])(text)


def noun_phrase(thing: Thing, count: int, said, forms, rng) -> str:
    """What a caption says of `count` things that look like this one: "a red star", "two stars"."""
    words = []
    if "size" in said:
        words.append(synonym(thing.size, forms, rng))
    if "color" in said:
        words.append(synonym(thing.color, forms, rng))
    shape = synonym(thing.shape, forms, rng)
    if count > 1:
        number = str(count) if pick(rng, forms["digits"]) else COUNTS[count]
        return " ".join([number, *words, plural(shape)])
    words.append(shape)
    article = pick(rng, forms["article"])
    if article == "a" and words[0][0] in "aeiou":
        article = "an"
    return " ".join([article, *words]).strip()


def synonym(name: str, forms, rng) -> str:
    """The name itself, or now and then another word for it."""
    if name in forms["synonyms"] and rng.random() < 0.3:
        return forms["synonyms"][name]
    return name


def scene_captions(scene: Scene) -> tuple[str, str]:
    """(short, full): what people write beside a picture, and what a vision-language model would.

    Sec. 5.2.2. The short caption may leave out all but the shapes, and two in a hundred are empty;
    the full one is complete. Neither depends on the size of the picture.
    """
    rng = random.Random(scene.wording)
    said = []
    for part, share in (("color", 0.7), ("relation", 0.5), ("size", 0.1), ("background", 0.1)):
        if rng.random() < share:
            said.append(part)
    short = caption(scene, said, pick(rng, (PLAIN, VARIED)), rng)
    if rng.random() < 0.02:
        short = ""
    everything = ("color", "relation", "size", "background")
    return short, caption(scene, everything, pick(rng, (PLAIN, VARIED)), rng)


def vocabulary() -> set[str]:
    """The words of all captions, in lower case. re.findall(r"\\w+", prompt.lower()) splits a prompt
    in the same way."""
    texts = [*SHAPES, *COLORS, *BACKGROUNDS, *SIZES, *RELATIONS, *WORDS, *COUNTS.values(), "an"]
    for forms in (PLAIN, VARIED):
        names = [*SHAPES, *forms["synonyms"].values()]
        texts += names + [plural(name) for name in names if name not in ALL_COLORS | SIZES]
        for row in ("article", "opening", "beside", "stacked", "joint", "word", "background"):
            texts += forms[row]
    texts += [str(count) for count in COUNTS]
    text = re.sub(r"\{\w*\}", " ", " ".join(texts))                          # without {a} and {}
    return set(re.findall(r"\w+", text.lower()))


class Scenes:
    """An endless source of drawn scenes, cut to `size` of them. Used as data.ImageFiles is."""

    def __init__(self, size: int, seed: int = 0):
        self.size, self.seed = size, seed
        self.problems, self.found = [], size

    def __len__(self):
        return self.size

    def image(self, index: int, height: int, width: int) -> np.ndarray:
        """uint8 (height, width, 3): drawn at this very size, nothing is resized."""
        return draw_scene(make_scene(self.seed, index, height, width))

    def captions(self, index: int) -> tuple[str, str]:
        """The short caption, which can be empty, and the full one."""
        return scene_captions(make_scene(self.seed, index))

    def name(self, index: int) -> str:
        """What to call a scene in messages."""
        return f"scene {index} of seed {self.seed}"

    def picture_size(self, index: int) -> tuple[int, int]:
        """(height, width) that the scene would like to have: 1:2 to 2:1, about 64 x 64 pixels."""
        aspect = 2 ** np.random.default_rng((self.seed, index, 1)).uniform(-1, 1)
        return round(64 * aspect**0.5), round(64 / aspect**0.5)


# --------------------------------------------------------------------------------------------------
# Recognise what a picture shows, from its pixels alone
# --------------------------------------------------------------------------------------------------

MIN_DIFFERENCE = 30     # of foreground from the background, in YCbCr; the colours differ by 63
MIN_AREA = 0.01         # of the shorter side squared: half of the smallest star; less is a speck
MIN_FIT = 0.9           # correlation with the best shape: drawn things reach .97
MIN_WORD_FIT = 0.8      # the same for a word
MAX_REST = 0.004        # share of the pixels that may be foreground without an explanation
GRID = 24               # shapes are compared on GRID x GRID points
WORD_GRID = (12, 60)    # and words on so many rows and columns
BLURS = (0.02, 0.06, 0.1)            # of the diameter: a soft picture of a shape is that shape
LUMA = (8, 1, 1)        # weights of Y, Cb, Cr in an outline: JPEG halves the resolution of Cb, Cr


@dataclass(frozen=True)
class Found:
    """One thing in a picture: its names, its box in pixels, and its mask as View has pixels."""
    shape: str
    color: str
    size: str
    left: int
    top: int
    height: int
    width: int
    mask: np.ndarray = field(repr=False, compare=False)

    @property
    def center(self) -> tuple[float, float]:
        """(x, y) of the middle of the box, in pixels."""
        return self.left + self.width / 2, self.top + self.height / 2


class View:
    """A picture as the score sees it: what differs from an even background, and the things there.

    A large picture is reduced to a shorter side of 128 to 255 pixels first. The background is the
    middle colour of the border. Colours are compared in YCbCr, scaled to 0 ... 255.
    A pixel's coverage is its difference from the background, relative to the largest one nearby.
    """

    def __init__(self, image: np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"image is {image.dtype} {image.shape}; "
                             "give uint8 (height, width, 3): np.asarray(picture)")
        self.factor = max(1, min(image.shape[:2]) // 128)
        small = Image.fromarray(image).reduce(self.factor).convert("YCbCr")
        pixels = np.asarray(small, dtype=np.float32)                                   # (H, W, 3)
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        self.color = np.median(border, axis=0)
        self.background = nearest_color(self.color)
        self.offset = pixels - self.color                                              # (H, W, 3)
        self.difference = np.linalg.norm(self.offset, axis=2)                          # (H, W)
        self.side = min(self.difference.shape)
        self.radius = max(2, self.side // 32)
        highest = local_max(self.difference, self.radius)
        self.coverage = self.difference / np.maximum(highest, 2 * MIN_DIFFERENCE)      # (H, W)
        blobs = components(self.coverage > 0.5, MIN_AREA * self.side**2)
        free = np.ones_like(self.coverage, dtype=bool)                       # what is in no blob
        for blob in blobs:
            free &= ~blob
        self.things = []
        for blob in blobs:
            self.things += self.recognise(blob, 0.5, free)

    def recognise(self, blob, level, free) -> list[Found]:
        """The things in one blob, which is where the coverage is above the level.

        What looks like no shape may be several that touch: its denser parts are looked at in its
        place. What then still looks like no shape is not reported.
        """
        clearest = blob & (self.difference >= np.median(self.difference[blob]))
        color = np.median(self.offset[clearest], axis=0)
        around = local_max(blob, self.radius) * (free | blob)                # with its soft edge
        soft = np.clip(self.offset @ (LUMA * color) / (color @ (LUMA * color)), 0, 1) * around
        fit = (shape_forms() @ normal_form(soft)).max(axis=1)                          # (8,)
        if fit.max() < MIN_FIT:
            parts = []
            if level < 0.75:
                parts = components(blob & (self.coverage > level + 0.1), MIN_AREA * self.side**2)
            return [thing for part in parts for thing in self.recognise(part, level + 0.1, free)]
        shape = SHAPES[fit.argmax()]
        diameter = np.sqrt(soft.sum() / shape_mask(shape, 64).mean()) / self.side
        size = min(SIZES, key=lambda name: abs(np.log(SIZES[name] / diameter)))
        rows, columns = np.flatnonzero(blob.any(axis=1)), np.flatnonzero(blob.any(axis=0))
        box = columns[0], rows[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        box = [int(self.factor * value) for value in box]
        return [Found(shape, nearest_color(self.color + color), size, *box, mask=blob)]

    def rest(self, things) -> np.ndarray:
        """Where the picture differs from its background and none of these things is near: (H, W)"""
        rest = self.difference > MIN_DIFFERENCE
        for thing in things:
            rest &= local_max(thing.mask, self.radius) == 0
        return rest


def find_things(image) -> list[Found]:
    """uint8 (H, W, 3) -> the things in front of an even background, in no particular order."""
    return View(image).things


def nearest_color(color) -> str:
    """The name of the closest colour of this world to (Y, Cb, Cr)."""
    distances = np.linalg.norm(palette() - color, axis=1)
    return tuple(ALL_COLORS)[distances.argmin()]


@lru_cache(maxsize=1)
def palette() -> np.ndarray:
    """The colours and backgrounds in YCbCr: (13, 3)."""
    row = Image.fromarray(np.uint8([list(ALL_COLORS.values())]))
    return np.array(row.convert("YCbCr"), dtype=np.float32)[0]


def local_max(x, radius: int):
    """The largest value within `radius` pixels in either direction: (H, W) -> (H, W)."""
    x = torch.from_numpy(x).float()[None]
    return F.max_pool2d(x, 2 * radius + 1, stride=1, padding=radius)[0].numpy()


def components(mask, min_area: float) -> list[np.ndarray]:
    """The 4-connected parts of a mask (H, W) that have at least min_area pixels, as masks (H, W).

    Every pixel starts with a label of its own, and takes the largest label beside it until nothing
    changes. A label is the place of a pixel: looking up the label there saves most of the way.
    """
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)        # 0: no part
    while True:
        padded = np.pad(labels, 1)
        spread = np.maximum(padded[:-2, 1:-1], padded[2:, 1:-1])
        spread = np.maximum(spread, np.maximum(padded[1:-1, :-2], padded[1:-1, 2:]))
        spread = np.where(mask, np.maximum(labels, spread), 0)
        spread = np.append(0, spread.ravel())[spread]
        if (spread == labels).all():
            break
        labels = spread
    sizes = np.bincount(labels.ravel())
    return [labels == label for label in range(1, len(sizes)) if sizes[label] >= max(1, min_area)]


def normal_form(coverage, rows=GRID, columns=GRID, square=True) -> np.ndarray:
    """A soft mask (H, W) about its centre of mass, scaled to a spread of 1, with mean 0 and norm 1.

    The product of two normal forms, (rows * columns,), is a correlation that does not depend on
    place and size. square: one scale for both directions. A spread is an average over all pixels,
    so blur and noise move it less than a box.
    """
    H, W = coverage.shape
    x, y, total = np.arange(W) + 0.5, np.arange(H) + 0.5, coverage.sum()
    by_column, by_row = coverage.sum(0) / total, coverage.sum(1) / total               # (W,), (H,)
    center_x, center_y = by_column @ x, by_row @ y
    spread_x = np.sqrt(by_column @ (x - center_x) ** 2)
    spread_y = np.sqrt(by_row @ (y - center_y) ** 2)
    if square:
        spread_x = spread_y = np.hypot(spread_x, spread_y)
    reach_x = center_x + np.linspace(-2.2, 2.2, columns) * spread_x        # A triangle reaches 2.0.
    reach_y = center_y + np.linspace(-2.2, 2.2, rows) * spread_y
    points = np.empty((1, rows, columns, 2), dtype=np.float32)
    points[..., 0] = reach_x / W * 2 - 1                           # grid_sample wants -1 ... 1
    points[..., 1] = reach_y[:, None] / H * 2 - 1
    soft = torch.from_numpy(np.float32(coverage))[None, None]                          # (1, 1, H, W)
    form = F.grid_sample(soft, torch.from_numpy(points), align_corners=False).flatten().numpy()
    form = form - form.mean()
    return form / max(np.linalg.norm(form), 1e-9)


@lru_cache(maxsize=1)
def shape_forms() -> np.ndarray:
    """Normal forms of the shapes at each blur: (8, 3, GRID * GRID)."""
    forms = []
    for shape in SHAPES:
        mask = Image.fromarray(np.uint8(255 * np.pad(shape_mask(shape, 64), 16)))
        for blur in BLURS:
            soft = mask.filter(ImageFilter.GaussianBlur(64 * blur))
            forms.append(normal_form(np.asarray(soft, dtype=np.float64)))
    return np.stack(forms).reshape(len(SHAPES), len(BLURS), -1)


def word_form(coverage) -> np.ndarray:
    """The normal form of a word, whose height and width are scaled each for itself."""
    return normal_form(np.pad(coverage, 2), *WORD_GRID, square=False)


@lru_cache(maxsize=32)
def spellings(word: str) -> np.ndarray:
    """Normal forms of a word, of the other words of this world, and of all its misspellings by one
    letter that is replaced, left out, or changes places with the next: (n, rows * columns)."""
    others = {other for other in WORDS if other != word}
    for i in range(len(word)):
        before, after = word[:i], word[i + 1 :]
        others.add(before + after)
        others.add(before + after[:1] + word[i] + after[1:])
        for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ":
            others.add(before + letter + after)
    others -= {word, ""}
    return np.stack([word_form(word_mask(text, 16, 999)) for text in [word, *sorted(others)]])


def reads(coverage, place, word: str) -> float:
    """How well the foreground at a place, a mask (H, W), shows the word; 0 if a misspelling fits
    better. The fit is a correlation, 1 at best."""
    if not place.any():
        return 0.0
    rows, columns = np.flatnonzero(place.any(axis=1)), np.flatnonzero(place.any(axis=0))
    ink = (coverage * place)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    fits = spellings(word) @ word_form(np.minimum(ink, 1))
    return float(fits[0]) if fits.argmax() == 0 else 0.0


# --------------------------------------------------------------------------------------------------
# Score pictures by their prompts: GenEval (Ghosh et al. 2023; Tables 4 and 5) on this world
# --------------------------------------------------------------------------------------------------

# task: the kind of scene that it takes, and what its prompts say besides shapes, counts and words
TASKS = {"single object": ("single", ()),
         "two objects": ("pair", ()),
         "counting": ("count", ()),
         "colors": ("single", ("color",)),
         "position": ("pair", ("relation",)),
         "color attribution": ("pair", ("color",)),
         "size": ("single", ("size",)),
         "background": ("single", ("background",)),
         "word": ("word", ())}
GENEVAL_TASKS = tuple(TASKS)[:6]          # the overall score is their mean, as in Table 5
SPLITS = ("training wording", "reworded", "held-out combinations")
MIN_OFFSET = 0.1        # of the two sizes' sum: how far apart centres must be (GenEval's threshold)
BATCH_SIZE = 64         # prompts that are given to a generator at once


@dataclass(frozen=True)
class Requirement:
    """What a picture must show, and nothing else. A count of three repeats its shape three times."""
    task: str
    shapes: tuple[str, ...]
    colors: tuple[str, ...]           # one for each shape; "" leaves it open, here and below
    sizes: tuple[str, ...]
    relation: str = ""                # of the first to the second
    background: str = ""
    word: str = ""


@dataclass(frozen=True)
class Case:
    """One question of the score: a prompt, what it asks for, and a scene that shows it."""
    prompt: str
    requirement: Requirement
    scene: Scene


def geneval_cases(count_per_task: int, seed=HELD_OUT_SEED, height=64, width=64,
                  split=SPLITS[0]) -> list[Case]:
    """Task by task, the first scenes of the set `seed` that suit; no scene is asked for twice.

    Prompts are in the plain wording of training, or reworded. Held-out combinations are those of
    scenes that training never draws; these prompts also name the colours.
    """
    if split not in SPLITS:
        raise ValueError(f"no split called {split!r}; the splits are {', '.join(SPLITS)}")
    cases = {task: [] for task in TASKS}
    for index in itertools.count():
        scene = make_scene(seed, index, height, width, held_out=split == SPLITS[2])
        suitable = [task for task in TASKS if suits(task, scene, split)]
        if suitable:
            task = min(suitable, key=lambda name: len(cases[name]))
            cases[task].append(make_case(task, scene, split))
        if min(len(chosen) for chosen in cases.values()) >= count_per_task:
            break
    return [case for chosen in cases.values() for case in chosen[:count_per_task]]


def suits(task: str, scene: Scene, split: str) -> bool:
    """Can this scene be an example of the task? Two things must differ in what is said of them."""
    kind, _ = TASKS[task]
    if scene.kind != kind:
        return False
    shapes = [thing.shape for thing in scene.things]
    colors = [thing.color for thing in scene.things]
    if kind == "pair" and shapes[0] == shapes[1]:
        return False
    if task == "color attribution" and colors[0] == colors[1]:
        return False
    if split == SPLITS[2]:               # The prompt must name a combination that is held out.
        return is_held_out(shapes, colors, scene.relation if task == "position" else "")
    return True


def make_case(task: str, scene: Scene, split: str) -> Case:
    """The prompt and the requirement of a scene, which say the same."""
    said = TASKS[task][1]
    if split == SPLITS[2]:
        said = (*said, "color")
    forms = REWORDED if split == SPLITS[1] else PLAIN
    prompt = caption(scene, said, forms, random.Random(scene.wording))
    requirement = Requirement(
        task, tuple(thing.shape for thing in scene.things),
        tuple(thing.color if "color" in said else "" for thing in scene.things),
        tuple(thing.size if "size" in said else "" for thing in scene.things),
        scene.relation if "relation" in said else "",
        scene.background if "background" in said else "", scene.word)
    return Case(prompt, requirement, scene)


def stands(first: Found, relation: str, second: Found) -> bool:
    """Is the first thing left of (...) the second, by their centres and clearly so?

    Differs from GenEval: there the offset must also be along this axis mostly. Here "left of" may
    be far below as well, as it may in the scenes.
    """
    right = first.center[0] - second.center[0]
    down = first.center[1] - second.center[1]
    offset = {"left of": -right, "right of": right, "above": -down, "below": down}[relation]
    sizes = first.height + second.height
    if relation in ("left of", "right of"):
        sizes = first.width + second.width
    return offset > MIN_OFFSET * sizes


def fits(requirement: Requirement, things) -> bool:
    """Are these things, in this order, the required ones?"""
    wanted = zip(requirement.shapes, requirement.colors, requirement.sizes)
    for thing, (shape, color, size) in zip(things, wanted):
        if thing.shape != shape or color not in ("", thing.color) or size not in ("", thing.size):
            return False
    if requirement.relation:
        return stands(things[0], requirement.relation, things[1])
    return True


def score(requirement: Requirement, image) -> tuple[bool, bool]:
    """(strict, lax): does the picture, uint8 (H, W, 3), show what is required?

    Strict: that and nothing else, on an even background, which no other foreground interrupts.
    Lax, as in GenEval: other things may be there too, but a count is exact.
    """
    view = View(image)
    asked = [thing for thing in view.things if thing.shape in requirement.shapes][:8]
    strict = lax = False
    for things in itertools.permutations(asked, len(requirement.shapes)):
        if not fits(requirement, things):
            continue
        if requirement.background not in ("", view.background):
            continue
        rest = view.rest(things)
        if requirement.word:
            fit = reads(view.coverage, rest, requirement.word)
            strict = strict or fit >= MIN_WORD_FIT
            lax = lax or fit > 0
        else:
            strict = strict or rest.mean() <= MAX_REST
            lax = lax or requirement.task != "counting" or len(asked) == len(things)
    return strict, lax


def wilson(passed: int, n: int) -> tuple[float, float]:
    """95 % interval of a share of which `passed` of `n` were seen (Wilson 1927)."""
    z = 1.96
    middle = (passed + z**2 / 2) / (n + z**2)
    reach = z / (n + z**2) * (passed * (n - passed) / n + z**2 / 4) ** 0.5
    return max(0.0, middle - reach), min(1.0, middle + reach)


def success_rates(requirements, images) -> dict:
    """Scores as JSON: {"overall": mean of GenEval's six tasks, "overall_lax", "tasks": {task:
    {"strict", "lax", "n", "interval": [low, high] of strict}}}. Pictures are uint8 (H, W, 3)."""
    results = {task: [] for task in TASKS}
    for requirement, image in zip(requirements, images, strict=True):
        results[requirement.task].append(score(requirement, image))
    scores = {"overall": 0.0, "overall_lax": 0.0, "tasks": {}}
    for task, pairs in results.items():
        strict, lax = np.sum(pairs, axis=0).tolist()
        n = len(pairs)
        scores["tasks"][task] = {"strict": strict / n, "lax": lax / n, "n": n,
                                 "interval": list(wilson(strict, n))}
        if task in GENEVAL_TASKS:
            scores["overall"] += strict / n / len(GENEVAL_TASKS)
            scores["overall_lax"] += lax / n / len(GENEVAL_TASKS)
    return scores


def geneval(draw, count_per_task=60, seed=HELD_OUT_SEED, height=64, width=64,
            split=SPLITS[0]) -> dict:
    """Success rates of draw(prompts, first) -> list of uint8 (height, width, 3).

    It is called with batches of prompts. `first` is the number of the first one: noise should
    follow the number, so that no two batches start from the same.
    """
    cases = geneval_cases(count_per_task, seed, height, width, split)
    images = []
    for first in range(0, len(cases), BATCH_SIZE):
        batch = cases[first : first + BATCH_SIZE]
        images += draw([case.prompt for case in batch], first)
    return success_rates([case.requirement for case in cases], images)


def format_scores(scores: dict) -> str:
    """One line: GenEval .950, lax .960 (single object 1.00, ...)."""
    tasks = [f"{task} {scores['tasks'][task]['strict']:.2f}" for task in TASKS]
    return (f"GenEval {scores['overall']:.3f}, lax {scores['overall_lax']:.3f} "
            f"({', '.join(tasks)})")


def main():
    """Draw a sheet of 48 scenes and print their captions."""
    rows = []
    for index in range(48):
        scene = make_scene(0, index)
        print(f"{index:2}  {'  |  '.join(scene_captions(scene))}")
        if index % 8 == 0:
            rows.append([])
        rows[-1].append(np.pad(draw_scene(scene), ((2, 2), (2, 2), (0, 0)), constant_values=200))
    sheet = Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows]))
    Path("out").mkdir(exist_ok=True)
    sheet.resize((2 * sheet.width, 2 * sheet.height)).save("out/scenes.png")
    print("out/scenes.png shows them, eight in a row")


if __name__ == "__main__":
    main()
