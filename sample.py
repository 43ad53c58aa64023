"""sample.py: from a prompt to a picture (SD3, arXiv:2403.03206v1, Eq. 1 from noise to data).

Read with   Eq. 1; App. B.3 for Euler's method; Sec. 5.3.2 for the shift; Sec. 5.3.3 for `without`
Not here    the formulae of a step (flow.py), the networks, their files (checkpoints.py)
Shapes      B batch   C latent channels   H W latent height, width   L text tokens   P pooled_dim
Run         python sample.py --prompt "a red circle left of a blue square"
            python sample.py --from-png out/PICTURE.png     draws the picture again, bit for bit
"""

import argparse
import hashlib
import json
import os
import re
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from tqdm import tqdm

import flow
from checkpoints import (SHIPPED, Components, add_options, check_options, given_options,
                         load_components, option, write_atomically)
from data import from_tensor, read_image, read_lines, resize_and_crop, to_tensor
from devices import PRECISIONS, autocast, command, pick_device, pick_precision
from scenes import captioned_grid
from text_encoders import ENCODERS

SKIP_SCALE = 2.5           # skip-layer guidance as on SD3.5-medium's model card,
SKIP_START = 0.01          # between these shares of the steps
SKIP_END = 0.2


@dataclass(frozen=True)
class Settings:
    """How noise and a prompt become a picture. The defaults are those of the released SD3."""
    num_steps: int = option(28, "steps of the solver", 1, 1000)
    guidance_scale: float = option(5.0, "classifier-free guidance; 1: off", 0, 100)
    timestep_shift: float = option(3.0, "alpha of Eq. 23; 1: no shift", 0.01, 100)
    schedule: str = option("released", "times of the steps", choices=tuple(flow.SCHEDULES))
    solver: str = option("euler", "the paper has euler", choices=tuple(flow.SOLVERS))
    unconditional: str = option("empty", "what no text is (App. B.3)", choices=("zeros", "empty"))
    negative_prompt: str = option("", "guidance leads away from this text")
    without: tuple[str, ...] = option((), "encoders to leave out", choices=ENCODERS)
    height: int = option(1024, "height of the picture in px", 16, 16384)
    width: int = option(1024, "width of the picture in px", 16, 16384)
    strength: float = option(0.6, "with --image: 0 keeps it, 1 keeps nothing", 0, 1)
    skip_layers: tuple[int, ...] = option((), "blocks for skip-layer guidance; none: off", 0)

    def __post_init__(self):
        check_options(self)


def released_settings(config, name):
    """What the model cards of SD3.5 recommend. Only its file's name tells a turbo model."""
    if config.dual_attention_layers and config.depth == 24:           # SD3.5-medium
        return {"num_steps": 50, "guidance_scale": 4.0, "skip_layers": (7, 8, 9)}
    if config.depth == 38 and "turbo" in Path(name).name.lower():
        return {"num_steps": 4, "guidance_scale": 1.0}
    return {"guidance_scale": 3.5} if config.depth == 38 else {}      # SD3.5-large


@dataclass
class Pipeline:
    """Three networks. With `read` they have no numbers, and read("text") reads one in its turn."""
    mmdit: torch.nn.Module
    vae: torch.nn.Module
    text: torch.nn.Module
    defaults: dict                     # the Settings that the model wants
    device: torch.device = torch.device("cpu")
    precision: torch.dtype = torch.float32
    parts: Components | None = None    # what else is known of the model
    read: object = None


def load(checkpoint=SHIPPED, device="auto", precision="auto", tokenizers=None, memory="all",
         t5_length=0, text_encoders=(), vae=None):
    """A Pipeline from a run or model folder, a single file, a diffusers folder or a hub name.
    memory="one" lets the text encoders go before MM-DiT and VAE are read."""
    device = pick_device(device)
    precision = pick_precision(precision, device)
    read = partial(load_components, dtype=precision, tokenizers=tokenizers,
                   text_encoders=text_encoders, vae=vae)
    parts = read(checkpoint, shapes_only=memory == "one")
    if t5_length:
        parts.text.config = replace(parts.text.config, t5_length=t5_length)
    defaults = asdict(Settings()) | released_settings(parts.mmdit.config, checkpoint)
    for name in defaults.keys() & parts.sampling.keys():
        defaults[name] = parts.sampling[name]
    networks = (parts.mmdit, parts.vae, parts.text)
    pipeline = Pipeline(*networks, defaults, device, precision, parts)

    def read_one(name):
        one = read(parts.file, (name,))
        return getattr(one, name).to(device)
    if memory == "one":
        pipeline.read = read_one
        return pipeline
    for network in networks:
        network.to(device)
    return pipeline


