"""make_tiny.py: makes the networks that the paper takes as given, from captions and pictures only.

The paper starts from released CLIP-L, CLIP-G and T5-XXL and from an autoencoder. The small model
that ships needs small ones. This file trains them, one stage after the other. For each of them,
train.fit gets a model, a loss and batches.

    tokenizers   CLIP's byte-level BPE and T5's SentencePiece
    clip         CLIP-L and CLIP-G with their image towers (Radford et al. 2021), with wrong
                 captions that are almost right, and with pairs of almost equal pictures
    t5           the encoder of a small T5 v1.1, by span corruption (Raffel et al. 2019)
    vae          the autoencoder, by L1 and KL
    assemble     measures the latents (App. B.2) and writes all of these into one bf16 file
    ship         adds the MM-DiT of a run of train.py (--run) to that file
    decoder      trains the decoder of such a file further; its latents stay as they are

Data        drawn scenes, emoji, photographs of clothing, and lists of prompts for their words. The
            last 100 emoji and the last 100 photographs are held out, and so are scenes of other
            seeds
Not here    the MM-DiT, which train.py trains
Run         python pretrained/make_tiny.py --data DATA --stage clip [--steps 3000] [--workers 8]
"""

import copy
import json
import math
import os
import shlex
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
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
from batches import Ahead
from checkpoints import SHIPPED, load_components, save_networks
from data import ImageFiles, read_image, read_lines, resize_and_crop, to_tensor
from devices import autocast, command, pick_device
from metrics import CLIPImageConfig, CLIPImageEncoder, psnr
from options import check_options, option, read_options
from scenes import (
    COLORS, COUNTS, OPPOSITE, SHAPES, SIZES, WORDS, Scenes, draw_scene, is_held_out, make_scene,
    scene_captions, vocabulary)
from text_encoders import (
    CLIPConfig, CLIPTextEncoder, CLIPTokenizer, RMSNorm, T5Attention, T5Config, T5Encoder,
    T5FeedForward, T5Tokenizer, TextConfig, clip_text_rules, relative_position_bucket)
from train import Run, TrainConfig, fit
from vae import VAE, VAEConfig, vae_loss

VOCABULARY = 2048                   # tokens of CLIP, and of T5
SENTINELS = 16                      # further tokens of T5, which stand for spans
TEXT = TextConfig(clip_l_width=64, clip_g_width=128, t5_width=192, clip_length=20, t5_length=20)
CLIP_L = CLIPConfig(VOCABULARY, 64, 3, max_length=24, activation="quick_gelu")
CLIP_G = CLIPConfig(VOCABULARY, 128, 3, max_length=24, activation="gelu", projection_dim=128)
CLIP_L_IMAGE = CLIPImageConfig(64, 8, 128, 4, projection_dim=64, activation="quick_gelu")
CLIP_G_IMAGE = CLIPImageConfig(64, 8, 128, 4, projection_dim=128, activation="gelu")
T5_CONFIG = T5Config(VOCABULARY + SENTINELS, 192, ff_size=256, num_layers=2, num_heads=3)
AUTOENCODER = VAEConfig(16, (32, 64, 64, 64), norm_groups=8)

HELD_OUT = 100                      # the last emoji, and the last photographs
TRAIN_SEED = 1                      # of scenes
MEASURE_SEED = 2                    # of the scenes that measure the networks
NEAR_MISSES = 4                     # wrong captions for each picture of CLIP's batches

read_once = lru_cache(maxsize=None)(read_image)         # It decodes each picture once.


# ---- Captions and pictures -----------------------------------------------------------------------
class Corpus:
    """The data that is not drawn: emoji, photographs of clothing, and prompts."""
    def __init__(self, folder):
        self.prompt_lists = Path(folder) / "prompts"
        self.sources = {
            "emoji": ImageFiles(Path(folder) / "emoji"),
            "clothing": ImageFiles(Path(folder) / "photos" / "clothing")}

    def draw(self, name, rng):
        """A random picture of "emoji" or "clothing" that is not held out, and its caption."""
        source = self.sources[name]
        index = rng.integers(len(source) - HELD_OUT)
        return read_once(source.records[index]), source.captions(index)[0]

    def last(self, name, size, count):
        """Held-out pictures, size x size px."""
        pictures = []
        for record in reversed(self.sources[name].records[-count:]):
            pictures.append(resize_and_crop(read_once(record), size, size))
        return pictures

    def prompts(self):
        """The public lists of prompts, and the captions of all pictures."""
        lines = []
        for row in read_lines(self.prompt_lists / "PartiPrompts.tsv")[1:]:
            lines.append(row.split("\t")[0])
        for file in sorted((self.prompt_lists / "t2i_compbench").glob("*.txt")):
            lines += read_lines(file)
        for entry in read_lines(self.prompt_lists / "geneval_evaluation_metadata.jsonl"):
            lines.append(json.loads(entry)["prompt"])
        for source in self.sources.values():
            for index in range(len(source)):
                lines += source.captions(index)
        return [" ".join(line.split()) for line in lines if line.strip()]


