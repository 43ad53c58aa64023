"""vae.py: the f = 8 autoencoder, image <-> latent (SD3, arXiv:2403.03206v1, Sec. 5.2.1, App. B.2; LDM for the losses).

Read with   Sec. 5.2.1 and Table 3 (4, 8 or 16 latent channels), App. B.2 (latents are normalised by one mean and one std)
Not here    files and key renaming (checkpoints.py), data (data.py), the training loop (experiments/pretrain_tiny.py)
Shapes      image (B, 3, 8H, 8W) in [-1, 1]    moments (B, 2C, H, W) = mean and log-variance    latent (B, C, H, W)
            B batch   C latent channels   H W latent height, width
Names       parameters are called as in the released SD3 files (encoder.down.0.block.0.conv1, ...)
Run         python vae.py photo.jpg     reconstructs a picture with the shipped weights and prints its PSNR
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the autoencoder (Sec. 5.2.1). The defaults are SD3's: 83.8 M parameters, 16 channels."""
    latent_channels: int = 16                      # the d of Sec. 5.2.1; Table 3 compares 4, 8 and 16
    channels: tuple[int, ...] = (128, 256, 512, 512)   # per resolution level; each level but the last halves the image
    norm_groups: int = 32                          # of every group norm; released files always have 32
    vae_scale: float = 1.5305                      # latent = (code - vae_shift) * vae_scale
    vae_shift: float = 0.0609                      # SD3's own numbers; a model trained here stores what it measured

    @property
    def downsampling(self) -> int:                 # the f of Sec. 5.2.1, pixels per latent position and side: 8
        return 2 ** (len(self.channels) - 1)


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Group normalisation with the released epsilon (torch's default is 1e-5)."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """(B, in, H, W) -> (B, out, H, W): norm, SiLU, conv, twice, plus the input."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class AttnBlock(nn.Module):
    """One-head self-attention over all positions, in the middle of encoder and decoder. (B, D, H, W) -> the same."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2).contiguous() for conv in (self.q, self.k, self.v))    # (B, HW, D); fused
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]                        # kernels want D dense
        return x + self.proj_out(h.transpose(1, 2).unflatten(2, x.shape[2:]))    # (B, D, H, W)


class Downsample(nn.Module):
    """(B, D, H, W) -> (B, D, H/2, W/2). Pads one row below and one column to the right only, as the released model."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """(B, D, H, W) -> (B, D, 2H, 2W): repeat pixels, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """One resolution: its residual blocks, and the change of resolution that ends it (absent at the last level)."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int, groups: int, resample: str = ""):
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(num_blocks))
        if resample:                                                             # "downsample" or "upsample"
            self.add_module(resample, (Downsample if resample == "downsample" else Upsample)(out_channels))
        self.resample = resample

    def forward(self, x):
        for block in self.block:
            x = block(x)
        return getattr(self, self.resample)(x) if self.resample else x


class Encoder(nn.Module):
    """image (B, 3, 8H, 8W) -> moments (B, 2C, H, W). Two residual blocks a level."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups, last = config.channels, config.norm_groups, len(config.channels) - 1
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.down = nn.ModuleList(
            Level(channels[max(i - 1, 0)], channels[i], 2, groups, "downsample" if i < last else "")
            for i in range(len(channels)))
        self.mid = Middle(channels[-1], groups)
        self.norm_out = group_norm(channels[-1], groups)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, image):
        x = self.conv_in(image)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """code (B, C, H, W) -> image (B, 3, 8H, 8W), not clamped. Three residual blocks a level.

    `up[0]` is the full resolution, so the levels run from the last to the first.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        channels, groups, last = config.channels, config.norm_groups, len(config.channels) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, channels[-1], 3, padding=1)
        self.mid = Middle(channels[-1], groups)
        self.up = nn.ModuleList(
            Level(channels[min(i + 1, last)], channels[i], 3, groups, "upsample" if i > 0 else "")
            for i in range(len(channels)))
        self.norm_out = group_norm(channels[0], groups)
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def forward(self, code):
        x = self.mid(self.conv_in(code))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VAE(nn.Module):
    """The autoencoder: x = E(X) and X = D(x) of Sec. 5.2.1, with a Gaussian code (Kingma & Welling 2013)."""

    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode_moments(self, image):
        """image (B, 3, 8H, 8W) in [-1, 1] -> (mean, logvar), each (B, C, H, W); logvar is clamped to [-30, 20]."""
        f, (height, width) = self.config.downsampling, image.shape[-2:]
        if height % f or width % f:
            raise ValueError(f"image is {height}x{width} px but the autoencoder works in steps of {f}. "
                             f"Resize or crop both sides to multiples of {f} (16 for MM-DiT, patch size 2).")
        mean, logvar = self.encoder(image).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, image, rng: torch.Generator | None = None):
        """image -> normalised latent (B, C, H, W). With `rng` the code is sampled, without it is the mean."""
        mean, logvar = self.encode_moments(image)
        noise = None if rng is None else torch.randn(mean.shape, generator=rng).to(mean)
        return self.normalize(sample_code(mean, logvar, noise))

    def decode(self, latent, tile: int = 0):
        """normalised latent (B, C, H, W) -> image (B, 3, 8H, 8W), about [-1, 1], not clamped. tile: see `decode_in_tiles`."""
        code = self.denormalize(latent)
        return decode_in_tiles(self.decoder, code, tile) if tile else self.decoder(code)

    def normalize(self, code):
        """Raw code -> latent of about unit variance, by one global mean and standard deviation (App. B.2)."""
        return (code - self.config.vae_shift) * self.config.vae_scale

    def denormalize(self, latent):
        """The inverse of `normalize`."""
        return latent / self.config.vae_scale + self.config.vae_shift


def sample_code(mean, logvar, noise=None):
    """mean + std * noise; the mean alone where `noise` is None."""
    return mean if noise is None else mean + torch.exp(0.5 * logvar) * noise


# ------------------------------------------------------------------------------------------------------------
# Decoding in tiles: the same picture to rounding, with one tile at a time on the device
# ------------------------------------------------------------------------------------------------------------

def group_sums(x, groups: int):
    """What group norm needs of a part x (B, D, h, w): sum and sum of squares of every group, (2, B, groups) float64."""
    x = x.float().unflatten(1, (groups, -1)).flatten(2)                           # (B, groups, D / groups * h * w)
    return torch.stack([x.sum(2, dtype=torch.float64), x.square().sum(2, dtype=torch.float64)])


def normalize_part(norm: nn.GroupNorm, x, mean, square):
    """Group norm and SiLU of a part x (B, D, h, w), with mean and mean square (B, groups) of the whole."""
    x, std = x.float(), (square - mean.square() + norm.eps).sqrt()
    mean, std = (v.repeat_interleave(x.shape[1] // v.shape[1], dim=1)[:, :, None, None].to(x) for v in (mean, std))
    return F.silu((x - mean) / std * norm.weight[:, None, None] + norm.bias[:, None, None])


def decode_tile(decoder: Decoder, x, device):
    """Decoder.forward after the middle for a part x (B, D, h, w), as a coroutine: before every group norm it yields (norm,
    input) and is sent the mean and mean square of the whole picture; at last it yields (None, image). Waits on the CPU."""
    normalize = lambda norm, x, moments: normalize_part(norm, x.to(device), *moments)
    for level in reversed(decoder.up):
        for block in level.block:
            h = block.conv1(normalize(block.norm1, x, (yield block.norm1, x))).cpu()
            h = block.conv2(normalize(block.norm2, h, (yield block.norm2, h)))
            x = x.to(device)
            x = ((x if block.nin_shortcut is None else block.nin_shortcut(x)) + h).cpu()
            del h
        if level.resample:
            x = level.upsample(x.to(device)).cpu()
    yield None, decoder.conv_out(normalize(decoder.norm_out, x, (yield decoder.norm_out, x))).cpu()


def decode_in_tiles(decoder: Decoder, code, tile: int):
    """Decoder.forward for code (B, C, H, W), in tiles of tile x tile pixels: image (B, 3, 8H, 8W) on the CPU, without seams.

    Attention is in the middle only, where everything is small: that is computed whole. The levels after it run on tiles that
    are wider than they have to be by as much as convolutions see, in step, so that every group norm gets the moments of the
    whole picture. Blending tiles that each norm themselves would leave each with its own contrast.
    """
    levels, device = len(decoder.up), code.device
    side = tile // 2 ** (levels - 1)
    if side < 1 or tile % 2 ** (levels - 1):
        raise ValueError(f"tile is {tile} px; give a positive multiple of {2 ** (levels - 1)}, say 512")
    x = decoder.mid(decoder.conv_in(code))                                        # (B, D, H, W)
    H, W = x.shape[-2:]
    margin = 14        # 6 convolutions at 8 px a position, 7 each at 4, 2 and 1, and one: 6 + 7/2 + 7/4 + 7/8 + 1/8 = 12.25
    tiles, bounds = [], []
    for top in range(0, H, side):
        for left in range(0, W, side):
            above, before = min(top, margin), min(left, margin)                   # how much of the part is margin
            part = x[:, :, top - above : top + side + margin, left - before : left + side + margin].cpu()
            tiles.append(decode_tile(decoder, part, device))
            bounds.append((above, above + min(side, H - top), before, before + min(side, W - left), part.shape[3]))

    def without_margin(part, top, bottom, left, right, width):
        k = part.shape[3] // width                                                # 1 at latent resolution, at last 8
        return part[:, :, k * top : k * bottom, k * left : k * right]

    steps = [next(tile) for tile in tiles]
    while (norm := steps[0][0]) is not None:
        parts = [without_margin(part, *bound) for (_, part), bound in zip(steps, bounds)]
        numbers = sum(part[0].numel() for part in parts) / norm.num_groups        # in one group of one picture
        moments = sum(group_sums(part, norm.num_groups) for part in parts) / numbers
        steps = [tile.send(moments) for tile in tiles]
    images = [without_margin(image, *bound) for (_, image), bound in zip(steps, bounds)]
    columns = math.ceil(W / side)
    return torch.cat([torch.cat(images[i : i + columns], dim=3) for i in range(0, len(images), columns)], dim=2)


# ------------------------------------------------------------------------------------------------------------
# Training losses (Rombach et al. 2022, App. G; Esser et al. 2021 for the adaptive weight)
# ------------------------------------------------------------------------------------------------------------

def kl_loss(mean, logvar):
    """KL(N(mean, exp(logvar)) || N(0, I)) per code number, averaged: a scalar. Zero if mean = logvar = 0."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def reconstruction_loss(image, reconstruction, norm: str = "l1"):
    """Mean absolute ("l1") or mean squared ("l2") difference: a scalar."""
    if norm not in ("l1", "l2"):
        raise ValueError(f"reconstruction norm is {norm!r}; choose 'l1' or 'l2'")
    difference = reconstruction - image
    return difference.abs().mean() if norm == "l1" else difference.square().mean()


