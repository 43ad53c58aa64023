"""data.py: pictures, captions, encoded shards, batches (SD3, arXiv:2403.03206v1, App. E.1).

Read with   App. E.1 (resize, crop at the centre, encode once), Sec. 5.3.2 (batches of one size)
Not here    the networks (vae.py, text_encoders.py), the making of shards (encode.py)
Shapes      B batch   C latent channels   H W latent height, width   L CLIP tokens   L' T5 tokens
            Pictures are uint8 RGB (height, width, 3); tensors are (3, height, width) in [-1, 1].
Run         python data.py PATH     shows your pictures and names every file that cannot be used
"""

import argparse
import copy
import hashlib
import io
import json
import math
import os
import re
import sys
import tarfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open

from text_encoders import combine, drop_encoders
from vae import normalize, sample_code

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")          # No other decoder sees a foreign file.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_PIXELS, MAX_BYTES = 2**27, 2**30                     # of a picture, by the header; of its file
MAX_TEXT = 2**20                                         # the longest line or caption file
PROBLEMS = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
warnings.filterwarnings("ignore", module=r"PIL\.")       # of large pictures and odd EXIF blocks

# ---- One picture ---------------------------------------------------------------------------------

@dataclass(frozen=True)
class Part:
    """A file, or `size` bytes of one from `offset`. That of a picture holds its captions."""
    name: str                       # shard.tar/000001.jpg, or the path in the folder
    path: Path
    offset: int = 0
    size: int = MAX_BYTES
    captions: tuple[str, ...] = ()

    def read(self, at_most: int = MAX_BYTES) -> bytes:
        """The first bytes. Every call opens the file, so threads do not share a position."""
        if self.path.exists() and not self.path.is_file():
            raise ValueError("it is a folder, a pipe or a device")
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(min(self.size, at_most))


def read_image(source, background="white") -> Image.Image:
    """A picture (a path or a Part) as upright RGB, 8 bits. ValueError says "name: reason"."""
    if not isinstance(source, Part):
        source = Part(str(source), Path(source).expanduser())
    try:
        content = source.read()
        image = Image.open(io.BytesIO(content), formats=FORMATS)      # reads the header only
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS} pixels")
        image.load()
        with suppress(Exception):                       # A broken EXIF block does not matter here.
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):                  # Pillow alone would clip 16-bit gray.
            gray = np.asarray(image) / 257              # 65535 becomes 255
            image = Image.fromarray(gray.round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
        return image.convert("RGB")
    except Image.UnidentifiedImageError:
        reason = f"not a {', '.join(FORMATS)} file, it begins with {content[:12]}"
    except Exception as error:                          # Decoders raise errors of many types.
        reason = getattr(error, "strerror", None) or f"cannot be decoded ({error}); fetch it again"
    raise ValueError(f"{source.name}: {reason}")


def resize_and_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale until (height, width) is just covered, aspect kept; cut out the centre (App. E.1)."""
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def to_tensor(image) -> torch.Tensor:
    """RGB picture or uint8 array (height, width, 3) -> (3, height, width) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.float32))
    return (pixels / 127.5 - 1).permute(2, 0, 1).contiguous()


