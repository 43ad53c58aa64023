r"""table1_2_fig3_formulations.py: which formulation is best? (SD3, Sec. 5.1, App. B.3)

Table 1, Table 2 and Fig. 3. Every formulation trains with all else equal: network, first weights,
order of the data, noise, number of steps. The step with the lowest validation loss of the averaged
weights is kept. From it, both kinds of weights draw samples with the six samplers of App. B.3. CLIP
score and FID rank the formulations by non-dominated sorting in each setting; Table 1 has the means.

The sampler holds x_0 and eps fixed over a step (like DDIM), because Euler's method on Eq. 1, which
App. B.3 names, diverges in EDM's own t. It matters with few steps: see `Formulation.sample`. Where
Eq. 1 is finite and gives other samples, their FID is a column of its own ("literal").

Differs from the paper: AdamW's rate is 1e-3 and falls at the end. Scores are those of the CLIP that
lies beside the encoders. With --data, FID compares with the first pictures there. Few ranks are not
ranks among 61: compare the order. What is done is stored, and the same command goes on from there.

Run   python experiments/table1_2_fig3_formulations.py --quick --out runs/table1.json
          four minutes on one CPU core: too few steps, see below
      python experiments/table1_2_fig3_formulations.py --full --out runs/table1-full.json    a GPU
      python experiments/table1_2_fig3_formulations.py --formulations "rf/lognorm(0.00, 1.00)" rf \
          eps/linear "rf/lognorm(0.50, 0.60)" "edm(-1.20, 1.20)" --steps 800 --batch-size 32 \
          --depth 2 --num-scenes 4096 --samples 64 --seeds 2       35 minutes on one CPU core

results/ has the last command's numbers. Its budget was chosen after --quick had come out against
the paper. After 150 steps uniform t ranks before logit-normal t. After 800 steps rf/lognorm(0, 1)
ranks first, as in the paper, but EDM ranks second, where the paper has it last.
"""

import copy
import json
import math
import shlex
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from checkpoints import FROZEN, SHIPPED, find_model_file, fingerprint, portable
from data import ImageFiles, from_tensor
from devices import World, autocast, command, pick_precision
from flow import validate
from formulations import FORMULATIONS, formulation
from metrics import PictureMeasures
from mmdit import MMDiT
from options import check_options, option, read_options, write_atomically, write_json
from sample import guided_velocity
from scenes import HELD_OUT_SEED, Scenes
from train import Run, TrainConfig, fit, read_inputs

SAMPLERS = [(50, 1.0), (50, 2.5), (50, 5.0), (5, 5.0), (10, 5.0), (25, 5.0)]      # steps, guidance
LITERAL = ("eps/linear", "v/linear", "eps/cos", "v/cos")    # For rf, the two samplers agree.
PAPER_RANKS = {                                                        # Table 1
    # name                    all, 5 steps, 50 steps
    "rf/lognorm(0.00, 1.00)": (1.54, 1.25, 1.50),
    "rf/lognorm(1.00, 0.60)": (2.08, 3.50, 2.00),
    "rf/lognorm(0.50, 0.60)": (2.71, 8.50, 1.00),
    "rf/mode(1.29)": (2.75, 3.25, 3.00),
    "rf/lognorm(0.50, 1.00)": (2.83, 1.50, 2.50),
    "eps/linear": (2.88, 4.25, 2.75),
    "rf/mode(1.75)": (3.33, 2.75, 2.75),
    "rf/cosmap": (4.13, 3.75, 4.00),
    "edm(0.00, 0.60)": (5.63, 13.25, 3.25),
    "rf": (5.67, 6.50, 5.75),
    "v/linear": (6.83, 5.75, 7.75),
    "edm(0.60, 1.20)": (9.00, 13.00, 9.00),
    "v/cos": (9.17, 12.25, 8.75),
    "edm/cos": (11.04, 14.25, 11.25),
    "edm/rf": (13.04, 15.25, 13.25),
    "edm(-1.20, 1.20)": (15.58, 20.25, 15.00),
}
PAPER_METRICS = {                                                      # Table 2, 25 steps
    # name                     ImageNet CLIP, FID, CC12M CLIP, FID
    "rf": (0.247, 49.70, 0.217, 94.90),
    "edm(-1.20, 1.20)": (0.236, 63.12, 0.200, 116.60),
    "eps/linear": (0.245, 48.42, 0.222, 90.34),
    "v/cos": (0.244, 50.74, 0.209, 97.87),
    "v/linear": (0.246, 51.68, 0.217, 100.76),
    "rf/lognorm(0.50, 0.60)": (0.256, 80.41, 0.233, 120.84),
    "rf/mode(1.75)": (0.253, 44.39, 0.218, 94.06),
    "rf/lognorm(1.00, 0.60)": (0.254, 114.26, 0.234, 147.69),
    "rf/lognorm(-0.50, 1.00)": (0.248, 45.64, 0.219, 89.70),
    "rf/lognorm(0.00, 1.00)": (0.250, 45.78, 0.224, 89.91),
}
CLAIM = ("claim", "paper", "here", "interval", "verdict")


