"""What is protected and what is cut, given each layer's error."""

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimdit.allocation import (
    FILE,
    Sensitivity,
    block_errors,
    keep_ratios,
    open_sensitivity,
    protected,
    read_sensitivity,
)

ERRORS = {"blocks.0.attn.qkv": 1.0, "blocks.0.mlp.fc1": 6.0, "blocks.1.attn.qkv": 2.0, "blocks.1.mlp.fc1": 1.0}

some_errors = st.lists(st.one_of(st.just(0.0), st.floats(1e-12, 1e6)), min_size=1, max_size=12)


def blocks(errors):
    return {f"blocks.{number}": error for number, error in enumerate(errors)}


def measured(**changes) -> Sensitivity:
    values = {"model": "m", "fingerprint": "f", "settings": {"perturb": "int8"}, "bins": ((999, 500), (499, 0)),
              "layers": ("blocks.0.mlp.fc1", "blocks.0.mlp.fc2"), "provenance": {},
              "errors": {"blocks.0.mlp.fc2": (1.0, 3.0), "blocks.0.mlp.fc1": (0.5, 0.5)},
              "totals": {"blocks.0.mlp.fc2": 2.0, "blocks.0.mlp.fc1": 0.5}}
    return Sensitivity(**{**values, **changes})


class TestProtected:
    def test_takes_the_most_sensitive_until_the_share_is_reached(self):
        assert protected(ERRORS, 0.1) == protected(ERRORS, 0.6) == ["blocks.0.mlp.fc1"]
        assert protected(ERRORS, 0.61) == ["blocks.0.mlp.fc1", "blocks.1.attn.qkv"]

    def test_no_share_protects_nothing_and_the_whole_all_that_err(self):
        assert protected(ERRORS, 0) == []
        assert sorted(protected(ERRORS, 1)) == sorted(ERRORS)
        assert protected({"a": 0.0, "b": 1.0}, 1) == ["b"]
        assert protected({"a": 0.0}, 1) == [] == protected({}, 1)

    def test_equal_errors_keep_their_order(self):
        assert protected({"b": 1.0, "a": 1.0, "c": 1.0}, 0.5) == ["b", "a"]

    @pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
    def test_other_shares_are_refused(self, share):
        with pytest.raises(ValueError, match=r"in 0\.\.1"):
            protected(ERRORS, share)

    @settings(max_examples=40, deadline=None)
    @given(some_errors, st.floats(0, 1))
    def test_is_enough_and_no_more_than_needed(self, errors, share):
        named = blocks(errors)
        chosen = protected(named, share)
        goal = share * math.fsum(errors)
        assert math.fsum(named[name] for name in chosen) >= goal
        assert not chosen or math.fsum(named[name] for name in chosen[:-1]) < goal
        assert all(named[name] >= error for name in chosen for other, error in named.items() if other not in chosen)


class TestKeepRatios:
    def test_cuts_in_inverse_proportion_to_the_error(self):
        ratios = keep_ratios({"blocks.0": 3.0, "blocks.1": 1.0}, 0.8)
        assert ratios == pytest.approx({"blocks.0": 0.9, "blocks.1": 0.7})

    def test_sums_the_layers_of_a_block_and_counts_only_those_asked_for(self):
        assert block_errors(ERRORS, "*") == {"blocks.0": 7.0, "blocks.1": 3.0}
        assert block_errors(ERRORS, "*.attn.*") == {"blocks.0": 1.0, "blocks.1": 2.0}
        assert keep_ratios(ERRORS, 0.5, "*.attn.*")["blocks.1"] > keep_ratios(ERRORS, 0.5)["blocks.1"]

    def test_keeping_all_keeps_all_and_equal_blocks_keep_equally(self):
        assert set(keep_ratios(ERRORS, 1.0).values()) == {1.0}
        assert keep_ratios(blocks([0.0] * 3), 0.4) == pytest.approx(blocks([0.4] * 3))

    def test_a_block_that_hardly_matters_still_keeps_half_of_the_mean(self):
        assert keep_ratios(blocks([1.0, 1.0, 0.0]), 0.6) == pytest.approx(blocks([0.75, 0.75, 0.3]))

    @settings(max_examples=60, deadline=None)
    @given(some_errors, st.floats(0.01, 1))
    def test_mean_bounds_and_order(self, errors, keep):
        ratios = list(keep_ratios(blocks(errors), keep).values())
        assert math.fsum(ratios) / len(ratios) == pytest.approx(keep)
        assert all(keep / 2 - 1e-9 <= ratio <= 1 for ratio in ratios)
        in_order = [ratio for _, ratio in sorted(zip(errors, ratios))]
        assert all(low <= high + 1e-12 for low, high in pairwise(in_order))

    @pytest.mark.parametrize("keep", [0, -1, 1.01, math.nan])
    def test_other_means_are_refused(self, keep):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            keep_ratios(ERRORS, keep)

    def test_a_pattern_without_a_layer_is_refused(self):
        with pytest.raises(ValueError, match="'x' matches no layer"):
            keep_ratios(ERRORS, 0.5, "x")
        with pytest.raises(ValueError, match="matches no layer"):
            keep_ratios({"final_layer.linear": 1.0}, 0.5)


