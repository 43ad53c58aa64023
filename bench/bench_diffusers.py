"""bench_diffusers.py: our MM-DiT against diffusers' SD3Transformer2DModel, with the same weights.

Where it is at hand, Stability's own reference code is timed too. The models take turns, so that
whatever else the machine does meets all of them. A figure is the median of the ratios of neighbours
(theirs / ours: above 1, ours is faster). Outputs are compared before anything is timed. Forward is
inference; training is forward and backward, without an optimizer; sampling is 28 steps with
guidance from ready text features to a latent, ours by sample.sample_latents, theirs by
StableDiffusion3Pipeline.

Precision   fp32; bf16: fp32 weights under autocast; bf16-weights: both converted, as users of
            diffusers do for sampling
Needs       pip install diffusers transformers accelerate; for --reference also einops and a clone
            of github.com/Stability-AI/sd3.5
Run         python bench/bench_diffusers.py     writes results/bench-diffusers-DEVICE.json
"""

import argparse
import gc
import json
import os
import shlex
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from convert import to_diffusers
from devices import autocast, pick_device
from mmdit import MMDiT, MMDiTConfig
from sample import Settings, sample_latents

GUIDANCE = 5.0
STEPS = 28
SHIFT = 3.0


# ---- One set of weights, several models ----------------------------------------------------------

def make_models(depth: int, device, dtype, reference: str) -> dict:
    """{name: (model, its call with latent, t, context, pooled)}. All have the same random weights,
    none of them zero, so that every part of the network counts."""
    from diffusers import SD3Transformer2DModel
    config = MMDiTConfig(depth, pos_embed_max_size=64)
    rng = torch.Generator().manual_seed(0)
    ours = MMDiT(config)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            mean = 1.0 if ".ln_" in name else 0.0
            spread = 0.1 if "bias" in name else 1 / parameter[0].numel() ** 0.5
            parameter.normal_(mean, spread, generator=rng)
    theirs = SD3Transformer2DModel(
        sample_size=32, num_layers=depth, num_attention_heads=depth, qk_norm="rms_norm",
        caption_projection_dim=64 * depth, pos_embed_max_size=64)
    theirs.load_state_dict(to_diffusers("mmdit", ours.state_dict()))

    def call_theirs(z, t, context, pooled):
        return theirs(z, context, pooled, 1000 * t, return_dict=False)[0]
    models = {"ours": (ours, ours), "diffusers": (theirs, call_theirs)}
    if reference:
        models["sd3.5"] = reference_model(reference, ours)
    for model, _ in models.values():
        model.to(device, dtype)
    return models


def reference_model(folder: str, ours):
    """(model, call) of Stability's code with the weights of ours. Its names are the same."""
    sys.path.insert(0, folder)
    from mmditx import MMDiTX
    config = ours.config
    embedder = {"target": "torch.nn.Linear", "params": {
        "in_features": config.context_dim, "out_features": config.hidden_size}}
    official = MMDiTX(
        None, in_channels=16, depth=config.depth, adm_in_channels=config.pooled_dim, qk_norm="rms",
        pos_embed_max_size=64, num_patches=64**2, context_embedder_config=embedder)
    official.load_state_dict(ours.state_dict())

    def call(z, t, context, pooled):
        return official(z, 1000 * t, pooled, context)
    return official, call


def make_inputs(batch: int, text_tokens: int, side: int, dtype, device):
    """latent z_t, t, context, pooled at 8 * side px."""
    rng = torch.Generator().manual_seed(1)
    latent = torch.randn(batch, 16, side, side, generator=rng).to(device, dtype)
    context = torch.randn(batch, text_tokens, 4096, generator=rng).to(device, dtype)
    pooled = torch.randn(batch, 2048, generator=rng).to(device, dtype)
    return latent, torch.rand(batch, generator=rng).to(device), context, pooled


# ---- What is timed -------------------------------------------------------------------------------

def around(device, precision: str):
    """The context of a call: autocast for "bf16", nothing for the other precisions."""
    return autocast(device, torch.bfloat16 if precision == "bf16" else torch.float32)


def network_call(model, forward, inputs, device, precision: str, training: bool):
    """A function that runs one forward, or forward and backward. It returns the velocity."""
    def call():
        with nullcontext() if training else torch.no_grad(), around(device, precision):
            velocity = forward(*inputs)
            loss = velocity.float().square().mean()
        if training:
            loss.backward()
            model.zero_grad(set_to_none=True)
        return velocity.detach().float()
    return call


