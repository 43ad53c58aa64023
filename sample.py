"""sample.py: from a prompt to a picture (SD3, arXiv:2403.03206v1, Eq. 1 from noise to data).

Read with   Eq. 1; App. B.3 for Euler's method; Sec. 5.3.2 for the shift; Sec. 5.3.3 for `without`
Not here    the formulae of a step (flow.py), the networks, their files (checkpoints.py)
Shapes      B batch   C latent channels   H W latent height, width   L text tokens   P pooled_dim
Library     generate(load("pretrained/tiny"), ["two red circles"])[0].save("picture.png")
Run         python sample.py --prompt "a red circle left of a blue square"
            python sample.py --from-png out/PICTURE.png     draws the picture again, bit for bit
"""

import argparse
import hashlib
import json
import os
import re
import sys
import textwrap
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from tqdm import tqdm

import devices
import flow
from checkpoints import (SHIPPED, CheckpointError, Components, add_options, check_options,
                         given_options, load_components, option, write_atomically)
from data import from_tensor, read_image, read_lines, resize_and_crop, to_tensor

SKIP_SCALE = 2.5                      # skip-layer guidance as on SD3.5-medium's model card,
SKIP_START = 0.01                     # between these shares of the steps
SKIP_END = 0.2
RECORD = "rectified-flow"             # the key under which a PNG says how it was made


@dataclass(frozen=True)
class Settings:
    """How noise and a prompt become a picture. The defaults are those of the released SD3."""
    num_steps: int = option(28, "steps of the solver", low=1, high=1000)
    guidance_scale: float = option(5.0, "classifier-free guidance; 1: off", low=0, high=100)
    timestep_shift: float = option(3.0, "alpha of Eq. 23; 1: no shift", low=0.01, high=100)
    schedule: str = option("released", "times of the steps", choices=tuple(flow.SCHEDULES))
    solver: str = option("euler", "the paper has euler", choices=tuple(flow.SOLVERS))
    unconditional: str = option("empty", "guidance leads away from the empty prompt, or from "
                                "text features of zero (App. B.3)", choices=("zeros", "empty"))
    negative_prompt: str = option("", "a text that guidance leads away from instead")
    without: tuple[str, ...] = option((), "text encoders to leave out (Sec. 5.3.3)",
                                      choices=("clip_l", "clip_g", "t5"))
    height: int = option(1024, "height of the picture in px", low=16, high=16384)
    width: int = option(1024, "width of the picture in px", low=16, high=16384)
    strength: float = option(0.6, "with --image: 0 keeps it, 1 keeps nothing", low=0, high=1)
    skip_layers: tuple[int, ...] = option((), "blocks for skip-layer guidance; none: off", low=0)

    def __post_init__(self):
        check_options(self)


def released_settings(config, name):
    """What the model cards of SD3.5 recommend. Only its file's name tells a turbo model."""
    if config.dual_attention_layers and config.depth == 24:           # SD3.5-medium
        return {"num_steps": 50, "guidance_scale": 4.0, "skip_layers": (7, 8, 9)}
    if not config.qk_norm or config.depth != 38:
        return {}
    if "turbo" in Path(name).name.lower():
        return {"num_steps": 4, "guidance_scale": 1.0}
    return {"guidance_scale": 3.5}                                    # SD3.5-large


@dataclass
class Pipeline:
    """Three networks, and as `defaults` the Settings that the model wants.

    With `read`, the networks here have no numbers, and `network` reads one when its turn comes.
    """
    mmdit: torch.nn.Module
    vae: torch.nn.Module
    text: torch.nn.Module
    defaults: dict
    device: torch.device = torch.device("cpu")
    precision: torch.dtype = torch.float32
    parts: Components | None = None   # what else is known of the model's file
    read: object = None

    def network(self, name):
        """The network "mmdit", "vae" or "text", ready to compute."""
        network = getattr(self, name)
        if self.read is not None:
            config = network.config
            network = getattr(self.read(wanted=(name,)), name)
            network.config = config                                   # It has the t5_length of `load`.
        return network.to(self.device)


def load(checkpoint=SHIPPED, device="auto", precision="auto", tokenizers=None, memory="all",
         t5_length=0, text_encoders=(), vae=None):
    """A Pipeline from a run or model folder, a single file, a diffusers folder or a hub name.

    memory: "all" keeps all networks on the device. "one" reads the text encoders when they are
    needed, and lets them go before it reads MM-DiT and VAE. t5_length: T5's tokens; 0: the model's.
    """
    device = devices.pick_device(device)
    precision = devices.pick_precision(precision, device)
    read = partial(load_components, dtype=precision, tokenizers=tokenizers,
                   text_encoders=text_encoders, vae=vae)
    parts = read(checkpoint, shapes_only=memory == "one")
    if t5_length:
        parts.text.config = replace(parts.text.config, t5_length=t5_length)
    defaults = asdict(Settings()) | released_settings(parts.mmdit.config, checkpoint)
    for name in defaults.keys() & parts.sampling.keys():
        defaults[name] = parts.sampling[name]
    read_one = partial(read, parts.file) if memory == "one" else None
    return Pipeline(parts.mmdit, parts.vae, parts.text, defaults, device, precision, parts, read_one)


