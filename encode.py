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
from batches import scene_buckets, to_unit
from checkpoints import FROZEN, SHIPPED, find_model_file, fingerprint, load_components, portable
from data import (
    EncodedFolder, ImageFiles, aspect_buckets, check_problems, nearest_bucket, readable, shard_hash)
from devices import World, autocast, command, pick_precision
from options import check_options, option, read_options, write_atomically, write_json
from scenes import HELD_OUT_SEED, Scenes


def encode_images(images, vae, device, precision):
    """n pictures, uint8 (height, width, 3) -> moments (n, 2C, H, W): means, then log-variances."""
    image = to_unit(torch.from_numpy(np.stack(images)), device)       # (n, 3, height, width)
    with autocast(device, precision):
        means, logvars = vae.encode_moments(image)                    # (n, C, H, W) each
    moments = torch.cat([means, logvars], dim=1)
    return moments.half().contiguous().cpu()


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


@torch.no_grad()
def encode_shard(samples, height, width, vae, text, device, precision):
    """(tensors, about) of the samples of one size that `readable` yields. Equal captions are
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
    captions = list(rows)
    about = {"count": len(caption_start) - 1, "captions": captions}
    if not captions:                                                  # No picture can be read.
        return {}, about
    tensors = encode_texts(captions, text, device, precision)
    tensors["moments"] = torch.cat(moments)                           # (N, 2C, H, W)
    tensors["caption_row"] = torch.tensor(caption_row)
    tensors["caption_start"] = torch.tensor(caption_start)            # (N + 1,)
    return tensors, about


# ---- Which picture goes into which shard ---------------------------------------------------------

def hash_of(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def identify(source):
    """(origin, keys): what changes with the whole source, and a text that does with each sample."""
    if isinstance(source, Scenes):
        code = Path(scenes.__file__).read_text()
        return [source.seed, code], [str(index) for index in range(len(source))]
    keys = []
    for part in source.records:
        file = part.path.stat()
        about = [part.name, part.captions, part.offset, file.st_size, file.st_mtime_ns]
        keys.append(hash_of(about))
    return str(source.path.resolve()), keys


def sort_by_size(source, keys, folder, buckets):
    """{(height, width): sample numbers}. Threads read headers; sizes.json keeps sizes by key."""
    sizes = {}
    with suppress(Exception):                           # missing or damaged
        sizes = dict(json.loads((folder / "sizes.json").read_text()))
    unknown = [index for index, key in enumerate(keys) if key not in sizes]
    with ThreadPoolExecutor(8) as threads:
        for index, size in zip(unknown, threads.map(source.picture_size, unknown)):
            sizes[keys[index]] = size
    write_json(folder / "sizes.json", sizes)
    groups = {bucket: [] for bucket in buckets}
    for index, key in enumerate(keys):
        groups[nearest_bucket(*sizes[key], buckets)].append(index)
    return groups


def plan_shards(groups, keys, shard_size, recipe):
    """[({file, height, width}, what `readable` wants)]. A shard is named by a hash of its contents.
    So no file is overwritten, and a run goes on with its shards when pictures have changed."""
    lines = []
    for (height, width), indices in groups.items():
        for start in range(0, len(indices), shard_size):
            part = indices[start : start + shard_size]
            name = hash_of([recipe, height, width, [keys[index] for index in part]])
            line = {"file": f"shard-{name}.safetensors", "height": height, "width": width}
            lines.append((line, [(index, height, width) for index in part]))
    return lines


def read_header(file):
    """What `make_shards` says about a shard, or {} if that is missing or cut off."""
    with suppress(Exception), safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["shard"])
    return {}


def make_shards(lines, folder, source, file, world, precision, until):
    """Encode and write these shards. A shard gets its name only once it is whole."""
    parts = load_components(file, ("vae", "text"))
    vae, text = parts.vae.to(world.device), parts.text.to(world.device)
    wanted = []
    for _, samples in lines:
        wanted += samples
    bar = iter(tqdm(wanted, "encoding", unit="image", disable=world.rank > 0))
    for number, (line, samples) in enumerate(lines):
        if number > 0 and time.time() > until:
            break
        known = len(source.problems)
        read = readable(source, islice(bar, len(samples)))
        tensors, about = encode_shard(
            read, line["height"], line["width"], vae, text, world.device, precision)
        about["skipped"] = source.problems[known:]
        about["hash"] = shard_hash(tensors, about["captions"])
        save = partial(save_file, tensors, metadata={"shard": json.dumps(about)})
        write_atomically(folder / line["file"], save)
    next(bar, None)                                     # The bar sees its end.
    text.note_cut()


def write_index(index, lines, folder, source):
    """Write index.json with the shards up to the first that is missing. ValueError if over one per
    cent of the pictures cannot be used."""
    problems = set(source.problems)
    for line, _ in lines:
        about = read_header(folder / line["file"])
        if not about:                                   # There was no time for it.
            break
        problems.update(about["skipped"])
        if about["count"]:
            index["shards"].append(line | {"count": about["count"]})
    check_problems(sorted(problems), source.found)
    if problems:
        print(f"{len(problems)} of {source.found} samples cannot be used, for example "
              f"{min(problems)}", file=sys.stderr)
    write_json(folder / "index.json", index)


def encode_folder(source, folder, encoders_file, resolution, world, buckets=(), shard_size=512,
                  precision="auto", until=np.inf, cached=False):
    """The EncodedFolder of a source. The processes of `world` share out the shards that are missing
    and begin none after the time `until`. buckets: sizes (height, width), of which a picture gets
    the nearest; none: all are square. cached: `folder` has a folder for each recipe. ValueError for
    a folder of another recipe, or if over one per cent of the pictures cannot be read."""
    file = find_model_file(encoders_file)
    frozen = fingerprint(file, FROZEN)
    precision = pick_precision(precision, world.device)
    origin, keys = identify(source)
    beside = file if file.is_dir() else file.parent     # Other tokens make another encoding.
    files = filter(Path.is_file, sorted(beside.glob("tokenizer*/**/*")))
    tokenizers = [part.read_bytes().hex() for part in files]
    recipe = hash_of([origin, frozen, tokenizers, resolution, buckets, shard_size, str(precision)])
    folder = Path(folder).expanduser() / (recipe if cached else "")
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "index.json").is_file() and EncodedFolder(folder).index.get("recipe") != recipe:
        raise ValueError(f"{folder} is of another source, encoders or settings; change --out")
    missing = []
    with open(folder / ".lock", "w") as lock:           # Two runs can want the same pictures.
        if world.rank == 0:
            fcntl.flock(lock, fcntl.LOCK_EX)
            groups = {(resolution, resolution): range(len(source))}
            if buckets:
                groups = sort_by_size(source, keys, folder, buckets)
            lines = plan_shards(groups, keys, shard_size, recipe)
            for half in folder.glob("*.partial"):       # A kill left it.
                half.unlink()
            for line, samples in lines:
                if "hash" not in read_header(folder / line["file"]):
                    missing.append((line, samples))
        share = world.same(missing)[world.rank :: world.size]
        if share:
            make_shards(share, folder, source, file, world, precision, until)
        world.gather(None)                              # Every process has written its shards.
        if world.rank == 0:
            index = {"encoders": {"path": portable(file), "fingerprint": frozen}, "recipe": recipe,
                     "resolution": resolution, "shards": []}
            write_index(index, lines, folder, source)
        world.gather(None)                              # The index is there.
        return EncodedFolder(folder, frozen)            # before another run can write its index


def encoded(config, world, count, until=np.inf):
    """(training, held-out) EncodedFolders of a run. They are made once, in a folder "cache" beside
    that of the run. Held out are 64 scenes of HELD_OUT_SEED, or one picture in fifty, at most 64; a
    single one is both. With a count of 0 there is no training folder."""
    cache = Path(config.out or "runs/new").parent / "cache"
    encode = partial(encode_folder, folder=cache, encoders_file=config.encoders, world=world,
                     resolution=config.resolution, precision=config.precision, cached=True)
    if not config.data:
        held_out = encode(Scenes(64, HELD_OUT_SEED))
        if count == 0:
            return None, held_out
        scenes = Scenes(count, config.seed)
        if config.buckets:                              # A part of them would lack a whole size.
            return encode(scenes, buckets=scene_buckets(config)), held_out
        return encode(scenes, until=until), held_out
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
    data: str = option("", "folder, .tar or .jsonl with captioned pictures")
    out: str = option("", "folder of the shards")
    resolution: int = option(256, "S in px", 16, 4096)
    buckets: bool = option(False, "keep aspect ratios: sizes of about S x S px (Sec. 5.3.2)")
    shard_size: int = option(512, "pictures in a shard", 1, 2**16)
    encoders: str = option(str(SHIPPED), "model with the VAE and the text encoders")
    device: str = option("auto", "cuda, mps or cpu; auto: the first that is there")
    precision: str = option("auto", "of matrix products", choices=("auto", "bf16", "fp32"))

    def __post_init__(self):
        check_options(self)
        if not self.out or not self.data:
            raise ValueError("give --data PATH for your pictures, and --out FOLDER for the shards")
        if self.resolution % 16:
            raise ValueError(f"--resolution {self.resolution} is not a multiple of 16 px (8 x 2)")


def main():
    """From the command line to a folder of shards."""
    config = read_options(EncodeConfig, "Encode captioned pictures once (App. E.1).")
    world = World(config.device, "ddp")
    buckets = aspect_buckets(config.resolution) if config.buckets else ()
    folder = encode_folder(ImageFiles(config.data), config.out, config.encoders, config.resolution,
                           world, buckets, config.shard_size, config.precision)
    world.close()
    if world.rank == 0:
        print(f"{len(folder)} pictures of {len(folder.groups)} sizes: train.py --data {config.out}")


if __name__ == "__main__":
    command(main)
