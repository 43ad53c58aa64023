"""convert.py: other layouts <-> the one that checkpoints.py knows, which imports this file late.

Not here    the released single file, run folders and model folders (checkpoints.py)
Layouts     diffusers folders, both ways, here or on the hub; text encoders and VAE in other files,
            also in ComfyUI's tree. Whatever else people have is refused by name.
Run         python convert.py export MODEL OUT --to diffusers|single-file [--dtype bf16]
"""

import argparse
import re
import shutil
import tempfile
from pathlib import Path

import torch

from checkpoints import (
    ENCODERS, HOMES, PREFIXES, Model, count_layers, load_components, make_metadata, networks_in,
    open_weights, released_tensors, rename, save_networks, save_tensors)
from devices import PRECISIONS, command
from options import check_value, note_once, read_json, write_json

FOLDERS = {"mmdit": "transformer", "vae": "vae", "clip_l": "text_encoder",
           "clip_g": "text_encoder_2", "t5": "text_encoder_3"}
BESIDE = {"clip_l": "clip_l*", "clip_g": "clip_g*", "t5": "t5xxl*", "vae": "vae/*"}

# The names of diffusers -> those of the single file, where q, k and v are one: `from_diffusers`.
MMDIT_NAMES = {
    "pos_embed.pos_embed": "pos_embed", "pos_embed.proj.": "x_embedder.proj.",
    "time_text_embed.timestep_embedder.": "t_embedder.", ".linear_1.": ".mlp.0.",
    "time_text_embed.text_embedder.": "y_embedder.", ".linear_2.": ".mlp.2.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.", "proj_out.": "final_layer.linear.",
    "transformer_blocks.": "joint_blocks.", ".norm1.linear.": ".x_block.adaLN_modulation.1.",
    ".norm1_context.linear.": ".context_block.adaLN_modulation.1.", ".ff.": ".x_block.mlp.",
    ".ff_context.": ".context_block.mlp.", ".net.0.proj.": ".fc1.", ".net.2.": ".fc2.",
    ".attn.to_out.0.": ".x_block.attn.proj.", ".attn2.to_out.0.": ".x_block.attn2.proj.",
    ".attn.to_add_out.": ".context_block.attn.proj.",
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
    ".down_blocks.": ".down.", ".up_blocks.0.": ".up.3.", ".up_blocks.1.": ".up.2.",
    ".up_blocks.2.": ".up.1.", ".up_blocks.3.": ".up.0.", ".resnets.": ".block.",
    ".downsamplers.0.": ".downsample.", ".upsamplers.0.": ".upsample.",
    ".conv_shortcut.": ".nin_shortcut.",
}
TABLES = {"mmdit": MMDIT_NAMES, "vae": VAE_NAMES}      # Text encoders have the released names.

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
# Their sizes: {field of such a file: field of our config}.
CLIP_SIZES = {"hidden_size": "hidden_size", "num_hidden_layers": "num_layers",
              "num_attention_heads": "num_heads", "max_position_embeddings": "max_length",
              "vocab_size": "vocab_size", "projection_dim": "hidden_size"}
SIZES = {
    "mmdit": {"num_layers": "depth", "num_attention_heads": "depth", "patch_size": "patch_size",
              "caption_projection_dim": "hidden_size", "in_channels": "latent_channels",
              "out_channels": "latent_channels", "joint_attention_dim": "context_dim",
              "pooled_projection_dim": "pooled_dim", "pos_embed_max_size": "pos_embed_max_size"},
    "vae": {"latent_channels": "latent_channels", "block_out_channels": "channels",
            "norm_num_groups": "norm_groups", "scaling_factor": "vae_scale",
            "shift_factor": "vae_shift"},
    "clip_l": CLIP_SIZES, "clip_g": CLIP_SIZES,
    "t5": {"d_model": "hidden_size", "d_ff": "ff_size", "num_heads": "num_heads",
           "num_layers": "num_layers", "vocab_size": "vocab_size",
           "relative_attention_num_buckets": "num_buckets"},
}
# What else transformers wants. For CLIP, eos_token_id 2 stands for "pool at the largest id".
CLIP_MORE = {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model",
             "dtype": "float32", "eos_token_id": 2}
T5_MORE = {"architectures": ["T5EncoderModel"], "model_type": "t5", "dtype": "float32",
           "is_encoder_decoder": True, "tie_word_embeddings": False}
ABSENT = [None, None]                                  # in model_index.json

