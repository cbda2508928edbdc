"""Trajectories on disk: memory-mapped arrays behind a JSON header, resumable and checked.

    DIR/header.json                 schema, config, leaves of a trajectory, digests of every shard
    DIR/shards/NAME/leaf-000.npy    leaf 0 of the trajectories of shard NAME, `[R, ...]`

A shard is a batch of R trajectories: nested dicts of arrays with leading axis R. It is written
under a temporary name, flushed, moved to its place, and only then named by a new header that
replaces the old one in a single step. A writer that is killed, or runs out of disk, at any moment
leaves the previous header and all that it names; the next `create` sweeps what else it leaves. One
writer at a time; readers may come and go. Files are plain `.npy`, never pickled.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
import tokenize
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, NamedTuple

import chex
import jax
import numpy as np

from lohp_jax.files import write_atomically
from lohp_jax.types import PyTree

SCHEMA = 1
"""Version of the layout above; the only one that is read."""

_TEMPORARY = ".lohp-tmp-"  # begins the names of temporary folders
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

_NOT_NPY = (ValueError, TypeError, SyntaxError, EOFError, tokenize.TokenError)  # from np.load
_ABSENT = "(absent)"  # stands for a field that a config lacks

_Path = tuple[str, ...]
_Array = np.ndarray | np.generic | jax.Array


class _Leaf(NamedTuple):
    """One array of a trajectory; `shape` is without the leading axis R."""

    path: _Path
    shape: tuple[int, ...]
    dtype: np.dtype


class _Shard(NamedTuple):
    """What the header keeps of a shard; `sha256` maps file names to hexadecimal digests."""

    num_trajectories: int
    num_dropped: int
    sha256: dict[str, str]


class _Header(NamedTuple):
    """`header.json` in memory; `leaves` is empty until the first shard is written."""

    config: dict[str, Any]
    leaves: tuple[_Leaf, ...]
    shards: dict[str, _Shard]


class Store:
    """A directory of trajectories, made by `create` (to write) or `open_store` (to read).

    Trajectories are numbered through the shards in the order of the shards' names. A file is mapped
    when it is asked for and let go with its array: any number of shards costs no file handles.
    """

    def __init__(self, directory: pathlib.Path, header: _Header):
        self._directory = directory
        self._header = header

    @property
    def config(self) -> dict[str, Any]:
        """The settings that made the trajectories, as JSON keeps them (tuples became lists)."""
        return self._header.config

    @property
    def num_dropped(self) -> int:
        """How many runs the writer left out, for example because they diverged."""
        return sum(shard.num_dropped for shard in self._header.shards.values())

    def shards(self) -> tuple[str, ...]:
        """Names of the shards that are wholly there, in ascending order."""
        return tuple(sorted(self._header.shards))

    def __len__(self) -> int:
        """Number of trajectories in all shards."""
        return sum(shard.num_trajectories for shard in self._header.shards.values())

    def write(self, name: str, tree: PyTree, *, num_dropped: int = 0) -> None:
        """Adds a shard, wholly or not at all; once this returns, a power cut does not lose it.

        Args:
          name: letters, digits, ".", "_" and "-"; pad numbers ("0003"), for names sort as text.
          tree: nested dicts with str keys of numeric arrays `[R, ...]`, R >= 0, of the same
            structure, shapes and dtypes in every shard. Values need not be finite.
          num_dropped: how many runs of this batch are not among the R.

        Raises:
          ValueError, if the shard exists, or its name or tree is not as above.
          OSError, if the disk is full or cannot be written; the shards before are intact.
        """
        self._check_name(name)
        arrays = _flatten(tree)
        leaves = tuple(_Leaf(path, a.shape[1:], a.dtype) for path, a in arrays.items())
        _check_leaves(self._header.leaves or leaves, leaves)
        try:
            self._write_shard(name, leaves, list(arrays.values()), int(num_dropped))
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror or error} (Store.write: shard {name!r} stopped; the shards that "
                f"{self._directory / 'header.json'} names are intact; see to the disk and run the "
                "same command again to go on)",
            ) from error

    def shard(self, name: str) -> PyTree:
        """The trajectories of one shard as read-only memory maps `[R, ...]`; reads no values.

        Raises: KeyError, if there is no such shard; ValueError, if a file is missing, cut short, or
        not of the dtype and shape in the header.
        """
        num_trajectories = self._header.shards[name].num_trajectories
        return _nest(
            (leaf.path, _map_leaf(self._folder(name) / _file_name(i), num_trajectories, leaf))
            for i, leaf in enumerate(self._header.leaves)
        )

    def read(self, index: int) -> PyTree:
        """Trajectory `index`, 0 <= index < len(store), in memory, without reading any other.

        Raises: IndexError, if there is no such trajectory; ValueError, as `shard` does.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"Store.read: expected an index in [0, {len(self)}), got {index}.")
        names = self.shards()
        ends = np.cumsum([self._header.shards[name].num_trajectories for name in names])
        position = int(np.searchsorted(ends, index, side="right"))
        row = index - int(ends[position])  # from the end of the shard
        return jax.tree.map(lambda leaf: np.array(leaf[row]), self.shard(names[position]))

    def load(self, select: Callable[[PyTree], PyTree] = lambda shard: shard) -> PyTree:
        """What `select` takes from every shard, in memory, joined along the leading axis.

        Memory holds the result and what is selected of one shard. For matched states only:

            def matched(shard):
                indices = ...  # [R, N + 1], from shard["losses"], say
                return {**shard, "states": take_states(shard["states"], indices)}

            trajectories = store.load(matched)

        Args:
          select: maps the tree of `shard`, R >= 1, to a pytree of arrays `[R, ...]`; shapes but for
            R, and dtypes, must not differ between shards. Default: everything.

        Returns: pytree of arrays `[len(store), ...]`.

        Raises: ValueError, if the store holds no trajectory, and as `shard` does.
        """
        joined, start = None, 0
        for name in self.shards():
            stop = start + self._header.shards[name].num_trajectories
            if stop == start:
                continue
            part = select(self.shard(name))
            chex.assert_tree_shape_prefix(part, (stop - start,))
            if joined is None:
                joined = jax.tree.map(lambda x: np.empty((len(self), *x.shape[1:]), x.dtype), part)
            for whole, rows in zip(jax.tree.leaves(joined), jax.tree.leaves(part), strict=True):
                whole[start:stop] = rows
            start = stop
        if joined is None:
            raise ValueError(
                f"Store.load: expected trajectories in {self._directory}, found none in its "
                f"{len(self._header.shards)} shards ({self.num_dropped} runs were dropped); run "
                "`lohp prepare` to the end, or with settings under which fewer runs diverge."
            )
        return joined

    def verify(self) -> None:
        """Reads every file and compares its sha256 with the header's; deletes nothing.

        Raises: ValueError, naming the first shard and file that are missing or differ.
        """
        for name, shard in sorted(self._header.shards.items()):
            for file_name, expected in shard.sha256.items():
                file = self._folder(name) / file_name
                got = _digest(file)
                if got != expected:
                    raise _damaged(file, f"sha256 {expected}", got)

    def _folder(self, name: str) -> pathlib.Path:
        return self._directory / "shards" / name

    def _check_name(self, name: str):
        if not _SHARD_NAME.fullmatch(name):
            raise ValueError(
                "Store.write: expected a shard name of letters, digits, '.', '_' and '-' that "
                f"begins with a letter or digit, got {name!r}."
            )
        if name in self._header.shards:
            raise ValueError(
                f"Store.write: expected a new shard, but {name!r} exists in {self._directory}; "
                "write those that `shards()` does not name."
            )

    def _write_shard(self, name, leaves, arrays, num_dropped):
        target = self._folder(name)
        target.parent.mkdir(exist_ok=True)
        with _temporary_folder(self._directory) as temporary:
            shard = _Shard(len(arrays[0]), num_dropped, _write_leaves(temporary / "shard", arrays))
            if target.exists():  # its writer was killed before a header named it
                os.replace(target, temporary / "unnamed")
            os.replace(temporary / "shard", target)
        _sync_folder(target.parent)
        self._commit(_Header(self.config, leaves, {**self._header.shards, name: shard}))

    def _commit(self, header: _Header):
        """Replaces the header on disk and in memory; from then on its shards count."""
        _write_header(self._directory, header)
        self._header = header
        _sync_folder(self._directory)


