"""experiments/table3_fig10_autoencoders.py: the adversary by closed forms, measures, one run."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from vae import VAE, VAEConfig, kl_loss, perceptual_loss

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
    plain = ((reconstruction - image).abs().mean() + 2e-4 * kl_loss(mean, logvar)
             + 0.1 * perceptual_loss(image, reconstruction, feature_maps))
    losses = table3.Objective(feature_maps)(vae, (image, noise))
    assert losses.shape == (2,)
    torch.testing.assert_close(losses.mean(), plain)

    before = table3.discriminator_hinge_loss(discriminator(image), discriminator(reconstruction))
    objective = table3.Objective(feature_maps, 0.5, discriminator)
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
    images = [torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 24)]
    numbers, reconstructions = table3.measure(vae, images, Tower())
    assert [x.shape for x in reconstructions] == [x.shape for x in images]
    assert numbers["psnr"] == pytest.approx(20, abs=1e-3)
    assert numbers["ssim"] == pytest.approx((0.6 + 1e-4) / (0.61 + 1e-4), abs=1e-5)
    assert numbers["fid"] == pytest.approx(3 * 0.2**2, rel=1e-3)              # squared distance
    alone, _ = table3.measure(vae, images[:1], Tower())
    assert math.isnan(alone["fid"]) and alone["psnr"] == pytest.approx(20, abs=1e-3)


def test_quick_writes_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(table3, "ROOT", tmp_path)
    monkeypatch.setattr(table3, "load_image_tower", Tower)
    arguments = ["table3", "--quick", "--channels", "4", "--batch-size", "2", "--gan", "0.5"]
    monkeypatch.setattr("sys.argv", [*arguments, "--out", str(tmp_path / "table3.json")])
    table3.main()
    result = json.loads((tmp_path / "table3.json").read_text())
    assert set(result["table"]["4"]) == set(table3.MEASURES)
    assert result["paper"]["16"] == [1.06, 0.45, 0.86, 28.62]
    assert "channels" in capsys.readouterr().out


def test_given_pictures_are_reconstructed_by_the_shipped_autoencoder(tmp_path, monkeypatch, capsys):
    """The drawn world is what it was trained on: over 20 dB."""
    picture, out = tmp_path / "scene.png", tmp_path / "both.png"
    table3.from_tensor(table3.scene_images(7, [3])[0]).save(picture)
    monkeypatch.setattr(table3, "load_image_tower", Tower)
    monkeypatch.setattr("sys.argv", ["table3", str(picture), "--picture", str(out)])
    table3.main()
    said = capsys.readouterr().out
    assert "64x64 px" in said and float(said.split("PSNR ")[1].split(" dB")[0]) > 20
    assert table3.read_image(out).size == (128, 64)
