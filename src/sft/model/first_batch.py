"""The model is proven on a few samples of its own first: that it computes here what its authors wrote.

The same samples are run in four ways, on the real weights and device, in training mode without noise:

    own     the model's own attention, each sample alone: what its authors wrote
    alone   the attention of this project, each sample alone
    packed  the same attention, the samples in one row
    long    the same attention, the samples at the end of a row as long as those of training, no gradients

Log-probabilities of all tokens and gradients are compared. How far two ways may differ depends on the arithmetic and on
how far `own` differs from itself where it only runs in another shape, a sample twice in a batch. Of a row of packed
samples it is asked besides, and sharply, since the shapes are the same: whether a sample's log-probabilities have a
gradient by another's tokens, and whether they change where the other's tokens are replaced; of a long row, whether they
change where its first sample, as long as the run's longest, is cut into short ones.

Where `alone` differs from `own`, the model's own attention is used; where `packed` or `long` differs, the samples of a
micro-batch run apart. A model that neither helps is refused. No list of names decides.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from math import inf, isfinite

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sft.data.batch import Batch
from sft.errors import UserError
from sft.model import cause
from sft.model.attention import NAME as PACKED
from sft.model.found import FLOORS, LARGEST_NOISE, REACH, TIMES_NOISE, Difference, Proof, arithmetic, shares
from sft.model.inputs import knows_bounds
from sft.model.isolation import Isolation, attending, one_by_one, own_attention
from sft.model.loss import graph_log_probs
from sft.model.measured_pass import EMBEDDINGS, Measured, Pass, flat, log_probs, long_rows, measured, reach, rows_pass
from sft.model.measured_pass import without_noise as without_noise
from sft.model.slower import times_slower
from sft.ranks import together

AUTO, OWN, APART = "auto", "own", "apart"  # with PACKED, the values of model.attention and model.isolate


@dataclass
class Prover:
    """Finds how the samples of a model are to be kept from one another, on a few of them; on all ranks alike.

    Args:
        samples: their token ids, int64 [length], on the device; the same on all ranks.
        attention: auto, packed, own, or another name that transformers knows.
        isolate: auto, packed or apart.
        dtype: of the arithmetic.
        forward: the context of a forward pass, as the precision of training has it.
        per_pass: how many samples, and tokens, a forward pass of training has in the mean; None: nobody asks for the
            cost.
        longest: tokens of training's longest row, of several samples, and of its longest sample; None: there is none.
    """

    model: PreTrainedModel
    samples: Sequence[Tensor]
    attention: str
    isolate: str
    plain_head: bool
    dtype: torch.dtype = torch.float32
    forward: Callable[[], AbstractContextManager[object]] = nullcontext
    per_pass: tuple[float, float] | None = None
    longest: tuple[int, int] | None = None
    found: dict[str, Difference] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)  # by tensor, as a share of its gradient's norm
    reference: float = 0.0  # what another row's tokens change in a row of `own`, in nats

    def prove(self) -> Proof:
        """UserError where the settings ask for what the model can't do, or nothing helps."""
        begun, model = time.perf_counter(), self.model
        in_training = [module for module in model.modules() if module.training]
        self.own = own_attention(model)
        self.floors = FLOORS[arithmetic(self.dtype, self.samples[0].device)]
        with ExitStack() as stack:
            stack.enter_context(without_noise(model))
            if any(module._compiled_call_impl for module in model.modules()):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            try:
                isolation, reason = self._decide()
                slower = self._slower(isolation)
                is_training = model.training
            finally:
                for module in in_training:
                    module.training = True
        seconds = time.perf_counter() - begun
        if reason and slower:
            reason += f", about {slower:.1f} x slower" if slower >= 1.05 else ", at no cost here"
        packed = self.found.get("packed", Difference())
        if reason and (packed.leaks or packed.error) and (advice := cause.advice(model)):
            reason += f"; {advice}"
        return Proof(isolation, self.found, reason, slower, is_training, seconds)

    def _decide(self) -> tuple[Isolation, str | None]:
        name, ours = cause.name(self.model), {AUTO: PACKED, OWN: self.own}.get(self.attention, self.attention)
        with attending(self.model, self.own):
            expected = self._expected()
        whole = sum(expected[1:], start=expected[0])
        if self.isolate == PACKED and not knows_bounds(ours):
            raise UserError(
                f"model.isolate=packed: model.attention={self.attention} knows no boundaries of samples: set "
                "model.isolate=auto, or model.attention=auto"
            )
        if self.attention == OWN:
            return Isolation(self.own, apart=True), None
        batch = flat(self.samples)
        with attending(self.model, ours):
            self.found["alone"] = self._difference(whole, [self._packed(part) for part in one_by_one(batch)])
        if (alone := self.found["alone"]).excess > 1:
            if self.attention != AUTO:
                raise UserError(
                    f"model.attention={self.attention}: {name} computes something else by it: {self._figures()}: set "
                    "model.attention=auto"
                )
            if self.isolate == PACKED:
                raise UserError(
                    f"model.isolate=packed: {name} computes something else by packed attention: {self._figures()}: set "
                    "model.isolate=auto"
                )
            what = f"doesn't compute by packed attention what its own does ({alone})"
            if alone.error:
                what = f"can't be computed by packed attention here ({alone.error})"
            return Isolation(self.own, apart=True), f"{name} {what}: its own is used, and samples run one at a time"
        if self.isolate == APART or not knows_bounds(ours):
            return Isolation(ours, apart=True), None
        with attending(self.model, ours):
            packed = self._difference(whole, [self._packed(batch)])
            packed = packed if packed.error else self._alike(lambda: self._leaks(packed))
        self.found["packed"] = packed
        differs = packed.excess > 1 or packed.leaks
        if not differs and (longer := self._long(ours, whole.log_probs)):
            self.found["long"] = longer
            if longer.excess <= 1 and not longer.leaks:
                return Isolation(ours), None
        elif not differs:
            return Isolation(ours), None
        if self.isolate == PACKED:
            raise UserError(
                f"model.isolate=packed: {name} doesn't keep packed samples apart: {self._figures()}: set "
                "model.isolate=auto"
            )
        if not differs:
            what = f"a sample of {name} depends on the length of its row ({self.found['long']})"
        elif packed.error:
            what = f"{name} can't keep packed samples apart here ({packed.error})"
        elif packed.leaks and cause.recurrent(self.model):
            what = f"{name} carries state across samples ({packed})"
        elif packed.leaks:
            what = f"samples of {name} in a row depend on each other ({packed})"
        else:
            what = f"{name} computes something else of packed samples ({packed})"
        return Isolation(ours, apart=True), f"{what}: they run one at a time"

    def _expected(self) -> list[Measured]:
        """Of each sample, by the model's own attention. Notes its noise; UserError where it is no measure."""
        name, longest = cause.name(self.model), max(self.samples, key=len)

        def each() -> list[Measured]:
            return [measured(self.model, self._rows(sample[None])) for sample in self.samples]

        def drawn() -> bool:
            """Whether random numbers were drawn that matter."""
            if all(map(torch.equal, states, _states())):
                return False
            first, second = log_probs(self._rows(longest[None], seed=1)), log_probs(self._rows(longest[None], seed=2))
            return not torch.equal(first, second)

        torch.manual_seed(0)
        states = _states()
        try:
            expected = each()
            draws = drawn()
        except Exception as error:  # whatever a model has against it
            raise UserError(
                f"{name} fails by its own attention ({self.own}) on a sample of its own: {cause.first_line(error)}"
            ) from error
        if any(together(lambda: draws)):
            self.model.eval()
            expected = each()
        if not all(isfinite(float(one.log_probs.sum())) for one in expected):
            raise UserError(
                f"{name}: log-probabilities of the first samples aren't finite: look at the model's weights, or set "
                "trainer.precision=32-true"
            )
        half = len(longest) // 2
        ahead = reach(self.model, self._rows(longest[None]), 0, half)  # the last of which is predicted from half - 2
        read = max(together(lambda: float(ahead[half - 1 :].max() / ahead.max())))
        if read > REACH:
            raise UserError(
                f"{name} is no causal language model: by its own attention tokens see those that follow (gradients of "
                f"{read:.1e}): choose a model that predicts each token from those before it"
            )
        place = next(place for place, sample in enumerate(self.samples) if sample is longest)
        self.found["noise"] = noise = self._alike(lambda: self._own_noise(longest, expected[place]))
        if noise.log_prob > LARGEST_NOISE * self.floors[0]:
            raise UserError(
                f"{name} computes a sample otherwise beside itself in a batch, by {noise.log_prob:.1e} in "
                "log-probabilities, so nothing can be compared with it: set trainer.precision=32-true, or train "
                "another model"
            )
        return expected

    def _own_noise(self, sample: Tensor, expected: Measured) -> Difference:
        """Of a sample twice in a batch, against it alone."""
        twice = torch.stack([sample, sample])
        try:
            got = measured(self.model, self._rows(twice), scale=0.5)
            before, after = (
                log_probs(self._rows(rows))[len(sample) :]
                for rows in (twice, torch.stack([self._other(sample), sample]))
            )
            halves = got.grads[EMBEDDINGS].unflatten(0, (2, len(sample))).sum(0)
        except Exception as error:  # no model need know batches, or embed tokens alone
            cause.raise_own(error)
            return Difference()
        self.reference = float((after - before).abs().max())
        self.noise = shares(replace(got, grads={**got.grads, EMBEDDINGS: halves}), expected)
        # Of a causal model both rows are what it is alone.
        log_prob = float((got.log_probs.unflatten(0, (2, len(sample))) - expected.log_probs).abs().max())
        return Difference(log_prob, gradient=max(self.noise.values()), leak=self.reference)

    def _difference(self, expected: Measured, passes: Sequence[Pass]) -> Difference:
        """Of what these come to, one after the other."""

        def find() -> Difference:
            try:
                parts = [measured(self.model, run) for run in passes]
                got = sum(parts[1:], start=parts[0])
            except Exception as error:  # whatever a model has against it
                cause.raise_own(error)
                return Difference(error=cause.first_line(error))
            found = shares(got, expected)
            allowed = {name: max(self.floors[1], TIMES_NOISE * self.noise.get(name, 0.0)) for name in found}
            worst = max(found, key=lambda name: found[name] / allowed[name] if found[name] == found[name] else inf)
            return Difference(
                log_prob=float((got.log_probs - expected.log_probs).abs().max()),
                tolerated_log_prob=max(self.floors[0], TIMES_NOISE * self.found["noise"].log_prob),
                gradient=found[worst],
                tolerated_gradient=allowed[worst],
                tensor=worst,
            )

        return self._alike(find)

    def _leaks(self, found: Difference) -> Difference:
        """With what one sample of a row has to do with another, by its gradient and by replaced tokens."""
        samples = list(self.samples)
        first, last = len(samples[0]), sum(map(len, samples[:-1]))
        start, end = len(samples[0]), len(samples[0]) + len(samples[1])
        reach_T = reach(self.model, self._packed(flat(samples)), start, end)
        outside = torch.cat([reach_T[:start], reach_T[end:]]).max()

        def row(*changed: int) -> Tensor:
            rows = [self._other(sample) if place in changed else sample for place, sample in enumerate(samples)]
            return log_probs(self._packed(flat(rows)))

        base = row()
        changes = (row(0) - base)[first:], (row(len(samples) - 1) - base)[:last]
        leak = max(float(change.abs().max()) for change in changes)
        # Experts' matrices have other shapes for other tokens, so that bits of all tokens change.
        tolerated = max(self.floors[2], TIMES_NOISE * self.reference) if self.reference or leak else 0.0
        return replace(found, leak=leak, tolerated_leak=tolerated, reach=float(outside / reach_T.max()))

    def _long(self, ours: str, expected_T: Tensor) -> Difference | None:
        """Of the samples at the end of a row as long as training's; None where those are as short."""
        row, cut = long_rows(self.samples, *self.longest) if self.longest else (None, None)
        if row is None or cut is None:
            return None
        num = len(expected_T)

        def find() -> Difference:
            try:
                with attending(self.model, ours):
                    # Both rows have the same shape, kernels and tokens.
                    got_T, beside_short_T = (log_probs(self._packed(one, since=-num))[-num:] for one in (row, cut))
            except Exception as error:  # whatever a model has against it
                cause.raise_own(error)
                return Difference(error=cause.first_line(error))
            experts = max(self.floors[2], TIMES_NOISE * self.reference) if self.reference else 0.0
            return Difference(
                log_prob=float((got_T - expected_T).abs().max()),
                tolerated_log_prob=max(self.floors[0], TIMES_NOISE * self.found["noise"].log_prob),
                leak=float((got_T - beside_short_T).abs().max()),
                tolerated_leak=max(FLOORS["float32"][0], experts),
            )

        return self._alike(find)

    def _alike(self, find: Callable[[], Difference]) -> Difference:
        """The worst of all ranks'."""
        found = together(find)
        return max(found, key=lambda one: (one.leaks, one.excess, one.log_prob))

    def _rows(self, rows_BL: Tensor, seed: int = 0) -> Pass:
        def run() -> Tensor:
            torch.manual_seed(seed)
            with self.forward():
                return rows_pass(self.model, flat([rows_BL[0]]), rows_BL)

        return run

    def _packed(self, batch: Batch, since: int = 0) -> Pass:
        def run() -> Tensor:
            torch.manual_seed(0)
            with self.forward():
                return graph_log_probs(self.model, batch, plain_head=self.plain_head, since=since)

        return run

    def _other(self, sample: Tensor) -> Tensor:
        """Other tokens in its place."""
        num = int(torch.cat(list(self.samples)).max()) + 1
        return (sample + 1) % num

    def _figures(self) -> str:
        """The differences that were found."""
        return "; ".join(f"{way} {found}" for way, found in self.found.items() if way != "noise")

    def _slower(self, isolation: Isolation) -> float | None:
        """About how many times, than packed; None where samples don't run apart, or nobody asks."""
        if not (isolation.apart and self.per_pass):
            return None
        with attending(self.model, isolation.attention):
            row_T = torch.cat(list(self.samples))
            return times_slower(self.model, lambda row_T: self._packed(flat([row_T])), row_T, *self.per_pass)


def _states() -> list[Tensor]:
    """Of torch's streams of random numbers."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]
