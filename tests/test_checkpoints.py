"""checkpoints.py: files come back as they were written; broken and strange ones are refused."""

import json
import os
import pickle
import random
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import checkpoints
import convert
from checkpoints import (
    CLIP_NAMES, FROZEN, PREFIXES, SHIPPED, T5_NAMES, Model, find_model_file, fingerprint,
    load_components, open_model, open_weights, portable, read_network, released_sampling,
    released_tensors, rename, save_networks)
from mmdit import MMDiT, MMDiTConfig
from text_encoders import CLIPConfig, CLIPTextEncoder, T5Config, T5Encoder, TextConfig
from vae import VAE, VAEConfig

GOLDEN = Path(__file__).parent / "golden"
DATA = Path(os.environ.get("DATA_DIR") or Path(__file__).parents[2] / "shared" / "data")
MMDIT = MMDiTConfig(depth=2, latent_channels=4, context_dim=192, pooled_dim=128,
                    pos_embed_max_size=6, position_start=-1.5, position_step=0.25,
                    dual_attention_layers=1)
CLIP = CLIPConfig(vocab_size=2048, hidden_size=64, num_layers=2, max_length=77)
TEXT = TextConfig(64, 64, 192, clip_length=20, t5_length=30)
TABLE = PREFIXES["t5"] + "encoder.embed_tokens.weight"       # T5's table under its second name


def five_networks():
    """One of each, small and random, as none of the defaults would make them."""
    torch.manual_seed(0)
    vae = VAEConfig(4, (8, 8, 16, 16), norm_groups=4, vae_scale=1.25, vae_shift=-0.5)
    clip_g = replace(CLIP, activation="gelu", projection_dim=64)
    t5 = T5Config(vocab_size=2064, hidden_size=192, ff_size=64, num_layers=2, num_heads=3)
    networks = {"mmdit": MMDiT(MMDIT), "vae": VAE(vae), "clip_l": CLIPTextEncoder(CLIP),
                "clip_g": CLIPTextEncoder(clip_g), "t5": T5Encoder(t5)}
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
    save_networks(file, networks, TEXT, {"guidance_scale": 4.5}, words=("red", "cat"),
                  sizes=("64x96", "64x64"))
    return file


