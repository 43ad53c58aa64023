"""checkpoints.py: files <-> the networks of this project; the options of all commands.

Read with   the key lists of the released SD3 files; App. B.2 for what a whole model consists of
Not here    the networks; every other layout (convert.py, imported only when such a thing is named)
Format      One model.safetensors has the prefixes of the released single file. Sizes are inferred
            from the tensors; the metadata holds what tensors cannot tell. Tokenizers lie beside it:
            tokenizers/clip/{vocab.json, merges.txt} and tokenizers/t5/spiece.model.
Run         python convert.py info PATH     prints what a checkpoint holds; nothing is unpickled
"""

import contextlib
import functools
import hashlib
import importlib
import json
import math
import os
import re
import zlib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mmdit import MMDiT, MMDiTConfig
from text_encoders import (
    ENCODERS, CLIPConfig, CLIPTextEncoder, CLIPTokenizer, T5Config, T5Encoder, T5Tokenizer,
    TextConfig, TextEncoders)
from vae import VAE, VAEConfig

ROOT = Path(__file__).resolve().parent
SHIPPED = ROOT / "pretrained" / "tiny"
FROZEN = ("vae", *ENCODERS)              # the networks that are not trained together with MM-DiT

# Where each network lies in a released single file.
PREFIXES = {"mmdit": "model.diffusion_model.", "vae": "first_stage_model.",
            "clip_l": "text_encoders.clip_l.transformer.",
            "clip_g": "text_encoders.clip_g.transformer.",
            "t5": "text_encoders.t5xxl.transformer."}
