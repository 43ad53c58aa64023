"""metrics.py: numbers for pictures: CLIP score, FID, KID, PSNR (SD3, arXiv:2403.03206v1, Sec. 5).

Read with   Sec. 5.1 (CLIP score, FID on CLIP features), Table 3 (PSNR)
Not here    CLIP's layers and its text tower (text_encoders.py), the score of drawn scenes
            (geneval.py), which pictures are measured (evaluate.py)
Shapes      B batch   n patches   D hidden_size   N M pictures   d width of the features
            The image tower takes image (B, 3, S, S) in [-1, 1]. PictureMeasures takes pictures:
            PIL, or uint8 (H, W, 3) with H W in pixels.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from checkpoints import (
    CLIP_NAMES, SHIPPED, count_layers, find_model_file, open_weights, read_tensors, rename)
from data import to_tensor
from text_encoders import CLIPLayer

# ---- CLIP's image tower (Sec. 5.1) ---------------------------------------------------------------
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)       # of RGB in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGE_NAMES = {                                        # The released file's names -> ours.
    "vision_model.embeddings.position_ids": None,      # It holds 0, 1, 2, ...
    "vision_model.embeddings.class_embedding": "class_token",
    "vision_model.embeddings.": "",
    "vision_model.encoder.": "",
    "vision_model.pre_layrnorm.": "pre_norm.",         # They misspelt it.
    "vision_model.post_layernorm.": "post_norm.",
    "visual_projection.": "projection."} | CLIP_NAMES


@dataclass(frozen=True)
class CLIPImageConfig:
    """Sizes of an image tower. The defaults are CLIP-L/14, which measures in the paper."""
    image_size: int = 224              # pixels per side; other images are resized
    patch_size: int = 14               # pixels per token side
    hidden_size: int = 1024
    num_layers: int = 24
    projection_dim: int = 768          # of the space shared with text
    activation: str = "quick_gelu"


class CLIPImageEncoder(nn.Module):
    """image (B, 3, S, S) in [-1, 1] -> features (B, projection_dim), not normalised."""

    def __init__(self, config=CLIPImageConfig()):
        super().__init__()
        self.config = config
        D = config.hidden_size
        p = config.patch_size
        n = (config.image_size // p) ** 2                                        # 256 for CLIP-L/14
        self.patch_embedding = nn.Conv2d(3, D, p, stride=p, bias=False)
        self.class_token = nn.Parameter(torch.randn(D) / D**0.5)
        self.position_embedding = nn.Embedding(1 + n, D)                         # class token first
        nn.init.normal_(self.position_embedding.weight, std=D**-0.5)
        self.pre_norm = nn.LayerNorm(D, eps=1e-5)
        self.layers = nn.ModuleList()
        for _ in range(config.num_layers):
            self.layers.append(CLIPLayer(config, causal=False))
        self.post_norm = nn.LayerNorm(D, eps=1e-5)
        self.projection = nn.Linear(D, config.projection_dim, bias=False)
        # What takes CLIP-L's pooled text to the shared space, where the text encoder does not.
        self.register_buffer("text_projection", None)                            # (d, 768)

    def layer_outputs(self, image):
        """The tokens (B, 1 + n, D) after every layer: the class token, then the patches by rows."""
        size = self.config.image_size
        if image.shape[-2:] != (size, size):
            image = F.interpolate(image, (size, size), mode="bicubic", antialias=True)
        mean = image.new_tensor(CLIP_MEAN).view(3, 1, 1)
        std = image.new_tensor(CLIP_STD).view(3, 1, 1)
        patches = self.patch_embedding(((image + 1) / 2 - mean) / std)           # (B, D, S/p, S/p)
        patches = patches.flatten(2).transpose(1, 2)                             # (B, n, D)
        class_token = self.class_token.expand(len(image), 1, -1)                 # (B, 1, D)
        x = torch.cat([class_token, patches], dim=1)                             # (B, 1 + n, D)
        x = self.pre_norm(x + self.position_embedding.weight)
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return outputs

    def features(self, image):
        """The patches' tokens (B, n, D) after every layer, for `vae.perceptual_loss`."""
        return [x[:, 1:] for x in self.layer_outputs(image)]

    def forward(self, image):
        class_token = self.layer_outputs(image)[-1][:, 0]                        # (B, D)
        return self.projection(self.post_norm(class_token))                      # (B, d)


