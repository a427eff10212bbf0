"""Folders against kills at every file operation, full disks, races, and manifests that lie."""

import errno
import hashlib
import itertools
import json
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockwright.blocks import folders
from blockwright.errors import BlockwrightError

OLD = {"config.json": b"old" * 50, "part/weights.bin": b"o" * 3000, "only-old.txt": b"x"}
NEW = {"config.json": b"new" * 70, "part/weights.bin": b"n" * 9000, "part/more/only-new.bin": b""}
FILE_OPERATIONS = {
    "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.scandir", "os.listdir", "shutil.rmtree", "fcntl.flock",
    "ctypes.dlsym",  # the last event before the exchange, which none announces
}  # fmt: skip


def writer(files):
    def write(scratch):
        for name, content in files.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_bytes(content)

    return write


def held(folder):
    """What a folder holds besides its manifest, None for no folder. The manifest must fit: read here without `verify`."""
    if not folder.exists():
        return None
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    manifest = json.loads(files.pop("manifest.json"))
    facts = {name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()}
    assert manifest == {"format": 1, "files": facts}
    return files


def forked(work):
    """A child that runs `work` and exits with what it returns (None: 0), or with 70 where it raises."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = work() or 0
        finally:
            os._exit(code)
    return pid


def child(work):
    """Run `work` in a forked child. Returns its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1])


