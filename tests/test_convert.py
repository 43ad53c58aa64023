"""convert.py: what others write is read or refused by name; what we write is read by others."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoints import TABLE, TEXT, equal, five_networks, read, resave

import checkpoints
import convert
from checkpoints import (
    PREFIXES, SHIPPED, Model, find_model_file, load_components, make_metadata, open_model,
    read_network, released_tensors, save_networks)

ROOT = Path(__file__).parents[1]
CONV = PREFIXES["vae"] + "decoder.conv_in.weight"


@pytest.fixture(scope="module")
def networks():
    return five_networks()


@pytest.fixture(scope="module")
def saved(networks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(SHIPPED / "tokenizers", folder / "tokenizers")
    save_networks(folder / "model.safetensors", networks, TEXT, {"timestep_shift": 2.0},
                  words=("red",), sizes=("64x96",))
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def exported(saved):
    convert.export(saved, saved.parent / "diffusers", "diffusers")
    return saved.parent / "diffusers"


@pytest.fixture
def folder(exported, tmp_path):
    """A diffusers folder to change."""
    return Path(shutil.copytree(exported, tmp_path / "diffusers"))


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---- Diffusers folders ---------------------------------------------------------------------------

def test_an_exported_folder_comes_back_as_it_was(exported, networks):
    parts = load_components(exported)
    assert equal(parts.mmdit, networks["mmdit"]) and equal(parts.vae, networks["vae"])
    assert parts.mmdit.config == networks["mmdit"].config
    assert parts.vae.config == networks["vae"].config
    for name, encoder in parts.text.encoders.items():
        assert equal(encoder, networks[name]) and encoder.config == networks[name].config
    assert parts.text.config == TEXT and parts.words == ("red",)
    assert parts.sizes == ("64x96",)
    assert parts.sampling == {"timestep_shift": 2.0}
    scheduler = json.loads((exported / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["shift"] == 2.0


def test_a_folder_without_our_metadata_tells_its_numbers_in_its_json_files(folder, networks):
    for file in folder.rglob("*.safetensors"):
        save_file(load_file(file), file)
    edit(folder / "scheduler" / "scheduler_config.json", shift=1.5)
    parts = load_components(folder)
    assert parts.vae.config == networks["vae"].config and parts.sampling["timestep_shift"] == 1.5


@pytest.mark.parametrize("file, field, value", [
    ("transformer/config.json", "attention_head_dim", 32),
    ("text_encoder/config.json", "hidden_act", "gelu"),
    ("text_encoder_2/config.json", "hidden_act", "quick_gelu"),
    ("text_encoder_3/config.json", "feed_forward_proj", "relu"),
    ("scheduler/scheduler_config.json", "use_dynamic_shifting", True),
    ("scheduler/scheduler_config.json", "_class_name", "DDIMScheduler"),
    ("scheduler/scheduler_config.json", "shift", "3"), ("vae/config.json", "scaling_factor", "1"),
    ("vae/config.json", "scaling_factor", 0), ("vae/config.json", "norm_num_groups", 8.5),
    ("text_encoder/config.json", "num_attention_heads", 2)])
def test_a_folder_that_contradicts_us_is_refused_by_its_field(folder, file, field, value):
    edit(folder / file, **{field: value})
    with pytest.raises(ValueError, match=f"{file}.*{field}"):
        load_components(folder)


@pytest.mark.parametrize("changes, sentence", [
    ({"vae": 5}, "vae holds no .safetensors"),
    ({"_class_name": "FluxPipeline"}, "is a FluxPipeline"),
    ({"_class_name": 3}, "model_index.json.*_class_name")])
def test_a_wrong_model_index_is_refused(folder, changes, sentence):
    edit(folder / "model_index.json", **changes)
    shutil.rmtree(folder / "vae")
    with pytest.raises(ValueError, match=sentence):
        open_model(folder)


def test_parts_that_are_missing_or_pickled_are_named(folder):
    shutil.rmtree(folder / "text_encoder_3")                 # T5 may lack
    assert open_model(folder).networks.keys() == {"mmdit", "vae", "clip_l", "clip_g"}
    for file in (folder / "vae").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(ValueError, match="vae holds no .safetensors.*pickle"):
        open_model(folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(ValueError, match="vae holds no .safetensors"):
        open_model(folder)
    (folder / "model_index.json").unlink()
    (folder / "vae").mkdir()
    with pytest.raises(ValueError, match="vae holds no .safetensors"):
        open_model(folder)
    for file in (folder / "transformer").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="transformer holds no .safetensors"):
        open_model(folder)
    with pytest.raises(ValueError, match="transformer has no model.safe.* no whole diffusers"):
        open_model(folder / "transformer")


def test_shards_are_read_and_fp16_variants_only_where_there_is_nothing_else(folder, networks):
    whole = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = list(load_file(whole).items())
    shards = [whole.with_name(f"part-{i}-of-3.safetensors") for i in range(3)]
    for i, shard in enumerate(shards):
        save_file(dict(tensors[i::3]), shard)
    zeros = {key: torch.zeros_like(tensor) for key, tensor in tensors}
    save_file(zeros, whole.with_name("diffusion_pytorch_model.fp16.safetensors"))
    whole.unlink()
    assert equal(read("mmdit", folder), networks["mmdit"])
    shards[1].unlink()
    with pytest.raises(ValueError, match="diffusers: its mmdit does not fit: it lacks .*attn.v."):
        read("mmdit", folder)
    shards[0].unlink()
    shards[2].unlink()
    assert not read("mmdit", folder).x_embedder.proj.weight.any()      # the fp16 variant alone


def test_another_vae_takes_the_place_of_that_of_a_folder(folder, networks, saved):
    """It is a released file: its attention has 1x1 kernels already."""
    other = resave(saved, folder / "other.safetensors", lambda x: x[CONV].add_(1), {
        "vae": {"norm_groups": 4, "vae_scale": 2.0, "vae_shift": 0.5}})
    parts = load_components(folder, vae=other)
    expected = networks["vae"].state_dict() | {"decoder.conv_in.weight": load_file(other)[CONV]}
    for key, tensor in parts.vae.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    assert (parts.vae.config.vae_scale, parts.vae.config.vae_shift) == (2.0, 0.5)
    assert equal(parts.mmdit, networks["mmdit"])


def test_a_folder_with_tokenizer_json_only_gives_the_same_ids(exported, folder):
    """Today's transformers writes nothing else."""
    transformers = pytest.importorskip("transformers")
    expected = load_components(exported, ("text",)).text
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        kind = transformers.CLIPTokenizerFast
        if name == "tokenizer_3":
            kind = transformers.T5TokenizerFast
        tokenizer = kind.from_pretrained(folder / name)
        shutil.rmtree(folder / name)
        tokenizer.save_pretrained(folder / name)
        assert not (folder / name / "merges.txt").exists()
        assert not (folder / name / "spiece.model").exists()
    text = load_components(folder, ("text",)).text
    prompts = ["a red circle", "Two   BLUE stars, left of it's cat!", "", "woman scientist 42"]
    for name, ids in expected.tokenize(prompts).items():
        assert torch.equal(ids, text.tokenize(prompts)[name]), name


