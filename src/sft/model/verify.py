"""`python -m sft.model.verify FOLDER < request.json`: is the exported model the trained one?

Runs in a process of its own and uses nothing of the training path: the folder through transformers' own classes and
attention, each probe by itself, plain logits, plain log-softmax. transformers maps the files of weights into memory,
so that a model larger than it is read from the disk again where it has to be.
"""

import json
import sys
from pathlib import Path
from typing import Any

from sft.model.adapter import quantization

# Largest difference of a token's log-probability. In bf16 two orders of the same sums differ by a logit's rounding.
TOLERANCE = {"32-true": 1e-4, "bf16-mixed": 0.25, "bf16-true": 0.25}


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
    return PeftModel.from_pretrained(base, str(folder))


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(sys.argv[1])
    request = json.load(sys.stdin)
    precision = request["precision"]
    tolerance = request["tolerance"] or TOLERANCE.get(precision, 0.25)
    AutoTokenizer.from_pretrained(folder)
    if (folder / "adapter_config.json").exists():
        model = load_adapted(folder, precision, request["quantized"])
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    device = model.device
    model.eval()
    differences = []
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        for probe in request["probes"]:
            ids = torch.tensor([probe["input_ids"]])
            log_probs = model(ids.to(device)).logits.float().cpu().log_softmax(-1)[0, :-1]
            here = log_probs.gather(1, ids[0, 1:, None])[:, 0]
            differences.append((here - torch.tensor(probe["log_probs"][1:])).abs())
    difference = torch.cat(differences)
    largest = float(difference.max())  # NaN if any is, and NaN is within no tolerance
    verdict = {
        "equal": largest <= tolerance,
        "largest_difference": largest,
        "mean_difference": float(difference.mean()),
        "tolerance": tolerance,
        "num_probes": len(differences),
        "num_tokens": len(difference),
        "precision": precision,
        "quantized": request["quantized"],
    }
    (folder / "verified.json").write_text(json.dumps(verdict, indent=2) + "\n")


if __name__ == "__main__":
    main()
