"""Templates of the forms that real ones have: what is served, what must then be emitted, and what is counted as lost.

A sample is shown as its text with each learned stretch in ⟦⟧.
"""

from itertools import groupby
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sft.data.chat_template import ChatTemplate
from sft.data.conversation import Conversation
from sft.data.labels import IGNORE, Sample
from sft.data.mask import Tokenization
from sft.data.outline import Outlines
from sft.errors import UserError

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


def tokenizer_of(template: str, *special: str, eos: str, bos: str | None = None) -> PreTrainedTokenizerFast:
    """Bytes as tokens, and special ones; <think> and </think> are tokens too, but not special, as in Qwen3."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos, chat_template=template)


def shown(tokenizer: Any, sample: Sample) -> str:
    text = ""
    pairs = zip(sample.input_ids, sample.labels, strict=True)
    for learned, group in groupby(pairs, key=lambda pair: pair[1] != IGNORE):
        tokens = list(group)
        assert all(label in (IGNORE, token) for token, label in tokens)
        stretch = tokenizer.decode([token for token, _ in tokens])
        text += f"⟦{stretch}⟧" if learned else stretch
    return text


def tokenized(tokenizer: Any, *messages: dict[str, Any], **settings: Any) -> list[str] | dict[str, str]:
    """The samples; or why the row, or a part of it, was lost. Asked three times: the third takes the outline, where the
    conversation has one, and gives the same."""
    tools = TOOLS if any("tool_calls" in message for message in messages) else None
    tokenization = Tokenization(tokenizer, **{"max_length": 1000, **settings})
    made = [tokenization(Conversation(messages=list(messages), tools=tools)) for _ in range(3)]
    assert made[0] == made[1] == made[2]
    return dict(made[0].reasons) or [shown(tokenizer, sample) for sample in made[0].samples]


def user(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def reply(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(**arguments: object) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}"
    "{%- endif %}{{ m.content }}"
    "{%- for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def chatml() -> PreTrainedTokenizerFast:
    return tokenizer_of(CHATML, "<|endoftext|>", "<|im_start|>", "<|im_end|>", eos="<|endoftext|>")


def test_a_turn_whose_prompt_has_begun_the_thought_begins_with_it() -> None:
    """As DeepSeek-R1's, whose template renders no thought at all."""
    r1 = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
        "{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}<|eos|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
    )
    tokenizer = tokenizer_of(r1, "<|bos|>", "<|eos|>", "<|User|>", "<|Assistant|>", bos="<|bos|>", eos="<|eos|>")
    asked = [user("6 + 7?"), reply("13", reasoning_content="Ten and three."), user("And 1?")]
    assert tokenized(tokenizer, *asked, reply("14", reasoning_content="One on.")) == [
        "<|bos|><|User|>6 + 7?<|Assistant|><think>\n⟦Ten and three.\n</think>\n\n13<|eos|>⟧",
        "<|bos|><|User|>6 + 7?<|Assistant|>13<|eos|><|User|>And 1?<|Assistant|><think>\n"
        "⟦One on.\n</think>\n\n14<|eos|>⟧",
    ]
    in_the_text = reply("<think>\nTen and three.\n</think>\n\n13")
    assert tokenized(tokenizer, user("6 + 7?"), in_the_text) == [
        "<|bos|><|User|>6 + 7?<|Assistant|><think>\n⟦Ten and three.\n</think>\n\n13<|eos|>⟧"
    ]
    assert tokenized(tokenizer, user("6 + 7?"), reply("13")) == {
        "no_reasoning": "the prompt ends in <think>, so the answer has to begin with the reasoning, and the message "
        "has none: give the messages their reasoning_content"
    }


SWITCHED = (  # as Nemotron's and QwQ's: the prompt has the thought, or an empty one; history has none
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}"
    "<|assistant|>{{ '<think>' if enable_thinking else '<think></think>' }}{% endif %}"
)


