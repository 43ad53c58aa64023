"""vae.py: the f = 8 autoencoder, image <-> latent (SD3, arXiv:2403.03206v1).

Read with   Sec. 5.2.1 and Table 3 (4, 8 or 16 latent channels), App. B.2 (normalised latents);
            Rombach et al. 2022 for the losses
Not here    files (checkpoints.py), pictures (data.py)
Shapes      B batch   C latent channels   H W latent height, width   D channels inside the network
            image (B, 3, 8H, 8W) in [-1, 1]   latent (B, C, H, W)
            moments (B, 2C, H, W): the mean and the log-variance of the code
Names       Parameters are called as in the released SD3 files.
Run         python vae.py     shapes for 4, 8 and 16 channels, and what PSNR and SSIM respond to
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder (Sec. 5.2.1). The defaults are SD3's: 83.8 M parameters."""
    latent_channels: int = 16                          # the d of Sec. 5.2.1
    channels: tuple[int, ...] = (128, 256, 512, 512)   # one number for each resolution
    norm_groups: int = 32                              # groups of every norm
    vae_scale: float = 1.5305                          # latent = (code - vae_shift) * vae_scale
    vae_shift: float = 0.0609                          # released numbers; ours are measured

    @property
    def downsampling(self):                            # the f of Sec. 5.2.1: 8
        return 2 ** (len(self.channels) - 1)


def normalize(code, config):
    """Raw code -> latent of about unit variance, by one global mean and deviation (App. B.2)."""
    return (code - config.vae_shift) * config.vae_scale


def denormalize(latent, config):
    """The inverse of `normalize`."""
    return latent / config.vae_scale + config.vae_shift


def sample_code(mean, logvar, noise=None):
    """mean + std * noise, or the mean alone without noise. All are (B, C, H, W)."""
    if noise is None:
        return mean
    return mean + torch.exp(0.5 * logvar) * noise


# ---- Encoder and decoder -------------------------------------------------------------------------
def group_norm(channels, groups):
    """Group normalisation with the released epsilon, which is not torch's."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


def conv3(in_channels, out_channels):
    """3x3 convolution that keeps the resolution."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