def from_tensor(image: torch.Tensor) -> Image.Image:
    """(3, height, width) in [-1, 1] -> RGB picture: the inverse of to_tensor, clamped, rounded."""
    pixels = (image.detach().float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(pixels.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def aspect_buckets(resolution: int, step: int = 0) -> list[tuple[int, int]]:
    """Sizes (height, width) in px of about resolution^2 px, from 1:4 to 4:1 (Sec. 5.3.2)."""
    step = step or (64 if resolution >= 512 else 16)
    sizes = {(resolution, resolution)}
    for short in range(step, resolution, step):
        long = round(resolution**2 / short / step) * step
        if short < long <= 4 * short:
            sizes.update([(short, long), (long, short)])
    return sorted(sizes, key=lambda size: size[0] / size[1])


def nearest_bucket(height: int, width: int, buckets: list[tuple[int, int]]) -> tuple[int, int]:
    """The bucket of the nearest aspect ratio, by its logarithm: 2:1 and 1:2 are as far from 1:1."""
    return min(buckets, key=lambda size: abs(math.log(size[0] / size[1] * width / height)))


# ---- Captioned pictures, in files of any layout: nothing is unpacked or written ------------------

def read_lines(path, errors="strict") -> list[str]:
    """The lines of a UTF-8 file, split at newlines only. "surrogateescape" keeps wrong bytes."""
    lines, path = [], Path(path).expanduser()
    try:
        with open(path, encoding="utf-8-sig", errors=errors, newline="\n") as file:
            while line := file.readline(MAX_TEXT):
                if len(line) == MAX_TEXT:
                    raise ValueError(f"{path} line {len(lines) + 1} has over {MAX_TEXT} characters")
                lines.append(line.rstrip("\r\n"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8; save it again as UTF-8") from None
    return lines


def clean_captions(found) -> tuple[str, ...]:
    """Captions without blank ones, white space collapsed. found: a text, a list, a JSON object."""
    if isinstance(found, dict):
        found = found.get("captions") or found.get("text") or found.get("caption") or []
    kept = []
    for text in found if isinstance(found, list) else [found]:
        if not isinstance(text, str) or re.search("[\0\ud800-\udfff]", text):    # wrong bytes
            raise ValueError(f"the caption {text!r:.50} is not text in UTF-8; save it again")
        if text.strip():
            kept.append(" ".join(text.split()))
    return tuple(kept)


class ImageFiles:
    """Captioned pictures in a folder, in tar files or named by a .jsonl file. `problems` says what
    cannot be used, `found` counts all samples. scenes.Scenes has the same methods."""

    def __init__(self, path):
        self.path, self.problems, self.records, files = Path(path).expanduser(), [], [], {}
        table = self.path if self.path.suffix == ".jsonl" else self.path / "metadata.jsonl"
        tars = [self.path, *sorted(self.path.glob("*.tar"))]
        tars = [file for file in tars if file.suffix == ".tar" and not file.is_dir()]
        for tar in tars:
            self.list_tar(tar, files)
        if table.is_file() and not tars:
            self.read_table(table)
        elif not tars:
            self.list_folder(files)
        self.pair_up(files)
        self.found = len(self.records) + len(self.problems)
        if not self.records:
            expected = "a folder with tar shards, metadata.jsonl, or pictures with .txt captions"
            names = "\n  ".join(["", *self.problems[:10]])
            raise ValueError(f"{path} does not exist or holds no picture; give {expected}{names}")

    def list_folder(self, files: dict):
        """Add every file at any depth to `files` {name: Part}. Linked folders are not entered."""
        for file in sorted(self.path.rglob("*")):
            name = file.relative_to(self.path).as_posix()
            if file.is_file():
                files[name] = Part(name, file, 0, file.stat().st_size)
            elif file.is_symlink() or not file.is_dir():
                self.problems.append(f"{name}: a pipe, or a link to a folder or to nothing")

    def list_tar(self, path: Path, files: dict):
        """Add the files of one WebDataset shard, an uncompressed tar."""
        try:
            size = len(Part("", path).read(1)) and path.stat().st_size
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    part = Part(f"{path.name}/{member.name}", path, member.offset_data, member.size)
                    if part.name in files:
                        self.problems.append(f"{part.name}: a second file of this name")
                    elif member.isreg() and tar.offset <= size:       # the next header's place
                        files[part.name] = part
            # tarfile takes a header that it cannot read for the end. A real end is all zeros.
            if any(Part("", path, tar.offset).read(2 * tarfile.RECORDSIZE)):
                raise ValueError(f"nothing to read at byte {tar.offset} of {size}")
        except (tarfile.TarError, OSError, ValueError) as error:
            self.problems.append(f"{path.name}: damaged or not an uncompressed tar ({error})")

    def pair_up(self, files: dict):
        """Join files that share a name up to the suffix: cat.jpg with cat.json, or with cat.txt."""
        for name, picture in files.items():
            key, suffix = os.path.splitext(name)
            if "/." in f"/{name}" or suffix.lower() not in SUFFIXES:  # hidden, as ._cat.jpg
                continue
            captions = ()
            try:
                for text in (files.get(key + ".json"), files.get(key + ".txt")):
                    if text and not captions:
                        name = text.name
                        content = text.read(MAX_TEXT).decode("utf-8-sig", "surrogateescape")
                        if name.endswith(".json"):
                            content = json.loads(content)
                        captions = clean_captions(content)
                if not captions:
                    raise ValueError("there is no caption")
                self.records.append(replace(picture, captions=captions))
            except PROBLEMS as error:
                self.problems.append(f"{name}: {error}")

    def read_table(self, table: Path):
        """A picture a line: file_name in the table's folder, and text, caption or captions."""
        folder = Path(os.path.abspath(table.parent))
        for number, line in enumerate(read_lines(table, "surrogateescape"), 1):
            try:
                if line:
                    row = json.loads(line)
                    file = Path(os.path.abspath(folder / row["file_name"]))
                    name = file.relative_to(folder).as_posix()
                    captions = clean_captions(row)
                    if not captions:
                        raise ValueError("there is no caption")
                    self.records.append(Part(name, file, 0, file.stat().st_size, captions))
            except PROBLEMS as error:
                self.problems.append(
                    f'{table.name} line {number} needs a "file_name" and a "text" ({error})')

    def add_captions(self, path):
        """Join a synthetic caption from JSONL to every picture's first one (Sec. 5.2.2)."""
        added = {}
        for number, line in enumerate(read_lines(path), 1):
            try:
                entry = json.loads(line)
                added[entry["file_name"]] = clean_captions(entry)[0]
            except PROBLEMS:
                raise ValueError(f'{path} line {number}: no "file_name" and "caption"') from None
        for i, record in enumerate(self.records):
            if record.name not in added:
                raise ValueError(f"{path} has no caption for {record.name}")
            self.records[i] = replace(record, captions=(record.captions[0], added[record.name]))

    def __len__(self):
        return len(self.records)

    def name(self, index: int) -> str:
        return self.records[index].name

    def captions(self, index: int) -> tuple[str, ...]:
        return self.records[index].captions

    def image(self, index: int, height: int, width: int) -> np.ndarray:
        """uint8 (height, width, 3), scaled and centre-cropped. ValueError as from read_image."""
        return np.array(resize_and_crop(read_image(self.records[index]), height, width))

    def picture_size(self, index: int) -> tuple[int, int]:
        """(height, width) of the upright picture, from its header; (1, 1) if that is broken."""
        for at_most in (2**16, MAX_BYTES):              # Pillow wants to see the whole of a WebP.
            with suppress(Exception):
                content = self.records[index].read(at_most)
                image = Image.open(io.BytesIO(content), formats=FORMATS)
                if image.format == "JPEG" and image.getexif().get(0x0112) in (5, 6, 7, 8):
                    return image.size                   # Cameras store it lying on its side.
                return image.height, image.width
        return 1, 1


def check_problems(problems: list[str], total: int, limit: float = 0.01):
    """Say on stderr how many of `total` samples are unusable; ValueError if over `limit` are."""
    summary = f"{len(problems)} of {total} samples cannot be used"
    if len(problems) > limit * total:
        names = "\n  ".join(problems[:10])
        raise ValueError(f"{summary}, over {100 * limit:g} %. Mend or remove them:\n  {names}")
    if problems:
        print(f"{summary}, the first: {problems[0]}", file=sys.stderr)


def readable(source, wanted, limit: float = 0.01):
    """Yield (index, uint8 (height, width, 3), captions) for each wanted (index, height, width).
    Threads read the next 64. None stands for a picture that cannot be read; check_problems."""
    wanted, waiting = iter(wanted), []
    with ThreadPoolExecutor(8) as threads:              # Decoders let other threads run.
        while len(source.problems) <= limit * source.found:
            for index, *size in islice(wanted, 64 - len(waiting)):
                waiting.append((index, threads.submit(source.image, index, *size)))
            if not waiting:
                break
            index, picture = waiting.pop(0)
            try:
                image = picture.result()
            except ValueError as error:
                image = source.problems.append(str(error))            # None
            yield index, image, source.captions(index)
    check_problems(source.problems, source.found, limit)


# ---- Encoded shards (App. E.1) -------------------------------------------------------------------

def file_hash(file: Path) -> str:
    """SHA-256 of all bytes of a file."""
    return hashlib.sha256(np.memmap(file, mode="r")).hexdigest()


class EncodedFolder:
    """The shards of a folder that encode.py made with these `encoders`, a fingerprint ("": any).
    `groups` has the sample numbers of each picture size. ValueError names damage and its mend."""

    def __init__(self, folder, encoders: str = ""):
        self.folder, self.starts, self.opened = Path(folder).expanduser(), [], {}
        file, count, groups = self.folder / "index.json", 0, {}
        try:
            self.index = json.loads(file.read_text())
            self.resolution, made_with = self.index["resolution"], self.index["encoders"]
            for line in self.index["shards"]:
                numbers = np.arange(count, count + line["count"])
                groups.setdefault((line["height"], line["width"]), []).append(numbers)
                self.starts.append(count)
                count += line["count"]
            self.longest_side = max(max(size) for size in groups)
            other = encoders not in ("", made_with["fingerprint"])
        except PROBLEMS as problem:
            raise ValueError(f"{file} is missing or damaged ({problem}); delete it and run "
                             f"the same encode.py command again") from None
        self.groups = [np.concatenate(parts) for parts in groups.values()]
        if other:
            raise ValueError(f"{folder} needs --encoders {made_with['path']}, or encode it again")

    def __len__(self):
        return sum(len(group) for group in self.groups)

    def find(self, index: int) -> tuple[dict, int]:
        """The arrays of a sample's shard (encode.layout), and the sample's place in them."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        if number not in self.opened:
            self.opened[number] = self.open(self.index["shards"][number])
        return self.opened[number], index - self.starts[number]

    def open(self, line: dict) -> dict:
        """Views of a mapped shard, once its bytes are known to be those that were written."""
        file = self.folder / str(line["file"])
        try:
            if file_hash(file) != line["hash"]:
                raise ValueError("its bytes are not those that were written")
            with safe_open(file, "pt") as opened:
                arrays = {name: opened.get_tensor(name).numpy() for name in opened.keys()}
                arrays["captions"] = json.loads(opened.metadata()["shard"])["captions"]
            if len(arrays["moments"]) != line["count"]:
                raise ValueError(f"index.json counts {line['count']} pictures in it")
            return arrays
        except (*PROBLEMS, SafetensorError) as problem:
            mend = f"delete it and run {self.index.get('command')} again"
            raise ValueError(f"{file} is damaged ({problem}); {mend}") from None

    def caption_rows(self, index: int) -> list[int]:
        """The rows of a sample's captions in the arrays of its shard."""
        arrays, i = self.find(index)
        start, end = arrays["caption_start"][i : i + 2]
        return arrays["caption_row"][start:end].tolist()

    def captions(self, index: int) -> tuple[str, ...]:
        texts = self.find(index)[0]["captions"]
        return tuple(texts[row] for row in self.caption_rows(index))

    def read(self, indices, rows, arrays: dict) -> dict:
        """Fill `arrays` {name: (B, ...)} with samples of one size and rows of their captions."""
        places = [self.find(index) for index in indices]
        for name in ("moments", "clip_l", "clip_g", "t5", "pooled_l", "pooled_g"):
            stored = places[0][0][name]
            if name not in arrays or arrays[name].shape != (len(places), *stored.shape[1:]):
                arrays[name] = np.empty((len(places), *stored.shape[1:]), stored.dtype)
            for k, (shard, i) in enumerate(places):
                arrays[name][k] = shard[name][i if name == "moments" else rows[k]]
        return arrays

    def split(self, count: int) -> tuple["EncodedFolder", "EncodedFolder"]:
        """(the rest, the first `count` samples, or all): of each size in proportion."""
        rest, first = copy.copy(self), copy.copy(self)
        ends = np.cumsum([0] + [len(group) for group in self.groups])
        shares = np.diff(ends * min(count, len(self)) // len(self))
        rest.groups = [group[n:] for group, n in zip(self.groups, shares) if n < len(group)]
        first.groups = [group[:n] for group, n in zip(self.groups, shares) if n]
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

    def split(self, parts: int) -> list["Batch"]:
        """Equal parts, one after the other."""
        pieces = [tensor.chunk(parts) for tensor in vars(self).values()]
        return [Batch(*piece) for piece in zip(*pieces)]


class Batches:
    """batches(step) is this process's share of a batch. Every draw is keyed by (seed, step, index
    in the whole batch), so there is no state. config: train.TrainConfig. world: devices.World."""

    def __init__(self, folder: EncodedFolder, vae_config, text_config, config, world):
        self.folder, self.config, self.world = folder, config, world
        self.vae_config, self.text_config = vae_config, text_config
        self.thread = ThreadPoolExecutor(1) if world.device.type == "cuda" else None
        self.arrays, self.ahead, self.epochs = {}, {}, {}
        self.per_epoch = len(self.epoch(0))

    def epoch(self, number: int) -> list[np.ndarray]:
        """The batches of an epoch, (B,) sample numbers each. Fewer than B pictures repeat."""
        if number not in self.epochs:
            rng, batches = np.random.default_rng((self.config.seed, 1, number)), []
            for group in self.folder.groups:
                count = max(1, len(group) // self.config.batch_size)
                order = np.resize(rng.permutation(group), (count, self.config.batch_size))
                batches += list(order)
            self.epochs = {number: [batches[i] for i in rng.permutation(len(batches))]}
        return self.epochs[number]

    def indices(self, step: int) -> list[int]:
        """The sample numbers of this process's share of a step."""
        epoch, place = divmod(step, self.per_epoch)
        share = self.config.batch_size // self.world.size
        batch = self.epoch(epoch)[place]
        return batch[self.world.rank * share : (self.world.rank + 1) * share].tolist()

    def __call__(self, step: int) -> Batch:
        """The batch of a step. Beside a GPU a thread makes the next one meanwhile."""
        if self.thread is None:
            return self.make(step)
        batch = self.ahead.pop(step, None) or self.thread.submit(self.make, step)
        batch = batch.result()
        self.ahead = {step + 1: self.thread.submit(self.make, step + 1)}
        return batch

    def make(self, step: int) -> Batch:
        indices, rngs, draws, rows = self.indices(step), [], [], []
        for number, index in enumerate(indices, self.world.rank * len(indices)):
            rngs.append(np.random.default_rng((self.config.seed, 2, step, number)))
            draws.append(rngs[-1].random(5))                          # t, caption, three encoders
            captions = self.folder.caption_rows(index)
            rows.append(pick_caption(captions, draws[-1][1], self.config.full_captions))
        arrays = self.folder.read(indices, rows, self.arrays)
        noise = np.empty(arrays["moments"].shape, np.float32)         # (B, 2C, H, W)
        for k, rng in enumerate(rngs):
            rng.standard_normal(out=noise[k], dtype=np.float32)
        noise, code_noise = torch.from_numpy(noise).to(self.world.device).chunk(2, dim=1)
        latent, context, pooled = self.inputs(arrays, code_noise)
        draws = torch.from_numpy(np.stack(draws)).float()             # (B, 5)
        keep = (draws[:, 2:] >= self.config.encoder_dropout).to(self.world.device)
        context, pooled = drop_encoders(context, pooled, keep, self.text_config)
        return Batch(latent, context, pooled, noise, draws[:, 0].clamp(1e-6, 1 - 1e-6))

    def inputs(self, arrays: dict, code_noise=None):
        """Stored arrays -> latent, context, pooled on the device; half precision becomes fp32."""
        tensors = {}
        for name, array in arrays.items():
            tensors[name] = torch.from_numpy(array).to(self.world.device).float()
        mean, logvar = tensors.pop("moments").chunk(2, dim=1)         # (B, C, H, W) each
        latent = normalize(sample_code(mean, logvar, code_noise), self.vae_config)
        return latent, *combine(**tensors)

    def validation(self, count: int):
        """Yield (latent, context, pooled, noise) of `count` samples, a batch for each size."""
        for group in self.folder.split(count)[1].groups:
            rows = [self.folder.caption_rows(index)[-1] for index in group]
            latent, context, pooled = self.inputs(self.folder.read(group, rows, {}))
            rng = torch.Generator().manual_seed(self.config.seed)
            yield latent, context, pooled, torch.randn(latent.shape, generator=rng).to(latent)


def pick_caption(captions, draw: float, full_share: float):
    """(original, full) are mixed by `full_share` (Sec. 5.2.2); other numbers are drawn evenly."""
    if len(captions) == 2:
        return captions[int(draw < full_share)]
    return captions[int(draw * len(captions))]


def main():
    """Show what a path holds, and name what of it cannot be used."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("path", help="folder, .tar or .jsonl file with captioned pictures")
    source = ImageFiles(parser.parse_args().path)
    for index in range(min(5, len(source))):
        print(source.name(index), source.picture_size(index), *source.captions(index), sep=" | ")
    list(readable(source, [(index, 8, 8) for index in range(len(source))], limit=1))
    used = source.found - len(source.problems)
    print(f"{used} of {source.found} samples can be used", *source.problems, sep="\nnot used: ")


if __name__ == "__main__":
    from devices import command
    command(main)