def load_image_tower(place=SHIPPED):
    """The image tower in a model's folder, or the released CLIP-L/14: `place` is then its folder or
    file. Sizes are those of the tensors."""
    file = Path(place) / "clip_image.safetensors"
    if not file.is_file():
        file = Path(place)
        if not file.is_dir() or (file / "model.safetensors").is_file():
            file = find_model_file(place, hub=False)
    entries = {}
    if file.is_file():
        entries, _ = open_weights(file)
    chosen = {}
    for key, entry in entries.items():
        if key.startswith("clip_l_image."):
            chosen[key.removeprefix("clip_l_image.")] = entry
        elif key.startswith(("vision_model.", "visual_projection.")):
            chosen[rename(key, IMAGE_NAMES)] = entry
        elif key == "text_projection.weight":
            chosen["text_projection"] = entry
    needed = {"projection.weight", "patch_embedding.weight", "position_embedding.weight"}
    if not needed <= chosen.keys():
        raise ValueError(f"{file} holds no image tower for clip_l; give a file of make_tiny.py, or "
                         f"model.safetensors of openai/clip-vit-large-patch14 with --tower")
    chosen.pop(None, None)
    tensors = read_tensors(chosen, torch.float32)
    D, _, patch_size, _ = tensors["patch_embedding.weight"].shape
    num_patches = len(tensors["position_embedding.weight"]) - 1
    image_size = round(num_patches**0.5) * patch_size
    num_layers = count_layers(tensors, "layers.")
    d = len(tensors["projection.weight"])
    tower = CLIPImageEncoder(CLIPImageConfig(image_size, patch_size, D, num_layers, d))
    text_projection = tensors.pop("text_projection", None)
    tower.load_state_dict(tensors)
    tower.text_projection = text_projection
    return tower.eval().requires_grad_(False)


# ---- The measures on its features, and PSNR ------------------------------------------------------
def clip_scores(image_features, text_features):
    """Cosines of pictures and their captions, (N, d) both -> (N,). Their mean is the CLIP score
    (Hessel et al. 2021), here without their factor of 2.5."""
    return F.cosine_similarity(image_features, text_features)


def frechet_distance(features_a, features_b):
    """Distance of Gaussians fitted to two sets (N, d), (M, d); on CLIP features it is CLIP-FID.

        |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))

    C_a C_b is not symmetric, but C_a^(1/2) C_b C_a^(1/2) is, and has the same eigenvalues. The
    trace of the root is the sum of their roots. It is biased upwards where N or M is small.
    """
    a = features_a.cpu().double()                           # Eigenvalues span many magnitudes.
    b = features_b.cpu().double()
    if min(len(a), len(b)) < 2:
        raise ValueError(f"{len(a)} and {len(b)} feature vectors; a covariance needs at least 2")
    cov_a = torch.atleast_2d(a.T.cov())                                          # (d, d)
    cov_b = torch.atleast_2d(b.T.cov())                                          # (d, d)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp_min(0).sqrt()) @ vectors.T                  # (d, d)
    eigenvalues = torch.linalg.eigvalsh(root_a @ cov_b @ root_a)
    cross = eigenvalues.clamp_min(0).sqrt().sum()
    shift = a.mean(0) - b.mean(0)                                                # (d,)
    return shift.square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross


