"""curve.py: what `python train.py` has learned after so many minutes.

Each point is a run of its own, from scratch, because the rate falls over the last 80 % of any run,
however long. Cached encodings are thrown away first, so that the minutes count everything.

Run         python bench/curve.py --minutes 2.5 5 10     writes results/curve.json and, from two
            points on, curve.png
"""

import argparse
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from checkpoints import portable
from devices import command
from geneval import GENEVAL_TASKS
from metrics import wilson
from options import write_atomically, write_json


def last(entries, name):
    """The newest value of this name in a log. ValueError if the run ended before there was one."""
    found = [entry[name] for entry in entries if entry.get(name) is not None]
    if not found:
        raise ValueError(f"the run was too short for a {name}; give more --minutes")
    return found[-1]


def train(minutes, folder):
    """One run of train.py, and what its log says at its end."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(folder.parent / "cache", ignore_errors=True)
    words = ["train.py", "--minutes", f"{minutes:g}", "--out", portable(folder)]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    lines = (folder / "log.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    scores = last(entries, "geneval")
    n = scores["n"] * len(GENEVAL_TASKS)
    return {
        "minutes": minutes,
        "command": " ".join(["python", *words]),
        "steps": entries[-1]["step"],
        "pictures": last(entries, "images_seen"),
        "validation": last(entries, "validation"),
        "strict": scores["overall"],
        "strict_interval": wilson(scores["overall"], n),
        "lax": scores["overall_lax"],
        "tasks": scores["strict"],
        "tasks_lax": scores["lax"],
        "prompts_per_task": scores["n"],
    }


def draw(points):
    """curve.png: the loss, and both scores, against minutes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    minutes = [point["minutes"] for point in points]
    left.plot(minutes, [point["validation"] for point in points], "o-", color="black")
    left.set(xlabel="minutes", ylabel="validation loss", xscale="log")
    for name, style in (("strict", "o-"), ("lax", "o--")):
        right.plot(minutes, [point[name] for point in points], style, color="black", label=name)
    right.set(xlabel="minutes", ylabel="six GenEval tasks", xscale="log", ylim=(0, None))
    right.legend(frameon=False)
    return figure


def main():
    """Train, read the logs, and write both files after each run."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--minutes", type=float, nargs="+", default=[2.5, 5, 10])
    parser.add_argument("--folder", default="runs/curve", help="holds the runs; is emptied")
    parser.add_argument("--out", default=str(ROOT / "results" / "curve.json"))
    options = parser.parse_args()
    points = []
    for minutes in sorted(options.minutes):
        folder = ROOT / options.folder / f"{minutes:g}-minutes"
        points.append(train(minutes, folder))
        write_json(options.out, {"points": points})
        if len(points) > 1:
            picture = Path(options.out).with_suffix(".png")
            write_atomically(picture, partial(draw(points).savefig, format="png", dpi=120))
    for point in points:
        print(f"{point['minutes']:g} minutes, {point['pictures']} pictures: validation "
              f"{point['validation']:.3f}, strict {point['strict']:.3f}, lax {point['lax']:.3f}")


if __name__ == "__main__":
    command(main)
