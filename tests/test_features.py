"""Features come from the networks, sizes and noise that their definitions name, whatever the batch."""

import os
import pickle

import numpy as np
import pytest
import torch

from slimdit.metrics import inception, lite0
from slimdit.metrics.features import (
    FEATURES,
    Features,
    Reference,
    bundled_images,
    bundled_reference,
    dithered,
    extractor,
)
from slimdit.metrics.quality import Statistics, class_accuracy, frechet, kid
from slimdit.sample_set import file_hash

PUBLISHED_SHA256 = inception.SHA256
random = np.random.default_rng(9)


@pytest.fixture(scope="module")
def lite():
    return extractor("lite0")


@pytest.fixture(scope="module")
def real() -> tuple[np.ndarray, np.ndarray]:
    return bundled_images()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights that stand in for the published ones."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(inception.InceptionV3().state_dict(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "SHA256", file_hash(path))
        yield path


def test_features_have_the_widths_of_their_definition(lite, real):
    found = lite(real[0][:3], range(3))
    assert found.pool.shape == (3, 112) and found.pool.dtype == np.float64
    assert found.spatial is None and found.logits is None
    assert lite.name == "lite0" and lite.dither == 8
    assert "Not FID" in lite.definition


def test_features_belong_to_image_and_id_not_to_the_batch(lite, real):
    images = real[0][:9]
    whole = lite(images, range(9)).pool
    assert np.allclose(lite(images, range(9), batch=2).pool, whole, atol=1e-3)
    assert np.allclose(lite(images[::-1], range(9)[::-1]).pool[::-1], whole, atol=1e-3)
    assert np.abs(lite(images, range(1, 10)).pool - whole).max() > 0.01


def test_gray_is_the_same_as_three_equal_channels_but_for_the_dither(real):
    network = lite0.load_lite0()
    gray = torch.nn.functional.interpolate(torch.from_numpy(real[0][:2, ..., 0]).float()[:, None], (64, 64))
    assert torch.equal(network(gray.expand(-1, 3, -1, -1)), network(gray.repeat(1, 3, 1, 1)))


def test_any_image_size_and_colour_is_taken(lite):
    for shape in ((2, 32, 32, 1), (2, 64, 64, 3), (2, 100, 40, 3)):
        assert lite(random.integers(0, 256, shape, dtype=np.uint8), range(2)).pool.shape == (2, 112)


def test_dither_is_noise_of_its_id_within_the_range():
    gray = np.full((4, 50, 50, 1), 128, np.uint8)
    noisy = dithered(gray, [0, 1, 2, 0])
    assert torch.equal(noisy[0], noisy[3]) and not torch.equal(noisy[0], noisy[1])
    assert noisy.std().item() == pytest.approx(8, rel=0.05)
    black = dithered(np.zeros_like(gray), range(4))
    assert black.min() == 0 and 0.4 < (black == 0).float().mean() < 0.6


def test_a_stream_of_blocks_gives_the_features_of_all(lite, real):
    images, asked = real[0][:9], []

    def blocks():
        for start in (0, 4, 8):
            asked.append(start)
            yield images[start:start + 4]

    stream = lite.stream(blocks())
    first = next(stream)
    assert asked == [0] and len(first.pool) == 4  # no block is read before its turn
    pools = [first.pool, *(features.pool for features in stream)]
    assert [len(pool) for pool in pools] == [4, 4, 1]
    assert np.allclose(np.concatenate(pools), lite(images, range(9)).pool, atol=1e-3)


def test_progress_is_told(lite, real):
    seen = []
    lite(real[0][:5], range(5), batch=2, progress=seen.append)
    assert seen == [2, 4, 5]


def test_what_is_not_images_is_refused(lite):
    good = np.zeros((2, 8, 8, 3), np.uint8)
    for bad in (good.astype(float), good[0], good.transpose(0, 3, 1, 2)):
        with pytest.raises(ValueError, match="images must be uint8"):
            lite(bad, range(len(bad)))
    with pytest.raises(ValueError, match="one id per image"):
        lite(good, range(3))
    with pytest.raises(ValueError, match="at least one"):
        lite(good[:0], [])