@pytest.fixture
def model_folder(saved, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(SHIPPED / "tokenizers", folder / "tokenizers")
    shutil.copy(saved, folder / "model.safetensors")
    return folder


def resave(saved, file, change, config=None):
    """A copy of a saved file with its tensors changed by `change(tensors)`."""
    tensors = load_file(saved)
    with safe_open(saved, framework="pt") as opened:
        metadata = opened.metadata()
    change(tensors)
    if config is not None:
        metadata = {"config": config if isinstance(config, str) else json.dumps(config)}
    save_file(tensors, file, metadata)
    return file


def equal(network, other):
    mine, theirs = network.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def read(name, file, **more):
    return read_network(name, open_model(file), **more)


# ---- Round trips ---------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PREFIXES)
def test_a_saved_network_comes_back_as_it_was(name, networks, saved):
    back = read(name, saved)
    assert back.config == networks[name].config and equal(back, networks[name])
    assert not back.training and not any(p.requires_grad for p in back.parameters())


def test_metadata_keeps_what_tensors_cannot_tell(saved):
    assert open_model(saved).config == {
        "sampling": {"guidance_scale": 4.5}, "words": ["cat", "red"],
        "sizes": ["64x64", "64x96"],
        "mmdit": {"position_start": -1.5, "position_step": 0.25},
        "vae": {"norm_groups": 4, "vae_scale": 1.25, "vae_shift": -0.5}, "text": vars(TEXT)}


@pytest.mark.parametrize("change", [{"qk_norm": False}, {"dual_attention_layers": 0},
                                    {"depth": 1}, {"patch_size": 4, "latent_channels": 8}], ids=str)
def test_the_sizes_of_an_mmdit_are_inferred_from_its_tensors(tmp_path, change):
    config = replace(MMDIT, **change)
    save_networks(tmp_path / "m.safetensors", {"mmdit": MMDiT(config)})
    assert read("mmdit", tmp_path / "m.safetensors").config == config


def test_half_precision_is_half_the_size_and_keeps_all_but_the_matrices_in_fp32(
        tmp_path, networks, saved):
    for dtype in (torch.bfloat16, torch.float16):
        file = tmp_path / f"{dtype}.safetensors"
        save_networks(file, networks, dtype=dtype)
        assert file.stat().st_size < 0.55 * saved.stat().st_size
        for key, x in read("vae", file).state_dict().items():
            assert torch.equal(x, networks["vae"].state_dict()[key].to(dtype).float())
        half = read("mmdit", file, dtype=dtype).state_dict()
        assert half["joint_blocks.0.x_block.mlp.fc1.weight"].dtype == dtype
        assert half["pos_embed"].dtype == half["joint_blocks.0.x_block.mlp.fc1.bias"].dtype
        assert half["pos_embed"].dtype == torch.float32
        assert {x.dtype for x in load_file(file).values()} == {dtype}


def test_embeddings_stay_fp32_in_half_precision(saved):
    half = read("clip_g", saved, dtype=torch.bfloat16).state_dict()
    assert half["token_embedding.weight"].dtype == torch.float32
    assert half["layers.0.fc1.weight"].dtype == torch.bfloat16


def test_a_network_that_was_read_does_not_change_with_its_file(networks, saved, tmp_path):
    """The tensors of an opened file are mapped; those of a network are copies."""
    file = Path(shutil.copy(saved, tmp_path / "m.safetensors"))
    network = read("vae", file)
    with open(file, "r+b") as raw:
        raw.write(bytes(file.stat().st_size))
    assert equal(network, networks["vae"])


def test_t5_is_never_fp16_because_it_overflows(model_folder):
    text = load_components(model_folder, ("text",), torch.float16).text
    matrix = "layers.0.feed_forward.gate.weight"
    assert text.encoders["t5"].state_dict()[matrix].dtype == torch.bfloat16
    assert text.encoders["clip_l"].state_dict()["layers.0.fc1.weight"].dtype == torch.float16


def test_released_files_have_sd3s_normalisation_and_positions():
    model = open_model(GOLDEN / "i_bundle" / "weights.safetensors")
    vae = read_network("vae", model).config
    assert (vae.vae_scale, vae.vae_shift, vae.norm_groups) == (1.5305, 0.0609, 32)
    mmdit = read_network("mmdit", model)
    grid = mmdit.config.pos_embed_max_size
    assert (mmdit.config.position_start, mmdit.config.position_step) == (0, 64 / grid)
    table = load_file(GOLDEN / "i_bundle" / "weights.safetensors")[PREFIXES["mmdit"] + "pos_embed"]
    assert torch.equal(mmdit.pos_embed, table.float())       # the file's own, whatever it holds


# ---- Released names ------------------------------------------------------------------------------

@pytest.mark.parametrize("case, table", [("d_clip_l", CLIP_NAMES), ("e_clip_g", CLIP_NAMES),
                                         ("f_t5", T5_NAMES)])
def test_renaming_released_names_and_back_gives_the_released_names(case, table):
    names = set(load_file(GOLDEN / case / "weights.safetensors"))
    back = {ours: released for released, ours in table.items() if ours}
    again = {rename(rename(name, table), back) for name in names}
    assert again == names - {"encoder.embed_tokens.weight"}


def test_a_whole_file_has_the_released_names_and_numbers(tmp_path):
    """i_bundle has the layout of the published single file, with T5's table under both names."""
    source, target = GOLDEN / "i_bundle" / "weights.safetensors", tmp_path / "model.safetensors"
    save_networks(target, {name: read(name, source) for name in PREFIXES}, dtype=torch.float16)
    before, after = load_file(source), load_file(target)
    assert before.keys() == after.keys() and TABLE in after
    assert all(torch.equal(x, before[key].to(torch.float32).half()) for key, x in after.items())


RESAVED = {
    "temperatures": lambda x: x.update({"text_encoders.clip_l.logit_scale": torch.ones(()),
                                        PREFIXES["clip_g"] + "logit_scale": torch.ones(())}),
    "identity": lambda x: x.update({PREFIXES["clip_l"] + "text_projection.weight": torch.eye(64)}),
    "position ids": lambda x: x.update({
        PREFIXES["clip_l"] + "text_model.embeddings.position_ids": torch.arange(77)[None]}),
    "one T5 table": lambda x: x.pop(TABLE),
    "the other T5 table": lambda x: x.pop(PREFIXES["t5"] + "shared.weight"),
}


@pytest.mark.parametrize("what", RESAVED)
def test_files_saved_again_by_others_load_all_the_same(what, networks, saved, tmp_path):
    file = resave(saved, tmp_path / "other.safetensors", RESAVED[what])
    for name in ("clip_l", "clip_g", "t5"):
        assert equal(read(name, file), networks[name])


# ---- Wrong files ---------------------------------------------------------------------------------

WRONG = {
    "missing": ("mmdit", lambda x: x.pop("joint_blocks.1.x_block.mlp.fc2.weight"),
                "Missing.*joint_blocks.1.x_block.mlp.fc2.weight"),
    "unknown": ("vae", lambda x: x.update({"quant_conv.weight": torch.ones(1)}),
                "Unexpected.*quant_conv.weight"),
    "shape": ("mmdit", lambda x: x.update({"joint_blocks.0.x_block.attn.proj.weight":
                                           torch.ones(128, 64)}),
              r"joint_blocks.0.x_block.attn.proj.weight.*\[128, 64\].*\[128, 128\]"),
    "mmdit size": ("mmdit", lambda x: x.pop("x_embedder.proj.weight"), "lacks 'x_embedder.proj"),
    "vae size": ("vae", lambda x: x.pop("decoder.conv_in.weight"), "lacks 'decoder.conv_in.weight"),
    "clip size": ("clip_l", lambda x: x.pop("text_model.embeddings.token_embedding.weight"),
                  "lacks 'token_embedding.weight"),
    "integers": ("vae", lambda x: x.update({"decoder.conv_in.bias": torch.ones(16).int()}),
                 "decoder.conv_in.bias is torch.int32"),
    "depth bomb": ("mmdit", lambda x: x.update({"x_embedder.proj.weight":
                                                torch.ones(6400000, 4, 2, 0)}),
                   r"x_embedder.proj.weight.*6400000, 4, 2, 0.*128, 4, 2, 2"),
    "width bomb": ("mmdit", lambda x: x.update({"x_embedder.proj.weight":
                                                torch.ones(640000, 4, 1, 1).half()}),
                   r"x_embedder.proj.weight.*640000, 4, 1, 1.*128, 4, 1, 1"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_named_in_one_sentence(what, saved, tmp_path):
    name, change, sentence = WRONG[what]

    def change_one(tensors):
        part = {}
        for key in [key for key in tensors if key.startswith(PREFIXES[name])]:
            part[key.removeprefix(PREFIXES[name])] = tensors.pop(key)
        change(part)
        tensors.update({PREFIXES[name] + key: x for key, x in part.items()})
    file = resave(saved, tmp_path / "m.safetensors", change_one)
    started = time.time()
    with pytest.raises(ValueError, match=f"m.safetensors.* {name} .*{sentence}") as problem:
        read(name, file)
    assert "\n" not in str(problem.value) and time.time() - started < 5


def test_two_tables_of_t5_that_differ_are_refused(saved, tmp_path):
    """Programs that read one of them would draw other pictures than those that read the other."""
    for change in (lambda x: x[TABLE][5, 7].add_(1), lambda x: x.update({TABLE: torch.ones(3)})):
        file = resave(saved, tmp_path / "m.safetensors", change)
        with pytest.raises(ValueError, match="m.safetensors: .*shared.weight and its second copy"):
            open_model(file)


@pytest.mark.parametrize("config, named", [
    ({"vae": {"vae_scale": 0}}, "vae_scale 0"), ({"vae": {"norm_groups": "8"}}, "norm_groups '8'"),
    ({"vae": {"vae_shift": float("nan")}}, "vae_shift nan"), ({"text": {"t5_length": 2.5}}, "2.5"),
    ({"text": {"clip_length": 10**9}}, "clip_length 1000000000"), ({"vae": 5}, "attribute"),
    ({"mmdit": {"position_step": -1}}, "position_step -1"), ({"vae": {"colour": 1}}, "colour"),
    ({"words": 5}, "words 5"), ({"words": ["red", 2]}, "words 2 must be a text"),
    ({"words": "red"}, "words 'red' must be a list"), ({"sampling": 3}, "sampling 3"),
    ("[1]", "attribute"), ("{", "whole safetensors file"),
    ("[" * 100_000 + "]" * 100_000, "recursion")])
def test_metadata_of_a_wrong_type_or_range_is_refused(config, named, saved, tmp_path):
    file = resave(saved, tmp_path / "m.safetensors", lambda x: None, config)
    with pytest.raises(ValueError, match=f"m.safetensors.*({named})"):
        read("vae", file)


def test_a_header_of_a_million_keys_is_refused_at_once(tmp_path):
    """It would be parsed for a minute; SD3.5-large with all its encoders has 2,000 keys."""
    entry = '"%07d": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    header = ("{" + ",".join(entry % i for i in range(10**6)) + "}").encode()
    file = tmp_path / "bomb.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    started = time.time()
    with pytest.raises(ValueError, match="bomb.safetensors.*too long for a model"):
        open_weights(file)
    assert time.time() - started < 2


def test_the_header_of_a_file_is_parsed_once_for_all_networks(model_folder, monkeypatch):
    opened = []

    def watched(file, framework):
        opened.append(file)
        return safe_open(file, framework)
    monkeypatch.setattr(checkpoints, "safe_open", watched)
    load_components(model_folder)
    assert opened == [model_folder / "model.safetensors"]


def bad_files():
    file = DATA / "bad" / "expected.json"
    expected = json.loads(file.read_text()) if file.is_file() else []
    return [(DATA / "bad" / e["file"], e) for e in expected if e["file"].startswith("safetensors")]


@pytest.mark.skipif(not bad_files(), reason=f"no broken files under {DATA}")
def test_broken_safetensors_are_refused_by_name_and_valid_ones_open():
    assert len(bad_files()) >= 15
    for file, expected in bad_files():
        if expected["expect"] != "error" or expected["problem"].startswith("valid file"):
            assert "weight" in open_weights(file)[0]
        else:
            with pytest.raises(ValueError, match=file.name):
                open_weights(file)
        with pytest.raises(ValueError, match=file.name):
            open_model(file)


def mutate(content, header_end, rng):
    """Change some bytes of the header, or the length of the file."""
    mutated, place = bytearray(content), rng.randrange(header_end)
    kind = rng.choice(("flip", "digit", "drop", "double", "exchange", "cut", "prolong"))
    if kind == "flip":
        mutated[place] ^= 1 << rng.randrange(8)
    elif kind == "digit":                                    # another number in a shape or offset
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
    return mutated


def test_2000_random_mutations_are_refused_or_load_what_is_stored(tmp_path):
    """Either one ValueError, or a network whose every tensor is, bit for bit, one of the
    original file's under its own name."""
    rng = random.Random(0)
    network = CLIPTextEncoder(CLIPConfig(8, 64, 1, 4)).requires_grad_(False)
    whole = tmp_path / "whole.safetensors"
    tensors = released_tensors("clip_l", network, torch.float16)
    save_file({PREFIXES["clip_l"] + key: x for key, x in tensors.items()}, whole)
    content, right = whole.read_bytes(), read("clip_l", whole).state_dict()
    header_end = 8 + int.from_bytes(content[:8], "little")
    refused = 0
    for i in range(2000):
        file = tmp_path / f"mutated-{i}.safetensors"
        file.write_bytes(mutate(content, header_end, rng))
        try:
            ours = read("clip_l", file)
        except ValueError as problem:
            refused += 1
            assert file.name in str(problem)
        else:
            assert ours is None or all(torch.equal(x, right[key])
                                       for key, x in ours.state_dict().items())
        file.unlink()
    assert 1000 < refused < 2000


class Bomb:
    def __reduce__(self):
        return (sys.exit, ("unpickled",))


def test_nothing_is_unpickled(tmp_path):
    for name in ("model.safetensors", "model.ckpt", "model.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(ValueError, match="pickle, which is never opened"):
            open_model(tmp_path / name)


# ---- Folders -------------------------------------------------------------------------------------

def test_a_model_folder_gives_every_component_ready_for_prompts(model_folder):
    parts = load_components(model_folder)
    assert parts.mmdit.config == MMDIT and parts.vae.config.vae_scale == 1.25
    assert parts.sampling == {"guidance_scale": 4.5} and parts.words == ("cat", "red")
    assert parts.sizes == ("64x64", "64x96")
    assert parts.file == model_folder / "model.safetensors" and parts.missing == ()
    context, pooled = parts.text(["red cat"])
    assert context.shape == (1, 20 + 30, 192) and pooled.shape == (1, 128)   # the stored counts
    ids = parts.text.tokenize(["red cat"])
    assert ids["clip_l"][0, -1] == 2047 and ids["clip_g"][0, -1] == 0        # their paddings


def test_only_what_is_wanted_is_loaded(model_folder):
    parts = load_components(model_folder, ("vae",))
    assert parts.vae is not None and parts.mmdit is None and parts.text is None


def run_folder(model_folder, folder, networks, found=None, path=None):
    """As train.py leaves it: the MM-DiT alone, and a config.json that names the encoders."""
    folder.mkdir()
    save_networks(folder / "model.safetensors", {"mmdit": networks["mmdit"]})
    encoders = model_folder / "model.safetensors"
    named = {"path": path or str(encoders), "tokenizers": "",
             "fingerprint": found or fingerprint(encoders, FROZEN)}
    (folder / "config.json").write_text(json.dumps({"encoders": named}))
    return folder


def test_a_run_folder_takes_its_encoders_from_the_file_it_was_trained_with(
        model_folder, networks, tmp_path):
    parts = load_components(run_folder(model_folder, tmp_path / "run", networks))
    assert parts.file == tmp_path / "run" / "model.safetensors"
    assert parts.vae.config.vae_scale == 1.25 and len(parts.text.encoders) == 3


def test_a_run_folder_refuses_other_encoders_and_never_asks_the_hub(
        model_folder, networks, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="fingerprint is not 0123456789abcdef"):
        load_components(run_folder(model_folder, tmp_path / "a", networks, "0123456789abcdef"))
    monkeypatch.setattr(convert, "from_hub", lambda name: pytest.fail(name))
    with pytest.raises(ValueError, match="someone/repo: no such file or folder"):
        load_components(run_folder(model_folder, tmp_path / "b", networks, path="someone/repo"))


def test_what_is_missing_in_a_folder_is_said_with_the_way_out(model_folder, networks, tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        load_components(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no model.safetensors"):
        load_components(tmp_path / "empty")
    save_networks(tmp_path / "vae.safetensors", {"vae": networks["vae"]})
    with pytest.raises(ValueError, match="holds no mmdit, only vae.*--vae"):
        load_components(tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="empty: no tokenizers there"):
        load_components(model_folder, ("text",), tokenizers=tmp_path / "empty")
    shutil.rmtree(model_folder / "tokenizers")
    with pytest.raises(ValueError, match="no tokenizers there.*--tokenizers"):
        load_components(model_folder, ("text",))


def test_a_tokenizer_of_another_model_is_refused(model_folder):
    """Ids beyond the table of embeddings, or shifted ids, would give wrong pictures in silence."""
    file = model_folder / "tokenizers" / "clip" / "vocab.json"
    vocabulary = json.loads(file.read_text())
    for step in (-1, 1):
        changed = {word: i + step for word, i in vocabulary.items() if i + step >= 0}
        file.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="tokenizer"):
            load_components(model_folder, ("text",))


def test_paths_in_records_are_found_from_every_working_folder(tmp_path, monkeypatch, model_folder):
    assert portable(SHIPPED / "model.safetensors") == "pretrained/tiny/model.safetensors"
    monkeypatch.chdir(model_folder.parent)
    assert portable("model") == str(model_folder)
    assert find_model_file("pretrained/tiny") == SHIPPED / "model.safetensors"
    monkeypatch.setenv("HOME", str(model_folder.parent))
    assert find_model_file("~/model") == model_folder / "model.safetensors"
    (tmp_path / "pretrained" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="pretrained/tiny has no model.safetensors yet"):
        find_model_file("pretrained/tiny")               # not another model of this name


def test_the_model_cards_of_sd35_decide_what_their_files_do_not_say():
    """Steps and guidance of the cards. A large model is turbo by its name only; SD3 has none."""
    def settings(depth, second_attentions, name):
        names = [f"joint_blocks.{i}.x_block.attn.qkv.weight" for i in range(depth)]
        names += [f"joint_blocks.{i}.x_block.attn2.qkv.weight" for i in range(second_attentions)]
        model = Model(Path(name), {"mmdit": dict.fromkeys(names)}, {}, None)
        return released_sampling(model, f"models/{name}")
    assert settings(24, 0, "sd3_medium.safetensors") == {}
    medium = {"num_steps": 50, "guidance_scale": 4.0, "skip_layers": (7, 8, 9)}
    assert settings(24, 13, "sd3.5_medium.safetensors") == medium
    assert settings(38, 0, "sd3.5_large.safetensors") == {"guidance_scale": 3.5}
    turbo = settings(38, 0, "SD3.5_Large_Turbo.safetensors")
    assert turbo == {"num_steps": 4, "guidance_scale": 1.0}


# ---- Fingerprints --------------------------------------------------------------------------------

def test_the_fingerprint_covers_every_tensor_to_its_last_byte(saved, tmp_path):
    before = fingerprint(saved)
    assert fingerprint(shutil.copy(saved, tmp_path / "copy.safetensors")) == before
    seen = {before}
    tables = [TABLE, PREFIXES["t5"] + "shared.weight"]       # T5's table is there twice.
    names = [[name] for name in load_file(saved) if name not in tables][::40] + [tables]
    for i, same in enumerate(names):
        def change(tensors, same=same):
            for name in same:
                tensors[name].view(-1)[-1] += 1
        seen.add(fingerprint(resave(saved, tmp_path / f"{i}.safetensors", change)))
    assert len(seen) == len(names) + 1
    file = tmp_path / "scale.safetensors"
    twin = resave(saved, file, lambda x: None, {"vae": {"vae_scale": 2.0}})
    assert fingerprint(twin) not in seen


def test_a_file_that_is_written_again_is_read_again(networks, tmp_path):
    file = tmp_path / "model.safetensors"
    seen = set()
    for i in range(2):
        save_networks(file, {"vae": networks["vae"]}, sampling={"guidance_scale": i + 1})
        with open(file, "r+b") as raw:                       # another last byte, as many bytes
            raw.seek(-1, os.SEEK_END)
            raw.write(bytes([i]))
        os.utime(file, ns=(i, i))
        assert open_model(file).config["sampling"] == {"guidance_scale": i + 1}
        seen.add(fingerprint(file))
    assert len(seen) == 2


def test_the_fingerprint_of_the_encoders_does_not_change_with_the_mmdit(saved, tmp_path):
    def change(part, name):
        return resave(saved, tmp_path / f"{part}.safetensors",
                      lambda x: x[PREFIXES[part] + name].view(-1)[0].add_(1))
    before = fingerprint(saved, FROZEN)
    assert fingerprint(change("mmdit", "x_embedder.proj.weight"), FROZEN) == before
    assert fingerprint(change("vae", "decoder.conv_in.weight"), FROZEN) != before


def test_the_fingerprint_changes_when_an_encoder_is_put_beside_the_file(networks, tmp_path):
    part = {name: network for name, network in networks.items() if name != "t5"}
    save_networks(tmp_path / "sd3.safetensors", part, TEXT)
    before = fingerprint(tmp_path / "sd3.safetensors", FROZEN)
    save_file(released_tensors("t5", networks["t5"]), tmp_path / "t5xxl_fp16.safetensors")
    assert fingerprint(tmp_path / "sd3.safetensors", FROZEN) != before
