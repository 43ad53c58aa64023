"""encode.py: what the frozen networks do for training, done once (SD3, App. E.1, Table 7).

Read with   App. E.1: latents and text embeddings are computed once, texts in half precision
Not here    the networks (vae.py, text_encoders.py), pictures and the reader of shards (data.py)
Output      a folder with index.json and shard-NNNNN.safetensors, which data.EncodedFolder reads
Shapes      N pictures   U different captions   C latent channels   H W latent height, width
            L CLIP tokens   L' T5 tokens
Run         python encode.py --data PATH --out DIR --resolution 256 --buckets
            python train.py --data DIR
            torchrun --nproc_per_node 8 encode.py ...     each process makes a share of the shards
            The same command, started again, goes on where it stopped.
"""

import argparse
import fcntl
import functools
import hashlib
import itertools
import json
import os
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import scenes
from checkpoints import (
    FROZEN, SHIPPED, add_options, check_options, find_model_file, fingerprint, given_options,
    load_components, option, portable, write_atomically)
from data import (
    EncodedFolder, ImageFiles, UnreadableImage, aspect_buckets, check_problems, nearest_bucket,
    readable)
from devices import World, autocast, command, pick_precision
from scenes import HELD_OUT_SEED, Scenes

CACHE = Path("runs/cache")          # what train.py encodes by itself

# ---- One shard -----------------------------------------------------------------------------------


def layout(vae, text, height: int, width: int) -> dict:
    """{name: (shape, type)} of what is stored for a picture of height x width px and a caption.

    vae, text: VAEConfig, TextConfig. The zeros that pad CLIP to T5's width are not stored, and
    equal captions are stored once. A shard also has caption_start (N + 1,) and caption_row: the
    captions of picture i are rows caption_row[caption_start[i] : caption_start[i + 1]].
    """
    H, W = height // vae.downsampling, width // vae.downsampling
    return {
        "moments": ((2 * vae.latent_channels, H, W), torch.float16),  # means, then log-variances
        "clip_l": ((text.clip_length, text.clip_l_width), torch.float16),
        "clip_g": ((text.clip_length, text.clip_g_width), torch.float16),
        "t5": ((text.t5_length, text.t5_width), torch.float16),
        "pooled_l": ((text.clip_l_width,), torch.float32),
        "pooled_g": ((text.clip_g_width,), torch.float32),
    }


def sample_bytes(vae, text, height: int, width: int) -> dict:
    """Bytes of a sample by encoder. SD3 at 256 px: 65.5, 121.3, 202.2, 630.8 kB (Table 7)."""
    size = {}
    for name, (shape, kind) in layout(vae, text, height, width).items():
        size[name] = torch.Size(shape).numel() * kind.itemsize
    return {"vae": size["moments"], "clip_l": size["clip_l"] + size["pooled_l"],
            "clip_g": size["clip_g"] + size["pooled_g"], "t5": size["t5"]}


