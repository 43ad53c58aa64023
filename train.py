"""train.py: one loop that trains everything (SD3, arXiv:2403.03206v1, Sec. 5.3, App. B.3 and E.1).

Read with   App. B.3: flow_loss is Eq. 19, 23 and 8, then train_step; fit is the loop
Not here    loss (flow.py), network (mmdit.py), pictures (data.py), processes (devices.py)
Run         python train.py     ten minutes on drawn scenes; torchrun ... for several processes
"""

import time
STARTED = time.time()                    # --minutes counts from here; importing torch takes seconds
import argparse
import copy
import fcntl
import json
import math
import shutil
import signal
from collections import namedtuple
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import devices
from checkpoints import (
    FROZEN, SHIPPED, find_model_file, fingerprint, load_components, portable, run_encoders,
    save_networks)
from data import Batches
from devices import World, pick_precision, whole
from encode import encoded
from flow import density, rectified_flow_loss, shift_time, validate
from geneval import format_scores, geneval
from mmdit import MMDiT, MMDiTConfig, count_parameters, load_weights, model_sizes
from options import add_options, check_options, given_options, option, read_json, write_atomically
from sample import Pipeline, generate
from scenes import captioned_grid, vocabulary

# "paper" is App. B.3 at 256 px. "tiny" is for minutes on two CPU cores.
PRESETS = {
    "paper": dict(optimizer="adamw", lr=1e-4, warmup_steps=1000, cooldown=0.0, ema=0.99,
                  ema_every=100, batch_size=1024, resolution=256),
    "tiny":  dict(optimizer="muon",  lr=6e-4, warmup_steps=0,    cooldown=0.8, ema=0.0,
                  ema_every=1,   batch_size=64,   resolution=64),
}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a run. The command line is made from it."""
    out: str = option("", "run folder; going on with one unpickles, so give only your own")
    init: str = option("", "a model whose MM-DiT a new run starts from (fine-tuning)")
    data: str = option("", "captioned pictures, or the --out of encode.py; empty: drawn scenes")
    encoders: str = option(str(SHIPPED), "model with the frozen VAE and text encoders")
    num_scenes: int = option(16384, "scenes to draw and encode, at most", 64, 10**8)
    resolution: int = option(64, "px per side, a multiple of 16", 16, 4096)
    depth: int = option(4, "the size of MM-DiT; its width is 64 * depth (Sec. 4)", 1, 128)
    qk_norm: bool = option(True, "RMSNorm on queries and keys (Sec. 5.3.2)")
    minutes: float = option(10.0, "length of the run, everything included", 0.01, 1e6)
    steps: int = option(0, "optimizer steps; 0: as many as fit into the minutes", 0, 10**9)
    every: int = option(0, "steps between checkpoints; 0: a tenth of the run", 0, 10**9)
    batch_size: int = option(64, "samples per step, over all processes", 1, 10**6)
    accumulate: int = option(1, "parts of a batch that come one after the other", 1, 10**4)
    optimizer: str = option("muon", "muon is for the blocks' matrices", choices=("adamw", "muon"))
    lr: float = option(6e-4, "AdamW's peak rate; Muon's is 16 times that", 1e-12, 1.0)
    warmup_steps: int = option(0, "steps with rising rate; 0: 3 % of the run", 0, 10**9)
    cooldown: float = option(0.8, "share of the run, at its end, with falling rate", 0.0, 1.0)
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


def train_step(model, optimizers, loss, batch, config):
    """One update: losses (B,) and the gradient's norm. No weight changes if that is not finite."""
    device = next(model.parameters()).device
    parts = batch.split(config.accumulate) if config.accumulate > 1 else [batch]
    losses = []
    for part in parts:
        with devices.synchronized(model, last=part is parts[-1]):
            with devices.autocast(device, pick_precision(config.precision, device)):
                losses.append(loss(model, part))                                   # (B / parts,)
            (losses[-1].mean() / len(parts)).backward()
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)).item()
    for optimizer in optimizers:
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
    return torch.cat(losses).detach(), norm


