"""formulations.py: Eq. 2 to 18, L_w, App. B.1 and the samplers, against numbers from outside.

The golden case j_flow was computed with mpmath at 40 digits. The other checks are closed forms,
finite differences and sums over fine grids.
"""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import formulations
from flow import LogitNormal, interpolate, per_sample, rectified_flow_loss
from formulations import (
    EDM,
    FORMULATIONS,
    Cosine,
    Formulation,
    Linear,
    MatchedEDM,
    Straight,
    conditional_density,
    conditional_flow_matching_loss,
    conditional_velocity,
    conditional_velocity_by_log_snr,
    conditional_velocity_by_scales,
    density_weight,
    diffuse,
    edm_log_snr_density,
    edm_weight,
    flow_matching_loss,
    formulation,
    gaussian_network,
    input_size,
    loss_by_log_snr,
    loss_by_noise,
    marginal_density,
    marginal_velocity,
    noise_from_velocity,
    output_parts,
    psi_inverse,
    weighted_loss,
)

GOLDEN = load_file(Path(__file__).parent / "golden" / "j_flow" / "io.safetensors")
T = GOLDEN["t"]
EDMS = [tuple(row) for row in GOLDEN["edm.params"].tolist()]
PROCESSES = {"straight": Straight(), "cosine": Cosine(), "linear": Linear(), "edm": EDM(-1.2, 1.2),
             "edm/rf": MatchedEDM(Straight()), "edm/cos": MatchedEDM(Cosine())}
TIMES = torch.linspace(0.0301, 0.9701, 48, dtype=torch.float64)[:, None]         # no knot of Linear
each_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
NAMES = ["rf", "eps/linear", "v/linear", "eps/cos", "v/cos", "edm(-1.2, 1.2)", "edm/rf", "edm/cos"]
each_name = pytest.mark.parametrize("name", NAMES)


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def grid(start, end, steps):
    return torch.linspace(start, end, steps, dtype=torch.float64)


def close(ours, expected, rtol=1e-7, atol=1e-10):
    torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol)


def slope(f, t, h=1e-6):
    """df / dt by central differences."""
    return (f(t + h) - f(t - h)) / (2 * h)


def normal_pdf(x, mean, variance):
    return torch.exp(-(x - mean) ** 2 / (2 * variance)) / (2 * math.pi * variance) ** 0.5


# Data of several tests: .6 N(-1, .4^2) + .4 N(1.2, .3^2) on a line. p_t and u_t have closed forms.
SHARES, MEANS, STDS = double(0.6, 0.4), double(-1.0, 1.2), double(0.4, 0.3)


def line_density(x, a=1.0, b=0.0):
    """p_t(x) for z_t = a x_0 + b eps. x (M,) or (M, 1) -> (M,)"""
    x = x.reshape(-1, 1)
    return (SHARES * normal_pdf(x, a * MEANS, (a * STDS) ** 2 + b**2)).sum(1)


def line_field(x, at):
    """u_t(x) = a' E[x_0 | x] + b' E[eps | x], both by Bayes' rule. x (M,) -> (M,)"""
    x = x[:, None]
    variance = (at.a * STDS) ** 2 + at.b**2
    weight = SHARES * normal_pdf(x, at.a * MEANS, variance)
    weight = weight / weight.sum(1, keepdim=True)
    excess = (x - at.a * MEANS) / variance
    latent = (weight * (MEANS + at.a * STDS**2 * excess)).sum(1)
    return at.a_slope * latent + at.b_slope * (weight * at.b * excess).sum(1)


def line_samples(count):
    rng = torch.Generator().manual_seed(0)
    part = torch.multinomial(SHARES, count, replacement=True, generator=rng)
    return (MEANS[part] + STDS[part] * normal(1, count))[:, None]


def even_noises(count=4001):
    """The quantiles of N(0, 1): a mean over them is an expectation. (M, 1)"""
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.special.ndtri(u)[:, None]


# --- Sec. 2 ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, process", [("rf", Straight()), ("cosine", Cosine()),
                                           *((f"edm{i}", EDM(*row)) for i, row in enumerate(EDMS))])
