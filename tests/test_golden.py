"""Parity with public implementations: small random-weight checkpoints in the released formats and what others compute.

Every case folder under tests/golden, under $GOLDEN_DIR, or, without that, under ../shared/golden beside the repository is
run. Sizes come from meta.json and the tensors; the kind of a case is recognised by the tensors it stores. Within a case
the intermediate results are compared in the order in which they are computed, so that a failure names the first one that
differs.
"""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import flow
from checkpoints import open_model, read_network, to_diffusers, verify
from mmdit import crop_center, paper_positions, released_positions, sincos_2d, timestep_embedding
from sample import Settings, sample_latents
from text_encoders import TextConfig, TextEncoders, relative_position_bucket
from vae import sample_code

HERE = Path(__file__).parent
ELSEWHERE = os.environ.get("GOLDEN_DIR") or HERE.parent.parent / "shared" / "golden"
KINDS = {"r0.out": "mmdit", "sd3_pooled": "clip", "short.out": "t5", "sq.moments": "vae", "ids.cond.t5": "bundle",
         "logit_normal.pdf": "flow", "time.emb256": "embeddings"}         # a tensor that only this kind stores


class Case:
    """One folder: its weights, `io` tensors in the precision they were computed in, and what it allows."""

    def __init__(self, folder):
        self.name, self.weights = folder.name, folder / "weights.safetensors"
        self.meta = json.loads((folder / "meta.json").read_text())
        self.config = self.meta.get("config", {})
        self.io = {name: x.float() if x.dtype == torch.float16 else x
                   for name, x in load_file(folder / "io.safetensors").items()}

    def network(self, name, prefix=""):
        return read_network(name, self.weights, prefix=prefix)

    def check(self, name, ours, atol=None, rtol=None):
        """|ours - stored| <= atol + rtol |stored|, with what meta.json says unless it is given here."""
        stored, allowed = self.io[name], self.meta["tolerances"]
        atol = allowed["atol"][name] if atol is None else atol
        rtol = allowed["rtol"] if rtol is None else rtol
        assert ours.shape == stored.shape, f"{self.name}: {name} is {tuple(ours.shape)}, expected {tuple(stored.shape)}"
        difference = (ours.double() - stored.double()).abs()
        beyond = difference - (atol + rtol * stored.double().abs())
        assert beyond.max() <= 0, (f"{self.name}: {name} differs by up to {difference.max():.2e} (allowed: {atol:g} + {rtol:g} of"
                                   f" the value), in {(beyond > 0).sum()} of {beyond.numel()} numbers")


def case_folders():
    """Every folder with a meta.json, the ones that are in the repository first."""
    return sorted(HERE.glob("golden/*/meta.json")) + sorted(Path(ELSEWHERE).glob("*/meta.json"))


def kind_of(folder):
    """A key of the tests below, "diffusers" for folders of another layout."""
    if not (folder / "io.safetensors").is_file():
        return "diffusers"
    names = load_file(folder / "io.safetensors").keys()
    return next((kind for name, kind in KINDS.items() if name in names), "unknown")


FOLDERS = [(meta.parent, kind_of(meta.parent)) for meta in case_folders()]


def cases(kind):
    """Parametrises a test with the cases of one kind; without any, pytest shows the test as skipped."""
    chosen = [folder for folder, its in FOLDERS if its == kind]
    names = [f"{folder.name}{'' if folder.is_relative_to(HERE) else '-elsewhere'}" for folder in chosen]
    return pytest.mark.parametrize("case", chosen, ids=names, indirect=True)


@pytest.fixture
def case(request):
    with torch.no_grad():
        yield Case(request.param)


def test_every_golden_case_is_of_a_known_kind():
    assert FOLDERS, f"no golden data under {HERE / 'golden'} or {ELSEWHERE}"
    assert [folder for folder, kind in FOLDERS if kind == "unknown"] == []


# ------------------------------------------------------------------------------------------------------------
# MM-DiT (cases a, b, c)
# ------------------------------------------------------------------------------------------------------------

