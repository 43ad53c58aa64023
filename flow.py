"""flow.py: rectified flow (SD3, arXiv:2403.03206v1, Sec. 2 and 3, Eq. 23).

Read with   Eq. 13 the path, Eq. 8 the loss, Eq. 19 the density of t, Eq. 23 the resolution shift, Eq. 1 the sampler
Not here    the network (mmdit.py), prompts and files (sample.py); a network is any callable velocity(z_t, t)
Time        t in [0, 1], t = 0 is data and t = 1 is noise; several libraries run the other way
Shapes      B batch   C latent channels   H W latent height, width; a schedule is a tensor of N + 1 falling times, 1 to 0
Run         python flow.py     the densities of Fig. 11 as text, and Euler's error on a flow with a known answer

The paper's letters: x_0 is `latent`, epsilon is `noise`, m and s of Eq. 19 are `logit_mean` and `logit_std`, alpha of
Eq. 23 is `timestep_shift`.
"""

import math
from dataclasses import dataclass

import torch


def per_sample(t):
    """(B,) -> (B, 1, 1, 1), to multiply images or latents."""
    return t.view(-1, 1, 1, 1)


# ------------------------------------------------------------------------------------------------------------
# Path and loss (Sec. 2, and "Rectified Flow" in Sec. 3)
# ------------------------------------------------------------------------------------------------------------

def interpolate(latent, noise, t):
    """Eq. 13, the straight path: z_t = (1 - t) x_0 + t eps. latent, noise (B, C, H, W), t (B,) -> (B, C, H, W)."""
    return (1 - per_sample(t)) * latent + per_sample(t) * noise


def velocity_target(latent, noise):
    """dz_t / dt of Eq. 13: eps - x_0, which points from data to noise and does not depend on t."""
    return noise - latent


def rectified_flow_loss(model, latent, context, pooled, t, noise):
    """Conditional flow matching on the straight path: Eq. 8 with the path of Eq. 13.

    model(z_t, t, context, pooled) -> velocity. latent, noise (B, C, H, W); t (B,) in [0, 1].
    Returns (B,) in fp32, so the caller can average it or bin it by t.
    """
    z_t = interpolate(latent, noise, t)                                           # (B, C, H, W)  Eq. 13
    velocity_pred = model(z_t, t, context, pooled)                                # (B, C, H, W)
    error = velocity_pred.float() - velocity_target(latent, noise)                # (B, C, H, W)
    return error.square().mean(dim=(1, 2, 3))                                     # (B,)          Eq. 8


# ------------------------------------------------------------------------------------------------------------
# Densities of t (Sec. 3.1) and the resolution shift (Sec. 5.3.2)
# ------------------------------------------------------------------------------------------------------------

def logit_normal_pdf(t, logit_mean: float = 0.0, logit_std: float = 1.0):
    """Eq. 19: pi_ln(t; m, s) = 1 / (s sqrt(2 pi)) * 1 / (t (1 - t)) * exp(-(logit(t) - m)^2 / (2 s^2)), t in (0, 1)."""
    z = (torch.logit(t) - logit_mean) / logit_std
    return torch.exp(-0.5 * z.square()) / (logit_std * math.sqrt(2 * math.pi) * t * (1 - t))


def logit_normal_quantile(u, logit_mean: float = 0.0, logit_std: float = 1.0):
    """Inverse distribution function of Eq. 19: with u ~ U(0, 1), t = sigmoid(m + s * Phi^-1(u)) has that density.

    m > 0 means more noise (mean t of (1, 0.6) is 0.716). u (B,) in (0, 1) -> t (B,).
    """
    return torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(u))


def shift_time(t, timestep_shift: float):
    """Eq. 23: t_m = alpha t_n / (1 + (alpha - 1) t_n), alpha = sqrt(m / n): the same uncertainty about a constant image
    of m instead of n pixels. Maps 0 to 0 and 1 to 1; alpha > 1 moves towards noise, alpha = 1 changes nothing."""
    return timestep_shift * t / (1 + (timestep_shift - 1) * t)


@dataclass(frozen=True)
class LogitNormal:
    """rf/lognorm(m, s) of Sec. 5.1; (0, 1) ranked first in Table 1."""
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def pdf(self, t):
        return logit_normal_pdf(t, self.logit_mean, self.logit_std)

    def quantile(self, u):
        return logit_normal_quantile(u, self.logit_mean, self.logit_std)


