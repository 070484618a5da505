"""Ask Prometheus what each panel of the dashboards asks, and write the answers down for `render.jsx` to draw.

python monitoring/rendering/capture.py http://127.0.0.1:9090 FOLDER --seconds 60
"""

import argparse
import json
import time
from pathlib import Path

from monitoring.dashboards.ask import Question, Window, ask, panels

BOARDS = Path(__file__).parents[1] / "grafana" / "dashboards"


def main() -> None:
    """Write one file a dashboard: the dashboard, the time shown, and the answers by panel and query."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", help="of Prometheus")
    parser.add_argument("folder", type=Path, help="where the files are written")
    parser.add_argument("--seconds", type=float, default=60, help="of the time shown, up to --end")
    parser.add_argument("--end", type=float, default=0, help="seconds since the epoch; now, unless set")
    parser.add_argument("--step", type=float, default=1, help="seconds between two points, and between two scrapes")
    given = parser.parse_args()
    end = given.end or time.time()
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
        found = {"board": board, "start": window.start, "end": end, "step": given.step, "answers": answers}
        (given.folder / file.name).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
