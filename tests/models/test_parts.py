"""The decoder with every kind of part, held to numbers that `transformers` computed."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from meshloom.models.config import DecoderConfig
from meshloom.models.costs import parameter_count
from meshloom.models.decoder import Decoder
from support.golden_parts import CASES, GOLDEN, SHAPE, batch, weights


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_those_of_transformers(name: str) -> None:
    golden = {key.removeprefix(f"{name}/"): each for key, each in load_file(GOLDEN).items() if key.startswith(f"{name}/")}
    gradients = {key.removeprefix("gradient/"): each for key, each in golden.items() if key != "logits"}
    config = DecoderConfig.of({**SHAPE, **CASES[name]})
    assert config.problems() == []
    model = Decoder(config).double()
    given = weights({key: tuple(each.shape) for key, each in gradients.items()}, config.norm == "rms_plus_one")
    model.load_state_dict({**given, **({"head.weight": given["embed.weight"]} if config.tied else {})})
    assert parameter_count(config) == sum(each.numel() for each in gradients.values())
    tokens_BS, targets_BS = batch()
    torch.testing.assert_close(model(tokens_BS), golden["logits"], rtol=1e-11, atol=1e-11)
    model(tokens_BS, targets_BS).backward()
    for key, parameter in model.named_parameters():
        expected = gradients[key]
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-9 * float(expected.abs().max()), msg=key)
