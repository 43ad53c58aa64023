"""mmdit.py: MM-DiT, the multimodal diffusion transformer (SD3, arXiv:2403.03206v1, Sec. 4).

Read with   Fig. 2a is MMDiT.forward, Fig. 2b is JointBlock.forward; Sec. 5.3.2 for QK-norm, positions
Not here    paths, losses, solvers (flow.py), prompts (text_encoders.py), pixels (vae.py),
            one or three sets of weights (experiments/fig4_backbones.py), FLOPs (bench/plan.py)
Time        t in [0, 1], t = 0 is data and t = 1 is noise; timestep_embedding multiplies by 1000
Shapes      B batch   C latent channels   H W latent height, width   p patch size
            N = HW/p^2 image tokens   L text tokens   D hidden_size
Names       parameters have the names of the released files: joint_blocks.0.x_block.attn.qkv, ...
Run         python mmdit.py     prints what depth means: 8 B parameters at depth 38, as in the paper
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class MMDiTConfig:
    """Sizes of the backbone (Sec. 4). `depth` is the one dial: width and heads follow from it."""
    depth: int = 24                  # joint blocks; 24 is the paper's 2B model, 38 its 8B model
    patch_size: int = 2              # latent pixels per token side
    latent_channels: int = 16        # the d of Sec. 5.2.1
    context_dim: int = 4096          # width of T5-XXL
    pooled_dim: int = 2048           # CLIP-L 768 + CLIP-G 1280
    qk_norm: bool = True             # RMSNorm on queries and keys, Sec. 5.3.2
    pos_embed_max_size: int = 192    # side of the position grid, in tokens: 192 * 16 = 3072 px
    position_start: float = 0.0      # position of the grid's first token; SD3 medium has 0
    position_step: float = 1 / 3     # distance of neighbours; SD3 medium has 64 / 192
    dual_attention_layers: int = 0   # SD3.5-medium: its first 13 blocks have a second attention

    @property
    def hidden_size(self) -> int:    # Sec. 4: 64 * depth; with num_heads = depth, a head has 64
        return 64 * self.depth

    @property
    def num_heads(self) -> int:
        return self.depth

    @property
    def positions(self):             # (pos_embed_max_size,) float64, for rows and for columns
        steps = torch.arange(self.pos_embed_max_size, dtype=torch.float64)
        return self.position_start + self.position_step * steps


# ---- Embeddings of time and place ----------------------------------------------------------------

def timestep_embedding(t, size: int = 256):
    """Sinusoids of 1000 t in fp32, cosines first: (B,) -> (B, size)."""
    half = size // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequency = torch.exp(-math.log(10000) * steps / half)             # (size/2,)
    angle = (1000 * t.float())[:, None] * frequency                    # (B, size/2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def paper_positions(resolution: int, longest: int):
    """The grid of Sec. 5.3.2, (p - (h_max - s) / 2) * 256 / S for p = 0 ... h_max - 1. (longest,)

    resolution: S in pixels, so s = S / 16 tokens. longest: h_max or w_max, the longest side of any
    bucket in tokens. The s tokens at the centre have the positions of a 256 x 256 picture.
    """
    s = resolution / 16
    p = torch.arange(longest, dtype=torch.float64)
    return (p - (longest - s) / 2) * 256 / resolution


def released_positions(grid: int):
    """The grid of the released models: from 0 in steps of 64 / grid. (grid,) float64"""
    return torch.arange(grid, dtype=torch.float64) * 64 / grid


def sincos_1d(positions, size: int):
    """Frequency embedding of positions (G,): sines, then cosines. (G, size) float64"""
    half = size // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = positions[:, None] * frequency                             # (G, size/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def sincos_2d(rows, columns, size: int):
    """Frequency embedding of a grid, row by row: rows (R,), columns (K,) -> (R * K, size) float64.

    The first half of the channels holds the column, the second half the row.
    """
    shape = (len(rows), len(columns), size // 2)
    column = sincos_1d(columns, size // 2)[None, :].expand(shape)      # (R, K, size/2)
    row = sincos_1d(rows, size // 2)[:, None].expand(shape)            # (R, K, size/2)
    return torch.cat([column, row], dim=2).flatten(0, 1)               # (R * K, size)


def crop_center(table, height: int, width: int):
    """The middle of a square table of positions: (1, G * G, D) -> (1, height * width, D)."""
    side = math.isqrt(table.shape[1])
    if height > side or width > side:
        raise ValueError(
            f"the latent needs {height}x{width} tokens but the position grid has {side}x{side}. "
            f"Ask for a picture of at most {16 * side}x{16 * side} px (VAE factor 8 x patch 2).")
    top = (side - height) // 2
    left = (side - width) // 2
    grid = table.unflatten(1, (side, side))                            # (1, G, G, D)
    return grid[:, top : top + height, left : left + width].flatten(1, 2)


class PatchEmbed(nn.Module):
    """Fig. 2a, "Patching" and "Linear": each p x p patch becomes a token."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(config.latent_channels, config.hidden_size, p, stride=p)

    def forward(self, latent):
        x = self.proj(latent)                                          # (B, D, H/p, W/p)
        # Without contiguous() the tokens would keep this layout, and every norm would copy them.
        return x.flatten(2).transpose(1, 2).contiguous()               # (B, N, D)


