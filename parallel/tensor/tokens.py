"""Tensor parallelism of modules that work on each token by itself (`TensorRole.TOKENS`), such as a mixture of experts.

Every rank has their weights whole, and computes with its own slice of the tokens. So a weight's gradient on a rank is a part
of a sum, and is declared partial.
"""

from __future__ import annotations

from collections.abc import Collection, Generator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, distribute_tensor


def distributed(parameter: nn.Parameter, mesh: DeviceMesh, placement: Placement) -> nn.Parameter:
    """Return a parameter cut over a mesh."""
    cut = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
    return nn.Parameter(cut, requires_grad=parameter.requires_grad)


def work_on_tokens(module: nn.Module, mesh: DeviceMesh, elsewhere: Collection[nn.Module] = ()) -> None:
    """Make a module's parameters, and those of the modules in it, whole on every rank with gradients to be summed.

    elsewhere: modules whose weights are left as they are.
    """
    owners = [owner for owner in module.modules() if list(owner.parameters(recurse=False)) and owner not in elsewhere]
    for owner in owners:
        for key, parameter in list(owner.named_parameters(recurse=False)):
            owner.register_parameter(key, distributed(parameter, mesh, Replicate()))
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with _local_weights(owners):
            return forward(*args, **kwargs)

    module.forward = run


@contextmanager
def _local_weights(owners: list[nn.Module]) -> Generator[None]:
    """Put plain tensors in the place of the modules' weights, as long as these compute."""
    held = [cast(dict[str, Any], owner._parameters) for owner in owners]
    places = [(parameters, key, weight) for parameters in held for key, weight in parameters.items()]
    try:
        for parameters, key, weight in places:
            if isinstance(weight, DTensor):
                parameters[key] = weight.to_local(grad_placements=[Partial()])
        yield
    finally:
        for parameters, key, weight in places:
            parameters[key] = weight
