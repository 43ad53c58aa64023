"""The exercises: the answers pass, the empty file ends cleanly, classic mistakes get their hint."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

FOLDER = Path(__file__).parents[1] / "exercises"
sys.path.insert(0, str(FOLDER))
from marking import mark

NAMES = sorted(path.stem for path in FOLDER.glob("[01]*.py"))


def load(name):
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answers(name):
    return vars(load(f"answers/{name}"))


def per_sample(t):
    return t.view(-1, 1, 1, 1)


def shift(t, alpha):
    return alpha * t / (1 + (alpha - 1) * t)


def from_the_unshifted_table(num_steps, alpha):
    return torch.cat([shift(torch.linspace(1, 0.001, num_steps), alpha), torch.zeros(1)])


def shifted_once_only(num_steps, alpha):
    return torch.cat([torch.linspace(1, shift(0.001, alpha), num_steps), torch.zeros(1)])


def edm_weight(log_snr):
    return torch.exp(-((log_snr - 2.4) / 2.4) ** 2 / 2) * (torch.exp(-log_snr) + 0.25)


def embed_cosines_first(positions, size):
    right = answers("02_patches_and_positions")["embed_positions"](positions, size)
    return right.roll(size // 2, dims=1)


def t5_first(clip_l, clip_g, t5, pooled_l, pooled_g):
    clip = torch.cat([clip_l, clip_g], dim=2)
    clip = F.pad(clip, (0, t5.shape[2] - clip.shape[2]))
    return torch.cat([t5, clip], dim=1), torch.cat([pooled_l, pooled_g], dim=1)


def pooled_kept(clip_l, clip_g, t5, pooled_l, pooled_g, keep):
    dropped = answers("03_text_context")["drop"](clip_l, clip_g, t5, pooled_l, pooled_g, keep)
    return *dropped[:3], pooled_l, pooled_g


def counted_twice(loss, quantile, u):
    t = quantile(u)
    return (loss(t) * 2 * t).mean()


def last_states(seen):
    return torch.cat([seen.clip_l[-1], seen.clip_g[-1]], dim=2)


def pooled_at_the_last(seen):
    last_l, last_g = seen.norm_l(seen.clip_l[-1]), seen.norm_g(seen.clip_g[-1])
    return torch.cat([last_l[:, -1], last_g[:, -1]], dim=1)


def one_stream_per_rank(seed, step, size, batch):
    parts = []
    for rank in range(size):
        parts.append(np.random.default_rng(seed + rank).standard_normal((batch // size, 4)))
    return np.concatenate(parts)


MODE = answers("05_mode_density")
BLOCK = answers("09_sharded_memory")["block_parameters"]

# exercise -> (function, a classic mistake in it, a part of the hint)
WRONG = {
    "01_path_and_target": [
        ("interpolate", lambda x, n, t: per_sample(1 - t) * n + per_sample(t) * x, "swapped"),
        ("interpolate", lambda x, n, t: x + per_sample(t) * n, "each sample has its own t"),
        ("velocity_target", lambda x, n: x - n, "the sign"),
        ("velocity_target", lambda x, n: n - (x + n) / 2, "no derivative"),
        ("recover_latent", lambda z, v, t: z + per_sample(t) * v, "walk back"),
        ("logit_normal", lambda u, m, s: torch.sigmoid(-(m + s * u)), "more noise"),
        ("logit_normal", lambda u, m, s: m + s * u, "logistic function"),
        ("logit_normal", lambda u, m, s: torch.sigmoid(s * (m + u)), "scale by s")],
    "02_patches_and_positions": [
        ("patchify", lambda x, p: F.unfold(x, p, stride=p).transpose(1, 2), "vary fastest"),
        ("patchify", lambda x, p: x.flatten(1), "shape"),
        ("unpatchify", lambda x, h, w, p: x.reshape(len(x), -1, h * p, w * p), "reorder the axes"),
        ("embed_positions", embed_cosines_first, "sines first"),
        ("embed_positions", lambda x, size: torch.zeros(len(x), size), "frequencies fall"),
        ("crop_center", lambda grid, h, w: grid[:h, :w], "top left"),
        ("crop_center", lambda grid, h, w: grid[-h:, -w:], "rounded down")],
    "03_text_context": [
        ("combine", t5_first, "before T5"), ("drop", pooled_kept, "zero too"),
        ("drop", lambda l, g, t, pl, pg, keep: (l, g, t, pl, pg), "its own choice"),
        ("drop", lambda *given: answers("03_text_context")["drop"](*given)[:3], "pooled ones too"),
        ("first_end", lambda ids: torch.tensor([4, 3, 4]), "the last one"),
        ("first_end", lambda ids: ids.argmax(dim=1) + 1, "from 0")],
    "04_density_or_weight": [
        ("rf_weight", lambda t, pdf: pdf, "L_w weights"),
        ("mean_by_weighting", lambda loss, pdf, t: loss(t).mean(), "density is missing"),
        ("mean_by_sampling", counted_twice, "counted twice"),
        ("noise_error_factor_of_edm", edm_weight, "cancels"),
        ("noise_error_factor_of_edm", lambda x: torch.exp(-x), "0.5^2 of Eq. 16 is missing")],
    "05_mode_density": [
        ("f_mode", lambda u, s: MODE["f_mode"](1 - u, s), "that rises"),
        ("f_mode", lambda u, s: 1 - u - s * (torch.cos(u) ** 2 - 1 + u), "is squared"),
        ("f_mode_slope", lambda u, s: -MODE["f_mode_slope"](u, s), "f falls"),
        ("f_mode_inverse", lambda t, s: 1 - MODE["f_mode_inverse"](t, s), "a small u"),
        ("f_mode_inverse", lambda t, s: MODE["f_mode_inverse"](t, s) + 1e-6, "off by 1.0e-06"),
        ("f_mode_inverse", lambda t, s: t + 1, "left [0, 1]"),
        ("mode_pdf", lambda t, s: 1 / MODE["mode_pdf"](t, s), "inverse slope"),
        ("mode_pdf", lambda t, s: 1 / MODE["f_mode_slope"](t, s).abs(), "wrong place"),
        ("mode_pdf", lambda t, s: -MODE["mode_pdf"](t, s), "is positive")],
    "06_resolution_shift": [
        ("uncertainty", lambda t, n: t / (1 - t) / n, "not 1 / n"),
        ("uncertainty", lambda t, n: t / math.sqrt(n), "divide by 1 - t"),
        ("shift", lambda t, n, m: shift(t, m / n), "square root"),
        ("shift", lambda t, n, m: shift(t, math.sqrt(n / m)), "the other way"),
        ("shift_of_log_snr", lambda n, m: math.log(m / n), "less signal"),
        ("shift_of_log_snr", lambda n, m: math.log(n / m) / 2, "a factor of -2"),
        ("shift_of_log_snr", lambda n, m: math.nan, "a factor of -2"),
        ("shifted_logit_mean", lambda mean, n, m: mean + math.log(m / n), "half of it"),
        ("shifted_logit_mean", lambda mean, n, m: math.nan, "log(alpha)")],
    "07_wrong_context": [
        ("clip_context", last_states, "last but one"),
        ("pooled_vector", pooled_at_the_last, "look for the first one"),
        ("diagnose", lambda context, pooled, seen: "none", "it is 'last layer'"),
        ("diagnose", lambda context, pooled, seen: "T5", "is not one of")],
    "08_two_schedules": [
        ("shift", lambda t, alpha: shift(t, 1 / alpha), "lowers t"),
        ("shifted_once", lambda n, alpha: torch.linspace(1, 0, n + 1), "not shifted yet"),
        ("shifted_once", lambda n, alpha: shift(torch.linspace(0, 1, n + 1), alpha), "from noise"),
        ("shifted_once", lambda n, alpha: shift(torch.linspace(1, 0, n), alpha), "N + 1 ends"),
        ("released", from_the_unshifted_table, "3/1002"),
        ("released", shifted_once_only, "again"),
        ("effective_shift", lambda n, alpha: alpha**2, "spread evenly")],
    "09_sharded_memory": [
        ("block_parameters", lambda depth: BLOCK(depth) / 2, "one stream"),
        ("block_parameters", lambda depth: BLOCK(depth) - 256, "64 scales"),
        ("block_parameters", lambda depth: BLOCK(depth) - 30 * 64 * depth, "biases are missing"),
        ("state_bytes", lambda parameters, shards: 20 * parameters / shards, "between steps"),
        ("state_bytes", lambda parameters, shards: 12 * parameters / shards, "two moments"),
        ("state_bytes", lambda parameters, shards: 2 * parameters, "it should be"),
        ("gathered_bytes", lambda block, outside: 4 * (2 * block + outside), "2 bytes"),
        ("sent_bytes", lambda parameters, shards: 8 * parameters, "does not send"),
        ("sent_bytes", lambda parameters, shards: 6 * parameters * (shards - 1) / shards, "twice")],
    "10_seeds_and_ranks": [
        ("my_indices", lambda rank, size, batch: list(range(rank, batch, size)), "stay together"),
        ("my_indices", lambda rank, size, batch: list(range(batch)), "has 8 of 8"),
        ("draw", lambda seed, step, i: np.random.default_rng(seed + step + i).random(4), "a sum"),
        ("draw", lambda seed, step, i: np.random.default_rng((step, i)).random(4), "seed does not"),
        ("draw", lambda *key: np.random.default_rng(key).random(4), "normal numbers"),
        ("draw", lambda seed, step, i: np.random.default_rng(1000 * seed + 100 * step + i)
         .standard_normal(4), "share their noise"),
        ("global_batch", lambda seed, step, size, batch:
         np.random.default_rng((seed, step)).standard_normal((batch, 4)), "row i must be"),
        ("global_batch", one_stream_per_rank, "could not go on")],
}


@pytest.mark.parametrize("name", NAMES)
def test_the_answers_pass_every_check_and_leave_nothing_out(name, capsys):
    exercise, right = load(name), answers(name)
    assert mark(exercise.CHECKS, right, getattr(exercise, "show", None)) == 0
    assert capsys.readouterr().out.count("passed") == len(exercise.CHECKS)
    for text in ("Think first:", f"python exercises/{name}.py"):
        assert text in exercise.__doc__
    assert right["__doc__"].startswith(f"Answers to exercise {int(name[:2])}.\n")


@pytest.mark.parametrize("name", NAMES)
def test_an_exercise_that_is_not_written_yet_ends_cleanly(name):
    result = subprocess.run([sys.executable, FOLDER / f"{name}.py"], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr == ""
    assert result.stdout.count("not written yet") == len(load(name).CHECKS)


@pytest.mark.parametrize("name", NAMES)
def test_a_classic_mistake_gets_its_hint(name, capsys):
    for function, mistake, hint in WRONG[name]:
        assert mark(load(name).CHECKS, {**answers(name), function: mistake}) == 1, function
        out = capsys.readouterr().out
        assert hint in out and out.count("not yet") == 1, (function, out)


def test_an_answer_of_the_wrong_shape_says_why(capsys):
    def interpolate(latent, noise, t):
        return torch.ones(3) + torch.ones(2)
    wrong = {**answers("01_path_and_target"), "interpolate": interpolate}
    assert mark(load("01_path_and_target").CHECKS, wrong) == 1
    assert "not yet  the path (13): RuntimeError: The size of tensor a" in capsys.readouterr().out
