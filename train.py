"""train.py: one loop that trains everything (SD3, arXiv:2403.03206v1, Sec. 5.3, App. B.3 and E.1).

Read with   App. B.3: flow_loss is Eq. 19, 23 and 8, then train_step to validate; fit is the loop
Not here    the loss (flow.py), the network (mmdit.py), pictures (data.py, encode.py), sampling
            (sample.py), processes (devices.py)
Randomness  every draw is keyed by (seed, step, index in the global batch), so neither the number
            of processes nor a restart changes a run
Shapes      B samples of this process   C latent channels   H W latent height, width
Run         python train.py                               scenes, ten minutes, any device
            python train.py --data PATH --resolution 128  your own captioned pictures
            torchrun --nproc_per_node 2 train.py          the same run on two processes
"""

import time

STARTED = time.time()                    # --minutes counts from here; importing torch takes seconds

import argparse
import copy
import fcntl
import functools
import json
import math
import re
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm import tqdm

import devices
from checkpoints import (
    FROZEN, SHIPPED, add_options, check_options, find_model_file, fingerprint, given_options,
    load_components, option, portable, read_json, save_networks, write_atomically)
from data import Batches
from devices import (
    World, assign, autocast, command, pick_precision, synchronized, whole)
from encode import encoded
from flow import density, rectified_flow_loss, shift_time
from mmdit import MMDiT, MMDiTConfig, count_parameters, paper_positions
from sample import Pipeline, captioned_grid, generate
from scenes import HELD_OUT_SEED, format_scores, geneval, vocabulary

MUON_RATE = 16                           # Muon's learning rate is this times that of AdamW.

