"""loader.py: how fast pre-encoded shards are read back (App. E.1), against plain sequential reads.

It writes random shards of SD3's sizes at 256 px (1.02 MB a sample: Table 7) and reads an epoch of
them in shuffled order, as training does. Each number is the median of passes that take turns:
  sequential   the same bytes from the page cache, file after file, into one buffer: of a batch's
               size, as a batch has to lie in memory; and of 1 MiB, which stays in the processor's
               cache and so costs less than any batch can
  check        SHA-256 of every shard, once in each process that reads it
  first pass   EncodedFolder.read with newly opened files: every page is mapped on the way
  later pass   the same files again, as from the second epoch on
`whole batch` adds what Batches does on the device: noise, fp32, zero padding, encoder dropout. On a
GPU machine other processes do that, beside the step; here, on a CPU, all of it is counted.

Run         python bench/loader.py     writes results/loader-cpu.json
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from batches import Batches
from data import EncodedFolder, shard_hash
from text_encoders import TextConfig
from vae import VAEConfig


def write_shards(folder: Path, shards: int, count: int, resolution: int) -> int:
    """Random shards of SD3's sizes, one caption for each picture. Returns the bytes of a sample."""
    lines = []
    side = resolution // 8
    for number in range(shards):
        tensors = {
            "moments": torch.randn(count, 32, side, side).half(),
            "clip_l": torch.randn(count, 77, 768).half(),
            "clip_g": torch.randn(count, 77, 1280).half(),
            "t5": torch.randn(count, 77, 4096).half(),
            "pooled_l": torch.randn(count, 768),
            "pooled_g": torch.randn(count, 1280)}
        sample = sum(tensor.nbytes for tensor in tensors.values()) // count
        tensors["caption_start"] = torch.arange(count + 1)
        tensors["caption_row"] = torch.arange(count)
        file = folder / f"shard-{number:05}.safetensors"
        captions = [str(i) for i in range(count)]
        about = {"captions": captions, "hash": shard_hash(tensors, captions)}
        save_file(tensors, file, {"shard": json.dumps(about)})
        lines.append({"file": file.name, "height": resolution, "width": resolution, "count": count})
    index = {"encoders": {"path": "", "fingerprint": ""}, "resolution": resolution, "shards": lines}
    (folder / "index.json").write_text(json.dumps(index))
    return sample


def sequential(folder: Path, block: int) -> float:
    """Bytes per second of reading every shard from its beginning to its end."""
    buffer, total = np.ones(block, dtype=np.uint8), 0
    start = time.perf_counter()
    for file in sorted(folder.glob("shard-*")):
        with open(file, "rb", buffering=0) as opened:
            while n := opened.readinto(buffer):
                total += n
    return total / (time.perf_counter() - start)


def gathered(folder: EncodedFolder, batch_size, epoch, sample) -> float:
    """Bytes per second of one epoch in shuffled order."""
    order = np.random.default_rng(epoch).permutation(len(folder))
    start = time.perf_counter()
    for first in range(0, len(order), batch_size):
        indices = order[first : first + batch_size].tolist()
        rows = [folder.caption_rows(index)[0] for index in indices]
        folder.read(indices, rows)
    return len(order) * sample / (time.perf_counter() - start)


def opened(folder: Path) -> tuple[EncodedFolder, float]:
    """A folder whose shards are checked and mapped, no page of them touched; and bytes a second."""
    images = EncodedFolder(folder)
    start = time.perf_counter()
    for first in images.starts[:-1]:
        images.find(first)
    seconds = time.perf_counter() - start
    total = sum(file.stat().st_size for file in folder.glob("shard-*"))
    return images, total / seconds


def main():
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--shard-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32, help="of one process")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--out", default=ROOT / "results" / "loader-cpu.json", type=Path)
    options = parser.parse_args()
    if min(options.shards, options.shard_size, options.batch_size, options.passes) < 1:
        parser.error("--shards, --shard-size, --batch-size and --passes must be 1 or more")
    rates, B = {}, options.batch_size
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sample = write_shards(folder, options.shards, options.shard_size, options.resolution)
        sequential(folder, 2**20)                                     # into the page cache
        for i in range(options.passes):
            images, check = opened(folder)
            for what, rate in (
                    ("sequential, buffer of a batch", sequential(folder, B * sample)),
                    ("first pass", gathered(images, B, 2 * i, sample)),
                    ("sequential, buffer of 1 MiB", sequential(folder, 2**20)),
                    ("later pass", gathered(images, B, 2 * i + 1, sample)),
                    ("check", check)):
                rates.setdefault(what, []).append(rate)
        world = SimpleNamespace(rank=0, size=1, device=torch.device("cpu"), workers=0)
        config = SimpleNamespace(seed=0, batch_size=B, encoder_dropout=0.464, full_captions=0.5)
        batches, steps = Batches(images, VAEConfig(), TextConfig(), config, world), 12
        batches(0)
        start = time.perf_counter()
        for step in range(1, steps + 1):
            batches(step)
        whole = 1000 * (time.perf_counter() - start) / steps / B
    median = {what: float(np.median(values)) for what, values in rates.items()}
    reference = median["sequential, buffer of a batch"]
    for what, rate in median.items():
        print(f"{what:30} {rate / 1e9:6.2f} GB/s   {rate / reference:5.0%}   "
              f"{1e3 * sample / rate:6.3f} ms per sample")
    print(f"{'whole batch, on this CPU':30} {'':20} {whole:6.3f} ms per sample")
    result = {
        "command": shlex.join(["python", *sys.argv]), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "sample_bytes": sample, "batch_size": B,
        "samples": options.shards * options.shard_size,
        "gigabytes_per_second": {what: round(rate / 1e9, 3) for what, rate in median.items()},
        "share_of_sequential": {what: round(rate / reference, 3) for what, rate in median.items()},
        "all_passes": {what: [round(rate / 1e9, 3) for rate in values]
                       for what, values in rates.items()},
        "whole_batch_ms_per_sample": round(whole, 3)}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
