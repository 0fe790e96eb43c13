"""Check that a checkpoint fits the run that would start from it, before anything is built. Imports no torch.

A shape that fits is no identity: heads, rotary base or optimizer may differ where every array has the right shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from ..checkpoint.manifest import Manifest
from ..config.keys import MISSING, keys_of
from ..config.nodes import Custom
from ..config.problems import Problem
from ..models.config import DecoderConfig, ModelConfig
from ..models.stored_sizes import stored_sizes, wrong_head_share
from .find_checkpoint import is_import
from .resumed_config import saved_config
from .schema import RunConfig
from .typed import option_of

CHANGEABLE = frozenset(
    {
        *(
            "norm_eps",
            "rope_theta",
            "rope_theta_sliding",
            "sliding_window",
            "attention_softcap",
            "attention_scale",
            "logit_softcap",
        ),
        *("embedding_scale", "mup_base", "mup_embedding", "mup_residual"),
    }
)
"""Keys of a decoder that no stored array depends on, and what the weights compute does. A run may change one on purpose.

So it may change those of `rope_scaling`, which lengthen the context of a trained model.
"""
UNREAD = frozenset({"_target_", "init_std", "z_loss"})
"""Keys of a decoder that say nothing of what stored weights compute."""
TAKEN = "leave it and any choice of model=… out: the checkpoint's is taken"
OTHER_MODEL = "choose the model whose weights they are"


def checkpoint_problems(manifest: Manifest, config: RunConfig) -> list[Problem]:
    """Return a problem for each key in which a run contradicts the checkpoint that it starts from."""
    found: list[Problem] = []
    state = manifest.state
    saved = saved_config(state)
    if "model" not in config.unusable:
        shapes = weight_shapes(manifest)
        vocabulary = state.get("vocabulary")
        known = dict(saved.get("model") or {})
        if known:  # an import states only what another program's config has, and an older version knew fewer keys
            known = {**{key.name: key.default for key in keys_of(DecoderConfig) if key.default != MISSING}, **flat_keys(known)}
        if known and vocabulary is not None:
            known["vocabulary"] = vocabulary
        loose = not is_import(state) or not config.checkpoint.strict
        found += _model_problems(known, shapes, config.model, changeable=loose)
        if not found and (message := misstated_size(saved, shapes)) is not None:
            found.append(Problem("resume", message, "take another checkpoint: this one is damaged"))
    if found and not is_import(state) and saved.get("recipe") not in (None, config.recipe):
        # One cause, and one fix: a typed recipe replaces the run's whole config.
        first, more = found[0], len(found) - 1
        said = f"{first.key} {first.message}" + (f"; {more} more differ" if more else "")
        fix = f"leave recipe=… out, and the run goes on with its own, {saved['recipe']}; or choose the checkpoint's model"
        found = [Problem("recipe", f"{config.recipe} has another model: {said}", fix)]
    compared = "optim" not in config.unusable and config.checkpoint.strict
    if compared and (change := optimizer_change(state, config)) is not None:
        fix = "leave the choice out, or begin the optimizer's state anew with checkpoint.strict=false"
        found.append(
            Problem("optim", f"the checkpoint holds the state of {change[0]}, which means nothing to {change[1]}", fix)
        )
    return found


def weight_shapes(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a checkpoint's weights, by the parameter's name."""
    return {array.name: array.shape for array in manifest.arrays.values() if array.role == "weight"}


def misstated_size(saved: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return how a checkpoint's config contradicts its own arrays, before memory is taken for the model; else None.

    shapes: of the stored weights, by the parameter's name
    """
    model, stored = saved.get("model") or {}, stored_sizes(shapes)
    for name in ("dim", "layers"):
        if name in stored and model.get(name, stored[name]) != stored[name]:
            return f"the checkpoint's config says model.{name}={model[name]}, and its arrays are of {stored[name]}"
    return None


def optimizer_change(state: Mapping[str, Any], config: RunConfig) -> tuple[str, str] | None:
    """Return the names of the checkpoint's optimizer and of the run's, where one's state means nothing to the other; else None.

    An optimizer that extends another's config, as AGVM does AdamW's, goes on with its state.
    """
    saved = saved_config(state).get("optim")
    if is_import(state) or not isinstance(saved, dict) or "_target_" not in saved:
        return None
    before = str(saved["_target_"])
    now = config.optim.path if isinstance(config.optim, Custom) else config.optim._target_
    kept = option_of("optim", saved)
    if before == now or (kept is not None and isinstance(config.optim, kept)):
        return None
    short, other = before.rpartition(".")[2], now.rpartition(".")[2]
    return (short, other) if short != other else (before, now)


def _model_problems(
    saved: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, *, changeable: bool
) -> Iterator[Problem]:
    """Yield the keys of a decoder that differ from the checkpoint's. A class of the user's own is compared by its weights."""
    if not isinstance(config, DecoderConfig) or saved.get("_target_", config._target_) != config._target_:
        return
    stated = {name: value for name, value in saved.items() if name != "vocabulary" or value is not None}
    known = {**stored_sizes(shapes), **stated}
    now = flat_keys(dataclasses.asdict(config))
    means, meant = _effective(now), _effective(known)
    if now["vocabulary"] is None:  # the data's, compared once that is known
        known.pop("vocabulary", None)
    for name, value in known.items():
        if name in UNREAD or name not in now or now[name] == value or means[name] == meant[name]:
            continue
        may_change = _may_change(name)
        if changeable and may_change:
            continue
        message = f"is {_written(now[name])}, and the checkpoint's model has {_written(value)}"
        fix = TAKEN if name in stated else OTHER_MODEL
        if may_change:
            fix += "; to train on with the other all the same, add checkpoint.strict=false"
        yield Problem(f"model.{name}", message, fix)
    if not {"heads", "kv_heads"} & known.keys() and (share := wrong_head_share(shapes, config)) is not None:
        message = f"{config.heads} heads over {config.kv_heads} is not the checkpoint's share of queries to keys, {share}"
        yield Problem("model.kv_heads", message, OTHER_MODEL)


def changed_shape(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the keys of a decoder that differ and that a run can't change: stored arrays depend on them.

    before, now: the decoder's config in plain containers
    """
    known, keys = flat_keys(before), flat_keys(now)
    means, meant = _effective(keys), _effective(known)
    return [
        name
        for name in keys
        if name not in UNREAD and not _may_change(name) and known.get(name) != keys[name] and meant.get(name) != means[name]
    ]


def _may_change(name: str) -> bool:
    return name in CHANGEABLE or name.startswith("rope_scaling.")


def _effective(keys: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a decoder with what null and a repeated list stand for."""
    found, dim, heads, layers = dict(keys), keys.get("dim"), keys.get("heads"), keys.get("layers")
    if found.get("head_dim", 0) is None and dim and heads:
        found["head_dim"] = dim // heads
    if found.get("rope_theta_sliding", 0) is None:
        found["rope_theta_sliding"] = found.get("rope_theta")
    if layers and (kinds := found.get("layer_types")):
        found["layer_types"] = [kinds[layer % len(kinds)] for layer in range(layers)]
    return found


def flat_keys(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return key → value of a node; keys of nodes inside it have dotted names."""
    found: dict[str, Any] = {}
    for name, value in node.items():
        found |= flat_keys(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