def scene_texts(count=8000):
    """All words of the drawn world, and both captions of the first training scenes."""
    texts = sorted(vocabulary())
    source = Scenes(count, TRAIN_SEED)
    for index in range(count):
        texts += [caption for caption in source.captions(index) if caption]
    return texts


# ---- What the training of all networks has in common ---------------------------------------------
def train(model, loss, batches, options, **settings):
    """Trains the model of a stage, and returns the average of its weights over time."""
    config = TrainConfig(steps=options.steps, batch_size=options.batch_size, optimizer="adamw",
                         device=options.device, **settings)
    model = model.to(pick_device(options.device))
    run = Run(Path(options.work) / f"{options.stage}-run", config, may_stop=True)
    return fit(model, loss, Ahead(batches, options.workers), config, run)


def on_device(model, *tensors):
    """The tensors, on the device of the model."""
    device = next(model.parameters()).device
    return [tensor.to(device, non_blocking=True) for tensor in tensors]


# ---- Stage: tokenizers ---------------------------------------------------------------------------
def train_tokenizers(corpus, out):
    """Writes both tokenizers and says how many tokens captions need."""
    (out / "clip").mkdir(parents=True, exist_ok=True)
    (out / "t5").mkdir(exist_ok=True)
    prompts = corpus.prompts()
    scenes = scene_texts()
    train_bpe(prompts + scenes, out / "clip")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prompts + 4 * scenes), model_prefix=str(out / "t5" / "spiece"),
        vocab_size=VOCABULARY, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        normalization_rule_name="nmt_nfkc_cf", minloglevel=1)
    (out / "t5" / "spiece.vocab").unlink()
    report_lengths("clip", CLIPTokenizer(out / "clip"), TEXT.clip_length, scenes, prompts)
    report_lengths("t5", T5Tokenizer(out / "t5" / "spiece.model"), TEXT.t5_length, scenes, prompts)


