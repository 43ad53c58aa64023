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
from dataclasses import asdict, dataclass, replace
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
    CLIP_NAMES, SHIPPED, count_layers, find_model_file, open_weights, read_tensors, rename,
    run_encoders)
from data import ImageFiles, from_tensor, read_lines, to_tensor
from devices import autocast, command
from options import (
    add_options, check_options, given_options, option, read_json, write_atomically, write_json)
from scenes import (
    HELD_OUT_SEED, PLAIN, REWORDED, WORDS, Scene, Scenes, View, caption, captioned_grid, draw_scene,
    is_held_out, local_max, make_scene, word_mask)
from text_encoders import CLIPLayer

BATCH_SIZE = 64         # prompts or pictures at once

# ---- CLIP's image tower (Sec. 5.1) ---------------------------------------------------------------
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)       # of RGB in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGE_NAMES = {                                        # The released file's names -> ours.
    "vision_model.embeddings.position_ids": None,      # It holds 0, 1, 2, ...
    "vision_model.embeddings.class_embedding": "class_token",
    "vision_model.embeddings.": "",
    "vision_model.encoder.": "",
    "vision_model.pre_layrnorm.": "pre_norm.",         # They misspelt it.
    "vision_model.post_layernorm.": "post_norm.",
    "visual_projection.": "projection."} | CLIP_NAMES


@dataclass(frozen=True)
class CLIPImageConfig:
    """Sizes of an image tower. The defaults are CLIP-L/14, which measures in the paper."""
    image_size: int = 224              # pixels per side; other images are resized
    patch_size: int = 14               # pixels per token side
    hidden_size: int = 1024
    num_layers: int = 24
    projection_dim: int = 768          # of the space shared with text
    activation: str = "quick_gelu"


class CLIPImageEncoder(nn.Module):
    """image (B, 3, S, S) in [-1, 1] -> features (B, projection_dim), not normalised."""

    def __init__(self, config=CLIPImageConfig()):
        super().__init__()
        self.config = config
        D = config.hidden_size
        p = config.patch_size
        n = (config.image_size // p) ** 2                                        # 256 for CLIP-L/14
        self.patch_embedding = nn.Conv2d(3, D, p, stride=p, bias=False)
        self.class_token = nn.Parameter(torch.randn(D) / D**0.5)
        self.position_embedding = nn.Embedding(1 + n, D)                         # class token first
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
        """The tokens (B, 1 + n, D) after every layer: the class token, then the patches by rows."""
        size = self.config.image_size
        if image.shape[-2:] != (size, size):
            image = F.interpolate(image, (size, size), mode="bicubic", antialias=True)
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


def load_image_tower(place=SHIPPED):
    """The image tower in a model's folder, or the released CLIP-L/14: `place` is then its folder or
    file. Sizes are those of the tensors."""
    file = Path(place) / "clip_image.safetensors"
    if not file.is_file():
        file = find_model_file(place, hub=False)
    chosen = {}
    for key, entry in open_weights(file)[0].items():
        if key.startswith("clip_l_image."):
            chosen[key.removeprefix("clip_l_image.")] = entry
        elif key.startswith(("vision_model.", "visual_projection.")):
            chosen[rename(key, IMAGE_NAMES)] = entry
        elif key == "text_projection.weight":
            chosen["text_projection"] = entry
    chosen.pop(None, None)
    if "projection.weight" not in chosen:
        raise ValueError(f"{file} holds no image tower for clip_l; give a file of make_tiny.py, or "
                         f"model.safetensors of openai/clip-vit-large-patch14 with --tower")
    tensors = read_tensors(chosen, torch.float32)
    D, _, patch_size, _ = tensors["patch_embedding.weight"].shape
    side = round((len(tensors["position_embedding.weight"]) - 1) ** 0.5)         # in patches
    config = CLIPImageConfig(side * patch_size, patch_size, D, count_layers(tensors, "layers."),
                             len(tensors["projection.weight"]))
    tower = CLIPImageEncoder(config)
    text_projection = tensors.pop("text_projection", None)
    tower.load_state_dict(tensors)
    tower.text_projection = text_projection
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
    a = features_a.double()                                 # eigenvalues of many magnitudes
    b = features_b.double()
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} and {len(b)} feature vectors; a covariance needs at least 2")
    cov_a = torch.atleast_2d(a.T.cov())                                          # (d, d)
    cov_b = torch.atleast_2d(b.T.cov())                                          # (d, d)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp_min(0).sqrt()) @ vectors.T                  # (d, d)
    eigenvalues = torch.linalg.eigvalsh(root_a @ cov_b @ root_a)
    cross = eigenvalues.clamp_min(0).sqrt().sum()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    return shift + cov_a.trace() + cov_b.trace() - 2 * cross


