"""make_tiny.py: batches and losses by hand count and by the CLIP and T5 papers; what each stage
writes. All pictures, captions and prompts are made here."""

import json
import math
import shlex
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from checkpoints import SHIPPED, load_components, save_networks
from data import from_tensor, to_tensor
from devices import command
from geneval import Case, score
from mmdit import MMDiT, MMDiTConfig
from scenes import (
    BACKGROUNDS, OPPOSITE, RGB, Scene, Scenes, Thing, draw_scene, is_held_out, make_scene,
    scene_captions, vocabulary)
from text_encoders import CLIPTokenizer, T5Encoder, T5Tokenizer
from vae import VAE, kl_loss, reconstruction_loss

sys.path.insert(0, str(Path(__file__).parents[1] / "pretrained"))
import make_tiny

KINDS = ("color", "shape", "relation", "count", "size", "word")
TOKENIZERS = SHIPPED / "tokenizers"
PICTURES = 104                                         # of each source; the last 100 are held out
CLOTHES = ["a photo of a hat", "a photo of a shoe"]    # in turn


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """--data with pictures of one colour each: emoji i has (200, i, 0), clothing i (0, i, 200)."""
    folder = tmp_path_factory.mktemp("data")
    for i in range(PICTURES):
        for place, color, caption in (("emoji", (200, i, 0), f"emoji {i}"),
                                      ("photos/clothing", (0, i, 200), CLOTHES[i % 2])):
            (folder / place).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 50), color).save(folder / place / f"{i:03}.png")
            (folder / place / f"{i:03}.txt").write_text(caption)
    (folder / "prompts" / "t2i_compbench").mkdir(parents=True)
    (folder / "prompts" / "PartiPrompts.tsv").write_text("Prompt\tCategory\na  bird\tAnimals\n")
    (folder / "prompts" / "t2i_compbench" / "color.txt").write_text("a green bench\n\n")
    (folder / "prompts" / "geneval_evaluation_metadata.jsonl").write_text('{"prompt": "a cow"}\n')
    return folder


@pytest.fixture(scope="module")
def corpus(folder):
    return make_tiny.Corpus(folder)


@pytest.fixture
def few_texts(monkeypatch):
    """The first scenes only. Thousands would take seconds."""
    all_texts = make_tiny.scene_texts
    monkeypatch.setattr(make_tiny, "scene_texts", lambda count=0: all_texts(100))


def source_of(square):
    """("emoji" or "clothing", its number) of a flat square (3, H, W); ("scene", None) else."""
    pixels = np.asarray(from_tensor(square))
    red, green, blue = pixels[0, 0].tolist()
    flat = (pixels == pixels[0, 0]).all()
    names = {(200, 0): "emoji", (0, 200): "clothing"}
    if flat and (red, blue) in names:
        return names[red, blue], green
    return "scene", None


def texts_of(ids):
    """The texts of CLIP's ids (B, L). A token that ends a word ends with "</w>"."""
    backend = CLIPTokenizer(TOKENIZERS / "clip").backend
    texts = []
    for row in ids.tolist():
        texts.append(backend.decode(row).replace(" ", "").replace("</w>", " ").strip())
    return texts


def weights():
    """The parameters of a model that has none of its own. They say where it is."""
    return iter([torch.zeros(1)])


# ---- Captions and pictures -----------------------------------------------------------------------
def test_the_last_hundred_pictures_of_each_source_are_never_drawn(corpus):
    rng = np.random.default_rng(0)
    for name, captions in (("emoji", [f"emoji {i}" for i in range(4)]),
                           ("clothing", 2 * CLOTHES)):
        drawn = set()
        for _ in range(200):
            picture, caption = corpus.draw(name, rng)
            source, number = source_of(to_tensor(picture))
            assert source == name and caption == captions[number]
            drawn.add(number)
        assert drawn == {0, 1, 2, 3}
    held_out = [source_of(to_tensor(picture)) for picture in corpus.last("emoji", 16, 100)]
    assert held_out == [("emoji", number) for number in range(103, 3, -1)]