# "paper" is App. B.3, with 256 px and the batch of Sec. 5.1 (Fig. 8: 4096). "tiny" is for minutes:
# a loss of .79 after ten of them on two CPU cores. The other defaults below are the paper's.
PRESETS = {
    "paper": dict(optimizer="adamw", lr=1e-4, warmup_steps=1000, cooldown=0.0, ema=0.99,
                  ema_every=100, batch_size=1024, resolution=256),
    "tiny":  dict(optimizer="muon",  lr=6e-4, warmup_steps=0,    cooldown=0.8, ema=0.0,
                  ema_every=1,   batch_size=64,   resolution=64),
}
FIXED = ("depth", "qk_norm", "optimizer", "resolution", "seed", "batch_size")      # within a run


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a run. The command line is made from it."""
    out: str = option("", "run folder; goes on if it has checkpoints; empty: a new runs/dDEPTH-N")
    init: str = option("", "a model whose MM-DiT a new run starts from (fine-tuning)")
    data: str = option("", "captioned pictures, or the --out of encode.py; empty: drawn scenes")
    encoders: str = option(str(SHIPPED), "model with the frozen VAE and text encoders")
    tokenizers: str = option("", "folder with clip/ and t5/; empty: beside the encoders")
    num_scenes: int = option(16384, "scenes to draw and encode, at most", 64, 10**8)
    resolution: int = option(64, "px per side, a multiple of 16", 16, 4096)
    depth: int = option(4, "the size of MM-DiT; its width is 64 * depth (Sec. 4)", 1, 128)
    qk_norm: bool = option(True, "RMSNorm on queries and keys (Sec. 5.3.2)")
    minutes: float = option(10.0, "length of the run, everything included", 0.01, 1e6)
    steps: int = option(0, "optimizer steps; 0: as many as fit into the minutes", 0, 10**9)
    batch_size: int = option(64, "samples per step, over all processes", 1, 10**6)
    accumulate: int = option(1, "parts of a batch that come one after the other", 1, 10**4)
    optimizer: str = option("muon", "muon is for the blocks' matrices", choices=("adamw", "muon"))
    lr: float = option(6e-4, "AdamW's peak rate; Muon's is 16 times that", 1e-12, 1.0)
    warmup_steps: int = option(0, "steps with rising rate; 0: 3 % of the run", 0, 10**9)
    cooldown: float = option(0.8, "share of the run, at its end, with falling rate", 0.0, 1.0)
    max_grad_norm: float = option(1.0, "longer gradients are scaled down to it", 1e-6, 1e6)
    ema: float = option(0.0, "decay of the average; 0: it remembers 3 % of the run", 0.0, 0.999999)
    ema_every: int = option(1, "steps between two updates of the average", 1, 10**6)
    encoder_dropout: float = option(0.464, "chance to zero each text encoder", 0.0, 1.0)
    full_captions: float = option(0.5, "share of full captions (Sec. 5.2.2)", 0.0, 1.0)
    density: str = option("lognorm(0, 1)", "of t; or uniform, mode(1.29), cosmap (Sec. 3.1)")
    timestep_shift: float = option(1.0, "alpha of Eq. 23; 3 at 1024 px", 0.01, 100.0)
    seed: int = option(0, "of weights, scenes, order, t and noise", 0, 2**31)
    device: str = option("auto", "cuda, mps or cpu; auto: the first that is there")
    precision: str = option("auto", "of matrix products", choices=("auto", "bf16", "fp32"))
    parallel: str = option("auto", "over processes", choices=("auto", "ddp", "fsdp", "hsdp"))
    recompute: bool = option(False, "compute the blocks' activations twice, to save memory")
    compile: bool = option(False, "torch.compile of each block; takes a minute to start")
    sample_every: float = option(0.2, "share of the run between pictures; 0: at its end", 0.0, 1.0)
    save_every: float = option(0.1, "share of the run between checkpoints; 0: its end", 0.0, 1.0)
    keep_every: int = option(0, "steps between checkpoints kept for good; 0: none", 0, 10**9)
    num_prompts: int = option(50, "prompts for each task of the last score; 0: none", 0, 10**5)

    def __post_init__(self):
        check_options(self)
        density(self.density)                                    # Its ValueError names the choices.
        if self.resolution % 16:
            raise ValueError(f"--resolution {self.resolution} is no multiple of 16 px (VAE 8 x 2)")


# --- The loss and one step ------------------------------------------------------------------------

def flow_loss(model, batch, density, timestep_shift):
    """The paper's loss of a batch: t from a density, shifted for the resolution. Returns (B,)."""
    t = density.quantile(batch.uniform).to(batch.latent.device)                    # (B,)  Eq. 19
    t = shift_time(t, timestep_shift)                                              # (B,)  Eq. 23
    return rectified_flow_loss(model, batch.latent, batch.context, batch.pooled, t, batch.noise)


def flow_times(batch, density, timestep_shift):
    """The t of flow_loss, by which the log sorts the losses."""
    return shift_time(density.quantile(batch.uniform), timestep_shift)             # (B,)


def train_step(model, optimizers, loss, batch, config):
    """One update from this process's share of the batch. Returns losses (B,), the gradient's norm.

    Nothing here knows how many processes exist: backward() averages gradients over them, and all
    random numbers came with the batch. If the norm is not finite, the weights stay as they are.
    """
    device = next(model.parameters()).device
    parts = batch.split(config.accumulate) if config.accumulate > 1 else [batch]
    losses = []
    for number, part in enumerate(parts, start=1):
        with synchronized(model, last=number == len(parts)):
            with autocast(device, pick_precision(config.precision, device)):
                part_losses = loss(model, part)                                    # (B / parts,)
            (part_losses.mean() / len(parts)).backward()
        losses.append(part_losses.detach())
    norm = whole(nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)).item()
    for optimizer in optimizers:
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return torch.cat(losses), norm


