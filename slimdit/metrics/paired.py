"""How much an image changed: the variant and the baseline from the same noise and label, image by image."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

PEAK = 255.0
PSNR_CAP = 100.0  # dB, also what identical images score, so that a mean stays a number
WINDOW, SIGMA = 11, 1.5  # of SSIM, pixels
K1, K2 = 0.01, 0.03


def psnr(images: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each pair of uint8 images (n, h, w, c), dB (n,).

    Capped at 100 dB, which identical images score instead of infinity: report the share of `identical` beside a mean.

    Raises:
        ValueError: the two are not the same number of images of one size.
    """
    a, b = pair(images, baseline)
    error = ((a - b) ** 2).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return np.minimum(10 * np.log10(PEAK ** 2 / error), PSNR_CAP)


def identical(images: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Whether each pair is equal to the bit, (n,) bool.

    Raises:
        ValueError: the two are not the same number of images of one size.
    """
    a, b = pair(images, baseline)
    return (a == b).all((1, 2, 3))


def ssim(images: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Structural similarity of each pair of uint8 images (n, h, w, c), (n,), 1 where identical.

    As Wang et al. 2004 define it: a Gaussian window of 11 x 11 and sigma 1.5, whole windows only, mean over channels.

    Raises:
        ValueError: the two are not the same number of images of one size, or that is smaller than the window.
    """
    a, b = pair(images, baseline)
    if min(a.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs images of at least {WINDOW} x {WINDOW} pixels, not {a.shape[1]} x {a.shape[2]}")
    mean_a, mean_b = windowed(a), windowed(b)
    variances = windowed(a * a) - mean_a ** 2 + windowed(b * b) - mean_b ** 2
    covariance = windowed(a * b) - mean_a * mean_b
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    similarity = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)
                  / ((mean_a ** 2 + mean_b ** 2 + c1) * (variances + c2)))
    return similarity.mean((1, 2, 3))


def feature_distance(features: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Euclidean distance of each pair in a network's feature space, features (n, d) to (n,).

    Take both with the same image ids, so that both got the same dither.

    Raises:
        ValueError: the two do not have one shape.
    """
    if features.shape != baseline.shape:
        raise ValueError(f"features of shapes {features.shape} and {baseline.shape} are no pairs: use the same images")
    return np.linalg.norm(features.astype(np.float64) - baseline, axis=1)


def windowed(x: np.ndarray) -> np.ndarray:
    """The weighted mean of every whole window: (n, h, w, c) to (n, h - 10, w - 10, c)."""
    edge = WINDOW // 2
    smooth = gaussian_filter(x, (0, SIGMA, SIGMA, 0), truncate=edge / SIGMA)
    return smooth[:, edge:-edge, edge:-edge]


def pair(images: np.ndarray, baseline: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64, refused where they are no pairs."""
    if images.shape != baseline.shape or images.ndim != 4:
        raise ValueError(f"images of shapes {images.shape} and {baseline.shape} are no pairs: sample the same ids, "
                         "as (images, height, width, channels)")
    return images.astype(np.float64), baseline.astype(np.float64)
