"""formulations.py: the other paths and outputs of the study (SD3, Sec. 2, 3 and 5.1).

Read with   Eq. 2 to 12, L_w, Eq. 14 to 18, in this order; then the 61 names of Sec. 5.1
Not here    Eq. 1, 13 and 19 to 25 (flow.py); the study itself (experiments/)
Shapes      B batch   M number of noises   D size of one sample; (B, ...) is any batch of latents
Run         python formulations.py     the samplers on a flow with a known answer

The paper's x_0 is `latent`, epsilon `noise`, lambda_t `log_snr`. P_m and P_s of Eq. 14 are
`log_mean` and `log_std`. |x|^2 is a mean over the numbers of one sample.
"""

from dataclasses import dataclass, field
from math import inf, isfinite, pi

import torch

from flow import Uniform, density, normal_density, parse_name, per_sample


@dataclass(frozen=True)
class Scales:
    """a_t, b_t, a'_t, b'_t as process.at(t) gives them, in the shape of t. Below, they are `at`."""
    a: torch.Tensor
    b: torch.Tensor
    a_slope: torch.Tensor
    b_slope: torch.Tensor

    @property
    def log_snr(self):
        """lambda_t = log(a_t^2 / b_t^2)."""
        return 2 * torch.log(self.a / self.b)

    @property
    def a_rate(self):
        """a'_t / a_t."""
        return self.a_slope / self.a

    @property
    def log_snr_slope(self):
        """lambda'_t = 2 (a'_t / a_t - b'_t / b_t). It is negative."""
        return 2 * (self.a_rate - self.b_slope / self.b)

    def to(self, latent):
        """The same in the precision and on the device of the latent."""
        parts = [part.to(latent) for part in vars(self).values()]
        return Scales(*parts)


def mean_square(x):
    """(B, ...) -> (B,)"""
    return x.square().flatten(1).mean(dim=1)


# --- Sec. 2: from a path to a loss (Eq. 2 to 12) --------------------------------------------------

def diffuse(latent, noise, at):
    """Eq. 2 and 4: z_t = psi_t(x_0 | eps) = a_t x_0 + b_t eps. (B, ...)"""
    return at.a * latent + at.b * noise


def conditional_density(z, noise, at, data_density):
    """p_t(z | eps): the data's density, stretched by a_t and moved by b_t eps. (M, D) -> (M,)"""
    return data_density(psi_inverse(z, noise, at)) / at.a ** z.shape[1]


def marginal_density(z, noise, at, data_density):
    """Eq. 3: p_t(z) = E_eps p_t(z | eps), a mean over noise (M, D). One z (1, D), one t."""
    z = z.expand_as(noise)
    return conditional_density(z, noise, at, data_density).mean()


def psi_inverse(z, noise, at):
    """Eq. 4 backwards: psi_t^-1(z | eps) = (z - b_t eps) / a_t. (B, ...)"""
    return (z - at.b * noise) / at.a


def psi_slope(latent, noise, at):
    """Eq. 4 differentiated by t: psi'_t(x_0 | eps) = a'_t x_0 + b'_t eps. (B, ...)"""
    return at.a_slope * latent + at.b_slope * noise


def conditional_velocity(z, noise, at):
    """Eq. 5: u_t(z | eps) = psi'_t(psi_t^-1(z | eps) | eps). (B, ...)"""
    return psi_slope(psi_inverse(z, noise, at), noise, at)


def marginal_velocity(z, noise, at, data_density):
    """Eq. 6: u_t(z) = E_eps [u_t(z | eps) p_t(z | eps) / p_t(z)]. As Eq. 3; (1, D) -> (D,)."""
    z = z.expand_as(noise)                                            # (M, D)
    weight = conditional_density(z, noise, at, data_density)          # (M,)
    velocity = conditional_velocity(z, noise, at)                     # (M, D)
    return (weight[:, None] * velocity).mean(dim=0) / weight.mean()


def flow_matching_loss(velocity_pred, marginal):
    """Eq. 7: |v_Theta(z, t) - u_t(z)|^2. The marginal field u_t is known for toy data only. (B,)"""
    return mean_square(velocity_pred - marginal)


