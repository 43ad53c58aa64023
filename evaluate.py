"""evaluate.py: does it work, in numbers (SD3, arXiv:2403.03206v1, Sec. 5).

Read with   Sec. 5.1 (CLIP score, FID on CLIP features), App. B.3 (losses by t), Table 3 (PSNR),
            Tables 4 and 5 (GenEval; Ghosh et al. 2023), Table 6 (steps), Fig. 9 (`without`)
Not here    making pictures (sample.py), drawing and recognising scenes (scenes.py)
Shapes      B batch   n patches   D hidden_size   image (B, 3, S, S) in [-1, 1] for the image tower;
            pictures to score are uint8 (H, W, 3), and there H W are in pixels
Run         python evaluate.py                  ground truth, and shuffled captions
            python evaluate.py runs/NAME        a model too; runs/NAME/report.html shows all of it
            python evaluate.py runs/NAME --num-steps 5 10 20 50 --guidance-scale 2.5 5    a grid
            python evaluate.py MODEL --prompts FILE --out FOLDER     pictures for a public scorer
"""

import argparse
import base64
import copy
import html
import io
import itertools
import json
import os
import random
import shlex
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import flow
import sample
from checkpoints import (
    CLIP_NAMES, SHIPPED, add_options, check_options, count_layers, find_model_file, given_options,
    open_weights, option, read_json, read_tensors, rename, run_encoders, write_atomically)
from data import ImageFiles, from_tensor, read_lines, to_tensor
from devices import autocast, command
from scenes import (
    HELD_OUT_SEED, PLAIN, REWORDED, WORDS, Scene, Scenes, View, caption, captioned_grid, draw_scene,
    is_held_out, local_max, make_scene, word_mask)
from text_encoders import CLIPLayer

BATCH_SIZE = 64         # prompts or pictures at once

# ---- CLIP's image tower (Sec. 5.1) ---------------------------------------------------------------

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)       # of RGB in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# The names in CLIP's released file -> ours, piece by piece, as in checkpoints.py.
IMAGE_NAMES = {
    "vision_model.embeddings.position_ids": None,      # It holds 0, 1, 2, ...
    "vision_model.embeddings.class_embedding": "class_token",
    "vision_model.embeddings.": "",
    "vision_model.encoder.": "",
    "vision_model.pre_layrnorm.": "pre_norm.",         # They misspelt it.
    "vision_model.post_layernorm.": "post_norm.",
    "visual_projection.": "projection.",
} | CLIP_NAMES


@dataclass(frozen=True)
class CLIPImageConfig:
    """Sizes of an image tower. The defaults are CLIP-L/14, which measures in the paper."""
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
        D, p = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(3, D, p, stride=p, bias=False)
        self.class_token = nn.Parameter(torch.randn(D) / D**0.5)
        self.position_embedding = nn.Embedding(1 + config.num_patches, D)        # class token first
        nn.init.normal_(self.position_embedding.weight, std=D**-0.5)
        self.pre_norm = nn.LayerNorm(D, eps=1e-5)
        self.layers = nn.ModuleList()
        for _ in range(config.num_layers):
            self.layers.append(CLIPLayer(config, causal=False))
        self.post_norm = nn.LayerNorm(D, eps=1e-5)
        self.projection = nn.Linear(D, config.projection_dim, bias=False)
        # What takes CLIP-L's pooled text to the shared space, where the text encoder does not.
        self.register_buffer("text_projection", None)                            # (d, 768)

    def layer_outputs(self, image):
        """The tokens (B, 1 + n, D) after every layer: the class token, then the patches by rows.

        An image of another size is resized, and squeezed if it is not square.
        """
        size = (self.config.image_size, self.config.image_size)
        if image.shape[-2:] != size:
            image = F.interpolate(image, size, mode="bicubic", antialias=True)   # (B, 3, S, S)
        mean = image.new_tensor(CLIP_MEAN).view(3, 1, 1)
        std = image.new_tensor(CLIP_STD).view(3, 1, 1)
        patches = self.patch_embedding(((image + 1) / 2 - mean) / std)           # (B, D, S/p, S/p)
        patches = patches.flatten(2).transpose(1, 2)                             # (B, n, D)
        class_token = self.class_token.expand(len(image), 1, -1)                 # (B, 1, D)
        x = torch.cat([class_token, patches], dim=1)                             # (B, 1 + n, D)
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
        class_token = self.layer_outputs(image)[-1][:, 0]                        # (B, D)
        return self.projection(self.post_norm(class_token))                      # (B, d)


