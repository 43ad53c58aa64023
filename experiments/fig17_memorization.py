"""fig17_memorization.py: models copy what is often repeated (SD3, App. E.3, Algorithm 2, Fig. 17).

Some scenes come many times in a training set, as near-duplicates: brighter or darker, with another
contrast, as JPEGs. One model trains on that set, another one on the same set with each scene once.
Both train for the same number of steps. Then both draw many pictures of each prompt whose scene was
repeated. Algorithm 2 infers, from these pictures alone, how many are memorised: those that lie in a
large clique of pictures nearly equal to each other. The caption says what a scene holds, but not
where. So a model that has memorised nothing puts things at different places.

Distance  A picture is divided into 4 x 4 tiles, of 16 x 16 px here and of 128 x 128 px in the
          paper. The distance of two pictures is the largest l2 distance of two tiles at the same
          place. As in Carlini et al. (2023), values lie in [0, 1] and the squared distance is
          divided by their number. Then .15 has a meaning at every size. Here most things may move
          by one pixel, and some by two.
Controls  The training set is known, so the copies that the attack tries to infer are counted, too:
          pictures that are nearer than .15 to the training scene of their prompt. And chance alone
          makes cliques: the attack also runs on scenes of the same things at random places, as many
          as pictures are drawn. That is also why --full draws 100 pictures of a prompt, not 500.
Differs   The paper trains Stable Diffusion 2.1 on photographs, with 350,000 prompts and 500
          pictures of each, which are larger and vary more. It removes near-duplicates by SSCD
          above .5. Here they are removed by known truth (fig16_deduplication.py does it by
          Algorithm 1), and guidance is off. Pictures are compared with those of the same prompt
          only. Where a graph has very many cliques, only some are looked at. The sizes are then
          lower bounds, and "all_cliques" is false.

Verdicts: a claim holds if it is true with every seed, and there are two or more. It did not hold if
it is false with every seed. Deduplication leaves fewer memorised pictures if it leaves half of them
or less, at clique size 10; if it leaves as many or more, that is false. A clique size counts if at
least one model has a picture in a clique of that size. The last claim is about both models
together, because nearly all pictures of the first one are copies, whether a clique marks them or
not. It is true if nine tenths of the marked pictures are copies, and if the others are copies less
often. Nothing can be told if the first model has memorised nothing at clique size 10.

Run   python experiments/fig17_memorization.py --quick      five minutes on one CPU core
      python experiments/fig17_memorization.py --full       a GPU
"""

import io
import shlex
import sys
import tempfile
from collections import namedtuple
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from batches import Batch
from checkpoints import SHIPPED, find_model_file, load_components, portable
from data import to_tensor
from devices import World, autocast, command, pick_precision
from flow import LogitNormal
from mmdit import MMDiT, model_sizes
from options import check_options, option, read_options, write_atomically, write_json
from sample import Pipeline, generate
from scenes import draw_scene, make_scene, scene_captions
from train import Run, TrainConfig, fit, flow_loss

CLAIM = ("claim", "paper", "here", "interval", "verdict")
SIZE = 64                                                             # px per side
SETS = ("duplicated", "deduplicated")
PAPER_CLIQUE = 10                                                     # Carlini et al. 2023
MOST_CLIQUES = 10**5                                                  # looked at in one graph
SAMPLING = {"num_steps": 25, "guidance_scale": 1.0, "schedule": "shifted", "timestep_shift": 1.0,
            "unconditional": "zeros", "height": SIZE, "width": SIZE}