def conditional_flow_matching_loss(velocity_pred, latent, noise, at):
    """Eq. 8: |v_Theta(z, t) - u_t(z | eps)|^2. At z = psi_t(x_0 | eps), u_t is psi'_t. (B,)"""
    return mean_square(velocity_pred - psi_slope(latent, noise, at))


def conditional_velocity_by_scales(z, noise, at):
    """Eq. 9: u_t(z | eps) = a'/a z - eps b (a'/a - b'/b). (B, ...)"""
    difference = at.a_rate - at.b_slope / at.b
    return at.a_rate * z - noise * at.b * difference


def conditional_velocity_by_log_snr(z, noise, at):
    """Eq. 10: u_t(z | eps) = a'/a z - b/2 lambda' eps. (B, ...)"""
    return at.a_rate * z - at.b / 2 * at.log_snr_slope * noise


def loss_by_log_snr(velocity_pred, z, noise, at):
    """Eq. 11: |v_Theta - a'/a z + b/2 lambda' eps|^2, which is Eq. 8 with Eq. 10 in it. (B,)"""
    noise_part = at.b / 2 * at.log_snr_slope * noise
    return mean_square(velocity_pred - at.a_rate * z + noise_part)


def loss_by_noise(noise_pred, noise, at):
    """Eq. 12: (-b/2 lambda')^2 |eps_Theta - eps|^2. (B,)"""
    return mean_square(-at.b / 2 * at.log_snr_slope * (noise_pred - noise))


def noise_from_velocity(velocity_pred, z, at):
    """Below Eq. 12: eps_Theta = -2 / (lambda' b) (v_Theta - a'/a z). (B, ...)"""
    factor = -2 / (at.log_snr_slope * at.b)
    return factor * (velocity_pred - at.a_rate * z)


def weighted_loss(noise_pred, noise, at, weight):
    """L_w (no number): -1/2 w_t lambda'_t |eps_Theta - eps|^2, for t ~ U(0, 1). (B,)
    weight, shaped like at.a, is w_t. With -1/2 lambda'_t b_t^2 for w_t it is Eq. 12."""
    error = (noise_pred - noise).square()
    return (-weight / 2 * at.log_snr_slope * error).flatten(1).mean(dim=1)


# --- Sec. 3: the paths and their weights (Eq. 13 to 18) -------------------------------------------

class Straight:
    """Rectified flow, Eq. 13: z_t = (1 - t) x_0 + t eps."""
    first, last = 0.0, 1.0                                            # where all scales are finite

    def at(self, t):
        one = torch.ones_like(t)
        return Scales(a=1 - t, b=t, a_slope=-one, b_slope=one)

    def time_at(self, ratio):
        """The t at which b / a is `ratio`."""
        return ratio / (1 + ratio)


@dataclass(frozen=True)
class EDM:
    """Eq. 14: z_t = x_0 + b_t eps, b_t = exp F^-1(t), F^-1(t) the quantile of N(P_m, P_s^2)."""
    log_mean: float
    log_std: float
    first, last = 1e-5, 1 - 1e-5                                      # b is infinite at 1

    def __post_init__(self):
        if not (isfinite(self.log_mean) and 0 < self.log_std < inf):
            raise ValueError(f"{self} needs a finite P_m and a P_s greater than 0")

    def at(self, t):
        """t in [first, last], any shape -> Scales of that shape."""
        quantile = torch.special.ndtri(t)
        quantile_slope = 1 / normal_density(quantile, 0, 1)
        b = torch.exp(self.log_mean + self.log_std * quantile)
        b_slope = b * self.log_std * quantile_slope
        return Scales(torch.ones_like(t), b, torch.zeros_like(t), b_slope)

    def time_at(self, ratio):
        return torch.special.ndtr((torch.log(ratio) - self.log_mean) / self.log_std)


def edm_log_snr_density(log_snr, log_mean, log_std):
    """Eq. 15: the density of lambda_t on EDM's path for t ~ U(0, 1), N(-2 P_m, (2 P_s)^2)."""
    return normal_density(log_snr, -2 * log_mean, 2 * log_std)


