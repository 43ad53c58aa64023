"""text_encoders.py: prompt -> (context, pooled) with CLIP-L, CLIP-G and T5 (SD3, arXiv:2403.03206v1, Sec. 4, App. B.2).

Read with   Sec. 4 and App. B.2 for the combination; Radford et al. 2021 for CLIP; Raffel et al. 2019 for T5
Not here    CLIP's image tower (evaluate.py), T5's decoder (experiments/pretrain_tiny.py), files (checkpoints.py)
Shapes      B batch   L text tokens   ids (B, L) int64   context (B, L_clip + L_t5, context_dim)   pooled (B, pooled_dim)
            in the paper L_clip = L_t5 = 77, context_dim = 4096, pooled_dim = 768 + 1280
Masks       CLIP is causal; otherwise nothing is masked: padding is attended to and is part of the context, as in SD3
Run         python text_encoders.py "a red circle"     prints the tokens and how near other prompts are
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

ENCODERS = ("clip_l", "clip_g", "t5")


def split_heads(x, num_heads):
    """(B, L, D) -> (B, heads, L, D / heads)"""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x):
    """(B, heads, L, d) -> (B, L, heads * d)"""
    return x.transpose(1, 2).flatten(2)


# ------------------------------------------------------------------------------------------------------------
# CLIP text transformer
# ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of a CLIP text encoder. The defaults are CLIP-L/14; CLIP-bigG has 1280, 32 layers, "gelu", 1280."""
    vocab_size: int = 49408            # the start token is vocab_size - 2, the end token vocab_size - 1
    hidden_size: int = 768
    num_layers: int = 12
    max_length: int = 77               # learned positions
    activation: str = "quick_gelu"     # CLIP-L: x * sigmoid(1.702 x); CLIP-G: "gelu", the exact one
    projection_dim: int | None = None  # of the pooled vector; SD3 projects CLIP-G's and leaves CLIP-L's alone

    @property
    def num_heads(self) -> int:        # 12 for CLIP-L, 20 for CLIP-G: 64 channels a head
        return self.hidden_size // 64


def quick_gelu(x):
    """CLIP-L's activation: an approximation of GELU with one sigmoid."""
    return x * torch.sigmoid(1.702 * x)


class CLIPLayer(nn.Module):
    """Pre-norm transformer layer. (B, L, D) -> (B, L, D). Text is causal; the image tower (evaluate.py) is not."""

    def __init__(self, config, causal: bool = True):
        super().__init__()
        D = config.hidden_size
        self.num_heads, self.causal = config.num_heads, causal
        self.activation = {"quick_gelu": quick_gelu, "gelu": F.gelu}[config.activation]
        self.norm1 = nn.LayerNorm(D, eps=1e-5)
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))
        self.norm2 = nn.LayerNorm(D, eps=1e-5)
        self.fc1, self.fc2 = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (split_heads(linear(h), self.num_heads) for linear in (self.q, self.k, self.v))
        x = x + self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


class CLIPTextEncoder(nn.Module):
    """ids (B, L) -> (penultimate (B, L, D), pooled (B, D or projection_dim), last (B, L, D))."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_length, config.hidden_size)
        self.layers = nn.ModuleList(CLIPLayer(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.projection = None
        if config.projection_dim:
            self.projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, ids):
        """penultimate: what SD3 takes as context, the input of the last layer, *without* the final norm.
        pooled: the final norm's output at the first end token, projected where there is a projection; no L2 norm.
        last: the final norm's output everywhere."""
        B, L = ids.shape
        if L > self.config.max_length:
            raise ValueError(f"{L} tokens, but this CLIP has {self.config.max_length} positions; tokenize to at most that")
        x = self.token_embedding(ids) + self.position_embedding.weight[:L]            # (B, L, D)
        for layer in self.layers:
            penultimate = x
            x = layer(x)
        last = self.final_norm(x)                                                     # (B, L, D)
        end = ids.argmax(dim=-1)                                                      # (B,) the end token is the largest id
        pooled = last[torch.arange(B, device=ids.device), end]                        # (B, D)
        return penultimate, pooled if self.projection is None else self.projection(pooled), last


# ------------------------------------------------------------------------------------------------------------
# T5 v1.1 encoder
# ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder. The defaults are T5-XXL: 4.7 B parameters."""
    vocab_size: int = 32128            # 32000 pieces, 100 sentinels <extra_id_N>, rounded up
    hidden_size: int = 4096
    ff_size: int = 10240
    num_layers: int = 24
    num_heads: int = 64                # of 64 channels each
    num_buckets: int = 32              # relative positions are grouped: exact when near, logarithmic when far
    max_distance: int = 128


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-6) * weight: no mean, no bias. Computed in fp32."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), eps=1e-6).to(x.dtype)


