"""fig9_text_encoders.py: which text encoders does a trained model need? (SD3, Sec. 5.3.3, Fig. 9)

In training each encoder is set to zero with probability .464, so any subset of the three can be
used to sample. Here a trained model draws the same prompts from the same noise with every subset.

Tasks    the six of GenEval; the word task (spelling); "detailed": pairs of objects whose prompts
         tell colours, sizes, relation and background, all of which must be right
Differs  The paper has human votes on PartiPrompts for 8B parameters with T5-XXL. Here the score is
         exact, by pixels, and the encoders are those of the checkpoint.

Verdicts: a drop is the share that passes with all encoders minus the share without T5, over the
same prompts, with its paired 95 % interval. A claim that there is a drop holds if the interval is
above 0. The claim that the drop is small holds if the interval is below .1, and needs a model that
draws: with all encoders its share is at least .1 above that with none (the interval, too). "Did not
hold" has the interval on the other side.

Run   python experiments/fig9_text_encoders.py --quick                    the model that ships
      python experiments/fig9_text_encoders.py --full --checkpoint RUN    any model of scenes
"""

import math
import random
import shlex
import sys
import textwrap
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from checkpoints import SHIPPED, find_model_file, fingerprint, portable
from devices import command
from geneval import GENEVAL_TASKS, geneval_cases, score
from metrics import wilson
from options import check_options, option, read_options, write_atomically, write_json
from sample import generate, load
from scenes import HELD_OUT_SEED, PLAIN, caption
from text_encoders import ENCODERS

# Sec. 5.3.3: how often people chose the picture that was drawn without T5.
PAPER = {"aesthetics": 0.50, "prompt adherence": 0.46, "typography": 0.38}
WITHOUT = ((), ("t5",), ("clip_l",), ("clip_g",), ("clip_g", "t5"), ("clip_l", "t5"),
           ("clip_l", "clip_g"), ENCODERS)
DETAILS = ("color", "size", "relation", "background")
GROUPS = {"six tasks": GENEVAL_TASKS, "word": ("word",), "detailed": ("detailed",)}


@dataclass(frozen=True)
class Options:
    checkpoint: str = option(str(SHIPPED), "a run or model folder, trained on scenes")
    num_prompts: int = option(100, "prompts for each task", 2, 10**5)
    seed: int = option(HELD_OUT_SEED, "of prompts and noise", 0, 2**31)
    out: str = option(str(ROOT / "results" / "fig9_text_encoders.json"), "where the numbers go")

    def __post_init__(self):
        check_options(self)


QUICK = {"num_prompts": 40}
FULL = {"num_prompts": 500}


def make_cases(options, height, width):
    """The cases of the eight tasks, task after task."""
    cases, detailed = [], []
    for case in geneval_cases(options.num_prompts, options.seed, height, width):
        if case.task in (*GENEVAL_TASKS, "word"):
            cases.append(case)
        if case.task == "position":
            rng = random.Random(case.scene.wording)
            prompt = caption(case.scene, DETAILS, PLAIN, rng)
            detailed.append(replace(case, task="detailed", prompt=prompt, said=DETAILS))
    return cases + detailed


def draw_cases(pipeline, cases, without, options):
    """The pictures of all cases, and whether each shows what was asked for: (n,) bool."""
    prompts = [case.prompt for case in cases]
    pictures = generate(pipeline, prompts, options.seed, 64, without=without)
    passed = []
    for case, picture in zip(cases, pictures, strict=True):
        strict, _ = score(case, picture)
        passed.append(strict)
    return pictures, np.array(passed)


def paired_interval(first, second):
    """The mean of first - second over the same cases, both (n,), and its 95 % interval."""
    difference = first.astype(float) - second.astype(float)
    middle = difference.mean()
    reach = 1.96 * difference.std(ddof=1) / math.sqrt(len(difference))
    return middle, (middle - reach, middle + reach)


def judge(claim, paper, drop, interval, bounds, told=True):
    """A row of the claims table: does the interval lie within the bounds, or outside? told: False
    for a model that draws too little to tell."""
    low, high = interval
    verdict = "cannot be told"
    if told and bounds[0] < low and high < bounds[1]:
        verdict = "held"
    elif told and (high < bounds[0] or low > bounds[1]):
        verdict = "did not hold at this size"
    print(f"{verdict}: {claim}: {drop:+.3f}, from {low:+.3f} to {high:+.3f}; the paper: {paper}")
    return {"claim": claim, "paper": paper, "here": round(drop, 3),
            "interval": [round(low, 3), round(high, 3)], "verdict": verdict}


def in_group(cases, group):
    """Which cases belong to a group of tasks: (n,) bool."""
    return np.array([case.task in GROUPS[group] for case in cases])


