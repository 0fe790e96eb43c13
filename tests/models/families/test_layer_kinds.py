"""Kinds of layers in files of before `layer_types`, held to the defaults of `transformers`."""

from __future__ import annotations

import pytest

from meshloom.models.families import FAMILIES

transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'meshloom[hf]'")

WORDS = {"full": "full_attention", "sliding": "sliding_attention"}


@pytest.mark.parametrize("name", ["Gemma2Config", "Gemma3TextConfig"])
def test_kinds_that_a_file_leaves_out_are_those_of_transformers(name: str) -> None:
    theirs = getattr(transformers, name)(num_hidden_layers=12).to_dict()
    expected = theirs.pop("layer_types")
    ours = FAMILIES[theirs["model_type"]].from_hugging_face(theirs)["layer_types"]
    assert [WORDS[ours[layer % len(ours)]] for layer in range(12)] == expected
