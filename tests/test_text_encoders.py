"""text_encoders.py: the combination, CLIP and T5 by hand, tokenizers against golden ids."""

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers

import text_encoders as module
from text_encoders import (
    CLIPConfig,
    CLIPLayer,
    CLIPTextEncoder,
    CLIPTokenizer,
    RMSNorm,
    T5Attention,
    T5Config,
    T5Encoder,
    T5FeedForward,
    T5Tokenizer,
    TextConfig,
    TextEncoders,
    combine,
    drop_encoders,
    quick_gelu,
    relative_position_bucket,
)

BESIDE = Path(__file__).parent.parent.parent / "shared" / "data"
TOKENIZERS = Path(os.environ.get("DATA_DIR") or BESIDE) / "tokenizers"
CLIP_L = CLIPConfig(vocab_size=600, hidden_size=128, num_layers=3, max_length=77)
CLIP_G = replace(CLIP_L, activation="gelu", projection_dim=192)
T5 = T5Config(vocab_size=300, hidden_size=384, ff_size=64, num_layers=2, num_heads=2)
TEXT = TextConfig(clip_l_width=128, clip_g_width=192, t5_width=384)
ALL = ("clip_l", "clip_g", "t5")


def rng(seed):
    return torch.Generator().manual_seed(seed)


def randomize(network, seed=0):
    """Every parameter random, norms and biases too."""
    generator = rng(seed)
    for parameter in network.requires_grad_(False).parameters():
        size = 0.3 if parameter.dim() == 1 else 0.15
        parameter.normal_(0, size, generator=generator)
    return network.eval()


def clip_ids(*prompts, length=12, vocab_size=600, padding=None):
    """Rows of start, the given ids, end, padding."""
    start, end = vocab_size - 2, vocab_size - 1
    ids = torch.full((len(prompts), length), end if padding is None else padding)
    for i, prompt in enumerate(prompts):
        ids[i, : len(prompt) + 2] = torch.tensor([start, *prompt, end])
    return ids


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---- The combination (App. B.2) and dropping encoders (App. B.3) ---------------------------------

def test_context_is_clip_side_by_side_padded_with_t5_behind():
    l, g = torch.full((2, 77, 128), 1.0), torch.full((2, 77, 192), 2.0)
    t5 = torch.full((2, 20, 384), 3.0)
    context, pooled = combine(l, g, t5, l[:, 0], g[:, 0])
    assert context.shape == (2, 97, 384) and pooled.shape == (2, 320)
    assert (context[:, :77, :128] == 1).all() and (context[:, :77, 128:320] == 2).all()
    assert (context[:, :77, 320:] == 0).all() and (context[:, 77:] == 3).all()
    assert (pooled[:, :128] == 1).all() and (pooled[:, 128:] == 2).all()


def test_clip_that_is_wider_than_t5_is_refused_and_not_cut():
    l, g, t5 = torch.ones(1, 5, 128), torch.ones(1, 5, 192), torch.ones(1, 5, 256)
    with pytest.raises(RuntimeError, match="negative"):
        combine(l, g, t5, l[:, 0], g[:, 0])


def test_sd3_widths_give_154_tokens_of_4096_and_2048_pooled():
    config = TextConfig()
    assert config.clip_length + config.t5_length == 154 and config.t5_width == 4096
    assert config.clip_l_width + config.clip_g_width == 2048


def parts(context, pooled):
    """{encoder: what of context (L, 384) and of pooled (320,) is its output}"""
    return {"clip_l": (context[:77, :128], pooled[:128]),
            "clip_g": (context[:77, 128:320], pooled[128:]), "t5": (context[77:], pooled[:0])}


