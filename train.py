"""train.py: one loop that trains everything (SD3, arXiv:2403.03206v1, Sec. 5.3, App. B.3 and E.1).

Read with   App. B.3: flow_loss is Eq. 19, 23 and 8, then train_step; fit is the loop
Not here    loss (flow.py), network (mmdit.py), pictures (data.py), processes (devices.py), the
            log and the checkpoints of a run (run_folder.py)
Run         python train.py     ten minutes on drawn scenes; torchrun ... for several processes
"""

import time
STARTED = time.time()                    # --minutes counts from here; importing torch takes seconds
import argparse
import copy
import math
import os
import sys
from collections import namedtuple
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch

import devices
from batches import Batches, SceneBatches
from checkpoints import (
    FROZEN, SHIPPED, find_model_file, fingerprint, load_components, portable, run_encoders)
from devices import World, pick_precision, whole
from encode import encoded
from flow import density, rectified_flow_loss, shift_time, validate
from geneval import format_scores, geneval
from mmdit import MMDiT, MMDiTConfig, count_parameters, load_weights, model_sizes
from options import add_options, check_options, check_value, given_options, option, read_json
from run_folder import Run, checkpoints_of, mean
from sample import Pipeline, generate
from scenes import HELD_OUT_SEED, captioned_grid, vocabulary

# "paper" is App. B.3 at 256 px. "tiny" is for minutes on two CPU cores.
PRESETS = {
    "paper": dict(optimizer="adamw", lr=1e-4, warmup_steps=1000, cooldown=0.0, ema=0.99,
                  ema_every=100, batch_size=1024, resolution=256, encoder_dropout=0.464),
    "tiny":  dict(optimizer="muon",  lr=1e-3, warmup_steps=0,    cooldown=0.8, ema=0.0,
                  ema_every=1,   batch_size=64,   resolution=64,  encoder_dropout=0.2),
}
# How a model that is trained here is sampled (App. B.3: no text is zeros).
SAMPLING = {"num_steps": 28, "guidance_scale": 2.5, "schedule": "shifted", "unconditional": "zeros"}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a run. The command line is made from it."""
    out: str = option("", "run folder; give only your own, because resuming unpickles its files")
    init: str = option("", "a model whose MM-DiT a new run starts from (fine-tuning)")
    data: str = option("", "captioned pictures, or the --out of encode.py; empty: drawn scenes")
    encoders: str = option(str(SHIPPED), "model with the frozen VAE and text encoders")
    num_scenes: int = option(-1, "scenes to encode; -1: enough; 0: new each step", -1, 10**8)
    resolution: int = option(64, "px per side, a multiple of 16", 16, 4096)
    buckets: bool = option(False, "also draw scenes of 2:3 and 3:2 (Sec. 5.3.2)")
    depth: int = option(4, "the size of MM-DiT; its width is 64 * depth (Sec. 4)", 1, 128)
    qk_norm: bool = option(True, "RMSNorm on queries and keys (Sec. 5.3.2)")
    minutes: float = option(10.0, "length of the run, everything included", 0.01, 1e6)
    steps: int = option(0, "optimizer steps; 0: as many as fit into the minutes", 0, 10**9)
    every: int = option(0, "steps between checkpoints; 0: a tenth of the run", 0, 10**9)
    batch_size: int = option(64, "samples per step, over all processes", 1, 10**6)
    accumulate: int = option(1, "parts of a batch that come one after the other", 1, 10**4)
    optimizer: str = option("muon", "muon: the matrices of blocks", choices=("adamw", "muon"))
    lr: float = option(1e-3, "AdamW's peak rate; Muon's is 16 times that", 1e-12, 1.0)
    warmup_steps: int = option(0, "steps with rising rate; 0: 3 % of the run", 0, 10**9)
    cooldown: float = option(0.8, "share of the run, at its end, with falling rate", 0.0, 1.0)
    ema: float = option(0.0, "decay of the average; 0: it remembers 3 % of the run", 0.0, 0.999999)
    ema_every: int = option(1, "steps between two updates of the average", 1, 10**6)
    encoder_dropout: float = option(0.2, "chance to zero each text encoder; paper: 0.464", 0.0, 1.0)
    full_captions: float = option(0.5, "share of full captions (Sec. 5.2.2)", 0.0, 1.0)
    density: str = option("lognorm(0, 1)", "of t; or uniform, mode(1.29), cosmap (Sec. 3.1)")
    timestep_shift: float = option(1.0, "alpha of Eq. 23; 3 at 1024 px", 0.01, 100.0)
    seed: int = option(0, "of weights, scenes, order, t and noise", 0, 2**31)
    device: str = option("auto", "cuda, mps or cpu; auto: the first that is there")
    precision: str = option("auto", "of matrix products", choices=("auto", "bf16", "fp32"))
    parallel: str = option("auto", "over processes", choices=("auto", "ddp", "fsdp", "hsdp"))
    recompute: bool = option(False, "compute the blocks' activations twice, to save memory")
    compile: bool = option(False, "torch.compile of each block; takes a minute to start")

    def __post_init__(self):
        check_options(self)
        density(self.density)                                    # Its ValueError names the choices.
        if self.resolution % 16:
            raise ValueError(f"--resolution {self.resolution} is no multiple of 16 px (VAE 8 x 2)")
        if self.buckets and (self.data or self.resolution % 32):
            raise ValueError("--buckets is for scenes of a multiple of 32 px; for your own "
                             "pictures, give it to encode.py")
        if self.seed == HELD_OUT_SEED:
            raise ValueError(f"--seed {self.seed} draws the scenes that score; choose another")


# --- The loss and one step ------------------------------------------------------------------------
def flow_loss(model, batch, density, timestep_shift):
    """The paper's loss of a batch: t from a density, shifted for the resolution. Returns (B,)."""
    t = density.quantile(batch.uniform).to(batch.latent.device)                    # (B,)  Eq. 19
    t = shift_time(t, timestep_shift)                                              # (B,)  Eq. 23
    return rectified_flow_loss(model, batch.latent, batch.context, batch.pooled, t, batch.noise)


