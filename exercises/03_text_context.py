"""Exercise 3 (15 minutes): three text encoders, one context (Sec. 4, App. B.2 and B.3).

c_ctxt: the sequences of CLIP-L and CLIP-G stand side by side along the channels (77 x 2048). Zeros
fill them up to T5's width (77 x 4096). T5's sequence follows along the tokens: 154 x 4096. c_vec is
CLIP-L's pooled vector, then CLIP-G's: 2048. In training each encoder is dropped with probability
46.4 %, sample by sample: everything that comes from it becomes zero. Write three functions, then

    python exercises/03_text_context.py

Think first: how often is a sample left without any text? Which encoder has no pooled vector?
"""

import sys

import torch
from marking import mark


def combine(clip_l, clip_g, t5, pooled_l, pooled_g):
    """Returns context (B, L + T, w) and pooled (B, l + g).

    clip_l (B, L, l), clip_g (B, L, g), t5 (B, T, w), w >= l + g; pooled_l (B, l), pooled_g (B, g)
    """
    raise NotImplementedError


def drop(clip_l, clip_g, t5, pooled_l, pooled_g, keep):
    """keep (B, 3) bool for CLIP-L, CLIP-G, T5 -> the five tensors, zero where one is dropped."""
    raise NotImplementedError


def first_end(ids):
    """ids (B, L) -> (B,): the place of the first end token, which is the largest id.

    CLIP pools there. CLIP-L also fills its rows up with the end token.
    """
    raise NotImplementedError


# --- Checks: each returns "" if the answer is right, and a hint if not ----------------------------

def outputs(seed):
    """What three small encoders might give, with random sizes: a list of five tensors."""
    rng = torch.Generator().manual_seed(seed)
    B, L, T, l, g, more = torch.randint(2, 6, (6,), generator=rng).tolist()
    tensors = []
    for shape in ((B, L, l), (B, L, g), (B, T, l + g + more), (B, l), (B, g)):
        tensors.append(torch.randn(shape, generator=rng))
    return tensors


def check_context(answers):
    for seed in range(4):
        clip_l, clip_g, t5, pooled_l, pooled_g = outputs(seed)
        L, T = clip_l.shape[1], t5.shape[1]
        l, g = clip_l.shape[2], clip_g.shape[2]
        context, _ = answers["combine"](clip_l, clip_g, t5, pooled_l, pooled_g)
        right = (len(t5), L + T, t5.shape[2])
        if context.shape != right:
            return f"shape {tuple(context.shape)}, it should be {right}: CLIP's tokens, then T5's"
        if torch.equal(context[:, :T], t5):
            return "CLIP's tokens come before T5's"
        in_order = torch.equal(context[:, :L, :l], clip_l)
        in_order = in_order and torch.equal(context[:, :L, l : l + g], clip_g)
        if not in_order or context[:, :L, l + g :].any() or not torch.equal(context[:, L:], t5):
            return "CLIP-L's channels, CLIP-G's channels, then zeros up to T5's width"
    return ""


def check_pooled(answers):
    clip_l, clip_g, t5, pooled_l, pooled_g = outputs(0)
    _, pooled = answers["combine"](clip_l, clip_g, t5, pooled_l, pooled_g)
    l, g = pooled_l.shape[1], pooled_g.shape[1]
    if pooled.shape != (len(t5), l + g):
        return f"shape {tuple(pooled.shape)}, it should be {(len(t5), l + g)}"
    if not torch.equal(pooled[:, :l], pooled_l) or not torch.equal(pooled[:, l:], pooled_g):
        return "CLIP-L's vector comes first; neither is normalised"
    return ""


def check_drop(answers):
    for seed in range(4):
        tensors = outputs(seed)
        B = len(tensors[0])
        keep = torch.rand(B, 3, generator=torch.Generator().manual_seed(seed)) < 0.5
        dropped = answers["drop"](*tensors, keep)
        if len(dropped) != len(tensors):
            return f"{len(dropped)} tensors, it should be all {len(tensors)}, the pooled ones too"
        encoders = (0, 1, 2, 0, 1)                                    # which one each tensor is of
        for ours, before, encoder in zip(dropped, tensors, encoders):
            if ours.shape != before.shape:
                return "shapes must stay as they are: zeros, not fewer tokens"
            for i in range(B):
                right = before[i] if keep[i, encoder] else torch.zeros_like(before[i])
                if torch.equal(ours[i], right):
                    continue
                if before.dim() == 2:
                    return "the pooled vector of a dropped CLIP must be zero too"
                return "each sample has its own choice: keep[:, i] belongs to encoder i"
    return ""


def check_end(answers):
    ids = torch.tensor([[98, 5, 99, 99, 99], [98, 7, 8, 99, 0], [98, 99, 99, 99, 99]])
    ours = answers["first_end"](ids).tolist()
    if ours[0] == 4:
        return "that is the last one: padding repeats the end token"
    if ours != [2, 3, 1]:
        return "count positions from 0"
    return ""


CHECKS = {
    "the context": check_context,
    "the pooled vector": check_pooled,
    "dropping encoders (B.3)": check_drop,
    "where CLIP pools": check_end,
}


if __name__ == "__main__":
    sys.exit(mark(CHECKS, globals()))
