"""Pre-encoded shards (App. E.1): what is stored, resuming, splitting over processes, reading back in order, refusals."""

import json
import os
import signal
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
from safetensors.torch import load_file, save_file

import encode
from checkpoints import SHIPPED, find_model_file, load_components, save_networks
from data import ImageFiles, Scenes, aspect_buckets, nearest_bucket
from encode import Batches, EncodedFolder, EncodedImages, encode_folder, parse_options, sample_bytes, table7
from text_encoders import CLIPConfig, CLIPTextEncoder, T5Config, T5Encoder, TextConfig
from train import TrainConfig
from vae import VAE, VAEConfig

ROOT = Path(__file__).parents[1]
ENCODERS_FILE = find_model_file(SHIPPED)
FP32 = lambda: torch.autocast("cpu", enabled=False)
SCENES = ("--num-scenes", "130", "--resolution", "32", "--shard-size", "64", "--device", "cpu", "--precision", "fp32")


def make(out, *arguments, rank=0, size=1):
    """encode.py's work in this process, as one of `size`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", str(rank))
        patch.setenv("WORLD_SIZE", str(size))
        encode_folder(parse_options([*map(str, arguments), "--out", str(out)]))
    return Path(out)


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.glob("shard-*"))}


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    """130 scenes of 32 px in three shards."""
    return make(tmp_path_factory.mktemp("square") / "shards", *SCENES)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """The same scenes in their own aspect ratios."""
    return make(tmp_path_factory.mktemp("mixed") / "shards", *SCENES, "--resolution", 64, "--buckets")


@pytest.fixture(scope="module")
def parts():
    return load_components(SHIPPED, ("vae", "text"))


@pytest.fixture
def pictures(tmp_path):
    """Twelve pictures of three shapes in a folder with metadata.jsonl."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for i in range(12):
        height, width = [(40, 40), (40, 90), (90, 40)][i % 3]
        Image.fromarray(Scenes(12).image(i, height, width)).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "captions": list(Scenes(12).captions(i))}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def batches_of(images, parts, rank=0, size=1, **settings):
    world = SimpleNamespace(rank=rank, size=size, device=torch.device("cpu"))
    return Batches(images, parts.vae, parts.text.config, TrainConfig(**{"batch_size": 8, **settings}), world)


# ---------------------------------------------------------------------------------------------- Table 7


@pytest.mark.parametrize("side, together", [(64, 64), (256, 64), (512, 16), (1024, 4)])
def test_large_pictures_are_encoded_in_smaller_groups(parts, side, together):
    """Equal pixels at a time: 64 of 1024 x 1024 px would need tens of gigabytes."""
    groups = []

    class Recorder:
        config = parts.vae.config

        def encode_moments(self, image):
            groups.append(len(image))
            return (torch.zeros(len(image), 16, side // 8, side // 8),) * 2

    samples = ((np.zeros((side, side, 3), np.uint8), ["a circle"]) for _ in range(together + 1))
    encode.encode_shard(samples, side, side, Recorder(), parts.text, torch.device("cpu"), FP32)
    assert groups == [together, 1]


def test_storage_and_memory_of_sd3s_encoders_are_those_of_table_7():
    """65.5, 121.3, 202.2 and 630.7 kB a sample; 0.14, 0.49, 2.78 and 19.05 GB in fp32. From shapes: nothing is allocated."""
    with torch.device("meta"):
        encoders = {"clip_l": CLIPTextEncoder(CLIPConfig()), "t5": T5Encoder(T5Config()),
                    "clip_g": CLIPTextEncoder(CLIPConfig(49408, 1280, 32, 77, "gelu", 1280))}
        vae = VAE()
    table = table7(vae, SimpleNamespace(encoders=encoders, config=TextConfig()), 256, 256)
    paper = {"vae": (0.14, 65.5), "clip_l": (0.49, 121.3), "clip_g": (2.78, 202.2), "t5": (19.05, 630.7)}
    for name, (memory, storage) in paper.items():
        assert table[name][0] / 1e9 == pytest.approx(memory, abs=0.006)
        assert table[name][1] / 1e3 == pytest.approx(storage, abs=0.1)


def test_a_shard_takes_what_the_table_says(square, parts):
    expected = sample_bytes(parts.vae.config, parts.text.config, 32, 32)
    for entry in json.loads((square / "index.json").read_text())["shards"]:
        captions = entry["captions"]                                           # equal ones are stored once
        per_caption = sum(size for name, size in expected.items() if name != "vae")
        payload = entry["count"] * expected["vae"] + captions * per_caption
        assert payload <= entry["bytes"] < payload + 150 * captions + 5000     # the rest: the captions' text, the header
        tensors = load_file(square / entry["file"])
        assert {name: tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point()} == {
            "moments": torch.float16, "clip_l": torch.float16, "clip_g": torch.float16, "t5": torch.float16,
            "pooled_l": torch.float32, "pooled_g": torch.float32}


# ---------------------------------------------------------------------------------------------- writing


def test_two_processes_write_the_shards_of_one(square, tmp_path):
    folder = make(tmp_path / "two", *SCENES, rank=1, size=2)
    assert not (folder / "index.json").exists() and len(contents(folder)) == 1
    with pytest.raises(ValueError, match="encoding has not finished"):
        EncodedFolder(folder, ENCODERS_FILE)
    make(folder, *SCENES, rank=0, size=2)
    assert contents(folder) == contents(square)
    ours, expected = (json.loads((f / "index.json").read_text()) for f in (folder, square))
    assert ours["shards"] == expected["shards"]


def test_torchrun_runs_it(square, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29583", "encode.py",
               *SCENES, "--out", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}     # the last bit depends on it, not on ranks
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "two") == contents(square) and (tmp_path / "two" / "index.json").is_file()


def test_after_a_kill_only_the_missing_shards_are_made(square, tmp_path):
    """SIGKILL once the first shard is there; the second start keeps it and ends with the same bytes."""
    folder = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "encode.py", *SCENES, "--out", str(folder)], cwd=ROOT,
                               env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (folder / "shard-00000.safetensors").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / "index.json").exists()
    before = {file: file.stat().st_mtime_ns for file in folder.glob("shard-*.safetensors")}
    make(folder, *SCENES)
    assert contents(folder) == contents(square)                                # and no .partial is left
    assert before and all(file.stat().st_mtime_ns == stamp for file, stamp in before.items())


