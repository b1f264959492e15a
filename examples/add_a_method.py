"""A whole method: leave out some of the blocks. Tried on the tiny twin of a model, in a second.

    python examples/add_a_method.py --keep 0 1 2 5

To make it one of slimdit's own, put the class in `slimdit/methods/keep_blocks.py` and `"keep_blocks": KeepBlocks` into
`METHODS`; a recipe can then say `{keep_blocks = {keep = [0, 1, 2, 5]}}`. This one is for reading: without training
after it, what it leaves makes worse images.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from slimdit import Pipeline, Sampling
from slimdit.context import Context, require
from slimdit.metrics.cost import macs
from slimdit.models.dit import DiT, DiTConfig, preset, twin
from slimdit.recipe import config_mismatch


@dataclass(frozen=True)
class KeepBlocks:
    """Keep some blocks of the model, in their order, and leave out the others.

    Attributes:
        keep: numbers of the blocks that stay, ascending, from 0.

    Raises:
        ValueError: none is kept, or they are not ascending.
    """

    keep: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.keep or list(self.keep) != sorted({number for number in self.keep if number >= 0}):
            raise ValueError(f"keep_blocks: keep must be block numbers in ascending order, not {self.keep}")

    def apply(self, pipeline: Pipeline, context: Context) -> Pipeline:
        """Build the smaller model from its config, then give it the weights of the blocks that stay."""
        config = pipeline.model.config
        # Say what is wrong and what to do instead, before anything is changed.
        require(self.keep[-1] < len(config.blocks), f"keep_blocks: the model has no block {self.keep[-1]}; its last is "
                                                    f"{len(config.blocks) - 1}")
        require(not config.linears, "keep_blocks needs float weights: put it before quantize")

        # The config is the truth: the model is what it says, and the weights must fit with nothing left over.
        smaller = DiT(replace(config, blocks=tuple(config.blocks[number] for number in self.keep)))
        smaller.load_state_dict(kept_weights(pipeline.model, self.keep))

        # What was changed goes on record, so that a setting without effect is seen.
        context.witness(blocks_before=len(config.blocks), blocks_after=len(self.keep))
        return pipeline.replace(model=smaller.to(pipeline.device).eval())


def kept_weights(model: DiT, keep: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """The model's tensors without the blocks that go, the others numbered from 0."""
    places = {str(number): str(place) for place, number in enumerate(keep)}
    kept = {}
    for name, tensor in model.state_dict().items():
        room, _, rest = name.partition(".")
        number, _, layer = rest.partition(".")
        if room != "blocks":
            kept[name] = tensor
        elif number in places:
            kept[f"blocks.{places[number]}.{layer}"] = tensor
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description="Try a method on the tiny twin of a model.")
    parser.add_argument("--preset", default="XS/4", help="whose twin to try it on")
    parser.add_argument("--keep", type=int, nargs="+", default=[0, 1, 2, 5])
    options = parser.parse_args()
    config = preset(options.preset, channels=1, classes=10)
    before, after, witness = rehearse(KeepBlocks(tuple(options.keep)), config)
    print(witness)
    print(f"MACs of the twin: {macs(before.model.config).total:,} before, {macs(after.model.config).total:,} after")
    print(f"two images: {after.sample([0, 1]).shape}")


def rehearse(method: KeepBlocks, config: DiTConfig) -> tuple[Pipeline, Pipeline, dict]:
    """The twin of a model before and after a method, and what the method says it changed."""
    before = Pipeline(random_twin(config), Sampling(steps=2))
    context = Context(teacher=before, folder=Path("runs/add_a_method"))
    after = method.apply(before.copy(), context)
    assert not config_mismatch(after.model)
    return before, after, context.witnesses[0]


def random_twin(config: DiTConfig) -> DiT:
    """The twin with random weights. A DiT starts with silent blocks, and those would hide what a method does."""
    model = DiT(twin(config)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


if __name__ == "__main__":
    main()
