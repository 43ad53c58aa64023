"""Tests of geneval.py: recognition from pixels, rules of the score, controls, prompts of others."""

import json
import os
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import geneval
import sample
from checkpoints import SHIPPED
from geneval import (
    GENEVAL_TASKS, SPLITS, TASKS, Case, View, components, draw_prompts, geneval_cases, read_prompts,
    score, success_rates)
from scenes import (
    BACKGROUNDS, COLORS, RGB, SHAPES, SIZES, Scene, Thing, draw_scene, is_held_out, shape_mask)

# ---- Recognition ---------------------------------------------------------------------------------

def draw(*things, background="white", size=64):
    """A square picture of things given as (shape, color, left, top, diameter)."""
    things = [Thing(thing[0], thing[1], "small", *thing[2:]) for thing in things]
    return draw_scene(Scene("count", size, size, background, tuple(things)))


def flood(mask):
    """The 4-connected parts of a mask by flood fill, as a set of frozen sets of pixels."""
    todo, parts = {tuple(p) for p in np.argwhere(mask).tolist()}, set()
    while todo:
        part, front = set(), {todo.pop()}
        while front:
            part |= front
            beside = set()
            for y, x in front:
                beside |= {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)}
            front = beside & todo
            todo -= front
        parts.add(frozenset(part))
    return parts


