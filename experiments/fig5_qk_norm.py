"""fig5_qk_norm.py: what QK-norm does when the resolution rises (SD3, Sec. 5.3.2, Fig. 5).

A model is trained at a base resolution and then goes on at twice of it, in bf16 and at a high
learning rate, because at our size nothing becomes unstable at the paper's. Four ways are compared:
without QK-norm; with it; with it added only when the resolution rises; and with it, but with
AdamW's usual epsilon of 1e-8 in place of the paper's 1e-15. As in Fig. 5, the largest attention
logit and the entropy of attention are averaged over the last blocks. They are those of held-out
pictures, caught by hooks on the layers that hand queries and keys to the attention.

Differs from the paper: depth 24 and 1024 px became the sizes below, and AdamW's rate is 100 times
higher. The share by which epsilon 1e-8 shortens AdamW's steps is measured, too. It grows as the
gradients shrink, and those of a large model are smaller than ours.

A claim holds if all seeds agree and their mean is larger than what lies between them (`judge`).
A model that diverged ends with the loss 2, which is what predicting nothing costs. Adding QK-norm
helps if the loss then falls by more than without it. "Without" and "added later" have the epsilon
of their row in ARMS, so the first five claims compare models whose epsilons differ as well.

Run   python experiments/fig5_qk_norm.py --quick     three minutes on one CPU core
      python experiments/fig5_qk_norm.py --full      a GPU
"""

import shlex
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from checkpoints import SHIPPED, find_model_file, portable
from devices import World, autocast, command
from flow import LogitNormal, validate
from mmdit import MMDiT, load_weights
from options import check_options, option, read_options, write_atomically, write_json
from train import Run, TrainConfig, fit, flow_loss, read_inputs

# QK-norm at the base resolution, QK-norm afterwards, AdamW's epsilon
ARMS = {"without": (False, False, 1e-8),
        "with": (True, True, 1e-15),
        "added later": (False, True, 1e-15),
        "with, epsilon 1e-8": (True, True, 1e-8)}
CLAIM = ("claim", "paper", "here", "interval", "verdict")


@dataclass(frozen=True)
class Options:
    """What is trained, and for how long."""
    depth: int = option(3, "size of the model; the paper has 24", 1, 64)
    last_blocks: int = option(2, "blocks that are watched; the paper has 5", 1, 64)
    resolution: int = option(64, "px per side at first; then it doubles", 16, 1024)
    base_steps: int = option(200, "steps at the base resolution", 1, 10**7)
    steps: int = option(300, "steps at twice of it", 1, 10**7)
    base_lr: float = option(1e-3, "AdamW's rate at the base resolution", 1e-9, 1)
    lr: float = option(1e-2, "AdamW's rate at twice of it", 1e-9, 1)
    batch_size: int = option(32, "pictures in a step", 1, 10**5)
    num_scenes: int = option(2048, "scenes to train on", 64, 10**7)
    seeds: int = option(2, "repetitions", 1, 100)
    data: str = option("", "captioned pictures in place of scenes")
    encoders: str = option(str(SHIPPED), "model with the frozen VAE and text encoders")
    device: str = option("auto", "cuda, mps or cpu")
    out: str = option(str(ROOT / "results" / "fig5_qk_norm.json"), "what is measured")

    def __post_init__(self):
        check_options(self)
        if self.last_blocks > self.depth:
            raise ValueError(f"--last-blocks {self.last_blocks} of --depth {self.depth} blocks")


QUICK = {"depth": 2, "resolution": 32, "base_steps": 100, "steps": 100, "batch_size": 16,
         "num_scenes": 1024}
FULL = {"depth": 12, "last_blocks": 5, "resolution": 128, "base_steps": 2000, "steps": 2000,
        "batch_size": 64, "num_scenes": 32768}


# --- What is seen of the attention ----------------------------------------------------------------

@torch.no_grad()
def queries_and_keys(model, last_blocks, *inputs):
    """Runs model(*inputs). Returns (q, k), each (B, heads, tokens, 64), of each of the last blocks.

    Both columns of a block call ln_q and ln_k (QK-norm, or nothing) last, text first.
    """
    caught = []
    hooks = []

    def keep(layer, given, output):
        caught.append(output)
    for block in model.joint_blocks[-last_blocks:]:
        for column in (block.context_block, block.x_block):
            for layer in (column.attn.ln_q, column.attn.ln_k):
                hooks.append(layer.register_forward_hook(keep))
    model(*inputs)
    for hook in hooks:
        hook.remove()
    pairs = []
    for first in range(0, len(caught), 4):
        context_q, context_k, x_q, x_k = caught[first : first + 4]    # (B, L or N, heads, 64) each
        q = torch.cat([context_q, x_q], dim=1).transpose(1, 2)        # (B, heads, L + N, 64)
        k = torch.cat([context_k, x_k], dim=1).transpose(1, 2)
        pairs.append((q.float(), k.float()))
    return pairs