def test_a_folder_of_other_settings_is_not_mixed_into(square):
    with pytest.raises(ValueError, match="shard-00000.safetensors was made from other pictures.*choose another --out"):
        make(square, *SCENES, "--buckets")


def test_an_unreadable_picture_is_left_out_and_more_than_one_percent_stop_it(pictures, tmp_path):
    (pictures / "5.png").write_bytes((pictures / "5.png").read_bytes()[:150])
    with pytest.raises(ValueError, match=r"1 of 12 samples cannot be used, over 1 %.*\n.*5\.png"):
        make(tmp_path / "out", "--data", pictures, "--resolution", 32, "--device", "cpu")
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.parametrize("arguments, words", [
    (["--out", "x", "--resolution", "40"], "not a multiple of 16"), (["--out", "x", "--shard-size", "100"], "multiple of 64"),
    (["--data", "x"], "--data needs --out"), (["--out", "x", "--captions", "c"], "--captions needs --data")])
def test_options_that_cannot_work_are_refused_in_one_sentence(arguments, words):
    with pytest.raises(ValueError, match=words):
        parse_options(arguments)


def test_synthetic_captions_of_a_second_file_join_the_originals(pictures, tmp_path):
    file = tmp_path / "synthetic.jsonl"
    lines = [json.dumps({"file_name": f"{i}.png", "caption": f"synthetic {i}"}) for i in range(12)]
    file.write_text("\n".join(lines))
    folder = make(tmp_path / "out", "--data", pictures, "--captions", file, "--resolution", 32, "--device", "cpu")
    images = EncodedFolder(folder, ENCODERS_FILE)
    assert [images.captions(i) for i in range(12)] == [(Scenes(12).captions(i)[0], f"synthetic {i}") for i in range(12)]
    file.write_text("\n".join(lines[1:]))
    with pytest.raises(ValueError, match="no caption for 1 of 12 pictures, the first: 0.png"):
        ImageFiles(pictures).add_captions(file)
    file.write_text("\n".join([*lines, '{"file_name": "3.png"}']))
    with pytest.raises(ValueError, match="line 13: it needs"):
        ImageFiles(pictures).add_captions(file)


# ---------------------------------------------------------------------------------------------- aspect ratios


@pytest.mark.parametrize("resolution, step", [(64, 16), (256, 16), (256, 64), (512, 64), (1024, 64)])
def test_buckets_have_about_the_same_area_in_both_orientations(resolution, step):
    buckets = aspect_buckets(resolution, step)
    assert (resolution, resolution) in buckets and len(set(buckets)) == len(buckets)
    for height, width in buckets:
        assert height % step == width % step == 0 and (width, height) in buckets and max(height / width, width / height) <= 4
        assert abs(height * width - resolution**2) <= step / 2 * min(height, width)     # the nearest multiple of the step