# ---- The hub -------------------------------------------------------------------------------------

def test_a_hub_name_without_a_network_is_answered_within_seconds():
    """The hub's client would try again for 26 s. A run's own folders are never taken for names."""
    code = ("import checkpoints, convert, socket, time\n"
            "def no_network(*a, **k): raise socket.gaierror(-2, 'Name or service not known')\n"
            "socket.getaddrinfo = no_network\n"
            "started = time.time()\n"
            "try: checkpoints.open_model('someone/no-such-model')\n"
            "except ValueError as problem: print(problem, time.time() - started, sep='\\n')\n")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "someone/no-such-model: no such file or folder here" in out.stdout, out.stderr
    assert float(out.stdout.split()[-1]) < 15


@pytest.mark.parametrize("path", ["runs/mine", "out/x", "pretrained/other", "a/b.safetensors",
                                  "a/b/c", "/a/b", "../a/b"])
def test_what_is_no_hub_name_is_never_asked_for(path, monkeypatch):
    monkeypatch.setattr(convert, "from_hub", lambda name: pytest.fail(name))
    with pytest.raises(ValueError, match="no such file or folder"):
        find_model_file(path)


# ---- Separate files ------------------------------------------------------------------------------

def place_comfyui(root, networks):
    """models/checkpoints/sd3.safetensors with the MM-DiT alone, the rest in its own folders."""
    for part in ("checkpoints", "clip", "text_encoders", "vae"):
        (root / part).mkdir(parents=True)
    save_networks(root / "checkpoints" / "sd3.safetensors", {"mmdit": networks["mmdit"]}, TEXT)
    save_file(released_tensors("clip_l", networks["clip_l"]), root / "clip" / "clip_l.safetensors")
    save_file(released_tensors("clip_g", networks["clip_g"]),
              root / "text_encoders" / "clip_g.safetensors")
    save_networks(root / "vae" / "ours.safetensors", {"vae": networks["vae"]})
    shutil.copytree(SHIPPED / "tokenizers", root / "checkpoints" / "tokenizers")
    return root / "checkpoints" / "sd3.safetensors"


