"""mmdit.py: MM-DiT, the multimodal diffusion transformer (SD3, arXiv:2403.03206v1, Sec. 4).

Read with   Fig. 2a is MMDiT.forward, Fig. 2b is JointBlock.forward; Sec. 5.3.2: QK-norm, positions
Not here    paths, losses, solvers (flow.py), prompts (text_encoders.py), pixels (vae.py),
            one or three sets of weights (experiments/fig4_backbones.py), FLOPs (bench/plan.py)
Time        t in [0, 1], t = 0 is data and t = 1 is noise; timestep_embedding multiplies by 1000
Shapes      B batch   C latent channels   H W latent height, width   p patch size
            N = HW/p^2 image tokens   L text tokens   D hidden_size
Names       parameters have the names of the released files: joint_blocks.0.x_block.attn.qkv, ...
Run         python mmdit.py     prints what depth means: 8 B parameters at depth 38, as in the paper
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, replace
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
    position_start: float = 0.0      # first position of the grid; 0 in the released models
    position_step: float = 1 / 3     # distance of neighbours; 64 / side in the released models
    dual_attention_layers: int = 0   # SD3.5-medium: its first 13 blocks have a second attention

    @property
    def hidden_size(self):           # Sec. 4; with num_heads = depth, a head has 64 channels
        return 64 * self.depth

    @property
    def num_heads(self):
        return self.depth

    @property
    def positions(self):             # (pos_embed_max_size,) float64, for rows and for columns
        steps = torch.arange(self.pos_embed_max_size, dtype=torch.float64)
        return self.position_start + self.position_step * steps


# ---- Embeddings of time and place ----------------------------------------------------------------
def timestep_embedding(t):
    """Sinusoids of 1000 t in fp32, cosines first: (B,) -> (B, 256)."""
    steps = torch.arange(128, dtype=torch.float32, device=t.device)
    frequency = torch.exp(-math.log(10000) * steps / 128)              # (128,)
    angle = (1000 * t.float())[:, None] * frequency                    # (B, 128)
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def paper_positions(resolution, longest):
    """The grid of Sec. 5.3.2, (p - (h_max - s) / 2) * 256 / S for p = 0 ... h_max - 1. (longest,)

    resolution: S in px, so s = S / 16 tokens. longest: h_max or w_max, the longest side of any
    bucket in tokens. The s tokens at the centre have the positions of a 256 x 256 picture."""
    s = resolution / 16
    p = torch.arange(longest, dtype=torch.float64)
    return (p - (longest - s) / 2) * 256 / resolution


def sincos_2d(rows, columns, size):
    """Frequency embedding of a grid, row by row: rows (R,), columns (K,) -> (R * K, size)."""
    frequency = 10000.0 ** (-torch.arange(size // 4, dtype=torch.float64) / (size // 4))
    row, column = torch.meshgrid(rows, columns, indexing="ij")         # (R, K) each
    row = row.flatten()[:, None] * frequency                           # (R * K, size/4)
    column = column.flatten()[:, None] * frequency
    return torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], dim=1)


def crop_center(table, height, width):
    """The middle of a square table of positions: (1, G * G, D) -> (1, height * width, D)."""
    side = math.isqrt(table.shape[1])
    if height > side or width > side:
        raise ValueError(
            f"the latent needs {height}x{width} tokens but the position grid has {side}x{side}. "
            f"Ask for a picture of at most {16 * side}x{16 * side} px (VAE factor 8 x patch 2).")
    top, left = (side - height) // 2, (side - width) // 2
    grid = table.unflatten(1, (side, side))                            # (1, G, G, D)
    return grid[:, top : top + height, left : left + width].flatten(1, 2)


def unpatchify(tokens, height, width, patch_size):
    """(B, N, p * p * C) -> (B, C, H, W); N = height * width. A token is (row, column, channel)."""
    p = patch_size
    x = tokens.unflatten(2, (p, p, -1))                                # (B, N, p, p, C)
    x = x.unflatten(1, (height, width))                                # (B, H/p, W/p, p, p, C)
    x = x.permute(0, 5, 1, 3, 2, 4)                                    # (B, C, H/p, p, W/p, p)
    return x.flatten(4, 5).flatten(2, 3)                               # (B, C, H, W)


def embedder(input_size, hidden_size):
    """Fig. 2a, the MLPs that bring time and pooled text to the width of the model: -> (B, D)."""
    first = nn.Linear(input_size, hidden_size)
    second = nn.Linear(hidden_size, hidden_size)
    return nn.Sequential(OrderedDict(mlp=nn.Sequential(first, nn.SiLU(), second)))


# ---- The MM-DiT block (Fig. 2b) ------------------------------------------------------------------
class Modulation(NamedTuple):
    """What one column of Fig. 2b gets from cond, (B, 1, D) each, in the order of released files."""
    shift_attn: torch.Tensor         # beta
    scale_attn: torch.Tensor         # alpha = 1 + scale_attn
    gate_attn: torch.Tensor = None   # gamma; the last text column has nothing from here on
    shift_mlp: torch.Tensor = None   # epsilon
    scale_mlp: torch.Tensor = None   # delta = 1 + scale_mlp
    gate_mlp: torch.Tensor = None    # zeta
    shift_attn2: torch.Tensor = None      # the last three belong to the second attention
    scale_attn2: torch.Tensor = None
    gate_attn2: torch.Tensor = None


def modulate(x, shift, scale):
    """"Layernorm" and "Mod": alpha * norm(x) + beta with alpha = 1 + scale. x (B, n, D), the others
    (B, 1, D). Autocast would copy x to fp32; the norm sums in fp32 anyway."""
    with torch.autocast(x.device.type, enabled=False):
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return torch.addcmul(shift, normed, 1 + scale)


def add_gated(x, gate, branch):
    """The "*" and "+" of Fig. 2b: x + gate * branch. x, branch (B, n, D); gate (B, 1, D)."""
    return torch.addcmul(x, gate, branch)


def joint_attention(context_qkv, x_qkv):
    """One attention over all tokens, text first: q, k, v of both columns, (B, heads, L, 64) and
    (B, heads, N, 64) each, -> what each column gets, (B, L, D) and (B, N, D)."""
    context_q, context_k, context_v = context_qkv
    x_q, x_k, x_v = x_qkv
    q = torch.cat([context_q, x_q], dim=2)                             # (B, heads, L+N, 64)
    k = torch.cat([context_k, x_k], dim=2)
    v = torch.cat([context_v, x_v], dim=2)
    out = attend(q, k, v)                                              # (B, heads, L+N, 64)
    L = context_q.shape[2]
    return merge_heads(out[:, :, :L]), merge_heads(out[:, :, L:])


def merge_heads(x):
    """(B, heads, n, 64) -> (B, n, D). If not contiguous, F.linear copies its weight per sample."""
    return x.transpose(1, 2).contiguous().flatten(2)


class HeadNorm(nn.RMSNorm):
    """QK-norm (Sec. 5.3.2): RMSNorm over the 64 channels of each head, with a learned scale."""
    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):             # as in modulate
            return F.rms_norm(x, (64,), self.weight.to(x.dtype), eps=1e-6)


class Attention(nn.Module):
    """The linear layers of one column before and after the joint attention."""
    def __init__(self, config, with_output=True):
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D) if with_output else None
        self.ln_q = HeadNorm(64) if config.qk_norm else nn.Identity()
        self.ln_k = HeadNorm(64) if config.qk_norm else nn.Identity()

    def queries_keys_values(self, x):
        """(B, n, D) -> q, k, v, (B, heads, n, 64) each; no queries where there is no output."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, 64))       # (B, n, 3, heads, 64)
        q, k, v = qkv.unbind(2)                                        # (B, n, heads, 64) each
        if self.proj is None:
            q = q[:, :0]                                               # (B, 0, heads, 64)
        q, k = self.ln_q(q), self.ln_k(k)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class MLP(nn.Module):
    """(B, n, D) -> (B, n, D) through 4 D channels."""
    def __init__(self, hidden_size):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.fc2 = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x):
        return self.fc2(gelu(self.fc1(x)))


