"""Drawing of a step's documents on its ranks, as SVG: who computes what, and who waits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from ..parallel.hybrid.assignment import HybridAssignment, RowTime
from ..parallel.hybrid.cost import CostModel
from .drawing import drawn_text

LEFT, TOP, WIDTH, HEIGHT, BETWEEN = 72, 76, 1200, 420, 64
CLASSES = ((1 << 10, "#dbeafe"), (1 << 12, "#93c5fd"), (1 << 14, "#3b82f6"), (1 << 16, "#7c3aed"), (1 << 18, "#c026d3"))
LONGEST = "#be123c"
GREY, INK = "#64748b", "#334155"


@dataclass(frozen=True)
class Panel:
    """One way to deal a step's documents."""

    name: str
    plan: HybridAssignment


def step_svg(panels: Sequence[Panel], lengths: Sequence[int], costs: CostModel, title: str) -> str:
    """Draw each panel's ranks × time, at one scale: documents coloured by length, waiting hatched."""
    timelines = [panel.plan.timeline(lengths, costs) for panel in panels]
    ends = [max(spans[-1].ends for spans in timeline) for timeline in timelines]
    scale = WIDTH / max(ends)
    total = TOP + len(panels) * (HEIGHT + BETWEEN) + 24
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {LEFT + WIDTH + 24} {total}' "
        f"width='{LEFT + WIDTH + 24}' height='{total}'>",
        f"<title>{escape(title)}</title>",
        "<defs><pattern id='wait' width='7' height='7' patternUnits='userSpaceOnUse' patternTransform='rotate(45)'>"
        "<rect width='7' height='7' fill='#f1f5f9'/><rect width='2' height='7' fill='#cbd5e1'/></pattern></defs>",
        "<rect width='100%' height='100%' fill='white'/>",
        drawn_text(LEFT, 30, escape(title), size=19, weight=600),
    ]
    for number, (panel, timeline, end) in enumerate(zip(panels, timelines, ends, strict=True)):
        top = TOP + number * (HEIGHT + BETWEEN)
        share = panel.plan.waiting(lengths, costs)
        told = f"{panel.name}: {end / min(ends):.2f} times the fastest; ranks wait {share:.1%} of the time"
        parts.append(drawn_text(LEFT, top - 10, escape(told), size=13, fill=INK))
        parts += _panel(panel.plan, timeline, lengths, costs, top, scale, end)
    parts += _legend(TOP + len(panels) * (HEIGHT + BETWEEN) - 30)
    return "\n".join([*parts, "</svg>\n"])


def _panel(
    plan: HybridAssignment,
    timeline: Sequence[Sequence[RowTime]],
    lengths: Sequence[int],
    costs: CostModel,
    top: float,
    scale: float,
    end: float,
) -> Iterator[str]:
    tall = HEIGHT / len(timeline)
    yield f"<rect x='{LEFT}' y='{top}' width='{end * scale:.2f}' height='{HEIGHT}' fill='url(#wait)'/>"
    for rank, spans in enumerate(timeline):
        y = top + rank * tall
        if len(timeline) <= 32 or rank % (len(timeline) // 16) == 0:
            yield drawn_text(LEFT - 10, y + min(tall, 26) / 2 + 4, f"rank {rank}", anchor="end", size=11, fill=INK)
        for span in spans:
            x = LEFT + (span.starts + costs.row) * scale
            for fill, time in _colours(plan, span, lengths, costs):
                gap = 1 if tall > 4 else 0
                size = f"width='{max(time * scale, 0.2):.2f}' height='{tall - gap:.2f}'"
                yield f"<rect x='{x:.2f}' y='{y:.2f}' {size} fill='{fill}'/>"
                x += time * scale


def _colours(plan: HybridAssignment, span: RowTime, lengths: Sequence[int], costs: CostModel) -> list[tuple[str, float]]:
    """List the colours of a row's documents, the longest first, with the time of all of each colour."""
    found: dict[str, float] = {}
    shared = [(plan.shared[number].document, plan.shared[number].ranks) for number in span.row.shared]
    for document, ranks in sorted([*shared, *((n, 1) for n in span.row.whole)], key=lambda each: -lengths[each[0]]):
        fill = colour_of(lengths[document])
        found[fill] = found.get(fill, 0.0) + costs.document(lengths[document]) / ranks
    return list(found.items())


def colour_of(length: int) -> str:
    """Return the colour of a document of this length."""
    return next((colour for limit, colour in CLASSES if length <= limit), LONGEST)


def _legend(y: float) -> Iterator[str]:
    names = [(colour, f"up to {limit // 1024}K") for limit, colour in CLASSES] + [(LONGEST, "longer")]
    x = LEFT
    for fill, name in [*names, ("url(#wait)", "waiting, and the start of rows")]:
        yield f"<rect x='{x}' y='{y}' width='14' height='14' rx='2.5' fill='{fill}' stroke='#cbd5e1' stroke-width='0.5'/>"
        yield drawn_text(x + 20, y + 11.5, name, size=12, fill=GREY)
        x += 100
