"""mmdit.py: MM-DiT, the multimodal diffusion transformer (SD3, arXiv:2403.03206v1, Sec. 4, Fig. 2, Sec. 5.3.2).

Read with   Fig. 2a is MMDiT.forward, Fig. 2b is JointBlock.forward; Sec. 5.2.3 (two or three weight sets), 5.3.2 (QK-norm,
            positions). In the figure alpha and delta are 1 + scale, beta and epsilon are shift, gamma and zeta are gate
Not here    paths, losses, solvers (flow.py), prompts (text_encoders.py), pixels (vae.py), files (checkpoints.py)
Time        t in [0, 1], 0 is data and 1 is noise; the factor 1000 lives in `timestep_embedding` and nowhere else
Shapes      B batch   C latent channels   H W latent height, width   p patch size   N = HW/p^2 image tokens
            L text tokens   D hidden_size
Names       parameters are called as in the released SD3 and SD3.5 files (joint_blocks.0.x_block.attn.qkv, ...)
Run         python mmdit.py     prints depth -> width, heads, parameters: 8 B at depth 38, as in the paper
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes of the backbone (Sec. 4). `depth` is the one dial; the paper ties width and heads to it."""
    depth: int = 24                    # joint blocks; 24 is the paper's 2B model, 38 the 8B
    patch_size: int = 2                # latent pixels per token side
    latent_channels: int = 16          # the d of Sec. 5.2.1
    context_dim: int = 4096            # width of T5-XXL
    pooled_dim: int = 2048             # CLIP-L 768 + CLIP-G 1280
    qk_norm: bool = True               # RMSNorm on queries and keys, Sec. 5.3.2
    pos_embed_max_size: int = 192      # side of the stored position grid, in tokens: 192 * 16 = 3072 px
    pos_embed_base_size: int = 64      # a new grid's positions run from 0 to this; a loaded one has its own
    dual_attention_layers: int = 0     # SD3.5-medium: 13, the first blocks attend a second time, image tokens only
    clip_tokens: int = 0               # > 0: a third weight set, for the tokens after the first clip_tokens (Sec. 5.2.3)

    @property
    def hidden_size(self) -> int:      # Sec. 4: 64 * depth, with num_heads = depth, so head_dim is always 64
        return 64 * self.depth

    @property
    def num_heads(self) -> int:
        return self.depth


# ------------------------------------------------------------------------------------------------------------
# Embeddings of time and place
# ------------------------------------------------------------------------------------------------------------

def timestep_embedding(t, size: int = 256):
    """Sinusoids of 1000 t, in fp32: (B,) -> (B, size). Cosines first, frequencies 10000^(-i / (size/2))."""
    half = size // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = (1000 * t.float())[:, None] * frequency                               # (B, size/2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def released_positions(grid: int, base: int):
    """Positions of the released models along one side: `grid` values from 0, spaced base / grid. (grid,) float64."""
    return torch.arange(grid, dtype=torch.float64) * base / grid


def paper_positions(resolution: int, longest: int):
    """Sec. 5.3.2, the paper's grid for mixed aspect ratios: (p - (h_max - s) / 2) * 256 / S for p = 0 ... h_max - 1.

    resolution: S, pixels; s = S / 16 tokens. longest: h_max (or w_max), the longest side of any bucket in tokens. A square
    picture of S x S then has the positions of a 256 x 256 one, interpolated, and longer sides extend beyond. (h_max,)
    """
    s = resolution / 16
    return (torch.arange(longest, dtype=torch.float64) - (longest - s) / 2) * 256 / resolution


