"""evaluate.py: does it work, in numbers (SD3, arXiv:2403.03206v1, Sec. 5.1 and 5.3.3).

Read with   Sec. 5.1 (CLIP score, FID on CLIP features), Tables 4 and 5 (GenEval); Ghosh et al. 2023 for GenEval's rules
Not here    making pictures (sample.py), drawing the scenes (data.py), losses and path length (flow.py)
GenEval     six tasks on the built-in scenes. A picture is scored from its pixels only: `find_things` names what is there,
            `score` compares it with the `Requirement` behind the prompt. Nothing is learned, so nothing can be fooled.
Shapes      B batch   N pictures   n patches   D hidden_size   image (B, 3, S, S) in [-1, 1]; pictures to score are uint8
Run         python evaluate.py                  ground truth (the ceiling) and shuffled captions (chance)
            python evaluate.py pretrained/tiny  the same and a row for a model
"""

import argparse
import itertools
import json
import shlex
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import COLORS, SHAPES, Scene, draw_scene, make_scene, scene_captions, shape_mask
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
        self.position_embedding = nn.Embedding(1 + config.num_patches, D)                           # the class token is first
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
        return self.projection(self.post_norm(class_token))                                         # (B, projection_dim)


def clip_score(image_features, text_features):
    """Mean cosine similarity of pictures and their captions (Hessel et al. 2021, without the factor 2.5). Both (B, d)."""
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
        raise ValueError(f"{len(a)} and {len(b)} feature vectors; a covariance needs two at least (and thousands to be good)")
    cov_a, cov_b = torch.atleast_2d(a.T.cov()), torch.atleast_2d(b.T.cov())                         # (d, d)
    root_a = sqrt_of(cov_a)
    product = root_a @ cov_b @ root_a                                                               # (d, d) symmetric
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    return (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross


# ------------------------------------------------------------------------------------------------------------
# What is in a picture
# ------------------------------------------------------------------------------------------------------------

MIN_DISTANCE = 40       # of RGB to the background: a third of the least that a colour of data.py differs from a background
MIN_AREA = 0.004        # of the shorter side squared: half of the smallest star; less is a speck
GRID = 24               # shapes are compared on GRID x GRID pixels


@dataclass(frozen=True)
class Found:
    """One object in a picture, in pixels; `center` is (x, y) of the middle of its box."""
    shape: str
    color: str
    left: int
    top: int
    height: int
    width: int

    @property
    def center(self) -> tuple[float, float]:
        return self.left + self.width / 2, self.top + self.height / 2


def components(mask):
    """The 4-connected parts of a bool mask (H, W), as a list of masks (H, W).

    Each row is cut into runs of pixels, and runs that touch one of the row above are joined (union-find).
    """
    steps = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    (rows, starts), ends = np.nonzero(steps == 1), np.nonzero(steps == -1)[1]                       # run: [start, end)
    parent = list(range(len(rows)))

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    above = 0
    for i, (row, start, end) in enumerate(zip(rows, starts, ends)):
        while rows[above] < row - 1 or (rows[above] == row - 1 and ends[above] <= start):           # wholly before run i
            above += 1
        j = above
        while rows[j] == row - 1 and starts[j] < end:
            parent[root(i)] = root(j)
            j += 1
    parts = {}
    for i in range(len(rows)):
        part = parts.setdefault(root(i), np.zeros_like(mask))
        part[rows[i], starts[i] : ends[i]] = True
    return list(parts.values())


def box_of(mask):
    """(left, top, height, width) of the pixels that are set."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1


def on_grid(mask):
    """A mask cropped to its box and resized: (GRID * GRID,) in [0, 1], and width / height of the box."""
    left, top, height, width = box_of(mask)
    crop = torch.from_numpy(mask[top : top + height, left : left + width]).float()[None, None]
    grid = F.interpolate(crop, (GRID, GRID), mode="bilinear", antialias=True, align_corners=False)
    return grid.flatten().numpy(), width / height


@lru_cache(maxsize=64)
def templates(diameter: int):
    """How data.py's shapes look at a size: (8, GRID * GRID) masks as by `on_grid`, and their widths / heights (8,)."""
    grids, aspects = zip(*(on_grid(shape_mask(shape, diameter) > 0.5) for shape in SHAPES))
    return np.stack(grids), np.array(aspects)


def best_shape(mask):
    """(name, fit in [0, 1]): overlap over union with each shape, times how well the box's proportions agree."""
    _, _, height, width = box_of(mask)
    grid, aspect = on_grid(mask)
    grids, aspects = templates(int(np.clip(max(height, width), 8, 64)))
    fit = np.minimum(grids, grid).sum(1) / np.maximum(grids, grid).sum(1)                           # (8,)
    fit *= np.minimum(aspect / aspects, aspects / aspect)
    return SHAPES[fit.argmax()], fit.max()
