"""Exercise 1 (5 minutes): the path of rectified flow and what the network learns (Eq. 8, 13, 19).

The path from a clean latent x_0 to noise eps is a straight line. t = 0 is data and t = 1 is noise:

    z_t = (1 - t) x_0 + t eps        (13)        loss = |v(z_t, t) - dz_t / dt|^2        (8)

In training, t = sigmoid(x) with x ~ N(m, s^2): the logit-normal density of Eq. 19. Write the four
functions below, then run

    python exercises/01_path_and_target.py

Think first: why does the target not depend on t? Does sampling start at t = 0 or at t = 1?
"""

import sys

import torch
from marking import mark


def interpolate(latent, noise, t):
    """z_t of Eq. 13. latent, noise (B, C, H, W); t (B,), one number per sample -> (B, C, H, W)."""
    raise NotImplementedError


def velocity_target(latent, noise):
    """dz_t / dt of Eq. 13. (B, C, H, W)"""
    raise NotImplementedError


def recover_latent(z_t, velocity, t):
    """x_0 from a point of the path and the velocity there. (B, C, H, W)"""
    raise NotImplementedError


def logit_normal(u_normal, logit_mean, logit_std):
    """t (B,) with the density of Eq. 19, from standard normal draws u_normal (B,)."""
    raise NotImplementedError


# --- Checks: each returns "" if the answer is right, and a hint if not ----------------------------

def draw(seed):
    """Latents and noises of a random shape, and times."""
    rng = torch.Generator().manual_seed(seed)
    B, C, H, W = torch.randint(2, 6, (4,), generator=rng).tolist()
    latent = torch.randn(B, C, H, W, generator=rng)
    noise = torch.randn(B, C, H, W, generator=rng)
    return latent, noise, torch.rand(B, generator=rng)


def path(latent, noise, t):
    """Eq. 13, sample by sample."""
    points = []
    for i in range(len(t)):
        points.append((1 - t[i]) * latent[i] + t[i] * noise[i])
    return torch.stack(points)


def check_path(answers):
    for seed in range(4):
        latent, noise, t = draw(seed)
        ours = answers["interpolate"](latent, noise, t)
        if torch.allclose(ours, path(noise, latent, t), atol=1e-6):
            return "the ends are swapped: t = 0 must give the latent"
        if not torch.allclose(ours, path(latent, noise, t), atol=1e-6):
            return "at t = 0 it must be x_0, at t = 1 eps, and each sample has its own t"
    return ""


def check_target(answers):
    latent, noise, _ = draw(0)
    ours = answers["velocity_target"](latent, noise)
    if torch.allclose(ours, latent - noise):
        return "the sign: it points from data to noise, as t grows"
    if not torch.allclose(ours, noise - latent):
        return "differentiate Eq. 13 by t. A public trainer used eps - z_t, which is no derivative"
    return ""


def check_recovery(answers):
    latent, noise, t = draw(1)
    ours = answers["recover_latent"](path(latent, noise, t), noise - latent, t)
    if not torch.allclose(ours, latent, atol=1e-5):
        return "walk back along the line: from time t to time 0 at constant velocity"
    return ""


def check_times(answers):
    u = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for mean, std in ((1.0, 0.6), (0.0, 1.0), (-0.5, 2.2)):
        ours = answers["logit_normal"](u, mean, std)
        right = 1 / (1 + torch.exp(-(mean + std * u)))
        if ours.min() < 0 or ours.max() > 1:
            return "times lie in (0, 1): the standard logistic function takes x there"
        if torch.allclose(ours, 1 - right, atol=1e-6):
            return "that is 1 - t: m > 0 must mean more noise"
        if not torch.allclose(ours, right, atol=1e-6):
            return "scale by s and move by m before the sigmoid"
    return ""


CHECKS = {
    "the path (13)": check_path,
    "the target": check_target,
    "back to the data": check_recovery,
    "logit-normal times (19)": check_times,
}


def show(answers):
    """A histogram of t for rf/lognorm(1.00, 0.60)."""
    u = torch.randn(100000, generator=torch.Generator().manual_seed(0))
    shares = torch.histc(answers["logit_normal"](u, 1.0, 0.6), 20, 0, 1) / len(u)
    for i, share in enumerate(shares.tolist()):
        print(f"t = {i / 20:.2f}  {'#' * round(300 * share)}")


if __name__ == "__main__":
    sys.exit(mark(CHECKS, globals(), show))
