"""table7_encoders.py: what the frozen encoders cost in training (SD3, App. E.1, Table 7).

Claims   encoding everything once saves the encoders' memory and their share of every step after the
         first epoch, and costs disk space; texts in half precision lose nothing
Memory   of the paper's encoders, from the shapes of their parameters in fp32: exact
Storage  of a sample at 256 px, from shapes: exact
Time     of the real sizes with random weights, on this machine. T5 and the 2B MM-DiT (depth 24) are
         timed with one and with two of their layers, which all cost the same: so 2 GB are enough
Growth   of a training step in bf16 mixed precision, if the encoders ran in it: in fp32, which the
         paper's column of memory tells, and in bf16
Differs  The step is forward and backward, without the update of the weights, whose time does not
         depend on the batch. In MM-DiT's last block the text's half is counted though it is absent.

Verdicts: memory and storage hold if they agree with every digit that the paper prints. The growth
holds if its whole interval, over the repeats, is above half of the paper's. Half precision holds if
the 95 % interval of the relative change of the loss is within .001 on both sides.

Run   python experiments/table7_encoders.py --quick     1 sample in a pass, on a CPU
      python experiments/table7_encoders.py --full      32, as in the paper, on a GPU
"""

import math
import shlex
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from checkpoints import SHIPPED, find_model_file, load_components, portable
from data import to_tensor
from devices import autocast, command, pick_device
from flow import rectified_flow_loss
from mmdit import MMDiT, MMDiTConfig
from options import check_options, option, read_options, write_atomically, write_json
from scenes import HELD_OUT_SEED, Scenes
from text_encoders import CLIPConfig, CLIPTextEncoder, T5Config, T5Encoder, TextConfig
from vae import VAE, VAEConfig

# GB of memory, ms a sample at batch size 32, kB stored, per cent of a training step of 568 ms
PAPER = {"vae": (0.14, 2.45, 65.5, 13.8), "clip_l": (0.49, 0.45, 121.3, 2.6),
         "clip_g": (2.78, 2.77, 202.2, 15.6), "t5": (19.05, 17.46, 630.7, 98.3)}
COLUMNS = ("memory_gb", "ms_per_sample", "storage_kb", "step_grows_percent")
CLIP_L = CLIPConfig()
CLIP_G = CLIPConfig(hidden_size=1280, num_layers=32, activation="gelu", projection_dim=1280)
TEXT = TextConfig()
RESOLUTION = 256                     # px per side, as in the paper
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    checkpoint: str = option(str(SHIPPED), "whose loss shows what half precision does to texts")
    batch_size: int = option(8, "samples in a timed pass; the paper has 32", 1, 4096)
    repeats: int = option(5, "timed passes; the median counts", 2, 1000)
    num_scenes: int = option(256, "held-out scenes for the loss", 2, 10**5)
    device: str = option("auto", "cuda, mps or cpu")
    out: str = option(str(ROOT / "results" / "table7_encoders.json"), "where the numbers go")

    def __post_init__(self):
        check_options(self)


QUICK = {"batch_size": 1, "repeats": 3, "num_scenes": 64}
FULL = {"batch_size": 32, "repeats": 20, "num_scenes": 1024}


# --- What follows from shapes ---------------------------------------------------------------------

def memory_bytes(network):
    """The bytes of a network's parameters in fp32, as the paper counts them."""
    return 4 * sum(parameter.numel() for parameter in network.parameters())


def stored_bytes(vae, text, resolution):
    """{encoder: bytes on disk for one sample}, App. E.1: sequences and moments in half precision,
    pooled vectors in fp32. The zeros that pad CLIP's channels (App. B.2) are not stored."""
    side = resolution // vae.downsampling
    return {"vae": 2 * 2 * vae.latent_channels * side**2,
            "clip_l": 2 * text.clip_length * text.clip_l_width + 4 * text.clip_l_width,
            "clip_g": 2 * text.clip_length * text.clip_g_width + 4 * text.clip_g_width,
            "t5": 2 * text.t5_length * text.t5_width}


def papers_networks():
    """The encoders of SD3 without numbers."""
    with torch.device("meta"):
        return {"vae": VAE().encoder, "clip_l": CLIPTextEncoder(CLIP_L),
                "clip_g": CLIPTextEncoder(CLIP_G), "t5": T5Encoder(T5Config())}


# --- Time -----------------------------------------------------------------------------------------

@torch.no_grad()
def with_random_weights(network, dtype, device):
    """A network from the meta device, filled with small numbers. No copy of it exists before."""
    network = network.to(dtype).to_empty(device=device)
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.uniform_(-0.02, 0.02)
    return network