def train_step(model, optimizers, loss, batch, config):
    """One update: losses (B,) and the gradient's norm. No weight changes if it is not finite."""
    device = next(model.parameters()).device
    precision = pick_precision(config.precision, device)
    parts = batch.split(config.accumulate) if config.accumulate > 1 else [batch]
    losses = []
    for part in parts:
        with devices.autocast(device, precision):
            losses.append(loss(model, part))                                       # (B / parts,)
        (losses[-1].mean() / len(parts)).backward()
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)).item()
    for optimizer in optimizers:
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
    return torch.cat(losses).detach(), norm


def make_optimizers(model, config):
    """AdamW (App. B.3), epsilon as in Sec. 5.3.2; or Muon for the attention and MLP matrices."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and "joint_blocks." in name and "adaLN" not in name
        if is_matrix and config.optimizer == "muon":
            matrices.append(parameter)
        else:
            others.append(parameter)
    eps = 1e-15 if config.qk_norm else 1e-8
    optimizers = [torch.optim.AdamW(others, config.lr, (0.9, 0.99), eps, fused=True)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, 16 * config.lr))
    return optimizers


def learning_rate(step, steps, config):
    """The share of the peak rate: linear warm-up, constant (App. B.3), linear cooldown to zero."""
    rise = (step + 1) / (config.warmup_steps or max(1, 0.03 * steps))
    fall = (steps - step) / max(1, config.cooldown * steps)
    return min(1, rise, fall)


@torch.no_grad()
def update_average(average, model, done, steps, config):
    """The fp32 average of the weights; with the paper's preset, decay .99 every 100 steps."""
    decay = config.ema or 1 - 1 / max(2, 0.03 * steps)
    if done % config.ema_every == 0:
        for ours, parameter in zip(average.parameters(), model.parameters(), strict=True):
            ours.lerp_(parameter, 1 - decay)


