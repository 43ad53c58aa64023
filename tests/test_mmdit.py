"""mmdit.py: Fig. 2, position grids, the embedding of time, sizes, and the classic mistakes."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

import mmdit
from flow import rectified_flow_loss
from mmdit import (
    FinalLayer,
    HeadNorm,
    JointBlock,
    MMDiT,
    MMDiTConfig,
    StreamBlock,
    attend,
    count_parameters,
    crop_center,
    gelu,
    load_weights,
    model_sizes,
    modulate,
    paper_positions,
    sincos_2d,
    timestep_embedding,
    unpatchify,
)

SMALL = MMDiTConfig(depth=2, latent_channels=4, context_dim=24, pooled_dim=12,
                    pos_embed_max_size=8, position_step=0.5)
DUAL = replace(SMALL, dual_attention_layers=1)
GOLDEN = Path(__file__).parent / "golden" / "c_mmditx_dual" / "weights.safetensors"


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
    return model


def random_model(config=SMALL, seed=0):
    return randomize(MMDiT(config).eval().requires_grad_(False), seed)


def random_input(config=SMALL, B=2, H=6, W=10, L=5, seed=1):
    """latent, t, context, pooled"""
    generator = rng(seed)
    latent = torch.randn(B, config.latent_channels, H, W, generator=generator)
    t = torch.rand(B, generator=generator)
    context = torch.randn(B, L, config.context_dim, generator=generator)
    return latent, t, context, torch.randn(B, config.pooled_dim, generator=generator)


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def far(a, b):
    return (a - b).abs().max() > 1e-3


# ---- A fresh model -------------------------------------------------------------------------------

def test_fresh_model_predicts_zero_and_its_first_loss_is_about_two():
    """E |eps - x_0|^2 is 2 for data of unit variance."""
    model = MMDiT(SMALL)
    latent, t, context, pooled = random_input(B=8, H=16, W=16)
    assert (model(latent, t, context, pooled) == 0).all()
    noise = torch.randn(latent.shape, generator=rng(2))
    loss = rectified_flow_loss(model, latent, context, pooled, t, noise).mean()
    assert loss.item() == pytest.approx(2, rel=0.05)


def test_fresh_blocks_are_the_identity():
    model = MMDiT(DUAL)
    latent, t, context, pooled = random_input(DUAL)
    context, x = model.context_embedder(context), model.embed_image(latent)
    cond = model.embed_cond(t, pooled)
    new_context, new_x = model.joint_blocks[0](context, x, cond)
    assert torch.equal(new_context, context) and torch.equal(new_x, x)
    new_context, new_x = model.joint_blocks[1](context, x, cond)
    assert new_context is None and torch.equal(new_x, x)


def test_initialisation_follows_its_generator():
    a, b, c = MMDiT(SMALL), MMDiT(SMALL), MMDiT(SMALL)
    a.initialize(rng(1))
    b.initialize(rng(1))
    c.initialize(rng(2))
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name])
    assert far(a.joint_blocks[0].x_block.attn.qkv.weight, c.joint_blocks[0].x_block.attn.qkv.weight)


def test_initial_weights_have_the_spread_that_is_stated():
    """Xavier: uniform up to sqrt(6 / (inputs + outputs)). The embedders of t and pooled: .02."""
    model = MMDiT(replace(SMALL, depth=4))
    block, D = model.joint_blocks[0], 256
    for weight, inputs, outputs in ((block.x_block.attn.qkv.weight, D, 3 * D),
                                    (block.context_block.mlp.fc1.weight, D, 4 * D),
                                    (model.context_embedder.weight, 24, D),
                                    (model.x_embedder.proj.weight, 16, D)):
        bound = math.sqrt(6 / (inputs + outputs))
        assert 0.98 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    for embedder in (model.t_embedder, model.y_embedder):
        for layer in (embedder.mlp[0], embedder.mlp[2]):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert abs(layer.weight.mean().item()) < 0.002


def test_initialize_hands_every_weight_whole_to_assign():
    """On a model without memory, assign sees each parameter once with a CPU value of its shape."""
    with torch.device("meta"):
        model = MMDiT(DUAL)
    model.pos_embed = torch.empty(model.pos_embed.shape)
    seen = {}
    model.initialize(rng(3), lambda parameter, value: seen.update({id(parameter): value}))
    real = MMDiT(DUAL)
    real.initialize(rng(3))
    assert len(seen) == len(list(model.parameters()))
    for parameter, value in zip(model.parameters(), real.parameters(), strict=True):
        assert torch.equal(seen[id(parameter)], value)


def test_every_parameter_reaches_the_velocity_but_the_last_text_queries_norm():
    """Nothing reads what the last text queries would collect. Released files store their ln_q."""
    model = random_model(DUAL).requires_grad_(True)
    model(*random_input(DUAL)).square().sum().backward()
    without = []
    for name, parameter in model.named_parameters():
        if parameter.grad is None or parameter.grad.abs().max() < 1e-7:
            without.append(name)
    assert without == ["joint_blocks.1.context_block.attn.ln_q.weight"]


# ---- What the velocity depends on ----------------------------------------------------------------

@pytest.mark.parametrize("changed", range(4), ids=["latent", "t", "context", "pooled"])
def test_velocity_depends_on_every_input(changed):
    model, inputs, other = random_model(), list(random_input()), random_input(seed=9)
    before = model(*inputs)
    inputs[changed] = other[changed]
    assert far(model(*inputs), before)


def test_no_state_survives_between_calls():
    model, a, b = random_model(), random_input(seed=1), random_input(seed=2, H=8, W=4, L=3)
    stored = {name: x.clone() for name, x in model.state_dict().items()}
    first = model(*a)
    model(*b)
    assert torch.equal(first, model(*a))
    for name, x in model.state_dict().items():
        assert torch.equal(stored[name], x)


def test_each_sample_of_a_batch_gets_what_it_gets_alone():
    model, inputs = random_model(), random_input(B=3)
    together = model(*inputs)
    for i in range(3):
        alone = model(*[x[i : i + 1] for x in inputs])
        close(alone[0], together[i])


def test_the_order_of_text_tokens_does_not_matter():
    model, (latent, t, context, pooled) = random_model(), random_input(L=7)
    order = torch.randperm(7, generator=rng(3))
    close(model(latent, t, context[:, order], pooled), model(latent, t, context, pooled))


def test_the_place_of_image_tokens_matters():
    model, (latent, t, context, pooled) = random_model(), random_input()
    velocity = model(latent, t, context, pooled)
    moved = model(latent.roll(2, dims=3), t, context, pooled)                     # by one patch
    assert far(moved, velocity.roll(2, dims=3))


def test_skipped_blocks_are_left_out():
    model, inputs = random_model(replace(SMALL, depth=3)), random_input()
    skipped = model(*inputs, skip_layers=(1,))
    assert far(skipped, model(*inputs))
    del model.joint_blocks[1]
    assert torch.equal(model(*inputs), skipped)


# ---- Patches -------------------------------------------------------------------------------------

@pytest.mark.parametrize("p", [1, 2, 4])
def test_patchify_then_unpatchify_is_the_identity_on_a_non_square_latent(p):
    """An identity for `proj` makes a token its patch's numbers, (row, column, channel)."""
    C, H, W = 3, 8, 12
    config = replace(SMALL, latent_channels=C, patch_size=p, pos_embed_max_size=12)
    model = MMDiT(config).requires_grad_(False)
    weight = torch.zeros(config.hidden_size, C, p, p)
    for row in range(p):
        for column in range(p):
            for channel in range(C):
                weight[(row * p + column) * C + channel, channel, row, column] = 1
    model.x_embedder.proj.weight.copy_(weight)
    model.x_embedder.proj.bias.zero_()
    model.pos_embed.zero_()
    latent = torch.randn(2, C, H, W, generator=rng(0))
    tokens = model.embed_image(latent)
    assert tokens.shape == (2, H // p * W // p, config.hidden_size)
    close(unpatchify(tokens[..., : p * p * C], H // p, W // p, p), latent)


def test_without_attention_a_pixel_of_the_latent_only_moves_its_own_patch():
    """Fresh blocks are the identity: the velocity's patch (i, j) depends on patch (i, j) alone."""
    model = MMDiT(SMALL).requires_grad_(False)
    latent, t, context, pooled = random_input(B=1, H=6, W=10)
    model.final_layer.linear.weight.normal_(generator=rng(0))
    moved = latent.clone()
    moved[0, 0, 3, 7] += 1
    difference = model(moved, t, context, pooled) - model(latent, t, context, pooled)
    expected = torch.zeros(6, 10, dtype=torch.bool)
    expected[2:4, 6:8] = True
    assert torch.equal((difference != 0)[0].any(0), expected)


def test_odd_latent_is_refused_with_the_way_out():
    model, (_, t, context, pooled) = random_model(), random_input()
    for H, W in ((7, 10), (10, 7)):
        message = f"latent is {H}x{W} but patch_size=2 does not divide it.*multiples of 16 px"
        with pytest.raises(ValueError, match=message):
            model(torch.zeros(2, 4, H, W), t, context, pooled)


def test_latent_beyond_the_position_grid_is_refused_with_the_largest_size():
    model, (_, t, context, pooled) = random_model(), random_input()
    with pytest.raises(ValueError, match="9x5 tokens but the position grid has 8x8.*128x128 px"):
        model(torch.zeros(2, 4, 18, 10), t, context, pooled)
    assert model(torch.zeros(2, 4, 16, 16), t, context, pooled).shape == (2, 4, 16, 16)


# ---- Embeddings of time and place ----------------------------------------------------------------

def test_timestep_embedding_is_cosines_then_sines_of_1000_t():
    t = torch.tensor([0.0, 0.001, 0.4, 1.0])
    angle = 1000 * t.double()[:, None] * 10000.0 ** (-torch.arange(128).double() / 128)
    expected = torch.cat([angle.cos(), angle.sin()], dim=1)
    torch.testing.assert_close(timestep_embedding(t).double(), expected, rtol=0, atol=1e-4)


def test_time_is_embedded_in_fp32_also_under_autocast_and_in_a_bf16_model():
    """In bf16 the timestep 753.1 becomes 752: another embedding."""
    assert torch.tensor(753.1).bfloat16() == 752
    t, pooled = torch.tensor([0.7531]), torch.zeros(1, SMALL.pooled_dim)
    right, wrong = timestep_embedding(t), timestep_embedding(torch.tensor([0.752]))
    assert right.dtype == torch.float32 and far(right, wrong)
    model = random_model()
    plain = model.embed_cond(t, pooled)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.embed_cond(t, pooled), plain)
    half, seen = random_model().bfloat16(), []
    half.t_embedder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    half.embed_cond(t, pooled)
    assert torch.equal(seen[0], right.bfloat16())


def test_sincos_2d_is_column_then_row_and_sines_then_cosines():
    rows, columns = torch.tensor([0.0, 2.0]).double(), torch.tensor([1.0, 3.0, 5.0]).double()
    table = sincos_2d(rows, columns, 16).view(2, 3, 16)                           # row by row
    frequency = 10000.0 ** (-torch.arange(4).double() / 4)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            expected = torch.cat([(column * frequency).sin(), (column * frequency).cos(),
                                  (row * frequency).sin(), (row * frequency).cos()])
            torch.testing.assert_close(table[i, j], expected, rtol=1e-12, atol=1e-12)


def test_a_config_has_the_released_positions_unless_told():
    """SD3 medium: 192 positions over [0, 64), so a third of the paper's distance at 256 px."""
    expected = torch.arange(192).double() * 64 / 192
    torch.testing.assert_close(MMDiTConfig().positions, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("S, longest, spacing", [(256, 16, 1), (256, 32, 1), (512, 44, 1 / 2),
                                                 (1024, 100, 1 / 4)])
def test_paper_positions_of_a_square_picture_cover_what_256_px_cover(S, longest, spacing):
    """Sec. 5.3.2: 256 / S apart, and the S x S picture at the centre runs from 0 to 16."""
    positions, s = paper_positions(S, longest), S // 16
    assert len(positions) == longest
    assert positions.diff().tolist() == [spacing] * (longest - 1)
    middle = positions[(longest - s) // 2 :][:s]
    assert middle.tolist() == [spacing * i for i in range(s)]


def test_paper_positions_of_a_tall_picture_extend_beyond_both_ends():
    """A bucket with 48 rows at S = 512 has 16 more than s = 32: 8 beyond each end."""
    positions = paper_positions(512, 48)
    assert positions[0] == -8 * 0.5 and positions[-1] == (32 + 8 - 1) * 0.5


@pytest.mark.parametrize("S, longest", [(256, 24), (1024, 100)])
def test_a_model_takes_the_papers_grid_from_start_and_step(S, longest):
    """As train.py makes it. Every picture gets the middle of the grid, row by row."""
    start = paper_positions(S, longest)[0].item()
    config = replace(SMALL, pos_embed_max_size=longest, position_start=start, position_step=256 / S)
    model, s = MMDiT(config), S // 16
    square = torch.arange(s).double() * 256 / S                                   # 0 ... 16
    wide = torch.arange(s + 8).double() * 256 / S - 4 * 256 / S                   # 4 tokens beyond
    close(crop_center(model.pos_embed, s, s)[0], sincos_2d(square, square, 128).float(), 1e-6)
    close(crop_center(model.pos_embed, s, s + 8)[0], sincos_2d(square, wide, 128).float(), 1e-6)


def test_positions_are_cropped_from_the_centre_rounded_down():
    """The table is an 8 x 8 grid of its own indices; top = (8 - 3) // 2 and left = (8 - 5) // 2."""
    table = torch.arange(64.0).view(1, 64, 1)
    crop = crop_center(table, 3, 5).view(3, 5)
    assert crop[0].tolist() == [17, 18, 19, 20, 21]
    assert crop[:, 0].tolist() == [17, 25, 33]
    assert crop_center(table, 1, 8).flatten().tolist() == list(range(24, 32))
    assert torch.equal(crop_center(table, 8, 8), table)


def test_position_grid_is_a_buffer_that_is_added_to_the_tokens():
    model, latent = random_model(), random_input()[0]
    assert "pos_embed" in model.state_dict() and "pos_embed" not in dict(model.named_parameters())
    side = torch.arange(8).double() / 2
    close(model.pos_embed[0], sincos_2d(side, side, 128).float(), 1e-6)
    added = model.embed_image(latent) - model.x_embedder(latent).flatten(2).transpose(1, 2)
    close(added, crop_center(model.pos_embed, 3, 5).expand(2, -1, -1), 1e-5)


# ---- The block (Fig. 2b) -------------------------------------------------------------------------

SHIFT_ATTN, SCALE_ATTN, GATE_ATTN, SHIFT_MLP, SCALE_MLP, GATE_MLP = range(6)
SHIFT_ATTN2, SCALE_ATTN2, GATE_ATTN2 = 6, 7, 8


def block_with(bias: dict, config=SMALL):
    """A random block whose modulation is 0 but for `bias`: chunk of the image's adaLN -> value."""
    block = JointBlock(config, dual=config.dual_attention_layers > 0)
    randomize(block.requires_grad_(False))
    D = config.hidden_size
    for stream in (block.context_block, block.x_block):
        stream.adaLN_modulation[1].bias.zero_()
        stream.adaLN_modulation[1].weight.zero_()
    for chunk, value in bias.items():
        block.x_block.adaLN_modulation[1].bias[chunk * D : (chunk + 1) * D] = value
    return block


TEXT = torch.randn(1, 5, 128, generator=rng(4))
IMAGE = torch.randn(1, 15, 128, generator=rng(5))
COND = torch.ones(1, 128)


def image_after(bias, text=TEXT, config=SMALL):
    return block_with(bias, config)(text, IMAGE, COND)[1]


def test_modulate_is_one_plus_scale():
    """In Fig. 2b alpha and delta are 1 + scale: a scale of 0 leaves the normalised tokens."""
    x, zero = torch.randn(2, 3, 4, generator=rng(0)), torch.zeros(2, 1, 4)
    normed = (x - x.mean(dim=-1, keepdim=True)) / x.std(dim=-1, keepdim=True, correction=0)
    close(modulate(x, zero, zero), normed)
    close(modulate(x, zero + 3, zero + 1), 2 * normed + 3)


def test_attention_reaches_the_residual_stream():
    """With gate_attn = 1 and gate_mlp = 0 the image changes. The text's gates are 0."""
    new_text, new_image = block_with({GATE_ATTN: 1})(TEXT, IMAGE, COND)
    assert far(new_image, IMAGE) and torch.equal(new_text, TEXT)


def test_attention_and_mlp_read_their_own_shift_scale_and_gate():
    """The order is shift, scale, gate of the attention, then of the MLP, as in released files."""
    normed = F.layer_norm(IMAGE, (128,), eps=1e-6)
    mlp = block_with({}).x_block.mlp
    changed = image_after({GATE_MLP: 1, SHIFT_MLP: 2, SCALE_MLP: 0.5})
    close(changed, IMAGE + mlp(1.5 * normed + 2))
    only_mlp, only_attention = image_after({GATE_MLP: 1}), image_after({GATE_ATTN: 1})
    close(image_after({GATE_MLP: 1, SHIFT_ATTN: 2, SCALE_ATTN: 0.5}), only_mlp)
    close(image_after({GATE_ATTN: 1, SHIFT_MLP: 2, SCALE_MLP: 0.5}), only_attention)
    assert far(image_after({GATE_ATTN: 1, SHIFT_ATTN: 2}), only_attention)
    assert far(image_after({GATE_ATTN: 1, SCALE_ATTN: 2}), only_attention)
    close(image_after({GATE_ATTN: 2}) - IMAGE, 2 * (only_attention - IMAGE))


def test_the_mlp_reads_what_the_attention_added():
    mlp = block_with({}).x_block.mlp
    between = image_after({GATE_ATTN: 1})
    expected = between + mlp(F.layer_norm(between, (128,), eps=1e-6))
    close(image_after({GATE_ATTN: 1, GATE_MLP: 1}), expected)


def test_both_columns_compute_the_same_with_the_same_weights():
    """Fig. 2b is symmetric: exchange the columns and the tokens, and the results are exchanged."""
    block = randomize(JointBlock(SMALL).requires_grad_(False))
    exchanged = JointBlock(SMALL).requires_grad_(False)
    exchanged.context_block, exchanged.x_block = block.x_block, block.context_block
    text, image = block(TEXT, IMAGE, COND)
    new_image, new_text = exchanged(IMAGE, TEXT, COND)
    close(new_text, text)
    close(new_image, image)


def test_joint_attention_is_one_softmax_over_text_and_image():
    """By hand, head by head: softmax(q k^T / 8) v over the text's keys followed by the image's."""
    block = block_with({SHIFT_ATTN: 0.5, SCALE_ATTN: 1, GATE_ATTN: 1})            # the text's are 0
    normed = [F.layer_norm(TEXT, (128,), eps=1e-6), 2 * F.layer_norm(IMAGE, (128,), eps=1e-6) + 0.5]

    def rms(y, weight):
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    queries, keys, values = [], [], []
    for stream, x in zip((block.context_block, block.x_block), normed, strict=True):
        q, k, v = stream.attn.qkv(x)[0].view(-1, 3, 2, 64).unbind(1)              # (n, heads, 64)
        queries.append(rms(q, stream.attn.ln_q.weight))
        keys.append(rms(k, stream.attn.ln_k.weight))
        values.append(v)
    k, v, heads = torch.cat(keys), torch.cat(values), []
    for h in range(2):
        heads.append(torch.softmax(queries[1][:, h] @ k[:, h].T / 8, dim=-1) @ v[:, h])
    expected = IMAGE[0] + block.x_block.attn.proj(torch.cat(heads, dim=-1))
    close(block(TEXT, IMAGE, COND)[1][0], expected)


def test_text_reads_the_image_and_the_image_reads_the_text():
    block = randomize(JointBlock(SMALL).requires_grad_(False))
    new_text, new_image = block(TEXT, IMAGE, COND)
    assert far(block(TEXT, -IMAGE, COND)[0], new_text)
    assert far(block(-TEXT, IMAGE, COND)[1], new_image)


def test_last_text_block_has_what_attention_needs_and_nothing_else():
    model = MMDiT(replace(SMALL, depth=3))
    last, before = model.joint_blocks[-1], model.joint_blocks[1]
    modules = {name.rpartition(".")[0] for name, _ in last.context_block.named_parameters()}
    assert modules == {"adaLN_modulation.1", "attn.qkv", "attn.ln_q", "attn.ln_k"}
    assert last.context_block.adaLN_modulation[1].out_features == 2 * 192
    assert last.x_block.adaLN_modulation[1].out_features == 6 * 192
    assert before.context_block.adaLN_modulation[1].out_features == 6 * 192


def test_the_image_of_the_last_block_is_that_of_any_block():
    """Only what nobody reads is left out: with the same weights the image is the same."""
    whole, last = JointBlock(SMALL), JointBlock(SMALL, last=True)
    randomize(whole.requires_grad_(False))
    weights = {name: x for name, x in whole.state_dict().items() if name in last.state_dict()}
    for name in ("weight", "bias"):                                               # shift and scale
        key = f"context_block.adaLN_modulation.1.{name}"
        weights[key] = weights[key][: 2 * 128]
    last.load_state_dict(weights, strict=True)
    context, image = last.requires_grad_(False)(TEXT, IMAGE, COND)
    assert context is None
    close(image, whole(TEXT, IMAGE, COND)[1])


def test_activations_are_tanh_gelu_in_the_blocks_and_silu_for_the_conditioning():
    model, (_, t, _, pooled) = random_model(), random_input()
    stream, x = model.joint_blocks[0].x_block, torch.randn(1, 3, 128, generator=rng(6))
    h = stream.mlp.fc1(x)
    activated = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    close(stream.mlp(x), stream.mlp.fc2(activated), 1e-5)

    def two_layers(mlp, y):
        h = mlp[0](y)
        return mlp[2](h * torch.sigmoid(h))

    time = two_layers(model.t_embedder.mlp, timestep_embedding(t))
    cond = time + two_layers(model.y_embedder.mlp, pooled)
    close(model.embed_cond(t, pooled), cond)
    vectors = stream.adaLN_modulation[1](cond * torch.sigmoid(cond))
    close(torch.cat(stream.modulation(cond)[:6], dim=-1)[:, 0], vectors)


def test_qk_norm_bounds_the_logits_however_large_the_activations():
    """Normalised to root mean square 1 over 64 channels, |q| = |k| = 8, so q k / sqrt(64) <= 8."""
    logits = {}
    for qk_norm in (True, False):
        stream = StreamBlock(replace(SMALL, qk_norm=qk_norm)).requires_grad_(False)
        x = 1e4 * torch.randn(1, 50, 128, generator=rng(0))
        q, k, _ = stream.attn.queries_keys_values(x)
        logits[qk_norm] = (q @ k.transpose(-1, -2) / 8).abs().max().item()
    assert logits[True] <= 8 * (1 + 1e-5) and logits[False] > 1e4


def test_norm_epsilons_are_1e_6():
    """On numbers of size 1e-3 an epsilon of 1e-6 halves the normalised square."""
    small = 1e-3 * torch.tensor([1.0, -1.0]).repeat(64)                           # mean square 1e-6
    expected = small / 1e-3 / math.sqrt(2)
    close(HeadNorm(64)(small[:64]), expected[:64], 1e-4)
    zero = torch.zeros(1, 1, 128)
    close(modulate(small.view(1, 1, 128), zero, zero).flatten(), expected, 1e-4)


def test_final_layer_modulates_by_shift_then_scale_without_a_gate():
    final = randomize(FinalLayer(SMALL).requires_grad_(False))
    cond, x = torch.randn(1, 128, generator=rng(1)), IMAGE
    shift, scale = final.adaLN_modulation[1](F.silu(cond)).split(128, dim=-1)
    expected = final.linear(F.layer_norm(x, (128,), eps=1e-6) * (1 + scale) + shift)
    close(final(x, cond), expected)


# ---- SD3.5-medium's second attention -------------------------------------------------------------

def test_second_attention_is_in_the_first_blocks_with_nine_modulations_image_only():
    first, second = MMDiT(DUAL).joint_blocks
    assert first.x_block.adaLN_modulation[1].out_features == 9 * 128
    assert second.x_block.adaLN_modulation[1].out_features == 6 * 128
    assert first.context_block.adaLN_modulation[1].out_features == 6 * 128
    names = [name for name, _ in MMDiT(DUAL).named_parameters() if ".attn2." in name]
    assert {name.rpartition(".attn2.")[0] for name in names} == {"joint_blocks.0.x_block"}


def test_second_attention_reads_the_same_normalised_image_tokens_and_never_the_text():
    """Chunks 6, 7, 8 are its shift, scale, gate; it does not see what the first attention added."""
    alone = image_after({GATE_ATTN2: 1}, config=DUAL)
    assert far(alone, IMAGE)
    assert torch.equal(image_after({GATE_ATTN2: 1}, -TEXT, DUAL), alone)
    both = image_after({GATE_ATTN: 1, GATE_ATTN2: 1}, config=DUAL)
    first = image_after({GATE_ATTN: 1}, config=DUAL)
    close(both - first, alone - IMAGE)
    assert far(image_after({SHIFT_ATTN2: 0.5, GATE_ATTN2: 1}, config=DUAL), alone)
    assert far(image_after({SCALE_ATTN2: 1, GATE_ATTN2: 1}, config=DUAL), alone)
    close(image_after({GATE_ATTN2: 2}, config=DUAL) - IMAGE, 2 * (alone - IMAGE))


# ---- Sizes and names -----------------------------------------------------------------------------

@pytest.mark.parametrize("depth, hidden, billions", [(24, 1536, 2), (38, 2432, 8)])
def test_depth_gives_the_papers_sizes(depth, hidden, billions):
    """Fig. 5 calls d = 24 the 2B model, and Sec. 5.3 the largest one, d = 38, the 8B model."""
    config = MMDiTConfig(depth)
    assert (config.hidden_size, config.num_heads) == (hidden, depth)
    assert round(count_parameters(config) / 1e9) == billions


def test_the_default_sizes_are_those_of_the_2b_model():
    """Sec. 4: T5-XXL has 4096 channels, CLIP-L and CLIP-G 768 + 1280, a patch 2 x 2 of 16."""
    config = MMDiTConfig()
    assert (config.depth, config.patch_size, config.latent_channels) == (24, 2, 16)
    assert (config.context_dim, config.pooled_dim) == (4096, 768 + 1280)


def test_parameters_are_as_many_as_by_hand():
    """A column has 18 D^2 weights (6 of adaLN, 4 of attention, 8 of the MLP) and 15 D biases."""
    D, C, context, pooled = 128, 4, 24, 12
    column = 18 * D**2 + 15 * D + 2 * 64                                          # QK-norm: 2 * 64
    unused = (4 * D**2 + 4 * D) + (D**2 + D) + (8 * D**2 + 5 * D)                 # the last text's
    embedders = (256 * D + pooled * D) + 2 * D**2 + 4 * D
    ends = (4 * C * D + D) + (context * D + D) + (2 * D**2 + 2 * D) + (4 * C * D + 4 * C)
    assert count_parameters(SMALL) == 2 * 2 * column - unused + embedders + ends


def test_parameters_bear_the_released_names_and_shapes():
    prefix, released = "model.diffusion_model.", {}
    with safe_open(GOLDEN, framework="pt") as file:
        for key in file.keys():
            released[key.removeprefix(prefix)] = tuple(file.get_slice(key).get_shape())
    config = MMDiTConfig(depth=2, dual_attention_layers=1,
                         context_dim=released["context_embedder.weight"][1],
                         pooled_dim=released["y_embedder.mlp.0.weight"][1],
                         pos_embed_max_size=math.isqrt(released["pos_embed"][1]))
    with torch.device("meta"):
        model = MMDiT(config)
    assert {name: tuple(x.shape) for name, x in model.state_dict().items()} == released


def test_running_mmdit_prints_the_sizes(capsys):
    mmdit.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows[-1] == ["38", "2432", "38", "8.057", "B"]
    assert ["24", "1536", "24", "2.028", "B"] in rows


# ---- The model of a new run (Sec. 5.3.2) ---------------------------------------------------------

VAE_SIZES = SimpleNamespace(latent_channels=4)
TEXT_SIZES = SimpleNamespace(t5_width=64, clip_l_width=24, clip_g_width=40)


def new_run(resolution, depth=4):
    return SimpleNamespace(resolution=resolution, depth=depth, qk_norm=True)


@pytest.mark.parametrize("resolution, spacing", [(64, 4), (256, 1), (512, 1 / 2), (1024, 1 / 4)])
@pytest.mark.parametrize("start", [None, SimpleNamespace(config=MMDiTConfig(
    4, position_start=-8.0, position_step=4.0))])
def test_positions_of_a_new_model_are_the_papers(resolution, spacing, start):
    """Sec. 5.3.2: a distance of 256 / S. A picture of S x S px has the positions 0 to 15 + a rest,
    also after --init from another resolution. The grid reaches to twice that, or to the buckets."""
    sizes = model_sizes(new_run(resolution), VAE_SIZES, TEXT_SIZES, resolution, start)
    s = resolution // 16
    positions = sizes.positions
    middle = positions[s // 2 : s // 2 + s]
    assert len(positions) == 2 * s and middle.tolist() == [spacing * i for i in range(s)]
    wide = model_sizes(new_run(resolution), VAE_SIZES, TEXT_SIZES, 3 * resolution, start)
    assert wide.pos_embed_max_size == 3 * s and wide.position_start == -16


def test_a_released_model_keeps_its_own_positions():
    released = MMDiTConfig(2, latent_channels=4, context_dim=64, pooled_dim=64, qk_norm=False,
                           pos_embed_max_size=12, position_step=64 / 12, dual_attention_layers=1)
    config = new_run(64, depth=2)
    weights = MMDiT(released)
    sizes = model_sizes(config, VAE_SIZES, TEXT_SIZES, 64, weights)
    assert sizes == replace(released, qk_norm=True)
    model = MMDiT(sizes)
    weights.pos_embed.mul_(1.5)                        # The stored table is taken, not computed.
    load_weights(model, weights)
    assert torch.equal(model.pos_embed, weights.pos_embed)


def start_sizes(**values):
    start = {"latent_channels": 4, "context_dim": 64, "pooled_dim": 64, "pos_embed_max_size": 8,
             "position_start": -8.0, "position_step": 4.0}
    return MMDiTConfig(1, **start | values)


@pytest.mark.parametrize("theirs", [True, False])
def test_a_run_can_start_from_another_model_and_gain_qk_norm(theirs):
    """And at another resolution it has the positions of its own."""
    model = MMDiT(start_sizes(position_start=-8.0, position_step=2.0, pos_embed_max_size=16))
    weights = MMDiT(start_sizes(qk_norm=theirs))
    for parameter in weights.parameters():
        parameter.data.normal_()
    grid = model.pos_embed.clone()
    load_weights(model, weights)
    assert torch.equal(model.final_layer.linear.weight, weights.final_layer.linear.weight)
    scales = model.joint_blocks[0].x_block.attn.ln_q.weight
    assert torch.equal(scales, weights.joint_blocks[0].x_block.attn.ln_q.weight if theirs
                       else torch.ones(64))
    assert torch.equal(model.pos_embed, grid) and not torch.equal(grid[:, :64], weights.pos_embed)


@pytest.mark.parametrize("ours", [{"context_dim": 128}, {"latent_channels": 8}, {"qk_norm": False}])
def test_a_model_of_other_sizes_is_no_start(ours):
    with pytest.raises(ValueError, match="--init has .*; give its --depth"):
        load_weights(MMDiT(start_sizes(**ours)), MMDiT(start_sizes()))


# ---- Precision and speed -------------------------------------------------------------------------

def test_bf16_autocast_stays_near_fp32():
    model, inputs = random_model(), random_input()
    exact = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(*inputs)
    assert (rough - exact).square().mean().sqrt() < 0.03 * exact.square().mean().sqrt()


@pytest.mark.parametrize("dtype, expected", [(torch.float32, torch.float32),
                                             (torch.bfloat16, torch.bfloat16),
                                             (torch.float16, torch.float32)])
def test_streams_have_the_precision_of_the_products_but_fp16_streams_are_fp32(dtype, expected):
    """The image stream of this model passes 70,000; fp16 ends at 65,504."""
    model, (latent, t, context, pooled) = random_model(), random_input()
    streams = []
    with torch.no_grad():
        for block in model.joint_blocks:
            block.x_block.mlp.fc2.bias.fill_(60000)
            block.x_block.adaLN_modulation[1].bias[5 * 128 :] = 1                  # gate_mlp
            block.register_forward_hook(lambda block, inputs, output: streams.append(output[1]))
        exact = model(latent, t, context, pooled)
        assert streams[-1].max() > 70000
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            velocity = model(latent, t, context, pooled)
    assert [stream.dtype for stream in streams[2:]] == [expected, expected]
    assert (velocity - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("batch, n", [(1, 1500), (2, 30), (3, 700)])     # 1, all, 4 heads at a time
def test_attention_written_out_is_attention(batch, n):
    """For training in bf16 on a CPU. The other cases are torch's own kernel."""
    q, k, v = (torch.randn(batch, 8, n, 64, generator=rng(i)).bfloat16() for i in range(3))
    scores = torch.einsum("bhqd,bhkd->bhqk", q.double(), k.double()) / 8
    exact = scores.softmax(dim=-1) @ v.double()
    for out in (attend(q, k, v), attend(q.requires_grad_(), k, v)):
        assert out.dtype == torch.bfloat16 and (out - exact).norm() < 0.01 * exact.norm()


def test_gelu_is_the_tanh_form():
    """Exactly in fp32; in bf16 on a CPU as near as that rounds."""
    x = torch.randn(10000, generator=rng(0)).double()
    tanh_form = x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(gelu(x), tanh_form)
    theirs = F.gelu(x.bfloat16(), approximate="tanh")
    assert (gelu(x.bfloat16()) - tanh_form).norm() < 1.1 * (theirs - tanh_form).norm()


def test_tokens_lie_in_memory_as_they_are_read():
    """With the convolution's transposed layout, every norm would copy its tokens first."""
    assert random_model().embed_image(random_input()[0]).is_contiguous()
