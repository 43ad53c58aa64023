"""data.py: pictures, captions, encoded shards, batches (SD3, arXiv:2403.03206v1, App. E.1).

Read with   App. E.1 (resize, crop at the centre, encode once), Sec. 5.3.2 (batches of one size)
Not here    the networks (vae.py, text_encoders.py), the making of shards (encode.py)
Shapes      B batch   C latent channels   H W latent height, width   L CLIP tokens   L' T5 tokens
            Pictures are uint8 RGB (height, width, 3); tensors are (3, height, width) in [-1, 1].
Run         python encode.py --data PATH --out DIR     counts the pictures that cannot be used
"""

import copy
import hashlib
import io
import json
import math
import os
import re
import signal
import tarfile
import warnings
from bisect import bisect
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import ContainerIO, Image, ImageOps
from safetensors import safe_open
from torch.utils.data import DataLoader

from options import MAX_TEXT, read_lines
from text_encoders import combine, drop_encoders
from vae import normalize, sample_code

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")          # Pillow tries no other decoder.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_BYTES = 2**30                                        # of a picture
# What helps against a damaged file of an encoded folder.
MEND = "delete it, if it is there, and encode again: by encode.py, or by train.py for its own cache"
warnings.filterwarnings("ignore", module=r"PIL\.")       # of large pictures and odd EXIF blocks

# ---- One picture ---------------------------------------------------------------------------------

@dataclass(frozen=True)
class Part:
    """A file, or `size` bytes of one from `offset`. A picture's Part also holds its captions."""
    name: str                       # shard.tar/000001.jpg, or the path in the folder
    path: Path
    offset: int = 0
    size: int = MAX_BYTES
    captions: tuple[str, ...] = ()

    def open(self):
        """The part as a file of its own, so that threads do not share a position."""
        if self.path.exists() and not self.path.is_file():
            raise ValueError("it is a folder, a pipe or a device")
        return ContainerIO.ContainerIO(open(self.path, "rb"), self.offset, self.size)

    def read(self, at_most=MAX_BYTES):
        with self.open() as file:
            return file.read(at_most)


