"""fig4_backbones.py: what the five backbones share, what tells them apart, and their costs."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from mmdit import MMDiT, MMDiTConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
import fig4_backbones as fig4
from fig4_backbones import NAMES, ThreeSetMMDiT, UViT, make_backbone, measure

SMALL = MMDiTConfig(depth=2, latent_channels=4, context_dim=24, pooled_dim=12,
                    pos_embed_max_size=8, position_step=0.5)
CLIP_TOKENS, L = 3, 5
each_backbone = pytest.mark.parametrize("name", NAMES)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def randomize(model, seed=0):
    """Gives every parameter a random value, those too that start at zero."""
    generator = rng(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            spread = 0.3 if "bias" in name else 1 / math.sqrt(parameter[0].numel())
            mean = 1.0 if ".ln_" in name else 0.0
            parameter.normal_(mean, spread, generator=generator)
    return model.eval().requires_grad_(False)


def random_backbone(name):
    return randomize(make_backbone(name, SMALL, CLIP_TOKENS))


def random_input(B=2, H=6, W=10, seed=1):
    """latent, t, context, pooled"""
    generator = rng(seed)
    latent = torch.randn(B, 4, H, W, generator=generator)
    t = torch.rand(B, generator=generator)
    context = torch.randn(B, L, 24, generator=generator)
    return latent, t, context, torch.randn(B, 12, generator=generator)


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def far(a, b):
    return (a - b).abs().max() > 1e-3


# ---- What all share ------------------------------------------------------------------------------

@each_backbone
def test_a_fresh_backbone_predicts_zero_for_a_picture_that_is_not_square(name):
    inputs = random_input()
    velocity = make_backbone(name, SMALL, CLIP_TOKENS)(*inputs)
    assert velocity.shape == inputs[0].shape and (velocity == 0).all()


@each_backbone
@pytest.mark.parametrize("changed", range(4), ids=["latent", "t", "context", "pooled"])
def test_the_velocity_depends_on_every_input(name, changed):
    model, inputs, other = random_backbone(name), list(random_input()), random_input(seed=9)
    before = model(*inputs)
    inputs[changed] = other[changed]
    assert far(model(*inputs), before)


@each_backbone
def test_every_text_token_and_every_pixel_matter_everywhere(name):
    """No token is cut off: each changes the velocity in every corner of the picture."""
    model, (latent, t, context, pooled) = random_backbone(name), random_input(B=1)
    before = model(latent, t, context, pooled)
    changes = []
    for token in range(L):
        other = context.clone()
        other[:, token] = -other[:, token]
        changes.append(model(latent, t, other, pooled) - before)
    other = latent.clone()
    other[..., 5, 9] += 3
    changes.append(model(other, t, context, pooled) - before)
    for change in changes:
        assert (change.abs().amax(dim=(0, 1)) > 1e-5).all()


@each_backbone
def test_a_gradient_reaches_every_parameter_that_can_matter(name):
    """The last text queries of MM-DiT are not asked (see test_mmdit.py); all else is."""
    model = random_backbone(name).requires_grad_(True)
    model(*random_input()).square().sum().backward()
    without = []
    for key, parameter in model.named_parameters():
        if parameter.grad is None or parameter.grad.abs().max() < 1e-7:
            without.append(key)
    last = "joint_blocks.1.context_block.attn.ln_q.weight"
    expected = {"MM-DiT": {last}, "MM-DiT, 3 sets": {last, last.replace("context", "t5")}}
    assert set(without) == expected.get(name, set())


@each_backbone
def test_a_backbone_without_memory_is_initialised_as_one_with(name):
    """So a large one can be made in shards: assign gets a value for every parameter and buffer."""
    with torch.device("meta"):
        model = make_backbone(name, SMALL, CLIP_TOKENS)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    model.initialize(rng(3))
    whole = make_backbone(name, SMALL, CLIP_TOKENS)
    whole.initialize(rng(3))
    for key, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


# ---- What tells them apart -----------------------------------------------------------------------

def test_dit_is_mmdit_with_one_shared_set_of_weights():
    """Sec. 5.2.3: "a special case of MM-DiT with one shared set of weights for all modalities"."""
    one, two = random_backbone("DiT"), randomize(MMDiT(SMALL), seed=5)
    weights = {}
    for key in two.state_dict():
        shared = key.replace("context_block", "column").replace("x_block", "column")
        weights[key] = one.state_dict()[shared]
        if weights[key].shape != two.state_dict()[key].shape:     # the last text: shift and scale
            weights[key] = weights[key][: 2 * 128]
    two.load_state_dict(weights, strict=True)
    inputs = random_input()
    close(two(*inputs), one(*inputs))


def test_crossdit_leaves_the_text_as_it_is_and_starts_without_it():
    """The output of cross-attention starts at 0 and nothing else reads the text."""
    model = make_backbone("CrossDiT", SMALL)
    context, x = torch.randn(1, L, 128, generator=rng(0)), torch.randn(1, 6, 128, generator=rng(1))
    new_context, new_x = model.joint_blocks[0](context, x, torch.ones(1, 128))
    assert torch.equal(new_context, context) and torch.equal(new_x, x)
    block = randomize(model).joint_blocks[0]
    assert far(block(-context, x, torch.ones(1, 128))[1], block(context, x, torch.ones(1, 128))[1])


def test_cross_attention_by_hand():
    """One head, without QK-norm: softmax(q k^T / 8) v over the text tokens."""
    cross = randomize(fig4.CrossAttention(MMDiTConfig(depth=1, qk_norm=False)))
    context, x = torch.randn(1, L, 64, generator=rng(0)), torch.randn(1, 6, 64, generator=rng(1))
    k, v = cross.kv(context)[0].split(64, dim=-1)
    weights = torch.softmax(cross.q(x)[0] @ k.T / 8, dim=-1)      # (6, L)
    close(cross(context, x)[0], cross.proj(weights @ v))


def test_uvit_has_convolutions_at_full_size_and_as_many_tokens_as_mmdit():
    """A pixel reaches its neighbours without any transformer block; the skip goes around them."""
    model, sizes = random_backbone("UViT"), []
    hook = model.joint_blocks[0].register_forward_hook
    handle = hook(lambda block, inputs, output: sizes.append(inputs[1].shape))
    latent, t, context, pooled = random_input(B=1, H=12, W=16)
    model(latent, t, context, pooled)
    handle.remove()
    assert sizes == [(1, 6 * 8, 128)]
    model.up.weight.zero_()                                       # nothing comes from the tokens
    before = model(latent, t, context, pooled)
    latent[..., 0, 0] += 1
    change = (model(latent, t, context, pooled) - before)[0].abs().amax(0)
    assert change[0, 0] > 1e-3 and change[1, 2] > 1e-5
    assert isinstance(model, UViT) and len(model.down_blocks) == len(model.up_blocks) == 2


def test_uvit_skips_join_blocks_of_the_same_depth_and_start_as_the_identity():
    """As in any U-Net, the last block on the way down is joined to the first on the way up."""
    fresh, image = make_backbone("UViT", SMALL), torch.randn(1, 32, 4, 4, generator=rng(0))
    assert torch.equal(fresh.down_blocks[0](image, torch.ones(1, 128)), image)
    model, made, joined = random_backbone("UViT"), [], []
    for block in model.down_blocks:
        block.register_forward_hook(lambda block, inputs, output: made.append(output))
    for block in model.up_blocks:
        block.register_forward_hook(lambda block, inputs, output: joined.append(inputs[0][:, 32:]))
    model(*random_input())
    assert torch.equal(joined[0], made[1]) and torch.equal(joined[1], made[0])


def test_three_sets_with_equal_text_weights_are_the_two_set_model():
    two, three = randomize(MMDiT(SMALL)), ThreeSetMMDiT(SMALL, CLIP_TOKENS)
    weights = {}
    for key in three.state_dict():
        weights[key] = two.state_dict()[key.replace("t5_block", "context_block")]
    three.load_state_dict(weights, strict=True)
    inputs = random_input()
    close(three(*inputs), two(*inputs))


def test_the_third_set_begins_with_the_first_token_after_clip():
    """Where T5's column adds nothing, the text that comes out of a block changes for CLIP only."""
    model = randomize(ThreeSetMMDiT(SMALL, CLIP_TOKENS))
    block = model.joint_blocks[0]
    modulation = block.t5_block.adaLN_modulation[1]
    modulation.weight.zero_()
    modulation.bias.zero_()                                       # Its gates are 0.
    context = torch.randn(1, L, 128, generator=rng(0))
    text, _ = block(context, torch.randn(1, 6, 128, generator=rng(1)), torch.ones(1, 128))
    changed = ((text - context).abs().amax(dim=-1) > 1e-4)[0].tolist()
    assert changed == [True] * CLIP_TOKENS + [False] * (L - CLIP_TOKENS)


