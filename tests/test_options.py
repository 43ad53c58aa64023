"""options.py: options are checked however they are made; a file is written whole or not at all."""

import argparse
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from options import (
    add_options, check_options, given_options, option, read_json, read_options, write_atomically,
    write_json)

# ---- Options -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Example:
    num_steps: int = option(28, "steps of the solver", 1, 1000)
    timestep_shift: float = option(3.0, "100 % of Eq. 23", 0.01, 100)
    solver: str = option("euler", "which one", choices=("euler", "heun"))
    without: tuple[str, ...] = option((), "encoders", choices=("clip_l", "t5"))
    layers: tuple[int, ...] = option((), "blocks", 0)
    compile: bool = option(False, "faster")
    data: str = option("", "a folder")

    def __post_init__(self):
        check_options(self)


def parse(arguments):
    parser = argparse.ArgumentParser()
    add_options(parser, Example)
    return given_options(parser.parse_args(arguments.split()), Example)


def test_options_come_from_the_fields_and_only_what_is_given_is_there(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert parse("") == {}
    assert parse("--num-steps 3 --shift 2 --without t5 clip_l --layers 1 2 --data=~/pics") == {
        "num_steps": 3, "timestep_shift": 2.0, "without": ["t5", "clip_l"], "layers": [1, 2],
        "data": "/home/me/pics"}
    assert parse("--timestep-shift 2 --compile") == {"timestep_shift": 2.0, "compile": True}
    assert parse("--compile false") == {"compile": False}
    assert parse("--compile True") == {"compile": True} != parse("--compile False")


def test_a_switch_that_is_neither_true_nor_false_is_told_what_it_may_be(capsys):
    for wrong in ("yes", "1", "tru"):
        with pytest.raises(SystemExit):
            parse(f"--compile {wrong}")
        assert f"argument --compile: '{wrong}' must be true or false" in capsys.readouterr().err


def test_a_preset_is_chosen_by_its_name_and_gives_way_to_what_is_said():
    presets = {"quick": {"num_steps": 4, "layers": (2,)}, "full": {"num_steps": 50}}
    assert read_options(Example, "", [], **presets) == Example()
    assert read_options(Example, "", ["--full"], **presets) == Example(num_steps=50)
    both = read_options(Example, "", ["--quick", "--num-steps", "9"], **presets)
    assert both == Example(num_steps=9, layers=(2,))
    for wrong in ("--num-steps=0", "--num_steps=3", "--num=3"):          # the range; other names
        with pytest.raises((ValueError, SystemExit)):
            read_options(Example, "", [wrong], **presets)


def test_the_help_names_the_default_and_the_choices(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    printed = " ".join(capsys.readouterr().out.split())
    assert "100 % of Eq. 23" in printed and "default: 28" in printed and "{euler,heun}" in printed


@pytest.mark.parametrize("name, values", {
    "num_steps": (0, 1001, 2.0, True, "3", None, (3,), [3], 10**400),
    "timestep_shift": (0, -1.0, float("nan"), float("inf"), 1e39, 10**400, "1", [1.0]),
    "solver": ("rk4", 1, None, ["euler"]), "without": ("t5", ("t6",), [1], {"t5": 1}),
    "layers": (3, (-1,), [1.5], "12"), "compile": (1, "true", None), "data": (3, None, ["x"]),
}.items())
def test_a_value_of_a_wrong_type_or_out_of_range_is_refused_by_its_flag(name, values):
    flag = "--" + name.replace("_", "-")
    for value in values:
        with pytest.raises(ValueError, match=f"^{flag} .* must be "):
            Example(**{name: value})
    assert Example(layers=[1, 2]).layers == (1, 2)           # JSON has no tuples
    assert Example(num_steps=1, timestep_shift=100).num_steps == 1     # the ends of both ranges


def test_json_files_are_read_with_the_types_of_their_fields(tmp_path):
    file = tmp_path / "config.json"
    kinds = {"step": int, "name": str}
    for text, named in (("{", "cannot be read"), ("[1]", "not a JSON object"), ("{}", "step"),
                        ('{"step": "3"}', "step '3' must be a whole number"),
                        ('{"step": 3}', "name None"), ('{"step": 3, "name": 4}', "name 4 must be"),
                        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "cannot be read")):
        file.write_text(text)
        with pytest.raises(ValueError, match=f"config.json.*{named}"):
            read_json(file, kinds)
    file.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="config.json cannot be read"):
        read_json(file)
    with pytest.raises(ValueError, match="nowhere.json cannot be read"):
        read_json(tmp_path / "nowhere.json")
    file.write_bytes(b'\xef\xbb\xbf{"step": 3}')             # a byte order mark
    assert read_json(file) == {"step": 3}
    write_json(tmp_path / "new" / "config.json", {"step": 4, "name": "ä"})
    assert read_json(tmp_path / "new" / "config.json", kinds) == {"step": 4, "name": "ä"}


# ---- Files ---------------------------------------------------------------------------------------

def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    file.write_text("old")

    def disk_full(partial):
        partial.write_text("half of the new")
        raise OSError("No space left on device")
    with pytest.raises(OSError, match="could not write .*model.safetensors.*No space.*untouched"):
        write_atomically(file, disk_full)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]

    def interrupted(partial):
        partial.write_text("half of the new")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, interrupted)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]

    def fail(path, missing_ok=False):
        raise PermissionError("no permission to unlink")
    monkeypatch.setattr(Path, "unlink", fail)
    with pytest.raises(OSError, match="No space"):           # its own sentence survives
        write_atomically(file, disk_full)


def test_a_writer_writes_beside_the_file_until_it_is_whole_and_keeps_its_mode(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_text("old")
    file.chmod(0o600)

    def write(partial):
        partial.write_text("new")
        assert partial.parent == tmp_path and partial != file and file.read_text() == "old"
    write_atomically(file, write)
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    write_atomically(tmp_path / "fresh", lambda partial: save_file({"x": torch.ones(1)}, partial))
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "fresh").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_links_and_devices_are_not_replaced_and_links_in_the_way_are_not_followed(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "link").symlink_to("target")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo"):
        with pytest.raises(OSError, match=f"could not write .*{name}.*link or no regular file"):
            write_atomically(tmp_path / name, lambda partial: partial.write_text("new"))
    (tmp_path / "new.partial").symlink_to("target")          # the old temporary name
    write_atomically(tmp_path / "new", lambda partial: partial.write_text("new"))
    assert (tmp_path / "target").read_text() == "precious"
    assert (tmp_path / "link").is_symlink() and (tmp_path / "fifo").is_fifo()


def test_a_name_that_is_too_long_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(OSError, match="could not write"):
        write_atomically(tmp_path / ("ä" * 200), lambda partial: partial.write_text("new"))
