"""The picture in README.md and on the site's first page: curves of the RAO run of ``make demo``.

    python -m docs_pages.demo_curves runs/demo/rao     # writes docs/images/demo_rao.svg

The panels and their style are those of ``nemo-rao report``. The background is white, as pages may have a dark theme.
"""

from __future__ import annotations

import sys
from pathlib import Path

from nemo_rao.runtime.metrics_file import read_metrics
from nemo_rao.study.figures import Panel, curves
from nemo_rao.study.run_report import panels

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "demo_rao.svg"
TITLES = ("held-out explicit and fitted reward", "target error", "accuracy")


def picture(run: Path) -> str:
    """SVG text."""
    chosen: dict[str, Panel] = {panel.title: panel for panel in panels(read_metrics(run / "metrics.jsonl"))}
    drawn = curves([chosen[title] for title in TITLES], "demo_rao", shares_legend=False)
    head, _, rest = drawn.partition(">")
    return f'{head}>\n <rect width="100%" height="100%" fill="#fff"/>{rest}'


if __name__ == "__main__":
    PICTURE.write_text(picture(Path(sys.argv[1])))
