"""Pre-encoded shards (App. E.1): what is stored, what is made again, and by how many processes."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import encode
from checkpoints import SHIPPED, load_components, save_networks
from data import EncodedFolder, ImageFiles, aspect_buckets, from_tensor, nearest_bucket, to_tensor
from encode import EncodeConfig, encode_folder, encode_shard, encoded
from scenes import HELD_OUT_SEED, Scenes
from text_encoders import TextConfig
from vae import VAE, VAEConfig

ROOT = Path(__file__).parents[1]
THREADS = str(torch.get_num_threads())          # The last bit depends on it, and on nothing else.
SMALL = ("--resolution", "32", "--shard-size", "64", "--device", "cpu", "--precision", "fp32")
CONFIG = {"data": "", "out": "runs/one", "encoders": str(SHIPPED), "resolution": 32, "seed": 0,
          "precision": "fp32", "buckets": False}


class OneProcess:
    """devices.World without torchrun."""
    rank, size, device, workers = 0, 1, torch.device("cpu"), 0

    def same(self, value):
        return value

    def gather(self, value):
        return [value]


WORLD = OneProcess()


def make(out, source=None, resolution=32, **options):
    """encode_folder in this process."""
    options = {"shard_size": 64, "precision": "fp32"} | options
    return encode_folder(source or Scenes(130), out, SHIPPED, resolution, WORLD, **options)


def start(*arguments, launcher=()):
    """encode.py as a command."""
    command = [sys.executable, *launcher, "encode.py", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": THREADS},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def contents(folder):
    files = sorted(Path(folder).glob("shard-*.safetensors"))
    return {file.name: file.read_bytes() for file in files}


def stamps(folder):
    return {file.name: file.stat().st_mtime_ns for file in Path(folder).glob("shard-*.safetensors")}


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    """130 scenes of 32 px in three shards."""
    folder = tmp_path_factory.mktemp("square")
    make(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same scenes as pictures with metadata.jsonl."""
    return write_pictures(tmp_path_factory.mktemp("files"), 130, [(32, 32)])


@pytest.fixture(scope="module")
def expected(files, tmp_path_factory):
    """Their shards, made by one process that nothing disturbs."""
    folder = tmp_path_factory.mktemp("expected")
    make(folder, ImageFiles(files))
    return folder


@pytest.fixture(scope="module")
def parts():
    return load_components(SHIPPED, ("vae", "text"))


def write_pictures(folder, count, sizes):
    """Scenes as pictures of these sizes by turns, with their captions in metadata.jsonl."""
    lines = []
    for i in range(count):
        Image.fromarray(Scenes(count).image(i, *sizes[i % len(sizes)])).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "captions": Scenes(count).captions(i)}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def pictures(tmp_path):
    """Twelve pictures of three shapes in a folder with metadata.jsonl."""
    (tmp_path / "pictures").mkdir()
    return write_pictures(tmp_path / "pictures", 12, [(40, 40), (40, 90), (90, 40)])


def captions_of(file):
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["shard"])["captions"]


# ---- What is stored ------------------------------------------------------------------------------