def perceptual_loss(image, reconstruction, features):
    """Distance of deep features, in the way of LPIPS (Zhang et al. 2018): a scalar.

    `features` maps images (B, 3, H, W) to a list of maps (B, D, h, w) or token sequences (B, n, D): any frozen network.
    Maps are normalised to unit length along their channels, so every layer counts alike.
    """
    total = 0.0
    for real, fake in zip(features(image), features(reconstruction)):
        channel_axis = 1 if real.dim() == 4 else -1
        real, fake = F.normalize(real, dim=channel_axis), F.normalize(fake, dim=channel_axis)
        total = total + (real - fake).square().sum(channel_axis).mean()
    return total


class PatchDiscriminator(nn.Module):
    """Says for every patch whether it looks real (Isola et al. 2017): image (B, 3, H, W) -> logits (B, 1, H/8, W/8)."""

    def __init__(self, channels: int = 64, num_downsamplings: int = 3, groups: int = 32):
        super().__init__()
        layers = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for _ in range(num_downsamplings - 1):
            layers += [nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1),
                       group_norm(2 * channels, groups), nn.LeakyReLU(0.2)]
            channels *= 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, image):
        return self.layers(image)


def discriminator_hinge_loss(real_logits, fake_logits):
    """What the discriminator minimises: real above 1, fake below -1."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def generator_hinge_loss(fake_logits):
    """What the decoder minimises: reconstructions that the discriminator takes for real."""
    return -fake_logits.mean()


def adaptive_gan_weight(reconstruction_term, gan_term, last_layer, largest: float = 1e4):
    """|d reconstruction / d last layer| / |d GAN / d last layer|, so that neither drowns the other (VQGAN, Eq. 7).

    last_layer: the decoder's `conv_out.weight`. Returns a detached scalar in [0, largest].
    """
    by_reconstruction, = torch.autograd.grad(reconstruction_term, last_layer, retain_graph=True)
    by_gan, = torch.autograd.grad(gan_term, last_layer, retain_graph=True)
    return (by_reconstruction.norm() / (by_gan.norm() + 1e-4)).clamp(0, largest).detach()


@dataclass(frozen=True)
class VAELossConfig:
    """Weights of the training objective. Every term is a mean, so the weights do not depend on the picture size."""
    norm: str = "l1"
    kl_weight: float = 2e-4
    perceptual_weight: float = 0.0          # needs a feature network
    gan_weight: float = 0.0                 # times the adaptive weight; needs a discriminator


def vae_loss(vae, image, noise, config=VAELossConfig(), features=None, discriminator=None):
    """The autoencoder's objective on one batch. image (B, 3, 8H, 8W); noise (B, C, H, W), standard normal.

    Returns (loss, terms, reconstruction): `terms` maps names to detached scalars for the log.
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


