"""experiments/fig17_memorization.py: distances and cliques by hand, what trains, one tiny run."""

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import to_tensor
from devices import World
from mmdit import MMDiTConfig
from scenes import draw_scene

pytest.importorskip("networkx")
FILE = Path(__file__).parents[1] / "experiments" / "fig17_memorization.py"
spec = importlib.util.spec_from_file_location("fig17", FILE)
fig17 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fig17)


def plain(value, size=64):
    """A picture (1, 3, size, size) of one value."""
    return torch.full((1, 3, size, size), float(value))


@pytest.mark.parametrize("size", [16, 64, 512])
def test_distances_of_plain_pictures_are_those_of_their_values_in_0_to_1(size):
    black, gray, white = plain(-1, size), plain(0, size), plain(1, size)
    found = fig17.tile_distance(torch.cat([black, gray]), torch.cat([white, gray, black]))
    torch.testing.assert_close(found, torch.tensor([[1, 0.5, 0], [0.5, 0, 0.5]]))


@pytest.mark.parametrize("size, tile", [(64, 16), (512, 128)])
def test_the_worst_of_16_tiles_decides(size, tile):
    """A white tile on black is as far as a white picture, wherever it is. White that lies on four
    tiles, a quarter in each, has the distance 1/2. So has white in a quarter of a tile."""
    for row in range(4):
        for column in range(4):
            image = plain(-1, size)
            top, left = row * tile, column * tile
            image[..., top : top + tile, left : left + tile] = 1
            assert fig17.tile_distance(image, plain(-1, size)).item() == pytest.approx(1)
    half = tile // 2
    across, inside = plain(-1, size), plain(-1, size)
    across[..., half : half + tile, half : half + tile] = 1
    inside[..., :half, :half] = 1
    for image in (across, inside):
        assert fig17.tile_distance(image, plain(-1, size)).item() == pytest.approx(0.5)


def test_a_distance_is_a_root_of_a_mean_over_pixels_and_channels():
    """Red on black: one channel of three differs by 1. Rows are pictures of x, columns those of
    y."""
    red = plain(-1)
    red[:, 0] = 1
    found = fig17.tile_distance(torch.cat([red, plain(-1), plain(1)]), torch.cat([red, plain(-1)]))
    assert found.shape == (3, 2)
    third = math.sqrt(1 / 3)
    wanted = torch.tensor([[0, third], [third, 0], [math.sqrt(2 / 3), 1]])
    torch.testing.assert_close(found, wanted)


