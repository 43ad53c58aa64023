"""fig6_shift.py: timesteps are shifted at a higher resolution (SD3, Sec. 5.3.2, Eq. 23, Fig. 6).

A model is trained at a base resolution and then goes on at twice of it: four times the pixels, for
which Eq. 23 asks for alpha = 2. Two copies go on, one trained without a shift and one with 3.0, the
two of the paper's Fig. 6. Each then draws the same prompts from the same noise with several shifts
of the sampling steps.

Differs from the paper: it asked people which pictures they prefer, at 1024 px. Here CLIP score and
FID, on the features of the CLIP that ships, and GenEval's strict score stand for their preference.
People may prefer what these do not see. The pictures are drawn scenes, as GenEval needs them.

A claim holds if its gain is above 0 with every seed and, where it is about sampling alone, with
both models. Where no picture at all passes GenEval, nothing can be told: --quick alone leaves fog
without shapes, whose CLIP score and FID say nothing of what people prefer.

Run   python experiments/fig6_shift.py --quick          four minutes on one CPU core
      python experiments/fig6_shift.py --full           a GPU
      python experiments/fig6_shift.py --init MODEL     goes on with a model of the base resolution
"""

import shlex
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from checkpoints import SHIPPED, find_model_file, load_components, portable
from devices import World, command, pick_precision
from flow import LogitNormal
from geneval import geneval_cases, success_rates
from metrics import PictureMeasures
from mmdit import MMDiT, load_weights
from options import check_options, option, read_options, write_atomically, write_json
from sample import Pipeline, generate
from scenes import captioned_grid, draw_scene
from train import Run, TrainConfig, fit, flow_loss, read_inputs

CLAIM = ("claim", "paper", "here", "interval", "verdict")
MEASURES = {"clip_score": 1, "fid": -1, "geneval": 1}        # 1: more is better; -1: less is
COLUMNS = 8                                                  # of the grid of pictures
LOW = 1.5                                                    # the paper: more than this is better


@dataclass(frozen=True)
class Options:
    """What is trained, and what is drawn with it."""
    trained: tuple[float, ...] = option((1.0, 3.0), "shifts in training", 0.01, 100)
    shifts: tuple[float, ...] = option((1.0, 1.5, 2.0, 3.0, 4.0, 6.0), "shifts in sampling", 0.01,
                                       100)
    depth: int = option(4, "size of the model", 1, 64)
    resolution: int = option(64, "px per side at first; then it doubles", 16, 1024)
    base_steps: int = option(2000, "steps at the base resolution", 1, 10**7)
    steps: int = option(1000, "steps at twice of it", 1, 10**7)
    batch_size: int = option(64, "pictures in a step", 1, 10**5)
    num_scenes: int = option(16384, "scenes to train on", 64, 10**7)
    num_prompts: int = option(50, "prompts for each of GenEval's tasks", 1, 10**4)
    num_steps: int = option(25, "steps of the sampler", 1, 1000)
    guidance_scale: float = option(4.0, "of the sampler", 0, 100)
    seeds: int = option(2, "repetitions", 1, 100)
    init: str = option("", "a model of the base resolution; empty: one is trained")
    encoders: str = option(str(SHIPPED), "model with the frozen VAE, text encoders, image tower")
    device: str = option("auto", "cuda, mps or cpu")
    out: str = option(str(ROOT / "results" / "fig6_shift.json"), "what is measured")

    def __post_init__(self):
        check_options(self)
        if len(self.trained) < 2 or not set(self.trained) <= set(self.shifts):
            raise ValueError(f"--trained {self.trained}: two or more of --shifts {self.shifts}")
        if min(self.shifts) > LOW or max(self.shifts) <= LOW:
            raise ValueError(f"--shifts {self.shifts}: give some up to {LOW} and some above it")


QUICK = {"shifts": (1.0, 1.5, 2.0, 3.0, 6.0), "depth": 2, "base_steps": 300, "steps": 120,
         "batch_size": 16, "num_scenes": 512, "num_prompts": 4, "num_steps": 12}
FULL = {"depth": 8, "resolution": 128, "base_steps": 4000, "steps": 2000, "batch_size": 128,
        "num_scenes": 65536}


