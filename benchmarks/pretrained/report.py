"""The table of README.md, from its results: `python -m benchmarks.pretrained.report`."""

import json
import pathlib
from typing import Any

from benchmarks import pages

RESULTS = pathlib.Path(__file__).with_name("results.json")
FAMILIES = {
    "digits_mlp": "digits, MLP",
    "prototypes": "blurred prototypes, MLP",
    "teacher": "labels of a random network, MLP",
    "digits_conv": "digits, convolutions (never seen)",
    "teacher_deep": "a deep random network (never seen)",
}
SCORES = {
    "accuracy": "accuracy",
    "query_loss": "test loss",
    "mean_loss": "training loss along the run",
}


def table(results: dict[str, Any]) -> str:
    """Learned / the better of both Adams, and the seeds of five that the learned one won."""
    found = {(r["family"], r["num_steps"], r["score"]): r for r in results["against_adam"]}
    lines = [
        "| tasks | steps | " + " | ".join(SCORES.values()) + " |",
        "|---|---:" + "|---" * 3 + "|",
    ]
    for family, name in FAMILIES.items():
        for num_steps in sorted({steps for one, steps, _ in found if one == family}):
            rows = [found[family, num_steps, score] for score in SCORES]
            cells = [
                f"{short(row['small'])} / {short(row['adam_best'])} ({row['seeds_won']})"
                for row in rows
            ]
            lines.append(f"| {name} | {num_steps:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def short(value: float) -> str:
    """Three digits after the point, without the zero before it; two where that leaves nothing."""
    return f"{value:.3f}".removeprefix("0") if value >= 5e-4 else f"{value:.2g}"


def write(path: pathlib.Path) -> None:
    """Puts the table into the page."""
    pages.fill_readme(path, {"against Adam": table(json.loads(path.read_text()))})


if __name__ == "__main__":
    pages.report(__doc__, RESULTS, write)
