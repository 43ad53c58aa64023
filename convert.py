"""convert.py: other layouts <-> the one that checkpoints.py knows, which imports this file late.

Not here    the released single file, run folders and model folders (checkpoints.py)
Layouts     diffusers folders, both ways, here or on the hub; text encoders and VAE in other files,
            also in ComfyUI's tree (checkpoints/ beside clip/, text_encoders/, vae/); scaled float8.
            Whatever else people have is refused by name, with what to give instead.
Run         python convert.py info PATH
            python convert.py export PATH OUT --to diffusers|single-file [--dtype bf16]
"""

import argparse
import functools
import json
import os
import re
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from checkpoints import (
    ENCODERS, NAMES, PREFIXES, CheckpointError, Model, check_value, count_layers, find_path,
    fingerprint, load_components, networks_in, open_model, open_weights, read_json, read_network,
    released_tensors, rename, save_networks, stored_config, write_atomically)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FOLDERS = {"mmdit": "transformer", "vae": "vae", "clip_l": "text_encoder",
           "clip_g": "text_encoder_2", "t5": "text_encoder_3"}
# Folders of tokenizers: ours, then that of diffusers.
HOMES = {"clip_l": ("clip", "tokenizer"), "clip_g": ("clip", "tokenizer_2"),
         "t5": ("t5", "tokenizer_3")}
BESIDE = {"clip_l": "clip_l*.safetensors", "clip_g": "clip_g*.safetensors",
          "t5": "t5xxl*.safetensors", "vae": "vae/*.safetensors"}

# The names of diffusers -> those of the single file, where q, k and v are one: `from_diffusers`.
MMDIT_NAMES = {
    "pos_embed.pos_embed": "pos_embed", "pos_embed.proj.": "x_embedder.proj.",
    "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.",
    "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.2.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.", "proj_out.": "final_layer.linear.",
    "transformer_blocks.": "joint_blocks.", ".norm1.linear.": ".x_block.adaLN_modulation.1.",
    ".norm1_context.linear.": ".context_block.adaLN_modulation.1.",
    ".attn.to_out.0.": ".x_block.attn.proj.", ".attn2.to_out.0.": ".x_block.attn2.proj.",
    ".attn.to_add_out.": ".context_block.attn.proj.", ".ff.net.0.proj.": ".x_block.mlp.fc1.",
    ".ff.net.2.": ".x_block.mlp.fc2.", ".ff_context.net.0.proj.": ".context_block.mlp.fc1.",
    ".ff_context.net.2.": ".context_block.mlp.fc2.",
    ".attn.norm_added_": ".context_block.attn.ln_", ".attn.norm_": ".x_block.attn.ln_",
    ".attn2.norm_": ".x_block.attn2.ln_", ".attn2.to_": ".x_block.attn2.",
    ".attn.add_q_proj.": ".context_block.attn.q.", ".attn.add_k_proj.": ".context_block.attn.k.",
    ".attn.add_v_proj.": ".context_block.attn.v.", ".attn.to_": ".x_block.attn.",
}
VAE_NAMES = {
    ".mid_block.resnets.0.": ".mid.block_1.", ".mid_block.resnets.1.": ".mid.block_2.",
    ".mid_block.attentions.0.group_norm.": ".mid.attn_1.norm.",
    ".mid_block.attentions.0.to_out.0.": ".mid.attn_1.proj_out.",
    ".mid_block.attentions.0.to_": ".mid.attn_1.", ".conv_norm_out.": ".norm_out.",
    ".down_blocks.": ".down.", ".up_blocks.": ".up.",  # counted from the other end: `flip_levels`
    ".resnets.": ".block.", ".downsamplers.0.": ".downsample.", ".upsamplers.0.": ".upsample.",
    ".conv_shortcut.": ".nin_shortcut.",
}
TABLES = NAMES | {"mmdit": MMDIT_NAMES, "vae": VAE_NAMES}
# What the JSON file of each part of a diffusers folder must say, where it says anything.
EXPECTED = {
    "mmdit": {"_class_name": "SD3Transformer2DModel", "attention_head_dim": 64},
    "vae": {"_class_name": "AutoencoderKL", "act_fn": "silu", "layers_per_block": 2,
            "use_quant_conv": False, "use_post_quant_conv": False},
    "clip_l": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "clip_g": {"hidden_act": "gelu", "layer_norm_eps": 1e-5},
    "t5": {"feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6, "d_kv": 64,
           "relative_attention_max_distance": 128},
    "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
                  "use_dynamic_shifting": False, "use_karras_sigmas": False,
                  "use_exponential_sigmas": False, "use_beta_sigmas": False,
                  "invert_sigmas": False, "stochastic_sampling": False},
}
# The numbers in such files: (part of our config, its field, type, lowest).
NUMBERS = {"norm_num_groups": ("vae", "norm_groups", int, 1),
           "scaling_factor": ("vae", "vae_scale", float, 1e-6),
           "shift_factor": ("vae", "vae_shift", float, -1e3),
           "shift": ("sampling", "timestep_shift", float, 1e-3)}