def train_bpe(texts, out):
    """Writes vocab.json and merges.txt. Ids are in CLIP's order: bytes, bytes that end a word,
    merges, the start token, the end token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())               # one for each byte
    tokens = letters + [letter + "</w>" for letter in letters]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = clip_text_rules()
    trainer = trainers.BpeTrainer(
        vocab_size=2 * VOCABULARY, initial_alphabet=letters, end_of_word_suffix="</w>",
        show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]                # more than fit
    merges = merges[: VOCABULARY - len(tokens) - 2]
    lines = ["#version: 0.2"]
    for left, right in merges:
        tokens.append(left + right)
        lines.append(f"{left} {right}")
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    numbers = {token: number for number, token in enumerate(tokens)}
    (out / "vocab.json").write_text(json.dumps(numbers, ensure_ascii=False))
    (out / "merges.txt").write_text("\n".join(lines) + "\n")


def report_lengths(name, tokenizer, length, scenes, prompts):
    """Prints how many tokens captions need, and how many captions are cut."""
    for kind, texts in (("scenes", scenes), ("prompts", prompts)):
        needed = tokenizer(texts, length)[1].float()
        cut = (needed > length).float().mean()
        print(f"{name}: {kind} need {needed.mean():.1f} tokens, at most {needed.max():.0f}; "
              f"{cut:.1%} are cut to {length}")


# ---- Stage: CLIP ---------------------------------------------------------------------------------
LOOKS = {"color": COLORS, "shape": SHAPES, "size": SIZES}              # all names of each
RESPECTS = ("color", "shape", "relation", "count", "size", "word")


def other(names, name, rng):
    """Another one of these names."""
    names = [candidate for candidate in names if candidate != name]
    return names[rng.integers(len(names))]


def near_miss(scene, respect, rng):
    """A scene that differs from this one in one respect. None if the scene lacks that respect.

    A relation becomes its opposite. Two things exchange their colours, or their shapes, if these
    differ. In any other case, one name or number becomes another one.
    """
    if respect == "relation" and scene.relation:
        return replace(scene, relation=OPPOSITE[scene.relation])
    if respect == "count" and scene.kind == "count":
        count = other(COUNTS, len(scene.things), rng)
        return replace(scene, things=count * scene.things[:1])
    if respect == "word" and scene.word:
        return replace(scene, word=other(WORDS, scene.word, rng))
    if respect in LOOKS and scene.things:
        return change_look(scene, respect, rng)
    return None


def change_look(scene, look, rng):
    """The scene with other colours, shapes or sizes. Counted things change together."""
    values = [getattr(thing, look) for thing in scene.things]
    if len(set(values)) == 2 and look != "size":
        values.reverse()
    else:
        number = rng.integers(len(values))
        new = other(LOOKS[look], values[number], rng)
        if scene.kind == "count":
            values = len(values) * [new]
        else:
            values[number] = new
    things = []
    for thing, value in zip(scene.things, values):
        things.append(replace(thing, **{look: value}))
    return replace(scene, things=tuple(things))


def near_captions(scene, rng):
    """NEAR_MISSES full captions of scenes that are almost this one. None of them is right."""
    right = scene_captions(scene)[1]
    fallback = "size" if scene.things else "word"
    respects = rng.permutation(RESPECTS).tolist()
    captions = []
    while len(captions) < NEAR_MISSES:
        respect = respects.pop() if respects else fallback
        almost = near_miss(scene, respect, rng)
        if almost is None or never_drawn(almost):
            continue
        caption = scene_captions(almost)[1]
        if caption != right:
            captions.append(caption)
    return captions


def never_drawn(scene):
    """Whether training leaves out this combination. As a near miss it would always be wrong."""
    shapes = [thing.shape for thing in scene.things]
    colors = [thing.color for thing in scene.things]
    return is_held_out(shapes, colors, scene.relation)


def mirrored(scene):
    """The scene with its things at mirrored places, so that the opposite relation holds."""
    things = []
    for thing in scene.things:
        left, top = thing.left, thing.top
        if scene.relation in ("left of", "right of"):
            left = scene.width - left - thing.diameter
        else:
            top = scene.height - top - thing.diameter
        things.append(replace(thing, left=left, top=top))
    return replace(scene, relation=OPPOSITE[scene.relation], things=tuple(things))


def twin(scene, rng):
    """A scene that differs from this one in one respect and can be drawn. If it has a relation,
    that differs half of the time. None if the twin is held out of training.

    Size and count are left out. For another size or number, things would need other places.
    """
    if scene.relation and rng.random() < 0.5:
        almost = mirrored(scene)
    else:
        respects = ["word"] if scene.word else []
        if scene.things:
            respects += ["color", "shape"]
        almost = near_miss(scene, respects[rng.integers(len(respects))], rng)
    return None if never_drawn(almost) else almost


class ClipBatches:
    """Batches (image (B, 3, 64, 64), ids of CLIP-L, ids of CLIP-G, same (B, B)).

    ids (B + B * NEAR_MISSES, L): the B captions, then the near misses of each picture. L's and G's
    padding differ. same: 1 where two captions are equal, otherwise 0.

    Of eight samples the first shows clothing, the second an emoji, and the others are three scenes
    with their twins. Near misses of clothing and emoji are captions of other pictures. A picture
    chooses among the B captions and its own near misses, a caption among the B pictures.
    """
    def __init__(self, corpus, tokenizers, size):
        self.corpus = corpus
        self.size = size
        self.tokenize_l = CLIPTokenizer(tokenizers / "clip")
        self.tokenize_g = CLIPTokenizer(tokenizers / "clip", padding=0)

    def scenes(self, index, rng):
        """[(picture, caption, near misses)] of a scene and its twin, or of another scene if it has
        none. Three times in four both have their full captions."""
        first = make_scene(TRAIN_SEED, index)
        second = twin(first, rng) or make_scene(TRAIN_SEED, index + 1)
        full = int(rng.random() < 0.75)
        samples = []
        for scene in (first, second):
            caption = scene_captions(scene)[full]
            samples.append((draw_scene(scene), caption, near_captions(scene, rng)))
        return samples

    def picture(self, name, rng):
        """(picture, caption, near misses) of "clothing" or "emoji"."""
        picture, caption = self.corpus.draw(name, rng)
        misses = []
        while len(misses) < NEAR_MISSES:
            _, wrong = self.corpus.draw(name, rng)
            if wrong != caption:
                misses.append(wrong)
        return resize_and_crop(picture, 64, 64), caption, misses

    def __call__(self, step):
        rng = np.random.default_rng((11, step))
        samples = []
        for index in range(step * self.size, (step + 1) * self.size, 2):
            if index % 8 == 0:
                samples += [self.picture("clothing", rng), self.picture("emoji", rng)]
            else:
                samples += self.scenes(index, rng)
        images, captions, misses = [], [], []
        for picture, caption, wrong in samples:
            images.append(to_tensor(picture))
            captions.append(caption)
            misses += wrong
        numbers = {caption: i for i, caption in enumerate(captions)}
        label = torch.tensor([numbers[caption] for caption in captions])
        same = (label[:, None] == label[None, :]).float()               # (B, B)
        ids_l, _ = self.tokenize_l(captions + misses, TEXT.clip_length)
        ids_g, _ = self.tokenize_g(captions + misses, TEXT.clip_length)
        return torch.stack(images), ids_l, ids_g, same


class Clips(nn.Module):
    """Both CLIPs, each a text encoder and an image tower, and one temperature."""
    def __init__(self):
        super().__init__()
        self.clip_l = CLIPTextEncoder(CLIP_L)
        self.clip_l_image = CLIPImageEncoder(CLIP_L_IMAGE)
        self.clip_g = CLIPTextEncoder(CLIP_G)
        self.clip_g_image = CLIPImageEncoder(CLIP_G_IMAGE)
        self.temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        for text in (self.clip_l, self.clip_g):
            nn.init.normal_(text.token_embedding.weight, std=0.02)
            nn.init.normal_(text.position_embedding.weight, std=0.01)

    def forward(self, image, ids_l, ids_g):
        """Unit vectors (image, text) of CLIP-L and then of CLIP-G."""
        image_l = F.normalize(self.clip_l_image(image).float(), dim=1)
        text_l = F.normalize(self.clip_l(ids_l)[1].float(), dim=1)
        image_g = F.normalize(self.clip_g_image(image).float(), dim=1)
        text_g = F.normalize(self.clip_g(ids_g)[1].float(), dim=1)
        return (image_l, text_l), (image_g, text_g)


def contrastive_loss(image, text, same, scale):
    """CLIP's symmetric cross-entropy. A picture must also prefer its caption to its near misses.

    image (B, d); text (B + B * NEAR_MISSES, d); same (B, B): a picture matches every caption that
    is equal to its own. Returns (B,).
    """
    B = len(image)
    target = same / same.sum(dim=1, keepdim=True)                       # (B, B)
    logits = scale * image @ text[:B].T                                 # (B, B)
    misses = text[B:].unflatten(0, (B, NEAR_MISSES))                    # (B, misses, d)
    near = scale * (image[:, None] * misses).sum(dim=2)                 # (B, misses)
    all_logits = torch.cat([logits, near], dim=1)                       # (B, B + misses)
    all_target = torch.cat([target, torch.zeros_like(near)], dim=1)
    text_of_image = F.cross_entropy(all_logits, all_target, reduction="none")
    image_of_text = F.cross_entropy(logits.T, target, reduction="none")
    return (text_of_image + image_of_text) / 2


def clip_loss(model, batch):
    """The sum of the losses of both CLIPs, (B,)."""
    image, ids_l, ids_g, same = on_device(model, *batch)
    scale = model.temperature.exp().clamp_max(100)
    clip_l, clip_g = model(image, ids_l, ids_g)
    with autocast(image.device, torch.float32):         # bf16 would round a logit of 100 by .25
        return contrastive_loss(*clip_l, same, scale) + contrastive_loss(*clip_g, same, scale)


@torch.no_grad()
def swap_tests(clips, batches, count=500):
    """{clip: {respect: share of held-out scenes that prefer their full caption to a near miss}}.
    "picture by relation": captions that prefer their picture to that of the mirrored scene."""
    scores = {"clip_l": {}, "clip_g": {}}
    for respect in RESPECTS:
        images, twins, captions, wrong = [], [], [], []
        rng = np.random.default_rng(17)
        for index in range(8 * count):
            scene = make_scene(MEASURE_SEED, index)
            almost = near_miss(scene, respect, rng)
            if len(images) < count and almost is not None:
                images.append(to_tensor(draw_scene(scene)))
                captions.append(scene_captions(scene)[1])
                wrong.append(scene_captions(almost)[1])
                if respect == "relation":
                    twins.append(to_tensor(draw_scene(mirrored(scene))))
        ids_l, _ = batches.tokenize_l(captions + wrong, TEXT.clip_length)
        ids_g, _ = batches.tokenize_g(captions + wrong, TEXT.clip_length)
        vectors = clips(*on_device(clips, torch.stack(images + twins), ids_l, ids_g))
        for name, (image, text) in zip(scores, vectors):
            right, miss = text.chunk(2)
            image, twin_image = image[: len(right)], image[len(right) :]
            scores[name][respect] = share_closer(right, miss, image)
            if twins:
                scores[name]["picture by relation"] = share_closer(image, twin_image, right)
    return scores


def share_closer(first, second, to):
    """The share of rows in which `first` is more like `to` than `second` is. All are (B, d)."""
    closer = (first * to).sum(dim=1) > (second * to).sum(dim=1)
    return round(closer.float().mean().item(), 3)


def train_clips(corpus, work, options):
    """Trains both CLIPs on the same batches."""
    torch.manual_seed(0)
    batches = ClipBatches(corpus, work / "tokenizers", options.batch_size)
    attention = nullcontext()
    if pick_device(options.device).type == "cpu":
        attention = sdpa_kernel(SDPBackend.MATH)    # .66 s a step on a core; torch's choice, .88
    with attention:
        clips = train(Clips(), clip_loss, batches, options, lr=1e-3, warmup_steps=100, cooldown=0.9,
                      ema=0.99)
    save_file(clips.state_dict(), work / "clip.safetensors")
    print(json.dumps(swap_tests(clips.eval(), batches), indent=1))


# ---- Stage: T5 -----------------------------------------------------------------------------------
def corrupt_spans(ids, rng, chance=1 / 8):
    """T5's task for one text: (source, target). Sentinels in the source stand for spans that were
    cut out. The target has each sentinel and then its span. Both end with the end token, 1.

    chance: that a span begins at a token. A span has 1 to 3 tokens, so 2 tokens in 9 are cut out.
    """
    source, target = [], []
    sentinel = VOCABULARY
    i = 0
    while i < len(ids):
        if rng.random() < chance and sentinel < VOCABULARY + SENTINELS - 1:
            length = int(rng.integers(1, 4))
            source.append(sentinel)
            target += [sentinel, *ids[i : i + length]]
            sentinel += 1
            i += length
        else:
            source.append(ids[i])
            i += 1
    return source + [1], target + [1]


class T5DecoderLayer(nn.Module):
    """Attention to the target so far, attention to the source, MLP. (B, T, D) -> (B, T, D)."""
    def __init__(self, config):
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size)
        self.self_attention = T5Attention(config)
        self.norm2 = RMSNorm(config.hidden_size)
        self.cross_attention = T5Attention(config)
        self.norm3 = RMSNorm(config.hidden_size)
        self.feed_forward = T5FeedForward(config)

    def forward(self, x, bias, encoded):
        x = x + self.self_attention(self.norm1(x), bias)
        x = x + self.cross_attention(self.norm2(x), None, encoded)
        return x + self.feed_forward(self.norm3(x))


class T5(nn.Module):
    """The encoder, and a decoder of two layers that only its training needs.

    The first weights are drawn as T5's are. Queries begin small, as T5's attention does not divide
    by sqrt(64).
    """
    def __init__(self, config):
        super().__init__()
        self.encoder = T5Encoder(config)
        nn.init.normal_(self.encoder.token_embedding.weight, std=1.0)
        self.position_bias = nn.Embedding(config.num_buckets, config.num_heads)
        self.layers = nn.ModuleList([T5DecoderLayer(config), T5DecoderLayer(config)])
        self.final_norm = RMSNorm(config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        for module in self.modules():
            if isinstance(module, T5Attention):
                nn.init.normal_(module.q.weight, std=(config.hidden_size * 64) ** -0.5)

    def forward(self, source, target):
        """source (B, L), target (B, T) -> logits (B, T, V) of the target. The decoder sees each
        token of the target one place late, behind a 0."""
        encoded = self.encoder(source)                                  # (B, L, D)
        late = F.pad(target[:, :-1], (1, 0))                            # (B, T)
        position = torch.arange(late.shape[1], device=late.device)
        distance = position[None, :] - position[:, None]                # (T, T) key - query
        bucket = relative_position_bucket(distance, bidirectional=False)
        bias = self.position_bias(bucket).permute(2, 0, 1)[None]        # (1, heads, T, T)
        bias = bias.masked_fill(distance > 0, -torch.inf)
        x = self.encoder.token_embedding(late)                          # (B, T, D)
        for layer in self.layers:
            x = layer(x, bias, encoded)
        return self.output(self.final_norm(x))


class SpanBatches:
    """Captions and prompts with spans cut out: source (B, L) and target (B, T), padded with 0."""
    def __init__(self, corpus, tokenizers, size):
        self.size = size
        self.rows = []
        tokenizer = T5Tokenizer(tokenizers / "t5" / "spiece.model")
        ids, needed = tokenizer(corpus.prompts() + 2 * scene_texts(16000), 30)
        for row, length in zip(ids, needed):
            self.rows.append(row[: min(length, 30) - 1].tolist())       # without the end token

    def __call__(self, step):
        rng = np.random.default_rng((13, step))
        sources, targets = [], []
        for number in rng.integers(len(self.rows), size=self.size):
            source, target = corrupt_spans(self.rows[number], rng)
            sources.append(torch.tensor(source))
            targets.append(torch.tensor(target))
        pad = nn.utils.rnn.pad_sequence
        return pad(sources, batch_first=True), pad(targets, batch_first=True)


def t5_loss(model, batch):
    """Cross-entropy of the target's tokens, averaged over each sample: (B,)."""
    source, target = on_device(model, *batch)
    logits = model(source, target).float().transpose(1, 2)              # (B, V, T)
    losses = F.cross_entropy(logits, target, ignore_index=0, reduction="none")
    return losses.sum(dim=1) / (target != 0).sum(dim=1)


