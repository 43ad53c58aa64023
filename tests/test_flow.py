"""The equations of flow.py: path, loss, densities of t, shift, schedules, guidance, Euler's method."""

import importlib.util
import math

import pytest
import torch

import flow
from flow import (
    LogitNormal,
    RectifiedFlow,
    Shifted,
    euler,
    euler_steps,
    gaussian_velocity,
    guide,
    interpolate,
    logit_normal_pdf,
    logit_normal_quantile,
    make_schedule,
    path_length,
    rectified_flow_loss,
    released_schedule,
    shift_time,
    shifted_schedule,
    velocity_target,
)

DENSITIES = [LogitNormal(0, 1), LogitNormal(0.5, 0.6), LogitNormal(1, 0.6), LogitNormal(-0.5, 1),
             Shifted(LogitNormal(0, 1), 3.0), Shifted(LogitNormal(0.5, 0.6), 0.5)]


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def grid(start, end, steps):
    return torch.linspace(start, end, steps, dtype=torch.float64)


def integral(f, start=0.0, end=1.0, steps=20000):
    """Midpoint rule: never evaluates the ends, where a density may be 0/0."""
    edges = grid(start, end, steps + 1)
    return float((f((edges[1:] + edges[:-1]) / 2) * (edges[1:] - edges[:-1])).sum())


def log_snr(t):
    """log(a_t^2 / b_t^2) of Sec. 2 on the straight path: a_t = 1 - t, b_t = t."""
    return 2 * torch.log((1 - t) / t)


# ------------------------------------------------------------------------------------------------------------
# Path and loss
# ------------------------------------------------------------------------------------------------------------

def test_eq13_path_ends_are_data_and_noise():
    latent, noise = normal(0, 2, 3, 4, 6, 5)
    assert torch.equal(interpolate(latent, noise, double(0.0, 0.0, 0.0)), latent)
    assert torch.equal(interpolate(latent, noise, double(1.0, 1.0, 1.0)), noise)


def test_eq13_moves_each_sample_by_its_own_time():
    latent, noise = torch.full((2, 1, 2, 2), 10.0), torch.full((2, 1, 2, 2), -10.0)
    z_t = interpolate(latent, noise, torch.tensor([0.25, 0.5]))
    assert (z_t[0] == 5).all() and (z_t[1] == 0).all()


def test_velocity_is_the_time_derivative_of_the_path():
    latent, noise = normal(0, 2, 3, 4, 6, 5)
    for t in (0.1, 0.5, 0.8):
        t, h = double(t, t, t), 1e-3
        slope = (interpolate(latent, noise, t + h) - interpolate(latent, noise, t - h)) / (2 * h)
        torch.testing.assert_close(velocity_target(latent, noise), slope, rtol=1e-9, atol=1e-9)


def test_loss_reaches_the_known_floor_on_gaussian_data():
    """If x_0 ~ N(0, I), the best velocity is linear in z_t and its loss is 1 / ((1-t)^2 + t^2)."""
    latent, noise = normal(0, 2, 64, 16, 32, 32, dtype=torch.float32)
    t = torch.linspace(0, 1, 64)                                         # one sample per noise level
    floor = 1 / ((1 - t) ** 2 + t**2)                                    # 1 at both ends, 2 in the middle
    best = lambda z_t, t, context, pooled: ((2 * t - 1) * floor).view(-1, 1, 1, 1) * z_t
    loss = rectified_flow_loss(best, latent, None, None, t, noise)
    torch.testing.assert_close(loss, floor, rtol=0.05, atol=0)           # fails if path, sign or target is wrong


def test_no_linear_model_beats_the_floor_on_gaussian_data():
    latent, noise = normal(0, 2, 1, 16, 64, 64, dtype=torch.float32)
    t = torch.tensor([0.3])
    best_slope = (2 * t - 1) / ((1 - t) ** 2 + t**2)
    loss = lambda slope: rectified_flow_loss(lambda z_t, *_: slope * z_t, latent, None, None, t, noise).item()
    assert loss(best_slope) < min(loss(best_slope - 0.05), loss(best_slope + 0.05))


