"""fig8_table5_scaling.py: quality by size and steps (SD3, arXiv:2403.03206v1, Sec. 5.3.3)

Fig. 8 and Table 5. MM-DiTs of several depths train on the same batches with the same noise, t and
constant rate. At even distances the average of the weights is validated at equally spaced t, of
which t = 1 is left out. The models of the first seed also draw GenEval's prompts each time, from
the same noise. GenEval is scored exactly on drawn scenes, so there is no --data. evaluate.py
explains strict and lax scores; the paper's are lax.

z_t does not determine the velocity, so the loss has a floor above 0. Besides the power law a x^-b,
one with a floor, c + a x^-b, is fitted. Both are least squares of log(loss - c). R^2 is that of the
loss itself.

Differs from the paper: sizes, steps and batches are tiny; validation is on held-out scenes in place
of COCO; CLIP score stands in place of T2I-CompBench and human raters. After the few steps of
--quick, GenEval is still near 0: composition comes late, so its claims need more steps.

Rules       The loss falls if it does at every comparison, in the mean over the seeds. A correlation
            held if Fisher's 95 % interval is below -.5; the points of one run depend on each other,
            so it is too narrow. It cannot be told where two checkpoints, the first of the smallest
            model and the last of the largest, differ in GenEval by no more than chance. A
            difference held if Newcombe's 95 % interval is above 0.
Output      also runs/fig8/dDEPTH-sSEED, the models, which table6_steps.py reads
Run         python experiments/fig8_table5_scaling.py --quick     minutes on one CPU core
            python experiments/fig8_table5_scaling.py --full      for a GPU
"""

import math
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from batches import Batches
from checkpoints import FROZEN, SHIPPED, find_model_file, fingerprint, portable
from devices import World, command, pick_precision
from evaluate import draw_paths
from flow import density, validate
from geneval import GENEVAL_TASKS, geneval_cases, success_rates
from metrics import PictureMeasures, wilson
from mmdit import MMDiT, count_parameters
from options import check_options, option, read_options, write_atomically, write_json
from sample import Pipeline
from scenes import HELD_OUT_SEED, captioned_grid, draw_scene, vocabulary
from train import Run, TrainConfig, fit, flow_loss, read_inputs

PAPER = {                            # Table 5, 512 px: overall, then the tasks of GENEVAL_TASKS
    18: (0.58, 0.97, 0.72, 0.52, 0.78, 0.16, 0.34),
    24: (0.62, 0.98, 0.74, 0.63, 0.67, 0.34, 0.36),
    30: (0.64, 0.96, 0.80, 0.65, 0.73, 0.33, 0.37),
    38: (0.68, 0.98, 0.84, 0.66, 0.74, 0.40, 0.43),
}
QUALITY = {"lax": "GenEval, lax", "strict": "GenEval, strict", "clip_score": "CLIP score"}
RESOLUTION = 64                      # px per side
SAMPLING = {"num_steps": 25, "guidance_scale": 4.0, "schedule": "shifted", "timestep_shift": 1.0,
            "unconditional": "zeros", "height": RESOLUTION, "width": RESOLUTION}


@dataclass(frozen=True)
class Options:
    """What is trained, and how often it is measured."""
    encoders: str = option(str(SHIPPED), "model with the frozen VAE and text encoders")
    num_scenes: int = option(16384, "scenes to train on", 64, 10**8)
    depths: tuple[int, ...] = option((1, 2, 3, 4, 6), "sizes; width is 64 depth", 1, 64)
    steps: int = option(4000, "training steps of every model", 4, 10**8)
    points: int = option(8, "measurements of a run, at even distances", 2, 1000)
    batch_size: int = option(64, "pictures in a step", 1, 10**5)
    seeds: int = option(2, "repetitions with other weights, batches and noise", 1, 100)
    num_prompts: int = option(40, "prompts for each of the nine tasks", 1, 10**4)
    out: str = option("results/fig8_table5_scaling.json", "what is measured, beside the figure")

    def __post_init__(self):
        check_options(self)
        if len(set(self.depths)) < 2:
            raise ValueError("--depths: give two or more, since sizes are compared")


PRESETS = {
    "quick": {"depths": (1, 2, 3, 4), "steps": 160, "points": 4, "batch_size": 32,
              "num_scenes": 2048, "num_prompts": 6},
    "full": {"depths": (2, 4, 6, 8, 12), "steps": 3000, "batch_size": 256, "num_scenes": 65536,
             "num_prompts": 50},
}