def relative_position_bucket(distance, num_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True):
    """Bucket of `distance` = key position - query position (int tensor of any shape), as in T5.

    Half of the buckets are for keys after the query (none, in a decoder, which sees only earlier keys). Of each half, one
    half again holds small distances exactly, the other grows logarithmically up to max_distance.
    """
    first = torch.zeros_like(distance)
    if bidirectional:
        num_buckets //= 2
        first = (distance > 0).long() * num_buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp_min(0)
    exact = num_buckets // 2
    octave = torch.log(distance.clamp_min(1).float() / exact) / math.log(max_distance / exact)
    far = exact + (octave * (num_buckets - exact)).long()
    return first + torch.where(distance < exact, distance, far.clamp_max(num_buckets - 1))


class T5Attention(nn.Module):
    """Attention without 1/sqrt(d) and without biases in its projections. `bias` (1, heads, L, K) is added to the logits."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.num_heads = config.num_heads
        inner = 64 * config.num_heads
        self.q, self.k, self.v = (nn.Linear(config.hidden_size, inner, bias=False) for _ in range(3))
        self.out = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x, bias, source=None):
        source = x if source is None else source                                      # another sequence: cross-attention
        q = split_heads(self.q(x), self.num_heads)
        k, v = (split_heads(linear(source), self.num_heads) for linear in (self.k, self.v))
        mask = None if bias is None else bias.to(q.dtype)
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)))


class T5FeedForward(nn.Module):
    """Gated tanh-GELU: down(gelu(gate(x)) * up(x))."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.ff_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.ff_size, bias=False)
        self.down = nn.Linear(config.ff_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.gate(x), approximate="tanh") * self.up(x))


class T5Layer(nn.Module):
    """Pre-norm layer. (B, L, D) -> (B, L, D)."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.norm1, self.attention = RMSNorm(config.hidden_size), T5Attention(config)
        self.norm2, self.feed_forward = RMSNorm(config.hidden_size), T5FeedForward(config)

    def forward(self, x, bias):
        x = x + self.attention(self.norm1(x), bias)
        return x + self.feed_forward(self.norm2(x))


class T5Encoder(nn.Module):
    """ids (B, L) -> last hidden state after the final norm (B, L, D). One table of position biases serves every layer."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_bias = nn.Embedding(config.num_buckets, config.num_heads)
        self.layers = nn.ModuleList(T5Layer(config) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size)

    def attention_bias(self, L: int, device=None):
        """(1, heads, L, L): what is added to the logit of (query, key), by their distance."""
        position = torch.arange(L, device=device)
        distance = position[None, :] - position[:, None]                              # key - query
        bucket = relative_position_bucket(distance, self.config.num_buckets, self.config.max_distance)
        return self.position_bias(bucket).permute(2, 0, 1).unsqueeze(0)

    def forward(self, ids, mask=None):
        """mask (B, L), 1 = attend: for uses outside of SD3, which masks nothing."""
        bias = self.attention_bias(ids.shape[1], ids.device)
        if mask is not None:
            bias = bias + torch.where(mask.bool(), 0.0, -torch.inf)[:, None, None, :]  # (B, heads, L, L)
        x = self.token_embedding(ids)
        for layer in self.layers:
            x = layer(x, bias)
        return self.final_norm(x)


# ------------------------------------------------------------------------------------------------------------
# Tokenizers
# ------------------------------------------------------------------------------------------------------------

def pad(rows, length: int, padding: int) -> torch.Tensor:
    """Lists of ids -> (B, length) int64, padded on the right."""
    return torch.tensor([row + [padding] * (length - len(row)) for row in rows], dtype=torch.int64)


