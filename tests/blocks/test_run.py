"""The Run against loops over the living model by hand, and against kills at every file operation of its journal."""

import contextlib
import copy
import hashlib
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from torch import nn

from blockwright.blocks import folders, layers
from blockwright.blocks.layers import Blueprint
from blockwright.blocks.packed import PackedLinear
from blockwright.blocks.run import Run, stage
from blockwright.blocks.stream import Stream
from blockwright.errors import BlockwrightError

N, T = 4, 7
PATH = "model.layers"


def run_of(model, **options):
    return Run(Blueprint.of_module(model), calibration=tiny.ids(N, T), batch=N, **options)


def weights(blueprint):
    return {name: t.float() for name, t in blueprint.build().state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# what x and y are, by hand


@torch.no_grad()
def through(model, mask=None):
    """The whole living model once: what each block is given and gives."""
    seen = []
    handles = [b.register_forward_hook(lambda m, args, out: seen.append((args[0].clone(), out.clone()))) for b in model.get_submodule(PATH)]
    tiny.logits(model, tiny.ids(N, T), attention_mask=mask)
    for handle in handles:
        handle.remove()
    return seen


def grow(block_module, i, number):
    """What the passes of these tests do to a block: something else in every block and pass."""
    for p in block_module.parameters():
        p.mul_(1 + 0.05 * (i + 1) + 0.03 * number)


PASSES = [  # stage, inputs, target, write
    [
        ("treated", True, True),
        ("dense", True, True),
        ("treated", False, False),
        ("none", False, True),
        ("treated", True, True),
    ],
    [
        ("dense", True, False),
        ("treated", False, True),
        ("dense", False, True),
        ("none", True, False),
        ("treated", True, True),
    ],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("journalled", [False, True])
def test_inputs_and_targets_are_those_of_a_loop_by_hand(tmp_path, dtype, journalled):
    now = tiny.model("llama")  # computed in fp32, kept in dtype
    with torch.no_grad():
        for p in now.parameters():
            p.copy_(p.to(dtype))
    run = run_of(copy.deepcopy(now).to(dtype), journal=tmp_path if journalled else None)
    for number, passes in enumerate(PASSES):
        run.begin(f"{number}-stage")
        entered = copy.deepcopy(now)
        for n, (inputs, target, write) in enumerate(passes):
            got = []

            def visit(block, x, y, rng, got=got, n=n):
                got.append((None if x is None else x.clone(), None if y is None else y.clone()))
                grow(block.module, block.index, n)

            run.blocks(visit, inputs=inputs, target=target, write=write)
            for i, (x, y) in enumerate(got):
                assert (x is None) == (inputs == "none") and (y is None) == (not target)
                if x is not None:
                    assert torch.equal(x, through(now if inputs == "treated" else entered)[i][0])
                if y is not None:
                    assert torch.equal(y, through(entered)[i][1])
                if write:
                    with torch.no_grad():
                        grow(now.get_submodule(f"{PATH}.{i}"), i, n)
                        for p in now.parameters():
                            p.copy_(p.to(dtype))
            assert len(got) == 3
    built = run.model.build()
    assert {p.dtype for p in built.parameters()} == {dtype}  # stored as it was stored
    assert same(weights(run.model), now.state_dict())


def test_padding_reaches_the_blocks():
    model, mask = tiny.model("llama"), torch.ones(N, T, dtype=torch.int64)
    mask[1, :4] = 0
    run, got = run_of(model, mask=mask), []
    run.blocks(lambda block, x, y, rng: got.append(y), inputs="treated", target=True)
    for y, (_, want) in zip(got, through(model, mask), strict=True):
        assert torch.allclose(y[mask.bool()], want[mask.bool()], rtol=0, atol=1e-6 * float(want.abs().max()))


def test_the_input_model_is_never_changed_and_what_is_not_written_is_dropped():
    model = tiny.model("llama")
    before = copy.deepcopy(model.state_dict())
    run = run_of(model)
    run.blocks(lambda block, x, y, rng: grow(block.module, block.index, 0), inputs="treated")
    assert same(weights(run.model), before)
    run.blocks(lambda block, x, y, rng: grow(block.module, block.index, 0), write=True)
    assert same(model.state_dict(), before) and not same(weights(run.model), before)


def test_no_two_passes_in_memory_keep_a_tensor_in_one_place():
    """Places tell whether a block is still as it entered the stage: one used twice would pass a changed block for the old one."""
    run, seen = run_of(tiny.model("llama")), set()
    for _ in range(12):
        run.blocks(lambda block, x, y, rng: None, write=True)
        written = {place for name, place in run.model.tensors.items() if name.startswith(PATH)}
        assert len(written) == 27 and not written & seen
        seen |= written


def test_one_block_is_resident_at_a_time(tmp_path, monkeypatch):
    tiny.model("llama").save_pretrained(tmp_path / "m")
    alive, most, load = [], [], Stream.block

    def counted(self, *args):
        most.append(sum(r() is not None for r in alive))
        block = load(self, *args)
        alive.append(weakref.ref(block.module))
        return block

    monkeypatch.setattr(Stream, "block", counted)
    run = Run(Blueprint.of_folder(tmp_path / "m"), calibration=tiny.ids(N, T), journal=tmp_path / "journal")
    for inputs, target, write in PASSES[0] + PASSES[1]:
        most.clear()
        run.blocks(lambda block, x, y, rng: grow(block.module, block.index, 0), inputs=inputs, target=target, write=write)
        # one more only where the block as it entered the stage is asked for its output too
        assert max(most) <= (1 if target or inputs == "dense" else 0)
    assert not any(r() for r in alive)


# random numbers


def test_random_numbers_are_those_of_their_unit_whatever_ran_before():
    def numbers(seed, stages, noise=0):
        torch.manual_seed(noise)
        found = {}
        run = Run(Blueprint.of_module(tiny.model("llama")), seed=seed)
        for name in stages:
            run.begin(name)
            for number in range(2):

                def visit(block, x, y, rng, key=(name, number)):
                    torch.rand(noise)
                    found[*key, block.index] = torch.rand(3, generator=rng).tolist()

                run.blocks(visit)
        return found

    want = numbers(0, "ab")
    assert numbers(0, "ab", noise=5) == want and len({tuple(v) for v in want.values()}) == 2 * 2 * 3  # no two units alike
    alone = numbers(0, "b")
    assert alone == {k: v for k, v in want.items() if k[0] == "b"}
    assert not {tuple(v) for v in numbers(1, "ab").values()} & {tuple(v) for v in want.values()}


def test_the_same_seed_gives_the_same_bits_whatever_ran_before():
    @stage
    def jitter(run):
        def visit(block, x, y, rng):
            for p in block.module.parameters():
                p.add_(torch.randn(p.shape, generator=rng) * x.std())

        run.blocks(visit, inputs="treated", write=True)

    def once(seed):
        return jitter(tiny.model("llama"), calibration=tiny.ids(N, T), seed=seed).state_dict()

    first = once(3)
    torch.rand(17)
    once(4)
    run_of(tiny.model("gpt2"))
    assert same(once(3), first) and not same(once(4), first)


# facts


def facts_of(index):
    base = torch.arange(12.0).view(3, 4) + index
    return {
        "matrix": base,
        "turned": base.T,
        "row": base[1],
        "overlap": base[:2],
        "half": base.to(torch.bfloat16),
        "codes": torch.tensor([-1, 2], dtype=torch.int8),
        "flags": torch.tensor(True),
        "none": torch.zeros(0, 3),
        "learned": nn.Parameter(torch.ones(2)),
        "number": 0.1 + index,
        "tiny": 5e-324,
        "big": 2**70,
        "nested": {"list": [1, 2.5, None, True, "ünï"], "empty": {}},
        "pair": (1, 2),
    }


def test_facts_survive_the_journal_and_memory_alike(tmp_path):
    def visit(block, x, y, rng):
        calls.append(block.index)
        return facts_of(block.index) if block.index != 1 else None

    calls = []
    found = [run_of(tiny.model("llama"), journal=journal).blocks(visit) for journal in (None, tmp_path, tmp_path)]
    assert calls == [0, 1, 2] * 2  # not a third time
    for facts in found:
        assert facts[1] == {}
        for i in (0, 2):
            want = facts_of(i) | {"pair": [1, 2]}
            assert facts[i].keys() == want.keys()
            for key, value in want.items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(facts[i][key], value) and facts[i][key].dtype == value.dtype and not facts[i][key].requires_grad
                else:
                    assert facts[i][key] == value and type(facts[i][key]) is type(value)


def test_facts_are_copies():
    running = torch.zeros(2)

    def visit(block, x, y, rng):
        return {"sum": running.add_(1)}

    assert [f["sum"].tolist() for f in run_of(tiny.model("llama")).blocks(visit)] == [[1, 1], [2, 2], [3, 3]]


# shared blocks


def own_bias(name):
    return name.endswith("bias") or "norm" in name or "ln_" in name


@pytest.mark.parametrize("journalled", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_shared_block_is_treated_once_and_its_siblings_follow(tmp_path, name, journalled):
    model = tiny.model(name)
    path = layers.chain_path(model)
    shared = Blueprint.of_module(model).with_shared({2: 0}, own_bias)
    run = Run(shared, calibration=tiny.ids(N, T), batch=N, journal=tmp_path if journalled else None)
    treated = []

    def scale(block, x, y, rng):
        for n, linear in block.linears().items():
            treated.append(n)
            linear.weight.mul_(1.5)

    want = shared.build()
    for i in (0, 1):  # block 2 shares the weights of block 0
        for m in want.get_submodule(f"{path}.{i}").modules():
            if layers.is_linear(m):
                m.weight.mul_(1.5)
    run.blocks(scale, inputs="treated", write=True)
    assert len(treated) == len(set(treated)) and not any(n.startswith(f"{path}.2.") for n in treated)
    built = run.model.build()
    assert same(built.state_dict(), want.state_dict())
    assert torch.equal(tiny.logits(built, tiny.ids()), tiny.logits(want, tiny.ids()))
    assert run.model.tensors.nbytes() == shared.tensors.nbytes()  # shared still
    first, last = (dict(built.get_submodule(f"{path}.{i}").named_parameters()) for i in (0, 2))
    assert all((first[n] is last[n]) == (not own_bias(n)) for n in first)


@pytest.mark.parametrize("journalled", [False, True])
@pytest.mark.parametrize("name, last", [("llama", "up_proj"), ("gpt2", "c_fc")])
def test_a_shared_linear_is_packed_for_all_and_stays_packed(tmp_path, name, last, journalled):
    model = tiny.model(name)
    path = layers.chain_path(model)
    shared = Blueprint.of_module(model).with_shared({2: 0}, own_bias)
    run = Run(shared, calibration=tiny.ids(N, T), batch=N, journal=tmp_path if journalled else None)

    def pack(block, x, y, rng):
        for n, linear in block.linears([last]).items():
            w = linear.weight if isinstance(linear, nn.Linear) else linear.weight.T
            scale = (w.abs().amax(1, keepdim=True) / 7).to(torch.bfloat16)
            codes = (w / scale).round().clamp(-8, 7).to(torch.int8)
            block.swap(n, PackedLinear.of(linear, codes, scale, bits=4, group_size=-1))

    run.blocks(pack, write=True)
    run.begin("again")
    run.blocks(lambda block, x, y, rng: None, inputs="treated", write=True)  # a later stage keeps what it does not touch
    built = run.model.build()
    want = shared.build()
    for i in range(3):
        m = want.get_submodule(f"{path}.{i}.mlp.{last}")
        w = m.weight if isinstance(m, nn.Linear) else m.weight.T
        scale = (w.abs().amax(1, keepdim=True) / 7).to(torch.bfloat16).float()
        w.copy_((w / scale).round().clamp(-8, 7) * scale)
        got = built.get_submodule(f"{path}.{i}.mlp.{last}")
        assert isinstance(got, PackedLinear) and got.weight_scale.dtype == torch.bfloat16
    assert torch.allclose(tiny.logits(built, tiny.ids()), tiny.logits(want, tiny.ids()), atol=1e-4)
    places = run.model.tensors
    assert places[f"{path}.0.mlp.{last}.weight_packed"] == places[f"{path}.2.mlp.{last}.weight_packed"]
    assert f"{path}.2.mlp.{last}.weight" not in places


# not finite, not there


def units(journal):
    return sorted(str(p.relative_to(journal)) for p in journal.rglob("*") if p.is_file())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda b, v: b.module.mlp.up_proj.weight.data.view(-1)[7:8].fill_(v), r"model\.layers\.1\.mlp\.up_proj\.weight \(block model\."),
        (lambda b, v: {"score": torch.tensor([1.0, v])}, r"block model\.layers\.1: score: \S+ at \[1\]"),
        (lambda b, v: {"score": {"deep": [1.0, v]}}, r"block model\.layers\.1: \{'score': .*\} is not finite"),
    ],
)
def test_what_is_not_finite_stops_the_run_and_reaches_no_file(tmp_path, bad, damage, said):
    def visit(block, x, y, rng):
        if block.index == 1:
            facts = damage(block, bad)
            return facts if isinstance(facts, dict) else None

    for journal in (None, tmp_path):
        with pytest.raises(BlockwrightError, match=said):
            run_of(tiny.model("llama"), journal=journal).blocks(visit, write=True)
    assert units(tmp_path) == ["stage/pass-0/unit-0000.safetensors"]