def encode(text, prompts, settings):
    """B prompts -> context (B, L, D), pooled (B, P). Under guidance, B more rows that it leads away
    from."""
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
        both = mmdit(torch.cat([z, z]), torch.cat([t, t]), context, pooled).float()
        v_cond, v_uncond = both.chunk(2)                              # (B, C, H, W) each
        v = flow.guide(v_cond, v_uncond, guidance_scale)
    if skip_layers:
        skipped = mmdit(z, t, context[:B], pooled[:B], skip_layers=skip_layers).float()
        v = flow.guide_skip_layers(v, v_cond, skipped, SKIP_SCALE)
    return v


@torch.no_grad()
def sample_latents(mmdit, context, pooled, noise, settings, latent=None, repaint=None, bar=None):
    """Eq. 1 from noise (B, C, H, W) to latents (B, C, H, W). Also returns path lengths, (B,).

    latent (1, C, H, W): an image to begin from, at the time that `strength` sets. repaint
    (1, 1, H, W) bool: where it may change. The rest moves on its straight path, Eq. 13.
    """
    N = settings.num_steps
    times = flow.make_schedule(settings.schedule, N, settings.timestep_shift).to(noise)   # (N + 1,)
    solver_step = flow.SOLVERS[settings.solver]
    first = 0
    z = noise
    if latent is not None:
        first = int(N * (1 - settings.strength) + 1e-6)               # 10 steps at .9 leave out one.
        z = flow.interpolate(latent, noise, times[first : first + 1])
    before = None
    lengths = noise.new_zeros(len(noise))
    for i in range(first, N):
        t, t_next = times[i : i + 2].tolist()
        skip_layers = settings.skip_layers if SKIP_START * N < i < SKIP_END * N else ()
        velocity = partial(guided_velocity, mmdit=mmdit, context=context, pooled=pooled,
                           guidance_scale=settings.guidance_scale, skip_layers=skip_layers)
        z_next, v = solver_step(velocity, z, t, t_next, before)
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
        raise ValueError(f"--skip-layers {settings.skip_layers}: this model's blocks are 0 to "
                         f"{config.depth - 1}")
    return config.latent_channels, height // factor, width // factor


def read_to_edit(image, mask, height, width):
    """Files -> image (3, height, width), and where it may change, (height, width) bool: where the
    mask is white. Transparent is black. Without a mask it may change everywhere."""
    image = read_image(image)
    original = to_tensor(resize_and_crop(image, height, width))
    if mask is None:
        return original, torch.ones(height, width, dtype=torch.bool)
    mask = read_image(mask, background="black")
    if abs(mask.width * image.height - mask.height * image.width) > max(*mask.size, *image.size):
        raise ValueError(f"--mask has {mask.width}x{mask.height} px and --image {image.width}x"
                         f"{image.height} px; give a mask with the proportions of the image")
    return original, to_tensor(resize_and_crop(mask, height, width)).mean(0) > 0


@torch.no_grad()
def draw(pipeline, prompts, seed=0, batch_size=8, progress=False, image=None, mask=None, **settings):
    """Yields a PIL picture for each of the prompts (a list), as soon as it is finished.

    image: a file to begin from. mask: a file, white where the image is painted anew. settings:
    fields of Settings, in place of the model's own. Picture i starts from noise that is drawn on
    the CPU from seed + i, so it is the same alone, in a batch and on any device.
    """
    settings = Settings(**pipeline.defaults | settings)
    shape = latent_shape(pipeline, settings)
    if mask is not None and image is None:
        raise ValueError("--mask says which part of --image is painted anew; give --image as well")
    if image is not None:
        original, changes = read_to_edit(image, mask, settings.height, settings.width)
    device = pipeline.device
    precision = pipeline.precision
    text = pipeline.network("text")
    encoded = []
    with devices.autocast(device, torch.bfloat16 if precision == torch.float16 else precision):
        for first in range(0, len(prompts), batch_size):              # T5-XXL overflows fp16.
            encoded.append(encode(text, prompts[first : first + batch_size], settings))
    del text                                                          # memory="one" frees it here.
    mmdit = pipeline.network("mmdit")
    vae = pipeline.network("vae")
    latent = repaint = None
    if image is not None:
        with devices.autocast(device, precision):
            latent = vae.encode(original[None].to(device)).float()    # (1, C, H, W)
        white = changes[None, None].float().to(device)
        repaint = F.max_pool2d(white, vae.config.downsampling).bool()             # (1, 1, H, W)
    bar = tqdm(total=settings.num_steps * len(encoded), desc="sampling", disable=not progress)
    for part, (context, pooled) in enumerate(encoded):
        noise = []
        for i in range(part * batch_size, min(len(prompts), (part + 1) * batch_size)):
            noise.append(torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)))
        noise = torch.stack(noise).to(device)                         # (B, C, H, W)
        with devices.autocast(device, precision):
            latents, _ = sample_latents(mmdit, context, pooled, noise, settings, latent, repaint, bar)
        check_finite(latents)
        for z in latents:
            with devices.autocast(device, precision):
                picture = vae.decode(z[None])[0].float().cpu()        # (3, height, width)
            check_finite(picture)
            if image is not None:
                picture = torch.where(changes, picture, original)
            yield from_tensor(picture)


