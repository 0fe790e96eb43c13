"""Count what a mixture of experts keeps for its backward pass, and computes again in it, for each token. Imports no torch.

Shape legend: D model width, F an expert's width, E experts, K chosen experts of a token, P width of a recurrent router's state.
"""

from __future__ import annotations

from .config import ExpertsConfig, MixtureConfig

INDEX = 8
"""Bytes of an index of a token or an expert."""


def kept_beside(mixture: MixtureConfig, policy: str, unit: int, accum: int) -> float:
    """Count the bytes per token that a mixture keeps for its backward pass beside its experts' inner width.

    unit, accum: bytes of an element that is computed with, and of one that is added up

    Every policy keeps the choice and, as an input of the block, a recurrent router's state. Selective checkpointing also keeps
    the router's first product. Where all is kept, that is the router's input as the router takes it, what the router keeps, the
    places in both orders of tokens, copies of the token, and outputs, weighted in the precision of the gates.
    """
    keys = mixture.keys
    if policy == "offload":
        return 0.0
    if policy == "none":
        inputs = accum * mixture.dim + (unit * mixture.dim if keys.shared and unit != accum else 0)
        may_drop = keys.router == "relu" or keys.parts.router is not None or keys.capacity is not None
        dropped = 2 * keys.top_k if may_drop else 0  # masks of rows, on both ways
        routing = _kept_by_router(keys, unit, accum) + 2 * INDEX * keys.top_k
        return inputs + routing + dropped + keys.top_k * mixture.dim * (unit + accum)
    product = accum * (keys.carried_dim or keys.count) if policy == "selective" else 0
    return _kept_choice(keys) + unit * keys.carried_dim + product


def kept_by_kernels(mixture: MixtureConfig, policy: str, unit: int, accum: int, compiled: bool) -> float:
    """Count the bytes per token that a mixture keeps for its backward pass where `kernels/experts/` compute the experts.

    Where all is kept, that is its input, the outputs of gate and up, what the router keeps, and both orders in int32. Selective
    checkpointing keeps gate and up beside what it keeps without kernels; where blocks are not compiled, also the activation,
    because one operator computes all three.
    """
    keys = mixture.keys
    both = 2 * unit * keys.top_k * mixture.expert.ffn_dim
    shared = 4 * unit * keys.shared * mixture.expert.ffn_dim
    if policy == "none":
        # A recurrent router has no kernel: it copies its input to the precision in which it computes.
        inputs = unit + (accum if keys.carried_dim and unit != accum else 0)
        return inputs * mixture.dim + both + shared + _kept_by_router(keys, unit, accum) + INDEX * keys.top_k
    up = (both if compiled else 1.5 * both) if policy == "selective" else 0
    return kept_beside(mixture, policy, unit, accum) + up


def _kept_choice(keys: ExpertsConfig) -> int:
    """Count the bytes of a token's choice, and of a ReLU router's flags for the choices that it takes."""
    return (INDEX + (keys.router == "relu")) * keys.top_k


def _kept_by_router(keys: ExpertsConfig, unit: int, accum: int) -> float:
    """Count the bytes per token that a router keeps under the charges of a training step, its input apart.

    Of each expert, softmax keeps its score before and after charges. Sigmoid keeps it three times, once divided by the sum,
    and that sum. Of each chosen expert there are the gate and, before it is divided by their sum, the score. A recurrent
    router also keeps 8 P: its projected input, both of the cell's gates, three products of the state, the candidate and the
    new state; and the last state again where that has to be widened. A ReLU router keeps five arrays of E: activations before
    and after charges, their probabilities, the normed ones, and gates. The objectives z-loss, locality and chunks keep E more
    each, which is not counted. A router of a user's own is taken to keep what ours would.
    """
    choice = INDEX * keys.top_k
    if keys.router == "relu":
        return choice + accum * (5 * keys.count + 2 + keys.top_k)
    scores = 2 * keys.count if keys.scores == "softmax" else 3 * keys.count + 1
    gates = keys.top_k + (keys.top_k + 1 if keys.renormalise else 0)
    state = (8 if unit == accum else 9) * keys.carried_dim
    return choice + accum * (scores + gates + state)


def recomputed_matrices(mixture: MixtureConfig, policy: str, *, last_read: bool, fused: bool, compiled: bool) -> float:
    """Count the elements of the matrices that a token is multiplied with again in the backward pass.

    last_read  whether the block reads the mixture's output in its backward pass
    fused      whether `kernels/experts/` compute the experts
    compiled   whether blocks are compiled

    Outputs of experts are read for the gates' gradient, but not by kernels: these then multiply with w2 again only where
    operators run one by one. Of the shared experts w2 comes last in a block, or before the routed experts without kernels.
    Selective checkpointing keeps the router's first product, and kernels' gate and up.
    """
    if policy not in ("selective", "full"):
        return 0.0
    keys, matrix = mixture.keys, mixture.dim * mixture.expert.ffn_dim
    routed = mixture.products - (2 if fused and policy == "selective" else 0)
    routed -= 1 if fused and compiled and not last_read else 0
    shared = 2 if (fused or compiled) and not last_read else 3
    router = mixture.router_matrices
    if policy == "selective":
        router -= keys.carried_dim * mixture.dim or router
    return (keys.top_k * routed + keys.shared * shared) * matrix + router
