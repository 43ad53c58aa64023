"""full_size.py: the memory that SD3-medium with T5-XXL needs, and how fast 2 B parameters are loaded.

Random fp16 files of the released sizes and names are written, measured and deleted:
  memory   all of it (16 GB: MM-DiT 2.0 B, CLIP-L, CLIP-G, T5-XXL, VAE), one step at 64 px with networks that take turns
           (load(..., memory="one")). The peak is that of RssAnon in /proc/self/status, looked at every 5 ms: resident memory
           without mapped file pages, which the kernel may drop at any time, since the file still holds them
  speed    the MM-DiT alone (4 GB), read_network as stored, from the page cache: bytes over seconds, and over seconds of
           processor time, which other programs on the machine change less. Beside it what new memory alone costs here: on
           virtual machines that get their memory as they touch it, that is most of a load
The numbers in the files mean nothing and no picture is kept; time per step is not measured here.

Run         python experiments/full_size.py --tokenizers DIR     DIR holds clip_l/ and t5/; writes results/full-size-cpu.json
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

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoints import PREFIXES, SINGLE_TABLES, read_network, released_name
from mmdit import MMDiT, MMDiTConfig
from sample import generate, load
from text_encoders import CLIPConfig, CLIPTextEncoder, T5Config, T5Encoder
from vae import VAE


def released_sizes() -> dict:
    """{name in the file: shape} of sd3_medium_incl_clips_t5xxlfp16."""
    with torch.device("meta"):
        networks = {"clip_l": CLIPTextEncoder(CLIPConfig()), "t5": T5Encoder(T5Config()), "vae": VAE(),
                    "clip_g": CLIPTextEncoder(CLIPConfig(49408, 1280, 32, 77, "gelu", 1280)),
                    "mmdit": MMDiT(MMDiTConfig(qk_norm=False))}
    return {PREFIXES[name] + released_name(key, SINGLE_TABLES[name]): tuple(x.shape)
            for name, network in networks.items() for key, x in network.state_dict().items()}


def write_random(file: Path, shapes: dict):
    """A safetensors file of fp16 tensors, 0.02 N(0, 1), written piece by piece: a block of random numbers over and over."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul(0.02).half().numpy().tobytes()
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for first in range(0, offset, len(block)):
            out.write(block[: min(len(block), offset - first)])


def status(field: str) -> float:
    """A memory figure of this process in GB, from /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024 / 1e9


class Peak:
    """`with Peak() as peak: ...`, then peak.value: the most RssAnon in between, in GB."""

    def __enter__(self):
        self.value, self.done = status("RssAnon"), threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(0.005):
            self.value = max(self.value, status("RssAnon"))

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()


def load_speed(file: Path, shapes: dict, trials: int) -> dict:
    """GB/s of reading the MM-DiT as it is stored, and of writing as many bytes into new memory without any file, in turns; the
    first turn warms the page cache."""
    size = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    works = {"load": lambda: read_network("mmdit", file, dtype=torch.float16),
             "new_memory": lambda: [torch.empty(shape, dtype=torch.float16).fill_(1) for shape in shapes.values()]}
    rates = {name: [] for name in works}
    for _ in range(trials + 1):
        for name, work in works.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            made = work()
            rates[name].append((size / 1e9 / (time.perf_counter() - start), size / 1e9 / (time.process_time() - cpu_start)))
            del made
    middle = lambda name, which: round(statistics.median(rate[which] for rate in rates[name][1:]), 2)
    return {name: {"gigabytes_per_second": middle(name, 0), "gigabytes_per_cpu_second": middle(name, 1)} for name in works}


def peak_memory(file: Path, tokenizers: str, precision: str) -> dict:
    """One step of one picture, and the peak of each network's turn."""
    base, peaks = status("RssAnon"), {}
    pipeline = load(file, device="cpu", precision=precision, tokenizers=tokenizers, memory="one")
    use = pipeline.use

    def watched(name, compute):
        with Peak() as peak:
            result = use(name, compute)
        peaks[name] = round(max(peaks.get(name, 0), peak.value), 2)
        print(f"{name}: peak {peak.value:.2f} GB", flush=True)
        return result

    pipeline.use = watched
    start = time.perf_counter()
    generate(pipeline, ["a red circle left of a blue square"], height=64, width=64, num_steps=1)
    return {"precision": precision, "peak_gigabytes": max(peaks.values()), "by_network": peaks,
            "before_loading": round(base, 2), "seconds": round(time.perf_counter() - start)}


def main():
    """Write the files, measure, delete them, write the results; a part that is not measured keeps what stood there."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--tokenizers", help="for memory: a folder with clip_l/{vocab.json,merges.txt} and t5/spiece.model")
    parser.add_argument("--parts", nargs="+", choices=("speed", "memory"), default=("speed", "memory"))
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--trials", type=int, default=5)
    options = parser.parse_args()
    out = Path(__file__).parents[1] / "results" / "full-size-cpu.json"
    result = json.loads(out.read_text()) if out.is_file() else {}
    for part in options.parts:
        chosen = {name: shape for name, shape in released_sizes().items()
                  if part == "memory" or name.startswith(PREFIXES["mmdit"])}
        size = sum(2 * torch.Size(shape).numel() for shape in chosen.values())
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.safetensors"
            write_random(file, chosen)
            measured = load_speed(file, chosen, options.trials) if part == "speed" else peak_memory(
                file, options.tokenizers, options.precision)
        result[part] = {"command": shlex.join(["python", *sys.argv]), "torch": torch.__version__,
                        "threads": torch.get_num_threads(), "file_gigabytes": round(size / 1e9, 2), **measured}
        print(part, json.dumps(result[part]), flush=True)
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