# ---- Costs ---------------------------------------------------------------------------------------

def test_parameters_of_a_block_by_hand():
    """In units of D^2, without biases: adaLN 6, attention 4, MLP 8 a column; cross-attention 4."""
    D = SMALL.hidden_size
    units = {"DiT": 18, "CrossDiT": 22, "UViT": 22, "MM-DiT": 36, "MM-DiT, 3 sets": 54}
    for name, expected in units.items():
        block = make_backbone(name, SMALL).joint_blocks[0]
        weights = sum(p.numel() for p in block.parameters() if p.dim() == 2)
        assert weights == expected * D**2, name


def cost(name, side):
    context, pooled = torch.zeros(1, L, 24), torch.zeros(1, 12)
    latent = torch.zeros(1, 4, side, side)
    return measure(make_backbone(name, SMALL, CLIP_TOKENS), latent, context, pooled)


@each_backbone
def test_four_times_the_pixels_cost_less_than_four_times_and_more_than_twice(name):
    """The text and the modulation cost the same; attention is a small part at these sizes."""
    parameters, flops = cost(name, 8)
    assert cost(name, 16)[0] == parameters and 2 * flops < cost(name, 16)[1] < 4 * flops


def test_flops_of_dit_by_hand():
    """12 D^2 weights a token and 4 D a pair of tokens in a block; 2 FLOPs a multiply and add."""
    D, N, depth = 128, 16, 2
    tokens, modulation = L + N, 6 * depth * D + 2 * D
    blocks = 2 * depth * (12 * D**2 * tokens + 2 * D * tokens**2)
    ends = 2 * (L * 24 * D + 2 * N * 16 * D + D * modulation + D * (256 + 12 + 2 * D))
    assert cost("DiT", 8)[1] == blocks + ends


