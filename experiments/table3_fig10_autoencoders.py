"""table3_fig10_autoencoders.py: how many channels should a latent have? (SD3, Sec. 5.2.1)

Table 3   autoencoders of 4, 8 and 16 channels, all else equal, measured on unseen pictures: FID and
          perceptual distance on the features of the CLIP image tower, SSIM, PSNR; each without and
          with the adversary of Rombach et al. 2022
Fig. 10   MM-DiTs of several depths on the latents of each, without the adversary: FID of samples
Differs   The paper's measures have other features (Inception, LPIPS), its data are photographs and
          its depths reach 22: compare the order. No perceptual distance is trained for, because the
          only feature network here is the one that measures. With --warm, which --quick has, all
          start from the autoencoder of --encoders with its latent cut to principal components: so
          few channels begin with a loss, which they make up for in part.
Saved     each autoencoder without the adversary, in runs/table3: train.py --encoders takes it

Verdicts: "better" holds if it does in every pair of neighbours (4 and 8, 8 and 16 channels): for
SSIM, PSNR and perceptual distance by the paired 95 % interval over pictures, for FID in every seed.
"16 channels need depth" holds if their FID minus that of fewer channels falls from the smallest to
the greatest depth in every seed. A claim did not hold if the opposite is so everywhere. Each
autoencoder has one seed.

Run   python experiments/table3_fig10_autoencoders.py --quick             scenes, one CPU core
      python experiments/table3_fig10_autoencoders.py --full              one GPU
      python experiments/table3_fig10_autoencoders.py --data FOLDER       captioned pictures
"""

import math
import shlex
import shutil
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from batches import Batches
from checkpoints import SHIPPED, find_model_file, load_components, portable, save_networks
from data import ImageFiles, from_tensor, to_tensor
from devices import World, command, pick_precision
from flow import density
from metrics import PictureMeasures, frechet_distance, load_image_tower, psnr
from mmdit import MMDiT
from options import check_options, option, read_options, write_atomically, write_json
from sample import Pipeline, generate
from scenes import HELD_OUT_SEED, Scenes
from train import Run, TrainConfig, fit, flow_loss, read_inputs
from vae import VAE, group_norm, perceptual_loss, vae_loss

MEASURES = ("fid", "perceptual", "ssim", "psnr")                      # the columns of Table 3
PAPER = {4: (2.41, 0.85, 0.75, 25.12), 8: (1.56, 0.68, 0.79, 26.40), 16: (1.06, 0.45, 0.86, 28.62)}
SIZE = 64                                                             # px per side
SAMPLING = {"num_steps": 25, "guidance_scale": 2.5, "schedule": "shifted", "timestep_shift": 1.0,
            "unconditional": "zeros", "height": SIZE, "width": SIZE}


@dataclass(frozen=True)
class Options:
    data: str = option("", "folder of captioned pictures; empty: drawn scenes")
    encoders: str = option(str(SHIPPED), "model with the text encoders and the image tower")
    warm: bool = option(False, "start from the autoencoder of --encoders, cut to its components")
    channels: tuple[int, ...] = option((4, 8, 16), "latent channels to compare", 1, 256)
    gan: tuple[float, ...] = option((0.0, 0.5), "weights of the adversary", 0.0, 1e3)
    steps: int = option(4000, "training steps of each autoencoder", 1, 10**8)
    crop: int = option(64, "px per side of the crops that it trains on", 16, SIZE)
    kl_weight: float = option(2e-4, "of the KL term in its loss", 0.0, 1.0)
    batch_size: int = option(16, "crops in a step", 1, 4096)
    num_train: int = option(8192, "pictures to train on", 2, 10**6)
    num_test: int = option(512, "unseen pictures to measure on", 11, 10**5)
    depths: tuple[int, ...] = option((2, 4, 6), "of the MM-DiTs; none: no Fig. 10", 1, 64)
    flow_steps: int = option(4000, "training steps of each MM-DiT", 1, 10**8)
    seeds: int = option(2, "repetitions of each MM-DiT", 1, 100)
    out: str = option(str(ROOT / "results" / "table3_fig10_autoencoders.json"), "for the numbers")

    def __post_init__(self):
        check_options(self)
        object.__setattr__(self, "channels", tuple(sorted(set(self.channels))))
        if len(self.channels) < 2:
            raise ValueError("--channels needs two numbers or more, to compare them")
        if self.crop % 8:
            raise ValueError(f"--crop {self.crop} must be a multiple of the VAE's 8 px")


