"""Backends as citizens of torch: operators, compiler, export, transforms, counters, checkpointing."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.families import PATTERNS, SAMPLES, structures
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import einlinear as el
from einlinear import ops
from einlinear.ops import backends

SMALL = el.structure("dense", 2, 2)
BACKENDS = [name for name in ops.BACKENDS if ops.reason_unsupported(name, SMALL, torch.float64, "cpu") is None]


class Block(nn.Module):
    """A transformer block with every linear layer structured."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (el.Linear(width, width, "btt") for _ in range(4))
        self.up, self.down = el.Linear(width, 4 * width, "monarch"), el.Linear(4 * width, width, "kronecker")

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(h.transpose(1, 2).flatten(-2))
        out: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm2(x))))
        return out


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])  # which is no operator
@pytest.mark.parametrize("spec", ["btt(rank=2)", "dyad"])
def test_opcheck(backend: str, spec: str) -> None:
    layer, x = el.Linear(48, 60, spec), torch.randn(5, 48, requires_grad=True)
    arguments = (x, layer.factors(), layer.bias, None, None, layer.structure.spec, 60, backend)
    torch.library.opcheck(torch.ops.einlinear.linear.default, arguments)
    factors = [f.detach() for f in layer.factors()]
    needs = True, [True] * len(factors)
    arguments = (torch.randn(5, 60), x.detach(), factors, None, None, layer.structure.spec, backend, *needs)
    torch.library.opcheck(torch.ops.einlinear.linear_backward.default, arguments)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_a_transformer_block(backend: str) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    block, x = Block(), torch.randn(2, 10, 64, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    inputs = [x, *block.parameters()]
    y, expected = compiled(x), block(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    found = torch.autograd.grad(y.square().sum(), inputs)
    for a, b in zip(found, torch.autograd.grad(expected.square().sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_backend_inside_of_a_compiled_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the graph, so that it holds for what is in it."""
    layer, x, ran = el.Linear(256, 256, "btt"), torch.randn(300, 256), []
    assert el.explain(layer, x).backend != "batched"
    batched = backends.find("batched")
    forward = batched.forward
    monkeypatch.setattr(batched, "forward", lambda *args, **kw: (ran.append("batched"), forward(*args, **kw))[1])

    @torch.compile(backend="eager")
    def run(x: Tensor) -> Any:
        with el.backend("batched"):
            return layer(x)

    torch.testing.assert_close(run(x), layer(x), rtol=1e-4, atol=1e-5)
    assert ran == ["batched"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_export_with_any_number_of_tokens() -> None:
    block, x = Block(), torch.randn(2, 10, 64)
    program = torch.export.export(block, (x,), dynamic_shapes=({1: torch.export.Dim("tokens", min=2, max=512)},))
    longer = torch.randn(2, 33, 64)
    torch.testing.assert_close(program.module()(longer), block(longer), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # onnx's and its exporter's own
def test_onnx(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = nn.Sequential(el.Linear(48, 64, "btt(rank=2)"), nn.ReLU(), el.Linear(64, 10, "dyad(blocks=2)")).eval()
    x = torch.randn(7, 48)
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_flops_are_counted(backend: str) -> None:
    layer, x = el.Linear(64, 64, "btt"), torch.randn(5, 64, requires_grad=True)
    with el.backend(backend), FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 2 * 5 * 3 * layer.structure.macs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms(backend: str) -> None:
    layer, x = el.Linear(16, 24, "btt", dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(layer, parameters, (x,)).square().sum()
        return out

    with el.backend(backend):
        per_sample = vmap(grad(loss), (None, 0))(parameters, x)
        layer(x).square().sum().backward()
        for name, parameter in parameters.items():
            torch.testing.assert_close(per_sample[name].sum(0), parameter.grad)
        tangent = torch.randn_like(x)
        torch.testing.assert_close(jvp(layer, (x,), (tangent,))[1], tangent @ layer.dense_weight().T)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", ["btt(rank=2)", "dyad(blocks=2)", "a mixture"])
def test_every_kind_of_derivative(backend: str, spec: str) -> None:
    """First and second, in reverse, forward and forward over reverse, in batches or not, against finite differences."""
    layer: Any = el.Linear(4, 4, spec, dtype=torch.float64) if spec != "a mixture" else mixture(2, 2).double()
    x = torch.randn(2, layer.in_features, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def function(x: Tensor, *parameters: Tensor) -> Any:
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    with el.backend(backend):
        checks = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
        assert gradcheck(function, (x, *parameters), **checks)
        assert gradgradcheck(function, (x, *parameters), check_batched_grad=True, check_fwd_over_rev=True)


def mixture(in_features: int, out_features: int, spec: str = "btt") -> el.MoELinear:
    layer = el.MoELinear(in_features, out_features, spec, experts=3, active=2)
    nn.init.normal_(layer.router)
    return layer


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_of_a_backward_pass(backend: str) -> None:
    """Also where only the backward pass knows of tangents."""
    layer, x = (
        el.Linear(16, 24, "btt", dtype=torch.float64),
        torch.randn(5, 16, dtype=torch.float64, requires_grad=True),
    )
    with el.backend(backend):
        y = layer(x)
        cotangent, tangent = torch.randn(2, 5, 24, dtype=torch.float64)
        with forward_ad.dual_level():
            (found,) = torch.autograd.grad(y, x, forward_ad.make_dual(cotangent, tangent))
            primal, change = forward_ad.unpack_dual(found)
        with torch.no_grad(), forward_ad.dual_level():
            out = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    torch.testing.assert_close(primal, cotangent @ layer.dense_weight())
    torch.testing.assert_close(change, tangent @ layer.dense_weight())
    torch.testing.assert_close(out, torch.ones_like(x) @ layer.dense_weight().T)


def test_gradients_of_gradients_where_one_input_follows_from_another() -> None:
    """As gates follow from x, and factors from those of a hypernetwork: each gradient is of one way alone."""
    structure = el.structure("low_rank(rank=3)", 6, 6)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def gradient(backend: str) -> tuple[Tensor, Tensor]:
        factors = [x[:3].sin(), x[:3].T.cos()]
        y = ops.linear(structure, factors, x, x[3].exp(), backend)
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return first, torch.autograd.grad(first.square().sum(), x)[0]

    for backend in BACKENDS:
        for found, wanted in zip(gradient(backend), gradient("reference"), strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [lambda: el.Linear(6, 4, "btt"), lambda: mixture(6, 4)], ids=["linear", "mixture"])
def test_jacobians(backend: str, make: Callable[[], nn.Module]) -> None:
    layer, x = make(), torch.randn(3, 6)
    with el.backend("reference"):
        wanted = torch.autograd.functional.jacobian(layer, x)
    with el.backend(backend):
        found = [
            torch.autograd.functional.jacobian(layer, x),
            torch.autograd.functional.jacobian(layer, x, vectorize=True),
            torch.autograd.functional.jacobian(layer, x, vectorize=True, strategy="forward-mode"),
            jacrev(layer)(x),
            jacfwd(layer)(x),
        ]
    for jacobian in found:
        torch.testing.assert_close(jacobian, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("make", [lambda: el.Linear(8, 8, "btt"), lambda: mixture(8, 8)], ids=["linear", "mixture"])
def test_nested_tensors(backend: str, layout: torch.layout, make: Callable[[], nn.Module]) -> None:
    layer = make()
    parts = [torch.randn(n, 8, requires_grad=True) for n in (3, 1, 5)]
    x = torch.nested.as_nested_tensor(parts, layout=layout)
    with el.backend(backend):
        y = layer(x)
        assert y.is_nested
        assert y.layout is layout
        y = y + x  # lengths that torch knows to be the same
        for a, b in zip(y.unbind(), parts, strict=True):
            torch.testing.assert_close(a, layer(b) + b)
        total = sum(part.square().sum() for part in y.unbind())
        found = torch.autograd.grad(total, [*parts, *layer.parameters()])
        plain = sum((layer(part) + part).square().sum() for part in parts)
        for a, b in zip(found, torch.autograd.grad(plain, [*parts, *layer.parameters()]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="in_features=16"):
        el.Linear(16, 8, "btt")(x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_whose_lengths_are_not_second() -> None:
    layer = el.Linear(4, 4, "btt")
    parts = [torch.randn(n, 2, 4) for n in (3, 5)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged).transpose(1, 2)
    for a, b in zip(layer(x).unbind(), parts, strict=True):
        torch.testing.assert_close(a, layer(b.transpose(0, 1)))
    with pytest.raises(RuntimeError, match="the last dimension of the input must be in_features=4, not its lengths"):
        layer(x.transpose(2, 3))


def traceable() -> nn.Sequential:
    return nn.Sequential(
        el.Linear(48, 64, "btt(rank=2)"), nn.ReLU(), mixture(64, 60, "monarch"), el.Linear(60, 7, "tt", normalize=True)
    ).eval()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("spec", [spec for specs in SAMPLES.values() for spec in specs] + PATTERNS)
def test_traces(spec: str) -> None:
    """Nothing is constant in them but what is: no warning of the tracer's, any number of tokens."""
    structure = structures(spec, [(35, 47), (36, 36), (64, 64)])[0]
    layer = el.Linear(structure.in_features, structure.out_features, spec)
    for shapes in ((5,), (9,)), ((2, 3), (4, 5)), ((1,), (0,)):
        short, long = (torch.randn(*shape, structure.in_features) for shape in shapes)
        traced = torch.jit.trace(layer, (short,))
        torch.testing.assert_close(traced(long), layer(long), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_traces_of_models() -> None:
    model = traceable()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (torch.randn(5, 48),)), file)
    file.seek(0)
    longer = torch.randn(9, 48)
    torch.testing.assert_close(torch.jit.load(file)(longer), model(longer), rtol=1e-4, atol=1e-5)
    assert model[2].last.logits.shape == (9, 3)  # of the last true pass
    model[0].A = nn.Parameter(model[0].A[:1])
    with pytest.raises(RuntimeError, match="factor A has shape"):
        torch.jit.trace(model[0], (longer,))
    with pytest.raises(RuntimeError, match="in_features=60"):
        torch.jit.trace(model[3], (longer,))


@pytest.mark.filterwarnings("ignore")  # onnx's and its exporter's own
def test_onnx_by_tracing(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    models = {"model": traceable()}
    for family, specs in SAMPLES.items():
        structure = structures(specs[-1], [(48, 60), (48, 48)])[0]
        models[family] = nn.Sequential(el.Linear(48, structure.out_features, specs[-1]))
    for name, model in models.items():
        short, long = (torch.randn(shape) for shape in ((5, 48), (9, 48)))
        path = tmp_path / f"{name}.onnx"
        torch.onnx.export(model, (short,), path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "tokens"}})
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (y,) = session.run(None, {"x": long.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(long), rtol=1e-4, atol=1e-5)


def test_symbolic_traces() -> None:
    model = nn.Sequential(el.Linear(48, 64, "btt(rank=2)"), nn.ReLU(), el.Linear(64, 60, "dyad", normalize=True))
    traced = torch.fx.symbolic_trace(model)
    recorded = make_fx(model)(torch.randn(5, 48))
    for shape in ((5, 48), (2, 3, 48), (48,)):
        x = torch.randn(shape)
        torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)
    x = torch.randn(5, 48)
    torch.testing.assert_close(recorded(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("strict", [True, False])
def test_export_of_a_mixture(strict: bool) -> None:
    model = traceable()
    shapes = ({0: torch.export.Dim("tokens", min=2, max=512)},)
    program = torch.export.export(model, (torch.randn(5, 48),), dynamic_shapes=shapes, strict=strict)
    longer = torch.randn(33, 48)
    torch.testing.assert_close(program.module()(longer), model(longer), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_exports_of_models_that_read_weights_are_saved_and_loaded() -> None:
    """`nn.TransformerEncoderLayer` reads the weights of its linear layers before it calls them."""
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), mixture(16, 16)).eval()
    el.convert(model, "btt", layers="*linear*", weights="project")
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (torch.randn(2, 3, 16),), dynamic_shapes=shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    longer = torch.randn(5, 3, 16)
    torch.testing.assert_close(torch.export.load(file).module()(longer), model(longer), rtol=1e-4, atol=1e-5)


def test_inference_mode() -> None:
    for layer in (el.Linear(16, 24, "btt"), mixture(16, 24)):
        x = torch.randn(5, 16)
        expected = layer(x)
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), expected)
            torch.testing.assert_close(layer(x.clone()), expected)
            born = el.Linear(16, 24, "btt")
            assert born(x).is_inference()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(backend: str, use_reentrant: bool) -> None:
    layer, x = el.Linear(64, 64, "btt"), torch.randn(5, 64, requires_grad=True)
    with el.backend(backend):
        (wanted,) = torch.autograd.grad(layer(x).square().sum(), x)
        x.grad = None
        checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close(x.grad, wanted)


def test_state_dicts_remember_the_structure() -> None:
    saved = el.Linear(64, 64, "btt").state_dict()
    el.Linear(64, 64, "btt").load_state_dict(saved)
    other = el.Linear(64, 64, "(g a), g r f a, f e g r -> (e f) where r=1")  # the other way round
    assert {k: v.shape for k, v in other.state_dict().items()} == {k: v.shape for k, v in saved.items()}
    with pytest.raises(RuntimeError, match=r"the layer is .* -> \(e f\) where r=1, but was saved as btt"):
        other.load_state_dict(saved)


def test_models_that_look_at_weights_still_run() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 5, 32)
    el.convert(layer, "low_rank(rank=32)", layers="linear*", weights="project")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fast = layer(x)
    with torch.enable_grad():
        torch.testing.assert_close(layer(x), fast, rtol=1e-4, atol=1e-4)
