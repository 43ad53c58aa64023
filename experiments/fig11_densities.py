"""fig11_densities.py: where the timesteps of training fall (SD3, Sec. 3.1, App. B.4, Fig. 11).

Draws the densities of t that the paper compares: mode sampling on the left and the logit-normal on
the right, as in Fig. 11, with CosMap (Eq. 22) beside the first. Nothing is trained. Each density is
checked in two ways. The slope of its distribution function, which is known in closed form, must be
the formula that the paper prints. And samples, sorted into bins, must have the shares that the
distribution function gives those bins (Pearson's chi-squared test).

The text of the paper does not say which parameters Fig. 11 has. Here they are the seven even values
of s in [-1, 1.75] of Sec. 5.1, and the logit-normal densities that Tables 1 and 2 name.

Run   python experiments/fig11_densities.py            a million samples each, seconds
      python experiments/fig11_densities.py --quick    a hundred thousand
"""

import math
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from devices import command
from flow import CosMap, LogitNormal, density, mode_map, mode_map_inverse
from formulations import Cosine
from options import check_options, option, read_options, write_atomically, write_json

MODES = ("mode(-1)", "mode(-0.54)", "mode(-0.08)", "mode(0.38)", "mode(0.83)", "mode(1.29)",
         "mode(1.75)")
LOGIT_NORMALS = ("lognorm(0, 1)", "lognorm(1, 0.6)", "lognorm(0.5, 0.6)", "lognorm(0.5, 1)",
                 "lognorm(-0.5, 1)")
CLAIM = ("claim", "paper", "here", "interval", "verdict")


@dataclass(frozen=True)
class Options:
    """How densely the densities are sampled, and where the results go."""
    samples: int = option(10**6, "samples of each density", 1000, 10**9)
    bins: int = option(50, "bins of the histograms", 2, 10**4)
    seed: int = option(0, "of the samples", 0, 2**31)
    out: str = option(str(ROOT / "results" / "fig11_densities.json"), "what is measured")

    def __post_init__(self):
        check_options(self)


QUICK = {"samples": 10**5}
FULL = {"samples": 10**8}


# --- Two checks of a density ----------------------------------------------------------------------

def distribution(pi_t, t):
    """F(t): the share of timesteps below t, by its closed form. (n,) -> (n,)

    Logit-normal: Phi((logit t - m) / s). CosMap: the inverse of Eq. 21, 2 / pi atan(t / (1 - t)).
    Mode: f of Eq. 20 falls, so F(f(u)) = 1 - u.
    """
    if isinstance(pi_t, LogitNormal):
        return torch.special.ndtr((torch.logit(t) - pi_t.logit_mean) / pi_t.logit_std)
    if isinstance(pi_t, CosMap):
        return 2 / math.pi * torch.atan(t / (1 - t))
    return 1 - mode_map_inverse(t, pi_t.mode_scale)


def formula_error(pi_t):
    """The largest difference of the slope of F and the printed density, relative to its peak."""
    t = torch.linspace(0.01, 0.99, 981, dtype=torch.float64)
    step = 1e-7
    slope = (distribution(pi_t, t + step) - distribution(pi_t, t - step)) / (2 * step)
    printed = pi_t.pdf(t)
    return ((slope - printed).abs().max() / printed.max()).item()


def count_samples(pi_t, samples, bins, rng):
    """How many of t = quantile(u), u uniform, fall into each of the even bins. (bins,) float64"""
    counts = torch.zeros(bins, dtype=torch.float64)
    left = samples
    while left:
        size = min(left, 10**6)
        u = torch.rand(size, dtype=torch.float64, generator=rng)
        t = pi_t.quantile(u)                                          # (size,)
        place = (t * bins).long().clamp(0, bins - 1)                  # (size,)
        counts += torch.bincount(place, minlength=bins)
        left -= size
    return counts


