"""table3_fig10_autoencoders.py: how well do latents of 4, 8 and 16 channels keep a picture?

SD3, Sec. 5.2.1, Table 3. For each number of channels an autoencoder is trained on drawn scenes with
all else equal, and measured on scenes that it has not seen: FID and perceptual similarity on the
features of the CLIP that ships (the paper has others, so compare the order), SSIM and PSNR. --gan 1
adds the adversary of Rombach et al. 2022. Fig. 10 trains MM-DiTs of several depths on such
latents: `train.py --encoders` takes each of these autoencoders; no figure of ours is there yet.

Given pictures, the autoencoder of a checkpoint is measured on them instead, and the originals stand
beside their reconstructions in --picture.

Run   python experiments/table3_fig10_autoencoders.py             three small autoencoders
      python experiments/table3_fig10_autoencoders.py --quick     twenty steps each
      python experiments/table3_fig10_autoencoders.py photo.jpg   the autoencoder that ships
"""

import argparse
import json
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from checkpoints import (
    SHIPPED, add_options, check_options, given_options, load_components, option, write_atomically)
from data import from_tensor, read_image, resize_and_crop, to_tensor
from devices import command
from evaluate import frechet_distance, load_image_tower, psnr
from scenes import HELD_OUT_SEED, Scenes
from train import Run, TrainConfig, fit
from vae import VAE, VAEConfig, VAELossConfig, group_norm, perceptual_loss, vae_loss

PAPER = {4: (2.41, 0.85, 0.75, 25.12), 8: (1.56, 0.68, 0.79, 26.40), 16: (1.06, 0.45, 0.86, 28.62)}
MEASURES = ("fid", "perceptual", "ssim", "psnr")                      # the columns of PAPER


@dataclass(frozen=True)
class Options:
    checkpoint: str = option(str(SHIPPED), "whose autoencoder reconstructs the given pictures")
    picture: str = option("reconstruction.png", "originals beside reconstructions, if pictures are")
    channels: tuple[int, ...] = option((4, 8, 16), "latent channels to compare", 1, 256)
    steps: int = option(2000, "training steps of each autoencoder", 1, 10**8)
    batch_size: int = option(16, "pictures in a step", 1, 4096)
    gan: float = option(0.0, "weight of the adversary, times its adaptive weight", 0.0, 1e3)
    num_test: int = option(512, "held-out scenes to measure on", 2, 10**6)
    seed: int = option(0, "of weights, scenes and noise", 0, 2**31)
    quick: bool = option(False, "20 steps and 32 scenes: shows that it runs")
    out: str = option(str(ROOT / "results" / "table3_autoencoders.json"), "where the numbers go")

    def __post_init__(self):
        check_options(self)


# ---- The adversary (Rombach et al. 2022, App. G) -------------------------------------------------

class PatchDiscriminator(nn.Sequential):
    """Does a patch look real (Isola et al. 2017)? image (B, 3, H, W) -> logits (B, 1, H/8, W/8)."""

    def __init__(self, channels=64, groups=32):
        super().__init__(nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2))
        for width in (channels, 2 * channels):
            self.append(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1))
            self.append(group_norm(2 * width, groups))
            self.append(nn.LeakyReLU(0.2))
        self.append(nn.Conv2d(4 * channels, 1, 3, padding=1))


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


class Objective:
    """The loss that is handed to fit: L1, KL and perceptual, and with `gan` the adversary, which
    takes a step of its own for each batch."""

    def __init__(self, features, gan=0.0, discriminator=None):
        self.features = features
        self.gan = gan
        self.discriminator = discriminator
        if gan:
            parameters = discriminator.parameters()
            self.optimizer = torch.optim.AdamW(parameters, lr=4e-4, betas=(0.5, 0.9))

    def __call__(self, vae, batch):
        image, noise = batch
        config = VAELossConfig(perceptual_weight=0.1)
        loss, _, reconstruction = vae_loss(vae, image, noise, config, self.features)
        if self.gan:
            self.train_discriminator(image, reconstruction.detach())
            fooling = generator_hinge_loss(self.discriminator(reconstruction))
            balance = adaptive_gan_weight(loss, fooling, vae.decoder.conv_out.weight)
            loss = loss + self.gan * balance * fooling
        return loss.expand(len(image))                                # (B,)

    def train_discriminator(self, image, reconstruction):
        """One step of the discriminator, without gradients that the decoder left in it."""
        self.optimizer.zero_grad()
        logits = self.discriminator(image), self.discriminator(reconstruction)
        discriminator_hinge_loss(*logits).backward()
        self.optimizer.step()


