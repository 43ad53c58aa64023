"""plan.py: what a training run needs, before it runs (SD3, arXiv:2403.03206v1, Sec. 4, 5.3.3, E.1).

Parameters, FLOPs of a step, memory of one GPU, bytes that each GPU sends, dataset on the disk and
time for the paper's schedule, from formulae alone. Parameters are counted on the real module
without allocating it. FLOPs and activations are sums that tests/test_plan.py compares with what
torch counts.

Not here    kernels' scratch space, the CUDA context, fragmentation (leave a tenth free), and the
            frozen autoencoder and text encoders: 12 GB in bf16 with T5-XXL on every GPU
Letters     B samples of one GPU at a time   D hidden_size   L text tokens   N image tokens
            n = L + N   P parameters
Units       bytes and FLOPs in the code; GB = 10^9 bytes in print
Run         python bench/plan.py --depth 38 --world 64 --strategy fsdp --recompute
"""

import argparse
import functools
import json
import math
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from mmdit import MMDiT, MMDiTConfig

STRATEGIES = ("ddp", "fsdp", "hsdp")
PAPER_STEPS, PAPER_BATCH = 500_000, 4096     # Sec. 5.3.3, at 256 px
PAPER_FLOPS = 5e22                           # Sec. 6, for the 8B model