def make_optimizers(model, config) -> list:
    """AdamW (App. B.3), with the epsilon of Sec. 5.3.2. With "muon", Muon takes the matrices of
    attention and MLPs, and needs about half the pictures for the same loss."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and "joint_blocks." in name and "adaLN" not in name
        if parameter.requires_grad:
            chosen = matrices if is_matrix and config.optimizer == "muon" else others
            chosen.append(parameter)
    eps = 1e-15 if config.qk_norm else 1e-8
    adamw = torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.99), eps=eps, fused=True)
    return [adamw, torch.optim.Muon(matrices, lr=config.lr)] if matrices else [adamw]


def learning_rate(step: int, steps: int, config) -> float:
    """AdamW's: linear warm-up, constant (App. B.3), then linear to zero over the cooldown."""
    rise = (step + 1) / (config.warmup_steps or max(1, 0.03 * steps))
    fall = (steps - step) / max(1, config.cooldown * steps)
    return config.lr * min(1, rise, fall)


def set_learning_rates(optimizers, rate: float):
    """Muon's rate is a multiple of AdamW's. All are set at every step, also after a restart."""
    for optimizer in optimizers:
        factor = MUON_RATE if isinstance(optimizer, torch.optim.Muon) else 1
        for group in optimizer.param_groups:
            group["lr"] = factor * rate


@torch.no_grad()
def update_average(average, model, done: int, steps: int, config):
    """The fp32 average of the weights; with the paper's preset, decay .99 every 100 steps."""
    if done % config.ema_every == 0:
        decay = config.ema or 1 - 1 / max(2, 0.03 * steps)
        for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
            mean.lerp_(parameter, 1 - decay)


@torch.no_grad()
def validate(model, samples, precision, loss=rectified_flow_loss, levels: int = 8):
    """Losses at equally spaced t in [0, 1] (App. B.3): (levels,). Their mean leaves out t = 1.

    samples: (latent, context, pooled, noise) for each picture size, the same every time.
    """
    losses = []
    for latent, context, pooled, noise in samples:
        with autocast(latent.device, precision):
            for t in torch.linspace(0, 1, levels, device=latent.device):
                losses.append(loss(model, latent, context, pooled, t.expand(len(latent)), noise))
    return torch.stack([torch.cat(losses[level::levels]).mean() for level in range(levels)]).cpu()


# --- The loop -------------------------------------------------------------------------------------

def fit(model, loss, batches, config, run):
    """Trains the model and returns the average of its weights. One loop trains everything.

    loss(model, batch) -> (B,). batches(step) -> this process's batch, of any kind. `run` keeps what
    comes out; if it has checkpoints, training goes on. RuntimeError if a number is not finite.
    """
    average = copy.deepcopy(model) if run.average is None else run.average
    average.requires_grad_(False)
    optimizers = make_optimizers(model, config)
    done = run.start(model, average, optimizers)
    network = run.world.wrap(model)
    steps = run.total_steps(done)
    bar = tqdm(total=steps, initial=done, disable=run.world.rank > 0, unit="step")
    while done < steps and not run.stopping:
        set_learning_rates(optimizers, learning_rate(done, steps, config))
        started = time.time()
        batch = batches(done)
        waited = time.time() - started
        losses, grad_norm = train_step(network, optimizers, loss, batch, config)
        seconds = time.time() - started
        done += 1
        steps = run.total_steps(done)
        run.check(model, grad_norm, done, steps)
        update_average(average, model, done, steps, config)
        run.log_step(done, steps, batch, losses, grad_norm, waited, seconds)
        run.sample(done, steps, average)
        run.save(done, steps, model, average, optimizers)
        bar.total = steps
        bar.update()
    bar.close()
    return average


