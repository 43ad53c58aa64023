"""text_encoders.py: CLIP and T5 against their formulas, tokenizers against golden ids, the paper's combination."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from tokenizers import pre_tokenizers

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

TOKENIZERS = Path(__file__).parent.parent.parent / "shared" / "data" / "tokenizers"
CLIP_L = CLIPConfig(vocab_size=600, hidden_size=128, num_layers=3, max_length=77)
CLIP_G = replace(CLIP_L, activation="gelu", projection_dim=192)
T5 = T5Config(vocab_size=300, hidden_size=384, ff_size=64, num_layers=2, num_heads=2)
TEXT = TextConfig(clip_l_width=128, clip_g_width=192, t5_width=384)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def randomize(module, seed=0):
    """Every parameter random, norms and biases too."""
    generator = rng(seed)
    for parameter in module.requires_grad_(False).parameters():
        parameter.normal_(0, 0.3 if parameter.dim() == 1 else 0.15, generator=generator)
    return module.eval()


def clip_ids(*prompts, length=12, vocab_size=600, padding=None):
    """Rows of start, the given ids, end, padding."""
    start, end = vocab_size - 2, vocab_size - 1
    rows = [[start, *prompt, end] for prompt in prompts]
    return torch.tensor([row + [end if padding is None else padding] * (length - len(row)) for row in rows])


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------------------
# CLIP
# ------------------------------------------------------------------------------------------------------------

def clip_states(clip, ids):
    """The residual stream before every layer and after the last one."""
    x = clip.token_embedding(ids) + clip.position_embedding.weight[: ids.shape[1]]
    states = [x]
    for layer in clip.layers:
        states.append(layer(states[-1]))
    return states


def test_clip_context_is_the_penultimate_state_without_the_final_norm():
    clip, ids = randomize(CLIPTextEncoder(CLIP_L)), clip_ids([5, 6, 7], [8])
    states = clip_states(clip, ids)
    penultimate, _, last = clip(ids)
    close(penultimate, states[-2])
    close(last, clip.final_norm(states[-1]))
    assert (penultimate - clip.final_norm(penultimate)).abs().max() > 0.1
    clip.final_norm.weight.mul_(3)
    randomize(clip.layers[-1], seed=5)
    assert torch.equal(clip(ids)[0], penultimate)                                 # neither the norm nor the last layer matters


def test_clip_pooled_is_the_normed_state_at_the_first_end_token():
    """CLIP-L pads with the end token: the first one counts, and causality makes it blind to what follows."""
    clip, ids = randomize(CLIPTextEncoder(CLIP_L)), clip_ids([5, 6, 7], [8])
    _, pooled, last = clip(ids)
    close(pooled, torch.stack([last[0, 4], last[1, 2]]))
    _, zero_padded, _ = clip(clip_ids([5, 6, 7], [8], padding=0))
    close(zero_padded, pooled)


def test_clip_g_pooled_is_projected_and_neither_is_normalised_to_length_one():
    clip, ids = randomize(CLIPTextEncoder(CLIP_G)), clip_ids([5, 6, 7], [8], padding=0)
    _, pooled, last = clip(ids)
    close(pooled, torch.stack([last[0, 4], last[1, 2]]) @ clip.projection.weight.T)
    assert pooled.shape == (2, 192) and CLIPTextEncoder(CLIP_L).projection is None
    for one in (pooled, randomize(CLIPTextEncoder(CLIP_L))(ids)[1]):
        assert (one.norm(dim=1) - 1).abs().min() > 0.1


def test_clip_is_causal():
    clip, ids = randomize(CLIPTextEncoder(CLIP_L)), clip_ids([5, 6, 7, 8, 9])
    changed = ids.clone()
    changed[0, 4] = 11
    before, after = clip(ids), clip(changed)
    for which in (0, 2):
        close(after[which][:, :4], before[which][:, :4])
        assert ((after[which] - before[which])[:, 4:].abs().amax(-1) > 1e-4).all()


def test_clip_layer_by_hand():
    """Pre-norm; softmax of q k / sqrt(64) over this and earlier tokens; two heads of 64; the activation of its kind."""
    x = torch.randn(1, 5, 128, generator=rng(1))
    for config, activation in ((CLIP_L, quick_gelu), (CLIP_G, lambda y: 0.5 * y * (1 + torch.erf(y / math.sqrt(2))))):
        layer = randomize(CLIPLayer(config))
        h = layer.norm1(x)[0]
        q, k, v = (linear(h).view(5, 2, 64) for linear in (layer.q, layer.k, layer.v))
        later = torch.ones(5, 5, dtype=torch.bool).triu(1)
        heads = [torch.softmax((q[:, i] @ k[:, i].T / 8).masked_fill(later, -torch.inf), -1) @ v[:, i] for i in range(2)]
        middle = x + layer.out(torch.cat(heads, dim=-1))
        close(layer(x), middle + layer.fc2(activation(layer.fc1(layer.norm2(middle)))), 1e-4)


def test_quick_gelu_is_one_sigmoid_and_not_gelu():
    x = torch.tensor([-1.0, 0.0, 2.0])
    close(quick_gelu(x), torch.tensor([-1 / (1 + math.exp(1.702)), 0.0, 2 / (1 + math.exp(-3.404))]))
    assert (quick_gelu(x) - F.gelu(x)).abs().max() > 0.005


def test_clip_norms_have_epsilon_1e_5():
    clip = CLIPTextEncoder(CLIP_L)
    norms = [m for m in clip.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 2 * 3 + 1 and {norm.eps for norm in norms} == {1e-5}


def test_clip_refuses_more_tokens_than_it_has_positions():
    with pytest.raises(ValueError, match="78 tokens, but this CLIP has 77 positions"):
        CLIPTextEncoder(CLIP_L)(torch.zeros(1, 78, dtype=torch.int64))


def test_default_sizes_are_those_of_clip_l_clip_g_and_t5_xxl():
    with torch.device("meta"):
        clip_l, t5 = CLIPTextEncoder(CLIPConfig()), T5Encoder(T5Config())
        clip_g = CLIPTextEncoder(CLIPConfig(hidden_size=1280, num_layers=32, activation="gelu", projection_dim=1280))
    millions = lambda network: sum(p.numel() for p in network.parameters()) / 1e6
    assert [millions(network) for network in (clip_l, clip_g, t5)] == pytest.approx([123.06, 694.66, 4762.31], abs=0.01)
    assert (clip_l.config.num_heads, clip_g.config.num_heads, t5.config.num_heads) == (12, 20, 64)


# ------------------------------------------------------------------------------------------------------------
# T5
# ------------------------------------------------------------------------------------------------------------

def test_t5_attention_by_hand_has_no_1_over_sqrt_d_and_adds_the_bias():
    attention, x = randomize(T5Attention(T5)), 0.3 * torch.randn(1, 5, 384, generator=rng(1))
    bias = torch.randn(1, 2, 5, 5, generator=rng(2))
    q, k, v = (linear(x)[0].view(5, 2, 64) for linear in (attention.q, attention.k, attention.v))
    heads = [torch.softmax(q[:, i] @ k[:, i].T + bias[0, i], dim=-1) @ v[:, i] for i in range(2)]
    close(attention(x, bias)[0], attention.out(torch.cat(heads, dim=-1)), 1e-4)


def test_t5_feed_forward_is_gated_tanh_gelu():
    feed_forward, x = randomize(T5FeedForward(T5)), torch.randn(1, 5, 384, generator=rng(1))
    gate = feed_forward.gate(x)
    gelu = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    close(feed_forward(x), feed_forward.down(gelu * feed_forward.up(x)), 1e-4)


def test_t5_norm_is_the_root_mean_square_with_epsilon_1e_6_in_fp32():
    norm = RMSNorm(4)
    norm.weight.data = torch.tensor([1.0, 2.0, 1.0, 1.0])
    small = 1e-3 * torch.tensor([1.0, 1.0, 1.0, 1.0])                             # mean 1e-3: not subtracted
    close(norm(small), torch.tensor([1.0, 2.0, 1.0, 1.0]) / math.sqrt(2))         # mean square 1e-6 + epsilon 1e-6
    large = torch.full((4,), 300.0, dtype=torch.float16)                          # its square overflows fp16
    assert norm(large).dtype == torch.float16 and norm(large).tolist() == pytest.approx([1, 2, 1, 1], rel=1e-3)


def test_t5_has_no_biases_and_one_table_of_positions_for_all_layers():
    t5 = T5Encoder(T5)
    assert not any("bias" in name for name in t5.state_dict() if name != "position_bias.weight")
    assert t5.position_bias.weight.shape == (32, 2)
    t5, ids = randomize(t5), torch.randint(3, 300, (1, 9), generator=rng(3))
    seen = []
    for layer in t5.layers:
        layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    t5(ids)
    assert len(seen) == 2 and torch.equal(seen[0], seen[1]) and torch.equal(seen[0], t5.attention_bias(9))


def test_t5_position_buckets_are_exact_when_near_and_logarithmic_when_far():
    bucket = lambda *distances: relative_position_bucket(torch.tensor(distances)).tolist()
    assert bucket(0, -1, -7) == [0, 1, 7]                                         # keys before the query
    assert bucket(1, 7) == [17, 23]                                               # keys after: the other half
    # 8 buckets from 8 to 128, equal steps of the logarithm: bucket = 8 + floor(8 log(d / 8) / log 16)
    assert bucket(-8, -11, -12, -16, -90, -91, -127, -128, -1000) == [8, 8, 9, 10, 14, 15, 15, 15, 15]
    assert bucket(*range(1, 300)) == [16 + b for b in bucket(*range(-1, -300, -1))]
    one_way = relative_position_bucket(torch.tensor([5, 0, -1, -15, -1000]), bidirectional=False)
    assert one_way.tolist() == [0, 0, 1, 15, 31]                                  # a decoder sees no later keys


def test_t5_attention_bias_is_by_key_minus_query():
    t5 = randomize(T5Encoder(T5))
    bias = t5.attention_bias(4)[0]                                                # (heads, query, key)
    close(bias[:, 1, 3], t5.position_bias.weight[16 + 2])
    close(bias[:, 3, 1], t5.position_bias.weight[2])


def test_t5_masks_nothing_so_padding_is_attended_to():
    t5 = randomize(T5Encoder(T5))
    ids = torch.tensor([[5, 6, 7, 1, 0, 0, 0, 0]])
    other = torch.tensor([[5, 6, 7, 1, 9, 9, 9, 9]])
    assert (t5(ids) - t5(other))[:, :4].abs().max() > 1e-3
    close(t5(ids, mask=torch.ones_like(ids)), t5(ids))
    mask = (ids != 0).long()
    close(t5(ids, mask)[:, :4], t5(other, mask)[:, :4])
    close(t5(ids, mask)[:, :4], t5(ids[:, :4]))                                   # masked padding is as good as none


def test_t5_ends_with_the_final_norm_and_scales_no_embedding():
    t5, ids = randomize(T5Encoder(T5)), torch.randint(3, 300, (1, 9), generator=rng(3))
    x, bias = t5.token_embedding(ids), t5.attention_bias(9)
    for layer in t5.layers:
        x = x + layer.attention(layer.norm1(x), bias)
        x = x + layer.feed_forward(layer.norm2(x))
    close(t5(ids), t5.final_norm(x))


# ------------------------------------------------------------------------------------------------------------
# Tokenizers
# ------------------------------------------------------------------------------------------------------------

def write_clip_vocabulary(folder):
    """Every byte, with and without the end of a word, a few merges, and the two special tokens as the largest ids."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>")]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges),
              "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return folder


