"""Exercise 1 (5 minutes): the forward process of rectified flow, and what the network learns (Eq. 13, 8 and 19).

The path from a clean latent x_0 to noise eps is a straight line, t = 0 is data and t = 1 is noise:

    z_t = (1 - t) x_0 + t eps        (13)        loss = |v(z_t, t) - dz_t / dt|^2        (8)

and in training t = sigmoid(u) with u ~ N(m, s), the logit-normal density of Eq. 19. Write the four functions below, then

    python exercises/01_path_and_target.py

Think first: why does the target not depend on t? Where does the path start from at t = 1 in sampling?
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from marking import mark

import flow


def interpolate(latent, noise, t):
    """z_t of Eq. 13. latent, noise (B, C, H, W), t (B,) -> (B, C, H, W). Mind that t is one number per sample."""
    raise NotImplementedError


def velocity_target(latent, noise):
    """dz_t / dt of Eq. 13. (B, C, H, W)"""
    raise NotImplementedError


def recover_latent(z_t, velocity, t):
    """x_0 from a point of the path and the velocity there. (B, C, H, W)"""
    raise NotImplementedError


def logit_normal(u_normal, logit_mean, logit_std):
    """t from standard normal draws u_normal (B,), with the density of Eq. 19. (B,)"""
    raise NotImplementedError


# ------------------------------------------------------------------------------------------------------------
# Checks: each returns "" if the answer is right, else a hint
# ------------------------------------------------------------------------------------------------------------

def samples():
    """Two latents, two noises, two times."""
    rng = torch.Generator().manual_seed(0)
    latent, noise = (torch.randn(2, 4, 3, 5, generator=rng) for _ in range(2))
    return latent, noise, torch.tensor([0.25, 0.9])


def check_path(answers):
    latent, noise, t = samples()
    ours = answers["interpolate"](latent, noise, t)
    if torch.allclose(ours, flow.interpolate(latent, noise, t)):
        return ""
    swapped = torch.allclose(ours, flow.interpolate(noise, latent, t))
    return "the ends are swapped: t = 0 must give the latent" if swapped else "at t = 0 it must be x_0, at t = 1 eps"


def check_target(answers):
    latent, noise, t = samples()
    ours = answers["velocity_target"](latent, noise)
    if torch.allclose(ours, noise - latent):
        return ""
    if torch.allclose(ours, latent - noise):
        return "the sign: it points from data to noise, as t grows"
    return "differentiate (13) by t: t itself must vanish (a public trainer used eps - z_t, which is not the derivative)"


def check_recovery(answers):
    latent, noise, t = samples()
    z_t = flow.interpolate(latent, noise, t)
    close = torch.allclose(answers["recover_latent"](z_t, noise - latent, t), latent, atol=1e-5)
    return "" if close else "walk back along the line: from time t to time 0 at constant velocity"


def check_times(answers):
    u = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    t = answers["logit_normal"](u, 1.0, 0.6)
    if t.min() < 0 or t.max() > 1:
        return "times lie in (0, 1): the standard logistic function takes u there"
    if abs(t.mean() - 0.716) < 0.005:
        return ""
    reversed_time = abs(t.mean() - 0.284) < 0.005
    return "that is 1 - t: m > 0 must mean more noise" if reversed_time else "scale by s and move by m before the sigmoid"


CHECKS = {"the path (13)": check_path, "the target": check_target, "back to the data": check_recovery,
          "logit-normal times (19)": check_times}


if __name__ == "__main__":
    sys.exit(mark(CHECKS, globals()))