def make_optimizers(model, config) -> list:
    """AdamW (App. B.3), with the epsilon of Sec. 5.3.2; or Muon for the blocks' matrices."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and "joint_blocks." in name and "adaLN" not in name
        (matrices if is_matrix and config.optimizer == "muon" else others).append(parameter)
    eps = 1e-15 if config.qk_norm else 1e-8
    adamw = torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.99), eps=eps, fused=True)
    return [adamw, torch.optim.Muon(matrices, lr=16 * config.lr)] if matrices else [adamw]


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
        for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
            mean.lerp_(parameter, 1 - decay)


# --- The loop -------------------------------------------------------------------------------------
def fit(model, loss, batches, config, run):
    """Trains a model by loss(model, batch) -> (B,) on batches(step), and returns its average."""
    average = copy.deepcopy(model) if run.average is None else run.average
    average.requires_grad_(False)
    optimizers = make_optimizers(model, config)
    run.start(model, average, optimizers)
    network = run.world.wrap(model)
    with run.lock, run.bar:
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
                run.sample(average)
                run.save(model, average, optimizers)
    return average


@dataclass
class Run:
    """A run folder. All ranks write its checkpoints together, and rank 0 writes the rest."""
    folder: Path
    config: TrainConfig
    world: World = None              # if none, one is made
    times: object = None             # times(batch) -> t (B,), by which the log sorts losses
    report: object = None            # report(average, step) -> entries for the log, a picture
    average: torch.nn.Module = None        # a place for the average; if none, a copy of the model
    metadata: dict = None            # of an MM-DiT's model.safetensors; if none, it is not written
    about: dict = field(default_factory=dict)        # more entries for config.json

    def say(self, sentence: str):
        """Prints a line beside the progress bar, once for all processes."""
        if self.world.rank == 0:
            tqdm.write(sentence)

    def write(self, name, write):
        """A file of the folder, by write(temporary path), once for all processes."""
        if self.world.rank == 0:
            write_atomically(self.folder / name, write)

    def start(self, model, average, optimizers):
        """Locks the folder, loads its newest whole checkpoint, and drops later lines of the log."""
        self.folder = Path(self.folder)
        self.world = self.world or World(self.config.device)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / "lock", "w")              # The system frees it when we die.
        try:
            if self.world.rank == 0:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{self.folder} is in use; choose another --out, or wait") from None
        self.done, self.began = 0, STARTED
        self.resume(model, average, optimizers)
        self.first = self.last_due = self.done
        self.skipped, self.recent = 0, []
        self.stopping, self.signals = False, []
        signal.signal(signal.SIGTERM, lambda number, frame: self.signals.append(number))
        self.entries = read_log(self.folder / "log.jsonl", self.done)
        log = "".join(json.dumps(entry) + "\n" for entry in self.entries)
        self.write("log.jsonl", partial(Path.write_text, data=log))
        about = json.dumps({"train": asdict(self.config), **self.about}, indent=1)
        self.write("config.json", partial(Path.write_text, data=about))
        self.steps = self.total_steps()
        if not self.steps:
            raise ValueError("--minutes were over before the first step; give more")
        self.bar = tqdm(initial=self.done, disable=self.world.rank > 0, unit="step")
        self.last_line = time.time()

    def resume(self, model, average, optimizers):
        """Loads the newest checkpoint that is whole. OSError if there are some, and none is."""
        found = self.world.same(checkpoints_of(self.folder))
        for folder in reversed(found):
            state = self.state(model, average, optimizers)
            try:
                devices.load_state(state, folder, self.world)
                break
            except OSError as problem:
                if folder == found[0]:
                    raise
                self.say(f"{problem}; the checkpoint before it is taken")
        if found:
            devices.set_optimizer_state_dict(model, optimizers, state["optimizer"])
            self.done = state["step"]
            self.began = STARTED - state["seconds"]              # as if it had run without a pause

    def state(self, model, average, optimizers) -> dict:
        """What a run goes on from. Random numbers need no state: they are keyed by the step."""
        return {"model": model.state_dict(), "average": average.state_dict(), "step": self.done,
                "optimizer": devices.get_optimizer_state_dict(model, optimizers),
                "seconds": time.time() - self.began}

    def total_steps(self) -> int:
        """--steps, or as many as fit into nine tenths of --minutes; the rest is for the score."""
        if self.config.steps:
            return self.config.steps
        left = max(0, 54 * self.config.minutes - (time.time() - self.began))
        taken = self.done - self.first - 2                       # The first two are slow.
        steps = self.done + (1000 if left else 0)
        if taken < 1:
            self.paced = time.time()
        else:
            steps = self.done + int(left * taken / (time.time() - self.paced))
        if self.first < self.done and taken < 2 and steps < 100:
            self.say(f"a run of {steps} steps teaches next to nothing; give more --minutes")
        return self.world.same(steps)

    def count_step(self, model, grad_norm):
        """Ends the run when its numbers stop being finite, before they are averaged or saved."""
        self.done += 1
        self.steps = self.bar.total = self.total_steps()
        self.bar.update()
        self.stopping = self.world.any(bool(self.signals))
        self.skipped = 0 if math.isfinite(grad_norm) else self.skipped + 1
        period = self.config.every or max(1, self.steps // 10)
        ended = self.stopping or self.done == self.steps
        self.due = not self.skipped and (ended or self.done >= self.last_due + period)
        total = whole(torch.nn.utils.get_total_norm(model.parameters())).item()
        stuck = self.skipped == 10 or (self.skipped and self.done == self.steps)
        if stuck or not math.isfinite(total):
            raise RuntimeError(f"loss, gradient or weights are not finite at step {self.done}; all "
                               f"that is saved is. Give --out {self.folder} and a lower --lr")

    def log(self, **entry):
        """Adds a line to log.jsonl."""
        self.entries.append({"step": self.done, **entry})
        if self.world.rank == 0:
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(self.entries[-1]) + "\n")

    def log_step(self, batch, losses, grad_norm):
        """Collects a step. The first 20 and then every 20th are followed by a line in the log."""
        t = self.times(batch) if self.times else losses * math.nan
        rows = torch.stack([losses.float().cpu(), t.float().cpu()])                    # (2, B)
        self.recent.append((rows, grad_norm))
        if self.done > 20 and self.done % 20 and self.done != self.steps:
            return
        rows, norms = zip(*self.recent, strict=True)
        losses, t = torch.cat(self.world.gather(torch.cat(rows, dim=1)), dim=1)        # (n,) each
        norms = torch.tensor(norms)
        tenths = (10 * t).floor()
        self.log(
            loss=mean(losses), loss_by_t=[mean(losses[tenths == tenth]) for tenth in range(10)],
            grad_norm=mean(norms), skipped=int((~norms.isfinite()).sum()),
            memory_gb=torch.cuda.max_memory_allocated() / 1e9,
            images_seen=self.done * self.config.batch_size,
            images_per_second=len(losses) / (time.time() - self.last_line))
        self.last_line = time.time()
        self.recent = []

    def sample(self, average):
        """Validation, pictures, and the curves of the losses."""
        if self.report and not self.stopping:
            entries, picture = self.report(average, self.done)
            self.log(**entries)
            self.write("loss.png", partial(draw_losses(self.entries).save, format="PNG"))
            if picture:
                self.write(f"samples-{self.done:06}.png", partial(picture.save, format="PNG"))

    def save(self, model, average, optimizers):
        """The average as model.safetensors, and a checkpoint. The last two checkpoints stay."""
        self.last_due = self.done
        if self.metadata:
            weights = devices.get_model_state_dict(average, options=devices.WHOLE)
            with torch.device("meta"):
                mmdit = MMDiT(average.config)
            if weights:                                          # Only rank 0 has them.
                mmdit.load_state_dict(weights, assign=True)
                save_networks(self.folder / "model.safetensors", {"mmdit": mmdit}, **self.metadata)
        target = self.folder / "checkpoints" / f"{self.done:08}"
        unfinished = target.with_suffix(".partial")
        devices.save_state(self.state(model, average, optimizers), unfinished, self.world)
        if self.world.rank == 0:
            shutil.rmtree(target, ignore_errors=True)            # A damaged one may be there.
            unfinished.rename(target)
            older = [old for old in checkpoints_of(self.folder) if old < target]
            for old in older[:-1]:
                shutil.rmtree(old, ignore_errors=True)


def read_log(file: Path, last: int) -> list[dict]:
    """The entries of a log.jsonl up to a step. What else a kill or a stranger left is dropped."""
    entries = []
    for line in file.read_text().split("\n") if file.is_file() else ():
        with suppress(Exception):
            entry = json.loads(line)
            numbers = [entry["step"], entry.get("loss") or 0, entry.get("validation") or 0]
            if 0 <= entry["step"] <= last and all(map(math.isfinite, numbers)):
                entries.append(entry)
    return entries


def mean(values):
    """The mean over what is finite; None where nothing is."""
    values = values[values.isfinite()]
    return round(values.mean().item(), 6) if values.numel() else None


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. Anything without an eight-digit name is none."""
    return sorted((folder / "checkpoints").glob("[0-9]" * 8))


