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
    Downsample,
    PatchDiscriminator,
    ResnetBlock,
    Upsample,
    VAEConfig,
    VAELossConfig,
    adaptive_gan_weight,
    denormalize,
    discriminator_hinge_loss,
    generator_hinge_loss,
    kl_loss,
    make_middle,
    normalize,
    perceptual_loss,
    psnr,
    reconstruction_loss,
    sample_code,
    ssim,
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
    norms = []
    for network in (small_vae(), PatchDiscriminator(8, groups=4)):
        norms += [part for part in network.modules() if isinstance(part, nn.GroupNorm)]
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
    assert torch.equal(vae.encode(image), vae.normalize(mean))


def test_sampled_encoding_is_mean_plus_std_times_noise_from_the_generator():
    vae, image = small_vae(), picture()
    mean, logvar = vae.encode_moments(image)
    noise = torch.randn(mean.shape, generator=rng(5))
    expected = vae.normalize(mean + torch.exp(logvar / 2) * noise)
    torch.testing.assert_close(vae.encode(image, rng(5)), expected)
    assert not torch.equal(vae.encode(image, rng(5)), vae.encode(image, rng(6)))


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
    assert denormalize(torch.tensor(2.0), other).item() == 0
    vae = small_vae(other)
    code = torch.randn(2, 4, 3, 3, generator=rng(7))
    assert torch.equal(vae.normalize(code), normalize(code, other))
    torch.testing.assert_close(vae.denormalize(vae.normalize(code)), code)
    torch.testing.assert_close(vae.decode(vae.normalize(code)), vae.decoder(code))


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


@pytest.mark.parametrize("real, fake, expected", [
    ([1.0, 3.0], [-1.0, -7.0], 0),                     # beyond the margins: nothing to learn
    ([0.0], [0.0], 1),
    ([-1.0], [2.0], 0.5 * (2 + 3)),
    ([0.0, 2.0], [-1.0], 0.5 * 0.5),
])
def test_discriminator_hinge_stops_at_the_margins(real, fake, expected):
    loss = discriminator_hinge_loss(torch.tensor(real), torch.tensor(fake))
    assert loss.item() == pytest.approx(expected)


def test_generator_hinge_is_minus_the_mean_logit():
    assert generator_hinge_loss(torch.tensor([1.0, 5.0])).item() == -3


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    weight, a, b = (torch.randn(4, 4, generator=rng(seed)) for seed in range(3))
    weight.requires_grad_(True)
    balance = adaptive_gan_weight(3 * (weight * a).sum(), -0.5 * (weight * b).sum(), weight)
    assert balance.item() == pytest.approx((3 * a.norm() / (0.5 * b.norm())).item(), rel=1e-3)
    assert not balance.requires_grad
    unopposed = adaptive_gan_weight((weight * a).sum(), 0 * weight.sum(), weight, largest=10.0)
    assert unopposed.item() == 10


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


def test_discriminator_judges_patches_of_8x8_pixels():
    assert PatchDiscriminator(channels=8, groups=4)(picture()).shape == (2, 1, 4, 6)


def test_vae_loss_is_the_weighted_sum_of_its_terms():
    vae, image = small_vae(), picture()
    noise = torch.randn(2, 4, 4, 6, generator=rng(0))
    torch.manual_seed(1)
    discriminator = PatchDiscriminator(channels=8, groups=4)
    config = VAELossConfig(kl_weight=0.3, perceptual_weight=0.7, gan_weight=0.1)
    loss, terms, reconstruction = vae_loss(vae, image, noise, config, feature_maps, discriminator)
    mean, logvar = vae.encode_moments(image)
    expected = vae.decoder(mean + torch.exp(logvar / 2) * noise)
    torch.testing.assert_close(reconstruction, expected)
    perceptual = perceptual_loss(image, expected, feature_maps)
    fidelity = (expected - image).abs().mean() + 0.7 * perceptual
    gan = -discriminator(expected).mean()
    balance = adaptive_gan_weight(fidelity, gan, vae.decoder.conv_out.weight)
    torch.testing.assert_close(loss, fidelity + 0.3 * kl_loss(mean, logvar) + 0.1 * balance * gan)
    assert set(terms) == {"reconstruction", "perceptual", "kl", "gan"}
    assert not any(term.requires_grad for term in terms.values())
    loss, plain, _ = vae_loss(vae, image, noise)
    assert set(plain) == {"reconstruction", "kl"}
    torch.testing.assert_close(loss.detach(), plain["reconstruction"] + 2e-4 * plain["kl"])


