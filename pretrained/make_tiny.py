"""make_tiny.py: makes the networks that the paper takes as given, from captions and pictures only.

The paper starts from released CLIP-L, CLIP-G and T5-XXL and from an autoencoder. The small model
that ships needs small ones. This file trains them on a CPU, one stage after the other. Every stage
is a model, a loss and batches for train.fit.

    tokenizers   CLIP's byte-level BPE and T5's SentencePiece
    clip         CLIP-L and CLIP-G with their image towers, contrastively, with near-miss captions
                 (Radford et al. 2021)
    t5           the encoder of a small T5 v1.1, by span corruption (Raffel et al. 2019); its
                 decoder is thrown away
    vae          the autoencoder: L1 and KL
    assemble     measures the latents (App. B.2) and writes everything into one bf16 file
    ship         adds the MM-DiT of a run of train.py (--run) to that file

Data        scenes (drawn), emoji and clothing photographs (free licences), prompt lists for the
            vocabulary. The last 100 emoji, the last 100 photographs and every scene of another seed
            are held out
Not here    the MM-DiT, which train.py trains
Run         python pretrained/make_tiny.py --data DATA --stage clip [--steps 3000]
"""

import argparse
import json
import math
import shlex
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from checkpoints import SHIPPED, load_components, save_networks  # noqa: E402
from data import ImageFiles, read_image, read_lines, resize_and_crop, to_tensor  # noqa: E402
from devices import command  # noqa: E402
from metrics import CLIPImageConfig, CLIPImageEncoder, psnr  # noqa: E402
from scenes import (  # noqa: E402
    COLORS, COUNTS, OPPOSITE, SHAPES, SIZES, WORDS, Scenes, draw_scene, is_held_out, make_scene,
    scene_captions, vocabulary)
from text_encoders import (  # noqa: E402
    CLIPConfig, CLIPTextEncoder, CLIPTokenizer, RMSNorm, T5Attention, T5Config, T5Encoder,
    T5FeedForward, T5Tokenizer, TextConfig, clip_text_rules, relative_position_bucket)
from train import Run, TrainConfig, fit  # noqa: E402
from vae import VAE, VAEConfig, vae_loss  # noqa: E402

VOCABULARY, SENTINELS = 2048, 16
TEXT = TextConfig(clip_l_width=64, clip_g_width=128, t5_width=192, clip_length=20, t5_length=20)
CLIP_L = CLIPConfig(VOCABULARY, 64, 3, max_length=24, activation="quick_gelu")
CLIP_G = CLIPConfig(VOCABULARY, 128, 3, max_length=24, activation="gelu", projection_dim=128)
CLIP_L_IMAGE = CLIPImageConfig(64, 8, 128, 4, projection_dim=64, activation="quick_gelu")
CLIP_G_IMAGE = CLIPImageConfig(64, 8, 128, 4, projection_dim=128, activation="gelu")
T5_CONFIG = T5Config(VOCABULARY + SENTINELS, 192, ff_size=256, num_layers=2, num_heads=3)
AUTOENCODER = VAEConfig(16, (32, 64, 64, 64), norm_groups=8)
HELD_OUT = 100  # emoji and photographs
TRAIN_SEED, HELD_OUT_SEED = 1, 2  # of scenes
NEAR_MISSES = 4  # wrong captions for each picture of CLIP's batches


# ---- Captions and pictures -----------------------------------------------------------------------