def edm_weight(log_snr, log_mean, log_std, sigma_data=0.5):
    """Eq. 16: N(lambda; -2 P_m, (2 P_s)^2) (e^-lambda + 0.5^2).
    N is -1 / lambda' for uniform t and cancels lambda' in L_w. What is left is the plain square
    error of F (see `output_parts`), so training applies neither factor again."""
    density = edm_log_snr_density(log_snr, log_mean, log_std)
    return density * (torch.exp(-log_snr) + sigma_data**2)


class Cosine:
    """Eq. 17: z_t = cos(pi t / 2) x_0 + sin(pi t / 2) eps.
    The plain loss of eps is L_w with w_t = sech(lambda / 2), that of v with e^(-lambda / 2)."""
    first, last = 0.0, 1.0

    def at(self, t):
        a = torch.sin(pi / 2 * (1 - t))                          # the cosine, exactly 0 at 1
        b = torch.sin(pi / 2 * t)
        return Scales(a, b, a_slope=-pi / 2 * b, b_slope=pi / 2 * a)

    def time_at(self, ratio):
        return 2 / pi * torch.atan(ratio)


class Linear:
    """LDM-linear: a_t = (prod over s <= t of (1 - beta_s))^(1/2) over 1000 steps, a^2 + b^2 = 1.
    sqrt(beta) rises evenly from sqrt(.00085) to sqrt(.012). Step s ends at t = (s + 1) / 1000 and
    log a_t is linear within it. t = 0 is the data. At t = 1, a is .068 and not 0."""
    first, last = 0.001, 1.0

    def at(self, t):
        """t in [0, 1], any shape -> Scales of that shape."""
        roots = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=t.dtype)
        changes = torch.log1p(-roots.square())                        # of log a^2, in each step
        step = (1000 * t).ceil().long().clamp(min=1) - 1              # the step that t is in
        log_a2 = changes.cumsum(0)[step] - changes[step] * (step + 1 - 1000 * t)
        a = torch.exp(log_a2 / 2)
        b = torch.sqrt(-torch.expm1(log_a2))
        a_slope = a * 500 * changes[step]
        return Scales(a, b, a_slope, b_slope=-a * a_slope / b)        # from a a' + b b' = 0


def density_weight(t, density):
    """Eq. 18: w_t^pi = t / (1 - t) pi(t). It does what drawing t from pi does, so never do both."""
    return t / (1 - t) * density.pdf(t)


# --- Sec. 5.1: what a network predicts, and the 61 formulations -----------------------------------

@dataclass(frozen=True)
class MatchedEDM:
    """edm/rf and edm/cos: z_t = x_0 + b_t eps with b_t = exp(-lambda_t / 2) of another path.
    The paper matches "the log-SNR weighting" of rf or v/cos. By log-SNR both weights are one,
    e^(-lambda / 2), but Table 1 ranks the two apart. So we match the log-SNR at every t."""
    other: Straight | Cosine
    first, last = 1e-5, 1 - 1e-5                                      # b is infinite at 1

    def at(self, t):
        other = self.other.at(t)
        b = other.b / other.a
        b_slope = -b / 2 * other.log_snr_slope
        return Scales(torch.ones_like(t), b, torch.zeros_like(t), b_slope)

    def time_at(self, ratio):
        return self.other.time_at(ratio)


def input_size(at, sigma_data):
    """sqrt(a^2 sigma_data^2 + b^2): the size of z_t for latents of the size sigma_data."""
    return torch.hypot(at.a * sigma_data, at.b)


def output_parts(output, at, sigma_data):
    """The network learns latent_part x_0 + noise_part eps. Returns both parts, shaped like at.a.
    velocity    a' x_0 + b' eps (Eq. 5);   eps: the noise
    v           a eps - b x_0, the velocity per angle of a path with a^2 + b^2 = 1
    F           EDM's (x_0 - c_skip z) / c_out with c_skip = sigma_data^2 / (b^2 + sigma_data^2) and
                c_out = b sigma_data / sqrt(b^2 + sigma_data^2), for a = 1
    """
    if output == "velocity":
        return at.a_slope, at.b_slope
    if output == "eps":
        return torch.zeros_like(at.a), torch.ones_like(at.a)
    if output == "v":
        return -at.b, at.a
    if output == "F":
        size = input_size(at, sigma_data)
        return at.b / (sigma_data * size), -sigma_data * at.a / size  # F, in x_0 and eps
    raise ValueError(f"no output is called {output!r}; choose velocity, eps, v or F")


