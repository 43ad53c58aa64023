"""experiments/fig15_editing.py: the widened model, the tasks, verdicts, one tiny run."""

import importlib.util
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flow import LogitNormal
from mmdit import MMDiT, MMDiTConfig
from scenes import (
    HELD_OUT_SEED, WORDS, Scene, Thing, draw_scene, is_held_out, make_scene, word_mask)

FILE = Path(__file__).parents[1] / "experiments" / "fig15_editing.py"
spec = importlib.util.spec_from_file_location("fig15", FILE)
fig15 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fig15)

SIZES = dict(latent_channels=4, context_dim=8, pooled_dim=8, pos_embed_max_size=4)
RED_CIRCLE = Thing("circle", "red", "small", 5, 6, 21)
BLUE_STAR = Thing("star", "blue", "medium", 34, 30, 25)
PAIR = Scene("pair", 64, 64, "white", (RED_CIRCLE, BLUE_STAR), "left of")
WORD = Scene("word", 64, 64, "black", (replace(RED_CIRCLE, left=20, top=3),), "above", "CAT")


def small_model():
    """A base model whose output is not zero, as it would be before any training."""
    model = MMDiT(MMDiTConfig(1, **SIZES))
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2, generator=rng)
    return model


def inputs(seed, count=2):
    """z, t, context, pooled, and a source."""
    rng = torch.Generator().manual_seed(seed)
    z, source = torch.randn(2, count, 4, 4, 4, generator=rng)
    t = torch.rand(count, generator=rng)
    context = torch.randn(count, 3, 8, generator=rng)
    return z, t, context, torch.randn(count, 8, generator=rng), source


def area_of(thing):
    """(64, 64) bool: the square that a thing is drawn in."""
    area = np.zeros((64, 64), dtype=bool)
    area[thing.top : thing.top + thing.diameter, thing.left : thing.left + thing.diameter] = True
    return area


def make(task, scene, seed=0):
    """(instruction, source, target scene, where the source differs from the target)."""
    instruction, source, target = fig15.TASKS[task](scene, np.random.default_rng(seed))
    return instruction, source, target, (source != draw_scene(target)).any(axis=2)


# --- The model ------------------------------------------------------------------------------------

def test_before_its_first_step_the_editor_is_the_base_model_whatever_the_source_is():
    base = small_model()
    z, t, context, pooled, source = inputs(1)
    editor = fig15.widen(base)
    before = base(z, t, context, pooled)
    assert before.std() > 0.1
    for scale in (0, 1, 1000):
        velocity = fig15.edit_velocity(editor, scale * source, z, t, context, pooled)
        assert velocity.shape == z.shape
        torch.testing.assert_close(velocity, before, rtol=0, atol=2e-6)
    assert base.x_embedder.proj.weight.shape[1] == 4                  # It is a copy.
    weight = editor.x_embedder.proj.weight
    assert weight[:, :4].equal(base.x_embedder.proj.weight) and not weight[:, 4:].any()


def test_the_new_weights_see_the_source_and_get_a_gradient():
    z, t, context, pooled, source = inputs(2)
    editor = fig15.widen(small_model().requires_grad_(False))
    fig15.edit_velocity(editor, source, z, t, context, pooled).square().mean().backward()
    gradient = editor.x_embedder.proj.weight.grad
    assert gradient[:, 4:].abs().min() > 0 and gradient[:, :4].abs().min() > 0
    for parameter in editor.parameters():
        assert parameter.requires_grad
    with torch.no_grad():
        editor.x_embedder.proj.weight[:, 4:] = 0.2 * torch.eye(64)[:, :16].view(64, 4, 2, 2)
    first = fig15.edit_velocity(editor, source, z, t, context, pooled)
    second = fig15.edit_velocity(editor, -source, z, t, context, pooled)
    assert (first - second).abs().mean() > 0.01


def test_both_copies_of_guidance_see_the_source_after_the_noised_latent():
    seen = []

    def model(joined, t, context, pooled):
        seen.append(joined)
        return joined[:, :4]
    z, t, context, pooled, source = inputs(3, count=4)
    fig15.edit_velocity(model, source[:2], z, t, context, pooled)
    joined, = seen
    assert joined[:, :4].equal(z)
    assert joined[:2, 4:].equal(source[:2]) and joined[2:, 4:].equal(source[:2])