class Stopwatch:
    """Measures passes on one device. On a CPU, the time of other programs does not count."""

    def __init__(self, options):
        self.device = pick_device(options.device)
        self.repeats = options.repeats
        self.clock = time.perf_counter
        if self.device.type == "cpu":
            self.clock = time.process_time

    def seconds(self, function, *inputs):
        """The times of function(*inputs), after one pass that is not counted."""
        times = []
        for _ in range(self.repeats + 1):
            start = self.clock()
            function(*inputs)
            if self.device.type != "cpu":
                torch.accelerator.synchronize()
            times.append(self.clock() - start)
        return times[1:]


def of_all_layers(seconds, num_layers):
    """The times of a network of equal layers, from seconds(1) and seconds(2): [of each repeat]."""
    times = []
    for one, two in zip(seconds(1), seconds(2), strict=True):
        times.append(one + (num_layers - 1) * (two - one))
    return times


@torch.no_grad()
def forward_seconds(network, inputs, dtype, watch):
    """The times of a forward pass of a network from the meta device."""
    network = with_random_weights(network, dtype, watch.device).eval()
    return watch.seconds(network, inputs)


def encoder_seconds(options, dtype, watch):
    """{encoder: times of a batch} at the paper's sizes."""
    image = torch.rand(options.batch_size, 3, RESOLUTION, RESOLUTION, device=watch.device)
    ids = torch.randint(0, 32000, (options.batch_size, 77), device=watch.device)
    networks = papers_networks()

    def t5_seconds(num_layers):
        with torch.device("meta"):
            network = T5Encoder(T5Config(num_layers=num_layers))
        return forward_seconds(network, ids, dtype, watch)

    return {"vae": forward_seconds(networks["vae"], image.to(dtype), dtype, watch),
            "clip_l": forward_seconds(networks["clip_l"], ids, dtype, watch),
            "clip_g": forward_seconds(networks["clip_g"], ids, dtype, watch),
            "t5": of_all_layers(t5_seconds, T5Config().num_layers)}


def step_seconds(options, watch):
    """The times of forward and backward of the 2B MM-DiT on a batch, in bf16 mixed precision."""
    config = MMDiTConfig(depth=24)
    B, side = options.batch_size, RESOLUTION // 8
    device = watch.device
    latent, noise = torch.randn(2, B, config.latent_channels, side, side, device=device)
    context = torch.randn(B, TEXT.clip_length + TEXT.t5_length, config.context_dim, device=device)
    pooled = torch.randn(B, config.pooled_dim, device=device)
    t = torch.rand(B, device=device)

    def block_seconds(num_blocks):
        with torch.device("meta"):
            model = MMDiT(config)
        model.joint_blocks = model.joint_blocks[:num_blocks]
        model = with_random_weights(model, torch.float32, device)

        def step():
            with autocast(device, torch.bfloat16):
                losses = rectified_flow_loss(model, latent, context, pooled, t, noise)
            losses.mean().backward()
            model.zero_grad()

        return watch.seconds(step)

    return of_all_layers(block_seconds, config.depth)


def growth(encoders, step):
    """By how many per cent a step grows: {encoder, and "all": [of each repeat]}."""
    result = {"all": [0.0] * len(step)}
    for name, times in encoders.items():
        result[name] = []
        for i, (seconds, of_step) in enumerate(zip(times, step, strict=True)):
            result[name].append(100 * seconds / of_step)
            result["all"][i] += result[name][i]
    return result


# --- Texts in half precision ----------------------------------------------------------------------

@torch.no_grad()
def half_precision_change(options, device):
    """The relative change of a checkpoint's loss, when its texts are stored as E.1 stores them:
    (mean, 95 % interval). Each scene has one t and one noise; everything is computed in fp32."""
    parts = load_components(options.checkpoint)
    mmdit, vae, text = parts.mmdit.to(device), parts.vae.to(device), parts.text.to(device)
    scenes = Scenes(options.num_scenes, HELD_OUT_SEED)
    rng = torch.Generator().manual_seed(0)
    before, after = [], []
    for index in range(len(scenes)):
        image = to_tensor(scenes.image(index, 64, 64))[None].to(device)          # (1, 3, 64, 64)
        latent = vae.encode(image)
        context, pooled = text([scenes.captions(index)[-1]])
        noise = torch.randn(latent.shape, generator=rng).to(device)
        t = torch.full((1,), (index + 0.5) / len(scenes), device=device)
        loss = partial(rectified_flow_loss, mmdit, latent, pooled=pooled, t=t, noise=noise)
        before.append(loss(context=context))
        after.append(loss(context=context.half().float()))
    before, after = torch.cat(before), torch.cat(after)                          # (n,)
    change = (after - before) / before.mean()
    reach = 1.96 * change.std().item() / len(change) ** 0.5
    mean = change.mean().item()
    return mean, (mean - reach, mean + reach)


# --- The table, claims, figure --------------------------------------------------------------------

