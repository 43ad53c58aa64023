"""scenes.py: a drawn world that can be scored exactly (SD3, arXiv:2403.03206v1, Sec. 5).

Read with   Sec. 5.2.2 for two kinds of captions; Tables 4, 5 for GenEval (Ghosh et al. 2023)
Not here    networks; prompts, rules and controls of the score (geneval.py)
Shapes      pictures are uint8 (H, W, 3), masks (H, W); H and W are in pixels
Run         python scenes.py     draws 24 scenes with their captions into out/scenes.png
"""

import random
import re
import textwrap
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

# ---- Draw ----------------------------------------------------------------------------------------
COLORS = {"red": "#d71e28", "orange": "#fa870f", "yellow": "#ffe132", "green": "#1e963c",
          "cyan": "#3cd2e1", "blue": "#234be1", "purple": "#8c2daf", "pink": "#ff91c8"}
BACKGROUNDS = {"white": "#ffffff", "gray": "#808080", "black": "#000000", "brown": "#4b280f",
               "navy": "#0f194b"}
RGB = {name: ImageColor.getrgb(code) for name, code in (COLORS | BACKGROUNDS).items()}
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
PLACES = {"": (0, 0, 1, 1), "left of": (0, 0, 0.5, 1), "right of": (0.5, 0, 0.5, 1),
          "above": (0, 0, 1, 0.5), "below": (0, 0.5, 1, 0.5), 0: (0, 0, 0.5, 0.5),
          1: (0.5, 0, 0.5, 0.5), 2: (0, 0.5, 0.5, 0.5), 3: (0.5, 0.5, 0.5, 0.5)}
GROUNDS = ("white", "white", "black", "black", "gray", "brown", "navy")
KINDS = ("single", "pair", "pair", "pair", "count", "count", "word")
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
    """Is this combination never drawn for training? A colour or relation "" is left open.
    There is no green circle, for example, no circle left of a diamond or above a cross."""
    number = [SHAPES.index(shape) for shape in shapes]
    for i, color in enumerate(colors):
        if color and (list(COLORS).index(color) - number[i]) % 8 == 3:
            return True
    step = 3 if relation in ("left of", "below") else 5
    return relation != "" and len(shapes) == 2 and (number[1] - number[0]) % 8 == step


def make_scene(seed: int, index: int, height=64, width=64, held_out=False) -> Scene:
    """Scene `index` of the endless set `seed`. At another size, only the places differ.
    held_out: whether it has a combination that training never sees."""
    rng = np.random.default_rng((seed, index))
    while True:
        scene = compose(rng, height, width)
        shapes = [thing.shape for thing in scene.things]
        colors = [thing.color for thing in scene.things]
        twins = scene.kind == "pair" and len(set(zip(shapes, colors))) == 1      # That is a count.
        if not twins and is_held_out(shapes, colors, scene.relation) == held_out:
            return scene


def pick(rng, choices):
    """One of the choices, by a generator of numpy or of Python."""
    return choices[int(rng.random() * len(choices))]


def compose(rng, height, width) -> Scene:
    """Any scene. The number of random draws does not depend on the size."""
    kind, background = pick(rng, KINDS), pick(rng, GROUNDS)
    wording = int(rng.random() * 2**31)
    places, relation, word = [""], "", ""
    if kind == "pair":
        relation = pick(rng, RELATIONS)
        places = [relation, OPPOSITE[relation]]
    elif kind == "count":
        places = rng.permutation(4)[: pick(rng, (2, 3, 4))].tolist()
    elif kind == "word":
        word, relation = pick(rng, WORDS), pick(rng, ("", "above", "below"))
        places = [relation] if relation else []                  # Or the word stands alone.
    things = []
    for place in places:
        if not things or kind == "pair":                         # Counted things look alike.
            look = pick(rng, SHAPES), pick(rng, tuple(COLORS)), pick(rng, tuple(SIZES))
        diameter = SIZES[look[2]] * min(height, width) * (0.98 + 0.04 * rng.random())
        left, top, box_width, box_height = PLACES[place]
        spaces = box_width * width, box_height * height          # A margin of 1 px stays free.
        diameter = max(3, int(min(diameter, spaces[0] - 2, spaces[1] - 2)))
        left = left * width + 1 + rng.random() * max(0, spaces[0] - diameter - 2)
        top = top * height + 1 + rng.random() * max(0, spaces[1] - diameter - 2)
        things.append(Thing(*look, int(left), int(top), diameter))
    return Scene(kind, height, width, background, tuple(things), relation, word, wording)


