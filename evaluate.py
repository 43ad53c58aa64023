"""evaluate.py: does it work, in numbers (SD3, arXiv:2403.03206v1, Sec. 5).

Read with   App. B.3 (losses by t), Tables 4 and 5 (GenEval), Table 6 (steps), Fig. 9 (`without`)
Not here    the rules of the score (geneval.py), CLIP score and FID (metrics.py), the page that
            shows it all (report.py), making pictures (sample.py)
Shapes      B batch   C latent channels   H W height, width of pictures in pixels
Run         python evaluate.py                  ground truth, and shuffled captions
            python evaluate.py runs/NAME        a model too; runs/NAME/report.html shows all of it
            python evaluate.py runs/NAME --num-steps 5 10 20 50 --guidance-scale 2.5 5    a grid
            python evaluate.py MODEL --prompts FILE --out FOLDER     pictures for a public scorer
"""

import argparse
import copy
import itertools
import math
import os
import shlex
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import flow
import sample
from checkpoints import run_encoders
from data import ImageFiles, from_tensor, to_tensor
from devices import autocast, command, pick_device
from geneval import (
    SPLITS, batch_size, controls, draw_prompts, format_scores, geneval, geneval_cases, read_prompts,
    success_rates)
from metrics import PictureMeasures
from options import (
    add_options, check_options, check_value, given_options, option, read_json, write_json)
from report import write_report
from run_folder import read_log
from scenes import HELD_OUT_SEED, Scenes


# ---- Losses by t (App. B.3) ----------------------------------------------------------------------
@torch.no_grad()
def assigned_losses(model, samples, precision, levels=8):
    """Losses at t = 0, 1/8, ... 7/8 as MLPerf's text-to-image benchmark takes them: (levels,).
    Differs from `flow.validate`: each sample is seen at a single level, here its number mod 8."""
    rows = []
    seen = 0
    for latent, context, pooled, noise in samples:
        level = torch.arange(seen, seen + len(latent)) % levels                  # (B,)
        seen += len(latent)
        t = (level / levels).to(latent)                                          # (B,)
        with autocast(latent.device, precision):
            rows.append(flow.rectified_flow_loss(model, latent, context, pooled, t, noise))
    losses = torch.cat(rows).cpu()
    means = []
    for level in range(levels):
        means.append(losses[level::levels].mean())
    return torch.stack(means)


@torch.no_grad()
def losses_by_level(pipeline, pictures, captions):
    """Losses of captioned pictures, with noise that is always the same. Both forms, by t and as a
    mean; the paper's mean leaves out t = 1."""
    rng = torch.Generator().manual_seed(0)
    height, width = np.asarray(pictures[0]).shape[:2]
    B = batch_size(height, width)
    samples = []
    for first in range(0, len(pictures), B):
        images = list(map(to_tensor, pictures[first : first + B]))
        image = torch.stack(images).to(pipeline.device)                          # (B, 3, H, W)
        with autocast(pipeline.device, pipeline.precision):
            latent = pipeline.vae.encode(image).float()                          # (B, C, H/8, W/8)
            context, pooled = pipeline.text(captions[first : first + B])
        noise = torch.randn(latent.shape, generator=rng).to(latent)
        samples.append((latent, context, pooled, noise))
    by_t = flow.validate(pipeline.mmdit, samples, pipeline.precision)
    mlperf = assigned_losses(pipeline.mmdit, samples, pipeline.precision)
    return {"validation": by_t[:-1].mean().item(), "validation_by_t": by_t.tolist(),
            "mlperf": mlperf.mean().item(), "mlperf_by_t": mlperf.tolist()}


# ---- A model's pictures with one or many settings (Table 6, Fig. 9) ------------------------------
@torch.no_grad()
def draw_paths(pipeline, prompts, seed, **settings):
    """What `sample.generate` draws, a list of PIL pictures, and path lengths (N,) from noise."""
    settings = sample.Settings(**pipeline.defaults | settings)
    shape = sample.latent_shape(pipeline, settings)
    B = batch_size(settings.height, settings.width)
    pictures = []
    lengths = []
    for first in tqdm(range(0, len(prompts), B), "drawing", leave=False):
        part = prompts[first : first + B]
        noise = torch.empty(len(part), *shape)                                   # (B, C, H/8, W/8)
        for i in range(len(part)):
            noise[i].normal_(generator=torch.Generator().manual_seed(seed + first + i))
        noise = noise.to(pipeline.device)
        context, pooled = sample.encode(pipeline, part, settings)
        with autocast(pipeline.device, pipeline.precision):
            latents, along = sample.sample_latents(pipeline.mmdit, context, pooled, noise, settings)
            images = pipeline.vae.decode(latents).float().cpu()                  # (B, 3, H, W)
        sample.check_finite(images)
        pictures += map(from_tensor, images)
        lengths.append(along.cpu())
    return pictures, torch.cat(lengths)


