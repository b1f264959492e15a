"""What every method promises, and what each says it changed."""

import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from slimdit.allocation import Sensitivity
from slimdit.context import Context, Refused
from slimdit.formats import load, save
from slimdit.methods import METHODS
from slimdit.methods.cache_blocks import CacheBlocks
from slimdit.methods.compile import Compile
from slimdit.methods.distill import Distill
from slimdit.methods.distill_guidance import DistillGuidance
from slimdit.methods.finetune import Finetune
from slimdit.methods.low_rank_adaln import LowRankAdaln
from slimdit.methods.prune_depth import PruneDepth
from slimdit.methods.prune_weights import PruneWeights
from slimdit.methods.prune_width import PruneWidth
from slimdit.methods.quantize import Quantize
from slimdit.methods.reduce_steps import ReduceSteps
from slimdit.methods.simplify_attention import SimplifyAttention
from slimdit.methods.sparse_experts import SparseExperts
from slimdit.models.dit import BlockConfig, DiT, uniform
from slimdit.models.linear import Int8Dynamic, Int8Static, Int8WeightOnly
from slimdit.models.surgery import weight_bytes
from slimdit.pipeline import Pipeline, Runtime
from slimdit.recipe import Recipe, apply, config_mismatch, fingerprint, rehearse, run
from slimdit.sampling.solvers import Sampling
from slimdit.training.calibration import deployed_calls, output_error, outputs

SMALL = uniform(depth=2, width=16, heads=2, patch=2, input_size=(8, 8), channels=1, classes=3)
STEPS = 8

EXAMPLES = {
    "reduce_steps": ReduceSteps(3, solver="dpmpp_2m"),
    "prune_weights": PruneWeights(sparsity=0.3),
    "prune_weights 2:4": PruneWeights(pattern="2:4", criterion="wanda", layers=("blocks.*.mlp.*",), images=8),
    "finetune": Finetune(steps=2, batch=4, samples=4, alpha=0.5),
    "quantize weight-only": Quantize(),
    "quantize dynamic": Quantize(activations="int8"),
    "quantize smooth": Quantize(activations="int8", smooth=0.5, images=2),
    "quantize int4": Quantize(weights="int4"),
    "quantize int4 hqq": Quantize(weights="int4", rounding="hqq"),
    "quantize int4 gptq": Quantize(weights="int4", rounding="gptq", images=2),
    "compile": Compile(),
    "cache_blocks": CacheBlocks(every=2, order=1, force=True),
    "cache_blocks threshold": CacheBlocks(threshold=0.3, images=2, force=True),
    "prune_width": PruneWidth(mlp=0.75, images=4),
    "prune_depth": PruneDepth(keep=1, images=4),
    "low_rank_adaln": LowRankAdaln(final=True),
    "sparse_experts partition": SparseExperts(experts=4, active=3, images=4),
    "sparse_experts upcycle": SparseExperts("upcycle", experts=4, router="timestep", images=2),
    "simplify_attention mediated": SimplifyAttention(mediators=4, conv=3, regression=20, images=4),
    "simplify_attention focused": SimplifyAttention("focused", groups=1, regression=20, distill=1, images=4, samples=4),
    "distill": Distill(blocks=1, steps=2, batch=4, samples=4),
    "distill_guidance": DistillGuidance(steps=2, batch=4, samples=4),
}
"""Every method as it is meant to be used; a method without an example here fails the first test."""

NEUTRAL = {
    "reduce_steps": ReduceSteps(STEPS),
    "quantize": Quantize(protect=("*",)),
    "cache_blocks": CacheBlocks(every=1, force=True),
    "prune_width": PruneWidth(),
    "prune_depth": PruneDepth(keep=2),
    "low_rank_adaln": LowRankAdaln(rank=1.0),
    "sparse_experts": SparseExperts(blocks=()),
    "simplify_attention": SimplifyAttention(blocks=0.0),
    "prune_weights": PruneWeights(sparsity=0.0),
    "finetune": Finetune(steps=0),
    "distill": Distill(steps=0),
    "distill_guidance": DistillGuidance(steps=0),
    "compile": Compile(dtype="float32"),  # the compiler may reorder sums; without it, nothing is left
}