def load_image_tower(place=SHIPPED, name="clip_l") -> CLIPImageEncoder:
    """The image tower in a model's folder, ready to measure, or the real one: `place` is then the
    folder or file of CLIP-L/14 as transformers has it. name: the text encoder that belongs to it.
    Sizes are those of the tensors."""
    file = Path(place) / "clip_image.safetensors"
    if not file.is_file():
        file = find_model_file(place, hub=False)
    entries, _ = open_weights(file)
    ours = f"{name}_image."
    chosen = {}
    for key, entry in entries.items():
        if key.startswith(ours):
            chosen[key.removeprefix(ours)] = entry
        elif key.startswith(("vision_model.", "visual_projection.")):
            chosen[rename(key, IMAGE_NAMES)] = entry
    chosen.pop(None, None)
    if "projection.weight" not in chosen:
        raise ValueError(f"{file} holds no image tower for {name}; give a file of make_tiny.py, or "
                         f"model.safetensors of openai/clip-vit-large-patch14 with --tower")
    tensors = read_tensors(chosen, torch.float32)
    D, _, patch_size, _ = tensors["patch_embedding.weight"].shape
    side = round((len(tensors["position_embedding.weight"]) - 1) ** 0.5)         # in patches
    projection_dim = len(tensors["projection.weight"])
    activation = "quick_gelu" if name == "clip_l" else "gelu"
    config = CLIPImageConfig(side * patch_size, patch_size, D, count_layers(tensors, "layers."),
                             projection_dim, activation)
    tower = CLIPImageEncoder(config)
    tower.load_state_dict(tensors)
    if "text_projection.weight" in entries:
        text = {"weight": entries["text_projection.weight"]}
        tower.text_projection = read_tensors(text, torch.float32)["weight"]
    return tower.eval().requires_grad_(False)


# ---- The measures on its features, and PSNR ------------------------------------------------------

def clip_score(image_features, text_features):
    """Mean cosine of pictures and their captions, both (B, d) (Hessel et al. 2021, unscaled)."""
    return F.cosine_similarity(image_features.float(), text_features.float()).mean()