@dataclass(frozen=True)
class Formulation:
    """A path, what the network predicts, and a density of t.
    sigma_data is the standard deviation of the latents, 1 (App. B.2). So F and its input have unit
    size. Differs from the paper: Eq. 16 prints EDM's 0.5. With it, our targets would grow from size
    1 to 2 with b, and our inputs shrink from 2 to 1."""
    process: Straight | EDM | Cosine | Linear | MatchedEDM
    output: str = "velocity"
    density: object = Uniform()
    name: str = field(default="", compare=False)
    sigma_data: float = 1.0

    def clamp(self, t):
        """float64 times at which the path is finite and, for eps, z_t still shows x_0."""
        last = self.process.last
        if self.output == "eps":
            last = min(last, 0.999)                                   # at a = 0, z_t is the noise
        return t.cpu().double().clamp(self.process.first, last)

    def network_input(self, z, at):
        """z_t, which EDM divides by its size. (B, ...)"""
        if self.output != "F":
            return z
        return z / input_size(at, self.sigma_data)

    def loss(self, model, latent, context, pooled, t, noise):
        """The mean square error of the output, not weighted: for rf it is `rectified_flow_loss`.
        model(z_t, t, context, pooled) -> output. latent, noise (B, C, H, W); t (B,) -> (B,) fp32.
        """
        t = self.clamp(t)                                             # (B,)
        at = self.process.at(per_sample(t, latent.dim()))             # (B, 1, 1, 1) each
        at = at.to(latent)
        z_t = diffuse(latent, noise, at)                              # (B, C, H, W)  Eq. 2
        latent_part, noise_part = output_parts(self.output, at, self.sigma_data)
        target = latent_part * latent + noise_part * noise            # (B, C, H, W)
        prediction = model(self.network_input(z_t, at), t.to(latent), context, pooled)
        return mean_square(prediction.float() - target)

    def latent_and_noise(self, prediction, z, at):
        """x_0 and eps from z_t = a x_0 + b eps and the equation of the prediction. (B, ...) each"""
        latent_part, noise_part = output_parts(self.output, at, self.sigma_data)
        determinant = at.a * noise_part - at.b * latent_part
        latent = (noise_part * z - at.b * prediction) / determinant
        noise = (at.a * prediction - latent_part * z) / determinant
        return latent, noise

    def schedule(self, num_steps):
        """N + 1 even times from 1 to 0. EDM's paths take the levels of Karras et al. (2022):
        b from 80 to .002, as far as the path goes, even in its seventh root, then 0."""
        if self.process.last == 1:
            return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
        ends = torch.tensor([self.process.last, self.process.first], dtype=torch.float64)
        levels = self.process.at(ends).b.clamp(0.002, 80)
        highest, lowest = levels.pow(1 / 7).tolist()
        roots = torch.linspace(highest, lowest, num_steps, dtype=torch.float64)
        return torch.cat([self.process.time_at(roots**7), roots.new_zeros(1)])

    def sample(self, predict, noise, times, literal=False):
        """From noise (B, ...) to data in N steps. predict(z_t, t (B,)) -> output; times (N + 1,).
        App. B.3 samples by "a Euler discretization of Equation 1". In EDM's own t that diverges:
        b' is infinite at t = 1. So a step holds x_0 and eps fixed and changes a and b only, like
        DDIM. That is Euler's step along the straight path. literal=True takes it in the path's own
        t. In 5 steps of v/cos for N(0, .5^2), noise 1 ends at .364, or literally at .481, not .5.
        """
        if literal and self.process.last < 1:
            raise ValueError(f"{self.name} has no finite Eq. 1; sample without literal=True")
        at = self.process.at(self.clamp(times[0]))
        z = noise * input_size(at, self.sigma_data)
        for t, t_next in zip(times[:-1], times[1:]):
            t = self.clamp(t)                                         # one number for all samples
            at = self.process.at(t)
            t_batch = t.expand(len(z)).to(z)                          # (B,)
            prediction = predict(self.network_input(z, at), t_batch).to(z)
            latent_pred, noise_pred = self.latent_and_noise(prediction, z, at)
            if literal:
                z = z + (t_next - t) * psi_slope(latent_pred, noise_pred, at)
            else:
                z = diffuse(latent_pred, noise_pred, self.process.at(t_next))
        return z