def test_scales_slopes_and_log_snr_are_the_golden_ones(name, process):
    at = process.at(T)
    for ours, stored in ((at.a, "a"), (at.b, "b"), (at.a_slope, "da"), (at.b_slope, "db"),
                         (at.log_snr, "logsnr"), (at.log_snr_slope, "dlogsnr")):
        close(ours, GOLDEN[f"{name}.{stored}"])


@each_process
def test_slopes_are_derivatives_and_time_at_is_the_inverse(process):
    at = process.at(TIMES)
    close(at.a_slope, slope(lambda t: process.at(t).a, TIMES), rtol=2e-5, atol=2e-6)
    close(at.b_slope, slope(lambda t: process.at(t).b, TIMES), rtol=2e-5, atol=2e-6)
    if not isinstance(process, Linear):
        close(process.time_at(at.b / at.a), TIMES)


def test_eq2_5_9_and_10_are_the_golden_ones():
    latent, noise, t = GOLDEN["conv.x0"], GOLDEN["conv.eps"], GOLDEN["conv.t"][:, None]
    for name, process in (("rf", Straight()), ("cosine", Cosine()), ("edm0", EDM(*EDMS[0]))):
        at = process.at(t)
        z = diffuse(latent, noise, at)
        close(z, GOLDEN[f"conv.{name}.z"])
        for equation in (conditional_velocity, conditional_velocity_by_scales,
                         conditional_velocity_by_log_snr):
            close(equation(z, noise, at), GOLDEN[f"conv.{name}.u"])


@each_process
def test_eq4_5_9_and_10_give_the_derivative_along_the_path_of_one_noise(process):
    latent, noise = normal(0, 2, 48, 3)
    at = process.at(TIMES)
    z = diffuse(latent, noise, at)
    close(psi_inverse(z, noise, at), latent)
    derivative = slope(lambda t: diffuse(latent, noise, process.at(t)), TIMES)
    for equation in (conditional_velocity, conditional_velocity_by_scales,
                     conditional_velocity_by_log_snr):
        close(equation(z, noise, at), derivative, rtol=2e-5, atol=2e-5)


@each_process
def test_eq3_and_6_average_over_the_noise_to_the_closed_form(process):
    at = process.at(double(0.45).squeeze())
    for z in (-0.4, 0.35):
        z = double([z])
        density = marginal_density(z, even_noises(), at, line_density)
        velocity = marginal_velocity(z, even_noises(), at, line_density)
        close(density, line_density(z, at.a, at.b)[0], rtol=1e-4)
        close(velocity, line_field(z[0], at), rtol=1e-3)


def test_eq3_in_two_dimensions_shrinks_with_the_square_of_a():
    """A standard normal x_0 without noise is N(0, a^2 I): 1 / (2 pi a^2) at the origin."""
    def data_density(x):
        return normal_pdf(x, 0, 1).prod(dim=1)
    at = Straight().at(double(0.5).squeeze())
    density = conditional_density(double([0.0, 0.0]), double([0.0, 0.0]), at, data_density)
    close(density, double(1 / (2 * math.pi * 0.25)))


def grid_losses(network, at):
    """(L_FM, L_CFM) of a network on the line at one t: Eq. 7 and 8 by sums over fine grids."""
    z, noise, latent = grid(-7, 7, 801), grid(-7, 7, 401), grid(-3.5, 3.5, 401)
    p_z = line_density(z, at.a, at.b)
    fm = flow_matching_loss(network(z)[:, None], line_field(z, at)[:, None])
    joint = line_density(latent)[:, None] * normal_pdf(noise, 0, 1)
    latent, noise = latent[:, None].expand(401, 401), noise.expand(401, 401)
    latent, noise = latent.reshape(-1, 1), noise.reshape(-1, 1)
    v = network(diffuse(latent, noise, at))
    cfm = conditional_flow_matching_loss(v, latent, noise, at)
    return (p_z * fm).sum() / p_z.sum(), (joint.flatten() * cfm).sum() / joint.sum()