def encode(text, prompts, settings):
    """B prompts -> context (B, L, D), pooled (B, P). With guidance, B more rows: its start."""
    context, pooled = text(prompts, settings.without)
    if settings.guidance_scale == 1:
        return context, pooled
    if settings.unconditional == "zeros" and not settings.negative_prompt:
        away, away_pooled = text.unconditional(1)
    else:
        away, away_pooled = text([settings.negative_prompt], settings.without)
    context = torch.cat([context, away.expand_as(context)])
    return context, torch.cat([pooled, away_pooled.expand_as(pooled)])


def guided_velocity(z, t, mmdit, context, pooled, guidance_scale, skip_layers):
    """The velocity at z (B, C, H, W) and t (B,). context, pooled: from `encode`."""
    B = len(z)
    if guidance_scale == 1:
        v = v_cond = mmdit(z, t, context, pooled).float()
    else:
        z_twice = torch.cat([z, z])
        both = mmdit(z_twice, t.repeat(2), context, pooled).float()   # (2B, C, H, W)
        v_cond, v_uncond = both.chunk(2)                              # (B, C, H, W) each
        v = flow.guide(v_cond, v_uncond, guidance_scale)
    if skip_layers:
        skipped = mmdit(z, t, context[:B], pooled[:B], skip_layers=skip_layers).float()
        v = flow.guide_skip_layers(v, v_cond, skipped, SKIP_SCALE)
    return v


@torch.no_grad()
def sample_latents(mmdit, context, pooled, noise, settings, latent=None, repaint=None, bar=None):
    """Eq. 1 from noise (B, C, H, W) to latents (B, C, H, W). Also returns path lengths, (B,).
    latent (1, C, H, W): an image to begin from. repaint (1, 1, H, W) bool: where it may change;
    the rest moves on its straight path, Eq. 13."""
    N = settings.num_steps
    times = flow.make_schedule(settings.schedule, N, settings.timestep_shift).to(noise)   # (N + 1,)
    first = 0
    z = noise
    if latent is not None:
        first = int(N * (1 - settings.strength) + 1e-6)               # of 10 at .9 it leaves out 1
        z = flow.interpolate(latent, noise, times[first : first + 1])
    before = None
    lengths = noise.new_zeros(len(noise))
    for i in range(first, N):
        t, t_next = times[i : i + 2].tolist()
        skip_layers = settings.skip_layers if SKIP_START * N < i < SKIP_END * N else ()
        velocity = partial(guided_velocity, mmdit=mmdit, context=context, pooled=pooled,
                           guidance_scale=settings.guidance_scale, skip_layers=skip_layers)
        z_next, v = flow.SOLVERS[settings.solver](velocity, z, t, t_next, before)
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
    largest = step * config.pos_embed_max_size
    height, width = settings.height, settings.width
    if height % step or width % step or max(height, width) > largest:
        raise ValueError(f"--height {height} --width {width}: both must be multiples of {step} px, "
                         f"at most {largest}x{largest} px for this model")
    if max(settings.skip_layers, default=0) >= config.depth:
        raise ValueError(f"--skip-layers: this model's blocks are 0 to {config.depth - 1}")
    return config.latent_channels, height // factor, width // factor


def read_to_edit(image, mask, settings):
    """Files -> image (3, height, width), and where it may change, (height, width) bool."""
    if not image:
        raise ValueError("--mask says where --image is painted anew; give --image as well")
    image = read_image(image)
    white = Image.new("RGB", image.size, "white")
    mask = read_image(mask, background="black") if mask else white
    if abs(mask.width * image.height - mask.height * image.width) > max(*mask.size, *image.size):
        raise ValueError(f"--mask {mask.size} px must have the proportions of --image {image.size}")
    image = to_tensor(resize_and_crop(image, settings.height, settings.width))
    mask = to_tensor(resize_and_crop(mask, settings.height, settings.width))
    return image, mask.mean(0) > 0


