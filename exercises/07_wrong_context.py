"""Exercise 7 (25 minutes): a context with one bug in it (App. B.2). Which?

Public reimplementations got the text conditioning wrong in the same few ways, and each time the pictures still looked like
something. Here two prompts went through three small encoders. You get everything that the encoders computed, and a context
and pooled vector that were built from it with one mistake, or with none. Write three functions, then

    python exercises/07_wrong_context.py

The conventions: CLIP gives its second-to-last hidden state, as it is; T5 its last one after the final norm; along the channels
CLIP-L, CLIP-G, zeros; along the tokens CLIP, T5; padding is kept; the pooled vector is the last state after the final norm
at the first end token, CLIP-L's, then CLIP-G's.

Think first: which of these mistakes could a network that is trained from scratch with them simply get used to?
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from marking import mark

import text_encoders

BUGS = {"none": "everything is as it should be",
        "last layer": "CLIP's last hidden state in place of the one before it",
        "final norm": "CLIP's final norm on its second-to-last state",
        "clip order": "CLIP-G's channels before CLIP-L's",
        "token order": "T5's tokens before CLIP's",
        "t5 norm": "T5's state without its final norm",
        "padding": "zeros in place of T5's tokens after the end token",
        "pooling": "pooled at the last token in place of the first end token"}


def clip_context(seen):
    """seen: what `Seen` holds -> (B, L, l + g), CLIP-L's and CLIP-G's share of the context without the zeros beside it."""
    raise NotImplementedError


def pooled_vector(seen):
    """seen -> (B, l + g)."""
    raise NotImplementedError


def diagnose(context, pooled, seen):
    """context (B, L + T, w), pooled (B, l + g), seen -> the one name of BUGS that explains them."""
    raise NotImplementedError


class Seen:
    """What the encoders computed for B = 2 prompts: L = 5 CLIP tokens, T = 4 T5 tokens; widths l = 2, g = 3, w = 8.

    clip_l, clip_g   lists of hidden states (B, L, l) or (B, L, g): the embeddings, then the output of every layer
    norm_l, norm_g   the final norms, functions; norm_t5 is T5's
    t5               list of hidden states (B, T, w)
    clip_ids, t5_ids (B, L) and (B, T): 99 ends a CLIP prompt and fills up its row; 1 ends a T5 prompt, 0 fills up
    """

    def __init__(self, seed: int):
        rng = torch.Generator().manual_seed(seed)
        states = lambda layers, *shape: [torch.randn(shape, generator=rng) for _ in range(layers + 1)]
        norm = lambda gain: lambda x: gain * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + 0.1
        self.clip_l, self.clip_g, self.t5 = states(3, 2, 5, 2), states(4, 2, 5, 3), states(2, 2, 4, 8)
        self.norm_l, self.norm_g, self.norm_t5 = norm(1.5), norm(0.7), lambda x: x / x.square().mean(-1, keepdim=True).sqrt()
        self.clip_ids = torch.tensor([[98, 5, 99, 99, 99], [98, 7, 8, 6, 99]])
        self.t5_ids = torch.tensor([[5, 1, 0, 0], [7, 8, 6, 1]])


# ------------------------------------------------------------------------------------------------------------
# Checks: each returns "" if the answer is right, else a hint
# ------------------------------------------------------------------------------------------------------------

def build(seen, bug="none"):
    """(context, pooled) with one of BUGS."""
    layer = -1 if bug == "last layer" else -2
    l, g = (norm(x[layer]) if bug == "final norm" else x[layer]
            for x, norm in ((seen.clip_l, seen.norm_l), (seen.clip_g, seen.norm_g)))
    t5 = seen.t5[-1] if bug == "t5 norm" else seen.norm_t5(seen.t5[-1])
    if bug == "padding":
        t5 = t5 * (seen.t5_ids != 0)[:, :, None]
    end = torch.tensor([4, 4]) if bug == "pooling" else (seen.clip_ids == 99).int().argmax(1)
    rows = torch.arange(len(end))
    pooled = [norm(x[-1])[rows, end] for x, norm in ((seen.clip_l, seen.norm_l), (seen.clip_g, seen.norm_g))]
    context, pooled = text_encoders.combine(*((g, l) if bug == "clip order" else (l, g)), t5, *pooled)
    return (context.roll(4, dims=1) if bug == "token order" else context), pooled


def check_clip(answers):
    seen = Seen(0)
    ours, right = answers["clip_context"](seen), build(seen)[0][:, :5, :5]
    if ours.shape != right.shape:
        return f"shape {tuple(ours.shape)}, it should be {tuple(right.shape)}: channels side by side"
    if torch.equal(ours, right):
        return ""
    if torch.equal(ours, build(seen, "last layer")[0][:, :5, :5]):
        return "that is the last state; the list's last but one is meant"
    return "the second-to-last state of each, as it is: no norm, CLIP-L first"


def check_pooled(answers):
    seen = Seen(0)
    ours, right = answers["pooled_vector"](seen), build(seen)[1]
    if ours.shape != right.shape:
        return f"shape {tuple(ours.shape)}, it should be {tuple(right.shape)}"
    if torch.allclose(ours, right):
        return ""
    if torch.allclose(ours, build(seen, "pooling")[1]):
        return "that is the last token; CLIP-L fills up with its end token, so look for the first one"
    return "the last state, through the final norm, at the first end token"


def check_diagnosis(answers):
    for seed, bug in enumerate(BUGS):
        said = answers["diagnose"](*build(Seen(seed), bug), Seen(seed))
        if said not in BUGS:
            return f"{said!r} is not one of {', '.join(BUGS)}"
        if said != bug:
            return f"you said {said!r}, but it is {bug!r}: {BUGS[bug]}"
    return ""


CHECKS = {"CLIP's share": check_clip, "the pooled vector": check_pooled, "eight cases": check_diagnosis}


if __name__ == "__main__":
    sys.exit(mark(CHECKS, globals()))
