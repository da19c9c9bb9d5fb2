"""What a model's first samples have shown: how far its ways of computing are from what its authors wrote."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf

import torch

from sft.model.isolation import Isolation
from sft.model.measured_pass import EMBEDDINGS, Measured

# What rounding may come to in another order of additions, in nats, in shares of a gradient's norm, and in nats by what
# experts' numbers of tokens change. Those of fp32 are ten times what was measured over families (docs/limits.md) and
# more; those of tf32 and bf16 are judged, not derived: no bound on rounding is near to what happens.
FLOORS = {"float32": (2e-5, 2e-4, 1e-5), "tf32": (2e-2, 5e-2, 1e-2), "bfloat16": (0.3, 0.15, 0.3)}
TIMES_NOISE = 8.0
LARGEST_NOISE = 100.0  # floors
# Of a token's own gradient: more of one by a token that mustn't matter is no rounding. Kernels of recurrent layers sum,
# in fp32, over a boundary what cancels.
REACH = 2e-5
SMALL = 1e-3  # of the largest gradient's norm: a smaller one is measured by this


@dataclass(frozen=True)
class Difference:
    """How far a way of computing is from `own`, beside what is tolerated."""

    log_prob: float = 0.0  # the largest of a token, in nats
    tolerated_log_prob: float = 0.0
    gradient: float = 0.0  # of the tensor that is furthest from what is tolerated of it, as a share of its norm
    tolerated_gradient: float = 0.0
    tensor: str = ""
    leak: float = 0.0  # in nats, by the tokens of another sample
    tolerated_leak: float = 0.0
    reach: float = 0.0  # of other samples' tokens: their largest gradient as a share of its own tokens'
    error: str | None = None  # in which it ended

    @property
    def excess(self) -> float:
        """In tolerances: up to 1 is alike."""
        parts = (self.log_prob, self.tolerated_log_prob), (self.gradient, self.tolerated_gradient)
        shares = [part / tolerated if tolerated else part and inf for part, tolerated in parts]
        return inf if self.error else max(share if share == share else inf for share in shares)

    @property
    def leaks(self) -> bool:
        return self.reach > REACH or self.leak > self.tolerated_leak

    def __str__(self) -> str:
        if self.error:
            return self.error
        between = f", {max(self.leak, self.reach):.1e} between samples" if self.leaks else ""
        return (
            f"{self.log_prob:.1e} in log-probabilities (tolerated {self.tolerated_log_prob:.1e}), "
            f"{self.gradient:.1e} in gradients ({self.tolerated_gradient:.1e}){between}"
        )


@dataclass(frozen=True)
class Proof:
    """What was found."""

    isolation: Isolation
    differences: Mapping[str, Difference]  # by way; `noise` is that of `own` in another shape
    reason: str | None = None  # why the samples aren't packed
    slower: float | None = None  # about how many times, than packed
    training_mode: bool = True  # else the model draws random numbers in it
    seconds: float = 0.0

    @property
    def said(self) -> str:
        """What a user should know, in a line."""
        mode = "" if self.training_mode else "; found in evaluation mode, since in training the model draws at random"
        if self.reason:
            return self.reason + mode
        if "packed" in self.differences:
            return f"packed samples are computed as by the model's own code: {self.differences['packed']}{mode}"
        return f"samples run {self.isolation}, as the settings say{mode}"

    def record(self) -> dict[str, object]:
        """For provenance.json."""
        return {
            **asdict(self.isolation),
            "said": self.said,
            "slower": self.slower,
            "differences": {way: asdict(found) for way, found in self.differences.items()},
            "training_mode": self.training_mode,
            "seconds": round(self.seconds, 2),
        }


def arithmetic(dtype: torch.dtype, device: torch.device) -> str:
    """The key of `FLOORS`."""
    if dtype == torch.float32:
        return "tf32" if device.type == "cuda" and torch.get_float32_matmul_precision() != "highest" else "float32"
    return "bfloat16"


def shares(got: Measured, expected: Measured) -> dict[str, float]:
    """How far each tensor's gradient is from what is expected, as a share of the latter's norm or of a small part of
    the largest norm."""
    names = got.grads.keys() & expected.grads.keys()
    norms = {name: float(expected.grads[name].norm()) for name in names}
    least = SMALL * max([norm for name, norm in norms.items() if name != EMBEDDINGS], default=0.0)
    apart = {name: float((got.grads[name] - expected.grads[name]).norm()) for name in names}
    return {
        name: apart[name] / max(norms[name], 1e-30, 0.0 if name == EMBEDDINGS else least) if apart[name] else 0.0
        for name in sorted(names)
    }
