"""An exported folder in diffusers' own pipeline. Needs requirements-dev.txt; without diffusers these tests are skipped."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from against_diffusers import PROMPTS, both_ways, compare_network, open_both

from checkpoints import SHIPPED, find_model_file


def test_a_network_with_the_same_weights_gives_the_same_velocity():
    assert compare_network(2, 16, torch.device("cpu"))["largest_relative_difference"] < 1e-5


def test_diffusers_opens_an_export_and_samples_the_same_latents(tmp_path):
    """Tokenizers, encoders, guidance, schedule, steps: everything between a prompt and its latent."""
    ours, theirs = open_both(find_model_file(SHIPPED), tmp_path / "exported", "fp32", torch.device("cpu"))
    our_latents, their_images = both_ways(ours, theirs, PROMPTS[:3], 4, 4.0)
    torch.testing.assert_close(our_latents(), their_images("latent"), atol=1e-4, rtol=1e-4)