@dataclass
class Run:
    """A run folder: config.json, log.jsonl, loss.png, checkpoints/STEP. Rank 0 writes; all ranks
    together write checkpoints."""
    folder: Path
    config: TrainConfig
    world: World = None              # made here if it is not given
    times: Callable = None           # times(batch) -> t (B,), by which the log sorts losses
    report: Callable = None          # report(average, step) -> entries for the log
    export: Callable = None          # export(average) comes before each checkpoint
    average: nn.Module = None        # a place for the average; if none, a copy of the model
    about: dict = field(default_factory=dict)                    # more entries for config.json
    stopping: bool = False           # after SIGTERM
    skipped: int = 0                 # steps without a finite gradient, in a row

    def __post_init__(self):
        self.folder = Path(self.folder)
        self.world = self.world or World(self.config.device, self.config.parallel)
        self.signals = []
        self.recent = []

    def say(self, sentence: str):
        """Prints a line, once for all processes, beside the progress bar."""
        if self.world.rank == 0:
            tqdm.write(sentence)

    def write(self, name: str, write):
        """Writes a file of the folder, once for all processes: write(path)."""
        if self.world.rank == 0:
            write_atomically(self.folder / name, write)

    def start(self, model, average, optimizers) -> int:
        """Locks the folder and loads its newest whole checkpoint. Returns the steps done."""
        if self.world.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / "lock", "w")          # The system frees it when we die.
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"another process writes into {self.folder}; wait for it, or "
                                 f"choose another --out") from None
        signal.signal(signal.SIGTERM, lambda *_: self.signals.append("SIGTERM"))
        state = {"step": 0, "seconds": 0.0}
        found = self.world.same(checkpoints_of(self.folder))
        while found and not state["step"]:
            state = run_state(model, average, optimizers, 0, 0.0)
            try:
                devices.load_state(state, found.pop(), self.world)
                devices.set_optimizer_state_dict(model, optimizers, state["optimizer"])
            except OSError as problem:
                if not found:
                    raise
                self.say(f"{problem}; the checkpoint before it is taken")
        self.first = state["step"]
        self.seconds = state["seconds"]
        kept = [json.dumps(entry) + "\n" for entry in self.logged() if entry["step"] <= self.first]
        self.write("log.jsonl", lambda file: file.write_text("".join(kept)))
        about = {"train": asdict(replace(self.config, out="")), **self.about}
        self.write("config.json", lambda file: file.write_text(json.dumps(about, indent=1)))
        return self.first

    def seconds_used(self) -> float:
        """By this process, and before it by the run that it goes on with."""
        return self.seconds + time.time() - STARTED

    def total_steps(self, done: int) -> int:
        """--steps, or as many as fit into --minutes at the pace so far. A tenth of the minutes is
        for the last pictures, the last checkpoint and the score."""
        if self.config.steps:
            return self.config.steps
        left = max(0, 54 * self.config.minutes - self.seconds_used())
        if done < self.first + 3:                                # The first steps are slow.
            self.began = time.time()
            return self.world.same(done + 1000 if left else done)
        pace = (time.time() - self.began) / (done - self.first - 2)
        steps = self.world.same(done + int(left / pace))
        if done == self.first + 3 and steps < 100:
            self.say(f"only {steps} steps fit into --minutes {self.config.minutes:g} on this "
                     f"machine, which teaches next to nothing; give more minutes")
        return steps

    def check(self, model, grad_norm: float, done: int, steps: int):
        """Ends the run when its numbers stop being finite, before they are averaged or saved."""
        self.skipped = 0 if math.isfinite(grad_norm) else self.skipped + 1
        total = whole(nn.utils.get_total_norm(model.parameters())).item()
        if self.skipped == 10 or (self.skipped and done == steps) or not math.isfinite(total):
            raise RuntimeError(f"loss, gradients or weights are not finite at step {done}; what is "
                               f"saved is older. Give --out {self.folder} with a lower --lr")

    def log(self, **entry):
        """Adds a line to log.jsonl."""
        if self.world.rank == 0:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")

    def logged(self) -> list[dict]:
        """The lines of log.jsonl, without what a kill or a stranger left there."""
        entries = []
        file = self.folder / "log.jsonl"
        for line in file.read_text().split("\n") if file.is_file() else ():
            try:
                entries.append({"step": int(json.loads(line)["step"]), **json.loads(line)})
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
        return entries

    def log_step(self, done, steps, batch, losses, grad_norm, waited, seconds):
        """Collects a step. The first 20 and then every 20th are followed by a line in the log."""
        t = self.times(batch) if self.times else losses[:0]
        self.recent.append((losses, t, grad_norm, waited, seconds))
        if done > 20 and done % 20 and done != steps:
            return
        losses, t, norms, waits, seconds = zip(*self.recent, strict=True)
        self.recent = []
        losses = torch.cat(self.world.gather(torch.cat(losses).float().cpu()))
        t = torch.cat(self.world.gather(torch.cat(t).float().cpu()))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.world.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        self.log(step=done, **summarize(losses, t, torch.tensor(norms)),
                 images_seen=done * self.config.batch_size,
                 images_per_second=round(len(losses) / sum(seconds), 1),
                 memory_gb=round(memory / 1e9, 3), data_wait=round(sum(waits) / sum(seconds), 4))

    def sample(self, done: int, steps: int, average):
        """Validation, pictures and the curve of the loss, when their time has come."""
        self.stopping = self.world.any(bool(self.signals))
        due = every(done, steps, self.config.sample_every) or done == steps
        if self.report and due and not self.stopping:
            self.log(step=done, **self.report(average, done))
            curve = draw_losses(self.logged())
            self.write("loss.png", lambda file: curve.save(file, format="PNG"))

    def save(self, done: int, steps: int, model, average, optimizers):
        """A checkpoint, when its time has come. The last two stay, and every `keep_every` steps."""
        config = self.config
        milestone = every(done, 1, config.keep_every)
        due = every(done, steps, config.save_every) or milestone or done == steps or self.stopping
        if self.skipped or not due:
            return
        if self.export:
            self.export(average)
        target = self.folder / "checkpoints" / f"{done:08}"
        partial = target.with_suffix(".partial")
        state = run_state(model, average, optimizers, done, self.seconds_used())
        devices.save_state(state, partial, self.world)
        if self.world.rank == 0:
            shutil.rmtree(target, ignore_errors=True)            # A damaged one may be there.
            partial.rename(target)
            older = [old for old in checkpoints_of(self.folder) if int(old.name) < done]
            for old in older[:-1]:
                if not every(int(old.name), 1, config.keep_every):
                    shutil.rmtree(old, ignore_errors=True)


