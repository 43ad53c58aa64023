"""flow.py: flows from noise to data (SD3, arXiv:2403.03206v1, Sec. 2, 3 and 5.3.2, App. B.1, the formulations of Sec. 5.1).

Read with   Eq. 2 to 12, then 13 to 17 for the paths, 18 to 22 for the densities of t, 23 to 25 for the resolution shift
Not here    the network (mmdit.py), prompts and files (sample.py); a network is any callable, velocity(z, t) say
Time        t in [0, 1], t = 0 is data and t = 1 is noise; several libraries run the other way
Shapes      B batch   C latent channels   H W latent height, width; a schedule is a tensor of N + 1 falling times, 1 to 0
Run         python flow.py     Fig. 11, the log-SNR of every path, flows from noise to data, solver errors: out/flow.png

The paper's letters: x_0 is `latent`, epsilon is `noise`, lambda_t is `log_snr`, m and s of Eq. 19 are `logit_mean` and
`logit_std`, s of Eq. 20 is `mode_scale`, P_m and P_s of Eq. 14 are `log_mean` and `log_std`, alpha of Eq. 23 is
`timestep_shift`. A formulation of Sec. 5.1 is three things: a path, what the network predicts, and a density of t.
"""

import math
import re
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

SIGMA_DATA = 0.5        # of EDM's preconditioning; its square is the 0.5^2 of Eq. 16


def per_sample(t, dims: int = 4):
    """(B,) -> (B, 1, 1, 1), to multiply images or latents."""
    return t.view(-1, *[1] * (dims - 1))


def exact(t):
    """Times in float64, in which all coefficients below are computed (Apple's GPUs have none: there, on the CPU)."""
    return t.cpu().double() if t.device.type == "mps" else t.double()


def require_positive(name: str, value: float):
    if not value > 0:
        raise ValueError(f"{name} is {value}; it must be greater than 0")


# ------------------------------------------------------------------------------------------------------------
# Paths (Sec. 2 and 3): z_t = a_t x_0 + b_t eps
# ------------------------------------------------------------------------------------------------------------

class Process:
    """A forward process (Eq. 2): scales(t) are a_t, b_t, slopes(t) their derivatives a'_t, b'_t, log_snr(t) falls with t and
    time_at(log_snr) is its inverse. All map (B,) to (B,) or to pairs of it. The path is finite for first <= t <= last."""
    first, last = 0.0, 1.0
    pure_noise = True                   # a = 0 at t = 1

    def log_snr(self, t):
        """lambda_t = log(a_t^2 / b_t^2)."""
        a, b = self.scales(t)
        return 2 * (torch.log(a) - torch.log(b))

    def log_snr_slope(self, t):
        """lambda'_t = 2 (a'_t / a_t - b'_t / b_t), between Eq. 9 and 10."""
        (a, b), (a_slope, b_slope) = self.scales(t), self.slopes(t)
        return 2 * (a_slope / a - b_slope / b)

    def on_line(self, t):
        """b / (a + b): the time at which the straight path has the log-SNR of this one at t. There z_t / (a + b) lies on it,
        so the paths differ in the pace of time and in a factor of z only."""
        a, b = self.scales(t)
        return b / (a + b)

    def clamp(self, t):
        return t.clamp(self.first, self.last)


@dataclass(frozen=True)
class Straight(Process):
    """Rectified flow, Eq. 13: z_t = (1 - t) x_0 + t eps."""

    def scales(self, t):
        return 1 - t, t

    def slopes(self, t):
        return -torch.ones_like(t), torch.ones_like(t)

    def time_at(self, log_snr):
        return torch.sigmoid(-log_snr / 2)


@dataclass(frozen=True)
class Cosine(Process):
    """Eq. 17: z_t = cos(pi t / 2) x_0 + sin(pi t / 2) eps. Variance-preserving: a^2 + b^2 = 1."""

    def scales(self, t):
        return torch.sin(math.pi / 2 * (1 - t)), torch.sin(math.pi / 2 * t)       # cos as a sine: exactly 0 at t = 1

    def slopes(self, t):
        a, b = self.scales(t)
        return -math.pi / 2 * b, math.pi / 2 * a

    def time_at(self, log_snr):
        return 2 / math.pi * torch.atan(torch.exp(-log_snr / 2))