def train_t5(corpus, work, options):
    """Trains a T5 and keeps its encoder."""
    torch.manual_seed(0)
    batches = SpanBatches(corpus, work / "tokenizers", options.batch_size)
    t5 = train(T5(T5_CONFIG), t5_loss, batches, options, lr=2e-3, warmup_steps=100, cooldown=0.9,
               ema=0.99)
    save_file(t5.encoder.state_dict(), work / "t5.safetensors")


# ---- Stage: autoencoder --------------------------------------------------------------------------
def random_crop(picture, size, rng):
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
    """Batches (image (B, 3, 8H, 8W), noise (B, C, H, W), weight of the KL term).

    Three batches in four have B = batch_size squares of 64 px, the fourth has a quarter as many of
    128 px. In the last tenth of the steps KL weighs ten times as much. The decoder is good by then,
    and smoother codes cost it .1 dB. gray: every second scene is on gray, which is as bright as
    some colours: there small stars became pentagons.
    """
    def __init__(self, corpus, steps, batch_size, gray=False):
        self.corpus = corpus
        self.steps = steps
        self.gray = gray
        self.mixture = batch_size // 8 * (5 * ["scene"] + 2 * ["emoji"] + ["clothing"])

    def __call__(self, step):
        rng = np.random.default_rng((7, step))
        size, names = 64, self.mixture
        if step % 4 == 0:
            quarter = len(self.mixture) // 4
            first = step // 4 % 4 * quarter
            size, names = 128, self.mixture[first : first + quarter]
        squares = []
        for i, name in enumerate(names):
            if name == "scene":
                index = step * 2 * len(self.mixture) + i
                square = draw_scene(self.scene(index, size))
            else:
                picture, _ = self.corpus.draw(name, rng)
                square = random_crop(picture, size, rng)
            squares.append(to_tensor(square))
        noise_rng = torch.Generator().manual_seed(step)
        shape = len(names), AUTOENCODER.latent_channels, size // 8, size // 8
        noise = torch.randn(shape, generator=noise_rng)
        kl_weight = 5e-4 if step < 0.9 * self.steps else 5e-3
        return torch.stack(squares), noise, kl_weight

    def scene(self, index, size):
        """The training scene of this index. With gray, odd ones are on gray."""
        wanted = self.gray and index % 2 == 1
        scene = make_scene(TRAIN_SEED, index, size, size)
        while wanted and scene.background != "gray":
            index += 1_000_003
            scene = make_scene(TRAIN_SEED, index, size, size)
        return scene