# ---- Laws and intervals --------------------------------------------------------------------------

def power_law(x, loss, floor=0.0):
    """(a, b, R^2) of loss = floor + a x^-b, by least squares of log(loss - floor). x, loss (n,)"""
    columns = torch.stack([torch.ones_like(x), -x.log()], dim=1)          # (n, 2)
    wanted = (loss - floor).log()[:, None]                                # (n, 1)
    log_a, b = torch.linalg.lstsq(columns, wanted).solution.flatten().tolist()
    error = loss - floor - math.exp(log_a) * x**-b
    r_squared = 1 - error.square().sum() / (loss - loss.mean()).square().sum()
    return math.exp(log_a), b, r_squared.item()


def floored_power_law(x, loss):
    """(c, a, b, R^2) of loss = c + a x^-b, with the best c of 1000 between 0 and the least loss."""
    best = (0.0, *power_law(x, loss))
    for share in range(1, 1000):
        floor = share / 1000 * loss.min().item()
        found = (floor, *power_law(x, loss, floor))
        if found[-1] > best[-1]:
            best = found
    return best


def correlation(x, y):
    """Pearson's r and Fisher's 95 % interval, (r, low, high); nan if there is nothing to relate."""
    x, y = x - x.mean(), y - y.mean()
    r = ((x * y).sum() / (x.norm() * y.norm())).clamp(-1, 1)
    reach = 1.96 / math.sqrt(len(x) - 3) if len(x) > 3 else math.inf
    low, high = torch.tanh(r.atanh() - reach), torch.tanh(r.atanh() + reach)
    return r.item(), low.item(), high.item()


def difference(share, other, n):
    """share - other, each seen in n cases, with Newcombe's 95 % interval: (value, low, high)."""
    low, high = wilson(share, n)
    other_low, other_high = wilson(other, n)
    below = math.hypot(share - low, other_high - other)
    above = math.hypot(high - share, other - other_low)
    return share - other, share - other - below, share - other + above


# ---- Training ------------------------------------------------------------------------------------

def training_flops(model, unseen):
    """FLOPs of a picture in training: those of the forward pass, as torch counts them, times 3."""
    latent, context, pooled, _ = next(unseen.validation(1))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(latent, torch.zeros(1, device=latent.device), context, pooled)
    return 3 * counter.get_total_flops()


def report(average, step, pipeline, unseen, cases, measures):
    """The report of `fit`: validation loss and, where cases are given, GenEval and CLIP score."""
    levels = validate(average, unseen.validation(64), pipeline.precision)                 # (8,)
    entries = {"validation": levels[:-1].mean().item(), "validation_by_t": levels.tolist()}
    if not cases:
        return entries, None
    pipeline.mmdit = average
    prompts = [case.prompt for case in cases]
    pictures, _ = draw_paths(pipeline, prompts, HELD_OUT_SEED)
    rates = success_rates(cases, pictures)
    entries |= {"lax": rates["overall_lax"], "strict": rates["overall"], "geneval": rates}
    each = len(cases) // 9                                            # one picture of each task
    return entries | measures(pictures), captioned_grid(pictures[::each], prompts[::each], 3)


def learn(config, inputs, world, measure_average):
    """Trains a model in runs/fig8 from its first step: (its size, its measurements)."""
    folder = Path("runs/fig8") / f"d{config.depth}-s{config.seed}"
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)         # fit would go on from them.
    batches = Batches(inputs.training, inputs.vae.config, inputs.text.config, config, world)
    sizes = replace(inputs.sizes, depth=config.depth)
    model = MMDiT(sizes)
    model.initialize(torch.Generator().manual_seed(config.seed))
    model.to(world.device)
    size = {"parameters": count_parameters(sizes),
            "flops_per_step": config.batch_size * training_flops(model, inputs.unseen)}
    file = find_model_file(config.encoders)
    encoders = {"path": portable(file), "fingerprint": fingerprint(file, FROZEN)}
    run = Run(folder, config, world, report=measure_average,
              metadata={"sampling": SAMPLING, "words": sorted(vocabulary())},
              about={"model": asdict(sizes), "encoders": encoders})
    loss = partial(flow_loss, density=density("lognorm(0, 1)"), timestep_shift=1.0)
    fit(model, loss, batches, config, run)
    return size, [entry for entry in run.entries if "validation" in entry]