@dataclass(frozen=True)
class Options:
    """What is trained, and what is drawn with it."""
    num_scenes: int = option(2048, "different scenes in the training set", 4, 10**6)
    repeated: int = option(16, "of these, scenes that have near-duplicates", 1, 10**4)
    copies: int = option(64, "near-duplicates of each", 1, 10**4)
    epsilon: float = option(0.15, "pictures nearer than that are nearly equal", 0, 1)
    cliques: tuple[int, ...] = option((2, 5, 10, 15, 20), "clique sizes T to compare", 2, 10**4)
    num_pictures: int = option(50, "pictures of each prompt; the paper has 500", 10, 10**4)
    depth: int = option(4, "size of the models", 1, 64)
    steps: int = option(4000, "training steps of each model", 1, 10**8)
    batch_size: int = option(64, "pictures in a step", 1, 10**5)
    seeds: int = option(2, "repetitions", 1, 100)
    encoders: str = option(str(SHIPPED), "model with the frozen VAE and text encoders")
    device: str = option("auto", "cuda, mps or cpu")
    out: str = option(str(ROOT / "results" / "fig17_memorization.json"), "what is measured")

    def __post_init__(self):
        check_options(self)
        object.__setattr__(self, "cliques", tuple(sorted({*self.cliques, PAPER_CLIQUE})))
        if self.repeated > self.num_scenes:
            raise ValueError(f"--repeated {self.repeated} of --num-scenes {self.num_scenes}: only "
                             f"scenes of the set can be repeated")


QUICK = {"num_scenes": 512, "repeated": 6, "copies": 128, "cliques": (2, 5, 10, 15),
         "num_pictures": 20, "depth": 2, "steps": 700, "batch_size": 32}
FULL = {"num_scenes": 32768, "repeated": 32, "copies": 512, "cliques": (2, 5, 10, 20, 50, 100),
        "num_pictures": 100, "depth": 6, "steps": 8000, "batch_size": 128}


# --- The training sets ----------------------------------------------------------------------------

def near_copy(picture, rng):
    """A near-duplicate of a picture, uint8 (H, W, 3). rng: a generator of numpy."""
    image = ImageEnhance.Brightness(Image.fromarray(picture)).enhance(rng.uniform(0.9, 1.1))
    image = ImageEnhance.Contrast(image).enhance(rng.uniform(0.9, 1.1))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(rng.integers(30, 90)))
    return np.array(Image.open(file))


def draw_set(options, seed):
    """(pictures, captions, repeated scenes). First come the scenes that are repeated, then the
    others, then the near-duplicates. So the first --num-scenes are the set without duplicates.

    Repeated scenes hold one thing each, because its place is free, and have different captions.
    """
    repeated, scenes = {}, []                                         # {caption: picture}
    others = []                                                       # (caption, picture) each
    known = set()                                                     # pictures so far
    index = 0
    while len(repeated) + len(others) < options.num_scenes:
        scene = make_scene(seed, index, SIZE, SIZE)
        index += 1
        picture = draw_scene(scene)
        if picture.tobytes() in known:                                # Words alone can be equal.
            continue
        known.add(picture.tobytes())
        caption = scene_captions(scene)[1]                            # the full one
        free = scene.kind == "single" and caption not in repeated
        if len(repeated) < options.repeated and free:
            repeated[caption] = picture
            scenes.append(scene)
        elif len(others) < options.num_scenes - options.repeated:
            others.append((caption, picture))
    copies = []
    rng = np.random.default_rng(seed)
    for caption, picture in repeated.items():
        for _ in range(options.copies):
            copies.append((caption, near_copy(picture, rng)))
    captions, pictures = zip(*repeated.items(), *others, *copies, strict=True)
    return pictures, captions, scenes


# Latents (N, C, H, W) of pictures, context (N, L, D) and pooled (N, P) of their captions.
Encoded = namedtuple("Encoded", "latent context pooled")


@torch.no_grad()
def encode(pictures, captions, pipeline):
    """The frozen networks' part of the training, done once: an Encoded, on the device."""
    parts = []
    for start in range(0, len(pictures), 64):
        images = [to_tensor(picture) for picture in pictures[start : start + 64]]
        image = torch.stack(images).to(pipeline.device)               # (64, 3, 64, 64)
        with autocast(pipeline.device, pipeline.precision):
            latent = pipeline.vae.encode(image)
            context, pooled = pipeline.text(captions[start : start + 64])
        parts.append((latent.float(), context.float(), pooled.float()))
    return Encoded(*map(torch.cat, zip(*parts, strict=True)))


