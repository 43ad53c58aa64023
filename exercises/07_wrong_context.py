"""Exercise 7 (25 minutes): a context with one bug in it (App. B.2). Which?

Public reimplementations got the text conditioning wrong in the same few ways, and the pictures
still looked like something each time. Here two prompts went through three small encoders. You get
everything that the encoders computed. You also get a context and a pooled vector that were built
from it with one mistake, or with none. Write three functions, then run

    python exercises/07_wrong_context.py

The conventions: CLIP gives its second-to-last hidden state as it is. T5 gives its last one after
its final norm. The channels are CLIP-L, CLIP-G, zeros. The tokens are CLIP's, then T5's. Padding
stays. The pooled vector is the last state after the final norm at the first end token: CLIP-L's,
then CLIP-G's.

Think first: which mistakes could a network that is trained with them get used to?
"""

import sys

import torch
from marking import mark

BUGS = {
    "none": "everything is as it should be",
    "last layer": "CLIP's last hidden state in place of the one before it",
    "final norm": "CLIP's final norm on its second-to-last state",
    "clip order": "CLIP-G's channels before CLIP-L's",
    "token order": "T5's tokens before CLIP's",
    "t5 norm": "T5's state without its final norm",
    "padding": "zeros in place of T5's tokens after the end token",
    "pooling": "pooled at the last token in place of the first end token",
}


def clip_context(seen):
    """seen, a `Seen` -> (B, L, l + g): CLIP's part of the context without the zeros beside it."""
    raise NotImplementedError


def pooled_vector(seen):
    """seen -> (B, l + g)."""
    raise NotImplementedError


def diagnose(context, pooled, seen):
    """context (B, L + T, w), pooled (B, l + g), seen -> the one name of BUGS that explains them."""
    raise NotImplementedError


class Seen:
    """What the encoders computed for B = 2 prompts: L = 5 CLIP tokens, T = 4 T5 tokens.

    clip_l, clip_g   lists of hidden states (B, L, 2) and (B, L, 3): embeddings, then every layer
    t5               list of hidden states (B, T, 8)
    norm_l, norm_g, norm_t5     the final norms, functions
    clip_ids, t5_ids (B, L), (B, T): 99 ends a CLIP prompt and fills up; 1 ends T5's, 0 fills up
    """

    def __init__(self, seed):
        rng = torch.Generator().manual_seed(seed)
        self.clip_l = list(torch.randn(4, 2, 5, 2, generator=rng))
        self.clip_g = list(torch.randn(5, 2, 5, 3, generator=rng))
        self.t5 = list(torch.randn(3, 2, 4, 8, generator=rng))
        self.clip_ids = torch.tensor([[98, 5, 99, 99, 99], [98, 7, 8, 6, 99]])
        self.t5_ids = torch.tensor([[5, 1, 0, 0], [7, 8, 6, 1]])

    def norm_l(self, x):
        return 1.5 * torch.nn.functional.layer_norm(x, (2,)) + 0.1

    def norm_g(self, x):
        return 0.7 * torch.nn.functional.layer_norm(x, (3,)) - 0.2

    def norm_t5(self, x):
        return torch.nn.functional.rms_norm(x, (8,))


# --- Checks: each returns "" if the answer is right, and a hint if not ----------------------------

def build_context(seen, bug):
    """The context with one of BUGS. (B, L + T, 8)"""
    layer = -1 if bug == "last layer" else -2
    clip_l, clip_g = seen.clip_l[layer], seen.clip_g[layer]
    if bug == "final norm":
        clip_l, clip_g = seen.norm_l(clip_l), seen.norm_g(clip_g)
    parts = [clip_l, clip_g, torch.zeros(2, 5, 3)]
    if bug == "clip order":
        parts = [clip_g, clip_l, torch.zeros(2, 5, 3)]
    clip = torch.cat(parts, dim=2)
    t5 = seen.t5[-1] if bug == "t5 norm" else seen.norm_t5(seen.t5[-1])
    if bug == "padding":
        t5 = t5 * (seen.t5_ids != 0)[:, :, None]
    if bug == "token order":
        return torch.cat([t5, clip], dim=1)
    return torch.cat([clip, t5], dim=1)


def build_pooled(seen, bug):
    """The pooled vector with one of BUGS. (B, 5)"""
    ends = (4, 4) if bug == "pooling" else (2, 4)
    vectors = []
    for i, end in enumerate(ends):
        pooled_l = seen.norm_l(seen.clip_l[-1])[i, end]
        pooled_g = seen.norm_g(seen.clip_g[-1])[i, end]
        vectors.append(torch.cat([pooled_l, pooled_g]))
    return torch.stack(vectors)


def check_clip(answers):
    seen = Seen(0)
    ours = answers["clip_context"](seen)
    if ours.shape != (2, 5, 5):
        return f"shape {tuple(ours.shape)}, it should be (2, 5, 5): channels side by side"
    if torch.equal(ours, build_context(seen, "last layer")[:, :5, :5]):
        return "that is the last state; the list's last but one is meant"
    if not torch.equal(ours, build_context(seen, "none")[:, :5, :5]):
        return "the second-to-last state of each, as it is: no norm, CLIP-L first"
    return ""


def check_pooled(answers):
    seen = Seen(0)
    ours = answers["pooled_vector"](seen)
    if ours.shape != (2, 5):
        return f"shape {tuple(ours.shape)}, it should be (2, 5)"
    if torch.allclose(ours, build_pooled(seen, "pooling")):
        return "that is the last token; CLIP-L pads with its end token, so look for the first one"
    if not torch.allclose(ours, build_pooled(seen, "none")):
        return "the last state, through the final norm, at the first end token"
    return ""


def check_diagnosis(answers):
    for seed, bug in enumerate(BUGS):
        seen = Seen(seed)
        said = answers["diagnose"](build_context(seen, bug), build_pooled(seen, bug), seen)
        if said not in BUGS:
            return f"{said!r} is not one of {', '.join(BUGS)}"
        if said != bug:
            return f"you said {said!r}, but it is {bug!r}: {BUGS[bug]}"
    return ""


CHECKS = {
    "CLIP's share": check_clip,
    "the pooled vector": check_pooled,
    "eight cases": check_diagnosis,
}


if __name__ == "__main__":
    sys.exit(mark(CHECKS, globals()))
