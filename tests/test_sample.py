"""From a prompt to a picture with the shipped model: the steps, the library, the command line."""

import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import weakref
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import checkpoints
import flow
import sample
from checkpoints import SHIPPED
from sample import Settings, encode, generate, load, sample_latents

ROOT = Path(__file__).parents[1]
PROMPT = "a red circle left of a blue square"
PLAIN = Settings(num_steps=4, guidance_scale=1, timestep_shift=1, schedule="shifted",
                 unconditional="zeros")


@pytest.fixture(scope="module")
def pipeline():
    return load(SHIPPED, device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def noise():
    return torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def photo(tmp_path_factory, pipeline):
    """A picture that the model has drawn, as a file."""
    file = tmp_path_factory.mktemp("photo") / "photo.png"
    generate(pipeline, PROMPT, seed=1, num_steps=8)[0].save(file)
    return file


def latents(pipeline, noise, settings, **more):
    """Latents of PROMPT from this noise, and the length of the path there."""
    with torch.no_grad():
        text = encode(pipeline, [PROMPT], settings)
        return sample_latents(pipeline.mmdit, *text, noise, settings, **more)


def calls_of(pipeline, noise, settings, **more):
    """What the network was called with: [(z, t, rows, skipped blocks)]."""
    calls = []

    def note(module, inputs, named):
        calls.append((inputs[0], round(float(inputs[1][0]), 4), len(inputs[0]),
                      named.get("skip_layers", ())))
    hook = pipeline.mmdit.register_forward_pre_hook(note, with_kwargs=True)
    latents(pipeline, noise, settings, **more)
    hook.remove()
    return calls


def pixels(picture):
    return np.asarray(picture, dtype=int)


def run_main(monkeypatch, *options):
    """The command line in this process. Returns the files that it wrote."""
    written = []
    save = sample.save_png

    def save_and_note(picture, file, record):
        save(picture, file, record)
        written.append(file)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["sample.py", "--device", "cpu", *map(str, options)])
        patch.setattr(sample, "save_png", save_and_note)
        sample.main()
    return written


# ---- The steps -----------------------------------------------------------------------------------

@pytest.mark.parametrize("unconditional", ["zeros", "empty"])
def test_sampling_is_eulers_method_on_the_guided_velocity(pipeline, noise, unconditional):
    """Eq. 1 written out here, with v = v_uncond + 3 (v_cond - v_uncond); Table 6's path length."""
    settings = replace(PLAIN, num_steps=5, guidance_scale=3, unconditional=unconditional)
    ours, length = latents(pipeline, noise, settings)
    cond = pipeline.text([PROMPT])
    uncond = pipeline.text([""]) if unconditional == "empty" else [0 * x for x in cond]
    z = noise
    expected = 0
    with torch.no_grad():
        for t in (1.0, 0.8, 0.6, 0.4, 0.2):
            v_cond = pipeline.mmdit(z, torch.tensor([t]), *cond)
            v_uncond = pipeline.mmdit(z, torch.tensor([t]), *uncond)
            v = v_uncond + 3 * (v_cond - v_uncond)
            z = z - 0.2 * v
            expected += 0.2 * v.square().sum().sqrt()
    torch.testing.assert_close(ours, z, rtol=0, atol=1e-3)            # fp32 rounding, five steps on
    torch.testing.assert_close(length, expected[None], rtol=1e-4, atol=1e-4)


def test_a_negative_prompt_takes_the_place_of_the_empty_one(pipeline):
    settings = replace(PLAIN, guidance_scale=4, negative_prompt="two green stars")
    context, pooled = encode(pipeline, [PROMPT, "a heart"], settings)
    expected = pipeline.text([PROMPT, "a heart", "two green stars", "two green stars"])
    torch.testing.assert_close((context, pooled), tuple(expected))


@pytest.mark.parametrize("negative_prompt", ["", "two green stars"])
def test_an_encoder_that_is_left_out_is_left_out_on_both_sides_of_guidance(
        pipeline, negative_prompt):
    settings = replace(PLAIN, guidance_scale=4, negative_prompt=negative_prompt, without=("t5",),
                       unconditional="empty")
    context, _ = encode(pipeline, [PROMPT], settings)
    length = pipeline.text.config.clip_length
    assert not context[:, length:].any() and context[:, :length].any(dim=(1, 2)).all()