@dataclass(frozen=True)
class Linear(Process):
    """(LDM-)Linear of Sec. 3: a_t = (prod over s <= t of (1 - beta_s))^(1/2), with sqrt(beta) rising evenly in 1000 steps, and
    a^2 + b^2 = 1.

    Step i of the discrete schedule (i = 0 ... 999) lies at t = (i + 1) / 1000 and t = 0 is the data; between them log a_t is
    linear in t, so beta is constant over a step. Ends at a = .068, not at 0. Times below the first step count as it.
    """
    pure_noise = False
    beta_first: float = 0.00085
    beta_last: float = 0.012
    num_steps: int = 1000

    @property
    def first(self):
        return 1 / self.num_steps

    @cached_property
    def knots(self):
        """log a_t^2 at t = 0, 1/1000, ..., 1: (1001,)"""
        ramp = torch.linspace(self.beta_first**0.5, self.beta_last**0.5, self.num_steps, dtype=torch.float64)
        return torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-ramp.square()).cumsum(0)])

    def log_a2(self, t):
        """log a_t^2 and its derivative by t (of the step that t is in, or that it ends)."""
        knots = self.knots.to(t)
        step = (t * self.num_steps).ceil().long().clamp(1, self.num_steps) - 1
        slope = (knots[step + 1] - knots[step]) * self.num_steps
        return knots[step] + slope * (t - step.to(t) / self.num_steps), slope

    def scales(self, t):
        log_a2, _ = self.log_a2(t)
        return torch.exp(log_a2 / 2), torch.sqrt(-torch.expm1(log_a2))

    def slopes(self, t):
        (a, b), (_, slope) = self.scales(t), self.log_a2(t)
        return a * slope / 2, -a.square() * slope / (2 * b)                       # from a a' + b b' = 0

    def time_at(self, log_snr):
        log_a2, knots = torch.nn.functional.logsigmoid(log_snr), self.knots.to(log_snr)
        step = torch.searchsorted(-knots, -log_a2).clamp(1, self.num_steps) - 1
        return (step.to(log_snr) + (log_a2 - knots[step]) / (knots[step + 1] - knots[step])) / self.num_steps


class UnitData(Process):
    """a = 1, and b without bound: infinite at t = 1, so times are clamped a little inside."""
    first, last, pure_noise = 1e-5, 1 - 1e-5, False


@dataclass(frozen=True)
class EDM(UnitData):
    """Eq. 14: z_t = x_0 + b_t eps with b_t = exp(F^-1(t)), F the normal distribution function of mean P_m, deviation P_s.
    So log_snr of uniform t is normal, with mean -2 P_m and deviation 2 P_s (Eq. 15)."""
    log_mean: float = -1.2
    log_std: float = 1.2

    def __post_init__(self):
        require_positive("P_s of EDM", self.log_std)

    def scales(self, t):
        return torch.ones_like(t), torch.exp(self.log_mean + self.log_std * torch.special.ndtri(t))

    def slopes(self, t):
        normal_pdf = torch.exp(-torch.special.ndtri(t).square() / 2) / math.sqrt(2 * math.pi)
        return torch.zeros_like(t), self.log_std * self.scales(t)[1] / normal_pdf

    def time_at(self, log_snr):
        return torch.special.ndtr((-log_snr / 2 - self.log_mean) / self.log_std)


@dataclass(frozen=True)
class MatchedEDM(UnitData):
    """z_t = x_0 + b_t eps with the log-SNR of another path at every t: b_t = exp(-lambda_t / 2). For edm/rf and edm/cos."""
    other: Process

    def scales(self, t):
        a, b = self.other.scales(t)
        return torch.ones_like(t), b / a

    def slopes(self, t):
        return torch.zeros_like(t), -0.5 * self.other.log_snr_slope(t) * self.scales(t)[1]

    def time_at(self, log_snr):
        return self.other.time_at(log_snr)


def diffuse(latent, noise, a, b):
    """Eq. 2 and 4: z_t = psi_t(x_0 | eps) = a_t x_0 + b_t eps. latent, noise (B, ...), a, b (B,) -> (B, ...)."""
    a, b = (per_sample(x, latent.dim()).to(latent) for x in (a, b))
    return a * latent + b * noise


def conditional_velocity(z, noise, t, process):
    """Eq. 9: u_t(z | eps) = a'/a z - eps b (a'/a - b'/b): Eq. 5 with x_0 = psi^-1 = (z - b eps) / a in it. (B, ...)"""
    (a, b), (a_slope, b_slope) = process.scales(exact(t)), process.slopes(exact(t))
    return diffuse(z, noise, a_slope / a, -b * (a_slope / a - b_slope / b))


def conditional_velocity_snr(z, noise, t, process):
    """Eq. 10, the same by the log-SNR: u_t(z | eps) = a'/a z - b/2 lambda' eps. (B, ...)"""
    (a, b), (a_slope, _), slope = process.scales(exact(t)), process.slopes(exact(t)), process.log_snr_slope(exact(t))
    return diffuse(z, noise, a_slope / a, -b * slope / 2)


def interpolate(latent, noise, t):
    """Eq. 13, the straight path: z_t = (1 - t) x_0 + t eps. latent, noise (B, C, H, W), t (B,) -> (B, C, H, W)."""
    return diffuse(latent, noise, 1 - t, t)


def velocity_target(latent, noise):
    """dz_t / dt of Eq. 13: eps - x_0, which points from data to noise and does not depend on t."""
    return noise - latent


def rectified_flow_loss(model, latent, context, pooled, t, noise):
    """Conditional flow matching on the straight path: Eq. 8 with the path of Eq. 13. `Formulation.loss` is this for any path.

    model(z_t, t, context, pooled) -> velocity. latent, noise (B, C, H, W); t (B,) in [0, 1].
    Returns (B,) in fp32, so the caller can average it or bin it by t.
    """
    z_t = interpolate(latent, noise, t)                                           # (B, C, H, W)  Eq. 13
    velocity_pred = model(z_t, t, context, pooled)                                # (B, C, H, W)
    error = velocity_pred.float() - velocity_target(latent, noise)                # (B, C, H, W)
    return error.square().flatten(1).mean(dim=1)                                  # (B,)          Eq. 8