class Corpus:
    """What the stages train on besides scenes: emoji, photographs of clothing, and prompts for
    their words only."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.sources = {
            "emoji": ImageFiles(folder / "emoji"),
            "clothing": ImageFiles(folder / "photos" / "clothing")}
        self.decoded = {}

    def picture(self, name: str, index: int) -> Image.Image:
        """A picture of "emoji" or "clothing". It is decoded once and kept."""
        if (name, index) not in self.decoded:
            self.decoded[name, index] = read_image(self.sources[name].records[index])
        return self.decoded[name, index]

    def draw(self, name: str, rng) -> int:
        """The number of a random picture that is not held out."""
        return int(rng.integers(len(self.sources[name]) - HELD_OUT))

    def last(self, name: str, size: int, count: int = 64) -> list[Image.Image]:
        """Held-out pictures, size x size px."""
        pictures = []
        for i in range(count):
            picture = self.picture(name, len(self.sources[name]) - 1 - i)
            pictures.append(resize_and_crop(picture, size, size))
        return pictures

    def prompts(self) -> list[str]:
        """Captions of emoji and clothing, and the public prompt lists."""
        lines = []
        for line in read_lines(self.folder / "prompts" / "PartiPrompts.tsv")[1:]:
            lines.append(line.split("\t")[0])
        for file in sorted((self.folder / "prompts" / "t2i_compbench").glob("*.txt")):
            lines += read_lines(file)
        for line in read_lines(self.folder / "prompts" / "geneval_evaluation_metadata.jsonl"):
            lines.append(json.loads(line)["prompt"])
        for source in self.sources.values():
            for index in range(len(source)):
                lines += source.captions(index)
        return [" ".join(line.split()) for line in lines if line.strip()]


def scene_texts(count: int = 8000) -> list[str]:
    """Both captions of the first training scenes, and every single word of the drawn world."""
    texts = sorted(vocabulary())
    source = Scenes(count, TRAIN_SEED)
    for index in range(count):
        texts += [caption for caption in source.captions(index) if caption]
    return texts


def adamw(steps: int, **settings) -> TrainConfig:
    """How a stage trains."""
    return TrainConfig(steps=steps, optimizer="adamw", **settings)


def save_weights(network: nn.Module, file: Path):
    """All tensors of a network under their own names."""
    tensors = {}
    for name, tensor in network.state_dict().items():
        tensors[name] = tensor.contiguous()
    save_file(tensors, file)


# ---- Stage: tokenizers ---------------------------------------------------------------------------

def train_tokenizers(corpus: Corpus, out: Path):
    """Writes clip/vocab.json and clip/merges.txt in CLIP's layout, and t5/spiece.model.

    CLIP's ids are bytes, bytes that end a word, merges, start token, end token.
    """
    prompts, scenes = corpus.prompts(), scene_texts()
    (out / "clip").mkdir(parents=True, exist_ok=True)
    (out / "t5").mkdir(exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = alphabet + [letter + "</w>" for letter in alphabet]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = clip_text_rules()
    trainer = trainers.BpeTrainer(
        vocab_size=2 * VOCABULARY, initial_alphabet=alphabet, end_of_word_suffix="</w>",
        show_progress=False)
    bpe.train_from_iterator(prompts + scenes, trainer)
    merges = []
    for left, right in json.loads(bpe.to_str())["model"]["merges"]:
        merges.append((left, right))
    merges = merges[: VOCABULARY - len(symbols) - 2]
    tokens = symbols + [left + right for left, right in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    numbers = {token: number for number, token in enumerate(tokens)}
    (out / "clip" / "vocab.json").write_text(json.dumps(numbers, ensure_ascii=False))
    lines = ["#version: 0.2"] + [f"{left} {right}" for left, right in merges]
    (out / "clip" / "merges.txt").write_text("\n".join(lines) + "\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prompts + 4 * scenes), model_prefix=str(out / "t5" / "spiece"),
        vocab_size=VOCABULARY, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        normalization_rule_name="nmt_nfkc_cf", minloglevel=1)
    (out / "t5" / "spiece.vocab").unlink()
    report_lengths("clip", CLIPTokenizer(out / "clip"), TEXT.clip_length, scenes, prompts)
    report_lengths("t5", T5Tokenizer(out / "t5" / "spiece.model"), TEXT.t5_length, scenes, prompts)


def report_lengths(name: str, tokenizer, length: int, scenes, prompts):
    """Prints how many tokens captions need, and how many of them are cut."""
    for kind, texts in (("scenes", scenes), ("prompts", prompts)):
        needed = tokenizer(texts, length)[1].float()
        print(
            f"{name}: {kind} need {needed.mean():.1f} tokens, at most {needed.max():.0f}; "
            f"{(needed > length).float().mean():.1%} are cut to {length}")


# ---- Stage: CLIP ---------------------------------------------------------------------------------

def swap(scene, **fields):
    """The scene with some fields of its two things exchanged, e.g. color=True."""
    first, second = scene.things
    first_new = {name: getattr(second, name) for name in fields}
    second_new = {name: getattr(first, name) for name in fields}
    return replace(scene, things=(replace(first, **first_new), replace(second, **second_new)))


def other(names, name: str, rng) -> str:
    """Another one of these names."""
    names = [candidate for candidate in names if candidate != name]
    return names[rng.integers(len(names))]


def change(scene, field: str, names, rng):
    """The scene with one field of one thing (of all, if they are counted) changed."""
    number = rng.integers(len(scene.things))
    value = other(names, getattr(scene.things[number], field), rng)
    things = list(scene.things)
    for i in range(len(things)):
        if scene.kind == "count" or i == number:
            things[i] = replace(things[i], **{field: value})
    return replace(scene, things=tuple(things))


def recount(scene, rng):
    """A counted scene with another number of things."""
    number = int(other(tuple(COUNTS), len(scene.things), rng))
    return replace(scene, things=(number * scene.things)[:number])


def near_miss(scene, kind: str, rng):
    """A scene that differs from this one in one respect; None where that respect does not apply.

    kind: "color" and "shape" exchange those of two things, or change one; "relation" is the
    opposite; "count";
    "size"; "word".
    """
    pair = scene.kind == "pair"
    if kind == "relation":
        return replace(scene, relation=OPPOSITE[scene.relation]) if scene.relation else None
    if kind == "count":
        return recount(scene, rng) if scene.kind == "count" else None
    if kind == "word":
        return replace(scene, word=other(WORDS, scene.word, rng)) if scene.word else None
    if not scene.things:
        return None
    if kind == "size":
        return change(scene, "size", tuple(SIZES), rng)
    if pair and getattr(scene.things[0], kind) != getattr(scene.things[1], kind):
        return swap(scene, **{kind: True})
    return change(scene, kind, {"color": tuple(COLORS), "shape": SHAPES}[kind], rng)


def near_captions(scene, rng) -> list[str]:
    """NEAR_MISSES full captions of scenes that are almost this one. None of them is right."""
    captions = []
    right = scene_captions(scene)[1]
    fallback = "size" if scene.things else "word"
    kinds = list(rng.permutation(["color", "shape", "relation", "count", "size", "word"]))
    while len(captions) < NEAR_MISSES:
        kind = kinds.pop() if kinds else fallback
        almost = near_miss(scene, str(kind), rng)
        if almost is not None and not never_drawn(almost) and scene_captions(almost)[1] != right:
            captions.append(scene_captions(almost)[1])
    return captions


def never_drawn(scene) -> bool:
    """Whether training leaves out this combination. As a near miss it would only ever be wrong."""
    shapes = [thing.shape for thing in scene.things]
    colors = [thing.color for thing in scene.things]
    return is_held_out(shapes, colors, scene.relation)


@dataclass
class ClipBatch:
    """B pictures, their captions and after these their near misses."""

    image: torch.Tensor  # (B, 3, 64, 64)
    ids_l: torch.Tensor  # (B + B * NEAR_MISSES, L)
    ids_g: torch.Tensor  # the same with CLIP-G's padding
    same: torch.Tensor  # (B, B) float, 1 where two captions are equal


class ClipBatches:
    """Three pictures in four are scenes, mostly with their full caption. The rest are emoji and
    clothing."""

    def __init__(self, corpus: Corpus, tokenizers: Path, size: int):
        self.corpus, self.size = corpus, size
        self.tokenize_l = CLIPTokenizer(tokenizers / "clip")
        self.tokenize_g = CLIPTokenizer(tokenizers / "clip", padding=0)

    def sample(self, index: int, rng):
        """(picture, caption, near misses) of a sample."""
        if index % 4:
            scene = make_scene(TRAIN_SEED, index)
            caption = scene_captions(scene)[int(rng.random() < 0.75)]
            return draw_scene(scene), caption, near_captions(scene, rng)
        name = "emoji" if index % 8 else "clothing"
        number = self.corpus.draw(name, rng)
        picture = resize_and_crop(self.corpus.picture(name, number), 64, 64)
        misses = []
        for _ in range(NEAR_MISSES):
            wrong = self.corpus.draw(name, rng)
            misses.append(self.corpus.sources[name].captions(wrong)[0])
        return picture, self.corpus.sources[name].captions(number)[0], misses

    def __call__(self, step: int) -> ClipBatch:
        rng = np.random.default_rng((11, step))
        images, captions, misses = [], [], []
        for i in range(self.size):
            picture, caption, wrong = self.sample(step * self.size + i, rng)
            images.append(to_tensor(picture))
            captions.append(caption)
            misses += wrong
        number = {caption: i for i, caption in enumerate(captions)}
        label = torch.tensor([number[caption] for caption in captions])
        same = (label[:, None] == label[None]).float()
        ids_l = self.tokenize_l(captions + misses, TEXT.clip_length)[0]
        ids_g = self.tokenize_g(captions + misses, TEXT.clip_length)[0]
        return ClipBatch(torch.stack(images), ids_l, ids_g, same)


class Clips(nn.Module):
    """Both CLIPs: text encoders, image towers, one temperature. CLIP-L has no text projection."""

    def __init__(self):
        super().__init__()
        self.clip_l, self.clip_l_image = CLIPTextEncoder(CLIP_L), CLIPImageEncoder(CLIP_L_IMAGE)
        self.clip_g, self.clip_g_image = CLIPTextEncoder(CLIP_G), CLIPImageEncoder(CLIP_G_IMAGE)
        self.temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        for text in (self.clip_l, self.clip_g):
            nn.init.normal_(text.token_embedding.weight, std=0.02)
            nn.init.normal_(text.position_embedding.weight, std=0.01)

    def forward(self, image, ids_l, ids_g):
        """Unit vectors of pictures and of texts, for CLIP-L and then for CLIP-G."""
        image_l = F.normalize(self.clip_l_image(image).float(), dim=1)
        text_l = F.normalize(self.clip_l(ids_l)[1].float(), dim=1)
        image_g = F.normalize(self.clip_g_image(image).float(), dim=1)
        text_g = F.normalize(self.clip_g(ids_g)[1].float(), dim=1)
        return (image_l, text_l), (image_g, text_g)


def contrastive_loss(image, text, same, scale):
    """CLIP's symmetric cross-entropy, where a picture must also prefer its caption to its near
    misses. Returns (B,).

    image (B, d); text (B + B * NEAR_MISSES, d); same (B, B): pictures with equal
    captions count as matches too.
    """
    B = len(image)
    target = same / same.sum(dim=1, keepdim=True)  # (B, B)
    logits = scale * image @ text[:B].T  # (B, B)
    misses = text[B:].unflatten(0, (B, NEAR_MISSES))  # (B, misses, d)
    near = scale * (image[:, None] * misses).sum(dim=2)  # (B, misses)
    nothing = target.new_zeros(near.shape)
    text_of_image = F.cross_entropy(
        torch.cat([logits, near], dim=1), torch.cat([target, nothing], dim=1), reduction="none")
    image_of_text = F.cross_entropy(logits.T, target, reduction="none")
    return (text_of_image + image_of_text) / 2


def clip_loss(model, batch: ClipBatch):
    """The sum of the losses of both CLIPs, (B,)."""
    scale = model.temperature.exp().clamp_max(100)
    large, huge = model(batch.image, batch.ids_l, batch.ids_g)
    return contrastive_loss(*large, batch.same, scale) + contrastive_loss(*huge, batch.same, scale)


@torch.no_grad()
def swap_tests(clips, batches: ClipBatches, count: int = 500) -> dict:
    """{clip: {kind of near miss: how often a held-out picture prefers its full caption to it}}."""
    scores = {"clip_l": {}, "clip_g": {}}
    for kind in ("color", "shape", "relation", "count", "size", "word"):
        images, captions, wrong = [], [], []
        rng = np.random.default_rng(17)
        for index in range(8 * count):
            scene = make_scene(HELD_OUT_SEED, index)
            almost = near_miss(scene, kind, rng)
            if len(images) < count and almost is not None:
                images.append(to_tensor(draw_scene(scene)))
                captions.append(scene_captions(scene)[1])
                wrong.append(scene_captions(almost)[1])
        ids_l = batches.tokenize_l(captions + wrong, TEXT.clip_length)[0]
        ids_g = batches.tokenize_g(captions + wrong, TEXT.clip_length)[0]
        for name, (image, text) in zip(scores, clips(torch.stack(images), ids_l, ids_g)):
            right, miss = text.chunk(2)
            prefers = (image * right).sum(dim=1) > (image * miss).sum(dim=1)
            scores[name][kind] = round(prefers.float().mean().item(), 3)
    return scores


def train_clips(corpus, tokenizers: Path, steps: int, work: Path):
    """Both CLIPs on the same batches."""
    torch.manual_seed(0)
    clips = Clips()
    batches = ClipBatches(corpus, tokenizers, 64)
    config = adamw(steps, batch_size=64, lr=1e-3, warmup_steps=100, cooldown=0.9, ema=0.99)
    with sdpa_kernel(SDPBackend.MATH):  # .66 s a step on one core; torch's choice takes .88 s
        clips = fit(clips, clip_loss, batches, config, Run(work / "clip-run", config)).eval()
    scores = swap_tests(clips, batches)
    print(json.dumps(scores, indent=1))
    save_weights(clips, work / "clip.safetensors")


# ---- Stage: T5 -----------------------------------------------------------------------------------

def corrupt_spans(ids, rng, rate: float = 0.25):
    """T5's objective on one list of ids: (source with spans replaced by sentinels, target with the
    spans)."""
    source, target, i, sentinel = [], [], 0, VOCABULARY
    while i < len(ids):
        if (
            rng.random() < rate / 2 and sentinel < VOCABULARY + SENTINELS - 1
        ):  # spans of 1 to 3 tokens
            n = int(rng.integers(1, 4))
            source.append(sentinel)
            target += [sentinel, *ids[i : i + n]]
            sentinel += 1
            i += n
        else:
            source.append(ids[i])
            i += 1
    return source + [1], target + [1]


class T5Decoder(nn.Module):
    """Two decoder layers, which give the encoder something to do. ids (B, T), encoded (B, L, D) ->
    logits (B, T, V)."""

    def __init__(self, config: T5Config, embedding: nn.Embedding, num_layers: int = 2):
        super().__init__()
        D = config.hidden_size
        self.position_bias = nn.Embedding(config.num_buckets, config.num_heads)
        self.layers = nn.ModuleList()
        for _ in range(num_layers):
            self.layers.append(
                nn.ModuleDict(
                    {
                        "norm1": RMSNorm(D),
                        "self_attention": T5Attention(config),
                        "norm2": RMSNorm(D),
                        "cross_attention": T5Attention(config),
                        "norm3": RMSNorm(D),
                        "feed_forward": T5FeedForward(config),
                    }
                )
            )
        self.final_norm, self.output = RMSNorm(D), nn.Linear(D, config.vocab_size, bias=False)
        self.embedding = [embedding]  # a list, so that the encoder alone owns its parameters

    def forward(self, ids, encoded):
        position = torch.arange(ids.shape[1])
        distance = position[None] - position[:, None]  # key - query
        bucket = relative_position_bucket(distance, bidirectional=False)
        bias = self.position_bias(bucket).permute(2, 0, 1)[None]  # (1, heads, T, T)
        bias = bias.masked_fill(distance > 0, -torch.inf)
        x = self.embedding[0](ids)
        for layer in self.layers:
            x = x + layer["self_attention"](layer["norm1"](x), bias)
            x = x + layer["cross_attention"](layer["norm2"](x), None, encoded)
            x = x + layer["feed_forward"](layer["norm3"](x))
        return self.output(self.final_norm(x))


class T5(nn.Module):
    """Encoder and decoder, initialised as T5 is: no 1 / sqrt(d) in the logits, so the queries begin
    small."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.encoder = T5Encoder(config)
        nn.init.normal_(self.encoder.token_embedding.weight, std=1.0)
        self.decoder = T5Decoder(config, self.encoder.token_embedding)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for module in self.modules():
            if isinstance(module, T5Attention):
                nn.init.normal_(module.q.weight, std=(config.hidden_size * 64) ** -0.5)

    def forward(self, source, target):
        """Logits (B, T, V) of the target, which the decoder sees one token late."""
        return self.decoder(F.pad(target[:, :-1], (1, 0)), self.encoder(source))


