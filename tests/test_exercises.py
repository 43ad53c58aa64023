"""The exercises: the core's own functions pass, the empty file ends cleanly, classic mistakes get their hint."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import flow
import mmdit
import text_encoders

FOLDER = Path(__file__).parents[1] / "exercises"
sys.path.insert(0, str(FOLDER))
from marking import mark


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def patchify(latent, p):
    """As the first layer sees it: a convolution with an identity kernel, reordered to (row, column, channel)."""
    columns = F.unfold(latent, p, stride=p).transpose(1, 2)                       # (B, N, C * p * p)
    return columns.unflatten(2, (latent.shape[1], p, p)).permute(0, 1, 3, 4, 2).flatten(2)


def clip_context(seen):
    return torch.cat([seen.clip_l[-2], seen.clip_g[-2]], dim=-1)


def pooled_vector(seen):
    rows, end = torch.arange(2), (seen.clip_ids == 99).int().argmax(dim=1)
    return torch.cat([seen.norm_l(seen.clip_l[-1])[rows, end], seen.norm_g(seen.clip_g[-1])[rows, end]], dim=-1)


def diagnose(context, pooled, seen):
    """Compare what is at each place with what could be there."""
    t5, clip = seen.norm_t5(seen.t5[-1]), clip_context(seen)
    l_norm, g_norm = seen.norm_l(seen.clip_l[-2]), seen.norm_g(seen.clip_g[-2])
    found = {"pooling": not torch.equal(pooled, pooled_vector(seen)), "token order": torch.equal(context[:, :4], t5),
             "last layer": torch.equal(context[:, :5, :2], seen.clip_l[-1]),
             "final norm": torch.equal(context[:, :5, :5], torch.cat([l_norm, g_norm], dim=-1)),
             "clip order": torch.equal(context[:, :5, :5], clip.roll(3, dims=-1)),
             "t5 norm": torch.equal(context[:, 5:], seen.t5[-1]), "padding": bool((context[0, -1] == 0).all())}
    return next((bug for bug, is_it in found.items() if is_it), "none")


def block_parameters(depth):
    D = 64 * depth
    return 2 * (18 * D**2 + (3 + 1 + 4 + 1 + 6) * D + 2 * 64)


def my_indices(rank, world_size, batch_size):
    share = batch_size // world_size
    return list(range(rank * share, (rank + 1) * share))


def draw(seed, step, index):
    return np.random.default_rng((seed, step, index)).standard_normal(4)


def drop(clip_l, clip_g, t5, pooled_l, pooled_g, keep):
    """Through the core's own function, taken apart again."""
    l, g, L = clip_l.shape[2], clip_g.shape[2], clip_l.shape[1]
    config = text_encoders.TextConfig(l, g, t5.shape[2], L, t5.shape[1])
    context, pooled = text_encoders.drop_encoders(*text_encoders.combine(clip_l, clip_g, t5, pooled_l, pooled_g), keep, config)
    return context[:, :L, :l], context[:, :L, l : l + g], context[:, L:], pooled[:, :l], pooled[:, l:]


