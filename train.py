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
import dataclasses
import fcntl
import functools
import json
import math
import os
import resource
import shutil
import signal
import socket
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm import tqdm

from checkpoints import (
    ENCODERS,
    CheckpointError,
    find_model_file,
    fingerprint,
    load_components,
    portable,
    run_encoders,
    save_networks,
    write_atomically,
)
from data import HELD_OUT_SEED, ImageFiles, Scenes, captioned_grid
from encode import Batch, Batches, EncodedFolder, EncodedImages, is_encoded, read_index
from evaluate import draw_losses, format_scores, geneval
from flow import Formulation, RectifiedFlow, Shifted, Straight, formulation
from mmdit import MMDiT, MMDiTConfig, count_parameters, positions_of, sincos_2d, stretched_positions, training_flops
from sample import Pipeline, field_comments, generate, pick_device, pick_precision

warnings.filterwarnings("ignore", "torch.distributed is disabled")               # one process saves alone, in a thread

FIXED_PROMPTS = ("a red circle", "a blue square and a yellow star", "three green hearts", "a purple ring above a pink cross",
                 "a large orange triangle on a navy background", "two cyan diamonds on a gray background",
                 "a yellow circle left of a red square", "the word CAT")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines a run; the command line is made from it."""
    out: str = ""                      # run folder; empty: the first free runs/dDEPTH-N
    resume: str = ""                   # a run folder to go on with; other options then change that run's settings
    init: str = ""                     # a checkpoint whose MM-DiT a new run starts from, to fine-tune it
    data: str = ""                     # captioned pictures (folder, .tar, .jsonl, .csv) or encode.py's --out; empty: scenes
    encoders: str = "pretrained/tiny"  # checkpoint with the frozen VAE and text encoders
    tokenizers: str = ""               # folder with clip/ and t5/; empty: tokenizers/ beside the encoders
    num_scenes: int = 16384            # built-in scenes to draw and encode in advance
    resolution: int = 0                # px per side; 0: 64 for small models, 256 from depth 15 up
    depth: int = 4                     # the size of MM-DiT: width 64 * depth, depth heads (Sec. 4)
    qk_norm: bool = True               # RMSNorm on queries and keys (Sec. 5.3.2)
    weight_sets: int = 2               # 3: CLIP tokens, T5 tokens and image tokens each have their own (Sec. 5.2.3)
    minutes: float = 10.0              # length of the run, everything included; ignored where steps is given
    steps: int = 0                     # optimizer steps; 0: as many as fit in the minutes
    batch_size: int = 64               # samples per step over all processes
    accumulate: int = 1                # parts that a process splits its share of the batch into, to save memory
    optimizer: str = ""                # adamw, or muon: Muon for the blocks' matrices, AdamW for the rest; empty: muon for
                                       # small models, adamw where weights are shards and from depth 15 up
    lr: float = 0.0                    # of AdamW; 0: 1e-4 from depth 15 up (App. B.3), below 1e-3, or 6e-4 beside Muon
    muon_lr: float = 0.01              # of Muon: every singular direction of a matrix moves so far
    warmup: float = 0.03               # share of the run with rising learning rate
    cooldown: float = 0.8              # share of the run, at its end, with falling learning rate
    weight_decay: float = 0.01         # of AdamW; Muon keeps torch's 0.1
    max_grad_norm: float = 1.0         # gradients are scaled down to it
    ema: float = 0.03                  # memory of the averaged weights, as a share of the run
    encoder_dropout: float = 0.464     # each text encoder's chance to be zeroed (App. B.3)
    full_captions: float = 0.5         # share of full ("synthetic") captions where there are two kinds (Sec. 5.2.2)
    formulation: str = ""              # a straight one of Table 1, rf/mode(1.29) say; empty: rf/lognorm(m, s) with the next two
    logit_mean: float = 0.0            # m and s of Eq. 19
    logit_std: float = 1.0             # see logit_mean
    timestep_shift: float = 1.0        # alpha of Eq. 23, in training and in the sampling defaults
    guidance_scale: float = 4.0        # of the sample grids and the sampling defaults
    seed: int = 0                      # of weights, scenes, order, t and noise
    device: str = "auto"               # cuda, mps or cpu; auto: the first of them that is there
    precision: str = "auto"            # auto, bf16 (autocast) or fp32
    parallel: str = "auto"             # ddp, fsdp or hsdp; auto decides from the device's memory
    recompute: bool = False            # keep no activations inside blocks, compute them again in the backward pass
    compile: bool = False              # torch.compile, block by block: a minute to start, then faster; for long runs
    log_every: int = 20                # steps
    sample_every: float = 0.2          # share of the run between sample grids and validations
    save_every: float = 0.1            # share of the run between checkpoints
    keep_last: int = 2                 # checkpoints kept
    keep_every: int = 0                # steps between checkpoints that are kept for good; 0: none are
    tensorboard: bool = False          # also write events for TensorBoard, if it is installed
    num_prompts: int = 50              # per task of the six-task score at the end; 0: no score


# ------------------------------------------------------------------------------------------------------------
# Many processes: the only part that knows of them
# ------------------------------------------------------------------------------------------------------------

class World:
    """This process among all of them (rank 0 of 1 unless torchrun started us), and how the model is spread over them:
    "ddp", whole on each; "fsdp", sharded over all; "hsdp", sharded within a node and replicated over nodes."""

    def __init__(self, device: str = "auto", parallel: str = "auto", parameters: int = 0):
        env = lambda name, default: int(os.environ.get(name, default))
        self.rank, self.size, local_rank = env("RANK", 0), env("WORLD_SIZE", 1), env("LOCAL_RANK", 0)
        self.local_size = env("LOCAL_WORLD_SIZE", self.size)
        self.device, self.saving = pick_device(device), None
        if self.device.type == "cuda":
            if self.size > 1 or self.device.index is None:
                self.device = torch.device("cuda", local_rank)
            torch.cuda.set_device(self.device)
        if self.size > 1:
            if self.device.type == "mps":                                         # gloo cannot add up MPS tensors
                self.device = torch.device("cpu")
            self.join("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
            self.saving = torch.distributed.new_group(backend="gloo")             # of its own: saving goes on beside training
        fits = self.device.type != "cuda" or 20 * parameters < 0.5 * torch.cuda.get_device_properties(self.device).total_memory
        if parallel == "auto":            # weights, gradients, two moments and the average: 20 bytes a parameter in fp32
            parallel = "ddp" if self.size == 1 or fits else "hsdp" if self.size > self.local_size else "fsdp"
        self.parallel = parallel

    def join(self, backend: str):
        """Meet the other processes. torchrun's own store outlives its restarts, and with it the addresses of processes that
        were killed: rank 0 makes a new one at every start, and leaves in torchrun's only where that is."""
        TCPStore, store, timeout = torch.distributed.TCPStore, None, timedelta(hours=2)
        master, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            known = TCPStore(master, port, is_master=False, timeout=timeout)
            if self.rank == 0:
                with socket.create_connection((master, port)) as route:                       # our address as others see it
                    host = route.getsockname()[0]
                store = TCPStore(host, 0, self.size, is_master=True, timeout=timeout, wait_for_workers=False)
                known.set("store", f"{master if host.startswith('127.') else host} {store.port}")
            while store is None:
                try:
                    host, port = known.get("store").decode().split()
                    store = TCPStore(host, int(port), self.size, is_master=False, timeout=timedelta(seconds=5))
                    store.set_timeout(timeout)
                except torch.distributed.DistError:                                           # that of a start that is over
                    time.sleep(1)
        torch.distributed.init_process_group(backend, store=store, timeout=timeout,
                                             **({"rank": self.rank, "world_size": self.size} if store else {}))

    @functools.cached_property
    def mesh(self):
        """The processes that share a copy of the weights, or (copies, processes of each): one set of groups for all models."""
        shape = (self.size // self.local_size, self.local_size) if self.parallel == "hsdp" else (self.size,)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape):])

    def shard(self, model, precision):
        """Each block, then what is left of the model, becomes shards that FSDP2 gathers when it runs them: stored and
        summed up in fp32, gathered in `precision` (the small outer layers in fp32; inputs are never cast, t least of all)."""
        if self.parallel == "ddp":
            return
        policy = lambda dtype: MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.joint_blocks:
            fully_shard(block, mesh=self.mesh, mp_policy=policy(precision))
            register_fsdp_forward_method(block, "modulation")
        fully_shard(model, mesh=self.mesh, mp_policy=policy(torch.float32), reshard_after_forward=True)
        register_fsdp_forward_method(model, "prepare")

    def wrap(self, model):
        """What training calls: for "ddp" on several processes the wrapper that averages gradients inside backward()."""
        if self.parallel != "ddp" or self.size == 1:
            return model
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def gather(self, values):
        """(n,) of this process -> (size * n,) of all, by rank."""
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

    def any(self, flag: bool) -> bool:
        """Is it true on some rank?"""
        if self.size == 1:
            return flag
        box = torch.tensor(int(flag))
        torch.distributed.all_reduce(box, torch.distributed.ReduceOp.MAX)
        return bool(box)

    def close(self):
        if self.size > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()


def assign(parameter, value):
    """parameter <- value, a whole tensor on the CPU that is the same on every rank; a shard takes its part."""
    if isinstance(parameter, DTensor):
        value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)


