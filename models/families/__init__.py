"""Model families: the names that Hugging Face's files use for our decoder's weights and config keys. Imports no torch.

All families are the same decoder with other parts. A family is a short file here; its sizes are recipes in `recipes/model/`.
"""

from __future__ import annotations

from ..config import DecoderConfig
from .family import Family
from .llama import Llama
from .names import StoredWeight
from .qwen import Qwen2, Qwen3

FAMILIES: dict[str, Family] = {family.model_type: family for family in (Llama(), Qwen2(), Qwen3())}
"""By Hugging Face's `model_type`. An export takes the first that has all parts of a decoder."""


def family_of(config: DecoderConfig, model_type: str | None = None) -> Family:
    """Return the family that a decoder is exported as: the one that is asked for, or the first that has all its parts.

    Raises ValueError where there is none, with the key that is in the way of each.
    """
    asked = FAMILIES if model_type is None else {model_type: FAMILIES[model_type]}
    reasons: list[str] = []
    for name, family in asked.items():
        try:
            family.to_hugging_face(config)
        except ValueError as error:
            reasons.append(f"as {name}: {error}")
        else:
            return family
    raise ValueError("the model is of no family that can be exported: " + "; ".join(reasons))


__all__ = ["FAMILIES", "Family", "StoredWeight", "family_of"]
