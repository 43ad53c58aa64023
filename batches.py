"""batches.py: what one step of training gets (SD3, arXiv:2403.03206v1, Sec. 5.3.2, App. B.3).

Read with   Sec. 5.2.2 (two kinds of captions), Sec. 5.3.2 (one size in a batch), App. B.3 (t, noise
            and dropped text encoders)
Not here    pictures and shards (data.py), the scenes (scenes.py), the networks, the loop (train.py)
Shapes      B batch   C latent channels   H W latent height, width   L CLIP tokens   L' T5 tokens
"""

import atexit
import copy
import os
import weakref
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader

from devices import autocast, pick_precision
from scenes import draw_scene, make_scene, scene_captions
from text_encoders import combine, drop_encoders
from vae import normalize, sample_code


@dataclass
class Batch:
    """This process's share of one step, on its device."""
    latent: torch.Tensor        # (B, C, H, W) clean, drawn from the VAE's Gaussian
    context: torch.Tensor       # (B, L + L', context_dim)
    pooled: torch.Tensor        # (B, pooled_dim)
    noise: torch.Tensor         # (B, C, H, W)
    uniform: torch.Tensor       # (B,) in (0, 1), on the CPU: becomes t by the density's quantile

    def split(self, parts):
        """Equal parts, one after the other."""
        pieces = [tensor.chunk(parts) for tensor in vars(self).values()]
        return [Batch(*piece) for piece in zip(*pieces)]


