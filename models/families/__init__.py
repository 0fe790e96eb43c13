"""Model families: the names that Hugging Face's files use for our decoder's weights and config keys. Imports no torch.

All families are the same decoder with other parts. A family is a short file here; its sizes are recipes in `recipes/model/`.
"""

from __future__ import annotations

from ..config import DecoderConfig
from .deepseek import DeepseekV3
from .family import Family
from .gemma import Gemma2, Gemma3, Gemma3Text
from .gpt_oss import GptOss
from .llama import Llama
from .mistral import Mistral
from .mixtral import Mixtral
from .names import StoredPart, StoredWeights
from .olmo import Olmo2, Olmo3, Olmoe
from .phi import Phi3
from .qwen import Qwen2, Qwen3, Qwen3Moe
from .smollm import SmolLM3

_ALL = (
    Llama,
    Qwen2,
    Qwen3,
    Olmo2,
    Olmo3,
    Gemma2,
    Gemma3Text,
    Gemma3,
    Mistral,
    SmolLM3,
    Phi3,
    Mixtral,
    Qwen3Moe,
    Olmoe,
    DeepseekV3,
    GptOss,
)

FAMILIES: dict[str, Family] = {family.model_type: family() for family in _ALL}
"""By Hugging Face's `model_type`. An export takes the first that has all parts of a decoder."""


def family_of(config: DecoderConfig, asked: str | None = None, preferred: str | None = None) -> Family:
    """Return the family that a decoder is exported as: the first that has all its parts.

    asked: the only one that will do; preferred: the one to try first. Raises ValueError where there is none, with the key
    that is in the way of each.
    """
    order = sorted(FAMILIES, key=lambda name: name != preferred) if asked is None else [asked]
    reasons: list[str] = []
    for name in order:
        family = FAMILIES[name]
        try:
            family.to_hugging_face(config)
        except ValueError as error:
            reasons.append(f"as {name}: {error}")
        else:
            return family
    raise ValueError("the model is of no family that can be exported: " + "; ".join(reasons))


__all__ = ["FAMILIES", "Family", "StoredPart", "StoredWeights", "family_of"]
