"""evaluate.py: does it work, in numbers (SD3, arXiv:2403.03206v1, Sec. 5.1 and 5.3.3).

Read with   Sec. 5.1 (CLIP score, FID on CLIP features), Tables 4 and 5 (GenEval); Ghosh et al. 2023 for GenEval's rules
Not here    making pictures (sample.py), drawing the scenes (data.py), losses and path length (flow.py)
GenEval     six tasks on the built-in scenes. A picture is scored from its pixels: `find_things` names what is there,
            `score` compares that with the `Requirement` behind the prompt. No learned detector is involved.
Shapes      B batch   n patches   D hidden_size   image (B, 3, S, S) in [-1, 1] for the image tower;
            pictures to score are uint8 (H, W, 3), and there H W are in pixels
Run         python evaluate.py                  ground truth (the ceiling) and shuffled captions (chance)
            python evaluate.py pretrained/tiny  the same and a row for a model
"""

import argparse
import itertools
import json
import math
import shlex
import sys
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from checkpoints import CheckpointError, write_atomically
from data import COLORS, HELD_OUT_SEED, SHAPES, Scene, draw_scene, make_scene, scene_captions, shape_mask
from text_encoders import CLIPLayer

# ------------------------------------------------------------------------------------------------------------
# CLIP's image tower, and the two metrics on its features (Sec. 5.1)
# ------------------------------------------------------------------------------------------------------------

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)      # of RGB in [0, 1]