def test_an_activation_that_is_not_finite_names_its_block(tmp_path):
    model = tiny.model("llama")
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1e38)
    for inputs, target, before in (("treated", False, 2), ("dense", False, 1), ("none", True, 1)):
        with pytest.raises(BlockwrightError, match=r"output of block model\.layers\.1: -?(inf|nan)"):
            run_of(model, journal=tmp_path / (inputs + str(target))).blocks(lambda *_: None, inputs=inputs, target=target, write=True)
        assert len(units(tmp_path / (inputs + str(target)))) == before
    model.model.layers[0].mlp.down_proj.weight.data[2, 3] = float("nan")
    with pytest.raises(BlockwrightError, match=r"model\.layers\.0\.mlp\.down_proj\.weight: nan at \[2, 3\]"):
        run_of(model, journal=tmp_path / "x").blocks(lambda *_: None, write=True)
    assert not (tmp_path / "x").exists()


def test_a_weight_that_overflows_its_dtype_is_told():
    def visit(block, x, y, rng):
        block.module.mlp.up_proj.weight.data[0, 0] = 1e5  # fp16 ends at 65504

    run_of(tiny.model("llama")).blocks(visit, write=True)
    with pytest.raises(BlockwrightError, match=r"model\.layers\.0\.mlp\.up_proj\.weight \(block model\.layers\.0\): inf at \[0, 0\]"):
        run_of(tiny.model("llama").half()).blocks(visit, write=True)


