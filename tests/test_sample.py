"""prompt -> image with the shipped model: the command line, the library, and that nothing depends on the batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flow
from checkpoints import SHIPPED
from sample import generate, generate_latents, load, pick_precision

ROOT = Path(__file__).parents[1]
PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module")
def pipeline():
    return load(SHIPPED, device="cpu", precision="fp32")


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


def test_prepared_modulations_give_the_latents_of_the_plain_network(pipeline):
    """generate_latents computes what does not depend on z once; the plain loop of Eq. 1 gives the same."""
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    ours, length = generate_latents(pipeline, [PROMPT], noise, 5, 3.0, 1.0, "shifted")
    context, pooled = pipeline.text([PROMPT])
    empty, empty_pooled = pipeline.text.unconditional(1)
    times, velocities, z = flow.make_schedule("shifted", 5, 1.0), [], noise
    with torch.no_grad():
        for t, t_next in zip(times[:-1], times[1:]):
            v = flow.guide(pipeline.mmdit(z, t[None], context, pooled), pipeline.mmdit(z, t[None], empty, empty_pooled), 3.0)
            velocities.append(v)
            z = z + (t_next - t) * v
    torch.testing.assert_close(ours, z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(length, flow.path_length(velocities, times), rtol=1e-4, atol=1e-4)


def test_guidance_one_needs_no_unconditional_pass(pipeline):
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    calls = []
    hook = pipeline.mmdit.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    generate_latents(pipeline, [PROMPT], noise, 2, 1.0, 1.0, "shifted")
    generate_latents(pipeline, [PROMPT], noise, 2, 2.0, 1.0, "shifted")
    hook.remove()
    assert calls == [1, 1, 2, 2]


def test_any_encoder_can_be_left_out(pipeline):
    """Sec. 5.3.3: the picture changes, but it is still one."""
    full, without = (np.asarray(generate(pipeline, [PROMPT], num_steps=4, without=names)[0], dtype=float)
                     for names in ((), ("t5", "clip_g")))
    assert 0 < np.abs(full - without).mean() and without.std() > 1


@pytest.mark.parametrize("solver", ["heun", "rk4", "dpm++2m"])
def test_every_solver_goes_to_the_same_picture(pipeline, solver):
    """At many steps all of them approach the one solution of Eq. 1; Euler is the furthest from it."""
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = {"guidance_scale": 2.0, "timestep_shift": 1.0, "schedule": "shifted"}
    exact, _ = generate_latents(pipeline, [PROMPT], noise, 60, solver="rk4", **settings)
    distance = lambda name: (generate_latents(pipeline, [PROMPT], noise, 30, solver=name, **settings)[0] - exact).norm()
    assert distance(solver) < distance("euler")


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


def test_the_png_says_how_it_was_made(tmp_path):
    result = run_sample("--prompt", PROMPT, "--seed", 7, "--out", tmp_path / "x.png")
    assert result.returncode == 0, result.stderr
    record = json.loads(Image.open(tmp_path / "x.png").text["rectified-flow"])
    assert record["prompt"] == PROMPT and record["seed"] == 7 and record["num_steps"] == 2 and record["checkpoint"]


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
