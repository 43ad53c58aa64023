"""Exercise 3 (15 minutes): three text encoders, one context (Sec. 4, App. B.2 and B.3).

c_ctxt is CLIP-L's and CLIP-G's sequences side by side along the channels (77 x 2048), padded with zeros to T5's width (77 x
4096), and T5's sequence behind them along the tokens: 154 x 4096. c_vec is CLIP-L's pooled vector, then CLIP-G's: 2048. In
training each encoder is dropped with probability 46.4 %, sample by sample: all that comes from it becomes zero.

    python exercises/03_text_context.py

Think first: with what probability is a sample left without any text? Which encoder has no pooled vector?
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from marking import mark

import text_encoders


def combine(clip_l, clip_g, t5, pooled_l, pooled_g):
    """(B, L, l), (B, L, g), (B, T, w), (B, l), (B, g) -> context (B, L + T, w), pooled (B, l + g); w >= l + g."""
    raise NotImplementedError


def drop(clip_l, clip_g, t5, pooled_l, pooled_g, keep):
    """keep (B, 3) bool for CLIP-L, CLIP-G, T5 -> the five tensors, with zeros where an encoder is dropped."""
    raise NotImplementedError


def first_end(ids):
    """ids (B, L) -> (B,), where to pool: the first end token, the largest id. CLIP-L also pads with it."""
    raise NotImplementedError


# ------------------------------------------------------------------------------------------------------------
# Checks: each returns "" if the answer is right, else a hint
# ------------------------------------------------------------------------------------------------------------

def outputs():
    """What three small encoders might give for two prompts: 3 CLIP tokens, 4 T5 tokens, widths 2, 3 and 8."""
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=rng) for shape in ((2, 3, 2), (2, 3, 3), (2, 4, 8), (2, 2), (2, 3))]


def check_context(answers):
    context, _ = answers["combine"](*outputs())
    expected, _ = text_encoders.combine(*outputs())
    if context.shape != expected.shape:
        return f"shape {tuple(context.shape)}, it should be {tuple(expected.shape)}: CLIP's tokens, then T5's"
    if torch.equal(context, expected):
        return ""
    if torch.equal(context.roll(3, dims=1), expected):
        return "CLIP's tokens come before T5's"
    return "CLIP-L's channels, CLIP-G's channels, then zeros up to T5's width"


def check_pooled(answers):
    _, pooled = answers["combine"](*outputs())
    _, expected = text_encoders.combine(*outputs())
    if pooled.shape != expected.shape:
        return f"shape {tuple(pooled.shape)}, it should be {tuple(expected.shape)}"
    return "" if torch.equal(pooled, expected) else "CLIP-L's vector comes first; neither is normalised"


def check_drop(answers):
    keep = torch.tensor([[True, False, True], [False, True, False]])
    dropped = answers["drop"](*outputs(), keep)
    if any(part.shape != before.shape for part, before in zip(dropped, outputs())):
        return "shapes must stay as they are: zeros, not fewer tokens"
    config = text_encoders.TextConfig(2, 3, 8, 3, 4)
    expected = text_encoders.drop_encoders(*text_encoders.combine(*outputs()), keep, config)
    ours = text_encoders.combine(*dropped)
    if not torch.equal(ours[0], expected[0]):
        return "each sample has its own choice: keep[:, i] belongs to encoder i"
    return "" if torch.equal(ours[1], expected[1]) else "the pooled vector of a dropped CLIP must be zero too"


def check_end(answers):
    ids = torch.tensor([[98, 5, 99, 99, 99], [98, 7, 8, 99, 0]])
    ours = answers["first_end"](ids)
    if torch.equal(ours, torch.tensor([2, 3])):
        return ""
    return "that is the last one: padding repeats the end token" if ours[0] == 4 else "count positions from 0"


CHECKS = {"the context": check_context, "the pooled vector": check_pooled, "dropping encoders (B.3)": check_drop,
          "where CLIP pools": check_end}


if __name__ == "__main__":
    sys.exit(mark(CHECKS, globals()))