# ------------------------------------------------------------------------------------------------------------
# What a network can predict, and how one follows from the other (Eq. 10 to 12, and EDM's F)
# ------------------------------------------------------------------------------------------------------------

def output_scales(output: str, process, t):
    """p, q (B,) of a prediction's target p x_0 + q eps, at times t (B,) where the path is finite:

        velocity  a' x_0 + b' eps     dz / dt (Eq. 5)
        straight  eps - x_0           rectified flow's velocity, whatever the path
        v         a eps - b x_0       velocity per angle of a variance-preserving path (v-prediction)
        eps, x0   the noise, the latent
        F         (x_0 - c_skip z/a) / c_out, with sigma = b/a, c_skip = s^2 / (sigma^2 + s^2),
                  c_out = sigma s / sqrt(sigma^2 + s^2), s = SIGMA_DATA: EDM's, of unit size at every t
    """
    a, b = process.scales(t)
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    if output == "velocity":
        return process.slopes(t)
    if output == "F":
        size = input_size(process, t)
        return b / (SIGMA_DATA * size), -SIGMA_DATA * a / size                    # the above, simplified
    choices = {"straight": (-one, one), "v": (-b, a), "eps": (zero, one), "x0": (one, zero)}
    if output not in choices:
        raise ValueError(f"no output called {output!r}; choose velocity, {', '.join(choices)} or F")
    return choices[output]


def input_size(process, t):
    """sqrt(b^2 + a^2 SIGMA_DATA^2): the size of z_t, by which EDM divides the network's input (c_in, for a = 1)."""
    a, b = process.scales(t)
    return torch.sqrt(b.square() + (SIGMA_DATA * a).square())


def determinant(output: str, process, t):
    """a q - b p, of the two equations z = a x_0 + b eps and output = p x_0 + q eps: 1 for rectified flow's velocity."""
    (a, b), (p, q) = process.scales(t), output_scales(output, process, t)
    return a * q - b * p


def convert(prediction, z, t, process, source: str, target: str):
    """One output from another: the two linear equations of `determinant`, solved for x_0 and eps. (B, ...) -> (B, ...)

    With source velocity and target eps it is the eps_Theta below Eq. 12. Where z and the prediction say the same (eps at
    a = 0, x0 at b = 0) the other end is unknown; there the determinant is kept from 0, so the answer is at least finite.
    """
    if source == target:
        return prediction
    t = process.clamp(exact(t))
    (a, b), (p, q), (p_new, q_new) = process.scales(t), output_scales(source, process, t), output_scales(target, process, t)
    det = determinant(source, process, t)
    det = torch.where(det.abs() < 1e-6, torch.full_like(det, 1e-6).copysign(det), det)
    return diffuse(z, prediction, (p_new * q - q_new * p) / det, (a * q_new - b * p_new) / det)


# ------------------------------------------------------------------------------------------------------------
# Densities of t (Sec. 3.1) and the resolution shift (Sec. 5.3.2)
# ------------------------------------------------------------------------------------------------------------

def uniform_draws(count: int, rng: torch.Generator, stratified: bool = False):
    """u (count,) in [0, 1), float64. stratified: one in each of `count` equal parts, in random order, so that the times of
    a batch cover the density evenly; each by itself is still uniform."""
    u = torch.rand(count, generator=rng, dtype=torch.float64)
    return (torch.randperm(count, generator=rng) + u) / count if stratified else u


class Density:
    """A density of t on [0, 1]: pdf(t), its distribution function cdf(t), and quantile(u), the inverse of that."""

    def sample(self, count: int, rng: torch.Generator, stratified: bool = False):
        """t (count,), float64."""
        return self.quantile(uniform_draws(count, rng, stratified))


@dataclass(frozen=True)
class Uniform(Density):
    """U(0, 1): `rf`, and every formulation whose path alone says where time is spent."""

    def pdf(self, t):
        return torch.ones_like(t)

    def cdf(self, t):
        return t

    def quantile(self, u):
        return u


@dataclass(frozen=True)
class LogitNormal(Density):
    """Eq. 19, rf/lognorm(m, s) of Sec. 5.1: the logit of t is normal. m > 0 means more noise: (1, 0.6) has the mean t .716."""
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def __post_init__(self):
        require_positive("s of the logit-normal density", self.logit_std)

    def pdf(self, t):
        """pi_ln(t; m, s) = 1 / (s sqrt(2 pi)) * 1 / (t (1 - t)) * exp(-(logit(t) - m)^2 / (2 s^2)), t in (0, 1)."""
        z = (torch.logit(t) - self.logit_mean) / self.logit_std
        return torch.exp(-0.5 * z.square()) / (self.logit_std * math.sqrt(2 * math.pi) * t * (1 - t))

    def cdf(self, t):
        return torch.special.ndtr((torch.logit(t) - self.logit_mean) / self.logit_std)

    def quantile(self, u):
        return torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u))


