"""experiments/fig9_text_encoders.py: prompts, intervals and verdicts by hand, one tiny run."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest

from geneval import geneval_cases, score
from scenes import draw_scene

FILE = Path(__file__).parent.parent / "experiments" / "fig9_text_encoders.py"
spec = importlib.util.spec_from_file_location("fig9", FILE)
fig9 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fig9)


def test_a_detailed_prompt_tells_everything_and_only_a_picture_with_all_of_it_passes():
    options = fig9.Options(num_prompts=3)
    cases = fig9.make_cases(options, 64, 64)
    assert len(cases) == 8 * 3
    detailed = [case for case in cases if case.task == "detailed"]
    for case in detailed:
        first, second = case.scene.things
        words = [first.color, first.size, first.shape, case.scene.relation,
                 second.color, second.size, second.shape, case.scene.background]
        for word in words:
            assert word in case.prompt, case.prompt
        assert score(case, draw_scene(case.scene))[0]
        other = "gray" if case.scene.background != "gray" else "black"
        wrong = fig9.replace(case.scene, background=other)
        assert not score(case, draw_scene(wrong))[0]


def test_the_paired_interval_by_hand():
    """Differences 1, 0, 0, -1, 1: mean .2, variance (.64 + .04 + .04 + 1.44 + .64) / 4 = .7."""
    first = np.array([True, True, False, False, True])
    second = np.array([False, True, False, True, False])
    middle, (low, high) = fig9.paired_interval(first, second)
    reach = 1.96 * math.sqrt(0.7 / 5)
    assert middle == pytest.approx(0.2)
    assert (low, high) == pytest.approx((0.2 - reach, 0.2 + reach))


@pytest.mark.parametrize("interval, bounds, verdict", [
    ((0.01, 0.2), (0, math.inf), "held"),
    ((-0.3, -0.01), (0, math.inf), "did not hold at this size"),
    ((-0.01, 0.2), (0, math.inf), "cannot be told"),
    ((-0.2, 0.09), (-math.inf, 0.1), "held"),
    ((0.11, 0.3), (-math.inf, 0.1), "did not hold at this size"),
    ((0.05, 0.15), (-math.inf, 0.1), "cannot be told"),
])
def test_a_verdict_follows_from_the_interval_and_the_bounds(interval, bounds, verdict):
    assert fig9.judge("claim", "paper", 0.0, interval, bounds)["verdict"] == verdict


def test_claims_compare_what_they_say():
    """Without T5 the words are lost and nothing else: 30 of 30, then 0 of 30."""
    cases = geneval_cases(30)
    tasks = np.array([case.task for case in cases])
    cases = [case for case in cases if case.task in (*fig9.GENEVAL_TASKS, "word")]
    tasks = np.array([case.task for case in cases])
    cases += [fig9.replace(case, task="detailed") for case in cases[:30]]
    everything = np.ones(len(cases), bool)
    no_words = everything.copy()
    no_words[:-30] = tasks != "word"
    passed = {"all": everything, "no t5": no_words, "none": ~everything}
    spelling, otherwise, details, subsets = fig9.claims(cases, passed)
    assert (spelling["here"], spelling["verdict"]) == (1, "held")
    assert (otherwise["here"], otherwise["verdict"]) == (0, "held")
    assert (details["here"], details["verdict"]) == (0, "cannot be told")
    assert (subsets["here"], subsets["verdict"]) == (round(7 / 8, 3), "held")


def test_a_model_that_draws_nothing_tells_nothing():
    cases = [case for case in geneval_cases(30) if case.task in (*fig9.GENEVAL_TASKS, "word")]
    cases += [fig9.replace(case, task="detailed") for case in cases[:30]]
    nothing = np.zeros(len(cases), bool)
    rows = fig9.claims(cases, {"all": nothing, "no t5": nothing, "none": nothing})
    assert {row["verdict"] for row in rows} == {"cannot be told"}


def test_a_tiny_run_draws_every_subset_and_writes_its_record(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "fig9.json"
    fig9.main(["--num-prompts", "2", "--out", str(out)])
    record = json.loads(out.read_text())
    assert list(record["table"]) == ["all", "no t5", "no clip_l", "no clip_g", "no clip_g, t5",
                                     "no clip_l, t5", "no clip_l, clip_g", "none"]
    for row in record["table"].values():
        share, low, high = row["six tasks"]
        assert 0 <= low <= share <= high <= 1 and (12 * share) == pytest.approx(round(12 * share))
    assert len(record["claims"]) == 4
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert "T5 matters for spelling" in capsys.readouterr().out
