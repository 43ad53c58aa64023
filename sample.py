"""sample.py: from a prompt to a picture (SD3, arXiv:2403.03206v1, Eq. 1 from noise to data).

Read with   Eq. 1; App. B.3 for Euler's method; Sec. 5.3.2 for the shift; Sec. 5.3.3 for `without`
Not here    the formulae of a step (flow.py), networks and their files (checkpoints.py), the
            settings, and the PNG that stores them (recipe.py)
Shapes      B batch   C latent channels   H W latent height, width   L text tokens   P pooled_dim
Run         python sample.py --prompt "a red circle left of a blue square"
            python sample.py --from-png out/PICTURE.png     draws the picture again, bit for bit
"""

import argparse
import hashlib
import os
import re
import sys
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

import flow
from checkpoints import SHIPPED, Components, fingerprint, load_components
from data import from_tensor, read_image, resize_and_crop, to_tensor
from devices import PRECISIONS, autocast, command, pick_device, pick_precision
from options import add_options, read_lines
from recipe import Options, Recipe, Settings, read_record, save_png
from scenes import captioned_grid


@dataclass
class Pipeline:
    """The three networks and their default settings."""
    mmdit: torch.nn.Module
    vae: torch.nn.Module
    text: torch.nn.Module
    defaults: dict                     # the model's default Settings
    device: torch.device = torch.device("cpu")
    precision: torch.dtype = torch.float32
    parts: Components | None = None    # what else is known of the model


def load(checkpoint=SHIPPED, device="auto", precision="auto", t5_length=0,
         networks=("mmdit", "vae", "text"), **files):
    """A Pipeline from a run or model folder, a single file, a diffusers folder or a hub name.
    networks: those to read. files: tokenizers, text_encoders, vae, where they lie elsewhere."""
    device = pick_device(device)
    precision = pick_precision(precision, device)
    parts = load_components(checkpoint, networks, precision, **files)
    for name in networks:
        getattr(parts, name).to(device)
    if t5_length and parts.text:
        parts.text.config = replace(parts.text.config, t5_length=t5_length)
    defaults = asdict(Settings())
    for name in defaults.keys() & parts.sampling.keys():
        defaults[name] = parts.sampling[name]
    return Pipeline(parts.mmdit, parts.vae, parts.text, defaults, device, precision, parts)


@torch.no_grad()
def encode(pipeline, prompts, settings):
    """B prompts -> context (B, L, D), pooled (B, P). With guidance, B unconditional rows more."""
    text, precision = pipeline.text, pipeline.precision
    if precision == torch.float16:
        precision = torch.bfloat16                                    # T5-XXL overflows fp16.
    with autocast(pipeline.device, precision):
        context, pooled = text(prompts, settings.without)
        if settings.guidance_scale == 1:
            return context, pooled
        if settings.unconditional == "zeros" and not settings.negative_prompt:
            uncond, uncond_pooled = text.unconditional(1)
        else:
            uncond, uncond_pooled = text([settings.negative_prompt], settings.without)
    context = torch.cat([context, uncond.expand_as(context)])
    return context, torch.cat([pooled, uncond_pooled.expand_as(pooled)])


def guided_velocity(mmdit, context, pooled, guidance_scale, skip_layers, z, t):
    """The velocity at z (B, C, H, W) and t (B,). context, pooled: from `encode`."""
    B = len(z)
    copies = len(context) // B                                        # 2 with guidance, 1 without
    found = mmdit(z.repeat(copies, 1, 1, 1), t.repeat(copies), context, pooled).float()
    v_cond = found[:B]                                                # (B, C, H, W)
    v_uncond = found[-B:]                                             # the same without guidance
    v = flow.guide(v_cond, v_uncond, guidance_scale)
    if skip_layers:
        skipped = mmdit(z, t, context[:B], pooled[:B], skip_layers=skip_layers).float()
        v = flow.guide_skip_layers(v, v_cond, skipped, 2.5)
    return v


