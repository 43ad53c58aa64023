"""Exercise 2 (20 minutes): from a latent to tokens and back, and their places (Sec. 4, Fig. 2a).

A latent (B, C, H, W) is cut into p x p patches. Each patch becomes one token of p p C numbers, in
the order (row, column, channel). The tokens follow each other row by row. Each token is given the
frequency embedding of its place. The places come from a square grid of M x M, and a picture uses
the centre of the grid, so that pictures of all shapes share the middle. Write four functions, then

    python exercises/02_patches_and_positions.py

Think first: why must unpatchify know the height in tokens? Which tokens of a wide picture and of a
tall one share their position?
"""

import math
import sys

import torch
from marking import mark


def patchify(latent, patch_size):
    """(B, C, H, W) -> (B, N, p * p * C) with N = (H / p) (W / p)."""
    raise NotImplementedError


def unpatchify(tokens, height, width, patch_size):
    """The inverse: (B, N, p * p * C) -> (B, C, height * p, width * p). Height, width in tokens."""
    raise NotImplementedError


def embed_positions(positions, size):
    """(n,) -> (n, size): sin(x f_i) for all i, then cos(x f_i) for all i.

    f_i = 10000^(-i / (size / 2)), i = 0 ... size / 2 - 1.
    """
    raise NotImplementedError


def crop_center(grid, height, width):
    """(M, M, D) -> (height, width, D): the middle. Of an odd margin, top and left get less."""
    raise NotImplementedError


# --- Checks: each returns "" if the answer is right, and a hint if not ----------------------------

SIZES = ((1, 2, 2, 3, 2), (2, 3, 3, 1, 2), (1, 4, 2, 2, 3))           # B, C, tokens high, wide, p


def example(B, C, height, width, p):
    """A latent in which every number is different, and its tokens, number by number."""
    count = B * C * height * width * p * p
    latent = torch.arange(float(count)).view(B, C, height * p, width * p)
    tokens = torch.zeros(B, height * width, p * p * C)
    for row in range(height * p):
        for column in range(width * p):
            token = (row // p) * width + column // p
            place = (row % p) * p + column % p
            tokens[:, token, place * C : (place + 1) * C] = latent[:, :, row, column]
    return latent, tokens


def check_patchify(answers):
    for B, C, height, width, p in SIZES:
        latent, tokens = example(B, C, height, width, p)
        ours = answers["patchify"](latent, p)
        if ours.shape != tokens.shape:
            return f"shape {tuple(ours.shape)}, it should be {tuple(tokens.shape)}"
        channels_first = tokens.unflatten(2, (p * p, C)).transpose(2, 3).flatten(2)
        if torch.equal(ours, channels_first):
            return "the channel must vary fastest within a token"
        if not torch.equal(ours, tokens):
            return "tokens go row by row over the picture"
    return ""


def check_unpatchify(answers):
    for B, C, height, width, p in SIZES:
        latent, tokens = example(B, C, height, width, p)
        ours = answers["unpatchify"](tokens, height, width, p)
        if ours.shape != latent.shape:
            return f"shape {tuple(ours.shape)}, it should be {tuple(latent.shape)}"
        if not torch.equal(ours, latent):
            return "split into (height, width, row, column, channel), then reorder the axes"
    return ""


def check_positions(answers):
    for size in (2, 8, 12):
        positions = torch.tensor([0.0, 1.0, 2.5, 40.0], dtype=torch.float64)
        right = torch.zeros(4, size, dtype=torch.float64)
        for i in range(size // 2):
            angle = positions * 10000 ** (-i / (size / 2))
            right[:, i] = torch.sin(angle)
            right[:, size // 2 + i] = torch.cos(angle)
        ours = answers["embed_positions"](positions, size).double()
        if ours.shape != right.shape:
            return f"shape {tuple(ours.shape)}, it should be {tuple(right.shape)}"
        if torch.allclose(ours, right.roll(size // 2, dims=1), atol=1e-5):
            return "sines first here (the time embedding has cosines first)"
        if not torch.allclose(ours, right, atol=1e-5):
            return "frequencies fall from 1 to near 1e-4"
    return ""


def check_crop(answers):
    for M, height, width in ((7, 2, 4), (8, 3, 8), (5, 5, 2)):
        grid = torch.arange(float(M * M)).view(M, M, 1)
        ours = answers["crop_center"](grid, height, width)
        if ours.shape != (height, width, 1):
            return f"shape {tuple(ours.shape)}, it should be {(height, width, 1)}"
        top, left = math.floor((M - height) / 2), math.floor((M - width) / 2)
        if ours[0, 0] == 0 and top + left > 0:
            return "that is the top left corner"
        right = grid[top : top + height, left : left + width]
        if not torch.equal(ours, right):
            return "top = (M - height) // 2, rounded down, and the same for the left side"
    return ""


CHECKS = {
    "latent -> tokens": check_patchify,
    "tokens -> latent": check_unpatchify,
    "frequency embedding": check_positions,
    "the centre of the grid": check_crop,
}


if __name__ == "__main__":
    sys.exit(mark(CHECKS, globals()))
