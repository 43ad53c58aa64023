"""Answers to exercise 8.

Which one has more steps at t > 1/2? They differ little: about three quarters of both.
Which has the shorter last step? `released`: .009 and not .1 at 28 steps and alpha 3. One long last
step predicts the clean latent from a tenth of noise at once, which blurs it.
"""

import torch


def shift(t, alpha):
    return alpha * t / (1 + (alpha - 1) * t)


def shifted_once(num_steps, alpha):
    return shift(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), alpha)


def released(num_steps, alpha):
    smallest = shift(1 / 1000, alpha)
    times = shift(torch.linspace(1, smallest, num_steps, dtype=torch.float64), alpha)
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)])


def effective_shift(num_steps, alpha):
    return alpha
