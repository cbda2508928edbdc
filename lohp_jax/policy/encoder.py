"""What a generator knows of a task: a set encoder over its support examples."""

import dataclasses

import haiku as hk
import jax
import jax.numpy as jnp


@dataclasses.dataclass
class SetEncoder(hk.Module):
    """Support examples -> one embedding per label.

    A label is known only by its examples, so that permuting the labels permutes the rows of the
    result, and the order of the examples does not matter (Zaheer et al., 2017, Deep Sets).

    Attributes:
      width: size of an embedding.
      num_classes: number of labels.
    """

    width: int
    num_classes: int
    name: str | None = None

    def __call__(self, images: jax.Array, labels: jax.Array) -> jax.Array:
        """`[n, height, width, channels]` images and `[n]` labels -> `[num_classes, width]`.

        A label without examples gets the embedding of an empty set; callers check for it.
        """
        pixels = hk.Flatten()(images)
        features = hk.nets.MLP([2 * self.width, self.width], name="example")(pixels)
        described = jnp.concatenate([features, pixels], axis=-1)
        member = jax.nn.one_hot(labels, self.num_classes, dtype=pixels.dtype)
        count = jnp.maximum(member.sum(axis=0), 1.0)
        means = (member.T @ described) / count[:, None]
        everything = jnp.broadcast_to(means.mean(axis=0, keepdims=True), means.shape)
        normalise = hk.LayerNorm(axis=-1, create_scale=False, create_offset=False)
        pooled = jnp.concatenate(
            [normalise(x) for x in (means, means - everything, everything)], -1
        )
        return hk.nets.MLP([2 * self.width, self.width], name="label")(pooled)