def test_dropping_an_encoder_zeroes_its_sequence_and_its_pooled_vector_sample_by_sample():
    context, pooled = torch.ones(8, 154, 384), torch.ones(8, 320)
    context[:, :77, 320:] = 0                                                 # combine's zeros
    keep = torch.tensor([[i & 4, i & 2, i & 1] for i in range(8)]).bool()     # every subset
    dropped = drop_encoders(context, pooled, keep, TEXT)
    for i in range(8):
        for name, (sequence, vector) in parts(dropped[0][i], dropped[1][i]).items():
            kept = float(keep[i, ALL.index(name)])
            assert (sequence == kept).all() and (vector == kept).all()
    assert (dropped[0][:, :77, 320:] == 0).all()
    assert torch.equal(dropped[0][7], context[7])
    assert (context[0] == 1).any() and (pooled == 1).all()                    # the input stays
    half = drop_encoders(context.half(), pooled, keep, TEXT)
    assert half[0].dtype == torch.float16 and half[1].dtype == torch.float32


def test_what_is_dropped_leaves_no_trace_even_if_it_was_infinite():
    context, pooled = torch.full((1, 154, 384), math.inf), torch.full((1, 320), math.nan)
    context[:, :77, 320:] = 0                                                 # combine's zeros
    context, pooled = drop_encoders(context, pooled, torch.zeros(1, 3, dtype=torch.bool), TEXT)
    assert not context.any() and not pooled.any()


# ---- CLIP ----------------------------------------------------------------------------------------

def test_clip_context_is_the_penultimate_state_without_the_final_norm():
    clip, ids = randomize(CLIPTextEncoder(CLIP_L)), clip_ids([5, 6, 7], [8])
    x = clip.token_embedding(ids) + clip.position_embedding.weight[: ids.shape[1]]
    for layer in clip.layers[:-1]:
        x = layer(x)
    penultimate, _, last = clip(ids)
    close(penultimate, x)
    close(last, clip.final_norm(clip.layers[-1](x)))
    clip.final_norm.weight.mul_(3)
    randomize(clip.layers[-1], seed=5)
    assert torch.equal(clip(ids)[0], penultimate)            # neither norm nor last layer matters


def test_clip_pooled_is_the_normed_state_at_the_first_end_token():
    """CLIP-L pads with the end token. The first one counts, and it is blind to what follows."""
    clip, ids = randomize(CLIPTextEncoder(CLIP_L)), clip_ids([5, 6, 7], [8])
    _, pooled, last = clip(ids)
    close(pooled, torch.stack([last[0, 4], last[1, 2]]))
    _, zero_padded, _ = clip(clip_ids([5, 6, 7], [8], padding=0))
    close(zero_padded, pooled)
    assert (pooled.norm(dim=1) - 1).abs().min() > 0.1        # not scaled to unit length


def test_clip_g_pooled_is_projected_and_not_scaled_to_unit_length():
    clip, ids = randomize(CLIPTextEncoder(CLIP_G)), clip_ids([5, 6, 7], [8], padding=0)
    _, pooled, last = clip(ids)
    close(pooled, torch.stack([last[0, 4], last[1, 2]]) @ clip.projection.weight.T)
    assert pooled.shape == (2, 192) and (pooled.norm(dim=1) - 1).abs().min() > 0.1


def test_clip_is_causal():
    clip, ids = randomize(CLIPTextEncoder(CLIP_L)), clip_ids([5, 6, 7, 8, 9])
    changed = ids.clone()
    changed[0, 4] = 11
    before, after = clip(ids), clip(changed)
    for which in (0, 2):
        close(after[which][:, :4], before[which][:, :4])
        assert ((after[which] - before[which])[:, 4:].abs().amax(-1) > 1e-4).all()


def exact_gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


@pytest.mark.parametrize("config, activation", [(CLIP_L, quick_gelu), (CLIP_G, exact_gelu)])
def test_clip_layer_by_hand(config, activation):
    """Pre-norm; softmax of q k / sqrt(64) over this and earlier tokens, in two heads of 64."""
    x = torch.randn(1, 5, 128, generator=rng(1))
    layer = randomize(CLIPLayer(config))
    h = layer.norm1(x)[0]
    q, k, v = (linear(h).view(5, 2, 64) for linear in (layer.q, layer.k, layer.v))
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    heads = []
    for i in range(2):
        logits = (q[:, i] @ k[:, i].T / 8).masked_fill(later, -torch.inf)
        heads.append(torch.softmax(logits, -1) @ v[:, i])
    middle = x + layer.out(torch.cat(heads, dim=-1))
    close(layer(x), middle + layer.fc2(activation(layer.fc1(layer.norm2(middle)))), 1e-4)


