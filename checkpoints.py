"""checkpoints.py: one file format, that of the released SD3, <-> the networks of this project.

Read with   the key lists of the released SD3 files; App. B.2 for what a whole model consists of
Not here    the networks; every other layout (convert.py, imported only when such a thing is named)
Format      One model.safetensors has the prefixes of the released single file. Sizes are inferred
            from the tensors; the metadata holds what tensors cannot tell. Tokenizers lie beside it:
            tokenizers/clip/{vocab.json, merges.txt} and tokenizers/t5/spiece.model.
"""

import hashlib
import importlib
import json
import math
import re
import zlib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mmdit import MMDiT, MMDiTConfig
from options import check_value, note_once, read_json, write_atomically
from text_encoders import (
    ENCODERS, CLIPConfig, CLIPTextEncoder, T5Config, T5Encoder, TextConfig, TextEncoders,
    read_tokenizer)
from vae import VAE, VAEConfig

ROOT = Path(__file__).resolve().parent
SHIPPED = ROOT / "pretrained" / "tiny"
FROZEN = ("vae", *ENCODERS)              # the networks that are not trained together with MM-DiT

# Where each network lies in a released single file.
PREFIXES = {"mmdit": "model.diffusion_model.", "vae": "first_stage_model.",
            "clip_l": "text_encoders.clip_l.transformer.",
            "clip_g": "text_encoders.clip_g.transformer.",
            "t5": "text_encoders.t5xxl.transformer."}
# Released name -> our name, piece by piece.
CLIP_NAMES = {
    "text_model.embeddings.token_": "token_", "text_model.embeddings.position_": "position_",
    "text_model.encoder.layers.": "layers.", "text_model.final_layer_norm.": "final_norm.",
    ".self_attn.q_proj.": ".q.", ".self_attn.k_proj.": ".k.", ".self_attn.v_proj.": ".v.",
    ".self_attn.out_proj.": ".out.", ".mlp.fc": ".fc", ".layer_norm": ".norm",
    "text_projection.": "projection.",
}
T5_NAMES = {
    "encoder.embed_tokens.": "token_embedding.",       # a second copy; files have one or both
    "shared.": "token_embedding.",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.": "position_bias.",
    "encoder.final_layer_norm.": "final_norm.", "encoder.block.": "layers.",
    ".layer.0.SelfAttention.o.": ".attention.out.", ".layer.0.SelfAttention.": ".attention.",
    ".layer.0.layer_norm.": ".norm1.", ".layer.1.layer_norm.": ".norm2.",
    ".layer.1.DenseReluDense.wi_0.": ".feed_forward.gate.",
    ".layer.1.DenseReluDense.wi_1.": ".feed_forward.up.",
    ".layer.1.DenseReluDense.wo.": ".feed_forward.down.",
}
NAMES = {"mmdit": {}, "vae": {}, "clip_l": CLIP_NAMES, "clip_g": CLIP_NAMES, "t5": T5_NAMES}
# Dropped on purpose: positions 0, 1, ...; CLIP's temperature; extra keys of scaled float8 and T5.
UNUSED = ("position_ids", "logit_scale", "scaled_fp8", "scale_input", "input_scale", "comfy_quant",
          "spiece_model")
# What tensors cannot tell: fields of configs, the type and the lowest value of each.
STORED = {"mmdit": {"position_start": (float, -1e6), "position_step": (float, 1e-6)},
          "vae": {"norm_groups": (int, 1), "vae_scale": (float, 1e-6), "vae_shift": (float, -1e6)},
          "text": dict.fromkeys(vars(TextConfig()), (int, 1))}
# Folders of tokenizers: ours, then that of diffusers.
HOMES = {"clip_l": ("clip", "tokenizer"), "clip_g": ("clip", "tokenizer_2"),
         "t5": ("t5", "tokenizer_3")}

# A checkpoint on the disk. networks: {"mmdit": {our name: tensor}, ...}; config: its metadata;
# finish: a function that makes the tensors of another layout ours, or None.
Model = namedtuple("Model", "path networks config finish")


def rename(name, table):
    """Translate a name piece by piece; "." begins a piece that may stand anywhere, None drops."""
    for piece, other in table.items():
        if name.startswith(piece) or (piece[0] == "." and piece in name):
            if other is None:
                return None
            name = name.replace(piece, other, 1)
    return name


