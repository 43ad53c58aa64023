"""table7_encoders.py: what the frozen encoders cost (SD3, App. E.1, Table 7).

Memory and storage follow from shapes alone, so they are those of the paper's encoders exactly. The
time of a forward pass is measured on this machine, with random weights where the encoder fits into
memory; T5 is timed with one and with two of its layers, which all cost the same. The last column is
by how much a training step would grow if the encoder ran inside it. It needs a training step on
the same machine: the paper's is 568 ms for 2B parameters, ours is that of the checkpoint's MM-DiT.

Run   python experiments/table7_encoders.py            both tables, about 20 minutes on two cores
      python experiments/table7_encoders.py --quick    small batches, only the checkpoint is timed
"""

import argparse
import json
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from checkpoints import (
    SHIPPED, add_options, check_options, given_options, load_components, option, write_atomically)
from devices import autocast, command, pick_device, pick_precision
from flow import rectified_flow_loss
from text_encoders import CLIPConfig, CLIPTextEncoder, T5Config, T5Encoder, TextConfig
from vae import VAE, VAEConfig

# GB of memory, ms a sample at batch size 32, kB stored, per cent of a training step of 568 ms
PAPER = {"vae": (0.14, 2.45, 65.5, 13.8), "clip_l": (0.49, 0.45, 121.3, 2.6),
         "clip_g": (2.78, 2.77, 202.2, 15.6), "t5": (19.05, 17.46, 630.7, 98.3)}
CLIP_L = CLIPConfig()
CLIP_G = CLIPConfig(hidden_size=1280, num_layers=32, activation="gelu", projection_dim=1280)


@dataclass(frozen=True)
class Options:
    checkpoint: str = option(str(SHIPPED), "whose encoders and MM-DiT are timed")
    resolution: int = option(256, "side of a picture in pixels", 16, 2048)
    batch_size: int = option(32, "samples in a forward pass, as in the paper", 1, 4096)
    repeats: int = option(5, "timed passes; the median counts", 1, 1000)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    precision: str = option("auto", "type of matrix products", choices=("auto", "fp32", "bf16"))
    quick: bool = option(False, "two samples, one pass, no time for the paper's encoders")
    out: str = option(str(ROOT / "results" / "table7_encoders.json"), "where the numbers go")

    def __post_init__(self):
        check_options(self)


def memory_bytes(network):
    """The bytes of a network's parameters in fp32, as the paper counts them."""
    return 4 * sum(parameter.numel() for parameter in network.parameters())


def stored_bytes(vae, text, resolution):
    """{encoder: bytes on disk for one sample}, App. E.1: sequences and moments in half precision,
    pooled vectors in fp32. The zeros that pad CLIP's channels (App. B.2) are not stored."""
    side = resolution // vae.downsampling
    return {"vae": 2 * 2 * vae.latent_channels * side**2,
            "clip_l": 2 * text.clip_length * text.clip_l_width + 4 * text.clip_l_width,
            "clip_g": 2 * text.clip_length * text.clip_g_width + 4 * text.clip_g_width,
            "t5": 2 * text.t5_length * text.t5_width}


class Stopwatch:
    """Measures passes on one device."""

    def __init__(self, options):
        self.device = pick_device(options.device)
        self.precision = pick_precision(options.precision, self.device)
        self.repeats = options.repeats

    def seconds(self, function, *inputs):
        """The median time of function(*inputs), after one pass that is not counted."""
        times = []
        for _ in range(self.repeats + 1):
            start = time.perf_counter()
            with autocast(self.device, self.precision):
                function(*inputs)
            if self.device.type != "cpu":
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - start)
        return torch.tensor(times[1:]).median().item()


def encoder_seconds(network, inputs, watch):
    """The time of one forward pass without gradients."""
    network = network.to(watch.device).eval()
    with torch.no_grad():
        return watch.seconds(network, inputs.to(watch.device))


def layered_seconds(make, config, inputs, watch):
    """The time of an encoder of equal layers, from its passes with one and with two of them."""
    one = encoder_seconds(make(replace(config, num_layers=1)), inputs, watch)
    two = encoder_seconds(make(replace(config, num_layers=2)), inputs, watch)
    return one + (config.num_layers - 1) * (two - one)


