"""checkpoints.py: files <-> the modules of this project.

Read with   the key lists of the released SD3 files; App. B.2 for what a whole model consists of
Not here    the networks (mmdit.py, vae.py, text_encoders.py); this file knows all three and every released key name
Format      one model.safetensors, the prefixes of the released single file, sizes inferred from the tensors. What tensors
            cannot tell (the VAE's normalisation, token counts) is in the file's metadata; without it SD3's values hold.
            Tokenizers lie beside it: tokenizers/clip/{vocab.json,merges.txt}, tokenizers/t5/spiece.model
Safety      safetensors only, nothing is unpickled; a file is written under a temporary name and renamed
Run         python checkpoints.py FILE     prints what a file holds
"""

import hashlib
import json
import os
import re
import struct
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

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


def stored_config(file) -> dict:
    """What the tensors of a file cannot tell, as `save_networks` wrote it; empty for released files."""
    with open_safetensors(file) as opened:
        return json.loads((opened.metadata() or {}).get("config", "{}"))


def build(make, tensors: dict, file) -> torch.nn.Module:
    """Construct a network without memory, then give it exactly these tensors: one strict load."""
    with torch.device("meta"):
        network = make()
    expected = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    wrong = sorted(name for name in expected.keys() & tensors.keys() if expected[name] != tuple(tensors[name].shape))
    for what, names in (("lacks", missing), ("has unknown", unknown)):
        if names:
            raise CheckpointError(f"{file} {what} {len(names)} tensor(s) of {type(network).__name__}: "
                                  f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}")
    if wrong:
        raise CheckpointError(f"{file}: {wrong[0]} has shape {tuple(tensors[wrong[0]].shape)}, "
                              f"{type(network).__name__} of these sizes needs {expected[wrong[0]]}")
    network.load_state_dict(tensors, strict=True, assign=True)
    return network.eval().requires_grad_(False)


def count_layers(tensors: dict, pattern: str) -> int:
    """How many different numbers stand where `pattern` has its group, e.g. the depth in joint_blocks.(\\d+)."""
    return len({match.group(1) for name in tensors if (match := re.match(pattern, name))})


def build_mmdit(tensors: dict, metadata: dict, file) -> MMDiT:
    """MM-DiT of the sizes that the tensors have."""
    p = tensors["x_embedder.proj.weight"]
    config = MMDiTConfig(
        depth=p.shape[0] // 64, latent_channels=p.shape[1], patch_size=p.shape[2],
        context_dim=tensors["context_embedder.weight"].shape[1], pooled_dim=tensors["y_embedder.mlp.0.weight"].shape[1],
        qk_norm="joint_blocks.0.x_block.attn.ln_q.weight" in tensors,
        pos_embed_max_size=round(tensors["pos_embed"].shape[1] ** 0.5),
        dual_attention_layers=count_layers(tensors, r"joint_blocks\.(\d+)\.x_block\.attn2\."),
        clip_tokens=metadata.get("clip_tokens", 0))
    return build(lambda: MMDiT(config), tensors, file)


def build_vae(tensors: dict, metadata: dict, file) -> VAE:
    """Autoencoder of the sizes that the tensors have; normalisation from the metadata, SD3's without."""
    levels = count_layers(tensors, r"encoder\.down\.(\d+)\.")
    config = VAEConfig(
        latent_channels=tensors["decoder.conv_in.weight"].shape[1],
        channels=tuple(tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)),
        **metadata)
    return build(lambda: VAE(config), tensors, file)


def build_clip(tensors: dict, activation: str, file) -> CLIPTextEncoder:
    """CLIP text encoder of the sizes that the tensors have. CLIP-L's projection, if a file has one, is dropped: SD3 does
    not project it, and the public files that carry one carry an identity."""
    tensors = dict(tensors)
    if activation == "quick_gelu":
        tensors.pop("projection.weight", None)
    tokens, positions = tensors["token_embedding.weight"], tensors["position_embedding.weight"]
    config = CLIPConfig(tokens.shape[0], tokens.shape[1], count_layers(tensors, r"layers\.(\d+)\."), positions.shape[0],
                        activation, len(tensors["projection.weight"]) if "projection.weight" in tensors else None)
    return build(lambda: CLIPTextEncoder(config), tensors, file)