WITHOUT_NUMBERS = {
    "rf": (Straight(), "velocity"),
    "eps/linear": (Linear(), "eps"),
    "v/linear": (Linear(), "v"),
    "eps/cos": (Cosine(), "eps"),
    "v/cos": (Cosine(), "v"),
    "edm/rf": (MatchedEDM(Straight()), "F"),
    "edm/cos": (MatchedEDM(Cosine()), "F"),
}


def formulation(name):
    """A formulation by the paper's name, for example "rf/lognorm(0.00, 1.00)". Or a ValueError."""
    word, numbers = parse_name(name)
    if word in WITHOUT_NUMBERS and not numbers:
        process, output = WITHOUT_NUMBERS[word]
        return Formulation(process, output, name=word)
    if word == "edm" and len(numbers) == 2:
        return Formulation(EDM(*numbers), "F", name=name)
    if word in ("rf/mode", "rf/lognorm", "rf/cosmap"):
        return Formulation(Straight(), "velocity", density(name.strip()[3:]), name)
    raise ValueError(f"no formulation is called {name!r}; choose {', '.join(WITHOUT_NUMBERS)}, "
                     f"rf/cosmap, rf/mode(s), rf/lognorm(m, s) or edm(P_m, P_s), with numbers")


# 7 even values of s in [-1, 1.75] and s = 1; 30 pairs (m, s); 15 pairs (P_m, P_s).
FORMULATIONS = [*WITHOUT_NUMBERS, "rf/cosmap"]
for mode_scale in ("-1.00", "-0.54", "-0.08", "0.38", "0.83", "1.00", "1.29", "1.75"):
    FORMULATIONS.append(f"rf/mode({mode_scale})")
for logit_mean in ("-1.00", "-0.50", "0.00", "0.50", "1.00"):
    for logit_std in ("0.20", "0.60", "1.00", "1.40", "1.80", "2.20"):
        FORMULATIONS.append(f"rf/lognorm({logit_mean}, {logit_std})")
for log_mean in ("-1.20", "-0.60", "0.00", "0.60", "1.20"):
    for log_std in ("0.60", "1.20", "1.80"):
        FORMULATIONS.append(f"edm({log_mean}, {log_std})")


# --- The demonstration ----------------------------------------------------------------------------

def gaussian_network(form, std):
    """The network that training would end at for data N(0, std^2): E[output | z_t]."""
    def predict(z, t):
        """z (B, ...), t (B,) -> output, as z."""
        at = form.process.at(per_sample(t, z.dim()))
        if form.output == "F":
            z = z * input_size(at, form.sigma_data)
        latent_part, noise_part = output_parts(form.output, at, form.sigma_data)
        covariance = latent_part * at.a * std**2 + noise_part * at.b  # of output and z_t
        return covariance / input_size(at, std) ** 2 * z
    return predict


def main():
    """Prints where noise 1 ends in 5 steps for data N(0, .5^2). The answer is .5."""
    noise = torch.ones(1, 1, dtype=torch.float64)
    print("formulation        x_0 and eps fixed   Euler's method in own t")
    for name in ("rf", "v/cos", "eps/linear"):
        form = formulation(name)
        times = form.schedule(5)
        predict = gaussian_network(form, 0.5)
        fixed = form.sample(predict, noise, times).item()
        literal = form.sample(predict, noise, times, literal=True).item()
        print(f"{name:18} {fixed:.3f}               {literal:.3f}")


if __name__ == "__main__":
    main()
