"""sample.py: prompt -> image (SD3, arXiv:2403.03206v1, Eq. 1 from noise to data, Sec. 5.3.2 for the shift).

Read with   Eq. 1 and the samplers of Sec. 5.1 (Euler, classifier-free guidance), Sec. 5.3.3 (leaving out text encoders)
Not here    the steps themselves (flow.py), the networks, files (checkpoints.py); this file puts them together
Order       generate: all prompts are encoded, then all latents sampled, then all decoded, so that one network at a time is
            needed; what is loaded with memory="one" is read when its turn comes and let go afterwards
Library     from sample import load, generate
            pipeline = load("pretrained/tiny")
            generate(pipeline, ["a red circle left of a blue square"])[0].save("picture.png")
Run         python sample.py --prompt "a red circle left of a blue square"
            python sample.py --from-png out/picture.png        the same again, from what the PNG says about itself
"""

import argparse
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from tqdm import tqdm

import flow
from checkpoints import SHIPPED, CheckpointError, find_model_file, fingerprint, load_components, portable, write_atomically
from data import captioned_grid, from_tensor, read_image, resize_and_crop, to_tensor
from mmdit import MMDiT, MMDiTConfig
from text_encoders import TextEncoders
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
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    cpu = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return torch.bfloat16 if cpu.get("avx512_bf16") or cpu.get("amx_bf16") else torch.float32


# ------------------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Settings:
    """How to come from a prompt to a picture. The defaults are those of the released SD3; see also `released_settings`."""
    num_steps: int = 28                # solver steps
    guidance_scale: float = 5.0        # 1 = off
    timestep_shift: float = 3.0        # alpha of Eq. 23
    schedule: str = "released"         # shifted, released, edm or uniform: flow.SCHEDULES
    solver: str = "euler"              # euler, heun, rk4 or dpm++2m: flow.SOLVERS
    unconditional: str = "empty"       # "zeros": all encoders' outputs 0 (App. B.3); "empty": the empty prompt is encoded
    height: int = 1024                 # px
    width: int = 1024                  # px
    negative_prompt: str = ""          # takes the place of `unconditional`
    without: tuple[str, ...] = ()      # text encoders to leave out (Sec. 5.3.3)
    t5_length: int = 0                 # T5's tokens, 77 or 256 say; 0: as the checkpoint says
    guidance_start: float = 1.0        # guidance is on for start >= t >= end
    guidance_end: float = 0.0          # see guidance_start
    guidance_rescale: float = 0.0      # share, 0 to 1, of the added spread that is taken away again
    skip_layers: tuple[int, ...] = ()  # skip-layer guidance: the blocks that are left out; none = off
    skip_scale: float = 2.5            # how far it pushes away from the result without them
    skip_start: float = 0.01           # skip-layer guidance is on between these shares of the steps
    skip_end: float = 0.2              # see skip_start
    strength: float = 0.6              # image to image: 1 keeps nothing of the image, 0 all
    tile: int = 0                      # px; decode in tiles of this size (less memory), 0: all at once

    def __post_init__(self):
        for name in ("without", "skip_layers"):                                   # lists, where they come from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, known in (("unconditional", ("zeros", "empty")), ("schedule", flow.SCHEDULES), ("solver", flow.SOLVERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}; choose {', '.join(known)}")
        if self.num_steps < 1 or self.t5_length < 0 or self.tile < 0 or self.timestep_shift <= 0:
            raise ValueError(f"num_steps={self.num_steps}, t5_length={self.t5_length}, tile={self.tile} and timestep_shift="
                             f"{self.timestep_shift}: give numbers above 0 (0 also for the second and third)")
        for name in ("strength", "guidance_rescale", "guidance_start", "guidance_end", "skip_start", "skip_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}; give a number from 0 to 1")


def released_settings(config: MMDiTConfig, name: str) -> dict:
    """What the publisher recommends where a released model differs from SD3. SD3.5-medium (24 blocks) has a second attention;
    SD3.5-large QK-norm and 38 blocks. Its few-step "turbo" has the same tensors: only the name of its file or folder tells."""
    if config.dual_attention_layers and config.depth == 24:                       # with its skip layers, of Stability's code
        return {"num_steps": 50, "guidance_scale": 4.0, "skip_layers": (7, 8, 9)}
    if config.qk_norm and config.depth == 38:
        return {"num_steps": 4, "guidance_scale": 1.0} if "turbo" in Path(name).name.lower() else {"guidance_scale": 3.5}
    return {}


# ------------------------------------------------------------------------------------------------------------
# Three networks and where they are
# ------------------------------------------------------------------------------------------------------------