def mmdit_parts(model, x, t, context, pooled):
    """What the model computes on its way, in that order."""
    seen = {}
    keep = lambda name: lambda module, inputs, output: seen.update({name: output})
    hooks = [model.joint_blocks[0].register_forward_hook(keep("block0")),
             model.final_layer.register_forward_hook(keep("tokens_out"))]
    out = model(x, t, context, pooled)
    for hook in hooks:
        hook.remove()
    return {"t_emb": model.t_embedder(timestep_embedding(t)), "tokens_in": model.embed_image(x),
            "cond": model.embed_cond(t, pooled), "context_in": model.embed_text(context)[0],
            "block0.context": seen["block0"][0], "block0.x": seen["block0"][1], "tokens_out": seen["tokens_out"], "out": out}


@cases("mmdit")
def test_mmdit_equals_the_reference_from_tokens_to_velocity(case):
    model = case.network("mmdit", prefix="model.diffusion_model.")
    assert (model.config.depth, model.config.latent_channels, model.config.context_dim, model.config.pooled_dim) == tuple(
        case.config[key] for key in ("depth", "in_channels", "context_dim", "pooled_dim"))
    for run in (run["name"] for run in case.meta["runs"]):
        x, t, context, pooled = (case.io[f"{run}.{part}"] for part in ("x", "sigma", "context", "y"))
        parts = mmdit_parts(model, x, t, context, pooled)
        for part, ours in parts.items():
            if f"{run}.{part}" in case.io:
                case.check(f"{run}.{part}", ours)


@cases("mmdit")
def test_prepared_mmdit_equals_the_plain_forward_pass(case):
    model = case.network("mmdit", prefix="model.diffusion_model.")
    for run in (run["name"] for run in case.meta["runs"]):
        x, times, context, pooled = (case.io[f"{run}.{part}"] for part in ("x", "sigma", "context", "y"))
        prepared = model.prepare(context, pooled, times)
        for t in times:
            t = t.expand(len(x))
            torch.testing.assert_close(model(x, t, prepared), model(x, t, context, pooled), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------
# Text encoders (d, e, f)
# ------------------------------------------------------------------------------------------------------------

@cases("clip")
def test_clip_equals_the_reference_layer_by_layer(case):
    which = "clip_l" if case.config["hidden_act"] == "quick_gelu" else "clip_g"
    clip, ids = case.network(which), case.io["input_ids"]
    seen = []
    clip.layers[0].register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0], output]))
    penultimate, pooled, last = clip(ids)
    case.check("embeddings", seen[0][:1])
    case.check("layer0", seen[1][:1])
    case.check("penultimate", penultimate)
    case.check("last_hidden_state", last)
    case.check("pooled", last[torch.arange(len(ids)), torch.tensor(case.meta["eos_positions"])])
    case.check("sd3_pooled", pooled)
    case.check("pooled_projected", pooled)                   # CLIP-L has no projection: the same vector


@cases("t5")
def test_t5_equals_the_reference_layer_by_layer(case):
    t5 = case.network("t5")
    case.check("short.position_bias", t5.attention_bias(case.io["short.input_ids"].shape[1]))
    seen = []
    t5.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    for length in case.meta["lengths"]:
        seen.clear()
        out = t5(case.io[f"{length}.input_ids"])
        if f"{length}.block0" in case.io:
            case.check(f"{length}.block0", seen[0])
        case.check(f"{length}.out", out)


@cases("t5")
def test_t5_masked_equals_the_reference_where_something_attends(case):
    mask = case.io["short.attention_mask"]
    ours = case.network("t5")(case.io["short.input_ids"], mask)
    case.check("short.out_masked", torch.where(mask.bool()[..., None], ours, case.io["short.out_masked"]))


@cases("t5")
def test_t5_position_buckets_equal_the_reference(case):
    ours = relative_position_bucket(case.io["relative_position"], case.config["relative_attention_num_buckets"],
                                    case.config["relative_attention_max_distance"])
    assert torch.equal(ours, case.io["relative_position_bucket"])


# ------------------------------------------------------------------------------------------------------------
# Autoencoder (g)
# ------------------------------------------------------------------------------------------------------------

