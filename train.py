"""train.py: the training loop (SD3, arXiv:2403.03206v1, Sec. 5, App. B.3 and E.1), on one CPU, one GPU or many.

Read with   App. B.3 (AdamW, warm-up, EMA, dropping of text encoders, validation by level of t), App. E.1 (latents once)
Not here    the loss (flow.py), the network (mmdit.py), pictures (data.py), the sampler (sample.py)
Randomness  every draw is keyed by (seed, step, index in the global batch): how a run is split over processes or where it
            was resumed does not change it
Shapes      B samples of this process   C latent channels   H W latent height, width
Run         python train.py                                     scenes, 10 minutes, whatever device there is
            python train.py --data PATH --resolution 128        your own captioned pictures
            torchrun --nproc_per_node 2 train.py                the same run on two processes
"""

import argparse
import copy
import dataclasses
import json
import math
import os
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from PIL import Image, ImageDraw
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from tqdm import tqdm

from checkpoints import CheckpointError, find_model_file, fingerprint, load_components, save_networks, write_atomically
from data import ImageFiles, Scenes, captioned_grid, readable, to_tensor
from evaluate import format_scores, geneval
from flow import LogitNormal, RectifiedFlow, Shifted
from mmdit import MMDiT, MMDiTConfig, count_parameters
from sample import Pipeline, generate, pick_device, pick_precision
from text_encoders import drop_encoders
from vae import sample_code

FIXED_PROMPTS = ("a red circle", "a blue square and a yellow star", "three green hearts", "a purple ring above a pink cross",
                 "a large orange triangle on a navy background", "two cyan diamonds on a gray background",
                 "a yellow circle left of a red square", "the word CAT")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a run; the command line is made from it."""
    out: str = ""                      # run folder; empty: the first free runs/dDEPTH-N
    resume: str = ""                   # a run folder to go on with; other options then change that run's settings
    data: str = ""                     # folder, .tar, .jsonl or .csv with captioned pictures; empty: built-in scenes
    encoders: str = "pretrained/tiny"  # checkpoint with the frozen VAE and text encoders
    num_scenes: int = 16384            # built-in scenes to draw and encode in advance
    resolution: int = 0                # px per side; 0: 64 for small models, 256 from depth 15 up
    depth: int = 4                     # the size of MM-DiT: width 64 * depth, depth heads (Sec. 4)
    qk_norm: bool = True               # RMSNorm on queries and keys (Sec. 5.3.2)
    weight_sets: int = 2               # 3: CLIP tokens, T5 tokens and image tokens each have their own (Sec. 5.2.3)
    minutes: float = 10.0              # length of the run, everything included; ignored where steps is given
    steps: int = 0                     # optimizer steps; 0: as many as fit in the minutes
    batch_size: int = 128              # samples per step over all processes
    accumulate: int = 1                # parts that a process splits its share of the batch into, to save memory
    lr: float = 1e-3                   # AdamW; the paper's 1e-4 belongs to wide models and batch 1024 (App. B.3)
    warmup: float = 0.03               # share of the run with rising learning rate
    cooldown: float = 0.4              # share of the run, at its end, with falling learning rate
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema: float = 0.03                  # memory of the averaged weights, as a share of the run
    encoder_dropout: float = 0.464     # each text encoder's chance to be zeroed (App. B.3)
    full_captions: float = 0.5         # share of full ("synthetic") captions where there are two kinds (Sec. 5.2.2)
    logit_mean: float = 0.0            # m and s of Eq. 19
    logit_std: float = 1.0
    shift: float = 1.0                 # alpha of Eq. 23, in training and in the sampling defaults
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"            # auto, bf16 (autocast) or fp32
    log_every: int = 20                # steps
    sample_every: float = 0.2          # share of the run between sample grids and validations
    save_every: float = 0.1            # share of the run between checkpoints
    num_prompts: int = 50              # per task of the six-task score at the end; 0: no score


# ------------------------------------------------------------------------------------------------------------
# Many processes: the only part that knows of them
# ------------------------------------------------------------------------------------------------------------

class World:
    """This process among all of them: rank 0 of 1 unless torchrun started us."""

    def __init__(self, device: str):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.device = pick_device(device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        if self.size > 1:
            torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def wrap(self, model):
        """Data-parallel: gradients are averaged inside backward()."""
        return nn.parallel.DistributedDataParallel(model) if self.size > 1 else model

    def gather(self, values):
        """(n,) of this process -> (size * n,) of all, in the order of the global batch."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        torch.distributed.all_gather(parts, values)
        return torch.cat(parts)

    def same(self, value):
        """Rank 0's value, on every rank."""
        box = [value]
        if self.size > 1:
            torch.distributed.broadcast_object_list(box)
        return box[0]

    def close(self):
        if self.size > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------
