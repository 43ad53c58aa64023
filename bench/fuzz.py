"""fuzz.py: damaged and hostile files must end in one of our sentences.

Every kind of file that this project reads is changed at random, a few bytes at a time, and read
again. A reader may refuse the file with ValueError, RuntimeError or OSError, which `command` in
devices.py prints as one sentence, or it may read something. Three things count as faults:
  crash    any other exception: a user would see a traceback
  silent   a file whose hash is on record (shards) or that carries checksums (PNG) was changed, and
           another content came out
  slow     more than five seconds, or more than eight gigabytes of memory

Changes     bits and runs of bytes are overwritten, cut out, inserted, repeated, cut off at the end;
            numbers in text become 0, -1, 1e999, NaN, or very long. Half of them hit the first 2 kB
Run         python bench/fuzz.py     3,000 changes of each kind; writes results/fuzz.json
"""

import argparse
import contextlib
import hashlib
import io
import json
import re
import resource
import shlex
import signal
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import run_folder
import sample
import train
from checkpoints import FROZEN, SHIPPED, fingerprint, load_components, run_encoders, save_networks
from data import EncodedFolder, ImageFiles
from devices import World, command
from encode import encode_folder
from mmdit import MMDiT, MMDiTConfig
from options import write_json
from scenes import Scenes
from vae import VAE, VAEConfig

OURS = (ValueError, RuntimeError, OSError)        # what devices.command turns into a sentence
NUMBERS = (b"0", b"-1", b"1e999", b"NaN", b"null", b'"7"', b"9" * 30, b"[" * 50)
SECONDS, MEMORY = 5, 8 * 2**30


@dataclass(frozen=True)
class Kind:
    """One kind of file: where an intact one lies, and what its reader makes of it."""
    name: str
    file: Path                      # the file that is changed
    read: Callable                  # () -> bytes or text that stands for all that was read
    sealed: bool = False            # Does a hash or a checksum cover all of it?


# ---- Intact files, and their readers -------------------------------------------------------------

def digest(tensors) -> str:
    """A hash of the names, types and numbers of {name: tensor or array}."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        value = torch.as_tensor(tensors[name]).contiguous()
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def model_kind(folder: Path) -> Kind:
    """A model with two networks: header, metadata and tensors of a safetensors file."""
    mmdit = MMDiT(MMDiTConfig(1, 2, 4, 8, 8, pos_embed_max_size=4))
    vae = VAE(VAEConfig(4, (16, 16), norm_groups=4))
    file = folder / "model.safetensors"
    networks = {"mmdit": mmdit, "vae": vae}
    save_networks(file, networks, sampling={"num_steps": 4}, dtype=torch.bfloat16, words=("red",))

    def read():
        parts = load_components(file, ("mmdit", "vae"))
        tensors = parts.mmdit.state_dict() | parts.vae.state_dict()
        return digest(tensors) + str((parts.sampling, parts.words, parts.vae.config))
    return Kind("model", file, read)


def shard_kinds(folder: Path) -> list[Kind]:
    """Encoded pictures: a shard, which index.json has the hash of, and index.json itself."""
    world = World("cpu")
    encode_folder(Scenes(4), folder, SHIPPED, 64, world, shard_size=2)

    def read():
        opened = EncodedFolder(folder)
        everything = str(opened.resolution)
        for index in range(len(opened)):
            arrays = opened.read([index], [opened.caption_rows(index)[0]])
            everything += digest(arrays) + str(opened.captions(index))
        return everything
    shard = Kind("shard", min(folder.glob("shard-*")), read, sealed=True)
    return [shard, Kind("index.json", folder / "index.json", read)]


def png_kind(folder: Path) -> Kind:
    """The settings that sample.py stores in a PNG."""
    file = folder / "picture.png"
    record = vars(sample.Recipe(prompt=("a red circle",), made_from="0123456789abcdef"))
    with contextlib.redirect_stdout(io.StringIO()):
        sample.save_png(Image.fromarray(Scenes(1).image(0, 64, 64)), file, record)
    return Kind("PNG record", file, lambda: str(sample.read_record(file)), sealed=True)


def read_pictures(path: Path) -> str:
    """All captions and pixels at a path, and what cannot be used."""
    source = ImageFiles(path)
    everything = ""
    for index in range(len(source)):
        source.picture_size(index)
        with contextlib.suppress(ValueError):             # `readable` counts these.
            everything += str(source.image(index, 16, 16).tobytes())
        everything += str(source.captions(index))
    return everything


def picture_kinds(folder: Path) -> list[Kind]:
    """A tar shard, a JPEG, a caption file and a table of captions."""
    scenes = Scenes(3)
    tar = folder / "tar" / "shard.tar"
    for name in ("tar", "folder", "table"):
        (folder / name).mkdir(parents=True)
    with tarfile.open(tar, "w") as archive:
        for index in range(3):
            picture = io.BytesIO()
            Image.fromarray(scenes.image(index, 32, 32)).save(picture, "PNG")
            captions = json.dumps({"captions": scenes.captions(index)}).encode()
            for suffix, content in (("png", picture.getvalue()), ("json", captions)):
                member = tarfile.TarInfo(f"{index}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    rows = []
    for index in range(3):
        for name in ("folder", "table"):
            picture = Image.fromarray(scenes.image(index, 32, 32))
            picture.save(folder / name / f"{index}.jpg")
        text = scenes.captions(index)[1]
        (folder / "folder" / f"{index}.txt").write_text(text)
        rows.append(json.dumps({"file_name": f"{index}.jpg", "text": text}))
    table = folder / "table" / "metadata.jsonl"
    table.write_text("\n".join(rows) + "\n")
    return [Kind("tar", tar, partial(read_pictures, tar.parent)),
            Kind("JPEG", folder / "folder" / "0.jpg", partial(read_pictures, folder / "folder")),
            Kind("caption", folder / "folder" / "0.txt", partial(read_pictures, folder / "folder")),
            Kind("metadata.jsonl", table, partial(read_pictures, table.parent))]


def run_kinds(folder: Path, model: Path) -> list[Kind]:
    """config.json and log.jsonl of a run folder."""
    (folder / "checkpoints" / "00000001").mkdir(parents=True)
    encoders = {"path": str(model), "fingerprint": fingerprint(model, FROZEN)}
    about = {"train": vars(train.TrainConfig(out=str(folder))), "model": {"depth": 1},
             "encoders": encoders}
    config, log = folder / "config.json", folder / "log.jsonl"
    config.write_text(json.dumps(about, indent=1))
    log.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')

    def read_config():
        found = str(train.read_config(["--out", str(folder)]))
        with contextlib.suppress(ValueError):             # These are not the encoders.
            run_encoders(folder)
        return found
    return [Kind("config.json", config, read_config),
            Kind("log.jsonl", log, lambda: str(run_folder.read_log(log, 10)))]


# ---- Changes -------------------------------------------------------------------------------------

def change(content: bytes, rng) -> bytes:
    """The content with one to three random changes."""
    for _ in range(rng.integers(1, 4)):
        end = len(content) if rng.random() < 0.5 else min(2048, len(content))
        at = int(rng.integers(end + 1))
        length = int(2 ** rng.uniform(0, 7))
        before, after = content[:at], content[at:]
        way = rng.integers(7)
        if way == 0 and after:
            content = before + bytes([after[0] ^ 1 << rng.integers(8)]) + after[1:]
        elif way == 1:
            content = before + rng.bytes(length) + after[length:]
        elif way == 2:
            content = before + after[length:]
        elif way == 3:
            content = before + rng.bytes(length) + after
        elif way == 4:
            content = before + after[:length] + after
        elif way == 5:
            content = before
        else:
            number = NUMBERS[rng.integers(len(NUMBERS))]
            content = before + re.sub(rb"-?\d[\d.]*", number, after[:4096], count=1) + after[4096:]
    return content


class TooSlow(BaseException):
    """No reader catches it, as it would catch an Exception or a TimeoutError."""


def stop(*_):
    raise TooSlow(f"more than {SECONDS} s")


def outcome(kind: Kind, intact: str) -> str:
    """What reading a changed file came to: refused, as before, changed, or a fault."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        found = kind.read()
    except TooSlow as problem:
        return f"slow: {problem}"
    except MemoryError as problem:
        return f"slow: more memory than {MEMORY} bytes ({problem})"
    except OURS:
        return "refused"
    except BaseException as problem:                      # A crash is what we look for.
        return f"crash: {type(problem).__name__}: {problem}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if found == intact:
        return "as before"
    return "silent: another content" if kind.sealed else "changed"


