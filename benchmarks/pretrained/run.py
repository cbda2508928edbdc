"""Compares the learned optimizer that ships with Adam at the best of five learning rates.

On held-out tasks of the families that it was meta-trained on and of others, at the horizons that it was
meta-trained for and beyond:

    python -m benchmarks.pretrained.run --run runs/small [--families NAME ...] [--horizons T ...]

Rows of families and horizons that are not run again stay, as long as they are of the same theta.

`--run` is the directory of the `lohp meta-train` that made it; its config and curve go into the results.
Adam's learning rate is chosen for each family, horizon and score apart, on the very tasks that are
reported; the learned optimizer has one setting for all. Writes results.json and
the table of README.md.
"""

import argparse
import concurrent.futures
import hashlib
import json
import multiprocessing
import pathlib
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.pretrained.report import write
from lohp_jax.evaluation.learning import ADAM_RATES, SCORES, adam, adam_settings, make_trainer
from lohp_jax.optimizers.pretrained import PRETRAINED, pretrained
from lohp_jax.optimizers.small import pack_rate, small_optimizer, small_start
from lohp_jax.optimizers.theta import load_theta
from lohp_jax.runs.directory import environment
from lohp_jax.types import Params
from lohp_jax.workloads.meta_tasks import META_FAMILIES, meta_family

RESULTS = pathlib.Path(__file__).with_name("results.json")
NUM_SEEDS = 5
HORIZONS = {500: 4, 2000: 2, 4000: 1, 10000: 1, 20000: 1}
"""Tasks for each seed, by number of steps; the longest unroll of meta-training has 2000."""
START_HORIZONS = (500, 2000)
"""Where the direction that meta-training started from is run, too."""


def digest(theta: Params) -> str:
    """Of the numbers of a theta."""
    leaves = [np.asarray(leaf, "<f4").tobytes() for leaf in jax.tree.leaves(theta)]
    return hashlib.sha256(b"".join(leaves)).hexdigest()


def settings_of(method: str) -> dict:
    """All settings of a method, with a leading axis."""
    if method.startswith("adam"):
        return adam_settings(cosine=method == "adam_cosine")
    if method == "start":
        metas = [small_start(jax.random.key(0), learning_rate=rate) for rate in ADAM_RATES]
    else:
        metas = [{"theta": pretrained("small")} | pack_rate(PRETRAINED["small"])]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *metas)


def compare(name: str, horizons: list[int], tasks_per_seed: int | None) -> list[dict]:
    """Rows of one family: every method and horizon."""
    family, rows = meta_family(name), []
    adams = make_trainer(family, adam, split="held_out")
    learned = make_trainer(family, small_optimizer, split="held_out")
    for horizon in horizons:
        tasks = tasks_per_seed or HORIZONS[horizon]
        keys = jax.vmap(lambda seed, n=tasks: jax.random.split(jax.random.key(1000 + seed), n))(
            jnp.arange(NUM_SEEDS)
        ).reshape(-1)
        for method in ("adam", "adam_cosine", "start", "small"):
            if method == "start" and horizon not in START_HORIZONS:
                continue
            trainer = adams if method.startswith("adam") else learned
            scores = trainer(settings_of(method), keys, horizon)
            row = {"family": name, "num_steps": horizon, "method": method, "tasks_per_seed": tasks}
            rows.append(row | {"scores": {k: summarise(k, v) for k, v in scores.items()}})
            print(format_row(rows[-1]), flush=True)
    return rows


def summarise(score: str, values: np.ndarray) -> dict:
    """Of `[S, seeds * tasks]`: mean of every setting, and mean and values by seed of the best one."""
    by_seed = values.reshape(len(values), NUM_SEEDS, -1).mean(axis=2)
    means = by_seed.mean(axis=1)
    best = int(np.flatnonzero(means == SCORES[score](means))[0])
    return {
        "mean": float(means[best]),
        "std_over_seeds": float(by_seed[best].std(ddof=1)),
        "by_seed": by_seed[best].tolist(),
        "setting": best,
        "mean_of_each_setting": means.tolist(),
    }


def format_row(row: dict) -> str:
    """One line."""
    head = f"{row['family']:13s}{row['num_steps']:6d} {row['method']:12s}"
    return head + "".join(
        f"  {name} {score['mean']:.3g} ± {score['std_over_seeds']:.2g}"
        for name, score in row["scores"].items()
    )