def write_t5_vocabulary(file):
    """A small SentencePiece model with T5's special ids: padding 0, end 1, unknown 2."""
    sentences = ["a red cat sits", "two blue dogs sit on a red mat", "the cat reads words", "a dog and a cat"] * 5
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(file.with_suffix("")), vocab_size=50, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    return file.with_suffix(".model")


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return write_clip_vocabulary(folder / "clip"), write_t5_vocabulary(folder / "spiece.model")


def test_padding_is_the_end_token_for_clip_l_and_zero_for_clip_g_and_t5(vocabularies):
    clip, t5 = vocabularies
    clip_l, clip_g, t5 = CLIPTokenizer(clip), CLIPTokenizer(clip, padding=0), T5Tokenizer(t5)
    (l,), (g,), (t,) = (tokenizer(["red cat"], 8)[0].tolist() for tokenizer in (clip_l, clip_g, t5))
    red, cat = (clip_l.backend.token_to_id(token) for token in ("red</w>", "cat</w>"))
    assert l == [clip_l.start, red, cat] + [clip_l.end] * 5
    assert g == [clip_l.start, red, cat, clip_l.end] + [0] * 4
    end = t.index(1)
    assert end > 0 and set(t[end + 1 :]) == {0} and t5.backend.decode(t[:end]) == "red cat"
    assert clip_l.end == max(clip_l.backend.get_vocab().values())                 # "the largest id" finds it