def claims(cases, passed):
    """The claims table. passed: {name of a subset: (n,) bool}."""
    with_all, without_t5 = passed["all"], passed["no t5"]
    drops = {}
    for group in GROUPS:
        members = in_group(cases, group)
        drops[group] = paired_interval(with_all[members], without_t5[members])
    yes, small = (0, math.inf), (-math.inf, 0.1)
    members = in_group(cases, "six tasks")
    by_text = paired_interval(with_all[members], passed["none"][members])
    draws = by_text[1][0] > 0.1
    votes = "{:.0%} of the votes without T5"
    rows = [judge("T5 matters for spelling: drop of the word task without it",
                  votes.format(PAPER["typography"]), *drops["word"], yes),
            judge("T5 matters little otherwise: drop of the six tasks without it",
                  votes.format(PAPER["prompt adherence"]), *drops["six tasks"], small, draws),
            judge("T5 matters for prompts of many details: drop of the detailed task without it",
                  "Fig. 9, row 3", *drops["detailed"], yes)]
    least = None
    for name, shown in passed.items():
        if name not in ("all", "none"):
            found = paired_interval(shown, passed["none"])
            if least is None or found[0] < least[0]:
                least = found
    rows.append(judge("any subset draws better than no text at all: gain of the worst subset",
                      "any subset can be used", *least, yes))
    return rows


def shares(cases, passed):
    """{group or task: (share that passes, low, high)}; the interval is Wilson's."""
    found = {}
    tasks = np.array([case.task for case in cases])
    for task in (*GROUPS, *GENEVAL_TASKS):
        members = in_group(cases, task) if task in GROUPS else tasks == task
        share = passed[members].mean().item()
        found[task] = (share, *wilson(share, int(members.sum())))
    return found


def draw_figure(cases, pictures, table, file):
    """The groups by subset, and prompts with all encoders (above) and without T5 (below)."""
    from matplotlib.figure import Figure

    figure = Figure((13, 8), layout="constrained")
    upper, lower = figure.subfigures(2, 1)
    axis = upper.subplots()
    for number, group in enumerate(GROUPS):
        for place, row in enumerate(table.values()):
            share, low, high = row[group]
            axis.bar(place + 0.27 * number, share, 0.25, color=f"C{number}", label=group)
            axis.vlines(place + 0.27 * number, low, high, color="black", lw=1)
    axis.set_xticks(np.arange(len(table)) + 0.27, list(table))
    axis.set(title="share that passes, with 95 % intervals", ylim=(0, 1))
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[:: len(table)], labels[:: len(table)])
    count = len(cases) // 8
    shown = [count * task for task in range(6)] + [6 * count, 6 * count + 1, 7 * count]
    axes = lower.subplots(2, len(shown))
    for column, index in enumerate(shown):
        for row, name in enumerate(("all", "no t5")):
            axes[row, column].imshow(pictures[name][index])
            axes[row, column].set(xticks=[], yticks=[])
            axes[row, 0].set_ylabel(name)
        axes[0, column].set_title(textwrap.fill(cases[index].prompt, 20), fontsize=7)
    write_atomically(file, partial(figure.savefig, dpi=90, format="png"))


def main(arguments=None):
    """Draw with all subsets, score, compare."""
    options = read_options(Options, __doc__.split("\n")[0], arguments, quick=QUICK, full=FULL)
    pipeline = load(options.checkpoint)
    if pipeline.parts.missing:
        raise ValueError(f"{options.checkpoint} lacks {', '.join(pipeline.parts.missing)}; give a "
                         f"model with all three text encoders")
    cases = make_cases(options, pipeline.defaults["height"], pipeline.defaults["width"])
    pictures, passed, table = {}, {}, {}
    print("share that passes: " + ", ".join((*GROUPS, *GENEVAL_TASKS)))
    for without in WITHOUT:
        name = f"no {', '.join(without)}" if without else "all"
        name = "none" if without == ENCODERS else name
        pictures[name], passed[name] = draw_cases(pipeline, cases, without, options)
        table[name] = shares(cases, passed[name])
        print(f"{name:18}", *(f"{share:.3f}" for share, _, _ in table[name].values()), flush=True)
    rows = claims(cases, passed)
    settings = asdict(options) | {"checkpoint": portable(find_model_file(options.checkpoint))}
    del settings["out"]
    record = {"command": shlex.join(["python", "experiments/fig9_text_encoders.py", *sys.argv[1:]]),
              "settings": settings, "model": fingerprint(pipeline.parts.file),
              "sampling": pipeline.defaults, "paper": PAPER, "table": table, "claims": rows}
    write_json(options.out, record)
    draw_figure(cases, pictures, table, Path(options.out).with_suffix(".png"))


if __name__ == "__main__":
    command(main)
