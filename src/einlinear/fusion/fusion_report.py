"""Report of `fuse`: the feed-forward blocks of a model, and layers that look like part of one but are not."""

from __future__ import annotations

from dataclasses import dataclass

from einlinear.tables import aligned


@dataclass(frozen=True)
class FusedBlock:
    """A feed-forward block: down(activation(up(x))), or down(activation(gate(x)) * up(x)).

    Attributes:
        module: the qualified name of the innermost module around it, "" for the model itself.
        up, gate, down: the qualified names of the layers; gate is None for a block without one.
        activation: one of `einlinear.ops.ACTIVATIONS`.
        reason: why its layers run one after the other with 2048 tokens; None if it runs fused.
        reason_in_training: the same for training steps.
    """

    module: str
    up: str
    gate: str | None
    down: str
    activation: str
    reason: str | None = None
    reason_in_training: str | None = None

    @property
    def runs(self) -> str:
        """How the block runs: fused or not, and why."""
        if self.reason is not None:
            return f"unfused: {self.reason}"
        if self.reason_in_training is not None:
            return f"fused in inference, unfused in training: {self.reason_in_training}"
        return "fused"


@dataclass(frozen=True)
class FusionReport:
    """Printable report of `einlinear.fuse`.

    Attributes:
        blocks: in the order of their layers in the model.
        skipped: layers that look like the first of a block but are not, as (name, reason).
        modules: names of `einlinear.FeedForward` modules, which run fused by themselves.
    """

    blocks: tuple[FusedBlock, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    modules: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [("up", "gate", "down", "activation", "runs")]
        rows += [(b.up, b.gate or "", b.down, b.activation, b.runs) for b in self.blocks]
        lines = aligned(rows) if self.blocks else []
        if self.modules:
            lines.append(f"fused by themselves: {', '.join(name or 'the model' for name in self.modules)}")
        lines = lines or ["There is no feed-forward block of structured layers."]
        return "\n".join([*lines, *(f"skipped {name}: {reason}" for name, reason in self.skipped)])
