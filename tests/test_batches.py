"""Tests of batches.py, and of the encoded shards that it reads (data.EncodedFolder)."""

import gc
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from batches import Ahead, Batches, SceneBatches, pick_caption, weakly
from checkpoints import SHIPPED, load_components
from data import EncodedFolder, shard_hash, to_tensor
from flow import LogitNormal
from scenes import Scenes
from text_encoders import TextConfig
from vae import VAEConfig

ROOT = Path(__file__).parents[1]


# ---- Encoded shards and batches ------------------------------------------------------------------

VAE, TEXT = VAEConfig(latent_channels=2), TextConfig(3, 2, 6, clip_length=4, t5_length=5)
CPU = SimpleNamespace(rank=0, size=1, device=torch.device("cpu"), workers=0)


def write_shards(folder, sizes, captions=("short", "full")):
    """Random shards: `sizes` lists (number of pictures, latent height, width)."""
    rng, lines = torch.Generator().manual_seed(0), []
    folder.mkdir()
    for number, (count, H, W) in enumerate(sizes):
        rows = count * len(captions)
        shapes = {"moments": (count, 4, H, W), "clip_l": (rows, 4, 3), "clip_g": (rows, 4, 2),
                  "t5": (rows, 5, 6), "pooled_l": (rows, 3), "pooled_g": (rows, 2)}
        tensors = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
        for name in ("moments", "clip_l", "clip_g", "t5"):
            tensors[name] = tensors[name].half()
        tensors["caption_row"] = torch.arange(rows)
        tensors["caption_start"] = torch.arange(0, rows + 1, len(captions))
        texts = [f"{text} {number}.{i}" for i in range(count) for text in captions]
        file = folder / f"shard-{number:05}.safetensors"
        about = {"captions": texts, "hash": shard_hash(tensors, texts)}
        save_file(tensors, file, {"shard": json.dumps(about)})
        lines.append({"file": file.name, "height": 8 * H, "width": 8 * W, "count": count})
    index = {"encoders": {"path": "some/model", "fingerprint": "abc"}, "resolution": 32,
             "command": "python encode.py --out x", "shards": lines}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def mixed(tmp_path):
    """33 pictures of three sizes, in four shards."""
    return write_shards(tmp_path / "mixed", [(10, 4, 4), (11, 4, 4), (9, 2, 8), (3, 8, 2)])


def make_batches(folder, world=CPU, **settings):
    settings = {"seed": 0, "batch_size": 4, "accumulate": 1, "encoder_dropout": 0.0,
                "full_captions": 0.5} | settings
    return Batches(folder, VAE, TEXT, SimpleNamespace(**settings), world)


def rank(number, size, workers=0):
    return SimpleNamespace(rank=number, size=size, device=torch.device("cpu"), workers=workers)


def test_every_batch_has_one_size_and_an_epoch_has_every_whole_batch(mixed):
    """Sec. 5.3.2. 21 pictures give 5 batches of 4, 9 give 2; 3 give one, in which they repeat."""
    folder = EncodedFolder(mixed)
    size_of = {int(i): size for size, group in enumerate(folder.groups) for i in group}
    batches, orders, seen = make_batches(folder), [], Counter()
    for epoch in range(30):
        order = []
        for step in range(8 * epoch, 8 * epoch + 8):
            indices = batches.indices(step)
            (size,) = {size_of[index] for index in indices}
            assert len(indices) == 4 and len(set(indices)) == min(4, len(folder.groups[size]))
            order.append(size)
            seen.update(indices)
        assert Counter(order) == {0: 5, 1: 2, 2: 1}
        orders.append(order)
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])
    assert set(seen) == set(range(33))                                # None is never seen.


def test_with_one_size_an_epoch_is_a_permutation_without_what_fills_no_batch(tmp_path):
    folder = EncodedFolder(write_shards(tmp_path / "square", [(9, 4, 4), (9, 4, 4)]))
    batches, epochs = make_batches(folder), []
    for epoch in range(40):
        indices = [i for step in range(4 * epoch, 4 * epoch + 4) for i in batches.indices(step)]
        assert len(set(indices)) == len(indices) == 16
        epochs.append(indices)
    assert epochs[0] != epochs[1] and {i for epoch in epochs for i in epoch} == set(range(18))


def test_a_set_of_one_picture_can_be_trained_on(tmp_path):
    folder = EncodedFolder(write_shards(tmp_path / "one", [(1, 4, 4)]))
    batches = make_batches(folder)
    assert batches.indices(5) == [0, 0, 0, 0]
    noise = [sample.flatten()[0].item() for step in (5, 6) for sample in batches(step).noise]
    assert len(set(noise)) == 8                                       # Every sample has its own.


