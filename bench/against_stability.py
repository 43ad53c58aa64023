"""against_stability.py: our sampler beside Stability AI's own code for SD3.5, with one file.

Their BaseModel opens our model.safetensors by its own key names and infers all sizes from it, as it
does for the released files. Both draw the same prompts from the same noise: their Euler sampler,
guidance and schedule against ours. Text features are ours for both, because the sizes of their text
encoders and VAE are fixed in the code.

Needs       a clone of github.com/Stability-AI/sd3.5, and pip install einops transformers
Run         python bench/against_stability.py --reference FOLDER
            writes results/against-stability-cpu.json
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from checkpoints import SHIPPED, find_model_file
from devices import command
from options import write_json
from sample import Settings, encode, latent_shape, load, sample_latents

PREFIX = "model.diffusion_model."
PROMPTS = ["a red circle", "two blue stars", "a green square left of a pink heart", "the word CAT"]


def their_latents(file, noise, context, pooled, settings):
    """(B, C, H, W) by Stability's code. context (2B, T, D), pooled (2B, P): the unconditional half
    is the second."""
    from sd3_impls import BaseModel, CFGDenoiser, sample_euler
    with safe_open(file, "pt") as opened:
        model = BaseModel(shift=settings.timestep_shift, file=opened, prefix=PREFIX)
        weights = {}
        for name in model.diffusion_model.state_dict():
            weights[name] = opened.get_tensor(PREFIX + name).float()
    model.diffusion_model.load_state_dict(weights)
    sampling = model.model_sampling
    # As their SD3Inferencer.get_sigmas, which lies in a file that needs a GPU to import.
    first, last = sampling.timestep(sampling.sigma_max), sampling.timestep(sampling.sigma_min)
    sigmas = [sampling.sigma(t) for t in torch.linspace(first, last, settings.num_steps)]
    sigmas = torch.tensor([*sigmas, 0.0])
    prompt, empty = context.chunk(2)
    prompt_pooled, empty_pooled = pooled.chunk(2)
    texts = {"cond": {"c_crossattn": prompt, "y": prompt_pooled},
             "uncond": {"c_crossattn": empty, "y": empty_pooled},
             "cond_scale": settings.guidance_scale}
    return sample_euler(CFGDenoiser(model), noise * sigmas[0], sigmas, texts)


def compare(file, num_steps):
    """The largest difference of latents in fp32 and the largest latent."""
    pipeline = load(str(file), device="cpu", precision="fp32")
    chosen = {"schedule": "released", "unconditional": "empty", "num_steps": num_steps}
    settings = Settings(**pipeline.defaults | chosen)
    shape = (len(PROMPTS), *latent_shape(pipeline, settings))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        context, pooled = encode(pipeline, PROMPTS, settings)
        ours, _ = sample_latents(pipeline.mmdit, context, pooled, noise, settings)
        theirs = their_latents(file, noise, context, pooled, settings)
    return {"largest_latent_difference": (ours - theirs).abs().max().item(),
            "largest_latent": theirs.abs().max().item()}


def main():
    """Compares the latents of both and writes one JSON file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--reference", required=True, help="folder with Stability's sd3_impls.py")
    parser.add_argument("--checkpoint", default=str(SHIPPED))
    parser.add_argument("--num-steps", type=int, default=28)
    parser.add_argument("--out", type=Path, default=ROOT / "results/against-stability-cpu.json")
    options = parser.parse_args()
    if not (Path(options.reference) / "sd3_impls.py").is_file():
        raise ValueError(f"--reference {options.reference} has no sd3_impls.py; give a clone "
                         "of github.com/Stability-AI/sd3.5")
    sys.path.insert(0, options.reference)
    result = compare(find_model_file(options.checkpoint), options.num_steps)
    print(result)
    told = "python bench/against_stability.py --reference FOLDER"
    write_json(options.out, {"command": told, "torch": torch.__version__, "pictures": len(PROMPTS),
                             "num_steps": options.num_steps, **result})


if __name__ == "__main__":
    command(main)
