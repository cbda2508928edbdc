"""From a family to a generator in one call: trajectories, training, generation."""

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax

from lohp_jax.checks import check_option
from lohp_jax.codec import make_codec
from lohp_jax.files import first_difference, read_json, write_json
from lohp_jax.generation import make_generator
from lohp_jax.methods.lohp import lohp
from lohp_jax.methods.training import UpdateConfig, train_method
from lohp_jax.tasks.door import describe_family
from lohp_jax.training import engine
from lohp_jax.training.distributed import Strategy
from lohp_jax.trajectories.dataset import (
    Coordinates,
    Dataset,
    WindowDataset,
    imitating,
    make_coordinates,
    make_dataset,
    make_space,
    make_window_dataset,
)
from lohp_jax.trajectories.matching import Matching
from lohp_jax.trajectories.prepare import prepare
from lohp_jax.trajectories.store import Store
from lohp_jax.trajectories.teachers import Asked, Teacher, make_teachers
from lohp_jax.types import Generator, Method, Params, Progress, Space, TaskFamily
from lohp_jax.windows import make_windows


class Gathered(NamedTuple):
    """Stored trajectories as methods are trained on them.

    Attributes:
      store: of `prepare`.
      coordinates: in which weights are generated.
      space: what a method may know.
      dataset: the trajectories at their matched states, in memory or to be read in windows.
    """

    store: Store
    coordinates: Coordinates
    space: Space
    dataset: Dataset | WindowDataset


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """Settings of `fit`."""

    num_tasks: int = 300
    """Training tasks, each run by every teacher."""
    num_steps: int = 20
    """T, steps of a teacher."""
    compression: int = 4
    """k, steps of a teacher that one generated step stands for; must divide `num_steps`."""
    updates: int = 600
    """Updates of the method."""
    batch_size: int = 16
    """Trajectories per update, an even number."""
    learning_rate: float = 3e-3
    """Peak of the schedule: a linear warm-up, then a cosine down to a hundredth."""
    clip_norm: float = 1.0
    """Largest global norm of a gradient."""
    log_every: int = 50
    """Updates per compiled chunk, and per line of metrics."""
    matching: Matching = "uniform"
    """How matched states are spread over a trajectory."""
    start_noise: float = 0.01
    """Standard deviation of the noise on the shared start."""
    channels: int = 16
    """Weights per token."""
    checkpoint_every: int = 200
    """Updates between checkpoints."""
    record_every: int = 1
    """Steps of a teacher from one stored state to the next; must divide `compression`, and with uniform
    matching may be as much."""

    def __post_init__(self):
        sizes = ("num_tasks", "num_steps", "channels", "checkpoint_every", "record_every")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"fit: {name} must be at least 1, got {getattr(self, name)}.")
        count_states(self.num_steps, self.compression)
        if self.compression % self.record_every:
            raise ValueError(
                f"fit: record_every must divide compression={self.compression}, got "
                f"{self.record_every}: the matched states would not be stored."
            )
        self.updating()

    def updating(self) -> UpdateConfig:
        """What concerns the updates."""
        return UpdateConfig(
            self.updates, self.batch_size, self.learning_rate, self.clip_norm, self.log_every
        )


def fit(
    family: TaskFamily,
    method: Method | None = None,
    *,
    key: jax.Array,
    teachers: Asked | Iterable[Asked] = "adam:0.01",
    imitate: str = "best",
    directory: str | os.PathLike | None = None,
    resume: bool = False,
    strategy: Strategy = "jit",
    on_progress: engine.OnProgress = engine.silent,
    **settings: Any,
) -> Generator:
    """Runs teachers on tasks of a family and trains a generator of weights on what they did (Lo-Hp).

    >>> import jax, lohp_jax as lj
    >>> method = lj.cloning(network=lj.NetworkConfig("mlp", (8,), embedding=8))
    >>> sizes = {"num_tasks": 4, "num_steps": 2, "compression": 2, "updates": 2, "batch_size": 2}
    >>> generator = lj.fit(lj.sine_regression(), method, key=jax.random.key(0), **sizes)

    Args:
      family: the tasks.
      method: how to train; None for `lohp()`.
      key: randomness of tasks, starts and training; the result depends on it alone.
      teachers: optax transformations, names for `make_optimizer`, or pairs of a name and either.
      imitate: whose trajectories generated weights follow, as in `load`.
      directory: for trajectories, checkpoints and metrics, to `load` or resume; None keeps no files.
      resume: go on in a directory that holds a run with the same arguments.
      strategy: of `compile_update`, for training.
      on_progress: told of each shard of trajectories ("prepare") and each chunk of updates.
      **settings: of `FitConfig`: `num_tasks`, `num_steps`, `compression`, `updates` and more.

    Returns: the generator, for `generate`.

    Raises: ValueError for a family whose functions do not fit, bad settings, a directory that holds
      another run, or a teacher that diverges on every task; DivergedError for a training that is not
      finite; OSError if the disk is full.
    """
    described = describe_family(family)._asdict()
    method, config = lohp() if method is None else method, _make_config(settings)
    check_method(method, family, config.channels)
    start_key, prepare_key, train_key = jax.random.split(key, 3)
    theta_0 = jax.jit(family.init)(start_key)
    kinds = make_teachers(teachers, config.num_steps, theta_0)
    names = [kind.name for kind in kinds]
    check_option("fit", "imitate", imitate, ("best", "mixed", *names))
    if directory is not None:
        directory = pathlib.Path(directory)
        _open_directory(directory, _described_run(described, method, kinds, config, key), resume)
    sizes = ("num_tasks", "num_steps", "start_noise", "record_every")
    given = {name: getattr(config, name) for name in sizes} | {"theta_0": theta_0}
    given |= {"directory": directory and directory / "trajectories", "key": prepare_key}
    store = prepare(family, kinds, **given, on_progress=_preparing(on_progress))
    gathered = gather(family, store, theta_0, kinds, config, method.window)
    saving = directory and saving_of(directory, gathered, described, kinds, config)
    told = {"strategy": strategy, "saving": saving, "on_progress": on_progress}
    training = gathered.space, gathered.dataset, config.updating(), train_key
    params = train_method(method, *training, **told)
    return make_generator(method, imitating(gathered.space, imitate, names), params)