def test_passes_that_need_data_ask_for_it():
    run = Run(Blueprint.of_module(tiny.model("llama")))
    run.begin("mine")
    for options in ({"inputs": "treated"}, {"inputs": "dense"}, {"target": True}):
        with pytest.raises(BlockwrightError, match="mine: needs calibration text. Give `calibration:` in the recipe"):
            run.blocks(lambda *_: None, **options)
    assert run.blocks(lambda *_: {"x": 1}) == [{"x": 1}] * 3


def test_dense_inputs_end_where_blocks_are_dropped():
    run = run_of(tiny.model("llama"))
    run.model = run.model.with_layers([0, 2])
    for options in ({"inputs": "dense"}, {"inputs": "treated", "target": True}):
        with pytest.raises(BlockwrightError, match="stage: dense inputs after blocks were dropped"):
            run.blocks(lambda *_: None, **options)
    assert len(run.blocks(lambda *_: None, inputs="treated")) == 2
    run.begin("next")
    assert len(run.blocks(lambda *_: None, inputs="dense", target=True)) == 2


def test_a_damaged_unit_is_refused(tmp_path):
    run_of(tiny.model("llama"), journal=tmp_path).blocks(lambda *_: {"x": torch.ones(3)}, write=True)
    file = tmp_path / "stage/pass-0/unit-0001.safetensors"
    whole = file.read_bytes()
    for content in (b"", whole[:-1], whole.replace(b'"unit"', b'"tinu"'), whole.replace(b'{\\"facts', b'?\\"facts')):
        file.write_bytes(content)
        with pytest.raises(BlockwrightError, match=r"unit-0001\.safetensors: (not a whole safetensors file|no finished unit)"):
            run_of(tiny.model("llama"), journal=tmp_path).blocks(lambda *_: None, write=True)