def mode_map(u, mode_scale: float):
    """Eq. 20: f_mode(u; s) = 1 - u - s (cos^2(pi u / 2) - 1 + u). Falls from 1 to 0. u (B,) -> t (B,)."""
    return 1 - u - mode_scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)


def mode_map_inverse(t, mode_scale: float):
    """u with f_mode(u; s) = t, by halving [0, 1] 53 times: f falls, so this cannot fail. float64."""
    t = exact(t)
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(53):
        middle = (low + high) / 2
        above = mode_map(middle, mode_scale) > t                                  # f is too large: u lies to the right
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Mode(Density):
    """rf/mode(s) of Sec. 5.1: t = f_mode(u; s) for uniform u. s > 0 favours the middle, s < 0 the ends, s = 0 nothing."""
    mode_scale: float

    def __post_init__(self):
        if not -1 <= self.mode_scale <= 2 / (math.pi - 2):
            raise ValueError(f"s of the mode density is {self.mode_scale}; f_mode is monotonic for -1 <= s <= 2 / (pi - 2)"
                             f" = {2 / (math.pi - 2):.4f} only")

    def pdf(self, t):
        """|d f_mode^-1 / dt| = 1 / |f_mode'(u)| at u = f_mode^-1(t)."""
        u = mode_map_inverse(t, self.mode_scale)
        return (1 / (1 + self.mode_scale - self.mode_scale * math.pi / 2 * torch.sin(math.pi * u))).to(t)

    def cdf(self, t):
        return (1 - mode_map_inverse(t, self.mode_scale)).to(t)                   # f falls: t <= f(u) means u <= f^-1(t)

    def quantile(self, u):
        return mode_map(1 - u, self.mode_scale)


@dataclass(frozen=True)
class CosMap(Density):
    """rf/cosmap of Sec. 5.1: the straight path with the log-SNR of the cosine path (Eq. 21, 22)."""

    def pdf(self, t):
        """Eq. 22: 2 / (pi - 2 pi t + 2 pi t^2)."""
        return 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t.square())

    def cdf(self, t):
        return 2 / math.pi * torch.atan2(t, 1 - t)

    def quantile(self, u):
        """Eq. 21: t = f(u) = 1 - 1 / (tan(pi u / 2) + 1)."""
        return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)


def shift_time(t, timestep_shift: float):
    """Eq. 23: t_m = alpha t_n / (1 + (alpha - 1) t_n), alpha = sqrt(m / n): the same uncertainty about a constant image
    of m instead of n pixels. Maps 0 to 0 and 1 to 1; alpha > 1 moves towards noise, alpha = 1 changes nothing."""
    return timestep_shift * t / (1 + (timestep_shift - 1) * t)


def shift_log_snr(log_snr, timestep_shift: float):
    """Eq. 24 and 25, the same for log-SNRs: lambda(t_m) = 2 log((1 - t_n) / (alpha t_n)) = lambda(t_n) - 2 log alpha."""
    return log_snr - 2 * math.log(timestep_shift)


@dataclass(frozen=True)
class Shifted(Density):
    """Another density after the map of Eq. 23, for training at higher resolution (Sec. 5.3.2: alpha = 3 at 1024^2)."""
    density: Density
    timestep_shift: float

    def __post_init__(self):
        require_positive("timestep_shift", self.timestep_shift)

    def pdf(self, t):
        back = shift_time(t, 1 / self.timestep_shift)                             # Eq. 23 inverted is Eq. 23 with 1/alpha
        slope = self.timestep_shift / (self.timestep_shift + (1 - self.timestep_shift) * t).square()      # d back / dt
        return self.density.pdf(back) * slope

    def cdf(self, t):
        return self.density.cdf(shift_time(t, 1 / self.timestep_shift).clamp(0, 1))

    def quantile(self, u):
        return shift_time(self.density.quantile(u), self.timestep_shift)


# ------------------------------------------------------------------------------------------------------------
# Formulations (Sec. 5.1): the 61 of the study, by the paper's names
# ------------------------------------------------------------------------------------------------------------

def edm_weight(log_snr, log_mean: float, log_std: float):
    """Eq. 16: N(lambda; -2 P_m, (2 P_s)^2) (e^-lambda + 0.5^2). Under uniform t the normal density is 1 / -lambda' (Eq. 15)
    and cancels the lambda' in L_w, which leaves the plain square error of F: apply neither of the two again."""
    z = (log_snr + 2 * log_mean) / (2 * log_std)
    return torch.exp(-z.square() / 2) / (2 * log_std * math.sqrt(2 * math.pi)) * (torch.exp(-log_snr) + SIGMA_DATA**2)


