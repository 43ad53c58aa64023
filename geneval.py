"""geneval.py: does a picture show what was asked (SD3, arXiv:2403.03206v1, Tables 4 and 5).

Read with   Tables 4 and 5; Ghosh et al. 2023 (arXiv:2310.11513), whose six tasks these are
Not here    the drawn world (scenes.py), making pictures (sample.py), the command line (evaluate.py)
Shapes      pictures are uint8 (H, W, 3) or PIL; H W are in pixels here
Run         python evaluate.py      scores what must score 1, and what must score about 0
"""

import itertools
import json
import random
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import sample
from data import from_tensor, to_tensor
from devices import autocast
from metrics import wilson
from options import read_lines, write_atomically
from scenes import (
    HELD_OUT_SEED, PLAIN, REWORDED, RGB, SHAPES, SIZES, WORDS, Scene, Thing, caption, draw_scene,
    is_held_out, make_scene, shape_mask, word_mask)

# ---- GenEval (Tables 4 and 5) on the drawn world -------------------------------------------------
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
MAX_REST = 0.004        # share of the pixels that may differ from background and things
MAX_UNEVEN = 15         # from the background, in YCbCr: nearer pixels count as background
MIN_WORD_FIT = 0.7      # correlation with a word as it is drawn


@dataclass(frozen=True)
class Case:
    """One question: a prompt, a scene that it describes, and what it says of the things there."""
    task: str
    prompt: str
    scene: Scene
    said: tuple[str, ...]


def geneval_cases(count_per_task, seed=HELD_OUT_SEED, height=64, width=64, split=SPLITS[0]):
    """list of Case, task by task: the first scenes of the set `seed` that suit, each used once.
    In the third split, each prompt names a combination that training never draws."""
    held_out = split == SPLITS[2]
    forms = REWORDED if split == SPLITS[1] else PLAIN
    cases = {task: [] for task in TASKS}
    index = 0
    while min(map(len, cases.values())) < count_per_task:
        scene = make_scene(seed, index, height, width, held_out=held_out)
        index += 1
        shapes = [thing.shape for thing in scene.things]
        colors = [thing.color for thing in scene.things]
        different = len(set(shapes)) == len(set(colors)) == 2
        if scene.kind == "pair" and not different:
            continue
        # The task with the fewest cases comes first.
        for task in sorted(TASKS, key=lambda name: len(cases[name])):
            kind, said = TASKS[task]
            if held_out:
                said = (*said, "color")
            relation = scene.relation if "relation" in said else ""
            if kind == scene.kind and is_held_out(shapes, colors, relation) == held_out:
                prompt = caption(scene, said, forms, random.Random(scene.wording))
                cases[task].append(Case(task, prompt, scene, said))
                break
    chosen = []
    for found in cases.values():
        chosen += found[:count_per_task]
    return chosen


# ---- Recognise what a picture shows, from its pixels alone ---------------------------------------
MIN_DIFFERENCE = 30     # of foreground from the background, in YCbCr; the colours differ by 63
MIN_AREA = 0.01         # of a thing / (shorter side)^2; the smallest drawn thing has .04
MIN_FIT = 0.94          # correlation with the best shape; drawn things reach .98
MAX_STRANGE = 40        # of a pixel from the thing's colour, in YCbCr; 1 in 10 may be further


