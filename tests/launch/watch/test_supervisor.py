"""The supervisor of torchrun's agent: one message a failure, and no start that would repeat one."""

from __future__ import annotations

import inspect
import os
import signal
from collections.abc import Generator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.elastic.agent.server.api import RunResult, SimpleElasticAgent
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import MultiprocessContext, ProcessFailure, SubprocessContext

from meshloom.launch.exit_codes import BAD_CONFIG, DIVERGED
from meshloom.launch.watch.supervisor import Supervisor, exit_codes
from meshloom.parallel.heartbeat import Heartbeat, Phase
from meshloom.trainer.all_ranks import PeerFailed
from meshloom.trainer.watch.folder import WATCH_FOLDER, AttemptFolder, write_json
from meshloom.trainer.watch.incidents import read_incidents
from meshloom.trainer.watch.rank import write_failure


@pytest.fixture
def supervisor(tmp_path: Path) -> Generator[Supervisor]:
    found = Supervisor(3, several=False)
    yield found
    found.close()


def attempt(number: int, output_dir: Path, reasons: dict[int, BaseException], step: int = 7) -> None:
    """Leave what two ranks of an attempt would leave that failed for these reasons."""
    folder = AttemptFolder.of(Path(os.environ[WATCH_FOLDER]), number)
    folder.path.mkdir(parents=True)
    write_json(folder.run, {"output_dir": str(output_dir), "silence": None, "timeout": 600, "save_timeout": 600, "nodes": 1})
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(2):
            patch.setenv("RANK", str(rank))
            patch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))
            heartbeat = Heartbeat(folder.beat(rank))
            heartbeat.begin_step(step)
            heartbeat.beat(Phase.BACKWARD, 2)
            if rank in reasons:
                try:
                    raise reasons[rank]
                except BaseException as error:
                    assert write_failure(error)


PEER = RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:1")


def test_a_killed_rank_goes_before_what_its_peer_says(
    supervisor: Supervisor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt(0, tmp_path, {0: PEER})
    supervisor.tell({0: 1, 1: -signal.SIGKILL})
    supervisor.tell({0: 1, 1: -signal.SIGKILL})
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        f"rank 1 ({os.uname().nodename}, pid {os.getpid()}) was killed by SIGKILL in backward of micro-batch 2 in step 7"
        in line
    )
    assert line.endswith("starting again, from what is saved if anything is (restart 1 of 3)")
    (incident,) = read_incidents(tmp_path)
    assert (incident["kind"], incident["rank"], incident["step"], incident["phase"]) == ("death", 1, 7, "backward")
    assert incident["details"]["code"] == 137
    assert supervisor.judgement is not None and supervisor.judgement.again


def test_the_error_of_its_own_is_told_with_its_traceback(
    supervisor: Supervisor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt(0, tmp_path, {0: PEER})
    later = {1: 1}

    def fails_later() -> dict[int, int]:
        if later:
            attempt_error(tmp_path, ValueError("no such document"))
        return later

    supervisor.tell({0: 1}, fails_later)
    told = capsys.readouterr().err
    assert told.startswith("rank 1 (") and "ValueError: no such document" in told.splitlines()[0]
    assert told.count("Traceback") == 1 and "Connection closed" not in told


def attempt_error(output_dir: Path, error: BaseException) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "1")
        try:
            raise error
        except BaseException as raised:
            assert write_failure(raised)


def test_an_error_that_comes_again_ends_the_run(supervisor: Supervisor, tmp_path: Path) -> None:
    for number in range(2):
        attempt(number, tmp_path, {1: ValueError("bad sample")}, step=7)
        Heartbeat(AttemptFolder.of(Path(os.environ[WATCH_FOLDER]), number).beat(0)).begin_step(3)  # it began at 3
        supervisor.tell({1: 1})
        assert supervisor.judgement is not None and supervisor.judgement.again is (number == 0)
    assert "2 attempts came no further than step 7" in supervisor.judgement.said


