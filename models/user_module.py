"""Conversion of a user's own module to a `Model`: it keeps its methods, and gets the defaults of those that it lacks.

The module needs `forward(tokens_BS) → logits_BSV`. Parameters named `targets`, `documents` or `positions` are given what they
ask for; with `targets` it returns the sum of token losses.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ..config.problems import ConfigError, Problem
from ..kernels.documents import Documents
from ..kernels.loss import IGNORED
from .protocol import Model, is_bias, lacks


@contextmanager
def parameters_on_meta() -> Generator[None]:
    """Build modules with parameters on the meta device from the start, and with buffers that keep their values."""

    def move(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    # torch annotates the hook as returning nothing, and documents that it may return a parameter.
    handle = register_module_parameter_registration_hook(cast(Any, move))
    try:
        yield
    finally:
        handle.remove()


class _Adopted(nn.Module):
    """Adapter of the call: engines call it as a model, and it passes the user's forward what its signature names."""

    accepted: ClassVar[frozenset[str]]

    def forward(
        self,
        inputs: torch.Tensor,
        targets_BS: torch.Tensor | None = None,
        documents: Documents | None = None,
        positions_BS: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute logits (B, S, V) of token ids (B, S), or with targets the sum of token losses."""
        offered = {"targets": targets_BS, "documents": documents, "positions": positions_BS}
        found = super().forward(inputs, **{name: value for name, value in offered.items() if name in self.accepted})
        if targets_BS is None or "targets" in self.accepted:
            return found
        wide = torch.promote_types(found.dtype, torch.float32)
        return F.cross_entropy(found.flatten(0, -2).to(wide), targets_BS.flatten(), ignore_index=IGNORED, reduction="sum")


def adopt(module: nn.Module) -> Model:
    """Make a module a `Model`, in place: its class becomes a subclass of its class and of `Model`.

    Raises ConfigError where an attribute of the module has the name of a member of `Model`.
    """
    if not isinstance(module, Model):
        kind = type(module)
        held = {*module.__dict__, *module._modules, *module._parameters, *module._buffers}
        if clashes := sorted(held & {name for name in vars(Model) if not name.startswith("_")} - {"forward"}):
            message = (
                f"{kind.__name__} has an attribute {clashes[0]}, which engines take for what meshloom.models.protocol says"
            )
            raise ConfigError([Problem("model", message, "rename it")])
        accepted = frozenset(inspect.signature(kind.forward).parameters)
        bases: Any = (_Adopted, kind, Model)  # the type checker can't order classes that it does not know
        module.__class__ = type(kind.__name__, bases, {"__module__": kind.__module__, "accepted": accepted})
    model = cast(Model, module)
    model.matrix_names = frozenset(name for name, parameter in model.named_parameters() if parameter.dim() > 1)
    model.default_blocks = _largest_list(model)
    return model


def _largest_list(module: nn.Module) -> tuple[nn.Module, ...]:
    """Find the largest ModuleList or ModuleDict of modules of one class that share no weight with anything else."""
    owners: Counter[nn.Parameter] = Counter(
        parameter for child in module.modules() for parameter in child._parameters.values() if parameter is not None
    )

    def is_unshared(child: nn.Module) -> bool:
        return all(owners[parameter] == 1 for parameter in child.parameters())

    def size(blocks: tuple[nn.Module, ...]) -> int:
        return sum(parameter.numel() for block in blocks for parameter in block.parameters())

    lists = [tuple(each.children()) for each in module.modules() if isinstance(each, nn.ModuleList | nn.ModuleDict)]
    uniform = [blocks for blocks in lists if len({type(block) for block in blocks}) == 1 and all(map(is_unshared, blocks))]
    return max(uniform, key=size, default=())


def _unknown_vectors(model: Model) -> list[str]:
    """Return the names of a module's vectors that are neither norms' weights nor biases, with * for the numbers of layers."""
    norms = {
        id(parameter)
        for module in model.modules()
        if any("norm" in kind.__name__.lower() for kind in type(module).__mro__)
        for parameter in module.parameters(recurse=False)
    }
    names = [name for name, parameter in model.named_parameters() if parameter.dim() < 2 and id(parameter) not in norms]
    return sorted({re.sub(r"\b\d+\b", "*", name) for name in names if not is_bias(name)})


def defaults_used(model: Model) -> list[str]:
    """List, in sentences, the defaults that a user's own module is given. Empty for a decoder."""
    if model.decoder_config is not None:
        return []
    lines: list[str] = []
    if lacks(model, "block_modules"):
        blocks = model.default_blocks
        kind = type(blocks[0]).__name__ if blocks else ""
        found = (
            f"its {len(blocks)} modules {kind}" if blocks else "none: no ModuleList or ModuleDict holds modules of one class"
        )
        lines.append(f"block_modules(): the units of sharding, recomputation and compilation are {found}")
    if lacks(model, "initial"):
        lines.append("initial(name): matrices begin normal with standard deviation 0.02, norms' weights at one, biases at zero")
        if vectors := _unknown_vectors(model):
            lines.append(
                f"initial(name): vectors that are neither norms' weights nor biases begin at one: {', '.join(vectors)}"
            )
    if lacks(model, "decays"):
        lines.append("decays(name): weight decay applies to matrices, embeddings included")
    if lacks(model, "lr_scale"):
        lines.append("lr_scale(name): every weight has the run's learning rate")
    if lacks(model, "flops_per_token"):
        lines.append("flops_per_token(seq_len): MFU counts 6 FLOPs per parameter and token")
    if isinstance(model, _Adopted) and "documents" not in model.accepted:
        lines.append("forward(…, documents): attention crosses the borders between documents")
    return lines