def test_guidance_one_needs_no_unconditional_pass(pipeline, noise):
    for scale, rows in ((1.0, 1), (2.0, 2)):
        calls = calls_of(pipeline, noise, replace(PLAIN, num_steps=2, guidance_scale=scale))
        assert [call[2] for call in calls] == [rows, rows]


@pytest.mark.parametrize("num_steps, first, last", [(20, 1, 3), (100, 2, 19)])
def test_skip_layer_guidance_is_on_in_some_steps(pipeline, noise, num_steps, first, last):
    """SD3.5-medium's numbers: the steps .01 N < i < .2 N, and conditional rows only."""
    settings = replace(PLAIN, num_steps=num_steps, guidance_scale=4, skip_layers=(1, 2))
    calls = calls_of(pipeline, noise, settings)
    skipped = [(t, rows) for _, t, rows, blocks in calls if blocks == (1, 2)]
    assert skipped == [(round(1 - i / num_steps, 4), 1) for i in range(first, last + 1)]
    assert len(calls) == num_steps + len(skipped)


def test_skip_layer_guidance_is_its_formula(pipeline, noise):
    """v_uncond + 4 (v - v_uncond) + 2.5 (v - v without block 1), in the second of six steps."""
    settings = replace(PLAIN, num_steps=6, guidance_scale=4, skip_layers=(1,))
    cond = pipeline.text([PROMPT])
    zeros = [torch.zeros_like(x) for x in cond]
    z = noise
    with torch.no_grad():
        for i in range(6):
            t = torch.tensor([1 - i / 6])
            v = pipeline.mmdit(z, t, *cond)
            v_uncond = pipeline.mmdit(z, t, *zeros)
            without = pipeline.mmdit(z, t, *cond, skip_layers=(1,))
            away = 2.5 * (v - without) if i == 1 else 0
            z = z - (v_uncond + 4 * (v - v_uncond) + away) / 6
    assert (v - without).abs().mean() > 1e-3
    torch.testing.assert_close(latents(pipeline, noise, settings)[0], z, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("solver", ["heun", "dpm++2m"])
def test_second_order_solvers_come_closer_than_euler(noise, solver):
    """For data N(2, .5^2) the flow is known: it takes noise n to 2 + .5 n."""
    def model(z, t, context, pooled):
        return flow.gaussian_velocity(z, t, mean=2.0, std=0.5)
    errors = {}
    for name in (solver, "euler"):
        settings = replace(PLAIN, num_steps=32, solver=name)
        z, _ = sample_latents(model, noise, noise, noise, settings)      # no text is read
        errors[name] = (z - (2 + 0.5 * noise)).norm()
    assert errors[solver] < 0.3 * errors["euler"]


# ---- Pictures ------------------------------------------------------------------------------------

def test_a_picture_does_not_depend_on_its_batch(pipeline):
    """Picture i starts from seed + i, so alone with that seed it is the same picture."""
    both = generate(pipeline, [PROMPT, "three green hearts"], seed=5, num_steps=4)
    alone = generate(pipeline, "three green hearts", seed=6, num_steps=4)
    assert np.abs(pixels(both[1]) - pixels(alone[0])).max() <= 1
    other = generate(pipeline, "three green hearts", seed=7, num_steps=4)
    assert np.abs(pixels(other[0]) - pixels(alone[0])).max() > 30


def is_red_circle_on_white(picture):
    """White corners, and red in a thirtieth to a third of the pixels. Decoded noise is not that."""
    picture = pixels(picture)
    red = (picture[..., 0] > 150) & (picture[..., 1] < 110) & (picture[..., 2] < 110)
    white = picture.min(axis=-1) > 200
    corners = white[[0, 0, -1, -1], [0, -1, 0, -1]]
    return corners.all() and white.mean() > 0.5 and 0.03 < red.mean() < 0.33


@pytest.mark.parametrize("without", [(), ("t5",)])
def test_the_shipped_model_draws_what_is_asked_for(pipeline, noise, without):
    """Also without T5 (Sec. 5.3.3)."""
    prompt = "a large red circle on a white background"
    assert is_red_circle_on_white(
        generate(pipeline, prompt, seed=3, num_steps=20, without=without)[0])
    with torch.no_grad():
        assert not is_red_circle_on_white(sample.from_tensor(pipeline.vae.decode(noise)[0]))


@pytest.mark.parametrize("name", ["clip_l", "clip_g", "t5"])
def test_an_encoder_that_is_left_out_gives_zeros_and_the_others_stay(pipeline, name):
    config = pipeline.text.config
    context, pooled = encode(pipeline, [PROMPT], replace(PLAIN, without=(name,)))
    full, full_pooled = encode(pipeline, [PROMPT], PLAIN)
    rows = slice(config.clip_length, None) if name == "t5" else slice(0, config.clip_length)
    first = config.clip_l_width if name == "clip_g" else 0
    width = {"clip_l": config.clip_l_width, "clip_g": config.clip_g_width, "t5": config.t5_width}
    columns = slice(first, first + width[name])
    assert full[:, rows, columns].abs().sum() > 0
    full[:, rows, columns] = 0
    if name != "t5":
        full_pooled[:, columns] = 0
    assert torch.equal(context, full) and torch.equal(pooled, full_pooled)


def test_strength_is_the_share_of_the_steps_that_are_walked(pipeline, noise):
    """z begins on the straight path (Eq. 13) between the image and the noise."""
    latent = torch.full_like(noise, 0.5)
    calls = calls_of(pipeline, noise, replace(PLAIN, num_steps=5, strength=0.5), latent=latent)
    assert [call[1] for call in calls] == [0.6, 0.4, 0.2]
    torch.testing.assert_close(calls[0][0], 0.4 * latent + 0.6 * noise)
    for num_steps, strength, walked in ((10, 0.9, 9), (5, 0.8, 4), (100, 0.07, 7), (3, 0, 0)):
        settings = replace(PLAIN, num_steps=num_steps, strength=strength)
        assert len(calls_of(pipeline, noise, settings, latent=latent)) == walked


def test_strength_zero_gives_the_picture_back_and_one_another(pipeline, photo):
    near = generate(pipeline, "two green stars", image=photo, strength=0, num_steps=4)[0]
    far = generate(pipeline, "two green stars", image=photo, strength=1, num_steps=4)[0]
    original = pixels(Image.open(photo))
    assert np.abs(pixels(near) - original).mean() < 12 < np.abs(pixels(far) - original).mean()


@pytest.mark.parametrize("solver", flow.SOLVERS)
def test_what_is_not_repainted_arrives_at_the_latent_of_the_image(pipeline, noise, solver):
    latent = torch.linspace(-1, 1, noise.numel()).view_as(noise)
    repaint = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    repaint[..., :4] = True
    settings = replace(PLAIN, solver=solver, strength=0.75)
    z, _ = latents(pipeline, noise, settings, latent=latent, repaint=repaint)
    torch.testing.assert_close(z[..., 4:], latent[..., 4:], rtol=1e-4, atol=1e-5)
    assert (z[..., :4] - latent[..., :4]).abs().mean() > 0.1


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_outside_the_mask_every_pixel_stays(pipeline, photo, tmp_path, mode):
    """RGBA: white strokes on a transparent layer, as drawing programs save them."""
    white = np.zeros((64, 64), np.uint8)
    white[10:30, 20:50] = 255
    mask = Image.fromarray(white)
    if mode == "RGBA":
        mask = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
        mask.putalpha(Image.fromarray(white))
    mask.save(tmp_path / "mask.png")
    painted = pixels(generate(pipeline, "a green star", image=photo, mask=tmp_path / "mask.png",
                              strength=1, num_steps=4)[0])
    original = pixels(Image.open(photo))
    assert np.array_equal(painted[white == 0], original[white == 0])
    assert np.abs(painted - original)[white > 0].mean() > 5


def test_a_mask_has_an_image_and_its_proportions(pipeline, photo, tmp_path):
    Image.new("L", (64, 48), 255).save(tmp_path / "flat.png")
    Image.new("L", (33, 33), 255).save(tmp_path / "small.png")
    with pytest.raises(ValueError, match="64, 48. px must have the proportions of --image .64, 64"):
        generate(pipeline, PROMPT, image=photo, mask=tmp_path / "flat.png")
    with pytest.raises(ValueError, match="give --image as well"):
        generate(pipeline, PROMPT, mask=tmp_path / "small.png")
    assert generate(pipeline, PROMPT, image=photo, mask=tmp_path / "small.png", num_steps=1)


# ---- Memory, precision, limits -------------------------------------------------------------------

def test_the_text_encoders_are_gone_when_the_mmdit_is_read(monkeypatch, tmp_path):
    """Only so does a large model fit on a GPU of 24 GB. The picture is that of the library."""
    read = sample.load_components
    encoders = []

    def watched(checkpoint, networks, *options, **files):
        gc.collect()
        if "mmdit" in networks:
            assert encoders[0]() is None
        parts = read(checkpoint, networks, *options, **files)
        if "text" in networks:
            encoders.append(weakref.ref(parts.text))
        return parts
    monkeypatch.setattr(sample, "load_components", watched)
    options = ("--prompt", PROMPT, "two green stars", "--num-steps", 1, "--t5-length", 12,
               "--precision", "fp32", "--out", tmp_path)
    files = run_main(monkeypatch, *options)
    assert len(encoders) == 1
    monkeypatch.undo()
    whole = load(SHIPPED, device="cpu", precision="fp32", t5_length=12)
    expected = generate(whole, [PROMPT, "two green stars"], num_steps=1, batch_size=1)
    for file, picture in zip(files, expected):
        assert np.array_equal(pixels(Image.open(file)), pixels(picture))


def test_t5_never_computes_in_fp16_because_large_activations_overflow_it():
    """The gated product of T5-XXL's feed-forward goes beyond 65504; here it is made to."""
    half = load(SHIPPED, device="cpu", precision="fp16")
    assert half.mmdit.joint_blocks[0].x_block.mlp.fc1.weight.dtype == torch.float16
    exact = load(SHIPPED, device="cpu", precision="fp32")
    seen = []
    for pipeline in (half, exact):
        layer = pipeline.text.encoders["t5"].layers[0].feed_forward
        layer.up.weight.mul_(3e5)
        layer.down.weight.div_(3e5)
        layer.down.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].abs().max()))
    pictures = []
    for pipeline in (half, exact):
        pictures.append(pixels(generate(pipeline, PROMPT, num_steps=4)[0]))
    assert min(seen) > 65504
    assert np.abs(pictures[0] - pictures[1]).mean() < 4


