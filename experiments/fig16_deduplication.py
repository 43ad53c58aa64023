"""fig16_deduplication.py: copies are found and removed (SD3, App. E.2, Algorithm 1, Fig. 16).

Some of the drawn scenes are repeated: exactly, or brighter, with another contrast, shifted by a
pixel, as a JPEG of low quality, blurred, or cropped and enlarged. FAISS sorts all pictures into
clusters by k-means, and Algorithm 1 walks through each cluster, with several thresholds. Which
pictures show the same scene is known. Two scenes are never copies, even if they share a caption.

Share removed   of all pictures, as in Fig. 16. One version of each scene should stay.
Recall          the share of the superfluous versions that are removed
Precision       the share of the removed pictures of which another version stays
Lost            the share of the scenes of which no version stays

Differs   The paper describes pictures by SSCD, a trained network that is not ours to ship. Here it
          is a thumbnail of 16 x 16 px in colour, less its mean, at unit length. It was chosen on
          1,500 other scenes and 1,400 copies of 200 of them. Above .93 it finds 97 % of the copies,
          and 2.8 % of the scenes have a false neighbour. The CLIP image tower that ships finds 66 %
          above .99, where 3.7 % have one: its features see shapes better than places. Thumbnails
          are blind to contrast: a black word on white equals the same word on gray. The thresholds
          are not those of SSCD. The paper has 16,000 clusters.

Verdicts: a claim holds if it is true with every seed, and there are two or more; it did not hold if
it is true with none. Recall and precision must both be .9 or more. Clusters lose little if their
recall is at most .02 lower than that of one cluster. The verdicts on recall, precision and clusters
are about --threshold. That a lower threshold removes more could hardly be otherwise.

Run   python experiments/fig16_deduplication.py --quick            half a minute on one CPU core
      python experiments/fig16_deduplication.py --full             an hour; no GPU is used
      python experiments/fig16_deduplication.py --data FOLDER      copies among your own captioned
                          pictures, cropped to squares; photographs may need another --threshold
"""

import io
import shlex
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from data import ImageFiles, to_tensor
from devices import command
from options import check_options, option, read_options, write_atomically, write_json
from scenes import draw_scene, make_scene

CLAIM = ("claim", "paper", "here", "interval", "verdict")
KINDS = ("exact", "brightness", "contrast", "shift", "jpeg", "blur", "crop")
SIZE = 64                                                             # px per side
THUMBNAIL = 16                                                        # px per side


@dataclass(frozen=True)
class Options:
    """What is drawn, and how copies are found in it."""
    data: str = option("", "your captioned pictures in place of scenes; then nothing is written")
    num_scenes: int = option(1500, "different scenes", 10, 10**6)
    copied: float = option(0.2, "share of them that have copies", 0.01, 1)
    most_copies: int = option(12, "copies of a scene: from 1 to this many", 1, 1000)
    thresholds: tuple[float, ...] = option((0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.99, 0.999),
                                           "cosines above which pictures are copies", -1, 0.9999)
    threshold: float = option(0.93, "the one of them that the claims are about", -1, 0.9999)
    clusters: int = option(64, "clusters; the paper has 16,000", 1, 10**6)
    seeds: int = option(3, "repetitions", 1, 100)
    out: str = option(str(ROOT / "results" / "fig16_deduplication.json"), "what is measured")

    def __post_init__(self):
        check_options(self)
        object.__setattr__(self, "thresholds", tuple(sorted(set(self.thresholds))))
        if len(self.thresholds) < 2 or self.threshold not in self.thresholds:
            raise ValueError(f"--thresholds {self.thresholds}: give two or more, and --threshold "
                             f"{self.threshold} must be among them")


QUICK = {"num_scenes": 1000, "seeds": 2}
FULL = {"num_scenes": 10000, "clusters": 256}


# --- Pictures of which the truth is known ---------------------------------------------------------

