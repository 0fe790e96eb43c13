"""The judgement of a step: the statistic against one in plain Python, and what an outlier does to the steps after it."""

from __future__ import annotations

import math
import random
import statistics
from pathlib import Path

import pytest
import torch

from meshloom.optim.progress import Progress
from meshloom.parallel.config import ParallelConfig
from meshloom.parallel.engine import StepLoss
from meshloom.parallel.layout import Layout
from meshloom.parallel.mesh import Mesh
from meshloom.trainer.config import TrainerConfig
from meshloom.trainer.guard import spikes
from meshloom.trainer.guard.guard import StepGuard
from meshloom.trainer.guard.journal import Journal, Rewind
from meshloom.trainer.guard.spikes import LOSS_SPIKE, NORM_SPIKE, NOT_FINITE, SpikeDetector, Verdict
from support.ranks import run_ranks


def series(bad: dict[int, tuple[float, float]], length: int = 400) -> list[tuple[float, float]]:
    """Losses that fall slowly, and log-normal gradient norms, with some steps replaced."""
    draw = random.Random(5)
    drawn = [(3.0 * (n + 10) ** -0.1 + draw.gauss(0, 0.03), math.exp(draw.gauss(0, 0.15))) for n in range(length)]
    return [bad.get(n, values) for n, values in enumerate(drawn)]


def plain_codes(values: list[tuple[float, float]], sigmas: float) -> list[int]:
    """The rule in plain Python: medians of lists, and nothing that is bad ever enters them."""
    accepted: list[tuple[float, float]] = []
    codes: list[int] = []
    for loss, norm in values:
        code = 0
        if not (math.isfinite(loss) and math.isfinite(norm)):
            code = NOT_FINITE
        elif len(accepted) >= 64:
            for number, least, bit in ((0, 0.02, LOSS_SPIKE), (1, 0.3, NORM_SPIKE)):
                past = [pair[number] for pair in accepted[-128:]]
                middle = statistics.median_low(past)
                spread = 1.4826 * statistics.median_low([abs(x - middle) for x in past])
                least = least * abs(middle) if number == 0 else least
                now = loss if number == 0 else math.log(norm)
                code += bit if now - middle > sigmas * max(spread, least) else 0
        if not code:
            accepted.append((loss, math.log(norm)))
        codes.append(code)
    return codes


def judged(values: list[tuple[float, float]], sigmas: float | None, resumed_at: int = -1) -> list[int]:
    """Codes of the detector, whose host is as late as it is in a run: it releases at once what it has seen."""
    mesh = Mesh.connect(Layout.plan(ParallelConfig(), 1), torch.device("cpu"))
    detector = SpikeDetector(mesh, sigmas)
    codes: list[int] = []
    for number, (loss, norm) in enumerate(values):
        if number == resumed_at:
            state, detector = detector.state_dict(), SpikeDetector(mesh, sigmas)
            detector.load_state_dict(state)
        one, two = torch.tensor(loss, dtype=torch.float64), torch.tensor(norm, dtype=torch.float64)
        numbers = {name: float(value) for name, value in detector.judge(one, two, one).items()}
        verdict = Verdict.taken_from({"loss": loss, "grad_norm": norm, **numbers})
        assert verdict is not None and float(detector.skip) == verdict.bad
        codes.append(verdict.code)
        if verdict.bad:
            detector.release()
        else:
            detector.accept(verdict)
    return codes


def body(rank: int, world_size: int, *arguments: object) -> list[int]:
    return judged(*arguments)  # type: ignore[arg-type]


BAD = {30: (math.nan, 1.0), 90: (9.0, 1.0), 91: (2.4, 40.0), 92: (2.4, math.inf), 200: (math.inf, math.nan), 201: (2.9, 1.0)}
LONG = {300 + number: (9.0, 1.0) for number in range(80)}  # more than half a window: were they admitted, they'd be the median


@pytest.mark.parametrize(("sigmas", "resumed_at"), [(6.0, -1), (3.0, 250), (3.0, 70)])
def test_steps_are_judged_as_by_medians_of_lists(sigmas: float, resumed_at: int) -> None:
    values = series(BAD | LONG)
    expected = plain_codes(values, sigmas)
    assert {NOT_FINITE, LOSS_SPIKE, NORM_SPIKE} <= set(expected) and expected[91] == NORM_SPIKE
    assert expected[300:380] == [LOSS_SPIKE] * 80
    assert run_ranks(1, body, values, sigmas, resumed_at) == [expected]


def test_without_sigmas_only_what_is_not_finite_is_bad() -> None:
    (codes,) = run_ranks(1, body, series(BAD), None)
    assert {number for number, code in enumerate(codes) if code} == {30, 92, 200}