def autoencoder_loss(vae, batch):
    """L1 and KL of one batch, the same number for each of its pictures: (B,)."""
    image, noise, kl_weight = batch
    image, noise = on_device(vae, image, noise)
    loss, _, _ = vae_loss(vae, image, noise, kl_weight)
    return loss.expand(len(image))


@torch.no_grad()
def vae_quality(vae, corpus, count=64):
    """Mean PSNR in dB of held-out pictures, whose codes have no noise."""
    sets = {
        "scenes 64 px": [draw_scene(make_scene(MEASURE_SEED, i)) for i in range(count)],
        "emoji 128 px": corpus.last("emoji", 128, count),
        "clothing 256 px": corpus.last("clothing", 256, count)}
    quality = {}
    for name, pictures in sets.items():
        values = []
        for picture in pictures:
            image, = on_device(vae, to_tensor(picture)[None])
            values.append(psnr(image, vae.decode(vae.encode(image))).item())
        quality[name] = round(float(np.mean(values)), 2)
    return quality


def fit_vae(vae, corpus, options, lr, gray=False):
    """Trains an autoencoder, without an adversary: later stages need fidelity."""
    batches = Squares(corpus, options.steps, options.batch_size, gray)
    return train(vae, autoencoder_loss, batches, options, lr=lr, warmup_steps=200, cooldown=1.0,
                 ema=0.999)


