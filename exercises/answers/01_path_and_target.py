"""Answers to exercise 1.

Why does the target not depend on t? The path is a straight line, and a line has one slope.
Where does sampling start? At t = 1, at z_1 = eps: pure noise, with nothing of the data in it.
"""

import torch


def interpolate(latent, noise, t):
    t = t.view(-1, 1, 1, 1)                           # (B, 1, 1, 1)
    return (1 - t) * latent + t * noise


def velocity_target(latent, noise):
    return noise - latent


def recover_latent(z_t, velocity, t):
    return z_t - t.view(-1, 1, 1, 1) * velocity


def logit_normal(u_normal, logit_mean, logit_std):
    return torch.sigmoid(logit_mean + logit_std * u_normal)
