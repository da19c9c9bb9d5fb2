"""`python -m sft.export.verify FOLDER < request.json`: is the exported model the trained one?

Runs in a process of its own and uses nothing of the training path: the folder through transformers' own classes and
attention, each probe by itself, plain logits, plain log-softmax, in fp32. transformers maps files of fp32 weights into
memory, so that parts of a model larger than memory are read from the disk again when needed.

In fp32 the log-probabilities must equal those of training to 1e-4. In bf16 they can't: the same sums in another order
differ by more, and more in deeper models. So the exported model runs a second time with its arithmetic rounded to bf16.
The difference that this makes is the measure: training with the same weights differs by about as much.
"""

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from sft.model import model_class
from sft.model.adapter import quantization

if TYPE_CHECKING:  # its import touches CUDA
    from peft import PeftModel

LARGEST = 1e-4  # difference of a token's log-probability in fp32
# Root mean squares of the differences, over the difference that bf16 alone makes. Seen between 0.7 and 1.2 over all
# strategies and depths tried; few tokens make a less certain measure.
RATIO = 3.0
RATIO_OF_ONE_TOKEN = 10.0


class Probe(TypedDict):
    """A sample and the log-probability of each token, as training measured it."""

    input_ids: list[int]
    log_probs: list[float]


class Verdict(TypedDict):
    """verified.json"""

    step: NotRequired[int | None]  # of the training
    largest_difference: float  # of log-probabilities
    rms_difference: float
    rms_of_bf16: NotRequired[float]  # that bf16 alone makes
    num_probes: int
    num_tokens: int
    precision: str  # of training, as Lightning names it
    quantized: bool
    compared: Literal["largest_difference", "rms_difference"]
    tolerance: float
    equal: bool


def load_adapted(folder: Path, precision: str, quantized: bool, trust_remote_code: bool) -> "PeftModel":
    """The base model that the folder's adapter names, held as in training, with the adapter added by peft."""
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(str(folder))
    where: dict[str, object] = {"trust_remote_code": trust_remote_code}
    if config.revision:
        where["revision"] = config.revision
    options: dict[str, object] = {"dtype": "bfloat16" if precision == "bf16-true" else "float32"}
    if quantized:
        options |= quantization()
    name = str(config.base_model_name_or_path)
    base = model_class.of_folder(name, **where).from_pretrained(name, **where, **options)
    model = PeftModel.from_pretrained(base, str(folder))
    return model if quantized else model.float()


def log_probs(model: "PreTrainedModel | PeftModel", probes: list[Probe], rounded: bool = False) -> Tensor:
    """log p of each token of each probe after its first, in fp32; `rounded`: with the arithmetic of bf16."""
    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # of layers in 4 bits, which autocast doesn't reach
            module.compute_dtype = torch.bfloat16 if rounded else torch.float32  # type: ignore[assignment]
    measured = []
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if rounded:
            # No cache: it would hold a second copy of all weights.
            stack.enter_context(torch.autocast(model.device.type, torch.bfloat16, cache_enabled=False))
            # The layers' outputs are summed in bf16 as well if the weights are bf16.
            embeddings = model.get_input_embeddings()
            hook = embeddings.register_forward_hook(lambda module, inputs, output: output.to(torch.bfloat16))
            stack.callback(hook.remove)
        for probe in probes:
            ids = torch.tensor([probe["input_ids"]])
            logits = model(ids.to(model.device)).logits[0, :-1].float().cpu()
            measured.append(logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0])
    return torch.cat(measured)


def main() -> None:
    folder = Path(sys.argv[1])
    request = json.load(sys.stdin)
    precision, quantized, probes = request["precision"], request["quantized"], request["probes"]
    trust = {"trust_remote_code": request["trust_remote_code"]}  # as the run's settings say
    AutoTokenizer.from_pretrained(folder, **trust)
    model: PreTrainedModel | PeftModel
    if (folder / "adapter_config.json").exists():
        model = load_adapted(folder, precision, quantized, **trust)
    else:
        model = model_class.of_folder(str(folder), **trust).from_pretrained(folder, dtype=torch.float32, **trust)
    model.eval()
    exact = log_probs(model, probes)
    difference = exact - torch.tensor([value for probe in probes for value in probe["log_probs"][1:]])
    verdict: Verdict = {
        "step": request.get("step"),
        "largest_difference": float(difference.abs().max()),
        "rms_difference": rms(difference),
        "num_probes": len(probes),
        "num_tokens": len(difference),
        "precision": precision,
        "quantized": quantized,
        "compared": "largest_difference",
        "tolerance": LARGEST,
        "equal": False,
    }
    if precision != "32-true":
        verdict["rms_of_bf16"] = rms(log_probs(model, probes, rounded=True) - exact)
        ratio = RATIO + RATIO_OF_ONE_TOKEN / len(difference)
        verdict["compared"], verdict["tolerance"] = "rms_difference", ratio * verdict["rms_of_bf16"]
    # NaN is within no tolerance, and no number is within NaN.
    verdict["equal"] = verdict[verdict["compared"]] <= verdict["tolerance"]
    (folder / "verified.json").write_text(json.dumps(verdict, indent=2) + "\n")


def rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


if __name__ == "__main__":
    main()