def kernel_distance(features_a, features_b):
    """Kernel distance (KID; Binkowski et al. 2018) of two sets of features (N, d), (M, d).

    It is the squared maximum mean discrepancy with the kernel (x y / d + 1)^3. The estimate is
    unbiased: it can be below 0, and small sets are no worse on average.
    """
    N, d = features_a.shape
    M = len(features_b)
    if min(N, M) < 2:
        raise ValueError(f"{N} and {M} feature vectors; pairs within a set need at least 2")
    both = torch.cat([features_a, features_b]).double()
    kernel = (both @ both.T / d + 1) ** 3                                        # (N + M, N + M)
    between = kernel[:N, N:].mean()
    kernel.fill_diagonal_(0)                                # No vector is paired with itself.
    within_a = kernel[:N, :N].sum() / (N * (N - 1))
    within_b = kernel[N:, N:].sum() / (M * (M - 1))
    return within_a + within_b - 2 * between


def psnr(image, reconstruction):
    """Peak signal-to-noise ratio in dB: (B,). Images are in [-1, 1]; the second one is clamped."""
    difference = (image - reconstruction.clamp(-1, 1)) / 2                # in units of [0, 1]
    return -10 * torch.log10(difference.square().mean(dim=(1, 2, 3)).clamp_min(1e-10))


class PictureMeasures:
    """CLIP score, FID and KID of drawn pictures, on the features of an image tower.
    pictures: the real ones; as all pictures here, PIL or uint8 (H, W, 3). captions: what the drawn
    ones should show. text: TextEncoders whose CLIP-L belongs to the tower in `folder`."""

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
            image = to_tensor(picture)[None].to(self.device)                     # (1, 3, H, W)
            rows.append(self.tower(image))
        return torch.cat(rows)

    def __call__(self, pictures):
        """M pictures, one of each caption. clip_error: the standard error of the CLIP score."""
        drawn = self.features(pictures)                                          # (M, d)
        if len(drawn) != len(self.text_features):
            raise ValueError(f"{len(drawn)} pictures of {len(self.text_features)} captions")
        cosines = F.cosine_similarity(drawn, self.text_features)                 # (M,)
        return {"clip_score": cosines.mean().item(),
                "clip_error": cosines.std().item() / len(cosines) ** 0.5,
                "fid": frechet_distance(drawn, self.real).item(),
                "kid": kernel_distance(drawn, self.real).item()}


# ---- Losses by t (App. B.3) ----------------------------------------------------------------------
@torch.no_grad()
def assigned_losses(model, samples, precision, levels=8):
    """Losses at t = 0, 1/8, ... 7/8 as MLPerf's text-to-image benchmark takes them: (levels,).
    Differs from `flow.validate`: each sample is seen at a single level, here its number mod 8."""
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


@torch.no_grad()
def losses_by_level(pipeline, source, count, height, width):
    """Losses of the first `count` pictures of a source, each with its last caption and noise that
    is always the same. Both forms, by t and as a mean; the paper's mean leaves out t = 1."""
    rng = torch.Generator().manual_seed(0)
    samples = []
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
        samples.append((latent, context, pooled, noise))
    by_t = flow.validate(pipeline.mmdit, samples, pipeline.precision)
    mlperf = assigned_losses(pipeline.mmdit, samples, pipeline.precision)
    return {"validation": by_t[:-1].mean().item(), "validation_by_t": by_t.tolist(),
            "mlperf": mlperf.mean().item(), "mlperf_by_t": mlperf.tolist()}


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
        if scene.kind == "pair" and (shapes[0] == shapes[1] or colors[0] == colors[1]):
            continue
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


def fits(case, things) -> bool:
    """Are the things that were found, in this order, those of the case in all that it says?
    Differs from GenEval: what is "left of" may be even farther below, as it may in the scenes."""
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
    rates["overall"] = sum(rates["strict"][task] for task in GENEVAL_TASKS) / 6
    rates["overall_lax"] = sum(rates["lax"][task] for task in GENEVAL_TASKS) / 6
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
    """One line: GenEval 0.950, lax 0.960 (single object 1.00 in 0.94-1.00, ...)."""
    tasks = []
    for task, share in scores["strict"].items():
        low, high = scores["intervals"][task]
        tasks.append(f"{task} {share:.2f} in {low:.2f}-{high:.2f}")
    return f"GenEval {scores['overall']:.3f}, lax {scores['overall_lax']:.3f} ({', '.join(tasks)})"