def create(directory: str | os.PathLike, config: dict[str, Any]) -> Store:
    """A store to write to: a new one, or the one in `directory`, to go on where its writer stopped.

    Shards whose folders were deleted are forgotten, so that they are made again; the temporary
    folders of a killed writer are removed. Digests are not checked here (`open_store` does).

    Args:
      directory: made where it does not exist.
      config: the settings that decide the trajectories, as JSON values.

    Raises: ValueError, if the store there was made with another config (its first differing field
    is named), has a damaged header or another schema, or `config` is not JSON.
    """
    directory = pathlib.Path(directory)
    config = _json_config(config)
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / "header.json").exists():
        header = _read_header(directory)
        _check_config(directory, header.config, config)
    elif any(directory.glob("shards/*")):
        raise ValueError(
            f"create: {directory} has shards but no header.json, which every writer makes first; "
            "put the header back or choose another directory. Nothing was deleted."
        )
    else:
        header = _Header(config, (), {})
    for leftover in directory.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover)
    store = Store(directory, header)
    present = {name: s for name, s in header.shards.items() if store._folder(name).exists()}
    store._commit(header._replace(shards=present))
    return store


def open_store(directory: str | os.PathLike, *, verify: bool = True) -> Store:
    """The store in `directory`, to read from.

    Args:
      directory: what `create` made.
      verify: whether to read every file once and check its digest, about a second per gigabyte.
        Keep it for training; False is for a quick look. Dtypes and shapes are checked in any case,
        when a file is mapped.

    Raises:
      FileNotFoundError, if there is no store.
      ValueError, if the header or a file is damaged or the schema is another; deletes nothing.
    """
    directory = pathlib.Path(directory)
    store = Store(directory, _read_header(directory))
    if verify:
        store.verify()
    return store