def unpatchify(tokens, height: int, width: int, patch_size: int):
    """(B, N, p * p * C) -> (B, C, H, W); N = height * width. A token is (row, column, channel)."""
    p = patch_size
    x = tokens.unflatten(2, (p, p, -1)).unflatten(1, (height, width))  # (B, h, w, p, p, C)
    x = x.permute(0, 5, 1, 3, 2, 4)                                    # (B, C, h, p, w, p)
    return x.flatten(4, 5).flatten(2, 3)                               # (B, C, H, W)


class Embedder(nn.Module):
    """Fig. 2a, the MLPs that bring time and pooled text to the width of the model."""

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        first = nn.Linear(input_size, hidden_size)
        self.mlp = nn.Sequential(first, nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, x):
        return self.mlp(x)                                             # (B, D)


# ---- The MM-DiT block (Fig. 2b) ------------------------------------------------------------------

class Modulation(NamedTuple):
    """The vectors that one column of Fig. 2b gets from cond, (B, 1, D) each, as released files order them."""
    shift_attn: torch.Tensor         # beta
    scale_attn: torch.Tensor         # alpha = 1 + scale_attn
    gate_attn: torch.Tensor = None   # gamma; from here on the last text column has none
    shift_mlp: torch.Tensor = None   # epsilon
    scale_mlp: torch.Tensor = None   # delta = 1 + scale_mlp
    gate_mlp: torch.Tensor = None    # zeta
    shift_attn2: torch.Tensor = None      # the last three belong to the second attention
    scale_attn2: torch.Tensor = None
    gate_attn2: torch.Tensor = None


def modulate(x, shift, scale):
    """"Mod" in Fig. 2b, alpha * x + beta with alpha = 1 + scale. x (B, n, D), the others (B, 1, D)."""
    return torch.addcmul(shift, x, 1 + scale)


def add_gated(x, gate, branch):
    """The "*" and "+" of Fig. 2b, x + gate * branch. x, branch (B, n, D); gate (B, 1, D)."""
    return torch.addcmul(x, gate, branch)


def joint_attention(context_qkv, x_qkv):
    """One attention over text and image tokens, text first.

    context_qkv, x_qkv: q, k, v of the columns, (B, heads, L, 64) and (B, heads, N, 64) each.
    Returns what each column gets, (B, L, D) and (B, N, D).
    """
    L = context_qkv[0].shape[2]
    q = torch.cat([context_qkv[0], x_qkv[0]], dim=2)                   # (B, heads, L+N, 64)
    k = torch.cat([context_qkv[1], x_qkv[1]], dim=2)
    v = torch.cat([context_qkv[2], x_qkv[2]], dim=2)
    out = attend(q, k, v)                                              # (B, heads, L+N, 64)
    return merge_heads(out[:, :, :L]), merge_heads(out[:, :, L:])