def train_vae(corpus, work, options):
    """Trains the autoencoder."""
    torch.manual_seed(0)
    vae = fit_vae(VAE(AUTOENCODER), corpus, options, 1e-3)
    save_file(vae.state_dict(), work / "vae.safetensors")
    print(vae_quality(vae, corpus))


def train_decoder(corpus, work, model, out, options):
    """Trains the decoder of a whole model further, and writes that model anew. The encoder stays as
    it is. So do the latents, and what the MM-DiT has learned of them."""
    parts = load_components(model)
    parts.vae.decoder.requires_grad_(True)
    before = copy.deepcopy(parts.vae.encoder.state_dict())
    parts.vae = fit_vae(parts.vae, corpus, options, 5e-4, gray=True).cpu()
    for name, tensor in parts.vae.encoder.state_dict().items():
        if not torch.equal(tensor, before[name]):
            raise ValueError(f"{work / 'decoder-run'} is of another autoencoder; remove it or "
                             "change --work")
    write_model(parts, model, out)
    file = ROOT / "results" / "tiny-frozen.json"
    record = json.loads(file.read_text())
    record["psnr"] = vae_quality(parts.vae, corpus)
    record["command of psnr"] = shlex.join(["python", *sys.argv])
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(record["psnr"])


@torch.no_grad()
def latent_statistics(vae, count=2048):
    """One global mean and standard deviation of the raw codes of scenes (App. B.2)."""
    codes = []
    for start in range(0, count, 64):
        pictures = [to_tensor(draw_scene(make_scene(TRAIN_SEED, start + i))) for i in range(64)]
        codes.append(vae.encode_moments(*on_device(vae, torch.stack(pictures)))[0])
    codes = torch.cat(codes)
    return codes.mean().item(), codes.std().item()


