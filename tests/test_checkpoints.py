"""checkpoints.py: files round trip, foreign layouts of the same names, and what broken or wrong files are told."""

import json
import pickle
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_text_encoders import vocabularies  # noqa: F401  a fixture: small tokenizers on disk

import checkpoints
from checkpoints import (
    CLIP_NAMES,
    ENCODERS,
    PREFIXES,
    T5_NAMES,
    CheckpointError,
    file_config,
    fingerprint,
    load_components,
    open_model,
    open_safetensors,
    read_network,
    released_name,
    rename,
    save_networks,
    write_atomically,
)
from mmdit import MMDiT, MMDiTConfig
from text_encoders import CLIPConfig, CLIPTextEncoder, T5Config, T5Encoder, TextConfig
from vae import VAE, VAEConfig

GOLDEN = Path(__file__).parent / "golden"
BAD = Path(__file__).parent.parent.parent / "shared" / "data" / "bad"
MMDIT = MMDiTConfig(depth=2, latent_channels=4, context_dim=192, pooled_dim=128, pos_embed_max_size=6,
                    dual_attention_layers=1)
CLIP = CLIPConfig(vocab_size=518, hidden_size=64, num_layers=2, max_length=77)


def five_networks(mmdit=MMDIT):
    """One of each, small and random, as none of the defaults would make them."""
    torch.manual_seed(0)
    vae = VAEConfig(latent_channels=4, channels=(8, 8, 16, 16), norm_groups=4, vae_scale=1.25, vae_shift=-0.5)
    networks = {"mmdit": MMDiT(mmdit), "vae": VAE(vae), "clip_l": CLIPTextEncoder(CLIP),
                "clip_g": CLIPTextEncoder(replace(CLIP, activation="gelu", projection_dim=64)),
                "t5": T5Encoder(T5Config(vocab_size=300, hidden_size=192, ff_size=64, num_layers=2, num_heads=3))}
    for network in networks.values():
        for parameter in network.requires_grad_(False).parameters():
            parameter.normal_(0, 0.1)
    return networks


@pytest.fixture(scope="module")
def networks():
    return five_networks()


@pytest.fixture(scope="module")
def saved(networks, tmp_path_factory):
    """A whole model file; tests that change it work on copies."""
    file = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_networks(file, networks, TextConfig(64, 64, 192, clip_length=20, t5_length=30), {"guidance_scale": 4.5})
    return file


def resave(saved, file, change):
    """A copy of a saved file with its tensors changed by `change(tensors)`, its metadata kept."""
    tensors = load_file(saved)
    with safe_open(saved, framework="pt") as opened:
        metadata = opened.metadata()
    change(tensors)
    save_file(tensors, file, metadata)
    return file


# ------------------------------------------------------------------------------------------------------------
# Round trips
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PREFIXES)
def test_saved_network_comes_back_as_it_was(name, networks, saved):
    back, original = read_network(name, saved), networks[name]
    assert back.config == original.config
    assert back.state_dict().keys() == original.state_dict().keys()
    assert all(torch.equal(x, original.state_dict()[key]) for key, x in back.state_dict().items())
    assert not back.training and not any(p.requires_grad for p in back.parameters())


def test_metadata_keeps_what_tensors_cannot_tell(saved):
    assert file_config(saved) == {
        "sampling": {"guidance_scale": 4.5}, "vae": {"norm_groups": 4, "vae_scale": 1.25, "vae_shift": -0.5},
        "text": {"clip_l_width": 64, "clip_g_width": 64, "t5_width": 192, "clip_length": 20, "t5_length": 30}}


@pytest.mark.parametrize("change", [{"clip_tokens": 20, "dual_attention_layers": 0}, {"qk_norm": False}, {"depth": 1},
                                    {"patch_size": 4, "latent_channels": 8}], ids=str)
def test_mmdit_sizes_are_inferred_from_the_tensors(tmp_path, change):
    config = replace(MMDIT, **change)
    config = replace(config, dual_attention_layers=min(config.dual_attention_layers, config.depth))
    save_networks(tmp_path / "m.safetensors", {"mmdit": MMDiT(config)})
    assert read_network("mmdit", tmp_path / "m.safetensors").config == config


