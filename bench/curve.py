"""curve.py: what `python train.py` has learned after so many minutes, and with other settings.

Each point is a run of its own, from scratch, because the rate falls over the last 80 % of any run,
however long. The file keeps the results of other commands and of other processors. How many
pictures fit into the minutes depends on the processor, so its speed stands beside them.

Run         python bench/curve.py --minutes 2.5 5 10     writes results/curve.json and, for two or
            more lengths, curve.png. Cached encodings are thrown away before each run, so
            that the minutes count everything.
            python bench/curve.py --trials "--depth 3" "--lr 1e-3" --out results/trials.json
            compares settings. Cached encodings stay, so that all trials train equally long.
"""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from bench import matmul_peak
from checkpoints import portable
from devices import command
from geneval import GENEVAL_TASKS
from metrics import wilson
from options import read_json, write_atomically, write_json


def last(entries, name):
    """The newest value of this name in a log. ValueError if the run ended before there was one."""
    found = [entry[name] for entry in entries if entry.get(name) is not None]
    if not found:
        raise ValueError(f"the run was too short for a {name}; give more --minutes")
    return found[-1]


def train(minutes, settings, folder):
    """One run of train.py, and what its log says at its end. settings: more options."""
    shutil.rmtree(folder, ignore_errors=True)
    words = ["train.py", "--minutes", f"{minutes:g}", "--out", portable(folder), *settings]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    lines = (folder / "log.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    scores = last(entries, "geneval")
    n = scores["n"] * len(GENEVAL_TASKS)
    return {
        "minutes": minutes,
        "settings": shlex.join(settings),
        "command": shlex.join(["python", *words]),
        "threads": torch.get_num_threads(),
        "processor": torch.cpu.get_capabilities().get("cpu_name", ""),
        "matmul_peak_gflops": round(matmul_peak(torch.device("cpu"), torch.bfloat16) / 1e9),
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


def store(point, out):
    """Puts a point into the file, in place of an older one of the same command and processor.
    Returns all."""
    def source(run):
        return run["command"], run.get("processor", "")
    points = []
    if Path(out).exists():
        points = read_json(out, {"points": list})["points"]
    points = [other for other in points if source(other) != source(point)]
    points = sorted([*points, point], key=lambda point: point["minutes"])
    write_json(out, {"points": points})
    return points


def draw(points):
    """curve.png: the loss, and both scores, against minutes. points: of one processor."""
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
    parser.add_argument("--minutes", type=float, nargs="+", default=[10])
    parser.add_argument("--trials", nargs="*", default=[], help="options of train.py, in quotes")
    parser.add_argument("--folder", default="runs/curve", help="holds the runs; is emptied")
    parser.add_argument("--out", default=str(ROOT / "results" / "curve.json"))
    options = parser.parse_args()
    for minutes in sorted(options.minutes):
        for settings in options.trials or [""]:
            words = shlex.split(settings)
            name = re.sub(r"[^\w.]+", "-", f"{minutes:g}-minutes {settings}").strip("-")
            folder = ROOT / options.folder / name
            if not options.trials:
                shutil.rmtree(folder.parent / "cache", ignore_errors=True)
            point = train(minutes, words, folder)
            points = store(point, options.out)
            losses = f"validation {point['validation']:.3f}"
            scores = f"strict {point['strict']:.3f}, lax {point['lax']:.3f}"
            print(f"{name}: {point['pictures']} pictures, {losses}, {scores}", flush=True)
    points = [other for other in points if other.get("processor") == point["processor"]]
    if len(options.minutes) > 1:
        picture = Path(options.out).with_suffix(".png")
        write_atomically(picture, partial(draw(points).savefig, format="png", dpi=120))


if __name__ == "__main__":
    command(main)