def controls(cases, pipeline=None):
    """Yields (name, pictures, cases): what must score 1, and what must score about 0."""
    truth = [draw_scene(case.scene) for case in cases]
    yield "ground truth", truth, cases
    order = np.random.default_rng(0).permutation(len(cases))
    asked = [cases[i] for i in np.roll(order, 1)]
    yield "shuffled captions", [truth[i] for i in order], asked
    if pipeline is None:
        return
    rng = torch.Generator().manual_seed(0)
    for name, scale in (("ground truth through the VAE", 0), ("decoded noise, 0.5", 0.5),
                        ("decoded noise, 1", 1), ("decoded noise, 2", 2)):
        pictures = []
        for image in truth:
            image = to_tensor(image)[None].to(pipeline.device)               # (1, 3, H, W)
            with torch.no_grad(), autocast(pipeline.device, pipeline.precision):
                latent = pipeline.vae.encode(image).float()                  # (1, C, H/8, W/8)
                if scale > 0:
                    latent = scale * torch.randn(latent.shape, generator=rng).to(latent)
                pictures.append(np.asarray(from_tensor(pipeline.vae.decode(latent)[0])))
        yield name, pictures, cases


# ---- A model's pictures with one or many settings (Table 6, Fig. 9) ------------------------------
def draw_with(pipeline, seed, **settings):
    """draw(prompts, first) for `geneval`: the first picture starts from the noise of seed + first.
    settings: fields of sample.Settings."""
    def draw(prompts, first):
        pictures = sample.generate(pipeline, prompts, seed + first, len(prompts), **settings)
        return list(map(np.asarray, pictures))

    return draw


@torch.no_grad()
def draw_paths(pipeline, prompts, seed, **settings):
    """What `sample.generate` draws, a list of PIL pictures, and path lengths (N,) from noise."""
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
        noise = noise.to(pipeline.device)
        context, pooled = sample.encode(pipeline, part, settings)
        with autocast(pipeline.device, pipeline.precision):
            latents, along = sample.sample_latents(pipeline.mmdit, context, pooled, noise, settings)
            images = pipeline.vae.decode(latents).float().cpu()              # (B, 3, 8H, 8W)
        sample.check_finite(images)
        pictures += map(from_tensor, images)
        lengths.append(along.cpu())
    return pictures, torch.cat(lengths)


def settings_grid(**choices):
    """All combinations of choices, for example num_steps=(5, 50), without=((), ("t5",)): a list."""
    combinations = itertools.product(*choices.values())
    return [dict(zip(choices, values)) for values in combinations]


def measure_grid(pipeline, prompts, measure, seed, grid):
    """What `measure`, a PictureMeasures, says of the prompts' pictures with each of the settings.
    Each row also has the columns of Table 6: the mean "path_length", and "clip_drop", by how many
    per cent the CLIP score is below that of the most steps, with all else equal."""
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


