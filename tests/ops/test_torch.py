"""Executors as citizens of torch: operators, compiler, export, transforms, counters, checkpointing."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import einlinear as el
from einlinear import ops

EXECUTORS = [
    name for name in ops.EXECUTORS if ops.unsupported(name, el.structure("dense", 2, 2), torch.float64, "cpu") is None
]


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


@pytest.mark.parametrize("executor", [name for name in EXECUTORS if name != "reference"])  # which is no operator
@pytest.mark.parametrize("spec", ["btt(rank=2)", "dyad"])
def test_opcheck(executor: str, spec: str) -> None:
    layer, x = el.Linear(48, 60, spec), torch.randn(5, 48, requires_grad=True)
    arguments = (x, layer.factors(), layer.bias, layer.structure.spec, 60, executor)
    torch.library.opcheck(torch.ops.einlinear.linear.default, arguments)
    factors = [f.detach() for f in layer.factors()]
    arguments = (torch.randn(5, 60), x.detach(), factors, layer.structure.spec, executor, True, [True] * len(factors))
    torch.library.opcheck(torch.ops.einlinear.linear_backward.default, arguments)


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


@pytest.mark.parametrize("executor", EXECUTORS)
def test_flops_are_counted(executor: str) -> None:
    layer, x = el.Linear(64, 64, "btt"), torch.randn(5, 64, requires_grad=True)
    with el.backend(executor), FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 2 * 5 * 3 * layer.structure.macs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
@pytest.mark.parametrize("executor", EXECUTORS)
def test_transforms(executor: str) -> None:
    layer, x = el.Linear(16, 24, "btt", dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(layer, parameters, (x,)).square().sum()
        return out

    with el.backend(executor):
        per_sample = vmap(grad(loss), (None, 0))(parameters, x)
        layer(x).square().sum().backward()
        for name, parameter in parameters.items():
            torch.testing.assert_close(per_sample[name].sum(0), parameter.grad)
        tangent = torch.randn_like(x)
        torch.testing.assert_close(jvp(layer, (x,), (tangent,))[1], tangent @ layer.dense_weight().T)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(executor: str, use_reentrant: bool) -> None:
    layer, x = el.Linear(64, 64, "btt"), torch.randn(5, 64, requires_grad=True)
    with el.backend(executor):
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
