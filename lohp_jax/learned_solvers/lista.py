"""Unrolled networks for LASSO: FISTA with learned matrices, or with learned scalars.

A layer first extrapolates, y = x + β (x - x before), and all begin as those of FISTA. "matrices"
(LISTA, Gregor and LeCun, 2010, with momentum), for one A: x <- soft(W b + V y, θ) with W `[n, m]`,
V `[n, n]`, θ and β `[n]` of each layer. "steps" (in the spirit of ALISTA, Liu et al., 2019), for any A
and size: x <- prox(y - γ ∇g(y) / L, τ / L) with scalars β, γ and τ of each layer. In both forms a layer
counts as one pair of products with A and A^T; those of "matrices" have n (m + n) entries instead of
2 m n.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from lohp_jax.checks import check_option
from lohp_jax.diffusion.generator import check_as_trained
from lohp_jax.solvers.proximal import soft_threshold
from lohp_jax.training.distributed import Strategy
from lohp_jax.training.engine import OnProgress, Training, each_step, silent, step_keys, train
from lohp_jax.training.gradient import first_state, make_update, scheduled_adam
from lohp_jax.types import Generator, ProblemFamily, PyTree

Form = Literal["matrices", "steps"]


def train_lista(
    family: ProblemFamily,
    key: jax.Array,
    *,
    form: Form = "steps",
    num_layers: int = 10,
    updates: int = 2000,
    batch_size: int = 128,
    learning_rate: float = 1e-2,
    log_every: int = 100,
    strategy: Strategy = "jit",
    on_progress: OnProgress = silent,
) -> Generator:
    """Trains `num_layers` steps of proximal gradient descent on the objective, without labels.

    The loss is log f(x_K), whose gradient near the optimum is that of the relative gap (f - f*) / f*.

    Args:
      family: a LASSO; for "steps" any family with `composite`. Its objective must be positive.
      key: randomness of problems; the result depends on it alone.
      form: "matrices" or "steps", see above.
      num_layers: K.
      updates: of Adam.
      batch_size: new problems in each.
      learning_rate: of Adam; 1e-3 suits "matrices".
      log_every: updates per call of `on_progress`.
      strategy: of `compile_update`; the result is the same up to rounding.
      on_progress: told of each chunk.

    Returns: a `Generator` of points x `[n]`, which has no randomness; its `num_steps` are layers.

    Raises: ValueError for another form, a family that it cannot serve, or numbers out of range;
      DivergedError if training diverges.
    """
    check_option("lista", "form", form, get_args(Form))
    _check_sizes(num_layers=num_layers, batch_size=batch_size)
    _check_family(form, family)
    unroll = {"matrices": _matrices, "steps": _steps}[form](family)
    optimizer = scheduled_adam(updates, learning_rate)
    start_key, key = jax.random.split(key)

    def start(key):
        weights = _start(form, family, family.sample(key, "train"), num_layers)
        return first_state(weights, optimizer)

    training = Training(
        "lista",
        start,
        make_update(_make_loss(family, unroll), optimizer),
        each_step(lambda step: step_keys(key, step, batch_size)),
        updates,
        start_from=(start_key,),
        log_every=log_every,
    )
    params = train(training, strategy=strategy, on_progress=on_progress).params
    check = family.check
    if form == "matrices":
        check = check_as_trained(family, "LISTA with matrices", "form='steps' serves all")
    return _generator(family, unroll, params, check)


def _make_loss(family: ProblemFamily, unroll: Callable[..., jax.Array]) -> Callable:
    """Mean log f(x_K) over new problems, one for each key, as `make_update` takes it."""

    def loss_fn(params, carry, keys, step):
        def one(key):
            problem = family.sample(key, "train")
            x = unroll(params, problem)[-1]
            return jnp.log(family.objective(x, problem))

        return jnp.mean(jax.vmap(one)(keys)), (carry, {})

    return loss_fn


def _generator(
    family: ProblemFamily, unroll: Callable, params: PyTree, check: Callable[[PyTree], None] | None
) -> Generator:
    num_layers = len(jax.tree.leaves(params)[0])

    def path(params, context, key=None, *, temperature=0.0, num_steps=None, guidance=0.0):
        if num_steps is not None and not 0 <= num_steps <= num_layers:
            raise ValueError(f"lista: num_steps must be from 0 to {num_layers}, got {num_steps}.")
        return unroll(params, context)[: None if num_steps is None else num_steps + 1]

    def apply(params, context, key=None, **options):
        return path(params, context, key, **options)[-1]

    return Generator(apply, params, family.name, check=check, path=path)


def _matrices(family: ProblemFamily) -> Callable[..., jax.Array]:
    """`(params, problem) -> [K + 1, n]`, the start and the output of each layer."""

    def unroll(params, problem):
        def layer(state, weights):
            x, before = state
            y = x + weights["momentum"] * (x - before)
            v = weights["input"] @ problem["b"] + weights["recurrent"] @ y
            new = soft_threshold(v, jnp.exp(weights["log_threshold"]))
            return (new, x), new

        start = family.start(problem)
        outputs = jax.lax.scan(layer, (start, start), params)[1]
        return jnp.concatenate([start[None], outputs])

    return unroll


def _steps(family: ProblemFamily) -> Callable[..., jax.Array]:
    """As `_matrices`."""
    composite = family.composite

    def unroll(params, problem):
        lipschitz = composite.lipschitz(problem)

        def layer(state, weights):
            x, before = state
            y = x + weights["momentum"] * (x - before)
            step, threshold = (jnp.exp(weights[k]) for k in ("log_step", "log_threshold"))
            v = y - step / lipschitz * jax.grad(composite.smooth)(y, problem)
            new = composite.prox(v, threshold / lipschitz, problem)
            return (new, x), new

        start = family.start(problem)
        outputs = jax.lax.scan(layer, (start, start), params)[1]
        return jnp.concatenate([start[None], outputs])

    return unroll


def _start(form: Form, family: ProblemFamily, problem: PyTree, num_layers: int) -> PyTree:
    """Weights of every layer, with which the network is FISTA."""
    t, momentum = 1.0, [0.0]  # the momentum comes before the step
    for _ in range(num_layers - 1):
        before, t = t, (1.0 + math.sqrt(1.0 + 4.0 * t**2)) / 2.0
        momentum.append((before - 1.0) / t)
    momentum = jnp.array(momentum)
    if form == "steps":
        zeros = jnp.zeros(num_layers)
        return {"momentum": momentum, "log_step": zeros, "log_threshold": zeros}
    matrix, lipschitz = problem["A"], family.composite.lipschitz(problem)
    n = matrix.shape[1]
    layer = {
        "input": matrix.T / lipschitz,
        "recurrent": jnp.eye(n) - matrix.T @ matrix / lipschitz,
        "log_threshold": jnp.full(n, jnp.log(problem["penalty"] / lipschitz)),
    }
    layers = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], num_layers, axis=0), layer)
    return {**layers, "momentum": jnp.tile(momentum[:, None], (1, n))}


def _check_sizes(**sizes: int) -> None:
    for name, count in sizes.items():
        if count < 1:
            raise ValueError(f"lista: {name} must be at least 1, got {count}.")


def _check_family(form: Form, family: ProblemFamily) -> None:
    if family.composite is None:
        raise ValueError(
            f"lista: expected a family with a proximal map (`composite`), got {family.name!r}; "
            "use `train_learned_solver`."
        )
    if form == "steps":
        return
    one, other = (family.sample(jax.random.key(seed)) for seed in range(2))
    if not {"A", "b", "penalty"} <= one.keys() or not jnp.array_equal(one["A"], other["A"]):
        raise ValueError(
            f"lista: expected a LASSO with one A for form='matrices', got {family.name!r}; "
            "use form='steps'."
        )
