"""Answers to exercise 5.

Where is the density largest for s > 0? At t = 1/2, where f is flattest.
What happens near s = 2 / (pi - 2)? f'(1/2) becomes 0, so the density at t = 1/2 becomes infinite.
"""

import math

import torch


def f_mode(u, s):
    return 1 - u - s * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


def f_mode_slope(u, s):
    return -1 - s * (1 - math.pi / 2 * torch.sin(math.pi * u))


def f_mode_inverse(t, s):
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(53):
        middle = (low + high) / 2
        too_high = f_mode(middle, s) > t                              # f falls: u lies to the right
        low = torch.where(too_high, middle, low)
        high = torch.where(too_high, high, middle)
    return (low + high) / 2


def mode_pdf(t, s):
    return 1 / f_mode_slope(f_mode_inverse(t, s), s).abs()
