"""plan.py: what a training run needs, before it runs (SD3, arXiv:2403.03206v1, Sec. 4, 5.3.3, App. B.3 and E.1).

Parameters, FLOPs of a step, memory of one GPU, bytes that each GPU sends, dataset on disk, and time for the paper's schedule,
from formulae alone. Parameters are counted on the real module without allocating it; FLOPs and activations are sums that
tests/test_plan.py compares with what torch counts. Not in it: kernels' scratch space, the CUDA context and fragmentation (leave
a tenth free), and the frozen autoencoder and text encoders, which train.py keeps on every GPU (12 GB in bf16 with T5-XXL).

Letters     B samples of one GPU at a time   D hidden_size   L text tokens   N image tokens   n = L + N   P parameters
Units       bytes and FLOPs in the code; GB = 10^9 bytes in print
Run         python experiments/plan.py --depth 38 --world 64 --strategy fsdp --recompute
"""

import argparse
import functools
import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from mmdit import MMDiT, MMDiTConfig, forward_flops, training_flops

STRATEGIES = ("ddp", "fsdp", "hsdp")
PAPER_STEPS, PAPER_BATCH, PAPER_FLOPS = 500_000, 4096, 5e22     # Sec. 5.3.3 (256 px); Sec. 6, for the 8B model


