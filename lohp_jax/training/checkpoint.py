"""Checkpoints that a killed writer, a full disk or a flipped bit cannot pass off as whole.

    directory/
      step_100/          one complete checkpoint
        manifest.json      config, leaves of the state, SHA-256 of every other file; written last
        state/, ...        the arrays, as Orbax writes them
      step_200.1/        step 200, saved a second time

`manifest.json` appears in one piece, by a rename. A folder without it is half-written: it is never
read, and the next save removes it. Orbax's own checksums do not cover the arrays' bytes.
"""

import contextlib
import functools
import hashlib
import json
import operator
import os
import pathlib
import re
import shutil
from collections.abc import Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lohp_jax.files import write_atomically
from lohp_jax.types import PyTree

_MANIFEST = "manifest.json"
_FOLDER = re.compile(r"step_(\d+)(?:\.(\d+))?")
_LEFTOVER = re.compile(_FOLDER.pattern + r"\.orbax-checkpoint-tmp.*")


def save(
    directory: str | os.PathLike,
    step: int,
    state: PyTree,
    config: dict[str, Any],
    *,
    keep: int = 3,
) -> None:
    """Writes a checkpoint, then removes all but the newest `keep`.

    No older checkpoint goes before the new one is complete; one of the same step is replaced.
    Leftovers of a killed writer are removed first. With several processes, all must call.

    Args:
      directory: holds the checkpoints of one run; made if absent.
      step: what the checkpoint is called by, >= 0.
      state: pytree of arrays, keys of `jax.random.key` included, the same on all devices;
        none of size zero.
      config: settings as JSON knows them, e.g. from `dataclasses.asdict`; tuples become lists.
      keep: how many checkpoints stay, >= 1; the one just written always does.

    Raises: ValueError for a negative `step`, `keep` < 1, a config that JSON cannot hold or a leaf
      that is no array; OSError from the disk, a full one included: older checkpoints stay whole.
    """
    from orbax.checkpoint import v1 as ocp  # here, for a light `import lohp_jax`

    step, directory = operator.index(step), pathlib.Path(directory).absolute()
    if step < 0 or keep < 1:
        raise ValueError(f"save: expected step >= 0 and keep >= 1, got step={step}, keep={keep}.")
    content = {"step": step, "config": _as_json(config), "leaves": _describe("save", state)}
    content["keys"] = _key_impls(state)
    arrays = jax.device_get(jax.tree.map(_without_key, state))
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_all_but(_complete(directory).values(), directory)
    multihost_utils.sync_global_devices("checkpoint: swept")
    folder = _next_folder(directory, step)
    with _disk_errors(folder):
        ocp.save(folder, arrays)
    if jax.process_index() == 0:
        _write_manifest(folder, content | {"files": _hash_files(folder)})
        _remove_all_but(_newest(_complete(directory), step, keep), directory)
    multihost_utils.sync_global_devices("checkpoint: complete")


def restore(
    directory: str | os.PathLike, template: PyTree, step: int | None = None
) -> tuple[int, PyTree]:
    """Reads a checkpoint back, bit for bit, onto the default device.

    Reads every byte twice: once for its checksum, once for the arrays.

    Args:
      directory: as given to `save`.
      template: the state expected, of arrays or `jax.ShapeDtypeStruct`.
      step: None for the latest.

    Returns: step and state.

    Raises: FileNotFoundError if there is no such checkpoint; ValueError if the checkpoint is
      damaged or holds another state than `template`. Nothing is deleted.
    """
    from orbax.checkpoint import v1 as ocp  # here, for a light `import lohp_jax`

    step, folder = _find(directory, step)
    manifest = _read_manifest(step, folder)
    _check_files(step, folder, manifest["files"])
    _check_template(step, manifest["leaves"], _describe("restore", template))
    arrays = ocp.load(folder, jax.tree.map(_numpy_template, template))
    return step, jax.tree.map_with_path(functools.partial(_on_device, manifest["keys"]), arrays)


def read_config(directory: str | os.PathLike, step: int | None = None) -> dict[str, Any]:
    """The config that was saved with a checkpoint (None: the latest).

    Raises: FileNotFoundError if there is no such checkpoint, ValueError if its manifest is damaged.
    """
    return _read_manifest(*_find(directory, step))["config"]


def all_steps(directory: str | os.PathLike) -> list[int]:
    """Steps of the complete checkpoints, ascending; none where the directory is absent."""
    return sorted(_complete(pathlib.Path(directory).absolute()))


def latest_step(directory: str | os.PathLike) -> int | None:
    """Step of the latest complete checkpoint, or None."""
    return max(all_steps(directory), default=None)


def _complete(directory: pathlib.Path) -> dict[int, pathlib.Path]:
    """Folders of the complete checkpoints by step; of a step saved again, the last one."""
    found = []
    for manifest in directory.glob(f"step_*/{_MANIFEST}"):
        if match := _FOLDER.fullmatch(manifest.parent.name):
            found.append((int(match[1]), int(match[2] or 0), manifest.parent))
    return {step: folder for step, _, folder in sorted(found)}


