"""The bytes that an optimizer is said to keep are those that its steps make."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from meshloom.optim.build import build_optimizer
from meshloom.optim.optimizers.options import OPTIONS
from meshloom.optim.optimizers.own_arrays import declared
from meshloom.optim.optimizers.parameters import NamedParameter, Unsharded
from meshloom.optim.optimizers.state_size import state_size

SHAPES = {
    "embed.weight": (40, 24),
    "layers.0.w1": (36, 24),
    "layers.0.w2": (24, 36),
    "layers.0.experts": (48, 20),
    "norm": (24,),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "adamw_8bit": {"block": 16, "min_size": 900},
    "soap": {"max_dim": 30},
    "apollo": {"rank": 8},
    "galore": {"rank": 8},
    "natural_galore": {"rank": 8, "history": 3},
    "frugal": {"period": 5},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_state_takes_what_it_is_said_to_take(kind: Any) -> None:
    name = kind.__dataclass_fields__["name"].default
    config = kind(**SETTINGS.get(name, {}))
    named = [
        NamedParameter(
            key,
            torch.nn.Parameter(torch.zeros(shape)),
            shape,
            hidden=key.startswith("layers."),
            stacked=4 if key.endswith("experts") else 1,
        )
        for key, shape in SHAPES.items()
    ]
    optimizer = build_optimizer(config, named, Unsharded())
    for parameter in named:
        parameter.tensor.grad = torch.ones_like(parameter.tensor)
    optimizer.step()
    for parameter in named:
        arrays = [value for value in optimizer.state[parameter.tensor].values() if torch.is_tensor(value) and value.dim()]
        arrays += [each.tensor for each in declared(optimizer) if each.name == parameter.name]
        projections: dict[str, tuple[int, torch.Tensor]] = getattr(optimizer, "projections", {})
        arrays += [drawn for name, (_, drawn) in projections.items() if name.partition("[")[0] == parameter.name]
        found = sum(value.numel() * value.element_size() for value in {id(value): value for value in arrays}.values())
        size = state_size(config, parameter.global_shape, 4, hidden=parameter.hidden, stacked=parameter.stacked)
        assert size is not None
        assert size.element * parameter.tensor.numel() + size.owned == pytest.approx(found), (name, parameter.name)
