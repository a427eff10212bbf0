"""The meter: quality against plain Python, memory against counting by hand, time against known sleeps."""

import math
import os
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blockwright import meter
from blockwright.errors import BlockwrightError

MiB = 2**20
quick = settings(deadline=None, max_examples=40)


def test_importing_the_meter_does_not_import_torch():
    code = "import sys, blockwright.meter as m; m.time(lambda: None); m.high_water(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(
    "files, own, limit",
    [
        ({"memory.max": "max\n"}, "0::/\n", None),
        ({"memory.max": "123456\n"}, "0::/\n", 123456),
        ({"a/b/memory.max": "max\n", "a/memory.max": "700\n", "memory.max": "900\n", "c/memory.max": "1\n"}, "0::/a/b\n", 700),
        ({"memory/memory.limit_in_bytes": "5000\n", "memory.max": "1\n"}, "7:cpu,cpuacct:/x\n4:memory:/docker/gone\n", 5000),
        ({"memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/x/memory.limit_in_bytes": "42\n"}, "4:cpu,memory:/x\n", 42),
        ({"memory.max": "damaged\n"}, "0::/\n", None),
        ({}, "", None),
        ({"memory.max": "1\n"}, None, None),  # no such system
    ],
)
def test_the_limit_is_the_least_of_the_control_groups_around(files, own, limit, tmp_path):
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    if own is not None:
        (tmp_path / "own").write_text(own)
    assert meter.memory_limit(tmp_path / "groups", tmp_path / "own") == (limit or sys.maxsize)


def test_this_process_may_use_what_it_uses():
    assert meter.memory_limit() > meter.high_water()


# time


def test_spread_by_hand():
    assert meter.spread([1.0, 2.0, 3.0, 4.0, 9.0]) == (3.0, 2.0, 4.0)
    assert meter.spread([4.0, 1.0]) == (2.5, 1.75, 3.25)
    assert meter.spread([7.0]) == (7.0, 7.0, 7.0)
    with pytest.raises(BlockwrightError, match="repeats >= 1"):
        meter.spread([])


def test_time_is_of_the_calls_after_the_warm_up():
    naps = iter([0.2, 0.2, 0.01, 0.03, 0.02])
    calls = []

    def nap() -> None:
        calls.append(1)
        time.sleep(next(naps))

    got = meter.time(nap, repeats=3, warmup=2)
    assert len(calls) == 5 and 0.02 <= got.median < 0.1 and got.low <= got.median <= got.high
    with pytest.raises(BlockwrightError, match="repeats >= 1"):
        meter.time(lambda: None, repeats=0)


