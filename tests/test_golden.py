"""Parity with public implementations: small random checkpoints and what others compute from them.

Every folder under tests/golden, under $GOLDEN_DIR, or, without that, under ../shared/golden beside
the repository is run. Sizes come from meta.json and the tensors. The kind of a case is recognised
by the tensors that it stores. Within a case, intermediate results are compared in the order in
which they are computed, so that a failure names the first one that differs.
"""

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import convert
import flow
import formulations
from checkpoints import open_model, read_network, released_tensors
from mmdit import crop_center, paper_positions, sincos_2d, timestep_embedding
from sample import Settings, sample_latents
from text_encoders import TextConfig, TextEncoders, relative_position_bucket
from vae import normalize, sample_code

HERE = Path(__file__).parent
ELSEWHERE = os.environ.get("GOLDEN_DIR") or HERE.parents[1] / "shared" / "golden"
KINDS = {"r0.out": "mmdit", "sd3_pooled": "clip", "short.out": "t5", "sq.moments": "vae",
         "ids.cond.t5": "bundle", "logit_normal.pdf": "flow", "time.emb256": "embeddings"}


class Case:
    """One folder: its weights, `io` tensors in the precision of the reference, its tolerances."""

    def __init__(self, folder):
        self.name = folder.name
        self.weights = folder / "weights.safetensors"
        self.meta = json.loads((folder / "meta.json").read_text())
        self.config = self.meta.get("config", {})
        self.io = load_file(folder / "io.safetensors")
        for name, x in self.io.items():
            self.io[name] = x.float() if x.dtype == torch.float16 else x

    def network(self, name):
        return read_network(name, open_model(self.weights))

    def check(self, name, ours, atol=None, rtol=None):
        """|ours - stored| <= atol + rtol |stored|, with what meta.json says unless it is given."""
        stored, allowed = self.io[name], self.meta["tolerances"]
        atol = allowed["atol"][name] if atol is None else atol
        rtol = allowed["rtol"] if rtol is None else rtol
        assert ours.shape == stored.shape, f"{self.name}: {name} is {tuple(ours.shape)}"
        difference = (ours.double() - stored.double()).abs()
        beyond = difference - (atol + rtol * stored.double().abs())
        assert beyond.max() <= 0, (
            f"{self.name}: {name} differs by up to {difference.max():.2e} (allowed: {atol:g} + "
            f"{rtol:g} of the value), in {(beyond > 0).sum()} of {beyond.numel()} numbers")

    def check_exact(self, name, ours, rtol=1e-7):
        """For closed forms, which both sides compute in float64."""
        ours = torch.stack(ours) if isinstance(ours, list) else ours
        self.check(name, ours.view(self.io[name].shape), 1e-10, rtol)


def kind_of(folder):
    """A value of KINDS, or "diffusers" for folders of that layout."""
    if not (folder / "io.safetensors").is_file():
        return "diffusers"
    names = load_file(folder / "io.safetensors").keys()
    return next((kind for name, kind in KINDS.items() if name in names), "unknown")


METAS = sorted(HERE.glob("golden/*/meta.json")) + sorted(Path(ELSEWHERE).glob("*/meta.json"))
FOLDERS = [(meta.parent, kind_of(meta.parent)) for meta in METAS]


def cases(kind):
    """Parametrises a test with the cases of one kind; without any, the test is skipped."""
    chosen = [folder for folder, its in FOLDERS if its == kind]
    names = [f"{folder.name}{'' if folder.is_relative_to(HERE) else '-elsewhere'}"
             for folder in chosen]
    return pytest.mark.parametrize("case", chosen, ids=names, indirect=True)


@pytest.fixture
def case(request):
    with torch.no_grad():
        yield Case(request.param)


def inputs_of(module, index=0):
    """A list that grows with what the module is called with."""
    seen = []
    module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[index]))
    return seen


def keep_outputs(modules):
    """A dict that is filled with what {name: module} compute."""
    seen = {}

    def keep(module, inputs, output, name):
        seen[name] = output
    for name, module in modules.items():
        module.register_forward_hook(partial(keep, name=name))
    return seen


