"""What is measured: quality against a reference, fidelity to the baseline, and cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """What a number means: its name, its unit ("" where it has none), which way is better, and a sentence about it."""

    name: str
    unit: str
    better: Literal["lower", "higher"]
    about: str


METRICS: Mapping[str, Metric] = {metric.name: metric for metric in (
    # Quality, with the user's Inception weights.
    Metric("fid", "", "lower", "Fréchet distance of Inception-v3 pool features to the reference"),
    Metric("sfid", "", "lower", "Fréchet distance of Inception-v3 spatial features to the reference"),
    Metric("inception_score", "", "higher", "exp of the mean divergence of Inception's posteriors from their mean"),
    Metric("precision", "", "higher", "share of images among the reference in Inception's features, k = 3"),
    Metric("recall", "", "higher", "share of the reference among the images in Inception's features, k = 3"),
    Metric("kid", "", "lower", "kernel distance of Inception-v3 pool features to the reference, unbiased"),
    # Quality, with the bundled network.
    Metric("fd_lite0", "", "lower", "Fréchet distance of dithered Lite0 features to the reference; not FID"),
    Metric("kid_lite0", "", "lower", "kernel distance of dithered Lite0 features to the reference, unbiased"),
    Metric("precision_lite0", "", "higher", "share of images among the reference in Lite0's features, k = 3"),
    Metric("recall_lite0", "", "higher", "share of the reference among the images in Lite0's features, k = 3"),
    Metric("class_accuracy", "", "higher", "share of images whose 5 nearest reference images vote for their class"),
    # Fidelity to the baseline, image by image.
    Metric("psnr", "dB", "higher", "mean peak signal-to-noise ratio to the baseline's images; identical: 100"),
    Metric("ssim", "", "higher", "mean structural similarity to the baseline's images"),
    Metric("feature_distance", "", "lower", "mean distance to the baseline's images in feature space"),
    # Cost, computed.
    Metric("macs", "MACs", "lower", "multiply-accumulates of one forward of one image"),
    Metric("flops", "FLOPs", "lower", "operations of one forward of one image: twice the MACs"),
    Metric("run_macs", "MACs", "lower", "multiply-accumulates of sampling one image: all steps, guidance counted"),
    Metric("parameters", "", "lower", "numbers of the model, its fixed position table included"),
    Metric("size", "bytes", "lower", "bytes of the saved weights"),
    # Cost, clocked.
    Metric("throughput", "images/s", "higher", "images a second over the whole sampling loop, guidance included"),
    Metric("latency_p50", "s", "lower", "median time from noise to images"),
    Metric("latency_p95", "s", "lower", "95th percentile of the time from noise to images"),
    Metric("peak_memory", "bytes", "lower", "most memory in use while sampling, after warm-up"),
    Metric("speedup", "x", "higher", "throughput over the baseline's, timed in turns with it"),
)}
"""Metrics by name, in the order tables show them."""