@dataclass(frozen=True)
class Plan:
    """A training step to be planned; the command line is made from it."""
    depth: int = 24                # width 64 * depth, depth heads (Sec. 4)
    resolution: int = 256          # px per side
    text_tokens: int = 154         # 77 of CLIP and 77 of T5 (App. B.2); T5's are those above 77
    batch_size: int = PAPER_BATCH  # samples of one optimizer step over all GPUs
    accumulate: int = 1            # parts that each GPU splits its share of the batch into
    world: int = 64                # GPUs
    strategy: str = "fsdp"         # ddp: every GPU holds all; fsdp: 1 / world; hsdp: 1 / shards
    shards: int = 8                # hsdp: GPUs that share one copy, as a rule those of one node
    recompute: bool = False        # keep each block's inputs only, and run it again going backward
    precision: str = "bf16"        # of the matrix products: bf16 or fp32; the weights are fp32
    qk_norm: bool = True           # Sec. 5.3.2
    device: str = "cuda"           # cuda: fused kernels; cpu: see stream_bytes
    peak_tflops: float = 989.0     # of one GPU in bf16; the vendor states 989 for H100 and H200
    mfu: float = 0.45              # share of that peak that training reaches, model FLOPs only
    steps: int = PAPER_STEPS       # length of the schedule
    images: int = 1_000_000        # pictures in the dataset; the paper does not give its number
    captions: int = 2              # per picture: original and synthetic (Sec. 5.2.2)

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float) and not 0 < value < math.inf:
                raise ValueError(f"{field.name} is {value}; it must be above 0, and finite")
        choices = {"strategy": STRATEGIES, "precision": ("bf16", "fp32"), "device": ("cuda", "cpu")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                value = getattr(self, name)
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        if self.resolution % 16:
            raise ValueError(f"resolution is {self.resolution} px; it must be a multiple of 16 "
                             "(VAE factor 8 x patch 2)")
        if self.batch_size % (self.world * self.accumulate):
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of world {self.world}"
                             f" x accumulate {self.accumulate}, so the GPUs cannot share it evenly")
        if self.strategy == "hsdp" and self.world % self.shards:
            raise ValueError(f"world is {self.world} GPUs, not a multiple of the {self.shards} "
                             "that share one copy (shards)")
        if self.mfu > 1:
            raise ValueError(f"mfu is {self.mfu}; it is a share of the peak, at most 1")

    @property
    def sizes(self) -> MMDiTConfig:
        """The model as train.py makes it with the paper's conditioning and square pictures."""
        grid = 2 * self.resolution // 16
        return MMDiTConfig(self.depth, qk_norm=self.qk_norm, pos_embed_max_size=grid)

    @property
    def image_tokens(self) -> int:
        return (self.resolution // 16) ** 2

    @property
    def local_batch(self) -> int:              # samples that one GPU holds at a time
        return self.batch_size // (self.world * self.accumulate)

    @property
    def shard_count(self) -> int:              # GPUs over which one copy of weights is spread
        return {"ddp": 1, "fsdp": self.world, "hsdp": self.shards}[self.strategy]

    @property
    def compute_bytes(self) -> int:
        return 2 if self.precision == "bf16" else 4


# ---- Parameters and FLOPs ------------------------------------------------------------------------

def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@functools.cache
def parameter_counts(config: MMDiTConfig) -> dict:
    """Learned numbers: `total`; `block`, the largest joint block; `outside` of the blocks;
    `embedders`, of t and pooled."""
    with torch.device("meta"):
        model = MMDiT(config)
    blocks = [count(block) for block in model.joint_blocks]
    return {"total": count(model), "block": max(blocks), "outside": count(model) - sum(blocks),
            "embedders": count(model.t_embedder) + count(model.y_embedder)}


def forward_flops(config: MMDiTConfig, text_tokens: int, image_tokens: int) -> int:
    """FLOPs of the matrix products of one sample's forward pass (2 for a multiply and an add).

    In each block a token meets the 12 D^2 weights of its column (qkv 3, projection 1, MLP 8). Each
    pair of a query and a key costs 2 D for its score and 2 D for its value. In the last block a
    text token meets only qkv, and has no query.
    """
    D, L, N, depth = config.hidden_size, text_tokens, image_tokens, config.depth
    patch = config.patch_size**2 * config.latent_channels
    blocks = 2 * 12 * D**2 * (L + N) * depth - 2 * 9 * D**2 * L
    attention = 4 * D * (L + N) ** 2 * depth - 4 * D * L * (L + N)
    ends = 2 * L * config.context_dim * D + 2 * 2 * N * patch * D
    modulation = 2 * D * (12 * D * depth - 4 * D + 2 * D)         # the last text 2 D, the end 2 D
    dual = 8 * D**2 * N + 4 * D * N**2 + 6 * D**2
    cond = 2 * D * (256 + D + config.pooled_dim + D)
    return blocks + attention + ends + modulation + config.dual_attention_layers * dual + cond


def training_flops(config: MMDiTConfig, text_tokens: int, image_tokens: int) -> int:
    """FLOPs of one sample's training step: the forward pass, and twice that for the backward pass.

    Recomputed work is not counted, so that MFU does not reward it.
    """
    return 3 * forward_flops(config, text_tokens, image_tokens)


# ---- Memory of one GPU ---------------------------------------------------------------------------

def stream_bytes(plan: Plan, last: bool) -> int:
    """What the backward pass of one block needs of one token of one column, c bytes a number.

        attention half    x, LayerNorm(x), modulated, the joint q k v, the result: c D each
        MLP half          the result's contiguous share, projected, x, LayerNorm(x), modulated,
                          fc2: c D each; fc1, GELU: 4 c D each

    plus means and deviations of the LayerNorms, and per head the RMS of q and k and the log-sum of
    the scores. QK-norm needs q k v before they are joined. On a CPU, torch's RMSNorm keeps its
    inputs and outputs in fp32, and attention that is written out keeps all scores instead of its
    result. `last` is the last text column: no query, no result, no MLP half.
    """
    D, heads, c = plan.sizes.hidden_size, plan.depth, plan.compute_bytes
    joined = plan.text_tokens + plan.image_tokens
    written_out = plan.device == "cpu" and c == 2                  # by mmdit.attend
    normed = 1 if last else 2                                     # k, or q and k
    before_joining = 0
    if plan.qk_norm and plan.device == "cuda":
        before_joining = 3 * c * D + normed * 4 * heads
    if plan.qk_norm and plan.device == "cpu":
        in_fp32 = 2 * normed * 4 * D
        if c == 4:
            in_fp32 += 4 * D                                      # v of the joint tensor stays too
        before_joining = in_fp32 + normed * 4 * heads
    first = 3 * c * D + 2 * 4 + before_joining
    if last:
        return first + 2 * c * D
    result = c * heads * joined if written_out else c * D + 4 * heads
    return first + 3 * c * D + result + 2 * c * D + 3 * c * D + 2 * 4 + 9 * c * D


def block_bytes(plan: Plan, last: bool = False) -> int:
    """Saved activations of one joint block and one sample: both columns, and the vectors of the
    modulation (6 D a column, 1 + scale twice, SiLU(cond))."""
    D, c = plan.sizes.hidden_size, plan.compute_bytes
    image = plan.image_tokens * stream_bytes(plan, False)
    text = plan.text_tokens * stream_bytes(plan, last)
    vectors = 12 if last else 18
    return image + text + vectors * c * D


def activation_bytes(plan: Plan) -> int:
    """What the forward pass of one GPU's B samples leaves for the backward pass.

    With recomputation a block leaves only its inputs (c n D bytes) and the 12 D numbers of its
    modulation; on top comes one block whole, the one that is being run again.
    """
    D, c, depth = plan.sizes.hidden_size, plan.compute_bytes, plan.depth
    L, N = plan.text_tokens, plan.image_tokens
    patch = plan.sizes.patch_size**2 * plan.sizes.latent_channels
    inputs = c * (L * plan.sizes.context_dim + N * patch)
    final_layer = N * (3 * c * D + 2 * 4)
    last = block_bytes(plan, last=True)
    if plan.recompute:
        largest = last if depth == 1 else block_bytes(plan)
        blocks = depth * (c * (N + L) * D + 14 * c * D) + largest
    else:
        blocks = (depth - 1) * block_bytes(plan) + last
    return plan.local_batch * (inputs + final_layer + blocks)


def working_bytes(plan: Plan) -> int:
    """What lives for a moment only, at its largest.

    These are the gradients of the MLP's 4 D channels before and after GELU and of both streams.
    When sharded, also two gathered blocks (one in use, one on its way), what lies outside the
    blocks, and one block's whole gradient before it is scattered, in compute precision and fp32.
    """
    D, c = plan.sizes.hidden_size, plan.compute_bytes
    L, N = plan.text_tokens, plan.image_tokens
    gradients = plan.local_batch * c * D * (2 * 4 * max(N, L) + N + L)
    if plan.shard_count == 1:
        return gradients
    counts = parameter_counts(plan.sizes)
    gathered = c * (2 * counts["block"] + counts["outside"])
    return gradients + gathered + (c + 4) * counts["block"]


def memory(plan: Plan) -> dict:
    """Bytes of one GPU by kind, and `peak`.

        weights        4 P, sharded, and the table of positions; unsharded bf16 adds copies, 2 P
        gradients      4 P, sharded
        optimizer      8 P, sharded: AdamW's two moments, fp32
        ema            4 P, sharded, and its table of positions

    Gradients appear while activations go, so the peak is everything else plus the larger of
    (activations + working) and gradients. With accumulation, gradients of the parts before are
    there already and the two add up.
    """
    counts, c = parameter_counts(plan.sizes), plan.compute_bytes
    table = 4 * plan.sizes.pos_embed_max_size**2 * plan.sizes.hidden_size
    shard = -(-counts["total"] // plan.shard_count)               # rounded up
    copies = 0
    if plan.shard_count == 1 and c == 2:
        copies = 2 * (counts["total"] - counts["embedders"])
    parts = {"weights": 4 * shard + table + copies, "gradients": 4 * shard, "optimizer": 8 * shard,
             "ema": 4 * shard + table, "activations": activation_bytes(plan),
             "working": working_bytes(plan)}
    held = parts["weights"] + parts["optimizer"] + parts["ema"]
    coming, going = parts["gradients"], parts["activations"] + parts["working"]
    together = coming + going if plan.accumulate > 1 else max(coming, going)
    return {**parts, "peak": held + together}


# ---- Communication, disk, time -------------------------------------------------------------------

def communication(plan: Plan) -> dict:
    """Bytes that one GPU sends in one optimizer step, with ring algorithms: a gather or a scatter
    of X bytes over W GPUs sends X (W - 1) / W, an all-reduce twice that.

        ddp     all-reduce of the gradients, 4 P
        fsdp    for each part of the batch: gather the weights in compute precision forward and
                backward, scatter 4 P
        hsdp    the same within each group of `shards` GPUs, then one all-reduce of the
                4 P / shards between the groups
    """
    P, S, c = parameter_counts(plan.sizes)["total"], plan.shard_count, plan.compute_bytes
    sharing = (S - 1) / S * (2 * c + 4) * P * plan.accumulate
    groups = plan.world // S
    return {"within_a_copy": sharing, "between_copies": 2 * (groups - 1) / groups * 4 * P / S}


def sample_bytes(plan: Plan) -> dict:
    """Disk space of one pre-encoded sample, by encoder (Table 7): means and log-variances of the
    latent and the token features in fp16, pooled vectors in fp32."""
    clip, t5 = min(77, plan.text_tokens), max(0, plan.text_tokens - 77)
    latent = 2 * plan.sizes.latent_channels * (plan.resolution // 8) ** 2 * 2
    return {"VAE (Enc)": latent, "CLIP-L": clip * 768 * 2 + 768 * 4,
            "CLIP-G": clip * 1280 * 2 + 1280 * 4, "T5": t5 * 4096 * 2}


def dataset_bytes(plan: Plan) -> int:
    """All pictures once, each with all its captions."""
    sizes = sample_bytes(plan)
    text = sum(sizes.values()) - sizes["VAE (Enc)"]
    return plan.images * (sizes["VAE (Enc)"] + plan.captions * text)


def schedule(plan: Plan) -> dict:
    """FLOPs and seconds of `steps` optimizer steps. `six_p_n` is the rule of thumb 6 x parameters x
    tokens, which sends every token through every weight; here text and image tokens each meet
    about half of them."""
    samples = plan.steps * plan.batch_size
    flops = samples * training_flops(plan.sizes, plan.text_tokens, plan.image_tokens)
    tokens = samples * (plan.text_tokens + plan.image_tokens)
    return {"flops": flops, "six_p_n": 6 * parameter_counts(plan.sizes)["total"] * tokens,
            "seconds": flops / (plan.world * plan.peak_tflops * 1e12 * plan.mfu)}


def describe(plan: Plan) -> dict:
    """Everything that is printed, in bytes, FLOPs and seconds."""
    flops = training_flops(plan.sizes, plan.text_tokens, plan.image_tokens)
    whole = flops
    if plan.recompute:
        whole += forward_flops(plan.sizes, plan.text_tokens, plan.image_tokens)
    return {"plan": asdict(plan), "parameters": parameter_counts(plan.sizes)["total"],
            "flops_per_sample": flops, "flops_per_step": flops * plan.batch_size,
            "flops_per_step_with_recomputation": whole * plan.batch_size, "memory": memory(plan),
            "communication": communication(plan), "sample": sample_bytes(plan),
            "dataset": dataset_bytes(plan), "schedule": schedule(plan)}


def report(plan: Plan) -> str:
    """The lines to print."""
    facts = describe(plan)
    sent, run = facts["communication"], facts["schedule"]
    recomputed = ", recomputation" if plan.recompute else ""
    disk = " + ".join(f"{name} {size / 1e3:.1f}" for name, size in facts["sample"].items())
    lines = [
        f"MM-DiT of depth {plan.depth}: {facts['parameters'] / 1e9:.3f} B parameters, "
        f"{plan.resolution} px = {plan.image_tokens} image tokens, {plan.text_tokens} text tokens",
        f"{plan.world} GPUs, {plan.strategy}, {plan.precision}{recomputed}: "
        f"{plan.batch_size} samples a step, {plan.local_batch} on a GPU at a time",
        "", "FLOPs (matrix products; forward x 3)",
        f"  a sample {facts['flops_per_sample']:.3e}   a step {facts['flops_per_step']:.3e}   "
        f"with recomputation {facts['flops_per_step_with_recomputation']:.3e}",
        "", "Memory of one GPU"]
    for name, size in facts["memory"].items():
        lines.append(f"  {name:12} {size / 1e9:10.3f} GB")
    lines += [
        "", "Sent by one GPU each step",
        f"  between the GPUs that share a copy {sent['within_a_copy'] / 1e9:10.3f} GB",
        f"  between copies                     {sent['between_copies'] / 1e9:10.3f} GB",
        "", f"Pre-encoded: {disk} kB a sample; {plan.images:,} pictures with {plan.captions} "
        f"captions: {facts['dataset'] / 1e12:.2f} TB",
        "", f"{plan.steps:,} steps at {plan.mfu:.0%} of {plan.peak_tflops:g} TFLOP/s: "
        f"{run['seconds'] / 86400:.1f} days, {run['seconds'] * plan.world / 3600:,.0f} GPU hours, "
        f"{run['flops']:.2e} FLOPs",
        f"  (6 x parameters x tokens would be {run['six_p_n']:.2e})"]
    if plan.depth == 38:
        lines.append(
            f"  The paper states {PAPER_FLOPS:.0e} FLOPs for this model: "
            f"{PAPER_FLOPS / run['flops']:.1f} times ours. It does not say how it counts them; "
            "stages at higher resolution, of unknown length, add to ours.")
    return "\n".join(lines)


def main():
    """From the command line to a page of numbers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for field in fields(Plan):
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, default=field.default)
        else:
            default = field.default
            parser.add_argument(flag, type=field.type, default=default, metavar=str(default))
    parser.add_argument("--json", action="store_true", help="everything as JSON, in bytes, seconds")
    options = vars(parser.parse_args())
    as_json = options.pop("json")
    try:
        plan = Plan(**options)
    except ValueError as problem:
        sys.exit(f"plan.py: {problem}")
    print(json.dumps(describe(plan), indent=1) if as_json else report(plan))


if __name__ == "__main__":
    main()
