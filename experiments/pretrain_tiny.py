"""pretrain_tiny.py: the frozen networks that the paper takes as given, made from captions and pictures only (App. B.2).

The paper starts from released CLIP-L, CLIP-G, T5-XXL and an autoencoder trained elsewhere. The small model that ships needs
small ones, and no weights are at hand. This file makes them, one stage after the other, on a CPU in about an hour:

    tokenizers   CLIP's byte-level BPE and T5's SentencePiece, 2048 entries each
    clip         CLIP-L and CLIP-G with their image towers, contrastively (Radford et al. 2021)
    t5           the encoder of a small T5 v1.1, by span corruption (Raffel et al. 2019); its decoder is thrown away
    vae          the 16-channel autoencoder: L1 and KL
    assemble     latent statistics (App. B.2), then everything into pretrained/tiny/ in bf16
    mmdit        first stage of the MM-DiT, told of the text by the pooled vectors alone; train.py --init goes on from it
    ship         add the MM-DiT of a run of train.py (--run) to that file

Data        scenes (drawn), emoji and clothing photographs (free licences), prompt lists for the vocabulary. The last 100
            emoji and the last 100 photographs are held out, and so is every scene of another seed
Run         python experiments/pretrain_tiny.py --data DATA [--stage vae --minutes 34]
"""

import argparse
import copy
import json
import math
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parents[1]))
from checkpoints import SHIPPED, load_components, read_network, save_networks  # noqa: E402
from data import ImageFiles, Scenes, resize_and_crop, to_tensor  # noqa: E402
from evaluate import CLIPImageConfig, CLIPImageEncoder  # noqa: E402
from text_encoders import (  # noqa: E402
    CLIPConfig,
    CLIPTextEncoder,
    CLIPTokenizer,
    RMSNorm,
    T5Attention,
    T5Config,
    T5Encoder,
    T5FeedForward,
    T5Tokenizer,
    TextConfig,
    clip_text_rules,
    relative_position_bucket,
)
from train import TrainConfig, World, complete, set_up, train_step  # noqa: E402
from vae import VAE, VAEConfig, VAELossConfig, psnr, vae_loss  # noqa: E402

VOCABULARY, SENTINELS = 2048, 16
TEXT = TextConfig(clip_l_width=64, clip_g_width=128, t5_width=192, clip_length=16, t5_length=20)
CLIP_L = CLIPConfig(VOCABULARY, 64, 3, max_length=24, activation="quick_gelu")
CLIP_G = CLIPConfig(VOCABULARY, 128, 3, max_length=24, activation="gelu", projection_dim=128)
CLIP_L_IMAGE = CLIPImageConfig(64, 8, 128, 2, projection_dim=64, activation="quick_gelu")
CLIP_G_IMAGE = CLIPImageConfig(64, 8, 128, 2, projection_dim=128, activation="gelu")
T5 = T5Config(VOCABULARY + SENTINELS, 192, ff_size=256, num_layers=2, num_heads=3)
AUTOENCODER = VAEConfig(16, (32, 64, 64, 64), norm_groups=8)
HELD_OUT = 100
TRAIN_SCENES, HELD_OUT_SCENES = Scenes(1 << 30, seed=1), Scenes(1 << 30, seed=2)


