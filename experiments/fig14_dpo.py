"""fig14_dpo.py: a model learns what is preferred (SD3, App. C, Fig. 13 and 14, Table 5 "w/ DPO").

The model draws several pictures of each training prompt. Where one of them shows what was asked
and another does not, the two become a pair, (better, worse). Diffusion-DPO (Wallace et al. 2023,
Eq. 14) on such pairs trains low-rank matrices (LoRA, Hu et al. 2021) in all linear layers. Then
both models draw prompts for other scenes, from the same new noise, and a judge compares each two.

Differs   The paper asks people, about three for each prompt. Here the strict score of drawn scenes
          judges: it makes the pairs, and it votes. The CLIP score votes as well; it made no pair.
          Without guidance the shipped model has more to learn, so --guidance-scale is 1, for the
          pairs and for the votes. One claim is measured again at the model's own guidance. The rank
          is 16 of width 256; the paper has 128 of widths 1536 and 2432.
Prompts   Scenes differ, but short sentences come again: "single object" has only eight. So one
          claim is about the sentences that made no pair.
Control   The same LoRA, steps and rate, but the plain loss of Eq. 8 on the better ones alone.
          --lr and --beta were chosen for DPO, on 180 prompts that do not vote here.

Verdicts: a vote for DPO counts 1, a vote against it 0, a tie 1/2. Each claim is about a mean over
prompts, with its 95 % interval. A claim about votes holds if the whole interval is above 1/2, and a
claim about a difference of shares if it is above 0. If the whole interval is below, the claim did
not hold. With fewer than 20 prompts that are no tie, nothing can be told. Each model was trained
once.

Run   python experiments/fig14_dpo.py --quick     thirteen minutes on one CPU core
      python experiments/fig14_dpo.py --full      one GPU
"""

import copy
import math
import shlex
import sys
import tempfile
import textwrap
from collections import namedtuple
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from checkpoints import (
    SHIPPED, find_model_file, fingerprint, load_components, portable, run_encoders)
from data import to_tensor
from devices import World, autocast, command
from flow import LogitNormal, rectified_flow_loss
from geneval import GENEVAL_TASKS, batch_size, geneval_cases, score, success_rates
from metrics import PictureMeasures, clip_scores
from options import check_options, option, read_options, write_atomically, write_json
from sample import generate, load
from scenes import HELD_OUT_SEED
from train import Run, TrainConfig, fit

PAIR_SEED = 4_000_037                # of the prompts that pairs are made for
LEAST_DECIDED = 20                   # prompts that are no tie, for a verdict
NAMES = ("base", "DPO", "better ones only")
PAPER = "Table 5, depth 38, 512 px: .68 -> .71"


@dataclass(frozen=True)
class Options:
    checkpoint: str = option(str(SHIPPED), "the base model, with CLIP's image tower")
    guidance_scale: float = option(1.0, "of the pairs and of the votes; 1: off", 0.0, 100.0)
    num_prompts: int = option(400, "training prompts of each task", 1, 10**6)
    pictures: int = option(4, "pictures of each training prompt", 2, 1000)
    rank: int = option(16, "of the learned matrices; the paper has 128", 1, 4096)
    beta: float = option(500.0, "the larger, the closer to the base model it stays", 0.0, 1e6)
    steps: int = option(2000, "training steps; the paper has 4000 (2B) and 2000 (8B)", 1, 10**7)
    batch_size: int = option(32, "pairs in a step", 1, 10**5)
    lr: float = option(3e-4, "AdamW's peak rate", 1e-9, 1.0)
    num_votes: int = option(100, "prompts of each task that are voted on", 2, 10**5)
    seed: int = option(0, "of the matrices, the order, t and noise", 0, 2**31)
    device: str = option("auto", "cuda, mps or cpu")
    out: str = option(str(ROOT / "results" / "fig14_dpo.json"), "where the numbers go")

    __post_init__ = check_options


QUICK = {"num_prompts": 50, "steps": 150, "batch_size": 16, "num_votes": 50}
FULL = {"num_prompts": 2000, "pictures": 8, "batch_size": 256, "num_votes": 400}


# --- Low-rank matrices (Hu et al. 2021) -----------------------------------------------------------

class LowRank(nn.Module):
    """weight -> weight + up @ down, of which only up (out, rank) and down (rank, in) learn.
    `up` begins at zero, so the sum begins as the weight. The factor alpha / r of Hu et al. is 1."""

    def __init__(self, weight, rank, rng):
        super().__init__()
        features_out, features_in = weight.shape
        down = torch.randn(rank, features_in, generator=rng) / features_in**0.5
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(features_out, rank))

    def forward(self, weight):
        return weight + self.up @ self.down


