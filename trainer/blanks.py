"""Say how much of a step is blank, for the start of a run and for `meshloom plan`."""

from __future__ import annotations

from ..config.words import counted
from ..data.assignment import Assigner
from ..optim.batch.controller import Controller
from ..optim.progress import Progress


def blank_notice(assigner: Assigner, controller: Controller, progress: Progress) -> str | None:
    """The part of the next step that is blank, and the nearest batch sizes without blanks; None where nothing is blank."""
    count = controller.next_batch(progress)
    micro = controller.micro_at(count)
    share = assigner.blank_share(count, micro)
    if not share:
        return None
    sizes = " or ".join(map(str, assigner.sizes_without_blanks(count, micro)))
    rows = min(micro, count)
    cut = f"{counted(count, 'sample')} make {counted(-(-count // rows), 'micro-batch')} of {rows}"
    verb = "runs" if assigner.data_size == 1 else "run"
    dealt = f"{counted(assigner.data_size, 'data-parallel rank')} {verb} {assigner.passes(count, micro)} each"
    return f"{share:.0%} of the rows of a step are blank ({cut}, and {dealt}); batches of {sizes} samples have no blanks"
