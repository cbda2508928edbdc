"""The table of README.md, from its results: `python -m benchmarks.trajectories.report`."""

import json
import pathlib
from typing import Any

from benchmarks import pages

RESULTS = pathlib.Path(__file__).with_name("results.json")
TIMED = {
    "rollout_map_1": "one by one",
    "rollout_vmap": "one `vmap`",
    "loop": "loop",
    "torch": "PyTorch",
}


def table(results: dict[str, Any]) -> str:
    """One core: microseconds of a step in the first round, ratios of "one by one" in each round."""
    rounds = {}
    for row in results["rows"]:
        if row["cores"] == 1:
            rounds.setdefault(row["setting"], []).append(row)
    header = ["setting", "MFLOP a step", *(f"{name}, µs" for name in TIMED.values())]
    header += ["times faster than the loop", "than PyTorch"]
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    for setting, rows in rounds.items():
        arms = rows[0]["arms"]
        cells = [setting, f"{rows[0]['megaflop_per_step']:.3g}"]
        cells += [f"{arms[arm]['microseconds_per_step']:.3g}" for arm in TIMED]
        for ratio in ("times_loop", "times_torch"):
            cells.append(", ".join(f"{r['arms']['rollout_map_1'][ratio]:.3g}" for r in rows))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(path: pathlib.Path) -> None:
    """Puts the table into the page."""
    pages.fill_readme(path, {"times": table(json.loads(path.read_text()))})


if __name__ == "__main__":
    pages.report(__doc__, RESULTS, write)