def test_every_golden_case_is_of_a_known_kind():
    assert FOLDERS, f"no golden data under {HERE / 'golden'} or {ELSEWHERE}"
    assert [folder for folder, kind in FOLDERS if kind == "unknown"] == []


# ---- MM-DiT (cases a, b, c) ----------------------------------------------------------------------

@cases("mmdit")
def test_mmdit_equals_the_reference_from_tokens_to_velocity(case):
    model = case.network("mmdit")
    sizes = ("depth", "latent_channels", "context_dim", "pooled_dim")
    theirs = ("depth", "in_channels", "context_dim", "pooled_dim")
    assert [getattr(model.config, key) for key in sizes] == [case.config[key] for key in theirs]
    seen = keep_outputs({"block0": model.joint_blocks[0], "tokens_out": model.final_layer})
    for run in (run["name"] for run in case.meta["runs"]):
        x, t = case.io[f"{run}.x"], case.io[f"{run}.sigma"]
        context, pooled = case.io[f"{run}.context"], case.io[f"{run}.y"]
        out = model(x, t, context, pooled)
        ours = {"t_emb": model.t_embedder(timestep_embedding(t)), "tokens_in": model.embed_image(x),
                "cond": model.embed_cond(t, pooled), "context_in": model.context_embedder(context),
                "block0.context": seen["block0"][0], "block0.x": seen["block0"][1],
                "tokens_out": seen["tokens_out"], "out": out}
        for part, value in ours.items():
            if f"{run}.{part}" in case.io:
                case.check(f"{run}.{part}", value)


# ---- Text encoders (d, e, f) ---------------------------------------------------------------------

@cases("clip")
def test_clip_equals_the_reference_layer_by_layer(case):
    which = "clip_l" if case.config["hidden_act"] == "quick_gelu" else "clip_g"
    clip, ids = case.network(which), case.io["input_ids"]
    seen = keep_outputs({"layer0": clip.layers[0]})
    penultimate, pooled, last = clip(ids)
    embeddings = clip.token_embedding(ids[:1]) + clip.position_embedding.weight[: ids.shape[1]]
    case.check("embeddings", embeddings)
    case.check("layer0", seen["layer0"][:1])
    case.check("penultimate", penultimate)
    case.check("last_hidden_state", last)
    case.check("pooled", last[torch.arange(len(ids)), torch.tensor(case.meta["eos_positions"])])
    case.check("sd3_pooled", pooled)
    case.check("pooled_projected", pooled)                   # CLIP-L has no projection


@cases("t5")
def test_t5_equals_the_reference_layer_by_layer(case):
    t5 = case.network("t5")
    seen = keep_outputs({"block0": t5.layers[0]})
    biases = inputs_of(t5.layers[0], 1)
    for length in case.meta["lengths"]:
        out = t5(case.io[f"{length}.input_ids"])
        if length == "short":
            case.check("short.position_bias", biases[-1])
        if f"{length}.block0" in case.io:
            case.check(f"{length}.block0", seen["block0"])
        case.check(f"{length}.out", out)


@cases("t5")
def test_t5_position_buckets_equal_the_reference(case):
    ours = relative_position_bucket(case.io["relative_position"],
                                    case.config["relative_attention_num_buckets"],
                                    case.config["relative_attention_max_distance"])
    assert torch.equal(ours, case.io["relative_position_bucket"])


# ---- Autoencoder (g) -----------------------------------------------------------------------------

@cases("vae")
def test_vae_equals_the_reference(case):
    vae, io = case.network("vae"), case.io
    assert (vae.config.vae_scale, vae.config.vae_shift, vae.config.latent_channels) == tuple(
        case.config[key] for key in ("scale_factor", "shift_factor", "z_channels"))
    middle = {"enc.down0": vae.encoder.down[0], "enc.mid_attn": vae.encoder.mid.attn_1,
              "enc.mid": vae.encoder.mid, "dec.mid": vae.decoder.mid,
              f"dec.up{len(vae.decoder.up) - 1}": vae.decoder.up[-1]}
    seen = keep_outputs(middle)
    pictures = [name.split(".")[0] for name in io if name.endswith(".moments")]
    for picture in sorted(pictures):
        moments = vae.encoder(io[f"{picture}.image"])
        mean, logvar = vae.encode_moments(io[f"{picture}.image"])
        decoded = vae.decoder(io[f"{picture}.z"])
        for name in middle:
            if f"{picture}.{name}" in io:
                case.check(f"{picture}.{name}", seen[name][:1])
        case.check(f"{picture}.moments", moments)
        case.check(f"{picture}.mean", mean)
        case.check(f"{picture}.logvar", logvar)
        case.check(f"{picture}.decoded", decoded)
        whole = vae.decode(normalize(io[f"{picture}.z"], vae.config))
        torch.testing.assert_close(whole, decoded, rtol=1e-4, atol=1e-4)


