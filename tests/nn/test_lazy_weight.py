"""`.weight` of a structured layer: free as long as its values are not used, and an ordinary matrix when they are."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, vmap
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers import T5Config, T5ForConditionalGeneration

import einlinear as el
from einlinear.nn.lazy_tensor import METADATA_NAMES
from einlinear.nn.lazy_weight import LazyWeight


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[el.Linear]:
    """The layers whose dense weight was built, in order."""
    built: list[el.Linear] = []
    original = el.Linear.dense_weight

    def dense_weight(self: el.Linear) -> Tensor:
        built.append(self)
        return original(self)

    monkeypatch.setattr(el.Linear, "dense_weight", dense_weight)
    return built


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("spec", ["btt", "dense", "dyad"])
def test_metadata_is_that_of_the_matrix_and_free(spec: str, dtype: torch.dtype, builds: list[el.Linear]) -> None:
    layer = el.Linear(16, 24, spec, dtype=dtype)
    dense = layer.dense_weight().clone()
    builds.clear()
    weight = layer.weight
    assert isinstance(weight, Tensor)
    for name in METADATA_NAMES:
        found, expected = getattr(weight, name), getattr(dense, name)
        assert (found() if callable(found) else found) == (expected() if callable(expected) else expected), name
    assert (weight.size(0), weight.size(-1), len(weight)) == (24, 16, 24)
    assert (torch.numel(weight), torch.is_floating_point(weight)) == (24 * 16, True)
    assert hasattr(layer, "weight")
    assert builds == []


@pytest.mark.parametrize(
    "make",
    [
        torch.zeros_like,
        torch.ones_like,
        lambda w: w.new_zeros(3),
        lambda w: torch.ones(2, 3, dtype=torch.int64).to(w),
        lambda w: torch.ones(2, dtype=torch.int64).type_as(w),
        lambda w: torch.ones(24, 1, dtype=torch.float64).expand_as(w),
        lambda w: torch.ones(2, 192, dtype=torch.float64).view_as(w),
    ],
)
def test_tensors_like_a_weight_need_no_values(make: Callable[[Tensor], Tensor], builds: list[el.Linear]) -> None:
    layer = el.Linear(16, 24, "btt", dtype=torch.float64)
    found = make(layer.weight)
    assert builds == []
    expected = make(layer.dense_weight().detach())
    assert torch.equal(found, expected)
    assert (found.dtype, found.is_contiguous()) == (expected.dtype, expected.is_contiguous())


def test_metadata_follows_the_layer() -> None:
    layer = el.Linear(16, 24, "btt")
    assert layer.weight.requires_grad
    with torch.no_grad():
        assert not layer.weight.requires_grad
    layer.A.requires_grad_(False)
    assert layer.weight.requires_grad
    layer.requires_grad_(False)
    assert not layer.weight.requires_grad
    assert layer.half().weight.dtype == torch.float16
    layer.B = nn.Parameter(layer.B.to("meta"))
    assert (layer.weight.is_meta, layer.weight.dtype, layer.weight.shape) == (True, torch.float16, (24, 16))
    assert layer.to("meta").weight.device.type == "meta"
    assert el.Linear(16, 24, "btt", device="meta").weight.requires_grad
    layer = el.Linear(16, 24, "btt")
    with torch.autocast("cpu", torch.bfloat16):
        weight = layer.weight
        assert weight.dtype == weight.detach().dtype == torch.float32  # as that of nn.Linear
        assert F.linear(torch.ones(2, 16), weight).dtype == torch.bfloat16


USES: dict[str, Callable[[Tensor], Any]] = {
    "linear": lambda w: F.linear(torch.ones(2, 16), w),
    "matmul": lambda w: w @ torch.ones(16),
    "right": lambda w: torch.ones(24) @ w,
    "to": lambda w: w.to(torch.float64),
    "t": lambda w: w.t(),
    "T": lambda w: w.T,
    "detach": lambda w: w.detach(),
    "float": lambda w: w.float(),
    "data": lambda w: w.data,
    "index": lambda w: w[3:5, 2],
    "cat": lambda w: torch.cat([w, w]),
    "list": lambda w: w.tolist(),
    "numpy": lambda w: w.detach().numpy(),
    "copy": copy.copy,
    "stride": lambda w: w.stride(),
    "chunk": lambda w: w.chunk(3)[1],
    "iterate": lambda w: [row.detach().sum().item() for row in w],
    "repr": repr,
    "isfinite": lambda w: bool(w.isfinite().all()),
    "norm": lambda w: torch.linalg.matrix_norm(w),
    "parameter": lambda w: nn.Parameter(w.detach()),
    "attention": lambda w: F.scaled_dot_product_attention(w[None], w[None], w[None]),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("spec", ["btt", "dense"])
def test_values_are_those_of_the_matrix(spec: str, use: str) -> None:
    layer = el.Linear(16, 24, spec)
    found, expected = USES[use](layer.weight), USES[use](layer.dense_weight())
    assert type(found) is type(expected)
    if isinstance(found, Tensor):
        assert torch.equal(found, expected)
        assert found.requires_grad == expected.requires_grad
    elif use == "numpy":
        assert (found == expected).all()
    elif use != "repr":
        assert found == expected
    buffer = io.BytesIO()
    torch.save(layer.weight, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert type(loaded) is Tensor
    assert torch.equal(loaded, layer.dense_weight())


def test_one_access_is_one_matrix(builds: list[el.Linear]) -> None:
    """What is written into it is seen by those who hold it, and by nobody else."""
    layer = el.Linear(16, 24, "btt")
    before = layer.dense_weight()
    builds.clear()
    with torch.no_grad():
        weight = layer.weight
        nn.init.ones_(weight)
        weight.mul_(3)
        assert (weight == 3).all()
    assert builds == [layer]
    assert torch.equal(layer.weight, before)
    read = layer.weight
    with torch.no_grad():
        norm = read.norm()  # must not decide that the matrix has no graph
    assert not norm.requires_grad
    assert read.sum().requires_grad


class Product(torch.autograd.Function):
    """As others write them: the weight reaches it as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x