# ---- One network out of a file -------------------------------------------------------------------
def open_weights(file):
    """({key: tensor}, config) of a safetensors file. The tensors are mapped: read when used."""
    try:
        with open(file, "rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
        if length > 2**24:
            raise ValueError(f"a header of {length} bytes is too long for a model")
        opened = safe_open(file, framework="pt")       # It checks every offset, shape and type.
        config = json.loads((opened.metadata() or {}).get("config", "{}"))
        check_value("its sampling", config.get("sampling", {}), dict)
        for name in ("words", "sizes"):
            check_value(f"its {name}", config.get(name, []), list)
            for word in config.get(name, []):
                check_value(f"its {name}", word, str)
        for part, rules in STORED.items():
            for name, value in config.get(part, {}).items():
                check_value(f"its {name}", value, *rules[name], 1e6)
        tensors = {}
        for key in opened.keys():
            tensors[key] = opened.get_tensor(key)
        return tensors, config
    except Exception as problem:           # A stranger's header can be wrong in every way.
        reason = importlib.import_module("convert").describe_unreadable(Path(file), problem)
        raise ValueError(reason) from None


def networks_in(file, tensors):
    """{network: {our name: tensor}} of a file, whose every key must be known."""
    found = {}
    for key, tensor in tensors.items():
        if key.endswith(UNUSED):
            continue
        if not key.startswith(tuple(PREFIXES.values())):
            raise ValueError(f"{file} has a {key}, of no known network; give an SD3 or SD3.5 file")
        for network, prefix in PREFIXES.items():
            if key.startswith(prefix):
                name = rename(key.removeprefix(prefix), NAMES[network])
                first = found.setdefault(network, {}).setdefault(name, tensor)
        if first is not tensor:                        # T5's table has two names.
            first = first.reshape(-1).view(torch.uint8)                # (N,) bytes in the file
            if not torch.equal(first, tensor.reshape(-1).view(torch.uint8)):
                raise ValueError(f"{file}: {key} and its second copy differ; fetch the file anew")
    return found


def read_network(name, model, dtype=torch.float32):
    """One network (a key of PREFIXES) of an opened model, on the CPU, frozen, by one strict load.
    dtype: for the matrices of blocks; embeddings, norms, biases and convolutions are fp32."""
    if name not in model.networks:
        raise ValueError(f"{model.path} holds no {name}, only {', '.join(model.networks)}. Give "
                         f"what is missing with --text-encoders and --vae")
    try:
        tensors = read_tensors(model.networks[name], dtype)
        if model.finish:
            tensors = model.finish(tensors)
        if name == "clip_l":             # SD3 does not project it; some files carry an identity.
            tensors.pop("projection.weight", None)
        kind, config = infer_config(name, tensors, model.config.get(name, {}))
        with torch.device("meta"):
            network = kind(config)
        network.load_state_dict(tensors, strict=True, assign=True)
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as problem:
        reason = " ".join(str(problem).split())
        if isinstance(problem, KeyError):
            reason = f"it lacks {reason}"
        raise ValueError(f"{model.path}: its {name} does not fit: {reason:.400}") from None
    return network.eval().requires_grad_(False)


def read_tensors(tensors, dtype):
    """Copies of mapped tensors in the types that `read_network` promises; float8 by its scales."""
    copies = {}
    for name, tensor in tensors.items():
        if name.endswith(".scale_weight"):
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, but weights are floating point")
        scale = tensors.get(name.removesuffix("weight") + "scale_weight")
        if scale is not None:
            tensor = tensor.float() * scale.float()
        if tensor.dim() == 2 and "embed" not in name:
            copies[name] = tensor.to(dtype, copy=True)
        else:
            copies[name] = tensor.to(torch.float32, copy=True)
    return copies


def count_layers(names, before, after="."):
    """How many different numbers stand between `before` and `after` in the names."""
    pattern = r"(?:^|\n)" + re.escape(before) + r"(\d+)" + re.escape(after)
    return len(set(re.findall(pattern, "\n".join(names))))


def infer_config(name, tensors, stored):
    """(class, config) of a network: sizes from tensors, and from `stored` what they cannot tell."""
    if name == "mmdit":
        _, channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
        grid = math.isqrt(tensors["pos_embed"].shape[1])
        positions = {"position_start": 0.0, "position_step": 64 / grid}          # as released
        return MMDiT, MMDiTConfig(
            depth=count_layers(tensors, "joint_blocks."),
            patch_size=patch_size, latent_channels=channels, pos_embed_max_size=grid,
            context_dim=tensors["context_embedder.weight"].shape[1],
            pooled_dim=tensors["y_embedder.mlp.0.weight"].shape[1],
            qk_norm="joint_blocks.0.x_block.attn.ln_q.weight" in tensors,
            dual_attention_layers=count_layers(tensors, "joint_blocks.", ".x_block.attn2."),
            **positions | stored)
    if name == "vae":
        channels = []
        for i in range(count_layers(tensors, "encoder.down.")):
            channels.append(len(tensors[f"encoder.down.{i}.block.0.conv1.weight"]))
        latent_channels = tensors["decoder.conv_in.weight"].shape[1]
        return VAE, VAEConfig(latent_channels, tuple(channels), **stored)
    vocabulary, width = tensors["token_embedding.weight"].shape
    layers = count_layers(tensors, "layers.")
    if name == "t5":
        buckets, heads = tensors["position_bias.weight"].shape
        ff_size = len(tensors["layers.0.feed_forward.gate.weight"])
        return T5Encoder, T5Config(vocabulary, width, ff_size, layers, heads, buckets)
    length = len(tensors["position_embedding.weight"])
    if name == "clip_l":
        return CLIPTextEncoder, CLIPConfig(vocabulary, width, layers, length, "quick_gelu")
    projection = len(tensors["projection.weight"])
    return CLIPTextEncoder, CLIPConfig(vocabulary, width, layers, length, "gelu", projection)


# ---- A whole model -------------------------------------------------------------------------------
def portable(file):
    """A path for a record: relative where it is inside this project, absolute elsewhere."""
    file = Path(file).resolve()
    if file.is_relative_to(ROOT):
        return file.relative_to(ROOT).as_posix()
    return str(file)


def find_model_file(path, hub=True):
    """The file of a model or run folder, a diffusers folder, or a file; a hub name is fetched. A
    relative path that does not exist here is looked up beside the code."""
    path = Path(path).expanduser()
    place = path if path.exists() else ROOT / path
    for file in (place / "model.safetensors", place):
        if file.is_file():
            return file
    return importlib.import_module("convert").find_foreign(path, hub)


def open_model(path, text_encoders=(), vae=None):
    """The Model at `path`. text_encoders, vae: other files to take these from."""
    file = find_model_file(path)
    if file.is_file() and not text_encoders and not vae:
        tensors, config = open_weights(file)
        try:
            networks = networks_in(file, tensors)
        except ValueError:                             # convert.py knows it, or refuses it by name.
            networks = {}
        run = (file.parent / "config.json").is_file()        # It names its encoders itself.
        if networks and (run or len(networks) == len(PREFIXES)):
            return Model(file, networks, config, None)
    return importlib.import_module("convert").open_foreign(file, text_encoders, vae)


def fingerprint(path, components=tuple(PREFIXES), **files):
    """A hash over every byte of these networks, in all that `open_model` finds with these `files`,
    and over what the metadata says of VAE and text encoders. A CPU core reads about 1.5 GB/s."""
    model = open_model(path, **files)
    content = {}
    for name in set(components) & model.networks.keys():
        for key, tensor in model.networks[name].items():
            kind = str(tensor.dtype).removeprefix("torch.").replace("loat", "").upper()   # "BF16"
            label = f"{name}.{key} {kind} {tuple(tensor.shape)}"
            content[label] = tensor.reshape(-1).view(torch.uint8).numpy()
    with ThreadPoolExecutor() as threads:
        sums = dict(zip(content, threads.map(zlib.crc32, content.values())))
    about = [model.config.get("vae"), model.config.get("text"), sums]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def run_encoders(folder):
    """The file of the frozen networks that a run was trained with, as its config.json names it and
    its fingerprint proves; None for a folder that is no run."""
    config = folder / "config.json"
    named = read_json(config).get("encoders", {}) if config.is_file() else {}
    check_value(f"{config}: encoders", named, dict)
    if not {"path", "fingerprint"} <= named.keys():    # somebody else's config.json
        return None
    file = find_model_file(str(named["path"]), hub=False)
    if fingerprint(file, FROZEN) != named["fingerprint"]:
        raise ValueError(f"{file} does not hold the encoders that {folder} was trained with: its "
                         f"fingerprint is not {named['fingerprint']}; put them back")
    return file


def load_text(model, dtype, given):
    """(TextEncoders, {encoder: tokenizer file}) of a model. T5 overflows fp16, so it is bf16
    then. given: a folder with tokenizers in place of tokenizers/ beside the file."""
    beside = model.path.parent
    places = [beside / "tokenizers", model.path, beside]
    if given:
        places = [Path(given)]
    encoders, tokenizers, files = {}, {}, {}
    config = dict(model.config.get("text", {}))
    present = sorted(model.networks.keys() & set(ENCODERS), key=ENCODERS.index)
    for name in present or ENCODERS:                   # Without any, the first one raises.
        kind = dtype
        if name == "t5" and dtype == torch.float16:
            kind = torch.bfloat16
        encoders[name] = read_network(name, model, kind)
        sizes = encoders[name].config
        config[f"{name}_width"] = sizes.hidden_size
        files[name] = find_tokenizer(name, places)
        tokenizers[name] = read_tokenizer(name, files[name], sizes.vocab_size)
    return TextEncoders(encoders, tokenizers, TextConfig(**config)).eval(), files


def find_tokenizer(name, places):
    """A file of this encoder's tokenizer in the first of `places` that has one."""
    for place in places:
        for home in HOMES[name]:
            for kind in ("merges.txt", "spiece.model", "tokenizer.json"):
                if (place / home / kind).is_file():
                    return place / home / kind
    raise ValueError(f"{places[0]}: no tokenizers there for {name}; give their folder, which has "
                     f"clip/merges.txt and t5/spiece.model, with --tokenizers")


@dataclass
class Components:
    """What a prompt needs on its way to a picture; None where it was not asked for."""
    file: Path                                         # where the MM-DiT came from
    sampling: dict                                     # how the model wants to be sampled
    words: tuple[str, ...]                             # what it was trained on; () = unknown
    sizes: tuple[str, ...]                             # the same, "64x96", of its pictures (px)
    mmdit: MMDiT | None = None
    vae: VAE | None = None
    text: TextEncoders | None = None
    tokenizers: dict = field(default_factory=dict)     # {encoder: a file of its tokenizer}
    missing: tuple[str, ...] = ()                      # the text encoders that are absent


def released_sampling(model, path):
    """Stability's settings for SD3.5: of the model card for large, else of sd3_infer.py. Only the
    name of a file tells a turbo."""
    names = model.networks.get("mmdit", {})
    depth = count_layers(names, "joint_blocks.")
    if depth == 24 and count_layers(names, "joint_blocks.", ".x_block.attn2."):      # medium
        return {"num_steps": 50, "guidance_scale": 4.0, "skip_layers": (7, 8, 9)}
    if depth != 38:                                                                  # not large
        return {}
    if "turbo" in Path(path).name.lower():
        return {"num_steps": 4, "guidance_scale": 1.0}
    return {"guidance_scale": 3.5}


def load_components(path=SHIPPED, wanted=("mmdit", "vae", "text"), dtype=torch.float32,
                    tokenizers=None, text_encoders=(), vae=None):
    """Components of whatever `open_model` opens. dtype: see `read_network`. A run folder holds its
    MM-DiT only; its config.json names the encoders."""
    model = open_model(path, text_encoders, vae)
    sampling = released_sampling(model, path) | model.config.get("sampling", {})
    words = tuple(model.config.get("words", ()))
    sizes = tuple(model.config.get("sizes", ()))
    parts = Components(model.path, sampling, words, sizes)
    if "mmdit" in wanted:
        parts.mmdit = read_network("mmdit", model, dtype)
    if "vae" in wanted or "text" in wanted:
        encoders = run_encoders(model.path.parent)
        if encoders is not None:
            model = open_model(encoders, text_encoders, vae)
    if "vae" in wanted:
        parts.vae = read_network("vae", model, dtype)
    if "text" in wanted:
        parts.text, parts.tokenizers = load_text(model, dtype, tokenizers)
        parts.missing = tuple(sorted(set(ENCODERS) - parts.tokenizers.keys()))
        if parts.missing:
            note_once(f"{model.path} has no {', '.join(parts.missing)}: zeros take the place, and "
                      f"pictures follow texts less well (Sec. 5.3.3). Put the missing files beside "
                      f"it, or name them with --text-encoders")
    return parts


# ---- Writing -------------------------------------------------------------------------------------
def make_metadata(networks, text=None, sampling=None, words=(), sizes=()):
    """What tensors cannot tell, for the header of a file."""
    config = {"sampling": sampling or {}, "words": sorted(words), "sizes": sorted(sizes)}
    for part, rules in STORED.items():
        if part in networks:
            config[part] = {name: getattr(networks[part].config, name) for name in rules}
    if text is not None:
        config["text"] = vars(text)
    return {"format": "pt", "config": json.dumps(config)}


def released_tensors(name, network, dtype=None):
    """{released name: tensor on the CPU} of one network, in `dtype` or as it is."""
    table = {ours: released for released, ours in NAMES[name].items()}
    tensors = {}
    for key, tensor in network.state_dict().items():
        tensor = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        tensors[rename(key, table)] = tensor
    if name == "t5":                     # Some programs look for this name of its table only.
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    return tensors


def save_networks(file, networks, text=None, sampling=None, dtype=None, words=(), sizes=()):
    """Write {"mmdit": MMDiT, "vae": VAE, "clip_l": ..., ...} as one file of the released layout.
    text: the TextConfig. sampling: the settings (fields of sample.Settings) that this model wants.
    words, sizes: those of the captions and pictures that it was trained on, ("64x96", ...) in px.
    dtype None keeps each tensor's type."""
    tensors = {}
    for name, network in networks.items():
        for key, tensor in released_tensors(name, network, dtype).items():
            tensors[PREFIXES[name] + key] = tensor
    save_tensors(file, tensors, make_metadata(networks, text, sampling, words, sizes))


def save_tensors(file, tensors, metadata):
    """Write {name: tensor} as a safetensors file."""
    write_atomically(file, lambda partial: save_file(tensors, partial, metadata))
