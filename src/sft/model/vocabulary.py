"""Rows of embeddings and head for tokens that are added to a vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sft.errors import UserError

MULTIPLE = 64  # of the number of rows where it grows, for the sake of matrix kernels


@dataclass(frozen=True)
class Growth:
    """Of a vocabulary: which weights get rows for new tokens, and how many they have."""

    names: list[str]  # of the weights; tied ones by both of their names
    stored: int  # rows in the files
    rows: int  # in the model
    new_ids: list[int]

    @classmethod
    def of(cls, before: PreTrainedModel, after: PreTrainedModel, new_ids: list[int]) -> "Growth":
        """From the model with its own number of rows to that with more. UserError where anything else grows too."""
        modules = (before.get_input_embeddings(), before.get_output_embeddings())
        names = [
            f"{name}.{own}"
            for name, module in before.named_modules()
            if module in modules
            for own, parameter in module._parameters.items()
            if parameter is not None
        ]
        shapes = {name: parameter.shape for name, parameter in before.named_parameters()}
        grown = [name for name, parameter in after.named_parameters() if parameter.shape != shapes[name]]
        if others := sorted(set(grown) - set(names)):
            raise UserError(
                f"model.add_tokens: in {type(before).__name__} more than embeddings and head depends on the number of "
                f"tokens ({', '.join(others[:3])}): leave it out"
            )
        stored, rows = (model.config.get_text_config().vocab_size for model in (before, after))
        return cls(names, stored, rows, new_ids)

    def check_trained(self, adapted: PreTrainedModel, trained_ids: Sequence[int]) -> None:
        """Refuses an adapter that leaves new rows as they are. `trained_ids`: whose rows are trained beside it."""
        if trained_ids and (missing := set(self.new_ids) - set(trained_ids)):
            raise UserError(
                f"adapter.trainable_tokens leaves {len(missing)} of the new tokens of model.add_tokens at the mean of "
                "the others: name all of them in both"
            )
        names = {name for name, _ in adapted.named_parameters()}  # those of a module that is trained whole are longer
        if left := [name for name in self.names if name in names]:
            modules = ",".join(dict.fromkeys(name.split(".")[-2] for name in self.names))
            raise UserError(
                f"model.add_tokens: {left[0]} has rows for new tokens, and the adapter leaves them at the mean of the "
                f"others: name the tokens in adapter.trainable_tokens too, or set adapter.modules_to_save=[{modules}]"
            )

    def grow(self, weight: Tensor) -> Tensor:
        """The weight in fp32 with the rows of new tokens, each the mean of the old rows. It is [stored, ...]."""
        new = [token for token in self.new_ids if token < self.stored]
        old_sum = weight.sum(0, dtype=torch.float64) - weight[new].sum(0, dtype=torch.float64)
        grown = torch.empty(self.rows, *weight.shape[1:], dtype=torch.float32, device=weight.device)
        grown[: self.stored] = weight
        grown[[*new, *range(self.stored, self.rows)]] = (old_sum / (self.stored - len(new))).float()
        return grown

    def apply(self, model: PreTrainedModel) -> None:
        """Gives a whole model its new rows."""
        parameters = dict(model.named_parameters())
        values = {name: self.grow(parameters[name].detach()) for name in self.names if name in parameters}
        if self.rows != self.stored:
            model.resize_token_embeddings(self.rows, mean_resizing=False)
        with torch.no_grad():
            for name, value in values.items():
                model.get_parameter(name).copy_(value)