def test_prompts_are_the_lists_and_the_captions_without_headers_and_blank_lines(corpus):
    emoji = [f"emoji {i}" for i in range(PICTURES)]
    assert corpus.prompts() == [
        "a bird", "a green bench", "a cow", *emoji, *CLOTHES * (PICTURES // 2)]


def test_scene_texts_are_all_words_and_both_captions_of_the_first_training_scenes():
    source, expected = Scenes(30, seed=1), sorted(vocabulary())
    for index in range(30):
        expected += [caption for caption in source.captions(index) if caption]
    assert make_tiny.scene_texts(30) == expected


def test_tokenizers_have_the_layout_of_clip_and_the_ids_of_t5(tmp_path, corpus, monkeypatch):
    """CLIP: 256 bytes, 256 bytes that end a word, merges in their order, start token, end token.
    T5: padding 0, end 1, unknown 2 (Raffel et al. 2019)."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefghijklmnop"), 5)) for _ in range(900)]
    monkeypatch.setattr(make_tiny, "VOCABULARY", 600)
    monkeypatch.setattr(make_tiny, "scene_texts", lambda: texts)
    make_tiny.train_tokenizers(corpus, tmp_path)
    numbers = json.loads((tmp_path / "clip" / "vocab.json").read_text())
    tokens = sorted(numbers, key=numbers.get)
    assert list(numbers.values()) == list(range(600)) and tokens == list(numbers)
    assert [len(token) for token in tokens[:256]] == [1] * 256
    assert tokens[256:512] == [token + "</w>" for token in tokens[:256]]
    merges = (tmp_path / "clip" / "merges.txt").read_text().splitlines()[1:]
    assert tokens[512:598] == [merge.replace(" ", "") for merge in merges]
    assert tokens[598:] == ["<|startoftext|>", "<|endoftext|>"]
    ids = CLIPTokenizer(tmp_path / "clip")(["a HAT"], 8)[0][0].tolist()
    assert [tokens[i] for i in ids[:4]] == ["<|startoftext|>", "a</w>", "hat</w>", "<|endoftext|>"]
    t5 = T5Tokenizer(tmp_path / "t5" / "spiece.model").backend
    assert t5.get_piece_size() == 600 and t5.decode(t5.encode("a HAT")) == "a hat"
    assert (t5.pad_id(), t5.eos_id(), t5.unk_id(), t5.bos_id()) == (0, 1, 2, -1)


# ---- CLIP ----------------------------------------------------------------------------------------
def test_near_misses_of_a_pair_by_hand():
    a = Thing("circle", "red", "small", 1, 1, 20)
    b = Thing("square", "blue", "large", 40, 1, 20)
    scene = Scene("pair", 64, 64, "white", (a, b), "left of")
    rng = np.random.default_rng(0)
    exchanged = replace(a, color="blue"), replace(b, color="red")
    assert make_tiny.near_miss(scene, "color", rng) == replace(scene, things=exchanged)
    exchanged = replace(a, shape="square"), replace(b, shape="circle")
    assert make_tiny.near_miss(scene, "shape", rng) == replace(scene, things=exchanged)
    assert make_tiny.near_miss(scene, "relation", rng) == replace(scene, relation="right of")
    assert make_tiny.near_miss(scene, "count", rng) is None
    assert make_tiny.near_miss(scene, "word", rng) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_near_miss_differs_in_this_one_respect(kind):
    """Colours and shapes of a pair are exchanged; counted things change together; else one changes.
    All other fields are those of the scene. None says that the scene lacks this respect."""
    rng = np.random.default_rng(0)
    found = 0
    for index in range(400):
        scene = make_scene(3, index)
        almost = make_tiny.near_miss(scene, kind, rng)
        lacks = {"relation": not scene.relation, "count": scene.kind != "count",
                 "word": not scene.word}.get(kind, not scene.things)
        assert (almost is None) == lacks
        if lacks:
            continue
        found += 1
        if kind in ("relation", "word"):
            value = getattr(almost, kind)
            assert value != getattr(scene, kind)
            assert kind == "word" or value == OPPOSITE[scene.relation]
            assert replace(almost, **{kind: getattr(scene, kind)}) == scene
            continue
        assert replace(almost, things=scene.things) == scene
        if kind == "count":
            looks = {(thing.shape, thing.color, thing.size) for thing in almost.things}
            assert len(looks) == 1 and looks == {(t.shape, t.color, t.size) for t in scene.things}
            assert len(almost.things) in {2, 3, 4} - {len(scene.things)}
            continue
        restored, changed = [], 0
        for old, new in zip(scene.things, almost.things, strict=True):
            changed += getattr(new, kind) != getattr(old, kind)
            restored.append(replace(new, **{kind: getattr(old, kind)}))
        assert tuple(restored) == scene.things
        before = [getattr(thing, kind) for thing in scene.things]
        after = [getattr(thing, kind) for thing in almost.things]
        if scene.kind == "pair" and kind != "size" and before[0] != before[1]:
            assert after == before[::-1]
        else:
            assert changed == (len(before) if scene.kind == "count" else 1)
    assert found > 40


def test_near_captions_are_four_wrong_ones_and_none_shows_what_training_never_draws(monkeypatch):
    """With scenes in place of their captions, each scene can be looked at."""
    rng = np.random.default_rng(0)
    for index in range(100):
        scene = make_scene(3, index)
        captions = make_tiny.near_captions(scene, rng)
        assert len(captions) == 4 and scene_captions(scene)[1] not in captions
    monkeypatch.setattr(make_tiny, "scene_captions", lambda scene: ("", scene))
    for index in range(300):
        for almost in make_tiny.near_captions(make_scene(3, index), rng):
            shapes = [thing.shape for thing in almost.things]
            colors = [thing.color for thing in almost.things]
            assert not is_held_out(shapes, colors, almost.relation)


def test_things_of_a_twin_are_mirrored_by_hand():
    a = Thing("circle", "red", "small", 3, 5, 20)
    b = Thing("square", "blue", "large", 34, 30, 28)
    for relation, opposite, places in (("left of", "right of", [(41, 5), (2, 30)]),
                                       ("below", "above", [(3, 39), (34, 6)])):
        mirrored = make_tiny.mirrored(Scene("pair", 64, 64, "white", (a, b), relation))
        assert mirrored.relation == opposite
        assert [(thing.left, thing.top) for thing in mirrored.things] == places
        for thing, before in zip(mirrored.things, (a, b)):
            assert replace(thing, left=before.left, top=before.top) == before


def test_a_twin_differs_in_one_respect_which_is_half_of_the_time_the_relation():
    """Training never draws the twin of one scene in six."""
    rng = np.random.default_rng(0)
    respects, nothing, related = [], 0, 0
    for index in range(1500):
        scene = make_scene(3, index)
        twin = make_tiny.twin(scene, rng)
        if twin is None:
            nothing += 1
            continue
        assert not make_tiny.never_drawn(twin)
        related += scene.relation != ""
        if twin.relation != scene.relation:
            assert twin == make_tiny.mirrored(scene)
            respects.append("relation")
            continue
        if twin.word != scene.word:
            assert replace(twin, word=scene.word) == scene
            respects.append("word beside a thing" if scene.things else "word")
            continue
        for look in ("color", "shape"):
            pairs = zip(twin.things, scene.things, strict=True)
            things = [replace(new, **{look: getattr(old, look)}) for new, old in pairs]
            if tuple(things) == scene.things:
                assert replace(twin, things=scene.things) == scene != twin
                respects.append(look)
    assert len(respects) == 1500 - nothing and 0.1 < nothing / 1500 < 0.25
    assert respects.count("relation") / related == pytest.approx(0.5, abs=0.08)
    for name in ("color", "shape", "word", "word beside a thing"):
        assert respects.count(name) > 10


def shows(scene, picture):
    """Whether a picture shows all that the full caption of a scene says, and nothing else."""
    said = ["color", "size", "background"]
    if scene.kind == "pair":
        said.append("relation")
    strict, _ = score(Case("", "", scene, said), picture)
    if scene.kind == "word" and scene.things:
        rows, _ = np.nonzero((picture == RGB[scene.things[0].color]).all(axis=2))
        strict = strict and (rows.mean() < 32) == (scene.relation == "above")
    return strict


def test_pictures_of_a_scene_and_its_twin_show_what_their_own_caption_says_and_not_the_other():
    rng = np.random.default_rng(0)
    for index in range(100):
        scene = make_scene(3, index)
        twin = make_tiny.twin(scene, rng)
        if twin is not None:
            assert shows(scene, draw_scene(scene)) and shows(twin, draw_scene(twin))
            assert not shows(scene, draw_scene(twin)) and not shows(twin, draw_scene(scene))


def test_a_batch_for_clip_has_twins_and_its_near_misses_behind_all_captions(corpus, monkeypatch):
    """Of 16 pictures, 2 are clothing, 2 emoji and 6 scenes with their twins, or with the next
    scene."""
    twins, given = [], []
    make_twin = make_tiny.twin
    monkeypatch.setattr(make_tiny, "twin", lambda *x: twins.append(make_twin(*x)) or twins[-1])
    batches = make_tiny.ClipBatches(corpus, TOKENIZERS, 16)
    tokenize = batches.tokenize_l
    batches.tokenize_l = lambda texts, length: given.append(texts) or tokenize(texts, length)
    images, ids_l, ids_g, same = batches(3)
    assert images.shape == (16, 3, 64, 64)
    assert ids_l.shape == ids_g.shape == (16 + 16 * 4, 20)
    sources = [source_of(image) for image in images]
    assert [name for name, _ in sources] == 2 * (["clothing", "emoji"] + 6 * ["scene"])
    scenes = [i for i in range(0, 16, 2) if i % 8]
    assert len(twins) == 6 and None in twins and any(twins)
    for i, twin in zip(scenes, twins):
        assert torch.equal(images[i], to_tensor(draw_scene(make_scene(1, 3 * 16 + i))))
        twin = twin or make_scene(1, 3 * 16 + i + 1)
        assert torch.equal(images[i + 1], to_tensor(draw_scene(twin)))
        assert given[0][i + 1] in scene_captions(twin)
    captions, texts = given[0][:16], texts_of(ids_l)
    for i, (name, number) in enumerate(sources):
        misses = given[0][16 + 4 * i : 20 + 4 * i]
        assert captions[i] not in misses
        if name == "emoji":
            assert texts[i] == captions[i] == f"emoji {number}"
            assert all(text.startswith("emoji ") for text in misses)
        if name == "clothing":
            assert captions[i] == CLOTHES[number % 2] and misses == 4 * [CLOTHES[1 - number % 2]]
    for i, j in np.ndindex(16, 16):
        assert same[i, j] == (captions[i] == captions[j])


def test_clip_l_pads_with_the_end_token_and_clip_g_with_zeros(corpus):
    """The end token is the last of 2048. SD3's second tokenizer pads with 0."""
    _, ids_l, ids_g, _ = make_tiny.ClipBatches(corpus, TOKENIZERS, 16)(0)
    ends = (ids_l == 2047).long()
    padding = ends.cumsum(dim=1) - ends > 0                           # behind the first end token
    assert padding.any() and (ids_l[padding] == 2047).all()
    assert (ids_g[padding] == 0).all()
    assert torch.equal(ids_g[~padding], ids_l[~padding])
    assert (ids_l[:, 0] == 2046).all()


def test_three_times_in_four_a_scene_and_its_twin_both_have_their_full_captions(
        corpus, monkeypatch):
    twins = []
    make_twin = make_tiny.twin
    monkeypatch.setattr(make_tiny, "twin", lambda *x: twins.append(make_twin(*x)) or twins[-1])
    batches, rng = make_tiny.ClipBatches(corpus, TOKENIZERS, 2), np.random.default_rng(0)
    full = 0
    for index in range(400):
        first, second = batches.scenes(index, rng)
        scene, twin = make_scene(1, index), twins[-1] or make_scene(1, index + 1)
        given = first[1], second[1]
        short, long = zip(scene_captions(scene), scene_captions(twin))
        assert given in (short, long)
        full += given == long
    assert full / 400 == pytest.approx(0.75, abs=0.06)                # a short one can be as long


def test_clips_give_unit_vectors_and_begin_with_the_papers_temperature():
    """Radford et al. 2021, Sec. 2.5: 0.07. CLIP-L's text is not projected, as in SD3."""
    torch.manual_seed(0)
    clips = make_tiny.Clips()
    assert clips.temperature.exp().item() == pytest.approx(1 / 0.07)
    assert isinstance(clips.clip_l.projection, torch.nn.Identity)
    ids = torch.randint(2, 2048, (5, 20))
    large, huge = clips(torch.rand(2, 3, 64, 64) * 2 - 1, ids, ids)
    for (image, text), width in ((large, 64), (huge, 128)):
        assert image.shape == (2, width) and text.shape == (5, width)
        torch.testing.assert_close(image.norm(dim=1), torch.ones(2))
        torch.testing.assert_close(text.norm(dim=1), torch.ones(5))


def contrastive_example():
    """Two pictures along two axes. Text 1 is like picture 1, and text 2 is like both. Of the near
    misses, none of picture 1 and two of picture 2 are like their picture."""
    first, second = [1.0, 0.0], [0.0, 1.0]
    misses = 4 * [second] + 2 * [first] + 2 * [second]
    return torch.eye(2), torch.tensor([first, [1.0, 1.0], *misses])


def test_contrastive_loss_by_hand():
    """With scale ln 3, exp(logit) is 3 for a text that is like a picture and 1 for another. Picture
    1 has 3 for its text, 3 for the other and 4 for its misses; picture 2 has 3, 1 and 8."""
    image, text = contrastive_example()
    loss = make_tiny.contrastive_loss(image, text, torch.eye(2), math.log(3))
    first = -(math.log(3 / (3 + 3 + 4)) + math.log(3 / (3 + 1))) / 2
    second = -(math.log(3 / (3 + 1 + 8)) + math.log(3 / (3 + 3))) / 2
    torch.testing.assert_close(loss, torch.tensor([first, second]))


def test_equal_captions_count_as_matches():
    """Then both texts are right for both pictures, each with weight 1/2."""
    image, text = contrastive_example()
    loss = make_tiny.contrastive_loss(image, text, torch.ones(2, 2), math.log(3))
    first = -math.log(3 / 10) - (math.log(3 / 4) + math.log(1 / 4)) / 2
    second = -(math.log(1 / 12) + math.log(3 / 12)) / 2 - math.log(3 / 6)
    torch.testing.assert_close(loss, torch.tensor([first, second]) / 2)


def test_clip_loss_adds_both_clips_and_its_scale_ends_at_100():
    """Radford et al. 2021, Sec. 2.5: logits are not scaled by more than 100."""
    def model(image, ids_l, ids_g):
        return contrastive_example(), contrastive_example()
    model.parameters = weights
    nothing = torch.zeros(0)
    batch = nothing, nothing, nothing, torch.eye(2)
    model.temperature = torch.tensor(math.log(math.log(3)))
    second = -math.log(3 / 12) - math.log(3 / 6)
    assert make_tiny.clip_loss(model, batch)[1].item() == pytest.approx(second)
    model.temperature = torch.tensor(10.0)
    batch = nothing, nothing, nothing, torch.eye(2).flip(0)           # text 2 for picture 1
    expected = math.log(2) + 100
    assert make_tiny.clip_loss(model, batch)[0].item() == pytest.approx(expected)


def test_swap_tests_score_one_for_who_finds_the_caption_and_zero_for_who_never_does(corpus):
    """CLIP-L gives a picture the vector of its caption, CLIP-G that of the near miss. Pictures of
    twins, which come behind the pictures for the relation, get the other one of these."""
    table = torch.randn(2048, 8, generator=torch.Generator().manual_seed(0))
    seen, twins, texts = [], [], []

    def oracle(images, ids_l, ids_g):
        seen.extend(images[:8])
        twins.extend(images[8:])
        texts.extend(texts_of(ids_l))
        text = torch.nn.functional.normalize(table[ids_l].flatten(1), dim=1)
        right, miss = text.chunk(2)
        large, huge = torch.cat([right, miss]), torch.cat([miss, right])
        return (large[: len(images)], text), (huge[: len(images)], text)

    oracle.parameters = lambda: iter([table])
    scores = make_tiny.swap_tests(oracle, make_tiny.ClipBatches(corpus, TOKENIZERS, 1), count=8)
    names = [*KINDS, "picture by relation"]
    assert scores == {"clip_l": dict.fromkeys(names, 1.0), "clip_g": dict.fromkeys(names, 0.0)}
    related = [scene for scene in (make_scene(2, index) for index in range(64)) if scene.relation]
    assert len(twins) == 8
    for image, scene in zip(twins, related):
        assert torch.equal(image, to_tensor(draw_scene(make_tiny.mirrored(scene))))
    training = [to_tensor(draw_scene(make_scene(1, index))) for index in range(64)]
    assert not any(torch.equal(image, other) for image in seen[:8] for other in training)
    complete = 0
    for text in texts:
        complete += any(name in text for name in [*BACKGROUNDS, "grey"])
    assert complete > 0.9 * len(texts)                                # Few captions are cut.


# ---- T5 ------------------------------------------------------------------------------------------
def put_back(source, target):
    """The text before corruption: each sentinel of the source gives way to what follows it in the
    target. Both end with the end token 1. Sentinels are ids from 2048."""
    assert source[-1] == target[-1] == 1
    spans = {}
    for token in target[:-1]:
        if token >= 2048:
            spans[token] = []
        else:
            spans[max(spans)].append(token)
    ids = []
    for token in source[:-1]:
        ids += spans[token] if token >= 2048 else [token]
    return ids


def test_spans_cut_out_and_put_back_give_the_text_again():
    """Sentinels are 2048, 2049, ... in both, and a span has 1 to 3 tokens."""
    rng = np.random.default_rng(0)
    for length in range(60):
        ids = list(range(10, 10 + length))
        source, target = make_tiny.corrupt_spans(ids, rng)
        assert put_back(source, target) == ids
        for tokens in (source, target):
            sentinels = [token for token in tokens if token >= 2048]
            assert sentinels == list(range(2048, 2048 + len(sentinels)))
            assert max(tokens) < make_tiny.T5_CONFIG.vocab_size
        assert len(target) - 1 - len(sentinels) <= 3 * len(sentinels)


def test_two_tokens_in_nine_are_cut_out():
    """By hand: 1 in 8 places begins a span, which has 2 tokens on average. So 7 tokens
    stay for 2 that are cut out: 22 %."""
    rng = np.random.default_rng(0)
    cut, spans = 0, 0
    for _ in range(3000):
        _, target = make_tiny.corrupt_spans([5] * 30, rng)
        spans += sum(token >= 2048 for token in target)
        cut += target.count(5)
    assert cut / (3000 * 30) == pytest.approx(2 / 9, abs=0.01)
    assert cut / spans == pytest.approx(2, abs=0.06)                  # the last one can be cut off


def test_fifteen_sentinels_are_enough_for_any_text():
    source, target = make_tiny.corrupt_spans([5] * 100, np.random.default_rng(0), chance=1)
    assert source[:15] == list(range(2048, 2063)) and set(source[15:-1]) == {5}
    assert put_back(source, target) == [5] * 100


def small_t5():
    torch.manual_seed(0)
    return make_tiny.T5(make_tiny.T5_CONFIG).eval()


@torch.no_grad()
def test_the_decoder_is_causal_and_sees_the_target_one_token_late():
    """Token 3 of the target changes what is said about tokens 4 and later; the last, nothing. The
    source changes everything."""
    model = small_t5()
    rng = torch.Generator().manual_seed(0)
    source, target = torch.randint(2, 2000, (2, 1, 7), generator=rng)
    logits = model(source, target)
    assert logits.shape == (1, 7, 2048 + 16)
    for place in (3, 6):
        changed = target.clone()
        changed[0, place] += 1
        differs = (model(source, changed) - logits).abs().amax(dim=(0, 2)) > 1e-6
        assert differs.tolist() == [i > place for i in range(7)]
    source[0, 2] += 1
    assert ((model(source, target) - logits).abs().amax(dim=(0, 2)) > 1e-6).all()
    logits = model(source, target)
    model.encoder.token_embedding.weight[0] += 1                      # a 0 before all others
    assert ((model(source, target) - logits).abs().amax(dim=(0, 2)) > 1e-6).all()


def test_t5_begins_with_the_spread_of_mesh_tensorflow():
    """Raffel et al.'s code: 1 for the embedding, 1 / sqrt(inputs) for matrices, and for queries
    1 / sqrt(width * head width), as no logit is divided by sqrt(head width)."""
    model, width = small_t5(), 192
    spread = {"encoder.token_embedding.weight": 1, "output.weight": width**-0.5}
    for name, parameter in model.named_parameters():
        if name.endswith(".q.weight"):
            spread[name] = (width * 64) ** -0.5
        elif "feed_forward" in name or name.endswith((".k.weight", ".v.weight", ".out.weight")):
            spread[name] = parameter.shape[1] ** -0.5
    assert len(spread) == 2 + 2 * (4 + 3) + 2 * (8 + 3)
    for name, expected in spread.items():
        assert model.get_parameter(name).std().item() == pytest.approx(expected, rel=0.03), name
    tables = [name for name, _ in model.named_parameters() if "embedding" in name]
    assert tables == ["encoder.token_embedding.weight"]               # The decoder shares it.


def test_t5_loss_averages_over_the_tokens_of_each_sample():
    """exp(logit) is 4 for token 2 and 1 for the other three: 1/7 of 4 / 7. Padding is left out."""
    def model(source, target):
        logits = torch.zeros(*target.shape, 4)
        logits[..., 2] = math.log(4)
        return logits
    model.parameters = weights
    target = torch.tensor([[2, 3, 1, 0], [2, 0, 0, 0]])
    loss = make_tiny.t5_loss(model, (target, target))
    expected = torch.tensor([(math.log(7 / 4) + 2 * math.log(7)) / 3, math.log(7 / 4)])
    torch.testing.assert_close(loss, expected)


def test_a_batch_for_t5_holds_captions_with_spans_cut_out(corpus, few_texts):
    batches = make_tiny.SpanBatches(corpus, TOKENIZERS, 50)
    tokenizer = T5Tokenizer(TOKENIZERS / "t5" / "spiece.model")
    texts = set()
    for text in corpus.prompts() + make_tiny.scene_texts():
        texts.add(tuple(tokenizer.backend.encode(text)[:29]))
    sources, targets = batches(4)
    assert len(sources) == len(targets) == 50
    for source, target in zip(sources.tolist(), targets.tolist()):
        source, target = source[: source.index(1) + 1], target[: target.index(1) + 1]
        assert tuple(put_back(source, target)) in texts
    ended = (sources == 1).cumsum(dim=1) - (sources == 1).long() > 0
    assert ended.any() and (sources[ended] == 0).all()
    again = batches(4)
    assert torch.equal(again[0], sources) and torch.equal(again[1], targets)
    assert batches(5)[0].shape != sources.shape or not torch.equal(batches(5)[0], sources)


# ---- Autoencoder ---------------------------------------------------------------------------------
def test_random_crops_lie_inside_and_half_of_them_are_mirrored():
    """A picture whose red rises by 2 a pixel from left to right, and whose green says the row."""
    columns, rows = np.meshgrid(np.arange(100), np.arange(80))
    picture = Image.fromarray(np.stack([2 * columns, 2 * rows, 0 * rows], 2).astype(np.uint8))
    rng = np.random.default_rng(0)
    rises, lefts, tops = [], [], []
    for _ in range(400):
        square = make_tiny.random_crop(picture, 32, rng).astype(float)
        assert square.shape == (32, 32, 3)
        rises.append((square[16, -4, 0] - square[16, 3, 0]) / 25)     # from column 3 to column 28
        lefts.append(square[..., 0].min())
        tops.append(square[..., 1].min())
    rises = np.array(rises)
    assert (rises < 0).mean() == pytest.approx(0.5, abs=0.07)
    assert 1.9 < abs(rises).min() < 2.1 and 4.5 < abs(rises).max() < 5.3     # 80 px become 32: 5
    assert min(lefts) < 4 and max(lefts) > 110 and min(tops) < 4 and max(tops) > 70


def test_a_small_picture_is_enlarged_to_fill_its_square():
    """40 x 50 px become 128 x 160 px, so that a rise of 4 a row becomes one of 1.25."""
    rows = np.repeat(4 * np.arange(50), 40).reshape(50, 40)
    picture = Image.fromarray(np.stack([rows] * 3, axis=2).astype(np.uint8))
    square = make_tiny.random_crop(picture, 128, np.random.default_rng(0)).astype(float)
    assert square.shape == (128, 128, 3)
    assert (square[104, 64, 0] - square[24, 64, 0]) / 80 == pytest.approx(1.25, abs=0.03)


@pytest.mark.parametrize("size", [8, 16])
def test_squares_are_five_scenes_two_emoji_and_one_photograph_in_eight(corpus, size):
    """Every fourth step has a quarter as many, of 128 px. Four of these go through the same places.
    No scene comes twice."""
    batches = make_tiny.Squares(corpus, 100, size)
    mixture = size // 8 * (["scene"] * 5 + ["emoji"] * 2 + ["clothing"])
    large = []
    for step in range(16):
        image, noise, _ = batches(step)
        names = [source_of(square)[0] for square in image]
        if step % 4 == 0:
            assert image.shape == (size // 4, 3, 128, 128)
            assert noise.shape == (size // 4, 16, 16, 16)
            large += names
        else:
            assert image.shape == (size, 3, 64, 64) and noise.shape == (size, 16, 8, 8)
            assert names == mixture
            for i in (0, 4, size - 4):
                scene = make_scene(1, 2 * size * step + i)
                assert torch.equal(image[i], to_tensor(draw_scene(scene)))
    assert large == mixture


def test_every_second_scene_is_on_gray_if_that_is_asked_for(corpus):
    plain, gray = make_tiny.Squares(corpus, 100, 16), make_tiny.Squares(corpus, 100, 16, gray=True)
    gray_pixel = to_tensor(np.full((1, 1, 3), 128, np.uint8)).flatten()
    for step in (1, 2, 3):
        for i, (before, after) in enumerate(zip(plain(step)[0][:5], gray(step)[0][:5])):
            if i % 2 == 1:
                assert torch.equal(after[:, 0, 0], gray_pixel)
            else:
                assert torch.equal(after, before)


def test_noise_of_squares_is_standard_normal_and_another_one_at_each_step(corpus):
    batches = make_tiny.Squares(corpus, 100, 8)
    noise = torch.stack([batches(step)[1] for step in (1, 2, 3, 5)])
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert torch.equal(batches(2)[1], noise[1])
    for i in range(3):
        assert not torch.equal(noise[i], noise[i + 1])


def test_the_last_tenth_of_the_steps_weighs_kl_ten_times_as_much(corpus):
    batches = make_tiny.Squares(corpus, 40, 8)
    weights = [batches(step)[2] for step in (0, 1, 20, 35, 36, 39)]
    assert weights == [5e-4] * 4 + [5e-3] * 2


def test_autoencoder_loss_is_l1_and_weighted_kl_for_each_picture():
    torch.manual_seed(0)
    vae = VAE(make_tiny.AUTOENCODER)
    image, noise = torch.rand(3, 3, 16, 16) * 2 - 1, torch.randn(3, 16, 2, 2)
    with torch.no_grad():
        mean, logvar = vae.encode_moments(image)
        l1 = reconstruction_loss(image, vae.decoder(mean + (logvar / 2).exp() * noise))
        loss = make_tiny.autoencoder_loss(vae, (image, noise, 0.3))
    torch.testing.assert_close(loss, (l1 + 0.3 * kl_loss(mean, logvar)).expand(3))


class Pretended:
    """An autoencoder whose code is the picture and which makes it darker by 0.2, where it can."""
    def __init__(self):
        self.sizes = set()

    def parameters(self):
        return iter([torch.zeros(1)])

    def encode(self, image):
        self.sizes.add(tuple(image.shape))
        return image

    def decode(self, latent):
        return torch.where(latent > 0, latent - 0.2, latent + 0.2)

    def encode_moments(self, image):
        return image, None


def test_quality_of_the_autoencoder_is_the_psnr_of_held_out_pictures(corpus):
    """An error of 0.2 in a range of 2 is 20 dB. Sizes are those that the README names."""
    vae = Pretended()
    assert make_tiny.vae_quality(vae, corpus, count=2) == {
        "scenes 64 px": 20, "emoji 128 px": 20, "clothing 256 px": 20}
    assert vae.sizes == {(1, 3, 64, 64), (1, 3, 128, 128), (1, 3, 256, 256)}


def test_latent_statistics_are_one_mean_and_deviation_over_all_codes():
    """App. B.2, on the first training scenes."""
    pixels = [draw_scene(make_scene(1, index)) for index in range(128)]
    expected = np.stack(pixels).astype(np.float64) / 127.5 - 1
    mean, std = make_tiny.latent_statistics(Pretended(), 128)
    assert mean == pytest.approx(expected.mean(), abs=1e-4)
    assert std == pytest.approx(expected.std(), rel=1e-4)


# ---- Stages --------------------------------------------------------------------------------------
def run(monkeypatch, *arguments):
    """The command line, as in a shell."""
    monkeypatch.setattr(sys, "argv", ["make_tiny.py", *map(str, arguments)])
    command(make_tiny.main)


@pytest.fixture
def work(tmp_path, folder):
    """--work with the tokenizers, and --data."""
    (tmp_path / "tokenizers").symlink_to(TOKENIZERS)
    return tmp_path


def test_losses_compute_where_the_model_is(corpus, few_texts, monkeypatch):
    """"meta" stands for a GPU: a tensor on it cannot meet one that stayed on the CPU."""
    monkeypatch.setattr(make_tiny, "autocast", lambda *given: nullcontext())
    for model, loss, batches in (
            (make_tiny.Clips(), make_tiny.clip_loss, make_tiny.ClipBatches(corpus, TOKENIZERS, 8)),
            (small_t5(), make_tiny.t5_loss, make_tiny.SpanBatches(corpus, TOKENIZERS, 8)),
            (VAE(make_tiny.AUTOENCODER), make_tiny.autoencoder_loss,
             make_tiny.Squares(corpus, 100, 8))):
        losses = loss(model.to("meta"), batches(1))
        losses.mean().backward()
        assert losses.shape == (8,) and losses.device.type == "meta"
        for parameter in model.parameters():
            assert parameter.grad.device.type == "meta"


def test_stage_t5_keeps_the_encoder_alone(work, folder, few_texts, monkeypatch):
    run(monkeypatch, "--data", folder, "--stage", "t5", "--steps", 1, "--work", work)
    T5Encoder(make_tiny.T5_CONFIG).load_state_dict(load_file(work / "t5.safetensors"))
    log = json.loads((work / "t5-run" / "log.jsonl").read_text().splitlines()[0])
    assert math.log(2064) < log["loss"] < math.log(2064) + 1          # logits of unit variance: .5


def test_stage_clip_trains_both_from_the_loss_of_chance(work, folder, monkeypatch):
    """Among 8 texts and 4 near misses, and among 8 pictures, with logits all alike."""
    monkeypatch.setattr(make_tiny, "swap_tests", lambda clips, batches: {})
    run(monkeypatch, "--data", folder, "--stage", "clip", "--steps", 1, "--work", work,
        "--batch-size", 8)
    make_tiny.Clips().load_state_dict(load_file(work / "clip.safetensors"))
    log = json.loads((work / "clip-run" / "log.jsonl").read_text().splitlines()[0])
    assert log["loss"] == pytest.approx(math.log(12) + math.log(8), rel=0.35)


def test_stage_vae_writes_an_autoencoder_of_sixteen_channels(work, folder, monkeypatch):
    """It is the same one when other processes prepare the batches."""
    monkeypatch.setattr(make_tiny, "vae_quality", lambda vae, corpus: {})
    written = []
    for workers in (0, 2):
        run(monkeypatch, "--data", folder, "--stage", "vae", "--steps", 2, "--work", work,
            "--workers", workers, "--device", "cpu")
        written.append(load_file(work / "vae.safetensors"))
        config = json.loads((work / "vae-run" / "config.json").read_text())["train"]
        assert (config["steps"], config["batch_size"], config["device"]) == (2, 8, "cpu")
        shutil.rmtree(work / "vae-run")
    VAE(make_tiny.AUTOENCODER).load_state_dict(written[0])
    for name, tensor in written[0].items():
        torch.testing.assert_close(written[1][name], tensor)
    assert make_tiny.AUTOENCODER.latent_channels == 16


def test_stages_assemble_and_ship_put_everything_into_one_file(work, folder, monkeypatch, capsys):
    """Codes have mean .5 and deviation 4, so a latent is (code - .5) / 4. The MM-DiT comes from a
    run with its words, sizes and sampling, but for the guidance that is asked for."""
    torch.manual_seed(0)
    clips, t5 = make_tiny.Clips(), T5Encoder(make_tiny.T5_CONFIG)
    vae = VAE(make_tiny.AUTOENCODER)
    for name, network in (("clip", clips), ("t5", t5), ("vae", vae)):
        save_file(network.state_dict(), work / f"{name}.safetensors")
    monkeypatch.setattr(make_tiny, "ROOT", work)
    monkeypatch.setattr(make_tiny, "latent_statistics", lambda vae: (0.5, 4.0))
    monkeypatch.setattr(make_tiny, "vae_quality", lambda vae, corpus: {"scenes": 30})
    monkeypatch.setattr(make_tiny, "swap_tests", lambda clips, batches: {"clip_l": 1})
    (work / "results").mkdir()
    frozen, out = work / "frozen", work / "out"
    run(monkeypatch, "--data", folder, "--stage", "assemble", "--work", work, "--out", frozen)
    record = json.loads((work / "results" / "tiny-frozen.json").read_text())
    assert record["latents"] == {"mean": 0.5, "std": 4.0} and record["psnr"] == {"scenes": 30}
    towers = load_file(frozen / "clip_image.safetensors")
    assert {name.split(".")[0] for name in towers} == {"clip_l_image", "clip_g_image"}

    words, sizes = ("circle", "red"), ("64x64", "64x96")
    mmdit = MMDiT(MMDiTConfig(depth=1, context_dim=192, pooled_dim=192, pos_embed_max_size=16))
    mmdit.initialize(torch.Generator().manual_seed(0))
    (work / "run").mkdir()
    save_networks(work / "run" / "model.safetensors", {"mmdit": mmdit}, None,
                  {"num_steps": 7, "guidance_scale": 4.0}, None, words, sizes)
    run(monkeypatch, "--stage", "ship", "--run", work / "run", "--encoders", frozen, "--out", out,
        "--guidance-scale", 3.5)
    assert f"MB in {out}" in capsys.readouterr().out
    parts = load_components(out)
    assert parts.sampling == {"num_steps": 7, "guidance_scale": 3.5}
    assert parts.words == words and parts.sizes == sizes
    assert parts.vae.config == replace(make_tiny.AUTOENCODER, vae_scale=0.25, vae_shift=0.5)
    assert parts.text.config == make_tiny.TEXT
    ours = {"mmdit": mmdit, "vae": vae, "clip_l": clips.clip_l, "clip_g": clips.clip_g, "t5": t5}
    theirs = {"mmdit": parts.mmdit, "vae": parts.vae, **parts.text.encoders}
    assert ours.keys() == theirs.keys()
    for name, network in ours.items():
        shipped = theirs[name].state_dict()
        assert shipped.keys() == network.state_dict().keys()
        for key, tensor in network.state_dict().items():
            assert torch.equal(shipped[key], tensor.bfloat16().float()), f"{name} {key}"
    for file in ("clip_image.safetensors", "tokenizers/clip/merges.txt",
                 "tokenizers/t5/spiece.model"):
        assert (out / file).read_bytes() == (frozen / file).read_bytes()


def test_stage_decoder_changes_the_decoder_and_nothing_else(work, folder, monkeypatch):
    """The MM-DiT has learned the latents, so encoder, scale and shift must stay to the bit."""
    def fit(vae, *others):
        for parameter in vae.parameters():
            if parameter.requires_grad:
                parameter.data += 1
        return vae
    monkeypatch.setattr(make_tiny, "fit", fit)
    monkeypatch.setattr(make_tiny, "ROOT", work)
    monkeypatch.setattr(make_tiny, "vae_quality", lambda vae, corpus: {"scenes": 33})
    (work / "results").mkdir()
    file = work / "results" / "tiny-frozen.json"
    file.write_text('{"psnr": {"scenes": 31}, "latents": 5}')
    run(monkeypatch, "--data", folder, "--stage", "decoder", "--steps", 1, "--work", work,
        "--out", work / "out")
    record = json.loads(file.read_text())
    assert "--stage decoder" in record.pop("command of psnr")
    assert record == {"psnr": {"scenes": 33}, "latents": 5}
    before, after = load_components(SHIPPED), load_components(work / "out")
    for name in ("sampling", "words", "sizes"):
        assert getattr(before, name) == getattr(after, name)
    assert before.vae.config == after.vae.config
    networks = [{"mmdit": parts.mmdit, "vae": parts.vae, **parts.text.encoders}
                for parts in (before, after)]
    for name, network in networks[0].items():
        theirs = networks[1][name].state_dict()
        for key, tensor in network.state_dict().items():
            trained = name == "vae" and key.startswith("decoder.")
            assert torch.equal(tensor, theirs[key]) != trained, f"{name} {key}"


def test_a_decoder_run_of_another_autoencoder_is_refused(work, folder, monkeypatch):
    """It would put a decoder into a model whose latents it has never seen."""
    def fit(vae, *others):
        torch.manual_seed(0)
        return VAE(vae.config)
    monkeypatch.setattr(make_tiny, "fit", fit)
    monkeypatch.setattr(make_tiny, "ROOT", work)
    with pytest.raises(SystemExit, match="decoder-run is of another autoencoder"):
        run(monkeypatch, "--data", folder, "--stage", "decoder", "--work", work, "--out",
            work / "out")
    assert not (work / "out").exists()


def test_assemble_keeps_the_autoencoder_of_another_model(work, folder, monkeypatch):
    """--vae-from; the work folder has none. Its statistics are measured again."""
    torch.manual_seed(0)
    save_file(make_tiny.Clips().state_dict(), work / "clip.safetensors")
    save_file(T5Encoder(make_tiny.T5_CONFIG).state_dict(), work / "t5.safetensors")
    monkeypatch.setattr(make_tiny, "ROOT", work)
    monkeypatch.setattr(make_tiny, "latent_statistics", lambda vae: (0.5, 4.0))
    monkeypatch.setattr(make_tiny, "vae_quality", lambda vae, corpus: {})
    monkeypatch.setattr(make_tiny, "swap_tests", lambda clips, batches: {})
    (work / "results").mkdir()
    run(monkeypatch, "--data", folder, "--stage", "assemble", "--work", work, "--out",
        work / "frozen", "--vae-from", SHIPPED)
    theirs = load_components(SHIPPED, ("vae",)).vae
    ours = load_components(work / "frozen", ("vae",)).vae
    assert ours.config == replace(theirs.config, vae_scale=0.25, vae_shift=0.5)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name])


@pytest.mark.parametrize("arguments, sentence", [
    (["--stage", "ship"], "--stage ship needs --run"),
    (["--stage", "ship", "--run", "nowhere"], "nowhere"),
    ([], "--stage '' must be one of tokenizers, clip, t5, vae, assemble, ship, decoder"),
    (["--stage", "vae"], "--data"),
    (["--stage", "vae", "--data", "nowhere"], "--data nowhere: no such folder"),
    (["--stage", "vae", "--data", "."], "emoji does not exist or holds no picture"),
    (["--stage", "t5", "--data", "DATA", "--steps", "-1"], "steps"),
    (["--stage", "vae", "--data", "DATA", "--batch-size", "12"], "12 is no multiple of 8"),
    (["--stage", "vae", "--data", "DATA", "--device", "tpu"], "--device tpu is not on this"),
    (["--stage", "assemble", "--data", "DATA"], "safetensors"),
    (["--stage", "paint"], "invalid choice: 'paint'")])
def test_what_a_user_gets_wrong_ends_in_one_sentence(
        arguments, sentence, folder, few_texts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "pretrain").mkdir(parents=True)
    (tmp_path / "runs" / "pretrain" / "tokenizers").symlink_to(TOKENIZERS)
    monkeypatch.setattr(make_tiny, "latent_statistics", lambda vae: (0.5, 4.0))
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *[str(folder) if part == "DATA" else part for part in arguments])
    message = stop.value.code
    if message == 2:                                                  # argparse: usage, sentence
        message = capsys.readouterr().err.splitlines()[-1]
    assert "\n" not in message
    assert message.startswith("make_tiny.py: ") and sentence in message


def test_the_commands_of_the_readme_are_options(folder, monkeypatch, tmp_path):
    """Each `$make ...` of pretrained/tiny/README.md reaches its stage."""
    stages = []
    for name in ("train_tokenizers", "train_clips", "train_t5", "train_vae", "assemble", "ship",
                 "train_decoder"):
        monkeypatch.setattr(make_tiny, name, lambda *given, name=name: stages.append(name))
    text = (SHIPPED / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    for line in text.splitlines():
        if line.startswith("$make"):
            line = line.split(" &")[0]                       # Some go on in the background.
            run(monkeypatch, "--data", folder, *shlex.split(line, comments=True)[1:])
    assert stages == ["train_tokenizers", "train_clips", "train_t5", "train_vae", "assemble",
                      "ship", "train_decoder", "train_decoder", "train_decoder"]