def test_bf16_draws_nearly_the_same_picture(pipeline):
    half = load(SHIPPED, device="cpu", precision="bf16")
    ours = pixels(generate(half, PROMPT, num_steps=4)[0])
    assert np.abs(ours - pixels(generate(pipeline, PROMPT, num_steps=4)[0])).mean() < 4


def test_t5_length_is_an_argument_of_load(pipeline):
    clip = pipeline.text.config.clip_length
    for length, expected in ((0, 20), (12, 12), (40, 40)):
        text = load(SHIPPED, device="cpu", precision="fp32", t5_length=length).text
        assert text([PROMPT])[0].shape[1] == clip + expected


@pytest.mark.parametrize("wrong, words", [
    ({"strength": 1.5}, "--strength 1.5 must be a number from 0 to 1"),
    ({"guidance_scale": float("nan")}, "--guidance-scale nan"),
    ({"guidance_scale": float("inf")}, "--guidance-scale inf"),
    ({"guidance_scale": 1e39}, "--guidance-scale"),
    ({"timestep_shift": 0}, "shift 0 must be"),
    ({"num_steps": 0}, "--num-steps"),
    ({"num_steps": 10**9}, "--num-steps"),
    ({"num_steps": "4"}, "--num-steps"),
    ({"solver": "rk4"}, "one of euler"),
    ({"schedule": "linear"}, "one of shifted"),
    ({"unconditional": "none"}, "one of zeros, empty"),
    ({"without": ("t6",)}, "one of clip_l"),
    ({"skip_layers": [7, 99]}, "this model's blocks are 0 to"),
    ({"height": 40}, "multiples of 16 px"),
    ({"width": 70}, "multiples of 16 px"),
    ({"height": 1024, "width": 1024}, "at most 128x128 px")])
