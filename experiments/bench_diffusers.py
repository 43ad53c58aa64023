"""bench_diffusers.py: our MM-DiT against diffusers' SD3Transformer2DModel, same sizes, same weights, in one run; where it is at
hand, also against Stability's own reference code.

The two take turns, so that whatever else the machine does meets both; a figure is the median of the ratios of neighbours
(theirs / ours, above 1 where ours is faster). Outputs are compared before anything is timed. Forward is inference; training is
forward and backward, without an optimizer; sampling is 28 steps with guidance from ready text features to a latent, ours by
sample.sample_latents, theirs by StableDiffusion3Pipeline.

Precision   fp32; bf16: fp32 weights under autocast; bf16-weights: both converted, as diffusers' users do for sampling
Needs       pip install diffusers transformers accelerate (for this comparison only); for --reference also einops and a clone of
            github.com/Stability-AI/sd3.5
Run         python experiments/bench_diffusers.py     writes results/bench-diffusers-<device>.json
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

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoints import to_diffusers
from mmdit import MMDiT, MMDiTConfig, forward_flops
from sample import Settings, pick_device, sample_latents
from train import compute_context, matmul_peak

GUIDANCE, STEPS, SHIFT = 5.0, 28, 3.0


# ------------------------------------------------------------------------------------------------------------
# One set of weights, two models
# ------------------------------------------------------------------------------------------------------------

def make_models(depth: int, device, dtype, reference: str) -> dict:
    """The same random weights, none of them zero, so that every part of the network counts: name -> (model, its call with
    latent, t, context, pooled)."""
    from diffusers import SD3Transformer2DModel
    config, rng = MMDiTConfig(depth, pos_embed_max_size=64, pos_embed_base_size=16), torch.Generator().manual_seed(0)
    ours = MMDiT(config)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            spread = 0.1 if "bias" in name else 1 / parameter[0].numel() ** 0.5
            parameter.normal_(1.0 if ".ln_" in name else 0.0, spread, generator=rng)
    theirs = SD3Transformer2DModel(
        sample_size=32, num_layers=depth, num_attention_heads=depth, caption_projection_dim=64 * depth, qk_norm="rms_norm",
        pos_embed_max_size=64)
    theirs.load_state_dict(to_diffusers("mmdit", ours.state_dict()))
    models = {"ours": (ours, ours),
              "diffusers": (theirs, lambda z, t, context, pooled: theirs(z, context, pooled, 1000 * t, return_dict=False)[0])}
    if reference:
        sys.path.insert(0, reference)
        from mmditx import MMDiTX
        official = MMDiTX(
            None, in_channels=16, depth=depth, adm_in_channels=config.pooled_dim, qk_norm="rms", pos_embed_max_size=64,
            num_patches=64**2, context_embedder_config={"target": "torch.nn.Linear", "params": {
                "in_features": config.context_dim, "out_features": config.hidden_size}})
        official.load_state_dict(ours.state_dict())                                # names are the same
        models["sd3.5"] = official, lambda z, t, context, pooled: official(z, 1000 * t, pooled, context)
    for model, _ in models.values():
        model.to(device, dtype)
    return models


def make_inputs(batch: int, text_tokens: int, side: int, dtype, device):
    """latent z_t, t, context, pooled at 8 * side px."""
    rng = torch.Generator().manual_seed(1)
    shapes = ((batch, 16, side, side), (batch, text_tokens, 4096), (batch, 2048))
    latent, context, pooled = (torch.randn(shape, generator=rng).to(device, dtype) for shape in shapes)
    return latent, torch.rand(batch, generator=rng).to(device), context, pooled


# ------------------------------------------------------------------------------------------------------------
# Calls to be timed
# ------------------------------------------------------------------------------------------------------------

def contexts(device, precision: str, training: bool):
    """What surrounds our call and theirs. Ours trains under train.compute_context and samples as sample.py does."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    return (lambda: compute_context(device, dtype)) if training else autocast, autocast


def network_calls(models, rival: str, inputs, device, precision: str, training: bool):
    """Two functions, ours and the rival's, that run one forward, or forward and backward, and return the velocity."""
    def make_call(model, forward, around):
        def call():
            with nullcontext() if training else torch.no_grad(), around():
                velocity = forward(*inputs)
                loss = velocity.float().square().mean()
            if training:
                loss.backward()
                model.zero_grad(set_to_none=True)
            return velocity.detach().float()
        return call

    around_ours, around_theirs = contexts(device, precision, training)
    return make_call(*models["ours"], around_ours), make_call(*models[rival], around_theirs)