class TestFile:
    def test_is_read_back_as_written_in_the_order_of_the_model(self, tmp_path):
        measured().write(tmp_path / FILE)
        assert open_sensitivity(tmp_path) == measured()
        assert list(read_sensitivity(tmp_path)) == ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
        assert read_sensitivity(tmp_path / FILE) == {"blocks.0.mlp.fc1": 0.5, "blocks.0.mlp.fc2": 2.0}
        assert measured().ranking() == ["blocks.0.mlp.fc2", "blocks.0.mlp.fc1"]

    def test_an_unfinished_one_is_refused_with_the_remedy(self, tmp_path):
        measured(errors={"blocks.0.mlp.fc1": (0.5, 0.5)}, totals={"blocks.0.mlp.fc1": 0.5}).write(tmp_path / FILE)
        with pytest.raises(ValueError, match=r"1 of 2 layers.*--resume"):
            read_sensitivity(tmp_path)

    def test_one_of_another_model_is_refused(self, tmp_path):
        measured().write(tmp_path / FILE)
        assert read_sensitivity(tmp_path, expected=["blocks.0.mlp.fc1"])
        with pytest.raises(ValueError, match=r"says nothing of 'blocks.7.mlp.fc1'.*another model"):
            read_sensitivity(tmp_path, expected=["blocks.7.mlp.fc1"])

    def test_none_is_said(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="slimdit sensitivity MODEL"):
            read_sensitivity(tmp_path)

    @pytest.mark.parametrize(("text", "sentence"), [
        ("{", "not a whole JSON file"), ("[]", "expected a table"), ("{}", "'model' is missing")])
    def test_other_files_are_refused(self, tmp_path, text, sentence):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=sentence):
            read_sensitivity(tmp_path / "x.json")

    @pytest.mark.parametrize(("changes", "sentence"), [
        ({"extra": 1}, "'extra' is not an option"),
        ({"totals": {"blocks.0.mlp.fc1": -1.0, "blocks.0.mlp.fc2": 1.0}}, "not a finite number"),
        ({"totals": {"blocks.0.mlp.fc1": math.nan, "blocks.0.mlp.fc2": 1.0}}, "not a finite number"),
        ({"totals": {"blocks.0.mlp.fc1": "1", "blocks.0.mlp.fc2": 1.0}}, "expected float"),
        ({"totals": {"blocks.0.mlp.fc1": 1.0}}, "'blocks.0.mlp.fc2' is not in all"),
        ({"layers": ["blocks.0.mlp.fc1"]}, "'blocks.0.mlp.fc2' is not in all"),
        ({"bins": [[999, 0]]}, "2 errors for 1 bins")])
    def test_contradictions_are_refused(self, tmp_path, changes, sentence):
        measured().write(tmp_path / FILE)
        values = json.loads((tmp_path / FILE).read_text())
        (tmp_path / FILE).write_text(json.dumps({**values, **changes}))
        with pytest.raises(ValueError, match=sentence):
            read_sensitivity(tmp_path)