def windowed_rule(values: list[tuple[float, float]]) -> list[bool]:
    """OLMo-core's SkipStepOptimizer: beyond 6 standard deviations of the last 128 steps, outliers included, from 64 on."""
    skipped: list[bool] = []
    for number in range(len(values)):
        past = values[max(0, number - 128) : number]
        taken = len(past) < 64
        if not taken:
            deviations = []
            for kind in (0, 1):
                of = torch.tensor([pair[kind] for pair in past], dtype=torch.float64)
                deviations.append((values[number][kind] - of.mean()) <= 6 * of.std())
            taken = bool(deviations[0] & deviations[1])
        skipped.append(not taken)
    return skipped


def test_one_nan_costs_one_step_where_a_plain_window_skips_129() -> None:
    values = series({200: (math.nan, math.nan)})
    assert sum(windowed_rule(values)) == 129
    (codes,) = run_ranks(1, body, values, 6.0)
    assert [number for number, code in enumerate(codes) if code] == [200]


def frozen(rank: int, world_size: int) -> tuple[list[float], list[int]]:
    """`skip` after a good, a bad and a good step without the host; then again after a release. And the ranks that are named."""
    mesh = Mesh.connect(Layout.plan(ParallelConfig(), world_size), torch.device("cpu"))
    detector, seen = SpikeDetector(mesh, None), []
    ranks: list[int] = []
    for number, loss in enumerate([2.0, math.nan, 2.0, 2.0]):
        if number == 3:
            detector.release()
        own = torch.tensor(loss if rank == 1 else 1.0, dtype=torch.float64)
        # What rounding makes different between ranks must not matter: rank 0's numbers count.
        whole = torch.tensor(loss + (1e3 if rank else 0.0), dtype=torch.float64)
        numbers = {name: float(value) for name, value in detector.judge(whole, whole, own).items()}
        verdict = Verdict.taken_from({"loss": loss, "grad_norm": loss, **numbers})
        assert verdict is not None and (math.isnan(loss) or verdict.log_norm == pytest.approx(math.log(2.0)))
        ranks.append(-1 if verdict.rank is None else verdict.rank)
        seen.append(float(detector.skip))
    return seen, ranks


def test_nothing_is_taken_after_a_bad_step_before_the_host_has_seen_it() -> None:
    for seen, ranks in run_ranks(2, frozen):
        assert seen == [0.0, 1.0, 1.0, 0.0]
        assert ranks == [-1, 1, -1, -1]


def guarded(rank: int, world_size: int, batches: tuple[int, int], folder: str) -> tuple[list[int], list[int], bool]:
    """Bad steps among 70 of one batch size, and some of another with a larger norm; what is suspected; a restored mirror."""
    mesh = Mesh.connect(Layout.plan(ParallelConfig(), 1), torch.device("cpu"))
    guard = StepGuard(mesh, TrainerConfig(steps=9), Journal("d"), folder, Path(folder))
    guard.journal.rewinds.append(Rewind(75, 60, [], "", "d"))
    guard.suspect_rewound(60)
    progress, bad, suspected = Progress(), [], []
    for number in range(145):
        batch = batches[number >= 70]
        progress = progress.before(batch, 16).after(batch, batch * 16)
        loss, norm = torch.tensor(2.0, dtype=torch.float64), torch.tensor(40.0 if number >= 70 else 1.0, dtype=torch.float64)
        numbers = {name: float(n) for name, n in guard.judge(StepLoss(loss, loss, {}, loss), norm, batch).items()}
        verdict = Verdict.taken_from({"loss": 2.0, "grad_norm": float(norm), **numbers})
        assert verdict is not None
        if verdict.bad:
            return [number], suspected, True
        guard.accept(verdict, progress)
        suspected += [] if guard.suspected is None else [progress.step]
    return bad, suspected, guard.state_dict()["accepted"] == 75


@pytest.mark.parametrize(("batches", "bad"), [((8, 8), [70]), ((8, 5), [70]), ((8, 4), []), ((8, 2), [])])
def test_a_batch_of_half_the_size_begins_a_new_level(batches: tuple[int, int], bad: list[int], tmp_path: Path) -> None:
    ((found, suspected, mirrored),) = run_ranks(1, guarded, batches, str(tmp_path))
    assert found == bad and mirrored
    if not bad:  # 64 good steps beyond the suspected one, not before it
        assert suspected == list(range(1, 75 + 64))


def test_the_windows_numbers_are_those_of_the_docs() -> None:
    assert (spikes.WINDOW, spikes.WARM_UP) == (128, 64)