@dataclass(frozen=True)
class Options:
    """What is compared, and how long it trains."""
    formulations: tuple[str, ...] = option(tuple(PAPER_RANKS), "names as in the paper, or all")
    data: str = option("", "captioned pictures in place of drawn scenes")
    encoders: str = option(str(SHIPPED), "model with the frozen VAE, text encoders, image tower")
    steps: int = option(2000, "training steps of each formulation", 1, 10**8)
    batch_size: int = option(64, "pictures in a step (App. B.3: 1024)", 1, 10**5)
    depth: int = option(4, "size of the network", 1, 64)
    num_scenes: int = option(16384, "scenes to train on", 64, 10**7)
    samples: int = option(1000, "for each sampler (App. B.3: 1000)", 2, 10**5)
    seeds: int = option(1, "repetitions", 1, 100)
    device: str = option("auto", "cuda, mps or cpu")
    out: str = option(str(ROOT / "results" / "table1_2_fig3_formulations.json"), "what is measured")

    def __post_init__(self):
        check_options(self)
        if "all" in self.formulations:
            object.__setattr__(self, "formulations", tuple(FORMULATIONS))
        for name in self.formulations:
            formulation(name)                                          # Its ValueError explains.


QUICK = {"formulations": ("rf/lognorm(0.00, 1.00)", "rf", "eps/linear", "edm(-1.20, 1.20)"),
         "steps": 150, "batch_size": 16, "depth": 2, "samples": 32, "num_scenes": 1024, "seeds": 2}
FULL = {"steps": 3000, "batch_size": 256, "num_scenes": 65536}
EQUAL = ("data", "encoders", "steps", "batch_size", "depth", "num_scenes", "samples")  # in a file


# --- Ranks (Sec. 5.1) -----------------------------------------------------------------------------

def beats(first, second):
    """Whether (CLIP score, FID) `first` is nowhere worse and somewhere better than `second`."""
    return first[0] >= second[0] and first[1] <= second[1] and first != second


def non_dominated_ranks(points):
    """The rank of each (CLIP score, FID): 1 where nobody beats it, 2 where only rank 1 does, ..."""
    ranks = [0] * len(points)
    rank = 0
    while 0 in ranks:
        rank += 1
        left = [i for i in range(len(points)) if ranks[i] == 0]
        for i in left:
            if not any(beats(points[j], points[i]) for j in left):
                ranks[i] = rank
    return ranks


def settings_of(runs):
    """{(seed, weights, steps, guidance): {name: (CLIP, FID)}}, of the settings that all have."""
    scores = {}
    for key, run in runs.items():
        name, seed = key.split(" | ")
        for sampler, values in run["metrics"].items():
            if not sampler.endswith("literal"):
                weights, steps, guidance = sampler.split()
                setting = (seed, weights, int(steps), float(guidance))
                scores.setdefault(setting, {})[name] = tuple(values)
    most = max((len(row) for row in scores.values()), default=0)
    return {setting: row for setting, row in scores.items() if len(row) == most}