# --- The loop -------------------------------------------------------------------------------------
def fit(model, loss, batches, config, run):
    """Trains a model by loss(model, batch) -> (B,) on batches(step), and returns its average.
    KeyboardInterrupt if Ctrl-C stopped it, unless run.may_stop."""
    average = copy.deepcopy(model) if run.average is None else run.average
    average.requires_grad_(False)
    optimizers = make_optimizers(model, config)
    run.start(model, average, optimizers)
    network = run.world.wrap(model)
    with run.lock, run.bar, run.handlers:
        while run.done < run.steps and not run.stopping:
            share = learning_rate(run.done, run.steps, config)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = share * optimizer.defaults["lr"]
            batch = batches(run.done)
            losses, grad_norm = train_step(network, optimizers, loss, batch, config)
            run.count_step(model, grad_norm)
            update_average(average, model, run.done, run.steps, config)
            run.log_step(batch, losses, grad_norm)
            if run.due:
                run.save(model, average, optimizers)
                run.sample(average)
    if run.stopping and not run.may_stop:
        raise KeyboardInterrupt(f"{run.done} of {run.steps} steps are no result")
    return average


# --- A run of MM-DiT ------------------------------------------------------------------------------
# batches(step), and the Batches `unseen` to validate on; the data of both, EncodedFolders if not
# drawn for each step; the frozen networks; the new model's MMDiTConfig; the precision.
Inputs = namedtuple("Inputs", "batches unseen training held_out vae text sizes precision")