class StreamBlock(nn.Module):
    """The weights of one column of Fig. 2b.

    last: nothing reads the text after the last block. So its column has no output projection, no
    MLP, and only shift_attn and scale_attn. dual: SD3.5-medium's second attention, attn2."""
    def __init__(self, config, last=False, dual=False):
        super().__init__()
        D = config.hidden_size
        self.num_modulations = 9 if dual else 6
        if last:
            self.num_modulations = 2
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, self.num_modulations * D))
        self.attn = Attention(config, with_output=not last)
        self.attn2 = Attention(config) if dual else None
        self.mlp = None if last else MLP(D)

    def modulation(self, cond):
        """cond (B, D) -> the vectors of this column."""
        vectors = self.adaLN_modulation(cond).unsqueeze(1)             # (B, 1, 6 D); 2 D or 9 D
        return Modulation(*vectors.chunk(self.num_modulations, dim=-1))

    def second_attention(self, x, mod):
        """SD3.5-medium: what the image tokens x (B, N, D) learn from each other, without text."""
        x = modulate(x, mod.shift_attn2, mod.scale_attn2)
        q, k, v = self.attn2.queries_keys_values(x)                    # (B, heads, N, 64) each
        return self.attn2.proj(merge_heads(attend(q, k, v)))           # (B, N, D)


