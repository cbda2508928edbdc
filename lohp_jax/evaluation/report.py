"""A run's results as one HTML page, which needs no other file and no network.

Numbers come from the files of the run directory and nowhere else: what a file lacks, the page says
it lacks. Pictures are SVG inside the page.
"""

import base64
import html
import json
import os
import pathlib
import string
from typing import Any

from lohp_jax.evaluation.break_even import break_even_section
from lohp_jax.evaluation.honesty_page import honesty_section
from lohp_jax.evaluation.markup import table
from lohp_jax.evaluation.plots import Plot, draw_plots
from lohp_jax.evaluation.records import read_results, section
from lohp_jax.evaluation.standings import (
    ACCURACY,
    OBJECTIVE,
    Score,
    Standings,
    integer,
    score_text,
    significant,
    standings,
    statement,
    value_text,
)
from lohp_jax.files import read_json, write_atomically


def write_report(directory: str | os.PathLike) -> pathlib.Path:
    """Writes `report.html` from the other files of a run directory; the same files, the same bytes.

    Reads `results.json`; where they exist also `config.json` (else the config in the results),
    `metrics.jsonl` and `figures.json`, without which the page has fewer plots and says so. An old
    report is replaced in a single step, or stays as it is.

    Args:
      directory: what `lohp evaluate` filled.

    Returns: the path of the page.

    Raises:
      FileNotFoundError, if there is no `results.json`.
      ValueError, if a file is of another schema, is not JSON (the line is named) or lacks a key or
        has a value of the wrong kind there (the key is named). NaN and null count as unknown.
      OSError, if the page cannot be written.
    """
    directory = pathlib.Path(directory)
    results = read_results(directory)
    where = str(directory / "results.json")
    compared = standings(results, where)
    config_file = directory / "config.json"
    config = read_json(config_file) if config_file.exists() else results.get("config", {})
    page = _PAGE.substitute(
        family=html.escape(compared.family),
        statement=html.escape(statement(compared)),
        methods=_methods_table(compared),
        break_even=break_even_section(section(results, "break_even", where), where),
        honesty=honesty_section(section(results, "honesty", where), where, compared),
        plots="\n".join(_plot_html(*pair) for pair in draw_plots(directory, compared)),
        config=_pretty(config),
        environment=_pretty(results.get("environment", {})),
    )
    path = directory / "report.html"
    write_atomically(path, page.encode())
    return path


def _methods_table(compared: Standings) -> str:
    head = (
        "Method",
        _HEADS[compared.measure.name],
        "± is",
        "Worst task",
        "Gradients<br>per task",
        "Forward passes<br>per task",
        "Latency (ms), median,<br>batch 1",
        "99th percentile,<br>batch 1",
        "Latency (ms), median,<br>batched, per network",
        "99th percentile,<br>batched, per network",
    )
    rows = (_method_cells(score, compared) for score in compared.scores)
    return table(head, rows, css="methods")


def _method_cells(score: Score, compared: Standings) -> list[str]:
    name = html.escape(score.method)
    if score.split != "held_out":
        name += f" <small>(split {html.escape(score.split)})</small>"
    if score.method == compared.main:
        name = f"<strong>{name}</strong>"
    return [
        name,
        score_text(score, compared.measure),
        score.spread_of,
        value_text(score.worst, compared.measure),
        integer(score.gradients),
        integer(score.forward_passes),
        significant(score.latency),
        significant(score.latency_p99),
        significant(score.latency_batch),
        significant(score.latency_batch_p99),
    ]


_HEADS = {ACCURACY.name: "Accuracy", OBJECTIVE.name: "Objective,<br>lower is better"}


def _pretty(value: Any) -> str:
    return html.escape(json.dumps(value, indent=2, ensure_ascii=False))


def _plot_html(plot: Plot, svg: bytes) -> str:
    title = f"<figure><h3>{html.escape(plot.title)}</h3>"
    if not svg:
        return f'{title}<p class="absent">Left out: {html.escape(plot.caption)}</p></figure>'
    data = base64.b64encode(svg).decode("ascii")
    return (
        f'{title}<img src="data:image/svg+xml;base64,{data}" alt="{html.escape(plot.alt)}">'
        f"<figcaption>{html.escape(plot.caption)}</figcaption></figure>"
    )


_PAGE = string.Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>lohp_jax on $family</title>
<style>
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: #fff; color: #1a1a1a;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0 0 .3rem; }
.statement { border-left: 4px solid #0072b2; background: #f2f7fb; padding: .7rem 1rem;
  font-size: 1.1rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0;
  font-size: 14px; line-height: 22px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 11px; text-align: left; vertical-align: top;
  border-bottom: 1px solid #ddd; }
thead th { border-bottom: 2px solid #888; vertical-align: bottom; }
tbody th { font-weight: normal; }
.methods td:nth-child(n + 4), .methods th:nth-child(n + 4) { text-align: right; }
.methods td, .methods th, .honesty td div { white-space: nowrap; }
.methods th:first-child { position: sticky; left: 0; background: #fff; }
.honesty th { max-width: 12rem; }
.verdicts td, .break-even td { min-width: 12rem; }
dl { font-size: .9rem; color: #444; }
dt { font-weight: 600; }
dd { margin: 0 0 .4rem; }
.pass { color: #0b6b3a; font-weight: 600; white-space: nowrap; }
.fail { color: #a31515; font-weight: 600; white-space: nowrap; }
.unknown, .absent, figcaption { color: #555; font-size: .9rem; }
.plots { display: grid; gap: 1.5rem 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
figure { margin: 0; min-width: 0; }
img { display: block; width: 100%; height: auto; }
summary { cursor: pointer; font-weight: 600; margin-top: 2rem; }
pre { overflow-x: auto; background: #f6f6f6; padding: .8rem; font-size: .85rem; }
</style>
</head>
<body>
<h1>Generated weights on $family</h1>
<p class="statement">$statement</p>
<h2>Methods</h2>
$methods
<h2>Break-even</h2>
$break_even
<h2>Honesty</h2>
$honesty
<h2>Plots</h2>
<div class="plots">
$plots
</div>
<details>
<summary>Config and environment</summary>
<h3>Config</h3>
<pre>$config</pre>
<h3>Environment</h3>
<pre>$environment</pre>
</details>
</body>
</html>
""")