def merge_heads(x):
    """(B, heads, n, 64) -> (B, n, D). Contiguous, so that F.linear need not copy its weight."""
    return x.transpose(1, 2).contiguous().flatten(2)


class HeadNorm(nn.Module):
    """QK-norm (Sec. 5.3.2): RMSNorm over the 64 channels of each head, with a learned scale."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):             # as in layer_norm
            return F.rms_norm(x, (64,), self.weight.to(x.dtype), eps=1e-6)


class Attention(nn.Module):
    """The linear layers of one column before and after the joint attention."""

    def __init__(self, config: MMDiTConfig, with_output: bool = True):
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D) if with_output else None
        self.ln_q = HeadNorm() if config.qk_norm else nn.Identity()
        self.ln_k = HeadNorm() if config.qk_norm else nn.Identity()

    def queries_keys_values(self, x):
        """(B, n, D) -> q, k, v, (B, heads, n, 64) each; no queries where there is no output."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, 64))       # (B, n, 3, heads, 64)
        q, k, v = qkv.unbind(2)                                        # (B, n, heads, 64) each
        if self.proj is None:
            q = q[:, :0]                                               # (B, 0, heads, 64)
        return self.ln_q(q).transpose(1, 2), self.ln_k(k).transpose(1, 2), v.transpose(1, 2)


class MLP(nn.Module):
    """(B, n, D) -> (B, n, D) through 4 D channels."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x):
        return self.fc2(gelu(self.fc1(x)))


class StreamBlock(nn.Module):
    """The weights of one column of Fig. 2b.

    last: nothing reads the text after the last block. So its column has no output projection, no
    MLP, and only shift_attn and scale_attn. dual: SD3.5-medium's second attention, attn2.
    """

    def __init__(self, config: MMDiTConfig, last: bool = False, dual: bool = False):
        super().__init__()
        D = config.hidden_size
        self.num_modulations = 2 if last else 9 if dual else 6
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, self.num_modulations * D))
        self.attn = Attention(config, with_output=not last)
        self.attn2 = Attention(config) if dual else None
        self.mlp = None if last else MLP(D)

    def modulation(self, cond) -> Modulation:
        """cond (B, D) -> the vectors of this column."""
        vectors = self.adaLN_modulation(cond).unsqueeze(1)             # (B, 1, 6 D); 2 D or 9 D
        return Modulation(*vectors.chunk(self.num_modulations, dim=-1))

    def second_attention(self, x, mod: Modulation):
        """SD3.5-medium: what the image tokens x (B, N, D) learn from each other, without text."""
        normed = modulate(layer_norm(x), mod.shift_attn2, mod.scale_attn2)
        q, k, v = self.attn2.queries_keys_values(normed)               # (B, heads, N, 64) each
        return self.attn2.proj(merge_heads(attend(q, k, v)))           # (B, N, D)


class JointBlock(nn.Module):
    """Fig. 2b: text and image keep their own weights and meet in one attention over all tokens."""

    def __init__(self, config: MMDiTConfig, last: bool = False, dual: bool = False):
        super().__init__()
        self.last = last
        self.context_block = StreamBlock(config, last=last)
        self.x_block = StreamBlock(config, dual=dual)

    def forward(self, context, x, cond):
        """context (B, L, D), x (B, N, D), cond (B, D) -> context, x. The last context is None."""
        text, image = self.context_block, self.x_block
        c_mod = text.modulation(cond)
        x_mod = image.modulation(cond)

        c_in = modulate(layer_norm(context), c_mod.shift_attn, c_mod.scale_attn)  # beta_c, alpha_c
        x_in = modulate(layer_norm(x), x_mod.shift_attn, x_mod.scale_attn)        # beta_x, alpha_x
        c_qkv = text.attn.queries_keys_values(c_in)
        x_qkv = image.attn.queries_keys_values(x_in)
        c_out, x_out = joint_attention(c_qkv, x_qkv)

        if image.attn2 is not None:                                    # SD3.5-medium, not in Fig. 2b
            x = add_gated(x, x_mod.gate_attn2, image.second_attention(x, x_mod))
        x = add_gated(x, x_mod.gate_attn, image.attn.proj(x_out))                 # gamma_x
        x_in = modulate(layer_norm(x), x_mod.shift_mlp, x_mod.scale_mlp)          # epsilon_x, delta_x
        x = add_gated(x, x_mod.gate_mlp, image.mlp(x_in))                         # zeta_x
        if self.last:
            return None, x

        context = add_gated(context, c_mod.gate_attn, text.attn.proj(c_out))      # gamma_c
        c_in = modulate(layer_norm(context), c_mod.shift_mlp, c_mod.scale_mlp)    # epsilon_c, delta_c
        context = add_gated(context, c_mod.gate_mlp, text.mlp(c_in))              # zeta_c
        return context, x


class FinalLayer(nn.Module):
    """Fig. 2a, the last "Modulation" and "Linear"."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        D = config.hidden_size
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))
        self.linear = nn.Linear(D, config.patch_size**2 * config.latent_channels)

    def forward(self, x, cond):
        """x (B, N, D), cond (B, D) -> (B, N, p * p * C)."""
        shift, scale = self.adaLN_modulation(cond).unsqueeze(1).chunk(2, dim=-1)  # (B, 1, D) each
        return self.linear(modulate(layer_norm(x), shift, scale))