def against_adam(rows: list[dict]) -> list[dict]:
    """For each family, horizon and score: the learned optimizer beside the better of both Adams."""
    found = {(r["family"], r["num_steps"], r["method"]): r["scores"] for r in rows}
    table = []
    for (family, horizon, method), scores in found.items():
        if method != "small":
            continue
        for score, choose in SCORES.items():
            ours = scores[score]["mean"]
            rivals = {m: found[family, horizon, m][score] for m in ("adam", "adam_cosine")}
            best = choose([r["mean"] for r in rivals.values()])
            name, rival = next((m, r) for m, r in rivals.items() if r["mean"] == best)
            differences = np.subtract(scores[score]["by_seed"], rival["by_seed"])
            sign = 1 if choose is np.max else -1
            table.append(
                {
                    "family": family,
                    "num_steps": horizon,
                    "score": score,
                    "small": ours,
                    "adam_best": float(best),
                    "adam_best_is": f"{name}:{ADAM_RATES[rival['setting']]}",
                    "seeds_won": int((sign * differences > 0).sum()),
                    "difference_mean": float(differences.mean()),
                    "difference_std_over_seeds": float(differences.std(ddof=1)),
                }
            )
    return table


def untuned(rows: list[dict], families: tuple[str, ...]) -> list[dict]:
    """Every setting of every method used for all of `families` and `START_HORIZONS` alike.

    Losses are geometric means, each at least 1e-6; accuracies are means.
    """
    groups: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in rows:
        if row["num_steps"] in START_HORIZONS and row["family"] in families:
            for score, found in row["scores"].items():
                for setting, mean in enumerate(found["mean_of_each_setting"]):
                    group = groups.setdefault((row["method"], setting), {})
                    group.setdefault(score, []).append(mean)
    return [
        {
            "method": method if method == "small" else f"{method}:{ADAM_RATES[setting]}",
            "num_cells": len(group["accuracy"]),
            **{
                score: float(np.mean(values))
                if score == "accuracy"
                else float(np.exp(np.mean(np.log(np.maximum(values, 1e-6)))))
                for score, values in group.items()
            },
        }
        for (method, setting), group in groups.items()
    ]


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=pathlib.Path, required=True)
    parser.add_argument("--families", nargs="+", choices=META_FAMILIES, default=list(META_FAMILIES))
    parser.add_argument("--horizons", nargs="+", type=int, choices=HORIZONS, default=list(HORIZONS))
    parser.add_argument(
        "--tasks", type=int, help="for each seed; unset for fewer where runs are long"
    )
    parser.add_argument("--jobs", type=int, default=1, help="families at a time")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    arguments = parser.parse_args()
    made = json.loads((arguments.run / "results.json").read_text())
    if digest(load_theta(arguments.run / "theta.msgpack")) != digest(pretrained("small")):
        parser.error(
            f"--run: {arguments.run} has other weights than those that ship; put its theta.msgpack and "
            "rate into lohp_jax/optimizers first."
        )
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        running = [
            pool.submit(compare, name, arguments.horizons, arguments.tasks)
            for name in arguments.families
        ]
        rows = [row for future in running for row in future.result()]
    kept, commands = [], []
    if arguments.out.exists():
        before = json.loads(arguments.out.read_text())
        if before["meta_training"] == made:
            again = {(row["family"], row["num_steps"]) for row in rows}
            kept = [r for r in before["rows"] if (r["family"], r["num_steps"]) not in again]
            commands = before["commands"]
    rows = sorted(kept + rows, key=lambda row: (row["family"], row["num_steps"]))
    report = {
        "schema": 1,
        "commands": [*commands, shlex.join(["python", *sys.argv])],
        "environment": environment(),
        "adam_rates": ADAM_RATES,
        "num_seeds": NUM_SEEDS,
        "meta_training": made,
        "theta_sha256": digest(pretrained("small")),
        "against_adam": against_adam(rows),
        "untuned_in_family": untuned(rows, tuple(made["config"]["families"])),
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    write(arguments.out)
    for line in report["against_adam"]:
        print(
            f"{line['family']:13s}{line['num_steps']:6d} {line['score']:11s} "
            f"small {line['small']:.4g}  {line['adam_best_is']} {line['adam_best']:.4g}  "
            f"won {line['seeds_won']} of {NUM_SEEDS}"
        )
    for line in report["untuned_in_family"]:
        scores = "".join(f"  {score} {line[score]:.3g}" for score in SCORES)
        print(f"one setting for all, in family: {line['method']:18s}{scores}")


if __name__ == "__main__":
    main()
