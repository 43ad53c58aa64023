"""table1_2_fig3_formulations.py: which formulation is best? (SD3, Sec. 5.1, App. B.3)

Table 1, Table 2 and Fig. 3. Every formulation trains with all else equal: network, first weights,
order of the data, noise, number of steps. The step with the lowest validation loss of the averaged
weights is kept. From it, both kinds of weights draw samples with the six samplers of App. B.3. CLIP
score and FID, both on the features of the CLIP that ships, rank the formulations by non-dominated
sorting in each setting; Table 1 has the mean ranks.

The sampler holds x_0 and eps fixed over a step (like DDIM), because Euler's method on Eq. 1, which
App. B.3 names, diverges in EDM's own t. It matters with few steps: see `Formulation.sample`. Where
Eq. 1 is finite and gives other samples, those of the averaged weights are a column of their own.

Ranks among 16 formulations are not ranks among 61: compare the order. The CLIP that ships is tiny;
its numbers mean nothing elsewhere. What is done is stored, and the same command goes on from there.

Run   python experiments/table1_2_fig3_formulations.py --quick     4 formulations, two CPU cores
      python experiments/table1_2_fig3_formulations.py --full --data PATH     two datasets, a GPU
"""

import argparse
import copy
import itertools
import json
import math
import random
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn import Module

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from checkpoints import (
    SHIPPED, add_options, check_options, given_options, load_components, option, write_atomically)
from data import Batches, ImageFiles, to_tensor
from devices import World, autocast, command, pick_precision
from encode import encode_folder
from evaluate import clip_score, frechet_distance, load_image_tower
from flow import guide
from formulations import FORMULATIONS, formulation
from mmdit import MMDiT
from scenes import PLAIN, Scenes, caption, make_scene
from train import Run, TrainConfig, fit, model_sizes, validate

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
PHOTO_SEED = 5_000_000        # The encoded scenes of train.py have other captions and seeds.
QUICK = ("rf/lognorm(0.00, 1.00)", "rf", "eps/linear", "edm(-1.20, 1.20)")


@dataclass(frozen=True)
class StudyConfig:
    """What is compared, and how long it trains."""
    formulations: tuple[str, ...] = option(tuple(PAPER_RANKS), "names as in the paper, or all")
    data: str = option("", "a second dataset of captioned pictures; empty: drawn scenes only")
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
        for name in self.formulations:
            formulation(name)                                          # Its ValueError explains.


PRESETS = {
    "quick": {"formulations": QUICK, "steps": 150, "batch_size": 32, "depth": 3, "samples": 64,
              "num_scenes": 2048},
    "full": {"steps": 20000, "batch_size": 256, "num_scenes": 65536, "seeds": 3},
}
EQUAL = ("steps", "batch_size", "depth", "num_scenes", "samples")      # within one record


# --- Ranks (Sec. 5.1) -----------------------------------------------------------------------------

def beats(first, second):
    """Whether (CLIP score, FID) `first` is nowhere worse and somewhere better than `second`."""
    return first[0] >= second[0] and first[1] <= second[1] and first != second


def non_dominated_ranks(points):
    """The rank of each (CLIP score, FID): 1 where nobody beats it, 2 where only rank 1 does, ...

    Samples that are not finite are beaten by all others.
    """
    finite = []
    for point in points:
        good = math.isfinite(point[0]) and math.isfinite(point[1])
        finite.append(tuple(point) if good else (-math.inf, math.inf))
    ranks = [0] * len(points)
    rank = 0
    while 0 in ranks:
        rank += 1
        left = [i for i in range(len(points)) if ranks[i] == 0]
        for i in left:
            if not any(beats(finite[j], finite[i]) for j in left):
                ranks[i] = rank
    return ranks


def settings_of(runs):
    """{(dataset, seed, weights, steps, guidance): {name: (CLIP, FID)}}, settings that all have."""
    scores = {}
    for key, run in runs.items():
        dataset, name, seed = key.split(" | ")
        for sampler, values in run["metrics"].items():
            if not sampler.endswith("literal"):
                weights, steps, guidance = sampler.split()
                setting = (dataset, seed, weights, int(steps), float(guidance))
                scores.setdefault(setting, {})[name] = tuple(values)
    most = max((len(row) for row in scores.values()), default=0)
    return {setting: row for setting, row in scores.items() if len(row) == most}


