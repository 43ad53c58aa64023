"""full_size.py: the memory that SD3-medium with T5-XXL needs, and how fast 2 B parameters load.

Random fp16 files of the released sizes and names are written, measured and deleted:
  memory   everything (16 GB: MM-DiT 2.0 B, CLIP-L, CLIP-G, T5-XXL, VAE), one step at 64 px with
           networks that take turns as in sample.py's main. The peak is that of RssAnon in
           /proc/self/status, looked at every 5 ms. It leaves out mapped pages of files, which the
           kernel may drop at any time
  speed    the MM-DiT alone (4 GB), read as it is stored, from the page cache: bytes over seconds,
           and over seconds of processor time, which other programs change less. Beside it stands
           what new memory alone costs here: on many virtual machines, most of a load
The numbers in the files mean nothing, and no picture is kept.

Run         python bench/full_size.py --tokenizers DIR     DIR holds clip/ and t5/; writes
                                                           results/full-size-cpu.json
"""

import argparse
import json
import shlex
import statistics
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from checkpoints import NAMES, PREFIXES, open_model, read_network, rename
from mmdit import MMDiT, MMDiTConfig
from sample import Settings, draw, encode, load
from text_encoders import CLIPConfig, CLIPTextEncoder, T5Config, T5Encoder
from vae import VAE, VAEConfig


def released_sizes() -> dict:
    """{name in the file: shape} of sd3_medium_incl_clips_t5xxlfp16."""
    with torch.device("meta"):
        networks = {
            "clip_l": CLIPTextEncoder(CLIPConfig()),
            "clip_g": CLIPTextEncoder(CLIPConfig(49408, 1280, 32, 77, "gelu", 1280)),
            "t5": T5Encoder(T5Config()),
            "vae": VAE(VAEConfig()),
            "mmdit": MMDiT(MMDiTConfig(qk_norm=False)),
        }
    sizes = {}
    for name, network in networks.items():
        table = {ours: released for released, ours in NAMES[name].items() if ours is not None}
        for key, tensor in network.state_dict().items():
            sizes[PREFIXES[name] + rename(key, table)] = tuple(tensor.shape)
    return sizes


def write_random(file: Path, shapes: dict):
    """A safetensors file of fp16 tensors, 0.02 N(0, 1). It repeats one block of random numbers."""
    header = {}
    offset = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).mul(0.02)
    block = block.half().numpy().tobytes()
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for first in range(0, offset, len(block)):
            out.write(block[: min(len(block), offset - first)])


def anonymous_memory() -> float:
    """RssAnon of this process in GB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / 1e9
    raise OSError("/proc/self/status has no RssAnon; this measurement needs Linux")


class Peaks:
    """Watches the memory in a thread. `peaks[name]` is the most GB while `name` was current."""

    def __init__(self):
        self.current = "start"
        self.peaks = {}
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()

    def watch(self):
        while not self.done.wait(0.005):
            name = self.current
            self.peaks[name] = max(self.peaks.get(name, 0), anonymous_memory())

    def stop(self) -> dict:
        self.done.set()
        self.thread.join()
        return {name: round(peak, 2) for name, peak in self.peaks.items()}


def load_speed(file: Path, shapes: dict, trials: int) -> dict:
    """GB/s of reading the MM-DiT as it is stored, and of writing as many bytes into new memory
    without any file, in turns. The first turn warms the page cache."""
    size = 2 * sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e9

    def read():
        return read_network("mmdit", open_model(file), torch.float16)

    def fill():
        tensors = []
        for shape in shapes.values():
            tensors.append(torch.empty(shape, dtype=torch.float16).fill_(1))
        return tensors
    rates = {"load": [], "new_memory": []}
    for _ in range(trials + 1):
        for name, work in (("load", read), ("new_memory", fill)):
            start = time.perf_counter()
            cpu_start = time.process_time()
            made = work()
            seconds = time.perf_counter() - start
            rates[name].append((size / seconds, size / (time.process_time() - cpu_start)))
            del made
    result = {}
    for name, pairs in rates.items():
        wall, cpu = zip(*pairs[1:])
        result[name] = {"gigabytes_per_second": round(statistics.median(wall), 2),
                        "gigabytes_per_cpu_second": round(statistics.median(cpu), 2)}
    return result


def peak_memory(file: Path, tokenizers: str, precision: str) -> dict:
    """One step of one picture, and the peak in each network's turn."""
    before = anonymous_memory()
    settings = Settings(height=64, width=64, num_steps=1)
    peaks = Peaks()
    start = time.perf_counter()
    peaks.current = "text"
    pipeline = load(file, "cpu", precision, networks=("text",), tokenizers=tokenizers)
    context, pooled = encode(pipeline, ["a red circle left of a blue square"], settings)
    del pipeline
    peaks.current = "mmdit and vae"
    pipeline = load(file, "cpu", precision, networks=("mmdit", "vae"))
    draw(pipeline, context, pooled, [0], settings)
    by_network = peaks.stop()
    return {"precision": precision, "peak_gigabytes": max(by_network.values()),
            "by_network": by_network, "before_loading": round(before, 2),
            "seconds": round(time.perf_counter() - start)}


def main():
    """Write the files, measure, delete them, write the results. A part that is not measured keeps
    what stood there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokenizers", help="for memory: a folder with clip/ and t5/")
    parser.add_argument("--parts", nargs="+", choices=("speed", "memory"),
                        default=["speed", "memory"])
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--trials", type=int, default=5)
    options = parser.parse_args()
    out = ROOT / "results" / "full-size-cpu.json"
    result = json.loads(out.read_text()) if out.is_file() else {}
    for part in options.parts:
        shapes = released_sizes()
        if part == "speed":
            names = [name for name in shapes if name.startswith(PREFIXES["mmdit"])]
            shapes = {name: shapes[name] for name in names}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.safetensors"
            write_random(file, shapes)
            size = file.stat().st_size
            if part == "speed":
                measured = load_speed(file, shapes, options.trials)
            else:
                measured = peak_memory(file, options.tokenizers, options.precision)
        result[part] = {"command": shlex.join(["python", *sys.argv]), "torch": torch.__version__,
                        "threads": torch.get_num_threads(), "file_gigabytes": round(size / 1e9, 2),
                        **measured}
        print(part, json.dumps(result[part]), flush=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