def test_impossible_settings_are_named(pipeline, wrong, words):
    with pytest.raises(ValueError, match=words):
        generate(pipeline, PROMPT, **wrong)


def test_there_are_at_most_12_settings(pipeline):
    assert len(fields(Settings)) <= 12
    with pytest.raises(TypeError, match="num_step"):
        generate(pipeline, PROMPT, num_step=4)


def test_other_sizes(pipeline):
    assert generate(pipeline, PROMPT, height=32, width=96, num_steps=2)[0].size == (96, 32)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("network", ["mmdit", "vae"])
def test_numbers_that_are_not_finite_are_no_picture(network, number, monkeypatch):
    """They used to become an all-black PNG. Latents are looked at before they are decoded."""
    pipeline = load(SHIPPED, device="cpu")
    decoder = pipeline.vae.decoder
    layer = pipeline.mmdit.final_layer.linear if network == "mmdit" else decoder.conv_out
    layer.bias.fill_(number)
    decoded = []
    decoder.register_forward_hook(lambda *_: decoded.append(1))
    with pytest.raises(ValueError, match="numbers are not finite; try --precision fp32"):
        generate(pipeline, PROMPT, num_steps=1)
    assert len(decoded) == (network == "vae")


# ---- The command line ----------------------------------------------------------------------------

