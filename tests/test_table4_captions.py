"""experiments/table4_captions.py: wordings, gains and verdicts by hand, one tiny run."""

import importlib.util
import json
import math
from functools import partial
from pathlib import Path

import pytest

from geneval import GENEVAL_TASKS, TASKS, geneval_cases

FILE = Path(__file__).parent.parent / "experiments" / "table4_captions.py"
spec = importlib.util.spec_from_file_location("table4", FILE)
table4 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(table4)


def rates(share, n=100, **others):
    """What success_rates gives, with one share for all tasks but `others`."""
    lax = dict.fromkeys(TASKS, share) | {name.replace("_", " "): x for name, x in others.items()}
    return {"n": n, "lax": lax, "clip_score": share / 2, "clip_error": 0.003}


def of_seed(short, mix):
    return {"short": {"plain": short, "full": short}, "mix": {"plain": mix, "full": mix}}


def test_the_papers_overall_scores_are_the_means_of_its_tasks():
    """Table 4: 43.27 and 49.78, to the digits that it prints."""
    for place in (0, 1):
        mean = sum(table4.PAPER[task][place] for task in GENEVAL_TASKS) / 6
        assert mean == pytest.approx(table4.PAPER["overall"][place], abs=0.01)


def test_the_full_wording_tells_all_and_asks_for_the_same():
    plain, full = table4.make_cases("plain", 4), table4.make_cases("full", 4)
    assert plain == geneval_cases(4)
    for first, second in zip(plain, full, strict=True):
        assert (first.task, first.scene, first.said) == (second.task, second.scene, second.said)
        for thing in second.scene.things:
            for word in (thing.shape, thing.color, thing.size):
                assert word in second.prompt
        assert f"on a {second.scene.background} background" in second.prompt
    assert sum(case.scene.background in case.prompt for case in plain) < len(plain) / 2


def test_gains_by_hand():
    """Two seeds, two tasks: .2 -> .5 and .4 -> .4. Two successes and failures join 100 prompts."""
    scores = [of_seed(rates(0.2), rates(0.5)), of_seed(rates(0.4), rates(0.4))]
    short, mix, by_seed, reach = table4.gains(
        scores, "plain", partial(table4.share_of, tasks=("position", "counting")))
    assert (short, mix) == pytest.approx((0.3, 0.45))
    assert by_seed == pytest.approx([0.3, 0])
    likely = [22 / 104, 52 / 104, 42 / 104, 42 / 104]
    variance = 0.0
    for p in likely:
        variance += 2 * p * (1 - p) / 104 / 2**2                      # two tasks, their mean
    assert reach == pytest.approx(1.96 * math.sqrt(variance) / 2)
    short, mix, by_seed, reach = table4.gains(scores, "full", table4.clip_of)
    assert (short, mix, *by_seed) == pytest.approx((0.15, 0.225, 0.15, 0))
    assert reach == pytest.approx(1.96 * math.sqrt(4 * 0.003**2) / 2)


@pytest.mark.parametrize("pairs, verdict", [
    ([(0.2, 0.5), (0.2, 0.4)], "held"),
    ([(0.5, 0.2), (0.4, 0.2)], "did not hold at this size"),
    ([(0.2, 0.8), (0.4, 0.39)], "cannot be told"),                    # The seeds do not agree.
    ([(0.2, 0.21), (0.4, 0.41)], "cannot be told"),                   # The interval contains 0.
])
def test_all_seeds_and_the_interval_must_agree(pairs, verdict):
    scores = []
    for short, mix in pairs:
        scores.append(of_seed(rates(short), rates(mix)))
    row = table4.judge("claim", "paper", table4.gains(scores, "plain"))
    assert row["verdict"] == verdict


def test_each_claim_reads_its_own_tasks_and_wording():
    low, high = rates(0.0), rates(0.0)
    better = {"plain": rates(0.0, position=1.0, background=0.5), "full": rates(0.0, counting=1.0)}
    better["full"]["clip_score"] = 0.25
    better["plain"]["clip_score"] = 0.3
    scores = [{"short": {"plain": low, "full": high}, "mix": better}]
    overall, pair, unsaid, detailed, plain_fit, fit = table4.claims(scores)
    assert overall["here"] == "0.000 -> 0.167"
    assert pair["here"] == "0.000 -> 0.500"
    assert unsaid["here"] == "0.000 -> 0.250"
    assert detailed["here"] == "0.000 -> 0.167"
    assert plain_fit["here"] == "0.000 -> 0.300" and fit["here"] == "0.000 -> 0.250"


def test_helping_all_tasks_is_not_helping_two_of_them_most():
    """Position and colour attribution gain .25, the other four gain .7."""
    most = rates(0.9, **{"position": 0.45, "color attribution": 0.45})
    scores = [{"short": dict.fromkeys(("plain", "full"), rates(0.2)),
               "mix": dict.fromkeys(("plain", "full"), most)}]
    assert [row["verdict"] for row in table4.claims(scores)[:2]] == [
        "held", "did not hold at this size"]


def test_a_tiny_run_trains_on_the_mix_that_it_names(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    shares = []

    def watched(config, inputs, world, learn=table4.learn):
        shares.append((config.seed, config.full_captions))
        return learn(config, inputs, world)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table4, "learn", watched)
    monkeypatch.setitem(table4.SAMPLING, "num_steps", 1)
    out = tmp_path / "table4.json"
    table4.main(["--depth", "1", "--steps", "2", "--batch-size", "4", "--num-scenes", "64",
                 "--num-prompts", "1", "--out", str(out)])
    assert shares == [(0, 0.0), (0, 0.5), (1, 0.0), (1, 0.5)]
    record = json.loads(out.read_text())
    assert len(record["seeds"]) == 2 and len(record["claims"]) == 6
    assert record["images_seen"] == 8
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert "43.27" in capsys.readouterr().out