@dataclass
class Pipeline:
    """Everything a prompt needs. `defaults`: how this model wants to be sampled, fields of Settings.

    memory: "all": every network stays on the device. "offload": they wait in main memory, and only the one that computes is on
    the device. "one": here they are without numbers (on the meta device), and `read(name)` gives one when its turn comes.
    """
    mmdit: MMDiT
    vae: VAE
    text: TextEncoders
    defaults: dict
    device: torch.device = torch.device("cpu")
    precision: torch.dtype = torch.float32
    checkpoint: str = ""                     # where it came from and its hash, for the record in the PNG
    fingerprint: str = ""
    memory: str = "all"
    read: Callable | None = None

    def autocast(self, precision: torch.dtype | None = None):
        """Matrix products in `precision`; sinusoids, the embedding of time, norms and the solver stay fp32."""
        precision = precision or self.precision
        return torch.autocast(self.device.type, precision, enabled=precision != torch.float32)

    def use(self, name: str, compute):
        """compute(network) with "mmdit", "vae" or "text" on the device; afterwards the network goes where `memory` says. Text
        is never computed in fp16: T5-XXL's activations go beyond its 65504, so bf16 takes its place."""
        network = self.read(name) if self.memory == "one" else getattr(self, name)
        if self.memory != "all":
            network.to(self.device)
        precision = torch.bfloat16 if name == "text" and self.precision == torch.float16 else self.precision
        try:
            with torch.no_grad(), self.autocast(precision):
                return compute(network)
        finally:
            if self.memory == "offload":
                network.to("cpu")

    def settings(self, **given) -> Settings:
        """The model's defaults, with what is given in their place."""
        known = {field.name for field in fields(Settings)}
        if unknown := sorted((self.defaults.keys() | given.keys()) - known):
            raise ValueError(f"unknown setting {unknown[0]!r}; the settings are {', '.join(sorted(known))}")
        return Settings(**self.defaults | given)


def load(checkpoint=SHIPPED, device: str = "auto", precision: str = "auto", tokenizers=None, memory: str = "all") -> Pipeline:
    """A pipeline from a run folder, a model folder, a single file, a diffusers folder or a hub name.

    precision: auto, fp32, bf16 or fp16, of matrix products, and of matrices in memory. memory: see Pipeline; with "one" the
    peak is about the largest network. Raises CheckpointError for whatever does not fit.
    """
    if memory not in ("all", "offload", "one"):
        raise ValueError(f"memory={memory!r}; choose 'all', 'offload' or 'one'")
    device = pick_device(device)
    precision = pick_precision(precision, device)
    file = find_model_file(checkpoint)                                            # a hub name is looked up once
    read = lambda *names, shapes_only=False: load_components(file, names, precision, tokenizers, shapes_only)
    parts = read("mmdit", "vae", "text", shapes_only=memory == "one")
    place = device if memory == "all" else "cpu"
    networks = [part if memory == "one" else part.to(place) for part in (parts.mmdit, parts.vae, parts.text)]
    defaults = asdict(Settings()) | released_settings(parts.mmdit.config, str(checkpoint)) | parts.sampling
    named = portable(checkpoint) if Path(checkpoint).exists() else str(checkpoint)          # else a name on the hub
    return Pipeline(*networks, defaults, device, precision, named, fingerprint(parts.file), memory,
                    lambda name: getattr(read(name), name))


# ------------------------------------------------------------------------------------------------------------
# Prompt -> context, noise -> latent, latent -> picture
# ------------------------------------------------------------------------------------------------------------

def encode(text: TextEncoders, prompts, settings: Settings):
    """prompts (B strings) -> (context, pooled) of them, B rows, and of what guidance leads away from: one row, or None."""
    if settings.t5_length:
        text = TextEncoders(text.encoders, text.tokenizers, replace(text.config, t5_length=settings.t5_length))
    given = text(prompts, settings.without)
    if settings.guidance_scale == 1:
        return given, None
    if settings.unconditional == "zeros" and not settings.negative_prompt:
        return given, text.unconditional(1)
    return given, text([settings.negative_prompt], settings.without)


