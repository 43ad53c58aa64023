"""fig15_editing.py: a text-to-image model becomes an editor (SD3, App. D, Fig. 15).

The latent of the source picture is put beside the noised latent, along the channels, before
patching. So the patch embedding gets C more input channels. Their weights begin at zero: before its
first step the editor is the base model. It is fine-tuned on drawn scenes whose right answer is
known: five kinds of edits by instruction, and inpainting, segmentation, colorization, deblurring
and pictures from outlines. No training task changes or adds a word. Fig. 15 shows such edits, so
two tasks with words are measured without training.

Differs   The paper fine-tunes 2B on photographs and shows pictures without a number. Its baseline,
          an SDXL editor that could not change text, is not here. InstructPix2Pix (Brooks et al.
          2023) drops text and source in training and guides with both. Here the text alone is
          dropped and guided. The source is always given.
Success   A picture succeeds if two things are true. It passes the strict score of geneval.py for
          all that can be said of the target. And its PSNR to the target is 20 dB or more at the
          pixels where source and target are equal. An added thing may stand anywhere in its half of
          the picture, so that half is left out. In the tasks of WHOLE every pixel counts.
Controls  The source itself as the answer; the base model, which gets the instruction and the same
          noise; the editor with the instruction of another edit of the task, which shows whether it
          reads. (Deblurring has one instruction only.) The target through the VAE shows what can
          be reached.

Verdicts: the gain is the share of successes minus that of the best control, with Newcombe's 95 %
interval for independent samples. A claim holds if the interval lies above .05. If not, it did not
hold if the interval ends below .1. There is one training, so the interval is about scenes alone.

Run   python experiments/fig15_editing.py --quick     eight minutes on one CPU core
      python experiments/fig15_editing.py --full      a GPU
"""

import copy
import random
import shlex
import sys
import tempfile
import textwrap
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageFilter

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from batches import Batch, to_unit
from checkpoints import SHIPPED, find_model_file, load_components, portable
from data import from_tensor, to_tensor
from devices import World, autocast, command
from flow import density
from geneval import Case, score
from metrics import psnr, wilson
from options import check_options, option, read_options, write_atomically, write_json
from recipe import Settings
from sample import encode, load, sample_latents
from scenes import (
    BACKGROUNDS, COLORS, HELD_OUT_SEED, OPPOSITE, PLACES, PLAIN, SHAPES, WORDS, Scene, caption,
    draw_scene, is_held_out, make_scene, pick)
from train import Run, TrainConfig, fit, flow_loss

DETAILS = ("color", "relation", "size", "background")      # what a full caption says
MIN_PSNR = 20.0                                            # dB, where nothing may change
GAINS = 0.05, 0.1               # A gain surely above the first holds, surely below the second not.
CLAIM = ("claim", "paper", "here", "interval", "verdict")
CONTROLS = ("source", "base", "editor, other text")
ANSWERS = ("editor", *CONTROLS, "target through the VAE")


@dataclass(frozen=True)
class Options:
    init: str = option(str(SHIPPED), "model that is fine-tuned, with its VAE and text encoders")
    num_pairs: int = option(16384, "pairs of pictures to train on", 10, 10**7)
    steps: int = option(4000, "training steps", 1, 10**8)
    batch_size: int = option(64, "pairs in a step", 1, 10**5)
    lr: float = option(5e-4, "AdamW's peak rate; Muon's is 16 times that", 1e-12, 1.0)
    density: str = option("lognorm(0, 1.6)", "of t, that of the shipped model")
    timestep_shift: float = option(2.0, "alpha of Eq. 23: high t decides the places", 0.01, 100.0)
    text_dropout: float = option(0.1, "chance that a sample has no instruction", 0.0, 1.0)
    num_cases: int = option(100, "held-out edits of each task", 1, 10**5)
    num_steps: int = option(28, "steps of the sampler", 1, 1000)
    guidance_scale: float = option(2.0, "towards the instruction; 1: off", 0.0, 100.0)
    seed: int = option(0, "of scenes, order, t and noise", 0, 2**31)
    device: str = option("auto", "cuda, mps or cpu")
    out: str = option(str(ROOT / "results" / "fig15_editing.json"), "where the numbers go")

    def __post_init__(self):
        check_options(self)
        density(self.density)                              # Its ValueError names the choices.
        if self.seed == HELD_OUT_SEED:
            raise ValueError(f"--seed {self.seed} draws the scenes that score; choose another")