def stretched_positions(trained, trained_tokens: int, grid: int, tokens: int):
    """The same idea for fine-tuning any model at another resolution: along a side, `tokens` at the centre of the new grid lie
    where `trained_tokens` at the centre of the old one, with positions `trained` (G,), did, interpolated, and the rest extends
    them. (grid,) float64."""
    first, spacing = trained[(len(trained) - trained_tokens) // 2], trained[1] - trained[0]         # as crop_center takes them
    steps = torch.arange(grid, dtype=torch.float64) - (grid - tokens) // 2
    return first + steps * spacing * trained_tokens / tokens


def sincos_2d(rows, columns, size: int):
    """Frequency embedding of a grid: rows (R,), columns (K,) -> (R * K, size) float64, row-major.

    The first half of the channels holds the column, the second the row; in each half sines, then cosines.
    """
    frequency = 10000.0 ** (-torch.arange(size // 4, dtype=torch.float64) / (size // 4))
    wave = lambda position: torch.cat([(position[:, None] * frequency).sin(), (position[:, None] * frequency).cos()], dim=1)
    row, column = wave(rows)[:, None], wave(columns)[None]                        # (R, 1, size/2) and (1, K, size/2)
    shape = (len(rows), len(columns), size // 2)
    return torch.cat([column.expand(shape), row.expand(shape)], dim=2).flatten(0, 1)


def positions_of(table):
    """The positions along a side from which `sincos_2d` made a square table (1, G * G, D), from slow waves to fast: each slower
    one tells which turn the next is in. (G,) float64."""
    waves = table[0, : math.isqrt(table.shape[1]), : table.shape[2] // 2].double()                  # of the first row's columns
    n = waves.shape[1] // 2
    angle, frequency = torch.atan2(waves[:, :n], waves[:, n:]), 10000.0 ** (-torch.arange(n, dtype=torch.float64) / n)
    position = torch.zeros(len(waves), dtype=torch.float64)
    for i in reversed(range(n)):
        position += torch.remainder(angle[:, i] - position * frequency[i] + math.pi, 2 * math.pi).sub(math.pi) / frequency[i]
    return position


def crop_center(table, height: int, width: int):
    """The middle (height, width) of a square table of positions: (1, M * M, D) -> (1, height * width, D)."""
    M = math.isqrt(table.shape[1])
    if height > M or width > M:
        raise ValueError(f"latent needs {height}x{width} tokens but the position grid has {M}x{M}. Ask for a picture "
                         f"of at most {16 * M}x{16 * M} px (VAE factor 8, patch 2).")
    top, left = (M - height) // 2, (M - width) // 2
    grid = table.unflatten(1, (M, M))[:, top : top + height, left : left + width]
    return grid.flatten(1, 2)


class PatchEmbed(nn.Module):
    """(B, C, H, W) -> (B, N, D): each p x p patch of the latent becomes a token (Fig. 2a, "Patching" and "Linear")."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(config.latent_channels, config.hidden_size, p, stride=p)

    def forward(self, latent):
        return self.proj(latent).flatten(2).transpose(1, 2)


def unpatchify(tokens, height: int, width: int, patch_size: int):
    """(B, N, p * p * C) -> (B, C, H, W). A token's numbers are (row, column, channel); N = height * width tokens."""
    p = patch_size
    x = tokens.unflatten(2, (p, p, -1)).unflatten(1, (height, width))             # (B, h, w, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)                # (B, C, h * p, w * p)


class Embedder(nn.Module):
    """The small MLPs of Fig. 2a that bring time and pooled text to the width of the model."""

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(input_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, x):
        return self.mlp(x)


# ------------------------------------------------------------------------------------------------------------
# The MM-DiT block (Fig. 2b)
# ------------------------------------------------------------------------------------------------------------

def norm_and_modulate(x, shift, scale):
    """x (B, n, D), shift and scale (B, 1, D): the figure's LayerNorm, then alpha * x + beta with alpha = 1 + scale."""
    with torch.autocast(x.device.type, enabled=False):                            # which would make fp32 copies of x; the
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)                          # kernel sums in fp32 by itself
    return torch.addcmul(shift, normed, 1 + scale)


def attend(q, k, v):
    """softmax(q k^T / 8) v for (B, heads, n, 64) each. Written out where torch's kernel is slow: on a CPU in bf16 it takes twice
    as long, with the backward pass nearly three times, though it rounds less (errors of .004 against .005)."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v)
    at_once = max(1, 2**21 // (q.shape[2] * k.shape[2]))                          # heads whose scores fit the cache
    parts = zip(*(x.flatten(0, 1).split(at_once) for x in (q, k, v)))             # (heads, n, 64) each
    return torch.cat([(q / 8 @ k.transpose(1, 2)).softmax(dim=-1) @ v for q, k, v in parts]).view_as(q)


class HeadNorm(nn.Module):
    """RMSNorm over each head's 64 channels, with a learned scale (Sec. 5.3.2)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):                        # for the same reason
            return F.rms_norm(x, (64,), self.weight.to(x.dtype), eps=1e-6)


class Attention(nn.Module):
    """One stream's projections around the joint attention."""

    def __init__(self, config: MMDiTConfig, with_output: bool = True):
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D) if with_output else None
        self.ln_q = HeadNorm() if config.qk_norm else nn.Identity()
        self.ln_k = HeadNorm() if config.qk_norm else nn.Identity()

    def queries_keys_values(self, x):
        """(B, n, D) -> three of (B, heads, n, 64)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, 64)).unbind(2)     # (B, n, heads, 64) each
        return self.ln_q(q).transpose(1, 2), self.ln_k(k).transpose(1, 2), v.transpose(1, 2)


def gelu(x):
    """The tanh form of GELU, of any shape; on a CPU in bf16 the exact form, four times as fast there and nearer (2e-4) than
    bf16 rounds (2e-3)."""
    return F.gelu(x, approximate="none" if x.device.type == "cpu" and x.dtype == torch.bfloat16 else "tanh")


class MLP(nn.Module):
    """(B, n, D) -> (B, n, D) through 4 D."""

    def __init__(self, D: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x):
        return self.fc2(gelu(self.fc1(x)))


class StreamBlock(nn.Module):
    """One modality's half of a joint block: its own modulation, projections and MLP.

    `only_feeds_attention` is the last text block: nothing reads its output, so it has neither output projection nor MLP,
    and of the six modulation vectors only shift and scale. `dual` adds SD3.5-medium's second attention (nine vectors).
    """

    def __init__(self, config: MMDiTConfig, only_feeds_attention: bool = False, dual: bool = False):
        super().__init__()
        D = config.hidden_size
        self.only_feeds_attention = only_feeds_attention
        self.num_modulations = 2 if only_feeds_attention else 9 if dual else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, self.num_modulations * D))
        self.attn = Attention(config, with_output=not only_feeds_attention)
        self.attn2 = Attention(config) if dual else None
        self.mlp = None if only_feeds_attention else MLP(D)

    def modulation(self, cond):
        """cond (B, D) -> 2, 6 or 9 tensors (B, 1, D): shift, scale, gate of attention, of the MLP, of attn2."""
        return self.adaLN_modulation(cond).unsqueeze(1).chunk(self.num_modulations, dim=-1)

    def before_attention(self, x, modulation):
        """x (B, n, D) -> q, k, v of the joint attention, and what attn2 (if any) adds to x (B, n, D)."""
        qkv = self.attn.queries_keys_values(norm_and_modulate(x, *modulation[:2]))
        if self.attn2 is None:
            return qkv, None
        shift, scale, gate = modulation[6:]
        q, k, v = self.attn2.queries_keys_values(norm_and_modulate(x, shift, scale))
        second = attend(q, k, v).transpose(1, 2).flatten(2)    # (B, n, D)
        return qkv, gate * self.attn2.proj(second)

    def after_attention(self, x, attended, modulation, second):
        """x, attended (B, n, D) -> x (B, n, D): both residual branches of Fig. 2b; None if nothing reads it."""
        if self.only_feeds_attention:
            return None
        _, _, gate_attn, shift, scale, gate_mlp = modulation[:6]
        x = torch.addcmul(x, gate_attn, self.attn.proj(attended))
        if second is not None:
            x = x + second
        return torch.addcmul(x, gate_mlp, self.mlp(norm_and_modulate(x, shift, scale)))


class JointBlock(nn.Module):
    """Fig. 2b: the streams keep their own weights and meet in one attention over all tokens, text first."""

    def __init__(self, config: MMDiTConfig, last: bool = False, dual: bool = False):
        super().__init__()
        self.context_block = StreamBlock(config, only_feeds_attention=last)
        self.x_block = StreamBlock(config, dual=dual)
        if config.clip_tokens:
            self.t5_block = StreamBlock(config, only_feeds_attention=last)

    def streams(self):
        """The weight sets in the order of the sequence: CLIP (or all) text tokens, [T5 tokens,] image tokens."""
        return [block for block in (self.context_block, getattr(self, "t5_block", None), self.x_block) if block]

    def modulation(self, cond):
        """cond (B, D) -> the shifts, scales and gates of every stream."""
        return [stream.modulation(cond) for stream in self.streams()]

    def forward(self, tokens, modulations):
        """tokens: one (B, n_i, D) for each stream; modulations: cond (B, D), or what `modulation` made of it. Returns new
        tokens."""
        if torch.is_tensor(modulations):
            modulations = [stream.modulation(modulations) for stream in self.streams()]     # FSDP frees weights after .modulation
        before = [s.before_attention(x, m) for s, x, m in zip(self.streams(), tokens, modulations)]
        q, k, v = (torch.cat(parts, dim=2) for parts in zip(*(qkv for qkv, _ in before)))       # (B, heads, L+N, 64)
        attended = attend(q, k, v).split([x.shape[1] for x in tokens], dim=2)                   # (B, heads, n_i, 64) each
        attended = [part.transpose(1, 2).flatten(2).contiguous()        # (B, n_i, D); else F.linear copies its weight for every
                    for part in attended]                               # sample, without grad
        return [s.after_attention(x, a, m, second)
                for s, x, a, m, (_, second) in zip(self.streams(), tokens, attended, modulations, before)]


class FinalLayer(nn.Module):
    """(B, N, D) -> (B, N, p * p * C): the last modulation and linear layer before unpatching."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        D = config.hidden_size
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))
        self.linear = nn.Linear(D, config.patch_size**2 * config.latent_channels)

    def modulation(self, cond):
        """cond (B, D) -> shift, scale (B, 1, D)."""
        return self.adaLN_modulation(cond).unsqueeze(1).chunk(2, dim=-1)

    def forward(self, x, modulation):
        return self.linear(norm_and_modulate(x, *modulation))


# ------------------------------------------------------------------------------------------------------------
# The model (Fig. 2a)
# ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Prepared:
    """Everything in a sampling run that does not depend on the latent, by `MMDiT.prepare`."""
    times: tuple[float, ...]
    text: list                     # embedded text tokens, (B, n_i, D) for each text stream
    modulations: list              # for each time: as MMDiT.modulations gives them

    def at(self, t):
        """The modulations at time t (B,), which must be one of `times`, the same for the whole batch."""
        if bool((t != t.flatten()[0]).any()):
            raise ValueError("a Prepared serves one time for the whole batch; give context and pooled for mixed times")
        try:
            return self.modulations[self.times.index(float(t.flatten()[0]))]
        except ValueError:
            raise ValueError(f"t = {float(t.flatten()[0])} was not prepared; MMDiT.prepare got {self.times}") from None


def stream_dtype(x):
    """The type of a residual stream that begins with x: that of the matrix products, but fp32 for fp16, whose range streams of
    large models leave."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


class MMDiT(nn.Module):
    """(z_t, t, context, pooled) -> velocity (Fig. 2a). Keeps no state between calls."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config
        D, last = config.hidden_size, config.depth - 1
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = Embedder(256, D)
        self.y_embedder = Embedder(config.pooled_dim, D)
        self.context_embedder = nn.Linear(config.context_dim, D)
        if config.clip_tokens:
            self.t5_embedder = nn.Linear(config.context_dim, D)
        self.joint_blocks = nn.ModuleList(
            JointBlock(config, last=i == last, dual=i < config.dual_attention_layers) for i in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.register_buffer("pos_embed", torch.empty(1, config.pos_embed_max_size**2, D))
        if self.pos_embed.device.type != "meta":
            self.initialize()

    @torch.no_grad()
    def initialize(self, rng: torch.Generator | None = None, assign=torch.Tensor.copy_):
        """Xavier weights and zero biases; adaLN and the output start at zero (DiT): every block is the identity at first,
        the first velocity is 0 and the first loss that of predicting nothing, about 2.

        Every weight is drawn whole, on the CPU, and given to assign(parameter, value): the same numbers on any device, and
        where parameters are shards, no more than one whole weight at a time.
        """
        modulated = [stream for block in self.joint_blocks for stream in block.streams()] + [self.final_layer]
        zero = [stream.adaLN_modulation[1] for stream in modulated] + [self.final_layer.linear]
        narrow = [embedder.mlp[i] for embedder in (self.t_embedder, self.y_embedder) for i in (0, 2)]
        for module in self.modules():
            if isinstance(module, HeadNorm):
                assign(module.weight, torch.ones(64))
            elif isinstance(module, (nn.Linear, nn.Conv2d)):
                weight = torch.zeros(module.weight.shape)
                if module in narrow:
                    weight.normal_(0, 0.02, generator=rng)
                elif module not in zero:
                    bound = math.sqrt(6 / (weight[0].numel() + len(weight)))
                    weight.uniform_(-bound, bound, generator=rng)
                assign(module.weight, weight)
                assign(module.bias, torch.zeros(module.bias.shape))
        side = released_positions(self.config.pos_embed_max_size, self.config.pos_embed_base_size)
        self.pos_embed.copy_(sincos_2d(side, side, self.config.hidden_size)[None])

    def embed_image(self, latent):
        """(B, C, H, W) -> (B, N, D): patches plus the centre of the position grid."""
        p, (height, width) = self.config.patch_size, latent.shape[-2:]
        if height % p or width % p:
            raise ValueError(f"latent is {height}x{width} but patch_size={p} does not divide it. Make the picture's sides "
                             f"multiples of {8 * p} px (VAE factor 8 x patch {p}).")
        x, positions = self.x_embedder(latent), crop_center(self.pos_embed, height // p, width // p)        # (1, N, D)
        return (positions + x).to(stream_dtype(x))                                # in this order: sums keep the first's layout

    def embed_text(self, context):
        """(B, L, context_dim) -> [(B, L, D)], or with a third weight set [CLIP tokens, T5 tokens]."""
        n = self.config.clip_tokens
        if n:
            tokens = [self.context_embedder(context[:, :n]), self.t5_embedder(context[:, n:])]
        else:
            tokens = [self.context_embedder(context)]
        return [x.to(stream_dtype(x)) for x in tokens]

    def embed_cond(self, t, pooled):
        """t (B,) in [0, 1], pooled (B, pooled_dim) -> cond (B, D), the y of Fig. 2, in fp32 also under autocast."""
        with torch.autocast(t.device.type, enabled=False):
            weights = self.t_embedder.mlp[0].weight.dtype
            return self.t_embedder(timestep_embedding(t).to(weights)) + self.y_embedder(pooled.to(weights))

    def modulations(self, cond):
        """cond (B, D) -> shifts, scales and gates of every stream of every block, and of the final layer (last entry)."""
        return [*(block.modulation(cond) for block in self.joint_blocks), self.final_layer.modulation(cond)]

    def prepare(self, context, pooled, times) -> Prepared:
        """What does not depend on the latent, once for all steps of a sampler: pass the result as `context`."""
        times = tuple(torch.as_tensor(times, dtype=torch.float32).tolist())       # as forward will get them
        at = [pooled.new_tensor([t], dtype=torch.float32).expand(len(pooled)) for t in times]
        return Prepared(times, self.embed_text(context), [self.modulations(self.embed_cond(t, pooled)) for t in at])

    def forward(self, latent, t, context, pooled=None, skip_layers=()):
        """latent z_t (B, C, H, W); t (B,) in [0, 1]; context (B, L, context_dim) and pooled (B, pooled_dim), or a
        `Prepared` in place of both. skip_layers: numbers of blocks to leave out, for skip-layer guidance (flow.py). Returns
        the velocity (B, C, H, W)."""
        if isinstance(context, Prepared):
            text, modulations = context.text, context.at(t)
        else:
            text, cond = self.embed_text(context), self.embed_cond(t, pooled)
            modulations = [*[cond] * self.config.depth, self.final_layer.modulation(cond)]       # each block makes its own
        tokens = [*text, self.embed_image(latent)]                                # text first
        for i, (block, modulation) in enumerate(zip(self.joint_blocks, modulations)):
            tokens = tokens if i in skip_layers else block(tokens, modulation)
        x = self.final_layer(tokens[-1], modulations[-1])                         # (B, N, p * p * C)
        p = self.config.patch_size
        return unpatchify(x, latent.shape[2] // p, latent.shape[3] // p, p)       # (B, C, H, W)


def forward_flops(config: MMDiTConfig, text_tokens: int, image_tokens: int) -> int:
    """FLOPs of the matrix products of one sample's forward pass, attention included (2 for a multiply and add).

    In each block a token meets the 12 D^2 weights of its stream (qkv 3, projection 1, MLP 8), and each pair of tokens costs
    2 D for its score and 2 D for its value.
    """
    D, n, patch = config.hidden_size, text_tokens + image_tokens, config.patch_size**2 * config.latent_channels
    blocks = 2 * 12 * D**2 * n * config.depth - 2 * 9 * D**2 * text_tokens            # the last text block only feeds q, k, v
    attention = 2 * 2 * n**2 * D * config.depth
    ends = 2 * text_tokens * config.context_dim * D + 2 * 2 * image_tokens * patch * D
    texts = 2 if config.clip_tokens else 1                                            # streams of text
    modulation = 2 * D * ((6 * D * config.depth - 4 * D) * texts + 6 * D * config.depth + 2 * D)      # 2 D the last text, 2 D out
    dual = config.dual_attention_layers * (8 * D**2 * image_tokens + 4 * D * image_tokens**2 + 6 * D**2)
    cond = 2 * D * (256 + D + config.pooled_dim + D)
    return blocks + attention + ends + modulation + dual + cond


def training_flops(config: MMDiTConfig, text_tokens: int, image_tokens: int) -> int:
    """Model FLOPs of one sample's training step: the forward pass, and twice that for the backward pass. Recomputed work is
    not counted, so that MFU does not reward it."""
    return 3 * forward_flops(config, text_tokens, image_tokens)


def count_parameters(config: MMDiTConfig) -> int:
    """Learned parameters of a model of these sizes (the position grid is a buffer), without allocating it."""
    with torch.device("meta"):
        return sum(p.numel() for p in MMDiT(config).parameters())


def main():
    """Print what depth means: width, heads, parameters with SD3's conditioning."""
    print("depth  hidden  heads  parameters   (QK-norm adds 256 a block)")
    for depth in (2, 4, 8, 15, 18, 24, 30, 38):
        config = replace(MMDiTConfig(), depth=depth, qk_norm=depth == 38)
        print(f"{depth:5}  {config.hidden_size:6}  {config.num_heads:5}  {count_parameters(config) / 1e9:9.3f} B")


if __name__ == "__main__":
    main()
