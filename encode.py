"""encode.py: what the frozen networks do for training, done once (SD3, App. E.1, Table 7).

Read with   App. E.1: latents and text embeddings are computed once, texts in half precision
Not here    the networks (vae.py, text_encoders.py), pictures and the reader of shards (data.py)
Shapes      N pictures   U different captions   C latent channels   H W latent height, width
            L CLIP tokens   L' T5 tokens
Run         python encode.py --data PATH --out DIR --resolution 256 --buckets
            torchrun --nproc_per_node 8 encode.py ...  shared out; then train.py --data DIR
"""

import fcntl
import hashlib
import json
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import scenes
from checkpoints import FROZEN, SHIPPED, find_model_file, fingerprint, load_components, portable
from data import (
    EncodedFolder, ImageFiles, aspect_buckets, check_problems, nearest_bucket, readable, shard_hash)
from devices import World, autocast, command, pick_precision
from options import check_options, option, read_options, write_atomically, write_json
from scenes import HELD_OUT_SEED, Scenes

CACHE = Path("runs/cache")          # what train.py encodes by itself


@torch.no_grad()
def encode_images(images, vae, device, precision):
    """n pictures, uint8 (height, width, 3) -> moments (n, 2C, H, W): means, then log-variances."""
    image = torch.from_numpy(np.stack(images)).to(device)
    image = (image.float() / 127.5 - 1).permute(0, 3, 1, 2)           # (n, 3, height, width)
    with autocast(device, precision):
        means, logvars = vae.encode_moments(image.contiguous())       # (n, C, H, W) each
    return torch.cat([means, logvars], dim=1).half().cpu()


@torch.no_grad()
def encode_texts(captions, text, device, precision):
    """{name: (U, ...)} of U captions. The zeros that pad CLIP to T5's width are not stored."""
    contexts, pooleds = [], []
    for start in range(0, len(captions), 64):
        with autocast(device, precision):
            context, pooled = text(captions[start : start + 64])
        contexts.append(context.half().cpu())
        pooleds.append(pooled.float().cpu())
    context = torch.cat(contexts)                                     # (U, L + L', D)
    pooled = torch.cat(pooleds)                                       # (U, P)
    L, l = text.config.clip_length, text.config.clip_l_width
    g = l + text.config.clip_g_width
    return {
        "clip_l": context[:, :L, :l].contiguous(),                    # (U, 77, 768) in SD3
        "clip_g": context[:, :L, l:g].contiguous(),                   # (U, 77, 1280)
        "t5": context[:, L:].contiguous(),                            # (U, 77, 4096)
        "pooled_l": pooled[:, :l].contiguous(),
        "pooled_g": pooled[:, l:].contiguous()}