def test_the_setting_that_helps_is_told() -> None:
    tokenizer = tokenizer_of(SWITCHED, "<|user|>", "<|assistant|>", "<|end|>", eos="<|end|>")
    thinking = {"template": {"enable_thinking": True}}
    assert tokenized(tokenizer, user("6 + 7?"), reply("13")) == [
        "<|user|>6 + 7?<|end|><|assistant|><think></think>⟦13<|end|>⟧"
    ]
    made = tokenized(tokenizer, user("6 + 7?"), reply("13"), **thinking)
    assert "set model.template.enable_thinking=false" in made["no_reasoning"]
    with_thought = reply("13", reasoning_content="Ten and three.")
    assert tokenized(tokenizer, user("6 + 7?"), with_thought, **thinking) == [
        "<|user|>6 + 7?<|end|><|assistant|><think>⟦Ten and three.</think>13<|end|>⟧"
    ]
    made = tokenized(tokenizer, user("6 + 7?"), with_thought)
    assert "set model.template.enable_thinking=true, or data.train_reasoning=false" in made["reasoning_not_rendered"]
    assert tokenized(tokenizer, user("6 + 7?"), with_thought, train_reasoning=False) == [
        "<|user|>6 + 7?<|end|><|assistant|><think></think>⟦13<|end|>⟧"
    ]


def test_an_answer_is_never_taken_for_the_thought() -> None:
    """As Nemotron Nano 2's, whose last turn opens the thought as its prompt does, and never ends it."""
    nano = (
        "{% for m in messages %}<|{{ m.role }}|>{{ '<think>' if loop.last and m.role == 'assistant' }}"
        "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
    )
    tokenizer = tokenizer_of(nano, "<|user|>", "<|assistant|>", "<|end|>", eos="<|end|>")
    assert set(tokenized(tokenizer, user("6 + 7?"), reply("13"))) == {"no_reasoning"}


def test_a_turn_that_the_next_turns_first_token_ends() -> None:
    """As GLM's, which a server stops at <|user|> and, after a call, at <|observation|>."""
    glm = (
        "[gMASK]{% for m in messages %}{% if m.role == 'tool' %}<|observation|>\n{{ m.content }}"
        "{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}"
        "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
        "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    special = ("<|endoftext|>", "[gMASK]", "<|user|>", "<|assistant|>", "<|observation|>")
    tokenizer = tokenizer_of(glm, *special, eos="<|endoftext|>")
    assert tokenized(tokenizer, user("Hi"), reply("Hello."), user("Bye"), reply("So long.")) == [
        "[gMASK]<|user|>\nHi<|assistant|>⟦\nHello.<|user|>⟧\nBye<|assistant|>⟦\nSo long.<|user|>⟧"
    ]
    turns = [user("Warm?"), reply("", tool_calls=[call(town="Graz")]), {"role": "tool", "content": "21"}, reply("Yes.")]
    assert tokenized(tokenizer, *turns) == [
        '[gMASK]<|user|>\nWarm?<|assistant|>⟦\n<call>weather {"town": "Graz"}</call><|observation|>⟧\n21'
        "<|assistant|>⟦\nYes.<|user|>⟧"
    ]
    made = Tokenization(tokenizer, max_length=1000)(Conversation(messages=turns))
    assert tokenizer.decode(list(made.stops)) == "<|observation|><|user|>"


def test_a_turn_without_an_end_is_refused() -> None:
    """What begins every turn, the assistant's too, ends none."""
    endless = CHATML.replace("<|im_end|>", "")
    tokenizer = tokenizer_of(endless, "<|endoftext|>", "<|im_start|>", eos="<|endoftext|>")
    with pytest.raises(UserError, match="would never learn to stop"):
        tokenized(tokenizer, user("Hi"), reply("Hello."))


def test_eos_right_behind_another_end_is_the_stop_if_each_turn_has_it() -> None:
    cohere = (
        "{% for m in messages %}<|TURN|><|{{ m.role }}|><|START|>{{ m.content }}<|END|><|TURN_END|>{% endfor %}"
        "{% if add_generation_prompt %}<|TURN|><|assistant|>{% endif %}"
    )
    special = ("<|TURN|>", "<|user|>", "<|assistant|>", "<|START|>", "<|END|>", "<|TURN_END|>")
    assert tokenized(tokenizer_of(cohere, *special, eos="<|TURN_END|>"), user("Hi"), reply("Hello.")) == [
        "<|TURN|><|user|><|START|>Hi<|END|><|TURN_END|><|TURN|><|assistant|>⟦<|START|>Hello.<|END|><|TURN_END|>⟧"
    ]
    phi = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
    )
    tokenizer = tokenizer_of(phi, "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>", eos="<|endoftext|>")
    assert tokenized(tokenizer, user("Hi"), reply("Hello.")) == ["<|user|>Hi<|end|><|assistant|>⟦Hello.<|end|>⟧"]