# ---- The model (Fig. 2a) -------------------------------------------------------------------------

class MMDiT(nn.Module):
    """(z_t, t, context, pooled) -> velocity (Fig. 2a). It keeps no state between calls."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = Embedder(256, D)
        self.y_embedder = Embedder(config.pooled_dim, D)
        self.context_embedder = nn.Linear(config.context_dim, D)
        self.joint_blocks = nn.ModuleList()
        for i in range(config.depth):
            dual = i < config.dual_attention_layers
            self.joint_blocks.append(JointBlock(config, last=i == config.depth - 1, dual=dual))
        self.final_layer = FinalLayer(config)
        self.register_buffer("pos_embed", torch.empty(1, config.pos_embed_max_size**2, D))
        if self.pos_embed.device.type != "meta":
            self.initialize()

    @torch.no_grad()
    def initialize(self, rng: torch.Generator | None = None, assign=torch.Tensor.copy_):
        """Xavier weights and zero biases. adaLN and the output layer start at 0 (DiT).

        So every block starts as the identity, the first velocity is 0 and the first loss about 2.
        Each weight is drawn whole, on the CPU, and given to assign(parameter, value): the numbers
        are the same on any device and for shards, and only one whole weight exists at a time.
        """
        for name, module in self.named_modules():
            if isinstance(module, HeadNorm):
                assign(module.weight, torch.ones(64))
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                weight = torch.zeros(module.weight.shape)
                if name.startswith(("t_embedder", "y_embedder")):
                    weight.normal_(0, 0.02, generator=rng)
                elif not name.endswith(("adaLN_modulation.1", "final_layer.linear")):
                    bound = math.sqrt(6 / (weight[0].numel() + len(weight)))
                    weight.uniform_(-bound, bound, generator=rng)
                assign(module.weight, weight)
                assign(module.bias, torch.zeros(module.bias.shape))
        side = self.config.positions
        self.pos_embed.copy_(sincos_2d(side, side, self.config.hidden_size)[None])

    def embed_image(self, latent):
        """Patches plus the centre of the position grid: (B, C, H, W) -> (B, N, D)."""
        p = self.config.patch_size
        H, W = latent.shape[-2:]
        if H % p or W % p:
            raise ValueError(
                f"the latent is {H}x{W} but patch_size={p} does not divide it. Make the sides of "
                f"the picture multiples of {8 * p} px (VAE factor 8 x patch {p}).")
        x = self.x_embedder(latent)                                    # (B, N, D)
        positions = crop_center(self.pos_embed, H // p, W // p)        # (1, N, D)
        return (x + positions).to(stream_dtype(x))

    def embed_text(self, context):
        """(B, L, context_dim) -> (B, L, D). Text gets no positions here: its encoders know them."""
        context = self.context_embedder(context)
        return context.to(stream_dtype(context))

    def embed_cond(self, t, pooled):
        """The y of Fig. 2, in fp32 also under autocast: t (B,), pooled (B, pooled_dim) -> (B, D)."""
        with torch.autocast(t.device.type, enabled=False):
            dtype = self.t_embedder.mlp[0].weight.dtype
            time = self.t_embedder(timestep_embedding(t).to(dtype))
            return time + self.y_embedder(pooled.to(dtype))

    def forward(self, latent, t, context, pooled, skip_layers=()):
        """The velocity at z_t.

        latent: z_t (B, C, H, W). t: (B,) in [0, 1]. context: (B, L, context_dim). pooled:
        (B, pooled_dim). skip_layers: numbers of the blocks to leave out (skip-layer guidance).
        """
        p = self.config.patch_size
        H, W = latent.shape[-2:]
        cond = self.embed_cond(t, pooled)                              # (B, D)
        context = self.embed_text(context)                             # (B, L, D)
        x = self.embed_image(latent)                                   # (B, N, D)
        for i, block in enumerate(self.joint_blocks):
            if i not in skip_layers:
                context, x = block(context, x, cond)                   # (B, L, D) and (B, N, D)
        x = self.final_layer(x, cond)                                  # (B, N, p * p * C)
        return unpatchify(x, H // p, W // p, p)                        # (B, C, H, W)


def count_parameters(config: MMDiTConfig) -> int:
    """Learned parameters of a model of these sizes, without allocating it."""
    with torch.device("meta"):
        model = MMDiT(config)
    return sum(parameter.numel() for parameter in model.parameters())


def main():
    """Print what depth means: width, heads and parameters with SD3's conditioning."""
    print("depth  hidden  heads  parameters   (QK-norm adds 256 a block)")
    for depth in (2, 4, 8, 15, 18, 24, 30, 38):
        config = MMDiTConfig(depth, qk_norm=depth == 38)
        billions = count_parameters(config) / 1e9
        print(f"{depth:5}  {config.hidden_size:6}  {config.num_heads:5}  {billions:9.3f} B")


