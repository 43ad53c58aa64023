"""text_encoders.py: prompt -> (context, pooled) by CLIP-L, CLIP-G and T5 (SD3, arXiv:2403.03206v1).

Read with   Sec. 4, App. B.2 (combination), B.3 (dropout); Radford 2021 for CLIP, Raffel 2019 for T5
Not here    files and released names (checkpoints.py), CLIP's image tower (metrics.py)
Shapes      B batch   L tokens of one encoder   D its width   ids (B, L) int64
            context (B, L_clip + L_t5, context_dim): in the paper (B, 77 + 77, 4096)
            pooled (B, pooled_dim): in the paper (B, 768 + 1280)
Masks       CLIP is causal. Nothing else is masked: padding is attended to and is part of context.
Run         python text_encoders.py "a red circle"     shows the tokens, then what context holds
"""

import json
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import sentencepiece
import torch
import torch.nn as nn
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

ENCODERS = ("clip_l", "clip_g", "t5")

# ---- The paper's combination (Sec. 4, App. B.2, B.3) ---------------------------------------------
@dataclass(frozen=True)
class TextConfig:
    """Widths and token counts of the conditioning (App. B.2). The defaults are SD3's."""
    clip_l_width: int = 768
    clip_g_width: int = 1280
    t5_width: int = 4096               # at least the two CLIP widths together
    clip_length: int = 77
    t5_length: int = 77                # the paper's; released inference code also uses 256


def combine(clip_l, clip_g, t5, pooled_l, pooled_g):
    """The paper's c_ctxt and c_vec (Sec. 4, App. B.2): context (B, 154, 4096) and pooled (B, 2048).
    CLIP's two sequences lie side by side along the channels, with zeros up to T5's width."""
    missing = t5.shape[-1] - clip_l.shape[-1] - clip_g.shape[-1]      # 4096 - 768 - 1280
    zeros = clip_l.new_zeros(*clip_l.shape[:2], missing)
    clip = torch.cat([clip_l, clip_g, zeros], dim=-1)                 # (B, 77, 4096)
    context = torch.cat([clip, t5.to(clip.dtype)], dim=1)             # (B, 77 + 77, 4096)
    pooled = torch.cat([pooled_l, pooled_g], dim=-1)                  # (B, 768 + 1280)
    return context, pooled


def drop_encoders(context, pooled, keep, config):
    """Set encoders to zero, by sample: the sequence, and the pooled vector of a CLIP (App. B.3).
    keep (B, 3) bool: CLIP-L, CLIP-G, T5. In training each is dropped independently with probability
    0.464, so 0.464^3 = 10 % of the samples are unconditional. Sec. 5.3.3 drops any at sampling."""
    drop_l, drop_g, drop_t5 = (~keep).unbind(dim=1)                   # (B,) each
    L = config.clip_length
    l = config.clip_l_width
    g = l + config.clip_g_width
    context, pooled = context.clone(), pooled.clone()
    context[:, :L, :l].masked_fill_(drop_l[:, None, None], 0)
    pooled[:, :l].masked_fill_(drop_l[:, None], 0)
    context[:, :L, l:g].masked_fill_(drop_g[:, None, None], 0)
    pooled[:, l:].masked_fill_(drop_g[:, None], 0)
    context[:, L:].masked_fill_(drop_t5[:, None, None], 0)
    return context, pooled


