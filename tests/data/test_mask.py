"""The mask: literal token ids in, literal labels out. Ids are listed in conftest.py."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from sft.data.chat_template import ChatTemplate, encode
from sft.data.conversation import Conversation, Empty, messages
from sft.data.labels import IGNORE, Sample
from sft.data.mask import Tokenization
from sft.errors import UserError

from .conftest import CHAT, byte_tokenizer, metaspace_tokenizer, word_tokenizer

REAL = Path(__file__).parents[3] / "shared/data/tool_calls/glaive_toolcall_en_demo.json"

_ = IGNORE  # in literal labels


def chat(*turns: str, tools: Any = None) -> Conversation:
    """ "user hi", "assistant yes" → a conversation"""
    split = [turn.partition(" ") for turn in turns]
    return Conversation(messages=[{"role": role, "content": text} for role, __, text in split], tools=tools)


def plain(prompt: str, response: str) -> Conversation:
    return Conversation(prompt=prompt, response=response)


def tokenized(conversation: Conversation, tokenizer: Any, **settings: Any) -> list[Sample]:
    made = Tokenization(tokenizer, **{"max_length": 100, **settings})(conversation)
    assert not made.reasons
    return made.samples


def lost(conversation: Conversation | Empty, tokenizer: Any, **settings: Any) -> set[str]:
    made = Tokenization(tokenizer, **{"max_length": 100, **settings})(conversation)
    assert not made.samples
    return set(made.reasons)


def test_plain_response_and_its_eos_carry_loss() -> None:
    [sample] = tokenized(plain("hi ", "yes"), word_tokenizer())
    assert sample == Sample([11, 10, 12, 2], [_, _, 12, 2])


def test_plain_prompt_has_what_the_tokenizer_puts_before_a_text_and_not_what_it_puts_after() -> None:
    [sample] = tokenized(plain("hi ", "yes"), word_tokenizer(before="<s>", after="</s>"))
    assert sample == Sample([1, 11, 10, 12, 2], [_, _, _, 12, 2])


def test_bos_that_is_eos_too_stays_before_an_empty_prompt() -> None:
    [sample] = tokenized(plain("", "yes"), word_tokenizer(before="</s>", bos_token="</s>"))
    assert sample == Sample([2, 12, 2], [_, 12, 2])


def test_eos_that_the_data_brings_is_not_doubled() -> None:
    [sample] = tokenized(plain("hi", "yes</s>"), word_tokenizer())
    assert sample == Sample([11, 12, 2], [_, 12, 2])


def test_the_first_token_carries_no_loss_where_nothing_precedes_it() -> None:
    [sample] = tokenized(plain("", "yes so"), word_tokenizer())
    assert sample == Sample([12, 10, 14, 2], [_, 10, 14, 2])


def test_chat_response_carries_loss_up_to_the_stop_token_and_not_the_newline_after_it() -> None:
    [sample] = tokenized(chat("system be", "user hi", "assistant yes"), word_tokenizer())
    assert sample == Sample(
        [3, 15, 6, 9, 4, 11, 6, 9, 5, 12, 6],
        [_, _, _, _, _, _, _, _, _, 12, 6],
    )


def test_every_assistant_turn_carries_loss() -> None:
    [sample] = tokenized(chat("user hi", "assistant yes", "user why", "assistant so"), word_tokenizer())
    assert sample == Sample(
        [4, 11, 6, 9, 5, 12, 6, 9, 4, 13, 6, 9, 5, 14, 6],
        [_, _, _, _, _, 12, 6, _, _, _, _, _, _, 14, 6],
    )


def test_a_trailing_user_turn_is_not_in_the_sample() -> None:
    [sample] = tokenized(chat("user hi", "assistant yes", "user why"), word_tokenizer())
    assert sample.input_ids == [4, 11, 6, 9, 5, 12, 6]


def test_an_assistant_turn_with_nothing_before_it_is_context() -> None:
    [sample] = tokenized(chat("assistant hi", "user why", "assistant so"), word_tokenizer())
    assert sample == Sample(
        [5, 11, 6, 9, 4, 13, 6, 9, 5, 14, 6],
        [_, _, _, _, _, _, _, _, _, 14, 6],
    )
    assert lost(chat("assistant hi"), word_tokenizer()) == {"empty_prompt"}


def test_a_stop_token_in_the_text_does_not_end_the_turn() -> None:
    [sample] = tokenized(chat("user hi", "assistant yes<|end|>so"), word_tokenizer(), special_text="as_tokens")
    assert sample == Sample([4, 11, 6, 9, 5, 12, 6, 14, 6], [_, _, _, _, _, 12, 6, 14, 6])


def test_pad_equal_to_the_stop_token_does_no_harm() -> None:
    tokenizer = word_tokenizer(pad_token="<|end|>", eos_token="<|end|>")
    [sample] = tokenized(chat("user hi", "assistant yes"), tokenizer)
    assert sample.labels == [_, _, _, _, _, 12, 6]
    [sample] = tokenized(plain("hi", "yes"), tokenizer)
    assert sample.labels == [_, 12, 6]


def test_bos_is_there_once_though_template_and_tokenizer_both_write_it() -> None:
    tokenizer = word_tokenizer("{{ bos_token }}" + CHAT, before="<s>")
    [sample] = tokenized(chat("user hi", "assistant yes", "user hi", "assistant yes"), tokenizer)
    assert sample.input_ids[:3] == [1, 4, 11]
    assert sample.input_ids.count(1) == 1


def test_eos_after_the_last_turn_is_not_learned() -> None:
    """As with Phi-3: a server stops at <|end|>, and the next turn follows it."""
    phi = CHAT.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
    [sample] = tokenized(chat("user hi", "assistant yes", "user why", "assistant so"), word_tokenizer(phi))
    assert sample == Sample(
        [4, 11, 6, 9, 5, 12, 6, 9, 4, 13, 6, 9, 5, 14, 6],
        [_, _, _, _, _, 12, 6, _, _, _, _, _, _, 14, 6],
    )


REWRITING = (  # as Qwen3's: the thinking of earlier turns is dropped
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}hmm\n{% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_template_that_rewrites_history_gives_a_sample_for_each_turn() -> None:
    made = tokenized(chat("user hi", "assistant yes", "user why", "assistant so"), word_tokenizer(REWRITING))
    assert made == [
        Sample([4, 11, 6, 9, 5, 17, 9, 12, 6], [_, _, _, _, _, 17, 9, 12, 6]),
        Sample(
            [4, 11, 6, 9, 5, 12, 6, 9, 4, 13, 6, 9, 5, 17, 9, 14, 6],
            [_, _, _, _, _, _, _, _, _, _, _, _, _, 17, 9, 14, 6],
        ),
    ]


def test_generation_marks_are_followed_and_the_stop_token_added() -> None:
    marked = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}hmm\n"
        "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    [sample] = tokenized(chat("user hi", "assistant yes", "user why", "assistant so"), word_tokenizer(marked))
    assert sample == Sample(
        [4, 11, 6, 9, 5, 17, 9, 12, 6, 9, 4, 13, 6, 9, 5, 17, 9, 14, 6],
        [_, _, _, _, _, _, _, 12, 6, _, _, _, _, _, _, _, _, 14, 6],
    )


def test_generation_marks_around_the_whole_turn_teach_no_more_than_the_turn() -> None:
    marked = (
        "{% for m in messages %}{%- if m.role == 'assistant' -%}"
        "{%- generation -%}{{ '<|assistant|>' + m.content + '<|end|>\n' }}{%- endgeneration -%}"
        "{%- else -%}{{ '<|' + m.role + '|>' + m.content + '<|end|>\n' }}{%- endif -%}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    [sample] = tokenized(chat("user hi", "assistant yes", "user why", "assistant so"), word_tokenizer(marked))
    assert sample.labels == [_, _, _, _, _, 12, 6, _, _, _, _, _, _, 14, 6]


def test_a_turn_without_generation_marks_is_context() -> None:
    """A template may mark the last turn alone."""
    last = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.content == 'so' %}"
        "{% generation %}{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    [sample] = tokenized(chat("user hi", "assistant yes", "user why", "assistant so"), word_tokenizer(last))
    assert sample.labels == [_, _, _, _, _, _, _, _, _, _, _, _, _, 14, 6]
    assert lost(chat("user hi", "assistant yes"), word_tokenizer(last)) == {"no_supervised_token"}


def test_generation_marks_that_begin_with_a_space() -> None:
    """transformers' own assistant mask is empty here: the space's offsets are trimmed away."""
    marked = (
        "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = byte_tokenizer([], marked)
    [sample] = tokenized(chat("user hi", "assistant  ok"), tokenizer)
    assert tokenizer.decode([t for t in sample.labels if t != IGNORE]) == " ok<|end|>"


TOOLS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ c.function.name }}{% for k, v in c.function.arguments.items() %} {{ k }} {{ v }}{% endfor %}{% endfor %}"
    "<|call|>"
    "{% else %}{{ m.content }}<|end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_a_tool_call_ends_with_the_token_the_template_ends_it_with() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"be": "so"}}}
    conversation = Conversation(
        messages=[
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "good"},
            {"role": "assistant", "content": "yes"},
        ]
    )
    [sample] = tokenized(conversation, word_tokenizer(TOOLS))
    assert sample == Sample(
        [4, 11, 6, 9, 5, 18, 10, 15, 10, 14, 7, 9, 8, 16, 6, 9, 5, 12, 6],
        [_, _, _, _, _, 18, 10, 15, 10, 14, 7, _, _, _, _, _, _, 12, 6],
    )


def test_the_tools_reach_the_template() -> None:
    template = "{% if tools %}{{ tools[0].function.name }}\n{% endif %}" + CHAT
    tool = {"type": "function", "function": {"name": "add", "description": "", "parameters": {}}}
    [sample] = tokenized(chat("user hi", "assistant yes", tools=[tool]), word_tokenizer(template))
    assert sample.input_ids[:3] == [18, 9, 4]


def test_a_token_across_the_boundary_is_split_as_it_is_served() -> None:
    """The text "A: 4" has a token " 4", but a server that is given "A: " tokenizes a lone space. Its offsets
    are trimmed to those of "4", so that they alone would not tell."""
    tokenizer = byte_tokenizer([("Ġ", "4")])
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("A", ":", "Ġ", "4", "Ġ4", "<|end|>")}
    assert encode(tokenizer, "A: 4").tokens == ["A", ":", "Ġ4"]
    [sample] = tokenized(plain("A: ", "4"), tokenizer)
    assert sample.input_ids == [ids[token] for token in ("A", ":", "Ġ", "4", "<|end|>")]
    assert sample.labels == [_, _, _, ids["4"], ids["<|end|>"]]
    [sample] = tokenized(plain("A:", " 4"), tokenizer)
    assert sample.input_ids == [ids[token] for token in ("A", ":", "Ġ4", "<|end|>")]
    assert sample.labels == [_, _, ids["Ġ4"], ids["<|end|>"]]


def test_after_a_split_boundary_the_next_turn_is_a_sample_of_its_own() -> None:
    """The server tokenizes the first answer anew, with its space: it is no longer what the model was
    taught."""
    template = (
        "{% for m in messages %}{{ 'A: ' if m.role == 'assistant' }}{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}A: {% endif %}"
    )
    tokenizer = byte_tokenizer([("Ġ", "4")], template)
    made = tokenized(chat("user Q", "assistant 4", "user R", "assistant 4"), tokenizer)
    tokens = [tokenizer.convert_ids_to_tokens(sample.input_ids) for sample in made]
    assert tokens == [
        ["Q", "<|end|>", "A", ":", "Ġ", "4", "<|end|>"],
        ["Q", "<|end|>", "A", ":", "Ġ4", "<|end|>", "R", "<|end|>", "A", ":", "Ġ", "4", "<|end|>"],
    ]
    learned = [[t for t in sample.labels if t != IGNORE] for sample in made]
    assert [tokenizer.decode(ids) for ids in learned] == ["4<|end|>", "4<|end|>"]


def test_a_continuation_does_not_get_the_space_that_a_text_begins_with() -> None:
    """As with Llama 2: tokenized by itself, "yes" would begin with a space of its own."""
    template = (
        "{{ bos_token }}{% for m in messages %}{{ '[/INST] ' + m.content + eos_token "
        "if m.role == 'assistant' else '[INST] ' + m.content + ' ' }}{% endfor %}"
        "{{ '[/INST] ' if add_generation_prompt }}"
    )
    pieces = ["▁", "▁[INST]", "[INST]", "▁hi", "▁[/INST]", "▁yes", "yes"]
    tokenizer = metaspace_tokenizer(pieces, template)
    [sample] = tokenized(chat("user hi", "assistant yes"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(sample.input_ids) == [
        *("<s>", "[INST]", "▁hi", "▁[/INST]", "▁"),
        *("yes", "</s>"),
    ]
    assert sample.labels == [_, _, _, _, _, 9, 2]


def test_a_response_is_tokenized_with_what_precedes_it() -> None:
    """Here even behind a special token it would begin with a space."""
    tokenizer = metaspace_tokenizer(["▁Q:", "▁", "yes", "▁yes"], prepend_scheme="always")
    [sample] = tokenized(plain("Q:", "yes"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(sample.input_ids) == ["▁Q:", "yes", "</s>"]


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
@pytest.mark.parametrize(
    ("prompt", "response"), [("A: ", "Oak."), ("A:", "Oak."), ("A:", " Oak."), ("A: ", " Oak."), ("A:\n", "Oak.")]
)
def test_prompt_and_response_are_the_text_of_the_file(scheme: str, prompt: str, response: str) -> None:
    pieces = ["▁", "▁A", "A", ":", "\n", "▁Oak", "Oak", "."]
    tokenizer = metaspace_tokenizer(pieces, prepend_scheme=scheme)
    [sample] = tokenized(plain(prompt, response), tokenizer)
    assert tokenizer.decode(sample.input_ids) == prompt + response + "</s>"
    served = encode(tokenizer, prompt).ids
    assert sample.input_ids[: len(served)] == served
    assert sample.labels == [_] * len(served) + sample.input_ids[len(served) :]


def test_a_legacy_sentencepiece_tokenizer() -> None:
    """As Llama 2's own file: a normaliser puts the space before every text, and the decoder takes it away."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "A", ":", "O", "a", "k", "."]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in pieces[:3]])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    [sample] = tokenized(plain("A: ", "Oak."), tokenizer)
    assert sample == Sample([3, 4, 5, 3, 6, 7, 8, 9, 2], [_, _, _, _, 6, 7, 8, 9, 2])
    assert tokenizer.decode(sample.input_ids) == "A: Oak.</s>"