@torch.no_grad()
def sample_latents(mmdit, context, pooled, noise, settings, latent=None, repaint=None, bar=None):
    """Eq. 1 from noise (B, C, H, W) to latents (B, C, H, W). Also returns path lengths, (B,).
    latent (1, C, H, W): an image to begin from. repaint (1, 1, H, W) bool: where it may change;
    the rest moves on its straight path, Eq. 13. Skip-layer guidance has the numbers of Stability's
    sd3_infer.py for SD3.5-medium."""
    N = settings.num_steps
    times = flow.make_schedule(settings.schedule, N, settings.timestep_shift).to(noise)   # (N + 1,)
    step = flow.SOLVERS[settings.solver]
    first = 0
    z = noise
    if latent is not None:
        first = settings.first_step
        z = flow.interpolate(latent, noise, times[first : first + 1])
    before = None
    lengths = noise.new_zeros(len(noise))
    for i in range(first, N):
        t, t_next = times[i : i + 2].tolist()
        skip_layers = settings.skip_layers if 0.01 * N < i < 0.2 * N else ()
        velocity = partial(guided_velocity, mmdit, context, pooled, settings.guidance_scale,
                           skip_layers)
        z_next, v = step(velocity, z, t, t_next, before)
        if repaint is not None:
            kept = flow.interpolate(latent, noise, times[i + 1 : i + 2])
            z_next = torch.where(repaint, z_next, kept)
        lengths = lengths + flow.path_length([v], times[i : i + 2])   # (B,)
        before = (z, t, v)
        z = z_next
        if bar is not None:
            bar.update()
    return z, lengths


def latent_shape(pipeline, settings):
    """(C, H, W) of the latents. Raises ValueError for what these networks cannot do."""
    config = pipeline.mmdit.config
    factor = pipeline.vae.config.downsampling
    step = factor * config.patch_size
    if settings.height % step or settings.width % step:
        raise ValueError(f"--height and --width must be multiples of {step} px for this model")
    if max(settings.skip_layers, default=0) >= config.depth:
        raise ValueError(f"--skip-layers: this model's blocks are 0 to {config.depth - 1}")
    return config.latent_channels, settings.height // factor, settings.width // factor


def read_to_edit(image, mask, settings):
    """Files -> the image (3, height, width), and where it may change, (height, width) bool."""
    if not image:
        raise ValueError("--mask says where --image is painted anew; give --image as well")
    image = read_image(image)
    mask = read_image(mask, "black") if mask else Image.new("RGB", image.size, "white")
    if abs(mask.width * image.height - mask.height * image.width) > max(*mask.size, *image.size):
        raise ValueError(f"--mask {mask.size} px must have the proportions of --image {image.size}")
    image = to_tensor(resize_and_crop(image, settings.height, settings.width))
    mask = to_tensor(resize_and_crop(mask, settings.height, settings.width))
    return image, mask.mean(0) > 0


@torch.no_grad()
def draw(pipeline, context, pooled, seeds, settings, image=None, mask=None, bar=None):
    """B pictures of encoded texts. image, mask: files, for `read_to_edit`. The noise is made on the
    CPU, from one seed for each picture, so that it is the same everywhere."""
    vae, device = pipeline.vae, pipeline.device
    noise = torch.empty(len(seeds), *latent_shape(pipeline, settings))
    for one, seed in zip(noise, seeds):
        one.normal_(generator=torch.Generator().manual_seed(seed))
    pictures = []
    with autocast(device, pipeline.precision):
        latent = repaint = None
        if image or mask:
            original, changes = read_to_edit(image, mask, settings)
            latent = vae.encode(original[None].to(device)).float()    # (1, C, H, W)
            repaint = F.max_pool2d(changes[None, None].float(), vae.config.downsampling)
            repaint = repaint.bool().to(device)                       # (1, 1, H, W)
        latents, _ = sample_latents(pipeline.mmdit, context, pooled, noise.to(device), settings,
                                    latent, repaint, bar)             # (B, C, H, W)
        check_finite(latents)
        for z in latents.split(1):                                    # A VAE needs much memory.
            picture = vae.decode(z)[0].float().cpu()                  # (3, height, width)
            check_finite(picture)
            if image:
                picture = torch.where(changes, picture, original)
            pictures.append(from_tensor(picture))
    return pictures


def check_finite(numbers):
    """ValueError for inf or nan. They would become a black picture."""
    if not numbers.isfinite().all():
        raise ValueError("the model's numbers are not finite; try --precision fp32")


def generate(pipeline, prompts, seed=0, batch_size=8, image=None, mask=None, **settings):
    """A list of PIL pictures for prompts (a list of texts, or one). image: a file to begin from.
    mask: a file, white where it is painted anew. settings: fields of Settings. Picture i starts
    from noise of seed + i, so it is the same alone and in a batch."""
    if isinstance(prompts, str):
        prompts = [prompts]
    settings = Settings(**pipeline.defaults | settings)
    pictures = []
    for first in range(0, len(prompts), batch_size):
        part = prompts[first : first + batch_size]
        context, pooled = encode(pipeline, part, settings)
        seeds = range(seed + first, seed + first + len(part))
        pictures += draw(pipeline, context, pooled, seeds, settings, image, mask)
    return pictures


