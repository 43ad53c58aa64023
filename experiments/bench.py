"""bench.py: how fast the network trains, alone, and what share of the machine's matrix-product peak that is.

Measures one training step (forward, backward, AdamW) of MM-DiT at depth 4 on 64-px pictures, 16 image tokens, for several
numbers of text tokens; and the same step with everything around it (drawing cached, text encoders, random numbers).

Run         python experiments/bench.py     writes results/bench-<device>.json
"""

import argparse
import itertools
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoints import SHIPPED, load_components
from data import Scenes
from encode import Batch, Batches, EncodedImages
from flow import RectifiedFlow
from mmdit import MMDiT, MMDiTConfig, training_flops
from sample import pick_device, pick_precision
from train import TrainConfig, compute_context, matmul_peak, train_step


def seconds_per_call(call, device, trials: int) -> float:
    """Median time of a call after one to warm up."""
    times = []
    for _ in range(trials + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def measure_everything(device):
    """--all: then pre-encoded shards, and step by step against diffusers at the sizes that this device can take."""
    here = Path(__file__).parent
    run = lambda *words: subprocess.run([sys.executable, *map(str, words)], check=False)
    run(here / "loader.py")
    if device.type != "cuda":
        run(here / "bench_diffusers.py")
        return
    for depth, resolution, compiled in itertools.product((4, 8, 15, 24, 38), (256, 1024), (False, True)):
        what = ["forward", "sampling"] if depth == 38 else ["forward", "training", "sampling"]      # two 8B models and no more
        out = here.parent / "results" / f"bench-diffusers-cuda-{depth}-{resolution}{'-compiled' if compiled else ''}.json"
        run(here / "bench_diffusers.py", "--depth", depth, "--resolution", resolution, "--precisions", "bf16", "--batch-sizes",
            4 if resolution == 1024 else 32, "--what", *what, "--out", out, *["--compile"][:compiled])


def main():
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--text-tokens", type=int, nargs="+", default=[12, 32, 48])
    parser.add_argument("--compile", action="store_true", help="torch.compile, as train.py --compile")
    parser.add_argument("--trials", type=int, default=9)
    parser.add_argument("--all", action="store_true", help="also loader.py and bench_diffusers.py, on a GPU at depths 4 to 38")
    options = parser.parse_args()
    device = pick_device()
    precision = pick_precision("auto", device)
    autocast = lambda: compute_context(device, precision)
    peak, B = matmul_peak(device, precision), options.batch_size
    sizes = MMDiTConfig(options.depth, context_dim=192, pooled_dim=192, pos_embed_max_size=16, pos_embed_base_size=16)
    model = MMDiT(sizes).to(device)
    for block in model.joint_blocks if options.compile else ():
        block.forward = torch.compile(block.forward)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, eps=1e-15, fused=True)
    config, rows = TrainConfig(batch_size=B), []

    def measure(name, make_batch, text_tokens):
        torch._dynamo.reset()                                                     # every row is compiled for its own sizes
        step = lambda: train_step(model, [optimizer], make_batch(), RectifiedFlow(), config, autocast)
        rate = B / seconds_per_call(step, device, options.trials)
        share = rate * training_flops(sizes, text_tokens, 16) / peak
        rows.append({"what": name, "text_tokens": text_tokens, "images_per_second": round(rate, 1),
                     "share_of_peak": round(share, 3)})
        print(f"{name:14} {text_tokens:3} text tokens: {rate:7.1f} images/s, {share:.0%} of the matrix-product peak")

    for L in options.text_tokens:
        random = Batch(*(torch.randn(shape, device=device) for shape in
                         ((B, 16, 8, 8), (B, L, 192), (B, 192), (B, 16, 8, 8))), torch.rand(B))
        measure("network alone", lambda batch=random: batch, L)
    parts = load_components(SHIPPED, ("vae", "text"))
    world = SimpleNamespace(rank=0, size=1, device=device)
    encode = lambda: EncodedImages(Scenes(512), parts.vae.to(device), parts.text.to(device), 64, device, autocast, True)
    images, rate = encode(), 512 / seconds_per_call(encode, device, 1)
    rows.append({"what": "drawing and encoding scenes", "images_per_second": round(rate, 1)})
    print(f"drawing and encoding scenes of 64 px: {rate:.0f} images/s")
    batches = Batches(images, parts.vae, parts.text.config, config, world)
    length = parts.text.config.clip_length + parts.text.config.t5_length
    steps = iter(range(1 << 30))
    random = Batch(*(torch.randn(shape, device=device) for shape in
                     ((B, 16, 8, 8), (B, length, 192), (B, 192), (B, 16, 8, 8))), torch.rand(B))
    measure("network alone", lambda: random, length)
    measure("end to end", lambda: batches(next(steps)), length)
    features = getattr(torch.cpu, "get_capabilities", dict)()
    processor = torch.cuda.get_device_name() if device.type == "cuda" else features.get("cpu_name", "")
    result = {"command": shlex.join(["python", *sys.argv]), "device": str(device), "processor": processor,
              "amx": bool(features.get("amx_bf16")), "threads": torch.get_num_threads(), "torch": torch.__version__,
              "precision": str(precision), "compile": options.compile, "batch_size": B, "depth": options.depth,
              "matmul_peak_gflops": round(peak / 1e9), "rows": rows}
    file = Path(__file__).parents[1] / "results" / f"bench-{device.type}{'-compiled' if options.compile else ''}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"matrix-product peak {peak / 1e9:.0f} GFLOP/s ({str(precision).removeprefix('torch.')}); written to {file.name}")
    if options.all:
        measure_everything(device)


if __name__ == "__main__":
    main()