def test_bos_that_the_text_brings_is_there_once_and_no_target() -> None:
    tokenizer = word_tokenizer(before="<s>")
    [sample] = tokenized(plain("", "<s>hi yes"), tokenizer, supervise="all")
    assert sample == Sample([1, 11, 10, 12, 2], [_, 11, 10, 12, 2])
    [sample] = tokenized(plain("<s>hi ", "yes"), tokenizer)
    assert sample == Sample([1, 11, 10, 12, 2], [_, _, _, 12, 2])
    [sample] = tokenized(plain("", "hi<s>yes"), tokenizer, supervise="all")
    assert sample == Sample([1, 11, 1, 12, 2], [_, 11, _, 12, 2])


def test_supervise_all_puts_loss_on_every_token_but_the_first() -> None:
    [sample] = tokenized(chat("user hi", "assistant yes"), word_tokenizer(), supervise="all")
    assert sample == Sample([4, 11, 6, 9, 5, 12, 6], [_, 11, 6, 9, 5, 12, 6])


class TestOverlong:
    conversation = chat("user hi why", "assistant yes so")  # 4 11 10 13 6 9 5 | 12 10 14 6

    def test_a_sample_of_just_max_length_stays(self) -> None:
        [sample] = tokenized(self.conversation, word_tokenizer(), max_length=11)
        assert len(sample.input_ids) == 11

    def test_drop(self) -> None:
        assert lost(self.conversation, word_tokenizer(), max_length=10) == {"overlong"}

    def test_the_length_is_told(self) -> None:
        made = Tokenization(word_tokenizer(), max_length=10, overlong="error")(self.conversation)
        assert made.reasons == {"overlong": "a sample of 11 tokens, and data.max_length=10"}

    def test_truncate_prompt_takes_the_oldest_tokens(self) -> None:
        made = Tokenization(word_tokenizer(), max_length=8, overlong="truncate_prompt")(self.conversation)
        assert made.samples == [Sample([13, 6, 9, 5, 12, 10, 14, 6], [_, _, _, _, 12, 10, 14, 6])]
        assert set(made.reasons) == {"truncated_prompt"}

    def test_truncate_prompt_keeps_bos(self) -> None:
        tokenizer = word_tokenizer("{{ bos_token }}" + CHAT)
        made = Tokenization(tokenizer, max_length=8, overlong="truncate_prompt")(self.conversation)
        assert made.samples == [Sample([1, 6, 9, 5, 12, 10, 14, 6], [_, _, _, _, 12, 10, 14, 6])]

    def test_truncate_prompt_never_takes_from_a_response(self) -> None:
        made = Tokenization(word_tokenizer(), max_length=5, overlong="truncate_prompt")(self.conversation)
        assert made.samples == [Sample([5, 12, 10, 14, 6], [_, 12, 10, 14, 6])]
        assert lost(self.conversation, word_tokenizer(), max_length=4, overlong="truncate_prompt") == {"overlong"}

    def test_a_row_may_lose_one_sample_and_keep_another(self) -> None:
        conversation = chat("user hi", "assistant yes", "user why", "assistant so")
        made = Tokenization(word_tokenizer(REWRITING), max_length=10)(conversation)
        assert [len(sample.input_ids) for sample in made.samples] == [9]
        assert set(made.reasons) == {"overlong"}