def test_channels_and_a_history_that_is_rewritten() -> None:
    """As gpt-oss's: a thought goes before a call or an answer, and is dropped once there is a later answer."""
    oss = (
        "{%- for m in messages %}{%- if m.role == 'assistant' %}"
        "{%- set is_last = loop.last %}"
        "{%- if m.thinking and (is_last or m.tool_calls and messages[-1].role != 'assistant') %}"
        "{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{%- endif %}"
        "{%- for c in m.tool_calls or [] %}"
        "{{- '<|start|>assistant<|channel|>' + c.function.name + '<|message|>' }}{{- c.function.arguments | tojson }}"
        "{{- '<|call|>' }}{%- endfor %}"
        "{%- if not m.tool_calls %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
        "{{- '<|return|>' if is_last else '<|end|>' }}{%- endif %}"
        "{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"
    )
    special = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")
    tokenizer = tokenizer_of(oss, *special, eos="<|return|>")
    turns = [
        user("Warm?"),
        reply("", reasoning_content="Look.", tool_calls=[call(town="Graz")]),
        {"role": "tool", "content": "21"},
        reply("Yes.", reasoning_content="It is."),
    ]
    begin = "<|start|>user<|message|>Warm?<|end|><|start|>assistant"
    look = '<|channel|>analysis<|message|>Look.<|end|><|start|>assistant<|channel|>weather<|message|>{"town": "Graz"}'
    assert tokenized(tokenizer, *turns) == [
        begin + "⟦" + look + "<|call|>⟧<|start|>tool<|message|>21<|end|><|start|>assistant"
        "⟦<|channel|>analysis<|message|>It is.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>⟧"
    ]


def test_the_turn_is_a_sample_of_its_own_where_it_changes_what_is_before_it() -> None:
    """As Mistral's: the system message stands before the last question, but only while that is the last message."""
    mistral = (
        "{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}<s>"
        "{%- for m in messages %}{%- if m.role == 'user' %}"
        "{{- '[INST]' + (system + ': ' if loop.last and system else '') + m.content + '[/INST]' }}"
        "{%- elif m.role == 'assistant' %}{{- m.content + '</s>' }}{%- endif %}{%- endfor %}"
    )
    tokenizer = tokenizer_of(mistral, "<s>", "</s>", "[INST]", "[/INST]", bos="<s>", eos="</s>")
    system = {"role": "system", "content": "Be brief"}
    assert tokenized(tokenizer, system, user("Hi"), reply("Hello."), user("Bye"), reply("So.")) == [
        "<s>[INST]Be brief: Hi[/INST]⟦Hello.</s>⟧",
        "<s>[INST]Hi[/INST]Hello.</s>[INST]Be brief: Bye[/INST]⟦So.</s>⟧",
    ]