def largest_logit_and_entropy(q, k):
    """The largest of q k^T / 8, and the mean entropy of its softmax, at most log(tokens)."""
    logits = q @ k.transpose(2, 3) / q.shape[3] ** 0.5                # (B, heads, queries, keys)
    log_share = logits.log_softmax(dim=3)
    entropy = -(log_share.exp() * log_share).sum(dim=3)               # (B, heads, queries)
    return logits.max().item(), entropy.mean().item()


def observe(model, unseen, last_blocks):
    """A point of Fig. 5, with the validation loss: all on held-out pictures, in bf16."""
    parts = zip(*unseen.validation(32))
    latent, context, pooled, noise = map(torch.cat, parts)
    t = torch.linspace(0, 1, len(latent), device=latent.device)       # (B,) all levels of noise
    z_t = torch.lerp(latent, noise, t.view(-1, 1, 1, 1))              # (B, C, H, W)  Eq. 13
    with autocast(latent.device, torch.bfloat16):
        pairs = queries_and_keys(model, last_blocks, z_t, t, context, pooled)
    seen = []
    for q, k in pairs:
        seen.append(largest_logit_and_entropy(q, k))
    logit, entropy = torch.tensor(seen).mean(dim=0).tolist()          # over the last blocks
    levels = validate(model, [(latent, context, pooled, noise)], torch.bfloat16)
    return {"logit": logit, "entropy": entropy, "validation": levels[:-1].mean().item()}


def shortened_by(model, losses, epsilon):
    """The share by which epsilon shortens AdamW's steps, g / (|g| + epsilon): a mean of all."""
    gradients = torch.autograd.grad(losses.mean(), list(model.parameters()), allow_unused=True)
    shares = []
    for gradient in gradients:
        if gradient is not None:
            shares.append((epsilon / (gradient.abs() + epsilon)).flatten())
    return torch.cat(shares).mean().item()


# --- Training -------------------------------------------------------------------------------------

def training_config(options, seed, epsilon, doubled):
    """What fit needs to know. There, qk_norm has only one effect: it chooses AdamW's epsilon."""
    config = TrainConfig(
        data=options.data, encoders=options.encoders, num_scenes=options.num_scenes,
        resolution=options.resolution, depth=options.depth, qk_norm=epsilon == 1e-15,
        steps=options.base_steps, batch_size=options.batch_size, optimizer="adamw",
        lr=options.base_lr, cooldown=0.0, encoder_dropout=0.464, precision="bf16", seed=seed,
        device=options.device)
    if not doubled:
        return config
    return replace(config, resolution=2 * options.resolution, steps=options.steps, lr=options.lr)


def train(model, config, inputs, world, last_blocks):
    """Trains a model in place. Returns the points on the way, and why it stopped early, or ""."""
    model.to(world.device)
    points = [{"step": 0, **observe(model, inputs.unseen, last_blocks)}]

    def report(average, step):
        points.append({"step": step, **observe(model, inputs.unseen, last_blocks)})
        return points[-1], None
    loss = partial(flow_loss, density=LogitNormal(), timestep_shift=1.0)
    stopped = ""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "run", config, world, report=report)
        try:
            fit(model, loss, inputs.batches, config, run)
        except RuntimeError as problem:
            if "not finite" not in str(problem):
                raise
            stopped = f"not finite at step {run.done}"
    return points, stopped


def run_seed(seed, options, world):
    """{arm: what was seen}. Arms that begin alike share their model of the base resolution."""
    bases = {}
    found = {}
    for arm, (norm_at_first, norm_later, epsilon) in ARMS.items():
        base_epsilon = epsilon if norm_at_first else 1e-8
        begin = (norm_at_first, base_epsilon)
        if begin not in bases:
            config = training_config(options, seed, base_epsilon, doubled=False)
            inputs = read_inputs(config, world)
            base = MMDiT(replace(inputs.sizes, qk_norm=norm_at_first))
            base.initialize(torch.Generator().manual_seed(seed))
            bases[begin] = base, train(base, config, inputs, world, options.last_blocks)[0]
        base, points = bases[begin]
        config = training_config(options, seed, epsilon, doubled=True)
        inputs = read_inputs(config, world)
        model = MMDiT(replace(inputs.sizes, qk_norm=norm_later)).to(world.device)
        load_weights(model, base)
        batch = inputs.batches(0)
        share = shortened_by(model, flow_loss(model, batch, LogitNormal(), 1.0), 1e-8)
        later, stopped = train(model, config, inputs, world, options.last_blocks)
        found[arm] = {"base": points, "points": later, "stopped": stopped, "shortened_by": share}
        for place, point in (("begins", later[0]), ("ends", later[-1])):
            print(f"seed {seed}, {arm:18} {place:6} with logit {point['logit']:7.2f}, entropy "
                  f"{point['entropy']:.3f}, validation {point['validation']:.3f} {stopped}")
    return found


# --- Verdicts, figure, command line ---------------------------------------------------------------

def judge(gains):
    """The verdict on one number a seed, above 0 where the paper is right: all seeds must agree, and
    their mean must be larger than what lies between them."""
    spread = max(gains) - min(gains)
    mean = sum(gains) / len(gains)
    agree = min(gains) > 0 or max(gains) < 0
    if len(gains) < 2 or not abs(mean) > spread or not agree:         # also if one of them is nan
        return "cannot be told"
    return "held" if mean > 0 else "did not hold at this size"