class TextEncoders(nn.Module):
    """The three frozen encoders and their tokenizers. An encoder that is absent gives zeros.
    encoders, tokenizers: dicts with some of the keys "clip_l", "clip_g", "t5"."""
    def __init__(self, encoders, tokenizers, config):
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.tokenizers = tokenizers
        self.config = config
        self.texts = 0                                # texts so far
        self.cut = 0                                  # those of them that were too long
        self.longest_cut = 0                          # tokens that the longest of them lost

    @torch.no_grad()
    def forward(self, prompts, without=()):
        """prompts (list of B texts) -> context, pooled. Encoders named in `without` do not run."""
        return self.encode_ids(self.tokenize(prompts, without), len(prompts))

    def unconditional(self, batch_size):
        """The paper's input without text: zeros (App. B.3). Released weights expect self([""])."""
        return self.encode_ids({}, batch_size)

    def encode_ids(self, ids, batch_size):
        """{"clip_l": ids (B, L), ...} -> context and pooled. An encoder without ids gives zeros."""
        c = self.config
        like = next(self.parameters())
        clip_l = like.new_zeros(batch_size, c.clip_length, c.clip_l_width)
        clip_g = like.new_zeros(batch_size, c.clip_length, c.clip_g_width)
        t5 = like.new_zeros(batch_size, c.t5_length, c.t5_width)
        pooled_l = clip_l[:, 0]
        pooled_g = clip_g[:, 0]
        if "clip_l" in ids:
            clip_l, pooled_l, _ = self.encoders["clip_l"](ids["clip_l"].to(like.device))
        if "clip_g" in ids:
            clip_g, pooled_g, _ = self.encoders["clip_g"](ids["clip_g"].to(like.device))
        if "t5" in ids:
            t5 = self.encoders["t5"](ids["t5"].to(like.device))
        return combine(clip_l, clip_g, t5, pooled_l, pooled_g)

    def tokenize(self, prompts, without=()):
        """prompts -> {"clip_l": ids (B, clip_length), ..., "t5": ids (B, t5_length)}, cut to it."""
        if isinstance(prompts, str):
            raise ValueError(f"prompts is the text {prompts[:60]!r}; give a list of texts")
        "".join(prompts).encode()                         # ValueError for what is not UTF-8
        ids = {}
        excess = torch.zeros(len(prompts), dtype=torch.long)
        for name in self.encoders:
            if name in without:
                continue
            length = self.config.t5_length if name == "t5" else self.config.clip_length
            ids[name], needed = self.tokenizers[name](prompts, length)    # (B, length), (B,)
            excess = excess.maximum(needed - length)
        self.texts += len(prompts)
        self.cut += excess.count_nonzero().item()
        self.longest_cut = max(self.longest_cut, 0, *excess.tolist())
        return ids

    def note_cut(self):
        """Say how many of all texts so far an encoder has cut, if any, and by how much."""
        if self.cut:
            print(f"note: {self.cut} of {self.texts} texts are cut, the longest by "
                  f"{self.longest_cut} tokens", file=sys.stderr)


def attend(q, k, v, **options):
    """Attention of projected q (B, L, D), k, v (B, K, D) -> (B, L, D). A head has 64 channels."""
    heads = []
    for x in (q, k, v):
        heads.append(x.unflatten(-1, (-1, 64)).transpose(1, 2))       # (B, heads, L or K, 64)
    out = F.scaled_dot_product_attention(*heads, **options)           # (B, heads, L, 64)
    return out.transpose(1, 2).flatten(2)


# ---- CLIP's text transformer ---------------------------------------------------------------------
@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of a CLIP text encoder. The defaults are CLIP-L's; CLIP-G: 1280, 32, "gelu", 1280."""
    vocab_size: int = 49408            # the end token is the largest id
    hidden_size: int = 768
    num_layers: int = 12
    max_length: int = 77               # learned positions
    activation: str = "quick_gelu"     # or "gelu", the exact one
    projection_dim: int | None = None  # SD3 projects CLIP-G's pooled vector, but not CLIP-L's

    @property
    def num_heads(self):               # 12 for CLIP-L, 20 for CLIP-G
        return self.hidden_size // 64


def quick_gelu(x):
    """CLIP-L's activation: an approximation of GELU with one sigmoid."""
    return x * torch.sigmoid(1.702 * x)


