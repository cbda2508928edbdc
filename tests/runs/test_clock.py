import json

import jax
import jax.numpy as jnp
import pytest

from lohp_jax.runs import clock


def test_pieces_add_up_by_name(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    for seconds in (2.0, 3.0):  # a run and its continuation
        with clock.recording(tmp_path, clock.TRAIN, "first") as record:
            now[0] += seconds
            record("second", 10)
            now[0] += 0.5
    with clock.recording(tmp_path, clock.PREPARE, clock.TRAJECTORIES):
        now[0] += 7
    found = clock.read_seconds(tmp_path, clock.TRAIN)
    assert found == {"second": clock.Seconds(6.0, 0.0)}
    assert clock.read_seconds(tmp_path, clock.PREPARE)["trajectories"].total == 7
    assert clock.read_seconds(tmp_path / "none", clock.TRAIN) == {}


@pytest.mark.parametrize("error, kept", [(KeyboardInterrupt, 1), (ValueError, 0)])
def test_an_interruption_keeps_its_time_and_a_refusal_writes_nothing(tmp_path, error, kept):
    with pytest.raises(error), clock.recording(tmp_path, clock.TRAIN, "lohp"):
        raise error
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    assert len(lines) == kept
    assert all(json.loads(line)["name"] == "lohp" for line in lines)


def test_compilation_is_told_apart():
    with clock.stopwatch() as lap:
        fresh = jax.jit(lambda x: jnp.sin(x) + 0.123456)
        fresh(jnp.ones(7)).block_until_ready()
        first = lap()
        fresh(jnp.ones(7)).block_until_ready()
        second = lap()
    assert 0 < first.compilation < first.total
    assert second.compilation == 0 < second.total