def test_quick_gelu_is_one_sigmoid_and_not_gelu():
    x = torch.tensor([-1.0, 0.0, 2.0])
    expected = torch.tensor([-1 / (1 + math.exp(1.702)), 0.0, 2 / (1 + math.exp(-3.404))])
    close(quick_gelu(x), expected)
    assert (quick_gelu(x) - F.gelu(x)).abs().max() > 0.005


def test_clip_norms_have_epsilon_1e_5():
    norms = [m for m in CLIPTextEncoder(CLIP_L).modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 2 * 3 + 1 and {norm.eps for norm in norms} == {1e-5}


def test_default_sizes_are_those_of_clip_l_clip_g_and_t5_xxl():
    bigger = CLIPConfig(hidden_size=1280, num_layers=32, activation="gelu", projection_dim=1280)
    with torch.device("meta"):
        networks = CLIPTextEncoder(CLIPConfig()), CLIPTextEncoder(bigger), T5Encoder(T5Config())
    millions = [sum(p.numel() for p in network.parameters()) / 1e6 for network in networks]
    assert millions == pytest.approx([123.06, 694.66, 4762.31], abs=0.01)
    assert [network.config.num_heads for network in networks] == [12, 20, 64]


# ---- T5 ------------------------------------------------------------------------------------------

def test_t5_attention_by_hand_has_no_1_over_sqrt_d_and_adds_the_bias():
    attention = randomize(T5Attention(T5))
    x, other = 0.3 * torch.randn(2, 1, 5, 384, generator=rng(1))
    bias = torch.randn(1, 2, 5, 5, generator=rng(2))

    def by_hand(source, bias):
        q = attention.q(x)[0].view(5, 2, 64)
        k, v = attention.k(source)[0].view(5, 2, 64), attention.v(source)[0].view(5, 2, 64)
        heads = []
        for i in range(2):
            heads.append(torch.softmax(q[:, i] @ k[:, i].T + bias[0, i], dim=-1) @ v[:, i])
        return attention.out(torch.cat(heads, dim=-1))

    close(attention(x, bias)[0], by_hand(x, bias), 1e-4)
    close(attention(x, None, other)[0], by_hand(other, 0 * bias), 1e-4)      # cross-attention


def test_t5_feed_forward_is_gated_tanh_gelu():
    feed_forward, x = randomize(T5FeedForward(T5)), torch.randn(1, 5, 384, generator=rng(1))
    gate = feed_forward.gate(x)
    gelu = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    close(feed_forward(x), feed_forward.down(gelu * feed_forward.up(x)), 1e-4)


def test_t5_norm_is_the_root_mean_square_with_epsilon_1e_6_in_fp32():
    norm = RMSNorm(4).requires_grad_(False)
    norm.weight.copy_(torch.tensor([1.0, 2.0, 1.0, 1.0]))
    small = torch.full((4,), 1e-3)                           # the mean is not subtracted
    close(norm(small), torch.tensor([1.0, 2.0, 1.0, 1.0]) / math.sqrt(2))    # 1e-6 + epsilon
    large = torch.full((4,), 300.0, dtype=torch.float16)     # its square overflows fp16
    assert norm.half()(large).tolist() == pytest.approx([1, 2, 1, 1], rel=1e-3)


def bias_of(t5, L):
    """What the first layer of a T5 encoder adds to its logits: (1, heads, query, key)."""
    seen = []
    hook = t5.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[1]))
    t5(torch.ones(1, L, dtype=torch.long))
    hook.remove()
    return seen[0]


def test_t5_has_no_biases_and_one_table_of_positions_for_all_layers():
    t5 = T5Encoder(T5)
    assert [name for name in t5.state_dict() if "bias" in name] == ["position_bias.weight"]
    assert t5.position_bias.weight.shape == (32, 2)
    t5, ids = randomize(t5), torch.randint(3, 300, (1, 9), generator=rng(3))
    seen = []
    for layer in t5.layers:
        layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[1]))
    t5(ids)
    assert len(seen) == 2
    assert torch.equal(seen[0], bias_of(t5, 9)) and torch.equal(seen[1], seen[0])


