"""experiments/table3_fig10_autoencoders.py: the adversary by closed forms, measures, one run."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from checkpoints import load_components
from text_encoders import ENCODERS
from vae import VAE, VAEConfig, kl_loss

FILE = Path(__file__).parent.parent / "experiments" / "table3_fig10_autoencoders.py"
spec = importlib.util.spec_from_file_location("table3", FILE)
table3 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(table3)

SMALL = VAEConfig(latent_channels=4, channels=(8, 8, 16, 16), norm_groups=4)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def feature_maps(image):
    return [image, F.avg_pool2d(image, 4)]


@pytest.mark.parametrize("real, fake, expected", [
    ([1.0, 3.0], [-1.0, -7.0], 0),                     # beyond the margins: nothing to learn
    ([0.0], [0.0], 1),
    ([-1.0], [2.0], 0.5 * (2 + 3)),
    ([0.0, 2.0], [-1.0], 0.5 * 0.5),
])
def test_discriminator_hinge_stops_at_the_margins(real, fake, expected):
    loss = table3.discriminator_hinge_loss(torch.tensor(real), torch.tensor(fake))
    assert loss.item() == pytest.approx(expected)


def test_generator_hinge_is_minus_the_mean_logit():
    assert table3.generator_hinge_loss(torch.tensor([1.0, 5.0])).item() == -3


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    weight, a, b = (torch.randn(4, 4, generator=rng(seed)) for seed in range(3))
    weight.requires_grad_(True)
    fidelity, gan = 3 * (weight * a).sum(), -0.5 * (weight * b).sum()
    balance = table3.adaptive_gan_weight(fidelity, gan, weight)
    assert balance.item() == pytest.approx((3 * a.norm() / (0.5 * b.norm())).item(), rel=1e-3)
    assert not balance.requires_grad
    assert table3.adaptive_gan_weight(fidelity, 0 * weight.sum(), weight, 10.0).item() == 10


def test_discriminator_judges_patches_of_8x8_pixels_with_the_released_epsilon():
    discriminator = table3.PatchDiscriminator(channels=8, groups=4)
    assert discriminator(torch.zeros(2, 3, 32, 48)).shape == (2, 1, 4, 6)
    norms = [part for part in discriminator if isinstance(part, nn.GroupNorm)]
    assert len(norms) == 2 and {norm.eps for norm in norms} == {1e-6}


def test_the_objective_adds_the_adversary_after_the_discriminators_step():
    torch.manual_seed(0)
    vae = VAE(SMALL)
    discriminator = table3.PatchDiscriminator(8, groups=4)
    image = torch.rand(2, 3, 16, 16, generator=rng(1)) * 2 - 1
    noise = torch.randn(2, 4, 2, 2, generator=rng(2))
    mean, logvar = vae.encode_moments(image)
    reconstruction = vae.decoder(mean + torch.exp(logvar / 2) * noise)
    plain = (reconstruction - image).abs().mean() + 2e-4 * kl_loss(mean, logvar)
    losses = table3.Objective(2e-4)(vae, (image, noise))
    assert losses.shape == (2,)
    torch.testing.assert_close(losses.mean(), plain)

    before = table3.discriminator_hinge_loss(discriminator(image), discriminator(reconstruction))
    objective = table3.Objective(2e-4, 0.5, discriminator)
    loss = objective(vae, (image, noise)).mean()
    after = table3.discriminator_hinge_loss(discriminator(image), discriminator(reconstruction))
    assert after < before                                   # it learned from this batch
    gan = -discriminator(reconstruction).mean()
    balance = table3.adaptive_gan_weight(plain, gan, vae.decoder.conv_out.weight)
    torch.testing.assert_close(loss, plain + 0.5 * balance * gan)
    loss.backward()                                         # nothing was overwritten


class Tower(nn.Module):
    """Stands for CLIP's image tower."""

    def features(self, image):
        return feature_maps(image)

    def forward(self, image):
        return F.adaptive_avg_pool2d(image, 1).flatten(1)


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
    image = torch.randn(2, 3, 13, 15, generator=rng(0)).clamp(-1, 1)
    other = torch.randn(2, 3, 13, 15, generator=rng(3)).clamp(-1, 1)
    reconstruction = (0.7 * image + 0.5 * other).clamp(-1, 1)
    for i in range(2):
        expected = 0.0
        for channel in range(3):
            x = ((image[i, channel] + 1) / 2).tolist()
            y = ((reconstruction[i, channel] + 1) / 2).tolist()
            expected += naive_ssim(x, y) / 3
        assert table3.ssim(image, reconstruction)[i].item() == pytest.approx(expected, abs=1e-4)