def read_inputs(config, world, start=None) -> Inputs:
    """Encodes what no earlier run has encoded, and opens it. start: the model of --init."""
    # Two CPU cores train on 6,000 to 11,000 pictures a minute.
    pictures = config.steps * config.batch_size or int(6400 * config.minutes)
    count = min(config.num_scenes, max(64, pictures))            # No more than the run needs.
    if config.num_scenes < 0:
        count = max(64, min(2**16, pictures // 4))               # Each comes four times or more.
    until = math.inf if config.steps else STARTED + 60 * config.minutes / 4
    training, held_out = encoded(config, world, count, until)
    config = replace(config, resolution=held_out.resolution)
    precision = pick_precision(config.precision, world.device)
    frozen = load_components(find_model_file(config.encoders), ("vae", "text"), precision)
    vae, text = frozen.vae.to(world.device), frozen.text.to(world.device)
    if training is None:
        batches = training = SceneBatches(vae, text, config, world)
    else:
        batches = Batches(training, vae.config, text.config, config, world)
    unseen = Batches(held_out, vae.config, text.config, config, world)
    sizes = model_sizes(config, vae.config, text.config, training.longest_side, start)
    return Inputs(batches, unseen, training, held_out, vae, text, sizes, precision)


def read_start(config):
    """The MM-DiT of --init. ValueError if it is a run with other frozen networks than this one."""
    start = load_components(config.init, ("mmdit",))
    theirs = run_encoders(start.file.parent)                     # None: it is no run
    if theirs and fingerprint(theirs, FROZEN) != fingerprint(config.encoders, FROZEN):
        raise ValueError(f"--init {config.init} has latents and texts of other networks; give "
                         f"--encoders {portable(theirs)}")
    return start.mmdit


def make_model(sizes, config, world, trained):
    """An MM-DiT without numbers yet, whole or as shards. Depth 38 is never whole on a GPU."""
    checkpoint = torch.utils.checkpoint.checkpoint
    with torch.device("meta"):
        model = MMDiT(sizes)
    blocks = model.joint_blocks if trained else ()
    for block in blocks:
        if config.compile:
            torch._dynamo.config.optimize_ddp = False            # DDP would cut blocks into pieces.
            block.forward = torch.compile(block.forward)
        if config.recompute:                                     # around what is compiled
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    world.shard(model, pick_precision(config.precision, world.device))
    return model.to_empty(device=world.device)


def make_models(sizes, config, world, start):
    """An MM-DiT with its first weights, and one for its average. start: the model of --init."""
    model = make_model(sizes, config, world, trained=True)
    average = make_model(sizes, config, world, trained=False)
    model.initialize(torch.Generator().manual_seed(config.seed), devices.assign)
    if start:
        load_weights(model, start, devices.assign)
    average.load_state_dict(model.state_dict())
    return model, average


def departures(config):
    """Where a run leaves the paper's numbers. (Sec. 5.3.3 has batches of 4096.)"""
    paper = PRESETS["paper"] | {"density": "lognorm(0, 1)"}
    ours = asdict(config)
    found = []
    for name in paper:
        if ours[name] != paper[name]:
            found.append(f"{name} {ours[name]} ({paper[name]})")
    return f"settings that are not the paper's (App. B.3): {', '.join(found) or 'none'}"


def read_config(arguments=None):
    """The TrainConfig of a new run, or of the run that --out goes on with."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_options(parser, TrainConfig)
    parser.add_argument("--preset", choices=PRESETS, help="paper is the default from depth 15 up")
    options = parser.parse_args(arguments)
    given = given_options(options, TrainConfig)
    for name in ("data", "init"):
        if given.get(name) and Path(given[name]).exists():
            given[name] = str(Path(given[name]).resolve())       # It holds in any working folder.
    folder = Path(given.get("out") or "runs/none")
    if checkpoints_of(folder):
        return resumed_config(folder, PRESETS.get(options.preset, {}) | given)
    names = {path.name for path in folder.glob("*") if path.suffix != ".partial"}
    if names - {"lock", "checkpoints"} and "config.json" not in names:
        raise ValueError(f"--out {folder} is no run folder; choose another")
    if "model.safetensors" in names and not any(folder.glob("checkpoints/*")):
        raise ValueError(f"--out {folder} has a model, but no checkpoints; choose another")
    default = "paper" if given.get("depth", 0) >= 15 else "tiny"
    return TrainConfig(**PRESETS[options.preset or default] | given)


def resumed_config(folder, given):
    """The TrainConfig of a run that goes on, changed where that does not make it another run."""
    stored = read_json(folder / "config.json", {"train": dict, "encoders": dict})
    try:
        for name in ("depth", "qk_norm", "optimizer", "resolution", "buckets", "seed", "batch_size",
                     "init"):
            if given.get(name, stored["train"][name]) != stored["train"][name]:
                raise ValueError(f"{name} {given[name]} cannot change within a run; change --out")
        proof = stored["encoders"]["fingerprint"]
        if "encoders" in given and fingerprint(given["encoders"], FROZEN) != proof:
            raise ValueError("--encoders cannot change within a run; change --out")
        given["encoders"] = str(run_encoders(folder))
        given["num_scenes"] = stored["train"]["num_scenes"]      # The same pictures come again.
        for name in ("data", "lr", "density", "timestep_shift"):
            before = stored["train"][name]
            if given.get(name, before) != before:
                print(f"note: {name} was {before}, now it is {given[name]}", file=sys.stderr)
        return TrainConfig(**stored["train"] | given)
    except (TypeError, KeyError) as problem:
        raise ValueError(f"{folder}/config.json is of another version: {problem}") from None


def sizes_of(folder):
    """The MMDiTConfig of the run in this folder. Some of it may come from --init."""
    file = folder / "config.json"
    model = read_json(file, {"model": dict})["model"]
    sizes = {}
    for item in fields(MMDiTConfig):
        sizes[item.name] = model.get(item.name)
        check_value(f"{file}: {item.name}", sizes[item.name], item.type)
    return MMDiTConfig(**sizes)


def pick_folder(config):
    """--out, or the first of runs/d4-1, runs/d4-2, ... that does not exist."""
    number = 1
    while Path(f"runs/d{config.depth}-{number}").exists():
        number += 1
    return Path(config.out or f"runs/d{config.depth}-{number}")


def report(average, step, pipeline, unseen, prompts):
    """For Run: the losses on unseen data, and a picture of each prompt from noise that stays."""
    levels = validate(average, unseen.validation(64), pipeline.precision)
    grid = captioned_grid(generate(pipeline, prompts, seed=1), prompts, 4)
    return {"validation": mean(levels[:-1]), "validation_by_t": levels.tolist()}, grid


def main(arguments=None):
    """A whole run, from pictures to the score."""
    config = read_config(arguments)
    if not config.out and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise ValueError("--max-restarts would start another run each time; give --out as well")
    world = World(config.device, config.parallel, count_parameters(MMDiTConfig(config.depth)))
    if world.parallel != "ddp" and config.optimizer == "muon":
        raise ValueError("Muon works on whole matrices: give --optimizer adamw or --parallel ddp")
    if config.batch_size % (world.size * config.accumulate):
        raise ValueError(f"--batch-size {config.batch_size} is no multiple of ranks x --accumulate")
    folder = world.same(pick_folder(config))
    folder.mkdir(parents=True, exist_ok=True)                    # It is tried before the work.
    goes_on = bool(checkpoints_of(folder))
    try:
        start = None
        if config.init and not goes_on:
            start = read_start(config)
        inputs = read_inputs(config, world, start)
    except BaseException:
        with suppress(OSError):
            folder.rmdir()                                       # If it is empty, it goes.
        raise
    size = inputs.training.resolution
    if goes_on and size != config.resolution:
        raise ValueError(f"--data has {size} px, but the run {config.resolution}; change --out")
    sizes = sizes_of(folder) if goes_on else inputs.sizes
    frozen = find_model_file(config.encoders)
    num_scenes = len(inputs.training)
    config = replace(config, num_scenes=num_scenes, encoders=portable(frozen), resolution=size,
                     precision="fp32" if inputs.precision == torch.float32 else "bf16")

    model, average = make_models(sizes, config, world, start)
    sampling = SAMPLING | {"timestep_shift": config.timestep_shift, "height": size, "width": size}
    pipeline = Pipeline(average, inputs.vae, inputs.text, sampling, world.device, inputs.precision)
    prompts = [inputs.held_out.captions(index)[0] for index in inputs.held_out.groups[0][:8]]
    encoders = {"path": config.encoders, "fingerprint": fingerprint(frozen, FROZEN)}
    words = () if config.data else sorted(vocabulary())
    t_density = density(config.density)
    def times(batch):
        return shift_time(t_density.quantile(batch.uniform), config.timestep_shift)    # (B,)

    run = Run(
        folder, config, world, times,
        report=partial(report, pipeline=pipeline, unseen=inputs.unseen, prompts=prompts),
        average=average,
        metadata={"sampling": sampling, "words": words, "sizes": inputs.training.sizes},
        about={"model": asdict(sizes), "encoders": encoders},
        began=STARTED,
        may_stop=True,
    )
    run.say(f"{count_parameters(sizes):,} parameters, "
            f"{world.size} {world.device} {inputs.precision} {world.parallel}")
    run.say(f"{num_scenes or 'new'} pictures of {size} px, and {len(inputs.held_out)} held out")
    run.say(departures(config))
    loss = partial(flow_loss, density=t_density, timestep_shift=config.timestep_shift)
    fit(model, loss, inputs.batches, config, run)
    conclude(run, pipeline, prompts[0])


def conclude(run, pipeline, prompt):
    """The score, if a run on scenes has none yet, and what to do next."""
    count = min(50, run.done // 20)                  # It takes less than a tenth of the training.
    scored = run.config.data or any("geneval" in entry for entry in run.entries)
    if count and not scored and not run.stopping:
        size = run.config.resolution
        scores = geneval(pipeline, count, height=size, width=size)
        run.log(geneval=scores, num_prompts=count)
        run.say(f"{format_scores(scores)}, {count} prompts for each task")
    ended = f"has done its {run.done} steps; to go on, give more --steps or --minutes"
    if run.stopping:
        ended = f"was stopped after {run.done} steps; python train.py --out {run.folder} goes on"
    run.say(f"{run.folder} {ended}. Next:\n"
            f'python sample.py --checkpoint {run.folder} --prompt "{prompt}"')
    run.world.close()


if __name__ == "__main__":
    devices.command(main)