def take_states(states: PyTree, indices: np.ndarray) -> PyTree:
    """The states of each trajectory at its own times; of a memory map it reads no others.

    Args:
      states: pytree of `[R, T + 1, ...]`.
      indices: `[R, N + 1]` integers in [0, T].

    Returns: pytree of `[R, N + 1, ...]` in memory; entry [r, n] is the state at indices[r, n].
    """
    indices = np.asarray(indices)
    chex.assert_rank(indices, 2)
    chex.assert_tree_shape_prefix(states, indices.shape[:1])
    rows = np.arange(len(indices))[:, None]
    return jax.tree.map(lambda leaf: leaf[rows, indices], states)


def _flatten(tree: PyTree) -> dict[_Path, np.ndarray]:
    """The arrays of nested dicts by path, in C order and native byte order, with a common R."""
    arrays = {path: _to_numpy(path, node) for path, node in _walk(tree)}
    shapes = {"/".join(path): array.shape for path, array in arrays.items()}
    if () in shapes.values() or len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(
            f"Store.write: expected leaves with one common leading axis R, got shapes {shapes}."
        )
    return arrays


def _walk(node: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Path and value of all that is no dict, and of empty dicts, which no file would keep."""
    if isinstance(node, dict) and node:
        for key in sorted(node, key=str):
            yield from _walk(node[key], (*path, key))
    else:
        yield path, node


def _to_numpy(path: tuple, node: Any) -> np.ndarray:
    if not path or not all(isinstance(key, str) for key in path) or not isinstance(node, _Array):
        raise ValueError(
            "Store.write: expected nested dicts with str keys and arrays as leaves, got "
            f"{type(node).__name__} at {list(path)}; turn a NamedTuple into a dict by `_asdict()`, "
            "a list or tuple into a dict keyed by str(i), and leave out None and empty dicts."
        )
    if jax.dtypes.issubdtype(node.dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"Store.write: the leaf at {list(path)} holds PRNG keys; store `jax.random.key_data` "
            "of them, and `jax.random.wrap_key_data` what is read."
        )
    if not jax.dtypes.issubdtype(node.dtype, np.number) and node.dtype != bool:
        raise ValueError(
            f"Store.write: expected numbers at {list(path)}, got dtype {node.dtype}; encode names "
            "as integers and keep their meaning in the config."
        )
    return np.asarray(node, dtype=node.dtype.name, order="C")


def _nest(items: Iterable[tuple[_Path, np.ndarray]]) -> PyTree:
    """Nested dicts from pairs of path and array: the inverse of `_flatten`."""
    tree = {}
    for path, array in items:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = array
    return tree


def _check_leaves(expected: tuple[_Leaf, ...], got: tuple[_Leaf, ...]):
    if expected != got:
        missing = [leaf for leaf in expected if leaf not in got]
        extra = [leaf for leaf in got if leaf not in expected]
        raise ValueError(
            "Store.write: expected the leaves of the shards before, got a tree without "
            f"{missing} and with {extra}; write what differs to another store."
        )


def _file_name(index: int) -> str:
    return f"leaf-{index:03d}.npy"


class _DigestingFile:
    """Writes through to a file and digests what was meant to be written.

    `np.save` to a bare file would report a full disk without its errno.
    """

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self._file.write(data)


def _write_leaves(folder: pathlib.Path, arrays: list[np.ndarray]) -> dict[str, str]:
    """Writes arrays into a new folder, down to the disk; returns sha256 digests by file name."""
    folder.mkdir()
    digests = {}
    for i, array in enumerate(arrays):
        with open(folder / _file_name(i), "wb") as file:
            digesting = _DigestingFile(file)
            np.save(digesting, array, allow_pickle=False)
            _sync(file)
        digests[_file_name(i)] = digesting.sha256.hexdigest()
    _sync_folder(folder)
    return digests


def _map_leaf(file: pathlib.Path, num_trajectories: int, leaf: _Leaf) -> np.ndarray:
    """A leaf of a shard as a read-only memory map `[R, ...]`."""
    shape = (num_trajectories, *leaf.shape)
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, *_NOT_NPY) as error:
        raise _damaged(file, f"{leaf.dtype} {shape}", error) from error
    if array.shape != shape or array.dtype != np.dtype(leaf.dtype.str):
        raise _damaged(file, f"{leaf.dtype} {shape}", f"{array.dtype} {array.shape}")
    return array.view(leaf.dtype)  # .npy has no name for bfloat16 and its like


def _digest(file: pathlib.Path) -> str:
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise _damaged(file, "a file", error) from error


def _damaged(file: pathlib.Path, expected: str, got: Any) -> ValueError:
    return ValueError(
        f"Trajectory store: file {file.name} of shard {file.parent.name!r} is damaged: expected "
        f"{expected}, got {got}. Delete the folder {file.parent} and run `lohp prepare` again with "
        "the same settings to make just this shard anew. Nothing was deleted."
    )


def _json_config(config: dict[str, Any]) -> dict[str, Any]:
    """`config` as JSON gives it back."""
    try:
        return json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"create: expected a config of JSON values (str, int, finite float, bool, None, list, "
            f"dict), got: {error}; turn a dataclass into a dict by `dataclasses.asdict`."
        ) from error


def _check_config(directory: pathlib.Path, stored: dict[str, Any], asked: dict[str, Any]):
    if stored != asked:
        field, old, new = next(_differences(stored, asked))
        raise ValueError(
            f"create: {directory} was made with {field} = {old}, asked for is {new}; use the "
            "settings it was made with to go on there, or choose another directory."
        )


def _differences(old: Any, new: Any, field: str = "config") -> Iterator[tuple[str, str, str]]:
    """Fields in which two JSON values differ, with both values; dicts are compared by key."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key, _ABSENT), new.get(key, _ABSENT), f"{field}.{key}")
    elif old != new:
        yield field, json.dumps(old), json.dumps(new)


def _header_to_json(header: _Header) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "config": header.config,
        "leaves": [leaf._asdict() | {"dtype": leaf.dtype.name} for leaf in header.leaves],
        "shards": {name: shard._asdict() for name, shard in sorted(header.shards.items())},
        "num_dropped": sum(shard.num_dropped for shard in header.shards.values()),
    }