def test_a_batch_depends_on_seed_and_step_alone_and_ranks_share_it(mixed):
    """Resuming needs no state: a fresh reader gives at step 23 what one that ran from 0 gives."""
    folder = EncodedFolder(mixed)
    running = make_batches(folder, encoder_dropout=0.5)
    for step in range(23):
        running(step)
    expected = running(23)
    fresh = make_batches(EncodedFolder(mixed), encoder_dropout=0.5)(23)
    for name, tensor in vars(expected).items():
        assert torch.equal(getattr(fresh, name), tensor)
    for size in (2, 4):                                      # two pictures a rank, and one
        parts = [make_batches(folder, rank(i, size), encoder_dropout=0.5)(23) for i in range(size)]
        for name, tensor in vars(expected).items():
            joined = torch.cat([getattr(part, name) for part in parts])
            torch.testing.assert_close(joined, tensor, rtol=1e-6, atol=1e-6)
    assert make_batches(folder, seed=1).indices(23) != running.indices(23)
    other = make_batches(folder, seed=1)(23)
    assert not torch.equal(other.noise.flatten()[:64], expected.noise.flatten()[:64])


def test_processes_that_make_the_next_batches_change_nothing(mixed):
    ahead, plain = make_batches(EncodedFolder(mixed)), make_batches(EncodedFolder(mixed))
    ahead.ahead = Ahead(weakly(ahead.make), workers=2)
    for step in (0, 1, 2, 7, 8, 3):
        batch = ahead(step)
        for name, tensor in vars(plain(step)).items():
            assert torch.equal(getattr(batch, name), tensor)


def test_ahead_makes_values_in_other_processes_and_begins_anew_at_any_step():
    made = Ahead(lambda step: (step, os.getpid()), workers=2)
    steps, processes = zip(*[made(step) for step in (5, 6, 7, 8, 2, 3)])
    assert steps == (5, 6, 7, 8, 2, 3)
    assert os.getpid() not in processes and len(set(processes)) == 4          # two, twice
    assert Ahead(lambda step: (step, os.getpid()), workers=0)(5) == (5, os.getpid())


def ended(processes):
    """Whether none of these processes is left. They may take a second to end."""
    for _ in range(100):
        left = [number for number in processes if Path(f"/proc/{number}").exists()]
        if not left:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks processes up in /proc")
def test_processes_that_make_batches_end_with_their_batches(mixed):
    """At once, by the reference count: the garbage collector would leave them waiting."""
    gc.disable()
    try:
        batches = make_batches(EncodedFolder(mixed), rank(0, 1, workers=2))
        batches(0)
        processes = [process.pid for process in multiprocessing.active_children()]
        assert len(processes) == 2 and not ended(processes)
        del batches
        assert ended(processes)
    finally:
        gc.enable()


SIGNALS = """
import os, signal
from batches import Ahead
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: None)
ahead = Ahead(lambda step: os.getpid(), workers=1)
worker = ahead(0)
for number in (signal.SIGINT, signal.SIGTERM):
    os.killpg(0, number)
print([ahead(step) for step in range(1, 9)] == 8 * [worker])
"""

CIRCLE = """
import gc
from batches import Ahead
circle = []
ahead = Ahead(lambda step, circle=circle: step * len(circle), workers=1)
circle.append(ahead)                      # make refers to its Ahead
print(ahead(3))
del ahead, circle
gc.collect()
"""


@pytest.mark.parametrize("program, printed", [(SIGNALS, "True\n"), (CIRCLE, "3\n")])
def test_processes_that_make_batches_outlive_signals_but_not_the_program(program, printed):
    """Ctrl-C reaches them as well, while the main process still ends its step."""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
                         timeout=120, start_new_session=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, printed, "")


def test_an_error_in_another_process_keeps_its_sentence():
    def make(step):
        raise ValueError(f"shard {step} is damaged")
    with pytest.raises(ValueError, match="^shard 3 is damaged$"):
        Ahead(make, workers=1)(3)