def record_of(file):
    return json.loads(Image.open(file).text["rectified-flow"])


def test_from_png_repeats_one_of_several_pictures_bit_for_bit(tmp_path, photo, monkeypatch):
    """With an image to begin from, which must be given again."""
    options = ("--image", photo, "--strength", 0.9, "--guidance-scale", 3, "--seed", 5,
               "--num-steps", 3, "--precision", "fp32", "--t5-length", 12)
    prompts = ("--prompt", PROMPT, "two green stars")
    first = run_main(monkeypatch, *prompts, *options, "--out", tmp_path)
    again = ("--from-png", first[1], "--out", tmp_path / "again.png")
    second, = run_main(monkeypatch, *again, "--image", photo)
    assert second.read_bytes() == first[1].read_bytes()
    other, = run_main(monkeypatch, *again, "--image", photo, "--seed", 7)
    assert not np.array_equal(pixels(Image.open(other)), pixels(Image.open(first[1])))


@pytest.mark.parametrize("given", ["nothing", "another"])
def test_from_png_without_the_picture_it_began_from_is_refused(given, tmp_path, photo, monkeypatch):
    """It would draw something else, and end as if all were well."""
    first, = run_main(monkeypatch, "--prompt", PROMPT, "--image", photo, "--num-steps", 2,
                      "--out", tmp_path / "x.png")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    image = ("--image", tmp_path / "red.png") if given == "another" else ()
    with pytest.raises(ValueError, match="another model, --image or --mask"):
        run_main(monkeypatch, "--from-png", first, *image, "--out", tmp_path / "again.png")
    assert not (tmp_path / "again.png").exists()


def place_another(option, name, folder):
    """A file of the shipped model with other content, or a folder, to give with an option."""
    if option == "--tokenizers":
        shutil.copytree(SHIPPED / "tokenizers", folder / "tokenizers")
        file = folder / "tokenizers" / "clip" / name
        text = file.read_text()
        if name == "merges.txt":
            file.write_text(text.rstrip().rsplit("\n", 1)[0] + "\n")  # without the last one
        else:
            vocabulary = json.loads(text)
            vocabulary["red</w>"], vocabulary["blue</w>"] = (
                vocabulary["blue</w>"], vocabulary["red</w>"])
            file.write_text(json.dumps(vocabulary))
        return folder / "tokenizers"
    network = checkpoints.read_network(name, checkpoints.open_model(SHIPPED))
    list(network.parameters())[-1].add_(0.1)
    checkpoints.save_networks(folder / "other.safetensors", {name: network})
    return folder / "other.safetensors"


@pytest.mark.parametrize("option, name", [
    ("--vae", "vae"), ("--text-encoders", "clip_l"), ("--text-encoders", "t5"),
    ("--tokenizers", "vocab.json"), ("--tokenizers", "merges.txt")])
def test_from_png_refuses_other_files_than_those_it_was_drawn_with(
        option, name, tmp_path, monkeypatch):
    """Each option takes the place of a part of the model. The picture would be another one."""
    other = place_another(option, name, tmp_path)
    drawing = ("--prompt", PROMPT, "--num-steps", 1, "--out")
    plain, = run_main(monkeypatch, *drawing, tmp_path / "plain.png")
    drawn, = run_main(monkeypatch, *drawing, tmp_path / "drawn.png", option, other)
    again = ("--out", tmp_path / "again.png", "--from-png")
    for wrong in ((plain, option, other), (drawn,)):
        with pytest.raises(ValueError, match="another --vae, --text-encoders or --tokenizers"):
            run_main(monkeypatch, *again, *wrong)
    assert not (tmp_path / "again.png").exists()
    for right, files in ((plain, ()), (drawn, (option, other))):
        repeated, = run_main(monkeypatch, *again, right, *files)
        assert repeated.read_bytes() == right.read_bytes()


