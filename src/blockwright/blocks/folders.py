"""A folder is committed, not written: readers see the old one or the new one, whole.

`publish` writes into a scratch folder beside the target, adds a manifest (file, size, sha256), syncs, and exchanges the two in one step
(renameat2 on Linux; two renames elsewhere). What a killed writer leaves is undone by the next `publish` or `settle`.
"""

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError

from blockwright.errors import BlockwrightError

MANIFEST = "manifest.json"
FORMAT = 1


def publish(folder: Path, write: Callable[[Path], None]) -> None:
    """Make `folder` hold what `write(scratch)` writes plus its manifest: all of it, on disk, or nothing.

    A link is followed: what it points to is replaced. Raises BlockwrightError when the place is not writable or the disk is full; the old
    folder then stands as it was.
    """
    folder = Path(os.path.realpath(folder))
    parent = folder.parent
    try:
        if folder.exists() and not folder.is_dir():
            raise BlockwrightError(f"{folder}: is a file", allowed="a folder, or a name that is free", do="Name another output folder")
        parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as alive:
            with locked(parent):
                scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.new-", dir=parent))
                alive.enter_context(locked(scratch))  # says: this writer lives
            try:
                scratch.chmod(0o755)
                with _system_errors():
                    write(scratch)
                write_manifest(scratch)
                for path in [*scratch.rglob("*"), scratch]:
                    sync(path)
                with locked(parent):
                    _mend(folder)
                    _exchange(scratch, folder)
                    sync(parent)
            except BaseException:
                shutil.rmtree(scratch, ignore_errors=True)
                raise
            shutil.rmtree(scratch, ignore_errors=True)  # after an exchange it holds the old folder
            with locked(parent):
                _mend(folder)
    except OSError as error:
        raise told(folder, error) from error


def settle(folder: Path) -> None:
    """Undo what killed writers of `folder` left. Readers call it before they look."""
    folder = Path(os.path.realpath(folder))
    if folder.parent.is_dir() and _leftovers(folder):
        try:
            with locked(folder.parent):
                _mend(folder)
        except OSError as error:
            raise told(folder, error) from error


def verify(folder: Path) -> None:
    """Raise BlockwrightError naming the first file that does not match the manifest of `folder`."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        files: dict[str, dict[str, object]] = manifest["files"]
        if manifest["format"] > FORMAT:
            raise BlockwrightError(f"{path}: format {manifest['format']}", allowed=f"up to {FORMAT}", do="Use a newer blockwright")
        entries = [(name, int(str(entry["size"])), str(entry["sha256"])) for name, entry in files.items()]
    except FileNotFoundError:
        raise BlockwrightError(f"{folder}: no {MANIFEST}", do="Write the folder again; it is not whole") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BlockwrightError(f"{path}: not a manifest", do="Write the folder again; this file is damaged") from None
    for name, size, digest in entries:
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BlockwrightError(f"{path}: names {name!r}, outside the folder", do="Do not use this folder")
        if not os.path.isfile(file):  # False also for a name that no file can have
            raise BlockwrightError(f"{file}: missing", do="Write or copy the folder again; the manifest names this file")
        if file.stat().st_size != size or sha256(file) != digest:
            raise BlockwrightError(f"{file}: differs from {MANIFEST}", do="Write or copy the folder again; this file was changed or cut")


def write_manifest(folder: Path) -> None:
    """Write `manifest.json`: size and sha256 of every other file of the folder."""
    files = {
        str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": sha256(p)}
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p != folder / MANIFEST
    }
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))


def sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """One file, old or new: written aside, synced, renamed."""
    scratch = path.with_name(f".{path.name}.new-{secrets.token_hex(4)}")
    try:
        with _system_errors():
            write(scratch)
        sync(scratch)
        scratch.rename(path)
        sync(path.parent)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


@contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a folder (flock: the kernel frees it when its holder dies). Raises BlockingIOError with wait=False."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(fd)


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(scratch: Path, folder: Path) -> None:
    """The new folder takes the name; the old one, if any, goes to the scratch name or away."""
    if not folder.exists():
        scratch.rename(folder)
    elif not _renameat2_exchange(scratch, folder):
        old = folder.rename(folder.with_name(f".{folder.name}.old-{secrets.token_hex(4)}"))
        try:
            scratch.rename(folder)  # killed before this line: `_mend` takes the old one back
        except BaseException:
            old.rename(folder)
            raise


def _renameat2_exchange(a: Path, b: Path) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    at_fdcwd, rename_exchange = -100, 2
    return renameat2 is not None and renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0


def _leftovers(folder: Path) -> list[Path]:
    ours = re.compile(rf"\.{re.escape(folder.name)}\.(old|new)-[a-z0-9_]{{8}}")
    return [p for p in folder.parent.iterdir() if ours.fullmatch(p.name) and p.is_dir() and not p.is_symlink()]


def _mend(folder: Path) -> None:
    """With the parent locked: bring back an old folder that lost its name, remove what dead writers left."""
    for path in _leftovers(folder):
        if path.name.startswith(f".{folder.name}.old-"):
            if folder.exists():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.rename(folder)
        else:
            try:
                with locked(path, wait=False):
                    shutil.rmtree(path, ignore_errors=True)
            except (BlockingIOError, FileNotFoundError):
                pass  # its writer lives, or has just finished


@contextmanager
def _system_errors() -> Iterator[None]:
    """safetensors tells of a full disk by an error of its own: make it the system's."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def told(folder: Path, error: OSError) -> BlockwrightError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return BlockwrightError(f"{folder}: the disk is full", do="Free space and run again; nothing of the old folder was changed")
    return BlockwrightError(f"{folder}: cannot be written ({error.strerror or error})", do="Name another output folder")
