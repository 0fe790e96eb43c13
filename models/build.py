"""Build a model without storage from a node of the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from hydra.utils import get_object, instantiate

from ..config.renames import with_moved_targets
from .decoder import Decoder
from .protocol import Model
from .user_module import adopt, parameters_on_meta


def build_model(node: Mapping[str, Any], vocabulary: int) -> Model:
    """Build the model of a node, its parameters on the meta device.

    vocabulary: the data's, where the node leaves it open. A decoder's class takes its typed config; any other `_target_` is
    called with the node's keys. Raises TypeError for keys that it does not accept.
    """
    values = {key: value for key, value in with_moved_targets(dict(node)).items() if key != "name"}
    values["vocabulary"] = values.get("vocabulary") or vocabulary
    kind = get_object(values["_target_"])
    if isinstance(kind, type) and issubclass(kind, Decoder):
        values.pop("_target_")
        with torch.device("meta"):
            return kind(kind.config_type.of(values))
    with parameters_on_meta():
        return adopt(instantiate({**values, "_convert_": "all"}))
