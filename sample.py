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

# Skip-layer guidance, from SD3.5-medium's model card: its scale, and its share of the steps.
SKIP_SCALE = 2.5
SKIP_START = 0.01
SKIP_END = 0.2


@dataclass(frozen=True)
class Settings:
    """How noise and a prompt become a picture. The defaults are those of the released SD3."""
    num_steps: int = option(28, "steps of the solver", low=1, high=1000)
    guidance_scale: float = option(5.0, "classifier-free guidance; 1: off", low=0, high=100)
    timestep_shift: float = option(3.0, "alpha of Eq. 23; 1: no shift", low=0.01, high=100)
    schedule: str = option("released", "times of the steps", choices=tuple(flow.SCHEDULES))
    solver: str = option("euler", "the paper has euler", choices=tuple(flow.SOLVERS))
    unconditional: str = option("empty", "what guidance leads away from: the empty prompt, or text "
                                "features of zero (App. B.3)", choices=("zeros", "empty"))
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
    """What the model cards of SD3.5 recommend in place of SD3's settings. config: MMDiTConfig.

    Only SD3.5-medium has a second attention; SD3.5-large has 38 blocks and QK-norm. Its "turbo"
    has the same tensors, so only the name of its file tells.
    """
    if config.dual_attention_layers and config.depth == 24:
        return {"num_steps": 50, "guidance_scale": 4.0, "skip_layers": (7, 8, 9)}
    if config.qk_norm and config.depth == 38:
        turbo = "turbo" in Path(name).name.lower()
        return {"num_steps": 4, "guidance_scale": 1.0} if turbo else {"guidance_scale": 3.5}
    return {}


@dataclass
class Pipeline:
    """Three networks, and as `defaults` the Settings that the model wants.

    With `read`, the networks here have no numbers, and read(name) reads one when its turn comes.
    """
    mmdit: torch.nn.Module
    vae: torch.nn.Module
    text: torch.nn.Module
    defaults: dict
    device: torch.device = torch.device("cpu")
    precision: torch.dtype = torch.float32
    parts: Components | None = None     # what else is known of the file it was read from
    read: object = None

    def network(self, name):
        """The network "mmdit", "vae" or "text", ready to compute."""
        return self.read(name) if self.read else getattr(self, name)

    def settings(self, **given):
        """Settings: the model's own, and in their place what is given."""
        for name in self.defaults | given:
            if name not in Settings.__dataclass_fields__:
                raise ValueError(f"there is no setting {name!r}; `sample.py --help` lists them")
        return Settings(**self.defaults | given)


def load(checkpoint=SHIPPED, device="auto", precision="auto", tokenizers=None, memory="all",
         t5_length=0, text_encoders=(), vae=None):
    """A Pipeline from a run or model folder, a single file, a diffusers folder or a hub name.

    memory: "all" keeps all networks on the device. "one" reads the text encoders when they are
    needed, and lets them go before it reads MM-DiT and VAE. t5_length: T5's tokens; 0: the model's.
    """
    if memory not in ("all", "one") or not 0 <= t5_length <= 2048:
        raise ValueError(f"memory={memory!r}, t5_length={t5_length}: memory must be 'all' or 'one', "
                         f"t5_length 0 to 2048")
    device = devices.pick_device(device)
    precision = devices.pick_precision(precision, device)

    def read(file, names, shapes_only=False):
        parts = load_components(file, names, precision, tokenizers, shapes_only, text_encoders, vae)
        if t5_length and parts.text is not None:
            parts.text.config = replace(parts.text.config, t5_length=t5_length)
        return parts

    def read_one(name):
        return getattr(read(parts.file, (name,)), name).to(device)
    parts = read(checkpoint, ("mmdit", "vae", "text"), shapes_only=memory == "one")
    if memory == "all":
        read_one = None
        for network in (parts.mmdit, parts.vae, parts.text):
            network.to(device)
    released = released_settings(parts.mmdit.config, checkpoint)
    defaults = asdict(Settings()) | released | parts.sampling
    return Pipeline(parts.mmdit, parts.vae, parts.text, defaults, device, precision, parts, read_one)