class CLIPLayer(nn.Module):
    """Pre-norm transformer layer, (B, L, D) -> (B, L, D). The image tower has causal=False."""
    def __init__(self, config, causal=True):
        super().__init__()
        D = config.hidden_size
        self.causal = causal
        self.activation = {"quick_gelu": quick_gelu, "gelu": F.gelu}[config.activation]
        self.norm1 = nn.LayerNorm(D, eps=1e-5)
        self.q = nn.Linear(D, D)
        self.k = nn.Linear(D, D)
        self.v = nn.Linear(D, D)
        self.out = nn.Linear(D, D)
        self.norm2 = nn.LayerNorm(D, eps=1e-5)
        self.fc1 = nn.Linear(D, 4 * D)
        self.fc2 = nn.Linear(4 * D, D)

    def forward(self, x):
        """x (B, L, D) -> (B, L, D): attention, then the MLP, each beside its residual."""
        h = self.norm1(x)
        q, k, v = self.q(h), self.k(h), self.v(h)
        h = attend(q, k, v, is_causal=self.causal)
        x = x + self.out(h)
        h = self.fc1(self.norm2(x))
        return x + self.fc2(self.activation(h))


class CLIPTextEncoder(nn.Module):
    """ids (B, L) -> (penultimate (B, L, D), pooled (B, D or projection_dim), last (B, L, D)).
    penultimate: the input of the last layer, *without* the final norm. It is SD3's context.
    pooled: the final norm's output at the first end token, projected in CLIP-G.
    last: the final norm's output at every token."""
    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, D)
        self.position_embedding = nn.Embedding(config.max_length, D)
        self.layers = nn.ModuleList()
        for _ in range(config.num_layers):
            self.layers.append(CLIPLayer(config))
        self.final_norm = nn.LayerNorm(D, eps=1e-5)
        self.projection = nn.Identity()
        if config.projection_dim:
            self.projection = nn.Linear(D, config.projection_dim, bias=False)

    def forward(self, ids):
        """ids (B, L) int64 -> (penultimate, pooled, last), as the class says."""
        B, L = ids.shape
        x = self.token_embedding(ids) + self.position_embedding.weight[:L]     # (B, L, D)
        for layer in self.layers:
            penultimate = x
            x = layer(x)
        last = self.final_norm(x)                                     # (B, L, D)
        end = ids.argmax(dim=-1)                                      # (B,) first end token
        pooled = last[torch.arange(B, device=ids.device), end]        # (B, D)
        return penultimate, self.projection(pooled), last