def every(done: int, steps: int, share: float) -> bool:
    """Whether another `share` of the run is done."""
    return share > 0 and done % max(1, round(share * steps)) == 0


def run_state(model, average, optimizers, step: int, seconds: float) -> dict:
    """What a run goes on from. Random numbers need no state: they are keyed by the step."""
    optimizer = devices.get_optimizer_state_dict(model, optimizers)
    return {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer,
            "step": step, "seconds": seconds}


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. Anything without an eight-digit name is none."""
    return sorted(p for p in (folder / "checkpoints").glob("*") if re.fullmatch(r"\d{8}", p.name))


def summarize(losses, t, norms) -> dict:
    """losses (n,), their t (n,) or (0,), gradient norms (steps,) -> means over what is finite."""
    def mean(values):
        values = values[values.isfinite()]
        return round(values.mean().item(), 6) if len(values) else None

    entry = {"loss": mean(losses), "grad_norm": mean(norms)}
    entry["skipped"] = int((~norms.isfinite()).sum())
    if len(t):
        tenth = (10 * t).long().clamp(0, 9)
        entry["loss_by_t"] = [mean(losses[tenth == i]) for i in range(10)]
    return entry


def draw_losses(entries: list[dict]) -> Image.Image:
    """The loss over steps, from .01 to 10 on a log scale: the mean in black, and the tenths of t
    from blue (near data) to red (near noise)."""
    image = Image.new("RGB", (720, 440), "white")
    draw = ImageDraw.Draw(image)
    for i in range(11):
        points = []
        for entry in entries:
            loss = entry.get("loss") if i == 10 else entry.get("loss_by_t", [None] * 10)[i]
            if loss:
                height = 150 * (1 - math.log10(loss))
                points.append((640 * entry["step"] / entries[-1]["step"], height))
        color = "black" if i == 10 else (28 * i, 60, 255 - 28 * i)
        draw.line(points, fill=color, width=3 if i == 10 else 1)
        label = "mean" if i == 10 else f"t {i / 10} to {(i + 1) / 10}"
        draw.text((645, 20 * i), label, fill=color)
    for loss in (5, 1, 0.1):
        draw.text((4, 150 * (1 - math.log10(loss))), f"loss {loss}", fill="gray")
    return image


# --- A run of MM-DiT ------------------------------------------------------------------------------

def model_sizes(config, vae, text, longest_side: int, start=None) -> MMDiTConfig:
    """The MM-DiT for these encoders, with the paper's positions (Sec. 5.3.2) up to longest_side px
    or twice the resolution. start: the sizes of --init. Only a released model, whose positions
    begin at 0, keeps its own; QK-norm may be new."""
    longest = max(2 * config.resolution, longest_side) // 16
    grid = paper_positions(config.resolution, longest).tolist()
    sizes = MMDiTConfig(
        config.depth, latent_channels=vae.latent_channels, context_dim=text.context_dim,
        pooled_dim=text.pooled_dim, qk_norm=config.qk_norm, pos_embed_max_size=longest,
        position_start=grid[0], position_step=grid[1] - grid[0])
    if start is None:
        return sizes
    if start.position_start == 0:
        sizes = replace(sizes, pos_embed_max_size=start.pos_embed_max_size, position_start=0.0,
                        position_step=start.position_step)
    return replace(sizes, dual_attention_layers=start.dual_attention_layers)


def make_model(sizes: MMDiTConfig, config, world: World, trained: bool) -> MMDiT:
    """An MM-DiT without numbers yet: this process's shards, or all of it. Depth 38 is never whole
    on a GPU. The average is not trained; the sampler's sizes vary, so it is not compiled."""
    with torch.device("meta"):
        model = MMDiT(sizes)
    for block in model.joint_blocks if trained else ():
        if config.compile:
            torch._dynamo.config.optimize_ddp = False            # DDP would cut blocks into pieces.
            block.forward = torch.compile(block.forward)
        if config.recompute:                                     # Nothing inside it is compiled.
            block.forward = functools.partial(recomputed, block.forward, use_reentrant=False)
    world.shard(model, pick_precision(config.precision, world.device))
    return model.to_empty(device=world.device)