def step_seconds(mmdit, text, options, watch):
    """The time of a training step: forward, backward and AdamW on random latents."""
    side = options.resolution // 8
    mmdit = mmdit.to(watch.device).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(mmdit.parameters())
    B, L = options.batch_size, text.clip_length + text.t5_length
    shapes = ((B, mmdit.config.latent_channels, side, side), (B, L, text.context_dim),
              (B, text.pooled_dim))
    latent, context, pooled = (torch.randn(shape, device=watch.device) for shape in shapes)
    t = torch.rand(B, device=watch.device)

    def step():
        loss = rectified_flow_loss(mmdit, latent, context, pooled, t, torch.randn_like(latent))
        loss.mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return watch.seconds(step)


def table(networks, seconds, stored, batch_size, step):
    """Rows of Table 7. seconds: {encoder: time of a batch}; step: of a training step, or None."""
    rows = []
    for name, network in networks.items():
        row = {"encoder": name, "memory_gb": memory_bytes(network) / 1e9,
               "storage_kb": stored[name] / 1e3}
        if name in seconds:
            row["ms_per_sample"] = 1e3 * seconds[name] / batch_size
            if step is not None:
                row["step_grows_percent"] = 100 * seconds[name] / step
        rows.append(row)
    return rows


def papers_encoders(options, watch):
    """The table for the encoders of SD3, with random weights."""
    with torch.device("meta"):
        networks = {"vae": VAE().encoder, "clip_l": CLIPTextEncoder(CLIP_L),
                    "clip_g": CLIPTextEncoder(CLIP_G), "t5": T5Encoder(T5Config())}
    seconds = {}
    if not options.quick:
        image = torch.rand(options.batch_size, 3, options.resolution, options.resolution)
        ids = torch.randint(0, 32000, (options.batch_size, 77))
        seconds["vae"] = encoder_seconds(VAE().encoder, image, watch)
        seconds["clip_l"] = encoder_seconds(CLIPTextEncoder(CLIP_L), ids, watch)
        seconds["clip_g"] = encoder_seconds(CLIPTextEncoder(CLIP_G), ids, watch)
        seconds["t5"] = layered_seconds(T5Encoder, T5Config(), ids, watch)
    stored = stored_bytes(VAEConfig(), TextConfig(), options.resolution)
    return table(networks, seconds, stored, options.batch_size, None)


def checkpoints_encoders(options, watch):
    """The table for a checkpoint, and the seconds of a training step of its MM-DiT."""
    parts = load_components(options.checkpoint)
    networks = nn.ModuleDict({"vae": parts.vae.encoder, **parts.text.encoders})
    image = torch.rand(options.batch_size, 3, options.resolution, options.resolution)
    ids = parts.text.tokenize(["a red circle left of a blue square"] * options.batch_size)
    seconds = {}
    for name, network in networks.items():
        seconds[name] = encoder_seconds(network, image if name == "vae" else ids[name], watch)
    step = step_seconds(parts.mmdit, parts.text.config, options, watch)
    stored = stored_bytes(parts.vae.config, parts.text.config, options.resolution)
    return table(networks, seconds, stored, options.batch_size, step), step


def print_table(rows):
    for row in rows:
        line = f"{row['encoder']:8}{row['memory_gb']:9.3f} GB{row['storage_kb']:9.1f} kB"
        if "ms_per_sample" in row:
            line += f"{row['ms_per_sample']:9.2f} ms a sample"
        if "step_grows_percent" in row:
            line += f"{row['step_grows_percent']:7.1f} % of a step"
        print(line)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add_options(parser, Options)
    options = Options(**given_options(parser.parse_args(), Options))
    if options.quick:
        options = replace(options, batch_size=2, repeats=1)
    watch = Stopwatch(options)
    print("the paper's Table 7 (GB, ms a sample, kB, % of a step of 568 ms)")
    for name, numbers in PAPER.items():
        print(f"{name:8}", *(f"{number:8}" for number in numbers))
    print("the same encoders here, with random weights")
    paper = papers_encoders(options, watch)
    print_table(paper)
    rows, step = checkpoints_encoders(options, watch)
    print(f"{options.checkpoint}, a training step of {1e3 * step:.0f} ms")
    print_table(rows)
    result = {"command": shlex.join(["python", "experiments/table7_encoders.py", *sys.argv[1:]]),
              "torch": torch.__version__, "device": str(watch.device),
              "precision": str(watch.precision), "threads": torch.get_num_threads(),
              "resolution": options.resolution, "batch_size": options.batch_size,
              "papers_table": PAPER, "papers_encoders": paper, "checkpoint_encoders": rows,
              "checkpoint_step_ms": 1e3 * step}
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(options.out, lambda partial: partial.write_text(text))


if __name__ == "__main__":
    command(main)
