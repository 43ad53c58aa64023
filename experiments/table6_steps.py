"""table6_steps.py: do bigger models need fewer steps? (SD3, arXiv:2403.03206v1, Table 6)

Models of several depths draw the same prompts from the same noise with 5, 10, 20 and 50 steps of
Euler's method. The drop of the CLIP score is relative to 50 steps. The path length is the sum of
||v dt|| over 50 steps; v is the velocity that is followed, with guidance. Models of one depth are
averaged. v is 0 before training, so paths first become longer: lengths of models that have hardly
learnt say nothing of how straight their paths are.

Differs from the paper: the models are those of fig8_table5_scaling.py, or any --checkpoints; the
prompts are captions of held-out scenes; the CLIP is the one beside each model's encoders.

Rule        A claim compares the smallest and the largest depth. It held if the 95 % interval of the
            difference is above 0, and did not if it is below. Intervals are those of 2000 bootstrap
            samples of the prompts.
Shapes      M prompts
Run         python experiments/fig8_table5_scaling.py --quick     trains the models
            python experiments/table6_steps.py --quick            minutes on one CPU core
"""

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import sample
from checkpoints import find_model_file, run_encoders
from devices import command
from evaluate import draw_paths
from metrics import PictureMeasures
from options import (
    check_options, option, read_json, read_options, write_atomically, write_json)
from scenes import HELD_OUT_SEED, Scenes

STEPS = (5, 10, 20, 50)
COLUMNS = ("drop of the CLIP score at 5 of 50 steps, %", "drop at 10 of 50 steps, %",
           "drop at 20 of 50 steps, %", "path length")
PAPER = {                    # depth: COLUMNS
    15: (4.30, 0.86, 0.21, 191.13),
    30: (3.59, 0.70, 0.24, 187.96),
    38: (2.71, 0.14, 0.08, 185.96),
}


@dataclass(frozen=True)
class Options:
    """Which models draw, and how much."""
    checkpoints: tuple[str, ...] = option((), "models or runs; none: those in runs/fig8")
    num_prompts: int = option(500, "prompts", 2, 10**5)
    guidance_scale: float = option(4.0, "classifier-free guidance; 1: off", 0, 100)
    seed: int = option(0, "of the noise and of the bootstrap", 0, 2**31)
    out: str = option("results/table6_steps.json", "what is measured; the figure lies beside it")

    def __post_init__(self):
        check_options(self)


PRESETS = {"quick": {"num_prompts": 64}, "full": {"num_prompts": 2000}}


# ---- Drawing and measuring -----------------------------------------------------------------------

def measure(checkpoint, options):
    """(depth, numbers (5, M)): for each of M prompts the CLIP scores with STEPS, and the length of
    the path with the most of them."""
    pipeline = sample.load(checkpoint)
    scenes = Scenes(options.num_prompts, HELD_OUT_SEED)
    prompts = [scenes.captions(index)[-1] for index in range(len(scenes))]
    real = [scenes.image(0, 64, 64)]                                  # Only FID would need more.
    folder = find_model_file(checkpoint).parent
    encoders = run_encoders(folder)
    if encoders:
        folder = encoders.parent
    measures = PictureMeasures(real, prompts, pipeline.text, folder, pipeline.device)
    numbers = []
    for num_steps in STEPS:
        pictures, lengths = draw_paths(pipeline, prompts, options.seed, num_steps=num_steps,
                                       guidance_scale=options.guidance_scale)
        features = measures.features(pictures)                        # (M, d)
        numbers.append(F.cosine_similarity(features, measures.text_features).cpu())
    numbers.append(lengths)
    return pipeline.mmdit.config.depth, torch.stack(numbers).double()


def measure_all(checkpoints, options):
    """{depth: numbers (5, M)}, the smallest first; models of one depth are averaged."""
    found = {}
    for checkpoint in checkpoints:
        depth, numbers = measure(checkpoint, options)
        found.setdefault(depth, []).append(numbers)
    averages = {}
    for depth in sorted(found):
        averages[depth] = torch.stack(found[depth]).mean(dim=0)
    return averages


# ---- What it says --------------------------------------------------------------------------------

def columns(means):
    """Table 6 from the means of the numbers: drops in % and path length, (5, ...) -> (4, ...)"""
    drops = 100 * (1 - means[:3] / means[3])                          # (3, ...)
    return torch.cat([drops, means[4:]])