def small_pipeline(config=SMALL) -> Pipeline:
    model = DiT(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():  # trained models are nowhere zero
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return Pipeline(model, Sampling(steps=STEPS, guidance=1.5))


def images(pipeline: Pipeline) -> np.ndarray:
    """Four images without the compiler, which changes no more than rounding and takes its time."""
    runtime = Runtime(pipeline.runtime.dtype, attention=pipeline.runtime.attention)
    return pipeline.replace(runtime=runtime).sample(range(4), seed=3, batch=4)


def apply_once(method, pipeline, tmp_path):
    context = Context(pipeline, tmp_path)
    return apply(method, pipeline.copy(), context), context.witnesses[0]


def sensitivity_file(folder, errors):
    """A finished file of `slimdit sensitivity` with these total errors per layer."""
    path = folder / "sensitivity.json"
    Sensitivity(model="m", fingerprint="f", settings={"perturb": "int8"}, bins=((999, 0),), layers=tuple(errors),
                errors={name: (error,) for name, error in errors.items()}, totals=errors, provenance={}).write(path)
    return path


def test_every_method_is_under_this_contract():
    assert {type(method) for method in EXAMPLES.values()} == set(METHODS.values())
    assert set(NEUTRAL) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_is_a_frozen_dataclass_in_the_file_of_its_name(name):
    method = METHODS[name]
    assert importlib.import_module(f"slimdit.methods.{name}").__dict__[method.__name__] is method
    assert method.__dataclass_params__.frozen
    assert "Attributes:" in method.__doc__ and "Raises:" in method.__doc__


@pytest.mark.parametrize("name", EXAMPLES)
def test_config_is_the_truth_about_names_shapes_and_types(name, tmp_path):
    changed, _ = apply_once(EXAMPLES[name], small_pipeline(), tmp_path)
    assert config_mismatch(changed.model) == ""
    rebuilt = DiT(type(changed.model.config).from_dict(changed.model.config.to_dict()))
    rebuilt.load_state_dict(changed.model.state_dict(), strict=True)


@pytest.mark.parametrize("name", EXAMPLES)
def test_same_seed_same_result(name, tmp_path):
    first, second = (apply_once(EXAMPLES[name], small_pipeline(), tmp_path)[0] for _ in range(2))
    assert fingerprint(first) == fingerprint(second)
    assert (images(first) == images(second)).all()


@pytest.mark.parametrize("name", EXAMPLES)
def test_run_leaves_the_callers_pipeline_alone_and_its_result_reloads_to_the_bit(name, tmp_path):
    from slimdit.formats import load

    pipeline = small_pipeline()
    before, pictures = fingerprint(pipeline), images(pipeline)
    result = run(Recipe("one", (EXAMPLES[name],)), pipeline, Context(pipeline, tmp_path))
    assert fingerprint(pipeline) == before and (images(pipeline) == pictures).all()
    reloaded = load(str(tmp_path))
    assert fingerprint(reloaded) == fingerprint(result)
    assert reloaded.history == result.history
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([5, 900]), torch.tensor([0, 3])
    assert torch.equal(reloaded.model.eval()(x, t, y), result.model.eval()(x, t, y))
    assert (images(reloaded) == images(result)).all()


RELOADED = """
import sys, torch
from pathlib import Path
from slimdit.formats import load
x, t, y = torch.load(Path(sys.argv[1]) / "inputs.pt", weights_only=True)
for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
    model, expected = load(folder).model.eval(), torch.load(folder / "outputs.pt", weights_only=True)
    print(folder.name, torch.equal(model(x, t, y), expected))
"""


def test_a_fresh_process_reloads_every_methods_model_to_the_bit(tmp_path):
    inputs = torch.randn(2, 1, 8, 8), torch.tensor([5, 900]), torch.tensor([0, 3])
    torch.save(inputs, tmp_path / "inputs.pt")
    for name, method in EXAMPLES.items():
        folder, pipeline = tmp_path / name, small_pipeline()
        result = run(Recipe("one", (method,)), pipeline, Context(pipeline, folder))
        with torch.no_grad():
            torch.save(result.model.eval()(*inputs), folder / "outputs.pt")
    told = subprocess.run([sys.executable, "-c", RELOADED, str(tmp_path)], capture_output=True, text=True, check=True)
    assert told.stdout.splitlines() == [f"{name} True" for name in sorted(EXAMPLES)]


@pytest.mark.parametrize("name", METHODS)
def test_neutral_settings_change_nothing(name, tmp_path):
    pipeline = small_pipeline()
    changed, _ = apply_once(NEUTRAL[name], pipeline, tmp_path)
    plain = changed.replace(runtime=pipeline.runtime) if name == "compile" else changed
    assert fingerprint(plain) == fingerprint(pipeline)
    assert (images(changed) == images(pipeline)).all()


@pytest.mark.parametrize("name", EXAMPLES)
def test_keeps_images_near_the_teachers(name, tmp_path):
    pipeline = small_pipeline()
    changed, _ = apply_once(EXAMPLES[name], pipeline, tmp_path)
    difference = np.abs(images(changed).astype(float) - images(pipeline)).mean()
    other = np.abs(pipeline.sample(range(4, 8), seed=3, batch=4).astype(float) - images(pipeline)).mean()
    assert difference < 0.5 * other


@pytest.mark.parametrize("name", EXAMPLES)
def test_history_and_witness_name_the_method(name, tmp_path):
    changed, witness = apply_once(EXAMPLES[name], small_pipeline(), tmp_path)
    (entry,) = changed.history
    assert METHODS[next(iter(entry))] is type(EXAMPLES[name])
    assert witness["method"] in entry and len(witness) > 1


class TestReduceSteps:
    def test_witness_counts_guided_evaluations_twice(self, tmp_path):
        changed, witness = apply_once(ReduceSteps(3, "unipc", guidance_interval=(0, 700)), small_pipeline(), tmp_path)
        assert (witness["evaluations_before"], witness["evaluations_after"]) == (16, 5)
        assert changed.sampling == Sampling("unipc", 3, guidance=1.5, guidance_interval=(0, 700))

    def test_what_reduces_nothing_is_refused(self, tmp_path):
        with pytest.raises(Refused, match="evaluated 16 times per image before and 18 times after"):
            apply_once(ReduceSteps(9), small_pipeline(), tmp_path)
        with pytest.raises(Refused, match="reduce nothing"):
            apply_once(ReduceSteps(STEPS, "unipc"), small_pipeline(), tmp_path)

    def test_timesteps_of_another_number_are_set_aside(self, tmp_path):
        pipeline = small_pipeline()
        listed = pipeline.replace(sampling=Sampling(steps=4, timesteps=(999, 700, 400, 100)))
        assert apply_once(ReduceSteps(3), listed, tmp_path)[0].sampling.timesteps is None
        assert apply_once(ReduceSteps(4), listed, tmp_path)[0].sampling.timesteps == (999, 700, 400, 100)
        chosen = apply_once(ReduceSteps(2, timesteps=(999, 500)), listed, tmp_path)[0]
        assert chosen.sampling.timesteps == (999, 500)

    @pytest.mark.parametrize("options, sentence", [
        ({"steps": 0}, "steps must be"), ({"solver": "x"}, "solver"), ({"steps": 2, "timesteps": (5,)}, "timesteps")])
    def test_bad_options_are_refused_at_once(self, options, sentence):
        with pytest.raises(ValueError, match=sentence):
            ReduceSteps(**options)


class TestQuantize:
    def test_packs_the_blocks_and_keeps_adaln_weight_only(self, tmp_path):
        changed, witness = apply_once(Quantize(activations="int8"), small_pipeline(), tmp_path)
        block = changed.model.blocks[1]
        tokenwise = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
        assert all(type(layer) is Int8Dynamic for layer in tokenwise)
        assert type(block.adaLN_modulation[1]) is Int8WeightOnly
        assert type(changed.model.final_layer.linear) is torch.nn.Linear
        assert witness["layers"] == {"int8_dynamic": 8, "int8_weight_only": 2} and witness["layers_left_float"] == 4
        assert witness["bytes_after"] == weight_bytes(changed.model) < 0.75 * witness["bytes_before"]

    def test_static_ranges_are_calibrated_on_the_deployed_runs(self, tmp_path):
        method = Quantize(activations="int8_static", images=2)
        changed, witness = apply_once(method, small_pipeline(), tmp_path)
        again, _ = apply_once(method, small_pipeline(), tmp_path)
        layers = [layer for layer in changed.model.modules() if type(layer) is Int8Static]
        assert len(layers) == 8 and witness["layers"] == {"int8_static": 8, "int8_weight_only": 2}
        assert len({layer.step.item() for layer in layers}) == 8  # each its own
        assert 0 < witness["output_error"] < 1e-3 and witness["calibration"]["calls"] > 0
        assert changed.fingerprint() == again.fingerprint()
        save(changed, tmp_path / "model")
        assert load(tmp_path / "model").fingerprint() == changed.fingerprint()

    def test_a_large_model_shrinks_to_near_a_quarter(self, tmp_path):
        config = uniform(depth=2, width=256, heads=4, patch=4, input_size=(8, 8), channels=1, classes=3)
        _, witness = apply_once(Quantize(), small_pipeline(config), tmp_path)
        assert witness["bytes_after"] < 0.45 * witness["bytes_before"]  # two blocks; the float embedders weigh here

    def test_the_first_pattern_that_matches_decides(self, tmp_path):
        spared = ("blocks.0.mlp.fc1", "blocks.0.*: int8", "*adaLN*", "t_embedder.*", "*.attn.*")
        changed, _ = apply_once(Quantize(activations="int8", protect=spared), small_pipeline(), tmp_path)
        weight_only = ("attn.qkv", "attn.proj", "mlp.fc2", "adaLN_modulation.1")
        assert changed.model.config.linears == {
            **{f"blocks.0.{name}": "int8_weight_only" for name in weight_only},
            **dict.fromkeys(("blocks.1.mlp.fc1", "blocks.1.mlp.fc2", "final_layer.linear"), "int8_dynamic")}

    def test_protecting_nothing_leaves_no_linear_layer_as_it_was(self, tmp_path):
        changed, witness = apply_once(Quantize(activations="int8", protect=()), small_pipeline(), tmp_path)
        assert not any(isinstance(module, torch.nn.Linear) for module in changed.model.modules())
        assert witness["layers"] == {"int8_dynamic": 14} and witness["layers_left_float"] == 0
        assert {"t_embedder.mlp.0", "final_layer.adaLN_modulation.1"} < set(changed.model.config.linears)
        assert images(changed).std() > 0

    def test_the_layers_that_err_most_become_one_kind_finer(self, tmp_path):
        errors = {f"blocks.{block}.{layer}": 1.0 for block in range(2)
                  for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
        errors |= {"blocks.1.mlp.fc1": 8.0, "blocks.0.attn.qkv": 4.0, "blocks.0.adaLN_modulation.1": 99.0}
        path = str(sensitivity_file(tmp_path, errors))
        worst = ["blocks.1.mlp.fc1", "blocks.0.attn.qkv"]  # adaLN is spared already
        for method, finer in ((Quantize(activations="int8", sensitivity=path, spare=0.6), "int8_weight_only"),
                              (Quantize(weights="int4", sensitivity=path, spare=0.6), "int8_weight_only"),
                              (Quantize(sensitivity=path, spare=0.6), None)):
            changed, witness = apply_once(method, small_pipeline(), tmp_path)
            assert witness["layers_spared"] == worst
            assert all(changed.model.config.linears.get(name) == finer for name in worst)
            assert changed.model.config.linears["blocks.0.mlp.fc1"] == method.coarse_kind
        del errors["blocks.0.mlp.fc2"]
        with pytest.raises(Refused, match=r"says nothing of 'blocks\.0\.mlp\.fc2': measure this model with"):
            apply_once(Quantize(sensitivity=str(sensitivity_file(tmp_path, errors))), small_pipeline(), tmp_path)

    def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_name(self, tmp_path):
        with pytest.raises(Refused, match=r"protect pattern 'blocks.1.mlp.fc3: int8' .* nearest is 'blocks.1.mlp.fc"):
            apply_once(Quantize(protect=("blocks.1.mlp.fc3: int8",)), small_pipeline(), tmp_path)

    def test_a_packed_model_is_refused(self, tmp_path):
        once, _ = apply_once(Quantize(), small_pipeline(), tmp_path)
        with pytest.raises(Refused, match="10 layers are packed already: quantize once"):
            apply_once(Quantize(), once, tmp_path)

    @pytest.mark.parametrize("options, sentence", [
        ({"weights": "int3"}, 'use weights "int8" with activations "int8", "int8_static" or left out'),
        ({"weights": "int4", "activations": "int8"}, '"int4" with activations left out'),
        ({"weights": "fp8"}, '"fp8" with "fp8"'),
        ({"rounding": "hqq"}, "'hqq' does not go with int8; use one of nearest, gptq"),
        ({"group": 64}, "only int4 has groups"), ({"weights": "int4", "group": 0}, "above 0"),
        ({"spare": 1.5}, "spare 1.5 is outside 0..1"),
        ({"smooth": 1.5}, "smooth 1.5 is outside 0..1"), ({"images": 0}, "images must be at least 1"),
        ({"protect": ("blocks.*: int4",)}, "'blocks.*: int4' must be a pattern of names, alone or followed")])
    def test_bad_options_are_refused_at_once(self, options, sentence):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            Quantize(**options)

    @pytest.mark.parametrize("rounding", ["nearest", "hqq", "gptq"])
    def test_int4_packs_two_weights_a_byte_and_keeps_adaln_in_int8(self, rounding, tmp_path):
        method = Quantize(weights="int4", rounding=rounding, images=2)
        changed, witness = apply_once(method, small_pipeline(), tmp_path)
        assert witness["layers"] == {"int4_weight_only:128": 8, "int8_weight_only": 2}
        fc2 = changed.model.blocks[0].mlp.fc2
        assert fc2.weight.shape == (16, 32) and fc2.weight.dtype == torch.uint8 and fc2.group == 64
        assert type(changed.model.blocks[0].adaLN_modulation[1]) is Int8WeightOnly

    def test_a_group_that_does_not_divide_is_refused_with_those_that_do(self, tmp_path):
        config = uniform(depth=1, width=192, heads=3, patch=4, input_size=(8, 8), channels=1, classes=3)
        with pytest.raises(Refused, match=r"groups of 100 do not divide the 192 inputs of blocks.0.attn.qkv: use a "
                                          r"group of 1, 2, 3, .* 64, 96, 192, or leave"):
            apply_once(Quantize(weights="int4", group=100), small_pipeline(config), tmp_path)
        changed, _ = apply_once(Quantize(weights="int4", group=64), small_pipeline(config), tmp_path)
        assert changed.model.blocks[0].attn.qkv.scale.shape == (576, 3)
        rehearse(Recipe("twin", (Quantize(weights="int4", group=64),)), config)  # whose rows are 12 long

    def test_rows_that_only_tiny_groups_divide_are_refused(self, tmp_path):
        block = BlockConfig(2, 8, 257)  # a prime
        with pytest.raises(Refused, match=r"no group of 16 to 128 divides the 257 inputs of blocks.0.mlp.fc2: protect"):
            apply_once(Quantize(weights="int4"), small_pipeline(replace(SMALL, blocks=(block,))), tmp_path)

    @pytest.mark.parametrize("weights", ["int8", "int4"])
    def test_gptq_keeps_the_models_answers_closer_than_nearest_on_other_images(self, weights, tmp_path):
        config = uniform(depth=2, width=64, heads=4, patch=2, input_size=(8, 8), channels=1, classes=3)
        pipeline = small_pipeline(config)
        calls = deployed_calls(pipeline, images=8, seed=99)
        expected = outputs(pipeline.model, calls)
        errors = {}
        for rounding in ("nearest", "gptq"):
            method = Quantize(weights=weights, rounding=rounding, images=16)
            changed, witness = apply_once(method, pipeline, tmp_path)
            errors[rounding] = output_error(changed.model, calls, expected)
        assert errors["gptq"] < 0.9 * errors["nearest"]
        assert 0 < witness["output_error"] < 1

    def test_witness_says_what_was_calibrated_on(self, tmp_path):
        _, witness = apply_once(Quantize(activations="int8", smooth=0.5, images=2), small_pipeline(), tmp_path)
        told = witness["calibration"]
        assert (told["solver"], told["steps"], told["guidance"], told["seed"], told["calls"]) == ("ddim", 8, 1.5, 0, 8)
        assert len(told["timesteps"]) == 8 and set(told["largest_inputs"]) == {
            f"blocks.{i}.{name}" for i in (0, 1) for name in ("adaLN_modulation.1", "attn.qkv", "attn.proj", "mlp.fc1",
                                                              "mlp.fc2")}
        assert all(len(bins) == 4 and min(bins) > 0 for bins in told["largest_inputs"].values())
        assert witness["layers_smoothed"] == 6
        json.dumps(witness, allow_nan=False)

    def test_smoothing_helps_where_channels_differ(self, tmp_path):
        pipeline = small_pipeline()
        with torch.no_grad():  # two channels that adaLN makes far larger than the others, as trained DiTs have
            for block in pipeline.model.blocks:
                block.adaLN_modulation[1].bias.view(6, 16)[[1, 4], :2] += 60
        calls = deployed_calls(pipeline, images=8, seed=99)
        expected = outputs(pipeline.model, calls)
        methods = Quantize(activations="int8"), Quantize(activations="int8", smooth=0.5)
        plain, smooth = (output_error(apply_once(method, pipeline, tmp_path)[0].model, calls, expected)
                         for method in methods)
        assert smooth < 0.7 * plain

    def test_smoothing_needs_a_plain_adaln(self, tmp_path):
        pipeline = small_pipeline()
        factored = torch.nn.Sequential(torch.nn.Linear(16, 2), torch.nn.Linear(2, 96))
        pipeline.model.blocks[1].adaLN_modulation[1] = factored
        with pytest.raises(Refused, match=r"needs blocks\.1.adaLN_modulation.1 to be a plain float linear layer"):
            Quantize(activations="int8", smooth=0.5).apply(pipeline, Context(pipeline, tmp_path))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="refused only where nothing multiplies fp8")
    def test_fp8_is_refused_without_a_device_that_multiplies_it(self, tmp_path):
        method = Quantize(weights="fp8", activations="fp8")
        with pytest.raises(Refused, match=r'capability 8.9 or newer, .* use weights "int8" with activations "int8"'):
            apply_once(method, small_pipeline(), tmp_path)
        with pytest.raises(Refused, match="fp8 needs a CUDA device"):
            rehearse(Recipe("fp8", (method,)), SMALL)

    def test_runs_in_bfloat16_near_the_float_images(self, tmp_path):
        pipeline = small_pipeline()
        changed, _ = apply_once(Quantize(activations="int8"), pipeline, tmp_path)
        low = changed.replace(runtime=Runtime("bfloat16"))
        assert np.abs(images(low).astype(float) - images(changed)).mean() < 5


class TestCompile:
    def test_sets_the_runtime_only(self, tmp_path):
        changed, witness = apply_once(Compile(dtype="bfloat16", attention="explicit"), small_pipeline(), tmp_path)
        assert changed.runtime == Runtime("bfloat16", compile=True, attention="explicit")
        assert witness == {"method": "compile", "dtype": "bfloat16", "dtype_before": "float32", "engine": "torch"}

    def test_auto_is_bfloat16_where_the_hardware_has_it(self, monkeypatch):
        for native in (True, False):
            monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
            monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
            assert Compile().precision("cpu") == ("bfloat16" if native else "float32")

    def test_unknown_options_are_refused(self):
        with pytest.raises(ValueError, match="dtype 'int8' is unknown"):
            Compile(dtype="int8")
        with pytest.raises(ValueError, match="attention 'flash' is unknown"):
            Compile(attention="flash")

    @pytest.mark.slow
    def test_compiled_images_are_the_eager_ones(self, tmp_path):
        packed, _ = apply_once(Quantize(activations="int8"), small_pipeline(), tmp_path)
        changed, _ = apply_once(Compile(dtype="float32"), packed, tmp_path)
        compiled = changed.sample(range(4), seed=3, batch=4).astype(float)
        assert np.abs(compiled - images(packed)).mean() < 1

    def test_the_twin_is_checked_without_the_compiler(self):
        twin, _ = rehearse(Recipe("compiled", (Compile(),)), SMALL)
        assert twin.runtime.compile