def test_the_png_says_how_it_was_made_and_names_no_file(tmp_path, photo, monkeypatch):
    file, = run_main(monkeypatch, "--prompt", PROMPT, "--image", photo, "--mask", photo,
                     "--num-steps", 2, "--checkpoint", SHIPPED, "--out", tmp_path / "x.PNG")
    assert file == tmp_path / "x.PNG"
    record = record_of(file)
    assert record["prompt"] == [PROMPT] and record["num_steps"] == 2
    assert record["precision"] in ("bf16", "fp32")       # "auto" is another one elsewhere
    assert record.keys() == asdict(Settings()).keys() | {
        "prompt", "seed", "precision", "t5_length", "grid", "enlarge", "made_from"}
    text = json.dumps(record)
    assert "photo" not in text and str(tmp_path) not in text and "pretrained" not in text


def test_from_png_repeats_a_grid_and_refuses_another_model(tmp_path, monkeypatch):
    options = ("--prompt", PROMPT, "two green stars", "--grid", "--num-steps", 1, "--out")
    *_, first = run_main(monkeypatch, *options, tmp_path)
    *_, again = run_main(monkeypatch, "--from-png", first, "--out", tmp_path / "again")
    assert first.name == "grid.png" and first.read_bytes() == again.read_bytes()
    write_record(tmp_path / "other.png", record_of(first) | {"made_from": "another"})
    with pytest.raises(ValueError, match="another model.*--made-from"):
        run_main(monkeypatch, "--from-png", tmp_path / "other.png", "--out", tmp_path / "no")
    assert run_main(monkeypatch, "--from-png", tmp_path / "other.png", "--made-from", "",
                    "--out", tmp_path / "yes")


def test_a_single_picture_of_a_grid_is_repeated_alone(tmp_path, monkeypatch):
    files = run_main(monkeypatch, "--prompt", PROMPT, "two green stars", "--grid",
                     "--num-steps", 1, "--out", tmp_path)
    again, = run_main(monkeypatch, "--from-png", files[1], "--out", tmp_path / "again.png")
    assert again.read_bytes() == files[1].read_bytes()


def write_record(file, record):
    info = PngImagePlugin.PngInfo()
    info.add_text("rectified-flow", record if isinstance(record, str) else json.dumps(record))
    Image.new("RGB", (8, 8)).save(file, pnginfo=info)


@pytest.mark.parametrize("change", [
    {"prompt": "a heart"}, {"prompt": [5]}, {"seed": "7"}, {"seed": -1}, {"seed": 1.5},
    {"num_steps": 10**9}, {"num_steps": True}, {"height": 10**9}, {"guidance_scale": "nan"},
    {"guidance_scale": float("nan")}, {"without": "t5"}, {"t5_length": 10**9},
    {"skip_layers": [[1]]}, {"grid": 1}, {"made_from": 5}])
def test_wrong_types_in_a_strangers_png_are_one_sentence(tmp_path, monkeypatch, change):
    write_record(tmp_path / "x.png", asdict(sample.Recipe(prompt=(PROMPT,))) | change)
    with pytest.raises(ValueError, match=f"not a PNG that sample.py wrote .*{list(change)[0][:2]}"):
        run_main(monkeypatch, "--from-png", tmp_path / "x.png")


@pytest.mark.parametrize("content", [
    "[" * 100_000, "5", '["prompt"]', '{"prompts": ["x"]}', "\x00"])
def test_damaged_records_are_one_sentence(tmp_path, monkeypatch, content):
    write_record(tmp_path / "x.png", content)
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    os.mkfifo(tmp_path / "fifo.png")
    for name in ("x.png", "plain.png", "text.png", "fifo.png", "missing.png"):
        with pytest.raises(ValueError, match="not a PNG that sample.py wrote"):
            run_main(monkeypatch, "--from-png", tmp_path / name)


@pytest.mark.parametrize("name", ["checkpoint", "image", "mask", "vae", "tokenizers", "device",
                                  "text_encoders", "prompts_file", "out", "from_png"])