# ---- Stages: put together ------------------------------------------------------------------------
def load(network, file):
    """The network with the weights that a stage has left."""
    network.load_state_dict(load_file(file))
    return network.eval()


def assemble(corpus, work, out, vae_from, device):
    """Writes everything but the MM-DiT into one bf16 file. Only metrics need the image towers, so
    they go into a second file. results/tiny-frozen.json says how good the networks are.

    vae_from: a model whose autoencoder is taken, instead of that of the work folder.
    """
    clips = load(Clips(), work / "clip.safetensors")
    t5 = load(T5Encoder(T5_CONFIG), work / "t5.safetensors")
    if vae_from:
        vae = load_components(vae_from, ("vae",)).vae
    else:
        vae = load(VAE(AUTOENCODER), work / "vae.safetensors")
    mean, std = latent_statistics(vae.to(device))
    vae.config = replace(vae.config, vae_scale=1 / std, vae_shift=mean)
    out.mkdir(parents=True, exist_ok=True)
    networks = {"vae": vae, "clip_l": clips.clip_l, "clip_g": clips.clip_g, "t5": t5}
    save_networks(out / "model.safetensors", networks, TEXT, dtype=torch.bfloat16)
    towers = {}
    for name, tensor in clips.state_dict().items():
        if name.startswith(("clip_l_image.", "clip_g_image.")):
            towers[name] = tensor.bfloat16()
    save_file(towers, out / "clip_image.safetensors")
    if out / "tokenizers" != work / "tokenizers":
        shutil.copytree(work / "tokenizers", out / "tokenizers", dirs_exist_ok=True)
    batches = ClipBatches(corpus, work / "tokenizers", 64)
    clips = clips.to(device)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "latents": {"mean": mean, "std": std},
        "psnr": vae_quality(vae, corpus),
        "prefers its caption to a near miss": swap_tests(clips, batches)}
    text = json.dumps(record, indent=1) + "\n"
    (ROOT / "results" / "tiny-frozen.json").write_text(text)
    print(text)