def test_unknown_networks_are_refused():
    with pytest.raises(ValueError, match="use one of lite0, inception"):
        extractor("vgg")
    assert list(FEATURES) == ["lite0", "inception"]


def test_tensorflows_same_padding_is_asymmetric_at_stride_2():
    assert lite0.same_padding(64, 3, 2) == (0, 1)
    assert lite0.same_padding(32, 5, 2) == (1, 2)
    assert lite0.same_padding(8, 5, 1) == (2, 2)
    assert lite0.same_padding(7, 3, 2) == (1, 1)


def test_the_bundled_reference_is_of_the_bundled_images(lite, real):
    reference = bundled_reference()
    assert reference.pool.shape == (10_000, 112) and reference.statistics.n == 10_000
    assert real[0].shape == (10_000, 32, 32, 1)
    assert (real[1] == reference.labels).all() and (np.bincount(reference.labels) == 1000).all()
    part = random.permutation(10_000)[:200]
    assert np.abs(lite(real[0][part], part).pool - reference.pool[part]).max() < 0.02
    # The statistics are those of all features, which the file holds in half precision.
    again = Statistics.of(reference.pool.astype(np.float64))
    assert abs(frechet(again, reference.statistics)) < 1e-3
    assert np.abs(again.mu - reference.statistics.mu).max() < 1e-3


def test_the_bundled_distance_orders_images_as_people_do(lite, real):
    """On 500 test images with other dither, against the other 9,500: invisible noise costs little, blur a lot."""
    from scipy.ndimage import uniform_filter

    reference = bundled_reference()
    images = real[0][:500]
    rest = Statistics.of(reference.pool[500:].astype(np.float64))
    noisy = np.clip(np.rint(images + 2 * random.standard_normal(images.shape)), 0, 255).astype(np.uint8)
    blurred = np.rint(uniform_filter(images.astype(float), (0, 3, 3, 0))).astype(np.uint8)
    ids = range(20_000, 20_500)
    pools = [lite(part, ids).pool for part in (images, noisy, blurred)]
    clean, noise, blur = (frechet(Statistics.of(pool), rest) for pool in pools)
    assert 5 < clean < 15  # the bias of 500 images; 2,000 score 2.7
    assert abs(noise - clean) < 2
    assert 150 < blur < 280
    some = reference.pool[500:2500]
    assert kid(pools[0], some) < kid(pools[2], some) / 20
    assert class_accuracy(pools[0], real[1][:500], some, reference.labels[500:2500]).mean() > 0.75


@pytest.mark.slow
def test_the_stored_statistics_are_recomputed(lite, real):
    reference = bundled_reference()
    again = Reference.from_images(real[0], lite, "again", labels=real[1])
    assert np.allclose(again.statistics.mu, reference.statistics.mu, atol=1e-3)
    assert abs(frechet(again.statistics, reference.statistics)) < 1e-3


def test_a_reference_is_made_of_ones_own_images(lite, real):
    images, labels = real[0][:20], real[1][:20]
    found = Reference.from_images(images, lite, "mine", labels=labels)
    assert found.pool.shape == (20, 112) and found.statistics.n == 20
    assert (found.name, found.features, found.classes) == ("mine", "lite0", 10)
    assert np.allclose(found.statistics.mu, found.pool.mean(0))
    assert Reference.from_images(images, lite, "mine").classes is None
    with pytest.raises(ValueError, match="one label per image"):
        Reference.from_images(images, lite, "mine", labels=labels[:3])