def psnr(image, reconstruction):
    """Peak signal-to-noise ratio per picture in dB, of images in [-1, 1] (clamped): (B,). The unit of Table 3."""
    error = (image - reconstruction.clamp(-1, 1)).square().mean(dim=(1, 2, 3)) / 4      # to the range [0, 1]
    return -10 * torch.log10(error.clamp_min(1e-10))


def main():
    """Reconstruct one picture with the shipped autoencoder: original beside reconstruction, and the PSNR."""
    import argparse
    import sys

    from checkpoints import load_components
    from data import from_tensor, read_image, resize_and_crop, to_tensor

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("picture")
    parser.add_argument("--checkpoint", default="pretrained/tiny", help="any checkpoint that holds an autoencoder")
    parser.add_argument("--out", default="reconstruction.png")
    options = parser.parse_args()
    try:
        vae = load_components(options.checkpoint, ("vae",)).vae
        picture = read_image(options.picture)
    except ValueError as problem:                                                # CheckpointError and UnreadableImage
        sys.exit(f"vae.py: {problem}")
    step = vae.config.downsampling
    picture = resize_and_crop(picture, max(step, picture.height // step * step), max(step, picture.width // step * step))
    image = to_tensor(picture)[None]
    with torch.no_grad():
        latent = vae.encode(image)
        reconstruction = vae.decode(latent)
    from_tensor(torch.cat([image, reconstruction], dim=3)[0]).save(options.out)
    print(f"{options.picture}: {image.shape[3]}x{image.shape[2]} px -> latent {tuple(latent.shape[1:])}, "
          f"std {latent.std():.2f}; PSNR {psnr(image, reconstruction).item():.2f} dB; both are in {options.out}")


if __name__ == "__main__":
    main()