class JointBlock(nn.Module):
    """Fig. 2b: text and image keep their own weights and meet in one attention over all tokens."""
    def __init__(self, config, last=False, dual=False):
        super().__init__()
        self.last = last
        self.context_block = StreamBlock(config, last=last)
        self.x_block = StreamBlock(config, dual=dual)

    def forward(self, context, x, cond):
        """context (B, L, D), x (B, N, D), cond (B, D) -> context, x. The last context is None."""
        c_block, x_block = self.context_block, self.x_block
        c_mod = c_block.modulation(cond)
        x_mod = x_block.modulation(cond)

        c_in = modulate(context, c_mod.shift_attn, c_mod.scale_attn)   # beta_c, alpha_c
        x_in = modulate(x, x_mod.shift_attn, x_mod.scale_attn)         # beta_x, alpha_x
        c_qkv = c_block.attn.queries_keys_values(c_in)
        x_qkv = x_block.attn.queries_keys_values(x_in)
        c_out, x_out = joint_attention(c_qkv, x_qkv)

        if x_block.attn2 is not None:                                  # SD3.5-medium only
            x = add_gated(x, x_mod.gate_attn2, x_block.second_attention(x, x_mod))
        x = add_gated(x, x_mod.gate_attn, x_block.attn.proj(x_out))    # gamma_x
        x_in = modulate(x, x_mod.shift_mlp, x_mod.scale_mlp)           # epsilon_x, delta_x
        x = add_gated(x, x_mod.gate_mlp, x_block.mlp(x_in))            # zeta_x
        if self.last:
            return None, x

        context = add_gated(context, c_mod.gate_attn, c_block.attn.proj(c_out))  # gamma_c
        c_in = modulate(context, c_mod.shift_mlp, c_mod.scale_mlp)     # epsilon_c, delta_c
        context = add_gated(context, c_mod.gate_mlp, c_block.mlp(c_in))  # zeta_c
        return context, x


class FinalLayer(nn.Module):
    """Fig. 2a, the last "Modulation" and "Linear": (B, N, D) -> (B, N, p * p * C)."""
    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))
        self.linear = nn.Linear(D, config.patch_size**2 * config.latent_channels)

    def forward(self, x, cond):
        shift, scale = self.adaLN_modulation(cond).unsqueeze(1).chunk(2, dim=-1)  # (B, 1, D) each
        return self.linear(modulate(x, shift, scale))