def test_progress_tells_every_block_and_step():
    told = []
    run = run_of(tiny.model("llama"), progress=lambda what, done, total: told.append((what, done, total)))
    run.begin("mine")
    run.blocks(lambda *_: None)
    p = nn.Parameter(torch.ones(1))
    run.train(lambda i, rng: p.sum(), torch.optim.SGD([p], lr=0.1), steps=2)
    assert told == [("mine pass 1", i, 3) for i in range(4)] + [("mine training", i, 2) for i in range(3)]


# a stage in memory


def test_a_stage_takes_a_model_or_a_run():
    @stage
    def double(run, *, factor=2.0):
        """Doc."""

        def visit(block, x, y, rng):
            for linear in block.linears().values():
                linear.weight.mul_(factor)

        run.blocks(visit, inputs="treated", write=True)

    model = tiny.model("llama").to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    smaller = double(model, calibration=tiny.ids(N, T), factor=4.0)
    assert same(model.state_dict(), before) and double.__name__ == "double" and double.__doc__ == "Doc."
    for name, tensor in smaller.state_dict().items():
        factor = 4 if "proj" in name else 1
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, before[name] * factor)
    run = run_of(model)
    assert double(run) is None and torch.equal(
        weights(run.model)[f"{PATH}.1.mlp.up_proj.weight"], before[f"{PATH}.1.mlp.up_proj.weight"] * 2
    )
    with pytest.raises(BlockwrightError, match="double: needs calibration text"):
        double(model)


