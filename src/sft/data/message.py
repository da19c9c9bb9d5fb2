"""One message of a row → the message that a chat template takes, and the weight of its loss."""

import math
from collections.abc import Mapping
from decimal import Decimal

from sft.data.tool_calls import from_turn, tool_calls
from sft.data.value import is_list, kind, short
from sft.errors import BadRow

# Role names in use (ShareGPT's among them) → those of chat templates. `function_call` becomes an assistant's turn that
# calls tools.
ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool", "function_call")},
    **{"human": "user", "gpt": "assistant", "model": "assistant", "observation": "tool", "function": "tool"},
    **{"tool_call": "function_call", "tool_response": "tool"},
}
REASONING = ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")
THOUGHT_PARTS = ("thinking", "reasoning")
LEAST_WEIGHT, LARGEST_WEIGHT = 1e-6, 1e6  # but for 0; stored in float32, which would make 0 or infinity of others
OURS = ("weight", "train")  # keys that say what is trained, and are no part of what the model reads


def message(turn: object, role_key: str, content_key: str, roles: Mapping[str, str]) -> tuple[dict[str, object], float]:
    """`role`, `content` (a text), and where there are any `reasoning_content` (a text) and `tool_calls`; other keys
    unchanged, those that are null left out. And the message's weight."""
    if not isinstance(turn, Mapping) or role_key not in turn:
        keys = f"the keys {', '.join(map(repr, turn))}" if isinstance(turn, Mapping) else kind(turn)
        raise BadRow("not_a_message", f"a message needs a key {role_key!r}, but this one has {keys}")
    name = turn[role_key]
    if not isinstance(name, str) or name not in roles:
        given = ", ".join(roles)
        raise BadRow("unknown_role", f"unknown role {name!r}: use one of {given}, or map it in data.conversation.roles")
    role = roles[name]
    if content_key not in turn and role not in ("assistant", "tool", "function_call"):
        keys = ", ".join(map(repr, turn))
        raise BadRow("no_content", f"a message of role {name!r} needs a key {content_key!r}, but this one has {keys}")
    rest = {
        key: value for key, value in turn.items() if value is not None and key not in (role_key, content_key, *OURS)
    }
    calls = _calls(rest)
    if role == "function_call":
        thought, content, called = from_turn(turn.get(content_key))
        role, calls = "assistant", [*called, *calls]
    else:
        content, thought = _content(turn.get(content_key))
    made: dict[str, object] = {"role": role, "content": content}
    if role == "assistant" and (reasoning := _reasoning(rest, thought)):
        made["reasoning_content"] = reasoning
    if role == "assistant" and calls:
        made["tool_calls"] = calls
    elif calls:
        raise BadRow("tool_call_by_another", f"a message of role {name!r} calls tools, which only an assistant does")
    return {**made, **rest}, _weight(turn)


def _calls(rest: dict[str, object]) -> list[dict[str, object]]:
    """Takes `tool_calls`, or OpenAI's older `function_call`, out of a message's keys."""
    calls, call = rest.pop("tool_calls", None), rest.pop("function_call", None)
    if calls and call:
        raise BadRow("not_a_tool_call", "a message has both tool_calls and function_call: leave one out")
    return tool_calls(calls or call) if calls or call else []


def _content(content: object) -> tuple[str, str]:
    """(text, reasoning) of a text, of a list of parts, or of null."""
    if content is None or isinstance(content, str):
        return content or "", ""
    if not is_list(content):
        raise BadRow("not_a_text", f"the content of a message is {kind(content)}, not a string")
    texts, thoughts = [], []
    for part in content:  # type: ignore[attr-defined]
        part_type = part.get("type", "text") if isinstance(part, Mapping) else "text"
        inner = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if part_type in TEXT_PARTS and isinstance(inner, str):
            texts.append(inner)
        elif part_type in THOUGHT_PARTS:
            inner = next((part[key] for key in (*THOUGHT_PARTS, "text") if part.get(key) is not None), None)
            thoughts.append(_content(inner)[0])
        else:
            raise BadRow("other_content", f"a message has a part that is no text: {short(part)}")
    return "".join(texts), "".join(thoughts)


def _reasoning(rest: dict[str, object], thought: str) -> str:
    """Takes the reasoning out of a message's keys; `thought` is what its content holds of it."""
    found = [thought] if thought.strip() else []
    for key in REASONING:
        value = rest.get(key)
        if value is None:
            continue
        if not isinstance(value, str):
            raise BadRow("not_a_text", f"{key} of a message is {kind(value)}, not a string")
        rest.pop(key)
        found += [value] if value.strip() else []
    if len(set(found)) > 1:
        raise BadRow("two_reasonings", f"a message has reasoning twice: {short(found[0])} and {short(found[1])}")
    return found[0] if found else ""


def _weight(turn: Mapping[str, object]) -> float:
    """What the message's loss is multiplied by: its `weight`, 0 where `train` is false, else 1."""
    train, weight = turn.get("train"), turn.get("weight")
    if train is not None and (not isinstance(train, bool | int) or train not in (0, 1)):
        raise BadRow("bad_weight", f"train of a message is {short(train)}, not true or false")
    if weight is None:
        value = 1.0
    elif isinstance(weight, bool) or not isinstance(weight, int | float | Decimal):
        raise BadRow("bad_weight", f"weight of a message is {short(weight)}, not a number")
    else:
        try:
            value = float(weight)
        except OverflowError:
            value = math.inf
    if value != 0 and not LEAST_WEIGHT <= value <= LARGEST_WEIGHT:
        raise BadRow("bad_weight", f"weight of a message is {short(weight)}, not 0 or from 1e-6 to 1e6")
    return 0.0 if train is not None and not train else value
