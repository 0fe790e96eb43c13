"""Groups of parameters: how a model's weights are held, over which ranks, and which are gathered together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import nn

from ...models.protocol import Model
from ..config import ParallelConfig
from ..layout import Layout, uses_fsdp


@dataclass(frozen=True)
class ParameterGroup:
    """Weights that are held in one way, over one pair of mesh axes.

    name           by which a mesh knows the axes (`Mesh.weight_axes`)
    fully_sharded  whether FSDP2 holds them; otherwise they lie whole beside sharded masters
    modules        whether the group takes the weights of a module of this name. Such a module reads its weights only while it
                   is called. None: the group takes what no other group does
    """

    name: str
    fully_sharded: bool
    modules: Callable[[str], bool] | None = None


@dataclass(frozen=True)
class GatherUnit:
    """Weights that are gathered together, and whose gradients are sent together.

    module   FSDP2 gathers them before its call
    readers  the modules before whose call they must be whole
    weights  the group's weights in `module` that no smaller unit has
    """

    module: nn.Module
    readers: Sequence[nn.Module]
    weights: list[nn.Parameter]


def parameter_groups(parallel: ParallelConfig, layout: Layout, experts: Collection[str] = ()) -> list[ParameterGroup]:
    """List the groups of a model. The one without `modules` is last: its units enclose those of the others.

    experts: names of the modules that hold experts' weights
    """
    dense = ParameterGroup("dense", uses_fsdp(parallel, layout))
    if layout.ep == 1:
        return [dense]
    return [ParameterGroup("experts", uses_fsdp(parallel, layout, experts=True), frozenset(experts).__contains__), dense]


def group_of(parameter: str, groups: Sequence[ParameterGroup]) -> ParameterGroup:
    """Find the group of a parameter, by the names of the modules that it is in."""
    modules = list(accumulate(parameter.split(".")[:-1], "{}.{}".format))
    return next(group for group in groups if group.modules is None or any(map(group.modules, modules)))


def split_by_group(
    stage: nn.Module, group: ParameterGroup, groups: Sequence[ParameterGroup]
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Split a stage's parameters by name into those of a group and all others."""
    named = dict(stage.named_parameters())
    own = {name: parameter for name, parameter in named.items() if group_of(name, groups) is group}
    return own, {name: parameter for name, parameter in named.items() if name not in own}


def gather_units(stage: Model, group: ParameterGroup, groups: Sequence[ParameterGroup]) -> Iterator[GatherUnit]:
    """Yield the units of a group in a stage, in the order of the forward pass."""
    own, _ = split_by_group(stage, group, groups)
    rest = dict.fromkeys(own.values())

    def take(module: nn.Module) -> GatherUnit:
        weights = [parameter for parameter in module.parameters() if parameter in rest]
        for weight in weights:
            del rest[weight]
        return GatherUnit(module, [module], weights)

    if group.modules is not None:
        modules = [module for name, module in stage.named_modules() if group.modules(name)]
    else:
        modules = stage.gather_units()
    for module in modules:
        unit = take(module)
        if unit.weights:
            yield unit
    if group.modules is None:
        yield GatherUnit(stage, stage.rest_readers(), list(rest))
