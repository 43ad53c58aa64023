"""Answers to exercise 6.

Is c known better or worse? Better, by a factor of 2, as the noise of more pixels averages out. So
t_m must rise until c is as uncertain as before.
"""

import math


def uncertainty(t, n):
    return t / (1 - t) / math.sqrt(n)


def shift(t, n, m):
    alpha = math.sqrt(m / n)
    return alpha * t / (1 + (alpha - 1) * t)


def shift_of_log_snr(n, m):
    return -2 * math.log(math.sqrt(m / n))


def shifted_logit_mean(logit_mean, n, m):
    return logit_mean + math.log(math.sqrt(m / n))