# {field of a config.json that we write: field of our config}, and what else transformers wants.
FIELDS = {
    "mmdit": {"num_layers": "depth", "num_attention_heads": "depth", "patch_size": "patch_size",
              "caption_projection_dim": "hidden_size", "in_channels": "latent_channels",
              "out_channels": "latent_channels", "joint_attention_dim": "context_dim",
              "pooled_projection_dim": "pooled_dim", "pos_embed_max_size": "pos_embed_max_size"},
    "vae": {"latent_channels": "latent_channels", "block_out_channels": "channels",
            "norm_num_groups": "norm_groups", "scaling_factor": "vae_scale",
            "shift_factor": "vae_shift"},
    "clip": {"hidden_size": "hidden_size", "num_hidden_layers": "num_layers",
             "num_attention_heads": "num_heads", "max_position_embeddings": "max_length",
             "vocab_size": "vocab_size", "projection_dim": "hidden_size"},
    "t5": {"d_model": "hidden_size", "d_ff": "ff_size", "num_heads": "num_heads",
           "num_layers": "num_layers", "vocab_size": "vocab_size",
           "relative_attention_num_buckets": "num_buckets"},
}
CLIP_MORE = {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model",
             "dtype": "float32", "eos_token_id": 2}    # 2 stands for "pool at the largest id".
T5_MORE = {"architectures": ["T5EncoderModel"], "model_type": "t5", "dtype": "float32",
           "is_encoder_decoder": True, "tie_word_embeddings": False}

# What other files begin with or end in, and the advice.
PICKLE = "a pickle, which is never opened because it can run any code; give a .safetensors file"
UNREADABLE = (
    (b"version https://git-lfs", ".lfs", "a Git LFS pointer, not the weights; run `git lfs pull`"),
    (b"GGUF", ".gguf", "a GGUF file, which is not supported; give the .safetensors file"),
    (b"PK\3\4", (".ckpt", ".pth", ".pt", ".bin"), PICKLE), (b"\x80", ".pkl", PICKLE),
    (b"{", ".index.json", "a JSON file, not the weights; give the folder in which it lies"),
)
# Pieces of keys that tell what a file is, if it is not ours.
ABOVE = "a component of a diffusers folder (give the folder above it)"
FAMILIES = {"lora": "a LoRA", "control": "a ControlNet", "double_blocks.0.": "a Flux model",
            "conditioner.embedders.": "an SDXL model", "input_blocks.0.": "a U-Net",
            "transformer_blocks.0.": ABOVE, "down_blocks.0.": ABOVE}
SCALES = (".scale_weight", ".weight_scale")            # beside the weights of scaled float8


def describe_unreadable(file, problem):
    """A sentence about a file that is no whole safetensors file: by its first bytes or its name."""
    with open(file, "rb") as raw:
        start = raw.read(32)
    for magic, endings, advice in UNREADABLE:
        if start.startswith(magic) or file.name.endswith(endings):
            return f"{file} is {advice}"
    return f"{file} is not a whole safetensors file ({problem}); fetch it again"


# ---- What a path means ---------------------------------------------------------------------------

def find_foreign(path, hub=True):
    """The diffusers folder that `path` is, here or on the hub."""
    if (path / "model_index.json").is_file() or (path / "transformer").is_dir():
        return path
    if (path.parent / "model_index.json").is_file():
        raise CheckpointError(f"{path} is a part of a diffusers folder; give {path.parent}")
    if path.is_dir():
        raise CheckpointError(f"{path} has no model.safetensors (a run gets one when it is first "
                              f"saved); name the file itself")
    owned = re.fullmatch(r"(?!(runs|out|pretrained)/)[\w-][\w.-]*/[\w.-]+", str(path))
    if hub and owned and not path.parent.is_dir() and path.suffix != ".safetensors":
        return from_hub(str(path))
    raise CheckpointError(f"{path}: no such file or folder. Give a run folder, a model folder, a "
                          f"diffusers folder or a .safetensors file")


