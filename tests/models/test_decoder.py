"""The decoder's results, held to numbers that `transformers` computed for the same weights and tokens."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from meshloom.data.batch import IGNORED
from meshloom.kernels.documents import Documents
from meshloom.models.decoder import Decoder
from support import golden_decoder, models
from support.golden_decoder import CASES, DIM, FFN_DIM, GOLDEN, HEADS, LAYERS, NORM_EPS, ROPE_THETA, VOCABULARY, Golden


def decoder(case: Golden) -> Decoder:
    """Build our decoder with the weights of a case, in float64."""
    model = models.decoder(
        dim=DIM,
        layers=LAYERS,
        heads=HEADS,
        kv_heads=case.kv_heads,
        ffn_dim=FFN_DIM,
        vocabulary=VOCABULARY,
        tied=case.tied,
        norm_eps=NORM_EPS,
        rope_theta=ROPE_THETA,
        **case.mup,
    ).double()
    own, given = dict(model.named_parameters()), case.weights()
    assert own.keys() == given.keys()
    with torch.no_grad():
        for name, weight in given.items():
            own[name].copy_(weight)
    return model


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_those_of_transformers(name: str) -> None:
    case, golden = CASES[name], load_file(GOLDEN)
    model = decoder(case)
    tokens_BS, targets_BS, ids_BS = case.batch()
    packed = Documents.of(ids_BS) if len(case.documents) > 1 else None
    logits_BSV = model(tokens_BS, None, packed)
    torch.testing.assert_close(logits_BSV, golden[f"{name}/logits"], rtol=1e-12, atol=1e-12)
    model(tokens_BS, targets_BS, packed).backward()
    for parameter_name, parameter in model.named_parameters():
        expected = golden[f"{name}/gradient/{parameter_name}"]
        scale = float(expected.abs().max())
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-9 * scale, msg=parameter_name)


def test_the_golden_batch_ignores_the_targets_that_we_ignore() -> None:
    assert golden_decoder.IGNORED == IGNORED