# ------------------------------------------------------------------------------------------------------------
# Optimisation, shared by the stages
# ------------------------------------------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal, matrix by matrix (Jordan et al. 2024, "Muon"), for weights of two or more
    dimensions, flattened to (out, rest). On this autoencoder it was ahead after 4 minutes of where AdamW was after 8."""

    def __init__(self, parameters, lr: float):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 0.05)
                update = orthogonalize(weight.grad.lerp(momentum, 0.95).flatten(1)).view_as(weight).to(weight)
                weight.add_(update, alpha=-group["lr"] * max(1, weight.shape[0] / weight[0].numel()) ** 0.5)


def orthogonalize(matrix):
    """(out, in) -> nearly the nearest matrix with orthonormal rows or columns, by five Newton-Schulz steps in bf16."""
    x = matrix.bfloat16() if matrix.shape[0] <= matrix.shape[1] else matrix.bfloat16().T
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Clock:
    """Runs a stage for a number of minutes: yields step numbers, sets cosine learning rates by the time that is left."""

    def __init__(self, minutes: float, optimizers: dict, warmup: int = 100):
        self.seconds, self.optimizers, self.warmup = 60 * minutes, optimizers, warmup

    def __iter__(self):
        start, step = time.time(), 0
        while (elapsed := time.time() - start) < self.seconds:
            factor = min(1, (step + 1) / self.warmup) * 0.5 * (1 + math.cos(math.pi * elapsed / self.seconds))
            for optimizer, peak in self.optimizers.items():
                for group in optimizer.param_groups:
                    group["lr"] = peak * factor
            yield step
            step += 1
            if step % 100 == 0:
                print(f"  step {step}, {elapsed:.0f} s", end="  ", flush=True)


def update(loss, parameters, optimizers):
    """One step of every optimizer; a non-finite gradient is skipped."""
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        if torch.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def autocast():
    """bf16 where the CPU multiplies it fast."""
    return torch.autocast("cpu", torch.bfloat16)


# ------------------------------------------------------------------------------------------------------------
# Captions and pictures
# ------------------------------------------------------------------------------------------------------------

class Corpus:
    """Everything the stages train on: scenes, emoji and clothing with captions, and prompts for words only."""

    def __init__(self, folder: Path):
        self.emoji, self.clothing = ImageFiles(folder / "emoji"), ImageFiles(folder / "photos" / "clothing")
        self.pictures = {}                                                       # decoded once, kept

    def texts(self):
        """Captions of all sets and the prompt lists, for vocabularies and for T5."""
        prompts = Path(self.emoji.path).parent / "prompts"
        lines = [line.split("\t")[0] for line in (prompts / "PartiPrompts.tsv").read_text().splitlines()[1:]]
        for file in sorted((prompts / "t2i_compbench").glob("*.txt")):
            lines += file.read_text().splitlines()
        lines += [json.loads(line)["prompt"] for line in (prompts / "geneval_evaluation_metadata.jsonl").open()]
        for source in (self.emoji, self.clothing):
            lines += [caption for i in range(len(source)) for caption in source.captions(i)]
        scenes = [caption for i in range(8000) for caption in TRAIN_SCENES.captions(i)]
        return [" ".join(line.split()) for line in lines if line.strip()], scenes

    def picture(self, name: str, index: int) -> Image.Image:
        """A decoded picture of "emoji" or "clothing"."""
        if (name, index) not in self.pictures:
            self.pictures[name, index] = getattr(self, name).picture(index)
        return self.pictures[name, index]

    def random(self, name: str, rng):
        """The number of a random picture that is not held out."""
        return int(rng.integers(len(getattr(self, name)) - HELD_OUT))


# ------------------------------------------------------------------------------------------------------------
# Stage: tokenizers
# ------------------------------------------------------------------------------------------------------------

def train_tokenizers(corpus: Corpus, out: Path):
    """vocab.json and merges.txt in CLIP's layout (bytes, bytes that end a word, merges, start, end), and spiece.model."""
    prompts, scenes = corpus.texts()
    lines = prompts + scenes
    (out / "clip").mkdir(parents=True, exist_ok=True)
    (out / "t5").mkdir(exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = alphabet + [letter + "</w>" for letter in alphabet]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = clip_text_rules()
    bpe.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=2 * VOCABULARY, initial_alphabet=alphabet,
                                                       end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]][: VOCABULARY - len(symbols) - 2]
    tokens = symbols + [left + right for left, right in merges] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False,
                            separators=(",", ":"))
    (out / "clip" / "vocab.json").write_text(vocabulary)
    (out / "clip" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)) + "\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prompts + 4 * scenes), model_prefix=str(out / "t5" / "spiece"), vocab_size=VOCABULARY,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, normalization_rule_name="identity", minloglevel=1)
    (out / "t5" / "spiece.vocab").unlink()
    clip, t5 = CLIPTokenizer(out / "clip"), T5Tokenizer(out / "t5" / "spiece.model")
    for name, tokenizer, length in (("clip", clip, TEXT.clip_length), ("t5", t5, TEXT.t5_length)):
        for kind, texts in (("scenes", scenes), ("prompts", prompts)):
            needed = np.array(tokenizer(texts, length)[1])
            print(f"{name}: {kind} need {needed.mean():.1f} tokens, at most {needed.max()}; "
                  f"{(needed > length).mean():.1%} are cut to {length}")


# ------------------------------------------------------------------------------------------------------------
# Stage: CLIP
# ------------------------------------------------------------------------------------------------------------

