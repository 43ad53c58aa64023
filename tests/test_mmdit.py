"""mmdit.py: Fig. 2, position grids, the embedding of time, sizes; what a fresh model does, and the classic mistakes."""

import math
from dataclasses import replace
from pathlib import Path

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
    PatchEmbed,
    StreamBlock,
    attend,
    count_parameters,
    crop_center,
    gelu,
    norm_and_modulate,
    paper_positions,
    positions_of,
    released_positions,
    sincos_2d,
    stretched_positions,
    timestep_embedding,
    unpatchify,
)

SMALL = MMDiTConfig(depth=2, latent_channels=4, context_dim=24, pooled_dim=12, pos_embed_max_size=8, pos_embed_base_size=4)
GOLDEN = Path(__file__).parent / "golden" / "c_mmditx_dual" / "weights.safetensors"


def rng(seed):
    return torch.Generator().manual_seed(seed)


def random_model(config=SMALL, seed=0):
    """Every parameter random, those too that start at zero."""
    model, generator = MMDiT(config).eval().requires_grad_(False), rng(seed)
    for name, parameter in sorted(model.named_parameters()):
        spread = 0.3 if "bias" in name else 1 / math.sqrt(parameter[0].numel())
        parameter.normal_(1.0 if ".ln_" in name else 0.0, spread, generator=generator)
    return model


def random_input(config=SMALL, B=2, H=6, W=10, L=5, seed=1):
    """latent, t, context, pooled"""
    generator = rng(seed)
    return (torch.randn(B, config.latent_channels, H, W, generator=generator), torch.rand(B, generator=generator),
            torch.randn(B, L, config.context_dim, generator=generator), torch.randn(B, config.pooled_dim, generator=generator))


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def far(a, b):
    return (a - b).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------------------
# A fresh model
# ------------------------------------------------------------------------------------------------------------

def test_fresh_model_predicts_zero_and_its_first_loss_is_about_two():
    model = MMDiT(SMALL)
    latent, t, context, pooled = random_input(B=8, H=16, W=16)
    assert (model(latent, t, context, pooled) == 0).all()
    noise = torch.randn(latent.shape, generator=rng(2))
    loss = rectified_flow_loss(model, latent, context, pooled, t, noise).mean()
    assert loss.item() == pytest.approx(2, rel=0.05)                              # E |eps - x_0|^2 of unit-variance data


def test_fresh_blocks_are_the_identity():
    config = replace(SMALL, dual_attention_layers=1)
    model = MMDiT(config)
    latent, t, context, pooled = random_input(config)
    tokens = [*model.embed_text(context), model.embed_image(latent)]
    for block, modulations in zip(model.joint_blocks, model.modulations(model.embed_cond(t, pooled))):
        new = block(tokens, modulations)
        assert all(torch.equal(a, b) for a, b in zip(tokens, new) if b is not None)


def test_initialisation_follows_its_generator():
    a, b, c = MMDiT(SMALL), MMDiT(SMALL), MMDiT(SMALL)
    for model, seed in ((a, 1), (b, 1), (c, 2)):
        model.initialize(rng(seed))
    pairs = lambda other: zip(a.state_dict().values(), other.state_dict().values())
    assert all(torch.equal(x, y) for x, y in pairs(b))
    assert not all(torch.equal(x, y) for x, y in pairs(c))


def test_every_parameter_reaches_the_velocity_but_the_last_text_queries_norm():
    """Nothing reads what the last text block's queries collect; its ln_q is stored because released files store it."""
    config = replace(SMALL, dual_attention_layers=1)
    model = random_model(config).requires_grad_(True)
    model(*random_input(config)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-7]
    assert without == ["joint_blocks.1.context_block.attn.ln_q.weight"]


# ------------------------------------------------------------------------------------------------------------
# What the velocity depends on
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changed", range(4), ids=["latent", "t", "context", "pooled"])
def test_velocity_depends_on_every_input(changed):
    model, inputs, other = random_model(), list(random_input()), random_input(seed=9)
    before = model(*inputs)
    inputs[changed] = other[changed]
    assert far(model(*inputs), before)


def test_no_state_survives_between_calls():
    model, a, b = random_model(), random_input(seed=1), random_input(seed=2, H=8, W=4, L=3)
    stored = {name: x.clone() for name, x in model.state_dict().items()}
    first, _, again = model(*a), model(*b), model(*a)
    assert torch.equal(first, again)
    assert all(torch.equal(stored[name], x) for name, x in model.state_dict().items())