def ship(run, encoders, out, guidance_scale):
    """Writes the MM-DiT of a run and the frozen networks of `encoders` into one bf16 file, and puts
    tokenizers and image towers beside it. guidance_scale: what the file asks for."""
    frozen = load_components(encoders, ("vae", "text"))
    parts = load_components(run, ("mmdit",))
    parts.sampling["guidance_scale"] = guidance_scale
    parts.vae, parts.text = frozen.vae, frozen.text
    write_model(parts, encoders, out)


def write_model(parts, encoders, out):
    """Writes a whole model as one bf16 file, and puts the tokenizers and image towers of the folder
    `encoders` beside it."""
    networks = {"mmdit": parts.mmdit, "vae": parts.vae, **parts.text.encoders}
    out.mkdir(parents=True, exist_ok=True)
    save_networks(out / "model.safetensors", networks, parts.text.config, parts.sampling,
                  torch.bfloat16, parts.words, parts.sizes)
    if encoders.resolve() != out.resolve():
        shutil.copytree(encoders / "tokenizers", out / "tokenizers", dirs_exist_ok=True)
        shutil.copy(encoders / "clip_image.safetensors", out)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{size / 1e6:.2f} MB in {out}")


STAGES = ("tokenizers", "clip", "t5", "vae", "assemble", "ship", "decoder")
STEPS_AND_SIZES = {"clip": (3000, 64), "t5": (3000, 128), "vae": (12000, 8), "decoder": (2500, 8)}


@dataclass(frozen=True)
class Options:
    """The command line is made from it."""
    stage: str = option("", "what to make, in this order", choices=STAGES)
    data: str = option("", "folder with emoji/, photos/ and prompts/; all stages but ship read it")
    steps: int = option(0, "0: clip and t5 3000, vae 12000, decoder 2500", 0, 10**9)
    batch_size: int = option(0, "0: clip 64, t5 128, vae and decoder 8", 0, 10**6)
    device: str = option("auto", "cuda, mps or cpu; auto: the first that is there")
    workers: int = option(0, "processes that prepare batches; 0: the loop does", 0, 1000)
    work: str = option("runs/pretrain", "folder in which each stage leaves its weights")
    vae_from: str = option("", "assemble: keep the autoencoder of this model")
    run: str = option("", "ship: a run folder of train.py")
    encoders: str = option(str(SHIPPED), "ship, decoder: the model with the frozen networks")
    guidance_scale: float = option(3.0, "ship: the scale that scores best")
    out: str = option(str(SHIPPED), "assemble, ship, decoder: folder of the model")

    def __post_init__(self):
        check_options(self)
        if self.stage == "ship" and not self.run:
            raise ValueError("--stage ship needs --run, a run folder whose MM-DiT is shipped")
        if self.batch_size % 8:
            raise ValueError(f"--batch-size {self.batch_size} is no multiple of 8")
        if self.stage != "ship" and not os.path.isdir(self.data):
            raise ValueError(f"--data {self.data}: no such folder; --stage {self.stage} reads it")


def main():
    """Makes the small networks that ship, one stage at a time."""
    options = read_options(Options, main.__doc__)
    work, out = Path(options.work), Path(options.out)
    if options.stage == "ship":
        return ship(Path(options.run), Path(options.encoders), out, options.guidance_scale)
    work.mkdir(parents=True, exist_ok=True)
    steps, size = STEPS_AND_SIZES.get(options.stage, (0, 0))
    options = replace(options, steps=options.steps or steps, batch_size=options.batch_size or size)
    corpus = Corpus(options.data)
    if options.stage == "tokenizers":
        train_tokenizers(corpus, work / "tokenizers")
    elif options.stage == "clip":
        train_clips(corpus, work, options)
    elif options.stage == "t5":
        train_t5(corpus, work, options)
    elif options.stage == "vae":
        train_vae(corpus, work, options)
    elif options.stage == "decoder":
        train_decoder(corpus, work, Path(options.encoders), out, options)
    else:
        assemble(corpus, work, out, options.vae_from, pick_device(options.device))


if __name__ == "__main__":
    command(main)
