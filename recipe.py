"""recipe.py: the settings of sample.py, and the PNG that stores them.

Read with   App. B.3 for steps, guidance and the unconditional side; Eq. 23 for the shift
Not here    what the settings do (sample.py, flow.py), how options are checked (options.py)
Files       A PNG carries its Recipe as JSON. Anybody may have made it, so a Recipe holds numbers
            and texts within bounds, and names no file, no device and nothing on the network.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image, PngImagePlugin
from tqdm import tqdm

from checkpoints import SHIPPED
from devices import PRECISIONS
from flow import SCHEDULES, SOLVERS
from options import check_options, option, write_atomically
from text_encoders import ENCODERS


@dataclass(frozen=True)
class Settings:
    """How noise and a prompt become a picture. The defaults are those of the released SD3."""
    num_steps: int = option(28, "steps of the solver", 1, 1000)
    guidance_scale: float = option(5.0, "classifier-free guidance; 1: off", 0, 100)
    timestep_shift: float = option(3.0, "alpha of Eq. 23; 1: no shift", 0.01, 100)
    schedule: str = option("released", "times of the steps", choices=tuple(SCHEDULES))
    solver: str = option("euler", "the paper has euler", choices=tuple(SOLVERS))
    unconditional: str = option("empty", "what no text is (App. B.3)", choices=("zeros", "empty"))
    negative_prompt: str = option("", "guidance leads away from this text")
    without: tuple[str, ...] = option((), "encoders to leave out", choices=ENCODERS)
    height: int = option(1024, "height of the picture in px", 16, 16384)
    width: int = option(1024, "width of the picture in px", 16, 16384)
    strength: float = option(0.6, "with --image: 0 keeps it, 1 keeps nothing", 0, 1)
    skip_layers: tuple[int, ...] = option((), "blocks for skip-layer guidance; none: off", 0)

    __post_init__ = check_options

    @property
    def first_step(self):
        """The first step from an image: of ten steps at strength .9, number 0 is left out."""
        return int(self.num_steps * (1 - self.strength) + 1e-6)


@dataclass(frozen=True)
class Recipe(Settings):
    """What a PNG stores: its settings, and what they were used for."""
    prompt: tuple[str, ...] = option((), "one or more texts, each in quotes")
    seed: int = option(0, "seed of the first picture", 0, 2**63 - 1)
    precision: str = option("auto", "of matrix products", choices=("auto", *PRECISIONS))
    t5_length: int = option(0, "tokens of T5; 0: the model's own", 0, 2048)
    grid: bool = option(False, "one more PNG with all pictures and their prompts, enlarged")
    enlarge: int = option(1, "px that each px of a picture becomes", 1, 32)
    made_from: str = option("", "hash of the files it was drawn from; others are refused")


@dataclass(frozen=True)
class Options(Recipe):
    """What the command line takes besides: files and a device."""
    image: str = option("", "a picture to begin from")
    mask: str = option("", "a picture, white where --image is painted anew")
    prompts_file: str = option("", "a text file with one prompt a line")
    from_png: str = option("", "a PNG made here: draw it again (with its --image, --vae, ...)")
    checkpoint: str = option(str(SHIPPED), "run or model folder, .safetensors file, or hub name")
    tokenizers: str = option("", "folder with clip/ and t5/, if not beside the checkpoint")
    text_encoders: tuple[str, ...] = option((), "files of text encoders, if not in the checkpoint")
    vae: str = option("", "file of the VAE, if not in the checkpoint")
    device: str = option("auto", "auto, cuda, mps or cpu")
    out: str = option("out", "a folder; or, for one picture, NAME.png")


def save_png(picture, file, record):
    """Writes a PNG that carries {field of Recipe: value}."""
    info = PngImagePlugin.PngInfo()
    info.add_text("rectified-flow", json.dumps(record))
    write_atomically(file, partial(picture.save, format="PNG", pnginfo=info))
    tqdm.write(str(file))                                    # beside the bar


def read_record(file):
    """{field of Recipe: value} of a PNG. ValueError for everything else that it may hold."""
    try:
        if not Path(file).is_file():
            raise ValueError("no such file")
        with Image.open(file, formats=["PNG"]) as picture:
            if "rectified-flow" not in picture.info:
                raise ValueError("it holds no settings")
            record = json.loads(picture.info["rectified-flow"])
        Recipe(**record)
        return record
    except Exception as problem:        # whatever a decoder raises
        raise ValueError(f"--from-png {file}: not a PNG that sample.py wrote ({problem})") from None
