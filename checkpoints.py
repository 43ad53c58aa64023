"""checkpoints.py: files <-> the modules of this project.

Read with   the key lists of the released SD3 files; App. B.2 for what a whole model consists of
Not here    the networks (mmdit.py, vae.py, text_encoders.py); this file knows all three and every released key name
Format      one model.safetensors, the prefixes of the released single file, sizes inferred from the tensors. What tensors
            cannot tell (the VAE's normalisation, token counts) is in the file's metadata; without it SD3's values hold.
            Tokenizers lie beside it: tokenizers/clip/{vocab.json,merges.txt}, tokenizers/t5/spiece.model
Safety      safetensors only, read and cast tensor by tensor, one strict load; nothing is unpickled; what is written gets a
            temporary name first and is renamed
Layouts     the single file, with or without clip_l, clip_g, t5xxl files beside it; a diffusers folder; our run and model folders
Run         python checkpoints.py info PATH                     what it holds: sizes, parameters, types, what is missing
            python checkpoints.py verify PATH                   loads every network and computes; a golden case is compared
            python checkpoints.py export RUN OUT --to diffusers|single-file
"""

import argparse
import filecmp
import hashlib
import json
import os
import re
import shutil
import struct
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mmdit import MMDiT, MMDiTConfig
from text_encoders import CLIPConfig, CLIPTextEncoder, CLIPTokenizer, T5Config, T5Encoder, T5Tokenizer, TextConfig, TextEncoders
from vae import VAE, VAEConfig

SHIPPED = Path(__file__).parent / "pretrained" / "tiny"

# Where each network lies in a single file. MM-DiT and VAE keep their released names; CLIP's and T5's are in the tables.
PREFIXES = {
    "mmdit": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
}

# The same networks in a diffusers folder.
FOLDERS = {"mmdit": "transformer", "vae": "vae", "clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5": "text_encoder_3"}
SEPARATE_FILES = {"clip_l": "clip_l*.safetensors", "clip_g": "clip_g*.safetensors", "t5": "t5xxl*.safetensors"}

ENCODERS = ("vae", "clip_l", "clip_g", "t5")         # the frozen ones

# Released name -> our name, piece by piece. None: dropped on purpose.
CLIP_NAMES = {
    "text_model.embeddings.position_ids": None,          # 0, 1, 2, ...: some files carry it
    "logit_scale": None,                                 # the temperature of contrastive training
    "text_model.embeddings.": "",                        # token_embedding, position_embedding
    "text_model.encoder.layers.": "layers.",
    "text_model.final_layer_norm.": "final_norm.",
    "text_projection.": "projection.",
    ".self_attn.q_proj.": ".q.",
    ".self_attn.k_proj.": ".k.",
    ".self_attn.v_proj.": ".v.",
    ".self_attn.out_proj.": ".out.",
    ".mlp.fc": ".fc",
    ".layer_norm": ".norm",
}
T5_NAMES = {
    "encoder.embed_tokens.weight": "token_embedding.weight",       # the same table as shared.weight; files have one or both
    "shared.weight": "token_embedding.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "position_bias.weight",
    "encoder.final_layer_norm.": "final_norm.",
    "encoder.block.": "layers.",
    ".layer.0.SelfAttention.o.": ".attention.out.",
    ".layer.0.SelfAttention.": ".attention.",
    ".layer.0.layer_norm.": ".norm1.",
    ".layer.1.DenseReluDense.wi_0.": ".feed_forward.gate.",
    ".layer.1.DenseReluDense.wi_1.": ".feed_forward.up.",
    ".layer.1.DenseReluDense.wo.": ".feed_forward.down.",
    ".layer.1.layer_norm.": ".norm2.",
}
# diffusers -> single file. Its q, k, v are matrices of their own and become .qkv. in `from_diffusers`.
MMDIT_DIFFUSERS = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj.": "x_embedder.proj.",
    "time_text_embed.timestep_embedder.linear_1.": "t_embedder.mlp.0.",
    "time_text_embed.timestep_embedder.linear_2.": "t_embedder.mlp.2.",
    "time_text_embed.text_embedder.linear_1.": "y_embedder.mlp.0.",
    "time_text_embed.text_embedder.linear_2.": "y_embedder.mlp.2.",
    "norm_out.linear.": "final_layer.adaLN_modulation.1.",
    "proj_out.": "final_layer.linear.",
    "transformer_blocks.": "joint_blocks.",
    ".norm1.linear.": ".x_block.adaLN_modulation.1.",
    ".norm1_context.linear.": ".context_block.adaLN_modulation.1.",
    ".attn.to_out.0.": ".x_block.attn.proj.",
    ".attn.to_add_out.": ".context_block.attn.proj.",
    ".attn2.to_out.0.": ".x_block.attn2.proj.",
    ".ff.net.0.proj.": ".x_block.mlp.fc1.",
    ".ff.net.2.": ".x_block.mlp.fc2.",
    ".ff_context.net.0.proj.": ".context_block.mlp.fc1.",
    ".ff_context.net.2.": ".context_block.mlp.fc2.",
    **{f".attn.to_{x}.": f".x_block.attn.{x}." for x in "qkv"},
    **{f".attn.add_{x}_proj.": f".context_block.attn.{x}." for x in "qkv"},
    **{f".attn2.to_{x}.": f".x_block.attn2.{x}." for x in "qkv"},
    **{f".attn.norm_{x}.": f".x_block.attn.ln_{x}." for x in "qk"},
    **{f".attn.norm_added_{x}.": f".context_block.attn.ln_{x}." for x in "qk"},
    **{f".attn2.norm_{x}.": f".x_block.attn2.ln_{x}." for x in "qk"},
}
VAE_DIFFUSERS = {
    ".mid_block.resnets.0.": ".mid.block_1.",
    ".mid_block.resnets.1.": ".mid.block_2.",
    ".mid_block.attentions.0.group_norm.": ".mid.attn_1.norm.",
    ".mid_block.attentions.0.to_out.0.": ".mid.attn_1.proj_out.",
    **{f".mid_block.attentions.0.to_{x}.": f".mid.attn_1.{x}." for x in "qkv"},
    ".conv_norm_out.": ".norm_out.",
    ".down_blocks.": ".down.",
    ".up_blocks.": ".up.",                               # counted from the other end: `flip_levels`
    ".resnets.": ".block.",
    ".downsamplers.0.": ".downsample.",
    ".upsamplers.0.": ".upsample.",
    ".conv_shortcut.": ".nin_shortcut.",
}
SINGLE_TABLES = {"mmdit": {}, "vae": {}, "clip_l": CLIP_NAMES, "clip_g": CLIP_NAMES, "t5": T5_NAMES}
DIFFUSERS_TABLES = SINGLE_TABLES | {"mmdit": MMDIT_DIFFUSERS, "vae": VAE_DIFFUSERS}