# Data: pictures to latents, once (App. E.1)
# ------------------------------------------------------------------------------------------------------------

class EncodedImages:
    """The latents' means and log-variances of a whole source in fp16, and its captions.

    Pictures are encoded in fixed groups of 64, so that the numbers do not depend on batches or processes.
    """

    def __init__(self, source, vae, resolution: int, device, autocast, quiet: bool):
        self.moments, self.captions = [], []
        pending = []

        def flush():
            image = torch.stack([to_tensor(picture) for picture in pending]).to(device)
            with torch.no_grad(), autocast():
                self.moments.append(torch.cat(vae.encode_moments(image), dim=1).half().cpu())     # (64, 2C, H, W)
            pending.clear()

        for _, picture, captions in tqdm(readable(source, resolution, resolution), total=len(source), disable=quiet,
                                         desc="encoding pictures", unit="image", leave=False):
            pending.append(picture)
            self.captions.append(captions)
            if len(pending) == 64:
                flush()
        if pending:
            flush()
        self.moments = torch.cat(self.moments)                                                    # (N, 2C, H, W)

    def __len__(self):
        return len(self.captions)


@dataclass
class Batch:
    """This process's share of one step, on its device."""
    latent: torch.Tensor        # (B, C, H, W) clean, sampled from the VAE's Gaussian
    context: torch.Tensor       # (B, L, context_dim)
    pooled: torch.Tensor        # (B, pooled_dim)
    noise: torch.Tensor         # (B, C, H, W)
    uniform: torch.Tensor       # (B,) in (0, 1): becomes t through the density's quantile


class Batches:
    """The global batch of any step, or this process's share of it, from (seed, step, index) alone."""

    def __init__(self, images: EncodedImages, vae, text, config: TrainConfig, world: World, autocast):
        self.images, self.vae, self.text, self.config, self.world = images, vae, text, config, world
        self.autocast = autocast
        self.order = {}                                                                # epoch -> permutation

    def index(self, count: int) -> int:
        """Which picture is sample number `count` of the run: every epoch is a new permutation."""
        epoch, place = divmod(count, len(self.images))
        if epoch not in self.order:
            self.order = {epoch: np.random.default_rng((self.config.seed, 1, epoch)).permutation(len(self.images))}
        return int(self.order[epoch][place])

    def __call__(self, step: int) -> Batch:
        config, world = self.config, self.world
        share = config.batch_size // world.size
        numbers = range(world.rank * share, (world.rank + 1) * share)                 # indices in the global batch
        indices = [self.index(step * config.batch_size + i) for i in numbers]
        moments = self.images.moments[indices].float()                                # (B, 2C, H, W)
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        captions, draws, code_noise, noise = [], [], [], []
        for number, index in zip(numbers, indices):
            rng = np.random.default_rng((config.seed, 2, step, number))
            draws.append(rng.random(5))                                               # t, caption, three encoders
            noise.append(rng.standard_normal(shape, dtype=np.float32))
            code_noise.append(rng.standard_normal(shape, dtype=np.float32))
            captions.append(pick_caption(self.images.captions[index], draws[-1][1], config.full_captions))
        draws = torch.from_numpy(np.stack(draws)).float()                             # (B, 5)
        mean, logvar = moments.chunk(2, dim=1)
        latent = self.vae.normalize(sample_code(mean, logvar, torch.from_numpy(np.stack(code_noise))))
        with self.autocast():
            context, pooled = self.text(captions)
        keep = (draws[:, 2:] >= config.encoder_dropout).to(world.device)
        context, pooled = drop_encoders(context, pooled, keep, self.text.config)
        to_device = lambda x: x.to(world.device, non_blocking=True)
        return Batch(to_device(latent), context, pooled, to_device(torch.from_numpy(np.stack(noise))),
                     to_device(draws[:, 0].clamp(1e-6, 1 - 1e-6)))