def test_a_ratio_is_of_interleaved_pairs():
    order = []

    def call(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    got = meter.ratio(lambda: call("slow", 0.06), lambda: call("fast", 0.02), repeats=3, warmup=1)
    assert order == ["slow", "fast"] * 4
    assert 1.5 < got.low <= got.median <= got.high < 4.5  # 3, on a machine that may be busy


def test_a_machine_that_slows_down_burdens_both_alike(monkeypatch):
    seconds = iter([3.0, 1.0, 30.0, 10.0, 300.0, 100.0])
    monkeypatch.setattr(meter, "_seconds", lambda fn: next(seconds))
    assert meter.ratio(lambda: None, lambda: None, repeats=3, warmup=0) == (3.0, 3.0, 3.0)


# memory of a step


def test_saved_bytes_by_hand():
    x = torch.randn(5, 8, requires_grad=True)
    w = nn.Parameter(torch.randn(8, 3))
    assert meter.saved_bytes(lambda: x * 2.0) == 0  # the backward of a scaling needs nothing
    assert meter.saved_bytes(lambda: x.exp()) == 5 * 8 * 4  # its output
    assert meter.saved_bytes(lambda: (x * x).sum()) == 5 * 8 * 4  # saved twice, one storage
    assert meter.saved_bytes(lambda: x.exp() + x.sin()) == 2 * 5 * 8 * 4
    assert meter.saved_bytes(lambda: x @ w) == 5 * 8 * 4  # x; w is a parameter
    assert meter.saved_bytes(lambda: (x @ w).relu()) == 5 * 8 * 4 + 5 * 3 * 4
    assert meter.saved_bytes(lambda: x.detach() @ w) == 5 * 8 * 4
    assert meter.saved_bytes(lambda: x.double().exp()) == 5 * 8 * 8


def test_parameters_are_not_counted_whatever_view_of_them_is_saved():
    x = torch.randn(4, 8)
    layer = nn.Linear(8, 16)  # saves its weight transposed
    assert meter.saved_bytes(lambda: layer(x.requires_grad_())) == 4 * 8 * 4
    frozen = nn.Linear(8, 16).requires_grad_(False)
    assert meter.saved_bytes(lambda: frozen(x)) == 0  # x needs no saving for its own gradient
    assert meter.saved_bytes(lambda: x @ layer.weight[2:5].T.contiguous().clone()) == 8 * 3 * 4 + 4 * 8 * 4  # a copy is memory


def test_tensors_to_ignore_are_not_counted():
    table = torch.randn(7, 7)  # a buffer, such as packed codes
    x = torch.randn(2, 7, requires_grad=True)
    assert meter.saved_bytes(lambda: x @ table) == 7 * 7 * 4
    assert meter.saved_bytes(lambda: x @ table, ignore=[table]) == 0
    assert meter.saved_bytes(lambda: x @ table.T, ignore=[table]) == 0


def test_storages_are_counted_whole_and_not_confused_when_memory_is_used_again():
    x = torch.randn(1000, requires_grad=True)
    assert meter.saved_bytes(lambda: x[:10].exp().sum()) == 10 * 4
    assert meter.saved_bytes(lambda: (x.exp()[:10] ** 2).sum()) == 1000 * 4  # the slice keeps all of it

    def many() -> None:  # each result dies before the next is made, which may get its address
        for _ in range(5):
            (x * 2.0).sin()

    assert meter.saved_bytes(many) == 5 * 1000 * 4


def test_counting_frees_what_was_saved_and_leaves_gradients_as_they_are():
    x = torch.randn(6, dtype=torch.float64, requires_grad=True)
    gradients = []

    def step() -> None:
        y = (x.exp() ** 2).sum()
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        gradients.extend([g.detach(), *torch.autograd.grad(g.sum(), x)])

    meter.saved_bytes(step)
    torch.testing.assert_close(gradients, [2 * (2 * x.detach()).exp(), 4 * (2 * x.detach()).exp()])
    code = """
import torch
from blockwright import meter
x = torch.randn(4 * 2**20, requires_grad=True)
meter.saved_bytes(lambda: x.exp())
before = meter.high_water()
for _ in range(8):
    meter.saved_bytes(lambda: x.exp())
print(meter.high_water() - before)
"""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back at once, instead of lying in holes of the heap
    grown = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert int(grown) < 20 * MiB  # not 8 x 16


def test_checkpointing_shows():
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(3))
    x = torch.randn(10, 16, requires_grad=True)

    def plain() -> torch.Tensor:
        y = x
        for block in blocks:
            y = block(y)
        return y

    def checkpointed() -> torch.Tensor:
        y = x
        for block in blocks:
            y = torch.utils.checkpoint.checkpoint(block, y, use_reentrant=False)
        return y

    # by hand: each block keeps its input (16), the input of GELU and the input of the second linear (64 each), in floats, times 10 rows
    assert meter.saved_bytes(plain) == 3 * (16 + 64 + 64) * 10 * 4
    assert meter.saved_bytes(checkpointed) <= 3 * 16 * 10 * 4


# memory of processes


def test_peak_rss_sees_what_a_child_touched_and_let_go():
    small = meter.peak_rss("-c", "pass")
    large = meter.peak_rss("-c", f"x = bytearray(64 * {MiB}); del x")
    assert 5 * MiB < small < 100 * MiB
    assert 60 * MiB < large - small < 72 * MiB


