"""Which backend runs, what it says of itself, and that a user can force another one."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

import einlinear as el
from einlinear import ops
from einlinear.ops import backends, context, dispatch, reference
from einlinear.ops.batched import batched_backend as batched


def test_explain_says_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = el.Linear(1024, 1024, "btt"), torch.randn(3, 5, 1024)
    chosen = el.explain(layer, x)
    assert chosen.backend in ops.BACKENDS
    assert "a training step of 16 tokens" in chosen.reason
    with torch.no_grad():
        assert "a forward pass of 16 tokens" in el.explain(layer, x).reason
    assert dict(chosen.refusals)["triton"]
    ran = []
    backend = backends.find(chosen.backend)
    forward = backend.forward
    monkeypatch.setattr(backend, "forward", lambda *args, **kw: (ran.append(1), forward(*args, **kw))[1])
    layer(x)
    assert ran == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_routed_products_of_half_precision_are_not_left_to_the_reference(dtype: torch.dtype) -> None:
    """The reference multiplies every token with every expert."""
    s, cpu = el.structure("btt", 64, 64), torch.device("cpu")
    compiled = ops.reason_unsupported("cpu", s, dtype, cpu) is None
    assert ops.choose(s, 256, dtype, cpu).backend == ("cpu" if compiled else "reference")
    assert ops.choose(s, 256, dtype, cpu, routed=True).backend == ("cpu" if compiled else "batched")


def test_on_a_gpu_what_was_never_measured_there_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "reason_unsupported", lambda *_: None)
    dispatch.forget()
    chosen = ops.choose(el.structure("btt", 64, 64), 2048, torch.bfloat16, torch.device("cuda"))
    assert chosen.backend == "batched"
    assert "einlinear.backend('triton')" in dict(chosen.refusals)["triton"]
    dispatch.forget()


def test_explain_says_where_dense_is_faster() -> None:
    assert "a dense layer would be faster" in str(el.explain(el.Linear(16, 16, "btt"), torch.randn(1, 16)))
    assert "a dense layer" not in str(el.explain(el.Linear(4096, 4096, "btt"), torch.randn(64, 4096)))


def test_backend_forces_and_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = el.Linear(64, 64, "btt"), torch.randn(3, 64)
    before = el.explain(layer, x)
    calls = []
    apply, forward = reference.apply, batched.forward
    monkeypatch.setattr(reference, "apply", lambda *args: (calls.append("reference"), apply(*args))[1])
    monkeypatch.setattr(batched, "forward", lambda *args, **kw: (calls.append("batched"), forward(*args, **kw))[1])
    with el.backend("batched"):
        with el.backend("reference"):
            layer(x)
        layer(x)
        assert el.explain(layer, x).reason == "forced by einlinear.backend"
    assert calls == ["reference", "batched"]
    assert el.explain(layer, x) == before


def test_training_takes_no_more_memory_than_dense() -> None:
    """The reference copies activations: it is no candidate where there are many of these."""
    layer = el.Linear(1024, 1024, "monarch")
    assert dict(el.explain(layer, torch.randn(2048, 1024)).refusals)["reference"].startswith("it may keep more")
    assert "reference" not in dict(el.explain(layer, torch.randn(64, 1024)).refusals)
    with torch.no_grad():
        assert "reference" not in dict(el.explain(layer, torch.randn(2048, 1024)).refusals)


def test_backends_nest() -> None:
    layer, x = el.Linear(64, 64, "btt"), torch.randn(3, 64)
    with el.backend("batched"):
        with el.backend(recompute=True):
            assert el.explain(layer, x).backend == "batched"
            assert dispatch.recomputes("batched", layer.structure)
        assert not dispatch.recomputes("batched", layer.structure)


LAYER, X = el.Linear(64, 64, "btt"), torch.randn(3, 64)


def forced() -> str | None:
    """The backend that a layer uses, if it is forced."""
    choice = el.explain(LAYER, X)
    return choice.backend if "forced" in choice.reason else None


def test_backends_of_threads_that_overlap() -> None:
    """The first to begin is the first to end, so that neither ends within the other."""
    steps = [Barrier(2, timeout=10) for _ in range(4)]

    def run(backend: str, first: bool) -> list[str | None]:
        seen = [forced()]
        if not first:
            steps[0].wait()
        with el.backend(backend):
            if first:
                steps[0].wait()
            steps[1].wait()
            seen.append(forced())
            if not first:
                steps[2].wait()
                seen.append(forced())
        if first:
            steps[2].wait()
        seen.append(forced())
        steps[3].wait()
        return [*seen, forced()]

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.submit(run, "batched", True), pool.submit(run, "reference", False)
        assert one.result() == [None, "batched", None, None]
        assert other.result() == [None, "reference", "reference", None, None]
    assert forced() is None


def test_threads_begin_with_nothing_forced() -> None:
    with ThreadPoolExecutor(1) as pool, el.backend("batched"):
        assert pool.submit(forced).result() is None
        assert pool.submit(contextvars.copy_context().run, forced).result() == "batched"
        assert forced() == "batched"


def test_backends_of_tasks_that_overlap() -> None:
    async def run(backend: str, pauses: tuple[int, int]) -> list[str | None]:
        for _ in range(pauses[0]):
            await asyncio.sleep(0)
        with el.backend(backend):
            for _ in range(pauses[1]):
                await asyncio.sleep(0)
                assert forced() == backend
        return [forced()]

    async def main() -> None:
        with el.backend("batched"):
            child = asyncio.create_task(run("reference", (1, 3)))
        others = [
            asyncio.create_task(run(name, pauses)) for name, pauses in (("batched", (0, 2)), ("reference", (1, 3)))
        ]
        assert await asyncio.gather(*others) == [[None], [None]]
        assert await child == ["batched"]  # what was forced where it was made
        assert forced() is None

    asyncio.run(main())


def test_backend_as_a_decorator() -> None:
    @el.backend("batched")
    def run(depth: int) -> list[str | None]:
        return [forced(), *run(depth - 1), forced()] if depth else [forced()]

    for _ in range(2):
        assert run(2) == ["batched"] * 5
        assert forced() is None
    with pytest.raises(ZeroDivisionError), el.backend("batched"):
        raise ZeroDivisionError
    assert forced() is None


def test_a_backward_pass_uses_the_backend_of_its_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    backward = batched.backward
    monkeypatch.setattr(batched, "backward", lambda *args: (ran.append(1), backward(*args))[1])
    with el.backend("batched"):
        y = LAYER(X)
    with ThreadPoolExecutor(1) as pool, el.backend("reference"):
        pool.submit(y.sum().backward).result()
    assert ran == [1]


def test_explain_knows_of_autocast() -> None:
    layer, x = el.Linear(64, 64, "btt"), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert "half precision" in el.explain(layer, x).reason
    assert "half precision" not in el.explain(layer, x).reason


def test_recompute_saves_nothing() -> None:
    layer, x = el.Linear(64, 64, "btt"), torch.randn(40, 64)

    def saved(recompute: bool) -> int:
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t)
        with el.backend("batched", recompute=recompute), hooks:
            layer(x)
        return sum(sizes)

    inputs = x.numel() + sum(p.numel() for p in layer.parameters())
    assert saved(True) == inputs
    assert saved(False) == inputs + 40 * 64


@pytest.mark.parametrize(("spec", "extra"), [("btt", 0), ("low_rank(rank=32)", 32 * 32), ("dyad", 0)])
def test_states_are_saved_where_it_costs_more_to_compute_them_again(spec: str, extra: int) -> None:
    layer, x = el.Linear(512, 512, spec), torch.randn(32, 512)
    sizes = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t)
    with el.backend("cpu"), hooks:
        layer(x)
    assert sum(sizes) == x.numel() + sum(p.numel() for p in layer.parameters()) + extra


def test_mistakes() -> None:
    layer, x = el.Linear(16, 24, "btt"), torch.randn(2, 16)
    known = "choose reference, batched, cpu or triton"
    with pytest.raises(ValueError, match=f"unknown backend 'fast': {known}"):
        ops.linear(layer.structure, layer.factors(), x, backend="fast")
    with pytest.raises(ValueError, match=f"unknown backend 'fast': {known}"), el.backend("fast"):
        pass
    with pytest.raises(RuntimeError, match="'cpu' cannot run this: it computes in real numbers of 16, 32 or 64 bits"):
        ops.linear(layer.structure, [f.cfloat() for f in layer.factors()], x.cfloat(), backend="cpu")
    with pytest.raises(RuntimeError, match="not on cpu"), el.backend("triton"):
        layer(x)
    with pytest.raises(TypeError, match=r"expected an einlinear.Linear or FeedForward, not ReLU"):
        el.explain(torch.nn.ReLU(), x)
    other = torch.nn.Identity()
    other.structure = layer.structure  # which says nothing of how it computes
    with pytest.raises(TypeError, match=r"expected an einlinear.Linear or FeedForward, not Identity"):
        el.explain(other, x)
    with pytest.raises(RuntimeError, match=r"the input is of torch.float64, but the layer of torch.float32"):
        layer(x.double())


def test_autocast_leaves_alone_what_torch_leaves_alone() -> None:
    """Integers, and float64: nn.Linear refuses these beside other dtypes, also under autocast."""
    layer, x = el.Linear(16, 24, "btt"), torch.randn(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        for bad in (x.int(), x.double()):
            for kind in (layer, torch.nn.Linear(16, 24)):
                with pytest.raises(RuntimeError, match=r"dtype|torch\.(int32|float64)"):
                    kind(bad)
        assert layer.double()(x.double()).dtype == torch.float64
        for kind in (layer, torch.nn.Linear(16, 24).double()):
            with pytest.raises(RuntimeError, match=r"dtype|torch\.float64"):
                kind(x)


def test_generators_that_force_a_backend_end_in_any_order() -> None:
    def generator(name: str) -> Iterator[None]:
        with el.backend(name):
            yield

    first, second = generator("batched"), generator("reference")
    next(first)
    next(second)
    first.close()
    assert context.forced().backend == "reference"
    second.close()
    assert context.forced().backend is None
