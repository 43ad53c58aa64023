"""Exercise 5 (30 minutes): from a map to a density, and back: mode sampling with heavy tails (Eq. 20).

    f_mode(u; s) = 1 - u - s (cos^2(pi u / 2) - 1 + u)        (20)        t = f_mode(u; s), u uniform

falls from 1 to 0 for -1 <= s <= 2 / (pi - 2), and has no inverse in closed form. Write the four functions below, then

    python exercises/05_mode_density.py

Think first: where is the density largest for s > 0? What happens at u = 1/2 as s comes near 2 / (pi - 2)?
"""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from marking import mark

import flow


def f_mode(u, s):
    """Eq. 20. u (B,) in [0, 1] -> t (B,)."""
    raise NotImplementedError


def f_mode_slope(u, s):
    """d f_mode / du. (B,)"""
    raise NotImplementedError


def f_mode_inverse(t, s):
    """u with f_mode(u; s) = t, to 1e-9, for every allowed s. Newton's method alone leaves [0, 1] where f is flat. (B,)"""
    raise NotImplementedError


def mode_pdf(t, s):
    """The density of t = f_mode(u; s) for uniform u: |d f_mode^-1 / dt|. (B,)"""
    raise NotImplementedError


# ------------------------------------------------------------------------------------------------------------
# Checks: each returns "" if the answer is right, else a hint
# ------------------------------------------------------------------------------------------------------------

SCALES = (-1.0, -0.5, 0.0, 0.81, 1.29, 1.75)
POINTS = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)


def check_map(answers):
    for s in SCALES:
        ours = answers["f_mode"](POINTS, s)
        if torch.allclose(ours, flow.mode_map(1 - POINTS, s)) and s != 0:
            return "that rises: f_mode(0) is 1"
        if not torch.allclose(ours, flow.mode_map(POINTS, s)):
            return f"wrong for s = {s}: the cosine is squared, and its argument is pi / 2 times u"
    return ""


def check_slope(answers):
    for s in SCALES:
        ours = answers["f_mode_slope"](POINTS, s)
        right = (flow.mode_map(POINTS + 1e-6, s) - flow.mode_map(POINTS - 1e-6, s)) / 2e-6
        if torch.allclose(ours, -right, atol=1e-6):
            return "the sign: f_mode falls"
        if not torch.allclose(ours, right, atol=1e-6):
            return f"wrong for s = {s}: the derivative of cos^2(pi u / 2) is -pi/2 sin(pi u)"
    return ""


def check_inverse(answers):
    for s in SCALES:
        u = answers["f_mode_inverse"](POINTS, s)
        if not ((u >= 0) & (u <= 1)).all():
            return f"for s = {s} it left [0, 1]; halve an interval instead, or keep Newton's step inside one"
        error = (u - flow.mode_map_inverse(POINTS, s)).abs().max().item()
        if (1 - u - flow.mode_map_inverse(POINTS, s)).abs().max() < 1e-6 and s:
            return "that is the inverse of the rising map: f falls, so a large t means a small u"
        if not error < 1e-9:
            return f"for s = {s} it is off by {error:.1e}"
    return ""


def check_density(answers):
    for s in SCALES:
        ours, right = answers["mode_pdf"](POINTS, s), flow.Mode(s).pdf(POINTS)
        if s and torch.allclose(ours, 1 / right):
            return "that is |f'|; the density is one over it, as the inverse function has the inverse slope"
        u = POINTS
        if s and torch.allclose(ours, 1 / (1 + s - s * math.pi / 2 * torch.sin(math.pi * u))):
            return "right slope, wrong place: take it at u = f^-1(t), not at t"
        if (ours < 0).any():
            return "a density is positive: take the absolute value of the slope"
        if not torch.allclose(ours, right):
            return f"wrong for s = {s}: 1 / |f_mode'(u)| at u = f_mode^-1(t)"
    return ""


CHECKS = {"the map (20)": check_map, "its slope": check_slope, "its inverse": check_inverse, "the density": check_density}


if __name__ == "__main__":
    sys.exit(mark(CHECKS, globals()))
