"""table1_flows.py: Table 1, Table 2, Fig. 3 and Fig. 11 of the paper (Sec. 5.1, App. B.3): which formulation is best?

Every formulation trains with all else equal: network, start, order of the data, noise, number of steps. The step with the
lowest validation loss of the averaged weights is kept; from it both kinds of weights draw samples with the six samplers of
App. B.3. CLIP score and CLIP-FID, with the CLIP that ships, rank the formulations by non-dominated sorting in each setting.

Each (dataset, formulation, seed) is written as soon as it is done, and skipped when the same command runs again. Ranks among
16 formulations are not ranks among 61: compare the order. The CLIP that ships is tiny; its numbers mean nothing elsewhere.

Run         python experiments/table1_flows.py --quick                4 formulations on scenes, 100 samples, for a CPU
            python experiments/table1_flows.py --minutes 60 --seeds 3 --data PATH      the 16 printed rows, for a GPU
            python experiments/table1_flows.py --formulations rf "edm(0.00, 0.60)" --steps 2000
"""

import argparse
import copy
import dataclasses
import itertools
import json
import math
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from checkpoints import SHIPPED, load_components, write_atomically
from data import HELD_OUT_SEED, ImageFiles, Scenes, to_tensor
from encode import Batches, EncodedImages
from evaluate import CLIPImageConfig, CLIPImageEncoder, clip_score, frechet_distance
from flow import FORMULATIONS, SHOWN_DENSITIES, LogitNormal, formulation, guide
from mmdit import MMDiT, MMDiTConfig
from sample import pick_precision
from train import TrainConfig, World, compute_context, learning_rate, train_step, update_average, validate

SAMPLERS = [(50, 1.0), (50, 2.5), (50, 5.0), (5, 5.0), (10, 5.0), (25, 5.0)]       # Euler steps, guidance scale (App. B.3)
WEIGHTS = ("ema", "raw")
QUICK = ["rf/lognorm(0.00, 1.00)", "rf", "eps/linear", "edm(-1.20, 1.20)"]
PAPER_RANKS = {                                                                     # Table 1: all, 5 steps, 50 steps
    "rf/lognorm(0.00, 1.00)": (1.54, 1.25, 1.50), "rf/lognorm(1.00, 0.60)": (2.08, 3.50, 2.00),
    "rf/lognorm(0.50, 0.60)": (2.71, 8.50, 1.00), "rf/mode(1.29)": (2.75, 3.25, 3.00),
    "rf/lognorm(0.50, 1.00)": (2.83, 1.50, 2.50), "eps/linear": (2.88, 4.25, 2.75), "rf/mode(1.75)": (3.33, 2.75, 2.75),
    "rf/cosmap": (4.13, 3.75, 4.00), "edm(0.00, 0.60)": (5.63, 13.25, 3.25), "rf": (5.67, 6.50, 5.75),
    "v/linear": (6.83, 5.75, 7.75), "edm(0.60, 1.20)": (9.00, 13.00, 9.00), "v/cos": (9.17, 12.25, 8.75),
    "edm/cos": (11.04, 14.25, 11.25), "edm/rf": (13.04, 15.25, 13.25), "edm(-1.20, 1.20)": (15.58, 20.25, 15.00)}
PAPER_METRICS = {                                                                   # Table 2: CLIP, FID on ImageNet and CC12M
    "rf": (0.247, 49.70, 0.217, 94.90), "edm(-1.20, 1.20)": (0.236, 63.12, 0.200, 116.60),
    "eps/linear": (0.245, 48.42, 0.222, 90.34), "v/cos": (0.244, 50.74, 0.209, 97.87),
    "v/linear": (0.246, 51.68, 0.217, 100.76), "rf/lognorm(0.50, 0.60)": (0.256, 80.41, 0.233, 120.84),
    "rf/mode(1.75)": (0.253, 44.39, 0.218, 94.06), "rf/lognorm(1.00, 0.60)": (0.254, 114.26, 0.234, 147.69),
    "rf/lognorm(-0.50, 1.00)": (0.248, 45.64, 0.219, 89.70), "rf/lognorm(0.00, 1.00)": (0.250, 45.78, 0.224, 89.91)}


# ------------------------------------------------------------------------------------------------------------
# Ranks (Sec. 5.1)
# ------------------------------------------------------------------------------------------------------------