@cases("vae")
def test_vae_samples_and_normalises_as_the_reference(case):
    vae, io = case.network("vae"), case.io
    case.check("sq.sample", sample_code(io["sq.mean"], io["sq.logvar"], io["sq.eps"]))
    case.check("sq.latent_in", normalize(io["sq.sample"], vae.config))
    codes = inputs_of(vae.decoder)
    vae.decode(io["sq.z"])
    case.check("sq.latent_out", codes[0])


# ---- A whole model in one file (i) ---------------------------------------------------------------

def load_bundle(case):
    """(mmdit, vae, {"cond": (context, pooled), "uncond": ...}) of a released single file."""
    model = open_model(case.weights)
    encoders = {name: read_network(name, model) for name in ("clip_l", "clip_g", "t5")}
    widths = {f"{name}_width": encoder.config.hidden_size for name, encoder in encoders.items()}
    config = TextConfig(**widths, clip_length=case.io["ids.cond.l"].shape[1],
                        t5_length=case.io["ids.cond.t5"].shape[1])
    text, encoded = TextEncoders(encoders, {}, config), {}
    for which in ("cond", "uncond"):
        ids = {name: case.io[f"ids.{which}.{short}"]
               for name, short in (("clip_l", "l"), ("clip_g", "g"), ("t5", "t5"))}
        encoded[which] = text.encode_ids(ids, len(ids["t5"]))
    return read_network("mmdit", model), read_network("vae", model), encoded


@cases("bundle")
def test_bundle_token_ids_become_the_references_context_and_pooled(case):
    _, _, encoded = load_bundle(case)
    for which, (context, pooled) in encoded.items():
        case.check(f"{which}.context", context)
        case.check(f"{which}.pooled", pooled)


@cases("bundle")
@pytest.mark.parametrize("reference, schedule", [("sd35", "released"), ("diffusers", "released"),
                                                 ("linear", "shifted")])