# --- Training -------------------------------------------------------------------------------------

def train(model, inputs, config, world):
    """The average of a model that is trained with the shift of its config."""
    loss = partial(flow_loss, density=LogitNormal(), timestep_shift=config.timestep_shift)
    with tempfile.TemporaryDirectory() as folder:
        return fit(model, loss, inputs.batches, config, Run(Path(folder) / "run", config, world))


def base_model(options, config, world):
    """A model of the base resolution: the one of --init, or a new one."""
    if options.init:
        return load_components(options.init, ("mmdit",)).mmdit
    inputs = read_inputs(config, world)
    model = MMDiT(inputs.sizes)
    model.initialize(torch.Generator().manual_seed(config.seed))
    return train(model.to(world.device), inputs, config, world)


# --- Drawing and measuring ------------------------------------------------------------------------

def draw(model, inputs, prompts, size, shift, options, world):
    """A picture, uint8 (size, size, 3), of each prompt, from the same noise for every shift."""
    settings = {
        "num_steps": options.num_steps,
        "guidance_scale": options.guidance_scale,
        "schedule": "shifted",
        "timestep_shift": shift,
        "unconditional": "zeros",
        "height": size,
        "width": size}
    precision = pick_precision("auto", world.device)
    pipeline = Pipeline(model, inputs.vae, inputs.text, settings, world.device, precision)
    pictures = generate(pipeline, prompts, seed=1, batch_size=32)
    return [np.asarray(picture) for picture in pictures]


def run_seed(seed, options, world):
    """(trained with, sampled with, measures) for all pairs of shifts, and a few pictures of the
    pairs of the paper's Fig. 6, with their captions."""
    config = TrainConfig(
        encoders=options.encoders, num_scenes=options.num_scenes, resolution=options.resolution,
        depth=options.depth, steps=options.base_steps, batch_size=options.batch_size, seed=seed,
        lr=6e-4, encoder_dropout=0.464, device=options.device)
    base = base_model(options, config, world)
    size = 2 * options.resolution
    cases = geneval_cases(options.num_prompts, height=size, width=size)
    prompts = [case.prompt for case in cases]
    real = [draw_scene(case.scene) for case in cases]
    rows = []
    pictures = []
    captions = []
    for trained in options.trained:
        config = replace(config, resolution=size, steps=options.steps, timestep_shift=trained,
                         depth=base.config.depth)
        inputs = read_inputs(config, world, base)
        model = MMDiT(inputs.sizes).to(world.device)
        load_weights(model, base)
        model = train(model, inputs, config, world)
        measures = PictureMeasures(real, prompts, inputs.text, options.encoders, world.device)
        for shift in options.shifts:
            drawn = draw(model, inputs, prompts, size, shift, options, world)
            rates = success_rates(cases, drawn)
            row = measures(drawn)
            row |= {"geneval": rates["overall"], "geneval_lax": rates["overall_lax"]}
            rows.append((trained, shift, row))
            if shift in options.trained:
                step = len(drawn) // COLUMNS
                pictures += drawn[::step][:COLUMNS]
                for prompt in prompts[::step][:COLUMNS]:
                    captions.append(f"{trained:g}, {shift:g}: {prompt}")
            print(f"seed {seed}, trained with {trained:g}, sampled with {shift:g}: CLIP score "
                  f"{row['clip_score']:.4f}, FID {row['fid']:.2f}, KID {row['kid']:.3f}, GenEval "
                  f"{row['geneval']:.3f}, lax {row['geneval_lax']:.3f}", flush=True)
    return rows, captioned_grid(pictures, captions, COLUMNS)


# --- Verdicts, figure, command line ---------------------------------------------------------------

def judge(gains):
    """The verdict on several gains, above 0 where the paper is right: all of them must agree."""
    if len(gains) > 1 and min(gains) > 0:
        return "held"
    if len(gains) > 1 and max(gains) < 0:
        return "did not hold at this size"
    return "cannot be told"                                           # also if one of them is nan


def mean(values):
    return sum(values) / len(values)