def encode(text, prompts, settings):
    """B prompts -> context (B, L, D), pooled (B, P). Under guidance 2B rows: the second half is what
    guidance leads away from."""
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
    if guidance_scale == 1:
        v = v_cond = mmdit(z, t, context, pooled).float()
    else:
        both = mmdit(torch.cat([z, z]), torch.cat([t, t]), context, pooled).float()
        v_cond, v_uncond = both.chunk(2)                              # (B, C, H, W) each
        v = flow.guide(v_cond, v_uncond, guidance_scale)
    if skip_layers:
        B = len(z)
        skipped = mmdit(z, t, context[:B], pooled[:B], skip_layers=skip_layers).float()
        v = flow.guide_skip_layers(v, v_cond, skipped, SKIP_SCALE)
    return v


@torch.no_grad()
def sample_latents(mmdit, context, pooled, noise, settings, latent=None, repaint=None, bar=None):
    """Eq. 1 from noise (B, C, H, W) to latents (B, C, H, W). Also returns path lengths, (B,).

    latent (1, C, H, W): an image to begin from, at the time that `strength` sets.
    repaint (1, 1, H, W) bool: where it may change. The rest moves on its straight path, Eq. 13.
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
    for size in (settings.height, settings.width):
        if size % step or size > largest:
            raise ValueError(f"--height {settings.height} --width {settings.width}: both must be "
                             f"multiples of {step} px and at most {largest} px for this model")
    if max(settings.skip_layers, default=0) >= config.depth:
        raise ValueError(f"--skip-layers {settings.skip_layers}: this model has blocks 0 to "
                         f"{config.depth - 1}")
    return config.latent_channels, settings.height // factor, settings.width // factor


def read_to_edit(image, mask, height, width):
    """Files -> image (3, height, width), and where the mask is white, (height, width) bool.

    None stands for what is not given. Transparent parts of a mask are black.
    """
    if image is None and mask is not None:
        raise ValueError("--mask says which part of --image is painted anew; give --image as well")
    if image is None:
        return None, None
    image = read_image(image)
    original = to_tensor(resize_and_crop(image, height, width))
    if mask is None:
        return original, None
    mask = read_image(mask, background="black")
    if abs(mask.width * image.height - mask.height * image.width) > max(*mask.size, *image.size):
        raise ValueError(f"--mask has {mask.width}x{mask.height} px and --image {image.width}x"
                         f"{image.height} px; give a mask with the proportions of the image")
    return original, to_tensor(resize_and_crop(mask, height, width)).mean(0) > 0


def require_finite(x, what):
    """Raises ValueError for NaN or infinity, which would be saved as a black picture."""
    if not x.isfinite().all():
        raise ValueError(f"the model gives {what} that are not finite, so there is no picture; try "
                         f"--precision fp32, or fetch the model again")


@torch.no_grad()
def draw(pipeline, prompts, seed, batch_size, progress, image, mask, settings):
    """Yields the pictures of `generate`, each when it is finished."""
    shape = latent_shape(pipeline, settings)
    original, changes = read_to_edit(image, mask, settings.height, settings.width)
    device = pipeline.device
    computing = partial(devices.autocast, device, pipeline.precision)
    text_precision = pipeline.precision
    if text_precision == torch.float16:
        text_precision = torch.bfloat16                               # T5-XXL overflows fp16.
    batches = []
    for first in range(0, len(prompts), batch_size):
        batches.append(prompts[first : first + batch_size])
    text = pipeline.network("text")
    with devices.autocast(device, text_precision):
        encoded = [encode(text, batch, settings) for batch in batches]
    del text                                                          # memory="one" frees it here.
    mmdit = pipeline.network("mmdit")
    vae = pipeline.network("vae")
    latent = repaint = None
    if original is not None:
        with computing():
            latent = vae.encode(original[None].to(device)).float()    # (1, C, H, W)
    if changes is not None:
        white = changes[None, None].float().to(device)
        repaint = F.max_pool2d(white, vae.config.downsampling).bool()             # (1, 1, H, W)
    bar = tqdm(total=settings.num_steps * len(batches), desc="sampling", disable=not progress)
    for batch, (context, pooled) in zip(batches, encoded):
        noise = []
        for _ in batch:
            noise.append(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
            seed += 1
        noise = torch.stack(noise).to(device)                         # (B, C, H, W)
        with computing():
            latents, _ = sample_latents(mmdit, context, pooled, noise, settings, latent, repaint, bar)
        require_finite(latents, "latents")
        for z in latents:
            with computing():
                picture = vae.decode(z[None])[0].float().cpu()        # (3, height, width)
            require_finite(picture, "pixels")
            if changes is not None:
                picture = torch.where(changes, picture, original)
            yield from_tensor(picture)


def generate(pipeline, prompts, seed=0, batch_size=8, progress=False, image=None, mask=None,
             **settings):
    """Pictures for prompts (a text, or a list of texts): a list of PIL pictures.

    image: a file to begin from. mask: a file, white where the image is painted anew. settings:
    fields of Settings, in place of the model's own. Picture i starts from noise that is drawn on
    the CPU from seed + i, so it is the same alone, in a batch and on any device.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    settings = pipeline.settings(**settings)
    return list(draw(pipeline, prompts, seed, batch_size, progress, image, mask, settings))