def test_equal_pictures_have_the_distance_0_exactly():
    """With 40 pictures or more, torch would multiply matrices, which rounds."""
    images = torch.rand(40, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    distance = fig17.tile_distance(images, images)
    assert distance.diagonal().abs().max() == 0
    torch.testing.assert_close(distance, distance.T)


def distances(count, edges, near=0.1):
    """(count, count): `near` for these pairs, 0 for a picture and itself, 1 otherwise."""
    distance = torch.ones(count, count)
    distance.fill_diagonal_(0)
    for i, j in edges:
        distance[i, j] = distance[j, i] = near
    return distance


def test_largest_cliques_by_hand():
    """A triangle 0 1 2 with a tail 2-3-4, a picture 5 alone, a square 6 7 8 9 without diagonals."""
    edges = [(0, 1), (1, 2), (0, 2), (2, 3), (3, 4), (6, 7), (7, 8), (8, 9), (9, 6)]
    sizes, complete = fig17.largest_cliques(distances(10, edges), 0.15)
    assert sizes.tolist() == [3, 3, 3, 2, 2, 1, 2, 2, 2, 2] and complete


def test_a_picture_in_two_cliques_has_the_size_of_the_larger_one():
    """2 lies in the triangle 0 1 2 and in the clique 2 3 4 5."""
    edges = [(0, 1), (1, 2), (0, 2), (2, 3), (2, 4), (2, 5), (3, 4), (3, 5), (4, 5)]
    sizes, _ = fig17.largest_cliques(distances(6, edges), 0.15)
    assert sizes.tolist() == [3, 3, 4, 4, 4, 4]


def test_a_distance_of_epsilon_does_not_connect():
    for epsilon, wanted in ((0.25, [1, 1, 1]), (0.2501, [2, 2, 1])):
        sizes, _ = fig17.largest_cliques(distances(3, [(0, 1)], near=0.25), epsilon)
        assert sizes.tolist() == wanted


def test_the_record_says_where_not_all_cliques_were_looked_at(monkeypatch):
    """Three pairs of strangers among six pictures that are otherwise near: 2^3 cliques of three."""
    edges = [(i, j) for i in range(6) for j in range(i) if i // 2 != j // 2]
    sizes, complete = fig17.largest_cliques(distances(6, edges), 0.15)
    assert sizes.tolist() == [3] * 6 and complete
    monkeypatch.setattr(fig17, "MOST_CLIQUES", 1)
    sizes, complete = fig17.largest_cliques(distances(6, edges), 0.15)
    assert sorted(sizes.tolist()) == [1, 1, 1, 3, 3, 3] and not complete


def test_the_set_begins_with_what_deduplication_leaves():
    options = fig17.Options(num_scenes=40, repeated=3, copies=5)
    pictures, captions, scenes = fig17.draw_set(options, 7)
    assert len(pictures) == len(captions) == 40 + 3 * 5
    assert len(set(captions[:3])) == 3 and len(scenes) == 3
    for picture, scene in zip(pictures, scenes, strict=False):
        assert np.array_equal(picture, draw_scene(scene))
    assert len({picture.tobytes() for picture in pictures[:40]}) == 40
    images = torch.stack([to_tensor(picture) for picture in pictures])
    for number in range(3):
        copies = range(40 + 5 * number, 45 + 5 * number)
        assert {captions[i] for i in copies} == {captions[number]}
        assert len({pictures[i].tobytes() for i in [number, *copies]}) == 6          # none is exact
        distance = fig17.tile_distance(images[copies], images[:40])                  # (5, 40)
        assert distance[:, number].max() < options.epsilon
        assert distance.argmin(dim=1).tolist() == [number] * 5
    again, *_ = fig17.draw_set(options, 7)
    assert all(map(np.array_equal, pictures, again))


def test_repeated_scenes_hold_one_thing_whose_place_is_free(monkeypatch):
    kinds = {}

    def watched(scene):
        picture = draw_scene(scene)
        kinds[picture.tobytes()] = scene.kind
        return picture
    monkeypatch.setattr(fig17, "draw_scene", watched)
    pictures, *_ = fig17.draw_set(fig17.Options(num_scenes=600, repeated=8, copies=1), 0)
    assert {kinds[picture.tobytes()] for picture in pictures[:8]} == {"single"}
    others = {picture.tobytes() for picture in pictures[8:600]}
    assert {kinds[picture] for picture in others} == {"single", "pair", "count", "word"}
    assert len(others) == 592                                         # Equal words come once.


def test_repeated_scenes_have_different_full_captions(monkeypatch):
    """Here a caption is a colour, of which there are eight."""
    def colors(scene):
        return "short", scene.things[0].color if scene.things else ""
    monkeypatch.setattr(fig17, "scene_captions", colors)
    _, captions, _ = fig17.draw_set(fig17.Options(num_scenes=100, repeated=8, copies=1), 0)
    assert len(set(captions[:8])) == 8 and captions[100:] == captions[:8]


def test_a_model_trains_on_the_first_pictures_only_and_each_has_its_own_caption(monkeypatch):
    """Picture i has the latent i, its caption the context 10 i and the pooled vector 100 i."""
    batches = []

    def watched(model, loss, make, config, run):
        assert (config.steps, config.batch_size, config.seed) == (3, 64, 5)
        batches.extend(make(step) for step in (0, 1, 0))
        return model
    monkeypatch.setattr(fig17, "fit", watched)
    numbers = torch.arange(9.0)
    encoded = fig17.Encoded(numbers.view(-1, 1, 1, 1).expand(-1, 2, 4, 4),
                            10 * numbers.view(-1, 1, 1).expand(-1, 3, 8),
                            100 * numbers.view(-1, 1).expand(-1, 8))
    sizes = MMDiTConfig(1, latent_channels=2, context_dim=8, pooled_dim=8, pos_embed_max_size=4)
    options = fig17.Options(steps=3, batch_size=64, device="cpu")
    fig17.train(encoded, 6, sizes, options, 5, World("cpu"))
    first, other, again = batches
    chosen = first.latent[:, 0, 0, 0]
    assert set(chosen.tolist()) == {0, 1, 2, 3, 4, 5}
    torch.testing.assert_close(first.context[:, 0, 0], 10 * chosen)
    torch.testing.assert_close(first.pooled[:, 0], 100 * chosen)
    assert torch.equal(first.noise, again.noise) and not torch.equal(first.noise, other.noise)
    assert first.noise.std() == pytest.approx(1, abs=0.05)
    assert 0 < first.uniform.min() and first.uniform.max() < 1
    assert first.uniform.mean() == pytest.approx(0.5, abs=0.15)


def test_the_attack_counts_by_hand(monkeypatch):
    """Prompt "a": 12 copies of its scene and 3 others. Prompt "b": 11 equal pictures, none of them
    a copy, 4 others, one of which is a copy."""
    rng = np.random.default_rng(0)

    def noise():
        return Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    scenes = {"a": noise(), "b": noise()}
    black = Image.new("RGB", (64, 64))
    asked = []

    def draw(pipeline, prompts, seed, batch_size):
        asked.append((prompts, seed))
        if prompts[0] == "a":
            return [scenes["a"]] * 12 + [noise(), noise(), noise()]
        return [black] * 11 + [noise(), noise(), noise(), scenes["b"]]
    monkeypatch.setattr(fig17, "generate", draw)
    options = fig17.Options(num_pictures=15, cliques=(2, 12))
    assert options.cliques == (2, 10, 12)
    originals = torch.stack([to_tensor(scenes["a"]), to_tensor(scenes["b"])])
    pipeline = type("Pipeline", (), {"device": torch.device("cpu")})
    found, shown = fig17.attack(pipeline, ["a", "b"], originals, options, 3)
    assert found == {"pictures": 30, "copies": 13, "all_cliques": True,
                     "memorized": [23, 23, 12], "right": [12, 12, 12]}
    assert [prompts for prompts, _ in asked] == [["a"] * 15, ["b"] * 15]
    assert asked[1][1] - asked[0][1] >= 15                            # No noise comes twice.
    assert len(shown) == 2 and shown[1][0] is black


def test_chance_puts_one_thing_anywhere():
    """With an epsilon of 1 all pictures are near, with 0 none is. In between: 20 random places of a
    small thing have pairs by chance, and no clique of 10."""
    options = fig17.Options(num_scenes=8, repeated=2, copies=1, num_pictures=20, cliques=(2, 20))
    _, _, scenes = fig17.draw_set(options, 0)
    assert fig17.by_chance(scenes, replace(options, epsilon=1.0), 0) == [40, 40, 40]
    assert fig17.by_chance(scenes, replace(options, epsilon=0.0), 0) == [0, 0, 0]
    pairs, tens, twenties = fig17.by_chance(scenes, options, 0)
    assert 0 < pairs < 30 and tens == twenties == 0


def seed(before, after, right=None, copies=None):
    """What run_seed returns: memorised pictures at the clique sizes 2, 10, 20, of 100."""
    found = {"by_chance": [9, 1, 0]}
    for name, counts in zip(fig17.SETS, (before, after), strict=True):
        marked = counts if right is None else right
        found[name] = {"memorized": counts, "right": marked, "pictures": 100,
                       "copies": marked[1] if copies is None else copies}
    return found


def test_copies_are_counted_among_the_marked_and_among_the_others():
    """Marked 40 + 8, of which 30 + 6 are copies. Of the other 152, 70 + 70 - 36 are."""
    found = seed([50, 40, 9], [30, 8, 0], copies=70)
    found["duplicated"]["right"], found["deduplicated"]["right"] = [0, 30, 0], [0, 6, 0]
    assert fig17.shares_of_copies(found, 1) == (36 / 48, 104 / 152)


@pytest.mark.parametrize("before, after, halved", [
    (40, 20, True), (40, 0, True), (40, 21, None), (40, 40, False), (0, 12, False), (0, 0, None)])
def test_half_or_less_is_fewer(before, after, halved):
    assert fig17.is_halved(before, after) is halved


def test_verdicts_by_hand():
    options = fig17.Options(cliques=(2, 20))
    rows = fig17.claims([seed([50, 40, 9], [30, 8, 0]), seed([60, 60, 0], [55, 12, 0])], options)
    assert [row["verdict"] for row in rows] == ["held"] * 3
    assert [row["interval"] for row in rows] == [[32, 48], [5, 9], [1, 1]]
    assert rows[0]["here"] == "50 -> 10, by chance 1; interval: difference"
    worse = seed([50, 40, 30], [60, 45, 30], right=[50, 35, 20])
    rows = fig17.claims([worse, worse], options)
    assert [row["verdict"] for row in rows] == ["did not hold at this size"] * 3
    assert rows[2]["interval"] == [0.8235, 0.8235]                    # 70 of 85
    every = [seed([50, 40, 9], [30, 8, 0], copies=100)] * 2           # The others are copies, too.
    assert fig17.claims(every, options)[2]["verdict"] == "did not hold at this size"
    mixed = fig17.claims([seed([50, 40, 30], [49, 30, 30])] * 2, options)    # as many at size 20
    assert [row["verdict"] for row in mixed] == ["cannot be told", "did not hold at this size",
                                                 "held"]
    nothing = seed([7, 0, 0], [3, 0, 0])
    for seeds in ([nothing, nothing], [seed([50, 40, 0], [30, 8, 0]), nothing],
                  [seed([50, 40, 0], [30, 8, 0])]):
        assert {row["verdict"] for row in fig17.claims(seeds, options)} == {"cannot be told"}


def test_options_that_contradict_each_other_are_one_sentence():
    with pytest.raises(ValueError, match="--repeated 5 of --num-scenes 4"):
        fig17.main(["--num-scenes", "4", "--repeated", "5"])
    with pytest.raises(ValueError, match="--num-pictures 9 must be a whole number from 10"):
        fig17.main(["--num-pictures", "9"])


def test_a_tiny_run_writes_numbers_claims_and_the_figure(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(fig17.SAMPLING, "num_steps", 2)
    trained = []

    def watched(encoded, count, *others, train=fig17.train):
        trained.append(count)
        assert len(encoded.latent) == len(encoded.context) == 14
        return train(encoded, count, *others)
    monkeypatch.setattr(fig17, "train", watched)
    out = tmp_path / "fig17.json"
    fig17.main(["--num-scenes", "8", "--repeated", "1", "--copies", "6", "--num-pictures", "10",
                "--depth", "1", "--steps", "2", "--batch-size", "4", "--seeds", "1",
                "--cliques", "2", "--device", "cpu", "--out", str(out)])
    assert trained == [14, 8]
    record = json.loads(out.read_text())
    found, = record["seeds"]
    assert list(found) == ["by_chance", *fig17.SETS] and len(record["claims"]) == 3
    for counts in (found["duplicated"], found["deduplicated"]):
        assert counts["pictures"] == 10 and len(counts["memorized"]) == 2
    assert record["settings"]["cliques"] == [2, 10] and "out" not in record["settings"]
    assert out.with_suffix(".png").read_bytes()[1:4] == b"PNG"
