"""Balance in training: the auxiliary loss is its equation, the bias follows the load, and a resumed run is the same."""

from dataclasses import replace

import pytest
import torch

from slimdit.files import read_tensors
from slimdit.models.dit import DiT, uniform
from slimdit.models.experts_config import ExpertsConfig
from slimdit.sampling.process import NoiseProcess
from slimdit.training.balance import RATE, WEIGHT, Balance, balancing, first_choices
from slimdit.training.loop import TrainConfig, train

from .test_loop import tiny_data

SHAPE = uniform(depth=2, width=16, heads=2, patch=2, input_size=(8, 8), channels=1, classes=3)


def model_of(*balances):
    blocks = tuple(replace(SHAPE.blocks[0], experts=ExpertsConfig(4, 16, "token_choice", balance=balance))
                   for balance in balances)
    torch.manual_seed(0)
    model = DiT(replace(SHAPE, blocks=blocks))
    for name, parameter in model.named_parameters():
        if not name.endswith("router.bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def ask(model):
    generator = torch.Generator().manual_seed(1)
    return model(torch.randn(4, 1, 8, 8, generator=generator), torch.full((4,), 300), torch.tensor([0, 3, 1, 3]))


def test_the_loss_is_switchs_equation_and_moves_the_router_alone():
    model = model_of("loss", "none")
    router = model.blocks[0].mlp.router
    with balancing(model) as balance:
        ask(model)
        scores, _ = balance.seen[router]
        loss = balance.loss()
    flat = scores.reshape(-1, 4)
    share = torch.bincount(flat.argmax(1), minlength=4) / len(flat)
    torch.testing.assert_close(loss, WEIGHT * 4 * (share * flat.softmax(1).mean(0)).sum())
    loss.backward()
    assert router.weight.grad.abs().sum() > 0 and model.blocks[1].mlp.router.weight.grad is None
    even = torch.full((1, 4, 4), -9.0).diagonal_scatter(torch.full((1, 4), 9.0), dim1=1, dim2=2)
    balance.seen[router] = even, torch.tensor([False])
    assert balance.loss().item() == pytest.approx(WEIGHT, rel=1e-3)  # its least value
    balance.seen[router] = even[:, :1].expand(1, 4, 4), torch.tensor([False])
    assert balance.loss().item() == pytest.approx(4 * WEIGHT, rel=1e-3)  # all for one


def test_the_bias_of_labelled_and_unlabelled_images_follows_the_load_of_each():
    model = model_of("none", "bias")
    router = model.blocks[1].mlp.router
    with balancing(model) as balance:
        ask(model)
        scores, unlabelled = balance.seen[router]
        first = first_choices(router, scores, unlabelled)
        assert balance.loss() == 0
        balance.shift(lambda load: load)
    for row, mask in enumerate((~unlabelled, unlabelled)):
        load = first[mask].sum((0, 1))
        assert torch.equal(router.bias[row], RATE * (load.mean() - load).sign()) and load.std() > 0
    assert model.blocks[0].mlp.router.bias.abs().sum() == 0


def test_enough_shifts_make_first_choices_even():
    model = model_of("bias", "bias")
    router = model.blocks[0].mlp.router
    before, loads = None, None
    with torch.no_grad(), balancing(model) as balance:
        for _ in range(1500):
            if before is None:
                ask(model)
            scores, unlabelled = balance.seen[router]
            loads = first_choices(router, scores, unlabelled)[~unlabelled].mean((0, 1))
            before = loads if before is None else before
            balance.shift(lambda load: load)
    assert (loads - 0.25).abs().max() < 0.1 < (before - 0.25).abs().max()


def test_hooks_go_with_the_training():
    model = model_of("bias", "loss")
    with balancing(model):
        assert len(model.blocks[0].mlp.router._forward_hooks) == 1
    assert not model.blocks[0].mlp.router._forward_hooks and not model.blocks[1].mlp.router._forward_hooks
    assert Balance(DiT(SHAPE)).loss() == 0


def test_training_balances_and_a_resumed_run_is_the_same_to_the_bit(tmp_path):
    config = TrainConfig(steps=4, batch=4, checkpoint_every=2, log_every=1, precision="fp32")
    whole = train(model_of("bias", "loss"), NoiseProcess(), tiny_data(), config, tmp_path / "a")
    begun = train(model_of("bias", "loss"), NoiseProcess(), tiny_data(), replace(config, steps=2), tmp_path / "b")
    assert begun.blocks[0].mlp.router.bias.abs().max() > 0
    resumed = train(model_of("bias", "loss"), NoiseProcess(), tiny_data(), config, tmp_path / "b", resume=True)
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(one, other), name
    assert whole.blocks[1].mlp.router.bias.abs().sum() == 0
    biases = read_tensors(tmp_path / "a" / "checkpoint.safetensors")[0]["model.blocks.0.mlp.router.bias"]
    assert 0 < biases.abs().max() <= 4.01 * RATE  # four steps
