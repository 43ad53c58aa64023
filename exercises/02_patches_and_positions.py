"""Exercise 2 (20 minutes): from a latent to tokens and back, and where a token is (Sec. 4, Fig. 2a; Sec. 5.3.2).

A latent (B, C, H, W) is cut into 2 x 2 patches. Each becomes one token of 4 C numbers, ordered (row, column, channel), and
the tokens follow each other row by row. Every token is given the frequency embedding of its place: positions come from a
stored square grid of M x M, of which the centre is used, so that pictures of all shapes share the middle.

    python exercises/02_patches_and_positions.py

Think first: why must unpatchify know the height in tokens? Which tokens share their position between a wide and a tall one?
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from marking import mark

import mmdit


def patchify(latent, patch_size):
    """(B, C, H, W) -> (B, N, p * p * C) with N = (H / p)(W / p), a token's numbers ordered (row, column, channel)."""
    raise NotImplementedError


def unpatchify(tokens, height, width, patch_size):
    """The inverse: (B, N, p * p * C) -> (B, C, height * p, width * p); height and width count tokens."""
    raise NotImplementedError


def embed_positions(positions, size):
    """(n,) -> (n, size): sin(p * f_i), then cos(p * f_i), with f_i = 10000^(-i / (size / 2)), i = 0 ... size / 2 - 1."""
    raise NotImplementedError


def crop_center(grid, height, width):
    """(M, M, D) -> (height, width, D), the middle; an odd rest leaves the smaller part at the top and the left."""
    raise NotImplementedError


# ------------------------------------------------------------------------------------------------------------
# Checks: each returns "" if the answer is right, else a hint
# ------------------------------------------------------------------------------------------------------------

def latent_of_places():
    """(1, 2, 4, 6): every number says where it is, so a wrong order shows."""
    return torch.arange(48.0).view(1, 2, 4, 6)


def core_patches(latent):
    """The right tokens, by the slow way: one patch after the other."""
    _, _, H, W = latent.shape
    return torch.stack([latent[:, :, y : y + 2, x : x + 2].permute(0, 2, 3, 1).flatten(1)
                        for y in range(0, H, 2) for x in range(0, W, 2)], dim=1)


def check_patchify(answers):
    latent = latent_of_places()
    ours, expected = answers["patchify"](latent, 2), core_patches(latent)
    if ours.shape != expected.shape:
        return f"shape {tuple(ours.shape)}, it should be {tuple(expected.shape)}"
    if torch.equal(ours, expected):
        return ""
    channels_first = torch.equal(ours[0, 0].view(2, 2, 2), expected[0, 0].view(2, 2, 2).permute(2, 0, 1))
    return "the channel must vary fastest within a token" if channels_first else "tokens go row by row over the picture"


def check_unpatchify(answers):
    latent = latent_of_places()
    tokens = core_patches(latent)
    ours = answers["unpatchify"](tokens, 2, 3, 2)
    if ours.shape != latent.shape:
        return f"shape {tuple(ours.shape)}, it should be {tuple(latent.shape)} (height 2 and width 3 count tokens)"
    same = torch.equal(ours, latent) and torch.equal(ours, mmdit.unpatchify(tokens, 2, 3, 2))
    return "" if same else "axis by axis: (height, width, row, column, channel) to (channel, height, row, width, column)"


def check_positions(answers):
    positions = torch.arange(5, dtype=torch.float64)
    ours = answers["embed_positions"](positions, 8)
    expected = mmdit.sincos_2d(torch.zeros(1, dtype=torch.float64), positions, 16)[:, :8]        # the column half
    if ours.shape != expected.shape:
        return f"shape {tuple(ours.shape)}, it should be {tuple(expected.shape)}"
    if torch.allclose(ours.double(), expected, atol=1e-6):
        return ""
    cosines_first = torch.allclose(ours.double(), expected.roll(4, dims=1), atol=1e-6)
    return "sines first here (the time embedding has cosines first)" if cosines_first else "frequencies fall from 1 to near 1e-4"


def check_crop(answers):
    grid = torch.arange(49.0).view(7, 7, 1)
    ours = answers["crop_center"](grid, 2, 4)
    if ours.shape != (2, 4, 1):
        return f"shape {tuple(ours.shape)}, it should be (2, 4, 1)"
    if torch.equal(ours.flatten(), mmdit.crop_center(grid.view(1, 49, 1), 2, 4).flatten()):
        return ""
    return "that is the top left corner" if ours[0, 0] == 0 else "top = (M - height) // 2, rounded down"


CHECKS = {"latent -> tokens": check_patchify, "tokens -> latent": check_unpatchify,
          "frequency embedding": check_positions, "the centre of the grid": check_crop}


if __name__ == "__main__":
    sys.exit(mark(CHECKS, globals()))