def test_the_loss_is_zero_for_the_one_who_reads_the_answer_from_the_source():
    """If the source is the target, v = eps - x_0 = (z_t - source) / t. No other input gives it."""
    def reader(joined, t, context, pooled):
        z_t, source = joined.chunk(2, dim=1)
        return (z_t - source) / t.view(-1, 1, 1, 1)
    latent, noise, other = torch.randn(3, 8, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    uniform = torch.linspace(0.1, 0.9, 8)
    batch = fig15.EditBatch(latent, None, None, noise, uniform, source=latent)
    assert fig15.edit_loss(reader, batch, LogitNormal(), 2.0).max() < 1e-9
    batch = fig15.EditBatch(latent, None, None, noise, uniform, source=other)
    losses = fig15.edit_loss(reader, batch, LogitNormal(), 1.0)
    t = LogitNormal().quantile(uniform)                               # and alpha = 1 leaves it
    wanted = (latent - other).square().mean(dim=(1, 2, 3)) / t.square()
    torch.testing.assert_close(losses, wanted)


def test_an_editor_learns_to_copy_which_no_model_without_the_source_can():
    """If x_0 ~ N(0, I), the loss of Eq. 8 is at least 1 / ((1-t)^2 + t^2) >= 1 without the source.
    All data are new, so nothing is learned by heart."""
    torch.manual_seed(0)
    editor = fig15.widen(MMDiT(MMDiTConfig(1, **SIZES)))
    optimizer = torch.optim.AdamW(editor.parameters(), 1e-2)
    loss = partial(fig15.edit_loss, density=LogitNormal(), timestep_shift=1.0)
    losses = []
    for _ in range(120):
        latent, noise = torch.randn(2, 32, 4, 4, 4)
        batch = fig15.EditBatch(latent, torch.zeros(32, 1, 8), torch.zeros(32, 8), noise,
                                torch.rand(32), source=latent)
        losses.append(loss(editor, batch).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 1.5
    assert sum(losses[-10:]) / 10 < 0.8


# --- The tasks ------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", fig15.TASKS)
def test_the_target_succeeds_and_the_source_does_not(task):
    for index in range(5):
        edit = fig15.make_edit(task, HELD_OUT_SEED, index)
        success, kept_psnr = fig15.succeeds(edit, edit.target)
        assert success and kept_psnr > 99
        assert not fig15.succeeds(edit, edit.source)[0], edit.instruction
        assert edit.source.dtype == np.uint8 and edit.source.shape == (64, 64, 3)
        assert edit.kept.mean() > 0.02


@pytest.mark.parametrize("task, part", [("color", "color"), ("shape", "shape")])
def test_one_thing_changes_in_one_respect_and_the_instruction_says_so(task, part):
    changed = set()
    for seed in range(20):
        instruction, source, target, differs = make(task, PAIR, seed)
        assert (source == draw_scene(PAIR)).all()
        number = [a == b for a, b in zip(PAIR.things, target.things)].index(False)
        before, after = PAIR.things[number], target.things[number]
        assert after == replace(before, **{part: getattr(after, part)})
        assert target == replace(PAIR, things=target.things)
        assert target.things[1 - number] == PAIR.things[1 - number]
        assert f"{before.color} {before.shape}" in instruction
        assert instruction.split()[-1] == getattr(after, part) != getattr(before, part)
        assert differs.any() and not (differs & ~area_of(before)).any()
        changed.add(number)
    assert changed == {0, 1}


def test_a_removed_thing_leaves_the_rest():
    for seed in range(10):
        instruction, source, target, differs = make("remove", PAIR, seed)
        gone, = set(PAIR.things) - set(target.things)
        assert len(target.things) == 1 and (source == draw_scene(PAIR)).all()
        assert instruction.split()[-2:] == [gone.color, gone.shape]
        assert differs.any() and not (differs & ~area_of(gone)).any()


def test_an_added_thing_is_described_and_the_half_that_it_may_stand_in_is_free(monkeypatch):
    instruction, source, target, differs = make("add", PAIR)
    assert target == PAIR
    assert instruction[3:] == " a small red circle left of the blue star"
    assert (source == draw_scene(replace(PAIR, things=(BLUE_STAR,)))).all()
    assert make("add", WORD)[0].endswith("a small red circle above the word")
    assert fig15.TASKS["add"](replace(PAIR, kind="single", relation=""), None) is None
    monkeypatch.setattr(fig15, "make_scene", lambda *_: PAIR)
    kept = fig15.make_edit("add", 0, 0).kept
    assert not kept[:, :32].any() and kept[:, 32:].all()
    monkeypatch.setattr(fig15, "make_scene", lambda *_: replace(PAIR, relation="below"))
    kept = fig15.make_edit("add", 0, 0).kept
    assert not kept[32:].any()


def test_a_new_background_changes_nothing_else():
    instruction, source, target, differs = make("background", PAIR)
    assert target == replace(PAIR, background=target.background)
    assert instruction.split()[-1] == target.background != "white"
    assert (source == draw_scene(PAIR)).all() and differs[0].all() and not differs[43, 46]


def test_inpainting_hides_one_thing_under_gray_and_names_it():
    for seed in range(10):
        instruction, source, target, differs = make("inpainting", PAIR, seed)
        hidden = RED_CIRCLE if "circle" in instruction else BLUE_STAR
        name = f"{hidden.size} {hidden.color} {hidden.shape}"
        assert instruction == f"fill the gray square with a {name}" and target == PAIR
        assert (source[area_of(hidden)] == 128).all()
        assert differs.sum() == (hidden.diameter + 4) ** 2
    assert fig15.TASKS["inpainting"](replace(PAIR, background="gray"), None) is None


def test_segmentation_is_the_named_thing_in_white_on_black():
    instruction, source, target, _ = make("segmentation", PAIR)
    named = RED_CIRCLE if instruction == "segment the red circle" else BLUE_STAR
    picture = draw_scene(target)
    inside = area_of(named)
    assert (source == draw_scene(PAIR)).all()
    assert not picture[~inside].any()
    assert (picture[named.top + named.diameter // 2, named.left + named.diameter // 2] == 255).all()


@pytest.mark.parametrize("task", ["colorization", "deblurring", "outlines"])
def test_a_filtered_picture_has_the_scene_as_its_target(task):
    instruction, source, target, differs = make(task, PAIR)
    assert target == PAIR
    told = "a small red circle left of a medium blue star on a white background"
    assert instruction == {"colorization": f"colorize {told}", "deblurring": "deblur",
                           "outlines": told}[task]
    if task == "colorization":
        assert (source == source[..., :1]).all()
        assert (source == np.array(Image.fromarray(draw_scene(PAIR)).convert("L"))[..., None]).all()
    if task == "deblurring":
        steps = [abs(np.diff(picture.astype(int), axis=1)).max()
                 for picture in (source, draw_scene(PAIR))]
        assert 0 < steps[0] < steps[1] / 4
    if task == "outlines":
        assert set(np.unique(source)) == {0, 255} and (source == source[..., :1]).all()
        assert not source[16, 15].any() and not source[0].any()       # inside, and outside
        assert source[16].any(axis=1).sum() >= 2                      # both sides of the circle


def test_no_training_task_changes_a_word():
    """Whatever a training task makes of scenes with words, their word is the same, or it is gone
    with all else in a segmentation; and no instruction names another word."""
    seen = 0
    for index in range(600):
        scene = make_scene(7, index)
        if not scene.word:
            continue
        for task in fig15.TRAINED:
            if task in fig15.NAMING and not scene.things:
                continue
            made = fig15.TASKS[task](scene, np.random.default_rng(index))
            if made is None:
                continue
            seen += 1
            instruction, source, target = made
            if task != "segmentation":
                assert (target.word, target.background) == (scene.word, scene.background)
            told = set(instruction.split()) & set(WORDS)
            assert told <= {scene.word} and (not told or task in ("colorization", "outlines"))
            if task in ("color", "shape", "remove", "add", "inpainting"):
                ink = word_mask(scene.word, scene.relation, 64, 64) > 0
                assert (source[ink] == draw_scene(scene)[ink]).all(), task
    assert seen > 300
    assert not set(fig15.TRAINED) & {"change a word", "add a word"}


def test_words_change_in_the_zero_shot_tasks_alone():
    instruction, source, target, differs = make("change a word", WORD)
    assert target == replace(WORD, word=target.word) and target.word != "CAT"
    assert instruction in (f"change the word to {target.word}", f"write {target.word} instead")
    ink = word_mask("CAT", "above", 64, 64) + word_mask(target.word, "above", 64, 64)
    assert not (differs & (ink == 0)).any()
    instruction, source, target, differs = make("add a word", WORD)
    assert target == WORD and (source == draw_scene(replace(WORD, word=""))).all()
    assert "CAT" in instruction and instruction.endswith("below the red circle")
    assert fig15.TASKS["change a word"](PAIR, None) is None
    assert fig15.TASKS["add a word"](replace(WORD, things=(), relation=""), None) is None


def test_targets_have_no_combination_that_training_leaves_out():
    edits = [fig15.make_edit(task, 0, index) for task in fig15.TASKS for index in range(60)]
    for edit in edits:
        things = edit.scene.things
        shapes = [thing.shape for thing in things]
        colors = [thing.color.replace("white", "") for thing in things]
        assert not is_held_out(shapes, colors, edit.scene.relation), edit.instruction
        if edit.scene.kind == "pair" and len(things) == 2:
            assert len(set(zip(shapes, colors))) == 2
    assert len({edit.instruction for edit in edits[60:120]}) > 50
    assert edits[60].scene != fig15.make_edit("shape", 1, 0).scene != edits[0].scene
    same = [edits[7 * 60 + i].scene == edits[9 * 60 + i].scene for i in range(60)]
    assert not any(same)                                              # Each task has its scenes.
    again = fig15.make_edit("shape", 0, 59)
    assert again.instruction == edits[119].instruction and again.scene == edits[119].scene


# --- Training data, scores and verdicts -----------------------------------------------------------

def pairs(count):
    """What encode_pairs returns; the numbers tell which pair a row is of."""
    numbers = 1 + torch.arange(float(count))
    return {"latent": numbers.view(-1, 1, 1, 1).expand(-1, 4, 4, 4),
            "source": -numbers.view(-1, 1, 1, 1).expand(-1, 4, 4, 4),
            "context": numbers.view(-1, 1, 1).expand(-1, 3, 8).half(),
            "pooled": numbers.view(-1, 1).expand(-1, 8)}


def test_a_batch_keeps_pairs_together_and_drops_some_texts_whole():
    options = fig15.Options(batch_size=2000, text_dropout=0.25)
    batch = fig15.make_batch(3, pairs(50), options, "cpu")
    assert batch.source.equal(-batch.latent)
    number = batch.latent[:, 0, 0, 0]
    given = batch.pooled[:, 0] > 0
    assert 0.7 < given.float().mean() < 0.8
    assert (batch.pooled[given] == number[given, None]).all()
    assert (batch.context[given] == number[given, None, None]).all()
    assert not batch.pooled[~given].any() and not batch.context[~given].any()
    assert abs(batch.noise.mean()) < 0.02 and abs(batch.noise.std() - 1) < 0.02
    assert len(number.unique()) == 50 and 0.45 < batch.uniform.mean() < 0.55
    assert fig15.make_batch(3, pairs(50), options, "cpu").noise.equal(batch.noise)
    assert not fig15.make_batch(4, pairs(50), options, "cpu").noise.equal(batch.noise)


@pytest.fixture(scope="module")
def pipeline():
    return fig15.load(fig15.SHIPPED, "cpu", "fp32", networks=("vae", "text"))


def test_encoded_pairs_are_the_training_edits_in_their_order(pipeline):
    encoded = fig15.encode_pairs(65, 4, pipeline)
    assert {len(tensor) for tensor in encoded.values()} == {65}
    for index in (0, 3, 64):
        edit = fig15.make_edit(fig15.TRAINED[index % 10], 4, index)
        for name, picture in (("latent", edit.target), ("source", edit.source)):
            latent = fig15.to_latents([picture], pipeline)[0]
            assert (encoded[name][index] - latent).abs().mean() < 0.02
        context, pooled = pipeline.text([edit.instruction])
        assert (encoded["context"][index].float() - context[0]).abs().mean() < 0.02
        assert (encoded["pooled"][index] - pooled[0]).abs().mean() < 0.02


def test_training_draws_t_from_the_density_and_shifts_it(monkeypatch):
    """u = 1/2 is t = sigmoid(m) = 2/3 for m = log 2, and 3 t / (1 + 2 t) = 6/7."""
    seen = []

    def fit(model, loss, batches, config, run):
        batch = batches(0)
        batch.uniform[:] = 0.5
        loss(model, batch)
        return config

    def model(joined, t, context, pooled):
        seen.append(t)
        return joined[:, :4]
    monkeypatch.setattr(fig15, "fit", fit)
    options = fig15.Options(timestep_shift=3.0, density="lognorm(0.6931472, 1)",
                            batch_size=5, lr=0.5, steps=7, seed=2)
    config = fig15.train(model, pairs(4), options, fig15.World("cpu"))
    assert seen[0].tolist() == pytest.approx([6 / 7] * 5)
    assert (config.lr, config.steps, config.batch_size, config.seed) == (0.5, 7, 5, 2)


def test_an_editor_is_asked_about_each_source_with_its_own_instruction(pipeline):
    """v = (z - source) / t leads any noise to the source on a straight line."""
    told = []

    def reader(joined, t, context, pooled):
        z, source = joined.chunk(2, dim=1)
        told.append(pooled)
        return (z - source) / t.view(-1, 1, 1, 1)
    edits = [fig15.make_edit("color", 5, index) for index in range(3)]
    settings = fig15.Settings(num_steps=2, guidance_scale=2.0, unconditional="zeros", height=64,
                              width=64)
    pictures = fig15.answer(reader, edits, pipeline, settings, together=2)
    for edit, picture in zip(edits, pictures, strict=True):
        error = abs(np.asarray(picture).astype(int) - edit.source).mean()
        assert error < 6, edit.instruction
    pooled = pipeline.text([edit.instruction for edit in edits])[1]
    assert len(told) == 4
    for seen, wanted in ((told[0], pooled[:2]), (told[2], pooled[2:])):
        count = len(wanted)
        assert (seen[:count] - wanted).abs().mean() < 0.02 and not seen[count:].any()


def test_a_success_has_the_right_things_at_the_right_places():
    instruction, source, target, differs = make("color", PAIR)
    edit = fig15.Edit("color", instruction, source, target, ~differs)
    assert fig15.succeeds(edit, edit.target)[0]
    first, second = target.things
    for wrong in (
            replace(target, things=(first, replace(second, top=second.top - 12))),    # it moved
            replace(target, things=(replace(first, color="green"), second)),
            replace(target, things=(replace(first, shape="heart"), second)),
            replace(target, things=(first,)),
            replace(target, background="gray")):
        assert not fig15.succeeds(edit, draw_scene(wrong))[0]
    moved = draw_scene(replace(target, things=(first, replace(second, top=second.top - 12))))
    free = replace(edit, kept=np.zeros((64, 64), dtype=bool))
    free.kept[0, 0] = True
    assert fig15.succeeds(free, moved)[0]                             # by the strict score alone


def test_newcombes_interval_as_he_published_it():
    """Newcombe 1998, Table II (d), method 10: 9/10 - 3/10 has .1705 to .8090."""
    assert fig15.gain(0.9, 0.3, 10) == pytest.approx((0.1705, 0.8090), abs=1e-4)


@pytest.mark.parametrize("low, high, verdict", [
    (0.06, 0.3, "held"), (0.06, 0.09, "held"),
    (0.01, 0.09, "did not hold at this size"), (-0.01, 0.09, "did not hold at this size"),
    (-0.3, -0.1, "did not hold at this size"), (-0.01, 0.2, "cannot be told"),
    (0.04, 0.2, "cannot be told")])
def test_verdicts_by_hand(low, high, verdict):
    assert fig15.judge(low, high) == verdict


def test_each_claim_reads_its_own_tasks_and_the_best_control():
    def table(default, **others):
        shares = dict.fromkeys(fig15.TASKS, default) | others
        return {task: {"n": 100, "rate": share} for task, share in shares.items()}
    found = {"editor": table(0.0, color=1.0, shape=0.5, inpainting=0.25, **{"add a word": 0.5}),
             "base": table(0.0, **{"add a word": 0.4}), "source": table(0.0, inpainting=0.5),
             "editor, other text": table(0.0, color=0.1), "target through the VAE": table(1.0)}
    edits, pictures, changed, added = fig15.claims(found)
    assert edits["here"] == "0.300 of 500; the best control 0.020" and edits["verdict"] == "held"
    assert pictures["here"] == "0.050 of 500; the best control 0.100"
    assert pictures["verdict"] == "did not hold at this size" and pictures["interval"][1] < 0
    assert changed["here"].startswith("0.000 of 100") and changed["interval"] == [-0.037, 0.037]
    assert changed["verdict"] == "did not hold at this size"
    assert added["verdict"] == "cannot be told"                       # .5 against .4 of 100


def test_other_texts_are_of_the_same_task_and_never_the_edits_own():
    edits = []
    for task, instruction in (("color", "a"), ("color", "a"), ("color", "b"), ("deblurring", "c"),
                              ("deblurring", "c")):
        edits.append(fig15.Edit(task, instruction, None, None, None))
    changed = fig15.exchange_texts(edits)
    assert [edit.instruction for edit in changed] == ["b", "b", "a", "c", "c"]
    assert [edit.task for edit in changed] == [edit.task for edit in edits]
    assert [edit.instruction for edit in edits] == ["a", "a", "b", "c", "c"]


def test_a_tiny_run_writes_numbers_claims_and_pictures(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    sees_source = []

    def watched(model, *others, answer=fig15.answer):
        sees_source.append(model.x_embedder.proj.weight[:, 16:].any().item())
        settings = others[-1]
        assert (settings.num_steps, settings.guidance_scale) == (1, 1.5)
        return answer(model, *others)
    monkeypatch.setattr(fig15, "answer", watched)
    out = tmp_path / "fig15.json"
    fig15.main(["--num-pairs", "10", "--steps", "1", "--batch-size", "2", "--num-cases", "1",
                "--num-steps", "1", "--guidance-scale", "1.5", "--device", "cpu", "--out",
                str(out)])
    assert sees_source == [False, True, True]                         # base, editor, other text
    record = json.loads(out.read_text())
    assert list(record["tasks"]) == list(fig15.ANSWERS) and len(record["claims"]) == 4
    assert set(record["tasks"]["editor"]) == set(fig15.TASKS)
    for task in fig15.TASKS:
        assert record["tasks"]["source"][task]["rate"] == 0
        assert record["tasks"]["editor"][task]["n"] == 1
    through = record["tasks"]["target through the VAE"]
    assert sum(through[task]["rate"] for task in fig15.TASKS) >= 11
    assert record["settings"]["init"] == "pretrained/tiny/model.safetensors"
    assert out.with_suffix(".png").read_bytes()[1:4] == b"PNG"
    assert out.with_suffix(".png").stat().st_size < 2**18
    assert "adding a word, zero-shot" in capsys.readouterr().out


@pytest.mark.parametrize("words, message", [
    (["--seed", str(HELD_OUT_SEED)], "choose another"),
    (["--num-pairs", "0"], "--num-pairs"),
    (["--density", "flat"], "no density")])
def test_what_cannot_be_measured_is_refused(words, message):
    with pytest.raises(ValueError, match=message):
        fig15.read_options(fig15.Options, "", words, quick=fig15.QUICK, full=fig15.FULL)