@torch.no_grad()
def load_weights(model: MMDiT, weights: MMDiT):
    """Starts from the weights of --init. The scales of a new QK-norm stay 1."""
    theirs = dict(weights.named_parameters())
    ours = {name: p for name, p in model.named_parameters() if name in theirs or "ln_" not in name}
    for name in sorted(ours.keys() | theirs.keys()):
        shapes = [getattr(x.get(name), "shape", None) for x in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"--init is of other sizes: {name} is {shapes[1]} there, {shapes[0]} "
                             f"here; give its --depth, --qk-norm true and its --encoders")
        assign(ours[name], theirs[name])
    if weights.config.position_start == 0:
        model.pos_embed.copy_(weights.pos_embed)


def report(average, step, pipeline, held_out, prompts, folder, world) -> dict:
    """Draws the prompts from the same noise as ever. Returns the validation losses for the log."""
    levels = validate(average, held_out.validation(64), pipeline.precision)
    if not levels.isfinite().all():
        raise RuntimeError(f"the validation loss is not finite at step {step}; lower the --lr")
    grid = captioned_grid(generate(pipeline, prompts, seed=1), prompts, 4)
    if world.rank == 0:
        file = folder / f"samples-{step:06}.png"
        write_atomically(file, lambda partial: grid.save(partial, format="PNG"))
    return {"validation": round(levels[:-1].mean().item(), 6),
            "validation_by_t": [round(level, 5) for level in levels.tolist()]}