def test_half_precision_files_are_read_as_fp32_and_half_the_size(tmp_path, networks, saved):
    for dtype in (torch.bfloat16, torch.float16):
        file = tmp_path / "half.safetensors"
        save_networks(file, networks, dtype=dtype)
        back = read_network("vae", file)
        assert file.stat().st_size < 0.55 * saved.stat().st_size
        for key, x in back.state_dict().items():
            assert x.dtype == torch.float32 and torch.equal(x, networks["vae"].state_dict()[key].to(dtype).float())
        half = read_network("mmdit", file, dtype=dtype).state_dict()               # matrices of the blocks; the rest stays fp32
        assert half["joint_blocks.0.x_block.mlp.fc1.weight"].dtype == dtype
        assert half["pos_embed"].dtype == half["joint_blocks.0.x_block.mlp.fc1.bias"].dtype == torch.float32


def test_a_file_without_a_network_gives_none(tmp_path, networks):
    save_networks(tmp_path / "vae.safetensors", {"vae": networks["vae"]})
    assert read_network("mmdit", tmp_path / "vae.safetensors") is None
    assert read_network("vae", tmp_path / "vae.safetensors") is not None


def test_without_metadata_sd3s_own_normalisation_and_groups_hold():
    vae = read_network("vae", GOLDEN / "i_bundle" / "weights.safetensors")
    assert (vae.config.vae_scale, vae.config.vae_shift, vae.config.norm_groups) == (1.5305, 0.0609, 32)


# ------------------------------------------------------------------------------------------------------------
# Released names
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case, table", [("d_clip_l", CLIP_NAMES), ("e_clip_g", CLIP_NAMES), ("f_t5", T5_NAMES)])
def test_renaming_released_names_and_back_gives_the_released_names(case, table):
    with safe_open(GOLDEN / case / "weights.safetensors", framework="pt") as file:
        names = set(file.keys())
    back = {released_name(rename(name, table), table) for name in names}
    assert back == names - {"encoder.embed_tokens.weight"}                        # T5's second copy of shared.weight


def test_whole_file_has_the_released_names_and_they_survive_a_round_trip(tmp_path):
    """i_bundle has the layout of the published single file; T5's second table is not written again."""
    source, target = GOLDEN / "i_bundle" / "weights.safetensors", tmp_path / "model.safetensors"
    save_networks(target, {name: read_network(name, source) for name in PREFIXES}, dtype=torch.float16)
    before, after = load_file(source), load_file(target)
    assert before.keys() - after.keys() == {"text_encoders.t5xxl.transformer.encoder.embed_tokens.weight"}
    assert not after.keys() - before.keys()
    assert all(torch.equal(x, before[key].to(torch.float32).half()) for key, x in after.items())


T5, CLIP_L, CLIP_G = (PREFIXES[name] for name in ("t5", "clip_l", "clip_g"))
RESAVED = {
    "temperatures": lambda x: x.update({CLIP_L + "logit_scale": torch.tensor(4.6), CLIP_G + "logit_scale": torch.tensor(4.6)}),
    "identity projection": lambda x: x.update({CLIP_L + "text_projection.weight": torch.eye(64)}),
    "position ids": lambda x: x.update({CLIP_L + "text_model.embeddings.position_ids": torch.arange(77)[None]}),
    "T5 table under its other name": lambda x: x.update(
        {T5 + "encoder.embed_tokens.weight": x.pop(T5 + "shared.weight")}),
    "T5 table twice": lambda x: x.update({T5 + "encoder.embed_tokens.weight": x[T5 + "shared.weight"].clone()}),
}


@pytest.mark.parametrize("what", RESAVED)
def test_files_saved_again_by_others_load_all_the_same(what, networks, saved, tmp_path):
    file = resave(saved, tmp_path / "other.safetensors", RESAVED[what])
    for name in ("clip_l", "clip_g", "t5"):
        back = read_network(name, file).state_dict()
        assert back.keys() == networks[name].state_dict().keys()
        assert all(torch.equal(x, networks[name].state_dict()[key]) for key, x in back.items())


