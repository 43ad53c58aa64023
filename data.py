"""data.py: pictures, captions, encoded shards (SD3, arXiv:2403.03206v1, App. E.1).

Read with   App. E.1 (resize, crop at the centre, encode once), Sec. 5.3.2 (sizes of pictures)
Not here    the making of shards (encode.py), batches (batches.py)
Shapes      Pictures are uint8 RGB (height, width, 3); tensors are (3, height, width) in [-1, 1].
Run         python encode.py --data PATH --out DIR     counts the pictures that cannot be used
"""

import copy
import hashlib
import io
import json
import math
import os
import re
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

from options import MAX_TEXT, read_lines

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
                    elif not member.isreg() and not member.isdir():
                        self.problems.append(f"{part.name}: a link or no regular file")
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