def test_comfyuis_tree_is_found_with_fp16_before_float8(networks, tmp_path, capsys):
    file = place_comfyui(tmp_path, networks)
    t5 = released_tensors("t5", networks["t5"])
    save_file(t5, tmp_path / "clip" / "t5xxl_fp16.safetensors")
    save_file({key: x.to(torch.float8_e4m3fn) for key, x in t5.items()},
              tmp_path / "clip" / "t5xxl_fp8_e4m3fn.safetensors")
    parts = load_components(file)
    assert equal(parts.mmdit, networks["mmdit"])
    assert equal(parts.vae, networks["vae"]) and parts.vae.config.vae_scale == 1.25
    for name, encoder in parts.text.encoders.items():
        assert equal(encoder, networks[name])
    assert parts.missing == ()
    open_model(file)                                         # Each file is named once.
    noted = capsys.readouterr().err
    assert noted.count("note: ") == 4 and "note: the t5 of" in noted and "t5xxl_fp16" in noted
    assert re.search(f"note: the vae of {file} is .*vae/ours.safetensors", noted)


def test_of_several_vaes_beside_a_model_none_is_guessed(networks, tmp_path):
    """ComfyUI's ae.safetensors is that of Flux. Its shapes are the same, its scale is another."""
    file = place_comfyui(tmp_path, networks)
    shutil.copy(tmp_path / "vae" / "ours.safetensors", tmp_path / "vae" / "ae.safetensors")
    with pytest.raises(ValueError, match=r"vae/ae.safe.*, .*vae/ours.safe.*: .*sd3.*with --vae"):
        open_model(file)
    parts = load_components(file, ("vae",), vae=tmp_path / "vae" / "ours.safetensors")
    assert equal(parts.vae, networks["vae"])


@pytest.mark.parametrize("left_out, columns", [("clip_l", slice(0, 64)),
                                               ("clip_g", slice(64, 128))])
def test_missing_encoders_of_a_small_model_take_their_widths_from_the_mmdit(
        left_out, columns, networks, tmp_path, capsys):
    file = place_comfyui(tmp_path, networks)                 # It has no T5.
    for found in tmp_path.glob(f"*/{left_out}.safetensors"):
        found.unlink()
    save_file(load_file(file), file)                         # without the metadata
    parts = load_components(file)
    assert parts.missing == (left_out, "t5")
    load_components(file, ("text",))
    noted = capsys.readouterr().err
    assert noted.count(f"has no {left_out}, t5: zeros take the place") == 1
    assert noted.count("name them with --text-encoders") == 1
    context, pooled = parts.text(["a cat"])
    assert context.shape[2] == 192 and pooled.shape == (1, 128)
    assert not pooled[:, columns].any() and pooled.any()
    parts.mmdit(torch.zeros(1, 4, 4, 4), torch.ones(1), context, pooled)


def test_a_clip_l_file_is_known_by_its_name_even_if_it_has_a_projection(networks, tmp_path):
    file = place_comfyui(tmp_path, networks)
    tensors = released_tensors("clip_l", networks["clip_l"])
    tensors["text_projection.weight"] = torch.eye(64)
    save_file(tensors, tmp_path / "clip" / "clip_l.safetensors")
    assert equal(load_components(file, ("text",)).text.encoders["clip_l"], networks["clip_l"])


def test_both_clips_of_a_diffusers_folder_can_be_named(networks, saved, tmp_path):
    """Its CLIP-L has a projection and no telling name, but lies in text_encoder/. Elsewhere it is
    taken for CLIP-G, and that is refused."""
    convert.export(saved, tmp_path / "folder", "diffusers")
    save_networks(tmp_path / "m.safetensors", {"mmdit": networks["mmdit"]}, TEXT)
    clip_l = tmp_path / "folder" / "text_encoder" / "model.safetensors"
    clip_g = tmp_path / "folder" / "text_encoder_2" / "model.safetensors"
    found = open_model(tmp_path / "m.safetensors", [clip_g, clip_l]).networks
    assert {"clip_l", "clip_g"} <= found.keys()
    assert found["clip_l"]["token_embedding.weight"].shape[1] == 64
    moved = clip_l.rename(tmp_path / "first.safetensors")
    with pytest.raises(ValueError, match="first.safetensors is a second clip_g"):
        open_model(tmp_path / "m.safetensors", [clip_g, moved])
    mmdit = {"context_embedder.weight": torch.empty(1, 4096),
             "y_embedder.mlp.0.weight": torch.empty(1, 2048)}
    for name, width in (("clip_g", 768), ("clip_l", 1280)):          # each the other one's
        lone = {name: {"token_embedding.weight": torch.empty(1, width)}}
        with pytest.raises(ValueError, match="of clip_g most"):
            convert.fit_widths(Model(tmp_path, lone | {"mmdit": mmdit}, {}, None))