def mean_ranks(scores):
    """{name: mean ranks over all settings, those of 5 steps and those of 50}, the best first."""
    collected = {}
    for setting, row in scores.items():
        for name, rank in zip(row, non_dominated_ranks(list(row.values()))):
            collected.setdefault(name, []).append((setting[2], rank))
    means = {}
    for name, ranks in collected.items():
        columns = []
        for wanted in ((5, 10, 25, 50), (5,), (50,)):
            chosen = [rank for steps, rank in ranks if steps in wanted]
            columns.append(sum(chosen) / len(chosen))
        means[name] = tuple(columns)
    return dict(sorted(means.items(), key=lambda item: item[1]))


# --- Training and sampling ------------------------------------------------------------------------

def formulation_loss(model, batch, form):
    """The formulation's loss of a batch, with t from its density. (B,)"""
    t = form.density.quantile(batch.uniform)                           # (B,)
    return form.loss(model, batch.latent, batch.context, batch.pooled, t, batch.noise)


class BestWeights:
    """A report for fit: keeps the weights where the average has its lowest validation loss."""

    def __init__(self, model, unseen, form, precision):
        self.model, self.unseen = model, unseen
        self.form, self.precision = form, precision
        self.loss, self.step, self.weights = math.inf, 0, {}

    def __call__(self, average, step):
        levels = validate(average, self.unseen.validation(64), self.precision, self.form.loss)
        loss = levels[:-1].mean().item()                               # without t = 1
        if loss < self.loss:
            self.loss, self.step = loss, step
            self.weights = {"ema": copy.deepcopy(average.state_dict()),
                            "raw": copy.deepcopy(self.model.state_dict())}
        return {"validation": loss}, None


class Study:
    """What all formulations share with one seed: inputs, prompts, measures, network."""

    def __init__(self, options, seed, world):
        self.world = world
        self.precision = pick_precision("auto", world.device)
        self.config = TrainConfig(
            data=options.data, encoders=options.encoders, num_scenes=options.num_scenes,
            depth=options.depth, steps=options.steps, batch_size=options.batch_size,
            optimizer="adamw", lr=1e-3, cooldown=0.4, encoder_dropout=0.464, seed=seed,
            device=options.device)
        self.inputs = read_inputs(self.config, world)
        source = Scenes(options.samples, HELD_OUT_SEED)
        if options.data:
            source = ImageFiles(options.data)
        real, prompts = [], []
        for i in range(options.samples):
            real.append(source.image(i % len(source), 64, 64))
            prompts.append(source.captions(i % len(source))[0])
        text = self.inputs.text
        self.measures = PictureMeasures(real, prompts, text, options.encoders, world.device)
        self.texts = []
        with torch.no_grad(), autocast(world.device, self.precision):
            for first in range(0, len(prompts), 64):
                part = prompts[first : first + 64]
                pairs = zip(text(part), text.unconditional(len(part)))
                self.texts.append([torch.cat(pair) for pair in pairs])
        self.model = MMDiT(self.inputs.sizes).to(world.device)

    def train(self, form):
        """Trains the network from the first weights. Returns its `BestWeights`."""
        self.model.initialize(torch.Generator().manual_seed(self.config.seed))
        best = BestWeights(self.model, self.inputs.unseen, form, self.precision)
        loss = partial(formulation_loss, form=form)
        with tempfile.TemporaryDirectory() as folder:
            run = Run(Path(folder) / "run", self.config, self.world, report=best)
            fit(self.model, loss, self.inputs.batches, self.config, run)
        if not best.weights:
            raise RuntimeError(f"{form.name}: the validation loss was never finite; use a lower lr")
        return best

    @torch.no_grad()
    def measure(self, form, num_steps, guidance_scale, literal=False):
        """(CLIP score, FID) of the network as it is. All formulations begin at the same noise."""
        rng = torch.Generator().manual_seed(1)
        pictures = []
        for context, pooled in self.texts:                             # (2 B, L, D) and (2 B, P)
            B = len(context) // 2
            if guidance_scale == 1:
                context, pooled = context[:B], pooled[:B]
            predict = partial(guided_velocity, self.model, context, pooled, guidance_scale, ())
            noise = torch.randn(B, self.inputs.sizes.latent_channels, 8, 8, generator=rng)
            noise = noise.to(self.world.device)
            with autocast(self.world.device, self.precision):
                latents = form.sample(predict, noise, form.schedule(num_steps), literal)
                images = self.inputs.vae.decode(latents).float().cpu()         # (B, 3, 64, 64)
            pictures += [from_tensor(image) for image in images.nan_to_num()]
        found = self.measures(pictures)
        return found["clip_score"], found["fid"]

    def run(self, name):
        """Everything about one formulation: its best step and loss, its metrics."""
        form = formulation(name)
        best = self.train(form)
        metrics = {}
        for kind, weights in best.weights.items():
            self.model.load_state_dict(weights)
            for num_steps, scale in SAMPLERS:
                metrics[f"{kind} {num_steps} {scale:g}"] = self.measure(form, num_steps, scale)
        if name in LITERAL:
            self.model.load_state_dict(best.weights["ema"])
            for num_steps in (5, 10, 25, 50):
                literal = self.measure(form, num_steps, 5.0, literal=True)
                metrics[f"ema {num_steps} 5 literal"] = literal
        return {"step": best.step, "validation": best.loss, "metrics": metrics}


