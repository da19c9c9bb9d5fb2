"""Row → conversation: what a row of the user's data means.

A row function takes one row and returns a `Conversation`, or `Empty` with the reason if there is nothing to learn
from. `conf/data/*.yaml` names one with its arguments; yours may be in any module. It raises BadRow for a row that it
can't read, without saying which row: the caller adds that, counts the row, and continues.

A setting `system_column` or `tools` that is null means the column `system` or `tools`, where a row has one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sft.data import tool_calls
from sft.data.message import ROLES, message
from sft.data.value import as_text, counted, is_list, kind, parsed, short
from sft.errors import BadRow

Row = Mapping[str, object]
Message = dict[str, object]  # what the chat template takes: role, content, tool_calls, ...
Tools = list[dict[str, object]] | None  # JSON schemas


@dataclass(frozen=True)
class Conversation:
    """A chat (`messages`, and `tools` if it has any); with `messages` None plain text, or a row's own token ids.

    `weights`: what each message's loss is multiplied by, of which those of assistant messages count; 0 makes a message
    context, None is 1 for all. `template`: the row's own arguments for the chat template.
    """

    messages: list[Message] | None = None
    tools: Tools = None
    prompt: str = ""
    response: str = ""
    weights: tuple[float, ...] | None = None  # of each message
    template: Mapping[str, object] = field(default_factory=dict)
    input_ids: list[int] | None = None
    labels: list[int] | None = None  # of each of input_ids: the id, or -100


@dataclass(frozen=True)
class Empty:
    """A row with nothing to learn from: not a mistake, but counted."""

    reason: str


RowFunction = Callable[[Row], Conversation | Empty]

# Names of prompt and response in use.
PAIRS = (
    *(("prompt", "response"), ("question", "answer"), ("instruction", "output"), ("instruction", "response")),
    *(("input", "output"), ("input", "target"), ("query", "response"), ("prompt", "completion"), ("prompt", "answer")),
    *(("source", "target"), ("question", "response"), ("query", "answer"), ("problem", "solution")),
    *(("inputs", "targets"), ("user", "assistant"), ("prompt", "output"), ("prompt", "target"), ("input", "response")),
)


def prompt_response(
    row: Row,
    *,
    prompt: str = "prompt",
    response: str = "response",
    system: str | None = None,
    system_column: str | None = None,
    chat: bool = True,
) -> Conversation | Empty:
    """Two columns: a chat of [system, user, assistant], or plain text, concatenated unchanged.

    `system` is the system message of every row that has none in `system_column`.
    """
    _refuse_preference(row, prompt, response)
    prompt_text, response_text = _text(row, prompt), _text(row, response)
    if not prompt_text.strip():
        return Empty("empty_prompt")
    if not response_text.strip():
        return Empty("empty_response")
    if not chat:
        return Conversation(prompt=prompt_text, response=response_text)
    own = _system(row, system_column)
    return _chat(own or system or "", [(prompt_text, response_text)])


def alpaca(
    row: Row,
    *,
    instruction: str = "instruction",
    input: str = "input",
    output: str = "output",
    history: str = "history",
    system_column: str | None = None,
) -> Conversation | Empty:
    """Columns of Alpaca. A row's `input`, if it has any, follows its instruction on a new line; `history` is a list of
    [instruction, output] before it, whose outputs are trained like every assistant message (data.train_on=last trains
    the last alone)."""
    _refuse_preference(row, instruction, output)
    asked, answer = _text(row, instruction), _text(row, output)
    more = as_text(row.get(input), f"column {input!r}")
    pairs = [*_history(row.get(history), history), (f"{asked}\n{more}" if more.strip() else asked, answer)]
    if any(not prompt.strip() for prompt, _ in pairs):
        return Empty("empty_prompt")
    if any(not response.strip() for _, response in pairs):
        return Empty("empty_response")
    return _chat(_system(row, system_column), pairs)


def messages(
    row: Row,
    *,
    column: str = "messages",
    role: str = "role",
    content: str = "content",
    roles: Mapping[str, str] | None = None,
    tools: str | None = None,
    system_column: str | None = None,
) -> Conversation | Empty:
    """One column of messages or their JSON, each a mapping with keys `role` and `content`; `roles` adds to ROLES.

    Other keys of a message (`name`, `tool_call_id`, ...) reach the template unchanged. A message's `weight`, or 0 for
    `train: false`, multiplies its loss. `tools` names the column of tool definitions, a list or its JSON.
    """
    _refuse_preference(row, column)
    turns = [(turn, 1.0) for turn in _turns(_value(row, column), f"column {column!r}")]
    return _conversation(row, turns, {**ROLES, **(roles or {})}, role, content, tools, system_column)


def conversational(
    row: Row,
    *,
    prompt: str = "prompt",
    response: str = "completion",
    tools: str | None = None,
    system_column: str | None = None,
) -> Conversation | Empty:
    """TRL's conversational prompt and completion: two columns of messages, of which those of the prompt are context."""
    _refuse_preference(row, prompt, response)
    asked, answer = _value(row, prompt), _value(row, response)
    if isinstance(answer, str) and not answer.lstrip().startswith("["):
        answer = [{"role": "assistant", "content": answer}]
    turns = [(turn, 0.0) for turn in _turns(asked, f"column {prompt!r}")]
    if not turns:
        return Empty("empty_prompt")
    turns += [(turn, 1.0) for turn in _turns(answer, f"column {response!r}")]
    return _conversation(row, turns, ROLES, "role", "content", tools, system_column)