# What other files begin with or end in, and the advice.
UNREADABLE = (
    (b"version https://git-lfs", ".lfs", "a Git LFS pointer, not the weights; run `git lfs pull`"),
    (b"GGUF", ".gguf", "a GGUF file, which is not supported; give the .safetensors file"),
    ((b"PK\3\4", b"\x80"), (".ckpt", ".pth", ".pt", ".bin", ".pkl"),
     "a pickle, which is never opened because it can run any code; give a .safetensors file"),
    (b"{", ".index.json", "a JSON file, not the weights; give the folder in which it lies"),
)
# Pieces of keys that tell what a file is, if it is not ours.
ABOVE = "a component of a diffusers folder (give the folder above it)"
FAMILIES = {"lora": "a LoRA", "control": "a ControlNet", "double_blocks.0.": "a Flux model",
            "conditioner.embedders.": "an SDXL model", "input_blocks.0.": "a U-Net",
            "transformer_blocks.0.": ABOVE, "down_blocks.0.": ABOVE}


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
    if path.is_dir():
        raise ValueError(f"{path} has no model.safetensors yet, and is no whole diffusers folder")
    owned = re.fullmatch(r"(?!(runs|out|pretrained)/)[\w-][\w.-]*/[\w.-]+", str(path))
    if hub and owned and not path.parent.is_dir() and path.suffix != ".safetensors":
        return from_hub(str(path))
    raise ValueError(f"{path}: no such file or folder; give a run, a model or a .safetensors file")


def from_hub(name):
    """Download (or find in the cache) the diffusers folder of a hub repository "owner/name"."""
    from huggingface_hub import snapshot_download      # comes with `tokenizers`
    files = ["model_index.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.safetensors"]
    spared = ["*.fp16*", "text_encoders/*"]            # copies of them
    try:
        for patterns in (files[:1], files):            # the small file first
            found = snapshot_download(name, allow_patterns=patterns, ignore_patterns=spared)
            if not Path(found, "model_index.json").is_file():
                raise FileNotFoundError
        return Path(found)
    except Exception as problem:                       # whatever the HTTP library of the day raises
        raise ValueError(
            f"{name}: no such file or folder here, and no diffusers folder on the hub or in its "
            f"cache ({type(problem).__name__}). For a gated one, accept its licence there and run "
            f"`hf auth login`; without a network, give the path of a download") from None


def open_foreign(path, text_encoders=(), vae=None):
    """The Model of a diffusers folder, of a single file with other files beside it, or of lone
    files. text_encoders, vae: files that come before all others."""
    model = Model(path, {}, {}, from_diffusers if path.is_dir() else None)
    for file in text_encoders:
        take(model, Path(file), ENCODERS)
    if vae:
        take(model, Path(vae), ["vae"])
    if path.is_dir():
        open_diffusers(model)
    else:
        networks, config = networks_alone(path)
        model.networks.update(networks | model.networks)
        model.config.update(config | model.config)
    here = path if path.is_dir() else path.parent
    for folder in (".", "..", "text_encoders", "../text_encoders", "../clip"):
        for name, pattern in BESIDE.items():
            files = sorted((here / folder).glob(f"{pattern}.safetensors"))
            if files and name not in model.networks:
                if name == "vae" and len(files) > 1:   # Flux's ae.safetensors would fit, but badly.
                    raise ValueError(f"{', '.join(map(str, files))}: name the VAE of {path} with "
                                     f"--vae, or leave only that one there")
                take(model, files[0], [name])          # fp16 comes before fp8.
                note_once(f"the {name} of {path} is {files[0]}")
    fit_widths(model)
    return model


def take(model, file, names):
    """Take those of the networks `names` that are in a file."""
    networks, config = networks_alone(file)
    found = networks.keys() & set(names)
    if not found:
        raise ValueError(f"{file} holds no {' or '.join(names)}; give a file that does")
    for name in found:
        if name in model.networks:
            raise ValueError(f"{file} is a second {name}; CLIP-L is known by its name, clip_l*")
        model.networks[name] = networks[name]
        if name in config:
            model.config[name] = config[name]


def networks_alone(file):
    """(networks, config) of a file by the released prefixes, or of one network alone."""
    tensors, config = open_weights(file)
    for sign, family in FAMILIES.items():
        for key in tensors:
            if sign in key:
                raise ValueError(f"{file} is {family}, not SD3 or SD3.5: it has a {key}")
    signs = {"joint_blocks.0.": "mmdit", "decoder.conv_in.": "vae", "encoder.block.": "t5",
             "text_model.": "clip_l"}
    is_l = "clip_l" in file.name or file.parent.name == FOLDERS["clip_l"]
    if "text_projection.weight" in tensors and not is_l:
        signs["text_model."] = "clip_g"
    prefix = ""
    for sign, name in signs.items():
        if any(key.startswith(sign) for key in tensors):
            prefix = PREFIXES[name]
    renamed = {}
    for key, tensor in tensors.items():
        renamed[prefix + key.replace(".weight_scale", ".scale_weight")] = tensor
    return networks_in(file, renamed), config


