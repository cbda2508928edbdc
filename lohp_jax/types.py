"""The types that the stages of the package hand to each other.

A `TaskFamily` makes tasks, an optimizer turns a task into a `Trajectory`, a `Method` says how a
generator is trained on trajectories, a `Generator` turns what may be seen of a task (its context)
into weights. Every array lacks a batch axis; `jax.vmap` adds it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

PyTree = Any
Params = PyTree
"""Weights of a network: a pytree of arrays."""
Split = Literal["train", "held_out"]


class Encoder(NamedTuple):
    """A network that reads contexts.

    Attributes:
      init: `(key, context) -> params`.
      apply: `(params, context) -> [rows, width]`: a row for each label, or one for the task.
    """

    init: Callable[[jax.Array, PyTree], PyTree]
    apply: Callable[[PyTree, PyTree], jax.Array]


class Support(NamedTuple):
    """How the contexts of a family are read.

    Attributes:
      check: `(context) -> None`, raises ValueError for a context that cannot be read; not pure.
      order: `(context) -> (context, rank)`, the same context with label c called `rank[c]`, an order
        that depends on the examples alone; None where labels keep their names, or there are none.
      encode: `(width) -> Encoder`.
      describe: `(context) -> [rows, F]`, a summary without anything learned, the same for any order of
        the examples; contexts of similar tasks have similar ones.
      inputs: `(context) -> [rows, P]`, a summary with a number for each of the P inputs of the network
        whose weights are generated, e.g. the mean of each pixel; None where there is none.
    """

    check: Callable[[PyTree], None]
    order: Callable[[PyTree], tuple[PyTree, jax.Array]] | None
    encode: Callable[[int], Encoder]
    describe: Callable[[PyTree], jax.Array]
    inputs: Callable[[PyTree], jax.Array] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class TaskFamily:
    """A distribution over tasks that share one network, as pure functions.

    Attributes:
      sample: `(key, split="train") -> data`; splits are disjoint by task, not only by example.
      init: `(key) -> params`, the random start of an optimizer.
      loss: `(params, data, key) -> scalar`, what a teacher minimises (the inner loss).
      evaluate: `(params, data) -> {"accuracy" or "objective": scalar, "loss": scalar}` on the task's
        own query examples, which no training ever sees. A higher accuracy is better, a lower objective.
        "chance", if it is there, is the same score of a prediction that sees no input.
      context: `(data, key) -> pytree`, everything that a generator may see of the task.
      name: what results and messages call it.
      num_classes: number of labels of one task; 0 where a task has no labels.
      class_axes: pytree like the params: the axis of a leaf that counts the labels, -1 for none;
        None where no leaf has such an axis. Permuting the labels of a task permutes these axes.
      context_loss: `(params, context) -> scalar`, the inner loss on the context alone.
      rename: `(data, order) -> data`, the same task with label c called `order[c]`; None where a task
        has no labels.
      support: how contexts are read. None for the generic reading: in a dict with an entry "x", all
        entries with the leading axis of "x" describe examples (a set), and everything else the task.
    """

    sample: Callable[..., PyTree]
    init: Callable[[jax.Array], Params]
    loss: Callable[[Params, PyTree, jax.Array], jax.Array]
    evaluate: Callable[[Params, PyTree], dict[str, jax.Array]]
    context: Callable[[PyTree, jax.Array], PyTree]
    name: str = ""
    num_classes: int = 0
    class_axes: PyTree | None = None
    context_loss: Callable[[Params, PyTree], jax.Array] | None = None
    rename: Callable[[PyTree, jax.Array], PyTree] | None = None
    support: Support | None = None


class Composite(NamedTuple):
    """An objective as f = g + h, g smooth and h with a proximal map, for proximal solvers.

    Attributes:
      smooth: `(x, problem) -> scalar`, g.
      prox: `(x, step, problem) -> x`, argmin_u h(u) + |u - x|^2 / (2 step).
      lipschitz: `(problem) -> scalar`, a bound on the Lipschitz constant of the gradient of g.
    """

    smooth: Callable[[jax.Array, PyTree], jax.Array]
    prox: Callable[[jax.Array, jax.Array, PyTree], jax.Array]
    lipschitz: Callable[[PyTree], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class ProblemFamily(TaskFamily):
    """A distribution over optimization problems: tasks whose params are one point `x [n]`.

    Of the fields it inherits: `sample` returns a problem, a dict of arrays; `loss(x, problem, key)` and
    "objective" and "loss" of `evaluate` are the objective; `context` is the problem itself.

    Attributes:
      objective: `(x, problem) -> scalar`, exact and differentiable almost everywhere.
      start: `(problem) -> x`, where the baselines start, e.g. at 0.
      solve: `(problem, key) -> x`, the label solver: as good a solution as is affordable by the
        thousand; jit- and vmap-able.
      frame: `(problem) -> (centre [n], scale [n])`: where solutions are, and how far from it, as far
        as the problem shows cheaply; solutions in these coordinates, (x - centre) / scale, are of
        about unit size.
      features: `(problem) -> [F]`, the parameters of the problem as one vector of about unit entries,
        without what hands over the optimum.
      check: `(problem) -> None`, raises ValueError for a problem that no solver can use; not pure.
      composite: for proximal solvers; None for a smooth objective.
      certificate: `(x, problem) -> scalar`, how far the objective at x can be above the minimum, e.g. a
        duality gap; None where nothing proves it.
    """

    objective: Callable[[jax.Array, PyTree], jax.Array] | None = None
    start: Callable[[PyTree], jax.Array] | None = None
    solve: Callable[[PyTree, jax.Array], jax.Array] | None = None
    frame: Callable[[PyTree], tuple[jax.Array, jax.Array]] | None = None
    features: Callable[[PyTree], jax.Array] | None = None
    check: Callable[[PyTree], None] | None = None
    composite: Composite | None = None
    certificate: Callable[[jax.Array, PyTree], jax.Array] | None = None


class Progress(NamedTuple):
    """What a caller of a training may show after each chunk.

    Attributes:
      method: what is trained.
      step: updates so far.
      updates: updates in all.
      metrics: means over the chunk, as plain numbers and arrays.
      updates_per_second: of the chunk, with the compilation that the first one waits for.
    """

    method: str
    step: int
    updates: int
    metrics: dict[str, Any]
    updates_per_second: float


class Trajectory(NamedTuple):
    """What one optimizer run leaves behind.

    Attributes:
      states: pytree of weights with leading axis `T + 1`; entry 0 is the start.
      losses: `[T + 1]` inner loss at each state.
      optimizer: name of the optimizer, or its index where runs of several are stacked.
    """

    states: Params
    losses: jax.Array
    optimizer: Any


class TokenLeaf(NamedTuple):
    """One leaf of a structure of weights, as tokens have it.

    Attributes:
      number: in the order of the pytree.
      path: of the leaf, as `jax.tree_util.keystr` writes it.
      layer: path of what holds it.
      axis: its class axis, -1 for none.
      shape: of the leaf.
      dtype: of the leaf.
      size: numbers of one label, or of the leaf where there is no class axis.
      tokens: that they fill.
    """

    number: int
    path: str
    layer: str
    axis: int
    shape: tuple[int, ...]
    dtype: np.dtype
    size: int
    tokens: int


@dataclasses.dataclass(frozen=True, eq=False)
class Codec:
    """A bijection between one structure of weights and tokens.

    Attributes:
      encode: `params -> [length, channels]`.
      decode: `[length, channels] -> params`; padding is ignored.
      length: number of tokens.
      mask: `[length, channels]` bool, False where a number is padding.
      shared_length: number of leading tokens that belong to no label.
      num_classes: number of blocks after them; 0 without class axes.
      lay_out: `params -> [length, channels]` of the values themselves, whatever the scale is.
      describe: `() -> [length, F]`, makes `features`.
      leaves: in the order of the tokens: shared ones, then those of one label.
      standard: centres and scales of the leaves, in the order of the pytree; None for raw weights.
    """

    encode: Callable[[Params], jax.Array]
    decode: Callable[[jax.Array], Params]
    length: int
    mask: np.ndarray
    shared_length: int
    num_classes: int
    lay_out: Callable[[Params], jax.Array]
    describe: Callable[[], np.ndarray]
    leaves: tuple[TokenLeaf, ...]
    standard: tuple[list[Any], list[Any]] | None

    @functools.cached_property
    def features(self) -> np.ndarray:
        """`[length, F]` float32, what is known of each token, made when it is first asked for.

        One-hot layer, one-hot kind (scalar or vector, matrix, kernel of a convolution), log10 of the
        layer's fan-in and fan-out, position in its leaf in [0, 1].
        """
        return self.describe()


class Windows(NamedTuple):
    """How the tokens of a codec are cut into windows, see `lohp_jax.windows.make_windows`.

    Attributes:
      codec: whose tokens.
      size: tokens of a window; the last one of a block is padded.
      shared: number of windows over the tokens that belong to no label.
      own: number of windows over the tokens of one label.
    """

    codec: Codec
    size: int
    shared: int
    own: int

    @property
    def count(self) -> int:
        """Number of all windows: the shared ones, then label by label."""
        return self.shared + self.own * self.codec.num_classes


class View(NamedTuple):
    """Which window is looked at; leading axes pass through.

    Attributes:
      index: int32 scalar, the number of the window.
      start: `[size, channels]` tokens of theta_0 there, scaled to about 1.
    """

    index: jax.Array
    start: jax.Array


MIXED = -1
"""A teacher of a `Space` that is none of its kinds but any of them."""


class Space(NamedTuple):
    """What a method may know before it sees an example: where weights live, and what walks there.

    Attributes:
      family: the tasks.
      codec: weights <-> tokens, standardised: theta_0 is the origin.
      theta_0: the shared start of all trajectories.
      num_steps: N, steps of a walk; a stored trajectory has N + 1 matched states.
      num_teachers: how many kinds of trajectories there are.
      teacher: the kind to imitate, from 0; `MIXED` for one that every walk draws anew.
    """

    family: TaskFamily
    codec: Codec
    theta_0: Params
    num_steps: int
    num_teachers: int
    teacher: int


class Example(NamedTuple):
    """One stored trajectory as the loss of a method sees it.

    Attributes:
      tokens: `[N + 1, length, channels]` the matched states, standardised.
      teacher: int32 scalar, the kind of trajectory.
      context: what a generator may see of the task, drawn anew for every update.
      data: the task itself, for losses that need it.
      view: the window that the tokens are of, `[N + 1, size, channels]`; None for whole networks.
      around: `[N + 1, length, channels]` the states of the whole network, for methods of windows that
        see it; None for others.
    """

    tokens: jax.Array
    teacher: jax.Array
    context: PyTree
    data: PyTree
    view: View | None = None
    around: jax.Array | None = None


class Windowed(NamedTuple):
    """What a method that sees windows can do with one of them.

    Attributes:
      windows: how tokens are cut.
      view: `(index [...]) -> View` on the host, with the leading axes of the index.
      encode: `(params, context, key, guidance) -> seen`, what all windows of a walk see.
      walk: `(params, seen, key, view, *, temperature, num_steps, guidance) -> [S, size, channels]`, the
        states of one window; the last one is what is generated. None for a method that sees the whole
        network at every step, so that no window can be walked apart; its updates see `Example.around`.
    """

    windows: Windows
    view: Callable[[np.ndarray], View]
    encode: Callable[..., PyTree] | None = None
    walk: Callable[..., jax.Array] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """One way to train a generator: a few pure functions of one example.

    A method that must know more than its example, such as the layout of the weights or the family,
    gives `bind` in place of the three functions.

    Attributes:
      name: what checkpoints and results call it.
      init: `(key, example) -> params`, any pytree of arrays.
      loss: `(params, example, key) -> (scalar, info)`; info is a dict of arrays to be reported.
      walk: `(params, context, key, *, temperature, num_steps, guidance) -> [S, length, channels]`,
        the states of one walk; the last one is what is generated.
      bind: `(space) -> Method` with the three functions.
      starts_from: the method that is trained first and whose params this one goes on from.
      share: updates, as a share of those asked for.
      check: `(family) -> None`, raises ValueError for a family that it cannot serve, before anything is
        prepared; None for a method that takes any.
      calibrate: `(params, contexts) -> params`, after the last update, from contexts of training tasks
        with a leading axis; None for a method that measures nothing against them.
      appraise: `(params, context, key) -> dict` of scalars that say what a walk met: at least
        `familiarity`, in (0, 1]; None for a method that knows no such thing.
      gradients: of the task's loss, that a walk of all steps evaluates.
      forward_passes: evaluations without a gradient, of the method's network or of the task's loss, of a
        walk of all steps.
      config: JSON values that say how it was made; saved in every checkpoint.
      window: tokens that it sees at once; None for the whole network.
      windowed: what it does with a window, once bound.
    """

    name: str
    init: Callable[[jax.Array, Example], PyTree] | None = None
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]] | None = None
    walk: Callable[..., jax.Array] | None = None
    bind: Callable[[Space], "Method"] | None = None
    starts_from: "Method | None" = None
    share: float = 1.0
    check: Callable[[TaskFamily], None] | None = None
    calibrate: Callable[[PyTree, PyTree], PyTree] | None = None
    appraise: Callable[..., dict[str, jax.Array]] | None = None
    gradients: int = 0
    forward_passes: int = 0
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    window: int | None = None
    windowed: Windowed | None = None

    def __post_init__(self):
        missing = [f for f in ("init", "loss", "walk") if getattr(self, f) is None]
        if self.bind is None and missing:
            raise ValueError(
                f"Method {self.name!r}: expected init, loss and walk, or bind, got no {missing[0]}."
            )
        if not self.share > 0:
            raise ValueError(f"Method {self.name!r}: share must be positive, got {self.share}.")

    def bound(self, space: Space) -> "Method":
        """The method with its three functions, in a space.

        Raises: ValueError for a family that the method cannot serve.
        """
        if self.check is not None:
            self.check(space.family)
        return self if self.bind is None else self.bind(space)


class Pieces(NamedTuple):
    """Weights made a part at a time.

    Attributes:
      like: what the parts make up, a pytree of `jax.ShapeDtypeStruct`.
      make: `(params, context, key, *, temperature, num_steps, guidance) -> iterator` over
        `(number, index, values)`: values of the flattened leaf `number` of `like`, at a slice or at the
        numbers of an array. `key` is that of one sample, as of `apply`.
    """

    like: PyTree
    make: Callable[..., Iterator[tuple[int, slice | np.ndarray, np.ndarray]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generator:
    """Maps what may be seen of a task to weights; a pytree whose leaves are those of `params`.

    Attributes:
      apply: `(params, context, key, *, temperature, num_steps, guidance) -> weights`, one pure
        function for one task and one sample. `temperature` may be traced; `num_steps` (None: all)
        and `guidance` are static.
      params: what `apply` was trained to; a pytree.
      family: name of the task family.
      config: the settings that made it, if any.
      check: `(context) -> None`, raises ValueError for a context that `apply` cannot use.
      path: like `apply`, but returns the weights at every step with a leading axis; None for
        generators that take none.
      gradients: gradient evaluations that it spends on a task.
      forward_passes: evaluations without a gradient, of its own network or of the task's loss, that it
        spends on a task.
      appraise: `(params, context, key) -> dict` of scalars, see `Method`; None where there is none.
      pieces: makes the same weights a part at a time, for `stream_weights`; None where it cannot.
    """

    apply: Callable[..., Params] = dataclasses.field(metadata={"static": True})
    params: PyTree
    family: str = dataclasses.field(default="", metadata={"static": True})
    config: Any = dataclasses.field(default=None, metadata={"static": True})
    check: Callable[[PyTree], None] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    path: Callable[..., Params] | None = dataclasses.field(default=None, metadata={"static": True})
    gradients: int = dataclasses.field(default=0, metadata={"static": True})
    forward_passes: int = dataclasses.field(default=0, metadata={"static": True})
    appraise: Callable[..., dict[str, jax.Array]] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    pieces: Pieces | None = dataclasses.field(default=None, metadata={"static": True})