def sampling_calls(ours, theirs, device, precision: str, text_tokens: int, side: int):
    """Two functions from text features and noise to a latent: 28 steps, guidance, one picture."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    noise, _, context, pooled = make_inputs(1, text_tokens, side, torch.float32, device)
    settings = Settings(num_steps=STEPS, guidance_scale=GUIDANCE, timestep_shift=SHIFT,
                        schedule="released")
    zero_context = torch.zeros_like(context)
    zero_pooled = torch.zeros_like(pooled)
    both = torch.cat([context, zero_context]), torch.cat([pooled, zero_pooled])
    pipeline = StableDiffusion3Pipeline(
        transformer=theirs, scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT), vae=None,
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)

    def call_ours():
        with torch.no_grad(), around(device, precision):
            return sample_latents(ours, *both, noise, settings)[0].float()

    def call_theirs():
        with torch.no_grad(), around(device, precision):
            return pipeline(
                prompt_embeds=context, pooled_prompt_embeds=pooled, latents=noise,
                negative_prompt_embeds=zero_context, negative_pooled_prompt_embeds=zero_pooled,
                height=8 * side, width=8 * side, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
                output_type="latent").images.float()

    return call_ours, call_theirs


# ---- Turns ---------------------------------------------------------------------------------------

def seconds(call, device) -> float:
    """The time of one call."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(ours, theirs, device, trials: int) -> dict:
    """One call of each to warm up and to compare, then `trials` pairs. The order of a pair changes.
    Seconds are medians."""
    difference = ((ours() - theirs()).norm() / theirs().norm()).item()
    our_times = []
    their_times = []
    for trial in range(trials):
        if trial % 2:
            their_times.append(seconds(theirs, device))
            our_times.append(seconds(ours, device))
        else:
            our_times.append(seconds(ours, device))
            their_times.append(seconds(theirs, device))
    our_times = torch.tensor(our_times, dtype=torch.float64)
    their_times = torch.tensor(their_times, dtype=torch.float64)
    quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, middle, high = (their_times / our_times).quantile(quartiles).tolist()
    return {"relative_difference": difference, "our_seconds": our_times.median().item(),
            "their_seconds": their_times.median().item(), "ratio": middle,
            "ratio_quartiles": [low, high]}


def read_options():
    """The command line."""
    kinds = ["forward", "training", "sampling"]
    precisions = ["fp32", "bf16", "bf16-weights"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--text-tokens", type=int, default=154)
    parser.add_argument("--resolution", type=int, default=256, help="px; 256: 256 image tokens")
    parser.add_argument("--precisions", nargs="+", default=precisions, choices=precisions)
    parser.add_argument("--what", nargs="+", default=kinds, choices=kinds)
    parser.add_argument("--pairs", type=int, default=7, help="timed pairs; for sampling at most 3")
    parser.add_argument("--compile", action="store_true", help="torch.compile for all")
    parser.add_argument("--reference", default="", help="folder with Stability's mmditx.py")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="", help="default: results/bench-diffusers-DEVICE.json")
    options = parser.parse_args()
    smallest = min(options.depth, options.pairs, options.text_tokens, *options.batch_sizes)
    if options.resolution % 16 or smallest < 1:
        parser.error("sizes must be positive, and --resolution a multiple of 16")
    return options


def main():
    """Compare, time, print, write."""
    options = read_options()
    try:
        import diffusers
    except ImportError:
        sys.exit("bench_diffusers.py needs: pip install diffusers transformers accelerate")
    device = pick_device(options.device)
    side = options.resolution // 8
    rows = []
    result = {"command": shlex.join(["python", *sys.argv]), "device": str(device),
              "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "",
              "threads": torch.get_num_threads(), "torch": torch.__version__,
              "diffusers": diffusers.__version__, "depth": options.depth,
              "compile": options.compile, "image_tokens": (side // 2) ** 2,
              "text_tokens": options.text_tokens, "pairs": options.pairs, "rows": rows}
    file = Path(options.out or ROOT / f"results/bench-diffusers-{device.type}.json")

    def measure(what, precision, batch, ours, theirs, rival="diffusers"):
        torch._dynamo.reset()                                         # It compiles for this size.
        pairs = min(3, options.pairs) if what == "sampling" else options.pairs
        row = {"what": what, "precision": precision, "batch_size": batch, "against": rival}
        row |= take_turns(ours, theirs, device, pairs)
        row["load_average"] = os.getloadavg()[0]
        rows.append({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{what:9} {precision:12} batch {batch:2}: ours {row['our_seconds']:7.3f} s, {rival} "
              f"{row['their_seconds']:7.3f} s, ratio {row['ratio']:.2f}, outputs differ by "
              f"{row['relative_difference']:.1e}", flush=True)
        gc.collect()

    for precision in options.precisions:
        dtype = torch.bfloat16 if precision == "bf16-weights" else torch.float32
        models = make_models(options.depth, device, dtype, options.reference)
        ours = models.pop("ours")
        if options.compile:                                           # Each as it is meant to be.
            for block in ours[0].joint_blocks:
                block.forward = torch.compile(block.forward)
            for model, _ in models.values():
                model.compile()
        for batch in options.batch_sizes:
            inputs = make_inputs(batch, options.text_tokens, side, dtype, device)
            for what in ("forward", "training"):
                training = what == "training"
                if what not in options.what or (training and precision == "bf16-weights"):
                    continue
                for rival, theirs in models.items():
                    calls = [network_call(*one, inputs, device, precision, training)
                             for one in (ours, theirs)]
                    measure(what, precision, batch, *calls, rival)
        if "sampling" in options.what and precision != "bf16-weights":  # z stays in fp32 here
            calls = sampling_calls(ours[0], models["diffusers"][0], device, precision,
                                   options.text_tokens, side)
            measure("sampling", precision, 1, *calls)
    print(f"written to {file}")


if __name__ == "__main__":
    main()