@dataclass(frozen=True)
class Plan:
    """A training step to be planned; the command line is made from it. Sizes that do not fit together are refused."""
    depth: int = 24                # width 64 * depth, depth heads (Sec. 4)
    resolution: int = 256          # px per side
    text_tokens: int = 154         # 77 of CLIP and 77 of T5 (App. B.2); what is above 77 is T5's
    batch_size: int = 4096         # samples of one optimizer step over all GPUs (Sec. 5.3.3)
    accumulate: int = 1            # parts that each GPU splits its share of the batch into
    world: int = 64                # GPUs
    strategy: str = "fsdp"         # ddp: every GPU holds all; fsdp: 1 / world of it; hsdp: 1 / shards of it
    shards: int = 8                # hsdp: GPUs that share one copy, as a rule those of one node
    recompute: bool = False        # keep the inputs of each block only and run it again in the backward pass
    precision: str = "bf16"        # of the matrix products (autocast): bf16 or fp32; weights and optimizer are fp32
    qk_norm: bool = True           # Sec. 5.3.2
    device: str = "cuda"           # cuda: fused attention and RMSNorm; cpu: RMSNorm in fp32, attention in bf16 written out
    peak_tflops: float = 989.0     # of one GPU in bf16; 989 is what the vendor states for H100 and H200 (dense)
    mfu: float = 0.45              # share of that peak that training reaches, model FLOPs only
    steps: int = PAPER_STEPS       # of the schedule
    images: int = 1_000_000        # in the dataset; the paper does not give its number
    captions: int = 2              # per picture: original and synthetic (Sec. 5.2.2)

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float) and value <= 0:
                raise ValueError(f"{field.name} is {value}; it must be above 0")
        for name, allowed in (("strategy", STRATEGIES), ("precision", ("bf16", "fp32")), ("device", ("cuda", "cpu"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        if self.resolution % 16:
            raise ValueError(f"resolution is {self.resolution} px; it must be a multiple of 16 (VAE factor 8 x patch 2)")
        if self.batch_size % (self.world * self.accumulate):
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of world {self.world} x accumulate "
                             f"{self.accumulate}, so the GPUs cannot share it evenly")
        if self.strategy == "hsdp" and self.world % self.shards:
            raise ValueError(f"world is {self.world} GPUs, not a multiple of the {self.shards} that share one copy (shards)")
        if self.mfu > 1:
            raise ValueError(f"mfu is {self.mfu}; it is a share of the peak, at most 1")

    @property
    def sizes(self) -> MMDiTConfig:
        """The model as train.py would make it, with the paper's conditioning: below depth 15 a small position grid."""
        side = max(16, self.resolution // 16)
        grid = {"pos_embed_max_size": side, "pos_embed_base_size": side} if self.depth < 15 else {}
        return MMDiTConfig(self.depth, qk_norm=self.qk_norm, **grid)

    @property
    def image_tokens(self) -> int:
        return (self.resolution // 16) ** 2

    @property
    def local_batch(self) -> int:              # samples that one GPU holds at a time
        return self.batch_size // (self.world * self.accumulate)

    @property
    def shard_count(self) -> int:              # GPUs over which one copy of weights and optimizer is spread
        return {"ddp": 1, "fsdp": self.world, "hsdp": self.shards}[self.strategy]

    @property
    def compute_bytes(self) -> int:
        return 2 if self.precision == "bf16" else 4


# ------------------------------------------------------------------------------------------------------------
# Parameters (FLOPs are counted in mmdit.py)
# ------------------------------------------------------------------------------------------------------------

@functools.cache
def parameter_counts(config: MMDiTConfig) -> dict:
    """Learned numbers: `total`; `block`, the largest joint block; `outside`, those of no block; `embedders`, of t and pooled."""
    with torch.device("meta"):
        model = MMDiT(config)
    count = lambda module: sum(p.numel() for p in module.parameters())
    blocks = [count(block) for block in model.joint_blocks]
    return {"total": count(model), "block": max(blocks), "outside": count(model) - sum(blocks),
            "embedders": count(model.t_embedder) + count(model.y_embedder)}


# ------------------------------------------------------------------------------------------------------------
# Memory of one GPU
# ------------------------------------------------------------------------------------------------------------

def stream_bytes(D: int, heads: int, joined: int, c: int, qk_norm: bool, device: str, only_feeds_attention: bool) -> int:
    """What the backward pass of one block needs of one token of one stream. c: bytes of a number in compute precision;
    joined: L + N.

        attention half    x, LayerNorm(x), modulated, the joint q k v, the result: cD each
        MLP half          the result's contiguous share, projected, x, LayerNorm(x), modulated, fc2: cD each; fc1, GELU: 4cD each

    plus means and deviations of the LayerNorms, and per head the RMS of q and k and the log-sum of the scores. QK-norm needs
    q k v before joining. On a CPU, torch's RMSNorm keeps its inputs and outputs in fp32, and attention in bf16 is written out:
    it keeps all scores instead of its result.
    """
    before_joining = 0
    if qk_norm:
        in_fp32 = 5 * 4 * D if c == 4 else 4 * 4 * D          # in fp32 the v of the joint tensor stays alive too
        before_joining = (3 * c * D if device == "cuda" else in_fp32) + 2 * 4 * heads
    attention = 3 * c * D + (c * heads * joined if (device, c) == ("cpu", 2) else c * D + 4 * heads)
    first = 3 * c * D + 2 * 4 + before_joining + attention
    if only_feeds_attention:
        return first
    return first + 2 * c * D + 3 * c * D + 2 * 4 + 9 * c * D


def block_bytes(plan: Plan, last: bool = False) -> int:
    """Saved activations of one joint block and one sample: both streams, and the vectors of its modulation (6 D a stream,
    1 + scale twice, SiLU(cond))."""
    D, N, L, c = plan.sizes.hidden_size, plan.image_tokens, plan.text_tokens, plan.compute_bytes
    stream = functools.partial(stream_bytes, D, plan.depth, N + L, c, plan.qk_norm, plan.device)
    vectors = (9 + (3 if last else 9)) * c * D
    return N * stream(False) + L * stream(last) + vectors


def activation_bytes(plan: Plan) -> int:
    """What the forward pass of one GPU's B samples leaves for the backward pass.

    With recomputation a block leaves only its inputs (c n D bytes) and the 12 D numbers of its modulation; on top
    comes one block whole, the one that is being run again.
    """
    D, N, L, c, depth = plan.sizes.hidden_size, plan.image_tokens, plan.text_tokens, plan.compute_bytes, plan.depth
    ends = L * plan.sizes.context_dim * c + N * plan.sizes.patch_size**2 * plan.sizes.latent_channels * c     # inputs
    ends += N * (3 * c * D + 2 * 4)                                                                           # final layer
    if plan.recompute:
        blocks = depth * (c * (N + L) * D + 14 * c * D) + block_bytes(plan, last=depth == 1)
    else:
        blocks = (depth - 1) * block_bytes(plan) + block_bytes(plan, last=True)
    return plan.local_batch * (ends + blocks)


def working_bytes(plan: Plan) -> int:
    """What lives for a moment only, at its largest: the gradients of the MLP's 4 D channels before and after GELU and of both
    residual streams; when sharded, two gathered blocks (one in use, one on its way), what lies outside the blocks, and one
    block's whole gradient before it is scattered, in compute precision and in fp32."""
    D, N, L, c = plan.sizes.hidden_size, plan.image_tokens, plan.text_tokens, plan.compute_bytes
    gradients = plan.local_batch * c * D * (2 * 4 * max(N, L) + N + L)
    if plan.shard_count == 1:
        return gradients
    counts = parameter_counts(plan.sizes)
    return gradients + c * (2 * counts["block"] + counts["outside"]) + (c + 4) * counts["block"]


def memory(plan: Plan) -> dict:
    """Bytes of one GPU by kind, and `peak`.

        weights        4 P, sharded, and the table of positions; unsharded bf16 adds autocast's copies, 2 P
        gradients      4 P, sharded
        optimizer      8 P, sharded: AdamW's two moments, fp32
        ema            4 P, sharded, and its table of positions

    Gradients appear while activations go, so the peak is everything else plus the larger of (activations + working) and
    gradients. With accumulation, gradients of the parts before are there already and the two add up.
    """
    counts, S = parameter_counts(plan.sizes), plan.shard_count
    table = 4 * plan.sizes.pos_embed_max_size**2 * plan.sizes.hidden_size
    shard = -(-counts["total"] // S)
    copies = 2 * (counts["total"] - counts["embedders"]) if S == 1 and plan.precision == "bf16" else 0
    parts = {"weights": 4 * shard + table + copies, "gradients": 4 * shard, "optimizer": 8 * shard,
             "ema": 4 * shard + table, "activations": activation_bytes(plan), "working": working_bytes(plan)}
    held = parts["weights"] + parts["optimizer"] + parts["ema"]
    coming, going = 4 * shard, parts["activations"] + parts["working"]
    return {**parts, "peak": held + (coming + going if plan.accumulate > 1 else max(coming, going))}


# ------------------------------------------------------------------------------------------------------------
# Communication, disk, time
# ------------------------------------------------------------------------------------------------------------

def communication(plan: Plan) -> dict:
    """Bytes that one GPU sends in one optimizer step, with ring algorithms: a gather or a scatter of X bytes over W GPUs sends
    X (W - 1) / W, an all-reduce twice that.

        ddp     all-reduce of the gradients, 4 P
        fsdp    for each part of the batch: gather the weights in compute precision forward and backward, scatter 4 P
        hsdp    the same within each group of `shards` GPUs, then one all-reduce of the 4 P / shards between the groups
    """
    P, S, c = parameter_counts(plan.sizes)["total"], plan.shard_count, plan.compute_bytes
    sharing = (S - 1) / S * (2 * c + 4) * P * plan.accumulate
    groups = plan.world // S
    return {"within_a_copy": sharing, "between_copies": 2 * (groups - 1) / groups * 4 * P / S}


def sample_bytes(plan: Plan) -> dict:
    """Disk space of one pre-encoded sample, by encoder (Table 7): means and log-variances of the latent and the token features
    in fp16, pooled vectors in fp32."""
    clip, t5 = min(77, plan.text_tokens), max(0, plan.text_tokens - 77)
    latent = 2 * plan.sizes.latent_channels * (plan.resolution // 8) ** 2 * 2
    return {"VAE (Enc)": latent, "CLIP-L": clip * 768 * 2 + 768 * 4, "CLIP-G": clip * 1280 * 2 + 1280 * 4, "T5": t5 * 4096 * 2}


def dataset_bytes(plan: Plan) -> int:
    """All pictures once, each with all its captions."""
    sizes = sample_bytes(plan)
    return plan.images * (sizes["VAE (Enc)"] + plan.captions * (sum(sizes.values()) - sizes["VAE (Enc)"]))


def schedule(plan: Plan) -> dict:
    """FLOPs and seconds of `steps` optimizer steps. `six_p_n` is the rule of thumb 6 x parameters x tokens, which sends every
    token through every weight; here text and image tokens each meet about half of them."""
    samples = plan.steps * plan.batch_size
    flops = samples * training_flops(plan.sizes, plan.text_tokens, plan.image_tokens)
    tokens = samples * (plan.text_tokens + plan.image_tokens)
    return {"flops": flops, "six_p_n": 6 * parameter_counts(plan.sizes)["total"] * tokens,
            "seconds": flops / (plan.world * plan.peak_tflops * 1e12 * plan.mfu)}


def describe(plan: Plan) -> dict:
    """Everything that is printed, in bytes, FLOPs and seconds."""
    flops = training_flops(plan.sizes, plan.text_tokens, plan.image_tokens)
    extra = forward_flops(plan.sizes, plan.text_tokens, plan.image_tokens) if plan.recompute else 0
    return {"plan": asdict(plan), "parameters": parameter_counts(plan.sizes)["total"],
            "flops_per_sample": flops, "flops_per_step": flops * plan.batch_size,
            "flops_per_step_with_recomputation": (flops + extra) * plan.batch_size, "memory": memory(plan),
            "communication": communication(plan), "sample": sample_bytes(plan), "dataset": dataset_bytes(plan),
            "schedule": schedule(plan)}


def report(plan: Plan) -> str:
    """The lines to print."""
    facts, gb = describe(plan), lambda size: f"{size / 1e9:10.3f} GB"
    m, sent, run = facts["memory"], facts["communication"], facts["schedule"]
    lines = [f"MM-DiT of depth {plan.depth}: {facts['parameters'] / 1e9:.3f} B parameters, {plan.resolution} px = "
             f"{plan.image_tokens} image tokens, {plan.text_tokens} text tokens",
             f"{plan.world} GPUs, {plan.strategy}, {plan.precision}{', recomputation' if plan.recompute else ''}: "
             f"{plan.batch_size} samples a step, {plan.local_batch} on a GPU at a time",
             "", "FLOPs (matrix products; forward x 3)",
             f"  a sample {facts['flops_per_sample']:.3e}   a step {facts['flops_per_step']:.3e}"
             + (f"   with recomputation {facts['flops_per_step_with_recomputation']:.3e}" if plan.recompute else ""),
             "", "Memory of one GPU"]
    lines += [f"  {name:12} {gb(size)}" for name, size in m.items()]
    lines += ["", "Sent by one GPU each step",
              f"  between the GPUs that share a copy {gb(sent['within_a_copy'])}",
              f"  between copies                     {gb(sent['between_copies'])}",
              "", f"Pre-encoded: {' + '.join(f'{name} {size / 1e3:.1f}' for name, size in facts['sample'].items())} kB a sample; "
              f"{plan.images:,} pictures with {plan.captions} captions: {facts['dataset'] / 1e12:.2f} TB",
              "", f"{plan.steps:,} steps at {plan.mfu:.0%} of {plan.peak_tflops:g} TFLOP/s: {run['seconds'] / 86400:.1f} days, "
              f"{run['seconds'] * plan.world / 3600:,.0f} GPU hours, {run['flops']:.2e} FLOPs",
              f"  (6 x parameters x tokens would be {run['six_p_n']:.2e})"]
    if plan.depth == 38:
        lines.append(f"  The paper states {PAPER_FLOPS:.0e} FLOPs for this model: {PAPER_FLOPS / run['flops']:.1f} times ours. "
                     "It does not say how it counts them; stages at higher resolution, of unknown length, add to ours.")
    return "\n".join(lines)


def main():
    """From the command line to a page of numbers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for field in fields(Plan):
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            parser.add_argument(flag, type=field.type, default=field.default, metavar=str(field.default))
    parser.add_argument("--json", action="store_true", help="print everything as JSON, in bytes, FLOPs and seconds")
    options = vars(parser.parse_args())
    as_json = options.pop("json")
    try:
        plan = Plan(**options)
    except ValueError as problem:
        sys.exit(f"plan.py: {problem}")
    print(json.dumps(describe(plan), indent=1) if as_json else report(plan))


if __name__ == "__main__":
    main()
