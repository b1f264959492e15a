"""Paired fidelity is scikit-image's, image by image."""

import numpy as np
import pytest

from slimdit.metrics import paired

random = np.random.default_rng(3)


def images(n: int = 3, height: int = 20, width: int = 32, channels: int = 3) -> np.ndarray:
    return random.integers(0, 256, (n, height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_is_scikit_images(channels):
    from skimage.metrics import structural_similarity

    a, noise = images(channels=channels), random.integers(-40, 40, (3, 20, 32, channels))
    b = np.clip(a + noise, 0, 255).astype(np.uint8)
    expected = [structural_similarity(x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                      data_range=255, channel_axis=-1) for x, y in zip(a, b)]
    assert paired.ssim(a, b) == pytest.approx(expected, rel=1e-9)


def test_psnr_is_scikit_images():
    from skimage.metrics import peak_signal_noise_ratio

    a, b = images(), images()
    expected = [peak_signal_noise_ratio(x, y, data_range=255) for x, y in zip(a, b)]
    assert paired.psnr(a, b) == pytest.approx(expected, rel=1e-12)


def test_identical_images_score_the_best_and_are_said_to_be_identical():
    a = images()
    b = a.copy()
    b[1, 0, 0, 0] ^= 1
    assert list(paired.identical(a, b)) == [True, False, True]
    assert paired.psnr(a, b)[0] == paired.PSNR_CAP == 100
    assert 70 < paired.psnr(a, b)[1] < 100
    assert paired.ssim(a, b)[0] == 1 > paired.ssim(a, b)[1]


def test_feature_distance_is_euclidean():
    assert list(paired.feature_distance(np.array([[3.0, 4], [1, 1]]), np.array([[0.0, 0], [1, 1]]))) == [5, 0]


def test_pairs_must_be_pairs():
    with pytest.raises(ValueError, match="no pairs"):
        paired.psnr(images(2), images(3))
    with pytest.raises(ValueError, match="no pairs"):
        paired.feature_distance(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="at least 11 x 11"):
        paired.ssim(images(height=8), images(height=8))