def whole(tensor):
    """The whole of a sharded tensor, gathered from all ranks; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(parameters):
    """What this process holds of each parameter. Without gradients: a DTensor's own storage only then."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in parameters]


def synchronized(model, last: bool):
    """A context in which backward() averages gradients over the processes only if this is the step's last part."""
    if hasattr(model, "set_requires_all_reduce"):                                 # FSDP2: shards sum up each part, else whole
        model.set_requires_all_reduce(last)                                       # gradients pile up; copies of shards once
    return model.no_sync() if hasattr(model, "no_sync") and not last else nullcontext()


# ------------------------------------------------------------------------------------------------------------
# One step
# ------------------------------------------------------------------------------------------------------------

def train_step(model, optimizers, batch: Batch, formulation, config: TrainConfig, autocast):
    """One update from this process's share of the batch. Nothing here knows how many processes exist: the data-parallel
    wrapper averages gradients inside backward(), and every random number was drawn in `Batches`.

    Returns loss (B,), t (B,), the gradient's norm before clipping (float); a non-finite norm skips the update.
    """
    t = formulation.density.quantile(batch.uniform).to(batch.latent.device)           # (B,)  Eq. 19
    losses = []
    parts = [part.chunk(config.accumulate) for part in (batch.latent, batch.context, batch.pooled, t, batch.noise)]
    for i, (latent, context, pooled, t_part, noise) in enumerate(zip(*parts)):
        last = i == config.accumulate - 1
        with synchronized(model, last):
            with autocast():
                loss = formulation.loss(model, latent, context, pooled, t_part, noise)    # (B / accumulate,)
            (loss.sum() / len(t)).backward()
        losses.append(loss.detach())
    grad_norm = whole(nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)).item()     # waits for the GPU
    for optimizer in optimizers:
        if math.isfinite(grad_norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return torch.cat(losses), t, grad_norm


def compute_context(device, precision):
    """Matrix products in `precision`."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def make_optimizers(model, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW, as in App. B.3; or Muon for the weight matrices of attention and MLPs and AdamW for the rest, which needs about
    half the images (README, results)."""
    in_muon = lambda name, p: (config.optimizer == "muon" and p.dim() == 2 and name.startswith("joint_blocks")
                               and "adaLN" not in name)
    matrices = [p for name, p in model.named_parameters() if in_muon(name, p)]
    others = [p for name, p in model.named_parameters() if not in_muon(name, p)]
    adam = torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay,
                             eps=1e-15 if config.qk_norm else 1e-8, fused=True)                     # Sec. 5.3.2
    return [adam, torch.optim.Muon(matrices, lr=config.muon_lr)] if matrices else [adam]


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Linear warm-up, constant, linear cool-down to zero, in shares of the run: the factor of each peak rate, in (0, 1]."""
    rise = (step + 1) / max(1, config.warmup * steps)
    fall = (steps - step) / max(1, config.cooldown * steps)
    return min(1.0, rise, fall)


def set_learning_rates(optimizers, factor: float, config: TrainConfig):
    """Every optimizer at `factor` times its peak rate. Set at every step, so that a resumed run takes changed settings."""
    adam, *muon = (optimizer.param_groups[0] for optimizer in optimizers)
    adam |= {"lr": factor * config.lr, "weight_decay": config.weight_decay}
    for group in muon:
        group["lr"] = factor * config.muon_lr


@torch.no_grad()
def update_average(average, model, step: int, steps: int, config: TrainConfig):
    """EMA in fp32, with a memory of `config.ema` of the run (the paper's 0.99 every 100 steps belongs to long runs)."""
    decay = min(1 - 1 / max(2.0, config.ema * steps), (step + 1) / (step + 10))
    torch._foreach_lerp_(local(average.parameters()), local(model.parameters()), 1 - decay)


@torch.no_grad()
def validate(model, batches: Batches, formulation, autocast, levels: int = 8, count: int = 64):
    """Loss at equally spaced t in [0, 1] (App. B.3), on the same pictures, captions and noise every time: (levels,)."""
    losses = []                                                                       # one (levels, B) for each picture size
    for latent, context, pooled, noise in batches.validation(count):
        with autocast():
            losses.append(torch.stack([formulation.loss(model, latent, context, pooled, t.expand(len(latent)).to(latent), noise)
                                       for t in torch.linspace(0, 1, levels)]))
    return torch.cat(losses, dim=1).mean(dim=1).cpu()


# ------------------------------------------------------------------------------------------------------------
# The run folder
# ------------------------------------------------------------------------------------------------------------

class Run:
    """runs/NAME: config.json, log.jsonl, loss.png, samples-STEP.png, model.safetensors (EMA), checkpoints/STEP. Every rank has
    one, since shards are gathered and saved by all; rank 0 alone writes the rest."""

    def __init__(self, folder: Path, config: TrainConfig, first_step: int, steps: int, s, world: World):
        self.folder, self.config, self.world, self.saving, self.events = folder, config, world, None, None
        if world.rank:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(folder / "lock", "w")                                    # the system frees it when we die
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another process is writing into {folder}; wait for it, or choose another --out") from None
        if config.resume:                                                         # forget what came after the checkpoint
            lines = [json.dumps(entry) + "\n" for entry in self.logged() if entry["step"] <= first_step]
            write_atomically(folder / "log.jsonl", lambda file: file.write_text("".join(lines)))
        settings = {"train": dataclasses.asdict(dataclasses.replace(config, steps=steps, resume="")),
                    "encoders": {"path": portable(s.encoders_file), "tokenizers": config.tokenizers,
                                 "fingerprint": fingerprint(s.encoders_file, ENCODERS)}}
        write_atomically(folder / "config.json", lambda file: file.write_text(json.dumps(settings, indent=1)))
        if config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("--tensorboard true needs the package: pip install tensorboard") from None
            self.events = SummaryWriter(folder / "tensorboard")

    def log(self, **entry):
        """One line of log.jsonl, by rank 0."""
        if self.world.rank:
            return
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(entry) + "\n")
        for name, value in entry.items() if self.events else ():
            if isinstance(value, (int, float)):
                self.events.add_scalar(name, value, entry["step"])

    def logged(self) -> list[dict]:
        """The lines of log.jsonl so far; one that a kill cut in the middle is left out."""
        entries, file = [], self.folder / "log.jsonl"
        for line in file.read_text().splitlines() if file.is_file() else ():
            with suppress(json.JSONDecodeError):
                entries.append(json.loads(line))
        return entries

    def report(self, s, step: int):
        """Validation losses, a grid of samples of fixed prompts from fixed noise, and the loss curve so far."""
        levels = validate(s.average, s.held_out, s.formulation, s.autocast)
        self.log(step=step, validation=round(levels[:-1].mean().item(), 6),                     # without t = 1
                 validation_by_t=[round(level, 5) for level in levels.tolist()])
        pictures = generate(s.pipeline, s.prompts, seed=1)
        if self.world.rank == 0:
            grid, curve = captioned_grid(pictures, s.prompts, 4), draw_losses(self.logged())
            for picture, name in ((grid, f"samples-{step:06}.png"), (curve, "loss.png")):
                write_atomically(self.folder / name, lambda file, picture=picture: picture.save(file, format="PNG"))

    def save(self, s, step: int):
        """Begin checkpoints/STEP, to resume from: copied now, written while training goes on, under a temporary name until
        `finish_saving`. And model.safetensors, the average."""
        self.finish_saving()
        target = self.folder / "checkpoints" / f"{step:08}"
        partial = target.with_name(target.name + ".partial")
        if self.world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        self.world.any(False)                                                     # nobody writes before it is gone
        with self.saving_to(partial):
            self.saving = partial, dcp.async_save(run_state(s.model, s.average, s.optimizers, step), checkpoint_id=partial,
                                                  no_dist=self.world.size == 1, process_group=self.world.saving)
        weights = {}
        for name, tensor in s.average.state_dict().items():                       # all ranks gather, rank 0 keeps
            tensor = whole(tensor)
            if self.world.rank == 0:
                weights[name] = tensor.cpu()
        if self.world.rank == 0:
            with torch.device("meta"):
                average = MMDiT(s.average.config)
            average.load_state_dict(weights, assign=True)
            save_networks(self.folder / "model.safetensors", {"mmdit": average}, sampling=s.pipeline.defaults)

    def finish_saving(self, wait: bool = True):
        """Once the checkpoint is written it gets its name, and older ones go. wait: until then; else look, and come back."""
        if self.saving is None or not (wait or self.saving[1].done()):
            return
        partial, future = self.saving
        self.saving = None
        with self.saving_to(partial):
            future.result()
            if self.world.rank == 0:
                shutil.rmtree(partial.with_suffix(""), ignore_errors=True)
                partial.rename(partial.with_suffix(""))
        milestone = lambda old: self.config.keep_every and int(old.name) % self.config.keep_every == 0
        for old in whole_checkpoints(self.folder)[: -self.config.keep_last] if self.world.rank == 0 else ():
            if not milestone(old):
                shutil.rmtree(old, ignore_errors=True)

    @contextmanager
    def saving_to(self, partial: Path):
        """Turns any failure to write a checkpoint into one sentence, and leaves nothing half-written."""
        try:
            yield
        except Exception as problem:                                              # a full disk shows as several types
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(f"could not save {partial.with_suffix('')} ({problem}); the last good checkpoint is untouched. "
                          f"Free some space and go on with --resume {self.folder}") from None