QUICK = {"warm": True, "steps": 80, "crop": 32, "batch_size": 8, "num_train": 1024,
         "num_test": 96, "depths": (1, 2), "flow_steps": 120}
FULL = {"steps": 3000, "batch_size": 32, "num_train": 20000, "flow_steps": 2000}


# ---- The adversary (Rombach et al. 2022, App. G) -------------------------------------------------

class PatchDiscriminator(nn.Sequential):
    """Does a patch look real (Isola et al. 2017)? image (B, 3, H, W) -> logits (B, 1, H/8, W/8)."""

    def __init__(self, channels=64, groups=32):
        super().__init__(nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2))
        for width in (channels, 2 * channels):
            self.append(nn.Conv2d(width, 2 * width, 4, stride=2, padding=1))
            self.append(group_norm(groups, 2 * width))
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
    """The loss that is handed to fit: L1 and KL, and with `gan` the adversary, which takes a step
    of its own for each batch."""

    def __init__(self, kl_weight, gan=0.0, discriminator=None):
        self.kl_weight = kl_weight
        self.gan = gan
        self.discriminator = discriminator
        if gan:
            parameters = discriminator.parameters()
            self.optimizer = torch.optim.AdamW(parameters, lr=4e-4, betas=(0.5, 0.9))

    def __call__(self, vae, batch):
        image, noise = batch
        loss, _, reconstruction = vae_loss(vae, image, noise, self.kl_weight)
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


# ---- Table 3 -------------------------------------------------------------------------------------

def read_pictures(options):
    """(training pictures, unseen ones), both (N, 3, 64, 64), and the captions of the unseen."""
    source, unseen = Scenes(options.num_train), Scenes(options.num_test, HELD_OUT_SEED)
    first = 0
    if options.data:
        source = unseen = ImageFiles(options.data)
        first = len(source) - options.num_test
        if first < 2:
            raise ValueError(f"{options.data} has {len(source)} pictures; --num-test "
                             f"{options.num_test} leaves too few to train on")
    training, test, captions = [], [], []
    for index in range(min(options.num_train, first or len(source))):
        training.append(to_tensor(source.image(index, SIZE, SIZE)))
    for index in range(first, first + options.num_test):
        test.append(to_tensor(unseen.image(index, SIZE, SIZE)))
        captions.append(unseen.captions(index)[-1])
    return torch.stack(training), torch.stack(test), captions


@torch.no_grad()
def cut_latent(vae, channels, pictures):
    """The autoencoder whose channels are the first principal components of this one's code (about
    0). With all of them, the reconstructions stay the same."""
    codes = []
    for part in pictures.split(32):
        codes.append(vae.encode_moments(part)[0].transpose(0, 1).flatten(1))
    codes = torch.cat(codes, dim=1).double()                          # (C, all positions)
    _, vectors = torch.linalg.eigh(codes @ codes.T)                   # rising eigenvalues
    axes = vectors.flip(1)[:, :channels].float()                      # (C, channels)
    weights = vae.state_dict()
    for part in ("weight", "bias"):
        mean, logvar = weights[f"encoder.conv_out.{part}"].chunk(2)   # (C, ...) each
        mean = torch.einsum("ck,c...->k...", axes, mean)
        logvar = torch.einsum("ck,c...->k...", axes.square(), logvar)
        weights[f"encoder.conv_out.{part}"] = torch.cat([mean, logvar])
    into = weights["decoder.conv_in.weight"]                          # (D, C, 3, 3)
    weights["decoder.conv_in.weight"] = torch.einsum("ck,dcij->dkij", axes, into)
    smaller = VAE(replace(vae.config, latent_channels=channels))
    smaller.load_state_dict(weights)
    return smaller


