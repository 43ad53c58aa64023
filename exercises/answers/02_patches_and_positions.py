"""Answers to exercise 2.

Why must unpatchify know the height? 6 tokens may be 2 x 3, 3 x 2 or 1 x 6 patches.
Which tokens share their position? Those in the middle, where both pictures cover the grid.
"""

import torch


def patchify(latent, patch_size):
    p = patch_size
    patches = latent.unflatten(3, (-1, p)).unflatten(2, (-1, p))      # (B, C, h, p, w, p)
    patches = patches.permute(0, 2, 4, 3, 5, 1)                       # (B, h, w, p, p, C)
    return patches.flatten(3).flatten(1, 2)                           # (B, N, p * p * C)


def unpatchify(tokens, height, width, patch_size):
    p = patch_size
    patches = tokens.unflatten(1, (height, width))                    # (B, h, w, p * p * C)
    patches = patches.unflatten(3, (p, p, -1))                        # (B, h, w, p, p, C)
    patches = patches.permute(0, 5, 1, 3, 2, 4)                       # (B, C, h, p, w, p)
    return patches.flatten(4, 5).flatten(2, 3)                        # (B, C, H, W)


def embed_positions(positions, size):
    i = torch.arange(size // 2, dtype=torch.float64)
    angles = positions[:, None] * 10000 ** (-i / (size / 2))          # (n, size / 2)
    return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)


def crop_center(grid, height, width):
    top = (grid.shape[0] - height) // 2
    left = (grid.shape[1] - width) // 2
    return grid[top : top + height, left : left + width]