# ---- Measures of Table 3 -------------------------------------------------------------------------

def test_psnr_is_its_closed_form_per_picture():
    """An error of 0.2 in [-1, 1] is 0.1 in [0, 1]: 20 dB. What lies beyond white is white."""
    image = torch.zeros(3, 3, 8, 8)
    reconstruction = torch.stack([image[0] + 0.2, image[1] - 0.02, image[2]])
    assert psnr(image, reconstruction).tolist() == pytest.approx([20, 40, 100], abs=1e-3)
    assert psnr(image + 1, image + 1.5).tolist() == pytest.approx([100] * 3)


def naive_ssim(x, y):
    """Wang et al. 2004, Eq. 13, window by window, for one channel in [0, 1] as nested lists."""
    total = count = 0
    weights = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
    norm = sum(weights) ** 2
    for top in range(len(x) - 10):
        for left in range(len(x[0]) - 10):
            sums = dict.fromkeys(("x", "y", "xx", "yy", "xy"), 0.0)
            for i in range(11):
                for j in range(11):
                    w = weights[i] * weights[j] / norm
                    a, b = x[top + i][left + j], y[top + i][left + j]
                    for name, value in (("x", a), ("y", b), ("xx", a * a), ("yy", b * b),
                                        ("xy", a * b)):
                        sums[name] += w * value
            m, n = sums["x"], sums["y"]
            above = (2 * m * n + 0.01**2) * (2 * (sums["xy"] - m * n) + 0.03**2)
            spread = sums["xx"] - m * m + sums["yy"] - n * n
            total += above / ((m * m + n * n + 0.01**2) * (spread + 0.03**2))
            count += 1
    return total / count


def test_ssim_is_that_of_wang_et_al_by_hand():
    image = picture(height=13, width=15)
    reconstruction = (0.7 * image + 0.5 * picture(height=13, width=15, seed=3)).clamp(-1, 1)
    for i in range(2):
        expected = 0.0
        for channel in range(3):
            x = ((image[i, channel] + 1) / 2).tolist()
            y = ((reconstruction[i, channel] + 1) / 2).tolist()
            expected += naive_ssim(x, y) / 3
        assert ssim(image, reconstruction)[i].item() == pytest.approx(expected, abs=1e-4)


def test_ssim_of_flat_pictures_compares_their_brightness_only():
    """Grey x against grey y in [0, 1]: (2xy + .0001) / (x^2 + y^2 + .0001). White is the limit."""
    image = torch.zeros(3, 3, 16, 16)                                         # x = 0.5
    other = torch.stack([image[0], image[1] + 0.4, image[2] + 7.0])           # y = 0.5, 0.7, 1
    expected = [1, (0.7 + 1e-4) / (0.74 + 1e-4), (1 + 1e-4) / (1.25 + 1e-4)]
    assert ssim(image, other).tolist() == pytest.approx(expected, abs=1e-5)


def test_the_demonstration_says_what_the_measures_see(capsys):
    """0.2 brighter and noise of 0.2 have the same PSNR of 20 dB, and SSIM tells them apart."""
    module.main()
    printed = capsys.readouterr().out
    assert "(1, 16, 32, 32), 12 times fewer" in printed
    assert "brighter PSNR 20.00 dB" in printed and "noisy    PSNR 20." in printed