def curves(rows, measure):
    """{trained with: {sampled with: measure}}, where more is better. rows: those of `run_seed`."""
    found = {}
    for trained, shift, row in rows:
        found.setdefault(trained, {})[shift] = MEASURES[measure] * row[measure]
    return found


def halves(curve):
    """The values of a curve {shift: value} for shifts up to 1.5, and above it."""
    low = []
    high = []
    for shift in sorted(curve):
        half = low if shift <= LOW else high
        half.append(curve[shift])
    return low, high


def claims(seeds):
    """Rows of the claims table. Intervals are ranges over seeds; where the claim is about sampling
    alone, over the models of all seeds. seeds: for each one the rows of `run_seed`."""
    found = []
    for measure in MEASURES:
        gains = []
        better = []
        for rows in seeds:
            models = curves(rows, measure)
            first, *_, last = sorted(models)
            better.append(models[last][last] - models[first][first])
            for curve in models.values():
                low, high = halves(curve)
                gains.append(mean(high) - mean(low))
        found.append((f"sampling with a shift above {LOW} is preferred: {measure}",
                      "Fig. 6: strong preference of people", "{:+.4f}", gains))
        found.append((f"training and sampling with {last:g} beats {first:g}: {measure}",
                      "Fig. 6, bottom: pictures", "{:+.4f}", better))
    flatter = []
    for rows in seeds:
        low, high = halves(curves(rows, "fid")[first])
        flatter.append(mean(high) - low[0] - (max(high) - min(high)))
    found.append(("higher shifts differ less among themselves than from the lowest: fid",
                  "Fig. 6: less drastic", "{:+.4f}", flatter))
    best = 0
    for rows in seeds:
        for curve in curves(rows, "geneval").values():
            best = max(best, *curve.values())
    table = []
    for claim, paper, here, gains in found:
        interval = [round(min(gains), 4), round(max(gains), 4)]
        here = "gain " + here.format(mean(gains))
        verdict = judge(gains) if best > 0 else "cannot be told"
        table.append(dict(zip(CLAIM, (claim, paper, here, interval, verdict), strict=True)))
    return table


def draw_figure(seeds, file):
    """The three measures by shift in sampling; every seed is a line."""
    from matplotlib.figure import Figure

    figure = Figure((13, 4), layout="constrained")
    axes = figure.subplots(1, len(MEASURES))
    for axis, (measure, sign) in zip(axes, MEASURES.items(), strict=True):
        for seed, rows in enumerate(seeds):
            for number, (trained, curve) in enumerate(curves(rows, measure).items()):
                label = "" if seed else f"trained with {trained:g}"
                heights = [sign * value for value in curve.values()]
                axis.plot(list(curve), heights, "o-", color=f"C{number}", label=label)
        axis.axvline(LOW, color="gray", lw=0.5)
        better = "more" if sign > 0 else "less"
        axis.set(title=f"{measure} ({better} is better)", xlabel="shift in sampling")
    axes[0].legend()
    write_atomically(file, lambda partial: figure.savefig(partial, dpi=90, format="png"))


def main(arguments=None):
    """Trains, draws and measures; prints the claims; writes numbers, curves and pictures."""
    options = read_options(Options, __doc__.split("\n")[0], arguments, quick=QUICK, full=FULL)
    world = World(options.device)
    out = Path(options.out)
    seeds = []
    for seed in range(options.seeds):
        rows, grid = run_seed(seed, options, world)
        seeds.append(rows)
    table = claims(seeds)
    for row in table:
        print(f"{row['verdict']}: {row['claim']} ({row['paper']}); here {row['here']}, from "
              f"{row['interval'][0]} to {row['interval'][1]}")
    settings = asdict(options) | {"encoders": portable(find_model_file(options.encoders))}
    del settings["out"]
    record = {"command": shlex.join(["python", "experiments/fig6_shift.py", *sys.argv[1:]]),
              "settings": settings, "device": str(world.device),
              "threads": torch.get_num_threads(), "seeds": seeds, "claims": table}
    write_json(out, record)
    draw_figure(seeds, out.with_suffix(".png"))
    samples = out.with_name(f"{out.stem}_samples.png")
    write_atomically(samples, lambda partial: grid.save(partial, "PNG"))


if __name__ == "__main__":
    command(main)