class View:
    """What the score sees in a picture: a background, which has the middle colour of the border,
    things, and perhaps something else. Large pictures are first reduced to 128 to 255 pixels."""
    def __init__(self, image: np.ndarray):
        self.factor = max(1, min(image.shape[:2]) // 128)
        small = Image.fromarray(image).reduce(self.factor).convert("YCbCr")
        pixels = np.asarray(small, dtype=np.float32)                                   # (H, W, 3)
        rows = np.concatenate([pixels[0], pixels[-1]])                                 # (2 W, 3)
        columns = np.concatenate([pixels[:, 0], pixels[:, -1]])                        # (2 H, 3)
        self.color = np.median(np.concatenate([rows, columns]), axis=0)
        self.background = nearest_color(self.color)
        self.offset = pixels - self.color                                              # (H, W, 3)
        self.difference = np.linalg.norm(self.offset, axis=2)                          # (H, W)
        self.side = min(self.difference.shape)
        self.radius = max(2, self.side // 32)
        highest = local_max(self.difference, self.radius)
        highest = np.maximum(highest, 2 * MIN_DIFFERENCE)
        self.things = []
        for blob in components(self.difference > 0.6 * highest):
            thing = self.recognise(blob)
            if thing is not None:
                self.things.append(thing)

    def ink(self, mask):
        """(coverage (H, W), colour) of the ink that a mask shows most clearly."""
        clearest = mask & (self.difference >= np.median(self.difference[mask]))
        offset = np.median(self.offset[clearest], axis=0)                              # (3,)
        along = self.offset @ offset / (offset @ offset)                               # (H, W)
        near = local_max(mask, self.radius)
        return near * along.clip(0, 1), self.color + offset

    def recognise(self, mask):
        """The thing around this mask; None if it is a speck, or has two colours or no shape."""
        if mask.sum() < MIN_AREA * self.side**2:
            return None
        soft, color = self.ink(mask)
        inside = mask & (local_max(~mask, 1) == 0)
        strange = np.linalg.norm(self.offset - (color - self.color), axis=2) > MAX_STRANGE
        if inside.any() and strange[inside].mean() > 0.1:
            return None                                  # It has two colours.
        form, center_x, center_y = normal_form(soft)
        fit = shape_forms() @ form                                                     # (8,)
        if fit.max() < MIN_FIT:
            return None
        shape = SHAPES[fit.argmax()]
        share = shape_mask(shape, 64).mean()             # of its square that a shape covers
        diameter = float(np.sqrt(soft.sum() / share))
        left = float(center_x) - diameter / 2
        top = float(center_y) - diameter / 2
        return Thing(shape, nearest_color(color), nearest_size(diameter / self.side),
                     self.factor * left, self.factor * top, self.factor * diameter, mask)

    def rest(self, things, least=MIN_DIFFERENCE) -> np.ndarray:
        """Where the picture differs from the background by more than `least`, and none of these
        things is near: (H, W)."""
        rest = self.difference > least
        for thing in things:
            rest &= local_max(thing.mask, self.radius) == 0
        return rest


def nearest_color(color) -> str:
    """The name of the closest colour of this world to (Y, Cb, Cr)."""
    row = np.uint8([list(RGB.values())])                                               # (1, 13, 3)
    palette = np.array(Image.fromarray(row).convert("YCbCr"), dtype=np.float32)[0]
    distances = np.linalg.norm(palette - color, axis=1)                                # (13,)
    return tuple(RGB)[distances.argmin()]


def nearest_size(diameter) -> str:
    """The name of the size with the nearest ratio to `diameter`, in shorter sides."""
    ratios = np.array(list(SIZES.values())) / diameter
    return tuple(SIZES)[abs(np.log(ratios)).argmin()]


def local_max(x, radius: int) -> np.ndarray:
    """The largest value within `radius` pixels in either direction: (H, W) -> (H, W)."""
    x = torch.from_numpy(x).float()[None]
    highest = F.max_pool2d(x, 2 * radius + 1, stride=1, padding=radius)
    return highest[0].numpy()


def components(mask) -> list[np.ndarray]:
    """The parts of a mask (H, W) whose pixels touch along sides, as masks. Each pixel starts with a
    label of its own, and takes the largest one beside it until nothing changes."""
    mask = torch.from_numpy(mask)
    labels = torch.arange(1.0, mask.numel() + 1).view(mask.shape)
    labels = labels * mask                                                             # 0: no part
    before = None
    while before is None or not before.equal(labels):
        before = labels
        upright = F.max_pool2d(labels[None], (3, 1), 1, (1, 0))[0]
        across = F.max_pool2d(labels[None], (1, 3), 1, (0, 1))[0]
        labels = torch.maximum(upright, across) * mask
    return [(labels == label).numpy() for label in labels.unique() if label > 0]


def normal_form(soft, grid=24):
    """(form, center_x, center_y) of a soft mask (H, W). The product of two forms (grid * grid,) is
    a correlation that does not depend on place and size: each is centred on its mass and scaled by
    its spread."""
    H, W = soft.shape
    y, x = np.mgrid[:H, :W] + 0.5
    weights = soft / soft.sum()
    center_x = (weights * x).sum()
    center_y = (weights * y).sum()
    squares = (x - center_x) ** 2 + (y - center_y) ** 2
    spread = np.sqrt((weights * squares).sum())
    reach = np.linspace(-2.2, 2.2, grid) * spread                            # A triangle needs 2
    points = np.empty((1, grid, grid, 2), dtype=np.float32)
    points[..., 0] = (center_x + reach) / W * 2 - 1                          # -1 is the left edge
    points[..., 1] = (center_y + reach[:, None]) / H * 2 - 1
    points = torch.from_numpy(points)
    soft = torch.from_numpy(np.float32(soft))[None, None]                    # (1, 1, H, W)
    form = F.grid_sample(soft, points, align_corners=False)
    form = form.flatten().numpy()
    form = form - form.mean()
    return form / max(np.linalg.norm(form), 1e-9), center_x, center_y


@lru_cache(maxsize=1)
def shape_forms() -> np.ndarray:
    """The normal forms of the shapes, a little blurred: (8, grid * grid)."""
    forms = []
    for shape in SHAPES:
        mask = np.pad(shape_mask(shape, 64), 16)
        blurred = F.avg_pool2d(torch.from_numpy(mask)[None], 7, 1, 3)[0]
        form, _, _ = normal_form(blurred.numpy())
        forms.append(form)
    return np.stack(forms)


# ---- Is that what was asked? ---------------------------------------------------------------------
def fits(case, things) -> bool:
    """Has each thing, in this order, every property that the prompt names for it?
    Differs from GenEval: "left of" holds at any angle, even far below, as it does in the scenes."""
    for thing, wanted in zip(things, case.scene.things):
        for part in ("shape", "color", "size"):
            said = part == "shape" or part in case.said
            if said and getattr(thing, part) != getattr(wanted, part):
                return False
    if "relation" not in case.said:
        return True
    first, second = things
    half = (first.diameter - second.diameter) / 2
    right = first.left - second.left + half                  # from centre to centre
    down = first.top - second.top + half
    offset = {"left of": -right, "right of": right, "above": -down, "below": down}
    return offset[case.scene.relation] > MIN_OFFSET * (first.diameter + second.diameter)


def score(case, image) -> tuple[bool, bool]:
    """(strict, lax): does the picture show what the case asks for? Strict: on
    an even background, and nothing else. Lax, as GenEval: other things too, but exact counts."""
    view = View(np.asarray(image))
    wanted = case.scene.things
    shapes = {thing.shape for thing in wanted}
    named = [thing for thing in view.things if thing.shape in shapes]
    if "background" in case.said and view.background != case.scene.background:
        return False, False
    lax = False
    for things in itertools.permutations(named[:8], len(wanted)):
        if not fits(case, things):
            continue
        rest = view.rest(things, MAX_UNEVEN)
        if case.scene.word:
            place = find_word(view, view.rest(things), case.scene.word)
            if place is None:
                continue
            rest &= ~place
        if case.task != "counting" or len(named) == len(things):
            lax = True
        if rest.mean() <= MAX_REST:
            return True, lax
    return False, lax


@lru_cache(maxsize=16)
def spellings(word, height, width):
    """Masks (n, height * width), of mean 0 and norm 1: the word, the other words of this world, and
    all misspellings: one letter replaced, left out, or exchanged with the next."""
    others = set(WORDS)
    for i in range(len(word)):
        before, letter, after = word[:i], word[i], word[i + 1 :]
        others.add(before + after)
        others.add(before + after[:1] + letter + after[1:])
        for other in "ABCDEFGHIJKLMNOPQRSTUVWXYZ":
            others.add(before + other + after)
    masks = []
    for text in [word, *sorted(others - {word, ""})]:
        mask = word_mask(text, "", height, width).ravel()
        masks.append((mask - mask.mean()) / mask.std() / mask.size**0.5)
    return np.stack(masks)


def find_word(view, rest, word):
    """Where the word is, a mask (H, W), if the foreground `rest` shows it, better than any other
    spelling; None if not. Its box is moved to the middle, and up to 2 px further. Specks of up to 4
    pixels do not count."""
    parts = [part for part in components(rest) if part.sum() > 4]
    if not parts:
        return None
    rest = np.any(parts, axis=0)
    H, W = rest.shape
    rows, columns = np.nonzero(rest)
    down = (H - rows.min() - rows.max()) // 2
    right = (W - columns.min() - columns.max()) // 2
    ink, _ = view.ink(rest)
    ink = ink - ink.mean()
    moved = []
    for more_down in range(-2, 3):
        for more_right in range(-2, 3):
            shift = down + more_down, right + more_right
            moved.append(np.roll(ink, shift, axis=(0, 1)).ravel())
    cosines = spellings(word, H, W) @ np.stack(moved).T / np.linalg.norm(ink)    # (n, 25)
    fit = cosines.max(axis=1)                                                    # (n,)
    readable = fit.argmax() == 0 and fit[0] >= MIN_WORD_FIT
    if not readable:
        return None
    mask = word_mask(word, "", H, W)
    mask = np.roll(mask, (-down, -right), axis=(0, 1))
    return local_max(mask, view.radius) > 0.5


def success_rates(cases, images) -> dict:
    """{"overall": mean of GenEval's six tasks, "overall_lax", "n": pictures of a task,
    "strict": {task: share that passes}, "intervals": of these, 95 %, "lax": {task: share}}."""
    passed = {task: [] for task in TASKS}
    for case, image in zip(cases, images, strict=True):
        passed[case.task].append(score(case, image))
    n = len(cases) // len(TASKS)
    strict, intervals, lax = {}, {}, {}
    for task in TASKS:
        strict[task], lax[task] = np.mean(passed[task], axis=0).tolist()
        intervals[task] = wilson(strict[task], n)
    overall = sum(strict[task] for task in GENEVAL_TASKS) / 6
    overall_lax = sum(lax[task] for task in GENEVAL_TASKS) / 6
    return {"overall": overall, "overall_lax": overall_lax, "n": n,
            "strict": strict, "intervals": intervals, "lax": lax}


def format_scores(rates) -> str:
    """One line: GenEval 0.950, lax 0.960 (single object 1.00 in 0.94-1.00, ...)."""
    tasks = []
    for task, share in rates["strict"].items():
        low, high = rates["intervals"][task]
        tasks.append(f"{task} {share:.2f} in {low:.2f}-{high:.2f}")
    return f"GenEval {rates['overall']:.3f}, lax {rates['overall_lax']:.3f} ({', '.join(tasks)})"


def geneval(pipeline, count_per_task=60, seed=HELD_OUT_SEED, split=SPLITS[0], **settings):
    """Success rates of a model. settings: fields of sample.Settings. Picture i starts from the
    noise of seed + i."""
    size = pipeline.defaults | settings
    cases = geneval_cases(count_per_task, seed, size["height"], size["width"], split)
    B = batch_size(size["height"], size["width"])
    images = []
    for first in tqdm(range(0, len(cases), B), "GenEval", leave=False):
        prompts = [case.prompt for case in cases[first : first + B]]
        images += sample.generate(pipeline, prompts, seed + first, B, **settings)
    return success_rates(cases, images)


def batch_size(height, width):
    """How many pictures fit into memory at once: 64 up to 256 px, 4 at 1024 px."""
    return max(1, min(64, 2**22 // (height * width)))


# ---- The controls --------------------------------------------------------------------------------
def controls(cases, pipeline=None):
    """Yields (name, pictures, cases): what must score 1, and what must score about 0. With a
    pipeline, the autoencoder's controls too: its ceiling, and what its decoded noise scores."""
    truth = [draw_scene(case.scene) for case in cases]
    yield "ground truth", truth, cases
    order = np.random.default_rng(0).permutation(len(cases))
    shuffled = [truth[i] for i in order]
    asked = [cases[i] for i in np.roll(order, 1)]
    yield "shuffled captions", shuffled, asked
    if pipeline is None:
        return
    yield "ground truth through the VAE", decoded(pipeline, truth), cases
    rng = torch.Generator().manual_seed(0)
    for scale in (0.5, 1, 2):
        yield f"decoded noise, {scale}", decoded(pipeline, truth, scale, rng), cases


@torch.no_grad()
def decoded(pipeline, pictures, scale=0, rng=None):
    """The pictures through the VAE; with a scale, noise in place of their latents."""
    found = []
    for picture in pictures:
        image = to_tensor(picture)[None].to(pipeline.device)                     # (1, 3, H, W)
        with autocast(pipeline.device, pipeline.precision):
            latent = pipeline.vae.encode(image).float()                          # (1, C, H/8, W/8)
            if scale:
                latent = scale * torch.randn(latent.shape, generator=rng).to(latent)
            found.append(from_tensor(pipeline.vae.decode(latent)[0]))
    return found


# ---- Pictures for GenEval's own scorer, and others -----------------------------------------------
def read_prompts(file):
    """A list of {"prompt": ..., and what else the file says of it}. Files are GenEval's .jsonl,
    PartiPrompts' .tsv, or have one prompt a line, as T2I-CompBench's .txt."""
    lines = read_lines(file)
    kind = Path(file).suffix
    found = []
    for number, line in enumerate(lines, 1):
        about = {"prompt": line}
        try:
            if kind == ".jsonl":
                about = json.loads(line)
            if kind == ".tsv":
                columns = lines[0].lower().split("\t")
                about = dict(zip(columns, line.split("\t"), strict=True))
            blank = not about["prompt"].strip()
        except (ValueError, LookupError, TypeError, AttributeError):
            blank = True
        if blank:
            raise ValueError(f"{file} line {number}: {line[:60]!r} is no prompt; take it out")
        found.append(about)
    if kind == ".tsv":
        found = found[1:]                                    # The first line names the columns.
    if not found:
        raise ValueError(f"{file} holds no prompt")
    return found


def draw_prompts(pipeline, prompts, folder, count, seed, **settings):
    """Draw `count` pictures of each prompt. GenEval's scorer reads folder/00000/metadata.jsonl and
    folder/00000/samples/0000.png; T2I-CompBench's reads folder/samples/PROMPT_000000.png, which is
    written for prompts that come with nothing but their words."""
    for number, about in enumerate(tqdm(prompts, "prompts")):
        first = number * count
        words = about["prompt"].replace("/", " ").encode()[:200]         # A name has 255 bytes.
        place = Path(folder) / "samples"
        if len(about) > 1:
            place = Path(folder) / f"{number:05}" / "samples"
        place.mkdir(parents=True, exist_ok=True)
        pictures = sample.generate(pipeline, [about["prompt"]] * count, seed + first, **settings)
        for i, picture in enumerate(pictures):
            name = f"{i:04}.png"
            if len(about) == 1:
                name = f"{words.decode(errors='ignore')}_{first + i:06}.png"
            write_atomically(place / name, partial(picture.save, format="PNG"))
        if len(about) > 1:
            file = place.with_name("metadata.jsonl")
            write_atomically(file, partial(Path.write_text, data=json.dumps(about) + "\n"))