def test_two_turns_of_the_assistant_in_a_row(chatml: PreTrainedTokenizerFast) -> None:
    assert tokenized(chatml, user("Hi"), reply("A wren."), reply("Or a robin.")) == [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦A wren.<|im_end|>⟧\n"
        "<|im_start|>assistant\n⟦Or a robin.<|im_end|>⟧"
    ]
    strict = CHATML.replace(
        "{%- for m in messages %}",
        "{%- for m in messages %}{% if loop.index0 and messages[loop.index0 - 1].role == m.role %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}",
        1,
    )
    tokenizer = tokenizer_of(strict, "<|endoftext|>", "<|im_start|>", "<|im_end|>", eos="<|endoftext|>")
    made = tokenized(tokenizer, user("Hi"), reply("A wren."), reply("Or a robin."))
    assert made == {"template_refuses": "the chat template refuses these messages: roles must alternate"}


class TestConservation:
    """What a message brings is in what is rendered for it."""

    def test_text_beside_a_call(self) -> None:
        """As Llama 3's, which renders the call alone."""
        llama = (
            "{% for m in messages %}<|{{ m.role }}|>{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}"
            "{% else %}{{ m.content }}{% endif %}<|eot|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}"
        )
        tokenizer = tokenizer_of(llama, "<|user|>", "<|assistant|>", "<|tool|>", "<|eot|>", eos="<|eot|>")
        text = reply("Let me look that up.", tool_calls=[call(town="Graz")])
        assert tokenized(tokenizer, user("Warm?"), text) == {
            "content_not_rendered": "the chat template leaves out the text 'Let me look that up.'"
        }
        assert set(tokenized(tokenizer, user("Warm?"), reply("a", tool_calls=[call(town="Graz")]))) == {
            "content_not_rendered"  # though there is an "a" in the call
        }
        two = reply("", tool_calls=[call(town="Graz"), call(town="Linz")])
        assert set(tokenized(tokenizer, user("Warm?"), two)) == {"tool_call_not_rendered"}

    def test_calls(self) -> None:
        """As Gemma's and Phi's, which render the text alone."""
        gemma = (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}"
        )
        tokenizer = tokenizer_of(gemma, "<|user|>", "<|assistant|>", "<|end|>", eos="<|end|>")
        made = tokenized(tokenizer, user("Warm?"), reply("I look.", tool_calls=[call(town="Graz")]))
        assert "leaves out 'weather' of the call of weather" in made["tool_call_not_rendered"]
        assert set(tokenized(tokenizer, user("Warm?"), reply("", tool_calls=[call(town="Graz")]))) == {
            "tool_call_not_rendered"
        }

    def test_values_as_templates_write_them(self, chatml: PreTrainedTokenizerFast) -> None:
        values = call(n=17.250000012345676, tiny=3e-11, two=2, no=None, yes=True, text='é "q"\n', list=[1, {"a": "b"}])
        [sample] = tokenized(chatml, user("Go."), reply("", tool_calls=[values]))
        arguments = (
            '{"n": 17.250000012345676, "tiny": 3e-11, "two": 2, "no": null, "yes": true, "text": "é \\"q\\"\\n", '
            '"list": [1, {"a": "b"}]}'
        )
        assert f'{{"name": "weather", "arguments": {arguments}}}' in sample

    def test_reasoning(self, chatml: PreTrainedTokenizerFast) -> None:
        thought = reply("43", reasoning_content="20 and 23 is 43.")
        assert tokenized(chatml, user("17 + 26?"), thought) == [
            "<|im_start|>user\n17 + 26?<|im_end|>\n<|im_start|>assistant\n"
            "⟦<think>\n20 and 23 is 43.\n</think>\n\n43<|im_end|>⟧"
        ]
        deaf = CHATML.replace("m.reasoning_content", "false")
        tokenizer = tokenizer_of(deaf, "<|endoftext|>", "<|im_start|>", "<|im_end|>", eos="<|endoftext|>")
        assert tokenized(tokenizer, user("17 + 26?"), thought) == {
            "reasoning_not_rendered": "the chat template leaves out the reasoning '20 and 23 is 43.': set "
            "model.chat_template to one that renders it, or data.train_reasoning=false to train without it"
        }

    def test_a_response_of_nothing_but_the_stop_token(self) -> None:
        empty = (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content if m.role == 'user' }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}"
        )
        tokenizer = tokenizer_of(empty, "<|user|>", "<|assistant|>", "<|end|>", eos="<|end|>")
        assert set(tokenized(tokenizer, user("Hi"), reply("e"))) == {"content_not_rendered"}


