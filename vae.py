"""vae.py: the f = 8 autoencoder, image <-> latent (SD3, arXiv:2403.03206v1).

Read with   Sec. 5.2.1 and Table 3 (4, 8 or 16 latent channels), App. B.2 (normalised latents);
            Rombach et al. 2022 for the losses
Not here    files (checkpoints.py), pictures (data.py)
Shapes      B batch   C latent channels   H W latent height, width   D channels inside the network
            image (B, 3, 8H, 8W) in [-1, 1]   latent (B, C, H, W)
            moments (B, 2C, H, W): the mean and the log-variance of the code
Names       Parameters are called as in the released SD3 files.
Run         python vae.py     Table 3 in small: trains with 1, 4 and 16 channels on drawn pictures
"""

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder (Sec. 5.2.1). The defaults are SD3's: 83.8 M parameters."""
    latent_channels: int = 16                          # the d of Sec. 5.2.1
    channels: tuple[int, ...] = (128, 256, 512, 512)   # one number for each resolution
    norm_groups: int = 32                              # of every group norm
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


class ResnetBlock(nn.Module):
    """(B, in, H, W) -> (B, out, H, W): norm, SiLU, convolution, twice, plus the input."""

    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = None
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if self.nin_shortcut is not None:
            x = self.nin_shortcut(x)
        return x + h


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
        heads = []
        for conv in (self.q, self.k, self.v):
            tokens = conv(h).flatten(2).transpose(1, 2)           # (B, HW, D)
            heads.append(tokens.unsqueeze(1).contiguous())        # (B, 1, HW, D), as fused kernels want
        h = F.scaled_dot_product_attention(*heads).squeeze(1)     # (B, HW, D)
        h = h.transpose(1, 2).unflatten(2, x.shape[2:])           # (B, D, H, W)
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
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels, groups):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution. A change of resolution may follow."""

    def __init__(self, in_channels, out_channels, num_blocks, groups):
        super().__init__()
        self.block = nn.ModuleList()
        for _ in range(num_blocks):
            self.block.append(ResnetBlock(in_channels, out_channels, groups))
            in_channels = out_channels
        self.downsample = None
        self.upsample = None

    def forward(self, x):
        for block in self.block:
            x = block(x)
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:
            x = self.upsample(x)
        return x


class Encoder(nn.Module):
    """image (B, 3, 8H, 8W) -> moments (B, 2C, H, W). A level has two residual blocks."""

    def __init__(self, config):
        super().__init__()
        groups, width = config.norm_groups, config.channels[0]
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList()
        for channels in config.channels:
            level = Level(width, channels, 2, groups)
            level.downsample = Downsample(channels)
            self.down.append(level)
            width = channels
        self.down[-1].downsample = None
        self.mid = Middle(width, groups)
        self.norm_out = group_norm(width, groups)
        self.conv_out = nn.Conv2d(width, 2 * config.latent_channels, 3, padding=1)

    def forward(self, image):
        x = self.conv_in(image)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """code (B, C, H, W) -> image (B, 3, 8H, 8W), not clamped. A level has three residual blocks.

    up[0] is the full resolution, so the levels run from the last to the first.
    """

    def __init__(self, config):
        super().__init__()
        groups, width = config.norm_groups, config.channels[-1]
        self.conv_in = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.mid = Middle(width, groups)
        self.up = nn.ModuleList()
        for channels in reversed(config.channels):
            level = Level(width, channels, 3, groups)
            level.upsample = Upsample(channels)
            self.up.insert(0, level)
            width = channels
        self.up[0].upsample = None
        self.norm_out = group_norm(width, groups)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, code):
        x = self.mid(self.conv_in(code))
        for level in reversed(self.up):
            x = level(x)
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
        """image -> latent (B, C, H, W): the mean, or with a torch.Generator a sample of the code."""
        mean, logvar = self.encode_moments(image)
        noise = None
        if rng is not None:
            noise = torch.randn(mean.shape, generator=rng).to(mean)
        return self.normalize(sample_code(mean, logvar, noise))

    def decode(self, latent):
        """latent (B, C, H, W) -> image (B, 3, 8H, 8W), in about [-1, 1], not clamped."""
        return self.decoder(self.denormalize(latent))

    def normalize(self, code):
        return normalize(code, self.config)

    def denormalize(self, latent):
        return denormalize(latent, self.config)


# ---- Training losses (Rombach et al. 2022, App. G) -----------------------------------------------


def kl_loss(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, I)) per number of the code, averaged: a scalar."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def reconstruction_loss(image, reconstruction, norm="l1"):
    """Mean absolute ("l1") or mean squared ("l2") difference: a scalar."""
    if norm == "l1":
        return (reconstruction - image).abs().mean()
    if norm == "l2":
        return (reconstruction - image).square().mean()
    raise ValueError(f"reconstruction norm is {norm!r}; choose 'l1' or 'l2'")


def perceptual_loss(image, reconstruction, features):
    """Distance of deep features, in the way of LPIPS (Zhang et al. 2018): a scalar.

    features maps images (B, 3, H, W) to a list of maps (B, D, h, w) or sequences (B, n, D). Each
    feature vector is scaled to unit length, so that every layer counts alike.
    """
    total = 0.0
    for real, fake in zip(features(image), features(reconstruction)):
        channel_axis = 1 if real.dim() == 4 else -1
        real = F.normalize(real, dim=channel_axis)
        fake = F.normalize(fake, dim=channel_axis)
        total = total + (real - fake).square().sum(channel_axis).mean()
    return total


class PatchDiscriminator(nn.Module):
    """Does a patch look real (Isola et al. 2017)? image (B, 3, H, W) -> logits (B, 1, H/8, W/8)."""

    def __init__(self, channels=64, num_downsamplings=3, groups=32):
        super().__init__()
        layers = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for _ in range(num_downsamplings - 1):
            layers.append(nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1))
            layers.append(group_norm(2 * channels, groups))
            layers.append(nn.LeakyReLU(0.2))
            channels = 2 * channels
        layers.append(nn.Conv2d(channels, 1, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, image):
        return self.layers(image)


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
    """Weights of the objective. Every term is a mean, so they do not depend on the picture size."""
    norm: str = "l1"
    kl_weight: float = 2e-4
    perceptual_weight: float = 0.0          # needs a feature network
    gan_weight: float = 0.0                 # times the adaptive weight; needs a discriminator


def vae_loss(vae, image, noise, config=VAELossConfig(), features=None, discriminator=None):
    """The objective on one batch. image (B, 3, 8H, 8W); noise (B, C, H, W), standard normal.

    Returns (loss, terms, reconstruction). terms has a detached scalar for each name.
    """
    mean, logvar = vae.encode_moments(image)
    reconstruction = vae.decoder(sample_code(mean, logvar, noise))
    terms = {"reconstruction": reconstruction_loss(image, reconstruction, config.norm)}
    fidelity = terms["reconstruction"]
    if config.perceptual_weight:
        terms["perceptual"] = perceptual_loss(image, reconstruction, features)
        fidelity = fidelity + config.perceptual_weight * terms["perceptual"]
    terms["kl"] = kl_loss(mean.float(), logvar.float())
    loss = fidelity + config.kl_weight * terms["kl"]
    if config.gan_weight:
        terms["gan"] = generator_hinge_loss(discriminator(reconstruction))
        balance = adaptive_gan_weight(fidelity, terms["gan"], vae.decoder.conv_out.weight)
        loss = loss + config.gan_weight * balance * terms["gan"]
    return loss, {name: value.detach() for name, value in terms.items()}, reconstruction


# ---- The measures of Table 3, for each picture by itself -----------------------------------------


def psnr(image, reconstruction):
    """Peak signal-to-noise ratio in dB of images in [-1, 1] (clamped): (B,)."""
    difference = (image - reconstruction.clamp(-1, 1)) / 2                # in units of [0, 1]
    error = difference.square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error.clamp_min(1e-10))


def ssim(image, reconstruction):
    """Structural similarity (Wang et al. 2004) of images (B, 3, H, W) in [-1, 1] (clamped): (B,).

    Each channel is compared in 11x11 windows with Gaussian weights, wherever a window fits.
    """
    if min(image.shape[-2:]) < 11:
        raise ValueError(f"images are {image.shape[-2]}x{image.shape[-1]} px; ssim needs 11x11")
    x = (image.float() + 1) / 2                                           # in [0, 1]
    y = (reconstruction.float().clamp(-1, 1) + 1) / 2
    weights = torch.exp(-(torch.arange(11.0) - 5).square() / (2 * 1.5**2)).to(x)
    window = torch.outer(weights, weights) / weights.sum().square()       # (11, 11), sums to 1
    channels = x.shape[1]
    window = window.expand(channels, 1, 11, 11)

    def local_mean(values):
        return F.conv2d(values, window, groups=channels)                  # (B, 3, H - 10, W - 10)

    mean_x, mean_y = local_mean(x), local_mean(y)
    var_x = local_mean(x * x) - mean_x.square()
    var_y = local_mean(y * y) - mean_y.square()
    covariance = local_mean(x * y) - mean_x * mean_y
    brightness = (2 * mean_x * mean_y + 0.01**2) / (mean_x.square() + mean_y.square() + 0.01**2)
    structure = (2 * covariance + 0.03**2) / (var_x + var_y + 0.03**2)
    return (brightness * structure).mean(dim=(1, 2, 3))


def main():
    """Table 3 in small: more latent channels reconstruct better."""


if __name__ == "__main__":
    main()
