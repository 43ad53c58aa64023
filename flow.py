"""flow.py: rectified flow (SD3, arXiv:2403.03206v1, Sec. 2, 3.1 and 5.3.2).

Read with   Eq. 13 and 8, then Eq. 19 to 22 (where t is drawn), Eq. 23 to 25 (resolution), Eq. 1
Not here    other paths and outputs (formulations.py), the network (mmdit.py), prompts (sample.py)
Time        t in [0, 1], t = 0 is data and t = 1 is noise; several libraries run the other way
Shapes      B batch   C latent channels   H W latent height, width   N number of sampling steps
Run         python flow.py     prints the densities of Fig. 11 and a 2-D flow with a known answer

The paper's letters: x_0 is `latent`, epsilon is `noise`, lambda_t is `log_snr`. In Eq. 19, m and s
are `logit_mean` and `logit_std`. In Eq. 20, s is `mode_scale`. In Eq. 23, sqrt(m / n), which the
paper also calls alpha, is `timestep_shift`.
"""

import math
from dataclasses import dataclass, fields
from math import pi

import torch


def per_sample(t, dims=4):
    """One number per sample, shaped to multiply images or latents: (B,) -> (B, 1, 1, 1)."""
    ones = [1] * (dims - 1)
    return t.view(-1, *ones)


# --- The straight path and its loss (Eq. 13 and 8) ------------------------------------------------

def interpolate(latent, noise, t):
    """Eq. 13: z_t = (1 - t) x_0 + t eps. latent, noise (B, C, H, W); t (B,) -> (B, C, H, W)."""
    t = per_sample(t, latent.dim()).to(latent)                        # (B, 1, 1, 1)
    return (1 - t) * latent + t * noise


def rectified_flow_loss(model, latent, context, pooled, t, noise):
    """Conditional flow matching on the straight path: Eq. 8 with the path of Eq. 13.

        z_t = (1 - t) x_0 + t eps        so        dz_t / dt = eps - x_0

    model(z_t, t, context, pooled) -> velocity. latent, noise (B, C, H, W); t (B,) in [0, 1].
    Returns (B,) in fp32, so that the caller can average it or sort it by t.
    """
    z_t = interpolate(latent, noise, t)                               # (B, C, H, W)  Eq. 13
    velocity_target = noise - latent                                  # (B, C, H, W)  dz_t / dt
    velocity_pred = model(z_t, t, context, pooled).float()            # (B, C, H, W)
    error = velocity_pred - velocity_target                           # (B, C, H, W)
    return error.square().flatten(1).mean(dim=1)                      # (B,)          Eq. 8


@torch.no_grad()
def validate(model, samples, precision, loss=rectified_flow_loss, levels=8):
    """Losses at equally spaced t in [0, 1] (App. B.3): (levels,). Sec. 5.3.3's mean omits t = 1.

    samples: (latent, context, pooled, noise) for each picture size, the same every time.
    """
    columns = []
    mixed = precision != torch.float32
    for latent, context, pooled, noise in samples:
        rows = []
        with torch.autocast(latent.device.type, precision, enabled=mixed):
            for t in torch.linspace(0, 1, levels):
                t = t.expand(len(latent)).to(latent)                  # (B,)
                rows.append(loss(model, latent, context, pooled, t, noise))
        columns.append(torch.stack(rows))                             # (levels, B)
    return torch.cat(columns, dim=1).mean(dim=1).cpu()                # (levels,)


# --- Densities of t in training (Sec. 3.1, Eq. 19 to 22) ------------------------------------------
# Each has pdf(t), the density, and quantile(u), which makes t from uniform u: (B,) -> (B,) both.

@dataclass(frozen=True)
class Uniform:
    """U(0, 1), which plain rectified flow uses."""

    def pdf(self, t):
        return torch.ones_like(t)

    def quantile(self, u):
        return u