def test_a_batch_holds_what_is_stored(mixed):
    """By hand: x_0 = (mean + std * noise - shift) * scale, context padded with zeros (App. B.2)."""
    folder = EncodedFolder(mixed)
    batches = make_batches(folder, full_captions=1.0)
    batch, indices = batches(2), batches.indices(2)
    for k, index in enumerate(indices):
        arrays, i = folder.find(index)
        row = folder.caption_rows(index)[1]
        mean, logvar = arrays["moments"][i].float().chunk(2)
        noise = (batch.latent[k] / VAE.vae_scale + VAE.vae_shift - mean) / torch.exp(logvar / 2)
        assert noise.abs().max() < 6 and not torch.allclose(noise, batch.noise[k], atol=0.1)
        assert 0.5 < noise.std() < 1.5                                # The code is drawn.
        context = torch.zeros(9, 6)
        context[:4, :3] = arrays["clip_l"][row]
        context[:4, 3:5] = arrays["clip_g"][row]
        context[4:] = arrays["t5"][row]
        assert torch.equal(batch.context[k], context)
        assert batch.pooled[k].tolist() == [*arrays["pooled_l"][row], *arrays["pooled_g"][row]]


def test_noise_is_normal_and_uniform_is_uniform(tmp_path):
    batches = make_batches(EncodedFolder(write_shards(tmp_path / "a", [(64, 8, 8)])), batch_size=64)
    drawn = [batches(step) for step in range(16)]
    noise = torch.stack([batch.noise for batch in drawn])
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    uniform = torch.cat([batch.uniform for batch in drawn])                       # 1024 values
    assert 0 < uniform.min() and uniform.max() < 1
    assert torch.histc(uniform, 8, 0, 1).sub(128).abs().max() < 45                # 4 deviations


@pytest.mark.parametrize("dropout", [0.464, 0.1])
def test_each_encoder_is_dropped_by_itself_with_the_stated_probability(tmp_path, dropout):
    """App. B.3: .464 each, sequence and pooled vector together, and .464^3 = 10 % have none."""
    batches = make_batches(EncodedFolder(write_shards(tmp_path / "a", [(64, 4, 4)])), batch_size=64,
                           encoder_dropout=dropout)
    dropped = []
    for step in range(40):
        batch = batches(step)
        clip, t5 = batch.context[:, :4], batch.context[:, 4:]
        gone = torch.stack([(part == 0).flatten(1).all(dim=1)
                            for part in (clip[..., :3], clip[..., 3:5], t5)], dim=1)   # (B, 3)
        assert torch.equal(gone[:, 0], (batch.pooled[:, :3] == 0).all(dim=1))
        assert torch.equal(gone[:, 1], (batch.pooled[:, 3:] == 0).all(dim=1))
        dropped.append(gone)
    dropped = torch.cat(dropped).float()                                          # (2560, 3)
    assert (dropped.mean(dim=0) - dropout).abs().max() < 0.04                     # 4 deviations
    assert abs(dropped.prod(dim=1).mean() - dropout**3) < 0.025


def test_t_and_the_caption_and_each_dropped_encoder_are_independent(tmp_path, monkeypatch):
    """Ten correlations of 2560 samples: each is below 4 / sqrt(2560) = .08."""
    picks, keeps, times = [], [], []

    def pick(captions, draw, share):
        picks.append(draw < 0.5)
        return captions[0]

    def drop(context, pooled, keep, config):
        keeps.append(keep)
        return context, pooled

    monkeypatch.setattr("batches.pick_caption", pick)
    monkeypatch.setattr("batches.drop_encoders", drop)
    batches = make_batches(EncodedFolder(write_shards(tmp_path / "a", [(64, 4, 4)])), batch_size=64,
                           encoder_dropout=0.5)
    for step in range(40):
        times.append(batches(step).uniform)
    rows = [torch.cat(times).numpy(), np.array(picks), *torch.cat(keeps).T.numpy()]
    correlations = np.corrcoef(np.array(rows, dtype=np.float64))[np.triu_indices(5, 1)]
    assert len(correlations) == 10 and np.abs(correlations).max() < 0.08


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_t_is_never_quite_0_or_1(mixed, monkeypatch, draw):
    """At either end lognorm(0, 1) gives logits of -inf or inf."""
    class Extreme:
        def __init__(self, key):
            self.standard_normal = np.random.Generator(np.random.PCG64(0)).standard_normal

        def random(self, count):
            return np.full(count, draw)

    batches = make_batches(EncodedFolder(mixed))
    batches.epoch(0)
    monkeypatch.setattr(np.random, "default_rng", Extreme)
    uniform = batches(0).uniform
    assert abs(uniform - draw).tolist() == pytest.approx([1e-6] * 4, rel=0.05)
    t = LogitNormal().quantile(uniform)
    assert 0 < t.min() and t.max() < 1