def test_explicit_files_come_before_those_that_lie_about(networks, saved, tmp_path):
    torch.manual_seed(1)
    other = five_networks()["vae"]
    other.decoder.conv_in.weight.add_(1)
    save_networks(tmp_path / "mine.safetensors", {"vae": other})
    file = place_comfyui(tmp_path / "models", networks)
    parts = load_components(file, text_encoders=[saved], vae=tmp_path / "mine.safetensors")
    assert equal(parts.vae, other) and set(parts.text.encoders) == {"clip_l", "clip_g", "t5"}
    for given in ({"vae": saved.with_name("nowhere")}, {"text_encoders": [tmp_path / "nowhere"]}):
        with pytest.raises(OSError, match="nowhere"):
            load_components(file, **given)
    with pytest.raises(ValueError, match="clip_l.safetensors holds no vae"):
        load_components(file, vae=tmp_path / "models" / "clip" / "clip_l.safetensors")


def test_text_encoders_of_another_width_are_refused(networks, tmp_path):
    tensors = released_tensors("t5", networks["t5"])
    tensors = {key: x[..., :128].contiguous() if "embed" in key or "shared" in key else x
               for key, x in tensors.items()}
    save_file(tensors, tmp_path / "t5xxl.safetensors")
    part = {name: network for name, network in networks.items() if name != "t5"}
    save_networks(tmp_path / "m.safetensors", part, TEXT)
    with pytest.raises(ValueError, match="128.*wide, but its MM-DiT needs.*192"):
        open_model(tmp_path / "m.safetensors")


def test_scaled_float8_is_multiplied_by_its_scales(networks, saved, tmp_path):
    def scale(tensors):
        for key in [key for key in tensors if key.endswith(("fc1.weight", "wo.weight"))]:
            amax = tensors[key].abs().max() / 400
            tensors[key] = (tensors[key] / amax).to(torch.float8_e4m3fn)
            tensors[key.replace(".weight", ".scale_weight")] = amax
            tensors[key.replace(".weight", ".scale_input")] = torch.ones(())
        for name in ("mmdit", "t5"):
            tensors[PREFIXES[name] + "scaled_fp8"] = torch.empty(0).to(torch.float8_e4m3fn)
        tensors[PREFIXES["t5"] + "spiece_model"] = torch.zeros(3, dtype=torch.uint8)
    file = resave(saved, tmp_path / "m.safetensors", scale)
    for name in ("mmdit", "t5", "clip_l"):
        for dtype in (torch.float32, torch.float16):
            ours = read(name, file, dtype=dtype).state_dict()
            for key, x in networks[name].state_dict().items():
                error = (ours[key].float() - x).abs().max() / x.abs().max().clamp_min(1e-9)
                assert error < 0.045, key                    # three bits
    alone = {key.removeprefix(PREFIXES["t5"]): x for key, x in load_file(file).items()
             if key.startswith(PREFIXES["t5"])}
    save_file(alone, tmp_path / "t5xxl_fp8_scaled.safetensors")
    model = open_model(tmp_path / "t5xxl_fp8_scaled.safetensors")
    assert equal(read_network("t5", model), read("t5", file))


# ---- Refusals ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, content, advice", [
    ("model.ckpt", b"anything", "a pickle, which is never opened"),
    ("model.pth", b"PK\3\4", "a pickle, which is never opened"),
    ("pytorch_model.bin", b"", "a pickle, which is never opened"),
    ("renamed.safetensors", b"PK\3\4archive", "a pickle, which is never opened"),
    ("sd3-Q4.gguf", b"GGUF\3\0\0\0", "a GGUF file, which is not supported"),
    ("model.safetensors.index.json", b"{}", "give the folder in which it lies"),
    ("lfs.safetensors", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    ("cut.safetensors", b"\xff\0\0\0\0\0\0\0{", "not a whole safetensors file")])
