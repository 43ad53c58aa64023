"""sample.py: prompt -> image (SD3, arXiv:2403.03206v1, Eq. 1 from noise to data, Sec. 5.3.2 for the shift).

Read with   Eq. 1 and the samplers of Sec. 5.1 (Euler, classifier-free guidance), Sec. 5.3.3 (leaving out text encoders)
Not here    the steps themselves (flow.py), the networks, files (checkpoints.py); this file puts them together
Library     from sample import load, generate
            pipeline = load("pretrained/tiny")
            generate(pipeline, ["a red circle left of a blue square"])[0].save("picture.png")
Run         python sample.py --prompt "a red circle left of a blue square"
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from tqdm import tqdm

import flow
from checkpoints import SHIPPED, fingerprint, load_components, write_atomically
from data import captioned_grid, from_tensor
from mmdit import MMDiT
from text_encoders import ENCODERS, TextEncoders
from vae import VAE


def pick_device(name: str = "auto") -> torch.device:
    """CUDA, else Apple's MPS, else the CPU; or the one that is named."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The type of matrix products: bf16 under autocast where the hardware multiplies it fast, else fp32."""
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    cpu = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return torch.bfloat16 if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else torch.float32


@dataclass
class Pipeline:
    """Everything a prompt needs, on one device. `defaults`: how this model wants to be sampled."""
    mmdit: MMDiT
    vae: VAE
    text: TextEncoders
    defaults: dict
    device: torch.device = torch.device("cpu")
    precision: torch.dtype = torch.float32
    checkpoint: str = ""                     # path and fingerprint, for the record in the PNG

    def autocast(self):
        """Matrix products in `precision`; sinusoids, the embedding of time, norms and the solver stay fp32."""
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)


# How to sample where a checkpoint does not say: the conventions of the released SD3 weights.
RELEASED_DEFAULTS = {"num_steps": 28, "guidance_scale": 5.0, "timestep_shift": 3.0, "schedule": "released",
                     "solver": "euler", "unconditional": "empty", "height": 1024, "width": 1024}


def load(checkpoint=SHIPPED, device: str = "auto", precision: str = "auto", tokenizers=None) -> Pipeline:
    """A pipeline from a run folder, a model folder or a single file. precision: auto, bf16 or fp32."""
    device = pick_device(device)
    parts = load_components(checkpoint, tokenizers=tokenizers)
    return Pipeline(parts.mmdit.to(device), parts.vae.to(device), parts.text.to(device), RELEASED_DEFAULTS | parts.sampling,
                    device, pick_precision(precision, device), f"{checkpoint} {fingerprint(parts.file)}")


@torch.no_grad()
def generate_latents(pipeline, prompts, noise, num_steps, guidance_scale, timestep_shift, schedule, solver="euler",
                     unconditional="zeros", negative_prompt="", without=(), progress=False):
    """prompts (B strings), noise (B, C, H, W) -> latents (B, C, H, W), and the path length of each (B,) (Table 6).

    guidance_scale 1 needs no unconditional pass. unconditional: "zeros" (all encoders' outputs 0, as trained in App. B.3)
    or "empty" (the encoded empty prompt, as the released models expect); a negative prompt takes the place of both.
    """
    text, times = pipeline.text, flow.make_schedule(schedule, num_steps, timestep_shift)
    guided, batch = guidance_scale != 1, len(prompts)
    with pipeline.autocast():
        context, pooled = text(prompts, without)
        if guided:
            if unconditional not in ("zeros", "empty"):
                raise ValueError(f"unconditional={unconditional!r}; choose 'zeros' or 'empty'")
            zeros = unconditional == "zeros" and not negative_prompt
            other = text.unconditional(batch) if zeros else text([negative_prompt] * batch, without)
            context, pooled = torch.cat([context, other[0].to(context)]), torch.cat([pooled, other[1].to(pooled)])
        visited = times.tolist()                                                  # rk4 looks half-way as well
        between = [(t + t_next) / 2 for t, t_next in zip(visited, visited[1:])] if solver == "rk4" else []
        prepared = pipeline.mmdit.prepare(context, pooled, visited + between)

        def velocity(z, t):
            if not guided:
                return pipeline.mmdit(z, t, prepared)
            v = pipeline.mmdit(torch.cat([z, z]), torch.cat([t, t]), prepared).float()
            return flow.guide(v[:batch], v[batch:], guidance_scale)

        steps, lengths = flow.solver_steps(solver, velocity, noise.to(pipeline.device), times), []
        for i, (z, v) in enumerate(tqdm(steps, total=num_steps, disable=not progress, desc="sampling", leave=False)):
            latents = z
            lengths.append(flow.path_length([v], times[i : i + 2]))
    return latents, sum(lengths)


@torch.no_grad()
def decode(pipeline, latents) -> list[Image.Image]:
    """latents (B, C, H, W) -> B pictures, eight at a time."""
    with pipeline.autocast():
        return [from_tensor(image) for part in latents.split(8) for image in pipeline.vae.decode(part).float().cpu()]


