"""Training of a method on stored trajectories: one pure update, and the engine around it."""

import dataclasses

import jax
import jax.numpy as jnp

from lohp_jax.methods.step import TrainState, draw_batches, example_at, make_update
from lohp_jax.methods.windows import check_dataset, read_windows, window_chances
from lohp_jax.policy.feedback import NUM_KNOWN
from lohp_jax.tasks.support import name_canonically
from lohp_jax.training import engine
from lohp_jax.training.distributed import Strategy
from lohp_jax.training.gradient import scheduled_adam
from lohp_jax.trajectories.dataset import Dataset, WindowDataset
from lohp_jax.types import Example, Method, PyTree, Space, TaskFamily

_ADVICE = (
    "Start in another run directory with a lower learning_rate or clip_norm, or a larger end_std of the "
    "balance objective."
)


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
    """How a method is trained.

    Attributes:
      updates: those of a method with a share of one.
      batch_size: trajectories per update, an even number.
      learning_rate: peak of the schedule: a linear warm-up, then a cosine down to a hundredth.
      clip_norm: largest global norm of a gradient.
      log_every: updates per compiled chunk, and per line of metrics.
    """

    updates: int
    batch_size: int = 16
    learning_rate: float = 3e-3
    clip_norm: float = 1.0
    log_every: int = 50

    def __post_init__(self):
        for name in ("updates", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.batch_size < 2 or self.batch_size % 2:
            raise ValueError(f"batch_size must be even and at least 2, got {self.batch_size}.")
        for name in ("learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and positive, got {getattr(self, name)}.")


def train_method(
    method: Method,
    space: Space,
    dataset: Dataset | WindowDataset,
    config: UpdateConfig,
    key: jax.Array,
    *,
    strategy: Strategy = "jit",
    saving: engine.Saving | None = None,
    on_progress: engine.OnProgress = engine.silent,
) -> PyTree:
    """Trains a method, from its newest checkpoint if there is one, and what it starts from before it.

    Args:
      method: to be trained.
      space: of `make_space`.
      dataset: of `make_dataset`, or of `make_window_dataset` for a method of windows.
      config: settings.
      key: randomness of initialisation and training.
      strategy: of `compile_update`; the result is the same up to rounding.
      saving: where checkpoints go; what they say of the method is added. None trains in memory only.
      on_progress: called after each chunk.

    Returns: its params.

    Raises: ValueError for a method of windows and a data set that is none, or the other way round; what
      `engine.train` raises.
    """
    params = None
    if method.starts_from is not None:
        params = train_method(
            method.starts_from,
            space,
            dataset,
            config,
            key,
            strategy=strategy,
            saving=saving,
            on_progress=on_progress,
        )
    training = make_training(method, space, dataset, config, key, params)
    saving = saving and _describing(saving, method)
    return engine.train(training, strategy=strategy, saving=saving, on_progress=on_progress).params


def make_training(
    method: Method,
    space: Space,
    dataset: Dataset | WindowDataset,
    config: UpdateConfig,
    key: jax.Array,
    params: PyTree | None = None,
) -> engine.Training:
    """What the engine runs for a method, as pure functions; arguments as of `train_method`.

    Args:
      method: to be trained.
      space: of `make_space`.
      dataset: of `make_dataset`, or of `make_window_dataset` for a method of windows.
      config: settings.
      key: randomness of initialisation and training.
      params: to start from; None for those of `Method.init`.
    """
    init_key, batch_key = jax.random.split(key)
    method, updates = method.bound(space), num_updates(method, config.updates)
    finish_key = jax.random.fold_in(batch_key, updates)  # of a step that no batch is drawn for
    check_dataset(method, dataset)
    rows = dataset.rows if isinstance(dataset, WindowDataset) else dataset
    optimizer = scheduled_adam(
        updates, config.learning_rate, warmup=updates // 10, clip_norm=config.clip_norm
    )

    chances = None if method.windowed is None else window_chances(method.windowed.windows)

    def start(key, params, dataset):
        if params is None:
            params = method.init(key, example_at(space.family, dataset, 0, key))
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    def finish(state, dataset):
        contexts = _known_contexts(space.family, dataset, finish_key)
        return state._replace(params=method.calibrate(state.params, contexts))

    def draw(first_step, count):
        sizes = {"num_steps": count, "batch_size": config.batch_size}
        batches = _draw(batch_key, rows, first_step, **sizes)
        if method.windowed is None:
            return batches
        return read_windows(method.windowed, dataset, batches, chances, batch_key, first_step)

    return engine.Training(
        method.name,
        start,
        make_update(space.family, method.loss, optimizer),
        draw,
        updates,
        finish=None if method.calibrate is None else finish,
        start_from=(init_key, params, rows),
        replicated=(rows,),
        log_every=config.log_every,
        advice=_ADVICE,
    )


def _known_contexts(family: TaskFamily, dataset: Dataset, key: jax.Array) -> PyTree:
    """Contexts of `NUM_KNOWN` stored tasks, their labels in canonical order as in generation."""
    index = jax.random.randint(key, (NUM_KNOWN,), 0, len(dataset.teacher))

    def draw(row, key):
        data = jax.tree.map(lambda leaf: leaf[row], dataset.data)
        return family.context(name_canonically(family, data, key), key)

    return jax.vmap(draw)(index, jax.random.split(key, NUM_KNOWN))


def num_updates(method: Method, updates: int) -> int:
    """Updates of a method, of which one with a share of one has `updates`."""
    return max(1, int(updates * method.share))


def state_shapes(method: Method, space: Space) -> TrainState:
    """Shapes and types of the state of a bound method in training, for reading its checkpoints."""

    def blank(key):
        data = space.family.sample(key, "train")
        tokens = jnp.zeros((space.num_steps + 1, *space.codec.mask.shape))
        example = Example(tokens, jnp.zeros((), jnp.int32), space.family.context(data, key), data)
        params = method.init(key, example)
        optimizer = scheduled_adam(1, 1.0)
        return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

    return jax.eval_shape(blank, jax.random.key(0))


def _describing(saving: engine.Saving, method: Method) -> engine.Saving:
    described = {"method": {"name": method.name, "config": method.config}}
    if method.window is not None:
        described["window"] = method.window
    return dataclasses.replace(saving, config=saving.config | described)


_draw = jax.jit(draw_batches, static_argnames=("num_steps", "batch_size"))