def linear_layers(model):
    """All linear layers of a model, as the paper adapts them."""
    return [layer for layer in model.modules() if isinstance(layer, nn.Linear)]


def add_lora(model, rank, seed):
    """Freezes a model and gives each of its linear layers matrices that learn. In place."""
    rng = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for layer in linear_layers(model):
        update = LowRank(layer.weight.detach().cpu(), rank, rng).to(layer.weight)
        parametrize.register_parametrization(layer, "weight", update)


def merge_lora(model):
    """Puts the learned sums into the weights, so that the model is a plain one again. In place."""
    for layer in linear_layers(model):
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    model.requires_grad_(False)


# --- Diffusion-DPO (Wallace et al. 2023) ----------------------------------------------------------

# What a step gets: latents (B, C, H, W) of both pictures, their text, and one noise and t for both.
Pairs = namedtuple("Pairs", "better worse context pooled t noise")


def dpo_loss(model, batch, reference, beta):
    """Wallace et al. 2023, Eq. 14, with the velocity of Eq. 13 in place of the noise: (B,).

        -log sigmoid(beta (gain on the better picture - gain on the worse one))

    The gain is how much lower the error of the model is than that of the reference. Differs from
    Wallace et al.: both pictures get the same noise, as in their released code; t has the density
    of Eq. 19; their factor beta T omega(lambda_t) is one number; an error is a mean over the
    numbers of a latent, not a sum.
    """
    given = batch.context, batch.pooled, batch.t, batch.noise
    with torch.no_grad():
        better_before = rectified_flow_loss(reference, batch.better, *given)
        worse_before = rectified_flow_loss(reference, batch.worse, *given)
    better = rectified_flow_loss(model, batch.better, *given)
    worse = rectified_flow_loss(model, batch.worse, *given)
    gain = (better_before - better) - (worse_before - worse)
    return -F.logsigmoid(beta * gain)


def better_loss(model, batch):
    """The control: Eq. 8 on the better pictures, (B,)."""
    return rectified_flow_loss(model, batch.better, batch.context, batch.pooled, batch.t,
                               batch.noise)


# --- Preferences ----------------------------------------------------------------------------------

def passes(cases, pictures):
    """Which pictures show what was asked, and nothing else: (n,) bool."""
    found = []
    for case, picture in zip(cases, pictures, strict=True):
        strict, _ = score(case, picture)
        found.append(strict)
    return np.array(found)


def pair_up(passed):
    """[(prompt, better, worse)] from passed (pictures, prompts): each better picture of a prompt
    meets a worse one of the same prompt, as long as there are both. Numbers are those of rows."""
    found = []
    for prompt in range(passed.shape[1]):
        better = np.flatnonzero(passed[:, prompt])
        worse = np.flatnonzero(~passed[:, prompt])
        for good, bad in zip(better.tolist(), worse.tolist(), strict=False):
            found.append((prompt, good, bad))
    return found


@torch.no_grad()
def encode_pictures(vae, pictures, device):
    """Latents (n, C, H, W) of PIL pictures of one size."""
    latents = []
    for picture in pictures:
        latents.append(vae.encode(to_tensor(picture)[None].to(device)))
    return torch.cat(latents).float()


@torch.no_grad()
def make_pairs(pipeline, options):
    """What the base model's pictures of the training prompts teach: (better latents, worse latents,
    context, pooled), n each, and the set of their prompts."""
    height, width = pipeline.defaults["height"], pipeline.defaults["width"]
    together = batch_size(height, width)
    cases = geneval_cases(options.num_prompts, PAIR_SEED, height, width)
    prompts = [case.prompt for case in cases]
    drawn, passed = [], []
    for turn in range(options.pictures):
        first = PAIR_SEED + turn * len(prompts)
        drawn.append(generate(pipeline, prompts, first, together,
                              guidance_scale=options.guidance_scale))
        passed.append(passes(cases, drawn[turn]))
    pairs = pair_up(np.stack(passed))
    print(f"{len(pairs)} pairs from {len(drawn) * len(prompts)} pictures, of which "
          f"{np.mean(passed):.0%} show what was asked", flush=True)
    if not pairs:
        raise ValueError("no prompt has both a picture that shows what was asked and one that does "
                         "not; give more --num-prompts, more --pictures or another --checkpoint")
    better = [drawn[good][prompt] for prompt, good, _ in pairs]
    worse = [drawn[bad][prompt] for prompt, _, bad in pairs]
    texts = [prompts[prompt] for prompt, _, _ in pairs]
    device, contexts, pooled = pipeline.device, [], []
    with autocast(device, pipeline.precision):
        for start in range(0, len(texts), 64):
            found = pipeline.text(texts[start : start + 64])
            contexts.append(found[0].float())
            pooled.append(found[1].float())
        taught = (encode_pictures(pipeline.vae, better, device),
                  encode_pictures(pipeline.vae, worse, device))
    return (*taught, torch.cat(contexts), torch.cat(pooled)), set(texts)


