"""Tensors by place against a parser of the file format in plain Python, damaged files, and what stays open or in memory."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from blockwright.blocks import parameters
from blockwright.blocks.parameters import Place, Tensors
from blockwright.errors import BlockwrightError

WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def some_tensors():
    g = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5, generator=g),
        "a.bias": torch.randn(3, generator=g).to(torch.bfloat16),
        "b": torch.arange(7, dtype=torch.int8),
        "one": torch.tensor([2.5], dtype=torch.float64),
        "scalar": torch.tensor(-3),
        "empty": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
    }


def parsed(raw):
    """A safetensors file in plain Python: name -> (dtype, shape, bytes)."""
    (length,) = struct.unpack("<Q", raw[:8])
    entries, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    entries.pop("__metadata__", None)
    return {n: (e["dtype"], tuple(e["shape"]), bytes(data[slice(*e["data_offsets"])])) for n, e in entries.items()}


def file_of(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def bytes_of(t):
    return bytes(t.contiguous().reshape(-1).view(torch.uint8).tolist()) if t.numel() else b""


def folder_with(folder, raw, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(raw)
    return folder


def peak_of(work):
    """How far the resident memory of this process rises above its level now while `work` runs, in bytes."""

    def field(name):
        return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident
    before = field("VmRSS")
    work()
    return field("VmHWM") - before


# reading


def test_a_file_holds_what_a_plain_parser_finds(tmp_path):
    save_file(some_tensors(), tmp_path / "model.safetensors")
    tensors, want = Tensors.of_folder(tmp_path), parsed((tmp_path / "model.safetensors").read_bytes())
    assert set(tensors) == set(want) == set(some_tensors()) and len(tensors) == 7
    for name, (dtype, shape, content) in want.items():
        facts, read = tensors.facts(name), tensors.read([name])[name]
        assert facts.shape == tuple(read.shape) == shape and facts.dtype == read.dtype == parameters.DTYPES[dtype]
        assert bytes_of(read) == content and facts.nbytes == len(content)
        assert read.data_ptr() % 64 == 0  # fresh memory, wherever it lay in the file
    assert tensors.nbytes() == sum(len(content) for _, _, content in want.values())


@pytest.mark.parametrize("dtype", WIDTH)
def test_every_dtype_is_read_as_written(tmp_path, dtype):
    content = bytes([1] * WIDTH[dtype] * 3)
    folder_with(tmp_path, file_of({"t": {"dtype": dtype, "shape": [3, 1], "data_offsets": [0, len(content)]}}, content))
    tensors = Tensors.of_folder(tmp_path)
    assert tensors.facts("t").nbytes == len(content) and bytes_of(tensors.read(["t"])["t"]) == content


@pytest.mark.parametrize("dtype, bits", [("F8_E4M3", 8), ("F8_E5M2", 8), ("F4", 4), ("C64", 64), ("U16", 16), ("U32", 32), ("U64", 64)])
def test_an_odd_dtype_is_refused_with_those_allowed(tmp_path, dtype, bits):
    size = 4 * bits // 8
    folder_with(tmp_path, file_of({"odd.weight": {"dtype": dtype, "shape": [4], "data_offsets": [0, size]}}, bytes(size)))
    with pytest.raises(BlockwrightError, match=rf"model\.safetensors: tensor 'odd\.weight' has dtype {dtype}. Allowed: F64, F32, .*BF16"):
        Tensors.of_folder(tmp_path)


def test_shards_are_found_by_their_index_and_preferred_to_a_single_file(tmp_path):
    parts = {"x-1.safetensors": {"a": torch.ones(2), "unlisted": torch.ones(1)}, "x-2.safetensors": {"b": torch.zeros(3)}}
    for file, content in parts.items():
        save_file(content, tmp_path / file)
    save_file({"stale": torch.ones(9)}, tmp_path / "model.safetensors")
    (tmp_path / parameters.INDEX).write_text(json.dumps({"weight_map": {"b": "x-2.safetensors", "a": "x-1.safetensors"}}))
    tensors = Tensors.of_folder(tmp_path)
    assert set(tensors) == {"a", "b"} and tensors["b"] == Place(tmp_path / "x-2.safetensors", "b")
    assert tensors.read(["b", "a"])["a"].tolist() == [1, 1]
    save_file({"c": torch.ones(1)}, tmp_path / "adapter.safetensors")
    assert set(Tensors.of_folder(tmp_path, stem="adapter")) == {"c"}


def test_nothing_stays_open_or_mapped(tmp_path):
    save_file(some_tensors(), tmp_path / "model.safetensors", metadata={"made": "here"})
    tensors = Tensors.of_folder(tmp_path)
    read = tensors.read(tensors)
    assert parameters.metadata(tmp_path / "model.safetensors") == {"made": "here"}
    assert parameters.header(tmp_path / "model.safetensors").keys() == read.keys()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert not any(str(tmp_path) in os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
    (tmp_path / "model.safetensors").write_bytes(b"")  # would be seen through a mapping
    assert bytes_of(read["a.weight"]) == bytes_of(some_tensors()["a.weight"])


def test_only_what_is_asked_for_is_read(tmp_path):
    huge = 2**32  # a sparse file: it costs no disk
    header = {
        "small": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "huge": {"dtype": "U8", "shape": [huge], "data_offsets": [16, 16 + huge]},
    }
    folder_with(tmp_path, file_of(header, bytes(16)))
    os.truncate(tmp_path / "model.safetensors", (tmp_path / "model.safetensors").stat().st_size + huge)

    def work():
        tensors = Tensors.of_folder(tmp_path)
        assert tensors.nbytes() == huge + 16 and tensors.read(["small"])["small"].tolist() == [0] * 4

    assert peak_of(work) < 2**25


def test_what_is_read_is_a_copy(tmp_path):
    save_file(some_tensors(), tmp_path / "model.safetensors")
    for tensors in (Tensors.of_folder(tmp_path), Tensors.of_memory(some_tensors())):
        tensors.read(["a.weight"])["a.weight"].zero_()
        assert torch.equal(tensors.read(["a.weight"])["a.weight"], some_tensors()["a.weight"])


# sharing by place


def test_names_that_are_one_tensor_share_a_place():
    base = torch.arange(12.0)
    whole = base.view(3, 4)
    named = {
        "head": whole,
        "embed": whole.view(3, 4),
        "bits": whole.view(torch.int32),
        "flat": base,
        "row": base[:4],
        "next": base[4:8],
        "turned": base[:9].view(3, 3),
        "turned.T": base[:9].view(3, 3).T,
        "equal": whole.clone(),
        "none": torch.empty(0),
        "nothing": torch.empty(0),
    }
    tensors = Tensors.of_memory(named)
    assert tensors["head"] == tensors["embed"] and len(set(tensors.values())) == len(named) - 1
    read = tensors.read(tensors)
    assert read["head"] is read["embed"] and read["head"] is not read["equal"]
    assert all(torch.equal(read[n], t) and read[n].dtype == t.dtype for n, t in named.items())
    assert tensors.nbytes() == 4 * (12 + 12 + 12 + 4 + 4 + 9 + 9 + 12)
    gradients = Tensors.of_memory({"p": torch.nn.Parameter(torch.ones(2))}).read(["p"])["p"]
    assert not gradients.requires_grad


def test_one_old_name_under_two_new_ones_is_shared(tmp_path):
    save_file(some_tensors(), tmp_path / "model.safetensors")
    for tensors in (Tensors.of_folder(tmp_path), Tensors.of_memory(some_tensors())):
        new = tensors.renamed({"x": "a.weight", "y": "a.weight", "z": "b"})
        read = new.read(["x", "z", "y", "x"])
        assert list(new) == ["x", "y", "z"] and read.keys() == {"x", "y", "z"} and read["x"] is read["y"]
        assert new.nbytes() == 60 + 7 and new.facts("y").shape == (3, 5) and len(tensors) == 7
        with pytest.raises(KeyError):
            new.read(["a.weight"])


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_renaming_and_replacing_follow_a_plain_dict(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "renaming"
    if not folder.exists():
        save_file(some_tensors(), folder_with(folder, b"") / "model.safetensors")
    tensors = Tensors.of_folder(folder) if data.draw(st.booleans()) else Tensors.of_memory(some_tensors())
    oracle = {name: t.tolist() for name, t in some_tensors().items()}
    history = []
    for step in range(data.draw(st.integers(1, 5))):
        history.append((tensors, dict(oracle)))
        if data.draw(st.booleans()) and oracle:
            olds = data.draw(st.lists(st.sampled_from(sorted(oracle)), max_size=6))
            new_names = {f"{step}.{i}": old for i, old in enumerate(olds)}
            tensors, oracle = tensors.renamed(new_names), {new: oracle[old] for new, old in new_names.items()}
        else:
            removed = data.draw(st.sets(st.sampled_from(sorted(oracle)))) if oracle else set()
            fresh = {f"memory-{step}": torch.full((2,), float(step))}
            tensors = tensors.replaced(removed, {f"new-{step}": Place(None, f"memory-{step}")}, fresh)
            oracle = {n: v for n, v in oracle.items() if n not in removed} | {f"new-{step}": [float(step)] * 2}
    for made, want in [*history, (tensors, oracle)]:  # no edit changed the ones before it
        assert {name: t.tolist() for name, t in made.read(made).items()} == want
    assert len(tensors.memory) <= len(some_tensors()) + len(history)


def test_a_replaced_tensor_leaves_memory():
    tensors = Tensors.of_memory({"w": torch.ones(3), "v": torch.ones(2)})
    new = tensors.replaced(["w"], {"w": Place(None, "w2")}, {"w2": torch.zeros(3)})
    assert new.memory.keys() == {"v", "w2"} and new.read(["w"])["w"].tolist() == [0] * 3
    assert tensors.read(["w"])["w"].tolist() == [1] * 3


# damaged and hostile files


def check_like_parser(folder, raw):
    """Ours, or BlockwrightError; where ours is a result, it is what the plain parser finds."""
    try:
        tensors = Tensors.of_folder(folder)
        read = tensors.read(tensors)
        tensors.nbytes()
    except BlockwrightError as error:
        assert str(folder) in str(error)
        return False
    assert {n: (tuple(t.shape), bytes_of(t)) for n, t in read.items()} == {n: (shape, b) for n, (_, shape, b) in parsed(raw).items()}
    return True


def test_a_file_cut_at_any_byte_is_refused(tmp_path):
    whole = save(some_tensors())
    for length in range(len(whole)):
        assert not check_like_parser(folder_with(tmp_path, whole[:length]), whole)
    assert check_like_parser(folder_with(tmp_path, whole), whole)
    with pytest.raises(
        BlockwrightError, match=r"model\.safetensors: not a whole safetensors file \(.*\)\. Copy or download this file again"
    ):
        Tensors.of_folder(folder_with(tmp_path, whole[:-1]))


@settings(deadline=None, max_examples=400)
@given(data=st.data())
def test_a_mutated_file_is_refused_or_read_as_it_says(tmp_path_factory, data):
    raw = bytearray(save(some_tensors(), metadata={"format": "pt"}))
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.booleans()):
            raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
        else:  # likely to be JSON still
            raw[data.draw(st.integers(8, header - 1))] = data.draw(st.sampled_from(b'0123456789,:[]{}"aFBI-'))
    raw = bytes(raw[: data.draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))])
    check_like_parser(folder_with(tmp_path_factory.getbasetemp() / "mutated", raw), raw)


@pytest.mark.parametrize(
    "raw",
    [
        file_of({"t": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, bytes(64)),
        file_of({"t": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 64]}}, bytes(64)),
        file_of({"t": {"dtype": "F64", "shape": [2**32, 2**32], "data_offsets": [0, 64]}}, bytes(64)),
        file_of({"t": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]}}),
        file_of({"t": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
        file_of({"t": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, bytes(4)),
        file_of({"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(12)),  # bytes of nobody
        file_of({n: {"dtype": "I8", "shape": [4], "data_offsets": [o, o + 4]} for n, o in (("t", 0), ("u", 2))}, bytes(6)),  # overlapping
        file_of({}, length=2**40),
        file_of({}, length=2**63),
        file_of({}, length=2**64 - 1),
        file_of([]),
        file_of(b"[" * 100_000),
        file_of(b"\xff\xfe{}"),
        file_of({"__metadata__": {"format": 5}}),
        b"",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n",
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused_before_memory_is_taken(tmp_path, raw):
    folder_with(tmp_path, raw)

    def work():
        with pytest.raises(BlockwrightError, match=r"model\.safetensors: "):
            tensors = Tensors.of_folder(tmp_path)
            tensors.read(tensors)

    assert peak_of(work) < 2**25


def test_a_header_without_tensors_and_empty_shapes_are_valid(tmp_path):
    assert len(Tensors.of_folder(folder_with(tmp_path, file_of({})))) == 0
    wide = {"t": {"dtype": "F32", "shape": [0, 2**50], "data_offsets": [0, 0]}}
    tensors = Tensors.of_folder(folder_with(tmp_path, file_of(wide)))
    assert tensors.nbytes() == 0 and tensors.read(["t"])["t"].shape == (0, 2**50)


@pytest.mark.parametrize("file", ["../x", "sub/x", "/etc/x", "..", ".", "", "./x", "x/", "a\\b", "C:\\x", "\\\\host\\x", "x\0y"])
def test_an_index_that_names_a_file_outside_the_folder_is_refused(tmp_path, file):
    folder = folder_with(tmp_path / "m", save({"t": torch.ones(1)}), "x")
    (tmp_path / "x").write_bytes(save({"t": torch.ones(1)}))
    (folder / parameters.INDEX).write_text(json.dumps({"weight_map": {"t": file}}))
    with pytest.raises(BlockwrightError, match=r"index\.json: tensor 't' lies in .*, outside the model folder. Allowed: plain file names"):
        Tensors.of_folder(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": "x"}', '{"weight_map": null}', "[" * 100_000, "\ud800", "9" * 9999],
)
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / parameters.INDEX).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(BlockwrightError, match=r"index\.json: not a safetensors index. Allowed: .*weight_map"):
        Tensors.of_folder(tmp_path)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(BlockwrightError, match=r"no weights found. Allowed: model\.safetensors, or model\.safetensors\.index\.json"):
        Tensors.of_folder(tmp_path)
    (tmp_path / parameters.INDEX).mkdir()
    with pytest.raises(BlockwrightError, match=r"index\.json: not a safetensors index"):
        Tensors.of_folder(tmp_path)
    (tmp_path / parameters.INDEX).rmdir()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(BlockwrightError, match=r"model\.safetensors: not a whole safetensors file"):
        Tensors.of_folder(tmp_path)
    (tmp_path / parameters.INDEX).write_text(json.dumps({"weight_map": {"t": "part.safetensors", "u": "part.safetensors"}}))
    with pytest.raises(BlockwrightError, match=r"part\.safetensors: file missing. Copy the model folder again"):
        Tensors.of_folder(tmp_path)
    save_file({"t": torch.ones(1)}, tmp_path / "part.safetensors")
    with pytest.raises(BlockwrightError, match=r"promises tensor 'u' in part\.safetensors, which does not hold it"):
        Tensors.of_folder(tmp_path)


def test_a_file_that_changes_after_it_was_opened_is_told(tmp_path):
    save_file(some_tensors(), tmp_path / "model.safetensors")
    tensors = Tensors.of_folder(tmp_path)
    save_file({"other": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(BlockwrightError, match=r"tensor 'b' cannot be read .* was changed since it was opened"):
        tensors.read(["b"])
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BlockwrightError, match="file missing"):
        tensors.read(["b"])
