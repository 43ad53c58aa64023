"""encode.py: what the frozen networks do for training: pictures -> latents, captions -> context (SD3, App. E.1, B.2, B.3).

Read with   App. E.1 (compute latents once, no random augmentation), Table 7 (what that saves), App. B.3 (encoder dropout)
Not here    the networks (vae.py, text_encoders.py), reading and drawing pictures (data.py), the loop (train.py)
Randomness  every draw of a batch comes from (seed, step, index in the global batch), never from a process's own stream
Shapes      N pictures   B samples of this process   C latent channels   H W latent height, width   L text tokens
Run         python encode.py     our Table 7: milliseconds and kilobytes per sample of each shipped encoder
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from checkpoints import SHIPPED, load_components
from data import Scenes, readable, to_tensor
from text_encoders import drop_encoders
from vae import sample_code


class EncodedImages:
    """What the frozen networks make of a whole source, computed once: `moments` (N, 2C, H, W) fp16, the latents' means and
    log-variances; `captions`, some for each picture; `context` (U, L, context_dim) fp16 and `pooled` (U, pooled_dim) of the
    U different captions, whose row `row_of` tells.

    source: as in data.py. All is encoded in groups of 64, so that the numbers depend on nothing but the source.
    """

    def __init__(self, source, vae, text, resolution: int, device, autocast, quiet: bool):
        self.moments, self.captions = [], []
        pending = []

        def flush():
            image = torch.stack([to_tensor(picture) for picture in pending]).to(device)
            with torch.no_grad(), autocast():
                self.moments.append(torch.cat(vae.encode_moments(image), dim=1).half().cpu())     # (64, 2C, H, W)
            pending.clear()

        for _, picture, captions in tqdm(readable(source, resolution, resolution), total=len(source), disable=quiet,
                                         desc="encoding pictures", unit="image", leave=False):
            pending.append(picture)
            self.captions.append(captions)
            if len(pending) == 64:
                flush()
        if pending:
            flush()
        self.moments = torch.cat(self.moments)                                                    # (N, 2C, H, W)
        unique = sorted({caption for captions in self.captions for caption in captions})
        self.row_of = {caption: row for row, caption in enumerate(unique)}
        parts = []
        for start in tqdm(range(0, len(unique), 64), disable=quiet, desc="encoding captions", unit="batch", leave=False):
            with autocast():
                context, pooled = text(unique[start : start + 64])
            parts.append((context.half().cpu(), pooled.float().cpu()))
        self.context, self.pooled = (torch.cat(part) for part in zip(*parts))                     # (U, L, D), (U, P)

    def __len__(self):
        return len(self.captions)


@dataclass
class Batch:
    """This process's share of one step, on its device."""
    latent: torch.Tensor        # (B, C, H, W) clean, sampled from the VAE's Gaussian
    context: torch.Tensor       # (B, L, context_dim)
    pooled: torch.Tensor        # (B, pooled_dim)
    noise: torch.Tensor         # (B, C, H, W)
    uniform: torch.Tensor       # (B,) in (0, 1), on the CPU: becomes t through the density's quantile


class Batches:
    """This process's share of the global batch of any step, from (seed, step, index) alone.

    config: seed, batch_size, encoder_dropout and full_captions of train.TrainConfig; world: rank, size and device.
    """

    def __init__(self, images: EncodedImages, vae, text_config, config, world):
        self.images, self.vae, self.text_config, self.config, self.world = images, vae, text_config, config, world
        self.order = {}                                                                # epoch -> permutation

    def index(self, count: int) -> int:
        """Which picture is sample number `count` of the run: every epoch is a new permutation."""
        epoch, place = divmod(count, len(self.images))
        if epoch not in self.order:
            self.order = {epoch: np.random.default_rng((self.config.seed, 1, epoch)).permutation(len(self.images))}
        return int(self.order[epoch][place])

    def __call__(self, step: int) -> Batch:
        config, world = self.config, self.world
        share = config.batch_size // world.size
        numbers = range(world.rank * share, (world.rank + 1) * share)                 # indices in the global batch
        indices = [self.index(step * config.batch_size + i) for i in numbers]
        moments = self.images.moments[indices].float()                                # (B, 2C, H, W)
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        rows, draws, code_noise, noise = [], [], [], []
        for number, index in zip(numbers, indices):
            rng = np.random.default_rng((config.seed, 2, step, number))
            draws.append(rng.random(5))                                               # t, caption, three encoders
            noise.append(rng.standard_normal(shape, dtype=np.float32))
            code_noise.append(rng.standard_normal(shape, dtype=np.float32))
            caption = pick_caption(self.images.captions[index], draws[-1][1], config.full_captions)
            rows.append(self.images.row_of[caption])
        draws = torch.from_numpy(np.stack(draws)).float()                             # (B, 5)
        mean, logvar = moments.chunk(2, dim=1)
        latent = self.vae.normalize(sample_code(mean, logvar, torch.from_numpy(np.stack(code_noise))))
        context, pooled = self.images.context[rows].float(), self.images.pooled[rows]
        context, pooled = drop_encoders(context, pooled, draws[:, 2:] >= config.encoder_dropout, self.text_config)
        noise = torch.from_numpy(np.stack(noise))
        on_device = (x.to(world.device, non_blocking=True) for x in (latent, context, pooled, noise))
        return Batch(*on_device, draws[:, 0].clamp(1e-6, 1 - 1e-6))


def pick_caption(captions, draw: float, full_share: float) -> str:
    """(original, full) are mixed by `full_share` (Sec. 5.2.2); any other number of captions is drawn from evenly."""
    if len(captions) == 2:
        return captions[int(draw < full_share)]
    return captions[int(draw * len(captions))]


def main():
    """Table 7 for the shipped encoders, on scenes of 64 px: time of the forward pass and size of what is stored."""
    parts, scenes, count = load_components(SHIPPED, ("vae", "text")), Scenes(64), 64
    images = torch.stack([to_tensor(scenes.image(i, 64, 64)) for i in range(count)])
    ids = parts.text.tokenize([scenes.captions(i)[1] for i in range(count)])
    jobs = {"VAE (Enc)": lambda: torch.cat(parts.vae.encode_moments(images), dim=1)}
    jobs |= {name: lambda name=name: parts.text.encoders[name](ids[name]) for name in parts.text.encoders}
    print("model      ms per sample   kB stored (sequences and latents fp16, pooled fp32)")
    with torch.no_grad():
        for name, job in jobs.items():
            job()
            start = time.time()
            result = job()
            elapsed_seconds = time.time() - start
            stored = [(result, 2)] if torch.is_tensor(result) else [(result[0], 2), (result[1], 4)]
            kilobytes = sum(values[0].numel() * size for values, size in stored) / 1000
            print(f"{name:9} {1000 * elapsed_seconds / count:13.3f} {kilobytes:11.1f}")


if __name__ == "__main__":
    main()