@pytest.mark.parametrize("multiply", [F.linear, Product.apply, lambda x, w: x @ w.t(), lambda x, w: (w @ x.T).T])
@pytest.mark.parametrize("spec", ["btt", "dense", "low_rank"])
def test_gradients_reach_the_factors(multiply: Callable[[Tensor, Tensor], Tensor], spec: str) -> None:
    layer = el.Linear(16, 24, spec, normalize=True, bias=False, dtype=torch.float64)
    layer.get_parameter(layer.structure.factors[0].name).requires_grad_(spec == "dense")
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(layer(x).square().sum(), wanted, create_graph=True)
    found = torch.autograd.grad(multiply(x, layer.weight).square().sum(), wanted, create_graph=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    again = [torch.autograd.grad(sum(g.square().sum() for g in grads), wanted) for grads in (found, expected)]
    for a, b in zip(*again, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations(reentrant: bool) -> None:
    layer, x = el.Linear(16, 24, "btt"), torch.randn(3, 16, requires_grad=True)
    weight = layer.weight  # read outside, used inside and again when the activations are computed again
    y = checkpoint(F.linear, x, weight, use_reentrant=reentrant)
    found = torch.autograd.grad(y.square().sum(), [layer.A, layer.B]) if not reentrant else None
    if reentrant:
        y.square().sum().backward()
        found = (layer.A.grad, layer.B.grad)
    expected = torch.autograd.grad(F.linear(x, layer.dense_weight()).square().sum(), [layer.A, layer.B])
    torch.testing.assert_close(found, expected)


def test_assigned_as_data_of_another_tensor() -> None:
    """torch asks nobody then: there is nothing to see, and nothing that could be written to."""
    layer, copied, other = el.Linear(16, 24, "btt"), torch.zeros(24, 16), torch.zeros(24, 16)
    copied.data = layer.weight.data
    assert torch.equal(copied, layer.dense_weight())
    other.data = layer.weight
    assert other.isnan().all()
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        other.zero_()
    assert torch.equal(layer.weight, copied)
    linear = nn.Linear(16, 24)
    with torch.no_grad():
        linear.weight.copy_(layer.weight)
    assert torch.equal(linear.weight, copied)
    with torch.inference_mode():
        assert el.Linear(8, 8, "btt").weight.sum().is_inference()
    el.Linear(8, 8, "btt", bias=False).weight.sum().backward()


class Reader(nn.Module):
    """It reads metadata, calls the layer, and multiplies with its weight once more."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = el.Linear(16, 16, "btt")

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.proj.weight, Tensor)
        x = x.to(self.proj.weight.dtype).to(self.proj.weight.device)
        return F.linear(self.proj(x), self.proj.weight, self.proj.bias)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tracers_and_transforms() -> None:
    model, x = Reader(), torch.randn(3, 16)
    y = model(x)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), y)
    parameters = dict(model.named_parameters())
    doubled = {name: 2 * p for name, p in parameters.items()}
    other = copy.deepcopy(model)
    other.load_state_dict(doubled)
    torch.testing.assert_close(functional_call(model, doubled, x), other(x))
    stacked = {name: torch.stack([parameters[name], doubled[name]]) for name in parameters}
    both = vmap(lambda p: functional_call(model, p, x))(stacked)
    torch.testing.assert_close(both, torch.stack([y, other(x)]))
    loss = lambda p: functional_call(model, p, x).square().sum()  # noqa: E731
    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for a, b in zip(torch.func.grad(loss)(parameters).values(), expected, strict=True):
        torch.testing.assert_close(a, b)
    with forward_ad.dual_level():
        weight = functional_call(Weight(model.proj), {"layer.A": forward_ad.make_dual(model.proj.A, model.proj.A)}, ())
        tangent = forward_ad.unpack_dual(weight).tangent
    torch.testing.assert_close(tangent, model.proj.dense_weight())  # which is linear in A


class Multiplied(nn.Module):
    """It never calls the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = el.Linear(16, 24, "btt")

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "trace", [lambda model, x: torch.jit.trace(model, x), lambda model, x: torch.fx.symbolic_trace(model)]
)
def test_traces_hold_the_factors(trace: Callable[[nn.Module, Tensor], nn.Module]) -> None:
    model, x = Multiplied(), torch.randn(3, 16)
    traced = trace(model, x)
    with torch.no_grad():
        model.proj.A.mul_(2)
    torch.testing.assert_close(traced(x), model(x))
    traced(x).sum().backward()
    assert model.proj.A.grad is not None


class Weight(nn.Module):
    def __init__(self, layer: el.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        return self.layer.weight * 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_code_drops_an_unused_matrix() -> None:
    class Caster(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = el.Linear(64, 64, "low_rank(rank=2)")

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.proj(x.to(self.proj.weight.dtype))
            return y

    shapes: list[torch.Size] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def inspect(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            shapes.extend(
                node.meta["val"].shape for node in graph.graph.nodes if isinstance(node.meta.get("val"), Tensor)
            )
            return graph.forward

        return torch._dynamo.backends.common.aot_autograd(fw_compiler=inspect)(graph, inputs)

    torch._dynamo.reset()
    model, x = Caster(), torch.randn(5, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend=backend)(x), model(x))
        assert shapes
        assert (64, 64) not in shapes
        reader = Reader()
        compiled = torch.compile(reader, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x[:, :16]), reader(x[:, :16]))


def test_a_parametrised_factor_counts() -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    layer = el.Linear(16, 24, "btt", bias=False)
    before = layer.dense_weight()
    parametrize.register_parametrization(layer, "A", Double())
    torch.testing.assert_close(layer.weight, 2 * before)
    F.linear(torch.ones(1, 16), layer.weight).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_copies_of_a_model_have_weights_of_their_own() -> None:
    layer = el.Linear(16, 24, "btt")
    assert isinstance(layer.weight, LazyWeight)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.A.zero_()
    assert not other.weight.any()
    assert layer.weight.any()


@pytest.mark.parametrize("gated", [False, True])
def test_t5_reads_the_dtype_and_builds_nothing(gated: bool, builds: list[el.Linear]) -> None:
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu" if gated else "relu", decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    el.convert(model, "low_rank(rank=4)", layers="*.wo")
    tokens = torch.randint(1, 32, (2, 5))
    with torch.no_grad():
        model(input_ids=tokens, decoder_input_ids=tokens)
        model.generate(tokens, max_new_tokens=3)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert builds == []


@pytest.mark.parametrize("stack", [False, True])
def test_transformers_of_torch_call_their_layers(stack: bool, builds: list[el.Linear]) -> None:
    """In evaluation they hand the weights of dense layers to a fused kernel."""
    block: nn.Module = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = (nn.TransformerEncoder(block, 2) if stack else block).eval()
    el.convert(model, "btt", layers="*linear?")
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        y = model(x)
        assert builds == []
        el.densify(model)
        torch.testing.assert_close(model(x), y)


def test_mixtures_stand_where_the_dtype_is_read() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    el.convert(model, "btt", layers="*linear?", experts=4)
    x = torch.randn(2, 5, 16)
    model(x).sum().backward()
    with torch.no_grad():
        assert model.eval()(x).shape == x.shape
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    t5 = T5ForConditionalGeneration(config)
    el.convert(t5, "low_rank", layers="*.wo", experts=4)
    tokens = torch.randint(1, 32, (2, 5))
    t5(input_ids=tokens, labels=tokens).loss.backward()
    weight = el.MoELinear(16, 24, "btt", dtype=torch.float64).weight
    assert (weight.shape, weight.dtype, weight.device.type) == ((24, 16), torch.float64, "cpu")
    with pytest.raises(RuntimeError, match="a mixture of experts has no weight"):
        weight.sum()