def test_empty_prompts_are_the_end_token_and_padding(vocabularies):
    clip, t5 = vocabularies
    for empty in ("", "   "):
        start_end = CLIPTokenizer(clip)([""], 2)[0][0].tolist()
        assert CLIPTokenizer(clip, padding=0)([empty], 5)[0].tolist() == [[*start_end, 0, 0, 0]]
        assert T5Tokenizer(t5)([empty], 4)[0].tolist() == [[1, 0, 0, 0]]


def test_clip_text_is_lower_cased_and_white_space_collapsed(vocabularies):
    tokenizer = CLIPTokenizer(vocabularies[0])
    ids, _ = tokenizer(["  Red \n\t CAT ", "red cat"], 8)
    assert torch.equal(ids[0], ids[1])
    assert tokenizer.pieces(ids[1, 1:3]) == ["red</w>", "cat</w>"]


def test_truncation_keeps_the_first_tokens_and_the_end_token(vocabularies):
    clip, t5 = vocabularies
    tokenizer = CLIPTokenizer(clip)
    ids, needed = tokenizer(["red " * 50, "red"], 10)
    red = tokenizer.backend.token_to_id("red</w>")
    assert ids[0].tolist() == [tokenizer.start] + [red] * 8 + [tokenizer.end] and needed == [52, 3]
    whole, _ = T5Tokenizer(t5)(["red cat " * 50], 400)
    cut, needed = T5Tokenizer(t5)(["red cat " * 50], 10)
    assert cut[0].tolist() == whole[0, :9].tolist() + [1] and needed[0] == (whole[0] != 0).sum() > 10


