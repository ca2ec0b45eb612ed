"""Report of a compression, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from einlinear.compression.layer_timing import SpeedUp, describe_tokens
from einlinear.conversion.conversion_report import Coverage, total
from einlinear.tables import aligned


@dataclass(frozen=True)
class CompressedLayer:
    """One layer.

    Attributes:
        name: qualified.
        structure: the new spec, "dense", or for the layers of a block "narrow(3 of 4 heads)" or "narrow(64 of 256)".
        params_before, params, macs_before, macs: of the weight; of a stack of experts, the MACs of active ones.
        expected_error: the error by which the structure was chosen.
        error: of the outputs on the calibration data, E|y - y'|^2 / E|y|^2 (centred if there is a bias), or the weight.
        sensitivity: change of the model's output per unit of a small error.
        speed_up: over the dense layer, by the number of tokens at once; NaN for stacked experts and embeddings, which
            are not timed.
        tokens_per_input: tokens for each input feature that a linear layer was fitted to, or None.
        reason: why the layer had to stay dense, or None.
        precision: of a quantised weight, or "" for the dtype of the dense layer.
        bytes_before, bytes: that the dense weight and the factors take.
    """

    name: str
    structure: str
    params_before: int
    params: int
    macs_before: int
    macs: int
    expected_error: float
    error: float
    sensitivity: float
    speed_up: SpeedUp = field(default_factory=SpeedUp)
    tokens_per_input: float | None = None
    reason: str | None = None
    precision: str = ""
    bytes_before: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class QuantizationAlone:
    """Expected change of the model's output, and that of quantised dense weights, or None if they are too large."""

    chosen: float
    quantized: float | None

    def __str__(self) -> str:
        change = f"expected change of the model's output {self.quantized:.3g}" if self.quantized is not None else ""
        return f"Quantisation alone at these bytes: {change or 'not possible'}; chosen here: {self.chosen:.3g}."


@dataclass(frozen=True)
class DtypeAlone:
    """Seconds of the dense layers in another dtype, and the expected change of the model's output."""

    dtype: str
    seconds: float
    change: float


@dataclass(frozen=True)
class MeasuredTime:
    """Seconds that layers take together for a number of tokens, with the expected change of the model's output."""

    tokens: int
    before: float
    after: float
    change: float
    alternatives: tuple[DtypeAlone, ...] = ()

    @property
    def notes(self) -> list[str]:
        """Sentences on the time, and on other dtypes, with a warning if one of them is at least as fast and better."""
        before, after = 1e3 * self.before, 1e3 * self.after
        share = f"{self.after / self.before:.1%}"
        notes = [f"The layers take {after:.3g} of {before:.3g} ms for {describe_tokens([self.tokens])}: {share}."]
        for other in self.alternatives:
            name = other.dtype.removeprefix("torch.")
            if other.seconds > self.after:
                result = f"not possible, the dense layers take {other.seconds / self.before:.1%}."
            else:
                result = f"expected change of the model's output {other.change:.3g}; chosen here: {self.change:.3g}."
                if other.change <= self.change:
                    result += f" Convert the model first: model.to({other.dtype})."
            notes.append(f"{name} alone at this speed: {result}")
        return notes