def _header_from_json(raw: dict[str, Any]) -> _Header:
    """Inverse of `_header_to_json`; KeyError, TypeError or AttributeError on anything else."""
    leaves = tuple(
        _Leaf(tuple(leaf["path"]), tuple(leaf["shape"]), np.dtype(leaf["dtype"]))
        for leaf in raw["leaves"]
    )
    shards = {name: _Shard(**shard) for name, shard in raw["shards"].items()}
    return _Header(dict(raw["config"]), leaves, shards)


def _read_header(directory: pathlib.Path) -> _Header:
    file = directory / "header.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        if raw["schema"] == SCHEMA:
            return _header_from_json(raw)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"No trajectories in {directory}: there is no {file}. Make them with "
            f"`lohp prepare --out {directory}`."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Trajectory store: {file} is damaged ({type(error).__name__}: {error}). Put a copy of "
            "it back, or prepare into another directory. Nothing was deleted."
        ) from error
    raise ValueError(
        f"Trajectory store: {file} has schema {raw['schema']!r}, this version of lohp_jax reads "
        f"schema {SCHEMA} only; use the version that wrote it, or prepare into another directory. "
        "Nothing was deleted."
    )


def _write_header(directory: pathlib.Path, header: _Header):
    content = json.dumps(_header_to_json(header), indent=1)
    write_atomically(directory / "header.json", content.encode())


@contextlib.contextmanager
def _temporary_folder(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=directory) as name:
        yield pathlib.Path(name)


def _sync(file: IO):
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: pathlib.Path):
    """Makes the names in a folder durable, as `_sync` does a file's bytes."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