def fuzz(kind: Kind, count: int, seed: int, keep: Path) -> dict:
    """{outcome: how often} for `count` changes of one kind. A file with a fault goes to `keep`."""
    content, intact = kind.file.read_bytes(), kind.read()
    counts = {}
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        kind.file.write_bytes(change(content, rng))
        found = outcome(kind, intact)
        word = found.split(":")[0]
        counts[word] = counts.get(word, 0) + 1
        if ":" in found and sum(counts.get(fault, 0) for fault in ("crash", "silent", "slow")) < 6:
            keep.mkdir(parents=True, exist_ok=True)
            kept = keep / f"{number}-{kind.file.name}"
            kept.write_bytes(kind.file.read_bytes())
            print(f"{kind.name} {number}: {found:.300} ({kept})", flush=True)
    kind.file.write_bytes(content)
    if kind.read() != intact:
        raise RuntimeError(f"{kind.name}: the intact file is read differently after the changes")
    return counts


def main():
    """Change every kind of file, and count what comes of it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--count", type=int, default=3000, help="changes of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", help="names of kinds; default: all")
    parser.add_argument("--keep", default="out/fuzz", help="a folder for files with a fault")
    parser.add_argument("--out", default=str(ROOT / "results" / "fuzz.json"))
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, stop)
    started, record = time.time(), {}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        place = Path(folder)
        kinds = [model_kind(place), *shard_kinds(place / "shards"), png_kind(place),
                 *picture_kinds(place / "pictures")]
        kinds += run_kinds(place / "run", kinds[0].file)
        for kind in kinds:
            if not options.kinds or kind.name in options.kinds:
                record[kind.name] = fuzz(kind, options.count, options.seed, Path(options.keep))
                print(f"{kind.name}: {record[kind.name]}", flush=True)
    faults = 0
    for counts in record.values():
        faults += counts.get("crash", 0) + counts.get("silent", 0) + counts.get("slow", 0)
    about = {"command": shlex.join(["python", *sys.argv]), "changes": options.count,
             "seconds": round(time.time() - started, 1), "faults": faults, "kinds": record}
    write_json(options.out, about)
    print(f"{faults} faults in {about['seconds']} s; written to {options.out}")


if __name__ == "__main__":
    command(main)