# ---- The experiment ------------------------------------------------------------------------------

def curves(losses):
    """{name: a curve of two points for each seed}; CLIP score is 1 - loss. losses: {name: [...]}"""
    found = {}
    for name in losses:
        found[name] = []
        for loss in losses[name]:
            last = {"validation": loss, "clip_score": 1 - loss, "fid": loss}
            found[name].append([{"validation": 0.9, "clip_score": 0, "fid": 1}, last])
    return found


@pytest.mark.parametrize("better, worse, verdict, interval", [
    ([0.5, 0.6], [0.6, 0.63], "held", [0.03, 0.1]),
    ([0.6, 0.63], [0.5, 0.6], "did not hold at this size", [-0.1, -0.03]),
    ([0.5, 0.7], [0.6, 0.6], "cannot be told", [-0.1, 0.1]),
    ([0.5], [0.6], "cannot be told", [0.1, 0.1])])
@pytest.mark.parametrize("measure", ["validation", "clip_score", "fid"])
def test_a_backbone_is_better_if_it_is_with_every_seed(better, worse, verdict, interval, measure):
    """A low loss and FID are good, and a high CLIP score."""
    row = fig4.judge(curves({"UViT": better, "DiT": worse}), "UViT", "DiT", measure, -1)
    assert row["verdict"] == verdict and row["interval"] == pytest.approx(interval)


def test_main_compares_all_backbones(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    fig4.main("--depth 1 --steps 4 --seeds 1 --batch-size 4 --num-scenes 64 --num-pictures 2 "
              "--out found.json".split())
    found = json.loads(Path("found.json").read_text())
    assert tuple(found["curves"]) == tuple(found["parameters_and_flops"]) == NAMES
    assert [point["step"] for point in found["curves"]["UViT"][0]] == [1, 2, 3, 4]
    assert [row["verdict"] for row in found["claims"]] == ["cannot be told"] * len(fig4.CLAIMS)
    assert found["settings"]["encoders"] == "pretrained/tiny/model.safetensors"
    assert Path("found.png").stat().st_size > 10000
    assert [line[:15].strip() for line in capsys.readouterr().out.splitlines()[:5]] == list(NAMES)
