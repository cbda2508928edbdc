"""The family of a run: one of the table, or one of the user's own."""

import functools

from lohp_jax.runs.config import RunConfig
from lohp_jax.runs.find import find_family
from lohp_jax.tasks import make_family
from lohp_jax.types import TaskFamily


@functools.lru_cache(maxsize=4)
def family_of(config: RunConfig) -> TaskFamily:
    """The task family of a resolved config; its data are read once for all stages of a run.

    Raises: what `make_family` or `find_family` raise.
    """
    if ":" in config.family:
        return find_family(config.family)
    tasks = config.tasks
    return make_family(
        config.family,
        data=tasks.data,
        data_dir=tasks.data_dir,
        network=tasks.network,
        shots=tasks.shots,
        teacher_data=tasks.teacher_data,
        holdout=tasks.holdout,
        batch_size=tasks.batch_size,
        seed=config.seed,
    )