def frechet_distance(features_a, features_b):
    """Distance of Gaussians fitted to two sets (N, d), (M, d); on CLIP features it is CLIP-FID.

        |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    C_a C_b is not symmetric, but C_a^(1/2) C_b C_a^(1/2) is, and has the same eigenvalues. The
    trace of the root is the sum of their roots. It is biased upwards where N or M is small.
    """
    a, b = features_a.double(), features_b.double()         # eigenvalues of many magnitudes
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} and {len(b)} feature vectors; a covariance needs at least 2")
    cov_a, cov_b = torch.atleast_2d(a.T.cov()), torch.atleast_2d(b.T.cov())                # (d, d)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp_min(0).sqrt()) @ vectors.T                            # (d, d)
    eigenvalues = torch.linalg.eigvalsh(root_a @ cov_b @ root_a)
    cross = eigenvalues.clamp_min(0).sqrt().sum()
    return (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross


def cubic_kernel(x, y):
    """(x y / d + 1)^3 of all pairs: (N, d), (M, d) -> (N, M)."""
    d = x.shape[1]
    return (x @ y.T / d + 1) ** 3


def kernel_distance(features_a, features_b):
    """Kernel distance (KID; Binkowski et al. 2018) of two sets of features (N, d), (M, d).

    The squared maximum mean discrepancy with a cubic kernel. Its estimate is unbiased, so that it
    can be below 0, and small sets are no worse on average.
    """
    a, b = features_a.double(), features_b.double()
    N, M = len(a), len(b)
    if min(N, M) < 2:
        raise ValueError(f"{N} and {M} feature vectors; pairs within a set need at least 2")
    within_a = cubic_kernel(a, a)                           # (N, N); no vector with itself
    within_b = cubic_kernel(b, b)                           # (M, M)
    mean_a = (within_a.sum() - within_a.trace()) / (N * (N - 1))
    mean_b = (within_b.sum() - within_b.trace()) / (M * (M - 1))
    return mean_a + mean_b - 2 * cubic_kernel(a, b).mean()


def psnr(image, reconstruction):
    """Peak signal-to-noise ratio in dB: (B,). Images are in [-1, 1]; the second one is clamped."""
    difference = (image - reconstruction.clamp(-1, 1)) / 2                # in units of [0, 1]
    return -10 * torch.log10(difference.square().mean(dim=(1, 2, 3)).clamp_min(1e-10))


class PictureMeasures:
    """CLIP score, FID and KID of drawn pictures, on the features of an image tower.

    pictures: the real ones; as all pictures here, PIL or uint8 (H, W, 3). captions: what the drawn
    ones should show. text: TextEncoders whose CLIP-L belongs to the tower, with any precision.
    folder: see `load_image_tower`.
    """

    def __init__(self, pictures, captions, text, folder=SHIPPED, device="cpu"):
        if "clip_l" not in text.encoders:
            raise ValueError("a CLIP score needs CLIP-L, and this model has none")
        self.tower = load_image_tower(folder).to(device)
        self.device = device
        self.real = self.features(pictures)                                      # (N, d)
        clip = copy.deepcopy(text.encoders["clip_l"]).float().to(device)         # all in fp32
        ids = text.tokenize(captions, without=("clip_g", "t5"))["clip_l"]        # (M, L)
        rows = []
        with torch.no_grad():
            for part in ids.split(BATCH_SIZE):
                rows.append(clip(part.to(device))[1])
        self.text_features = torch.cat(rows)                                     # (M, d)
        if self.tower.text_projection is not None:
            self.text_features = self.text_features @ self.tower.text_projection.T

    @torch.no_grad()
    def features(self, pictures):
        """N pictures -> (N, d)."""
        rows = []
        for picture in pictures:
            image = to_tensor(np.asarray(picture))[None]                         # (1, 3, H, W)
            rows.append(self.tower(image.to(self.device)))
        return torch.cat(rows)

    def __call__(self, pictures):
        """M pictures, one of each caption -> {"clip_score", "clip_error": the standard error of
        that, "fid", "kid"}."""
        drawn = self.features(pictures)                                          # (M, d)
        if len(drawn) != len(self.text_features):
            raise ValueError(f"{len(drawn)} pictures of {len(self.text_features)} captions")
        cosines = F.cosine_similarity(drawn, self.text_features)                 # (M,)
        return {"clip_score": clip_score(drawn, self.text_features).item(),
                "clip_error": cosines.std().item() / len(cosines) ** 0.5,
                "fid": frechet_distance(drawn, self.real).item(),
                "kid": kernel_distance(drawn, self.real).item()}


# ---- Losses by t (App. B.3) ----------------------------------------------------------------------

@torch.no_grad()
def validation_samples(pipeline, source, count, height, width):
    """Yields (latent, context, pooled, noise) for `flow.validate`, 64 at once: the first `count`
    pictures of a source, each with its last caption and noise that is always the same."""
    rng = torch.Generator().manual_seed(0)
    for first in range(0, count, BATCH_SIZE):
        images = []
        texts = []
        for index in range(first, min(first + BATCH_SIZE, count)):
            images.append(to_tensor(source.image(index, height, width)))
            texts.append(source.captions(index)[-1])
        image = torch.stack(images).to(pipeline.device)                          # (B, 3, H, W)
        with autocast(pipeline.device, pipeline.precision):
            latent = pipeline.vae.encode(image).float()                          # (B, C, H/8, W/8)
            context, pooled = pipeline.text(texts)
        noise = torch.randn(latent.shape, generator=rng).to(latent)
        yield latent, context, pooled, noise


@torch.no_grad()
def assigned_losses(model, samples, precision, levels=8):
    """Losses at t = 0, 1/8, ... 7/8 as MLPerf's text-to-image benchmark takes them: (levels,).

    Each sample has a level of its own, here its number mod 8, and is seen at no other. Differs from
    `flow.validate`, which takes each sample to eight times from 0 to 1. Samples: as there.
    """
    rows = []
    seen = 0
    for latent, context, pooled, noise in samples:
        level = torch.arange(seen, seen + len(latent)) % levels                  # (B,)
        seen += len(latent)
        t = (level / levels).to(latent)                                          # (B,)
        with autocast(latent.device, precision):
            rows.append(flow.rectified_flow_loss(model, latent, context, pooled, t, noise))
    losses = torch.cat(rows).cpu()
    return torch.stack([losses[level::levels].mean() for level in range(levels)])


def losses_by_level(pipeline, source, count, height, width):
    """Both forms: {"validation": the paper's mean, which leaves out t = 1, "validation_by_t": at
    eight times from 0 to 1, "mlperf": MLPerf's mean, "mlperf_by_t": at 0, 1/8, ... 7/8}."""
    samples = list(validation_samples(pipeline, source, count, height, width))
    by_level = flow.validate(pipeline.mmdit, samples, pipeline.precision)
    assigned = assigned_losses(pipeline.mmdit, samples, pipeline.precision)
    return {"validation": by_level[:-1].mean().item(), "validation_by_t": by_level.tolist(),
            "mlperf": assigned.mean().item(), "mlperf_by_t": assigned.tolist()}


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
MAX_REST = 0.004        # share of the pixels that may be foreground for no reason
MIN_WORD_FIT = 0.7      # correlation with a word as it is drawn


@dataclass(frozen=True)
class Case:
    """One question: a prompt, a scene that it describes, and what it says of the things there."""
    task: str
    prompt: str
    scene: Scene
    said: tuple[str, ...]


def suits(scene, kind, said, held_out) -> bool:
    """Can a task ask for this scene? A pair must differ in shapes and in colours. held_out: what
    the prompt says must be a combination that training never draws."""
    if scene.kind != kind:
        return False
    shapes = [thing.shape for thing in scene.things]
    colors = [thing.color for thing in scene.things]
    if kind == "pair" and (len(set(shapes)) == 1 or len(set(colors)) == 1):
        return False
    relation = scene.relation if "relation" in said else ""
    return not held_out or is_held_out(shapes, colors, relation)


def geneval_cases(count_per_task, seed=HELD_OUT_SEED, height=64, width=64, split=SPLITS[0]):
    """list of Case, task by task: the first scenes of the set `seed` that suit, each used once.

    Prompts have the plain wording of training, or are reworded. In the third split they also name
    the colours, and each has a combination that training never draws.
    """
    held_out = split == SPLITS[2]
    forms = REWORDED if split == SPLITS[1] else PLAIN
    cases = {task: [] for task in TASKS}
    index = 0
    while min(map(len, cases.values())) < count_per_task:
        scene = make_scene(seed, index, height, width, held_out=held_out)
        index += 1
        for task in sorted(TASKS, key=lambda name: len(cases[name])):
            kind, said = TASKS[task]
            if held_out:
                said = (*said, "color")
            if suits(scene, kind, said, held_out):
                prompt = caption(scene, said, forms, random.Random(scene.wording))
                cases[task].append(Case(task, prompt, scene, said))
                break
    chosen = []
    for found in cases.values():
        chosen += found[:count_per_task]
    return chosen


def fits(case, things) -> bool:
    """Are the things that were found, in this order, those of the case in all that it says?
    Differs from GenEval: what is "left of" may be even farther below, as it may in the scenes."""
    for thing, wanted in zip(things, case.scene.things):
        for part in {"shape", "color", "size"} & {"shape", *case.said}:
            if getattr(thing, part) != getattr(wanted, part):
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
    """(strict, lax): does the picture, uint8 (H, W, 3), show what the case asks for? Strict: and
    nothing else before an even background. Lax, as GenEval: other things too, but exact counts."""
    view = View(image)
    wanted = case.scene.things
    shapes = {thing.shape for thing in wanted}
    named = [thing for thing in view.things if thing.shape in shapes]
    if "background" in case.said and view.background != case.scene.background:
        return False, False
    lax = False
    for things in itertools.permutations(named[:8], len(wanted)):
        if not fits(case, things):
            continue
        rest = view.rest(things)
        if case.scene.word:
            place = find_word(view, rest, case.scene.word)
            if place is None:
                continue
            rest &= ~place
        lax = lax or case.task != "counting" or len(named) == len(things)
        if rest.mean() <= MAX_REST:
            return True, lax
    return False, lax


@lru_cache(maxsize=16)
def spellings(word, height, width):
    """Masks (n, height * width), of mean 0 and norm 1: the word, the other words of this world, and
    all misspellings with one letter replaced, left out, or behind the next."""
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
    spelling; None if not. Its box is moved to the middle, and up to 2 px further."""
    if not rest.any():
        return None
    H, W = rest.shape
    rows, columns = np.nonzero(rest)
    down = (H - rows.min() - rows.max()) // 2
    right = (W - columns.min() - columns.max()) // 2
    ink, _ = view.ink(rest)
    moved = []
    for shift in itertools.product(range(down - 2, down + 3), range(right - 2, right + 3)):
        moved.append(np.roll(ink, shift, axis=(0, 1)).ravel())
    moved = np.stack(moved) - ink.mean()                                     # (25, H * W)
    fit = (spellings(word, H, W) @ moved.T).max(axis=1) / np.linalg.norm(moved[0])
    if fit.argmax() != 0 or fit[0] < MIN_WORD_FIT:
        return None
    mask = np.roll(word_mask(word, "", H, W), (-down, -right), axis=(0, 1))
    return local_max(mask, view.radius) > 0.5


def wilson(share, n):
    """95 % interval (low, high) of a share that was seen in n cases (Wilson 1927)."""
    z = 1.96
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return max(0.0, middle - reach), min(1.0, middle + reach)


def success_rates(cases, images) -> dict:
    """{"overall": mean of GenEval's six tasks, "overall_lax", "n": pictures of a task,
    "strict": {task: share that passes}, "intervals": of these, 95 %, "lax": {task: share}}."""
    passed = {task: [] for task in TASKS}
    for case, image in zip(cases, images, strict=True):
        passed[case.task].append(score(case, image))
    n = len(cases) // len(TASKS)
    rates = {"overall": 0, "overall_lax": 0, "n": n, "strict": {}, "intervals": {}, "lax": {}}
    for task in TASKS:
        strict, lax = np.mean(passed[task], axis=0).tolist()
        rates["strict"][task] = strict
        rates["intervals"][task] = wilson(strict, n)
        rates["lax"][task] = lax
    for name, column in (("overall", "strict"), ("overall_lax", "lax")):
        rates[name] = sum(rates[column][task] for task in GENEVAL_TASKS) / len(GENEVAL_TASKS)
    return rates


def geneval(draw, count_per_task=60, seed=HELD_OUT_SEED, height=64, width=64, split=SPLITS[0]):
    """Success rates of draw(prompts, first) -> list of uint8 (height, width, 3), which gets batches
    of prompts and the number of the first one: noise should follow that number."""
    cases = geneval_cases(count_per_task, seed, height, width, split)
    prompts = [case.prompt for case in cases]
    images = []
    for first in tqdm(range(0, len(cases), BATCH_SIZE), "GenEval", leave=False):
        images += draw(prompts[first : first + BATCH_SIZE], first)
    return success_rates(cases, images)


def format_scores(scores) -> str:
    """One line: GenEval .950, lax .960 (single object 1.00, ...)."""
    tasks = ", ".join(f"{task} {share:.2f}" for task, share in scores["strict"].items())
    return f"GenEval {scores['overall']:.3f}, lax {scores['overall_lax']:.3f} ({tasks})"


def controls(cases, pipeline=None):
    """Yields (name, pictures, cases): what must score 1, and what must score about 0."""
    truth = [draw_scene(case.scene) for case in cases]
    yield "ground truth", truth, cases
    order = np.random.default_rng(0).permutation(len(cases))
    shuffled = [truth[i] for i in order]
    yield "shuffled captions", shuffled, [cases[i] for i in np.roll(order, 1)]
    if pipeline is None:
        return
    vae = pipeline.vae

    def decode(latent):
        return np.asarray(from_tensor(vae.decode(latent)[0].float().cpu()))

    latents = []
    with torch.no_grad(), autocast(pipeline.device, pipeline.precision):
        for image in truth:
            latents.append(vae.encode(to_tensor(image)[None].to(pipeline.device)).float())
        yield "ground truth through the VAE", list(map(decode, latents)), cases
        rng = torch.Generator().manual_seed(0)
        for scale in (0.5, 1, 2):
            pictures = []
            for latent in latents:                                           # (1, C, H/8, W/8)
                noise = torch.randn(latent.shape, generator=rng).to(latent)
                pictures.append(decode(scale * noise))
            yield f"decoded noise, {scale:g}", pictures, cases


# ---- A model's pictures with one or many settings (Table 6, Fig. 9) ------------------------------

def draw_with(pipeline, seed, **settings):
    """draw(prompts, first) for `geneval`: the first picture starts from the noise of seed + first.
    settings: fields of sample.Settings."""
    def draw(prompts, first):
        pictures = sample.generate(pipeline, prompts, seed + first, len(prompts), **settings)
        return [np.asarray(picture) for picture in pictures]

    return draw


@torch.no_grad()
def draw_paths(pipeline, prompts, seed, **settings):
    """What `sample.generate` draws, and how long the way from noise to each picture was: a list of
    PIL pictures, path lengths (N,)."""
    settings = sample.Settings(**pipeline.defaults | settings)
    shape = sample.latent_shape(pipeline, settings)
    batch_size = min(BATCH_SIZE, max(1, 2**22 // (settings.height * settings.width)))
    pictures = []
    lengths = []
    for first in tqdm(range(0, len(prompts), batch_size), "drawing", leave=False):
        part = prompts[first : first + batch_size]
        noise = torch.empty(len(part), *shape)                               # (B, C, H, W)
        for i in range(len(part)):
            noise[i].normal_(generator=torch.Generator().manual_seed(seed + first + i))
        context, pooled = sample.encode(pipeline, part, settings)
        noise = noise.to(pipeline.device)
        with autocast(pipeline.device, pipeline.precision):
            latents, along = sample.sample_latents(pipeline.mmdit, context, pooled, noise, settings)
            images = pipeline.vae.decode(latents).float().cpu()              # (B, 3, 8H, 8W)
        sample.check_finite(images)
        pictures += map(from_tensor, images)
        lengths.append(along.cpu())
    return pictures, torch.cat(lengths)


def settings_grid(**choices):
    """Every combination of choices, for example num_steps=(5, 50), without=((), ("t5",)): a list of
    settings."""
    combinations = itertools.product(*choices.values())
    return [dict(zip(choices, values)) for values in combinations]


def measure_grid(pipeline, prompts, measure, seed, grid):
    """What `measure`, a PictureMeasures, says of the prompts' pictures with each of the settings.

    grid: from `settings_grid`. Returns a list of {"settings", "clip_score", "clip_error", "fid",
    "kid", "path_length": the mean, "clip_drop"}. The last two are the columns of Table 6: by how
    many per cent the CLIP score is below that of the most steps, with all else equal.
    """
    found = []
    for chosen in grid:
        settings = {"num_steps": pipeline.defaults["num_steps"], **chosen}
        pictures, lengths = draw_paths(pipeline, prompts, seed, **settings)
        numbers = measure(pictures)
        found.append({"settings": settings, **numbers, "path_length": lengths.mean().item()})
    for row in found:
        most_steps = row
        for other in found:
            alike = other["settings"] | {"num_steps": 0} == row["settings"] | {"num_steps": 0}
            if alike and other["settings"]["num_steps"] > most_steps["settings"]["num_steps"]:
                most_steps = other
        row["clip_drop"] = 100 * (1 - row["clip_score"] / most_steps["clip_score"])
    return found


# ---- Pictures for public scorers -----------------------------------------------------------------

def read_prompts(file):
    """A list of {"prompt": ..., and what else the file says of it}. Files are GenEval's .jsonl,
    PartiPrompts' .tsv, or have one prompt a line, as T2I-CompBench's .txt."""
    lines = read_lines(file)
    kind = Path(file).suffix
    columns = []
    first = 1
    if kind == ".tsv" and lines:
        columns = lines.pop(0).lower().split("\t")
        first = 2
    found = []
    for number, line in enumerate(lines, first):
        about = {"prompt": line}
        try:
            if kind == ".jsonl":
                about = json.loads(line)
            if columns:
                about = dict(zip(columns, line.split("\t"), strict=True))
            if not about["prompt"].strip():
                raise ValueError("it is blank")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as problem:
            raise ValueError(f"{file} line {number}: {line[:60]!r} is no prompt ({problem}); mend "
                             f"it or take it out") from None
        found.append(about)
    if not found:
        raise ValueError(f"{file} holds no prompt")
    return found


def draw_prompts(pipeline, prompts, folder, count, seed, settings):
    """Draw `count` pictures of each prompt and keep them as public scorers read them.

    GenEval's reads folder/00000/metadata.jsonl beside folder/00000/samples/0000.png, 0001.png, ...
    T2I-CompBench's reads folder/samples/PROMPT_000000.png. So a list that says no more of a prompt
    than its words becomes the latter. ValueError if there is something in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"--out {folder} is not empty; give a new folder")
    for number, about in enumerate(tqdm(prompts, "prompts")):
        prompt = about["prompt"]
        first = number * count
        pictures = sample.generate(pipeline, [prompt] * count, seed + first, count, **settings)
        words = prompt.replace("/", " ").encode()[:200].decode(errors="ignore")
        alone = len(about) == 1
        place = folder / "samples"
        if not alone:
            place = folder / f"{number:05}" / "samples"
        place.mkdir(parents=True, exist_ok=True)
        if not alone:
            (place.parent / "metadata.jsonl").write_text(json.dumps(about) + "\n")
        for i, picture in enumerate(pictures):
            name = f"{i:04}.png"
            if alone:
                name = f"{words}_{first + i:06}.png"
            picture.save(place / name)