def compare(found):
    """(claim, paper, here, numbers of the seeds, what they must exceed) for each claim.

    found: for each seed {arm: what was seen}.
    """
    def ends(arm, name, place=-1):
        values = []
        for seed in found:
            value = seed[arm]["points"][place][name]
            if name == "validation" and place == -1 and seed[arm].get("stopped"):
                value = 2.0                           # It diverged.
            values.append(value)
        return torch.tensor(values, dtype=torch.float64)              # (seeds,)

    grown = ends("without", "logit").log2()
    growth = grown - ends("without", "logit", 0).log2()
    prevented = grown - ends("with", "logit").log2()
    collapse = ends("with", "entropy") - ends("without", "entropy")
    loss = ends("with", "validation")
    stability = ends("without", "validation") - loss
    added = grown - ends("added later", "logit").log2()
    adapted = ends("added later", "validation", 0) - ends("added later", "validation")
    adapted = adapted - ends("without", "validation", 0) + ends("without", "validation")
    epsilon = ends("with, epsilon 1e-8", "validation") - loss
    share = 100 * max(seed["with"]["shortened_by"] for seed in found)
    return [
        ("without QK-norm the largest attention logit more than doubles", "Fig. 5, left: it grows",
         "it doubles {:.2f} times", growth, 1),
        ("QK-norm prevents that growth", "Fig. 5, left",
         "without it, the logit doubles {:.2f} times more", prevented, 0),
        ("QK-norm prevents the collapse of the entropy of attention", "Fig. 5, right",
         "with it, the entropy ends {:.3f} nats higher", collapse, 0),
        ("QK-norm makes training more stable", "Sec. 5.3.2: diverges without it in bf16",
         "with it, the validation loss ends lower by {:+.4f}", stability, 0),
        ("QK-norm that is added later prevents the growth, too", "Sec. 5.3.2: more stable",
         "without it, the logit doubles {:.2f} times more", added, 0),
        ("a model trained without QK-norm adapts to it", "Sec. 5.3.2: quickly",
         "from its addition, the validation loss falls by {:+.4f} more than without", adapted, 0),
        ("epsilon 1e-15 trains better than AdamW's usual 1e-8", "Sec. 5.3.2: bf16 needs it",
         f"the validation loss ends lower by {{:+.4f}}; 1e-8 shortens a step by {share:.2g} %",
         epsilon, 0)]


def claims(found):
    """Rows of the claims table; intervals are ranges over seeds."""
    table = []
    for claim, paper, here, values, limit in compare(found):
        interval = [round(values.min().item(), 4), round(values.max().item(), 4)]
        here = here.format(values.mean().item())
        verdict = judge((values - limit).tolist())
        row = (claim, paper, here, interval, verdict)
        table.append(dict(zip(CLAIM, row, strict=True)))
    return table


def draw_figure(found, file):
    """Fig. 5, and the validation loss. The resolution doubles at 0; every seed is a line."""
    from matplotlib.figure import Figure

    figure = Figure((13, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    titles = {"logit": "largest attention logit", "entropy": "entropy of attention",
              "validation": "validation loss"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for number, arm in enumerate(ARMS):
            for seed, arms in enumerate(found):
                base = arms[arm]["base"]
                points = base + arms[arm]["points"]
                steps = torch.tensor([point["step"] for point in points])
                steps[: len(base)] -= base[-1]["step"]
                heights = [point[name] for point in points]
                label = "" if seed else arm
                axis.plot(steps, heights, ".-", color=f"C{number}", lw=1, label=label)
        axis.axvline(0, color="gray", lw=0.5)
        axis.set(title=title, xlabel="steps at twice the resolution")
    axes[0].set_yscale("log")
    axes[0].legend(fontsize=8)
    write_atomically(file, lambda partial: figure.savefig(partial, dpi=90, format="png"))


def main(arguments=None):
    """Trains all arms with all seeds, prints the claims and draws Fig. 5."""
    options = read_options(Options, __doc__.split("\n")[0], arguments, quick=QUICK, full=FULL)
    world = World(options.device)
    found = []
    for seed in range(options.seeds):
        found.append(run_seed(seed, options, world))
    table = claims(found)
    for row in table:
        print(f"{row['verdict']}: {row['claim']} ({row['paper']}); here {row['here']}, with the "
              f"seeds from {row['interval'][0]} to {row['interval'][1]}")
    settings = asdict(options) | {"encoders": portable(find_model_file(options.encoders))}
    del settings["out"]
    record = {"command": shlex.join(["python", "experiments/fig5_qk_norm.py", *sys.argv[1:]]),
              "settings": settings, "device": str(world.device),
              "threads": torch.get_num_threads(), "seeds": found, "claims": table}
    write_json(options.out, record)
    draw_figure(found, Path(options.out).with_suffix(".png"))


if __name__ == "__main__":
    command(main)