def sample_latents(mmdit, given, negative, noise, settings: Settings, latent=None, repaint=None, progress: bool = False):
    """Eq. 1 from noise (B, C, H, W) to latents (B, C, H, W), and the path length of each, (B,) (Table 6).

    given: (context, pooled), B rows; negative: one row, None without guidance. latent (1, C, H, W): a picture to
    begin from, at the time that `strength` says. repaint (1, 1, H, W) bool: where it may change; the rest moves from its noise
    to the picture on its own straight path (Eq. 13), whose velocity is known.
    """
    s, B = settings, len(noise)
    times = flow.make_schedule(s.schedule, s.num_steps, s.timestep_shift)
    skipping = [t for i, t in enumerate(times.tolist()) if s.skip_start * s.num_steps < i < s.skip_end * s.num_steps]
    skips = lambda t: bool(s.skip_layers and skipping) and skipping[-1] <= t <= skipping[0]
    scale = lambda t: flow.guidance_at(t, s.guidance_scale, s.guidance_start, s.guidance_end) if negative else 1
    z = noise
    if latent is not None:
        times = times[int(s.num_steps - s.num_steps * s.strength + 1e-6):]         # 10 steps at .9 leave out one, rounding or not
        z = flow.interpolate(latent, noise, times[:1].to(noise).expand(B))
    visited = times.tolist()
    if s.solver == "rk4":                                                         # looks half-way as well
        visited += ((times[:-1].double() + times[1:].double()) / 2).tolist()
    visited = torch.tensor(visited).tolist()                                      # as the network will get them, in fp32
    both = [torch.cat([x, y.to(x).expand_as(x)]) for x, y in zip(given, negative or given)]
    guided = mmdit.prepare(*both, [t for t in visited if scale(t) != 1])
    alone = mmdit.prepare(*given, [t for t in visited if scale(t) == 1 or skips(t)])

    def velocity(z, t):
        now = float(t[0])
        if scale(now) == 1:
            v = cond = mmdit(z, t, alone).float()
        else:
            cond, uncond = mmdit(torch.cat([z, z]), torch.cat([t, t]), guided).float().chunk(2)
            v = flow.guide(cond, uncond, scale(now))
            if s.guidance_rescale:
                v = flow.rescale_guided(v, cond, s.guidance_rescale)
        if skips(now):
            v = flow.guide_skip_layers(v, cond, mmdit(z, t, alone, skip_layers=s.skip_layers).float(), s.skip_scale)
        return v if repaint is None else torch.where(repaint, v, flow.velocity_target(latent, noise))

    latents, lengths, steps = z, noise.new_zeros(B), flow.solver_steps(s.solver, velocity, z, times)
    for i, (z, v) in enumerate(tqdm(steps, total=len(times) - 1, disable=not progress, desc="sampling", leave=False)):
        latents, lengths = z, lengths + flow.path_length([v], times[i : i + 2])
    return latents, lengths


def picture_size(pipeline, settings: Settings) -> tuple[int, int, int]:
    """(C, H, W) of the latents; refuses sizes that the networks cannot have."""
    config, f = pipeline.mmdit.config, pipeline.vae.config.downsampling
    step, most = f * config.patch_size, f * config.patch_size * config.pos_embed_max_size
    height, width = settings.height, settings.width
    if height % step or width % step or min(height, width) < step or max(height, width) > most:
        raise ValueError(f"--height {height} --width {width}: both must be multiples of {step} px (VAE factor {f} x patch "
                         f"{config.patch_size}), and this model's grid of positions ends at {most}: at most {most}x{most} px.")
    if settings.tile % f:
        raise ValueError(f"--tile {settings.tile}: it must be a multiple of {f} px, say 512")
    if not set(settings.skip_layers) <= set(range(config.depth)):
        raise ValueError(f"skip_layers={settings.skip_layers}: this model's blocks are 0 to {config.depth - 1}")
    return config.latent_channels, height // f, width // f


def read_to_edit(pipeline, settings: Settings, image, mask):
    """image, mask: files -> (the image (3, height, width), its latent (1, C, H, W), changes (height, width) bool, repaint
    (1, 1, H, W) bool), of the picture's size. White in the mask may change: one white pixel frees its latent position."""
    fit = lambda file: resize_and_crop(read_image(file), settings.height, settings.width)
    original, changes, repaint = to_tensor(fit(image)), None, None
    latent = pipeline.use("vae", lambda vae: vae.encode(original[None].to(pipeline.device)).float())
    if mask is not None:
        changes = to_tensor(fit(mask)).mean(0) > 0
        repaint = F.max_pool2d(changes[None, None].float(), pipeline.vae.config.downsampling).bool().to(pipeline.device)
    return original, latent, changes, repaint