# ---- The report of a run: one HTML file that needs no other --------------------------------------

def html_grid(pictures, texts):
    """A grid of pictures of at most 256 px, four in a row, each above its text: one picture inside
    of the page."""
    small = []
    for picture in pictures:
        small.append(Image.fromarray(np.asarray(picture)))
        small[-1].thumbnail((256, 256))
    content = io.BytesIO()
    captioned_grid(small, texts, 4).save(content, "PNG")
    code = base64.b64encode(content.getvalue()).decode()
    return f'<img src="data:image/png;base64,{code}" alt="">'


def svg_curve(points, across):
    """A curve of (x, y), both above 0, drawn from 0. across: what x is."""
    right = max(x for x, _ in points)
    top = max(y for _, y in points)
    places = ""
    for x, y in points:
        places += f" {600 * x / right:.1f},{200 - 200 * y / top:.1f}"
    return (f'<svg viewBox="-60 -20 720 250" width="720"><path d="M0 0 V200 H600" fill="none" '
            f'stroke="gray"/><polyline points="{places}" fill="none" stroke="black"/>'
            f'<text x="-55" y="8">{top:.3f}</text><text x="-20" y="205">0</text>'
            f'<text x="560" y="220">{right:g}</text><text x="290" y="220">{across}</text></svg>')


