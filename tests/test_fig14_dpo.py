"""experiments/fig14_dpo.py: LoRA and the loss of Diffusion-DPO by closed forms, pairs by hand."""

import copy
import importlib.util
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

from devices import World
from geneval import Case
from mmdit import MMDiT, MMDiTConfig

FILE = Path(__file__).parent.parent / "experiments" / "fig14_dpo.py"
spec = importlib.util.spec_from_file_location("fig14", FILE)
fig14 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fig14)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def small_mmdit():
    sizes = MMDiTConfig(depth=1, latent_channels=2, context_dim=8, pooled_dim=8,
                        pos_embed_max_size=4)
    model = MMDiT(sizes)
    for number, parameter in enumerate(model.parameters()):
        nn.init.normal_(parameter, std=0.1, generator=rng(number))            # adaLN is not zero
    return model


def inputs():
    return (torch.randn(3, 2, 4, 4, generator=rng(1)), torch.tensor([0.1, 0.5, 0.9]),
            torch.randn(3, 5, 8, generator=rng(2)), torch.randn(3, 8, generator=rng(3)))


# --- Low-rank matrices ----------------------------------------------------------------------------

def test_lora_adapts_every_linear_layer_and_changes_nothing_at_first():
    model = small_mmdit()
    before = model(*inputs())
    linear = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert linear == 2 + 2 + 1 + 5 + 2 + 2        # time, pooled, context, two columns, the end
    fig14.add_lora(model, rank=4, seed=0)
    torch.testing.assert_close(model(*inputs()), before, rtol=0, atol=0)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(learning) == 2 * linear
    assert {name.rsplit(".", 1)[1] for name in learning} == {"up", "down"}


def test_lora_adds_the_product_of_its_matrices_to_the_weight():
    layer = nn.Linear(6, 5)
    plain = layer.weight.detach().clone()
    model = nn.Sequential(layer)
    fig14.add_lora(model, rank=2, seed=0)
    update = layer.parametrizations.weight[0]
    assert update.down.shape == (2, 6) and update.up.shape == (5, 2)
    nn.init.normal_(update.up, generator=rng(0))
    x = torch.randn(4, 6, generator=rng(1))
    expected = x @ (plain + update.up @ update.down).T + layer.bias
    torch.testing.assert_close(model(x), expected)
    assert torch.linalg.matrix_rank(layer.weight - plain) == 2


def test_merged_lora_is_a_plain_model_that_draws_the_same():
    model = small_mmdit()
    fig14.add_lora(model, rank=4, seed=0)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if name.endswith(".up"):
            nn.init.normal_(parameter, std=0.1, generator=rng(number))
    expected = model(*inputs())
    fig14.merge_lora(model)
    plain = small_mmdit()
    assert set(dict(model.named_parameters())) == set(dict(plain.named_parameters()))
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(*inputs()), expected)


# --- The loss -------------------------------------------------------------------------------------

