"""Optimizers that work under DeepSpeed: elementwise ones (rule R4), and DeepSpeed's CPU Adam.

DeepSpeed replaces any optimizer derived from `torch.optim.Adagrad` by a new one over all flat groups, without their decay and
rates, so those are refused. Of the other classes that it treats specially, only its own Muon changes an update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ...config.problems import ConfigError, Problem
from ...optim.optimizers.adamw import AdamW
from ...optim.optimizers.own_arrays import HoldsOwnArrays
from ...optim.optimizers.parameters import AveragesWeights, NamedParameter, WholeMatrices
from ..engine import OptimizerFactory


class FlatPieces:
    """`Shards` where only flat pieces of several parameters exist: every method raises ConfigError."""

    def sum(self, values: torch.Tensor, parameters: Sequence[NamedParameter]) -> torch.Tensor:
        """Raise ConfigError."""
        raise _refusal("asks for sums over whole parameters")

    def across_stages(self, values: torch.Tensor) -> torch.Tensor:
        """Raise ConfigError."""
        raise _refusal("asks for sums over whole parameters")

    def gather(self, parameter: NamedParameter, local: torch.Tensor) -> torch.Tensor:
        """Raise ConfigError."""
        raise _refusal("asks for whole parameters")

    def scatter(self, parameter: NamedParameter, whole: torch.Tensor) -> torch.Tensor:
        """Raise ConfigError."""
        raise _refusal("asks for its part of whole parameters")

    def whole_matrices(self, parameters: Sequence[NamedParameter], cost: Callable[[int, int], float]) -> WholeMatrices:
        """Raise ConfigError."""
        raise _refusal("asks for whole matrices")


def _refusal(what: str) -> ConfigError:
    return ConfigError(
        [
            Problem(
                "optim",
                f"this optimizer {what}, but DeepSpeed hands it flat pieces of them",
                "use an elementwise optimizer (adamw), or parallel.engine=torch",
            )
        ]
    )


def _replaced(optimizer: torch.optim.Optimizer) -> ConfigError:
    name = type(optimizer).__name__
    why = f"DeepSpeed puts one of its own making in the place of {name}, as of any torch.optim.Adagrad, without decay and rates"
    return ConfigError([Problem("optim", why, "use optim=adagrad or another elementwise optimizer, or parallel.engine=torch")])


def optimizer_problems(make_optimizer: OptimizerFactory) -> list[Problem]:
    """Return why this optimizer does not work under DeepSpeed.

    It is built over small parameters, then given flat pieces of them in their place, as DeepSpeed does. It must update each
    element as it does with the parameters themselves.
    """
    try:
        if updates_elementwise(make_optimizer):
            return []
        problem = _refusal("updates an element by its neighbours in the parameter").problems[0]
    except ConfigError as refusal:
        return refusal.problems
    except Exception as error:  # any error of a user's optimizer
        problem = _refusal(f"fails on flat pieces ({type(error).__name__}: {error})").problems[0]
    return [problem]


def updates_elementwise(make_optimizer: OptimizerFactory) -> bool:
    """Return whether two updates of flat pieces equal two updates of the parameters themselves, bit for bit.

    Raises ConfigError for an optimizer that needs whole parameters, or that DeepSpeed would replace.
    """
    shapes = [(6, 4), (4,), (3, 8)]

    def build() -> tuple[list[NamedParameter], torch.optim.Optimizer]:
        generator = torch.Generator().manual_seed(0)
        parameters = [
            NamedParameter(f"layers.{i}.probe.weight", nn.Parameter(torch.randn(shape, generator=generator)), shape, decay)
            for i, (shape, decay) in enumerate(zip(shapes, (True, False, True), strict=True))
        ]
        optimizer = make_optimizer(parameters, FlatPieces())
        if isinstance(optimizer, torch.optim.Adagrad):
            raise _replaced(optimizer)
        if isinstance(optimizer, HoldsOwnArrays):
            raise _refusal("keeps arrays whose shapes are their own")
        if isinstance(optimizer, AveragesWeights):
            raise _refusal("evaluates and saves averages of whole parameters")
        return parameters, optimizer

    gradients = [[torch.randn(shape, generator=torch.Generator().manual_seed(step)) for shape in shapes] for step in (1, 2)]
    whole, optimizer = build()
    for step in gradients:
        for parameter, gradient in zip(whole, step, strict=True):
            parameter.tensor.grad = gradient.clone()
        optimizer.step()

    pieces, optimizer = build()
    order = {parameter.tensor: index for index, parameter in enumerate(pieces)}
    members = [[order[p] for p in group["params"]] for group in optimizer.param_groups]
    flats: list[list[nn.Parameter]] = []
    for group, indices in zip(optimizer.param_groups, members, strict=True):
        flat = torch.cat([pieces[i].tensor.detach().flatten() for i in indices])
        # Two pieces, cut where no parameter ends.
        flats.append([nn.Parameter(piece.clone()) for piece in flat.split((len(flat) + 2) // 2)])
        group["params"] = list(flats[-1])
    for step in gradients:
        for flat, indices in zip(flats, members, strict=True):
            gradient = torch.cat([step[i].flatten() for i in indices])
            for piece, part in zip(flat, gradient.split([len(p) for p in flat]), strict=True):
                piece.grad = part.clone()
        optimizer.step()
    held = ((piece, value) for piece, state in optimizer.state.items() for value in state.values())
    if any(torch.is_tensor(value) and value.dim() and value.shape != piece.shape for piece, value in held):
        why = "this optimizer keeps state of another shape than the weight's, for which a checkpoint has no place"
        raise ConfigError([Problem("optim", why, "use one that keeps tensors of the weight's shape, as adamw does")])
    for flat, indices in zip(flats, members, strict=True):
        expected = torch.cat([whole[i].tensor.detach().flatten() for i in indices])
        if not torch.equal(torch.cat([piece.detach() for piece in flat]), expected):
            return False
    return True


def cpu_adam(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Make DeepSpeed's CPU Adam with the groups and hyper-parameters of an AdamW. Compiled on first use (a minute or more).

    Raises ConfigError when the optimizer is another one, as a subclass is, which may update otherwise, or when the extension
    can't be compiled, saying what is missing.
    """
    key = "parallel.deepspeed.cpu_adam"
    others = [name for name in ("amsgrad", "maximize") if optimizer.defaults.get(name)]
    if type(optimizer) not in (AdamW, torch.optim.AdamW) or others:
        name = " ".join([type(optimizer).__name__, *(f"with {other}" for other in others)])
        raise ConfigError(
            [Problem(key, f"CPU Adam does the update of AdamW, not of {name}", "use optim=adamw, or leave it out")]
        )
    require_op("CPUAdamBuilder", key, "leave it out: torch's fused AdamW needs no compiler")
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # pyright: ignore[reportMissingImports]

    defaults: dict[str, Any] = optimizer.defaults
    own = ("params", "names", "lr", "betas", "eps", "weight_decay", "lr_scale")
    return DeepSpeedCPUAdam(
        [{key: group[key] for key in own if key in group} for group in optimizer.param_groups],
        lr=defaults["lr"],
        betas=defaults["betas"],
        eps=defaults["eps"],
        adamw_mode=True,
    )


# The needs of each compiled extension of DeepSpeed.
NEEDS = {
    "CPUAdamBuilder": "a C++ compiler (g++) and ninja",
    "QuantizerBuilder": "a GPU, CUDA's toolkit (nvcc) of PyTorch's own CUDA version, a C++ compiler (g++) and ninja",
    "AsyncIOBuilder": "libaio's header (apt install libaio-dev), a C++ compiler (g++) and ninja",
}


def require_op(builder: str, key: str, fix: str) -> None:
    """Load one of DeepSpeed's compiled extensions, building it if need be.

    Raises ConfigError naming `key`, with what is missing, when it can't be built.
    """
    import deepspeed.ops.op_builder as builders  # pyright: ignore[reportMissingImports]

    try:
        op = getattr(builders, builder)()
        if not op.is_compatible(verbose=False):
            raise RuntimeError("DeepSpeed finds it incompatible with this machine")
        op.load(verbose=False)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ConfigError(
            [Problem(key, f"DeepSpeed's {builder} can't be built ({lines[0].strip()}); it needs {NEEDS[builder]}", fix)]
        ) from error
