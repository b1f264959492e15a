"""Every ordered pair of methods on the twin of a small model.

`python -m tests.test_pairs` writes the table of the docs.
"""

from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from slimdit.context import Refused
from slimdit.files import write_text
from slimdit.methods.reduce_steps import ReduceSteps
from slimdit.recipe import Recipe, config_mismatch, rehearse

from .test_methods import EXAMPLES, small_pipeline

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
PAIRS = list(product(EXAMPLES, EXAMPLES))


@cache  # the tests of this file ask about every pair three times, and change nothing
def rehearsed(first, second):
    """The twin after both methods, or why it was refused."""
    later = EXAMPLES[second]
    if first == second == "reduce_steps":
        later = ReduceSteps(2)  # the same steps twice would be no second reduction
    try:
        return rehearse(Recipe("pair", (EXAMPLES[first], later)), small_pipeline())[0]
    except Refused as refusal:
        return refusal


@pytest.mark.parametrize("first, second", PAIRS, ids=[" then ".join(pair) for pair in PAIRS])
def test_a_pair_works_or_says_why_not(first, second):
    result = rehearsed(first, second)
    if isinstance(result, Refused):
        assert len(str(result)) > 20 and ":" in str(result)  # a sentence with its remedy
        return
    assert config_mismatch(result.model) == ""
    assert len(result.history) == 2
    plain = result.replace(runtime=replace(result.runtime, compile=False))
    images = plain.sample(range(2), batch=2)
    assert images.shape == (2, 8, 8, 1) and images.dtype == np.uint8
    assert images[0].std() > 0


# Beginnings of what needs float weights.
FLOAT_ONLY = ("quantize", "prune", "low_rank", "finetune", "sparse", "simplify", "distill")


def test_what_needs_float_or_full_layers_and_does_not_find_them_is_all_that_is_refused():
    refused = {pair for pair in PAIRS if isinstance(rehearsed(*pair), Refused)}
    assert refused == {(a, b) for a, b in PAIRS if (a.startswith("quantize") and b.startswith(FLOAT_ONLY))
                       or (a == "low_rank_adaln" and b in ("low_rank_adaln", "quantize smooth"))
                       or (a.startswith("sparse") and b.startswith(("sparse", "prune_width")))
                       or (a.startswith("cache_blocks") and b.startswith(("cache_blocks", "reduce_steps")))
                       or (a, b) == ("simplify_attention focused", "quantize smooth")  # its heads share values
                       or (a == "distill_guidance" and b in ("finetune", "distill", "distill_guidance"))}


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "write it again: python -m tests.test_pairs"


def page() -> str:
    """The table of every ordered pair, in Markdown."""
    refusals: list[str] = []

    def cell(first: str, second: str) -> str:
        result = rehearsed(first, second)
        if not isinstance(result, Refused):
            return "yes"
        if str(result) not in refusals:
            refusals.append(str(result))
        return f"no ({refusals.index(str(result)) + 1})"

    rows = [[first, *(cell(first, second) for second in EXAMPLES)] for first in EXAMPLES]
    table = [["first, then", *EXAMPLES], ["---"] * (len(EXAMPLES) + 1), *rows]
    lines = [f"| {' | '.join(row)} |" for row in table]
    notes = [f"{number}. {sentence}" for number, sentence in enumerate(refusals, 1)]
    return "\n".join(["# Which methods go together", "",
                      "Every ordered pair of methods, run on the tiny twin of a model by `tests/test_pairs.py`.",
                      "Written by `python -m tests.test_pairs`; a test fails where this page is not current.", "",
                      *lines, "", *notes]) + "\n"


if __name__ == "__main__":
    write_text(PAGE, page())
    print(f"wrote {PAGE}")
