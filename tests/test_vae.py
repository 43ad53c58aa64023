"""vae.py: the autoencoder's conventions, losses and measures against closed forms."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open

import vae as module
from vae import (
    VAE,
    AttnBlock,
    ResnetBlock,
    VAEConfig,
    kl_loss,
    make_middle,
    normalize,
    perceptual_loss,
    reconstruction_loss,
    sample_code,
    vae_loss,
)

SMALL = VAEConfig(latent_channels=4, channels=(8, 8, 16, 16), norm_groups=4)
GOLDEN = Path(__file__).parent / "golden" / "g_vae4" / "weights.safetensors"


def rng(seed):
    return torch.Generator().manual_seed(seed)


def small_vae(config=SMALL, seed=0):
    torch.manual_seed(seed)
    return VAE(config).eval()


def picture(B=2, height=32, width=48, seed=1):
    return torch.rand(B, 3, height, width, generator=rng(seed)) * 2 - 1


# ---- Encoder and decoder -------------------------------------------------------------------------

def test_a_latent_position_stands_for_8x8_pixels():
    vae = small_vae()
    mean, logvar = vae.encode_moments(picture())
    assert mean.shape == logvar.shape == (2, 4, 4, 6) and SMALL.downsampling == 8
    assert vae.decode(mean).shape == (2, 3, 32, 48)


def test_a_picture_that_8_does_not_divide_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="image is 36x48 px.*steps of 8.*multiples of 8"):
        small_vae().encode(picture(height=36))


def test_default_sizes_are_those_of_sd3():
    with torch.device("meta"):
        vae = VAE()
    assert sum(p.numel() for p in vae.parameters()) == pytest.approx(83.8e6, abs=0.05e6)
    config = vae.config
    assert (config.latent_channels, config.vae_scale, config.vae_shift) == (16, 1.5305, 0.0609)


def test_parameters_bear_the_released_names_and_shapes_without_quant_conv():
    released = {}
    with safe_open(GOLDEN, framework="pt") as file:
        for key in file.keys():
            name = key.removeprefix("first_stage_model.")
            released[name] = tuple(file.get_slice(key).get_shape())
    with torch.device("meta"):
        vae = VAE(VAEConfig(latent_channels=4, channels=(32, 32, 32, 64)))
    assert {name: tuple(x.shape) for name, x in vae.state_dict().items()} == released
    assert not any("quant_conv" in name for name in released)


def test_attention_is_in_the_two_middles_only():
    where = set()
    for name, part in small_vae().named_modules():
        if isinstance(part, AttnBlock):
            where.add(name)
    assert where == {"encoder.mid.attn_1", "decoder.mid.attn_1"}


def test_downsampling_pads_below_and_to_the_right_only():
    """A kernel of ones on a picture of ones counts the pixels under the window."""
    down = small_vae().requires_grad_(False).encoder.down[0].downsample
    down.conv.weight.zero_()
    down.conv.weight[0, 0] = 1
    down.conv.bias.zero_()
    assert down(torch.ones(1, 8, 4, 4))[0, 0].tolist() == [[9, 6], [6, 4]]


def test_upsampling_repeats_pixels():
    up = small_vae().requires_grad_(False).decoder.up[1].upsample
    up.conv.weight.zero_()
    up.conv.weight[0, 0, 1, 1] = 1
    up.conv.bias.zero_()
    x = torch.tensor([1.0, 2.0]).expand(1, 8, 1, 2)
    assert up(x)[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]


def test_every_group_norm_has_epsilon_1e_6():
    norms = [part for part in small_vae().modules() if isinstance(part, nn.GroupNorm)]
    assert len(norms) > 10 and {norm.eps for norm in norms} == {1e-6}
    small = 1e-3 * torch.tensor([1.0, -1.0]).repeat(32).view(1, 8, 2, 4)      # mean square 1e-6
    expected = small / 1e-3 / math.sqrt(2)                                    # + epsilon 1e-6
    torch.testing.assert_close(ResnetBlock(8, 8, 4).norm1(small), expected, rtol=1e-4, atol=1e-4)


def test_residual_block_is_norm_silu_conv_twice_plus_the_input():
    torch.manual_seed(0)
    block = ResnetBlock(8, 16, 4)
    x = torch.randn(2, 8, 5, 6, generator=rng(2))
    h = block.conv1(F.silu(block.norm1(x)))
    expected = block.nin_shortcut(x) + block.conv2(F.silu(block.norm2(h)))
    torch.testing.assert_close(block(x), expected)
    same = ResnetBlock(8, 8, 4)
    for conv in (same.conv1, same.conv2):
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    assert torch.equal(same(x), x)            # no shortcut convolution where it is not needed


def test_attention_is_one_head_over_all_positions():
    torch.manual_seed(0)
    attention = AttnBlock(8, 4)
    x = torch.randn(1, 8, 3, 5, generator=rng(2))
    q, k, v = (conv(attention.norm(x)).flatten(2)[0].T                        # (15, 8)
               for conv in (attention.q, attention.k, attention.v))
    mixed = torch.softmax(q @ k.T / math.sqrt(8), dim=-1) @ v
    expected = x + attention.proj_out(mixed.T.reshape(1, 8, 3, 5))
    torch.testing.assert_close(attention(x), expected)


def test_the_middle_is_residual_block_attention_residual_block():
    torch.manual_seed(0)
    middle = make_middle(8, 4)
    x = torch.randn(1, 8, 3, 5, generator=rng(2))
    expected = middle.block_2(middle.attn_1(middle.block_1(x)))
    torch.testing.assert_close(middle(x), expected)


def test_the_decoder_runs_from_the_last_level_to_the_first():
    """up.0 is the full resolution in released files; down.0 is too."""
    vae = small_vae()
    seen = []
    for i in range(4):
        vae.encoder.down[i].register_forward_hook(lambda m, x, y, i=i: seen.append(("down", i)))
        vae.decoder.up[i].register_forward_hook(lambda m, x, y, i=i: seen.append(("up", i)))
    vae.decode(vae.encode(picture()))
    down, up = [("down", i) for i in (0, 1, 2, 3)], [("up", i) for i in (3, 2, 1, 0)]
    assert seen == down + up


def test_decoder_ends_in_silu_and_a_convolution_without_tanh():
    vae = small_vae().requires_grad_(False)
    code = torch.randn(1, 4, 4, 6, generator=rng(3))
    seen = []
    vae.decoder.norm_out.register_forward_hook(lambda m, x, output: seen.append(output))
    image = vae.decoder(code)
    torch.testing.assert_close(image, vae.decoder.conv_out(F.silu(seen[0])))
    vae.decoder.conv_out.weight.mul_(100)
    vae.decoder.conv_out.bias.mul_(100)
    torch.testing.assert_close(vae.decoder(code), 100 * image, rtol=1e-4, atol=1e-3)
    assert vae.decoder(code).abs().max() > 1                                  # nothing is clamped


def test_moments_are_the_mean_then_the_clamped_log_variance():
    vae = small_vae().requires_grad_(False)
    vae.encoder.conv_out.weight.zero_()
    for bias, expected in ((-2.0, -2.0), (1e3, 20.0), (-1e3, -30.0)):
        vae.encoder.conv_out.bias.copy_(torch.tensor([100.0] * 4 + [bias] * 4))
        mean, logvar = vae.encode_moments(picture(B=1, height=8, width=8))
        assert (mean == 100).all() and (logvar == expected).all()             # the mean stays


# ---- The code: sampling and normalisation --------------------------------------------------------

def test_deterministic_encoding_is_the_normalised_mean():
    vae, image = small_vae(), picture()
    mean, _ = vae.encode_moments(image)
    assert torch.equal(vae.encode(image), normalize(mean, vae.config))


def test_log_variance_is_twice_the_log_of_the_standard_deviation():
    mean, noise = torch.tensor([1.0, 1.0]), torch.tensor([1.0, -2.0])
    logvar = torch.full((2,), math.log(4.0))
    assert sample_code(mean, logvar, noise).tolist() == pytest.approx([3, -3])
    assert torch.equal(sample_code(mean, logvar), mean)


def test_normalisation_subtracts_then_scales_and_its_inverse_undoes_it():
    """SD3: (code - 0.0609) * 1.5305, App. B.2. Another model brings its own two numbers."""
    sd3, other = VAEConfig(), replace(SMALL, vae_scale=2.0, vae_shift=-1.0)
    assert normalize(torch.tensor(0.0609), sd3).item() == 0
    assert normalize(torch.tensor(1.0609), sd3).item() == pytest.approx(1.5305, rel=1e-6)
    assert normalize(torch.tensor(0.0), other).item() == 2
    vae = small_vae(other)
    code = torch.randn(2, 4, 3, 3, generator=rng(7))
    torch.testing.assert_close(vae.decode(normalize(code, other)), vae.decoder(code))


# ---- Losses --------------------------------------------------------------------------------------

def test_kl_is_the_closed_form_between_gaussians():
    mean, logvar = torch.randn(2, 3, 4, 4, 4, generator=rng(0))
    code = torch.distributions.Normal(mean, torch.exp(logvar / 2))
    expected = torch.distributions.kl_divergence(code, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(kl_loss(mean, logvar), expected.mean())
    zero = torch.zeros(1, 4, 2, 2)
    assert kl_loss(zero, zero).item() == 0
    assert kl_loss(zero + 1, zero).item() == 0.5                              # mean^2 / 2


def test_reconstruction_loss_is_the_mean_absolute_difference():
    image = torch.zeros(1, 3, 4, 4)
    assert reconstruction_loss(image, image - 0.5).item() == 0.5
    assert reconstruction_loss(image, image + 0.25).item() == 0.25


def feature_maps(image):
    """Any frozen network: here the picture itself and a coarser copy, as maps."""
    return [image, F.avg_pool2d(image, 4)]


def test_perceptual_loss_compares_directions_of_feature_vectors():
    """Features of unit length: opposite vectors are 2 apart, squared 4, whatever their size."""
    image, other = picture(seed=1), picture(seed=2)
    assert perceptual_loss(image, image, feature_maps).item() == 0

    def opposite(x):                                   # two layers: maps and a sequence of tokens
        sign = 100.0 if x is image else -1.0
        return [sign * torch.ones(2, 5, 3, 4), sign * torch.ones(2, 7, 5)]

    def tokens(x):                                     # the first pair agrees, the second does not
        if x is image:
            return [torch.tensor([[[1.0, 0.0], [0.0, 3.0]]])]
        return [torch.tensor([[[2.0, 0.0], [5.0, 0.0]]])]

    assert perceptual_loss(image, other, opposite).item() == pytest.approx(8)
    assert perceptual_loss(image, other, tokens).item() == pytest.approx(1)   # mean of 0 and 2


def test_vae_loss_is_the_weighted_sum_of_its_terms():
    vae, image = small_vae(), picture()
    noise = torch.randn(2, 4, 4, 6, generator=rng(0))
    loss, terms, reconstruction = vae_loss(vae, image, noise, kl_weight=0.3)
    mean, logvar = vae.encode_moments(image)
    expected = vae.decoder(mean + torch.exp(logvar / 2) * noise)
    torch.testing.assert_close(reconstruction, expected)
    absolute = (expected - image).abs().mean()
    torch.testing.assert_close(loss, absolute + 0.3 * kl_loss(mean, logvar))
    assert set(terms) == {"reconstruction", "kl"}
    loss, _, _ = vae_loss(vae, image, noise)
    torch.testing.assert_close(loss, absolute + 2e-4 * kl_loss(mean, logvar))


def test_the_demonstration_shows_the_latents_of_table_3(capsys):
    module.main()
    printed = capsys.readouterr().out
    for channels, times in ((4, 48), (8, 24), (16, 12)):
        assert f"(1, 3, 256, 256) -> (1, {channels}, 32, 32), {times} times fewer" in printed