class ResnetBlock(nn.Module):
    """(B, in, H, W) -> (B, out, H, W): norm, SiLU, convolution, twice, plus the input."""
    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = conv3(in_channels, out_channels)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = conv3(out_channels, out_channels)
        self.nin_shortcut = nn.Identity()
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Self-attention with one head over all positions. (B, D, H, W) -> (B, D, H, W)."""
    def __init__(self, channels, groups):
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        h = self.norm(x)
        head = []
        for conv in (self.q, self.k, self.v):
            tokens = conv(h).flatten(2).transpose(1, 2)               # (B, HW, D)
            head.append(tokens.unsqueeze(1).contiguous())             # (B, 1, HW, D)
        h = F.scaled_dot_product_attention(*head).squeeze(1)          # (B, HW, D)
        h = h.transpose(1, 2).unflatten(2, x.shape[2:])               # (B, D, H, W)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """(B, D, H, W) -> (B, D, H/2, W/2). Pads one row below and one column to the right only."""
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """(B, D, H, W) -> (B, D, 2H, 2W): repeats pixels, then a convolution."""
    def __init__(self, channels):
        super().__init__()
        self.conv = conv3(channels, channels)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def make_level(in_channels, out_channels, num_blocks, groups):
    """The residual blocks of one resolution. What changes the resolution is added behind them."""
    blocks = []
    for _ in range(num_blocks):
        blocks.append(ResnetBlock(in_channels, out_channels, groups))
        in_channels = out_channels
    return nn.Sequential(OrderedDict(block=nn.Sequential(*blocks)))


def make_middle(channels, groups):
    """Residual block, attention, residual block at the lowest resolution."""
    return nn.Sequential(OrderedDict(block_1=ResnetBlock(channels, channels, groups),
                                     attn_1=AttnBlock(channels, groups),
                                     block_2=ResnetBlock(channels, channels, groups)))


class Encoder(nn.Module):
    """image (B, 3, 8H, 8W) -> moments (B, 2C, H, W). A level has two residual blocks."""
    def __init__(self, config):
        super().__init__()
        groups = config.norm_groups
        width = config.channels[0]
        self.conv_in = conv3(3, width)
        self.down = nn.Sequential()
        for i, channels in enumerate(config.channels):
            level = make_level(width, channels, 2, groups)
            if i < len(config.channels) - 1:
                level.add_module("downsample", Downsample(channels))
            self.down.append(level)
            width = channels
        self.mid = make_middle(width, groups)
        self.norm_out = group_norm(width, groups)
        self.conv_out = conv3(width, 2 * config.latent_channels)

    def forward(self, image):
        x = self.mid(self.down(self.conv_in(image)))                  # (B, D, H, W)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """code (B, C, H, W) -> image (B, 3, 8H, 8W), not clamped. A level has three residual blocks.

    up[0] is the full resolution, so the levels run from the last to the first.
    """
    def __init__(self, config):
        super().__init__()
        groups = config.norm_groups
        width = config.channels[-1]
        self.conv_in = conv3(config.latent_channels, width)
        self.mid = make_middle(width, groups)
        self.up = nn.ModuleList()
        for i in reversed(range(len(config.channels))):
            level = make_level(width, config.channels[i], 3, groups)
            width = config.channels[i]
            if i > 0:
                level.add_module("upsample", Upsample(width))
            self.up.insert(0, level)
        self.norm_out = group_norm(width, groups)
        self.conv_out = conv3(width, 3)

    def forward(self, code):
        x = self.mid(self.conv_in(code))                              # (B, D, H, W)
        for level in reversed(self.up):
            x = level(x)                                              # at last (B, D, 8H, 8W)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    """The autoencoder: x = E(X) and X = D(x) of Sec. 5.2.1, with a Gaussian code."""
    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode_moments(self, image):
        """image (B, 3, 8H, 8W) in [-1, 1] -> mean and logvar, (B, C, H, W) each."""
        f = self.config.downsampling
        height, width = image.shape[-2:]
        if height % f or width % f:
            raise ValueError(f"image is {height}x{width} px but the autoencoder works in steps of "
                             f"{f}; resize or crop both sides to multiples of {f}")
        mean, logvar = self.encoder(image).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, image, rng=None):
        """image -> latent (B, C, H, W) of the mean code. With a Generator the code is sampled."""
        mean, logvar = self.encode_moments(image)
        noise = None if rng is None else torch.randn(mean.shape, generator=rng).to(mean)
        return self.normalize(sample_code(mean, logvar, noise))

    def decode(self, latent):
        """latent (B, C, H, W) -> image (B, 3, 8H, 8W), in about [-1, 1], not clamped."""
        return self.decoder(self.denormalize(latent))

    def normalize(self, code):
        return normalize(code, self.config)

    def denormalize(self, latent):
        return denormalize(latent, self.config)


# ---- Training losses (Rombach et al. 2022, App. G); every one is a mean, a scalar ----------------
def kl_loss(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, I)) per number of the code."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def reconstruction_loss(image, reconstruction):
    """Mean absolute difference."""
    return (reconstruction - image).abs().mean()


def perceptual_loss(image, reconstruction, features):
    """Distance of deep features, in the way of LPIPS (Zhang et al. 2018).

    features maps images (B, 3, H, W) to a list of maps (B, D, h, w) or sequences (B, n, D). Each
    feature vector is scaled to unit length, so that every layer counts alike.
    """
    total = 0.0
    for real, fake in zip(features(image), features(reconstruction)):
        axis = 1 if real.dim() == 4 else -1
        difference = F.normalize(real, dim=axis) - F.normalize(fake, dim=axis)
        total = total + difference.square().sum(axis).mean()
    return total


class PatchDiscriminator(nn.Sequential):
    """Does a patch look real (Isola et al. 2017)? image (B, 3, H, W) -> logits (B, 1, H/8, W/8)."""
    def __init__(self, channels=64, groups=32):
        super().__init__(nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2))
        for width in (channels, 2 * channels):
            self.append(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1))
            self.append(group_norm(2 * width, groups))
            self.append(nn.LeakyReLU(0.2))
        self.append(conv3(4 * channels, 1))


def discriminator_hinge_loss(real_logits, fake_logits):
    """What the discriminator minimises: real above 1, fake below -1."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def generator_hinge_loss(fake_logits):
    """What the decoder minimises: reconstructions are to be taken for real."""
    return -fake_logits.mean()


def adaptive_gan_weight(fidelity, gan, last_layer, largest=1e4):
    """|d fidelity / d last_layer| / |d gan / d last_layer|, in [0, largest] (VQGAN, Eq. 7).

    With this weight neither term drowns the other. last_layer: the decoder's conv_out.weight.
    """
    (by_fidelity,) = torch.autograd.grad(fidelity, last_layer, retain_graph=True)
    (by_gan,) = torch.autograd.grad(gan, last_layer, retain_graph=True)
    return (by_fidelity.norm() / (by_gan.norm() + 1e-4)).clamp(0, largest).detach()