class FakeVAE:
    """Takes no time. `groups` has the number of pictures of every call."""
    config = VAEConfig()

    def __init__(self):
        self.groups = []

    def encode_moments(self, image):
        self.groups.append(len(image))
        zeros = torch.zeros(len(image), 16, image.shape[2] // 8, image.shape[3] // 8)
        return zeros, zeros


class FakeText:
    """SD3's sizes: context (n, 77 + 77, 4096), pooled (n, 768 + 1280)."""
    config = TextConfig()

    def __call__(self, captions):
        return torch.zeros(len(captions), 154, 4096), torch.zeros(len(captions), 2048)


def encode_blank(count, side):
    """What is stored for `count` black pictures with one caption, and how they were grouped."""
    vae, image = FakeVAE(), np.zeros((side, side, 3), np.uint8)
    samples = iter([(image, ("a circle",))] * count)
    tensors, about = encode_shard(samples, side, side, vae, FakeText(), WORLD.device,
                                  torch.float32)
    return tensors, about["captions"], vae.groups


def test_storage_is_that_of_table_7():
    """65.5, 121.3, 202.2 and 630.7 kB a sample, for SD3's encoders at 256 px."""
    tensors, _, _ = encode_blank(1, 256)
    size = {name: tensor.nbytes / 1000 for name, tensor in tensors.items()}
    assert size["moments"] == pytest.approx(65.5, abs=0.1)
    assert size["clip_l"] + size["pooled_l"] == pytest.approx(121.3, abs=0.1)
    assert size["clip_g"] + size["pooled_g"] == pytest.approx(202.2, abs=0.1)
    assert size["t5"] == pytest.approx(630.7, abs=0.1)


def test_a_shard_takes_no_more_than_its_numbers_and_equal_captions_once(square):
    for line in json.loads((square / "index.json").read_text())["shards"]:
        tensors = load_file(square / line["file"])
        captions = captions_of(square / line["file"])
        payload = sum(tensor.nbytes for tensor in tensors.values())
        in_all = (square / line["file"]).stat().st_size
        assert payload < in_all < payload + 150 * len(captions) + 5000
        assert tensors["moments"].shape == (line["count"], 32, 4, 4)
        assert tensors["moments"].dtype == tensors["t5"].dtype == torch.float16
        assert len(captions) == len(tensors["t5"]) == len(set(captions))
        assert len(tensors["caption_row"]) == 2 * line["count"]       # two captions for each


def test_stored_latents_are_the_pictures_and_stored_texts_their_captions(square, parts):
    folder = EncodedFolder(square)
    for index in (0, 63, 64, 129):
        assert folder.captions(index) == Scenes(130).captions(index)
        arrays = folder.read([index], [folder.caption_rows(index)[1]])
        mean = arrays["moments"].float().chunk(2, dim=1)[0]
        with torch.no_grad():
            latent = (mean - parts.vae.config.vae_shift) * parts.vae.config.vae_scale
            image = from_tensor(parts.vae.decode(latent)[0])
            context, pooled = parts.text([Scenes(130).captions(index)[1]])
        picture = to_tensor(Scenes(130).image(index, 32, 32))
        assert (to_tensor(image) - picture).square().mean() < 0.1    # The VAE never saw 32 px.
        L = parts.text.config.clip_length
        stored = arrays["t5"].float()
        torch.testing.assert_close(stored, context[:, L:], atol=4e-3, rtol=2e-3)
        torch.testing.assert_close(arrays["pooled_l"],
                                   pooled[:, : arrays["pooled_l"].shape[1]], atol=1e-4, rtol=1e-4)


def test_half_precision_changes_the_numbers_by_less_than_two_per_cent(square, tmp_path):
    rough, exact = make(tmp_path, Scenes(70), precision="bf16"), EncodedFolder(square)
    rough, exact = (folder.read([0, 69], [0, 0]) for folder in (rough, exact))
    for name, tensor in exact.items():
        error = (rough[name].float() - tensor.float()).norm() / tensor.float().norm()
        assert 0 < error < 0.02 and rough[name].dtype == tensor.dtype, name


@pytest.mark.parametrize("side, together", [(64, 64), (256, 64), (512, 16), (1024, 4)])
def test_large_pictures_are_encoded_in_smaller_groups(side, together):
    """Equal pixels at a time: 64 of 1024 x 1024 px would need tens of gigabytes."""
    tensors, captions, groups = encode_blank(together + 1, side)
    assert groups == [together, 1] and len(tensors["moments"]) == together + 1
    assert captions == ["a circle"] and len(tensors["t5"]) == 1       # Equal ones are stored once.


def test_every_shard_has_one_size_and_every_picture_the_nearest(tmp_path):
    folder = make(tmp_path, Scenes(40), 64, buckets=aspect_buckets(64))
    wanted, found = [], []
    for index in range(40):
        wanted.append(nearest_bucket(*Scenes(40).picture_size(index), aspect_buckets(64)))
    for line in folder.index["shards"]:
        size = line["height"], line["width"]
        found += [size] * line["count"]
        moments = load_file(tmp_path / line["file"])["moments"]
        assert moments.shape[2:] == (line["height"] // 8, line["width"] // 8)
    assert sorted(found) == sorted(wanted) and len(set(wanted)) == len(folder.groups) == 3
    assert folder.longest_side == 80 and len(folder) == 40


def test_sizes_are_read_once_and_again_for_a_picture_that_has_changed(pictures, tmp_path):
    """Planning buckets opens every picture; sizes.json spares that from the second start on."""
    class Counting(ImageFiles):
        def picture_size(self, index):
            opened.append(self.records[index].name)
            return super().picture_size(index)

    opened = []
    first = make(tmp_path / "out", Counting(pictures), 64, buckets=aspect_buckets(64))
    assert sorted(opened) == sorted(f"{i}.png" for i in range(12)) and len(first.groups) == 3
    opened.clear()
    second = make(tmp_path / "out", Counting(pictures), 64, buckets=aspect_buckets(64))
    assert opened == [] and second.index == first.index
    Image.new("RGB", (90, 40)).save(pictures / "0.png")               # It was 40 x 40 px.
    third = make(tmp_path / "out", Counting(pictures), 64, buckets=aspect_buckets(64))
    assert opened == ["0.png"]
    assert sum(len(group) for group in third.groups) == 12
    counts = Counter((line["height"], line["width"]) for line in third.index["shards"]
                     for _ in range(line["count"]))
    assert sorted(counts.values()) == [3, 4, 5]
    for content in ("", "[]", '{"a": 5}'):
        (tmp_path / "out" / "sizes.json").write_text(content)         # damaged
        opened.clear()
        again = make(tmp_path / "out", Counting(pictures), 64, buckets=aspect_buckets(64))
        assert again.index == third.index
        assert len(opened) == 12


# ---- Many processes, kills ----------------------------------------------------------------------


def test_two_processes_write_the_shards_of_one_and_the_bar_counts_pictures(
        files, expected, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29583")
    process = start(*SMALL, "--data", files, "--out", tmp_path / "two", launcher=launcher)
    said, noted = process.communicate()
    assert process.returncode == 0, noted
    assert contents(tmp_path / "two") == contents(expected)
    assert EncodedFolder(tmp_path / "two").index == EncodedFolder(expected).index
    assert "/66 [" in noted and "130 pictures" in said                # rank 0's: 64 + 2


def kill_and_go_on(files, expected, folder, wait):
    """SIGKILL after `wait`. The second start keeps the shards that are there: whole ones, which
    the first start wrote. In the end, all bytes are those of a start that nothing disturbed."""
    process = start(*SMALL, "--data", files, "--out", folder)
    wait(process)
    process.kill()
    process.communicate()
    before = stamps(folder)
    for name in before:
        load_file(folder / name)
    make(folder, ImageFiles(files))
    assert contents(folder) == contents(expected)
    assert before.items() <= stamps(folder).items()
    return before


def test_after_a_kill_only_the_missing_shards_are_made(files, expected, tmp_path):
    def wait(process):
        while process.poll() is None and not contents(tmp_path / "killed"):
            time.sleep(0.002)

    assert kill_and_go_on(files, expected, tmp_path / "killed", wait)


@pytest.mark.slow
def test_twenty_kills_at_any_instant_leave_equal_bytes(files, expected, tmp_path):
    rng = np.random.default_rng(0)

    def wait(_):
        time.sleep(rng.uniform(2, 12))

    for number in range(20):
        kill_and_go_on(files, expected, tmp_path / str(number), wait)


# ---- What is made again, what is kept ------------------------------------------------------------


def test_a_second_start_writes_nothing_and_a_replaced_picture_is_encoded_again(
        pictures, tmp_path):
    """The shard with the old picture stays, as a training may be reading it; nothing lists it."""
    out, picture = tmp_path / "out", pictures / "5.png"
    size = Image.open(picture).size[::-1]
    picture.write_bytes(picture.read_bytes().ljust(4000, b"\0"))
    folder = make(out, ImageFiles(pictures), shard_size=4)
    before = [folder.read([i], [0])["moments"] for i in (4, 5)]
    first, old = stamps(out), contents(out)
    make(out, ImageFiles(pictures), shard_size=4)
    assert stamps(out) == first
    Image.fromarray(Scenes(12, seed=9).image(5, *size)).save(picture)
    picture.write_bytes(picture.read_bytes().ljust(4000, b"\0"))      # a file of the same size
    after = make(out, ImageFiles(pictures), shard_size=4)
    new = contents(out)
    assert len(old) == 3 and len(new) == 4 and old.items() <= new.items()
    listed = {line["file"] for line in json.loads((out / "index.json").read_text())["shards"]}
    assert len(listed) == 3 and len(listed & old.keys()) == 2
    after = [after.read([i], [0])["moments"] for i in (4, 5)]
    assert np.array_equal(before[0], after[0]) and not np.array_equal(before[1], after[1])


def test_changed_captions_and_new_pictures_are_noticed(pictures, tmp_path):
    make(tmp_path / "out", ImageFiles(pictures), shard_size=4)
    table = pictures / "metadata.jsonl"
    lines = table.read_text().split("\n")
    lines[11] = json.dumps({"file_name": "11.png", "text": "another caption"})
    lines.append(json.dumps({"file_name": "0.png", "text": "once more"}))
    table.write_text("\n".join(lines))
    first = stamps(tmp_path / "out")
    folder = make(tmp_path / "out", ImageFiles(pictures), shard_size=4)
    assert folder.captions(11) == ("another caption",) and folder.captions(12) == ("once more",)
    last = stamps(tmp_path / "out")
    assert len(last) == 5 and first.items() <= last.items()


def test_other_tokenizers_make_another_encoding(tmp_path):
    """They lie beside the encoders, and no tensor tells them. A folder of the old ones is refused,
    where it would have been kept."""
    model = shutil.copytree(SHIPPED, tmp_path / "model")
    encode_folder(Scenes(2), tmp_path / "out", model, 64, WORLD, precision="fp32")
    with open(model / "tokenizers" / "clip" / "merges.txt", "a") as file:
        file.write("zz zz\n")
    with pytest.raises(ValueError, match="is of another source, encoders"):
        encode_folder(Scenes(2), tmp_path / "out", model, 64, WORLD, precision="fp32")


@pytest.mark.parametrize("damage", ["cut", "gone", "text"])
def test_the_command_mends_a_damaged_shard(square, tmp_path, damage):
    folder = shutil.copytree(square, tmp_path / "copy")
    file = sorted(folder.glob("shard-*.safetensors"))[1]
    content = file.read_bytes()
    file.write_bytes({"cut": content[:-100]}.get(damage, b"hello"))
    if damage == "gone":
        file.unlink()
    make(folder)
    assert contents(folder) == contents(square)


def test_a_folder_of_another_recipe_is_not_mixed_into(square, tmp_path, pictures):
    for options in ({"buckets": True}, {"source": ImageFiles(pictures)}, {"resolution": 48},
                    {"source": Scenes(130, seed=1)}, {"precision": "bf16"}):
        with pytest.raises(ValueError, match="is of another source, enc.* change --out"):
            make(square, **options)


def test_other_encoders_are_refused_with_their_name(square, tmp_path, parts):
    other = VAE(VAEConfig(4, (32, 32, 32, 32), norm_groups=8))
    file = tmp_path / "model.safetensors"
    save_networks(file, {"vae": other, **parts.text.encoders}, parts.text.config)
    config = SimpleNamespace(**CONFIG | {"data": str(square), "encoders": str(file)})
    with pytest.raises(ValueError, match="needs --encoders pretrained/tiny/model.safetensors"):
        encoded(config, WORLD, 10)


def test_an_unreadable_picture_is_left_out_and_over_one_per_cent_stop_it(pictures, tmp_path):
    content = (pictures / "5.png").read_bytes()
    (pictures / "5.png").write_bytes(content[:150])
    with pytest.raises(ValueError, match=r"1 of 12 samples cannot be used, over 1 %.*\n.*5\.png"):
        make(tmp_path / "out", ImageFiles(pictures))
    assert not (tmp_path / "out" / "index.json").exists()
    source = ImageFiles(pictures)
    source.found = 100                                                # as if there were so many
    folder = make(tmp_path / "out", source, shard_size=4)
    assert len(folder) == 11 and folder.captions(5) == Scenes(12).captions(6)
    source = ImageFiles(pictures)                                     # A second start knows.
    with pytest.raises(ValueError, match=r"1 of 12(.|\n)*5\.png"):
        make(tmp_path / "out", source, shard_size=4)


# ---- The cache of train.py -----------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "cache"


def scenes_made(cache):
    return sum(line["count"] for file in cache.glob("*/index.json")
               for line in json.loads(file.read_text())["shards"])


def test_scenes_are_encoded_as_needed_kept_and_extended(cache, monkeypatch):
    config = SimpleNamespace(**CONFIG)
    training, held_out = encoded(config, WORLD, 70)
    assert len(training) == 70 and len(held_out) == 64 and scenes_made(cache) == 134
    assert held_out.captions(3) == Scenes(64, HELD_OUT_SEED).captions(3)
    first = training.read([69], training.caption_rows(69)[:1])
    before = {file: file.stat().st_mtime_ns for file in cache.rglob("shard-*.safetensors")}
    more, _ = encoded(config, WORLD, 90)
    assert len(more) == 90 and scenes_made(cache) == 154
    assert more.captions(89) == Scenes(90).captions(89)
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in before.items())
    monkeypatch.setattr(encode, "load_components", None)              # Nothing is encoded any more.
    again = encoded(config, WORLD, 70)[0]
    assert len(again) == 70
    second = again.read([69], again.caption_rows(69)[:1])
    assert all(np.array_equal(first[name], second[name]) for name in first)
    with pytest.raises(TypeError):                                    # another seed, other scenes
        encoded(SimpleNamespace(**CONFIG | {"seed": 1}), WORLD, 65)


def test_scenes_of_three_proportions_are_drawn_anew_for_their_size_not_cropped(cache):
    """Sec. 5.3.2. The encoded picture is the VAE's of the scene drawn at that very size."""
    config = SimpleNamespace(**CONFIG | {"resolution": 64, "buckets": True})
    training, held_out = encoded(config, WORLD, 60, until=0)    # With a part, a size would lack.
    assert training.sizes == ["64x64", "64x96", "96x64"] and held_out.sizes == ["64x64"]
    assert training.longest_side == 96 and training.resolution == 64 and len(training) == 60
    vae = load_components(SHIPPED, ("vae",)).vae
    wide = training.groups[1][0]
    captions = training.captions(wide)
    index, = [i for i in range(60) if Scenes(60).captions(i) == captions]
    height, width = Scenes(60).picture_size(index)
    assert 1.2 < width / height <= 2
    picture = to_tensor(Scenes(60).image(index, 64, 96))[None]
    means = training.read([wide], training.caption_rows(wide)[:1])["moments"][:, :16].float()
    with torch.no_grad():
        torch.testing.assert_close(means, vae.encode_moments(picture)[0], rtol=0, atol=0.01)


def test_after_the_deadline_no_further_shard_is_begun(cache):
    """A run of ten minutes must not spend them on encoding: it takes the scenes that are there."""
    config = SimpleNamespace(**CONFIG)
    training, held_out = encoded(config, WORLD, 1200, until=time.time())
    assert len(training) == 512 and len(held_out) == 64         # One shard at least.
    training, _ = encoded(config, WORLD, 1200)
    assert len(training) == 1200                                # The rest is made by the next run.


def test_a_set_of_scenes_has_no_hole(square, tmp_path):
    """Another process may have had time for a later shard. A resumed run needs scenes 0 to n-1."""
    folder = shutil.copytree(square, tmp_path / "copy")
    lines = json.loads((square / "index.json").read_text())["shards"]
    for line in lines[:2]:
        (folder / line["file"]).unlink()
    opened = make(folder, until=0)                                    # It begins a single shard.
    assert len(opened) == 64 and opened.captions(63) == Scenes(130).captions(63)
    assert make(folder).index["shards"] == lines


def test_pictures_go_through_the_cache_and_one_in_fifty_is_held_out(cache, pictures, monkeypatch):
    config = SimpleNamespace(**CONFIG | {"data": str(pictures)})
    training, held_out = encoded(config, WORLD, 5)
    assert len(training) == 11 and len(held_out) == 1
    monkeypatch.setattr(encode, "load_components", None)
    encoded(config, WORLD, 5)                                         # A second run starts at once.
    encoded(SimpleNamespace(**CONFIG | {"data": "pictures"}), WORLD, 5)
    (pictures / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "the only one"}')
    monkeypatch.undo()
    monkeypatch.chdir(cache.parents[1])
    training, held_out = encoded(config, WORLD, 5)
    assert len(training) == len(held_out) == 1 and training.captions(0) == ("the only one",)


def test_an_encoded_folder_is_taken_as_it_is(square, cache):
    training, held_out = encoded(SimpleNamespace(**CONFIG | {"data": str(square)}), WORLD, 5)
    assert len(training) == 128 and len(held_out) == 2 and not cache.exists()


# ---- The command line ----------------------------------------------------------------------------


@pytest.mark.parametrize("options, words", [
    ({"resolution": 40}, "multiple of 16"), ({"data": ""}, "give --data PATH"),
    ({"out": ""}, "--out FOLDER"), ({"shard_size": 0}, "--shard-size"),
    ({"precision": "fp8"}, "--precision")])
def test_options_that_cannot_work_are_refused_in_one_sentence(options, words):
    with pytest.raises(ValueError, match=words) as error:
        EncodeConfig(**{"data": "x", "out": "y"} | options)
    assert "\n" not in str(error.value)


def test_the_command_says_what_is_missing(files, tmp_path):
    out = ("--out", tmp_path / "x")
    for arguments, words in (((), "give --data PATH"),
                             (("--data", "nowhere", *out), "does not exist"),
                             (("--data", files, *out, "--device", "foo"), "--device foo")):
        process = start(*arguments)
        _, noted = process.communicate()
        assert process.returncode == 1 and words in noted
        assert noted.startswith("encode.py: ") and noted.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_captions_that_are_cut_are_counted_over_all_shards_and_said_once(
        pictures, tmp_path, capsys):
    lines = []
    for i in range(12):
        lines.append(json.dumps({"file_name": f"{i}.png", "text": "red " * (1 + 10 * i)}))
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    make(tmp_path / "out", ImageFiles(pictures), shard_size=3)
    length = load_components(SHIPPED, ("text",)).text.config.clip_length
    too_long = [i for i in range(12) if 1 + 10 * i + 2 > length]      # CLIP's start and end
    noted = capsys.readouterr().err
    assert noted.count("are cut") == 1
    assert f"note: {len(too_long)} of 12 texts are cut, the longest by {113 - length}" in noted
    make(tmp_path / "out", ImageFiles(pictures), shard_size=3)        # nothing to encode
    assert "are cut" not in capsys.readouterr().err


def test_the_cache_lies_beside_the_run(cache, tmp_path):
    """Nothing is written into the working folder if --out names another place."""
    elsewhere = tmp_path / "disk" / "run"
    encoded(SimpleNamespace(**CONFIG | {"out": str(elsewhere)}), WORLD, 64)
    assert scenes_made(elsewhere.parent / "cache") == 128 and not cache.exists()
