"""Trajectories on disk: memory-mapped arrays behind a JSON header, resumable and checked.

    DIR/header.json                 schema, config, leaves of a trajectory, digests of every shard
    DIR/shards/NAME/leaf-000.npy    leaf 0 of the trajectories of shard NAME, `[R, ...]`

A shard is a batch of R trajectories: a pytree of arrays with leading axis R. Leaves are named by
their path: the keys, indices and field names that lead to them. Whoever reads gives a template, the
same pytree for one trajectory, and gets its structure back; without one, nested dicts by path. The
structure itself is not on disk: what has no leaf (None, an empty tuple) only a template knows.

A shard is written under a temporary name, flushed, moved to its place, and only then named by a new
header that replaces the old one in a single step. A writer that is killed, or runs out of disk, at any
moment leaves the previous header and all that it names; the next `create` sweeps what else it leaves.
One writer at a time; readers may come and go. Files are plain `.npy`, never pickled.
"""

import abc
import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
import tokenize
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

import chex
import jax
import numpy as np

from lohp_jax.files import damaged, first_difference, read_json, write_json
from lohp_jax.types import PyTree

SCHEMA = 1
"""Version of the layout above; the only one that is read."""

_TEMPORARY = ".lohp-tmp-"  # begins the names of temporary folders
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

_NOT_NPY = (ValueError, TypeError, SyntaxError, EOFError, tokenize.TokenError)  # from np.load

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


