"""Tests of metrics.py: the image tower, CLIP score, FID, KID and PSNR against closed forms."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import metrics
import sample
from checkpoints import SHIPPED
from data import to_tensor
from metrics import (
    CLIPImageConfig, CLIPImageEncoder, PictureMeasures, clip_scores, frechet_distance,
    kernel_distance, load_image_tower, psnr, wilson)
from scenes import Scene, Scenes, Thing, draw_scene
from text_encoders import quick_gelu
from vae import perceptual_loss

TINY = CLIPImageConfig(32, 8, hidden_size=128, num_layers=3, projection_dim=48)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny_encoder(seed=0):
    torch.manual_seed(seed)
    return CLIPImageEncoder(TINY)


# ---- CLIP's image tower --------------------------------------------------------------------------

def test_default_tower_has_the_parameters_of_clip_l():
    """The public CLIP-L/14 vision model with its projection has 303,966,208."""
    with torch.device("meta"):
        assert sum(p.numel() for p in CLIPImageEncoder().parameters()) == 303_966_208


def reference_tower(encoder, image):
    """The tower written out: patches by unfold, attention by softmax, the first token."""
    weights, heads = dict(encoder.named_parameters()), 2              # of 64 channels
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    patches = F.unfold((image * 0.5 + 0.5 - mean) / std, 8, stride=8).transpose(1, 2)    # by rows
    x = patches @ weights["patch_embedding.weight"].flatten(1).T
    token = weights["class_token"].view(1, 1, -1).repeat(len(image), 1, 1)
    x = torch.cat([token, x], dim=1) + weights["position_embedding.weight"]

    def norm(x, name):
        return F.layer_norm(x, (128,), weights[name + ".weight"], weights[name + ".bias"], 1e-5)

    def linear(x, name):
        return x @ weights[name + ".weight"].T + weights[name + ".bias"]

    x = norm(x, "pre_norm")
    for i in range(TINY.num_layers):
        layer = f"layers.{i}."
        h = norm(x, layer + "norm1")
        q, k, v = (linear(h, layer + name).unflatten(-1, (heads, 64)).transpose(1, 2)
                   for name in "qkv")
        h = torch.softmax(q @ k.transpose(-1, -2) / 8, dim=-1) @ v
        x = x + linear(h.transpose(1, 2).flatten(2), layer + "out")
        h = norm(x, layer + "norm2")
        x = x + linear(quick_gelu(linear(h, layer + "fc1")), layer + "fc2")
    return norm(x[:, 0], "post_norm") @ weights["projection.weight"].T


def test_tower_is_its_definition():
    """Checks patch order, normalisation, the class token's place, attention without a mask."""
    encoder, image = tiny_encoder(), random(2, 3, 32, 32).float().clamp(-1, 1)
    for parameter in encoder.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)    # no norm is the identity
    expected = reference_tower(encoder, image)
    torch.testing.assert_close(encoder(image), expected, rtol=1e-4, atol=1e-5)
    assert encoder(image).shape == (2, 48)


def test_features_are_the_patches_of_every_layer_and_carry_gradients_to_the_image():
    encoder, image = tiny_encoder(), random(2, 3, 32, 32).float()
    features = encoder.features(image)
    assert [x.shape for x in features] == [(2, 16, 128)] * 3
    reconstruction = (image + 0.1).requires_grad_()
    assert perceptual_loss(image, image, encoder.features) == 0
    perceptual_loss(image, reconstruction, encoder.features).backward()
    assert reconstruction.grad.abs().sum() > 0


def test_images_of_another_size_are_resized():
    encoder, image = tiny_encoder(), random(1, 3, 50, 70).float()
    resized = F.interpolate(image, (32, 32), mode="bicubic", antialias=True)
    torch.testing.assert_close(encoder(image), encoder(resized))