def log_curve(file, name):
    """The points (step, value) that a run's log.jsonl has of a loss; none without a log."""
    points = []
    if not file.is_file():
        return points
    for line in read_lines(file):
        entry = json.loads(line)
        if entry.get(name) is not None:
            points.append((entry["step"], entry[name]))
    return points


def nearest_pictures(pictures, measure, training):
    """Each picture, then the three of up to 512 training pictures whose features have the highest
    cosines with its own: pictures, texts."""
    height, width = np.asarray(pictures[0]).shape[:2]
    known = []
    for index in range(min(512, len(training))):
        known.append(training.image(index, height, width))
    known_features = F.normalize(measure.features(known), dim=1)                 # (N, d)
    features = F.normalize(measure.features(pictures), dim=1)                    # (M, d)
    cosines, places = (features @ known_features.T).topk(3, dim=1)               # (M, 3)
    shown = []
    texts = []
    for i, picture in enumerate(pictures):
        shown.append(picture)
        texts.append("drawn")
        for cosine, place in zip(cosines[i].tolist(), places[i].tolist()):
            shown.append(known[place])
            texts.append(f"{cosine:.3f} {training.captions(place)[-1]}")
    return shown, texts


def write_report(file, record, pictures, prompts, measure, training):
    """One page: what was printed, curves, pictures, and what resembles a training picture."""
    drawn = measure.features(pictures)                                           # (M, d)
    cosines = F.cosine_similarity(drawn, measure.text_features[: len(drawn)])    # (M,)
    best_first = cosines.argsort(descending=True).tolist()
    title = html.escape(record["checkpoint"])
    printed = html.escape("\n".join(record["printed"]))
    by_t = list(zip(np.linspace(0, 1, 8), record["losses"]["validation_by_t"]))
    parts = [f'<!DOCTYPE html><meta charset="utf-8"><title>{title}</title>',
             f'<body style="font: 15px sans-serif; margin: 2em"><h1>{title}</h1>',
             f'<pre style="font-size: 11px; overflow: auto">{printed}</pre>',
             "<h2>Loss of unseen pictures by t</h2>", svg_curve(by_t, "t")]
    for name in ("loss", "validation"):
        points = log_curve(file.with_name("log.jsonl"), name)
        if points:
            parts += [f"<h2>{name} by step</h2>", svg_curve(points, "step")]
    shown = {"Pictures": range(min(24, len(pictures))), "Best prompts": best_first[:8],
             "Worst prompts": best_first[-8:]}
    for name, numbers in shown.items():
        texts = [f"{cosines[i]:.3f} {prompts[i]}" for i in numbers]
        parts.append(f"<h2>{name}, each with the cosine of picture and prompt</h2>")
        parts.append(html_grid([pictures[i] for i in numbers], texts))
    parts.append("<h2>Nearest training pictures, with cosines</h2>")
    parts.append(html_grid(*nearest_pictures(pictures[:8], measure, training)))
    page = partial(Path.write_text, data="\n".join(parts), encoding="utf-8")
    write_atomically(file, page)


