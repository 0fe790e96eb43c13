"""Decoders for tests."""

from __future__ import annotations

from typing import Any

from meshloom.models.config import DecoderConfig
from meshloom.models.decoder import Decoder


def decoder(**shape: Any) -> Decoder:
    """A decoder of this shape, by the keys of `model`."""
    return Decoder(DecoderConfig.of(shape))