# ---- Training and measuring ----------------------------------------------------------------------

def scene_images(seed, indices):
    """Drawn scenes of 64 x 64 px: (B, 3, 64, 64)."""
    scenes = Scenes(10**9, seed)
    return torch.stack([to_tensor(scenes.image(index, 64, 64)) for index in indices])


def train(latent_channels, options, features):
    """An autoencoder of that many channels, trained by the project's loop."""
    config = VAEConfig(latent_channels, channels=(32, 64, 64, 64), norm_groups=8)
    torch.manual_seed(options.seed)
    vae = VAE(config)
    discriminator = PatchDiscriminator(32, groups=8)
    B = options.batch_size

    def batches(step):
        image = scene_images(options.seed, range(step * B, (step + 1) * B))
        rng = torch.Generator().manual_seed(options.seed + step)
        return image, torch.randn(B, latent_channels, 8, 8, generator=rng)

    training = TrainConfig(steps=options.steps, batch_size=B, lr=1e-3, optimizer="adamw",
                           device="cpu", precision="fp32", seed=options.seed)
    name = f"table3-{latent_channels}-{options.gan:g}-{options.steps}-{options.seed}"
    run = Run(ROOT / "runs" / name, training)
    return fit(vae, Objective(features, options.gan, discriminator), batches, training, run)


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


@torch.no_grad()
def measure(vae, images, tower):
    """The columns of Table 3 over a list of images (1, 3, H, W), and the reconstructions."""
    reconstructions = [vae.decode(vae.encode(image)).clamp(-1, 1) for image in images]
    rows = []
    for image, reconstruction in zip(images, reconstructions, strict=True):
        distance = perceptual_loss(image, reconstruction, tower.features)
        rows.append([distance, ssim(image, reconstruction), psnr(image, reconstruction)])
    means = torch.tensor(rows).mean(dim=0).tolist()
    fid = float("nan")                                                # it needs many pictures
    if len(images) > 1:
        real = torch.cat([tower(image) for image in images])
        fake = torch.cat([tower(reconstruction) for reconstruction in reconstructions])
        fid = float(frechet_distance(real, fake))
    return dict(zip(MEASURES, [fid, *means], strict=True)), reconstructions


def reconstruct(options, pictures, tower):
    """Measure a checkpoint's autoencoder on picture files, and write them side by side."""
    vae = load_components(options.checkpoint, ("vae",)).vae
    step = vae.config.downsampling
    images = []
    for picture in pictures:
        image = read_image(picture)
        height, width = image.height // step * step, image.width // step * step
        images.append(to_tensor(resize_and_crop(image, max(step, height), max(step, width)))[None])
    for image, picture in zip(images, pictures, strict=True):
        numbers, reconstruction = measure(vae, [image], tower)
        print(f"{picture}: {image.shape[3]}x{image.shape[2]} px, PSNR {numbers['psnr']:.2f} dB, "
              f"SSIM {numbers['ssim']:.3f}, perceptual {numbers['perceptual']:.3f}")
    both = from_tensor(torch.cat([images[-1], *reconstruction], dim=3)[0])
    write_atomically(options.picture, lambda partial: both.save(partial, "PNG"))
    print(f"{pictures[-1]} is beside its reconstruction in {options.picture}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("pictures", nargs="*", help="files to reconstruct with --checkpoint")
    add_options(parser, Options)
    arguments = parser.parse_args()
    options = Options(**given_options(arguments, Options))
    tower = load_image_tower()
    if arguments.pictures:
        return reconstruct(options, arguments.pictures, tower)
    if options.quick:
        options = replace(options, steps=20, num_test=32)
    images = scene_images(HELD_OUT_SEED, range(options.num_test)).split(1)
    table = {}
    for latent_channels in options.channels:
        vae = train(latent_channels, options, tower.features)
        table[latent_channels], _ = measure(vae, images, tower)
        print(f"{latent_channels:3} channels", table[latent_channels],
              "the paper:", PAPER.get(latent_channels))
    words = ["python", "experiments/table3_fig10_autoencoders.py", *sys.argv[1:]]
    result = {"command": shlex.join(words), "torch": torch.__version__,
              "measures": MEASURES, "paper": PAPER, "table": table}
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(options.out, lambda partial: partial.write_text(text))


if __name__ == "__main__":
    command(main)