def test_captions_are_picked_in_the_stated_shares():
    draws = (np.arange(1000) + 0.5) / 1000
    for share in (0.5, 0.2, 0.0, 1.0):                                            # Sec. 5.2.2: .5
        picked = Counter(pick_caption(("original", "full"), draw, share) for draw in draws)
        assert picked["full"] == 1000 * share
    picked = Counter(pick_caption("abcde", draw, 0.5) for draw in draws)
    assert picked == dict.fromkeys("abcde", 200)
    assert pick_caption(["only"], 0.999, 0.5) == "only"


def test_batches_mix_original_and_full_captions(tmp_path, share=0.1):
    folder = EncodedFolder(write_shards(tmp_path / "a", [(64, 4, 4)]))
    batches, full = make_batches(folder, batch_size=64, full_captions=share), 0
    for step in range(20):
        batch = batches(step)
        for k, index in enumerate(batches.indices(step)):
            arrays, _ = folder.find(index)
            rows = folder.caption_rows(index)
            texts = [arrays["t5"][row].float() for row in rows]
            full += torch.equal(batch.context[k, 4:], texts[1])
    assert abs(full / 1280 - share) < 0.06                                        # 4 deviations


def test_validation_takes_full_captions_mean_codes_and_samples_of_every_size(tmp_path):
    sizes, captions = [(10, 4, 4), (11, 4, 4), (9, 2, 8), (3, 8, 2)], ("short", "other", "full")
    folder = EncodedFolder(write_shards(tmp_path / "three", sizes, captions))
    rest, first = folder.split(12)
    numbers = [{int(i) for group in part.groups for i in group} for part in (rest, first)]
    assert numbers[0] | numbers[1] == set(range(33)) and not numbers[0] & numbers[1]
    assert len(first) == 12 and len(first.groups) == 3
    batches = make_batches(folder, encoder_dropout=0.9, full_captions=0.0)
    parts = [group[i : i + 4] for group in first.groups for i in range(0, len(group), 4)]
    assert max(map(len, parts)) == 4 < max(map(len, first.groups))    # as many as in training
    for part, (latent, context, pooled, noise) in zip(parts, batches.validation(12), strict=True):
        assert noise.shape == latent.shape and len(latent) == len(part) == len(pooled)
        for k, index in enumerate(part):
            arrays, i = folder.find(index)
            row = folder.caption_rows(index)[2]
            assert arrays["captions"][row].startswith("full")
            assert torch.equal(context[k, 4:], arrays["t5"][row].float())
            mean = arrays["moments"][i, :2].float()
            torch.testing.assert_close(latent[k], (mean - VAE.vae_shift) * VAE.vae_scale)


def test_a_batch_splits_into_equal_parts(mixed):
    batch = make_batches(EncodedFolder(mixed))(0)
    parts = batch.split(2)
    for name, tensor in vars(batch).items():
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, tensor) and len(getattr(parts[0], name)) == 2


def test_shards_of_other_encoders_are_refused(mixed):
    assert EncodedFolder(mixed, "abc").longest_side == 64
    with pytest.raises(ValueError, match="needs --encoders some/model, or encode it again"):
        EncodedFolder(mixed, "abd")


@pytest.mark.parametrize("damage", ["header", "caption", "middle", "end", "cut", "empty", "gone"])
def test_a_damaged_shard_is_an_error_that_names_it_and_the_mend(mixed, damage):
    """A single flipped bit in the header, a caption or a tensor is enough."""
    file = mixed / "shard-00001.safetensors"
    content = bytearray(file.read_bytes())
    places = {"header": 40, "caption": content.index(b"full 1.3"), "middle": len(content) // 2}
    content[places.get(damage, -1)] ^= 1
    file.write_bytes({"cut": content[:-100], "empty": b""}.get(damage, content))
    if damage == "gone":
        file.unlink()
    folder = EncodedFolder(mixed)
    assert folder.captions(0) == ("short 0.0", "full 0.0")            # of the shard before
    words = r"shard-00001.safetensors is damaged .*delete it, .* encode again: by encode.py, or"
    with pytest.raises(ValueError, match=words) as error:
        folder.captions(10)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, words", [
    ({"shards": []}, "is missing or damaged"), ({"shards": 5}, "is missing or damaged"),
    ({"encoders": None}, "is missing or damaged"), ({"resolution": ...}, "resolution"),
    ({"count": ...}, "count"), ({"count": "5"}, "damaged"),
    ({"count": -1}, "damaged"), ({"count": 12}, "damaged"),
    ({"file": 3}, "is missing or damaged"), ({"file": ["shard"]}, "is missing or damaged"),
    ({"file": ...}, "is missing or damaged"),
    ({"height": None}, "damaged"), ({"width": ...}, "width"), ("{", "is missing or damaged"),
    ("[]", "is missing or damaged"), ("[" * 100_000, "is missing or damaged"),
    (b"\xff\xfe", "is missing or damaged")], ids=str)