# What weights may be stored as, by the names of safetensors.
STORED_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
                "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}

# Keys that give away what a file is, if it is not ours.
FAMILIES = {
    "double_blocks.0.": "a Flux model",
    "conditioner.embedders.": "an SDXL model",
    "cond_stage_model.": "a Stable Diffusion 1 or 2 model",
    "input_blocks.0.": "a U-Net (Stable Diffusion 1, 2 or XL)",
    "down_blocks.0.": "a component of a diffusers folder (give the folder above it)",
    "transformer_blocks.0.": "the transformer of a diffusers folder (give the folder above it)",
    "lora_": "a LoRA",
}


class CheckpointError(ValueError):
    """A file that cannot be used; the message names the file, what is wrong, and the way out."""


def rename(name: str, table: dict) -> str | None:
    """Released name -> our name by a table of replacements; None if the tensor is dropped on purpose."""
    for released, ours in table.items():
        if released in name:
            if ours is None:
                return None
            name = name.replace(released, ours)
    return name


def released_name(name: str, table: dict) -> str:
    """The inverse of `rename`, for writing."""
    if name == "token_embedding.weight" and table is T5_NAMES:
        return "shared.weight"
    if table is CLIP_NAMES and re.match(r"(token|position)_embedding", name):
        return "text_model.embeddings." + name
    for released, ours in table.items():
        at_start = not released.startswith(".")                                   # a piece like ".q." stands anywhere
        if ours and (name.startswith(ours) if at_start else ours in name):
            name = name.replace(ours, released, 1)
    return name


# ------------------------------------------------------------------------------------------------------------
# Reading
# ------------------------------------------------------------------------------------------------------------