def bin_shares(pi_t, bins):
    """The share of each bin by the distribution function. (bins,)"""
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    inner = distribution(pi_t, edges[1:-1])                           # (bins - 1,)
    zero, one = edges[:1], edges[-1:]                                 # F(0) and F(1)
    return torch.cat([zero, inner, one]).diff()


def chi_squared(counts, shares):
    """Pearson's test: (largest deviation in standard errors, probability of one as large as ours).

    Bins that expect fewer than 5 samples are put together into one.
    """
    expected = shares * counts.sum()                                  # (bins,)
    rare = expected < 5
    seen = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if expected[-1] < 5:                                              # too few even together
        seen, expected = seen[:-1], expected[:-1]
    deviation = (seen - expected) / expected.sqrt()
    freedom = torch.tensor((len(seen) - 1) / 2, dtype=torch.float64)
    p_value = torch.special.gammaincc(freedom, deviation.square().sum() / 2)
    return deviation.abs().max().item(), p_value.item()


def check(name, options):
    """What is measured of one density."""
    pi_t = density(name)
    rng = torch.Generator().manual_seed(options.seed)
    counts = count_samples(pi_t, options.samples, options.bins, rng)
    largest, p_value = chi_squared(counts, bin_shares(pi_t, options.bins))
    centers = (torch.arange(options.bins, dtype=torch.float64) + 0.5) / options.bins
    shares = counts / counts.sum()
    mean = (shares * centers).sum()
    std = (shares * (centers - mean).square()).sum().sqrt()
    return {"formula_error": formula_error(pi_t), "largest_deviation": largest, "p_value": p_value,
            "mean": mean.item(), "std": std.item(), "counts": counts.long().tolist()}


# --- What the paper says of the densities ---------------------------------------------------------

def logit_normal_claims(found, samples):
    """(claim, paper, here, interval, does it hold?) for the right panel. found: {name: check}"""
    ends = torch.tensor([1e-12, 1 - 1e-12], dtype=torch.float64)
    highest = max(density(name).pdf(ends).max().item() for name in LOGIT_NORMALS)
    low, high = found["lognorm(-0.5, 1)"], found["lognorm(0.5, 1)"]
    error = 1.96 * high["std"] / samples**0.5                         # 95 % interval of a mean
    narrow, wide = found["lognorm(0.5, 0.6)"]["std"], high["std"]
    return [
        ("the logit-normal density vanishes at the endpoints 0 and 1", "Sec. 3.1: always",
         f"at most {highest:.1e}, 1e-12 from the ends", None, highest < 1e-3),
        ("m < 0 biases t towards data, m > 0 towards noise", "Sec. 3.1",
         f"mean t {low['mean']:.3f} for m = -.5, {high['mean']:.3f} for m = .5",
         [high["mean"] - error, high["mean"] + error],
         low["mean"] + error < 0.5 < high["mean"] - error),
        ("s controls how wide the logit-normal is", "Fig. 11, right",
         f"standard deviation of t {narrow:.3f} for s = .6, {wide:.3f} for s = 1", None,
         narrow < wide)]