def pick_caption(captions, draw: float, full_share: float) -> str:
    """(original, full) are mixed by `full_share` (Sec. 5.2.2); any other number of captions is drawn from evenly."""
    if len(captions) == 2:
        return captions[int(draw < full_share)]
    return captions[int(draw * len(captions))]


# ------------------------------------------------------------------------------------------------------------
# One step
# ------------------------------------------------------------------------------------------------------------

def train_step(model, optimizer, batch: Batch, formulation, config: TrainConfig, autocast):
    """One update from this process's share of the batch. Nothing here knows how many processes exist: the data-parallel
    wrapper averages gradients inside backward(), and every random number was drawn in `Batches`.

    Returns loss (B,), t (B,), the gradient's norm before clipping; a non-finite norm skips the update.
    """
    t = formulation.density.quantile(batch.uniform)                                   # (B,)  Eq. 19
    losses = []
    parts = [part.chunk(config.accumulate) for part in (batch.latent, batch.context, batch.pooled, t, batch.noise)]
    for i, (latent, context, pooled, t_part, noise) in enumerate(zip(*parts)):
        last = i == config.accumulate - 1
        with nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync(), autocast():
            loss = formulation.loss(model, latent, context, pooled, t_part, noise)    # (B / accumulate,)
            (loss.sum() / len(t)).backward()
        losses.append(loss.detach())
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    if torch.isfinite(grad_norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.cat(losses), t, grad_norm


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Linear warm-up, constant, linear cool-down to zero, in shares of the run."""
    rise = (step + 1) / max(1, config.warmup * steps)
    fall = (steps - step) / max(1, config.cooldown * steps)
    return config.lr * min(1.0, rise, fall)


@torch.no_grad()
def update_average(average, model, step: int, steps: int, config: TrainConfig):
    """EMA in fp32, with a memory of `config.ema` of the run (the paper's 0.99 every 100 steps belongs to long runs)."""
    decay = min(1 - 1 / max(2.0, config.ema * steps), (step + 1) / (step + 10))
    torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in model.parameters()], 1 - decay)


@torch.no_grad()
def validate(model, batches: Batches, formulation, autocast, levels: int = 8, count: int = 64):
    """Loss at equally spaced t in [0, 1] (App. B.3), on the same pictures, captions and noise every time: (levels,)."""
    device, losses = batches.world.device, []
    count = min(count, len(batches.images))
    moments = batches.images.moments[:count].float()
    mean, _ = moments.chunk(2, dim=1)
    latent = batches.vae.normalize(mean).to(device)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(batches.config.seed)).to(device)
    with autocast():
        context, pooled = batches.text([captions[-1] for captions in batches.images.captions[:count]])
        for t in torch.linspace(0, 1, levels):
            loss = formulation.loss(model, latent, context, pooled, t.expand(count).to(device), noise)
            losses.append(loss.mean())
    return torch.stack(losses).cpu()


# ------------------------------------------------------------------------------------------------------------
# The run folder
# ------------------------------------------------------------------------------------------------------------

class Run:
    """runs/NAME: config.json, log.jsonl, loss.png, samples-STEP.png, model.safetensors (EMA), checkpoints/STEP."""

    def __init__(self, folder: Path, config: dict, resume: bool):
        self.folder, self.config = folder, config
        if not resume:
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                raise ValueError(f"{folder} exists already; go on with it by --resume {folder}, or choose another --out") from None
        write_atomically(folder / "config.json", lambda file: file.write_text(json.dumps(config, indent=1)))

    def log(self, **entry):
        """One line of log.jsonl."""
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")

    def save(self, state: dict, step: int, average: MMDiT, sampling: dict):
        """checkpoints/STEP to resume from (the last two are kept) and model.safetensors, each under a temporary name first."""
        target = self.folder / "checkpoints" / f"{step:08}"
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            dcp.save(state, checkpoint_id=partial, no_dist=True)
            shutil.rmtree(target, ignore_errors=True)
            partial.rename(target)
        except Exception as problem:                                              # a full disk shows as several types
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(f"could not save {target} ({problem}); the last good checkpoint is untouched. "
                          f"Free some space and go on with --resume {self.folder}") from None
        save_networks(self.folder / "model.safetensors", {"mmdit": average}, sampling=sampling)
        for old in sorted(target.parent.glob("[0-9]*"))[:-2]:
            shutil.rmtree(old, ignore_errors=True)