@dataclass(frozen=True)
class CLIPImageConfig:
    """Sizes of a CLIP image tower. The defaults are CLIP-L/14, whose features the paper's CLIP score and FID use."""
    image_size: int = 224              # pixels per side; other images are resized
    patch_size: int = 14               # pixels per token side
    hidden_size: int = 1024
    num_layers: int = 24
    projection_dim: int = 768          # of the space shared with text
    activation: str = "quick_gelu"

    @property
    def num_heads(self) -> int:        # 16 for CLIP-L: 64 channels a head
        return self.hidden_size // 64

    @property
    def num_patches(self) -> int:      # 256 for CLIP-L/14
        return (self.image_size // self.patch_size) ** 2


class CLIPImageEncoder(nn.Module):
    """image (B, 3, S, S) in [-1, 1] -> features (B, projection_dim), not normalised."""

    def __init__(self, config: CLIPImageConfig = CLIPImageConfig()):
        super().__init__()
        self.config = config
        D, p, std = config.hidden_size, config.patch_size, config.hidden_size**-0.5                 # std 0.03 in CLIP-L
        self.patch_embedding = nn.Conv2d(3, D, p, stride=p, bias=False)
        self.class_token = nn.Parameter(std * torch.randn(D))
        self.position_embedding = nn.Embedding(1 + config.num_patches, D)                           # class token first
        nn.init.normal_(self.position_embedding.weight, std=std)
        self.pre_norm = nn.LayerNorm(D, eps=1e-5)
        self.layers = nn.ModuleList(CLIPLayer(config, causal=False) for _ in range(config.num_layers))
        self.post_norm = nn.LayerNorm(D, eps=1e-5)
        self.projection = nn.Linear(D, config.projection_dim, bias=False)

    def layer_outputs(self, image):
        """The sequence (B, 1 + n, D) after every layer: the class token, then the patches row by row.
        An image of another size is resized first, and squeezed if it is not square: nothing is cut off."""
        size = (self.config.image_size, self.config.image_size)
        if image.shape[-2:] != size:
            image = F.interpolate(image, size, mode="bicubic", antialias=True)                      # (B, 3, S, S)
        mean, std = (image.new_tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        patches = self.patch_embedding(((image + 1) / 2 - mean) / std)                              # (B, D, S/p, S/p)
        patches = patches.flatten(2).transpose(1, 2)                                                # (B, n, D)
        x = torch.cat([self.class_token.expand(len(image), 1, -1), patches], dim=1)                 # (B, 1 + n, D)
        x = self.pre_norm(x + self.position_embedding.weight)
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return outputs

    def features(self, image):
        """The patches' tokens (B, n, D) after every layer, for `vae.perceptual_loss`."""
        return [x[:, 1:] for x in self.layer_outputs(image)]

    def forward(self, image):
        class_token = self.layer_outputs(image)[-1][:, 0]                                           # (B, D)
        return self.projection(self.post_norm(class_token))                                     # (B, projection_dim)


def clip_score(image_features, text_features):
    """Mean cosine of pictures and their captions (Hessel et al. 2021, but without the factor 2.5 and not cut off at 0).
    Both (B, d)."""
    return F.cosine_similarity(image_features.float(), text_features.float()).mean()


def sqrt_of(matrix):
    """Symmetric square root of a positive semi-definite matrix (d, d); eigenvalues below 0 by rounding count as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def frechet_distance(features_a, features_b):
    """Frechet distance of Gaussians fitted to two sets of features (N, d), (M, d); on CLIP's it is CLIP-FID (Sec. 5.1).

        |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    C_a C_b is not symmetric, but it has the eigenvalues of C_a^(1/2) C_b C_a^(1/2), which is; the trace of the root is
    the sum of their roots. In float64, as they spread over many orders of magnitude. Biased upwards if N or M is small.
    """
    a, b = features_a.double(), features_b.double()
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} and {len(b)} feature vectors; a covariance needs 2 at least, a good one thousands")
    cov_a, cov_b = torch.atleast_2d(a.T.cov()), torch.atleast_2d(b.T.cov())                         # (d, d)
    root_a = sqrt_of(cov_a)
    product = root_a @ cov_b @ root_a                                                               # (d, d) symmetric
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    return (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross


# ------------------------------------------------------------------------------------------------------------
# What is in a picture
# ------------------------------------------------------------------------------------------------------------

MIN_DIFFERENCE = 30     # from the background, in YCbCr; colours and backgrounds of data.py differ by 63 at least
MIN_AREA = 0.004        # of the shorter side squared: less is a speck; a third of the smallest star
MIN_FIT = 0.85          # correlation with the best shape; things of data.py reach 0.94, blurred, noisy or compressed
WEIGHTS = (8, 1, 1)     # of Y, Cb, Cr in the outline of a thing: JPEG keeps half of the resolution of Cb and Cr
GRID = 24               # shapes are compared on GRID x GRID points
BLURS = (0.02, 0.06, 0.1)            # of the diameter: sharp and soft pictures of a shape are both that shape


@dataclass(frozen=True)
class Found:
    """One object in a picture: its names, and its box in pixels; `center` is (x, y)."""
    shape: str
    color: str
    left: int
    top: int
    height: int
    width: int

    @property
    def center(self) -> tuple[float, float]:
        return self.left + self.width / 2, self.top + self.height / 2


def components(mask, min_area: float):
    """The 4-connected parts of a bool mask (H, W) that have at least min_area pixels: a list of masks (H, W).

    Each row is cut into runs of pixels; a run joins those of the row above that it touches (union-find).
    """
    steps = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    (rows, starts), ends = np.nonzero(steps == 1), np.nonzero(steps == -1)[1]                       # runs [start, end)
    parent = list(range(len(rows)))

    def root(i):
        while parent[i] != i:
            i = parent[i]
        return i

    above = 0
    for i, (row, start, end) in enumerate(zip(rows, starts, ends)):
        while rows[above] < row - 1 or (rows[above] == row - 1 and ends[above] <= start):           # ends before run i
            above += 1
        j = above
        while rows[j] == row - 1 and starts[j] < end:
            parent[root(i)] = root(j)
            j += 1
    runs_of = {}
    for i in range(len(rows)):
        runs_of.setdefault(root(i), []).append(i)
    parts = []
    for runs in runs_of.values():
        if sum(ends[i] - starts[i] for i in runs) >= min_area:
            part = np.zeros_like(mask)
            for i in runs:
                part[rows[i], starts[i] : ends[i]] = True
            parts.append(part)
    return parts


def local_max(x, radius: int):
    """The largest value within `radius` pixels in either direction: (H, W) -> (H, W)."""
    return F.max_pool2d(torch.from_numpy(x).float()[None], 2 * radius + 1, stride=1, padding=radius)[0].numpy()


def normal_form(coverage):
    """A soft mask (H, W) about its centre of mass, scaled to the same spread, with mean 0 and norm 1: (GRID * GRID,).

    The product of two normal forms is a correlation that does not depend on place and size. (Cropping to a box would do
    the same, but the box of a 13-pixel thing is wrong by a pixel, and blur and noise move it: a spread is an average.)
    """
    H, W = coverage.shape
    x, y, total = np.arange(W) + 0.5, np.arange(H) + 0.5, coverage.sum()
    by_column, by_row = coverage.sum(0) / total, coverage.sum(1) / total                            # (W,), (H,)
    center_x, center_y = by_column @ x, by_row @ y
    spread = np.sqrt(by_column @ (x - center_x) ** 2 + by_row @ (y - center_y) ** 2)
    reach = torch.linspace(-2.2, 2.2, GRID, dtype=torch.float64) * spread                      # a triangle reaches 2.0
    points_y, points_x = torch.meshgrid((center_y + reach) / H * 2 - 1, (center_x + reach) / W * 2 - 1, indexing="ij")
    points = torch.stack([points_x, points_y], dim=-1)[None].float()                                # (1, GRID, GRID, 2)
    form = F.grid_sample(torch.from_numpy(coverage)[None, None].float(), points, align_corners=False).flatten().numpy()
    form = form - form.mean()
    return form / max(np.linalg.norm(form), 1e-9)                       # a line may fall between the points: all zeros


@lru_cache(maxsize=1)
def shape_forms():
    """Normal forms of data.py's shapes at each blur: (8, 3, GRID * GRID)."""
    masks = [Image.fromarray(np.uint8(255 * np.pad(shape_mask(shape, 64), 16))) for shape in SHAPES]
    return np.stack([[normal_form(np.asarray(mask.filter(ImageFilter.GaussianBlur(64 * blur)), dtype=np.float64))
                      for blur in BLURS] for mask in masks])


@lru_cache(maxsize=1)
def palette():
    """The colours of data.py in YCbCr: (8, 3)."""
    return np.array(Image.fromarray(np.uint8([list(COLORS.values())])).convert("YCbCr"), dtype=np.float32)[0]


def find_things(image):
    """uint8 (H, W, 3) -> list of Found: the objects in front of an even background, the middle colour of the border.

    A pixel's coverage is its difference from the background relative to the largest one near it; there is an object
    where it is above one half. Its colour is the palette's nearest to its clearest pixels, its shape the one that
    correlates best. What looks like no shape may be several that touch: its denser parts are looked at in its place.
    What then still looks like no shape is not reported. Colours are compared in YCbCr.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image is {image.dtype} {image.shape}; give uint8 (height, width, 3): np.asarray(picture)")
    factor = max(1, min(image.shape[:2]) // 128)                                                    # side < 256 px
    pixels = np.asarray(Image.fromarray(image).reduce(factor).convert("YCbCr"), dtype=np.float32)   # (H, W, 3)
    background = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    offset = pixels - background
    difference = np.linalg.norm(offset, axis=2)                                                     # (H, W)
    shorter_side = min(difference.shape)
    radius, min_area = max(2, shorter_side // 32), MIN_AREA * shorter_side**2
    coverage = difference / np.maximum(local_max(difference, radius), 2 * MIN_DIFFERENCE)
    blobs = components(coverage > 0.5, min_area)
    free = ~np.any(blobs, axis=0)                                                                   # in no blob

    def recognise(blob, level):
        """The things in one blob, which is where the coverage is above level."""
        clearest = blob & (difference >= np.median(difference[blob]))
        color = np.median(offset[clearest], axis=0)                                                 # less background
        around = local_max(blob, radius) * (free | blob)                                            # and its soft edge
        soft = np.clip(offset @ (WEIGHTS * color) / (color @ (WEIGHTS * color)), 0, 1) * around     # (H, W) in [0, 1]
        fit = (shape_forms() @ normal_form(soft)).max(axis=1)                                       # (8,)
        if fit.max() < MIN_FIT:
            parts = components(blob & (coverage > level + 0.1), min_area) if level < 0.75 else []
            return [thing for part in parts for thing in recognise(part, level + 0.1)]
        nearest = np.linalg.norm(palette() - (background + color), axis=1).argmin()
        rows, columns = np.flatnonzero(blob.any(axis=1)), np.flatnonzero(blob.any(axis=0))
        box = columns[0], rows[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        return [Found(SHAPES[fit.argmax()], list(COLORS)[nearest], *(int(factor * v) for v in box))]

    return [thing for blob in blobs for thing in recognise(blob, 0.5)]


# ------------------------------------------------------------------------------------------------------------
# GenEval (Ghosh et al. 2023; Tables 4 and 5) on the built-in scenes
# ------------------------------------------------------------------------------------------------------------

BATCH_SIZE = 64         # prompts given to a generator at once
MIN_OFFSET = 0.1        # of the two sizes' sum: how far apart centres must be for a relation (GenEval's threshold)

# The value of scene.wording with which data.scene_captions says what a task needs: colours or not, relation or "and".
WORDING = {"single object": 0.75, "two objects": 0.75, "counting": 0.75, "colors": 0.25, "position": 0.90,
           "color attribution": 0.25}
TASKS = tuple(WORDING)


@dataclass(frozen=True)
class Requirement:
    """What a picture must show to pass."""
    task: str
    shapes: tuple[str, ...]                    # one or two
    colors: tuple[str, ...] = ("", "")         # theirs; "" means any
    count: int = 0                             # exactly so many of the first shape; 0: at least one of each
    relation: str = ""                         # of the first to the second; "" means any


def scene_requirements(scene: Scene) -> list[Requirement]:
    """What the tasks that this scene is an example of ask for. Two things must differ in what is said of them."""
    shapes, colors = tuple(thing.shape for thing in scene.things), tuple(thing.color for thing in scene.things)
    if scene.kind == "single":
        return [Requirement("single object", shapes), Requirement("colors", shapes, colors)]
    if scene.kind == "count":
        return [Requirement("counting", shapes[:1], count=len(shapes))]
    if scene.kind != "pair" or shapes[0] == shapes[1]:
        return []
    asked = [Requirement("two objects", shapes), Requirement("position", shapes, relation=scene.relation)]
    return asked + [Requirement("color attribution", shapes, colors)] * (colors[0] != colors[1])


def geneval_cases(count_per_task: int, seed: int = HELD_OUT_SEED, height: int = 64, width: int = 64):
    """list of (Requirement, Scene), task by task: the first scenes of the set `seed` that are examples of each."""
    cases = {task: [] for task in TASKS}
    for index in itertools.count():
        if all(len(chosen) >= count_per_task for chosen in cases.values()):
            return [case for chosen in cases.values() for case in chosen[:count_per_task]]
        scene = make_scene(seed, index, height, width)
        for requirement in scene_requirements(scene):
            cases[requirement.task].append((requirement, scene))


def prompt_of(requirement: Requirement, scene: Scene) -> str:
    """The short caption of data.py that says what is required, no more and no less."""
    return scene_captions(replace(scene, wording=WORDING[requirement.task]))[0]


def geneval_prompts(count_per_task: int, seed: int = HELD_OUT_SEED):
    """list of (task, prompt, Requirement)."""
    return [(requirement.task, prompt_of(requirement, scene), requirement)
            for requirement, scene in geneval_cases(count_per_task, seed)]


def stands(first: Found, relation: str, second: Found) -> bool:
    """Is the first thing left of (...) the second, by their centres and clearly so?

    Differs from GenEval: there the offset must also be along this axis mostly; here "left of" may be far below as well,
    as it may in the scenes, whose captions name one relation of two that hold.
    """
    (first_x, first_y), (second_x, second_y) = first.center, second.center
    right, down = first_x - second_x, first_y - second_y
    offset = {"left of": -right, "right of": right, "above": -down, "below": down}[relation]
    sizes = first.width + second.width if relation in ("left of", "right of") else first.height + second.height
    return offset > MIN_OFFSET * sizes


def score(requirement: Requirement, image) -> bool:
    """Does the picture, uint8 (H, W, 3), show what is required? Other things may be there too, but for a count."""
    things = find_things(image)
    groups = [[thing for thing in things if thing.shape == shape and color in ("", thing.color)]
              for shape, color in zip(requirement.shapes, requirement.colors)]
    if requirement.count:
        return len(groups[0]) == requirement.count
    if requirement.relation:
        return any(stands(first, requirement.relation, second) for first in groups[0] for second in groups[1])
    return all(groups)


def success_rates(requirements, images) -> dict:
    """{task: share of pictures that pass, ..., "overall": the mean over the tasks, as in Table 5}."""
    passed = {task: [] for task in TASKS}
    for requirement, image in zip(requirements, images, strict=True):
        passed[requirement.task].append(score(requirement, image))
    rates = {task: float(np.mean(results)) for task, results in passed.items()}
    return {**rates, "overall": float(np.mean(list(rates.values())))}


def geneval(generate, count_per_task: int = 60, seed: int = HELD_OUT_SEED, height: int = 64, width: int = 64) -> dict:
    """Success rates of generate(prompts, first) -> list of uint8 (height, width, 3), called with batches of prompts, of which
    `first` is the number of the first: noise should follow the number, or every batch starts from the same."""
    cases = geneval_cases(count_per_task, seed, height, width)
    prompts = [prompt_of(requirement, scene) for requirement, scene in cases]
    batches = tqdm(range(0, len(prompts), BATCH_SIZE), desc="GenEval", unit="batch", leave=False)
    images = (image for start in batches for image in generate(prompts[start : start + BATCH_SIZE], start))
    return success_rates([requirement for requirement, _ in cases], images)


def geneval_bounds(count_per_task: int = 60, seed: int = HELD_OUT_SEED, height: int = 64, width: int = 64):
    """(ceiling, chance): success rates of the scenes' own drawings, and when each gets the next one's requirement."""
    cases = geneval_cases(count_per_task, seed, height, width)
    requirements, images = [requirement for requirement, _ in cases], [draw_scene(scene) for _, scene in cases]
    n = count_per_task
    moved = [r for start in range(0, len(cases), n) for r in np.roll(requirements[start : start + n], 1)]
    return success_rates(requirements, images), success_rates(moved, images)


def format_scores(scores: dict) -> str:
    """One line: GenEval 0.950 (single object 1.00, ...)."""
    return f"GenEval {scores['overall']:.3f} (" + ", ".join(f"{task} {scores[task]:.2f}" for task in TASKS) + ")"


# ------------------------------------------------------------------------------------------------------------
# The loss curve of a run (Sec. 5.3.3: losses by level of t)
# ------------------------------------------------------------------------------------------------------------

def draw_losses(log: list[dict], size=(720, 440)) -> Image.Image:
    """log lines -> a picture of the loss over steps: the mean (black) and every tenth of t (blue near data to red near
    noise), with their last values."""
    entries = [entry for entry in log if entry.get("loss")] or [{"step": 1, "loss": 1.0, "loss_by_t": [None] * 10}]
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = 50, 16, size[0] - 120, size[1] - 30
    values = [v for entry in entries for v in [entry["loss"], *entry["loss_by_t"]] if v]
    low, high = math.log(max(min(values), 1e-3)), math.log(max(values) * 1.05)
    last_step = max(1, *(entry["step"] for entry in entries))
    place = lambda step, loss: (left + (right - left) * step / last_step,
                                bottom - (bottom - top) * (math.log(max(loss, 1e-3)) - low) / (high - low))
    draw.rectangle((left, top, right, bottom), outline="gray")
    for tick in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5):
        if low < math.log(tick) < high:
            y = place(0, tick)[1]
            draw.line((left, y, right, y), fill="#dddddd")
            draw.text((left - 6, y), f"{tick:g}", fill="black", anchor="rm")
    for i in range(11):
        color = "black" if i == 10 else (round(28 * i), 60, round(255 - 28 * i))
        points = [(entry["step"], entry["loss"] if i == 10 else entry["loss_by_t"][i]) for entry in entries]
        points = [(step, value) for step, value in points if value]
        if points:
            draw.line([place(*point) for point in points], fill=color, width=3 if i == 10 else 1)
            label = "mean" if i == 10 else f"t {i / 10:.1f}-{(i + 1) / 10:.1f}"
            draw.text((right + 8, top + 12 + 16 * i), f"{label}  {points[-1][1]:.3f}", fill=color)
    draw.text((left, bottom + 16), "0", fill="black", anchor="mm")
    draw.text((right, bottom + 16), f"step {last_step}", fill="black", anchor="rm")
    draw.text((left + 6, top + 10), "loss, log scale", fill="gray")
    return image


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------

def parse_options():
    """The command line."""
    parser = argparse.ArgumentParser(description="GenEval's six tasks: ground truth, shuffled captions, and a model")
    parser.add_argument("checkpoint", nargs="?", help="model file, model folder or run folder; none: no model")
    parser.add_argument("--num-prompts", type=int, default=60, help="per task (default 60)")
    parser.add_argument("--guidance-scale", type=float, help="this and the next three: default the checkpoint's own")
    parser.add_argument("--num-steps", type=int)
    parser.add_argument("--height", type=int, help="of the pictures, in pixels (64 without a checkpoint)")
    parser.add_argument("--width", type=int)
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED, help="of the prompts and the noise")
    parser.add_argument("--out", default="results.json")
    options = parser.parse_args()
    if options.num_prompts < 1:
        parser.error(f"--num-prompts is {options.num_prompts}; give 1 or more")
    return options


def main():
    """Score ground truth, shuffled captions and the model, print the table, write it as JSON."""
    from sample import generate, load

    options = parse_options()
    try:
        pipeline = load(options.checkpoint) if options.checkpoint else None
    except CheckpointError as problem:
        sys.exit(str(problem))
    given = {name: value for name, value in vars(options).items() if value is not None}
    size = {side: given.get(side) or (pipeline.defaults[side] if pipeline else 64) for side in ("height", "width")}
    rows = dict(zip(("ground truth", "shuffled"), geneval_bounds(options.num_prompts, options.seed, **size)))
    if pipeline:
        settings = size | {name: given[name] for name in ("guidance_scale", "num_steps") if name in given}

        def pictures(prompts, first):
            drawn = generate(pipeline, prompts, options.seed + first, batch_size=len(prompts), **settings)
            return [np.asarray(picture) for picture in drawn]

        rows[options.checkpoint] = geneval(pictures, options.num_prompts, options.seed, **size)
    print(f"{options.num_prompts:3} prompts a task  " + "  ".join(f"{name:>12}" for name in rows))
    for task in (*TASKS, "overall"):
        print(f"{task:20}" + "  ".join(f"{rates[task]:{max(12, len(name))}.3f}" for name, rates in rows.items()))
    record = {"command": shlex.join(["python", *sys.argv]), **vars(options), **size, "success_rates": rows}
    write_atomically(options.out, lambda partial: partial.write_text(json.dumps(record, indent=1) + "\n"))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