class SpanBatches:
    """Captions and prompts with spans cut out: (source (B, L), target (B, T)), padded with 0."""

    def __init__(self, corpus: Corpus, tokenizers: Path, size: int):
        tokenizer = T5Tokenizer(tokenizers / "t5" / "spiece.model")
        self.size, self.rows = size, []
        for ids, needed in zip(*tokenizer(corpus.prompts() + 2 * scene_texts(16000), 30)):
            self.rows.append(ids[: min(needed, 30) - 1].tolist())        # without the end token

    def __call__(self, step: int):
        rng = np.random.default_rng((13, step))
        sources, targets = [], []
        for number in rng.integers(len(self.rows), size=self.size):
            source, target = corrupt_spans(self.rows[number], rng)
            sources.append(torch.tensor(source))
            targets.append(torch.tensor(target))
        return (
            nn.utils.rnn.pad_sequence(sources, batch_first=True),
            nn.utils.rnn.pad_sequence(targets, batch_first=True))


def t5_loss(model, batch):
    """Cross-entropy of the target's tokens, averaged over each sample: (B,)."""
    source, target = batch
    logits = model(source, target).float()  # (B, T, V)
    losses = F.cross_entropy(logits.transpose(1, 2), target, ignore_index=0, reduction="none")
    return losses.sum(dim=1) / (target != 0).sum(dim=1).clamp_min(1)