def test_an_empty_conversation_is_lost_for_its_reason() -> None:
    assert lost(Empty("empty_response"), word_tokenizer()) == {"empty_response"}


def test_stop_token() -> None:
    assert ChatTemplate(word_tokenizer()).stop == "<|end|>"
    assert ChatTemplate(word_tokenizer(CHAT.replace("<|end|>", "{{ eos_token }}"))).stop == "</s>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            None,
            "the tokenizer has no chat template: set model.chat_template=FILE, or data.conversation",
        ),
        (
            "{% for m in messages %}{{ m.content }}\n{% endfor %}",
            "does not end an assistant turn with a special",
        ),
        (
            "{{ raise_exception('roles\nmust alternate') }}",
            "chat template refuses these messages: roles must alt",
        ),
        ("{{ messages + 1 }}", "chat template refuses these messages: can only concatenate"),
        (
            CHAT.replace("<|assistant|>", "<|assistant|>hmm"),
            r"turn \(message 1\) does not begin with the generation",
        ),
    ],
)
def test_a_template_that_cannot_be_used(template: str | None, message: str) -> None:
    try:
        made = Tokenization(word_tokenizer(template), max_length=100)(chat("user hi", "assistant yes"))
        [why] = made.reasons.values()
    except UserError as error:  # of the template itself, whatever the row
        why = str(error)
    assert re.search(message, why)
    assert "\n" not in why