def test_no_rank_has_failed_where_the_run_has_ended_itself(
    supervisor: Supervisor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt(0, tmp_path, {})
    supervisor.tell({0: DIVERGED, 1: DIVERGED})
    assert capsys.readouterr().err == "the run ended by its own decision, and is not started again\n"
    (incident,) = read_incidents(tmp_path)
    assert (incident["kind"], incident["rank"], incident["details"]["code"]) == ("end", None, DIVERGED)


def test_the_agent_gives_up_where_the_judgement_says_so(supervisor: Supervisor, tmp_path: Path) -> None:
    attempt(0, tmp_path, {})
    seen: list[int] = []
    agent_class: Any = type("Agent", (), {"_monitor_workers": lambda self, group: seen.append(1)})
    undo = supervisor.watch(agent_class)
    agent = agent_class()
    agent._remaining_restarts = 3
    handler = SimpleNamespace(proc=SimpleNamespace(poll=lambda: BAD_CONFIG))
    agent._pcontext = SimpleNamespace(subprocess_handlers={0: handler})
    agent._monitor_workers(SimpleNamespace(workers=[SimpleNamespace(global_rank=1)]))
    assert agent._remaining_restarts == 0 and seen == [1]
    undo()
    agent._monitor_workers(None)
    assert seen == [1, 1]


@pytest.mark.parametrize(("code", "again"), [(7, True), (DIVERGED, False)])
def test_a_failure_that_torchrun_sees_first_is_told(supervisor: Supervisor, tmp_path: Path, code: int, again: bool) -> None:
    """Rank 1 fails after the supervisor's look and before torchrun's, which ends rank 0 at once."""
    attempt(0, tmp_path, {})
    Heartbeat(AttemptFolder.of(Path(os.environ[WATCH_FOLDER]), 0).beat(0)).begin_step(3)  # not the attempt's first step
    codes: list[int | None] = [None, None]

    def monitor(agent: object, group: object) -> object:
        codes[:] = [-signal.SIGTERM, code]
        return SimpleNamespace(failures={1: SimpleNamespace(exitcode=code)})

    agent_class: Any = type("Agent", (), {"_monitor_workers": monitor})
    supervisor.watch(agent_class)
    agent = agent_class()
    agent._remaining_restarts = 3
    handlers = {rank: SimpleNamespace(proc=SimpleNamespace(poll=lambda rank=rank: codes[rank])) for rank in range(2)}
    agent._pcontext = SimpleNamespace(subprocess_handlers=handlers)
    assert agent._monitor_workers(SimpleNamespace(workers=[SimpleNamespace(global_rank=rank) for rank in range(2)])).failures
    (incident,) = read_incidents(tmp_path)
    assert (incident["kind"], incident["rank"]) == (("error", 1) if again else ("end", None))
    assert incident["details"]["code"] == code
    assert agent._remaining_restarts == (3 if again else 0)


def test_a_config_error_before_any_rank_is_watched_is_not_tried_again(supervisor: Supervisor) -> None:
    supervisor.tell({1: BAD_CONFIG}, number=0)
    assert supervisor.judgement is not None and not supervisor.judgement.again and supervisor.judgement.code == BAD_CONFIG


def test_the_first_error_is_named_not_the_lowest_rank(
    supervisor: Supervisor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attempt(0, tmp_path, {1: ValueError("the cause")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RANK", "0")
        assert write_failure(ValueError("what follows"))
    supervisor.tell({0: 1, 1: 1})
    assert capsys.readouterr().err.startswith("rank 1 (")


@pytest.mark.parametrize(("reason", "codes"), [(ValueError("own"), {0: -signal.SIGABRT, 1: 1}), (None, {0: 1, 1: BAD_CONFIG})])
def test_ranks_that_follow_another_are_not_named(
    supervisor: Supervisor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    reason: BaseException | None,
    codes: dict[int, int],
) -> None:
    """NCCL aborts rank 0, or it tells of a failed peer; rank 1 fails of an error, or has told its config error itself."""
    attempt(0, tmp_path, {1: reason} if reason is not None else {0: PeerFailed(config_error=True)})
    supervisor.tell(codes)
    assert capsys.readouterr().err.startswith("rank 1 (")


def test_private_names_of_torchrun_are_there() -> None:
    assert inspect.signature(LocalElasticAgent._monitor_workers).parameters.keys() == {"self", "worker_group"}
    for name in ("_remaining_restarts", "_monitor_workers"):
        assert name in inspect.getsource(SimpleElasticAgent._invoke_run)
    assert "_pcontext" in inspect.getsource(LocalElasticAgent)
    assert "failures" in {each.name for each in fields(RunResult)}
    assert "exitcode" in {each.name for each in fields(ProcessFailure)}
    assert "subprocess_handlers" in inspect.getsource(SubprocessContext)
    assert "_pc.processes" in inspect.getsource(MultiprocessContext)
    assert exit_codes(None) == {} and exit_codes(SimpleNamespace(_pc=None)) == {}


def test_the_environment_and_the_folder_are_given_back() -> None:
    before = dict(os.environ)
    supervisor = Supervisor(0, several=True)
    root = Path(os.environ[WATCH_FOLDER])
    assert root.is_dir() and int(os.environ["MESHLOOM_WATCH_PORT"]) > 0
    supervisor.close()
    assert dict(os.environ) == before and not root.exists()