def encoders(vocabularies, names=("clip_l", "clip_g", "t5"), **lengths):
    clip, t5 = vocabularies
    vocab_size = len(json.loads((clip / "vocab.json").read_text()))
    makers = {"clip_l": lambda: (CLIPTextEncoder(replace(CLIP_L, vocab_size=vocab_size)), CLIPTokenizer(clip)),
              "clip_g": lambda: (CLIPTextEncoder(replace(CLIP_G, vocab_size=vocab_size, hidden_size=192)),
                                 CLIPTokenizer(clip, padding=0)),
              "t5": lambda: (T5Encoder(T5), T5Tokenizer(t5))}
    made = {name: makers[name]() for name in names}
    return TextEncoders({name: randomize(network) for name, (network, _) in made.items()},
                        {name: tokenizer for name, (_, tokenizer) in made.items()}, replace(TEXT, **lengths)).eval()


def test_truncation_counts_tokens_not_characters_and_says_so_once(vocabularies, capsys):
    text = encoders(vocabularies, ("clip_l",))
    text.tokenize(["red" + " " * 5000 + "cat"])                                   # 5006 characters, four tokens
    assert capsys.readouterr().err == ""
    text.tokenize(["red cat", "red " * 76])                                       # 304 characters, 78 tokens
    said = capsys.readouterr().err
    assert "78 tokens for clip_l" in said and "cut to 77" in said and said.count("\n") == 1 and "'red red" in said
    text.tokenize(["red " * 90])
    assert capsys.readouterr().err == ""


def golden_prompts():
    file = TOKENIZERS / "golden.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


needs_tokenizers = pytest.mark.skipif(not golden_prompts(), reason=f"no golden token ids at {TOKENIZERS}")