def mode_claims():
    """The same for the left panel: Eq. 20 to 22."""
    t = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    lowest = math.inf
    agreeing = 0
    for name in MODES:
        pi_t = density(name)
        pdf = pi_t.pdf(t)                                             # (999,)
        lowest = min(lowest, pdf.min().item())
        favours_middle = (pdf[499] > pdf[0]).item()
        if favours_middle == (pi_t.mode_scale > 0):
            agreeing += 1
    u = torch.linspace(0, 1, 10001, dtype=torch.float64)
    limit = 2 / (math.pi - 2)
    rising = []
    for mode_scale in (-1, limit, -1.01, limit + 0.01):
        rising.append((mode_map(u, mode_scale).diff() > 1e-12).sum().item())
    cosine = Cosine().at(t).log_snr                                   # (999,), here t is u
    mapped = CosMap().quantile(t)
    gap = (2 * torch.log((1 - mapped) / mapped) - cosine).abs().max().item()
    return [
        ("the density of mode sampling is strictly positive", "Sec. 3.1: on [0, 1]",
         f"at least {lowest:.3f} for all s", None, lowest > 0),
        ("mode: s > 0 favours the midpoint, s < 0 the endpoints", "Fig. 11, left",
         f"{agreeing} of {len(MODES)} values of s", None, agreeing == len(MODES)),
        ("Eq. 20 is monotonic for -1 <= s <= 2 / (pi - 2)", "Sec. 3.1",
         f"of 10,000 steps {rising[:2]} rise at the two limits, {rising[2:]} .01 beyond them", None,
         rising[:2] == [0, 0] and min(rising[2:]) > 0),
        ("CosMap has the log-SNR of the cosine schedule", "Eq. 21",
         f"largest difference {gap:.1e}", None, gap < 1e-9)]


def check_claims(found):
    """The same for all densities, from what `check` measured."""
    error = max(row["formula_error"] for row in found.values())    # largest near the limit of s
    p_value = min(row["p_value"] for row in found.values())
    return [
        ("the printed densities are the slopes of the distributions", "Eq. 19, 21, 22",
         f"off by at most {error:.1e} of the peak", None, error < 1e-4),
        ("samples follow the printed densities", "Sec. 3.1",
         f"smallest p-value of {len(found)}: {p_value:.3f}", None, p_value > 0.001 / len(found))]


# --- Figure and command line ----------------------------------------------------------------------

def draw_figure(found, options, file):
    """Fig. 11: lines are densities, steps are histograms of the samples."""
    from matplotlib.figure import Figure

    figure = Figure((11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    t = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    edges = torch.linspace(0, 1, options.bins + 1).tolist()
    panels = ((*MODES, "cosmap"), LOGIT_NORMALS)
    for axis, names, title in zip(axes, panels, ("mode, CosMap", "logit-normal")):
        for number, name in enumerate(names):
            color = f"C{number}"
            heights = torch.tensor(found[name]["counts"]) * options.bins / options.samples
            axis.stairs(heights.tolist(), edges, color=color, alpha=0.4)
            axis.plot(t.tolist(), density(name).pdf(t).tolist(), color=color, label=name)
        axis.set(title=title, xlabel="t (0: data, 1: noise)", ylabel="density", ylim=(0, 4))
        axis.legend(fontsize=8)
    write_atomically(file, lambda partial: figure.savefig(partial, dpi=100, format="png"))


def main(arguments=None):
    """Checks every density, prints the claims and draws Fig. 11."""
    options = read_options(Options, __doc__.split("\n")[0], arguments, quick=QUICK, full=FULL)
    found = {}
    print("density            formula off by   largest deviation   p-value   mean t   std of t")
    for name in (*MODES, "cosmap", *LOGIT_NORMALS):
        found[name] = row = check(name, options)
        print(f"{name:18} {row['formula_error']:14.1e}  {row['largest_deviation']:12.2f} std errors"
              f"  {row['p_value']:7.3f}  {row['mean']:7.3f}  {row['std']:9.3f}")
    claims = []
    rows = logit_normal_claims(found, options.samples) + mode_claims() + check_claims(found)
    for claim, paper, here, interval, holds in rows:
        verdict = "held" if holds else "did not hold at this size"
        row = (claim, paper, here, interval, verdict)
        claims.append(dict(zip(CLAIM, row, strict=True)))
        print(f"{verdict}: {claim} ({paper}); here {here}")
    settings = asdict(options)
    del settings["out"]
    record = {"command": shlex.join(["python", "experiments/fig11_densities.py", *sys.argv[1:]]),
              "settings": settings, "densities": found, "claims": claims}
    write_json(options.out, record)
    draw_figure(found, options, Path(options.out).with_suffix(".png"))


if __name__ == "__main__":
    command(main)
