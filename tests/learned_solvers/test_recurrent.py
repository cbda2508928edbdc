import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lohp_jax.learned_solvers.recurrent import run_learned_solver, train_learned_solver
from lohp_jax.solvers.multistart import multistart

KINDS = ("l2o_dm", "rnnprop", "l2o_pa")
KEY = jax.random.key(0)
X0 = jnp.linspace(-1.0, 1.0, 4)


@functools.cache
def untrained(family, kind):
    options = {"starts": "frame", "num_steps": 4, "window": 2, "updates": 1, "batch_size": 2}
    return train_learned_solver(family, kind, KEY, **options)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm_oracle(weights, name, seen, hidden, cell):
    """Gates in the order input, candidate, forget, output; 1 is added to the forget gate."""
    linear = weights[f"{name}/linear"]
    gates = np.concatenate([seen, hidden], -1) @ linear["w"] + linear["b"]
    i, g, f, o = np.split(gates, 4, axis=-1)
    cell = sigmoid(f + 1) * cell + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(cell), cell


def dense(weights, name, x):
    return x @ weights[name]["w"] + weights[name]["b"]


def oracle(kind, params, problem, num_steps):
    """The three rules in NumPy, float64."""
    weights = jax.tree.map(np.float64, params)
    matrix, b, penalty = (np.float64(problem[k]) for k in ("A", "b", "penalty"))
    size = np.linalg.norm(matrix, 2) ** 2
    x = y = np.float64(X0)
    m = v = np.zeros(4)
    states = [[np.zeros((4, 20))] * 2 for _ in range(2)]
    path = [x]
    for count in range(1, num_steps + 1):
        g = matrix.T @ (matrix @ y - b)
        if kind != "l2o_pa":
            g = g + penalty * np.sign(y)
        if kind == "l2o_dm":
            large = np.abs(g) >= np.exp(-10)
            seen = [
                np.where(large, np.log(np.abs(g) + 1e-300) / 10, -1),
                np.where(large, np.sign(g), np.exp(10) * g),
            ]
        elif kind == "rnnprop":
            m, v = 0.95 * m + 0.05 * g, 0.95 * v + 0.05 * g**2
            root = np.sqrt(v / (1 - 0.95**count)) + 1e-8
            seen = [m / (1 - 0.95**count) / root, g / root]
        else:
            seen = [g, y]
        h = np.stack(seen, -1)
        if kind == "rnnprop":
            h = dense(weights, "input", h)
            h = np.where(h > 0, h, np.expm1(h))
        for i in range(2):
            states[i] = lstm_oracle(weights, f"lstm_{i}", h, *states[i])
            h = states[i][0]
        if kind == "l2o_dm":
            x = y = x + 0.1 * dense(weights, "output", h)[:, 0]
        elif kind == "rnnprop":
            x = y = x - 0.1 * np.tanh(dense(weights, "output", h)[:, 0])
        else:
            h = np.maximum(dense(weights, "dense", h), 0)
            p, a = (2 * weights["~"]["scale"] * sigmoid(dense(weights, "output", h))).T
            z = y - p / size * g
            new = np.sign(z) * np.maximum(np.abs(z) - penalty * p / size, 0)
            x, y = new, new + a * (new - x)
        path.append(x)
    return np.array(path)


@pytest.mark.parametrize("kind", KINDS)
def test_solvers_follow_their_definitions(small_lasso, kind):
    params = jax.tree.map(lambda leaf: 2 * leaf, untrained(small_lasso, kind))
    problem = small_lasso.sample(jax.random.key(1))
    trace = jax.jit(
        lambda params: run_learned_solver(small_lasso, problem, X0, 4, kind=kind, params=params)
    )(params)
    np.testing.assert_allclose(trace.path, oracle(kind, params, problem, 4), atol=3e-5)
    assert (trace.objective_calls, trace.gradient_calls) == (0, 4)
    assert np.abs(np.diff(trace.path, axis=0)).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_training_helps_on_new_problems(small_lasso, kind):
    options = {"num_steps": 20, "window": 10, "updates": 80, "batch_size": 8, "learning_rate": 1e-2}
    trained = train_learned_solver(small_lasso, kind, KEY, **options)
    keys = jax.random.split(KEY, 32)
    problems = jax.vmap(lambda key: small_lasso.sample(key, "held_out"))(keys)

    @jax.jit
    def mean_value(params):
        def one(problem):
            x0, solver = small_lasso.start(problem), {"kind": kind, "params": params}
            return run_learned_solver(small_lasso, problem, x0, 20, **solver).values.mean()

        return jax.vmap(one)(problems).mean()

    assert mean_value(trained) < mean_value(untrained(small_lasso, kind)) - 1e-3


def test_a_smooth_family_has_no_proximal_step(small_lasso, small_quadratic):
    params = untrained(small_lasso, "l2o_pa")
    problem, starts = small_quadratic.sample(KEY), jnp.eye(4)[:2]
    trace = multistart(
        small_quadratic, problem, starts, 3, solver=run_learned_solver, kind="l2o_pa", params=params
    )
    assert trace.path.shape == (4, 4) and trace.gradient_calls == 6
    slope = trace.path[0] - problem["A"].T @ problem["b"]
    ratio = (trace.path[0] - trace.path[1]) / slope
    assert np.all((ratio > 0.001) & (ratio < 0.1))  # 2 sigmoid(.) times 0.01


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "l2o"}, r"kind must be one of \('l2o_dm', .*\), got 'l2o'; did you mean"),
        ({"starts": "zero"}, r"starts must be one of \('start', 'frame'\), got 'zero'"),
        ({"num_steps": 5, "window": 2}, "must be a multiple of window, .* got 5 and 2"),
        ({"window": 0}, "both at least 1, got 100 and 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_training_rejects(small_lasso, options, message):
    with pytest.raises(ValueError, match=message):
        train_learned_solver(small_lasso, key=KEY, **{"kind": "l2o_dm"} | options)


def test_running_rejects(small_lasso):
    problem, params = small_lasso.sample(KEY), untrained(small_lasso, "rnnprop")
    with pytest.raises(ValueError, match="kind must be one of"):
        run_learned_solver(small_lasso, problem, X0, 3, kind="adam", params={})
    with pytest.raises(ValueError, match="num_steps must be 0 or more, got -1"):
        run_learned_solver(small_lasso, problem, X0, -1, kind="rnnprop", params=params)