def test_each_sample_of_a_batch_gets_what_it_gets_alone():
    model, inputs = random_model(), random_input(B=3)
    together = model(*inputs)
    for i in range(3):
        close(model(*(x[i : i + 1] for x in inputs))[0], together[i])


def test_the_order_of_text_tokens_does_not_matter():
    model, (latent, t, context, pooled) = random_model(), random_input(L=7)
    order = torch.randperm(7, generator=rng(3))
    close(model(latent, t, context[:, order], pooled), model(latent, t, context, pooled))


def test_the_place_of_image_tokens_matters():
    model, (latent, t, context, pooled) = random_model(), random_input()
    moved = latent.roll(2, dims=3)                                                # by one patch
    assert far(model(moved, t, context, pooled), model(latent, t, context, pooled).roll(2, dims=3))


def test_time_is_continuous_and_not_rounded_to_thousandths():
    model, (latent, _, context, pooled) = random_model(), random_input()
    at = lambda t: model(latent, torch.full((2,), t), context, pooled)
    assert not torch.equal(at(0.5001), at(0.5004))


def test_prepared_equals_plain_and_serves_several_latents():
    model, (latent, _, context, pooled) = random_model(), random_input()
    times = torch.tensor([1.0, 0.7531, 0.25])
    prepared = model.prepare(context, pooled, times)
    for t in times:
        for x in (latent, -latent):
            t_ = t.expand(2)
            torch.testing.assert_close(model(x, t_, prepared), model(x, t_, context, pooled), rtol=1e-6, atol=1e-6)


def test_a_time_that_was_not_prepared_is_named():
    model, (latent, _, context, pooled) = random_model(), random_input()
    prepared = model.prepare(context, pooled, [1.0, 0.5])
    with pytest.raises(ValueError, match=r"t = 0\.25 was not prepared.*\(1\.0, 0\.5\)"):
        model(latent, torch.full((2,), 0.25), prepared)