def normal_density(x, mean, std):
    """N(x; mean, std^2), the density of the normal distribution."""
    deviation = (x - mean) / std
    return torch.exp(-deviation.square() / 2) / (std * math.sqrt(2 * pi))


@dataclass(frozen=True)
class LogitNormal:
    """Eq. 19: logit(t) ~ N(m, s^2). A larger m means more noise: (1, 0.6) has the mean t = .716."""
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def __post_init__(self):
        if not (math.isfinite(self.logit_mean) and 0 < self.logit_std < math.inf):
            raise ValueError(f"lognorm({self.logit_mean}, {self.logit_std}) is no density; "
                             f"give a finite m and an s greater than 0")

    def pdf(self, t):
        """1 / (s sqrt(2 pi)) * 1 / (t (1 - t)) * exp(-(logit(t) - m)^2 / (2 s^2)), 0 < t < 1."""
        slope = 1 / (t * (1 - t))                                     # of logit(t)
        return normal_density(torch.logit(t), self.logit_mean, self.logit_std) * slope

    def quantile(self, u):
        """t = sigmoid(x) with x ~ N(m, s^2)."""
        return torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(u))


def mode_map(u, mode_scale):
    """Eq. 20: f(u; s) = 1 - u - s (cos^2(pi u / 2) - 1 + u). It falls from 1 to 0. (B,) -> (B,)"""
    return 1 - u - mode_scale * (torch.cos(pi / 2 * u).square() - 1 + u)