def bucket(*distances, **options):
    return relative_position_bucket(torch.tensor(distances), **options).tolist()


def test_t5_position_buckets_are_exact_when_near_and_logarithmic_when_far():
    """From 8 on: 8 buckets up to 128, bucket = 8 + floor(8 log(d / 8) / log 16)."""
    assert bucket(0, -1, -7) == [0, 1, 7]                    # keys before the query
    assert bucket(1, 7) == [17, 23]                          # keys after it: the other half
    assert bucket(-8, -11, -12, -16, -90, -91, -127) == [8, 8, 9, 10, 14, 15, 15]
    assert bucket(-128, -1000) == [15, 15]
    assert bucket(*range(1, 300)) == [16 + b for b in bucket(*range(-1, -300, -1))]
    assert bucket(5, 0, -1, -15, -1000, bidirectional=False) == [0, 0, 1, 15, 31]


def test_t5_attention_bias_is_by_key_minus_query():
    t5 = randomize(T5Encoder(T5))
    bias = bias_of(t5, 4)[0]                                 # (heads, query, key)
    close(bias[:, 1, 3], t5.position_bias.weight[16 + 2])
    close(bias[:, 3, 1], t5.position_bias.weight[2])


def test_t5_masks_nothing_so_padding_is_attended_to():
    t5 = randomize(T5Encoder(T5))
    ids, other = torch.tensor([[5, 6, 7, 1, 0, 0, 0, 0]]), torch.tensor([[5, 6, 7, 1, 9, 9, 9, 9]])
    assert (t5(ids) - t5(other))[:, :4].abs().max() > 1e-3


def test_t5_ends_with_the_final_norm_and_scales_no_embedding():
    t5, ids = randomize(T5Encoder(T5)), torch.randint(3, 300, (1, 9), generator=rng(3))
    x, bias = t5.token_embedding(ids), bias_of(t5, 9)
    for layer in t5.layers:
        x = x + layer.attention(layer.norm1(x), bias)
        x = x + layer.feed_forward(layer.norm2(x))
    close(t5(ids), t5.final_norm(x))


# ---- Tokenizers ----------------------------------------------------------------------------------