@dataclass(frozen=True)
class Formulation:
    """What training and sampling need to know. t is drawn from `density`; the loss is the plain square error of `output`,
    not weighted by the density as well (Eq. 18: the two are the same thing)."""
    process: Process = Straight()
    output: str = "velocity"
    density: Density = LogitNormal()
    name: str = field(default="", compare=False)

    def clamp(self, t):
        """Times at which network and path are used. eps where a is 0 or nearly says nothing about x_0: that end is left out."""
        t = self.process.clamp(t)
        return t.clamp(max=0.999) if self.output == "eps" and self.process.pure_noise else t

    def network_input(self, z, t):
        """z_t, divided by its size if the network predicts F (EDM's c_in). (B, ...)"""
        return z / per_sample(input_size(self.process, exact(t)), z.dim()).to(z) if self.output == "F" else z

    def loss(self, model, latent, context, pooled, t, noise):
        """Eq. 8 (rf) and its relatives: mean square of prediction - (p x_0 + q eps), per sample, in fp32.

        model(z_t, t, context, pooled) -> output. latent, noise (B, C, H, W); t (B,) -> (B,).
        """
        t = self.clamp(t)
        z_t = diffuse(latent, noise, *self.process.scales(exact(t)))              # (B, C, H, W)  Eq. 2
        target = diffuse(latent, noise, *output_scales(self.output, self.process, exact(t)))
        prediction = model(self.network_input(z_t, t), t, context, pooled)        # (B, C, H, W)
        return (prediction.float() - target).square().flatten(1).mean(dim=1)      # (B,)

    def weight(self, t):
        """w_t with which L_w = -1/2 E_U(t)[w_t lambda'_t |eps_Theta - eps|^2] is this loss under this density, 0 < t < 1: (B,).

        rf t/(1-t) pi(t) (Eq. 18); edm 8 times Eq. 16; eps/cos sech(lambda/2) / pi; v/cos 2 e^(-lambda/2) / pi.
        """
        a, _ = self.process.scales(t)
        square = (determinant(self.output, self.process, t) / a).square()         # |error of output|^2 / |error of eps|^2
        return -2 * self.density.pdf(t) * square / self.process.log_snr_slope(t)

    def field(self, predict):
        """The velocity eps - x_0 on the straight path that a network stands for, so that solvers need to know one path only:
        velocity(z, s (B,)). predict(z_t, t (B,)) -> output is asked where its own path has the log-SNR of s. Euler's step
        here holds x_0 and eps fixed: the same sample as EDM's Euler step in b, and as DDIM's on a variance-preserving path."""
        def velocity(z, s):
            t = self.clamp(self.process.time_at(Straight().log_snr(exact(s)))).to(z)
            a, b = self.process.scales(exact(t))
            z_t = per_sample(a + b, z.dim()).to(z) * z
            return convert(predict(self.network_input(z_t, t), t), z_t, t, self.process, self.output, "straight")
        return velocity

    def schedule(self, num_steps: int):
        """The times of Sec. 5.1's samplers, on the straight path: even in this path's t, and for EDM its authors' levels of
        noise. (num_steps + 1,) fp32"""
        if isinstance(self.process, UnitData):
            return edm_schedule(num_steps, process=self.process)
        times = self.process.on_line(self.clamp(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)))
        return torch.cat([times[:-1], times.new_zeros(1)]).float()

    def sample_steps(self, predict, noise, times, solver: str = "euler"):
        """Eq. 1 from noise to data, along the straight path, with any formulation and solver: yields as `solver_steps`.

        times (N + 1,) falling to 0; what this path does not reach is cut off. Begins at the first that is left, from the
        marginal of unit-variance data there: sqrt((1 - t)^2 + t^2) noise.
        """
        start, end = self.process.on_line(self.clamp(torch.tensor([1.0, 0.0], dtype=torch.float64))).tolist()
        times = torch.cat([torch.unique_consecutive(exact(times[:-1]).clamp(end, start)), exact(times[-1:])])
        return solver_steps(solver, self.field(predict), torch.hypot(1 - times[0], times[0]).item() * noise, times)

    def sample(self, predict, noise, times, solver: str = "euler"):
        """The end of `sample_steps`: (B, C, H, W)."""
        return last_of(self.sample_steps(predict, noise, times, solver))


def RectifiedFlow(density: Density = LogitNormal()) -> Formulation:
    """The straight path, velocity, any density."""
    return Formulation(Straight(), "velocity", density)


BUILDERS = {                            # name -> what the numbers in its brackets make
    "rf": lambda: (Straight(), "velocity", Uniform()),
    "rf/mode": lambda s: (Straight(), "velocity", Mode(s)),
    "rf/lognorm": lambda m, s: (Straight(), "velocity", LogitNormal(m, s)),
    "rf/cosmap": lambda: (Straight(), "velocity", CosMap()),
    "eps/linear": lambda: (Linear(), "eps", Uniform()),
    "v/linear": lambda: (Linear(), "v", Uniform()),
    "eps/cos": lambda: (Cosine(), "eps", Uniform()),
    "v/cos": lambda: (Cosine(), "v", Uniform()),
    "edm": lambda mean, std: (EDM(mean, std), "F", Uniform()),
    # "EDM with a schedule such that it matches the log-SNR weighting of rf" and "of v/cos": read as the log-SNR at every t,
    # so its density under uniform t; F and its plain loss stay. Not as w_t: as functions of log-SNR those of rf and v/cos
    # are equal (e^(-lambda/2)), so the two would be one formulation, but Table 1 ranks them apart.
    "edm/rf": lambda: (MatchedEDM(Straight()), "F", Uniform()),
    "edm/cos": lambda: (MatchedEDM(Cosine()), "F", Uniform()),
}