def test_a_tokenizer_that_cannot_be_used() -> None:
    with pytest.raises(UserError, match=r"SimpleNamespace is not a fast tokenizer: use a model with a tokenizer\.json"):
        Tokenization(SimpleNamespace(is_fast=False), max_length=100)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the tokenizer has no EOS token"):
        tokenized(plain("hi", "yes"), word_tokenizer(eos_token=None))


def test_special_tokens_that_swallow_the_space_after_them() -> None:
    """As Phi-3's (`rstrip`)."""
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(t, special=True, rstrip=True) for t in ("<|end|>", "<|user|>")]}
    )
    [sample] = tokenized(chat("user hi", "assistant yes", "user why", "assistant so"), tokenizer)
    assert sample == Sample(
        [4, 11, 6, 5, 12, 6, 4, 13, 6, 5, 14, 6],
        [_, _, _, _, 12, 6, _, _, _, _, 14, 6],
    )


@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data/tool_calls beside the project")
def test_real_conversations_teach_the_assistants_words_and_nothing_else() -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function | tojson }}{% endfor %}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = byte_tokenizer([("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("Ċ", "Ċ")], template)
    for row in json.loads(REAL.read_text())[:60]:
        conversation = messages(row, column="conversations", role="from", content="value", tools="tools")
        assert isinstance(conversation, Conversation)
        assert conversation.messages
        [sample] = tokenized(conversation, tokenizer, max_length=100_000)
        said = [
            m["content"] + "".join(json.dumps(call["function"]) for call in m.get("tool_calls", ()))
            for m in conversation.messages
            if m["role"] == "assistant"
        ]
        learned = tokenizer.decode([t for t in sample.labels if t != IGNORE])
        assert learned == "".join(f"{reply}<|end|>" for reply in said)
        first = next(i for i, m in enumerate(conversation.messages) if m["role"] == "assistant")
        served = encode(tokenizer, ChatTemplate(tokenizer).render(conversation.messages[:first], None, True)).ids
        assert sample.input_ids[: len(served)] == served
        assert all(label in (IGNORE, token) for token, label in zip(sample.input_ids, sample.labels, strict=True))