@needs_tokenizers
@pytest.mark.parametrize("which, padding", [("clip_l", None), ("clip_g", 0)])
def test_clip_ids_equal_the_released_tokenizers(which, padding):
    prompts = golden_prompts()
    ids, needed = CLIPTokenizer(TOKENIZERS / "clip_l", padding)([prompt["text"] for prompt in prompts], 77)
    assert [p["id"] for p, row in zip(prompts, ids.tolist()) if row != p[which]] == []
    assert [p["id"] for p, n in zip(prompts, needed) if n != p["clip_full_len"]] == []
    assert len(prompts) >= 400


@needs_tokenizers
@pytest.mark.parametrize("length", [77, 256])
def test_t5_ids_equal_the_released_tokenizer(length):
    """Three prompts spell special tokens out; ours reads those as text, as SentencePiece does (`t5_sentencepiece`)."""
    prompts = golden_prompts()

    def expected(prompt):
        if "t5_sentencepiece" not in prompt:
            return prompt[f"t5_{length}"]
        row = prompt["t5_sentencepiece"][:-1][: length - 1] + [1]
        return row + [0] * (length - len(row))
    ids, needed = T5Tokenizer(TOKENIZERS / "t5" / "spiece.model")([prompt["text"] for prompt in prompts], length)
    assert [p["id"] for p, row in zip(prompts, ids.tolist()) if row != expected(p)] == []
    assert [p["id"] for p, n in zip(prompts, needed) if "t5_sentencepiece" not in p and n != p["t5_full_len"]] == []
    assert sum("t5_sentencepiece" in prompt for prompt in prompts) == 3


@needs_tokenizers
def test_released_paddings_are_49407_0_and_0():
    last = lambda tokenizer: tokenizer(["a cat"], 77)[0][0, -1].item()
    clip = TOKENIZERS / "clip_l"
    assert [last(CLIPTokenizer(clip)), last(CLIPTokenizer(clip, 0)), last(T5Tokenizer(TOKENIZERS / "t5" / "spiece.model"))] == [
        49407, 0, 0]


# ------------------------------------------------------------------------------------------------------------
# The combination (App. B.2) and dropping encoders (App. B.3)
# ------------------------------------------------------------------------------------------------------------

def test_context_is_clip_side_by_side_padded_with_t5_behind():
    l, g, t5 = torch.full((2, 77, 128), 1.0), torch.full((2, 77, 192), 2.0), torch.full((2, 20, 384), 3.0)
    context, pooled = combine(l, g, t5, l[:, 0], g[:, 0])
    assert context.shape == (2, 97, 384) and pooled.shape == (2, 320)
    for values, part in ((1, context[:, :77, :128]), (2, context[:, :77, 128:320]), (0, context[:, :77, 320:]),
                         (3, context[:, 77:]), (1, pooled[:, :128]), (2, pooled[:, 128:])):
        assert (part == values).all() and part.numel()


def test_sd3_widths_give_154_tokens_of_4096_and_2048_pooled():
    config = TextConfig()
    assert (config.clip_length + config.t5_length, config.context_dim, config.pooled_dim) == (154, 4096, 2048)


def test_prompts_become_the_three_encoders_outputs_in_place(vocabularies):
    text = encoders(vocabularies).requires_grad_(True)
    context, pooled = text(["red cat", ""])
    ids = text.tokenize(["red cat", ""])
    l, pooled_l, _ = text.encoders["clip_l"](ids["clip_l"])
    g, pooled_g, _ = text.encoders["clip_g"](ids["clip_g"])
    close(context[:, :77, :128], l)
    close(context[:, :77, 128:320], g)
    close(context[:, 77:], text.encoders["t5"](ids["t5"]))
    close(pooled, torch.cat([pooled_l, pooled_g], dim=1))
    assert not context.requires_grad and not pooled.requires_grad                 # frozen, whatever their parameters say


@pytest.mark.parametrize("t5_length", [77, 256, 5])
def test_t5_length_is_an_argument(vocabularies, t5_length):
    text = encoders(vocabularies, t5_length=t5_length)
    assert text.tokenize(["red"])["t5"].shape == (1, t5_length)
    assert text(["red"])[0].shape == (1, 77 + t5_length, 384)
    assert text.unconditional(3)[0].shape == (3, 77 + t5_length, 384)