def formulation(name: str) -> Formulation:
    """A formulation by its name in the paper: rf, rf/mode(1.29), rf/lognorm(0.00, 1.00), eps/linear, edm(-1.20, 1.20), ..."""
    match = re.fullmatch(r"([a-z/]+)(?:\(([^()]*)\))?", name.strip())
    if not match or match[1] not in BUILDERS:
        raise ValueError(f"no formulation called {name!r}; choose one of {', '.join(BUILDERS)}, some with numbers in brackets")
    build = BUILDERS[match[1]]
    count = build.__code__.co_argcount
    try:
        numbers = [float(text) for text in match[2].split(",")] if match[2] else []
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)) or (match[2] is not None) != bool(count):
        raise ValueError(f"formulation {name!r}: {match[1]} takes {count or 'no'} number{'s'[:count != 1]} in brackets")
    written = ", ".join(f"{x:.2f}" if round(x, 2) == x else f"{x!r}" for x in numbers)
    return Formulation(*build(*numbers), name=f"{match[1]}({written})" if numbers else match[1])


# Sec. 5.1.1: 4 diffusion baselines, rf/mode (7 values in [-1, 1.75], and 1; 0 is rf), rf/lognorm (5 x 6), cosmap, edm (5 x 3, 2)
FORMULATIONS = [
    "eps/linear", "v/linear", "eps/cos", "v/cos", "rf",
    *(f"rf/mode({s:.2f})" for s in sorted([-1 + 2.75 * i / 6 for i in range(7)] + [1.0])),
    *(f"rf/lognorm({m:.2f}, {s:.2f})" for m in (-1, -0.5, 0, 0.5, 1) for s in (0.2, 0.6, 1, 1.4, 1.8, 2.2)),
    "rf/cosmap",
    *(f"edm({m:.2f}, {s:.2f})" for m in (-1.2, -0.6, 0, 0.6, 1.2) for s in (0.6, 1.2, 1.8)),
    "edm/rf", "edm/cos"]


# ------------------------------------------------------------------------------------------------------------
# Sampling: schedules, guidance, solvers of Eq. 1
# ------------------------------------------------------------------------------------------------------------

def shifted_schedule(num_steps: int, timestep_shift: float = 1.0):
    """Uniform times from 1 to 0, moved once by Eq. 23: (num_steps + 1,) fp32. 28 steps, shift 3: last non-zero .1."""
    return shift_time(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), timestep_shift).float()


def released_schedule(num_steps: int, timestep_shift: float = 3.0):
    """What public SD3 code does: num_steps points spread evenly between the largest and the smallest of 1000 training
    times that are already shifted, shifted a second time, then 0: (num_steps + 1,) fp32. Last non-zero .0089 at shift 3."""
    largest, smallest = 1.0, shift_time(1 / 1000, timestep_shift)
    times = shift_time(torch.linspace(largest, smallest, num_steps, dtype=torch.float64), timestep_shift)
    return torch.cat([times, times.new_zeros(1)]).float()


def edm_schedule(num_steps: int, timestep_shift: float = 1.0, process: Process = Straight()):
    """EDM's levels of noise t / (1 - t), even in their seventh root from 80 to .002 as far as a path goes, then 0:
    (num_steps + 1,) fp32 times of the straight path. A path that begins at pure noise (t = 1) has that in place of 80."""
    end, start = process.on_line(torch.tensor([process.first, process.last], dtype=torch.float64)).tolist()
    top, bottom = min(80.0, start / (1 - start) if start < 1 else math.inf), max(0.002, end / (1 - end))
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    levels = (top ** (1 / 7) + ramp * (bottom ** (1 / 7) - top ** (1 / 7))) ** 7
    times = shift_time(levels / (1 + levels), timestep_shift)
    if start == 1:
        times[0] = 1
    return torch.cat([times, times.new_zeros(1)]).float()


SCHEDULES = {"shifted": shifted_schedule, "released": released_schedule, "edm": edm_schedule,
             "uniform": lambda num_steps, timestep_shift: shifted_schedule(num_steps)}


def make_schedule(name: str, num_steps: int, timestep_shift: float):
    """A schedule by name: falling times (num_steps + 1,) from 1 to 0."""
    if name not in SCHEDULES:
        raise ValueError(f"no schedule called {name!r}; choose {' or '.join(SCHEDULES)}")
    if num_steps < 1 or timestep_shift <= 0:
        raise ValueError(f"num_steps={num_steps} and timestep_shift={timestep_shift}: both must be positive")
    return SCHEDULES[name](num_steps, timestep_shift)


def guide(velocity_cond, velocity_uncond, guidance_scale: float):
    """Classifier-free guidance: v_uncond + scale * (v_cond - v_uncond). 1 is the conditional velocity, 0 the other. Valid
    for every output: the conversions are affine and the weights add up to 1."""
    return velocity_uncond + guidance_scale * (velocity_cond - velocity_uncond)


