"""Exercise 4 (20 minutes): drawing t from a density is the same as weighting the loss by it, so never do both (Eq. 18).

The study writes every loss as L_w = -1/2 E_U(t) [ w_t lambda'_t |eps_Theta - eps|^2 ]. With t drawn from pi instead of U,

    w_t^pi = t / (1 - t) pi(t)        (18)        for rectified flow, whose own weight under uniform t is t / (1 - t)

EDM's weight (16) holds the density of its log-SNR already. Write the four functions below, then

    python exercises/04_density_or_weight.py

Think first: which of the two means has the smaller variance, and why does the paper draw from pi?
"""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from marking import mark

import flow


def rf_weight(t, pdf):
    """w_t^pi of Eq. 18. t (B,) in (0, 1), pdf (B,) = pi(t) -> (B,)."""
    raise NotImplementedError


def mean_by_weighting(loss, pdf, t):
    """An estimate of the training loss from uniform times t (B,): loss(t) and pdf(t) are functions (B,) -> (B,)."""
    raise NotImplementedError


def mean_by_sampling(loss, quantile, u):
    """An estimate of the same number from uniform u (B,), with times t = quantile(u) of the density pi."""
    raise NotImplementedError


def what_multiplies_the_noise_error_in_edm(log_snr):
    """-1/2 w_t lambda'_t of EDM under uniform t, without its constant factor, as a function of log_snr (B,): what is left of
    Eq. 16 once lambda' is multiplied in. (Under uniform t, log_snr has the normal density of Eq. 15, so 1 / -lambda' is
    that density.)"""
    raise NotImplementedError


# ------------------------------------------------------------------------------------------------------------
# Checks: each returns "" if the answer is right, else a hint
# ------------------------------------------------------------------------------------------------------------

DENSITY = flow.LogitNormal(0.5, 0.8)


def true_loss(t):
    """A loss by level of noise, as a trained network might have it."""
    return 1 / ((1 - t).square() + t.square())


def check_weight(answers):
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    ours, right = answers["rf_weight"](t, DENSITY.pdf(t)), flow.RectifiedFlow(DENSITY).weight(t)
    if torch.allclose(ours, right):
        return ""
    if torch.allclose(ours, DENSITY.pdf(t)):
        return "that weights |v - u|^2; L_w weights |eps_Theta - eps|^2, where rectified flow has t / (1 - t) even for uniform t"
    return "rectified flow's own weight, t / (1 - t), times the density"


def check_means(answers, which):
    u = flow.uniform_draws(200000, torch.Generator().manual_seed(0), stratified=True)
    truth = true_loss(DENSITY.quantile((torch.arange(200000) + 0.5).double() / 200000)).mean()
    t = DENSITY.quantile(u)
    both = (true_loss(t) * DENSITY.pdf(t)).mean()
    if which == "weighting":
        ours = answers["mean_by_weighting"](true_loss, DENSITY.pdf, u)
    else:
        ours = answers["mean_by_sampling"](true_loss, DENSITY.quantile, u)
    if abs(ours - truth) < 1e-3:
        return ""
    if abs(ours - both) < 1e-3:
        return "that is both at once: the density is counted twice (the mean would be that of pi squared)"
    if abs(ours - true_loss(u).mean()) < 1e-3:
        return "that is the mean under uniform t: the density is missing"
    return "the mean of loss(t) pi(t) over uniform t" if which == "weighting" else "the mean of loss(t) over t drawn from pi"


def check_edm(answers):
    form = flow.formulation("edm(-1.20, 1.20)")
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    log_snr = form.process.log_snr(t)
    ours = answers["what_multiplies_the_noise_error_in_edm"](log_snr)
    right = -0.5 * form.weight(t) * form.process.log_snr_slope(t)
    same = lambda x, y: torch.allclose(x / x[0], y / y[0], rtol=1e-6)
    if same(ours, right):
        return ""
    if same(ours, flow.edm_weight(log_snr, -1.2, 1.2)):
        return "that is Eq. 16 itself; lambda' = -1 / N(lambda), so the normal density cancels"
    if same(ours, torch.exp(-log_snr)):
        return "and sigma_data = 0.5, squared"
    return f"what stands behind the density in Eq. 16; at log-SNR 0 it is {math.exp(0) + 0.25} up to a factor"


CHECKS = {"the weight (18)": check_weight, "the mean by weighting": lambda answers: check_means(answers, "weighting"),
          "the mean by sampling": lambda answers: check_means(answers, "sampling"), "what is left of (16)": check_edm}


if __name__ == "__main__":
    sys.exit(mark(CHECKS, globals()))
