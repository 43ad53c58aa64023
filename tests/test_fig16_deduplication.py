"""experiments/fig16_deduplication.py: Algorithm 1 on hand-counted sets, and one tiny run."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scenes import draw_scene, make_scene

faiss = pytest.importorskip("faiss")
FILE = Path(__file__).parents[1] / "experiments" / "fig16_deduplication.py"
spec = importlib.util.spec_from_file_location("fig16", FILE)
fig16 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fig16)


def at_angles(*degrees):
    """Unit vectors (n, 2) of these directions."""
    angles = np.deg2rad(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def duplicates(vecs, items, threshold):
    return fig16.find_duplicates(vecs, items, fig16.index_of(vecs), threshold)


def test_the_order_of_the_items_decides_what_stays():
    """A is near B, B is near C, A is not near C. The item walked first marks; a marked one is
    skipped, so it marks nobody."""
    A, B, C = 0, 20, 40                                               # degrees
    near = math.cos(math.radians(25))
    assert duplicates(at_angles(A, B, C), ["A", "B", "C"], near) == {"B"}
    assert duplicates(at_angles(C, B, A), ["C", "B", "A"], near) == {"B"}
    assert duplicates(at_angles(B, A, C), ["B", "A", "C"], near) == {"A", "C"}
    assert duplicates(at_angles(A, C, B), ["A", "C", "B"], near) == {"B"}


def test_a_chain_of_six_keeps_every_second_one():
    """1 marks 2, 3 marks 2 and 4, 5 marks 4 and 6."""
    vecs = at_angles(0, 20, 40, 60, 80, 100)
    assert duplicates(vecs, [1, 2, 3, 4, 5, 6], math.cos(math.radians(25))) == {2, 4, 6}


def test_the_first_of_equal_items_stays_and_item_ids_are_returned():
    vecs = at_angles(90, 10, 10, 45, 10)
    assert duplicates(vecs, [70, 31, 12, 53, 24], 0.999) == {12, 24}


def test_what_equals_the_threshold_is_no_duplicate():
    """Inner product: 1/2, exactly. Squared distance: 4."""
    vecs = np.float32([[1, 0], [0.5, 3]])
    assert duplicates(vecs, [0, 1], 0.5) == set()
    assert duplicates(vecs, [0, 1], 0.4999) == {1}
    vecs = np.float32([[0, 0], [0, 2]])
    index = faiss.IndexFlatL2(2)
    index.add(vecs)
    assert fig16.find_duplicates(vecs, [0, 1], index, 4) == set()
    assert fig16.find_duplicates(vecs, [0, 1], index, 4.001) == {1}


def test_only_pictures_of_one_cluster_are_compared():
    vecs = at_angles(0, 90, 0, 90, 90)
    assert fig16.deduplicate(vecs, [[0, 1, 2, 3, 4]], 0.9) == {2, 3, 4}
    assert fig16.deduplicate(vecs, [[0, 1], [2, 3, 4]], 0.9) == {4}
    assert fig16.deduplicate(vecs, [[0, 2], [4, 1, 3]], 0.9) == {2, 1, 3}


def test_clusters_hold_each_picture_once_and_neighbours_together():
    """On half a circle, clusters by k-means are arcs, and equal vectors have the same cluster."""
    degrees = np.random.default_rng(0).uniform(0, 180, 150)
    degrees[100:] = degrees[:50]
    vecs = at_angles(*degrees)
    assert fig16.make_clusters(vecs, 1) == [list(range(150))]
    clusters = fig16.make_clusters(vecs, 5)
    assert len(clusters) == 5 and sorted(sum(clusters, [])) == list(range(150))
    cluster_of = np.empty(150, dtype=int)
    for number, items in enumerate(clusters):
        cluster_of[items] = number
    assert np.array_equal(cluster_of[100:], cluster_of[:50])
    assert max(map(len, clusters)) < 50                               # 30 each would be equal
    along = cluster_of[np.argsort(degrees)]
    assert np.count_nonzero(np.diff(along)) == 4                      # five arcs


def test_score_by_hand():
    """Three versions of scene 0, two of 1, one of 2. One, two and none are removed. Superfluous are
    2 + 1; 1 + 1 of them are gone. Scene 1 is lost, so only one removal has another version."""
    score = fig16.score({1, 3, 4}, np.array([0, 0, 0, 1, 1, 2]))
    assert score == pytest.approx(
        {"removed": 1 / 2, "recall": 2 / 3, "precision": 1 / 3, "lost": 1 / 3})
    perfect = fig16.score({0, 2, 4}, np.array([0, 0, 0, 1, 1, 2]))
    assert perfect == pytest.approx({"removed": 1 / 2, "recall": 1, "precision": 1, "lost": 0})


@pytest.mark.parametrize("kind", fig16.KINDS)
def test_a_copy_is_near_but_only_an_exact_one_is_equal(kind):
    rng = np.random.default_rng(3)
    picture = draw_scene(make_scene(0, 6))
    for _ in range(10):
        copy = fig16.make_copy(picture, kind, rng)
        assert copy.shape == (64, 64, 3) and copy.dtype == np.uint8
        assert np.array_equal(copy, picture) == (kind == "exact")
        itself, near = fig16.describe([picture, copy])
        assert (itself * near).sum() > 0.9


def test_a_shifted_copy_is_the_picture_one_pixel_further():
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(40):
        inner = fig16.make_copy(picture, "shift", rng)[1:-1, 1:-1]
        for top, left in [(0, 1), (1, 0), (2, 1), (1, 2), (1, 1)]:
            if np.array_equal(inner, picture[top : top + 62, left : left + 62]):
                found.add((top, left))
    assert found == {(0, 1), (1, 0), (2, 1), (1, 2)}


def test_every_copied_scene_has_one_to_many_copies_and_scenes_differ():
    options = fig16.Options(num_scenes=600, copied=0.1, most_copies=4)
    pictures, scene_of = fig16.draw_pictures(options, 5)
    versions = np.bincount(scene_of)
    assert len(pictures) == len(scene_of) and len(versions) == 600
    assert set(versions[:60]) == {2, 3, 4, 5} and set(versions[60:]) == {1}
    assert not np.array_equal(np.sort(scene_of[:600]), np.arange(600))        # It is shuffled.
    single = {picture.tobytes() for picture, scene in zip(pictures, scene_of) if scene >= 60}
    assert len(single) == 540                                         # Equal words come once.
    again, _ = fig16.draw_pictures(options, 5)
    assert all(map(np.array_equal, pictures, again))
    assert not np.array_equal(scene_of, fig16.draw_pictures(options, 6)[1])


def test_descriptors_are_unit_vectors_blind_to_contrast_and_see_plain_pictures():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 120, (64, 64, 3), dtype=np.uint8)
    plain = np.full((64, 64, 3), 90, np.uint8)
    vecs = fig16.describe([picture, 2 * picture + 10, picture[:, ::-1], plain, plain])
    cosines = vecs @ vecs.T
    assert np.diag(cosines) == pytest.approx(np.ones(5), abs=1e-5)
    assert cosines[0, 1] == pytest.approx(1, abs=1e-4)
    assert abs(cosines[0, 2]) < 0.3 and abs(cosines[0, 3]) < 0.05
    assert cosines[3, 4] == pytest.approx(1)


def seed(removed, recall, precision, single):
    """What run_seed returns. removed: at three thresholds; the rest is of the middle one."""
    rows = []
    for share in removed:
        rows.append({"removed": share, "recall": recall, "precision": precision})
    return {"clusters": rows, "one cluster": [row | {"recall": single} for row in rows],
            "equal_at_first": 9, "equal": 0}


def test_verdicts_by_hand():
    options = fig16.Options(thresholds=(0.93, 0.8, 0.99))
    assert options.thresholds == (0.8, 0.93, 0.99)
    good = seed((0.5, 0.4, 0.2), 0.95, 0.92, 0.96)
    rows = fig16.claims([good, seed((0.6, 0.3, 0.2), 0.9, 0.99, 0.9)], options)
    assert [row["verdict"] for row in rows] == ["held"] * 3
    assert [row["interval"] for row in rows] == [[0.1, 0.1], [0.9, 0.92], [0, 0.01]]
    assert rows[1]["here"] == "both are 0.900 or more"
    bad = seed((0.5, 0.4, 0.4), 0.95, 0.89, 0.98)
    rows = fig16.claims([bad, bad], options)
    assert [row["verdict"] for row in rows] == ["did not hold at this size"] * 3
    assert rows[2]["here"] == "recall is at most 0.030 lower"
    for found in ([good, bad], [good]):
        assert {row["verdict"] for row in fig16.claims(found, options)} == {"cannot be told"}


def test_options_that_contradict_each_other_are_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="--threshold 0.5 must be among them"):
        fig16.main(["--threshold", "0.5"])
    with pytest.raises(ValueError, match="--clusters 64 for 20 scenes"):
        fig16.main(["--num-scenes", "20"])
    with pytest.raises(ValueError, match="does not exist or holds no picture"):
        fig16.main(["--data", str(tmp_path / "nowhere")])


def test_a_tiny_run_finds_all_exact_copies_and_writes_what_it_found(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(fig16, "KINDS", ("exact", "brightness"))
    out = tmp_path / "fig16.json"
    fig16.main(["--num-scenes", "40", "--copied", "0.5", "--clusters", "4", "--seeds", "2",
                "--thresholds", "0.93", "0.9999", "--out", str(out)])
    record = json.loads(out.read_text())
    assert len(record["claims"]) == 3 and len(record["seeds"]) == 2
    for result in record["seeds"]:
        assert result["equal_at_first"] > 0 and result["equal"] == 0
        assert result["one cluster"][0]["recall"] > 0.99
        assert result["one cluster"][0]["removed"] >= result["superfluous"]
    assert "threshold" in record["settings"] and "out" not in record["settings"]
    assert out.with_suffix(".png").read_bytes()[1:4] == b"PNG"


def test_a_readers_folder_is_told_its_copies_and_nothing_is_written(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, index in (("a", 4), ("b", 4), ("c", 8), ("d", 9)):
        Image.fromarray(draw_scene(make_scene(0, index))).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a scene")
    (folder / "e.png").write_bytes(b"no picture")
    (folder / "e.txt").write_text("broken")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "fig16.json"
    fig16.main(["--data", str(folder), "--out", str(out)])            # too few for 64 clusters
    said = capsys.readouterr()
    assert said.out.splitlines()[:2] == ["b.png is a copy of a.png (1.0000)",
                                         "4 pictures in 1 clusters"]
    assert "above 0.93 : 25.0 % removed" in said.out and "e.png" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