def guidance_at(t: float, guidance_scale: float, start: float = 1.0, end: float = 0.0) -> float:
    """Guidance in an interval of t only: the scale for start >= t >= end, else 1, which is none."""
    return guidance_scale if start + 1e-6 >= t >= end - 1e-6 else 1.0             # times are fp32


def rescale_guided(guided, cond, share: float):
    """Rescaled guidance: what guidance adds to the spread of a sample is taken away again, by share in [0, 1]. (B, ...)"""
    spread = lambda x: per_sample(x.flatten(1).std(dim=1), x.dim())               # (B, 1, 1, 1)
    return guided * (share * spread(cond) / spread(guided).clamp_min(1e-8) + 1 - share)


def guide_skip_layers(guided, cond, skipped, skip_scale: float):
    """Skip-layer guidance: away from what the network says with some of its layers left out. All (B, C, H, W)."""
    return guided + skip_scale * (cond - skipped)


# A step of a solver: velocity(z, t), z at t, t, t_next, and the last step's (z, t, velocity), None at first -> z at t_next, and
# the velocity at t.

def euler_step(velocity, z, t, t_next, _):
    """Euler's method, first order, as in the paper; t_next - t is negative."""
    v = velocity(z, t)
    return z + (t_next - t) * v, v


def heun_step(velocity, z, t, t_next, _):
    """Heun's method, second order: the mean of the velocities at both ends. The step to 0, where a predicted latent
    says nothing about the noise, is Euler's; one such step leaves the order as it is."""
    v = velocity(z, t)
    z_euler = z + (t_next - t) * v
    return (z + (t_next - t) * (v + velocity(z_euler, t_next)) / 2 if t_next > 0 else z_euler), v


def rk4_step(velocity, z, t, t_next, _):
    """The classical Runge-Kutta method, fourth order: the reference, at four evaluations a step."""
    h, middle = t_next - t, (t + t_next) / 2
    k1 = velocity(z, t)
    k2 = velocity(z + h / 2 * k1, middle)
    k3 = velocity(z + h / 2 * k2, middle)
    k4 = velocity(z + h * k3, t_next)
    return z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), k1


def dpm_solver_step(velocity, z, t, t_next, before):
    """DPM-Solver++(2M), second order at one evaluation a step: z_next = t_next/t z + (1 - t_next/t) D is exact if D, the
    predicted latent, stays constant. D is extrapolated half a step in log t; not in the first step, nor in the step to 0.
    Differs from Lu et al. (2022), who extrapolate in log((1 - t) / t), which is infinite at t = 1: so does public SD3 code."""
    v = velocity(z, t)
    latent = denoised = z - t * v
    if before and t_next > 0:
        z_before, t_before, v_before = before
        denoised = latent + math.log(t / t_next) / math.log(t_before / t) / 2 * (latent - (z_before - t_before * v_before))
    return t_next / t * z + (1 - t_next / t) * denoised, v


SOLVERS = {"euler": euler_step, "heun": heun_step, "rk4": rk4_step, "dpm++2m": dpm_solver_step}


def solver_steps(solver: str, velocity, noise, times):
    """Eq. 1 from noise to data by one of SOLVERS: yields (z at times[i + 1], velocity at times[i]) after each step i.

    velocity(z, t (B,)) -> (B, C, H, W); noise (B, C, H, W) is z at times[0]; times (N + 1,) falling. z is fp32, or fp64 if the
    noise is.
    """
    if solver not in SOLVERS:
        raise ValueError(f"no solver called {solver!r}; choose {', '.join(SOLVERS)}")
    z, before = noise if noise.dtype == torch.float64 else noise.float(), None
    at = lambda z, t: velocity(z, torch.full((len(z),), t, dtype=z.dtype, device=z.device)).to(z)
    for t, t_next in zip(times[:-1].tolist(), times[1:].tolist()):
        z_next, v = SOLVERS[solver](at, z, t, t_next, before)
        yield z_next, v
        z, before = z_next, (z, t, v)


def last_of(steps):
    """The z of a generator's last step."""
    for z, _ in steps:
        sample = z
    return sample


def path_length(velocities, times):
    """Table 6: sum over the steps of ||v dt||, per sample: velocities, a list of N (B, C, H, W) -> (B,).
    For a straight path it is the distance between noise and sample, which bigger models come nearer to."""
    steps = (times[:-1] - times[1:]).tolist()
    return sum(dt * v.flatten(1).norm(dim=1) for v, dt in zip(velocities, steps))


# ------------------------------------------------------------------------------------------------------------
# Flows with a known answer: Gaussians, and mixtures of them
# ------------------------------------------------------------------------------------------------------------

def gaussian_velocity(z, t, mean: float, std: float):
    """The marginal field (Eq. 6) if the data are N(mean, std^2): E[eps - x_0 | z_t = z]. z (B, ...), t (B,)."""
    t = per_sample(t, z.dim())
    variance = ((1 - t) * std).square() + t.square()                              # of z_t
    return -mean + (t - (1 - t) * std**2) / variance * (z - (1 - t) * mean)