def train_t5(corpus, tokenizers: Path, steps: int, work: Path):
    """Span corruption on captions and prompts. The encoder is kept."""
    torch.manual_seed(0)
    config = adamw(steps, batch_size=128, lr=2e-3, warmup_steps=100, cooldown=0.9, ema=0.99)
    model = fit(
        T5(T5_CONFIG), t5_loss, SpanBatches(corpus, tokenizers, 128), config,
        Run(work / "t5-run", config))
    save_weights(model.encoder, work / "t5.safetensors")


# ---- Stage: autoencoder --------------------------------------------------------------------------

def random_crop(picture: Image.Image, size: int, rng):
    """A size x size square out of a picture at a random scale, half of the time mirrored."""
    smallest = size / min(picture.size)
    scale = smallest + max(0, 1 - smallest) * rng.random()
    width = max(size, round(picture.width * scale))
    height = max(size, round(picture.height * scale))
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    left = int(rng.random() * (width - size + 1))
    top = int(rng.random() * (height - size + 1))
    square = pixels[top : top + size, left : left + size]
    return square[:, ::-1] if rng.random() < 0.5 else square


class Squares:
    """8 squares of 64 px, every fourth time 2 of 128 px: five in eight are scenes, two emoji, one
    clothing.

    A batch is (image (B, 3, 8H, 8W), noise (B, C, H, W), weight of the KL term). In the last tenth
    of the steps that weight is ten times as high: the decoder is good by then, and smoother codes
    cost it .1 dB.
    """

    def __init__(self, corpus: Corpus, channels: int, steps: int):
        self.corpus, self.channels, self.steps = corpus, channels, steps

    def __call__(self, step: int):
        rng = np.random.default_rng((7, step))
        size, count = (64, 8) if step % 4 else (128, 2)
        squares = []
        for i in range(count):
            slot = i if count == 8 else (i + step // 4 * 2) % 8
            if slot < 5:
                scene = make_scene(TRAIN_SEED, step * 16 + i, size, size)
                squares.append(to_tensor(draw_scene(scene)))
            else:
                name = "emoji" if slot < 7 else "clothing"
                picture = self.corpus.picture(name, self.corpus.draw(name, rng))
                squares.append(to_tensor(random_crop(picture, size, rng)))
        noise_rng = torch.Generator().manual_seed(step)
        noise = torch.randn(count, self.channels, size // 8, size // 8, generator=noise_rng)
        kl_weight = 5e-4 if step < 0.9 * self.steps else 5e-3
        return torch.stack(squares), noise, kl_weight


def autoencoder_loss(vae, batch):
    """L1 and KL of one batch, the same number for each of its pictures: (B,)."""
    image, noise, kl_weight = batch
    loss, _, _ = vae_loss(vae, image, noise, kl_weight)
    return loss.expand(len(image))


@torch.no_grad()
def vae_quality(vae, corpus, count: int = 64) -> dict:
    """Mean PSNR in dB of held-out scenes (64 px), emoji (128 px) and clothing (256 px), with mean
    codes in fp32."""
    scenes = [draw_scene(make_scene(HELD_OUT_SEED, i)) for i in range(count)]
    sets = {
        "scenes 64 px": scenes, "emoji 128 px": corpus.last("emoji", 128, count),
        "clothing 256 px": corpus.last("clothing", 256, count)}
    quality = {}
    for name, pictures in sets.items():
        values = []
        for picture in pictures:
            image = to_tensor(picture)[None]
            values.append(psnr(image, vae.decode(vae.encode(image))).item())
        quality[name] = round(float(np.mean(values)), 2)
    return quality


def train_vae(corpus, steps: int, work: Path, channels: int):
    """L1 and KL, no adversary: later stages need fidelity. The average of the weights is kept."""
    torch.manual_seed(0)
    config = adamw(steps, batch_size=8, lr=1e-3, warmup_steps=200, cooldown=1.0, ema=0.999)
    vae = VAE(replace(AUTOENCODER, latent_channels=channels))
    batches = Squares(corpus, channels, steps)
    vae = fit(vae, autoencoder_loss, batches, config, Run(work / "vae-run", config))
    save_weights(vae, work / "vae.safetensors")
    print(vae_quality(vae, corpus))


@torch.no_grad()
def latent_statistics(vae, count: int = 2048):
    """One global mean and standard deviation of the raw codes of scenes (App. B.2)."""
    codes = []
    for start in range(0, count, 64):
        pictures = [to_tensor(draw_scene(make_scene(TRAIN_SEED, start + i))) for i in range(64)]
        codes.append(vae.encode_moments(torch.stack(pictures))[0])
    codes = torch.cat(codes)
    return codes.mean().item(), codes.std().item()


# ---- Stages: put together ------------------------------------------------------------------------

def load_part(work: Path, file: str, prefix: str, network: nn.Module):
    """The network with the tensors of work/file whose names begin with prefix."""
    tensors = {}
    for name, x in load_file(work / file).items():
        if name.startswith(prefix):
            tensors[name.removeprefix(prefix)] = x
    network.load_state_dict(tensors)
    return network.eval()


def assemble(corpus, work: Path, out: Path, vae_from: Path | None):
    """Writes everything but the MM-DiT into one bf16 file, and the image towers into another, as
    only metrics need them. results/tiny-frozen.json says how good they are.

    vae_from: a model whose autoencoder is kept, in place of work/vae.safetensors.
    """
    if vae_from:
        vae = load_components(vae_from, ("vae",)).vae
    else:
        vae = load_part(work, "vae.safetensors", "", VAE(AUTOENCODER))
    mean, std = latent_statistics(vae)
    vae.config = replace(vae.config, vae_scale=1 / std, vae_shift=mean)
    networks = {
        "vae": vae,
        "clip_l": load_part(work, "clip.safetensors", "clip_l.", CLIPTextEncoder(CLIP_L)),
        "clip_g": load_part(work, "clip.safetensors", "clip_g.", CLIPTextEncoder(CLIP_G)),
        "t5": load_part(work, "t5.safetensors", "", T5Encoder(T5_CONFIG))}
    out.mkdir(parents=True, exist_ok=True)
    save_networks(out / "model.safetensors", networks, TEXT, dtype=torch.bfloat16)
    towers = {}
    for name, x in load_file(work / "clip.safetensors").items():
        if name.startswith(("clip_l_image.", "clip_g_image.")):
            towers[name] = x.bfloat16()
    save_file(towers, out / "clip_image.safetensors")
    if out / "tokenizers" != work / "tokenizers":
        shutil.copytree(work / "tokenizers", out / "tokenizers", dirs_exist_ok=True)
    clips = load_part(work, "clip.safetensors", "", Clips())
    batches = ClipBatches(corpus, work / "tokenizers", 64)
    record = {
        "command": shlex.join(["python", *sys.argv]), "latents": {"mean": mean, "std": std},
        "psnr": vae_quality(vae, corpus),
        "prefers its caption to a near miss": swap_tests(clips, batches)}
    text = json.dumps(record, indent=1) + "\n"
    (ROOT / "results" / "tiny-frozen.json").write_text(text)
    print(text)


def ship(run: Path, encoders: Path, out: Path, guidance_scale: float):
    """The frozen networks of `encoders` and the MM-DiT of a run, in one bf16 file, with the image
    towers and the tokenizers of `encoders` beside it. guidance_scale: what the file asks for."""
    parts = load_components(encoders, ("vae", "text"))
    trained = load_components(run, ("mmdit",))
    trained.sampling["guidance_scale"] = guidance_scale
    out.mkdir(parents=True, exist_ok=True)
    networks = {"mmdit": trained.mmdit, "vae": parts.vae, **parts.text.encoders}
    save_networks(
        out / "model.safetensors", networks, parts.text.config, trained.sampling, torch.bfloat16,
        trained.words, trained.sizes)
    if encoders.resolve() != out.resolve():
        shutil.copytree(encoders / "tokenizers", out / "tokenizers", dirs_exist_ok=True)
        shutil.copy(encoders / "clip_image.safetensors", out)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{size / 1e6:.2f} MB in {out}")


STEPS = {"clip": 3000, "t5": 3000, "vae": 12000}


def main():
    """Runs the stages."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--data", type=Path,
        help="folder with emoji/, photos/ and prompts/, as the model card describes")
    parser.add_argument(
        "--stage", required=True, choices=("tokenizers", "clip", "t5", "vae", "assemble", "ship"))
    parser.add_argument(
        "--steps", type=int, default=0, help="of the stage; default: clip 3000, t5 3000, vae 12000")
    parser.add_argument(
        "--channels", type=int, default=16, help="latent channels of the autoencoder")
    parser.add_argument(
        "--vae-from", type=Path, help="stage assemble: keep the autoencoder of this model")
    parser.add_argument("--run", type=Path, help="stage ship: a run folder of train.py")
    parser.add_argument(
        "--encoders", type=Path, default=SHIPPED,
        help="stage ship: the model with the frozen networks")
    parser.add_argument(
        "--guidance-scale", type=float, default=2.5,
        help="stage ship: with which the model draws best, by evaluate.py with another --seed")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/pretrain"),
        help="where the stages leave their weights")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    options = parser.parse_args()
    if options.stage == "ship":
        if not options.run:
            parser.error(
                "--stage ship needs --run, the run folder of train.py whose MM-DiT is shipped")
        return ship(options.run, options.encoders, options.out, options.guidance_scale)
    if not (options.data and options.data.is_dir()):
        parser.error(
            f"--data {options.data}: no such folder; this stage reads pictures or captions there")
    options.work.mkdir(parents=True, exist_ok=True)
    corpus, tokenizers = Corpus(options.data), options.work / "tokenizers"
    steps = options.steps or STEPS.get(options.stage, 0)
    if options.stage == "tokenizers":
        train_tokenizers(corpus, tokenizers)
    elif options.stage == "clip":
        train_clips(corpus, tokenizers, steps, options.work)
    elif options.stage == "t5":
        train_t5(corpus, tokenizers, steps, options.work)
    elif options.stage == "vae":
        train_vae(corpus, steps, options.work, options.channels)
    else:
        assemble(corpus, options.work, options.out, options.vae_from)


if __name__ == "__main__":
    command(main)