def generate(pipeline, prompts, seed: int = 0, height: int = 0, width: int = 0, batch_size: int = 8, progress: bool = False,
             image=None, mask=None, **settings) -> list[Image.Image]:
    """Pictures for prompts (one, or a list). settings: fields of Settings; what is not given comes from `pipeline.defaults`.

    image: a picture file to begin from (see strength). mask: a file, white where the image is to be painted anew; outside,
    the pixels stay, and with a strength of 1 what is inside comes from noise alone.
    Picture i starts from noise of its own, drawn on the CPU from seed + i: the same alone, in a batch and on any device.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    sizes = {name: size for name, size in (("height", height), ("width", width)) if size}
    settings = pipeline.settings(**settings, **sizes)
    shape = picture_size(pipeline, settings)
    if mask is not None and image is None:
        raise ValueError("a mask says which part of an image is painted anew; give the image as well")
    original = latent = changes = repaint = None
    if image is not None:
        original, latent, changes, repaint = read_to_edit(pipeline, settings, image, mask)
    parts = [range(start, min(start + batch_size, len(prompts))) for start in range(0, len(prompts), batch_size)]
    noise = lambda part: torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in part])
    texts = pipeline.use("text", lambda text: [encode(text, [prompts[i] for i in part], settings) for part in parts])
    latents = pipeline.use("mmdit", lambda mmdit: [
        sample_latents(mmdit, given, negative, noise(part).to(pipeline.device), settings, latent, repaint, progress)[0]
        for part, (given, negative) in zip(parts, texts)])
    few = max(1, 2**19 // (settings.height * settings.width))                     # pictures at a time: 8 of 256 x 256
    images = pipeline.use("vae", lambda vae: [
        image for part in latents for z in part.split(few) for image in vae.decode(z, settings.tile).float().cpu()])
    if changes is not None:
        images = [torch.where(changes, image, original) for image in images]
    return [from_tensor(image) for image in images]


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------

RECORD = "rectified-flow"                # the key of a PNG's text under which it says how it was made


def save_png(picture: Image.Image, file: Path, record: dict):
    """Write a PNG that carries how it was made, as JSON."""
    info = PngImagePlugin.PngInfo()
    info.add_text(RECORD, json.dumps(record))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, lambda partial: picture.save(partial, format="PNG", pnginfo=info))
    print(file)


def read_record(file) -> dict:
    """What `save_png` wrote into a PNG."""
    try:
        with Image.open(file) as picture:
            record = json.loads(picture.text[RECORD])
            return {"prompts": record["prompts"], "fingerprint": record["fingerprint"], **record}
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"--from-png {file}: not a PNG that sample.py wrote; give one that says how it was made") from None


def checked_file(file: str | Path | None, known: dict | None = None) -> dict | None:
    """{"file", "sha256"} of a picture that goes in. known: what a record says of it, which must still hold."""
    if known:
        file = known["file"]
    if file is None:
        return None
    try:
        found = {"file": str(Path(file).resolve()), "sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest()}
    except OSError as problem:
        raise ValueError(f"{file}: {problem.strerror}; give a picture file") from None
    if known and found["sha256"] != known["sha256"]:
        raise ValueError(f"{file} is not the picture that --from-png was made with; put that back, or give --image and --mask")
    return found


def field_comments(kind: type) -> dict[str, str]:
    """{field: the comment beside it} of a dataclass, which is also the help of its option."""
    comments = {}
    for line in inspect.getsource(kind).splitlines():
        if beside := re.match(r"    (\w+): .*?  # (.*)", line):
            name, comments[beside[1]] = beside[1], beside[2]
        elif comments and (further := re.match(r" {30,}# (.*)", line)):
            comments[name] += " " + further[1]
    return {name: comment.replace("%", "%%") for name, comment in comments.items()}


def parse_options():
    """The command line: the fields of Settings, and what is not about the picture."""
    parser = argparse.ArgumentParser(description="prompt -> image", allow_abbrev=False)
    parser.add_argument("--prompt", nargs="+", help="one or more prompts, each in quotes")
    parser.add_argument("--prompts-file", type=Path, help="a text file, one prompt a line")
    parser.add_argument("--from-png", type=Path, help="a PNG made here: the same again, with what else is given in its place")
    parser.add_argument("--image", help="a picture to begin from")
    parser.add_argument("--mask", help="a picture, white where --image is painted anew")
    parser.add_argument("--seed", type=int, help="of the first picture; default 0")
    comments = field_comments(Settings)
    for field in fields(Settings):
        kind, several = {tuple[str, ...]: (str, "*"), tuple[int, ...]: (int, "*")}.get(field.type, (field.type, None))
        flag = "--shift" if field.name == "timestep_shift" else "--" + field.name.replace("_", "-")
        parser.add_argument(flag, dest=field.name, type=kind, nargs=several,
                            help=f"{comments[field.name]}; default: the checkpoint's, else {field.default!r}")
    parser.add_argument("--checkpoint", help="run folder, model or diffusers folder, .safetensors file, or hub name")
    parser.add_argument("--tokenizers", help="folder with clip/ and t5/ tokenizers, if not beside the checkpoint")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu; auto: the first of them that is there")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), help="of matrix products; auto: bf16 where fast")
    parser.add_argument("--offload", action="store_true", help="networks wait in main memory, not on the disk")
    parser.add_argument("--batch-size", type=int, help="pictures at a time; default 8")
    parser.add_argument("--grid", action="store_true", help="one PNG with all pictures and their prompts")
    parser.add_argument("--out", type=Path, default=Path("out"), help="a folder, or a .png file for one picture or a grid")
    options = parser.parse_args()
    try:
        from_file = options.prompts_file.read_text(encoding="utf-8").splitlines() if options.prompts_file else []
    except (OSError, UnicodeDecodeError) as problem:
        parser.error(f"--prompts-file {options.prompts_file}: {problem}; give a UTF-8 text file, one prompt a line")
    if options.out.is_file() and options.out.suffix != ".png":
        parser.error(f"--out {options.out} is a file; give a folder or a name that ends in .png")
    options.prompts = (options.prompt or []) + [line.strip() for line in from_file if line.strip()]
    if not options.prompts and not options.from_png:
        parser.error('nothing to draw; give --prompt "a red circle" or --prompts-file FILE')
    if options.seed is not None and not 0 <= options.seed < 2**63:
        parser.error(f"--seed is {options.seed}; give a whole number from 0 to 2^63 - 1")
    if options.batch_size is not None and options.batch_size < 1:
        parser.error(f"--batch-size is {options.batch_size}; give 1 or more")
    return options


def make_record(options) -> dict:
    """What is to be drawn, as it will stand in the PNGs: from the command line, and of --from-png what that does not say."""
    settings = {field.name: value for field in fields(Settings) if (value := getattr(options, field.name)) is not None}
    old = read_record(options.from_png) if options.from_png else {}
    drawn = {"prompts": options.prompts, "index": None} if options.prompts else {key: old[key] for key in ("prompts", "index")}
    files = {name: checked_file(getattr(options, name), None if getattr(options, name) else old.get(name))
             for name in ("image", "mask")}
    given = {name: value for name in ("seed", "batch_size", "checkpoint", "tokenizers", "precision")
             if (value := getattr(options, name)) is not None}
    given |= {"grid": True} if options.grid else {}
    default = {"seed": 0, "batch_size": 8, "checkpoint": str(SHIPPED), "tokenizers": None, "precision": "auto", "grid": False}
    kept = {name: old[name] for name in default if name in old}
    return {**drawn, **default, **kept, **given, **files, "settings": old.get("settings", {}) | settings}


def main():
    """Prompts from the command line to PNG files."""
    options = parse_options()
    record = make_record(options)
    pipeline = load(record["checkpoint"], options.device, record["precision"], record["tokenizers"],
                    "offload" if options.offload else "one")
    if options.from_png and not options.checkpoint and read_record(options.from_png)["fingerprint"] != pipeline.fingerprint:
        raise CheckpointError(f"{pipeline.checkpoint} is not the file that --from-png {options.from_png} was made with (its "
                              f"fingerprint is {pipeline.fingerprint}); put that back, or name one with --checkpoint")
    prompts, size, seed = record["prompts"], record["batch_size"], record["seed"]
    files = {name: record[name]["file"] for name in ("image", "mask") if record[name]}
    pictures = generate(pipeline, prompts, seed, batch_size=size, progress=True, **files, **record["settings"])
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    record |= {"checkpoint": pipeline.checkpoint, "fingerprint": pipeline.fingerprint, "device": str(pipeline.device),
               "precision": names[pipeline.precision], "settings": asdict(pipeline.settings(**record["settings"]))}
    single = options.out.suffix == ".png"
    folder = options.out.with_suffix("") if single else options.out
    if record["grid"]:
        grid = captioned_grid(pictures, prompts, min(4, len(pictures)))
        save_png(grid, options.out if single else folder / "grid.png", record)
        return
    wanted = range(len(prompts)) if record["index"] is None else [record["index"]]
    for i in wanted:                                       # a picture is repeated to the bit among the others of its batch
        name = "".join(c if c.isalnum() else "-" for c in prompts[i])[:60].strip("-") or "picture"
        first = i // size * size
        its = {"prompt": prompts[i], "prompts": prompts[first : first + size], "index": i - first, "seed": seed + first}
        save_png(pictures[i], options.out if single and len(wanted) == 1 else folder / f"{name}-{seed + i}.png", record | its)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as problem:                        # CheckpointError, no memory, a full disk
        sys.exit(f"sample.py: {problem}")