@dataclass(frozen=True)
class CompressionReport:
    """Result of a compression. Print it.

    Attributes:
        layers: all that were considered.
        skipped: the other linear layers and embeddings that were asked for, as (name, reason).
        coverage: the share of the model's parameters that was considered, and the kinds of the others.
        count: what the budget is a fraction of: "params", "macs", "bytes" or "time".
        missed_budget: the budget, if it is not reached with only_if_faster=True or count="time"; else None.
        alternative: with a budget of bytes, what quantisation alone would change.
        time: with a budget of time, what the layers take.
        tied: embeddings and the output heads that have their factors, as (embedding, head).
        not_narrowed: with "narrow", the layers that are in no block that can be narrowed, as (name, reason).
        params_before, params, macs_before, macs, bytes_before, bytes: sums over the weights of the layers.
    """

    layers: tuple[CompressedLayer, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    coverage: Coverage | None = None
    count: str = "params"
    missed_budget: float | None = None
    alternative: QuantizationAlone | None = None
    time: MeasuredTime | None = None
    not_narrowed: tuple[tuple[str, str], ...] = ()
    tied: tuple[tuple[str, str], ...] = ()

    params_before, params = total("layers", "params_before"), total("layers", "params")
    macs_before, macs = total("layers", "macs_before"), total("layers", "macs")
    bytes_before, bytes = total("layers", "bytes_before"), total("layers", "bytes")

    @property
    def warning(self) -> str | None:
        """A sentence to print first if the layers considered are less than half of the model."""
        return None if self.coverage is None else self.coverage.warning

    @property
    def notes(self) -> list[str]:
        """Sentences on coverage, on layers that stayed dense, on scarce data and on slow layers."""
        notes = []
        if self.alternative is not None:
            before, now = self.bytes_before, self.bytes
            notes.append(f"The weights take {now:,} of {before:,} bytes: 1/{before / max(now, 1):.1f}.")
            notes.append(str(self.alternative))
        if self.time is not None:
            notes += self.time.notes
        if self.coverage is not None:
            notes += self.coverage.notes
            # quantised weights keep their parameters
            if self.count != "bytes":
                kept = 1 - (self.params_before - self.params) / max(self.coverage.params, 1)
                notes.append(f"The whole model keeps {kept:.1%} of its parameters.")
        if self.missed_budget is not None:
            slower = "all other structures tried are slower than the dense layers"
            if self.time is not None:
                slower = "structures took longer than was estimated when they were timed themselves"
            notes.append(f"The budget of {self.missed_budget:.1%} is not reached: {slower}.")
        notes += [f"Stays dense: {layer.name}, {layer.reason}." for layer in self.layers if layer.reason is not None]
        notes += [f"Tied: {head} has the factors of {table}." for table, head in self.tied]
        notes += [f"Left as it was: {name} {reason}." for name, reason in self.skipped]
        for reason in dict.fromkeys(reason for _, reason in self.not_narrowed):
            names = [name for name, because in self.not_narrowed if because == reason]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            notes.append(f"Not narrowed: {', '.join(names[:3])}{more}, {reason}.")
        tokens = [layer.tokens_per_input for layer in self.layers if layer.tokens_per_input is not None]
        if few := [count for count in tokens if count < 10]:
            scarce = f"fewer than 10 tokens for each of their inputs ({min(few):.2g} at worst)"
            advice = "with more calibration data less is lost"
            notes.append(f"{len(few)} of {len(self.layers)} layers were fitted to {scarce}: {advice}.")
        if slow := [layer for layer in self.layers if layer.speed_up.is_slower]:
            slowest = [f"{layer.name} ({', '.join(layer.speed_up.rounded)})" for layer in slow[:5]]
            more = f" and {len(slow) - 5} more" if len(slow) > 5 else ""
            than_dense = f"layers are slower than dense, for {describe_tokens(self._timed)}"
            advice = "only_if_faster=True leaves such layers dense"
            if self.alternative is not None:
                reasons = "with gradients, under tracing or off the CPU"
                advice = f"Calls {reasons} expand quantised weights: el.explain(layer, x) says why"
            notes.append(f"{len(slow)} of {len(self.layers)} {than_dense}: {', '.join(slowest)}{more}. {advice}.")
        return notes

    @property
    def headings(self) -> tuple[str, ...]:
        """Headings of the columns of `rows`."""
        first, *others = map(describe_tokens, ([n] for n in self._timed))
        counts = ("params", "MACs", *(["bytes"] if self.count == "bytes" else []), "kept")
        return ("layer", "structure", *counts, "expected error", "error", f"x as fast, {first}", *others)

    def rows(self) -> list[tuple[str, ...]]:
        """Return a row of text per layer, and one for all of them, under `headings`."""

        def counts(part: CompressedLayer | CompressionReport) -> tuple[str, ...]:
            shown = [part.params, part.macs, *([part.bytes] if self.count == "bytes" else [])]
            return *(f"{number:,}" for number in shown), f"{self._kept(part):.1%}"

        rows: list[tuple[str, ...]] = []
        for layer in self.layers:
            errors = (f"{layer.expected_error:.3g}", f"{layer.error:.3g}")
            structure = f"{layer.structure}, {layer.precision}" if layer.precision else layer.structure
            rows.append((layer.name, structure, *counts(layer), *errors, *layer.speed_up.rounded))
        return [*rows, ("all of them", "", *counts(self), "", "", *("" for _ in self._timed))]

    def __str__(self) -> str:
        return "\n".join([*filter(None, [self.warning]), *aligned([self.headings, *self.rows()]), *self.notes])

    def _kept(self, part: CompressedLayer | CompressionReport) -> float:
        """Return the share of what `count` counts that a layer, or all of them, keep."""
        if self.time is not None:
            if isinstance(part, CompressedLayer):
                return 1 / part.speed_up.by_tokens[self.time.tokens]
            return self.time.after / self.time.before
        return float(getattr(part, self.count) / getattr(part, f"{self.count}_before"))

    @property
    def _timed(self) -> list[int]:
        """The numbers of tokens for which layers were timed."""
        return list(self.layers[0].speed_up.by_tokens)
