"""What seeds promise: a stream belongs to its seed, purpose and image, and labels are balanced."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slimdit.sampling.seeds import ImageNoise, image_labels, seeded


def numbers(generator):
    return torch.randn(8, generator=generator)


def test_streams_repeat_and_differ():
    assert torch.equal(numbers(seeded(3, "noise", 1)), numbers(seeded(3, "noise", 1)))
    streams = [seeded(3, "noise", 1), seeded(3, "noise", 2), seeded(4, "noise", 1), seeded(3, "labels", 1), seeded(3),
               seeded(3, "noise", "1"), seeded(31, "noise")]
    drawn = torch.stack([numbers(stream) for stream in streams])
    assert len(torch.unique(drawn, dim=0)) == len(streams)


def test_streams_ignore_the_global_generator():
    torch.manual_seed(0)
    first = numbers(seeded(1, "x"))
    torch.manual_seed(1)
    assert torch.equal(first, numbers(seeded(1, "x")))


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=6), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_noise_of_an_image_is_its_own(ids, place):
    place %= len(ids)
    together, alone = ImageNoise(5, ids, (2, 3)), ImageNoise(5, [ids[place]], (2, 3))
    for _ in range(3):
        assert torch.equal(together.draw()[place], alone.draw()[0])


def test_noise_is_standard_normal_and_new_at_every_draw():
    noise = ImageNoise(0, range(16), (4, 16, 16))
    first, second = noise.draw(), noise.draw()
    assert first.dtype == torch.float32 and first.shape == (16, 4, 16, 16)
    assert abs(first.mean().item()) < 0.03 and abs(first.std().item() - 1) < 0.03
    correlation = torch.corrcoef(torch.cat([first.flatten(1), second.flatten(1)]))
    assert (correlation - torch.eye(32)).abs().max() < 0.15


@given(st.integers(0, 3), st.integers(1, 20), st.integers(0, 4))
@settings(deadline=None)
def test_labels_are_balanced_in_every_run(seed, classes, run):
    labels = image_labels(seed, range(run * classes, (run + 1) * classes), classes)
    assert sorted(labels.tolist()) == list(range(classes))


def test_labels_do_not_depend_on_what_else_is_asked():
    whole = image_labels(0, range(100), 10)
    assert image_labels(0, [97, 3, 50], 10).tolist() == [whole[97], whole[3], whole[50]]
    assert image_labels(0, [], 10).shape == (0,)
    assert whole.dtype == torch.int64


def test_labels_are_shuffled_anew():
    runs = image_labels(0, range(1000), 100).view(10, 100)
    assert len(torch.unique(runs, dim=0)) == 10
    assert not torch.equal(runs, image_labels(1, range(1000), 100).view(10, 100))


@pytest.mark.parametrize("big", [2**40, 2**62])
def test_any_whole_seed_will_do(big):
    assert torch.isfinite(numbers(seeded(big, "noise", big))).all()
    assert torch.isfinite(numbers(seeded(-1, "noise"))).all()
