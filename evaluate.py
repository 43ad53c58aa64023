"""evaluate.py: does it work, in numbers (SD3, arXiv:2403.03206v1, Sec. 5).

Read with   Sec. 5.1 (CLIP score, FID on CLIP features), Table 3 (PSNR), Tables 4 and 5
            (GenEval; Ghosh et al. 2023)
Not here    making pictures (sample.py), drawing and recognising scenes (scenes.py)
Shapes      B batch   n patches   D hidden_size   image (B, 3, S, S) in [-1, 1] for the image tower;
            pictures to score are uint8 (H, W, 3), and there H W are in pixels
Run         python evaluate.py                  ground truth, and shuffled captions
            python evaluate.py pretrained/tiny  a model as well, and what scores nothing must score
"""

import argparse
import copy
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
from safetensors.torch import load_file
from tqdm import tqdm

import sample
from checkpoints import (SHIPPED, add_options, check_options, given_options, option,
                         write_atomically)
from data import from_tensor, to_tensor
from devices import autocast, command
from scenes import (HELD_OUT_SEED, PLAIN, REWORDED, WORDS, Scene, View, caption, draw_scene,
                    is_held_out, local_max, make_scene, word_mask)
from text_encoders import CLIPLayer

# ---- CLIP's image tower, and the metrics on its features (Sec. 5.1) ------------------------------

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)       # of RGB in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


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
        layers = [CLIPLayer(config, causal=False) for _ in range(config.num_layers)]
        self.layers = nn.ModuleList(layers)
        self.post_norm = nn.LayerNorm(D, eps=1e-5)
        self.projection = nn.Linear(D, config.projection_dim, bias=False)

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


def load_image_tower(folder=SHIPPED, name="clip_l") -> CLIPImageEncoder:
    """The image tower in a model's folder, ready to measure. name: the text encoder that it was
    trained with. Sizes are those of the tensors."""
    file = Path(folder) / "clip_image.safetensors"
    tensors = {}
    for key, tensor in load_file(file).items():
        if key.startswith(f"{name}_image."):
            tensors[key.removeprefix(f"{name}_image.")] = tensor.float()
    if not tensors:
        raise ValueError(f"{file} holds no image tower for {name}; give the file of make_tiny.py")
    D, _, patch_size, _ = tensors["patch_embedding.weight"].shape
    num_patches = len(tensors["position_embedding.weight"]) - 1
    num_layers = len({key.split(".")[1] for key in tensors if key.startswith("layers.")})
    activation = "quick_gelu" if name == "clip_l" else "gelu"
    config = CLIPImageConfig(round(num_patches**0.5) * patch_size, patch_size, D, num_layers,
                             len(tensors["projection.weight"]), activation)
    tower = CLIPImageEncoder(config)
    tower.load_state_dict(tensors)
    return tower.eval().requires_grad_(False)


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


def kernel_distance(features_a, features_b):
    """Kernel distance (KID; Binkowski et al. 2018) of two sets of features (N, d), (M, d).

    The squared maximum mean discrepancy with the kernel (x y / d + 1)^3. Its estimate is unbiased,
    so that it can be below 0, and small sets are no worse on average.
    """
    a, b = features_a.double(), features_b.double()
    N, M = len(a), len(b)
    if min(N, M) < 2:
        raise ValueError(f"{N} and {M} feature vectors; pairs within a set need at least 2")

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    within_a, within_b = kernel(a, a), kernel(b, b)         # (N, N), (M, M); no vector with itself
    mean_a = (within_a.sum() - within_a.trace()) / (N * (N - 1))
    mean_b = (within_b.sum() - within_b.trace()) / (M * (M - 1))
    return mean_a + mean_b - 2 * kernel(a, b).mean()


