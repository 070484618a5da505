"""Ask Prometheus what each panel of the dashboards asks, and make a page of the answers, which `render.jsx` draws.

python monitoring/rendering/capture.py http://127.0.0.1:9090 --seconds 120
"""

import argparse
import json
import time
from pathlib import Path

from monitoring.dashboards.ask import Question, Window, ask, panels

HERE = Path(__file__).parent
BOARDS = HERE.parent / "grafana" / "dashboards"
WIDTH, CELL, MARGIN = 1552, 38, 16
"""Of a page, of a row of Grafana's grid, and around all of it, in pixels; those of `render.jsx`."""
PAGE = """<!doctype html>
<meta charset="utf-8">
<link rel="stylesheet" href="../render.css">
<body>
<script>window.captured = {captured};</script>
<script src="../render.js"></script>
"""


def main() -> None:
    """Write a page for each dashboard into out/, and print how to take its picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", help="of Prometheus")
    parser.add_argument("--seconds", type=float, default=120, help="of the time shown, up to now")
    parser.add_argument("--step", type=float, default=1, help="seconds between two points, and between two scrapes")
    given = parser.parse_args()
    out = HERE / "out"
    out.mkdir(exist_ok=True)
    end = time.time()
    window = Window(end - given.seconds, end, given.step, given.step)
    for file in sorted(BOARDS.glob("*.json")):
        board = json.loads(file.read_text(encoding="utf-8"))
        answers = {
            str(panel["id"]): [
                ask(given.address, Question(panel["title"], target["expr"], instant=target["instant"]), window)
                for target in panel["targets"]
            ]
            for panel in panels(board)
        }
        captured = {"board": board, "start": window.start, "end": end, "step": given.step, "answers": answers}
        page = out / f"{file.stem}.html"
        page.write_text(PAGE.format(captured=json.dumps(captured).replace("</", "<\\/")), encoding="utf-8")
        rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in board["panels"])
        print(  # noqa: T201 - for whoever runs it
            "chromium --headless=new --no-sandbox --disable-gpu --hide-scrollbars --allow-file-access-from-files "
            f"--virtual-time-budget=8000 --window-size={WIDTH},{rows * CELL + MARGIN} "
            f"--screenshot={page.with_suffix('.png')} file://{page}"
        )


if __name__ == "__main__":
    main()
