"""Meta-training of the small learned optimizer: its settings, its state, and what is trained."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from lohp_jax.optimizers.meta import Unroll, start_pairs, training_unroll
from lohp_jax.optimizers.small import small_optimizer, small_start, unpack_rate
from lohp_jax.training.engine import Training, each_step, step_keys
from lohp_jax.training.pes import MetaState, make_meta_update
from lohp_jax.workloads.meta_tasks import meta_family

METHOD = "meta"
"""What lines of metrics and checkpoints are called by."""
SEGMENT = 50
"""Steps of a comparison that are compiled in one piece."""


@dataclasses.dataclass(frozen=True)
class MetaConfig:
    """Everything that decides a meta-training run, its seed included."""

    seed: int = 0
    """Seed of the start, the tasks and the perturbations."""
    families: tuple[str, ...] = ("digits_mlp", "prototypes", "teacher")
    """Task families to train on, of `lohp_jax.workloads.meta_tasks`."""
    updates: int = 1000
    """Meta-updates."""
    pairs: int = 8
    """Antithetic pairs of unrolls of each family."""
    sigma: float = 0.02
    """Standard deviation of the perturbations."""
    truncation: int = 50
    """Inner steps between meta-updates."""
    shortest: int = 100
    """Steps of the shortest unroll."""
    longest: int = 2000
    """Steps of the longest unroll; lengths are log-uniform in between."""
    scale_range: float = 3.0
    """Tensors are trained divided by factors up to this or down to its inverse, log-uniform."""
    query_weight: float = 0.4
    """Weight of the loss on query examples, against the training loss, in the meta-loss."""
    inner_learning_rate: float = 0.015
    """Peak of the inner learning rate that meta-training starts from."""
    learning_rate: float = 0.005
    """Of Adam on the meta-parameters; falls to a tenth along a cosine."""
    clip_norm: float = 1.0
    """Largest norm of a meta-gradient."""
    log_every: int = 10
    """Meta-updates per compiled chunk, and per line of metrics."""
    checkpoint_every: int = 100
    """Meta-updates between checkpoints, a multiple of log_every."""
    probe_every: int = 200
    """Meta-updates between comparisons with Adam, a multiple of log_every."""
    probe_tasks: int = 8
    """Tasks of each family in a comparison."""
    probe_steps: int = 500
    """Inner steps in a comparison, a multiple of 50."""

    def __post_init__(self):
        for name in ("updates", "pairs", "log_every", "probe_tasks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}.")
        for name in ("sigma", "inner_learning_rate", "learning_rate", "clip_norm"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and positive, got {getattr(self, name)}.")
        for name in ("checkpoint_every", "probe_every"):
            if getattr(self, name) < 1 or getattr(self, name) % self.log_every:
                raise ValueError(
                    f"{name} must be a multiple of log_every={self.log_every}, "
                    f"got {getattr(self, name)}."
                )
        if self.probe_steps < SEGMENT or self.probe_steps % SEGMENT:
            raise ValueError(
                f"probe_steps must be a multiple of {SEGMENT}, got {self.probe_steps}."
            )
        if not self.families:
            raise ValueError("families must name at least one, got none.")
        make_unrolls(self)  # raises for what does not exist or makes no sense


def make_unrolls(config: MetaConfig) -> tuple[Unroll, ...]:
    """One unroll for each family."""
    return tuple(
        training_unroll(
            meta_family(name),
            small_optimizer,
            truncation=config.truncation,
            lengths=(config.shortest, config.longest),
            scale_range=config.scale_range,
            query_weight=config.query_weight,
        )
        for name in config.families
    )


def meta_optimizer(config: MetaConfig) -> optax.GradientTransformation:
    """Adam behind a global clip, its rate falling to a tenth along a cosine."""
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.updates, alpha=0.1)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.adam(schedule))


def initial_meta_state(config: MetaConfig, key: jax.Array) -> MetaState:
    """The state before the first meta-update."""
    start_key, *keys = jax.random.split(key, 1 + len(config.families))
    meta = small_start(start_key, learning_rate=config.inner_learning_rate)
    pairs = tuple(
        start_pairs(unroll, meta, k, config.pairs)
        for unroll, k in zip(make_unrolls(config), keys, strict=True)
    )
    return MetaState(meta, meta_optimizer(config).init(meta), pairs, jnp.zeros((), jnp.int32))


def meta_training(config: MetaConfig) -> Training:
    """Meta-training as the engine takes it; update t depends on the state and t alone."""
    init_key, key = jax.random.split(jax.random.key(config.seed))
    move = make_meta_update(make_unrolls(config), meta_optimizer(config), sigma=config.sigma)

    def update(state, keys, axis_name=None):
        state, values = move(state, keys, axis_name=axis_name)
        return state, values | unpack_rate(state.meta)._asdict()

    return Training(
        METHOD,
        functools.partial(initial_meta_state, config),
        update,
        each_step(lambda step: step_keys(key, step, config.pairs)),
        config.updates,
        start_from=(init_key,),
        log_every=config.log_every,
        advice="Start in another run directory with a lower learning_rate or sigma.",
    )
