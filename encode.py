"""encode.py: what the frozen networks do for training, done once (SD3, App. E.1, Table 7).

Read with   App. E.1: latents and text embeddings are computed once, texts in half precision
Not here    the networks (vae.py, text_encoders.py), pictures and the reader of shards (data.py)
Shapes      N pictures   U different captions   C latent channels   H W latent height, width
            L CLIP tokens   L' T5 tokens
Run         python encode.py --data PATH --out DIR --resolution 256 --buckets
            torchrun --nproc_per_node 8 encode.py ...  shared out; then train.py --data DIR
"""

import argparse
import fcntl
import functools
import hashlib
import json
import math
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import scenes
from checkpoints import (
    FROZEN, SHIPPED, add_options, check_options, find_model_file, fingerprint, given_options,
    load_components, option, portable, write_atomically)
from data import (
    EncodedFolder, ImageFiles, aspect_buckets, check_problems, file_hash, nearest_bucket, readable)
from devices import World, autocast, command, pick_precision
from scenes import HELD_OUT_SEED, Scenes

CACHE = Path("runs/cache")          # what train.py encodes by itself

def layout(vae, text, height: int, width: int) -> dict:
    """{name: (shape, type)} of what is stored for a picture of height x width px and a caption.

    The zeros that pad CLIP to T5's width are not stored. A shard has N rows of moments, U of the
    others. Picture i has the captions caption_row[caption_start[i] : caption_start[i + 1]].
    """
    H, W = height // vae.downsampling, width // vae.downsampling
    return {
        "moments": ((2 * vae.latent_channels, H, W), torch.float16),  # means, then log-variances
        "clip_l": ((text.clip_length, text.clip_l_width), torch.float16),
        "clip_g": ((text.clip_length, text.clip_g_width), torch.float16),
        "t5": ((text.t5_length, text.t5_width), torch.float16),
        "pooled_l": ((text.clip_l_width,), torch.float32),
        "pooled_g": ((text.clip_g_width,), torch.float32)}


