"""fig4_backbones.py: which backbone learns best? (SD3, arXiv:2403.03206v1, Sec. 5.2.3, Fig. 4)

    DiT        one set of weights for text and image tokens, joined to one sequence
    CrossDiT   DiT over the image tokens, which attend across to the text (Chen et al., 2023)
    UViT       a U-Net whose lowest level is a transformer (Hoogeboom et al., 2023)
    MM-DiT     two sets of weights: mmdit.MMDiT
    3 sets     MM-DiT with different weights for the tokens of CLIP and of T5

All have one signature, (latent, t, context, pooled) -> velocity, and the same depth and width. All
train with AdamW on the same batches, noise and t. After each quarter the average of the weights is
validated (App. B.3) and draws the same prompts from the same noise.

Differs from the paper: drawn scenes, or the pictures of --data, in place of CC12M; small models and
short runs; the CLIP beside the encoders. FID compares with held-out scenes, or with the first
pictures of --data, which are also trained on.

Rule        a claim held if it is true with every seed, and did not if with none; its interval goes
            from the smallest to the largest lead of a seed
Shapes      B batch   C latent channels   H W latent height, width   L text tokens   N image tokens
Run         python experiments/fig4_backbones.py --quick     minutes on one CPU core; --full: a GPU
"""

import shlex
import sys
import tempfile
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from batches import Batches
from checkpoints import SHIPPED, find_model_file, portable
from data import ImageFiles
from devices import World, command, pick_precision
from evaluate import draw_paths
from flow import density, validate
from metrics import PictureMeasures
from mmdit import (HeadNorm, JointBlock, MMDiT, MMDiTConfig, StreamBlock, add_gated, attend,
                   crop_center, joint_attention, merge_heads, modulate)
from options import check_options, option, read_options, write_atomically, write_json
from sample import Pipeline
from scenes import HELD_OUT_SEED, Scenes
from train import Run, TrainConfig, fit, flow_loss, read_inputs


# ---- The backbones -------------------------------------------------------------------------------

def into_attention(column: StreamBlock, x, mod):
    """The upper part of a column of Fig. 2b: x (B, n, D) -> q, k, v, (B, heads, n, 64) each."""
    return column.attn.queries_keys_values(modulate(x, mod.shift_attn, mod.scale_attn))


def out_of_attention(column: StreamBlock, x, attended, mod):
    """Both residual branches of a column: x, attended (B, n, D) -> x."""
    x = add_gated(x, mod.gate_attn, column.attn.proj(attended))
    return add_gated(x, mod.gate_mlp, column.mlp(modulate(x, mod.shift_mlp, mod.scale_mlp)))


class DiTBlock(nn.Module):
    """One column for all tokens: "a special case of MM-DiT with one shared set of weights"."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.column = StreamBlock(config)

    def forward(self, context, x, cond):
        """context (B, L, D), x (B, N, D), cond (B, D) -> context, x."""
        L = context.shape[1]
        mod = self.column.modulation(cond)
        tokens = torch.cat([context, x], dim=1)                   # (B, L+N, D)
        q, k, v = into_attention(self.column, tokens, mod)        # (B, heads, L+N, 64) each
        attended = merge_heads(attend(q, k, v))                   # (B, L+N, D)
        tokens = out_of_attention(self.column, tokens, attended, mod)
        return tokens[:, :L], tokens[:, L:]


class DiT(MMDiT):
    """Peebles and Xie's DiT with text: both kinds of tokens are embedded and then joined."""

    def __init__(self, config: MMDiTConfig):
        super().__init__(config)
        for i in range(config.depth):
            self.joint_blocks[i] = DiTBlock(config)
        self.initialize()


class CrossAttention(nn.Module):
    """Image tokens ask, text tokens answer: context (B, L, D), x (B, N, D) -> (B, N, D)."""

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
        q = self.q(x).unflatten(-1, (self.num_heads, 64))         # (B, N, heads, 64)
        kv = self.kv(context).unflatten(-1, (2, self.num_heads, 64))
        k, v = kv.unbind(2)                                       # (B, L, heads, 64) each
        q, k = self.ln_q(q), self.ln_k(k)
        out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(merge_heads(out))