@cases("vae")
def test_vae_equals_the_reference(case):
    vae, io = case.network("vae", prefix="first_stage_model."), case.io
    assert (vae.config.vae_scale, vae.config.vae_shift) == (case.config["scale_factor"], case.config["shift_factor"])
    assert vae.config.latent_channels == case.config["z_channels"]
    seen, keep = {}, lambda name: lambda module, inputs, output: seen.update({name: output[:1]})
    middle = {"enc.down0": vae.encoder.down[0], "enc.mid_attn": vae.encoder.mid.attn_1, "enc.mid": vae.encoder.mid,
              "dec.mid": vae.decoder.mid, f"dec.up{len(vae.decoder.up) - 1}": vae.decoder.up[-1]}
    for name, module in middle.items():
        module.register_forward_hook(keep(name))
    for picture in sorted(name.removesuffix(".moments") for name in io if name.endswith(".moments")):
        moments, (mean, logvar) = vae.encoder(io[f"{picture}.image"]), vae.encode_moments(io[f"{picture}.image"])
        decoded = vae.decoder(io[f"{picture}.z"])
        for name in middle:
            if f"{picture}.{name}" in io:
                case.check(f"{picture}.{name}", seen[name])
        for name, ours in (("moments", moments), ("mean", mean), ("logvar", logvar), ("decoded", decoded)):
            case.check(f"{picture}.{name}", ours)
        torch.testing.assert_close(vae.decode(vae.normalize(io[f"{picture}.z"])), decoded, rtol=1e-4, atol=1e-4)


@cases("vae")
def test_vae_samples_and_normalises_as_the_reference(case):
    vae, io = case.network("vae", prefix="first_stage_model."), case.io
    case.check("sq.sample", sample_code(io["sq.mean"], io["sq.logvar"], io["sq.eps"]))
    case.check("sq.latent_in", vae.normalize(io["sq.sample"]))
    case.check("sq.latent_out", vae.denormalize(io["sq.z"]))


# ------------------------------------------------------------------------------------------------------------
# A whole model in one file (i)
# ------------------------------------------------------------------------------------------------------------

def load_bundle(case):
    """(mmdit, vae, text) of a single file with the prefixes of the released ones."""
    parts = {name: case.network(name, prefix) for name, prefix in case.meta["prefixes"].items()}
    encoders = {name: parts[name] for name in ("clip_l", "clip_g", "t5")}
    widths = {f"{name}_width": encoder.config.hidden_size for name, encoder in encoders.items()}
    config = TextConfig(**widths, clip_length=case.io["ids.cond.l"].shape[1], t5_length=case.io["ids.cond.t5"].shape[1])
    return parts["mmdit"], parts["vae"], TextEncoders(encoders, {}, config)


def encode_bundle_ids(case, text, which):
    return text.encode_ids({"clip_l": case.io[f"ids.{which}.l"], "clip_g": case.io[f"ids.{which}.g"],
                            "t5": case.io[f"ids.{which}.t5"]})


@cases("bundle")
def test_bundle_token_ids_become_the_references_context_and_pooled(case):
    _, _, text = load_bundle(case)
    for which in ("cond", "uncond"):
        context, pooled = encode_bundle_ids(case, text, which)
        case.check(f"{which}.context", context)
        case.check(f"{which}.pooled", pooled)