# ---- T5 v1.1's encoder ---------------------------------------------------------------------------
@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 v1.1 encoder. The defaults are those of T5-XXL, 4.7 B parameters."""
    vocab_size: int = 32128            # 32000 pieces and 100 sentinels <extra_id_N>, rounded up
    hidden_size: int = 4096
    ff_size: int = 10240
    num_layers: int = 24
    num_heads: int = 64                # each has 64 channels
    num_buckets: int = 32              # distances are grouped: exact when near, coarse up to 128


RMSNorm = partial(nn.RMSNorm, eps=1e-6)     # x / sqrt(mean(x^2) + 1e-6) * weight; no mean, no bias


def relative_position_bucket(distance, num_buckets=32, max_distance=128, bidirectional=True):
    """The bucket of `distance` = key position - query position (int tensor of any shape), as in T5.
    An encoder has half of its buckets for keys after the query; a decoder has no such keys. On each
    side half the buckets hold one distance each; the others grow logarithmically."""
    first = 0
    if bidirectional:
        num_buckets = num_buckets // 2
        first = (distance > 0).long() * num_buckets
        distance = -distance.abs()
    distance = (-distance).clamp_min(0)
    exact = num_buckets // 2
    fraction = torch.log(distance.clamp_min(1) / exact) / math.log(max_distance / exact)
    far = exact + (fraction * (num_buckets - exact)).long()
    return first + torch.where(distance < exact, distance, far.clamp_max(num_buckets - 1))


class T5Attention(nn.Module):
    """Attention without 1/sqrt(d) and without biases in its projections. (B, L, D) -> (B, L, D).
    bias (1, heads, L, K) is added to the logits. source (B, K, D) makes it cross-attention."""
    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        inner = 64 * config.num_heads
        self.q = nn.Linear(D, inner, bias=False)
        self.k = nn.Linear(D, inner, bias=False)
        self.v = nn.Linear(D, inner, bias=False)
        self.out = nn.Linear(inner, D, bias=False)

    def forward(self, x, bias, source=None):
        source = x if source is None else source
        q, k, v = self.q(x), self.k(source), self.v(source)           # (B, L or K, inner)
        return self.out(attend(q, k, v, attn_mask=bias, scale=1.0))


class T5FeedForward(nn.Module):
    """Gated tanh-GELU: down(gelu(gate(x)) * up(x))."""
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.ff_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.ff_size, bias=False)
        self.down = nn.Linear(config.ff_size, config.hidden_size, bias=False)

    def forward(self, x):
        gate = F.gelu(self.gate(x), approximate="tanh")
        return self.down(gate * self.up(x))


class T5Layer(nn.Module):
    """Pre-norm layer, (B, L, D) -> (B, L, D)."""
    def __init__(self, config):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size)
        self.attention = T5Attention(config)
        self.norm2 = RMSNorm(config.hidden_size)
        self.feed_forward = T5FeedForward(config)

    def forward(self, x, bias):
        x = x + self.attention(self.norm1(x), bias)
        return x + self.feed_forward(self.norm2(x))


class T5Encoder(nn.Module):
    """ids (B, L) -> final norm of the last state (B, L, D). All layers share one bias table."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_bias = nn.Embedding(config.num_buckets, config.num_heads)
        self.layers = nn.ModuleList()
        for _ in range(config.num_layers):
            self.layers.append(T5Layer(config))
        self.final_norm = RMSNorm(config.hidden_size)

    def forward(self, ids):
        """ids (B, L) int64 -> (B, L, D)."""
        position = torch.arange(ids.shape[1], device=ids.device)
        distance = position[None, :] - position[:, None]              # (L, L) key - query
        bucket = relative_position_bucket(distance, self.config.num_buckets)
        bias = self.position_bias(bucket).permute(2, 0, 1)[None]      # (1, heads, L, L)
        x = self.token_embedding(ids)                                 # (B, L, D)
        for layer in self.layers:
            x = layer(x, bias)
        return self.final_norm(x)


# ---- Tokenizers: B texts -> ids (B, length) and the number of tokens that each needs (B,) --------
def fit_length(rows, length, start, end, padding):
    """Each list of ids becomes start, as many ids as fit, end and padding."""
    ids = torch.full((len(rows), length), padding)
    needed = torch.zeros(len(rows), dtype=torch.long)
    for i, row in enumerate(rows):
        kept = start + row[: length - len(start) - 1] + [end]
        ids[i, : len(kept)] = torch.tensor(kept)
        needed[i] = len(start) + len(row) + 1
    return ids, needed


class CLIPTokenizer:
    """CLIP's byte-level BPE. SD3 does not repair text with ftfy; OpenAI's own code does.
    folder: has vocab.json and merges.txt, or only tokenizer.json, as transformers 5 writes it.
    padding: the id that fills up a row: the end token by default (CLIP-L), 0 for SD3's CLIP-G.
    "<|endoftext|>" in a prompt is the end token. "!" is a word, not padding as in SD3's config."""
    def __init__(self, folder, padding=None):
        folder = Path(folder)
        if (folder / "merges.txt").is_file():
            model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"),
                                         end_of_word_suffix="</w>", unk_token="<|endoftext|>")
        else:
            model = Tokenizer.from_file(str(folder / "tokenizer.json")).model
        self.backend = Tokenizer(model)
        self.backend.normalizer, self.backend.pre_tokenizer = clip_text_rules()
        self.backend.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
        self.start = self.backend.token_to_id("<|startoftext|>")
        self.end = self.backend.token_to_id("<|endoftext|>")
        self.padding = self.end if padding is None else padding
        self.vocab_size = self.end + 1                                # the end token is the last id

    def __call__(self, prompts, length=77):
        rows = []
        for encoding in self.backend.encode_batch(prompts):
            rows.append(encoding.ids)
        return fit_length(rows, length, [self.start], self.end, self.padding)