def contrastive_loss(image_features, text_features, temperature, same):
    """CLIP's symmetric cross-entropy; `same` (B, B) marks pairs with equal captions, which count as matches too."""
    logits = F.normalize(image_features, dim=1) @ F.normalize(text_features, dim=1).T * temperature
    target = same / same.sum(dim=1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def clip_batch(corpus, step: int, size: int = 128):
    """size captioned pictures of 64 px: 3 in 4 scenes (mostly the full caption), the rest emoji and clothing."""
    rng = np.random.default_rng((11, step))
    images, captions = [], []
    for i in range(size):
        if i % 4:
            index = step * size + i
            images.append(to_tensor(TRAIN_SCENES.image(index, 64, 64)))
            captions.append(TRAIN_SCENES.captions(index)[int(rng.random() < 0.75)])
        else:
            name = "emoji" if i % 8 else "clothing"
            index = corpus.random(name, rng)
            images.append(to_tensor(resize_and_crop(corpus.picture(name, index), 64, 64)))
            captions.append(getattr(corpus, name).captions(index)[0])
    return torch.stack(images), captions


def train_clips(corpus, tokenizers: Path, minutes: float, out: Path):
    """Both CLIPs on the same batches. CLIP-L has no text projection: its image tower projects to the text's width."""
    towers = nn.ModuleDict({
        "clip_l": CLIPTextEncoder(CLIP_L), "clip_l_image": CLIPImageEncoder(CLIP_L_IMAGE),
        "clip_g": CLIPTextEncoder(CLIP_G), "clip_g_image": CLIPImageEncoder(CLIP_G_IMAGE)})
    for name in ("clip_l", "clip_g"):
        nn.init.normal_(towers[name].token_embedding.weight, std=0.02)
        nn.init.normal_(towers[name].position_embedding.weight, std=0.01)
    temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    tokenize = {"clip_l": CLIPTokenizer(tokenizers / "clip"), "clip_g": CLIPTokenizer(tokenizers / "clip", padding=0)}
    parameters = [*towers.parameters(), temperature]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.02)

    def features(name, images, captions):
        """Image and text vectors of one CLIP."""
        with autocast():
            pooled = towers[name](tokenize[name](captions, TEXT.clip_length)[0])[1]
            return towers[f"{name}_image"](images).float(), pooled.float()

    for step in Clock(minutes, {optimizer: 1e-3}):
        images, captions = clip_batch(corpus, step)
        ids = {caption: i for i, caption in enumerate(captions)}
        label = torch.tensor([ids[caption] for caption in captions])
        same = (label[:, None] == label[None]).float()
        scale = temperature.exp().clamp_max(100)
        losses = [contrastive_loss(*features(name, images, captions), scale, same) for name in ("clip_l", "clip_g")]
        update(sum(losses), parameters, [optimizer])
        if (step + 1) % 100 == 0:
            print("loss " + ", ".join(f"{loss.item():.3f}" for loss in losses), flush=True)
    with torch.no_grad():
        for name in ("clip_l", "clip_g"):
            print(f"{name}: caption retrieved among 64 held-out scenes: {retrieval(lambda *x: features(name, *x)):.1%}")
    save_file({k: v.contiguous() for k, v in towers.state_dict().items()}, out / "clip.safetensors")


def retrieval(features, sets: int = 8) -> float:
    """How often the right caption is the nearest of 64 to a held-out scene's picture, over several sets of 64."""
    hits = []
    for start in range(0, 64 * sets, 64):
        images = torch.stack([to_tensor(HELD_OUT_SCENES.image(i, 64, 64)) for i in range(start, start + 64)])
        image, text = features(images, [HELD_OUT_SCENES.captions(i)[1] for i in range(start, start + 64)])
        nearest = (F.normalize(image, dim=1) @ F.normalize(text, dim=1).T).argmax(dim=1)
        hits.append((nearest == torch.arange(64)).float().mean())
    return torch.stack(hits).mean().item()


# ------------------------------------------------------------------------------------------------------------
# Stage: T5
# ------------------------------------------------------------------------------------------------------------

def corrupt_spans(ids, rng, sentinel: int, rate: float = 0.25):
    """T5's objective on one list of ids: (with spans replaced by sentinels, the sentinels each followed by its span)."""
    source, target, i = [], [], 0
    while i < len(ids):
        if rng.random() < rate / 2:                                              # spans of 1 to 3, 2 on average
            n = int(rng.integers(1, 4))
            source.append(sentinel)
            target += [sentinel, *ids[i : i + n]]
            sentinel, i = sentinel + 1, i + n
        else:
            source.append(ids[i])
            i += 1
    return source + [1], target + [1]


