"""The load-balancing loss of a mixture of experts, and how evenly its experts are used.

It is that of each sample by itself, as transformers' `load_balancing_loss_func` (Switch Transformer, arXiv 2101.03961,
equations 4 to 6) has it of that one sample, over all layers: E · sum over experts of (share of its tokens that choose
an expert) · (mean probability of that expert). A step's is the mean over its tokens of their samples' ones. So it
depends on no micro-batch, rank or pack.

Shape suffixes: T tokens of the row, S samples, E experts, L layers.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sft.data.batch import Batch
from sft.errors import UserError

NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class Router:
    """The router logits of the last forward pass in training, which the model returns at the end of it."""

    def __init__(self, model: PreTrainedModel, top_k: int) -> None:
        self.top_k = top_k
        self.logits: tuple[Tensor, ...] | None = None  # of each layer, [T, E]
        for config in (model.config, model.config.get_text_config()):
            config.output_router_logits = True
        model.register_forward_hook(self._note)

    def _note(self, model: nn.Module, inputs: object, output: object) -> None:
        self.logits = getattr(output, "router_logits", None) if model.training else None

    def measure(self, batch: Batch) -> dict[str, Tensor]:
        """Of the last forward pass: `router_aux`, the sum over samples of (number of tokens · load-balancing loss),
        float32 scalar, and `expert_load`, how many tokens chose each expert, float32 [L, E]."""
        if not self.logits:
            raise UserError("loss.router_aux: this model returns no router logits: set loss.router_aux=0")
        length_S = batch["cu_seqlens"].diff()
        num_samples, num_tokens = len(length_S), batch["input_ids"].shape[1]
        place_S = torch.arange(num_samples, device=length_S.device)
        sample_T = torch.repeat_interleave(place_S, length_S, output_size=num_tokens)
        counts_LE = []
        chosen_SE = probability_SE = self.logits[0].new_zeros(num_samples, self.logits[0].shape[1], dtype=torch.float32)
        for logits_TE in self.logits:
            weights_TE = logits_TE.softmax(-1)
            best_TK = weights_TE.detach().topk(self.top_k, dim=-1).indices
            of_token_TE = torch.zeros_like(weights_TE, dtype=torch.float32).scatter_(1, best_TK, 1.0)
            chosen_SE = chosen_SE.index_add(0, sample_T, of_token_TE)
            probability_SE = probability_SE.index_add(0, sample_T, weights_TE.float())
            counts_LE.append(of_token_TE.sum(0))
        rows_S1 = length_S[:, None] * len(self.logits)
        balance_S = (chosen_SE / rows_S1 * (probability_SE / rows_S1)).sum(1) * self.logits[0].shape[1]
        real = float(batch["num_tokens"] > 0)  # an empty micro-batch holds one token that is nobody's
        self.logits = None
        return {"router_aux": (balance_S * length_S).sum() * real, "expert_load": torch.stack(counts_LE) * real}


def attach(model: PreTrainedModel, coefficient: float, log: Callable[[str], None]) -> Router | None:
    """What `loss.router_aux` needs; None where it is 0, of which `log` gets a line if the model has experts. UserError
    for a model that has none, or for which transformers has no such loss."""
    config, name = model.config.get_text_config(), type(model).__name__
    num_experts = next((n for field in NUM_EXPERTS if (n := getattr(config, field, None))), 1)
    if coefficient and num_experts < 2:
        raise UserError(f"loss.router_aux={coefficient}: {name} is no mixture of experts: set loss.router_aux=0")
    if coefficient and not has_loss(model):
        raise UserError(
            f"loss.router_aux={coefficient}: {name} has no such loss in transformers: set loss.router_aux=0"
        )
    if coefficient:
        return Router(model, config.num_experts_per_tok)
    if num_experts > 1 and has_loss(model):
        usual = getattr(config, "router_aux_loss_coef", None) or 0.001
        log(f"{num_experts} experts without a load-balancing loss: loss.router_aux={usual} adds the one of its authors")
    return None


def has_loss(model: PreTrainedModel) -> bool:
    """Whether transformers has the loss beside the model. Routers of another kind, as DeepSeek-V3's, are balanced
    otherwise."""
    config = model.config.get_text_config()
    beside = any(hasattr(sys.modules[kind.__module__], "load_balancing_loss_func") for kind in type(model).__mro__)
    return beside and hasattr(config, "output_router_logits") and hasattr(config, "num_experts_per_tok")