@dataclass(frozen=True, eq=False)
class Mixture:
    """Data from K round Gaussians in D dimensions: means (K, D), stds (K,), weights (K,) with sum 1."""
    means: torch.Tensor
    stds: torch.Tensor
    weights: torch.Tensor

    def sample(self, count: int, rng: torch.Generator):
        """(count, D)"""
        component = torch.multinomial(self.weights, count, replacement=True, generator=rng)
        noise = torch.randn(count, self.means.shape[1], generator=rng, dtype=self.means.dtype)
        return self.means[component] + self.stds[component, None] * noise

    def log_terms(self, z, a, b):
        """log(weight N(z; a mean, a^2 std^2 + b^2)) of every component. z (B, D), a, b (B,) -> (B, K); its logsumexp is log p_t
        (Eq. 3)."""
        variance = (a[:, None] * self.stds).square() + b[:, None].square()                        # (B, K)
        square = (z[:, None] - a[:, None, None] * self.means).square().sum(-1)                    # (B, K)
        return torch.log(self.weights) - 0.5 * square / variance - z.shape[1] / 2 * torch.log(2 * math.pi * variance)

    def posterior(self, z, a, b):
        """(E[x_0 | z_t = z], E[eps | z_t = z]), in closed form and finite at both ends. z (B, D), a, b (B,) -> two (B, D)."""
        share = torch.softmax(self.log_terms(z, a, b), dim=1)[..., None]                          # (B, K, 1)
        a, b = a[:, None, None], b[:, None, None]
        std2 = self.stds.square()[:, None]                                                        # (K, 1)
        excess = (z[:, None] - a * self.means) / (a.square() * std2 + b.square())                 # (B, K, D)
        return (share * (self.means + a * std2 * excess)).sum(1), (share * b * excess).sum(1)

    def predict(self, formulation: Formulation):
        """The network that training would end at: E[output | z_t] (Eq. 6 if that is the velocity). (z, t) -> output, (B, D)."""
        def model(z, t, *_):
            times = exact(t)
            if formulation.output == "F":
                z = z * input_size(formulation.process, times)[:, None]
            latent, noise = self.posterior(z.double(), *formulation.process.scales(times))
            return diffuse(latent, noise, *output_scales(formulation.output, formulation.process, times)).to(z)
        return model


# ------------------------------------------------------------------------------------------------------------
# The demonstration
# ------------------------------------------------------------------------------------------------------------

RING = Mixture(torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]], dtype=torch.float64),
               torch.tensor([0.3, 0.3, 0.3], dtype=torch.float64), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64))
SHOWN_DENSITIES = [*(Mode(s) for s in (-1.0, 0.0, 1.29, 1.75)), CosMap(),
                   *(LogitNormal(m, s) for m, s in ((0, 1), (0.5, 0.6), (1, 0.6), (-0.5, 1)))]                 # Fig. 11
SHOWN_PROCESSES = {"rf": Straight(), "cos": Cosine(), "linear": Linear(), "edm(-1.20, 1.20)": EDM()}


def demonstrate(noise, counts=(4, 8, 16, 32, 64)) -> dict:
    """What there is to see: {title: {label: (x, y)}}. noise (B, 2) is where the flows to `RING` begin; a solver's error is
    the median distance from the end of 512 RK4 steps."""
    t, rf = torch.linspace(0.02, 0.98, 193, dtype=torch.float64), formulation("rf")
    plots = {"density of t (Fig. 11)": {str(density): (t, density.pdf(t).clamp(max=4)) for density in SHOWN_DENSITIES},
             "log-SNR by t": {name: (t, process.log_snr(t)) for name, process in SHOWN_PROCESSES.items()}}
    for form in (rf, formulation("edm(-1.20, 1.20)")):
        ways = torch.stack([z for z, _ in form.sample_steps(RING.predict(form), noise, form.schedule(40))])       # (40, B, 2)
        plots[f"from noise to data, {form.name}"] = {"": ways.unbind(2)}
    ends = lambda solver, steps: rf.sample(RING.predict(rf), noise, rf.schedule(steps), solver)
    truth = ends("rk4", 512)
    errors = lambda solver: torch.stack([(ends(solver, n) - truth).norm(dim=1).median() for n in counts])
    return plots | {"log10 of the error, by steps": {name: (torch.tensor(counts), errors(name).log10()) for name in SOLVERS}}


def main(file: str = "out/flow.png"):
    """One PNG with matplotlib, else the same numbers as text: at six places of each curve, of one flow for each path."""
    plots = demonstrate(torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        for title, curves in plots.items():
            print(title)
            for label, (x, y) in curves.items():
                at = torch.linspace(0, len(x) - 1, 6).long()
                x, y = (values[at, 0] if values.dim() == 2 else values[at] for values in (x, y))
                print(f"  {label:42}", *(f"{a:8.3g}: {b:7.3f}" for a, b in zip(x.tolist(), y.tolist())))
        return
    figure = Figure((25, 5), layout="constrained")
    for axis, (title, curves) in zip(figure.subplots(1, len(plots)), plots.items()):
        for label, (x, y) in curves.items():
            axis.plot(x, y, **({"label": label} if label else {"linewidth": 0.2}))
        axis.set_title(title)
        axis.legend(fontsize=7) if label else axis.set(xlim=(-4, 4), ylim=(-4, 4))
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80)
    print(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