class T5Decoder(nn.Module):
    """Two decoder layers, enough to give the encoder a reason: (ids (B, T), encoded (B, L, D)) -> logits (B, T, V)."""

    def __init__(self, config: T5Config, embedding: nn.Embedding, num_layers: int = 2):
        super().__init__()
        D, self.config = config.hidden_size, config
        self.position_bias = nn.Embedding(config.num_buckets, config.num_heads)
        self.layers = nn.ModuleList(nn.ModuleDict({
            "norm1": RMSNorm(D), "self_attention": T5Attention(config), "norm2": RMSNorm(D),
            "cross_attention": T5Attention(config), "norm3": RMSNorm(D), "feed_forward": T5FeedForward(config)})
            for _ in range(num_layers))
        self.final_norm, self.output = RMSNorm(D), nn.Linear(D, config.vocab_size, bias=False)
        self.embedding = [embedding]                                             # shared, owned by the encoder

    def forward(self, ids, encoded):
        position = torch.arange(ids.shape[1])
        distance = position[None] - position[:, None]                            # key - query
        bias = self.position_bias(relative_position_bucket(distance, bidirectional=False)).permute(2, 0, 1)[None]
        bias = bias.masked_fill(distance > 0, -torch.inf)
        x = self.embedding[0](ids)
        for layer in self.layers:
            x = x + layer["self_attention"](layer["norm1"](x), bias)
            x = x + layer["cross_attention"](layer["norm2"](x), None, encoded)
            x = x + layer["feed_forward"](layer["norm3"](x))
        return self.output(self.final_norm(x))


def train_t5(corpus, tokenizers: Path, minutes: float, out: Path):
    """Span corruption on captions and prompts; the encoder is kept."""
    backend = T5Tokenizer(tokenizers / "t5" / "spiece.model").backend
    prompts, scenes = corpus.texts()
    rows = [backend.encode(line)[:30] for line in prompts + scenes]
    encoder = T5Encoder(T5)
    nn.init.normal_(encoder.token_embedding.weight, std=1.0)
    decoder = T5Decoder(T5, encoder.token_embedding)
    for module in [*encoder.modules(), *decoder.modules()]:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if isinstance(module, T5Attention):
            nn.init.normal_(module.q.weight, std=(T5.hidden_size * 64) ** -0.5)  # in place of 1 / sqrt(d) in the logits
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0)
    for step in Clock(minutes, {optimizer: 2e-3}):
        rng = np.random.default_rng((13, step))
        pairs = [corrupt_spans(rows[rng.integers(len(rows))], rng, VOCABULARY) for _ in range(128)]
        padded = lambda lists: nn.utils.rnn.pad_sequence([torch.tensor(r) for r in lists], batch_first=True)
        source, target = padded([s for s, _ in pairs]), padded([t for _, t in pairs])
        shifted = F.pad(target[:, :-1], (1, 0))                                  # the decoder starts from padding
        with autocast():
            logits = decoder(shifted, encoder(source.clamp_max(T5.vocab_size - 1))).float()
        loss = F.cross_entropy(logits.flatten(0, 1), target.clamp_max(T5.vocab_size - 1).flatten(), ignore_index=0)
        update(loss, parameters, [optimizer])
        if (step + 1) % 100 == 0:
            print(f"loss {loss.item():.3f}", flush=True)
    save_file(encoder.state_dict(), out / "t5.safetensors")


# ------------------------------------------------------------------------------------------------------------
# Stage: autoencoder
# ------------------------------------------------------------------------------------------------------------

