"""encode.py: what the frozen networks do for training: pictures -> latents, captions -> context (SD3, App. E.1, B.2, B.3).

Read with   App. E.1 (compute once, half precision, no random augmentation), Table 7 (what that saves and costs),
            App. B.3 (encoder dropout), Sec. 5.3.2 (batches of one size each, for mixed aspect ratios)
Not here    the networks (vae.py, text_encoders.py), reading pictures and choosing sizes (data.py), the loop (train.py)
Two homes   EncodedImages   everything in memory: small data, encoded at the start of a run
            EncodedFolder   index.json and memory-mapped shard-NNNNN.safetensors, written once by this file's `main`
Randomness  every draw of a batch comes from (seed, step, index in the global batch), never from a process's own stream
Shapes      N pictures   U different captions   B samples of this process   C latent channels   H W latent height, width
            L CLIP tokens   L' T5 tokens
Run         python encode.py     our Table 7: memory, milliseconds and kilobytes per sample of each shipped encoder
            python encode.py --data PATH --out DIR [--resolution 256] [--buckets]     then train.py --data DIR
            torchrun --nproc_per_node 8 encode.py ...     each process takes its share of the shards; a second start goes on
"""

import argparse
import copy
import hashlib
import json
import os
import shlex
import sys
import time
from bisect import bisect_right
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from checkpoints import (
    ENCODERS,
    SHIPPED,
    CheckpointError,
    find_model_file,
    fingerprint,
    load_components,
    open_safetensors,
    portable,
    write_atomically,
)
from data import (
    ImageFiles,
    Scenes,
    UnreadableImage,
    aspect_buckets,
    check_problems,
    nearest_bucket,
    read_ahead,
    readable,
    to_tensor,
)
from sample import pick_device, pick_precision
from text_encoders import TextConfig, combine, drop_encoders
from vae import VAEConfig, sample_code

# ------------------------------------------------------------------------------------------------------------
# What is stored, and how it is computed
# ------------------------------------------------------------------------------------------------------------

