"""Measures what generated weights are worth in a domain that no training task saw.

Runs `lohp run` for each held-out angle of the rotated digits, and each seed, beside classifiers that are
trained on the images of all other angles:

    python -m benchmarks.domains.run [--angles NAME ...] [--seeds 1] [--jobs 1]

A finished run is not repeated. Writes results.json and the tables of README.md.
"""

import argparse
import concurrent.futures
import itertools
import json
import pathlib
import sys

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from benchmarks.domains import report
from benchmarks.domains.report import RESULTS
from benchmarks.lohp.run import run
from lohp_jax.data.domains import ANGLES, DomainSet, domain_set
from lohp_jax.files import write_atomically

DOMAINS = tuple(map(str, ANGLES))
ARGUMENTS = [
    *("--family", "domains", "--tasks.network", "linear", "--methods", "lohp", "lohp_feedback"),
    *("--prepare.optimizers", "adam:0.03", "--prepare.num-steps", "20"),
    *("--prepare.num-tasks", "300", "--training.compression", "4", "--training.updates", "2000"),
    *("--balance.on-policy", "0", "--evaluation.num-tasks", "64"),
]


def main() -> None:
    """Runs what is missing and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--angles", nargs="+", choices=DOMAINS, default=list(DOMAINS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/domains"))
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args()
    pool = concurrent.futures.ThreadPoolExecutor(options.jobs)
    running = {
        (angle, seed): pool.submit(
            run, [*ARGUMENTS, "--tasks.domain", angle], seed, options.out / f"{angle}-{seed}"
        )
        for seed, angle in itertools.product(range(options.seeds), options.angles)
    }
    for (angle, _), result in running.items():
        keep(options.results, angle, result.result())
    report.write(options.results)


def pooled_rows(domains: DomainSet) -> list[dict]:
    """Scores of classifiers of scikit-learn, with its defaults, that see no image of the new angle."""
    train, query = (pool.reshape(*pool.shape[:3], -1) for pool in (domains.train, domains.query))
    rows = []
    for held_out, name in enumerate(domains.domains):
        x = np.delete(train, held_out, axis=0)
        y = np.broadcast_to(np.arange(x.shape[1])[None, :, None], x.shape[:3])
        of_query = np.repeat(np.arange(query.shape[1]), query.shape[2])
        for method, model in (
            ("pooled_logistic_regression", LogisticRegression(max_iter=1000)),
            ("pooled_nearest_image", KNeighborsClassifier(1)),
        ):
            model.fit(x.reshape(-1, x.shape[-1]), y.ravel())
            score = model.score(query[held_out].reshape(len(of_query), -1), of_query)
            rows.append({"method": method, "held_out": name, "accuracy": float(score)})
    return rows


def keep(path: pathlib.Path, angle: str, result: dict) -> None:
    """Writes the rows of one run in place of those of the same angle and seed."""
    there = json.loads(path.read_text()) if path.exists() else {}
    seed = result["config"]["seed"]
    others = [r for r in there.get("rows", []) if (r["held_out"], r["seed"]) != (angle, seed)]
    content = {
        "command": " ".join(
            ["lohp", "run", "--seed", "SEED", *ARGUMENTS, "--tasks.domain", "ANGLE"]
        ),
        "environment": result["environment"],
        "num_weights": result["num_weights"],
        "pooled": pooled_rows(domain_set("digits")),
        "rows": others + [row | {"held_out": angle} for row in result["rows"]],
    }
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