def clip_text_rules():
    """(normalizer, pre_tokenizer) of CLIP: NFC, single spaces, lower case; then words as bytes."""
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    clean = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = Regex(r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")
    split = pre_tokenizers.Split(words, behavior="removed", invert=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return clean, pre_tokenizers.Sequence([split, to_bytes])


class T5Tokenizer:
    """T5's SentencePiece model from spiece.model or tokenizer.json. Ids end with 1; padding is 0.
    White space is collapsed first. Special tokens in a prompt (</s>, <extra_id_0>) are read as
    text, as SentencePiece does."""
    def __init__(self, file):
        if Path(file).suffix == ".json":
            content = json.loads(Path(file).read_text(encoding="utf-8"))
            vocab = [entry for entry in content["model"]["vocab"] if "<extra_id_" not in entry[0]]
            for entry in vocab[:3]:                                   # [piece, score]
                entry[0] = " " + entry[0]                             # hides <pad>, </s>, <unk>
            content["model"]["vocab"] = vocab
            content["added_tokens"] = []
            self.backend = Tokenizer.from_str(json.dumps(content))
            self.vocab_size = len(vocab)
        else:
            self.backend = sentencepiece.SentencePieceProcessor(model_file=str(file))
            self.vocab_size = self.backend.get_piece_size()

    def __call__(self, prompts, length=77):
        rows = []
        for text in prompts:
            text = " ".join(text.replace("\v", "").split())           # \v: T5's own rule
            if isinstance(self.backend, Tokenizer):
                rows.append(self.backend.encode(text, add_special_tokens=False).ids)
            else:
                rows.append(self.backend.encode(text))
        return fit_length(rows, length, [], 1, 0)


def read_tokenizer(name, file, vocab_size):
    """The tokenizer of one encoder, whose table has `vocab_size` rows. T5's table is padded."""
    try:
        if name == "t5":
            tokenizer = T5Tokenizer(file)
        else:
            tokenizer = CLIPTokenizer(file.parent, 0 if name == "clip_g" else None)
        missing = vocab_size - tokenizer.vocab_size
        if missing < 0 or (missing and name != "t5"):
            raise ValueError(f"{name} has {vocab_size} tokens, not {tokenizer.vocab_size}")
        return tokenizer
    except Exception as problem:                       # `tokenizers` raises nothing more exact.
        raise ValueError(f"{file} is no tokenizer for this model ({problem}); give the right "
                         f"folder with --tokenizers") from None


def main():
    """Show the tokens of a prompt, and the paper's shapes with CLIP-L alone (random weights)."""
    prompt = " ".join(sys.argv[1:]) or "a red circle"
    shipped = Path(__file__).parent / "pretrained" / "tiny" / "tokenizers"
    clip = CLIPTokenizer(shipped / "clip")
    t5 = T5Tokenizer(shipped / "t5" / "spiece.model")
    print("CLIP", clip.backend.encode(prompt).tokens, clip([prompt], 12)[0].tolist())
    print("T5  ", t5.backend.encode(prompt, out_type=str), t5([prompt], 12)[0].tolist())
    clip_l = CLIPTextEncoder(CLIPConfig(vocab_size=2048, num_layers=2))
    text = TextEncoders({"clip_l": clip_l}, {"clip_l": clip}, TextConfig())
    for name, part in zip(("context", "pooled"), text([prompt])):
        print(f"{name} {tuple(part.shape)}, {(part == 0).float().mean():.0%} of it zero")


if __name__ == "__main__":
    main()
