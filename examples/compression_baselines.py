"""Published ways to make a transformer smaller, each in a few lines of PyTorch, for examples/compare_compression.py.

Every method returns a smaller copy of a model. Only the linear layers of its blocks change: embeddings, norms and the
head stay. All sizes are fractions of the parameters of these layers, and every layer keeps the same fraction.

| method | what it does | published as |
| --- | --- | --- |
| svd | truncates the singular values of each weight | |
| asvd | the same after scaling inputs by √(mean size) | ASVD, arXiv 2312.05821, without its search for ranks |
| svd_llm | the same after whitening inputs | SVD-LLM, arXiv 2403.07378, without its fine-tuning |
| drop_blocks | removes the blocks whose output is most similar to their input | ShortGPT, arXiv 2403.03853 |
| modegpt | narrows feed-forward blocks and attention heads | MoDeGPT, arXiv 2408.09632, all blocks alike |
| bfloat16 | stores everything in bfloat16 | |
| int8, int4 | stores weights as integers and expands them in each call | |
| int8_dynamic | multiplies in 8-bit integers | torch.ao.quantization.quantize_dynamic |
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Where the linear layers of a transformer are.

    Attributes:
        blocks: qualified name of the list of blocks.
        query, key, value, out, up, down: names of the layers in a block.
        heads: number of attention heads.
        attention: name of the module in a block that computes attention from query, key and value, to be replaced by
            `NarrowAttention`. None: the model's own takes values of any width, and normalises queries and keys.
        has_head: whether the outputs of the model are logits, compared by their KL divergence in `distill`.
    """

    blocks: str
    query: str
    key: str
    value: str
    out: str
    up: str
    down: str
    heads: int
    attention: str | None = None
    has_head: bool = False

    @property
    def layers(self) -> tuple[str, ...]:
        return self.query, self.key, self.value, self.out, self.up, self.down

    def input_of(self, layer: str) -> str:
        """Return the first layer with the same input."""
        return self.query if layer in (self.key, self.value) else layer

    def blocks_of(self, model: nn.Module) -> Any:
        return model.get_submodule(self.blocks)


@dataclass
class Statistics:
    """What the methods need of the calibration data.

    Attributes:
        second_moments: mean of x xᵀ of the inputs of layers, (in, in), by block and name; of `Layout.input_of` only.
        sizes: mean of |x| of the same inputs, (in,).
        similarities: mean cosine similarity of the input and the output of each block.
    """

    second_moments: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    sizes: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    similarities: dict[int, float] = field(default_factory=dict)