class TestSwitches:
    """Reasoning and calls off: they are read, and carry no loss; the stop token always does."""

    turns = (user("Hi"), reply("Hm.", reasoning_content="I see.", tool_calls=[call(town="Graz")]))
    begin = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    called = '\n<tool_call>\n{"name": "weather", "arguments": {"town": "Graz"}}\n</tool_call>'

    def test_reasoning(self, chatml: PreTrainedTokenizerFast) -> None:
        assert tokenized(chatml, *self.turns, train_reasoning=False) == [
            f"{self.begin}<think>\nI see.\n</think>\n\n⟦Hm.{self.called}<|im_end|>⟧"
        ]
        no_text = (user("Hi"), {**self.turns[1], "content": ""})
        assert tokenized(chatml, *no_text, train_reasoning=False) == [
            f"{self.begin}<think>\nI see.\n</think>\n\n\n⟦{self.called[1:]}<|im_end|>⟧"
        ]

    @pytest.mark.parametrize(
        ("thoughtful", "before"),
        [
            (reply("Hm.", reasoning_content="I see."), "<think>\nI see.\n</think>\n\n"),
            (reply("<think>I see.</think>Hm."), "<think>I see.</think>"),
        ],
        ids=["key", "content"],
    )
    def test_reasoning_of_the_second_row_of_a_form_as_of_the_first(
        self, thoughtful: dict[str, Any], before: str, chatml: PreTrainedTokenizerFast
    ) -> None:
        tokenize = Tokenization(chatml, max_length=1000, train_reasoning=False)
        made = [tokenize(Conversation(messages=[user("Hi"), thoughtful])) for _ in range(4)]
        expected = f"{self.begin}{before}⟦Hm.<|im_end|>⟧"
        assert [shown(chatml, sample) for row in made for sample in row.samples] == [expected] * 4

    def test_calls(self, chatml: PreTrainedTokenizerFast) -> None:
        assert tokenized(chatml, *self.turns, train_tool_calls=False) == [
            f"{self.begin}⟦<think>\nI see.\n</think>\n\nHm.⟧{self.called}⟦<|im_end|>⟧"
        ]

    def test_a_turn_of_nothing_else_is_context(self, chatml: PreTrainedTokenizerFast) -> None:
        only = (user("Hi"), reply("", tool_calls=[call(town="Graz")]))
        made = Tokenization(chatml, max_length=1000, train_tool_calls=False)(Conversation(messages=list(only)))
        assert made.samples == [] and set(made.reasons) == {"no_supervised_token"}
        more = (*only, {"role": "tool", "content": "21"}, reply("Warm."))
        assert tokenized(chatml, *more, train_tool_calls=False) == [
            f"{self.begin}{self.called}<|im_end|>\n<|im_start|>tool\n21<|im_end|>\n<|im_start|>assistant\n⟦Warm.<|im_end|>⟧"
        ]

    def test_the_last_turn_alone(self, chatml: PreTrainedTokenizerFast) -> None:
        assert tokenized(chatml, user("Hi"), reply("A."), user("So"), reply("B."), train_on="last") == [
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nA.<|im_end|>\n<|im_start|>user\nSo<|im_end|>\n"
            "<|im_start|>assistant\n⟦B.<|im_end|>⟧"
        ]