def mean_ranks(scores):
    """{name: mean ranks over all settings, those of 5 steps and those of 50}, the best first."""
    collected = {}
    for setting, row in scores.items():
        for name, rank in zip(row, non_dominated_ranks(list(row.values()))):
            collected.setdefault(name, []).append((setting[3], rank))
    means = {}
    for name, ranks in collected.items():
        columns = []
        for wanted in ((5, 10, 25, 50), (5,), (50,)):
            chosen = [rank for steps, rank in ranks if steps in wanted]
            columns.append(sum(chosen) / len(chosen))
        means[name] = tuple(columns)
    return dict(sorted(means.items(), key=lambda item: item[1]))


def agreement(ranks):
    """How many pairs come in the paper's order: (number, of how many). By chance it is one half."""
    shared = []
    for name, ours in ranks.items():
        if name in PAPER_RANKS:
            shared.append((ours[0], PAPER_RANKS[name][0]))
    agreeing, total = 0, 0
    for first, second in itertools.combinations(shared, 2):
        if first[0] != second[0]:
            total += 1
            agreeing += (first[0] < second[0]) == (first[1] < second[1])
    return agreeing, total


# --- One dataset ----------------------------------------------------------------------------------

class PhotoScenes(Scenes):
    """Drawn scenes with the captions that App. B.3 gives ImageNet: "a photo of a <class name>"."""

    def captions(self, index):
        scene = make_scene(self.seed, index)
        said = ("color", "relation")
        return (f"a photo of {caption(scene, said, PLAIN, random.Random(0))}",)


def training_config(config, seed):
    """What fit needs to know, as App. B.3 where a short run allows it."""
    return TrainConfig(
        encoders=str(SHIPPED), resolution=64, depth=config.depth, steps=config.steps,
        batch_size=config.batch_size, optimizer="adamw", lr=1e-3, cooldown=0.4, seed=seed,
        device=config.device)


def formulation_loss(model, batch, form):
    """The formulation's loss of a batch, with t from its density. (B,)"""
    t = form.density.quantile(batch.uniform)                           # (B,)
    return form.loss(model, batch.latent, batch.context, batch.pooled, t, batch.noise)


class BestWeights:
    """Keeps the weights at the step with the lowest validation loss of the average (Sec. 5.1)."""

    def __init__(self, model, held_out, form, precision):
        self.model, self.held_out = model, held_out
        self.form, self.precision = form, precision
        self.loss, self.step, self.weights = math.inf, 0, {}

    def __call__(self, average, step):
        """The hook of fit at every tenth of the run."""
        levels = validate(average, self.held_out.validation(64), self.precision, self.form.loss)
        loss = levels[:-1].mean().item()                               # without t = 1
        if loss < self.loss:
            self.loss, self.step = loss, step
            self.weights = {"ema": copy.deepcopy(average.state_dict()),
                            "raw": copy.deepcopy(self.model.state_dict())}
        return {"validation": loss}, None


