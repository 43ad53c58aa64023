"""Exercise 5 (30 minutes): from a map to a density, mode sampling with heavy tails (Eq. 20).

    f(u; s) = 1 - u - s (cos^2(pi u / 2) - 1 + u)        (20)        t = f(u; s), u uniform

f falls from 1 to 0 for -1 <= s <= 2 / (pi - 2). Its inverse has no closed form. Write the four
functions below, then run

    python exercises/05_mode_density.py

Think first: where is the density largest for s > 0? What happens at u = 1/2 near s = 2 / (pi - 2)?
"""

import sys

import torch
from marking import mark


def f_mode(u, s):
    """Eq. 20. u (B,) in [0, 1] -> t (B,)."""
    raise NotImplementedError


def f_mode_slope(u, s):
    """df / du. (B,)"""
    raise NotImplementedError


def f_mode_inverse(t, s):
    """The u with f(u; s) = t, to 1e-9, for every allowed s. (B,)

    Newton's method alone leaves [0, 1] where f is flat.
    """
    raise NotImplementedError


def mode_pdf(t, s):
    """The density of t = f(u; s) for uniform u: |d f^-1 / dt|. (B,)"""
    raise NotImplementedError


# --- Checks: each returns "" if the answer is right, and a hint if not ----------------------------

SCALES = (-1.0, -0.5, 0.0, 0.81, 1.29, 1.75)
POINTS = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
PI = torch.pi


def right_map(u, s):
    """Eq. 20 with cos^2(x) = (1 + cos(2 x)) / 2."""
    return 1 - u - s * ((1 + torch.cos(PI * u)) / 2 - 1 + u)


def right_slope(u, s):
    return s * PI / 2 * torch.sin(PI * u) - 1 - s


def check_map(answers):
    for s in SCALES:
        ours = answers["f_mode"](POINTS, s)
        if torch.allclose(ours, right_map(1 - POINTS, s)):
            return "that rises: f(0) is 1"
        if not torch.allclose(ours, right_map(POINTS, s)):
            return f"wrong for s = {s}: the cosine is squared, and its argument is pi / 2 times u"
    return ""


def check_slope(answers):
    for s in SCALES:
        ours = answers["f_mode_slope"](POINTS, s)
        if torch.allclose(ours, -right_slope(POINTS, s)):
            return "the sign: f falls"
        if not torch.allclose(ours, right_slope(POINTS, s)):
            return f"wrong for s = {s}: the derivative of cos^2(pi u / 2) is -pi/2 sin(pi u)"
    return ""


def check_inverse(answers):
    for s in SCALES:
        u = answers["f_mode_inverse"](right_map(POINTS, s), s)
        if not ((u >= 0) & (u <= 1)).all():
            return f"for s = {s} it left [0, 1]; halve an interval, or keep Newton's step inside"
        if torch.allclose(u, 1 - POINTS, atol=1e-6):
            return "that is the inverse of a rising map: f falls: a large t means a small u"
        error = (u - POINTS).abs().max().item()
        if error > 1e-9:
            return f"for s = {s} it is off by {error:.1e}"
    return ""


def check_density(answers):
    for s in SCALES:
        t = right_map(POINTS, s)
        slope = right_slope(POINTS, s).abs()
        ours = answers["mode_pdf"](t, s)
        if s == 0:
            continue                                                  # uniform: mistakes cancel
        if torch.allclose(ours, slope):
            return "that is |f'|; an inverse function has the inverse slope"
        if torch.allclose(ours, 1 / right_slope(t, s).abs()):
            return "right slope, wrong place: take it at u = f^-1(t), not at t"
        if (ours < 0).any():
            return "a density is positive: take the absolute value of the slope"
        if not torch.allclose(ours, 1 / slope):
            return f"wrong for s = {s}: 1 / |f'(u)| at u = f^-1(t)"
    return ""


CHECKS = {
    "the map (20)": check_map,
    "its slope": check_slope,
    "its inverse": check_inverse,
    "the density": check_density,
}


def show(answers):
    """Fig. 11, left, on its side: the densities of three s."""
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    for s in (-0.5, 0.81, 1.29):
        print(f"s = {s}")
        for x, density in zip(t.tolist(), answers["mode_pdf"](t, s).tolist()):
            print(f"  t = {x:.2f}  {'#' * round(15 * density)}")


if __name__ == "__main__":
    sys.exit(mark(CHECKS, globals(), show))
