"""Exercise 4 (20 minutes): drawing t from a density or weighting the loss by it (Eq. 18).

The study writes every loss as L_w = -1/2 E [ w_t lambda'_t |eps_Theta - eps|^2 ], with t uniform.
Drawing t from a density pi instead has the weight

    w_t^pi = t / (1 - t) pi(t)        (18)

for rectified flow, whose own weight under uniform t is t / (1 - t). Drawing from pi is the same as
weighting by pi, so nobody should do both. Write the four functions below, then run

    python exercises/04_density_or_weight.py

Think first: which of the two means below has the smaller variance? Why does the paper draw from pi?
"""

import math
import sys

import torch
from marking import mark


def rf_weight(t, pdf):
    """w_t^pi of Eq. 18. t (B,) in (0, 1); pdf (B,) is pi(t) -> (B,)."""
    raise NotImplementedError


def mean_by_weighting(loss, pdf, t):
    """An estimate of the training loss from uniform times t (B,). loss(t), pdf(t): (B,) -> (B,)."""
    raise NotImplementedError


def mean_by_sampling(loss, quantile, u):
    """An estimate of the same number from uniform u (B,), with times t = quantile(u) of pi."""
    raise NotImplementedError


def noise_error_factor_of_edm(log_snr):
    """-1/2 w_t lambda'_t of EDM under uniform t, up to a constant, as a function of log_snr (B,).

    w_t is Eq. 16. Under uniform t, log_snr has the normal density of Eq. 15, which is -1 / lambda'.
    """
    raise NotImplementedError


# --- Checks: each returns "" if the answer is right, and a hint if not ----------------------------

# pi(t) = 2 t has the quantiles sqrt(u). For the loss t^2, all means are known fractions.
MEAN, UNIFORM_MEAN, COUNTED_TWICE = 1 / 2, 1 / 3, 4 / 5


def pdf(t):
    return 2 * t


def quantile(u):
    return u.sqrt()


def loss(t):
    return t**2


def check_weight(answers):
    t = torch.rand(20, generator=torch.Generator().manual_seed(0)) * 0.98 + 0.01
    for power in (0, 1, 2):
        density = (power + 1) * t**power
        ours = answers["rf_weight"](t, density)
        if torch.allclose(ours, density):
            return "that weights |v - u|^2. L_w weights |eps_Theta - eps|^2: t / (1 - t) more"
        if not torch.allclose(ours, t / (1 - t) * density):
            return "rectified flow's own weight, t / (1 - t), times the density"
    return ""


def hint_for_mean(ours, right_way):
    if abs(ours - MEAN) < 1e-3:
        return ""
    if abs(ours - COUNTED_TWICE) < 1e-3:
        return "that is both at once: the density is counted twice"
    if abs(ours - UNIFORM_MEAN) < 1e-3:
        return "that is the mean under uniform t: the density is missing"
    return right_way


def check_weighting(answers):
    t = (torch.arange(10000) + 0.5) / 10000
    ours = float(answers["mean_by_weighting"](loss, pdf, t))
    return hint_for_mean(ours, "the mean of loss(t) pi(t) over uniform t")


def check_sampling(answers):
    u = (torch.arange(10000) + 0.5) / 10000
    ours = float(answers["mean_by_sampling"](loss, quantile, u))
    return hint_for_mean(ours, "the mean of loss(t) over t = quantile(u)")


def check_edm(answers):
    log_snr = torch.linspace(-6, 8, 15, dtype=torch.float64)
    ours = answers["noise_error_factor_of_edm"](log_snr)
    ours = ours / ours[0]                                             # any constant factor is right
    right = torch.exp(-log_snr) + 0.5**2
    normal = torch.exp(-((log_snr - 2.4) / 2.4).square() / 2)         # P_m = -1.2, P_s = 1.2
    if torch.allclose(ours, normal * right / (normal * right)[0]):
        return "that is Eq. 16 itself; lambda' = -1 / N(lambda), so the normal density cancels"
    if torch.allclose(ours, torch.exp(-log_snr) / math.exp(6)):
        return "the 0.5^2 of Eq. 16 is missing"
    if not torch.allclose(ours, right / right[0]):
        return "what stands behind the density in Eq. 16; at log-SNR 0 it is 1.25 up to a factor"
    return ""


CHECKS = {
    "the weight (18)": check_weight,
    "the mean by weighting": check_weighting,
    "the mean by sampling": check_sampling,
    "what is left of (16)": check_edm,
}


if __name__ == "__main__":
    sys.exit(mark(CHECKS, globals()))