def test_peak_rss_is_the_childs_own():
    ballast = bytearray(200 * MiB)
    assert meter.peak_rss("-c", "pass") < 100 * MiB and len(ballast) == 200 * MiB


def test_peak_rss_runs_a_module_with_its_arguments(tmp_path):
    (tmp_path / "eats.py").write_text(
        "import sys\nx = bytearray(int(sys.argv[1]) * 2**20)\nassert sys.argv[2:] == ['b'] and __name__ == '__main__'"
    )
    env = {"PYTHONPATH": f"{tmp_path}:{':'.join(sys.path)}"}
    one, other = (meter.peak_rss("eats", n, "b", env=env) for n in ("10", "60"))
    assert 45 * MiB < other - one < 55 * MiB


def test_code_sees_its_own_arguments():
    assert meter.peak_rss("-c", "import sys; assert sys.argv[1:] == ['a', 'b'] and __name__ == '__main__'", "a", "b") > 0


def test_a_failing_child_is_told_with_its_words():
    with pytest.raises(subprocess.CalledProcessError) as error:
        meter.peak_rss("-c", "raise SystemExit('no such thing')")
    assert "no such thing" in error.value.stderr


def test_high_water_rises_and_stays():
    code = """
from blockwright import meter
before = meter.high_water()
block = bytearray(100 * 2**20)
during = meter.high_water()
del block
print(before, during, meter.high_water())
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, during, after = map(int, said.split())
    assert during - before == pytest.approx(100 * MiB, abs=2 * MiB)
    assert after >= during - MiB  # the kernel counts in batches


def test_cold_copies_exceed_the_cache_and_share_nothing(monkeypatch):
    monkeypatch.setattr(meter, "COLD_BYTES", 1000)
    value = (torch.arange(75), 7)  # 600 bytes of integers
    copies = meter.cold_copies(value, 300)
    assert len(copies) == 4 and all(torch.equal(t, value[0]) and n == 7 for t, n in copies)
    assert len({t.data_ptr() for t, _ in [value, *copies]}) == 5
    assert len(meter.cold_copies(value, 5000)) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_graph_takes_its_calls_in_turn():
    counts = torch.zeros(3, device="cuda")
    seconds = meter.graph_microseconds([lambda i=i: counts[i].add_(1) for i in range(3)], number=2)
    assert seconds > 0 and counts[0] == counts[1] == counts[2] + 1 == 10  # one call of the first two by themselves; 9 replays of each


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_peak_cuda_is_above_what_was_held():
    held = torch.zeros(8 * MiB, dtype=torch.uint8, device="cuda")
    assert meter.peak_cuda(lambda: torch.zeros(16 * MiB, dtype=torch.uint8, device="cuda")) == 16 * MiB
    assert len(held) == 8 * MiB


# operations and bytes


@given(m=st.integers(1, 9), k=st.integers(1, 9), n=st.integers(1, 9))
@quick
def test_flops_of_a_product(m, k, n):
    a, b = torch.randn(m, k), torch.randn(k, n, requires_grad=True)
    assert meter.flops(lambda: a @ b) == 2 * m * k * n
    assert meter.flops(lambda: (a @ b).sum().backward()) == 4 * m * k * n  # and that of b's gradient
    assert meter.flops(lambda: a + a) == 0


def test_flops_of_a_convolution():
    conv = nn.Conv2d(3, 5, 3, bias=False)
    assert meter.flops(lambda: conv(torch.randn(2, 3, 8, 8))) == 2 * 2 * 5 * 6 * 6 * 3 * 9


def test_file_bytes(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "deep" / "er" / "b").write_bytes(b"12345")
    (tmp_path / "deep" / "empty").touch()
    assert meter.file_bytes(tmp_path / "a") == 3 and meter.file_bytes(tmp_path) == 8 and meter.file_bytes(tmp_path / "deep") == 5
    with pytest.raises(BlockwrightError, match="missing: no such file or folder"):
        meter.file_bytes(tmp_path / "missing")


# quality


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = math.log(math.fsum(math.exp(v - top) for v in row)) + top
    return [v - total for v in row]


def by_hand(logits, ids, dense=None) -> dict[str, float]:
    """Plain Python, one token at a time."""
    nll, kl, same, tokens = 0.0, 0.0, 0, 0
    for i in range(len(ids)):
        for t in range(len(ids[i]) - 1):
            p = log_softmax(logits[i][t])
            nll -= p[ids[i][t + 1]]
            tokens += 1
            if dense is not None:
                q = log_softmax(dense[i][t])
                kl += math.fsum(math.exp(b) * (b - a) for a, b in zip(p, q, strict=True))
                same += p.index(max(p)) == q.index(max(q))
    out = {"perplexity": math.exp(nll / tokens), "nll": nll / tokens, "tokens": tokens}
    return out if dense is None else out | {"kl": kl / tokens, "top1": same / tokens}


def draw(n: int, t: int, v: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(n, t, v, generator=g), torch.randint(0, v, (n, t), generator=g), 3 * torch.randn(n, t, v, generator=g)


@given(n=st.integers(1, 3), t=st.integers(2, 7), v=st.integers(2, 9), seed=st.integers(0, 99))
@quick
def test_quality_follows_the_formulas(n, t, v, seed):
    logits, ids, dense = draw(n, t, v, seed)
    q = meter.Quality()
    q.add(logits, ids, dense)
    assert q.result() == pytest.approx(by_hand(logits.tolist(), ids.tolist(), dense.tolist()), rel=1e-5, abs=1e-6)
    alone = meter.Quality()
    alone.add(logits, ids)
    assert alone.result() == pytest.approx(by_hand(logits.tolist(), ids.tolist()), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("t", [2, meter.CHUNK, meter.CHUNK + 1, meter.CHUNK + 2, 2 * meter.CHUNK + 1, 300])
def test_windows_longer_than_a_chunk(t):
    logits, ids, dense = draw(2, t, 5)
    q = meter.Quality()
    q.add(logits, ids, dense)
    assert q.result() == pytest.approx(by_hand(logits.tolist(), ids.tolist(), dense.tolist()), rel=1e-5)


def test_means_are_over_tokens_not_over_calls():
    parts = [draw(n, t, 6, seed) for seed, (n, t) in enumerate([(1, 9), (3, 2), (2, 5)])]
    q = meter.Quality()
    for part in parts:
        q.add(*part)
    hands = [by_hand(*(x.tolist() for x in part)) for part in parts]
    for name in ("nll", "kl", "top1"):
        want = sum(h[name] * h["tokens"] for h in hands) / sum(h["tokens"] for h in hands)
        assert q.result()[name] == pytest.approx(want, rel=1e-5)
    assert q.result()["tokens"] == 8 + 3 + 8


def test_kl_is_of_the_dense_model_from_the_other():  # q = (3/4, 1/4), p = (1/2, 1/2): sum q log(q/p); the other way round it is 0.1438
    q = meter.Quality()
    q.add(torch.zeros(1, 2, 2), torch.tensor([[0, 1]]), torch.tensor([[[math.log(3), 0.0], [9.0, 9.0]]]))
    assert q.result() == pytest.approx({"perplexity": 2.0, "nll": math.log(2), "tokens": 1, "kl": 0.130812, "top1": 1.0}, rel=1e-5)


def test_the_same_model_is_no_distance_away_and_a_shift_of_its_logits_neither():
    logits, ids, _ = draw(2, 9, 30)
    q = meter.Quality()
    q.add(logits + 5.0, ids, logits)
    assert q.result()["kl"] == pytest.approx(0, abs=1e-6) and q.result()["kl"] >= 0 and q.result()["top1"] == 1.0


def test_half_precision_logits_are_computed_in_single():
    logits, ids, dense = (x.bfloat16() if x.is_floating_point() else x for x in draw(2, 9, 30))
    q = meter.Quality()
    q.add(logits, ids, dense)
    assert q.result() == pytest.approx(by_hand(logits.tolist(), ids.tolist(), dense.tolist()), rel=1e-4)


def test_inputs_are_not_changed():
    logits, ids, dense = draw(2, 5, 7)
    before = [x.clone() for x in (logits, ids, dense)]
    meter.Quality().add(logits, ids, dense)
    assert all(torch.equal(a, b) for a, b in zip(before, (logits, ids, dense), strict=True))


def test_a_ruined_model_has_an_infinite_perplexity_not_an_exception():
    logits = torch.zeros(1, 2, 2)
    logits[0, 0, 0] = 2000.0
    q = meter.Quality()
    q.add(logits, torch.tensor([[0, 1]]))
    assert q.result()["nll"] == pytest.approx(2000) and q.result()["perplexity"] == math.inf
    q.add(torch.full((1, 2, 2), math.nan), torch.tensor([[0, 1]]))
    assert math.isnan(q.result()["nll"]) and math.isnan(q.result()["perplexity"])  # never hidden


def test_logits_are_not_copied_whole():
    code = """