def train(encoded, count, sizes, options, seed, world):
    """A model trained on the first `count` pictures. Returns its average."""
    device = encoded.latent.device

    def batches(step):
        rng = torch.Generator().manual_seed(seed * 10**9 + step)
        chosen = torch.randint(count, (options.batch_size,), generator=rng).to(device)
        latent = encoded.latent[chosen]                               # (B, C, H, W)
        noise = torch.randn(latent.shape, generator=rng).to(device)
        uniform = torch.rand(options.batch_size, generator=rng).clamp(1e-6, 1 - 1e-6)
        return Batch(latent, encoded.context[chosen], encoded.pooled[chosen], noise, uniform)

    config = TrainConfig(steps=options.steps, every=options.steps, lr=1e-3, seed=seed,
                         batch_size=options.batch_size, device=options.device)
    model = MMDiT(sizes)
    model.initialize(torch.Generator().manual_seed(seed))
    loss = partial(flow_loss, density=LogitNormal(), timestep_shift=1.0)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), config, world)
        return fit(model.to(world.device), loss, batches, config, run)


# --- Algorithm 2 ----------------------------------------------------------------------------------

def tile_distance(x, y):
    """The largest l2 distance of 16 tiles, of each picture of x from each of y: (N, M) in [0, 1].

    x (N, 3, H, W), y (M, 3, H, W) in [-1, 1]. The distance of two tiles is the root of the mean of
    the squared differences of their values, which lie in [0, 1].
    """
    def tiles(image):
        image = (image + 1) / 2
        image = image.unflatten(3, (4, -1)).unflatten(2, (4, -1))     # (N, 3, 4, H/4, 4, W/4)
        image = image.permute(2, 4, 0, 1, 3, 5)                       # (4, 4, N, 3, H/4, W/4)
        return image.flatten(3).flatten(0, 1)                         # (16, N, 3 H W / 16)

    tiles_x, tiles_y = tiles(x), tiles(y)
    exact = "donot_use_mm_for_euclid_dist"                            # Products would be rounded.
    distance = torch.cdist(tiles_x, tiles_y, compute_mode=exact)      # (16, N, M)
    return distance.amax(dim=0) / tiles_x.shape[2] ** 0.5             # (N, M)


def largest_cliques(distance, epsilon):
    """Algorithm 2, lines 7 to 13: the size of the largest clique that contains each picture, (N,).

    distance: (N, N), of all pairs of pictures that were generated for a prompt. The pictures of a
    clique of T or more are those whose size is T or more. Also returns whether all were looked at.
    """
    import networkx

    graph = networkx.Graph()
    for i, j in (distance < epsilon).nonzero().tolist():              # 7, 8
        if i < j:
            graph.add_edge(i, j)                                      # 9
    sizes = [1] * len(distance)                                       # A picture alone has no edge.
    seen = 0
    for clique in islice(networkx.find_cliques(graph), MOST_CLIQUES):
        seen += 1
        for node in clique:                                           # 12
            sizes[node] = max(sizes[node], len(clique))               # 13
    return torch.tensor(sizes), seen < MOST_CLIQUES


def by_chance(scenes, options, seed):
    """How many pictures Algorithm 2 marks for each T of --cliques if every picture shows the thing
    of its scene at a random place."""
    marked = [0] * len(options.cliques)
    rng = np.random.default_rng((seed, 1))
    for scene in scenes:
        thing = scene.things[0]
        images = []
        for _ in range(options.num_pictures):
            left, top = rng.integers(1, SIZE - thing.diameter, size=2).tolist()
            moved = replace(scene, things=(replace(thing, left=left, top=top),))
            images.append(to_tensor(draw_scene(moved)))
        images = torch.stack(images)                                  # (N, 3, H, W)
        sizes, _ = largest_cliques(tile_distance(images, images), options.epsilon)
        for place, T in enumerate(options.cliques):
            marked[place] += (sizes >= T).sum().item()
    return marked


