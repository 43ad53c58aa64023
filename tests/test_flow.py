"""The equations of flow.py: one test for each of Eq. 1 to 36 at least, with its number in its name."""

import importlib.util
import math

import pytest
import torch

import flow
from flow import (
    EDM,
    FORMULATIONS,
    SOLVERS,
    Cosine,
    CosMap,
    Formulation,
    Linear,
    LogitNormal,
    MatchedEDM,
    Mixture,
    Mode,
    RectifiedFlow,
    Shifted,
    Straight,
    Uniform,
    conditional_velocity,
    conditional_velocity_snr,
    convert,
    diffuse,
    edm_weight,
    formulation,
    gaussian_velocity,
    guidance_at,
    guide,
    guide_skip_layers,
    interpolate,
    last_of,
    make_schedule,
    mode_map,
    mode_map_inverse,
    output_scales,
    path_length,
    rectified_flow_loss,
    released_schedule,
    rescale_guided,
    shift_log_snr,
    shift_time,
    shifted_schedule,
    solver_steps,
    uniform_draws,
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


# ------------------------------------------------------------------------------------------------------------
# Densities of t
# ------------------------------------------------------------------------------------------------------------

def test_eq19_in_the_middle_is_its_closed_form():
    """At t = 1/2, m = 0 the exponential is 1: 1 / (s sqrt(2 pi) / 4)."""
    half = double(0.5)
    for std in (0.6, 1.0, 2.2):
        assert LogitNormal(0, std).pdf(half).item() == pytest.approx(4 / (std * math.sqrt(2 * math.pi)), rel=1e-12)
    t = double(0.8)                                             # logit(.8) = log 4
    by_hand = math.exp(-((math.log(4) - 1) ** 2) / (2 * 0.6**2)) / (0.6 * math.sqrt(2 * math.pi) * 0.8 * 0.2)
    assert LogitNormal(1, 0.6).pdf(t).item() == pytest.approx(by_hand, rel=1e-12)


def test_a_larger_mean_gives_more_noise():
    """The mean t of lognorm(1, .6) is .716; a schedule read backwards gives .284."""
    assert integral(lambda t: t * LogitNormal(1, 0.6).pdf(t)) == pytest.approx(0.716, abs=5e-4)
    assert integral(LogitNormal(1, 0.6).quantile) == pytest.approx(0.716, abs=5e-4)
    assert integral(LogitNormal().quantile) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("mean, std, outside", [(0.0, 1.0, 0.0001), (0.5, 3.0, 0.201)])
def test_share_of_t_outside_the_middle(mean, std, outside):
    inside = integral(LogitNormal(mean, std).pdf, 0.02, 0.98)
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
    torch.testing.assert_close(Straight().log_snr(t_m), 2 * torch.log((1 - t_n) / (alpha * t_n)), rtol=1e-9, atol=1e-9)   # Eq. 24
    torch.testing.assert_close(Straight().log_snr(t_m), shift_log_snr(Straight().log_snr(t_n), alpha), rtol=1e-9, atol=1e-9)
    assert shift_log_snr(double(0.7), alpha).item() == pytest.approx(0.7 - 2 * math.log(alpha))                  # Eq. 25


def test_log_snr_of_logit_normal_times_is_normal():
    """logit(t) ~ N(m, s^2), so log_snr = -2 logit(t) has the quantiles of N(-2m, 4 s^2)."""
    u = grid(0.05, 0.95, 19)
    expected = -2 * (0.5 + 0.6 * torch.special.ndtri(u))
    torch.testing.assert_close(Straight().log_snr(LogitNormal(0.5, 0.6).quantile(u)), expected, rtol=1e-9, atol=1e-9)


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
    with pytest.raises(ValueError, match="timestep_shift=0"):
        make_schedule("released", 28, 0)


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
        sample = last_of(solver_steps("euler", lambda z, t: velocity_target(latent, noise), noise, schedule))
        torch.testing.assert_close(sample, latent, rtol=1e-5, atol=1e-5)


def test_euler_steps_visit_every_time_once_and_never_zero():
    seen, noise, times = [], torch.ones(3, 1, 2, 2), shifted_schedule(4, 3.0)

    def velocity(z, t):
        assert t.shape == (3,) and t.dtype == torch.float32 and (t == t[0]).all()
        seen.append(t[0].item())
        return z * t.view(-1, 1, 1, 1)
    steps = list(solver_steps("euler", velocity, noise, times))
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
    sample = last_of(solver_steps("euler", velocity, torch.ones(1, 1, 2, 2).bfloat16(), shifted_schedule(50)))
    assert sample.dtype == torch.float32
    assert sample.flatten()[0].item() == pytest.approx((1 - 1 / 50) ** 50, rel=1e-2)


def test_path_length_of_a_straight_path_is_the_distance():
    latent, noise = normal(0, 2, 3, 4, 6, 5, dtype=torch.float32)
    times = shifted_schedule(7, 3.0)
    velocities = [v for _, v in solver_steps("euler", lambda z, t: noise - latent, noise, times)]
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


# ------------------------------------------------------------------------------------------------------------
# Sec. 2: Eq. 1 to 12, on every path
# ------------------------------------------------------------------------------------------------------------

PROCESSES = [Straight(), Cosine(), Linear(), EDM(-1.2, 1.2), EDM(0.0, 0.6), MatchedEDM(Straight()), MatchedEDM(Cosine())]
OUTPUTS = ["velocity", "v", "eps", "x0", "F"]
TIMES = grid(0.03, 0.97, 48) + 1e-4                                               # never at a knot of Linear
RING = flow.RING
each_process = pytest.mark.parametrize("process", PROCESSES, ids=str)


def slope(f, t, h=1e-6):
    """df / dt by central differences; f(t) is (B,) or a pair."""
    return (f(t + h) - f(t - h)) / (2 * h)


@each_process
def test_eq1_velocity_carries_noise_to_the_mixture(process):
    """The ODE with the exact field ends at data: with the flow run finely, the samples have the mixture's weights."""
    form = Formulation(process, "v", Uniform())
    noise, times = normal(3, 1500, 2), flow.edm_schedule(100, process=process)
    sample = form.sample(RING.predict(form), noise, times)
    nearest = (sample[:, None] - RING.means).norm(dim=2).argmin(1)
    share = torch.bincount(nearest, minlength=3) / len(sample)
    assert (share - RING.weights).abs().max() < 0.04
    assert (sample - RING.means[nearest]).std().item() == pytest.approx(0.3, abs=0.03)


def test_defaults_are_those_of_karras_et_al_and_times_are_for_images():
    assert EDM() == EDM(-1.2, 1.2) and flow.SIGMA_DATA == 0.5
    assert LogitNormal() == LogitNormal(0.0, 1.0)
    assert torch.equal(released_schedule(5), released_schedule(5, 3.0))
    assert torch.equal(shifted_schedule(5), shifted_schedule(5, 1.0))
    assert flow.per_sample(double(0.1, 0.2)).shape == (2, 1, 1, 1) and flow.per_sample(double(0.1, 0.2), 2).shape == (2, 1)


@each_process
def test_eq2_and_4_diffuse_mixes_latent_and_noise(process):
    latent, noise = normal(0, 2, 48, 1, 1, 2)
    a, b = process.scales(TIMES)
    z = diffuse(latent, noise, a, b)
    for i in (0, 20, 47):
        torch.testing.assert_close(z[i], a[i] * latent[i] + b[i] * noise[i], rtol=1e-12, atol=1e-12)
    assert (b[1:] > b[:-1]).all() and (a[1:] <= a[:-1]).all()


def test_eq3_marginals_are_the_data_at_0_and_the_noise_at_1():
    """a_0 = 1, b_0 = 0, a_1 = 0, b_1 = 1 where the path allows it; Linear ends at a = .068, EDM's noise is unbounded."""
    ends = double(0.0, 1.0)
    for process in (Straight(), Cosine()):
        (a, b) = process.scales(ends)
        assert a.tolist() == [1, 0] and b.tolist() == [0, 1]
    a, b = Linear().scales(ends)
    assert a[0] == 1 and b[0] == 0 and a[1].item() == pytest.approx(0.0683, abs=5e-5)
    a, b = EDM().scales(ends)
    assert a.tolist() == [1, 1] and b[0] == 0 and b[1] == math.inf
    z = double([0.3, -0.2], [2.1, 0.1])
    at = lambda a, b: RING.log_terms(z, double(a, a), double(b, b)).logsumexp(1)
    torch.testing.assert_close(at(0.0, 1.0), -z.square().sum(1) / 2 - math.log(2 * math.pi))
    assert at(1.0, 0.0).argmax() == 1 and at(1.0, 0.0)[1] > -2


def test_eq3_log_density_of_a_mixture_is_that_of_its_samples():
    """p_t integrates to 1 over the plane, and has the mean and the variance of a x_0 + b eps."""
    x, y = (axis.flatten() for axis in torch.meshgrid(grid(-7, 7, 141), grid(-7, 7, 141), indexing="ij"))
    z, one = torch.stack([x, y], 1), torch.ones(len(x), dtype=torch.float64)
    a, b = 0.6, 0.7
    mass = RING.log_terms(z, a * one, b * one).logsumexp(1).exp() * 0.01
    assert mass.sum().item() == pytest.approx(1, abs=1e-6)
    mean = (RING.weights[:, None] * RING.means).sum(0)
    torch.testing.assert_close((mass[:, None] * z).sum(0), a * mean, rtol=1e-6, atol=1e-6)
    second = (RING.weights * (RING.means.square().sum(1) + 2 * 0.09)).sum() * a**2 + 2 * b**2
    assert (mass * z.square().sum(1)).sum().item() == pytest.approx(second.item(), abs=1e-5)
    sample = RING.sample(20000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(sample.mean(0), mean, rtol=0, atol=0.04)
    assert sample.square().sum(1).mean().item() == pytest.approx(
        (RING.weights * (RING.means.square().sum(1) + 2 * 0.09)).sum().item(), rel=0.03)


@each_process
def test_eq5_and_9_conditional_velocity_is_the_slope_along_the_path_of_one_noise(process):
    """u_t(z | eps) = psi'_t(psi_t^-1(z | eps) | eps)."""
    latent, noise = normal(0, 2, 48, 1, 2, 3)
    path = lambda t: diffuse(latent, noise, *process.scales(t))
    u = conditional_velocity(path(TIMES), noise, TIMES, process)
    torch.testing.assert_close(u, slope(path, TIMES), rtol=2e-5, atol=2e-5)
    target = diffuse(latent, noise, *output_scales("velocity", process, TIMES))
    torch.testing.assert_close(u, target, rtol=1e-8, atol=1e-8)


@each_process
def test_slopes_and_log_snr_slope_are_derivatives(process):
    for i in (0, 1):
        torch.testing.assert_close(process.slopes(TIMES)[i], slope(lambda t: process.scales(t)[i], TIMES), rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(process.log_snr_slope(TIMES), slope(process.log_snr, TIMES), rtol=2e-5, atol=1e-5)
    a, b = process.scales(TIMES)
    torch.testing.assert_close(process.log_snr(TIMES), torch.log(a.square() / b.square()), rtol=1e-9, atol=1e-9)


@each_process
def test_every_path_is_the_straight_one_at_another_pace_and_scale(process):
    """At the time of the straight path with the same log-SNR, z_t / (a + b) lies on that path."""
    torch.testing.assert_close(process.time_at(process.log_snr(TIMES)), TIMES, rtol=1e-9, atol=1e-9)
    s = process.on_line(TIMES)
    torch.testing.assert_close(Straight().log_snr(s), process.log_snr(TIMES), rtol=1e-8, atol=1e-8)
    latent, noise = normal(0, 2, 48, 2)
    a, b = process.scales(TIMES)
    torch.testing.assert_close(diffuse(latent, noise, a, b) / (a + b)[:, None], interpolate(latent, noise, s))
    assert process.on_line(double(0.0)).item() == 0 and (s[1:] > s[:-1]).all()


@each_process
@pytest.mark.parametrize("output", ["velocity", "v", "eps", "x0", "F"])
def test_a_network_of_any_formulation_is_a_velocity_on_the_straight_path(process, output):
    """Fed with exact outputs, `field` is eps - x_0 at the point, and asks the network at its own time and scale."""
    form, (latent, noise) = Formulation(process, output, Uniform()), normal(0, 2, 48, 2)

    def exact_network(z, t):
        z_t = diffuse(latent, noise, *process.scales(t))
        torch.testing.assert_close(t, TIMES, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(z, form.network_input(z_t, t), rtol=1e-6, atol=1e-6)
        return diffuse(latent, noise, *output_scales(output, process, t))
    s = process.on_line(TIMES)
    velocity = form.field(exact_network)(interpolate(latent, noise, s), s)
    torch.testing.assert_close(velocity, velocity_target(latent, noise), rtol=1e-5, atol=1e-5)


def test_eq6_marginal_field_is_the_average_of_conditional_ones():
    """u_t(z) = E[u_t(z | eps) p_t(z | eps) / p_t(z)], by a sum over a fine grid of eps, for a mixture on a line."""
    mixture = Mixture(double([-1.0], [1.5]), double(0.4, 0.2), double(0.7, 0.3))
    noise = grid(-9, 9, 40001)
    for process in PROCESSES:
        form = Formulation(process, "velocity", Uniform())
        t = double(0.45)
        (a, b), z = (x.item() for x in process.scales(t)), 0.35
        latent = (z - b * noise) / a                                              # psi^-1
        p_latent = mixture.log_terms(latent[:, None], torch.ones_like(noise), torch.zeros_like(noise)).logsumexp(1).exp()
        weight = p_latent / a * torch.exp(-noise.square() / 2)                    # p_t(z | eps) p(eps), not normalised
        u = conditional_velocity(torch.full_like(noise, z), noise, t.expand(len(noise)), process)
        ours = mixture.predict(form)(double([z]), t)
        assert ours.item() == pytest.approx(((weight * u).sum() / weight.sum()).item(), rel=1e-6)


@each_process
@pytest.mark.parametrize("output", OUTPUTS)
def test_eq7_and_8_the_best_network_is_the_marginal_field_and_any_other_is_worse(process, output):
    """L_CFM of the exact posterior is below that of a network a little off, by the square of the difference (Eq. 33)."""
    form = Formulation(process, output, Uniform())
    rng = torch.Generator().manual_seed(1)
    latent, t = RING.sample(6000, rng), form.density.sample(6000, rng, True)
    noise, best = torch.randn(6000, 2, generator=rng, dtype=torch.float64), RING.predict(form)
    floor = form.loss(best, latent, None, None, t, noise).mean()
    for offset in (-0.2, 0.2):
        loss = form.loss(lambda *x: best(*x) + offset, latent, None, None, t, noise).mean()
        assert (loss - floor).item() == pytest.approx(0.04, abs=0.4 * 0.2 * max(1, floor.item() ** 0.5) * 0.5)


@each_process
def test_eq10_the_velocity_by_log_snr_is_the_same(process):
    z, noise = normal(0, 2, 48, 1, 2, 3)
    torch.testing.assert_close(conditional_velocity_snr(z, noise, TIMES, process),
                               conditional_velocity(z, noise, TIMES, process), rtol=1e-9, atol=1e-9)


@each_process
def test_eq11_loss_in_terms_of_noise_is_the_velocity_loss(process):
    """|v - a'/a z + b/2 lambda' eps|^2 is |v - u(z | eps)|^2."""
    latent, noise, v = normal(0, 3, 48, 2)
    z = diffuse(latent, noise, *process.scales(TIMES))
    (a, b), (a_slope, _), snr_slope = process.scales(TIMES), process.slopes(TIMES), process.log_snr_slope(TIMES)
    column = lambda x: x[:, None]
    loss = (v - column(a_slope / a) * z + column(b / 2 * snr_slope) * noise).square().mean(1)
    ours = Formulation(process, "velocity").loss(lambda *_: v, latent, None, None, TIMES, noise)
    torch.testing.assert_close(ours.double(), loss, rtol=1e-5, atol=1e-5)


@each_process
def test_eq12_noise_prediction_has_the_weight_b_lambda_slope_over_2_squared(process):
    """eps_Theta = -2 / (lambda' b) (v - a'/a z), and L_CFM = (-b lambda' / 2)^2 |eps_Theta - eps|^2."""
    latent, noise, v = normal(0, 3, 48, 2)
    z = diffuse(latent, noise, *process.scales(TIMES))
    (a, b), (a_slope, _), snr_slope = process.scales(TIMES), process.slopes(TIMES), process.log_snr_slope(TIMES)
    column = lambda x: x[:, None]
    eps = column(-2 / (snr_slope * b)) * (v - column(a_slope / a) * z)
    torch.testing.assert_close(convert(v, z, TIMES, process, "velocity", "eps"), eps, rtol=1e-7, atol=1e-7)
    loss = Formulation(process, "velocity").loss(lambda *_: v, latent, None, None, TIMES, noise)
    expected = (b * snr_slope / 2).square() * (eps - noise).square().mean(1)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)


@each_process
@pytest.mark.parametrize("source", OUTPUTS)
@pytest.mark.parametrize("target", OUTPUTS)
def test_outputs_convert_exactly_into_each_other(process, source, target):
    latent, noise = normal(0, 2, 48, 1, 2, 3)
    z = diffuse(latent, noise, *process.scales(TIMES))
    prediction, expected = (diffuse(latent, noise, *output_scales(name, process, TIMES)) for name in (source, target))
    torch.testing.assert_close(convert(prediction, z, TIMES, process, source, target), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("process", [Straight(), Cosine()], ids=str)
def test_conversions_at_both_ends_are_finite_and_right_where_the_answer_is_known(process):
    latent, noise = normal(0, 2, 1, 2)
    for t in (double(0.0), double(1.0)):
        z = diffuse(latent, noise, *process.scales(t))
        for source in OUTPUTS:
            prediction = diffuse(latent, noise, *output_scales(source, process, t))
            for target in OUTPUTS:
                result = convert(prediction, z, t, process, source, target)
                assert result.isfinite().all()
                if source in ("v", "velocity", "F"):                              # never blind
                    torch.testing.assert_close(result, diffuse(latent, noise, *output_scales(target, process, t)))


@each_process
@pytest.mark.parametrize("output", OUTPUTS)
def test_losses_at_both_ends_are_finite(process, output):
    latent, noise = normal(0, 2, 2, 1, 2, 2, dtype=torch.float32)
    form = Formulation(process, output)
    loss = form.loss(lambda z, *_: z * 0, latent, None, None, torch.tensor([0.0, 1.0]), noise)
    assert loss.isfinite().all() and loss.dtype == torch.float32


def test_f_prediction_is_edms_preconditioning():
    """D = c_skip z + c_out F, network input c_in z, with the constants of Karras et al. at sigma_data = .5."""
    process, (latent, noise) = EDM(-1.2, 1.2), normal(0, 2, 48, 2)
    sigma = process.scales(TIMES)[1]
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    z = diffuse(latent, noise, torch.ones_like(sigma), sigma)
    form, seen = Formulation(process, "F", Uniform()), []
    prediction = normal(1, 48, 2)
    loss = form.loss(lambda x, *_: seen.append(x) or prediction, latent, None, None, TIMES, noise)
    torch.testing.assert_close(seen[0], z / (sigma**2 + 0.25).sqrt()[:, None])
    denoised = c_skip[:, None] * z + c_out[:, None] * prediction
    torch.testing.assert_close(convert(prediction, z, TIMES, process, "F", "x0"), denoised, rtol=1e-9, atol=1e-9)
    expected = ((denoised - latent).square().mean(1) / c_out**2)                  # EDM's own weight 1 / c_out^2
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_f_prediction_targets_have_unit_size_for_data_of_its_deviation():
    for process in PROCESSES:
        p, q = output_scales("F", process, TIMES)
        torch.testing.assert_close(p.square() * 0.25 + q.square(), torch.ones_like(p))
        a, b = process.scales(TIMES)
        torch.testing.assert_close(p * a * 0.25 + q * b, torch.zeros_like(p), rtol=0, atol=1e-9)       # and none of z in them


def test_an_unknown_output_is_refused():
    with pytest.raises(ValueError, match="'score'.*velocity, straight, v, eps, x0 or F"):
        output_scales("score", Straight(), TIMES)


# ------------------------------------------------------------------------------------------------------------
# Sec. 3: Eq. 13 to 17, the paths and weights
# ------------------------------------------------------------------------------------------------------------

def noise_weight(form, t):
    """-1/2 w_t lambda'_t: what the square error of eps is multiplied by in L_w."""
    return -0.5 * form.weight(t) * form.process.log_snr_slope(t)


def normal_pdf(x, mean, std):
    return torch.distributions.Normal(*double(mean, std)).log_prob(x).exp()


def proportional(x, y, factor):
    torch.testing.assert_close(x, factor * y, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["rf", "rf/lognorm(0.50, 0.60)", "eps/linear", "v/linear", "eps/cos", "v/cos", "edm(0.00, 0.60)",
                                  "edm/rf", "edm/cos"])
def test_loss_is_l_w_with_the_stated_weight(name):
    """pi(t) |error of output|^2 = -1/2 w_t lambda'_t |error of eps|^2."""
    form = formulation(name)
    latent, noise, prediction = normal(0, 3, 48, 2)
    z = diffuse(latent, noise, *form.process.scales(TIMES))
    eps = convert(prediction, z, TIMES, form.process, form.output, "eps")
    loss = form.loss(lambda *_: prediction, latent, None, None, TIMES, noise)
    expected = noise_weight(form, TIMES) * (eps - noise).square().mean(1)
    torch.testing.assert_close(form.density.pdf(TIMES) * loss.double(), expected, rtol=1e-4, atol=1e-5)


def test_eq13_weight_of_rectified_flow_is_t_over_1_minus_t():
    proportional(formulation("rf").weight(TIMES), TIMES / (1 - TIMES), 1)
    b, snr_slope = TIMES, Straight().log_snr_slope(TIMES)
    proportional(formulation("rf").weight(TIMES), -0.5 * snr_slope * b**2, 1)    # w_t = -1/2 lambda' b^2 is L_CFM


def test_eq14_edm_noise_is_the_exponential_of_a_normal_quantile():
    t = double(0.5, 0.841344746068543)                                            # mean and one deviation above it
    a, b = EDM(-0.6, 1.8).scales(t)
    torch.testing.assert_close(a, double(1.0, 1.0))
    torch.testing.assert_close(torch.log(b), double(-0.6, 1.2))


@pytest.mark.parametrize("mean, std", [(-1.2, 1.2), (0.6, 0.6)])
def test_eq15_log_snr_of_edm_is_normal(mean, std):
    u = uniform_draws(20000, torch.Generator().manual_seed(0), True)
    log_snr = EDM(mean, std).log_snr(u)
    assert log_snr.mean().item() == pytest.approx(-2 * mean, abs=0.01)
    assert log_snr.std().item() == pytest.approx(2 * std, rel=0.01)
    pdf = -1 / EDM(mean, std).log_snr_slope(TIMES)                                # density of log_snr under uniform t
    expected = normal_pdf(EDM(mean, std).log_snr(TIMES), -2 * mean, 2 * std)
    torch.testing.assert_close(pdf, expected, rtol=1e-8, atol=0)


def test_edm_seen_from_the_straight_path_is_logit_normal():
    """The same log-SNRs on the path of Eq. 13: logit(t) ~ N(P_m, P_s^2)."""
    on_line = Straight().time_at(EDM(-0.6, 1.2).log_snr(TIMES))
    torch.testing.assert_close(on_line, LogitNormal(-0.6, 1.2).quantile(TIMES), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mean, std", [(-1.2, 1.2), (0.0, 0.6)])
def test_eq16_weight_of_edm_and_what_cancels(mean, std):
    form = formulation(f"edm({mean}, {std})")
    log_snr = form.process.log_snr(TIMES)
    proportional(form.weight(TIMES), edm_weight(log_snr, mean, std), 8)
    proportional(noise_weight(form, TIMES), torch.exp(-log_snr) + 0.25, 4)        # the normal density and lambda' are gone
    expected = normal_pdf(log_snr, -2 * mean, 2 * std) * (torch.exp(-log_snr) + 0.5**2)
    torch.testing.assert_close(edm_weight(log_snr, mean, std), expected)


def test_eq17_cosine_path_and_its_weights():
    a, b = Cosine().scales(TIMES)
    torch.testing.assert_close(a, torch.cos(math.pi / 2 * TIMES))
    torch.testing.assert_close(b, torch.sin(math.pi / 2 * TIMES))
    log_snr = Cosine().log_snr(TIMES)
    proportional(formulation("eps/cos").weight(TIMES), 1 / torch.cosh(log_snr / 2), 1 / math.pi)
    proportional(formulation("v/cos").weight(TIMES), torch.exp(-log_snr / 2), 2 / math.pi)
    v, velocity = (output_scales(name, Cosine(), TIMES) for name in ("v", "velocity"))
    for i in (0, 1):
        torch.testing.assert_close(velocity[i], math.pi / 2 * v[i])


def test_ldm_linear_has_the_discrete_schedule_at_its_knots():
    """beta_t = (sqrt(.00085) + t/(T-1) (sqrt(.012) - sqrt(.00085)))^2, a_t = prod(1 - beta)^(1/2), step i at (i + 1)/1000."""
    a = 1.0
    for i in range(1000):
        beta = (0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2
        a *= (1 - beta) ** 0.5
        if i in (0, 1, 499, 998, 999):
            ours_a, ours_b = Linear().scales(double((i + 1) / 1000))
            assert ours_a.item() == pytest.approx(a, rel=1e-10)
            assert ours_b.item() == pytest.approx((1 - a * a) ** 0.5, rel=1e-8)
    assert Linear().first == 0.001 and Linear().last == 1.0


def test_ldm_linear_inverts_in_its_first_and_last_steps_too():
    t = double(0.0, 0.0004, 0.001, 0.0014, 0.002, 0.9993, 1.0)
    torch.testing.assert_close(Linear().time_at(Linear().log_snr(t)), t, rtol=1e-7, atol=1e-9)
    a, b = Linear().scales(t)
    torch.testing.assert_close(a.square() + b.square(), torch.ones_like(a))
    assert a[1].item() == pytest.approx((1 - 0.00085) ** 0.2, rel=1e-9)           # .4 of the first step
    assert Linear().slopes(double(0.0004))[0].item() == pytest.approx(a[1].item() * 500 * math.log(1 - 0.00085), rel=1e-9)


def test_ldm_linear_is_geometric_between_its_knots():
    a = [Linear().scales(double(t))[0].item() for t in (0.3, 0.3005, 0.301)]
    assert a[1] == pytest.approx((a[0] * a[2]) ** 0.5, rel=1e-10)


def test_edm_rf_and_edm_cos_have_the_log_snr_of_their_paths_and_the_plain_loss_of_f():
    for name, other in (("edm/rf", Straight()), ("edm/cos", Cosine())):
        form = formulation(name)
        torch.testing.assert_close(form.process.log_snr(TIMES), other.log_snr(TIMES), rtol=1e-9, atol=1e-9)
        proportional(noise_weight(form, TIMES), torch.exp(-other.log_snr(TIMES)) + 0.25, 4)
    # by log-SNR, the weights of rf and v/cos are one function, e^(-lambda/2), so they cannot be what tells the two apart
    for name in ("rf", "v/cos"):
        form = formulation(name)
        ratio = form.weight(TIMES) / torch.exp(-form.process.log_snr(TIMES) / 2)
        torch.testing.assert_close(ratio, ratio[0].expand(48), rtol=1e-8, atol=0)


# ------------------------------------------------------------------------------------------------------------
# Sec. 3.1: densities, Eq. 18 to 22
# ------------------------------------------------------------------------------------------------------------

ALL_DENSITIES = [*DENSITIES, Uniform(), CosMap(), *(Mode(s) for s in (-1.0, -0.54, 0.0, 0.81, 1.29, 1.75)),
                 LogitNormal(0, 0.2), LogitNormal(1, 2.2), Shifted(Mode(1.29), 3.0), Shifted(Uniform(), 2.0)]
each_density = pytest.mark.parametrize("density", ALL_DENSITIES, ids=str)


@each_density
def test_eq18_weighting_by_pi_is_sampling_from_pi(density):
    """E_U[pi(t) f(t)] = E_pi[f(t)], so w_t^pi = t / (1 - t) pi(t) under uniform t."""
    f = lambda t: torch.sin(3 * t) + t.square()
    tolerance = 2e-3 if density == Mode(-1.0) else 1e-4                           # its pdf is infinite at both ends
    sampled = integral(lambda u: f(density.quantile(u)))
    assert integral(lambda t: density.pdf(t) * f(t), steps=200000) == pytest.approx(sampled, rel=tolerance)
    proportional(RectifiedFlow(density).weight(TIMES), TIMES / (1 - TIMES) * density.pdf(TIMES), 1)


@each_density
def test_density_integrates_to_one_and_is_the_slope_of_its_distribution_function(density):
    tolerance = 3e-3 if density == Mode(-1.0) else 1e-4
    assert integral(density.pdf, steps=200000) == pytest.approx(1, rel=tolerance)
    torch.testing.assert_close(slope(density.cdf, TIMES, 1e-5), density.pdf(TIMES), rtol=1e-5, atol=1e-7)
    ends = density.cdf(double(0.0, 1.0))
    torch.testing.assert_close(ends, double(0.0, 1.0), rtol=0, atol=1e-8)      # 1e-8 is the square root of an fp64 step


@each_density
def test_quantile_and_distribution_function_invert(density):
    u = grid(0.01, 0.99, 99)
    torch.testing.assert_close(density.cdf(density.quantile(u)), u, rtol=1e-9, atol=1e-9)
    inside = TIMES[(density.cdf(TIMES) > 1e-6) & (density.cdf(TIMES) < 1 - 1e-6)]
    torch.testing.assert_close(density.quantile(density.cdf(inside)), inside, rtol=1e-7, atol=1e-7)


@each_density
def test_samples_follow_the_density(density):
    """Kolmogorov-Smirnov: the largest gap of the two distribution functions, at 1.95 / sqrt(n) once in a thousand."""
    n = 20000
    t = density.sample(n, torch.Generator().manual_seed(7)).sort().values
    expected = density.cdf(t)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    gap = torch.maximum((expected - steps[:-1]).abs(), (expected - steps[1:]).abs()).max().item()
    assert gap < 1.95 / math.sqrt(n)
    even = density.sample(n, torch.Generator().manual_seed(7), stratified=True).sort().values
    assert (density.cdf(even) - (steps[:-1] + 0.5 / n)).abs().max() <= 0.5 / n + 1e-9
    assert torch.equal(density.sample(5, torch.Generator().manual_seed(1)), density.sample(5, torch.Generator().manual_seed(1)))


def test_stratified_draws_have_one_in_each_part_in_random_order():
    u = uniform_draws(64, torch.Generator().manual_seed(0), stratified=True)
    assert sorted((u * 64).long().tolist()) == list(range(64)) and u.tolist() != sorted(u.tolist())
    assert (uniform_draws(64, torch.Generator().manual_seed(0)) * 64).long().unique().numel() < 64


@pytest.mark.parametrize("s", [-1.0, -0.5, 0.0, 1.29, 1.75])
def test_eq20_map_falls_from_1_to_0_and_inverts(s):
    u = grid(0, 1, 501)
    t = mode_map(u, s)
    assert t[0] == 1 and t[-1].abs() < 1e-12 and (t[1:] < t[:-1]).all()
    torch.testing.assert_close(mode_map_inverse(t[5:-5], s), u[5:-5], rtol=1e-9, atol=1e-9)
    for x in (0.2, 0.7):
        expected = 1 - x - s * (math.cos(math.pi / 2 * x) ** 2 - 1 + x)
        assert mode_map(double(x), s).item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(Mode(s).pdf(TIMES), 1 / slope(lambda t: mode_map(1 - t, s), mode_map_inverse(1 - TIMES, s)),
                               rtol=1e-6, atol=0)


def test_eq20_refuses_scales_where_the_map_is_not_monotonic():
    for s in (-1.01, 1.76, math.nan):
        with pytest.raises(ValueError, match="monotonic"):
            Mode(s)
    assert Mode(2 / (math.pi - 2)).pdf(double(0.3)).isfinite()


def test_eq21_straight_path_at_mapped_times_has_the_log_snr_of_the_cosine_path():
    u = grid(0.01, 0.99, 99)
    torch.testing.assert_close(Straight().log_snr(CosMap().quantile(u)), Cosine().log_snr(u), rtol=1e-9, atol=1e-9)
    assert CosMap().quantile(double(0.3)).item() == pytest.approx(1 - 1 / (math.tan(math.pi / 2 * 0.3) + 1), rel=1e-12)


def test_eq22_density_formula():
    for t in (0.0, 0.3, 1.0):
        assert CosMap().pdf(double(t)).item() == pytest.approx(2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2), rel=1e-12)


def test_bad_densities_and_paths_are_refused():
    for bad in (lambda: LogitNormal(0, 0), lambda: LogitNormal(0, -1.0), lambda: Shifted(Uniform(), 0.0), lambda: EDM(0, 0)):
        with pytest.raises(ValueError, match="must be greater than 0"):
            bad()


# ------------------------------------------------------------------------------------------------------------
# Formulations
# ------------------------------------------------------------------------------------------------------------

def test_61_names_are_those_of_the_study_and_round_trip():
    assert len(FORMULATIONS) == len(set(FORMULATIONS)) == 61
    groups = {"eps/": 2, "v/": 2, "rf": 40, "rf/mode": 8, "rf/lognorm": 30, "rf/cosmap": 1, "edm": 17, "edm(": 15}
    for start, count in groups.items():
        assert sum(name.startswith(start) for name in FORMULATIONS) == count
    printed = ("rf/lognorm(0.00, 1.00)", "rf/lognorm(1.00, 0.60)", "rf/mode(1.29)", "rf/mode(1.75)", "edm(0.00, 0.60)",
               "edm(0.60, 1.20)", "edm(-1.20, 1.20)", "rf/lognorm(-0.50, 1.00)", "rf/mode(1.00)", "rf/mode(-1.00)")
    assert set(printed) < set(FORMULATIONS)
    modes = {"-1.00", "-0.54", "-0.08", "0.38", "0.83", "1.00", "1.29", "1.75"}     # 7 evenly from -1 to 1.75, and 1
    assert {name[8:-1] for name in FORMULATIONS if name.startswith("rf/mode")} == modes
    pairs = lambda start: {name.removeprefix(start)[:-1] for name in FORMULATIONS if name.startswith(start)}
    assert pairs("rf/lognorm(") == {f"{m}, {s}" for m in ("-1.00", "-0.50", "0.00", "0.50", "1.00")
                                    for s in ("0.20", "0.60", "1.00", "1.40", "1.80", "2.20")}
    assert pairs("edm(") == {f"{m}, {s}" for m in ("-1.20", "-0.60", "0.00", "0.60", "1.20") for s in ("0.60", "1.20", "1.80")}
    for name in FORMULATIONS:
        assert formulation(name).name == name
    assert len({str(formulation(name)).replace(name, "") for name in FORMULATIONS}) == 61


def test_names_may_be_written_shorter_and_say_what_is_wrong():
    assert formulation(" edm(-1.2,1.2) ").name == "edm(-1.20, 1.20)"
    assert formulation("rf/mode(0.123)").name == "rf/mode(0.123)"
    assert formulation("rf/lognorm(0.5, 0.6)").density == LogitNormal(0.5, 0.6)
    for name, problem in (("rf/magic", "choose one of rf, rf/mode"), ("rf/mode", "takes 1 number in brackets"),
                          ("rf(1)", "takes no numbers"), ("edm(1.2)", "takes 2 numbers"), ("edm(a, b)", "takes 2 numbers"),
                          ("edm(1, 2", "no formulation"), ("rf/mode(3)", "monotonic"), ("rf/mode()", "takes 1"),
                          ("rf/mode(nan)", "takes 1"),
                          ("edm(0, -1)", "greater than 0")):
        with pytest.raises(ValueError, match=problem):
            formulation(name)


def test_rectified_flow_is_the_loss_of_eq8_to_the_bit():
    latent, noise = normal(0, 2, 8, 4, 3, 3, dtype=torch.float32)
    t, model = torch.rand(8, generator=torch.Generator().manual_seed(0)), lambda z, t, *_: 0.3 * z * t.view(-1, 1, 1, 1)
    ours = RectifiedFlow(LogitNormal()).loss(model, latent, None, None, t, noise)
    assert torch.equal(ours, rectified_flow_loss(model, latent, None, None, t, noise))
    assert RectifiedFlow() == formulation("rf/lognorm(0.00, 1.00)")


def small_network(seed):
    """(z, t) -> output for (B, 2): two layers."""
    torch.manual_seed(seed)
    layers = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.SiLU(), torch.nn.Linear(32, 2))
    return layers, lambda z, t, *_: layers(torch.cat([z, t[:, None]], 1))


@pytest.mark.parametrize("name", FORMULATIONS)
def test_every_formulation_trains(name):
    """10 steps on one batch, noise and t: finite, and falling at every step."""
    form, rng = formulation(name), torch.Generator().manual_seed(0)
    latent, noise = RING.sample(64, rng).float(), torch.randn(64, 2, generator=rng)
    t = form.density.sample(64, rng, stratified=True).float()
    layers, model = small_network(0)
    optimizer, losses = torch.optim.AdamW(layers.parameters(), lr=3e-3), []
    for _ in range(10):
        loss = form.loss(model, latent, None, None, t, noise).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(math.isfinite(x) for x in losses) and all(x > y for x, y in zip(losses, losses[1:]))


REPRESENTATIVES = ["rf/lognorm(0.00, 1.00)", "eps/linear", "v/linear", "eps/cos", "v/cos", "edm(-1.20, 1.20)", "edm(0.60, 1.80)",
                   "edm/rf", "edm/cos"]


@pytest.mark.parametrize("name", REPRESENTATIVES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_exact_posterior_recovers_the_mixture_through_every_solver(name, solver):
    """Weights, centres and spread of the data, from noise, the exact E[output | z] and 60 steps, or 16 of RK4."""
    form, noise = formulation(name), normal(5, 1000, 2)
    sample = form.sample(RING.predict(form), noise, form.schedule(16 if solver == "rk4" else 60), solver)
    nearest = (sample[:, None] - RING.means).norm(dim=2).argmin(1)
    share = torch.bincount(nearest, minlength=3) / len(sample)
    assert (share - RING.weights).abs().max() < 0.05
    for k in range(3):
        part = sample[nearest == k]
        assert (part.mean(0) - RING.means[k]).abs().max() < 0.06
        assert part.std(0).mean().item() == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("name", ["rf", "eps/linear", "v/cos", "edm(-1.20, 1.20)"])
def test_eulers_step_keeps_latent_and_noise_as_ddim_and_edm_do(name):
    """Step by step on the formulation's own path: z_next = a_next x_0 + b_next eps, both as the network has them at t."""
    form, noise = formulation(name), normal(0, 5, 2)
    model, times = RING.predict(form), torch.cat([form.clamp(grid(1, 0, 7)[:-1]), double(0.0)])
    z = noise * torch.hypot(*form.process.scales(times[0]))
    for t, t_next in zip(times[:-1].expand(5, -1).T, times[1:].expand(5, -1).T):
        output = model(form.network_input(z, t), t)
        latent, eps = (convert(output, z, t, form.process, form.output, kind) for kind in ("x0", "eps"))
        z = diffuse(latent, eps, *form.process.scales(t_next))
    torch.testing.assert_close(form.sample(model, noise, form.process.on_line(times)), z, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("output", ["velocity", "v", "eps", "x0", "F"])
@pytest.mark.parametrize("process", [Straight(), Cosine(), Linear(), EDM()], ids=str)
def test_what_the_network_predicts_does_not_change_the_sample(process, output):
    noise, forms = normal(5, 50, 2), [Formulation(process, name, Uniform()) for name in (output, "v")]
    times = flow.edm_schedule(12, process=process).clamp(max=Cosine().on_line(double(0.999)).item())
    a, b = (form.sample(RING.predict(form), noise, times) for form in forms)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_sampling_begins_at_the_true_marginal_and_keeps_to_the_path(name):
    """The network first sees sqrt(a^2 + b^2) noise (divided by its size for F), in fp32, and times that it was trained at."""
    noise, form, seen = normal(0, 4, 2, dtype=torch.float32), formulation(name), []
    network = lambda z, t: seen.append((z, t)) or 0 * z
    steps = list(form.sample_steps(network, noise, form.schedule(8)))
    first, last = form.clamp(double(0.0, 1.0)).tolist()
    assert len(seen) == len(steps) == 8 and all(z.dtype == t.dtype == torch.float32 for z, t in seen)
    times = torch.stack([t[0] for _, t in seen]).double()
    assert times.min() > first - 1e-6 and times.max() < last + 1e-6 and (times[1:] < times[:-1]).all()
    t = form.process.time_at(Straight().log_snr(form.schedule(8)[:1].double()))
    a, b = form.process.scales(form.clamp(t))
    torch.testing.assert_close(seen[0][0].double(), form.network_input((a**2 + b**2).sqrt() * noise.double(), t.expand(4)),
                               rtol=1e-3, atol=1e-3)
    for z, _ in steps:
        assert z.dtype == torch.float32 and z.isfinite().all()


def test_times_that_a_path_does_not_reach_are_cut_off():
    """From 1, LDM-linear begins at its own end, a = .068: so many steps fewer; a shorter schedule begins where it says."""
    noise, form, seen = normal(0, 4, 2), formulation("v/linear"), []
    network = lambda z, t: seen.append((z, t)) or 0 * z
    list(form.sample_steps(network, noise, double(1.0, 0.97, 0.95, 0.5, 0.0)))
    assert [t[0].item() for _, t in seen] == pytest.approx([1.0, form.process.time_at(double(0.0)).item()], rel=1e-6)
    torch.testing.assert_close(seen[0][0], noise, rtol=1e-6, atol=0)
    seen.clear()
    list(RectifiedFlow().sample_steps(network, noise, double(0.6, 0.0)))
    assert len(seen) == 1 and seen[0][1][0].item() == pytest.approx(0.6)
    torch.testing.assert_close(seen[0][0], (0.4**2 + 0.6**2) ** 0.5 * noise)


def test_noise_prediction_never_starts_where_it_says_nothing():
    assert formulation("eps/cos").clamp(double(0.0, 0.5, 1.0)).tolist() == [0.0, 0.5, 0.999]
    assert formulation("eps/linear").clamp(double(0.0, 1.0)).tolist() == [0.001, 1.0]
    assert Formulation(Straight(), "eps").clamp(double(1.0)).tolist() == [0.999]
    assert formulation("v/cos").clamp(double(0.0, 1.0)).tolist() == [0.0, 1.0]
    assert formulation("edm/rf").clamp(double(0.0, 1.0)).tolist() == [1e-5, 1 - 1e-5]
    assert Formulation(EDM(), "eps").clamp(double(1.0)).tolist() == [1 - 1e-5]


# ------------------------------------------------------------------------------------------------------------
# Solvers and guidance
# ------------------------------------------------------------------------------------------------------------

# 1 / slope of the error: Euler 2, Heun and DPM-Solver++ 4, RK4 16 as the number of steps doubles
@pytest.mark.parametrize("solver, order, counts", [("euler", 1, (40, 80, 160)), ("heun", 2, (40, 80, 160)),
                                                   ("rk4", 4, (40, 80, 160)), ("dpm++2m", 2, (160, 320, 640))])
def test_solvers_converge_at_their_order_to_the_exact_flow(solver, order, counts):
    """Data N(2, .5^2): noise n flows to 2 + .5 n. (DPM-Solver++: h^2 log(1/h), as steps near 0 are large in log t.)"""
    noise = normal(0, 64, 1, 1, 1)
    velocity = lambda z, t: gaussian_velocity(z, t, 2, 0.5)
    errors = [(last_of(solver_steps(solver, velocity, noise, grid(1, 0, n + 1))) - (2 + 0.5 * noise)).abs().max().item()
              for n in counts]
    for coarse, fine in zip(errors, errors[1:]):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_step_is_exact_if_the_velocity_is_constant(solver):
    latent, noise = normal(0, 2, 3, 2)
    steps = solver_steps(solver, lambda z, t: velocity_target(latent, noise), noise, double(1.0, 0.0))
    torch.testing.assert_close(last_of(steps), latent)


def test_dpm_solver_extrapolates_half_a_step_in_log_time():
    """By hand: times 1, .5, .2, velocities -x_0 + noise with the latents D_0 and D_1."""
    noise, latents = double([[[1.0]]]), iter([2.0, 3.0])
    def velocity(z, t):
        return (z - next(latents)) / t.view(-1, 1, 1)                             # x_0 = z - t v
    steps = [z.item() for z, _ in solver_steps("dpm++2m", velocity, noise, double(1.0, 0.5, 0.2))]
    assert steps[0] == pytest.approx(0.5 * 1 + 0.5 * 2)
    extrapolated = 3 + (3 - 2) * math.log(0.5 / 0.2) / (2 * math.log(1 / 0.5))
    assert steps[1] == pytest.approx(0.4 * 1.5 + 0.6 * extrapolated)


def test_solvers_by_name_and_an_unknown_one():
    with pytest.raises(ValueError, match="'dopri'.*euler, heun, rk4, dpm"):
        list(solver_steps("dopri", None, None, None))
    assert set(SOLVERS) == {"euler", "heun", "rk4", "dpm++2m"}


def test_heun_ends_with_a_step_of_euler():
    seen = []
    def velocity(z, t):
        seen.append(t[0].item())
        return -z
    list(solver_steps("heun", velocity, torch.ones(1, 1), double(1.0, 0.5, 0.0)))
    assert seen == [1.0, 0.5, 0.5]


def test_edm_schedule_is_even_in_the_seventh_root_of_the_noise_level():
    """sigma = t / (1 - t) on the straight path, from 80 or pure noise to .002, as far as the path goes."""
    for process, steps in ((EDM(-1.2, 1.2), 18), (EDM(1.2, 0.6), 5), (Linear(), 5)):
        times = flow.edm_schedule(steps, process=process).double()
        assert times[-1] == 0 and len(times) == steps + 1
        sigma = times[:-1] / (1 - times[:-1])
        a, b = process.scales(double(process.first, process.last))
        low, high = (b / a).tolist()
        assert sigma[0].item() == pytest.approx(min(80, high), rel=1e-4)
        assert sigma[-1].item() == pytest.approx(max(0.002, low), rel=1e-4)
        root = sigma ** (1 / 7)
        torch.testing.assert_close(root[1:] - root[:-1], (root[-1] - root[0]).expand(steps - 1) / (steps - 1), rtol=1e-3, atol=0)
    straight = flow.edm_schedule(5).double()
    assert straight[0] == 1 and straight[-1] == 0 and straight[-2].item() == pytest.approx(0.002 / 1.002, rel=1e-4)
    second = (80 ** (1 / 7) + 0.25 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert straight[1].item() == pytest.approx(second / (1 + second), rel=1e-5)
    torch.testing.assert_close(flow.edm_schedule(5, 3.0).double(), shift_time(straight, 3.0), rtol=1e-5, atol=1e-7)


def test_schedules_of_formulations_are_even_in_their_own_time_or_edms():
    assert torch.equal(formulation("rf").schedule(5), shifted_schedule(5))
    for name in ("eps/linear", "v/cos", "eps/cos"):
        form = formulation(name)
        times = form.schedule(5).double()
        assert times[-1] == 0 and form.schedule(5).dtype == torch.float32
        own = form.process.time_at(Straight().log_snr(times[:-1]))
        torch.testing.assert_close(own, form.clamp(grid(1, 0, 6)[:-1]), rtol=1e-5, atol=1e-5)
    process = formulation("edm/cos").process
    assert torch.equal(formulation("edm/cos").schedule(5), flow.edm_schedule(5, process=process))
    assert torch.equal(make_schedule("uniform", 5, 3.0), shifted_schedule(5))
    assert formulation("edm/cos").schedule(5)[0].item() == pytest.approx(80 / 81, rel=1e-6)      # the path would go to 6e4


def test_guidance_in_an_interval():
    assert guidance_at(0.5, 5.0) == 5.0 and guidance_at(0.5, 5.0, 0.8, 0.2) == 5.0
    assert guidance_at(0.8, 5.0, 0.8, 0.2) == 5.0 and guidance_at(0.2, 5.0, 0.8, 0.2) == 5.0
    assert guidance_at(1.0, 5.0) == 5.0 and guidance_at(0.0, 5.0) == 5.0
    assert guidance_at(0.9, 5.0, 0.8, 0.2) == 1.0 and guidance_at(0.1, 5.0, 0.8, 0.2) == 1.0
    scales = [guidance_at(t, 5.0, 0.8, 0.2) for t in shifted_schedule(10).tolist()]             # fp32: .8 is a little more
    assert scales == [1.0] * 2 + [5.0] * 7 + [1.0] * 2


def test_rescaled_guidance_gives_back_the_spread_by_its_share():
    cond, guided = normal(0, 2, 3, 4, 4), 3 * normal(1, 2, 3, 4, 4)
    spread = lambda x: x.flatten(1).std(1)
    assert torch.equal(rescale_guided(guided, cond, 0.0), guided)
    assert rescale_guided(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2), 0.7).eq(0).all()     # an untrained network
    torch.testing.assert_close(spread(rescale_guided(guided, cond, 1.0)), spread(cond))
    torch.testing.assert_close(spread(rescale_guided(guided, cond, 0.7)), 0.7 * spread(cond) + 0.3 * spread(guided))


def test_skip_layer_guidance_pushes_away_from_the_weaker_network():
    guided, cond, skipped = (torch.full((1, 1, 2, 2), x) for x in (7.0, 3.0, 2.5))
    assert (guide_skip_layers(guided, cond, skipped, 2.0) == 8).all()
    assert torch.equal(guide_skip_layers(guided, cond, skipped, 0.0), guided)


def test_guidance_of_any_output_is_guidance_of_the_velocity():
    cond, uncond, z = normal(0, 3, 48, 2)
    for process in PROCESSES:
        to_velocity = lambda x: convert(x, z, TIMES, process, "F", "velocity")
        torch.testing.assert_close(to_velocity(guide(cond, uncond, 4.0)), guide(to_velocity(cond), to_velocity(uncond), 4.0),
                                   rtol=1e-8, atol=1e-8)


# ------------------------------------------------------------------------------------------------------------
# App. B.1, Eq. 26 to 36, and the floor of the loss
# ------------------------------------------------------------------------------------------------------------

LINE = Mixture(double([-1.0], [1.2]), double(0.4, 0.3), double(0.6, 0.4))


def line_density(process, x, t):
    a, b = (y.expand(len(x)) for y in process.scales(t))
    return LINE.log_terms(x[:, None], a, b).logsumexp(1).exp()


def line_field(process, x, t):
    return LINE.predict(Formulation(process, "velocity"))(x[:, None], t.expand(len(x)))[:, 0]


@each_process
@pytest.mark.parametrize("t", [0.2, 0.6])
def test_eq26_to_29_the_marginal_field_fulfils_the_continuity_equation(process, t):
    """d/dt p_t + d/dx (p_t u_t) = 0 for a mixture on a line, both derivatives by central differences."""
    x, t, h = grid(-2, 2, 41), double(t + 3e-4), 1e-5
    change = (line_density(process, x, t + h) - line_density(process, x, t - h)) / (2 * h)
    flux = lambda x: line_density(process, x, t) * line_field(process, x, t)
    divergence = (flux(x + h) - flux(x - h)) / (2 * h)
    torch.testing.assert_close(change, -divergence, rtol=1e-4, atol=1e-5)


@each_process
def test_eq27_and_28_the_conditional_field_fulfils_it_too(process):
    """For one noise the density p_t(z | eps) is the data's, moved and scaled: z = a x_0 + b eps."""
    x, t, h, noise = grid(-2, 2, 41), double(0.4003), 1e-5, 0.7

    def density(x, t):
        a, b = process.scales(t)
        one = torch.ones_like(x)
        return LINE.log_terms(((x - b * noise) / a)[:, None], one, 0 * one).logsumexp(1).exp() / a

    def flux(x):
        return density(x, t) * conditional_velocity(x, torch.full_like(x, noise), t.expand(len(x)), process)
    change = (density(x, t + h) - density(x, t - h)) / (2 * h)
    torch.testing.assert_close(change, -(flux(x + h) - flux(x - h)) / (2 * h), rtol=1e-3, atol=1e-4)


def test_eq30_to_33_both_losses_have_one_gradient_and_differ_by_a_constant():
    """v = w z + c at t = .4 on a line: L_FM and L_CFM by sums over fine grids, for several (w, c)."""
    process, t = Straight(), double(0.4)
    a, b = process.scales(t)
    z, noise = grid(-7, 7, 801), grid(-7, 7, 801)
    p_z, p_noise = line_density(process, z, t), torch.exp(-noise.square() / 2)
    p_z, p_noise = p_z / p_z.sum(), p_noise / p_noise.sum()
    latent = grid(-3.5, 3.5, 701)
    p_latent = LINE.log_terms(latent[:, None], torch.ones_like(latent), torch.zeros_like(latent)).logsumexp(1).exp()
    p_latent = p_latent / p_latent.sum()
    joint = p_latent[:, None] * p_noise
    points, u = a * latent[:, None] + b * noise, noise - latent[:, None]
    fm, cfm, gradients = [], [], []
    for w, c in ((0.0, 0.0), (0.5, -0.3), (-1.0, 2.0)):
        parameters = torch.tensor([w, c], dtype=torch.float64, requires_grad=True)
        v = lambda z, p=parameters: p[0] * z + p[1]
        losses = (p_z * (v(z) - line_field(process, z, t)).square()).sum(), (joint * (v(points) - u).square()).sum()
        fm.append(losses[0].item())
        cfm.append(losses[1].item())
        gradients.append([torch.autograd.grad(loss, parameters, retain_graph=True)[0] for loss in losses])
    for ours, conditional in gradients:
        torch.testing.assert_close(ours, conditional, rtol=1e-5, atol=1e-6)
    gaps = [y - x for x, y in zip(fm, cfm)]
    assert gaps[1] == pytest.approx(gaps[0], rel=1e-5) and gaps[2] == pytest.approx(gaps[0], rel=1e-5) and gaps[0] > 0.1


def test_eq34_to_36_inner_products_with_both_fields_have_one_mean():
    """E<v(z), u(z | eps)> = E<v(z), u(z)> for a nonlinear v, over many draws."""
    rng, process = torch.Generator().manual_seed(0), Cosine()
    latent = LINE.sample(200000, rng)
    noise, t = torch.randn(200000, 1, generator=rng, dtype=torch.float64), double(0.3).expand(200000)
    z = diffuse(latent, noise, *process.scales(t))
    v = torch.sin(z)
    conditional = (v * conditional_velocity(z, noise, t, process)).mean().item()
    marginal = (v * LINE.predict(Formulation(process, "velocity"))(z, t)).mean().item()
    assert conditional == pytest.approx(marginal, abs=0.015) and abs(marginal) > 0.1


@each_process
@pytest.mark.parametrize("output", OUTPUTS)
def test_loss_floor_of_every_output_on_gaussian_data(process, output):
    """x_0 ~ N(0, s^2): the variance of output given z is det^2 s^2 / (a^2 s^2 + b^2), which the posterior mean reaches."""
    form, t = Formulation(process, output), double(0.35)
    data, rng = Mixture(double([0.0]), double(0.8), double(1.0)), torch.Generator().manual_seed(0)
    latent, noise = data.sample(40000, rng), torch.randn(40000, 1, generator=rng, dtype=torch.float64)
    loss = form.loss(data.predict(form), latent, None, None, t.expand(40000), noise).mean().item()
    (a, b), (p, q) = process.scales(t), output_scales(output, process, t)
    floor = (a * q - b * p) ** 2 * 0.64 / (a**2 * 0.64 + b**2)
    assert loss == pytest.approx(floor.item(), rel=0.03)
    torch.testing.assert_close(flow.determinant(output, process, t), a * q - b * p)


# ------------------------------------------------------------------------------------------------------------
# The demonstration
# ------------------------------------------------------------------------------------------------------------

def test_running_flow_draws_one_png_or_prints_the_same_numbers(tmp_path, capsys):
    """Errors of the solvers fall with the number of steps; a PNG with matplotlib, text without."""
    plots = flow.demonstrate(normal(0, 50, 2))
    for steps, errors in plots["log10 of the error, by steps"].values():
        assert errors.tolist() == sorted(errors.tolist(), reverse=True) and errors[-1] < -1.3 and len(steps) == 5
    flow.main(tmp_path / "a.png")
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"
    else:
        lines = capsys.readouterr().out.splitlines()
        assert sum("LogitNormal" in line for line in lines) == 4 and len(lines) == 5 + 9 + 4 + 2 + 4