class CLIPTokenizer:
    """CLIP's byte-level BPE from a folder with vocab.json and merges.txt, through the `tokenizers` library.

    Text is NFC-normalised, white space collapsed, lower-cased; mojibake and HTML entities are left as they are (OpenAI's
    own tokenizer repairs them with ftfy, the one that ships with SD3 does not). "<|endoftext|>" in a prompt is the token.
    """

    def __init__(self, folder, padding: int | None = None):
        """padding: the id that fills up a row; None means the end token (CLIP-L), SD3's CLIP-G has 0."""
        folder = Path(folder)
        bpe = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"), continuing_subword_prefix="",
                                   end_of_word_suffix="</w>", unk_token="<|endoftext|>")
        self.backend = Tokenizer(bpe)
        self.backend.normalizer, self.backend.pre_tokenizer = clip_text_rules()
        self.backend.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
        self.start, self.end = (self.backend.token_to_id(token) for token in ("<|startoftext|>", "<|endoftext|>"))
        self.padding = self.end if padding is None else padding
        self.vocab_size = self.backend.get_vocab_size()

    def __call__(self, prompts, length: int = 77):
        """prompts -> (ids (B, length), tokens needed (list of int)). Longer prompts keep start, the first tokens and end."""
        rows = [encoding.ids for encoding in self.backend.encode_batch(list(prompts))]
        kept = [[self.start, *row[: length - 2], self.end] for row in rows]
        return pad(kept, length, self.padding), [len(row) + 2 for row in rows]

    def pieces(self, ids):
        """The text of each id, to look at."""
        return [self.backend.id_to_token(int(i)) for i in ids]


def clip_text_rules():
    """(normalizer, pre_tokenizer) of CLIP's tokenizer: also what a new vocabulary is trained with."""
    words = Regex(r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")
    return (normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]),
            pre_tokenizers.Sequence([pre_tokenizers.Split(words, behavior="removed", invert=True),
                                     pre_tokenizers.ByteLevel(add_prefix_space=False)]))


class T5Tokenizer:
    """T5's SentencePiece model from a spiece.model file; ids end with 1 and are padded with 0.

    Special tokens written out in a prompt (</s>, <extra_id_0>) are read as text, as SentencePiece itself does.
    """

    def __init__(self, file):
        self.backend = sentencepiece.SentencePieceProcessor(model_file=str(file))
        self.vocab_size = self.backend.get_piece_size()

    def __call__(self, prompts, length: int = 77):
        """prompts -> (ids (B, length), tokens needed (list of int)). Longer prompts are cut before the end token."""
        rows = self.backend.encode(list(prompts))
        return pad([row[: length - 1] + [1] for row in rows], length, 0), [len(row) + 1 for row in rows]

    def pieces(self, ids):
        """The text of each id, to look at (sentinels lie beyond the model's own pieces)."""
        n = self.vocab_size
        return [self.backend.id_to_piece(int(i)) if i < n else f"<extra_id_{int(i) - n}>" for i in ids]


# ------------------------------------------------------------------------------------------------------------
# The paper's combination
# ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class TextConfig:
    """Widths and token counts of the conditioning (App. B.2). The defaults are SD3's."""
    clip_l_width: int = 768
    clip_g_width: int = 1280
    t5_width: int = 4096
    clip_length: int = 77
    t5_length: int = 77                # the paper's; released inference code also uses 256

    @property
    def context_dim(self) -> int:
        return self.t5_width

    @property
    def pooled_dim(self) -> int:
        return self.clip_l_width + self.clip_g_width


def combine(clip_l, clip_g, t5, pooled_l, pooled_g):
    """The paper's c_ctxt and c_vec (App. B.2).

    clip_l (B, L, 768), clip_g (B, L, 1280), t5 (B, L', 4096) -> context (B, L + L', 4096): the two CLIP sequences side by
    side along the channels, zero-padded to T5's width, then T5's tokens behind them. pooled (B, 2048): CLIP-L's, CLIP-G's.
    """
    clip = torch.cat([clip_l, clip_g], dim=-1)                                    # (B, L, 2048)
    clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))                        # (B, L, 4096)
    return torch.cat([clip, t5.to(clip.dtype)], dim=1), torch.cat([pooled_l, pooled_g], dim=-1)


def drop_encoders(context, pooled, keep, config: TextConfig):
    """Set single encoders' outputs to zero, sequence and pooled vector together, sample by sample (App. B.3).

    keep (B, 3) bool: CLIP-L, CLIP-G, T5. In training each is dropped independently with probability 0.464, so that about
    0.464^3 = 10 % of the samples are unconditional; at sampling any subset can be left out (Sec. 5.3.3).
    """
    widths = torch.tensor([config.clip_l_width, config.clip_g_width], device=keep.device)
    keep_clip, keep_t5 = keep[:, :2].repeat_interleave(widths, dim=1), keep[:, 2, None, None]   # (B, l + g), (B, 1, 1)
    keep_wide = F.pad(keep_clip, (0, config.t5_width - keep_clip.shape[1]))[:, None]            # the rest is zeros already
    clip, t5 = context.split([config.clip_length, context.shape[1] - config.clip_length], dim=1)
    context = torch.cat([torch.where(keep_wide, clip, 0), torch.where(keep_t5, t5, 0)], dim=1)
    return context, torch.where(keep_clip, pooled, 0)