def test_a_picture_goes_to_the_nearest_ratio_in_the_logarithm():
    buckets = [(64, 64), (48, 80), (80, 48), (32, 128)]
    assert [nearest_bucket(*size, buckets) for size in ((500, 500), (300, 400), (400, 300), (100, 900), (900, 100))] == [
        (64, 64), (48, 80), (80, 48), (32, 128), (80, 48)]
    assert nearest_bucket(1000, 1290, [(64, 64), (48, 80)]) == (64, 64) != nearest_bucket(1000, 1292, [(64, 64), (48, 80)])


def test_sizes_come_from_headers_upright(pictures):
    source = ImageFiles(pictures)
    assert [source.picture_size(i) for i in range(3)] == [(40, 40), (40, 90), (90, 40)] or source.name(1) != "1.png"
    image, exif = Image.open(pictures / "1.png"), Image.Exif()
    exif[0x0112] = 6                                                           # a camera on its side
    image.save(pictures / "1.png", exif=exif)
    assert ImageFiles(pictures).picture_size(1) == (90, 40) == ImageFiles(pictures).image(1, 90, 40).shape[:2]


def test_every_shard_has_one_size_and_every_picture_its_own(mixed):
    images, source = EncodedFolder(mixed, ENCODERS_FILE), Scenes(130)
    wanted = Counter(nearest_bucket(*source.picture_size(i), aspect_buckets(64)) for i in range(130))
    found = Counter()
    for entry in images.index["shards"]:
        found[entry["height"], entry["width"]] += entry["count"]
        assert load_file(mixed / entry["file"])["moments"].shape[2:] == (entry["height"] // 8, entry["width"] // 8)
    assert found == wanted and len(wanted) == 3 and sum(wanted.values()) == len(images) == 130
    assert images.longest_side == 80


# ---------------------------------------------------------------------------------------------- reading


def test_batches_from_shards_are_those_from_memory(square, parts):
    """Same pictures, same captions, same noise. Captions are encoded in other groups of 64, which may round differently."""
    memory = EncodedImages(Scenes(130), parts.vae, parts.text, 32, torch.device("cpu"), FP32, quiet=True)
    folder = EncodedFolder(square, ENCODERS_FILE)
    assert [folder.captions(i) for i in range(130)] == [memory.captions(i) for i in range(130)]
    for step in (0, 17, 40):
        ours, expected = (batches_of(images, parts)(step) for images in (folder, memory))
        for name, tensor in vars(expected).items():
            torch.testing.assert_close(getattr(ours, name), tensor, rtol=2e-3, atol=2e-3)
            assert name not in ("latent", "noise", "uniform") or torch.equal(getattr(ours, name), tensor)


def test_every_batch_has_one_size_and_every_sample_comes_once_an_epoch(mixed, parts):
    """Over ranks together. What does not fill a batch of its size at the end of an epoch begins the next one."""
    images = EncodedFolder(mixed, ENCODERS_FILE)
    size_of = {int(i): size for size, group in enumerate(images.groups) for i in group}
    ranks = [batches_of(images, parts, rank, 2) for rank in range(2)]
    streams = {size: [] for size in range(len(images.groups))}
    for step in range(130):                                                    # eight epochs
        indices = [i for rank in ranks for i in rank.indices(step)]
        size, = {size_of[i] for i in indices}
        streams[size] += indices
    for size, group in enumerate(images.groups):
        n = len(group)
        assert abs(len(streams[size]) - 8 * n) <= 8                            # in proportion
        epochs = [streams[size][e * n : (e + 1) * n] for e in range(7)]
        assert all(sorted(epoch) == group.tolist() for epoch in epochs) and epochs[0] != epochs[1]
    sizes = [ranks[0].batch_of_step(step)[0] for step in range(16)]
    assert sizes != sorted(sizes)                                              # the sizes take turns


def test_a_batch_depends_on_seed_and_step_alone(mixed, parts):
    """Resuming needs no state: a new reader asked for step 23 gives what one that has run from 0 gives, ahead or not."""
    images = EncodedFolder(mixed, ENCODERS_FILE)
    running, fresh, ahead = (batches_of(images, parts) for _ in range(3))
    ahead.images = EncodedFolder(mixed, ENCODERS_FILE)
    ahead.thread = encode.ThreadPoolExecutor(1)
    for step in range(23):
        running.indices(step)
    expected = running(23)
    ahead(22)
    for other in (fresh(23), ahead(23)):
        assert all(torch.equal(getattr(other, name), tensor) for name, tensor in vars(expected).items())
    assert batches_of(images, parts, seed=1).indices(23) != running.indices(23)
    halves = [batches_of(images, parts, rank, 2)(23) for rank in range(2)]
    for name, tensor in vars(expected).items():
        torch.testing.assert_close(torch.cat([getattr(half, name) for half in halves]), tensor, rtol=1e-6, atol=1e-6)


def test_original_and_synthetic_captions_are_mixed_half_and_half(square, parts):
    images = EncodedFolder(square, ENCODERS_FILE)
    batches, chosen, read = batches_of(images, parts, batch_size=130), [], images.read

    def spy(indices, choose):
        chosen.extend(choose(k, ("original", "synthetic")) for k in range(len(indices)))
        return read(indices, choose)

    images.read = spy
    for step in range(8):
        batches(step)
    assert abs(Counter(chosen)["synthetic"] / len(chosen) - 0.5) < 0.05


def test_validation_takes_samples_of_every_size_and_training_the_rest(mixed, parts):
    images = EncodedFolder(mixed, ENCODERS_FILE)
    rest, first = images.split(20)
    numbers = lambda part: {int(i) for group in part.groups for i in group}
    assert numbers(rest) | numbers(first) == set(range(130)) and not numbers(rest) & numbers(first)
    assert len(first) == 20 and len(first.groups) == len(images.groups)
    latents = [latent for latent, *_ in batches_of(first, parts).validation(64)]
    assert sum(map(len, latents)) == len(first) and len({latent.shape[1:] for latent in latents}) == len(first.groups)


# ---------------------------------------------------------------------------------------------- refusals


def test_other_encoders_are_refused(square, tmp_path, parts):
    other = VAE(VAEConfig(4, (32, 32, 32, 32), norm_groups=8))
    save_networks(tmp_path / "model.safetensors", {"vae": other, **parts.text.encoders}, parts.text.config)
    with pytest.raises(ValueError, match="was encoded with pretrained/tiny/model.safetensors.*give --encoders"):
        EncodedFolder(square, tmp_path / "model.safetensors")


@pytest.mark.parametrize("damage, words", [
    ("cut", "bytes"), ("gone", "no such file"), ("overwritten", "not a whole safetensors file"), ("foreign", "captions")])
def test_a_damaged_shard_is_named_with_its_mend(square, tmp_path, damage, words):
    folder = make(tmp_path / "copy", *SCENES)
    file = folder / "shard-00001.safetensors"
    content = file.read_bytes()
    if damage == "foreign":
        save_file({"moments": torch.zeros(3, 2), "t5": torch.zeros(1), "caption_start": torch.zeros(1)}, file, {"shard": "{}"})
        index = json.loads((folder / "index.json").read_text())
        index["shards"][1]["bytes"] = file.stat().st_size
        (folder / "index.json").write_text(json.dumps(index))
    elif damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content[:-100] if damage == "cut" else b"\xff" * len(content))
    with pytest.raises(ValueError, match=rf"shard-00001.safetensors is damaged \(.*({words}).*delete it and run") as error:
        EncodedFolder(folder, ENCODERS_FILE).captions(100)
    assert "\n" not in str(error.value)
    if damage == "gone":                                                       # the mend works
        make(folder, *SCENES)
        assert contents(folder) == contents(square)