def train_all(options):
    """{depth: {"parameters", "flops_per_step", "curves": one for each seed}}"""
    config = TrainConfig(
        encoders=options.encoders, num_scenes=options.num_scenes, resolution=RESOLUTION,
        steps=options.steps, every=options.steps // options.points, batch_size=options.batch_size,
        lr=6e-4, cooldown=0.0, encoder_dropout=0.464)
    world = World(config.device)
    inputs = read_inputs(config, world)
    precision = pick_precision(config.precision, world.device)
    cases = geneval_cases(options.num_prompts, height=RESOLUTION, width=RESOLUTION)
    measure_average = partial(
        report, unseen=inputs.unseen,
        pipeline=Pipeline(None, inputs.vae, inputs.text, SAMPLING, world.device, precision),
        measures=PictureMeasures([draw_scene(case.scene) for case in cases],
                                 [case.prompt for case in cases], inputs.text,
                                 find_model_file(options.encoders).parent, world.device))
    models = {}
    for depth in sorted(set(options.depths)):
        models[depth] = {"curves": []}
        for seed in range(options.seeds):
            run_config = replace(config, depth=depth, seed=seed)
            asked = cases if seed == 0 else ()
            size, curve = learn(run_config, inputs, world, partial(measure_average, cases=asked))
            models[depth] |= size
            models[depth]["curves"].append(curve)
    return models


# ---- What it says --------------------------------------------------------------------------------

def column(curve, name):
    """One number of every measurement of a run: (points,)."""
    return torch.tensor([entry[name] for entry in curve], dtype=torch.float64)


def mean_losses(model):
    """The validation losses of a size, averaged over the seeds: (points,)."""
    curves = [column(curve, "validation") for curve in model["curves"]]
    return torch.stack(curves).mean(dim=0)


def laws_of_size(models):
    """Both power laws of the last loss, by parameters."""
    parameters = [float(model["parameters"]) for model in models.values()]
    x = torch.tensor(parameters, dtype=torch.float64)
    losses = torch.stack([mean_losses(model)[-1] for model in models.values()])
    return {"plain": power_law(x, losses), "floored": floored_power_law(x, losses)}


def claim(text, paper, here, interval, held, failed):
    """A row of the claims table."""
    verdict = "cannot be told"
    if held:
        verdict = "held"
    if failed:
        verdict = "did not hold at this size"
    return {"claim": text, "paper": paper, "here": here, "interval": interval, "verdict": verdict}


def claims_of_losses(models, laws):
    """Does the loss fall with size, and with steps, and how smoothly?"""
    losses = torch.stack([mean_losses(model) for model in models.values()])       # (sizes, points)
    rows = []
    for text, differences in (("size, after as many steps", losses.diff(dim=0)),
                              ("training steps", losses.diff(dim=1))):
        falls = (differences < 0).flatten()
        here = f"{int(falls.sum())} of {len(falls)} comparisons; last losses"
        for loss in losses[:, -1].tolist():
            here += f" {loss:.3f}"
        rows.append(claim(f"validation loss falls with {text}", "always, Fig. 8, top", here, None,
                          bool(falls.all()), not bool(falls.all())))
    floor, factor, exponent, r_squared = laws["floored"]
    here = (f"{floor:.3f} + {factor:.3g} parameters^-{exponent:.3f}, R^2 {r_squared:.4f}; "
            f"without a floor R^2 {laws['plain'][-1]:.4f}")
    enough = len(models) > 3                              # Three numbers fit three sizes exactly.
    rows.append(claim("validation loss is a smooth function of size (power law, R^2 >= .95)",
                      "smooth, Fig. 8, top", here, None,
                      enough and r_squared >= 0.95, enough and r_squared < 0.95))
    return rows


