"""fig4_backbones.py: the networks that Fig. 4 compares (SD3, arXiv:2403.03206v1, Sec. 5.2.3).

    DiT        one set of weights for text and image tokens, joined to one sequence
    CrossDiT   DiT over the image tokens, which attend across to the text (Chen et al., 2023)
    UViT       a U-Net whose lowest level is a transformer (Hoogeboom et al., 2023)
    MM-DiT     two sets of weights: mmdit.MMDiT
    3 sets     MM-DiT with different weights for the tokens of CLIP and of T5

All have the same signature, (latent, t, context, pooled) -> velocity. They have the same depth,
width (64 depth) and number of heads (depth), t and pooled modulate every block, and the first
velocity is 0. So their parameters and FLOPs differ; the paper gives neither.

Not here    losses (flow.py), training (train.py)
Shapes      B batch   C latent channels   H W latent height, width   L text tokens   N image tokens
            D hidden_size
Run         python experiments/fig4_backbones.py --depth 8     prints parameters and FLOPs
"""

import argparse
import sys
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from mmdit import (
    HeadNorm,
    JointBlock,
    MMDiT,
    MMDiTConfig,
    StreamBlock,
    add_gated,
    attend,
    crop_center,
    joint_attention,
    merge_heads,
    modulate,
)


def into_attention(column: StreamBlock, x, mod):
    """The upper part of a column of Fig. 2b: x (B, n, D) -> q, k, v, (B, heads, n, 64) each."""
    return column.attn.queries_keys_values(modulate(x, mod.shift_attn, mod.scale_attn))


def add_attended(column: StreamBlock, x, attended, mod):
    """The first residual branch of a column: x, attended (B, n, D) -> x."""
    return add_gated(x, mod.gate_attn, column.attn.proj(attended))


def add_mlp(column: StreamBlock, x, mod):
    """The second residual branch of a column: x (B, n, D) -> x."""
    return add_gated(x, mod.gate_mlp, column.mlp(modulate(x, mod.shift_mlp, mod.scale_mlp)))


# ---- DiT: one set of weights ---------------------------------------------------------------------

class DiTBlock(nn.Module):
    """One column for all tokens: "a special case of MM-DiT with one shared set of weights"."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.column = StreamBlock(config)

    def forward(self, context, x, cond):
        """context (B, L, D), x (B, N, D), cond (B, D) -> context, x."""
        L, column = context.shape[1], self.column
        mod = column.modulation(cond)
        tokens = torch.cat([context, x], dim=1)                   # (B, L+N, D)
        q, k, v = into_attention(column, tokens, mod)             # (B, heads, L+N, 64) each
        tokens = add_attended(column, tokens, merge_heads(attend(q, k, v)), mod)
        tokens = add_mlp(column, tokens, mod)
        return tokens[:, :L], tokens[:, L:]


class DiT(MMDiT):
    """Peebles and Xie's DiT with text: both kinds of tokens are embedded and then joined."""

    def __init__(self, config: MMDiTConfig):
        super().__init__(config)
        self.joint_blocks = nn.ModuleList()
        for _ in range(config.depth):
            self.joint_blocks.append(DiTBlock(config))
        self.initialize()


# ---- CrossDiT: attention across to the text ------------------------------------------------------

class CrossAttention(nn.Module):
    """Image tokens ask, text tokens answer."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        D = config.hidden_size
        self.num_heads = config.num_heads
        self.q = nn.Linear(D, D)
        self.kv = nn.Linear(D, 2 * D)
        self.ln_q = HeadNorm(64) if config.qk_norm else nn.Identity()
        self.ln_k = HeadNorm(64) if config.qk_norm else nn.Identity()
        self.proj = nn.Linear(D, D)

    def forward(self, context, x):
        """context (B, L, D), x (B, N, D) -> (B, N, D)."""
        q = self.q(x).unflatten(-1, (self.num_heads, 64))         # (B, N, heads, 64)
        kv = self.kv(context).unflatten(-1, (2, self.num_heads, 64))
        k, v = kv.unbind(2)                                       # (B, L, heads, 64) each
        q, k = self.ln_q(q), self.ln_k(k)
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(merge_heads(out))


class CrossBlock(nn.Module):
    """A DiT block over the image, with attention to the text between its two branches (PixArt)."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.column = StreamBlock(config)
        self.cross = CrossAttention(config)

    def forward(self, context, x, cond):
        """context (B, L, D), x (B, N, D), cond (B, D) -> context as it was, x."""
        mod = self.column.modulation(cond)
        q, k, v = into_attention(self.column, x, mod)             # (B, heads, N, 64) each
        x = add_attended(self.column, x, merge_heads(attend(q, k, v)), mod)
        x = x + self.cross(context, x)                            # no gate: its proj starts at 0
        return context, add_mlp(self.column, x, mod)


