"""Learned solvers: one small LSTM, shared by all coordinates, that turns gradients into steps.

Three rules from the literature in one frame; they differ in what the LSTM sees of a coordinate and in
what its output does. Gradients that it sees carry no second derivatives, as in all three papers.

"l2o_dm" (Andrychowicz et al., 2016) sees the logarithm and sign of a gradient and says the change of x.
"rnnprop" (Lv et al., 2017) sees m / √v and g / √v of Adam and says tanh of it; its random scalings in
training are left out. "l2o_pa" (Liu et al., 2023, the form their ablation ends at) sees y and ∇g(y) and
says a preconditioner p and a momentum a, each 2 sigmoid(.) times a learned scale:
x' = prox_{p/L}(y - p/L ∇g(y)), y' = x' + a (x' - x). The others take subgradients where f has a
non-smooth part.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax

from lohp_jax.checks import check_option
from lohp_jax.networks.recurrent import Kind, initial_hidden, make_lstm
from lohp_jax.solvers.multistart import gaussian_starts
from lohp_jax.solvers.trace import Trace, iterate, make_trace, objective_of
from lohp_jax.training.distributed import Strategy
from lohp_jax.training.engine import OnProgress, Training, each_step, silent, step_keys, train
from lohp_jax.training.gradient import FitState, first_state, make_update, scheduled_adam
from lohp_jax.types import ProblemFamily, PyTree

Starts = Literal["start", "frame"]
_STEP = 0.1  # factor of the output of "l2o_dm" and "rnnprop"
_SMALLEST_LOG = 10.0  # of a gradient, from which on "l2o_dm" sees it linearly
_DECAY = 0.95  # of both moments of "rnnprop"
_SMOOTH_STEP = 0.01  # stands for 1 / L in "l2o_pa" where a family states no L


class SolverState(NamedTuple):
    """State of a learned solver.

    Attributes:
      x: `[n]` the iterate.
      y: `[n]` where the next gradient is taken; x itself but for "l2o_pa".
      hidden: of the LSTM, leaves `[n, units]`.
      moments: running means of gradients and of their squares, `[n]` each.
      count: int32, steps so far.
    """

    x: jax.Array
    y: jax.Array
    hidden: PyTree
    moments: tuple[jax.Array, jax.Array]
    count: jax.Array


def run_learned_solver(
    family: ProblemFamily,
    problem: PyTree,
    x0: jax.Array,
    num_steps: int,
    *,
    kind: Kind,
    params: PyTree,
) -> Trace:
    """Runs a trained solver, one gradient a step, in the common form of the solvers.

    Args:
      family: of the problem.
      problem: one.
      x0: `[n]` start.
      num_steps: may exceed those of the training.
      kind: as in training.
      params: of `train_learned_solver`.

    Raises: ValueError for another kind or a negative `num_steps`.
    """
    check_option("learned solver", "kind", kind, get_args(Kind))
    step = _stepper(family, kind, params, problem)
    state, path = iterate(step, _initial(x0), num_steps, lambda state: state.x)
    objective = objective_of(family, problem)
    return make_trace(objective, state.x, path, objective_calls=0, gradient_calls=num_steps)


def train_learned_solver(
    family: ProblemFamily,
    kind: Kind,
    key: jax.Array,
    *,
    starts: Starts = "start",
    num_steps: int = 100,
    window: int = 20,
    updates: int = 2000,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    log_every: int = 100,
    strategy: Strategy = "jit",
    on_progress: OnProgress = silent,
) -> PyTree:
    """Trains a solver by truncated back-propagation on the mean objective along its way.

    Args:
      family: the problems.
      kind: of the solver, see above.
      key: randomness of problems and start; the result depends on it alone.
      starts: where runs begin: at the family's start, or at `gaussian_starts`.
      num_steps: of a run, after which new problems are drawn; a multiple of `window`.
      window: steps of an update, and of its gradient.
      updates: of Adam.
      batch_size: runs in parallel.
      learning_rate: of Adam.
      log_every: updates per call of `on_progress`.
      strategy: of `compile_update`; the result is the same up to rounding.
      on_progress: told of each chunk.

    Raises: ValueError for another kind or numbers out of range; DivergedError if training diverges.
    """
    check_option("learned solver", "kind", kind, get_args(Kind))
    check_option("learned solver", "starts", starts, get_args(Starts))
    _check_sizes(num_steps, window, batch_size)
    optimizer = scheduled_adam(updates, learning_rate)
    begin = functools.partial(_begin, family, starts)
    loss_fn = _make_loss(family, kind, begin, window, num_steps // window)
    start_key, key = jax.random.split(key)
    training = Training(
        kind,
        functools.partial(_first_state, kind, begin, batch_size, optimizer),
        make_update(loss_fn, optimizer),
        each_step(lambda step: step_keys(key, step, batch_size)),
        updates,
        start_from=(start_key,),
        log_every=log_every,
    )
    return train(training, strategy=strategy, on_progress=on_progress).params


def _begin(family: ProblemFamily, starts: Starts, key: jax.Array) -> tuple[PyTree, SolverState]:
    """A new problem and the state of its run."""
    sample_key, start_key = jax.random.split(key)
    problem = family.sample(sample_key, "train")
    x0 = family.start(problem)
    if starts == "frame":
        x0 = gaussian_starts(family, problem, start_key, 1)[0]
    return problem, _initial(x0)


def _make_loss(
    family: ProblemFamily, kind: Kind, begin: Callable, window: int, num_windows: int
) -> Callable:
    """Mean objective along the next window of every run, as `make_update` takes it.

    The carry is the problems and states of the runs; at the first of `num_windows` all begin anew.
    """

    def run(params, problem, state):
        step = _stepper(family, kind, params, problem)

        def body(state, _):
            state = step(state)
            return state, family.objective(state.x, problem)

        state, values = jax.lax.scan(body, state, length=window)
        return jnp.mean(values), state

    def loss_fn(params, carry, keys, step):
        fresh = jax.vmap(begin)(keys)
        over = step % num_windows == 0
        problems, states = jax.tree.map(lambda a, b: jnp.where(over, a, b), fresh, carry)
        losses, states = jax.vmap(run, (None, 0, 0))(params, problems, states)
        return jnp.mean(losses), ((problems, jax.lax.stop_gradient(states)), {})

    return loss_fn


def _first_state(
    kind: Kind,
    begin: Callable,
    batch_size: int,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
) -> FitState:
    """The state before the first update, whose runs of zeros are never taken up."""
    one = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(begin, key))
    seen, _ = _see(kind, one[1], one[1].x)
    params = make_lstm(kind).init(key, seen, one[1].hidden)
    carry = jax.tree.map(lambda leaf: jnp.stack([leaf] * batch_size), one)
    return first_state(params, optimizer, carry)


def _check_sizes(num_steps: int, window: int, batch_size: int) -> None:
    if window < 1 or num_steps < 1 or num_steps % window:
        raise ValueError(
            "learned solver: num_steps must be a multiple of window, both at least 1, "
            f"got {num_steps} and {window}."
        )
    if batch_size < 1:
        raise ValueError(f"learned solver: batch_size must be at least 1, got {batch_size}.")


def _initial(x0: jax.Array) -> SolverState:
    moments = (jnp.zeros_like(x0), jnp.zeros_like(x0))
    hidden = initial_hidden(len(x0), x0.dtype)
    return SolverState(x0, x0, hidden, moments, jnp.zeros((), jnp.int32))


def _see(
    kind: Kind, state: SolverState, gradient: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """What the LSTM sees of each coordinate, `[n, F]`, and the new moments."""
    if kind == "l2o_pa":
        return jnp.stack([gradient, state.y], axis=-1), state.moments
    if kind == "l2o_dm":
        size = jnp.log(jnp.abs(gradient) + jnp.finfo(gradient.dtype).tiny) / _SMALLEST_LOG
        large = size >= -1.0
        first = jnp.where(large, size, -1.0)
        second = jnp.where(large, jnp.sign(gradient), jnp.exp(_SMALLEST_LOG) * gradient)
        return jnp.stack([first, second], axis=-1), state.moments
    moments = tuple(
        optax.incremental_update(new, old, 1.0 - _DECAY)
        for new, old in zip((gradient, gradient**2), state.moments, strict=True)
    )
    first, second = (m / (1.0 - _DECAY ** (state.count + 1)) for m in moments)
    root = jnp.sqrt(second) + 1e-8
    return jnp.stack([first / root, gradient / root], axis=-1), moments


def _stepper(
    family: ProblemFamily, kind: Kind, params: PyTree, problem: PyTree
) -> Callable[[SolverState], SolverState]:
    network = make_lstm(kind)
    composite = family.composite if kind == "l2o_pa" else None
    smooth = family.objective if composite is None else composite.smooth
    unit = _SMOOTH_STEP if composite is None else 1.0 / composite.lipschitz(problem)

    def step(state):
        gradient = jax.grad(smooth)(state.y, problem)
        seen, moments = _see(kind, state, gradient)
        out, hidden = network.apply(params, jax.lax.stop_gradient(seen), state.hidden)
        if kind == "l2o_pa":
            size = unit * out[:, 0]
            x = state.y - size * gradient
            x = x if composite is None else composite.prox(x, size, problem)
            y = x + out[:, 1] * (x - state.x)
        else:
            change = out[:, 0] if kind == "l2o_dm" else -jnp.tanh(out[:, 0])
            x = y = state.x + _STEP * change
        return SolverState(x, y, hidden, moments, state.count + 1)

    return step