def test_loss_of_predicting_nothing_is_two_on_unit_data():
    latent, noise = normal(0, 2, 8, 16, 32, 32, dtype=torch.float32)
    loss = rectified_flow_loss(lambda z_t, *_: torch.zeros_like(z_t), latent, None, None, torch.rand(8), noise)
    torch.testing.assert_close(loss, torch.full((8,), 2.0), rtol=0.05, atol=0)


def test_loss_is_a_mean_per_sample_and_the_model_sees_z_t_not_the_clean_latent():
    latent, noise, t = normal(0, 3, 2, 4, 4), normal(1, 3, 2, 4, 4), double(0.2, 0.5, 0.9)
    offset = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1)

    def model(z_t, time, context, pooled):
        assert torch.equal(z_t, interpolate(latent, noise, t)) and torch.equal(time, t)
        assert (context, pooled) == ("context", "pooled")
        return noise - latent + offset
    loss = rectified_flow_loss(model, latent, "context", "pooled", t, noise)
    torch.testing.assert_close(loss.double(), double(1.0, 4.0, 9.0), rtol=1e-6, atol=0)


def test_loss_is_fp32_also_for_bf16_latents_and_model():
    latent, noise = normal(0, 2, 2, 4, 8, 8, dtype=torch.bfloat16)
    loss = rectified_flow_loss(lambda z_t, *_: z_t.bfloat16(), latent, None, None, torch.rand(2), noise)
    assert loss.dtype == torch.float32


def test_eq18_sampling_from_the_density_is_not_also_weighting_by_it():
    latent, noise, t = normal(0, 4, 2, 4, 4), normal(1, 4, 2, 4, 4), double(0.1, 0.4, 0.6, 0.95)
    model = lambda z_t, *_: 0.3 * z_t
    plain = rectified_flow_loss(model, latent, None, None, t, noise)
    for density in DENSITIES:
        assert torch.equal(RectifiedFlow(density).loss(model, latent, None, None, t, noise), plain)
    assert RectifiedFlow().density == LogitNormal(0, 1)                          # first in Table 1


# ------------------------------------------------------------------------------------------------------------
# Densities of t
# ------------------------------------------------------------------------------------------------------------

def test_eq19_in_the_middle_is_its_closed_form():
    """At t = 1/2, m = 0 the exponential is 1: 1 / (s sqrt(2 pi) / 4)."""
    half = double(0.5)
    for std in (0.6, 1.0, 2.2):
        assert logit_normal_pdf(half, 0, std).item() == pytest.approx(4 / (std * math.sqrt(2 * math.pi)), rel=1e-12)
    t = double(0.8)                                             # logit(.8) = log 4
    by_hand = math.exp(-((math.log(4) - 1) ** 2) / (2 * 0.6**2)) / (0.6 * math.sqrt(2 * math.pi) * 0.8 * 0.2)
    assert logit_normal_pdf(t, 1, 0.6).item() == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("density", DENSITIES, ids=str)
def test_density_integrates_to_one(density):
    assert integral(density.pdf) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("density", DENSITIES, ids=str)
def test_quantile_inverts_the_distribution_function(density):
    for u in (0.01, 0.2, 0.5, 0.9, 0.999):
        t = density.quantile(double(u)).item()
        assert integral(density.pdf, 0, t) == pytest.approx(u, abs=1e-6)


@pytest.mark.parametrize("density", DENSITIES, ids=str)
def test_density_is_the_change_of_variables_of_its_quantile(density):
    """t = Q(u) with u uniform has the density 1 / Q'(u)."""
    u, h = grid(0.02, 0.98, 49), 1e-5
    slope = (density.quantile(u + h) - density.quantile(u - h)) / (2 * h)
    torch.testing.assert_close(density.pdf(density.quantile(u)), 1 / slope, rtol=1e-6, atol=0)


