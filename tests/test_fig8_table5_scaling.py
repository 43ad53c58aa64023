"""experiments/fig8_table5_scaling.py: laws and intervals by closed forms, verdicts, one run."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from mmdit import MMDiT, MMDiTConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import fig8_table5_scaling as fig8

SIZES = torch.tensor([1e5, 4e5, 2e6, 1e7], dtype=torch.float64)


def test_a_power_law_is_found_again():
    factor, exponent, r_squared = fig8.power_law(SIZES, 3 * SIZES**-0.2)
    assert factor == pytest.approx(3) and exponent == pytest.approx(0.2)
    assert r_squared == pytest.approx(1)


def test_r_squared_is_that_of_the_loss_by_hand():
    """Losses 4, 1, 4 at 1, 10, 100: the best slope of the logarithm is 0, at 4^(2/3)."""
    factor, exponent, r_squared = fig8.power_law(
        torch.tensor([1.0, 10, 100], dtype=torch.float64),
        torch.tensor([4.0, 1, 4], dtype=torch.float64))
    level = 4 ** (2 / 3)
    assert factor == pytest.approx(level) and exponent == pytest.approx(0, abs=1e-12)
    error = 2 * (4 - level) ** 2 + (1 - level) ** 2
    assert r_squared == pytest.approx(1 - error / 6)      # squares about the mean 3: 1 + 4 + 1


def test_a_floor_is_found_again_and_a_plain_law_does_not_need_one():
    loss = 0.5 + 40 * SIZES**-0.4
    floor, factor, exponent, r_squared = fig8.floored_power_law(SIZES, loss)
    assert floor == pytest.approx(0.5, abs=1e-3) and exponent == pytest.approx(0.4, abs=0.01)
    assert r_squared > 0.9999 > fig8.power_law(SIZES, loss)[-1]
    assert fig8.floored_power_law(SIZES, 3 * SIZES**-0.2)[0] < 0.01


def test_fishers_interval_of_a_correlation_of_one_half():
    """r = .5, n = 28: atanh(.5) -+ 1.96 / 5, that is .156 to .736."""
    rng = torch.Generator().manual_seed(0)
    basis = torch.randn(28, 2, generator=rng, dtype=torch.float64)
    x, other = torch.linalg.qr(basis - basis.mean(dim=0))[0].T             # centred, orthogonal
    r, low, high = fig8.correlation(5 - 2 * x, -x / 2 - math.sqrt(0.75) * other)
    assert r == pytest.approx(0.5)
    assert low == pytest.approx(0.1559, abs=1e-3) and high == pytest.approx(0.7359, abs=1e-3)


@pytest.mark.parametrize("first, second, n, expected", [
    (9, 3, 10, (0.1705, 0.8090)), (6, 2, 7, (0.0582, 0.8062)), (0, 0, 10, (-0.2775, 0.2775))])
def test_intervals_of_a_difference_are_those_that_newcombe_printed(first, second, n, expected):
    """Statistics in Medicine 17 (1998), Table II, method 10."""
    value, low, high = fig8.difference(first / n, second / n, n)
    assert value == pytest.approx((first - second) / n)
    assert (low, high) == pytest.approx(expected, abs=1e-3)


def test_training_flops_by_hand():
    """2 FLOPs for each of 12 D^2 weights a token, 4 D a pair. The last text has only q, k and v."""
    D, L, N, depth = 128, 5, 16, 2
    config = MMDiTConfig(depth, latent_channels=4, context_dim=24, pooled_dim=12)

    class Unseen:
        def validation(self, count):
            yield torch.zeros(1, 4, 8, 8), torch.zeros(1, L, 24), torch.zeros(1, 12), None

    weights = 2 * 12 * D**2 * (depth * (L + N)) - 2 * 9 * D**2 * L
    pairs = 4 * D * (depth * (L + N) ** 2 - L * (L + N))
    modulation = 2 * D * D * (12 * (depth - 1) + 6 + 2 + 2)
    ends = 2 * (24 * L * D + 16 * N * D * 2) + 2 * D * (256 + D + 12 + D)
    assert fig8.training_flops(MMDiT(config), Unseen()) == 3 * (weights + pairs + modulation + ends)


def made_up(losses, scores):
    """Sizes with one seed and one measurement for each loss. Their CLIP score is 1 - loss."""
    models = {}
    for i in range(len(losses)):
        curve = []
        for step, loss in enumerate(losses[i]):
            curve.append({"step": step + 1, "validation": loss, "lax": scores[i],
                          "strict": scores[i], "clip_score": 1 - loss, "geneval": {"n": 20}})
        models[i + 1] = {"parameters": 10.0**i, "flops_per_step": 1, "curves": [curve]}
    return models


def verdicts(rows):
    return [row["verdict"] for row in rows]


def test_the_verdict_on_the_losses_needs_every_comparison():
    failed = "did not hold at this size"
    steps = torch.tensor([0.2, 0.1, 0.0])
    rows = [(0.4 + 2.0**-size + steps).tolist() for size in range(4)]
    falling = made_up(rows, [0.1] * 4)
    assert verdicts(fig8.claims_of_losses(falling, fig8.laws_of_size(falling))) == ["held"] * 3
    rows[2][1] = 1.0                                      # above its neighbours on three sides
    rising = made_up(rows, [0.1] * 4)
    found = fig8.claims_of_losses(rising, fig8.laws_of_size(rising))
    assert verdicts(found) == [failed, failed, "held"]
    assert found[0]["here"].startswith("8 of 9") and found[1]["here"].startswith("7 of 8")
    few = made_up(rows[:3], [0.1] * 3)
    assert verdicts(fig8.claims_of_losses(few, fig8.laws_of_size(few)))[2] == "cannot be told"


def test_losses_without_order_follow_no_power_law():
    model = made_up([(0.7,), (0.9,), (0.6,), (0.8,)], [0.1] * 4)
    assert verdicts(fig8.claims_of_losses(model, fig8.laws_of_size(model)))[2].startswith("did not")


def test_the_verdict_on_the_quality_follows_the_intervals():
    """CLIP score is 1 - loss here; 120 pictures a size tell .1 from .3 and not .1 from .11."""
    losses = [(0.9, 0.8, 0.7), (0.8, 0.7, 0.6)]
    rows = fig8.claims_of_quality(made_up(losses, (0.1, 0.3)))
    assert verdicts(rows)[2:] == ["held", "held"]
    assert rows[2]["here"] == "6 checkpoints score from 0.100 to 0.400; r = -1.000"
    assert verdicts(fig8.claims_of_quality(made_up(losses, (0.1, 0.11))))[3] == "cannot be told"
    assert verdicts(fig8.claims_of_quality(made_up(losses, (0.4, 0.1))))[3].startswith("did not")


def test_a_correlation_cannot_be_told_where_scores_differ_by_chance():
    """One success in 120 pictures is none. With .1 and .5, the larger loss scores better."""
    losses = [(0.9, 0.8, 0.7, 0.6), (0.5, 0.4, 0.3, 0.2)]
    rows = fig8.claims_of_quality(made_up(losses, (1 / 120, 0)))
    assert verdicts(rows)[:2] == ["cannot be told"] * 2 and rows[0]["interval"] is None
    assert verdicts(fig8.claims_of_quality(made_up(losses, (0.5, 0.1))))[0].startswith("did not")
    losses = [(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)] * 4           # r = 0
    rows = fig8.claims_of_quality(made_up(losses, (0.2, 0.4, 0.1, 0.2)))      # .4 and .1 are luck.
    assert verdicts(rows)[:2] == ["cannot be told"] * 2


def test_main_trains_measures_and_leaves_models_that_can_be_loaded(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    import sample
    monkeypatch.chdir(tmp_path)
    options = "--depths 1 2 --steps 4 --points 2 --seeds 1 --batch-size 4 --num-scenes 64"
    fig8.main(f"{options} --num-prompts 1 --out found.json".split())
    found = json.loads(Path("found.json").read_text())
    assert Path("found.png").stat().st_size > 10000
    assert [entry["step"] for entry in found["models"]["2"]["curves"][0]] == [2, 4]
    assert len(found["claims"]) == 7 and "/" not in found["settings"]["out"]
    assert found["settings"]["encoders"] == "pretrained/tiny/model.safetensors"
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert "paper, 38 0.68 0.98 0.84 0.66 0.74 0.40 0.43".split() in rows      # Table 5
    pipeline = sample.load("runs/fig8/d2-s0")
    assert pipeline.mmdit.config.depth == 2 and pipeline.defaults["guidance_scale"] == 4