# training


OPTIMIZERS = {
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.05),
    "amsgrad": lambda ps: torch.optim.AdamW(ps, lr=0.05, amsgrad=True, weight_decay=0.1),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, nesterov=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05),
}


def problem():
    """Parameters (one of them a scalar, one without a gradient) and a noisy loss over them."""
    g = torch.Generator().manual_seed(0)
    ps = [nn.Parameter(torch.randn(4, 3, generator=g)), nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.ones(2))]

    def loss(i, rng):
        return ((ps[0] @ torch.randn(3, generator=rng)).square().mean() + (ps[1] - i) ** 2 / 50).sqrt()

    return ps, loss


def decay(optimizer):
    def before(i):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 / (1 + i)

    return before


@pytest.mark.parametrize("every", [1, 3, 20])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_resumes_at_any_step_to_the_same_bits(tmp_path, name, every):
    steps = 7
    run = Run(Blueprint.of_module(tiny.model("llama")), seed=5)
    ps, loss = problem()  # by hand
    optimizer, want = OPTIMIZERS[name](ps), []
    for i in range(steps):
        decay(optimizer)(i)
        optimizer.zero_grad()
        value = loss(i, run.generator(0, i))
        value.backward()
        optimizer.step()
        want.append(value.item())
    want_ps = [p.detach().clone() for p in ps]
    assert len(set(want)) == steps
    for stop in [None, *range(steps)]:
        calls = []

        def attempt(stop, journal, calls=calls):
            ps, loss = problem()

            def watched(i, rng):
                calls.append(i)
                if i == stop:
                    raise KeyboardInterrupt
                return loss(i, rng)

            optimizer = OPTIMIZERS[name](ps)
            run = Run(Blueprint.of_module(tiny.model("llama")), seed=5, journal=journal)
            return run.train(watched, optimizer, steps=steps, every=every, before=decay(optimizer)), ps

        journal = None if stop is None else tmp_path / f"{stop}"
        if stop is not None:
            with pytest.raises(KeyboardInterrupt):
                attempt(stop, journal)
            assert calls == list(range(stop + 1))
            calls.clear()
        losses, ps = attempt(None, journal)
        assert losses == want and all(map(torch.equal, ps, want_ps))
        assert calls == list(range(0 if stop is None else stop - stop % every, steps))  # nothing that was kept is done again
        if journal is not None:
            calls.clear()
            losses, ps = attempt(None, journal)
            assert losses == want and all(map(torch.equal, ps, want_ps)) and calls == []


