"""shipped.py: what README and the model card say of the shipped model, beside evaluate.py.

    example     README's own prompt with 16 seeds, strictly scored
    near        sixty ways in which people ask for things of the drawn world
                (pretrained/near_prompts.txt), strictly scored
    sizes       the six tasks at sizes other than 64 x 64 px
    samples     README's picture. Its rule: the first prompt of each task and split that asks for
                something else, in the order of geneval.py, seed 0. Nothing is chosen by eye

Run         python bench/shipped.py     writes results/shipped.json, results/samples.png
"""

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import sample
from checkpoints import SHIPPED
from data import read_lines
from devices import command
from geneval import SPLITS, Case, geneval_cases, score, success_rates
from metrics import wilson
from options import write_atomically, write_json
from scenes import BACKGROUNDS, RELATIONS, Scene, Thing, captioned_grid

EXAMPLE = "a red circle left of a blue square"
SIZES = ((64, 96), (96, 64), (128, 128))                   # height, width in px


def near_case(line: str) -> Case:
    """A line of near_prompts.txt: prompt | things | relation or background."""
    prompt, names, *rest = [part.strip() for part in line.split("|")]
    said, things = set(), []
    for name in names.split(","):
        color, shape = name.split()
        things.append(Thing(shape, color, "", 0, 0, 0))
        if color != "x":
            said.add("color")
    relation = background = ""
    for word in rest:
        if word in RELATIONS:
            relation = word
            said.add("relation")
        elif word in BACKGROUNDS:
            background = word
            said.add("background")
        else:
            raise ValueError(f"near_prompts.txt: {word!r} is no relation and no background")
    alike = len(things) > 1 and len({(thing.shape, thing.color) for thing in things}) == 1
    task = "counting" if alike else "near"
    scene = Scene("near", 64, 64, background, tuple(things), relation)
    return Case(task, prompt, scene, tuple(said))


def share(cases, pictures) -> dict:
    """How many pictures strictly show what is asked, with a 95 % interval, and which do not."""
    wrong = []
    for case, picture in zip(cases, pictures, strict=True):
        if not score(case, picture)[0]:
            wrong.append(case.prompt)
    right = 1 - len(wrong) / len(cases)
    return {"share": right, "n": len(cases), "interval": wilson(right, len(cases)), "wrong": wrong}


def draw(pipeline, cases, **settings):
    """A picture of each prompt. Picture i starts from the noise of seed i."""
    prompts = [case.prompt for case in cases]
    return sample.generate(pipeline, prompts, 0, 64, **settings)


def samples(pipeline):
    """README's picture."""
    prompts = []
    for split in SPLITS[:2]:
        asked = set()
        for case in geneval_cases(4, split=split):
            if case.task not in asked and case.prompt not in prompts:
                asked.add(case.task)
                prompts.append(case.prompt)
    pictures = sample.generate(pipeline, prompts, seed=0)
    return captioned_grid(pictures, prompts, 6)


def main():
    """Draw, score, and write both files."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--checkpoint", default=str(SHIPPED))
    parser.add_argument("--num-prompts", type=int, default=50, help="for each task of a size")
    parser.add_argument("--out", default=str(ROOT / "results" / "shipped.json"))
    options = parser.parse_args()
    pipeline = sample.load(options.checkpoint)
    record = {"command": shlex.join(["python", *sys.argv]), "sizes": {}}
    picture = samples(pipeline)
    file = Path(options.out).with_name("samples.png")
    write_atomically(file, partial(picture.save, format="PNG"))
    example = [near_case(f"{EXAMPLE} | red circle, blue square | left of")] * 16
    record["example"] = share(example, draw(pipeline, example))
    lines = read_lines(ROOT / "pretrained" / "near_prompts.txt")
    near = [near_case(line) for line in lines if line and not line.startswith("#")]
    record["near"] = share(near, draw(pipeline, near))
    for name in ("example", "near"):
        print(f"{name}: {record[name]['share']:.3f} of {record[name]['n']}")
        print(*record[name]["wrong"], sep="\n")
    for height, width in SIZES:
        cases = geneval_cases(options.num_prompts, height=height, width=width)
        rates = success_rates(cases, draw(pipeline, cases, height=height, width=width))
        record["sizes"][f"{height}x{width}"] = rates
        print(f"{height}x{width}: {rates['overall']:.3f}, lax {rates['overall_lax']:.3f}")
    write_json(options.out, record)
    print(f"written to {options.out} and {file}")


if __name__ == "__main__":
    command(main)