def from_hub(name):
    """Download (or find in the cache) the diffusers folder of a hub repository "owner/name"."""
    import huggingface_hub  # comes with `tokenizers`

    wanted = ["model_index.json", "scheduler/*.json", "tokenizer*/*"]
    for folder in FOLDERS.values():
        wanted += [f"{folder}/*.json", f"{folder}/*.safetensors"]
    try:
        for patterns in ("model_index.json", wanted):        # the small file first
            found = huggingface_hub.snapshot_download(
                name, allow_patterns=patterns, ignore_patterns="*.fp16*")
            if not (Path(found) / "model_index.json").is_file():
                raise FileNotFoundError
    except Exception as problem:                       # whatever the HTTP library of the day raises
        raise CheckpointError(
            f"{name}: no such file or folder here, and no diffusers folder on the hub or in its "
            f"cache ({type(problem).__name__}). For a gated one, accept its licence on its page "
            f"and run `hf auth login`; without a network, give the path of a download") from None
    return Path(found)


def open_foreign(path, text_encoders=(), vae=None):
    """The Model of a diffusers folder, of a single file with other files beside it, or of lone
    files. text_encoders, vae: files or folders that come before all others."""
    model = Model(path, {}, {}, {})
    for place in text_encoders:
        take_given(model, find_path(place), ENCODERS)
    if vae:
        take_given(model, find_path(vae), ("vae",))
    if path.is_dir():
        open_diffusers(model)
    else:
        _, config = networks_alone(path)
        take(model, path, PREFIXES)
        model.config.update(config | model.config)
    here = path if path.is_dir() else path.parent
    for folder in (here, here.parent, here / "text_encoders", here.parent / "text_encoders",
                   here.parent / "clip"):
        for name, pattern in BESIDE.items():
            for file in sorted(folder.glob(pattern)):        # fp16 comes before fp8.
                take(model, file, (name,))
    fit_widths(model)
    return model


def take_given(model, place, names):
    """Take networks from the file or the folder that the user gave for them."""
    before = len(model.networks)
    for file in sorted(place.glob("*.safetensors")) if place.is_dir() else [place]:
        take(model, file, names)
    if len(model.networks) == before:
        raise CheckpointError(f"{place} holds no {' or '.join(names)}; give a file that does")


def take(model, file, names):
    """Take those of the networks `names` from a file that the model does not have yet."""
    missing = set(names) - model.networks.keys()
    networks, config = networks_alone(file) if missing else ({}, {})
    for name in missing & networks.keys():
        add(model, name, networks[name])
        if name in config:
            model.config[name] = config[name]


def add(model, name, entries):
    """Give a network to a model, without what float8 and T5 files hold beside the weights."""
    extra = ("scaled_fp8", "scale_input", "input_scale", "comfy_quant", "spiece_model")
    model.networks[name] = {key: entries[key] for key in entries if not key.endswith(extra)}
    if any(key.endswith(SCALES) for key in entries):
        model.finish[name] = unscale


def unscale(tensors):
    """Scaled float8: each weight is to be multiplied by the scale that lies beside it."""
    for key in [key for key in tensors if key.endswith(SCALES)]:
        scale = tensors.pop(key).float()
        name = key.rsplit(".", 1)[0] + ".weight"
        tensors[name] = (tensors[name].float() * scale).to(tensors[name].dtype)
    return tensors


def networks_alone(file):
    """({network: entries}, config) of a file: by the released prefixes, or one network alone.
    CheckpointError for a file of another family, or with tensors of no known network."""
    entries, config = open_weights(file)
    for sign, family in FAMILIES.items():
        for key in entries:
            if sign in key:
                raise CheckpointError(f"{file} is {family}, not SD3 or SD3.5: it has a {key}")
    found = networks_in(entries)
    projected = "text_projection.weight" in entries and "clip_l" not in file.name
    signs = {"joint_blocks.0.": "mmdit", "decoder.conv_in.": "vae", "encoder.block.": "t5",
             "text_model.": "clip_g" if projected else "clip_l"}
    for sign, name in signs.items():
        if not found and any(key.startswith(sign) for key in entries):
            return networks_in(entries, {name: ""}), config
    prefixes = tuple(PREFIXES.values())
    other = [key for key in entries if not key.startswith(prefixes) and "scale" not in key]
    if other or not found:
        raise CheckpointError(f"{file} holds {len(other)} tensor(s) of no known network: "
                              f"{', '.join(other[:3])}. Give an SD3 or SD3.5 file.")
    return found, config


