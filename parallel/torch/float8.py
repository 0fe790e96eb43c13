"""Matrix products of the blocks in float8 (`trainer.float8`) by torchao, which scales and casts each factor when it is used.

Embedding, head, norms, attention and the optimizer stay as they are, and so do names, weights and checkpoints. Float8 is an
exception to the promise that a run is a function of its recipe alone. A scale is taken over the part of a tensor that a rank
holds, so losses of different layouts differ by float8's rounding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ...config.problems import ConfigError, Problem

_KEY = "trainer.float8"
_UNIT = 16  # the matrix units take float8 in pieces of 16 along every dim


def float8_size_problems(blocks: Iterable[nn.Module], tokens: int | None) -> Iterator[Problem]:
    """Yield sizes that float8 matrix units can't take, of the blocks' linear layers and of the micro-batches that a rank gets.

    tokens: of such a micro-batch; the product for a weight's gradient sums over them. None: they are not known.
    """
    layers = {name: layer for block in blocks for name, layer in block.named_modules() if isinstance(layer, nn.Linear)}
    for name, layer in layers.items():
        if layer.in_features % _UNIT or layer.out_features % _UNIT:
            sizes = f"{layer.out_features} × {layer.in_features}"
            text = f"{name} is {sizes}, and float8 products need multiples of {_UNIT}"
            yield Problem(_KEY, text, "change model.dim or model.ffn_dim, or use none")
            break
    if tokens is not None and tokens % _UNIT:
        text = f"batch.micro × data.seq_len / parallel.cp = {tokens} tokens, and float8 products need multiples of {_UNIT}"
        yield Problem(_KEY, text, "change data.seq_len or batch.micro, or use none")


def use_float8(blocks: Iterable[nn.Module], recipe: str, device: torch.device) -> None:
    """Replace the blocks' linear layers by float8 ones with the same weights under the same names, before they are compiled.

    On a device without float8 units the products are emulated: same rounding, no gain. Raises ConfigError for a layer whose
    sizes the units can't take.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # pyright: ignore[reportMissingImports]

    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    settings = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=not native)
    blocks = list(blocks)
    if problems := list(float8_size_problems(blocks, None)):
        raise ConfigError(problems)
    for block in blocks:
        convert_to_float8_training(block, config=settings)