# --- Claims, tables, figure -----------------------------------------------------------------------

def without(numbers, *names):
    """The numbers of {name: number}, except those of some names."""
    return [number for name, number in numbers.items() if name not in names]


def gains(ranks, slopes):
    """Yields (claim, the paper's numbers, by how much it holds) where its formulations are there.

    ranks: {name: (all, 5 steps, 50 steps)}; slopes: {name: log2 of FID at 5 steps by FID at 50}.
    """
    first, last, narrow = "rf/lognorm(0.00, 1.00)", "edm(-1.20, 1.20)", "rf/lognorm(0.50, 0.60)"
    rank = {name: columns[0] for name, columns in ranks.items()}
    flows = [name for name in rank if name.startswith("rf")]
    others = [name for name in rank if name not in flows]
    reweighted = [name for name in flows if name != "rf"]
    if first in rank and "rf" in rank:
        yield "logit-normal ranks before uniform", "Table 1: 1.54, 5.67", rank["rf"] - rank[first]
    if first in rank and len(rank) > 1:
        gain = min(without(rank, first)) - rank[first]
        yield f"{first} ranks first", "Table 1: 1.54, then 2.08", gain
    if reweighted and "rf" in rank and "eps/linear" in rank:
        before = rank["eps/linear"] - min(without(rank, "rf", *others))
        behind = min(without(rank, "eps/linear", *reweighted)) - rank["eps/linear"]
        gain = min(before, behind)
        yield "only reweighted rf ranks before eps/linear", "Table 1: 1.54 < 2.88 < 5.67", gain
    if flows and others:
        gain = min(without(slopes, *flows)) - max(without(slopes, *others))
        yield "rectified flows degrade least with few steps", "Fig. 3; doublings of FID", gain
    if narrow in rank:
        gain = ranks[narrow][1] - ranks[narrow][2]
        yield f"{narrow} is better with 50 steps than with 5", "Table 1: 1.00, 8.50", gain
    if last in rank and len(rank) > 1:
        gain = rank[last] - max(without(rank, last))
        yield f"{last} ranks last", "Table 1: 15.58 of these 16", gain


def claims(runs):
    """Rows of the claims table. A gain is a difference of mean ranks, or of log2 FID for few steps.
    A claim holds if its gain is above 0 with every seed, and does not if below 0 with every one.
    Intervals are ranges over seeds."""
    found = {}
    scores = settings_of(runs)
    for seed in sorted({setting[0] for setting in scores}):
        own = {setting: row for setting, row in scores.items() if setting[0] == seed}
        few, many = own[seed, "ema", 5, 5.0], own[seed, "ema", 50, 5.0]
        slopes = {name: math.log2(few[name][1] / many[name][1]) for name in few}
        for claim, paper, gain in gains(mean_ranks(own), slopes):
            found.setdefault((claim, paper), []).append(round(gain, 3))
    table = []
    for (claim, paper), values in found.items():
        verdict = "cannot be told"
        if len(values) > 1 and min(values) > 0:
            verdict = "held"
        if len(values) > 1 and max(values) < 0:
            verdict = "did not hold at this size"
        here = f"gain {sum(values) / len(values):+.2f}"
        row = (claim, paper, here, [min(values), max(values)], verdict)
        table.append(dict(zip(CLAIM, row, strict=True)))
    return table


