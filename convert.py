"""convert.py: a first stub; the whole follows."""
from pathlib import Path

from checkpoints import CheckpointError


def describe_unreadable(file, problem):
    return f"{file} is not a whole safetensors file ({problem}); it was probably cut off"


def find_foreign(path, hub):
    raise CheckpointError(f"{path}: no such file or folder. Give a run folder, a model folder or a .safetensors file.")


def complete(model, ours, text_encoders, vae):
    """Separate text encoders and other layouts follow."""