def bootstrap(averages, seed, repetitions=2000):
    """The columns for other draws of the prompts, which are the same for all depths:
    {depth: (4, repetitions)}"""
    rng = torch.Generator().manual_seed(seed)
    M = next(iter(averages.values())).shape[1]
    chosen = torch.randint(M, (repetitions, M), generator=rng)
    samples = {}
    for depth, numbers in averages.items():
        samples[depth] = columns(numbers[:, chosen].mean(dim=2))      # (5, n) -> (4, n)
    return samples


def interval(values):
    """The middle 95 % of bootstrap values (n,): [low, high]"""
    ends = torch.tensor([0.025, 0.975], dtype=values.dtype)
    return [round(end, 3) for end in values.quantile(ends).tolist()]


def claims(table, samples):
    """Does the largest model lose less CLIP score with few steps, and is its path shorter?"""
    small, large = min(table), max(table)
    rows = []
    for place, name in enumerate(COLUMNS):
        low, high = interval(samples[small][place] - samples[large][place])
        verdict = "cannot be told"
        if low > 0:
            verdict = "held"
        if high < 0:
            verdict = "did not hold at this size"
        rows.append({
            "claim": f"bigger models have a smaller {name}",
            "paper": f"{PAPER[15][place]} at depth 15, {PAPER[38][place]} at 38",
            "here": f"{table[small][place]:.2f} at depth {small}, "
                    f"{table[large][place]:.2f} at {large}",
            "interval": [low, high], "verdict": verdict})
    return rows


def draw_figure(averages, file):
    """CLIP score relative to 50 steps by number of steps, and path length by depth."""
    from matplotlib.figure import Figure

    figure = Figure((10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for depth, numbers in averages.items():
        means = numbers.mean(dim=1)                                   # (5,)
        left.plot(STEPS, 100 * means[:4] / means[3], ".-", label=f"depth {depth}")
        right.plot(depth, means[4], "o", color="C0")
    left.set(xlabel="sampling steps", ylabel="CLIP score, % of that with 50 steps")
    left.legend()
    right.set(xlabel="depth", ylabel="path length")
    write_atomically(file, lambda partial: figure.savefig(partial, dpi=100, format="png"))


def find_checkpoints(options):
    """The models that draw: those given, or those that fig8_table5_scaling.py left."""
    if options.checkpoints:
        return options.checkpoints
    found = sorted(file.parent.as_posix() for file in Path("runs/fig8").glob("*/model.safetensors"))
    if not found:
        raise ValueError("runs/fig8 holds no models; run experiments/fig8_table5_scaling.py first, "
                         "or name models with --checkpoints")
    budgets = set()
    for folder in found:
        trained = read_json(Path(folder, "config.json"), {"train": dict})["train"]
        budgets.add((trained.get("steps"), trained.get("batch_size")))
    if len(budgets) > 1:
        raise ValueError("runs/fig8 holds models of several commands, with other steps or batches; "
                         "remove it and run experiments/fig8_table5_scaling.py again")
    return found


def main(arguments=None):
    """Draw with every model, print Table 6 and the claims."""
    options = read_options(Options, __doc__.split("\n")[0], arguments, **PRESETS)
    checkpoints = find_checkpoints(options)
    averages = measure_all(checkpoints, options)
    samples = bootstrap(averages, options.seed)
    table, intervals = {}, {}
    for depth, numbers in averages.items():
        table[depth] = columns(numbers.mean(dim=1)).tolist()
        intervals[depth] = [interval(values) for values in samples[depth]]
    print("Table 6, depth   drop of the CLIP score at 5, 10, 20 of 50 steps, %   path length")
    for depth, row in table.items():
        print(f"ours, {depth:2}  ", *(f"{value:10.2f}" for value in row))
    for depth, row in PAPER.items():
        print(f"paper, {depth:2} ", *(f"{value:10.2f}" for value in row))
    rows = claims(table, samples)
    for row in rows:
        print(f"{row['verdict']}: {row['claim']} ({row['paper']}): {row['here']} {row['interval']}")
    record = {"command": shlex.join(["python", "experiments/table6_steps.py", *sys.argv[1:]]),
              "settings": asdict(options) | {"checkpoints": checkpoints}, "columns": COLUMNS,
              "table": table, "intervals": intervals, "paper": PAPER, "claims": rows}
    write_json(options.out, record)
    draw_figure(averages, Path(options.out).with_suffix(".png"))


if __name__ == "__main__":
    command(main)