# --- The command line -----------------------------------------------------------------------------
def output_files(options):
    """A file for each prompt. ValueError now if they cannot be written when the work is done."""
    out = Path(options.out)
    extension = out.suffix.lower()
    files = []
    for i, prompt in enumerate(options.prompt):
        name = re.sub(r"\W+", "-", prompt)[:40].strip("-") or "picture"
        files.append(out / f"{name}-{options.seed + i}.png")
    if extension == ".png" and len(files) == 1 and not options.grid:
        files = [out]
    elif extension in Image.registered_extensions():
        raise ValueError(f"--out {out}: give a folder; or, for one picture, NAME.png")
    folder = files[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out {out} cannot be written; give another")
    for file in files:
        if file.is_symlink() or (file.exists() and not file.is_file()):
            raise ValueError(f"{file} is a link or no regular file; give another --out")
    return files


def hash_sources(parts, options):
    """A hash of the files that a picture is drawn from. The picture's record names none of them."""
    networks = fingerprint(parts.file, text_encoders=options.text_encoders, vae=options.vae)
    sources = hashlib.sha256(networks.encode())
    for file in filter(None, (options.image, options.mask)):
        sources.update(read_image(file).tobytes())
    if options.tokenizers:
        for file in parts.tokenizers.values():
            for part in (file, file.with_name("vocab.json")):
                if part.is_file():
                    sources.update(part.read_bytes())
    return sources.hexdigest()


def main():
    """From a prompt to a picture. The checkpoint's own defaults override those below."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=main.__doc__)
    add_options(parser, Options)
    given = vars(parser.parse_args())
    if "prompts_file" in given:
        lines = filter(str.strip, read_lines(given["prompts_file"]))
        given["prompt"] = [*given.get("prompt", []), *lines]
    if "from_png" in given:
        given = read_record(given["from_png"]) | given
    options = Options(**given)
    if not options.prompt:
        raise ValueError('there is no prompt; give --prompt "a heart", with --image as well')
    files = output_files(options)
    note = partial(print, "note:", file=sys.stderr)

    read = partial(load, options.checkpoint, options.device, options.precision, options.t5_length,
                   tokenizers=options.tokenizers, text_encoders=options.text_encoders,
                   vae=options.vae)
    pipeline = read(networks=("text",))
    options = Options(**pipeline.defaults | given)
    record = {}
    for item in fields(Recipe):
        record[item.name] = getattr(options, item.name)
    names = dict(zip(PRECISIONS.values(), PRECISIONS))
    record["precision"] = names[pipeline.precision]                   # not "auto"
    record["made_from"] = hash_sources(pipeline.parts, options)
    if options.made_from not in ("", record["made_from"]):
        raise ValueError(f"{options.from_png} was made with another model, --image or --mask, or "
                         f"with another --vae, --text-encoders or --tokenizers; give its own, or "
                         f'--made-from ""')
    known = pipeline.parts.words                                      # () of a released model
    words = re.findall(r"\w+|[^\w\s!-/:-@]", " ".join(options.prompt).lower())    # or a symbol
    words = set(words).difference(known)
    sizes = pipeline.parts.sizes
    if known and words:
        note(f"the model does not know: {', '.join(sorted(words)[:20])}. It knows: "
             f"{', '.join(known)}")
    if sizes and f"{options.height}x{options.width}" not in sizes:
        note(f"the model has only seen pictures of {', '.join(sizes)} px (height x width)")
    if options.negative_prompt and options.guidance_scale == 1:
        note("--negative-prompt does nothing at --guidance-scale 1, which is no guidance")
    texts = []
    for prompt in options.prompt:
        texts.append(encode(pipeline, [prompt], options))
    pipeline.text.note_cut()
    del pipeline                                                      # It frees the text encoders.
    pipeline = read(networks=("mmdit", "vae"))

    first = options.first_step if options.image else 0
    bar = tqdm(total=(options.num_steps - first) * len(texts), desc="sampling")
    pictures = []
    for i, prompt in enumerate(options.prompt):
        seed = options.seed + i
        pictures += draw(pipeline, *texts[i], [seed], options, options.image, options.mask, bar)
        picture = ImageOps.scale(pictures[i], options.enlarge, Image.NEAREST)
        save_png(picture, files[i], record | {"prompt": [prompt], "seed": seed, "grid": False})
    if options.grid:
        grid = captioned_grid(pictures, options.prompt, min(4, len(pictures)))
        save_png(grid, files[0].with_name("grid.png"), record)


if __name__ == "__main__":
    command(main)