PARTS = {"clip_l": (lambda c: c[:77, :128], lambda p: p[:128]), "clip_g": (lambda c: c[:77, 128:320], lambda p: p[128:]),
         "t5": (lambda c: c[77:], lambda p: p[:0])}


def test_dropping_an_encoder_zeroes_its_sequence_and_its_pooled_vector_sample_by_sample():
    context, pooled = torch.ones(8, 154, 384), torch.ones(8, 320)
    context[:, :77, 320:] = 0                                                     # the padding of combine
    keep = torch.tensor([[bool(i & 4), bool(i & 2), bool(i & 1)] for i in range(8)])      # every subset
    dropped_context, dropped_pooled = drop_encoders(context, pooled, keep, TEXT)
    for i in range(8):
        for (sequence_part, pooled_part), kept in zip(PARTS.values(), keep[i].tolist()):
            assert (sequence_part(dropped_context[i]) == float(kept)).all()
            assert (pooled_part(dropped_pooled[i]) == float(kept)).all()
    assert (dropped_context[:, :77, 320:] == 0).all()
    assert torch.equal(dropped_context[7], context[7]) and (context == 1).any()   # the input is left as it was
    half = drop_encoders(context.half(), pooled, keep, TEXT)
    assert half[0].dtype == torch.float16 and half[1].dtype == torch.float32


@pytest.mark.parametrize("without", [("clip_l",), ("clip_g",), ("t5",), ("clip_g", "t5")])
def test_leaving_encoders_out_of_a_prompt_zeroes_only_them(vocabularies, without):
    text = encoders(vocabularies)
    whole, part = text(["red cat"]), text(["red cat"], without=without)
    for name, (sequence_part, pooled_part) in PARTS.items():
        for piece, x, y in ((sequence_part, whole[0][0], part[0][0]), (pooled_part, whole[1][0], part[1][0])):
            assert torch.equal(piece(y), torch.zeros_like(piece(y)) if name in without else piece(x))


def test_unknown_encoder_is_named_with_the_choices(vocabularies):
    with pytest.raises(ValueError, match="'clip_h'.*clip_l, clip_g, t5"):
        encoders(vocabularies)(["red"], without=("clip_h",))


@pytest.mark.parametrize("present", [("clip_l",), ("clip_g", "t5"), ("t5",)])
def test_absent_encoders_give_zeros_as_if_they_were_left_out(vocabularies, present):
    absent = tuple(name for name in PARTS if name not in present)
    some, all_three = encoders(vocabularies, present), encoders(vocabularies)
    for ours, expected in zip(some(["red cat", ""]), all_three(["red cat", ""], without=absent)):
        close(ours, expected)
        assert ours.abs().max() > 0 or present == ("t5",)                         # T5 has no pooled vector


def test_no_encoder_at_all_is_refused():
    with pytest.raises(ValueError, match="no text encoder"):
        TextEncoders({}, {}, TEXT)


def test_the_two_unconditional_inputs_are_zeros_and_the_encoded_empty_prompt(vocabularies):
    """The paper trains with zeros; samplers for the released weights encode ""."""
    text = encoders(vocabularies)
    zeros, empty = text.unconditional(1), text([""])
    dropped = text(["red"], without=("clip_l", "clip_g", "t5"))
    for zero, encoded, left_out in zip(zeros, empty, dropped):
        assert zero.shape == encoded.shape and (zero == 0).all() and torch.equal(zero, left_out)
        assert encoded.abs().max() > 0.1


def test_an_encoder_that_is_left_out_does_not_run(vocabularies):
    """T5-XXL is most of the work; and what it would have said, infinite in fp16 say, leaves no trace."""
    text = encoders(vocabularies)
    text.encoders["t5"].forward = None
    context, _ = text(["red cat"], without=("t5",))
    with pytest.raises(TypeError):
        text(["red cat"])
    broken, keep = torch.full_like(context, math.inf), torch.tensor([[False, False, False]])
    context, pooled = drop_encoders(broken, torch.full((1, text.config.pooled_dim), math.nan), keep, text.config)
    assert not context.any() and not pooled.any()


def test_one_text_is_no_list_of_texts(vocabularies):
    with pytest.raises(ValueError, match="give a list of texts"):
        encoders(vocabularies)("red cat")
