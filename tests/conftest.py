"""Settings of JAX under test: strict shapes, typed keys and compiled programs kept between runs."""

import importlib.util
import os
import pathlib

import jax
import pytest

SHARED_DATA = pathlib.Path(__file__).parents[1].parent / "shared" / "data"

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


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """`prepared(name)` prepares a real set once and returns its `data_dir`."""
    import tensorflow_datasets as tfds

    script = SHARED_DATA / "seed_tfds_cache.py"
    if not script.exists():
        pytest.skip(f"needs the data in {SHARED_DATA.parent.name}/{SHARED_DATA.name}")
    spec = importlib.util.spec_from_file_location("seed_tfds_cache", script)
    seed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seed)
    data_dir = tmp_path_factory.mktemp("tfds")

    def prepare_once(name):
        tfds.disable_progress_bar()
        seed.prepare(name, data_dir)
        return data_dir

    return prepare_once
