"""Exercise 6 (20 minutes): deriving the resolution shift (Sec. 5.3.2, Eq. 23 to 25).

Take an image of n pixels that all have the same value c. On the path z_t = (1 - t) c + t eps, the
mean of the pixels is (1 - t) c + t / sqrt(n) eta with eta ~ N(0, 1). So c is known up to

    sigma(t, n) = t / (1 - t) / sqrt(n)

Set sigma(t_n, n) = sigma(t_m, m), solve for t_m, and write the four functions below. Then run

    python exercises/06_resolution_shift.py

Think first: with four times as many pixels at the same t, is c known better or worse? So must t_m
rise or fall?
"""

import math
import sys

import torch
from marking import mark


def uncertainty(t, n):
    """sigma(t, n). t (B,) in (0, 1); n pixels -> (B,)."""
    raise NotImplementedError


def shift(t, n, m):
    """Eq. 23: the t_m with the uncertainty at m pixels that t has at n pixels. (B,)"""
    raise NotImplementedError


def shift_of_log_snr(n, m):
    """Eq. 25: what the shift adds to the log-SNR 2 log((1 - t) / t), the same number at every t."""
    raise NotImplementedError


def shifted_logit_mean(logit_mean, n, m):
    """t_n is logit-normal with this mean (Eq. 19). Returns the mean of the logit of t_m."""
    raise NotImplementedError


# --- Checks: each returns "" if the answer is right, and a hint if not ----------------------------

T = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
SIZES = ((256**2, 1024**2), (512**2, 1024**2), (1024**2, 256**2), (64**2, 96 * 64))


def check_uncertainty(answers):
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(20000, 64, generator=rng, dtype=torch.float64)
    estimates = (0.6 * 1.5 + 0.4 * noise).mean(1) / 0.6               # c = 1.5, t = .4, 64 pixels
    measured = estimates.std().item()
    ours = answers["uncertainty"](torch.tensor([0.4], dtype=torch.float64), 64).item()
    if abs(ours / measured - 1) < 0.02:
        return ""
    if abs(ours / measured - 1 / 8) < 0.02:
        return "the mean of n pixels has the deviation 1 / sqrt(n), not 1 / n"
    if abs(ours / measured - 0.6) < 0.02:
        return "the mean is (1 - t) c: divide by 1 - t to know c"
    return f"64 pixels at t = 0.4 measured {measured:.4f}"


def check_shift(answers):
    for n, m in SIZES:
        ours = answers["shift"](T, n, m)
        hints = {
            m / n: "alpha is the square root of m / n",
            math.sqrt(n / m): "the other way: more pixels need more noise for the same uncertainty",
        }
        for alpha, hint in hints.items():
            if torch.allclose(ours, alpha * T / (1 + (alpha - 1) * T)):
                return hint
        ratio = ours / (1 - ours)
        if not torch.allclose(ratio / math.sqrt(m), T / (1 - T) / math.sqrt(n)):
            return "solve t_m / (1 - t_m) = sqrt(m / n) t_n / (1 - t_n) for t_m"
    return ""


def check_log_snr(answers):
    for n, m in SIZES:
        ours = answers["shift_of_log_snr"](n, m)
        right = math.log(n / m)
        if abs(ours + right) < 1e-6:
            return "the sign: more noise is less signal"
        if not abs(ours - right) < 1e-6:                              # also of nan
            return "log(t / (1 - t)) rises by log(alpha), and the log-SNR has a factor of -2"
    return ""


def check_density(answers):
    for n, m in SIZES:
        ours = answers["shifted_logit_mean"](0.3, n, m)
        if abs(ours - 0.3 - math.log(m / n)) < 1e-6:
            return "that is the log-SNR's shift; the logit moves by half of it"
        if not abs(ours - 0.3 - math.log(m / n) / 2) < 1e-6:
            return "logit(t_m) = logit(t_n) + log(alpha)"
    return ""


CHECKS = {
    "the uncertainty": check_uncertainty,
    "the shift (23)": check_shift,
    "the log-SNR (25)": check_log_snr,
    "the density": check_density,
}


def show(answers):
    """Fig. 6, top left, as numbers: t at 256 x 256 and at 1024 x 1024 px."""
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    for t_n, t_m in zip(t.tolist(), answers["shift"](t, 256**2, 1024**2).tolist()):
        print(f"t_n = {t_n:.1f}  t_m = {t_m:.3f}  {' ' * round(50 * t_m)}*")


if __name__ == "__main__":
    sys.exit(mark(CHECKS, globals(), show))