def fit_widths(model):
    """The MM-DiT tells the widths of text encoders that are missing. Those present must fit."""
    widths = {}
    try:
        context_dim = model.networks["mmdit"]["context_embedder.weight"].shape[1]
        pooled_dim = model.networks["mmdit"]["y_embedder.mlp.0.weight"].shape[1]
        for name in model.networks.keys() & set(ENCODERS):
            widths[name] = model.networks[name]["token_embedding.weight"].shape[1]
    except (KeyError, IndexError):                     # `read_network` says what is missing.
        return
    widths.setdefault("t5", context_dim)
    widths.setdefault("clip_g", pooled_dim - widths.get("clip_l", 0))
    widths.setdefault("clip_l", pooled_dim - widths["clip_g"])
    both = widths["clip_l"] + widths["clip_g"]
    if widths["t5"] != context_dim or both != pooled_dim or widths["clip_l"] > widths["clip_g"]:
        raise ValueError(f"{model.path}: the text encoders are {widths} wide, but its MM-DiT needs "
                         f"{pooled_dim} of both CLIP, of clip_g most, and {context_dim} of T5")
    found = {f"{name}_width": width for name, width in widths.items()}
    model.config["text"] = model.config.get("text", {}) | found


# ---- Diffusers folders ---------------------------------------------------------------------------
def open_diffusers(model):
    """What the tensors cannot tell comes from the folder's JSON files, or from our own metadata."""
    folder = model.path
    index = {}
    if (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json", {"_class_name": str})
        if not index["_class_name"].startswith("StableDiffusion3"):
            raise ValueError(f"{folder} is a {index['_class_name']}; give a Stable Diffusion 3")
    for name, part in FOLDERS.items():
        if name not in model.networks:
            open_part(model, name, folder / part)
        promised = (folder / part).is_dir() or index.get(part, ABSENT) != ABSENT
        if promised and name not in model.networks and name != "t5":
            raise ValueError(f"{folder / part} holds no .safetensors; pickles are never opened")
    for part in EXPECTED:
        for file in (folder / FOLDERS.get(part, part)).glob("*config.json"):
            read_config(model, part, file)


def open_part(model, name, folder):
    """One network: its .safetensors files, those of full precision rather than ".fp16." ones."""
    found = sorted(folder.glob("*.safetensors"))
    whole = [file for file in found if ".fp16" not in file.name]
    tensors = {}
    for file in whole or found:
        stored, config = open_weights(file)
        for key, tensor in stored.items():
            tensors[PREFIXES[name] + rename(key, TABLES.get(name, {}))] = tensor
        if name == "mmdit":
            model.config.update(config | model.config)
    model.networks.update(networks_in(folder, tensors))


def read_config(model, part, file):
    """Take the VAE's numbers and the shift; refuse what a JSON file says and we do not do."""
    told = read_json(file)
    expected = dict(EXPECTED[part])
    if "hidden_size" in told:                          # CLIP: the heads have 64 channels.
        check_value(f"{file}: hidden_size", told["hidden_size"], int)
        expected["num_attention_heads"] = told["hidden_size"] // 64
    for key, value in expected.items():
        if told.get(key) not in (None, value):
            raise ValueError(f"{file}: {key} is {told[key]!r:.80}, but must be {value!r}")
    for key, (ours, name, kind, low) in NUMBERS.items():
        if told.get(key) is not None:
            check_value(f"{file}: {key}", told[key], kind, low, 1e3)
            model.config[ours] = {name: told[key]} | model.config.get(ours, {})


def swap_shift_scale(tensors):
    """In two layers of the MM-DiT, (shift, scale) is (scale, shift) in diffusers; either way."""
    last = count_layers(tensors, "joint_blocks.") - 1
    layers = ("final_layer.adaLN_", f"joint_blocks.{last}.context_block.adaLN_")
    swapped = dict(tensors)
    for key, tensor in tensors.items():
        if key.startswith(layers):
            swapped[key] = torch.cat(tensor.chunk(2)[::-1])
    return swapped


def from_diffusers(tensors):
    """Renamed tensors of a diffusers folder as in the single file: q, k, v joined, 1x1 kernels."""
    for key in list(tensors):
        if ".mid.attn_1." in key and tensors[key].dim() == 2:
            tensors[key] = tensors[key][:, :, None, None]
        elif "joint_blocks." in key and ".q." in key:
            parts = [tensors.pop(key.replace(".q.", f".{letter}.")) for letter in "qkv"]
            tensors[key.replace(".q.", ".qkv.")] = torch.cat(parts)
    return swap_shift_scale(tensors)


def to_diffusers(name, tensors):
    """The inverse, with the names of diffusers, for tensors by their released names."""
    if name not in TABLES:
        return tensors
    table = {ours: theirs for theirs, ours in TABLES[name].items()}
    renamed = {}
    for key, tensor in swap_shift_scale(tensors).items():
        if ".mid.attn_1." in key and tensor.dim() == 4:
            tensor = tensor[:, :, 0, 0]
        if ".qkv." in key:
            for letter, part in zip("qkv", tensor.chunk(3)):
                renamed[rename(key.replace(".qkv.", f".{letter}."), table)] = part.contiguous()
        else:
            renamed[rename(key, table)] = tensor.contiguous()
    return renamed


# ---- Exports -------------------------------------------------------------------------------------
def diffusers_config(name, config):
    """The config.json of one network."""
    values = dict(EXPECTED[name])
    for theirs, ours in SIZES[name].items():
        values[theirs] = getattr(config, ours)
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
    return values


def tokenizer_config(name, text):
    """The tokenizer_config.json of one text encoder: its token count and padding."""
    tokenizer = text.tokenizers[name]
    if name == "t5":
        spare = text.encoders["t5"].config.vocab_size - tokenizer.vocab_size
        return {"tokenizer_class": "T5Tokenizer", "model_max_length": text.config.t5_length,
                "extra_ids": min(100, spare)}
    return {"tokenizer_class": "CLIPTokenizer", "model_max_length": text.config.clip_length,
            "pad_token": tokenizer.backend.id_to_token(tokenizer.padding)}


def save_diffusers(out, parts, networks, dtype):
    """Write a folder that diffusers' StableDiffusion3Pipeline.from_pretrained opens."""
    about = parts.text.config, parts.sampling, parts.words, parts.sizes
    metadata = make_metadata(networks, *about)
    index = {"_class_name": "StableDiffusion3Pipeline",
             "scheduler": ["diffusers", EXPECTED["scheduler"]["_class_name"]],
             "text_encoder_3": ABSENT, "tokenizer_3": ABSENT}
    for name, network in networks.items():
        folder = FOLDERS[name]
        config = diffusers_config(name, network.config)
        write_json(out / folder / "config.json", config)
        tensors = to_diffusers(name, released_tensors(name, network, dtype))
        if name == "clip_l":                           # Its pooled vector passes unchanged.
            tensors["text_projection.weight"] = torch.eye(config["hidden_size"])
        file = "diffusion_pytorch_model.safetensors"
        index[folder] = ["diffusers", config.get("_class_name")]
        if name in ENCODERS:
            file = "model.safetensors"
            index[folder] = ["transformers", config["architectures"][0]]
            home = HOMES[name][1]
            tokenizer = tokenizer_config(name, parts.text)
            index[home] = ["transformers", tokenizer["tokenizer_class"]]
            shutil.copytree(parts.tokenizers[name].parent, out / home)
            write_json(out / home / "tokenizer_config.json", tokenizer)
        save_tensors(out / folder / file, tensors, metadata)
    shift = parts.sampling.get("timestep_shift", 3.0)
    write_json(out / "scheduler/scheduler_config.json", EXPECTED["scheduler"] | {"shift": shift})
    write_json(out / "model_index.json", index)


def export(path, out, layout, dtype=torch.float32):
    """Write the folder `out`, by one rename. layout: "diffusers" or "single-file"."""
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists already; choose another name")
    parts = load_components(path)
    networks = {"mmdit": parts.mmdit, "vae": parts.vae, **parts.text.encoders}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        partial = Path(scratch, out.name)
        if layout == "diffusers":
            save_diffusers(partial, parts, networks, dtype)
        else:
            for name, file in parts.tokenizers.items():
                home = partial / "tokenizers" / HOMES[name][0]
                shutil.copytree(file.parent, home, dirs_exist_ok=True)
            save_networks(partial / "model.safetensors", networks, parts.text.config,
                          parts.sampling, dtype, parts.words, parts.sizes)
        partial.rename(out)


def main():
    """Write a model as a folder of another layout."""
    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False)
    parser.add_argument("command", choices=["export"])
    parser.add_argument("path", help="run folder, model folder, .safetensors file, hub name")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--to", choices=("diffusers", "single-file"), default="diffusers")
    parser.add_argument("--dtype", choices=PRECISIONS, default="fp32")
    options = parser.parse_args()
    export(options.path, options.out, options.to, PRECISIONS[options.dtype])
    print(options.out)


if __name__ == "__main__":
    command(main)