# ------------------------------------------------------------------------------------------------------------
# Patches
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("p", [1, 2, 4])
def test_patchify_then_unpatchify_is_the_identity_on_a_non_square_latent(p):
    """An identity for `proj` makes a token its patch's numbers in the order (row, column, channel) of unpatchify."""
    C, H, W = 3, 8, 12
    config = replace(SMALL, latent_channels=C, patch_size=p)
    embed = PatchEmbed(config).requires_grad_(False)
    weight = torch.zeros(config.hidden_size, C, p, p)
    for row in range(p):
        for column in range(p):
            for channel in range(C):
                weight[(row * p + column) * C + channel, channel, row, column] = 1
    embed.proj.weight.copy_(weight)
    embed.proj.bias.zero_()
    latent = torch.randn(2, C, H, W, generator=rng(0))
    tokens = embed(latent)
    assert tokens.shape == (2, H // p * W // p, config.hidden_size)
    close(unpatchify(tokens[..., : p * p * C], H // p, W // p, p), latent)


def test_without_attention_a_pixel_of_the_latent_only_moves_its_own_patch():
    """Fresh blocks are the identity, so the velocity's patch (i, j) may depend on the latent's patch (i, j) alone."""
    model, (latent, t, context, pooled) = MMDiT(SMALL).requires_grad_(False), random_input(B=1, H=6, W=10)
    model.final_layer.linear.weight.normal_(generator=rng(0))
    moved = latent.clone()
    moved[0, 0, 3, 7] += 1
    changed = (model(moved, t, context, pooled) != model(latent, t, context, pooled))[0].any(0)
    expected = torch.zeros(6, 10, dtype=torch.bool)
    expected[2:4, 6:8] = True
    assert torch.equal(changed, expected)


def test_odd_latent_is_refused_with_the_way_out():
    model, (_, t, context, pooled) = random_model(), random_input()
    for H, W in ((7, 10), (10, 7)):
        with pytest.raises(ValueError, match=f"latent is {H}x{W} but patch_size=2.*multiples of 16 px"):
            model(torch.zeros(2, 4, H, W), t, context, pooled)


def test_latent_beyond_the_position_grid_is_refused_with_the_largest_size():
    model, (_, t, context, pooled) = random_model(), random_input()
    with pytest.raises(ValueError, match="9x5 tokens but the position grid has 8x8.*128x128 px"):
        model(torch.zeros(2, 4, 18, 10), t, context, pooled)
    assert model(torch.zeros(2, 4, 16, 16), t, context, pooled).shape == (2, 4, 16, 16)


# ------------------------------------------------------------------------------------------------------------
# Embeddings of time and place
# ------------------------------------------------------------------------------------------------------------

def test_timestep_embedding_is_cosines_then_sines_of_1000_t():
    t = torch.tensor([0.0, 0.001, 0.4, 1.0])
    angle = 1000 * t.double()[:, None] * 10000.0 ** (-torch.arange(128).double() / 128)
    expected = torch.cat([angle.cos(), angle.sin()], dim=1)
    torch.testing.assert_close(timestep_embedding(t).double(), expected, rtol=0, atol=1e-4)
    assert timestep_embedding(t).shape == (4, 256) and timestep_embedding(t)[0, 0] == 1 and timestep_embedding(t)[0, -1] == 0


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
    seen = []
    half = random_model().bfloat16()
    half.t_embedder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    half.embed_cond(t, pooled)
    assert torch.equal(seen[0], right.bfloat16())


def test_sincos_2d_is_column_then_row_and_sines_then_cosines():
    rows, columns, size = torch.tensor([0.0, 2.0]).double(), torch.tensor([1.0, 3.0, 5.0]).double(), 16
    table = sincos_2d(rows, columns, size).view(2, 3, size)                       # row-major
    frequency = 10000.0 ** (-torch.arange(4).double() / 4)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            expected = torch.cat([(column * frequency).sin(), (column * frequency).cos(),
                                  (row * frequency).sin(), (row * frequency).cos()])
            torch.testing.assert_close(table[i, j], expected, rtol=1e-12, atol=1e-12)


def test_released_positions_are_spaced_base_over_grid():
    """SD3 medium: 192 positions over [0, 64): a third of a 256 px picture's spacing."""
    positions = released_positions(192, 64)
    assert len(positions) == 192 and positions[0] == 0
    torch.testing.assert_close(positions.diff(), torch.full((191,), 1 / 3).double(), rtol=1e-6, atol=0)


def test_paper_positions_of_a_square_picture_are_those_of_256_px_interpolated():
    """Sec. 5.3.2: the middle s = S/16 positions of the grid run from 0 to 16, whatever S is."""
    for S, longest in ((256, 16), (256, 32), (512, 42), (1024, 100)):
        positions, s = paper_positions(S, longest), S // 16
        middle = positions[(longest - s) // 2 :][:s]
        torch.testing.assert_close(middle, torch.arange(s).double() * 16 / s, rtol=1e-12, atol=1e-12)
        assert len(positions) == longest


def test_positions_are_cropped_from_the_centre_rounded_down():
    table = torch.arange(64.0).view(1, 64, 1)                                     # an 8 x 8 grid of its own indices
    crop = crop_center(table, 3, 5).view(3, 5)
    assert crop[0].tolist() == [17, 18, 19, 20, 21]                               # top = (8 - 3) // 2, left = (8 - 5) // 2
    assert crop[:, 0].tolist() == [17, 25, 33]
    assert crop_center(table, 1, 8).flatten().tolist() == list(range(24, 32))
    assert torch.equal(crop_center(table, 8, 8), table)


def test_position_grid_is_a_buffer_that_is_added_to_the_tokens():
    model, latent = random_model(), random_input()[0]
    assert "pos_embed" in model.state_dict() and "pos_embed" not in dict(model.named_parameters())
    side = released_positions(8, 4)
    close(model.pos_embed[0], sincos_2d(side, side, 128).float(), 1e-6)
    close(model.embed_image(latent) - model.x_embedder(latent), crop_center(model.pos_embed, 3, 5).expand(2, -1, -1), 1e-5)


# ------------------------------------------------------------------------------------------------------------
# The block (Fig. 2b)
# ------------------------------------------------------------------------------------------------------------

def block_with(bias: dict, config=SMALL):
    """A random first block and its modulations, which are 0 but for `bias`: chunk of the image's adaLN -> value."""
    block = random_model(config).joint_blocks[0]
    D, cond = config.hidden_size, torch.zeros(1, config.hidden_size)
    for stream in block.streams():
        stream.adaLN_modulation[1].bias.zero_()
        stream.adaLN_modulation[1].weight.zero_()
    for chunk, value in bias.items():
        block.x_block.adaLN_modulation[1].bias[chunk * D : (chunk + 1) * D] = value
    return block, [stream.modulation(cond) for stream in block.streams()]


def random_tokens(D=128):
    return [torch.randn(1, 5, D, generator=rng(4)), torch.randn(1, 15, D, generator=rng(5))]


SHIFT_ATTN, SCALE_ATTN, GATE_ATTN, SHIFT_MLP, SCALE_MLP, GATE_MLP = range(6)


def test_modulate_is_one_plus_scale():
    """In Fig. 2b alpha and delta are 1 + scale: without modulation the normalised tokens pass unchanged."""
    x, zero = torch.randn(2, 3, 4, generator=rng(0)), torch.zeros(2, 1, 4)
    normed = (x - x.mean(dim=-1, keepdim=True)) / x.std(dim=-1, keepdim=True, correction=0)
    close(norm_and_modulate(x, zero, zero), normed)
    close(norm_and_modulate(x, zero + 3, zero + 1), 2 * normed + 3)


@pytest.mark.parametrize("batch, n", [(1, 1500), (2, 30), (3, 700)])                  # heads at a time: 1, all, 4
def test_attention_written_out_is_attention(batch, n):
    """On a CPU in bf16; the other cases are torch's own kernel."""
    q, k, v = (torch.randn(batch, 8, n, 64, generator=rng(i)).bfloat16() for i in range(3))
    exact = torch.einsum("bhqd,bhkd->bhqk", q.double(), k.double()).div(8).softmax(dim=-1) @ v.double()
    out = attend(q, k, v)
    assert out.dtype == torch.bfloat16 and (out - exact).norm() < 0.01 * exact.norm()
    torch.testing.assert_close(attend(q.double(), k.double(), v.double()), exact)


def test_tokens_lie_in_memory_as_they_are_read():
    """The convolution's transposed layout would stay with the stream, and every norm would copy it first."""
    model, (latent, _, context, _) = random_model(), random_input()
    assert all(tokens.is_contiguous() for tokens in (model.embed_image(latent), *model.embed_text(context)))


@pytest.mark.parametrize("dtype, expected", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
                                             (torch.float16, torch.float32)])
def test_streams_are_in_the_precision_of_the_products_but_leave_the_range_of_fp16(dtype, expected):
    model, (latent, t, context, pooled) = random_model(), random_input()
    streams = []
    with torch.no_grad():
        for block in model.joint_blocks:
            block.x_block.mlp.fc2.bias.fill_(60000)
            block.x_block.adaLN_modulation[1].bias[5 * 128 :] = 1                  # gate_mlp
            block.register_forward_hook(lambda block, inputs, tokens: streams.append(tokens[1]))
        exact = model(latent, t, context, pooled)
        assert streams[-1].max() > 70000
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            velocity = model(latent, t, context, pooled)
    assert [stream.dtype for stream in streams[2:]] == [expected, expected]
    assert (velocity - exact).norm() < 0.1 * exact.norm()


def test_gelu_is_the_tanh_form():
    """Exactly in fp32; in bf16 on a CPU as near as that rounds."""
    x = torch.randn(10000, generator=rng(0)).double()
    tanh_form = x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(gelu(x), tanh_form)
    assert (gelu(x.bfloat16()) - tanh_form).norm() < 1.1 * (F.gelu(x.bfloat16(), approximate="tanh") - tanh_form).norm()


def test_attention_reaches_the_residual_stream():
    block, modulations = block_with({GATE_ATTN: 1})                               # gate_mlp = 0
    text, image = random_tokens()
    new_text, new_image = block([text, image], modulations)
    assert far(new_image, image) and torch.equal(new_text, text)                  # the text's gates are 0


def test_activations_are_tanh_gelu_in_the_blocks_and_silu_for_the_conditioning():
    model, (_, t, _, pooled) = random_model(), random_input()
    stream, x = model.joint_blocks[0].x_block, torch.randn(1, 3, 128, generator=rng(6))
    h = stream.mlp.fc1(x)
    activated = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    close(stream.mlp(x), stream.mlp.fc2(activated), 1e-5)
    two_layers = lambda mlp, y: mlp[2](mlp[0](y) * torch.sigmoid(mlp[0](y)))
    cond = two_layers(model.t_embedder.mlp, timestep_embedding(t)) + two_layers(model.y_embedder.mlp, pooled)
    close(model.embed_cond(t, pooled), cond)
    for part in (stream, model.final_layer):
        modulation = torch.cat(part.modulation(cond), dim=-1)[:, 0]
        close(modulation, part.adaLN_modulation[1](cond * torch.sigmoid(cond)))


def test_attention_and_mlp_read_their_own_shift_scale_and_gate():
    """The order is (shift, scale, gate) of the attention, then of the MLP, as in the released files."""
    tokens = random_tokens()

    def image(bias):
        block, modulations = block_with(bias)
        return block(tokens, modulations)[1]
    normed, mlp = F.layer_norm(tokens[1], (128,), eps=1e-6), block_with({})[0].x_block.mlp
    close(image({GATE_MLP: 1, SHIFT_MLP: 2, SCALE_MLP: 0.5}), tokens[1] + mlp(1.5 * normed + 2))
    close(image({GATE_MLP: 1, SHIFT_ATTN: 2, SCALE_ATTN: 0.5}), image({GATE_MLP: 1}))     # the attention's pass the MLP by
    close(image({GATE_ATTN: 1, SHIFT_MLP: 2, SCALE_MLP: 0.5}), image({GATE_ATTN: 1}))
    assert far(image({GATE_ATTN: 1, SHIFT_ATTN: 2}), image({GATE_ATTN: 1}))
    assert far(image({GATE_ATTN: 1, SCALE_ATTN: 2}), image({GATE_ATTN: 1}))
    close(image({GATE_ATTN: 2}) - tokens[1], 2 * (image({GATE_ATTN: 1}) - tokens[1]))


def test_joint_attention_is_one_softmax_over_text_and_image():
    """By hand, head by head: softmax(q k^T / 8) v over the text's keys followed by the image's."""
    block, modulations = block_with({SHIFT_ATTN: 0.5, SCALE_ATTN: 1, GATE_ATTN: 1})          # the image's; the text's are 0
    text, image = random_tokens()
    normed = [F.layer_norm(text, (128,), eps=1e-6), 2 * F.layer_norm(image, (128,), eps=1e-6) + 0.5]
    parts = []
    for stream, x in zip((block.context_block, block.x_block), normed):
        qkv = stream.attn.qkv(x)[0].view(-1, 3, 2, 64)                            # (n, 3, heads, 64)
        rms = lambda y, weight: y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        parts.append((rms(qkv[:, 0], stream.attn.ln_q.weight), rms(qkv[:, 1], stream.attn.ln_k.weight), qkv[:, 2]))
    k, v = (torch.cat([parts[0][i], parts[1][i]]) for i in (1, 2))
    heads = [torch.softmax(parts[1][0][:, h] @ k[:, h].T / 8, dim=-1) @ v[:, h] for h in range(2)]
    expected = image[0] + block.x_block.attn.proj(torch.cat(heads, dim=-1))
    close(block([text, image], modulations)[1][0], expected)


def test_text_reads_the_image_and_the_image_reads_the_text():
    model = random_model()
    block, (text, image) = model.joint_blocks[0], random_tokens()
    modulations = [stream.modulation(torch.ones(1, 128)) for stream in block.streams()]
    new_text, new_image = block([text, image], modulations)
    assert far(block([text, -image], modulations)[0], new_text)
    assert far(block([-text, image], modulations)[1], new_image)


def test_last_text_block_has_what_attention_needs_and_nothing_else():
    model = random_model(replace(SMALL, depth=3))
    names = lambda i: {name.split(".")[0] for name, _ in model.joint_blocks[i].context_block.named_parameters()}
    last = model.joint_blocks[-1].context_block
    assert {name.rpartition(".")[0] for name, _ in last.named_parameters()} == {"adaLN_modulation.1", "attn.qkv", "attn.ln_q",
                                                                               "attn.ln_k"}
    assert last.adaLN_modulation[1].out_features == 2 * 192
    assert model.joint_blocks[-1].x_block.adaLN_modulation[1].out_features == 6 * 192
    assert "mlp" in names(0) and model.joint_blocks[1].context_block.adaLN_modulation[1].out_features == 6 * 192


def test_qk_norm_bounds_the_logits_however_large_the_activations():
    """Normalised to root mean square 1 over 64 channels, |q| = |k| = 8, so q k / sqrt(64) <= 8."""
    logits = {}
    for qk_norm in (True, False):
        stream = StreamBlock(replace(SMALL, qk_norm=qk_norm)).requires_grad_(False)
        q, k, _ = stream.attn.queries_keys_values(1e4 * torch.randn(1, 50, 128, generator=rng(0)))
        logits[qk_norm] = (q @ k.transpose(-1, -2) / 8).abs().max().item()
    assert logits[True] <= 8 * (1 + 1e-5) and logits[False] > 1e4


def test_norm_epsilons_are_1e_6():
    """On numbers of size 1e-3 an epsilon of 1e-6 halves the normalised square."""
    small = 1e-3 * torch.tensor([1.0, -1.0]).repeat(64)                           # mean 0, mean square 1e-6
    expected = small / 1e-3 / math.sqrt(2)
    close(HeadNorm()(small[:64]), expected[:64], 1e-4)
    final = FinalLayer(SMALL).requires_grad_(False)
    final.linear.weight.copy_(torch.eye(16, 128))
    final.linear.bias.zero_()
    zero = torch.zeros(1, 1, 128)
    close(final(small.view(1, 1, 128), (zero, zero))[0, 0], expected[:16], 1e-4)
    streams = JointBlock(SMALL).requires_grad_(False).streams()
    for stream in streams:
        stream.attn.qkv.weight.copy_(torch.eye(128).repeat(3, 1))
        stream.attn.qkv.bias.zero_()
        (_, _, v), _ = stream.before_attention(small.view(1, 1, 128), [zero] * 6)
        close(v.flatten(), expected, 1e-4)
        after = stream.after_attention(small.view(1, 1, 128), zero, [zero] * 5 + [zero + 1], None)
        close(after.flatten(), small + stream.mlp(expected), 1e-4)


# ------------------------------------------------------------------------------------------------------------
# Variants: a second attention (SD3.5 medium), three weight sets (Sec. 5.2.3)
# ------------------------------------------------------------------------------------------------------------

DUAL = replace(SMALL, dual_attention_layers=1)


def test_second_attention_is_in_the_first_blocks_with_nine_modulations_image_only():
    model = random_model(DUAL)
    first, second = model.joint_blocks
    assert first.x_block.adaLN_modulation[1].out_features == 9 * 128 and first.x_block.attn2 is not None
    assert second.x_block.adaLN_modulation[1].out_features == 6 * 128 and second.x_block.attn2 is None
    assert first.context_block.adaLN_modulation[1].out_features == 6 * 128 and first.context_block.attn2 is None


def test_second_attention_reads_the_same_normalised_image_tokens_and_never_the_text():
    """Chunks 6, 7, 8 are its shift, scale, gate; it does not see what the first attention added."""
    block, modulations = block_with({8: 1.0}, DUAL)                               # only the second attention's gate is open
    text, image = random_tokens()
    out = block([text, image], modulations)[1]
    assert far(out, image) and torch.equal(block([-text, image], modulations)[1], out)
    both_block, both = block_with({GATE_ATTN: 1.0, 8: 1.0}, DUAL)
    first_block, first = block_with({GATE_ATTN: 1.0}, DUAL)
    close(both_block([text, image], both)[1] - first_block([text, image], first)[1], out - image)
    moved_block, moved = block_with({6: 0.5, 7: 1.0, 8: 1.0}, DUAL)
    assert far(moved_block([text, image], moved)[1], out)


THREE = replace(SMALL, clip_tokens=3)


def test_three_weight_sets_have_more_parameters_and_run():
    two, three = count_parameters(SMALL), count_parameters(THREE)
    assert two < three
    assert random_model(THREE)(*random_input(THREE)).shape == (2, 4, 6, 10)


def test_three_weight_sets_with_equal_text_weights_are_the_two_set_model():
    two, three = random_model(), MMDiT(THREE).eval().requires_grad_(False)
    weights = dict(two.state_dict())
    for name, x in two.state_dict().items():
        weights[name.replace("context_block", "t5_block").replace("context_embedder", "t5_embedder")] = x
    three.load_state_dict(weights, strict=True)
    inputs = random_input()
    close(three(*inputs), two(*inputs))


def test_third_weight_set_reads_only_the_tokens_after_the_clip_tokens():
    model, (_, _, context, _) = random_model(THREE), random_input(L=5)
    before = model.embed_text(context)
    assert [x.shape[1] for x in before] == [3, 2]
    model.t5_embedder.weight.zero_()
    after = model.embed_text(context)
    assert torch.equal(before[0], after[0]) and far(before[1], after[1])


# ------------------------------------------------------------------------------------------------------------
# Sizes, names, precision
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("depth, billions", [(15, 0.496), (18, 0.856), (24, 2.028), (30, 3.962), (38, 8.057)])
def test_depth_gives_the_papers_sizes(depth, billions):
    """Fig. 8 and Sec. 5.3: depth 24 is the 2B model of SD3 medium, depth 38 with QK-norm the 8B one."""
    config = MMDiTConfig(depth=depth, qk_norm=depth == 38)
    assert (config.hidden_size, config.num_heads) == (64 * depth, depth)
    assert count_parameters(config) / 1e9 == pytest.approx(billions, abs=5.1e-4)


def test_parameters_bear_the_released_names_and_shapes():
    with safe_open(GOLDEN, framework="pt") as file:
        prefix = "model.diffusion_model."
        released = {key.removeprefix(prefix): tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    config = MMDiTConfig(depth=2, dual_attention_layers=1, context_dim=released["context_embedder.weight"][1],
                         pooled_dim=released["y_embedder.mlp.0.weight"][1],
                         pos_embed_max_size=math.isqrt(released["pos_embed"][1]))
    with torch.device("meta"):
        model = MMDiT(config)
    assert {name: tuple(x.shape) for name, x in model.state_dict().items()} == released


def test_bf16_autocast_stays_near_fp32():
    model, inputs = random_model(), random_input()
    exact = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(*inputs)
    assert (rough - exact).square().mean().sqrt() < 0.03 * exact.square().mean().sqrt()


def test_running_mmdit_prints_the_sizes(capsys):
    mmdit.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows[-1] == ["38", "2432", "38", "8.057", "B"] and ["24", "1536", "24", "2.028", "B"] in rows


def test_prepare_serves_times_of_any_precision_and_refuses_a_batch_of_mixed_times():
    model, (latent, _, context, pooled) = random_model(), random_input()
    prepared = model.prepare(context, pooled, [0.7531])                           # not a float32 number
    t = torch.full((len(latent),), 0.7531)
    close(model(latent, t, prepared), model(latent, t, context, pooled))
    with pytest.raises(ValueError, match="one time for the whole batch"):
        model(latent, torch.tensor([0.7531, 0.25]), prepared)


def test_positions_at_a_higher_resolution_lie_where_the_trained_ones_did():
    """Sec. 5.3.2: interpolated within, extended beyond; unchanged at the trained resolution."""
    small, large = released_positions(16, 16), released_positions(192, 64)
    torch.testing.assert_close(stretched_positions(large, 64, 192, 64), large, rtol=0, atol=1e-12)
    torch.testing.assert_close(stretched_positions(small, 4, 16, 4), small, rtol=0, atol=0)
    trained, fine = small[6:10], stretched_positions(small, 4, 20, 8)[6:14]                       # what crop_center takes
    torch.testing.assert_close(fine[::2], trained, rtol=0, atol=0)
    assert fine.diff().unique().tolist() == [0.5] and stretched_positions(small, 4, 20, 8)[0] == 6 - 3
    finest = stretched_positions(stretched_positions(small, 4, 20, 8), 8, 32, 16)[8:24]           # a second time: 256, 512, 1024
    torch.testing.assert_close(finest[::4], trained, rtol=0, atol=0)
    paper = paper_positions(1024, 96)                                          # the paper's grid is the same up to a constant
    ours = stretched_positions(small, 16, 96, 64)
    torch.testing.assert_close(ours - ours[16], paper - paper[16], rtol=0, atol=1e-12)


@pytest.mark.parametrize("depth", [1, 4, 24])
@pytest.mark.parametrize("positions", [released_positions(192, 64), released_positions(128, 128), paper_positions(1024, 96)])
def test_positions_are_read_back_from_a_table(positions, depth):
    """Also from one that was stored in bf16, to a few hundredths of a token."""
    table = sincos_2d(positions, positions, 64 * depth)[None]
    torch.testing.assert_close(positions_of(table.float()), positions, rtol=0, atol=1e-5)
    torch.testing.assert_close(positions_of(table.bfloat16()), positions, rtol=0, atol=0.02)