def test_a_larger_mean_gives_more_noise():
    """The mean t of lognorm(1, .6) is .716; a schedule read backwards gives .284."""
    assert integral(lambda t: t * logit_normal_pdf(t, 1, 0.6)) == pytest.approx(0.716, abs=5e-4)
    assert integral(lambda u: logit_normal_quantile(u, 1, 0.6)) == pytest.approx(0.716, abs=5e-4)
    assert integral(lambda u: logit_normal_quantile(u, 0, 1)) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("mean, std, outside", [(0.0, 1.0, 0.0001), (0.5, 3.0, 0.201)])
def test_share_of_t_outside_the_middle(mean, std, outside):
    inside = integral(lambda t: logit_normal_pdf(t, mean, std), 0.02, 0.98)
    assert 1 - inside == pytest.approx(outside, rel=0.05)


# ------------------------------------------------------------------------------------------------------------
# Resolution shift (Sec. 5.3.2)
# ------------------------------------------------------------------------------------------------------------

def test_eq23_values():
    t = double(0.0, 0.25, 0.5, 0.75, 1.0)
    assert shift_time(t, 3.0).tolist() == pytest.approx([0, 0.5, 0.75, 0.9, 1])   # 3t / (1 + 2t)
    assert torch.equal(shift_time(t, 1.0), t)


def test_eq23_keeps_the_uncertainty_about_a_constant_image():
    """Sec. 5.3.2: sigma(t, n) = t / (1 - t) sqrt(1 / n) is the same at (t_n, n) and (t_m, m), with alpha = sqrt(m / n)."""
    n, m, t_n = 256**2, 1024**2, grid(0.05, 0.95, 19)
    t_m = shift_time(t_n, math.sqrt(m / n))
    sigma = lambda t, pixels: t / (1 - t) * math.sqrt(1 / pixels)
    torch.testing.assert_close(sigma(t_m, m), sigma(t_n, n), rtol=1e-10, atol=0)


@pytest.mark.parametrize("alpha", [0.5, 1.5, 3.0, 6.0])
def test_eq24_and_25_shift_lowers_the_log_snr_by_twice_log_alpha(alpha):
    t_n = grid(0.05, 0.95, 19)
    t_m = shift_time(t_n, alpha)
    torch.testing.assert_close(log_snr(t_m), 2 * torch.log((1 - t_n) / (alpha * t_n)), rtol=1e-9, atol=1e-9)     # Eq. 24
    torch.testing.assert_close(log_snr(t_m), log_snr(t_n) - 2 * math.log(alpha), rtol=1e-9, atol=1e-9)           # Eq. 25


def test_log_snr_of_logit_normal_times_is_normal():
    """logit(t) ~ N(m, s^2), so log_snr = -2 logit(t) has the quantiles of N(-2m, 4 s^2)."""
    u = grid(0.05, 0.95, 19)
    expected = -2 * (0.5 + 0.6 * torch.special.ndtri(u))
    torch.testing.assert_close(log_snr(logit_normal_quantile(u, 0.5, 0.6)), expected, rtol=1e-9, atol=1e-9)


def test_shifts_compose_and_invert():
    t = grid(0, 1, 21)
    torch.testing.assert_close(shift_time(shift_time(t, 3.0), 2.0), shift_time(t, 6.0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shift_time(shift_time(t, 3.0), 1 / 3.0), t, rtol=1e-12, atol=1e-12)


def test_shifted_logit_normal_is_the_logit_normal_with_mean_plus_log_alpha():
    """Eq. 23 adds log alpha to the logit."""
    t, u = grid(0.01, 0.99, 99), grid(0.01, 0.99, 99)
    for alpha in (0.5, 3.0):
        shifted, moved = Shifted(LogitNormal(0.2, 0.8), alpha), LogitNormal(0.2 + math.log(alpha), 0.8)
        torch.testing.assert_close(shifted.pdf(t), moved.pdf(t), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(shifted.quantile(u), moved.quantile(u), rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------
# Schedules
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["shifted", "released"])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 28, 50])
@pytest.mark.parametrize("timestep_shift", [1.0, 3.0, 0.5])
def test_schedule_falls_from_one_to_zero(name, num_steps, timestep_shift):
    times = make_schedule(name, num_steps, timestep_shift)
    assert len(times) == num_steps + 1 and times.dtype == torch.float32
    assert times[0] == 1 and times[-1] == 0 and (times[1:] < times[:-1]).all()


