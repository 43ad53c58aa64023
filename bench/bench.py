"""bench.py: how fast the network trains, and what share of the machine's peak that is (MFU).

Measures one training step (forward, backward, AdamW) of MM-DiT: alone for several numbers of text
tokens, then end to end with batches from encoded scenes; the encoding itself; and drawing one
picture.

MFU         model FLOPs of the matrix products, forward and backward, over the seconds of a step and
            the peak of one large matrix product. Torch counts the FLOPs on the module itself
Not here    the plan of a large run (plan.py), reading shards (loader.py), diffusers
            (bench_diffusers.py)
Run         python bench/bench.py           writes results/bench-DEVICE.json
            python bench/bench.py --all     also loader.py, and bench_diffusers.py for this device
"""

import argparse
import itertools
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from batches import Batch, Batches
from checkpoints import SHIPPED, load_components
from devices import World, autocast, pick_device, pick_precision
from encode import encode_folder
from flow import density
from mmdit import MMDiT, MMDiTConfig
from sample import Settings, sample_latents
from scenes import Scenes
from train import TrainConfig, flow_loss, make_optimizers, train_step


def seconds_per_call(call, device, trials: int) -> float:
    """Median time of a call. The first call warms up and is not counted."""
    times = []
    for _ in range(trials + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def matmul_peak(device, dtype) -> float:
    """FLOP/s of a large square matrix product, measured. MFU is a share of it."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, dtype=dtype, device=device)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        (a @ a)[0, 0].item()                                          # It waits for the result.
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def training_flops(model, batch) -> float:
    """FLOPs of one sample's training step: its forward pass, and twice that for the backward pass.
    Attention is counted as the two matrix products that it is (SDPBackend.MATH)."""
    t = torch.rand(len(batch.latent), device=batch.latent.device)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(batch.latent, t, batch.context, batch.pooled)
    return 3 * counter.get_total_flops() / len(batch.latent)


def random_batch(config, size: int, resolution: int, text_tokens: int, device) -> Batch:
    """A batch of square pictures that says nothing."""
    side = resolution // 8
    latent = torch.randn(size, config.latent_channels, side, side, device=device)
    context = torch.randn(size, text_tokens, config.context_dim, device=device)
    pooled = torch.randn(size, config.pooled_dim, device=device)
    return Batch(latent, context, pooled, torch.randn_like(latent), torch.rand(size))


@torch.no_grad()
def seconds_to_draw(model, vae, sizes, resolution, text_tokens, device, precision):
    """Seconds for one picture from its text embeddings, by sample.py's own loop and the VAE."""
    settings = Settings(num_steps=28, height=resolution, width=resolution)
    batch = random_batch(sizes, 2, resolution, text_tokens, device)        # with text and without

    def draw():
        with autocast(device, precision):
            latent, _ = sample_latents(
                model, batch.context, batch.pooled, batch.noise[:1], settings)
            vae.decode(latent)
    return seconds_per_call(draw, device, 3)


def measure_everything(device):
    """Encoded shards, then diffusers step by step, at the sizes that this device can take."""
    def run(*words):
        subprocess.run([sys.executable, *map(str, words)], check=False)

    run(ROOT / "bench" / "loader.py")
    compare = ROOT / "bench" / "bench_diffusers.py"
    if device.type != "cuda":
        run(compare)
        return
    for depth in (4, 8, 15, 24, 38):
        what = ["forward", "training", "sampling"]
        if depth == 38:
            what.remove("training")                                   # Two 8B models, and no more.
        for resolution, batch in ((256, 32), (1024, 4)):
            for compiled in ([], ["--compile"]):
                ending = "-compiled" if compiled else ""
                name = f"bench-diffusers-cuda-{depth}-{resolution}{ending}.json"
                run(compare, "--depth", depth, "--resolution", resolution, "--precisions", "bf16",
                    "--batch-sizes", batch, "--what", *what, "--out", ROOT / "results" / name,
                    *compiled)


def write_result(rows, peak, device, precision, options):
    """The rows, and what they depend on, as JSON in results/."""
    processor = torch.cpu.get_capabilities().get("cpu_name", "")
    if device.type == "cuda":
        processor = torch.cuda.get_device_name()
    result = {"command": shlex.join(["python", *sys.argv]), "device": str(device),
              "processor": processor, "threads": torch.get_num_threads(),
              "torch": torch.__version__, "precision": str(precision), "compile": options.compile,
              "batch_size": options.batch_size, "depth": options.depth,
              "resolution": options.resolution,
              "matmul_peak_gflops": round(peak / 1e9), "rows": rows}
    name = f"bench-{device.type}{'-compiled' if options.compile else ''}.json"
    file = Path(options.out or ROOT / "results" / name)
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"a large matrix product: {peak / 1e9:.0f} GFLOP/s in {precision}; see {file.name}")


