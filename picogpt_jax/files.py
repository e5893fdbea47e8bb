"""Writing files so that nothing half-written is ever read."""

import atexit
import contextlib
import errno
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from picogpt_jax.errors import UserError, reason

LOCK_FILE = ".lock"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_BEYOND = 1 << 13  # bytes: more than is left in a page of a file
MARK_WITHIN = 1000  # first bytes of a page of ours


def disk_failure(error: BaseException | None) -> str | None:
    """What the system says where an exception comes from a full or failing disk; libraries wrap it, or quote it."""
    while error is not None:
        text = str(error)
        if isinstance(error, OSError) and error.errno is None and " requested and " in text:  # np.ndarray.tofile
            return os.strerror(errno.ENOSPC)
        for number in _DISK_ERRORS:
            if os.strerror(number) in text:
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def _written(path: Path, make_temporary: Callable[..., Any]) -> Iterator[Any]:
    """What `make_temporary` makes beside `path`; what goes wrong with the disk in the block is a `UserError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = make_temporary(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose a folder that can be written") from None
    try:
        yield temporary
    except Exception as error:
        why = disk_failure(error)
        if why is None:
            raise
        raise UserError(f"cannot write {path}: {why}; make room there, or choose another place") from error


def _check_room(file: Path) -> None:
    """Writes beyond the end, and cuts it off: `ndarray.tofile` and C's streams lose their last bytes without a word."""
    size = file.stat().st_size
    with file.open("ab") as stream:
        stream.write(bytes(_BEYOND))
        stream.flush()
        stream.truncate(size)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary name beside `path`; renames it to `path` when the block ends without an exception.

    Raises:
        UserError: `path` is a folder, the folder around it cannot be made or written, or the disk is full.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; a file is written there: choose another path")
    with _written(path, tempfile.mkstemp) as (descriptor, name):
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            _check_room(temporary)
            temporary.chmod(0o644)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty temporary folder beside `path`; it takes `path`'s place when the block ends without an exception.

    An existing `path` must be a folder that an earlier call wrote: it is replaced as a whole.

    Raises:
        UserError: `path` is a file, its parent cannot be written, or the disk is full.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; a folder is written there: choose another path")
    with _written(path, tempfile.mkdtemp) as name:
        temporary = Path(name)
        try:
            temporary.chmod(0o755)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    file.chmod(0o644)  # safetensors writes files for their owner alone
            if path.exists():
                discarded = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
                os.replace(path, discarded / path.name)
                os.replace(temporary, path)
                shutil.rmtree(discarded)
            else:
                os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            atexit.register(shutil.rmtree, temporary, ignore_errors=True)  # Orbax may still be writing to it
            raise


def check_replaceable(folder: str | os.PathLike[str], names: Collection[str]) -> None:
    """Refuses a folder that holds anything but the files `names`, before `atomic_folder` replaces it as a whole.

    Raises:
        UserError: it does.
    """
    folder = Path(folder)
    others = sorted(path.name for path in folder.iterdir() if path.name not in names) if folder.is_dir() else []
    if others:
        raise UserError(f"{folder} is a folder of other files ({others[0]}), which would be replaced; name a new one")


def check_own_page(path: str | os.PathLike[str], mark: str, kind: str) -> None:
    """Refuses to replace a file that is not of this kind: whose beginning lacks `mark`.

    Raises:
        UserError: it is another one, or a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"--output={path} is a folder; a file is written there: add a name such as {kind}.html")
    if not path.exists():
        return
    try:
        with path.open("rb") as file:
            beginning = file.read(MARK_WITHIN)
    except OSError as error:
        raise UserError(f"cannot read --output={path}: {error.strerror}; name a new file") from None
    if mark.encode() not in beginning:
        raise UserError(f"--output={path} is another file than a {kind}, which would be replaced; name a new one")


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str], purpose: str) -> Iterator[None]:
    """Keeps every other program that asks out of `folder` for the time of the block.

    The kernel holds the lock, on the file `.lock`, and releases it when the program ends in whatever way.

    Raises:
        UserError: another program holds it, or the folder cannot be written.
    """
    import fcntl  # POSIX alone

    path = Path(folder) / LOCK_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; give a folder that can be written") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):  # a file system without locks
                print(f"{folder} cannot be locked ({error.strerror}): see that one run uses it", file=sys.stderr)
                yield
                return
            file.seek(0)
            holder = file.read(200).strip() or "another program"
            raise UserError(f"{holder} is {purpose} {folder}; wait for it, end it, or use another folder") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str], max_bytes: int = 64 << 20) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: the file is missing, larger than `max_bytes`, not UTF-8 or not JSON.
    """
    path = Path(path)
    try:
        if path.stat().st_size > max_bytes:
            raise UserError(f"{path} has {path.stat().st_size} bytes; at most {max_bytes} were expected")
        return json.loads(path.read_text(encoding="utf-8"), parse_int=_integer)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise UserError(f"{path} is not valid JSON ({reason(error)}); write it again") from None


def _integer(digits: str) -> int:
    if len(digits) > 20:  # more than 64 bits: no size, and too long for a message
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)