def test_released_schedule_has_the_values_of_public_sd3_code():
    """N = 28, shift 3. Smallest of 1000 shifted training times: .002994; shifted again: .0089286."""
    times = released_schedule(28, 3.0)
    assert times[1].item() == pytest.approx(0.98738, abs=5e-6)
    assert times[-3].item() == pytest.approx(0.11091, abs=5e-6)
    assert times[-2].item() == pytest.approx(0.0089286, abs=5e-8)
    for num_steps in (2, 5, 50):
        assert released_schedule(num_steps, 3.0)[-2].item() == pytest.approx(0.0089286, abs=5e-8)


def test_shifted_schedule_is_uniform_times_shifted_once():
    assert shifted_schedule(28, 3.0)[-2].item() == pytest.approx(0.1, abs=1e-6)
    assert shifted_schedule(28, 1.0)[-2].item() == pytest.approx(1 / 28, abs=1e-7)          # .0357
    expected = [1, 0.923077, 0.818182, 0.666667, 0.428571, 0]
    assert shifted_schedule(5, 3.0).tolist() == pytest.approx(expected, abs=1e-6)


def test_make_schedule_chooses_by_name_and_names_what_is_wrong():
    assert torch.equal(make_schedule("released", 28, 3.0), released_schedule(28, 3.0))
    assert torch.equal(make_schedule("shifted", 28, 3.0), shifted_schedule(28, 3.0))
    with pytest.raises(ValueError, match="'karras'.*shifted or released"):
        make_schedule("karras", 28, 3.0)
    with pytest.raises(ValueError, match="num_steps=0"):
        make_schedule("released", 0, 3.0)
    with pytest.raises(ValueError, match="timestep_shift=-1"):
        make_schedule("released", 28, -1)


# ------------------------------------------------------------------------------------------------------------
# Guidance and Euler's method
# ------------------------------------------------------------------------------------------------------------

def test_guidance_zero_one_and_beyond():
    cond, uncond = torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 2, 2), 2.0)
    assert torch.equal(guide(cond, uncond, 1), cond)
    assert torch.equal(guide(cond, uncond, 0), uncond)
    assert (guide(cond, uncond, 5) == 7).all()                                    # 2 + 5 (3 - 2)


@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_euler_follows_a_straight_path_exactly_from_noise_to_data(num_steps):
    """The velocity eps - x_0 is constant on the path of Eq. 13, so any number of steps lands on x_0."""
    latent, noise = normal(0, 2, 2, 4, 6, 5, dtype=torch.float32)
    for schedule in (shifted_schedule(num_steps, 3.0), released_schedule(num_steps, 3.0)):
        sample = euler(lambda z, t: velocity_target(latent, noise), noise, schedule)
        torch.testing.assert_close(sample, latent, rtol=1e-5, atol=1e-5)


def test_euler_steps_visit_every_time_once_and_never_zero():
    seen, noise, times = [], torch.ones(3, 1, 2, 2), shifted_schedule(4, 3.0)

    def velocity(z, t):
        assert t.shape == (3,) and t.dtype == torch.float32 and (t == t[0]).all()
        seen.append(t[0].item())
        return z * t.view(-1, 1, 1, 1)
    steps = list(euler_steps(velocity, noise, times))
    assert seen == times[:-1].tolist()
    z = noise
    for (z_next, v), t, t_next in zip(steps, times[:-1], times[1:], strict=True):
        torch.testing.assert_close(v, z * t)                                      # velocity at the step's beginning
        torch.testing.assert_close(z_next, z + (t_next - t) * v)
        z = z_next