@pytest.mark.parametrize("density", [0.3, 0.5, 0.6, 1.0])
def test_components_agree_with_a_flood_fill(density):
    mask = np.random.default_rng(0).random((40, 31)) < density
    found = {frozenset(map(tuple, np.argwhere(part).tolist())) for part in components(mask)}
    assert found == flood(mask)
    assert components(np.zeros((5, 5), bool)) == []


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_found_where_it_is_with_its_size(shape):
    for side in (64, 96, 512):
        for size, share in SIZES.items():
            left, top, diameter = side // 8, side // 4, round(share * side)
            found, = View(draw((shape, "blue", left, top, diameter), size=side)).things
            assert (found.shape, found.color, found.size) == (shape, "blue", size)
            rows, columns = np.nonzero(shape_mask(shape, diameter) > 0.5)
            middle = left + columns.mean(), top + rows.mean()
            center = found.left + found.diameter / 2, found.top + found.diameter / 2
            assert np.abs(np.subtract(center, middle)).max() < 1.5 * max(1, side // 128)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_color_is_told_on_every_background(background):
    for color in COLORS:
        for shape in ("star", "square"):
            view = View(draw((shape, color, 10, 40, 20), background=background))
            assert [(thing.shape, thing.color) for thing in view.things] == [(shape, color)]
            assert view.background == background


def test_nothing_is_found_where_nothing_is_and_the_rest_is_what_is_not_explained():
    empty = np.full((64, 64, 3), 200, np.uint8)
    assert View(empty).things == [] and not View(empty).rest([]).any()
    empty[30:33, 30:33] = (255, 0, 0)                        # a speck
    empty[20, 5:60] = (255, 0, 0)                            # a line
    assert View(empty).things == [] and View(empty).rest([]).sum() == 9 + 55
    view = View(draw(("star", "red", 4, 4, 24), ("ring", "blue", 38, 34, 22)))
    assert not view.rest(view.things).any()
    left_over = view.rest([thing for thing in view.things if thing.shape == "star"])
    assert left_over[34:56, 38:60].sum() == left_over.sum() > 150


# ---- GenEval: prompts and rules ------------------------------------------------------------------

RED_STAR = Thing("star", "red", "small", 4, 4, 22)
BLUE_RING = Thing("ring", "blue", "medium", 36, 30, 25)


def picture_of(*things, background="white", word=""):
    return draw_scene(Scene("single", 64, 64, background, things, word=word))


def passes(image, task, things, relation="", background="white", word=""):
    """(strict, lax) of a picture for the task that these things are an example of."""
    scene = Scene(TASKS[task][0], 64, 64, background, things, relation, word)
    return score(Case(task, "", scene, TASKS[task][1]), image)


def test_prompts_are_those_of_the_split():
    for split in SPLITS:
        cases = geneval_cases(20, seed=3, split=split)
        assert [case.task for case in cases] == [task for task in TASKS for _ in range(20)]
        assert len({(case.scene.kind, case.scene.wording) for case in cases}) == 180    # once each
        for case in cases:
            shapes = [thing.shape for thing in case.scene.things]
            colors = [thing.color for thing in case.scene.things]
            held_out = is_held_out(shapes, colors, case.scene.relation)
            assert held_out == (split == "held-out combinations")
            if held_out:
                assert all(color in case.prompt for color in colors)
    prompts = {case.task: case.prompt for case in geneval_cases(1, seed=3)}
    assert prompts["color attribution"].count(" and ") == 1
    assert "background" in prompts["background"]
    plain, reworded = (geneval_cases(20, seed=3, split=split) for split in SPLITS[:2])
    assert [case.scene for case in plain] == [case.scene for case in reworded]
    assert not {case.prompt for case in plain} & {case.prompt.lower() for case in reworded}


def test_strict_means_that_and_nothing_else():
    one, two = picture_of(RED_STAR), picture_of(RED_STAR, BLUE_RING)
    assert passes(one, "single object", (RED_STAR,)) == (True, True)
    assert passes(two, "single object", (RED_STAR,)) == (False, True)          # GenEval is laxer
    assert passes(one, "single object", (BLUE_RING,)) == (False, False)
    assert passes(two, "two objects", (BLUE_RING, RED_STAR)) == (True, True)
    assert passes(one, "two objects", (BLUE_RING, RED_STAR)) == (False, False)
    blue_star, red_ring = replace(RED_STAR, color="blue"), replace(BLUE_RING, color="red")
    assert passes(two, "color attribution", (RED_STAR, BLUE_RING)) == (True, True)
    assert passes(two, "color attribution", (blue_star, red_ring)) == (False, False)
    assert passes(one, "colors", (blue_star,)) == (False, False)
    assert passes(one, "size", (RED_STAR,)) == (True, True)
    assert passes(one, "size", (replace(RED_STAR, size="large"),)) == (False, False)
    assert passes(one, "background", (RED_STAR,), background="white") == (True, True)
    assert passes(one, "background", (RED_STAR,), background="navy") == (False, False)
    for relation, holds in (("left of", True), ("right of", False), ("above", True)):
        assert passes(two, "position", (RED_STAR, BLUE_RING), relation) == (holds, holds)
        assert passes(two, "position", (BLUE_RING, RED_STAR), relation) == (not holds, not holds)


def test_counts_are_exact_in_both_columns():
    stars = [RED_STAR, replace(RED_STAR, left=36), replace(RED_STAR, top=36)]
    assert passes(picture_of(*stars), "counting", tuple(stars)) == (True, True)
    assert passes(picture_of(*stars), "counting", tuple(stars[:2])) == (False, False)
    assert passes(picture_of(*stars[:2]), "counting", tuple(stars)) == (False, False)
    assert passes(picture_of(*stars[:2], BLUE_RING), "counting", tuple(stars[:2])) == (False, True)


def test_dirt_and_uneven_backgrounds_fail_strictly():
    for place in (slice(50, 60), slice(0, 64)):
        image = picture_of(RED_STAR).copy()
        image[50:60, place] -= 100
        assert passes(image, "single object", (RED_STAR,)) == (False, True)
    ramp = np.linspace(0, 120, 64).astype(np.uint8)[:, None, None]
    assert passes(picture_of(RED_STAR) - ramp, "single object", (RED_STAR,))[0] is False


def painted(mask, color, background="white"):
    """A picture with a mask (h, w) in its middle, in a colour of this world."""
    canvas = picture_of(background=background).copy()
    top, left = (np.array(canvas.shape[:2]) - mask.shape) // 2
    region = canvas[top : top + mask.shape[0], left : left + mask.shape[1]]
    region[mask > 0.5] = RGB[color]
    return canvas


def misshapen():
    """(mask, the shape that a lax eye may take it for)."""
    square, triangle, heart = (shape_mask(name, 24) for name in ("square", "triangle", "heart"))
    house = np.ones((27, 20))
    house[:8] = shape_mask("triangle", 20)[1:17:2] > 0.5
    bump = np.pad(np.ones((20, 20)), ((0, 0), (0, 7)))
    bump[6:13, 20:] = 1
    disc = shape_mask("circle", 28).copy()
    disc[8:19, 17:] = 0
    return [(np.ones((19, 25)), "square"), (bump, "square"), (house, "triangle"),
            (triangle[::-1], "heart"), (heart[::-1], "triangle"), (disc, "circle"),
            (square[:, 7:], "square")]


@pytest.mark.parametrize("number", range(7))
def test_what_is_almost_a_shape_is_none(number):
    """Rectangle, square with a lump, house, shapes upside down, a bitten disc, a square's part."""
    mask, shape = misshapen()[number]
    thing = replace(RED_STAR, shape=shape)
    assert passes(painted(mask, "red"), "single object", (thing,)) == (False, False)


def test_a_thing_of_two_colors_is_none():
    circle, star = shape_mask("circle", 24) > 0.5, shape_mask("star", 14) > 0.5
    red = replace(RED_STAR, shape="circle", color="red")
    image = painted(circle, "red")
    assert passes(image, "colors", (red,)) == (True, True)
    image[25:39, 25:39][star] = RGB["blue"]
    assert passes(image, "colors", (red,)) == (False, False)
    halves = painted(circle, "yellow", "black")
    halves[:, 32:][(halves[:, 32:] > 0).any(axis=2)] = RGB["cyan"]
    for color in ("yellow", "cyan"):
        thing = replace(red, color=color)
        assert passes(halves, "colors", (thing,), background="black") == (False, False)


@pytest.mark.parametrize("levels, strict", [(10, True), (28, False)])
def test_ghosts_and_gradients_that_a_person_sees_fail(levels, strict):
    """28 of 255 are below the difference that makes a thing, but the background is not even."""
    ghost, slope = picture_of(RED_STAR).copy(), picture_of(RED_STAR).copy()
    ghost[36:60, 36:60][shape_mask("circle", 24) > 0.5] -= np.uint8(levels)
    empty = (slope == 255).all(axis=2)
    ramp = np.linspace(0, 2 * levels, 64).astype(np.uint8)[:, None].repeat(64, axis=1)
    slope[empty] -= ramp[empty][:, None]
    assert passes(ghost, "single object", (RED_STAR,)) == (strict, True)
    assert passes(slope, "single object", (RED_STAR,))[0] is strict


def test_a_speck_far_from_a_word_does_not_move_it():
    """Four pixels in a thousand may be dirty, in this task too."""
    image = picture_of(word="CAT").copy()
    image[2, 4:6] = 0
    assert passes(image, "word", (), word="CAT") == (True, True)
    image[2:6, 4:10] = 0
    assert passes(image, "word", (), word="CAT") == (False, False)


def test_a_word_passes_if_it_is_spelled_right_wherever_it_stands():
    image = picture_of(word="BOOK")
    assert passes(image, "word", (), word="BOOK") == (True, True)
    assert passes(np.roll(image, (-15, 2), axis=(0, 1)), "word", (), word="BOOK") == (True, True)
    for wrong in ("BOOX", "BOK", "OBOK", "LOOK", "CAT"):
        assert passes(picture_of(word=wrong), "word", (), word="BOOK") == (False, False)
    short = np.roll(picture_of(word="GO"), (9, 14), axis=(0, 1))
    assert passes(short, "word", (), word="GO") == (True, True)
    assert passes(picture_of(), "word", (), word="BOOK") == (False, False)
    assert passes(picture_of(RED_STAR, word="BOOK"), "word", (), word="BOOK")[0] is False


def test_four_pixels_in_a_thousand_may_be_dirty():
    """.004 of 64 x 64 px are 16.4."""
    for dirty, strict in ((16, True), (17, False)):
        image = picture_of(RED_STAR).copy()
        image[50, 10 : 10 + dirty] = 0
        assert passes(image, "single object", (RED_STAR,)) == (strict, True)


def test_a_relation_needs_a_clear_offset():
    """A tenth of both sizes together: things of 100 px need more than 20 px between centres."""
    first = Thing("star", "red", "small", 10, 10, 100)
    case = Case("position", "", Scene("pair", 64, 64, "white", (first, BLUE_RING), "left of"),
                ("relation",))
    for apart, holds in ((21, True), (20, False), (-21, False)):
        second = replace(BLUE_RING, left=10 + apart, diameter=100)
        assert geneval.fits(case, (first, second)) == holds


# ---- The controls --------------------------------------------------------------------------------

@pytest.mark.parametrize("split", SPLITS)
def test_ground_truth_passes_and_shuffled_captions_do_not(split):
    cases = geneval_cases(25, seed=1, split=split)
    rates = {}
    for name, images, asked in geneval.controls(cases):
        rates[name] = success_rates(asked, images)
    truth = rates["ground truth"]
    assert min(truth["strict"].values()) == 1 and truth["overall"] == truth["overall_lax"] == 1
    assert rates["shuffled captions"]["overall"] <= 0.03


@pytest.mark.parametrize("height, width", [(48, 96), (128, 128), (320, 256)])
def test_ground_truth_passes_at_other_sizes(height, width):
    cases = geneval_cases(3, 2, height, width)
    rates = success_rates(cases, [draw_scene(case.scene) for case in cases])
    assert min(rates["strict"].values()) == 1, rates


def test_decoded_noise_and_what_the_vae_loses():
    """Noise scored .238 by the rule that asks for no more than one of each."""
    rates = {}
    for name, images, cases in geneval.controls(geneval_cases(6), sample.load(SHIPPED)):
        rates[name] = success_rates(cases, images)["overall"]
    assert rates.pop("ground truth through the VAE") >= 0.94
    assert max(rate for name, rate in rates.items() if "noise" in name) <= 0.01
    assert len(rates) == 5


def test_geneval_asks_in_batches_and_scores_what_comes_back(monkeypatch):
    pictures = {}
    for case in geneval_cases(10, seed=5):
        pictures.setdefault(case.prompt, []).append(draw_scene(case.scene))
    sizes = []

    def generate(pipeline, prompts, seed, batch_size, num_steps):
        assert num_steps == 3 and seed == 5 + sum(sizes)     # no two batches share their noise
        sizes.append(len(prompts))
        return [pictures[prompt][0] for prompt in prompts]

    monkeypatch.setattr(sample, "generate", generate)
    pipeline = SimpleNamespace(defaults={"height": 64, "width": 64})
    rates = geneval.geneval(pipeline, 10, seed=5, num_steps=3)
    assert sizes == [64, 26] and rates["n"] == 10 and rates["overall"] == 1
    mean = sum(rates["strict"][task] for task in GENEVAL_TASKS) / 6
    assert rates["overall"] == pytest.approx(mean)
    monkeypatch.setattr(sample, "generate", lambda *given, **settings: [])
    with pytest.raises(ValueError):
        geneval.geneval(pipeline, 1)                         # too few pictures


def test_pictures_that_are_drawn_at_once_have_four_megapixels():
    for side, count in ((64, 64), (256, 64), (512, 16), (1024, 4), (4096, 1)):
        assert geneval.batch_size(side, side) == count


# ---- Prompts of others and their pictures --------------------------------------------------------

GENEVAL_LINE = '{"tag": "counting", "include": [{"class": "cup", "count": 2}], "prompt": "a cup"}'


def test_prompt_files_of_the_three_public_lists_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text(GENEVAL_LINE + "\n")
    (tmp_path / "b.tsv").write_text('Prompt\tCategory\tChallenge\tNote\nthe "Sun"\tArts\tBasic\t\n')
    (tmp_path / "c.txt").write_text("four trucks\na cat\tand a dog")
    assert read_prompts(tmp_path / "a.jsonl") == [json.loads(GENEVAL_LINE)]
    assert read_prompts(tmp_path / "b.tsv") == [
        {"prompt": 'the "Sun"', "category": "Arts", "challenge": "Basic", "note": ""}]
    assert read_prompts(tmp_path / "c.txt") == [{"prompt": "four trucks"},
                                                {"prompt": "a cat\tand a dog"}]


@pytest.mark.parametrize("name, text, sentence", [
    ("a.txt", "a cat\n\na dog\n", "a.txt line 2: '' is no prompt"),
    ("a.txt", "", "a.txt holds no prompt"), ("a.tsv", "", "a.tsv holds no prompt"),
    ("a.jsonl", GENEVAL_LINE + '\n{"prompt": 3}\n', "a.jsonl line 2"),
    ("a.jsonl", GENEVAL_LINE + "\n\n", "a.jsonl line 2"), ("a.jsonl", "[1]\n", "a.jsonl line 1"),
    ("a.tsv", "Prompt\tNote\na cat\n", "a.tsv line 2: 'a cat' is no prompt"),
    ("a.tsv", "Text\na cat\n", "a.tsv line 1")])
def test_a_wrong_line_of_a_prompt_file_is_named(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_prompts(tmp_path / name)


def test_pictures_lie_where_public_scorers_look_for_them(tmp_path, monkeypatch):
    """GenEval's evaluate_images.py: folders of digits with metadata.jsonl and samples/DIGITS.png.
    T2I-CompBench: samples/PROMPT_NUMBER.png, split at "_"."""
    asked = []

    def generate(pipeline, prompts, seed, **settings):
        asked.append((prompts, seed, settings))
        return [Image.new("RGB", (8, 8), (seed + i, 0, 0)) for i in range(len(prompts))]

    monkeypatch.setattr(sample, "generate", generate)
    prompts = [json.loads(GENEVAL_LINE), {"prompt": "a cow", "tag": "single_object"}]
    draw_prompts(None, prompts, tmp_path / "geneval", 2, 10, num_steps=4)
    assert asked == [(["a cup"] * 2, 10, {"num_steps": 4}), (["a cow"] * 2, 12, {"num_steps": 4})]
    for number, about in enumerate(prompts):
        folder = tmp_path / "geneval" / f"{number:05}"
        with open(folder / "metadata.jsonl") as file:
            assert json.load(file) == about
        names = sorted(os.listdir(folder / "samples"))
        assert names == ["0000.png", "0001.png"]
        reds = [Image.open(folder / "samples" / name).getpixel((0, 0))[0] for name in names]
        assert reds == [10 + 2 * number, 11 + 2 * number]
    texts = [{"prompt": "four trucks"}, {"prompt": "a cat/dog " + "x" * 300}]
    draw_prompts(None, texts, tmp_path / "t2i", 1, 0)
    names = sorted(os.listdir(tmp_path / "t2i" / "samples"), reverse=True)
    assert names[0] == "four trucks_000000.png" and names[1].endswith("xx_000001.png")
    assert names[1].startswith("a cat dog xx") and len(names) == 2
