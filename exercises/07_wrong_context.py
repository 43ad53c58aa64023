"""Exercise 7 (30 minutes): the context is wrong; what did they do? (Sec. 4, App. B.2; the conventions of CLIP and T5)

A text encoder with one convention turned round gives a context of the right shape and pictures that are nearly right. Eight
pipelines are given, one of them right. For each you get what its encoders saw and said (`Parts`), and the (context, pooled)
that it made of it. Write the function that finds the mistake, by computing what is right and looking where it differs, then

    python exercises/07_wrong_context.py

What is right: CLIP's part of the context is the input of its last layer, without the final norm; CLIP-L's channels, then
CLIP-G's, then zeros up to T5's width; T5's tokens behind CLIP's, padding included. pooled is the final norm's output at the first
end token (the largest id), CLIP-G's times its projection; CLIP-L's vector, then CLIP-G's. CLIP-L pads with the end token,
CLIP-G with 0.

Think first: why can the tokens before the end not tell you what a row is padded with?
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import text_encoders

MISTAKES = ("none", "final norm", "CLIP-G first", "T5 first", "T5 padding masked", "pooled at the last token",
            "CLIP-G not projected", "CLIP-G padded as CLIP-L")


@dataclass
class Parts:
    """Two prompts in three small encoders. Call clip_l or clip_g with ids: (input of the last layer (B, L, D), the final norm's
    output at the first end token, projected where there is a projection (B, D), the final norm's output everywhere (B, L, D))."""
    clip_l: text_encoders.CLIPTextEncoder
    clip_g: text_encoders.CLIPTextEncoder    # clip_g.projection(x) is its projection
    ids: torch.Tensor                        # (B, L), padded with the end token, the largest id
    t5: torch.Tensor                         # (B, T, width), T5's output
    t5_tokens: torch.Tensor                  # (B,) how many of T5's tokens are not padding


def find_the_mistake(parts, context, pooled):
    """The name, one of MISTAKES, of what is wrong with context (B, L + T, width) and pooled (B, D_l + D_g)."""
    raise NotImplementedError


# ------------------------------------------------------------------------------------------------------------
# Checks: each returns "" if the answer is right, else a hint. Reading on gives the mistakes away
# ------------------------------------------------------------------------------------------------------------

END = 49


def make_parts() -> Parts:
    torch.manual_seed(0)
    config = text_encoders.CLIPConfig(vocab_size=END + 1, hidden_size=64, num_layers=2, max_length=6)
    clips = [text_encoders.CLIPTextEncoder(config),
             text_encoders.CLIPTextEncoder(text_encoders.CLIPConfig(END + 1, 128, 2, 6, "gelu", 128))]
    ids = torch.tensor([[48, 3, 4, END, END, END], [48, 5, END, END, END, END]])
    return Parts(*(clip.eval().requires_grad_(False) for clip in clips), ids, torch.randn(2, 4, 256), torch.tensor([4, 2]))


def make_context(parts: Parts, mistake: str):
    """(context, pooled) with one mistake."""
    first_end = (parts.ids == END).int().argmax(dim=1)
    after_end = torch.arange(parts.ids.shape[1]) > first_end[:, None]
    g_ids = parts.ids if mistake == "CLIP-G padded as CLIP-L" else parts.ids.masked_fill(after_end, 0)
    (l, pooled_l, last_l), (g, pooled_g, last_g) = parts.clip_l(parts.ids), parts.clip_g(g_ids)
    t5 = parts.t5
    if mistake == "final norm":
        l, g = last_l, last_g
    if mistake == "pooled at the last token":
        pooled_l, pooled_g = last_l[:, -1], parts.clip_g.projection(last_g[:, -1])
    if mistake == "CLIP-G not projected":
        pooled_g = last_g[torch.arange(len(g)), first_end]
    if mistake == "T5 padding masked":
        t5 = t5 * (torch.arange(t5.shape[1]) < parts.t5_tokens[:, None])[..., None]
    context, pooled = text_encoders.combine(*((g, l) if mistake == "CLIP-G first" else (l, g)), t5, pooled_l, pooled_g)
    return context.roll(-l.shape[1], dims=1) if mistake == "T5 first" else context, pooled


WHERE = {
    "none": "this one is right: allow for rounding when you compare",
    "final norm": "look at the channels of CLIP-L: which of its outputs are they?",
    "CLIP-G first": "CLIP-G is 128 wide and CLIP-L 64: look at the first channels of a CLIP token",
    "T5 first": "look at the first tokens: are their last channels zero?",
    "T5 padding masked": "look at T5's tokens after the prompt's end, in the second prompt",
    "pooled at the last token": "the context is right: look at pooled, and where the first end token is",
    "CLIP-G not projected": "the context is right, and so is CLIP-L's half of pooled",
    "CLIP-G padded as CLIP-L": "only CLIP-G's channels differ, and only after the end token: its ids should have been others",
}


def check(mistake):
    def checked(answers):
        parts = make_parts()
        found = answers["find_the_mistake"](parts, *make_context(parts, mistake))
        if found not in MISTAKES:
            return f"{found!r} is none of {', '.join(MISTAKES)}"
        return "" if found == mistake else f"not {found!r}; {WHERE[mistake]}"
    return checked


CHECKS = {f"pipeline {i}": check(mistake) for i, mistake in enumerate(
    ("T5 first", "final norm", "none", "CLIP-G padded as CLIP-L", "pooled at the last token", "CLIP-G first",
     "CLIP-G not projected", "T5 padding masked"), 1)}


def main(answers) -> int:
    """Say which checks pass. answers: the functions by name. Returns the number of those that do not."""
    wrong = 0
    for name, check in CHECKS.items():
        try:
            hint = check(answers)
        except NotImplementedError:
            hint = "not written yet"
        except Exception as problem:                     # a shape that does not fit, say: the student sees why
            hint = f"{type(problem).__name__}: {problem}"
        wrong += bool(hint)
        print(f"{'not yet' if hint else 'passed '}  {name}{': ' + hint if hint else ''}")
    return wrong


if __name__ == "__main__":
    sys.exit(min(1, main(globals())))