def test_a_loss_that_is_not_finite_stops_and_is_not_kept(tmp_path):
    p = nn.Parameter(torch.ones(2))
    run = run_of(tiny.model("llama"), journal=tmp_path)
    run.begin("mine")
    with pytest.raises(BlockwrightError, match=r"mine: loss at step 3: nan"):
        run.train(lambda i, rng: p.sum() * (float("nan") if i == 3 else 1), torch.optim.SGD([p], lr=0.1), steps=6, every=2)
    with safe_open(next(tmp_path.rglob("unit-*")), "pt") as kept:
        assert len(json.loads(kept.metadata()["unit"])["facts"]["losses"]) == 2


def test_a_parameter_that_is_not_finite_is_not_kept(tmp_path):
    p = nn.Parameter(torch.zeros(2))
    run = run_of(tiny.model("llama"), journal=tmp_path)
    with pytest.raises(BlockwrightError, match=r"stage: step 0: parameter:0: nan at \[0\]"):
        run.train(lambda i, rng: p.square().sum().sqrt(), torch.optim.SGD([p], lr=0.1), steps=1)  # the slope of a square root at 0
    assert units(tmp_path) == []


# kills: a server process imports once and forks a child for every kill


FILE_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove"}


def recipe(journal, log, tick=lambda: None):
    """Two stages with passes that read, learn, write and pack, and a loop, on the model of `serve`. Returns all results as text."""

    def note(*what):
        os.write(log, (" ".join(map(str, what)) + "\n").encode())

    def visit(number):
        def inside(block, x, y, rng):
            note(run.stage, f"pass-{number}", f"unit-{block.index:04d}")
            if run.stage == "1-b" and number == 0:
                for n, linear in block.linears(["up_proj"]).items():
                    codes = torch.randint(-8, 8, linear.weight.shape, generator=rng, dtype=torch.int8)
                    block.swap(n, PackedLinear.of(linear, codes, torch.full((40, 1), 0.03), bits=4, group_size=-1))
                return None
            for p in block.module.parameters():
                p.add_(torch.randn(p.shape, generator=rng) * 0.1 * (x - (0 if y is None else y)).std())
            return {"mean": x.mean((0, 1)), "std": x.std().item()}

        return inside

    def loss(i, rng):
        note(run.stage, f"pass-{number}", "step", i)
        return (p - torch.randn(3, generator=rng)).square().mean()

    run = Run(MODEL["it"], calibration=tiny.ids(N, T), journal=journal, seed=1, progress=lambda *_: tick())
    found = []
    for name, passes in (
        ("0-a", [("treated", True, True), ("dense", False, False)]),
        ("1-b", [("none", False, True), ("treated", True, True)]),
    ):
        run.begin(name)
        for number, (inputs, target, write) in enumerate(passes):
            found.append(run.blocks(visit(number), inputs=inputs, target=target, write=write))
    number, p = 2, nn.Parameter(torch.zeros(3))
    found.append(run.train(loss, torch.optim.Adam([p], lr=0.1), steps=5, every=2))
    tensors = run.model.build().state_dict() | {"p": p.detach()} | {f"{i}": f["mean"] for i, f in enumerate(found[0] + found[1])}
    digest = {n: hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest() for n, t in tensors.items() if t.dim()}
    return json.dumps([digest, [[f.get("std") for f in part] for part in found[:4]], found[4]])


MODEL = {}