class PictureMeasures:
    """CLIP score, FID and KID of drawn pictures, on the features of the image tower in a folder.

    pictures: the real ones; as all pictures here, PIL or uint8 (H, W, 3). captions: what the drawn
    ones should show. text: TextEncoders whose CLIP-L belongs to the tower, with any precision.
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

    @torch.no_grad()
    def features(self, pictures):
        """N pictures -> (N, d)."""
        rows = []
        for picture in pictures:
            image = to_tensor(np.asarray(picture))[None]                         # (1, 3, H, W)
            rows.append(self.tower(image.to(self.device)))
        return torch.cat(rows)

    def __call__(self, pictures):
        """M pictures, one of each caption -> {"clip_score", "fid", "kid"}."""
        drawn = self.features(pictures)                                          # (M, d)
        if len(drawn) != len(self.text_features):
            raise ValueError(f"{len(drawn)} pictures of {len(self.text_features)} captions")
        return {"clip_score": clip_score(drawn, self.text_features).item(),
                "fid": frechet_distance(drawn, self.real).item(),
                "kid": kernel_distance(drawn, self.real).item()}


# ---- The measures of Table 3; images are in [-1, 1], and a number belongs to one picture ---------

def psnr(image, reconstruction):
    """Peak signal-to-noise ratio in dB: (B,). The reconstruction is clamped."""
    difference = (image - reconstruction.clamp(-1, 1)) / 2                # in units of [0, 1]
    return -10 * torch.log10(difference.square().mean(dim=(1, 2, 3)).clamp_min(1e-10))


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
BATCH_SIZE = 64         # prompts that are given to a generator at once


@dataclass(frozen=True)
class Case:
    """One question: a prompt, a scene that it describes, and what it says of the things there."""
    task: str
    prompt: str
    scene: Scene
    said: tuple[str, ...]


def geneval_cases(count_per_task, seed=HELD_OUT_SEED, height=64, width=64, split=SPLITS[0]):
    """list of Case, task by task: the first scenes of the set `seed` that suit, each used once.

    Prompts have the plain wording of training, or are reworded. In the third split they also name
    the colours, and each has a combination that training never draws.
    """
    cases = {task: [] for task in TASKS}
    for index in itertools.count():
        scene = make_scene(seed, index, height, width, held_out=split == SPLITS[2])
        for task in sorted(TASKS, key=lambda name: len(cases[name])):
            kind, said = TASKS[task]
            said = (*said, "color") if split == SPLITS[2] else said
            shapes = [thing.shape for thing in scene.things]
            colors = [thing.color for thing in scene.things]
            alike = scene.kind == "pair" and min(len(set(shapes)), len(set(colors))) < 2
            relation = scene.relation if "relation" in said else ""
            unsaid = split == SPLITS[2] and not is_held_out(shapes, colors, relation)
            if scene.kind == kind and not alike and not unsaid:
                forms = REWORDED if split == SPLITS[1] else PLAIN
                prompt = caption(scene, said, forms, random.Random(scene.wording))
                cases[task].append(Case(task, prompt, scene, said))
                break
        if min(len(chosen) for chosen in cases.values()) >= count_per_task:
            break
    return [case for chosen in cases.values() for case in chosen[:count_per_task]]


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
    named = [thing for thing in view.things if thing.shape in {thing.shape for thing in wanted}][:8]
    strict = lax = False
    if "background" in case.said and view.background != case.scene.background:
        return False, False
    for things in itertools.permutations(named, len(wanted)):
        if strict or not fits(case, things):
            continue
        rest = view.rest(things)
        if case.scene.word:
            place = find_word(view, rest, case.scene.word)
            if place is None:
                continue
            rest &= ~place
        lax = lax or case.task != "counting" or len(named) == len(things)
        strict = bool(rest.mean() <= MAX_REST)
    return strict, lax


@lru_cache(maxsize=16)
def spellings(word, height, width):
    """Masks (n, height * width), of mean 0 and norm 1: the word, the other words of this world, and
    all misspellings with one letter replaced, left out, or behind the next."""
    others = set(WORDS)
    for i in range(len(word)):
        before, letter, after = word[:i], word[i], word[i + 1 :]
        others |= {before + after, before + after[:1] + letter + after[1:]}
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


def success_rates(cases, images) -> dict:
    """{"overall": mean of GenEval's six tasks, "overall_lax", "n": pictures of a task,
    "strict": {task: share that passes}, "lax": {task: share}}."""
    passed = {task: [] for task in TASKS}
    for case, image in zip(cases, images, strict=True):
        passed[case.task].append(score(case, image))
    shares = {task: np.mean(passed[task], axis=0).tolist() for task in TASKS}
    overall, overall_lax = np.mean([shares[task] for task in GENEVAL_TASKS], axis=0).tolist()
    return {"overall": overall, "overall_lax": overall_lax, "n": len(cases) // len(TASKS),
            "strict": {task: share[0] for task, share in shares.items()},
            "lax": {task: share[1] for task, share in shares.items()}}


def geneval(draw, count_per_task=60, seed=HELD_OUT_SEED, height=64, width=64, split=SPLITS[0]):
    """Success rates of draw(prompts, first) -> list of uint8 (height, width, 3), which gets batches
    of prompts and the number of the first one: noise should follow that number."""
    cases = geneval_cases(count_per_task, seed, height, width, split)
    images = []
    for first in tqdm(range(0, len(cases), BATCH_SIZE), "GenEval", leave=False):
        images += draw([case.prompt for case in cases[first : first + BATCH_SIZE]], first)
    return success_rates(cases, images)


def draw_with(pipeline, seed, **settings):
    """draw(prompts, first) for `geneval`: the first picture starts from the noise of seed + first.
    settings: fields of sample.Settings."""
    def draw(prompts, first):
        pictures = sample.generate(pipeline, prompts, seed + first, len(prompts), **settings)
        return [np.asarray(picture) for picture in pictures]

    return draw


def format_scores(scores) -> str:
    """One line: GenEval .950, lax .960 (single object 1.00, ...)."""
    tasks = [f"{task} {share:.2f}" for task, share in scores["strict"].items()]
    return (f"GenEval {scores['overall']:.3f}, lax {scores['overall_lax']:.3f} "
            f"({', '.join(tasks)})")


# ---- Command line --------------------------------------------------------------------------------

@dataclass(frozen=True)
class Options:
    """What the command line takes beside the checkpoint. Where nothing is given, it decides."""
    num_prompts: int = option(60, "prompts for each task", low=1, high=10**5)
    guidance_scale: float = option(0.0, "of the model; 0: its own", low=0, high=100)
    num_steps: int = option(0, "of the solver; 0: the model's own", low=0, high=1000)
    height: int = option(0, "of the pictures in px; 0: the model's own, or 64", low=0, high=4096)
    width: int = option(0, "of the pictures in px; 0: the model's own, or 64", low=0, high=4096)
    seed: int = option(HELD_OUT_SEED, "of the prompts and the noise", low=0, high=2**31)
    out: str = option("out/evaluation.json", "a file for all the scores")

    def __post_init__(self):
        check_options(self)


def wilson(share, n):
    """95 % interval (low, high) of a share that was seen in n cases (Wilson 1927)."""
    z = 1.96
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return max(0.0, middle - reach), min(1.0, middle + reach)


def controls(cases, pipeline=None):
    """Yields (name, pictures, cases): what must score 1, and what must score about 0."""
    truth = [draw_scene(case.scene) for case in cases]
    yield "ground truth", truth, cases
    order = np.random.default_rng(0).permutation(len(cases))
    yield "shuffled captions", [truth[i] for i in order], [cases[i] for i in np.roll(order, 1)]
    if pipeline is None:
        return
    vae, latents = pipeline.vae, []

    def decode(latents):
        return [np.asarray(from_tensor(vae.decode(z[None])[0].float().cpu())) for z in latents]

    with torch.no_grad(), autocast(pipeline.device, pipeline.precision):
        for image in truth:
            latents.append(vae.encode(to_tensor(image)[None].to(pipeline.device))[0].float())
        yield "ground truth through the VAE", decode(latents), cases
        rng = torch.Generator().manual_seed(0)
        for scale in (0.5, 1, 2):
            noise = [scale * torch.randn(z.shape, generator=rng).to(z) for z in latents]
            yield f"decoded noise, {scale:g}", decode(noise), cases


def rows(pipeline, options, size):
    """Yields (name, success rates) of all controls, and of the model on all splits."""
    cases = geneval_cases(options.num_prompts, options.seed, *size)
    for name, images, asked in controls(cases, pipeline):
        yield name, success_rates(asked, images)
    if pipeline is None:
        return
    untrained = copy.copy(pipeline)
    untrained.mmdit = copy.deepcopy(pipeline.mmdit)
    untrained.mmdit.initialize(torch.Generator().manual_seed(0))
    settings = {"height": size[0], "width": size[1]}
    for name in ("guidance_scale", "num_steps"):
        if getattr(options, name):
            settings[name] = getattr(options, name)
    for name, model, split in (("untrained", untrained, SPLITS[0]), ("model", pipeline, SPLITS[0]),
                               ("model", pipeline, SPLITS[1]), ("model", pipeline, SPLITS[2])):
        draw = draw_with(model, options.seed, **settings)
        rates = geneval(draw, options.num_prompts, options.seed, *size, split)
        yield f"{name}, {split}", rates


def main():
    """Score ground truth, the controls and the model; print a table, and write all as JSON."""
    parser = argparse.ArgumentParser(description="GenEval's tasks on scenes", allow_abbrev=False)
    parser.add_argument("checkpoint", nargs="?", help="a model as for sample.py; none: no model")
    add_options(parser, Options)
    arguments = parser.parse_args()
    options = Options(**given_options(arguments, Options))
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ValueError(f"--out {out} cannot be written; give the name of a file")
    pipeline = sample.load(arguments.checkpoint) if arguments.checkpoint else None
    defaults = pipeline.defaults if pipeline else {"height": 64, "width": 64}
    size = [options.height or defaults["height"], options.width or defaults["width"]]
    if pipeline:                                             # ValueError before the work
        sample.latent_shape(pipeline, sample.Settings(height=size[0], width=size[1]))
    record = {"command": shlex.join(["python", *sys.argv]), "checkpoint": arguments.checkpoint,
              **asdict(options), "height": size[0], "width": size[1], "rows": {}}
    print(f"{'':40} strict    lax  " + "  ".join(TASKS))
    for name, rates in rows(pipeline, options, size):
        shares = "  ".join(f"{share:{len(task)}.3f}" for task, share in rates["strict"].items())
        print(f"{name:40}  {rates['overall']:.3f}  {rates['overall_lax']:.3f}  {shares}")
        rates["intervals"] = {task: wilson(x, rates["n"]) for task, x in rates["strict"].items()}
        record["rows"][name] = rates
        text = json.dumps(record, indent=1) + "\n"
        write_atomically(out, partial(Path.write_text, data=text))
    print(f"written to {out}, with lax shares and 95 % intervals for each task")


if __name__ == "__main__":
    command(main)