def build_t5(tensors: dict, file) -> T5Encoder:
    """T5 encoder of the sizes that the tensors have."""
    tokens, bias = tensors["token_embedding.weight"], tensors["position_bias.weight"]
    config = T5Config(tokens.shape[0], tokens.shape[1], tensors["layers.0.feed_forward.gate.weight"].shape[0],
                      count_layers(tensors, r"layers\.(\d+)\."), bias.shape[1], bias.shape[0])
    return build(lambda: T5Encoder(config), tensors, file)


def read_network(name: str, file, dtype=torch.float32, prefix: str | None = None):
    """One network out of a file, or None if the file has no tensor of it. name: a key of PREFIXES.

    prefix: what its keys begin with; by default that of the single-file layout. Stored bf16, fp16 and float8 are cast.
    """
    prefix = PREFIXES[name] if prefix is None else prefix
    table = CLIP_NAMES if name in ("clip_l", "clip_g") else T5_NAMES if name == "t5" else {}
    with open_safetensors(file) as opened:
        tensors = {}
        for key in opened.keys():
            ours = rename(key[len(prefix):], table) if key.startswith(prefix) else None
            if ours is not None and ours not in tensors:
                tensors[ours] = opened.get_tensor(key).to(dtype)
    if not tensors:
        return None
    metadata = stored_config(file)
    try:
        if name == "mmdit":
            return build_mmdit(tensors, metadata.get("mmdit", {}), file)
        if name == "vae":
            return build_vae(tensors, metadata.get("vae", {}), file)
        if name == "t5":
            return build_t5(tensors, file)
        return build_clip(tensors, "quick_gelu" if name == "clip_l" else "gelu", file)
    except KeyError as missing:
        raise CheckpointError(f"{file} lacks {prefix}{missing.args[0]}, which every {name} has") from None
    except (IndexError, TypeError) as problem:
        raise CheckpointError(f"{file}: its {name} has tensors or metadata of an unknown form ({problem})") from None


@dataclass
class Components:
    """What a prompt needs on its way to a picture; None where it was not asked for."""
    mmdit: MMDiT | None = None
    vae: VAE | None = None
    text: TextEncoders | None = None
    sampling: dict = field(default_factory=dict)       # how the model wants to be sampled, if its file says
    file: Path | None = None                           # where the MM-DiT came from, for the record


def find_model_file(path) -> Path:
    """The model.safetensors of a folder, or the file itself. Relative paths are also looked up beside the code."""
    path = Path(path)
    if not path.exists() and (SHIPPED.parent.parent / path).exists():
        path = SHIPPED.parent.parent / path
    if path.is_dir():
        if not (path / "model.safetensors").is_file():
            raise CheckpointError(f"{path} has no model.safetensors. A run folder gets one at its first save; "
                                  f"train longer, or give another folder.")
        path = path / "model.safetensors"
    if not path.is_file():
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
    prefixes = tuple(PREFIXES[name] for name in components) if components else ("",)
    config = stored_config(file)                                                  # refuses what is broken
    digest = hashlib.sha256(json.dumps([config.get("vae"), config.get("text")], sort_keys=True).encode())
    with open(file, "rb") as opened:
        header_size, = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(header_size))
        for name in sorted(header):
            if name != "__metadata__" and name.startswith(prefixes):
                begin, end = header[name]["data_offsets"]
                opened.seek(8 + header_size + begin)
                digest.update(json.dumps([name, header[name]["dtype"], header[name]["shape"]]).encode())
                digest.update(opened.read(min(4096, end - begin)))
    return digest.hexdigest()[:16]


def load_text(file: Path, dtype=torch.float32, tokenizers=None) -> TextEncoders:
    """Text encoders of a model file, with the tokenizers beside it (or from the folder `tokenizers`)."""
    encoders = {name: network for name in ("clip_l", "clip_g", "t5") if (network := read_network(name, file, dtype))}
    folder = Path(tokenizers) if tokenizers else file.parent / "tokenizers"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no tokenizers there. They are files of their own: vocab.json and merges.txt of CLIP "
                              f"in clip/, spiece.model of T5 in t5/; give their folder with --tokenizers.")
    makers = {"clip_l": lambda: CLIPTokenizer(folder / "clip"), "clip_g": lambda: CLIPTokenizer(folder / "clip", padding=0),
              "t5": lambda: T5Tokenizer(folder / "t5" / "spiece.model")}
    stored = stored_config(file).get("text", {})
    widths = {f"{name}_width": encoder.config.hidden_size for name, encoder in encoders.items()}
    return TextEncoders(encoders, {name: makers[name]() for name in encoders}, TextConfig(**{**stored, **widths})).eval()


