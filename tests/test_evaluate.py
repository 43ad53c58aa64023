"""Tests of evaluate.py: metrics against closed forms, the detector against drawn scenes, GenEval's rules."""

import io
import json
import re
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
from data import BACKGROUNDS, COLORS, RELATIONS, SHAPES, SIZES, Scene, Thing, draw_scene, plural, shape_mask
from evaluate import (
    TASKS,
    CLIPImageConfig,
    CLIPImageEncoder,
    Found,
    Requirement,
    clip_score,
    components,
    find_things,
    format_scores,
    frechet_distance,
    geneval,
    geneval_bounds,
    geneval_cases,
    geneval_prompts,
    prompt_of,
    scene_requirements,
    score,
    stands,
    success_rates,
)
from text_encoders import quick_gelu
from vae import perceptual_loss

TINY = CLIPImageConfig(image_size=32, patch_size=8, hidden_size=128, num_layers=2, projection_dim=48)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny_encoder(seed=0):
    torch.manual_seed(seed)
    return CLIPImageEncoder(TINY)


def draw(*things, background="white", size=64):
    """A square picture of things given as (shape, color, left, top, diameter)."""
    things = tuple(Thing(shape, color, "small", left, top, diameter) for shape, color, left, top, diameter in things)
    return draw_scene(Scene("count", size, size, background, things))