# ---- Precision and speed: the same formulas in the form that torch runs best ---------------------

def stream_dtype(x):
    """The type of a residual stream. In large models a stream leaves the range of fp16."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def layer_norm(x):
    """LayerNorm without learned scale. It sums in fp32, so autocast need not copy x to fp32."""
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def is_bf16_on_cpu(x) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def attend(q, k, v):
    """softmax(q k^T / 8) v for each head: (B, heads, n, 64) each -> (B, heads, n, 64)."""
    if not is_bf16_on_cpu(q):
        return F.scaled_dot_product_attention(q, k, v)
    at_once = max(1, 2**21 // (q.shape[2] * k.shape[2]))               # heads whose scores fit the cache
    Q = (q / 8).flatten(0, 1).split(at_once)                           # (at_once, n, 64) each
    K = k.flatten(0, 1).split(at_once)
    V = v.flatten(0, 1).split(at_once)
    parts = []
    for i in range(len(Q)):
        scores = Q[i] @ K[i].transpose(1, 2)                           # (at_once, n, n)
        parts.append(scores.softmax(dim=-1) @ V[i])
    return torch.cat(parts).view_as(q)


def gelu(x):
    """GELU in its tanh form. In bf16 on a CPU the exact form is faster and rounds to the same."""
    return F.gelu(x, approximate="none" if is_bf16_on_cpu(x) else "tanh")


if __name__ == "__main__":
    main()