def test_the_released_file_gives_the_features_that_transformers_gives(tmp_path):
    """A CLIP of random weights and tiny size, written by transformers itself."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    text = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 1, "vocab_size": 99, "max_position_embeddings": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=48)
    model = transformers.CLIPModel(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)    # no norm is the identity
    model.save_pretrained(tmp_path)
    tower = load_image_tower(tmp_path)
    image = random(3, 3, 28, 28).float().clamp(-1, 1)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        seen = model.vision_model((image * 0.5 + 0.5 - mean) / std).pooler_output
        expected = model.visual_projection(seen)
    torch.testing.assert_close(tower(image), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(tower.text_projection, model.text_projection.weight)


def test_a_model_without_an_image_tower_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="holds no image tower for clip_l; give .*--tower"):
        load_image_tower(SHIPPED / "model.safetensors")
    save_file({"visual_projection.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds no image tower for clip_l"):
        load_image_tower(tmp_path)
    (tmp_path / "checkpoints").mkdir()                       # where sd3.5_medium.safetensors lies
    (tmp_path / "diffusers" / "transformer").mkdir(parents=True)
    for name in ("checkpoints", "diffusers"):
        with pytest.raises(ValueError, match=f"{name} holds no image tower .* with --tower"):
            load_image_tower(tmp_path / name)


# ---- CLIP score, Frechet and kernel distance -----------------------------------------------------

def test_clip_scores_are_cosines_whatever_the_lengths():
    a = torch.tensor([[2.0, 0.0], [0.0, 5.0], [3.0, 3.0]])
    b = torch.tensor([[7.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert clip_scores(a, b).tolist() == pytest.approx([1, 0, 0.5**0.5])


def white(n, d, seed):
    """n vectors whose sample mean is 0 and whose sample covariance is the identity, exactly."""
    x = random(n, d, seed=seed)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T


def test_frechet_distance_of_equal_sets_is_zero():
    a = random(50, 20)
    assert frechet_distance(a, a).item() == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a.flip(0)).item() == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a[:10], a[:10]).item() == pytest.approx(0, abs=1e-5)   # singular


def test_frechet_distance_of_a_shifted_set_is_the_shift_squared():
    a, shift = random(100, 6), random(6, seed=1)
    assert frechet_distance(a, a + shift).item() == pytest.approx(shift.square().sum().item())


def test_frechet_distance_of_commuting_gaussians():
    """Covariances diag(s^2), diag(r^2) in a rotated basis: |mean shift|^2 + sum (s - r)^2."""
    s, r = torch.tensor([1.0, 2.0, 0.5, 3.0]).double(), torch.tensor([2.0, 0.1, 0.5, 1.0]).double()
    rotation = torch.linalg.qr(random(4, 4, seed=2))[0]
    a, b = white(60, 4, 3) * s @ rotation, white(80, 4, 4) * r @ rotation + 0.3
    expected = 4 * 0.3**2 + (s - r).square().sum().item()
    assert frechet_distance(a, b).item() == pytest.approx(expected)
    assert frechet_distance(b.float(), a.float()).item() == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_of_gaussians_that_do_not_commute():
    """In 2-D tr (A B)^(1/2) = sqrt(tr(A B) + 2 sqrt(det(A B))), by Cayley and Hamilton."""
    m, n = random(2, 2, seed=5), random(2, 2, seed=6)
    a, b = white(30, 2, 7) @ m.T, white(40, 2, 8) @ n.T
    cov_a, cov_b = m @ m.T, n @ n.T
    assert (cov_a @ cov_b - cov_b @ cov_a).abs().max() > 0.1
    cross = (cov_a @ cov_b).trace() + 2 * torch.linalg.det(cov_a @ cov_b).sqrt()
    expected = cov_a.trace() + cov_b.trace() - 2 * cross.sqrt()
    assert frechet_distance(a, b).item() == pytest.approx(expected.item())


def test_frechet_distance_is_that_of_scipys_square_root():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = random(90, 24) @ random(24, 24, seed=1), random(70, 24, seed=2) + 0.5
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = linalg.sqrtm(cov_a @ cov_b)
    shift = (a.mean(0) - b.mean(0)).square().sum().item()
    expected = shift + np.trace(cov_a + cov_b - 2 * root.real)
    assert frechet_distance(a, b).item() == pytest.approx(expected, rel=1e-4)


def test_frechet_distance_needs_two_vectors():
    with pytest.raises(ValueError, match="1 and 5 feature vectors"):
        frechet_distance(random(1, 3), random(5, 3))


def test_kernel_distance_by_loops_over_pairs():
    a, b = random(5, 3), random(4, 3, seed=1) + 1

    def kernel(x, y):
        return (sum(float(p) * float(q) for p, q in zip(x, y)) / 3 + 1) ** 3

    within_a = sum(kernel(a[i], a[j]) for i in range(5) for j in range(5) if i != j) / 20
    within_b = sum(kernel(b[i], b[j]) for i in range(4) for j in range(4) if i != j) / 12
    between = sum(kernel(x, y) for x in a for y in b) / 20
    expected = within_a + within_b - 2 * between
    assert kernel_distance(a, b).item() == pytest.approx(expected)


def test_paired_sets_are_compared_without_their_pairs():
    """Sets from one distribution whose vectors i agree: only without these pairs the mean is 0."""
    paired, all_pairs = [], []
    for i in range(300):
        a = random(16, 4, seed=2 * i)
        b = 0.9 * a + 0.19**0.5 * random(16, 4, seed=2 * i + 1)
        paired.append(kernel_distance(a, b, paired=True))
        all_pairs.append(kernel_distance(a, b))
    paired = torch.stack(paired)
    assert paired.mean().abs() < 3 * paired.std() / 300**0.5
    assert torch.stack(all_pairs).mean() < -5 * paired.std() / 300**0.5


def test_one_picture_is_too_few_for_a_distance():
    """A covariance and the pairs within a set need two."""
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match="1 and 4 feature vectors"):
            distance(torch.zeros(1, 3), torch.ones(4, 3))


def test_kernel_distance_is_unbiased():
    """Two sets from one distribution: the mean of 300 estimates is 0, and half are below it."""
    estimates = []
    for i in range(300):
        estimates.append(kernel_distance(random(6, 4, seed=2 * i), random(8, 4, seed=2 * i + 1)))
    estimates = torch.stack(estimates)
    assert estimates.mean().abs() < 3 * estimates.std() / 300**0.5
    assert 90 < (estimates < 0).sum() < 240


def test_the_shipped_tower_prefers_the_right_colour():
    tower = load_image_tower(SHIPPED)
    images = []
    for left in (5, 6, 30):
        color = "red" if left < 10 else "blue"
        scene = Scene("single", 64, 64, "white", (Thing("heart", color, "medium", left, 20, 24),))
        images.append(torch.from_numpy(draw_scene(scene)).permute(2, 0, 1) / 127.5 - 1)
    features = F.normalize(tower(torch.stack(images)), dim=-1)
    assert features[0] @ features[1] > features[0] @ features[2] + 0.05


def test_distances_of_two_halves_are_small_and_rise_with_blur_noise_and_colour():
    tower, source = load_image_tower(SHIPPED), Scenes(256, seed=5)
    images = torch.stack([to_tensor(source.image(i, 64, 64)) for i in range(256)])
    half, other = images.chunk(2)
    real = tower(half)
    noise = random(*other.shape).float()

    def blurred(radius):
        padded = F.pad(other, (radius,) * 4, mode="replicate")
        return F.avg_pool2d(padded, 2 * radius + 1, stride=1)

    def redder(amount):
        return (other + amount * torch.tensor([1.0, 0, 0]).view(3, 1, 1)).clamp(-1, 1)

    worse = [[other, *[(other + amount * noise).clamp(-1, 1) for amount in (0.3, 0.6, 1.2)]],
             [other, *map(blurred, (4, 8, 16))], [other, *map(redder, (0.3, 0.6, 1.2))]]
    for distance in (frechet_distance, kernel_distance):
        for series in worse:
            values = [distance(real, tower(pictures)).item() for pictures in series]
            assert values == sorted(values) and abs(values[0]) < 0.2 * values[-1], values


def test_picture_measures_score_pictures_with_their_captions():
    """Pictures and captions of scenes: in their order, in another, and pictures of nothing."""
    text, source = sample.load(SHIPPED, precision="fp32").text, Scenes(40, seed=6)
    pictures = [source.image(i, 64, 64) for i in range(40)]
    captions = [source.captions(i)[1] for i in range(40)]
    measure = PictureMeasures(pictures, captions, text, SHIPPED)
    numbers = measure(pictures)
    assert numbers["fid"] == pytest.approx(0, abs=1e-5)
    assert numbers["kid"] == pytest.approx(0, abs=1e-9)
    cosines = F.cosine_similarity(measure.real, measure.text_features)
    assert numbers["clip_score"] == pytest.approx(cosines.mean().item())
    assert numbers["clip_error"] == pytest.approx(cosines.std().item() / 40**0.5)
    rotated = measure(pictures[1:] + pictures[:1])
    assert rotated["clip_score"] < numbers["clip_score"] - 5 * numbers["clip_error"]
    assert rotated["fid"] == pytest.approx(0, abs=1e-5)
    assert measure([np.zeros((64, 64, 3), np.uint8)] * 40)["fid"] > 1
    with pytest.raises(ValueError, match="39 pictures of 40 captions"):
        measure(pictures[:39])
    with pytest.raises(ValueError, match="needs CLIP-L"):
        PictureMeasures(pictures, captions, SimpleNamespace(encoders={}))


def test_a_text_projection_stands_between_clip_l_and_the_tower(monkeypatch):
    text = sample.load(SHIPPED, precision="fp32").text
    pictures = [np.zeros((64, 64, 3), np.uint8)] * 2
    plain = PictureMeasures(pictures, ["a star", "a ring"], text).text_features
    tower = load_image_tower(SHIPPED)
    tower.text_projection = torch.randn(plain.shape[1], plain.shape[1])
    monkeypatch.setattr(metrics, "load_image_tower", lambda place: tower)
    projected = PictureMeasures(pictures, ["a star", "a ring"], text).text_features
    torch.testing.assert_close(projected, plain @ tower.text_projection.T)
    tower.text_projection = torch.randn(plain.shape[1], plain.shape[1] + 1)
    with pytest.raises(ValueError, match="belongs to another CLIP-L than this model's; .*--tower"):
        PictureMeasures(pictures, ["a star", "a ring"], text)


def test_wilson_interval_of_known_cases():
    """Newcombe 1998, Table I: 81 of 263 has .2553 to .3662, and 0 of 20 has 0 to .1611."""
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)


# ---- Measures of Table 3 -------------------------------------------------------------------------

def test_psnr_is_its_closed_form_per_picture():
    """An error of 0.2 in [-1, 1] is 0.1 in [0, 1]: 20 dB. What lies beyond white is white."""
    image = torch.zeros(3, 3, 8, 8)
    reconstruction = torch.stack([image[0] + 0.2, image[1] - 0.02, image[2]])
    assert psnr(image, reconstruction).tolist() == pytest.approx([20, 40, 100], abs=1e-3)
    assert psnr(image + 1, image + 1.5).tolist() == pytest.approx([100] * 3)
