"""Latents encoded once are the autoencoder's posteriors, whoever wrote them and however often it was interrupted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from slimdit.files import read_tensors, write_tensors
from slimdit.models import autoencoder as autoencoders
from slimdit.models.autoencoder import PixelSpace
from slimdit.sampling.seeds import seeded
from slimdit.training.data import ArrayImages, open_data
from slimdit.training.encode import EncodedLatents, encode, shard_path


class Pooling:
    """An autoencoder one can check by hand: the mean is the pooled image, the deviation is the same everywhere."""

    factor = 2
    image_channels: int | None = 3
    scale = 0.5

    def __init__(self, std: float = 0.1) -> None:
        self.std, self.calls = std, 0

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        mean = avg_pool2d(images, 2)
        return mean, torch.full_like(mean, self.std)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return avg_pool2d(images, 2) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def to(self, device) -> Pooling:
        return self

    def to_dict(self) -> dict:
        return {"kind": "pooling", "std": self.std}


class KilledError(Exception):
    pass


@pytest.fixture
def images() -> ArrayImages:
    rng = np.random.default_rng(0)
    return ArrayImages(rng.integers(0, 256, (11, 3, 8, 12), dtype=np.uint8), np.arange(11) % 4)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_latents_are_draws_from_the_posterior_of_the_image_or_its_mirror(tmp_path, images):
    assert encode(images, Pooling(std=1e-4), tmp_path, shard=4, batch=3, source="noise")
    latents = open_data(str(tmp_path))
    assert isinstance(latents, EncodedLatents)
    assert (latents.shape, latents.classes, len(latents), latents.scale) == ((3, 4, 6), 4, 11, 0.5)

    indices = torch.tensor([10, 0, 7] * 40)
    batch, labels = latents.batch(indices, seeded(0))
    clean, expected_labels = images.batch(indices, seeded(0))
    straight = avg_pool2d(clean, 2) * 0.5
    mirrored = avg_pool2d(clean.flip(-1), 2) * 0.5
    is_straight = (batch - straight).abs().amax((1, 2, 3)) < 1e-3
    is_mirrored = (batch - mirrored).abs().amax((1, 2, 3)) < 1e-3
    assert torch.equal(is_straight, ~is_mirrored)
    assert 35 < int(is_mirrored.sum()) < 85
    assert torch.equal(labels, expected_labels)


def test_sampling_has_the_posteriors_deviation_and_the_generators_randomness(tmp_path, images):
    encode(images, Pooling(std=0.3), tmp_path, flips=False)
    latents = EncodedLatents(tmp_path)
    indices = torch.full((500,), 5)
    batch, _ = latents.batch(indices, seeded(1))
    assert torch.equal(batch, latents.batch(indices, seeded(1))[0])
    assert not torch.equal(batch, latents.batch(indices, seeded(2))[0])
    clean, _ = images.batch(indices[:1], seeded(0))
    assert torch.allclose(batch.std(0), torch.full((3, 4, 6), 0.3 * 0.5), rtol=0.2)
    assert torch.allclose(batch.mean(0), avg_pool2d(clean, 2)[0] * 0.5, atol=5 * 0.15 / 500 ** 0.5)


def test_a_latent_is_exact_at_zero_deviation(tmp_path, images):
    encode(images, Pooling(std=0.0), tmp_path, flips=False, shard=2)
    batch, _ = EncodedLatents(tmp_path).batch(torch.arange(11), seeded(0))
    assert torch.equal(batch, Pooling().encode(images.batch(torch.arange(11), seeded(0))[0]))


def test_several_workers_write_what_one_writes_and_the_last_adds_the_index(tmp_path, images):
    encode(images, Pooling(), tmp_path / "one", shard=3, batch=2)
    assert not encode(images, Pooling(), tmp_path / "two", shard=3, batch=2, worker=1, workers=2)
    assert sorted(contents(tmp_path / "two")) == ["shard-00001.safetensors", "shard-00003.safetensors"]
    with pytest.raises(FileNotFoundError, match="run slimdit encode again to finish"):
        open_data(str(tmp_path / "two"))
    assert encode(images, Pooling(), tmp_path / "two", shard=3, batch=2, worker=0, workers=2)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_killed_run_goes_on_without_encoding_anything_twice(tmp_path, images):
    encode(images, Pooling(), tmp_path / "whole", shard=4, batch=4)

    def dying(done: int, total: int) -> None:
        if done >= 8:
            raise KilledError

    with pytest.raises(KilledError):
        encode(images, Pooling(), tmp_path / "killed", shard=4, batch=4, progress=dying)
    assert sorted(contents(tmp_path / "killed")) == ["shard-00000.safetensors"]
    again, heard = Pooling(), []
    assert encode(images, again, tmp_path / "killed", shard=4, batch=4, progress=lambda *said: heard.append(said))
    assert again.calls == 2
    assert heard == [(4, 11), (8, 11), (11, 11)]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_truncated_shard_is_written_again(tmp_path, images):
    encode(images, Pooling(), tmp_path, shard=4)
    before = contents(tmp_path)
    path = shard_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        EncodedLatents(tmp_path).batch(torch.tensor([5]), seeded(0))
    again = Pooling()
    encode(images, again, tmp_path, shard=4)
    assert again.calls == 1
    assert contents(tmp_path) == before


def test_latents_of_other_settings_are_not_mixed(tmp_path, images):
    encode(images, Pooling(), tmp_path / "done")
    before = contents(tmp_path / "done")
    with pytest.raises(ValueError, match=r"other latents .flips differ"):
        encode(images, Pooling(), tmp_path / "done", flips=False)
    with pytest.raises(ValueError, match=r"other latents .autoencoder differ"):
        encode(images, Pooling(std=0.2), tmp_path / "done")
    assert contents(tmp_path / "done") == before

    encode(images, Pooling(), tmp_path / "half", shard=6, worker=0, workers=2)
    with pytest.raises(ValueError, match=r"other latents .source differ"):
        encode(images, Pooling(), tmp_path / "half", shard=6, source="elsewhere")


def test_gray_images_are_encoded_as_colour(tmp_path):
    gray = np.random.default_rng(0).integers(0, 256, (2, 1, 4, 4), dtype=np.uint8)
    encode(ArrayImages(gray, np.array([0, 1])), Pooling(), tmp_path)
    assert EncodedLatents(tmp_path).shape == (3, 2, 2)


def test_what_cannot_be_encoded_is_refused(tmp_path, images):
    pixels = np.zeros((2, 3, 8, 8), np.uint8)
    labels = np.zeros(2, np.int64)
    with pytest.raises(ValueError, match="has nothing to encode"):
        encode(images, PixelSpace(), tmp_path)
    with pytest.raises(ValueError, match="mirrored at random"):
        encode(ArrayImages(pixels, labels, flip=True), Pooling(), tmp_path)
    with pytest.raises(ValueError, match="worker 2 of 2"):
        encode(images, Pooling(), tmp_path, worker=2, workers=2)
    with pytest.raises(ValueError, match="images of 4 channels do not fit"):
        encode(ArrayImages(np.zeros((2, 4, 8, 8), np.uint8), labels), Pooling(), tmp_path)
    with pytest.raises(ValueError, match="not a multiple of the autoencoder's 2"):
        encode(ArrayImages(pixels[..., :7], labels), Pooling(), tmp_path)
    with pytest.raises(ValueError, match="not finite for images 0 to 10"):
        encode(images, Pooling(std=float("nan")), tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_encode_did_not_write_is_refused(tmp_path, images):
    encode(images, Pooling(), tmp_path, shard=4)
    index = json.loads((tmp_path / "index.json").read_text())
    for text in ("{", "[]", json.dumps({**index, "kind": "other"}), json.dumps({**index, "shape": [3, 4]}),
                 json.dumps({**index, "shard": 0})):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(ValueError, match="is not the index of latents"):
            EncodedLatents(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(index))
    tensors, metadata = read_tensors(shard_path(tmp_path, 0))
    write_tensors(shard_path(tmp_path, 0), {**tensors, "std": tensors["std"][:1]}, metadata)
    with pytest.raises(ValueError, match="does not hold the 4 latents its index says"):
        EncodedLatents(tmp_path).batch(torch.tensor([0]), seeded(0))
    shard_path(tmp_path, 2).unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00002\.safetensors is missing"):
        EncodedLatents(tmp_path)


def test_open_data_refuses_to_resize_latents_or_to_flip_what_has_no_mirrored_copies(tmp_path):
    square = ArrayImages(np.zeros((2, 3, 8, 8), np.uint8), np.zeros(2, np.int64))
    encode(square, Pooling(), tmp_path, flips=False)
    assert open_data(str(tmp_path), size=4).shape == (3, 4, 4)
    with pytest.raises(ValueError, match="cannot be resized to 8"):
        open_data(str(tmp_path), size=8)
    with pytest.raises(ValueError, match="encoded without mirrored copies"):
        open_data(str(tmp_path), flip=True)


@pytest.mark.skipif(not hasattr(autoencoders, "KLAutoencoder"), reason="no KLAutoencoder")
def test_a_real_autoencoder_of_diffusers(tmp_path):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), layers_per_block=1,
                  down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                  norm_num_groups=4, scaling_factor=0.18215).save_pretrained(tmp_path / "vae")
    autoencoder = autoencoders.KLAutoencoder(str(tmp_path / "vae"))
    data = ArrayImages(np.random.default_rng(0).integers(0, 256, (5, 3, 16, 16), dtype=np.uint8), np.arange(5))
    assert encode(data, autoencoder, tmp_path / "latents", flips=False)
    latents = EncodedLatents(tmp_path / "latents")
    assert latents.shape == (4, 8, 8)

    images, _ = data.batch(torch.arange(5), seeded(0))
    many = torch.stack([latents.batch(torch.arange(5), seeded(1, i))[0] for i in range(64)])
    mean, std = autoencoder.moments(images)
    assert latents.scale == pytest.approx(0.18215)
    error = (many.mean(0) - mean * latents.scale).abs() / (std * latents.scale / 8)
    assert float(error.max()) < 6  # standard errors
    again = torch.stack([autoencoder.encode(images, seeded(2, i)) for i in range(64)])
    assert torch.allclose(many.std(0).mean(), again.std(0).mean(), rtol=0.05)