def run_encoders(folder: Path) -> tuple[Path, str] | None:
    """(file, tokenizers) of the frozen encoders that a run folder was trained with, as its config.json names them and their
    fingerprint proves; None for a folder that is no run."""
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    if "encoders" not in config:                                                  # a config.json of somebody else's
        return None
    named = config["encoders"]
    file = find_model_file(named["path"])
    if (found := fingerprint(file, ENCODERS)) != named["fingerprint"]:
        raise CheckpointError(f"{file} does not hold the encoders that {folder} was trained with (fingerprint {found}, "
                              f"expected {named['fingerprint']}); put the right file there.")
    return file, named.get("tokenizers", "")


def load_components(path=SHIPPED, wanted=("mmdit", "vae", "text"), dtype=torch.float32, tokenizers=None) -> Components:
    """Networks of a model file, a model folder or a run folder, on the CPU, frozen.

    A run folder holds its MM-DiT only; its config.json says, by path and fingerprint, which encoders it was trained with.
    """
    file = find_model_file(path)
    encoders_file = file
    if {"vae", "text"} & set(wanted) and (named := run_encoders(file.parent)):
        encoders_file, tokenizers = named[0], tokenizers or named[1]
    parts = Components(sampling=stored_config(file).get("sampling", {}), file=file)
    if "mmdit" in wanted:
        parts.mmdit = read_network("mmdit", file, dtype)
    if "vae" in wanted:
        parts.vae = read_network("vae", encoders_file, dtype)
    for name, place in (("mmdit", file), ("vae", encoders_file)):
        if name in wanted and getattr(parts, name) is None:
            raise CheckpointError(f"{place} holds no {name}: no key begins with {PREFIXES[name]!r}")
    if "text" in wanted:
        parts.text = load_text(encoders_file, dtype, tokenizers)
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


def single_file_tensors(networks: dict, dtype=None) -> dict:
    """{"mmdit": MMDiT, "vae": VAE, "clip_l": ..., ...} -> tensors under their single-file names."""
    tensors = {}
    for component, network in networks.items():
        table = CLIP_NAMES if component in ("clip_l", "clip_g") else T5_NAMES if component == "t5" else {}
        for name, tensor in network.state_dict().items():
            tensor = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
            tensors[PREFIXES[component] + released_name(name, table)] = tensor
    return tensors


def save_networks(file, networks: dict, text: TextConfig | None = None, sampling: dict | None = None, dtype=None):
    """Write networks as one single-file checkpoint. text: the token counts to store with text encoders; sampling: the
    settings this model wants to be sampled with (the keys of sample.RELEASED_DEFAULTS)."""
    config = {"sampling": sampling} if sampling else {}
    if "mmdit" in networks and networks["mmdit"].config.clip_tokens:
        config["mmdit"] = {"clip_tokens": networks["mmdit"].config.clip_tokens}
    if "vae" in networks:
        vae = networks["vae"].config
        config["vae"] = {"norm_groups": vae.norm_groups, "vae_scale": vae.vae_scale, "vae_shift": vae.vae_shift}
    if text is not None:
        config["text"] = vars(text)
    tensors = single_file_tensors(networks, dtype)
    write_atomically(file, lambda partial: save_file(tensors, partial, {"format": "pt", "config": json.dumps(config)}))


def main():
    """Print which networks a file holds, their parameters and types."""
    if len(sys.argv) != 2:
        sys.exit("usage: python checkpoints.py FILE_OR_FOLDER")
    try:
        file = find_model_file(sys.argv[1])
        with open_safetensors(file) as opened:
            slices = {key: opened.get_slice(key) for key in opened.keys()}
            sizes = {key: (torch.Size(s.get_shape()).numel(), s.get_dtype()) for key, s in slices.items()}
    except CheckpointError as problem:
        sys.exit(str(problem))
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB, fingerprint {fingerprint(file)}")
    for name, prefix in PREFIXES.items():
        mine = {key: size for key, size in sizes.items() if key.startswith(prefix)}
        types = ", ".join(f"{kind} {n}" for kind, n in Counter(kind for _, kind in mine.values()).items())
        print(f"  {name:7} {len(mine):5} tensors {sum(n for n, _ in mine.values()) / 1e6:10.3f} M parameters  {types or '-'}")
    other = [key for key in sizes if not key.startswith(tuple(PREFIXES.values()))]
    if other:
        print(f"  {len(other)} tensors of no known network: {', '.join(other[:3])}")


if __name__ == "__main__":
    main()