def last_checkpoint(folder: Path) -> Path:
    """The newest whole checkpoint of a run."""
    found = sorted(p for p in (folder / "checkpoints").glob("[0-9]*") if not p.name.endswith(".partial"))
    if not found:
        raise ValueError(f"{folder} has no checkpoint to resume from; start a new run without --resume")
    return found[-1]


def draw_losses(log: list[dict], size=(720, 440)) -> Image.Image:
    """log lines -> a picture of the loss over steps: the mean (black) and every tenth of t (blue near data to red near
    noise), with their last values."""
    entries = [entry for entry in log if "loss" in entry]
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = 50, 16, size[0] - 120, size[1] - 30
    values = [v for entry in entries for v in [entry["loss"], *entry["loss_by_t"]] if v]
    low, high = math.log(max(min(values), 1e-3)), math.log(max(values) * 1.05)
    last_step = max(entry["step"] for entry in entries)
    place = lambda step, loss: (left + (right - left) * step / last_step,
                                bottom - (bottom - top) * (math.log(max(loss, 1e-3)) - low) / (high - low))
    draw.rectangle((left, top, right, bottom), outline="gray")
    for tick in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5):
        if low < math.log(tick) < high:
            y = place(0, tick)[1]
            draw.line((left, y, right, y), fill="#dddddd")
            draw.text((left - 6, y), f"{tick:g}", fill="black", anchor="rm")
    for i in range(11):
        color = "black" if i == 10 else (round(28 * i), 60, round(255 - 28 * i))
        points = [(entry["step"], entry["loss"] if i == 10 else entry["loss_by_t"][i]) for entry in entries]
        points = [(step, value) for step, value in points if value]
        if points:
            draw.line([place(*point) for point in points], fill=color, width=3 if i == 10 else 1)
            label = "mean" if i == 10 else f"t {i / 10:.1f}-{(i + 1) / 10:.1f}"
            draw.text((right + 8, top + 12 + 16 * i), f"{label}  {points[-1][1]:.3f}", fill=color)
    draw.text((left, bottom + 16), "0", fill="black", anchor="mm")
    draw.text((right, bottom + 16), f"step {last_step}", fill="black", anchor="rm")
    draw.text((left + 6, top + 10), "loss, log scale", fill="gray")
    return image


# ------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------

def parse_config() -> TrainConfig:
    """TrainConfig from the command line; with --resume, what is not given comes from the run's config.json."""
    parser = argparse.ArgumentParser(description="Train MM-DiT with rectified flow.", allow_abbrev=False)
    for field in dataclasses.fields(TrainConfig):
        kind = (lambda text: text.lower() in ("1", "true", "yes")) if field.type is bool else field.type
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, default=None, help=f"default {field.default!r}")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    if "resume" in given:
        file = Path(given["resume"]) / "config.json"
        if not file.is_file():
            parser.error(f"--resume {given['resume']}: no config.json there; give the folder of a run")
        stored = json.loads(file.read_text())["train"]
        fixed = [name for name in ("depth", "qk_norm", "weight_sets", "resolution", "encoders", "seed", "batch_size")
                 if name in given and given[name] != stored[name]]
        if fixed:
            parser.error(f"--{fixed[0].replace('_', '-')} {given[fixed[0]]} differs from {stored[fixed[0]]}, with which "
                         f"{given['resume']} was started; it cannot change within a run")
        given = {**stored, **given, "out": given["resume"]}
    return complete(TrainConfig(**given))


def complete(config: TrainConfig) -> TrainConfig:
    """Fill in what depends on other settings, and refuse what cannot work."""
    resolution = config.resolution or (64 if config.depth < 15 else 256)
    if resolution % 16:
        raise ValueError(f"--resolution {resolution} is not a multiple of 16 px (VAE factor 8 x patch 2)")
    if config.depth < 1 or config.weight_sets not in (2, 3):
        raise ValueError(f"--depth {config.depth} --weight-sets {config.weight_sets}: depth is at least 1, weight sets are 2 or 3")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if config.batch_size % (world_size * config.accumulate):
        raise ValueError(f"--batch-size {config.batch_size} must be a multiple of {world_size} processes x "
                         f"{config.accumulate} accumulated parts")
    if config.data and not Path(config.data).exists():
        raise ValueError(f"--data {config.data}: no such file or folder")
    out = config.out or next(f"runs/d{config.depth}-{n}" for n in range(1, 10000)
                             if not Path(f"runs/d{config.depth}-{n}").exists())
    return dataclasses.replace(config, resolution=resolution, out=out)