def test_a_damaged_index_is_named(mixed, change, words):
    file = mixed / "index.json"
    index = json.loads(file.read_text())
    if isinstance(change, bytes):
        file.write_bytes(change)
    elif isinstance(change, str):
        file.write_text(change)
    else:
        for name, value in change.items():
            place = index if name in index else index["shards"][0]
            place[name] = value
            if value is ...:
                del place[name]
        file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=words) as error:
        EncodedFolder(mixed, "abc").captions(0)
    assert str(mixed) in str(error.value) and "delete it" in str(error.value)


def test_a_folder_without_index_says_how_to_go_on(tmp_path):
    """encode.py was killed. Of `train.py --data FOLDER`, the same command would not help."""
    with pytest.raises(ValueError, match="is missing or damaged .*encode again: by encode.py, or"):
        EncodedFolder(tmp_path)


# ---- Scenes that never come again ----------------------------------------------------------------
def scene_batches(rank=0, size=1, **options):
    parts = load_components(SHIPPED, ("vae", "text"))
    config = {"seed": 5, "batch_size": 4, "resolution": 32, "buckets": True, "precision": "fp32",
              "encoder_dropout": 0.0, "full_captions": 1.0} | options
    world = SimpleNamespace(rank=rank, size=size, device=torch.device("cpu"), workers=0)
    return SceneBatches(parts.vae, parts.text, SimpleNamespace(**config), world)


def test_drawn_batches_hold_new_scenes_each_step_as_they_would_be_encoded():
    """Sample n of step s is scene 4 s + n. Its code is drawn from its moments (App. B.2)."""
    batches = scene_batches()
    parts = load_components(SHIPPED, ("vae", "text"))
    seen = set()
    for step in range(8):
        batch = batches(step)
        height, width = (8 * side for side in batch.latent.shape[2:])
        seen.add((height, width))
        for number in range(4):
            source = Scenes(100, 5)
            index = 4 * step + number
            image = to_tensor(source.image(index, height, width))[None]
            with torch.no_grad():
                mean, logvar = parts.vae.encode_moments(image)
                context, pooled = parts.text([source.captions(index)[1]])
            code = batch.latent[number] / parts.vae.config.vae_scale + parts.vae.config.vae_shift
            noise = (code - mean[0]) / torch.exp(logvar[0] / 2)
            assert 0.6 < noise.std() < 1.4 and noise.abs().max() < 5.5
            torch.testing.assert_close(batch.context[number], context[0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(batch.pooled[number], pooled[0], rtol=1e-4, atol=1e-4)
    assert seen == {(32, 32), (32, 48), (48, 32)}
    assert batches.sizes == ["32x32", "32x48", "48x32"] and batches.longest_side == 48


def test_half_of_the_drawn_batches_are_square_and_without_buckets_all():
    sizes = Counter()
    batches = scene_batches(batch_size=1)
    for step in range(400):
        sizes[batches.make(step)[0]["pictures"].shape[1:3]] += 1
    assert 170 < sizes[32, 32] < 230 and min(sizes.values()) > 70                # 3 deviations
    square = scene_batches(batch_size=1, buckets=False)
    assert {square.make(step)[0]["pictures"].shape[1:3] for step in range(9)} == {(32, 32)}


def test_ranks_share_a_drawn_batch_and_a_step_is_the_same_whenever_it_comes():
    whole = scene_batches()(7)
    halves = [scene_batches(rank, 2)(7) for rank in range(2)]
    for name, tensor in vars(whole).items():
        joined = torch.cat([getattr(half, name) for half in halves])
        torch.testing.assert_close(joined, tensor, rtol=1e-4, atol=1e-4)


def test_the_second_draw_picks_the_caption_of_a_new_scene():
    """The first one becomes t, which must not depend on the caption."""
    batches = scene_batches(full_captions=0.5, batch_size=32)
    texts = []
    batches.text.tokenize = lambda found: texts.extend(found) or {}
    _, draws, _ = batches.make(0)
    for index in range(32):
        captions = Scenes(32, 5).captions(index)
        assert texts[index] == captions[int(draws[index, 1] < 0.5)]