# --- Training -------------------------------------------------------------------------------------

def learn(base, loss, pairs, options, world):
    """A copy of the base model, trained by the project's loop. loss(model, batch) -> (B,)."""
    better, worse, context, pooled = pairs
    model = copy.deepcopy(base)
    add_lora(model, options.rank, options.seed)

    def batches(step):
        rng = torch.Generator().manual_seed(options.seed * 10**6 + step)
        chosen = torch.randint(len(better), (options.batch_size,), generator=rng)
        uniform = torch.rand(options.batch_size, generator=rng).clamp(1e-6, 1 - 1e-6)
        noise = torch.randn(options.batch_size, *better.shape[1:], generator=rng)
        t = LogitNormal().quantile(uniform)                           # Eq. 19
        chosen = chosen.to(better.device)
        return Pairs(better[chosen], worse[chosen], context[chosen], pooled[chosen],
                     t.to(better), noise.to(better))

    config = TrainConfig(steps=options.steps, every=options.steps, optimizer="adamw",
                         batch_size=options.batch_size, lr=options.lr, seed=options.seed)
    with tempfile.TemporaryDirectory() as folder:
        model = fit(model, loss, batches, config, Run(Path(folder), config, world))
    merge_lora(model)
    return model


# --- Votes ----------------------------------------------------------------------------------------

def draw_and_judge(pipeline, model, cases, measures, guidance_scale):
    """One model's pictures of all cases, and what both judges say of each picture, (n,) each."""
    pipeline.mmdit = model
    prompts = [case.prompt for case in cases]
    together = batch_size(pipeline.defaults["height"], pipeline.defaults["width"])
    pictures = generate(pipeline, prompts, HELD_OUT_SEED, together, guidance_scale=guidance_scale)
    cosines = clip_scores(measures.features(pictures), measures.text_features)
    judges = {"strict score": passes(cases, pictures), "CLIP score": cosines.cpu().numpy()}
    return pictures, judges


def mean_interval(values):
    """The mean of (n,) numbers, and its 95 % interval."""
    middle = values.mean()
    reach = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    return middle.item(), (middle.item() - reach, middle.item() + reach)


def votes(ours, theirs):
    """For each prompt 1 where our picture is judged better, 0 where theirs is, 1/2 for a tie."""
    ours, theirs = ours.astype(float), theirs.astype(float)
    return (np.sign(ours - theirs) + 1) / 2


def judge(claim, paper, here, values, middle):
    """A row of the claims table: is the mean of (n,) values above `middle`?"""
    mean, (low, high) = mean_interval(values)
    told = np.count_nonzero(values != middle) >= LEAST_DECIDED
    verdict = "cannot be told"
    if told and low > middle:
        verdict = "held"
    elif told and high < middle:
        verdict = "did not hold at this size"
    here = here.format(mean)
    print(f"{verdict}: {claim}: {here}, from {low:.3f} to {high:.3f}; the paper: {paper}")
    return {"claim": claim, "paper": paper, "here": here,
            "interval": [round(low, 4), round(high, 4)], "verdict": verdict}


def claims(cases, judged, judged_own, trained):
    """The claims table. judged: {name of a model: {judge: (n,)}}; judged_own: the same with the
    model's own guidance, or {} if that is no other one. trained: the prompts that made a pair."""
    new = np.array([case.prompt not in trained for case in cases])
    six = np.array([case.task in GENEVAL_TASKS for case in cases])
    rows = []
    for name in ("strict score", "CLIP score"):
        for_dpo = votes(judged["DPO"][name], judged["base"][name])
        rows.append(judge(f"the model with DPO is preferred, by {name}: share of the votes",
                          "Fig. 14: above 50 %", "{:.3f}", for_dpo, 0.5))
    def gain(found, ours, theirs):
        ours, theirs = found[ours]["strict score"], found[theirs]["strict score"]
        return ours.astype(float) - theirs.astype(float)
    from_base = gain(judged, "DPO", "base")
    if new.sum() > 1:
        claim = f"DPO raises the share that passes, for {new.sum()} prompts that made no pair"
        rows.append(judge(claim, "not measured", "{:+.3f}", from_base[new], 0))
    rows.append(judge("DPO raises GenEval overall", PAPER, "{:+.3f}", from_base[six], 0))
    if judged_own:
        rows.append(judge("DPO raises GenEval overall at the model's own guidance", PAPER,
                          "{:+.3f}", gain(judged_own, "DPO", "base")[six], 0))
    rows.append(judge("DPO gains more than the better pictures alone do: GenEval overall",
                      "not measured", "{:+.3f}", gain(judged, "DPO", "better ones only")[six], 0))
    return rows


