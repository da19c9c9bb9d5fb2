"""Tool calls and tool definitions, in the forms in use → the form that chat templates read."""

import json
import re
from collections.abc import Mapping

from sft.data.value import is_list, parsed, short
from sft.errors import BadRow

Call = dict[str, object]
THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.S)


def tool_calls(calls: object) -> list[Call]:
    """A list of calls, or a single one."""
    return [_call(call) for call in calls] if is_list(calls) else [_call(calls)]  # type: ignore[attr-defined]


def from_turn(value: object) -> tuple[str, str, list[Call]]:
    """(reasoning, content, calls) of a turn that is a call: JSON, JSON as text, or such text after a thought or other
    text."""
    if isinstance(value, Mapping) or is_list(value):
        return "", "", tool_calls(value)
    thought = THOUGHT.fullmatch(value) if isinstance(value, str) else None
    reasoning, rest = (thought[1], thought[2]) if thought else ("", value)
    if isinstance(rest, str) and rest.lstrip()[:1] not in ("{", "["):
        for begin in re.finditer(r"(?<![\[{,:\s])\s*([{\[])", rest):  # not within JSON that is broken
            try:
                calls, end = json.JSONDecoder().raw_decode(rest, begin.start(1))
            except (ValueError, RecursionError):
                continue
            if not rest[end:].strip():
                return reasoning, rest[: begin.start()], tool_calls(calls)
    return reasoning, "", tool_calls(parsed(rest, "a function_call"))


def tools(value: object, column: str) -> list[dict[str, object]] | None:
    """Tool definitions in OpenAI's form, from a list of them or its JSON; None without any."""
    value = parsed(value, f"column {column!r}") if isinstance(value, str) and value.strip() else value
    if not value or isinstance(value, str):  # "" is none
        return None
    if not is_list(value):
        raise BadRow("not_tools", f"column {column!r} holds {short(value)}, not a list of tool definitions")
    return [_tool(tool, column) for tool in value] or None  # type: ignore[attr-defined]


def _tool(value: object, column: str) -> dict[str, object]:
    tool = parsed(value, f"a tool of column {column!r}") if isinstance(value, str) else value
    if not isinstance(tool, Mapping):
        raise BadRow("not_tools", f"column {column!r} holds {short(value)} among the tools, not a definition")
    return dict(tool) if "function" in tool else {"type": "function", "function": tool}


def _call(call: object) -> Call:
    """In OpenAI's form, except that `arguments` is a mapping, as templates and the servers that use them expect."""
    outer = call if isinstance(call, Mapping) else {}
    function = outer.get("function", outer)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
        raise BadRow("not_a_tool_call", f"a tool call needs 'name' and 'arguments', but this one is {short(call)}")
    rest = {} if outer.get("id") is None else {"id": outer["id"]}
    made = {"name": function["name"], "arguments": _arguments(function.get("arguments"), str(function["name"]))}
    return {**rest, "type": "function", "function": made}


def _arguments(value: object, name: str) -> dict[str, object]:
    """An object, or its JSON; no arguments, null or "" are {}."""
    what = f"the arguments of a call of {name!r}"
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    meant = parsed(value, what) if isinstance(value, str) else value
    if not isinstance(meant, Mapping):
        raise BadRow("arguments_not_an_object", f"{what} are {short(value)}, not an object")
    return dict(meant)