def _make_config(settings: dict[str, Any]) -> FitConfig:
    for name in settings:
        check_option("fit", "a setting", name, [f.name for f in dataclasses.fields(FitConfig)])
    return FitConfig(**settings)


def _described_run(
    family: dict[str, Any],
    method: Method,
    teachers: Sequence[Teacher],
    config: FitConfig,
    key: jax.Array,
) -> dict[str, Any]:
    """What decides a run, as JSON values."""
    return {
        "family": family,
        "method": {"name": method.name, "config": method.config},
        "teachers": [teacher.spec for teacher in teachers],
        "fit": dataclasses.asdict(config),
        "key": jax.random.key_data(key).tolist(),
    }


def count_states(num_steps: int, compression: int) -> int:
    """N + 1, the matched states of a trajectory.

    Raises: ValueError, if `compression` does not divide `num_steps`, with what does.
    """
    if num_steps < 1 or compression < 1 or num_steps % compression:
        fitting = [d for d in range(1, num_steps + 1) if num_steps % d == 0]
        raise ValueError(
            f"compression must divide num_steps={num_steps}, got {compression}; these do: {fitting}."
        )
    return num_steps // compression + 1


def check_method(method: Method, family: TaskFamily, channels: int) -> None:
    """Whether a method can serve a family, before anything is computed.

    Raises: ValueError where it cannot, or for a window that no tokens of the family's weights fill.
    """
    if method.check is not None:
        method.check(family)
    if method.window is not None:
        shapes = jax.eval_shape(family.init, jax.random.key(0))
        codec = make_codec(shapes, channels=channels, class_axes=family.class_axes)
        make_windows(codec, method.window)


def gather(
    family: TaskFamily,
    store: Store,
    theta_0: Params,
    teachers: Sequence[Teacher],
    config: FitConfig,
    window: int | None = None,
) -> Gathered:
    """Reads a store, once for all methods that are trained on it.

    Args:
      family: the tasks.
      store: of `prepare`.
      theta_0: the shared start.
      teachers: that the store holds runs of.
      config: how states are matched and cut into tokens.
      window: of the methods, see `Method`.
    """
    coordinates = make_coordinates(store, theta_0)
    num_states = count_states(config.num_steps, config.compression)
    space = make_space(
        family,
        coordinates,
        channels=config.channels,
        num_steps=num_states - 1,
        num_teachers=len(teachers),
    )
    make = make_dataset if window is None else make_window_dataset
    dataset = make(store, space.codec, num_states, matching=config.matching)
    return Gathered(store, coordinates, space, dataset)


def saving_of(
    directory: pathlib.Path,
    gathered: Gathered,
    description: dict[str, Any],
    teachers: Sequence[Teacher],
    config: FitConfig,
    **more: Any,
) -> engine.Saving:
    """Where the methods of a run are saved, with all that `load` must know to use them again.

    Args:
      directory: of the run.
      gathered: what they are trained on.
      description: of the family, see `describe_family`.
      teachers: of the store.
      config: says how often.
      **more: JSON values to be kept as well.
    """
    known = {
        "family": description,
        "teachers": [teacher.name for teacher in teachers],
        "num_steps": gathered.space.num_steps,
        "channels": gathered.space.codec.mask.shape[1],
        **more,
    }
    beside = {"coordinates": gathered.coordinates}
    return engine.Saving(directory, config.checkpoint_every, known, beside)


def _open_directory(directory: pathlib.Path, config: dict[str, Any], resume: bool) -> None:
    """Makes the directory of a run, or checks that the one that is there had the same arguments."""
    path = directory / "config.json"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_json(path, config)
        return
    if not resume:
        raise ValueError(
            f"fit: {directory} holds a run; go on with resume=True, or choose another directory."
        )
    if difference := first_difference(read_json(path), config):
        raise ValueError(
            f"fit: {directory} holds a run with other arguments: {difference}; choose another "
            "directory, or give the same arguments."
        )


def _preparing(told: Callable[[Progress], None]) -> Callable[[int, int], None]:
    begun = time.perf_counter()

    def on_progress(done: int, total: int) -> None:
        rate = done / (time.perf_counter() - begun)
        told(Progress("prepare", done, total, {}, rate))

    return on_progress