def mean_metrics(runs, name, sampler):
    """The mean (CLIP, FID) of a formulation and sampler over seeds, or nan."""
    rows = [[math.nan, math.nan]]
    for key, run in runs.items():
        if key.startswith(f"{name} | ") and sampler in run["metrics"]:
            rows.append(run["metrics"][sampler])
    return torch.tensor(rows).nanmean(dim=0).tolist()


def print_tables(runs):
    """Tables 1 and 2 and the numbers of Fig. 3, with the paper's."""
    scores = settings_of(runs)
    print(f"{len(scores)} settings. Guidance 5 and averaged weights for CLIP score and FID")
    print("variant, ranks (all, 5 steps, 50 steps), the paper's, CLIP score with 25 steps, FID "
          "with 5, 10, 25, 50, literal with 5, the paper's CLIP and FID on ImageNet and CC12M")
    for name, ours in mean_ranks(scores).items():
        cells = [f"{name:23}"]
        for ranks in (ours, PAPER_RANKS.get(name, (math.nan,) * 3)):
            cells.append(" ".join(f"{rank:5.2f}" for rank in ranks))
        cells.append(f"{mean_metrics(runs, name, 'ema 25 5')[0]:.3f}")
        for sampler in ("ema 5 5", "ema 10 5", "ema 25 5", "ema 50 5", "ema 5 5 literal"):
            cells.append(f"{mean_metrics(runs, name, sampler)[1]:6.4g}")
        print("  ".join(cells), *PAPER_METRICS.get(name, ()))


def draw_figure(runs, file):
    """Fig. 3: FID by number of steps with guidance 5. Dashed lines are literal Euler."""
    from matplotlib.figure import Figure

    figure = Figure((9, 5), layout="constrained")
    axis = figure.subplots()
    steps = [5, 10, 25, 50]
    for number, name in enumerate(mean_ranks(settings_of(runs))):
        for ending, style in (("", "o-"), (" literal", "o--")):
            heights = [mean_metrics(runs, name, f"ema {n} 5{ending}")[1] for n in steps]
            if not math.isnan(heights[0]):
                axis.plot(steps, heights, style, color=f"C{number % 10}", label=name + ending)
    axis.set(title="Fig. 3: FID on CLIP features, guidance 5", xlabel="sampling steps")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    write_atomically(file, lambda partial: figure.savefig(partial, dpi=100, format="png"))


# --- Command line ---------------------------------------------------------------------------------

def main(arguments=None):
    """Trains, samples and measures what is missing; then shows all there is."""
    options = read_options(Options, __doc__.split("\n")[0], arguments, quick=QUICK, full=FULL)
    out = Path(options.out)
    record = {"runs": {}}
    if out.is_file():
        record = json.loads(out.read_text())
    settings = {name: getattr(options, name) for name in EQUAL}
    file = find_model_file(options.encoders)
    settings |= {"encoders": portable(file), "frozen": fingerprint(file, FROZEN)}
    if record.setdefault("settings", settings) != settings:
        raise ValueError(f"{out} was made with {record['settings']}, which is not {settings}. "
                         f"Give the same numbers or another --out")
    world = World(options.device)
    words = ["python", "experiments/table1_2_fig3_formulations.py", *sys.argv[1:]]
    record |= {"command": shlex.join(words), "device": str(world.device)}
    for seed in range(options.seeds):
        study = None
        for name in options.formulations:
            key = f"{name} | {seed}"
            if key in record["runs"]:
                continue
            study = study or Study(options, seed, world)
            record["runs"][key] = result = study.run(name)
            record["ranks"] = mean_ranks(settings_of(record["runs"]))
            record["claims"] = claims(record["runs"])
            write_json(out, record)
            print(f"{key}: best step {result['step']}, its loss {result['validation']:.4f}",
                  flush=True)
    print_tables(record["runs"])
    for row in record["claims"]:
        print(f"{row['verdict']}: {row['claim']} ({row['paper']}); here {row['here']}, with the "
              f"seeds from {row['interval'][0]} to {row['interval'][1]}")
    draw_figure(record["runs"], out.with_suffix(".png"))


if __name__ == "__main__":
    command(main)