class TestSpecialText:
    """The text of a special token within a message."""

    turns = (user("Which?"), reply("It is <|im_end|> here."))
    begin = "<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n"

    def test_it_is_counted(self, chatml: PreTrainedTokenizerFast) -> None:
        assert tokenized(chatml, *self.turns) == {
            "special_text": "the row holds '<|im_end|>', which is a special token: set data.special_text=as_text, or "
            "as_tokens"
        }
        assert set(tokenized(chatml, user("a<|im_start|>b"), reply("c"))) == {"special_text"}
        quoted = reply("", tool_calls=[call(town="<|im_end|>")])
        assert set(tokenized(chatml, user("a"), quoted)) == {"special_text"}
        tools = [{"type": "function", "function": {"name": "f", "description": "ends in <|im_end|>"}}]
        row = Conversation(messages=[user("a"), reply("b")], tools=tools)
        assert set(Tokenization(chatml, max_length=1000)(row).reasons) == {"special_text"}

    def test_as_tokens(self, chatml: PreTrainedTokenizerFast) -> None:
        tokenization = Tokenization(chatml, max_length=1000, special_text="as_tokens")
        [sample] = tokenization(Conversation(messages=list(self.turns))).samples
        assert shown(chatml, sample) == f"{self.begin}⟦It is <|im_end|> here.<|im_end|>⟧"
        assert sample.input_ids.count(chatml.convert_tokens_to_ids("<|im_end|>")) == 3

    def test_as_text(self, chatml: PreTrainedTokenizerFast) -> None:
        tokenization = Tokenization(chatml, max_length=1000, special_text="as_text")
        [sample] = tokenization(Conversation(messages=list(self.turns))).samples
        assert shown(chatml, sample) == f"{self.begin}⟦It is <|im_end|> here.<|im_end|>⟧"
        assert sample.input_ids.count(chatml.convert_tokens_to_ids("<|im_end|>")) == 2
        [plain] = tokenization(Conversation(prompt="a<|im_end|>", response="b<|endoftext|>")).samples
        assert shown(chatml, plain) == "a<|im_end|>⟦b<|endoftext|><|endoftext|>⟧"
        assert sum(token > 255 for token in plain.input_ids) == 1


def test_weights_of_messages(chatml: PreTrainedTokenizerFast) -> None:
    tokenization = Tokenization(chatml, max_length=1000)
    turns = [user("A"), reply("Six."), user("Sure?"), reply("No.")]
    [sample] = tokenization(Conversation(messages=turns, weights=(1.0, 0.0, 1.0, 1.0))).samples
    assert shown(chatml, sample).endswith("Six.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
                                          "⟦No.<|im_end|>⟧")  # fmt: skip
    assert sample.weights is None
    [sample] = tokenization(Conversation(messages=turns, weights=(1.0, 0.5, 1.0, 2.0))).samples
    weights = [weight for weight, label in zip(sample.weights or (), sample.labels, strict=True) if label != IGNORE]
    assert weights == [0.5] * 5 + [2.0] * 4
    assert sum(sample.weights or ()) == sum(weights)


def test_keys_that_the_template_does_not_read(chatml: PreTrainedTokenizerFast) -> None:
    turns = [{**user("A"), "name": "Ann"}, reply("B", id=7)]
    made = Tokenization(chatml, max_length=1000)(Conversation(messages=turns, template={"parallel": True}))
    assert made.unread == {"name", "id", "parallel"}