def sampling_calls(ours, theirs, device, precision: str, text_tokens: int, side: int):
    """Two functions from text features and noise to a latent: 28 steps, guidance, one picture."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    dtype = torch.bfloat16 if precision == "bf16-weights" else torch.float32
    noise, _, context, pooled = make_inputs(1, text_tokens, side, dtype, device)
    _, autocast = contexts(device, precision, training=False)

    settings = Settings(num_steps=STEPS, guidance_scale=GUIDANCE, timestep_shift=SHIFT, schedule="released")
    zeros = torch.zeros_like(context), torch.zeros_like(pooled)
    their_pipeline = StableDiffusion3Pipeline(
        transformer=theirs, scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT), vae=None, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None)
    their_pipeline.set_progress_bar_config(disable=True)

    def call_ours():
        with torch.no_grad(), autocast():
            return sample_latents(ours, (context, pooled), zeros, noise, settings)[0].float()

    def call_theirs():
        with torch.no_grad(), autocast():
            return their_pipeline(
                prompt_embeds=context, pooled_prompt_embeds=pooled, negative_prompt_embeds=zeros[0],
                negative_pooled_prompt_embeds=zeros[1], latents=noise, height=8 * side, width=8 * side,
                num_inference_steps=STEPS, guidance_scale=GUIDANCE, output_type="latent").images.float()

    return call_ours, call_theirs


# ------------------------------------------------------------------------------------------------------------
# Turns
# ------------------------------------------------------------------------------------------------------------

def take_turns(ours, theirs, device, trials: int) -> dict:
    """Each called once to warm up and to compare, then `trials` pairs, the first of a pair changing. Seconds are medians."""
    difference = ((ours() - theirs()).norm() / theirs().norm()).item()

    def seconds(call):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    pairs = []
    for trial in range(trials):
        order = (ours, theirs) if trial % 2 == 0 else (theirs, ours)
        times = [seconds(call) for call in order]
        pairs.append(times if trial % 2 == 0 else times[::-1])
    our_times, their_times = torch.tensor(pairs, dtype=torch.float64).unbind(dim=1)
    ratios = their_times / our_times
    return {"relative_difference": difference, "our_seconds": our_times.median().item(),
            "their_seconds": their_times.median().item(), "ratio": ratios.quantile(0.5).item(),
            "ratio_quartiles": ratios.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()}


def main():
    """Compare, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--text-tokens", type=int, default=154)
    parser.add_argument("--resolution", type=int, default=256, help="px; 256 gives 256 image tokens")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16", "bf16-weights"],
                        choices=["fp32", "bf16", "bf16-weights"])
    parser.add_argument("--what", nargs="+", default=["forward", "training", "sampling"],
                        choices=["forward", "training", "sampling"])
    parser.add_argument("--pairs", type=int, default=7, help="timed pairs of each row; sampling takes 3 at most")
    parser.add_argument("--compile", action="store_true", help="torch.compile for both")
    parser.add_argument("--reference", default="", help="folder with Stability's mmditx.py, to be timed as well (needs einops)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="", help="file; empty: results/bench-diffusers-<device>.json")
    options = parser.parse_args()
    try:
        import diffusers
    except ImportError:
        sys.exit("bench_diffusers.py compares with diffusers: pip install diffusers transformers accelerate")
    if options.resolution % 16 or min(options.depth, options.pairs, options.text_tokens, *options.batch_sizes) < 1:
        sys.exit("bench_diffusers.py: sizes must be positive and --resolution a multiple of 16")
    device, side = pick_device(options.device), options.resolution // 8
    rows = []
    result = {"command": shlex.join(["python", *sys.argv]), "device": str(device),
              "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "", "threads": torch.get_num_threads(),
              "torch": torch.__version__, "diffusers": diffusers.__version__, "depth": options.depth,
              "compile": options.compile, "image_tokens": (side // 2) ** 2, "text_tokens": options.text_tokens,
              "pairs": options.pairs, "rows": rows}
    file = Path(options.out) if options.out else Path(__file__).parents[1] / f"results/bench-diffusers-{device.type}.json"

    def measure(what, precision, batch, calls, flops, peak, rival="diffusers"):
        torch._dynamo.reset()                                                     # every row is compiled for its own sizes
        row = {"what": what, "precision": precision, "batch_size": batch, "against": rival,
               **take_turns(*calls, device, min(3, options.pairs) if what == "sampling" else options.pairs)}
        row["our_share_of_peak"] = flops / row["our_seconds"] / peak
        row["load_average"] = os.getloadavg()[0]
        rows.append({key: round(v, 5) if isinstance(v, float) else v for key, v in row.items()})
        file.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{what:9} {precision:12} batch {batch:2}: ours {row['our_seconds']:7.3f} s "
              f"({row['our_share_of_peak']:.0%} of peak), {rival} {row['their_seconds']:7.3f} s, ratio {row['ratio']:.2f}, "
              f"outputs differ by {row['relative_difference']:.1e}", flush=True)
        gc.collect()

    for precision in options.precisions:
        dtype = torch.bfloat16 if precision == "bf16-weights" else torch.float32
        models = make_models(options.depth, device, dtype, options.reference)
        ours, rivals = models["ours"][0], [name for name in models if name != "ours"]
        if options.compile:                                                       # each as it is meant to be
            for block in ours.joint_blocks:
                block.forward = torch.compile(block.forward)
            for name in rivals:
                models[name][0].compile()
        peak = matmul_peak(device, torch.float32 if precision == "fp32" else torch.bfloat16)
        flops = forward_flops(ours.config, options.text_tokens, (side // 2) ** 2)
        for batch in options.batch_sizes:
            inputs = make_inputs(batch, options.text_tokens, side, dtype, device)
            for what, passes in (("forward", 1), ("training", 3)):
                if what in options.what and (what, precision) != ("training", "bf16-weights"):
                    for rival in rivals:
                        calls = network_calls(models, rival, inputs, device, precision, what == "training")
                        measure(what, precision, batch, calls, passes * batch * flops, peak, rival)
        if "sampling" in options.what and precision != "bf16-weights":            # our solver keeps z in fp32, under autocast
            calls = sampling_calls(ours, models["diffusers"][0], device, precision, options.text_tokens, side)
            measure("sampling", precision, 1, calls, STEPS * 2 * flops, peak)
    print(f"written to {file}")


if __name__ == "__main__":
    main()