def test_a_png_that_names_a_file_or_a_device_is_refused(tmp_path, monkeypatch, name):
    """Nobody's PNG may open paths or reach for the hub."""
    monkeypatch.setattr(sample, "load", None)
    record = asdict(sample.Recipe(prompt=(PROMPT,))) | {name: "someone/repo"}
    write_record(tmp_path / "evil.png", record)
    with pytest.raises(ValueError, match=f"not a PNG that sample.py wrote .*{name}"):
        run_main(monkeypatch, "--from-png", tmp_path / "evil.png", "--out", tmp_path / "b.png")


def test_prompts_from_a_file_make_a_grid(tmp_path, monkeypatch):
    """A byte order mark is no part of a prompt, and U+2028 does not end a line."""
    text = "\ufeffa red circle\r\n\r\ntwo blue\u2028stars\n"
    (tmp_path / "prompts.txt").write_text(text, encoding="utf-8", newline="")
    *pictures, grid = run_main(monkeypatch, "--prompts-file", tmp_path / "prompts.txt", "--grid",
                               "--num-steps", 1, "--out", tmp_path)
    assert [file.name for file in pictures] == ["a-red-circle-0.png", "two-blue-stars-1.png"]
    assert record_of(grid)["prompt"] == ["a red circle", "two blue\u2028stars"]
    assert Image.open(grid).width >= 2 * 160                          # Small pictures are enlarged.


@pytest.mark.parametrize("prompt, name", [
    ("a red circle!", "a-red-circle-0.png"), ("", "picture-0.png"), ("../x", "x-0.png"),
    ("\u732b" * 200, "\u732b" * 40 + "-0.png")])
def test_file_names_are_short_in_bytes(tmp_path, monkeypatch, prompt, name):
    file, = run_main(monkeypatch, "--prompt", prompt, "--num-steps", 1, "--out", tmp_path)
    assert file == tmp_path / name


@pytest.mark.parametrize("out, words", [
    ("x.jpg", "give a folder"), ("x.webp", "give a folder"), ("several.png", "give a folder"),
    ("x" * 300 + ".png", "name too long"), ("\u732b" * 90 + ".png", "name too long"),
    ("folder.png", "give another"), ("link.png", "give another"), ("pipe.png", "give another")])
def test_out_is_checked_before_the_work(tmp_path, monkeypatch, out, words):
    monkeypatch.setattr(sample, "load", None)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to("elsewhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    prompts = ("a heart", "a star") if out == "several.png" else ("a heart",)
    with pytest.raises((ValueError, OSError), match=words):
        run_main(monkeypatch, "--prompt", *prompts, "--out", tmp_path / out)


def test_a_place_that_cannot_be_written_is_named_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "load", None)
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "x.png", "/proc/x"):
        with pytest.raises((OSError, ValueError)):
            run_main(monkeypatch, "--prompt", PROMPT, "--out", place)