class Store(abc.ABC):
    """Trajectories in shards, numbered through the shards in the order of the shards' names.

    `create` makes one to write to, on disk or in memory; `open_store` opens one to read.
    """

    def __init__(self, header: _Header, like: PyTree):
        self._header = header
        self._like = like

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
          tree: pytree of numeric arrays `[R, ...]`, R >= 0, of the same structure, shapes and dtypes
            in every shard, those of the template if there is one. Values need not be finite.
          num_dropped: how many runs of this batch are not among the R.

        Raises:
          ValueError, if the shard exists, or its name or tree is not as above.
          OSError, if the disk is full or cannot be written; the shards before are intact.
        """
        self._check_name(name)
        arrays = _flatten(tree)
        leaves = {path: _Leaf(path, a.shape[1:], a.dtype) for path, a in arrays.items()}
        expected = {leaf.path: leaf for leaf in self._header.leaves} or leaves
        _check_leaves("Store.write", expected, leaves, "the shards before have", "this tree has")
        if self._like is not None:
            _check_template("Store.write", self._like, leaves, "this tree has")
        num_trajectories = len(next(iter(arrays.values())))
        header = self._header._replace(leaves=tuple(expected.values()))
        self._add(name, header, [arrays[path] for path in expected], num_trajectories, num_dropped)

    @abc.abstractmethod
    def _add(self, name, header, arrays, num_trajectories, num_dropped):
        """Keeps a shard, and then the header that names it."""

    def shard(self, name: str) -> PyTree:
        """The trajectories of one shard as read-only arrays `[R, ...]`; on disk memory maps.

        Raises: KeyError, if there is no such shard; ValueError, if a file is missing, cut short, or
        not of the dtype and shape in the header.
        """
        num_trajectories = self._header.shards[name].num_trajectories
        arrays = {
            leaf.path: self._leaf(name, index, leaf, num_trajectories)
            for index, leaf in enumerate(self._header.leaves)
        }
        if self._like is None:
            return _nest(arrays)
        return jax.tree.map_with_path(lambda path, _: arrays[_names(path)], self._like)

    @abc.abstractmethod
    def _leaf(self, name, index, leaf, num_trajectories):
        """Leaf number `index` of a shard, `[R, ...]`."""

    @abc.abstractmethod
    def verify(self) -> None:
        """Reads every file and compares its sha256 with the header's; deletes nothing.

        Raises: ValueError, naming the first shard and file that are missing or differ.
        """

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
                f"Store.load: expected trajectories, found none in "
                f"{len(self._header.shards)} shards ({self.num_dropped} runs were dropped); run "
                "`lohp prepare` to the end, or with settings under which fewer runs diverge."
            )
        return joined

    def _check_name(self, name: str):
        if not _SHARD_NAME.fullmatch(name):
            raise ValueError(
                "Store.write: expected a shard name of letters, digits, '.', '_' and '-' that "
                f"begins with a letter or digit, got {name!r}."
            )
        if name in self._header.shards:
            raise ValueError(
                f"Store.write: expected a new shard, but {name!r} exists; write those that `shards()` "
                "does not name."
            )


class _MemoryStore(Store):
    """Trajectories that end with the process; the same reading, nothing to resume."""

    def __init__(self, header: _Header, like: PyTree):
        super().__init__(header, like)
        self._arrays: dict[str, list[np.ndarray]] = {}

    def _add(self, name, header, arrays, num_trajectories, num_dropped):
        self._arrays[name] = [_read_only(array) for array in arrays]
        shard = _Shard(num_trajectories, num_dropped, {})
        self._header = header._replace(shards={**header.shards, name: shard})

    def _leaf(self, name, index, leaf, num_trajectories):
        return self._arrays[name][index]

    def verify(self) -> None:
        """Nothing to verify."""


class _DiskStore(Store):
    """A directory of trajectories.

    A file is mapped when it is asked for and let go with its array: any number of shards costs no
    file handles.
    """

    def __init__(self, directory: pathlib.Path, header: _Header, like: PyTree):
        super().__init__(header, like)
        self._directory = directory

    def verify(self) -> None:
        """As of `Store`."""
        for name, shard in sorted(self._header.shards.items()):
            for file_name, expected in shard.sha256.items():
                file = self._folder(name) / file_name
                got = _digest(file)
                if got != expected:
                    raise _damaged(file, f"sha256 {expected}", got)

    def _folder(self, name: str) -> pathlib.Path:
        return self._directory / "shards" / name

    def _leaf(self, name, index, leaf, num_trajectories):
        return _map_leaf(self._folder(name) / _file_name(index), num_trajectories, leaf)

    def _add(self, name, header, arrays, num_trajectories, num_dropped):
        try:
            digests = self._write_shard(name, arrays)
            shard = _Shard(num_trajectories, int(num_dropped), digests)
            self._commit(header._replace(shards={**header.shards, name: shard}))
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror or error} (Store.write: shard {name!r} stopped; the shards that "
                f"{self._directory / 'header.json'} names are intact; see to the disk and run the "
                "same command again to go on)",
            ) from error

    def _write_shard(self, name, arrays) -> dict[str, str]:
        """Puts the folder of a shard in its place; returns the digests of its files."""
        target = self._folder(name)
        target.parent.mkdir(exist_ok=True)
        with _temporary_folder(self._directory) as temporary:
            digests = _write_leaves(temporary / "shard", arrays)
            if target.exists():  # its writer was killed before a header named it
                os.replace(target, temporary / "unnamed")
            os.replace(temporary / "shard", target)
        _sync_folder(target.parent)
        return digests

    def _commit(self, header: _Header):
        """Replaces the header on disk and in memory; from then on its shards count."""
        write_json(self._directory / "header.json", _header_to_json(header), schema=SCHEMA)
        self._header = header
        _sync_folder(self._directory)


def create(
    directory: str | os.PathLike | None, config: dict[str, Any], like: PyTree | None = None
) -> Store:
    """A store to write to: a new one, or the one in `directory`, to go on where its writer stopped.

    Shards whose folders were deleted are forgotten, so that they are made again; the temporary
    folders of a killed writer are removed. Digests are not checked here (`open_store` and
    `Store.verify` do).

    Args:
      directory: made where it does not exist; None keeps everything in memory.
      config: the settings that decide the trajectories, as JSON values.
      like: a template: one trajectory, of anything with a shape and a dtype, such as
        `jax.eval_shape` returns. None for nested dicts by path.

    Raises: ValueError, if the store there was made with another config (its first differing field
    is named) or does not fit the template, has a damaged header or another schema, or `config` is not
    JSON.
    """
    config = _json_config(config)
    _check_template("create", like)
    if directory is None:
        return _MemoryStore(_Header(config, (), {}), like)
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / "header.json").exists():
        header = _read_header(directory)
        if difference := first_difference(header.config, config, "config"):
            raise ValueError(
                f"create: {directory} was made with another config: {difference}; use the settings "
                "it was made with to go on there, or choose another directory."
            )
    elif any(directory.glob("shards/*")):
        raise ValueError(
            f"create: {directory} has shards but no header.json, which every writer makes first; "
            "put the header back or choose another directory. Nothing was deleted."
        )
    else:
        header = _Header(config, (), {})
    _check_stored("create", directory, header, like)
    for leftover in directory.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover)
    store = _DiskStore(directory, header, like)
    present = {name: s for name, s in header.shards.items() if store._folder(name).exists()}
    store._commit(header._replace(shards=present))
    return store


def open_store(
    directory: str | os.PathLike, like: PyTree | None = None, *, verify: bool = True
) -> Store:
    """The store in `directory`, to read from; open it once a run and hand it on.

    Args:
      directory: what `create` made.
      like: a template, as of `create`; None gives nested dicts by path.
      verify: whether to read every file once and check its digest, about a second per gigabyte.
        Keep it for training; False is for a quick look. Dtypes and shapes are checked in any case,
        when a file is mapped.

    Raises:
      FileNotFoundError, if there is no store.
      ValueError, if the header or a file is damaged, the schema is another, or what is stored does
        not fit the template (the first path is named); deletes nothing.
    """
    directory = pathlib.Path(directory)
    header = _read_header(directory)
    _check_template("open_store", like)
    _check_stored("open_store", directory, header, like)
    store = _DiskStore(directory, header, like)
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


def _names(path: tuple) -> _Path:
    """The keys of a path of `jax.tree_util` as strings."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _by_path(function: str, tree: PyTree) -> dict[_Path, Any]:
    """The leaves of a tree by path, which must tell them apart."""
    leaves = {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        names = _names(path)
        if not names or names in leaves:
            raise ValueError(
                f"{function}: expected a pytree whose keys, as text, tell its leaves apart, got "
                f"{'a leaf alone' if not names else f'two at {_join(names)}'}; use a dict of arrays "
                "with keys of their own."
            )
        leaves[names] = leaf
    if not leaves:
        raise ValueError(f"{function}: expected a pytree with arrays, got {tree!r} without any.")
    return leaves


def _join(path: _Path) -> str:
    return "/".join(path)


def _flatten(tree: PyTree) -> dict[_Path, np.ndarray]:
    """The arrays of a tree by path, in C order and native byte order, with a common R."""
    arrays = {path: _to_numpy(path, leaf) for path, leaf in _by_path("Store.write", tree).items()}
    shapes = {_join(path): array.shape for path, array in arrays.items()}
    if () in shapes.values() or len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(
            f"Store.write: expected leaves with one common leading axis R, got shapes {shapes}."
        )
    return arrays


def _to_numpy(path: _Path, leaf: Any) -> np.ndarray:
    if not isinstance(leaf, _Array):
        raise ValueError(
            f"Store.write: expected arrays as leaves, got {type(leaf).__name__} at {_join(path)}; "
            "make it an array with the leading axis R, or register its class as a pytree."
        )
    _check_dtype("Store.write", path, leaf.dtype)
    return np.asarray(leaf, dtype=leaf.dtype.name, order="C")


def _check_dtype(function: str, path: _Path, dtype: Any):
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        raise ValueError(
            f"{function}: the leaf at {_join(path)} holds PRNG keys; store `jax.random.key_data` "
            "of them, and `jax.random.wrap_key_data` what is read."
        )
    if not any(jax.dtypes.issubdtype(dtype, kind) for kind in (np.number, np.bool_)):
        raise ValueError(
            f"{function}: expected numbers at {_join(path)}, got dtype {dtype}; encode names "
            "as integers and keep their meaning in the config."
        )


def _nest(arrays: dict[_Path, np.ndarray]) -> PyTree:
    """Nested dicts from arrays by path."""
    tree = {}
    for path, array in arrays.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = array
    return tree


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


def _check_leaves(
    function: str, expected: dict[_Path, _Leaf], got: dict[_Path, _Leaf], theirs: str, ours: str
):
    for path in [*expected, *got]:
        if expected.get(path) != got.get(path):
            raise ValueError(
                f"{function}: {theirs} {_describe(expected.get(path))} at {_join(path)}, {ours} "
                f"{_describe(got.get(path))}; keep to one structure, or choose another store."
            )


def _describe(leaf: _Leaf | None) -> str:
    return "nothing" if leaf is None else f"{leaf.dtype} {list(leaf.shape)}"


def _check_template(
    function: str, like: PyTree, got: dict[_Path, _Leaf] | None = None, ours: str = ""
):
    """Whether a template can be stored, and if `got` is given, whether that is what it says."""
    if like is None:
        return
    expected = {}
    for path, leaf in _by_path(f"{function}: like", like).items():
        if not hasattr(leaf, "dtype"):
            raise ValueError(
                f"{function}: expected shapes and dtypes in the template, got "
                f"{type(leaf).__name__} at {_join(path)}; use jax.eval_shape."
            )
        _check_dtype(function, path, leaf.dtype)
        expected[path] = _Leaf(path, tuple(leaf.shape), np.dtype(leaf.dtype.name))
    if got is not None:
        _check_leaves(function, expected, got, "the template has", ours)


def _check_stored(function: str, directory: pathlib.Path, header: _Header, like: PyTree):
    if header.leaves:
        stored = {leaf.path: leaf for leaf in header.leaves}
        _check_template(function, like, stored, f"{directory} has")


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


def _header_to_json(header: _Header) -> dict[str, Any]:
    return {
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
        raw = read_json(file, schema=SCHEMA)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"No trajectories in {directory}: there is no {file}. Make them with "
            f"`lohp prepare --out {directory}`."
        ) from error
    try:
        return _header_from_json(raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(file, error) from error


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