def soften(image, rng):
    """Half the resolution and back, then noise of standard deviation 6."""
    height, width = image.shape[:2]
    small = Image.fromarray(image).resize((width // 2, height // 2), Image.Resampling.BILINEAR)
    blurred = np.asarray(small.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float64)
    return (blurred + rng.normal(0, 6, blurred.shape)).round().clip(0, 255).astype(np.uint8)


def compress(image, rng=None):
    """There and back through JPEG of quality 60."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=60)
    return np.asarray(Image.open(file))


# ------------------------------------------------------------------------------------------------------------
# CLIP's image tower
# ------------------------------------------------------------------------------------------------------------

def test_default_tower_has_the_parameters_of_clip_l():
    """The public CLIP-L/14 vision model with its projection has 303,966,208."""
    with torch.device("meta"):
        assert sum(p.numel() for p in CLIPImageEncoder().parameters()) == 303_966_208


def reference_tower(encoder, image):
    """The tower written out: patches by unfold, attention by softmax, the feature of the first token."""
    weights, heads = dict(encoder.named_parameters()), TINY.num_heads
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    patches = F.unfold((image * 0.5 + 0.5 - mean) / std, 8, stride=8).transpose(1, 2)      # (B, n, 3 * 64) by rows
    x = patches @ weights["patch_embedding.weight"].flatten(1).T
    x = torch.cat([weights["class_token"].view(1, 1, -1).repeat(len(image), 1, 1), x], dim=1) + \
        weights["position_embedding.weight"]
    norm = lambda x, name: F.layer_norm(x, (128,), weights[name + ".weight"], weights[name + ".bias"], 1e-5)
    linear = lambda x, name: x @ weights[name + ".weight"].T + weights[name + ".bias"]
    x = norm(x, "pre_norm")
    for i in range(TINY.num_layers):
        layer = f"layers.{i}."
        h = norm(x, layer + "norm1")
        q, k, v = (linear(h, layer + name).unflatten(-1, (heads, 64)).transpose(1, 2) for name in "qkv")
        h = torch.softmax(q @ k.transpose(-1, -2) / 8, dim=-1) @ v
        x = x + linear(h.transpose(1, 2).flatten(2), layer + "out")
        h = norm(x, layer + "norm2")
        x = x + linear(quick_gelu(linear(h, layer + "fc1")), layer + "fc2")
    return norm(x[:, 0], "post_norm") @ weights["projection.weight"].T


def test_tower_is_its_definition():
    """Checks patch order, normalisation, the class token's place, unmasked attention, and where the norms stand."""
    encoder, image = tiny_encoder(), random(2, 3, 32, 32).float().clamp(-1, 1)
    for parameter in encoder.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)                             # no norm is the identity
    torch.testing.assert_close(encoder(image), reference_tower(encoder, image), rtol=1e-4, atol=1e-5)
    assert encoder(image).shape == (2, 48)


def test_features_are_the_patches_of_every_layer_and_carry_gradients_to_the_image():
    encoder, image = tiny_encoder(), random(2, 3, 32, 32).float()
    features = encoder.features(image)
    assert [x.shape for x in features] == [(2, 16, 128)] * 2
    reconstruction = (image + 0.1).requires_grad_()
    assert perceptual_loss(image, image, encoder.features) == 0
    perceptual_loss(image, reconstruction, encoder.features).backward()
    assert reconstruction.grad.abs().sum() > 0


def test_images_of_another_size_are_resized():
    encoder, image = tiny_encoder(), random(1, 3, 50, 70).float()
    resized = F.interpolate(image, (32, 32), mode="bicubic", antialias=True)
    torch.testing.assert_close(encoder(image), encoder(resized))


def test_tower_learns_from_scratch():
    """Eight scenes, eight fixed random targets: the contrastive loss falls from about log 8 to nearly nothing."""
    encoder = tiny_encoder()
    images = torch.stack([torch.from_numpy(draw_scene(scene)).permute(2, 0, 1) / 127.5 - 1
                          for requirement, scene in geneval_cases(8) if requirement.task == "colors"])
    targets = F.normalize(random(8, 48).float(), dim=-1)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    losses = []
    for _ in range(40):
        loss = F.cross_entropy(10 * F.normalize(encoder(images), dim=-1) @ targets.T, torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert 1.5 < losses[0] < 3 and losses[-1] < 0.1, losses


# ------------------------------------------------------------------------------------------------------------
# CLIP score and Frechet distance
# ------------------------------------------------------------------------------------------------------------

def test_clip_score_is_the_mean_cosine_whatever_the_lengths():
    a = torch.tensor([[2.0, 0.0], [0.0, 5.0], [3.0, 3.0]])
    b = torch.tensor([[7.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert clip_score(a, b).item() == pytest.approx((1 + 0 + 0.5**0.5) / 3)


def white(n, d, seed):
    """n vectors whose sample mean is 0 and whose sample covariance is the identity, exactly."""
    x = random(n, d, seed=seed)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T


def test_frechet_distance_of_equal_sets_is_zero():
    a = random(50, 20)
    assert frechet_distance(a, a).item() == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a.flip(0)).item() == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a[:10], a[:10]).item() == pytest.approx(0, abs=1e-5)         # singular covariance


def test_frechet_distance_of_a_shifted_set_is_the_shift_squared():
    a, shift = random(100, 6), random(6, seed=1)
    assert frechet_distance(a, a + shift).item() == pytest.approx(shift.square().sum().item())


def test_frechet_distance_of_commuting_gaussians():
    """Covariances diag(s^2) and diag(r^2) in one rotated basis: |mean difference|^2 + sum (s - r)^2."""
    s, r = torch.tensor([1.0, 2.0, 0.5, 3.0]).double(), torch.tensor([2.0, 0.1, 0.5, 1.0]).double()
    rotation = torch.linalg.qr(random(4, 4, seed=2))[0]
    a, b = white(60, 4, 3) * s @ rotation, white(80, 4, 4) * r @ rotation + 0.3
    expected = 4 * 0.3**2 + (s - r).square().sum().item()
    assert frechet_distance(a, b).item() == pytest.approx(expected)
    assert frechet_distance(b.float(), a.float()).item() == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_of_gaussians_that_do_not_commute():
    """In two dimensions tr (A B)^(1/2) = sqrt(tr(A B) + 2 sqrt(det(A B))), by Cayley and Hamilton."""
    m, n = random(2, 2, seed=5), random(2, 2, seed=6)
    a, b = white(30, 2, 7) @ m.T, white(40, 2, 8) @ n.T
    cov_a, cov_b = m @ m.T, n @ n.T
    assert (cov_a @ cov_b - cov_b @ cov_a).abs().max() > 0.1
    cross = (cov_a @ cov_b).trace() + 2 * torch.linalg.det(cov_a @ cov_b).sqrt()
    expected = cov_a.trace() + cov_b.trace() - 2 * cross.sqrt()
    assert frechet_distance(a, b).item() == pytest.approx(expected.item())


def test_frechet_distance_needs_two_vectors():
    with pytest.raises(ValueError, match="1 and 5 feature vectors"):
        frechet_distance(random(1, 3), random(5, 3))


# ------------------------------------------------------------------------------------------------------------
# What is in a picture
# ------------------------------------------------------------------------------------------------------------

def flood(mask):
    """The 4-connected parts of a mask by flood fill, as a set of frozen sets of pixels."""
    todo, parts = {tuple(p) for p in np.argwhere(mask).tolist()}, set()
    while todo:
        part, front = set(), {todo.pop()}
        while front:
            part |= front
            front = {(y + dy, x + dx) for y, x in front for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))} & todo
            todo -= front
        parts.add(frozenset(part))
    return parts


@pytest.mark.parametrize("density", [0.3, 0.5, 0.6, 0.7, 1.0])
def test_components_agree_with_a_flood_fill(density):
    mask = np.random.default_rng(0).random((40, 31)) < density
    as_sets = lambda parts: {frozenset(map(tuple, np.argwhere(part).tolist())) for part in parts}
    assert as_sets(components(mask, 1)) == flood(mask)
    assert as_sets(components(mask, 5)) == {part for part in flood(mask) if len(part) >= 5}
    assert components(np.zeros((5, 5), bool), 1) == []


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_found_where_it_is(shape):
    """At each size of data.py and in a big picture, to a pixel of the resolution at which it is looked at."""
    for side in (64, 96, 512):
        for size in SIZES.values():
            left, top, diameter, pixel = side // 8, side // 4, round(size * side), max(1, side // 128)
            found, = find_things(draw((shape, "blue", left, top, diameter), size=side))
            rows, columns = np.nonzero(shape_mask(shape, diameter) > 0.5)
            expected = left + columns.min(), top + rows.min(), np.ptp(rows) + 1, np.ptp(columns) + 1
            assert (found.shape, found.color) == (shape, "blue")
            assert np.abs(np.subtract((found.left, found.top, found.height, found.width), expected)).max() <= 2 * pixel
            middle = expected[0] + expected[3] / 2, expected[1] + expected[2] / 2
            assert np.abs(np.subtract(found.center, middle)).max() <= pixel


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_color_is_told_on_every_background(background):
    for color in COLORS:
        for shape in ("star", "square"):
            found, = find_things(draw((shape, color, 10, 40, 14), background=background))
            assert (found.shape, found.color) == (shape, color)


def test_several_things_are_all_found():
    things = [("ring", "red", 2, 2, 20), ("circle", "red", 40, 3, 20), ("star", "pink", 5, 42, 14),
              ("cross", "cyan", 30, 30, 16), ("heart", "green", 46, 46, 14)]
    for background in ("gray", "navy"):
        found = find_things(draw(*things, background=background))
        assert sorted((f.shape, f.color) for f in found) == sorted(thing[:2] for thing in things)


def test_things_that_touch_after_blurring_are_told_apart():
    """Two pixels between boxes are the least that data.py leaves; after blurring no background is left there."""
    for shape in ("circle", "square"):
        image = draw((shape, "yellow", 5, 20, 25), (shape, "yellow", 32, 20, 25), background="black")
        found = find_things(soften(image, np.random.default_rng(0)))
        assert [f.shape for f in found] == [shape, shape]


def test_nothing_is_found_where_nothing_is():
    empty = np.full((64, 64, 3), 200, np.uint8)
    assert find_things(empty) == []
    assert find_things(soften(empty, np.random.default_rng(0))) == []
    empty[30:33, 30:33] = (255, 0, 0)                                                               # a speck
    assert find_things(empty) == []
    empty[20, 5:60] = (255, 0, 0)                                                                   # a line is no shape
    assert find_things(empty) == []


def test_find_things_refuses_floats_and_gray_pictures():
    for image in (np.zeros((64, 64, 3), np.float32), np.zeros((64, 64), np.uint8), np.zeros((3, 64, 64), np.uint8)):
        with pytest.raises(ValueError, match="give uint8"):
            find_things(image)


# ------------------------------------------------------------------------------------------------------------
# GenEval: prompts and rules
# ------------------------------------------------------------------------------------------------------------

def test_prompts_have_the_wording_of_each_task_and_say_what_is_required():
    shape, color, many = f"({'|'.join(SHAPES)})", f"({'|'.join(COLORS)})", f"({'|'.join(map(plural, SHAPES))})"
    wording = {"single object": f"a {shape}", "two objects": f"a {shape} and a {shape}",
               "counting": f"(two|three|four) {many}", "colors": f"an? {color} {shape}",
               "position": f"a {shape} ({'|'.join(RELATIONS)}) a {shape}",
               "color attribution": f"an? {color} {shape} and an? {color} {shape}"}
    prompts = geneval_prompts(50, seed=3)
    assert [task for task, _, _ in prompts] == [task for task in TASKS for _ in range(50)]
    for task, prompt, requirement in prompts:
        assert re.fullmatch(wording[task], prompt), prompt
        assert ("an orange" in prompt) == ("orange" in prompt)
        required = [*requirement.shapes, *(c for c in requirement.colors if c)]
        required += [requirement.relation] * bool(requirement.relation)
        required += [{2: "two", 3: "three", 4: "four"}[requirement.count]] if requirement.count else []
        assert all(word in prompt for word in required), (prompt, requirement)
        if task == "color attribution":
            assert len(set(requirement.shapes)) == len(set(requirement.colors)) == 2
    assert prompts == geneval_prompts(50, seed=3) != geneval_prompts(50, seed=4)


def test_scenes_with_words_or_two_equal_shapes_ask_for_nothing():
    thing = Thing("star", "red", "small", 1, 1, 14)
    assert scene_requirements(Scene("word", 64, 64, "white", (thing,), "above", "CAT", "black")) == []
    other = Thing("star", "blue", "small", 40, 1, 14)
    assert scene_requirements(Scene("pair", 64, 64, "white", (thing, other), "left of")) == []


def test_rules_of_each_task():
    one = draw(("star", "red", 4, 4, 16))
    two = draw(("star", "red", 4, 4, 16), ("ring", "blue", 40, 24, 18))
    three = draw(("star", "red", 4, 4, 16), ("star", "pink", 40, 4, 16), ("ring", "blue", 4, 40, 16))
    passes = lambda image, task, *rest, **more: score(Requirement(task, *rest, **more), image)
    assert passes(one, "single object", ("star",)) and not passes(one, "single object", ("ring",))
    assert passes(two, "single object", ("ring",))                                       # more things are allowed
    assert passes(two, "two objects", ("ring", "star")) and not passes(one, "two objects", ("ring", "star"))
    assert passes(three, "counting", ("star",), count=2)                                 # whatever else there is
    assert not passes(three, "counting", ("star",), count=3) and not passes(three, "counting", ("ring",), count=2)
    assert passes(three, "colors", ("star",), ("pink",)) and not passes(three, "colors", ("star",), ("blue",))
    assert passes(two, "color attribution", ("ring", "star"), ("blue", "red"))
    assert not passes(two, "color attribution", ("ring", "star"), ("red", "blue"))       # the colours are swapped
    for relation, holds in (("left of", True), ("right of", False), ("above", True), ("below", False)):
        assert passes(two, "position", ("star", "ring"), relation=relation) == holds
        assert passes(two, "position", ("ring", "star"), relation=relation) != holds
        assert not passes(two, "position", ("star", "cross"), relation=relation)


def test_a_relation_needs_a_clear_offset():
    """A tenth of both sizes together: things of 20 px need more than 4 px between their centres."""
    first = Found("star", "red", 10, 10, 20, 20)
    for apart, relation, opposite in ((5, "left of", "right of"), (-5, "right of", "left of")):
        second = Found("ring", "red", 10 + apart, 10, 20, 20)
        assert stands(first, relation, second) and not stands(first, opposite, second)
        assert not stands(first, "above", second) and not stands(first, "below", second)
    assert not stands(first, "left of", Found("ring", "red", 14, 10, 20, 20))
    assert stands(first, "above", Found("ring", "red", 10, 15, 20, 20))
    assert stands(first, "below", Found("ring", "red", 10, 5, 20, 20))


# ------------------------------------------------------------------------------------------------------------
# GenEval: the ceiling, chance, and pictures that are not exact
# ------------------------------------------------------------------------------------------------------------

# A wrong caption holds by chance if the shape is the same (1 in 8), the pair of shapes (1 in 28), shape and count (1 in
# 24), shape and colour (1 in 64), pair and relation, of which two in four hold (1 in 56), pair and colours (1 in 1568).
CHANCE = {"single object": 1 / 8, "two objects": 1 / 28, "counting": 1 / 24, "colors": 1 / 64, "position": 1 / 56,
          "color attribution": 1 / 1568}


def test_ground_truth_passes_and_shuffled_captions_are_near_chance():
    """The bound: four standard deviations of a mean of 200 above chance, and two pictures more, as p is rounded."""
    ceiling, chance = geneval_bounds(200, seed=1)
    print(format_scores(ceiling), format_scores(chance), sep="\n")
    assert min(ceiling.values()) >= 0.99, ceiling
    for task, p in CHANCE.items():
        assert chance[task] <= p + 4 * (p * (1 - p) / 200) ** 0.5 + 0.01, (task, chance[task])
    assert chance["overall"] < 0.08
    assert chance["single object"] > 0.05                                # it is chance, not failure


@pytest.mark.parametrize("height, width", [(48, 96), (128, 128), (512, 384)])
def test_ground_truth_passes_at_other_sizes(height, width):
    ceiling, _ = geneval_bounds(15, 2, height, width)
    assert min(ceiling.values()) >= 0.99, ceiling


@pytest.mark.parametrize("degrade, least, least_overall", [
    (soften, 0.97, 0.98), (compress, 0.97, 0.98), (lambda image, rng: compress(soften(image, rng)), 0.95, 0.96)],
    ids=["blur and noise", "JPEG 60", "blur, noise and JPEG 60"])
def test_blurred_noisy_and_compressed_pictures_still_pass(degrade, least, least_overall):
    rng, cases = np.random.default_rng(0), geneval_cases(150, seed=4)
    images = [degrade(draw_scene(scene), rng) for _, scene in cases]
    rates = success_rates([requirement for requirement, _ in cases], images)
    print(format_scores(rates))
    assert min(rates.values()) >= least and rates["overall"] >= least_overall, rates


def test_geneval_asks_in_batches_and_scores_what_comes_back():
    cases = geneval_cases(20, seed=5)
    pictures = {prompt_of(requirement, scene): draw_scene(scene) for requirement, scene in cases}
    sizes = []

    def generate(prompts, first):
        assert first == sum(sizes)                                              # so that no two batches share their noise
        sizes.append(len(prompts))
        return [pictures[prompt] for prompt in prompts]

    scores = geneval(generate, 20, seed=5)
    assert set(scores) == {*TASKS, "overall"} and min(scores.values()) == 1
    assert sizes == [64, 56]
    blank = np.zeros((64, 64, 3), np.uint8)
    assert set(geneval(lambda prompts, first: [blank] * len(prompts), 5).values()) == {0.0}
    with pytest.raises(ValueError):
        geneval(lambda prompts, first: [blank], 5)                                              # too few pictures


def test_main_writes_the_table_with_its_command(tmp_path, monkeypatch, capsys):
    """The real main with a generator that draws the ground truth, so the model's row is all ones."""
    import sample

    pictures = {prompt_of(requirement, scene): Image.fromarray(draw_scene(scene))
                for requirement, scene in geneval_cases(12)}
    seeds = []

    def generate(pipeline, prompts, seed, height, width, num_steps, batch_size):         # no guidance_scale was given
        assert (height, width, num_steps, batch_size) == (64, 64, 7, len(prompts))
        seeds.append(seed)
        return [pictures[prompt] for prompt in prompts]

    class Pipeline:
        defaults = {"height": 64, "width": 64}

    monkeypatch.setattr(sample, "load", lambda checkpoint: Pipeline())
    monkeypatch.setattr(sample, "generate", generate)
    out = tmp_path / "results.json"
    command = f"evaluate.py some/run --num-prompts 12 --num-steps 7 --out {out}"
    monkeypatch.setattr(sys, "argv", command.split())
    evaluate.main()
    record = json.loads(out.read_text())
    assert record["command"] == "python " + command
    assert list(record["success_rates"]) == ["ground truth", "shuffled", "some/run"]
    assert record["success_rates"]["some/run"]["overall"] == 1
    assert seeds == [evaluate.HELD_OUT_SEED, evaluate.HELD_OUT_SEED + 64]     # no two pictures share noise
    assert "color attribution" in capsys.readouterr().out
