"""`python -m sft.export.verify FOLDER < request.json`: is the exported model the trained one?

Runs in a process of its own and uses nothing of the training path: the folder through transformers' own classes and
attention, each probe by itself, plain logits, plain log-softmax, in fp32. transformers maps files of fp32 weights into
memory, so that a model larger than it is read from the disk again where it has to be.

In fp32 the log-probabilities must be those of training to 1e-4. In bf16 they can't be: another order of the same sums
differs by more, the deeper the model the more. So the exported model is run a second time with its arithmetic rounded
to bf16, and that difference is the measure: of the same weights, training's is about as large.
"""

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sft.model.adapter import quantization

LARGEST = 1e-4  # difference of a token's log-probability in fp32
# Root mean squares of the differences, over that which bf16 makes by itself. Seen between 0.7 and 1.2 over all
# strategies and depths tried; few tokens say less.
RATIO = 3.0
RATIO_OF_ONE_TOKEN = 10.0


def load_adapted(folder: Path, precision: str, quantized: bool) -> Any:
    """The base model that the folder's adapter names, held as in training, with the adapter put in by peft."""
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    config = PeftConfig.from_pretrained(str(folder))
    options: dict[str, Any] = {"revision": config.revision} if config.revision else {}
    if quantized:
        options |= quantization()
    dtype = "bfloat16" if precision == "bf16-true" else "float32"
    name: Any = config.base_model_name_or_path
    base = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
    model = PeftModel.from_pretrained(base, str(folder))
    return model if quantized else model.float()


def log_probs(model: Any, probes: list[dict[str, Any]], rounded: bool = False) -> Any:
    """log p of each token of each probe after its first, in fp32; `rounded`: the arithmetic is that of bf16."""
    import torch

    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # of layers in 4 bits, which autocast doesn't reach
            module.compute_dtype = torch.bfloat16 if rounded else torch.float32
    found = []
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if rounded:
            # No cache: it would hold a second copy of all weights.
            stack.enter_context(torch.autocast(model.device.type, torch.bfloat16, cache_enabled=False))
            # What the layers add up is in bf16 as well where the weights are.
            embeddings = model.get_input_embeddings()
            hook = embeddings.register_forward_hook(lambda module, inputs, output: output.to(torch.bfloat16))
            stack.callback(hook.remove)
        for probe in probes:
            ids = torch.tensor([probe["input_ids"]])
            logits = model(ids.to(model.device)).logits[0, :-1].float().cpu()
            found.append(logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0])
    return torch.cat(found)


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(sys.argv[1])
    request = json.load(sys.stdin)
    precision, probes = request["precision"], request["probes"]
    AutoTokenizer.from_pretrained(folder)
    if (folder / "adapter_config.json").exists():
        model = load_adapted(folder, precision, request["quantized"])
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    exact = log_probs(model, probes)
    difference = exact - torch.tensor([value for probe in probes for value in probe["log_probs"][1:]])
    verdict: dict[str, Any] = {
        "largest_difference": float(difference.abs().max()),
        "rms_difference": rms(difference),
        "num_probes": len(probes),
        "num_tokens": len(difference),
        "precision": precision,
        "quantized": request["quantized"],
    }
    if precision == "32-true":
        verdict |= {"compared": "largest_difference", "tolerance": LARGEST}
    else:
        verdict["rms_of_bf16"] = rms(log_probs(model, probes, rounded=True) - exact)
        ratio = RATIO + RATIO_OF_ONE_TOKEN / len(difference)
        verdict |= {"compared": "rms_difference", "tolerance": ratio * verdict["rms_of_bf16"]}
    # NaN, in either, is within no tolerance.
    verdict["equal"] = verdict[verdict["compared"]] <= verdict["tolerance"]
    (folder / "verified.json").write_text(json.dumps(verdict, indent=2) + "\n")


def rms(values: Any) -> float:
    return float(values.square().mean().sqrt())


if __name__ == "__main__":
    main()
