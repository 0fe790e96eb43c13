"""The place of a run among its stages: the beginnings and lengths of stages, and the changes that a resumed run may make."""

from __future__ import annotations

import pytest

from meshloom.optim.history import BatchHistory, ChangePoint
from meshloom.optim.progress import BEGINNING, Progress
from meshloom.trainer.stages.record import Place, StageRecord, stage_at
from meshloom.trainer.stages.written import Stage, read_stages

START = ChangePoint(0, 0, 0, 0)
LONG = ChangePoint(5, 50, 1040, 10)


def stages(**lengths: int) -> tuple[Stage, ...]:
    """Of these lengths; `long` changes data, `anneal` the schedule."""
    changes = {"long": {"data.seq_len": 8}, "anneal": {"schedule": "linear"}}
    return tuple(read_stages({name: {"tokens": tokens, **changes.get(name, {})} for name, tokens in lengths.items()})[0])


THREE = stages(base=1000, long=500, anneal=300)


@pytest.mark.parametrize(("tokens", "number"), [(0, 0), (999, 0), (1000, 1), (1499, 1), (1500, 2), (1800, 2), (9999, 2)])
def test_tokens_tell_the_stage(tokens: int, number: int) -> None:
    assert stage_at(THREE, tokens) == number


def test_a_group_lasts_from_its_stage_to_the_next_that_names_it() -> None:
    record = StageRecord((("base", START), ("long", LONG)))
    place = Place(THREE, 1, record)
    assert place.origin("data") == LONG and place.length("data").value == 1800 - 1040
    assert place.origin("schedule") == START and place.length("schedule").value == 1500
    assert place.begins("data") and not place.begins("schedule")
    assert Place(THREE, 2).length("schedule").value == 300, "before it has begun, by the tokens that are written"


def test_a_stage_begins_where_the_run_enters_it() -> None:
    progress = Progress(*LONG, BatchHistory((ChangePoint(0, 0, 0, 10),)))
    read = StageRecord((("base", START),), {"a": [50]}, {})
    assert read.at(THREE, 1, progress, 4) == StageRecord((("base", START), ("long", LONG)), {"a": [50]}, {"a": [50]})
    assert read.at(THREE, 0, progress, 4) == read, "in the stage that it was in"
    assert StageRecord().at(THREE, 0, BEGINNING, 4).begun == (("base", START),)


def test_stages_of_a_run_that_began_without_any() -> None:
    """64 steps of 10 samples of 2.5 tokens: the second stage began behind step 40 and sample 400."""
    progress = Progress(64, 640, 1600, 10, BatchHistory((ChangePoint(0, 0, 0, 10),)))
    record = StageRecord.from_state({"progress": progress.state_dict(), "data_fingerprint": "f"})
    assert record.read == {"f": [640]}
    begun = record.at(stages(base=1000, more=500, anneal=300), 2, progress, 4).begun
    assert begun == (("base", START), ("more", ChangePoint(40, 400, 1000, 10)), ("anneal", progress.point))


def test_a_skipped_stage_begins_its_data_where_the_run_is() -> None:
    """Nothing of its data has been read: an origin in the past would leave samples of it out."""
    progress = Progress(64, 640, 1600, 10, BatchHistory((ChangePoint(0, 0, 0, 10),)))
    for record in (StageRecord(read={"f": [640]}), StageRecord((("base", START),), {"f": [640]})):
        entered = record.at(THREE, 2, progress, 4)
        assert entered.begun == (("base", START), ("long", progress.point), ("anneal", progress.point))
        assert entered.read_before == {"f": [640]} and Place(THREE, 2, entered).origin("data") == progress.point


def test_a_mixture_that_states_no_reading_gets_no_other_data() -> None:
    state = {"progress": BEGINNING.state_dict(), "data_fingerprint": "f"}
    old = StageRecord.from_state({**state, "config": {"data": {"_target_": "meshloom.data.mixture.Mixture"}}})
    (problem,) = old.problems(THREE, 1000, [])
    assert problem.key == "stages" and "long" in problem.message and "base" in problem.fix
    assert list(old.problems(THREE, 999, [])) == [], "it saves what it reads, and then enters the stage"
    assert list(StageRecord.from_state(state).problems(THREE, 1000, [])) == []


def test_the_record_survives_the_checkpoint() -> None:
    record = StageRecord((("base", START), ("long", LONG)), {"a": [3, 1]}, {"a": [1]})
    assert StageRecord.from_state({"stages": record.as_json()}) == record


def test_stages_that_are_begun_keep_names_order_and_ends() -> None:
    record = StageRecord((("base", START), ("long", LONG)))
    saved = stages(base=1000, long=500)
    assert list(record.problems(stages(base=1000, long=900, more=5), 1040, saved)) == []
    (other,) = record.problems(stages(first=1000, long=500), 1040, saved)
    assert other.key == "stages" and "base, long" in other.message
    for end in (1041, 1001, 300):
        (other,) = record.problems(stages(base=end, long=500), 1040, saved)
        assert other.key == "stages.base.tokens" and "has ended" in other.message


def test_stages_of_a_run_can_not_be_dropped() -> None:
    assert [problem.key for problem in StageRecord((("base", START),)).absent()] == ["stages"]
    assert list(StageRecord().absent()) == []