class Constant(nn.Module):
    """A model whose velocity is one number everywhere."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, z, t, context, pooled):
        return self.value.expand_as(z)


def batch(better=0.0, worse=0.0):
    """Latents of one number each, no noise: the target velocity is minus the latent."""
    shape = (2, 1, 2, 2)
    return fig14.Pairs(torch.full(shape, better), torch.full(shape, worse), None, None,
                       torch.tensor([0.2, 0.7]), torch.zeros(shape))


def test_dpo_loss_of_the_reference_itself_is_log_2():
    model = Constant(0.3)
    loss = fig14.dpo_loss(model, batch(1.0, -1.0), copy.deepcopy(model), beta=1000.0)
    torch.testing.assert_close(loss, torch.full((2,), math.log(2)))


def test_dpo_loss_is_the_closed_form_of_wallace_et_al():
    """Velocity 0 before and -1 now; targets -1 (better) and 2 (worse). Squared errors: better
    1 -> 0, worse 4 -> 9. So the gain is (1 - 0) - (4 - 9) = 6."""
    loss = fig14.dpo_loss(Constant(-1.0), batch(1.0, -2.0), Constant(0.0), beta=0.5)
    expected = math.log(1 + math.exp(-0.5 * 6))
    torch.testing.assert_close(loss, torch.full((2,), expected))


def test_dpo_moves_towards_the_better_picture_and_leaves_the_reference_alone():
    model, reference = Constant(0.0), Constant(0.0)
    fig14.dpo_loss(model, batch(1.0, -1.0), reference, beta=1.0).mean().backward()
    assert model.value.grad > 0                              # a step makes the velocity negative
    assert reference.value.grad is None
    model.value.grad = None
    fig14.dpo_loss(model, batch(1.0, 1.0), reference, beta=1.0).mean().backward()
    assert model.value.grad == 0                             # equal pictures teach nothing


def test_the_control_learns_from_the_better_picture_alone():
    loss = fig14.better_loss(Constant(0.5), batch(1.0, 77.0))
    torch.testing.assert_close(loss, torch.full((2,), 1.5**2))                # target -1


# --- Preferences and votes ------------------------------------------------------------------------

def test_pairs_are_of_one_prompt_and_every_picture_is_used_once():
    passed = np.array([[True, True, False, False],
                       [False, True, False, True],
                       [True, True, False, False],
                       [False, True, False, True]])                           # (pictures, prompts)
    assert fig14.pair_up(passed) == [(0, 0, 1), (0, 2, 3), (3, 1, 0), (3, 3, 2)]
    assert fig14.pair_up(passed[:1]) == []


def test_votes_count_ties_as_a_half():
    ours, theirs = np.array([True, False, True, False]), np.array([False, True, True, False])
    assert fig14.votes(ours, theirs).tolist() == [1, 0, 0.5, 0.5]
    assert fig14.votes(np.array([0.31]), np.array([0.3])).tolist() == [1]


@pytest.mark.parametrize("values, middle, verdict", [
    ([1, 1, 1, 0.5] * 20, 0.5, "held"),
    ([0, 0, 0, 0.5] * 20, 0.5, "did not hold at this size"),
    ([1, 0, 0.5, 0.5] * 20, 0.5, "cannot be told"),
    ([1] * 19 + [0.5] * 9, 0.5, "cannot be told"),           # 19 votes
    ([1] * 20 + [0.5] * 9, 0.5, "held"),
    ([0.6, 0.5, 0.5, 0.5] * 20, 0.5, "held"),
    ([1, 0, 0, 0, 1, 1] * 10, 0.4, "cannot be told"),
    ([0.5] * 20, 0.5, "cannot be told"),
])
def test_a_claim_needs_its_whole_interval_above_the_middle(values, middle, verdict):
    row = fig14.judge("claim", "paper", "{:.2f}", np.array(values), middle)
    assert row["verdict"] == verdict


def test_an_interval_is_1_96_standard_errors_to_either_side():
    """Three ones and a half, twenty times: mean 7/8, variance 3/64 * 80/79."""
    middle, (low, high) = fig14.mean_interval(np.array([1, 1, 1, 0.5] * 20))
    reach = 1.96 * math.sqrt(3 / 64 * 80 / 79 / 80)
    assert (middle, low, high) == pytest.approx((0.875, 0.875 - reach, 0.875 + reach))


def test_each_claim_reads_its_own_prompts_models_and_guidance():
    """Twenty prompts of counting, of which ten made a pair, and forty of words. DPO wins all words.
    The control loses 5 of counting. With their own guidance DPO wins 20 of counting."""
    cases = [Case("counting", f"c{number % 2}", None, ()) for number in range(20)]
    cases += [Case("word", "w", None, ()) for _ in range(40)]
    word = np.arange(60) >= 20
    none, flat = np.zeros(60, bool), np.zeros(60)
    half = np.arange(60) < 10
    judged = {"base": {"strict score": half, "CLIP score": flat},
              "DPO": {"strict score": half | word, "CLIP score": flat},
              "better ones only": {"strict score": np.arange(60) < 5, "CLIP score": flat}}
    own = {"base": {"strict score": none}, "DPO": {"strict score": ~word}}
    rows = fig14.claims(cases, judged, own, {"c0", "w"})
    assert [row["here"] for row in rows] == [
        "0.833", "0.500", "+0.000", "+0.000", "+1.000", "+0.250"]
    assert rows[2]["claim"].endswith("for 10 prompts that made no pair")
    verdicts = [row["verdict"] for row in rows]
    assert verdicts == ["held", *3 * ["cannot be told"], "held", "cannot be told"]
    assert len(fig14.claims(cases, judged, {}, set())) == 5


def test_the_better_latents_are_those_of_pictures_that_pass(monkeypatch):
    """Every second picture is white and passes; the others are black."""
    turns = []

    def draw(pipeline, prompts, seed, together, **settings):
        turns.append(seed)
        white = len(turns) % 2
        return [Image.new("RGB", (64, 64), "white" if white else "black") for _ in prompts]

    def white_passes(cases, pictures):
        return np.array([picture.getpixel((0, 0))[0] == 255 for picture in pictures])
    monkeypatch.setattr(fig14, "generate", draw)
    monkeypatch.setattr(fig14, "passes", white_passes)
    pipeline = fig14.load(fig14.SHIPPED, device="cpu", networks=("vae", "text"))
    (better, worse, context, pooled), prompts = fig14.make_pairs(
        pipeline, fig14.Options(num_prompts=1, pictures=2))
    with torch.no_grad():
        white = pipeline.vae.decode(better.to(next(pipeline.vae.parameters())))
        black = pipeline.vae.decode(worse.to(next(pipeline.vae.parameters())))
    assert white.float().mean() > 0.9 and black.float().mean() < -0.9
    assert len(better) == len(worse) == len(context) == len(pooled) == 9 and 1 < len(prompts) <= 9
    assert turns[1] - turns[0] >= 9                                   # No noise comes twice.


def test_a_step_gets_rows_that_belong_together_and_the_options_reach_the_loop(monkeypatch):
    """Row i has the latents i and 10 i, the context 100 i and the pooled vector 1000 i."""
    batches = []

    def watched(model, loss, make, config, run):
        assert (config.steps, config.batch_size, config.lr, config.seed) == (3, 64, 0.5, 7)
        assert config.optimizer == "adamw"
        batches.extend(make(step) for step in (0, 1, 0))
        return model
    monkeypatch.setattr(fig14, "fit", watched)
    numbers = torch.arange(5.0)
    latent = numbers.view(-1, 1, 1, 1).expand(-1, 2, 4, 4)
    pairs = latent, 10 * latent, 100 * numbers.view(-1, 1, 1), 1000 * numbers.view(-1, 1)
    options = fig14.Options(steps=3, batch_size=64, lr=0.5, seed=7, rank=2)
    base = small_mmdit()
    model = fig14.learn(base, fig14.better_loss, pairs, options, World("cpu"))
    assert model is not base and not any(p.requires_grad for p in model.parameters())
    first, other, again = batches
    chosen = first.better[:, 0, 0, 0]
    assert set(chosen.tolist()) == {0, 1, 2, 3, 4}
    torch.testing.assert_close(first.worse[:, 0, 0, 0], 10 * chosen)
    torch.testing.assert_close(first.context[:, 0, 0], 100 * chosen)
    torch.testing.assert_close(first.pooled[:, 0], 1000 * chosen)
    assert torch.equal(first.noise, again.noise) and not torch.equal(first.noise, other.noise)
    t = torch.cat([first.t, other.t])                         # Eq. 19: logit(t) has deviation 1
    assert torch.logit(t).std() == pytest.approx(1, abs=0.25)


def test_a_rank_above_the_width_is_refused():
    with pytest.raises(ValueError, match="--rank 257 is above the width 256"):
        fig14.main(["--rank", "257"])


# --- The whole ------------------------------------------------------------------------------------

def test_a_tiny_run_pairs_trains_and_votes(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    turns = iter(range(100))

    def every_second(cases, pictures):                                        # as if one in two
        turn = next(turns)
        return (np.arange(len(cases)) + turn) % 2 == 0
    monkeypatch.setattr(fig14, "passes", every_second)
    plain = fig14.generate
    monkeypatch.setattr(fig14, "generate", lambda *given, **settings: plain(
        *given, num_steps=1, **settings))
    out = tmp_path / "fig14.json"
    fig14.main(["--num-prompts", "1", "--pictures", "2", "--steps", "2", "--batch-size", "2",
                "--num-votes", "2", "--rank", "2", "--device", "cpu", "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["pairs"] == 9 and len(record["claims"]) == 6
    assert list(record["scores"]) == list(fig14.NAMES)
    assert list(record["scores"]["DPO"]) == ["guidance 1", "guidance 3"]
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_pictures_that_all_pass_make_no_pair(monkeypatch):
    def all_pass(cases, pictures):
        return np.ones(len(cases), bool)
    monkeypatch.setattr(fig14, "generate", lambda *given, **settings: [])
    monkeypatch.setattr(fig14, "passes", all_pass)
    pipeline = SimpleNamespace(defaults={"height": 64, "width": 64})
    with pytest.raises(ValueError, match="no prompt has both a picture"):
        fig14.make_pairs(pipeline, fig14.Options(num_prompts=1))
