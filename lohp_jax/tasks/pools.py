"""The examples of all classes in one array, and which of them a task learns from or is scored on.

The data of a task are numbers only: `classes` and `labels` `[M]`, the classes that it uses and what it
calls them, and what `deal` adds.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class FixedPools(NamedTuple):
    """Examples for training and for queries, the same ones in every task.

    Attributes:
      train: `[classes, n, ...]`.
      query: `[classes, q, ...]`.
    """

    train: np.ndarray
    query: np.ndarray

    @property
    def num_train(self) -> int:
        """Training examples of a class in a task."""
        return self.train.shape[1]

    @property
    def num_query(self) -> int:
        """Query examples of a class in a task."""
        return self.query.shape[1]

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of an example."""
        return self.train.shape[2:]

    def deal(self, key: jax.Array, classes: jax.Array) -> dict[str, jax.Array]:
        """What the data of a task hold of its examples: nothing."""
        del key, classes
        return {}

    def training(self, data: dict, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Training examples and labels at `index` into those of its classes laid end to end."""
        return _gather(self.train, data, index)

    def queries(self, data: dict, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The same of query examples."""
        return _gather(self.query, data, index)


class DealtPool(NamedTuple):
    """Examples of which every task is dealt its own query ones, and learns from the others.

    Attributes:
      examples: `[C, n, ...]`; bytes are images, and are divided by 255 where they are looked up.
      num_query: query examples of a class in a task, the last of `order`.
      rotations: how many classes each of the C is: 4 where its image, square, turned by 0, 90, 180 and
        270 degrees are four classes, numbered one after another; 1 where it is one.
    """

    examples: np.ndarray
    num_query: int
    rotations: int = 1

    @property
    def num_classes(self) -> int:
        """Classes, those that rotations make included."""
        return len(self.examples) * self.rotations

    @property
    def num_train(self) -> int:
        """Training examples of a class in a task."""
        return self.examples.shape[1] - self.num_query

    @property
    def example_shape(self) -> tuple[int, ...]:
        """Shape of an example."""
        return self.examples.shape[2:]

    def deal(self, key: jax.Array, classes: jax.Array) -> dict[str, jax.Array]:
        """`order` `[M, n]`, the examples of each class of a task in a random order."""
        number = jnp.arange(self.examples.shape[1], dtype=jnp.int32)
        order = jnp.broadcast_to(number, (classes.shape[0], number.size))
        return {"order": jax.random.permutation(key, order, axis=1, independent=True)}

    def training(self, data: dict, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As of `FixedPools`, of the first examples in the order of the task."""
        which, place = jnp.divmod(index, self.num_train)
        return self.look_up(data["classes"][which], data["order"][which, place]), data["labels"][
            which
        ]

    def queries(self, data: dict, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As of `FixedPools`, of the last examples in the order of the task."""
        which, place = jnp.divmod(index, self.num_query)
        number = data["order"][which, self.num_train + place]
        return self.look_up(data["classes"][which], number), data["labels"][which]

    def look_up(self, classes: jax.Array, number: jax.Array) -> jax.Array:
        """Examples `[..., *example_shape]` by their class `[...]` and number `[...]` in it."""
        row, turns = jnp.divmod(classes, self.rotations)
        found = jnp.asarray(self.examples)[row, number]
        if found.dtype == jnp.uint8:
            found = found.astype(jnp.float32) / 255
        if self.rotations == 1:
            return found
        height = found.ndim - 3
        turned = [jnp.rot90(found, k, (height, height + 1)) for k in range(self.rotations)]
        turns = turns.reshape(*turns.shape, 1, 1, 1)
        return jax.lax.select_n(jnp.broadcast_to(turns, found.shape), *turned)


def _gather(pool: np.ndarray, data: dict, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    which, position = jnp.divmod(index, pool.shape[1])
    return jnp.asarray(pool)[data["classes"][which], position], data["labels"][which]
