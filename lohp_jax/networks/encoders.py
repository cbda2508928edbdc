"""What a generator knows of a task: a set encoder over its support examples."""

import dataclasses

import haiku as hk
import jax
import jax.numpy as jnp


@dataclasses.dataclass
class SetEncoder(hk.Module):
    """Support examples -> one embedding per label.

    Every example is assigned, softly, to learned codes; a label is described by the histogram of the
    codes of its examples and by their mean image, beside those of all labels together. So permuting
    the labels permutes the rows of the result, and the order of the examples does not matter
    (Zaheer et al., 2017, Deep Sets).

    Attributes:
      width: size of an embedding, and number of codes.
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
        hidden = hk.nets.MLP([2 * self.width] * 2, activate_final=True, name="example")(pixels)
        codes = jax.nn.softmax(4.0 * hk.Linear(self.width, name="codes")(hidden), axis=-1)
        codes *= self.width  # 1 where all codes share an example evenly
        member = jax.nn.one_hot(labels, self.num_classes, dtype=pixels.dtype)
        share = member.T / jnp.maximum(member.sum(axis=0), 1.0)[:, None]
        seen = [x for features in (codes, pixels) for x in _contrast(share @ features)]
        return hk.nets.MLP([2 * self.width, self.width], name="label")(jnp.concatenate(seen, -1))


def _contrast(means: jax.Array) -> list[jax.Array]:
    """`[labels, C]` -> the same, its difference from the mean over labels, and that mean.

    Each is normalised: tasks that differ by few examples differ little before.
    """
    everything = jnp.broadcast_to(means.mean(axis=0, keepdims=True), means.shape)
    normalise = hk.LayerNorm(axis=-1, create_scale=False, create_offset=False)
    return [normalise(x) for x in (means, means - everything, everything)]