def make_copy(picture, kind, rng):
    """A copy of a picture, uint8 (H, W, 3). kind: one of KINDS. rng: a generator of numpy."""
    image = Image.fromarray(picture)
    factor = rng.choice([0.85, 0.9, 1.1, 1.15])
    if kind == "brightness":
        image = ImageEnhance.Brightness(image).enhance(factor)
    elif kind == "contrast":
        image = ImageEnhance.Contrast(image).enhance(factor)
    elif kind == "shift":
        around = np.pad(picture, ((1, 1), (1, 1), (0, 0)), "edge")
        top, left = [(0, 1), (1, 0), (2, 1), (1, 2)][rng.integers(4)]          # (1, 1): no shift
        image = Image.fromarray(around[top : top + len(picture), left : left + picture.shape[1]])
    elif kind == "jpeg":
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(rng.integers(10, 40)))
        image = Image.open(file)
    elif kind == "blur":
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 1.2)))
    elif kind == "crop":
        margin = rng.integers(1, 4)
        box = (margin, margin, image.width - margin, image.height - margin)
        image = image.resize(image.size, Image.Resampling.BICUBIC, box)
    return np.array(image)


def draw_pictures(options, seed):
    """(pictures, the number of the scene that each one shows), shuffled. Scenes differ."""
    rng = np.random.default_rng(seed)
    drawn = {}                                       # Words alone can look alike by chance.
    index = 0
    while len(drawn) < options.num_scenes:
        picture = draw_scene(make_scene(seed, index, SIZE, SIZE))
        drawn.setdefault(picture.tobytes(), picture)
        index += 1
    pictures = list(drawn.values())
    scene_of = list(range(len(pictures)))
    for scene in range(round(options.copied * options.num_scenes)):
        count = int((options.most_copies + 1) ** rng.random())       # few copies are likelier
        for _ in range(count):
            kind = KINDS[rng.integers(len(KINDS))]
            pictures.append(make_copy(pictures[scene], kind, rng))
            scene_of.append(scene)
    order = rng.permutation(len(pictures))
    return [pictures[i] for i in order], np.array(scene_of)[order]


def describe(pictures):
    """N pictures -> float32 (N, 769): thumbnails less their mean, at unit length."""
    rows = []
    last = torch.tensor([0.01])                      # This makes plain pictures equal, not zero.
    for picture in pictures:
        image = to_tensor(picture)[None]                              # (1, 3, H, W)
        small = F.interpolate(image, (THUMBNAIL, THUMBNAIL), mode="area").flatten()
        rows.append(torch.cat([small - small.mean(), last]))
    return F.normalize(torch.stack(rows)).numpy()


# --- Algorithm 1 ----------------------------------------------------------------------------------

def find_duplicates(vecs, items, index, threshold):
    """Algorithm 1: the item IDs in a cluster that are copies. The numbers are those of its lines.

    vecs: (n, d) float32. items: n item IDs. index: FAISS's index of vecs. An index of inner
    products finds what is above the threshold, not what equals it. One of distances, IndexFlatL2,
    finds what is nearer than the threshold, which is then a squared distance.
    """
    dups = set()                                                      # 1
    for i in range(len(vecs)):                                        # 2
        query = vecs[i : i + 1]                                       # 3
        query_id = items[i]                                           # 4
        lims, _, found = index.range_search(query, threshold)         # 5
        if query_id in dups:                                          # 6
            continue                                                  # 7
        start = lims[0]                                               # 9
        end = lims[1]                                                 # 10
        duplicate_indices = found[start:end]                          # 11
        duplicate_ids = []                                            # 12
        for j in duplicate_indices:                                   # 13
            if items[j] != query_id:                                  # 14
                duplicate_ids.append(items[j])                        # 15
        dups.update(duplicate_ids)                                    # 18
    return dups                                                       # 20