class TextEncoders(nn.Module):
    """The three frozen encoders and their tokenizers, any of which may be absent (its outputs are then zeros).

    encoders, tokenizers: dicts with some of the keys "clip_l", "clip_g", "t5". Call it with prompts.
    """

    def __init__(self, encoders: dict, tokenizers: dict, config: TextConfig):
        super().__init__()
        if not encoders:
            raise ValueError("no text encoder is present; load at least one of clip_l, clip_g, t5")
        self.encoders = nn.ModuleDict(encoders)
        self.tokenizers, self.config, self.truncation_said = tokenizers, config, False

    def tokenize(self, prompts, without=()) -> dict:
        """prompts -> {"clip_l": ids (B, clip_length), "clip_g": ..., "t5": ids (B, t5_length)} of the encoders present."""
        if isinstance(prompts, str):
            raise ValueError(f"prompts is the text {prompts[:60]!r}; give a list of texts")
        ids = {}
        for name in (name for name in self.encoders if name not in without):
            length = self.config.t5_length if name == "t5" else self.config.clip_length
            ids[name], needed = self.tokenizers[name](prompts, length)
            if max(needed) > length and not self.truncation_said:
                self.truncation_said = True                                       # once is enough
                longest = max(range(len(needed)), key=needed.__getitem__)
                print(f"note: a prompt needs {needed[longest]} tokens for {name} and is cut to {length}: "
                      f"{prompts[longest][:60]!r}", file=sys.stderr)
        return ids

    def encode_ids(self, ids: dict):
        """{"clip_l": (B, L), ...} -> context (B, L_clip + L_t5, context_dim), pooled (B, pooled_dim), fp32 or autocast. What
        has no ids gives zeros."""
        config, some = self.config, next(iter(ids.values()))
        like = next(self.parameters())
        zeros = lambda *shape: torch.zeros(some.shape[0], *shape, dtype=like.dtype, device=some.device)
        sequence = {"clip_l": zeros(config.clip_length, config.clip_l_width),
                    "clip_g": zeros(config.clip_length, config.clip_g_width), "t5": zeros(config.t5_length, config.t5_width)}
        pooled = {"clip_l": zeros(config.clip_l_width), "clip_g": zeros(config.clip_g_width)}
        for name in ids:
            if name == "t5":
                sequence["t5"] = self.encoders["t5"](ids["t5"])
            else:
                sequence[name], pooled[name], _ = self.encoders[name](ids[name])
        return combine(sequence["clip_l"], sequence["clip_g"], sequence["t5"], pooled["clip_l"], pooled["clip_g"])

    @torch.no_grad()
    def forward(self, prompts, without=()):
        """prompts (list of B strings) -> context, pooled. `without`: encoders that do not run; their outputs are zeros."""
        unknown = set(without) - set(ENCODERS)
        if unknown:
            raise ValueError(f"unknown encoder {sorted(unknown)[0]!r}; the encoders are {', '.join(ENCODERS)}")
        device = next(self.parameters()).device
        ids = {name: ids.to(device) for name, ids in self.tokenize(prompts, without).items()}
        return self.encode_ids(ids) if ids else self.unconditional(len(prompts))

    def unconditional(self, batch_size: int):
        """The input without any text as the paper trains it: every encoder's output zero (App. B.3).
        Samplers for the released weights encode the empty prompt instead: call the encoders with [""]."""
        config, like = self.config, next(self.parameters())
        return (torch.zeros(batch_size, config.clip_length + config.t5_length, config.context_dim, device=like.device),
                torch.zeros(batch_size, config.pooled_dim, device=like.device))


def main():
    """Show the tokens of a prompt and the cosine similarity of its pooled vector with a few other prompts'."""
    from checkpoints import load_components

    prompt = sys.argv[1] if len(sys.argv) > 1 else "a red circle left of a blue square"
    text = load_components("pretrained/tiny", ("text",)).text
    for name, ids in text.tokenize([prompt]).items():
        print(f"{name:7}", " ".join(text.tokenizers[name].pieces(ids[0])))
    others = [prompt, "a blue square left of a red circle", "two red circles", "the word CAT", "woman scientist"]
    context, pooled = text(others)
    print(f"context {tuple(context.shape)}, pooled {tuple(pooled.shape)}; similarity of pooled vectors:")
    for other, similarity in zip(others, F.cosine_similarity(pooled, pooled[:1])):
        print(f"  {similarity:6.3f}  {other}")


if __name__ == "__main__":
    main()