def measure_grid(pipeline, prompts, measure, seed, grid):
    """Yields the pictures of the prompts with each of the settings, and what `measure`, a
    PictureMeasures, says of them, with the mean path length of Table 6."""
    for settings in grid:
        settings = {"num_steps": pipeline.defaults["num_steps"], **settings}
        pictures, lengths = draw_paths(pipeline, prompts, seed, **settings)
        path_length = lengths.mean().item()
        yield pictures, {"settings": settings, **measure(pictures), "path_length": path_length}


def add_clip_drops(rows):
    """Table 6: by how many per cent a CLIP score is below that of the most steps, with all other
    settings equal."""
    for row in rows:
        alike = []
        for other in rows:
            num_steps = other["settings"]["num_steps"]
            if row["settings"] | {"num_steps": num_steps} == other["settings"]:
                alike.append((num_steps, other["clip_score"]))
        _, best = max(alike)
        row["clip_drop"] = 100 * (1 - row["clip_score"] / best)


# ---- Command line --------------------------------------------------------------------------------
@dataclass(frozen=True)
class Options:
    """What the command line takes beside the checkpoint, whose own settings hold if none are given.
    Lists of settings are combined: each combination is drawn and measured."""
    num_prompts: int = option(60, "prompts for each task", 1, 10**5)
    num_pictures: int = option(256, "for the losses, CLIP score, FID and KID", 8, 10**6)
    guidance_scale: tuple[float, ...] = option((), "one or more; none: the model's own", 0, 100)
    num_steps: tuple[int, ...] = option((), "of the solver, one or more", 1, 1000)
    timestep_shift: tuple[float, ...] = option((), "alpha of Eq. 23, one or more", 0.01, 100)
    without: tuple[str, ...] = option((), "encoders to leave out, for example none t5 clip_l+t5")
    height: int = option(0, "of the pictures in px; 0: the model's own, or 64", 0, 4096)
    width: int = option(0, "of the pictures in px; 0: the model's own, or 64", 0, 4096)
    seed: int = option(HELD_OUT_SEED, "of the prompts and the noise", 0, 2**31)
    data: str = option("", "captioned pictures to measure on, in place of scenes and GenEval")
    tower: str = option("", "folder or file of CLIP's image tower, if not beside the encoders")
    prompts: str = option("", "a file of prompts: only draw them, into the folder --out")
    per_prompt: int = option(4, "pictures of each of --prompts", 1, 1000)
    device: str = option("auto", "auto, cuda, mps or cpu")
    out: str = option("out/evaluation.json", "a file for all the numbers")

    __post_init__ = check_options

    def grid(self):
        """The combinations of settings that are asked for: a list of dicts."""
        choices = {}
        for name in ("guidance_scale", "num_steps", "timestep_shift"):
            if getattr(self, name):
                choices[name] = getattr(self, name)
        for text in self.without:
            left_out = () if text == "none" else tuple(text.split("+"))
            choices.setdefault("without", []).append(left_out)
        combinations = itertools.product(*choices.values())
        return [dict(zip(choices, values)) for values in combinations]


def load_model(checkpoint, options):
    """(Pipeline or None, the options with the size of the pictures). ValueError for settings that
    the model cannot draw with."""
    pipeline = None
    defaults = {"height": 64, "width": 64}
    if checkpoint is not None:
        pipeline = sample.load(checkpoint, options.device)
        defaults = pipeline.defaults
    for name in ("height", "width"):
        if getattr(options, name):
            defaults[name] = getattr(options, name)
    for chosen in options.grid():
        settings = sample.Settings(**defaults | chosen)
        if pipeline:
            sample.latent_shape(pipeline, settings)
    return pipeline, replace(options, height=defaults["height"], width=defaults["width"])


def check_out(options):
    """ValueError, before the work, for an --out that could not be written after it."""
    out = Path(options.out)
    try:
        if options.prompts:
            out.mkdir(parents=True, exist_ok=True)
            usable = not any(out.iterdir())
            tempfile.TemporaryFile(dir=out).close()
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            regular = out.is_file() and not out.is_symlink()           # A new file replaces it.
            usable = regular or not os.path.lexists(out)
            usable = usable and len(os.fsencode(out.name)) <= 200
            tempfile.TemporaryFile(dir=out.parent).close()
    except OSError:
        usable = False
    if not usable:
        kind = "an empty folder" if options.prompts else "the name of a file"
        raise ValueError(f"--out {options.out:.80} cannot be written; give {kind}")


def note(record, line):
    """Prints what was measured, and stores all of it. So it is kept when the program stops."""
    record["printed"].append(line)
    write_json(record["out"], record)
    print(line, flush=True)


def geneval_rows(pipeline, options):
    """Yields (name, success rates) of all controls and of the model with each of the settings. A
    single one is asked for all splits."""
    cases = geneval_cases(options.num_prompts, options.seed, options.height, options.width)
    for name, images, asked in controls(cases, pipeline):
        yield name, success_rates(asked, images)
    if pipeline is None:
        return
    grid = options.grid()
    untrained = replace(pipeline, mmdit=copy.deepcopy(pipeline.mmdit))
    untrained.mmdit.initialize(torch.Generator().manual_seed(0))
    yield "untrained", geneval(untrained, options.num_prompts, options.seed, **grid[0])
    for settings in grid:
        rates = geneval(pipeline, options.num_prompts, options.seed, **settings)
        yield f"model, {settings or SPLITS[0]}", rates
    if len(grid) == 1:
        for split in SPLITS[1:]:
            rates = geneval(pipeline, options.num_prompts, options.seed, split, **grid[0])
            yield f"model, {split}", rates