def check_finite(x):
    """Raises ValueError for NaN and infinity, which would be saved as a black picture."""
    if not x.isfinite().all():
        raise ValueError("the model gives numbers that are not finite, so there is no picture; try "
                         "--precision fp32, or fetch the model again")


def generate(pipeline, prompts, *options, **settings):
    """The pictures of `draw` as a list. The options are the same; prompts may be a single text."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    return list(draw(pipeline, prompts, *options, **settings))


def captioned_grid(images, captions, columns):
    """One picture of many (PIL or uint8 arrays), each above its caption, enlarged to 160 px."""
    images = [Image.fromarray(np.asarray(image)) for image in images]
    side = max(max(image.size) for image in images)
    factor = -(-160 // side)
    cell = factor * side + 16
    font = ImageFont.load_default(size=cell // 16)
    row_height = cell + 5 * font.size
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * cell, int(rows * row_height)), "white")
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x = i % columns * cell + 8
        y = int(i // columns * row_height) + 8
        grid.paste(image.resize((factor * image.width, factor * image.height), Image.NEAREST), (x, y))
        text = textwrap.fill(caption, 30, max_lines=4, placeholder=" ...")
        below = (x, y + factor * image.height + 4)
        ImageDraw.Draw(grid).multiline_text(below, text, font=font, fill="black")
    return grid


# ---- Command line --------------------------------------------------------------------------------

@dataclass(frozen=True)
class Options(Settings):
    """What the command line takes. Fields from `image` on are not written into PNGs."""
    prompt: tuple[str, ...] = option((), "one or more texts, each in quotes")
    seed: int = option(0, "seed of the first picture", low=0, high=2**63 - 1)
    precision: str = option("auto", "of matrix products", choices=("auto", *devices.PRECISIONS))
    t5_length: int = option(0, "tokens of T5; 0: the model's own", low=0, high=2048)
    grid: bool = option(False, "one PNG with all pictures and their prompts")
    enlarge: int = option(1, "px that each px of a picture becomes", low=1, high=32)
    image: str = option("", "a picture to begin from")
    mask: str = option("", "a picture, white where --image is painted anew")
    prompts_file: str = option("", "a text file with one prompt a line")
    from_png: str = option("", "a PNG made here: draw it again, with what else is given instead")
    checkpoint: str = option(str(SHIPPED), "run or model folder, .safetensors file, or hub name")
    tokenizers: str = option("", "folder with clip/ and t5/, if not beside the checkpoint")
    text_encoders: tuple[str, ...] = option((), "files of text encoders, if not in the checkpoint")
    vae: str = option("", "file of the VAE, if not in the checkpoint")
    device: str = option("auto", "auto, cuda, mps or cpu")
    out: str = option("out", "a folder, or a name that ends in .png for one picture or a grid")


def recorded(options):
    """What a PNG says of the options in a dict: all that name no file and no device."""
    names = list(Options.__dataclass_fields__)
    return {name: options[name] for name in names[: names.index("image")] if name in options}


def save_png(picture, file, record):
    """Writes a PNG, enlarged, that carries its record as JSON."""
    info = PngImagePlugin.PngInfo()
    info.add_text(RECORD, json.dumps(record))
    factor = record["options"]["enlarge"]
    picture = picture.resize((factor * picture.width, factor * picture.height), Image.NEAREST)
    write_atomically(file, partial(picture.save, format="PNG", pnginfo=info))
    print(file)


def read_record(file):
    """What `save_png` wrote. It may be a stranger's: numbers and prompts, all in bounds; no files."""
    try:
        if not Path(file).is_file():
            raise ValueError("no such file")
        with Image.open(file, formats=["PNG"]) as picture:
            record = json.loads(picture.info[RECORD])
        options = recorded(record["options"])
        Options(**options)
        return record | {"options": options, "fingerprint": str(record["fingerprint"])}
    except Exception as problem:        # whatever a decoder raises
        raise ValueError(f"--from-png {file}: not a PNG that sample.py wrote ({problem}); give one "
                         f"that it wrote") from None


