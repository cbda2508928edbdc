"""Domain generalisation: a task is a domain, or a mixture of domains, over the same classes.

The protocol is the leave-one-domain-out of DomainBed (Gulrajani & Lopez-Paz, 2021): no image of the
held-out domain, labelled or not, is in any training task, its query images are in no support, and labels
keep their names in all tasks. Two things are ours.

A few domains make too few tasks to learn from, so a training task is a mixture of training domains:
their odds come from a Dirichlet distribution, and by them as many images of each class as one domain has
are drawn without replacement, from the training pools for teachers and supports and from the query pools
for `evaluate`.

A generator sees something of the new domain, a few images of each class, so that its scores are to be
compared with those of what sees as much. What sees nothing, as DomainBed has it, is `baselines.erm`.
Held-out tasks are all of the held-out domain and differ in their supports alone.
"""

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np

from lohp_jax.checks import check_option
from lohp_jax.data.domains import DomainSet
from lohp_jax.networks.classifiers import Network, make_network
from lohp_jax.tasks.images import TeacherData, mean_cross_entropy, read_pools
from lohp_jax.tasks.splits import check_split, draw_support
from lohp_jax.tasks.support import ImageSupport
from lohp_jax.types import TaskFamily

_CONCENTRATION = 0.3
"""Of the Dirichlet distribution of mixtures: below 1, so that most are close to a single domain."""