# ---- Command line --------------------------------------------------------------------------------

@dataclass(frozen=True)
class Options:
    """What the command line takes beside the checkpoint. Where nothing is given, it decides. Lists
    of settings are combined: each combination is drawn and measured."""
    num_prompts: int = option(60, "prompts for each task", 1, 10**5)
    num_pictures: int = option(256, "for the losses, CLIP score, FID and KID", 8, 10**6)
    guidance_scale: tuple[float, ...] = option((), "one or more; none: the model's own", 0, 100)
    num_steps: tuple[int, ...] = option((), "of the solver, one or more", 1, 1000)
    timestep_shift: tuple[float, ...] = option((), "alpha of Eq. 23, one or more", 0.01, 100)
    without: tuple[str, ...] = option((), "encoders to leave out, for example none t5 clip_l+t5")
    height: int = option(0, "of the pictures in px; 0: the model's own, or 64", 0, 4096)
    width: int = option(0, "of the pictures in px; 0: the model's own, or 64", 0, 4096)
    seed: int = option(HELD_OUT_SEED, "of the prompts and the noise", 0, 2**31)
    data: str = option("", "captioned pictures to measure on, in place of scenes and GenEval")
    tower: str = option("", "folder or file of CLIP's image tower, if not beside the encoders")
    prompts: str = option("", "a file of prompts: only draw them, into the folder --out")
    per_prompt: int = option(4, "pictures of each of --prompts", 1, 1000)
    out: str = option("out/evaluation.json", "a file for all the numbers")

    def __post_init__(self):
        check_options(self)

    def grid(self):
        """The combinations of settings that are asked for."""
        choices = {}
        for name in ("guidance_scale", "num_steps", "timestep_shift"):
            if getattr(self, name):
                choices[name] = getattr(self, name)
        if self.without:
            choices["without"] = []
            for text in self.without:
                left_out = () if text == "none" else tuple(text.split("+"))
                choices["without"].append(left_out)
        return settings_grid(**choices)


