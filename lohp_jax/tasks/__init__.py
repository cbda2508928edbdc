"""Families of tasks by name."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, get_args

from lohp_jax.checks import check_option
from lohp_jax.tasks import named
from lohp_jax.tasks.images import TeacherData
from lohp_jax.tasks.splits import Holdout
from lohp_jax.types import TaskFamily


class Entry(NamedTuple):
    """A family before its data are known.

    Attributes:
      summary: of its tasks, in one line.
      make: `(name, **arguments) -> TaskFamily`, with the arguments of `make_family`.
      network: default classifier.
      shots: default support images per label.
      data: default source of images.
      holdout: default of what is held out.
      options: arguments of its own with their defaults.
    """

    summary: str
    make: Callable[..., TaskFamily]
    network: str
    shots: int
    data: str = "digits"
    holdout: Holdout = "tasks"
    options: Mapping[str, Any] = {}


FAMILIES = {
    "digits_5way": Entry(
        "Five classes out of all, in a random order of labels.",
        named.n_way,
        "linear",
        10,
        options={"way": 5, "image_size": None},
    ),
    "digits_partitions": Entry(
        "All classes, split in two.", named.partitions, "mlp", 50, options={"image_size": None}
    ),
    "omniglot": Entry(
        "New characters from an image of each: a whole network.",
        named.omniglot,
        "conv4",
        1,
        "tfds:omniglot",
        "classes",
        {"way": 5, "filters": 64},
    ),
    "omniglot_heads": Entry(
        "New characters from an image of each: a head over a backbone of other characters.",
        named.omniglot_heads,
        "linear",
        1,
        "tfds:omniglot",
        "classes",
        {"way": 5, "filters": 64, "backbone": None},
    ),
    "transfer": Entry(
        "Heads over a backbone, of one image set for training and of others to be tested on.",
        named.transfer,
        "linear",
        10,
        "tfds:cifar10",
        "classes",
        {"way": 5, "filters": 64, "backbone": None, "targets": ("tfds:mnist", "digits")},
    ),
    "domains": Entry(
        "The same classes in several domains, one of which is held out.",
        named.domains,
        "linear",
        5,
        options={"domain": None},
    ),
}


def make_family(
    name: str,
    *,
    data: str | None = None,
    data_dir: str | None = None,
    network: str | None = None,
    shots: int | None = None,
    teacher_data: TeacherData = "full",
    holdout: Holdout | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    **options: Any,
) -> TaskFamily:
    """Builds a task family by name.

    Args:
      name: a key of `FAMILIES`.
      data: "digits", or "tfds:NAME" for an image set of TensorFlow Datasets on this machine; "domains"
        turns these by six angles, and takes "folder:PATH" too, see `domain_set`; None for the family's
        default, as wherever None is not explained.
      data_dir: where TensorFlow Datasets are; None for its default.
      network: "linear", "mlp", "conv" or "conv4".
      shots: support images per label.
      teacher_data: what teachers see, "full" or "support"; see `image_family`.
      holdout: what is held out, "tasks" or "classes".
      batch_size: images per step of a teacher; None for all.
      seed: picks what is held out, and trains a backbone.
      **options: those that the `Entry` of the family has: `image_size`, the side in pixels to which
        images of TensorFlow Datasets are cut and resized, None to leave them; `way`, classes of a task;
        `filters`, channels of "conv4", and of a backbone; `backbone`, directory of a backbone and its
        features, made there if there are none, None to make them anew in every process, which takes
        minutes; `targets`, sources of images that held-out tasks are of; `domain`, what "domains" holds
        out, e.g. "45", None to let `seed` pick.

    Raises: ValueError for an unknown name, with the nearest one, for bad options, and for an option that
      the family does not take; also what `image_set` or `domain_set` raises.
    """
    check_option("make_family", "name", name, FAMILIES)
    entry = FAMILIES[name]
    holdout = entry.holdout if holdout is None else holdout
    check_option("make_family", "holdout", holdout, get_args(Holdout))
    return entry.make(
        name,
        data=entry.data if data is None else data,
        data_dir=data_dir,
        network=entry.network if network is None else network,
        shots=entry.shots if shots is None else shots,
        teacher_data=teacher_data,
        holdout=holdout,
        batch_size=batch_size,
        seed=seed,
        **_options(name, options),
    )


def _options(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The options of a family, those that are not given by default.

    Raises: ValueError for one that it does not take.
    """
    taken = FAMILIES[name].options
    known = {option: None for entry in FAMILIES.values() for option in entry.options}
    given = {option: value for option, value in given.items() if value is not None}
    for option, value in given.items():
        check_option("make_family", "an option", option, known)
        if option not in taken:
            takers = [n for n, entry in FAMILIES.items() if option in entry.options]
            raise ValueError(
                f"make_family: {name!r} takes no {option}, got {value!r}; leave it out, or ask for one "
                f"of {takers}."
            )
    return {**taken, **given}