def make_clusters(vecs, count):
    """The numbers of the vectors in each cluster, by FAISS's k-means. None is empty."""
    import faiss

    if count == 1:
        return [list(range(len(vecs)))]
    index = faiss.index_factory(vecs.shape[1], f"IVF{count},Flat", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1             # It warns below 39.
    index.train(vecs)
    _, nearest = index.quantizer.search(vecs, 1)                      # (n, 1)
    clusters = []
    for cluster in range(count):
        members = np.flatnonzero(nearest[:, 0] == cluster)
        if len(members):
            clusters.append(members.tolist())
    return clusters


def index_of(vecs):
    """FAISS's index of vectors (n, d) by inner products, which are cosines at unit length."""
    import faiss

    index = faiss.IndexFlatIP(vecs.shape[1])
    index.add(vecs)
    return index


def deduplicate(vecs, clusters, threshold):
    """The numbers of all pictures that Algorithm 1 removes."""
    removed = set()
    for items in clusters:
        members = vecs[items]                                         # (n, d)
        removed |= find_duplicates(members, items, index_of(members), threshold)
    return removed


# --- What came of it ------------------------------------------------------------------------------

def score(removed, scene_of):
    """The measures of the docstring above. scene_of: (N,), the scene that each picture shows."""
    versions = np.bincount(scene_of)                                  # (scenes,)
    kept = versions.copy()
    for item in removed:
        kept[scene_of[item]] -= 1
    superfluous = (versions - 1).sum()
    found = (versions - np.maximum(kept, 1)).sum()                    # superfluous and removed
    right = (versions - kept)[kept > 0].sum()                         # Another version stays.
    return {"removed": len(removed) / len(scene_of),
            "recall": float(found / max(1, superfluous)),
            "precision": float(right / max(1, len(removed))),
            "lost": float((kept == 0).mean())}                        # scenes without a version


def equal_pictures(pictures, removed):
    """How many of the pictures that stay are equal to another one, pixel by pixel."""
    stay = [picture.tobytes() for item, picture in enumerate(pictures) if item not in removed]
    return len(stay) - len(set(stay))


def run_seed(seed, options):
    """All thresholds, with clusters and in one cluster, on one set of pictures."""
    pictures, scene_of = draw_pictures(options, seed)
    vecs = describe(pictures)
    scenes = len(np.unique(scene_of))
    result = {"pictures": len(pictures), "superfluous": 1 - scenes / len(pictures),
              "equal_at_first": equal_pictures(pictures, set()), "equal": 0}
    for name, count in (("clusters", options.clusters), ("one cluster", 1)):
        clusters = make_clusters(vecs, count)
        result[name] = []
        for threshold in options.thresholds:
            removed = deduplicate(vecs, clusters, threshold)
            row = {"threshold": threshold, **score(removed, scene_of)}
            result[name].append(row)
            result["equal"] = max(result["equal"], equal_pictures(pictures, removed))
            print(f"seed {seed}, {len(clusters)} clusters, above {threshold:<5g}: "
                  f"{100 * row['removed']:4.1f} % removed, recall {row['recall']:.3f}, precision "
                  f"{row['precision']:.3f}", flush=True)
    return result


def judge(truths):
    """The verdict on a claim. truths: is it true, for each seed?"""
    if len(truths) < 2 or len(set(truths)) > 1:
        return "cannot be told"
    return "held" if truths[0] else "did not hold at this size"


def claims(found, options):
    """Rows of the claims table; intervals are ranges over seeds. found: `run_seed` of each seed."""
    chosen = options.thresholds.index(options.threshold)
    drops, both, losses = [], [], []
    for seed in found:
        shares = [row["removed"] for row in seed["clusters"]]
        drops.append(-max(np.diff(shares)).item())
        row = seed["clusters"][chosen]
        both.append(min(row["recall"], row["precision"]))
        losses.append(seed["one cluster"][chosen]["recall"] - row["recall"])
    rows = [
        ("the lower the threshold, the more is removed", "Fig. 16b",
         f"each threshold removes {min(drops):.3f} of the set or more beyond the next", drops,
         [drop > 0 for drop in drops]),
        (f"near-duplicates are found: recall and precision at {options.threshold:g}",
         "E.2: state of the art, with SSCD", f"both are {min(both):.3f} or more", both,
         [value >= 0.9 for value in both]),
        (f"{options.clusters} clusters in place of one lose little",
         "E.2: accurate clustering, N = 16,000", f"recall is at most {max(losses):.3f} lower",
         losses, [loss <= 0.02 for loss in losses])]
    table = []
    for claim, paper, here, values, truths in rows:
        interval = [round(min(values), 4), round(max(values), 4)]
        table.append(dict(zip(CLAIM, (claim, paper, here, interval, judge(truths)), strict=True)))
    return table


def draw_figure(found, options, file):
    """Fig. 16, recall and precision, and copies of one scene; every seed is a line."""
    from matplotlib.figure import Figure

    figure = Figure((10, 5), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(2.4, 1))
    axes = upper.subplots(1, 3)
    for axis, name in zip(axes, ("removed", "recall", "precision"), strict=True):
        labels = {"clusters": f"{options.clusters} clusters", "one cluster": "one cluster"}
        for seed, result in enumerate(found):
            for number, (way, label) in enumerate(labels.items()):
                heights = [row[name] for row in result[way]]
                axis.plot(options.thresholds, heights, ".-", color=f"C{number}", lw=1,
                          label="" if seed else label)
            if name == "removed":
                axis.axhline(result["superfluous"], color="gray", lw=0.5)
        axis.set(title=name, xlabel="threshold")
    axes[0].set_title("share removed; gray: superfluous")
    axes[0].legend()
    rng = np.random.default_rng(0)
    picture = draw_scene(make_scene(0, 6, SIZE, SIZE))
    itself = describe([picture])
    for axis, kind in zip(lower.subplots(1, len(KINDS)), KINDS, strict=True):
        copy = make_copy(picture, kind, rng)
        cosine = (itself * describe([copy])).sum()
        axis.imshow(copy, interpolation="nearest")
        axis.set_title(f"{kind}: {cosine:.3f}", fontsize=8)
        axis.set(xticks=[], yticks=[])
    write_atomically(file, partial(figure.savefig, dpi=80, format="png"))


# --- A reader's own pictures, command line --------------------------------------------------------

def read_folder(folder):
    """(names, pictures) of all that can be read. The others are named on the screen."""
    source = ImageFiles(folder)
    names, pictures = [], []
    for index, record in enumerate(source.records):
        try:
            pictures.append(source.image(index, SIZE, SIZE))
            names.append(record.name)
        except ValueError as problem:
            source.problems.append(str(problem))
    for problem in source.problems:
        print("left out:", problem, file=sys.stderr)
    if not pictures:
        raise ValueError(f"{folder}: none of its pictures can be read")
    return names, pictures


def report_folder(options):
    """Prints the copies among one's own pictures, and the share removed at each threshold."""
    names, pictures = read_folder(options.data)
    vecs = describe(pictures)
    count = min(options.clusters, max(1, len(vecs) // 39))            # FAISS asks for 39 in each.
    clusters = make_clusters(vecs, count)
    removed = sorted(deduplicate(vecs, clusters, options.threshold))
    kept = sorted(set(range(len(vecs))).difference(removed))
    index = index_of(vecs[kept])
    for item in removed:
        cosine, place = index.search(vecs[item : item + 1], 1)        # (1, 1) both
        original = names[kept[place[0, 0]]]
        print(f"{names[item]} is a copy of {original} ({cosine[0, 0]:.4f})")
    print(f"{len(pictures)} pictures in {len(clusters)} clusters")
    for threshold in options.thresholds:
        share = len(deduplicate(vecs, clusters, threshold)) / len(pictures)
        print(f"above {threshold:<5g}: {100 * share:.1f} % removed")


def main(arguments=None):
    """Removes copies with all seeds, prints the claims and draws Fig. 16."""
    options = read_options(Options, __doc__.split("\n")[0], arguments, quick=QUICK, full=FULL)
    if options.data:
        return report_folder(options)
    if options.clusters > options.num_scenes:
        raise ValueError(f"--clusters {options.clusters} for {options.num_scenes} scenes: give at "
                         f"most one cluster for each scene")
    found = []
    for seed in range(options.seeds):
        found.append(run_seed(seed, options))
    table = claims(found, options)
    for row in table:
        print(f"{row['verdict']}: {row['claim']} ({row['paper']}); here {row['here']}, with the "
              f"seeds from {row['interval'][0]} to {row['interval'][1]}")
    settings = asdict(options)
    del settings["out"], settings["data"]
    words = ["python", "experiments/fig16_deduplication.py", *sys.argv[1:]]
    record = {"command": shlex.join(words), "settings": settings, "seeds": found, "claims": table}
    write_json(options.out, record)
    draw_figure(found, options, Path(options.out).with_suffix(".png"))


if __name__ == "__main__":
    command(main)