QUICK = {"num_pairs": 3072, "steps": 380, "num_cases": 20, "num_steps": 16}
FULL = {"num_pairs": 65536, "steps": 10000, "batch_size": 256, "num_cases": 200}


# --- The model ------------------------------------------------------------------------------------

def widen(mmdit):
    """A copy of a model whose patch embedding takes 2 C channels: z_t, then the source. The new
    weights are zero, as in InstructPix2Pix."""
    model = copy.deepcopy(mmdit).requires_grad_(True)
    old = model.x_embedder.proj
    C = old.in_channels
    new = nn.Conv2d(2 * C, old.out_channels, old.kernel_size, old.stride).to(old.weight)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, :C] = old.weight
        new.bias.copy_(old.bias)
    model.x_embedder.proj = new
    return model


def edit_velocity(model, source, z, t, context, pooled):
    """The velocity at z (n B, C, H, W). source (B, C, H, W) serves all n copies; guidance has 2."""
    source = source.repeat(len(z) // len(source), 1, 1, 1)            # (n B, C, H, W)
    joined = torch.cat([z, source.to(z)], dim=1)                      # (n B, 2 C, H, W)
    return model(joined, t, context, pooled)                          # (n B, C, H, W)


def edit_loss(model, batch, density, timestep_shift):
    """The paper's loss, of a model that sees the source: (B,)."""
    velocity = partial(edit_velocity, model, batch.source)
    return flow_loss(velocity, batch, density, timestep_shift)


# --- The tasks ------------------------------------------------------------------------------------
# Each takes a scene and a generator and returns (instruction, source picture, scene of the target),
# or None if the scene does not suit. What stays keeps its place and size.

def pick_thing(scene, rng):
    """(its number, a thing) of a scene."""
    return pick(rng, list(enumerate(scene.things)))


def name_of(thing):
    return f"{thing.color} {thing.shape}"


def other(names, name, rng):
    """Another one of these names."""
    return pick(rng, [candidate for candidate in names if candidate != name])


def with_thing(scene, number, *things):
    """The scene with these things, one or none, in place of thing `number`."""
    return replace(scene, things=scene.things[:number] + things + scene.things[number + 1 :])


def change_color(scene, rng):
    number, thing = pick_thing(scene, rng)
    new = other(COLORS, thing.color, rng)
    form = pick(rng, ("make the {} {}", "change the color of the {} to {}"))
    target = with_thing(scene, number, replace(thing, color=new))
    return form.format(name_of(thing), new), draw_scene(scene), target


def change_shape(scene, rng):
    number, thing = pick_thing(scene, rng)
    new = other(SHAPES, thing.shape, rng)
    form = pick(rng, ("change the {} to a {}", "turn the {} into a {}"))
    target = with_thing(scene, number, replace(thing, shape=new))
    return form.format(name_of(thing), new), draw_scene(scene), target


def remove(scene, rng):
    number, thing = pick_thing(scene, rng)
    form = pick(rng, ("remove the {}", "erase the {}"))
    return form.format(name_of(thing)), draw_scene(scene), with_thing(scene, number)


def add(scene, rng):
    """The first thing is added beside the second one, or beside the word."""
    if not scene.relation:
        return None                                                   # It could stand anywhere.
    thing, *others = scene.things
    beside = name_of(others[0]) if others else "word"
    form = pick(rng, ("add a {} {} {} the {}", "put a {} {} {} the {}"))
    instruction = form.format(thing.size, name_of(thing), scene.relation, beside)
    return instruction, draw_scene(with_thing(scene, 0)), scene


def change_background(scene, rng):
    if scene.word:
        return None                                                   # Its ink changes as well.
    new = other(BACKGROUNDS, scene.background, rng)
    form = pick(rng, ("make the background {}", "change the background to {}"))
    return form.format(new), draw_scene(scene), replace(scene, background=new)


def inpaint(scene, rng):
    """A gray square hides one thing."""
    if scene.background == "gray":
        return None
    _, thing = pick_thing(scene, rng)
    source = draw_scene(scene)
    rows = slice(max(0, thing.top - 2), thing.top + thing.diameter + 2)
    columns = slice(max(0, thing.left - 2), thing.left + thing.diameter + 2)
    source[rows, columns] = 128
    return f"fill the gray square with a {thing.size} {name_of(thing)}", source, scene


def segment(scene, rng):
    """The named thing becomes white, on black."""
    _, thing = pick_thing(scene, rng)
    target = Scene("single", scene.height, scene.width, "black", (replace(thing, color="white"),))
    return f"segment the {name_of(thing)}", draw_scene(scene), target


def full_caption(scene):
    return caption(scene, DETAILS, PLAIN, random.Random(scene.wording))


def colorize(scene, rng):
    colors = [thing.color for thing in scene.things]
    if not colors or "pink" in colors:                                # Its gray scores as pink.
        return None
    gray = Image.fromarray(draw_scene(scene)).convert("L").convert("RGB")
    return f"colorize {full_caption(scene)}", np.asarray(gray), scene


def deblur(scene, rng):
    picture = Image.fromarray(draw_scene(scene))
    radius = scene.width / 16                                         # 4 px at 64 px
    return "deblur", np.asarray(picture.filter(ImageFilter.GaussianBlur(radius))), scene


def from_outlines(scene, rng):
    """White lines on black, where a pixel differs from the next one on the right or below."""
    picture = draw_scene(scene).astype(int)
    lines = np.zeros(picture.shape[:2], dtype=bool)
    lines[:, :-1] |= abs(np.diff(picture, axis=1)).max(axis=2) > 40
    lines[:-1] |= abs(np.diff(picture, axis=0)).max(axis=2) > 40
    source = np.repeat(np.uint8(255 * lines)[..., None], 3, axis=2)   # (H, W, 3)
    return full_caption(scene), source, scene


def change_word(scene, rng):
    """Two of the instructions of Fig. 15."""
    if not scene.word:
        return None
    new = other(WORDS, scene.word, rng)
    form = pick(rng, ("change the word to {}", "write {} instead"))
    return form.format(new), draw_scene(scene), replace(scene, word=new)


def add_word(scene, rng):
    """As "GO BIG OR GO UNET is written on the blackboard" of Fig. 15."""
    if not (scene.word and scene.things):
        return None
    form = pick(rng, ("write {} {} the {}", "the word {} is written {} the {}"))
    place = OPPOSITE[scene.relation]
    instruction = form.format(scene.word, place, name_of(scene.things[0]))
    return instruction, draw_scene(replace(scene, word="")), scene


FAMILIES = {
    "edits by instruction": {
        "color": change_color, "shape": change_shape, "remove": remove, "add": add,
        "background": change_background},
    "picture to picture": {
        "inpainting": inpaint, "segmentation": segment, "colorization": colorize,
        "deblurring": deblur, "outlines": from_outlines},
    "changing a word, zero-shot": {"change a word": change_word},
    "adding a word, zero-shot": {"add a word": add_word}}
TASKS = {}
for family in FAMILIES.values():
    TASKS |= family
TRAINED = (*FAMILIES["edits by instruction"], *FAMILIES["picture to picture"])
NAMING = ("color", "shape", "remove", "add", "inpainting", "segmentation")  # They name one thing.
WHOLE = ("segmentation", "colorization", "deblurring", "outlines")          # See "Success".


@dataclass(frozen=True)
class Edit:
    """A task and its right answer. Pictures are uint8 (H, W, 3)."""
    task: str
    instruction: str
    source: np.ndarray
    scene: Scene                # what the target shows
    kept: np.ndarray            # (H, W) bool: where the answer must equal the target

    @property
    def target(self):
        return draw_scene(self.scene)


def never_drawn(scene):
    """Is this a combination that training leaves out, or two things that look alike?"""
    shapes = [thing.shape for thing in scene.things]
    colors = [thing.color if thing.color in COLORS else "" for thing in scene.things]
    alike = scene.kind == "pair" and len(set(zip(shapes, colors))) < len(shapes)
    return alike or is_held_out(shapes, colors, scene.relation)


def make_edit(task, seed, index, size=64):
    """Edit `index` of a task, of the endless set `seed`."""
    rng = np.random.default_rng((seed, index, list(TASKS).index(task)))
    while True:
        scene = make_scene(seed, int(rng.integers(2**31)), size, size)
        if task in NAMING and (scene.kind == "count" or not scene.things):
            continue
        made = TASKS[task](scene, rng)
        if made is None or never_drawn(made[2]):
            continue
        instruction, source, target = made
        kept = (source == draw_scene(target)).all(axis=2)
        if task in WHOLE:
            kept[:] = True
        if task == "add":
            left, top, width, height = PLACES[scene.relation]
            rows = slice(int(top * size), int((top + height) * size))
            kept[rows, int(left * size) : int((left + width) * size)] = False
        return Edit(task, instruction, source, target, kept)


# --- Training -------------------------------------------------------------------------------------

@dataclass
class EditBatch(Batch):
    source: torch.Tensor        # (B, C, H, W), the latent of the picture that is edited


@torch.no_grad()
def to_latents(pictures, pipeline):
    """uint8 (H, W, 3) pictures -> latents (B, C, H/8, W/8) in fp32."""
    image = to_unit(torch.from_numpy(np.stack(pictures)), pipeline.device)
    with autocast(pipeline.device, pipeline.precision):
        return pipeline.vae.encode(image).float()


@torch.no_grad()
def encode_pairs(count, seed, pipeline):
    """{name: tensor on the CPU} of `count` training edits, encoded once as in App. E.1."""
    columns = {"latent": [], "source": [], "context": [], "pooled": []}
    for first in range(0, count, 64):
        edits = []
        for index in range(first, min(first + 64, count)):
            edits.append(make_edit(TRAINED[index % len(TRAINED)], seed, index))
        columns["latent"].append(to_latents([edit.target for edit in edits], pipeline).cpu())
        columns["source"].append(to_latents([edit.source for edit in edits], pipeline).cpu())
        with autocast(pipeline.device, pipeline.precision):
            context, pooled = pipeline.text([edit.instruction for edit in edits])
        columns["context"].append(context.half().cpu())
        columns["pooled"].append(pooled.float().cpu())
    return {name: torch.cat(parts) for name, parts in columns.items()}


def make_batch(step, pairs, options, device):
    """The EditBatch of a step: random pairs, some of them without a text, which is zeros."""
    B = options.batch_size
    rng = np.random.default_rng((options.seed, 2, step))
    rows = torch.from_numpy(rng.integers(len(pairs["latent"]), size=B))
    chosen = {name: tensor[rows].to(device).float() for name, tensor in pairs.items()}
    noise = torch.from_numpy(rng.standard_normal(chosen["latent"].shape, np.float32)).to(device)
    uniform = torch.from_numpy(rng.random(B, np.float32)).clamp(1e-6, 1 - 1e-6)
    dropped = torch.from_numpy(rng.random(B) < options.text_dropout).to(device)
    chosen["context"][dropped] = 0
    chosen["pooled"][dropped] = 0
    return EditBatch(**chosen, noise=noise, uniform=uniform)


def train(model, pairs, options, world):
    """The average of the weights of an editor that is trained."""
    config = TrainConfig(steps=options.steps, every=options.steps, batch_size=options.batch_size,
                         lr=options.lr, seed=options.seed, device=options.device)
    batches = partial(make_batch, pairs=pairs, options=options, device=world.device)
    loss = partial(edit_loss, density=density(options.density),
                   timestep_shift=options.timestep_shift)
    with tempfile.TemporaryDirectory() as folder:
        return fit(model, loss, batches, config, Run(Path(folder), config, world))


# --- Answers and their scores ---------------------------------------------------------------------

@torch.no_grad()
def answer(model, edits, pipeline, settings, together=32):
    """A picture of an editor for each edit. The noise of edit i is always the same."""
    pictures = []
    for first in range(0, len(edits), together):
        part = edits[first : first + together]
        source = to_latents([edit.source for edit in part], pipeline)
        context, pooled = encode(pipeline, [edit.instruction for edit in part], settings)
        noise = torch.empty(source.shape)
        for i in range(len(part)):
            noise[i].normal_(generator=torch.Generator().manual_seed(first + i))
        velocity = partial(edit_velocity, model, source)
        with autocast(pipeline.device, pipeline.precision):
            latents, _ = sample_latents(velocity, context, pooled, noise.to(source), settings)
            pictures += decode(latents, pipeline)
    return pictures


def decode(latents, pipeline):
    """latents (B, C, H/8, W/8) -> B PIL pictures."""
    return [from_tensor(image) for image in pipeline.vae.decode(latents).float()]


def exchange_texts(edits):
    """The edits, each with the instruction of the next one of its task that differs."""
    changed = []
    for i, edit in enumerate(edits):
        for other_edit in edits[i + 1 :] + edits[:i]:
            if other_edit.task == edit.task and other_edit.instruction != edit.instruction:
                edit = replace(edit, instruction=other_edit.instruction)
                break
        changed.append(edit)
    return changed


@torch.no_grad()
def through_vae(edits, pipeline):
    """The targets, encoded and decoded."""
    pictures = []
    with autocast(pipeline.device, pipeline.precision):
        for edit in edits:
            pictures += decode(to_latents([edit.target], pipeline), pipeline)
    return pictures


def succeeds(edit, picture):
    """(success, PSNR where it must equal the target), as the docstring of this file says."""
    said = ("color", "size", "background")
    if edit.scene.relation and len(edit.scene.things) == 2:
        said = (*said, "relation")
    strict, _ = score(Case(edit.task, edit.instruction, edit.scene, said), picture)
    kept = to_tensor(edit.target)[:, edit.kept]                       # (3, n)
    found = to_tensor(picture)[:, edit.kept]                          # (3, n)
    kept_psnr = psnr(kept[None, ..., None], found[None, ..., None]).item()
    return strict and kept_psnr >= MIN_PSNR, kept_psnr


def rates(edits, pictures):
    """{task: {"n", "rate", its "interval", "kept_psnr" in dB}} of the answers to some edits."""
    found = {task: [] for task in TASKS}
    for edit, picture in zip(edits, pictures, strict=True):
        found[edit.task].append(succeeds(edit, picture))
    table = {}
    for task, results in found.items():
        rate, kept_psnr = np.mean(results, axis=0).tolist()
        table[task] = {"n": len(results), "rate": rate, "interval": wilson(rate, len(results)),
                       "kept_psnr": round(kept_psnr, 2)}
    return table


# --- Verdicts, figure, command line ---------------------------------------------------------------

def gain(share, control, n):
    """The 95 % interval of the difference of two shares of n each (Newcombe 1998, method 10)."""
    low, high = wilson(share, n)
    control_low, control_high = wilson(control, n)
    down = ((share - low) ** 2 + (control_high - control) ** 2) ** 0.5
    up = ((high - share) ** 2 + (control - control_low) ** 2) ** 0.5
    return share - control - down, share - control + up


def judge(low, high):
    """The verdict on the interval of a gain."""
    if low > GAINS[0]:
        return "held"
    return "did not hold at this size" if high < GAINS[1] else "cannot be told"


def claims(found):
    """Rows of the claims table, one for each family. found: {answer: what `rates` returns}."""
    table = []
    for family, tasks in FAMILIES.items():
        shares = {}
        for name in ANSWERS:
            shares[name] = sum(found[name][task]["rate"] for task in tasks) / len(tasks)
        n = sum(found["editor"][task]["n"] for task in tasks)
        best = max(shares[name] for name in CONTROLS)
        low, high = gain(shares["editor"], best, n)
        paper = "App. D: the same method is applicable"
        if "zero-shot" in family:
            paper = "Fig. 15: pictures, no number"
        here = f"{shares['editor']:.3f} of {n}; the best control {best:.3f}"
        row = (f"{family}: the editor succeeds more often than the controls", paper, here,
               [round(low, 3), round(high, 3)], judge(low, high))
        table.append(dict(zip(CLAIM, row, strict=True)))
    return table


def print_table(found):
    """Success of every task and answer, and the PSNR of what the editor must keep."""
    print(f"{'':16}" + "".join(f"{name:>24}" for name in ANSWERS) + "   editor keeps")
    for task in TASKS:
        cells = []
        for name in ANSWERS:
            low, high = found[name][task]["interval"]
            cells.append(f"{found[name][task]['rate']:.2f} ({low:.2f}-{high:.2f})")
        kept = f"{found['editor'][task]['kept_psnr']:.1f} dB"
        print(f"{task:16}" + "".join(f"{cell:>24}" for cell in cells) + f"{kept:>15}")


def draw_figure(edits, pictures, found, file):
    """Source, result and target of the first edit of every task, three tasks in a row."""
    from matplotlib.figure import Figure

    figure = Figure((11, 7), layout="constrained")
    grid = figure.subplots(4, 9)
    each = len(edits) // len(TASKS)
    for axes, number in zip(grid.reshape(-1, 3), range(0, len(edits), each), strict=True):
        edit = edits[number]
        for axis, picture in zip(axes, (edit.source, pictures[number], edit.target), strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        title = f"{edit.task}, {found[edit.task]['rate']:.2f} succeed"
        axes[1].set_title(f"{title}\n{textwrap.fill(edit.instruction, 56)}", fontsize=7)
    for axis, name in zip(grid[-1], 3 * ("source", "result", "target"), strict=True):
        axis.set_xlabel(name, fontsize=7)
    save = partial(figure.savefig, dpi=72, format="png", pil_kwargs={"optimize": True})
    write_atomically(file, save)


def main(arguments=None):
    """Fine-tunes the model, scores its edits and those of the controls, and judges the claims."""
    options = read_options(Options, __doc__.split("\n")[0], arguments, quick=QUICK, full=FULL)
    world = World(options.device)
    pipeline = load(options.init, options.device, networks=("vae", "text"))
    if pipeline.parts.sizes and "64x64" not in pipeline.parts.sizes:
        raise ValueError(f"--init {options.init} has not seen 64x64 px; give a model that has")
    base = load_components(options.init, ("mmdit",)).mmdit            # in fp32, to be trained
    settings = Settings(**pipeline.defaults | {
        "num_steps": options.num_steps, "guidance_scale": options.guidance_scale,
        "unconditional": "zeros", "height": 64, "width": 64, "skip_layers": ()})
    pairs = encode_pairs(options.num_pairs, options.seed, pipeline)
    edits = []
    for task in TASKS:
        edits += [make_edit(task, HELD_OUT_SEED, index) for index in range(options.num_cases)]
    model = widen(base).to(world.device)
    pictures = {
        "base": answer(model, edits, pipeline, settings),            # It does not see the source.
        "source": [edit.source for edit in edits],
        "target through the VAE": through_vae(edits, pipeline)}
    editor = train(model, pairs, options, world)
    pictures["editor"] = answer(editor, edits, pipeline, settings)
    pictures["editor, other text"] = answer(editor, exchange_texts(edits), pipeline, settings)
    found = {name: rates(edits, pictures[name]) for name in ANSWERS}
    print_table(found)
    table = claims(found)
    for row in table:
        print(f"{row['verdict']}: {row['claim']}; here {row['here']}, gain from "
              f"{row['interval'][0]} to {row['interval'][1]} ({row['paper']})")
    stored = asdict(options) | {"init": portable(find_model_file(options.init))}
    del stored["out"]
    record = {"command": shlex.join(["python", "experiments/fig15_editing.py", *sys.argv[1:]]),
              "settings": stored, "images_seen": options.steps * options.batch_size,
              "device": str(world.device), "threads": torch.get_num_threads(),
              "tasks": found, "claims": table}
    write_json(options.out, record)
    draw_figure(edits, pictures["editor"], found["editor"], Path(options.out).with_suffix(".png"))


if __name__ == "__main__":
    command(main)
