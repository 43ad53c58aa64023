"""flow.py: the equations against closed forms, hand computations and the golden case j_flow.

j_flow holds numbers of mpmath at 40 digits (densities, shift) and of public programs (schedules).
"""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import flow
from flow import (
    SOLVERS,
    CosMap,
    LogitNormal,
    Mode,
    Uniform,
    density,
    dpm_solver_step,
    euler_step,
    gaussian_velocity,
    guide,
    guide_skip_layers,
    heun_step,
    interpolate,
    make_schedule,
    mode_map,
    mode_map_inverse,
    normal_density,
    path_length,
    per_sample,
    rectified_flow_loss,
    shift_log_snr,
    shift_time,
    solve,
)

FOLDER = Path(__file__).parent / "golden" / "j_flow"
GOLDEN = load_file(FOLDER / "io.safetensors")
T = GOLDEN["t"]


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def grid(start, end, steps):
    return torch.linspace(start, end, steps, dtype=torch.float64)


def close(ours, expected, rtol=1e-7, atol=1e-10):
    torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol)


def integral(f, start, end, steps=20000):
    """The midpoint rule. It never evaluates the ends, where a density may be 0/0."""
    edges = grid(start, end, steps + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    return (f(middles).mean() * (end - start)).item()


# --- Path and loss --------------------------------------------------------------------------------

def test_eq13_the_path_begins_at_the_latent_and_ends_at_the_noise():
    latent, noise = normal(0, 2, 3, 4, 6, 5)
    assert torch.equal(interpolate(latent, noise, double(0.0, 0.0, 0.0)), latent)
    assert torch.equal(interpolate(latent, noise, double(1.0, 1.0, 1.0)), noise)


def test_eq13_moves_each_sample_by_its_own_time():
    latent = torch.full((2, 1, 2, 2), 10.0)
    z_t = interpolate(latent, -latent, torch.tensor([0.25, 0.5]))
    assert (z_t[0] == 5).all() and (z_t[1] == 0).all()
    assert per_sample(double(0.1, 0.2)).shape == (2, 1, 1, 1)
    assert per_sample(double(0.1, 0.2), 2).shape == (2, 1)


def test_eq8_is_zero_for_the_derivative_of_the_path():
    latent, noise = normal(0, 2, 3, 4, 6, 5)
    t = double(0.1, 0.5, 0.8)
    slope = (interpolate(latent, noise, t + 1e-3) - interpolate(latent, noise, t - 1e-3)) / 2e-3
    loss = rectified_flow_loss(lambda *_: slope, latent, None, None, t, noise)
    assert loss.max() < 1e-9


def test_eq8_reaches_the_known_floor_on_gaussian_data():
    """If x_0 ~ N(0, I), the best velocity is linear in z_t and its loss is 1 / ((1-t)^2 + t^2)."""
    latent, noise = normal(0, 2, 64, 16, 32, 32, dtype=torch.float32)
    t = torch.linspace(0, 1, 64)                                      # one sample per noise level
    floor = 1 / ((1 - t) ** 2 + t**2)                                 # 1 at both ends, 2 between

    def best(z_t, t, context, pooled):
        return per_sample((2 * t - 1) * floor) * z_t
    loss = rectified_flow_loss(best, latent, None, None, t, noise)
    close(loss, floor, rtol=0.05)                                     # no wrong path or sign


def test_eq8_is_a_mean_per_sample_and_the_model_sees_the_point_the_time_and_the_text():
    latent, noise = normal(0, 2, 3, 2, 4, 4)
    t = double(0.2, 0.5, 0.9)

    def model(z_t, time, context, pooled):
        close(z_t, per_sample(1 - t) * latent + per_sample(t) * noise)
        assert torch.equal(time, t) and (context, pooled) == ("context", "pooled")
        return noise - latent + per_sample(double(1.0, 2.0, 3.0))
    loss = rectified_flow_loss(model, latent, "context", "pooled", t, noise)
    close(loss.double(), double(1.0, 4.0, 9.0), rtol=1e-6)


def test_the_loss_is_fp32_also_for_a_bf16_model():
    def model(z_t, *_):
        return z_t.bfloat16()
    latent, noise = normal(0, 2, 2, 4, 8, 8, dtype=torch.float32)
    loss = rectified_flow_loss(model, latent, None, None, torch.rand(2), noise)
    assert loss.dtype == torch.float32


# --- Densities ------------------------------------------------------------------------------------

def test_eq19_density_and_quantiles_are_the_golden_ones():
    for i, (logit_mean, logit_std) in enumerate(GOLDEN["logit_normal.params"].tolist()):
        ours = LogitNormal(logit_mean, logit_std)
        close(ours.pdf(T), GOLDEN["logit_normal.pdf"][i])
        close(ours.quantile(GOLDEN["logit_normal.q"]), GOLDEN["logit_normal.quantile"][i])
    close(normal_density(double(3.0), 1, 2), torch.exp(double(-0.5)) / (2 * math.sqrt(2 * math.pi)))
    assert LogitNormal() == LogitNormal(0, 1)


def test_eq19_deciles_are_those_of_diffusers_timestep_sampler():
    """400,000 draws of compute_density_for_timestep_sampling: deciles to about .001."""
    seen = 0
    for row in json.loads((FOLDER / "meta.json").read_text())["diffusers_statistics"]:
        if row["scheme"] == "logit_normal":
            ours = LogitNormal(row["logit_mean"], row["logit_std"]).quantile(grid(0.1, 0.9, 9))
            assert ours.tolist() == pytest.approx(row["deciles"], abs=2e-3)
            seen += 1
    assert seen >= 4


def test_a_larger_m_means_more_noise():
    """lognorm(1, .6) has the mean t = .716. A schedule that is read backwards gives .284."""
    assert integral(LogitNormal(1, 0.6).quantile, 0, 1) == pytest.approx(0.716, abs=5e-4)


@pytest.mark.parametrize("mean, std, outside", [(0.0, 1.0, 0.0001), (0.5, 3.0, 0.201)])
def test_share_of_t_near_the_ends(mean, std, outside):
    inside = integral(LogitNormal(mean, std).pdf, 0.02, 0.98)
    assert 1 - inside == pytest.approx(outside, rel=0.05)


def test_eq20_map_inverse_and_density_are_the_golden_ones():
    for i, mode_scale in enumerate(GOLDEN["mode.s"].tolist()):
        close(mode_map(GOLDEN["mode.u"], mode_scale), GOLDEN["mode.f"][i])
        close(mode_map_inverse(T, mode_scale), GOLDEN["mode.finv"][i])
        close(Mode(mode_scale).pdf(T), GOLDEN["mode.pdf"][i])


def test_eq20_is_refused_where_the_map_is_not_monotonic():
    for mode_scale in (-1.01, 1.76, math.nan):
        with pytest.raises(ValueError, match="monotonic for -1 <= s <= 2 / .pi - 2. = 1.7519"):
            Mode(mode_scale)
    assert Mode(2 / (math.pi - 2)).pdf(double(0.3)).isfinite() and Mode(-1.0).mode_scale == -1


def test_eq21_and_22_are_the_golden_ones_and_eq21_has_the_log_snr_of_the_cosine_path():
    u = GOLDEN["cosmap.u"]
    close(CosMap().quantile(u), GOLDEN["cosmap.f"])
    close(CosMap().pdf(T), GOLDEN["cosmap.pdf"])
    t = CosMap().quantile(double(0.3))
    close((1 - t) / t, 1 / torch.tan(math.pi / 2 * double(0.3)))


@pytest.mark.parametrize("name", ["uniform", "cosmap", "mode(-0.54)", "mode(1.29)", "lognorm(1,2)"])
def test_a_quantile_is_where_the_integral_of_the_density_reaches_u(name):
    ours = density(name)
    for u in (0.1, 0.5, 0.8):
        end = ours.quantile(double(u)).item()
        assert integral(ours.pdf, 0, end) == pytest.approx(u, abs=1e-4)


def test_densities_by_name():
    assert density("uniform") == Uniform() and density(" cosmap ") == CosMap()
    assert density("lognorm(0.5,6e-1)") == LogitNormal(0.5, 0.6)
    assert density("mode(1.29)") == Mode(1.29) and density("mode( -1 )") == Mode(-1.0)


@pytest.mark.parametrize("name, problem", [
    ("normal", "choose uniform, lognorm"), ("lognorm", "choose uniform"), ("mode()", "numbers"),
    ("lognorm(1)", "numbers for m"), ("mode(a)", "'mode.a.': what is in brackets must be numbers"),
    ("uniform(1)", "choose uniform"), ("lognorm(0, 1", "choose uniform"), ("mode(3)", "monotonic"),
    ("lognorm(0, 0)", "s greater than 0"), ("lognorm(0, -1)", "s greater than 0"),
    ("lognorm(nan, 1)", "a finite m"), ("lognorm(0, inf)", "s greater than 0")])
def test_a_wrong_name_of_a_density_is_explained(name, problem):
    with pytest.raises(ValueError, match=problem):
        density(name)


# --- The shift ------------------------------------------------------------------------------------

def test_eq23_to_25_are_the_golden_ones():
    log_snr = 2 * torch.log((1 - T) / T)
    for i, alpha in enumerate(GOLDEN["shift.alpha"].tolist()):
        close(shift_time(T, alpha), GOLDEN["shift.t"][i])             # Eq. 23
        close(shift_log_snr(log_snr, alpha), GOLDEN["shift.logsnr"][i])           # Eq. 24, 25
        moved = LogitNormal(math.log(alpha), 1)                       # the logit grows by log alpha
        close(moved.pdf(T), GOLDEN["shift.logit_normal_pdf"][i])


def test_eq23_keeps_the_uncertainty_about_a_constant_image():
    """Sec. 5.3.2: sigma(t, n) = t / (1 - t) sqrt(1 / n) is the same at (t_n, n) and (t_m, m)."""
    n, m = 256**2, 1024**2
    t_n = grid(0.05, 0.95, 19)
    t_m = shift_time(t_n, math.sqrt(m / n))
    close(t_m / (1 - t_m) / math.sqrt(m), t_n / (1 - t_n) / math.sqrt(n))


# --- Schedules ------------------------------------------------------------------------------------

def golden_schedules():
    i = 0
    while f"sched{i}.steps" in GOLDEN:
        yield i, GOLDEN[f"sched{i}.steps"].item(), GOLDEN[f"sched{i}.shift"].item()
        i += 1


def test_schedules_are_those_of_public_sd3_code():
    """`released` of Stability's code and of diffusers, `shifted` of Eq. 23, for 1 to 50 steps."""
    assert len(list(golden_schedules())) >= 12
    for i, num_steps, shift in golden_schedules():
        released = make_schedule("released", num_steps, shift)
        assert released.dtype == torch.float32
        close(released, GOLDEN[f"sched{i}.sd35"], rtol=0, atol=5e-7)
        close(released, GOLDEN[f"sched{i}.diffusers"], rtol=0, atol=5e-7)
        shifted = make_schedule("shifted", num_steps, shift)
        close(shifted.double(), GOLDEN[f"sched{i}.linear"], rtol=0, atol=5e-7)


def test_sgm_uniform_by_hand():
    """Four steps, shift 3: the smallest time is .003 / 1.002 = .002994. From 1 down to it in four
    even parts: 1, .750749, .501497, .252246. Each t becomes 3 t / (1 + 2 t), and a 0 follows."""
    by_hand = [1, 0.900359, 0.751121, 0.502985, 0]
    assert make_schedule("sgm_uniform", 4, 3.0).tolist() == pytest.approx(by_hand, abs=1e-6)
    assert make_schedule("sgm_uniform", 2, 1.0).tolist() == pytest.approx([1, 0.5005, 0], abs=1e-6)
    assert make_schedule("sgm_uniform", 1, 3.0).tolist() == [1, 0]


@pytest.mark.parametrize("name, num_steps, shift, problem", [
    ("karras", 28, 3.0, "'karras'; choose one of shifted, released, sgm_uniform"),
    ("released", 0, 3.0, "num_steps is 0; it must be at least 1"),
    ("released", 28, 0.0, "timestep_shift is 0.0; it must be greater than 0"),
    ("shifted", 28, math.nan, "timestep_shift is nan"),
    ("shifted", 28, math.inf, "timestep_shift is inf")])
def test_a_wrong_schedule_is_explained(name, num_steps, shift, problem):
    with pytest.raises(ValueError, match=problem):
        make_schedule(name, num_steps, shift)


# --- Eq. 1, guidance, path length -----------------------------------------------------------------

def test_eq1_euler_on_a_gaussian_is_the_golden_one_and_nears_the_exact_flow():
    """Data N(.7, .4^2): the golden samples of 1, 2, 5 and 25 steps with shift 1 and 3."""
    mean, std = GOLDEN["gauss.params"].tolist()
    noise, errors = GOLDEN["gauss.z1"][:, None], []

    def velocity(z, t):
        assert t.shape == (len(z),)
        return gaussian_velocity(z, t, mean, std)
    for i in range(8):
        num_steps, shift = GOLDEN[f"gauss{i}.steps"].item(), GOLDEN[f"gauss{i}.shift"].item()
        points, _ = solve(velocity, noise, shift_time(grid(1, 0, num_steps + 1), shift))
        assert len(points) == num_steps + 1 and points[0] is noise
        close(points[-1][:, 0], GOLDEN[f"gauss{i}.x0"])
        errors.append((points[-1][:, 0] - GOLDEN["gauss.x0_exact"]).abs().max().item())
    assert errors[0] > errors[1] > errors[2] > errors[3] and errors[3] < 0.06


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_constant_velocity_is_followed_exactly_and_its_path_length_is_the_distance(solver):
    latent, noise = normal(0, 2, 3, 4, 6, 5)
    for times in (double(1.0, 0.0), make_schedule("released", 7, 3.0)):
        points, velocities = solve(lambda z, t: noise - latent, noise, times, SOLVERS[solver])
        close(points[-1], latent, atol=1e-6)
        close(path_length(velocities, times), (noise - latent).flatten(1).norm(dim=1), rtol=1e-6)


def test_table6_a_detour_is_longer_than_the_distance():
    """.5 there and .25 back; the distance is .25."""
    there = torch.ones(1, 1, 1, 1)
    assert path_length([there, -there], double(1.0, 0.5, 0.25)).item() == 0.75


def test_steps_keep_the_precision_of_z_whatever_the_model_does():
    def velocity(z, t):
        assert z.dtype == t.dtype == torch.float32
        return z.bfloat16()
    for step in SOLVERS.values():
        z, v = step(velocity, torch.ones(1, 1, 2, 2), 1.0, 0.5)
        assert z.dtype == v.dtype == torch.float32


def test_guidance_zero_one_and_beyond():
    cond, uncond = torch.full((1, 1, 2, 2), 4.0), torch.full((1, 1, 2, 2), 2.0)
    assert torch.equal(guide(cond, uncond, 1), cond) and torch.equal(guide(cond, uncond, 0), uncond)
    assert (guide(cond, uncond, 5) == 12).all()                       # 2 + 5 (4 - 2)
    skipped = torch.full((1, 1, 2, 2), 2.5)
    assert (guide_skip_layers(cond, cond, skipped, 2.0) == 7).all()   # 4 + 2 (4 - 2.5)


# Their errors fall like h, h^2 and h^2 log(1 / h): DPM-Solver++'s steps near 0 are large in log t.
@pytest.mark.parametrize("step, order, counts", [
    (euler_step, 1, (40, 80)), (heun_step, 2, (40, 80)), (dpm_solver_step, 2, (320, 640))])
def test_solvers_converge_at_their_order_to_the_known_answer(step, order, counts):
    """Data N(2, .5^2): noise n flows to 2 + .5 n."""
    noise, errors = normal(0, 64, 1), []

    def velocity(z, t):
        return gaussian_velocity(z, t, 2, 0.5)
    for num_steps in counts:
        points, _ = solve(velocity, noise, grid(1, 0, num_steps + 1), step)
        errors.append((points[-1] - (2 + 0.5 * noise)).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.2)


def test_dpm_solver_extrapolates_half_a_step_in_log_time_but_not_to_zero():
    """By hand: times 1, .5, .2, 0 and the predicted latents 2, 3, 7."""
    latents = iter([2.0, 3.0, 7.0])

    def velocity(z, t):
        return (z - next(latents)) / t[:, None]                       # x_0 = z - t v
    points, _ = solve(velocity, double([1.0]), double(1.0, 0.5, 0.2, 0.0), dpm_solver_step)
    assert points[1].item() == pytest.approx(0.5 * 1 + 0.5 * 2)
    extrapolated = 3 + (3 - 2) * math.log(0.5 / 0.2) / (2 * math.log(1 / 0.5))
    assert points[2].item() == pytest.approx(0.4 * 1.5 + 0.6 * extrapolated)
    assert points[3].item() == pytest.approx(7)


def test_heun_takes_the_mean_of_both_ends_and_ends_with_a_step_of_euler():
    """v = -t on two steps: 1 + .5 (1 + .5) / 2 = 1.375, then 1.375 + .5 * .5."""
    times = double(1.0, 0.5, 0.0)
    points, velocities = solve(lambda z, t: -t[:, None], double([1.0]), times, heun_step)
    assert torch.cat(points).flatten().tolist() == pytest.approx([1, 1.375, 1.625])
    assert torch.cat(velocities).flatten().tolist() == [-1, -0.5]


def test_running_flow_prints_the_known_answer(capsys):
    """lognorm(0, 1) has the density 4 / sqrt(2 pi) = 1.60 at .5. The sample nears (2.5, -.5)."""
    flow.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].split()[2:] == "0.40 0.95 1.33 1.53 1.60 1.53 1.33 0.95 0.40".split()
    assert lines[-1].split()[:3] == ["125", "(2.494,", "-0.506)"]