def notes(pipeline, prompts, settings):
    """What this model cannot know: sentences to say once, before it draws anyway."""
    found = []
    if "t5" in pipeline.parts.missing:
        found.append("the model's T5 is missing; it draws without (Sec. 5.3.3)")
    known = set(pipeline.parts.words)
    unknown = set(re.findall(r"\w+", " ".join(prompts).lower())) - known
    if known and unknown:
        found.append(f"the model has never seen the words {', '.join(sorted(unknown)[:20])}; it "
                     f"knows only {', '.join(sorted(known))}")
    height, width = pipeline.defaults["height"], pipeline.defaults["width"]
    if known and (settings.height, settings.width) != (height, width):
        found.append(f"the model has only seen pictures of {height}x{width} px")
    return found


def read_options():
    """The command line -> Options, what was given of them, and the record of --from-png or {}."""
    parser = argparse.ArgumentParser(
        description="From a prompt to a picture. Where nothing is given, the settings of the "
        "checkpoint hold; the defaults below are SD3's.", allow_abbrev=False)
    add_options(parser, Options)
    given = given_options(parser.parse_args(), Options)
    if "prompts_file" in given:
        lines = [line for line in read_lines(given["prompts_file"]) if line.strip()]
        given["prompt"] = (*given.get("prompt", ()), *lines)
    record = {}
    if "from_png" in given:
        record = read_record(given["from_png"])
        given = record["options"] | given
    options = Options(**given)
    if not options.prompt:
        raise ValueError('nothing says what to draw, with --image or not; give --prompt "a heart"')
    out = Path(options.out)
    is_png = out.suffix.lower() == ".png"
    several = len(options.prompt) > 1 and not options.grid
    wrong = several if is_png else out.suffix.lower() in Image.registered_extensions()
    if wrong or len(os.fsencode(out.name)) > 200:
        raise ValueError(f"--out {out.name[:80]}: give a folder; or, for one picture or a grid, a "
                         f"name that ends in .png and has at most 200 bytes")
    return options, given, record


def main():
    """Prompts from the command line to PNG files."""
    options, given, record = read_options()
    inputs = []
    for file in (options.image, options.mask):
        inputs.append(hashlib.sha256(read_image(file).tobytes()).hexdigest() if file else "")
    if record.get("inputs", inputs) != inputs:
        raise ValueError(f"{options.from_png} was made with another --image or --mask; give those")
    pipeline = load(options.checkpoint, options.device, options.precision, options.tokenizers or None,
                    "one", options.t5_length, options.text_encoders, options.vae or None)
    fingerprint = pipeline.parts.fingerprint
    if "checkpoint" not in given and record.get("fingerprint", fingerprint) != fingerprint:
        raise CheckpointError(f"{options.from_png} was not made with {options.checkpoint}; name its "
                              f"model with --checkpoint")
    wanted = {name: value for name, value in given.items() if name in pipeline.defaults}
    settings = Settings(**pipeline.defaults | wanted)
    for note in notes(pipeline, options.prompt, settings):
        print(f"note: {note}", file=sys.stderr)
    out = Path(options.out)
    folder = out.parent if out.suffix.lower() == ".png" else out
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out {out}: nothing can be written there; give another folder")
    record = {"options": recorded(asdict(options) | asdict(settings)), "fingerprint": fingerprint,
              "inputs": inputs}
    pictures = []
    try:
        for picture in draw(pipeline, options.prompt, options.seed, 1, True, options.image or None,
                            options.mask or None, **wanted):
            prompt = options.prompt[len(pictures)]
            seed = options.seed + len(pictures)
            pictures.append(picture)
            if not options.grid:
                name = re.sub(r"\W", "-", prompt).encode(errors="replace")[:60].decode(errors="ignore")
                file = out if folder != out else out / f"{name.strip('-') or 'picture'}-{seed}.png"
                own = record["options"] | {"prompt": [prompt], "seed": seed}
                save_png(picture, file, record | {"options": own})
    finally:
        if options.grid and pictures:
            grid = captioned_grid(pictures, options.prompt[: len(pictures)], min(4, len(pictures)))
            save_png(grid, out if folder != out else out / "grid.png", record)


if __name__ == "__main__":
    devices.command(main)
