"""Drawings of a plan, as SVG."""

from __future__ import annotations

import colorsys
from xml.sax.saxutils import escape

from .timeline import ActionTime, Timeline

LEFT, TOP, ROW, GAP, WIDTH = 72, 84, 34, 8, 1200
HUES = {"F": 0.58, "B": 0.33, "I": 0.44, "W": 0.09}
NAMES = {"F": "forward", "B": "backward", "I": "backward, to the input", "W": "backward, to the weights"}
FONT = "font-family='Inter, Helvetica, Arial, sans-serif'"


def pipeline_svg(timeline: Timeline, title: str) -> str:
    """Draw a Gantt chart: a row per pipeline rank, a box per action with its micro-batch; idle time is grey."""
    ranks = len(timeline.spans)
    scale = WIDTH / timeline.length
    chunks = sorted({span.action.stage // ranks for row in timeline.spans for span in row})
    height = TOP + ranks * (ROW + GAP) + 66
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {LEFT + WIDTH + 24} {height}' "
        f"width='{LEFT + WIDTH + 24}' height='{height}'>",
        f"<title>{escape(title)}</title>",
        "<rect width='100%' height='100%' fill='white'/>",
        drawn_text(LEFT, 32, escape(title), size=19, weight=600),
        drawn_text(
            LEFT, 56, f"bubble {timeline.bubble:.1%} of the ranks' time; times in proportion to FLOPs", size=13, fill="#64748b"
        ),
    ]
    for rank, row in enumerate(timeline.spans):
        y = TOP + rank * (ROW + GAP)
        parts.append(drawn_text(LEFT - 12, y + ROW / 2 + 4.5, f"rank {rank}", anchor="end", size=13, fill="#334155"))
        parts.append(f"<rect x='{LEFT}' y='{y}' width='{WIDTH}' height='{ROW}' rx='3' fill='#eef1f5'/>")
        parts += [_box(span, y, scale, chunks.index(span.action.stage // ranks), len(chunks)) for span in row]
    parts += _legend(timeline, TOP + ranks * (ROW + GAP) + 30, len(chunks))
    return "\n".join([*parts, "</svg>\n"])


def drawn_text(
    x: float, y: float, words: str, *, size: int, fill: str = "#0f172a", weight: int = 400, anchor: str = "start"
) -> str:
    """Write a line of text; the words are XML."""
    style = f"font-size='{size}' font-weight='{weight}' fill='{fill}' text-anchor='{anchor}'"
    return f"<text x='{x:.2f}' y='{y:.2f}' {FONT} {style}>{words}</text>"


def _colour(kind: str, chunk: int, chunks: int) -> str:
    """A hue for the kind; later stages of a rank are darker."""
    light = 0.74 - (0.30 * chunk / (chunks - 1) if chunks > 1 else 0.14)
    red, green, blue = (round(255 * part) for part in colorsys.hls_to_rgb(HUES[kind], light, 0.62))
    return f"#{red:02x}{green:02x}{blue:02x}"


def _box(span: ActionTime, y: float, scale: float, chunk: int, chunks: int) -> str:
    action = span.action
    x, width = LEFT + span.start * scale, (span.end - span.start) * scale
    hint = f"{NAMES[action.kind]} of micro-batch {action.micro}, stage {action.stage}"
    words = f"<title>{hint}</title>"
    fill = _colour(action.kind, chunk, chunks)
    drawn = f"<rect x='{x:.2f}' y='{y}' width='{max(width - 1, 0.5):.2f}' height='{ROW}' rx='2.5' fill='{fill}'>{words}</rect>"
    label = str(action.micro)
    if width < 7 * len(label) + 4:
        return drawn
    ink = "#0f172a" if chunks == 1 or chunk < chunks / 2 else "white"
    return drawn + drawn_text(x + width / 2, y + ROW / 2 + 4, label, size=11, fill=ink, anchor="middle")


def _legend(timeline: Timeline, y: float, chunks: int) -> list[str]:
    kinds = [kind for kind in HUES if any(span.action.kind == kind for row in timeline.spans for span in row)]
    parts: list[str] = []
    x = float(LEFT)
    for kind in kinds:
        for chunk in range(chunks):
            parts.append(f"<rect x='{x}' y='{y}' width='14' height='14' rx='2.5' fill='{_colour(kind, chunk, chunks)}'/>")
            x += 17
        parts.append(drawn_text(x + 4, y + 11.5, NAMES[kind], size=12, fill="#334155"))
        x += 30 + 6.6 * len(NAMES[kind])
    if chunks > 1:
        parts.append(drawn_text(x, y + 11.5, "darker: a rank's later stages", size=12, fill="#64748b"))
    return parts