def run_state(model, average, optimizers, step: int) -> dict:
    """What a run is resumed from. Random numbers need no state: they are keyed by step and index."""
    return {"model": model.state_dict(), "average": average.state_dict(), "step": step,
            "optimizer": get_optimizer_state_dict(model, optimizers)}


def restore(folder: Path, model, average, optimizers, world: World) -> int:
    """Load the newest checkpoint of a run in place, whatever number of processes wrote it; returns the steps done, 0 where the
    run ended before its first.

    torch.distributed.checkpoint pickles its metadata: only resume from your own runs.
    """
    found = world.same(whole_checkpoints(folder)[-1:])
    if not found:
        return 0
    state = run_state(model, average, optimizers, 0)
    dcp.load(state, checkpoint_id=found[0], no_dist=world.size == 1)
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    set_optimizer_state_dict(model, optimizers, state["optimizer"])
    return state["step"]


def whole_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run that were written to the end, oldest first."""
    return sorted(p for p in (folder / "checkpoints").glob("[0-9]*") if p.suffix != ".partial")


# ------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------

def parse_config() -> TrainConfig:
    """TrainConfig from the command line; with --resume, what is not given comes from the run's config.json."""
    parser = argparse.ArgumentParser(description="Train MM-DiT with rectified flow.", allow_abbrev=False)
    comments = field_comments(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        kind = {"type": true_or_false, "nargs": "?", "const": True} if field.type is bool else {"type": field.type}
        parser.add_argument("--" + field.name.replace("_", "-"), help=f"{comments[field.name]} (default {field.default!r})",
                            **kind)
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0            # not the count, which differs between nodes
    if restarts and "out" in given and (Path(given["out"]) / "config.json").is_file():
        given.setdefault("resume", given["out"])
    if "resume" in given:
        file = Path(given["resume"]) / "config.json"
        if not file.is_file():
            parser.error(f"--resume {given['resume']}: no config.json there; give the folder of a run")
        stored = json.loads(file.read_text())["train"]
        fixed = [name for name in ("depth", "qk_norm", "optimizer", "weight_sets", "resolution", "encoders", "seed", "batch_size")
                 if name in given and given[name] != stored[name]]
        if fixed:
            parser.error(f"--{fixed[0].replace('_', '-')} {given[fixed[0]]} differs from {stored[fixed[0]]}, with which "
                         f"{given['resume']} was started; it cannot change within a run")
        given = {**stored, **given, "out": given["resume"]}
    return complete(TrainConfig(**given))


def true_or_false(text: str) -> bool:
    """The value of an option such as --compile, which alone means true."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def complete(config: TrainConfig) -> TrainConfig:
    """Fill in what depends on other settings, and refuse what cannot work, before anything is read or written."""
    for name in ("num_scenes", "minutes", "batch_size", "accumulate", "muon_lr", "logit_std", "timestep_shift",
                 "log_every", "keep_last"):
        if getattr(config, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)} must be greater than 0")
    for name in ("resolution", "steps", "lr", "weight_decay", "sample_every", "save_every", "num_prompts"):
        if getattr(config, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)} must be 0 or greater")
    for name, choices in (("precision", ("auto", "bf16", "fp32")), ("optimizer", ("", "adamw", "muon")),
                          ("parallel", ("auto", "ddp", "fsdp", "hsdp"))):
        if getattr(config, name) not in choices:
            raise ValueError(f"--{name} {getattr(config, name)}: choose {', '.join(choices)}")
    if config.parallel in ("fsdp", "hsdp") and (config.optimizer == "muon" or "RANK" not in os.environ):
        raise ValueError(f"--parallel {config.parallel} needs --optimizer adamw (Muon works on whole matrices) and torchrun")
    encoded_at = read_index(Path(config.data))["resolution"] if is_encoded(config.data) else 0
    resolution = config.resolution or encoded_at or (64 if config.depth < 15 else 256)
    if encoded_at not in (0, resolution):
        raise ValueError(f"--resolution {resolution}: {config.data} was encoded at {encoded_at} px")
    if resolution % 16:
        raise ValueError(f"--resolution {resolution} is not a multiple of 16 px (VAE factor 8 x patch 2)")
    training_formulation(config)                                                  # refuses what it cannot be
    if config.depth < 1 or config.weight_sets not in (2, 3):
        raise ValueError(f"--depth {config.depth} --weight-sets {config.weight_sets}: depth is at least 1, "
                         f"weight sets are 2 or 3")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if config.batch_size % (world_size * config.accumulate):
        raise ValueError(f"--batch-size {config.batch_size} must be a multiple of {world_size} processes x "
                         f"{config.accumulate} accumulated parts")
    if config.data and not Path(config.data).exists():
        raise ValueError(f"--data {config.data}: no such file or folder")
    out = config.out or next(f"runs/d{config.depth}-{n}" for n in range(1, 10000)
                             if not Path(f"runs/d{config.depth}-{n}").exists())
    if Path(out).exists() and not config.resume:
        raise ValueError(f"{out} exists already; go on with --resume {out}, or choose another --out")
    small, sharded = config.depth < 15, config.parallel in ("fsdp", "hsdp")
    optimizer = config.optimizer or ("muon" if small and not sharded else "adamw")
    lr = config.lr or ((6e-4 if optimizer == "muon" else 1e-3) if small else 1e-4)
    return dataclasses.replace(config, resolution=resolution, out=out, optimizer=optimizer, lr=lr)


def training_formulation(config: TrainConfig) -> Formulation:
    """What the loss is and how t is drawn: the straight path, and the density that --formulation names, after Eq. 23."""
    if config.formulation and (config.logit_mean, config.logit_std) != (TrainConfig.logit_mean, TrainConfig.logit_std):
        raise ValueError(f"--formulation {config.formulation} says how t is drawn; leave out --logit-mean and --logit-std")
    form = formulation(config.formulation or f"rf/lognorm({config.logit_mean}, {config.logit_std})")
    if form.process != Straight():
        raise ValueError(f"--formulation {form.name} is not on the straight path, along which sample.py draws; choose rf, "
                         f"rf/lognorm(m, s), rf/mode(s) or rf/cosmap, or train it in experiments/table1_flows.py")
    return RectifiedFlow(Shifted(form.density, config.timestep_shift) if config.timestep_shift != 1 else form.density)


def open_data(config: TrainConfig, encoders_file: Path):
    """(training source, validation source): scenes of two seeds, or one picture in fifty of the user's, at most 64. Sources are
    pictures, or EncodedFolders where encode.py wrote --data."""
    if not config.data:
        return Scenes(config.num_scenes, config.seed), Scenes(64, HELD_OUT_SEED)
    files = EncodedFolder(config.data, encoders_file) if is_encoded(config.data) else ImageFiles(config.data)
    held_out = min(64, max(1, len(files) // 50))
    if isinstance(files, EncodedFolder):
        return files.split(held_out)
    return files.subset(range(held_out, len(files))), files.subset(range(held_out))


def seconds_per_step(model, setup, config: TrainConfig, trials: int = 6) -> float:
    """Median time of a training step, measured at learning rate 0, which moves no weight; the optimizer then forgets it."""
    times = []
    set_learning_rates(setup.optimizers, 0.0, config)
    for step in range(trials):
        start = time.time()
        train_step(model, setup.optimizers, setup.batches(step), setup.formulation, config, setup.autocast)
        times.append(time.time() - start)
    for optimizer in setup.optimizers:
        optimizer.state.clear()
    return float(np.median(times[1:]))


@dataclass
class Setup:
    """Everything a run works with, on this process."""
    model: MMDiT
    average: MMDiT                # EMA of the weights: what is validated, sampled and kept
    optimizers: list[torch.optim.Optimizer]
    formulation: Formulation
    batches: Batches
    held_out: Batches
    pipeline: Pipeline            # samples from the average
    prompts: list[str]            # of the sample grids
    autocast: object
    encoders_file: Path


def make_model(sizes: MMDiTConfig, config: TrainConfig, world: World, precision, trained: bool) -> MMDiT:
    """An MM-DiT without numbers yet, on this process's device: the whole, or the shards that are this rank's. It is laid out
    without memory first, so that depth 38 is never whole on a GPU. The average is not `trained`: it stays uncompiled, for the
    sampler's shapes vary."""
    with torch.device("meta"):
        model = MMDiT(sizes)
    for block in model.joint_blocks if trained else ():
        if config.compile:
            torch._dynamo.config.optimize_ddp = False                 # DDP would cut the blocks up at its buckets
            block.forward = torch.compile(block.forward)
        if config.recompute:                                          # outside: nothing inside a checkpoint is compiled else
            block.forward = functools.partial(recomputed, block.forward, use_reentrant=False)
    world.shard(model, precision)
    return model.to_empty(device=world.device)


def set_up(config: TrainConfig, world: World, say) -> Setup:
    """Load the frozen networks, encode the pictures, make the model and its optimizers."""
    encoders_file = find_model_file(config.encoders)
    if config.resume:
        run_encoders(Path(config.resume))                             # they must still be the ones it began with
    precision = pick_precision(config.precision, world.device)
    frozen = load_components(encoders_file, ("vae", "text"), precision, config.tokenizers)
    vae, text = frozen.vae.to(world.device), frozen.text.to(world.device)
    source, held_out = open_data(config, encoders_file)
    longest = source.longest_side if isinstance(source, EncodedFolder) else config.resolution
    side = max(16, longest // 16)                                     # small models get a grid no larger than they need
    small = {"pos_embed_max_size": side, "pos_embed_base_size": side} if config.depth < 15 else {}
    sizes = MMDiTConfig(config.depth, latent_channels=vae.config.latent_channels, context_dim=text.config.context_dim,
                        pooled_dim=text.config.pooled_dim, qk_norm=config.qk_norm,
                        clip_tokens=text.config.clip_length if config.weight_sets == 3 else 0, **small)
    autocast = lambda: compute_context(world.device, precision)
    say(f"MM-DiT of depth {config.depth}: {count_parameters(sizes) / 1e6:.1f} M parameters; {len(source)} pictures at "
        f"{config.resolution} px; {world.size} x {world.device}, {str(precision).removeprefix('torch.')}")
    if not config.data:
        say("training on built-in scenes; your own pictures: --data PATH, released encoders: --encoders FILE")

    model, average = (make_model(sizes, config, world, precision, trained) for trained in (True, False))
    model.initialize(torch.Generator().manual_seed(config.seed), assign)
    if config.init and not whole_checkpoints(Path(config.out)):
        start = load_components(config.init, ("mmdit",))
        load_weights(model, start.mmdit, config.init, start.sampling.get("height", config.resolution), config.resolution)
    average.load_state_dict(model.state_dict())
    average.requires_grad_(False)
    optimizers = make_optimizers(model, config)
    encode = lambda part: part if isinstance(part, EncodedFolder) else EncodedImages(
        part, vae, text, config.resolution, world.device, autocast, world.rank > 0)
    batches, held_out_batches = (Batches(encode(part), vae, text.config, config, world) for part in (source, held_out))
    sampling = {"num_steps": 28, "guidance_scale": config.guidance_scale, "timestep_shift": config.timestep_shift,
                "schedule": "shifted", "solver": "euler", "unconditional": "zeros", "height": config.resolution,
                "width": config.resolution}
    pipeline = Pipeline(average, vae, text, sampling, world.device, precision)
    shown = [int(index) for group in held_out_batches.images.groups for index in group][:8]
    prompts = [held_out_batches.images.captions(index)[0] for index in shown] if config.data else list(FIXED_PROMPTS)
    return Setup(model, average, optimizers, training_formulation(config), batches, held_out_batches, pipeline, prompts,
                 autocast, encoders_file)


@torch.no_grad()
def load_weights(model: MMDiT, weights: MMDiT, name: str, trained: int, resolution: int):
    """Start from another model of the same depth: QK-norm may be new, and positions are stretched from the resolution that it
    was trained at, in pixels, to this run's (Sec. 5.3.2)."""
    ours, theirs = ({key: tuple(p.shape) for key, p in m.named_parameters()} for m in (model, weights))
    fresh = {key for key in ours if ".attn.ln_" in key} - theirs.keys()           # QK-norm for a model trained without
    different = sorted(key for key in (ours.keys() | theirs.keys()) - fresh if ours.get(key) != theirs.get(key))
    if different:
        raise ValueError(f"--init {name} is a model of other sizes: {different[0]} is {theirs.get(different[0])} there and "
                         f"{ours.get(different[0])} here. Give its --depth, --qk-norm, --weight-sets and --resolution")
    values = dict(weights.named_parameters())
    for key, parameter in model.named_parameters():
        if key in values:
            assign(parameter, values[key])
    side = stretched_positions(positions_of(weights.pos_embed), trained // 16, model.config.pos_embed_max_size, resolution // 16)
    model.pos_embed.copy_(sincos_2d(side, side, model.config.hidden_size)[None])


def train(config: TrainConfig) -> Path:
    """A whole run, from data to scores. Returns its folder."""
    started = time.time()
    world = World(config.device, config.parallel, count_parameters(MMDiTConfig(config.depth)))
    if world.parallel != "ddp" and config.optimizer == "muon":
        raise ValueError("the weights are shards here and Muon works on whole matrices: give --optimizer adamw or --parallel ddp")
    say = print if world.rank == 0 else lambda *_: None
    s = set_up(config, world, say)
    folder, steps, model = Path(config.out), config.steps, world.wrap(s.model)
    first_step = restore(folder, s.model, s.average, s.optimizers, world) if config.resume else 0
    if not steps:
        step_seconds = seconds_per_step(model, s, config)
        left = 60 * config.minutes * 0.87 - (time.time() - started) - 0.4 * config.num_prompts     # saves, samples, scores
        steps = world.same(max(1, int(left / step_seconds)))
    run = Run(folder, config, first_step, steps, s, world)
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))                  # preemption: save and go

    meter, skipped = Meter(s, config, world), 0
    bar = tqdm(total=steps, initial=first_step, disable=world.rank > 0, unit="step", smoothing=0.05)
    for step in range(first_step, steps):
        set_learning_rates(s.optimizers, learning_rate(step, steps, config), config)
        with meter.waiting():
            batch = s.batches(step)
        loss, t, grad_norm = train_step(model, s.optimizers, batch, s.formulation, config, s.autocast)
        meter.add(loss, t, grad_norm)
        done, finite = step + 1, math.isfinite(grad_norm)
        if finite:
            update_average(s.average, s.model, step, steps, config)
        skipped = 0 if finite else skipped + 1
        if skipped == 10:
            raise RuntimeError(f"loss or gradient was not finite 10 times in a row, last at step {done}. The last checkpoint "
                               f"is good: --resume {folder} with a lower --lr, or start anew with --qk-norm true")
        bar.update()
        stopping = world.any(bool(stop))
        if done % config.log_every == 0 or done == steps:
            entry = meter.read(done)
            run.log(**entry)
            bar.set_postfix_str(f"loss {entry['loss'] or math.nan:.3f}, {entry['images_per_second']:.0f} images/s")
        run.finish_saving(wait=False)
        with meter.paused():
            if (every(done, steps, config.sample_every) or done == steps) and not stopping:
                run.report(s, done)
            milestone = config.keep_every and done % config.keep_every == 0
            if every(done, steps, config.save_every) or milestone or done == steps or stopping:
                run.save(s, done)
        if stopping:
            break
    bar.close()
    run.finish_saving()
    if stopping and done < steps:
        say(f"stopped by SIGTERM after step {done}, saved; go on with --resume {folder}")
    elif not config.data and config.num_prompts:
        draw = lambda prompts, first: [np.asarray(picture) for picture in generate(
            s.pipeline, prompts, HELD_OUT_SEED + first, batch_size=len(prompts))]
        scores = geneval(draw, config.num_prompts, height=config.resolution, width=config.resolution)
        run.log(step=steps, geneval=scores)
        say(format_scores(scores))
    say(f"{(time.time() - started) / 60:.1f} minutes; the model, log.jsonl, loss.png and samples are in {folder}. "
        f'Next: python sample.py --checkpoint {folder} --prompt "{s.prompts[0]}"')
    world.close()
    return folder


def matmul_peak(device, dtype) -> float:
    """FLOP/s of a square matrix product, measured: what the share of it that training reaches (MFU) is taken of."""
    size = 8192 if device.type == "cuda" else 2048
    a, b, times = torch.randn(size, size, dtype=dtype, device=device), torch.randn(size, size, dtype=dtype, device=device), []
    for _ in range(6):
        start = time.time()
        (a @ b)[0, 0].item()                                                      # waits for the result
        times.append(time.time() - start)
    return 2 * size**3 / min(times)


def every(done: int, steps: int, share: float) -> bool:
    """True at multiples of the share of the run."""
    return share > 0 and done % max(1, round(share * steps)) == 0


class Meter:
    """What log.jsonl says about the steps since its last line."""

    def __init__(self, s, config: TrainConfig, world: World):
        self.config, self.world = config, world
        text = s.pipeline.text.config
        tokens = text.clip_length + text.t5_length, (config.resolution // 16) ** 2
        self.flops = training_flops(s.model.config, *tokens)                      # of one sample
        self.peak = matmul_peak(world.device, s.pipeline.precision)
        self.reset()

    def reset(self):
        self.loss, self.t, self.norm, self.wait, self.start = [], [], [], 0.0, time.time()

    @contextmanager
    def waiting(self):
        """Time in here is spent waiting for data."""
        start = time.time()
        yield
        self.wait += time.time() - start

    def add(self, loss, t, grad_norm):
        """One step: loss (B,), t (B,), gradient norm."""
        self.loss.append(loss)
        self.t.append(t)
        self.norm.append(grad_norm)

    @contextmanager
    def paused(self):
        """Time in here does not count: images a second are those of training."""
        start = time.time()
        yield
        self.start += time.time() - start

    def read(self, step: int) -> dict:
        """A log line. All ranks call it together."""
        loss, t = (self.world.gather(torch.cat(values)) for values in (self.loss, self.t))
        seconds = time.time() - self.start
        entry = summarize(loss, t, torch.tensor(self.norm))
        rate = len(loss) / seconds
        flops = rate * self.flops / self.world.size
        if self.world.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / 1e9
        else:
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
        entry |= {"images_seen": step * self.config.batch_size, "images_per_second": round(rate, 1),
                  "tflops_per_process": round(flops / 1e12, 4), "mfu": round(flops / self.peak, 4), "memory_gb": round(memory, 3),
                  "data_wait": round(self.wait / seconds, 4)}
        self.reset()
        return {"step": step, **entry}


def summarize(loss, t, norms) -> dict:
    """loss (n,), t (n,), gradient norms (steps,) -> means over what is finite, null where nothing is (a tenth of t without a
    sample, say). `skipped` counts the steps whose gradient was not, `spikes` those with 5 times the median norm."""
    loss, t, norms = loss.float().cpu(), t.float().cpu(), norms.float().cpu()

    def mean(values):
        values = values[values.isfinite()]
        return round(values.mean().item(), 6) if len(values) else None

    tenth, finite = (t * 10).long().clamp_max(9), norms[norms.isfinite()]
    return {"loss": mean(loss), "loss_by_t": [mean(loss[tenth == i]) for i in range(10)], "grad_norm": mean(norms),
            "skipped": len(norms) - len(finite), "spikes": int((finite > 5 * finite.median()).sum()) if len(finite) else 0}


def main():
    """From the command line to a run."""
    try:
        train(parse_config())
    except (CheckpointError, ValueError, RuntimeError, OSError) as problem:
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        sys.exit(f"train.py: {rank}{problem}")
    except KeyboardInterrupt:
        sys.exit("train.py: stopped; go on with --resume RUN")


if __name__ == "__main__":
    main()
