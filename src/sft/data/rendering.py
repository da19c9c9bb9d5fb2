"""Conversation → text, and where in it each turn of the assistant begins and ends.

A turn's x is the text that a server gives the model, its y the text that the model must then emit. Where the template
renders the whole conversation as a server would have, turn by turn, one text has all turns; where it rewrites history,
each turn whose x doesn't begin with what was said before begins a text of its own.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from sft.data.chat_template import ChatTemplate
from sft.data.conversation import Conversation, Message, Tools
from sft.data.outline import Outline, Outlines
from sft.data.pieces import PROMPTED, THOUGHT, THOUGHTS, is_all_thought, locate, thought_and_answer, untrained
from sft.errors import BadRow

SWITCHES = ("enable_thinking", "thinking")  # arguments by which templates leave the thought out, or in


@dataclass(frozen=True)
class Turn:
    """A turn of the assistant within a text, in characters."""

    begin: int  # where x ends and y begins
    end: int  # of y, its stop token included
    weight: float = 1.0
    untrained: tuple[tuple[int, int], ...] = ()  # stretches that carry no loss
    marked: tuple[tuple[int, int], ...] | None = None  # the template's {% generation %} blocks, if it has any


@dataclass(frozen=True)
class Rendering:
    """A text up to the end of its last turn."""

    text: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Renderer:
    """Conversation → renderings. `keep_reasoning`, `keep_calls`: whether they carry loss."""

    template: ChatTemplate
    keep_reasoning: bool
    keep_calls: bool
    outlines: Outlines

    def __call__(
        self, messages: Sequence[Message], weights: Sequence[float], tools: Tools, arguments: Mapping[str, object]
    ) -> tuple[list[Rendering], dict[str, str]]:
        """The texts of the turns whose weight isn't 0, and why any turn was lost (reason → what exactly)."""
        turns = [i for i, weight in enumerate(weights) if i and weight]  # the first message answers nothing
        if not turns:
            return [], {}
        messages = list(messages[: turns[-1] + 1])
        # An outline doesn't tell where in a turn its thought is.
        off = not self.keep_reasoning and any(thought_and_answer(messages[i])[0] for i in turns)
        outline = None if off else self.outlines.find(messages, tools, arguments)
        if outline and (rendering := self._filled(outline, messages, weights, tools, arguments)):
            return [rendering], {}
        renderings: list[Rendering] = []
        reasons: dict[str, str] = {}
        for i in turns:
            try:
                prompt, response, turn = self._turn(messages[: i + 1], tools, arguments)
            except BadRow as error:
                reasons.setdefault(error.reason, str(error))
                continue
            if turn is None:
                continue
            before: tuple[Turn, ...] = ()
            if renderings and prompt.startswith(renderings[-1].text):
                before = renderings.pop().turns
            renderings.append(Rendering(prompt + response, (*before, replace(turn, weight=weights[i]))))
        return renderings, reasons

    def _filled(
        self,
        outline: Outline,
        messages: list[Message],
        weights: Sequence[float],
        tools: Tools,
        arguments: Mapping[str, object],
    ) -> Rendering | None:
        """The only text of a conversation that is rendered as its outline; None if it turns out that it isn't."""
        text, spans = outline.fill(messages)
        if self.template.render(messages, tools, arguments=arguments) != text:
            return None
        turns = [Turn(*spans[i], weight=weight) for i, weight in enumerate(weights) if i and weight]
        return Rendering(text[: turns[-1].end], tuple(turns))

    def _turn(
        self, messages: list[Message], tools: Tools, arguments: Mapping[str, object]
    ) -> tuple[str, str, Turn | None]:
        """x and y of the last message, and its turn in the text x + y; None in place of the turn if nothing of it
        carries loss."""
        message = messages[-1]
        prompt, whole = self._prompt_and_whole(messages, tools, arguments)
        as_served = whole.startswith(prompt)
        prompted = PROMPTED.search(prompt)
        if as_served and not is_all_thought(prompt, whole[len(prompt) :]):
            response = whole[len(prompt) :]
        elif prompted and whole.startswith(prompt[: prompted.start()]):
            as_served = False
            response = self._after_thought(message, prompted, whole[prompted.start() :])
        else:
            response = self._by_itself(messages, tools, arguments, prompt, whole)
        response = response[: self.template.end_of_turn(response)]
        begin, end = len(prompt), len(prompt) + len(response)
        pieces = locate(
            self.template,
            message,
            response,
            self.keep_reasoning,
            self.keep_calls,
            self._renders(messages, tools, arguments),
            self._switch("true"),
        )
        spans = untrained(self.template, pieces, response, self.keep_reasoning, self.keep_calls)
        if spans == ((0, len(response)),):
            return prompt, response, None
        marked = None
        if as_served:
            marked = self.template.generation_spans(messages, tools, arguments)
        shifted = tuple((begin + first, begin + last) for first, last in spans)
        return prompt, response, Turn(begin, end, 1.0, shifted, None if marked is None else tuple(marked))

    def _prompt_and_whole(
        self, messages: list[Message], tools: Tools, arguments: Mapping[str, object]
    ) -> tuple[str, str]:
        """x of the last message, and the text of all."""
        prompt = self.template.render(messages[:-1], tools, add_generation_prompt=True, arguments=arguments)
        whole = self.template.render(messages, tools, arguments=arguments)
        return prompt, whole + self.template.tail(bool(messages[-1].get("tool_calls")))

    def _renders(self, messages: list[Message], tools: Tools, arguments: Mapping[str, object]) -> Callable[[str], bool]:
        """Whether the last message's content is rendered beside its reasoning and its calls, asked with a text in place
        of it that is nowhere else."""

        def rendered(stand_in: str) -> bool:
            asked = [*messages[:-1], {**messages[-1], "content": stand_in}]
            return stand_in in self.template.render(asked, tools, arguments=arguments)

        return rendered

    def _after_thought(self, message: Message, prompted: re.Match[str], rest: str) -> str:
        """y of a prompt that has begun the thought, by a template that renders the turn without it, as DeepSeek-R1's.

        `rest`: the turn as the template renders it.
        """
        answer = THOUGHT.sub("", rest, count=1)
        if prompted["closing"]:  # there is no thought to be had
            return answer
        thought, _ = thought_and_answer(message)
        if not thought:
            raise BadRow(
                "no_reasoning",
                f"the prompt ends in {prompted[0].strip()}, so the answer has to begin with the reasoning, and the "
                f"message has none: {self._switch('false') or 'give the messages their reasoning_content'}",
            )
        opening = prompted["opening"]
        closing = THOUGHTS.get(opening) or opening.replace("<", "</", 1)
        # As R1 writes them: each on a line of its own, if the one that opens the thought is.
        return f"{thought}\n{closing}\n\n{answer}" if "\n" in prompted["space"] else f"{thought}{closing}{answer}"

    def _switch(self, value: str) -> str | None:
        """The setting that turns thinking on or off, if the template has it."""
        name = next((name for name in SWITCHES if self.template.reads(name)), None)
        return name and f"set model.template.{name}={value}"

    def _by_itself(
        self, messages: list[Message], tools: Tools, arguments: Mapping[str, object], prompt: str, whole: str
    ) -> str:
        """y where the turn changes how the messages before it are rendered: what follows a prompt of nothing but the
        last question, if the whole ends in the same, and the prompt as that one does."""
        asked = [message for message in messages[:-1] if message["role"] == "user"][-1:]
        system = [message for message in messages[:-1] if message["role"] in ("system", "developer")]
        for before in ([*system, *asked], asked):
            try:
                alone, both = self._prompt_and_whole([*before, messages[-1]], tools, arguments)
            except BadRow:  # a template may want a system message
                continue
            response = both[len(alone) :]
            question = str(asked[0]["content"]).strip() if asked else ""
            opening = alone[alone.rfind(question) + len(question) :] if question else alone
            if both.startswith(alone) and response and whole.endswith(response) and prompt.endswith(opening):
                return response
        raise BadRow(
            "not_as_served",
            f"with this chat template the assistant's turn (message {len(messages) - 1}) does not begin with the "
            f"generation prompt (which ends in {prompt[-40:]!r}), so the model would be trained on another text "
            "than it is served with: set model.chat_template to a template whose turns begin with it",
        )


def turn_weights(conversation: Conversation, train_on: str) -> list[float]:
    """The weight of each message: 0 for all that aren't to be learned."""
    messages = conversation.messages or []
    given = conversation.weights or (1.0,) * len(messages)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    learned = turns[-1:] if train_on == "last" else turns
    return [weight if i in learned else 0.0 for i, weight in enumerate(given)]
