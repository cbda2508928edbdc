"""Training of one method of Lo-Hp on stored trajectories."""

import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from lohp_jax.methods.setting import Dataset, Frame, make_objective
from lohp_jax.methods.step import TrainState, draw_batches, make_optimizer, make_update
from lohp_jax.policy.hybrid import Policy
from lohp_jax.runs.config import RunConfig, to_json
from lohp_jax.training import engine
from lohp_jax.training.distributed import Strategy
from lohp_jax.types import Progress, TaskFamily

_ADVICE = (
    "Start in another run directory with a lower training.learning_rate or training.clip_norm, or a "
    "larger balance.end_std."
)


def train(
    config: RunConfig,
    family: TaskFamily,
    policy: Policy,
    frame: Frame,
    dataset: Dataset,
    directory: pathlib.Path,
    method: str,
    *,
    key: jax.Array,
    params: dict | None = None,
    strategy: Strategy = "jit",
    on_progress: Callable[[Progress], None] = engine.silent,
) -> TrainState:
    """Trains one method, from its newest checkpoint if there is one; see `engine.train`.

    Args:
      config: resolved.
      family: the tasks.
      policy: of `make_policy`.
      frame: saved beside the state.
      dataset: of `make_dataset`.
      directory: of the run.
      method: one of `METHODS`.
      key: randomness of initialisation and training.
      params: where to start; None initialises the network.
      strategy: of `compile_update`; the result is the same up to rounding.
      on_progress: called after each chunk.

    Returns: the final state, which is also the newest checkpoint.

    Raises: what `engine.train` raises.
    """
    init_key, batch_key = jax.random.split(key)
    settings = config.training
    compiled = jax.jit(draw_batches, static_argnames=("num_steps", "batch_size"))

    def draw(first_step, count):
        sizes = {"num_steps": count, "batch_size": settings.batch_size}
        return compiled(batch_key, dataset, first_step, **sizes)

    objective = make_objective(config, family, policy, method)
    training = engine.Training(
        method,
        functools.partial(initial_state, config, family, policy, method),
        make_update(family, objective, optimizer_of(config, method)),
        draw,
        num_updates(config, method),
        start_from=(init_key, params),
        replicated=(dataset,),
        log_every=settings.log_every,
        advice=_ADVICE,
    )
    saving = engine.Saving(directory, settings.checkpoint_every, to_json(config), {"frame": frame})
    return engine.train(training, strategy=strategy, saving=saving, on_progress=on_progress)


def num_updates(config: RunConfig, method: str) -> int:
    """Updates of a method: those of the config; consolidation takes half as many, after `lohp`."""
    updates = config.training.updates
    return max(1, updates // 2) if method == "lohp_consolidated" else updates


def optimizer_of(config: RunConfig, method: str) -> optax.GradientTransformation:
    """The optimizer that trains `method`."""
    return make_optimizer(
        learning_rate=config.training.learning_rate,
        clip_norm=config.training.clip_norm,
        updates=num_updates(config, method),
    )


def initial_state(
    config: RunConfig,
    family: TaskFamily,
    policy: Policy,
    method: str,
    key: jax.Array,
    params: dict | None = None,
) -> TrainState:
    """The state before the first update, of given params or of new ones."""
    if params is None:
        params = policy.network.init(key, family.context(family.sample(key, "train"), key))
    return TrainState(params, optimizer_of(config, method).init(params), jnp.zeros((), jnp.int32))