def write_clip_vocabulary(folder):
    """Every byte, with and without the end of a word, a few merges, and the two special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>")]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    return folder


def write_t5_vocabulary(file):
    """A small SentencePiece model with T5's special ids: padding 0, end 1, unknown 2. It has no
    rules for white space, as the shipped one."""
    sentences = ["a red cat sits", "two blue dogs sit on a red mat", "the cat reads </s> <pad>"] * 5
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(file.with_suffix("")), vocab_size=50,
        hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        normalization_rule_name="identity", minloglevel=2)
    return file.with_suffix(".model")


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return write_clip_vocabulary(folder / "clip"), write_t5_vocabulary(folder / "spiece.model")


def test_padding_is_the_end_token_for_clip_l_and_zero_for_clip_g_and_t5(vocabularies):
    clip, t5 = CLIPTokenizer(vocabularies[0]), T5Tokenizer(vocabularies[1])
    red, cat = clip.backend.token_to_id("red</w>"), clip.backend.token_to_id("cat</w>")
    ids, needed = clip(["red cat"], 8)
    assert ids.tolist() == [[clip.start, red, cat] + [clip.end] * 5] and needed.tolist() == [4]
    ids, _ = CLIPTokenizer(vocabularies[0], padding=0)(["red cat"], 8)
    assert ids.tolist() == [[clip.start, red, cat, clip.end] + [0] * 4]
    row = t5(["red cat"], 8)[0][0].tolist()
    end = row.index(1)
    assert t5.backend.decode(row[:end]) == "red cat" and set(row[end + 1 :]) == {0}


def test_the_size_of_a_vocabulary_is_beyond_its_end_token(vocabularies, tmp_path):
    """So a vocabulary with shifted ids does not fit its CLIP: checkpoints.py compares the sizes."""
    vocab = json.loads((vocabularies[0] / "vocab.json").read_text())
    assert CLIPTokenizer(vocabularies[0]).vocab_size == len(vocab) == 518
    (tmp_path / "merges.txt").write_text((vocabularies[0] / "merges.txt").read_text())
    shifted = {token: i + 1 for token, i in vocab.items()}
    (tmp_path / "vocab.json").write_text(json.dumps(shifted))
    assert CLIPTokenizer(tmp_path).vocab_size == 519


def test_empty_prompts_are_the_end_token_and_padding(vocabularies):
    clip = CLIPTokenizer(vocabularies[0], padding=0)
    for empty in ("", "   ", "\n"):
        assert clip([empty], 5)[0].tolist() == [[clip.start, clip.end, 0, 0, 0]]
        assert T5Tokenizer(vocabularies[1])([empty], 4)[0].tolist() == [[1, 0, 0, 0]]


SPACES = ["\n", "\t", "\r\n", " \n\t ", "\x0c", "\x85", "\xa0", "\u1680", "\u2003", "\u2028",
          "\u2029", "\u202f", "\u205f", "\u3000"]


@pytest.mark.parametrize("space", SPACES, ids=ascii)
def test_white_space_of_every_kind_is_one_space_for_every_tokenizer(vocabularies, space):
    for tokenizer in (CLIPTokenizer(vocabularies[0]), T5Tokenizer(vocabularies[1])):
        ids, _ = tokenizer([f"{space}red{space}cat{space}", "red cat"], 12)
        assert torch.equal(ids[0], ids[1])
        assert 2 not in tokenizer(["red cat"], 12)[0]                         # T5's <unk>


def test_clip_text_is_lower_cased(vocabularies):
    ids, _ = CLIPTokenizer(vocabularies[0])(["Red CAT", "red cat"], 8)
    assert torch.equal(ids[0], ids[1])


def test_truncation_keeps_the_first_tokens_and_the_end_token(vocabularies):
    clip, t5 = CLIPTokenizer(vocabularies[0]), T5Tokenizer(vocabularies[1])
    ids, needed = clip(["red " * 50, "red"], 10)
    red = clip.backend.token_to_id("red</w>")
    assert ids[0].tolist() == [clip.start] + [red] * 8 + [clip.end]
    assert needed.tolist() == [52, 3]
    whole, _ = t5(["red cat " * 50], 400)
    cut, needed = t5(["red cat " * 50], 10)
    assert cut[0].tolist() == whole[0, :9].tolist() + [1]
    assert needed[0] == (whole[0] != 0).sum() > 10


TEXTS = ["red cat", "a </s> cat <pad> <unk>", "RED! <extra_id_0> dog's  mat", "", "caf\u00e9"]


def test_clip_reads_a_folder_that_has_only_tokenizer_json(vocabularies, tmp_path):
    """As transformers 5 writes it: "!" special as padding, start and end put around every text."""
    first = CLIPTokenizer(vocabularies[0], 0)
    saved = Tokenizer(first.backend.model)
    saved.normalizer, saved.pre_tokenizer = first.backend.normalizer, first.backend.pre_tokenizer
    saved.add_special_tokens(["!", "<|startoftext|>", "<|endoftext|>"])
    saved.save(str(tmp_path / "tokenizer.json"))
    assert saved.encode("a!").ids != first.backend.encode("a!").ids
    for ours, expected in zip(CLIPTokenizer(tmp_path, 0)(TEXTS), first(TEXTS)):
        assert torch.equal(ours, expected)


def test_t5_reads_tokenizer_json_as_sentencepiece_reads_its_model(vocabularies, tmp_path):
    """Pieces and scores as in spiece.model, sentinels and special tokens as transformers adds."""
    first = T5Tokenizer(vocabularies[1])
    vocab = []
    for i in range(first.vocab_size):
        vocab.append((first.backend.id_to_piece(i), first.backend.get_score(i)))
    sentinels = ["<extra_id_1>", "<extra_id_0>"]
    saved = Tokenizer(models.Unigram(vocab + [(name, 0.0) for name in sentinels], unk_id=2))
    saved.pre_tokenizer = pre_tokenizers.Metaspace()
    saved.add_special_tokens(["<pad>", "</s>", "<unk>", *sentinels])
    saved.save(str(tmp_path / "tokenizer.json"))
    second = T5Tokenizer(tmp_path / "tokenizer.json")
    assert second.vocab_size == first.vocab_size == len(vocab)
    assert saved.encode(TEXTS[1]).ids != first.backend.encode(TEXTS[1])       # tokens there
    for ours, expected in zip(second(TEXTS), first(TEXTS)):
        assert torch.equal(ours, expected)


def golden_prompts():
    file = TOKENIZERS / "golden.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


needs_tokenizers = pytest.mark.skipif(not golden_prompts(), reason=f"no token ids at {TOKENIZERS}")


@needs_tokenizers
@pytest.mark.parametrize("which, padding", [("clip_l", None), ("clip_g", 0)])
def test_clip_ids_equal_the_released_tokenizers(which, padding):
    """SD3's second config makes "!" the padding token; `clip_g` is the reading without that."""
    prompts = golden_prompts()
    ids, needed = CLIPTokenizer(TOKENIZERS / "clip_l", padding)([p["text"] for p in prompts], 77)
    wrong = [p["id"] for p, row in zip(prompts, ids.tolist()) if row != p[which]]
    assert wrong == [] and len(prompts) >= 400
    assert needed.tolist() == [p["clip_full_len"] for p in prompts]