# ---------------------------------------------------------------------------------------------- the whole way


def train_on(data, out, *options):
    command = [sys.executable, "train.py", "--device", "cpu", "--precision", "fp32", "--depth", "1", "--batch-size", "4",
               "--steps", "3", "--log-every", "1", "--sample-every", "0", "--save-every", "0"]
    result = subprocess.run([*command, *map(str, ("--data", data, "--out", out, *options))], cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    entries = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return ([entry["loss"] for entry in entries if "loss" in entry], [e["validation"] for e in entries if "validation" in e])


def test_training_on_shards_has_the_losses_of_training_on_the_pictures(pictures, tmp_path):
    folder = make(tmp_path / "shards", "--data", pictures, "--resolution", 32, "--device", "cpu", "--precision", "fp32")
    from_pictures = train_on(pictures, tmp_path / "a", "--resolution", 32)
    from_shards = train_on(folder, tmp_path / "b")                             # the resolution is the folder's
    for ours, expected in zip(from_shards, from_pictures):
        assert ours == pytest.approx(expected, abs=2e-3) and np.isfinite(ours).all()


def test_training_takes_mixed_aspect_ratios(pictures, tmp_path):
    folder = make(tmp_path / "shards", "--data", pictures, "--resolution", 32, "--buckets", "--device", "cpu")
    losses, validation = train_on(folder, tmp_path / "run")
    assert len(losses) == 3 and np.isfinite(losses).all() and np.isfinite(validation).all()