@torch.no_grad()
def encode_shard(samples, height: int, width: int, vae, text, device, precision):
    """Encode what `readable` yields, of one size: (tensors as in `layout`, the U captions).
    64 go together, fewer of more than 256 x 256 px: the numbers depend on the samples alone."""
    wanted = layout(vae.config, text.config, height, width)
    parts = {name: [torch.zeros(0, *shape, dtype=kind)] for name, (shape, kind) in wanted.items()}

    def keep(name, value):
        parts[name].append(value.to(wanted[name][1]).cpu())

    row_of, caption_row, caption_start = {}, [], [0]
    together = max(1, min(64, 64 * 256**2 // (height * width)))
    L, l, g = text.config.clip_length, text.config.clip_l_width, text.config.clip_g_width
    samples = (sample for sample in samples if sample[1] is not None)
    with autocast(device, precision):
        while group := list(islice(samples, together)):
            image = torch.from_numpy(np.stack([image for _, image, _ in group])).to(device)
            image = (image.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous()
            keep("moments", torch.cat(vae.encode_moments(image), dim=1))          # (n, 2C, H, W)
            for _, _, captions in group:
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

def hash_of(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def contents(source, index: int):
    """What the encoding of a sample follows from, besides the recipe: JSON that changes with it."""
    if isinstance(source, Scenes):
        return index
    record = source.records[index]
    about = record.path.stat()
    return [record.name, record.captions, record.offset, about.st_size, about.st_mtime_ns]


def sort_by_size(source, resolution: int, buckets: bool) -> dict:
    """{(height, width): sample numbers}. Only headers are read, by threads."""
    if not buckets:
        return {(resolution, resolution): range(len(source))}
    groups = {size: [] for size in aspect_buckets(resolution)}
    with ThreadPoolExecutor(8) as threads:
        for index, size in enumerate(threads.map(source.picture_size, range(len(source)))):
            groups[nearest_bucket(*size, groups)].append(index)
    return groups


def plan_shards(source, folder: Path, resolution, buckets, shard_size, recipe) -> list[dict]:
    """The lines of index.json, one a shard. A shard that has to be made has no "hash" yet.
    ValueError if the folder was made by another recipe."""
    lines, made = [], {}
    if (folder / "index.json").is_file():
        index = EncodedFolder(folder).index
        if index.get("recipe") != recipe:
            raise ValueError(f"{folder} was made from another source, by other encoders or "
                             f"settings; choose another --out")
        made = {line["file"]: line for line in index["shards"]}
    grows = isinstance(source, Scenes)                  # Another run may be reading its shards.
    if grows:
        source = Scenes(max(len(source), sum(line["count"] for line in made.values())), source.seed)
    for (height, width), indices in sort_by_size(source, resolution, buckets).items():
        start = 0
        while start < len(indices):
            file = f"shard-{len(lines):05}.safetensors"
            old = made.get(file, {})
            count = old["count"] if grows and old else shard_size
            part = list(indices[start : start + count])
            start += count
            key = hash_of([recipe, height, width, [contents(source, index) for index in part]])
            line = {"file": file, "height": height, "width": width, "key": key, "indices": part}
            lines.append(describe(folder, line, old))
    return lines


def describe(folder: Path, line: dict, old: dict) -> dict:
    """What index.json says of a shard; `line` itself if it is missing, damaged or out of date.
    old: the line that index.json has, or {}. It saves a look into the file."""
    file = folder / line["file"]
    try:
        if old.get("key") == line["key"] and old["bytes"] == file.stat().st_size:
            return old
        with safe_open(file, "pt") as opened:
            about = json.loads(opened.metadata()["shard"])
        if about["key"] != line["key"]:
            return line
    except Exception:                                   # safetensors raises errors of many types.
        return line
    about |= {"captions": len(about["captions"]), "bytes": file.stat().st_size}
    about["hash"] = file_hash(file)
    return {name: line[name] for name in ("file", "height", "width")} | about


def make_shards(lines, folder, source, file, tokenizers, world, precision, until) -> list[dict]:
    """Encode and write these shards, each whole before it has its name. Returns their new lines."""
    if not lines:
        return []
    parts, done = load_components(file, ("vae", "text"), tokenizers=tokenizers), []
    vae, text = parts.vae.to(world.device), parts.text.to(world.device)
    wanted = [(index, line["height"], line["width"]) for line in lines for index in line["indices"]]
    stream = iter(tqdm(readable(source, wanted), "encoding", len(wanted), unit="image",
                       disable=world.rank > 0))
    for line in lines:
        if done and time.time() > until:
            break
        before, size = len(source.problems), (line["height"], line["width"])
        samples = islice(stream, len(line["indices"]))
        tensors, captions = encode_shard(samples, *size, vae, text, world.device, precision)
        about = {"key": line["key"], "count": len(tensors["moments"]), "captions": captions,
                 "skipped": source.problems[before:]}
        save = functools.partial(save_file, tensors, metadata={"shard": json.dumps(about)})
        write_atomically(folder / line["file"], save)
        done.append(describe(folder, line, {}))
    next(stream, None)                     # The bar ends; `readable` counts what failed.
    for name, count in text.captions_cut.items():
        print(f"{count} captions are longer than {name} can read; their ends are cut off")
    return done


def encode_folder(source, folder, encoders_file, resolution: int, world, buckets=False,
                  shard_size=512, tokenizers="", precision="auto", until=math.inf) -> EncodedFolder:
    """Everything that a source holds, as shards; those that are there and up to date are kept.

    folder: "" stands for one in CACHE. A set of Scenes grows and never shrinks. The processes of
    `world` share the work, and begin no shard after the time `until`. ValueError for a folder of
    another recipe, or if over one per cent of the pictures cannot be read.
    """
    file, precision = find_model_file(encoders_file), pick_precision(precision, world.device)
    encoders = {"path": portable(file), "fingerprint": fingerprint(file, FROZEN),
                "tokenizers": tokenizers and portable(tokenizers)}
    origin = [getattr(source, "seed", ""), Path(scenes.__file__).read_text()]
    if isinstance(source, ImageFiles):
        origin = str(source.path.resolve())
    recipe = hash_of([origin, encoders["fingerprint"], encoders["tokenizers"], resolution, buckets,
                      shard_size, str(precision)])
    folder, lines = Path(folder or CACHE / recipe).expanduser(), []
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:          # Two runs can want the same scenes.
        if world.rank == 0:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lines = plan_shards(source, folder, resolution, buckets, shard_size, recipe)
        lines = world.same(lines)
        todo = [line for line in lines if "hash" not in line][world.rank :: world.size]
        done = make_shards(todo, folder, source, file, tokenizers, world, precision, until)
        done = world.gather(done)
        if world.rank == 0:
            done = {line["file"]: line for part in done for line in part}
            lines = [done.get(line["file"], line) for line in lines]
            lines = [line for line in lines if "hash" in line]          # Others came too late.
            problems = set(source.problems).union(*[line["skipped"] for line in lines])
            check_problems(sorted(problems), source.found)
            index = json.dumps({
                "encoders": encoders, "recipe": recipe, "resolution": resolution,
                "command": "python " + shlex.join(sys.argv),
                "shards": [line for line in lines if line["count"]]}, indent=1)
            write_atomically(folder / "index.json", lambda file: file.write_text(index))
        world.any(False)                                # The index is there before others go on.
    return EncodedFolder(folder, encoders["fingerprint"])


def encoded(config, world, count: int, until=math.inf):
    """(training, held-out) EncodedFolders of a run; what the cache does not have is made. Held out
    are 64 scenes of HELD_OUT_SEED, or one picture in fifty, at most 64; a single one is both."""
    settings = config.encoders, config.resolution, world
    options = {"precision": config.precision}
    if not config.data:
        held_out = encode_folder(Scenes(64, HELD_OUT_SEED), "", *settings, **options)
        options["until"] = until
        training = encode_folder(Scenes(count, config.seed), "", *settings, **options)
        return training.split(count)[1], held_out.split(64)[1]
    if any(Path(config.data).expanduser().glob("shard-*.safetensors")):
        folder = EncodedFolder(config.data, fingerprint(find_model_file(config.encoders), FROZEN))
    else:
        folder = encode_folder(ImageFiles(config.data), "", *settings, **options)
    held_out = min(64, max(1, len(folder) // 50))
    return folder.split(held_out) if len(folder) > 1 else (folder, folder)


@dataclass(frozen=True)
class EncodeConfig:
    """What is encoded, how, and where to."""
    data: str = option("", "folder, .tar or .jsonl with captioned pictures; empty: scenes")
    out: str = option("", "folder of the shards")
    captions: str = option("", "JSONL with a synthetic caption a picture: file_name, caption")
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
        if not self.out or (self.captions and not self.data):
            raise ValueError("give --out FOLDER for the shards, and --data PATH for your pictures, "
                             "to which --captions may add")
        if self.resolution % 16:
            raise ValueError(f"--resolution {self.resolution} is not a multiple of 16 px (8 x 2)")


def main():
    """From the command line to a folder of shards."""
    parser = argparse.ArgumentParser(description="Encode captioned pictures once (App. E.1).")
    add_options(parser, EncodeConfig)
    config = EncodeConfig(**given_options(parser.parse_args(), EncodeConfig))
    source, resolution = Scenes(config.num_scenes), config.resolution or 64
    if config.data:
        source, resolution = ImageFiles(config.data), config.resolution or 256
    if config.captions:
        source.add_captions(config.captions)
    world = World(config.device, "ddp")
    folder = encode_folder(source, config.out, config.encoders, resolution, world, config.buckets,
                           config.shard_size, config.tokenizers, config.precision)
    world.close()
    if world.rank == 0:
        print(f"{len(folder)} pictures of {len(folder.groups)} sizes: train.py --data {config.out}")


if __name__ == "__main__":
    command(main)