def open_data(config: TrainConfig):
    """(training source, validation source): scenes of two seeds, or one picture in fifty of the user's, at most 64."""
    if not config.data:
        return Scenes(config.num_scenes, config.seed), Scenes(64, config.seed + 1_000_003)
    files = ImageFiles(config.data)
    held_out = min(64, max(1, len(files) // 50))
    return files.subset(range(held_out, len(files))), files.subset(range(held_out))


def count_steps(seconds: float, step, trials: int = 6) -> int:
    """How many steps fit into the seconds, by timing a few; `step(i)` must leave no trace."""
    times = []
    for i in range(trials):
        start = time.time()
        step(i)
        times.append(time.time() - start)
    return max(1, int(seconds / np.median(times[1:])))


def train(config: TrainConfig):
    """A whole run, from data to scores. Returns the run folder and the averaged model."""
    started = time.time()
    world = World(config.device)
    precision = pick_precision(config.precision, world.device)
    autocast = lambda: torch.autocast(world.device.type, precision, enabled=precision != torch.float32)
    quiet = world.rank > 0
    say = (lambda *_: None) if quiet else print

    encoders_file = find_model_file(config.encoders)
    frozen = load_components(encoders_file, ("vae", "text"))
    vae, text = frozen.vae.to(world.device), frozen.text.to(world.device)
    model_config = MMDiTConfig(
        depth=config.depth, qk_norm=config.qk_norm, latent_channels=vae.config.latent_channels,
        context_dim=text.config.context_dim, pooled_dim=text.config.pooled_dim,
        clip_tokens=text.config.clip_length if config.weight_sets == 3 else 0,
        **({"pos_embed_max_size": 32, "pos_embed_base_size": 32} if config.depth < 15 else {}))
    source, held_out = open_data(config)
    say(f"MM-DiT depth {config.depth}: {count_parameters(model_config) / 1e6:.1f} M parameters; {len(source)} pictures at "
        f"{config.resolution} px; {world.size} x {world.device}, {str(precision).removeprefix('torch.')}")
    if not config.data:
        say("training on built-in scenes; your own pictures: --data PATH, released encoders: --encoders FILE")

    torch.manual_seed(config.seed)
    model = MMDiT(model_config).to(world.device)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay,
                                  eps=1e-15 if config.qk_norm else 1e-8)              # Sec. 5.3.2
    density = LogitNormal(config.logit_mean, config.logit_std)
    formulation = RectifiedFlow(Shifted(density, config.shift) if config.shift != 1 else density)
    parallel = world.wrap(model)

    images = EncodedImages(source, vae, config.resolution, world.device, autocast, quiet)
    batches = Batches(images, vae, text, config, world, autocast)
    held_out_batches = Batches(EncodedImages(held_out, vae, config.resolution, world.device, autocast, True), vae, text,
                               config, world, autocast)
    sampling = {"num_steps": 28, "guidance_scale": 4.0, "timestep_shift": config.shift, "schedule": "shifted",
                "unconditional": "zeros", "height": config.resolution, "width": config.resolution}
    pipeline = Pipeline(average, vae, text, sampling, world.device, precision)
    prompts = FIXED_PROMPTS if not config.data else [captions[0] for captions in held_out_batches.images.captions[:8]]

    first_step, steps, skipped = 0, config.steps, 0
    folder = Path(config.out)
    if config.resume:
        checkpoint = last_checkpoint(folder)
        first_step, steps = restore(checkpoint, model, average, optimizer, config)
        say(f"going on from {checkpoint}")
    elif not steps:
        scratch = copy.deepcopy(model)
        scratch_optimizer = torch.optim.AdamW(scratch.parameters(), lr=0.0)
        left = 60 * config.minutes * 0.93 - (time.time() - started) - 0.2 * config.num_prompts
        steps = world.same(count_steps(left, lambda i: train_step(
            scratch, scratch_optimizer, batches(i), formulation, config, autocast)))
        del scratch, scratch_optimizer
    run = None
    if world.rank == 0:
        run = Run(folder, {"train": dataclasses.asdict(dataclasses.replace(config, steps=steps, resume="")),
                           "encoders": {"path": config.encoders, "fingerprint": fingerprint(encoders_file)}}, bool(config.resume))

    def checkpoint_now(step):
        if run:
            run.save({"model": model.state_dict(), "average": average.state_dict(), "step": step, "steps": steps,
                      "optimizer": get_optimizer_state_dict(model, optimizer)}, step, average, sampling)

    bar = tqdm(total=steps, initial=first_step, disable=quiet, unit="step", smoothing=0.05)
    window, window_start = [], time.time()
    for step in range(first_step, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, config)
        loss, t, grad_norm = train_step(parallel, optimizer, batches(step), formulation, config, autocast)
        skipped = 0 if torch.isfinite(grad_norm) else skipped + 1
        if skipped == 10:
            raise RuntimeError(f"loss or gradient was not finite 10 times in a row, last at step {step}; the last checkpoint in "
                               f"{folder} is good: lower --lr or switch on --qk-norm, then --resume")
        update_average(average, model, step, steps, config)

        done = step + 1
        window.append((world.gather(loss), world.gather(t), grad_norm))
        bar.update()
        if done % config.log_every == 0 or done == steps:
            if run:
                entry = summarize(window, done, config, time.time() - window_start)
                run.log(**entry)
                bar.set_postfix_str(f"loss {entry['loss']:.3f}, {entry['images_per_second']:.0f} images/s")
            window, window_start = [], time.time()
        if run and (every(done, steps, config.sample_every) or done == steps):
            levels = validate(average, held_out_batches, formulation, autocast)
            run.log(step=done, validation=levels[:-1].mean().item(), validation_by_t=[round(v, 5) for v in levels.tolist()])
            pictures = generate(pipeline, prompts, seed=1, num_steps=28)
            grid = captioned_grid(pictures, prompts, 4)
            write_atomically(folder / f"samples-{done:06}.png", lambda file: grid.save(file, format="PNG"))
            losses = draw_losses([json.loads(line) for line in open(folder / "log.jsonl")])
            write_atomically(folder / "loss.png", lambda file: losses.save(file, format="PNG"))
            window_start = time.time()
        if every(done, steps, config.save_every) or done == steps:
            checkpoint_now(done)
    bar.close()
    if run and not config.data and config.num_prompts:
        scores = geneval(lambda prompts: [np.asarray(p) for p in generate(pipeline, prompts, seed=100)],
                         config.num_prompts, height=config.resolution, width=config.resolution)
        run.log(step=steps, geneval=scores)
        say(format_scores(scores))
    say(f"{(time.time() - started) / 60:.1f} minutes; everything is in {folder}. "
        f'Next: python sample.py --checkpoint {folder} --prompt "{prompts[0]}"')
    world.close()
    return folder, average


def restore(checkpoint: Path, model, average, optimizer, config):
    """Load weights, average and optimizer in place; returns (steps done, steps planned).

    torch.distributed.checkpoint pickles its metadata: only resume from your own runs.
    """
    state = {"model": model.state_dict(), "average": average.state_dict(), "step": 0, "steps": 0,
             "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    for group in optimizer.param_groups:                                              # a changed setting takes effect
        group["weight_decay"] = config.weight_decay
    return state["step"], config.steps or state["steps"]


def every(done: int, steps: int, share: float) -> bool:
    """True at multiples of the share of the run."""
    return share > 0 and done % max(1, round(share * steps)) == 0


def summarize(window, step: int, config: TrainConfig, seconds: float) -> dict:
    """A log line from the steps since the last one; loss_by_t has null for a tenth of t that held no sample."""
    loss, t = (torch.cat([entry[i] for entry in window]).float().cpu() for i in (0, 1))
    tenth = (t * 10).long().clamp_max(9)
    by_t = [round(loss[tenth == i].mean().item(), 5) if (tenth == i).any() else None for i in range(10)]
    return {"step": step, "loss": round(loss.mean().item(), 6), "loss_by_t": by_t,
            "grad_norm": round(torch.stack([entry[2] for entry in window]).mean().item(), 4),
            "images_seen": step * config.batch_size, "images_per_second": round(len(loss) / seconds, 1)}


def main():
    """From the command line to a run."""
    try:
        train(parse_config())
    except (CheckpointError, ValueError, RuntimeError, OSError) as problem:
        sys.exit(f"train.py: {problem}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; go on with --resume RUN")


if __name__ == "__main__":
    main()