@lru_cache(maxsize=4096)
def shape_mask(shape: str, diameter: int) -> np.ndarray:
    """Coverage of a shape in its square: (diameter, diameter) float32 in [0, 1]."""
    scale = 8 * diameter                             # It is drawn 8 times as large, then averaged.
    canvas = Image.new("L", (scale, scale), 0)
    for number, outline in enumerate(OUTLINES[shape]):
        method, *points = outline.split()
        points = [scale * float(value) for value in points]
        fill = 0 if shape == "ring" and number == 1 else 255
        getattr(ImageDraw.Draw(canvas), method)(points, fill=fill)
    return np.asarray(canvas.reduce(8), dtype=np.float32) / 255


@lru_cache(maxsize=4096)
def word_mask(word: str, relation: str, height: int, width: int) -> np.ndarray:
    """Coverage of a word in a picture (height, width). `relation` is that of a thing to it."""
    size, room = round(0.3 * min(height, width)), round(0.92 * width)
    font, bold = ImageFont.load_default(4 * size), size // 6
    left, top, right, bottom = font.getbbox(word, stroke_width=bold)
    ink = Image.new("L", (int(right - left), int(bottom - top)), 0)
    ImageDraw.Draw(ink).text((-left, -top), word, 255, font, stroke_width=bold)
    scale = min(size / ink.height, room / ink.width)
    ink = ink.resize((round(ink.width * scale), round(ink.height * scale)), Image.Resampling.BOX)
    middle = round(height * {"": 0.5, "above": 0.75, "below": 0.25}[relation])
    canvas = Image.new("L", (width, height), 0)
    canvas.paste(ink, ((width - ink.width) // 2, middle - ink.height // 2))
    return np.asarray(canvas, dtype=np.float32) / 255


def draw_scene(scene: Scene) -> np.ndarray:
    """The picture, uint8 (height, width, 3)."""
    canvas = np.empty((scene.height, scene.width, 3), dtype=np.float32)
    canvas[:] = RGB[scene.background]
    for thing in scene.things:
        square = canvas[thing.top :, thing.left :][: thing.diameter, : thing.diameter]
        mask = shape_mask(thing.shape, thing.diameter)[..., None]
        square += mask * (np.float32(RGB[thing.color]) - square)
    if scene.word:
        mask = word_mask(scene.word, scene.relation, scene.height, scene.width)[..., None]
        canvas += mask * ((0 if scene.background in ("white", "gray") else 255) - canvas)
    return (canvas + 0.5).astype(np.uint8)


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
PLAIN = {row: choices.split("|")[0] for row, choices in VARIED.items()}
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
    """One sentence about a scene, in a way of `forms`. All its things and words are named.
    said: what else is said of them, some of "color", "size", "relation" and "background"."""
    def choose(row):
        return pick(rng, forms[row].split("|"))
    def name(word):                                  # now and then, another word for it
        return SYNONYMS.get(word, word) if forms is not PLAIN and rng.random() < 0.3 else word
    phrases = []
    for thing in scene.things[: 1 if scene.kind == "count" else 2]:
        words = [name(getattr(thing, part)) for part in ("size", "color") if part in said]
        shape = name(thing.shape)
        if scene.kind == "count":
            words = [name(COUNTS[len(scene.things)]), *words, plural(shape)]
        else:
            words = [choose("article"), *words, shape]
        phrase = " ".join(words).strip()
        phrases.append("an" + phrase[1:] if phrase.startswith("a o") else phrase)      # orange
    if scene.word:
        phrases.append(choose("word").format(scene.word))
    text = phrases[0]
    if len(phrases) == 2:
        row = "joint"
        if "relation" in said:
            row = "beside" if scene.relation in ("left of", "right of") else "stacked"
        a, b = phrases
        first, second = (a, b) if scene.relation in ("left of", "above") else (b, a)
        text = choose(row).format(a=a, b=b, relation=scene.relation, first=first, second=second)
    if "background" in said:
        text = choose("background").format(text, color=name(scene.background))
    return getattr(choose("opening").format(text), choose("case"))()


def scene_captions(scene: Scene) -> tuple[str, str]:
    """(short, full): what people write beside a picture, and what a model would write (Sec. 5.2.2).
    A short caption leaves out much; two in a hundred are empty. A full one is complete."""
    rng = random.Random(scene.wording)
    shares = {"color": 0.7, "relation": 0.5, "size": 0.1, "background": 0.1}
    said = [part for part, share in shares.items() if rng.random() < share]
    short = caption(scene, said, pick(rng, (PLAIN, VARIED)), rng)
    full = caption(scene, list(shares), pick(rng, (PLAIN, VARIED)), rng)
    return ("" if rng.random() < 0.02 else short), full


def vocabulary() -> set[str]:
    """The words that captions use, in lower case, as re.findall(r"\\w+", text.lower()) has them."""
    texts = [*RGB, *SIZES, *RELATIONS, *WORDS, *COUNTS.values(), *SYNONYMS.values(), "an"]
    for shape in SHAPES:
        texts += [shape, plural(shape), plural(SYNONYMS.get(shape, shape))]
    texts += (VARIED | {"case": ""}).values()
    return set(re.findall(r"\w+", re.sub(r"{\w*}", " ", " ".join(texts)).lower()))


class Scenes:
    """An endless source of drawn scenes, cut to `size`. It has the methods of data.ImageFiles."""
    def __init__(self, size: int, seed: int = 0):
        self.size = self.found = size
        self.seed = seed
        self.problems = []

    def __len__(self):
        return self.size

    def image(self, index: int, height: int, width: int) -> np.ndarray:
        return draw_scene(make_scene(self.seed, index, height, width))

    def captions(self, index: int) -> tuple[str, str]:
        return scene_captions(make_scene(self.seed, index))

    def picture_size(self, index: int) -> tuple[int, int]:
        """(height, width) of the proportions that this scene gets, from 1:2 to 2:1."""
        aspect = 2 ** np.random.default_rng((self.seed, index, 1)).uniform(-1, 1)
        return round(64 * aspect**0.5), round(64 / aspect**0.5)


# ---- Recognise what a picture shows, from its pixels alone ---------------------------------------
MIN_DIFFERENCE = 30     # of foreground from the background, in YCbCr; the colours differ by 63
MIN_AREA = 0.01         # of a thing, in squares of the shorter side; the smallest ones have .04
MIN_FIT = 0.9           # correlation with the best shape; drawn things reach .97


class View:
    """What the score sees in a picture: a background, which has the middle colour of the border,
    things, and perhaps something else. Large pictures are first reduced to 128 to 255 pixels."""
    def __init__(self, image: np.ndarray):
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
        highest = np.maximum(local_max(self.difference, self.radius), 2 * MIN_DIFFERENCE)
        found = [self.recognise(blob) for blob in components(self.difference > 0.6 * highest)]
        self.things = [thing for thing in found if thing is not None]

    def ink(self, mask):
        """(coverage (H, W) by the colour that a mask shows most clearly, that colour)"""
        clearest = mask & (self.difference >= np.median(self.difference[mask]))
        color = np.median(self.offset[clearest], axis=0)
        soft = np.clip(self.offset @ color / (color @ color), 0, 1)
        return soft * local_max(mask, self.radius), self.color + color

    def recognise(self, mask):
        """The thing whose middle is this mask, or None where that is a speck or looks like none."""
        if mask.sum() < MIN_AREA * self.side**2:
            return None
        soft, color = self.ink(mask)
        form, center_x, center_y = normal_form(soft)
        fit = shape_forms() @ form                                                     # (8,)
        if fit.max() < MIN_FIT:
            return None
        shape = SHAPES[fit.argmax()]
        diameter = np.sqrt(soft.sum() / shape_mask(shape, 64).mean())
        nearest = min(SIZES, key=lambda size: abs(np.log(SIZES[size] * self.side / diameter)))
        square = np.array([center_x - diameter / 2, center_y - diameter / 2, diameter])
        return Thing(shape, nearest_color(color), nearest, *(self.factor * square).tolist(), mask)

    def rest(self, things) -> np.ndarray:
        """Where the picture is not background, and none of these things is near: (H, W)."""
        rest = self.difference > MIN_DIFFERENCE
        for thing in things:
            rest &= local_max(thing.mask, self.radius) == 0
        return rest


def nearest_color(color) -> str:
    """The name of the closest colour of this world to (Y, Cb, Cr)."""
    palette = Image.fromarray(np.uint8([list(RGB.values())])).convert("YCbCr")
    distances = np.linalg.norm(np.array(palette, dtype=np.float32)[0] - color, axis=1)
    return tuple(RGB)[distances.argmin()]


def local_max(x, radius: int) -> np.ndarray:
    """The largest value within `radius` pixels in either direction: (H, W) -> (H, W)."""
    x = torch.from_numpy(x).float()[None]
    return F.max_pool2d(x, 2 * radius + 1, stride=1, padding=radius)[0].numpy()


def components(mask) -> list[np.ndarray]:
    """The parts of a mask (H, W) whose pixels touch along sides, as masks. Each pixel starts with a
    label of its own, and takes the largest one beside it until nothing changes."""
    mask = torch.from_numpy(mask)
    labels = torch.arange(1.0, mask.numel() + 1).view(mask.shape) * mask               # 0: no part
    before = None
    while before is None or not before.equal(labels):
        before = labels
        upright = F.max_pool2d(labels[None], (3, 1), 1, (1, 0))[0]
        across = F.max_pool2d(labels[None], (1, 3), 1, (0, 1))[0]
        labels = torch.maximum(upright, across) * mask
    return [(labels == label).numpy() for label in labels.unique() if label > 0]


def normal_form(soft, grid=24):
    """(form, center_x, center_y) of a soft mask (H, W). The product of two forms (grid * grid,) is
    a correlation that does not depend on place and size: each is centred and scaled by its mass."""
    H, W = soft.shape
    y, x = np.mgrid[:H, :W] + 0.5
    weights = soft / soft.sum()
    center_x, center_y = (weights * x).sum(), (weights * y).sum()
    spread = np.sqrt((weights * ((x - center_x) ** 2 + (y - center_y) ** 2)).sum())
    reach = np.linspace(-2.2, 2.2, grid) * spread                            # A triangle reaches 2.
    points = np.empty((1, grid, grid, 2), dtype=np.float32)
    points[..., 0] = (center_x + reach) / W * 2 - 1                          # -1 is the left edge
    points[..., 1] = (center_y + reach[:, None]) / H * 2 - 1
    soft = torch.from_numpy(np.float32(soft))[None, None]                    # (1, 1, H, W)
    form = F.grid_sample(soft, torch.from_numpy(points), align_corners=False).flatten().numpy()
    form = form - form.mean()
    return form / max(np.linalg.norm(form), 1e-9), center_x, center_y


@lru_cache(maxsize=1)
def shape_forms() -> np.ndarray:
    """The normal forms of the shapes, a little blurred: (8, grid * grid)."""
    forms = []
    for shape in SHAPES:
        mask = torch.from_numpy(np.pad(shape_mask(shape, 64), 16))[None]
        forms.append(normal_form(F.avg_pool2d(mask, 7, 1, 3)[0].numpy())[0])
    return np.stack(forms)


# ---- Show pictures -------------------------------------------------------------------------------
def captioned_grid(images, captions, columns: int) -> Image.Image:
    """One picture of many (PIL or uint8 arrays), each above its caption, enlarged to 160 px."""
    images = [Image.fromarray(np.asarray(image)) for image in images]
    factor = -(-160 // max(max(image.size) for image in images))
    cell = factor * max(max(image.size) for image in images) + 16
    font = ImageFont.load_default(size=cell // 16)
    row = int(cell + 5 * font.size)
    grid = Image.new("RGB", (columns * cell, -(-len(images) // columns) * row), "white")
    for i, (image, text) in enumerate(zip(images, captions, strict=True)):
        left, top = i % columns * cell + 8, i // columns * row + 8
        image = ImageOps.scale(image, factor, Image.Resampling.NEAREST)
        grid.paste(image, (left, top))
        text = textwrap.fill(text, 27, max_lines=4, placeholder=" ...")
        ImageDraw.Draw(grid).multiline_text((left, top + image.height + 4), text, "black", font)
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