def test_damaged_lite0_weights_are_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(lite0.WEIGHTS.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        extractor("lite0", weights=tmp_path / "a.safetensors")


# Inception-v3, with random weights: its shapes and the places where it differs from torchvision's.

def test_inception_has_its_three_outputs(weights):
    network = extractor("inception", weights=weights)
    found = network(random.integers(0, 256, (2, 40, 40, 3), dtype=np.uint8), range(2))
    assert isinstance(found, Features)
    assert found.pool.shape == (2, 2048) and found.spatial.shape == (2, 17 * 17 * 7) and found.logits.shape == (2, 1008)
    fc = torch.load(weights, weights_only=True)["fc.weight"].double().numpy()
    assert np.allclose(found.logits, found.pool @ fc.T, atol=1e-4)  # no bias
    assert network.dither == 0 and "sha256" in network.definition


def test_inception_has_the_published_number_of_parameters():
    # torchvision's 27,161,264, without the auxiliary classifier and with 1008 classes for 1000.
    assert sum(p.numel() for p in inception.InceptionV3().parameters()) == 27_161_264 - 3_326_696 + 8 * 2049


def test_spatial_features_are_flattened_by_row_column_channel():
    torch.manual_seed(1)
    network = inception.InceptionV3().eval()
    seen = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        spatial = network(torch.rand(1, 3, 32, 32) * 255)[1]
    first = seen[0][0]  # (192, 17, 17), after ReLU
    assert first.min() >= 0
    assert spatial[0, (5 * 17 + 3) * 7 + 2] == first[2, 5, 3]
    assert spatial[0].view(17, 17, 7).permute(2, 0, 1).equal(first[:7])


def test_average_pools_leave_the_padding_out_and_the_last_block_takes_the_maximum():
    assert torch.equal(inception.average_pool(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))
    network = inception.InceptionV3()
    assert network.Mixed_7b.pool is inception.average_pool
    assert network.Mixed_7c.pool is inception.max_pool


@pytest.mark.parametrize(("height", "width", "side"), [(4, 6, 9), (13, 7, 5), (32, 32, 299)])
def test_the_resize_is_tensorflow_1s(height, width, side):
    image = random.integers(0, 256, (height, width)).astype(np.float32)
    expected = np.empty((side, side))
    for row in range(side):
        for column in range(side):
            y, x = row * height / side, column * width / side
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
            lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * (x - left)
            expected[row, column] = upper + (lower - upper) * (y - top)
    found = inception.resize_tf1(torch.from_numpy(image)[None, None], side)[0, 0]
    assert np.allclose(found, expected, atol=0.01)


def test_inception_without_weights_says_where_they_come_from(tmp_path):
    with pytest.raises(ValueError, match="pt_inception-2015-12-05"):
        extractor("inception")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        extractor("inception", weights=tmp_path / "nothing.pth")


def test_only_the_published_weights_give_fid(monkeypatch, weights):
    monkeypatch.setattr(inception, "SHA256", PUBLISHED_SHA256)
    with pytest.raises(ValueError, match=r"inception.pth has sha256 \w{8}\.\.\., not 6726825d\.\.\. of the published"):
        extractor("inception", weights=weights)


def test_foreign_inception_weights_are_refused_and_nothing_in_them_runs(monkeypatch, tmp_path, weights):
    tensors = torch.load(weights, weights_only=True)
    torch.save({name: tensor for name, tensor in tensors.items() if "Mixed_7c" not in name}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(weights.read_bytes()[:5000])

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (tmp_path / "c.pth").write_bytes(pickle.dumps(Malicious(), protocol=2))
    for name in ("a", "b", "c"):
        monkeypatch.setattr(inception, "SHA256", file_hash(tmp_path / f"{name}.pth"))
        with pytest.raises(ValueError, match="does not hold the weights"):
            extractor("inception", weights=tmp_path / f"{name}.pth")
    assert not (tmp_path / "ran").exists()


def test_a_failed_download_says_what_to_do(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(ConnectionError, match="give the path of a copy"):
        extractor("inception", weights="download")


def test_the_download_is_checked_by_its_hash(monkeypatch, tmp_path, weights):
    source = weights.as_uri()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(inception, "URL", f"{source}")
    with monkeypatch.context() as patch:
        patch.setattr(inception, "SHA256", PUBLISHED_SHA256)
        with pytest.raises(ConnectionError, match="could not be fetched"):
            extractor("inception", weights="download")
    assert not (tmp_path / "checkpoints" / weights.name).exists()
    assert extractor("inception", weights="download").name == "inception"
    assert (tmp_path / "checkpoints" / weights.name).exists()


def test_metrics_are_listed_without_pytorch():
    import subprocess
    import sys

    from slimdit.metrics import METRICS

    code = "import sys, slimdit.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert all(metric.name == name and metric.better in ("lower", "higher") for name, metric in METRICS.items())
    assert {"fid", "sfid", "fd_lite0", "kid_lite0", "class_accuracy", "psnr", "run_macs", "speedup"} <= METRICS.keys()