def read_options():
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--resolution", type=int, default=64, help="px, a multiple of 16")
    parser.add_argument("--text-tokens", type=int, nargs="+", default=[12, 36, 48])
    parser.add_argument("--compile", action="store_true", help="torch.compile, as train.py does")
    parser.add_argument("--trials", type=int, default=9)
    parser.add_argument("--out", default="", help="results/bench-DEVICE.json, if not given")
    parser.add_argument("--all", action="store_true", help="also loader.py and bench_diffusers.py")
    options = parser.parse_args()
    if min(options.depth, options.batch_size, options.trials, *options.text_tokens) < 1:
        parser.error("--depth, --batch-size, --text-tokens and --trials must be 1 or more")
    if options.resolution < 16 or options.resolution % 16:
        parser.error(f"--resolution {options.resolution} is not a multiple of 16 px")
    return options


def make_model(options, text, device):
    """An MM-DiT for these text encoders, compiled if that is asked for."""
    sizes = MMDiTConfig(options.depth, context_dim=text.t5_width,
                        pooled_dim=text.clip_l_width + text.clip_g_width,
                        pos_embed_max_size=max(16, options.resolution // 16))
    with torch.device(device):
        model = MMDiT(sizes)
    if options.compile:
        for block in model.joint_blocks:
            block.forward = torch.compile(block.forward)
    return model


def time_training(name, model, batches, config, peak, trials):
    """A row of the result: images per second of training steps on batches(0), batches(1), ..."""
    device = next(model.parameters()).device
    optimizers = make_optimizers(model, config)
    loss = partial(flow_loss, density=density("lognorm(0, 1)"), timestep_shift=1.0)
    flops = training_flops(model, batches(0))
    torch._dynamo.reset()                                             # It compiles from here on.
    steps = itertools.count()

    def step():
        train_step(model, optimizers, loss, batches(next(steps)), config)
    rate = config.batch_size / seconds_per_call(step, device, trials)
    tokens = batches(0).context.shape[1]
    mfu = rate * flops / peak
    print(f"{name:14} {tokens:3} text tokens: {rate:7.1f} images/s, MFU {mfu:.0%}")
    return {"what": name, "text_tokens": tokens, "images_per_second": round(rate, 1),
            "mfu": round(mfu, 3)}


def main():
    """Measure, print, write."""
    options = read_options()
    device = pick_device()
    precision = pick_precision("auto", device)
    peak = matmul_peak(device, precision)
    parts = load_components(SHIPPED, ("vae", "text"))
    vae = parts.vae.to(device)
    model = make_model(options, parts.text.config, device)
    config = TrainConfig(batch_size=options.batch_size, optimizer="adamw", depth=options.depth)
    rows = []
    for tokens in options.text_tokens:
        seconds = seconds_to_draw(model, vae, model.config, options.resolution, tokens, device,
                                  precision)
        rows.append({"what": "drawing a picture, 28 steps with guidance", "text_tokens": tokens,
                     "seconds": round(seconds, 3)})
        print(f"drawing, 28 steps with guidance, {tokens} text tokens: {seconds:.3f} s a picture")
        batch = random_batch(model.config, options.batch_size, options.resolution, tokens, device)
        rows.append(time_training("network alone", model, lambda step, batch=batch: batch, config,
                                  peak, options.trials))
    world = World(str(device), "ddp")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        encoded = encode_folder(Scenes(1024), folder, SHIPPED, options.resolution, world)
        rate = 1024 / (time.perf_counter() - start)
        rows.append({"what": "drawing and encoding scenes", "images_per_second": round(rate, 1)})
        print(f"drawing and encoding scenes: {rate:.0f} images/s")
        batches = Batches(encoded, parts.vae.config, parts.text.config, config, world)
        rows.append(time_training("end to end", model, batches, config, peak, options.trials))
    write_result(rows, peak, device, precision, options)
    if options.all:
        measure_everything(device)


if __name__ == "__main__":
    main()
