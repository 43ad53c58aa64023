"""vae.py: the autoencoder's conventions, its losses against closed forms, and the classic mistakes."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open

from vae import (
    VAE,
    AttnBlock,
    Downsample,
    Middle,
    PatchDiscriminator,
    ResnetBlock,
    Upsample,
    VAEConfig,
    VAELossConfig,
    adaptive_gan_weight,
    discriminator_hinge_loss,
    generator_hinge_loss,
    kl_loss,
    perceptual_loss,
    psnr,
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


# ------------------------------------------------------------------------------------------------------------
# Encoder and decoder
# ------------------------------------------------------------------------------------------------------------

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
    assert (vae.config.latent_channels, vae.config.vae_scale, vae.config.vae_shift) == (16, 1.5305, 0.0609)


def test_parameters_bear_the_released_names_and_shapes_without_quant_conv():
    with safe_open(GOLDEN, framework="pt") as file:
        released = {key.removeprefix("first_stage_model."): tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    with torch.device("meta"):
        vae = VAE(VAEConfig(latent_channels=4, channels=(32, 32, 32, 64)))
    assert {name: tuple(x.shape) for name, x in vae.state_dict().items()} == released
    assert not any("quant_conv" in name for name in released)


def test_attention_is_in_the_two_middles_only():
    vae = small_vae()
    where = {name for name, module in vae.named_modules() if isinstance(module, AttnBlock)}
    assert where == {"encoder.mid.attn_1", "decoder.mid.attn_1"}


def test_downsampling_pads_below_and_to_the_right_only():
    """A kernel of ones on a picture of ones counts the pixels under the window: all nine at the top left."""
    down = Downsample(1).requires_grad_(False)
    down.conv.weight.fill_(1)
    down.conv.bias.zero_()
    assert down(torch.ones(1, 1, 4, 4))[0, 0].tolist() == [[9, 6], [6, 4]]


def test_upsampling_repeats_pixels():
    up = Upsample(1).requires_grad_(False)
    up.conv.weight.zero_()
    up.conv.weight[0, 0, 1, 1] = 1
    up.conv.bias.zero_()
    assert up(torch.tensor([[[[1.0, 2.0]]]]))[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]


def test_every_group_norm_has_epsilon_1e_6():
    norms = [m for net in (small_vae(), PatchDiscriminator(8, groups=4)) for m in net.modules() if isinstance(m, nn.GroupNorm)]
    assert len(norms) > 10 and {norm.eps for norm in norms} == {1e-6}
    block = ResnetBlock(8, 8, 4)
    small = 1e-3 * torch.tensor([1.0, -1.0]).repeat(32).view(1, 8, 2, 4)          # mean square 1e-6: halved by the epsilon
    torch.testing.assert_close(block.norm1(small), small / 1e-3 / math.sqrt(2), rtol=1e-4, atol=1e-4)


def test_residual_block_is_norm_silu_conv_twice_plus_the_input():
    torch.manual_seed(0)
    block, x = ResnetBlock(8, 16, 4), torch.randn(2, 8, 5, 6, generator=rng(2))
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
    attention, x = AttnBlock(8, 4), torch.randn(1, 8, 3, 5, generator=rng(2))
    q, k, v = (conv(attention.norm(x)).flatten(2)[0].T for conv in (attention.q, attention.k, attention.v))      # (15, 8)
    mixed = torch.softmax(q @ k.T / math.sqrt(8), dim=-1) @ v
    torch.testing.assert_close(attention(x), x + attention.proj_out(mixed.T.reshape(1, 8, 3, 5)))


def test_decoder_ends_in_silu_and_a_convolution_without_tanh():
    vae = small_vae().requires_grad_(False)
    code, seen = torch.randn(1, 4, 4, 6, generator=rng(3)), []
    vae.decoder.norm_out.register_forward_hook(lambda module, inputs, output: seen.append(output))
    image = vae.decoder(code)
    torch.testing.assert_close(image, vae.decoder.conv_out(F.silu(seen[0])))
    vae.decoder.conv_out.weight.mul_(100)
    vae.decoder.conv_out.bias.mul_(100)
    torch.testing.assert_close(vae.decoder(code), 100 * image, rtol=1e-4, atol=1e-3)      # no squashing, no clamping
    assert vae.decoder(code).abs().max() > 1


def test_moments_are_the_mean_then_the_clamped_log_variance():
    vae = small_vae().requires_grad_(False)
    vae.encoder.conv_out.weight.zero_()
    for bias, expected in ((-2.0, -2.0), (1e3, 20.0), (-1e3, -30.0)):
        vae.encoder.conv_out.bias.copy_(torch.tensor([100.0] * 4 + [bias] * 4))
        mean, logvar = vae.encode_moments(picture(B=1, height=8, width=8))
        assert (mean == 100).all() and (logvar == expected).all()                 # the mean is not clamped


def test_the_middle_is_residual_block_attention_residual_block():
    torch.manual_seed(0)
    middle, x = Middle(8, 4), torch.randn(1, 8, 3, 5, generator=rng(2))
    torch.testing.assert_close(middle(x), middle.block_2(middle.attn_1(middle.block_1(x))))


# ------------------------------------------------------------------------------------------------------------
# The code: sampling and normalisation
# ------------------------------------------------------------------------------------------------------------

def test_deterministic_encoding_is_the_normalised_mean():
    vae, image = small_vae(), picture()
    mean, _ = vae.encode_moments(image)
    assert torch.equal(vae.encode(image), vae.normalize(mean))
    assert torch.equal(vae.encode(image), vae.encode(image))


def test_sampled_encoding_is_mean_plus_std_times_noise_from_the_generator():
    vae, image = small_vae(), picture()
    mean, logvar = vae.encode_moments(image)
    noise = torch.randn(mean.shape, generator=rng(5))
    torch.testing.assert_close(vae.encode(image, rng(5)), vae.normalize(mean + torch.exp(logvar / 2) * noise))
    assert torch.equal(vae.encode(image, rng(5)), vae.encode(image, rng(5)))
    assert not torch.equal(vae.encode(image, rng(5)), vae.encode(image, rng(6)))


def test_log_variance_is_twice_the_log_of_the_standard_deviation():
    mean, noise = torch.tensor([1.0, 1.0]), torch.tensor([1.0, -2.0])
    assert sample_code(mean, torch.full((2,), math.log(4.0)), noise).tolist() == pytest.approx([3, -3])
    assert torch.equal(sample_code(mean, torch.full((2,), math.log(4.0))), mean)


def test_normalisation_subtracts_then_scales_and_its_inverse_undoes_it():
    """SD3: (code - 0.0609) * 1.5305, App. B.2."""
    vae = small_vae()
    assert vae.normalize(torch.tensor(0.0609)).item() == 0
    assert vae.normalize(torch.tensor(1.0609)).item() == pytest.approx(1.5305, rel=1e-6)
    code = torch.randn(2, 4, 3, 3, generator=rng(7))
    torch.testing.assert_close(vae.denormalize(vae.normalize(code)), code)
    torch.testing.assert_close(vae.decode(vae.normalize(code)), vae.decoder(code), rtol=1e-4, atol=1e-5)


def test_normalisation_is_the_models_own():
    vae = small_vae(replace(SMALL, vae_scale=2.0, vae_shift=-1.0))
    assert vae.normalize(torch.tensor(0.0)).item() == 2 and vae.denormalize(torch.tensor(2.0)).item() == 0


# ------------------------------------------------------------------------------------------------------------
# Losses
# ------------------------------------------------------------------------------------------------------------

def test_kl_is_the_closed_form_between_gaussians():
    generator = rng(0)
    mean, logvar = torch.randn(2, 3, 4, 4, 4, generator=generator)
    p, q = torch.distributions.Normal(mean, torch.exp(logvar / 2)), torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(kl_loss(mean, logvar), torch.distributions.kl_divergence(p, q).mean())
    zero = torch.zeros(1, 4, 2, 2)
    assert kl_loss(zero, zero).item() == 0
    assert kl_loss(zero + 1, zero).item() == 0.5                                  # mean^2 / 2


def test_reconstruction_is_mean_absolute_or_mean_square():
    image, reconstruction = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), -0.5)
    assert reconstruction_loss(image, reconstruction, "l1").item() == 0.5
    assert reconstruction_loss(image, reconstruction, "l2").item() == 0.25
    with pytest.raises(ValueError, match="'huber'"):
        reconstruction_loss(image, reconstruction, "huber")


def test_discriminator_hinge_stops_at_the_margins():
    hinge = lambda real, fake: discriminator_hinge_loss(torch.tensor(real), torch.tensor(fake)).item()
    assert hinge([1.0, 3.0], [-1.0, -7.0]) == 0                                   # right beyond the margin: nothing to learn
    assert hinge([0.0], [0.0]) == 1
    assert hinge([-1.0], [2.0]) == pytest.approx(0.5 * (2 + 3))
    assert hinge([0.0, 2.0], [-1.0]) == pytest.approx(0.5 * 0.5)


def test_generator_hinge_is_minus_the_mean_logit():
    assert generator_hinge_loss(torch.tensor([1.0, 5.0])).item() == -3


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    weight, a, b = (torch.randn(4, 4, generator=rng(seed)) for seed in range(3))
    weight.requires_grad_(True)
    balance = adaptive_gan_weight(3 * (weight * a).sum(), -0.5 * (weight * b).sum(), weight)
    assert balance.item() == pytest.approx((3 * a.norm() / (0.5 * b.norm())).item(), rel=1e-3)
    assert not balance.requires_grad
    assert adaptive_gan_weight((weight * a).sum(), 0 * weight.sum(), weight, largest=10.0).item() == 10


def feature_maps(image):
    """Any frozen network: here the picture itself and a coarser copy, as maps."""
    return [image, F.avg_pool2d(image, 4)]


def test_perceptual_loss_of_equal_pictures_is_zero_and_of_others_is_not():
    image, other = picture(seed=1), picture(seed=2)
    assert perceptual_loss(image, image, feature_maps).item() == 0
    assert perceptual_loss(image, other, feature_maps).item() > 0.1


def test_perceptual_loss_compares_directions_of_feature_vectors():
    """Features of unit length: opposite vectors are 2 apart, squared 4, whatever their size; layers add up."""
    image, zero = picture(), torch.zeros(1)
    maps = lambda sign, scale: lambda x: [sign(x) * scale * torch.ones(2, 5, 3, 4), sign(x) * torch.ones(2, 7, 5)]
    sign = lambda x: 1.0 if x is image else -1.0
    for scale in (1.0, 100.0):
        assert perceptual_loss(image, zero, maps(sign, scale)).item() == pytest.approx(8)
    tokens = lambda x: [torch.tensor([[[1.0, 0.0], [0.0, 3.0]]]) if x is image else torch.tensor([[[2.0, 0.0], [5.0, 0.0]]])]
    assert perceptual_loss(image, zero, tokens).item() == pytest.approx(1)        # tokens: 0 and 2 apart, mean 1


def test_discriminator_judges_patches_of_8x8_pixels():
    assert PatchDiscriminator(channels=8, groups=4)(picture()).shape == (2, 1, 4, 6)


def test_vae_loss_is_the_weighted_sum_of_its_terms():
    vae, image = small_vae(), picture()
    noise = torch.randn(2, 4, 4, 6, generator=rng(0))
    torch.manual_seed(1)
    discriminator = PatchDiscriminator(channels=8, groups=4)
    config = VAELossConfig("l2", kl_weight=0.3, perceptual_weight=0.7, gan_weight=0.1)
    loss, terms, reconstruction = vae_loss(vae, image, noise, config, feature_maps, discriminator)
    mean, logvar = vae.encode_moments(image)
    expected = vae.decoder(mean + torch.exp(logvar / 2) * noise)
    torch.testing.assert_close(reconstruction, expected)
    fidelity = (expected - image).square().mean() + 0.7 * perceptual_loss(image, expected, feature_maps)
    gan = -discriminator(expected).mean()
    balance = adaptive_gan_weight(fidelity, gan, vae.decoder.conv_out.weight)
    torch.testing.assert_close(loss, fidelity + 0.3 * kl_loss(mean, logvar) + 0.1 * balance * gan)
    assert set(terms) == {"reconstruction", "perceptual", "kl", "gan"}
    assert not any(term.requires_grad for term in terms.values())
    _, plain, _ = vae_loss(vae, image, noise)
    assert set(plain) == {"reconstruction", "kl"}
    torch.testing.assert_close(plain["reconstruction"], (expected - image).abs().mean().detach())


def test_a_few_steps_of_vae_loss_make_the_reconstruction_better():
    vae, image = small_vae().train(), picture(B=1, height=16, width=16)
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    noise = torch.zeros(1, 4, 2, 2)
    losses = []
    for _ in range(20):
        loss, terms, _ = vae_loss(vae, image, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(terms["reconstruction"].item())
    assert losses[-1] < 0.8 * losses[0]


def test_psnr_is_its_closed_form_per_picture():
    """An error of 0.2 in [-1, 1] is 0.1 in [0, 1]: 20 dB."""
    image = torch.zeros(3, 3, 8, 8)
    reconstruction = torch.stack([image[0] + 0.2, image[1] - 0.02, image[2]])
    assert psnr(image, reconstruction).tolist() == pytest.approx([20, 40, 100], abs=1e-3)      # 100: no difference
    assert psnr(image + 1, image + 1.5).tolist() == pytest.approx([100] * 3)      # what lies beyond white is white


# ------------------------------------------------------------------------------------------------------------
# Tiles
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config, tile", [
    (SMALL, 32), (SMALL, 256), (VAEConfig(latent_channels=4, channels=(16, 16, 32), norm_groups=8), 24)], ids=str)
def test_decoding_in_tiles_is_decoding_at_once(config, tile):
    """Exact, because group norms see the whole picture and margins are as wide as the convolutions see."""
    vae, latent = small_vae(config), torch.randn(2, config.latent_channels, 21, 11, generator=rng(0))
    with torch.no_grad():
        torch.testing.assert_close(vae.decode(latent, tile), vae.decode(latent), rtol=1e-4, atol=1e-5)


def test_tiles_that_norm_themselves_would_show(monkeypatch):
    """The test above can fail: with the moments of the tile alone the picture is another."""
    vae, latent = small_vae(), torch.randn(1, SMALL.latent_channels, 16, 24, generator=rng(0))
    monkeypatch.setattr("vae.normalize_part", lambda norm, x, mean, square: torch.nn.functional.silu(norm(x)))
    with torch.no_grad():
        assert (vae.decode(latent, 64) - vae.decode(latent)).abs().max() > 1e-3


def test_a_tile_that_is_no_multiple_of_8_is_refused():
    with pytest.raises(ValueError, match="tile is 20 px; give a positive multiple of 8"):
        small_vae().decode(torch.zeros(1, SMALL.latent_channels, 4, 4), 20)