class Study:
    """What all formulations share on one dataset: encoded pictures, prompts, features, network."""

    def __init__(self, dataset, config, seed, world):
        self.world, self.config = world, training_config(config, seed)
        self.precision = pick_precision("auto", world.device)
        parts = load_components(SHIPPED, ("vae", "text"))
        self.vae = parts.vae.to(world.device)
        self.text = parts.text.to(world.device)
        self.tower = load_image_tower().to(world.device)
        training, held_out, pictures = self.encode(dataset, config)
        make = partial(Batches, vae_config=self.vae.config, text_config=self.text.config,
                       config=self.config, world=world)
        self.batches, self.held_out = make(training), make(held_out)
        self.real = self.features(torch.stack([to_tensor(picture) for picture in pictures]))
        self.prompts = []
        for i in range(config.samples):
            self.prompts.append(held_out.captions(int(held_out.groups[0][i % len(held_out)]))[0])
        self.context, self.pooled = self.text(self.prompts)
        ids = self.text.tokenize(self.prompts)["clip_l"]
        self.caption_features = self.text.encoders["clip_l"](ids.to(world.device))[1]
        sizes = model_sizes(self.config, self.vae.config, self.text.config, training.longest_side)
        self.model: Module = MMDiT(sizes).to(world.device)

    def encode(self, dataset, config):
        """(training shards, held-out shards, the held-out pictures) of "scenes" or of a path."""
        size, count = self.config.resolution, config.samples
        encode = partial(encode_folder, folder="", encoders_file=SHIPPED, resolution=size,
                         world=self.world)
        if dataset == "scenes":
            seen = PhotoScenes(config.num_scenes, PHOTO_SEED + 1 + self.config.seed)
            unseen = PhotoScenes(count, PHOTO_SEED)
            training = encode(seen).split(len(seen))[1]
            held_out = encode(unseen).split(count)[1]
            return training, held_out, [unseen.image(i, size, size) for i in range(count)]
        files = ImageFiles(dataset)
        training, held_out = encode(files).split(min(count, len(files) // 5))
        if len(training) + len(held_out) != len(files):
            raise ValueError(f"{dataset} has pictures that cannot be read; take them out first")
        pictures = [files.image(int(i), size, size) for i in held_out.groups[0]]
        return training, held_out, pictures

    @torch.no_grad()
    def features(self, images):
        """(N, 3, H, W) -> CLIP-L's features (N, d)."""
        return torch.cat([self.tower(part.to(self.world.device)) for part in images.split(64)])

    def train(self, form):
        """Trains the network from the first weights. Returns its `BestWeights`."""
        self.model.initialize(torch.Generator().manual_seed(self.config.seed))
        best = BestWeights(self.model, self.held_out, form, self.precision)
        with tempfile.TemporaryDirectory() as folder:
            run = Run(Path(folder) / "run", self.config, self.world, report=best)
            fit(self.model, partial(formulation_loss, form=form), self.batches, self.config, run)
        if not best.weights:
            raise RuntimeError(f"{form.name}: the validation loss was never finite; use a lower lr")
        return best

    def guided(self, part, guidance_scale):
        """predict(z, t) -> output for the prompts of a slice, with classifier-free guidance."""
        context, pooled = self.context[part], self.pooled[part]
        no_context, no_pooled = self.text.unconditional(len(context))
        both = torch.cat([context, no_context]), torch.cat([pooled, no_pooled])

        def predict(z, t):
            with autocast(self.world.device, self.precision):
                if guidance_scale == 1:
                    return self.model(z, t, context, pooled).float()
                outputs = self.model(torch.cat([z, z]), torch.cat([t, t]), *both)
            cond, uncond = outputs.float().chunk(2)
            return guide(cond, uncond, guidance_scale)
        return predict

    @torch.no_grad()
    def measure(self, form, num_steps, guidance_scale, literal=False):
        """(CLIP score, FID) of the network as it is. All formulations begin at the same noise."""
        channels, side = self.vae.config.latent_channels, self.config.resolution // 8
        rng = torch.Generator().manual_seed(1)
        noise = torch.randn(len(self.prompts), channels, side, side, generator=rng)
        found = []
        for start in range(0, len(noise), 100):
            part = slice(start, start + 100)
            predict = self.guided(part, guidance_scale)
            times = form.schedule(num_steps)
            latents = form.sample(predict, noise[part].to(self.world.device), times, literal)
            for piece in latents.split(16):
                with autocast(self.world.device, self.precision):
                    images = self.vae.decode(piece)
                found.append(self.features(images.float().clamp(-1, 1)))
        found = torch.cat(found)
        score = clip_score(found, self.caption_features)
        return float(score), float(frechet_distance(found, self.real))

    def run(self, name):
        """Everything about one formulation: its best step, the time it took, its metrics."""
        form, started = formulation(name), time.time()
        best = self.train(form)
        trained, metrics = time.time(), {}
        for kind, weights in best.weights.items():
            self.model.load_state_dict(weights)
            for num_steps, scale in SAMPLERS:
                metrics[f"{kind} {num_steps} {scale:g}"] = self.measure(form, num_steps, scale)
                if kind == "ema" and scale == 5 and name in LITERAL:
                    literal = self.measure(form, num_steps, scale, literal=True)
                    metrics[f"{kind} {num_steps} {scale:g} literal"] = literal
        return {"step": best.step, "validation": best.loss, "metrics": metrics,
                "training_seconds": round(trained - started, 1),
                "sampling_seconds": round(time.time() - trained, 1)}


# --- Tables and figure ----------------------------------------------------------------------------

def mean_metrics(runs, name, sampler):
    """The mean (CLIP, FID) of a formulation and sampler over datasets and seeds, or None."""
    found = []
    for key, run in runs.items():
        if key.split(" | ")[1] == name and sampler in run["metrics"]:
            found.append(run["metrics"][sampler])
    if not found:
        return None
    return tuple(sum(column) / len(found) for column in zip(*found))


def tables(runs):
    """Table 1, Table 2 and the numbers of Fig. 3 beside the paper's, as lines of markdown."""
    scores = settings_of(runs)
    ranks = mean_ranks(scores)
    agreeing, total = agreement(ranks)
    lines = [f"{len(ranks)} formulations, {len(scores)} settings; {agreeing} of {total} pairs come "
             f"in the paper's order", "", "Table 1: mean ranks (the paper's are among 61)",
             "| variant | all | 5 steps | 50 steps | paper: all | 5 steps | 50 steps |",
             "|---" * 7 + "|"]
    for name, ours in ranks.items():
        paper = PAPER_RANKS.get(name, ("", "", ""))
        cells = [f"{x:.2f}" for x in ours] + [f"{x:.2f}" if x else "" for x in paper]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "Table 2 (25 steps) and Fig. 3: guidance 5, averaged weights; the last four FIDs "
              "are those of Euler's method on Eq. 1",
              "| variant | CLIP 25 | FID 25 | FID 5 | FID 10 | FID 50 | literal 25 | literal 5 | "
              "literal 10 | literal 50 | paper: CLIP, FID on ImageNet, CC12M |", "|---" * 11 + "|"]
    for name in ranks:
        cells = [f"{mean_metrics(runs, name, 'ema 25 5')[0]:.3f}"]
        for ending in ("", " literal"):
            for steps in (25, 5, 10, 50):
                metrics = mean_metrics(runs, name, f"ema {steps} 5{ending}")
                cells.append(f"{metrics[1]:.4g}" if metrics else "")
        cells.append(", ".join(str(x) for x in PAPER_METRICS.get(name, ())))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def draw_figure(runs, file):
    """Fig. 3: FID by number of steps with guidance 5. Dashed lines are literal Euler."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure((9, 5), layout="constrained")
    axis = figure.subplots()
    for number, name in enumerate(mean_ranks(settings_of(runs))):
        color = colormaps["tab20"].colors[number % 20]
        for ending, style in (("", "o-"), (" literal", "o--")):
            points = []
            for steps in (5, 10, 25, 50):
                metrics = mean_metrics(runs, name, f"ema {steps} 5{ending}")
                if metrics:
                    points.append((steps, metrics[1]))
            if points:
                axis.plot(*zip(*points), style, color=color, label=name + ending)
    axis.set(title="Fig. 3: FID on CLIP features, guidance 5", xlabel="sampling steps")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    write_atomically(file, lambda partial: figure.savefig(partial, dpi=100, format="png"))


# --- Command line ---------------------------------------------------------------------------------

def read_config(arguments=None):
    """The StudyConfig of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_options(parser, StudyConfig)
    parser.add_argument("--quick", action="store_true", help="4 formulations on two CPU cores")
    parser.add_argument("--full", action="store_true", help="16 formulations, 3 seeds, on a GPU")
    options = parser.parse_args(arguments)
    preset = PRESETS["quick"] if options.quick else PRESETS["full"] if options.full else {}
    given = preset | given_options(options, StudyConfig)
    if "all" in given.get("formulations", ()):
        given["formulations"] = tuple(FORMULATIONS)
    return StudyConfig(**given)


def main(arguments=None):
    """Trains, samples and measures what is missing; then shows all there is."""
    config = read_config(arguments)
    out = Path(config.out)
    record = {"runs": {}}
    if out.is_file():
        record = json.loads(out.read_text())
    settings = {name: getattr(config, name) for name in EQUAL}
    if record.setdefault("settings", settings) != settings:
        raise ValueError(f"{out} was made with {record['settings']}, which is not {settings}. "
                         f"Give the same numbers or another --out")
    world = World(config.device)
    record |= {"command": shlex.join(["python", *sys.argv]), "device": str(world.device)}
    datasets = ["scenes", config.data] if config.data else ["scenes"]
    for seed, dataset in itertools.product(range(config.seeds), datasets):
        study = None
        for name in config.formulations:
            key = f"{Path(dataset).name} | {name} | {seed}"
            if key in record["runs"]:
                continue
            study = study or Study(dataset, replace(config, device=str(world.device)), seed, world)
            record["runs"][key] = result = study.run(name)
            record["ranks"] = mean_ranks(settings_of(record["runs"]))
            text = json.dumps(record, indent=1)
            write_atomically(out, lambda partial, text=text: partial.write_text(text + "\n"))
            seconds = result["training_seconds"], result["sampling_seconds"]
            print(f"{key}: best step {result['step']}; {seconds[0]:.0f} s of training and "
                  f"{seconds[1]:.0f} s of sampling", flush=True)
    print("\n".join(tables(record["runs"])))
    try:
        draw_figure(record["runs"], out.with_suffix(".png"))
    except ImportError:
        print("no figure: matplotlib is not installed")


if __name__ == "__main__":
    command(main)
