"""Exercise 6 (20 minutes): deriving the resolution shift (Sec. 5.3.2, Eq. 23 to 25).

An image of n pixels that are all the same constant c, diffused along z_t = (1 - t) c + t eps, tells c best by its mean:

    z_t has the random mean (1 - t) c + t / sqrt(n) eta,  eta ~ N(0, 1),  so c is known up to  sigma(t, n) = t / (1 - t) / sqrt(n)

Set sigma(t_n, n) = sigma(t_m, m), solve for t_m, and write the four functions below, then

    python exercises/06_resolution_shift.py

Think first: an image of four times as many pixels at the same t: is c known better or worse? So does t_m have to rise or fall?
"""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from marking import mark

import flow


def uncertainty(t, n):
    """sigma(t, n). t (B,) in (0, 1), n pixels -> (B,)."""
    raise NotImplementedError


def shift(t, n, m):
    """t_m with the same uncertainty at m pixels as t at n pixels: Eq. 23. (B,)"""
    raise NotImplementedError


def shift_of_log_snr(n, m):
    """What the shift adds to the log-SNR 2 log((1 - t) / t): the same number at every t (Eq. 25)."""
    raise NotImplementedError


def shifted_logit_mean(logit_mean, n, m):
    """t_n is logit-normal with mean m_n (Eq. 19): the mean of the logit of t_m. Its deviation stays."""
    raise NotImplementedError


# ------------------------------------------------------------------------------------------------------------
# Checks: each returns "" if the answer is right, else a hint
# ------------------------------------------------------------------------------------------------------------

T = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
SMALL, LARGE = 256**2, 1024**2


def check_uncertainty(answers):
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(20000, 64, generator=rng, dtype=torch.float64)
    estimate = (0.6 * 1.5 + 0.4 * noise).mean(1) / 0.6                            # c = 1.5, t = .4, 64 pixels
    measured, ours = estimate.std().item(), answers["uncertainty"](torch.tensor([0.4], dtype=torch.float64), 64).item()
    if abs(ours / measured - 1) < 0.02:
        return ""
    if abs(ours / measured - 64**-0.5) < 0.02:
        return "the mean of n pixels has the deviation 1 / sqrt(n), not 1 / n"
    if abs(ours / measured - 0.6) < 0.02:
        return "the mean is (1 - t) c: divide by 1 - t to know c"
    return f"64 pixels at t = 0.4 measured {measured:.4f}"


def check_shift(answers):
    ours = answers["shift"](T, SMALL, LARGE)
    if torch.allclose(ours, flow.shift_time(T, 4.0)):
        return ""
    if torch.allclose(ours, flow.shift_time(T, 16.0)):
        return "alpha is the square root of m / n"
    if torch.allclose(ours, flow.shift_time(T, 0.25)):
        return "the other way: more pixels need more noise for the same uncertainty"
    return "solve t_m / (1 - t_m) = sqrt(m / n) t_n / (1 - t_n) for t_m"


def check_log_snr(answers):
    ours = answers["shift_of_log_snr"](SMALL, LARGE)
    right = flow.shift_log_snr(torch.zeros(1), 4.0).item()
    if abs(ours - right) < 1e-6:
        return ""
    return "the sign: more noise is less signal" if abs(ours + right) < 1e-6 else "log(t / (1 - t)) rises by log(alpha), once"


def check_density(answers):
    mean = answers["shifted_logit_mean"](0.3, SMALL, LARGE)
    ours = flow.LogitNormal(float(mean), 0.8).pdf(T)
    if torch.allclose(ours, flow.Shifted(flow.LogitNormal(0.3, 0.8), 4.0).pdf(T)):
        return ""
    doubled = abs(mean - (0.3 + 2 * math.log(4))) < 1e-6
    return "that is the log-SNR's shift; the logit moves by half of it" if doubled else "logit(t_m) = logit(t_n) + log(alpha)"


CHECKS = {"the uncertainty": check_uncertainty, "the shift (23)": check_shift, "the log-SNR (25)": check_log_snr,
          "the density": check_density}


if __name__ == "__main__":
    sys.exit(mark(CHECKS, globals()))
