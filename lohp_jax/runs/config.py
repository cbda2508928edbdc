"""Settings of a run: frozen dataclasses, checked when made, saved with every result.

The command line derives from them; `to_json` and `from_json` carry them to disk and back.
"""

import dataclasses
import inspect
import math
import types
import typing
from typing import Any, Literal

from lohp_jax.checks import check_option
from lohp_jax.fitting import FitConfig
from lohp_jax.methods import METHODS
from lohp_jax.networks.policy import NetworkConfig
from lohp_jax.policy.config import FeedbackConfig, HybridConfig
from lohp_jax.runs.find import find_method
from lohp_jax.tasks import FAMILIES
from lohp_jax.trajectories.matching import Matching
from lohp_jax.types import Method

RIVALS = ("maml", "maml_first_order", "reptile", "prototypes")
"""Names of `EvaluationConfig.rivals`."""


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def _finite(name: str, value: float, *, zero: bool) -> None:
    if not (0 <= value < math.inf) or (value == 0 and not zero):
        wanted = "finite and not negative" if zero else "finite and positive"
        raise ValueError(f"{name} must be {wanted}, got {value}.")


@dataclasses.dataclass(frozen=True)
class FamilyConfig:
    """Which tasks, and who sees what of them."""

    data: str | None = None
    """"digits", "tfds:NAME" for an image set of TensorFlow Datasets on this machine, or for domains also
    "folder:PATH" for files DOMAIN/CLASS/NAME in a folder or zip archive; unset for the family's
    default."""
    data_dir: str | None = None
    """Where TensorFlow Datasets are; unset for its default."""
    image_size: int | None = None
    """Side in pixels to which images of TensorFlow Datasets are cut and resized; unset leaves them."""
    network: Literal["linear", "mlp", "conv", "conv4"] | None = None
    """The classifier; unset for the family's default."""
    shots: int | None = None
    """Support images per label; unset for the family's default."""
    teacher_data: Literal["full", "support"] = "full"
    """Images the teachers train on: all of the task's, or the support the generator sees."""
    holdout: Literal["tasks", "classes"] | None = None
    """What no training task shares with a held-out one: the combination of classes, or classes; unset
    for the family's default."""
    batch_size: int | None = None
    """Images per step of a teacher; unset for all."""
    way: int | None = None
    """Classes of a task; unset for the family's default."""
    filters: int | None = None
    """Channels of the network conv4, and of a backbone; unset for the family's default."""
    backbone: str | None = None
    """Directory of a frozen backbone and its features, made there if there are none; unset to make
    them anew in every process."""
    targets: tuple[str, ...] | None = None
    """Sources of images that held-out tasks of transfer are of; unset for the family's default."""
    domain: str | None = None
    """What the family domains holds out; unset lets the seed pick."""


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Stage 1, the trajectories."""

    num_tasks: int | None = None
    """Training tasks; unset for the family's default."""
    optimizers: tuple[str, ...] | None = None
    """Teachers, as "adam" or with a learning rate "adam:0.01", "hub:0.05", "sam:adam:0.1", "velo:FILE";
    unset for the family's default."""
    num_steps: int | None = None
    """T, steps of every teacher; unset for the family's default."""
    start: Literal["shared", "independent"] = "shared"
    """One theta_0 for all runs, or a fresh one for each."""
    start_noise: float = 0.01
    """Standard deviation of the noise on a shared theta_0, in units of the weights."""
    record_every: int = 1
    """Steps from one stored state to the next; must divide training.compression."""

    def __post_init__(self):
        _at_least("num_tasks", self.num_tasks, 2)
        _at_least("record_every", self.record_every, 1)
        _at_least("num_steps", self.num_steps, 1)
        if self.optimizers is not None:
            _at_least("the number of optimizers", len(self.optimizers), 1)
        if self.start not in ("shared", "independent"):
            raise ValueError(f"start must be 'shared' or 'independent', got {self.start!r}.")
        _finite("start_noise", self.start_noise, zero=True)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Stage 2, shared by every learned method."""

    compression: int | None = None
    """k, optimizer steps that one generated step stands for; must divide num_steps. Unset for the
    family's default."""
    matching: Matching = "uniform"
    """How the matched states are spread over a trajectory."""
    updates: int | None = None
    """Updates of the main method and of cloning; unset for the family's default."""
    channels: int = 16
    """Weights per token."""
    batch_size: int | None = None
    """Trajectories per update, an even number; unset for the family's default."""
    learning_rate: float = 3e-3
    """Peak of the schedule: a linear warm-up, then a cosine down to a hundredth."""
    clip_norm: float = 1.0
    """Largest global norm of a gradient."""
    anchor: float = 0.0
    """Weight of the likelihood of stored transitions, added to the balance objective."""
    consolidation: float = 1.0
    """Weight of the task loss of generated weights in `lohp_consolidated`."""
    log_every: int = 50
    """Updates per compiled chunk, and per line of metrics."""
    checkpoint_every: int = 200
    """Updates between checkpoints, a multiple of log_every."""

    def __post_init__(self):
        for name in ("log_every", "checkpoint_every", "compression", "updates"):
            _at_least(name, getattr(self, name), 1)
        if self.batch_size is not None and (self.batch_size < 2 or self.batch_size % 2):
            raise ValueError(f"batch_size must be even and at least 2, got {self.batch_size}.")
        for name in ("learning_rate", "clip_norm"):
            _finite(name, getattr(self, name), zero=False)
        for name in ("anchor", "consolidation"):
            _finite(name, getattr(self, name), zero=True)
        if self.checkpoint_every % self.log_every:
            raise ValueError(
                f"checkpoint_every must be a multiple of log_every={self.log_every}, "
                f"got {self.checkpoint_every}."
            )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The held-out comparison."""

    num_tasks: int = 256
    """Held-out tasks, and networks per call in the batched latency."""
    baselines: bool = True
    """Whether what a user would try first has rows, too: Adam and AdamW on the support, a ridge probe,
    the mean of the training weights, ridge regression, the nearest training task and, where labels mean
    the same in all tasks, one network for all (ERM). Tuning Adam is most of an evaluation's time."""
    rivals: tuple[str, ...] = ()
    """Rivals that are trained over tasks, in every evaluation: maml, maml_first_order, reptile,
    prototypes."""
    rival_updates: int = 1000
    """Updates of each training of a rival, of 25 tasks; the first three are trained for three rates."""

    def __post_init__(self):
        _at_least("num_tasks", self.num_tasks, 2)
        _at_least("rival_updates", self.rival_updates, 1)
        for rival in self.rivals:
            check_option("EvaluationConfig", "rivals", rival, RIVALS)
        if len(set(self.rivals)) < len(self.rivals):
            raise ValueError(f"rivals must name none twice, got {self.rivals}.")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run, its seed included."""

    family: str = "digits_5way"
    """Name of the task family, see `lohp tasks`; or where one of your own is, as
    package.module:attribute or path/to/file.py:attribute."""
    seed: int = 0
    """Seed of the split, of theta_0, of training and of evaluation."""
    methods: tuple[str, ...] = (
        "lohp",
        "cloning",
        "hypernetwork",
        "hypernetwork_regression",
        "paper_literal",
    )
    """Learned methods to train, the first of which the report is about, by name or as
    path/to/file.py:attribute; those that need no training are always evaluated. With network.window the
    default is without those that need whole networks."""
    tasks: FamilyConfig = FamilyConfig()
    prepare: PrepareConfig = PrepareConfig()
    network: NetworkConfig = NetworkConfig()
    balance: HybridConfig = HybridConfig()
    loop: FeedbackConfig = FeedbackConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self):
        _at_least("seed", self.seed, 0)
        for method in self.methods:
            if ":" not in method:
                check_option("RunConfig", "methods", method, METHODS)
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(
                f"methods must name one at least and none of them twice, got {self.methods}."
            )

    def fitting(self) -> FitConfig:
        """What concerns preparation and training; of a resolved config."""
        shared = {field.name for field in dataclasses.fields(FitConfig)}
        groups = dataclasses.asdict(self.prepare) | dataclasses.asdict(self.training)
        return FitConfig(**{name: value for name, value in groups.items() if name in shared})

    def method(self, name: str) -> Method:
        """A method of the table with the settings of this config that it takes, or one of your own.

        Args:
          name: in the table, or where a `Method` is, see `find_method`.
        """
        if ":" in name:
            return find_method(name)
        given = {"network": self.network, "balance": self.balance, "loop": self.loop}
        given |= {name: getattr(self.training, name) for name in ("anchor", "consolidation")}
        taken = inspect.signature(METHODS[name]).parameters
        return METHODS[name](**{name: value for name, value in given.items() if name in taken})


WINDOWED = ("lohp", "cloning", "hypernetwork_regression")
"""Those of the default methods whose loss separates over weights, which windows need."""

_HEADS = {
    "prepare": {"optimizers": ("adam:0.03",), "num_steps": 50, "num_tasks": 1000},
    "training": {"compression": 10, "updates": 1000, "batch_size": 16},
}
_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "digits_5way": {
        "prepare": {
            "optimizers": ("sgd:1", "adam:0.1", "sam:1"),
            "num_steps": 20,
            "num_tasks": 300,
        },
        "training": {"compression": 4, "updates": 600, "batch_size": 16},
    },
    "digits_partitions": {
        "prepare": {"optimizers": ("adam:0.003",), "num_steps": 120, "num_tasks": 1000},
        "training": {"compression": 60, "updates": 2000, "batch_size": 16},
    },
    "omniglot": {
        "prepare": {"optimizers": ("adam:0.003",), "num_steps": 60, "num_tasks": 200},
        "training": {"compression": 20, "updates": 600, "batch_size": 8},
    },
    "omniglot_heads": _HEADS,
    "transfer": _HEADS,
    "domains": {
        "prepare": {"optimizers": ("adam:0.03",), "num_steps": 20, "num_tasks": 300},
        "training": {"compression": 4, "updates": 2000, "batch_size": 16},
    },
}
_OF_ONES_OWN = {
    "prepare": {"optimizers": ("adam:0.01",), "num_steps": 100, "num_tasks": 500},
    "training": {"compression": 20, "updates": 1000, "batch_size": 16},
}
"""Defaults of a family that is not in the table."""


def resolve(config: RunConfig) -> RunConfig:
    """Fills what a config left to the family's defaults, and checks what depends on several fields.

    Raises: ValueError for an unknown family (with the nearest), settings of the table's families that
      one of your own does not have, a compression that does not divide the number of steps (with
      those that do), or states that are not stored where it matches them.
    """
    if ":" in config.family:
        defaults = _OF_ONES_OWN
        if config.tasks != FamilyConfig():
            raise ValueError(
                f"tasks.* are settings of the families that `lohp tasks` lists, got {config.tasks} with "
                f"{config.family!r}; set them where that family is made."
            )
    else:
        check_option("RunConfig", "family", config.family, FAMILIES)
        entry = FAMILIES[config.family]
        defaults = _DEFAULTS[config.family] | {
            "tasks": {
                "network": entry.network,
                "shots": entry.shots,
                "data": entry.data,
                "holdout": entry.holdout,
                **entry.options,
            }
        }
    filled = {}
    for group, values in defaults.items():
        section = getattr(config, group)
        unset = {name: value for name, value in values.items() if getattr(section, name) is None}
        filled[group] = dataclasses.replace(section, **unset)
    if config.network.window is not None and config.methods == RunConfig.methods:
        filled["methods"] = WINDOWED
    config = dataclasses.replace(config, **filled)
    config.fitting()
    return config


def to_json(config: RunConfig) -> dict[str, Any]:
    """The config as nested dicts, lists, strings and numbers."""
    return dataclasses.asdict(config)


def from_json(values: dict[str, Any], kind: type = RunConfig, path: str = "config") -> Any:
    """Builds a config from nested dicts, as `to_json` makes them.

    Args:
      values: of the fields; those left out take their defaults.
      kind: the dataclass to build.
      path: what messages call it.

    Raises: ValueError for a field that does not exist (with the nearest one), or a value of the wrong
      type or out of range.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a group of fields, got {values!r}.")
    hints = typing.get_type_hints(kind)
    arguments = {}
    for name, value in values.items():
        check_option(path, "a field", name, hints)
        arguments[name] = convert(value, hints[name], f"{path}.{name}")
    return kind(**arguments)


def convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as `hint` has it: a dataclass, Literal, `tuple[X, ...]`, str, bool, int or float."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # of a type and None
        if value is None:
            return None
        hint = next(h for h in typing.get_args(hint) if h is not types.NoneType)
    if dataclasses.is_dataclass(hint):
        return from_json(value, hint, path)
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise ValueError(f"{path}: expected one of {typing.get_args(hint)}, got {value!r}.")
        return value
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{path}: expected a list, got {value!r}.")
        item = typing.get_args(hint)[0]
        return tuple(convert(v, item, f"{path}[{i}]") for i, v in enumerate(value))
    accepted = (int, float) if hint is float else hint
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{path}: expected {hint.__name__}, got {value!r}.")
    return hint(value)