# ------------------------------------------------------------------------------------------------------------
# Wrong files
# ------------------------------------------------------------------------------------------------------------

def test_missing_tensors_are_named(saved, tmp_path):
    gone = [PREFIXES["mmdit"] + f"joint_blocks.1.x_block.{name}.weight" for name in ("mlp.fc2", "attn.proj")]
    file = resave(saved, tmp_path / "m.safetensors", lambda x: [x.pop(name) for name in gone])
    with pytest.raises(CheckpointError, match=r"lacks 2 tensor\(s\) of MMDiT: joint_blocks\.1\.x_block\.attn\.proj\.weight, "
                                              r"joint_blocks\.1\.x_block\.mlp\.fc2\.weight"):
        read_network("mmdit", file)


@pytest.mark.parametrize("name, essential, named", [
    ("mmdit", "x_embedder.proj.weight", "x_embedder.proj.weight"), ("mmdit", "pos_embed", "pos_embed"),
    ("vae", "decoder.conv_in.weight", "decoder.conv_in.weight"), ("t5", "shared.weight", "token_embedding.weight"),
    ("clip_l", "text_model.embeddings.token_embedding.weight", "token_embedding.weight")])
def test_a_tensor_that_gives_a_size_is_missed_by_name(name, essential, named, saved, tmp_path):
    file = resave(saved, tmp_path / "m.safetensors", lambda x: x.pop(PREFIXES[name] + essential))
    with pytest.raises(CheckpointError, match=f"m.safetensors lacks {PREFIXES[name]}{named}"):
        read_network(name, file)