def test_euler_computes_in_fp32_whatever_the_model_does():
    def velocity(z, t):
        assert z.dtype == t.dtype == torch.float32
        return z.bfloat16()
    sample = euler(velocity, torch.ones(1, 1, 2, 2).bfloat16(), shifted_schedule(50))
    assert sample.dtype == torch.float32
    assert sample.flatten()[0].item() == pytest.approx((1 - 1 / 50) ** 50, rel=1e-2)


def test_euler_converges_at_first_order_to_the_exact_flow():
    """Data N(2, .5^2): noise n flows to 2 + .5 n. Twice the steps, half the error."""
    noise = normal(0, 256, 1, 1, 1, dtype=torch.float32)
    error = lambda n: (euler(lambda z, t: gaussian_velocity(z, t, 2, 0.5), noise, shifted_schedule(n))
                       - (2 + 0.5 * noise)).abs().max().item()
    errors = [error(n) for n in (20, 40, 80, 160)]
    assert errors[-1] < 0.02
    for coarse, fine in zip(errors, errors[1:]):
        assert coarse / fine == pytest.approx(2, abs=0.15)


def test_path_length_of_a_straight_path_is_the_distance():
    latent, noise = normal(0, 2, 3, 4, 6, 5, dtype=torch.float32)
    times = shifted_schedule(7, 3.0)
    velocities = [v for _, v in euler_steps(lambda z, t: noise - latent, noise, times)]
    distance = (noise - latent).flatten(1).norm(dim=1)
    assert path_length(velocities, times).shape == (3,)
    torch.testing.assert_close(path_length(velocities, times), distance, rtol=1e-5, atol=1e-5)


def test_path_length_of_a_detour_is_longer_than_the_distance():
    times = torch.tensor([1.0, 0.5, 0.0])
    there, back = torch.ones(1, 1, 1, 1), -torch.ones(1, 1, 1, 1)
    assert path_length([there, back], times).item() == 1                          # .5 there, .5 back; the distance is 0


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_eq6_gaussian_velocity_is_the_posterior_mean_of_eps_minus_data(t):
    """E[eps - x_0 | z_t = z], summed over a fine grid of x_0, each of which fixes eps = (z - (1 - t) x_0) / t."""
    mean, std = 2.0, 0.5
    z = (1 - t) * mean + grid(-2, 2, 9)
    latent = mean + std * grid(-9, 9, 20001)
    noise = (z[:, None] - (1 - t) * latent) / t                                   # (9, 20001)
    log_prior = -0.5 * ((latent - mean) / std).square()
    weight = torch.softmax(log_prior - 0.5 * noise.square(), dim=1)               # p(x_0) p(z | x_0), normalised
    posterior = (weight * (noise - latent)).sum(1)
    torch.testing.assert_close(gaussian_velocity(z, double(*[t] * 9), mean, std), posterior, rtol=1e-6, atol=1e-6)


def test_gaussian_velocity_ends_are_those_of_the_path():
    """At t = 1, z is pure noise: z - mean. At t = 0, z is data and eps is unknown: -z."""
    z = grid(-2, 2, 5).view(5, 1, 1, 1)
    torch.testing.assert_close(gaussian_velocity(z, double(1.0, 1.0, 1.0, 1.0, 1.0), 0.7, 0.4), z - 0.7)
    torch.testing.assert_close(gaussian_velocity(z, double(0.0, 0.0, 0.0, 0.0, 0.0), 0.7, 0.4), -z)


def test_running_flow_draws_one_png_or_prints_the_same_numbers(tmp_path, capsys):
    """Errors of the solvers fall with the number of steps; a PNG with matplotlib, text without."""
    noise = normal(0, 50, 2)
    errors = flow.solver_errors(flow.RectifiedFlow(), flow.RING, noise)
    for values in errors.values():
        assert values == sorted(values, reverse=True) and values[-1] < 0.05
    flow.print_demo(errors)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("LogitNormal") for line in lines) == 4 and len(lines) == 1 + 9 + 2 + 4 + 2 + 4
    flow.main(tmp_path / "a.png")
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"
    else:
        assert "log-SNR" in capsys.readouterr().out