@cases("bundle")
@pytest.mark.parametrize("reference, schedule", [("sd35", "released"), ("diffusers", "released"), ("linear", "shifted")])
def test_bundle_samples_the_references_latent_and_picture(case, reference, schedule):
    mmdit, vae, text = load_bundle(case)
    settings = case.meta["sampling"]
    cond, uncond = (encode_bundle_ids(case, text, which) for which in ("cond", "uncond"))
    times = flow.make_schedule(schedule, settings["steps"], settings["shift"])
    case.check(f"{reference}.sigmas", times)
    if reference == "sd35":
        first = times[:1]
        case.check("step0.velocity_cond", mmdit(case.io["noise"], first, *cond))
        case.check("step0.velocity_uncond", mmdit(case.io["noise"], first, *uncond))
    velocity = lambda z, t: flow.guide(mmdit(z, t, *cond), mmdit(z, t, *uncond), settings["cfg_scale"])
    steps = [z for z, _ in flow.solver_steps("euler", velocity, case.io["noise"], times)]
    if reference == "sd35":
        case.check("sd35.trajectory", torch.cat(steps))
    case.check(f"{reference}.latent", steps[-1])
    ours = Settings(settings["steps"], settings["cfg_scale"], settings["shift"], schedule)
    case.check(f"{reference}.latent", sample_latents(mmdit, cond, uncond, case.io["noise"], ours)[0])
    if reference != "linear":
        levels = (vae.decode(steps[-1])[0].clamp(-1, 1) + 1) * 127.5              # sd3.5 truncates, diffusers rounds, as we do
        ours = levels.trunc() if reference == "sd35" else levels.round()
        difference = (ours.permute(1, 2, 0) - case.io[f"{reference}.image_u8"].float()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() <= 0.01
    if reference == "diffusers":
        case.check("diffusers.timesteps", 1000 * times[:-1])
    if reference == "sd35":
        case.check("sd35.vae_input", vae.denormalize(steps[-1]))
        case.check("sd35.image", vae.decode(steps[-1]))                          # not clamped
        case.check("dpmpp_2m.latent", flow.last_of(flow.solver_steps("dpm++2m", velocity, case.io["noise"], times)))


# ------------------------------------------------------------------------------------------------------------
# Flow formulae (j), position tables and time embedding (k)
# ------------------------------------------------------------------------------------------------------------

def numbered(case, stem, ends_with):
    """The stored names stem0, stem1, ... as far as they go."""
    count = sum(name.startswith(stem) and name.endswith(ends_with) for name in case.io)
    assert count, f"{case.name} has no {stem}N{ends_with}"
    return [f"{stem}{i}" for i in range(count)]


@cases("flow")
def test_eq19_density_and_quantile_equal_the_reference(case):
    rows, t, q = case.io["logit_normal.params"].tolist(), case.io["t"], case.io["logit_normal.q"]
    densities = [flow.LogitNormal(mean, std) for mean, std in rows]
    case.check("logit_normal.cdf", torch.stack([density.cdf(t) for density in densities]), atol=1e-12, rtol=1e-7)
    case.check("logit_normal.pdf", torch.stack([density.pdf(t) for density in densities]), atol=1e-12, rtol=1e-7)
    case.check("logit_normal.quantile", torch.stack([density.quantile(q) for density in densities]), atol=1e-12, rtol=1e-7)


@cases("flow")
def test_eq23_shift_and_the_shifted_density_equal_the_reference(case):
    alphas, t = case.io["shift.alpha"].tolist(), case.io["t"]
    shifted = torch.stack([flow.shift_time(t, alpha) for alpha in alphas])
    densities = torch.stack([flow.Shifted(flow.LogitNormal(), alpha).pdf(t) for alpha in alphas])
    case.check("shift.t", shifted, atol=1e-12, rtol=1e-9)
    case.check("shift.logsnr", 2 * torch.log((1 - shifted) / shifted), atol=1e-7, rtol=1e-7)
    case.check("shift.logit_normal_pdf", densities, atol=1e-12, rtol=1e-7)


@cases("flow")
def test_sampling_schedules_equal_the_references(case):
    for name in numbered(case, "sched", ".steps"):
        steps, shift = int(case.io[f"{name}.steps"]), float(case.io[f"{name}.shift"])
        for schedule, references in (("released", ("sd35", "diffusers")), ("shifted", ("linear",))):
            for reference in references:
                case.check(f"{name}.{reference}", flow.make_schedule(schedule, steps, shift), atol=5e-7, rtol=0)


@cases("flow")
def test_euler_on_gaussian_data_equals_the_reference(case):
    mean, std = case.io["gauss.params"].tolist()
    noise = case.io["gauss.z1"].view(-1, 1, 1, 1)
    for name in numbered(case, "gauss", ".steps"):
        times = flow.shifted_schedule(int(case.io[f"{name}.steps"]), float(case.io[f"{name}.shift"]))
        ours = flow.last_of(flow.solver_steps("euler", lambda z, t: flow.gaussian_velocity(z, t, mean, std), noise, times))
        case.check(f"{name}.x0", ours.flatten(), atol=5e-6, rtol=1e-5)           # ours is fp32, the reference fp64
    velocity = lambda z, t: flow.gaussian_velocity(z, t, mean, std)
    exact = flow.last_of(flow.solver_steps("rk4", velocity, noise.double(), flow.shifted_schedule(200)))
    case.check("gauss.x0_exact", exact.flatten(), atol=1e-6, rtol=1e-6)


@cases("flow")
def test_eq20_to_22_mode_and_cosmap_equal_the_reference(case):
    t, modes = case.io["t"], [flow.Mode(s) for s in case.io["mode.s"].tolist()]
    case.check("mode.f", torch.stack([flow.mode_map(case.io["mode.u"], m.mode_scale) for m in modes]), atol=1e-12, rtol=1e-9)
    case.check("mode.finv", torch.stack([flow.mode_map_inverse(t, m.mode_scale) for m in modes]), atol=1e-12, rtol=1e-9)
    case.check("mode.pdf", torch.stack([m.pdf(t) for m in modes]), atol=1e-12, rtol=1e-7)
    case.check("cosmap.f", flow.CosMap().quantile(case.io["cosmap.u"]), atol=1e-12, rtol=1e-9)
    case.check("cosmap.finv", flow.CosMap().cdf(t), atol=1e-12, rtol=1e-9)
    case.check("cosmap.pdf", flow.CosMap().pdf(t), atol=1e-12, rtol=1e-9)


@cases("flow")
def test_eq13_14_and_17_paths_equal_the_reference(case):
    t, rows = case.io["t"], case.io["edm.params"].tolist()
    paths = {"rf": flow.Straight(), "cosine": flow.Cosine(), **{f"edm{i}": flow.EDM(*row) for i, row in enumerate(rows)}}
    for name, path in paths.items():
        (a, b), (a_slope, b_slope), snr_slope = path.scales(t), path.slopes(t), path.log_snr_slope(t)
        ours = {"a": a, "b": b, "da": a_slope, "db": b_slope, "logsnr": path.log_snr(t), "dlogsnr": snr_slope,
                "w_cfm": -0.5 * snr_slope * b.square()}
        for key, value in ours.items():
            case.check(f"{name}.{key}", value, atol=1e-12, rtol=1e-8)
    for i, row in enumerate(rows):
        case.check(f"edm{i}.w", flow.edm_weight(paths[f"edm{i}"].log_snr(t), *row), atol=1e-12, rtol=1e-8)
    for name, other in (("edm_rf", flow.Straight()), ("edm_cos", flow.Cosine())):
        case.check(f"{name}.b", flow.MatchedEDM(other).scales(t)[1], atol=1e-12, rtol=1e-9)


@cases("flow")
def test_linear_path_at_its_knots_equals_the_reference(case):
    path, t = flow.Linear(), torch.arange(1, 1001, dtype=torch.float64) / 1000
    for name, value in zip(("a", "b", "logsnr"), (*path.scales(t), path.log_snr(t))):
        case.check(f"ldm_linear.{name}", value, atol=1e-10, rtol=1e-8)


@cases("flow")
def test_eq18_weights_equal_the_reference(case):
    t = case.io["t"]
    groups = {"w.rf": [flow.Uniform()], "w.rf_cosmap": [flow.CosMap()],
              "w.rf_logit_normal": [flow.LogitNormal(*row) for row in case.io["logit_normal.params"].tolist()],
              "w.rf_mode": [flow.Mode(s) for s in case.io["mode.s"].tolist()]}
    for name, densities in groups.items():
        weights = torch.stack([flow.RectifiedFlow(density).weight(t) for density in densities])
        case.check(name, weights.view(case.io[name].shape), atol=1e-12, rtol=1e-7)
    for name, factor in (("eps", 1 / math.pi), ("v", 2 / math.pi)):
        case.check(f"cosine.w_{name}", flow.formulation(f"{name}/cos").weight(t) / factor, atol=1e-12, rtol=1e-8)


@cases("flow")
def test_eq9_and_10_velocities_equal_the_reference(case):
    t, latent, noise = case.io["conv.t"], case.io["conv.x0"], case.io["conv.eps"]
    paths = {"rf": flow.Straight(), "cosine": flow.Cosine(), "edm0": flow.EDM(*case.io["edm.params"][0].tolist())}
    for name, path in paths.items():
        z = flow.diffuse(latent, noise, *path.scales(t))
        case.check(f"conv.{name}.z", z, atol=1e-12, rtol=1e-8)
        case.check(f"conv.{name}.u", flow.conditional_velocity(z, noise, t, path), atol=1e-10, rtol=1e-7)
        case.check(f"conv.{name}.u", flow.conditional_velocity_snr(z, noise, t, path), atol=1e-10, rtol=1e-7)


@cases("embeddings")
def test_position_tables_and_their_crops_equal_the_reference(case):
    params, tables = case.meta["params"], {}
    for name, p in params.items():
        if name.startswith("pos."):
            positions = released_positions(p["grid"], p.get("base", p["grid"]))
            if "offset" in p:
                positions = torch.arange(p["grid"], dtype=torch.float64) / p["scale"] - p["offset"]
            tables[name] = sincos_2d(positions, positions, p["dim"])
            case.check(name, tables[name])
    for name in numbered(case, "crop", ".pos"):
        height, width = case.io[f"{name}.hw"].tolist()
        case.check(f"{name}.pos", crop_center(tables["pos.scaled"][None], height, width)[0])


@cases("embeddings")
def test_paper_positions_equal_the_formula_of_sec_5_3_2(case):
    for name in numbered(case, "paper", ".positions"):
        case.check(f"{name}.positions", paper_positions(*case.io[f"{name}.size_hmax"].tolist()))


@cases("embeddings")
def test_time_embedding_equals_the_exact_one_to_fp32(case):
    """time.t is what the sinusoids see, 1000 times our t."""
    ours = timestep_embedding(case.io["time.t"] / 1000)
    fp32_error = case.meta["tolerances"]["atol"]["time.emb256 against exact"]
    case.check("time.emb256_exact", ours, atol=fp32_error)
    case.check("time.emb256", ours, atol=fp32_error)


# ------------------------------------------------------------------------------------------------------------
# The diffusers layout (h, h2): the same weights as another case, in another form
# ------------------------------------------------------------------------------------------------------------

DIFFUSERS = [folder for folder, kind in FOLDERS if kind == "diffusers"]


@pytest.mark.parametrize("folder", DIFFUSERS, ids=lambda folder: folder.name)
def test_diffusers_folder_equals_the_single_file_tensor_by_tensor_and_back(folder):
    """Reading gives the weights of the single file (float8 T5 apart); writing gives the names and numbers of the folder."""
    twin = (folder / json.loads((folder / "meta.json").read_text())["io_from"]).parent
    single, model = open_model(twin / "weights.safetensors"), open_model(folder)
    assert model.places.keys() == single.places.keys()
    for name, place in model.places.items():
        ours = read_network(name, place, metadata=model.config).state_dict()
        theirs = read_network(name, single.places[name]).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[key]) for key, x in ours.items()), name
        stored = {key: x.float() for file in place.files for key, x in load_file(file).items()}
        if name == "clip_l":
            assert torch.equal(stored.pop("text_projection.weight"), torch.eye(ours["layers.0.q.weight"].shape[0]))
        written = to_diffusers(name, ours)
        assert written.keys() == stored.keys() and all(torch.equal(x, stored[key]) for key, x in written.items()), name


VERIFIABLE = [folder for folder, kind in FOLDERS if kind in ("mmdit", "vae", "bundle", "diffusers")]


@pytest.mark.parametrize("folder", VERIFIABLE, ids=lambda folder: folder.name)
def test_verify_compares_a_golden_case(folder, capsys):
    assert verify(folder)
    printed = capsys.readouterr().out
    assert "within what the case allows" in printed and "BEYOND" not in printed
