"""`meshloom report`: one page about a run, or about several beside one another, with its pictures.

meshloom report outputs/quickstart
meshloom report outputs/quickstart/sweep --output sweep_report
meshloom report outputs/quickstart --serve
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ...config.problems import ConfigError
from ...config.words import counted
from ..exit_codes import BAD_CONFIG

PAGE = "report.html"


def main(argv: Sequence[str]) -> int:
    """Write the report, or serve it. Return 0, 2 for folders without a run, 1 for a disk's error or a missing library."""
    parser = argparse.ArgumentParser(
        "meshloom report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of runs such as a sweep's")
    parser.add_argument("--output", type=Path, help="folder to write to (default: report/ in the first folder given)")
    parser.add_argument("--serve", action="store_true", help="write nothing: show the page at an address of this machine, live")
    parser.add_argument("--port", type=int, default=8765, help="with --serve; 0: any free one (default: %(default)s)")
    arguments = parser.parse_intermixed_args(list(argv))
    if arguments.serve and arguments.output is not None:
        parser.error("--serve writes nothing: leave out --output")
    if missing := [name for name in ("jinja2", "matplotlib") if find_spec(name) is None]:
        print(f"meshloom report: needs {' and '.join(missing)}: pip install 'meshloom[plots]'", file=sys.stderr)
        return 1
    from .collect import find_runs
    from .page import make_page, render

    try:
        runs = find_runs(arguments.runs)
        if arguments.serve:
            return _serve(arguments.runs, arguments.port)
        page = make_page(runs)
        html = render(page)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return BAD_CONFIG
    except OSError as error:  # a folder of somebody else's, or one that was moved aside
        print(f"meshloom report: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    folder: Path = arguments.output or arguments.runs[0] / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PAGE).write_text(html, encoding="utf-8")
        for picture in page.pictures:
            (folder / f"{picture.name}.svg").write_bytes(picture.svg)
            if picture.png is not None:
                (folder / f"{picture.name}.png").write_bytes(picture.png)
    except OSError as error:
        print(f"meshloom report: {error.filename or folder}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{folder / PAGE}: {counted(len(runs), 'run')}, {len(html) / 1e6:.1f} MB; its pictures lie beside it")
    for note in page.notes:
        print(f"not shown: {note}")
    if page.command is not None:
        print(f"{page.command_title}, {page.command_note}\n\n  {page.command}")
    return 0


def _serve(paths: Sequence[Path], port: int) -> int:
    from .collect import find_folders, find_runs
    from .page import make_page, render
    from .serve import REFRESH_SECONDS, LivePage, serve

    def files() -> list[Path]:
        names = ("metrics.jsonl", "incidents.jsonl", "config.yaml", "experts/load.svg", "experts/sources.svg")
        return [folder / name for folder in find_folders(paths) for name in names]

    live = LivePage(lambda: render(make_page(find_runs(paths), png=False), refresh=REFRESH_SECONDS), files)
    try:
        serve(live, port)
    except OSError as error:
        print(f"meshloom report: --port {port}: {error.strerror}; give another, or 0 for any free one", file=sys.stderr)
        return 1
    return 0
