"""against_diffusers.py: our numbers and our speed beside diffusers', with one set of weights.

network     a 2B MM-DiT (SD3-medium's sizes, random weights), fp32, one evaluation at 512 px: the
            largest difference relative to the largest velocity
pipeline    a model exported by convert.py, opened by StableDiffusion3Pipeline.from_pretrained: the
            same prompts and noise through all steps, their latents and ours
speed       the same, from prompts to pictures, in turns, so that other work meets both alike
Needs       pip install diffusers transformers accelerate protobuf     (for this comparison only)
Run         python bench/against_diffusers.py        writes results/against-diffusers-DEVICE.json
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from checkpoints import SHIPPED, find_model_file
from convert import diffusers_config, export, to_diffusers
from data import from_tensor
from devices import autocast, command, pick_device
from mmdit import MMDiT, MMDiTConfig
from sample import Settings, encode, latent_shape, load, sample_latents

PROMPTS = ["a red circle", "two blue stars", "a green square left of a pink heart", "the word CAT",
           "three yellow rings", "a large orange triangle on a navy background",
           "a purple cross above a cyan diamond", "a red star and a blue circle"]


@torch.no_grad()
def compare_network(depth, side, device):
    """The largest difference of one evaluation, relative to the largest velocity.

    side: of the latent. The adaLN and output layers, which start at zero, get random numbers.
    """
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    ours = MMDiT(MMDiTConfig(depth=depth, qk_norm=False)).to(device).eval()
    for parameter in ours.parameters():
        if parameter.dim() > 1 and not parameter.any():
            parameter.normal_(0, 0.02)
    sizes = diffusers_config("mmdit", ours.config)
    del sizes["_class_name"]
    with torch.device("meta"):
        theirs = SD3Transformer2DModel(**sizes)
    tensors = to_diffusers("mmdit", ours.state_dict())
    theirs.load_state_dict(tensors, strict=True, assign=True)
    latent = torch.randn(1, 16, side, side, device=device)
    context = torch.randn(1, 154, 4096, device=device)
    pooled = torch.randn(1, 2048, device=device)
    t = torch.tensor([0.7], device=device)
    our_velocity = ours(latent, t, context, pooled)
    their_velocity = theirs.eval()(latent, context, pooled, 1000 * t, return_dict=False)[0]
    difference = (our_velocity - their_velocity).abs().max() / their_velocity.abs().max()
    return {"parameters": sum(p.numel() for p in ours.parameters()), "latent": side,
            "largest_relative_difference": difference.item()}


class Both:
    """One checkpoint in our pipeline and, through an exported folder, in theirs.

    dtype: what their networks are opened in. None is what `from_pretrained(folder)` does alone.
    """

    def __init__(self, checkpoint, folder, precision, device, num_steps, guidance_scale,
                 dtype=None):
        from diffusers import StableDiffusion3Pipeline

        if not Path(folder).exists():
            export(checkpoint, folder, "diffusers")
        more = {} if dtype is None else {"torch_dtype": dtype}
        self.theirs = StableDiffusion3Pipeline.from_pretrained(folder, **more).to(device)
        self.theirs.set_progress_bar_config(disable=True)
        self.ours = load(checkpoint, device=str(device), precision=precision)
        chosen = {"num_steps": num_steps, "guidance_scale": guidance_scale,
                  "schedule": "released", "unconditional": "empty"}
        self.settings = Settings(**(self.ours.defaults | chosen))

    def noise(self, prompts):
        shape = latent_shape(self.ours, self.settings)
        rng = torch.Generator().manual_seed(0)
        return torch.randn(len(prompts), *shape, generator=rng).to(self.ours.device)

    @torch.no_grad()
    def our_latents(self, prompts):
        """(B, C, H, W)"""
        ours = self.ours
        with autocast(ours.device, ours.precision):
            context, pooled = encode(ours, prompts, self.settings)
            noise = self.noise(prompts)
            return sample_latents(ours.mmdit, context, pooled, noise, self.settings)[0]

    @torch.no_grad()
    def our_images(self, prompts):
        latents = self.our_latents(prompts)
        with autocast(self.ours.device, self.ours.precision):
            images = self.ours.vae.decode(latents).float().cpu()
        return [from_tensor(image) for image in images]

    def their_images(self, prompts, output_type="pil"):
        """Pictures, or with output_type "latent" their latents (B, C, H, W)."""
        noise = self.noise(prompts).to(self.theirs.transformer.dtype)
        settings = self.settings
        return self.theirs(
            prompts, num_inference_steps=settings.num_steps, height=settings.height,
            guidance_scale=settings.guidance_scale, width=settings.width, latents=noise,
            max_sequence_length=self.ours.text.config.t5_length, output_type=output_type).images


def median(values):
    return sorted(values)[len(values) // 2]


def compare_speed(both, rounds):
    """Median seconds of both, from prompts to pictures, and the median of theirs / ours."""
    times = {"ours": [], "theirs": []}
    for _ in range(rounds + 1):                              # the first round warms up
        for name, work in (("ours", both.our_images), ("theirs", both.their_images)):
            start = time.perf_counter()
            work(PROMPTS)
            times[name].append(time.perf_counter() - start)
    ratios = [theirs / ours for ours, theirs in zip(times["ours"][1:], times["theirs"][1:])]
    return {"ours_seconds": round(median(times["ours"][1:]), 3),
            "theirs_seconds": round(median(times["theirs"][1:]), 3),
            "theirs_over_ours": round(median(ratios), 3)}


def main():
    """Compare the network, the pipeline and the speed, and write one JSON file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--checkpoint", default=str(SHIPPED))
    parser.add_argument("--depth", type=int, default=24, help="0: no random network")
    parser.add_argument("--rounds", type=int, default=5, help="0: no comparison of speed")
    parser.add_argument("--num-steps", type=int, default=28)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = pick_device(options.device)
    import diffusers

    record = {"command": shlex.join(["python", *sys.argv]), "diffusers": diffusers.__version__,
              "torch": torch.__version__, "threads": torch.get_num_threads(),
              "pictures": len(PROMPTS), "num_steps": options.num_steps}
    if options.depth:
        record["network"] = compare_network(options.depth, 64, device)
        print(json.dumps(record["network"]), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            both = Both(find_model_file(options.checkpoint), Path(scratch) / "exported", precision,
                        device, options.num_steps, options.guidance_scale, dtype)
            ours = both.our_latents(PROMPTS).float().cpu()
            theirs = both.their_images(PROMPTS, "latent").float().cpu()
            result = {"largest_latent_difference": (ours - theirs).abs().max().item(),
                      "largest_latent": theirs.abs().max().item()}
            if options.rounds:
                result |= compare_speed(both, options.rounds)
            record[precision] = result
            print(precision, json.dumps(result), flush=True)
    out = options.out or ROOT / "results" / f"against-diffusers-{device.type}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    command(main)