def test_ssim_of_flat_pictures_compares_their_brightness_only():
    """Grey x against grey y in [0, 1]: (2xy + .0001) / (x^2 + y^2 + .0001). White is the limit."""
    image = torch.zeros(3, 3, 16, 16)                                         # x = 0.5
    other = torch.stack([image[0], image[1] + 0.4, image[2] + 7.0])           # y = 0.5, 0.7, 1
    expected = [1, (0.7 + 1e-4) / (0.74 + 1e-4), (1 + 1e-4) / (1.25 + 1e-4)]
    assert table3.ssim(image, other).tolist() == pytest.approx(expected, abs=1e-5)


def test_measures_are_those_of_the_reconstructions():
    """A decoder that always gives grey: against grey 0.2 brighter, 20 dB; equal means, FID 0."""
    vae = VAE(SMALL).requires_grad_(False)
    vae.decoder.conv_out.weight.zero_()
    vae.decoder.conv_out.bias.fill_(0.2)
    images = torch.zeros(2, 3, 16, 24)
    images[1] += 0.4                                                          # 0.2 on either side
    numbers, by_picture, reconstructions = table3.measure(vae, images, Tower())
    assert reconstructions.shape == images.shape
    assert by_picture["psnr"].tolist() == pytest.approx([20, 20], abs=1e-3)
    assert numbers["psnr"] == pytest.approx(20, abs=1e-3)
    brightness = [(0.6 + 1e-4) / (0.61 + 1e-4), (0.84 + 1e-4) / (0.85 + 1e-4)]
    assert by_picture["ssim"].tolist() == pytest.approx(brightness, abs=1e-5)
    assert numbers["fid"] == pytest.approx(3 * 2 * 0.2**2, rel=1e-3)          # trace of the first


def test_latents_are_normalised_by_their_own_mean_and_deviation():
    """App. B.2. The code is the mean colour of 8 x 8 px here, times 3, plus 2."""
    class Encoder(nn.Module):
        def forward(self, image):
            code = 3 * F.avg_pool2d(image, 8) + 2                             # (B, 3, H, W)
            return torch.cat([code, torch.zeros_like(code)], dim=1)

    vae = VAE(VAEConfig(3, channels=(8, 8, 8, 8), norm_groups=4))
    vae.encoder = Encoder()
    pictures = torch.rand(40, 3, 16, 16, generator=rng(0))
    latent = table3.normalised(vae, pictures).encode(pictures)
    assert latent.mean().item() == pytest.approx(0, abs=1e-5)
    assert latent.std().item() == pytest.approx(1, abs=1e-5)
    assert vae.config.vae_shift == pytest.approx(2 + 3 * pictures.mean().item(), abs=1e-4)


def test_unseen_pictures_are_not_trained_on(tmp_path):
    """Scenes have two seeds; of a folder, the last pictures are kept apart."""
    options = table3.Options(num_train=12, num_test=11, channels=(16, 4, 8, 8))
    assert options.channels == (4, 8, 16)
    with pytest.raises(ValueError, match="--channels needs two numbers"):
        table3.Options(channels=(16, 16))
    training, test, captions = table3.read_pictures(options)
    assert len(training) == 12 and len(test) == len(captions) == 11
    assert not (training[:11] == test).flatten(1).all(dim=1).any()
    for index in range(14):
        picture = Image.new("RGB", (8, 8), (10 * index, 0, 0))
        picture.save(tmp_path / f"{index:02}.png")
        (tmp_path / f"{index:02}.txt").write_text(f"red {index}")
    training, test, captions = table3.read_pictures(table3.replace(options, data=str(tmp_path)))
    reds = ((training[:, 0, 0, 0] + 1) * 127.5).round().tolist()
    assert reds == [0, 10, 20] and captions == [f"red {index}" for index in range(3, 14)]
    assert test[0, 0, 0, 0].item() == pytest.approx(30 / 127.5 - 1)
    with pytest.raises(ValueError, match="14 pictures; --num-test 13 leaves too few"):
        table3.read_pictures(table3.replace(options, data=str(tmp_path), num_test=13))


def numbers(fid, perceptual, ssim, psnr):
    return dict(zip(table3.MEASURES, (fid, perceptual, ssim, psnr), strict=True))


def test_channel_claims_by_hand():
    """Less FID and distance, more SSIM and PSNR; a pair that contradicts decides nothing alone."""
    table = {4: numbers(3.0, 0.5, 0.7, 20.0), 8: numbers(2.0, 0.4, 0.8, 22.0),
             16: numbers(2.5, 0.3, 0.9, 21.0)}
    by_picture = {}
    for channels, row in table.items():
        by_picture[channels] = {}
        for name in ("perceptual", "ssim", "psnr"):
            spread = torch.tensor([-1.0, 1.0]).repeat(50) * 1e-3 * channels
            by_picture[channels][name] = row[name] + spread
    verdicts = []
    for row in table3.channel_claims(table, by_picture, (4, 8, 16)):
        verdicts.append(row["verdict"])
    assert verdicts == ["cannot be told", "held", "held", "cannot be told"]
    row = table3.channel_claims(table, by_picture, (4, 8, 16))[0]
    assert (row["paper"], row["here"]) == ("2.41 / 1.56 / 1.06", "3 / 2 / 2.5")
    falling = {8: table[8], 4: table[4]}
    assert table3.channel_claims(falling, by_picture, (8, 4))[3]["verdict"] == (
        "did not hold at this size")