def describe(settings) -> str:
    """Settings in words."""
    words = []
    for name, value in settings.items():
        if name == "without":
            value = "+".join(value) or "none"
        words.append(f"{name} {value}")
    return ", ".join(words) or "training wording"


def rows(pipeline, options, size):
    """Yields (name, success rates) of all controls and of the model with each of the settings. A
    single one is asked for all splits."""
    cases = geneval_cases(options.num_prompts, options.seed, *size)
    for name, images, asked in controls(cases, pipeline):
        yield name, success_rates(asked, images)
    if pipeline is None:
        return
    grid = options.grid()
    untrained = copy.copy(pipeline)
    untrained.mmdit = copy.deepcopy(pipeline.mmdit)
    untrained.mmdit.initialize(torch.Generator().manual_seed(0))
    models = [("untrained", untrained, grid[0], SPLITS[0])]
    for settings in grid:
        models.append((f"model, {describe(settings)}", pipeline, settings, SPLITS[0]))
    if len(grid) == 1:
        models.append((f"model, {SPLITS[1]}", pipeline, grid[0], SPLITS[1]))
        models.append((f"model, {SPLITS[2]}", pipeline, grid[0], SPLITS[2]))
    for name, model, settings, split in models:
        draw = draw_with(model, options.seed, **settings)
        yield name, geneval(draw, options.num_prompts, options.seed, *size, split)


def score_lines(name, rates):
    """A row of shares, and a row of their 95 % intervals, each as one text."""
    shares = f"{name:40}  {rates['overall']:.3f}  {rates['overall_lax']:.3f}"
    intervals = f"{'':54}"
    for task, share in rates["strict"].items():
        low, high = rates["intervals"][task]
        width = max(9, len(task))
        shares += f"  {share:{width}.3f}"
        intervals += f"  {f'{low:.2f}-{high:.2f}':>{width}}"
    return [shares, intervals]


