"""What a GPU executes in the place of a model's layers: the same answers, whatever is faster."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from slimdit import formats
from slimdit.methods.prune_weights import outside_best
from slimdit.models.dit import DiT, uniform
from slimdit.models.execution import (
    HOPPER,
    LEAST_ORDINARY,
    LEAST_WEIGHTS,
    Graphed,
    SparseLinear,
    gains,
    is_two_of_four,
    kernel_seconds,
    prepare_for_gpu,
    put_gelu_inside,
    round_as_they_are,
    run_as_floats,
    run_sparse,
    slow_packed,
)
from slimdit.models.fp8 import Fp8Dynamic, as_they_are, float8_rows
from slimdit.models.linear import GeluLinear, Int8Dynamic, Int8WeightOnly
from slimdit.models.surgery import pack_linears
from slimdit.pipeline import Pipeline, Runtime
from slimdit.sampling.settings import Sampling

CONFIG = uniform(depth=2, width=64, heads=2, patch=2, input_size=(8, 8), channels=1, classes=3)
IN_BLOCKS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def model(kind=None, config=CONFIG):
    torch.manual_seed(0)
    made = DiT(config).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    if kind:
        pack_linears(made, {f"blocks.{block}.{name}": kind for block in range(2) for name in IN_BLOCKS})
    return made


def inputs(device="cpu", rows=3):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 1, 8, 8, generator=generator)
    return x.to(device), torch.arange(rows, device=device) * 100, torch.arange(rows, device=device) % 4


def apart(actual, expected):
    return ((actual.float().cpu() - expected.float().cpu()).norm() / expected.float().cpu().norm()).item()


def test_only_what_is_faster_runs_as_it_is():
    large, small = ((1024, LEAST_WEIGHTS // 1024), (1024, 1024))
    with torch.device("meta"):
        assert gains(Fp8Dynamic(*large), HOPPER) and not gains(Fp8Dynamic(*small), HOPPER)
        ordinary = Fp8Dynamic(1024, LEAST_ORDINARY // 1024)
        assert not gains(ordinary, HOPPER)
        ordinary.ordinary = True
        assert gains(ordinary, HOPPER)
        assert not gains(Int8Dynamic(*large), HOPPER) and gains(Int8Dynamic(*large), (8, 0))
        assert gains(Int8WeightOnly(*small), HOPPER) and gains(nn.Linear(*small), HOPPER)
    assert slow_packed(model("int8_dynamic"), HOPPER) == [f"blocks.{block}.{name}" for block in range(2)
                                                          for name in IN_BLOCKS]
    assert slow_packed(model("int8_dynamic"), (8, 0)) == []
    assert len(slow_packed(model("int8_static"), (8, 0))) == 8  # no product of a GPU is for them


@pytest.mark.parametrize("kind", ["fp8_dynamic", "int8_dynamic", "int8_weight_only"])
def test_floats_in_the_place_of_packed_layers_have_their_weights(kind):
    packed = model(kind)
    plain = copy.deepcopy(packed)
    run_as_floats(plain, ["blocks.0.attn.qkv", "blocks.1.mlp.fc2"])
    layer, was = plain.blocks[0].attn.qkv, packed.blocks[0].attn.qkv
    assert type(layer) is nn.Linear and torch.equal(layer.weight, was.dequantize())
    assert torch.equal(layer.bias, was.bias) and type(plain.blocks[0].attn.proj) is type(packed.blocks[0].attn.proj)
    with torch.no_grad():
        assert apart(plain(*inputs()), packed(*inputs())) < 0.05


def trained(kind):
    made = copy.deepcopy(formats.load("bundled").model).eval()
    names = [f"blocks.{block}.{name}" for block in range(len(made.blocks)) for name in IN_BLOCKS]
    pack_linears(made, dict.fromkeys(names, kind))
    return made


def test_a_trained_model_loses_nothing_without_looks_at_its_tokens():
    exact, looked = formats.load("bundled").model.eval(), trained("fp8_dynamic")
    unlooked = copy.deepcopy(looked)
    round_as_they_are(unlooked)
    told = {name for name, layer in unlooked.named_modules() if isinstance(layer, Fp8Dynamic) and layer.ordinary}
    assert told == {f"blocks.{block}.{name}" for block in range(len(exact.blocks)) for name in IN_BLOCKS
                    if name != "attn.proj"}  # whose input is of no known size
    x = torch.randn(4, exact.config.channels, *exact.config.input_size, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([990, 600, 300, 20]), torch.arange(4)
    with torch.no_grad():
        expected = exact(x, t, y)
        assert 0 < apart(unlooked(x, t, y), looked(x, t, y)) < 2 * apart(looked(x, t, y), expected)
        assert apart(unlooked(x, t, y), expected) < 1.1 * apart(looked(x, t, y), expected)
    assert unlooked.state_dict().keys() == looked.state_dict().keys()


@given(st.integers(0, 2**32), st.sampled_from([0.1, 1.0, 30.0]))
def test_numbers_of_ordinary_size_need_no_scale(seed, size):
    rows = torch.randn(8, 512, generator=torch.Generator().manual_seed(seed)) * size
    rounded, step = as_they_are(rows)
    scaled, scale = float8_rows(rows)
    assert (step == 1).all() and step.shape == (8, 1)
    assert apart(rounded, rows) < 1.2 * apart(scaled.float() * scale, rows)
    assert as_they_are(torch.tensor([[1e4, -1e4]]))[0].float().tolist() == [[448, -448]]


def test_a_gelu_goes_into_the_product_before_it(monkeypatch):
    def product(rows, weight, bias):
        return nn.functional.gelu(nn.functional.linear(rows, weight, bias), approximate="tanh")

    monkeypatch.setattr(torch.ops.slimdit, "gelu_linear", product)
    plain = model().bfloat16()
    inside = copy.deepcopy(plain)
    put_gelu_inside(inside)
    assert all(type(block.mlp.fc1) is GeluLinear and type(block.mlp.fc2) is nn.Linear for block in inside.blocks)
    assert inside.state_dict().keys() == plain.state_dict().keys()
    x, t, y = inputs()
    with torch.no_grad():
        assert torch.equal(inside(x.bfloat16(), t, y), plain(x.bfloat16(), t, y))
        assert torch.equal(inside.blocks[0].mlp.fc1(torch.ones(2, 3, 64).bfloat16()),
                           plain.blocks[0].mlp.fc1(torch.ones(2, 3, 64).bfloat16()))
    for other in (model(), model("fp8_dynamic").bfloat16()):
        put_gelu_inside(other)
        assert not any(isinstance(layer, GeluLinear) for layer in other.modules())


def test_two_of_four_is_seen_in_the_weights():
    weight = torch.randn(64, 32).bfloat16()
    weight[outside_best(weight.abs().float(), 2, 4)] = 0
    assert is_two_of_four(weight) and is_two_of_four(torch.zeros(32, 32, dtype=torch.float16))
    assert not is_two_of_four(weight.float()) and not is_two_of_four(weight[:40])
    weight[3, :3] = 1
    assert not is_two_of_four(weight)


@pytest.mark.parametrize("gains", [True, False])
def test_sparse_layers_are_tried_on_the_tokens_of_the_first_call(gains, monkeypatch):
    sparse, tried = model().bfloat16(), []
    with torch.no_grad():
        for name in ("attn.qkv", "mlp.fc1"):
            weight = sparse.blocks[1].get_submodule(name).weight
            weight[outside_best(weight.abs().float(), 2, 4)] = 0
        adaln = sparse.blocks[0].adaLN_modulation[1].weight
        adaln[outside_best(adaln.abs().float(), 2, 4)] = 0

    def faster(layer, rows):
        tried.append((layer.out_features, rows))
        return 3 if gains else None

    class Stand(nn.Linear):
        def __init__(self, linear, algorithm):
            super().__init__(linear.in_features, linear.out_features, dtype=torch.bfloat16)
            self.load_state_dict(linear.state_dict())
            self.algorithm = algorithm

    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr("slimdit.models.execution.faster_algorithm", faster)
    monkeypatch.setattr("slimdit.models.execution.SparseLinear", Stand)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    x, t, y = inputs()
    with torch.no_grad():
        expected = sparse(x.bfloat16(), t, y)
        graphed = Graphed(sparse, sparse.forward)
        for _ in range(2):
            assert torch.equal(graphed(x.bfloat16(), t, y), expected)
    assert tried == [(192, 3 * 16), (256, 3 * 16)]
    assert isinstance(sparse.blocks[1].mlp.fc1, Stand) == gains
    assert not isinstance(sparse.blocks[0].mlp.fc1, Stand)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [None, "fp8_dynamic", "int8_dynamic"])
def test_what_a_gpu_runs_means_the_same(kind):
    config = uniform(depth=2, width=512, heads=8, patch=2, input_size=(8, 8), channels=1, classes=3)
    packed = model(kind, config)
    with torch.no_grad():
        expected = packed(*inputs())
        executed = copy.deepcopy(packed).cuda().bfloat16()
        prepare_for_gpu(executed, torch.device("cuda"))
        assert apart(executed(*(part.bfloat16() if part.is_floating_point() else part for part in inputs("cuda"))),
                     expected) < 0.1  # 0.07 with float8


@pytest.mark.gpu
def test_sparse_products_are_the_dense_ones():
    if not torch.backends.cusparselt.is_available():
        pytest.skip("this PyTorch has no cuSPARSELt")
    layer, x = nn.Linear(1024, 2048).cuda().bfloat16(), torch.randn(4, 512, 1024, device="cuda").bfloat16()
    with torch.no_grad():
        layer.weight[outside_best(layer.weight.abs().float(), 2, 4)] = 0
        assert is_two_of_four(layer.weight)
        assert apart(SparseLinear(layer)(x), layer(x)) < 0.01
        assert apart(torch.compile(SparseLinear(layer))(x), layer(x)) < 0.01
        assert kernel_seconds(lambda: layer(x)) > 0
        holder = nn.ModuleDict({"mlp": nn.Sequential(layer), "other": nn.Sequential(layer)})
        assert set(run_sparse(holder, 2048)) <= {"mlp.0"}
        assert apart(holder["mlp"](x), layer(x)) < 0.01


def test_every_one_of_many_models_is_compiled(monkeypatch):
    seen = []

    def backend(graph, inputs, **_):
        seen.append(graph)
        return graph.forward

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=backend, **options))
    for width in range(8, 8 + 4 * 12, 4):
        config = uniform(depth=1, width=width, heads=1, patch=4, input_size=(8, 8), channels=1, classes=3)
        Pipeline(model(config=config), runtime=Runtime(compile=True), sampling=Sampling(steps=2)).sample([0], batch=1)
    assert len(seen) == 12