def export(average, file, sampling, words, world):
    """model.safetensors: the whole average, gathered by all ranks and written by the first."""
    weights = {}
    for name, tensor in average.state_dict().items():
        tensor = whole(tensor)
        if world.rank == 0:
            weights[name] = tensor.cpu()
    if world.rank == 0:
        with torch.device("meta"):
            model = MMDiT(average.config)
        model.load_state_dict(weights, assign=True)
        save_networks(file, {"mmdit": model}, sampling=sampling, words=words)


def score(pipeline, config, run):
    """GenEval's six tasks on held-out scenes, with as many prompts as the minutes allow."""
    def draw(prompts, first):
        pictures = generate(pipeline, prompts, HELD_OUT_SEED + first, batch_size=len(prompts))
        return [np.asarray(picture) for picture in pictures]

    count = config.num_prompts
    if not config.steps:
        started = time.time()
        draw(["a red circle"] * 8, 0)
        left = 60 * config.minutes - run.seconds_used()
        count = run.world.same(min(count, max(1, int(left / 0.75 / (time.time() - started)))))
    scores = geneval(draw, count, height=config.resolution, width=config.resolution)
    run.log(step=run.first, geneval=scores, num_prompts=count)
    run.say(f"{format_scores(scores)}, {count} prompts for each task")


def departures(config) -> str:
    """Where a run leaves the paper's numbers, in one line."""
    paper = PRESETS["paper"] | {"encoder_dropout": 0.464, "density": "lognorm(0, 1)"}
    found = []
    for name, value in paper.items():
        ours = getattr(config, name)
        if ours != value and f"{name} {ours}" not in ("batch_size 4096", "resolution 1024"):
            found.append(f"{name} {ours} ({value})")
    return "not as in the paper (App. B.3): " + (", ".join(found) or "nothing")


def check_start(config, world, stored) -> Path:
    """Refuses what cannot work, before anything is made. Returns the file of the encoders."""
    if world.parallel != "ddp" and config.optimizer == "muon":
        raise ValueError("Muon works on whole matrices: give --optimizer adamw or --parallel ddp")
    if config.batch_size % (world.size * config.accumulate):
        raise ValueError(f"--batch-size {config.batch_size} is no multiple of {world.size} "
                         f"processes x --accumulate {config.accumulate}")
    file = find_model_file(config.encoders, hub=not stored)
    if stored and stored["encoders"].get("fingerprint") != fingerprint(file, FROZEN):
        raise ValueError(f"{file} does not hold the encoders that {config.out} was trained with")
    return file