def measure_lines(record):
    """The losses, and a row of numbers for each of the settings, each as one text."""
    losses = record["losses"]
    by_t = " ".join(f"{loss:.4f}" for loss in losses["validation_by_t"])
    lines = [f"losses of unseen pictures at eight t from 0 to 1: {by_t}",
             f"their mean without t = 1: {losses['validation']:.4f}",
             f"mean at t = 0, 1/8, ... 7/8 in MLPerf's form: {losses['mlperf']:.4f}",
             f"{'':40}  CLIP score (95 %)   lower by     FID      KID  path length"]
    for row in record["measures"]:
        score = f"{row['clip_score']:.4f} +- {1.96 * row['clip_error']:.4f}"
        lines.append(f"{describe(row['settings']):40}  {score}  {row['clip_drop']:7.2f} %  "
                     f"{row['fid']:6.3f}  {row['kid']:7.4f}  {row['path_length']:11.2f}")
    return lines


def note(record, lines):
    """Prints what is new, and stores all that is known."""
    print(*lines, sep="\n")
    record["printed"] += lines
    text = json.dumps(record, indent=1) + "\n"
    write_atomically(record["out"], partial(Path.write_text, data=text))


def reference(pipeline, options, size):
    """What a model is measured with: (unseen pictures, their captions, PictureMeasures of these,
    pictures of its training). Scenes, or --data. ValueError for what is missing."""
    file = pipeline.parts.file
    seed = 0
    named = run_encoders(file.parent)
    if named:                                                # a run
        file = named[0]
        stored = read_json(pipeline.parts.file.with_name("config.json"))["train"]
        seed = stored["seed"]
        if stored["data"] and not options.data:
            print(f"note: this model was trained on {stored['data']}, and scenes are new to it; "
                  f"--data measures on other pictures", file=sys.stderr)
    unseen = Scenes(options.num_pictures, HELD_OUT_SEED)
    training = Scenes(512, seed)
    if options.data:
        unseen = training = ImageFiles(options.data)
    if len(unseen) < 8:
        raise ValueError(f"--data {options.data} holds {len(unseen)} pictures; give at least 8")
    real = []
    captions = []
    for index in range(min(options.num_pictures, len(unseen))):
        real.append(unseen.image(index, *size))
        captions.append(unseen.captions(index)[-1])
    tower = options.tower or file.parent
    measure = PictureMeasures(real, captions, pipeline.text, tower, pipeline.device)
    return unseen, captions, measure, training


def measure_model(record, pipeline, options, size, unseen, captions, measure, training):
    """Losses, CLIP score, FID, KID and path lengths; then the report."""
    grid = options.grid()
    record["losses"] = losses_by_level(pipeline, unseen, len(captions), *size)
    record["measures"] = measure_grid(pipeline, captions, measure, options.seed, grid)
    note(record, measure_lines(record))
    pictures, _ = draw_paths(pipeline, captions[:64], options.seed, **grid[0])
    file = pipeline.parts.file.with_name("report.html")
    if not file.with_name("log.jsonl").is_file():            # no run
        file = Path(options.out).with_name("report.html")
    write_report(file, record, pictures, captions, measure, training)
    print(f"{file} shows all of it")


def main():
    """Scores ground truth, the controls and a model; prints tables, writes JSON and a report."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", nargs="?", help="a model as for sample.py; none: no model")
    add_options(parser, Options)
    arguments = parser.parse_args()
    options = Options(**given_options(arguments, Options))
    grid = options.grid()
    prompts = read_prompts(options.prompts) if options.prompts else []
    out = Path(options.out)
    if prompts and (len(grid) > 1 or not arguments.checkpoint or out.suffix == ".json"):
        raise ValueError("--prompts takes a model, one value of each setting, and --out FOLDER")
    out.parent.mkdir(parents=True, exist_ok=True)
    writable = os.access(out if out.exists() else out.parent, os.W_OK)
    if not prompts and (out.is_dir() or not writable):
        raise ValueError(f"--out {out} cannot be written; give the name of a file")
    size = (options.height or 64, options.width or 64)
    pipeline = None
    if arguments.checkpoint:
        pipeline = sample.load(arguments.checkpoint)
        pipeline.defaults["height"] = options.height or pipeline.defaults["height"]
        pipeline.defaults["width"] = options.width or pipeline.defaults["width"]
        size = (pipeline.defaults["height"], pipeline.defaults["width"])
        for settings in grid:                                # ValueError before the work
            sample.latent_shape(pipeline, sample.Settings(**pipeline.defaults | settings))
    if prompts:
        return draw_prompts(pipeline, prompts, out, options.per_prompt, options.seed, grid[0])
    if pipeline:
        material = reference(pipeline, options, size)
    record = {"command": shlex.join(["python", *sys.argv]), "checkpoint": arguments.checkpoint,
              **asdict(options), "height": size[0], "width": size[1], "rows": {}, "printed": []}
    if not options.data:
        head = "  ".join(f"{task:>9}" for task in TASKS)
        title = f"{options.num_prompts} prompts a task, 95 % intervals"
        note(record, [f"{title:40} strict    lax  {head}"])
        for name, rates in rows(pipeline, options, size):
            record["rows"][name] = rates
            note(record, score_lines(name, rates))
    if pipeline:
        measure_model(record, pipeline, options, size, *material)
    print(f"written to {out}, with lax shares and 95 % intervals for each task")


if __name__ == "__main__":
    command(main)