def first_autoencoder(channels, pictures, options):
    """An autoencoder of that many channels before training."""
    torch.manual_seed(0)
    start = load_components(options.encoders, ("vae",)).vae
    if not options.warm:
        return VAE(replace(start.config, latent_channels=channels))
    if channels > start.config.latent_channels:
        raise ValueError(f"--warm: {options.encoders} has {start.config.latent_channels} channels, "
                         f"so {channels} cannot be cut from it; give --warm false")
    return cut_latent(start, channels, pictures)


def train_autoencoder(channels, gan, pictures, options, world):
    """An autoencoder of that many channels, trained by the project's loop."""
    vae = first_autoencoder(channels, pictures[:256], options).to(world.device)
    discriminator = PatchDiscriminator(32, groups=8).to(world.device)
    B, side = options.batch_size, options.crop

    def batches(step):
        rng = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(pictures), (B,), generator=rng)
        top, left = torch.randint(SIZE - side + 1, (2,), generator=rng).tolist()
        crops = pictures[chosen, :, top : top + side, left : left + side]     # (B, 3, side, side)
        noise = torch.randn(B, channels, side // 8, side // 8, generator=rng)
        return crops.to(world.device), noise.to(world.device)

    config = TrainConfig(steps=options.steps, every=options.steps, batch_size=B, lr=5e-4,
                         optimizer="adamw")
    objective = Objective(options.kl_weight, gan, discriminator)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), config, world)
        vae = fit(vae, objective, batches, config, run)
    return normalised(vae, pictures[:512].to(world.device))


@torch.no_grad()
def normalised(vae, pictures):
    """The autoencoder with the mean and deviation of its own latents (App. B.2)."""
    codes = []
    for part in pictures.split(32):
        codes.append(vae.encode_moments(part)[0])
    codes = torch.cat(codes)                                          # (N, C, H, W)
    vae.config = replace(vae.config, vae_shift=codes.mean().item(),
                         vae_scale=1 / codes.std().item())
    return vae


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
    """(the columns of Table 3, {measure: of each picture (N,)}, reconstructions of (N, 3, H, W))"""
    parts, distances, real, fake = [], [], [], []
    for part in images.split(16):
        parts.append(vae.decode(vae.encode(part)).clamp(-1, 1))
    reconstructions = torch.cat(parts)
    for image, reconstruction in zip(images.split(1), reconstructions.split(1), strict=True):
        distances.append(perceptual_loss(image, reconstruction, tower.features))
        real.append(tower(image))
        fake.append(tower(reconstruction))
    by_picture = {"perceptual": torch.stack(distances), "ssim": ssim(images, reconstructions),
                  "psnr": psnr(images, reconstructions)}
    numbers = {"fid": frechet_distance(torch.cat(real), torch.cat(fake)).item()}
    for name, values in by_picture.items():
        numbers[name] = values.mean().item()
    return numbers, by_picture, reconstructions


# ---- Fig. 10 -------------------------------------------------------------------------------------

def save_model(vae, channels, options):
    """A folder of runs/table3 with this autoencoder, for train.py --encoders."""
    file = find_model_file(options.encoders)
    text = load_components(file, ("text",)).text
    folder = ROOT / "runs" / "table3" / f"{channels}-channels-kl-{options.kl_weight:g}"
    folder.mkdir(parents=True, exist_ok=True)
    save_networks(folder / "model.safetensors", {"vae": vae, **text.encoders}, text.config)
    shutil.copytree(file.parent / "tokenizers", folder / "tokenizers", dirs_exist_ok=True)
    return folder