def layout(vae: VAEConfig, text: TextConfig, height: int, width: int) -> dict:
    """{name: (shape of a sample, type)} of what is stored for a picture of height x width px and for one caption of it.

    With SD3's sizes at 256 x 256 px this is Table 7's storage column: 65.5, 121.3, 202.2 and 630.7 kB a sample. The zeros
    that pad CLIP's channels to T5's width (App. B.2) are not stored.
    """
    f = vae.downsampling
    return {"moments": ((2 * vae.latent_channels, height // f, width // f), torch.float16),   # means, log-variances
            "clip_l": ((text.clip_length, text.clip_l_width), torch.float16),
            "clip_g": ((text.clip_length, text.clip_g_width), torch.float16),
            "t5": ((text.t5_length, text.t5_width), torch.float16),
            "pooled_l": ((text.clip_l_width,), torch.float32), "pooled_g": ((text.clip_g_width,), torch.float32)}


def sample_bytes(vae: VAEConfig, text: TextConfig, height: int, width: int) -> dict:
    """{"vae", "clip_l", "clip_g", "t5"} -> bytes stored for one picture, or for one caption (Table 7, Storage)."""
    size = {name: torch.Size(shape).numel() * kind.itemsize for name, (shape, kind) in layout(vae, text, height, width).items()}
    return {"vae": size["moments"], "clip_l": size["clip_l"] + size["pooled_l"], "clip_g": size["clip_g"] + size["pooled_g"],
            "t5": size["t5"]}


@dataclass
class Shard:
    """Encoded pictures of one size with their captions. Equal captions are stored once."""
    tensors: dict               # as `layout`, with N rows of "moments" and U rows of the others, and two of int64:
                                # the captions of picture i are rows caption_row[caption_start[i] : caption_start[i + 1]]
    captions: list[str]         # U

    @cached_property
    def arrays(self) -> dict:
        """The same memory as numpy arrays, whose rows are cheaper to address and to copy."""
        return {name: tensor.numpy() for name, tensor in self.tensors.items()}

    def rows(self, i: int) -> list[int]:
        """The rows of the captions of picture i, in their order."""
        start, end = self.arrays["caption_start"][i : i + 2]
        return self.arrays["caption_row"][start:end].tolist()


def encode_shard(samples, height: int, width: int, vae, text, device, autocast, show=lambda items, name, unit: items) -> Shard:
    """Encode pictures of one size, and their captions. All goes in groups of 64, pictures of more than 256 x 256 px in fewer, so
    the numbers depend on the samples alone.

    samples: (uint8 (height, width, 3), captions) each; height, width: pixels; show: a progress bar around an iterable.
    """
    wanted = layout(vae.config, text.config, height, width)
    parts = {name: [torch.zeros(0, *shape, dtype=kind)] for name, (shape, kind) in wanted.items()}      # a shard may be empty

    def keep(**results):
        for name, value in results.items():
            parts[name].append(value.to(wanted[name][1]).cpu())

    pending, captions, together = [], [], max(1, min(64, 64 * 256**2 // (height * width)))

    def flush():
        image = torch.from_numpy(np.stack(pending)).to(device)                                      # (n, 8H, 8W, 3) uint8
        image = (image.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous()                        # (n, 3, 8H, 8W), n <= 64
        with torch.no_grad(), autocast():
            keep(moments=torch.cat(vae.encode_moments(image), dim=1))                               # (n, 2C, H, W)
        pending.clear()

    for picture, its_captions in show(samples, "encoding pictures", "image"):
        pending.append(picture)
        captions.append(its_captions)
        if len(pending) == together:
            flush()
    if pending:
        flush()
    unique = sorted({caption for its_captions in captions for caption in its_captions})
    L, l, g = text.config.clip_length, text.config.clip_l_width, text.config.clip_g_width
    for start in show(range(0, len(unique), 64), "encoding captions", "batch"):
        with autocast():
            context, pooled = text(unique[start : start + 64])                      # (64, L + L', D) and (64, P)
        keep(clip_l=context[:, :L, :l], clip_g=context[:, :L, l : l + g], t5=context[:, L:],
             pooled_l=pooled[:, :l], pooled_g=pooled[:, l:])
    row_of = {caption: row for row, caption in enumerate(unique)}
    counts = np.cumsum([0] + [len(its_captions) for its_captions in captions])
    tensors = {name: torch.cat(parts.pop(name)) for name in wanted}
    tensors["caption_start"] = torch.from_numpy(counts).long()                                      # (N + 1,)
    tensors["caption_row"] = torch.tensor([row_of[c] for its_captions in captions for c in its_captions], dtype=torch.long)
    return Shard(tensors, unique)


# ------------------------------------------------------------------------------------------------------------
# Reading: the same in memory and from a folder
# ------------------------------------------------------------------------------------------------------------

class EncodedImages:
    """What the frozen networks make of a whole source, computed once and held in memory.

    source: as in data.py. `groups` has the sample numbers of each picture size, so that a batch can be of one size.
    """

    def __init__(self, source, vae, text, resolution: int, device, autocast, quiet: bool):
        def show(items, name, unit):
            total = len(source) if unit == "image" else len(items)
            return tqdm(items, total=total, disable=quiet, desc=name, unit=unit, leave=False)

        samples = ((picture, captions) for _, picture, captions in readable(source, resolution, resolution))
        self.buffers, self.opened = {}, {}
        self.opened[0] = encode_shard(samples, resolution, resolution, vae, text, device, autocast, show)
        count = len(self.opened[0].tensors["moments"])
        self.starts, self.groups, self.longest_side = [0], [np.arange(count)], resolution

    def shard(self, number: int) -> Shard:
        return self.opened[number]

    def __len__(self):
        return sum(len(group) for group in self.groups)

    def find(self, index: int) -> tuple[Shard, int]:
        """The shard of a sample number, and its place in it."""
        number = bisect_right(self.starts, index) - 1
        return self.shard(number), index - self.starts[number]

    def shares(self, count: int) -> list[int]:
        """`count` samples (all, if there are no more) divided over the sizes in proportion."""
        ends = np.cumsum([0] + [len(group) for group in self.groups])
        return np.diff(ends * min(count, len(self)) // len(self)).tolist()

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a sample."""
        shard, i = self.find(index)
        return tuple(shard.captions[row] for row in shard.rows(i))

    def latent_shape(self, index: int) -> tuple[int, int, int]:
        """(C, H, W) of a sample."""
        channels, height, width = self.find(index)[0].tensors["moments"].shape[1:]
        return channels // 2, height, width

    def read(self, indices, choose) -> dict:
        """Gather samples of one size: {name: (B, ...)} as in `layout`, in memory that the next call uses again.

        choose(k, rows): which of its caption rows sample number k of this batch takes.
        """
        places = [self.find(index) for index in indices]
        rows = [choose(k, shard.rows(i)) for k, (shard, i) in enumerate(places)]
        read = {}
        for name in ("moments", "clip_l", "clip_g", "t5", "pooled_l", "pooled_g"):
            at = [i for _, i in places] if name == "moments" else rows
            first = places[0][0].tensors[name]
            shape = (len(places), *first.shape[1:])
            if name not in self.buffers or self.buffers[name].shape != shape:    # fresh memory costs a third of the bandwidth
                self.buffers[name] = torch.empty(shape, dtype=first.dtype)
            read[name] = self.buffers[name]
            target = read[name].numpy()
            for k, ((shard, _), row) in enumerate(zip(places, at)):
                target[k] = shard.arrays[name][row]
        return read


class EncodedFolder(EncodedImages):
    """The shards of a folder that `main` wrote, memory-mapped: a row is read from disk when a batch asks for it.

    encoders_file: the checkpoint that training uses. ValueError if the folder is unfinished or was made with other encoders,
    or if a shard is missing or damaged; the message says how to mend it.
    """

    def __init__(self, folder, encoders_file):
        self.folder, self.opened, self.buffers = Path(folder), {}, {}
        self.index = read_index(self.folder)
        made_with = self.index["encoders"]
        if (ours := fingerprint(encoders_file, ENCODERS)) != made_with["fingerprint"]:
            raise ValueError(f"{folder} was encoded with {made_with['path']} (fingerprint {made_with['fingerprint']}), not with "
                             f"{encoders_file} ({ours}); give --encoders {made_with['path']}, or encode again")
        for entry in self.index["shards"]:
            file = self.folder / entry["file"]
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                self.damaged(file, f"{file.stat().st_size} of {entry['bytes']} bytes" if file.is_file() else "no such file")
        self.starts = np.cumsum([0] + [entry["count"] for entry in self.index["shards"]]).tolist()[:-1]
        of_size = defaultdict(list)
        for entry, start in zip(self.index["shards"], self.starts):
            of_size[entry["height"], entry["width"]].append(np.arange(start, start + entry["count"]))
        self.groups = [np.concatenate(numbers) for numbers in of_size.values()]
        self.longest_side = max(max(size) for size in of_size)

    def damaged(self, file: Path, problem):
        raise ValueError(f"{file} is damaged ({problem}); delete it and run {self.index['command']} again, which makes the "
                         f"missing shards only")

    def shard(self, number: int) -> Shard:
        """Opened when first asked for. ValueError names a shard that is not what the index says."""
        if number not in self.opened:
            entry = self.index["shards"][number]
            file = self.folder / entry["file"]
            try:
                with open_safetensors(file) as opened:
                    tensors = {name: opened.get_tensor(name) for name in opened.keys()}            # views of the mapped file
                    captions = json.loads(opened.metadata()["shard"])["captions"]
                shapes = [tuple(tensors[name].shape) for name in ("moments", "t5", "caption_start")]
                if (shapes[0][0], shapes[1][0], shapes[2][0]) != (entry["count"], len(captions), entry["count"] + 1):
                    raise ValueError("its sizes are not those of index.json")
            except (CheckpointError, KeyError, TypeError, ValueError) as problem:
                self.damaged(file, problem)
            self.opened[number] = Shard(tensors, captions)
        return self.opened[number]

    def split(self, count: int) -> tuple["EncodedFolder", "EncodedFolder"]:
        """(the rest, `count` samples): for validation, the first ones of each size, in proportion."""
        rest, first = copy.copy(self), copy.copy(self)
        first.buffers = {}
        shares = self.shares(count)
        rest.groups = [group[n:] for group, n in zip(self.groups, shares) if n < len(group)]
        first.groups = [group[:n] for group, n in zip(self.groups, shares) if n]
        return rest, first


def is_encoded(path) -> bool:
    """Whether a path is a folder of shards, finished or not."""
    return bool(path) and ((Path(path) / "index.json").is_file() or any(Path(path).glob("shard-*.safetensors")))


def read_index(folder: Path) -> dict:
    """index.json of a folder of shards. ValueError if there is none yet or it cannot be read."""
    if not (folder / "index.json").is_file():
        raise ValueError(f"{folder} has no index.json, its encoding has not finished; run the same python encode.py command "
                         f"again, it goes on where it stopped")
    try:
        index = json.loads((folder / "index.json").read_text())
        if not index["shards"] or not {"encoders", "resolution", "command"} <= index.keys():
            raise ValueError("it lists no shards")
        return index
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise ValueError(f"{folder / 'index.json'} is damaged ({problem}); delete it and run python encode.py again") from None


# ------------------------------------------------------------------------------------------------------------
# Batches
# ------------------------------------------------------------------------------------------------------------

@dataclass
class Batch:
    """This process's share of one step, on its device."""
    latent: torch.Tensor        # (B, C, H, W) clean, sampled from the VAE's Gaussian
    context: torch.Tensor       # (B, L + L', context_dim)
    pooled: torch.Tensor        # (B, pooled_dim)
    noise: torch.Tensor         # (B, C, H, W)
    uniform: torch.Tensor       # (B,) in (0, 1), on the CPU: becomes t through the density's quantile


class Batches:
    """This process's share of the global batch of any step, from (seed, step, index) alone: nothing to save or restore.

    All samples of a global batch have one size (Sec. 5.3.2). The samples of each size form an endless stream, a new
    permutation every epoch; an epoch has, in shuffled order, the batches whose last sample lies within it. So each sample
    comes once an epoch, and those at the end that do not fill a batch begin the first one of the next epoch.
    config: seed, batch_size, encoder_dropout and full_captions of train.TrainConfig; world: rank, size and device.
    """

    def __init__(self, images: EncodedImages, vae, text_config, config, world):
        self.images, self.vae, self.text_config, self.config, self.world = images, vae, text_config, config, world
        self.thread, self.ahead = ThreadPoolExecutor(1) if world.device.type == "cuda" else None, {}     # step -> its future
        self.orders, self.sizes = {}, (None, None)                     # size -> (epoch, permutation); (epoch, size of each step)

    def batch_of_step(self, step: int) -> tuple[int, int]:
        """(which size, which batch of that size's stream) a step of the run uses."""
        counts, B = [len(group) for group in self.images.groups], self.config.batch_size
        before = lambda epoch: [epoch * n // B for n in counts]                     # whole batches of each size by then
        epoch = step * B // sum(counts)                                             # or later: sizes round down one by one
        while sum(before(epoch + 1)) <= step:
            epoch += 1
        if self.sizes[0] != epoch:
            sizes = np.repeat(np.arange(len(counts)), np.subtract(before(epoch + 1), before(epoch)))
            self.sizes = epoch, np.random.default_rng((self.config.seed, 3, epoch)).permutation(sizes)
        place = step - sum(before(epoch))
        size = int(self.sizes[1][place])
        return size, before(epoch)[size] + int((self.sizes[1][:place] == size).sum())

    def index(self, size: int, count: int) -> int:
        """Which sample is number `count` of the stream of a size."""
        group = self.images.groups[size]
        epoch, place = divmod(count, len(group))
        if self.orders.get(size, (None, None))[0] != epoch:
            self.orders[size] = epoch, np.random.default_rng((self.config.seed, 1, epoch, size)).permutation(len(group))
        return int(group[self.orders[size][1][place]])

    def indices(self, step: int) -> list[int]:
        """The samples of this process's share of a step."""
        share = self.config.batch_size // self.world.size
        size, batch = self.batch_of_step(step)
        first = batch * self.config.batch_size + self.world.rank * share
        return [self.index(size, first + i) for i in range(share)]

    def __call__(self, step: int) -> Batch:
        """The batch of a step. Beside a GPU a thread makes the next one meanwhile."""
        if not self.thread:
            return self.make(step)
        batch = self.ahead.pop(step, None) or self.thread.submit(self.make, step)      # one thread: never two at once
        batch = batch.result()
        self.ahead = {step + 1: self.thread.submit(self.make, step + 1)}
        return batch

    def make(self, step: int) -> Batch:
        """The batch of a step, now."""
        config, world = self.config, self.world
        indices, draws, code_noise, noise = self.indices(step), [], [], []
        shape = self.images.latent_shape(indices[0])
        for number in range(world.rank * len(indices), (world.rank + 1) * len(indices)):    # index in the global batch
            rng = np.random.default_rng((config.seed, 2, step, number))
            draws.append(rng.random(5))                                               # t, caption, three encoders
            noise.append(rng.standard_normal(shape, dtype=np.float32))
            code_noise.append(rng.standard_normal(shape, dtype=np.float32))
        stored = self.images.read(indices, lambda k, rows: pick_caption(rows, draws[k][1], config.full_captions))
        draws, noise, code_noise = (torch.from_numpy(np.stack(x)).float() for x in (draws, noise, code_noise))
        latent, context, pooled = self.inputs(stored, code_noise.to(world.device))
        keep = (draws[:, 2:] >= config.encoder_dropout).to(world.device)                          # (B, 3)
        context, pooled = drop_encoders(context, pooled, keep, self.text_config)
        return Batch(latent, context, pooled, noise.to(world.device), draws[:, 0].clamp(1e-6, 1 - 1e-6))

    def inputs(self, stored: dict, code_noise=None):
        """Stored tensors -> latent, context, pooled on the device. Half precision travels, fp32 arrives."""
        stored = {name: x.to(self.world.device).float() for name, x in stored.items()}
        mean, logvar = stored["moments"].chunk(2, dim=1)                              # (B, C, H, W) each
        latent = self.vae.normalize(sample_code(mean, logvar, code_noise))
        return latent, *combine(*(stored[name] for name in ("clip_l", "clip_g", "t5", "pooled_l", "pooled_g")))

    def validation(self, count: int):
        """Yield (latent, context, pooled, noise) of `count` samples, a batch for each size, the same every time: mean
        codes, last captions, noise from the seed (App. B.3)."""
        for group, share in zip(self.images.groups, self.images.shares(count)):
            if indices := group[:share].tolist():
                latent, context, pooled = self.inputs(self.images.read(indices, lambda k, rows: rows[-1]))
                rng = torch.Generator().manual_seed(self.config.seed)
                yield latent, context, pooled, torch.randn(latent.shape, generator=rng).to(latent.device)


def pick_caption(captions, draw: float, full_share: float):
    """(original, full) are mixed by `full_share` (Sec. 5.2.2); any other number of captions is drawn from evenly."""
    if len(captions) == 2:
        return captions[int(draw < full_share)]
    return captions[int(draw * len(captions))]


# ------------------------------------------------------------------------------------------------------------
# Writing a folder of shards
# ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Plan:
    """One shard to be: its file, the size of its pictures in pixels, their numbers in the source, and `key`, a hash of all
    that its contents depend on."""
    file: Path
    height: int
    width: int
    indices: list[int]
    key: str


def plan_shards(source, options, recipe: str) -> list[Plan]:
    """Which picture goes into which shard: a function of the source and the options alone, so every process finds the same.

    recipe: what the numbers depend on besides the samples. Without --buckets nothing is opened; with it, headers only.
    """
    S, of_size = options.resolution, defaultdict(list)
    buckets = aspect_buckets(S) if options.buckets else [(S, S)]
    for index in range(len(source)):
        try:
            of_size[nearest_bucket(*source.picture_size(index), buckets) if options.buckets else (S, S)].append(index)
        except UnreadableImage as problem:
            source.problems.append(str(problem))
    check_problems(source.problems, source.found)
    plans, samples = [], lambda part: [(source.name(i), source.captions(i)) for i in part]
    for height, width in buckets:
        indices = of_size[height, width]
        for start in range(0, len(indices), options.shard_size):
            part = indices[start : start + options.shard_size]
            key = hashlib.sha256(json.dumps([recipe, height, width, samples(part)]).encode()).hexdigest()[:16]
            plans.append(Plan(options.out / f"shard-{len(plans):05}.safetensors", height, width, part, key))
    return plans


def header(plan: Plan) -> dict | None:
    """What a planned shard says about itself; None where it is missing or damaged. ValueError if it is another one."""
    try:
        with open_safetensors(plan.file) as opened:
            about = json.loads((opened.metadata() or {}).get("shard", "{}"))
    except (CheckpointError, ValueError):
        return None
    if about.get("key") != plan.key:
        raise ValueError(f"{plan.file} was made from other pictures, captions, encoders or settings; choose another --out, or "
                         f"delete that folder")
    return about


def write_shard(plan: Plan, source, parts, device, autocast):
    """Encode one shard; it appears under its name when it is whole."""
    skipped = []

    def samples():
        for index, picture in read_ahead(source, plan.indices, plan.height, plan.width):
            try:
                yield picture.result(), source.captions(index)
            except UnreadableImage as problem:
                skipped.append(str(problem))
                source.problems.append(str(problem))
                if len(source.problems) > 0.01 * source.found:
                    check_problems(source.problems, source.found)

    shard = encode_shard(samples(), plan.height, plan.width, parts.vae, parts.text, device, autocast)
    about = json.dumps({"key": plan.key, "captions": shard.captions, "skipped": skipped})
    write_atomically(plan.file, lambda partial: save_file(shard.tensors, partial, {"shard": about}))


def write_index(plans, source, options, encoders: dict, rank: int):
    """index.json, once all shards are there: what `EncodedFolder` opens. The process that ends last writes it; should two
    end at once, both write the same."""
    entries, skipped = [], []
    for plan in plans:
        if (about := header(plan)) is None:
            return                                                                 # another process is still at it
        skipped += about["skipped"]
        if count := len(plan.indices) - len(about["skipped"]):
            entries.append({"file": plan.file.name, "height": plan.height, "width": plan.width, "count": count,
                            "captions": len(about["captions"]), "bytes": plan.file.stat().st_size})
    check_problems(sorted({*source.problems, *skipped}), source.found)
    index = {"encoders": encoders, "resolution": options.resolution, "command": options.command, "skipped": skipped,
             "shards": entries}
    mine = options.out / f"index-{rank}.json"
    write_atomically(mine, lambda partial: partial.write_text(json.dumps(index, indent=1)))
    os.replace(mine, options.out / "index.json")
    pictures, size = sum(entry["count"] for entry in entries), sum(entry["bytes"] for entry in entries)
    print(f"{pictures} pictures in {len(entries)} shards, {size / 1e6:.1f} MB, {size / 1e3 / pictures:.1f} kB each: "
          f"train.py --data {options.out}")


def encode_folder(options):
    """Everything that --data holds, into --out; shards that are there already are kept."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    file, source = find_model_file(options.encoders), ImageFiles(options.data) if options.data else Scenes(options.num_scenes)
    if options.captions:
        source.add_captions(options.captions)
    check_problems(source.problems, source.found)
    device = pick_device(options.device)
    if device.type == "cuda" and processes > 1:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    precision = pick_precision(options.precision, device)
    encoders = {"path": portable(file), "tokenizers": options.tokenizers, "fingerprint": fingerprint(file, ENCODERS)}
    plans = plan_shards(source, options, f"{encoders['fingerprint']} {options.tokenizers} {precision}")
    options.out.mkdir(parents=True, exist_ok=True)
    mine = [plan for plan in plans[rank::processes] if header(plan) is None]
    if rank == 0:
        for size in dict.fromkeys((plan.height, plan.width) for plan in plans):
            count = sum(len(plan.indices) for plan in plans if (plan.height, plan.width) == size)
            print(f"{size[0]:5} x {size[1]:<5} px (height x width) {count:8} pictures")
    if mine:
        parts = load_components(file, ("vae", "text"), tokenizers=options.tokenizers)
        parts.vae.to(device), parts.text.to(device)
        autocast = lambda: torch.autocast(device.type, precision, enabled=precision != torch.float32)
        for plan in tqdm(mine, disable=rank > 0, unit="shard"):
            write_shard(plan, source, parts, device, autocast)
    write_index(plans, source, options, encoders, rank)


# ------------------------------------------------------------------------------------------------------------
# Our Table 7, and the command line
# ------------------------------------------------------------------------------------------------------------

def table7(vae, text, height: int, width: int) -> dict:
    """{encoder: (parameters in bytes, bytes stored for a sample)}, by Table 7's names; from shapes alone, so meta will do."""
    bytes_of = lambda network: sum(p.numel() * p.element_size() for p in network.parameters())
    networks = {"vae": vae.encoder, **text.encoders}
    stored = sample_bytes(vae.config, text.config, height, width)
    return {name: (bytes_of(network), stored[name]) for name, network in networks.items()}


def print_table7(options, batch_size: int = 32):
    """Table 7 for a checkpoint's encoders at --resolution: memory, time of the forward pass at the paper's batch size."""
    parts = load_components(options.encoders, ("vae", "text"), tokenizers=options.tokenizers)
    device, S = pick_device(options.device), options.resolution
    precision = pick_precision(options.precision, device)
    parts.vae.to(device), parts.text.to(device)
    scenes = Scenes(batch_size)
    images = torch.stack([to_tensor(scenes.image(i, S, S)) for i in range(batch_size)]).to(device)
    ids = {name: x.to(device) for name, x in parts.text.tokenize([scenes.captions(i)[1] for i in range(batch_size)]).items()}
    jobs = {"vae": lambda: parts.vae.encode_moments(images)}
    jobs |= {name: lambda name=name: parts.text.encoders[name](ids[name]) for name in parts.text.encoders}
    print(f"{S} px, batch {batch_size}, {device}, {str(precision).removeprefix('torch.')}\n"
          f"model       Mem [MB]   FP [ms per sample]   Storage [kB per sample]")
    for name, (weights, stored) in table7(parts.vae, parts.text, S, S).items():
        times = []
        with torch.no_grad(), torch.autocast(device.type, precision, enabled=precision != torch.float32):
            for _ in range(6):
                start = time.perf_counter()
                jobs[name]()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
        label = {"vae": "VAE (Enc)", "clip_l": "CLIP-L", "clip_g": "CLIP-G", "t5": "T5"}[name]
        print(f"{label:10} {weights / 1e6:9.2f} {1000 * np.median(times[1:]) / batch_size:20.3f} {stored / 1000:25.1f}")


def parse_options(arguments=None):
    """The command line. ValueError for values that cannot work."""
    parser = argparse.ArgumentParser(description="Encode captioned pictures once (App. E.1), or print our Table 7.",
                                     allow_abbrev=False)
    add = parser.add_argument
    add("--out", type=Path, help="folder of the shards; without it only our Table 7 is printed")
    add("--table7", action="store_true", help="print memory, time and storage of the encoders and stop")
    add("--data", default="", help="folder, .tar, .jsonl or .csv with captioned pictures; without it: built-in scenes")
    add("--captions", default="", help="JSONL with a further, synthetic caption for each picture: file_name and caption")
    add("--num-scenes", type=int, default=16384, help="built-in scenes to encode (default 16384)")
    add("--resolution", type=int, default=0, help="S, px: pictures become S x S (default 256; 64 for scenes and the table)")
    add("--buckets", action="store_true", help="keep aspect ratios: each picture goes to the nearest size of about S x S px")
    add("--shard-size", type=int, default=512, help="pictures in a shard, a multiple of 64 (default 512)")
    add("--encoders", default=str(SHIPPED), help="checkpoint with the VAE and the text encoders")
    add("--tokenizers", default="", help="folder with clip/ and t5/; without it tokenizers/ beside the encoders")
    add("--device", default="auto")
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"))
    options = parser.parse_args(arguments)
    options.resolution = options.resolution or (256 if options.data else 64)
    options.command = "python encode.py " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    if options.resolution < 16 or options.resolution % 16:
        raise ValueError(f"--resolution {options.resolution} is not a multiple of 16 px (VAE factor 8 x patch 2)")
    if options.shard_size < 64 or options.shard_size % 64:
        raise ValueError(f"--shard-size {options.shard_size} is not a multiple of 64, the pictures that are encoded together")
    if options.num_scenes < 1:
        raise ValueError(f"--num-scenes {options.num_scenes} must be greater than 0")
    if (options.data or options.captions) and not options.out:
        raise ValueError("--data needs --out, the folder to write the shards to")
    if options.captions and not options.data:
        raise ValueError("--captions needs --data, the pictures that the captions belong to")
    return options


def main():
    """Table 7, or a folder of shards."""
    try:
        options = parse_options()
        if options.table7 or not options.out:
            print_table7(options)
        else:
            encode_folder(options)
    except (CheckpointError, ValueError, OSError) as problem:
        sys.exit(f"encode.py: {problem}")
    except KeyboardInterrupt:
        sys.exit("encode.py: stopped; the same command goes on with the missing shards")


if __name__ == "__main__":
    main()