def kernel_distance(features_a, features_b, paired=False):
    """Kernel distance (KID; Binkowski et al. 2018) of two sets of features (N, d), (M, d).

    It is the squared maximum mean discrepancy with the kernel (x y / d + 1)^3. The estimate is
    unbiased: it can be below 0, and small sets are no worse on average. paired: the vectors i of
    both sets belong together, as pictures of one caption do, and are not compared.
    """
    N, d = features_a.shape
    M = len(features_b)
    if min(N, M) < 2:
        raise ValueError(f"{N} and {M} feature vectors; pairs within a set need at least 2")
    both = torch.cat([features_a, features_b]).cpu().double()
    kernel = (both @ both.T / d + 1) ** 3                                        # (N + M, N + M)
    between = kernel[:N, N:].mean()
    if paired:
        others = kernel[:N, N:] * (1 - torch.eye(N))
        between = others.sum() / (N * (N - 1))
    kernel.fill_diagonal_(0)                                # No vector is paired with itself.
    within_a = kernel[:N, :N].sum() / (N * (N - 1))
    within_b = kernel[N:, N:].sum() / (M * (M - 1))
    return within_a + within_b - 2 * between


def psnr(image, reconstruction):
    """Peak signal-to-noise ratio in dB: (B,). Images are in [-1, 1]; the second one is clamped."""
    difference = (image - reconstruction.clamp(-1, 1)) / 2                # in units of [0, 1]
    mean_square = difference.square().mean(dim=(1, 2, 3))
    return -10 * mean_square.clamp_min(1e-10).log10()


class PictureMeasures:
    """CLIP score, FID and KID of drawn pictures, on the features of an image tower.

    pictures: the real ones. captions: what the drawn ones should show. text: TextEncoders whose
    CLIP-L belongs to the tower in `folder`.
    """

    def __init__(self, pictures, captions, text, folder=SHIPPED, device="cpu"):
        if "clip_l" not in text.encoders:
            raise ValueError("a CLIP score needs CLIP-L, and this model has none")
        self.tower = load_image_tower(folder).to(device)
        self.device = device
        self.real = self.features(pictures)                                      # (N, d)
        self.text_features = self.features_of_texts(captions, text)              # (M, d)

    @torch.no_grad()
    def features(self, pictures):
        """N pictures -> (N, d)."""
        rows = []
        for picture in pictures:
            image = to_tensor(picture)[None].to(self.device)                     # (1, 3, H, W)
            rows.append(self.tower(image))
        return torch.cat(rows)

    @torch.no_grad()
    def features_of_texts(self, captions, text):
        """M captions -> (M, d), by CLIP-L in fp32."""
        clip = copy.deepcopy(text.encoders["clip_l"]).float().to(self.device)
        ids = text.tokenize(captions, without=("clip_g", "t5"))["clip_l"]        # (M, L)
        rows = []
        for part in ids.split(64):
            rows.append(clip(part.to(self.device))[1])
        features = torch.cat(rows)                                               # (M, width)
        projection = self.tower.text_projection                                  # (d, width)
        if projection is None:
            projection = torch.eye(self.real.shape[1]).to(features)
        if projection.shape[1] != features.shape[1]:
            raise ValueError("the image tower belongs to another CLIP-L than this model's; give "
                             "its own with --tower")
        return features @ projection.T

    def __call__(self, pictures):
        """M pictures, one of each caption. clip_error: the standard error of the CLIP score."""
        drawn = self.features(pictures)                                          # (M, d)
        if len(drawn) != len(self.text_features):
            raise ValueError(f"{len(drawn)} pictures of {len(self.text_features)} captions")
        cosines = clip_scores(drawn, self.text_features)                         # (M,)
        return {"clip_score": cosines.mean().item(),
                "clip_error": cosines.std().item() / len(cosines) ** 0.5,
                "fid": frechet_distance(drawn, self.real).item(),
                "kid": kernel_distance(drawn, self.real, paired=True).item()}


def wilson(share, n):
    """95 % interval (low, high) of a share that was seen in n cases (Wilson 1927)."""
    z = 1.96
    variance = share * (1 - share) / n
    stretch = 1 + z**2 / n
    middle = (share + z**2 / (2 * n)) / stretch
    reach = z * (variance + (z / (2 * n)) ** 2) ** 0.5 / stretch
    return max(0.0, middle - reach), min(1.0, middle + reach)