@pytest.mark.parametrize("process", [Straight(), Cosine(), EDM(-1.2, 1.2)])
def test_eq7_and_8_and_eq30_to_33_differ_by_a_constant_and_have_one_gradient(process):
    """For v = w z + c, the gap L_CFM - L_FM is the same for every (w, c). So are the gradients."""
    at = process.at(double(0.4).squeeze())
    gaps = []
    for parameters in ((0.0, 0.0), (0.5, -0.3), (-1.0, 2.0)):
        w = double(*parameters).requires_grad_()
        fm, cfm = grid_losses(lambda z, w=w: w[0] * z + w[1], at)
        gaps.append((cfm - fm).item())
        fm_gradient, = torch.autograd.grad(fm, w, retain_graph=True)
        cfm_gradient, = torch.autograd.grad(cfm, w)
        close(fm_gradient, cfm_gradient, rtol=1e-5, atol=1e-5)
    assert gaps == pytest.approx([gaps[0]] * 3, rel=1e-5) and gaps[0] > 0.1


@pytest.mark.parametrize("name, process", [("rf", Straight()), ("cosine", Cosine()),
                                           ("edm0", EDM(*EDMS[0])), ("edm2", EDM(*EDMS[2]))])
def test_eq8_11_12_and_l_w_with_the_golden_weight_are_one_loss(name, process):
    """L_CFM = L_w with w_t = -1/2 lambda'_t b_t^2, which j_flow holds as w_cfm."""
    latent, noise, velocity_pred = normal(0, 3, len(T), 5)
    at = process.at(T[:, None])
    z = diffuse(latent, noise, at)
    loss = (velocity_pred - GOLDEN[f"{name}.da"][:, None] * latent
            - GOLDEN[f"{name}.db"][:, None] * noise).square().mean(1)
    noise_pred = noise_from_velocity(velocity_pred, z, at)
    close(conditional_flow_matching_loss(velocity_pred, latent, noise, at), loss)
    close(loss_by_log_snr(velocity_pred, z, noise, at), loss)
    close(loss_by_noise(noise_pred, noise, at), loss)
    close(weighted_loss(noise_pred, noise, at, GOLDEN[f"{name}.w_cfm"][:, None]), loss)


# --- Sec. 3 ---------------------------------------------------------------------------------------

def test_eq13_and_17_begin_at_the_data_and_end_at_the_noise():
    for process in (Straight(), Cosine()):
        at = process.at(double(0.0, 1.0))
        assert at.a.tolist() == [1, 0] and at.b.tolist() == [0, 1]
    at = EDM(-1.2, 1.2).at(double(0.0, 1.0))
    assert at.a.tolist() == [1, 1] and at.b.tolist() == [0, math.inf]


@pytest.mark.parametrize("i", range(len(EDMS)))
def test_eq15_and_16_are_the_golden_ones(i):
    """Under uniform t, lambda has the density -1 / lambda'."""
    density = edm_log_snr_density(GOLDEN[f"edm{i}.logsnr"], *EDMS[i])
    close(density, -1 / GOLDEN[f"edm{i}.dlogsnr"])
    close(edm_weight(GOLDEN[f"edm{i}.logsnr"], *EDMS[i]), GOLDEN[f"edm{i}.w"])


