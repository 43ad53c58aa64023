"""against_diffusers.py: our numbers and our speed beside diffusers', on the same weights and the same noise.

network     a 2B MM-DiT (SD3-medium's sizes, random weights), fp32, one evaluation at 512 px: the largest relative difference
pipeline    a model exported with `checkpoints.export`, opened by StableDiffusion3Pipeline.from_pretrained: the same prompts and
            noise through all steps, their latents and ours
speed       the same, prompts to pictures, in turns, so that whatever else the machine does meets both; the ratio is theirs / ours

Needs       pip install diffusers transformers accelerate protobuf       (for this comparison only)
Run         python experiments/against_diffusers.py                      writes results/against-diffusers-DEVICE.json
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from checkpoints import SHIPPED, diffusers_configs, export, find_model_file, to_diffusers
from data import from_tensor
from mmdit import MMDiT, MMDiTConfig
from sample import encode, load, pick_device, picture_size, sample_latents
from text_encoders import TextConfig
from vae import VAE, VAEConfig

PROMPTS = ["a red circle", "two blue stars", "a green square left of a pink heart", "the word CAT", "three yellow rings",
           "a large orange triangle on a navy background", "a purple cross above a cyan diamond", "a red star and a blue circle"]


@torch.no_grad()
def compare_network(depth: int, side: int, device) -> dict:
    """The largest difference of one evaluation, relative to the largest velocity. side: of the latent."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    config = MMDiTConfig(depth=depth, qk_norm=False)
    ours = MMDiT(config).to(device).eval()
    for parameter in ours.parameters():
        if parameter.dim() > 1 and not parameter.any():                           # adaLN and the output start at zero: wake them
            parameter.normal_(0, 0.02)
    sizes = diffusers_configs({"mmdit": ours, "vae": VAE(VAEConfig(channels=(32, 32), norm_groups=8))}, TextConfig(), {})["mmdit"]
    with torch.device("meta"):
        theirs = SD3Transformer2DModel(**{key: value for key, value in sizes.items() if key != "_class_name"})
    theirs.load_state_dict(to_diffusers("mmdit", ours.state_dict()), strict=True, assign=True)       # the same memory
    latent, context, pooled = (torch.randn(shape, device=device) for shape in ((1, 16, side, side), (1, 154, 4096), (1, 2048)))
    t = torch.tensor([0.7], device=device)
    our_velocity = ours(latent, t, context, pooled)
    their_velocity = theirs.eval()(latent, context, pooled, 1000 * t, return_dict=False)[0]
    difference = (our_velocity - their_velocity).abs().max() / their_velocity.abs().max()
    return {"parameters": sum(p.numel() for p in ours.parameters()), "latent": side,
            "largest_relative_difference": difference.item()}


def open_both(checkpoint, folder: Path, precision: str, device):
    """(our pipeline, theirs) of one checkpoint, theirs through an exported folder."""
    from diffusers import StableDiffusion3Pipeline

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    if not folder.exists():
        export(checkpoint, folder, "diffusers", torch.float32)
    theirs = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    theirs.set_progress_bar_config(disable=True)
    return load(checkpoint, device=str(device), precision=precision), theirs


def both_ways(ours, theirs, prompts, num_steps: int, guidance_scale: float):
    """(our sampling, theirs): functions that give latents (B, C, H, W) by the schedule and guidance that diffusers has."""
    settings = ours.settings(num_steps=num_steps, guidance_scale=guidance_scale, schedule="released", unconditional="empty")
    noise = torch.randn(len(prompts), *picture_size(ours, settings), generator=torch.Generator().manual_seed(0))

    def our_latents():
        text = ours.use("text", lambda text: encode(text, prompts, settings))
        return ours.use("mmdit", lambda mmdit: sample_latents(mmdit, *text, noise.to(ours.device), settings)[0])

    def their_images(output_type):
        return theirs(prompts, num_inference_steps=num_steps, guidance_scale=guidance_scale, height=settings.height,
                      width=settings.width, latents=noise.to(theirs.transformer.device, theirs.transformer.dtype),
                      max_sequence_length=ours.text.config.t5_length, output_type=output_type).images
    return our_latents, their_images


def compare_speed(ours, our_latents, their_images, rounds: int) -> dict:
    """Seconds of both, prompts to pictures, and the median of theirs / ours over the rounds."""
    def our_images():
        latents = our_latents()
        return [from_tensor(image) for image in ours.use("vae", lambda vae: vae.decode(latents).float().cpu())]

    times = {"ours": [], "theirs": []}
    for _ in range(rounds + 1):                                                   # the first round warms up
        for name, work in (("ours", our_images), ("theirs", lambda: their_images("pil"))):
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    middle = lambda values: sorted(values)[len(values) // 2]
    return {"ours_seconds": round(middle(times["ours"][1:]), 3), "theirs_seconds": round(middle(times["theirs"][1:]), 3),
            "theirs_over_ours": round(middle([b / a for a, b in zip(times["ours"][1:], times["theirs"][1:])]), 3)}


def main():
    """All three, into one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default=str(SHIPPED))
    parser.add_argument("--depth", type=int, default=24, help="of the random network; 24 needs 10 GB; 0: leave it out")
    parser.add_argument("--rounds", type=int, default=5, help="of the speed comparison; 0: leave it out")
    parser.add_argument("--num-steps", type=int, default=28)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = pick_device(options.device)
    import diffusers

    record = {"command": shlex.join(["python", *sys.argv]), "diffusers": diffusers.__version__, "torch": torch.__version__,
              "threads": torch.get_num_threads(), "pictures": len(PROMPTS), "num_steps": options.num_steps}
    if options.depth:
        record["network"] = compare_network(options.depth, 64, device)
        print(json.dumps(record["network"]), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, folder = find_model_file(options.checkpoint), Path(scratch) / "exported"
        for precision in ("fp32", "bf16"):
            ours, theirs = open_both(checkpoint, folder, precision, device)
            our_latents, their_images = both_ways(ours, theirs, PROMPTS, options.num_steps, options.guidance_scale)
            a, b = our_latents().float().cpu(), their_images("latent").float().cpu()
            result = record[precision] = {"largest_latent_difference": (a - b).abs().max().item(),
                                          "largest_latent": b.abs().max().item()}
            if options.rounds:
                result |= compare_speed(ours, our_latents, their_images, options.rounds)
            print(precision, json.dumps(result), flush=True)
    out = options.out or ROOT / "results" / f"against-diffusers-{device.type}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