@torch.no_grad()
def draw(pipeline, prompts, seed, batch_size, progress, image, mask, settings):
    """Yields the pictures of `generate`, each as soon as it is finished."""
    shape = latent_shape(pipeline, settings)
    if image or mask:
        original, changes = read_to_edit(image, mask, settings)
    read = pipeline.read or partial(getattr, pipeline)
    device, precision = pipeline.device, pipeline.precision
    text = read("text")
    text.config = pipeline.text.config                                # It knows the t5_length.
    encoded = []
    with autocast(device, torch.bfloat16 if precision == torch.float16 else precision):
        for first in range(0, len(prompts), batch_size):              # T5-XXL overflows fp16.
            encoded.append(encode(text, prompts[first : first + batch_size], settings))
    del text                                                          # memory="one" frees it here.
    mmdit = read("mmdit")
    vae = read("vae")
    latent = repaint = None
    if image:
        with autocast(device, precision):
            latent = vae.encode(original[None].to(device)).float()    # (1, C, H, W)
        repaint = F.max_pool2d(changes[None, None].float(), vae.config.downsampling)
        repaint = repaint.bool().to(device)                           # (1, 1, H, W)
    bar = tqdm(total=settings.num_steps * len(encoded), desc="sampling", disable=not progress)
    noise = torch.empty(len(prompts), *shape)                         # (N, C, H, W)
    for i in range(len(prompts)):
        noise[i].normal_(generator=torch.Generator().manual_seed(seed + i))
    for texts, part in zip(encoded, noise.to(device).split(batch_size)):
        with autocast(device, precision):
            latents, _ = sample_latents(mmdit, *texts, part, settings, latent, repaint, bar)
        for z in latents.split(max(1, 2**19 // (settings.height * settings.width))):
            with autocast(device, precision):
                pictures = vae.decode(z).float().cpu()                # (b, 3, height, width)
            if not pictures.isfinite().all():
                raise ValueError("the model's numbers are not finite; try --precision fp32")
            for picture in pictures:
                yield from_tensor(torch.where(changes, picture, original) if image else picture)


def generate(pipeline, prompts, seed=0, batch_size=8, progress=False, image=None, mask=None,
             **settings):
    """A list of PIL pictures for prompts (a list of texts, or one). image: a file to begin from.
    mask: a file, white where it is painted anew. settings: fields of Settings. Picture i starts
    from CPU noise of seed + i, so it is the same alone and in a batch."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    settings = Settings(**pipeline.defaults | settings)
    return list(draw(pipeline, prompts, seed, batch_size, progress, image, mask, settings))


# --- The command line -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Options(Settings):
    """What the command line takes. The last ten name files and devices; no PNG carries them."""
    prompt: tuple[str, ...] = option((), "one or more texts, each in quotes")
    seed: int = option(0, "seed of the first picture", 0, 2**63 - 1)
    precision: str = option("auto", "of matrix products", choices=("auto", *PRECISIONS))
    t5_length: int = option(0, "tokens of T5; 0: the model's own", 0, 2048)
    grid: bool = option(False, "one PNG with all pictures and their prompts")
    enlarge: int = option(1, "px that each px of a picture becomes", 1, 32)
    image: str = option("", "a picture to begin from")
    mask: str = option("", "a picture, white where --image is painted anew")
    prompts_file: str = option("", "a text file with one prompt a line")
    from_png: str = option("", "a PNG made here: draw it again (give its --image and --mask)")
    checkpoint: str = option(str(SHIPPED), "run or model folder, .safetensors file, or hub name")
    tokenizers: str = option("", "folder with clip/ and t5/, if not beside the checkpoint")
    text_encoders: tuple[str, ...] = option((), "files of text encoders, if not in the checkpoint")
    vae: str = option("", "file of the VAE, if not in the checkpoint")
    device: str = option("auto", "auto, cuda, mps or cpu")
    out: str = option("out", "a folder; or, for one picture or a grid, NAME.png")


RECORDED = tuple(Options.__dataclass_fields__)[:-10]


def save_png(picture, file, record):
    """Writes a PNG, enlarged, that carries how it was made as JSON."""
    info = PngImagePlugin.PngInfo()
    info.add_text("rectified-flow", json.dumps(record))
    picture = ImageOps.scale(picture, record["enlarge"], Image.NEAREST)
    write_atomically(file, partial(picture.save, format="PNG", pnginfo=info))
    print(file)


def read_record(file):
    """What `save_png` wrote. A stranger's PNG too gives only numbers and prompts, within bounds."""
    try:
        if not Path(file).is_file():
            raise ValueError("no such file")
        with Image.open(file, formats=["PNG"]) as picture:
            record = json.loads(picture.info["rectified-flow"])
        options = {name: record[name] for name in RECORDED}
        Options(**options)
        return options | {"model": record["model"], "inputs": record.get("inputs", ["", ""])}
    except Exception as problem:        # whatever a decoder raises
        raise ValueError(f"--from-png {file}: not a PNG that sample.py wrote ({problem})") from None


def digests(files):
    """The SHA-256 of the picture and the mask that were edited, "" for none. It holds no path."""
    found = []
    for file in files:
        known = file and Path(file).is_file()
        found.append(hashlib.sha256(Path(file).read_bytes()).hexdigest() if known else "")
    return found


def notes(pipeline, prompts, settings):
    """Yields sentences about what this model cannot know."""
    if "t5" in pipeline.parts.missing:
        yield "the model's T5 is missing; it draws without (Sec. 5.3.3)"
    known = pipeline.parts.words
    words = re.findall(r"\w+", " ".join(prompts).lower())
    unknown = set(words).difference(known)
    if known and unknown:
        unknown = ", ".join(sorted(unknown)[:20])
        yield f"the model does not know {unknown}; it knows {', '.join(sorted(known))}"
    size = f"{pipeline.defaults['height']}x{pipeline.defaults['width']}"
    if known and size != f"{settings.height}x{settings.width}":
        yield f"the model has only seen pictures of {size} px"


def main():
    """From a prompt to a picture. The checkpoint's own defaults go before those below."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=main.__doc__)
    add_options(parser, Options)
    given = given_options(parser.parse_args(), Options)
    if "prompts_file" in given:
        lines = filter(str.strip, read_lines(given["prompts_file"]))
        given["prompt"] = (*given.get("prompt", ()), *lines)
    recorded = read_record(given["from_png"]) if "from_png" in given else {}
    its_model, its_inputs = recorded.pop("model", ""), recorded.pop("inputs", [])
    options = Options(**recorded | given)
    prompts, inputs = options.prompt, digests([options.image, options.mask])
    if recorded and its_inputs != inputs:
        raise ValueError(f"{options.from_png} was made with another --image or --mask; give those")
    if not prompts:
        raise ValueError('nothing says what to draw, with --image or not; give --prompt "a heart"')
    out = Path(options.out)
    is_png = out.suffix.lower() == ".png"
    several = len(prompts) > 1 and not options.grid
    if several if is_png else out.suffix.lower() in Image.registered_extensions():
        raise ValueError(f"--out {out}: give a folder; or, for one picture or a grid, NAME.png")
    pipeline = load(options.checkpoint, options.device, options.precision, options.tokenizers,
                    "one", options.t5_length, options.text_encoders, options.vae)
    model = pipeline.parts.fingerprint
    if recorded and "checkpoint" not in given and its_model != model:
        raise ValueError(f"{options.from_png}: made by another model; name it with --checkpoint")
    wanted = pipeline.defaults | recorded | given
    settings = Settings(**{name: wanted[name] for name in pipeline.defaults})
    for note in notes(pipeline, prompts, settings):
        print(f"note: {note}", file=sys.stderr)
    folder = out.parent if is_png else out
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK) or len(os.fsencode(out.name)) > 200:
        raise ValueError(f"--out {out.name[:80]} cannot be written; give another or shorter name")
    record = {name: getattr(options, name) for name in RECORDED} | asdict(settings)
    record |= {"model": model, "inputs": inputs}
    pictures = []
    try:
        for picture in draw(pipeline, prompts, options.seed, 1, True, options.image, options.mask,
                            settings):
            prompt = prompts[len(pictures)]
            seed = options.seed + len(pictures)
            pictures.append(picture)
            name = re.sub(r"\W", "-", prompt).encode(errors="replace")[:60]
            name = name.decode(errors="ignore").strip("-") or "picture"
            file = out if is_png else out / f"{name}-{seed}.png"
            if not options.grid:
                save_png(picture, file, record | {"prompt": [prompt], "seed": seed})
    finally:
        if options.grid and pictures:
            grid = captioned_grid(pictures, prompts[: len(pictures)], min(4, len(pictures)))
            save_png(grid, out if is_png else out / "grid.png", record)


if __name__ == "__main__":
    command(main)