def test_bundle_samples_the_references_latent_and_picture(case, reference, schedule):
    mmdit, vae, encoded = load_bundle(case)
    cond, uncond = encoded["cond"], encoded["uncond"]
    noise, told = case.io["noise"], case.meta["sampling"]
    times = flow.make_schedule(schedule, told["steps"], told["shift"])
    case.check(f"{reference}.sigmas", times)

    def velocity(z, t):
        return flow.guide(mmdit(z, t, *cond), mmdit(z, t, *uncond), told["cfg_scale"])
    points, _ = flow.solve(velocity, noise, times)
    latent = points[-1]
    case.check(f"{reference}.latent", latent)
    context, pooled = (torch.cat(pair) for pair in zip(cond, uncond))
    settings = Settings(told["steps"], told["cfg_scale"], told["shift"], schedule)
    case.check(f"{reference}.latent", sample_latents(mmdit, context, pooled, noise, settings)[0])
    if reference == "diffusers":
        case.check("diffusers.timesteps", 1000 * times[:-1])
    if reference == "sd35":
        case.check("step0.velocity_cond", mmdit(noise, times[:1], *cond))
        case.check("step0.velocity_uncond", mmdit(noise, times[:1], *uncond))
        case.check("sd35.trajectory", torch.cat(points[1:]))
        codes = inputs_of(vae.decoder)
        case.check("sd35.image", vae.decode(latent))         # not clamped
        case.check("sd35.vae_input", codes[0])
        second_order, _ = flow.solve(velocity, noise, times, flow.dpm_solver_step)
        case.check("dpmpp_2m.latent", second_order[-1])
    if reference != "linear":
        levels = (vae.decode(latent)[0].clamp(-1, 1) + 1) * 127.5
        ours = levels.trunc() if reference == "sd35" else levels.round()     # as each of them does
        difference = (ours.permute(1, 2, 0) - case.io[f"{reference}.image_u8"].float()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() <= 0.01


# ---- Flow formulae (j), position tables and time embedding (k) -----------------------------------

def numbered(case, stem, ends_with):
    """The stored names stem0, stem1, ... as far as they go."""
    count = sum(name.startswith(stem) and name.endswith(ends_with) for name in case.io)
    assert count, f"{case.name} has no {stem}N{ends_with}"
    return [f"{stem}{i}" for i in range(count)]


@cases("flow")
def test_eq19_density_and_quantile_equal_the_reference(case):
    rows, t, q = case.io["logit_normal.params"].tolist(), case.io["t"], case.io["logit_normal.q"]
    densities = [flow.LogitNormal(mean, std) for mean, std in rows]
    case.check_exact("logit_normal.pdf", [density.pdf(t) for density in densities])
    case.check_exact("logit_normal.quantile", [density.quantile(q) for density in densities])


@cases("flow")
def test_eq20_to_22_mode_and_cosmap_equal_the_reference(case):
    t, u, scales = case.io["t"], case.io["mode.u"], case.io["mode.s"].tolist()
    case.check_exact("mode.f", [flow.mode_map(u, scale) for scale in scales])
    case.check_exact("mode.finv", [flow.mode_map_inverse(t, scale) for scale in scales])
    case.check_exact("mode.pdf", [flow.Mode(scale).pdf(t) for scale in scales])
    case.check_exact("cosmap.f", flow.CosMap().quantile(case.io["cosmap.u"]))
    case.check_exact("cosmap.pdf", flow.CosMap().pdf(t))
    torch.testing.assert_close(flow.CosMap().quantile(case.io["cosmap.finv"]), t)


@cases("flow")
def test_eq23_to_25_shift_and_the_shifted_density_equal_the_reference(case):
    alphas, t = case.io["shift.alpha"].tolist(), case.io["t"]
    shifted = [flow.shift_time(t, alpha) for alpha in alphas]
    case.check_exact("shift.t", shifted)
    log_snr = 2 * torch.log((1 - t) / t)
    ours = torch.stack([flow.shift_log_snr(log_snr, alpha) for alpha in alphas])
    case.check("shift.logsnr", ours, 1e-7, 1e-7)


@cases("flow")
def test_sampling_schedules_equal_the_references(case):
    for name in numbered(case, "sched", ".steps"):
        steps, shift = int(case.io[f"{name}.steps"]), float(case.io[f"{name}.shift"])
        released = flow.make_schedule("released", steps, shift)
        case.check(f"{name}.sd35", released, 5e-7, 0)
        case.check(f"{name}.diffusers", released, 5e-7, 0)
        case.check(f"{name}.linear", flow.make_schedule("shifted", steps, shift), 5e-7, 0)


@cases("flow")
def test_euler_on_gaussian_data_equals_the_reference(case):
    mean, std = case.io["gauss.params"].tolist()
    noise = case.io["gauss.z1"].view(-1, 1, 1, 1)
    velocity = partial(flow.gaussian_velocity, mean=mean, std=std)
    for name in numbered(case, "gauss", ".steps"):
        steps, shift = int(case.io[f"{name}.steps"]), float(case.io[f"{name}.shift"])
        points, _ = flow.solve(velocity, noise, flow.shifted_schedule(steps, shift))
        case.check(f"{name}.x0", points[-1].flatten(), 5e-6, 1e-5)           # ours is fp32
    points, _ = flow.solve(velocity, noise.double(), torch.linspace(1, 0, 1001), flow.heun_step)
    case.check("gauss.x0_exact", points[-1].flatten(), 1e-4, 1e-4)


def paths_of(case):
    """{name in the case: path} of formulations.py."""
    paths = {"rf": formulations.Straight(), "cosine": formulations.Cosine()}
    for i, row in enumerate(case.io["edm.params"].tolist()):
        paths[f"edm{i}"] = formulations.EDM(*row)
    return paths


@cases("flow")
def test_eq13_14_and_17_paths_equal_the_reference(case):
    t = case.io["t"]
    for name, path in paths_of(case).items():
        at = path.at(t)
        ours = {"a": at.a, "b": at.b, "da": at.a_slope, "db": at.b_slope, "logsnr": at.log_snr,
                "dlogsnr": at.log_snr_slope, "w_cfm": -0.5 * at.log_snr_slope * at.b.square()}
        for key, value in ours.items():
            case.check_exact(f"{name}.{key}", value)
        if name.startswith("edm"):                           # Eq. 16
            weight = formulations.edm_weight(at.log_snr, path.log_mean, path.log_std)
            case.check_exact(f"{name}.w", weight)
    for name, other in (("edm_rf", formulations.Straight()), ("edm_cos", formulations.Cosine())):
        case.check_exact(f"{name}.b", formulations.MatchedEDM(other).at(t).b)


@cases("flow")
def test_linear_path_at_its_knots_equals_the_reference(case):
    at = formulations.Linear().at(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    for name, value in (("a", at.a), ("b", at.b), ("logsnr", at.log_snr)):
        case.check_exact(f"ldm_linear.{name}", value)


@cases("flow")
def test_eq18_weights_equal_the_reference(case):
    t, io = case.io["t"], case.io
    densities = {"w.rf": [flow.Uniform()], "w.rf_cosmap": [flow.CosMap()],
                 "w.rf_logit_normal": [flow.LogitNormal(*row)
                                       for row in io["logit_normal.params"].tolist()],
                 "w.rf_mode": [flow.Mode(scale) for scale in io["mode.s"].tolist()]}
    for name, several in densities.items():
        case.check_exact(name, [formulations.density_weight(t, density) for density in several])


@cases("flow")
def test_eq9_and_10_velocities_equal_the_reference(case):
    t, latent, noise = case.io["conv.t"], case.io["conv.x0"], case.io["conv.eps"]
    paths = paths_of(case)
    for name in ("rf", "cosine", "edm0"):
        at = paths[name].at(flow.per_sample(t, latent.dim()))
        z = formulations.diffuse(latent, noise, at)
        case.check_exact(f"conv.{name}.z", z)
        for velocity in (formulations.conditional_velocity_by_scales,
                         formulations.conditional_velocity_by_log_snr):
            case.check_exact(f"conv.{name}.u", velocity(z, noise, at))


@cases("embeddings")
def test_position_tables_and_their_crops_equal_the_reference(case):
    tables = {}
    for name, p in case.meta["params"].items():
        if name.startswith("pos."):
            positions = torch.arange(p["grid"], dtype=torch.float64)
            positions = positions * p.get("base", p["grid"]) / p["grid"]
            if "offset" in p:
                positions = positions / p["scale"] - p["offset"]
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
    case.check("time.emb256_exact", ours, fp32_error)
    case.check("time.emb256", ours, fp32_error)


# ---- The diffusers layout (h, h2): the weights of another case in another form -------------------

DIFFUSERS = [folder for folder, kind in FOLDERS if kind == "diffusers"]


@pytest.mark.parametrize("folder", DIFFUSERS, ids=lambda folder: folder.name)
def test_diffusers_folder_equals_the_single_file_tensor_by_tensor_and_back(folder):
    """Reading gives the weights of the single file, and writing gives the folder again."""
    twin = (folder / json.loads((folder / "meta.json").read_text())["io_from"]).parent
    single, model = open_model(twin / "weights.safetensors"), open_model(folder)
    assert model.networks.keys() == single.networks.keys()
    for name in model.networks:
        network = read_network(name, model)
        ours, theirs = network.state_dict(), read_network(name, single).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
        stored = {}
        for file in (folder / convert.FOLDERS[name]).glob("*.safetensors"):
            stored.update(load_file(file))
        written = convert.to_diffusers(name, released_tensors(name, network))
        if name == "clip_l":
            written["text_projection.weight"] = torch.eye(len(ours["final_norm.weight"]))
        if name == "t5":
            del written["encoder.embed_tokens.weight"]       # the second name of the same table
        assert written.keys() == stored.keys()
        assert all(torch.equal(x, stored[key].float()) for key, x in written.items())