def attack(pipeline, prompts, originals, options, seed):
    """Draws --num-pictures of each prompt (lines 2 to 6) and runs Algorithm 2 on them.

    originals: (P, 3, H, W), the training scenes of the prompts. Returns what was found, with one
    number for each T of --cliques, and the first pictures of each prompt.
    """
    found = {"pictures": 0, "copies": 0, "all_cliques": True,
             "memorized": [0] * len(options.cliques), "right": [0] * len(options.cliques)}
    shown = []
    for number, prompt in enumerate(prompts):                         # 2
        first = seed * 10**6 + number * options.num_pictures
        drawn = generate(pipeline, [prompt] * options.num_pictures, first, 64)      # 3, 4
        images = torch.stack([to_tensor(picture) for picture in drawn])
        images = images.to(pipeline.device)                           # (N, 3, H, W)
        sizes, complete = largest_cliques(tile_distance(images, images), options.epsilon)
        original = originals[number : number + 1].to(pipeline.device)
        near = tile_distance(images, original)[:, 0] < options.epsilon
        is_copy = near.cpu()                                          # (N,)
        for place, T in enumerate(options.cliques):
            marked = sizes >= T                                       # 14, 15: (N,)
            found["memorized"][place] += marked.sum().item()
            found["right"][place] += (marked & is_copy).sum().item()
        found["pictures"] += len(drawn)
        found["copies"] += is_copy.sum().item()
        found["all_cliques"] = found["all_cliques"] and complete
        shown.append(drawn[:6])
    return found, shown


def run_seed(seed, pipeline, options, world):
    """{set: what the attack found}, and {name: pictures} of the first two prompts."""
    pictures, captions, scenes = draw_set(options, seed)
    encoded = encode(pictures, captions, pipeline)
    config = TrainConfig(resolution=SIZE, depth=options.depth)
    sizes = model_sizes(config, pipeline.vae.config, pipeline.text.config, SIZE)
    prompts = captions[: options.repeated]
    originals = torch.stack([to_tensor(picture) for picture in pictures[: options.repeated]])
    place = options.cliques.index(PAPER_CLIQUE)
    results = {"by_chance": by_chance(scenes, options, seed)}
    shown = {"in training": pictures[: min(2, options.repeated)]}
    for name, count in zip(SETS, (len(pictures), options.num_scenes), strict=True):
        pipeline.mmdit = train(encoded, count, sizes, options, seed, world)
        found, drawn = attack(pipeline, prompts, originals, options, seed)
        results[name] = found
        shown[name] = drawn[:2]
        print(f"seed {seed}, {name} set of {count} pictures: of {found['pictures']} drawn, "
              f"{found['memorized'][place]} lie in cliques of {PAPER_CLIQUE}, and "
              f"{found['copies']} are copies of the training picture; by chance "
              f"{results['by_chance'][place]} would", flush=True)
    return results, shown


# --- Verdicts, figure, command line ---------------------------------------------------------------

def judge(truths):
    """The verdict on a claim. truths: is it true, for each seed? None: that cannot be told."""
    if len(truths) < 2 or None in truths or len(set(truths)) > 1:
        return "cannot be told"
    return "held" if truths[0] else "did not hold at this size"


def is_halved(before, after):
    """True, False or None: does deduplication leave half of the memorised pictures or less?"""
    if before and 2 * after <= before:
        return True
    return False if after >= max(1, before) else None


def shares_of_copies(found, place):
    """(share of copies among the marked pictures of both models, the same among the others)."""
    marked = right = copies = pictures = 0
    for name in SETS:
        marked += found[name]["memorized"][place]
        right += found[name]["right"][place]
        copies += found[name]["copies"]
        pictures += found[name]["pictures"]
    return right / max(1, marked), (copies - right) / max(1, pictures - marked)