def random_crop(picture: Image.Image, size: int, rng):
    """A square of size px out of the picture at a random scale between "all of it" and its own pixels, maybe mirrored."""
    smallest = size / min(picture.size)
    scale = smallest + max(0, 1 - smallest) * rng.random()
    width, height = (max(size, round(side * scale)) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = int(rng.random() * (width - size + 1)), int(rng.random() * (height - size + 1))
    square = np.asarray(picture)[top : top + size, left : left + size]
    return square[:, ::-1] if rng.random() < 0.5 else square


def vae_batch(corpus, step: int):
    """8 squares of 64 px, or every fourth time 2 of 128 px: five in eight are scenes, two emoji, one clothing."""
    rng = np.random.default_rng((7, step))
    size, count = (64, 8) if step % 4 else (128, 2)
    squares = []
    for i in range(count):
        slot = i if count == 8 else (i + step // 4 * 2) % 8
        if slot < 5:
            squares.append(TRAIN_SCENES.image(step * 16 + i, size, size))
        else:
            name = "emoji" if slot < 7 else "clothing"
            squares.append(random_crop(corpus.picture(name, corpus.random(name, rng)), size, rng))
    return torch.stack([to_tensor(square) for square in squares])


@torch.no_grad()
def vae_quality(vae, corpus, count: int = 64) -> dict:
    """Mean PSNR in dB of held-out scenes (64 px), emoji (128 px) and clothing (256 px), deterministic encoding, fp32."""
    last = lambda name, size: [resize_and_crop(corpus.picture(name, len(getattr(corpus, name)) - 1 - i), size, size)
                               for i in range(min(count, HELD_OUT))]
    sets = {"scenes 64 px": [HELD_OUT_SCENES.image(i, 64, 64) for i in range(count)],
            "emoji 128 px": last("emoji", 128), "clothing 256 px": last("clothing", 256)}
    result = {}
    for name, pictures in sets.items():
        images = [to_tensor(picture)[None] for picture in pictures]
        result[name] = torch.cat([psnr(image, vae.decode(vae.encode(image))) for image in images]).mean().item()
    return result


def train_vae(corpus, minutes: float, out: Path):
    """L1 and KL, no adversary: PSNR is what later stages need. The average of the weights is what is kept."""
    vae = VAE(AUTOENCODER).to(memory_format=torch.channels_last)
    average = copy.deepcopy(vae)
    matrices = [p for name, p in vae.named_parameters()
                if p.dim() == 4 and name not in ("encoder.conv_in.weight", "decoder.conv_out.weight")]
    others = [p for p in vae.parameters() if all(p is not matrix for matrix in matrices)]
    adam, muon = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.0), Muon(matrices, lr=0.02)
    start = time.time()
    for step in Clock(minutes, {adam: 1e-3, muon: 0.02}, warmup=200):
        image = vae_batch(corpus, step).to(memory_format=torch.channels_last)
        height, width = (side // AUTOENCODER.downsampling for side in image.shape[2:])
        noise = torch.randn(len(image), AUTOENCODER.latent_channels, height, width,
                            generator=torch.Generator().manual_seed(step))
        kl_weight = 5e-4 if time.time() - start < 0.9 * 60 * minutes else 5e-3    # late: the decoder is good by then, and
        with autocast():                                                          # smoother codes cost it .1 dB
            loss, terms, _ = vae_loss(vae, image, noise, VAELossConfig(kl_weight=kl_weight))
        update(loss, vae.parameters(), [adam, muon])
        with torch.no_grad():
            for kept, new in zip(average.parameters(), vae.parameters()):
                kept.lerp_(new, 1 - min(0.999, (step + 1) / (step + 10)))
        if (step + 1) % 100 == 0:
            print(", ".join(f"{name} {value.item():.4f}" for name, value in terms.items()), flush=True)
        if (step + 1) % 1000 == 0:
            save_file({k: v.contiguous() for k, v in average.state_dict().items()}, out / "vae.safetensors")
    save_file({k: v.contiguous() for k, v in average.state_dict().items()}, out / "vae.safetensors")
    print({name: round(value, 2) for name, value in vae_quality(average, corpus).items()})


@torch.no_grad()
def latent_statistics(vae, count: int = 2048):
    """One global mean and standard deviation of the raw codes of scenes (App. B.2)."""
    codes = []
    for start in range(0, count, 64):
        images = torch.stack([to_tensor(TRAIN_SCENES.image(i, 64, 64)) for i in range(start, start + 64)])
        codes.append(vae.encode_moments(images)[0])
    codes = torch.cat(codes)
    return codes.mean().item(), codes.std().item()


def assemble(corpus, work: Path, out: Path):
    """Everything but the MM-DiT into one bf16 file, the image towers into another (they serve metrics, not sampling)."""
    if (out / "model.safetensors").is_file() and read_network("mmdit", out / "model.safetensors"):
        sys.exit(f"{out}/model.safetensors holds an MM-DiT, which this stage would drop; give another folder with --out")
    vae = VAE(AUTOENCODER)
    vae.load_state_dict(load_file(work / "vae.safetensors"))
    mean, std = latent_statistics(vae.eval())
    vae.config = VAEConfig(16, AUTOENCODER.channels, AUTOENCODER.norm_groups, vae_scale=1 / std, vae_shift=mean)
    print(f"latents: mean {mean:.4f}, std {std:.4f}; PSNR {vae_quality(vae, corpus)}")
    clip = load_file(work / "clip.safetensors")
    part = lambda name: {key.removeprefix(name + "."): v for key, v in clip.items() if key.startswith(name + ".")}
    networks = {"vae": vae, "clip_l": CLIPTextEncoder(CLIP_L), "clip_g": CLIPTextEncoder(CLIP_G), "t5": T5Encoder(T5)}
    networks["clip_l"].load_state_dict(part("clip_l"))
    networks["clip_g"].load_state_dict(part("clip_g"))
    networks["t5"].load_state_dict(load_file(work / "t5.safetensors"))
    save_networks(out / "model.safetensors", networks, TEXT, dtype=torch.bfloat16)
    towers = {f"{name}.{key}": v.bfloat16() for name in ("clip_l_image", "clip_g_image") for key, v in part(name).items()}
    save_file(towers, out / "clip_image.safetensors")
    print(Counter({name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}))


def train_pooled_only(minutes: float, work: Path, out: Path):
    """The MM-DiT's first stage. No text tokens: Sec. 4's "coarse-grained" pooled vector is all it gets, so a step costs a
    third, and most of what there is to learn at first (one object is one object, shapes) needs no more."""
    config = complete(TrainConfig(encoders=str(out), num_scenes=65536, optimizer="muon", timestep_shift=2.0, compile=True,
                                  encoder_dropout=0.3, full_captions=0.7))
    s = set_up(config, World("cpu"), print)
    adam, muon = s.optimizers
    for step in Clock(minutes, {adam: 6e-4, muon: 0.01}, warmup=300):     # twice that, and the loss stands still until it falls
        batch = s.batches(step)
        loss, *_ = train_step(s.model, s.optimizers, replace(batch, context=batch.context[:, :0]), s.formulation, config,
                              s.autocast)
        with torch.no_grad():
            torch._foreach_lerp_(list(s.average.parameters()), [p.detach() for p in s.model.parameters()],
                                 1 - min(0.9995, (step + 1) / (step + 10)))
        if (step + 1) % 100 == 0:
            print(f"loss {loss.mean().item():.3f}", flush=True)
        if (step + 1) % 5000 == 0:
            save_networks(work / "mmdit.safetensors", {"mmdit": s.average})
    save_networks(work / "mmdit.safetensors", {"mmdit": s.average})


def ship(run: Path, out: Path):
    """The frozen networks that are in place and the MM-DiT of a run, in one bf16 file."""
    parts = load_components(out, ("vae", "text"))
    trained = load_components(run, ("mmdit",))
    networks = {"mmdit": trained.mmdit, "vae": parts.vae, **parts.text.encoders}
    save_networks(out / "model.safetensors", networks, parts.text.config, trained.sampling, torch.bfloat16)
    print(f"{sum(p.stat().st_size for p in out.rglob('*') if p.is_file()) / 1e6:.2f} MB in {out}")


def main():
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with emoji/, photos/ and prompts/, as the model card describes")
    parser.add_argument("--stage", default="all",
                        choices=("all", "tokenizers", "clip", "t5", "vae", "assemble", "mmdit", "ship"))
    parser.add_argument("--minutes", type=float, help="of the chosen stage; default clip 12, t5 4, vae 38, mmdit 50")
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"), help="for the stage ship: a run folder of train.py")
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="where the stages leave their weights")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    config = parser.parse_args()
    if config.stage == "ship":
        return ship(config.run, config.out)
    if config.stage != "mmdit" and not (config.data and config.data.is_dir()):
        parser.error(f"--data {config.data}: no such folder; all stages but mmdit and ship read pictures or captions there")
    torch.manual_seed(0)
    config.work.mkdir(parents=True, exist_ok=True)
    config.out.mkdir(parents=True, exist_ok=True)
    corpus, tokenizers = Corpus(config.data) if config.data else None, config.out / "tokenizers"
    stages = {"tokenizers": lambda: train_tokenizers(corpus, tokenizers),
              "clip": lambda: train_clips(corpus, tokenizers, config.minutes or 12, config.work),
              "t5": lambda: train_t5(corpus, tokenizers, config.minutes or 4, config.work),
              "vae": lambda: train_vae(corpus, config.minutes or 38, config.work),
              "assemble": lambda: assemble(corpus, config.work, config.out),
              "mmdit": lambda: train_pooled_only(config.minutes or 50, config.work, config.out)}
    for name in stages if config.stage == "all" else [config.stage]:
        print(f"== {name}", flush=True)
        stages[name]()


if __name__ == "__main__":
    main()