def non_dominated_ranks(points) -> list[int]:
    """points: (CLIP score, FID) of each variant. Those that no other beats are rank 1; without them, the next are rank 2, ...

    One beats another if it is at least as good in both (higher score, lower FID) and better in one. Samples that were not
    finite are beaten by all others.
    """
    points = [tuple(p) if all(map(math.isfinite, p)) else (-math.inf, math.inf) for p in points]
    beats = lambda p, q: p[0] >= q[0] and p[1] <= q[1] and p != q
    ranks, rank = [0] * len(points), 0
    while 0 in ranks:
        rank += 1
        left = [i for i, r in enumerate(ranks) if r == 0]
        for i in left:
            if not any(beats(points[j], points[i]) for j in left):
                ranks[i] = rank
    return ranks


def rank_table(scores: dict) -> dict:
    """scores: {control setting: {name: (CLIP, FID)}}, a setting being "dataset weights steps guidance seed". Returns
    {name: (mean rank over all, with 5 steps, with 50 steps)}, best first."""
    collected = {}
    for setting, row in scores.items():
        for name, rank in zip(row, non_dominated_ranks(list(row.values()))):
            collected.setdefault(name, []).append((setting[2], rank))

    def mean(entries, steps=None):
        chosen = [rank for n, rank in entries if steps in (None, n)]
        return sum(chosen) / len(chosen)
    means = {name: (mean(entries), mean(entries, 5), mean(entries, 50)) for name, entries in collected.items()}
    return dict(sorted(means.items(), key=lambda item: item[1][0]))


def agreement(ranks: dict) -> str:
    """One sentence: where the paper's best is here, and how many pairs of variants come in the paper's order (half by chance)."""
    shared = [(ours[0], PAPER_RANKS[name][0]) for name, ours in ranks.items() if name in PAPER_RANKS]
    pairs = [(a[0] - b[0]) * (a[1] - b[1]) for a, b in itertools.combinations(shared, 2) if a[0] != b[0]]
    best = "rf/lognorm(0.00, 1.00)"
    place = f"{best} is number {list(ranks).index(best) + 1} of {len(ranks)}" if best in ranks else f"{best} is not among them"
    return f"{place}; {sum(pair > 0 for pair in pairs)} of {len(pairs)} pairs of variants come in the paper's order."


# ------------------------------------------------------------------------------------------------------------
# One dataset: encoded once, its features of the held-out pictures, its model
# ------------------------------------------------------------------------------------------------------------

class PhotoScenes(Scenes):
    """The built-in scenes with one caption, "a photo of ...", as App. B.3 does with ImageNet's classes."""

    def captions(self, index):
        return (f"a photo of {super().captions(index)[0]}",)


