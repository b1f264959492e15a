"""What a GPU executes in the place of a model's layers: the same answers, whatever is faster."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from slimdit.methods.prune_weights import outside_best
from slimdit.models.dit import DiT, uniform
from slimdit.models.execution import (
    HOPPER,
    LEAST_WEIGHTS,
    Graphed,
    SparseLinear,
    bound_hidden_units,
    gains,
    is_two_of_four,
    kernel_seconds,
    prepare_for_gpu,
    run_as_floats,
    run_sparse,
    slow_packed,
)
from slimdit.models.feedforward import MLP, farthest
from slimdit.models.fp8 import Fp8Dynamic
from slimdit.models.linear import Int8Dynamic, Int8WeightOnly
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
        assert not gains(Int8Dynamic(*large), HOPPER) and gains(Int8Dynamic(*large), (8, 0))
        assert gains(Int8WeightOnly(*small), HOPPER) and gains(nn.Linear(*small), HOPPER)
    assert slow_packed(model("int8_dynamic"), HOPPER) == [f"blocks.{block}.{name}" for block in range(2)
                                                          for name in IN_BLOCKS]
    assert slow_packed(model("int8_dynamic"), (8, 0)) == []


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


@given(st.integers(0, 2**32), st.sampled_from([1e-3, 1.0, 100.0]))
def test_no_hidden_unit_goes_beyond_its_bound(seed, size):
    torch.manual_seed(seed)
    mlp, x = MLP(16, 32), torch.randn(5, 16) * size
    bound = farthest(x, torch.stack([mlp.fc1.weight.norm(dim=1).amax(), mlp.fc1.bias.abs().amax()]))
    assert bound.shape == (5, 1) and (mlp.fc1(x).abs().amax(1) <= bound[:, 0] * (1 + 1e-5)).all()


def test_a_bound_in_the_place_of_a_look_costs_next_to_nothing():
    exact, looked = model(), model("fp8_dynamic")
    bounded = copy.deepcopy(looked)
    bound_hidden_units(bounded)
    assert all(block.mlp.reach.shape == (2,) for block in bounded.blocks)
    with torch.no_grad():
        expected = exact(*inputs())
        assert 0 < apart(bounded(*inputs()), looked(*inputs())) < apart(looked(*inputs()), expected)
        assert apart(bounded(*inputs()), expected) < 1.2 * apart(looked(*inputs()), expected)
    assert bounded.state_dict().keys() == looked.state_dict().keys()
    bound_hidden_units(exact)
    assert exact.blocks[0].mlp.reach is None


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
        graphed = Graphed(sparse, "forward")
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

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=backend, **options))
    for width in range(8, 8 + 4 * 12, 4):
        config = uniform(depth=1, width=width, heads=1, patch=4, input_size=(8, 8), channels=1, classes=3)
        Pipeline(model(config=config), runtime=Runtime(compile=True), sampling=Sampling(steps=2)).sample([0], batch=1)
    assert len(seen) == 12