@torch.no_grad()
def collect(
    model: nn.Module, layout: Layout, batches: Iterable[Any], call: Callable[[nn.Module, Any], Any]
) -> Statistics:
    """Run a model on batches and return the statistics of all tokens but padding."""
    statistics, tokens = Statistics(), 0
    # (batch, tokens) of the current batch
    mask = torch.ones(0)

    def add(store: dict[Any, Any], key: Any, value: Any) -> None:
        store[key] = store[key] + value if key in store else value

    def layer_hook(key: tuple[int, str]) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            # (tokens, in)
            x = inputs[0][mask]
            add(statistics.second_moments, key, (x.T @ x).double())
            add(statistics.sizes, key, x.abs().sum(0).double())

        return hook

    def block_hook(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            cosines = F.cosine_similarity(inputs[0][mask], output[mask], dim=-1)
            add(statistics.similarities, index, float(cosines.sum()))

        return hook

    handles = []
    for index, block in enumerate(layout.blocks_of(model)):
        handles.append(block.register_forward_hook(block_hook(index)))
        for name in {layout.input_of(name) for name in layout.layers}:
            handles.append(block.get_submodule(name).register_forward_pre_hook(layer_hook((index, name))))
    for batch in batches:
        mask = mask_of(batch)
        tokens += int(mask.sum())
        call(model, batch)
    for handle in handles:
        handle.remove()
    for store in (statistics.second_moments, statistics.sizes, statistics.similarities):
        for key in store:
            store[key] = store[key] / tokens
    return statistics


# Low rank


def svd(model: nn.Module, layout: Layout, keep: float, statistics: Statistics) -> nn.Module:
    """Replace every weight by its truncated SVD."""
    return _factorised(model, layout, keep, lambda key, size: (torch.eye(size).double(), torch.eye(size).double()))


def asvd(model: nn.Module, layout: Layout, keep: float, statistics: Statistics, alpha: float = 0.5) -> nn.Module:
    """Truncate the singular values of W S, with S = diag(mean |x|)^alpha, and undo S."""

    def scaling(key: tuple[int, str], size: int) -> tuple[Tensor, Tensor]:
        scale = statistics.sizes[key].clamp_min(1e-6) ** alpha
        return scale.diag(), (1 / scale).diag()

    return _factorised(model, layout, keep, scaling)


def svd_llm(model: nn.Module, layout: Layout, keep: float, statistics: Statistics) -> nn.Module:
    """Truncate the singular values of W S, with S Sᵀ = E[x xᵀ], and undo S."""

    def whitening(key: tuple[int, str], size: int) -> tuple[Tensor, Tensor]:
        factor = cholesky(statistics.second_moments[key])
        return factor, torch.linalg.inv(factor)

    return _factorised(model, layout, keep, whitening)


def cholesky(moment: Tensor, damping: float = 1e-6) -> Tensor:
    """Return lower triangular S with S Sᵀ = C, and a little on the diagonal of C for directions that do not occur."""
    return torch.linalg.cholesky(moment + damping * moment.diagonal().mean() * torch.eye(len(moment)))


def _factorised(
    model: nn.Module,
    layout: Layout,
    keep: float,
    transform: Callable[[tuple[int, str], int], tuple[Tensor, Tensor]],
) -> nn.Module:
    """Replace W by the truncated SVD of W S, times the inverse of S."""
    model = copy.deepcopy(model)
    for index, block in enumerate(layout.blocks_of(model)):
        for name in layout.layers:
            linear = block.get_submodule(name)
            rank = int(keep * linear.weight.numel() / sum(linear.weight.shape))
            s, inverse = transform((index, layout.input_of(name)), linear.in_features)
            u, values, v = torch.linalg.svd(linear.weight.detach().double() @ s, full_matrices=False)
            root = values[:rank].sqrt()
            first = linear_of(root[:, None] * v[:rank] @ inverse, None)
            block.set_submodule(name, nn.Sequential(first, linear_of(u[:, :rank] * root, linear.bias)))
    return model


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a layer with a float32 copy of weight (out, in) and bias."""
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias is not None)
    linear.weight = nn.Parameter(weight.detach().float().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().float().clone())
    return linear


# Fewer blocks


class Skipped(nn.Module):
    """The place of a block that was removed: returns its input."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


def drop_blocks(model: nn.Module, layout: Layout, keep: float, statistics: Statistics) -> nn.Module:
    """Remove blocks until the number left is nearest to the size, those first that change their input least."""
    model = copy.deepcopy(model)
    blocks, similarities = layout.blocks_of(model), statistics.similarities
    count = len(blocks) - max(1, round(keep * len(blocks)))
    for index in sorted(similarities, key=lambda index: -similarities[index])[:count]:
        blocks[index] = Skipped()
    return model


# Narrower blocks


class NarrowAttention(nn.Module):
    """Attention of BERT whose heads have fewer features than width / heads.

    Shapes:
        hidden states (n, t, width) and a mask that broadcasts to (n, heads, t, t), to (n, t, heads * features)
    """

    def __init__(self, query: nn.Module, key: nn.Module, value: nn.Module, heads: int, scale: float) -> None:
        super().__init__()
        self.query, self.key, self.value, self.heads, self.scale = query, key, value, heads, scale

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        q, k, v = (
            layer(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, scale=self.scale)
        return mixed.transpose(1, 2).flatten(2), None


@torch.no_grad()
def modegpt(model: nn.Module, layout: Layout, keep: float, statistics: Statistics) -> nn.Module:
    """Narrow feed-forward blocks, values and outputs, and queries and keys if the layout allows it.

    Queries and keys that stay whole are paid for by the rest, so that all together keep the fraction.
    """
    model = copy.deepcopy(model)
    for index, block in enumerate(layout.blocks_of(model)):
        layers = {name: block.get_submodule(name) for name in layout.layers}
        total = sum(layer.weight.numel() for layer in layers.values())
        whole = 0 if layout.attention else sum(layers[n].weight.numel() for n in (layout.query, layout.key))
        fraction = (keep * total - whole) / (total - whole)
        if fraction <= 0:
            raise ValueError(f"queries and keys alone take {whole / total:.0%} of the parameters")
        inputs = statistics.second_moments[index, layout.query]
        narrowed = narrow_feed_forward(
            layers[layout.up], layers[layout.down], fraction, statistics.second_moments[index, layout.down]
        )
        narrowed += narrow_values(layers[layout.value], layers[layout.out], layout.heads, fraction, inputs)
        names = [layout.up, layout.down, layout.value, layout.out]
        if layout.attention:
            head_size = layers[layout.query].out_features // layout.heads
            narrowed += narrow_queries(layers[layout.query], layers[layout.key], layout.heads, fraction, inputs)
            names += [layout.query, layout.key]
        for name, layer in zip(names, narrowed, strict=True):
            block.set_submodule(name, layer)
        if layout.attention:
            query, key, value = (block.get_submodule(n) for n in (layout.query, layout.key, layout.value))
            block.set_submodule(layout.attention, NarrowAttention(query, key, value, layout.heads, head_size**-0.5))
    return model


def narrow_feed_forward(
    up: nn.Linear, down: nn.Linear, fraction: float, moment: Tensor, ridge: float = 1.0, damping: float = 1e-2
) -> list[nn.Linear]:
    """Keep the hidden features of largest ridge leverage, and refit `down` to its outputs by Nyström's formula.

    Args:
        up, down: the layers before and after the hidden features.
        fraction: of the hidden features to keep.
        moment: second moment C of the hidden features, (hidden, hidden).
        ridge, damping: fractions of the mean variance to add to the diagonal of C, for the scores and for the fit.
    """
    count = int(fraction * len(moment))
    variance = moment.diagonal().mean() * torch.eye(len(moment))
    scores = torch.linalg.solve(moment + ridge * variance, moment).diagonal()
    chosen = scores.topk(count).indices.sort().values
    # (chosen, hidden): predicts all hidden features from the chosen ones
    prediction = torch.linalg.solve((moment + damping * variance)[chosen][:, chosen], moment[chosen])
    weight = down.weight.double() @ prediction.T
    return [linear_of(up.weight[chosen], _rows(up.bias, chosen)), linear_of(weight, down.bias)]


def narrow_values(value: nn.Linear, out: nn.Linear, heads: int, fraction: float, moment: Tensor) -> list[nn.Linear]:
    """Truncate the SVD of the product of value and output weights of each head, after whitening the inputs."""
    s = cholesky(moment)
    size = value.out_features // heads
    count = max(1, int(fraction * size))
    rows, columns = [], []
    for v, o in zip(value.weight.double().split(size), out.weight.double().split(size, dim=1), strict=True):
        u, values, w = torch.linalg.svd(s.T @ v.T @ o.T, full_matrices=False)
        rows.append(torch.linalg.solve_triangular(s.T, u[:, :count], upper=True).T)
        columns.append((values[:count, None] * w[:count]).T)
    bias = out.bias
    # attention weights sum to 1, so the bias of values passes through
    if value.bias is not None:
        passed = out.weight @ value.bias
        bias = passed if bias is None else bias + passed
    return [linear_of(torch.cat(rows), None), linear_of(torch.cat(columns, dim=1), bias)]


def narrow_queries(query: nn.Linear, key: nn.Linear, heads: int, fraction: float, moment: Tensor) -> list[nn.Linear]:
    """Keep the features of each head with the largest product of the norms of queries and keys."""
    size = query.out_features // heads
    count = max(1, int(fraction * size))
    norms = [((layer.weight.double() @ moment) * layer.weight).sum(1).clamp_min(0).sqrt() for layer in (query, key)]
    # (heads, size)
    products = (norms[0] * norms[1]).unflatten(0, (heads, size))
    chosen = products.topk(count, dim=1).indices.sort(dim=1).values
    chosen = (chosen + size * torch.arange(heads)[:, None]).flatten()
    return [linear_of(layer.weight[chosen], _rows(layer.bias, chosen)) for layer in (query, key)]


def _rows(bias: Tensor | None, chosen: Tensor) -> Tensor | None:
    return None if bias is None else bias[chosen]


# Fewer bits


class IntegerLinear(nn.Module):
    """A linear layer whose weight is stored as integers of 8 or 4 bits, rounded to nearest, and expanded in each call.

    Args:
        linear: to be rounded.
        bits: 8, or 4, of which two are stored in a byte.
        group: consecutive inputs with one bfloat16 scale; None: one scale for each row.
    """

    def __init__(self, linear: nn.Linear, bits: int, group: int | None = None) -> None:
        super().__init__()
        self.bits, self.group, self.bias = bits, group or linear.in_features, linear.bias
        largest = 2 ** (bits - 1) - 1
        # (out, groups, group)
        grouped = linear.weight.detach().unflatten(1, (-1, self.group))
        scale = (grouped.abs().amax(2, keepdim=True) / largest).clamp_min(1e-12).bfloat16()
        rounded = (grouped / scale.float()).round().clamp(-largest, largest).to(torch.int8).flatten(1)
        if bits == 4:
            positive = (rounded + 8).to(torch.uint8)
            rounded = positive[:, ::2] | (positive[:, 1::2] << 4)
        self.register_buffer("rounded", rounded)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        integers = self.rounded.to(x.dtype)
        if self.bits == 4:
            integers = torch.stack((self.rounded & 15, self.rounded >> 4), dim=-1).flatten(1).to(x.dtype) - 8
        weight = integers.unflatten(1, (-1, self.group)) * self.scale.to(x.dtype)
        return F.linear(x, weight.flatten(1), self.bias)


def integers(model: nn.Module, layout: Layout, bits: int, group: int | None = None) -> nn.Module:
    """Replace all layers by `IntegerLinear`."""
    model = copy.deepcopy(model)
    for block in layout.blocks_of(model):
        for name in layout.layers:
            block.set_submodule(name, IntegerLinear(block.get_submodule(name), bits, group))
    return model


def int8_dynamic(model: nn.Module, layout: Layout) -> nn.Module:
    """Replace all layers by torch's, which round inputs in each call and multiply integers."""
    model = copy.deepcopy(model)
    blocks = layout.blocks_of(model)
    with warnings.catch_warnings():
        # deprecated for torchao, whose kernels need more packages
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(blocks, {nn.Linear}, dtype=torch.qint8, inplace=True)
    return model


# Distillation


def distill(
    model: nn.Module,
    original: nn.Module,
    layout: Layout,
    batches: Sequence[Any],
    seconds: float,
    call: Callable[[nn.Module, Any], Tensor],
    lr: float = 3e-4,
) -> int:
    """Train a model for some time to match the output of the original and those of all blocks; return the steps.

    AdamW with warm-up and cosine decay, one learning rate, and the loss and the schedule of `einlinear.distill`, which
    takes models without structured layers only if their layers keep their names.

    Args:
        call: returns the output of a model for a batch, (n, t, features).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0)
    outputs: dict[tuple[nn.Module, int], Tensor] = {}

    def keep(key: tuple[nn.Module, int]) -> Callable[..., None]:
        return lambda module, inputs, output: outputs.__setitem__(key, output)

    handles = [
        block.register_forward_hook(keep((which, index)))
        for which in (model, original)
        for index, block in enumerate(layout.blocks_of(which))
    ]
    steps, start = 0, time.monotonic()
    while (done := (time.monotonic() - start) / seconds) < 1:
        batch = batches[steps % len(batches)]
        mask = mask_of(batch)
        with torch.no_grad():
            target = call(original, batch)[mask]
        output = call(model, batch)[mask]
        if layout.has_head:
            loss = F.kl_div(output.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="batchmean")
        else:
            loss = _relative_error(output, target)
        for index in range(len(layout.blocks_of(model))):
            loss = loss + _relative_error(outputs[model, index][mask], outputs[original, index][mask])
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(done / 0.1, 0.5 + 0.5 * math.cos(math.pi * max(0.0, done - 0.1) / 0.9))
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    for handle in handles:
        handle.remove()
    return steps


def mask_of(batch: Any) -> Tensor:
    """Return which tokens of a batch are not padding, (n, t)."""
    mask = batch["attention_mask"] if isinstance(batch, Mapping) else torch.ones_like(batch)
    return mask.bool()


def _relative_error(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean() / (target - target.mean(0)).square().mean().clamp_min(1e-12)


# All methods that take a size, and those that do not
SIZED = {"svd": svd, "asvd": asvd, "svd_llm": svd_llm, "drop_blocks": drop_blocks, "modegpt": modegpt}
ROUNDED: dict[str, Callable[[nn.Module, Layout], nn.Module]] = {
    "bfloat16": lambda model, layout: copy.deepcopy(model).bfloat16(),
    "int8": lambda model, layout: integers(model, layout, 8),
    "int4": lambda model, layout: integers(model, layout, 4, 32),
    "int8_dynamic": int8_dynamic,
}


def weights_in_blocks(model: nn.Module, layout: Layout) -> list[Tensor]:
    """Return all tensors of two or more axes in the blocks: weights, factors, integers and their scales."""
    blocks = layout.blocks_of(model)
    # torch's quantised layers hide their weights
    packed = [module.weight() for module in blocks.modules() if callable(getattr(module, "weight", None))]
    return packed + [tensor for tensor in (*blocks.parameters(), *blocks.buffers()) if tensor.ndim >= 2]


def bytes_of(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)