def _find(directory: str | os.PathLike, step: int | None) -> tuple[int, pathlib.Path]:
    directory = pathlib.Path(directory).absolute()
    found = _complete(directory)
    if not found:
        raise FileNotFoundError(
            f"restore: no complete checkpoint in {directory}; "
            "check the path, or make one with `lohp train`."
        )
    step = max(found) if step is None else step
    if step not in found:
        raise FileNotFoundError(
            f"restore: no complete checkpoint of step {step} in {directory}; "
            f"there are steps {sorted(found)}."
        )
    return step, found[step]


def _next_folder(directory: pathlib.Path, step: int) -> pathlib.Path:
    taken = _complete(directory).get(step)
    if taken is None:
        return directory / f"step_{step}"
    attempt = int(_FOLDER.fullmatch(taken.name)[2] or 0)
    return directory / f"step_{step}.{attempt + 1}"


def _newest(found: dict[int, pathlib.Path], written: int, keep: int) -> list[pathlib.Path]:
    """Folders of the step just written and of the latest `keep` - 1 others."""
    others = sorted(found.keys() - {written}, reverse=True)
    return [found[step] for step in (written, *others[: keep - 1])]


def _remove_all_but(kept: Collection[pathlib.Path], directory: pathlib.Path) -> None:
    """Removes checkpoints, complete or not, manifest first: none is ever half there."""
    for folder in directory.iterdir():
        ours = _FOLDER.fullmatch(folder.name) or _LEFTOVER.fullmatch(folder.name)
        if ours and folder.is_dir() and folder not in kept:
            (folder / _MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder)


@contextlib.contextmanager
def _disk_errors(folder: pathlib.Path) -> Iterator[None]:
    """Gives back the OSError that tensorstore, under Orbax, reports as a ValueError."""
    try:
        yield
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        number = int(code[1])
        raise OSError(number, f"save: {os.strerror(number)}", str(folder)) from error


def _as_json(config: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(config))
    except TypeError as error:
        raise ValueError(
            f"save: expected a config of dict, list, str, numbers, bool and None, got {config!r}; "
            "`dataclasses.asdict` makes one of a dataclass."
        ) from error


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _hash_file(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_files(folder: pathlib.Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _hash_file(path) for path in paths}


def _write_manifest(folder: pathlib.Path, content: dict[str, Any]) -> None:
    record = json.dumps({"sha256": _digest(content), "content": content}, indent=1)
    write_atomically(folder / _MANIFEST, record.encode())


def _read_manifest(step: int, folder: pathlib.Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / _MANIFEST).read_bytes())
        digest, content = record["sha256"], record["content"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(step, folder, f"{_MANIFEST} cannot be read") from error
    if digest != _digest(content):
        raise _damaged(step, folder, f"{_MANIFEST} does not match its SHA-256")
    return content


def _check_files(step: int, folder: pathlib.Path, files: dict[str, str]) -> None:
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            raise _damaged(step, folder, f"{name} is missing")
        if _hash_file(path) != digest:
            raise _damaged(step, folder, f"{name} does not match its SHA-256")


def _damaged(step: int, folder: pathlib.Path, what: str) -> ValueError:
    others = sorted(_complete(folder.parent).keys() - {step})
    advice = f"the other complete steps are {others}" if others else "there is no other step"
    return ValueError(f"restore: checkpoint step {step} is damaged, {folder}: {what}; {advice}.")


def _describe(function: str, tree: PyTree) -> dict[str, str]:
    """Path -> "dtype[shape]" of every leaf, e.g. "EmptyState()" of a node without, in order."""
    leaves = {}
    for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=_is_empty):
        name = jax.tree_util.keystr(path)
        if _is_empty(leaf):
            leaves[name] = repr(jax.tree.map(lambda part: part, leaf))  # keys in order
        elif hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            leaves[name] = f"{leaf.dtype}{list(leaf.shape)}"
        else:
            raise ValueError(f"{function}: expected arrays, got {type(leaf).__name__} at {name}.")
    return leaves


def _is_empty(node: Any) -> bool:
    return jax.tree.structure(node).num_leaves == 0


def _check_template(step: int, stored: dict[str, str], expected: dict[str, str]) -> None:
    for name in expected | stored:
        want, got = expected.get(name, "nothing"), stored.get(name, "nothing")
        if want != got:
            raise ValueError(
                f"restore: expected {want} at {name}, got {got} in checkpoint step {step}; "
                "build the template from the config that `read_config` returns."
            )


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impls(state: PyTree) -> dict[str, str]:
    """Path -> name of the generator, of every leaf of typed keys."""
    leaves = jax.tree.leaves_with_path(state)
    return {
        jax.tree_util.keystr(path): jax.random.key_impl(leaf)
        for path, leaf in leaves
        if _is_key(leaf)
    }


def _without_key(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _numpy_template(leaf: Any) -> np.ndarray:
    """An array for shape and dtype alone, which takes next to no memory."""
    plain = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return np.broadcast_to(np.zeros((), plain.dtype), plain.shape)


def _on_device(key_impls: dict[str, str], path: Any, array: np.ndarray) -> jax.Array:
    name = jax.tree_util.keystr(path)
    if name in key_impls:
        return jax.random.wrap_key_data(array, impl=key_impls[name])
    restored = jnp.asarray(array)
    if restored.dtype != array.dtype:
        raise ValueError(
            f"restore: expected jax_enable_x64 to be on for {array.dtype} at {name}, got it off."
        )
    return restored