def killed_at(operation, work):
    """Run `work` in a child that kills itself at its n-th file operation. Returns whether it was killed; else it must have finished."""

    def doomed():
        left = itertools.count(operation - 1, -1)
        sys.addaudithook(lambda event, _: os.kill(os.getpid(), signal.SIGKILL) if event in FILE_OPERATIONS and next(left) == 0 else None)
        work()

    code = child(doomed)
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.fixture
def no_fsync(monkeypatch):
    """A kill takes nothing that fsync would have kept, and a thousand of them take a minute."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(params=["exchange", "two renames"])
def way(request, monkeypatch):
    if request.param == "two renames":
        monkeypatch.setattr(folders, "_renameat2_exchange", lambda a, b: False)
    return request.param


# written whole


def test_what_is_written_is_there_with_its_manifest_and_nothing_beside_it(tmp_path, way):
    folder = tmp_path / "deep" / "er" / "out"
    for files in (OLD, NEW, OLD):
        folders.publish(folder, writer(files))
        assert held(folder) == files and os.listdir(folder.parent) == ["out"]
        folders.verify(folder)
    assert folder.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_writer_that_fails_leaves_the_old_folder(tmp_path, error):
    def write(scratch):
        writer(NEW)(scratch)
        raise error

    folder = tmp_path / "out"
    for before in (None, OLD):
        if before:
            folders.publish(folder, writer(before))
        with pytest.raises(error):
            folders.publish(folder, write)
        assert held(folder) == before and len(os.listdir(tmp_path)) == bool(before)


def test_all_is_on_disk_before_the_name_changes_and_the_name_after(tmp_path, way, monkeypatch):
    folder, synced, at_exchange = tmp_path / "out", [], []
    folders.publish(folder, writer(OLD))
    fsync, exchange = os.fsync, folders._exchange

    def noted(scratch, target):
        at_exchange.extend(synced)
        everything = {str(p) for p in scratch.rglob("*")} | {str(scratch)}
        exchange(scratch, target)
        assert everything <= set(at_exchange)

    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(folders, "_exchange", noted)
    folders.publish(folder, writer(NEW))
    assert len(at_exchange) >= 7 and str(tmp_path) in synced[len(at_exchange) :]
    synced.clear()
    folders.replace_file(tmp_path / "unit", lambda p: p.write_bytes(b"new"))
    assert len(synced) == 2 and ".unit.new-" in synced[0] and synced[1] == str(tmp_path)


# kills


@pytest.mark.parametrize("before", [None, OLD], ids=["nothing before", "a folder before"])
def test_a_kill_at_any_file_operation_leaves_all_old_or_all_new(tmp_path, way, before, no_fsync):
    seen, cut = [], 0
    for operation in itertools.count(1):
        folder = tmp_path / str(operation) / "out"
        folder.parent.mkdir()
        if before:
            folders.publish(folder, writer(before))
        killed = killed_at(operation, lambda: folders.publish(folder, writer(NEW)))  # noqa: B023 (called at once)
        cut += before is not None and not folder.exists()
        if way == "exchange":
            assert held(folder) in (before, NEW)  # as it lies, before anybody mends it
        folders.settle(folder)
        assert held(folder) in (before, NEW)
        assert os.listdir(folder.parent) == (["out"] if folder.exists() else [])
        seen.append(held(folder) == NEW)
        folders.publish(folder, writer(OLD))
        assert held(folder) == OLD and os.listdir(folder.parent) == ["out"]
        if not killed:
            break
    assert operation > 30 and seen == sorted(seen) and len(set(seen)) == 2  # first old, from one operation on new
    assert cut == (way == "two renames" and before is not None)  # one kill fell between the two renames


def test_a_kill_while_mending_is_mended_too(tmp_path, monkeypatch, no_fsync):
    monkeypatch.setattr(folders, "_renameat2_exchange", lambda a, b: False)

    def leave_half_done(operation, name):
        folder = tmp_path / name / "out"
        folders.publish(folder, writer(OLD))
        killed_at(operation, lambda: folders.publish(folder, writer(NEW)))
        return folder

    half_done = []
    for operation in itertools.count(1):
        folder = leave_half_done(operation, f"try-{operation}")
        if any(".old-" in name for name in os.listdir(folder.parent)):
            half_done.append(operation)
        elif half_done:
            break
    mended = []
    for operation in half_done[:3]:  # old one without its name; then the new one in place and the old one still to remove
        for second in itertools.count(1):
            folder = leave_half_done(operation, f"{operation}-{second}")
            killed = killed_at(second, lambda: folders.settle(folder))  # noqa: B023
            folders.settle(folder)
            assert held(folder) in (OLD, NEW) and os.listdir(folder.parent) == ["out"]
            mended.append(held(folder) == NEW)
            if not killed:
                break
    assert set(mended) == {True, False}


def test_a_kill_in_the_middle_of_a_file_leaves_the_old_folder(tmp_path):
    folder = tmp_path / "out"
    folders.publish(folder, writer(OLD))

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # python ignores it; by default it kills
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        folders.publish(folder, writer(NEW))

    assert child(limited) == -signal.SIGXFSZ
    scratch = next(p for p in tmp_path.iterdir() if p != folder)
    assert held(folder) == OLD and 0 < (scratch / "part/weights.bin").stat().st_size < 9000
    folders.settle(folder)
    assert held(folder) == OLD and os.listdir(tmp_path) == ["out"]


def test_one_file_is_old_or_new_at_a_kill_at_any_file_operation(tmp_path, no_fsync):
    file, seen = tmp_path / "unit.json", []
    for operation in itertools.count(1):
        file.write_bytes(b"old")
        killed = killed_at(operation, lambda: folders.replace_file(file, lambda p: p.write_bytes(b"new" * 999)))
        seen.append(file.read_bytes())
        if not killed:
            break
    assert set(seen) == {b"old", b"new" * 999} and seen[-1] != b"old"


def test_the_lock_of_a_killed_writer_is_free(tmp_path):
    def hold():
        with folders.locked(tmp_path):
            os.write(ready, b"1")
            signal.pause()

    reading, ready = os.pipe()
    pid = forked(hold)
    os.read(reading, 1)
    with pytest.raises(BlockingIOError), folders.locked(tmp_path, wait=False):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with folders.locked(tmp_path, wait=False):
        pass


# several at once


def test_two_writers_and_a_reader_race(tmp_path, way):
    folder = tmp_path / "out"
    rounds = 25

    def write_on():
        for i in range(rounds):
            mark = f"{os.getpid()} {i}".encode()
            folders.publish(folder, writer({"a": mark, "b": mark * 1000}))

    folders.publish(folder, writer({"a": b"start", "b": b"start" * 1000}))
    seen, absent, living = set(), 0, {forked(write_on), forked(write_on)}
    while living:
        for pid in list(living):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                assert status == 0
                living.remove(pid)
        folders.settle(folder)
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            absent += 1
            continue
        try:
            a, b = (os.fdopen(os.open(name, os.O_RDONLY, dir_fd=fd), "rb").read() for name in "ab")
            assert b == a * 1000
            seen.add(a)
        except FileNotFoundError:
            pass  # this folder was replaced and is being removed
        finally:
            os.close(fd)
    assert len(seen) > 2 and os.listdir(tmp_path) == ["out"]
    if way == "exchange":
        assert absent == 0  # at every moment there is a folder of that name
    folders.verify(folder)
    assert held(folder)["a"].endswith(f" {rounds - 1}".encode())


def test_the_scratch_of_a_living_writer_is_left_alone(tmp_path):
    folder = tmp_path / "out"
    reading, ready = os.pipe()
    waiting, go = os.pipe()

    def slow(scratch):
        writer(NEW)(scratch)
        os.write(ready, b"1")
        os.read(waiting, 1)

    pid = forked(lambda: folders.publish(folder, slow))
    os.read(reading, 1)
    folders.settle(folder)
    folders.publish(folder, writer(OLD))
    assert held(folder) == OLD and len(os.listdir(tmp_path)) == 2
    os.write(go, b"1")
    assert os.waitpid(pid, 0)[1] == 0
    assert held(folder) == NEW and os.listdir(tmp_path) == ["out"]


def test_neighbours_with_similar_names_are_not_ours(tmp_path):
    (tmp_path / ".out.new-12345678").write_text("a file")
    (tmp_path / ".out.old-abcdefgh").symlink_to(tmp_path / "elsewhere")
    names = [".out.old-backup", ".out.new-ideas-of-2024", ".out.old-", ".out.newer", "out.old-12345678", ".outs.old-12345678"]
    for name in [*names, ".out.new-b.old-12345678", "elsewhere"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").write_text("mine")
    before = set(os.listdir(tmp_path))
    folders.settle(tmp_path / "out")
    folders.publish(tmp_path / "out", writer(OLD))
    folders.publish(tmp_path / "out", writer(NEW))
    assert set(os.listdir(tmp_path)) == before | {"out"} and held(tmp_path / "out") == NEW
    assert all((tmp_path / name / "precious").exists() for name in names)


# no room, no permission


@pytest.mark.parametrize("limit", [0, 1, 149, 150, 2999, 4096, 8999])
def test_a_full_disk_is_told_and_leaves_the_old_folder(tmp_path, limit):
    folder = tmp_path / "out"
    folders.publish(folder, writer(OLD))

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            folders.publish(folder, writer(NEW))
        except BlockwrightError as error:
            return 3 if f"{folder}: the disk is full. Free space" in str(error) else 4

    assert child(limited) == 3
    assert held(folder) == OLD and os.listdir(tmp_path) == ["out"]


def test_a_full_disk_is_told_by_safetensors_too(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    tensors = {"w": torch.ones(2000)}

    def limited(work, error):
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            work()
        except error as told:
            return 3 if "disk is full" in str(told) or getattr(told, "errno", None) == errno.EFBIG else 4

    folder, file = tmp_path / "out", tmp_path / "unit.safetensors"
    folders.publish(folder, writer(OLD))
    file.write_bytes(b"old")
    assert child(lambda: limited(lambda: folders.publish(folder, lambda p: save_file(tensors, p / "m.safetensors")), BlockwrightError)) == 3
    assert child(lambda: limited(lambda: folders.replace_file(file, lambda p: save_file(tensors, p)), OSError)) == 3
    assert held(folder) == OLD and file.read_bytes() == b"old" and sorted(os.listdir(tmp_path)) == ["out", "unit.safetensors"]


@pytest.mark.parametrize(
    "code, said", [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk is full"), (errno.EIO, "cannot be wr")]
)
def test_a_second_rename_that_fails_gives_the_old_folder_its_name_back(tmp_path, monkeypatch, code, said):
    folder = tmp_path / "out"
    folders.publish(folder, writer(OLD))
    rename = Path.rename

    def failing(self, target):
        if ".new-" in self.name:
            raise OSError(code, os.strerror(code))
        return rename(self, target)

    monkeypatch.setattr(folders, "_renameat2_exchange", lambda a, b: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(BlockwrightError, match=said):
        folders.publish(folder, writer(NEW))
    assert held(folder) == OLD and os.listdir(tmp_path) == ["out"]


def test_a_place_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    for place in (tmp_path / "file" / "out", tmp_path / "file" / "deeper" / "out"):
        with pytest.raises(BlockwrightError, match=r"out: cannot be written \(.*\)\. Name another output folder"):
            folders.publish(place, writer(NEW))
    with pytest.raises(BlockwrightError, match="file: is a file. Allowed: a folder, or a name that is free"):
        folders.publish(tmp_path / "file", writer(NEW))
    with pytest.raises(BlockwrightError, match="cannot be written .*name too long"):
        folders.publish(tmp_path / ("x" * 250), writer(NEW))
    assert (tmp_path / "file").read_text() == "not a folder" and os.listdir(tmp_path) == ["file"]

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "mkdir", read_only)
    with pytest.raises(BlockwrightError, match=r"cannot be written \(Read-only file system\)"):
        folders.publish(tmp_path / "out", writer(NEW))
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_parent_is_told(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(BlockwrightError, match=r"cannot be written \(Permission denied\)"):
        folders.publish(tmp_path / "out", writer(NEW))


# links


def test_a_link_to_a_folder_is_followed(tmp_path, way):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "out").symlink_to(disk / "big")
    for files in (OLD, NEW):  # a dangling link first, then a link to a folder
        folders.publish(tmp_path / "out", writer(files))
        assert (tmp_path / "out").is_symlink() and held(disk / "big") == files
        folders.settle(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["disk", "out"] and os.listdir(disk) == ["big"]


def test_links_inside_a_folder_are_read_and_never_removed_through(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "blob").write_bytes(b"blob")

    def linking(scratch):
        (scratch / "model.bin").symlink_to(tmp_path / "shared" / "blob")
        (scratch / "all").symlink_to(tmp_path / "shared")

    folder = tmp_path / "out"
    folders.publish(folder, linking)
    folders.verify(folder)
    (tmp_path / "shared" / "blob").write_bytes(b"BLOB")
    with pytest.raises(BlockwrightError, match=r"model\.bin: differs"):
        folders.verify(folder)
    folders.publish(folder, writer(NEW))
    assert (tmp_path / "shared" / "blob").read_bytes() == b"BLOB" and sorted(os.listdir(tmp_path)) == ["out", "shared"]
    with pytest.raises(BlockwrightError, match="cannot be written"):
        folders.publish(folder, lambda scratch: (scratch / "gone").symlink_to(tmp_path / "nowhere"))
    assert held(folder) == NEW


# manifests


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda f: (f / "part/weights.bin").unlink(), r"part/weights\.bin: missing"),
        (lambda f: (f / "part/weights.bin").write_bytes(b"o" * 2999), r"part/weights\.bin: differs from manifest\.json"),
        (lambda f: (f / "part/weights.bin").write_bytes(b"o" * 2999 + b"p"), r"part/weights\.bin: differs"),
        (lambda f: (f / "config.json").write_bytes(NEW["config.json"]), r"config\.json: differs"),
        (lambda f: ((f / "only-old.txt").unlink(), (f / "only-old.txt").mkdir()), r"only-old\.txt: missing"),
        (lambda f: (f / "manifest.json").unlink(), r"no manifest\.json. Write the folder again"),
        (lambda f: ((f / "manifest.json").unlink(), (f / "manifest.json").mkdir()), r"manifest\.json: not a manifest"),
    ],
)
def test_a_folder_that_does_not_match_its_manifest_is_refused_by_name_of_file(tmp_path, damage, said):
    folders.publish(tmp_path / "out", writer(OLD))
    damage(tmp_path / "out")
    with pytest.raises(BlockwrightError, match=said):
        folders.verify(tmp_path / "out")


X = hashlib.sha256(b"x").hexdigest()


def entry(name, size=1, sha256=X):
    return {"format": 1, "files": {name: {"size": size, "sha256": sha256}}}


@pytest.mark.parametrize(
    "manifest, said",
    [
        (entry("../secret"), r"names '\.\./secret', outside the folder"),
        (entry("part/../../secret"), "outside the folder"),
        (entry("/etc/hostname"), "names '/etc/hostname', outside the folder"),
        (entry(""), "missing"),
        (entry("."), "missing"),
        (entry("a\0b"), "missing"),
        (entry("\ud800"), "missing"),
        (entry("x" * 5000), "missing"),
        (entry("only-old.txt", size=2), r"only-old\.txt: differs"),
        (entry("only-old.txt", size="many"), "not a manifest"),
        (entry("only-old.txt", sha256=None), r"only-old\.txt: differs"),
        ({"format": 2, "files": {}}, "format 2. Allowed: up to 1. Use a newer blockwright"),
        ({"format": "1", "files": {}}, "not a manifest"),
        ({"format": 1}, "not a manifest"),
        ({"files": {}}, "not a manifest"),
        ({"format": 1, "files": ["only-old.txt"]}, "not a manifest"),
        ({"format": 1, "files": {"only-old.txt": "x"}}, "not a manifest"),
        ([], "not a manifest"),
        (None, "not a manifest"),
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path, manifest, said):
    (tmp_path / "secret").write_bytes(b"x")
    folders.publish(tmp_path / "out", writer(OLD))
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BlockwrightError, match=said):
        folders.verify(tmp_path / "out")


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"[" * 100_000, b'{"format": 1, "files": {"a": {"size": ' + b"9" * 9999 + b"}}}"])
def test_a_manifest_that_is_no_json_is_refused(tmp_path, text):
    folders.publish(tmp_path / "out", writer(OLD))
    (tmp_path / "out" / "manifest.json").write_bytes(text)
    with pytest.raises(BlockwrightError, match="not a manifest. Write the folder again"):
        folders.verify(tmp_path / "out")


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_a_mutated_manifest_is_refused_or_still_true(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.exists():
        folders.publish(folder, writer(OLD))
    path = folder / "manifest.json"
    whole = path.read_bytes()
    cut = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        cut[data.draw(st.integers(0, len(cut) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(cut[: data.draw(st.integers(0, len(cut)))])
    try:
        folders.verify(folder)
        said = json.loads(path.read_bytes())["files"]
        assert all((folder / n).stat().st_size == int(e["size"]) for n, e in said.items())
    except BlockwrightError as error:
        assert "\n" not in str(error).replace(str(folder), "")
    finally:
        path.write_bytes(whole)