def open_safetensors(file):
    """A memory-mapped safetensors file, or a CheckpointError that says what is wrong with it."""
    file = Path(file)
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file. Give a .safetensors file, a model folder or a run folder.")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as problem:
        with open(file, "rb") as raw:
            start = raw.read(40)
        if start.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull`.") from None
        raise CheckpointError(f"{file} is not a whole safetensors file ({problem}); it was probably cut off or is of another "
                              f"format. Fetch it again.") from None


def read_header(file) -> tuple[dict, dict, int]:
    """({key: {"dtype", "shape", "data_offsets"}}, metadata, where the data begin) of a safetensors file that is whole."""
    open_safetensors(file)                                                        # checks every offset, shape and type
    with open(file, "rb") as raw:
        size, = struct.unpack("<Q", raw.read(8))
        header = json.loads(raw.read(size))
    metadata = header.pop("__metadata__", None) or {}
    return header, metadata, 8 + size


def read_tensor(raw, start: int, entry: dict):
    """A tensor as it is stored: `entry` of a header, in an open file whose data begin at `start`. Read and not mapped, because
    a page fault for every 4 kB that are copied costs more than the copy."""
    tensor = torch.empty(entry["shape"], dtype=STORED_TYPES[entry["dtype"]])
    raw.seek(start + entry["data_offsets"][0])
    raw.readinto(tensor.reshape(-1).view(torch.uint8).numpy())
    return tensor


def file_config(file) -> dict:
    """What the tensors of a file cannot tell, as `save_networks` wrote it; empty for released files."""
    try:
        config = json.loads(read_header(file)[1].get("config", "{}"))
        if not all(isinstance(part, dict) for part in (config, *config.values())):
            raise ValueError("not an object of objects")
        return config
    except CheckpointError:
        raise
    except (ValueError, AttributeError) as problem:
        raise CheckpointError(f"{file}: its metadata is damaged ({problem}); fetch or save it again") from None


def read_json(file) -> dict:
    """A JSON object from a file of a folder, or a CheckpointError."""
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise CheckpointError(f"{file} cannot be read ({problem}); fetch the folder again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is not a JSON object; fetch the folder again")
    return value


def build(kind: type, config, tensors: dict, file) -> torch.nn.Module:
    """Construct a network without memory, then give it exactly these tensors: one strict load."""
    with torch.device("meta"):
        network = kind(config)
    expected = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    wrong = sorted(name for name in expected.keys() & tensors.keys() if expected[name] != tuple(tensors[name].shape))
    for what, names in (("lacks", missing), ("has unknown", unknown)):
        if names:
            raise CheckpointError(f"{file} {what} {len(names)} tensor(s) of {kind.__name__}: "
                                  f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}")
    if wrong:
        raise CheckpointError(f"{file}: {wrong[0]} has shape {tuple(tensors[wrong[0]].shape)}, "
                              f"{kind.__name__} of these sizes needs {expected[wrong[0]]}")
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def count_layers(tensors: dict, pattern: str) -> int:
    """How many different numbers stand where `pattern` has its group, e.g. the depth in joint_blocks.(\\d+)."""
    return len({match.group(1) for name in tensors if (match := re.match(pattern, name))})


def infer_config(name: str, tensors: dict, metadata: dict):
    """(class, config) of a network from the shapes of its tensors; from the metadata what shapes cannot tell (SD3's without)."""
    size = lambda key, axis=0: tensors[key].shape[axis]
    if name == "mmdit":
        return MMDiT, MMDiTConfig(
            depth=size("x_embedder.proj.weight") // 64, latent_channels=size("x_embedder.proj.weight", 1),
            patch_size=size("x_embedder.proj.weight", 2), context_dim=size("context_embedder.weight", 1),
            pooled_dim=size("y_embedder.mlp.0.weight", 1), qk_norm="joint_blocks.0.x_block.attn.ln_q.weight" in tensors,
            pos_embed_max_size=round(size("pos_embed", 1) ** 0.5),
            dual_attention_layers=count_layers(tensors, r"joint_blocks\.(\d+)\.x_block\.attn2\."),
            clip_tokens=metadata.get("clip_tokens", 0))
    if name == "vae":
        levels = range(count_layers(tensors, r"encoder\.down\.(\d+)\."))
        return VAE, VAEConfig(latent_channels=size("decoder.conv_in.weight", 1), **metadata,
                              channels=tuple(size(f"encoder.down.{i}.block.0.conv1.weight") for i in levels))
    layers, (vocabulary, width) = count_layers(tensors, r"layers\.(\d+)\."), tensors["token_embedding.weight"].shape
    if name == "t5":
        buckets, heads = tensors["position_bias.weight"].shape
        return T5Encoder, T5Config(vocabulary, width, size("layers.0.feed_forward.gate.weight"), layers, heads, buckets)
    projection = size("projection.weight") if "projection.weight" in tensors else None
    return CLIPTextEncoder, CLIPConfig(vocabulary, width, layers, size("position_embedding.weight"),
                                       "quick_gelu" if name == "clip_l" else "gelu", projection)


@dataclass(frozen=True)
class Stored:
    """Where one network lies: its files (several where it is sharded), what its keys begin with, whose names they bear."""
    files: tuple[Path, ...]
    prefix: str = ""
    diffusers: bool = False


def cast(name: str, tensor, dtype):
    """dtype None: as it is stored (float8 becomes fp16). In half precision only the matrices of the blocks are stored so;
    embeddings, norms, biases and convolutions stay fp32."""
    if dtype is None:
        dtype = torch.float16 if tensor.dtype.itemsize == 1 else tensor.dtype
    elif tensor.dim() != 2 or "embed" in name:
        dtype = torch.float32
    return tensor.to(dtype)


def read_tensors(name: str, place: Stored, dtype=torch.float32, shapes_only: bool = False) -> dict:
    """{our name: tensor} of one network, from all its files; empty if they hold none. dtype: see `cast`.

    shapes_only: tensors on the meta device, nothing is read. Refuses integers, and a name that comes twice with other numbers.
    """
    table, tensors = (DIFFUSERS_TABLES if place.diffusers else SINGLE_TABLES)[name], {}
    for file in place.files:
        header, _, start = read_header(file)
        with open(file, "rb") as raw:
            for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                ours = rename(key[len(place.prefix):], table) if key.startswith(place.prefix) else None
                if ours is None:
                    continue
                if entry["dtype"] not in STORED_TYPES:
                    raise CheckpointError(f"{file}: {key} is {entry['dtype']}, but weights are floating point; fetch it again")
                if shapes_only:
                    tensors[ours] = torch.empty(entry["shape"], device="meta")
                    continue
                tensor = cast(ours, read_tensor(raw, start, entry), dtype)
                if ours in tensors and not torch.equal(tensors[ours], tensor):
                    raise CheckpointError(f"{file}: {key} differs from its second copy; fetch the file again")
                tensors[ours] = tensor
    return from_diffusers(name, tensors) if place.diffusers else tensors


def flip_levels(tensors: dict) -> dict:
    """The VAE decoder's levels counted from the other end: diffusers begins at the lowest resolution. Its own inverse."""
    last = count_layers(tensors, r"decoder\.up\.(\d+)\.") - 1
    return {re.sub(r"(?<=decoder\.up\.)\d+", lambda level: str(last - int(level[0])), key): x for key, x in tensors.items()}


def swap_halves(tensors: dict) -> dict:
    """(shift, scale) <-> (scale, shift): diffusers stores the modulation of the final layer and of the last text block in the
    other order. Its own inverse."""
    last = count_layers(tensors, r"joint_blocks\.(\d+)\.") - 1
    swapped = ("final_layer.adaLN_modulation.", f"joint_blocks.{last}.context_block.adaLN_modulation.")
    return {key: torch.cat(x.chunk(2)[::-1]) if key.startswith(swapped) else x for key, x in tensors.items()}


def from_diffusers(name: str, tensors: dict) -> dict:
    """Tensors of a diffusers folder, renamed by the table, into the form of the single file."""
    if name == "vae":                                                             # its attention has matrices, ours 1x1 kernels
        return flip_levels({key: x[:, :, None, None] if ".mid.attn_1." in key and x.dim() == 2 else x
                            for key, x in tensors.items()})
    if name == "mmdit":
        for key in [key for key in tensors if re.search(r"attn2?\.q\.", key)]:
            parts = [tensors.pop(key.replace(".q.", f".{x}.")) for x in "qkv"]
            tensors[key.replace(".q.", ".qkv.")] = torch.cat(parts)
        return swap_halves(tensors)
    return tensors


def to_diffusers(name: str, tensors: dict) -> dict:
    """The inverse of `from_diffusers`, and the names of diffusers."""
    if name == "vae":
        tensors = {key: x[:, :, 0, 0] if ".mid.attn_1." in key and x.dim() == 4 else x
                   for key, x in flip_levels(tensors).items()}
    if name == "mmdit":
        tensors, joined = {}, swap_halves(tensors)
        for key, x in joined.items():
            parts = zip("qkv", x.chunk(3)) if ".qkv." in key else [("qkv", x)]
            tensors.update({key.replace(".qkv.", f".{part}."): value for part, value in parts})
    return {released_name(key, DIFFUSERS_TABLES[name]): x.contiguous() for key, x in tensors.items()}


def read_network(name: str, file, dtype=torch.float32, prefix: str | None = None, metadata: dict | None = None,
                 shapes_only: bool = False):
    """One network out of a file, or None if the file has no tensor of it. name: a key of PREFIXES.

    file: a path or a `Stored`. prefix: what its keys begin with; by default that of the single-file layout. metadata: what the
    tensors cannot tell, by default what the file says. Raises CheckpointError for whatever does not fit exactly.
    """
    place = file if isinstance(file, Stored) else Stored((Path(file),), PREFIXES[name] if prefix is None else prefix)
    file = place.files[0].parent if len(place.files) > 1 else place.files[0]
    metadata = file_config(place.files[0]) if metadata is None else metadata
    try:
        tensors = read_tensors(name, place, dtype, shapes_only)
        if not tensors:
            return None
        if name == "clip_l":                     # SD3 does not project it, and files that carry a projection carry an identity
            tensors.pop("projection.weight", None)
        return build(*infer_config(name, tensors, metadata.get(name, {})), tensors, file)
    except KeyError as missing:
        raise CheckpointError(f"{file} lacks {place.prefix}{missing.args[0]}, which every {name} has") from None
    except CheckpointError:
        raise
    except (IndexError, TypeError, ValueError, ArithmeticError, RuntimeError) as problem:
        raise CheckpointError(f"{file}: its {name} has tensors or metadata of an unknown form ({problem})") from None


# ------------------------------------------------------------------------------------------------------------
# Files and folders
# ------------------------------------------------------------------------------------------------------------

@dataclass
class Model:
    """A checkpoint on disk: where each network lies, what tensors cannot tell, where tokenizers may lie."""
    path: Path
    places: dict[str, Stored]
    config: dict
    tokenizers: tuple[Path, ...]


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of one component of a diffusers folder: one, or its shards, with an index or without.
    Full precision is preferred to ".fp16." variants."""
    plain = lambda files: [f for f in files if ".fp16" not in f.name] or files    # all, if there is nothing else
    indices = plain(sorted(folder.glob("*.safetensors.index*.json")))
    files = plain(sorted(folder.glob("*.safetensors")))
    if indices and (".fp16" not in indices[0].name or not files or ".fp16" in files[0].name):
        names = read_json(indices[0]).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) and Path(n).name == n for n in names.values()):
            raise CheckpointError(f"{indices[0]} has no usable weight_map; fetch the folder again")
        files = [folder / name for name in sorted(set(names.values()))]
    elif files and (shard := re.search(r"-of-(\d+)\.safetensors$", files[0].name)):
        stem = files[0].name[: shard.start() - 5]                                 # before the five digits of its number
        files = [folder / f"{stem}{i + 1:05}{shard[0]}" for i in range(min(int(shard[1]), 10000))]
    if missing := [f.name for f in files if not f.is_file()]:
        raise CheckpointError(f"{folder} lacks {len(missing)} of {len(files)} shards: {', '.join(missing[:3])}; fetch them")
    if not files:
        raise CheckpointError(f"{folder} holds no .safetensors file; .bin and .ckpt are pickles and are never opened")
    return tuple(files)


def open_diffusers(folder: Path) -> Model:
    """A diffusers folder; what its tensors cannot tell comes from vae/config.json, the scheduler's, and our own metadata."""
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    kind = str(index.get("_class_name", "StableDiffusion3Pipeline"))
    if not kind.startswith("StableDiffusion3"):
        raise CheckpointError(f"{folder} is a {kind}, which is not supported; give a StableDiffusion3Pipeline (SD3 or SD3.5)")
    for name, folder_name in FOLDERS.items():
        if name != "t5" and (index.get(folder_name) or [None])[0] and not (folder / folder_name).is_dir():
            raise CheckpointError(f"{folder} lacks {folder_name}/, which its model_index.json names; fetch it")
    present = [name for name in FOLDERS if (folder / FOLDERS[name]).is_dir()]
    places = {name: Stored(weight_files(folder / FOLDERS[name]), diffusers=True) for name in present}
    config = file_config(places["mmdit"].files[0]) if "mmdit" in places else {}
    if "vae" in places and (folder / "vae" / "config.json").is_file():
        vae = read_json(folder / "vae" / "config.json")
        names = {"norm_groups": "norm_num_groups", "vae_scale": "scaling_factor", "vae_shift": "shift_factor"}
        config["vae"] = {ours: vae[theirs] for ours, theirs in names.items() if vae.get(theirs) is not None}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.is_file() and isinstance(shift := read_json(scheduler).get("shift"), int | float):
        config["sampling"] = {"timestep_shift": shift} | config.get("sampling", {})
    return Model(folder, places, config, (folder,))


def open_single_file(file: Path) -> Model:
    """A single file, and of the text encoders it lacks the separate files beside it or in text_encoders/."""
    keys = list(read_header(file)[0])
    places = {name: Stored((file,), PREFIXES[name]) for name in PREFIXES if any(key.startswith(PREFIXES[name]) for key in keys)}
    if not places and any(key.startswith("joint_blocks.0.") for key in keys):     # the MM-DiT alone, without its prefix
        places["mmdit"] = Stored((file,))
    for sign, name in {"text_model.": "clip_g" if "text_projection.weight" in keys else "clip_l", "encoder.block.": "t5"}.items():
        if not places and any(key.startswith(sign) for key in keys):              # one text encoder alone
            places[name] = Stored((file,))
    known = tuple(place.prefix for place in places.values())
    other = [key for key in keys if not key.startswith(known)] if known else keys
    other = [key for key in other if not re.fullmatch(r"text_encoders\.\w+\.logit_scale", key)]
    stem = lambda key: key.removeprefix(PREFIXES["mmdit"]).removeprefix("model.")
    for sign, family in FAMILIES.items():
        if any(stem(key).startswith(sign) for key in keys):
            raise CheckpointError(f"{file} is {family}, not SD3 or SD3.5; its keys begin with {', '.join(sorted(keys)[:3])}")
    if other:
        raise CheckpointError(f"{file} holds {len(other)} tensor(s) of no known network: {', '.join(sorted(other)[:3])}"
                              f"{', ...' if len(other) > 3 else ''}. Give an SD3 or SD3.5 file, or a model saved here.")
    for name, pattern in SEPARATE_FILES.items():
        beside = [f for folder in (file.parent, file.parent / "text_encoders") for f in folder.glob(pattern) if f != file]
        if name not in places and beside:
            places[name] = Stored((min(beside, key=lambda f: ("fp8" in f.name, f.name)),))      # fp16 rather than float8
    return Model(file, places, file_config(file), (file.parent / "tokenizers", file.parent))


def open_model(path) -> Model:
    """Finds every network of a model file, a model or run folder, or a diffusers folder; refuses other families by name."""
    path = find_model_file(path)
    return open_diffusers(path) if path.is_dir() else open_single_file(path)


def from_hub(name: str) -> Path:
    """Download (or find in the cache) the diffusers folder of a hub repository "owner/name": its local path."""
    import huggingface_hub  # comes with `tokenizers`
    from huggingface_hub import errors

    wanted = ["model_index.json", "scheduler/*.json", "tokenizer*/*"]
    wanted += [f"{folder}/*.{kind}" for folder in FOLDERS.values() for kind in ("json", "safetensors")]
    try:
        huggingface_hub.hf_hub_download(name, "model_index.json")                 # before gigabytes that would be of no use
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*.fp16*"]))
    except errors.GatedRepoError:
        raise CheckpointError(f"{name} is gated: accept its licence on its hub page, then run `hf auth login`.") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(f"{name}: no such file or folder here, nor on the hub (or private: run `hf auth login`).") from None
    except errors.RemoteEntryNotFoundError:
        raise CheckpointError(f"{name} has no diffusers folder on the hub (no model_index.json); download its single file and "
                              f"give that, with --tokenizers, or name the repository that ends in -diffusers.") from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError, ValueError) as problem:
        raise CheckpointError(f"{name}: no such file or folder here, and the hub cannot be reached "
                              f"({type(problem).__name__}); download it where there is a network and give its path.") from None
    return folder


@dataclass
class Components:
    """What a prompt needs on its way to a picture; None where it was not asked for."""
    mmdit: MMDiT | None = None
    vae: VAE | None = None
    text: TextEncoders | None = None
    sampling: dict = field(default_factory=dict)       # how the model wants to be sampled, if its file says
    file: Path | None = None                           # where the MM-DiT came from, for the record
    tokenizers: dict = field(default_factory=dict)     # {encoder: its vocabulary's folder or file}


def find_model_file(path) -> Path:
    """The model.safetensors of a folder, a diffusers folder itself, or the file. Relative paths are also looked up beside the
    code; "owner/name" that is neither is looked up on the hub."""
    path = Path(path)
    if not path.exists() and (SHIPPED.parent.parent / path).exists():
        path = SHIPPED.parent.parent / path
    like_a_hub_name = re.fullmatch(r"(?!(runs|out|pretrained)/)[\w-][\w.-]*/[\w.-]+", str(path)) and path.suffix != ".safetensors"
    if like_a_hub_name and not path.exists() and not path.parent.is_dir():
        path = from_hub(str(path))
    if path.is_dir() and not ((path / "model_index.json").is_file() or (path / "transformer").is_dir()):
        if not (path / "model.safetensors").is_file():
            raise CheckpointError(f"{path} has no model.safetensors. A run folder gets one at its first save; "
                                  f"train longer, or give another folder.")
        path = path / "model.safetensors"
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder. Give a run folder, a model folder or a .safetensors file.")
    return path


def portable(file) -> str:
    """A path for a record: relative to this project where it is inside, so that both may move; else absolute."""
    file, root = Path(file).resolve(), SHIPPED.parents[1].resolve()
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)


def fingerprint(file, components=None) -> str:
    """A short hash of a safetensors file: of every tensor its name, type, shape and first 4 kB, so it is quick at any size;
    and of what the metadata says about the VAE and the texts.

    components: keys of PREFIXES; of these only. The frozen encoders keep theirs when another MM-DiT is put beside them.
    """
    if Path(file).is_dir():                                                       # diffusers: of all files of its networks
        model = open_model(file)
        parts = [fingerprint(f) for name, place in model.places.items() if not components or name in components
                 for f in place.files]
        described = json.dumps([parts, model.config.get("vae"), model.config.get("text")], sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()[:16]
    prefixes = tuple(PREFIXES[name] for name in components) if components else ("",)
    config, (header, _, start) = file_config(file), read_header(file)
    digest = hashlib.sha256(json.dumps([config.get("vae"), config.get("text")], sort_keys=True).encode())
    with open(file, "rb") as raw:
        for name in sorted(name for name in header if name.startswith(prefixes)):
            begin, end = header[name]["data_offsets"]
            raw.seek(start + begin)
            digest.update(json.dumps([name, header[name]["dtype"], header[name]["shape"]]).encode())
            digest.update(raw.read(min(4096, end - begin)))
    return digest.hexdigest()[:16]


def find_tokenizers(places, names) -> dict:
    """{"clip_l": folder, "clip_g": folder, "t5": spiece.model} for `names`, from the first of `places` that has each."""
    homes = {"clip_l": ("clip", "clip_l", "tokenizer"), "clip_g": ("clip", "clip_l", "tokenizer_2"), "t5": ("t5", "tokenizer_3")}
    files = {"clip_l": "merges.txt", "clip_g": "merges.txt", "t5": "spiece.model"}
    found = {}
    for name in names:
        candidates = [file for place in places for home in homes[name] if (file := place / home / files[name]).is_file()]
        if not candidates:
            raise CheckpointError(f"{places[0]}: no tokenizers there for {name}. They are files of their own: vocab.json and "
                                  f"merges.txt of CLIP in clip/, spiece.model of T5 in t5/; give their folder with --tokenizers.")
        found[name] = candidates[0] if name == "t5" else candidates[0].parent
    return found


def load_text(model: Model, dtype=torch.float32, tokenizers=None, shapes_only: bool = False) -> tuple[TextEncoders, dict]:
    """Text encoders of a model and where their tokenizers lie: beside it, or in the folder `tokenizers`. T5 is never computed in
    fp16, which it overflows: bf16 takes its place."""
    stored = model.config.get("text", {})
    places = (Path(tokenizers),) if tokenizers else model.tokenizers
    names = [name for name in ("clip_l", "clip_g", "t5") if name in model.places]
    if not names:
        raise CheckpointError(f"{model.path} holds no text encoder, and none lies beside it; put clip_l, clip_g or t5xxl there")
    files, encoders = find_tokenizers(places, names), {}
    for name in names:
        kind = torch.bfloat16 if name == "t5" and dtype == torch.float16 else dtype
        encoders[name] = read_network(name, model.places[name], kind, metadata=model.config, shapes_only=shapes_only)
    makers = {"clip_l": CLIPTokenizer, "clip_g": lambda folder: CLIPTokenizer(folder, padding=0), "t5": T5Tokenizer}
    widths = {f"{name}_width": encoder.config.hidden_size for name, encoder in encoders.items()}
    try:
        config, made = TextConfig(**{**stored, **widths}), {name: makers[name](files[name]) for name in encoders}
    except Exception as problem:                                                  # tokenizers raises nothing more exact
        raise CheckpointError(f"{model.path}: its tokenizers ({files[names[0]]}, ...) or token counts cannot be used "
                              f"({problem})") from None
    for name, encoder in encoders.items():
        pieces, embeddings = made[name].vocab_size, encoder.config.vocab_size
        if pieces > embeddings or (name != "t5" and pieces != embeddings):        # T5's table is padded to a round number
            raise CheckpointError(f"{files[name]} has {pieces} tokens but the {name} of {model.path} has {embeddings}: they are "
                                  f"of another model; give the right folder with --tokenizers")
    return TextEncoders(encoders, made, config).eval(), files


def run_encoders(folder: Path) -> tuple[Path, str] | None:
    """(file, tokenizers) of the frozen encoders that a run folder was trained with, as its config.json names them and their
    fingerprint proves; None for a folder that is no run."""
    named = (read_json(folder / "config.json") if (folder / "config.json").is_file() else {}).get("encoders")
    if not isinstance(named, dict) or not {"path", "fingerprint"} <= named.keys():        # a config.json of somebody else's
        return None
    file = find_model_file(named["path"])
    if (found := fingerprint(file, ENCODERS)) != named["fingerprint"]:
        raise CheckpointError(f"{file} does not hold the encoders that {folder} was trained with (fingerprint {found}, "
                              f"expected {named['fingerprint']}); put the right file there.")
    return file, named.get("tokenizers", "")


def load_components(path=SHIPPED, wanted=("mmdit", "vae", "text"), dtype=torch.float32, tokenizers=None,
                    shapes_only: bool = False) -> Components:
    """Networks of a model file, a model folder or a run folder, on the CPU, frozen. shapes_only: on the meta device, no numbers.

    A run folder holds its MM-DiT only; its config.json says, by path and fingerprint, which encoders it was trained with.
    """
    model = open_model(path)
    encoders = model
    if {"vae", "text"} & set(wanted) and model.path.is_file() and (named := run_encoders(model.path.parent)):
        encoders, tokenizers = open_model(named[0]), tokenizers or named[1]
    parts = Components(sampling=model.config.get("sampling", {}), file=model.path)
    for name, source in (("mmdit", model), ("vae", encoders)):
        if name in wanted:
            if name not in source.places:
                raise CheckpointError(f"{source.path} holds no {name}: no key begins with {PREFIXES[name]!r}")
            setattr(parts, name, read_network(name, source.places[name], dtype, metadata=source.config,
                                              shapes_only=shapes_only))
    if "text" in wanted:
        parts.text, parts.tokenizers = load_text(encoders, dtype, tokenizers, shapes_only)
    return parts


# ------------------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------------------

def write_atomically(file, write):
    """Call write(temporary path), then rename: a kill or a full disk leaves the old file as it was."""
    file = Path(file)
    partial = file.with_name(file.name + ".partial")
    try:
        write(partial)
        os.replace(partial, file)
    except (OSError, SafetensorError) as problem:
        raise OSError(f"could not write {file} ({problem}); what was there before is untouched. "
                      f"Free some space or choose another folder.") from None
    finally:
        partial.unlink(missing_ok=True)                                           # renamed by now if all went well


def network_config(networks: dict, text: TextConfig | None, sampling: dict | None) -> dict:
    """What tensors cannot tell, for the metadata of what is written."""
    config = {"sampling": sampling} if sampling else {}
    if "mmdit" in networks and networks["mmdit"].config.clip_tokens:
        config["mmdit"] = {"clip_tokens": networks["mmdit"].config.clip_tokens}
    if "vae" in networks:
        vae = networks["vae"].config
        config["vae"] = {"norm_groups": vae.norm_groups, "vae_scale": vae.vae_scale, "vae_shift": vae.vae_shift}
    if text is not None:
        config["text"] = vars(text)
    return config


def state(network, dtype=None) -> dict:
    """A network's tensors on the CPU, in `dtype` if given."""
    return {name: x.detach().to("cpu", dtype or x.dtype).contiguous() for name, x in network.state_dict().items()}


def save_networks(file, networks: dict, text: TextConfig | None = None, sampling: dict | None = None, dtype=None):
    """Write {"mmdit": MMDiT, "vae": VAE, "clip_l": ..., ...} as one single-file checkpoint. text: the token counts to store with
    text encoders; sampling: the settings this model wants to be sampled with (fields of sample.Settings)."""
    tensors = {PREFIXES[component] + released_name(name, SINGLE_TABLES[component]): x
               for component, network in networks.items() for name, x in state(network, dtype).items()}
    config = json.dumps(network_config(networks, text, sampling))
    write_atomically(file, lambda partial: save_file(tensors, partial, {"format": "pt", "config": config}))


def diffusers_configs(networks: dict, text: TextConfig, sampling: dict) -> dict:
    """{component: config.json} as diffusers and transformers expect them. eos_token_id 2 means "pool at the largest id"."""
    m, v = networks["mmdit"].config, networks["vae"].config
    levels = len(v.channels)
    clip = lambda c: {
        "architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model", "hidden_act": c.activation,
        "hidden_size": c.hidden_size, "intermediate_size": 4 * c.hidden_size, "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads, "max_position_embeddings": c.max_length, "vocab_size": c.vocab_size,
        "projection_dim": c.projection_dim or c.hidden_size, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    configs = {
        "mmdit": {
            "_class_name": "SD3Transformer2DModel", "num_layers": m.depth, "num_attention_heads": m.num_heads,
            "attention_head_dim": 64, "caption_projection_dim": m.hidden_size, "in_channels": m.latent_channels,
            "out_channels": m.latent_channels, "patch_size": m.patch_size, "joint_attention_dim": m.context_dim,
            "pooled_projection_dim": m.pooled_dim, "pos_embed_max_size": m.pos_embed_max_size,
            "sample_size": sampling.get("height", 1024) // v.downsampling, "qk_norm": "rms_norm" if m.qk_norm else None,
            "dual_attention_layers": list(range(m.dual_attention_layers))},
        "vae": {
            "_class_name": "AutoencoderKL", "latent_channels": v.latent_channels, "block_out_channels": list(v.channels),
            "down_block_types": levels * ["DownEncoderBlock2D"], "up_block_types": levels * ["UpDecoderBlock2D"],
            "layers_per_block": 2, "norm_num_groups": v.norm_groups, "scaling_factor": v.vae_scale,
            "shift_factor": v.vae_shift, "use_quant_conv": False, "use_post_quant_conv": False}}
    for name in ("clip_l", "clip_g"):
        if name in networks:
            configs[name] = clip(networks[name].config)
    if "t5" in networks:
        t = networks["t5"].config
        configs["t5"] = {
            "architectures": ["T5EncoderModel"], "model_type": "t5", "d_model": t.hidden_size, "d_ff": t.ff_size, "d_kv": 64,
            "num_heads": t.num_heads, "num_layers": t.num_layers, "vocab_size": t.vocab_size, "is_encoder_decoder": True,
            "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": t.num_buckets,
            "relative_attention_max_distance": t.max_distance, "layer_norm_epsilon": 1e-6, "tie_word_embeddings": False}
    return configs


def write_json(file: Path, value: dict):
    """An indented JSON file, its folder made if needed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_tokenizers(out: Path, text: TextEncoders, files: dict):
    """tokenizer/, tokenizer_2/, tokenizer_3/ of a diffusers folder, with the token counts and padding of these encoders."""
    for name, folder in (("clip_l", "tokenizer"), ("clip_g", "tokenizer_2")):
        if name in files:
            (out / folder).mkdir()
            for file in ("vocab.json", "merges.txt"):
                shutil.copy(files[name] / file, out / folder)
            tokenizer = text.tokenizers[name]
            write_json(out / folder / "tokenizer_config.json", {
                "tokenizer_class": "CLIPTokenizer", "model_max_length": text.config.clip_length,
                "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
                "pad_token": tokenizer.pieces([tokenizer.padding])[0]})
    if "t5" in files:
        (out / "tokenizer_3").mkdir()
        shutil.copy(files["t5"], out / "tokenizer_3")
        sentinels = text.encoders["t5"].config.vocab_size - text.tokenizers["t5"].vocab_size
        write_json(out / "tokenizer_3" / "tokenizer_config.json", {
            "tokenizer_class": "T5Tokenizer", "model_max_length": text.config.t5_length, "eos_token": "</s>",
            "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": min(100, sentinels)})


def save_diffusers(out: Path, networks: dict, text: TextEncoders, sampling: dict, tokenizer_files: dict, dtype=None):
    """Write a folder that diffusers' StableDiffusion3Pipeline.from_pretrained opens; `out` must not exist yet."""
    clip = ["transformers", "CLIPTextModelWithProjection"]
    classes = {"mmdit": ["diffusers", "SD3Transformer2DModel"], "vae": ["diffusers", "AutoencoderKL"], "clip_l": clip,
               "clip_g": clip, "t5": ["transformers", "T5EncoderModel"]}
    tokenizers = {"tokenizer": ("clip_l", "CLIPTokenizer"), "tokenizer_2": ("clip_g", "CLIPTokenizer"),
                  "tokenizer_3": ("t5", "T5TokenizerFast")}
    if networks["mmdit"].config.clip_tokens:
        raise CheckpointError("an MM-DiT with three weight sets has no place in the diffusers layout; export it --to single-file")
    configs = diffusers_configs(networks, text.config, sampling)
    metadata = {"format": "pt", "config": json.dumps(network_config(networks, text.config, sampling))}
    index = {"_class_name": "StableDiffusion3Pipeline", "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    for name, network in networks.items():
        tensors = to_diffusers(name, state(network, dtype))
        if name == "clip_l":                                                      # its pooled vector passes unchanged
            tensors["text_projection.weight"] = torch.eye(network.config.hidden_size, dtype=tensors[min(tensors)].dtype)
        write_json(out / FOLDERS[name] / "config.json", configs[name])
        file = "diffusion_pytorch_model.safetensors" if name in ("mmdit", "vae") else "model.safetensors"
        save_file(tensors, out / FOLDERS[name] / file, metadata)
    write_json(out / "scheduler" / "scheduler_config.json", {
        "_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000,
        "shift": sampling.get("timestep_shift", 3.0)})
    write_tokenizers(out, text, tokenizer_files)
    for name, folder in FOLDERS.items():
        index[folder] = classes[name] if name in networks else [None, None]
    for folder, (name, kind) in tokenizers.items():
        index[folder] = ["transformers", kind] if name in networks else [None, None]
    write_json(out / "model_index.json", index)


def export(path, out, layout: str, dtype=None, tokenizers=None):
    """Write a run folder or model as one whole thing. layout: "single-file" (out: a .safetensors file; tokenizers/ comes beside
    it) or "diffusers" (out: a folder). dtype None keeps what is stored. Raises CheckpointError if `out` exists."""
    out = Path(out)
    if out.exists():
        raise CheckpointError(f"{out} exists already; give a new name")
    if layout == "single-file" and out.suffix != ".safetensors":
        raise CheckpointError(f"{out}: a single file needs a name that ends in .safetensors")
    parts = load_components(path, dtype=None, tokenizers=tokenizers)              # cast as it is written
    networks = {"mmdit": parts.mmdit, "vae": parts.vae, **parts.text.encoders}
    files = parts.tokenizers
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)                                    # of an export that was killed
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if layout == "single-file":
            for name, target in (("clip_l", "clip/merges.txt"), ("clip_g", "clip/merges.txt"), ("t5", "t5/spiece.model")):
                source, target = files.get(name), out.parent / "tokenizers" / target
                if source and not target.exists():
                    shutil.copytree(source.parent if source.is_file() else source, target.parent, dirs_exist_ok=True)
                elif source and not filecmp.cmp(source if source.is_file() else source / target.name, target, shallow=False):
                    raise CheckpointError(f"{target} is of another model; write {out.name} into a folder of its own")
            save_networks(out, networks, parts.text.config, parts.sampling, dtype)
        else:
            save_diffusers(partial, networks, parts.text, parts.sampling, files, dtype)
            os.replace(partial, out)
    except (OSError, SafetensorError) as problem:
        raise CheckpointError(f"could not write {out} ({problem}); free some space or choose another place") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------------------

def info(path):
    """Print the networks of a checkpoint: sizes, parameters, types; and what is missing. Reads headers only."""
    model = open_model(path)
    print(f"{model.path}: fingerprint {fingerprint(model.path)}")
    for name in PREFIXES:
        if name not in model.places:
            print(f"  {name:7} missing")
            continue
        place, types, count, size = model.places[name], Counter(), 0, 0
        for key, entry in (item for file in place.files for item in read_header(file)[0].items()):
            if key.startswith(place.prefix):
                count, size = count + 1, size + torch.Size(entry["shape"]).numel()
                types[entry["dtype"]] += 1
        kinds = ", ".join(f"{kind} {n}" for kind, n in types.items())
        network = read_network(name, place, metadata=model.config, shapes_only=True)
        sizes = ", ".join(f"{key} {value}" for key, value in asdict(network.config).items())
        print(f"  {name:7} {count:5} tensors {size / 1e6:10.3f} M parameters  {kinds}  ({sizes})")


def golden_outputs(model: Model, io: dict):
    """Yields (name, what we compute) for the outputs of a golden case: tests/golden says what they are."""
    network = lambda name: read_network(name, model.places[name], metadata=model.config)
    if "r0.out" in io:
        mmdit = network("mmdit")
        for run in sorted({name.split(".")[0] for name in io if name.endswith(".out")}):
            yield f"{run}.out", mmdit(*(io[f"{run}.{part}"].float() for part in ("x", "sigma", "context", "y")))
    if "sq.moments" in io:
        vae = network("vae")
        for name in [name.split(".")[0] for name in io if name.endswith(".moments")]:
            yield f"{name}.moments", vae.encoder(io[f"{name}.image"])
            yield f"{name}.decoded", vae.decoder(io[f"{name}.z"])
    if "penultimate" in io:
        clip = network("clip_g" if "clip_g" in model.places else "clip_l")
        yield from zip(("penultimate", "sd3_pooled", "last_hidden_state"), clip(io["input_ids"]))
    if "short.out" in io:
        for length in ("short", "long"):
            yield f"{length}.out", network("t5")(io[f"{length}.input_ids"])
    if "ids.cond.t5" in io:
        encoders = {name: network(name) for name in ("clip_l", "clip_g", "t5")}
        widths = {f"{name}_width": encoder.config.hidden_size for name, encoder in encoders.items()}
        lengths = {"clip_length": io["ids.cond.l"].shape[1], "t5_length": io["ids.cond.t5"].shape[1]}
        text, mmdit = TextEncoders(encoders, {}, TextConfig(**widths, **lengths)), network("mmdit")
        for which in ("cond", "uncond"):
            ids = {"clip_l": io[f"ids.{which}.l"], "clip_g": io[f"ids.{which}.g"], "t5": io[f"ids.{which}.t5"]}
            context, pooled = text.encode_ids(ids)
            yield f"{which}.context", context
            yield f"{which}.pooled", pooled
            yield f"step0.velocity_{which}", mmdit(io["noise"], torch.ones(1), context, pooled)
        yield "sd35.image", network("vae").decode(io["sd35.latent"])


@torch.no_grad()
def verify(path) -> bool:
    """Load every network strictly, look for numbers that are not finite; compare with the expected outputs where `path` is a
    golden case (a folder with meta.json and weights). Prints what it finds and returns whether all is well."""
    folder, good = Path(path), True
    meta = read_json(folder / "meta.json") if (folder / "meta.json").is_file() else None
    weights = folder / "weights.safetensors"
    model = open_model(weights if meta and weights.is_file() else path)
    for name, place in model.places.items():
        network = read_network(name, place, metadata=model.config)
        broken = [key for key, x in network.state_dict().items() if not torch.isfinite(x).all()]
        good = good and not broken
        print(f"  {name:7} {'not finite: ' + ', '.join(broken[:3]) if broken else 'loads, all numbers finite'}")
    if meta:
        io = load_file(folder / meta.get("io_from", "io.safetensors"))
        allowed = read_json(folder / meta["tolerances_from"])["tolerances"] if "tolerances_from" in meta else meta["tolerances"]
        for name, ours in golden_outputs(model, io):
            difference = (ours.double() - io[name].double()).abs()
            within = bool((difference <= allowed["atol"][name] + allowed["rtol"] * io[name].double().abs()).all())
            good = good and within
            print(f"  {name:21} differs by up to {difference.max():.1e}, {'within' if within else 'BEYOND'} what the case allows")
    return good


def main():
    """info, verify, export: see the head of this file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in (("info", info), ("verify", verify)):
        commands.add_parser(name, help=function.__doc__.split(";")[0]).add_argument("path")
    exporting = commands.add_parser("export", help="write a run or model as one file or a diffusers folder")
    exporting.add_argument("path")
    exporting.add_argument("out", type=Path)
    exporting.add_argument("--to", choices=("diffusers", "single-file"), required=True)
    exporting.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="default: as stored")
    exporting.add_argument("--tokenizers")
    options = parser.parse_args()
    try:
        if options.command == "info":
            info(options.path)
        elif options.command == "verify":
            sys.exit(0 if verify(options.path) else f"{options.path} is not as it should be")
        else:
            dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}.get(options.dtype)
            export(options.path, options.out, options.to, dtype, options.tokenizers)
            print(options.out)
    except (ValueError, RuntimeError, OSError) as problem:                        # CheckpointError, no memory, a full disk
        sys.exit(str(problem))


if __name__ == "__main__":
    main()
