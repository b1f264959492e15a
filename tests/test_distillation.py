"""What a student is compared with, each beside a naive definition of itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slimdit.models.dit import DiT, uniform
from slimdit.models.surgery import enlarge_patch, keep_blocks
from slimdit.sampling.settings import Sampling
from slimdit.sampling.solvers import guided as guided_answer
from slimdit.sampling.solvers import is_guided
from slimdit.training.calibration import Call
from slimdit.training.distillation import (
    Features,
    guided,
    labelled,
    masked_distance,
    matched_blocks,
    pooled,
    remembered,
    unmatched,
    weighed_distance,
    with_features,
)
from slimdit.training.loop import Batch

OBLONG = uniform(depth=4, width=16, heads=2, patch=2, input_size=(8, 4), channels=2, classes=3)


def random_model(config=OBLONG, seed=0):
    torch.manual_seed(seed)
    model = DiT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def inputs(images=4):
    generator = torch.Generator().manual_seed(2)
    return (torch.randn(images, 2, 8, 4, generator=generator), torch.tensor([3, 300, 600, 900]),
            torch.tensor([0, 1, 2, 3]))


def test_the_variance_weighs_what_it_is_told():
    answer, expected = torch.zeros(2, 4, 3, 3), torch.ones(2, 4, 3, 3)
    expected[:, 2:] = 3
    assert torch.equal(weighed_distance(2, 0.5)(answer, expected), torch.full((2,), 1 + 0.5 * 9))
    assert torch.equal(weighed_distance(4, 0.5)(answer, expected), torch.full((2,), 5.0))  # no variance is learned


def test_a_teacher_is_asked_the_same_thing_once(tmp_path):
    model, asked = random_model(), []

    def teacher(x, t, y):
        asked.append(len(x))
        return model(x, t, y).detach()

    x, t, y = inputs()
    first = remembered(teacher, tmp_path / "answers")(x, t, y)
    again = remembered(teacher, tmp_path / "answers")  # as a resumed run does
    assert torch.equal(first, model(x, t, y)) and torch.equal(again(x, t, y), first) and asked == [4]
    for other in ((x + 1e-6, t, y), (x, t + 1, y), (x, t, y.flip(0))):
        assert torch.equal(again(*other), model(*other))
    assert len(asked) == 4


@given(st.integers(1, 12).flatmap(lambda teacher: st.tuples(st.integers(1, teacher), st.just(teacher))))
def test_matched_blocks_ascend_to_the_last_and_are_all_of_an_equal_model(depths):
    student, teacher = depths
    matched = matched_blocks(student, teacher)
    assert matched == sorted(set(matched)) and len(matched) == student
    assert matched[0] >= 0 and matched[-1] == teacher - 1
    assert student != teacher or matched == list(range(teacher))
    assert all(abs((place + 1) / student - (block + 1) / teacher) <= 0.5 / teacher + 1e-9
               for place, block in enumerate(matched))


def test_pooled_tokens_are_the_means_of_squares_on_an_oblong_grid():
    tokens = torch.randn(2, 4 * 2, 5)
    means = [tokens[:, [row * 2, row * 2 + 1, row * 2 + 2, row * 2 + 3]].mean(1) for row in (0, 2)]
    torch.testing.assert_close(pooled(tokens, (4, 2), 2), torch.stack(means, dim=1))
    assert torch.equal(pooled(tokens, (4, 2), 1), tokens)


def test_what_is_huge_in_either_model_is_masked():
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(2, 30, 40, generator=generator) for _ in range(2))
    teacher[0, 0, 0], student[1, 2, 3] = 80.0, -80.0
    usual, total = teacher[(teacher - teacher.mean()).abs() <= 2 * teacher.std()], []
    for one, other in zip(student, teacher):  # element by element
        squares = [(a - b) ** 2 for a, b in zip(one.flatten().tolist(), other.flatten().tolist())
                   if abs(a - student.mean().item()) <= 2 * student.std().item()
                   and abs(b - teacher.mean().item()) <= 2 * teacher.std().item()]
        total.append(sum(squares) / len(squares) / usual.var().item())
    torch.testing.assert_close(masked_distance(student, teacher, 2.0), torch.tensor(total), rtol=1e-4, atol=1e-6)
    assert max(total) < 2.5 < 5 < (student - teacher).square().mean((1, 2)).min()
    torch.testing.assert_close(masked_distance(7 * student, 7 * teacher, 2.0), masked_distance(student, teacher, 2.0))


@pytest.mark.parametrize("patch", [2, 4])
def test_features_are_the_matched_blocks_tokens(patch):
    teacher, student = random_model(), random_model(seed=1)
    keep_blocks(student, [0, 3])
    enlarge_patch(student, patch)
    tokens = {}
    x, t, y = inputs()
    hooks = [block.register_forward_hook(lambda module, _, output, name=name: tokens.update({name: output}))
             for name, block in [("t1", teacher.blocks[1]), ("t3", teacher.blocks[3]), ("s0", student.blocks[0]),
                                 ("s1", student.blocks[1])]]
    features = Features(student, teacher)
    with features.watched():
        with torch.no_grad():
            teacher(x, t, y)
        student(x, t, y)
    found = features.distance(2.0)
    means = [pooled(tokens[name], (4, 2), patch // 2) for name in ("t1", "t3")]
    expected = (masked_distance(tokens["s0"], means[0], 2.0) + masked_distance(tokens["s1"], means[1], 2.0)) / 2
    torch.testing.assert_close(found, expected)
    found.mean().backward()
    assert student.x_embedder.proj.weight.grad.abs().sum() > 0 and teacher.x_embedder.proj.weight.grad is None
    for hook in hooks:
        hook.remove()
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())


def test_the_weight_of_features_falls_in_a_line_and_ends():
    class Constant:
        def distance(self, sigmas):
            return torch.tensor([10.0])

    loss = with_features(lambda model, batch: torch.tensor([1.0]), Constant(), weight=0.2, last=8.0, sigmas=2.0)
    empty = torch.empty(0)
    values = [loss(None, Batch(empty, empty, empty, empty, step)).item() for step in (0, 4, 6, 8, 100)]
    assert values == pytest.approx([3, 2, 1.5, 1, 1])


def test_models_whose_tokens_cannot_be_compared_are_named():
    def config(**changes):
        return uniform(**{"depth": 4, "width": 16, "heads": 2, "patch": 2, "input_size": (24, 24), "channels": 1,
                          "classes": 3, **changes})

    assert unmatched(config(depth=2, patch=4), config()) == ""
    assert "16 features cannot be compared with the teacher's of 32" in unmatched(config(), config(width=32))
    assert "4 blocks have no 2 of the teacher's" in unmatched(config(), config(depth=2))
    assert "patches of 3 are no whole patches of the teacher's 2" in unmatched(config(patch=3), config())


@pytest.mark.parametrize("channels, interval", [(None, (0, 1000)), (1, (300, 600)), (7, (0, 299))])
def test_a_guided_answer_is_samplings_own(channels, interval):
    """Each image at its own timestep, in or out of the interval, with one label or none."""
    model = random_model()
    sampling = Sampling(guidance=2.5, guidance_channels=channels, guidance_interval=interval)
    x, t, y = inputs()
    with torch.no_grad():
        answer = guided(model, sampling, OBLONG)(x, t, y)
        for place in range(4):
            label = y[place:place + 1]
            asked = torch.cat([label, torch.tensor([3])]) if is_guided(sampling, int(t[place])) else label
            eps, variance = guided_answer(model, sampling, x[place:place + 1], t[place].expand(len(asked)), asked,
                                          True)
            torch.testing.assert_close(answer[place:place + 1], torch.cat([eps, variance], 1), rtol=1e-4, atol=1e-5)
        plain = model(x, t, y)
    torch.testing.assert_close(answer[3], plain[3], rtol=1e-4, atol=1e-5)  # the null class
    assert (answer[1] - plain[1]).abs().max() > 1e-2 or interval == (0, 299)


def test_the_labelled_half_of_a_call():
    call = Call(torch.arange(4.0), torch.tensor([9, 9, 9, 9]), torch.tensor([0, 2, 3, 3]))
    half = labelled(call, 3)
    assert half.x.tolist() == [0, 1] and half.y.tolist() == [0, 2] and len(half.t) == 2
