"""Settings of JAX under test: strict shapes, typed keys and compiled programs kept between runs."""

import os

import jax
import pytest

# most of the time of the tests is XLA's: programs that run once are not worth optimizing
FASTER_COMPILATION = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):  # XLA ends the process at a flag that it does not know
    FASTER_COMPILATION.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FASTER_COMPILATION])


def pytest_configure(config: pytest.Config):
    jax.config.update("jax_numpy_rank_promotion", "raise")  # `[T] + [T, D]` becomes an error
    jax.config.update("jax_legacy_prng_key", "error")  # keys are made by `jax.random.key`
    if hasattr(config, "cache"):  # not with `-p no:cacheprovider`
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]):
    """Skips what is marked as slow, unless the expression of `-m` names the marker."""
    if "slow" in config.option.markexpr:
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run it with -m slow"))