@dataclass(frozen=True)
class VAELossConfig:
    """Weights of the objective. They do not depend on the picture size."""
    kl_weight: float = 2e-4
    perceptual_weight: float = 0.0          # needs a feature network
    gan_weight: float = 0.0                 # times the adaptive weight; needs a discriminator


def vae_loss(vae, image, noise, config=VAELossConfig(), features=None, discriminator=None):
    """The objective on one batch. image (B, 3, 8H, 8W); noise (B, C, H, W), standard normal.

    Returns (loss, terms, reconstruction). terms has a detached scalar for each name.
    """
    mean, logvar = vae.encode_moments(image)
    reconstruction = vae.decoder(sample_code(mean, logvar, noise))
    fidelity = reconstruction_loss(image, reconstruction)
    terms = {"reconstruction": fidelity.detach()}
    if config.perceptual_weight:
        perceptual = perceptual_loss(image, reconstruction, features)
        terms["perceptual"] = perceptual.detach()
        fidelity = fidelity + config.perceptual_weight * perceptual
    kl = kl_loss(mean.float(), logvar.float())
    terms["kl"] = kl.detach()
    loss = fidelity + config.kl_weight * kl
    if config.gan_weight:
        gan = generator_hinge_loss(discriminator(reconstruction))
        terms["gan"] = gan.detach()
        balance = adaptive_gan_weight(fidelity, gan, vae.decoder.conv_out.weight)
        loss = loss + config.gan_weight * balance * gan
    return loss, terms, reconstruction


# ---- The measures of Table 3; images are in [-1, 1], and a number belongs to one picture ---------
def psnr(image, reconstruction):
    """Peak signal-to-noise ratio in dB: (B,). The reconstruction is clamped."""
    difference = (image - reconstruction.clamp(-1, 1)) / 2                # in units of [0, 1]
    return -10 * torch.log10(difference.square().mean(dim=(1, 2, 3)).clamp_min(1e-10))


def ssim(image, reconstruction):
    """Structural similarity (Wang et al. 2004): (B,). The reconstruction is clamped.

    Every channel is compared in all 11x11 windows of the picture, with Gaussian weights.
    """
    x = (image.double() + 1) / 2                                          # (B, 3, H, W) in [0, 1]
    y = (reconstruction.double().clamp(-1, 1) + 1) / 2                    # flat areas need float64
    weights = torch.exp(-(torch.arange(11) - 5).square() / (2 * 1.5**2)).to(x)
    window = torch.outer(weights, weights) / weights.sum().square()       # (11, 11), its sum is 1
    window = window.expand(x.shape[1], 1, 11, 11)

    def local_mean(values):
        return F.conv2d(values, window, groups=len(window))               # (B, 3, H - 10, W - 10)

    mean_x, mean_y = local_mean(x), local_mean(y)
    var_x = local_mean(x * x) - mean_x.square()
    var_y = local_mean(y * y) - mean_y.square()
    covariance = local_mean(x * y) - mean_x * mean_y
    brightness = (2 * mean_x * mean_y + 0.01**2) / (mean_x.square() + mean_y.square() + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (var_x + var_y + 0.03**2)
    return (brightness * structure).mean(dim=(1, 2, 3)).float()


def main():
    """Print the latents of Table 3's sizes, and what PSNR and SSIM say of damaged pictures."""
    for latent_channels in (4, 8, 16):
        with torch.device("meta"):                                        # shapes without numbers
            vae = VAE(VAEConfig(latent_channels))
            latent = vae.encode(torch.zeros(1, 3, 256, 256))
        print(f"256x256 px -> latent {tuple(latent.shape)}, "
              f"{3 * 256**2 / latent.numel():.0f} times fewer numbers")
    line = torch.linspace(-12, 12, 256)
    image = 0.6 * torch.sin(line[:, None] * line / 12).expand(1, 3, 256, 256)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    damages = {"brighter": image + 0.2, "noisy": image + 0.2 * noise, "moved": image.roll(4, 3)}
    for name, damaged in damages.items():
        decibels, similarity = psnr(image, damaged).item(), ssim(image, damaged).item()
        print(f"{name:8} PSNR {decibels:.2f} dB   SSIM {similarity:.3f}")


if __name__ == "__main__":
    main()