RIGHT = {
    "01_path_and_target": {
        "interpolate": flow.interpolate, "velocity_target": flow.velocity_target,
        "recover_latent": lambda z_t, v, t: z_t - flow.per_sample(t) * v,
        "logit_normal": lambda u, m, s: flow.LogitNormal(m, s).quantile(torch.special.ndtr(u))},
    "02_patches_and_positions": {
        "patchify": patchify, "unpatchify": mmdit.unpatchify,
        "embed_positions": lambda p, size: mmdit.sincos_2d(torch.zeros(1, dtype=torch.float64), p, 2 * size)[:, :size],
        "crop_center": lambda grid, h, w: mmdit.crop_center(grid.flatten(0, 1)[None], h, w).view(h, w, -1)},
    "03_text_context": {
        "combine": text_encoders.combine, "drop": drop, "first_end": lambda ids: ids.argmax(dim=-1)},
    "04_density_or_weight": {
        "rf_weight": lambda t, pdf: flow.RectifiedFlow(flow.Uniform()).weight(t) * pdf,
        "mean_by_weighting": lambda loss, pdf, t: (loss(t) * pdf(t)).mean(),
        "mean_by_sampling": lambda loss, quantile, u: loss(quantile(u)).mean(),
        "what_multiplies_the_noise_error_in_edm": lambda log_snr: torch.exp(-log_snr) + flow.SIGMA_DATA**2},
    "05_mode_density": {
        "f_mode": flow.mode_map, "f_mode_inverse": flow.mode_map_inverse, "mode_pdf": lambda t, s: flow.Mode(s).pdf(t),
        "f_mode_slope": lambda u, s: -1 / flow.Mode(s).pdf(flow.mode_map(u, s))},
    "06_resolution_shift": {
        "uncertainty": lambda t, n: torch.exp(-flow.Straight().log_snr(t) / 2) / math.sqrt(n),
        "shift": lambda t, n, m: flow.shift_time(t, math.sqrt(m / n)),
        "shift_of_log_snr": lambda n, m: flow.shift_log_snr(torch.zeros(1), math.sqrt(m / n)).item(),
        "shifted_logit_mean": lambda mean, n, m: mean + math.log(m / n) / 2},
    "07_wrong_context": {"clip_context": clip_context, "pooled_vector": pooled_vector, "diagnose": diagnose},
    "08_two_schedules": {"shift": flow.shift_time, "shifted_once": flow.shifted_schedule, "released": flow.released_schedule,
                         "effective_shift": lambda num_steps, alpha: alpha},
    "09_sharded_memory": {
        "block_parameters": block_parameters, "state_bytes": lambda parameters, shards: 16 * -(-parameters // shards),
        "gathered_bytes": lambda block, outside: 2 * (2 * block + outside),
        "sent_bytes": lambda parameters, shards: (2 * 2 + 4) * parameters * (shards - 1) / shards},
    "10_seeds_and_ranks": {
        "my_indices": my_indices, "draw": draw, "global_batch": lambda seed, step, world_size, batch_size: np.stack(
            [draw(seed, step, i) for rank in range(world_size) for i in my_indices(rank, world_size, batch_size)])},
}
WRONG = [
    ("01_path_and_target", "interpolate", lambda x, n, t: flow.interpolate(n, x, t), "ends are swapped"),
    ("01_path_and_target", "velocity_target", lambda x, n: x - n, "the sign"),
    ("01_path_and_target", "logit_normal", lambda u, m, s: torch.sigmoid(-(m + s * u)), "more noise"),
    ("02_patches_and_positions", "patchify", lambda x, p: F.unfold(x, p, stride=p).transpose(1, 2), "vary fastest"),
    ("02_patches_and_positions", "crop_center", lambda grid, h, w: grid[:h, :w], "top left"),
    ("02_patches_and_positions", "embed_positions",
     lambda p, size: RIGHT["02_patches_and_positions"]["embed_positions"](p, size).roll(size // 2, dims=1), "sines first"),
    ("03_text_context", "combine", lambda l, g, t5, pl, pg: (
        torch.cat([t5, F.pad(torch.cat([l, g], 2), (0, 3))], 1), torch.cat([pl, pg], 1)), "before T5"),
    ("03_text_context", "drop", lambda l, g, t5, pl, pg, keep: (*drop(l, g, t5, pl, pg, keep)[:3], pl, pg), "zero too"),
    ("03_text_context", "first_end", lambda ids: torch.tensor([4, 3]), "the last one"),
    ("04_density_or_weight", "rf_weight", lambda t, pdf: pdf, "L_w weights"),
    ("04_density_or_weight", "mean_by_weighting", lambda loss, pdf, t: loss(t).mean(), "density is missing"),
    ("04_density_or_weight", "mean_by_sampling", lambda loss, quantile, u: (
        loss(quantile(u)) * flow.LogitNormal(0.5, 0.8).pdf(quantile(u))).mean(), "counted twice"),
    ("04_density_or_weight", "what_multiplies_the_noise_error_in_edm", lambda x: flow.edm_weight(x, -1.2, 1.2), "cancels"),
    ("05_mode_density", "f_mode", lambda u, s: flow.mode_map(1 - u, s), "that rises"),
    ("05_mode_density", "f_mode_slope", lambda u, s: 1 / flow.Mode(s).pdf(flow.mode_map(u, s)), "f_mode falls"),
    ("05_mode_density", "f_mode_inverse", lambda t, s: 1 - flow.mode_map_inverse(t, s), "large t means a small u"),
    ("05_mode_density", "mode_pdf", lambda t, s: 1 / flow.Mode(s).pdf(t), "one over it"),
    ("06_resolution_shift", "uncertainty", lambda t, n: t / (1 - t) / n, "not 1 / n"),
    ("06_resolution_shift", "shift", lambda t, n, m: flow.shift_time(t, m / n), "square root"),
    ("06_resolution_shift", "shift_of_log_snr", lambda n, m: math.log(m / n), "less signal"),
    ("06_resolution_shift", "shifted_logit_mean", lambda mean, n, m: mean + math.log(m / n), "half of it"),
    ("07_wrong_context", "clip_context", lambda seen: torch.cat([seen.clip_l[-1], seen.clip_g[-1]], -1), "last but one"),
    ("07_wrong_context", "pooled_vector", lambda seen: torch.cat(
        [seen.norm_l(seen.clip_l[-1])[:, -1], seen.norm_g(seen.clip_g[-1])[:, -1]], -1), "look for the first one"),
    ("07_wrong_context", "diagnose", lambda context, pooled, seen: "none", "it is 'last layer'"),
    ("08_two_schedules", "shift", lambda t, alpha: flow.shift_time(t, 1 / alpha), "lowers t"),
    ("08_two_schedules", "shifted_once", lambda n, alpha: flow.shifted_schedule(n), "not shifted yet"),
    ("08_two_schedules", "released", lambda n, alpha: torch.cat(
        [flow.shift_time(torch.linspace(1, 0.001, n), alpha), torch.zeros(1)]), "3/1002"),
    ("08_two_schedules", "effective_shift", lambda n, alpha: alpha**2, "spread evenly"),
    ("09_sharded_memory", "block_parameters", lambda depth: block_parameters(depth) / 2, "one stream"),
    ("09_sharded_memory", "state_bytes", lambda parameters, shards: 20 * -(-parameters // shards), "between steps"),
    ("09_sharded_memory", "gathered_bytes", lambda block, outside: 4 * (2 * block + outside), "2 bytes"),
    ("09_sharded_memory", "sent_bytes", lambda parameters, shards: 8 * parameters, "has itself"),
    ("10_seeds_and_ranks", "my_indices", lambda rank, size, batch: list(range(rank, batch, size)), "stay together"),
    ("10_seeds_and_ranks", "draw", lambda seed, step, i: np.random.default_rng(seed + step + i).standard_normal(4), "a sum"),
    ("10_seeds_and_ranks", "global_batch", lambda seed, step, size, batch: np.concatenate(
        [np.random.default_rng(seed + rank).standard_normal((batch // size, 4)) for rank in range(size)]), "could not go on"),
]


@pytest.mark.parametrize("name", RIGHT)
def test_the_cores_own_functions_pass_every_check(name, capsys):
    assert mark(load(name).CHECKS, RIGHT[name]) == 0
    assert "not yet" not in capsys.readouterr().out


@pytest.mark.parametrize("name", RIGHT)
def test_an_exercise_that_is_not_written_yet_ends_cleanly(name):
    result = subprocess.run([sys.executable, FOLDER / f"{name}.py"], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr == ""
    assert result.stdout.count("not written yet") == len(load(name).CHECKS)


@pytest.mark.parametrize("name, function, mistake, hint", WRONG)
def test_a_classic_mistake_gets_its_hint(name, function, mistake, hint, capsys):
    assert mark(load(name).CHECKS, {**RIGHT[name], function: mistake}) == 1
    assert hint in capsys.readouterr().out
