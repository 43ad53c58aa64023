"""loader.py: how fast pre-encoded shards are read back (App. E.1), against plain sequential reads from the page cache.

Writes random shards of SD3's sizes at 256 px (1.02 MB a sample: Table 7), then reads an epoch of them in shuffled order, as
training does. Three numbers, each the median of several passes that take turns in one run:
  sequential   the same bytes, file after file, read() into one buffer: of a batch's size, as a batch has to lie in memory;
               and of 1 MiB, which stays in the processor's cache and so costs less than any batch can
  first pass   EncodedFolder.read with newly opened files: every page is mapped on the way
  later pass   the same files again, as from the second epoch on
`whole batch` adds what Batches does on the device: noise, fp32, zero padding, encoder dropout. On a GPU machine that is done
there and by a thread beside the step; here, on a CPU, it is all counted.

Run         python experiments/loader.py     writes results/loader-cpu.json
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

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoints import ENCODERS, SHIPPED, find_model_file, fingerprint
from encode import Batches, EncodedFolder, layout, sample_bytes
from text_encoders import TextConfig
from train import TrainConfig
from vae import VAE, VAEConfig


def write_shards(folder: Path, shards: int, count: int, resolution: int):
    """Random shards of SD3's sizes, one caption for each picture."""
    entries = []
    for number in range(shards):
        tensors = {name: torch.randn(count, *shape).to(kind)
                   for name, (shape, kind) in layout(VAEConfig(), TextConfig(), resolution, resolution).items()}
        tensors |= {"caption_start": torch.arange(count + 1), "caption_row": torch.arange(count)}
        file = folder / f"shard-{number:05}.safetensors"
        save_file(tensors, file, {"shard": json.dumps({"captions": [str(i) for i in range(count)]})})
        entries.append({"file": file.name, "height": resolution, "width": resolution, "count": count, "captions": count,
                        "bytes": file.stat().st_size})
    encoders = {"path": "pretrained/tiny", "tokenizers": "", "fingerprint": fingerprint(find_model_file(SHIPPED), ENCODERS)}
    (folder / "index.json").write_text(json.dumps({"encoders": encoders, "resolution": resolution, "shards": entries,
                                                   "command": "python experiments/loader.py", "skipped": []}))


def sequential(folder: Path, block: int) -> float:
    """Bytes per second of reading every shard from its beginning to its end."""
    buffer, total = np.ones(block, dtype=np.uint8), 0
    start = time.perf_counter()
    for file in sorted(folder.glob("shard-*")):
        with open(file, "rb", buffering=0) as opened:
            while n := opened.readinto(buffer):
                total += n
    return total / (time.perf_counter() - start)


def gathered(images: EncodedFolder, batch_size: int, epoch: int, sample: int) -> float:
    """Bytes per second of one epoch in shuffled order."""
    order = np.random.default_rng(epoch).permutation(len(images))
    start = time.perf_counter()
    for first in range(0, len(order), batch_size):
        images.read(order[first : first + batch_size].tolist(), lambda k, rows: rows[0])
    return len(order) * sample / (time.perf_counter() - start)


def main():
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--shard-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32, help="of one process")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--passes", type=int, default=7)
    options = parser.parse_args()
    sample, rates = sum(sample_bytes(VAEConfig(), TextConfig(), options.resolution, options.resolution).values()), {}
    with tempfile.TemporaryDirectory() as name:
        folder, B = Path(name), options.batch_size
        write_shards(folder, options.shards, options.shard_size, options.resolution)
        sequential(folder, 2**20)                                                 # into the page cache
        keep = lambda what, rate: rates.setdefault(what, []).append(rate)
        for i in range(options.passes):
            images = EncodedFolder(folder, find_model_file(SHIPPED))
            images.read(range(B), lambda k, rows: rows[0])                        # makes the buffers
            images.opened.clear()
            keep("sequential, buffer of a batch", sequential(folder, B * sample))
            keep("first pass", gathered(images, B, 2 * i, sample))
            keep("sequential, buffer of 1 MiB", sequential(folder, 2**20))
            keep("later pass", gathered(images, B, 2 * i + 1, sample))
        with torch.device("meta"):
            vae = VAE()
        world = SimpleNamespace(rank=0, size=1, device=torch.device("cpu"))
        batches, steps = Batches(images, vae, TextConfig(), TrainConfig(batch_size=B), world), 12
        batches(0)
        start = time.perf_counter()
        for step in range(1, steps + 1):
            batches(step)
        whole = 1000 * (time.perf_counter() - start) / steps / B
    median = {what: float(np.median(values)) for what, values in rates.items()}
    reference = median["sequential, buffer of a batch"]
    for what, rate in median.items():
        print(f"{what:30} {rate / 1e9:6.2f} GB/s   {rate / reference:5.0%}   {1e3 * sample / rate:6.3f} ms per sample")
    print(f"{'whole batch, on this CPU':30} {'':20} {whole:6.3f} ms per sample")
    result = {"command": shlex.join(["python", *sys.argv]), "torch": torch.__version__, "threads": torch.get_num_threads(),
              "sample_bytes": sample, "batch_size": B, "samples": options.shards * options.shard_size,
              "gigabytes_per_second": {what: round(rate / 1e9, 3) for what, rate in median.items()},
              "share_of_sequential": {what: round(rate / reference, 3) for what, rate in median.items()},
              "all_passes": {what: [round(rate / 1e9, 3) for rate in values] for what, values in rates.items()},
              "whole_batch_ms_per_sample": round(whole, 3)}
    (Path(__file__).parents[1] / "results" / "loader-cpu.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