# --- Figure, command line -------------------------------------------------------------------------

def draw_figure(cases, pictures, judged, file, columns=10):
    """Votes by task, and pictures that the judge sees differently, base above DPO."""
    from matplotlib.figure import Figure

    figure = Figure((12, 5.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1)
    axis = upper.subplots()
    tasks = list(dict.fromkeys(case.task for case in cases))
    of_case = np.array([case.task for case in cases])
    for number, name in enumerate(NAMES):
        shares = [judged[name]["strict score"][of_case == task].mean() for task in tasks]
        axis.bar(np.arange(len(tasks)) + 0.27 * number, shares, 0.25, label=name)
    axis.set_xticks(np.arange(len(tasks)) + 0.27, tasks, fontsize=8)
    axis.set(title="share that passes, strict score", ylim=(0, 1))
    axis.legend(fontsize=8, loc="lower right", ncols=3)
    differs = judged["base"]["strict score"] != judged["DPO"]["strict score"]
    shown = np.flatnonzero(differs)
    shown = shown[:: max(1, len(shown) // columns)][:columns]
    axes = lower.subplots(2, columns)
    for axis in axes.flat:
        axis.axis("off")
    for column, index in enumerate(shown):
        prompt = textwrap.fill(cases[index].prompt, 20) + "\n"
        for row, name in enumerate(("base", "DPO")):
            mark = "right" if judged[name]["strict score"][index] else "wrong"
            axes[row, column].imshow(pictures[name][index])
            axes[row, column].set_title(f"{prompt}{name}: {mark}", fontsize=6)
            prompt = ""
    write_atomically(file, partial(figure.savefig, dpi=80, format="png"))


def main(arguments=None):
    """Make pairs, train with them, vote."""
    options = read_options(Options, __doc__.split("\n")[0], arguments, quick=QUICK, full=FULL)
    world = World(options.device)
    pipeline = load(options.checkpoint, options.device)
    base = load_components(options.checkpoint, ("mmdit",)).mmdit.to(pipeline.device)    # in fp32
    own = pipeline.defaults["guidance_scale"]
    if options.rank > base.config.hidden_size:
        raise ValueError(f"--rank {options.rank} is above the width {base.config.hidden_size}, so "
                         f"it is not low")
    size = pipeline.defaults["height"], pipeline.defaults["width"]
    cases = geneval_cases(options.num_votes, HELD_OUT_SEED, *size)
    file = pipeline.parts.file
    blank = np.zeros((*size, 3), np.uint8)                            # No real picture is needed.
    measures = PictureMeasures([blank], [case.prompt for case in cases], pipeline.text,
                               (run_encoders(file.parent) or file).parent, pipeline.device)
    pairs, trained = make_pairs(pipeline, options)
    models = {"base": base,
              "DPO": learn(base, partial(dpo_loss, reference=base, beta=options.beta), pairs,
                           options, world),
              "better ones only": learn(base, better_loss, pairs, options, world)}
    pictures, judged, judged_own, scores = {}, {}, {}, {}
    for name in NAMES:
        scores[name] = {}
        for guidance in sorted({options.guidance_scale, own}):
            drawn, seen = draw_and_judge(pipeline, models[name], cases, measures, guidance)
            if guidance == options.guidance_scale:
                pictures[name], judged[name] = drawn, seen
            else:
                judged_own[name] = seen
            scores[name][f"guidance {guidance:g}"] = success_rates(cases, drawn)
            overall = scores[name][f"guidance {guidance:g}"]["overall"]
            print(f"{name}, guidance {guidance:g}: GenEval {overall:.3f}", flush=True)
    rows = claims(cases, judged, judged_own, trained)
    settings = asdict(options) | {"checkpoint": portable(find_model_file(options.checkpoint))}
    del settings["out"]
    record = {"command": shlex.join(["python", "experiments/fig14_dpo.py", *sys.argv[1:]]),
              "settings": settings, "model": fingerprint(pipeline.parts.file),
              "device": str(world.device), "pairs": len(pairs[0]), "scores": scores,
              "claims": rows}
    write_json(options.out, record)
    draw_figure(cases, pictures, judged, Path(options.out).with_suffix(".png"))


if __name__ == "__main__":
    command(main)