@needs_tokenizers
@pytest.mark.parametrize("length", [77, 256])
@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.json"])
def test_t5_ids_equal_the_released_tokenizer(file, length):
    """Three prompts spell special tokens out. Ours reads them as text, as SentencePiece does."""
    prompts = golden_prompts()
    ids, _ = T5Tokenizer(TOKENIZERS / "t5" / file)([p["text"] for p in prompts], length)
    wrong = []
    for prompt, row in zip(prompts, ids.tolist()):
        expected = prompt[f"t5_{length}"]
        if "t5_sentencepiece" in prompt:
            expected = prompt["t5_sentencepiece"][:-1][: length - 1] + [1]
            expected = expected + [0] * (length - len(expected))
        if row != expected:
            wrong.append(prompt["id"])
    assert wrong == [] and sum("t5_sentencepiece" in prompt for prompt in prompts) == 3


# ---- The three together --------------------------------------------------------------------------

def encoders(vocabularies, names=ALL, **lengths):
    clip, t5 = vocabularies
    vocab_size = len(json.loads((clip / "vocab.json").read_text()))
    l, g = replace(CLIP_L, vocab_size=vocab_size), replace(CLIP_G, vocab_size=vocab_size)
    g = replace(g, hidden_size=192)
    networks = {"clip_l": CLIPTextEncoder(l), "clip_g": CLIPTextEncoder(g), "t5": T5Encoder(T5)}
    tokenizers = {"clip_l": CLIPTokenizer(clip), "clip_g": CLIPTokenizer(clip, padding=0),
                  "t5": T5Tokenizer(t5)}
    chosen = {name: randomize(networks[name]) for name in names}
    return TextEncoders(chosen, tokenizers, replace(TEXT, **lengths)).eval()


def test_prompts_become_the_three_encoders_outputs_in_place(vocabularies):
    text = encoders(vocabularies).requires_grad_(True)
    context, pooled = text(["red cat", ""])
    ids = text.tokenize(["red cat", ""])
    l, pooled_l, _ = text.encoders["clip_l"](ids["clip_l"])
    g, pooled_g, _ = text.encoders["clip_g"](ids["clip_g"])
    close(context[:, :77, :128], l)
    close(context[:, :77, 128:320], g)
    close(context[:, 77:], text.encoders["t5"](ids["t5"]), 1e-4)
    close(pooled, torch.cat([pooled_l, pooled_g], dim=1))
    assert not context.requires_grad and not pooled.requires_grad             # frozen