def read_image(source, background="white"):
    """A picture (a path or a Part) as upright RGB, 8 bits. ValueError says "name: reason"."""
    if not isinstance(source, Part):
        source = Part(str(source), Path(source).expanduser())
    try:
        content = source.read()
        image = Image.open(io.BytesIO(content), formats=FORMATS)
        image.load()
        with suppress(Exception):                       # A broken EXIF block does not matter here.
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):                  # Pillow alone would clip 16-bit gray.
            gray = np.asarray(image) / 257              # 65535 becomes 255
            image = Image.fromarray(gray.round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            behind = Image.new("RGBA", image.size, background)
            image = Image.alpha_composite(behind, image)
        return image.convert("RGB")
    except Image.UnidentifiedImageError:
        reason = f"not a {', '.join(FORMATS)} file, it begins with {content[:12]}"
    except Exception as error:                          # Decoders raise errors of many types.
        reason = getattr(error, "strerror", None) or f"cannot be decoded ({error}); fetch it again"
    raise ValueError(f"{source.name}: {reason}")


def resize_and_crop(image, height, width):
    """Scale until (height, width) is just covered, aspect kept; cut out the centre (App. E.1)."""
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def to_tensor(image):
    """RGB picture or uint8 array (height, width, 3) -> (3, height, width) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return (pixels / 127.5 - 1).permute(2, 0, 1).contiguous()


def from_tensor(image):
    """(3, height, width) in [-1, 1] -> RGB picture: the inverse of to_tensor, clamped, rounded."""
    pixels = (image.detach().cpu().float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(pixels.round().byte().permute(1, 2, 0).numpy())


def aspect_buckets(resolution):
    """Sizes (height, width) in px of about resolution^2 px, from 1:4 to 4:1 (Sec. 5.3.2)."""
    step = 64 if resolution >= 512 else 16
    sizes = [(resolution, resolution)]
    for short in range(step, resolution, step):
        long = round(resolution**2 / short / step) * step
        if short < long <= 4 * short:
            sizes += [(short, long), (long, short)]
    return sizes


def nearest_bucket(height, width, buckets):
    """The bucket of the nearest aspect ratio, by its logarithm: 2:1 and 1:2 are as far from 1:1."""
    aspect = math.log(height / width)
    distances = [abs(math.log(h / w) - aspect) for h, w in buckets]
    return buckets[distances.index(min(distances))]


# ---- Captioned pictures, in a folder, tar files or a table: nothing is unpacked ------------------

def clean_captions(found):
    """Captions without blank ones, white space collapsed. found: a text, a list, a JSON object."""
    if isinstance(found, dict):
        found = found.get("captions") or found.get("text") or found.get("caption") or []
    if not isinstance(found, list):
        found = [found]
    kept = []
    for text in found:
        if not isinstance(text, str) or re.search("[\0\ud800-\udfff]", text):    # wrong bytes
            raise ValueError(f"the caption {text!r:.50} is not text in UTF-8; save it again")
        if text.strip():
            kept.append(" ".join(text.split()))
    return tuple(kept)


class ImageFiles:
    """Captioned pictures in a folder, in tar files or named by a .jsonl file. `problems` says what
    cannot be used, `found` counts all samples. scenes.Scenes has the same methods."""
    def __init__(self, path):
        self.path = Path(path).expanduser()
        self.records, self.problems = [], []
        files = {}                                      # {name: Part}
        table = self.path if self.path.suffix == ".jsonl" else self.path / "metadata.jsonl"
        if table.is_file() and not any(map(Path.is_file, self.path.glob("*.tar"))):
            self.read_table(table)
        elif self.path.is_file():
            self.list_tar(self.path.name, self.path, files)
        else:
            self.list_folder(files)
        self.pair_up(files)
        self.found = len(self.records) + len(self.problems)
        if not self.records:
            names = "\n  ".join(["", *self.problems[:10]])
            raise ValueError(f"{path} does not exist or holds no picture; give a folder with tar "
                             f"shards, metadata.jsonl, or pictures with .txt captions{names}")

    def list_folder(self, files):
        """Add every file at any depth. Linked folders are entered, no folder twice: circles end."""
        entered = set()
        for folder, subfolders, names in os.walk(self.path, followlinks=True):
            if os.path.realpath(folder) in entered:
                subfolders.clear()
                continue
            entered.add(os.path.realpath(folder))
            subfolders.sort()
            for name in sorted(names):
                path = Path(folder, name)
                name = path.relative_to(self.path).as_posix()
                if not path.is_file():
                    self.problems.append(f"{name}: a pipe, a device or a link to nothing")
                elif path.suffix == ".tar":
                    self.list_tar(name, path, files)
                else:
                    files[name] = Part(name, path)

    def list_tar(self, name, path, files):
        """Add the files of one WebDataset shard, an uncompressed tar."""
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    inner = member.name.removeprefix("./")      # which `tar cf x.tar .` writes
                    part = Part(f"{name}/{inner}", path, member.offset_data, member.size)
                    if part.name in files:
                        self.problems.append(f"{part.name}: a second file of this name")
                    elif member.isreg() and tar.offset <= path.stat().st_size:    # not cut off
                        files[part.name] = part
            # tarfile reads an unreadable header as the end. A real end is all zeros.
            if any(Part(name, path, tar.offset).read(2 * tarfile.RECORDSIZE)):
                raise ValueError(f"nothing to read at byte {tar.offset}")
        except Exception as error:
            self.problems.append(f"{name}: damaged or not an uncompressed tar ({error})")

    def pair_up(self, files):
        """Join files that share a name up to the suffix: cat.jpg with cat.json, or with cat.txt."""
        for name, picture in files.items():
            key, suffix = os.path.splitext(name)
            if suffix.lower() not in SUFFIXES or "/." in f"/{name}":  # hidden, as ._cat.jpg
                continue
            captions = ()
            blamed = name
            try:
                for text in (key + ".json", key + ".txt"):
                    if text in files and not captions:
                        blamed = text
                        content = files[text].read(MAX_TEXT)
                        if len(content) == MAX_TEXT:    # It would be cut.
                            raise ValueError(f"it has {MAX_TEXT} bytes or more")
                        content = content.decode("utf-8-sig")
                        if text.endswith(".json"):
                            content = json.loads(content)
                        captions = clean_captions(content)
                if not captions:
                    raise ValueError("there is no caption")
                self.records.append(replace(picture, captions=captions))
            except Exception as error:
                self.problems.append(f"{blamed}: {error}")

    def read_table(self, table):
        """A picture a line: file_name, below the table's folder, and text, caption or captions."""
        for number, line in enumerate(read_lines(table, "surrogateescape"), 1):
            if not line:
                continue
            try:
                row = json.loads(line)
                name = Path(row["file_name"])
                path = table.parent / name
                captions = clean_captions(row)
                if name.is_absolute() or ".." in name.parts or not path.is_file():
                    raise ValueError(f"no file {name} is below the folder of the table")
                if not captions:
                    raise ValueError("there is no caption")
                self.records.append(Part(name.as_posix(), path, captions=captions))
            except Exception as error:
                self.problems.append(
                    f'{table.name} line {number} needs a "file_name" and a "text" ({error})')

    def __len__(self):
        return len(self.records)

    def captions(self, index):
        return self.records[index].captions

    def image(self, index, height, width):
        """uint8 (height, width, 3), scaled and centre-cropped. ValueError as from read_image."""
        return np.array(resize_and_crop(read_image(self.records[index]), height, width))

    def picture_size(self, index):
        """(height, width) of the upright picture, from its header; (1, 1) if that is broken. Only
        EXIF's orientation in the header counts; with any other, a crop cuts off more."""
        with suppress(Exception), self.records[index].open() as file:
            image = Image.open(file, formats=FORMATS)
            exif = image.getexif() if "exif" in image.info else {}
            if exif.get(0x0112) in (5, 6, 7, 8):        # It is stored lying on its side.
                return image.size                       # (width, height), so exchanged
            return image.height, image.width
        return 1, 1


def check_problems(problems, total):
    """ValueError if more than one per cent of `total` samples cannot be used."""
    if len(problems) > total / 100:
        names = "\n  ".join(problems[:10])
        raise ValueError(f"{len(problems)} of {total} samples cannot be used, over 1 %. "
                         f"Mend or remove them:\n  {names}")


def readable(source, wanted):
    """Yield (uint8 (height, width, 3), captions) for each of `wanted`, (index, height, width) each.
    A picture that cannot be read is left out, and `source.problems` says why."""
    check_problems(source.problems, source.found)
    wanted = iter(wanted)
    with ThreadPoolExecutor(8) as threads:              # Decoders let other threads run.
        while part := list(islice(wanted, 64)):
            pictures = [threads.submit(source.image, *sample) for sample in part]
            for (index, _, _), picture in zip(part, pictures):
                try:
                    yield picture.result(), source.captions(index)
                except ValueError as error:
                    source.problems.append(str(error))
                    check_problems(source.problems, source.found)


# ---- Encoded shards (App. E.1) -------------------------------------------------------------------

def shard_hash(tensors, captions):
    """SHA-256 of all that is in a shard."""
    found = hashlib.sha256(json.dumps(captions).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        found.update(tensor.numpy())
    return found.hexdigest()


class EncodedFolder:
    """The shards of a folder that encode.py made with these `encoders`, a fingerprint ("": any).
    `groups` has the sample numbers of each picture size. ValueError names damage and its mend."""
    def __init__(self, folder, encoders=""):
        self.files = []
        self.starts = [0]                               # first sample of each shard; last: the sum
        self.opened = {}                                # {number of a shard: its tensors}
        file = Path(folder).expanduser() / "index.json"
        groups = {}
        try:
            self.index = json.loads(file.read_text())
            self.resolution = self.index["resolution"]
            made_with = self.index["encoders"]
            others = encoders not in ("", made_with["fingerprint"])
            for line in self.index["shards"]:
                if line["count"] < 1:
                    raise ValueError(f"{line['file']} has {line['count']} pictures")
                self.files.append(file.parent / line["file"])
                self.starts.append(self.starts[-1] + line["count"])
                group = groups.setdefault((line["height"], line["width"]), [])
                group.append(np.arange(self.starts[-2], self.starts[-1]))
            self.longest_side = max(max(size) for size in groups)
            self.sizes = [f"{height}x{width}" for height, width in groups]       # px
        except Exception as problem:
            raise ValueError(f"{file} is missing or damaged ({problem}); {MEND}") from None
        self.groups = [np.concatenate(parts) for parts in groups.values()]
        if others:
            raise ValueError(f"{folder} needs --encoders {made_with['path']}, or encode it again")

    def __len__(self):
        return sum(map(len, self.groups))

    def find(self, index):
        """The tensors of a sample's shard (encode.encode_shard), and the sample's place in them."""
        number = bisect(self.starts, index) - 1
        if number not in self.opened:
            count = self.index["shards"][number]["count"]
            self.opened[number] = self.open(self.files[number], count)
        return self.opened[number], index - self.starts[number]

    def open(self, file, count):
        """Views of a mapped shard, once its bytes are known to be those that were written."""
        try:
            with safe_open(file, "pt") as opened:
                shard = {name: opened.get_tensor(name) for name in opened.keys()}
                about = json.loads(opened.metadata()["shard"])
            if shard_hash(shard, about["captions"]) != about["hash"]:
                raise ValueError("its bytes are not those that were written")
            if len(shard["moments"]) != count:
                raise ValueError(f"index.json counts {count} pictures in it")
        except Exception as problem:
            raise ValueError(f"{file} is damaged ({problem}); {MEND}") from None
        shard["captions"] = about["captions"]
        return shard

    def caption_rows(self, index):
        """The rows of a sample's captions in the tensors of its shard."""
        shard, i = self.find(index)
        start, end = shard["caption_start"][i : i + 2]
        return shard["caption_row"][start:end].tolist()

    def captions(self, index):
        shard, _ = self.find(index)
        return tuple(shard["captions"][row] for row in self.caption_rows(index))

    def read(self, indices, rows):
        """{name: (B, ...)} of samples of one size, with the texts in these rows of their shards."""
        places = [self.find(index) for index in indices]
        tensors = {"moments": torch.stack([shard["moments"][i] for shard, i in places])}
        for name in ("clip_l", "clip_g", "t5", "pooled_l", "pooled_g"):
            texts = [shard[name][row] for (shard, _), row in zip(places, rows)]
            tensors[name] = torch.stack(texts)
        return tensors

    def split(self, count):
        """(all others, the first `count` samples or all). Each size gives its share to both."""
        rest, first = copy.copy(self), copy.copy(self)
        rest.groups, first.groups = [], []
        ends = np.cumsum([0, *map(len, self.groups)])
        count = min(count, len(self))
        shares = np.diff(ends * count // len(self))     # They add up to count.
        for group, share in zip(self.groups, shares):
            if share > 0:
                first.groups.append(group[:share])
            if share < len(group):
                rest.groups.append(group[share:])
        return rest, first


# ---- Batches (Sec. 5.3.2, App. B.3) --------------------------------------------------------------

@dataclass
class Batch:
    """This process's share of one step, on its device."""
    latent: torch.Tensor        # (B, C, H, W) clean, drawn from the VAE's Gaussian
    context: torch.Tensor       # (B, L + L', context_dim)
    pooled: torch.Tensor        # (B, pooled_dim)
    noise: torch.Tensor         # (B, C, H, W)
    uniform: torch.Tensor       # (B,) in (0, 1), on the CPU: becomes t by the density's quantile

    def split(self, parts):
        """Equal parts, one after the other."""
        pieces = [tensor.chunk(parts) for tensor in vars(self).values()]
        return [Batch(*piece) for piece in zip(*pieces)]


class Ahead:
    """make(step) for one step after the other. With `workers`, that many processes make the values
    of the next steps in advance. They are copies of this process, so make must not touch a GPU."""
    def __init__(self, make, workers):
        self.make, self.workers = make, workers
        self.step = None                                # the next one of the workers

    def __getitem__(self, step):
        try:
            return self.make(step)
        except ValueError as problem:                   # It crosses over as a value, in one piece.
            return problem

    def __call__(self, step):
        if self.workers == 0:
            return self.make(step)
        if step != self.step:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")    # else it warns of copies
            self.values = iter(DataLoader(
                self, batch_size=None, sampler=range(step, 2**31), num_workers=self.workers,
                pin_memory=torch.cuda.is_available(), worker_init_fn=outlive_ctrl_c,
                multiprocessing_context="fork"))
        self.step = step + 1
        value = next(self.values)
        if isinstance(value, ValueError):
            raise value
        return value


def outlive_ctrl_c(worker):
    """Ctrl-C reaches all processes. This one goes on while the main one ends its step and saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Batches:
    """batches(step) is this process's share of a batch. Every draw is keyed by (seed, step, index
    in the whole batch), so there is no state. config: train.TrainConfig. world: devices.World."""
    def __init__(self, folder, vae_config, text_config, config, world):
        self.folder, self.config, self.world = folder, config, world
        self.vae_config, self.text_config = vae_config, text_config
        self.ahead = Ahead(self.make, world.workers)
        self.epochs = {}
        self.per_epoch = len(self.epoch(0))

    def epoch(self, number):
        """The batches of an epoch, (B,) sample numbers each. Fewer than B pictures repeat."""
        if number not in self.epochs:
            rng = np.random.default_rng((self.config.seed, 1, number))
            batches = []
            for group in self.folder.groups:
                count = max(1, len(group) // self.config.batch_size)
                batches.extend(np.resize(rng.permutation(group), (count, self.config.batch_size)))
            order = rng.permutation(len(batches))
            self.epochs = {number: [batches[i] for i in order]}
        return self.epochs[number]

    def indices(self, step):
        """The sample numbers of this process's share of a step."""
        epoch, place = divmod(step, self.per_epoch)
        share = self.config.batch_size // self.world.size
        first = self.world.rank * share
        return self.epoch(epoch)[place][first : first + share].tolist()

    def make(self, step):
        """What the CPU does for a step: (samples as `inputs` wants them, draws, noise)."""
        indices = self.indices(step)
        shard, _ = self.folder.find(indices[0])
        draws, noise = self.draw(step, shard["moments"].shape[1:])
        rows = []
        for index, draw in zip(indices, draws):
            captions = self.folder.caption_rows(index)
            rows.append(pick_caption(captions, draw[1], self.config.full_captions))
        return self.folder.read(indices, rows), draws, noise

    def draw(self, step, shape):
        """(B, 5) numbers in [0, 1) for t, caption, three encoders; noise (B, *shape)."""
        share = self.config.batch_size // self.world.size
        draws, noise = [], []
        for number in range(self.world.rank * share, (self.world.rank + 1) * share):
            rng = np.random.default_rng((self.config.seed, 2, step, number))
            draws.append(rng.random(5))
            noise.append(rng.standard_normal(shape, np.float32))
        return torch.from_numpy(np.stack(draws)), torch.from_numpy(np.stack(noise))

    def __call__(self, step):
        """The Batch of a step: samples, one caption each, noise, dropped encoders."""
        stored, draws, noise = self.ahead(step)
        noise, code_noise = noise.to(self.world.device).chunk(2, dim=1)       # (B, C, H, W) each
        latent, context, pooled = self.inputs(stored, code_noise)
        draws = draws.float()
        keep = (draws[:, 2:] >= self.config.encoder_dropout).to(self.world.device)     # (B, 3)
        context, pooled = drop_encoders(context, pooled, keep, self.text_config)
        return Batch(latent, context, pooled, noise, draws[:, 0].clamp(1e-6, 1 - 1e-6))

    def inputs(self, stored, code_noise=None):
        """What `read` gives -> latent, context, pooled in fp32, on the device."""
        tensors = {name: part.to(self.world.device).float() for name, part in stored.items()}
        mean, logvar = tensors.pop("moments").chunk(2, dim=1)         # (B, C, H, W) each
        code = sample_code(mean, logvar, code_noise)
        context, pooled = combine(**tensors)
        return normalize(code, self.vae_config), context, pooled

    def validation(self, count):
        """Yield (latent, context, pooled, noise) of `count` samples in batches of one size, no
        larger than those of training, which fit into memory."""
        _, chosen = self.folder.split(count)
        together = self.config.batch_size // self.world.size // self.config.accumulate
        for group in chosen.groups:
            rng = torch.Generator().manual_seed(self.config.seed)
            for start in range(0, len(group), together):
                part = group[start : start + together]
                rows = [self.folder.caption_rows(index)[-1] for index in part]
                latent, context, pooled = self.inputs(self.folder.read(part, rows))
                yield latent, context, pooled, torch.randn(latent.shape, generator=rng).to(latent)


def pick_caption(captions, draw, full_share):
    """(short, full): full with chance `full_share` (Sec. 5.2.2). Else each is equally likely."""
    if len(captions) == 2:
        return captions[int(draw < full_share)]
    return captions[int(draw * len(captions))]