class CrossDiT(MMDiT):
    """DiT over image tokens that attend across to the text tokens, as in PixArt-alpha."""

    def __init__(self, config: MMDiTConfig):
        super().__init__(config)
        self.joint_blocks = nn.ModuleList()
        for _ in range(config.depth):
            self.joint_blocks.append(CrossBlock(config))
        self.initialize()

    @torch.no_grad()
    def initialize(self, rng=None, assign=torch.Tensor.copy_):
        """As MMDiT.initialize. The output of each cross-attention starts at 0 as well."""
        super().initialize(rng, assign)
        for name, module in self.named_modules():
            if name.endswith("cross.proj"):
                assign(module.weight, torch.zeros(module.weight.shape))


# ---- UViT: convolutions around a transformer -----------------------------------------------------

class ResidualBlock(nn.Module):
    """(B, inputs, H, W) -> (B, width, H, W): two convolutions, modulated by cond between them."""

    def __init__(self, inputs, width, hidden_size):
        super().__init__()
        self.norm1 = nn.GroupNorm(16, inputs, affine=False)
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(16, width, affine=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 3 * width))
        self.skip = nn.Conv2d(inputs, width, 1) if inputs != width else nn.Identity()

    def forward(self, image, cond):
        vectors = self.adaLN_modulation(cond)[:, :, None, None]   # (B, 3 width, 1, 1)
        shift, scale, gate = vectors.chunk(3, dim=1)              # (B, width, 1, 1) each
        h = self.conv1(F.silu(self.norm1(image)))
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        return self.skip(image) + gate * h


class UViT(CrossDiT):
    """A U-Net of two levels: convolutions at the latent's size, then CrossDiT's blocks at half of
    it, on as many tokens as 2 x 2 patches would give.

    The width at the latent's size is D / 4, with `blocks` residual blocks on each side. The paper
    gives no sizes and does not say how its UViT reads the text; here it attends across to it.
    """

    def __init__(self, config: MMDiTConfig, blocks=2):
        super().__init__(config)
        D, C = config.hidden_size, config.latent_channels
        width = D // 4
        self.x_embedder = nn.Conv2d(C, width, 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for _ in range(blocks):
            self.down_blocks.append(ResidualBlock(width, width, D))
            self.up_blocks.append(ResidualBlock(2 * width, width, D))
        self.down = nn.Conv2d(width, D, 2, stride=2)
        self.up = nn.Conv2d(D, 4 * width, 1)
        norm, linear = nn.GroupNorm(16, width, affine=False), nn.Conv2d(width, C, 3, padding=1)
        self.final_layer = nn.Sequential(OrderedDict(norm=norm, silu=nn.SiLU(), linear=linear))
        self.initialize()

    def forward(self, latent, t, context, pooled):
        """As MMDiT.forward: the velocity (B, C, H, W) at z_t = latent and t (B,)."""
        cond = self.embed_cond(t, pooled)                         # (B, D)
        context = self.context_embedder(context)                  # (B, L, D)
        image, kept = self.x_embedder(latent), []                 # (B, D/4, H, W)
        for block in self.down_blocks:
            image = block(image, cond)
            kept.append(image)
        x = self.down(image)                                      # (B, D, H/2, W/2)
        height, width = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)                          # (B, N, D)
        x = (crop_center(self.pos_embed, height, width) + x).to(x.dtype)
        for block in self.joint_blocks:
            context, x = block(context, x, cond)
        image = self.up(x.transpose(1, 2).unflatten(2, (height, width)))          # (B, D, H/2, W/2)
        image = F.pixel_shuffle(image, 2)                         # (B, D/4, H, W)
        for block in self.up_blocks:
            image = block(torch.cat([image, kept.pop()], dim=1), cond)
        return self.final_layer(image)                            # (B, C, H, W)


# ---- MM-DiT with three sets of weights -----------------------------------------------------------