def generate(pipeline, prompts, seed: int = 0, height: int = 0, width: int = 0, batch_size: int = 64, progress: bool = False,
             **settings) -> list[Image.Image]:
    """Pictures for prompts (list of strings). settings: num_steps, guidance_scale, timestep_shift, schedule,
    solver, unconditional, negative_prompt, without; what is not given comes from `pipeline.defaults`.

    Picture i starts from noise of its own, drawn on the CPU from seed + i: the same alone, in a batch and on any device.
    """
    height, width = height or pipeline.defaults["height"], width or pipeline.defaults["width"]
    step = pipeline.vae.config.downsampling * pipeline.mmdit.config.patch_size
    if height % step or width % step or min(height, width) < step:
        raise ValueError(f"--height {height} --width {width}: both must be positive multiples of {step} px "
                         f"(VAE factor {pipeline.vae.config.downsampling} x patch {pipeline.mmdit.config.patch_size}).")
    shape = (pipeline.vae.config.latent_channels, height * pipeline.mmdit.config.patch_size // step,
             width * pipeline.mmdit.config.patch_size // step)
    keys = ("num_steps", "guidance_scale", "timestep_shift", "schedule", "solver", "unconditional")
    settings = {key: pipeline.defaults[key] for key in keys} | settings
    pictures = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed + start + i))
                             for i in range(len(part))])
        latents, _ = generate_latents(pipeline, part, noise, progress=progress, **settings)
        pictures += decode(pipeline, latents)
    return pictures


def save_png(picture: Image.Image, file: Path, record: dict):
    """Write a PNG that carries how it was made, as JSON under the key "rectified-flow"."""
    info = PngImagePlugin.PngInfo()
    info.add_text("rectified-flow", json.dumps(record))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda partial: picture.save(partial, format="PNG", pnginfo=info))


def parse_options():
    """The command line."""
    parser = argparse.ArgumentParser(description="prompt -> image", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--prompt", nargs="+", help="one or more prompts, each in quotes")
    parser.add_argument("--prompts-file", type=Path, help="a text file, one prompt a line")
    parser.add_argument("--checkpoint", default=str(SHIPPED), help="run folder, model folder or .safetensors file")
    parser.add_argument("--tokenizers", help="folder with clip/ and t5/ tokenizers, if not beside the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-steps", type=int, help="solver steps; None here and below: what the checkpoint says")
    parser.add_argument("--guidance-scale", type=float, help="1 = off")
    parser.add_argument("--shift", type=float, dest="timestep_shift", help="alpha of Eq. 23")
    parser.add_argument("--schedule", choices=sorted(flow.SCHEDULES))
    parser.add_argument("--solver", choices=list(flow.SOLVERS))
    parser.add_argument("--width", type=int, default=0, help="px; 0: what the checkpoint says")
    parser.add_argument("--height", type=int, default=0)
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--without", nargs="*", default=[], choices=ENCODERS, help="text encoders to leave out")
    parser.add_argument("--grid", action="store_true", help="one PNG with all pictures and their prompts")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--out", type=Path, default=Path("out"), help="a folder, or a .png file for one picture or a grid")
    options = parser.parse_args()
    try:
        from_file = options.prompts_file.read_text(encoding="utf-8").splitlines() if options.prompts_file else []
    except (OSError, UnicodeDecodeError) as problem:
        parser.error(f"--prompts-file {options.prompts_file}: {problem}; give a UTF-8 text file, one prompt a line")
    if options.out.is_file() and options.out.suffix != ".png":
        parser.error(f"--out {options.out} is a file; give a folder or a name that ends in .png")
    options.prompts = (options.prompt or []) + [line.strip() for line in from_file if line.strip()]
    if not options.prompts:
        parser.error('nothing to draw; give --prompt "a red circle" or --prompts-file FILE')
    return options


def main():
    """Prompts from the command line to PNG files."""
    options = parse_options()
    settings = {name: value for name in ("num_steps", "guidance_scale", "timestep_shift", "schedule", "solver")
                if (value := getattr(options, name)) is not None}
    settings |= {"negative_prompt": options.negative_prompt, "without": tuple(options.without)}
    pipeline = load(options.checkpoint, options.device, options.precision, options.tokenizers)
    pictures = generate(pipeline, options.prompts, options.seed, options.height, options.width, progress=True, **settings)
    record = {**pipeline.defaults, **settings, "height": pictures[0].height, "width": pictures[0].width,
              "checkpoint": pipeline.checkpoint}
    single = options.out.suffix == ".png"
    if options.grid:
        file = options.out if single else options.out / "grid.png"
        save_png(captioned_grid(pictures, options.prompts, min(4, len(pictures))), file,
                 {"prompts": options.prompts, "seed": options.seed, **record})
        print(file)
        return
    for i, (prompt, picture) in enumerate(zip(options.prompts, pictures)):
        name = "".join(c if c.isalnum() else "-" for c in prompt)[:60].strip("-") or "picture"
        file = options.out if single and len(pictures) == 1 else \
            (options.out.with_suffix("") if single else options.out) / f"{name}-{options.seed + i}.png"
        save_png(picture, file, {"prompt": prompt, "seed": options.seed + i, **record})
        print(file)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as problem:                        # CheckpointError, no memory, a full disk
        sys.exit(f"sample.py: {problem}")