def claims(seeds, options):
    """Rows of the claims table; intervals are ranges over seeds. seeds: what `run_seed` found."""
    place = options.cliques.index(PAPER_CLIQUE)
    counts, drops, least_drops, shares = [], [], [], []
    fewer, always, right, chance = [], [], [], []                     # chance: numbers
    for found in seeds:
        before, after = found["duplicated"], found["deduplicated"]
        differences = []
        for ours, theirs in zip(before["memorized"], after["memorized"], strict=True):
            if ours > 0 or theirs > 0:
                differences.append(ours - theirs)
        marked, left = before["memorized"][place], after["memorized"][place]
        counts.append((marked, left))
        drops.append(marked - left)
        least_drops.append(min(differences, default=0))
        fewer.append(is_halved(marked, left))
        always.append(least_drops[-1] > 0 if marked else None)
        share, share_of_others = shares_of_copies(found, place)
        shares.append(share)
        right.append(share >= 0.9 and share_of_others < share if marked else None)
        chance.append(found["by_chance"][place])
    first, last = torch.tensor(counts).double().mean(dim=0).tolist()
    sizes = ", ".join(map(str, options.cliques))
    rows = [
        (f"deduplication leaves fewer memorised pictures, at clique size {PAPER_CLIQUE}",
         "Fig. 17: 5 times fewer", f"{first:g} -> {last:g}, by chance {sum(chance) / len(chance):g}"
         "; interval: difference", drops, fewer),
        (f"so it does at all clique sizes: {sizes}", "Fig. 17",
         f"at least {min(least_drops)} fewer at each", least_drops, always),
        (f"pictures in cliques of {PAPER_CLIQUE} are copies of the training scene of their prompt",
         "E.3: it is likely", f"{sum(shares) / len(shares):.3f} of them", shares, right)]
    table = []
    for claim, paper, here, values, truths in rows:
        interval = [round(min(values), 4), round(max(values), 4)]
        table.append(dict(zip(CLAIM, (claim, paper, here, interval, judge(truths)), strict=True)))
    return table


def draw_figure(seeds, shown, options, file):
    """Fig. 17, and pictures of the first two prompts of the first seed."""
    from matplotlib.figure import Figure

    figure = Figure((10, 4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.4))
    axis = left.subplots()
    for seed, found in enumerate(seeds):
        for number, name in enumerate(SETS):
            label = "" if seed else f"{name} set"
            counts = found[name]["memorized"]
            axis.plot(options.cliques, counts, "o-", color=f"C{number}", label=label)
            axis.axhline(found[name]["copies"], color=f"C{number}", lw=0.5, ls="--")
        axis.plot(options.cliques, found["by_chance"], ":", color="gray",
                  label="" if seed else "by chance")
    axis.set(xlabel="clique size T", ylabel="memorised pictures", xticks=options.cliques)
    axis.set_title("dashed: true copies, nearer than epsilon", fontsize=9)
    axis.legend()
    rows = []
    for prompt, original in enumerate(shown["in training"]):
        for name in SETS:
            rows.append((name, [original, *shown[name][prompt]]))
    axes = right.subplots(len(rows), 7, squeeze=False)
    for row, (name, pictures) in enumerate(rows):
        axes[row, 0].set_ylabel(name, fontsize=8)
        for column, picture in enumerate(pictures):
            axes[row, column].imshow(picture, interpolation="nearest")
            axes[row, column].set(xticks=[], yticks=[])
    axes[0, 0].set_title("in training", fontsize=8)
    axes[0, 1].set_title("drawn", fontsize=8)
    write_atomically(file, partial(figure.savefig, dpi=80, format="png"))


def main(arguments=None):
    """Trains on both sets with all seeds, attacks, prints the claims and draws Fig. 17."""
    options = read_options(Options, __doc__.split("\n")[0], arguments, quick=QUICK, full=FULL)
    world = World(options.device)
    precision = pick_precision("auto", world.device)
    parts = load_components(find_model_file(options.encoders), ("vae", "text"), precision)
    pipeline = Pipeline(None, parts.vae.to(world.device), parts.text.to(world.device), SAMPLING,
                        world.device, precision)
    seeds, shown = [], None
    for seed in range(options.seeds):
        found, pictures = run_seed(seed, pipeline, options, world)
        seeds.append(found)
        shown = shown or pictures
    table = claims(seeds, options)
    for row in table:
        print(f"{row['verdict']}: {row['claim']} ({row['paper']}); here {row['here']}, with the "
              f"seeds from {row['interval'][0]} to {row['interval'][1]}")
    settings = asdict(options) | {"encoders": portable(find_model_file(options.encoders)),
                                  "sampling": SAMPLING}
    del settings["out"]
    words = ["python", "experiments/fig17_memorization.py", *sys.argv[1:]]
    record = {"command": shlex.join(words), "settings": settings, "device": str(world.device),
              "threads": torch.get_num_threads(), "seeds": seeds, "claims": table}
    write_json(options.out, record)
    draw_figure(seeds, shown, options, Path(options.out).with_suffix(".png"))


if __name__ == "__main__":
    command(main)