def test_an_interrupt_keeps_what_is_drawn(tmp_path, monkeypatch):
    draw = sample.draw
    drawn = []

    def interrupted(*inputs):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(1)
        return draw(*inputs)
    monkeypatch.setattr(sample, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_main(monkeypatch, "--prompt", "a heart", "a star", "--num-steps", 1, "--out", tmp_path,
                 "--grid")
    assert [file.name for file in tmp_path.iterdir()] == ["a-heart-0.png"]


def test_one_bar_counts_the_steps_of_all_pictures(tmp_path, monkeypatch, capsys):
    run_main(monkeypatch, "--prompt", "a heart", "a star", "--num-steps", 2, "--out", tmp_path)
    shown = capsys.readouterr().err
    assert "4/4" in shown and "2/2" not in shown


def test_from_an_image_the_bar_counts_the_steps_taken(tmp_path, photo, monkeypatch, capsys):
    """At strength .6 of five steps, the first two are left out."""
    run_main(monkeypatch, "--prompt", "a heart", "a star", "--num-steps", 5, "--strength", 0.6,
             "--image", photo, "--out", tmp_path)
    assert "100%" in (shown := capsys.readouterr().err) and "6/6" in shown


def test_a_picture_is_enlarged_by_a_whole_factor(tmp_path, monkeypatch):
    """Each pixel becomes 3 x 3 equal ones, and the PNG is drawn again in its own size."""
    options = ["--prompt", "a heart", "--num-steps", 1, "--out"]
    small, = run_main(monkeypatch, *options, tmp_path / "small.png")
    large, = run_main(monkeypatch, *options, tmp_path / "large.png", "--enlarge", 3)
    small, large = np.asarray(Image.open(small)), np.asarray(Image.open(large))
    assert (large == small.repeat(3, axis=0).repeat(3, axis=1)).all()


def test_what_the_model_cannot_know_is_said_once_and_drawn_anyway(tmp_path, monkeypatch, capsys):
    """Unknown words, sizes never seen, a text that nothing leads away from."""
    load_it = sample.load
    known = {"words": ("a", "red", "circle"), "sizes": ("64x64", "64x96")}

    def load_with_words(*options, **files):
        pipeline = load_it(*options, **files)
        vars(pipeline.parts).update(known)
        return pipeline

    def said(*options):
        files = run_main(monkeypatch, *options, "--num-steps", 1, "--out", tmp_path)
        lines = capsys.readouterr().err.splitlines()
        return len(files), [line for line in lines if line.startswith("note:")]
    monkeypatch.setattr(sample, "load", load_with_words)
    drawn, lines = said("--prompt", "A red cat!", "a cat")
    assert drawn == 2 and len(lines) == 1
    assert "does not know: cat. It knows: a, red, circle" in lines[0]
    _, lines = said("--prompt", "a red circle \U0001f431")
    assert "does not know: \U0001f431." in lines[0]
    assert said("--prompt", "A red circle!", '"a red, (circle)."', "") == (3, [])
    _, lines = said("--prompt", "a red circle", "--width", 96)
    assert lines == []                                                # It has seen 64 x 96 px,
    _, lines = said("--prompt", "a red circle", "--height", 96)       # but none of 96 x 64.
    assert "only seen pictures of 64x64, 64x96 px (height x width)" in lines[0]
    negative = ("--prompt", "a red circle", "--negative-prompt", "a star", "--guidance-scale")
    _, lines = said(*negative, 1)
    assert len(lines) == 1 and "--negative-prompt does nothing at --guidance-scale 1" in lines[0]
    assert said(*negative, 2) == (1, [])
    known.update(words=(), sizes=())                                  # as the released files
    assert said("--prompt", "a photo of a cat") == (1, [])


@pytest.mark.parametrize("options, words", [
    ((), "there is no prompt"), (("--image", "photo.png"), "with --image as well"),
    (("--prompt", "x", "--width", "70"), "multiples of 16"),
    (("--prompt", "x", "--image", "/dev/zero"), "/dev/zero"),
    (("--prompt", "x", "--num-steps", "1e9"), "--num-steps"),
    (("--prompt", "x", "--t5-length", "1000000000"), "--t5-length"),
    (("--prompt", "x", "--guidance-scale", "nan"), "--guidance-scale"),
    (("--prompt", "x", "--device", "foo"), "--device foo"),
    (("--prompt", "x", "--checkpoint", "/no/such"), "o such file or folder"),
    (("--prompt", "a \udcff b"), "surrogates not allowed"),
    (("--prompts-file", "/no/such.txt"), "/no/such.txt")])
def test_what_cannot_work_is_one_sentence(monkeypatch, tmp_path, capsys, options, words):
    with pytest.raises((ValueError, OSError, SystemExit)) as problem:
        run_main(monkeypatch, *options, "--out", tmp_path / "out")
    assert words in str(problem.value) + capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_the_command_ends_with_one_sentence_and_a_code(tmp_path):
    command = [sys.executable, "sample.py", "--prompt", "red " * 200, "blue " * 200,
               "--device", "cpu", "--num-steps", "1", "--out"]
    good = subprocess.run([*command, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert good.returncode == 0 and good.stderr.count("are cut") == 1
    bad = subprocess.run([*command, tmp_path / "x.jpg"], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 1 and bad.stderr.startswith("sample.py: --out")
    assert len(bad.stderr.splitlines()) == 1


def test_one_prompt_enters_at_most_110_functions_of_this_project(tmp_path, monkeypatch):
    """A reader who follows one command meets all of them. Lambdas and comprehensions count."""
    entered = set()

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and os.path.dirname(code.co_filename) == str(ROOT):
            entered.add((code.co_filename, code.co_firstlineno, code.co_name))
    options = ["--prompt", "a red circle", "--num-steps", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["sample.py", *options])
    for cached in vars(checkpoints).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        sample.command(sample.main)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert {"main", "load", "encode", "sample_latents", "draw"} <= {name for *_, name in entered}
    assert len(entered) <= 110
