"""prompt -> image with the shipped model: the command line, the library, and that nothing depends on the batch."""

import gc
import json
import os
import subprocess
import sys
import weakref
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flow
import sample
import train
from checkpoints import SHIPPED, CheckpointError
from mmdit import MMDiTConfig
from sample import Settings, encode, generate, load, pick_precision, released_settings, sample_latents

ROOT = Path(__file__).parents[1]
PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def pipeline():
    return load(SHIPPED, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def noise():
    return torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))


def latents(pipeline, noise, settings, **more):
    """Latents of PROMPT from this noise, and the length of the path there."""
    with torch.no_grad():
        return sample_latents(pipeline.mmdit, *encode(pipeline.text, [PROMPT], settings), noise, settings, **more)


PLAIN = Settings(num_steps=4, guidance_scale=1, timestep_shift=1, schedule="shifted", unconditional="zeros")


def pixels(picture):
    return np.asarray(picture, dtype=int)


def run_sample(*options):
    return subprocess.run([sys.executable, "sample.py", "--device", "cpu", "--num-steps", "2", *map(str, options)], cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)


def test_a_picture_does_not_depend_on_its_batch(pipeline):
    """Picture i starts from seed + i, so alone with that seed it is the same picture."""
    both = generate(pipeline, [PROMPT, "three green hearts"], seed=5, num_steps=4)
    alone = generate(pipeline, ["three green hearts"], seed=6, num_steps=4)
    assert np.abs(np.asarray(both[1], dtype=int) - np.asarray(alone[0], dtype=int)).max() <= 1


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(pipeline):
    first, again, other = (np.asarray(generate(pipeline, [PROMPT], seed=seed, num_steps=3)[0]) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_prepared_modulations_give_the_latents_of_the_plain_network(pipeline, noise):
    """sample_latents computes what does not depend on z once; the plain loop of Eq. 1 gives the same."""
    ours, length = latents(pipeline, noise, replace(PLAIN, num_steps=5, guidance_scale=3))
    context, pooled = pipeline.text([PROMPT])
    empty, empty_pooled = pipeline.text.unconditional(1)
    times, velocities, z = flow.make_schedule("shifted", 5, 1.0), [], noise
    with torch.no_grad():
        for t, t_next in zip(times[:-1], times[1:]):
            v = flow.guide(pipeline.mmdit(z, t[None], context, pooled), pipeline.mmdit(z, t[None], empty, empty_pooled), 3.0)
            velocities.append(v)
            z = z + (t_next - t) * v
    torch.testing.assert_close(ours, z, rtol=0, atol=1e-3)                 # fp32 rounding, five steps on
    torch.testing.assert_close(length, flow.path_length(velocities, times), rtol=1e-4, atol=1e-4)


def calls_of(pipeline, noise, settings):
    """(time, rows, blocks left out) of every call of the network."""
    calls = []

    def note(module, inputs, named):
        calls.append((round(float(inputs[1][0]), 4), len(inputs[0]), named.get("skip_layers", ())))
    hook = pipeline.mmdit.register_forward_pre_hook(note, with_kwargs=True)
    latents(pipeline, noise, settings)
    hook.remove()
    return calls


def test_guidance_one_needs_no_unconditional_pass(pipeline, noise):
    rows = lambda scale: [n for _, n, _ in calls_of(pipeline, noise, replace(PLAIN, num_steps=2, guidance_scale=scale))]
    assert rows(1.0) == [1, 1] and rows(2.0) == [2, 2]


def test_guidance_is_on_in_its_interval_of_t_only(pipeline, noise):
    settings = replace(PLAIN, guidance_scale=4, guidance_start=0.8, guidance_end=0.4)
    assert [(t, n) for t, n, _ in calls_of(pipeline, noise, settings)] == [(1.0, 1), (0.75, 2), (0.5, 2), (0.25, 1)]


def test_rescaled_guidance_takes_the_added_spread_away(pipeline, noise):
    """With one step the latent is noise - velocity, so that its velocity can be read off: it has the spread of the other."""
    one = replace(PLAIN, num_steps=1)
    velocity = lambda settings: noise - latents(pipeline, noise, settings)[0]
    plain, guided, rescaled = (velocity(replace(one, **change)) for change in (
        {}, {"guidance_scale": 8}, {"guidance_scale": 8, "guidance_rescale": 1}))
    assert guided.std() > 1.01 * plain.std()
    torch.testing.assert_close(rescaled.std(), plain.std(), rtol=1e-4, atol=0)


def test_skip_layer_guidance_leaves_the_blocks_out_between_its_shares_of_the_steps(pipeline, noise):
    """SD3.5-medium's numbers: of 20 steps those with 0.2 < i < 4, conditional rows only."""
    settings = replace(PLAIN, num_steps=20, guidance_scale=4, skip_layers=(1, 2))
    calls = calls_of(pipeline, noise, settings)
    assert [(t, n) for t, n, skipped in calls if skipped == (1, 2)] == [(0.95, 1), (0.9, 1), (0.85, 1)]
    assert sum(not skipped for _, _, skipped in calls) == 20


def test_skip_layer_guidance_is_its_formula(pipeline, noise):
    settings = replace(PLAIN, num_steps=2, skip_layers=(1,), skip_start=0.1, skip_end=1.0, skip_scale=2.5)
    context, pooled = pipeline.text([PROMPT])
    network = lambda z, t, **more: pipeline.mmdit(z, torch.tensor([t]), context, pooled, **more)
    with torch.no_grad():
        z = noise - 0.5 * network(noise, 1.0)                                     # step 0 is before the start
        cond, skipped = network(z, 0.5), network(z, 0.5, skip_layers=(1,))
        assert (cond - skipped).abs().mean() > 1e-3
        expected = z - 0.5 * (cond + 2.5 * (cond - skipped))
    torch.testing.assert_close(latents(pipeline, noise, settings)[0], expected, rtol=1e-4, atol=1e-5)


def test_the_family_of_a_released_model_gives_its_defaults():
    """Published: SD3.5-medium with blocks 7, 8, 9 left out at scale 2.5 from .01 to .2; turbo in 4 steps without guidance."""
    medium = Settings(**released_settings(MMDiTConfig(dual_attention_layers=13, pos_embed_max_size=384), "any name"))
    assert (medium.skip_layers, medium.skip_scale, medium.skip_start, medium.skip_end) == ((7, 8, 9), 2.5, 0.01, 0.2)
    turbo = Settings(**released_settings(MMDiTConfig(depth=38), "models/sd3.5_large_turbo.safetensors"))
    assert (turbo.num_steps, turbo.guidance_scale) == (4, 1) and not turbo.skip_layers
    assert released_settings(MMDiTConfig(depth=38), "sd3.5_large.safetensors")["guidance_scale"] == 3.5
    assert released_settings(MMDiTConfig(qk_norm=False), "sd3_medium.safetensors") == {}


def test_any_encoder_can_be_left_out(pipeline):
    """Sec. 5.3.3: the picture changes, but it is still one."""
    full, without = (np.asarray(generate(pipeline, [PROMPT], num_steps=4, without=names)[0], dtype=float)
                     for names in ((), ("t5", "clip_g")))
    assert 0 < np.abs(full - without).mean() and without.std() > 1


@pytest.mark.parametrize("solver", ["heun", "rk4", "dpm++2m"])
def test_every_solver_goes_to_the_same_picture(pipeline, noise, solver):
    """At many steps all of them approach the one solution of Eq. 1; Euler is the furthest from it."""
    end = lambda solver, n: latents(pipeline, noise, replace(PLAIN, num_steps=n, guidance_scale=2, solver=solver))[0]
    exact = end("rk4", 24)
    assert (end(solver, 16) - exact).norm() < (end("euler", 16) - exact).norm()


# ------------------------------------------------------------------------------------------------------------
# From a picture to a picture
# ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def photo(tmp_path_factory, pipeline):
    """A picture the model has drawn, as a file."""
    file = tmp_path_factory.mktemp("photo") / "photo.png"
    generate(pipeline, [PROMPT], seed=1, num_steps=8)[0].save(file)
    return file


def test_strength_is_the_share_of_the_steps_that_are_walked(pipeline, noise):
    """int(steps * (1 - strength)) steps are left out; z begins on the straight path (Eq. 13)."""
    latent, calls = torch.full_like(noise, 0.5), []
    settings = replace(PLAIN, num_steps=5, strength=0.5)
    hook = pipeline.mmdit.register_forward_pre_hook(lambda module, inputs: calls.append((inputs[0], float(inputs[1][0]))))
    latents(pipeline, noise, settings, latent=latent)
    hook.remove()
    assert [round(t, 4) for _, t in calls] == [0.6, 0.4, 0.2]
    torch.testing.assert_close(calls[0][0], 0.4 * latent + 0.6 * noise)
    for num_steps, strength, walked in ((10, 0.9, 9), (5, 0.8, 4), (100, 0.07, 7)):     # 10 (1 - .9) is .999... in binary
        calls.clear()
        hook = pipeline.mmdit.register_forward_pre_hook(lambda module, inputs: calls.append(inputs))
        latents(pipeline, noise, replace(PLAIN, num_steps=num_steps, strength=strength), latent=latent)
        hook.remove()
        assert len(calls) == walked


def test_strength_zero_gives_the_picture_back_and_one_another(pipeline, photo):
    original = pixels(Image.open(photo))
    near, far = (pixels(generate(pipeline, ["two green stars"], image=photo, strength=s, num_steps=4)[0]) for s in (0, 1))
    assert np.abs(near - original).mean() < 12 < np.abs(far - original).mean()    # the autoencoder's own error, and more


@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_what_is_not_repainted_arrives_at_the_pictures_latent(pipeline, noise, solver):
    latent = torch.linspace(-1, 1, noise.numel()).view_as(noise)
    repaint = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    repaint[..., :4] = True
    settings = replace(PLAIN, solver=solver, strength=0.75)
    z, _ = latents(pipeline, noise, settings, latent=latent, repaint=repaint)
    torch.testing.assert_close(z[..., 4:], latent[..., 4:], rtol=1e-4, atol=1e-5)
    assert (z[..., :4] - latent[..., :4]).abs().mean() > 0.1


def test_outside_the_mask_every_pixel_stays(pipeline, photo, tmp_path):
    mask = np.zeros((64, 64), np.uint8)
    mask[10:30, 20:50] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    original = pixels(Image.open(photo))
    painted = pixels(generate(pipeline, ["a green star"], image=photo, mask=tmp_path / "mask.png", strength=1, num_steps=4)[0])
    assert np.array_equal(painted[mask == 0], original[mask == 0])
    assert np.abs(painted - original)[mask > 0].mean() > 5
    with pytest.raises(ValueError, match="give the image as well"):
        generate(pipeline, [PROMPT], mask=tmp_path / "mask.png")


# ------------------------------------------------------------------------------------------------------------
# Memory, precision, sizes
# ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("memory", ["offload", "one"])
def test_networks_that_take_turns_draw_the_same_picture(pipeline, memory):
    turns = load(SHIPPED, device="cpu", precision="fp32", memory=memory)
    settings = {"prompts": [PROMPT], "num_steps": 2, "t5_length": 12}
    assert np.array_equal(pixels(generate(turns, **settings)[0]), pixels(generate(pipeline, **settings)[0]))
    if memory == "one":                                                           # nothing is left in memory
        assert all(p.is_meta for network in (turns.mmdit, turns.vae, turns.text) for p in network.parameters())


def test_one_network_at_a_time_is_alive(monkeypatch):
    """With memory="one" the one before is gone when the next is read."""
    pipeline = load(SHIPPED, device="cpu", precision="fp32", memory="one")
    read, seen = pipeline.read, []

    def watched(name):
        gc.collect()
        assert all(reference() is None for reference in seen), f"{name} is read while another is still there"
        network = read(name)
        seen.append(weakref.ref(network))
        return network
    pipeline.read = watched
    generate(pipeline, [PROMPT, "two green stars"], num_steps=1, batch_size=1)
    assert len(seen) == 3


def test_t5_never_computes_in_fp16_because_large_activations_overflow_it():
    """The gated product of the feed-forward goes beyond fp16's 65504 in T5-XXL; here it is made to."""
    pipeline = load(SHIPPED, device="cpu", precision="fp16")
    assert pipeline.mmdit.joint_blocks[0].x_block.mlp.fc1.weight.dtype == torch.float16
    t5 = pipeline.text.encoders["t5"]
    types = {p.dtype for name, p in t5.named_parameters() if "layers" in name and p.dim() == 2}
    assert types == {torch.bfloat16}
    exact = load(SHIPPED, device="cpu", precision="fp32").text.encoders["t5"]
    for network in (t5, exact):
        network.layers[0].feed_forward.up.weight.mul_(3e5)
        network.layers[0].feed_forward.down.weight.div_(3e5)
    seen = []
    hook = t5.layers[0].feed_forward.down.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].abs().max()))
    given, _ = pipeline.use("text", lambda text: encode(text, [PROMPT], Settings(unconditional="zeros")))
    hook.remove()
    assert seen[0] > 65504 and given[0].isfinite().all()
    length = pipeline.text.config.clip_length
    expected = exact(pipeline.text.tokenize([PROMPT])["t5"])
    assert (given[0][:, length:] - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_draws_nearly_the_same_picture(pipeline, precision):
    half = load(SHIPPED, device="cpu", precision=precision)
    settings = {"prompts": [PROMPT], "num_steps": 4}
    assert np.abs(pixels(generate(half, **settings)[0]) - pixels(generate(pipeline, **settings)[0])).mean() < 4


def test_t5_length_is_an_argument(pipeline):
    lengths = {n: encode(pipeline.text, [PROMPT], Settings(t5_length=n))[0][0].shape[1] for n in (0, 12, 40)}
    clip = pipeline.text.config.clip_length
    assert lengths == {0: clip + 20, 12: clip + 12, 40: clip + 40} and pipeline.text.config.t5_length == 20


def test_decoding_in_tiles_gives_the_same_picture(pipeline):
    settings = {"prompts": [PROMPT], "num_steps": 2, "height": 96, "width": 128}
    whole, tiles = (pixels(generate(pipeline, tile=tile, **settings)[0]) for tile in (0, 64))
    assert np.abs(whole - tiles).max() <= 1


def test_unknown_and_impossible_settings_are_named(pipeline):
    with pytest.raises(ValueError, match="unknown setting 'num_step'"):
        generate(pipeline, [PROMPT], num_step=4)
    with pytest.raises(ValueError, match="strength=1.5; give a number from 0 to 1"):
        generate(pipeline, [PROMPT], strength=1.5)
    with pytest.raises(ValueError, match="this model's blocks are 0 to"):
        generate(pipeline, [PROMPT], skip_layers=[7, 99], num_steps=1)
    for wrong in ({"unconditional": "none"}, {"solver": "dopri"}, {"schedule": "linear"}):
        with pytest.raises(ValueError, match="choose "):
            generate(pipeline, [PROMPT], **wrong)
    for wrong in ({"num_steps": 0}, {"t5_length": -3}, {"timestep_shift": 0}):
        with pytest.raises(ValueError, match="give numbers above 0"):
            generate(pipeline, [PROMPT], **wrong)
    with pytest.raises(ValueError, match="multiple of 8 px"):
        generate(pipeline, [PROMPT], tile=100)


def test_other_sizes_and_their_limits(pipeline):
    assert generate(pipeline, [PROMPT], height=32, width=96, num_steps=2)[0].size == (96, 32)
    with pytest.raises(ValueError, match="multiples of 16"):
        generate(pipeline, [PROMPT], height=40, width=64)
    with pytest.raises(ValueError, match="at most 256x256 px"):
        generate(pipeline, [PROMPT], height=1024, width=1024, num_steps=1)


def test_the_shipped_model_draws_what_is_asked_for(pipeline):
    """A red circle on white: the most saturated pixels are red, and there are neither too few nor too many of them."""
    picture = np.asarray(generate(pipeline, ["a large red circle on a white background"], seed=3, num_steps=20)[0], dtype=int)
    red = (picture[..., 0] > 150) & (picture[..., 1] < 110) & (picture[..., 2] < 110)
    assert 0.03 < red.mean() < 0.3


def test_precision_is_chosen_by_the_hardware():
    assert pick_precision("fp32", torch.device("cpu")) == torch.float32
    assert pick_precision("bf16", torch.device("cpu")) == torch.bfloat16
    assert pick_precision("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)


def run_main(monkeypatch, *options):
    """The command line in this process; the files it wrote."""
    written, save = [], sample.save_png
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["sample.py", "--device", "cpu", *map(str, options)])
        patch.setattr(sample, "save_png", lambda picture, file, record: (save(picture, file, record), written.append(file)))
        sample.main()
    return written


def test_the_png_says_how_it_was_made(tmp_path):
    result = run_sample("--prompt", PROMPT, "--seed", 7, "--out", tmp_path / "x.png")
    assert result.returncode == 0, result.stderr
    record = json.loads(Image.open(tmp_path / "x.png").text["rectified-flow"])
    assert record["prompt"] == PROMPT and record["seed"] == 7 and record["settings"]["num_steps"] == 2
    assert record["checkpoint"] == "pretrained/tiny" and len(record["fingerprint"]) == 16


def test_from_png_repeats_a_picture_of_a_batch_to_the_pixel(tmp_path, photo, monkeypatch, capsys):
    """With an image to begin from, which must still be the same."""
    Image.open(photo).save(tmp_path / "photo.png")
    options = ("--image", tmp_path / "photo.png", "--strength", 0.9, "--guidance-scale", 3, "--seed", 5, "--num-steps", 3)
    first = run_main(monkeypatch, "--prompt", PROMPT, "two green stars", "a red heart", *options, "--out", tmp_path / "first")
    assert len(first) == 3
    again, = run_main(monkeypatch, "--from-png", first[1], "--out", tmp_path / "again.png")
    assert np.array_equal(pixels(Image.open(first[1])), pixels(Image.open(again)))
    assert Image.open(first[1]).text == Image.open(again).text
    other, = run_main(monkeypatch, "--from-png", first[1], "--seed", 6, "--out", tmp_path / "other.png")
    assert not np.array_equal(pixels(Image.open(other)), pixels(Image.open(again)))
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    with pytest.raises(ValueError, match="photo.png is not the picture that --from-png was made with"):
        run_main(monkeypatch, "--from-png", first[1], "--out", tmp_path / "never.png")


def test_from_png_repeats_a_grid_and_refuses_another_checkpoint(tmp_path, monkeypatch):
    first, = run_main(monkeypatch, "--prompt", PROMPT, "two green stars", "--grid", "--num-steps", 1, "--out", tmp_path)
    again, = run_main(monkeypatch, "--from-png", first, "--out", tmp_path / "again.png")
    assert np.array_equal(pixels(Image.open(first)), pixels(Image.open(again)))
    monkeypatch.setattr(sample, "fingerprint", lambda file: "another")
    with pytest.raises(CheckpointError, match="is not the file that --from-png"):
        run_main(monkeypatch, "--from-png", first, "--out", tmp_path / "never.png")


def test_another_programs_png_is_refused(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="not a PNG that sample.py wrote"):
        run_main(monkeypatch, "--from-png", tmp_path / "x.png")


def test_prompts_from_a_file_make_a_grid(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n\ntwo blue stars\n")
    result = run_sample("--prompts-file", tmp_path / "prompts.txt", "--grid", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    grid = Image.open(tmp_path / "grid.png")
    assert grid.width > 2 * 160 and json.loads(grid.text["rectified-flow"])["prompts"] == ["a red circle", "two blue stars"]


@pytest.mark.parametrize("options, words", [
    ((), "nothing to draw"), (("--prompt", "x", "--width", 70), "multiples of 16"),
    (("--prompt", "x", "--checkpoint", "/no/such"), "o such file or folder"),
    (("--prompts-file", "/no/such.txt"), "o such file")])
def test_what_cannot_work_is_answered_in_one_sentence(tmp_path, options, words):
    result = run_sample(*options, "--out", tmp_path / "out")
    assert result.returncode != 0 and words in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_long_prompt_is_cut_and_this_is_said_once(tmp_path):
    result = run_sample("--prompt", "red " * 200, "blue " * 200, "--out", tmp_path)
    assert result.returncode == 0 and result.stderr.count("is cut to") == 1


def test_every_setting_says_what_it_is_in_the_help():
    assert sample.field_comments(Settings).keys() == {field.name for field in fields(Settings)}
    assert train.field_comments(train.TrainConfig).keys() == {field.name for field in fields(train.TrainConfig)}
