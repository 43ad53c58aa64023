"""Our exports in diffusers' own pipeline. Without diffusers these tests are skipped."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
pytest.importorskip("diffusers")
pytest.importorskip("transformers")
from against_diffusers import PROMPTS, Both, compare_network

from checkpoints import SHIPPED, find_model_file
from convert import export

CPU = torch.device("cpu")


def test_a_network_with_the_same_weights_gives_the_same_velocity():
    assert compare_network(2, 16, torch.device("cpu"))["largest_relative_difference"] < 1e-5


def test_diffusers_opens_an_export_without_a_dtype_and_samples_the_same_latents(tmp_path):
    """Tokenizers, encoders, guidance, schedule, steps: everything between a prompt and its latent.

    The shipped weights are stored in bf16; the plain call must bring all networks to one type.
    """
    both = Both(find_model_file(SHIPPED), tmp_path / "exported", "fp32", CPU, 4, 4.0)
    types = {module.dtype for module in both.theirs.components.values() if hasattr(module, "dtype")}
    assert types == {torch.float32}
    theirs = both.their_images(PROMPTS[:3], "latent")
    torch.testing.assert_close(both.our_latents(PROMPTS[:3]), theirs, atol=1e-4, rtol=1e-4)


def test_an_export_opens_in_one_half_precision_type_too(tmp_path):
    file = find_model_file(SHIPPED)
    both = Both(file, tmp_path / "exported", "fp32", CPU, 2, 4.0, torch.bfloat16)
    assert both.their_images(PROMPTS[:1], "latent").isfinite().all()


def test_t5_of_an_exported_single_file_has_its_table_in_transformers(tmp_path):
    """diffusers' from_single_file gives T5EncoderModel the keys below its prefix, strictly."""
    from safetensors.torch import load_file
    from transformers import T5Config, T5EncoderModel

    from checkpoints import PREFIXES
    from convert import diffusers_config, load_components

    export(SHIPPED, tmp_path / "m", "single-file")
    t5 = load_components(SHIPPED, ("text",)).text.encoders["t5"]
    prefix = PREFIXES["t5"]
    whole = load_file(tmp_path / "m" / "model.safetensors")
    tensors = {key.removeprefix(prefix): x for key, x in whole.items() if key.startswith(prefix)}
    theirs = T5EncoderModel(T5Config(**diffusers_config("t5", t5.config)))
    assert tensors.keys() == theirs.state_dict().keys()
    theirs.load_state_dict(tensors, strict=True)
    ids = torch.tensor([[5, 9, 1, 0, 0]])
    with torch.no_grad():
        hidden = theirs.eval()(ids).last_hidden_state
        torch.testing.assert_close(hidden, t5(ids), atol=1e-5, rtol=1e-4)