def flow_fids(folder, channels, test, captions, options, world):
    """{depth: [FID of each seed]} of MM-DiTs on the latents of the autoencoder in this folder."""
    config = TrainConfig(data=options.data, encoders=str(folder), steps=options.flow_steps,
                         every=options.flow_steps, num_scenes=max(64, options.num_train),
                         lr=6e-4, encoder_dropout=0.464)
    inputs = read_inputs(config, world)
    pipeline = Pipeline(None, inputs.vae, inputs.text, SAMPLING, world.device,
                        pick_precision(config.precision, world.device))
    pictures = []
    for image in test:
        pictures.append(from_tensor(image))
    tower = find_model_file(options.encoders).parent
    measures = PictureMeasures(pictures, captions, inputs.text, tower, world.device)
    loss = partial(flow_loss, density=density(config.density), timestep_shift=1.0)
    fids = {}
    for depth in options.depths:
        fids[depth] = []
        for seed in range(options.seeds):
            seeded = replace(config, seed=seed)
            model = MMDiT(replace(inputs.sizes, depth=depth))
            model.initialize(torch.Generator().manual_seed(seed))
            batches = Batches(inputs.training, inputs.vae.config, inputs.text.config, seeded, world)
            with tempfile.TemporaryDirectory() as place:
                run = Run(Path(place), seeded, world)
                pipeline.mmdit = fit(model.to(world.device), loss, batches, seeded, run)
            drawn = generate(pipeline, captions, seed=1, batch_size=128)
            fids[depth].append(measures(drawn)["fid"])
        print(f"{channels:3} channels, depth {depth}: FID of samples", *fids[depth], flush=True)
    return fids


# ---- Claims, figure, command line ----------------------------------------------------------------

def judge(claim, paper, here, leads):
    """A row of the claims table. leads: (low, high) above 0 where the claim is right; all agree."""
    lows, highs = zip(*leads, strict=True)
    verdict = "cannot be told"
    if min(lows) > 0:
        verdict = "held"
    elif max(highs) < 0:
        verdict = "did not hold at this size"
    print(f"{verdict}: {claim}: {here}; the paper: {paper}")
    return {"claim": claim, "paper": paper, "here": here,
            "interval": [round(min(lows), 4), round(max(highs), 4)], "verdict": verdict}


def lead(worse, better, sign):
    """The paired 95 % interval by which `better` leads; sign: 1 where a high number is good."""
    difference = sign * (better - worse)                              # (N,)
    middle = difference.mean().item()
    reach = 1.96 * difference.std().item() / math.sqrt(len(difference))
    return middle - reach, middle + reach


def channel_claims(table, by_picture, channels):
    """More channels reconstruct better, by each measure. by_picture: {channels: {measure: (N,)}}"""
    rows = []
    for place, name in enumerate(MEASURES):
        sign = -1 if name in ("fid", "perceptual") else 1
        leads, here, paper = [], [], []
        for few, many in zip(channels, channels[1:], strict=False):
            gain = sign * (table[many][name] - table[few][name])
            if name == "fid":
                leads.append((gain, gain))
            else:
                leads.append(lead(by_picture[few][name], by_picture[many][name], sign))
        for count in channels:
            here.append(f"{table[count][name]:.3g}")
            paper.append(f"{PAPER[count][place]:g}" if count in PAPER else "-")
        claim = f"more channels reconstruct better, by {name}: {', '.join(map(str, channels))}"
        rows.append(judge(claim, " / ".join(paper), " / ".join(here), leads))
    return rows


def few_channels_claim(fids, channels):
    """With the smallest MM-DiT, fewer channels give better samples."""
    depth = min(fids[channels[0]])
    leads, here = [], []
    for few, many in zip(channels, channels[1:], strict=False):
        for better, worse in zip(fids[few][depth], fids[many][depth], strict=True):
            leads.append((worse - better, worse - better))
    for count in channels:
        here.append(f"{statistics.mean(fids[count][depth]):.3g}")
    names = ", ".join(map(str, channels))
    claim = f"FID of samples at depth {depth} rises with the channels: {names}"
    return judge(claim, "16 need capacity, Fig. 10", " / ".join(here), leads)