def text(row: Row, *, column: str = "text") -> Conversation | Empty:
    """One column of plain text, all of it learned."""
    response = _text(row, column)
    return Conversation(response=response) if response.strip() else Empty("empty_response")


def columns(row: Row) -> str:
    """The columns that a row has, and what to set to read them."""
    given = f"the columns are {counted(row)}"
    if not row:
        return "the row has no columns"
    (first, *others) = row
    for name, shape in (("messages", "messages"), ("conversations", "sharegpt"), ("input_ids", "pretokenized")):
        if name in row:
            return f"{given}: set data={shape}"
    pair = next((pair for pair in PAIRS if set(pair) <= row.keys()), None)
    if pair is None and "text" in row:
        return f"{given}: set data=text"
    pair = pair or (first, others[-1] if others else "COLUMN")
    return f"{given}: set data.conversation.prompt={pair[0]} data.conversation.response={pair[1]}"


def is_preference(label: object) -> bool:
    """Whether a value of a column `label` says that an answer is a good or a bad one."""
    return isinstance(label, bool) or (isinstance(label, str) and label.strip().lower() in ("true", "false"))


def _refuse_preference(row: Row, *read: str) -> None:
    label = dict.get(row, "label") if isinstance(row, dict) else row.get("label")  # a row notes what `row.get` reads
    if "label" not in read and is_preference(label):
        raise BadRow(
            "preference_row",
            "column 'label' says whether the answer is good or bad, which supervised fine-tuning can't learn from: "
            "keep the rows with label true in a file without this column",
        )


def _conversation(
    row: Row,
    turns: Sequence[tuple[object, float]],  # with what multiplies the loss, besides its own weight
    roles: Mapping[str, str],
    role: str,
    content: str,
    tools: str | None,
    system_column: str | None,
) -> Conversation | Empty:
    chat, weights = [], []
    for turn, of_column in turns:
        made, weight = message(turn, role, content, roles)
        chat.append(made)
        weights.append(weight * of_column)
    if system := _system(row, system_column):
        if chat and chat[0]["role"] in ("system", "developer"):
            if chat[0]["content"] != system:
                raise BadRow("two_system_messages", "the row has a system message and another one in its own column")
        else:
            chat.insert(0, {"role": "system", "content": system})
            weights.insert(0, 1.0)
    replies = [(reply, weight) for reply, weight in zip(chat, weights, strict=True) if reply["role"] == "assistant"]
    if not replies:
        return Empty("no_assistant_turn")
    if any(weight and _is_blank(reply) for reply, weight in replies):
        return Empty("empty_response")
    return Conversation(
        messages=chat,
        tools=tool_calls.tools(row.get(tools or "tools"), tools or "tools"),
        weights=None if all(weight == 1 for _, weight in replies) else tuple(weights),
        template=_template(row),
    )


def _template(row: Row) -> dict[str, object]:
    """What a row gives the chat template besides messages and tools: `parallel_tool_calls`, and TRL's
    `chat_template_kwargs`."""
    given = row.get("chat_template_kwargs")
    given = parsed(given, "column 'chat_template_kwargs'") if isinstance(given, str) and given.strip() else given or {}
    if not isinstance(given, Mapping):
        raise BadRow("not_an_object", f"column 'chat_template_kwargs' holds {kind(given)}, not an object")
    parallel = row.get("parallel_tool_calls")
    return {**given, **({} if parallel is None else {"parallel_tool_calls": parallel})}


def _chat(system: str, pairs: Sequence[tuple[str, str]]) -> Conversation:
    turns = [("system", system)] if system else []
    for prompt, response in pairs:
        turns += [("user", prompt), ("assistant", response)]
    return Conversation(messages=[{"role": role, "content": content} for role, content in turns])


def _history(value: object, column: str) -> list[tuple[str, str]]:
    value = parsed(value, f"column {column!r}") if isinstance(value, str) and value.strip() else value
    if not value or isinstance(value, str):
        return []
    where = f"column {column!r}"
    if not is_list(value) or not all(is_list(pair) and len(pair) == 2 for pair in value):  # type: ignore[attr-defined]
        raise BadRow("not_a_history", f"{where} holds {short(value)}, not a list of [instruction, output]")
    return [(as_text(asked, where), as_text(answer, where)) for asked, answer in value]  # type: ignore[attr-defined]


def _turns(value: object, where: str) -> list[object]:
    turns = parsed(value, where) if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else value
    if not is_list(turns):
        raise BadRow("not_messages", f"{where} holds {kind(value)}, not a list of messages")
    return list(turns)  # type: ignore[call-overload]


def _system(row: Row, column: str | None) -> str:
    """The row's own system message; "" without one."""
    name = column or "system"
    content = as_text(row.get(name), f"column {name!r}")
    return content if content.strip() else ""


def _value(row: Row, column: str) -> object:
    if column not in row:
        raise BadRow("no_column", f"no column {column!r}: {columns(row)}")
    return row[column]


def _text(row: Row, column: str) -> str:
    return as_text(_value(row, column), f"column {column!r}")


def _is_blank(reply: Message) -> bool:
    """Whether an assistant's message has nothing to learn."""
    return not (str(reply["content"]).strip() or reply.get("tool_calls") or reply.get("reasoning_content"))
