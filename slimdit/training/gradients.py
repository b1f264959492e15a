"""How the diffusion loss changes with each weight: gradients of the noise's squared error, stratum by stratum of time.

What a weight is worth differs between timesteps (Diff-Pruning, arXiv 2305.10924), and a model that was trained well has
a gradient near zero on average over them: so the strata come one by one, for a criterion to average their sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..pipeline import Pipeline
from ..sampling.seeds import seeded
from .data import ImageData
from .loop import require_fit
from .samples import own_samples


def loss_gradients(pipeline: Pipeline, names: Iterable[str], data: ImageData | None = None, *, images: int = 64,
                   strata: int = 8, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Gradients of the mean squared error of the predicted noise, once per stratum of the timesteps, clean to noisy.

    Nothing of the model is changed, not even its `.grad`.

    Args:
        names: of the parameters; each stratum gives a gradient of the parameter's shape for every one.
        data: images to noise; None takes the pipeline's own samples.
        images: how many in all; every stratum sees the next share of them, once.
        strata: equal parts of the process's timesteps.

    Raises:
        ValueError: there are fewer images than strata, or the data does not fit the model.
    """
    if not 1 <= strata <= images:
        raise ValueError(f"gradients: {images} images are too few for {strata} strata of timesteps: take as many or "
                         f"more")
    model, process, config = pipeline.model, pipeline.process, pipeline.model.config
    data = own_samples(pipeline, images, seed=seed) if data is None else data
    require_fit(data, config)
    parameters = {name: model.get_parameter(name) for name in names}
    generator = seeded(seed, "gradients")
    order = torch.randperm(len(data), generator=generator)
    share, device = images // strata, pipeline.device
    for stratum in range(strata):
        indices = order[torch.arange(stratum * share, (stratum + 1) * share) % len(order)]
        clean, labels = data.batch(indices, generator)
        low, high = (process.steps * edge // strata for edge in (stratum, stratum + 1))
        t = torch.randint(low, high, (share,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        clean, labels, t, noise = (tensor.to(device) for tensor in (clean, labels, t, noise))
        with torch.enable_grad():
            predicted = model(process.add_noise(clean, noise, t), t, labels)[:, :config.channels]
            loss = (predicted.float() - noise).square().mean()
            gradients = torch.autograd.grad(loss, list(parameters.values()))
        yield dict(zip(parameters, gradients))