def sources(pipeline, options):
    """(unseen pictures, their captions, PictureMeasures of them, name and set of other pictures):
    those that a run was trained on, as far as they are scenes. With --data, all are from there."""
    folder = pipeline.parts.file.parent
    tower = options.tower or folder
    known, training = "scenes", Scenes(512)
    encoders = run_encoders(folder)
    if encoders:                                             # The folder is that of a run.
        tower = options.tower or encoders.parent
        config = read_json(folder / "config.json", {"train": dict})["train"]
        check_value(f"{folder / 'config.json'}: seed", config.get("seed"), int, 0, 2**31)
        if not config.get("data"):
            known, training = "training pictures", Scenes(512, config["seed"])
        elif not options.data:
            print(f"note: scenes are new to this model; {config['data']} trained it; see --data",
                  file=sys.stderr)
    unseen = Scenes(options.num_pictures, HELD_OUT_SEED)
    if options.data:
        unseen = training = ImageFiles(options.data)
        known = "pictures of --data"
    if len(unseen) < 8:
        raise ValueError(f"--data {options.data} holds {len(unseen)} pictures; give at least 8")
    pictures = []
    captions = []
    for index in range(min(options.num_pictures, len(unseen))):
        pictures.append(unseen.image(index, options.height, options.width))
        captions.append(unseen.captions(index)[-1])
    measure = PictureMeasures(pictures, captions, pipeline.text, tower, pipeline.device)
    return pictures, captions, measure, known, training


def measure_model(pipeline, options, record, pictures, captions, measure):
    """Losses, and the measures of all settings. Returns the pictures of the first settings."""
    record["losses"] = losses_by_level(pipeline, pictures, captions)
    kind = "pictures of --data" if options.data else "unseen pictures"
    for name, value in record["losses"].items():
        note(record, f"{name} loss of {len(pictures)} {kind}: {np.round(value, 4)}")
    first = []
    for drawn, row in measure_grid(pipeline, captions, measure, options.seed, options.grid()):
        first = first or drawn
        record["measures"].append(row)
        note(record, f"{row['settings']}: CLIP score {row['clip_score']:.4f} +- "
                     f"{1.96 * row['clip_error']:.4f} (95 %), FID {row['fid']:.3f}, KID "
                     f"{row['kid']:.4f}, path length {row['path_length']:.2f}")
    add_clip_drops(record["measures"])
    for row in record["measures"]:
        if len(record["measures"]) > 1:
            note(record, f"{row['settings']}: CLIP score {row['clip_drop']:.2f} % lower than with "
                         f"the most steps")
    return first


def measure_all(pipeline, options, record):
    """All of it: GenEval with its controls, losses, measures, the report."""
    if pipeline:
        pictures, captions, measure, known, training = sources(pipeline, options)
    if not options.data:
        print(f"{options.num_prompts} prompts a task, strict scores with 95 % intervals")
        for name, rates in geneval_rows(pipeline, options):
            record["rows"][name] = rates
            note(record, f"{name:32} {format_scores(rates)}")
    if pipeline is None:
        return
    drawn = measure_model(pipeline, options, record, pictures, captions, measure)
    file = Path(options.out).with_name("report.html")
    log = read_log(pipeline.parts.file.with_name("log.jsonl"), math.inf)
    if log:                                                  # It is a run.
        file = pipeline.parts.file.with_name("report.html")
    write_report(file, record, log, drawn[:64], captions, measure, known, training)
    print(f"{file} shows all of it")


def main():
    """Scores ground truth, the controls and a model; prints tables, writes JSON and a report."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("checkpoint", nargs="?", help="a model as for sample.py; none: no model")
    add_options(parser, Options)
    arguments = parser.parse_args()
    options = Options(**given_options(arguments, Options))
    pick_device(options.device)                              # ValueError, also without a model
    if options.prompts:
        prompts = read_prompts(options.prompts)
        if not arguments.checkpoint or len(options.grid()) > 1 or options.out.endswith(".json"):
            raise ValueError("--prompts takes a model, one value of each setting, and --out FOLDER")
    check_out(options)
    pipeline, options = load_model(arguments.checkpoint, options)
    about = {"command": shlex.join(["python", *sys.argv]), "checkpoint": arguments.checkpoint}
    record = about | asdict(options) | {"rows": {}, "measures": [], "printed": []}
    try:
        if options.prompts:
            draw_prompts(pipeline, prompts, options.out, options.per_prompt, options.seed,
                         **options.grid()[0])
        else:
            measure_all(pipeline, options, record)
    except KeyboardInterrupt:
        if options.prompts or record["printed"]:
            raise KeyboardInterrupt(f"{options.out} holds what was done until then") from None
        raise
    print(f"written to {options.out}")


if __name__ == "__main__":
    command(main)