class CrossBlock(nn.Module):
    """DiT's block for the image. Its tokens attend to each other and, as in PixArt, to the text."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.column = StreamBlock(config)
        self.cross = CrossAttention(config)

    def forward(self, context, x, cond):
        """context (B, L, D), x (B, N, D), cond (B, D) -> context as it was, x."""
        mod = self.column.modulation(cond)
        q, k, v = into_attention(self.column, x, mod)             # (B, heads, N, 64) each
        x = add_gated(x, mod.gate_attn, self.column.attn.proj(merge_heads(attend(q, k, v))))
        x = x + self.cross(context, x)                            # no gate: its proj starts at 0
        x_in = modulate(x, mod.shift_mlp, mod.scale_mlp)
        return context, add_gated(x, mod.gate_mlp, self.column.mlp(x_in))


class CrossDiT(MMDiT):
    """DiT over image tokens that attend across to the text tokens, as in PixArt-alpha."""

    def __init__(self, config: MMDiTConfig):
        super().__init__(config)
        for i in range(config.depth):
            self.joint_blocks[i] = CrossBlock(config)
        self.initialize()

    @torch.no_grad()
    def initialize(self, rng=None, assign=torch.Tensor.copy_):
        """As MMDiT.initialize. The output of each cross-attention starts at 0 as well."""
        super().initialize(rng, assign)
        for name, module in self.named_modules():
            if name.endswith("cross.proj"):
                assign(module.weight, torch.zeros(module.weight.shape))


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
    """A U-Net of two levels: convolutions of width D / 4, and CrossDiT's blocks at half the size.
    The paper gives no sizes, and does not say how its UViT reads the text."""

    def __init__(self, config: MMDiTConfig):
        super().__init__(config)
        D, C = config.hidden_size, config.latent_channels
        width = D // 4
        self.x_embedder = nn.Conv2d(C, width, 3, padding=1)
        self.down_blocks = nn.ModuleList([ResidualBlock(width, width, D) for _ in range(2)])
        self.up_blocks = nn.ModuleList([ResidualBlock(2 * width, width, D) for _ in range(2)])
        self.down = nn.Conv2d(width, D, 2, stride=2)
        self.up = nn.Conv2d(D, 4 * width, 1)
        self.final_layer = nn.Sequential(OrderedDict(             # `initialize` knows the names.
            norm=nn.GroupNorm(16, width, affine=False), silu=nn.SiLU(),
            linear=nn.Conv2d(width, C, 3, padding=1)))
        self.initialize()

    def forward(self, latent, t, context, pooled):
        """As MMDiT.forward: the velocity (B, C, H, W) at z_t = latent and t (B,)."""
        cond = self.embed_cond(t, pooled)                         # (B, D)
        context = self.context_embedder(context)                  # (B, L, D)
        image = self.x_embedder(latent)                           # (B, D/4, H, W)
        kept = []
        for block in self.down_blocks:
            image = block(image, cond)
            kept.append(image)
        x = self.down(image)                                      # (B, D, H/2, W/2)
        height, width = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)                          # (B, N, D)
        x = (crop_center(self.pos_embed, height, width) + x).to(x.dtype)
        for block in self.joint_blocks:
            context, x = block(context, x, cond)
        x = x.transpose(1, 2).unflatten(2, (height, width))       # (B, D, H/2, W/2)
        image = F.pixel_shuffle(self.up(x), 2)                    # (B, D/4, H, W)
        for block in self.up_blocks:
            image = block(torch.cat([image, kept.pop()], dim=1), cond)
        return self.final_layer(image)                            # (B, C, H, W)


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
        clip_qkv = into_attention(self.context_block, clip, clip_mod)
        t5_qkv = into_attention(self.t5_block, t5, t5_mod)
        x_qkv = into_attention(self.x_block, x, x_mod)
        text_qkv = [torch.cat(pair, dim=2) for pair in zip(clip_qkv, t5_qkv)]
        text_out, x_out = joint_attention(text_qkv, x_qkv)        # (B, L, D) and (B, N, D)
        x = out_of_attention(self.x_block, x, x_out, x_mod)
        if self.last:
            return None, x
        clip = out_of_attention(self.context_block, clip, text_out[:, :n], clip_mod)
        t5 = out_of_attention(self.t5_block, t5, text_out[:, n:], t5_mod)
        return torch.cat([clip, t5], dim=1), x


class ThreeSetMMDiT(MMDiT):
    """MM-DiT with three sets of weights. The first clip_tokens of the text come from CLIP."""

    def __init__(self, config: MMDiTConfig, clip_tokens=77):
        super().__init__(config)
        for i in range(config.depth):
            self.joint_blocks[i] = ThreeSetBlock(config, clip_tokens, last=i == config.depth - 1)
        self.initialize()


NAMES = ("DiT", "CrossDiT", "UViT", "MM-DiT", "MM-DiT, 3 sets")


def make_backbone(name, config: MMDiTConfig, clip_tokens=77):
    """One of NAMES, with fresh weights. clip_tokens: the text tokens that come from CLIP."""
    if name == "MM-DiT, 3 sets":
        return ThreeSetMMDiT(config, clip_tokens)
    return {"DiT": DiT, "CrossDiT": CrossDiT, "UViT": UViT, "MM-DiT": MMDiT}[name](config)


def measure(model, latent, context, pooled):
    """Parameters, and FLOPs of a forward pass as torch counts them: 2 for a multiply and an add."""
    t = torch.zeros(len(latent), device=latent.device)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(latent, t, context, pooled)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters, counter.get_total_flops()


# ---- The experiment ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Options:
    """What is compared, and how long it trains."""
    data: str = option("", "folder of captioned pictures; empty: drawn scenes")
    encoders: str = option(str(SHIPPED), "model with the frozen VAE and text encoders")
    num_scenes: int = option(16384, "scenes to train on", 64, 10**8)
    depth: int = option(4, "blocks of every backbone", 1, 64)
    steps: int = option(2000, "training steps of every backbone", 4, 10**8)
    batch_size: int = option(64, "pictures in a step", 1, 10**5)
    seeds: int = option(2, "repetitions with other weights, batches and noise", 1, 100)
    num_pictures: int = option(256, "drawn each time for CLIP score and FID", 2, 10**5)
    out: str = option("results/fig4_backbones.json", "what is measured; the figure lies beside it")

    def __post_init__(self):
        check_options(self)


PRESETS = {
    "quick": {"depth": 2, "steps": 160, "batch_size": 32, "num_scenes": 2048, "num_pictures": 64},
    "full": {"depth": 8, "steps": 2500, "batch_size": 256, "num_scenes": 65536,
             "num_pictures": 1000},
}
MEASURES = {"validation": "validation loss", "clip_score": "CLIP score", "fid": "FID"}
RESOLUTION = 64                      # px per side
SAMPLING = {"num_steps": 25, "guidance_scale": 4.0, "schedule": "shifted", "timestep_shift": 1.0,
            "unconditional": "zeros", "height": RESOLUTION, "width": RESOLUTION}


def reference(options):
    """Real pictures, uint8 (64, 64, 3), and their captions, which are the prompts."""
    source = Scenes(options.num_pictures, HELD_OUT_SEED)
    if options.data:
        source = ImageFiles(options.data)
    indices = range(min(options.num_pictures, len(source)))
    pictures = [source.image(index, RESOLUTION, RESOLUTION) for index in indices]
    return pictures, [source.captions(index)[-1] for index in indices]


def report(average, step, pipeline, unseen, prompts, measures):
    """The report of `fit`: validation loss, CLIP score and FID. It has no pictures to keep."""
    levels = validate(average, unseen.validation(64), pipeline.precision)                 # (8,)
    pipeline.mmdit = average
    pictures, _ = draw_paths(pipeline, prompts, seed=1)
    return {"validation": levels[:-1].mean().item(), **measures(pictures)}, None


def learn(name, config, inputs, world, measure_average):
    """Trains a backbone: (parameters, FLOPs), [{"step", "validation", "clip_score", ...}, ...]"""
    batches = Batches(inputs.training, inputs.vae.config, inputs.text.config, config, world)
    model = make_backbone(name, inputs.sizes, inputs.text.config.clip_length)
    model.initialize(torch.Generator().manual_seed(config.seed))
    model.to(world.device)
    latent, context, pooled, _ = next(inputs.unseen.validation(1))
    size = measure(model, latent, context, pooled)
    loss = partial(flow_loss, density=density("lognorm(0, 1)"), timestep_shift=1.0)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), config, world, report=measure_average)
        fit(model, loss, batches, config, run)
    return size, [entry for entry in run.entries if "validation" in entry]


CLAIMS = (                           # Sec. 5.2.3: better, worse, in what, at which point
    ("MM-DiT", "CrossDiT", "validation", -1),
    ("CrossDiT", "UViT", "validation", -1),
    ("UViT", "DiT", "validation", -1),
    ("UViT", "CrossDiT", "validation", 0),
    ("MM-DiT", "CrossDiT", "clip_score", -1),
    ("MM-DiT", "CrossDiT", "fid", -1),
    ("MM-DiT, 3 sets", "MM-DiT", "validation", -1))


def judge(curves, better, worse, measure, place):
    """A row of the claims table. curves: {name: [curve of seed 0, of seed 1, ...]}"""
    ours = [curve[place][measure] for curve in curves[better]]
    theirs = [curve[place][measure] for curve in curves[worse]]
    sign = 1 if measure == "clip_score" else -1                   # The others are to be low.
    leads = [sign * (a - b) for a, b in zip(ours, theirs)]
    verdict = "cannot be told"
    if len(leads) > 1 and min(leads) > 0:
        verdict = "held"
    if len(leads) > 1 and max(leads) <= 0:
        verdict = "did not hold at this size"
    when = "at the end" if place else "after a quarter of the steps"
    here = f"{sum(ours) / len(ours):.4f} against {sum(theirs) / len(theirs):.4f}"
    name = MEASURES[measure]
    return {"claim": f"{better} has a better {name} than {worse} {when}", "paper": "yes, Fig. 4",
            "here": here, "interval": [round(min(leads), 4), round(max(leads), 4)],
            "verdict": verdict}


def draw_figure(curves, file):
    """Fig. 4: validation loss, CLIP score and FID over training; a line for each seed."""
    from matplotlib.figure import Figure

    figure = Figure((13, 4), layout="constrained")
    for axis, measure in zip(figure.subplots(1, 3), MEASURES):
        for number, name in enumerate(curves):
            for curve in curves[name]:
                steps = [entry["step"] for entry in curve]
                values = [entry[measure] for entry in curve]
                axis.plot(steps, values, ".-", color=f"C{number}")
        axis.set(title=MEASURES[measure], xlabel="training steps")
    axis.legend(axis.lines[:: len(curves[name])], curves)
    write_atomically(file, lambda partial: figure.savefig(partial, dpi=100, format="png"))


def main(arguments=None):
    """Train and compare the five backbones."""
    options = read_options(Options, __doc__.split("\n")[0], arguments, **PRESETS)
    config = TrainConfig(
        data=options.data, encoders=options.encoders, num_scenes=options.num_scenes,
        resolution=RESOLUTION, depth=options.depth, steps=options.steps, every=options.steps // 4,
        batch_size=options.batch_size, optimizer="adamw", lr=1e-3, cooldown=0.4,
        encoder_dropout=0.464)
    world = World(config.device)
    inputs = read_inputs(config, world)
    file = find_model_file(options.encoders)
    pictures, prompts = reference(options)
    pipeline = Pipeline(None, inputs.vae, inputs.text, SAMPLING, world.device,
                        pick_precision(config.precision, world.device))
    measures = PictureMeasures(pictures, prompts, inputs.text, file.parent, world.device)
    measure_average = partial(report, pipeline=pipeline, unseen=inputs.unseen, prompts=prompts,
                              measures=measures)
    curves, sizes = {}, {}
    for name in NAMES:
        curves[name] = []
        for seed in range(options.seeds):
            run_config = replace(config, seed=seed)
            sizes[name], curve = learn(name, run_config, inputs, world, measure_average)
            curves[name].append(curve)
            print(f"{name:15} seed {seed}  {sizes[name][0] / 1e6:.2f} M parameters  "
                  f"{sizes[name][1] / 1e6:.0f} MFLOP  loss {curve[-1]['validation']:.4f}  "
                  f"CLIP score {curve[-1]['clip_score']:.4f}  FID {curve[-1]['fid']:.2f}")
    rows = [judge(curves, *words) for words in CLAIMS]
    for row in rows:
        print(f"{row['verdict']}: {row['claim']} ({row['paper']}): {row['here']}")
    settings = asdict(options) | {"encoders": portable(file), "sampling": SAMPLING}
    record = {"command": shlex.join(["python", "experiments/fig4_backbones.py", *sys.argv[1:]]),
              "settings": settings, "parameters_and_flops": sizes, "curves": curves, "claims": rows}
    write_json(options.out, record)
    draw_figure(curves, Path(options.out).with_suffix(".png"))


if __name__ == "__main__":
    command(main)