def draw_prompts(pipeline, prompts, folder, count, seed, settings):
    """Draw `count` pictures of each prompt. GenEval's scorer reads folder/00000/metadata.jsonl and
    folder/00000/samples/0000.png; T2I-CompBench's reads folder/samples/PROMPT_000000.png, which is
    written for prompts of which the file says no more than their words."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"--out {folder} is not empty; give a new folder")
    for number, about in enumerate(tqdm(prompts, "prompts")):
        first = number * count
        words = about["prompt"].replace("/", " ").encode()[:200].decode(errors="ignore")
        texts = [about["prompt"]] * count
        place = folder / "samples"
        if len(about) > 1:
            place = folder / f"{number:05}" / "samples"
        place.mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(sample.generate(pipeline, texts, seed + first, **settings)):
            name = f"{words}_{first + i:06}.png" if len(about) == 1 else f"{i:04}.png"
            picture.save(place / name)
        if len(about) > 1:
            (place.parent / "metadata.jsonl").write_text(json.dumps(about) + "\n")


# ---- The report of a run: one HTML file that needs no other --------------------------------------
def html_grid(title, pictures, texts):
    """A heading, and one picture inside of the page: pictures, four in a row, above their texts."""
    small = []
    for picture in pictures:
        small.append(Image.fromarray(np.asarray(picture)))
        small[-1].thumbnail((256, 256))
    content = io.BytesIO()
    captioned_grid(small, texts, 4).save(content, "PNG")
    code = base64.b64encode(content.getvalue()).decode()
    return f'<h2>{title}</h2><img src="data:image/png;base64,{code}" alt="">\n'


def svg_curve(title, points):
    """A heading, and a curve of (x, y), both above 0, drawn from 0."""
    right, top = np.max(points, axis=0)
    places = ""
    for x, y in points:
        places += f" {600 * x / right:.1f},{200 - 200 * y / top:.1f}"
    return (f'<h2>{title}: from 0 to {right:g}, values from 0 to {top:.3f}</h2>'
            f'<svg width="600" height="200" style="background: #eee">'
            f'<polyline points="{places}" fill="none" stroke="black"/></svg>\n')


def nearest_pictures(pictures, measure, training):
    """Each picture, then the three of up to 512 training pictures whose features have the highest
    cosines with its own: pictures, texts."""
    height, width = np.asarray(pictures[0]).shape[:2]
    known = []
    for index in range(min(512, len(training))):
        known.append(training.image(index, height, width))
    features = measure.features(known)                                           # (N, d)
    shown = []
    texts = []
    for picture in pictures:
        cosines = F.cosine_similarity(measure.features([picture]), features)     # (N,)
        shown.append(picture)
        texts.append("drawn")
        for place in cosines.topk(3).indices.tolist():
            shown.append(known[place])
            texts.append(f"{cosines[place]:.3f} {training.captions(place)[-1]}")
    return shown, texts


def write_report(file, record, pictures, prompts, measure, training):
    """One page: what was printed, curves, pictures, and what resembles a training picture."""
    title = html.escape(record["checkpoint"])
    printed = html.escape("\n".join(record["printed"]))
    page = (f'<!DOCTYPE html><meta charset="utf-8"><title>{title}</title>'
            f'<body style="font: 15px sans-serif; margin: 2em"><h1>{title}</h1>'
            f'<pre style="overflow: auto">{printed}</pre>\n')
    by_t = list(zip(np.linspace(0, 1, 8), record["losses"]["validation_by_t"]))
    page += svg_curve("Loss of unseen pictures by t", by_t)
    log = file.with_name("log.jsonl")
    if log.is_file():                                        # a run
        entries = list(map(json.loads, read_lines(log)))
        for name in ("loss", "validation"):
            points = [(entry["step"], entry[name]) for entry in entries if entry.get(name)]
            if points:
                page += svg_curve(f"{name} by step", points)
    drawn = measure.features(pictures)                                           # (M, d)
    cosines = F.cosine_similarity(drawn, measure.text_features[: len(drawn)])    # (M,)
    best_first = cosines.argsort(descending=True).tolist()
    for name, numbers in (("Best prompts", best_first[:8]), ("Worst prompts", best_first[-8:]),
                          ("Pictures", range(min(24, len(pictures))))):
        texts = [f"{cosines[i]:.3f} {prompts[i]}" for i in numbers]
        page += html_grid(f"{name}, with cosines", [pictures[i] for i in numbers], texts)
    nearest, texts = nearest_pictures(pictures[:8], measure, training)
    page += html_grid("Nearest training pictures, with cosines", nearest, texts)
    write_atomically(file, partial(Path.write_text, data=page, encoding="utf-8"))


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

    __post_init__ = check_options

    def grid(self):
        """The combinations of settings that are asked for."""
        choices = {}
        for name in ("guidance_scale", "num_steps", "timestep_shift"):
            if getattr(self, name):
                choices[name] = getattr(self, name)
        for text in self.without:
            left_out = () if text == "none" else tuple(text.split("+"))
            choices.setdefault("without", []).append(left_out)
        return settings_grid(**choices)


def note(record, *lines):
    """Prints what is new, and stores all that is known. So what was measured is kept on a stop."""
    record["printed"] += lines
    write_json(record["out"], record)
    for line in lines:
        print(line)


def geneval_rows(pipeline, options, size):
    """Yields (name, success rates) of all controls and of the model with each of the settings. A
    single one is asked for all splits."""
    cases = geneval_cases(options.num_prompts, options.seed, *size)
    for name, images, asked in controls(cases, pipeline):
        yield name, success_rates(asked, images)
    if pipeline is None:
        return
    grid = options.grid()
    ask = partial(geneval, count_per_task=options.num_prompts, seed=options.seed, height=size[0],
                  width=size[1])
    untrained = replace(pipeline, mmdit=copy.deepcopy(pipeline.mmdit))
    untrained.mmdit.initialize(torch.Generator().manual_seed(0))
    yield "untrained", ask(draw_with(untrained, options.seed, **grid[0]))
    for settings in grid:
        yield f"model, {settings or SPLITS[0]}", ask(draw_with(pipeline, options.seed, **settings))
    if len(grid) == 1:
        for split in SPLITS[1:]:
            draw = draw_with(pipeline, options.seed, **grid[0])
            yield f"model, {split}", ask(draw, split=split)


def sources(pipeline, options, size):
    """(unseen pictures, their captions, PictureMeasures of them, pictures of the training): scenes,
    or those of --data."""
    folder = pipeline.parts.file.parent
    tower = options.tower or folder
    training = Scenes(512)
    encoders = run_encoders(folder)
    if encoders:                                             # The folder is that of a run.
        tower = options.tower or encoders.parent
        config = read_json(folder / "config.json")["train"]
        training = Scenes(512, config["seed"])
        if config["data"] and not options.data:
            print(f"note: scenes are new to this model; {config['data']} trained it; see --data",
                  file=sys.stderr)
    unseen = Scenes(options.num_pictures, HELD_OUT_SEED)
    if options.data:
        unseen = training = ImageFiles(options.data)
    if len(unseen) < 8:
        raise ValueError(f"--data {options.data} holds {len(unseen)} pictures; give at least 8")
    pictures = []
    captions = []
    for index in range(min(options.num_pictures, len(unseen))):
        pictures.append(unseen.image(index, *size))
        captions.append(unseen.captions(index)[-1])
    measure = PictureMeasures(pictures, captions, pipeline.text, tower, pipeline.device)
    return unseen, captions, measure, training


def main():
    """Scores ground truth, the controls and a model; prints tables, writes JSON and a report."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", nargs="?", help="a model as for sample.py; none: no model")
    add_options(parser, Options)
    arguments = parser.parse_args()
    options = Options(**given_options(arguments, Options))
    grid = options.grid()
    out = Path(options.out)
    pipeline = None
    size = (options.height or 64, options.width or 64)
    if arguments.checkpoint:
        pipeline = sample.load(arguments.checkpoint)
        defaults = pipeline.defaults
        size = (options.height or defaults["height"], options.width or defaults["width"])
        defaults["height"], defaults["width"] = size
        for settings in grid:                                # ValueError before the work
            sample.latent_shape(pipeline, sample.Settings(**defaults | settings))
    if options.prompts:
        prompts = read_prompts(options.prompts)
        if pipeline is None or len(grid) > 1 or out.suffix == ".json":
            raise ValueError("--prompts takes a model, one value of each setting, and --out FOLDER")
        draw_prompts(pipeline, prompts, out, options.per_prompt, options.seed, grid[0])
        return
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; give the name of a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {"command": shlex.join(["python", *sys.argv]), "checkpoint": arguments.checkpoint,
              **asdict(options), "height": size[0], "width": size[1], "rows": {}, "printed": []}
    if not os.access(out if out.exists() else out.parent, os.W_OK):          # before the work
        raise OSError(f"--out {out} cannot be written; give another file")
    if pipeline:
        unseen, captions, measure, training = sources(pipeline, options, size)
    if not options.data:
        note(record, f"{options.num_prompts} prompts a task, strict scores with 95 % intervals")
        for name, rates in geneval_rows(pipeline, options, size):
            record["rows"][name] = rates
            note(record, f"{name:32} {format_scores(rates)}")
    if pipeline:
        losses = losses_by_level(pipeline, unseen, len(captions), *size)
        record["losses"] = losses
        for name, value in losses.items():
            note(record, f"{name} loss of unseen pictures: {np.round(value, 4)}")
        record["measures"] = measure_grid(pipeline, captions, measure, options.seed, grid)
        for row in record["measures"]:
            note(record, f"{row['settings']}: CLIP score {row['clip_score']:.4f} "
                         f"+- {1.96 * row['clip_error']:.4f} (95 %), lower by "
                         f"{row['clip_drop']:.2f} %, FID {row['fid']:.3f}, KID {row['kid']:.4f}, "
                         f"path length {row['path_length']:.2f}")
        pictures, _ = draw_paths(pipeline, captions[:64], options.seed, **grid[0])
        file = pipeline.parts.file.with_name("report.html")
        if not file.with_name("log.jsonl").is_file():        # It is no run.
            file = out.with_name("report.html")
        write_report(file, record, pictures, captions, measure, training)
        print(f"{file} shows all of it")
    print(f"written to {out}")


if __name__ == "__main__":
    command(main)
