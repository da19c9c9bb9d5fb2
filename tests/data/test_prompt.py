"""What generation gives the model is, token by token, what training put before the response."""

from functools import partial
from typing import Any

import pytest

from sft.data.conversation import messages, prompt_response, text
from sft.data.mask import IGNORE, Tokenization
from sft.data.prompt import served_ids


@pytest.mark.parametrize(
    ("row_function", "row"),
    [
        (partial(prompt_response, chat=True), {"prompt": "Hi.", "response": "Ho"}),
        (partial(prompt_response, chat=True, system="Be kind."), {"prompt": "Hi.", "response": "Ho"}),
        (
            partial(prompt_response, chat=False, prompt="question", response="answer"),
            {"question": "Hi.", "answer": "Ho"},
        ),
        (
            partial(messages),
            {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho"}]},
        ),
        (partial(text), {"text": "Hi.Ho"}),
    ],
    ids=["chat", "system", "plain", "messages", "text"],
)
def test_served_as_trained(tokenizer: Any, row_function: Any, row: dict[str, Any]) -> None:
    (sample,) = Tokenization(tokenizer, max_length=100)(row_function(row)).samples
    asked = served_ids(tokenizer, row_function, "Hi.")
    assert sample.input_ids[: len(asked)] == asked
    if row_function.func is not text:
        assert sample.labels[len(asked) - 1] == IGNORE
        assert sample.labels[len(asked)] != IGNORE
        assert tokenizer.decode(sample.labels[len(asked) :]).startswith("Ho")