@pytest.mark.parametrize("t5_length", [77, 256, 5])
def test_t5_length_is_an_argument(vocabularies, t5_length):
    text = encoders(vocabularies, t5_length=t5_length)
    assert text.tokenize(["red"])["t5"].shape == (1, t5_length)
    assert text(["red"])[0].shape == (1, 77 + t5_length, 384)
    assert text.unconditional(3)[0].shape == (3, 77 + t5_length, 384)


@pytest.mark.parametrize("without", [("clip_l",), ("clip_g",), ("t5",), ("clip_g", "t5")])
def test_leaving_encoders_out_of_a_prompt_zeroes_only_them(vocabularies, without):
    whole, part = encoders(vocabularies)(["red cat"]), encoders(vocabularies)(["red cat"], without)
    ours, all_three = parts(part[0][0], part[1][0]), parts(whole[0][0], whole[1][0])
    for name in ALL:
        for piece, complete in zip(ours[name], all_three[name]):
            assert complete.any() or not complete.numel()
            assert torch.equal(piece, 0 * complete if name in without else complete)


@pytest.mark.parametrize("present", [("clip_l",), ("clip_g", "t5"), ("t5",)])
def test_absent_encoders_give_zeros_as_if_they_were_left_out(vocabularies, present):
    absent = tuple(name for name in ALL if name not in present)
    ours = encoders(vocabularies, present)(["red cat", ""])
    expected = encoders(vocabularies)(["red cat", ""], absent)
    close(ours[0], expected[0])
    close(ours[1], expected[1])
    assert ours[0].any()


def test_an_encoder_that_is_left_out_does_not_run(vocabularies):
    text = encoders(vocabularies)
    text.encoders["t5"].forward = None
    text(["red cat"], without=("t5",))
    with pytest.raises(TypeError):
        text(["red cat"])


def test_the_two_unconditional_inputs_are_zeros_and_the_encoded_empty_prompt(vocabularies):
    """The paper trains with zeros; samplers for the released weights encode ""."""
    text = encoders(vocabularies)
    zeros, empty, dropped = text.unconditional(1), text([""]), text(["red"], without=ALL)
    for zero, encoded, left_out in zip(zeros, empty, dropped):
        assert zero.shape == encoded.shape and not zero.any() and torch.equal(zero, left_out)
        assert encoded.abs().max() > 0.1


def test_a_text_that_is_not_utf8_is_refused(vocabularies):
    """The command line gives such bytes as lone surrogates."""
    with pytest.raises(ValueError, match="surrogates not allowed"):
        encoders(vocabularies)(["red", "a \udcff cat"])


def test_one_text_is_no_list_of_texts(vocabularies):
    with pytest.raises(ValueError, match="give a list of texts"):
        encoders(vocabularies)("red cat")


def test_the_note_about_cut_captions_counts_all_of_them_and_is_one_line(vocabularies, capsys):
    """Tokens count, not characters."""
    text = encoders(vocabularies, ("clip_l", "clip_g"))
    text.tokenize(["red" + " " * 5000 + "cat", "red " * 75])                  # 4 tokens and 77
    text.note_cut()
    assert capsys.readouterr().err == ""
    text.tokenize(["red cat", "red " * 76, "cat " + "red " * 80])             # 304 characters: 78
    text.tokenize(["red " * 90])
    assert capsys.readouterr().err == ""
    text.note_cut()
    assert capsys.readouterr().err == (
        "note: 3 of 6 texts are cut, the longest by 15 tokens\n")                # 92 of 77


def test_counting_cut_captions_takes_no_memory(vocabularies):
    """A set can have 10^8 of them."""
    text = encoders(vocabularies, ("clip_l",))
    before = sum(map(sys.getsizeof, vars(text).values()))
    for _ in range(20):
        text.tokenize(["red " * 80] * 50)
    assert text.tokenize([])["clip_l"].shape == (0, 77)                       # no text, no error
    assert sum(map(sys.getsizeof, vars(text).values())) < before + 100


def test_the_demonstration_shows_tokens_and_the_papers_shapes(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["text_encoders.py", "a red circle"])
    module.main()
    printed = capsys.readouterr().out
    assert "red</w>" in printed and "\u2581red" in printed
    assert "context (1, 154, 4096), 91% of it zero\npooled (1, 2048), 62% of it zero" in printed