def mode_map_inverse(t, mode_scale):
    """The u with f(u; s) = t. It has no closed form, so this halves [0, 1] 53 times. (B,)"""
    low = torch.zeros_like(t)
    high = torch.ones_like(t)
    for _ in range(53):
        middle = (low + high) / 2
        too_high = mode_map(middle, mode_scale) > t                   # f falls: u lies to the right
        low = torch.where(too_high, middle, low)
        high = torch.where(too_high, high, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Mode:
    """t = f(u; s) of Eq. 20, u uniform. s > 0 favours the middle, s < 0 the ends, 0 is uniform."""
    mode_scale: float

    def __post_init__(self):
        if not -1 <= self.mode_scale <= 2 / (pi - 2):
            raise ValueError(f"mode({self.mode_scale}) is no density; "
                             f"Eq. 20 is monotonic for -1 <= s <= 2 / (pi - 2) = 1.7519 only")

    def pdf(self, t):
        """|d f^-1 / dt| = 1 / |f'(u)| at u = f^-1(t)."""
        u = mode_map_inverse(t, self.mode_scale)
        return 1 / (1 + self.mode_scale - self.mode_scale * pi / 2 * torch.sin(pi * u))

    def quantile(self, u):
        return mode_map(1 - u, self.mode_scale)                       # 1 - u: so t rises with u


@dataclass(frozen=True)
class CosMap:
    """The straight path with the log-SNR of the cosine path (Eq. 21 and 22)."""

    def pdf(self, t):
        """Eq. 22: 2 / (pi - 2 pi t + 2 pi t^2)."""
        return 2 / (pi - 2 * pi * t + 2 * pi * t.square())

    def quantile(self, u):
        """Eq. 21: t = f(u) = 1 - 1 / (tan(pi u / 2) + 1)."""
        return 1 - 1 / (torch.tan(pi / 2 * u) + 1)


DENSITIES = {"uniform": Uniform, "lognorm": LogitNormal, "mode": Mode, "cosmap": CosMap}


def parse_name(name):
    """Splits "lognorm(0, 1)" into "lognorm" and [0.0, 1.0]; the list is empty without brackets."""
    word = name.strip()
    numbers = []
    if word.endswith(")"):
        word, _, inside = word[:-1].partition("(")
        try:
            numbers = [float(text) for text in inside.split(",")]
        except ValueError:
            raise ValueError(f"{name!r}: what is in brackets must be numbers") from None
    return word, numbers


def density(name):
    """A density by name: "uniform", "lognorm(0, 1)", "mode(1.29)", "cosmap". Or a ValueError."""
    word, numbers = parse_name(name)
    if word not in DENSITIES or len(numbers) != len(fields(DENSITIES[word])):
        raise ValueError(f"no density is called {name!r}; "
                         f"choose uniform, lognorm(m, s), mode(s) or cosmap, with numbers for m, s")
    return DENSITIES[word](*numbers)


# --- More pixels need more noise (Sec. 5.3.2, Eq. 23 to 25) ---------------------------------------

def shift_time(t, timestep_shift):
    """Eq. 23: t_m = alpha t_n / (1 + (alpha - 1) t_n), with alpha = sqrt(m / n).

    At t_m, an image of m pixels is as uncertain as one of n pixels at t_n. 0 stays 0 and 1 stays 1.
    """
    return timestep_shift * t / (1 + (timestep_shift - 1) * t)


def shift_log_snr(log_snr, timestep_shift):
    """Eq. 24 and 25, the same for log-SNRs: lambda(t_m) = lambda(t_n) - 2 log alpha."""
    return log_snr - 2 * math.log(timestep_shift)


# --- Sampling: the times, Euler's method for Eq. 1, guidance, path length -------------------------

def shifted_schedule(num_steps, timestep_shift):
    """Even times from 1 to 0, moved by Eq. 23. (N + 1,)"""
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return shift_time(times, timestep_shift)


def released_schedule(num_steps, timestep_shift):
    """What Stability's code and diffusers do with the released SD3 models. (N + 1,)

    The largest and the smallest of 1000 training times are already shifted. N even times between
    these two are shifted a second time, and a 0 follows.
    """
    smallest = shift_time(1 / 1000, timestep_shift)
    times = torch.linspace(1, smallest, num_steps, dtype=torch.float64)
    return torch.cat([shift_time(times, timestep_shift), times.new_zeros(1)])


def sgm_uniform_schedule(num_steps, timestep_shift):
    """ComfyUI's "sgm_uniform": `released` with N + 1 even times, the last of which becomes 0."""
    times = released_schedule(num_steps + 1, timestep_shift)
    return torch.cat([times[:-2], times[-1:]])


SCHEDULES = {"shifted": shifted_schedule, "released": released_schedule,
             "sgm_uniform": sgm_uniform_schedule}


def make_schedule(name, num_steps, timestep_shift):
    """The times of N sampling steps: (N + 1,) fp32, falling from 1 to 0. Or a ValueError."""
    if name not in SCHEDULES:
        raise ValueError(f"no schedule is called {name!r}; choose one of {', '.join(SCHEDULES)}")
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
    if not 0 < timestep_shift < math.inf:
        raise ValueError(f"timestep_shift is {timestep_shift}; it must be greater than 0")
    return SCHEDULES[name](num_steps, timestep_shift).float()


def velocity_at(velocity, z, t):
    """velocity(z, t (B,)) with one number t for the whole batch. (B, C, H, W)"""
    times = z.new_full((len(z),), t)                                  # (B,)
    return velocity(z, times).to(z.dtype)


def euler_step(velocity, z, t, t_next, before=None):
    """A step of Euler's method for Eq. 1, dz = v dt: the paper's solver (App. B.3).
    z (B, C, H, W) at time t, and t_next < t. Returns z at t_next, and the velocity at t. `before`
    is (z, t, velocity) of the previous step, for solvers that look back."""
    v = velocity_at(velocity, z, t)
    return z + (t_next - t) * v, v


def solve(velocity, noise, times, step=euler_step):
    """Eq. 1 from noise to data. velocity(z, t (B,)) -> (B, C, H, W); times (N + 1,), falling.

    Returns two lists: z at the N + 1 times, of which the last is the sample, and N velocities.
    """
    points = [noise]
    velocities = []
    before = None
    times = times.tolist()
    for t, t_next in zip(times[:-1], times[1:]):
        z, v = step(velocity, points[-1], t, t_next, before)
        before = (points[-1], t, v)
        points.append(z)
        velocities.append(v)
    return points, velocities


def guide(velocity_cond, velocity_uncond, guidance_scale):
    """Classifier-free guidance. A scale of 1 gives the conditional velocity, 0 the other one."""
    return velocity_uncond + guidance_scale * (velocity_cond - velocity_uncond)


def path_length(velocities, times):
    """Table 6: the sum of ||v dt|| over the steps. velocities: N of (B, C, H, W) -> (B,).
    On a straight path it is the distance from noise to sample. Larger models come closer to it."""
    length = 0
    for v, t, t_next in zip(velocities, times[:-1], times[1:]):
        length = length + (t - t_next).item() * v.flatten(1).norm(dim=1)
    return length


# --- Not in the paper: solvers for few steps, and skip-layer guidance (Stability's sd3_infer.py) --

def heun_step(velocity, z, t, t_next, before=None):
    """Heun's method, second order: the mean of the velocities at both ends of the step.
    The step to 0 is Euler's: at t = 0 there is no noise left that a network could predict."""
    z_euler, v = euler_step(velocity, z, t, t_next)
    if t_next == 0:
        return z_euler, v
    v_next = velocity_at(velocity, z_euler, t_next)
    return z + (t_next - t) * (v + v_next) / 2, v


def dpm_solver_step(velocity, z, t, t_next, before=None):
    """DPM-Solver++(2M) (Lu et al., 2022), second order with one evaluation of the network a step.

    z_next = t_next / t z + (1 - t_next / t) D is exact for a constant D, the predicted latent. D is
    extrapolated by half a step of log t, but not in the first step or the step to 0. Differs from
    Lu et al.: log t, as in public SD3 code. Their log-SNR is infinite at t = 1.
    """
    v = velocity_at(velocity, z, t)
    latent = z - t * v
    if before is not None and t_next > 0:
        z_before, t_before, v_before = before
        latent_before = z_before - t_before * v_before
        steps_ahead = math.log(t / t_next) / math.log(t_before / t) / 2
        latent = latent + steps_ahead * (latent - latent_before)
    return t_next / t * z + (1 - t_next / t) * latent, v


SOLVERS = {"euler": euler_step, "heun": heun_step, "dpm++2m": dpm_solver_step}


def guide_skip_layers(guided, cond, skipped, skip_scale):
    """Leads away from `skipped`, the conditional velocity of the network without some layers."""
    return guided + skip_scale * (cond - skipped)


# --- The demonstration ----------------------------------------------------------------------------

def gaussian_velocity(z, t, mean, std):
    """E[eps - x_0 | z_t = z] for data N(mean, std^2): its flow takes noise n to mean + std n."""
    t = per_sample(t, z.dim())
    variance = ((1 - t) * std) ** 2 + t**2                            # of z_t
    slope = (t - (1 - t) * std**2) / variance
    return slope * (z - (1 - t) * mean) - mean


def main():
    """Prints the densities of Fig. 11, then one flow by Euler's method beside the known answer."""
    t = torch.linspace(0.1, 0.9, 9)
    print("density at t from .1 to .9")
    for name in ("mode(-1)", "mode(1.29)", "cosmap", "lognorm(0, 1)", "lognorm(1, 0.6)"):
        values = density(name).pdf(t).tolist()
        print(f"{name:16}", *(f"{value:.2f}" for value in values))

    def velocity(z, t):
        return gaussian_velocity(z, t, mean=torch.tensor([2.0, -1.0]), std=0.5)
    print("noise (1, 1) flows to (2.5, -0.5) for data N((2, -1), .5^2); steps, sample, path length")
    for num_steps in (1, 5, 25, 125):
        times = shifted_schedule(num_steps, 1.0)
        points, velocities = solve(velocity, torch.ones(1, 2), times)
        x, y = points[-1][0].tolist()
        print(f"{num_steps:5}  ({x:.3f}, {y:.3f})  {path_length(velocities, times).item():.3f}")


if __name__ == "__main__":
    main()