# Released name -> our name, piece by piece. None: the tensor is dropped on purpose.
CLIP_NAMES = {
    "text_model.embeddings.position_ids": None,        # It holds 0, 1, 2, ...; some files carry it.
    "logit_scale": None,                               # the temperature of contrastive training
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
# Where our tokenizers lie; convert.py finds others.
TOKENIZERS = {"clip_l": "clip/merges.txt", "clip_g": "clip/merges.txt", "t5": "t5/spiece.model"}
NAMES = {"mmdit": {}, "vae": {}, "clip_l": CLIP_NAMES, "clip_g": CLIP_NAMES, "t5": T5_NAMES}
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
         "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}

# The fields of a config that tensors cannot tell.
STORED = {"mmdit": ("position_start", "position_step"),
          "vae": ("norm_groups", "vae_scale", "vae_shift")}

# Where one tensor lies, and a checkpoint on the disk. networks: {"mmdit": {our name: Entry}, ...};
# config: what tensors cannot tell; finish: {network: what makes tensors of another layout ours}.
Entry = namedtuple("Entry", "file changed dtype shape start size")
Model = namedtuple("Model", "path networks config finish")


class CheckpointError(ValueError):
    """A file that cannot be used. The message names the file, what is wrong, and the way out."""


def rename(name, table):
    """Translate a name by a table of pieces; a piece that begins with "." may stand anywhere."""
    for piece, other in table.items():
        if name.startswith(piece) or (piece[0] == "." and piece in name):
            if other is None:
                return None
            name = name.replace(piece, other, 1)
    return name


# ---- One network out of a file -------------------------------------------------------------------

def open_weights(file):
    """({key: Entry}, config) of a safetensors file, parsed once for each state of the file."""
    file = Path(file)
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; give a .safetensors file or a model folder")
    about = file.stat()
    try:
        return parse_header(file, about.st_size, about.st_mtime_ns)
    except Exception as problem:           # A stranger's header can be wrong in every way.
        reason = importlib.import_module("convert").describe_unreadable(file, problem)
        raise CheckpointError(reason) from None


@functools.lru_cache(maxsize=32)
def parse_header(file, size, changed):
    """({key: Entry}, config) of a file in the state that `size` and `changed` stand for."""
    with open(file, "rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        if length > 2**24:
            raise ValueError(f"a header of {length} bytes is too long for a model")
        safe_open(file, framework="pt")                # It checks every offset, shape and type.
        header = json.loads(raw.read(length))
    config = json.loads(header.pop("__metadata__", {}).get("config", "{}"))
    check_value("its sampling", config.get("sampling", {}), dict)
    check_value("its words", config.get("words", []), list)
    for part in ("mmdit", "vae", "text"):
        for name, value in config.get(part, {}).items():
            kind = int if part == "text" or name == "norm_groups" else float
            low = -1e6 if name in ("vae_shift", "position_start") else 1e-6
            check_value(f"its {name}", value, kind, low, 1e6)
    entries = {}
    for key, entry in header.items():
        first, last = entry["data_offsets"]
        entries[key] = Entry(file, changed, entry["dtype"], tuple(entry["shape"]),
                             8 + length + first, last - first)
    return entries, config


def networks_in(entries, prefixes=PREFIXES, tables=NAMES):
    """{network: {our name: Entry}} of the networks whose prefix keys begin with."""
    found = {}
    for key, entry in entries.items():
        for network, prefix in prefixes.items():
            if key.startswith(prefix):
                name = rename(key.removeprefix(prefix), tables[network])
                if name is not None:
                    found.setdefault(network, {})[name] = entry
    return found


def read_tensors(entries, dtype, shapes_only):
    """{our name: tensor}. Plain reads: mapped memory costs a page fault for every 4 kB."""
    tensors = {}
    for name, entry in entries.items():
        if entry.dtype not in TYPES:
            raise ValueError(f"{name} is {entry.dtype}, but weights are floating point")
        device = "meta" if shapes_only else "cpu"
        tensor = torch.empty(entry.shape, dtype=TYPES[entry.dtype], device=device)
        if not shapes_only:
            with open(entry.file, "rb") as raw:
                raw.seek(entry.start)
                raw.readinto(tensor.reshape(-1).view(torch.uint8).numpy())
        kind = dtype
        if dtype is None:
            kind = torch.float16 if tensor.dtype.itemsize == 1 else tensor.dtype
        elif tensor.dim() != 2 or "embed" in name:
            kind = torch.float32
        tensors[name] = tensor.to(kind)
    return tensors


def read_network(name, model, dtype=torch.float32, shapes_only=False):
    """One network (a key of PREFIXES) of an opened model, on the CPU, frozen; None if it has none.

    dtype: for the matrices of blocks; embeddings, norms, biases and convolutions stay fp32. None:
    as stored, float8 as fp16. shapes_only: on the meta device, without reading. One strict load:
    CheckpointError for a tensor that is missing, unknown or of a wrong shape.
    """
    if name not in model.networks:
        return None
    file = next(iter(model.networks[name].values())).file
    try:
        tensors = read_tensors(model.networks[name], dtype, shapes_only)
        if name in model.finish:
            tensors = model.finish[name](tensors)
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
        raise CheckpointError(f"{file}: its {name} does not fit: {reason:.400}") from None
    return network.eval().requires_grad_(False)


def count_layers(names, before, after="."):
    """How many different numbers stand between `before` and `after` in the names."""
    pattern = r"(?:^|\n)" + re.escape(before) + r"(\d+)" + re.escape(after)
    return len(set(re.findall(pattern, "\n".join(names))))


def infer_config(name, tensors, stored):
    """(class, config) of a network: sizes from shapes, and from `stored` what they cannot tell."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if name == "mmdit":
        width, channels, patch_size, _ = shapes["x_embedder.proj.weight"]
        depth = count_layers(shapes, "joint_blocks.")
        if width != 64 * depth:
            raise ValueError(f"it has {depth} blocks of width {width}, which must be 64 x depth")
        grid = math.isqrt(shapes["pos_embed"][1])      # released positions: 0, 64 / grid, ...
        positions = {"position_start": 0.0, "position_step": 64 / grid} | stored
        return MMDiT, MMDiTConfig(
            depth, patch_size, channels, shapes["context_embedder.weight"][1],
            shapes["y_embedder.mlp.0.weight"][1], pos_embed_max_size=grid,
            qk_norm="joint_blocks.0.x_block.attn.ln_q.weight" in shapes, **positions,
            dual_attention_layers=count_layers(shapes, "joint_blocks.", ".x_block.attn2."))
    if name == "vae":
        levels = range(count_layers(shapes, "encoder.down."))
        channels = tuple(shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in levels)
        return VAE, VAEConfig(shapes["decoder.conv_in.weight"][1], channels, **stored)
    vocabulary, width = shapes["token_embedding.weight"]
    layers = count_layers(shapes, "layers.")
    if name == "t5":
        buckets, heads = shapes["position_bias.weight"]
        ff_size = shapes["layers.0.feed_forward.gate.weight"][0]
        return T5Encoder, T5Config(vocabulary, width, ff_size, layers, heads, buckets)
    length = shapes["position_embedding.weight"][0]
    activation = "quick_gelu" if name == "clip_l" else "gelu"
    projection = shapes.get("projection.weight", [None])[0]
    return CLIPTextEncoder, CLIPConfig(vocabulary, width, layers, length, activation, projection)


# ---- A whole model -------------------------------------------------------------------------------

def find_path(path):
    """`path` with ~ expanded; a relative one is also looked up beside the code."""
    path = Path(path).expanduser()
    return ROOT / path if not path.exists() and (ROOT / path).exists() else path


def portable(file):
    """A path for a record: relative where it is inside this project, absolute elsewhere."""
    file = Path(file).resolve()
    return file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else str(file)


def find_model_file(path, hub=True):
    """The file of a model or run folder, a diffusers folder, or a file; a hub name is fetched."""
    path = find_path(path)
    for file in (path / "model.safetensors", path):
        if file.is_file():
            return file
    return importlib.import_module("convert").find_foreign(path, hub)


def open_model(path, text_encoders=(), vae=None):
    """The Model at `path`. text_encoders, vae: other files or folders to take these from."""
    file = find_model_file(path)
    if file.is_file() and not text_encoders and not vae:
        entries, config = open_weights(file)
        networks = networks_in(entries)
        run = (file.parent / "config.json").is_file()        # It names its encoders itself.
        prefixes = tuple(PREFIXES.values())
        strange = any("scale" in key or not key.startswith(prefixes) for key in entries)
        if not strange and (run or len(networks) == len(PREFIXES)):
            return Model(file, networks, config, {})
    return importlib.import_module("convert").open_foreign(file, text_encoders, vae)


@functools.cache
def checksum(entry):
    """CRC-32 of every byte of a tensor, as it is stored."""
    crc = 0
    with open(entry.file, "rb") as raw:
        raw.seek(entry.start)
        for left in range(entry.size, 0, -(2**20)):
            crc = zlib.crc32(raw.read(min(left, 2**20)), crc)
    return crc


def fingerprint(path, components=tuple(PREFIXES)):
    """A hash over every byte of these networks, in all the files that `open_model` found, and over
    what the metadata says of VAE and text encoders. Each CPU core reads about 1.5 GB a second."""
    model = open_model(path)
    entries = {}
    for name in set(components) & model.networks.keys():
        for key, entry in model.networks[name].items():
            entries[f"{name}.{key} {entry.dtype} {entry.shape}"] = entry
    with ThreadPoolExecutor() as threads:
        sums = dict(zip(entries, threads.map(checksum, entries.values())))
    about = [model.config.get("vae"), model.config.get("text"), sums]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def run_encoders(folder):
    """(file, tokenizers) of the frozen networks that a run was trained with, as its config.json
    names them and their fingerprint proves; None for a folder that is no run."""
    named = {}
    if (folder / "config.json").is_file():
        named = read_json(folder / "config.json", {"encoders": dict | None}).get("encoders") or {}
    if not {"path", "fingerprint"} <= named.keys():    # somebody else's config.json
        return None
    file = find_model_file(str(named["path"]), hub=False)
    if fingerprint(file, FROZEN) != named["fingerprint"]:
        raise CheckpointError(f"{file} does not hold the encoders that {folder} was trained with: "
                              f"its fingerprint is not {named['fingerprint']}; put them back")
    return file, str(named.get("tokenizers", ""))


def load_tokenizer(name, file, vocab_size):
    """The tokenizer of one encoder, whose table has `vocab_size` rows; T5's table is padded."""
    try:
        if name == "t5":
            tokenizer = T5Tokenizer(file)
        else:
            tokenizer = CLIPTokenizer(file.parent, 0 if name == "clip_g" else None)
        missing = vocab_size - tokenizer.vocab_size
        if missing < 0 or (missing and name != "t5"):
            raise ValueError(f"{name} has {vocab_size} tokens")
    except Exception as problem:                       # `tokenizers` raises nothing more exact.
        raise CheckpointError(f"{file} is no tokenizer for this model ({problem}); give the right "
                              f"folder with --tokenizers") from None
    return tokenizer


def load_text(model, dtype, given, shapes_only):
    """(TextEncoders, {encoder: tokenizer file}) of a model. T5 leaves the range of fp16, so bf16
    takes its place. given: a folder with tokenizers in place of tokenizers/ beside the file."""
    beside = model.path.parent
    places = [find_path(given)] if given else [beside / "tokenizers", model.path, beside]
    encoders, tokenizers, files = {}, {}, {}
    stored = dict(model.config.get("text", {}))
    for name in ENCODERS:
        if name in model.networks:
            files[name] = places[0] / TOKENIZERS[name]
            if not files[name].is_file():
                files[name] = importlib.import_module("convert").find_tokenizer(name, places)
            kind = torch.bfloat16 if name == "t5" and dtype == torch.float16 else dtype
            encoders[name] = read_network(name, model, kind, shapes_only)
            config = encoders[name].config
            stored[f"{name}_width"] = config.hidden_size
            tokenizers[name] = load_tokenizer(name, files[name], config.vocab_size)
    return TextEncoders(encoders, tokenizers, TextConfig(**stored)).eval(), files


@dataclass
class Components:
    """What a prompt needs on its way to a picture; None where it was not asked for."""
    file: Path | None = None                           # where the MM-DiT came from
    sampling: dict = field(default_factory=dict)       # how the model wants to be sampled
    words: tuple[str, ...] = ()                        # what it was trained on; () = unknown
    mmdit: MMDiT | None = None
    vae: VAE | None = None
    text: TextEncoders | None = None
    tokenizers: dict = field(default_factory=dict)     # {encoder: a file of its tokenizer}
    missing: tuple[str, ...] = ()                      # the text encoders that are absent

    @functools.cached_property
    def fingerprint(self):
        return fingerprint(self.file)


def load_components(path=SHIPPED, wanted=("mmdit", "vae", "text"), dtype=torch.float32,
                    tokenizers=None, shapes_only=False, text_encoders=(), vae=None):
    """Components of whatever `open_model` opens. dtype, shapes_only: see `read_network`. A run
    folder holds its MM-DiT only; its config.json names the encoders."""
    model = frozen = open_model(path, text_encoders, vae)
    if {"vae", "text"} & set(wanted) and (named := run_encoders(model.path.parent)):
        frozen = open_model(named[0], text_encoders, vae)
        tokenizers = tokenizers or named[1]
    words = tuple(model.config.get("words", ()))
    parts = Components(model.path, model.config.get("sampling", {}), words)
    for name in wanted:
        source = model if name == "mmdit" else frozen
        if not source.networks.keys() & set(ENCODERS if name == "text" else (name,)):
            raise CheckpointError(
                f"{source.path} holds no {name}, only {', '.join(source.networks)}. Give the "
                f"MM-DiT's file, and the others with --text-encoders and --vae")
        if name == "text":
            parts.text, parts.tokenizers = load_text(source, dtype, tokenizers, shapes_only)
            parts.missing = tuple(sorted(set(ENCODERS) - parts.tokenizers.keys()))
        else:
            setattr(parts, name, read_network(name, source, dtype, shapes_only))
    return parts


# ---- Writing -------------------------------------------------------------------------------------

def write_atomically(file, write):
    """Call write(temporary path in the same folder), then rename: a kill or a full disk leaves the
    old file as it was. Only a regular file is replaced, and the new one keeps its mode."""
    file = Path(file)
    partial = file.with_name(f"{file.name[:40]}.{os.urandom(6).hex()}.partial")
    try:
        if file.is_symlink() or (file.exists() and not file.is_file()):
            raise OSError("it is a link or no regular file")
        partial.touch(exist_ok=False)                  # never through a link
        mode = (file if file.exists() else partial).stat().st_mode
        write(partial)
        partial.chmod(mode)                            # save_file leaves 600 behind.
        partial.replace(file)
    except (OSError, SafetensorError) as problem:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OSError(f"could not write {file} ({problem}); the old file is untouched. Free some "
                      f"space or choose another place.") from None


def stored_config(networks, text=None, sampling=None, words=()):
    """What tensors cannot tell, as JSON for the metadata of a file."""
    config = {"sampling": sampling or {}, "words": sorted(words)}
    for part, names in STORED.items():
        if part in networks:
            config[part] = {name: getattr(networks[part].config, name) for name in names}
    if text is not None:
        config["text"] = vars(text)
    return json.dumps(config)


def released_tensors(name, network, dtype=None):
    """{released name: tensor on the CPU} of one network, in `dtype` or as it is."""
    table = {ours: released for released, ours in NAMES[name].items() if ours is not None}
    tensors = {}
    for key, tensor in network.state_dict().items():
        tensor = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        tensors[rename(key, table)] = tensor
    if name == "t5":                     # Some programs look for this name of its table only.
        tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    return tensors


def save_networks(file, networks, text=None, sampling=None, dtype=None, words=()):
    """Write {"mmdit": MMDiT, "vae": VAE, "clip_l": ..., ...} as one file of the released layout.
    text: the TextConfig. sampling: the settings (fields of sample.Settings) that this model wants.
    words: the words of the captions that it was trained on. dtype None keeps each tensor's type."""
    tensors = {}
    for name, network in networks.items():
        for key, tensor in released_tensors(name, network, dtype).items():
            tensors[PREFIXES[name] + key] = tensor
    metadata = {"format": "pt", "config": stored_config(networks, text, sampling, words)}
    write_atomically(file, lambda partial: save_file(tensors, partial, metadata))


# ---- The options of all commands, JSON files -----------------------------------------------------

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text",
         dict: "an object"}


def option(default, help, low=-1e12, high=1e12, choices=()):
    """A dataclass field with its help text and its range (both ends included) or its choices."""
    return field(default=default, metadata={"help": help, "rule": (low, high, choices)})


def check_value(name, value, kind, low=-1e12, high=1e12, choices=()):
    """ValueError unless `value` is of the type `kind`, finite, in range and among the choices."""
    right = type(value) is kind or (kind is float and type(value) is int)
    rule = KINDS.get(kind, "a list")
    if kind in (int, float):
        right = right and low <= value <= high         # false for nan
        rule += f" from {low:g} to {high:g}"
    if choices:
        right = right and value in choices
        rule = "one of " + ", ".join(choices)
    if not right:
        raise ValueError(f"{name} {value!r:.80} must be {rule}")


def check_options(config):
    """Check every option of a frozen dataclass, in its __post_init__. Lists become tuples."""
    for item in fields(config):
        kind = item.type
        values = [getattr(config, item.name)]
        if hasattr(kind, "__args__") and isinstance(values[0], list | tuple):
            values = tuple(values[0])
            kind = kind.__args__[0]
            object.__setattr__(config, item.name, values)
        for value in values:
            check_value("--" + item.name.replace("_", "-"), value, kind, *item.metadata["rule"])


def add_options(parser, kind):
    """Add a flag for every option of the dataclass `kind`. What is not given is None."""
    for item in fields(kind):
        settings = {"type": os.path.expanduser if item.type is str else item.type}
        if item.type is bool:
            settings = {"type": json.loads, "nargs": "?", "const": True, "metavar": "true|false"}
        elif hasattr(item.type, "__args__"):
            settings = {"type": item.type.__args__[0], "nargs": "*"}
        text = f"{item.metadata['help']} (default: {item.default})".replace("%", "%%")
        if item.metadata["rule"][2]:
            text += " Choices: " + ", ".join(item.metadata["rule"][2])
        flags = ["--" + item.name.replace("_", "-")]
        if item.name == "timestep_shift":
            flags.append("--shift")
        parser.add_argument(*flags, dest=item.name, help=text, **settings)


def given_options(options, kind):
    """{field: value} of the options of `kind` that were given on the command line."""
    given = {}
    for item in fields(kind):
        if getattr(options, item.name) is not None:
            given[item.name] = getattr(options, item.name)
    return given


def read_json(file, kinds=None):
    """The object in a JSON file. kinds: {name: type} is checked; a `type | None` may be absent."""
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as problem:
        raise CheckpointError(f"{file} cannot be read as JSON ({problem}); fetch it anew") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is not a JSON object; fetch it anew")
    for name, kind in (kinds or {}).items():
        if not isinstance(value.get(name), kind):
            raise CheckpointError(f"{file}: {name} is {value.get(name)!r:.80}, but no {kind}")
    return value
