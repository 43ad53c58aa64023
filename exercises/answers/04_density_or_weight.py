"""Answers to exercise 4.

Which mean has the smaller variance? Sampling, as long as the loss does not fall where pi is large:
all its terms count alike, while weighting computes many terms and then multiplies them by little.
Why does the paper draw from pi? For the same reason: no evaluation of the network is wasted.
"""

import torch


def rf_weight(t, pdf):
    return t / (1 - t) * pdf


def mean_by_weighting(loss, pdf, t):
    return (loss(t) * pdf(t)).mean()


def mean_by_sampling(loss, quantile, u):
    return loss(quantile(u)).mean()


def noise_error_factor_of_edm(log_snr):
    return torch.exp(-log_snr) + 0.5**2