def fit_widths(model):
    """The MM-DiT tells the widths of text encoders that are missing. Those present must fit."""
    widths = {}
    try:
        mmdit = model.networks["mmdit"]
        context_dim = mmdit["context_embedder.weight"].shape[1]
        pooled_dim = mmdit["y_embedder.mlp.0.weight"].shape[1]
        for name in set(ENCODERS) & model.networks.keys():
            widths[name] = model.networks[name]["token_embedding.weight"].shape[1]
    except (KeyError, IndexError):                     # `read_network` says what is missing.
        return
    widths.setdefault("t5", context_dim)
    widths.setdefault("clip_g", pooled_dim - widths.get("clip_l", 0))
    widths.setdefault("clip_l", pooled_dim - widths["clip_g"])
    if (widths["t5"], widths["clip_l"] + widths["clip_g"]) != (context_dim, pooled_dim):
        raise CheckpointError(f"{model.path}: the text encoders are {widths} wide, but its MM-DiT "
                              f"needs {pooled_dim} of both CLIP together and {context_dim} of T5")
    found = {f"{name}_width": width for name, width in widths.items()}
    model.config["text"] = model.config.get("text", {}) | found


def find_tokenizer(name, places):
    """A file of this encoder's tokenizer in the first of `places` that has one."""
    for place in places:
        for home in HOMES[name]:
            for kind in ("merges.txt", "spiece.model", "tokenizer.json"):
                if (place / home / kind).is_file():
                    return place / home / kind
    raise CheckpointError(f"{places[0]}: no tokenizers there for {name}; name a folder with "
                          f"clip/merges.txt and t5/spiece.model by --tokenizers")


# ---- Diffusers folders ---------------------------------------------------------------------------

def open_diffusers(model):
    """What the tensors cannot tell comes from the folder's JSON files, or from our own metadata."""
    folder = model.path
    index = {}
    if (folder / "model_index.json").is_file():
        kinds = {part: list | None for part in FOLDERS.values()}
        index = read_json(folder / "model_index.json", kinds | {"_class_name": str | None})
    if not index.get("_class_name", "StableDiffusion3").startswith("StableDiffusion3"):
        raise CheckpointError(f"{folder} is a {index['_class_name']}; give a Stable Diffusion 3")
    for name, part in FOLDERS.items():
        if name in model.networks:
            continue
        if (folder / part).is_dir():
            entries = {}
            for file in weight_files(folder / part):
                found, config = open_weights(file)
                entries |= found
            add(model, name, networks_in(entries, {name: ""}, TABLES)[name])
            if name == "mmdit":
                model.config.update(config | model.config)
            if TABLES[name] is not NAMES[name]:
                model.finish[name] = from_diffusers
        elif name != "t5" and (index.get(part) or [None])[0]:
            raise CheckpointError(f"{folder} lacks {part}/, which its model_index.json names")
    read_configs(model)


def weight_files(folder):
    """The safetensors files of one component: full precision rather than ".fp16." variants."""
    found = sorted(folder.glob("*.safetensors"))
    files = [file for file in found if ".fp16" not in file.name] or found
    for index in folder.glob("*.safetensors.index.json"):
        names = read_json(index, {"weight_map": dict})["weight_map"].values()
        files = [folder / Path(str(name)).name for name in sorted(set(names), key=str)]
    if not files:
        raise CheckpointError(f"{folder} holds no .safetensors; .bin are pickles, never opened")
    return files