@torch.no_grad()
def encode_shard(samples, height: int, width: int, vae, text, device, precision):
    """Encode (picture, captions) pairs of one size: (tensors as in `layout`, the U captions).

    64 pictures or captions go together, and fewer pictures of more than 256 x 256 px. So the
    numbers depend on the samples alone.
    """
    wanted = layout(vae.config, text.config, height, width)
    parts = {name: [torch.zeros(0, *shape, dtype=kind)] for name, (shape, kind) in wanted.items()}

    def keep(name, value):
        parts[name].append(value.to(wanted[name][1]).cpu())

    samples, row_of, caption_row, caption_start = iter(samples), {}, [], [0]
    together = max(1, min(64, 64 * 256**2 // (height * width)))
    L, l, g = text.config.clip_length, text.config.clip_l_width, text.config.clip_g_width
    with autocast(device, precision):
        while group := list(itertools.islice(samples, together)):
            image = torch.from_numpy(np.stack([picture for picture, _ in group])).to(device)
            image = (image.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous()  # (n, 3, 8H, 8W)
            keep("moments", torch.cat(vae.encode_moments(image), dim=1))          # (n, 2C, H, W)
            for _, captions in group:
                for caption in captions:
                    caption_row.append(row_of.setdefault(caption, len(row_of)))
                caption_start.append(len(caption_row))
        unique = list(row_of)
        for start in range(0, len(unique), 64):
            context, pooled = text(unique[start : start + 64])        # (n, L + L', D) and (n, P)
            keep("clip_l", context[:, :L, :l])
            keep("clip_g", context[:, :L, l : l + g])
            keep("t5", context[:, L:])
            keep("pooled_l", pooled[:, :l])
            keep("pooled_g", pooled[:, l:])
    tensors = {name: torch.cat(values) for name, values in parts.items()}
    tensors["caption_start"] = torch.tensor(caption_start)
    tensors["caption_row"] = torch.tensor(caption_row, dtype=torch.long)
    return tensors, unique


# ---- Which picture goes into which shard ---------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A shard to be. `key` is a hash of all that its contents follow from."""
    file: Path
    height: int
    width: int
    indices: list[int]
    key: str


def hash_of(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def sort_by_size(source, resolution: int, buckets: bool) -> dict:
    """{(height, width): sample numbers}, from headers. What cannot be read joins the problems."""
    if not buckets:
        return {(resolution, resolution): range(len(source))}
    groups = {size: [] for size in aspect_buckets(resolution)}

    def place(index):
        try:
            return nearest_bucket(*source.picture_size(index), list(groups))
        except UnreadableImage as problem:
            source.problems.append(str(problem))

    with ThreadPoolExecutor(8) as threads:
        for index, size in enumerate(threads.map(place, range(len(source)))):
            if size:
                groups[size].append(index)
    check_problems(sorted(source.problems), source.found)
    return groups


def plan_shards(source, groups: dict, folder: Path, shard_size: int, recipe: str, made) -> list[Plan]:
    """Cut each size into shards. made: index.json's lines; a set of scenes grows behind these."""
    plans = []
    for (height, width), indices in groups.items():
        start = 0
        while start < len(indices):
            count = shard_size
            if isinstance(source, Scenes) and len(plans) < len(made):
                count = made[len(plans)]["count"]
            part = list(indices[start : start + count])
            start += count
            samples = part
            if isinstance(source, ImageFiles):
                samples = [(source.name(i), source.stamp(i), source.captions(i)) for i in part]
            file = folder / f"shard-{len(plans):05}.safetensors"
            key = hash_of([recipe, height, width, samples])
            plans.append(Plan(file, height, width, part, key))
    return plans


def describe(plan: Plan, known: dict) -> dict:
    """The line of index.json for a shard; {} if it is missing, cut off or made from other things.

    known: the line that index.json has, or {}. It is taken without a look into the file.
    """
    try:
        if known.get("key") == plan.key and known["bytes"] == plan.file.stat().st_size:
            return known
        with safe_open(plan.file, "pt") as opened:
            about = json.loads(opened.metadata()["shard"])
        if about["key"] != plan.key:
            return {}
        return {"file": plan.file.name, "height": plan.height, "width": plan.width, "key": plan.key,
                "count": about["count"], "skipped": about["skipped"],
                "captions": len(about["captions"]), "bytes": plan.file.stat().st_size,
                "hash": hashlib.sha256(np.memmap(plan.file, mode="r")).hexdigest()}
    except (OSError, ValueError, TypeError, KeyError, SafetensorError):
        return {}


# ---- A folder of shards --------------------------------------------------------------------------


def make_shards(plans: list[Plan], source, file, tokenizers: str, world, precision) -> list[dict]:
    """Encode and write shards, each whole before it has its name. Returns their lines."""
    if not plans:
        return []
    parts = load_components(file, ("vae", "text"), tokenizers=tokenizers)
    vae, text, lines = parts.vae.to(world.device), parts.text.to(world.device), []
    wanted = [(index, plan.height, plan.width) for plan in plans for index in plan.indices]
    stream = iter(tqdm(readable(source, wanted), "encoding", len(wanted), unit="image",
                       disable=world.rank > 0))
    for plan in plans:
        before = len(source.problems)
        samples = ((image, captions) for _, image, captions in itertools.islice(stream, len(plan.indices))
                   if image is not None)
        tensors, captions = encode_shard(samples, plan.height, plan.width, vae, text, world.device,
                                         precision)
        about = {"key": plan.key, "count": len(tensors["moments"]), "captions": captions,
                 "skipped": source.problems[before:]}
        save = functools.partial(save_file, tensors, metadata={"shard": json.dumps(about)})
        write_atomically(plan.file, save)
        lines.append(describe(plan, {}))
    for name, count in text.captions_cut.items():
        print(f"{count} captions are longer than {name} reads; their ends are cut off")
    return lines


def encode_folder(source, folder, encoders_file, resolution: int, world, buckets=False,
                  shard_size=512, tokenizers="", precision="auto") -> EncodedFolder:
    """Everything that a source holds, as shards; those that are there and up to date are kept.

    folder: "" stands for one in CACHE, named after what goes into it. A set of Scenes grows there
    and never shrinks. The processes of `world` share the work. ValueError if the folder was made
    by another recipe, or if over one per cent of the pictures cannot be read.
    """
    file, precision = find_model_file(encoders_file), pick_precision(precision, world.device)
    encoders = {"path": portable(file), "fingerprint": fingerprint(file, FROZEN),
                "tokenizers": portable(tokenizers) if tokenizers else ""}
    origin = str(source.path.resolve()) if isinstance(source, ImageFiles) else source.seed
    drawing = hashlib.sha256(Path(scenes.__file__).read_bytes()).hexdigest()
    recipe = hash_of([origin, drawing, encoders["fingerprint"], encoders["tokenizers"], resolution,
                      buckets, shard_size, str(precision)])
    folder, plans, lines, made = Path(folder or CACHE / recipe).expanduser(), [], {}, []
    folder.mkdir(parents=True, exist_ok=True)
    if world.rank == 0:
        lock = os.open(folder, os.O_RDONLY)             # Two runs can want the same scenes.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "index.json").is_file():
            index = EncodedFolder(folder).index
            made = index["shards"]
            if index.get("recipe") != recipe:
                raise ValueError(f"{folder} was made from another source, with other encoders or "
                                 f"settings; choose another --out, or delete that folder")
        if isinstance(source, Scenes):
            source = Scenes(max(len(source), sum(line["count"] for line in made)), source.seed)
        groups = sort_by_size(source, resolution, buckets)
        plans = plan_shards(source, groups, folder, shard_size, recipe, made)
        known = {line["file"]: line for line in made}
        for plan in plans:
            lines[plan.file.name] = describe(plan, known.get(plan.file.name, {}))
    todo = world.same([plan for plan in plans if not lines[plan.file.name]])
    mine = make_shards(todo[world.rank :: world.size], source, file, tokenizers, world, precision)
    for line in itertools.chain(*world.gather(mine)):
        lines[line["file"]] = line
    if world.rank == 0:
        skipped = {problem for line in lines.values() for problem in line["skipped"]}
        check_problems(sorted(skipped | set(source.problems)), source.found)
        index = {"encoders": encoders, "recipe": recipe, "resolution": resolution,
                 "command": shlex.join(["python", os.path.basename(sys.argv[0]), *sys.argv[1:]]),
                 "shards": [line for line in lines.values() if line["count"]]}
        if index["shards"] != made:
            write_atomically(folder / "index.json", lambda partial: partial.write_text(
                json.dumps(index, indent=1)))
        os.close(lock)
    world.any(False)                                    # Nobody reads before the index is there.
    return EncodedFolder(folder, encoders["fingerprint"])


def is_encoded(path) -> bool:
    """Whether a path is a folder of shards, finished or not."""
    return Path(path, "index.json").is_file() or any(Path(path).glob("shard-*.safetensors"))


def encoded(config, world, count: int):
    """(training, held-out) EncodedFolders of a run; what is missing in the cache is made.

    Scenes: the first `count` of config.seed, and 64 of HELD_OUT_SEED. Pictures, or a folder of
    shards: one in fifty is held out, at most 64. config: data, encoders, tokenizers, resolution,
    seed, precision. A single picture is both.
    """
    settings = {"encoders_file": config.encoders, "resolution": config.resolution, "world": world,
                "tokenizers": config.tokenizers, "precision": config.precision}
    if not config.data:
        training = encode_folder(Scenes(count, config.seed), "", **settings)
        held_out = encode_folder(Scenes(64, HELD_OUT_SEED), "", **settings)
        return training.split(count)[1], held_out.split(64)[1]
    if is_encoded(config.data):
        folder = EncodedFolder(config.data, fingerprint(find_model_file(config.encoders), FROZEN))
    else:
        folder = encode_folder(ImageFiles(config.data), "", **settings)
    if len(folder) == 1:
        return folder, folder
    return folder.split(min(64, max(1, len(folder) // 50)))


# ---- The command line -----------------------------------------------------------------------------


@dataclass(frozen=True)
class EncodeConfig:
    """What is encoded, how, and where to."""
    data: str = option("", "folder, .tar, .jsonl or .csv with captioned pictures; empty: drawn scenes")
    out: str = option("", "folder of the shards")
    captions: str = option("", "JSONL with a synthetic caption for each picture: file_name, caption")
    num_scenes: int = option(16384, "drawn scenes, without --data", 1, 10**9)
    resolution: int = option(0, "S in px; 0: 256, and 64 for scenes", 0, 4096)
    buckets: bool = option(False, "keep aspect ratios: sizes of about S x S px (Sec. 5.3.2)")
    shard_size: int = option(512, "pictures in a shard", 1, 2**16)
    encoders: str = option(str(SHIPPED), "model with the VAE and the text encoders")
    tokenizers: str = option("", "folder with clip/ and t5/; empty: beside the encoders")
    device: str = option("auto", "cuda, mps or cpu; auto: the first that is there")
    precision: str = option("auto", "of matrix products", choices=("auto", "bf16", "fp32"))

    def __post_init__(self):
        check_options(self)
        if not self.out:
            raise ValueError("give --out FOLDER for the shards; with --data PATH for your pictures")
        if self.resolution % 16:
            raise ValueError(f"--resolution {self.resolution} is not a multiple of 16 px (VAE factor "
                             f"8 x patch 2)")
        if self.captions and not self.data:
            raise ValueError("--captions needs --data, the pictures that the captions belong to")


def main():
    """From the command line to a folder of shards."""
    parser = argparse.ArgumentParser(description="Encode captioned pictures once (App. E.1).",
                                     allow_abbrev=False)
    add_options(parser, EncodeConfig)
    config = EncodeConfig(**given_options(parser.parse_args(), EncodeConfig))
    source = ImageFiles(config.data) if config.data else Scenes(config.num_scenes)
    if config.captions:
        source.add_captions(config.captions)
    check_problems(source.problems, source.found)
    world = World(config.device, "ddp")
    resolution = config.resolution or (256 if config.data else 64)
    folder = encode_folder(source, config.out, config.encoders, resolution, world, config.buckets,
                           config.shard_size, config.tokenizers, config.precision)
    if world.rank == 0:
        shards = folder.index["shards"]
        size = sum(line["bytes"] for line in shards)
        print(f"{len(folder)} pictures of {len(folder.groups)} sizes in {len(shards)} shards, "
              f"{size / 1e6:.1f} MB: python train.py --data {config.out}")
    world.close()


if __name__ == "__main__":
    command(main)