def encode_shard(samples, height, width, vae, text, device, precision):
    """(tensors, captions) of a shard, from what `readable` yields of one size. Equal captions are
    stored once. Picture i has the captions caption_row[caption_start[i] : caption_start[i + 1]]."""
    together = max(1, min(64, 64 * 256**2 // (height * width)))       # pictures at a time
    moments, caption_row, caption_start = [], [], [0]
    rows = {}                                                         # {caption: its row}
    while group := list(islice(samples, together)):
        images = [image for image, _ in group]
        moments.append(encode_images(images, vae, device, precision))
        for _, captions in group:
            for caption in captions:
                caption_row.append(rows.setdefault(caption, len(rows)))
            caption_start.append(len(caption_row))
    if not rows:
        return {}, []
    tensors = encode_texts(list(rows), text, device, precision)
    tensors["moments"] = torch.cat(moments)                           # (N, 2C, H, W)
    tensors["caption_row"] = torch.tensor(caption_row)
    tensors["caption_start"] = torch.tensor(caption_start)            # (N + 1,)
    return tensors, list(rows)


# ---- Which picture goes into which shard ---------------------------------------------------------

def hash_of(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def contents(source, index):
    """What the encoding of a sample follows from, besides the recipe: JSON that changes with it."""
    if isinstance(source, Scenes):
        return index
    record = source.records[index]
    about = record.path.stat()
    return [record.name, record.captions, record.offset, about.st_size, about.st_mtime_ns]


def sort_by_size(source, folder, resolution, buckets):
    """{(height, width): sample numbers}. Threads read headers, sizes.json keeps what these say."""
    if not buckets:
        return {(resolution, resolution): range(len(source))}
    file = folder / "sizes.json"
    keys = [hash_of(contents(source, index)) for index in range(len(source))]
    known = {}
    with suppress(Exception):                           # missing or damaged
        known = dict(json.loads(file.read_text()))

    def size_of(index):
        return known.get(keys[index]) or source.picture_size(index)

    with ThreadPoolExecutor(8) as threads:
        sizes = list(threads.map(size_of, range(len(source))))
    write_json(file, dict(zip(keys, sizes)))
    buckets = aspect_buckets(resolution)
    groups = {bucket: [] for bucket in buckets}
    for index, (height, width) in enumerate(sizes):
        groups[nearest_bucket(height, width, buckets)].append(index)
    return groups


def plan_shards(source, folder, resolution, buckets, shard_size, recipe):
    """[{file, height, width, indices}]. The name of a shard follows from all that is in it, so a
    shard never changes. ValueError if the folder was made by another recipe."""
    counts, lines = [], []
    if (folder / "index.json").is_file():
        index = EncodedFolder(folder).index
        if index.get("recipe") != recipe:
            raise ValueError(f"{folder} was made from another source, by other encoders or "
                             f"settings; choose another --out")
        if isinstance(source, Scenes):                  # Other runs need the shards that are there.
            counts = [line["count"] for line in index["shards"]]
            source = Scenes(max(len(source), sum(counts)), source.seed)
    for (height, width), indices in sort_by_size(source, folder, resolution, buckets).items():
        start = 0
        while start < len(indices):
            count = counts.pop(0) if counts else shard_size
            part = list(indices[start : start + count])
            start += count
            samples = [contents(source, index) for index in part]
            file = f"shard-{hash_of([recipe, height, width, samples])}.safetensors"
            lines.append({"file": file, "height": height, "width": width, "indices": part})
    return lines


def read_header(file):
    """{"count", "captions", "skipped", "hash"} of a shard, or {} if it is missing or cut off."""
    try:
        with safe_open(file, "pt") as opened:
            return json.loads(opened.metadata()["shard"])
    except Exception:                                   # safetensors raises errors of many types.
        return {}


def make_shards(lines, folder, source, file, world, precision, until):
    """Encode and write these shards, each whole before it has its name."""
    if not lines:
        return
    parts = load_components(file, ("vae", "text"))
    vae, text = parts.vae.to(world.device), parts.text.to(world.device)
    wanted = []
    for line in lines:
        for index in line["indices"]:
            wanted.append((index, line["height"], line["width"]))
    bar = iter(tqdm(wanted, "encoding", unit="image", disable=world.rank > 0))
    for number, line in enumerate(lines):
        if number > 0 and time.time() > until:
            break
        known = len(source.problems)
        samples = readable(source, islice(bar, len(line["indices"])))
        tensors, captions = encode_shard(
            samples, line["height"], line["width"], vae, text, world.device, precision)
        about = {"count": len(tensors.get("moments", ())), "captions": captions,
                 "skipped": source.problems[known:], "hash": shard_hash(tensors, captions)}
        save = partial(save_file, tensors, metadata={"shard": json.dumps(about)})
        write_atomically(folder / line["file"], save)
    next(bar, None)                                     # The bar ends.


def write_index(index, lines, folder, source):
    """Write index.json with the shards up to the first that is missing. ValueError if over one per
    cent of the pictures cannot be used."""
    problems = set(source.problems)
    for line in lines:
        about = read_header(folder / line["file"])
        if not about:                                   # There was no time for it.
            break
        problems.update(about["skipped"])
        del line["indices"]
        if about["count"]:
            index["shards"].append(line | {"count": about["count"]})
    check_problems(sorted(problems), source.found)
    if problems:
        print(f"{len(problems)} of {source.found} samples cannot be used, for example "
              f"{min(problems)}", file=sys.stderr)
    write_json(folder / "index.json", index)
    listed = {line["file"] for line in lines}
    stale = [file for file in folder.glob("shard-*.safetensors") if file.name not in listed]
    if stale and isinstance(source, ImageFiles):        # A training may still read them.
        print(f"{len(stale)} shards in {folder}, for example {stale[0].name}, are of pictures that "
              f"have changed; no new run reads them, so you may delete them", file=sys.stderr)


def encode_folder(source, folder, encoders_file, resolution, world, buckets=False, shard_size=512,
                  precision="auto", until=math.inf):
    """Everything that a source holds, as shards; those that are there are kept.

    folder: "" stands for one in CACHE. A set of Scenes grows and never shrinks. The processes of
    `world` share the work, and begin no shard after the time `until`. ValueError for a folder of
    another recipe, or if over one per cent of the pictures cannot be read.
    """
    file = find_model_file(encoders_file)
    frozen = fingerprint(file, FROZEN)
    precision = pick_precision(precision, world.device)
    origin = [getattr(source, "seed", ""), Path(scenes.__file__).read_text()]
    if isinstance(source, ImageFiles):
        origin = str(source.path.resolve())
    tokenizers = []                                     # Other tokens make another encoding.
    for part in sorted((file if file.is_dir() else file.parent).glob("tokenizer*/**/*")):
        if part.is_file():
            tokenizers.append(hashlib.sha256(part.read_bytes()).hexdigest())
    recipe = hash_of(
        [origin, frozen, tokenizers, resolution, buckets, shard_size, str(precision)])
    folder = Path(folder or CACHE / recipe).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    missing = []
    with open(folder / ".lock", "w") as lock:          # Two runs can want the same scenes.
        if world.rank == 0:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lines = plan_shards(source, folder, resolution, buckets, shard_size, recipe)
            missing = [line for line in lines if "hash" not in read_header(folder / line["file"])]
        share = world.same(missing)[world.rank :: world.size]
        make_shards(share, folder, source, file, world, precision, until)
        world.any(False)                                # All shards are there.
        if world.rank == 0:
            index = {"encoders": {"path": portable(file), "fingerprint": frozen}, "recipe": recipe,
                     "resolution": resolution, "shards": []}
            write_index(index, lines, folder, source)
        world.any(False)                                # The index is there.
    return EncodedFolder(folder, frozen)


def encoded(config, world, count, until=math.inf):
    """(training, held-out) EncodedFolders of a run; what the cache does not have is made. Held out
    are 64 scenes of HELD_OUT_SEED, or one picture in fifty, at most 64; a single one is both."""
    encode = partial(encode_folder, folder="", encoders_file=config.encoders,
                     resolution=config.resolution, world=world, precision=config.precision)
    if not config.data:
        held_out = encode(Scenes(64, HELD_OUT_SEED))
        training = encode(Scenes(count, config.seed), until=until)
        return training.split(count)[1], held_out.split(64)[1]
    if any(Path(config.data).expanduser().glob("shard-*.safetensors")):
        frozen = fingerprint(find_model_file(config.encoders), FROZEN)
        folder = EncodedFolder(config.data, frozen)
    else:
        folder = encode(ImageFiles(config.data))
    if len(folder) == 1:
        return folder, folder
    return folder.split(min(64, max(1, len(folder) // 50)))


@dataclass(frozen=True)
class EncodeConfig:
    """What is encoded, how, and where to."""
    data: str = option("", "folder, .tar or .jsonl with captioned pictures; empty: scenes")
    out: str = option("", "folder of the shards")
    num_scenes: int = option(16384, "drawn scenes, without --data", 1, 10**9)
    resolution: int = option(0, "S in px; 0: 256, and 64 for scenes", 0, 4096)
    buckets: bool = option(False, "keep aspect ratios: sizes of about S x S px (Sec. 5.3.2)")
    shard_size: int = option(512, "pictures in a shard", 1, 2**16)
    encoders: str = option(str(SHIPPED), "model with the VAE and the text encoders")
    device: str = option("auto", "cuda, mps or cpu; auto: the first that is there")
    precision: str = option("auto", "of matrix products", choices=("auto", "bf16", "fp32"))

    def __post_init__(self):
        check_options(self)
        if not self.out:
            raise ValueError("give --out FOLDER for the shards, and --data PATH for your pictures")
        if self.resolution % 16:
            raise ValueError(f"--resolution {self.resolution} is not a multiple of 16 px (8 x 2)")


def main():
    """From the command line to a folder of shards."""
    config = read_options(EncodeConfig, "Encode captioned pictures once (App. E.1).")
    source, resolution = Scenes(config.num_scenes), config.resolution or 64
    if config.data:
        source, resolution = ImageFiles(config.data), config.resolution or 256
    world = World(config.device, "ddp")
    folder = encode_folder(source, config.out, config.encoders, resolution, world, config.buckets,
                           config.shard_size, config.precision)
    world.close()
    if world.rank == 0:
        print(f"{len(folder)} pictures of {len(folder.groups)} sizes: train.py --data {config.out}")


if __name__ == "__main__":
    command(main)