def test_files_that_are_no_safetensors_are_known_by_name_or_first_bytes(
        name, content, advice, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} .*{advice}"):
        open_model(tmp_path / name)


@pytest.mark.parametrize("key, family", [
    ("double_blocks.0.img_attn.qkv.weight", "a Flux model"),
    ("input_blocks.0.0.weight", "a U-Net"),
    ("conditioner.embedders.0.weight", "an SDXL model"),
    ("transformer.transformer_blocks.0.attn.to_k.lora_A.weight", "a LoRA"),
    ("lora_unet_joint_blocks_0.alpha", "a LoRA"), ("controlnet_blocks.0.weight", "a ControlNet"),
    ("base_model.model.transformer_blocks.0.attn.to_q.lora_B.weight", "a LoRA"),
    ("transformer_blocks.0.attn.to_q.weight", "give the folder above it"),
    ("encoder.down_blocks.0.resnets.0.conv1.weight", "give the folder above it"),
    ("something.weight", "has a something.weight, of no known network")])
def test_models_of_other_families_are_refused_by_name(key, family, tmp_path):
    save_file({key: torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=f"other.safetensors .*{family}"):
        open_model(tmp_path / "other.safetensors")


def test_tensors_of_no_known_network_beside_known_ones_are_refused(saved, tmp_path):
    file = resave(saved, tmp_path / "m.safetensors", lambda x: x.update({"odd": torch.ones(1)}))
    with pytest.raises(ValueError, match="m.safetensors has a odd, of no known network"):
        open_model(file)


@pytest.mark.parametrize("name", ["vae", "t5", "clip_g"])
def test_one_component_alone_is_told_what_it_lacks(name, networks, tmp_path):
    file = tmp_path / "alone.safetensors"
    save_file(released_tensors(name, networks[name]), file, make_metadata({name: networks[name]}))
    assert equal(read(name, file), networks[name])
    with pytest.raises(ValueError, match=f"no mmdit, only {name}.*--text-encoders and --vae"):
        load_components(file)


# ---- Exports and the command line ----------------------------------------------------------------

def test_a_single_file_comes_with_its_tokenizers_and_t5s_table_under_both_names(saved, tmp_path):
    out = tmp_path / "sub" / "m"
    convert.export(saved, out, "single-file", torch.bfloat16)
    tensors = load_file(out / "model.safetensors")
    assert {x.dtype for x in tensors.values()} == {torch.bfloat16}
    assert torch.equal(tensors[TABLE], tensors[PREFIXES["t5"] + "shared.weight"])
    assert load_components(out).text.config == TEXT and load_components(out).words == ("red",)
    assert load_components(out).sizes == ("64x96",)
    assert sorted(path.name for path in out.iterdir()) == ["model.safetensors", "tokenizers"]


def test_exports_never_overwrite_and_a_failing_one_leaves_nothing(saved, tmp_path, monkeypatch):
    (tmp_path / "m.partial").mkdir()
    (tmp_path / "m.partial" / "mine").write_text("precious")
    convert.export(saved, tmp_path / "m", "diffusers")
    assert (tmp_path / "m.partial" / "mine").read_text() == "precious"
    with pytest.raises(ValueError, match="exists already"):
        convert.export(saved, tmp_path / "m", "diffusers")
    with pytest.raises(ValueError, match="exists already"):
        convert.export(saved, tmp_path / "m", "single-file")

    def disk_full(*arguments, **more):
        raise OSError("No space left on device")
    monkeypatch.setattr(checkpoints, "save_file", disk_full)
    for layout, name in (("diffusers", "a"), ("single-file", "b")):
        with pytest.raises(OSError, match="could not write .*No space left"):
            convert.export(saved, tmp_path / "new" / name, layout)
        assert list((tmp_path / "new").iterdir()) == []


def test_running_convert_exports(saved, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["convert.py", "export", str(saved), str(tmp_path / "out"),
                                      "--to", "diffusers", "--dtype", "fp16"])
    convert.main()
    dtypes = {x.dtype for x in load_file(tmp_path / "out" / "vae" /
                                         "diffusion_pytorch_model.safetensors").values()}
    assert dtypes == {torch.float16}


def test_what_is_ours_is_opened_without_convert(saved):
    code = (f"import os, sys, checkpoints; checkpoints.load_components({str(saved)!r})\n"
            f"print('convert' in sys.modules)")
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert loaded.stdout == "False\n", loaded.stderr
