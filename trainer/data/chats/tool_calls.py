"""Functions that an assistant may call, and its calls, in the spellings that data sets use."""

from __future__ import annotations

import json
from typing import Any

from trainer.data.chats.conversation import Message
from trainer.data.reading.raw import RowError


def read_tools(value: object, drop_nulls: bool = False) -> tuple[dict[str, Any], ...]:
    """Return the functions declared by a record, without OpenAI's wrapping.

    Args:
        value: a list of functions, one function, or either as JSON text; nothing = no tools.
        drop_nulls: leave out keys that are null, which tables of one type for all rows add.

    Raises:
        RowError: malformed JSON, or a function without a name.
    """
    value = parse_json(value, "tools")
    if not value:
        return ()
    tools = []
    for tool in value if isinstance(value, list) else [value]:
        function = tool.get("function", tool) if isinstance(tool, dict) else tool
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"tools hold {_shorten(tool)}, which is no function with a name")
        tools.append(without_nulls(function) if drop_nulls else function)
    return tuple(tools)


def read_calls(value: object, where: str, drop_nulls: bool = False) -> tuple[dict[str, Any], ...]:
    """Return calls as ``{"name": str, "arguments": object}``.

    Args:
        value: a call, a list of calls, or either as JSON text; OpenAI's wrapping may be around.
        where: which message, for the error.
        drop_nulls: as in ``read_tools``.

    Raises:
        RowError: malformed JSON, no name, or arguments that are no object.
    """
    value = parse_json(value, f"{where}: a tool call")
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{where}: the tool call {_shorten(call)} has no name")
        arguments = function.get("arguments", function.get("parameters"))
        arguments = parse_json(arguments, f"{where}: the arguments of {function['name']}")
        if arguments is None:
            arguments = {}
        if not isinstance(arguments, dict):
            raise RowError(
                f"{where}: the arguments of {function['name']} are {_shorten(arguments)}, "
                "not an object"
            )
        arguments = without_nulls(arguments) if drop_nulls else arguments
        calls.append({"name": function["name"], "arguments": arguments})
    return tuple(calls)


class ResultOrder:
    """Put the results of parallel calls into the order of the calls, by their ids.

    A conversation's messages carry no ids, since templates match calls and results by order.
    """

    def __init__(self) -> None:
        self._order: list[tuple[int, int]] = []  # of each message: its turn, its place in there
        self._open: list[str] = []  # ids of the last calls

    def add(self, spoken: dict[str, Any], number: int) -> None:
        """Look at the next message as it was read.

        Raises:
            RowError: it answers a call that was not made.
        """
        answered, calls = spoken.get("tool_call_id"), spoken.get("tool_calls")
        if isinstance(calls, list):
            self._open = [str(c["id"]) for c in calls if isinstance(c, dict) and c.get("id")]
        if answered is None or not self._open:
            self._order.append((number, 0))
            return
        if str(answered) not in self._open:
            raise RowError(f"message {number} is the result of {str(answered)[:40]!r}, not called")
        last = self._order[-1]
        turn = last[0] if last[1] else number
        self._order.append((turn, 1 + self._open.index(str(answered))))

    def sort(self, messages: list[Message]) -> list[Message]:
        """Return the messages that were looked at, results in the order of their calls."""
        order = sorted(range(len(messages)), key=lambda at: self._order[at])
        return [messages[at] for at in order]


def parse_json(value: object, what: str) -> Any:
    """Return ``value``, parsed when it is text; blank text is None.

    Raises:
        RowError: malformed JSON.
    """
    if not isinstance(value, str):
        return value
    if not value or value.isspace():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{what}: malformed JSON: {error}") from error


def without_nulls(value: Any) -> Any:
    """Return ``value`` without the null entries of its objects, at every depth."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


def _shorten(value: object) -> str:
    return repr(value)[:80]