def doomed(job):
    """In the child: run the recipe, with the death that the job asks for."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    clock, left = itertools.count(), itertools.count((job.get("kill") or 0) - 1, -1)

    def die():
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def tick():  # at the start of every unit and step
        die()
        if next(clock) == job.get("full_at"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))

    if job.get("lethal"):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # python ignores it; by default it kills in the middle of a write
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(lambda event, args: die() if event in FILE_OPERATIONS and str(args[0]).startswith(job["journal"]) else None)
    try:
        Path(job["out"]).write_text(recipe(Path(job["journal"]), log, tick))
    except BlockwrightError as error:
        Path(job["out"]).write_text(str(error))
        return 3
    return 0


def serve():
    torch.set_num_threads(1)
    MODEL["it"] = Blueprint.of_module(tiny.model("llama").to(torch.bfloat16))
    MODEL["it"].build()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 70
            with contextlib.suppress(Exception):
                code = doomed(json.loads(line))
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


@pytest.fixture(scope="module")
def child():
    """A function that runs a job in a child of the server and returns its exit code."""
    here = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_run; test_run.serve()"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    server = subprocess.Popen([sys.executable, "-c", here], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def run(folder, **job):
        folder.mkdir(exist_ok=True)
        paths = {"journal": str(folder / "journal"), "log": str(folder / "log"), "out": str(folder / "out")}
        server.stdin.write(json.dumps(job | paths) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    yield run
    server.stdin.close()
    server.wait()


@pytest.fixture(scope="module")
def uninterrupted(child, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert child(folder) == 0
    return (folder / "out").read_text(), calls(folder)


def calls(folder):
    return (folder / "log").read_text().splitlines()


def resumes(child, folder, uninterrupted):
    """Go on with what a death left. Returns how many units were done; everything else must be what it would have been."""
    result, every_call = uninterrupted
    kept = {" ".join(p.relative_to(folder / "journal").with_suffix("").parts) for p in (folder / "journal").rglob("unit-*.safetensors")}
    loop = folder / "journal/1-b/pass-2/unit-0000.safetensors"
    steps = 0
    if loop.exists():
        with safe_open(loop, "pt") as f:
            steps = len(json.loads(f.metadata()["unit"])["facts"]["losses"])
    assert child(folder) == 0
    assert (folder / "out").read_text() == result
    left = [c for c in every_call if (int(c.split()[-1]) >= steps if "step" in c else c not in kept)]
    assert calls(folder) == left  # no finished unit again, and every other one once
    return len(every_call) - len(left)


def test_a_run_killed_at_any_file_operation_ends_with_the_same_bits(child, tmp_path, uninterrupted):
    done = []
    for operation in itertools.count(1, 4):  # a block takes 5: each of its operations in one block or another
        folder = tmp_path / str(operation)
        code = child(folder, kill=operation)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        done.append(resumes(child, folder, uninterrupted))
    assert done == sorted(done) and set(done) >= set(range(0, 12)) and done[-1] >= 16  # 12 blocks and 4 or 5 steps


def test_a_run_killed_again_and_again_ends_with_the_same_bits(child, tmp_path, uninterrupted):
    deaths = 0
    while child(tmp_path, kill=9) != 0:  # what is done already costs file operations too: more and more of them
        deaths += 1
        if deaths > 3:
            break
    assert deaths > 1
    resumes(child, tmp_path, uninterrupted)


@pytest.mark.parametrize("at", [0, 2, 5, 10])
def test_a_run_killed_in_the_middle_of_a_file_ends_with_the_same_bits(child, tmp_path, uninterrupted, at):
    assert child(tmp_path, full_at=at, limit=500, lethal=True) == -signal.SIGXFSZ
    torn = [p for p in (tmp_path / "journal").rglob("*") if p.is_file() and not p.name.startswith("unit-")]
    assert len(torn) == 1 and torn[0].stat().st_size <= 500
    resumes(child, tmp_path, uninterrupted)


@pytest.mark.parametrize("at", [0, 5])
def test_a_full_disk_is_told_and_the_finished_blocks_are_kept(child, tmp_path, uninterrupted, at):
    assert child(tmp_path, full_at=at, limit=500) == 3
    assert "the disk is full. Free space and run again" in (tmp_path / "out").read_text()
    assert all(p.name.startswith("unit-") for p in (tmp_path / "journal").rglob("*") if p.is_file())
    resumes(child, tmp_path, uninterrupted)


def test_another_process_and_memory_give_the_same_bits(tmp_path, uninterrupted):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    MODEL["it"] = Blueprint.of_module(tiny.model("llama").to(torch.bfloat16))
    log = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    try:
        assert (recipe(None, log), calls(tmp_path)) == uninterrupted
    finally:
        torch.set_num_threads(threads)
        os.close(log)


def test_a_unit_is_committed_before_the_next_one_starts(tmp_path, monkeypatch):
    order, replace = [], folders.replace_file
    monkeypatch.setattr(folders, "replace_file", lambda path, write: (replace(path, write), order.append(f"kept {path.stem[-1]}")))
    run_of(tiny.model("llama"), journal=tmp_path).blocks(lambda block, *_: order.append(f"visit {block.index}"), write=True)
    assert order == [f"{what} {i}" for i in range(3) for what in ("visit", "kept")]
