"""Answers to exercise 3.

How often is a sample left without text? .464^3 = .0999, so in about 10 % of all cases (App. B.3).
Which encoder has no pooled vector? T5.
"""

import torch
import torch.nn.functional as F


def combine(clip_l, clip_g, t5, pooled_l, pooled_g):
    clip = torch.cat([clip_l, clip_g], dim=2)                         # (B, L, l + g)
    clip = F.pad(clip, (0, t5.shape[2] - clip.shape[2]))              # (B, L, w)
    context = torch.cat([clip, t5], dim=1)                            # (B, L + T, w)
    return context, torch.cat([pooled_l, pooled_g], dim=1)


def drop(clip_l, clip_g, t5, pooled_l, pooled_g, keep):
    keep_l, keep_g, keep_t5 = keep.unbind(1)                          # (B,) each
    clip_l = clip_l * keep_l[:, None, None]
    clip_g = clip_g * keep_g[:, None, None]
    t5 = t5 * keep_t5[:, None, None]
    return clip_l, clip_g, t5, pooled_l * keep_l[:, None], pooled_g * keep_g[:, None]


def first_end(ids):
    return ids.argmax(dim=1)                                          # the first of equal maxima