class Study:
    """What all formulations share on one dataset: encoded pictures, prompts and features to compare with, the first weights."""

    def __init__(self, dataset: str, options, config: TrainConfig, world: World):
        self.world, self.config, device = world, config, world.device
        parts = load_components(SHIPPED, ("vae", "text"))
        self.vae, self.text = parts.vae.to(device), parts.text.to(device)
        precision = pick_precision(config.precision, device)
        self.autocast = lambda: compute_context(device, precision)
        if dataset == "scenes":
            sources = PhotoScenes(config.num_scenes, config.seed), PhotoScenes(options.samples, HELD_OUT_SEED)
        else:
            files = ImageFiles(dataset)
            held_out = min(options.samples, len(files) // 5)
            sources = files.subset(range(held_out, len(files))), files.subset(range(held_out))
        encoded = [EncodedImages(source, self.vae, self.text, config.resolution, device, self.autocast, False)
                   for source in sources]
        self.batches, self.held_out = (Batches(part, self.vae, self.text.config, config, world) for part in encoded)
        self.tower = shipped_image_tower().to(device)
        pictures = [sources[1].image(i, config.resolution, config.resolution) for i in range(len(sources[1]))]
        self.real = self.features(torch.stack([to_tensor(picture) for picture in pictures]))
        shown = self.held_out.images
        self.prompts = [shown.captions(i % len(shown))[0] for i in range(options.samples)]
        with torch.no_grad():
            self.context, self.pooled = self.text(self.prompts)
            ids = self.text.tokenize(self.prompts)["clip_l"].to(device)
            self.caption_features = self.text.encoders["clip_l"](ids)[1]
        side = max(16, config.resolution // 16)
        sizes = MMDiTConfig(config.depth, latent_channels=self.vae.config.latent_channels,
                            context_dim=self.text.config.context_dim, pooled_dim=self.text.config.pooled_dim,
                            pos_embed_max_size=side, pos_embed_base_size=side)
        self.model = MMDiT(sizes).to(device)
        self.model.initialize(torch.Generator().manual_seed(config.seed))
        self.first_weights = copy.deepcopy(self.model.state_dict())

    @torch.no_grad()
    def features(self, images):
        """(N, 3, H, W) -> CLIP-L's features (N, d)."""
        return torch.cat([self.tower(part.to(self.world.device)) for part in images.split(64)])

    def start(self):
        """(model, average, optimizer) as every formulation finds them."""
        self.model.load_state_dict(self.first_weights)
        average = copy.deepcopy(self.model).requires_grad_(False)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.config.lr, betas=(0.9, 0.99), eps=1e-15,
                                      weight_decay=self.config.weight_decay, fused=True)
        return self.model, average, optimizer

    def train(self, form, steps: int, validations: int = 10):
        """({"ema": weights, "raw": weights} at the best validation, that step and loss): the core's own step and schedule."""
        model, average, optimizer = self.start()
        best = {"step": 0, "validation": float("inf")}
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = self.config.lr * learning_rate(step, steps, self.config)
            *_, norm = train_step(model, [optimizer], self.batches(step), form, self.config, self.autocast)
            if math.isfinite(norm):
                update_average(average, model, step, steps, self.config)
            if (step + 1) % max(1, steps // validations) == 0 or step + 1 == steps:
                loss = validate(average, self.held_out, form, self.autocast)[:-1].mean().item()       # without t = 1
                if loss < best["validation"]:
                    best = {"step": step + 1, "validation": loss}
                    weights = [{k: v.clone() for k, v in network.state_dict().items()} for network in (average, model)]
        if not best["step"]:
            raise RuntimeError(f"{form.name}: the validation loss was never finite; lower the learning rate in TrainConfig")
        return dict(zip(WEIGHTS, weights)), best

    @torch.no_grad()
    def measure(self, form, steps: int, guidance_scale: float, batch_size: int = 100):
        """(CLIP score, CLIP-FID) of samples by the model as it is: Euler, the same noise for all. guidance 1 is one pass."""
        channels, side = self.vae.config.latent_channels, self.config.resolution // 8
        noise = torch.randn(len(self.prompts), channels, side, side, generator=torch.Generator().manual_seed(1))
        found = []
        for start in range(0, len(noise), batch_size):
            part = slice(start, start + batch_size)
            z, context, pooled = noise[part].to(self.world.device), self.context[part], self.pooled[part]
            zeros = self.text.unconditional(len(z))

            def predict(z, t, context=context, pooled=pooled, zeros=zeros):
                with self.autocast():
                    if guidance_scale == 1:
                        return self.model(z, t, context, pooled).float()
                    both = (torch.cat([x, y.to(x)]) for x, y in zip((context, pooled), zeros))
                    cond, uncond = self.model(torch.cat([z, z]), torch.cat([t, t]), *both).float().chunk(2)
                return guide(cond, uncond, guidance_scale)
            latents = form.sample(predict, z, form.schedule(steps))
            with self.autocast():
                images = torch.cat([self.vae.decode(piece) for piece in latents.split(16)]).float().clamp(-1, 1)
            found.append(self.features(images))
        found = torch.cat(found)
        return clip_score(found, self.caption_features).item(), frechet_distance(found, self.real).item()

    def run(self, name: str, steps: int) -> dict:
        """Everything about one formulation."""
        form, started = formulation(name), time.time()
        weights, best = self.train(form, steps)
        trained, metrics = time.time(), {}
        for kind in WEIGHTS:
            self.model.load_state_dict(weights[kind])
            for num_steps, scale in SAMPLERS:
                metrics[f"{kind} {num_steps} {scale:g}"] = self.measure(form, num_steps, scale)
        return {**best, "training_seconds": round(trained - started, 1), "sampling_seconds": round(time.time() - trained, 1),
                "metrics": metrics}


def shipped_image_tower():
    """CLIP-L's image tower that ships beside the small model."""
    from safetensors.torch import load_file

    prefix = "clip_l_image."
    stored = load_file(SHIPPED / "clip_image.safetensors")
    tensors = {key.removeprefix(prefix): v.float() for key, v in stored.items() if key.startswith(prefix)}
    patch = tensors["patch_embedding.weight"].shape[-1]
    num_patches = tensors["position_embedding.weight"].shape[0] - 1
    layers = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("layers."))
    tower = CLIPImageEncoder(CLIPImageConfig(round(num_patches**0.5) * patch, patch, tensors["class_token"].shape[0], layers,
                                             tensors["projection.weight"].shape[0]))
    tower.load_state_dict(tensors)
    return tower.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------
# Tables and figures
# ------------------------------------------------------------------------------------------------------------

def collect(runs: dict) -> dict:
    """{(dataset, weights, steps, guidance, seed): {name: (CLIP, FID)}} of the settings that every formulation has."""
    scores = {}
    for key, run in runs.items():
        dataset, name, seed = key.split(" | ")
        for setting, values in run["metrics"].items():
            kind, steps, scale = setting.split()
            scores.setdefault((dataset, kind, int(steps), scale, seed), {})[name] = tuple(values)
    names = max((len(row) for row in scores.values()), default=0)
    return {setting: row for setting, row in scores.items() if len(row) == names}


def write_tables(record: dict, file: Path):
    """Table 1, Table 2 and the numbers of Fig. 3 as markdown, the paper's beside ours."""
    scores, lines = collect(record["runs"]), []
    ranks = rank_table(scores)
    count, datasets = len(ranks), sorted({setting[0] for setting in scores})
    seeds = len({setting[4] for setting in scores})
    runs = record["runs"].values()
    training, sampling = (statistics.mean(run[f"{what}_seconds"] for run in runs) for what in ("training", "sampling"))
    lines += [f"# Table 1: {count} formulations, {len(scores)} control settings ({', '.join(datasets)}; {seeds} seed(s))", "",
              f"{record['settings']['steps']} steps of {record['settings']['batch_size']} pictures each, depth "
              f"{record['settings']['depth']}, {record['settings']['samples']} samples a setting. `{record['command']}`", "",
              f"{len(runs) * (training + sampling) / 60:.0f} minutes on {record.get('device', '?')}: {training:.0f} s of "
              f"training and {sampling:.0f} s of sampling for each variant, dataset and seed.", "",
              f"Our ranks are among {count}, the paper's among 61: compare the order. {agreement(ranks)}", "",
              "| variant | all | 5 steps | 50 steps | paper: all | 5 steps | 50 steps |", "|---|---|---|---|---|---|---|"]
    dashes = ("", "", "")
    for name, ours in ranks.items():
        paper = [f"{x:.2f}" for x in PAPER_RANKS[name]] if name in PAPER_RANKS else dashes
        lines.append(f"| {name} | " + " | ".join([*(f"{x:.2f}" for x in ours), *paper]) + " |")
    for title, steps in (("Table 2: 25 steps, guidance 5, averaged weights", (25,)),
                         ("Fig. 3: CLIP-FID by number of steps, guidance 5, averaged weights", (5, 10, 25, 50))):
        lines += ["", f"# {title}", "", "| variant | " + " | ".join(
            f"{dataset} {what} {n}" for dataset in datasets for n in steps for what in (("CLIP", "FID") if len(steps) == 1 else
                                                                                       ("FID",)))
            + (" | paper: CLIP, FID ImageNet, CLIP, FID CC12M |" if len(steps) == 1 else " |")]
        lines.append("|---" * (lines[-1].count("|") - 1) + "|")
        for name in ranks:
            cells = []
            for dataset in datasets:
                for n in steps:
                    values = [row[name] for setting, row in scores.items() if setting[:4] == (dataset, "ema", n, "5")]
                    means = [sum(column) / len(column) for column in zip(*values)]
                    cells += [f"{means[0]:.3f}", f"{means[1]:.4g}"] if len(steps) == 1 else [f"{means[1]:.4g}"]
            if len(steps) == 1:
                cells.append(", ".join(map(str, PAPER_METRICS.get(name, ()))))
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    write_atomically(file, lambda partial: partial.write_text("\n".join(lines) + "\n"))


def draw_figures(record: dict, file: Path):
    """Fig. 3 (CLIP-FID by number of steps) and Fig. 11 (densities of t) in one PNG."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    scores, figure = collect(record["runs"]), Figure((16, 5), layout="constrained")
    fig3, modes, lognorms = figure.subplots(1, 3)
    fig3.set_prop_cycle(color=colormaps["tab20"].colors)
    for name in rank_table(scores):
        points = {}
        for setting, row in scores.items():
            if setting[1] == "ema" and setting[3] == "5":
                points.setdefault(setting[2], []).append(row[name][1])
        fig3.plot(sorted(points), [sum(points[n]) / len(points[n]) for n in sorted(points)], "o-", label=name)
    fig3.set(title="Fig. 3: CLIP-FID, guidance 5", xlabel="sampling steps")
    t = torch.linspace(0.002, 0.998, 400, dtype=torch.float64)
    for density in SHOWN_DENSITIES:
        (lognorms if isinstance(density, LogitNormal) else modes).plot(t, density.pdf(t), label=str(density))
    modes.set(title="Fig. 11, left", xlabel="t", ylim=(0, 5))
    lognorms.set(title="Fig. 11, right", xlabel="t")
    fig3.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    for axis in (modes, lognorms):
        axis.legend(fontsize=7)
    write_atomically(file, lambda partial: figure.savefig(partial, dpi=100, format="png"))


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------

def parse_options():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--formulations", nargs="+", help="names as in the paper, or all (61); default the 16 of Table 1")
    parser.add_argument("--quick", action="store_true", help="4 formulations, scenes only, 100 samples, a minute each")
    parser.add_argument("--data", help="second dataset: as train.py --data; without it, scenes only")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training per formulation, dataset and seed")
    parser.add_argument("--steps", type=int, default=0, help="instead of minutes")
    parser.add_argument("--samples", type=int, default=1000, help="per sampler setting (App. B.3: 1000)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--num-scenes", type=int, default=16384)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "table1.json")
    options = parser.parse_args()
    if options.quick:
        options.formulations, options.samples = options.formulations or QUICK, min(options.samples, 100)
        options.minutes, options.num_scenes = min(options.minutes, 1.0), min(options.num_scenes, 4096)
    names = FORMULATIONS if options.formulations == ["all"] else options.formulations or list(PAPER_RANKS)
    try:
        options.formulations = [formulation(name).name for name in names]
    except ValueError as problem:
        parser.error(str(problem))
    if min(options.samples, options.seeds, options.depth, options.num_scenes) < 1 or options.minutes <= 0 or options.steps < 0:
        parser.error("--samples, --seeds, --depth and --num-scenes must be at least 1, --minutes and --steps positive")
    return options


def steps_that_fit(study: Study, minutes: float, trials: int = 5) -> int:
    """Steps in these minutes, from the median time of one (of rectified flow: the network dominates)."""
    model, _, optimizer = study.start()
    times = []
    for step in range(trials + 1):
        start = time.time()
        train_step(model, [optimizer], study.batches(step), formulation("rf"), study.config, study.autocast)
        times.append(time.time() - start)
    return max(1, int(60 * minutes / sorted(times[1:])[trials // 2]))


def main():
    """Train, sample, measure what is missing; then write the tables from all there is."""
    options = parse_options()
    record = json.loads(options.out.read_text()) if options.out.is_file() else {"runs": {}}
    settings = {name: getattr(options, name) for name in ("depth", "samples", "num_scenes", "batch_size")}
    stored = record.get("settings", settings)
    wrong = [name for name in settings if stored[name] != settings[name]] + \
            (["steps"] if options.steps and stored.get("steps", options.steps) != options.steps else [])
    if wrong:
        sys.exit(f"table1_flows.py: {options.out} was made with {wrong[0]} = {stored[wrong[0]]}; runs with another cannot be "
                 f"compared. Give the same, or another --out")
    world = World(options.device)
    for seed in range(options.seeds):
        config = dataclasses.replace(TrainConfig(lr=1e-3, cooldown=0.4), seed=seed, depth=options.depth, resolution=64,
                                     num_scenes=options.num_scenes, batch_size=options.batch_size)
        for dataset in ("scenes", *([options.data] if options.data else [])):
            key = lambda name, dataset=dataset, seed=seed: f"{Path(dataset).name} | {name} | {seed}"
            missing = [name for name in options.formulations if key(name) not in record["runs"]]
            if not missing:
                continue
            study = Study(dataset, options, config, world)
            steps = stored.get("steps") or options.steps or steps_that_fit(study, options.minutes)
            stored = record["settings"] = {**settings, "steps": steps}
            record |= {"command": shlex.join(["python", *sys.argv]), "device": str(world.device), "torch": torch.__version__}
            for name in missing:
                result = record["runs"][key(name)] = study.run(name, steps)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(options.out, lambda partial: partial.write_text(json.dumps(record, indent=1) + "\n"))
                print(f"{key(name)}: best step {result['step']} of {steps}, {result['training_seconds']:.0f} s training, "
                      f"{result['sampling_seconds']:.0f} s sampling", flush=True)
    write_tables(record, options.out.with_suffix(".md"))
    print(options.out.with_suffix(".md").read_text())
    try:
        draw_figures(record, options.out.with_suffix(".png"))
    except ImportError:
        print("no figures: matplotlib is not installed")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as problem:
        sys.exit(f"table1_flows.py: {problem}")