def read_configs(model):
    """Take the VAE's numbers and the shift; refuse what a JSON file says and we do not do."""
    sizes = {"hidden_size": int | None, "num_attention_heads": int | None}
    for part, expected in EXPECTED.items():
        for file in (model.path / FOLDERS.get(part, part)).glob("*config.json"):
            told = read_json(file, sizes)
            if "clip" in part and "num_attention_heads" in told:
                expected = expected | {"num_attention_heads": (told.get("hidden_size") or 0) // 64}
            for key, value in expected.items():
                if told.get(key) not in (None, value):
                    raise CheckpointError(f"{file}: {key} is {told[key]!r:.80}; give a model where "
                                          f"it is {value!r}")
            for key, (ours, name, kind, low) in NUMBERS.items():
                if told.get(key) is not None:
                    check_value(f"{file}: {key}", told[key], kind, low, 1e3)
                    model.config[ours] = {name: told[key]} | model.config.get(ours, {})


def reorder(tensors):
    """Exchange the two orders, in either direction: the levels of the VAE's decoder are counted
    from the other end, and (shift, scale) is (scale, shift) in two layers of the MM-DiT."""
    levels = count_layers(tensors, "decoder.up.")
    last = count_layers(tensors, "joint_blocks.") - 1
    swapped = ("final_layer.adaLN_mod", f"joint_blocks.{last}.context_block.adaLN_mod")
    reordered = {}
    for key, tensor in tensors.items():
        level = re.match(r"decoder\.up\.(\d+)", key)
        if level:
            key = f"decoder.up.{levels - 1 - int(level[1])}{key[level.end():]}"
        if key.startswith(swapped):
            shift, scale = tensor.chunk(2)
            tensor = torch.cat([scale, shift])
        reordered[key] = tensor
    return reordered


def from_diffusers(tensors):
    """Renamed tensors of a diffusers folder in the form of the single file: the VAE's attention
    becomes 1x1 kernels, the MM-DiT's q, k and v become one matrix."""
    for key in list(tensors):
        if ".mid.attn_1." in key and tensors[key].dim() == 2:
            tensors[key] = tensors[key][:, :, None, None]
        elif "joint_blocks." in key and ".q." in key:
            parts = [tensors.pop(key.replace(".q.", f".{letter}.")) for letter in "qkv"]
            tensors[key.replace(".q.", ".qkv.")] = torch.cat(parts)
    return reorder(tensors)


def to_diffusers(name, tensors):
    """The inverse, with the names of diffusers, for tensors by their released names."""
    if TABLES[name] is NAMES[name]:
        return dict(tensors)
    table = {ours: theirs for theirs, ours in TABLES[name].items()}
    renamed = {}
    for key, tensor in reorder(tensors).items():
        if ".mid.attn_1." in key and tensor.dim() == 4:
            tensor = tensor[:, :, 0, 0]
        if ".qkv." in key:
            for letter, part in zip("qkv", tensor.chunk(3)):
                renamed[rename(key.replace(".qkv.", f".{letter}."), table)] = part.contiguous()
        else:
            renamed[rename(key, table)] = tensor.contiguous()
    return renamed


def diffusers_config(name, config):
    """The config.json of one network."""
    fields = FIELDS["clip" if name.startswith("clip") else name]
    values = {theirs: getattr(config, ours) for theirs, ours in fields.items()}
    if name == "mmdit":
        values["qk_norm"] = "rms_norm" if config.qk_norm else None
        values["dual_attention_layers"] = list(range(config.dual_attention_layers))
    elif name == "vae":
        values["down_block_types"] = len(config.channels) * ["DownEncoderBlock2D"]
        values["up_block_types"] = len(config.channels) * ["UpDecoderBlock2D"]
    elif name == "t5":
        values |= T5_MORE
    else:
        values |= CLIP_MORE | {"intermediate_size": 4 * config.hidden_size}
    return EXPECTED[name] | values


def write_json(file, value):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def tokenizer_config(name, text):
    """The tokenizer_config.json of one text encoder: its token count and padding."""
    tokenizer = text.tokenizers[name]
    if name == "t5":
        extra = min(100, text.encoders["t5"].config.vocab_size - tokenizer.vocab_size)
        return {"tokenizer_class": "T5Tokenizer", "model_max_length": text.config.t5_length,
                "extra_ids": extra}
    return {"tokenizer_class": "CLIPTokenizer", "model_max_length": text.config.clip_length,
            "pad_token": tokenizer.backend.id_to_token(tokenizer.padding)}


def save_diffusers(out, parts, networks, dtype=None):
    """Write a folder that diffusers' StableDiffusion3Pipeline.from_pretrained opens."""
    stored = stored_config(networks, parts.text.config, parts.sampling, parts.words)
    index = {"_class_name": "StableDiffusion3Pipeline",
             "scheduler": ["diffusers", EXPECTED["scheduler"]["_class_name"]]}
    for name, folder in FOLDERS.items():
        index[folder] = [None, None]
        if name in HOMES:
            tokens = HOMES[name][1]
            index[tokens] = [None, None]
        if name not in networks:
            continue
        config = diffusers_config(name, networks[name].config)
        write_json(out / folder / "config.json", config)
        tensors = to_diffusers(name, released_tensors(name, networks[name], dtype))
        if name == "clip_l":                           # Its pooled vector passes unchanged.
            tensors["text_projection.weight"] = torch.eye(config["hidden_size"])
        file = "diffusion_pytorch_model.safetensors"
        if name in HOMES:
            file = "model.safetensors"
            index[folder] = ["transformers", config["architectures"][0]]
            tokenizer = tokenizer_config(name, parts.text)
            index[tokens] = ["transformers", tokenizer["tokenizer_class"]]
            shutil.copytree(parts.tokenizers[name].parent, out / tokens)
            write_json(out / tokens / "tokenizer_config.json", tokenizer)
        else:
            index[folder] = ["diffusers", config["_class_name"]]
        save = functools.partial(save_file, tensors, metadata={"format": "pt", "config": stored})
        write_atomically(out / folder / file, save)
    shift = parts.sampling.get("timestep_shift", 3.0)
    write_json(out / "scheduler/scheduler_config.json", EXPECTED["scheduler"] | {"shift": shift})
    write_json(out / "model_index.json", index)


def export(path, out, layout, dtype=None, tokenizers=None):
    """Write a model under a new name. layout: "single-file" (out is a .safetensors file;
    tokenizers/ comes beside it) or "diffusers" (a folder). dtype None keeps what is stored."""
    out = Path(out)
    single = layout == "single-file"
    made = [out.with_name("tokenizers"), out] if single else [out]
    if single and out.suffix != ".safetensors":
        raise CheckpointError(f"{out} does not end in .safetensors, as a single file must")
    for place in made:
        if place.exists():
            raise CheckpointError(f"{place} exists already; write {out.name} elsewhere")
    parts = load_components(path, dtype=None, tokenizers=tokenizers)
    networks = {"mmdit": parts.mmdit, "vae": parts.vae, **parts.text.encoders}
    partial = out.with_name(f"{out.name[:40]}.{os.urandom(6).hex()}.partial")
    try:
        partial.mkdir(parents=True)
        if single:
            save_networks(partial / out.name, networks, parts.text.config, parts.sampling, dtype,
                          parts.words)
            for name, file in parts.tokenizers.items():
                shutil.copytree(file.parent, partial / "tokenizers" / HOMES[name][0],
                                dirs_exist_ok=True)
        else:
            save_diffusers(partial / out.name, parts, networks, dtype)
        for place in made:
            os.replace(partial / place.name, place)
    except (OSError, SafetensorError) as problem:
        raise CheckpointError(f"could not write {out} ({problem}); choose another place") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ---- Command line --------------------------------------------------------------------------------

def info(path):
    """Print the networks of a checkpoint: sizes, parameters, types, and what is missing."""
    model = open_model(path)
    print(f"{model.path}: fingerprint {fingerprint(model.path)}")
    for name in PREFIXES:
        if name not in model.networks:
            print(f"  {name:7} missing")
            continue
        entries = model.networks[name].values()
        kinds = Counter(entry.dtype for entry in entries)
        network = read_network(name, model, shapes_only=True)
        parameters = sum(x.numel() for x in network.state_dict().values()) / 1e6
        print(f"  {name:7} {len(entries):5} tensors {parameters:10.3f} M parameters  "
              f"{dict(kinds)}  {asdict(network.config)}")


def main():
    """Print what a checkpoint holds, or write it as one whole thing."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("command", choices=("info", "export"))
    parser.add_argument("path", help="run folder, model folder, .safetensors file, hub name")
    parser.add_argument("out", nargs="?", help="for export: what to write")
    parser.add_argument("--to", choices=("diffusers", "single-file"), default="diffusers")
    parser.add_argument("--dtype", choices=DTYPES, help="default: as stored")
    parser.add_argument("--tokenizers", help="folder with clip/ and t5/")
    options = parser.parse_args()
    if options.command == "info":
        info(options.path)
    elif options.out is None:
        parser.error("export needs a second path, OUT")
    else:
        export(options.path, options.out, options.to, DTYPES.get(options.dtype), options.tokenizers)
        print(options.out)


if __name__ == "__main__":
    from devices import command
    command(main)