def test_a_template_that_reads_parts_gets_them() -> None:
    parts = (
        "{% for m in messages %}<|{{ m.role }}|>{% for p in m.content %}{{ p.text }}{% endfor %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = tokenizer_of(parts, "<|user|>", "<|assistant|>", "<|end|>", eos="<|end|>")
    assert tokenized(tokenizer, user("Hi"), reply("Yes.")) == ["<|user|>Hi<|end|><|assistant|>⟦Yes.<|end|>⟧"]


def test_own_tokens_are_checked_against_the_vocabulary(chatml: PreTrainedTokenizerFast) -> None:
    tokenization = Tokenization(chatml, max_length=1000)
    row = Conversation(input_ids=[1, 5, 6, 7], labels=[IGNORE, IGNORE, 6, 7])
    assert tokenization(row).samples == [Sample([1, 5, 6, 7], [IGNORE, IGNORE, 6, 7])]
    assert set(tokenization(Conversation(input_ids=[], labels=[])).reasons) == {"no_supervised_token"}
    for token in (-1, len(chatml)):
        assert set(tokenization(Conversation(input_ids=[1, token], labels=[1, token])).reasons) == {"unknown_token"}


class TestOutlines:
    """One rendering a conversation, once two of its form were rendered turn by turn: the same samples."""

    @pytest.mark.parametrize("text", ["  padded \n", "has <|im_end| in it", "user", "assistant", "a\u00a0", "\n\nx"])
    def test_odd_texts(self, chatml: PreTrainedTokenizerFast, text: str) -> None:
        fast = Tokenization(chatml, max_length=1000)
        for word in ("one", "two", "three"):
            fast(Conversation(messages=[user(word), reply(word), user(word), reply(word)]))
        odd = Conversation(messages=[user(text), reply(text), user("b"), reply(text)])
        assert fast(odd) == Tokenization(chatml, max_length=1000)(odd)

    def test_a_template_that_searches_texts_is_not_guessed(self) -> None:
        """The second text has a word that the template looks for."""
        searching = (
            "{% for m in messages %}<|{{ m.role }}|>"
            "{{ m.content.split('</x>')[-1] if '</x>' in m.content else m.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}"
        )
        tokenizer = tokenizer_of(searching, "<|user|>", "<|assistant|>", "<|end|>", eos="<|end|>")
        fast = Tokenization(tokenizer, max_length=1000)
        for word in ("one", "two", "three"):
            fast(Conversation(messages=[user(word), reply(word)]))
        [sample] = fast(Conversation(messages=[user("q</x>hi"), reply("yes")])).samples
        assert shown(tokenizer, sample) == "<|user|>hi<|end|><|assistant|>⟦yes<|end|>⟧"

    def test_a_rendering_that_is_not_the_outline_s_is_not_used(self) -> None:
        """No constant tells that this template writes capitals."""
        upper = (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content | lower }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}"
        )
        tokenizer = tokenizer_of(upper, "<|user|>", "<|assistant|>", "<|end|>", eos="<|end|>")
        fast = Tokenization(tokenizer, max_length=1000)
        for word in ("one", "two", "three"):
            fast(Conversation(messages=[user(word), reply(word)]))
        [sample] = fast(Conversation(messages=[user("HI"), reply("yes")])).samples
        assert shown(tokenizer, sample) == "<|user|>hi<|end|><|assistant|>⟦yes<|end|>⟧"

    def test_few_forms_are_remembered(self, chatml: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sft.data.outline.MOST", 3)
        outlines = Outlines(ChatTemplate(chatml))
        for number in range(10):
            turns = [user("a"), reply("b")] * (number + 1)
            assert outlines.find(turns, None, {}) is None
            assert len(outlines.seen) <= 3
        ids = [[user("a", id=number), reply("b")] for number in range(2)]  # a key that the template doesn't read
        assert [outlines.find(turns, None, {}) is not None for turns in ids] == [False, True]

    def test_it_takes_one_rendering(self, chatml: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers.utils import chat_template_utils

        renderings = []
        render = chat_template_utils.render_jinja_template

        def counted(*args: Any, **kwargs: Any) -> Any:
            renderings.append(args)
            return render(*args, **kwargs)

        tokenization = Tokenization(chatml, max_length=10_000)
        turns = [[user(f"q{i}"), reply(f"a{i}")] for i in range(20)]
        conversation = Conversation(messages=[message for turn in turns for message in turn])
        tokenization(conversation)
        tokenization(conversation)
        monkeypatch.setattr(chat_template_utils, "render_jinja_template", counted)
        [sample] = tokenization(conversation).samples
        assert len(renderings) == 1
        assert shown(chatml, sample).count("⟦") == 20
