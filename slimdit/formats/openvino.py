"""A folder for OpenVINO: `model.xml` and `model.bin`, run without slimdit or PyTorch; written, and not read back.

`config.json` says what a sampling loop has to know: the structure, the noise process, the solver and its timesteps.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..files import sync, write_json, write_text
from ..models.openvino import INPUTS, converted, library, prepared
from ..pipeline import Pipeline, Runtime
from ..sampling.solvers import timesteps
from .native import pipeline_values
from .tensors import FormatError, Loaded, read_json, writing_folder

MODEL = "model.xml"


def recognises(path: Path) -> bool:
    """Whether a path is a folder that `save` wrote."""
    return (path / MODEL).is_file() and read_json(path / "config.json").get("format") == "openvino"


def load(path: Path, *, weights: str = "ema", heads: int | None = None) -> Loaded:
    """Refuse: the weights have become operations.

    Raises:
        FormatError: always.
    """
    raise FormatError(f"{path} is an export for OpenVINO, which cannot be turned back into a model: give the folder "
                      "that it was exported from")


def save(pipeline: Pipeline, folder: Path) -> None:
    """Write a folder that OpenVINO reads: a function of x, t and y to the predicted noise, for any number of images.

    Weights stay as they are, static int8 layers in integers; OpenVINO chooses the type that it computes in when it
    compiles. Guidance and the solver are the caller's.

    Raises:
        FormatError: the folder holds other files.
        ImportError: OpenVINO is not installed.
    """
    openvino, config = library(), pipeline.model.config
    model = prepared(pipeline.to("cpu").model)
    model.use_attention(Runtime(compile=True, engine="openvino").attention_form(config.tokens, torch.device("cpu")))
    example = (torch.zeros(2, config.channels, *config.input_size), torch.zeros(2, dtype=torch.int64),
               torch.zeros(2, dtype=torch.int64))
    made = converted(model, "forward", dict(zip(INPUTS, example)))
    with writing_folder(folder) as beside:
        openvino.save_model(made, beside / MODEL, compress_to_fp16=False)
        for file in beside.iterdir():
            sync(file)
        write_json(beside / "config.json", {
            "format": "openvino", "version": 1, "model": config.to_dict(), **pipeline_values(pipeline),
            "timesteps": timesteps(pipeline.process, pipeline.sampling)})
        write_text(beside / "README.md", readme(pipeline))


def readme(pipeline: Pipeline) -> str:
    """The folder's own page."""
    config = pipeline.model.config
    height, width = config.input_size
    variance = ", then the variance output, as many channels" if config.learn_sigma else ""
    null = (f"{config.classes} is the null class of guidance" if config.label_dropout else
            "there is no null class: sample without guidance")
    return f"""# {pipeline.name or "A diffusion transformer"}

Exported by slimdit for OpenVINO.

```python
import numpy as np
import openvino

model = openvino.Core().compile_model("{MODEL}", "CPU")
x = np.random.randn(1, {config.channels}, {height}, {width}).astype(np.float32)
noise = model({{"x": x, "t": np.array([999]), "y": np.array([0])}})["noise"]
```

* `x`: float32, (images, {config.channels}, {height}, {width}), what is to be denoised.
* `t`: int64, (images,), timesteps in 0..{pipeline.process.steps - 1}.
* `y`: int64, (images,), classes in 0..{config.classes - 1}; {null}.
* `noise`: float32, (images, {config.out_channels}, {height}, {width}), the predicted noise{variance}.

`config.json` holds the model's solver, its timesteps, its guidance and the noise process. OpenVINO's Python package
reports over the network that it is used, unless told not to: `opt_in_out --opt_out`.
"""