class ThreeSetBlock(JointBlock):
    """Fig. 2b with three columns: CLIP tokens, T5 tokens, image tokens."""

    def __init__(self, config: MMDiTConfig, clip_tokens, last=False):
        super().__init__(config, last)
        self.clip_tokens = clip_tokens
        self.t5_block = StreamBlock(config, last=last)

    def forward(self, context, x, cond):
        """context (B, L, D), CLIP tokens first, x (B, N, D), cond (B, D) -> context, x."""
        n = self.clip_tokens
        clip, t5 = context[:, :n], context[:, n:]                 # (B, n, D) and (B, L-n, D)
        clip_mod = self.context_block.modulation(cond)
        t5_mod = self.t5_block.modulation(cond)
        x_mod = self.x_block.modulation(cond)

        clip_q, clip_k, clip_v = into_attention(self.context_block, clip, clip_mod)
        t5_q, t5_k, t5_v = into_attention(self.t5_block, t5, t5_mod)
        q = torch.cat([clip_q, t5_q], dim=2)                      # (B, heads, L, 64)
        k = torch.cat([clip_k, t5_k], dim=2)
        v = torch.cat([clip_v, t5_v], dim=2)
        x_qkv = into_attention(self.x_block, x, x_mod)
        text_out, x_out = joint_attention((q, k, v), x_qkv)       # (B, L, D) and (B, N, D)

        x = add_attended(self.x_block, x, x_out, x_mod)
        x = add_mlp(self.x_block, x, x_mod)
        if self.last:
            return None, x
        clip = add_attended(self.context_block, clip, text_out[:, :n], clip_mod)
        clip = add_mlp(self.context_block, clip, clip_mod)
        t5 = add_attended(self.t5_block, t5, text_out[:, n:], t5_mod)
        t5 = add_mlp(self.t5_block, t5, t5_mod)
        return torch.cat([clip, t5], dim=1), x


class ThreeSetText(nn.Module):
    """The linear layers before the blocks: one for the first clip_tokens, one for the T5 tokens."""

    def __init__(self, config: MMDiTConfig, clip_tokens):
        super().__init__()
        self.clip_tokens = clip_tokens
        self.clip = nn.Linear(config.context_dim, config.hidden_size)
        self.t5 = nn.Linear(config.context_dim, config.hidden_size)

    def forward(self, context):
        clip, t5 = context[:, : self.clip_tokens], context[:, self.clip_tokens :]
        return torch.cat([self.clip(clip), self.t5(t5)], dim=1)   # (B, L, D)


class ThreeSetMMDiT(MMDiT):
    """MM-DiT with three sets of weights; the first clip_tokens of the text come from CLIP."""

    def __init__(self, config: MMDiTConfig, clip_tokens=77):
        super().__init__(config)
        self.context_embedder = ThreeSetText(config, clip_tokens)
        self.joint_blocks = nn.ModuleList()
        for i in range(config.depth):
            last = i == config.depth - 1
            self.joint_blocks.append(ThreeSetBlock(config, clip_tokens, last))
        self.initialize()


# ---- Sizes ---------------------------------------------------------------------------------------

NAMES = ("DiT", "CrossDiT", "UViT", "MM-DiT", "MM-DiT, 3 sets")


def make_backbone(name, config: MMDiTConfig, clip_tokens=77):
    """One of NAMES, with fresh weights. clip_tokens: the text tokens that come from CLIP."""
    if name == "MM-DiT, 3 sets":
        return ThreeSetMMDiT(config, clip_tokens)
    return {"DiT": DiT, "CrossDiT": CrossDiT, "UViT": UViT, "MM-DiT": MMDiT}[name](config)


def measure(name, config: MMDiTConfig, side, text_tokens=154, clip_tokens=77):
    """Parameters, and FLOPs of one sample's forward pass as torch counts them, without computing.

    side: latent pixels of a side. A multiply and an add are 2 FLOPs.
    """
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model = make_backbone(name, config, clip_tokens)
        latent = torch.zeros(1, config.latent_channels, side, side)
        context = torch.zeros(1, text_tokens, config.context_dim)
        model(latent, torch.zeros(1), context, torch.zeros(1, config.pooled_dim))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, counter.get_total_flops()


def main():
    """Print what each backbone costs at one depth."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--resolution", type=int, default=256, help="px per side")
    options = parser.parse_args()
    config = MMDiTConfig(options.depth)
    print(f"depth {options.depth}, {options.resolution} px, 77 CLIP and 77 T5 tokens")
    print("backbone          parameters   GFLOP forward")
    for name in NAMES:
        parameters, flops = measure(name, config, options.resolution // 8)
        print(f"{name:16} {parameters / 1e6:9.1f} M {flops / 1e9:15.1f}")


if __name__ == "__main__":
    main()