def train(config: TrainConfig, stored: dict):
    """A whole run, from pictures to the score. stored: config.json of one that goes on."""
    world = World(config.device, config.parallel, count_parameters(MMDiTConfig(config.depth)))
    file = check_start(config, world, stored)
    free = (f"runs/d{config.depth}-{n}" for n in range(1, 10**6))
    out = config.out or next(name for name in free if not Path(name).exists())
    count = min(config.num_scenes, max(64, config.steps * config.batch_size))
    if not config.steps:
        count = min(config.num_scenes, max(512, int(2000 * config.minutes)))
    config = replace(config, out=world.same(out), encoders=portable(file), num_scenes=count)
    precision = pick_precision(config.precision, world.device)
    training, held_out = encoded(config, world, count)
    frozen = load_components(file, ("vae", "text"), precision, config.tokenizers)
    vae, text = frozen.vae.to(world.device), frozen.text.to(world.device)
    start = None
    if config.init and not stored:
        start = load_components(config.init, ("mmdit",)).mmdit
    sizes = model_sizes(config, vae.config, text.config, training.longest_side,
                        start.config if start else None)
    if stored:
        sizes = MMDiTConfig(**stored["model"])
    model = make_model(sizes, config, world, trained=True)
    average = make_model(sizes, config, world, trained=False)
    model.initialize(torch.Generator().manual_seed(config.seed), assign)
    if start:
        load_weights(model, start)
    average.load_state_dict(model.state_dict())
    batches = Batches(training, vae.config, text.config, config, world)
    held_out_batches = Batches(held_out, vae.config, text.config, config, world)
    size = {"height": config.resolution, "width": config.resolution}
    sampling = {"num_steps": 28, "guidance_scale": 4.0, "schedule": "shifted",
                "timestep_shift": config.timestep_shift, "unconditional": "zeros", **size}
    pipeline = Pipeline(average, vae, text, sampling, world.device, precision)
    prompts = [held_out.captions(i)[0] for i in range(min(8, len(held_out)))]
    words = () if config.data else sorted(vocabulary())
    about = {"model": asdict(sizes), "encoders": {
        "path": config.encoders, "tokenizers": config.tokenizers,
        "fingerprint": fingerprint(file, FROZEN)}}
    drawn = {"density": density(config.density), "timestep_shift": config.timestep_shift}
    folder = Path(config.out)
    run = Run(
        folder, config, world, functools.partial(flow_times, **drawn),
        functools.partial(report, pipeline=pipeline, held_out=held_out_batches, prompts=prompts,
                          folder=folder, world=world),
        functools.partial(export, file=folder / "model.safetensors", sampling=sampling,
                          words=words, world=world),
        average, about)
    run.say(f"MM-DiT of depth {config.depth}: {count_parameters(sizes) / 1e6:.1f} M parameters; "
            f"{len(training)} pictures of {config.resolution} px; {world.size} x {world.device}, "
            f"{precision}, {world.parallel}\n{departures(config)}")
    fit(model, functools.partial(flow_loss, **drawn), batches, config, run)
    if run.stopping:
        run.say(f"stopped by SIGTERM and saved; go on with --out {folder}")
    elif config.num_prompts and not config.data and not any("geneval" in e for e in run.logged()):
        score(pipeline, config, run)
    run.say(f"the model, log.jsonl, loss.png and pictures are in {folder}. Next:\n"
            f'python sample.py --checkpoint {folder} --prompt "{prompts[0]}"')
    world.close()


def read_config(arguments=None):
    """From the command line, over a preset or the run that --out names: (TrainConfig, config.json
    of a run that goes on, or {})."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="Trains MM-DiT with rectified flow.",
        epilog="Going on with a run unpickles a file of its checkpoints: only do it with your own.")
    add_options(parser, TrainConfig)
    parser.add_argument("--preset", choices=PRESETS, help="paper is the default from depth 15 up")
    parser.add_argument("--resume", dest="out", help="the same as --out")
    options = parser.parse_args(arguments)
    given = given_options(options, TrainConfig)
    index = Path(given.get("data", "")) / "index.json"
    if given.get("data") and index.is_file():
        given.setdefault("resolution", read_json(index, {"resolution": int})["resolution"])
    folder = Path(given.get("out") or "runs/none")
    file = folder / "config.json"
    if not checkpoints_of(folder):
        if folder.exists() and any(folder.iterdir()) and not file.is_file():
            raise ValueError(f"--out {folder} is no run folder; choose another")
        default = "paper" if given.get("depth", 0) >= 15 else "tiny"
        return TrainConfig(**PRESETS[options.preset or default] | given), {}
    stored = read_json(file, {"train": dict, "model": dict, "encoders": dict})
    if options.preset:
        given = PRESETS[options.preset] | given
    for name in FIXED:
        if name in given and given[name] != stored["train"].get(name):
            raise ValueError(f"--{name.replace('_', '-')} {given[name]}: {folder} was started with "
                             f"{stored['train'].get(name)}, which cannot change within a run")
    kept = {"num_scenes": stored["train"].get("num_scenes")}     # The same pictures again.
    try:
        return TrainConfig(**stored["train"] | given | kept), stored
    except TypeError as problem:
        raise ValueError(f"{file} is of another version of train.py: {problem}") from None


def main():
    """From the command line to a run."""
    try:
        train(*read_config())
    except KeyboardInterrupt:
        raise KeyboardInterrupt("--out RUN goes on from the last checkpoint") from None


if __name__ == "__main__":
    command(main)