def table(networks, stored, encoders, grown, batch_size):
    """{encoder: the four columns of Table 7}. encoders, grown: times, growth of each repeat."""
    rows = {}
    for name, network in networks.items():
        milliseconds = 1e3 * statistics.median(encoders[name]) / batch_size
        row = (memory_bytes(network) / 1e9, milliseconds, stored[name] / 1e3,
               statistics.median(grown[name]))
        rows[name] = dict(zip(COLUMNS, row, strict=True))
    return rows


def judge(claim, paper, here, interval, bounds):
    """A row of the claims table: does the interval lie within the bounds, or outside?"""
    low, high = interval
    verdict = "cannot be told"
    if bounds[0] <= low and high <= bounds[1]:
        verdict = "held"
    elif high < bounds[0] or low > bounds[1]:
        verdict = "did not hold at this size"
    print(f"{verdict}: {claim}: {here}, from {low:.3g} to {high:.3g}; the paper: {paper}")
    interval = [float(f"{low:.3g}"), float(f"{high:.3g}")]
    return {"claim": claim, "paper": paper, "here": here, "interval": interval, "verdict": verdict}


def judge_digits(claim, rows, column, tolerance):
    """A claim on what follows from shapes: the largest of the four differences is an interval."""
    place = COLUMNS.index(column)
    paper, here, largest = 0.0, 0.0, 0.0
    for name, numbers in PAPER.items():
        paper += numbers[place]
        here += rows[name][column]
        largest = max(largest, abs(rows[name][column] - numbers[place]))
    return judge(claim, f"{paper:.2f}", f"{here:.2f}", (largest, largest), (0, tolerance))


def draw_figure(tables, file):
    """The columns of Table 7: the paper's bars, then ours."""
    from matplotlib.figure import Figure

    figure = Figure((13, 4), layout="constrained")
    titles = ("memory [GB]", "time [ms a sample]", "storage [kB a sample]", "step grows by [%]")
    for place, axis in enumerate(figure.subplots(1, 4)):
        for position, name in enumerate(PAPER):
            axis.bar(position, PAPER[name][place], 0.25, color="gray", label="the paper")
            for number, (precision, rows) in enumerate(tables.items()):
                left = position + 0.27 * (number + 1)
                height = rows[name][COLUMNS[place]]
                axis.bar(left, height, 0.25, color=f"C{number}", label=f"here, {precision}")
        axis.set(title=titles[place], yscale="log")
        axis.set_xticks([0.27, 1.27, 2.27, 3.27], list(PAPER))
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[:3], labels[:3], fontsize=8)
    write_atomically(file, partial(figure.savefig, dpi=90, format="png"))


def main(arguments=None):
    """Table 7 beside the paper's, and the claims."""
    options = read_options(Options, __doc__.split("\n")[0], arguments, quick=QUICK, full=FULL)
    watch = Stopwatch(options)
    change, interval = half_precision_change(options, watch.device)
    networks = papers_networks()
    stored = stored_bytes(VAEConfig(), TEXT, RESOLUTION)
    step = step_seconds(options, watch)
    paper = sum(numbers[3] for numbers in PAPER.values())
    print("encoder: GB, ms a sample, kB a sample, % of a step; the paper's numbers in brackets")
    tables, claims = {}, []
    for precision, dtype in PRECISIONS.items():
        encoders = encoder_seconds(options, dtype, watch)
        grown = growth(encoders, step)
        rows = table(networks, stored, encoders, grown, options.batch_size)
        tables[precision] = rows
        for name, row in rows.items():
            print(f"{precision} {name:6}", end="")
            for value, theirs in zip(row.values(), PAPER[name], strict=True):
                print(f"{value:10.2f} ({theirs:g})", end="")
            print()
        longer = statistics.median(grown["all"])
        claims.append(judge(
            f"a step is longer with the encoders in it, in {precision} [%]", f"{paper:.1f}",
            f"{longer:.1f}", (min(grown["all"]), max(grown["all"])), (paper / 2, math.inf)))
    claims.append(judge_digits("memory of the four encoders [GB]", rows, "memory_gb", 0.005))
    claims.append(judge_digits("storage of a sample [kB]", rows, "storage_kb", 0.1))
    claims.append(judge("change of the loss by texts in half precision, relative",
                        "no deterioration", f"{change:.1e}", interval, (-1e-3, 1e-3)))
    settings = asdict(options) | {"checkpoint": portable(find_model_file(options.checkpoint))}
    del settings["out"]
    record = {"command": shlex.join(["python", "experiments/table7_encoders.py", *sys.argv[1:]]),
              "settings": settings, "torch": torch.__version__, "device": str(watch.device),
              "threads": torch.get_num_threads(), "paper": PAPER, "tables": tables,
              "step_ms": 1e3 * statistics.median(step), "claims": claims}
    write_json(options.out, record)
    draw_figure(tables, Path(options.out).with_suffix(".png"))


if __name__ == "__main__":
    command(main)