import sys, torch
from blockwright import meter
n, t, v = 2, 1024, 20000
ids, logits, dense = torch.zeros(n, t, dtype=torch.long), torch.randn(n, t, v), torch.randn(n, t, v)
small = meter.Quality(); small.add(logits[:, :3], ids[:, :3], dense[:, :3])
before = meter.high_water(); meter.Quality().add(logits, ids, dense)
print(meter.high_water() - before, logits.nbytes)
"""
    grown, whole = map(int, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    assert grown < 0.5 * whole


def test_shapes_that_do_not_match_are_refused():
    logits, ids, dense = draw(2, 5, 7)
    for wrong in (
        (logits[:, :4], ids),
        (logits, ids[:, :4]),
        (logits[:1], ids),
        (logits, ids, dense[:, :4]),
        (logits, ids, dense[..., :6]),
    ):
        with pytest.raises(BlockwrightError, match="Quality: logits"):
            meter.Quality().add(*wrong)


def test_a_result_of_nothing_is_refused():
    q = meter.Quality()
    with pytest.raises(BlockwrightError, match="no token was predicted"):
        q.result()
    q.add(torch.zeros(3, 1, 4), torch.zeros(3, 1, dtype=torch.long))  # windows of one token predict nothing
    with pytest.raises(BlockwrightError, match="no token was predicted"):
        q.result()


@pytest.fixture(scope="module")
def models() -> list[nn.Module]:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=1, initializer_range=0.5, **heads)
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        made.append(LlamaForCausalLM(config).eval())
    return made


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_a_models_loss_is_what_transformers_says(models, batch):
    ids = torch.randint(0, 23, (5, 11), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = models[0](ids, labels=ids).loss.item()
    assert meter.loss(models[0], ids, batch=batch) == pytest.approx(want, rel=1e-5)
    assert meter.perplexity(models[0], ids, batch=batch) == pytest.approx(math.exp(want), rel=1e-5)


def test_quality_beside_a_dense_model(models):
    ids = torch.randint(0, 23, (3, 6), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        logits, dense = (m(ids).logits.tolist() for m in models)
    got = meter.quality(models[0], ids, dense=models[1], batch=2)
    assert got == pytest.approx(by_hand(logits, ids.tolist(), dense), rel=1e-4) and got["kl"] > 0.1


def test_quality_keeps_no_graph():
    modes = []

    class Model(nn.Module):
        def forward(self, ids: torch.Tensor, use_cache: bool) -> object:
            modes.append((torch.is_grad_enabled(), use_cache))
            return type("Output", (), {"logits": torch.zeros(*ids.shape, 4)})

    assert meter.loss(Model(), torch.zeros(2, 3, dtype=torch.long), batch=1) == pytest.approx(math.log(4))
    assert modes == [(False, False)] * 2