def claims_of_quality(models):
    """Does the loss predict GenEval and CLIP score, and does size improve GenEval?"""
    curves = [model["curves"][0] for model in models.values()]
    points = sum(curves, [])
    small, large = curves[0][-1], curves[-1][-1]
    n = len(GENEVAL_TASKS) * small["geneval"]["n"]                    # pictures of a checkpoint
    rows = []
    for name, text in QUALITY.items():
        scores = column(points, name)
        best, worst = scores.max().item(), scores.min().item()
        here, interval = f"{len(points)} checkpoints score from {worst:.3f} to {best:.3f}", None
        held = failed = False
        # Not the best and the worst: of many, these differ by chance.
        _, low, high = difference(scores[-1].item(), scores[0].item(), n)
        if name == "clip_score" or low > 0 or high < 0:
            r, low, high = correlation(column(points, "validation"), scores)
            here += f"; r = {r:.3f}"
            interval = [round(low, 3), round(high, 3)]
            held, failed = high < -0.5, low > -0.5
        rows.append(claim(f"validation loss predicts {text}", "strongly, Fig. 8, bottom", here,
                          interval, held, failed))
    value, low, high = difference(large["lax"], small["lax"], n)
    rows.append(claim(f"GenEval rises with size, from depth {min(models)} to {max(models)}",
                      "from .58 (18) to .68 (38), Table 5",
                      f"from {small['lax']:.3f} to {large['lax']:.3f} (lax), "
                      f"from {small['strict']:.3f} to {large['strict']:.3f} (strict)",
                      [round(low, 3), round(high, 3)], low > 0, high < 0))
    return rows


def print_table(models):
    """Table 5: GenEval by depth, the paper's rows below."""
    rows = {}
    for depth, model in models.items():
        rates = model["curves"][0][-1]["geneval"]
        rows[f"ours, {depth}, lax"] = rates["overall_lax"], *rates["lax"].values()
        rows[f"ours, {depth}, strict"] = rates["overall"], *rates["strict"].values()
    for depth, shares in PAPER.items():
        rows[f"paper, {depth}"] = shares
    print(f"{'Table 5, depth':16}  overall  {'  '.join(GENEVAL_TASKS)}")
    for name, (overall, *shares) in rows.items():
        line = f"{name:16}  {overall:7.2f}"
        for task, share in zip(GENEVAL_TASKS, shares):
            line += f"  {share:{len(task)}.2f}"
        print(line)


def draw_figure(models, laws, file):
    """Fig. 8: above, loss by steps, FLOPs and parameters; below, quality by loss."""
    from matplotlib.figure import Figure

    figure = Figure((13, 8), layout="constrained")
    above, below = figure.subplots(2, 3)
    for depth, model in models.items():
        curve = model["curves"][0]
        steps, losses = column(curve, "step"), mean_losses(model)
        above[0].plot(steps, losses, ".-", label=f"depth {depth}")
        above[1].plot(steps * model["flops_per_step"], losses, ".-")
        above[2].plot(model["parameters"], losses[-1], "o")
        for axis, name in zip(below, QUALITY):
            axis.plot(column(curve, "validation"), column(curve, name), "o")
    floor, factor, exponent, r_squared = laws["floored"]
    first, *_, last = models.values()
    x = torch.linspace(first["parameters"], last["parameters"], 100)
    above[2].plot(x, floor + factor * x**-exponent, "k:", label=f"power law, R^2 {r_squared:.3f}")
    for axis, name in zip(above, ("training steps", "training FLOPs", "parameters")):
        axis.set(xlabel=name, ylabel="validation loss", xscale="log")
    for axis, name in zip(below, QUALITY.values()):
        axis.set(xlabel="validation loss", ylabel=name)
    above[0].legend()
    above[2].legend()
    write_atomically(file, lambda partial: figure.savefig(partial, dpi=100, format="png"))


def main(arguments=None):
    """Train the ladder of sizes, and say what follows from it."""
    options = read_options(Options, __doc__.split("\n")[0], arguments, **PRESETS)
    models = train_all(options)
    laws = laws_of_size(models)
    rows = claims_of_losses(models, laws) + claims_of_quality(models)
    print_table(models)
    for row in rows:
        print(f"{row['verdict']}: {row['claim']} ({row['paper']}): {row['here']} {row['interval']}")
    record = {
        "command": shlex.join(["python", "experiments/fig8_table5_scaling.py", *sys.argv[1:]]),
        "settings": asdict(options) | {"encoders": portable(find_model_file(options.encoders))},
        "sampling": SAMPLING, "models": models, "laws": laws, "paper": PAPER, "claims": rows}
    write_json(options.out, record)
    draw_figure(models, laws, Path(options.out).with_suffix(".png"))


if __name__ == "__main__":
    command(main)