def domain_family(
    domains: DomainSet,
    held_out: str,
    *,
    network: str | Network = "linear",
    shots: int = 5,
    labels: bool = True,
    teacher_data: TeacherData = "full",
    batch_size: int | None = None,
    name: str = "domains",
) -> TaskFamily:
    """Leaves one domain out: training tasks mix the others, and each held-out task is that domain.

    The data of a task: `train` `[classes, images]` and `query`, numbers of images over all domains, and
    with `teacher_data="support"` the `support` it was dealt. Its context: the images
    `x` `[classes * shots, height, width, channels]`, class by class, and their labels `y`.

    >>> from lohp_jax.data import domain_set
    >>> family = domain_family(domain_set("digits"), "45", shots=2)
    >>> data = family.sample(jax.random.key(0), "held_out")
    >>> family.context(data, jax.random.key(1))["x"].shape
    (20, 8, 8, 1)

    Args:
      domains: the images.
      held_out: the domain that no training task sees.
      network: a classifier, or the name of one for `make_network`.
      shots: support images per class.
      labels: whether a generator sees the labels of the support; without them there is no
        `context_loss`, and contexts have no `y`.
      teacher_data: as of `image_family`.
      batch_size: as of `image_family`.
      name: of the family.

    Raises: ValueError for a domain that there is not, with the nearest, fewer than two domains, images
      that are no real floats, an unknown `teacher_data` or network, more shots than images, or a
      `batch_size` that is not positive; `sample` raises it for an unknown split.
    """
    domains = domains._replace(**read_pools("domain_family", domains))
    _check_options(domains, held_out, teacher_data, shots, batch_size)
    num_classes, _, *shape = domains.train.shape[1:]
    net = network
    if isinstance(network, str):
        net = make_network(network, tuple(shape), num_classes)
    held = domains.domains.index(held_out)
    tasks = _DomainTasks(domains, held, net, shots, labels, teacher_data == "support", batch_size)
    return TaskFamily(
        tasks.sample,
        net.init,
        tasks.loss,
        tasks.evaluate,
        tasks.context,
        name=name,
        num_classes=num_classes,
        context_loss=tasks.context_loss if labels else None,
        support=ImageSupport(num_classes, tuple(shape)) if labels else None,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _DomainTasks:
    """The functions of a `domain_family`; `dealt`: whether `sample` deals the support."""

    domains: DomainSet
    held_out: int
    net: Network
    shots: int
    labels: bool
    dealt: bool
    batch_size: int | None

    def sample(self, key, split="train"):
        check_split(split)
        odds_key, train_key, query_key, support_key = jax.random.split(key, 4)
        log_odds = self._log_odds(odds_key, split)
        data = {
            "train": _draw(train_key, log_odds, self.domains.train),
            "query": _draw(query_key, log_odds, self.domains.query),
        }
        if self.dealt:
            data["support"] = self._deal(support_key, data["train"])
        return data

    def loss(self, params, data, key):
        images, labels = data["train"].reshape(-1), _labels(data["train"])
        if self.dealt:
            images, labels = images[data["support"]], labels[data["support"]]
        if self.batch_size is not None and self.batch_size < len(images):
            chosen = jax.random.choice(key, len(images), (self.batch_size,))
            images, labels = images[chosen], labels[chosen]
        return self._cross_entropy(params, _look_up(self.domains.train, images, labels), labels)

    def evaluate(self, params, data):
        labels = _labels(data["query"])
        images = _look_up(self.domains.query, data["query"].reshape(-1), labels)
        logits = self.net.apply(params, images)
        return {
            "accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == labels),
            "loss": mean_cross_entropy(logits, labels),
            "chance": jnp.float32(1 / len(data["query"])),
        }

    def context(self, data, key):
        index = data["support"] if self.dealt else self._deal(key, data["train"])
        labels = _labels(data["train"])[index]
        images = _look_up(self.domains.train, data["train"].reshape(-1)[index], labels)
        return {"x": images, "y": labels} if self.labels else {"x": images}

    def context_loss(self, params, context):
        return self._cross_entropy(params, context["x"], context["y"])

    def _log_odds(self, key: jax.Array, split: str) -> jax.Array:
        """`[domains]` log-odds of a domain's images, minus infinity where there are to be none."""
        held_out = jnp.arange(len(self.domains.domains)) == self.held_out
        if split == "held_out":
            return jnp.where(held_out, 0.0, -jnp.inf)
        return jnp.where(
            held_out, -jnp.inf, jax.random.loggamma(key, _CONCENTRATION, held_out.shape)
        )

    def _deal(self, key: jax.Array, train: jax.Array) -> jax.Array:
        return draw_support(key, _labels(train), jnp.arange(len(train)), self.shots)

    def _cross_entropy(self, params, images, labels):
        return mean_cross_entropy(self.net.apply(params, images), labels)


def _check_options(
    domains: DomainSet, held_out: str, teacher_data: str, shots: int, batch_size: int | None
) -> None:
    check_option("domain_family", "held_out", held_out, domains.domains)
    if len(domains.domains) < 2:
        raise ValueError(
            f"domain_family: expected two or more domains, to train on those that are not held out, got "
            f"{domains.domains}."
        )
    check_option("domain_family", "teacher_data", teacher_data, get_args(TeacherData))
    per_class = domains.train.shape[2]
    if not 1 <= shots <= per_class:
        raise ValueError(
            f"domain_family: shots must be between 1 and {per_class}, the training images per class of "
            f"a domain; got {shots}."
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"domain_family: batch_size must be at least 1, got {batch_size}.")


def _draw(key: jax.Array, log_odds: jax.Array, pool: np.ndarray) -> jax.Array:
    """`[classes, images]` numbers of images over all domains, drawn without replacement.

    The largest of log-odds plus Gumbel noise are such a draw (Kool et al., 2019).
    """
    classes, per_class = pool.shape[1:3]
    noise = jax.random.gumbel(key, (classes, len(log_odds) * per_class))
    return jax.lax.top_k(noise + jnp.repeat(log_odds, per_class)[None], per_class)[1]


def _labels(index: jax.Array) -> jax.Array:
    """`[classes * images]` the labels of numbers `[classes, images]`."""
    return jnp.repeat(jnp.arange(index.shape[0], dtype=jnp.int32), index.shape[1])


def _look_up(pool: np.ndarray, index: jax.Array, labels: jax.Array) -> jax.Array:
    """Images of `pool` by their class, and their number in it over all domains."""
    domain, image = jnp.divmod(index, pool.shape[2])
    return jnp.asarray(pool)[domain, labels, image]