# --------------------------------------------------------------------------------------------------
# Pictures to files
# --------------------------------------------------------------------------------------------------

def captioned_grid(images, captions, columns):
    """One picture of many (PIL or uint8 arrays), each above its caption, enlarged to 160 px."""
    images = [Image.fromarray(np.asarray(image)) for image in images]
    width = max(image.width for image in images)
    height = max(image.height for image in images)
    factor = -(-160 // width)
    font = ImageFont.load_default(size=10 + factor * width // 60)
    step_x = factor * width + 16
    step_y = int(factor * height + 6 * font.size)
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * step_x, rows * step_y), "white")
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x = i % columns * step_x + 8
        y = i // columns * step_y + 8
        grid.paste(image.resize((factor * image.width, factor * image.height), Image.NEAREST), (x, y))
        text = textwrap.fill(caption, int(2 * step_x / font.size), max_lines=4, placeholder=" ...")
        below = (x, y + factor * height + 4)
        ImageDraw.Draw(grid).multiline_text(below, text, font=font, fill="black")
    return grid


RECORD = "rectified-flow"               # the key under which a PNG says how it was made
RECORDED = ("prompt", "seed", "precision", "t5_length", "grid", "enlarge")


def save_png(picture, file, record):
    """Writes a PNG that carries its record as JSON, enlarged as the record says."""
    info = PngImagePlugin.PngInfo()
    info.add_text(RECORD, json.dumps(record))
    factor = record["options"]["enlarge"]
    picture = picture.resize((factor * picture.width, factor * picture.height), Image.NEAREST)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda partial: picture.save(partial, format="PNG", pnginfo=info))
    print(file)


def read_record(file):
    """What `save_png` wrote. It may be a stranger's: numbers and prompts only, and all in bounds."""
    try:
        if not Path(file).is_file():
            raise ValueError("no such file")
        with Image.open(file, formats=["PNG"]) as picture:
            record = json.loads(picture.info[RECORD])
        options = {name: record["options"][name] for name in RECORDED}
        Options(**options)
        Settings(**record["settings"])
        return record | {"options": options, "fingerprint": record["fingerprint"]}
    except Exception as problem:        # whatever a decoder raises
        raise ValueError(f"--from-png {file}: not a PNG that sample.py wrote ({problem}); give "
                         f"one that it wrote") from None


def notes(pipeline, prompts, settings):
    """What this model cannot know: sentences to be said once, before it draws anyway."""
    found = []
    if "t5" in pipeline.parts.missing:
        found.append("the model's T5 is missing; it draws without (Sec. 5.3.3)")
    known = set(pipeline.parts.words)
    unknown = sorted(set(re.findall(r"\w+", " ".join(prompts).lower())) - known)
    if known and unknown:
        found.append(f"the model has never seen the words {', '.join(unknown[:20])}; it knows only "
                     f"{', '.join(sorted(known))}")
    trained = (pipeline.defaults["height"], pipeline.defaults["width"])
    if known and (settings.height, settings.width) != trained:
        found.append(f"the model has never seen pictures of {settings.height}x{settings.width} px; "
                     f"it was trained on {trained[0]}x{trained[1]} px")
    return found