def test_ldm_linear_is_the_golden_one_at_its_1000_steps_and_geometric_between():
    at = Linear().at(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    close(at.a, GOLDEN["ldm_linear.a"])
    close(at.b, GOLDEN["ldm_linear.b"])
    close(at.log_snr, GOLDEN["ldm_linear.logsnr"])
    a = Linear().at(double(0.0, 0.0004, 0.3, 0.3005, 0.301)).a
    assert a[0] == 1 and a[1].item() == pytest.approx((1 - 0.00085) ** 0.2, rel=1e-9)
    close(a[3] ** 2, a[2] * a[4])
    assert Linear().at(double(0.0)).b == 0 and Linear().first == 0.001


def test_edm_rf_and_edm_cos_have_the_golden_levels_of_noise():
    for name, other in (("edm_rf", Straight()), ("edm_cos", Cosine())):
        at = MatchedEDM(other).at(T)
        close(at.b, GOLDEN[f"{name}.b"])
        assert (at.a == 1).all()


def test_eq18_is_the_golden_one():
    close(density_weight(T, formulation("rf").density), GOLDEN["w.rf"])
    close(density_weight(T, formulation("rf/cosmap").density), GOLDEN["w.rf_cosmap"])
    for i, (mean, std) in enumerate(GOLDEN["logit_normal.params"].tolist()):
        close(density_weight(T, LogitNormal(mean, std)), GOLDEN["w.rf_logit_normal"][i])


# --- What a network predicts ----------------------------------------------------------------------

def weight_like_edm(name):
    """Eq. 16 with -1 / lambda' of another path, its density of the log-SNR, for the normal."""
    return -1 / GOLDEN[f"{name}.dlogsnr"] * (torch.exp(-GOLDEN[f"{name}.logsnr"]) + 0.5**2)


@pytest.mark.parametrize("name, weight, factor", [
    ("rf", GOLDEN["w.rf"], 1), ("eps/cos", GOLDEN["cosine.w_eps"], 1 / math.pi),
    ("v/cos", GOLDEN["cosine.w_v"], 2 / math.pi), ("edm(-1.2, 1.2)", GOLDEN["edm0.w"], 8),
    ("edm(0.6, 1.2)", GOLDEN["edm2.w"], 8), ("edm/rf", weight_like_edm("rf"), 8),
    ("edm/cos", weight_like_edm("cosine"), 8)])
def test_the_loss_is_l_w_with_the_papers_weight(name, weight, factor):
    """Sec. 3: t / (1 - t), sech(lambda / 2), e^(-lambda / 2), Eq. 16, times a constant each."""
    named = formulation(name)
    form = Formulation(named.process, named.output, sigma_data=0.5)
    at = form.process.at(T[:, None])
    latent, noise, prediction = normal(0, 3, len(T), 5)
    inside = (T > form.process.first) & (T < 0.999)
    _, noise_pred = form.latent_and_noise(prediction, diffuse(latent, noise, at), at)
    loss = form.loss(lambda *_: prediction, latent, None, None, T, noise).double()
    expected = factor * weighted_loss(noise_pred, noise, at, weight[:, None])
    close(loss[inside], expected[inside], rtol=1e-4, atol=1e-5)


@each_process
@pytest.mark.parametrize("output", ["velocity", "v", "eps", "F"])
def test_latent_and_noise_come_back_from_every_output(process, output):
    latent, noise = normal(0, 2, 48, 3)
    at, form = process.at(TIMES), Formulation(process, output)
    latent_part, noise_part = output_parts(output, at, 1.0)
    prediction = latent_part * latent + noise_part * noise
    back = form.latent_and_noise(prediction, diffuse(latent, noise, at), at)
    close(torch.stack(back), torch.stack([latent, noise]), atol=1e-6)


def test_outputs_by_hand_and_an_unknown_one():
    """On the cosine path at t = 1/3: a = cos 30 deg, b = sin 30 deg, velocity = pi/2 v."""
    at = Cosine().at(double(1 / 3))
    root = 3**0.5 / 2
    by_hand = {"v": (-0.5, root), "eps": (0, 1), "velocity": (-math.pi / 4, math.pi / 2 * root)}
    for output, parts in by_hand.items():
        close(torch.cat(output_parts(output, at, 1.0)), double(*parts))
    with pytest.raises(ValueError, match="'score'; choose velocity, eps, v or F"):
        output_parts("score", at, 1.0)


def test_f_is_edms_preconditioning():
    """Karras et al. with sigma_data .5: D = c_skip z + c_out F, c_in z, (D - x_0)^2 / c_out^2."""
    form = Formulation(EDM(-1.2, 1.2), "F", sigma_data=0.5)
    latent, noise, prediction = normal(0, 3, 48, 2)
    at = form.process.at(TIMES)
    c_skip, c_out = 0.25 / (at.b**2 + 0.25), at.b * 0.5 / (at.b**2 + 0.25).sqrt()
    z, seen = latent + at.b * noise, []

    def model(z_in, *_):
        seen.append(z_in)
        return prediction
    loss = form.loss(model, latent, None, None, TIMES[:, 0], noise)
    denoised = c_skip * z + c_out * prediction
    close(seen[0], z / (at.b**2 + 0.25).sqrt())
    close(form.latent_and_noise(prediction, z, at)[0], denoised)
    close(loss.double(), ((denoised - latent) / c_out).square().mean(1), rtol=1e-5)


@pytest.mark.parametrize("name", ["edm(-1.20, 1.20)", "edm(1.20, 0.60)", "edm/rf", "edm/cos"])
def test_targets_and_inputs_of_edm_have_unit_size_for_our_latents(name):
    """Latents have unit variance (App. B.2). The formulation's own sigma_data must be theirs."""
    form = formulation(name)
    latent, noise = normal(0, 2, 1, 200000, dtype=torch.float32)
    for t in (0.05, 0.5, 0.95):
        sizes = []

        def model(z_in, *_, sizes=sizes):
            sizes.append(z_in.square().mean().item())
            return torch.zeros_like(z_in)
        loss = form.loss(model, latent, None, None, double(t), noise)
        assert [loss.item(), sizes[0]] == pytest.approx([1, 1], abs=0.02)


def test_the_loss_of_rf_is_rectified_flow_loss_for_images():
    latent, noise = normal(0, 2, 8, 4, 3, 3, dtype=torch.float32)
    t = torch.rand(8, generator=torch.Generator().manual_seed(0))

    def model(z, t, context, pooled):
        return 0.3 * z * per_sample(t) + context + pooled
    for name in ("rf", "rf/lognorm(0.00, 1.00)"):
        ours = formulation(name).loss(model, latent, 1, 2, t, noise)
        close(ours, rectified_flow_loss(model, latent, 1, 2, t, noise), rtol=1e-5)
        assert ours.dtype == torch.float32


@each_name
def test_the_loss_reaches_the_known_floor_on_gaussian_data(name):
    """x_0 ~ N(0, s^2): p x_0 + q eps given z_t has variance (a q - b p)^2 s^2 / (a^2 s^2 + b^2)."""
    form, t = formulation(name), double(0.35)
    latent, noise = 0.8 * normal(0, 1, 40000), normal(1, 1, 40000)
    network = gaussian_network(form, 0.8)
    loss = form.loss(lambda z, t, *_: network(z, t), latent, None, None, t, noise)
    at = form.process.at(t)
    p, q = output_parts(form.output, at, 1.0)
    floor = (at.a * q - at.b * p) ** 2 * 0.64 / (at.a**2 * 0.64 + at.b**2)
    close(loss.double(), floor, rtol=0.03)


@each_name
def test_losses_are_finite_at_both_ends_and_eps_is_not_asked_where_z_is_the_noise(name):
    latent, noise = normal(0, 2, 2, 1, 2, 2, dtype=torch.float32)
    seen = []

    def model(z, t, *_):
        seen.append(t)
        return 0 * z
    loss = formulation(name).loss(model, latent, None, None, torch.tensor([0.0, 1.0]), noise)
    first = 0.001 if "linear" in name else 1e-5 if "edm" in name else 0
    last = 0.999 if "eps" in name else 1 - 1e-5 if "edm" in name else 1
    assert loss.isfinite().all() and seen[0].tolist() == pytest.approx([first, last], abs=1e-7)


# --- Samplers -------------------------------------------------------------------------------------

@each_name
def test_samples_near_the_known_answer(name):
    """Noise n must end at .5 n for data N(0, .5^2), also literally where Eq. 1 is finite."""
    form, noise = formulation(name), double([-1.0], [0.3], [2.0])
    network = gaussian_network(form, 0.5)
    close(form.sample(network, noise, form.schedule(400)), 0.5 * noise, rtol=0.02)
    if form.process.last == 1:
        close(form.sample(network, noise, form.schedule(400), literal=True), 0.5 * noise, rtol=0.02)
    else:
        with pytest.raises(ValueError, match="no finite Eq. 1"):
            form.sample(network, noise, form.schedule(5), literal=True)


def hand_factor(name, literal):
    """What 5 even steps multiply a noise by, for data N(0, .5^2), from the equations alone.

    E[x_0 | z] = .25 a z / (.25 a^2 + b^2) and E[eps | z] = b z / (.25 a^2 + b^2).
    """
    factor, quarter = 1.0, math.pi / 2
    for i in range(5, 0, -1):
        t, t_next = i / 5, (i - 1) / 5
        a, b, a_next, b_next, a_slope, b_slope = 1 - t, t, 1 - t_next, t_next, -1, 1
        if name == "v/cos":
            a, b = math.cos(quarter * t), math.sin(quarter * t)
            a_next, b_next = math.cos(quarter * t_next), math.sin(quarter * t_next)
            a_slope, b_slope = -quarter * b, quarter * a
        latent, noise = (x * factor / (0.25 * a**2 + b**2) for x in (0.25 * a, b))
        if literal:
            factor += (t_next - t) * (a_slope * latent + b_slope * noise)
        else:
            factor = a_next * latent + b_next * noise
    return factor


def test_literal_euler_and_steps_with_fixed_latent_and_noise_differ_as_stated():
    """5 steps on N(0, .5^2), answer .5: v/cos .364, literally .481; rf .369 by both."""
    for name, literal, number in (("rf", False, 0.369), ("rf", True, 0.369),
                                  ("v/cos", False, 0.364), ("v/cos", True, 0.481)):
        form = formulation(name)
        sample = form.sample(gaussian_network(form, 0.5), double([1.0]), form.schedule(5), literal)
        assert sample.item() == pytest.approx(hand_factor(name, literal), rel=1e-9)
        assert sample.item() == pytest.approx(number, abs=5e-4)


@each_name
def test_a_step_with_fixed_latent_and_noise_is_eulers_on_the_straight_path(name):
    """z / (a + b) lies on Eq. 13's path at b / (a + b). Euler's step there has v = eps - x_0."""
    form, z = formulation(name), normal(0, 4, 3)
    network, times = gaussian_network(form, 0.5), double(0.7, 0.4)
    at, after = form.process.at(times[0]), form.process.at(times[1])
    start = z * input_size(at, 1.0)
    prediction = network(form.network_input(start, at), times[:1].expand(4))
    latent, noise = form.latent_and_noise(prediction, start, at)
    s, s_next = at.b / (at.a + at.b), after.b / (after.a + after.b)
    line = interpolate(latent, noise, s.expand(4))
    close(line, start / (at.a + at.b))
    line = line + (s_next - s) * (noise - latent)
    close(form.sample(network, z, times), line * (after.a + after.b))


@each_name
def test_sampling_asks_the_network_at_times_of_training_from_the_true_marginal(name):
    """Unit-variance data: z_t has the size sqrt(a^2 + b^2), and F sees z_t over that size."""
    form, noise, seen = formulation(name), normal(0, 4, 2, dtype=torch.float32), []

    def network(z, t):
        assert z.dtype == t.dtype == torch.float32 and t.shape == (4,)
        seen.append((z, t[0].item()))
        return 0 * z
    sample = form.sample(network, noise, form.schedule(8))
    times = [t for _, t in seen]
    assert sample.dtype == torch.float32 and sample.isfinite().all() and len(times) == 8
    assert times == sorted(times, reverse=True)
    at = form.process.at(double(times[0]))
    size = 1 if form.output == "F" else torch.hypot(at.a, at.b).item()
    close(seen[0][0], size * noise, rtol=1e-5, atol=1e-6)
    if form.process.last == 1:
        assert times == pytest.approx([min(times[0], (8 - i) / 8) for i in range(8)])
        assert times[0] == pytest.approx(0.999 if form.output == "eps" else 1)


def test_edms_schedule_is_even_in_the_seventh_root_of_the_level_of_noise():
    """Karras et al.: 80 to .002, as far as the path goes. The quantile at 1 - 1e-5 is 4.265."""
    reach = 0.6 * 4.264891
    for name, top, bottom in (("edm/rf", 80, 0.002),
                              ("edm(-1.2, 0.6)", math.exp(-1.2 + reach), math.exp(-1.2 - reach))):
        form = formulation(name)
        times = form.schedule(5)
        roots = form.process.at(times[:-1]).b ** (1 / 7)
        close(roots, grid(top ** (1 / 7), bottom ** (1 / 7), 5), rtol=1e-5)
        assert times[-1] == 0
    assert formulation("v/linear").schedule(4).tolist() == [1, 0.75, 0.5, 0.25, 0]


# --- The 61 names ---------------------------------------------------------------------------------

def test_there_are_61_formulations_and_they_differ():
    """The grids that fit every name the paper prints: PAPER.md, Sec. 5.1."""
    assert len(set(FORMULATIONS)) == 61
    means, stds = (-1, -0.5, 0, 0.5, 1), (0.2, 0.6, 1, 1.4, 1.8, 2.2)
    expected = {f"rf/lognorm({m:.2f}, {s:.2f})" for m in means for s in stds}
    means, stds = (-1.2, -0.6, 0, 0.6, 1.2), (0.6, 1.2, 1.8)
    expected |= {f"edm({m:.2f}, {s:.2f})" for m in means for s in stds}
    expected |= {f"rf/mode({-1 + 2.75 * i / 6:.2f})" for i in range(7)}
    expected |= {"rf/mode(1.00)", "rf/cosmap", "rf", "edm/rf", "edm/cos"}
    expected |= {"eps/linear", "v/linear", "eps/cos", "v/cos"}
    assert set(FORMULATIONS) == expected
    forms = [formulation(name) for name in FORMULATIONS]
    assert [form.name for form in forms] == FORMULATIONS
    t = double(0.3, 0.8)
    facts = {str((f.output, f.process.at(t).b, f.process.at(t).a, f.density.pdf(t))) for f in forms}
    assert len(facts) == 61


def test_names_are_read_as_the_paper_means_them():
    assert formulation("edm(-1.2,0.6)").process == EDM(-1.2, 0.6)
    assert formulation(" rf/lognorm(0.5, 0.6)").density == LogitNormal(0.5, 0.6)
    assert formulation("v/linear").output == "v" and formulation("eps/cos").output == "eps"
    assert isinstance(formulation("eps/cos").process, Cosine)


@pytest.mark.parametrize("name, problem", [
    ("rf/magic", "choose rf, eps/linear"), ("rf/mode", "choose uniform"), ("rf(1)", "rf/mode.s."),
    ("edm(1.2)", "edm.P_m, P_s."), ("edm(a, b)", "must be numbers"), ("edm(1, 2", "no formulation"),
    ("rf/mode(3)", "monotonic"), ("rf/mode(nan)", "monotonic"), ("rf/uniform", "no formulation"),
    ("edm(0, -1)", "P_s greater than 0"), ("edm(1e999, 1)", "a finite P_m")])
def test_a_wrong_name_is_explained(name, problem):
    with pytest.raises(ValueError, match=problem):
        formulation(name)


# --- App. B.1 -------------------------------------------------------------------------------------

@each_process
@pytest.mark.parametrize("t", [0.2003, 0.6003])
def test_eq26_to_29_both_fields_fulfil_the_continuity_equation(process, t):
    """d/dt p_t + d/dx (p_t u_t) = 0, by central differences: for p_t, u_t and for one noise."""
    x, t = grid(-2, 2, 41), double(t).squeeze()
    noise = torch.full((41, 1), 0.7, dtype=torch.float64)

    def of_one_noise(x, at):
        return conditional_density(x[:, None], noise, at, line_density)

    def flux(x, conditional):
        at = process.at(t)
        if conditional:
            return of_one_noise(x, at) * conditional_velocity(x[:, None], noise, at)[:, 0]
        return line_density(x, at.a, at.b) * line_field(x, at)
    change = slope(lambda t: line_density(x, process.at(t).a, process.at(t).b), t, 1e-5)
    close(change, -slope(lambda x: flux(x, False), x, 1e-5), rtol=1e-4, atol=1e-5)
    change = slope(lambda t: of_one_noise(x, process.at(t)), t, 1e-5)
    close(change, -slope(lambda x: flux(x, True), x, 1e-5), rtol=1e-3, atol=1e-4)


def test_eq34_to_36_inner_products_with_both_fields_have_one_mean():
    """E<v(z), u(z | eps)> = E<v(z), u(z)> for v = sin, over 200,000 draws."""
    latent, noise = line_samples(200000), normal(2, 200000, 1)
    at = Cosine().at(double(0.3).squeeze())
    z = diffuse(latent, noise, at)
    conditional = (torch.sin(z) * conditional_velocity(z, noise, at)).mean().item()
    marginal = (torch.sin(z)[:, 0] * line_field(z[:, 0], at)).mean().item()
    assert conditional == pytest.approx(marginal, abs=0.01) and abs(marginal) > 0.1


def test_running_formulations_prints_both_samplers(capsys):
    formulations.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["rf", "0.369", "0.369"]
    assert lines[2].split() == ["v/cos", "0.364", "0.481"]
    assert len(lines) == 4