def test_unknown_tensors_are_named(saved, tmp_path):
    file = resave(saved, tmp_path / "m.safetensors", lambda x: x.update({PREFIXES["vae"] + "quant_conv.weight": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"has unknown 1 tensor\(s\) of VAE: quant_conv\.weight"):
        read_network("vae", file)


def test_wrong_shapes_are_named_with_both_shapes(saved, tmp_path):
    name = "joint_blocks.0.x_block.attn.proj.weight"
    file = resave(saved, tmp_path / "m.safetensors", lambda x: x.update({PREFIXES["mmdit"] + name: torch.ones(128, 64)}))
    with pytest.raises(CheckpointError, match=r"joint_blocks\.0\.x_block\.attn\.proj\.weight has shape \(128, 64\), "
                                              r"MMDiT of these sizes needs \(128, 128\)"):
        read_network("mmdit", file)


def bad_files():
    expected = json.loads((BAD / "expected.json").read_text()) if BAD.is_dir() else []
    return [(BAD / e["file"], e) for e in expected if e["file"].startswith("safetensors/")]


@pytest.mark.skipif(not BAD.is_dir(), reason=f"no broken files at {BAD}")
def test_broken_safetensors_are_refused_by_name_and_never_crash():
    """Files that are valid but hold the wrong tensors open; `read_network` then refuses them."""
    assert len(bad_files()) >= 15
    for file, expected in bad_files():
        valid = expected["expect"] != "error" or expected["problem"].startswith("valid file")
        if valid:
            with open_safetensors(file) as opened:
                assert "weight" in opened.keys()
        else:
            with pytest.raises(CheckpointError, match=file.name):
                open_safetensors(file)
        for name in PREFIXES:
            with pytest.raises(CheckpointError, match=file.name):
                read_network(name, file, prefix="")


def test_2000_random_mutations_are_refused_or_load_what_is_stored(tmp_path):
    """Bytes of the header flipped, dropped, doubled or exchanged, files cut or prolonged: either one CheckpointError, or a
    network whose every tensor is, bit for bit, one of the original file's under its own name."""
    rng, config = random.Random(0), CLIPConfig(vocab_size=8, hidden_size=64, num_layers=1, max_length=4)
    network = CLIPTextEncoder(config).requires_grad_(False)
    whole = tmp_path / "whole.safetensors"
    save_file({PREFIXES["clip_l"] + released_name(k, CLIP_NAMES): v.half() for k, v in network.state_dict().items()}, whole)
    content = whole.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    right = read_network("clip_l", whole).state_dict()
    file, refused, loaded = tmp_path / "mutated.safetensors", 0, 0
    for _ in range(2000):
        mutated, place = bytearray(content), rng.randrange(header_end)
        kind = rng.choice(("flip", "digit", "drop", "double", "exchange", "cut", "prolong"))
        if kind == "flip":
            mutated[place] ^= 1 << rng.randrange(8)
        elif kind == "digit":                                                     # another number in a shape or an offset
            digits = [i for i in range(8, header_end) if chr(content[i]).isdigit()]
            mutated[rng.choice(digits)] = ord(rng.choice("0123456789"))
        elif kind == "drop":
            del mutated[place : place + rng.randrange(1, 9)]
        elif kind == "double":
            mutated[place:place] = mutated[place : place + rng.randrange(1, 9)]
        elif kind == "exchange":
            other = rng.randrange(8, header_end)
            mutated[place], mutated[other] = mutated[other], mutated[place]
        elif kind == "cut":
            del mutated[rng.randrange(len(mutated)) :]
        else:
            mutated += bytes(rng.randrange(1, 100))
        file.write_bytes(mutated)
        try:
            place = open_model(file).places["clip_l"]
            ours = read_network("clip_l", place)
        except CheckpointError as problem:
            refused += 1
            assert "mutated.safetensors" in str(problem)
            continue
        loaded += 1
        assert all(torch.equal(x, right[name]) for name, x in ours.state_dict().items()), kind
    assert refused + loaded == 2000 and refused > 1000


def test_lfs_pointers_are_recognised(tmp_path):
    pointer = tmp_path / "model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer.*git lfs pull"):
        open_safetensors(pointer)


def test_a_missing_file_is_named_with_what_to_give(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere.safetensors: no such file"):
        open_safetensors(tmp_path / "nowhere.safetensors")


class Bomb:
    def __reduce__(self):
        return (sys.exit, ("unpickled",))


def test_nothing_is_unpickled(tmp_path):
    for name in ("model.safetensors", "model.ckpt", "model.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(CheckpointError):
            read_network("mmdit", tmp_path / name)


# ------------------------------------------------------------------------------------------------------------
# Folders
# ------------------------------------------------------------------------------------------------------------

@pytest.fixture
def model_folder(saved, vocabularies, tmp_path):       # noqa: F811
    folder = tmp_path / "model"
    (folder / "tokenizers" / "t5").mkdir(parents=True)
    shutil.copy(saved, folder / "model.safetensors")
    shutil.copytree(vocabularies[0], folder / "tokenizers" / "clip")
    shutil.copy(vocabularies[1], folder / "tokenizers" / "t5" / "spiece.model")
    return folder


def test_a_model_folder_gives_every_component_ready_for_prompts(model_folder):
    parts = load_components(model_folder)
    assert parts.mmdit.config == MMDIT and parts.vae.config.vae_scale == 1.25
    assert parts.sampling == {"guidance_scale": 4.5} and parts.file == model_folder / "model.safetensors"
    context, pooled = parts.text(["red cat"])
    assert context.shape == (1, 20 + 30, 192) and pooled.shape == (1, 128)        # the stored token counts
    ids = parts.text.tokenize(["red cat"])
    assert ids["clip_l"][0, -1] == parts.text.tokenizers["clip_l"].end and ids["clip_g"][0, -1] == 0


def test_only_what_is_wanted_is_loaded(model_folder):
    parts = load_components(model_folder, ("vae",))
    assert parts.vae is not None and parts.mmdit is None and parts.text is None


def run_folder(model_folder, folder, networks, found=None):
    """As train.py leaves it: the MM-DiT alone, and a config that names the encoders."""
    folder.mkdir()
    save_networks(folder / "model.safetensors", {"mmdit": networks["mmdit"]})
    encoders = model_folder / "model.safetensors"
    named = {"path": str(encoders), "fingerprint": found or fingerprint(encoders, ENCODERS)}
    (folder / "config.json").write_text(json.dumps({"encoders": named}))
    return folder


def test_a_run_folder_takes_its_encoders_from_the_file_it_was_trained_with(model_folder, networks, tmp_path):
    parts = load_components(run_folder(model_folder, tmp_path / "run", networks))
    assert parts.file == tmp_path / "run" / "model.safetensors"
    assert parts.vae.config.vae_scale == 1.25 and set(parts.text.encoders) == {"clip_l", "clip_g", "t5"}


def test_a_run_folder_refuses_other_encoders(model_folder, networks, tmp_path):
    with pytest.raises(CheckpointError, match="expected 0123456789abcdef"):
        load_components(run_folder(model_folder, tmp_path / "run", networks, found="0123456789abcdef"))


def test_what_is_missing_in_a_folder_is_said_with_the_way_out(model_folder, networks, tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_components(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has no model.safetensors"):
        load_components(tmp_path / "empty")
    save_networks(tmp_path / "vae.safetensors", {"vae": networks["vae"]})
    with pytest.raises(CheckpointError, match="holds no mmdit.*'model.diffusion_model.'"):
        load_components(tmp_path / "vae.safetensors", ("mmdit",))
    shutil.rmtree(model_folder / "tokenizers")
    with pytest.raises(CheckpointError, match="no tokenizers there.*--tokenizers"):
        load_components(model_folder, ("text",))


# ------------------------------------------------------------------------------------------------------------
# Writing and fingerprints
# ------------------------------------------------------------------------------------------------------------

def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_text("old")

    def disk_full(partial):
        partial.write_text("half of the new")
        raise OSError("No space left on device")
    with pytest.raises(OSError, match="could not write .*model.safetensors.*No space left.*untouched"):
        write_atomically(file, disk_full)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_writer_writes_beside_the_file_until_it_is_whole(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_text("old")

    def write(partial):
        partial.write_text("new")
        assert partial.parent == tmp_path and partial != file and file.read_text() == "old"
    write_atomically(file, write)
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


def test_fingerprint_changes_with_any_weight_tensor_and_not_with_the_copy(saved, tmp_path):
    before = fingerprint(saved)
    assert fingerprint(shutil.copy(saved, tmp_path / "copy.safetensors")) == before
    for name in list(load_file(saved))[::40]:
        changed = resave(saved, tmp_path / "changed.safetensors", lambda x: x[name].view(-1)[0].add_(1))
        assert fingerprint(changed) != before, name
    name = PREFIXES["mmdit"] + "pos_embed"
    renamed = resave(saved, tmp_path / "renamed.safetensors", lambda x: x.update({name + "s": x.pop(name)}))
    reshaped = resave(saved, tmp_path / "reshaped.safetensors", lambda x: x.update({name: x.pop(name)[0]}))
    assert len({before, fingerprint(renamed), fingerprint(reshaped)}) == 3


def test_fingerprint_of_the_encoders_does_not_change_with_the_mmdit(saved, tmp_path):
    def change(name):
        return resave(saved, tmp_path / "changed.safetensors", lambda x: x[name].view(-1)[0].add_(1))
    before = fingerprint(saved, ENCODERS)
    assert fingerprint(change(PREFIXES["mmdit"] + "x_embedder.proj.weight"), ENCODERS) == before
    assert fingerprint(change(PREFIXES["vae"] + "decoder.conv_in.weight"), ENCODERS) != before
    assert fingerprint(change(PREFIXES["t5"] + "shared.weight"), ENCODERS) != before


def test_running_checkpoints_lists_the_networks(saved, capsys, monkeypatch, networks, tmp_path):
    monkeypatch.setattr(sys, "argv", ["checkpoints.py", "info", str(saved)])
    checkpoints.main()
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert list(lines) == list(PREFIXES)
    for name, network in networks.items():
        tensors = network.state_dict().values()
        assert int(lines[name][1]) == len(tensors)
        assert float(lines[name][3]) == pytest.approx(sum(x.numel() for x in tensors) / 1e6, abs=1e-3)
    monkeypatch.setattr(sys, "argv", ["checkpoints.py", "info", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="no such file"):
        checkpoints.main()