def test_the_lead_is_a_paired_interval():
    """Differences 1 and 3: mean 2, deviation sqrt 2, so 2 +- 1.96."""
    worse, better = torch.tensor([5.0, 7.0]), torch.tensor([4.0, 4.0])
    assert table3.lead(worse, better, -1) == pytest.approx((0.04, 3.96))
    assert table3.lead(worse, better, 1) == pytest.approx((-3.96, -0.04))


@pytest.mark.parametrize("deep, verdict", [
    ([10.5, 11.0], "held"),                       # gaps 5, 4 become .5, 1
    ([16.0, 17.0], "did not hold at this size"),  # 6, 7
    ([10.5, 17.0], "cannot be told"),
])
def test_the_gap_at_small_depth_must_shrink_in_every_seed(deep, verdict):
    fids = {4: {2: [9.0, 9.0], 6: [9.0, 9.0]}, 8: {2: [20.0, 20.0], 6: [10.0, 10.0]},
            16: {2: [25.0, 24.0], 6: deep}}
    row = table3.depth_claim(fids, 8, 16)
    assert row["verdict"] == verdict and row["here"].startswith("+4.5 at depth 2")


def test_the_smallest_depth_must_rank_all_channels_in_every_seed():
    fids = {4: {2: [9.0, 8.0], 6: [1.0, 1.0]}, 8: {2: [20.0, 21.0], 6: [0.0, 0.0]}}
    row = table3.few_channels_claim(fids, (4, 8))
    assert (row["here"], row["interval"], row["verdict"]) == ("8.5 / 20.5", [11, 13], "held")
    fids[8][2] = [8.0, 21.0]
    assert table3.few_channels_claim(fids, (4, 8))["verdict"] == "cannot be told"


def test_a_tiny_run_measures_all_and_ships_autoencoders_that_train_py_takes(
        tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(table3, "ROOT", tmp_path)
    monkeypatch.setitem(table3.SAMPLING, "num_steps", 1)
    out = tmp_path / "table3.json"
    table3.main(["--quick", "--channels", "4", "8", "--steps", "2", "--batch-size", "2",
                 "--num-train", "64", "--num-test", "12", "--flow-steps", "1", "--seeds", "1",
                 "--out", str(out)])
    record = json.loads(out.read_text())
    assert set(record["table"]) == {"0.0", "0.5"}
    for by_channels in record["table"].values():
        assert list(by_channels) == ["4", "8"]
        for row in by_channels.values():
            assert tuple(row) == table3.MEASURES
    assert list(record["fid_of_samples"]["8"]) == ["1", "2"]
    assert len(record["fid_of_samples"]["8"]["2"]) == 1 and len(record["claims"]) == 6
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    parts = load_components(tmp_path / "runs" / "table3" / "8-channels-kl-0.0002", ("vae", "text"))
    assert parts.vae.config.latent_channels == 8 and set(parts.text.encoders) == set(ENCODERS)
    assert "28.62" not in capsys.readouterr().out              # 16 channels were not asked for


def test_the_first_components_of_a_latent_keep_what_they_can():
    """All channels: the same picture. Fewer: the code is projected on the largest components."""
    torch.manual_seed(0)
    vae = VAE(SMALL).requires_grad_(False)
    pictures = torch.rand(6, 3, 16, 16, generator=rng(1)) * 2 - 1
    code, logvar = vae.encode_moments(pictures)
    whole = table3.cut_latent(vae, 4, pictures)
    rotated, _ = whole.encode_moments(pictures)
    torch.testing.assert_close(rotated.square().sum(dim=1), code.square().sum(dim=1))
    torch.testing.assert_close(whole.decoder(rotated), vae.decoder(code), atol=1e-4, rtol=1e-4)
    values = code.transpose(0, 1).flatten(1)                                  # (4, positions)
    energies = torch.linalg.svdvals(values.double()).square()
    kept, spread = table3.cut_latent(vae, 2, pictures).encode_moments(pictures)
    expected = energies[:2].sum().item()
    assert kept.square().sum().item() == pytest.approx(expected, rel=1e-4)
    assert logvar.min() <= spread.min() and spread.max() <= logvar.max()      # means of them


def test_more_channels_than_there_are_cannot_be_cut():
    with pytest.raises(ValueError, match="has 16 channels, so 32 cannot be cut"):
        table3.first_autoencoder(32, torch.zeros(1, 3, 16, 16), table3.Options(warm=True))