# ---- The model (Fig. 2a) -------------------------------------------------------------------------
class MMDiT(nn.Module):
    """(z_t, t, context, pooled) -> velocity (Fig. 2a). It keeps no state between calls."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        D, p = config.hidden_size, config.patch_size
        patching = nn.Conv2d(config.latent_channels, D, p, stride=p)
        self.x_embedder = nn.Sequential(OrderedDict(proj=patching))
        self.t_embedder = embedder(256, D)
        self.y_embedder = embedder(config.pooled_dim, D)
        self.context_embedder = nn.Linear(config.context_dim, D)
        self.joint_blocks = nn.ModuleList()
        for i in range(config.depth):
            last = i == config.depth - 1
            dual = i < config.dual_attention_layers
            self.joint_blocks.append(JointBlock(config, last, dual))
        self.final_layer = FinalLayer(config)
        self.register_buffer("pos_embed", torch.empty(1, config.pos_embed_max_size**2, D))
        if self.pos_embed.device.type != "meta":
            self.initialize()

    @torch.no_grad()
    def initialize(self, rng=None, assign=torch.Tensor.copy_):
        """Xavier weights (N(0, .02^2) in the embedders) and zero biases. adaLN and the output start
        at 0: a block is the identity.

        Each weight is drawn whole, on the CPU, and given to assign(parameter, value): the numbers
        are the same on any device and for shards, and only one whole weight exists at a time."""
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
        x = self.x_embedder(latent).flatten(2).transpose(1, 2)         # (B, N, D)
        positions = crop_center(self.pos_embed, H // p, W // p)        # (1, N, D)
        # Positions come first: a sum takes the memory layout of its first operand.
        return (positions + x).to(x.dtype)

    def embed_cond(self, t, pooled):
        """The y of Fig. 2, in fp32 also under autocast: t (B,), pooled (B, pooled_dim) -> (B, D)"""
        with torch.autocast(t.device.type, enabled=False):
            dtype = self.t_embedder.mlp[0].weight.dtype
            time = timestep_embedding(t).to(dtype)                     # (B, 256)
            return self.t_embedder(time) + self.y_embedder(pooled.to(dtype))

    def forward(self, latent, t, context, pooled, skip_layers=()):
        """The velocity (B, C, H, W) at z_t = latent and t (B,) in [0, 1].

        context (B, L, context_dim), pooled (B, pooled_dim). skip_layers: blocks to leave out."""
        p = self.config.patch_size
        H, W = latent.shape[-2:]
        cond = self.embed_cond(t, pooled)                              # (B, D)
        context = self.context_embedder(context)                       # (B, L, D), no positions
        x = self.embed_image(latent)                                   # (B, N, D)
        if x.dtype == torch.float16:                                   # They overflow fp16.
            context, x = context.float(), x.float()
        for i, block in enumerate(self.joint_blocks):
            if i not in skip_layers:
                context, x = block(context, x, cond)                   # (B, L, D) and (B, N, D)
        x = self.final_layer(x, cond)                                  # (B, N, p * p * C)
        return unpatchify(x, H // p, W // p, p)                        # (B, C, H, W)


def count_parameters(config):
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


# ---- The model of a new run (Sec. 5.3.2) ---------------------------------------------------------
def model_sizes(config, vae, text, longest_side, start=None):
    """Sizes of a model that will be trained, with the paper's positions.

    config: resolution in px, depth, qk_norm. longest_side: of all pictures, in px. start: the model
    of --init. If its positions begin at 0, as in released models, the new model has the same."""
    longest = max(2 * config.resolution, longest_side) // 16           # tokens; 4:1 is 2 S x S / 2
    first, second, *_ = paper_positions(config.resolution, longest).tolist()
    grid = MMDiTConfig(
        pos_embed_max_size=longest, position_start=first, position_step=second - first)
    if start and start.config.position_start == 0:
        grid = start.config
    return replace(grid, depth=config.depth, latent_channels=vae.latent_channels,
                   context_dim=text.t5_width, pooled_dim=text.clip_l_width + text.clip_g_width,
                   qk_norm=config.qk_norm)


@torch.no_grad()
def load_weights(model, weights, assign=torch.Tensor.copy_):
    """Copies another model's weights. A missing QK-norm stays 1. ValueError if sizes differ."""
    theirs = dict(weights.named_parameters())
    for name, parameter in model.named_parameters():
        if name in theirs or ".ln_" not in name:
            value = theirs.pop(name, None)
            if value is None or value.shape != parameter.shape:
                raise ValueError(f"--init has another {name}; give its --depth and --encoders")
            assign(parameter, value)
    if theirs:
        raise ValueError(f"--init has {min(theirs)}; give its --depth and --qk-norm true")
    if weights.config.position_start == 0:
        model.pos_embed.copy_(weights.pos_embed)


# ---- Faster in bf16 on a CPU ---------------------------------------------------------------------
def attend(q, k, v):
    """softmax(q k^T / 8) v for each head, (B, heads, n, 64) each. In bf16 on a CPU torch's backward
    pass is slow. The loop below makes training 3 (70 tokens) to 1.3 times (1,180) as fast."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v)
    at_once = max(1, 2**21 // (q.shape[2] * k.shape[2]))               # scores that fit the cache
    Q = (q / 8).flatten(0, 1).split(at_once)                           # (at_once, n, 64) each
    K = k.flatten(0, 1).split(at_once)
    V = v.flatten(0, 1).split(at_once)
    parts = []
    for i in range(len(Q)):
        scores = Q[i] @ K[i].transpose(1, 2)                           # (at_once, n, n)
        parts.append(scores.softmax(dim=-1) @ V[i])
    return torch.cat(parts).view_as(q)


def gelu(x):
    """GELU in its tanh form. In bf16 on a CPU it is the exact form: the model is 2 to 7 % faster,
    and the two differ by 2e-4, where bf16 rounds to 2e-3."""
    exact = x.device.type == "cpu" and x.dtype == torch.bfloat16
    return F.gelu(x, approximate="none" if exact else "tanh")


if __name__ == "__main__":
    main()