@dataclass(frozen=True)
class Shifted:
    """Another density after the map of Eq. 23, for training at higher resolution (Sec. 5.3.2: alpha = 3 at 1024^2)."""
    density: LogitNormal
    timestep_shift: float

    def pdf(self, t):
        back = shift_time(t, 1 / self.timestep_shift)                             # Eq. 23 inverted is Eq. 23 with 1/alpha
        slope = self.timestep_shift / (self.timestep_shift + (1 - self.timestep_shift) * t).square()      # d back / dt
        return self.density.pdf(back) * slope

    def quantile(self, u):
        return shift_time(self.density.quantile(u), self.timestep_shift)


@dataclass(frozen=True)
class RectifiedFlow:
    """A formulation: what the training step needs to know, a density of t and a loss. The t are sampled from the density;
    the loss is not weighted by it as well (Eq. 18: the two are the same thing)."""
    density: LogitNormal | Shifted = LogitNormal()

    def loss(self, model, latent, context, pooled, t, noise):
        """Per-sample loss (B,)."""
        return rectified_flow_loss(model, latent, context, pooled, t, noise)


# ------------------------------------------------------------------------------------------------------------
# Sampling: schedules, Euler, guidance
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


SCHEDULES = {"shifted": shifted_schedule, "released": released_schedule}


def make_schedule(name: str, num_steps: int, timestep_shift: float):
    """A schedule by name: falling times (num_steps + 1,) from 1 to 0."""
    if name not in SCHEDULES:
        raise ValueError(f"no schedule called {name!r}; choose {' or '.join(SCHEDULES)}")
    if num_steps < 1 or timestep_shift <= 0:
        raise ValueError(f"num_steps={num_steps} and timestep_shift={timestep_shift}: both must be positive")
    return SCHEDULES[name](num_steps, timestep_shift)


def guide(velocity_cond, velocity_uncond, guidance_scale: float):
    """Classifier-free guidance: v_uncond + scale * (v_cond - v_uncond). 1 is the conditional velocity, 0 the other."""
    return velocity_uncond + guidance_scale * (velocity_cond - velocity_uncond)


def euler_steps(velocity, noise, times):
    """Eq. 1 from noise to data by Euler's method. Yields (z at times[i + 1], velocity at times[i]) after each step i.

    velocity(z, t (B,)) -> (B, C, H, W); noise (B, C, H, W) is z at times[0]; times (N + 1,) falling, in fp32.
    """
    z = noise.float()
    for t, t_next in zip(times[:-1], times[1:]):
        v = velocity(z, t.to(z.device).expand(len(z))).float()
        z = z + (t_next - t).item() * v                                           # the step is negative: t falls
        yield z, v


def euler(velocity, noise, times):
    """The end of `euler_steps`: a sample (B, C, H, W)."""
    for z, _ in euler_steps(velocity, noise, times):
        sample = z
    return sample


def path_length(velocities, times):
    """Table 6: sum over the steps of ||v dt||, per sample: velocities, a list of N (B, C, H, W) -> (B,).
    For a straight path it is the distance between noise and sample, which bigger models come nearer to."""
    steps = (times[:-1] - times[1:]).tolist()
    return sum(dt * v.flatten(1).norm(dim=1) for v, dt in zip(velocities, steps))


# ------------------------------------------------------------------------------------------------------------
# A flow with a known answer
# ------------------------------------------------------------------------------------------------------------

def gaussian_velocity(z, t, mean: float, std: float):
    """The marginal field (Eq. 6) if the data are N(mean, std^2): E[eps - x_0 | z_t = z]. z (B, ...), t (B,)."""
    t = t.view(-1, *[1] * (z.dim() - 1))
    variance = ((1 - t) * std).square() + t.square()                              # of z_t
    return -mean + (t - (1 - t) * std**2) / variance * (z - (1 - t) * mean)


def main():
    """Fig. 11 as text, and how Euler's error falls with the number of steps where the answer is known."""
    edges = torch.linspace(0, 1, 11, dtype=torch.float64)
    centers = (edges[1:] + edges[:-1]) / 2
    print("density of t at    " + "  ".join(f"{c:.2f}" for c in centers.tolist()))
    for mean, std in ((0, 1), (0.5, 0.6), (1, 0.6), (-0.5, 1)):
        density = LogitNormal(mean, std)
        print(f"lognorm({mean:4.1f}, {std:3.1f})  " + "  ".join(f"{p:.2f}" for p in density.pdf(centers).tolist()))
    noise = torch.randn(4096, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    exact = 2 + 0.5 * noise                                                       # data N(2, 0.5^2): the flow is affine
    print("\nEuler on data N(2, 0.5^2): steps, largest error")
    for num_steps in (5, 10, 25, 50, 100):
        sample = euler(lambda z, t: gaussian_velocity(z, t, 2, 0.5), noise, shifted_schedule(num_steps))
        print(f"{num_steps:5}  {(sample - exact).abs().max():.4f}")


if __name__ == "__main__":
    main()
