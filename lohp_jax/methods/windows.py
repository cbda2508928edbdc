"""Windows of stored trajectories, drawn for the updates of a method that sees no more at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.methods.step import Batch
from lohp_jax.trajectories.dataset import Dataset, WindowDataset
from lohp_jax.types import Method, Windowed, Windows
from lohp_jax.windows import weights_in_windows


def check_dataset(method: Method, dataset: Dataset | WindowDataset) -> None:
    """Whether a bound method can be trained on a data set.

    Raises: ValueError for a method of windows and tokens in memory, or the other way round.
    """
    windows = isinstance(dataset, WindowDataset)
    if windows != (method.windowed is not None):
        sees, given = ("whole networks", "windows") if windows else ("windows", "whole networks")
        raise ValueError(
            f"{method.name}: this method sees {sees}, got trajectories to be read in {given}; give all "
            "methods of a run the same NetworkConfig.window, or run this one apart."
        )


def window_chances(windows: Windows) -> np.ndarray:
    """`[count]` int32, of all weights, how many stand in a window and those before it."""
    return np.cumsum(weights_in_windows(windows)).astype(np.int32)


def read_windows(
    windowed: Windowed,
    dataset: WindowDataset,
    batches: Batch,
    chances: np.ndarray,
    key: jax.Array,
    first_step: int,
) -> Batch:
    """Draws a window for every example of `[steps, B]` batches, and reads it.

    A window is drawn as often as it has weights: the mean over its weights is then, over the draws, the
    mean over all weights of the network.

    Args:
      windowed: of the method.
      dataset: where the windows are.
      batches: of `draw_batches`.
      chances: of `window_chances`.
      key: of the batches.
      first_step: of the batches; the windows of a step depend on `key` and the step alone.
    """
    num_steps, batch_size = batches.index.shape
    sizes = {"num_steps": num_steps, "batch_size": batch_size}
    index = np.asarray(_draw_windows(key, jnp.asarray(chances), first_step, **sizes))
    rows = np.asarray(batches.index).ravel()
    tokens = dataset.read(windowed.windows, rows, index.ravel())
    around = None if windowed.walk is not None else _by_step(dataset.read_whole(rows), batches)
    tokens = _by_step(tokens, batches)
    return batches._replace(tokens=tokens, view=windowed.view(index), around=around)


def _by_step(values: np.ndarray, batches: Batch) -> np.ndarray:
    """`[steps * B, ...]` -> `[steps, B, ...]`."""
    return values.reshape(*batches.index.shape, *values.shape[1:])


@functools.partial(jax.jit, static_argnames=("num_steps", "batch_size"))
def _draw_windows(
    key: jax.Array, chances: jax.Array, first_step: int, *, num_steps: int, batch_size: int
) -> jax.Array:
    """`[num_steps, batch_size]` int32 numbers of windows."""

    apart = jax.random.fold_in(key, 2**31 - 1)  # from the keys of steps

    def draw(step):
        step_key = jax.random.fold_in(apart, step)
        weight = jax.random.randint(step_key, (batch_size,), 0, chances[-1])
        return jnp.searchsorted(chances, weight, side="right").astype(jnp.int32)

    return jax.vmap(draw)(first_step + jnp.arange(num_steps))