# ---- From encoded shards (App. E.1) --------------------------------------------------------------
class Batches:
    """batches(step) is this process's share of a batch. Every draw is keyed by (seed, step, index
    in the whole batch), so there is no state. config: train.TrainConfig. world: devices.World."""
    def __init__(self, folder, vae_config, text_config, config, world):
        self.folder, self.config, self.world = folder, config, world
        self.vae_config, self.text_config = vae_config, text_config
        self.ahead = Ahead(weakly(self.make), world.workers)
        self.epochs = {}
        self.per_epoch = len(self.epoch(0))

    def epoch(self, number):
        """The batches of an epoch, (B,) sample numbers each. Groups smaller than B repeat."""
        if number not in self.epochs:
            rng = np.random.default_rng((self.config.seed, 1, number))
            batches = []
            for group in self.folder.groups:
                count = max(1, len(group) // self.config.batch_size)
                batches.extend(np.resize(rng.permutation(group), (count, self.config.batch_size)))
            order = rng.permutation(len(batches))
            self.epochs = {number: [batches[i] for i in order]}
        return self.epochs[number]

    def indices(self, step):
        """The sample numbers of this process's share of a step."""
        epoch, place = divmod(step, self.per_epoch)
        share = self.config.batch_size // self.world.size
        first = self.world.rank * share
        return self.epoch(epoch)[place][first : first + share].tolist()

    def make(self, step):
        """What the CPU does for a step: (samples as `inputs` wants them, draws, noise)."""
        indices = self.indices(step)
        shard, _ = self.folder.find(indices[0])
        draws, noise = self.draw(step, shard["moments"].shape[1:])
        rows = []
        for index, draw in zip(indices, draws):
            captions = self.folder.caption_rows(index)
            rows.append(pick_caption(captions, draw[1], self.config.full_captions))
        return self.folder.read(indices, rows), draws, noise

    def draw(self, step, shape):
        """For each sample of this process, five numbers in [0, 1) for t, caption and encoders,
        and noise of this shape: C channels for Eq. 13, then C for the VAE's code."""
        share = self.config.batch_size // self.world.size
        draws, noise = [], []
        for number in range(self.world.rank * share, (self.world.rank + 1) * share):
            rng = np.random.default_rng((self.config.seed, 2, step, number))
            draws.append(rng.random(5))
            noise.append(rng.standard_normal(shape, np.float32))
        return torch.from_numpy(np.stack(draws)), torch.from_numpy(np.stack(noise))

    def __call__(self, step):
        """The Batch of a step: samples, one caption each, noise, dropped encoders."""
        stored, draws, noise = self.ahead(step)
        noise, code_noise = noise.to(self.world.device).chunk(2, dim=1)       # (B, C, H, W) each
        latent, context, pooled = self.inputs(stored, code_noise)
        draws = draws.float()
        keep = (draws[:, 2:] >= self.config.encoder_dropout).to(self.world.device)     # (B, 3)
        context, pooled = drop_encoders(context, pooled, keep, self.text_config)
        return Batch(latent, context, pooled, noise, draws[:, 0].clamp(1e-6, 1 - 1e-6))

    def inputs(self, stored, code_noise=None):
        """What `read` gives -> latent, context, pooled in fp32, on the device."""
        tensors = {name: part.to(self.world.device).float() for name, part in stored.items()}
        mean, logvar = tensors.pop("moments").chunk(2, dim=1)         # (B, C, H, W) each
        code = sample_code(mean, logvar, code_noise)
        context, pooled = combine(**tensors)
        return normalize(code, self.vae_config), context, pooled

    def validation(self, count):
        """Yield (latent, context, pooled, noise) of `count` samples in batches of one size, no
        larger than those of training, which fit into memory."""
        _, chosen = self.folder.split(count)
        together = self.config.batch_size // self.world.size // self.config.accumulate
        for group in chosen.groups:
            rng = torch.Generator().manual_seed(self.config.seed)
            for start in range(0, len(group), together):
                part = group[start : start + together]
                rows = [self.folder.caption_rows(index)[-1] for index in part]
                latent, context, pooled = self.inputs(self.folder.read(part, rows))
                yield latent, context, pooled, torch.randn(latent.shape, generator=rng).to(latent)


def pick_caption(captions, draw, full_share):
    """Of (short, full), full with chance `full_share` (Sec. 5.2.2). Of 1, 3 or more, any one."""
    if len(captions) == 2:
        return captions[int(draw < full_share)]
    return captions[int(draw * len(captions))]


# ---- From new scenes -----------------------------------------------------------------------------
class SceneBatches(Batches):
    """Batches of scenes that are drawn and encoded for their step. In a run no scene comes twice.
    With `buckets`, half of the batches are square. Nothing waits on a disk: this is for GPUs."""
    def __init__(self, vae, text, config, world):
        self.text, self.config, self.world = text, config, world
        self.vae_config, self.text_config = vae.config, text.config
        self.precision = pick_precision(config.precision, world.device)
        self.vae = copy.deepcopy(vae).to(self.precision)              # faster than autocast
        self.ahead = Ahead(weakly(self.make), world.workers)
        self.resolution = config.resolution
        self.buckets = scene_buckets(config)
        self.sizes = [f"{height}x{width}" for height, width in self.buckets]         # px
        self.longest_side = max(max(size) for size in self.buckets)

    def __len__(self):
        return 0                                                      # Nothing is stored.

    def make(self, step):
        """What the CPU does for a step: (pictures and tokens, draws, noise)."""
        rng = np.random.default_rng((self.config.seed, 3, step))
        height, width = rng.choice([self.buckets[0], *self.buckets]).tolist()
        f = self.vae_config.downsampling
        shape = (2 * self.vae_config.latent_channels, height // f, width // f)
        draws, noise = self.draw(step, shape)
        first = step * self.config.batch_size + self.world.rank * len(draws)
        pictures, texts = [], []
        for index, draw in enumerate(draws, first):
            scene = make_scene(self.config.seed, index, height, width)
            pictures.append(draw_scene(scene))
            texts.append(pick_caption(scene_captions(scene), draw[1], self.config.full_captions))
        stored = self.text.tokenize(texts) | {"pictures": torch.from_numpy(np.stack(pictures))}
        return stored, draws, noise

    @torch.no_grad()
    def inputs(self, stored, code_noise=None):
        """Pictures and tokens -> latent, context, pooled in fp32, on the device."""
        ids = dict(stored)
        image = to_unit(ids.pop("pictures"), self.world.device).to(self.precision)
        mean, logvar = self.vae.encode_moments(image)                 # (B, C, H, W) each
        with autocast(self.world.device, self.precision):
            context, pooled = self.text.encode_ids(ids, len(image))
        code = sample_code(mean.float(), logvar.float(), code_noise)
        return normalize(code, self.vae_config), context.float(), pooled.float()


def scene_buckets(config):
    """The sizes (height, width) of scenes, the square one first."""
    S = config.resolution
    wide = S * 3 // 2
    return ((S, S), (S, wide), (wide, S)) if config.buckets else ((S, S),)


def to_unit(pictures, device):
    """uint8 (n, height, width, 3) -> (n, 3, height, width) in [-1, 1], on the device. The channels
    stay last in memory: on a CPU the VAE is 1.5 times as fast with that."""
    return (pictures.to(device).float() / 127.5 - 1).permute(0, 3, 1, 2)


# ---- In advance ----------------------------------------------------------------------------------
class Ahead:
    """make(step) for one step after the other. With `workers`, that many processes make the values
    of the next steps in advance. They are copies of this process, so make must not touch a GPU.
    They end when the Ahead is freed. That is at once only if make does not refer to it."""
    def __init__(self, make, workers):
        self.make, self.workers = make, workers
        self.values = None                              # iterates over what the workers make
        self.step = None                                # of the next value
        atexit.register(stop_workers, weakref.ref(self))

    def __getitem__(self, step):
        try:
            return self.make(step)
        except ValueError as problem:                   # A worker returns it, the loop raises it.
            return problem

    def __call__(self, step):
        if self.workers == 0:
            return self.make(step)
        if step != self.step:
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")    # or it warns of copies
            self.values = iter(DataLoader(
                weakref.proxy(self), batch_size=None, sampler=range(step, 2**31),
                num_workers=self.workers, pin_memory=torch.cuda.is_available(),
                worker_init_fn=leave_session, multiprocessing_context="fork"))
        self.step = step + 1
        value = next(self.values)
        if isinstance(value, ValueError):
            self.values = self.step = None
            raise value
        return value


def weakly(method):
    """The method of an object, without a reference that keeps the object alive."""
    return partial(method.__func__, weakref.proxy(method.__self__))


def stop_workers(ahead):
    """Stops the workers before Python ends. ahead: a weak reference to an Ahead."""
    if ahead() is not None:
        ahead().values = None


def leave_session(worker):
    """Ctrl-C and the end of a terminal reach all processes of a session. A worker has its own, and
    goes on while the main process ends its step and saves. Without a main process it ends."""
    os.setsid()
