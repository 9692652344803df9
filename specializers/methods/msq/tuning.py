"""MSQ's tuning: the loss at rounded weights, the pull on lowest bits, and the rounds in which bits are dropped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

from ....agents.errors import TrainingError
from ...training.batches import EncodedRow
from ...training.curvature import fisher_traces, hutchinson_traces
from ...training.objective import Objective, Placed, answer_loss
from ...training.weight_swap import with_values
from ..calibration import sample_rows
from .bits import average_bits, bit_units, bits_to_drop, drop_bits, drop_to_target, rank_bits
from .quantiser import freeze_scale, inside_range, lsb_distance, nonzero_share, spread_scale, step_size, to_values
from .settings import MsqSettings

if TYPE_CHECKING:
    import torch

__all__ = ["MsqObjective"]


class MsqObjective(Objective):
    """The task's loss at the rounded weights, the penalty on low bits, and the rounds that drop them.

    `weights` are the matrices by layer name. `bits` is the map as it is now.
    """

    def __init__(
        self,
        model: Any,
        settings: MsqSettings,
        weights: Mapping[str, torch.Tensor],
        rows: Sequence[EncodedRow],
        *,
        seed: int,
        **placed: Unpack[Placed],
    ) -> None:
        super().__init__(model, **placed)
        import torch

        self.settings = settings
        self.weights = weights
        self.seed = seed
        self.units = bit_units({name: weight.shape for name, weight in weights.items()})
        self._unit_of = {layer: number for number, unit in enumerate(self.units) for layer in unit.layers}
        self.scales = {
            name: freeze_scale(weight, group_size=settings.group_size, clip=settings.clip)
            for name, weight in weights.items()
        }
        self._trace_rows = sample_rows(rows, count=settings.trace_rows, seed=seed)
        self.widths = torch.full((len(self.units),), settings.start_bits)
        self.drops = torch.ones(len(self.units), dtype=torch.int64)
        self.sensitivity = torch.zeros(len(self.units), dtype=torch.float64)
        self.dropped_anyway = torch.zeros((), dtype=torch.int64)
        self.state = {
            "widths": self.widths,
            "drops": self.drops,
            "sensitivity": self.sensitivity,
            "dropped_anyway": self.dropped_anyway,
        }

    @property
    def bits(self) -> dict[str, int]:
        """Width of each unit now."""
        return {unit.name: int(width) for unit, width in zip(self.units, self.widths.tolist(), strict=True)}

    def width(self, layer: str) -> int:
        """Width of a layer now."""
        return int(self.widths[self._unit_of[layer]])

    @property
    def searching(self) -> bool:
        """Whether bits are still to be dropped."""
        at_target = average_bits(self.bits, self.units) <= self.settings.target_bits
        return self.settings.allocation == "search" and not at_target

    def rounded(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The weights the model computes with, W_n of every matrix by name, one at a time."""
        for name, weight in self.weights.items():
            yield name, to_values(weight, self.scales[name], self.width(name))

    def add_gradients(self, rows: Sequence[EncodedRow], step: int) -> dict[str, float]:
        if step == 0:
            self._start()
        with with_values(self.weights, self.rounded()):
            loss = self.add_answer_gradients(rows)
        distance, count = 0.0, 0
        searching = self.searching
        for name, weight in self.weights.items():
            assert weight.grad is not None
            # Straight through the rounding inside the range, nothing outside: there rounding is flat.
            weight.grad *= inside_range(weight, self.scales[name])
            unit, bits = self._unit_of[name], self.width(name)
            if not searching or bits <= self.settings.min_bits:
                continue
            # The next drop decides which bits are pulled to zero.
            drop = min(int(self.drops[unit]), bits - self.settings.min_bits)
            away = lsb_distance(weight, self.scales[name], bits, drop)
            force = self.settings.penalty * weight.grad.square().mean().sqrt()
            weight.grad += force * away.sign()
            distance += float((away.abs() / spread_scale(step_size(self.scales[name], bits), away)).sum())
            count += away.numel()
        measured = {"loss": loss, "average_bits": average_bits(self.bits, self.units)}
        return measured | ({"steps_from_fewer_bits": distance / count} if count else {})

    def after_step(self, step: int) -> dict[str, float]:
        import torch

        with torch.no_grad():
            for name, weight in self.weights.items():
                limit = spread_scale(self.scales[name], weight)
                weight.copy_(torch.minimum(torch.maximum(weight, -limit), limit))
        last = self.settings.steps - self.settings.finish_steps
        if self.searching and step + 1 <= last and (step + 1) % self.settings.drop_every_steps == 0:
            self._drop()
        if self.searching and step + 1 == max(last, 1):
            self._settle()
        return {}

    def _start(self) -> None:
        settings = self.settings
        if settings.allocation == "uniform":
            self.widths.fill_(int(settings.target_bits))
        elif settings.allocation == "layers":
            bits = rank_bits(
                self._importance(),
                self.units,
                high=settings.start_bits,
                low=settings.min_bits,
                target_bits=settings.target_bits,
            )
            self._set(bits)
        elif self.searching:
            self._measure_sensitivity()

    def _drop(self) -> None:
        before = self.bits
        nonzero = {}
        for number, unit in enumerate(self.units):
            room = before[unit.name] - self.settings.min_bits
            drop = min(int(self.drops[number]), room)
            shares = [
                nonzero_share(self.weights[n], self.scales[n], before[unit.name], drop) * self.weights[n].numel()
                for n in unit.layers
            ]
            nonzero[unit.name] = sum(shares) / unit.weights if room else 1.0
        after = drop_bits(
            before,
            self._named(self.drops),
            nonzero,
            self._named(self.sensitivity),
            self.units,
            below=self.settings.nonzero_below,
            min_bits=self.settings.min_bits,
            target_bits=self.settings.target_bits,
        )
        if after != before:
            self._set(after)
            if self.searching:
                self._measure_sensitivity()

    def _settle(self) -> None:
        """The last chance to reach the target."""
        average = average_bits(self.bits, self.units)
        if self.settings.on_missed == "stop":
            raise TrainingError(
                f"the target of {self.settings.target_bits} bits is out of reach: the average is {average:.2f}",
                expected="low bits that clear in the steps there are",
                remedy=f"Raise penalty={self.settings.penalty}, steps, learning_rate or nonzero_below, raise the "
                f"target, or set on_missed: drop.",
            )
        before = self.bits
        after = drop_to_target(
            before,
            self._named(self.sensitivity),
            self.units,
            min_bits=self.settings.min_bits,
            target_bits=self.settings.target_bits,
        )
        self._set(after)
        self.dropped_anyway.fill_(sum(before[name] - after[name] for name in after))

    def _measure_sensitivity(self) -> None:
        """Ω = mean curvature times the squared rounding error, and from it how many bits each unit drops next."""
        import torch

        for weight in self.weights.values():
            weight.grad = None  # the step is done with it, and second derivatives need the room
        was_training = self.model.training
        self.model.eval()
        errors = {name: float((value - self.weights[name].detach()).square().sum()) for name, value in self.rounded()}
        with with_values(self.weights, self.rounded()):
            traces = self._traces()
        self.model.train(was_training)
        found = {}
        for unit in self.units:
            # Off a minimum an estimate may be negative; such a unit is as insensitive as can be.
            trace = max(0.0, sum(traces[name] for name in unit.layers))
            found[unit.name] = trace / unit.weights * sum(errors[name] for name in unit.layers)
        self.sensitivity.copy_(torch.tensor(list(found.values()), dtype=torch.float64))
        self.drops.copy_(torch.tensor(list(bits_to_drop(found).values())))

    def _traces(self) -> dict[str, float]:
        """The curvature's trace of each matrix's block, from the trace rows, at the weights as they are."""
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if self.settings.curvature == "fisher":
            return fisher_traces(self.weights, [partial(self.loss, [row]) for row in self._trace_rows])
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + int(self.widths.sum()))
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no second derivative
            return hutchinson_traces(
                self.weights,
                lambda: answer_loss(self.model, self._trace_rows, pad_token=self.pad_token, device=self.device),
                probes=self.settings.trace_probes,
                generator=generator,
            )

    def _importance(self) -> dict[str, float]:
        """By block, how much it changes its input: minus the cosine of input and output, mean over tokens."""
        import torch

        blocks = list(dict.fromkeys(unit.block for unit in self.units))
        total = dict.fromkeys(blocks, 0.0)
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            for row in self._trace_rows:
                tokens = torch.tensor([row.tokens], device=self.device)
                states = self.model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
                for block, before, after in zip(blocks, states, states[1:], strict=False):
                    total[block] -= float(torch.nn.functional.cosine_similarity(before, after, dim=-1).mean())
        self.model.train(was_training)
        return {block: value / len(self._trace_rows) for block, value in total.items()}

    def _set(self, bits: Mapping[str, int]) -> None:
        for number, unit in enumerate(self.units):
            self.widths[number] = bits[unit.name]

    def _named(self, values: torch.Tensor) -> dict[str, Any]:
        return dict(zip((unit.name for unit in self.units), values.tolist(), strict=True))
