"""The tables of README.md, from its results: `python -m benchmarks.learned_step.report`."""

import json
import pathlib
from typing import Any

from benchmarks import pages

RESULTS = pathlib.Path(__file__).with_name("results.json")
NAMES = {
    "adam": "Adam, milliseconds",
    "velo": "VeLO",
    "celo": "Celo",
    "celo_adam": "Celo's Adam form",
    "celo2": "Celo2 without orthogonalisation",
    "celo2_orthogonal": "Celo2",
    "both_arms": "two Adams, half of each",
    "hub_vanilla": "HUB, vanilla, by tensor",
    "hub_invert": "HUB, inverted, by tensor",
    "hub_vanilla_guarded": "HUB vanilla, guarded",
    "hub_trust": "HUB, trust region",
    "hub_spike": "HUB, gate in time",
    "hub_online": "HUB, online mix",
}


def table(rows: list[dict[str, Any]], key: str) -> str:
    """A quantity of every arm that has it, by set of parameters."""
    header = [f"{row['parameters']:,} in {row['leaves']}" for row in rows]
    lines = ["| arm | " + " | ".join(header) + " |", "|---" + "|---:" * len(rows) + "|"]
    for arm, name in NAMES.items():
        if key not in rows[0]["arms"][arm]:
            continue
        cells = [row["arms"][arm][key] for row in rows]
        if arm == "adam":
            cells = [row["arms"][arm]["milliseconds"] for row in rows]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.3g}" for cell in cells) + " |")
    return "\n".join(lines)


def write(path: pathlib.Path) -> None:
    """Puts the tables into the page."""
    rows = json.loads(path.read_text())["rows"]
    parts = {"times Adam": "times_adam", "overhead": "hub_overhead"}
    pages.fill_readme(path, {name: table(rows, key) for name, key in parts.items()})


if __name__ == "__main__":
    pages.report(__doc__, RESULTS, write)