def depth_claim(fids, few, many):
    """The gap between two numbers of channels shrinks as depth grows."""
    gaps, here, shrinks = {}, [], []
    for depth in fids[many]:
        gaps[depth] = []
        for theirs, ours in zip(fids[few][depth], fids[many][depth], strict=True):
            gaps[depth].append(ours - theirs)
        here.append(f"{statistics.mean(gaps[depth]):+.3g} at depth {depth}")
    for before, after in zip(gaps[min(gaps)], gaps[max(gaps)], strict=True):
        shrinks.append((before - after, before - after))
    claim = f"{many} channels need depth: FID of samples above that of {few} channels"
    return judge(claim, "it shrinks with depth", ", ".join(here), shrinks)


def draw_figure(shown, fids, file):
    """Pictures (first row) and their reconstructions {name: (n, 3, 64, 64)}; Fig. 10 below."""
    from matplotlib.figure import Figure

    figure = Figure((10, 13 if fids else 8), layout="constrained")
    upper, lower = figure, None
    if fids:
        upper, lower = figure.subfigures(2, 1, height_ratios=(1.6, 1))
    columns = len(shown["pictures"])
    axes = upper.subplots(len(shown), columns)
    for row, (name, images) in enumerate(shown.items()):
        axes[row, 0].set_ylabel(name, fontsize=8)
        for column, image in enumerate(images):
            axes[row, column].imshow(from_tensor(image))
            axes[row, column].set(xticks=[], yticks=[])
    if fids:
        axis = lower.subplots()
        for number, (channels, by_depth) in enumerate(fids.items()):
            means = [statistics.mean(values) for values in by_depth.values()]
            axis.plot(list(by_depth), means, color=f"C{number}", label=f"{channels} channels")
            for depth, values in by_depth.items():
                axis.plot([depth] * len(values), values, ".", color=f"C{number}")
        axis.set(xlabel="depth of MM-DiT", ylabel="FID of samples", title="Fig. 10; dots: seeds",
                 xticks=list(by_depth))
        axis.legend()
    write_atomically(file, partial(figure.savefig, dpi=90, format="png"))


def main(arguments=None):
    """Train the autoencoders and measure them (Table 3), then MM-DiTs on top (Fig. 10)."""
    options = read_options(Options, __doc__.split("\n")[0], arguments, quick=QUICK, full=FULL)
    world = World()
    tower = load_image_tower(find_model_file(options.encoders).parent).to(world.device)
    pictures, test, captions = read_pictures(options)
    shown = {"pictures": test[:8]}
    table, by_picture, fids = {}, {}, {}
    print("FID, perceptual distance, SSIM, PSNR")
    for gan in options.gan:
        table[gan], by_picture[gan] = {}, {}
        for channels in options.channels:
            vae = train_autoencoder(channels, gan, pictures, options, world)
            found = measure(vae, test.to(world.device), tower)
            table[gan][channels], by_picture[gan][channels], reconstructions = found
            shown[f"{channels} channels\nadversary {gan:g}"] = reconstructions[:8].cpu()
            numbers = " / ".join(f"{value:.3f}" for value in table[gan][channels].values())
            print(f"{channels:3} channels, adversary {gan:g}: {numbers}; the paper:",
                  *PAPER.get(channels, ("-",)), flush=True)
            if gan == options.gan[0]:
                folder = save_model(vae, channels, options)
                if options.depths:
                    fids[channels] = flow_fids(folder, channels, test, captions, options, world)
    first = options.gan[0]
    rows = channel_claims(table[first], by_picture[first], options.channels)
    if len(options.channels) > 1 and len(options.depths) > 1:
        rows.append(few_channels_claim(fids, options.channels))
        for few in options.channels[:-1]:
            rows.append(depth_claim(fids, few, options.channels[-1]))
    words = ["python", "experiments/table3_fig10_autoencoders.py", *sys.argv[1:]]
    settings = asdict(options) | {"encoders": portable(find_model_file(options.encoders)),
                                  "data": Path(options.data).name, "sampling": SAMPLING}
    del settings["out"]
    record = {"command": shlex.join(words), "settings": settings, "device": str(world.device),
              "measures": MEASURES, "paper": PAPER, "table": table, "fid_of_samples": fids,
              "claims": rows}
    write_json(options.out, record)
    draw_figure(shown, fids, Path(options.out).with_suffix(".png"))


if __name__ == "__main__":
    command(main)