# --------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Options:
    """What the command line takes beside Settings."""
    prompt: tuple[str, ...] = option((), "one or more texts, each in quotes")
    prompts_file: str = option("", "a text file with one prompt a line")
    from_png: str = option("", "a PNG made here: draw it again, with what else is given instead")
    image: str = option("", "a picture to begin from")
    mask: str = option("", "a picture, white where --image is painted anew")
    seed: int = option(0, "seed of the first picture", low=0, high=2**63 - 1)
    grid: bool = option(False, "one PNG with all pictures and their prompts")
    enlarge: int = option(1, "px that each px of a picture becomes", low=1, high=32)
    checkpoint: str = option(str(SHIPPED), "run or model folder, .safetensors file, or hub name")
    tokenizers: str = option("", "folder with clip/ and t5/, if not beside the checkpoint")
    text_encoders: tuple[str, ...] = option((), "files of text encoders, if not in the checkpoint")
    vae: str = option("", "file of the VAE, if not in the checkpoint")
    t5_length: int = option(0, "tokens of T5; 0: the model's own", low=0, high=2048)
    device: str = option("auto", "auto, cuda, mps or cpu")
    precision: str = option("auto", "of matrix products", choices=("auto", *devices.PRECISIONS))
    out: str = option("out", "a folder, or a name that ends in .png for one picture or a grid")

    def __post_init__(self):
        check_options(self)


def place_for(out, name):
    """The file to write: `out` itself if that is a .png, or `name` in the folder `out`."""
    out = Path(out)
    file = out if out.suffix.lower() == ".png" else out / name
    if file != out and out.suffix.lower() in Image.registered_extensions():
        raise ValueError(f"--out {out}: pictures are written as PNG, which can carry their settings; "
                         f"give a folder, or a name that ends in .png")
    if len(os.fsencode(file.name)) > 200:
        raise ValueError(f"--out: the name {file.name[:60]!r}... has more than 200 bytes; shorten it")
    file.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(file.parent, os.W_OK) or file.is_dir():
        raise ValueError(f"--out {out} cannot be written; give another place")
    return file


def main():
    """Prompts from the command line to PNG files."""
    parser = argparse.ArgumentParser(description="from a prompt to a picture", allow_abbrev=False)
    add_options(parser, Options)
    add_options(parser, Settings)
    arguments = parser.parse_args()
    given = given_options(arguments, Options)
    wanted = given_options(arguments, Settings)
    if "prompts_file" in given:
        lines = [line for line in read_lines(given["prompts_file"]) if line.strip()]
        given["prompt"] = (*given.get("prompt", ()), *lines)
    record = {}
    if "from_png" in given:
        record = read_record(given["from_png"])
        wanted = record["settings"] | wanted
    options = Options(**record.get("options", {}) | given)
    if not options.prompt:
        raise ValueError('nothing says what to draw, with --image or not; give --prompt "a heart"')
    inputs = []
    for file in (options.image, options.mask):
        inputs.append(hashlib.sha256(read_image(file).tobytes()).hexdigest() if file else "")
    if record and record.get("inputs") != inputs:
        raise ValueError(f"{options.from_png} was made with another --image or --mask; give those")
    pipeline = load(options.checkpoint, options.device, options.precision, options.tokenizers or None,
                    "one", options.t5_length, options.text_encoders, options.vae or None)
    fingerprint = pipeline.parts.fingerprint
    if record and "checkpoint" not in given and record["fingerprint"] != fingerprint:
        raise CheckpointError(f"{options.from_png} was made with another model than "
                              f"{options.checkpoint}; name its model with --checkpoint")
    settings = pipeline.settings(**wanted)
    for note in notes(pipeline, options.prompt, settings):
        print(f"note: {note}", file=sys.stderr)
    record = {"options": {name: getattr(options, name) for name in RECORDED},
              "settings": asdict(settings), "fingerprint": fingerprint, "inputs": inputs}
    files = []
    for i, prompt in enumerate(options.prompt):
        name = re.sub(r"\W", "-", prompt).encode(errors="replace")[:60].decode(errors="ignore")
        files.append(place_for(options.out, f"{name.strip('-') or 'picture'}-{options.seed + i}.png"))
    pictures = []
    drawn = draw(pipeline, options.prompt, options.seed, 1, True, options.image or None,
                 options.mask or None, settings)
    try:
        for i, picture in enumerate(drawn):
            pictures.append(picture)
            own = {"prompt": [options.prompt[i]], "seed": options.seed + i}
            if not options.grid:
                save_png(picture, files[i], record | {"options": record["options"] | own})
    finally:
        if options.grid and pictures:
            captions = options.prompt[: len(pictures)]
            save_png(captioned_grid(pictures, captions, min(4, len(pictures))), place_for(options.out, "grid.png"), record)


if __name__ == "__main__":
    devices.command(main)