def draw_losses(entries: list[dict]) -> Image.Image:
    """loss.png: the loss in training (black) and in validation (red) by step, on a log scale."""
    image = Image.new("RGB", (720, 480), "white")
    draw = ImageDraw.Draw(image)
    draw.text((60, 3), "loss by step; red: validation", "black")
    last = entries[-1]["step"]
    for loss in (0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5):
        y = 220 - 280 * math.log10(loss)
        draw.line((60, y, 700, y), "lightgray")
        draw.text((50, y), str(loss), "black", anchor="rm")
    for part in range(6):
        draw.text((60 + 128 * part, 440), str(part * last // 5), "black", anchor="mt")
    for name, color in (("loss", "black"), ("validation", "red")):
        points = []
        for entry in entries:
            if (entry.get(name) or 0) > 0:
                y = 220 - 280 * math.log10(entry[name])
                points.append((60 + 640 * entry["step"] / last, y))
        draw.line(points, color, 3)
    return image


# --- A run of MM-DiT ------------------------------------------------------------------------------
# What it is trained on: batches(step), the Batches `unseen` to validate on, the EncodedFolders of
# both, the frozen networks that encoded them, and the MMDiTConfig that fits all that.
Inputs = namedtuple("Inputs", "batches unseen training held_out vae text sizes precision")


def read_inputs(config, world, start=None) -> Inputs:
    """Encodes what no earlier run has encoded, and opens it. start: the model of --init."""
    count = config.steps * config.batch_size or int(2000 * config.minutes)
    count = min(config.num_scenes, max(64, count))               # No more than the run needs.
    until = math.inf if config.steps else STARTED + 15 * config.minutes          # a quarter of them
    training, held_out = encoded(config, world, count, until)
    config = replace(config, resolution=training.resolution)
    precision = pick_precision(config.precision, world.device)
    frozen = load_components(find_model_file(config.encoders), ("vae", "text"), precision)
    vae, text = frozen.vae.to(world.device), frozen.text.to(world.device)
    batches = Batches(training, vae.config, text.config, config, world)
    unseen = Batches(held_out, vae.config, text.config, config, world)
    sizes = model_sizes(config, vae.config, text.config, training.longest_side, start)
    return Inputs(batches, unseen, training, held_out, vae, text, sizes, precision)


def make_model(sizes, config, world, trained):
    """An MM-DiT without numbers yet, whole or as shards. Depth 38 is never whole on a GPU."""
    checkpoint = torch.utils.checkpoint.checkpoint
    with torch.device("meta"):
        model = MMDiT(sizes)
    for block in model.joint_blocks if trained else ():
        if config.compile:
            torch._dynamo.config.optimize_ddp = False            # DDP would cut blocks into pieces.
            block.forward = torch.compile(block.forward)
        if config.recompute:                                     # Nothing inside it is compiled.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    world.shard(model, pick_precision(config.precision, world.device))
    return model.to_empty(device=world.device)


def departures(config) -> str:
    """Where a run leaves the paper's numbers. (Sec. 5.3.3 has batches of 4096.)"""
    paper = PRESETS["paper"] | {"encoder_dropout": 0.464, "density": "lognorm(0, 1)"}
    ours = asdict(config)
    found = [f"{name} {ours[name]} ({paper[name]})" for name in paper if ours[name] != paper[name]]
    return f"not as in the paper (App. B.3): {', '.join(found) or 'nothing'}"


def read_config(arguments=None):
    """The TrainConfig of a new run, or of the run that --out goes on with."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_options(parser, TrainConfig)
    parser.add_argument("--preset", choices=PRESETS, help="paper is the default from depth 15 up")
    options = parser.parse_args(arguments)
    given = given_options(options, TrainConfig)
    for name in ("data", "init"):
        if Path(given.get(name, "")).exists() and given.get(name):
            given[name] = str(Path(given[name]).resolve())       # It holds in any working folder.
    folder = Path(given.get("out") or "runs/none")
    if not checkpoints_of(folder):
        if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").is_file():
            raise ValueError(f"--out {folder} is no run folder; choose another")
        default = "paper" if given.get("depth", 0) >= 15 else "tiny"
        return TrainConfig(**PRESETS[options.preset or default] | given)
    stored = read_json(folder / "config.json", {"train": dict, "encoders": dict})
    given = PRESETS.get(options.preset, {}) | given
    try:
        for name in ("depth", "qk_norm", "optimizer", "resolution", "seed", "batch_size"):
            if given.get(name, stored["train"][name]) != stored["train"][name]:
                raise ValueError(f"{name} {given[name]} cannot change within a run; change --out")
        given["num_scenes"] = stored["train"]["num_scenes"]      # The same pictures come again.
        encoders = run_encoders(folder)
        if "encoders" in given and fingerprint(given["encoders"], FROZEN) != fingerprint(
                encoders, FROZEN):
            raise ValueError("--encoders cannot change within a run; change --out")
        given["encoders"] = str(encoders)
        return TrainConfig(**stored["train"] | given)
    except (TypeError, KeyError) as problem:
        raise ValueError(f"{folder}/config.json is of another version: {problem}") from None


def main(arguments=None):
    """A whole run, from pictures to the score."""
    config = read_config(arguments)
    world = World(config.device, config.parallel, count_parameters(MMDiTConfig(config.depth)))
    if world.parallel != "ddp" and config.optimizer == "muon":
        raise ValueError("Muon works on whole matrices: give --optimizer adamw or --parallel ddp")
    if config.batch_size % (world.size * config.accumulate):
        raise ValueError(f"--batch-size {config.batch_size} is no multiple of ranks x --accumulate")
    number = 1
    while Path(f"runs/d{config.depth}-{number}").exists():
        number += 1
    folder = world.same(Path(config.out or f"runs/d{config.depth}-{number}"))
    start = load_components(config.init, ("mmdit",)).mmdit if config.init else None
    folder.mkdir(parents=True, exist_ok=True)                    # It is tried before the work.
    inputs = read_inputs(config, world, start)
    frozen = find_model_file(config.encoders)
    size = inputs.training.resolution
    if checkpoints_of(folder) and size != config.resolution:
        raise ValueError(f"--data has {size} px, but the run {config.resolution}; change --out")
    config = replace(config, num_scenes=max(64, len(inputs.training)), encoders=portable(frozen),
                     resolution=size)
    model = make_model(inputs.sizes, config, world, trained=True)
    average = make_model(inputs.sizes, config, world, trained=False)
    model.initialize(torch.Generator().manual_seed(config.seed), devices.assign)
    if start:
        load_weights(model, start, devices.assign)
    average.load_state_dict(model.state_dict())
    sampling = {"num_steps": 28, "guidance_scale": 4.0, "schedule": "shifted",
                "timestep_shift": config.timestep_shift, "unconditional": "zeros",
                "height": size, "width": size}
    pipeline = Pipeline(average, inputs.vae, inputs.text, sampling, world.device, inputs.precision)
    prompts = [inputs.held_out.captions(index)[0] for index in inputs.held_out.groups[0][:8]]
    t_density = density(config.density)
    def times(batch):
        return shift_time(t_density.quantile(batch.uniform), config.timestep_shift)    # (B,)

    def report(average, step):
        levels = validate(average, inputs.unseen.validation(64), inputs.precision)
        grid = captioned_grid(generate(pipeline, prompts, seed=1), prompts, 4)
        return {"validation": mean(levels[:-1]), "validation_by_t": levels.tolist()}, grid

    metadata = {"sampling": sampling, "words": () if config.data else sorted(vocabulary())}
    encoders = {"path": config.encoders, "fingerprint": fingerprint(frozen, FROZEN)}
    about = {"model": asdict(inputs.sizes), "encoders": encoders}
    run = Run(folder, config, world, times, report, average, metadata, about)
    run.say(f"{count_parameters(inputs.sizes):,} parameters, {len(inputs.training)} pictures, "
            f"{world.size} {world.device} {inputs.precision} {world.parallel}")
    run.say(departures(config))
    loss = partial(flow_loss, density=t_density, timestep_shift=config.timestep_shift)
    fit(model, loss, inputs.batches, config, run)
    conclude(run, pipeline, prompts[0])


def conclude(run, pipeline, prompt):
    """The score, if a run on scenes has none yet, and what to do next."""
    count = min(50, run.done // 20)                  # It takes less than a tenth of the training.
    if count and not (run.config.data or run.stopping or any("geneval" in e for e in run.entries)):
        size = run.config.resolution
        scores = geneval(pipeline, count, height=size, width=size)
        run.log(geneval=scores, num_prompts=count)
        run.say(f"{format_scores(scores)}, {count} prompts for each task")
    run.say(f"{run.folder} has done its {run.done} steps; more --steps or --minutes go on. Next:\n"
            f'python sample.py --checkpoint {run.folder} --prompt "{prompt}"')
    run.world.close()


if __name__ == "__main__":
    devices.command(main)
